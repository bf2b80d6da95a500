"""One column of vectors of a LanceDB table."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.lance_ids import check_kind, to_ids
from simskip_vdb.connectors.lance_marker import (
    CLAIM,
    MARKER,
    own_note,
    read_metadata,
    write_metadata,
)
from simskip_vdb.connectors.lance_rows import PAGE, LanceRows
from simskip_vdb.connectors.lance_table import (
    METRICS,
    Conflict,
    choose_columns,
    choose_metric,
    engine_call,
    find_index,
    open_table,
    sync,
)
from simskip_vdb.connectors.qdrant_points import F16_ROUNDING, F32_ROUNDING, label_of
from simskip_vdb.connectors.rows import (
    check_batch_size,
    checked_queries,
    checked_rows,
    fetched,
    no_partitions,
)
from simskip_vdb.datatypes import (
    ID_TEXT,
    Cursor,
    Ids,
    Mask,
    Metric,
    Neighbors,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
)
from simskip_vdb.durable import beside
from simskip_vdb.errors import ConfigError, DataError, StoreError
from simskip_vdb.store import Allowed

log = logging.getLogger(__name__)

_SCHEME = "lancedb"
_QUERY_BLOCK = 64
_NEVER = timedelta(days=36_500)
_TRIES, _WAIT = 10, 0.1
_COUNTS = ("nprobes", "minimum_nprobes", "maximum_nprobes", "refine_factor", "ef")
_EXACT = ("bypass_vector_index", "exact")


class LanceStore:
    """A `VectorStore` and `RowWritable` that is one column of vectors of a LanceDB table."""

    def __init__(
        self,
        path: Path,
        table: str | None = None,
        column: str | None = None,
        *,
        id: str | None = None,  # noqa: A002 as in the address
        metric: str | None = None,
        read_only: bool = False,
        filter: str | None = None,  # noqa: A002 as in the address
        guard_field: str | None = None,
    ) -> None:
        """Open a table.

        Args:
            path: The folder that ``lancedb.connect`` takes.
            table: Name of the table; None for the only one.
            column: Name of the column of vectors; None for the only one.
            id: Name of the column that tells rows apart; None for ``id``, or the only one of
                integers or text.
            metric: ``cosine``, ``dot`` or ``euclid``; None for that of the column's index, or
                where it has none for LanceDB's default, ``euclid``.
            read_only: Refuse every write.
            filter: Rows that count, as SQL; None for all.
            guard_field: Column that the application changes on each of its writes.

        Raises:
            StoreNotFoundError: There is no such folder or table.
            UnsupportedIndexError: The column cannot be refined.
            ConfigError: There is no such column, or several, or the filter cannot be read.
            DataError: An id stands for several rows, or a row has none.
        """
        self._path = path.resolve()
        self._given = metric
        self._read_only = read_only
        self._filter = (filter or "").strip() or None
        self._names = {"table": table, "column": column, "id": id}
        reopen, self._names["table"] = open_table(self._path, table, self._uri)
        self._opened = time.time()
        with engine_call(self._uri, "describing the table"):
            self._table = reopen()
            schema = self._table.schema
        columns = choose_columns(schema, column, id, self._uri)
        self._names.update(column=columns.vector, id=columns.id)
        self._columns = columns
        with engine_call(self._uri, "describing the index"):
            index = find_index(self._table, columns.vector)
        distance = None if index is None else index[1].distance_type
        self._metric = choose_metric(distance, metric, self._uri)
        self._rows = LanceRows(
            table=self._table,
            reopen=reopen,
            uri=self._uri,
            columns=columns,
            filter=self._filter,
            guard=guard_field,
        )
        self._check(guard_field)

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool,
        filter: str | None = None,  # noqa: A002 as in the address
        guard_field: str | None = None,
    ) -> LanceStore:
        """Open ``lancedb:FOLDER?table=NAME&column=NAME&id=NAME&metric=NAME``; `filter` is SQL."""
        place, options = parse_address(uri, ("table", "column", "id", "metric", "filter"))
        return cls(
            Path(place),
            options.get("table"),
            options.get("column"),
            id=options.get("id"),
            metric=options.get("metric"),
            read_only=read_only,
            filter=filter or options.get("filter"),
            guard_field=guard_field,
        )

    def __enter__(self) -> LanceStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: a table is not held open."""

    def info(self) -> StoreInfo:
        """Describe the column as it is now; `count` is the rows that have a vector."""
        count = self._rows.count()
        with engine_call(self._uri, "describing the index"):
            index = find_index(self._table, self._columns.vector)
        half = self._columns.dtype == np.float16
        return StoreInfo(
            uri=self._uri,
            kind=f"LanceDB, {'no index' if index is None else index[0]}"
            + (", float16" if half else ""),
            count=count,
            dim=self._columns.dim,
            metric=self._metric,
            exact=not half,
            rounding=F16_ROUNDING if half else F32_ROUNDING,
            exhaustive=index is None,
            payload=True,
            partial=self._filter is not None,
            state=self._states / label_of(self._columns.vector, self._filter),
            claim=self._states,
            details={} if index is None else {"unindexed_rows": index[1].num_unindexed_rows},
        )

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row that has a vector, by ascending id; see `VectorStore.scan`.

        All rows are read at one version, the latest when the scan begins.

        Args:
            batch_size: Most rows in a batch.
            fields: Columns to bring along.
            cursor: The last id of a batch.
            partition: None.
        """
        check_batch_size(self._uri, batch_size)
        no_partitions(self._uri, partition)
        self._rows.refuse_unknown(fields)
        return self._rows.scan(batch_size, list(fields), cursor)

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        return fetched(self._uri, self.peek, ids)

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        return self._rows.peek(ids)

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index; see `VectorStore.search`.

        Args:
            queries: Shape (q, d).
            k: Rows wanted for each query.
            params: ``nprobes``, ``minimum_nprobes``, ``maximum_nprobes``, ``refine_factor``,
                ``ef``; ``bypass_vector_index`` (or ``exact``) compares every row.
        """
        array = checked_queries(self._uri, queries, self._columns.dim, k)
        calls = self._settings(params)
        ids: Ids = np.full((len(array), k), -1)
        if self._columns.texts:
            ids = np.zeros((len(array), k), ID_TEXT)
        scores = np.full((len(array), k), -np.inf, np.float32)
        name, distance = self._columns.id, _name_of(self._metric)
        with engine_call(self._uri, "searching"):
            self._table.checkout_latest()
        for start in range(0, len(array), _QUERY_BLOCK):
            block = array[start : start + _QUERY_BLOCK]
            with engine_call(self._uri, "searching"):
                query = self._table.search(
                    block if len(block) > 1 else block[0],
                    vector_column_name=self._columns.vector,
                    query_type="vector",
                ).distance_type(distance)
                for call, value in calls.items():
                    query = getattr(query, call)(*value)
                if self._filter is not None:
                    query = query.where(self._filter)
                found = query.limit(k).select([name, "_distance"]).to_arrow()
            hits = to_ids(found[name], name, self._uri)
            near = found["_distance"].to_numpy()
            asked = np.zeros(len(hits), np.int64)
            if len(block) > 1:
                asked = found["query_index"].to_numpy().astype(np.int64)
            order = np.lexsort((near, asked))
            asked = asked[order]
            rank = np.arange(len(asked)) - np.searchsorted(asked, asked)
            ids = ids.astype(np.promote_types(ids.dtype, hits.dtype), copy=False)
            ids[start + asked, rank] = hits[order]
            scores[start + asked, rank] = -near[order]
        if self._metric is not Metric.EUCLID:  # the engine's is 1 less the product
            scores += 1
        return Neighbors(ids=ids, scores=scores)

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Overwrite vectors; see `RowWritable.update`. Each page of rows is a version."""
        self._writable()
        vectors = checked_rows(self._uri, batch, self._columns.dim)
        self._refuse_beyond(vectors)
        written = np.zeros(len(batch), np.bool_)
        for start in range(0, len(batch), PAGE):
            part = slice(start, start + PAGE)
            ids = check_kind(batch.ids[part], self._columns.id_kind, self._uri)
            written[part] = self._rows.update(ids, vectors[part], allowed)
        return written

    def settle(self, progress: Progress) -> None:
        """Let LanceDB put small files together and index new rows; see `RowWritable.settle`.

        Older versions stay. Where an application writes all the time, that is left to its own
        ``optimize``: rows that no index has yet are compared one by one.
        """
        self._writable()
        progress("index", 0, 1)
        for tries in range(_TRIES):
            try:
                with engine_call(self._uri, "optimising; is the disk full?"):
                    self._table.checkout_latest()
                    self._table.optimize(cleanup_older_than=_NEVER)
                break
            except Conflict as error:
                if tries == _TRIES - 1:
                    log.warning("%s; run table.optimize() when nobody writes", error)
                time.sleep(_WAIT * tries)
        sync(self._path / f"{self._names['table']}.lance", self._opened, self._uri)
        progress("index", 1, 1)

    def marker(self) -> Mapping[str, Any] | None:
        """Return the note of who refined this column; see `Marked.marker`."""
        return own_note(self._notes(), self._filter, self._uri)

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note in the column's metadata; see `Marked.mark`."""
        self._writable()
        notes = self._notes()
        notes.pop(self._filter or "", None)
        if note is not None:
            notes[self._filter or ""] = dict(note)
        self._write(MARKER, notes or None)

    def claimed(self) -> Mapping[str, Any] | None:
        """Return who writes this column; see `Claimable.claimed`."""
        return read_metadata(self._table, self._columns.vector, CLAIM, self._uri)

    def claim(self, note: Mapping[str, Any] | None) -> None:
        """Say in the column's metadata who writes it; see `Claimable.claim`."""
        self._writable()
        self._write(CLAIM, note)

    @property
    def _uri(self) -> str:
        options = {**self._names, "metric": self._given, "filter": self._filter}
        return address_of(_SCHEME, str(self._path), options)

    @property
    def _states(self) -> Path:
        return beside(self._path, ".simskip") / quote(str(self._names["table"]), safe="")

    def _notes(self) -> dict[str, Any]:
        return read_metadata(self._table, self._columns.vector, MARKER, self._uri) or {}

    def _write(self, key: str, note: Mapping[str, Any] | None) -> None:
        write_metadata(self._table, self._columns.vector, key, note, self._uri)
        sync(self._path / f"{self._names['table']}.lance", self._opened, self._uri)

    def _check(self, guard: str | None) -> None:
        """Refuse a filter that cannot be read, a guard that is not there, and ids that repeat."""
        if self._filter is not None:
            try:
                self._rows.count()
            except StoreError as error:
                raise ConfigError(
                    f"{error}. --filter is SQL over the table's columns, such as tenant = 'acme' "
                    "AND year > 2020"
                ) from None
        if guard is not None:
            self._rows.refuse_unknown([guard])
            if guard in (self._columns.vector, self._columns.id):
                raise ConfigError(
                    f"{self._uri}: the guard field '{guard}' is the column of vectors or ids; name "
                    "one that the application changes on each write"
                )
        self._rows.refuse_repeated()

    def _refuse_beyond(self, vectors: Vectors) -> None:
        if self._columns.dtype != np.float16:
            return
        largest = float(np.abs(vectors).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise DataError(
                f"{self._uri}: a vector has the number {largest:g}, which float16 cannot hold"
            )

    def _settings(self, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return search parameters as calls of LanceDB's query, with their arguments."""
        calls: dict[str, tuple[int, ...]] = {}
        for name, value in params.items():
            if name in _EXACT:
                if value:
                    calls[_EXACT[0]] = ()
            elif name not in _COUNTS:
                raise ConfigError(
                    f"{self._uri}: the index knows no parameter '{name}'; it knows "
                    f"{', '.join((*_COUNTS, *_EXACT))}"
                )
            elif isinstance(value, bool) or value != int(value) or value < 1:
                raise ConfigError(f"{self._uri}: {name} is a whole number from 1 on, not {value}")
            else:
                calls[name] = (int(value),)
        return calls

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")


def _name_of(metric: Metric) -> str:
    return next(name for name, found in METRICS.items() if found is metric)
