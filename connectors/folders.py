"""Find the index in what frameworks save."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from simskip_vdb.durable import disk_errors, has_file
from simskip_vdb.errors import ConfigError, SimskipError, StoreError, StoreNotFoundError, listed

_EMPTY = re.compile(rb'\s*\{\s*"embedding_dict"\s*:\s*\{\s*\}')


def locate(path: Path) -> Path:
    """Return the index file that a path stands for.

    A folder stands for the only index in it, or else for the only one in its subfolders. A path
    without a file stands for Haystack's ``PATH.faiss``.

    Raises:
        ConfigError: The folder holds several indexes.
        StoreError: The folder holds none.
    """
    if not path.is_dir():
        beside = path.with_name(f"{path.name}.faiss")
        return beside if has_file(beside) and not path.exists() else path
    with disk_errors(path):
        below = (folder for folder in sorted(path.iterdir()) if _may_hold_one(folder))
        found = _indexes(path) or [index for folder in below for index in _indexes(folder)]
    if not found:
        raise StoreError(
            f"{path}: not a file, and no FAISS index (*.faiss, *.index) is in this folder or right "
            "below it; give the file itself"
        )
    if len(found) > 1:
        names = listed([str(file.relative_to(path)) for file in found])
        raise ConfigError(
            f"{path} holds several indexes ({names}); give the file itself: "
            f"simskip inspect {shlex.quote(str(found[0]))}"
        )
    return found[0]


def nothing_at(path: Path, uri: str) -> StoreNotFoundError:
    """Return what to say of a path at which nothing is: what may have been meant."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    names = [] if there != path.absolute().parent else os.listdir(there)
    near = [str(path.with_name(name)) for name in get_close_matches(path.name, names, 1)]
    lead = f"did you mean {shlex.quote(near[0])}?" if near else f"look with: ls {there}"
    return StoreNotFoundError(f"{uri}: there is no such file or folder; {lead}")


def is_simple_store(path: Path) -> bool:
    """Tell whether a path stands for a LlamaIndex ``SimpleVectorStore``, which is JSON."""
    try:
        file = locate(path) if path.is_dir() else path
        return file.suffix == ".json" and has_file(file) and _is_json(file)
    except (SimskipError, OSError):
        return False


def _indexes(folder: Path) -> list[Path]:
    """Return the indexes in a folder: those of FAISS, or where there are none LlamaIndex's own."""
    named = sorted(folder.glob("*__vector_store.json"))
    found = [*_files_of_faiss(folder), *(file for file in named if not _is_json(file))]
    return found or [file for file in named if not _EMPTY.match(_head(file))]


def _files_of_faiss(folder: Path) -> Iterator[Path]:
    """Yield the files that are FAISS's by their names; pickles beside them are never opened."""
    yield from (file for file in sorted(folder.glob("*.faiss")) if file.is_file())
    for file in sorted(folder.glob("*.index")):  # others' indexes are called so, too
        if file.is_file() and _head(file)[:1] == b"I":
            yield file
    if (folder / "config").is_file() and (folder / "embeddings").is_file():  # txtai's
        yield folder / "embeddings"


def _may_hold_one(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".") and folder.suffix != ".simskip"


def _is_json(file: Path) -> bool:
    return _head(file).lstrip()[:1] == b"{"


def _head(file: Path) -> bytes:
    with file.open("rb") as data:
        return data.read(128)
