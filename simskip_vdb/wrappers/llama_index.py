"""A refiner in LlamaIndex."""

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
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
except ImportError as error:
    raise MissingDependencyError("llama-index-core", "wrappers") from error


class RefinedEmbedding(BaseEmbedding):
    """An embedding model whose queries pass through a refiner.

    Texts are embedded as they were before, and stored raw: simskip starts from originals, and
    would refine a refined one again. A cache, a rate limiter and callbacks belong to the model
    inside: a cache around this one would give a text's vector to a query with the same words.

    Args:
        embed_model: The embedding model that the index was filled by.
        refiner: A refiner, or the folder that holds it.
        expect: What the refiner has to be.

    Raises:
        ConfigError: The refiner is not the expected one, or there is none in the folder.
        DataError: Its files are damaged; later, a vector has another dimension.
    """

    _embed_model: BaseEmbedding = PrivateAttr()
    _refiner: Refiner = PrivateAttr()

    def __init__(
        self,
        embed_model: BaseEmbedding,
        refiner: Refiner | Path | str,
        *,
        expect: Expected = ANYTHING,
    ) -> None:
        loaded = load(refiner, expect)
        super().__init__(
            model_name=embed_model.model_name,
            embed_batch_size=embed_model.embed_batch_size,
            num_workers=embed_model.num_workers,
        )
        self._embed_model = embed_model
        self._refiner = loaded

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex shows."""
        return "RefinedEmbedding"

    @property
    def refiner(self) -> Refiner:
        """What moves the queries, where it was fitted with side queries or both."""
        return self._refiner

    def _get_query_embedding(self, query: str) -> list[float]:
        return refined_query(self._refiner, self._embed_model.get_query_embedding(query))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return refined_query(self._refiner, await self._embed_model.aget_query_embedding(query))

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors = self._embed_model.get_text_embedding_batch(texts)
        return checked_documents(self._refiner, vectors)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors = await self._embed_model.aget_text_embedding_batch(texts)
        return checked_documents(self._refiner, vectors)
