"""Multivectors in both engines of Qdrant, refined and rolled back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge
from builders import random_refiner
from engines import ALIAS, DIM, OTHER, VECTOR, Client, Edge, Engine, Rows
from multivectors import SIZES, client_params, edge_params, flat, row_ids
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse
from qdrant_points import AT_ONCE, as_client

import simskip_vdb as ss
from simskip_vdb import Refiner, Settings
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import ID_TEXT, Mask, Metric, VectorBatch, Vectors
from simskip_vdb.errors import DataError
from simskip_vdb.judgments import Judgments

POINTS = 60
BESIDE = f"{VECTOR}@simskip"


def several(points: list[tuple[Any, Any, Any]]) -> list[tuple[Any, Any, Any]]:
    """Give points of one vector several: it, and others made from it."""
    made = []
    for at, (point, vectors, payload) in enumerate(points):
        vector = vectors[VECTOR]
        if np.ndim(vector) == 1:
            count = SIZES[at % len(SIZES)]
            vector = [np.roll(vector, shift).tolist() for shift in range(count)]
        made.append((point, {**vectors, VECTOR: vector}, payload))
    return made


class MultiClient(Client):
    def space(self) -> models.VectorParams:
        return client_params(DIM, Metric.COSINE)

    def put(self, points: list[tuple[Any, Any, Any]]) -> None:
        super().put(several(points))


class MultiEdge(Edge):
    def space(self) -> edge.EdgeVectorParams:
        return edge_params(DIM, Metric.COSINE)

    def put(self, points: list[tuple[Any, Any, Any]]) -> None:
        super().put(several(points))


@pytest.fixture
def points() -> int:
    return POINTS


@pytest.fixture(params=["edge", "memory"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, points: int) -> Engine:
    made = MultiEdge if request.param == "edge" else MultiClient
    return made(tmp_path, rows=points)


@pytest.fixture
def refiner(engine: Engine) -> Path:
    return save_refiner(engine)


def save_refiner(engine: Engine) -> Path:
    ids, _ = flat(engine.rows())
    folder = engine.folder / "refiner"
    random_refiner(DIM, ids, metric=Metric.COSINE).save(folder)
    return folder


def refine(engine: Engine, refiner: Path, **options: Any) -> Any:  # noqa: ANN401
    settings = Settings(refiner=refiner, accept_unmeasured=True, state=engine.state)
    with engine.open() as store:
        return ss.refine(store, Judgments(), replace(settings, **options))


def rollback(engine: Engine) -> dict[str, Any]:
    with engine.open() as store:
        return ss.rollback(store, state=engine.state)


def refined(refiner: Path, originals: Rows) -> Rows:
    loaded = Refiner.load(refiner)
    return {
        name: loaded.refine_rows(rows, row_ids([name], [len(rows)]))
        for name, rows in originals.items()
    }


def assert_same(rows: Rows, expected: Rows, tolerance: float = 2e-5) -> None:
    assert list(rows) == list(expected)
    for name, vectors in expected.items():
        assert rows[name].shape == vectors.shape
        np.testing.assert_allclose(rows[name], vectors, atol=tolerance, err_msg=name)


def count(rows: Rows) -> int:
    return sum(map(len, rows.values()))


def test_refine_in_place_and_back(engine: Engine, refiner: Path) -> None:
    before, rest = engine.rows(), engine.digest(VECTOR)
    with engine.open() as store:
        info = store.info()
        assert info.count == count(before) == POINTS // len(SIZES) * sum(SIZES)
        assert info.details["points"] == POINTS
        assert info.kind.endswith("multivectors, MaxSim")
    report = refine(engine, refiner)
    assert report.written is not None
    assert (report.written["rows"], report.written["skipped"]) == (count(before), 0)
    assert report.ann_recall["before"] == report.ann_recall["after"] == 1
    expected = refined(refiner, before)
    assert_same(engine.rows(), expected)
    moved = [np.abs(expected[name] - before[name]).max(axis=1).min() for name in before]
    assert min(moved) > 0.01
    assert engine.digest(VECTOR) == rest
    assert refine(engine, refiner).written["mode"] == "none"
    done = rollback(engine)
    assert (done["exact"], done["restored"], done["kept"]) == (True, count(before), 0)
    assert_same(engine.rows(), before, 0 if isinstance(engine, Edge) else 2e-5)
    assert engine.digest(VECTOR) == rest


@pytest.mark.parametrize("points", [500])  # so many that ann_recall hardly notices three
def test_vectors_that_change_meanwhile_are_spared(
    engine: Engine, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.rows()
    changed, longer, shorter = (
        next(name for name, rows in before.items() if len(rows) == length) for length in (3, 1, 2)
    )
    newer = {
        changed: np.concatenate([before[changed][:-1], np.eye(1, DIM, dtype=np.float32)]),
        longer: np.eye(len(before[longer]) + 1, DIM, dtype=np.float32),
        shorter: before[shorter][:-1],
    }
    kind = EdgeStore if isinstance(engine, Edge) else QdrantStore
    update = kind.update

    def after_the_application(self: Any, *arguments: Any) -> Mask:  # noqa: ANN401
        monkeypatch.undo()
        for name, vectors in newer.items():
            overwrite(self, name, vectors)
        return update(self, *arguments)

    monkeypatch.setattr(kind, "update", after_the_application)
    report = refine(engine, refiner)
    kept = 3  # one was replaced, one was removed, and one is not where it was
    assert report.written["rows"] == count(before) - kept
    expected = {**refined(refiner, before), longer: newer[longer]}
    expected[changed] = np.concatenate([expected[changed][:-1], newer[changed][-1:]])
    expected[shorter] = expected[shorter][:-1]
    assert_same(engine.rows(), expected)
    done = rollback(engine)
    theirs = len(newer[longer]) + 1
    assert (done["restored"], done["kept"]) == (count(before) - kept, theirs)
    assert_same(engine.rows(), {**before, **newer})


def test_a_vector_that_was_added_since_outlives_a_rollback(engine: Engine, refiner: Path) -> None:
    before = engine.rows()
    refine(engine, refiner)
    name = next(name for name, rows in engine.rows().items() if len(rows) == 2)
    added = np.eye(1, DIM, dtype=np.float32)
    with engine.open() as store:
        held = store.fetch(row_ids([name], [2]))
        overwrite(store, name, np.concatenate([held, added]))
    done = rollback(engine)
    assert (done["restored"], done["kept"]) == (count(before), 1)
    assert_same(engine.rows(), {**before, name: np.concatenate([before[name], added])})


def overwrite(store: EdgeStore | QdrantStore, name: str, vectors: Vectors) -> None:
    """Write a point behind a store's back."""
    point = int(name) if name.isdigit() else name
    if isinstance(store, EdgeStore):
        given = [edge.PointVectors(point, {VECTOR: vectors.tolist()})]
        store._shard.update(edge.UpdateOperation.update_vectors(given))
    else:
        whole = models.PointVectors(id=point, vector={VECTOR: vectors.tolist()})
        store._client.update_vectors(ALIAS, [whole])


