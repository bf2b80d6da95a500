"""Originals on disk, and digests that tell one row from another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, Positions, Vectors
from simskip_vdb.errors import JournalError

Digests = NDArray[np.uint64]


class Rows:
    """Originals on disk, read through a memory map; positions are scan order.

    Attributes:
        ids: Shape (n,), int64.
        dim: Dimension of a vector.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise JournalError(f"{path} cannot be read: {error}") from error
        self.path = path
        self.dim: int = reader.schema.field("vector").type.list_size
        ids = [batch["id"].to_numpy() for batch in batches]
        self.ids: Ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
        self._parts: list[Vectors] = [
            batch["vector"].flatten().to_numpy().reshape(-1, self.dim) for batch in batches
        ]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self) -> Iterator[tuple[int, Vectors]]:
        """Yield (position of the first row, vectors (b, d)) over all rows."""
        return zip(self._starts.tolist(), self._parts, strict=False)

    def take(self, positions: Positions) -> Vectors:
        """Return the rows at these positions, shape (len(positions), d)."""
        out = np.empty((len(positions), self.dim), np.float32)
        part_of = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(part_of, kind="stable")
        bounds = np.searchsorted(part_of[order], np.arange(len(self._parts) + 1))
        for part in np.unique(part_of):
            chosen = order[bounds[part] : bounds[part + 1]]
            out[chosen] = self._parts[part][positions[chosen] - self._starts[part]]
        return out

    def matrix(self) -> Vectors:
        """Return all rows in memory, shape (n, d)."""
        return np.concatenate(self._parts) if self._parts else np.empty((0, self.dim), np.float32)


def row_digests(vectors: Vectors) -> Digests:
    """Hash every row's bits, shape (n,), uint64; equal rows have equal digests.

    Each 32-bit word is mixed with a key of its own, and a row's words are added modulo 2⁶⁴.
    """
    words = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    keys = np.random.default_rng(0x51A5C1B).integers(0, 2**64, words.shape[1], np.uint64)
    out = np.empty(len(words), np.uint64)
    step = max(1, 2**20 // max(1, words.shape[1]))
    for start in range(0, len(words), step):
        mixed = _splitmix(words[start : start + step] + keys)  # (step, d) uint64
        out[start : start + step] = mixed.sum(axis=1, dtype=np.uint64)
    return out


def hash_ids(ids: Ids, seed: int) -> Digests:
    """Hash row ids to numbers spread evenly over 64 bits, shape (n,), the same in every run."""
    mixed = ids.astype(np.int64).view(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    return _splitmix(mixed)


def _splitmix(words: Digests) -> Digests:
    """Mix every number in place (the finaliser of SplitMix64, Steele et al. 2014)."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
