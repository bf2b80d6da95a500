"""Whose vector is in a row: the application's, or a write's of ours, and which original it had."""

from __future__ import annotations

import logging
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from simskip_vdb.by_vector import AMBIGUOUS, LAST_DIGITS, Alike, ByVector, Lookup, near, ramps
from simskip_vdb.datatypes import (
    Ids,
    Mask,
    Positions,
    StoreInfo,
    VectorBatch,
    Vectors,
    id_names,
)
from simskip_vdb.errors import DataError, JournalError
from simskip_vdb.journal import FileRef, Journal, Past, Write
from simskip_vdb.refiner import LateRule, Refiner
from simskip_vdb.rows import Digests, Rows, ids_from_arrow, row_digests
from simskip_vdb.store import VectorStore

log = logging.getLogger(__name__)

SCAN_ROWS = 8192


class Ours(Protocol):
    """Tells rows that we wrote from the application's."""

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,)."""
        ...


class Register:
    """Tells, of any row that is read, whether a write of ours left it there, and what was before.

    A row is ours where it holds what a write left: the last one, one that was interrupted, or any
    before. An application may save rows as it had read them long ago, and a file or a row may be
    restored from a backup; a rollback in between changes nothing about that.
    """

    def __init__(
        self, journal: Journal, store: VectorStore, *, past: bool = True, strict: bool = False
    ) -> None:
        """Take an index and its state.

        Args:
            journal: The state.
            store: The index.
            past: Whether to look for rows of writes before the last one.
            strict: Whether to refuse rows of ours whose originals the state does not hold.
        """
        writes = (journal.manifest.pending, journal.manifest.current)
        self._info, self._folder, self._strict = store.info(), journal.folder, strict
        self._writes = [
            WrittenRows(journal, write, store)
            for write in writes
            if write is not None and write.refiner and not write.beside
        ]
        self._past = _PastRows(journal, store) if past and journal.past else None

    def __bool__(self) -> bool:
        return bool(self._writes) or self._past is not None

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,).

        Raises:
            JournalError: Which original is whose is ambiguous; or, with `strict`, rows of ours have
                no original any more.
        """
        vectors = batch.vectors.copy()
        ours = np.zeros(len(batch), np.bool_)
        for write in self._writes:
            found, mine = write.originals(batch)
            vectors[mine & ~ours] = found[mine & ~ours]
            ours |= mine
        if self._past is not None and not ours.all():
            others = np.flatnonzero(~ours)
            rows = VectorBatch(ids=batch.ids[others], vectors=batch.vectors[others])
            found, mine, gone = self._past.originals(rows)
            if self._strict and gone.any():
                raise JournalError(self._orphans(rows.ids[gone]))
            vectors[others[mine]], ours[others[mine]] = found[mine], True
        return vectors, ours

    def _orphans(self, ids: Ids) -> str:
        return (
            f"{self._info.uri}: {len(ids):,} rows or more (such as id {id_names(ids[:1])[0]}) "
            f"hold what an earlier refinement wrote, and {self._folder} does not hold their "
            "originals any more: they were removed or changed since, and came back. Nothing was "
            "written. Restore these rows from a backup of before they were refined, or delete "
            "them, then run the same command"
        )


def our_rows(journal: Journal, store: VectorStore) -> Ours | None:
    """Return what tells our rows from the application's; None where we never wrote any."""
    register = Register(journal, store, strict=True)
    return register if register else None


