"""Write an index row by row, where its rows are, while an application may write to it, too.

There is no moment at which everything changes at once, so a write is announced first. A kill
leaves some rows refined and some not; which is which shows in the rows themselves, since the
originals and the refiner are in the state. The same command goes on, `rollback` goes back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from simskip_vdb.datatypes import (
    ID_TEXT,
    Ids,
    Mask,
    Positions,
    Progress,
    VectorBatch,
    Vectors,
    silent,
)
from simskip_vdb.errors import TransientStoreError, VerificationError
from simskip_vdb.journal import IN_PLACE, NEW_COLLECTION, NEW_VECTOR, Journal, Write
from simskip_vdb.outgoing import Refine, RolledBack, Written, refined_at
from simskip_vdb.provenance import SCAN_ROWS, AsRead, LiveRows, Lookup, WrittenRows, near
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import Digests, Rows, fingerprint_of, row_digests
from simskip_vdb.store import Check, VectorStore
from simskip_vdb.targets import (
    InPlace,
    RowStore,
    fingerprint,
    holding,
    is_restored,
    make_target,
    mark,
)

log = logging.getLogger(__name__)

FEWEST = 100  # rows, below which a share of them says little
_TRIES = 3


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
    mode: str = IN_PLACE,
    progress: Progress = silent,
) -> Written:
    """Write refined vectors: announced, verified, and undoable.

    A row that the application changed since it was read stays as it is.

    Args:
        store: The index.
        found: What was read of it.
        refine: Refines a block of originals.
        journal: The state, locked.
        refiner: What is written, for the record.
        accept: Sees the rows after writing, and raises to refuse them; then all is undone.
        summary: What `status` shows of this write.
        mode: Where to: ``in-place``, ``new-vector`` or ``new-collection``.
        progress: Called with rows done and rows in all.

    Raises:
        ConfigError: The store does not know this mode.
        VerificationError: The store does not hold what was written; it was restored.
        TransientStoreError: The store kept failing; the same command resumes.
    """
    target = make_target(store, journal, mode, refiner.id)
    pending = journal.manifest.pending
    _keep_unseen(store, journal, found.rows.ids)
    read_then = AsRead(found.rows, found.digests, journal, store)
    if pending is not None:
        kept, before = pending.kept, pending.before
        if kept is not None and mode == IN_PLACE:
            kept = journal.save_before(_before(store, journal, pending, Rows(journal.path(kept))))
    else:
        before = fingerprint_of(found.rows.ids, found.digests)
        again = journal.manifest.current is not None and mode != NEW_COLLECTION
        kept = journal.save_before(target.open(progress).scan(SCAN_ROWS)) if again else None
    write = Write(
        refiner=refiner.id,
        before=before,
        fingerprint="",
        originals=journal.scanned,
        written=None,
        kept=kept,
        time=time.time(),
        mode=mode,
        target=target.name,
        origin=target.origin,
        summary=summary,
    )
    journal.announce(write)
    try:
        receiving = target.open(progress)
        mark(receiving, _note(journal, refiner))
        sending = _Sending(target, receiving, found, read_then, refine, progress)
        sending.send()
        receiving.settle(progress)
        read = sending.verify()
        accept(receiving)
        target.finish(read_then, sending.refined, progress)
    except TransientStoreError:
        raise
    except Exception:
        _undo(target, journal, write, progress)
        raise
    written = journal.save_written(read.ids[read.ours], read.digests[read.ours])
    done = replace(write, written=written, fingerprint=fingerprint_of(read.ids, read.digests))
    journal.settle(happened=True, done=done)
    return sending.outcome(read)


def rollback(store: RowStore, journal: Journal, progress: Progress = silent) -> RolledBack:
    """Bring back what was there before the first refinement.

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
    target = make_target(store, journal, write.mode, write.refiner)
    undo = replace(write, refiner="", summary={}, time=time.time())
    if journal.manifest.pending is None:
        journal.announce(undo)
    originals = journal.open_originals(write)
    done = target.rollback(write, progress)
    _keep_unseen(done.store, journal)
    after = fingerprint(done.store)
    exact = is_restored(done.store, originals)
    mark(done.store, None)
    journal.settle(happened=True, done=undo)
    return RolledBack(exact=exact, restored=done.rows, kept=done.left, fingerprint=after)


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
    target = make_target(store, journal, pending.mode, pending.refiner)
    _undo(target, journal, pending, progress)
    digests = found.digests.copy()
    lookup, ours, rounding = Lookup(found.rows.ids), LiveRows(journal, store), store.info().rounding
    for batch in store.scan(SCAN_ROWS):
        places = lookup.find(batch.ids)
        known = np.flatnonzero(places >= 0)
        originals = ours.originals(batch)[0][known]
        undone = known[near(originals, found.rows.take(places[known]), rounding)]
        digests[places[undone]] = row_digests(batch.vectors[undone])
    return found._replace(digests=digests)


