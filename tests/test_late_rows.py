"""Late rows are told the same way in every store, whatever digits it reads back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import flat, random_refiner
from edge_shards import create, params
from edge_shards import fill as fill_shard
from live import LiveStore
from qdrant_client import QdrantClient, models
from qdrant_points import make_collection, store_of

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.by_vector import near, near_sketch, sketch
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import ID_TEXT, Ids, Metric, Vectors
from simskip_vdb.journal import Journal
from simskip_vdb.judgments import Judgments
from simskip_vdb.refiner import LateRule
from simskip_vdb.store import VectorStore

N, D = 40, 8
CHANGED = np.array([1, 5, 6, 20])
Put = Callable[[Vectors], None]
NUMBERS: Ids = np.arange(N)
TEXTS: Ids = NUMBERS.astype("S").astype(ID_TEXT)


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    found = rng.normal(size=(2 * N, D)).astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def make(kind: str, folder: Path, rows: Vectors) -> tuple[Callable[[], VectorStore], Put, Ids]:
    """Return what opens a store of some kind, what gives other vectors to rows, and all ids."""
    engine, _, word = kind.partition(", ")
    metric = Metric(word) if word in {metric.value for metric in Metric} else Metric.DOT
    chosen = CHANGED.tolist()
    if engine == "memory":
        live = LiveStore(NUMBERS, rows, metric, half=word == "half precision")
        return lambda: live, lambda new: live.put(CHANGED, new), NUMBERS
    if engine == "FAISS":
        path = flat(folder / "rows.faiss", rows)

        def save(new: Vectors) -> None:
            held = open_store(str(path)).fetch(NUMBERS)
            held[CHANGED] = new
            flat(path, held)

        return lambda: open_store(str(path)), save, NUMBERS
    if engine == "client":
        client = QdrantClient(":memory:")
        make_collection(client, TEXTS, rows, metric, vector="text")

        def put(new: Vectors) -> None:
            points = [
                models.PointVectors(id=i, vector={"text": row})
                for i, row in zip(chosen, new.tolist(), strict=True)
            ]
            client.update_vectors("docs", points)

        return lambda: store_of(client), put, TEXTS
    shard = create(folder / "shard", params(D, metric))
    fill_shard(shard, list(range(N)), rows)
    shard.flush()
    shard.close()

    def write(new: Vectors) -> None:
        import qdrant_edge as edge

        shard = edge.EdgeShard.load(str(folder / "shard"))
        fill_shard(shard, chosen, new)
        shard.flush()
        shard.close()

    return lambda: EdgeStore(folder / "shard"), write, TEXTS


def refine(store: VectorStore, refiner: Path, state: Path) -> None:
    asked = Settings(refiner=refiner, accept_unmeasured=True, state=state)
    ss.refine(store, Judgments(), asked)


@pytest.mark.parametrize(
    "kind",
    [
        "memory, dot",
        "memory, half precision",
        "FAISS, dot",
        "client, dot",
        "client, cosine",
        "edge, dot",
        "edge, cosine",
    ],
)
def test_a_row_with_another_vector_loses_its_offset(
    kind: str, tmp_path: Path, vectors: Vectors
) -> None:
    rows, new = vectors[:N], vectors[N : N + len(CHANGED)]
    open_it, put, ids = make(kind, tmp_path, rows)
    store = open_it()
    info = store.info()
    made = random_refiner(D, np.sort(ids), metric=info.metric)
    refiner = replace(made, late=LateRule.RAW)
    refiner.save(tmp_path / "refiner")

    def read() -> Vectors:
        nonlocal store
        store = open_it()
        store.search(rows[:1], 3, {})  # local mode changes last digits by that
        return np.array(store.fetch(ids))

    def close() -> None:
        if isinstance(store, EdgeStore):
            store.close()

    refine(store, tmp_path / "refiner", tmp_path / "state")
    close()
    expected = refiner.refine_rows(rows, ids)
    within = max(info.rounding, 1e-5)
    assert near(read(), expected, within).all()
    close()
    put(new)
    expected[CHANGED] = new
    for _ in range(2):  # nor later, once they are ours
        store = open_it()
        refine(store, tmp_path / "refiner", tmp_path / "state")
        close()
        assert near(read(), expected, within).all()
        close()


@pytest.mark.parametrize("tolerance", [1e-6, 1e-5, 2e-3])
def test_sketches_know_vectors_again(rng: np.random.Generator, tolerance: float) -> None:
    rows = rng.normal(size=(5000, 96)).astype(np.float32)
    noise = rng.normal(size=rows.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    then = sketch(rows)

    def told(distance: float) -> float:
        moved = (rows + distance * lengths * noise).astype(np.float32)
        return float(near_sketch(moved, then, tolerance).mean())

    assert told(0.9 * tolerance) == 1
    assert told(100 * tolerance) < 0.001
    assert told(1) == 0


def test_an_older_list_of_known_rows(tmp_path: Path, vectors: Vectors) -> None:
    """Without sketches, as earlier versions left it, rows are known by id."""
    rows, new = vectors[:N], vectors[N : N + len(CHANGED)]
    open_it, put, ids = make("client, cosine", tmp_path, rows)
    refiner = replace(random_refiner(D, np.sort(ids), metric=Metric.COSINE), late=LateRule.RAW)
    refiner.save(tmp_path / "refiner")
    refine(open_it(), tmp_path / "refiner", tmp_path / "state")
    with Journal(tmp_path / "state", open_it().info()) as journal:
        known = journal.known(refiner.id)
        assert known is not None
        assert known.sketches is not None
        assert known.sketches.shape == (N, 8)
        journal.save_known(refiner.id, known.ids, known.digests)
        older = journal.known(refiner.id)
        assert older is not None
        assert older.sketches is None
    put(new)
    refine(open_it(), tmp_path / "refiner", tmp_path / "state")
    assert near(open_it().fetch(ids[CHANGED]), refiner.refine_rows(new, ids[CHANGED]), 1e-5).all()
