"""Where refined rows go: over the rows, to a vector beside theirs, or to a copied collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from simskip_vdb.datatypes import Ids, Mask, Progress, StoreInfo, VectorBatch, Vectors
from simskip_vdb.errors import (
    ConfigError,
    StoreError,
    StoreNotFoundError,
    VerificationError,
)
from simskip_vdb.journal import IN_PLACE, NEW_COLLECTION, NEW_VECTOR, Journal, Write
from simskip_vdb.provenance import SCAN_ROWS, AsRead, Lookup, near
from simskip_vdb.register import Ours, Register, WrittenRows
from simskip_vdb.rows import Rows, fingerprint_of, row_digests
from simskip_vdb.store import BESIDE, CopiedStore, RowStore, VectorStore, abilities

Refined = Callable[[Ids], Vectors]
"""Refines the originals of these rows, shape (len(ids), d)."""


class Restored(NamedTuple):
    """What a rollback did.

    Attributes:
        store: The store with the originals.
        rows: How many rows were ours.
        left: How many were not.
        ours: Tells rows that were to be restored; None where nothing was written over.
    """

    store: VectorStore
    rows: int
    left: int
    ours: Ours | None = None


class InPlace:
    """Refined vectors replace the vectors of the rows."""

    mode = IN_PLACE

    def __init__(self, store: RowStore, journal: Journal) -> None:
        self.store, self._journal = store, journal
        self.name = self.origin = ""

    @property
    def beside(self) -> bool:
        """Whether refined vectors stand beside the rows' own."""
        return self.mode == NEW_VECTOR

    @property
    def filled(self) -> bool:
        """Whether an earlier write left vectors there that may still be right."""
        return self._journal.manifest.current is not None

    def open(self, progress: Progress) -> RowStore:
        """Return the store that receives refined vectors."""
        return self.store

    def unchanged(self, now: VectorBatch, read: AsRead) -> Mask:
        """Tell which of the rows about to be written, in the store that is written, are as read."""
        return read.same(now)

    def finish(self, read: AsRead, refined: Refined, progress: Progress) -> None:
        """Let the refined vectors take effect, in rows that are as they were read."""

    def undo(self, write: Write, progress: Progress) -> None:
        """Leave everything as it was before a write that failed or will not be finished."""
        info, read = self.store.info(), write.originals
        # Where ids are positions and rows came or went since, only originals are known by vector.
        shifted = info.positional and (read is None or read.rows != info.count)
        before = None if write.kept is None or shifted else Rows(self._journal.path(write.kept))
        putting = PuttingBack(self.store, self._journal, before, progress)
        putting.run()
        putting.check()

    def rollback(self, write: Write, progress: Progress) -> Restored:
        """Bring the originals back."""
        putting = PuttingBack(self.store, self._journal, None, progress)
        return Restored(self.store, *putting.run(), putting.ours)


class NewVector(InPlace):
    """Refined vectors stand beside the originals, under another name."""

    mode = NEW_VECTOR

    def __init__(self, store: RowStore, journal: Journal) -> None:
        vectors = abilities(store).vectors
        if vectors is None:
            raise ConfigError(f"{store.info().uri}: rows cannot hold another vector")
        super().__init__(store, journal)
        self._vectors, self.name = vectors, vectors.vector_name + BESIDE

    def open(self, progress: Progress) -> RowStore:
        """Return the vectors beside the rows' own; see `InPlace.open`."""
        return self._vectors.vector_beside(self.name, create=True)

    def unchanged(self, now: VectorBatch, read: AsRead) -> Mask:
        """Tell which rows' own vectors are as read; see `InPlace.unchanged`."""
        source = self.store.peek(now.ids)
        same = np.zeros(len(now), np.bool_)
        same[Lookup(now.ids).find(source.ids)] = read.same(source)
        return same

    def undo(self, write: Write, progress: Progress) -> None:
        """Remove the new vector, or fill it as before; see `InPlace.undo`."""
        if write.kept is None:
            self._drop()
            return
        target = self.open(progress)
        before = Rows(self._journal.path(write.kept))
        for start, block in before.blocks():
            ids = before.ids[start : start + len(block)]
            target.update(VectorBatch(ids=ids, vectors=block), _any)
        target.settle(progress)

    def rollback(self, write: Write, progress: Progress) -> Restored:
        """Remove the new vector; see `InPlace.rollback`."""
        return Restored(self.store, self._drop(), 0)

    def _drop(self) -> int:
        """Remove the new vector where it was ever made; return how many rows had one."""
        try:
            target = self._vectors.vector_beside(self.name, create=False)
        except ConfigError:  # there is none, or it is somebody else's
            return 0
        count = target.info().count
        mark(target, None)
        self._vectors.drop_vector_beside(self.name)
        return count