def recover(journal: Journal) -> None:
    """Forget a rollback that was interrupted: the rows themselves tell how far it came."""
    pending = journal.manifest.pending
    if pending is not None and not pending.refiner:
        journal.settle(happened=False)


def _undo(target: InPlace, journal: Journal, write: Write, progress: Progress) -> None:
    target.undo(write, progress)
    current = journal.manifest.current
    if current is None:
        mark(target.store, None)
    else:
        refiner = Refiner.load(journal.refiners / current.refiner)
        mark(holding(target.store, current), _note(journal, refiner))
    journal.settle(happened=False)


def _before(store: RowStore, journal: Journal, write: Write, kept: Rows) -> Iterator[VectorBatch]:
    """Yield the rows as they are but for what an interrupted write did to them."""
    ours, lookup = WrittenRows(journal, write, store.info().rounding), Lookup(kept.ids)
    for batch in store.scan(SCAN_ROWS):
        vectors, mine = ours.originals(batch)
        vectors[~mine] = batch.vectors[~mine]
        places = lookup.find(batch.ids)
        held = mine & (places >= 0)
        vectors[held] = kept.take(places[held])
        yield VectorBatch(ids=batch.ids, vectors=vectors)


def _keep_unseen(store: VectorStore, journal: Journal, seen: Ids | None = None) -> None:
    """Keep originals of rows of ours that a filter hides by now: they may still be refined."""
    write = journal.manifest.current
    if write is None or write.mode == NEW_VECTOR or not store.info().partial:
        return
    if seen is None:
        parts = [batch.ids for batch in store.scan(SCAN_ROWS)]
        seen = np.concatenate(parts) if parts else np.empty(0, ID_TEXT)
    originals = journal.open_originals(write)
    hidden = np.flatnonzero(Lookup(seen).find(originals.ids) < 0)
    if len(hidden):
        ref = journal.save_unseen(originals.ids[hidden], originals.take(hidden))
        log.warning(
            "%s: %d rows that were refined do not pass the filter any more, or were removed; their "
            "originals are kept in %s",
            store.info().uri,
            len(hidden),
            journal.folder / ref.name,
        )


