"""Rows that wait on disk until the file that they belong to is written anew."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simskip_vdb.datatypes import Positions, Vectors
from simskip_vdb.durable import disk_errors

_ROWS = 8192


class Waiting:
    """Rows in a file, in the order in which they came, and where in it each row is.

    Attributes:
        close: Gives the disk space back; done at the latest when nobody holds this any more.
    """

    def __init__(self, path: Path, count: int, dim: int) -> None:
        self._path, self._dim, self._length = path, dim, 0
        self._places = np.full(count, -1, np.int64)
        with disk_errors(path):
            # Nameless, so that a kill leaves nothing behind.
            self._file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 see `close`
        self.close = weakref.finalize(self, self._file.close)

    def add(self, positions: Positions, vectors: Vectors) -> None:
        """Append rows; of two for the same position the later one counts."""
        with disk_errors(self._path):
            self._file.seek(self._length * self._dim * 4)
            self._file.write(np.ascontiguousarray(vectors, np.float32).data)
            self._file.flush()
        self._places[positions] = np.arange(self._length, self._length + len(positions))
        self._length += len(positions)

    def lay_over(self, positions: Positions, vectors: Vectors) -> None:
        """Put the rows that wait in the place of those read, shape (len(positions), d)."""
        places = self._places[positions]
        vectors[places >= 0] = self._read(places[places >= 0])

    def rows(self) -> Iterator[tuple[Positions, Vectors]]:
        """Yield the rows by ascending position."""
        positions = np.flatnonzero(self._places >= 0)
        for start in range(0, len(positions), _ROWS):
            block = positions[start : start + _ROWS]
            yield block, self._read(self._places[block])

    def _read(self, places: Positions) -> Vectors:
        if not len(places):
            return np.empty((0, self._dim), np.float32)
        # Mapped for this block only: mapped pages would count as memory.
        file = np.memmap(self._file, np.float32, "r", shape=(self._length, self._dim))
        return np.array(file[places])
