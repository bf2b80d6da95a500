from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge as edge
from edge_shards import (
    D,
    N,
    U,
    any_row,
    batch,
    create,
    everything,
    fill,
    params,
    row_ids,
    shard_of,
)

from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import Mask, Metric, VectorBatch, Vectors, silent
from simskip_vdb.errors import (
    ConfigError,
    StoreError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shard"


@pytest.fixture
def vectors() -> Vectors:
    return np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)


def test_nothing_else_changes(folder: Path, vectors: Vectors) -> None:
    shard = rich_shard(folder, vectors)
    before = everything(shard)
    shard.close()
    with EdgeStore(folder, "text") as store:
        store.update(batch(range(N), -vectors), any_row)
        store.settle(silent)
        beside = store.vector_beside("text@simskip", create=True)
        beside.update(batch(range(N), -vectors), any_row)
        beside.settle(silent)
        after = everything(shard_of(store))
        schema = shard_of(store).info().payload_schema
    assert len(after) == len(before) == N
    assert list(schema) == ["n"]
    for point, (payload, held) in before.items():
        now_payload, now = after[point]
        new = (-vectors[int(point)]).tolist()
        assert now_payload == payload
        assert now == {**held, "text": new, "text@simskip": new}


def rich_shard(folder: Path, vectors: Vectors) -> edge.EdgeShard:
    shard = create(
        folder,
        {"": params(2), "text": params(D)},
        sparse_vectors={"words": edge.EdgeSparseVectorParams()},
    )
    shard.update(
        U.upsert_points(
            [
                edge.Point(
                    at,
                    {
                        "text": row,
                        "words": edge.SparseVector([at, at + 5], [0.5, 1.5]),
                        **({"": row[:2]} if at % 2 else {}),
                    },
                    {"n": at, "deep": {"er": [at, None, "é"]}},
                )
                for at, row in enumerate(vectors.tolist())
            ]
        )
    )
    shard.update(U.create_field_index("n", edge.PayloadSchemaType.Integer))
    return shard


def test_read_only_refuses_every_write(folder: Path, vectors: Vectors) -> None:
    rich_shard(folder, vectors).close()
    with EdgeStore(folder, "text", read_only=True) as store:
        before = everything(shard_of(store))
        writes: list[Callable[[], object]] = [
            lambda: store.update(batch([1], vectors[:1]), any_row),
            lambda: store.settle(silent),
            lambda: store.mark({"refiner": "r"}),
            lambda: store.vector_beside("new", create=True),
            lambda: store.drop_vector_beside(""),
        ]
        for write in writes:
            with pytest.raises(ConfigError, match="reading only"):
                write()
        assert everything(shard_of(store)) == before
        assert not Path(f"{folder}.simskip").exists()
    shard = edge.EdgeShard.load(str(folder))
    assert everything(shard) == before


def test_notes(folder: Path, vectors: Vectors) -> None:
    rich_shard(folder, vectors).close()
    with EdgeStore(folder, "text") as store:
        assert store.info().state == Path(f"{folder}.simskip/text")
        assert store.marker() is None
        store.mark(None)
        store.mark({"refiner": "one"})
    with EdgeStore(folder, "") as other:
        assert other.marker() is None
        other.mark({"refiner": "two"})
    with EdgeStore(folder, "text") as store:
        assert store.marker() == {"refiner": "one"}
        store.mark(None)
        assert store.marker() is None
    with EdgeStore(folder, "") as other:
        assert other.marker() == {"refiner": "two"}
        other.mark(None)
        file = Path(f"{folder}.simskip/marker.json")
        assert not file.exists()
        file.write_bytes(b"[")
        with pytest.raises(StoreError, match="damaged"):
            other.marker()


def test_a_vector_beside(folder: Path, vectors: Vectors) -> None:
    rich_shard(folder, vectors).close()
    with EdgeStore(folder, "text") as store:
        with pytest.raises(ConfigError, match="no vector 'text@simskip'"):
            store.vector_beside("text@simskip", create=False)
        beside = store.vector_beside("text@simskip", create=True)
        info = beside.info()
        assert (info.count, info.dim, info.metric) == (0, D, Metric.DOT)
        shown = []

        def allowed(now: VectorBatch) -> Mask:
            shown.append(now)
            return any_row(now)

        points = [1, 2, N + 1]
        assert beside.update(batch(points, vectors[:3]), allowed).tolist() == [True, True, False]
        assert shown[0].ids.tolist() == [b"1", b"2"]
        assert np.isnan(shown[0].vectors).all()
        (rows,) = beside.scan(N)
        assert rows.ids.tolist() == [b"1", b"2"]
        np.testing.assert_array_equal(rows.vectors, vectors[:2])
        np.testing.assert_array_equal(store.fetch(row_ids(range(N))), vectors)
        beside.close()
        assert store.vector_beside("text@simskip", create=False).info().count == 2
        with pytest.raises(ConfigError, match="is this vector"):
            store.drop_vector_beside("text")
        store.drop_vector_beside("text@simskip")
        store.drop_vector_beside("text@simskip")
        with pytest.raises(ConfigError):
            store.vector_beside("text@simskip", create=False)
    with EdgeStore(folder, "text") as store:
        np.testing.assert_array_equal(store.fetch(row_ids(range(N))), vectors)


CHILD = """
import os, sys
import numpy as np
from pathlib import Path
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import VectorBatch, silent
folder, what = Path(sys.argv[1]), sys.argv[2]
store = EdgeStore(folder)
store.settle(silent)
ids = np.array([str(i) for i in range(KILLED)], "S36")
new = VectorBatch(ids=ids, vectors=np.full((KILLED, 8), 2, np.float32))
if what == "update":
    def allowed(now):
        if b"1500" in now.ids:
            os.kill(os.getpid(), 9)
        return np.ones(len(now), bool)
    store.update(new, allowed)
else:
    beside = store.vector_beside("beside", create=True)
    if what == "fill":
        beside.update(new, lambda now: np.ones(len(now), bool))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("what", ["update", "create", "fill"])
def test_a_kill_leaves_a_shard_that_opens(folder: Path, what: str) -> None:
    count = 3000
    old = np.ones((count, D), np.float32)
    shard = create(folder, params(D), optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1))
    fill(shard, range(count), old)
    shard.close()
    code = CHILD.replace("KILLED", str(count))
    assert subprocess.run([sys.executable, "-c", code, folder, what]).returncode == -9
    with EdgeStore(folder, "") as store:
        read = store.fetch(row_ids(range(count)))
        new = (read == 2).all(axis=1)
        assert (new | (read == 1).all(axis=1)).all()
        assert 0 < new.sum() < count if what == "update" else not new.any()
        store.settle(silent)
        if what == "fill":
            beside = store.vector_beside("beside", create=False)
            assert beside.fetch(row_ids(range(count))).min() == 2
