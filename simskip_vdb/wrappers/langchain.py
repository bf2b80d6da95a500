"""A refiner in LangChain."""

from __future__ import annotations

from pathlib import Path

from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.refiner import Refiner
from simskip_vdb.wrappers.loading import (
    ANYTHING,
    Expected,
    checked_documents,
    load,
    refined_query,
)

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise MissingDependencyError("langchain-core", "wrappers") from error


class RefinedEmbeddings(Embeddings):
    """Embeddings whose queries pass through a refiner.

    Documents are embedded as they were before, and stored raw: simskip starts from originals, and
    would refine a refined one again.

    Attributes:
        embeddings: Embeds queries and documents.
        refiner: Moves the queries, where it was fitted with side queries or both.

    Args:
        embeddings: The embeddings that the index was filled by.
        refiner: A refiner, or the folder that holds it.
        expect: What the refiner has to be.

    Raises:
        ConfigError: The refiner is not the expected one, or there is none in the folder.
        DataError: Its files are damaged; later, a vector has another dimension.
    """

    def __init__(
        self, embeddings: Embeddings, refiner: Refiner | Path | str, *, expect: Expected = ANYTHING
    ) -> None:
        self.embeddings = embeddings
        self.refiner = load(refiner, expect)

    def embed_query(self, text: str) -> list[float]:
        """Embed and refine a query."""
        return refined_query(self.refiner, self.embeddings.embed_query(text))

    async def aembed_query(self, text: str) -> list[float]:
        """Embed and refine a query."""
        return refined_query(self.refiner, await self.embeddings.aembed_query(text))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents; they are not refined."""
        return checked_documents(self.refiner, self.embeddings.embed_documents(texts))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents; they are not refined."""
        return checked_documents(self.refiner, await self.embeddings.aembed_documents(texts))
