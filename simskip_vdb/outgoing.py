"""Rows on their way into an index, and what it takes to recognise them when read back."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from simskip_vdb.datatypes import Positions, Progress, VectorBatch, Vectors
from simskip_vdb.errors import ConfigError, NothingWrittenError, VerificationError
from simskip_vdb.overlap import ahead
from simskip_vdb.provenance import SCAN_ROWS, Lookup, Resemblance, near
from simskip_vdb.rows import Digests, Originals, row_digests
from simskip_vdb.store import VectorStore

LOSSY_ERROR = 0.05  # relative L2 error that a lossy code (SQ8 about .008) may have when read back

Refine = Callable[[int, Vectors], Vectors]
"""Refines a block of originals: (position of its first row, vectors (b, d)) → (b, d)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a write did.

    Attributes:
        rows: Originals that hold another vector than their original.
        skipped: Rows left as they were.
        mode: ``in-place``, ``new-vector``, ``new-collection``, ``copy``, ``restored`` or ``none``.
        theirs: Rows of the skipped ones that the application changed meanwhile.
        gone: Rows that the application removed meanwhile.
        target: Name of the new vector or collection; empty where there is none.
        sent: Rows of those that this run had to write.
    """

    rows: int
    skipped: int
    mode: str
    theirs: int = 0
    gone: int = 0
    target: str = ""
    sent: int = 0

    @classmethod
    def none(cls) -> Written:
        """Return the outcome of not writing."""
        return cls(rows=0, skipped=0, mode="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """What a rollback did.

    Attributes:
        exact: True where everything is as it was before the first write: the very file, or every
            row with its vector.
        restored: Rows that have their original vector again.
        kept: Rows that the application wrote since, left as they are.
        fingerprint: SHA-256 of the index file now, or `fingerprint_of` its rows.
    """

    exact: bool
    restored: int
    kept: int
    fingerprint: str


def nothing_to_undo(store: VectorStore) -> ConfigError:
    """Return the error that says so."""
    uri = store.info().uri
    return ConfigError(
        f"{uri} holds originals; there is nothing to roll back. What was done to it: "
        f"simskip status {shlex.quote(uri)}"
    )


def refuse_nothing(uri: str, written: Written) -> None:
    """Make sure that a write left its vectors in some row.

    Raises:
        NothingWrittenError: It left none.
    """
    if written.rows:
        return
    why = (
        f"{written.theirs:,} rows were changed and {written.gone:,} removed while it went on; run "
        "the same command again when nobody else writes"
        if written.theirs or written.gone
        else "this refiner moves none of the rows that are there: they came after its fit, or are "
        "zero; fit again"
    )
    raise NothingWrittenError(
        f"{uri}: the refinement reached no row, so nothing is claimed of it, and the index is as "
        f"it was. {why}"
    )


class Outgoing:
    """The stream of refined rows, and what it takes to recognise them when read back."""

    def __init__(self, rows: Originals, refine: Refine, progress: Progress) -> None:
        self._rows = rows
        self._refine = refine
        self._progress = progress
        self._sent = np.zeros(len(rows), np.uint64)
        self.originals: Digests = np.zeros(len(rows), np.uint64)
        self.moved = 0

    def batches(self) -> Iterator[VectorBatch]:
        """Yield all rows, refined, in scan order."""
        with closing(refined_blocks(self._rows, self._refine)) as blocks:
            for start, block, refined in blocks:
                stop = start + len(block)
                self._sent[start:stop] = row_digests(refined)
                self.originals[start:stop] = row_digests(block)
                changed = refined.view(np.uint32) != block.view(np.uint32)  # NaN equals itself
                self.moved += int(changed.any(axis=1).sum())
                yield VectorBatch(ids=self._rows.ids[start:stop], vectors=refined)
                self._progress("write", stop, len(self._rows))

    def verify(self, candidate: VectorStore) -> Digests:
        """Read every row back and return the digests of what is there, in scan order.

        Raises:
            VerificationError: A row is missing, foreign, or not what was sent.
        """
        info = candidate.info()
        lookup = Lookup(self._rows.ids)
        read = np.zeros(len(self._rows), np.uint64)
        seen = np.zeros(len(self._rows), np.bool_)
        codes = Resemblance()
        wrong = done = 0
        for batch in candidate.scan(SCAN_ROWS):
            places = lookup.find(batch.ids)
            if (places < 0).any() or seen[places].any():
                raise VerificationError(
                    f"{info.uri}: the ids read back are not those that were there; "
                    "nothing was swapped"
                )
            seen[places] = True
            read[places] = row_digests(batch.vectors)
            if info.exact:
                wrong += int((read[places] != self._sent[places]).sum())
            elif info.lossy:
                codes.add(batch.vectors, self._expected(places))
            else:
                wrong += int((~near(batch.vectors, self._expected(places), LOSSY_ERROR)).sum())
            done += len(batch)
            self._progress("verify", done, len(self._rows))
        if wrong or not seen.all():
            raise VerificationError(
                f"{info.uri}: {wrong} rows read back differ from what was written and "
                f"{int((~seen).sum())} are missing; nothing was swapped"
            )
        if not codes.plausible:
            raise VerificationError(
                f"{info.uri}: the codes read back do not resemble what was written; "
                "nothing was swapped"
            )
        return read

    def outcome(self, mode: str) -> Written:
        """Tell what was written."""
        return Written(
            rows=self.moved, skipped=len(self._rows) - self.moved, mode=mode, sent=self.moved
        )

    def _expected(self, places: Positions) -> Vectors:
        return refined_at(self._rows, self._refine, places)


def refined_blocks(rows: Originals, refine: Refine) -> Generator[tuple[int, Vectors, Vectors]]:
    """Yield (position of the first row, originals, refined) over all rows, a little ahead."""
    return ahead((start, block, refine(start, block)) for start, block in rows.blocks())


def refined_at(rows: Originals, refine: Refine, places: Positions) -> Vectors:
    """Return the refined vectors of the rows at these positions, shape (len(places), d)."""
    # A block is refined as a whole, since `refine` goes by position of contiguous rows.
    out = np.empty((len(places), rows.dim), np.float32)
    for start, block in rows.blocks(places):
        here = (places >= start) & (places < start + len(block))
        out[here] = refine(start, block)[places[here] - start]
    return out
