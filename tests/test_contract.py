from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faiss_files import KINDS, make_index, rows_by_faiss, write

from simskip_vdb.connectors.faiss_parts import FaissParts
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


class TestFaissParts(RowContract):
    metrics = (Metric.DOT, Metric.EUCLID)

    @pytest.fixture(
        autouse=True, params=["flat", "hnsw", "ivf", "idmap-flat", "refine-ivfpq", "numbered ivf"]
    )
    def _kind(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.numbered = request.param == "numbered ivf"
        self.kind = KINDS["ivf" if self.numbered else request.param]
        self.folder = tmp_path
        self.positional = self.kind.positional or self.numbered
        self.search_params = self.kind.params

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        edges = [0, 17, 40, self.count]
        for part, (start, stop) in enumerate(pairwise(edges)):
            own = np.arange(stop - start) if self.numbered else ids[start:stop]
            index = make_index(self.kind, own, vectors[start:stop], metric)
            write(index, self.folder / f"part{part}.faiss")
        return FaissParts(self.folder / "part*.faiss")

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        parts = [rows_by_faiss(path) for path in sorted(self.folder.glob("part*.faiss"))]
        vectors = np.concatenate([vectors for _, vectors in parts])
        if self.positional:
            return np.arange(len(vectors)), vectors
        return np.concatenate([ids for ids, _ in parts]), vectors
