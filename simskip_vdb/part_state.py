"""The state of an index as the worker of one partition sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from simskip_vdb.datatypes import Ids, Mask, StoreInfo, VectorBatch, Vectors
from simskip_vdb.journal import FileRef, Journal, Write
from simskip_vdb.provenance import Lookup, near
from simskip_vdb.register import Ours, Register, our_rows
from simskip_vdb.rows import Digests, Rows, row_digests
from simskip_vdb.store import VectorStore


class PartState(Journal):
    """A state whose lock the driver holds: files of one partition are saved and read.

    The manifest is the driver's to write. What an earlier run saved of the index as a whole is
    read as a whole.
    """

    def __init__(self, folder: Path, info: StoreInfo, number: int, name: str) -> None:
        """Take the state folder, the index, and the partition's number and name."""
        super().__init__(folder, info)
        self._index, self._number, self._name = info, number, name

    @property
    def whole(self) -> Journal:
        """The state of all partitions."""
        return Journal(self.folder, self._index)

    @property
    def last(self) -> Write | None:
        """The write that is announced, or else the last one."""
        return self.manifest.pending or self.manifest.current

    @property
    def separate(self) -> bool:
        """Whether all that was written is known for this partition by itself."""
        writes = (self.manifest.pending, self.manifest.current)
        return all(
            write.originals is not None and write.originals.part(self._name) is not None
            for write in writes
            if write is not None
        )

    def open_originals(self, write: Write) -> Rows:
        """Return the originals of this partition's rows; see `Journal.open_originals`."""
        own = None if write.originals is None else write.originals.part(self._name)
        return super().open_originals(write) if own is None else Rows(self.path(own))

    def open_written(self, ref: FileRef) -> tuple[Ids, Digests]:
        """Return ids and digests of this partition's rows; see `Journal.open_written`."""
        return super().open_written(ref.part(self._name) or ref)

    def save_originals(self, batches: Iterable[VectorBatch]) -> Rows:
        """Write the originals of this partition's rows; see `Journal.save_originals`."""
        ref = self._save_rows(f"originals-{self._number}", batches)
        self.scanned = replace(ref, partition=self._name)
        return Rows(self.folder / ref.name)

    def save_written(self, ids: Ids, digests: Digests, originals: Digests) -> FileRef:
        """Write the digests of this partition's rows; see `Journal.save_written`."""
        ref = self._save_digests(f"written-{self._number}", ids, digests, originals)
        return replace(ref, partition=self._name)

    def ours(self, store: VectorStore) -> Ours | None:
        """Return what tells our rows in a partition; None where nothing of ours is anywhere."""
        if self.last is None or not self.separate:
            return our_rows(self.whole, store)
        return _PartRows(self, store)


class _PartRows:
    """Tells our rows by what was written in this partition.

    Rows that this does not explain, neither ours nor as their originals were, may have come from
    another partition: those are looked up in the whole state, which takes memory for all rows.
    """

    def __init__(self, state: PartState, store: VectorStore) -> None:
        assert state.last is not None
        self._state, self._store = state, store
        self._own = Register(state, store, past=False)
        self._rows = state.open_originals(state.last)
        self._lookup = Lookup(self._rows.ids)
        self._all: Ours | None = None

    def originals(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """See `provenance.Ours`."""
        vectors, ours = self._own.originals(batch)
        strange = np.flatnonzero(~ours & ~self._as_before(batch))
        if len(strange):
            if self._all is None:
                self._all = our_rows(self._state.whole, self._store)
            assert self._all is not None
            rows = VectorBatch(ids=batch.ids[strange], vectors=batch.vectors[strange])
            vectors[strange], ours[strange] = self._all.originals(rows)
        return vectors, ours

    def _as_before(self, batch: VectorBatch) -> Mask:
        places = self._lookup.find(batch.ids)
        same = np.zeros(len(batch), np.bool_)
        known = np.flatnonzero(places >= 0)
        now, then = batch.vectors[known], self._rows.take(places[known])
        same[known] = row_digests(now) == row_digests(then)
        tolerance = self._store.info().tolerance
        if tolerance:
            same[known] |= near(now, then, tolerance)
        return same
