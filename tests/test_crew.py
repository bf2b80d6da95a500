"""Partitions read and written by workers, here one after the other in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from builders import flat, random_refiner
from parquet_files import raw_rows, write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.crew import Crew, Worker
from simskip_vdb.datatypes import Metric, Vectors
from simskip_vdb.errors import MissingDependencyError, StoppedError, StoreError, TransientStoreError
from simskip_vdb.fence import CREW, at_work, send_out, shut_out
from simskip_vdb.journal import Journal
from simskip_vdb.report import Report
from simskip_vdb.store import Partitioned, VectorStore

N, D, PARTS = 300, 8, 5
EDGES = np.linspace(0, N, PARTS + 1).astype(int)


class Killed(BaseException):
    """The driver dies here."""


class InTurn:
    """Runs jobs one after the other.

    Attributes:
        log: Method and partition of each.
        at: Before which job the driver dies; None for never.
    """

    log: list[tuple[str, int]]
    at: int | None

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(self, method: str, jobs: Sequence[Any], done: Callable[[Any, Any], None]) -> None:
        for job in jobs:
            if len(self.log) == self.at:
                raise Killed
            self.log.append((method, job.number))
            done(job, getattr(self._worker, method)(job))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> type[InTurn]:
    """Let the executor ``ray`` work in turn."""
    InTurn.log, InTurn.at = [], None

    @contextmanager
    def crew(store: VectorStore, journal: Journal) -> Iterator[Crew]:
        assert isinstance(store, Partitioned)
        journal.begin()
        yield Crew(store, journal, InTurn(Worker(journal.folder, store.info())))

    monkeypatch.setattr("simskip_vdb.workspace.ray_crew", crew)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return InTurn


class Desk:
    """Five files, and two refiners."""

    def __init__(self, folder: Path, kind: str) -> None:
        rng = np.random.default_rng(2)
        self.kind, self.folder = kind, folder / "rows"
        self.folder.mkdir()
        self.vectors: Vectors = rng.normal(size=(N, D)).astype(np.float32)
        self.ids = np.arange(N) * (7 if kind == "parquet" else 1)
        metric = Metric.COSINE if kind == "parquet" else Metric.DOT
        self.refiners = [folder / f"refiner{seed}" for seed in range(2)]
        for seed, path in enumerate(self.refiners):
            random_refiner(D, self.ids, seed, metric=metric).save(path)
        for part, (start, stop) in enumerate(pairwise(EDGES)):
            self.write(part, self.ids[start:stop], self.vectors[start:stop])

    @property
    def uri(self) -> str:
        if self.kind == "parquet":
            return f"parquet:{self.folder}"
        return f"faiss:{self.folder}/part*.faiss"

    def write(self, part: int, ids: Any, vectors: Any) -> None:  # noqa: ANN401 arrays
        if self.kind == "parquet":
            write_rows(self.folder / f"{part}.parquet", ids, vectors)
        else:
            flat(self.folder / f"part{part}.faiss", vectors)

    def refine(self, which: int = 0, executor: str = "ray") -> Report:
        settings = ss.Settings(
            refiner=self.refiners[which], accept_unmeasured=True, executor=executor
        )
        return ss.refine(open_store(self.uri), ss.Judgments(), settings)

    def rows(self) -> dict[int, Any]:
        batches = list(open_store(self.uri).scan(500))
        return {int(i): v for b in batches for i, v in zip(b.ids, b.vectors, strict=True)}

    def holds(self, which: int | None) -> bool:
        """Tell whether every row holds what a refiner makes of its original; None: that."""
        wanted = self.vectors
        if which is not None:
            wanted = ss.Refiner.load(self.refiners[which]).refine_rows(self.vectors, self.ids)
        rows = self.rows()
        assert list(map(int, self.ids)) == sorted(rows)
        found = np.stack([rows[int(i)] for i in self.ids])
        return bool(np.allclose(found, wanted, atol=1e-6 if which is not None else 0))


@pytest.fixture(params=["flat", "parquet"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


@pytest.mark.parametrize("at", [2, PARTS, PARTS + 1, 2 * PARTS - 1])
@pytest.mark.parametrize("after", ["again", "another", "here", "undo"])
def test_a_driver_that_dies_before_any_job(
    desk: Desk, turns: type[InTurn], at: int, after: str
) -> None:
    turns.at = at
    with pytest.raises(Killed):
        desk.refine()
    turns.at, turns.log = None, []
    if after == "undo":
        if at >= PARTS:
            assert ss.rollback(open_store(desk.uri))["exact"]
        assert desk.holds(None)
        return
    report = desk.refine(int(after == "another"), "local" if after == "here" else "ray")
    assert desk.holds(int(after == "another"))
    assert report.written is not None
    assert report.written["rows"] == N
    if after == "again":
        due = range(max(0, at - PARTS), PARTS)
        assert turns.log == [*(("read", i) for i in range(PARTS)), *(("write", i) for i in due)]
    assert ss.rollback(open_store(desk.uri))["exact"]
    assert desk.holds(None)


@pytest.mark.parametrize("first", ["local", "ray"])
def test_refining_again_starts_from_originals(desk: Desk, turns: type[InTurn], first: str) -> None:
    desk.refine(0, first)
    desk.refine(1)
    assert desk.holds(1)
    desk.refine(0)
    assert desk.holds(0)
    assert not ss.status(open_store(desk.uri))["changed_since"]
    assert ss.rollback(open_store(desk.uri))["exact"]
    assert desk.holds(None)


@pytest.mark.parametrize("finished", [True, False])
def test_rows_that_moved_to_another_partition_are_not_refined_twice(
    tmp_path: Path, turns: type[InTurn], finished: bool
) -> None:
    desk = Desk(tmp_path, "parquet")
    turns.at = None if finished else 2 * PARTS - 2
    if finished:
        desk.refine()
    else:
        with pytest.raises(Killed):
            desk.refine()
    turns.at = None
    parts = [raw_rows(path) for path in sorted(desk.folder.glob("[!.]*.parquet"))]
    ids, vectors = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    order = np.random.default_rng(0).permutation(N)
    for part, rows in enumerate(np.split(order, PARTS)):
        desk.write(part, ids[rows], vectors[rows])
    desk.refine(1)
    assert desk.holds(1)
    assert ss.rollback(open_store(desk.uri))["exact"]
    assert desk.holds(None)


def test_rows_that_the_application_changed_meanwhile_stay(
    tmp_path: Path, turns: type[InTurn]
) -> None:
    desk = Desk(tmp_path, "parquet")
    turns.at = PARTS + 3
    with pytest.raises(Killed):
        desk.refine()
    turns.at = None
    path = desk.folder / "1.parquet"  # verified by the run that died
    ids, vectors = raw_rows(path)
    vectors[4] = 1
    desk.write(1, ids, vectors)
    turns.log = []
    report = desk.refine()
    assert ("write", 0) not in turns.log
    assert report.written is not None
    assert report.written["rows"] == N - 1  # it came after the fit, and such rows stay raw
    np.testing.assert_array_equal(raw_rows(path)[1][4], 1)
    ss.rollback(open_store(desk.uri))
    desk.vectors[desk.ids == ids[4]] = 1
    assert desk.holds(None)


def test_status_tells_how_far_a_write_came(desk: Desk, turns: type[InTurn]) -> None:
    turns.at = PARTS + 2
    with pytest.raises(Killed):
        desk.refine()
    status = ss.status(open_store(desk.uri))
    assert (status["interrupted"], status["partitions_written"]) == (True, 2)


def test_a_worker_of_an_earlier_run_is_kept_out(tmp_path: Path) -> None:
    old = send_out(tmp_path)
    with at_work(tmp_path, old, 3):
        pass
    new = send_out(tmp_path)
    with pytest.raises(StoppedError, match="has taken over"), at_work(tmp_path, old, 3):
        raise AssertionError
    with at_work(tmp_path, new, 3):
        pass
    shut_out(tmp_path)
    assert not (tmp_path / CREW).exists()
    with pytest.raises(StoppedError), at_work(tmp_path, new, 3):
        raise AssertionError


def test_a_worker_that_is_at_work_is_waited_for(tmp_path: Path) -> None:
    token = send_out(tmp_path)
    lock = filelock.FileLock(tmp_path / CREW / "0.lock")
    with lock, pytest.raises(TransientStoreError, match=r"0\.lock.*stop its Ray"):
        shut_out(tmp_path, patience=0.1)
    shut_out(tmp_path, patience=0.1)
    with pytest.raises(StoppedError), at_work(tmp_path, token, 0):
        raise AssertionError


@pytest.mark.parametrize("end", ["fails", "is refused"])
def test_a_worker_that_was_out_of_reach_cannot_write_after_an_undo(
    desk: Desk, turns: type[InTurn], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A job whose worker seemed lost is done once more, when all was undone."""
    late: list[Callable[[], object]] = []

    def run(
        self: InTurn, method: str, jobs: Sequence[Any], done: Callable[[Any, Any], None]
    ) -> None:
        for job in jobs:
            work = getattr(self._worker, method)
            late.append(partial(work, job))
            if (method, job.number, end) == ("write", 3, "fails"):
                raise StoreError("the disk is on fire")
            done(job, work(job))

    def refuse(self: object, candidate: object) -> None:
        raise StoreError("the disk is on fire")

    monkeypatch.setattr(turns, "run", run)
    if end == "is refused":
        monkeypatch.setattr("simskip_vdb.through_index.ThroughIndex.accept", refuse)
    with pytest.raises(StoreError, match="on fire"):
        desk.refine()
    for again in late:
        with pytest.raises(StoppedError):
            again()
    assert desk.holds(None)