class NewCollection(InPlace):
    """Refined vectors fill a copy of the collection, to which the alias is switched."""

    mode = NEW_COLLECTION

    def __init__(self, store: RowStore, journal: Journal, refiner: str) -> None:
        copies = abilities(store).copies
        if copies is None:
            raise ConfigError(f"{store.info().uri}: it cannot be copied beside itself")
        super().__init__(store, journal)
        self._copies = copies
        pending, current = journal.manifest.pending, journal.manifest.current
        if pending is not None and pending.target and pending.refiner == refiner:
            self.origin, self.name = pending.origin, pending.target
            return
        ours = current is not None and current.target == copies.collection
        self.origin = current.origin if current is not None and ours else copies.collection
        self.name = f"{self.origin}{BESIDE}-{refiner}"
        if self.name == copies.collection:
            self.name += f"-{len(journal.manifest.history) + 1}"

    def open(self, progress: Progress) -> RowStore:
        """Return the copy, made or brought up to date; see `InPlace.open`."""
        if self._switched:
            return self.store
        self._copies.check_alias()
        return self._copies.copy(self.name, progress)

    def finish(self, read: AsRead, refined: Refined, progress: Progress) -> None:
        """Bring over what the application wrote meanwhile, compare, and switch the alias."""
        if self._switched:
            return
        self._catch_up(read, refined, progress).settle(progress)
        self._catch_up(read, refined, progress)  # building the index may have taken long
        self._copies.switch(self.name)

    def undo(self, write: Write, progress: Progress) -> None:
        """Remove the copy, or restore its rows where the alias leads to it; see `InPlace.undo`."""
        if self._switched:
            super().undo(write, progress)
        else:
            self._copies.drop_copy(self.name)

    def rollback(self, write: Write, progress: Progress) -> Restored:
        """Switch back where the copy is as we left it; else restore rows where they are.

        Raises:
            StoreError: The application wrote to the copy just before the alias was switched back.
        """
        if self._copies.collection == write.target:
            origin = self._untouched(write, progress)
            if origin is not None:
                self._copies.switch(write.origin)
                self._drop(write, progress)
                return Restored(origin, 0 if write.written is None else write.written.rows, 0)
        elif write.written is None:  # the copy was never switched to
            self._copies.drop_copy(write.target)
            return Restored(self.store, 0, 0)
        return super().rollback(write, progress)

    @property
    def _switched(self) -> bool:
        return self._copies.collection == self.name

    def _catch_up(self, read: AsRead, refined: Refined, progress: Progress) -> RowStore:
        target = self.open(progress)
        for batch in self.store.scan(SCAN_ROWS):
            same = read.same(batch)
            target.update(VectorBatch(ids=batch.ids[~same], vectors=batch.vectors[~same]), _any)
            # A point whose payload changed was copied again, with its vector.
            vectors = refined(batch.ids[same])
            finite = np.isfinite(vectors).all(axis=1)
            again = VectorBatch(ids=batch.ids[same][finite], vectors=vectors[finite])
            target.update(again, read.same)
        return target

    def _untouched(self, write: Write, progress: Progress) -> CopiedStore | None:
        """Return the collection from before, where it holds all that the copy holds."""
        if not holds(self.store, self._journal, write):
            return None
        try:
            origin = self._copies.other(write.origin)
            origin.compare(write.target, progress)
        except (StoreNotFoundError, VerificationError):
            return None
        originals = self._journal.open_originals(write)
        return origin if look_over(origin, originals).exact else None

    def _drop(self, write: Write, progress: Progress) -> None:
        """Remove the copy, unless something was written to it before the alias led elsewhere."""
        origin = self._untouched(write, progress)
        if origin is None:
            raise StoreError(
                f"{self.store.info().uri}: '{write.origin}' or '{write.target}' was written to "
                f"while the alias was led back to '{write.origin}'. Both are kept; bring over what "
                f"'{write.target}' has and '{write.origin}' has not, then run the same command "
                "again"
            )
        origin.drop_copy(write.target)


def check_same_mode(journal: Journal, mode: str) -> None:
    """Make sure that an index is not refined in two modes at a time.

    Raises:
        ConfigError: It was refined in another mode before.
    """
    for write in (journal.manifest.pending, journal.manifest.current):
        if write is not None and write.refiner and write.mode != mode:
            raise ConfigError(
                f"{journal.manifest.index} was refined by --mode {write.mode}; go on with that, or "
                "roll it back first"
            )


def make_target(
    store: RowStore, journal: Journal, mode: str, refiner: str
) -> InPlace | NewVector | NewCollection:
    """Return where a mode writes.

    Args:
        store: The index.
        journal: Its state.
        mode: ``in-place``, ``new-vector`` or ``new-collection``.
        refiner: Id of the refiner that is written.

    Raises:
        ConfigError: The store cannot do that, or it was refined in another mode before.
    """
    check_same_mode(journal, mode)
    if mode == NEW_VECTOR:
        return NewVector(store, journal)
    if mode == NEW_COLLECTION:
        return NewCollection(store, journal, refiner)
    return InPlace(store, journal)


def holding(store: VectorStore, write: Write | None) -> VectorStore:
    """Return the store that holds what was written: this one, or the vectors beside."""
    vectors = abilities(store).vectors
    if write is None or not write.beside or vectors is None:
        return store
    return vectors.vector_beside(write.target, create=False)


