from __future__ import annotations

from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from edge_shards import create, fill, params, rows_by_edge, shard_of

from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import Ids, Metric, Vectors
from simskip_vdb.store import AddsVectors, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract


def numbers(count: int) -> list[int | str]:
    return [3 * i for i in range(count)]


def big_numbers(count: int) -> list[int | str]:
    return [2**64 - count + i for i in range(count)]


def uuids(count: int) -> list[int | str]:
    return [str(UUID(int=(i + 1) << 70)) for i in range(count)]


def mixed(count: int) -> list[int | str]:
    return [*numbers(count // 2), *uuids(count - count // 2)]


class EdgeContract(RowContract):
    search_params = {"exact": True}  # noqa: RUF012
    name = "text"
    points = staticmethod(numbers)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, metric: Metric) -> None:
        self.folder = tmp_path / "shard"
        self.exact = metric is not Metric.COSINE
        self.tolerance = 0 if self.exact else 1e-6

    @pytest.fixture
    def ids(self) -> Ids:
        return np.array([str(point) for point in self.points(self.count)], "S36")

    def unknown_id(self, ids: Ids) -> Ids:
        return np.array([b"1"], "S36")

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        other = "" if self.name else "other"
        shard = create(
            self.folder, {self.name: params(self.dim, metric), other: params(3, Metric.DOT)}
        )
        fill(shard, self.points(len(ids)), vectors, self.name)
        fill(shard, [2**40 + 1, 2], vectors[:2, :3], other)
        shard.close()
        return EdgeStore(self.folder, self.name)

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        assert isinstance(store, EdgeStore)
        return rows_by_edge(shard_of(store), self.name)

    def test_abilities(self, store: VectorStore) -> None:
        assert isinstance(store, RowWritable)
        assert isinstance(store, Marked)
        assert isinstance(store, AddsVectors)


class TestNamed(EdgeContract):
    pass


class TestUnnamed(EdgeContract):
    name = ""


class TestBigNumbers(EdgeContract):
    metrics = (Metric.DOT,)
    points = staticmethod(big_numbers)


class TestUuids(EdgeContract):
    metrics = (Metric.EUCLID,)
    points = staticmethod(uuids)


class TestMixed(EdgeContract):
    metrics = (Metric.COSINE,)
    points = staticmethod(mixed)
