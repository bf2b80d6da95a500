"""Multivectors in both engines of Qdrant: the contract of their rows, and small collections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge
from qdrant_client import QdrantClient, models

from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import ID_TEXT, Ids, Mask, Metric, VectorBatch, Vectors
from simskip_vdb.store import RowWritable, VectorStore
from simskip_vdb.testing import RowContract

SIZES = (1, 3, 2, 5, 4)  # vectors of a point, over and over
Point = int | str
Held = dict[Point, Vectors]


def row_ids(points: Sequence[int | str], sizes: Sequence[int]) -> Ids:
    names = [f"{p}#{i}" for p, size in zip(points, sizes, strict=True) for i in range(size)]
    return np.array(names, ID_TEXT)


def flat(held: Mapping[Any, Vectors]) -> tuple[Ids, Vectors]:
    ids = row_ids(list(held), [len(vectors) for vectors in held.values()])
    return ids, np.concatenate(list(held.values()))


def points_of(ids: Ids) -> Ids:
    return np.array([i.split(b"#")[0] for i in ids.tolist()])


def by_point(ids: Ids, vectors: Vectors) -> Held:
    """Group rows whose points stand together."""
    held: dict[int | str, list[Any]] = {}
    for point, row in zip(points_of(ids).astype("U").tolist(), vectors, strict=True):
        held.setdefault(int(point) if point.isdigit() else point, []).append(row)
    return {point: np.array(rows) for point, rows in held.items()}


def edge_params(dim: int, metric: Metric) -> edge.EdgeVectorParams:
    distance = getattr(edge.Distance, metric.value.capitalize())
    compared = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
    return edge.EdgeVectorParams(dim, distance, multivector_config=compared)


def client_params(dim: int, metric: Metric) -> models.VectorParams:
    return models.VectorParams(
        size=dim,
        distance=models.Distance(metric.value.capitalize()),
        multivector_config=models.MultiVectorConfig(
            comparator=models.MultiVectorComparator.MAX_SIM
        ),
    )


class MultiContract(RowContract):
    """The contract of rows, but that a point is written as a whole or not at all."""

    points: tuple[Point, ...] = tuple(3 * i for i in range(20))

    @pytest.fixture
    def ids(self) -> Ids:
        return row_ids(self.points, SIZES * (len(self.points) // len(SIZES)))

    def unknown_id(self, ids: Ids) -> Ids:
        return np.array(["1#0"], ID_TEXT)

    def test_update_spares_what_it_must(
        self, store: VectorStore, ids: Ids, vectors: Vectors, refined: Vectors
    ) -> None:
        """One row that is not allowed spares its point."""
        assert isinstance(store, RowWritable)
        shown = []

        def allowed(now: VectorBatch) -> Mask:
            shown.append(now)
            return ~np.isin(now.ids, ids[::7])

        written = store.update(VectorBatch(ids=ids, vectors=refined), allowed)
        spared = np.isin(points_of(ids), points_of(ids[::7]))
        assert 0 < spared.sum() < len(ids)
        np.testing.assert_array_equal(written, ~spared)
        self._assert_holds(store, ids, np.where(written[:, None], refined, vectors))
        seen = np.concatenate([now.ids for now in shown])
        order = np.argsort(seen)
        np.testing.assert_array_equal(seen[order], np.sort(ids))
        rows = np.concatenate([now.vectors for now in shown])
        self._assert_close(rows[order], vectors[np.argsort(ids)])

    def test_points_are_not_split_between_batches_that_hold_them(self, store: VectorStore) -> None:
        batches = [set(points_of(batch.ids)) for batch in store.scan(7)]
        assert len(set.union(*batches)) == sum(map(len, batches))

    def test_a_row_beyond_the_last_spares_its_point(
        self, store: VectorStore, ids: Ids, vectors: Vectors, refined: Vectors
    ) -> None:
        assert isinstance(store, RowWritable)
        beyond = np.append(ids[:4], np.array([f"{self.points[1]}#3"], ID_TEXT))
        batch = VectorBatch(ids=beyond, vectors=refined[:5])
        written = store.update(batch, lambda now: np.ones(len(now), np.bool_))
        assert written.tolist() == [True, False, False, False, False]
        self._assert_holds(store, ids, np.concatenate([refined[:1], vectors[1:]]))


class EdgeMultiContract(MultiContract):
    name = "text"
    search_params = {"exact": True}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, metric: Metric) -> None:
        self.folder = tmp_path / "shard"
        self.exact = metric is not Metric.COSINE
        self.tolerance = 0 if self.exact else 1e-6

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        self.folder.mkdir()
        config = edge.EdgeConfig(
            vectors={
                self.name: edge_params(self.dim, metric),
                "other": edge.EdgeVectorParams(3, edge.Distance.Dot),
            }
        )
        shard = edge.EdgeShard.create(str(self.folder), config)
        points = [
            edge.Point(point, {self.name: rows.tolist()})
            for point, rows in by_point(ids, vectors).items()
        ]
        points.append(edge.Point(2, {"other": [1.0, 2.0, 3.0]}))
        shard.update(edge.UpdateOperation.upsert_points(points))
        shard.close()
        return EdgeStore(self.folder, self.name)

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        assert isinstance(store, EdgeStore)
        records = store._shard.scroll(edge.ScrollRequest(limit=10**6, with_vector=True))[0]
        held = {}
        for record in records:
            vector: Any = record.vector
            found = vector if isinstance(vector, list) else vector.get(self.name)
            if found is not None:
                point = record.id if isinstance(record.id, int) else str(record.id)
                held[point] = np.array(found, np.float32)
        return flat(held)


class ClientMultiContract(MultiContract):
    name = "text"

    @pytest.fixture(autouse=True)
    def _client(self, metric: Metric) -> None:
        self.client = QdrantClient(":memory:")
        self.exact = metric is not Metric.COSINE
        self.tolerance = 0 if self.exact else 1e-6

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        other = models.VectorParams(size=3, distance=models.Distance.DOT)
        params = client_params(self.dim, metric)
        self.client.create_collection(
            "docs", vectors_config={self.name: params, "other": other} if self.name else params
        )
        points = [
            models.PointStruct(id=point, vector={self.name: rows.tolist()}, payload={})
            for point, rows in by_point(ids, vectors).items()
        ]
        if self.name:
            points.append(models.PointStruct(id=2, vector={"other": [1.0, 2.0, 3.0]}, payload={}))
        self.client.upsert("docs", points)
        return QdrantStore(self.client, "docs", self.name)

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        records, _ = self.client.scroll("docs", limit=10**6, with_vectors=True)
        held = {}
        for record in records:
            vector: Any = record.vector
            found = vector.get(self.name) if isinstance(vector, dict) else vector
            if found is not None:
                held[record.id if isinstance(record.id, int) else str(record.id)] = np.array(
                    found, np.float32
                )
        return flat(held)