class _PastRows:
    """Rows of writes before the last one, told by the digests that are kept of them on disk.

    Nothing is looked up of rows that hold their originals, and nothing is read before a row is
    neither that nor of the last write.
    """

    def __init__(self, journal: Journal, store: VectorStore) -> None:
        self._journal, self._store, self._info = journal, store, store.info()

    @cached_property
    def _held(self) -> list[_Held]:
        return [_Held(rows, self._info) for rows in self._journal.held_originals()]

    @cached_property
    def _tables(self) -> list[tuple[Past, list[_Table]]]:
        """What each write left, the last one first."""
        return [
            (item, [_Table(self._journal.path(file)) for file in item.files])
            for item in reversed(self._journal.past)
        ]

    @cached_property
    def _remade(self) -> list[WrittenRows]:
        """Writes of which it is known only what their refiner makes of originals."""
        ref = self._journal.original_ref
        unknown = {
            item.refiner
            for item, tables in self._tables
            if not tables or not all(table.complete for table in tables)
        }
        return [
            WrittenRows(self._journal, write_of(name, ref), self._store)
            for name in sorted(unknown)
            if ref is not None and (self._journal.refiners / name).is_dir()
        ]

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask, Mask]:
        """Return originals, which rows are ours, and which of ours have no original any more."""
        vectors = batch.vectors.copy()
        mine, gone = np.zeros(len(batch), np.bool_), np.zeros(len(batch), np.bool_)
        digests = row_digests(batch.vectors)
        strange = np.flatnonzero(~self._as_before(batch, digests))
        for table in chain.from_iterable(tables for _, tables in self._tables if len(strange)):
            ids = None if self._info.positional else batch.ids[strange]
            hit, before = table.find(ids, digests[strange])
            rows = strange[hit]
            for held in self._held:
                found, there = held.take(batch.ids[rows], before[hit])
                vectors[rows[there]], mine[rows[there]] = found[there], True
            gone[rows] = True
            strange = strange[~mine[strange]]
        if len(strange):
            self._remake(batch, vectors, mine, strange)
        return vectors, mine, gone & ~mine

    def _as_before(self, batch: VectorBatch, digests: Digests) -> Mask:
        same = np.zeros(len(batch), np.bool_)
        for held in self._held:
            same |= held.take(batch.ids, digests)[1]
        return same

    def _remake(self, batch: VectorBatch, vectors: Vectors, mine: Mask, rows: Positions) -> None:
        some = VectorBatch(ids=batch.ids[rows], vectors=batch.vectors[rows])
        for write in self._remade:
            found, ours = write.originals(some)
            new = ours & ~mine[rows]
            vectors[rows[new]], mine[rows[new]] = found[new], True


def write_of(refiner: str, originals: FileRef | None) -> Write:
    """Return a write of which no more is known than its refiner and its rows' originals."""
    return Write(
        refiner=refiner,
        before="",
        fingerprint="",
        originals=originals,
        written=None,
        kept=None,
        time=0.0,
    )


def _fits(refiner: Refiner, ids: Ids) -> bool:
    """Tell whether a refiner can have made anything of rows with such ids."""
    try:
        refiner.check_ids(ids)
    except DataError:
        return False
    return True


class _Held:
    """Originals that the state holds, found by id and digest; by digest where ids are positions."""

    def __init__(self, rows: Rows, info: StoreInfo) -> None:
        self._rows = rows
        self._digests: Digests | None = None
        if info.positional:
            blocks = [row_digests(block) for _, block in rows.blocks()]
            self._digests = np.concatenate(blocks) if blocks else np.empty(0, np.uint64)
        self._lookup = Lookup(rows.ids if self._digests is None else self._digests)

    def take(self, ids: Ids, digests: Digests) -> tuple[Vectors, Mask]:
        """Return the originals with these digests, shape (b, d), and which are held, shape (b,)."""
        places = self._lookup.find(ids if self._digests is None else digests)
        vectors = np.empty((len(ids), self._rows.dim), np.float32)
        known = np.flatnonzero(places >= 0)
        vectors[known] = self._rows.take(places[known])
        held = places >= 0
        held[known] = row_digests(vectors[known]) == digests[known]
        return vectors, held


