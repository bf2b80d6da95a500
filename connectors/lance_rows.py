"""The rows of a Lance table that have a vector: scanned in the order of ids, read and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simskip_vdb.connectors.lance_ids import (
    among,
    between,
    beyond,
    check_kind,
    places_of,
    refuse_repeated,
    to_column,
    to_ids,
)
from simskip_vdb.connectors.lance_table import Columns, Conflict, engine_call, quoted
from simskip_vdb.datatypes import Cursor, Ids, Mask, Positions, VectorBatch, Vectors
from simskip_vdb.errors import ConfigError, DataError, StoreError
from simskip_vdb.store import Allowed

PAGE = 8192
"""Rows in a request: each that writes reads all other columns once, and makes a version."""
_WINDOW_BYTES = 1 << 25
_TRIES, _WAIT = 10, 0.05
_ADDRESS, _ROW_ID = "_rowaddr", "_rowid"
_FRAGMENT = np.uint64(32)  # bits of an address below the number of its fragment


class Held(NamedTuple):
    """Rows as they are at one version.

    Attributes:
        at: Their positions among the ids that were asked for.
        rows: Ids and vectors, with the guard among the fields.
        addresses: Where they lie: one that is written anew lies in a later fragment.
        guards: The guard's values as an Arrow column; None where there is no guard.
    """

    at: Positions
    rows: VectorBatch
    addresses: NDArray[np.uint64]
    guards: Any

    def some(self, chosen: Positions) -> Held:
        """Return some of them."""
        rows = VectorBatch(ids=self.rows.ids[chosen], vectors=self.rows.vectors[chosen])
        guards = None if self.guards is None else self.guards.take(pa.array(chosen))
        return Held(self.at[chosen], rows, self.addresses[chosen], guards)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanceRows:
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
        there = f"{self._sql(self.columns.vector)} IS NOT NULL"
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
        self._ascending[version] = _ascend(ids)
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
        wheres = [] if self.filter is None else [f"({self.filter})"]
        if cursor is not None:
            wheres.append(beyond(self._cursor(cursor), self._sql(self.columns.id)))
        where = " AND ".join(wheres)
        names = list(dict.fromkeys([self.columns.id, self.columns.vector, *fields]))
        with engine_call(self.uri, "reading ids"):
            table = self.reopen()
            version = table.version
            table.checkout(version)
        rows = None if self._ascending.get(version) else self._by_id(table, where)
        if rows is None:
            tables = self._stream(table, where, names, batch_size)
        else:
            tables = self._windows(table, rows, names, batch_size)
        last: Any = None
        for part in tables:
            batch = self._batch(part, fields)
            if not len(batch):
                continue
            if not _ascend(batch.ids) or (last is not None and batch.ids[0] <= last):
                raise StoreError(
                    f"{self.uri}: rows came in another order than their ids, which says that the "
                    "engine read them otherwise than it should; report it"
                )
            last = batch.ids[-1]
            yield batch

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there, in the order asked."""
        wanted = check_kind(ids, self.columns.id_kind, self.uri)
        vectors = np.empty((len(wanted), self.columns.dim), np.float32)
        there = np.zeros(len(wanted), np.bool_)
        with engine_call(self.uri, "reading rows"):
            self.table.checkout_latest()
        for start in range(0, len(wanted), PAGE):
            held = self.read(self.table, wanted[start : start + PAGE])
            vectors[start + held.at] = held.rows.vectors
            there[start + held.at] = True
        return VectorBatch(ids=wanted[there], vectors=vectors[there])

    def read(self, table: Any, ids: Ids) -> Held:  # noqa: ANN401 lancedb
        """Read those of at most a page of rows that are there, one at least being asked for.

        Raises:
            DataError: An id stands for several rows.
        """
        names = [self.columns.id, self.columns.vector, *([self.guard] if self.guard else [])]
        with engine_call(self.uri, "reading rows"):
            where = self._choice(table, ids)
            wanted = [*dict.fromkeys(names), _ADDRESS]
            found = table.search().where(where).select(wanted).to_arrow()
        asked = np.isin(to_ids(found[self.columns.id], self.columns.id, self.uri), ids)
        if not asked.all():
            found = found.filter(pa.array(asked))
        found = self._having_vectors(found)
        batch = self._batch(found, [self.guard] if self.guard else [])
        at = places_of(batch.ids, ids)
        order = np.argsort(at, kind="stable")
        refuse_repeated(batch.ids[order], self.columns.id, self.uri)
        guards = found[self.guard].combine_chunks().take(pa.array(order)) if self.guard else None
        rows = VectorBatch(
            ids=batch.ids[order],
            vectors=batch.vectors[order],
            fields={} if guards is None else {self.guard or "": guards.to_pylist()},
        )
        return Held(at[order], rows, found[_ADDRESS].to_numpy()[order], guards)

    def update(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Mask:
        """Write those of at most a page of rows that are there and that `allowed` lets go.

        Returns:
            Which were written, shape (len(ids),).

        Raises:
            TransientStoreError: Others wrote the same rows over and over.
        """
        written = np.zeros(len(ids), np.bool_)
        left = np.arange(len(ids))
        for tries in range(_TRIES):
            with engine_call(self.uri, "reading rows"):
                self.table.checkout_latest()
            held = self.read(self.table, ids[left])
            if not len(held.rows):
                return written
            chosen = np.flatnonzero(allowed(held.rows))
            if not len(chosen):
                return written
            rows = left[held.at[chosen]]
            try:
                sent = self.write(held.some(chosen), vectors[rows])
            except Conflict:
                if tries == _TRIES - 1:
                    raise
                sent = np.zeros(len(rows), np.bool_)
            written[rows[sent]] = True
            left = rows[~sent]
            if not len(left):
                return written
            time.sleep(_WAIT * tries)
        raise Conflict(
            f"{self.uri}: {len(left):,} rows were written by others each of {_TRIES} times that "
            "they were to be written; the same command goes on"
        )

    def write(self, held: Held, vectors: Vectors) -> Mask:
        """Write rows that are as they were read; return which, shape (len(held.rows),).

        Where somebody else wrote meanwhile, the engine tries again with the rows as they are then.
        A row that is written anew lies in a later fragment, which the condition excludes. Only a
        writer of single columns by an indexed key leaves a row where it was: what was written over
        that is given back.
        """
        kinds = self.columns
        dtype = kinds.dtype
        new = np.ascontiguousarray(vectors, dtype)
        bound = (int(held.addresses.max() >> _FRAGMENT) + 1) << int(_FRAGMENT)
        condition = f"target.{_ADDRESS} < {bound}"
        source = {
            kinds.id: to_column(held.rows.ids, kinds.id_kind),
            kinds.vector: pa.FixedSizeListArray.from_arrays(pa.array(new.ravel()), type=kinds.kind),
        }
        if self.guard is not None and self.guard not in source:
            name = self._sql(self.guard)
            source[self.guard] = held.guards
            condition += (
                f" AND (target.{name} = source.{name} OR "
                f"(target.{name} IS NULL AND source.{name} IS NULL))"
            )
        with engine_call(self.uri, "writing rows; is the disk full?", writes=True):
            merge = self.table.merge_insert(kinds.id).when_matched_update_all(where=condition)
            result = merge.use_index(False).execute(pa.table(source))
        ours = np.ones(len(held.rows), np.bool_)
        if result.num_attempts > 1 or result.num_updated_rows != len(held.rows):
            self._give_back(held, bound, result.version)
            with engine_call(self.uri, "reading rows"):
                table = self.reopen()
            now = self.read(table, held.rows.ids)
            ours[:] = False
            ours[now.at] = _same(now.rows.vectors, new.astype(np.float32)[now.at])
        return ours

    def _give_back(self, held: Held, bound: int, version: int) -> None:
        """Put back vectors that others wrote in place just before our write of a version."""
        before = self._at(version - 1, held.rows.ids)
        changed = ~_same(before.rows.vectors, held.rows.vectors[before.at])
        changed &= before.addresses < bound
        if changed.any():
            theirs = before.some(np.flatnonzero(changed))
            after = self._at(version, theirs.rows.ids)
            if len(after.rows):
                self.write(after, theirs.rows.vectors[after.at])

    def _at(self, version: int, ids: Ids) -> Held:
        with engine_call(self.uri, f"reading version {version}"):
            table = self.reopen()
            table.checkout(version)
        return self.read(table, ids)

    def _choice(self, table: Any, ids: Ids) -> str:  # noqa: ANN401 lancedb
        """Return SQL that lets rows of these ids through, and others if that is faster to find."""
        name = self._sql(self.columns.id)
        where = "" if self.filter is None else f" AND ({self.filter})"
        span = between(ids, name)
        if table.count_rows(span) <= 2 * len(ids):
            return span + where
        return among(ids, name) + where

    def _by_id(self, table: Any, where: str) -> NDArray[np.uint64] | None:  # noqa: ANN401 lancedb
        """Return the row ids of rows by ascending id, shape (n,); None where they lie so."""
        with engine_call(self.uri, "reading ids"):
            query = _where(table.search(), where).select([self.columns.id])
            found = query.with_row_id(True).to_arrow()
        ids = to_ids(found[self.columns.id], self.columns.id, self.uri)
        if _ascend(ids):
            return None
        order = np.argsort(ids, kind="stable")
        refuse_repeated(ids[order], self.columns.id, self.uri)
        rows: NDArray[np.uint64] = found[_ROW_ID].to_numpy()[order]
        return rows

    def _stream(
        self,
        table: Any,  # noqa: ANN401 lancedb
        where: str,
        names: list[str],
        batch_size: int,
    ) -> Iterator[Any]:
        """Yield the rows as they lie, in tables of `batch_size`."""
        parts: list[Any] = []
        held = 0
        with engine_call(self.uri, "reading rows"):
            for batch in _where(table.search(), where).select(names).to_batches(batch_size):
                parts.append(batch)
                held += batch.num_rows
                while held >= batch_size:
                    whole = pa.Table.from_batches(parts)
                    yield whole.slice(0, batch_size)
                    parts = whole.slice(batch_size).to_batches()
                    held -= batch_size
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
        most = max(_WINDOW_BYTES // (4 * self.columns.dim), 1)
        size = max(most // batch_size, 1) * batch_size
        for start in range(0, len(rows), size):
            with engine_call(self.uri, "reading rows"):
                wanted = np.sort(rows[start : start + size]).tolist()
                found = table.take_row_ids(wanted).select(names).to_arrow()
            places = np.argsort(to_ids(found[self.columns.id], self.columns.id, self.uri))
            for first in range(0, len(places), batch_size):
                yield found.take(pa.array(places[first : first + batch_size]))

    def _having_vectors(self, found: Any) -> Any:  # noqa: ANN401 pyarrow
        lists = found[self.columns.vector]
        return found.filter(lists.is_valid()) if lists.null_count else found

    def _batch(self, found: Any, fields: Sequence[str]) -> VectorBatch:  # noqa: ANN401 pyarrow
        found = self._having_vectors(found)
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

    def _sql(self, name: str) -> str:
        return quoted(name, self.uri)


def _where(query: Any, where: str) -> Any:  # noqa: ANN401 lancedb
    return query.where(where) if where else query


def _ascend(ids: Ids) -> bool:
    return bool((ids[1:] > ids[:-1]).all())


def _same(one: Vectors, other: Vectors) -> Mask:
    """Tell which vectors are the same to the bit, shape (n,)."""
    same: Mask = (one.view(np.uint32) == other.view(np.uint32)).all(axis=1)
    return same
