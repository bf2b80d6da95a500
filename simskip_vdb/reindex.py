"""Read originals out, write refined vectors in, verify, recover, roll back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simskip_vdb import row_by_row, whole_file
from simskip_vdb.crew import Crew
from simskip_vdb.datatypes import Progress, id_names, silent
from simskip_vdb.errors import ConfigError, DataError, StoreError
from simskip_vdb.journal import IN_PLACE, NEW_COLLECTION, NEW_VECTOR, Journal
from simskip_vdb.outgoing import Refine, RolledBack, Written, nothing_to_undo
from simskip_vdb.reading import read_rows
from simskip_vdb.refiner import Refiner
from simskip_vdb.register import our_rows
from simskip_vdb.sending import Refinement, Snapshot
from simskip_vdb.store import Check, RowStore, VectorStore, abilities

__all__ = [
    "RolledBack",
    "Snapshot",
    "Written",
    "abandon",
    "check_mode",
    "recover",
    "rollback",
    "snapshot",
    "write",
    "write_copy",
]


def recover(store: VectorStore, journal: Journal) -> None:
    """Find out what became of a write that was announced.

    A file holds all of it or nothing. Where rows are written one by one, a refinement stays
    announced: it is finished by `write`, or undone by `rollback`. Files that it left behind are
    removed.

    Args:
        store: The index.
        journal: Its state, locked.
    """
    can = abilities(store)
    if can.leftovers is not None:
        can.leftovers.sweep()
    if can.file is not None:
        whole_file.recover(can.file, journal)
    else:
        row_by_row.recover(journal)


def snapshot(
    store: VectorStore,
    journal: Journal,
    progress: Progress = silent,
    *,
    past: Journal | None = None,
    fields: Sequence[str] = (),
    crew: Crew | None = None,
    keep: bool = True,
) -> Snapshot:
    """Save every row's original, in scan order.

    A row that we wrote and nobody changed since has its original in the state already; any other
    row is the application's, and its present vector is its original.

    Args:
        store: The index.
        journal: Receives the originals; locked.
        progress: Called with rows done and rows in all.
        past: The index's state, where `journal` is another one.
        fields: Payload columns to bring along.
        crew: Reads the partitions; None to read all here.
        keep: Whether originals are saved; else they are read again whenever they are needed.

    Raises:
        ConfigError: The store has no such columns.
        DataError: Two rows have the same id, or the given originals are of other rows.
        UnsupportedIndexError: The index holds lossy codes, and nobody gave the exact vectors.
        JournalError: The state is damaged, or does not tell whose original is whose.
    """
    if crew is None:
        found = read_rows(
            store, journal, our_rows(past or journal, store), fields, progress, keep=keep
        )
    else:
        found = crew.read(fields, progress)
    ordered = np.sort(found.rows.ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DataError(
            f"{len(np.unique(twice))} ids stand for several rows each (such as "
            f"{id_names(twice[:1])[0]}); a row could not be restored by its id. Give every row an "
            "id of its own and rebuild the index"
        )
    return found


def write(
    store: VectorStore,
    found: Snapshot,
    refine: Refine,
    *,
    journal: Journal,
    refiner: Refiner,
    accept: Check,
    summary: Mapping[str, Any],
    mode: str = IN_PLACE,
    progress: Progress = silent,
    send: row_by_row.Send | None = None,
) -> Written:
    """Write refined vectors: announced, read back, measured, committed and settled.

    Args:
        store: The index.
        found: Originals as `snapshot` returned them.
        refine: Refines a block of originals.
        journal: The state, locked.
        refiner: What is written, for the record.
        accept: Sees the candidate file before the swap, or the index after writing its rows, and
            raises to refuse it; then all is as it was.
        summary: What `status` shows of this write.
        mode: Where rows are written: ``in-place``, ``new-vector`` or ``new-collection``.
        progress: Called with rows done and rows in all.
        send: Sends rows that are written one by one; None to do it here.

    Raises:
        ConfigError: The store does not know this mode.
        VerificationError: The candidate does not hold what was written; the index is as it was.
        NothingWrittenError: No row would hold another vector; the index is as it was.
        StoreChangedError: The index changed since it was read; it was left as it is.
        TransientStoreError: The store kept failing; the same command resumes.
        StoreError: Writing failed; the index is as it was.
    """
    check_mode(store, mode)
    new = Refinement(found, refine, refiner, summary, journal, progress)
    file = abilities(store).file
    with journal.holding(store):
        preparing = (
            row_by_row.prepared(_by_rows(store), new, mode=mode, send=send)
            if file is None
            else whole_file.prepared(file, new)
        )
        with preparing as candidate:
            accept(candidate.store)
            done = candidate.commit()
        journal.settle(happened=True, done=done)
    return candidate.outcome


def check_mode(store: VectorStore, mode: str) -> None:
    """Make sure that a store can be written in a mode.

    Raises:
        ConfigError: It cannot.
    """
    can = abilities(store)
    able = {
        IN_PLACE: can.file is not None or can.rows is not None,
        NEW_VECTOR: can.vectors is not None,
        NEW_COLLECTION: can.copies is not None,
    }
    if not able[mode]:
        ways = " or ".join(f"--mode {name}" for name, can_be in able.items() if can_be)
        raise ConfigError(f"{store.info().uri} cannot be written by --mode {mode}; give {ways}")
    if mode == NEW_COLLECTION and can.copies is not None:
        can.copies.check_alias()


def write_copy(
    store: VectorStore,
    found: Snapshot,
    refine: Refine,
    *,
    output: Path,
    accept: Check,
    progress: Progress = silent,
) -> Written:
    """Write a refined copy of the index to `output` and leave the index alone.

    Raises:
        ConfigError: The index is no file.
        StoreError: `output` exists, or writing failed.
        VerificationError: The copy does not hold what was written; it is removed.
    """
    file = abilities(store).file
    if file is None:
        raise ConfigError(f"{store.info().uri} is no file; --output belongs to files")
    return whole_file.write_copy(
        file, found.rows, refine, output=output, accept=accept, progress=progress
    )


def rollback(store: VectorStore, journal: Journal, progress: Progress = silent) -> RolledBack:
    """Restore the originals.

    Args:
        store: The index.
        journal: Its state, locked.
        progress: Called with rows done and rows in all.

    Raises:
        ConfigError: There is nothing to roll back.
        JournalError: The state is damaged, or it is ambiguous which original belongs where.
        StoreError: Rows could not be restored.
        UnsupportedIndexError: Rows were added to lossy codes since, and nobody gave their vectors.
    """
    manifest = journal.manifest
    if manifest.copy_of is not None:
        raise ConfigError(
            f"{store.info().uri} is a refined copy of {manifest.copy_of}, which was never "
            "changed; delete the copy to undo it"
        )
    if manifest.current is None and manifest.pending is None and not journal.past:
        raise nothing_to_undo(store)
    file = abilities(store).file
    if file is not None:
        return whole_file.rollback(file, journal, progress)
    with journal.holding(store):
        return row_by_row.rollback(_by_rows(store), journal, progress)


def abandon(
    store: VectorStore, found: Snapshot, journal: Journal, progress: Progress = silent
) -> Snapshot:
    """Undo a write that was interrupted and will not be finished; return the index as it is then.

    Raises:
        StoreError: Rows could not be restored.
        TransientStoreError: The store kept failing; the same command resumes.
    """
    with journal.holding(store):
        return row_by_row.abandon(_by_rows(store), found, journal, progress)


def _by_rows(store: VectorStore) -> RowStore:
    rows = abilities(store).rows
    if rows is None:
        raise StoreError(f"{store.info().uri} can only be read")
    return rows
