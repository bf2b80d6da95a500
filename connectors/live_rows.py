"""Rows that an application writes, too: what every such store but Qdrant's does alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any
from urllib.parse import quote

import numpy as np

from simskip_vdb.connectors.rows import (
    check_batch_size,
    checked_queries,
    checked_rows,
    fetched,
    no_partitions,
)
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Mask,
    Metric,
    Neighbors,
    Progress,
    VectorBatch,
    Vectors,
)
from simskip_vdb.errors import ConfigError, listed
from simskip_vdb.store import Allowed

PAGE = 512
"""Rows that are read and written by one request."""
CLAIM = "claim"
_PLAIN_FILTER = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([^='\"\s][^='\"]*|)\s*")


class LiveRows:
    """A `VectorStore` and `RowWritable` that asks a subclass for pages of rows.

    It also keeps notes (`Marked`, `Claimable`): one of who writes, and one for each vector and
    filter of who refined it.

    Attributes:
        names: Fields of rows beside id and vector.
    """

    _uri: str
    _dim: int
    _metric: Metric
    _vector: str
    _filter: str | None
    _guard: str | None
    _read_only: bool
    names: Sequence[str]

    def _page(self, after: Cursor | None, limit: int, fields: Sequence[str]) -> VectorBatch:
        """Return the next rows after a cursor, in the order of ids."""
        raise NotImplementedError

    def _read(self, ids: Ids) -> VectorBatch:
        """Return those of at most `PAGE` rows that are there, in any order."""
        raise NotImplementedError

    def _write(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Ids:
        """Read at most `PAGE` rows, ask `allowed`, and write in one go; return which were."""
        raise NotImplementedError

    def _nearest(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index; queries are checked."""
        raise NotImplementedError

    def _note(self, key: str) -> dict[str, Any] | None:
        """Return a note that is kept in the store."""
        return self._notes().get(key)

    def _notes(self) -> dict[str, dict[str, Any]]:
        """Return all notes that are kept in the store."""
        raise NotImplementedError

    def _keep_note(self, key: str, note: Mapping[str, Any] | None) -> None:
        """Keep a note in the store, durably; None takes it away."""
        raise NotImplementedError

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row that has a vector, by ascending id; see `VectorStore.scan`."""
        check_batch_size(self._uri, batch_size)
        no_partitions(self._uri, partition)
        for name in fields:
            if name not in self.names:
                raise ConfigError(
                    f"{self._uri}: rows have no field '{name}'; there are: {listed(self.names)}"
                )
        return self._pages(batch_size, list(fields), cursor)

    def _pages(
        self, batch_size: int, fields: Sequence[str], cursor: Cursor | None
    ) -> Iterator[VectorBatch]:
        while True:
            batch = self._page(cursor, batch_size, fields)
            if len(batch):
                yield batch
            if len(batch) < batch_size:
                return
            cursor = batch.cursor

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        return fetched(self._uri, self.peek, ids)

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        wanted = np.asarray(ids)
        vectors = np.empty((len(wanted), self._dim), np.float32)
        there = np.zeros(len(wanted), np.bool_)
        for start in range(0, len(wanted), PAGE):
            page = wanted[start : start + PAGE]
            now = self._read(page)
            at = start + places(now.ids, page)
            vectors[at], there[at] = now.vectors, True
        return VectorBatch(ids=wanted[there], vectors=vectors[there])

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index; see `VectorStore.search`."""
        return self._nearest(checked_queries(self._uri, queries, self._dim, k), k, params)

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Overwrite vectors; see `RowWritable.update`."""
        self._writable()
        vectors = checked_rows(self._uri, batch, self._dim)
        ids = np.asarray(batch.ids)
        written = np.zeros(len(batch), np.bool_)
        for start in range(0, len(batch), PAGE):
            page = ids[start : start + PAGE]
            done = self._write(page, vectors[start : start + PAGE], allowed)
            written[start + places(done, page)] = True
        return written

    def settle(self, progress: Progress) -> None:
        """See `RowWritable.settle`; every write is durable already."""
        self._writable()

    def marker(self) -> Mapping[str, Any] | None:
        """Return the note of who refined these rows; see `Marked.marker`."""
        notes = self._notes()
        for note in notes.values():
            other = note.get("filter")
            same = note.get("vector") == self._vector
            if same and other != self._filter and not _apart(other, self._filter):
                raise ConfigError(
                    f"{self._uri}: rows of this vector were refined under the filter {other!r}, "
                    "and some may pass this one, too; a row is never refined twice. Use that "
                    "filter, or roll that refinement back first"
                )
        own = notes.get(self._label)
        return own and {name: own[name] for name in own if name not in ("vector", "filter")}

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note; see `Marked.mark`."""
        self._writable()
        whole = None if note is None else {**note, "vector": self._vector, "filter": self._filter}
        self._keep_note(self._label, whole)

    def claimed(self) -> Mapping[str, Any] | None:
        """Return who writes; see `Claimable.claimed`."""
        return self._note(CLAIM)

    def claim(self, note: Mapping[str, Any] | None) -> None:
        """Say who writes; see `Claimable.claim`."""
        self._writable()
        self._keep_note(CLAIM, note)

    @property
    def _label(self) -> str:
        """A name for the vector, and the filter if there is one, that a file may have."""
        name = f"vector-{quote(self._vector, safe='')}"
        if self._filter is None:
            return name
        return f"{name}-{sha256(self._filter.encode()).hexdigest()[:8]}"

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")


def places(ids: Ids, page: Ids) -> Any:  # noqa: ANN401 positions
    """Return where each id stands in a page of different ids, shape (len(ids),)."""
    order = np.argsort(page, kind="stable")
    return order[np.searchsorted(page, ids, sorter=order)]


def plain_filter(text: str) -> tuple[str, str] | None:
    """Return field and value of ``FIELD=VALUE``; None for any other condition."""
    found = _PLAIN_FILTER.fullmatch(text)
    return None if found is None else (found[1], found[2])


def _apart(one: str | None, other: str | None) -> bool:
    """Tell whether no row can pass both of two filters."""
    first = None if one is None else plain_filter(one)
    second = None if other is None else plain_filter(other)
    return first is not None and second is not None and first[0] == second[0] and first != second
