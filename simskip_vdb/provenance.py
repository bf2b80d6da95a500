"""Whose vector is in a row: ours, or the application's."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from simskip_vdb.by_vector import LAST_DIGITS, SAME, Alike, ByVector, ramps
from simskip_vdb.by_vector import Lookup as Lookup
from simskip_vdb.by_vector import near as near
from simskip_vdb.datatypes import Ids, Mask, Positions, VectorBatch, Vectors
from simskip_vdb.errors import DataError, JournalError, UnsupportedIndexError
from simskip_vdb.journal import NEW_VECTOR, Journal, Write
from simskip_vdb.refiner import LateRule, Refiner
from simskip_vdb.rows import Digests, Rows, row_digests
from simskip_vdb.store import FileBacked, TakesOriginals, VectorStore

SCAN_ROWS = 8192


class Resemblance:
    """Tells whether coarse codes stand for the rows that they should stand for.

    A row that was decoded is nearer, by cosine, to its own vector than to another row's: nearly
    always where each code is in its place, half of the time where they are shuffled.
    """

    _FEWEST = 100  # rows, below which a share says little
    _SHARE = 0.75

    def __init__(self) -> None:
        self._rows = self._own = 0

    def add(self, read: Vectors, exact: Vectors) -> None:
        """Compare rows as read back, shape (b, d), with the exact ones."""
        # Neighbours in scan order may be alike, so another row is taken from half a batch away.
        other = np.roll(exact, len(exact) // 2, axis=0)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            own, foreign = (
                (read * rows).sum(axis=1) / np.linalg.norm(rows, axis=1) for rows in (exact, other)
            )
        comparable = np.isfinite(own) & np.isfinite(foreign)
        self._rows += int(comparable.sum())
        self._own += int((own >= foreign)[comparable].sum())

    @property
    def plausible(self) -> bool:
        """Whether enough of the rows resemble their own vector."""
        return self._rows < self._FEWEST or self._own >= self._SHARE * self._rows


class Ours(Protocol):
    """Tells rows that we wrote from the application's."""

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,)."""
        ...


class TrueRows:
    """A store's rows as the application gave them: ours undone, and codes not taken for vectors."""

    def __init__(self, store: VectorStore, ours: Ours | None) -> None:
        self._store = store
        self._ours = ours
        self._lossy = store.info().lossy
        self._resemblance = Resemblance()

    def of(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,).

        Raises:
            UnsupportedIndexError: The store holds lossy codes, and nobody gave the exact vectors.
        """
        if self._ours is None:
            vectors, ours = batch.vectors, np.zeros(len(batch), np.bool_)
        else:
            vectors, ours = self._ours.originals(batch)
        if self._lossy and not ours.all():
            vectors = vectors.copy()
            vectors[~ours] = self._exact(batch.ids[~ours], batch.vectors[~ours])
        return vectors, ours

    def check(self) -> None:
        """Make sure that the exact vectors are those behind the codes.

        Raises:
            DataError: They belong to other rows.
        """
        if not self._resemblance.plausible:
            raise DataError(
                f"{self._store.info().uri}: the originals do not resemble what the index holds; "
                "give them in the order of the index's rows, or with their ids (--originals-ids)"
            )

    def _exact(self, ids: Ids, read: Vectors) -> Vectors:
        if not isinstance(self._store, TakesOriginals):
            raise UnsupportedIndexError(
                f"{self._store.info().uri} holds lossy codes, and takes no originals"
            )
        exact = self._store.originals(ids)
        self._resemblance.add(read, exact)
        return exact


def our_rows(journal: Journal, store: VectorStore) -> Ours | None:
    """Return what tells our rows from the application's; None where nothing of ours is there."""
    current = journal.manifest.current
    if not isinstance(store, FileBacked):
        live = LiveRows(journal, store)
        return live if live else None
    return None if current is None else OurRows(journal, current, store)


