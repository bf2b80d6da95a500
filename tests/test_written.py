"""Success means written: what a store may change of a vector, and a write that reached no row."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from builders import flat, ivf, random_refiner, refine_by_hand
from live import LiveStore
from qdrant_client import QdrantClient, models

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import ID_TEXT, Metric, Vectors
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import NothingWrittenError
from simskip_vdb.journal import Journal
from simskip_vdb.judgments import Judgments
from simskip_vdb.refiner import LateRule, Refiner
from simskip_vdb.reindex import recover, snapshot, write
from simskip_vdb.store import VectorStore

N, D = 60, 8
UNMEASURED = Judgments()


@pytest.fixture
def rows(rng: np.random.Generator) -> Vectors:
    """Vectors of lengths from .01 to 9, and one as half precision leaves a unit vector."""
    directions = rng.normal(size=(N, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.geomspace(0.01, 9, N)
    lengths[7] = 1.0001
    return (directions * lengths[:, None]).astype(np.float32)


def unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def local(folder: Path, rows: Vectors, *, name: str = "") -> str:
    """Make a folder of local mode with cosine; return its address."""
    params = models.VectorParams(size=D, distance=models.Distance.COSINE)
    client = QdrantClient(path=str(folder))
    client.create_collection("c", vectors_config={name: params} if name else params)
    client.upsert(
        "c",
        [
            models.PointStruct(id=i, vector={name: row} if name else row, payload={"n": i})
            for i, row in enumerate(rows.tolist())
        ],
    )
    client.close()
    return f"qdrant-local:{folder}?collection=c"


def raw(folder: Path, name: str = "") -> Vectors:
    client = QdrantClient(path=str(folder))
    try:
        found, _ = client.scroll("c", limit=1000, with_vectors=True)
        vectors = [r.vector[name] if isinstance(r.vector, dict) else r.vector for r in found]
        return np.array(vectors, np.float32)
    finally:
        client.close()


@pytest.mark.parametrize("mode", ["in-place", "new-vector"])
def test_local_mode_under_cosine_takes_vectors_of_any_length(
    tmp_path: Path, rows: Vectors, mode: str
) -> None:
    name = "text" if mode == "new-vector" else ""
    folder = tmp_path / "db"
    uri = local(folder, rows, name=name)
    ids = np.sort(np.array([str(i) for i in range(N)], ID_TEXT))
    refiner = random_refiner(D, ids, metric=Metric.COSINE)
    refiner.save(tmp_path / "refiner")
    asked = Settings(refiner=tmp_path / "refiner", accept_unmeasured=True, mode=mode)
    with_store = open_store(uri)
    assert isinstance(with_store, QdrantStore)
    report = ss.refine(with_store, UNMEASURED, asked)
    assert report.written is not None
    assert (report.written["rows"], report.written["theirs"]) == (N, 0)
    with_store.close()
    named = np.array([str(i) for i in range(N)], ID_TEXT)
    expected = refiner.refine_rows(unit(rows), named)
    held = raw(folder, f"{name}@simskip" if name else "")
    np.testing.assert_allclose(unit(held), unit(expected), atol=1e-6)
    for _ in range(2):  # opened anew, it is read with other last digits
        with_store = open_store(uri)
        assert isinstance(with_store, QdrantStore)
        assert not ss.status(with_store)["changed_since"]
        with_store.close()
    with_store = open_store(uri)
    assert isinstance(with_store, QdrantStore)
    undone = ss.rollback(with_store)
    with_store.close()
    assert undone["exact"]
    np.testing.assert_allclose(unit(raw(folder, name)), unit(rows), atol=1e-6)


def test_a_row_left_raw_is_known_with_other_last_digits(tmp_path: Path, rows: Vectors) -> None:
    """Half of the rows stay as they were; a search in between makes their last digits others."""
    uri = local(tmp_path / "db", rows)
    refiner = random_refiner(D, np.array(["0"], ID_TEXT), metric=Metric.COSINE)
    store = open_store(uri)
    assert isinstance(store, QdrantStore)

    def searched(written: VectorStore) -> None:
        written.search(rows[:1], 1, {})

    info = store.info()
    assert info.state is not None
    with Journal(info.state, info) as journal:
        refiner.save(journal.refiners / refiner.id)
        found = snapshot(store, journal)
        late = np.arange(N) % 2 == 0
        write(
            store,
            found,
            lambda start, x: refiner.refine_rows(
                x, found.rows.ids[start : start + len(x)], late[start : start + len(x)]
            ),
            journal=journal,
            refiner=refiner,
            accept=searched,
            summary={"side": "docs"},
        )
    store.close()
    store = open_store(uri)
    assert isinstance(store, QdrantStore)
    assert not ss.status(store)["changed_since"]
    store.close()


def test_local_mode_shows_one_vector_before_and_after_a_search(
    tmp_path: Path, rows: Vectors
) -> None:
    store = open_store(local(tmp_path / "db", rows))
    before = np.concatenate([batch.vectors for batch in store.scan(7)])
    store.search(rows[:1], 3, {})
    after = np.concatenate([batch.vectors for batch in store.scan(7)])
    np.testing.assert_allclose(before, after, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-5)
    assert isinstance(store, QdrantStore)
    store.close()


def test_a_copy_with_another_vector_of_any_length_is_the_same(rows: Vectors) -> None:
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=D, distance=models.Distance.COSINE)
    client.create_collection("c", vectors_config={"text": params, "image": params})
    points = [
        models.PointStruct(id=i, vector={"text": row, "image": row[::-1]})
        for i, row in enumerate(rows.tolist())
    ]
    client.upsert("c", points)
    store = QdrantStore(client, "c", "text")
    # Local mode holds what it was given where it loaded it from a folder.
    client._client.collections["c"].vectors["image"][:N] = rows[:, ::-1]  # type: ignore[attr-defined]
    store.copy("c@simskip-1", lambda *_: None)
    store.compare("c@simskip-1", lambda *_: None)


class Rewritten(LiveStore):
    """An application writes every row again whenever rows are about to be written."""

    def update(self, batch, allowed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        self.put(self._rows.ids, self._vectors * np.float32(1.5))
        return super().update(batch, allowed)


def test_a_write_that_reaches_no_row_fails(tmp_path: Path, rows: Vectors) -> None:
    ids = np.arange(N)
    store = Rewritten(ids, rows)
    refiner = random_refiner(D, ids)
    with Journal(tmp_path / "state", store.info()) as journal:
        with pytest.raises(NothingWrittenError, match="60 rows were changed") as error:
            refine_by_hand(store, journal, refiner)
        assert journal.manifest.current is None
        assert journal.manifest.pending is None
        assert not journal.manifest.history
    assert error.value.exit_code == 5
    assert store.note is None
    recover(store, journal)
    scale = {i: row[0] / rows[i][0] for i, row in store.content().items()}
    assert all(value > 1 for value in scale.values())  # the application's rows stayed


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_refiner_that_moves_no_row_of_a_file_fails(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    """Every row came after the fit, and is left raw."""
    vectors = unit(rng.normal(size=(N, D)).astype(np.float32))
    path = tmp_path / "rows.faiss"
    flat(path, vectors) if kind == "flat" else ivf(path, np.arange(N), vectors)
    made = random_refiner(D, np.arange(N))
    refiner = Refiner(
        dim=D, side=made.side, metric=made.metric, alpha=0.5, layers=made.layers, late=LateRule.RAW
    )
    store, before = open_store(str(path)), sha256_of(path)
    info = store.info()
    assert info.state is not None
    with Journal(info.state, info) as journal:
        refiner.save(journal.refiners / refiner.id)
        journal.save_known(refiner.id, np.array([N + 1]), np.array([1], np.uint64))
    refiner.save(tmp_path / "refiner")
    with pytest.raises(NothingWrittenError, match="after its fit"):
        ss.refine(store, UNMEASURED, Settings(refiner=tmp_path / "refiner", accept_unmeasured=True))
    assert sha256_of(path) == before
    assert ss.status(open_store(str(path)))["refined"] is None
    assert faiss.read_index(str(path)).ntotal == N


def test_edge_under_cosine_takes_vectors_of_any_length(tmp_path: Path, rows: Vectors) -> None:
    edge = pytest.importorskip("qdrant_edge")
    folder = tmp_path / "shard"
    folder.mkdir()
    params = edge.EdgeVectorParams(size=D, distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=params))
    points = [edge.Point(i, {"": row}, {}) for i, row in enumerate(rows.tolist())]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.flush()
    shard.close()
    named = np.array([str(i) for i in range(N)], ID_TEXT)
    random_refiner(D, np.sort(named), metric=Metric.COSINE).save(tmp_path / "refiner")
    with EdgeStore(folder) as store:
        asked = Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)
        report = ss.refine(store, UNMEASURED, asked)
        assert report.written is not None
        assert report.written["rows"] == N
        assert ss.rollback(store)["exact"]
