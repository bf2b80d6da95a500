"""Inverted lists that FAISS keeps in a file of their own (`OnDiskInvertedLists`).

The index file names its list file, so the index file alone is the switch: new lists go to a new
file beside the old one, and whoever opens the old index file still finds the old lists. Nothing
here writes to a list file that an index names.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.faiss_flat import FlatFile
from simskip_vdb.connectors.faiss_tree import IVF, REFINES, Index, core, down
from simskip_vdb.connectors.swap import Identity, take_mode_and_owner
from simskip_vdb.durable import (
    beside,
    disk_errors,
    has_file,
    json_of,
    make_durable,
    sha256_of,
    write_durably,
)
from simskip_vdb.errors import StoreChangedError, StoreError

_OURS = re.compile(r"\.simskip-([0-9a-f]{12})-[0-9a-f]{8}$")
"""Ends names of list files that were written here, and may be removed when no index needs them; it
holds the start of the SHA-256 of the list file that the first of them replaced."""


class ListFile(NamedTuple):
    """A list file: where it is, and what the index file calls it."""

    path: Path
    name: str

    @property
    def origin(self) -> str | None:
        """Start of the SHA-256 of the file that it stands in for; None for an application's."""
        match = _OURS.search(self.path.name)
        return match[1] if match else None

    def successor(self, *, replaces_ours: bool) -> ListFile:
        """Name a new list file beside this one.

        Args:
            replaces_ours: Whether this one is not to be gone back to.
        """
        origin = self.origin if replaces_ours else None
        end = _ending(origin or sha256_of(self.path)[:12])
        path, name = (_OURS.sub("", str(text)) + end for text in self)
        return ListFile(Path(path), name)

    def copied_to(self, output: Path) -> ListFile:
        """Name a new list file beside another index file."""
        path = Path(f"{os.path.abspath(output)}{_ending(sha256_of(self.path)[:12])}")
        return ListFile(path, str(path))


def ivf_of(index: Index) -> Any:  # noqa: ANN401 an Index or None
    """Return the IVF in an index, which may be under a Refine; None where there is none."""
    body = core(index)
    if type(body) in REFINES:
        body = core(down(body.base_index))
    return body if type(body) in IVF else None


def on_disk(index: Index) -> Any:  # noqa: ANN401 FAISS's lists have no types
    """Return an index's lists if they are in a file of their own, else None."""
    ivf = ivf_of(index)
    lists = None if ivf is None else faiss.downcast_InvertedLists(ivf.invlists)
    return lists if type(lists) is faiss.OnDiskInvertedLists else None


def list_file(index: Index, path: Path) -> ListFile | None:
    """Return the list file of an index that is in a file; None where it has none.

    Raises:
        StoreError: It is not to be found, or there are two that it may be.
    """
    lists = on_disk(index)
    return None if lists is None else ListFile(_find(lists.filename, path), lists.filename)


def mentions_lists(path: Path) -> bool:
    """Tell an index file that keeps its lists in another one.

    Raises:
        OSError: It cannot be read.
    """
    return FlatFile.find(path) is None and _mentions_lists(path, Identity.of(path))


@lru_cache(maxsize=8)
def _mentions_lists(path: Path, identity: Identity) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(b"ilod")
        while at >= 0:
            if data[at + 4 : at + 12] == data[at + 20 : at + 28]:  # lists, counted twice
                return True
            at = data.find(b"ilod", at + 1)
    return False


def attach(index: Index, path: Path) -> None:
    """Map the lists of an index that was read without them, for reading only.

    Raises:
        StoreError: Their file is not to be found, or too short.
    """
    lists, found = on_disk(index), list_file(index, path)
    if found is None:
        return
    size = found.path.stat().st_size
    if not 0 < lists.totsize <= size or not all(_inside(lists)):
        raise StoreError(
            f"{found.path}: its {size:,} bytes do not fit what {path} says of them; the list file "
            "is damaged or another one, restore both from a backup"
        )
    _map(lists, found)


