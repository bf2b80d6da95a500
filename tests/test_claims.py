"""One run writes an index at a time, wherever its state is and whatever machine it is on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from builders import ivf, random_refiner
from edge_shards import make, row_ids
from parquet_files import write_rows
from qdrant_client import models
from qdrant_server import Server

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.qdrant_calls import Retries
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import SimskipError, StateInUseError
from simskip_vdb.journal import Journal

N, D = 60, 8


@pytest.fixture(params=["faiss", "parquet", "npy", "qdrant-edge"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> str:
    path, ids = tmp_path / "index", np.arange(N) * 3
    rows = rng.normal(size=(N, D)).astype(np.float32)
    if request.param == "faiss":
        ivf(path, ids, rows)
    elif request.param == "parquet":
        write_rows(path, ids, rows)
    elif request.param == "npy":
        ids = np.arange(N)
        with open(path, "wb") as file:
            np.save(file, rows.astype(np.float64))
    else:
        make(path, ids.tolist(), rows)
        ids = row_ids(ids.tolist())
    metric = "cosine" if request.param in ("parquet", "npy") else "dot"
    random_refiner(D, ids, metric=Metric(metric)).save(tmp_path / "refiner")
    return f"{request.param}:{path}"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_state_steps_aside_before_it_writes(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    settings = ss.Settings(
        refiner=tmp_path / "refiner", state=tmp_path / "other", accept_unmeasured=True
    )
    with Journal(tmp_path / "one", store.info()):
        before = everything(tmp_path)
        with pytest.raises(StateInUseError, match=r"another run \(process \d+ on .*, since 2"):
            ss.refine(store, ss.Judgments(), settings)
        assert everything(tmp_path) == before
    report = ss.refine(store, ss.Judgments(), settings)
    assert report.written is not None
    assert report.written["rows"] == N
    assert not (tmp_path / "index.simskip" / "lock").exists()


def test_a_place_that_nobody_can_write_does_not_stop_what_writes_elsewhere(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    path = ivf(tmp_path / "index", np.arange(N), rows)
    (tmp_path / "index.simskip").write_text("a file where the folder would be")
    with Journal(tmp_path / "state", open_store(str(path)).info()) as journal:
        journal.begin()
        with pytest.raises(StateInUseError), Journal(journal.folder, open_store(str(path)).info()):
            pass
    assert (tmp_path / "index.simskip").is_file()


class Desk:
    """A collection on a server, and two operators with a refiner and a state each."""

    def __init__(self, folder: Path, server: Server) -> None:
        rng = np.random.default_rng(5)
        self.folder, self.server = folder, server
        rows = rng.normal(size=(N, D)).astype(np.float32)
        server.local.create_collection(
            "docs", models.VectorParams(size=D, distance=models.Distance.DOT)
        )
        points = [models.PointStruct(id=i, vector=row.tolist()) for i, row in enumerate(rows)]
        server.local.upsert("docs", points)
        self.ids = row_ids(range(N))
        self.old = self.rows()
        self.made: dict[str, Any] = {"": self.old}
        for seed, name in enumerate("AB"):
            refiner = random_refiner(D, self.ids, seed)
            refiner.save(folder / name)
            made = refiner.refine_rows(np.stack([*self.old.values()]), row_ids(self.old))
            self.made[name] = dict(zip(self.old, made, strict=True))

    def rows(self) -> dict[int, Any]:
        found, _ = self.server.local.scroll("docs", limit=N + 1, with_vectors=True)
        return {int(point.id): np.array(point.vector, np.float32) for point in found}

    def holds(self) -> str:
        """Return whose rows all of them are: ``A``, ``B``, or nobody's; fail on a mixture."""
        now = self.rows()
        for name, made in self.made.items():
            if all(np.allclose(now[i], made[i], atol=1e-6) for i in self.old):
                return name
        raise AssertionError("rows of several runs, or refined twice")

    def open(self) -> QdrantStore:
        retries = Retries(attempts=2, sleep=lambda seconds: None)
        return QdrantStore(self.server.client, "docs", retries=retries)

    def state(self, name: str) -> Path:
        return self.folder / f"state-{name}"

    def refine(self, name: str) -> bool:
        """Refine as an operator does; tell whether it went well."""
        settings = ss.Settings(
            refiner=self.folder / name, state=self.state(name), accept_unmeasured=True
        )
        try:
            ss.refine(self.open(), ss.Judgments(), settings)
        except SimskipError:
            return False
        return True

    def rollback(self, name: str) -> bool:
        try:
            ss.rollback(self.open(), state=self.state(name))
        except SimskipError:
            return False
        return True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "user"))
    with closing(Server()) as server:
        yield server


