"""Random runs and an application that writes: each row is undone to its very original."""

from __future__ import annotations

import gc
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from builders import random_refiner
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import ConfigError

DIM = 8
seeds = st.integers(0, 2**16)
pytestmark = pytest.mark.filterwarnings("ignore")


class Application(ABC):
    """Whose table it is; keys are numbers, and texts of five digits where a store wants texts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def make(self, rows: Mapping[int, Vectors]) -> str:
        """Make a table compared by L2; return its address."""

    @abstractmethod
    def rows(self) -> dict[int, Vectors]:
        """Read all rows without our code."""

    @abstractmethod
    def write(self, key: int, row: Vectors) -> None:
        """Overwrite a vector."""

    @abstractmethod
    def add(self, key: int, row: Vectors) -> None:
        """Insert a row."""

    @abstractmethod
    def delete(self, key: int) -> None:
        """Delete a row."""

    def close(self) -> None:  # noqa: B027 most have nothing open
        """Let go of everything."""


class SqliteVec(Application):
    def make(self, rows: Mapping[int, Vectors]) -> str:
        pytest.importorskip("sqlite_vec")
        with self.db() as db:
            db.execute(f"CREATE VIRTUAL TABLE docs USING vec0(v float[{DIM}])")
        for key, row in rows.items():
            self.add(key, row)
        return f"sqlite-vec:{self.folder / 'rows.db'}"

    @contextmanager
    def db(self) -> Iterator[Any]:
        from test_sqlite_vec import connect

        db = connect(self.folder / "rows.db")
        try:
            yield db
        finally:
            db.close()

    def rows(self) -> dict[int, Vectors]:
        with self.db() as db:
            found = list(db.execute("SELECT rowid, v FROM docs"))
        return {key: np.frombuffer(v, np.float32) for key, v in found}

    def write(self, key: int, row: Vectors) -> None:
        with self.db() as db:
            db.execute("UPDATE docs SET v = ? WHERE rowid = ?", (row.tobytes(), key))

    def add(self, key: int, row: Vectors) -> None:
        with self.db() as db:
            db.execute("INSERT INTO docs (rowid, v) VALUES (?, ?)", (key, row.tobytes()))

    def delete(self, key: int) -> None:
        with self.db() as db:
            db.execute("DELETE FROM docs WHERE rowid = ?", (key,))


class Chroma(Application):
    def make(self, rows: Mapping[int, Vectors]) -> str:
        chromadb = pytest.importorskip("chromadb")
        self.docs = chromadb.PersistentClient(str(self.folder / "x")).create_collection(
            "docs", embedding_function=None
        )
        names = [f"{key:05}" for key in rows]
        self.docs.add(ids=names, embeddings=np.stack(list(rows.values())))
        return f"chroma:{self.folder / 'x'}"

    def rows(self) -> dict[int, Vectors]:
        found = self.docs.get(include=["embeddings"])
        vectors = np.asarray(found["embeddings"], np.float32)
        return {int(name): row for name, row in zip(found["ids"], vectors, strict=True)}

    def write(self, key: int, row: Vectors) -> None:
        self.docs.update(ids=[f"{key:05}"], embeddings=row[None])

    def add(self, key: int, row: Vectors) -> None:
        self.docs.add(ids=[f"{key:05}"], embeddings=row[None])

    def delete(self, key: int) -> None:
        self.docs.delete(ids=[f"{key:05}"])

    def close(self) -> None:
        chromadb: Any = pytest.importorskip("chromadb")
        del self.docs
        gc.collect()
        chromadb.api.client.SharedSystemClient.clear_system_cache()


class Postgres(Application):
    def make(self, rows: Mapping[int, Vectors]) -> str:
        pytest.importorskip("psycopg")
        from postgres_server import server
        from test_postgres import address

        server()
        self.run("DROP TABLE IF EXISTS simskip")
        self.run("DROP TABLE IF EXISTS stateful")
        self.run(f"CREATE TABLE stateful (id bigint PRIMARY KEY, v vector({DIM}))")
        for key, row in rows.items():
            self.add(key, row)
        return address("stateful", metric="euclid")

    def run(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        from postgres_server import connect

        with connect() as db:
            done = db.execute(query, list(values))
            return done.fetchall() if done.description else []

    def rows(self) -> dict[int, Vectors]:
        found = self.run("SELECT id, v::text FROM stateful")
        return {key: np.array(text[1:-1].split(","), np.float32) for key, text in found}

    def write(self, key: int, row: Vectors) -> None:
        self.run("UPDATE stateful SET v = %s WHERE id = %s", (str(row.tolist()), key))

    def add(self, key: int, row: Vectors) -> None:
        self.run("INSERT INTO stateful VALUES (%s, %s)", (key, str(row.tolist())))

    def delete(self, key: int) -> None:
        self.run("DELETE FROM stateful WHERE id = %s", (key,))


class Lance(Application):
    def make(self, rows: Mapping[int, Vectors]) -> str:
        lancedb = pytest.importorskip("lancedb")
        self.table = lancedb.connect(self.folder / "x").create_table(
            "docs", self.arrow(list(rows), np.stack(list(rows.values())))
        )
        return f"lancedb:{self.folder / 'x'}?metric=euclid"

    def arrow(self, keys: list[int], rows: Vectors) -> Any:  # noqa: ANN401 a table of pyarrow
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
        return pa.table({"id": pa.array(keys, pa.int64()), "vector": vectors})

    def rows(self) -> dict[int, Vectors]:
        self.table.checkout_latest()
        found = self.table.to_arrow()
        numbers = [part.flatten().to_numpy() for part in found["vector"].chunks]
        vectors = np.concatenate([np.empty(0, np.float32), *numbers]).reshape(-1, DIM)
        return dict(zip(found["id"].to_pylist(), vectors, strict=True))

    def write(self, key: int, row: Vectors) -> None:
        self.table.checkout_latest()
        self.table.update(where=f"id = {key}", values={"vector": row.tolist()})

    def add(self, key: int, row: Vectors) -> None:
        self.table.checkout_latest()
        self.table.add(self.arrow([key], row))

    def delete(self, key: int) -> None:
        self.table.checkout_latest()
        self.table.delete(f"id = {key}")


class Row(NamedTuple):
    """A vector in the table, and the application's own that is behind it."""

    value: Vectors
    origin: Vectors


