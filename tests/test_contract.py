from __future__ import annotations

from pathlib import Path

import pytest
from faiss_files import KINDS, make_index, rows_by_faiss, write

from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import Ids, Metric, Vectors
from simskip_vdb.store import VectorStore
from simskip_vdb.testing import FileContract, RowContract


class TestMemoryStore(RowContract):
    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        return MemoryStore(ids, vectors, metric)

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        assert isinstance(store, MemoryStore)
        return store._rows.ids.copy(), store._vectors.copy()


class TestFaissStore(FileContract):
    metrics = (Metric.DOT, Metric.EUCLID)

    @pytest.fixture(autouse=True, params=KINDS)
    def _kind(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.kind = KINDS[request.param]
        self.folder = tmp_path
        self.positional = self.kind.positional
        self.tolerance = self.kind.tolerance
        self.exact = not self.kind.tolerance
        self.search_params = self.kind.params

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        index = make_index(self.kind, ids, vectors, metric)
        return FaissStore(write(index, self.folder / "rows.faiss"))

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        assert isinstance(store, FaissStore)
        return rows_by_faiss(store.path)
