"""sqlite-vec: refined in transactions, and nothing else in the file is changed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import clusters, random_refiner
from click.testing import CliRunner

import simskip_vdb as ss
from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Ids, Metric, Vectors, id_names, id_text
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

apsw: Any = pytest.importorskip("apsw")
sqlite_vec: Any = pytest.importorskip("sqlite_vec")

D = 8
KINDS = {"text": "id text primary key, ", "integer": "id integer primary key, ", "rowid": ""}


def connect(path: Path) -> Any:  # noqa: ANN401 apsw has no types of its own here
    db = apsw.Connection(str(path))
    db.enable_load_extension(True)
    db.load_extension(sqlite_vec.loadable_path())
    db.set_busy_timeout(20_000)
    return db


def make_table(
    path: Path, ids: Ids, vectors: Vectors, metric: Metric = Metric.COSINE, kind: str = "integer"
) -> str:
    """Make a file with a table of vectors, and another table beside it; return its address."""
    path.unlink(missing_ok=True)
    distance = "cosine" if metric is Metric.COSINE else "l2"
    db = connect(path)
    db.execute(
        f"CREATE VIRTUAL TABLE docs USING vec0({KINDS[kind]}v float[{vectors.shape[1]}] "
        f"distance_metric={distance}, lang text, version integer, +body text)"
    )
    db.execute("CREATE TABLE other (a, b)")
    db.execute("INSERT INTO other VALUES (1, 'x')")
    keys = id_names(ids) if kind == "text" else ids.tolist()
    name = "rowid" if kind == "rowid" else "id"
    with db:
        db.executemany(
            f"INSERT INTO docs ({name}, v, lang, version, body) VALUES (?, ?, ?, 0, ?)",
            [
                (key, row.tobytes(), "de" if at % 2 else "en", f"body {at}")
                for at, (key, row) in enumerate(zip(keys, vectors, strict=True))
            ],
        )
    db.close()
    return f"sqlite-vec:{path}"


def rows_of(path: Path, name: str = "id") -> tuple[list[Any], Vectors]:
    db = connect(path)
    rows = list(db.execute(f"SELECT {name}, v FROM docs ORDER BY {name}"))
    db.close()
    return [key for key, _ in rows], np.array([np.frombuffer(v, np.float32) for _, v in rows])


def others_of(path: Path) -> list[Any]:
    db = connect(path)
    found = [
        *db.execute("SELECT id, lang, version, body FROM docs"),
        *db.execute("SELECT * FROM other"),
    ]
    db.close()
    return found


class TestSqliteVec(RowContract):
    metrics = (Metric.COSINE, Metric.EUCLID)

    @pytest.fixture(autouse=True, params=KINDS)
    def _kind(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.kind, self.path = request.param, tmp_path / "rows.db"

    @pytest.fixture
    def ids(self) -> Ids:
        numbers = np.arange(self.count) * 3
        if self.kind != "text":
            return numbers
        return id_text([f"straße-{i:03}".encode() for i in numbers])

    def unknown_id(self, ids: Ids) -> Ids:
        return id_text([b"zzz"]) if self.kind == "text" else super().unknown_id(ids)

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        return open_store(make_table(self.path, ids, vectors, metric, self.kind))

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        keys, vectors = rows_of(self.path, "rowid" if self.kind == "rowid" else "id")
        if self.kind == "text":
            return id_text([key.encode() for key in keys]), vectors
        return np.array(keys, np.int64), vectors

    def test_abilities(self, store: VectorStore) -> None:
        assert isinstance(store, RowWritable)
        assert isinstance(store, Marked)
        assert isinstance(store, Claimable)


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((50, D)).astype(np.float32)


def refine(uri: str, folder: Path, seed: int = 0) -> ss.Refiner:
    store = open_store(uri)
    ids = np.concatenate([batch.ids for batch in store.scan(100)])
    refiner = random_refiner(D, ids, seed, metric=store.info().metric)
    refiner.save(folder / f"refiner-{seed}")
    settings = ss.Settings(refiner=folder / f"refiner-{seed}", accept_unmeasured=True)
    assert ss.refine(store, ss.Judgments(), settings).written is not None
    return refiner


def test_only_vectors_change_and_come_back(tmp_path: Path, vectors: Vectors) -> None:
    path = tmp_path / "a.db"
    uri = make_table(path, np.arange(50), vectors)
    others = others_of(path)
    refiner = refine(uri, tmp_path)
    wanted = refiner.refine_rows(vectors, np.arange(50))
    np.testing.assert_array_equal(rows_of(path)[1], wanted)
    assert others_of(path) == others
    refine(uri, tmp_path, 1)
    assert ss.status(open_store(uri))["refined"]["refiner"]
    assert ss.rollback(open_store(uri))["exact"]
    np.testing.assert_array_equal(rows_of(path)[1], vectors)
    assert others_of(path) == others


def test_a_gain_is_proven_by_the_command_line(tmp_path: Path, rng: np.random.Generator) -> None:
    docs, asked, rows, groups = clusters(rng, 600, 200)
    path = tmp_path / "a.db"
    uri = make_table(path, np.arange(600), docs)
    np.save(tmp_path / "q.npy", asked)
    (tmp_path / "q.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    pairs = ((i, row) for i, group in enumerate(groups) for row in np.flatnonzero(rows == group))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\tbody {j}\t1\n" for i, j in pairs))
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    options = [word if word.startswith("--") else str(tmp_path / word) for word in given]
    words = ["refine", uri, *options, "--doc-ids", "body"]
    run = CliRunner().invoke(cli, words, standalone_mode=False)
    assert run.exit_code == 0, run.output
    assert "written: 600 rows" in run.output
    assert CliRunner().invoke(cli, ["rollback", uri], standalone_mode=False).exit_code == 0
    np.testing.assert_array_equal(rows_of(path)[1], docs)


def test_rows_of_a_filter(tmp_path: Path, vectors: Vectors) -> None:
    path = tmp_path / "a.db"
    uri = make_table(path, np.arange(50), vectors)
    for text in ("lang=en", "lang = 'en' AND version < 1"):
        store = open_store(uri, filter=text)
        assert (store.info().count, store.info().partial) == (25, True)
        found = store.search(vectors[:3], 30, {})
        assert set(found.ids[0, :25].tolist()) == set(range(0, 50, 2))
    refine(f"{uri}?filter=lang%3Den", tmp_path)
    moved = (rows_of(path)[1] != vectors).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(0, 50, 2))
    with pytest.raises(ConfigError, match="refined under the filter 'lang=en'"):
        refine(uri, tmp_path, 1)
    assert ss.rollback(open_store(f"{uri}?filter=lang%3Den"))["exact"]
    np.testing.assert_array_equal(rows_of(path)[1], vectors)


def test_an_application_that_writes_meanwhile_wins(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    vectors = rng.standard_normal((3000, D)).astype(np.float32)
    path = tmp_path / "a.db"
    uri = make_table(path, np.arange(3000), vectors)
    theirs: dict[int, Any] = {}
    stop = threading.Event()

    def write() -> None:
        own, db = np.random.default_rng(1), connect(path)
        while not stop.is_set():
            key, row = int(own.integers(3000)), own.standard_normal(D).astype(np.float32)
            db.execute("UPDATE docs SET v = ? WHERE id = ?", (row.tobytes(), key))
            theirs[key] = row
            time.sleep(0.002)
        db.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        refine(uri, tmp_path)
        ss.rollback(open_store(uri))
    finally:
        stop.set()
        writer.join()
    assert len(theirs) > 20
    now = rows_of(path)[1]
    kept = [np.array_equal(now[key], theirs.get(key, vectors[key])) for key in range(3000)]
    assert all(kept)


def test_a_file_that_is_held_for_long_is_told(
    tmp_path: Path, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simskip_vdb.connectors.sqlite_store._WAIT_MS", 100)
    uri = make_table(tmp_path / "a.db", np.arange(50), vectors)
    store: Any = open_store(uri)
    (batch,) = store.scan(50)
    holder = connect(tmp_path / "a.db")
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransientStoreError, match="another process holds the file"):
        store.update(batch, lambda now: np.ones(len(now), np.bool_))
    holder.execute("ROLLBACK")


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
def test_kills_lose_nothing(tmp_path: Path, rng: np.random.Generator, command: str) -> None:
    vectors = rng.standard_normal((4000, D)).astype(np.float32)
    path = tmp_path / "a.db"
    uri = make_table(path, np.arange(4000), vectors)
    refiner = refine(uri, tmp_path)
    new = refiner.refine_rows(vectors, np.arange(4000))
    words = [sys.executable, "-c", KILLED, command, uri, str(tmp_path / "refiner-0")]
    settings = ss.Settings(refiner=tmp_path / "refiner-0", accept_unmeasured=True)
    if command == "refine":
        ss.rollback(open_store(uri))
    started = time.monotonic()
    subprocess.run(words, check=True)
    whole = time.monotonic() - started
    killed = 0
    for at in range(6):
        if command == "refine":
            ss.rollback(open_store(uri))
        else:
            ss.refine(open_store(uri), ss.Judgments(), settings)
        child = subprocess.Popen(words)
        time.sleep(whole * (0.3 + 0.12 * at))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait()
        now = rows_of(path)[1]
        assert ((now == vectors).all(axis=1) | (now == new).all(axis=1)).all()
        subprocess.run(words, check=False, stderr=subprocess.DEVNULL)
        wanted = new if command == "refine" else vectors
        np.testing.assert_array_equal(rows_of(path)[1], wanted)
    assert killed > 0


@pytest.mark.parametrize(
    ("made", "options", "kind", "match"),
    [
        ("a float[3]", "?table=gone", StoreNotFoundError, "no such table.*table=t&column=a"),
        ("a float[3], b float[3]", "", ConfigError, "table=t&column=a, table=t&column=b"),
        ("a int8[3]", "", UnsupportedIndexError, "holds int8"),
        ("a bit[8]", "", UnsupportedIndexError, "holds bit"),
        ("a float[3] distance_metric=L1", "", UnsupportedIndexError, "compares by L1"),
        ("a float[3]", "?filter=a%20%3D%3D%3D%20x", ConfigError, "correct the filter"),
        ("a float[3]", "?filter=colour%3Dred", ConfigError, "no column 'colour'"),
    ],
)
def test_what_cannot_be_refined_is_named(
    tmp_path: Path, made: str, options: str, kind: type[SimskipError], match: str
) -> None:
    db = connect(tmp_path / "a.db")
    db.execute(f"CREATE VIRTUAL TABLE t USING vec0({made})")
    db.close()
    with pytest.raises(kind, match=match):
        open_store(f"sqlite-vec:{tmp_path}/a.db{options}")


def test_other_files_are_named(tmp_path: Path, vectors: Vectors) -> None:
    np.save(tmp_path / "a.npy", vectors)
    with pytest.raises(StoreError, match="its address is npy:"):
        open_store(f"sqlite-vec:{tmp_path}/a.npy")
    with pytest.raises(StoreNotFoundError, match="no such file"):
        open_store(f"sqlite-vec:{tmp_path}/b.db")
    db = connect(tmp_path / "plain.db")
    db.execute("CREATE TABLE a (b)")
    db.close()
    with pytest.raises(StoreNotFoundError, match="there are: none"):
        open_store(f"sqlite-vec:{tmp_path}/plain.db")
