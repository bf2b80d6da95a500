"""Partitions refined by processes of their own: the same bits, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from builders import flat, ivf, random_refiner
from mortal import Mortal, plan
from parquet_files import raw_rows, write_rows
from qdrant_client import QdrantClient
from qdrant_points import make_collection
from qdrant_server import Server

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.qdrant_points import to_ids
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.crew import check_executor
from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import (
    ConfigError,
    MissingDependencyError,
    StoreError,
    TransientStoreError,
)
from simskip_vdb.journal import Journal
from simskip_vdb.report import Report

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

N, D, PARTS = 2400, 24, 6
EDGES = np.linspace(0, N, PARTS + 1).astype(int)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """Two workers on this machine, found as any cluster is."""
    here = os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # a busy machine would starve them
        patch.setenv("PYTHONPATH", here)  # of the workers
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


class Desk:
    """An index of six files, and the same once more for the local executor."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        rng = np.random.default_rng(5)
        self.vectors = rng.normal(size=(N, D)).astype(np.float32)
        self.ids = np.arange(N) if kind == "flat" else np.sort(rng.choice(10**6, N, replace=False))
        metric = Metric.COSINE if kind == "parquet" else Metric.DOT
        self.refiner = folder / "refiner"
        random_refiner(D, self.ids, metric=metric).save(self.refiner)
        self.places = {"here": folder / "here", "there": folder / "there"}
        for place in self.places.values():
            place.mkdir()
            for part, (start, stop) in enumerate(pairwise(EDGES)):
                rows, ids = self.vectors[start:stop], self.ids[start:stop]
                if kind == "parquet":
                    write_rows(place / f"{part}.parquet", ids, rows, group=150)
                elif kind == "ivf":
                    ivf(place / f"part{part}.faiss", ids, rows)
                else:
                    flat(place / f"part{part}.faiss", rows)

    def uri(self, place: str) -> str:
        folder = self.places[place]
        return f"parquet:{folder}" if self.kind == "parquet" else f"faiss:{folder}/part*.faiss"

    def refine(self, place: str, executor: str) -> Report:
        settings = ss.Settings(refiner=self.refiner, accept_unmeasured=True, executor=executor)
        return ss.refine(open_store(self.uri(place)), ss.Judgments(), settings)

    def state(self, place: str) -> Path:
        return Path(open_store(self.uri(place)).info().state or "")

    def files(self, place: str) -> list[Path]:
        return sorted(path for path in self.places[place].iterdir() if path.suffix != ".simskip")

    def recorded(self, place: str) -> int:
        """Return how many partitions the state says are written and verified."""
        store = open_store(self.uri(place))
        pending = Journal(self.state(place), store.info()).manifest.pending
        return 0 if pending is None else len(pending.partitions)

    def rows(self, place: str) -> bytes:
        if self.kind == "parquet":
            files = sorted(self.places[place].glob("[!.]*.parquet"))
            return b"".join(raw_rows(path)[1].tobytes() for path in files)
        return b"".join(b.vectors.tobytes() for b in open_store(self.uri(place)).scan(500))


