"""Finds the originals of rows by the vectors that they hold now, wherever they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, Mask, Positions, Vectors
from simskip_vdb.errors import JournalError
from simskip_vdb.rows import Digests, Rows, row_digests

LAST_DIGITS = 1e-6  # relative L2 distance of one vector that is normalised over again
SAME = 2e-3  # relative L2 distance that half precision and renormalising stay within
_COMPUTED = 2e-6  # relative L2 distance of one vector that two kinds of machine computed
_KEYS, _AT_ONCE = 4, 256
_SKETCH = 8
AMBIGUOUS = (
    "rows were removed or reordered, ids of this index are positions, and some rows with equal "
    "vectors now had different originals: which is whose cannot be told. Restore the index from a "
    "backup, or give rows ids of their own"
)


class Lookup:
    """Finds rows by id in memory of 16 bytes a row."""

    def __init__(self, ids: Ids) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def find(self, ids: Ids) -> Positions:
        """Return each id's position, -1 where it is unknown; shape (len(ids),)."""
        if not len(self._sorted):
            return np.full(len(ids), -1)
        places = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.asarray(np.where(self._sorted[places] == ids, self._order[places], -1))


class ByVector:
    """Finds the originals of refined vectors, wherever they are now.

    Attributes:
        ambiguous: Digests of vectors that rows with different originals have.
    """

    def __init__(
        self, rows: Rows, digests: Digests, places: Positions, alike: Alike | None = None
    ) -> None:
        """Take digests of refined vectors, shape (m,), and their rows' positions in `rows`.

        Where a write did not finish, `alike` knows vectors that it may have left with other digits.
        """
        self._alike = alike
        order = np.argsort(digests, kind="stable")
        self._digests, self._places = digests[order], places[order]
        self._lookup = Lookup(self._digests)
        twice = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        first, second = (row_digests(rows.take(self._places[twice + i])) for i in (0, 1))
        self.ambiguous = self._digests[twice[first != second]]

    def find(self, vectors: Vectors) -> Positions:
        """Return each row's position among the originals, -1 where it is not ours, shape (b,).

        Raises:
            JournalError: Rows with different originals have this vector now.
        """
        digests = row_digests(vectors)
        if np.isin(digests, self.ambiguous).any():
            raise JournalError(AMBIGUOUS)
        places = self._lookup.find(digests)
        there = places >= 0
        places[there] = self._places[places[there]]
        if self._alike is not None and (places < 0).any():
            places[places < 0] = self._alike.find(vectors[places < 0])
        return places


class Alike:
    """Finds the originals of refined vectors that were computed elsewhere, with other last digits.

    Of every vector a few projections are held, 40 bytes with its position. Vectors that are nearly
    the same have nearly the same ones; others agree in all of them by a chance of about 1e-17.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        directions = np.random.default_rng(0).normal(size=(rows.dim, _KEYS))
        self._directions = directions / np.linalg.norm(directions, axis=0)
        self._keys: list[NDArray[np.float64]] = [np.empty((0, _KEYS))]
        self._places: list[Positions] = [np.empty(0, np.int64)]

    def add(self, vectors: Vectors, places: Positions) -> None:
        """Take refined vectors, shape (m, d), and their rows' positions, shape (m,)."""
        self._keys.append(vectors @ self._directions)
        self._places.append(places)

    def find(self, vectors: Vectors) -> Positions:
        """Return each row's position among the originals, -1 where it is not ours, shape (b,).

        Raises:
            JournalError: Rows with different originals have this vector now.
        """
        self._sort()
        out = np.full(len(vectors), -1)
        sound = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        for start in range(0, len(sound), _AT_ONCE):
            some = sound[start : start + _AT_ONCE]
            out[some] = self._find(vectors[some].astype(np.float64))
        return out

    def _sort(self) -> None:
        if len(self._keys) > 1:
            keys, places = np.concatenate(self._keys), np.concatenate(self._places)
            order = np.argsort(keys[:, 0], kind="stable")
            self._keys, self._places = [keys[order]], [places[order]]

    def _find(self, vectors: NDArray[np.float64]) -> Positions:
        known, places = self._keys[0], self._places[0]
        keys, slack = vectors @ self._directions, _COMPUTED * np.linalg.norm(vectors, axis=1)
        first = np.searchsorted(known[:, 0], keys[:, 0] - slack, side="left")
        sizes = np.searchsorted(known[:, 0], keys[:, 0] + slack, side="right") - first
        row, other = np.repeat(np.arange(len(keys)), sizes), np.repeat(first, sizes) + ramps(sizes)
        alike = (np.abs(known[other] - keys[row]) <= slack[row, None]).all(axis=1)
        row, place = row[alike], places[other[alike]]
        out = np.full(len(keys), -1)
        out[row] = place
        if not near(self._rows.take(place), self._rows.take(out[row]), SAME).all():
            raise JournalError(AMBIGUOUS)
        return out


def near(a: Vectors, b: Vectors, tolerance: float, *, directions: bool = False) -> Mask:
    """Tell rows within a relative L2 distance; rows that are not finite count as near.

    All that an engine may change of a vector is told here. `StoreInfo.rounding` is how far; what a
    store reads has the length that its engine gives vectors, so lengths count.

    Args:
        a: What is there, shape (n, d).
        b: What is expected, shape (n, d).
        tolerance: Largest distance, relative to the length of `b`.
        directions: Leave lengths aside: one of the two did not come from the engine.
    """
    if directions:
        a, b = unit(a), unit(b)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.linalg.norm(a - b, axis=1)
        limit = tolerance * np.linalg.norm(b, axis=1)
        return np.asarray((distance <= limit) | ~np.isfinite(limit))


def sketch(vectors: Vectors) -> Vectors:
    """Return a few projections of every vector, shape (n, 8), float32, to know it again by."""
    directions = np.random.default_rng(1).normal(size=(vectors.shape[1], _SKETCH))
    directions /= np.linalg.norm(directions, axis=0)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(vectors @ directions.astype(np.float32), np.float32)


def near_sketch(vectors: Vectors, then: Vectors, tolerance: float) -> Mask:
    """Tell rows that may be within a relative L2 distance of the vectors behind sketches, (n,).

    Those that are within it, are told so; of others, one in some thousands that is some ten times
    as far away, and none that is far.

    Args:
        vectors: Shape (n, d).
        then: What `sketch` returned, shape (n, 8).
        tolerance: Relative to the length of a vector.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        slack = (tolerance + LAST_DIGITS) * np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray((np.abs(sketch(vectors) - then) <= slack).all(axis=1))


def unit(vectors: Vectors) -> Vectors:
    """Return vectors of length 1 in the same directions, shape (n, d); zero stays zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def ramps(sizes: Positions) -> Positions:
    """Return 0…s-1 for every size s, one after the other."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.asarray(np.arange(sizes.sum()) - np.repeat(starts, sizes))
