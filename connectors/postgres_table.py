"""Which table, column and index of a database are meant, and whether they can be refined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import (
    ConfigError,
    StoreNotFoundError,
    UnsupportedIndexError,
    listed,
)

_METRICS = {"cosine": Metric.COSINE, "ip": Metric.DOT, "l2": Metric.EUCLID}
_VECTORS = ("vector", "halfvec")
_OTHERS = ("bit", "sparsevec")
_NUMBERS = ("smallint", "integer", "bigint")
_TEXTS = ("text", "character varying", "uuid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of a table.

    Attributes:
        schema: Its schema.
        name: Its name, with the schema.
        short: Without it.
        column: The column of vectors.
        kind: Their type: ``vector`` or ``halfvec``.
        dim: Dimension.
        id: The column that tells rows apart.
        id_type: Its type.
        metric: How vectors are compared.
        index: The index over the vectors, such as ``hnsw``; None where there is none.
        index_name: Its name.
        fields: Names of the other columns.
    """

    schema: str
    name: str
    short: str
    column: str
    kind: str
    dim: int
    id: str
    id_type: str
    metric: Metric
    index: str | None
    index_name: sql.Composable
    fields: Sequence[str]

    @property
    def identifier(self) -> sql.Composable:
        """The table, as SQL names it."""
        return sql.Identifier(self.schema, self.short)

    def beside(self, name: str) -> sql.Composable:
        """Another table of the same schema."""
        return sql.Identifier(self.schema, name)

    @property
    def text(self) -> bool:
        """Whether ids are text."""
        return self.id_type not in _NUMBERS

    @property
    def half(self) -> bool:
        """Whether numbers have 16 bits."""
        return self.kind == "halfvec"


def find_table(
    db: psycopg.Connection[Any],
    uri: str,
    table: str | None,
    column: str | None,
    key: str | None,
    metric: Metric | None,
) -> Table:
    """Find what an address means.

    Raises:
        StoreNotFoundError: There is none.
        ConfigError: There are several, and the address does not choose.
        UnsupportedIndexError: It cannot be refined.
    """
    candidates = db.execute(
        "SELECT c.oid, n.nspname, c.relname, a.attname FROM pg_attribute a "
        "JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
        "JOIN pg_type t ON t.oid = a.atttypid WHERE t.typname = ANY(%s) AND a.attnum > 0 "
        "AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm', 'f') "
        "ORDER BY n.nspname, c.relname, a.attname",
        [[*_VECTORS, *_OTHERS]],
    ).fetchall()
    found = [
        row
        for row in candidates
        if (table is None or table in (row[2], f"{row[1]}.{row[2]}"))
        and (column is None or row[3] == column)
    ]
    there = listed([f"table={row[1]}.{row[2]}&column={row[3]}" for row in candidates])
    if not found:
        raise StoreNotFoundError(f"{uri}: there is no such column of vectors; there are: {there}")
    if len(found) > 1:
        several = listed([f"table={row[1]}.{row[2]}&column={row[3]}" for row in found])
        raise ConfigError(f"{uri}: say in the address which vectors are meant: {several}")
    oid, schema, short, column = found[0]
    where = f"{uri}: {schema}.{short}"
    _refuse_relation(db, oid, where)
    names = _columns(db, oid)
    kind, dim = _vector_type(db, oid, schema, short, column, where)
    key, id_type = _key(db, oid, names, key, where)
    name, index, own = _index(db, oid, column, where, metric)
    return Table(
        schema=schema,
        name=f"{schema}.{short}",
        short=short,
        column=column,
        kind=kind,
        dim=dim,
        id=key,
        id_type=id_type,
        metric=own,
        index=index,
        index_name=sql.Identifier(schema, name or short),
        fields=[each for each in names if each not in (key, column)],
    )


def _refuse_relation(db: psycopg.Connection[Any], oid: int, where: str) -> None:
    ((kind, hidden, child),) = db.execute(
        "SELECT relkind::text, row_security_active(oid), relispartition FROM pg_class "
        "WHERE oid = %s",
        [oid],
    ).fetchall()
    kinds = {"p": "a partitioned table", "v": "a view", "m": "a materialised view",
             "f": "a foreign table"}  # fmt: skip
    if kind in kinds or child:
        what = kinds.get(kind, "a partition of a table")
        raise UnsupportedIndexError(f"{where} is {what}, which is not refined; give a plain table")
    if hidden:
        raise UnsupportedIndexError(
            f"{where}: row-level security hides rows from this user, and what is hidden could not "
            "be told from what is gone; use a user that may see all of them (BYPASSRLS)"
        )


