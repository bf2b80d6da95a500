"""A refiner in sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simskip_vdb.datatypes import Side
from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.refiner import Refiner
from simskip_vdb.wrappers.loading import ANYTHING, Expected, check_dim, load

try:
    import torch
    from sentence_transformers.util import load_dir_path
    from torch import Tensor, nn
except ImportError as error:
    raise MissingDependencyError("sentence-transformers", "wrappers") from error

EMBEDDING = "sentence_embedding"


class RefinerModule(nn.Module):
    """The last module of a SentenceTransformer, which refines what `encode_query` returns.

    What `encode_document` returns passes as it is, and is stored raw: simskip starts from
    originals, and would refine a refined one again. Computed by numpy on the CPU; no gradient
    goes through.

    Attributes:
        refiner: Moves the queries, where it was fitted with side queries or both.
        forward_kwargs: What `encode` hands on to `forward`.

    Args:
        refiner: A refiner, or the folder that holds it.
        expect: What the refiner has to be.

    Raises:
        ConfigError: The refiner is not the expected one, or there is none in the folder.
        DataError: Its files are damaged.
    """

    forward_kwargs = frozenset({"task"})

    def __init__(self, refiner: Refiner | Path | str, *, expect: Expected = ANYTHING) -> None:
        super().__init__()
        self.refiner = load(refiner, expect)

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Refine a batch of queries, shape (n, d), of any float dtype and on any device.

        Args:
            features: Holds ``sentence_embedding``.
            task: ``query`` or ``document``, as `encode_query` and `encode_document` say.

        Returns:
            The features, with ``sentence_embedding`` of the same dtype and on the same device.

        Raises:
            ConfigError: Queries move, and this is not said to be a query or a document.
            DataError: The dimension is not the refiner's.
        """
        vectors: Tensor = features[EMBEDDING]
        check_dim(self.refiner, vectors.shape[-1])
        if self.refiner.side is Side.DOCS or task == "document":
            return features
        if task != "query":
            raise ConfigError(
                f"refiner {self.refiner.id} moves queries and no documents, and the task is "
                f"{task!r}; call encode_query or encode_document"
            )
        refined = self.refiner(vectors.detach().float().cpu().numpy())
        return {**features, EMBEDDING: torch.from_numpy(refined).to(vectors)}

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Write the refiner's two files, safetensors and JSON, into a folder."""
        self.refiner.save(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: object,
    ) -> RefinerModule:
        """Read the module from a model's folder, as SentenceTransformer asks for it.

        Raises:
            ConfigError: There is no refiner in the folder.
            DataError: Its files are damaged.
        """
        folder = Path(model_name_or_path, subfolder)
        if not Path(model_name_or_path).is_dir():
            downloaded = load_dir_path(
                model_name_or_path,
                subfolder,
                token=token,
                cache_folder=cache_folder,
                revision=revision,
                local_files_only=local_files_only,
            )
            folder = Path(downloaded or folder)
        return cls(folder)
