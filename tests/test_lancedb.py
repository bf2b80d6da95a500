from __future__ import annotations

from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from simskip_vdb.connectors.lance_store import LanceStore
from simskip_vdb.datatypes import ID_TEXT, Ids, Metric, Vectors
from simskip_vdb.store import Claimable, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract

N, D = 40, 4


def lists(vectors: Any) -> Any:  # noqa: ANN401 numpy to pyarrow
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def make(folder: Path, ids: Any, vectors: Any, **more: Any) -> Any:  # noqa: ANN401 lancedb
    rows = {"id": pa.array(ids), "vector": lists(vectors), **more}
    return lancedb.connect(folder).create_table("docs", pa.table(rows))


def raw(folder: Path, column: str = "vector") -> tuple[list[Any], Vectors]:
    table = lancedb.connect(folder).open_table("docs").to_arrow().sort_by("id")
    numbers = np.concatenate([part.flatten().to_numpy() for part in table[column].chunks])
    return table["id"].to_pylist(), numbers.reshape(table.num_rows, -1)


class LanceContract(RowContract):
    exact = True

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "db"

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        order = np.random.default_rng(0).permutation(len(ids))
        names = [i.decode() for i in ids.tolist()] if ids.dtype.kind == "S" else ids
        kept = [names[i] for i in order.tolist()]
        make(self.folder, kept, self.stored(vectors[order]), n=pa.array(order))
        return LanceStore(self.folder, metric=metric.value)

    def stored(self, vectors: Vectors) -> Any:  # noqa: ANN401 of whatever type
        return vectors

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        ids, vectors = raw(self.folder)
        texts = isinstance(ids[0], str)
        found = np.array([i.encode() for i in ids], ID_TEXT) if texts else np.array(ids)
        return found, vectors.astype(np.float32)

    def test_abilities(self, store: VectorStore) -> None:
        assert isinstance(store, RowWritable)
        assert isinstance(store, Marked)
        assert isinstance(store, Claimable)


class TestIntegers(LanceContract):
    pass


class TestTexts(LanceContract):
    metrics = (Metric.DOT,)

    @pytest.fixture
    def ids(self) -> Ids:
        return np.array([f"{i:03}'é\"".encode() for i in range(self.count)], ID_TEXT)

    def unknown_id(self, ids: Ids) -> Ids:
        return np.array([b"nobody"], ID_TEXT)


class TestHalf(LanceContract):
    metrics = (Metric.COSINE, Metric.EUCLID)
    exact = False
    tolerance = 1e-3

    def stored(self, vectors: Vectors) -> Any:  # noqa: ANN401 float16
        return vectors.astype(np.float16)