class LiveRows:
    """Tells our rows from the application's where rows are written one by one.

    A row is ours where it holds what a write of ours left there, or where it holds what the
    refiner makes of its original: a write that was interrupted may have left it there.
    """

    def __init__(self, journal: Journal, store: VectorStore) -> None:
        writes = (journal.manifest.pending, journal.manifest.current)
        info = store.info()
        self._writes = [
            WrittenRows(journal, write, info.rounding, positional=info.positional)
            for write in writes
            if write is not None and write.refiner and write.mode != NEW_VECTOR
        ]
        # An application that read a row before it was refined again may write it as it was then.
        now = journal.manifest.current
        if now is not None and self._writes:
            past = {entry["refiner"] for entry in journal.manifest.history} - {now.refiner, ""}
            self._writes += [
                WrittenRows(journal, replace(now, refiner=name, written=None), info.rounding)
                for name in sorted(past)
                if (journal.refiners / name).is_dir()
            ]

    def __bool__(self) -> bool:
        return bool(self._writes)

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,)."""
        vectors = batch.vectors.copy()
        ours = np.zeros(len(batch), np.bool_)
        for write in self._writes:
            found, mine = write.originals(batch)
            vectors[mine & ~ours] = found[mine & ~ours]
            ours |= mine
        return vectors, ours


class WrittenRows:
    """Tells the rows of one write, finished or not, from others.

    Where ids are positions, rows shift as others are added or removed before them; so a row that
    is not what was written under its id is looked for by its vector.
    """

    def __init__(
        self, journal: Journal, write: Write, rounding: float, *, positional: bool = False
    ) -> None:
        """Take the write, within what relative distance vectors are read back, and what ids are."""
        self._rows = journal.open_originals(write)
        self._place = Lookup(self._rows.ids)
        self._refiner = Refiner.load(journal.refiners / write.refiner)
        self._rounding = rounding
        self._digests: Digests = np.zeros(len(self._rows), np.uint64)
        if write.written is not None:
            ids, digests = journal.open_written(write.written)
            places = self._place.find(ids)
            self._digests[places[places >= 0]] = digests[places >= 0]
        known = journal.known(write.refiner) if self._refiner.late is LateRule.RAW else None
        self._known = None if known is None else Lookup(known[0])
        self._elsewhere: ByVector | None = None
        if positional:
            self._elsewhere = self._left(known=write.written is not None)

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether it is of this write, (b,)."""
        places = self._place.find(batch.ids)
        known = np.flatnonzero(places >= 0)
        originals = batch.vectors.copy()
        originals[known] = self._rows.take(places[known])
        mine = np.zeros(len(batch), np.bool_)
        mine[known] = row_digests(batch.vectors[known]) == self._digests[places[known]]
        doubtful = known[~mine[known]]
        mine[doubtful] = self._refined(batch, originals, doubtful)
        mine[doubtful] |= self._left_raw(batch, originals, doubtful, places[doubtful])
        if self._elsewhere is not None and not mine.all():
            others = np.flatnonzero(~mine)
            places = self._elsewhere.find(batch.vectors[others])
            originals[others[places >= 0]] = self._rows.take(places[places >= 0])
            mine[others[places >= 0]] = True
        return originals, mine

    def _left(self, *, known: bool) -> ByVector:
        """Return what finds rows by the vectors that the write left, or may have left."""
        if known:
            places = np.flatnonzero(self._digests)
            return ByVector(self._rows, self._digests[places], places)
        alike = Alike(self._rows)
        digests, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for start, block in self._rows.blocks():
            ids = self._rows.ids[start : start + len(block)]
            for late in (False, True):
                refined = self._refiner.refine_rows(block, ids, np.full(len(block), late))
                found = row_digests(refined)
                moved = np.flatnonzero(found != row_digests(block))
                digests.append(found[moved])
                owners.append(start + moved)
                alike.add(refined[moved], start + moved)
        return ByVector(self._rows, np.concatenate(digests), np.concatenate(owners), alike)

    def _left_raw(
        self, batch: VectorBatch, originals: Vectors, rows: Positions, places: Positions
    ) -> Mask:
        """Tell rows that the write left raw and that are read back with other last digits."""
        if not len(rows):
            return np.zeros(0, np.bool_)
        # Of rows left raw, the digest that is recorded is the original's.
        left = self._digests[places] == row_digests(originals[rows])
        if self._known is not None:
            left |= (self._known.find(batch.ids[rows]) < 0) & (self._digests[places] != 0)
        return np.asarray(left & near(batch.vectors[rows], originals[rows], LAST_DIGITS))

    def _refined(self, batch: VectorBatch, originals: Vectors, rows: Positions) -> Mask:
        # Rows that acted as test queries were written as rows that arrive late are.
        found = np.zeros(len(rows), np.bool_)
        if not len(rows):
            return found
        for late in (False, True):
            refined = self._refiner.refine_rows(
                originals[rows], batch.ids[rows], np.full(len(rows), late)
            )
            moved = ~near(refined, originals[rows], self._rounding)
            found |= moved & near(batch.vectors[rows], refined, self._rounding)
        return found


