"""Whose vector is in a row: ours, or the application's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, Positions, VectorBatch, Vectors
from simskip_vdb.errors import JournalError
from simskip_vdb.journal import Journal, Write
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import Digests, row_digests
from simskip_vdb.store import VectorStore

SCAN_ROWS = 8192
SAME = 2e-3  # relative L2 distance that half precision and renormalising stay within


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
        return np.where(self._sorted[places] == ids, self._order[places], -1)


class OurRows:
    """Tells rows that we wrote from rows that the application wrote since.

    A row is ours where its digest is the one that we read back after writing. Where ids are
    positions they shift as rows are removed; then the digest alone decides. A vector that differs
    only by what half precision does to it, and is not where its original was, was refined too: it
    must not be taken for an original.
    """

    def __init__(self, journal: Journal, write: Write, store: VectorStore) -> None:
        assert write.written is not None
        self._rows = journal.open_originals()
        self._ids, self._digests = journal.open_written(write.written)
        self._place = Lookup(self._rows.ids)
        self._written = Lookup(self._ids)
        self._order = np.argsort(self._digests, kind="stable")
        self._by_vector = store.info().positional and self._shifted(store)
        self._refiner = Refiner.load(journal.refiners / write.refiner)

    @classmethod
    def of(cls, journal: Journal, store: VectorStore) -> OurRows | None:
        """Return None where nothing of ours is in the index."""
        current = journal.manifest.current
        if current is None:
            return None
        return cls(journal, current, store)

    def originals(self, batch: VectorBatch) -> tuple[Vectors, NDArray[np.bool_]]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,)."""
        digests = row_digests(batch.vectors)
        if self._by_vector:
            written = self._find_by_digest(digests)
            ours = written >= 0
        else:
            written = self._written.find(batch.ids)
            ours = (written >= 0) & (self._digests[written] == digests)
            doubtful = np.flatnonzero((written >= 0) & ~ours)
            ours[doubtful] = self._rounded(batch.vectors[doubtful], batch.ids[doubtful])
        vectors = batch.vectors.copy()
        if ours.any():
            vectors[ours] = self._rows.take(self._place.find(self._ids[written[ours]]))
        return vectors, ours

    def _shifted(self, store: VectorStore) -> bool:
        """Tell whether any row is elsewhere than where we wrote it."""
        if store.info().count < len(self._ids):
            return True
        digests = self._digests[np.argsort(self._ids)]
        start = 0
        for batch in store.scan(SCAN_ROWS):
            ours = digests[start : start + len(batch)]
            if (row_digests(batch.vectors)[: len(ours)] != ours).any():
                return True
            start += len(batch)
        return False

    def _rounded(self, vectors: Vectors, ids: Ids) -> NDArray[np.bool_]:
        originals = self._rows.take(self._place.find(ids))
        refined = self._refiner.refine_rows(originals, ids)
        return near(vectors, refined, SAME) & ~near(originals, refined, 4 * SAME)

    def _find_by_digest(self, digests: Digests) -> Positions:
        ordered = self._digests[self._order]
        first = np.searchsorted(ordered, digests, side="left")
        last = np.searchsorted(ordered, digests, side="right")
        twice = last - first > 1
        if twice.any():
            self._refuse_ambiguous(first[twice], last[twice])
        found = np.minimum(first, len(ordered) - 1)
        return np.asarray(np.where(last > first, self._order[found], -1))

    def _refuse_ambiguous(self, first: Positions, last: Positions) -> None:
        sizes = last - first
        members = np.repeat(first, sizes) + _ramps(sizes)
        places = self._place.find(self._ids[self._order[members]])
        originals = row_digests(self._rows.take(places))
        leaders = np.repeat(np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
        if (originals != originals[leaders]).any():
            raise JournalError(
                "rows were removed or reordered, ids of this index are positions, and some rows "
                "with equal vectors now had different originals: which is whose cannot be told. "
                "Restore the index from a backup, or use an IDMap so that rows keep their ids"
            )


def _ramps(sizes: Positions) -> Positions:
    """Return 0…s-1 for every size s, one after the other."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.arange(sizes.sum()) - np.repeat(starts, sizes)


def near(a: Vectors, b: Vectors, tolerance: float) -> NDArray[np.bool_]:
    """Tell rows within a relative L2 distance; rows that are not finite count as near."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.linalg.norm(a - b, axis=1)
        limit = tolerance * np.linalg.norm(b, axis=1)
        return np.asarray((distance <= limit) | ~np.isfinite(limit))