def test_a_new_multivector_stands_beside(engine: Engine, refiner: Path) -> None:
    before, rest = engine.rows(), engine.digest(BESIDE)
    report = refine(engine, refiner, mode="new-vector")
    assert (report.written["rows"], report.written["target"]) == (count(before), BESIDE)
    assert engine.digest(BESIDE) == rest
    assert_same(engine.rows(BESIDE), refined(refiner, before))
    name = list(before)[4]
    newer = np.eye(len(before[name]) + 1, DIM, dtype=np.float32)
    with engine.open() as store:
        overwrite(store, name, newer)
    refine(engine, refiner, mode="new-vector")
    expected = refined(refiner, before)
    expected[name] = newer  # these came after the refiner's fit, and stay raw
    assert_same(engine.rows(BESIDE), expected)
    rollback(engine)
    assert engine.rows(BESIDE) == {}
    assert_same(engine.rows(), {**before, name: newer})


def test_a_new_collection_takes_over_by_its_alias(tmp_path: Path) -> None:
    engine = MultiClient(tmp_path, rows=POINTS)
    before, rest = engine.rows(), engine.digest(VECTOR)
    refiner = save_refiner(engine)
    report = refine(engine, refiner, mode="new-collection")
    assert engine.leads_to() == report.written["target"]
    assert_same(engine.rows(), refined(refiner, before))
    assert engine.digest(VECTOR) == rest
    assert rollback(engine)["exact"]
    assert_same(engine.rows(), before)


def test_a_guard_lets_the_newer_write_win(engine: Engine) -> None:
    before, touched = engine.rows(), engine.points[2]
    ids, vectors = flat(before)
    theirs = np.eye(3, DIM, dtype=np.float32)
    with engine.open(guard_field="version") as store:

        def application_writes(now: VectorBatch) -> Mask:
            if np.isin(f"{touched}#0".encode(), now.ids):
                overwrite(store, str(touched), theirs)
                bump(store, touched)
            return np.ones(len(now), np.bool_)

        store.update(VectorBatch(ids=ids, vectors=np.roll(vectors, 1, axis=1)), application_writes)
    expected = {name: np.roll(rows, 1, axis=1) for name, rows in before.items()}
    assert_same(engine.rows(), {**expected, str(touched): theirs})


def bump(store: EdgeStore | QdrantStore, point: Any) -> None:  # noqa: ANN401
    if isinstance(store, EdgeStore):
        store._shard.update(edge.UpdateOperation.set_payload([point], {"version": 2}))
    else:
        store._client.set_payload(ALIAS, {"version": 2}, [point])


