"""Write an index row by row, where its rows are, while an application may write to it, too.

There is no moment at which everything changes at once, so a write is announced first. A kill
leaves some rows refined and some not; which is which shows in the rows themselves, since the
originals and the refiner are in the state. The same command goes on, `rollback` goes back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from simskip_vdb.datatypes import Mask, Progress, VectorBatch, silent
from simskip_vdb.errors import StoreError, TransientStoreError, VerificationError
from simskip_vdb.journal import IN_PLACE, Journal, Write
from simskip_vdb.outgoing import Refine, RolledBack, Written, refined_at
from simskip_vdb.provenance import SCAN_ROWS, LiveRows, Lookup, near
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import Digests, Rows, fingerprint_of, row_digests
from simskip_vdb.store import Check, Marked, RowWritable, VectorStore

FEWEST = 100  # rows, below which a share of them says little


class RowStore(VectorStore, RowWritable, Protocol):
    """A store whose rows are written one by one."""


class Snapshot(NamedTuple):
    """What a scan of the index found.

    Attributes:
        rows: Every row's original, on disk.
        digests: Digest of every row as it was read, shape (n,).
        theirs: How many of them the application wrote, not we.
        columns: Payload columns that were asked for, each of length n.
    """

    rows: Rows
    digests: Digests
    theirs: int
    columns: Mapping[str, list[Any]]


def write(
    store: RowStore,
    found: Snapshot,
    refine: Refine,
    *,
    journal: Journal,
    refiner: Refiner,
    accept: Check,
    summary: Mapping[str, Any],
    progress: Progress = silent,
) -> Written:
    """Write refined vectors over the rows: announced, verified, and undoable.

    A row that the application changed since it was read stays as it is.

    Args:
        store: The index.
        found: What was read of it.
        refine: Refines a block of originals.
        journal: The state, locked.
        refiner: What is written, for the record.
        accept: Sees the index after writing, and raises to refuse it; then it is restored.
        summary: What `status` shows of this write.
        progress: Called with rows done and rows in all.

    Raises:
        VerificationError: The store does not hold what was written; it was restored.
        TransientStoreError: The store kept failing; the same command resumes.
    """
    pending = journal.manifest.pending
    if pending is None:
        kept = journal.save_before(store.scan(SCAN_ROWS)) if journal.manifest.current else None
        before = fingerprint_of(found.rows.ids, found.digests)
    else:
        kept, before = pending.kept, pending.before
    write = Write(
        refiner=refiner.id,
        before=before,
        fingerprint="",
        originals=journal.scanned,
        written=None,
        kept=kept,
        time=time.time(),
        summary=summary,
    )
    journal.announce(write)
    mark(store, journal, refiner)
    sending = _Sending(store, found, refine, progress)
    try:
        sending.send()
        store.settle(progress)
        read = sending.verify()
        accept(store)
    except TransientStoreError:
        raise
    except Exception:
        _put_back(store, journal, _before(journal, write), progress)
        journal.settle(happened=False)
        mark(store, journal, None)
        raise
    written = journal.save_written(read.ids[read.ours], read.digests[read.ours])
    done = replace(write, written=written, fingerprint=fingerprint_of(read.ids, read.digests))
    journal.settle(happened=True, done=done)
    return sending.outcome(read)


def rollback(store: RowStore, journal: Journal, progress: Progress = silent) -> RolledBack:
    """Give every row that we wrote its original vector again.

    Rows that the application added or changed since stay as they are.

    Args:
        store: The index.
        journal: Its state, locked.
        progress: Called with rows done and rows in all.

    Raises:
        JournalError: The state is damaged.
        StoreError: Rows could not be restored.
        TransientStoreError: The store kept failing; the same command resumes.
    """
    write = journal.manifest.pending or journal.manifest.current
    assert write is not None
    undo = replace(write, refiner="", summary={}, time=time.time())
    if journal.manifest.pending is None:
        journal.announce(undo)
    originals = journal.open_originals(write)
    restored, left = _put_back(store, journal, originals, progress)
    after = fingerprint(store)
    digests = np.concatenate(
        [np.empty(0, np.uint64), *(row_digests(block) for _, block in originals.blocks())]
    )
    journal.settle(happened=True, done=undo)
    mark(store, journal, None)
    exact = after == fingerprint_of(originals.ids, digests)
    return RolledBack(exact=exact, restored=restored, kept=left, fingerprint=after)


def abandon(
    store: RowStore, found: Snapshot, journal: Journal, progress: Progress = silent
) -> Snapshot:
    """Undo a write that was interrupted and will not be finished; return the index as it is then.

    Raises:
        StoreError: Rows could not be restored.
        TransientStoreError: The store kept failing; the same command resumes.
    """
    pending = journal.manifest.pending
    assert pending is not None
    _put_back(store, journal, _before(journal, pending), progress)
    journal.settle(happened=False)
    mark(store, journal, None)
    digests = found.digests.copy()
    lookup = Lookup(found.rows.ids)
    for batch in store.scan(SCAN_ROWS):
        places = lookup.find(batch.ids)
        digests[places[places >= 0]] = row_digests(batch.vectors)[places >= 0]
    return found._replace(digests=digests)


def recover(journal: Journal) -> None:
    """Forget a rollback that was interrupted: the rows themselves tell how far it came."""
    pending = journal.manifest.pending
    if pending is not None and not pending.refiner:
        journal.settle(happened=False)


def mark(store: VectorStore, journal: Journal, refiner: Refiner | None) -> None:
    """Leave word in the store, where it can carry any, of whose vectors it holds."""
    if not isinstance(store, Marked):
        return
    current = journal.manifest.current
    if refiner is None and current is not None:
        refiner = Refiner.load(journal.refiners / current.refiner)
    if refiner is None:
        store.mark(None)
        return
    store.mark(
        {
            "state": journal.manifest.state_id,
            "refiner": refiner.id,
            "side": refiner.side.value,
            "revision": len(journal.manifest.history) + 1,
        }
    )


def fingerprint(store: VectorStore) -> str:
    """Identify what a store holds now, by one scan: ids and vectors in whatever order."""
    ids, digests = [], []
    for batch in store.scan(SCAN_ROWS):
        ids.append(batch.ids)
        digests.append(row_digests(batch.vectors))
    if not ids:
        return fingerprint_of(np.empty(0, np.int64), np.empty(0, np.uint64))
    return fingerprint_of(np.concatenate(ids), np.concatenate(digests))


class _Read(NamedTuple):
    """All rows as they are after writing."""

    ids: Any
    digests: Digests
    ours: Mask
    theirs: int
    gone: int


class _Sending:
    """The stream of refined rows into a store, and the reading of them after."""

    def __init__(
        self, store: RowStore, found: Snapshot, refine: Refine, progress: Progress
    ) -> None:
        self._store, self._found, self._refine = store, found, refine
        self._progress = progress
        self._lookup = Lookup(found.rows.ids)
        self._sent = np.zeros(len(found.rows), np.bool_)
        self._rounding = store.info().rounding
        self.moved = 0

    def send(self) -> None:
        """Write every row that does not hold its refined vector yet."""
        found, total = self._found, len(self._found.rows)
        for start, block in found.rows.blocks():
            part = slice(start, start + len(block))
            refined = self._refine(start, block)
            self.moved += int((refined.view(np.uint32) != block.view(np.uint32)).any(axis=1).sum())
            due = row_digests(refined) != found.digests[part]
            if due.any():
                batch = VectorBatch(ids=found.rows.ids[part][due], vectors=refined[due])
                first = not self._sent.any()
                self._sent[np.flatnonzero(due) + start] = self._store.update(batch, self._unchanged)
                if first and self._sent.any():
                    self._check_first(part, batch)
            self._progress("write", part.stop, total)

    def verify(self) -> _Read:
        """Read every row back.

        Raises:
            VerificationError: Rows hold neither what was written nor what an application could
                have written.
        """
        rows = self._found.rows
        seen = np.zeros(len(rows), np.bool_)
        ids, digests, mine = [], [], []
        lost = foreign = theirs = done = 0
        for batch in self._store.scan(SCAN_ROWS):
            places = self._lookup.find(batch.ids)
            known = np.flatnonzero(places >= 0)
            at = places[known]
            ours = np.zeros(len(batch), np.bool_)
            ours[known] = near(
                batch.vectors[known], refined_at(rows, self._refine, at), self._rounding
            )
            ids.append(batch.ids)
            digests.append(row_digests(batch.vectors))
            mine.append(ours)
            seen[at] = True
            sent, missed = self._sent[at], ~ours[known]
            same = digests[-1][known] == self._found.digests[at]
            lost += int((sent & missed & same).sum())
            foreign += int((sent & missed & ~same).sum())
            theirs += int(missed.sum())
            done += len(batch)
            self._progress("verify", done, len(rows))
        self._check(lost, foreign)
        return _Read(
            ids=np.concatenate(ids) if ids else rows.ids[:0],
            digests=np.concatenate(digests) if digests else np.empty(0, np.uint64),
            ours=np.concatenate(mine) if mine else np.empty(0, np.bool_),
            theirs=theirs,
            gone=int((~seen).sum()),
        )

    def outcome(self, read: _Read) -> Written:
        """Say what became of the rows."""
        rows = max(0, self.moved - read.theirs - read.gone)
        return Written(
            rows=rows,
            skipped=len(self._found.rows) - rows,
            mode=IN_PLACE,
            theirs=read.theirs,
            gone=read.gone,
        )

    def _unchanged(self, now: VectorBatch) -> Mask:
        """Tell which rows are still as they were read."""
        known = self._found.digests[self._lookup.find(now.ids)]
        return np.asarray(row_digests(now.vectors) == known)

    def _check_first(self, part: slice, batch: VectorBatch) -> None:
        """Look at the first rows written before writing any more."""
        sent = batch.ids[self._sent[part][self._lookup.find(batch.ids) - part.start]]
        now = self._store.peek(sent)
        order = Lookup(batch.ids).find(now.ids)
        wrong = ~near(now.vectors, batch.vectors[order], self._rounding)
        self._check(0, int(wrong.sum()))

    def _check(self, lost: int, foreign: int) -> None:
        # Rows that read back as something else are the application's, unless they are too many.
        sent = int(self._sent.sum())
        if lost or (sent >= FEWEST and foreign > sent / 2):
            raise VerificationError(
                f"{self._store.info().uri}: of {sent:,} rows that were written, {lost:,} read back "
                f"as they were before and {foreign:,} as something else; the index was restored"
            )


def _before(journal: Journal, write: Write) -> Rows:
    """Return the rows as they were before a write."""
    if write.kept is not None:
        return Rows(journal.path(write.kept))
    return journal.open_originals(write)


def _put_back(store: RowStore, journal: Journal, rows: Rows, progress: Progress) -> tuple[int, int]:
    """Write these vectors over every row of ours; return how many were ours, and how many not."""
    ours = LiveRows(journal, store)
    lookup = Lookup(rows.ids)
    rounding = store.info().rounding
    total = store.info().count
    done = restored = 0

    def due() -> Iterator[tuple[VectorBatch, Digests]]:
        nonlocal done
        for batch in store.scan(SCAN_ROWS):
            _, mine = ours.originals(batch)
            places = lookup.find(batch.ids[mine])
            vectors = rows.take(places[places >= 0])
            chosen = np.flatnonzero(mine)[places >= 0]
            wrong = ~near(batch.vectors[chosen], vectors, rounding)
            done += len(batch)
            progress("restore", done, total)
            yield (
                VectorBatch(ids=batch.ids[chosen[wrong]], vectors=vectors[wrong]),
                row_digests(batch.vectors[chosen[wrong]]),
            )

    for batch, digests in due():
        where = Lookup(batch.ids)

        def allowed(now: VectorBatch, where: Lookup = where, digests: Digests = digests) -> Mask:
            return np.asarray(row_digests(now.vectors) == digests[where.find(now.ids)])

        if len(batch):
            restored += int(store.update(batch, allowed).sum())
    store.settle(progress)
    total = done
    done = 0
    left = sum(len(batch) for batch, _ in due())
    if left:
        raise StoreError(
            f"{store.info().uri}: {left:,} rows still hold refined vectors; run the same command "
            "again"
        )
    return restored, total - restored