class LiveTable(RuleBasedStateMachine):
    application: type[Application]

    @initialize(seed=seeds, count=st.integers(3, 30))
    def make(self, seed: int, count: int) -> None:
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name)
        self.environment = patch.dict("os.environ", XDG_STATE_HOME=str(self.folder / "states"))
        self.environment.start()
        self.app = self.application(self.folder)
        self.draws = 0
        self.known: dict[str, dict[int, bytes]] = {}
        own = {key * 3 + 1: self.vector(seed) for key in range(count)}
        self.uri = self.app.make(own)
        self.table = {key: Row(row, row) for key, row in own.items()}

    def teardown(self) -> None:
        if hasattr(self, "app"):
            self.app.close()
            self.environment.stop()
            self.temporary.cleanup()

    def opened(self) -> Any:  # noqa: ANN401 a store that closes itself
        return open_store(self.uri)

    def vector(self, seed: int) -> Vectors:
        self.draws += 1
        rng = np.random.default_rng([seed, self.draws])
        return rng.standard_normal(DIM).astype(np.float32)

    @rule(name=st.sampled_from("XY"))
    def refine(self, name: str) -> None:
        with self.opened() as store:
            path = self.folder / name
            if not path.exists():
                ids = np.concatenate([batch.ids for batch in store.scan(7)])
                made = random_refiner(DIM, np.sort(ids), ord(name), metric=store.info().metric)
                made.save(path)
            asked = ss.Settings(refiner=path, accept_unmeasured=True)
            ss.refine(store, ss.Judgments(), asked)
        now = self.app.rows()
        assert now.keys() == self.table.keys()
        origins = {key: row.origin.tobytes() for key, row in self.table.items()}
        known = self.known.setdefault(name, origins)
        for key, row in self.table.items():
            stays = np.array_equal(now[key], row.origin)
            assert not stays or origins[key] != known.get(key), "a row was not refined"
            self.table[key] = Row(now[key], row.origin)

    @rule()
    def rollback(self) -> None:
        with self.opened() as store, suppress(ConfigError):  # nothing to undo
            ss.rollback(store)
        self.table = {key: Row(row.origin, row.origin) for key, row in self.table.items()}

    @rule(which=seeds, seed=seeds)
    def the_application_writes(self, which: int, seed: int) -> None:
        key, row = self.some(which), self.vector(seed)
        self.app.write(key, row)
        self.table[key] = Row(row, row)

    @rule(seed=seeds)
    def the_application_adds(self, seed: int) -> None:
        key, row = max(self.table) + 2, self.vector(seed)
        self.app.add(key, row)
        self.table[key] = Row(row, row)

    @rule(which=seeds)
    def the_application_deletes(self, which: int) -> None:
        if len(self.table) > 2:
            key = self.some(which)
            self.app.delete(key)
            del self.table[key]

    def some(self, which: int) -> int:
        return sorted(self.table)[which % len(self.table)]

    @rule(size=st.integers(1, 40))
    def scan_and_go_on(self, size: int) -> None:
        with self.opened() as store:
            batches = list(store.scan(size))
            rest = list(store.scan(size, cursor=batches[0].cursor))
        ids = np.concatenate([batch.ids for batch in batches])
        assert [int(key) for key in ids.tolist()] == sorted(self.table)
        vectors = np.concatenate([batch.vectors for batch in batches])
        expected = np.stack([self.table[key].value for key in sorted(self.table)])
        np.testing.assert_array_equal(vectors, expected)
        later = [key for batch in rest for key in batch.ids.tolist()]
        assert later == ids[len(batches[0]) :].tolist()

    @invariant()
    def rows_are_as_known(self) -> None:
        if hasattr(self, "table"):
            now = self.app.rows()
            assert now.keys() == self.table.keys()
            for key, row in self.table.items():
                np.testing.assert_array_equal(now[key], row.value)


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=10,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


class LiveSqliteVec(LiveTable):
    application = SqliteVec


class LiveChroma(LiveTable):
    application = Chroma


class LivePostgres(LiveTable):
    application = Postgres


class LiveLance(LiveTable):
    application = Lance


LiveSqliteVec.TestCase.settings = _settings(15)
LiveChroma.TestCase.settings = _settings(8)
LivePostgres.TestCase.settings = _settings(12)
LiveLance.TestCase.settings = _settings(10)
TestSqliteVec = LiveSqliteVec.TestCase
TestChroma = LiveChroma.TestCase
TestPostgres = LivePostgres.TestCase
TestLance = LiveLance.TestCase
