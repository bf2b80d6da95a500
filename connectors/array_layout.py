"""Where the numbers of an array lie in a file, and how they are read and written there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from simskip_vdb.connectors.digits import Digits, Numbers, as_float32
from simskip_vdb.datatypes import Ids, Positions, Vectors
from simskip_vdb.errors import DataError

File = Path | IO[bytes]
_AT_ONCE = 1 << 22


class Layout(NamedTuple):
    """The numbers of an array in a file.

    Attributes:
        offset: Where they begin, in bytes.
        dtype: As they are stored, with the order of bytes; uint16 for bfloat16.
        shape: (n, d).
        columns: They lie column after column (Fortran's order).
        brain: They are bfloat16.
    """

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, int]
    columns: bool = False
    brain: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def name(self) -> str:
        """What kind of numbers they are."""
        return "bfloat16" if self.brain else self.dtype.newbyteorder("=").name

    @property
    def exact(self) -> bool:
        """Whether every float32 can be stored."""
        return self.dtype.itemsize >= np.dtype(np.float32).itemsize

    def read(self, file: File, start: int, stop: int) -> Numbers:
        """Return some successive rows, shape (stop - start, d), as float16, 32 or 64."""
        return self._decoded(self._mapped(file, "r")[start:stop])

    def take(self, file: File, positions: Positions) -> Numbers:
        """Return the rows at some positions, shape (len(positions), d)."""
        return self._decoded(self._mapped(file, "r")[positions])

    def overwrite(
        self, file: File, ids: Ids, lay_over: Callable[[int, Vectors], None], digits: Digits
    ) -> None:
        """Write new vectors where the old ones are, a block of rows at a time.

        Args:
            file: Is open for writing, or a path.
            ids: Shape (n,).
            lay_over: Puts new vectors in the place of old ones.
            digits: Knows those of the originals.

        Raises:
            DataError: A vector does not fit into such numbers.
        """
        step = max(1, _AT_ONCE // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            # Mapped for this block only: mapped pages would count as memory.
            stored = self._mapped(file, "r+")
            block = stored[start : start + step]
            found = self._decoded(block)
            before = as_float32(found)
            vectors = before.copy()
            lay_over(start, vectors)
            changed = np.flatnonzero(
                (vectors.view(np.uint32) != before.view(np.uint32)).any(axis=1)
            )
            if len(changed):
                after = digits.written(ids[start : start + step], found, vectors, changed)
                block[changed] = self._encoded(after[changed], digits.name)
                stored.flush()

    def _mapped(self, file: File, mode: Any) -> np.memmap[Any, Any]:  # noqa: ANN401 a literal
        order: Any = "F" if self.columns else "C"
        return np.memmap(file, self.dtype, mode, self.offset, self.shape, order)

    def _decoded(self, stored: Numbers) -> Numbers:
        if not self.brain:
            return np.array(stored, self.dtype.newbyteorder("="), order="C")
        return (np.array(stored, np.uint32, order="C") << 16).view(np.float32)

    def _encoded(self, numbers: Numbers, name: str) -> Numbers:
        if not self.brain:
            return numbers
        words = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        rounded = (words + (((words >> 16) & 1) + 0x7FFF)) >> 16  # to the nearest, ties to even
        if (np.isfinite(numbers) & ((rounded & 0x7F80) == 0x7F80)).any():
            raise DataError(
                f"{name}: a vector has numbers that bfloat16 does not hold; write it as float32"
            )
        return rounded.astype(np.uint16)