def _note(journal: Journal, refiner: Refiner) -> dict[str, object]:
    return {
        "state": journal.manifest.state_id,
        "refiner": refiner.id,
        "side": refiner.side.value,
        "revision": len(journal.manifest.history) + 1,
    }


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
        self,
        target: InPlace,
        store: RowStore,
        found: Snapshot,
        read: AsRead,
        refine: Refine,
        progress: Progress,
    ) -> None:
        self._target, self._store, self._read = target, store, read
        self._found, self._refine, self._progress = found, refine, progress
        self._lookup = read.lookup
        self._due = np.zeros(len(found.rows), np.bool_)
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
            due = np.isfinite(refined).all(axis=1)
            if self._target.mode != NEW_VECTOR:
                due &= row_digests(refined) != found.digests[part]
            self._due[part] = due
            if due.any():
                batch = VectorBatch(ids=found.rows.ids[part][due], vectors=refined[due])
                first = not self._sent.any()
                self._sent[np.flatnonzero(due) + start] = self._store.update(batch, self._unchanged)
                if first and self._sent.any():
                    self._check_first(part, batch)
            self._progress("write", part.stop, total)

    def verify(self) -> _Read:
        """Read every row back, and send again what still is as it was read.

        Where the application changed a row's payload only, a guard field held our write back; and
        it may have written the same vector once more.

        Raises:
            VerificationError: Rows hold neither what was written nor what an application could
                have written.
        """
        read, lost, foreign = self._read_back()
        for _ in range(_TRIES - 1):
            if not len(lost):
                break
            self._send_again(lost)
            self._store.settle(self._progress)
            read, lost, foreign = self._read_back()
        self._check(int(self._sent[lost].sum()), foreign)
        return read

    def _send_again(self, places: Positions) -> None:
        rows = self._found.rows
        for start in range(0, len(places), SCAN_ROWS):
            part = places[start : start + SCAN_ROWS]
            vectors = refined_at(rows, self._refine, part)
            batch = VectorBatch(ids=rows.ids[part], vectors=vectors)
            self._sent[part] = self._store.update(batch, self._unchanged)

    def _read_back(self) -> tuple[_Read, Positions, int]:
        """Return all rows, positions of those still to be written, and how many sent are theirs."""
        rows = self._found.rows
        seen = np.zeros(len(rows), np.bool_)
        ids, digests, mine, lost = [], [], [], [np.empty(0, np.int64)]
        foreign = theirs = done = 0
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
            missed = known[~ours[known]]
            as_read = self._read.same(
                VectorBatch(ids=batch.ids[missed], vectors=batch.vectors[missed])
            )
            lost.append(places[missed[as_read]])
            foreign += int(self._sent[places[missed[~as_read]]].sum())
            theirs += len(missed)
            done += len(batch)
            self._progress("verify", done, len(rows))
        missing = rows.ids[~seen]
        # A row without a new vector is still there, but was changed, or was never finite.
        present = self._target.store.peek(missing)
        lost.append(self._lookup.find(present.ids[self._read.same(present)]))
        places = np.concatenate(lost)
        read = _Read(
            ids=np.concatenate(ids) if ids else rows.ids[:0],
            digests=np.concatenate(digests) if digests else np.empty(0, np.uint64),
            ours=np.concatenate(mine) if mine else np.empty(0, np.bool_),
            theirs=theirs + len(present),
            gone=len(missing) - len(present),
        )
        return read, np.sort(places[self._due[places]]), foreign

    def outcome(self, read: _Read) -> Written:
        """Say what became of the rows."""
        rows = max(0, self.moved - read.theirs - read.gone)
        return Written(
            rows=rows,
            skipped=len(self._found.rows) - rows,
            mode=self._target.mode,
            theirs=read.theirs,
            gone=read.gone,
            target=self._target.name,
        )

    def refined(self, ids: Ids) -> Vectors:
        """Refine the originals of these rows, shape (len(ids), d)."""
        return refined_at(self._found.rows, self._refine, self._lookup.find(ids))

    def _unchanged(self, now: VectorBatch) -> Mask:
        """Tell which rows are still as they were read."""
        return self._target.unchanged(now, self._read)

    def _check_first(self, part: slice, batch: VectorBatch) -> None:
        """Look at the first rows written before writing any more."""
        sent = batch.ids[self._sent[part][self._lookup.find(batch.ids) - part.start]]
        now = self._store.peek(sent)
        order = Lookup(batch.ids).find(now.ids)
        wrong = ~near(now.vectors, batch.vectors[order], self._rounding)
        # A store that does not wait for its index may show a row as it was for a while.
        wrong &= row_digests(now.vectors) != self._found.digests[self._lookup.find(now.ids)]
        self._check(0, int(wrong.sum()))

    def _check(self, lost: int, foreign: int) -> None:
        # Rows that read back as something else are the application's, unless they are too many.
        sent = int(self._sent.sum())
        if lost or (sent >= FEWEST and foreign > sent / 2):
            raise VerificationError(
                f"{self._store.info().uri}: of {sent:,} rows that were written, {lost:,} read back "
                f"as they were before and {foreign:,} as something else; the index was restored"
            )
