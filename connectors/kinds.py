"""What a file is by its first bytes, so that a wrong one is told for what it is."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import StoreError, UnsupportedIndexError

_HEAD = 512
_ARCHIVES = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z", b"Rar!": "RAR", b"\x04\x22\x4d\x18": "LZ4",
}  # fmt: skip
_OF_FAISS = (b"Ix", b"Iw", b"IH", b"Im", b"IN", b"IV")
_BITS = (b"IBx", b"IBw", b"IBH", b"IBM", b"IBh")
_SIMPLE = re.compile(rb'\s*\{\s*"embedding_dict"')
_MOST_HEADER = 100_000_000


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: With its article.
        scheme: Of the address that it has, if it has one.
        advice: What to do where it has none.
    """

    name: str
    scheme: str | None = None
    advice: str = ""


def refuse_other_kinds(path: Path, scheme: str, uri: str) -> None:
    """Refuse a file that is not of the kind that a scheme stands for, and known for another one.

    Raises:
        UnsupportedIndexError: Its vectors cannot be refined.
        StoreError: It has another address, or Git left a pointer in its place.
    """
    with disk_errors(path), path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise StoreError(f"{uri}: the file is empty; restore it from a backup")
    if head.startswith(b"version https://git-lfs"):
        raise StoreError(
            f"{uri}: this is a Git LFS pointer, not the file that it stands for; fetch that with: "
            "git lfs pull"
        )
    may_be = {"npz": b"PK", "llama-index": b"{", "sqlite-vec": b"SQLite"}.get(scheme)
    if may_be is not None and head.lstrip().startswith(may_be):
        return
    found = _kind(path, head)
    if found is None or found.scheme == scheme:
        return
    if found.scheme is not None:
        raise StoreError(f"{uri}: this is {found.name}; its address is {found.scheme}:{path}")
    raise UnsupportedIndexError(f"{uri}: this is {found.name}; {found.advice}")


def _kind(path: Path, head: bytes) -> Kind | None:
    return _store(head) or _container(path, head) or _text(head)


def _store(head: bytes) -> Kind | None:
    """Return the kind of a file that may hold vectors that can be refined."""
    if head.startswith(b"\x93NUMPY"):
        return Kind("an array of NumPy's", "npy")
    if head.startswith(b"PAR1"):
        return Kind("a Parquet file", "parquet")
    if head.startswith(_BITS):
        return Kind(
            "a binary index (FAISS's IndexBinary)",
            advice="its rows are bits; give an index of the vectors themselves",
        )
    if head.startswith(_OF_FAISS) and b"\0" in head:
        return Kind("a FAISS index", "faiss")
    if _SIMPLE.match(head):
        return Kind("a store of LlamaIndex's", "llama-index")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MOST_HEADER:
        return Kind("a safetensors file", "safetensors")
    return None


def _container(path: Path, head: bytes) -> Kind | None:
    """Return the kind of a file in which vectors may be, but not so that they can be refined."""
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return Kind(f"a {name} archive", advice="unpack it, and give what was in it")
    if head[257:262] == b"ustar":
        return Kind("a tar archive", advice="unpack it, and give what was in it")
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return _PICKLE
    if head.startswith(b"SQLite format 3\0"):
        return Kind(
            "a SQLite database",
            advice="save its vectors with numpy.save, and give that; refined ones are copied back "
            "by your own code",
        )
    if head.startswith(b"\x89HDF\r\n"):
        return Kind("an HDF5 file", advice="save its vectors with numpy.save, and give that")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Kind("an Arrow file", advice="write its table as Parquet, and give that")
    return None


_PICKLE = Kind(
    "a pickle",
    advice="it is not opened, since a pickle can run any code; save its vectors with numpy.save "
    "where you trust it, and give that",
)


def _zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    if any(name.endswith(".npy") for name in names):
        return Kind("an archive of NumPy's", "npz")
    if any(name.endswith("/data.pkl") for name in names):
        return Kind("a file of torch.save", advice=_PICKLE.advice)
    return Kind("a zip archive", advice="unpack it, and give what was in it")


def _text(head: bytes) -> Kind | None:
    try:
        text = head.decode().lstrip("\ufeff").lstrip()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return None
        text = head[: error.start].decode().lstrip()
    if not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return None
    if text[:1] == "<":
        return Kind("a web page", advice="as a failed download leaves it; download the file again")
    if text[:1] in ("{", "["):
        return Kind("a JSON file", advice="save its vectors with numpy.save, and give that")
    return Kind("a text file", advice="save its vectors with numpy.save, and give that")