def test_two_machines_at_once_leave_the_rows_of_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let B run from beginning to end before every request of A."""
    outcomes = set()
    for at in count(0, 9):
        folder = tmp_path / str(at)
        folder.mkdir()
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "user"))
        if at:
            server.local.delete_collection("docs")
        desk, left, second = Desk(folder, server), at, [False, False]

        def between() -> None:
            nonlocal left
            left -= 1
            if left == -1:
                # The place of states is each machine's own.
                monkeypatch.setenv("XDG_STATE_HOME", str(folder / "another"))  # noqa: B023
                second[:] = True, desk.refine("B")  # noqa: B023
                monkeypatch.setenv("XDG_STATE_HOME", str(folder / "user"))  # noqa: B023

        server.between = between
        first = desk.refine("A")
        server.between = lambda: None
        held = desk.holds()
        assert held == ("A" if first else "B" if second[1] else "")
        assert not (first and second[1] and second[0]) or held == "A"
        outcomes.add((first, second[1]))
        winner = held or "A"
        if held:
            assert desk.rollback(winner)
        assert desk.holds() == ""
        assert desk.refine("A")
        assert desk.holds() == "A"
        if not second[0]:
            break
    assert {(True, False), (False, True)} <= outcomes


def test_a_claim_that_a_run_left_is_taken_over_by_its_state_alone(
    server: Server, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, server)
    journal = Journal(desk.state("A"), desk.open().info())
    with journal:
        journal.begin()
    note = {"state": journal.manifest.state_id, "token": "dead", "who": "process 1 on a"}
    desk.open().claim(note)
    settings = ss.Settings(refiner=tmp_path / "B", state=desk.state("B"), accept_unmeasured=True)
    with pytest.raises(StateInUseError, match="process 1 on a"):
        ss.refine(desk.open(), ss.Judgments(), settings)
    assert desk.holds() == ""
    assert desk.refine("A")
    assert desk.open().claimed() is None
    assert desk.holds() == "A"


def test_who_may_not_claim_is_not_kept_from_writing(server: Server, tmp_path: Path) -> None:
    desk = Desk(tmp_path, server)

    def fault(name: str, body: Any) -> httpx.Response | None:  # noqa: ANN401
        if body and "simskip-claim" in str(body):
            return httpx.Response(403, json={"status": {"error": "Forbidden"}})
        return None

    server.fault = fault
    assert desk.refine("A")
    assert desk.holds() == "A"


class Alternating:
    """Lets another run go from beginning to end before an operation of this one on the disk."""

    OPERATIONS = ("open", "replace", "link", "fsync", "unlink", "mkdir", "chmod", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, other: Callable[[], None]) -> None:
        self._left, self._other, self.came = at, other, False
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._before(getattr(os, name)))

    def _before(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 whatever it wraps
            self._left -= 1
            if self._left == -1:
                self.came = True
                self._other()
            return operation(*arguments, **named)

        return wrapped


def refined_by(uri: str, refiner: Path, state: Path | None) -> bool:
    """Refine as an operator does; tell whether it went well."""
    settings = ss.Settings(refiner=refiner, state=state, accept_unmeasured=True)
    try:
        ss.refine(open_store(uri), ss.Judgments(), settings)
    except SimskipError:
        return False
    return True


def done(first: bool, second: bool) -> list[str]:
    """Return whose rows there may be: of two that went well, one found what the other had left."""
    return ["A"] * first + ["B"] * second or [""]


@pytest.mark.parametrize("kind", ["faiss", "parquet", "npy"])
@pytest.mark.parametrize("states", [(None, None), ("one", "two"), (None, "two"), ("one", None)])
def test_two_operators_at_one_file_leave_the_rows_of_one(
    kind: str,
    states: tuple[str | None, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Let B run from beginning to end before every operation of A on the disk."""
    ids = np.arange(N) * 3
    rows = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    made = {"": rows}
    for seed, name in enumerate("AB"):
        refiner = random_refiner(D, ids, seed)
        refiner.save(tmp_path / name)
        made[name] = refiner.refine_rows(rows, ids)
    outcomes = set()
    for at in count():
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / "index"
        uri = f"faiss:{path}" if kind == "faiss" else f"{kind}:{path}?metric=dot"
        if kind == "faiss":
            ivf(path, ids, rows)
        elif kind == "parquet":
            write_rows(path, ids, rows)
        else:
            np.save(folder / "ids.npy", ids)
            uri += "&ids=ids.npy"
            with open(path, "wb") as file:
                np.save(file, rows)
        first_file = path.read_bytes()
        places = [None if name is None else folder / name for name in states]
        second: list[bool] = []
        with monkeypatch.context() as patch:
            alternating = Alternating(
                patch,
                at,
                lambda: second.append(refined_by(uri, tmp_path / "B", places[1])),  # noqa: B023
            )
            first = refined_by(uri, tmp_path / "A", places[0])
        if not alternating.came:
            break
        (batch,) = open_store(uri).scan(N)
        held = [name for name in made if np.allclose(batch.vectors, made[name], atol=1e-6)]
        assert held, (at, first, second)
        (holder,) = held
        assert holder in done(first, second[0]), (at, first, second)
        outcomes.add((first, second[0]))
        if holder:
            ss.rollback(open_store(uri), state=places["AB".index(holder)])
        assert path.read_bytes() == first_file, at
    assert {(True, False), (False, True)} <= outcomes or (True, True) in outcomes
    assert at > 20
