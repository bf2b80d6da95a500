from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from array_files import COARSE, write_array
from array_files import KINDS as ARRAYS
from array_files import raw_rows as array_rows
from faiss_files import KINDS, make_index, rows_by_faiss, write
from parquet_files import COLUMNS, kinds, raw_rows, write_rows

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_parts import FaissParts
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.connectors.parquet_file import Options, ParquetFile
from simskip_vdb.connectors.parquet_store import ParquetFolder
from simskip_vdb.datatypes import Ids, Metric, Vectors, id_text
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


class TestParquetFile(FileContract):
    @pytest.fixture(autouse=True, params=[*kinds(8), *COLUMNS])
    def _kind(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.lists, self.path = request.param, tmp_path / "rows.parquet"
        self.exact = "half" not in self.lists
        self.tolerance = 0.0 if self.exact else 1e-3

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        write_rows(self.path, ids, vectors, lists=self.lists, group=17)
        vector = "dim_*" if self.lists in COLUMNS else "vector"
        return ParquetFile(self.path, Options(vector=vector, metric=metric))

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        return raw_rows(self.path)


class TestParquetFolder(RowContract):
    @pytest.fixture(
        autouse=True, params=["numbers", "text", "long text", "positions", "double", "half"]
    )
    def _kind(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.kind, self.folder = request.param, tmp_path
        self.text, self.positional = "text" in self.kind, self.kind == "positions"
        self.exact = self.kind != "half"
        self.tolerance = 0.0 if self.exact else 1e-3

    @pytest.fixture
    def ids(self) -> Ids:
        numbers = np.arange(self.count) * (1 if self.positional else 3)
        before = "sku-" + "long-" * 40 * (self.kind == "long text")
        return id_text([f"{before}{i}".encode() for i in numbers]) if self.text else numbers

    def unknown_id(self, ids: Ids) -> Ids:
        return id_text([b"sku-x"]) if self.text else super().unknown_id(ids)

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        lists = self.kind if self.kind in ("double", "half") else "fixed"
        for part, (start, stop) in enumerate(pairwise([0, 17, 40, self.count])):
            path = self.folder / f"day={part}" / "rows.parquet"
            path.parent.mkdir(exist_ok=True)
            own = None if self.positional else ids[start:stop]
            write_rows(path, own, vectors[start:stop], lists=lists, group=9)
        return ParquetFolder(self.folder, Options(metric=metric))

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        parts = [raw_rows(path) for path in sorted(self.folder.glob("*/*.parquet"))]
        vectors = np.concatenate([v for _, v in parts])
        if self.positional:
            return np.arange(len(vectors)), vectors
        return np.concatenate([i for i, _ in parts]), vectors


class TestArrayFile(FileContract):
    @pytest.fixture(autouse=True, params=[*ARRAYS, "npy positions", "npz positions", "npy text"])
    def _kind(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.kind, self.folder = request.param, tmp_path
        self.positional, self.text = "positions" in self.kind, "text" in self.kind
        self.exact = not any(word in self.kind for word in COARSE)
        self.tolerance = 0.0 if self.exact else 4e-3

    @pytest.fixture
    def ids(self) -> Ids:
        numbers = np.arange(self.count) * (1 if self.positional else 3)
        return id_text([f"straße-{i}".encode() for i in numbers]) if self.text else numbers

    def unknown_id(self, ids: Ids) -> Ids:
        return id_text([b"sku-x"]) if self.text else super().unknown_id(ids)

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        uri = write_array(self.folder, self.kind, None if self.positional else ids, vectors)
        return open_store(uri + ("&" if "?" in uri else "?") + f"metric={metric.value}")

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        return array_rows(self.folder / f"rows.{self.kind.split()[0]}")