class AsRead:
    """The rows as they were read, to tell later whether somebody changed them.

    A store may give back a vector with other last digits from one moment to the next (the client's
    local mode normalises what it searches). So where it is not exact, a row is the same while its
    original is: while it holds that, or what a write of ours made of that.
    """

    def __init__(self, rows: Rows, digests: Digests, journal: Journal, store: VectorStore) -> None:
        """Take the originals, digests of the rows as they were read, and who wrote them."""
        info = store.info()
        self._digests, self._rows = digests, rows
        self.lookup, self._tolerance = Lookup(rows.ids), info.tolerance
        self._ours = LiveRows(journal, store) if self._tolerance else None

    def same(self, now: VectorBatch) -> Mask:
        """Tell which of these rows are as they were read; rows that were not there are not."""
        places = self.lookup.find(now.ids)
        same = np.zeros(len(now), np.bool_)
        known = np.flatnonzero(places >= 0)
        same[known] = row_digests(now.vectors[known]) == self._digests[places[known]]
        doubtful = known[~same[known]]
        if self._ours is not None and len(doubtful):
            rows = VectorBatch(ids=now.ids[doubtful], vectors=now.vectors[doubtful])
            originals, _ = self._ours.originals(rows)
            then = self._rows.take(places[doubtful])
            same[doubtful] = near(originals, then, self._tolerance)
        return same


class OurRows:
    """Tells rows that we wrote from rows that the application wrote since.

    A row is ours where its digest is the one that we read back after writing. Where ids are
    positions they shift as rows are removed; then the digest alone decides. A vector that differs
    only by what half precision does to it, and is not where its original was, was refined too: it
    must not be taken for an original.
    """

    def __init__(self, journal: Journal, write: Write, store: VectorStore) -> None:
        assert write.written is not None
        self._rows = journal.open_originals(write)
        self._ids, self._digests = journal.open_written(write.written)
        self._place = Lookup(self._rows.ids)
        self._written = Lookup(self._ids)
        self._order = np.argsort(self._digests, kind="stable")
        self._by_vector = store.info().positional and self._shifted(store)
        self._refiner = Refiner.load(journal.refiners / write.refiner)

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
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
            vectors[ours] = self._rows.take(self._places(self._ids[written[ours]]))
        return vectors, ours

    def _places(self, ids: Ids) -> Positions:
        places = self._place.find(ids)
        if (places < 0).any():
            raise JournalError(
                f"{self._rows.path} lacks originals of {int((places < 0).sum())} rows that were "
                "refined; restore the state folder from a backup"
            )
        return places

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

    def _rounded(self, vectors: Vectors, ids: Ids) -> Mask:
        originals = self._rows.take(self._places(ids))
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
        members = np.repeat(first, sizes) + ramps(sizes)
        places = self._places(self._ids[self._order[members]])
        originals = row_digests(self._rows.take(places))
        leaders = np.repeat(np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
        if (originals != originals[leaders]).any():
            raise JournalError(
                "rows were removed or reordered, ids of this index are positions, and some rows "
                "with equal vectors now had different originals: which is whose cannot be told. "
                "Restore the index from a backup, or use an IDMap so that rows keep their ids"
            )
