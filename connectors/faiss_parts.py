"""A FAISS index that was saved as several files, because `IndexShards` cannot be saved as one."""

from __future__ import annotations

import glob
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from simskip_vdb.connectors.faiss_notes import note_file, part_note, refuse_refined
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.notes import write_note
from simskip_vdb.connectors.rows import RowOrder, checked_queries, checked_rows, only_vectors
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Mask,
    Neighbors,
    Positions,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
)
from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import ConfigError, DataError, StoreNotFoundError, UnsupportedIndexError
from simskip_vdb.store import Allowed, VectorStore

_SCHEME = "faiss:"
_ROWS = 8192
_GLOB = re.compile(r"[*?\[\]]")


class FaissParts:
    """A `VectorStore` of several FAISS files, in the order of their names.

    Files cannot be replaced at one instant, so it is `RowWritable`: rows that are updated wait in
    nameless files on disk, `settle` writes each part that has any, and only then does `search`
    see them. A part that somebody else changed since it was opened is left as it is.

    Ids are those of the parts. Where parts count their rows from 0 each, a row's id is larger by
    the rows of the parts before it, as with ``IndexShards(successive_ids=True)``.
    """

    def __init__(self, pattern: Path | str, *, read_only: bool = False) -> None:
        """Open the files that a pattern names.

        Args:
            pattern: A path whose last part has ``*``, ``?`` or ``[…]``.
            read_only: Refuse every write.

        Raises:
            StoreNotFoundError: There are none.
            UnsupportedIndexError: A part cannot be refined together with others.
            DataError: The parts do not fit together, or an id comes twice.
            ConfigError: A part was refined by itself.
            StoreError: A part is not an index, or damaged.
        """
        given = Path(pattern)
        self._pattern = given.parent.resolve() / given.name
        self._read_only = read_only
        names = glob.glob(f"{glob.escape(str(self._pattern.parent))}/{given.name}")
        paths = [Path(name) for name in sorted(names) if Path(name).is_file()]
        if not paths:
            raise StoreNotFoundError(f"{self._uri}: there is no such file")
        stores = [FaissStore(path, read_only=read_only) for path in paths]
        self._check(stores)
        starts = [0, *accumulate(len(store.ids) for store in stores)]
        self._parts = [_Part(store, first) for store, first in zip(stores, starts, strict=False)]
        shifted = _collide(stores, self._uri)
        self._shifts = starts[:-1] if shifted else [0] * len(stores)
        ids = [store.ids + shift for store, shift in zip(stores, self._shifts, strict=True)]
        self._rows = RowOrder(np.concatenate(ids), self._uri)
        self._positional = shifted or any(store.info().positional for store in stores)

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> FaissParts:
        """Open ``faiss:FOLDER/PATTERN`` or the plain pattern."""
        return cls(uri.removeprefix(_SCHEME), read_only=read_only)

    def info(self) -> StoreInfo:
        """Describe the parts together; details are those that all have in common."""
        infos = [part.store.info() for part in self._parts]
        kinds = ", ".join(dict.fromkeys(info.kind for info in infos))
        common = {
            name: value
            for name, value in infos[0].details.items()
            if all(info.details.get(name) == value for info in infos)
        }
        folder = f"{_GLOB.sub('_', self._pattern.name)}.simskip"
        return StoreInfo(
            uri=self._uri,
            kind=f"{len(infos)} part{'s' * (len(infos) > 1)} of {kinds}",
            count=len(self._rows),
            dim=infos[0].dim,
            metric=infos[0].metric,
            positional=self._positional,
            state=self._pattern.with_name(folder),
            details=common,
        )

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
        only_vectors(self._uri, fields, partition)
        self._rows.windows(batch_size, cursor)  # refuses what makes no sense
        return self._scan(batch_size, 0 if cursor is None else int(cursor))

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
        """Search every part and keep the best; see `FaissStore.search`."""
        array = checked_queries(self._uri, queries, self._dim, k)
        ids, scores = [], []
        for part, shift in zip(self._parts, self._shifts, strict=True):
            try:
                found = part.store.search(array, k, params)
            except ConfigError as error:
                raise ConfigError(f"{self._uri}: {error}") from error
            ids.append(np.where(found.ids < 0, -1, found.ids + shift))
            scores.append(found.scores)
        together = np.concatenate(scores, axis=1)  # (q, parts * k)
        best = np.argsort(-together, axis=1, kind="stable")[:, :k]
        return Neighbors(
            ids=np.take_along_axis(np.concatenate(ids, axis=1), best, axis=1),
            scores=np.take_along_axis(together, best, axis=1),
        )

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        there = np.asarray(ids)[np.isin(ids, self._rows.ids)]
        return VectorBatch(ids=there, vectors=self.fetch(there))

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Take rows that `settle` writes; see `RowWritable.update`."""
        self._writable()
        vectors = checked_rows(self._uri, batch, self._dim)
        now = self.peek(batch.ids)
        chosen = np.isin(batch.ids, now.ids)
        chosen[chosen] = allowed(now)
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
        notes = (part_note(part.store.path) for part in self._parts)
        return next((note for note in notes if note is not None), None)

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note beside each part; see `Marked.mark`."""
        self._writable()
        for part in self._parts:
            write_note(
                note_file(part.store.path), None if note is None else {**note, "index": self._uri}
            )

    def sweep(self) -> None:
        """Remove what a killed write left behind; see `LeavesFiles.sweep`."""
        for part in self._parts:
            part.store.sweep()

    @property
    def _uri(self) -> str:
        return f"{_SCHEME}{self._pattern}"

    @property
    def _dim(self) -> int:
        return self._parts[0].store.info().dim

    def _check(self, stores: Sequence[FaissStore]) -> None:
        first = stores[0].info()
        for store in stores:
            info = store.info()
            if (info.dim, info.metric) != (first.dim, first.metric):
                raise DataError(
                    f"{self._uri}: {stores[0].path.name} has {first.dim} dimensions and "
                    f"{first.metric.value}, {store.path.name} has {info.dim} and "
                    f"{info.metric.value}; they are not parts of one index"
                )
            if not info.exact:
                raise UnsupportedIndexError(
                    f"{info.uri}: {info.kind} does not give its vectors back exactly, so after an "
                    "interruption nobody could tell which of several files were written. Refine "
                    "each part by itself, with the refiner of the first"
                    + (" and its exact vectors (--originals)" if info.lossy else "")
                    + f": simskip refine {store.path.name} --refiner DIR --accept-unmeasured"
                )
            assert info.state is not None
            refuse_refined(store.path, info.state)
        if len({store.path for store in stores}) < len(stores):
            raise DataError(f"{self._uri}: two of the names lead to the same file")

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")

    def _scan(self, batch_size: int, start: int) -> Iterator[VectorBatch]:
        for part in self._parts:
            if start < part.stop:
                for first, vectors in part.scan(batch_size, max(start - part.first, 0)):
                    done = part.first + first + len(vectors)
                    ids = self._rows.ids[done - len(vectors) : done]
                    yield VectorBatch(ids=ids, vectors=vectors, cursor=done)

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

    def __init__(self, store: FaissStore, first: int) -> None:
        self.store = store
        self.first, self.stop = first, first + len(store.ids)
        self.waiting: _Waiting | None = None
        self._sha256 = ""

    def take(self, positions: Positions) -> Vectors:
        """Return the rows at some positions in this part, shape (len(positions), d)."""
        vectors = self.store.fetch(self.store.ids[positions])
        if self.waiting is not None:
            self.waiting.lay_over(positions, vectors)
        return vectors

    def scan(self, batch_size: int, start: int) -> Iterator[tuple[int, Vectors]]:
        """Yield positions in this part and the rows from there on."""
        for batch in self.store.scan(batch_size, cursor=start):
            if self.waiting is not None:
                self.waiting.lay_over(np.arange(start, start + len(batch)), batch.vectors)
            yield start, batch.vectors
            start += len(batch)

    def stage(self, positions: Positions, vectors: Vectors) -> None:
        """Keep rows until they are written."""
        if self.waiting is None:
            self._sha256 = self.store.sha256()
            self.waiting = _Waiting(self.store.path, len(self.store.ids), vectors.shape[1])
        self.waiting.add(positions, vectors)

    def write(self) -> None:
        """Write the rows that wait, unless they are in the file already."""
        if any(
            (batch.vectors.view(np.uint32) != self.store.fetch(batch.ids).view(np.uint32)).any()
            for batch in self._batches()
        ):
            self.store.replace_keeping(self._batches(), _accept, keep=None, expected=self._sha256)
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


