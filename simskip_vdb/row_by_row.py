"""Write an index row by row, where its rows are, while an application may write to it, too.

There is no moment at which everything changes at once, so a write is announced first. A kill
leaves some rows refined and some not; which is which shows in the rows themselves, since the
originals and the refiner are in the state. The same command goes on, `rollback` goes back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from simskip_vdb.datatypes import (
    ID_TEXT,
    Ids,
    Mask,
    Progress,
    Side,
    VectorBatch,
    silent,
)
from simskip_vdb.errors import StoppedError, TransientStoreError
from simskip_vdb.journal import IN_PLACE, NEW_COLLECTION, Journal, Write
from simskip_vdb.outgoing import RolledBack, nothing_to_undo, refuse_nothing
from simskip_vdb.provenance import SCAN_ROWS, AsRead, Lookup, near
from simskip_vdb.register import Register, WrittenRows, write_of
from simskip_vdb.rows import Rows, fingerprint_of, row_digests
from simskip_vdb.sending import Prepared, Refinement, Sending, Sent, Snapshot
from simskip_vdb.store import RowStore, VectorStore
from simskip_vdb.targets import (
    InPlace,
    holding,
    look_over,
    make_target,
    mark,
)

log = logging.getLogger(__name__)

Send = Callable[[Snapshot, Mask, Progress], Sent]
"""Writes the rows of a snapshot but for those that are right already, shape (n,), and verifies."""


@contextmanager
def prepared(
    store: RowStore, new: Refinement, *, mode: str, send: Send | None = None
) -> Iterator[Prepared]:
    """Write refined vectors to rows: announced before the first, undone where they are refused.

    A row that the application changed since it was read stays as it is.

    Args:
        store: The index.
        new: What is written.
        mode: Where to: ``in-place``, ``new-vector`` or ``new-collection``.
        send: Sends, verifies and records the rows; None to do it here.

    Raises:
        ConfigError: The store does not know this mode.
        VerificationError: The store does not hold what was written; it was restored.
        NothingWrittenError: No row holds what was written; the store is as it was.
        TransientStoreError: The store kept failing; the same command resumes.
        StoppedError: From `progress`; the same command resumes.
    """
    found, journal, progress = new.found, new.journal, new.progress
    target = make_target(store, journal, mode, new.refiner.id)
    pending = journal.manifest.pending
    _keep_unseen(store, journal, found.rows.ids)
    read = AsRead(found.rows, found.digests, journal, store)
    if pending is not None:
        kept, before = pending.kept, pending.before
        if kept is not None and mode == IN_PLACE:
            kept = journal.save_before(_before(store, journal, pending, Rows(journal.path(kept))))
    else:
        before = fingerprint_of(found.rows.ids, found.digests)
        again = journal.manifest.current is not None and mode != NEW_COLLECTION
        kept = journal.save_before(target.open(progress).scan(SCAN_ROWS)) if again else None
    write = Write(
        refiner=new.refiner.id,
        before=before,
        fingerprint="",
        originals=journal.scanned,
        written=None,
        kept=kept,
        time=time.time(),
        mode=mode,
        target=target.name,
        origin=target.origin,
        summary=new.summary,
        partitions={} if pending is None else pending.partitions,
    )
    right = settled(journal, found, new.refiner.id, exact=store.info().exact)
    journal.announce(write)
    try:
        receiving = target.open(progress)
        mark(receiving, _note(journal, new.refiner.id, new.refiner.side.value))
        sending = Sending(target, receiving, found, read, new.refine, progress, right)
        if send is None:
            sent = sending.run(journal)
        else:
            sent = send(found, right, progress)
            receiving.settle(progress)
        refuse_nothing(store.info().uri, sent.outcome)

        def commit() -> Write:
            target.finish(read, sending.refined, progress)
            return replace(write, written=sent.written, fingerprint=sent.fingerprint, partitions={})

        yield Prepared(receiving, sent.outcome, commit)
    except (TransientStoreError, StoppedError):
        raise
    except Exception:
        _undo(target, journal, write, progress)
        raise


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
    if write is None:  # rows came back that had been rolled back
        if journal.original_ref is None:
            raise nothing_to_undo(store)
        write = write_of("", journal.original_ref)
    target = make_target(store, journal, write.mode, write.refiner)
    undo = replace(write, refiner="", summary={}, time=time.time())
    if journal.manifest.pending is None:
        journal.announce(undo)
    originals = journal.open_originals(write)
    done = target.rollback(write, progress)
    if not done.rows and not (write.refiner or journal.manifest.current):
        journal.settle(happened=False)
        raise nothing_to_undo(store)
    _keep_unseen(done.store, journal)
    after = look_over(done.store, originals, done.ours)
    mark(done.store, None)
    journal.settle(happened=True, done=undo)
    return RolledBack(
        exact=after.exact, restored=done.rows, kept=done.left, fingerprint=after.fingerprint
    )


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
    lookup, ours, rounding = Lookup(found.rows.ids), Register(journal, store), store.info().rounding
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


def settled(journal: Journal, found: Snapshot, refiner: str, *, exact: bool) -> Mask:
    """Tell which rows still are as the last write left them, if it was this refiner's, (n,)."""
    current, pending = journal.manifest.current, journal.manifest.pending
    if current is None or current.refiner != refiner or current.written is None:
        return np.zeros(len(found.rows), np.bool_)
    past = {entry["refiner"] for entry in journal.manifest.history}
    if not exact and pending is None and past <= {refiner, ""}:
        # The same vector may be read back with other last digits; what is ours can only be its.
        return found.ours
    ids, digests = journal.open_written(current.written)
    same = np.zeros(len(found.rows), np.bool_)
    places = Lookup(ids).find(found.rows.ids)
    there = np.flatnonzero(places >= 0)
    same[there] = digests[places[there]] == found.digests[there]
    return same


def _undo(target: InPlace, journal: Journal, write: Write, progress: Progress) -> None:
    target.undo(write, progress)
    current = journal.manifest.current
    if current is None:
        mark(target.store, None)
    else:
        side = current.summary.get("side", Side.DOCS.value)
        mark(holding(target.store, current), _note(journal, current.refiner, side))
    journal.settle(happened=False)


def _before(store: RowStore, journal: Journal, write: Write, kept: Rows) -> Iterator[VectorBatch]:
    """Yield the rows as they are but for what an interrupted write did to them."""
    ours, lookup = WrittenRows(journal, write, store), Lookup(kept.ids)
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
    if write is None or write.beside or not store.info().partial:
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


def _note(journal: Journal, refiner: str, side: str) -> dict[str, object]:
    return {
        "state": journal.manifest.state_id,
        "refiner": refiner,
        "side": side,
        "revision": len(journal.manifest.history) + 1,
    }
