"""A whole refinement over REST while requests fail: before, half-way through, and after their work.

What the client sends and how it takes answers is real, and so are the faults that it is shown; the
points behind are the client's own engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from builders import random_refiner
from qdrant_points import digest, make_collection, raw_rows, texts
from qdrant_server import Server

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors.qdrant_calls import Retries
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import TransientStoreError  # exit code 4
from simskip_vdb.refiner import Refiner

ROWS, DIM = 400, 8  # four requests
WRITE = "PUT /collections/docs/points/vectors"


@dataclass
class Weather:
    """Lets requests fail at random.

    Attributes:
        server: Whose requests.
        share: Share of requests that fail; of those that write, where they fail half-way, every
            second.
        kinds: Ways to fail.
        happened: How often each happened.
    """

    server: Server
    share: float
    kinds: tuple[str, ...]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    happened: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def __call__(self, name: str, body: Any) -> httpx.Response | None:  # noqa: ANN401
        kind = self._drawn(name)
        if kind is None:
            return None
        if kind == "half":
            self.server.carry_out(name, {**body, "points": body["points"][::2]})
        self.happened[kind] += 1
        if kind == "connect":
            raise httpx.ConnectError("made up")
        if kind == "timeout":
            raise httpx.ReadTimeout("made up")
        if kind in ("answer lost", "answer late"):  # the work is done, and nobody is told
            self.server.carry_out(name, body)
            raise (httpx.ReadError if kind == "answer lost" else httpx.ReadTimeout)("made up")
        status = 500 if kind == "half" else int(kind)
        return httpx.Response(status, json={"status": {"error": "made up"}})

    def _drawn(self, name: str) -> str | None:
        if "half" in self.kinds and name == WRITE:
            self.writes += 1
            if self.share == 1 or self.writes % 2:
                return "half"
        others = [kind for kind in self.kinds if kind != "half"]
        if not others or self.rng.random() >= self.share:
            return None
        return others[int(self.rng.integers(len(others)))]


KINDS = ("429", "500", "503", "connect", "timeout", "answer lost", "answer late", "half")


class Desk:
    """A collection behind REST, its refiner, and what it must hold."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.server, self._folder = server, folder
        rng = np.random.default_rng(1)
        ids = texts(np.arange(0, 7 * ROWS, 7).tolist())
        vectors = rng.standard_normal((ROWS, DIM)).astype(np.float32)
        make_collection(server.local, ids, vectors, vector="text")
        self.refiner: Refiner = random_refiner(DIM, ids)
        self.refiner.save(folder / "refiner")
        self.old, self.rest = self.rows(), digest(server.local, "docs", "text")
        self.new = dict(zip(self.old, self._moved(), strict=True))

    def _moved(self) -> Vectors:
        rows = np.stack(list(self.old.values()))
        return self.refiner.refine_rows(rows, np.array(list(self.old), "S36"))

    def rows(self) -> dict[bytes, Vectors]:
        ids, vectors = raw_rows(self.server.local, "docs", "text")
        return dict(zip(ids.tolist(), vectors, strict=True))

    def share_of(self, expected: dict[bytes, Vectors]) -> float:
        """Return how many rows are as expected; none may be gone, new, or in any other way."""
        rows = self.rows()
        assert rows.keys() == self.old.keys()
        assert digest(self.server.local, "docs", "text") == self.rest
        for name, row in rows.items():
            assert (row == self.old[name]).all() or (row == self.new[name]).all(), name
        return float(np.mean([(row == expected[name]).all() for name, row in rows.items()]))

    def open(self, attempts: int = 12) -> QdrantStore:
        retries = Retries(attempts=attempts, sleep=lambda seconds: None)
        return QdrantStore(self.server.client, "docs", "text", retries=retries)

    def refine(self, store: QdrantStore) -> None:
        chosen = Settings(
            refiner=self._folder / "refiner", state=self._folder / "state", accept_unmeasured=True
        )
        report = ss.refine(store, ss.Judgments(), chosen)
        assert report.written is not None
        assert report.written["theirs"] == report.written["gone"] == 0

    def rollback(self, store: QdrantStore) -> None:
        assert ss.rollback(store, state=self._folder / "state")["exact"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "user"))
    with closing(Server()) as server:
        yield Desk(tmp_path, server)


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=lambda k: "+".join(k))
def test_a_run_outlasts_requests_that_fail(desk: Desk, kinds: tuple[str, ...]) -> None:
    store = desk.open()
    weather = desk.server.fault = Weather(desk.server, 0.4, kinds)
    desk.refine(store)
    assert desk.share_of(desk.new) == 1
    desk.rollback(store)
    assert desk.share_of(desk.old) == 1
    assert set(weather.happened) == set(kinds)


@pytest.mark.parametrize(
    ("kind", "at_writes"),
    [("503", False), ("503", True), ("connect", False), ("connect", True), ("half", True)],
)
@pytest.mark.parametrize("command", ["refine", "rollback"])
def test_an_outage_stops_a_run_and_the_same_command_goes_on(
    desk: Desk, kind: str, at_writes: bool, command: str
) -> None:
    """Begins an outage at every write, or at every seventh request of any name."""
    at, stopped, partly = 0, 0, 0
    expected = desk.new if command == "refine" else desk.old
    while True:
        if command == "rollback":
            desk.refine(desk.open())
        store = desk.open(attempts=2)
        outage, left = Weather(desk.server, 1.0, (kind,)), at

        def fault(name: str, body: Any) -> httpx.Response | None:  # noqa: ANN401
            nonlocal left
            left -= name == WRITE or not at_writes
            return outage(name, body) if left < 0 else None  # noqa: B023

        desk.server.fault = fault
        settled = False
        with suppress(TransientStoreError):
            getattr(desk, command)(store)
            settled = True  # an outage after that only leaves the claim, which the state takes over
        ended = not outage.happened
        stopped += not ended
        desk.server.fault = lambda name, body: None
        share = desk.share_of(expected)
        partly += 0 < share < 1
        if not settled:
            getattr(desk, command)(desk.open())
        assert desk.share_of(expected) == 1
        if command == "refine":
            desk.rollback(desk.open())
            assert desk.share_of(desk.old) == 1
        if ended:
            break
        at += 1 if at_writes else 7
    assert stopped >= 3
    assert partly >= 1 or not at_writes
