"""Rows on their way into an index, and what it takes to recognise them when read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from simskip_vdb.datatypes import Positions, Progress, VectorBatch, Vectors
from simskip_vdb.errors import VerificationError
from simskip_vdb.provenance import SCAN_ROWS, Lookup, Resemblance, near
from simskip_vdb.rows import Digests, Rows, row_digests
from simskip_vdb.store import VectorStore

LOSSY_ERROR = 0.05  # relative L2 error that a lossy code (SQ8 about .008) may have when read back

Refine = Callable[[int, Vectors], Vectors]
"""Refines a block of originals: (position of its first row, vectors (b, d)) → (b, d)."""


class Outgoing:
    """The stream of refined rows, and what it takes to recognise them when read back."""

    def __init__(self, rows: Rows, refine: Refine, progress: Progress) -> None:
        self._rows = rows
        self._refine = refine
        self._progress = progress
        self._sent = np.zeros(len(rows), np.uint64)
        self.moved = 0

    def batches(self) -> Iterator[VectorBatch]:
        """Yield all rows, refined, in scan order."""
        for start, block in self._rows.blocks():
            refined = self._refine(start, block)
            stop = start + len(block)
            self._sent[start:stop] = row_digests(refined)
            changed = refined.view(np.uint32) != block.view(np.uint32)  # bits: NaN equals itself
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

    def _expected(self, places: Positions) -> Vectors:
        # A block is refined as a whole, since `refine` goes by position of contiguous rows.
        out = np.empty((len(places), self._rows.dim), np.float32)
        for start, block in self._rows.blocks():
            here = (places >= start) & (places < start + len(block))
            if here.any():
                out[here] = self._refine(start, block)[places[here] - start]
        return out
