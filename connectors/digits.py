"""Numbers of another width than float32: read as float32, written back as what they were.

Where an original has digits that float32 does not hold, they are kept beside the state when its
row is first written, and taken again when the original comes back, whoever brings it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, Positions, Vectors
from simskip_vdb.durable import disk_errors, make_durable, open_private
from simskip_vdb.errors import DataError, StoreError
from simskip_vdb.rows import Digests, hash_ids, row_digests

Numbers = NDArray[Any]
"""Vectors as a file holds them, shape (n, d): float16, 32 or 64."""
_AT_ONCE = 1 << 24
_LARGEST_HALF = float(np.finfo(np.float16).max)


def as_float32(numbers: Numbers) -> Vectors:
    """Return numbers as float32, shape (n, d); what is beyond becomes infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(numbers, np.float32)


class Digits:
    """What float32 does not hold of the rows of one file.

    Attributes:
        name: Address of that file, for messages.
    """

    def __init__(self, file: Path, dim: int, name: str, *, keep: bool = True) -> None:
        """Look at what earlier writes kept in `file`.

        Args:
            file: Where digits are kept.
            dim: Dimension of a vector.
            name: Address of the file that they belong to.
            keep: Add digits; not where the originals stay where they are.

        Raises:
            StoreError: It cannot be read.
        """
        self.name = name
        self._file, self._dim, self._adds = file, dim, keep
        fields = [("id", "<u8"), ("digest", "<u8"), ("sum", "<u8"), ("row", "<f8", (dim,))]
        self._record = np.dtype(fields)
        self._read_keys()
        self._count = len(self._digests)  # with those that are added

    def written(self, ids: Ids, before: Numbers, new: Vectors, changed: Positions) -> Numbers:
        """Return what a file holds when some rows get new vectors, shape (n, d).

        Args:
            ids: Shape (n,).
            before: What it holds now, shape (n, d).
            new: Shape (n, d).
            changed: Positions of the rows that change.

        Raises:
            DataError: A vector is too long for numbers of 16 bits.
            StoreError: The digits could not be kept.
        """
        after: Numbers = before.copy()
        if before.dtype == np.float16:
            over = np.abs(new[changed]).max(axis=1, initial=0) > _LARGEST_HALF
            if over.any():
                raise DataError(
                    f"{self.name}: a vector has numbers beyond {_LARGEST_HALF:,.0f}, which "
                    "float16 does not hold; write the vectors as float32"
                )
            after[changed] = new[changed]
        elif before.dtype == np.float64:
            self._keep(ids[changed], before[changed])
            after[changed] = self._wide(ids[changed], new[changed])
        else:
            after[changed] = new[changed]
        return after

    def _keep(self, ids: Ids, rows: Numbers) -> None:
        """Keep the rows, shape (m, d), that are more than float32, unless they are kept."""
        narrow = as_float32(rows)
        with np.errstate(invalid="ignore"):
            more = (narrow != rows).any(axis=1) & np.isfinite(narrow).all(axis=1)
        if not (self._adds and more.any()):
            return
        hashes, digests = hash_ids(ids[more], 0), row_digests(narrow[more])
        known, places = self._find(hashes, digests, same_id=True)
        new = ~known
        new[known] = (self._take(places[known])["row"] != rows[more][known]).any(axis=1)
        if not new.any():
            return
        records = np.empty(int(new.sum()), self._record)
        records["id"], records["digest"] = hashes[new], digests[new]
        records["row"] = rows[more][new]
        records["sum"] = _sums(records["row"])
        with disk_errors(self._file):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._file.exists():
                open_private(self._file).close()
            with open(self._file, "r+b") as file:
                file.truncate(self._count * self._record.itemsize)  # a killed run's rest
                file.seek(0, os.SEEK_END)
                file.write(records.tobytes())
        self._count += len(records)

    def settle(self) -> None:
        """Make sure that what was kept survives a power cut.

        Raises:
            StoreError: The disk refused.
        """
        if self._count > len(self._digests):
            with disk_errors(self._file):
                make_durable(self._file)
                make_durable(self._file.parent)
                make_durable(self._file.parent.parent)

    def _wide(self, ids: Ids, vectors: Vectors) -> Numbers:
        """Return vectors, shape (m, d), as float64, with the digits that originals had."""
        wide = vectors.astype(np.float64)
        if not len(self._digests):
            return wide
        hashes, digests = hash_ids(ids, 0), row_digests(vectors)
        for same_id in (False, True):  # by their own id where it is known, for it may have moved
            known, places = self._find(hashes, digests, same_id=same_id)
            found = self._take(places[known])["row"]
            same = (as_float32(found).view(np.uint32) == vectors[known].view(np.uint32)).all(axis=1)
            wide[np.flatnonzero(known)[same]] = found[same]
        return wide

    def _find(
        self, hashes: Digests, digests: Digests, *, same_id: bool
    ) -> tuple[NDArray[np.bool_], Positions]:
        """Tell which rows are kept, shape (m,), and where the latest such record is, shape (m,)."""
        keys, order = self._by_id if same_id else self._by_vector
        wanted = hashes ^ digests if same_id else digests
        if not len(keys):
            return np.zeros(len(wanted), np.bool_), np.zeros(len(wanted), np.int64)
        places = np.searchsorted(keys, wanted, side="right") - 1
        known = (places >= 0) & (keys[places] == wanted)
        return known, order[places]

    def _take(self, places: Positions) -> Numbers:
        records = np.empty(len(places), self._record)
        if not len(places):
            return records
        with disk_errors(self._file):
            # Mapped for this block only: mapped pages would count as memory.
            kept = np.memmap(self._file, self._record, "r", shape=(len(self._digests),))
            records[:] = kept[places]
        if (_sums(records["row"]) != records["sum"]).any():
            raise StoreError(
                f"{self._file} is damaged; restore it from a backup. Only if there is none, remove "
                "it: originals then come back with the digits that float32 holds"
            )
        return records

    def _read_keys(self) -> None:
        self._hashes = np.empty(0, np.uint64)
        self._digests = np.empty(0, np.uint64)
        for block in self._blocks():
            self._hashes = np.append(self._hashes, block["id"])
            self._digests = np.append(self._digests, block["digest"])
        self._by_id = _sorted(self._hashes ^ self._digests)
        self._by_vector = _sorted(self._digests)

    def _blocks(self) -> Iterator[Numbers]:
        step = max(1, _AT_ONCE // self._record.itemsize)
        try:
            with open(self._file, "rb") as file:
                while data := file.read(step * self._record.itemsize):
                    whole = len(data) // self._record.itemsize
                    yield np.frombuffer(data, self._record, whole)
        except FileNotFoundError:
            return
        except OSError as error:
            with disk_errors(self._file):
                raise error


def _sums(rows: Numbers) -> Digests:
    """Return a checksum of every row's bits, shape (n,)."""
    return row_digests(np.ascontiguousarray(rows, np.float64).view(np.float32))


def _sorted(keys: Digests) -> tuple[Digests, Positions]:
    order = np.argsort(keys, kind="stable")
    return keys[order], order