class ListWriter:
    """Fills the lists of a new list file in any order, without holding them in memory.

    Each list has room for a multiple of eight rows and starts where a code could start, so that
    codes and ids lie like the elements of two arrays.
    """

    def __init__(self, file: ListFile, sizes: NDArray[np.int64], code_size: int) -> None:
        """Make the file, for lists of these sizes, shape (nlist,).

        Raises:
            StoreError: The disk refused.
        """
        self._file, self._sizes, self._code_size = file, sizes, code_size
        step = math.lcm(8, code_size)
        self._rooms = -(-sizes // 8) * 8
        taken = -(-(self._rooms * (code_size + 8)) // step) * step
        self._starts = np.cumsum(taken) - taken
        self._total = max(int(taken.sum()), step)
        self._filled = np.zeros_like(sizes)
        with disk_errors(file.path):
            handle = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.truncate(handle, self._total)
                self._map = mmap.mmap(handle, self._total)
            finally:
                os.close(handle)
        self._codes = np.frombuffer(self._map, np.dtype((np.void, code_size)))
        self._ids = np.frombuffer(self._map, np.int64)

    def add(self, homes: NDArray[np.int64], codes: NDArray[np.uint8], ids: Any) -> None:  # noqa: ANN401
        """Append rows to lists: homes (b,), codes (b, code_size), ids (b,) int64."""
        order = np.argsort(homes, kind="stable")
        homes = homes[order]
        which, first, counts = np.unique(homes, return_index=True, return_counts=True)
        places = np.arange(len(homes)) - np.repeat(first, counts) + self._filled[homes]
        self._filled[which] += counts
        starts = self._starts[homes]
        rows = np.ascontiguousarray(codes[order]).view(self._codes.dtype)[:, 0]
        self._codes[starts // self._code_size + places] = rows
        self._ids[(starts + self._rooms[homes] * self._code_size) // 8 + places] = ids[order]

    def finish(self, like: Path) -> Any:  # noqa: ANN401 FAISS's lists have no types
        """Flush the file, give it the mode and owner of another, and return FAISS's view of it."""
        del self._codes, self._ids
        with disk_errors(self._file.path):
            self._map.flush()
            self._map.close()
            take_mode_and_owner(self._file.path, like)
            make_durable(self._file.path)
            make_durable(self._file.path.parent)
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size, lists.totsize = len(self._sizes), self._code_size, self._total
        for numbers in np.stack([self._sizes, self._rooms, self._starts], axis=1).tolist():
            entry = faiss.OnDiskOneList()
            entry.size, entry.capacity, entry.offset = numbers
            lists.lists.push_back(entry)
        _map(lists, self._file)
        return lists


@contextmanager
def switching(index: Path, *, old: ListFile | None, new: ListFile | None) -> Iterator[None]:
    """Keep of two list files the one that an index file names when the block is done.

    Only files with names of our own are ever removed. A kill leaves a record beside the index, by
    which `settle` does the same later.

    Args:
        index: The index file, which the block replaces or makes.
        old: What it names, and will not any more; None to keep that.
        new: What it will name, not there yet; None where that was there before.
    """
    settle(index)
    ours = [file.path for file in (old, new) if file is not None and file.origin]
    if not ours:
        yield
        return
    with disk_errors(index):
        write_durably(_record(index), json.dumps([str(path) for path in ours]).encode())
    try:
        yield
    except BaseException:
        with suppress(OSError, StoreError):
            switched = _names(index, ours[-1]) is (new is not None)
            if not switched:  # else it may be that the disk has not confirmed it
                settle(index)
        raise
    settle(index)


def settle(index: Path) -> None:
    """Remove list files of ours that a write left behind and the index file does not name.

    Raises:
        StoreError: The disk refused.
    """
    record = _record(index)
    with disk_errors(index):
        record.with_name(record.name + ".tmp").unlink(missing_ok=True)
        if not has_file(record):
            return
        try:
            ours = [Path(name) for name in json_of(record.read_bytes())]
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{record} is damaged ({error}); remove it, and list files beside the index that "
                "it does not name"
            ) from error
        for path in ours:
            if _OURS.search(path.name) and not _names(index, path):
                path.unlink(missing_ok=True)
        record.unlink()
        make_durable(record.parent)


def check_origin(current: ListFile | None, original: ListFile | None, kept: Path) -> None:
    """Make sure that lists to go back to are as they were.

    Raises:
        StoreChangedError: Somebody wrote to them since.
    """
    if current is None or current.origin is None or original is None:
        return
    if not sha256_of(original.path).startswith(current.origin):
        raise StoreChangedError(
            f"{original.path}: somebody else wrote to it since the index was refined, so the kept "
            f"index file would not find its rows in it; nothing was changed. Remove {kept} and run "
            "the command again: rows are then restored one by one"
        )


def _find(name: str, index: Path) -> Path:
    """Look where FAISS looks, then beside the index, as its flag IO_FLAG_ONDISK_SAME_DIR does."""
    given = Path(os.path.abspath(name))
    beside = index.with_name(given.name)
    found = [path for path in (given, beside) if path.is_file()]
    if not found:
        raise StoreError(
            f"{index}: its inverted lists are in '{name}', which is neither there nor beside the "
            "index; put it there, or run from the folder in which your application runs"
        )
    if len(found) == 2 and not given.samefile(beside):
        raise StoreError(
            f"{index}: its inverted lists may be in {given} or in {beside}; keep one of them where "
            "it is found, or run from another folder"
        )
    return found[0]


def _inside(lists: Any) -> Iterator[bool]:  # noqa: ANN401 FAISS's lists have no types
    width = lists.code_size + 8
    yield lists.lists.size() == lists.nlist
    for i in range(lists.lists.size()):
        entry = lists.lists.at(i)
        room = entry.capacity * width
        yield entry.size <= entry.capacity
        yield room == 0 or entry.offset + room <= lists.totsize


def _map(lists: Any, file: ListFile) -> None:  # noqa: ANN401 FAISS's lists have no types
    lists.read_only = True
    lists.filename = str(file.path)
    lists.do_mmap()
    lists.filename = file.name


def _names(index: Path, file: Path) -> bool:
    """Tell whether an index file holds a list file's name, of which there is no second one."""
    if not index.is_file() or index.stat().st_size == 0:
        return False
    with index.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(os.fsencode(file.name)) >= 0


def _record(index: Path) -> Path:
    return beside(index, ".simskip-lists", hidden=True)


def _ending(origin: str) -> str:
    return f".simskip-{origin}-{secrets.token_hex(4)}"
