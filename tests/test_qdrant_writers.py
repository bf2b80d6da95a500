"""An application goes on writing while its collection is refined: none of its writes is lost."""

# ruff: noqa: ANN401 stores of two engines

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge
from application import Application, Payload
from builders import random_refiner
from engines import ALIAS, DIM, OTHER, VECTOR, Client, Edge, Engine
from qdrant_client import QdrantClient, models
from qdrant_server import Server

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors import qdrant_rows
from simskip_vdb.datatypes import ID_TEXT, Mask, Metric, VectorBatch, Vectors
from simskip_vdb.judgments import Judgments
from simskip_vdb.refiner import Refiner
from simskip_vdb.store import Allowed

ROWS, WRITES, A_REQUEST = 2000, 600, 60
REQUESTS = 8  # fewer than either engine needs for all rows
BESIDE = {OTHER: [1.0, 2.0, 2.0]}


class OneAtATime:
    """Local mode, of which two threads may not ask something at a time."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._lock = engine, threading.RLock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return found(*args, **kwargs)

        return call if callable(found) else found


class ClientPoints:
    """Points of a collection behind the Python client."""

    def __init__(self, client: QdrantClient) -> None:
        self._client = client

    def put(self, point: int | str, vector: Vectors, payload: Payload) -> None:
        whole = {VECTOR: vector.tolist(), **BESIDE}
        made = models.PointStruct(id=point, vector=whole, payload=dict(payload))
        self._client.upsert(ALIAS, [made])

    def annotate(self, point: int | str, payload: Payload) -> None:
        self._client.set_payload(ALIAS, dict(payload), [point])

    def remove(self, point: int | str) -> None:
        self._client.delete(ALIAS, [point])


class EdgePoints:
    """Points of a shard whose handle the application shares with the store."""

    def __init__(self, shard: edge.EdgeShard) -> None:
        self._shard = shard

    def put(self, point: int | str, vector: Vectors, payload: Payload) -> None:
        made = edge.Point(point, {VECTOR: vector.tolist(), **BESIDE}, dict(payload))
        self._shard.update(edge.UpdateOperation.upsert_points([made]))

    def annotate(self, point: int | str, payload: Payload) -> None:
        self._shard.update(edge.UpdateOperation.set_payload([point], dict(payload)))

    def remove(self, point: int | str) -> None:
        self._shard.update(edge.UpdateOperation.delete_points([point]))


@pytest.fixture(params=["edge", "memory", "rest"])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    if request.param == "edge":
        yield Edge(tmp_path, rows=ROWS)
        return
    client = Client(tmp_path, rows=ROWS)
    if request.param == "memory":
        client.client._client = OneAtATime(client.client._client)  # type: ignore[assignment]
        yield client
        return
    monkeypatch.setattr(qdrant_rows, "_POLL_SECONDS", 0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "user"))
    with closing(Server()) as server:
        server.local, client.client = client.client, server.client
        yield client


@pytest.fixture
def refiner(engine: Engine) -> Refiner:
    ids = np.array([str(point) for point in engine.points], ID_TEXT)
    made = random_refiner(DIM, ids, metric=Metric.COSINE)
    made.save(engine.folder / "refiner")
    return made


def open_points(engine: Engine, store: Any) -> ClientPoints | EdgePoints:
    if isinstance(engine, Client):
        return ClientPoints(engine.client)
    return EdgePoints(store._shard)


def settings(engine: Engine) -> Settings:
    return Settings(refiner=engine.folder / "refiner", state=engine.state, accept_unmeasured=True)


def refine_meanwhile(
    engine: Engine, patch: pytest.MonkeyPatch, *, wait: bool, mode: str = "in-place"
) -> Application:
    """Refine while an application writes, some of it between reading a row and writing it.

    Args:
        engine: The collection.
        patch: Lets the application write within each request.
        wait: Whether what a request allows the application to write is written before it goes on.
        mode: Where refined vectors are written.
    """
    with engine.open(guard_field="version") as store, patch.context() as patched:
        payloads = dict(zip(engine.points, engine.payloads, strict=True))
        application = Application(open_points(engine, store), payloads, DIM, WRITES)
        update, requests = type(store).update, 0

        def update_slowly(target: Any, batch: VectorBatch, allowed: Allowed) -> Mask:
            def asked(now: VectorBatch) -> Mask:
                nonlocal requests
                requests += 1
                found = allowed(now)
                if requests <= REQUESTS:
                    application.go_on(A_REQUEST, wait=wait)
                return found

            written: Mask = update(target, batch, asked)
            return written

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "verify":  # the rows were read back, and are written once more
                application.finish()

        patched.setattr(type(store), "update", update_slowly)
        chosen = replace(settings(engine), mode=mode)
        report = ss.refine(store, Judgments(), chosen, progress=progress)
    assert requests >= REQUESTS
    assert application.done == WRITES
    assert report.written is not None
    assert report.written["mode"] == mode, report.gate
    return application


def assert_holds(engine: Engine, application: Application, others: dict[str, Vectors]) -> None:
    """Compare all points with the application's own, and others where it has none."""
    own = {str(point): vector for point, vector in application.vectors.items()}
    payloads = {str(point): dict(load) for point, load in application.payloads.items()}
    found = engine.everything()
    assert {name: payload for name, _, payload in found} == payloads
    for name, vectors, _ in found:
        expected = own[name] if name in own else others[name]
        np.testing.assert_allclose(vectors[VECTOR], expected, atol=2e-5, err_msg=name)
        if name in own:
            assert vectors[OTHER] == BESIDE[OTHER]


def refined(refiner: Refiner, rows: dict[str, Vectors]) -> dict[str, Vectors]:
    moved = refiner.refine_rows(np.stack(list(rows.values())), np.array(list(rows), ID_TEXT))
    return dict(zip(rows, moved, strict=True))


@pytest.mark.parametrize("wait", [True, False], ids=["between", "at any moment"])
def test_no_write_of_an_application_is_lost(
    engine: Engine, refiner: Refiner, wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.rows()
    application = refine_meanwhile(engine, monkeypatch, wait=wait)
    assert_holds(engine, application, refined(refiner, before))
    with engine.open() as store:
        done = ss.rollback(store, state=engine.state)
    assert_holds(engine, application, before)
    assert done["kept"] == len(application.vectors)
    assert done["restored"] == len(application.payloads) - len(application.vectors)


def test_a_vector_beside_is_given_to_every_row_that_is_as_read(
    engine: Engine, refiner: Refiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.rows()
    application = refine_meanwhile(engine, monkeypatch, wait=True, mode="new-vector")
    assert_holds(engine, application, before)
    beside, expected = engine.rows(f"{VECTOR}@simskip"), refined(refiner, before)
    assert set(beside) == {str(i) for i in application.payloads if i not in application.vectors}
    for name, row in beside.items():
        np.testing.assert_allclose(row, expected[name], atol=2e-5, err_msg=name)
