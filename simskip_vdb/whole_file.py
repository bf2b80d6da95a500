"""Write an index that is one file: a candidate is built beside it, checked, and swapped in."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from simskip_vdb.datatypes import Progress, VectorBatch, silent
from simskip_vdb.errors import JournalError, StoreChangedError
from simskip_vdb.journal import IN_PLACE, FileRef, Journal, Write
from simskip_vdb.outgoing import (
    Outgoing,
    Refine,
    RolledBack,
    Written,
    nothing_to_undo,
    refuse_nothing,
)
from simskip_vdb.provenance import SCAN_ROWS, TrueRows
from simskip_vdb.register import Register
from simskip_vdb.rows import Digests, Originals, row_digests
from simskip_vdb.sending import Prepared, Refinement
from simskip_vdb.store import Check, FileStore, VectorStore

log = logging.getLogger(__name__)


def recover(store: FileStore, journal: Journal) -> None:
    """Decide, by looking at the index, whether a write that was announced happened.

    Args:
        store: The index.
        journal: Its state, locked.
    """
    pending = journal.manifest.pending
    if pending is None:
        return
    now = store.sha256()
    if now in (pending.fingerprint, pending.before):
        happened = now == pending.fingerprint
    else:  # the application wrote since: see whose rows are there
        after = _digests_of(journal, pending)
        before = _digests_of(journal, journal.manifest.current or replace(pending, refiner=""))
        happened = _count_rows(store, after) > _count_rows(store, before)
    log.warning(
        "a run was interrupted while writing %s: %s",
        store.info().uri,
        "the new file was in place" if happened else "the file had not been touched",
    )
    journal.settle(happened=happened)


@contextmanager
def prepared(store: FileStore, new: Refinement) -> Iterator[Prepared]:
    """Write the file with refined vectors beside the one in place, which it takes the place of.

    Raises:
        VerificationError: It does not hold what was written.
        NothingWrittenError: No row would get another vector.
        StoreChangedError: The file in place changed since it was read.
        StoreError: Writing failed. In all of these nothing was swapped.
    """
    found, journal, current = new.found, new.journal, new.journal.manifest.current
    before, kept, keep = found.sha256, None, None
    if current is None and not found.ours.any():
        kept = FileRef(name=f"kept-{before[:12]}", sha256=before)
        keep = journal.folder / kept.name
    elif current is not None and before == current.fingerprint:
        kept = current.kept
    write = Write(
        refiner=new.refiner.id,
        before=before,
        fingerprint="",
        originals=journal.scanned,
        written=None,
        kept=kept,
        time=time.time(),
        summary=new.summary,
    )

    def announced(fingerprint: str, digests: Digests, originals: Digests) -> Write:
        written = journal.save_written(found.rows.ids, digests, originals)
        done = replace(write, fingerprint=fingerprint, written=written)
        journal.announce(done)
        return done

    if current is not None and current.refiner == new.refiner.id and _all_there(new):
        # Rows came that stay raw, or rows went: the file is as it should be, and only noted.
        _check_unchanged(store, store.sha256(), before)
        originals = np.concatenate([row_digests(block) for _, block in found.rows.blocks()])
        nothing = Written(rows=0, skipped=len(found.rows), mode=IN_PLACE)
        yield Prepared(store, nothing, partial(announced, before, found.digests, originals))
        return
    outgoing = Outgoing(found.rows, new.refine, new.progress)
    try:
        with ThreadPoolExecutor(1) as pool:
            now = pool.submit(store.sha256)
            with store.prepared(outgoing.batches(), keep=keep, expected=before) as candidate:
                _check_unchanged(store, now.result(), before)
                fingerprint = pool.submit(candidate.store.sha256)
                digests = outgoing.verify(candidate.store)
                outcome = outgoing.outcome(IN_PLACE)
                refuse_nothing(store.info().uri, outcome)

                def commit() -> Write:
                    done = announced(fingerprint.result(), digests, outgoing.originals)
                    candidate.commit()
                    return done

                yield Prepared(candidate.store, outcome, commit)
    except Exception:
        if store.sha256() == before:
            journal.settle(happened=False)
        raise


def _check_unchanged(store: FileStore, now: str, before: str) -> None:
    """Make sure, by its bytes, that a file is as it was read: clocks are set back, too.

    Raises:
        StoreChangedError: It is not.
    """
    if now != before:
        raise StoreChangedError(
            f"{store.info().uri}: somebody else wrote to it since it was read; it was left as "
            "it is. Run the command again"
        )


def _all_there(new: Refinement) -> bool:
    """Tell whether the file holds every row as it should be."""
    digests = new.found.digests
    return all(
        np.array_equal(row_digests(new.refine(start, block)), digests[start : start + len(block)])
        for start, block in new.found.rows.blocks()
    )


def write_copy(
    store: FileStore,
    rows: Originals,
    refine: Refine,
    *,
    output: Path,
    accept: Check,
    progress: Progress = silent,
) -> Written:
    """Write a refined copy of the index to `output` and leave the index alone.

    Raises:
        StoreError: `output` exists, or writing failed.
        VerificationError: The copy does not hold what was written; it is removed.
    """
    outgoing = Outgoing(rows, refine, progress)
    with store.prepared_copy(outgoing.batches(), output) as candidate:
        outgoing.verify(candidate.store)
        outcome = outgoing.outcome("copy")
        refuse_nothing(store.info().uri, outcome)
        accept(candidate.store)
        candidate.commit()
    return outcome


def rollback(store: FileStore, journal: Journal, progress: Progress = silent) -> RolledBack:
    """Restore the originals.

    Where the file is as we left it, the very file from before comes back. Otherwise rows that we
    wrote get their original vector again, by id, or by vector where ids are positions; rows that
    the application added or changed since stay as they are.

    Args:
        store: The index.
        journal: Its state, locked.
        progress: Called with rows done and rows in all.

    Raises:
        JournalError: The state is damaged, or it is ambiguous which original belongs where.
        UnsupportedIndexError: Rows were added to lossy codes since, and nobody gave their vectors.
    """
    current = journal.manifest.current
    before = None if current is None else current.kept
    now = store.sha256()
    kept = None
    if current is not None and now == current.fingerprint:
        kept = _kept_file(journal, current)
    if kept is not None and before is not None:
        journal.announce(_undoing(journal, now, before.sha256))
        store.put_back(kept, expected=now)
        restored, left = store.info().count, 0
    else:
        restored, left = _restore_rows(store, journal, now, progress)
    journal.settle(happened=True)
    after = store.sha256()
    exact = before is not None and after == before.sha256
    return RolledBack(exact=exact, restored=restored, kept=left, fingerprint=after)


def _kept_file(journal: Journal, current: Write) -> Path | None:
    """Return the index file from before the first write; None where the rows must do."""
    if current.kept is None:
        return None
    try:
        return journal.path(current.kept)
    except JournalError as error:
        log.warning("%s. Restoring row by row from the originals instead", error)
        return None


def _undoing(journal: Journal, before: str, after: str) -> Write:
    current = journal.manifest.current
    return Write(
        refiner="",
        before=before,
        fingerprint=after,
        originals=journal.original_ref,
        written=None if current is None else current.written,
        kept=None if current is None else current.kept,
        time=time.time(),
    )


def _restore_rows(
    store: FileStore, journal: Journal, now: str, progress: Progress
) -> tuple[int, int]:
    true = TrueRows(store, Register(journal, store))
    total = store.info().count
    counts = np.zeros(2, np.int64)  # restored, left

    def batches() -> Iterator[VectorBatch]:
        done = 0
        for batch in store.scan(SCAN_ROWS):
            vectors, mine = true.of(batch)
            counts[:] += (mine.sum(), (~mine).sum())
            yield VectorBatch(ids=batch.ids, vectors=vectors)
            done += len(batch)
            progress("restore", done, total)
        true.check()

    try:
        with store.prepared(batches(), keep=None, expected=now) as candidate:
            if not counts[0]:
                raise nothing_to_undo(store)
            journal.announce(_undoing(journal, now, candidate.store.sha256()))
            candidate.commit()
    except Exception:
        if store.sha256() == now:
            journal.settle(happened=False)
        raise
    return int(counts[0]), int(counts[1])


def _digests_of(journal: Journal, write: Write) -> Digests:
    """Return the digests of all rows after a write; of the originals where that undid one."""
    if write.refiner and write.written is not None:
        return np.sort(journal.open_written(write.written)[1])
    digests = [row_digests(block) for _, block in journal.open_originals(write).blocks()]
    return np.sort(np.concatenate(digests))


def _count_rows(store: VectorStore, digests: Digests) -> int:
    """Count the rows of a store whose digest is among these, which are sorted."""
    count = 0
    for batch in store.scan(SCAN_ROWS):
        read = row_digests(batch.vectors)
        places = np.minimum(np.searchsorted(digests, read), len(digests) - 1)
        count += int((digests[places] == read).sum())
    return count
