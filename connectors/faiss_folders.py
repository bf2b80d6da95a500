"""Find the FAISS file in what frameworks save."""

from __future__ import annotations

from pathlib import Path

from simskip_vdb.durable import disk_errors, has_file
from simskip_vdb.errors import ConfigError, StoreError

_LLAMA_INDEX = "*__vector_store.json"


def locate(path: Path) -> Path:
    """Return the index file that a path stands for.

    A folder stands for the index in it: LangChain's ``index.faiss`` (the pickle beside it is never
    opened), LangChain.js's ``faiss.index``, txtai's ``embeddings`` beside its ``config``,
    LlamaIndex's ``default__vector_store.json`` where that is a FAISS binary, or any other single
    ``.faiss`` file. A path without a file stands for Haystack's ``PATH.faiss``.

    Raises:
        ConfigError: The folder holds several indexes.
        StoreError: The folder holds none.
    """
    if not path.is_dir():
        beside = path.with_suffix(".faiss")
        return beside if has_file(beside) and not path.exists() else path
    with disk_errors(path):
        named = sorted(path.glob(_LLAMA_INDEX))
        found = sorted(path.glob("*.faiss")) + [file for file in named if not _is_text(file)]
    found += [path / "faiss.index"]
    found += [path / "embeddings"] if (path / "config").is_file() else []
    found = [file for file in found if file.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"{path} holds several indexes ({names}); give the file itself")
    if named:
        raise StoreError(
            f"{named[0]}: this is LlamaIndex's own store, a text file, not a FAISS index; "
            "build the vector store with FaissVectorStore"
        )
    raise StoreError(f"{path}: not a file, and no FAISS index (*.faiss) is in this folder")


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16).lstrip()[:1] == b"{"