@pytest.mark.parametrize("cut", [False, True], ids=["nothing", "half"])
def test_a_request_is_sent_again_to_points_that_nobody_changed(tmp_path: Path, cut: bool) -> None:
    engine = MultiClient(tmp_path, rows=POINTS)
    before = engine.rows()
    ids, vectors = flat(before)
    theirs = np.eye(2, DIM, dtype=np.float32)
    touched = list(before)[-1]
    client = as_client(Unlucky(engine.client, cut, touched, theirs))
    store = QdrantStore(client, ALIAS, VECTOR, retries=AT_ONCE)
    moved = np.roll(vectors, 1, axis=1)
    written = store.update(VectorBatch(ids=ids, vectors=moved), lambda now: now.vectors[:, 0] < 9)
    expected = {name: np.roll(rows, 1, axis=1) for name, rows in before.items()}
    assert_same(engine.rows(), {**expected, touched: theirs})
    assert ids[~written].tolist() == row_ids([touched], [len(before[touched])]).tolist()


class Unlucky:
    """A client whose request for a certain point fails once, in part or as a whole.

    Meanwhile the application writes that point.
    """

    def __init__(self, client: QdrantClient, cut: bool, touched: str, theirs: Vectors) -> None:
        self._client, self._cut, self._touched, self._theirs = client, cut, touched, theirs

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(self._client, name)
        return self._fail if name == "update_vectors" else found

    def _fail(self, **arguments: Any) -> Any:  # noqa: ANN401
        points = arguments["points"]
        if self._touched not in {str(point.id) for point in points}:
            return self._client.update_vectors(**arguments)
        if self._cut:
            self._client.update_vectors(**{**arguments, "points": points[: len(points) // 2]})
        point = int(self._touched) if self._touched.isdigit() else self._touched
        whole = models.PointVectors(id=point, vector={VECTOR: self._theirs.tolist()})
        self._client.update_vectors(ALIAS, [whole])
        self._touched = ""
        raise UnexpectedResponse(503, "made up", b"", None)  # type: ignore[arg-type]


def test_judged_documents_of_several_rows_are_refused(engine: Engine) -> None:
    judged = ss.read_judgments(engine.files, doc_id_field="sku")
    with engine.open() as store, pytest.raises(DataError, match="--group-field"):
        ss.refine(store, judged, Settings(state=engine.state))


def test_payload_fields_are_repeated_for_each_row(engine: Engine) -> None:
    with engine.open() as store:
        batches = list(store.scan(50, fields=["sku"]))
    names = dict(zip(map(str, engine.points), engine.payloads, strict=True))
    for batch in batches:
        points = [row.split("#")[0] for row in batch.ids.astype("U").tolist()]
        assert batch.fields["sku"] == [names[point]["sku"] for point in points]
    assert sum(map(len, batches)) == count(engine.rows())


def test_a_filter_narrows_rows_and_search(engine: Engine) -> None:
    chosen = {"must": [{"key": "category", "match": {"value": engine.payloads[0]["category"]}}]}
    category = engine.payloads[0]["category"]
    wanted = {
        str(point)
        for point, payload in zip(engine.points, engine.payloads, strict=True)
        if payload["category"] == category
    }
    rows = {name: vectors for name, vectors in engine.rows().items() if name in wanted}
    ids, vectors = flat(rows)
    with engine.open(filter=chosen) as store:
        assert store.info().count == len(ids)
        found = store.search(vectors[:3], len(ids) + 1, {})
        assert found.ids[:, 0].tolist() == ids[:3].tolist()
        assert set(found.ids[0].tolist()) == {*ids.tolist(), b""}


def test_ids_that_are_no_rows(engine: Engine) -> None:
    point = str(engine.points[0])
    odd = np.array([point, f"{point}#", f"{point}#x", f"{point}#99", "#0", f"{point}#0"], ID_TEXT)
    with engine.open() as store:
        assert store.peek(odd).ids.tolist() == [f"{point}#0".encode()]
        with pytest.raises(DataError, match=point):
            store.fetch(odd[:1])


def test_everything_else_of_a_point_stays(engine: Engine) -> None:
    before = engine.rows(OTHER)
    name = next(name for name, rows in engine.rows().items() if len(rows) == 3)
    rows = engine.rows()[name]
    with engine.open() as store:
        one = VectorBatch(ids=np.array([f"{name}#1"], ID_TEXT), vectors=np.eye(1, DIM, dtype="f"))
        assert store.update(one, lambda now: np.ones(len(now), np.bool_)).tolist() == [True]
    rows[1] = np.eye(1, DIM)
    np.testing.assert_allclose(engine.rows()[name], rows, atol=1e-6)
    assert_same(engine.rows(OTHER), before, 0)
