"""The stream of refined rows into a store whose rows are written one by one, read back after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from simskip_vdb.datatypes import Ids, Mask, Positions, Progress, VectorBatch, Vectors
from simskip_vdb.errors import VerificationError
from simskip_vdb.journal import FileRef, Journal, Write
from simskip_vdb.outgoing import Refine, Written, refined_at, refined_blocks
from simskip_vdb.provenance import SCAN_ROWS, AsRead, Lookup, near
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import Digests, Originals, fingerprint_of, row_digests
from simskip_vdb.store import RowStore, VectorStore
from simskip_vdb.targets import InPlace

FEWEST = 100  # rows, below which a share of them says little
_TRIES = 3


class Snapshot(NamedTuple):
    """What a scan of the index found.

    Attributes:
        rows: Every row's original.
        digests: Digest of every row as it was read, shape (n,).
        ours: Which of them we wrote, and nobody changed since, shape (n,).
        usable: Which originals are finite and not zero, shape (n,).
        columns: Payload columns that were asked for, each of length n.
        sha256: Hash of the file before it was read; empty where the store is no file.
    """

    rows: Originals
    digests: Digests
    ours: Mask
    usable: Mask
    columns: Mapping[str, list[Any]]
    sha256: str = ""


class Refinement(NamedTuple):
    """What is to be written, and where it is recorded.

    Attributes:
        found: What was read of the index.
        refine: Refines a block of originals.
        refiner: Whose vectors they are.
        summary: What `status` shows of the write.
        journal: The state, locked.
        progress: Called with rows done and rows in all.
    """

    found: Snapshot
    refine: Refine
    refiner: Refiner
    summary: Mapping[str, Any]
    journal: Journal
    progress: Progress


class Prepared(NamedTuple):
    """Refined vectors that are there and were read back, and have not taken effect yet.

    Attributes:
        store: Reads them.
        outcome: How many rows are what.
        commit: Lets them take effect; returns the write as it then is.
    """

    store: VectorStore
    outcome: Written
    commit: Callable[[], Write]


class Read(NamedTuple):
    """All rows as they are after writing; `refined` of them hold another vector than read."""

    ids: Any
    digests: Digests
    ours: Mask
    refined: int
    theirs: int
    gone: int


class Sent(NamedTuple):
    """What became of the rows of an index, or of a partition.

    Attributes:
        written: The digests of those that are ours now.
        fingerprint: Of all rows as read back.
        outcome: How many are what.
    """

    written: FileRef
    fingerprint: str
    outcome: Written


class Sending:
    """The stream of refined rows into a store, and the reading of them after."""

    def __init__(
        self,
        target: InPlace,
        store: RowStore,
        found: Snapshot,
        read: AsRead,
        refine: Refine,
        progress: Progress,
        settled: Mask,
    ) -> None:
        """Take where rows go, the store behind it, what was read, and which rows are right."""
        self._target, self._store, self._read = target, store, read
        self._found, self._refine, self._progress = found, refine, progress
        self._lookup = read.lookup
        self._due = np.zeros(len(found.rows), np.bool_)
        self._sent = np.zeros(len(found.rows), np.bool_)
        self._digests: Digests = np.zeros(len(found.rows), np.uint64)
        self._originals: Digests = np.zeros(len(found.rows), np.uint64)
        self._info = store.info()
        self._settled = settled
        self._check_claim: Callable[[], None] = lambda: None
        self._moved = np.zeros(len(found.rows), np.bool_)

    def run(self, journal: Journal) -> Sent:
        """Write all rows, read them back, and save the digests of ours.

        Raises:
            VerificationError: See `verify`.
        """
        self._check_claim = journal.check
        self.send()
        self._store.settle(self._progress)
        read = self.verify()
        ids = read.ids[read.ours]
        originals = self._originals[self._lookup.find(ids)]
        written = journal.save_written(ids, read.digests[read.ours], originals)
        return Sent(written, fingerprint_of(read.ids, read.digests), self.outcome(read))

    def send(self) -> None:
        """Write every row that does not hold its refined vector yet."""
        found, total = self._found, len(self._found.rows)
        with closing(refined_blocks(found.rows, self._refine)) as blocks:
            for start, block, refined in blocks:
                self._send_block(start, block, refined)
                self._progress("write", start + len(block), total)

    def _send_block(self, start: int, block: Vectors, refined: Vectors) -> None:
        found = self._found
        part = slice(start, start + len(block))
        self._moved[part] = (refined.view(np.uint32) != block.view(np.uint32)).any(axis=1)
        due = np.isfinite(refined).all(axis=1)
        self._digests[part] = row_digests(refined)
        self._originals[part] = row_digests(block)
        if not self._target.beside:
            due &= ~self._settled[part] & (self._digests[part] != found.digests[part])
        elif self._target.filled:
            due &= ~self._beside(found.rows.ids[part], refined)
        self._due[part] = due
        if due.any():
            batch = VectorBatch(ids=found.rows.ids[part][due], vectors=refined[due])
            first = not self._sent.any()
            self._check_claim()
            self._sent[np.flatnonzero(due) + start] = self._store.update(batch, self._unchanged)
            if first and self._sent.any():
                self._check_first(part, batch)

    def _beside(self, ids: Ids, refined: Vectors) -> Mask:
        """Tell which rows have these vectors beside their own already."""
        there = self._store.peek(ids)
        places = Lookup(ids).find(there.ids)
        same = np.zeros(len(ids), np.bool_)
        same[places] = near(there.vectors, refined[places], self._info.tolerance)
        return same

    def verify(self) -> Read:
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

    def _read_back(self) -> tuple[Read, Positions, int]:
        """Return all rows, positions of those still to be written, and how many sent are theirs."""
        rows = self._found.rows
        seen = np.zeros(len(rows), np.bool_)
        ids, digests, mine, lost = [], [], [], [np.empty(0, np.int64)]
        foreign = refined = theirs = done = 0
        for batch in self._store.scan(SCAN_ROWS):
            places = self._lookup.find(batch.ids)
            known = np.flatnonzero(places >= 0)
            at = places[known]
            found = row_digests(batch.vectors)
            ours = np.zeros(len(batch), np.bool_)
            ours[known] = found[known] == self._digests[at]
            other = known[~ours[known]]
            ours[other] = near(
                batch.vectors[other],
                refined_at(rows, self._refine, places[other]),
                self._info.rounding,
            )
            left = known[ours[known] & ~self._moved[at]]
            found[left] = self._digests[places[left]]  # whatever last digits it was read with
            ids.append(batch.ids)
            digests.append(found)
            mine.append(ours)
            seen[at] = True
            refined += int(self._moved[at[ours[known]]].sum())
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
        read = Read(
            ids=np.concatenate(ids) if ids else rows.ids[:0],
            digests=np.concatenate(digests) if digests else np.empty(0, np.uint64),
            ours=np.concatenate(mine) if mine else np.empty(0, np.bool_),
            refined=refined,
            theirs=theirs + len(present),
            gone=len(missing) - len(present),
        )
        return read, np.sort(places[self._due[places]]), foreign

    def outcome(self, read: Read) -> Written:
        """Say what became of the rows."""
        return Written(
            rows=read.refined,
            skipped=len(self._found.rows) - read.refined,
            mode=self._target.mode,
            theirs=read.theirs,
            gone=read.gone,
            target=self._target.name,
            sent=int(self._sent.sum()),
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
        wrong = ~near(now.vectors, batch.vectors[order], self._info.rounding)
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