def test_rows_that_came_while_workers_wrote_do_not_shift_others(
    tmp_path: Path, turns: type[InTurn], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, "parquet")
    run = InTurn.run
    new = np.ones((40, D), np.float32)

    def grow(
        self: InTurn, method: str, jobs: Sequence[Any], done: Callable[[Any, Any], None]
    ) -> None:
        run(self, method, jobs, done)
        if method == "write":
            ids, vectors = raw_rows(desk.folder / "0.parquet")
            ids = np.concatenate([10_000 + np.arange(40), ids])
            desk.write(0, ids, np.concatenate([new, vectors]))

    def refuse(self: object, candidate: object) -> None:
        raise StoreError("the disk is on fire")

    monkeypatch.setattr(turns, "run", grow)
    monkeypatch.setattr("simskip_vdb.through_index.ThroughIndex.accept", refuse)
    with pytest.raises(StoreError, match="on fire"):
        desk.refine()
    desk.ids = np.concatenate([desk.ids, 10_000 + np.arange(40)])
    desk.vectors = np.concatenate([desk.vectors, new])
    assert desk.holds(None)


def test_what_another_machine_refined_is_found_after_rows_were_removed(
    tmp_path: Path, turns: type[InTurn], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, "flat")
    refine_rows = ss.Refiner.refine_rows

    def elsewhere(self: ss.Refiner, *args: Any) -> Vectors:  # noqa: ANN401
        refined: Vectors = refine_rows(self, *args) * np.float32(1 + 3e-7)
        return refined

    turns.at = PARTS + 3
    with monkeypatch.context() as patch:
        patch.setattr(ss.Refiner, "refine_rows", elsewhere)
        with pytest.raises(Killed):
            desk.refine()
    vectors = np.stack([desk.rows()[i] for i in range(EDGES[1])])
    vectors[1, 0] = np.inf  # the application's
    desk.write(0, None, vectors[1:])
    assert not ss.rollback(open_store(desk.uri))["exact"]
    desk.ids, desk.vectors = desk.ids[:-1], np.concatenate([vectors[1:2], desk.vectors[2:]])
    assert desk.holds(None)


def test_a_missing_package_is_told_from_another_process() -> None:
    error = MissingDependencyError("faiss", "faiss")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.package) == (str(error), "faiss")
