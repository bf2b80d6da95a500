"""Rows of a table of sqlite-vec, in a SQLite file."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import apsw
import numpy as np
import sqlite_vec

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.folders import nothing_at
from simskip_vdb.connectors.kinds import refuse_other_kinds
from simskip_vdb.connectors.live_rows import LiveRows, places, plain_filter
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Metric,
    Neighbors,
    StoreInfo,
    VectorBatch,
    Vectors,
    id_text,
)
from simskip_vdb.durable import beside
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    UnsupportedIndexError,
    listed,
)
from simskip_vdb.store import Allowed

_SCHEME = "sqlite-vec"
_VECTORS = re.compile(
    r"""["`\[]?(\w[\w ]*?)["`\]]?\s+(float|f32|int8|i8|bit)\s*\[(\d+)\]"""
    r"""(?:\s+distance_metric\s*=\s*["']?(\w+)["']?)?""",
    re.IGNORECASE,
)
_METRICS = {"l2": Metric.EUCLID, "": Metric.EUCLID, "cosine": Metric.COSINE}
_MOST_NEIGHBOURS = 4096
_WAIT_MS = 10_000
_WINDOW_BYTES = 32 << 20
_ROWS_PASSED = 200
"""Rows that sqlite-vec passes over in the time that it takes to look up one by its id."""
_NOTES = "simskip"


class _Column(NamedTuple):
    """A column of vectors.

    Attributes:
        table: Its table.
        name: Its name.
        kind: ``float``, ``int8`` or ``bit``.
        dim: Dimension.
        distance: As the table says it.
    """

    table: str
    name: str
    kind: str
    dim: int
    distance: str


class SqliteStore(LiveRows):
    """A `RowStore` of a virtual table ``vec0``.

    Rows are read again and written in one transaction that nobody else writes beside, a page at a
    time, so that no write of an application is ever lost.
    """

    def __init__(
        self,
        path: Path,
        table: str | None = None,
        column: str | None = None,
        *,
        read_only: bool = False,
        filter: str | None = None,  # noqa: A002 SQL's word is WHERE
        guard_field: str | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            table: The table; None for the only one.
            column: Its column of vectors; None for the only one.
            read_only: Refuse every write.
            filter: ``FIELD=VALUE``, or a condition in SQL; None for all rows.
            guard_field: A column that the application changes on each of its writes.

        Raises:
            StoreNotFoundError: There is no such file, table or column.
            UnsupportedIndexError: It cannot be refined.
            ConfigError: The address does not say which one is meant, or the filter is wrong.
            StoreError: The file is damaged.
        """
        self._path = path.resolve()
        self._read_only, self._filter, self._guard = read_only, filter, guard_field
        self._uri = address_of(_SCHEME, str(self._path), {})
        if not self._path.is_file():
            raise nothing_at(self._path, self._uri)
        refuse_other_kinds(self._path, _SCHEME, self._uri)
        with self._errors("opening"):
            self._db = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READWRITE)
            weakref.finalize(self, self._db.close)
            self._db.enable_load_extension(True)
            self._db.load_extension(sqlite_vec.loadable_path())
            self._db.enable_load_extension(False)
            self._db.set_busy_timeout(_WAIT_MS)
            found = self._choose(table, column)
            self._table, self._vector, self._dim = found.table, found.name, found.dim
            told = list(self._db.execute(f"PRAGMA table_xinfo({_name(self._table)})"))
        metric = _METRICS.get(found.distance.lower())
        if metric is None:
            raise UnsupportedIndexError(
                f"{self._uri}: {found.table} compares by {found.distance}, by which vectors are "
                "not refined; make it with distance_metric=cosine or l2"
            )
        self._metric = metric
        own = [name for _, name, _, _, _, key, _ in told if key]
        self._id = own[0] if own else "rowid"
        self.names = [
            row[1] for row in told if row[1] not in (self._id, self._vector) and not row[6]
        ]
        self._uri = address_of(
            _SCHEME,
            str(self._path),
            {"table": self._table, "column": self._vector, "filter": self._filter},
        )
        if guard_field is not None and guard_field not in self.names:
            raise ConfigError(f"{self._uri}: there is no column '{guard_field}' to guard by")
        with self._errors("trying the filter"):
            first = self._run(f"SELECT typeof({self._key}) FROM {{rows}} LIMIT 1")
        self._text = bool(first) and first[0][0] == "text"

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool,
        filter: str | None = None,  # noqa: A002 SQL's word is WHERE
        guard_field: str | None = None,
    ) -> SqliteStore:
        """Open ``sqlite-vec:FILE?table=T&column=C``."""
        place, told = parse_address(uri, ("table", "column", "filter"))
        return cls(
            Path(place),
            told.get("table"),
            told.get("column"),
            read_only=read_only,
            filter=filter or told.get("filter"),
            guard_field=guard_field,
        )

    def __enter__(self) -> SqliteStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def info(self) -> StoreInfo:
        """Describe the table."""
        with self._errors("counting rows"):
            ((count,),) = self._run("SELECT count(*) FROM {rows}")
        place = beside(self._path, ".simskip") / quote(self._table, safe="")
        return StoreInfo(
            uri=self._uri,
            kind="sqlite-vec, vec0",
            count=count,
            dim=self._dim,
            metric=self._metric,
            exhaustive=True,
            payload=True,
            partial=self._filter is not None,
            state=place / self._label,
            claim=place,
            details={"id": self._id},
        )

    def _pages(
        self, batch_size: int, fields: Sequence[str], cursor: Cursor | None
    ) -> Iterator[VectorBatch]:
        """Yield rows by ascending id: the table has no order, so windows of them are sorted."""
        later = "" if cursor is None else f"AND {self._key} > ?"
        with self._errors("reading ids"):
            found = self._run(
                f"SELECT {self._key} FROM {{rows}} {later} ORDER BY {self._key}",
                () if cursor is None else (cursor,),
            )
        ids = self._ids([row[0] for row in found])
        size = max(1, _WINDOW_BYTES // (4 * self._dim))
        for begin in range(0, len(ids), size):
            some = ids[begin : begin + size]
            ends = [_plain(some[0]), _plain(some[-1])]
            rows = self._rows_where(f"{self._key} BETWEEN ? AND ?", [ends], fields)
            rows.sort(key=itemgetter(0))
            for start in range(0, len(rows), batch_size):
                page = rows[start : start + batch_size]
                yield replace(self._batch(page, fields), cursor=page[-1][0])

    def _read(self, ids: Ids) -> VectorBatch:
        if ids.dtype.kind != ("S" if self._text else "i"):
            ids = ids[:0]
        keys, fields = [_plain(key) for key in ids], [] if self._guard is None else [self._guard]
        if self._size > _ROWS_PASSED * len(keys):
            rows = self._rows_where(f"{self._key} = ?", [[key] for key in keys], fields)
        else:
            some = f"{self._key} IN (SELECT value FROM json_each(?))"
            rows = self._rows_where(some, [[json.dumps(keys)]], fields)
        return self._batch(rows, fields)

    def _rows_where(
        self, condition: str, values: Sequence[Sequence[Any]], fields: Sequence[str]
    ) -> list[tuple[Any, ...]]:
        """Return id, vector and fields of rows, in any order, that meet a condition."""
        columns = ", ".join([self._key, *map(_name, (self._vector, *fields))])
        query, given = self._told(f"SELECT {columns} FROM {{rows}} AND {condition}")
        with self._errors("reading rows"):
            return list(self._db.executemany(query, ([*given, *some] for some in values)))

    def _batch(self, rows: Sequence[tuple[Any, ...]], fields: Sequence[str]) -> VectorBatch:
        odd = next((row[0] for row in rows if len(row[1]) != 4 * self._dim), None)
        if odd is not None:
            raise DataError(f"{self._uri}: the vector of {odd} has not {self._dim} numbers")
        data = b"".join(row[1] for row in rows)
        return VectorBatch(
            ids=self._ids([row[0] for row in rows]),
            vectors=np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, self._dim),
            fields={name: [row[2 + at] for row in rows] for at, name in enumerate(fields)},
        )

    def _write(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Ids:
        with self._errors("writing rows"), self._transaction():
            now = self._read(ids)
            chosen = now.ids[allowed(now)] if len(now) else now.ids
            new = np.ascontiguousarray(vectors[places(chosen, ids)], "<f4")
            self._db.executemany(
                f"UPDATE {_name(self._table)} SET {_name(self._vector)} = ? WHERE {self._key} = ?",
                ((row.tobytes(), _plain(key)) for row, key in zip(new, chosen, strict=True)),
            )
            return chosen

    def _nearest(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        if params:
            raise ConfigError(f"{self._uri}: exact search has no parameters, not {sorted(params)}")
        if k > _MOST_NEIGHBOURS:
            raise ConfigError(
                f"{self._uri}: sqlite-vec finds at most {_MOST_NEIGHBOURS} rows, not {k}"
            )
        ids = np.full((len(queries), k), b"" if self._text else -1, object)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        near = f"{_name(self._vector)} MATCH ? AND k = ?"
        query = f"SELECT {self._key}, distance FROM {{rows}} AND {near}"
        with self._errors("searching"):
            for at, vector in enumerate(np.ascontiguousarray(queries, "<f4")):
                found = self._run(query, (vector.tobytes(), k))
                ids[at, : len(found)] = [_encoded(key) for key, _ in found]
                scores[at, : len(found)] = [self._score(distance) for _, distance in found]
        flat = id_text(ids.ravel().tolist()) if self._text else ids.ravel().astype(np.int64)
        return Neighbors(ids=flat.reshape(ids.shape), scores=scores)

    def _score(self, distance: float) -> float:
        return 1 - distance if self._metric is Metric.COSINE else -(distance**2)

    def _notes(self) -> dict[str, dict[str, Any]]:
        with self._errors("reading who wrote"):
            if not self._has_notes():
                return {}
            query = f"SELECT key, note FROM {_NOTES} WHERE about = ?"
            return {key: json.loads(note) for key, note in self._db.execute(query, (self._table,))}

    def _keep_note(self, key: str, note: Mapping[str, Any] | None) -> None:
        with self._errors("noting who writes"), self._transaction():
            if note is not None:
                self._db.execute(
                    f"CREATE TABLE IF NOT EXISTS {_NOTES} "
                    "(about TEXT, key TEXT, note TEXT NOT NULL, PRIMARY KEY (about, key))"
                )
                values = (self._table, key, json.dumps(dict(note)))
                self._db.execute(f"INSERT OR REPLACE INTO {_NOTES} VALUES (?, ?, ?)", values)
            elif self._has_notes():
                gone = f"DELETE FROM {_NOTES} WHERE about = ? AND key = ?"
                self._db.execute(gone, (self._table, key))

    def _has_notes(self) -> bool:
        known = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(list(self._db.execute(known, (_NOTES,))))

    def _choose(self, table: str | None, column: str | None) -> _Column:
        made = "SELECT name, sql FROM sqlite_master WHERE sql LIKE '%vec0%' ORDER BY name"
        there = [
            _Column(name, found[1], found[2].lower(), int(found[3]), found[4] or "")
            for name, text in self._db.execute(made)
            if re.search(r"using\s+vec0", text, re.IGNORECASE)
            for found in _VECTORS.finditer(text.partition("(")[2])
        ]
        fitting = [c for c in there if table in (None, c.table) and column in (None, c.name)]
        if not fitting:
            raise StoreNotFoundError(
                f"{self._uri}: there is no such table of vectors (vec0); there are: "
                f"{listed([f'table={c.table}&column={c.name}' for c in there])}"
            )
        if len(fitting) > 1:
            several = listed([f"table={c.table}&column={c.name}" for c in fitting])
            raise ConfigError(f"{self._uri}: say in the address which vectors are meant: {several}")
        (found,) = fitting
        if found.kind not in ("float", "f32"):
            raise UnsupportedIndexError(
                f"{self._uri}: {found.table}.{found.name} holds {found.kind}, which is not "
                "refined; give a column of float"
            )
        return found

    @cached_property
    def _size(self) -> int:
        """Rows of the table, about."""
        with self._errors("counting rows"):
            ((count,),) = self._db.execute(f"SELECT count(*) FROM {_name(self._table)}")
        return int(count)

    @property
    def _key(self) -> str:
        return _name(self._id)

    def _ids(self, keys: Sequence[Any]) -> Ids:
        if self._text:
            return id_text([key.encode() for key in keys])
        return np.array(keys, np.int64)

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        told, given = self._told(query)
        return list(self._db.execute(told, [*given, *values]))

    def _told(self, query: str) -> tuple[str, list[str]]:
        """Return a query, in which ``{rows}`` stands for the table and the filter, and values."""
        condition, given = "1", []
        if self._filter is not None:
            plain = plain_filter(self._filter)
            condition = f"({self._filter})"
            if plain is not None:
                if plain[0] not in self.names:
                    raise ConfigError(f"{self._uri}: there is no column '{plain[0]}' to filter by")
                condition, given = f"{_name(plain[0])} = ?", [plain[1]]
        return query.format(rows=f"{_name(self._table)} WHERE {condition}"), given

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write while nobody else does."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except SimskipError:
            raise
        except (apsw.BusyError, apsw.LockedError) as error:
            raise TransientStoreError(
                f"{self._uri}: {doing}: another process holds the file ({error}); the same command "
                "goes on later"
            ) from error
        except (apsw.ReadOnlyError, apsw.PermissionsError, apsw.CantOpenError) as error:
            raise StoreError(f"{self._uri}: {doing}: {error}; allow writing the file") from error
        except apsw.SQLError as error:
            raise ConfigError(f"{self._uri}: {doing}: {error}; correct the filter") from error
        except apsw.Error as error:
            raise StoreError(f"{self._uri}: {doing}: {error}") from error


def _name(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def _plain(key: Any) -> int | str:  # noqa: ANN401 an id
    return key.decode() if isinstance(key, bytes) else int(key)


def _encoded(key: Any) -> Any:  # noqa: ANN401 an id
    return key.encode() if isinstance(key, str) else key
