"""The rows of a Lance table that have a vector, read in the order of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simskip_vdb.connectors.lance_ids import ascend, beyond, refuse_repeated, to_ids
from simskip_vdb.connectors.lance_table import Columns, engine_call, quoted
from simskip_vdb.datatypes import Cursor, VectorBatch
from simskip_vdb.errors import ConfigError, DataError, StoreError

_WINDOW_BYTES = 1 << 26
_ROW_ID = "_rowid"


@dataclass(frozen=True, slots=True, kw_only=True)
class LanceScan:
    """Rows of a table with a vector.

    Attributes:
        table: The handle that writes.
        reopen: Returns another handle of the table, at its latest version.
        uri: The store's address for messages.
        columns: What holds what.
        filter: SQL that narrows the rows; None for all.
        guard: Column on which a write depends; None for none.
    """

    table: Any
    reopen: Callable[[], Any]
    uri: str
    columns: Columns
    filter: str | None
    guard: str | None
    _counts: dict[int, int] = field(default_factory=dict)
    _ascending: dict[int, bool] = field(default_factory=dict)

    @property
    def having(self) -> str:
        """SQL that lets the rows through that count."""
        there = f"{self.sql(self.columns.vector)} IS NOT NULL"
        return there if self.filter is None else f"({self.filter}) AND {there}"

    def count(self) -> int:
        """Count the rows that have a vector and pass the filter."""
        with engine_call(self.uri, "counting"):
            self.table.checkout_latest()
            version = self.table.version
            if version not in self._counts:
                self._counts.clear()
                self._counts[version] = int(self.table.count_rows(self.having))
        return self._counts[version]

    def refuse_repeated(self) -> None:
        """Refuse ids that stand for several rows, with a vector or not.

        Raises:
            DataError: There are any, or a row has none.
        """
        with engine_call(self.uri, "reading ids"):
            version = self.table.version
            column = self.table.search().select([self.columns.id]).to_arrow()[self.columns.id]
        ids = to_ids(column, self.columns.id, self.uri)
        self._ascending[version] = ascend(ids)
        if not self._ascending[version]:
            refuse_repeated(np.sort(ids), self.columns.id, self.uri)

    def refuse_unknown(self, names: Sequence[str]) -> None:
        """Refuse columns that are not there.

        Raises:
            ConfigError: One is not.
        """
        for name in names:
            if name not in self.columns.names:
                raise ConfigError(
                    f"{self.uri}: there is no column '{name}'; there are "
                    f"{', '.join(self.columns.names)}"
                )

    def scan(
        self, batch_size: int, fields: Sequence[str], cursor: Cursor | None
    ) -> Iterator[VectorBatch]:
        """Yield the rows of one version by ascending id; a cursor is the last id of a batch."""
        after = None if cursor is None else self._cursor(cursor)
        names = list(dict.fromkeys([self.columns.id, self.columns.vector, *fields]))
        with engine_call(self.uri, "reading ids"):
            table = self.reopen()
            version = table.version
            table.checkout(version)
        rows = None if self._ascending.get(version) else self._by_id(table, after)
        if rows is None:
            tables = self._stream(table, after, names, batch_size)
        else:
            tables = self._windows(table, rows, names, batch_size)
        last: Any = None
        for part in tables:
            batch = self.batch(part, fields)
            if not len(batch):
                continue
            if not ascend(batch.ids) or (last is not None and batch.ids[0] <= last):
                raise StoreError(
                    f"{self.uri}: rows came in another order than their ids, which says that the "
                    "engine read them otherwise than it should; report it"
                )
            last = batch.ids[-1]
            yield batch

    def _by_id(self, table: Any, after: Cursor | None) -> NDArray[np.uint64] | None:  # noqa: ANN401 lancedb
        """Return the row ids of rows by ascending id, shape (n,); None where they lie so."""
        with engine_call(self.uri, "reading ids"):
            query = self._after(table, after).select([self.columns.id])
            found = query.with_row_id(True).to_arrow()
        ids = to_ids(found[self.columns.id], self.columns.id, self.uri)
        if ascend(ids):
            return None
        order = np.argsort(ids, kind="stable")
        refuse_repeated(ids[order], self.columns.id, self.uri)
        rows: NDArray[np.uint64] = found[_ROW_ID].to_numpy()[order]
        return rows

    def _stream(
        self,
        table: Any,  # noqa: ANN401 lancedb
        after: Cursor | None,
        names: list[str],
        batch_size: int,
    ) -> Iterator[Any]:
        """Yield rows as they lie, in tables of `batch_size`; a query's rows fit into a window."""
        parts: list[Any] = []
        size, found, held = self._window(batch_size), -1, 0
        while found in (-1, size):
            found = 0
            with engine_call(self.uri, "reading rows"):
                query = self._after(table, after).select(names).limit(size)
                for batch in query.to_batches(batch_size):
                    parts.append(batch)
                    found, held = found + batch.num_rows, held + batch.num_rows
                    while held >= batch_size:
                        whole = pa.Table.from_batches(parts)
                        yield whole.slice(0, batch_size)
                        parts = whole.slice(batch_size).to_batches()
                        held -= batch_size
                    if batch.num_rows:
                        after = batch[self.columns.id][-1].as_py()
        if held:
            yield pa.Table.from_batches(parts)

    def _windows(
        self,
        table: Any,  # noqa: ANN401 lancedb
        rows: NDArray[np.uint64],
        names: list[str],
        batch_size: int,
    ) -> Iterator[Any]:
        """Yield rows by their row ids, shape (n,), which are in the order of ids."""
        size = self._window(batch_size)
        for start in range(0, len(rows), size):
            with engine_call(self.uri, "reading rows"):
                wanted = np.sort(rows[start : start + size]).tolist()
                found = table.take_row_ids(wanted).select(names).to_arrow()
            places = np.argsort(to_ids(found[self.columns.id], self.columns.id, self.uri))
            for first in range(0, len(places), batch_size):
                yield found.take(pa.array(places[first : first + batch_size]))

    def _window(self, batch_size: int) -> int:
        """Return how many rows are asked for at once: some batches."""
        most = _WINDOW_BYTES // (4 * self.columns.dim)
        return max(most // batch_size, 1) * batch_size

    def _after(self, table: Any, cursor: Cursor | None) -> Any:  # noqa: ANN401 lancedb
        """Return a query for the rows that pass the filter, after a cursor if there is one."""
        wheres = [] if self.filter is None else [f"({self.filter})"]
        if cursor is not None:
            wheres.append(beyond(cursor, self.sql(self.columns.id)))
        query = table.search()
        return query.where(" AND ".join(wheres)) if wheres else query

    def having_vectors(self, found: Any) -> Any:  # noqa: ANN401 pyarrow
        """Return those rows of an Arrow table that have a vector."""
        lists = found[self.columns.vector]
        return found.filter(lists.is_valid()) if lists.null_count else found

    def batch(self, found: Any, fields: Sequence[str]) -> VectorBatch:  # noqa: ANN401 pyarrow
        """Return those rows of an Arrow table that have a vector, with some of its columns.

        Raises:
            DataError: A vector has a number missing, or a row no id.
        """
        found = self.having_vectors(found)
        ids = to_ids(found[self.columns.id], self.columns.id, self.uri)
        if not len(ids):
            return VectorBatch(ids=ids, vectors=np.empty((0, self.columns.dim), np.float32))
        lists = found[self.columns.vector]
        parts = [part.flatten() for part in lists.chunks if len(part)]
        gaps = sum(part.null_count for part in parts)
        if gaps:
            raise DataError(
                f"{self.uri}: vectors in '{self.columns.vector}' have {gaps:,} numbers missing; "
                "correct them, or set the whole vector to null"
            )
        numbers = parts[0].to_numpy()
        if len(parts) > 1:
            numbers = np.concatenate([part.to_numpy() for part in parts])
        vectors = numbers.astype(np.float32, copy=False).reshape(len(ids), self.columns.dim)
        cursor = ids[-1].item()
        return VectorBatch(
            ids=ids,
            vectors=vectors,
            fields={name: found[name].to_pylist() for name in fields},
            cursor=cursor.decode() if isinstance(cursor, bytes) else cursor,
        )

    def _cursor(self, cursor: Cursor) -> Cursor:
        if not pa.types.is_integer(self.columns.id_kind):
            return str(cursor)
        try:
            return int(cursor)
        except ValueError:
            raise ConfigError(f"{self.uri}: cursor '{cursor}' is no row id") from None

    def sql(self, name: str) -> str:
        """Return a column's name as SQL has it."""
        return quoted(name, self.uri)
