"""Rows of a Postgres table, with vectors of pgvector."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import numpy as np
import platformdirs
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from simskip_vdb.connectors.live_rows import LiveRows, places, plain_filter
from simskip_vdb.connectors.postgres_table import find_table
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Metric,
    Neighbors,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
    id_names,
    id_text,
)
from simskip_vdb.errors import (
    ConfigError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
)
from simskip_vdb.store import Allowed

_OURS = ("table", "column", "id", "metric", "filter")
_OPERATORS = {Metric.COSINE: "<=>", Metric.DOT: "<#>", Metric.EUCLID: "<->"}
_SETTINGS = {"ef_search": "hnsw.ef_search", "probes": "ivfflat.probes"}
_QUERIES = 64
_NOTES = "simskip"
_LOCK_WAIT = "10s"
_WRONG_SQL = "42"


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresOptions:
    """What an address says beside the server.

    Attributes:
        table: Name, with its schema where it is not on the search path; None for the only one.
        column: The column of vectors; None for the only one.
        id: A column that tells rows apart; None for the primary key.
        metric: How the application compares vectors; None for that of the column's index.
        filter: ``FIELD=VALUE``, or a condition in SQL; None for all rows.
    """

    table: str | None = None
    column: str | None = None
    id: str | None = None
    metric: Metric | None = None
    filter: str | None = None


class PostgresStore(LiveRows):
    """A `RowStore` of a table.

    Rows are locked, read again and written in one transaction, a page at a time, so that no write
    of an application is ever lost. Rows without a vector are none.
    """

    def __init__(
        self,
        url: str,
        options: PostgresOptions | None = None,
        *,
        read_only: bool = False,
        guard_field: str | None = None,
    ) -> None:
        """Connect.

        Args:
            url: The server and database, as libpq takes it.
            options: Which vectors are meant.
            read_only: Refuse every write.
            guard_field: A column that the application changes on each of its writes.

        Raises:
            StoreNotFoundError: There is no such table or column.
            UnsupportedIndexError: It cannot be refined.
            ConfigError: The address does not say which one is meant, or the filter is wrong.
            StoreError: The server refuses.
            TransientStoreError: It does not answer.
        """
        options = options or PostgresOptions()
        self._read_only, self._guard, self._filter = read_only, guard_field, options.filter
        self._where = _without_password(url)
        self._uri = self._where
        with self._errors("connecting"):
            self._db = psycopg.connect(url, autocommit=True)
        weakref.finalize(self, self._db.close)
        try:
            with self._errors("looking at the table"):
                self._table = find_table(
                    self._db, self._uri, options.table, options.column, options.id, options.metric
                )
            self._uri = self._address(options)
            self._dim, self._metric = self._table.dim, self._table.metric
            self._vector = self._table.column
            self.names = self._table.fields
            if guard_field is not None and guard_field not in self.names:
                raise ConfigError(f"{self._uri}: there is no column '{guard_field}' to guard by")
            with self._errors("trying the filter"):
                self._run("SELECT 1 FROM {table} WHERE {rows} LIMIT 1")
        except BaseException:
            self._db.close()
            raise

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool,
        filter: str | None = None,  # noqa: A002 SQL's word is WHERE
        guard_field: str | None = None,
    ) -> PostgresStore:
        """Open ``postgresql://[USER@]HOST[:PORT]/DATABASE?table=T&column=C&id=COL``.

        Further options: ``metric`` (``cosine``, ``dot``, ``euclid``), ``filter``, and libpq's. The
        password comes from the URL, PGPASSWORD or ``~/.pgpass``; it is shown nowhere.
        """
        parts = urlsplit(uri)
        given = parse_qsl(parts.query, keep_blank_values=True)
        own = {name: value for name, value in given if name in _OURS}
        rest = urlencode([(name, value) for name, value in given if name not in _OURS])
        try:
            metric = Metric(own["metric"]) if "metric" in own else None
        except ValueError as error:
            raise ConfigError(f"{_without_password(uri)}: {error}") from None
        options = PostgresOptions(
            table=own.get("table"),
            column=own.get("column"),
            id=own.get("id"),
            metric=metric,
            filter=filter or own.get("filter"),
        )
        url = urlunsplit(parts._replace(query=rest))
        return cls(url, options, read_only=read_only, guard_field=guard_field)

    def __enter__(self) -> PostgresStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def info(self) -> StoreInfo:
        """Describe the table; `count` is the rows that have a vector."""
        with self._errors("counting rows"):
            ((count,),) = self._run("SELECT count(*) FROM {table} WHERE {rows}")
        table = self._table
        parts = urlsplit(self._where)
        host = quote(f"{parts.hostname or 'local'}:{parts.port or 5432}{parts.path}", safe="")
        place = (
            platformdirs.user_state_path("simskip-vdb") / "postgresql" / host / quote(table.name)
        )
        return StoreInfo(
            uri=self._uri,
            kind=f"Postgres, {table.kind}, {table.index or 'no index'}",
            count=count,
            dim=self._dim,
            metric=self._metric,
            exact=not table.half,
            exhaustive=table.index is None,
            payload=True,
            partial=self._filter is not None,
            state=place / self._label,
            claim=place,
            details={"id": table.id, "type": table.kind},
        )

    def settle(self, progress: Progress) -> None:
        """Build an IVFFlat index again, whose lists are those of the old vectors.

        An HNSW index follows every write by itself.
        """
        self._writable()
        table = self._table
        if table.index is None or not table.index.startswith("ivfflat"):
            return
        progress("index", 0, 1)
        with self._errors("building the index again"):
            self._db.execute(sql.SQL("REINDEX INDEX CONCURRENTLY {}").format(table.index_name))
        progress("index", 1, 1)

    def _page(self, after: Cursor | None, limit: int, fields: Sequence[str]) -> VectorBatch:
        start = "" if after is None else "AND {id} > %(after)s"
        values = {"limit": limit} if after is None else {"limit": limit, "after": after}
        query = f"SELECT {{columns}} FROM {{table}} WHERE {{rows}} {start} ORDER BY {{id}}"
        with self._errors("reading rows"):
            rows = self._run(f"{query} LIMIT %(limit)s", values, fields)
        return self._batch(rows, fields)

    def _read(self, ids: Ids, lock: str = "") -> VectorBatch:
        fields = [] if self._guard is None else [self._guard]
        query = "SELECT {columns} FROM {table} WHERE {rows} AND {id} = ANY({ids})"
        with self._errors("reading rows"):
            rows = self._run(f"{query} ORDER BY {{id}} {lock}", {"ids": _sent(ids)}, fields)
        return self._batch(rows, fields)

    def _write(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Ids:
        with self._errors("writing rows"), self._db.transaction():
            self._db.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'")
            now = self._read(ids, "FOR UPDATE")
            chosen = now.ids[allowed(now)] if len(now) else now.ids
            if not len(chosen):
                return chosen
            temporary = sql.SQL(
                "CREATE TEMP TABLE IF NOT EXISTS simskip_new (n int8, v {}) ON COMMIT DELETE ROWS"
            )
            self._db.execute(temporary.format(sql.SQL(self._table.kind)))
            with (
                self._db.cursor() as cursor,
                cursor.copy("COPY simskip_new (n, v) FROM STDIN (FORMAT BINARY)") as copy,
            ):
                copy.write(_copied(vectors[places(chosen, ids)], half=self._table.half))
            self._run(
                "UPDATE {table} SET {column} = simskip_new.v FROM simskip_new JOIN "
                "unnest({ids}) WITH ORDINALITY AS k(id, n) USING (n) WHERE {own_id} = k.id "
                "RETURNING 1",
                {"ids": _sent(chosen)},
            )
            return chosen

    def _nearest(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        exact = bool(params.get("exact", False))
        for name in params:
            if name not in (*_SETTINGS, "exact"):
                raise ConfigError(
                    f"{self._uri}: there is no search parameter '{name}'; there are: "
                    f"{', '.join((*_SETTINGS, 'exact'))}"
                )
        nothing = b"" if self._table.text else -1
        ids = np.full((len(queries), k), nothing, object)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = (
            "SELECT q.n, r.id, r.d FROM unnest(%(queries)s::text[]) WITH ORDINALITY AS q(v, n), "
            "LATERAL (SELECT {id} AS id, {column} {near} q.v::{kind} AS d FROM {table} "
            "WHERE {rows} ORDER BY {column} {near} q.v::{kind} LIMIT %(k)s) AS r ORDER BY q.n, r.d"
        )
        for start in range(0, len(queries), _QUERIES):
            texts = [json.dumps(query) for query in queries[start : start + _QUERIES].tolist()]
            with self._errors("searching"), self._db.transaction():
                if exact:
                    self._db.execute("SET LOCAL enable_indexscan = off")
                for name, setting in _SETTINGS.items():
                    if name in params:
                        number = sql.Literal(int(params[name]))
                        self._db.execute(sql.SQL(f"SET LOCAL {setting} = {{}}").format(number))
                rows = self._run(found, {"queries": texts, "k": k})
            taken = np.zeros(len(texts), np.int64)
            for n, row, distance in rows:
                at = n - 1
                ids[start + at, taken[at]] = row if not self._table.text else str(row).encode()
                scores[start + at, taken[at]] = self._score(distance)
                taken[at] += 1
        shape = ids.shape
        flat = id_text(ids.ravel().tolist()) if self._table.text else ids.ravel().astype(np.int64)
        return Neighbors(ids=flat.reshape(shape), scores=scores)

    def _score(self, distance: float) -> float:
        if self._metric is Metric.EUCLID:
            return -(distance**2)
        return 1 - distance if self._metric is Metric.COSINE else -distance

    def _notes(self) -> dict[str, dict[str, Any]]:
        with self._errors("reading who wrote"):
            if not self._has_notes():
                return {}
            rows = self._run("SELECT key, note FROM {notes} WHERE about = %(about)s", self._about)
        return {key: dict(note) for key, note in rows}

    def _keep_note(self, key: str, note: Mapping[str, Any] | None) -> None:
        values = {
            **self._about,
            "key": key,
            "note": json.dumps(None if note is None else dict(note)),
        }
        with self._errors("noting who writes"), self._db.transaction():
            if note is not None and not self._has_notes():
                self._run(
                    "CREATE TABLE IF NOT EXISTS {notes} "
                    "(about text, key text, note jsonb NOT NULL, PRIMARY KEY (about, key))"
                )
            if note is not None:
                self._run(
                    "INSERT INTO {notes} (about, key, note) VALUES (%(about)s, %(key)s, %(note)s) "
                    "ON CONFLICT (about, key) DO UPDATE SET note = EXCLUDED.note",
                    values,
                )
            elif self._has_notes():
                self._run("DELETE FROM {notes} WHERE about = %(about)s AND key = %(key)s", values)

    def _has_notes(self) -> bool:
        ((found,),) = self._run(
            "SELECT to_regclass(%(name)s) IS NOT NULL", {"name": self._notes_name}
        )
        return bool(found)

    @property
    def _about(self) -> dict[str, str]:
        return {"about": self._table.name}

    @property
    def _notes_name(self) -> str:
        return self._table.beside(_NOTES).as_string(self._db)

    def _run(
        self, query: str, values: Mapping[str, Any] | None = None, fields: Sequence[str] = ()
    ) -> list[tuple[Any, ...]]:
        """Run a query, in which names in braces stand for the table's; return its rows."""
        table = self._table
        own = sql.Identifier(table.id)
        names = {
            "table": table.identifier,
            "id": own,
            "own_id": sql.SQL("{}.{}").format(table.identifier, own),
            "column": sql.Identifier(table.column),
            "columns": sql.SQL(", ").join(map(sql.Identifier, (table.id, table.column, *fields))),
            "kind": sql.SQL(table.kind),
            "near": sql.SQL(_OPERATORS[table.metric]),
            "ids": sql.SQL("%(ids)s::{}[]").format(sql.SQL(table.id_type)),
            "notes": table.beside(_NOTES),
            "rows": self._rows(),
        }
        cursor = self._db.cursor(binary=True)
        cursor.execute(sql.SQL(query).format(**names), dict(values or {}))
        return cursor.fetchall() if cursor.description is not None else []

    def _rows(self) -> sql.Composable:
        has = sql.SQL("{} IS NOT NULL").format(sql.Identifier(self._table.column))
        if self._filter is None:
            return has
        plain = plain_filter(self._filter)
        if plain is None:
            return sql.SQL("{} AND ({})").format(has, sql.SQL(self._filter.replace("%", "%%")))
        field, value = plain
        if field not in self.names:
            raise ConfigError(f"{self._uri}: there is no column '{field}' to filter by")
        same = sql.SQL("{}::text = {}").format(sql.Identifier(field), sql.Literal(value))
        return sql.SQL("{} AND {}").format(has, same)

    def _batch(self, rows: list[tuple[Any, ...]], fields: Sequence[str]) -> VectorBatch:
        names = [row[0] for row in rows]
        text = self._table.text
        ids: Ids = id_text([str(n).encode() for n in names]) if text else np.array(names, np.int64)
        width = 2 if self._table.half else 4
        odd = next((n for n, row in enumerate(rows) if len(row[1]) != 4 + width * self._dim), None)
        if odd is not None:
            raise StoreError(
                f"{self._uri}: the vector of {id_names(ids[odd : odd + 1])[0]} has another length "
                f"than {self._dim}; leave such rows out with --filter"
            )
        stored = np.dtype([("dim", ">i4"), ("numbers", f">f{width}", (self._dim,))])
        found = np.frombuffer(b"".join([row[1] for row in rows]), stored)
        vectors = np.ascontiguousarray(found["numbers"], np.float32).reshape(-1, self._dim)
        values = {name: [row[2 + at] for row in rows] for at, name in enumerate(fields)}
        last = None if not rows else (id_names(ids[-1:])[0] if text else int(ids[-1]))
        return VectorBatch(ids=ids, vectors=vectors, fields=values, cursor=last)

    def _address(self, options: PostgresOptions) -> str:
        parts = urlsplit(self._where)
        told = {
            "table": self._table.name,
            "column": self._table.column,
            "id": options.id,
            "metric": None if options.metric is None else options.metric.value,
            "filter": options.filter,
        }
        own = urlencode({k: v for k, v in told.items() if v is not None})
        return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, own)))))

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn errors of the server into ours."""
        try:
            yield
        except SimskipError:
            raise
        except psycopg.Error as error:
            _raise(error, f"{self._uri}: {doing}")


def _raise(error: psycopg.Error, what: str) -> NoReturn:
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        raise StoreError(f"{what}: {text}; grant this user what it says, or use another") from error
    if isinstance(error, (psycopg.errors.InvalidCatalogName, psycopg.errors.UndefinedTable)):
        raise StoreNotFoundError(f"{what}: {text}") from error
    if isinstance(error, (psycopg.errors.LockNotAvailable, psycopg.errors.SerializationFailure)):
        raise TransientStoreError(f"{what}: {text}; the same command goes on later") from error
    if (error.sqlstate or "").startswith(_WRONG_SQL):
        raise ConfigError(f"{what}: {text}; correct the filter") from error
    if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        raise TransientStoreError(
            f"{what}: {text}; does the server run, and are host, port, user and password right?"
        ) from error
    raise StoreError(f"{what}: {text}") from error


def _sent(ids: Ids) -> list[Any]:
    return id_names(ids) if ids.dtype.kind == "S" else ids.tolist()


def _copied(vectors: Vectors, *, half: bool) -> bytes:
    """Return numbered vectors in the binary form of COPY."""
    count, dim = vectors.shape
    width = 2 if half else 4
    row = np.dtype(
        [("fields", ">i2"), ("len", ">i4"), ("n", ">i8"), ("size", ">i4"), ("dim", ">i2"),
         ("zero", ">i2"), ("numbers", f">f{width}", (dim,))]
    )  # fmt: skip
    rows: NDArray[Any] = np.zeros(count, row)
    rows["fields"], rows["len"], rows["n"] = 2, 8, np.arange(1, count + 1)
    rows["size"], rows["dim"], rows["numbers"] = 4 + width * dim, dim, vectors
    return b"PGCOPY\n\xff\r\n\0" + bytes(8) + rows.tobytes() + b"\xff\xff"


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    user = "" if parts.username is None else f"{quote(parts.username)}@"
    host = parts.netloc.rpartition("@")[2]
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name != "password"]
    return urlunsplit(parts._replace(netloc=f"{user}{host}", query=urlencode(kept)))
