"""A file of plain rows: a Flat index, which may be under id maps, is one array behind a header.

Such a file is recognised by its bytes alone, whose number its header tells exactly; it can then be
mapped without being read first, its rows read without a map whose pages would count as memory, and
another file like it written without holding it in memory.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simskip_vdb.datatypes import Vectors
from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import StoreError

_HEADER = struct.Struct("<4sIq16x?i")
"""Kind, dimension, rows, two fillers, whether it is trained, metric: as FAISS writes any index."""
_COUNT = struct.Struct("<Q")
_FLAT = (b"IxFI", b"IxF2")
_ID_MAPS = (b"IxMp", b"IxM2")
_DEPTH = 4
"""Id maps of id maps that are looked into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatFile:
    """Where the rows of a file of plain rows are.

    Attributes:
        path: The file.
        offset: Where the first row begins.
        rows: How many there are.
        dim: Dimension of each.
    """

    path: Path
    offset: int
    rows: int
    dim: int

    @classmethod
    def find(cls, path: Path) -> FlatFile | None:
        """Look at a file; None where it is anything but plain rows, whole and to the byte.

        Raises:
            OSError: It cannot be read.
        """
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read((_DEPTH + 1) * _HEADER.size + _COUNT.size)
            found, maps = _parse(head)
            if found is None or any(each[1:] != found[1:] for each in maps):
                return None
            _, dim, rows = found
            offset = (len(maps) + 1) * _HEADER.size + _COUNT.size
            end = offset + 4 * dim * rows
            if size != end + len(maps) * (_COUNT.size + 8 * rows):
                return None
            for _ in maps:
                file.seek(end)
                if file.read(_COUNT.size) != _COUNT.pack(rows):
                    return None
                end += _COUNT.size + 8 * rows
        return cls(path=path, offset=offset, rows=rows, dim=dim)

    def read(self, start: int, stop: int) -> Vectors:
        """Read the rows from ``start`` to ``stop``, shape (stop - start, d).

        Raises:
            OSError: The disk failed.
            ValueError: The file has become shorter.
        """
        at = self.offset + 4 * self.dim * start
        flat = np.fromfile(self.path, np.float32, (stop - start) * self.dim, offset=at)
        return flat.reshape(stop - start, self.dim)

    def write_like(self, target: Path, rows: Iterable[Vectors]) -> None:
        """Write a file like this one with other rows.

        Args:
            target: The file, empty.
            rows: All of them, in batches of shape (b, d), float32.

        Raises:
            OSError: The disk failed.
            StoreError: There are fewer or more rows than here.
        """
        with open(self.path, "rb") as old, open(target, "wb") as new:
            new.write(old.read(self.offset))
            for batch in rows:
                with disk_errors(target):
                    new.write(np.ascontiguousarray(batch, np.float32).data)
            end = self.offset + 4 * self.dim * self.rows
            if new.tell() != end:
                raise StoreError(f"{target}: {new.tell():,} bytes were written, not {end:,}")
            old.seek(end)
            shutil.copyfileobj(old, new)


_Found = tuple[bytes, int, int]


def _parse(head: bytes) -> tuple[_Found | None, list[_Found]]:
    """Return kind, dimension and rows of the Flat, and of each id map around it."""
    maps: list[_Found] = []
    for at in range(0, len(head) - _HEADER.size - _COUNT.size + 1, _HEADER.size):
        kind, dim, rows, _, metric = _HEADER.unpack_from(head, at)
        if rows < 0 or metric not in (0, 1):  # others are followed by an argument
            break
        if kind in _FLAT:
            count = _COUNT.unpack_from(head, at + _HEADER.size)[0]
            return ((kind, dim, rows) if count == dim * rows else None), maps
        if kind not in _ID_MAPS:
            break
        maps.append((kind, dim, rows))
    return None, maps
