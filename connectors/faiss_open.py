"""Call FAISS, and above all let it read a file, so that no file can hurt the process.

FAISS's plain reader notices whatever is cut off or does not fit together, if it is kept from
allocating what a damaged header asks for. Its mapped reader does not: it misses up to seven bytes
at the end, and reads beyond the map where a header is cut. So a file is read plainly once, and
mapped after that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

import faiss

from simskip_vdb.connectors.faiss_lists import attach, mentions_lists
from simskip_vdb.connectors.faiss_tree import Index
from simskip_vdb.connectors.kinds import refuse_other_kinds
from simskip_vdb.errors import SimskipError, StoreError
from simskip_vdb.overlap import cores
from simskip_vdb.threads import asleep

_SMALL = 1 << 20
_SIGNATURE = re.compile(r"^Error in .* at \S+:\d+: ", re.DOTALL)
_MOST_LINKS = 1 << 12
_MOST_WIDTH = 1 << 40
# Some parts are held in memory wider than they are saved; FAISS counts a transform as a full
# matrix, 64 MiB at d = 4096, even where it has none.
_HELD_UNSAVED = 128 << 20
_HEADER_FILLER = (1 << 20).to_bytes(8, "little") * 2  # what FAISS writes into every index header


@contextmanager
def faiss_call(path: Path, doing: str, *, long: bool = False) -> Iterator[None]:
    """Choose FAISS's threads, and turn its errors and the system's into `StoreError`.

    FAISS brings an OpenMP runtime of its own; beside torch's, whose threads spin while they wait,
    two threads on two cores searched 7 to 20 times slower than one. Half the cores leave room,
    unless threads wait asleep, as the command line lets them. What takes long gets all cores in any
    case: threads that wait go to sleep before it is done.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(cores() if long or asleep() else max(1, cores() // 2))
    try:
        yield
    except SimskipError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: {doing}: {error.strerror or error}") from error
    except (RuntimeError, AssertionError, MemoryError, ValueError, OverflowError) as error:
        raise StoreError(f"{path}: {doing}: {_short(error)}") from error
    finally:
        faiss.omp_set_num_threads(threads)


class Trust(IntEnum):
    """What is known of a file before it is read."""

    NONE = 0
    HEADER = 1
    """This process wrote it a moment ago, but its end may be missing."""
    ALL = 2
    """It was checked already, or is plain rows to the byte."""


def read_mapped(path: Path, trust: Trust) -> Index:
    """Read an index for reading only; a large file through a map.

    Args:
        path: The file.
        trust: What need not be checked.

    Raises:
        StoreError: The file is not an index, or damaged.
    """
    # The flag is missing from old versions.
    mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    is_large = path.stat().st_size >= _SMALL
    if trust is Trust.NONE:
        refuse_other_kinds(path, "faiss", str(path))
        _refuse_huge_counts(path)
    if trust is not Trust.ALL:
        plain = read_limited(path, 0)
        if not (is_large and mapped):
            return plain
        del plain
        give_back_memory()
    return read_limited(path, mapped if is_large else 0)


def give_back_memory() -> None:
    """Return to the system what FAISS freed; glibc keeps lists, whose sizes are moderate."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def read_limited(path: Path, flags: int) -> Index:
    """Read an index; no part of it may be much larger than its file.

    Lists in another file are mapped for reading only.
    """
    if not mentions_lists(path):
        return _read(path, flags)
    index = _read(path, flags | faiss.IO_FLAG_SKIP_IVF_DATA | faiss.IO_FLAG_READ_ONLY)
    attach(index, path)
    return index


def _read(path: Path, flags: int) -> Index:
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        return faiss.read_index(str(path), flags)
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(4 * path.stat().st_size + _HELD_UNSAVED)
    try:
        return faiss.read_index(str(path), flags)
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


def _refuse_huge_counts(path: Path) -> None:
    """Refuse counts for which FAISS allocates before it reads, and which the file cannot hold."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            counts = [*_list_counts(data), *_graph_counts(data)]
    # A list has at least a centroid's number, a node at least a link: four bytes.
    if any(4 * count > size for count in counts):
        raise StoreError(
            f"{path}: a header counts {max(counts):,} parts, which {size:,} bytes cannot hold; "
            "the file is damaged, restore it from a backup"
        )


def _list_counts(data: mmap.mmap) -> Iterator[int]:
    # A width follows the count, at once or after another number. It tells a header, even one that
    # is damaged, from rows in which the code occurs by chance.
    for code, width in ((b"ilar", 12), (b"ilbl", 20)):
        for at in _places(data, code):
            if _number(data, at + width, 8) < _MOST_WIDTH:
                yield _number(data, at + 4, 8)


def _graph_counts(data: mmap.mmap) -> Iterator[int]:
    for code in (b"INSf", b"INSs", b"INSp"):
        for at in _places(data, code):
            if at == 0 or data[at + 16 : at + 32] == _HEADER_FILLER:
                nodes, links = _number(data, at + 58, 4), _number(data, at + 62, 4)
                yield nodes if links <= _MOST_LINKS else len(data)


def _places(data: mmap.mmap, code: bytes) -> Iterator[int]:
    at = data.find(code)
    while at >= 0:
        yield at
        at = data.find(code, at + 1)


def _number(data: mmap.mmap, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


def _short(error: BaseException) -> str:
    """Return FAISS's reason without its C++ signature."""
    text = str(error) or type(error).__name__
    if "not recognized" in text:
        return "it does not begin as an index does"
    return _SIGNATURE.sub("", text.rpartition("' failed: ")[2]).strip()
