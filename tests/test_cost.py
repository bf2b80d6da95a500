"""What a run costs in passes, hashes and requests: the same the tenth time as the second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import flat, ivf, random_refiner
from click.testing import CliRunner
from edge_shards import make, row_ids
from parquet_files import write_rows
from qdrant_client import QdrantClient, models

import simskip_vdb as ss
from simskip_vdb import journal
from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.parquet_file import ParquetFile
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.refiner import Refiner
from simskip_vdb.store import VectorStore

FEW, MANY, D = 1000, 9000, 4
PAGE = 128
SAMPLED = 2000
KINDS = ["flat", "ivf", "parquet", "edge", "memory"]
SCANS = {
    "refine 1": 2,
    "refine 2": 3,
    "refine 10": 3,
    "again": 1,
    "status": 1,
    "rollback": 2,
}
"""Reading and reading back; and once what an earlier refinement left, or what is searched."""
HASHES = {"refine 1": 3, "refine 2": 3, "refine 10": 3, "again": 2, "status": 1, "rollback": 2}
"""Of a file: as it was read, as it is before the swap, and of the new one."""


class World:
    """An index of some kind, and counts of what is done to it."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.folder, self.n, self.counts = folder, n, Counter[str]()
        self.patch = monkeypatch
        folder.mkdir()
        ids, path = np.arange(n), folder / "index"
        vectors = np.random.default_rng(0).normal(size=(n, D)).astype(np.float32)
        self.client: QdrantClient | None = None
        self.uri = f"faiss:{path}"
        if kind == "flat":
            flat(path, vectors)
        elif kind == "ivf":
            ivf(path, ids, vectors)
        elif kind == "parquet":
            write_rows(path, ids, vectors)
            self.uri = f"parquet:{path}?metric=dot"
        elif kind == "edge":
            make(path, ids.tolist(), vectors)
            self.uri, ids = f"qdrant-edge:{path}", row_ids(ids.tolist())
        else:
            self.client = QdrantClient(":memory:")
            dot = models.VectorParams(size=D, distance=models.Distance.DOT)
            self.client.create_collection("c", vectors_config=dot)
            self.client.upload_collection("c", vectors, ids=ids.tolist())
            ids = row_ids(ids.tolist())
        for seed in range(1, 11):
            random_refiner(D, ids, seed).save(folder / str(seed))
        self._count()

    def _count(self) -> None:
        for store in (FaissStore, ParquetFile, EdgeStore, QdrantStore):
            self._wrap(store, "scan", "scans")
            if hasattr(store, "sha256"):
                self._wrap(store, "sha256", "hashes")
        self._wrap(Refiner, "refine_rows", "moved", lambda _, rows, *rest: len(rows))
        self._wrap(journal, "sha256_of", "state files hashed")
        if self.client is not None:
            for name in ("count", "scroll", "retrieve", "update_vectors", "get_collection"):
                self._wrap(self.client, name, name)

    def _wrap(
        self, owner: object, name: str, key: str, amount: Callable[..., int] = lambda *_: 1
    ) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 whatever it wraps
            self.counts[key] += amount(*arguments)
            return inner(*arguments, **named)

        self.patch.setattr(owner, name, outer)

    @contextmanager
    def store(self) -> Iterator[VectorStore]:
        if self.client is not None:
            yield QdrantStore(self.client, "c")
            return
        store = open_store(self.uri)
        try:
            yield store
        finally:
            getattr(store, "close", lambda: None)()

    def costs(self, command: Callable[[VectorStore], Any]) -> Counter[str]:
        self.counts.clear()
        with self.store() as store:
            command(store)
        return Counter(self.counts)

    def life(self) -> dict[str, Counter[str]]:
        state = self.folder / "state"

        def refine(number: int) -> Callable[[VectorStore], Any]:
            settings = ss.Settings(
                refiner=self.folder / str(number), accept_unmeasured=True, state=state
            )
            return lambda store: ss.refine(store, ss.Judgments(), settings)

        found = {f"refine {number}": self.costs(refine(number)) for number in range(1, 11)}
        found["again"] = self.costs(refine(10))
        found["status"] = self.costs(lambda store: ss.status(store, state=state))
        found["rollback"] = self.costs(lambda store: ss.rollback(store, state=state))
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_command_costs_more_as_history_grows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        few = World(kind, tmp_path / "few", patch, FEW).life()
    many = World(kind, tmp_path / "many", monkeypatch, MANY).life()
    for found, rows in ((few, FEW), (many, MANY)):
        for name, most in SCANS.items():
            assert found[name]["scans"] <= most, (name, found[name])
        for name, most in HASHES.items():
            assert found[name]["hashes"] <= most, (name, found[name])
        for name, cost in found.items():
            passes = 2 if name.startswith("refine") else 0  # to write, and to search exactly
            assert cost["moved"] <= passes * rows + SAMPLED, name
        second, tenth = found["refine 2"], found["refine 10"]
        assert tenth["scans"] == second["scans"]
        assert tenth["state files hashed"] == second["state files hashed"]
        assert tenth["moved"] <= second["moved"] * 1.05
        assert tenth["count"] <= second["count"] + 1
        pages = -(-rows // PAGE)
        for name in ("refine 1", "refine 10", "rollback"):
            assert found[name]["update_vectors"] <= pages + 1
            assert found[name]["retrieve"] <= 3 * pages + 60
    for name, cost in many.items():  # a question that is asked once a run, not once a block
        for request in ("count", "get_collection", "state files hashed"):
            assert cost[request] == few[name][request], (name, request)


def test_the_state_of_a_small_index_is_small(tmp_path: Path) -> None:
    path, ids = tmp_path / "rows.faiss", np.arange(900)
    flat(path, np.random.default_rng(0).normal(size=(900, 16)).astype(np.float32))
    for seed in range(3):
        random_refiner(16, ids, seed).save(tmp_path / str(seed))
        words = ["refine", str(path), "--refiner", str(tmp_path / str(seed)), "--accept-unmeasured"]
        run = CliRunner().invoke(cli, words, standalone_mode=False)
        assert run.exit_code == 0, run.output
    state = sum(f.stat().st_size for f in (tmp_path / "rows.faiss.simskip").rglob("*"))
    assert state < 6 * path.stat().st_size + 200_000