@pytest.fixture(params=["flat", "parquet"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


def test_both_executors_write_the_same_bits(desk: Desk) -> None:
    local, shared = desk.refine("here", "local"), desk.refine("there", "ray")
    assert desk.rows("there") == desk.rows("here") != desk.vectors.tobytes()
    assert shared.written == local.written
    here, there = (ss.status(open_store(desk.uri(place))) for place in ("here", "there"))
    assert not there["changed_since"]
    assert not there["interrupted"]
    assert here["refined"]["refiner"] == there["refined"]["refiner"]
    again = desk.refine("there", "ray")
    assert again.notes == ("the index holds exactly this refinement already; nothing to do",)
    assert ss.rollback(open_store(desk.uri("there")))["exact"]
    assert desk.rows("there") == desk.vectors.tobytes()
    assert not (desk.state("there") / "crew").exists()


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simskip_vdb.crew.Worker", Mortal)


@pytest.mark.usefixtures("mortal")
@pytest.mark.parametrize("kind", ["flat", "parquet"])
def test_workers_that_are_killed_lose_nothing(tmp_path: Path, kind: str) -> None:
    """Workers die before one or another operation on the disk, and are replaced."""
    desk = Desk(tmp_path, kind)
    deaths = [("read", 0, 1), *(("write", part, 2 * part) for part in range(3))]
    plan(desk.state("there"), *(f"{method} {part} kill {at}" for method, part, at in deaths))
    desk.refine("here", "local")
    report = desk.refine("there", "ray")
    assert len(list(desk.state("there").glob("plan-*"))) == len(deaths)
    assert report.written is not None
    assert report.written["rows"] == N
    assert desk.rows("there") == desk.rows("here")
    assert not list(desk.places["there"].glob(".*simskip-new"))
    assert ss.rollback(open_store(desk.uri("there")))["exact"]
    assert desk.rows("there") == desk.vectors.tobytes()


@pytest.mark.usefixtures("mortal")
def test_an_error_in_a_worker_is_that_error_and_all_is_undone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "parquet")
    plan(desk.state("there"), "write 3 fail 0")
    with pytest.raises(StoreError, match=r"^partition 3: the disk is on fire$"):
        desk.refine("there", "ray")
    assert desk.rows("there") == desk.vectors.tobytes()
    assert ss.status(open_store(desk.uri("there")))["refined"] is None


@pytest.mark.usefixtures("mortal")
def test_a_partition_whose_workers_always_die_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simskip_vdb.ray_pool._RETRIES", 1)
    desk = Desk(tmp_path, "flat")
    plan(desk.state("there"), "write 1 always 1")
    with pytest.raises(TransientStoreError, match=r"1\.\w+: its worker was lost 2 times"):
        desk.refine("there", "ray")
    status = ss.status(open_store(desk.uri("there")))
    assert status["interrupted"]
    plan(desk.state("there"))
    desk.refine("there", "ray")
    desk.refine("here", "local")
    assert desk.rows("there") == desk.rows("here")


DRIVER = """
import os, signal, sys
import simskip_vdb as ss

uri, refiner, stage, at = sys.argv[1:]
seen = 0

def progress(now, done, total):
    global seen
    seen += now == stage
    if seen == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

settings = ss.Settings(refiner=refiner, accept_unmeasured=True, executor="ray")
ss.refine(ss.open_store(uri), ss.Judgments(), settings, progress=progress)
"""


@pytest.mark.parametrize(("kind", "stage", "at"), [("flat", "write", 1), ("parquet", "read", 3)])
def test_a_driver_that_is_killed_is_resumed(
    tmp_path: Path, cluster: str, kind: str, stage: str, at: int
) -> None:
    desk = Desk(tmp_path, kind)
    command = [sys.executable, "-c", DRIVER, desk.uri("there"), str(desk.refiner), stage, str(at)]
    done = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": cluster}, check=False)
    assert done.returncode == -signal.SIGKILL
    recorded = desk.recorded("there")
    assert recorded == (at if stage == "write" else 0)
    before = time.time()
    desk.refine("there", "ray")
    desk.refine("here", "local")
    assert desk.rows("there") == desk.rows("here")
    untouched = [path.stat().st_mtime < before for path in desk.files("there")]
    assert sum(untouched) >= recorded
    assert ss.rollback(open_store(desk.uri("there")))["exact"]
    assert desk.rows("there") == desk.vectors.tobytes()


def test_what_a_lost_driver_left_is_undone_without_ray(tmp_path: Path, cluster: str) -> None:
    desk = Desk(tmp_path, "parquet")
    command = [sys.executable, "-c", DRIVER, desk.uri("there"), str(desk.refiner), "write", "4"]
    subprocess.run(command, env={**os.environ, "RAY_ADDRESS": cluster}, check=False)
    assert desk.rows("there") != desk.vectors.tobytes()
    assert ss.rollback(open_store(desk.uri("there")))["exact"]
    assert desk.rows("there") == desk.vectors.tobytes()


def test_what_cannot_be_shared_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, "flat")
    one = str(desk.places["there"] / "part0.faiss")
    wrong = [
        (one, ss.Settings(executor="ray"), "is one piece"),
        (desk.uri("there"), ss.Settings(executor="dask"), "no executor 'dask'"),
    ]
    for uri, settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            ss.refine(open_store(uri), ss.Judgments(), settings)
    with pytest.raises(ConfigError, match="not by --mode new-vector"):
        check_executor("ray", open_store(desk.uri("there")), "new-vector")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[ray\]"):
        desk.refine("there", "ray")
    assert not desk.state("there").exists()


def refine_slices(address: str, collection: str, folder: Path, executor: str) -> Report:
    settings = ss.Settings(
        refiner=folder / "refiner",
        accept_unmeasured=True,
        executor=executor,
        state=folder / f"state-{executor}",
    )
    store = open_store(f"qdrant://{address}/{collection}")
    return ss.refine(store, ss.Judgments(), settings)


def test_slices_of_a_collection_behind_a_server_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's local mode answers in a server's place: requests fit, and slices are whole."""
    monkeypatch.setattr("simskip_vdb.connectors.qdrant_rows._POLL_SECONDS", 0)
    ids = to_ids(range(120))
    vectors = np.random.default_rng(1).normal(size=(120, D)).astype(np.float32)
    random_refiner(D, np.sort(ids)).save(tmp_path / "refiner")
    server = Server("1.19.0")
    with closing(server), server.listening() as address:
        for name in ("here", "there"):
            make_collection(server.local, ids, vectors, Metric.DOT, name=name)
        local = refine_slices(address, "here", tmp_path, "local")
        shared = refine_slices(address, "there", tmp_path, "ray")
        assert shared.written == local.written
        rows = {
            name: np.concatenate([b.vectors for b in QdrantStore(server.local, name).scan(500)])
            for name in ("here", "there")
        }
        assert rows["here"].tobytes() != vectors.tobytes()
        np.testing.assert_allclose(rows["there"], rows["here"], atol=1e-6)
        store = open_store(f"qdrant://{address}/there")
        assert ss.rollback(store, state=tmp_path / "state-ray")["exact"]


@pytest.mark.skipif("SIMSKIP_QDRANT_URL" not in os.environ, reason="SIMSKIP_QDRANT_URL is not set")
def test_slices_of_a_server(tmp_path: Path) -> None:
    ids = to_ids(range(5000))
    vectors = np.random.default_rng(1).normal(size=(5000, D)).astype(np.float32)
    random_refiner(D, np.sort(ids)).save(tmp_path / "refiner")
    client = QdrantClient(url=os.environ["SIMSKIP_QDRANT_URL"])
    address = os.environ["SIMSKIP_QDRANT_URL"].removeprefix("http://")
    try:
        for name in ("here", "there"):
            client.delete_collection(name)
            make_collection(client, ids, vectors, Metric.DOT, name=name)
        refine_slices(address, "here", tmp_path, "local")
        refine_slices(address, "there", tmp_path, "ray")
        here, there = (
            np.concatenate([b.vectors for b in QdrantStore(client, name).scan(500)])
            for name in ("here", "there")
        )
        np.testing.assert_allclose(there, here, atol=1e-6)
    finally:
        client.delete_collection("here")
        client.delete_collection("there")
        client.close()