def holds(store: VectorStore, journal: Journal, write: Write) -> bool:
    """Tell, by reading it once, whether a store is as a write left it: each row, and no other."""
    file = abilities(store).file
    if file is not None:
        return file.sha256() == write.fingerprint
    place = holding(store, write)
    ours = WrittenRows(journal, write, place)
    count = 0
    for batch in place.scan(SCAN_ROWS):
        if not ours.originals(batch)[1].all():
            return False
        count += len(batch)
    if write.written is None or count != write.written.rows:
        return False
    return not write.beside or look_over(store, journal.open_originals(write)).exact


class After(NamedTuple):
    """A store after originals were put back: `fingerprint`, whether it holds them and no others."""

    fingerprint: str
    exact: bool


def look_over(store: VectorStore, originals: Rows, ours: Ours | None = None) -> After:
    """Look at every row once.

    Args:
        store: What should hold the originals.
        originals: The originals.
        ours: Tells rows that should not be there any more.

    Raises:
        StoreError: Such rows are there.
    """
    info, lookup, left = store.info(), Lookup(originals.ids), 0
    ids, digests, exact = [np.empty(0, originals.ids.dtype)], [np.empty(0, np.uint64)], True
    for batch in store.scan(SCAN_ROWS):
        ids.append(batch.ids)
        digests.append(row_digests(batch.vectors))
        if ours is not None:
            before, mine = ours.originals(batch)
            left += int((mine & ~near(batch.vectors, before, info.rounding)).sum())
        places = lookup.find(batch.ids)
        known = np.flatnonzero(places >= 0)
        then = originals.take(places[known])
        same = digests[-1][known] == row_digests(then)
        if not info.exact:
            same |= near(batch.vectors[known], then, info.rounding)
        exact &= len(known) == len(batch) and bool(same.all())
    if left:
        raise _still_ours(info, left)
    rows = np.concatenate(ids)
    return After(
        fingerprint_of(rows, np.concatenate(digests)), exact and len(rows) == len(originals)
    )


class PuttingBack:
    """Writes over every row of ours.

    Args:
        store: The index.
        journal: Its state.
        rows: What is written, by id; None for the originals.
        progress: Called with rows done and rows in all.
    """

    def __init__(
        self, store: RowStore, journal: Journal, rows: Rows | None, progress: Progress
    ) -> None:
        self._store, self._info, self._journal = store, store.info(), journal
        self._rows, self._progress = rows, progress
        self._lookup = None if rows is None else Lookup(rows.ids)
        self.ours = Register(journal, store)

    def run(self) -> tuple[int, int]:
        """Write; return how many rows were ours, and how many not."""
        restored = seen = 0
        for batch, now, size in self._due():
            seen += size
            if len(batch):
                self._journal.check()
                unchanged = _Unchanged(now, self._info.tolerance)
                restored += int(self._store.update(batch, unchanged).sum())
        self._store.settle(self._progress)
        return restored, seen - restored

    def check(self) -> None:
        """Make sure that no row of ours is left.

        Raises:
            StoreError: Rows still hold refined vectors.
        """
        left = sum(len(batch) for batch, _, _ in self._due())
        if left:
            raise _still_ours(self._info, left)

    def _due(self) -> Iterator[tuple[VectorBatch, VectorBatch, int]]:
        done = 0
        for batch in self._store.scan(SCAN_ROWS):
            originals, mine = self.ours.originals(batch)
            chosen = np.flatnonzero(mine)
            vectors = originals[chosen]
            if self._rows is not None and self._lookup is not None:
                places = self._lookup.find(batch.ids[chosen])
                vectors[places >= 0] = self._rows.take(places[places >= 0])
            wrong = ~near(batch.vectors[chosen], vectors, self._info.rounding)
            done += len(batch)
            self._progress("restore", done, self._info.count)
            ids = batch.ids[chosen[wrong]]
            now = VectorBatch(ids=ids, vectors=batch.vectors[chosen[wrong]])
            yield VectorBatch(ids=ids, vectors=vectors[wrong]), now, len(batch)


def _still_ours(info: StoreInfo, left: int) -> StoreError:
    return StoreError(
        f"{info.uri}: {left:,} rows still hold refined vectors; run the same command again"
    )


def mark(store: VectorStore, note: dict[str, object] | None) -> None:
    """Leave word in a store, where it can carry any, of whose vectors it holds."""
    marked = abilities(store).marker
    if marked is not None:
        marked.mark(note)


class _Unchanged:
    """Lets rows go that are as they were read a moment ago."""

    def __init__(self, read: VectorBatch, tolerance: float) -> None:
        self._lookup, self._vectors = Lookup(read.ids), read.vectors
        self._tolerance = tolerance

    def __call__(self, now: VectorBatch) -> Mask:
        then = self._vectors[self._lookup.find(now.ids)]
        return near(now.vectors, then, self._tolerance)


def _any(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)