class _Table:
    """What a write left: ids, digests of rows as read back, and of their originals, on disk.

    The file is sorted by the digests of rows.

    Attributes:
        complete: Whether it has all of this; a file of an earlier version lacks the originals.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.complete = "original" in self._batch.schema.names

    def find(self, ids: Ids | None, digests: Digests) -> tuple[Mask, Digests]:
        """Tell which rows a write left, shape (b,), and the digests of their originals, (b,).

        Rows that were written as they had been are nobody's.

        Args:
            ids: Shape (b,); None to find rows under whatever id.
            digests: Of their vectors, shape (b,).
        """
        hit, before = np.zeros(len(digests), np.bool_), np.zeros(len(digests), np.uint64)
        if not self.complete:
            return hit, before
        known, originals = (self._batch[name].to_numpy() for name in ("digest", "original"))
        first = np.searchsorted(known, digests, side="left")
        sizes = np.searchsorted(known, digests, side="right") - first
        row, place = np.repeat(np.arange(len(digests)), sizes), np.repeat(first, sizes)
        place = place + ramps(sizes)
        moved = known[place] != originals[place]
        if ids is not None:
            moved &= ids_from_arrow(self._batch["id"].take(place)) == ids[row]
        row, place = row[moved], place[moved]
        hit[row], before[row] = True, originals[place]
        if ids is None and (before[row] != originals[place]).any():
            raise JournalError(AMBIGUOUS)
        return hit, before


class WrittenRows:
    """Tells the rows of one write, finished or not, from others.

    Where ids are positions, rows shift as others are added or removed before them; so a row that
    is not what was written under its id is looked for by its vector.
    """

    def __init__(self, journal: Journal, write: Write, store: VectorStore) -> None:
        """Take the index, its state, and the write."""
        info = store.info()
        self._store, self._rounding = store, info.rounding
        self._rows = journal.open_originals(write)
        self._place = Lookup(self._rows.ids)
        self._refiner = self._maker(journal, write, exact=info.exact)
        self._digests: Digests = np.zeros(len(self._rows), np.uint64)
        if write.written is not None:
            ids, digests = journal.open_written(write.written)
            places = self._place.find(ids)
            self._digests[places[places >= 0]] = digests[places >= 0]
        raw = self._refiner is not None and self._refiner.late is LateRule.RAW
        known = journal.known(write.refiner) if raw else None
        self._known = None if known is None else Lookup(known.ids)
        self._elsewhere: ByVector | None = None
        if info.positional:
            self._elsewhere = self._left(known=write.written is not None)

    def _maker(self, journal: Journal, write: Write, *, exact: bool) -> Refiner | None:
        """Return the refiner whose rows these are.

        None where it cannot have made anything of rows with such ids; and where it is lost, and
        digests tell without it.
        """
        try:
            refiner = journal.refiner(write.refiner)
        except JournalError as error:
            if write.written is None or not exact:
                raise
            log.warning("%s. Rows are told by their digests alone", error)
            return None
        return refiner if _fits(refiner, self._rows.ids) else None

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether it is of this write, (b,)."""
        places = self._place.find(batch.ids)
        known = np.flatnonzero(places >= 0)
        originals = batch.vectors.copy()
        originals[known] = self._rows.take(places[known])
        mine = np.zeros(len(batch), np.bool_)
        digests = row_digests(batch.vectors)
        mine[known] = digests[known] == self._digests[places[known]]
        twins = self._elsewhere is not None and np.isin(digests, self._elsewhere.ambiguous).any()
        if twins and self._shifted:
            raise JournalError(AMBIGUOUS)
        doubtful = known[~mine[known]]
        changed = doubtful[digests[doubtful] != row_digests(originals[doubtful])]
        mine[changed] = self._refined(batch, originals, changed)
        mine[doubtful] |= self._left_raw(batch, originals, doubtful, places[doubtful])
        if self._elsewhere is not None and not mine.all():
            others = np.flatnonzero(~mine)
            places = self._elsewhere.find(batch.vectors[others])
            originals[others[places >= 0]] = self._rows.take(places[places >= 0])
            mine[others[places >= 0]] = True
        return originals, mine

    @cached_property
    def _shifted(self) -> bool:
        """Whether any row is elsewhere than where we wrote it."""
        count = 0
        for batch in self._store.scan(SCAN_ROWS):
            places = self._place.find(batch.ids)
            here = self._digests[places] == row_digests(batch.vectors)
            if not (here & (places >= 0)).all():
                return True
            count += len(batch)
        return count < len(self._rows)

    def _left(self, *, known: bool) -> ByVector:
        """Return what finds rows by the vectors that the write left, or may have left."""
        refiner = self._refiner
        if known or refiner is None:
            places = np.flatnonzero(self._digests)
            return ByVector(self._rows, self._digests[places], places)
        alike = Alike(self._rows)
        digests, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for start, block in self._rows.blocks():
            ids = self._rows.ids[start : start + len(block)]
            for late in (False, True):
                refined = refiner.refine_rows(block, ids, np.full(len(block), late))
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
        if not len(rows) or self._refiner is None:
            return found
        for late in (False, True):
            refined = self._refiner.refine_rows(
                originals[rows], batch.ids[rows], np.full(len(rows), late)
            )
            moved = ~near(refined, originals[rows], self._rounding)
            found |= moved & near(batch.vectors[rows], refined, self._rounding)
        return found