class _Waiting:
    """Rows in a file, in the order in which they came, and where in it each row is.

    Attributes:
        close: Gives the disk space back; done at the latest when nobody holds this any more.
    """

    def __init__(self, path: Path, count: int, dim: int) -> None:
        self._path, self._dim, self._length = path, dim, 0
        self._places = np.full(count, -1, np.int64)
        with disk_errors(path):
            # Nameless, so that a kill leaves nothing behind.
            self._file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 see `close`
        self.close = weakref.finalize(self, self._file.close)

    def add(self, positions: Positions, vectors: Vectors) -> None:
        """Append rows; of two for the same position the later one counts."""
        with disk_errors(self._path):
            self._file.seek(self._length * self._dim * 4)
            self._file.write(np.ascontiguousarray(vectors, np.float32).data)
            self._file.flush()
        self._places[positions] = np.arange(self._length, self._length + len(positions))
        self._length += len(positions)

    def lay_over(self, positions: Positions, vectors: Vectors) -> None:
        """Put the rows that wait in the place of those read, shape (len(positions), d)."""
        places = self._places[positions]
        vectors[places >= 0] = self._read(places[places >= 0])

    def rows(self) -> Iterator[tuple[Positions, Vectors]]:
        """Yield the rows by ascending position."""
        positions = np.flatnonzero(self._places >= 0)
        for start in range(0, len(positions), _ROWS):
            block = positions[start : start + _ROWS]
            yield block, self._read(self._places[block])

    def _read(self, places: Positions) -> Vectors:
        if not len(places):
            return np.empty((0, self._dim), np.float32)
        # Mapped for this block only: mapped pages would count as memory.
        file = np.memmap(self._file, np.float32, "r", shape=(self._length, self._dim))
        return np.array(file[places])


def _collide(stores: Sequence[FaissStore], uri: str) -> bool:
    """Tell whether ids are positions in each part, and so come once in every one.

    Raises:
        DataError: They come twice otherwise.
    """
    ids = np.sort(np.concatenate([store.ids for store in stores]))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if not len(twice):
        return False
    if all(np.array_equal(store.ids, np.arange(len(store.ids))) for store in stores):
        return True
    raise DataError(
        f"{uri}: {len(np.unique(twice)):,} ids (such as {twice[0]}) stand for several rows; over "
        "all parts every row needs an id of its own, or every part counts its rows from 0"
    )


def _accept(candidate: VectorStore) -> None:
    """Check nothing more: rows are read back when all parts are written."""