def _columns(db: psycopg.Connection[Any], oid: int) -> dict[str, str]:
    rows = db.execute(
        "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute "
        "WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        [oid],
    ).fetchall()
    return dict(rows)


def _vector_type(
    db: psycopg.Connection[Any], oid: int, schema: str, short: str, column: str, where: str
) -> tuple[str, int]:
    ((kind, dim, generated),) = db.execute(
        "SELECT t.typname, a.atttypmod, a.attgenerated::text FROM pg_attribute a "
        "JOIN pg_type t ON t.oid = a.atttypid WHERE a.attrelid = %s AND a.attname = %s",
        [oid, column],
    ).fetchall()
    if kind not in _VECTORS:
        raise UnsupportedIndexError(
            f"{where}.{column} holds {kind}, which is not refined; give a column of vector or "
            "halfvec"
        )
    if generated:
        raise UnsupportedIndexError(
            f"{where}.{column} is generated from other columns and cannot be written"
        )
    if dim > 0:
        return kind, dim
    query = sql.SQL("SELECT DISTINCT vector_dims({c}) FROM {t} WHERE {c} IS NOT NULL LIMIT 2")
    names = {"c": sql.Identifier(column), "t": sql.Identifier(schema, short)}
    dims = [row[0] for row in db.execute(query.format(**names)).fetchall()]
    if len(dims) != 1:
        raise UnsupportedIndexError(
            f"{where}.{column} holds "
            + ("vectors of several lengths" if dims else "no vector")
            + "; give a column of vectors of one encoder"
        )
    return kind, int(dims[0])


def _key(
    db: psycopg.Connection[Any], oid: int, names: dict[str, str], key: str | None, where: str
) -> tuple[str, str]:
    """Return the column that tells rows apart, and its type."""
    unique = db.execute(
        "SELECT a.attname, i.indisprimary FROM pg_index i "
        "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
        "WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 "
        "AND i.indpred IS NULL AND i.indexprs IS NULL ORDER BY i.indisprimary DESC",
        [oid],
    ).fetchall()
    known = {name: primary for name, primary in unique}
    if key is None:
        key = next((name for name, primary in known.items() if primary), None)
        if key is None:
            raise ConfigError(
                f"{where} has no primary key of one column; name a column with a unique index: "
                f"?id=NAME (there are: {listed(list(known))})"
            )
    if key not in names:
        raise StoreNotFoundError(f"{where} has no column '{key}'; there are: {listed(list(names))}")
    if key not in known:
        raise UnsupportedIndexError(
            f"{where}.{key} has no unique index, so an id could stand for several rows; make one, "
            f"or name another column (there are: {listed(list(known))})"
        )
    if names[key] not in (*_NUMBERS, *_TEXTS):
        raise UnsupportedIndexError(
            f"{where}.{key} is of type {names[key]}; ids are whole numbers, text or UUIDs"
        )
    return key, names[key]


def _index(
    db: psycopg.Connection[Any], oid: int, column: str, where: str, metric: Metric | None
) -> tuple[str | None, str | None, Metric]:
    """Return name and kind of the index over the vectors, and how they are compared."""
    rows = db.execute(
        "SELECT c.relname, m.amname, o.opcname FROM pg_index i JOIN pg_class c "
        "ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam "
        "JOIN pg_opclass o ON o.oid = i.indclass[0] JOIN pg_attribute a "
        "ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
        "WHERE i.indrelid = %s AND a.attname = %s AND m.amname IN ('hnsw', 'ivfflat')",
        [oid, column],
    ).fetchall()
    found = {}
    for name, kind, operators in rows:
        own = _METRICS.get(operators.removesuffix("_ops").partition("_")[2])
        if own is not None and (metric is None or own is metric):
            found[own] = (name, kind, own)
    if len(found) > 1:
        ways = ", ".join(own.value for own in found)
        raise ConfigError(f"{where}: its indexes compare by {ways}; say which with ?metric=")
    return next(iter(found.values()), (None, None, metric or Metric.COSINE))
