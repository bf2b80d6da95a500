"""An index that is several files: what does not depend on the kind of file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simskip_vdb.connectors.notes import write_note
from simskip_vdb.connectors.part_notes import note_file, part_note
from simskip_vdb.connectors.rows import RowOrder, checked_queries, checked_rows
from simskip_vdb.connectors.waiting import Waiting
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Mask,
    Metric,
    Neighbors,
    Positions,
    Progress,
    VectorBatch,
    Vectors,
)
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.store import (
    Allowed,
    FileBacked,
    LeavesFiles,
    Partition,
    RowStore,
    VectorStore,
)


class PartFile(VectorStore, FileBacked, LeavesFiles, Protocol):
    """A store that is one file, and part of an index of several."""

    @property
    def ids(self) -> Ids:
        """Row ids in scan order, shape (n,)."""
        ...

    def reopen(self) -> None:
        """Look at the file anew, which one of our own processes has written since."""
        ...


class Parted:
    """A `VectorStore` of several files, in the order of their names.

    Files cannot be replaced at one instant, so it is `RowWritable`: rows that are updated wait in
    nameless files on disk, `settle` writes each part that has any, and only then does `search`
    see them. A part that somebody else changed since it was opened is left as it is.

    Each file is a partition, which processes of their own may write (see `Partitioned`).
    """

    def __init__(
        self,
        uri: str,
        root: Path,
        stores: Sequence[PartFile],
        shifts: Sequence[int],
        *,
        read_only: bool = False,
    ) -> None:
        """Take the files under `root`, and how much larger a row's id is here than in its file."""
        self._uri, self._root, self._read_only = uri, root, read_only
        self._shifts = list(shifts)
        self._take(stores)

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, part after part; see `VectorStore.scan`.

        Rows that wait to be written are as they will be.
        """
        self._check_fields(fields)
        self._rows.windows(batch_size, cursor)  # refuses what makes no sense
        if partition is not None and not 0 <= partition < len(self._parts):
            raise ConfigError(
                f"{self._uri}: partition {partition} is outside 0..{len(self._parts) - 1}"
            )
        parts = self._parts if partition is None else [self._parts[partition]]
        return self._scan(parts, batch_size, 0 if cursor is None else int(cursor), fields)

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`.

        Rows that wait to be written are as they will be.
        """
        positions = self._rows.positions(ids)
        vectors = np.empty((len(positions), self._dim), np.float32)
        for part, here in self._split(positions):
            vectors[here] = part.take(positions[here] - part.first)
        return vectors

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search every part and keep the best; see `VectorStore.search`."""
        array = checked_queries(self._uri, queries, self._dim, k)
        ids, scores = [], []
        for part, shift in zip(self._parts, self._shifts, strict=True):
            try:
                found = part.store.search(array, k, params)
            except ConfigError as error:
                raise ConfigError(f"{self._uri}: {error}") from error
            moved = found.ids if not shift else np.where(found.ids == -1, -1, found.ids + shift)
            ids.append(moved)
            scores.append(found.scores)
        together = np.concatenate(scores, axis=1)  # (q, parts * k)
        best = np.argsort(-together, axis=1, kind="stable")[:, :k]
        return Neighbors(
            ids=np.take_along_axis(np.concatenate(ids, axis=1), best, axis=1),
            scores=np.take_along_axis(together, best, axis=1),
        )

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        there = np.asarray(ids)[self._rows.known(ids)]
        return VectorBatch(ids=there, vectors=self.fetch(there))

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Take rows that `settle` writes; see `RowWritable.update`."""
        self._writable()
        vectors = checked_rows(self._uri, batch, self._dim)
        chosen = self._rows.known(batch.ids)
        chosen[chosen] = allowed(self.peek(batch.ids[chosen]))
        positions = self._rows.positions(batch.ids[chosen])
        for part, here in self._split(positions):
            part.stage(positions[here] - part.first, vectors[chosen][here])
        return chosen

    def settle(self, progress: Progress) -> None:
        """Write every part that has new rows, each atomically; see `RowWritable.settle`.

        Raises:
            StoreChangedError: Somebody else wrote to a part; it was left as it is, and parts
                before it are written.
            StoreError: A part could not be written; parts before it are.
        """
        self._writable()
        due = [part for part in self._parts if part.waiting is not None]
        try:
            for done, part in enumerate(due):
                progress("parts", done, len(due))
                part.write()
            progress("parts", len(due), len(due))
        finally:
            for part in due:
                part.forget()

    def marker(self) -> Mapping[str, Any] | None:
        """Return the note of who refined the parts; see `Marked.marker`."""
        notes = (self._note(part.store) for part in self._parts)
        return next((note for note in notes if note is not None), None)

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note beside each part; see `Marked.mark`."""
        self._writable()
        for part in self._parts:
            told = None if note is None else {**note, "index": self._uri}
            self._leave_note(part.store, told)

    def sweep(self) -> None:
        """Remove what a killed write left behind; see `LeavesFiles.sweep`."""
        for part in self._parts:
            part.store.sweep()

    def partitions(self) -> tuple[Partition, ...]:
        """Return the files; see `Partitioned.partitions`."""
        return tuple(
            Partition(
                name=os.path.relpath(part.store.path, self._root),
                open=self._opener(part.store.path, shift),
            )
            for part, shift in zip(self._parts, self._shifts, strict=True)
        )

    def reopen(self) -> None:
        """Look at the files anew, which may hold other rows by now; see `Partitioned.reopen`."""
        stores = [part.store for part in self._parts]
        for store in stores:
            store.reopen()
        if any(self._shifts[1:]):
            self._shifts = _starts(stores)
        self._take(stores)

    def _note(self, part: PartFile) -> Mapping[str, Any] | None:
        """Return the note beside a part; None where there is none."""
        return part_note(part.path)

    def _leave_note(self, part: PartFile, note: Mapping[str, Any] | None) -> None:
        """Leave a note beside a part, durably; None takes it away."""
        write_note(note_file(part.path), note)

    def _opener(self, path: Path, shift: int) -> Callable[[], RowStore]:
        """Return what opens one file as a store of the same rows, in any process."""
        raise NotImplementedError

    def _check_fields(self, fields: Sequence[str]) -> None:
        """Refuse payload columns that rows do not have."""
        raise NotImplementedError

    def _take(self, stores: Sequence[PartFile]) -> None:
        starts = _starts(stores)
        self._parts = [_Part(store, first) for store, first in zip(stores, starts, strict=True)]
        ids = [part.store.ids + shift if shift else part.store.ids
               for part, shift in zip(self._parts, self._shifts, strict=True)]  # fmt: skip
        self._rows = RowOrder(np.concatenate(ids), self._uri)

    @property
    def _dim(self) -> int:
        return self._parts[0].store.info().dim

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")

    def _scan(
        self, parts: Sequence[_Part], batch_size: int, start: int, fields: Sequence[str]
    ) -> Iterator[VectorBatch]:
        for part in parts:
            if start < part.stop:
                for first, batch in part.scan(batch_size, max(start - part.first, 0), fields):
                    done = part.first + first + len(batch)
                    yield VectorBatch(
                        ids=self._rows.ids[done - len(batch) : done],
                        vectors=batch.vectors,
                        fields=batch.fields,
                        cursor=done,
                    )

    def _split(self, positions: Positions) -> Iterator[tuple[_Part, Mask]]:
        for part in self._parts:
            here = (positions >= part.first) & (positions < part.stop)
            if here.any():
                yield part, here


class _Part:
    """A file, and those of its rows that wait to be written.

    Attributes:
        store: The file.
        first: Rows of the parts before it.
        stop: Rows up to its end.
        waiting: Rows that `write` writes; None where there are none.
    """

    def __init__(self, store: PartFile, first: int) -> None:
        self.store = store
        self.first, self.stop = first, first + len(store.ids)
        self.waiting: Waiting | None = None
        self._sha256 = ""

    def take(self, positions: Positions) -> Vectors:
        """Return the rows at some positions in this part, shape (len(positions), d)."""
        vectors = self.store.fetch(self.store.ids[positions])
        if self.waiting is not None:
            self.waiting.lay_over(positions, vectors)
        return vectors

    def scan(
        self, batch_size: int, start: int, fields: Sequence[str]
    ) -> Iterator[tuple[int, VectorBatch]]:
        """Yield positions in this part and the rows from there on."""
        for batch in self.store.scan(batch_size, fields=fields, cursor=start):
            if self.waiting is not None:
                self.waiting.lay_over(np.arange(start, start + len(batch)), batch.vectors)
            yield start, batch
            start += len(batch)

    def stage(self, positions: Positions, vectors: Vectors) -> None:
        """Keep rows until they are written."""
        if self.waiting is None:
            self._sha256 = self.store.sha256()
            self.waiting = Waiting(self.store.path, len(self.store.ids), vectors.shape[1])
        self.waiting.add(positions, vectors)

    def write(self) -> None:
        """Write the rows that wait, unless they are in the file already."""
        if any(
            (batch.vectors.view(np.uint32) != self.store.fetch(batch.ids).view(np.uint32)).any()
            for batch in self._batches()
        ):
            with self.store.prepared(
                self._batches(), keep=None, expected=self._sha256
            ) as candidate:  # rows are read back when all parts are written
                candidate.commit()
        self.forget()

    def forget(self) -> None:
        """Let go of rows that wait."""
        if self.waiting is not None:
            self.waiting.close()
            self.waiting = None

    def _batches(self) -> Iterator[VectorBatch]:
        assert self.waiting is not None
        for positions, vectors in self.waiting.rows():
            yield VectorBatch(ids=self.store.ids[positions], vectors=vectors)


def _starts(stores: Sequence[PartFile]) -> list[int]:
    """Return how many rows are in the files before each."""
    return [0, *accumulate(len(store.ids) for store in stores[:-1])]


def check_alike(uri: str, stores: Sequence[tuple[Path, int, Metric]]) -> None:
    """Make sure that files (path, dimension, metric) can be parts of one index.

    Raises:
        DataError: They cannot.
    """
    first, dim, metric = stores[0]
    for path, other_dim, other_metric in stores:
        if (other_dim, other_metric) != (dim, metric):
            raise DataError(
                f"{uri}: {first.name} has {dim} dimensions and {metric.value}, {path.name} has "
                f"{other_dim} and {other_metric.value}; they are not parts of one index"
            )
    if len({path for path, _, _ in stores}) < len(stores):
        raise DataError(f"{uri}: two of the names lead to the same file")
