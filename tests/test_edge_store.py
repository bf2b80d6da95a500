from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import qdrant_edge as edge
from edge_shards import (
    DISTANCES,
    D,
    N,
    any_row,
    batch,
    create,
    fill,
    make,
    params,
    row_ids,
    rows_by_edge,
    shard_of,
    uuids,
)

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import Ids, Metric, Vectors, silent
from simskip_vdb.errors import (
    ConfigError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
)
from simskip_vdb.store import AddsVectors, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract


def numbers(count: int) -> list[int | str]:
    return [3 * i for i in range(count)]


def big_numbers(count: int) -> list[int | str]:
    return [2**64 - count + i for i in range(count)]


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shard"


@pytest.fixture
def vectors() -> Vectors:
    return np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)


def test_a_missing_folder(folder: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no such file or folder"):
        open_store(f"qdrant-edge:{folder}")


def test_a_folder_that_is_no_shard_is_left_as_it_was(folder: Path) -> None:
    (folder / "wal").mkdir(parents=True)
    with pytest.raises(UnsupportedIndexError, match=r"EdgeShard\.create"):
        open_store(f"qdrant-edge:{folder}")
    assert [path.name for path in folder.iterdir()] == ["wal"]


def test_a_snapshot_is_unpacked_first(folder: Path) -> None:
    folder.write_bytes(b"a snapshot")
    with pytest.raises(UnsupportedIndexError, match="unpack_snapshot"):
        open_store(f"qdrant-edge:{folder}")


def test_a_shard_that_this_process_holds(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    with EdgeStore(folder), pytest.raises(StoreError, match="close the application that uses it"):
        EdgeStore(folder)
    with EdgeStore(folder) as store:
        assert store.info().count == N


def test_a_shard_that_another_process_holds(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    code = (
        "import sys, qdrant_edge; shard = qdrant_edge.EdgeShard.load(sys.argv[1]);"
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=PIPE, stdout=PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="Another handle holds the shard open"):
            EdgeStore(folder)
        holder.communicate()
    EdgeStore(folder).close()


def test_a_shard_without_a_log_is_refused(folder: Path, vectors: Vectors) -> None:
    create(folder, params(D), wal_enabled=False).close()
    with pytest.raises(UnsupportedIndexError, match="wal_enabled=True"):
        EdgeStore(folder)


def test_a_panic_is_a_store_error(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    (status,) = folder.glob("segments/*/vector_storage/vectors/status.dat")
    status.write_bytes(b"")
    with pytest.raises(StoreError, match="the shard cannot be opened") as error:
        EdgeStore(folder)
    assert not isinstance(error.value.__cause__, Exception)


def test_a_damaged_configuration(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    (folder / "edge_config.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="damaged"):
        EdgeStore(folder)


def test_the_only_vector_need_not_be_named(folder: Path, vectors: Vectors) -> None:
    shard = create(folder, {"a b": params(D)}, sparse_vectors={"s": edge.EdgeSparseVectorParams()})
    fill(shard, range(N), vectors, "a b")
    shard.close()
    with EdgeStore(folder) as store:
        uri = store.info().uri
        assert uri.endswith("shard?vector=a%20b")
    with EdgeStore.open(uri, read_only=True) as store:
        assert store.info().uri == uri


def test_one_of_several_vectors_is_named(folder: Path) -> None:
    create(folder, {"": params(D), "b": params(3)}).close()
    with pytest.raises(ConfigError, match=r'\?vector=NAME; it has "" \(unnamed\), b'):
        EdgeStore(folder)
    with pytest.raises(ConfigError, match="no vector 'c'"):
        EdgeStore(folder, "c")
    for name, dim in (("", D), ("b", 3)):
        with open_store(f"qdrant-edge:{folder}?vector={name}") as store:  # type: ignore[attr-defined]
            assert store.info().dim == dim


UNFIT = {
    "Manhattan": params(D, distance=edge.Distance.Manhattan),
    "uint8": params(D, datatype=edge.VectorStorageDatatype.Uint8),
    "turbo4": params(D, datatype=edge.VectorStorageDatatype.Turbo4),  # type: ignore[attr-defined]
    "turbo16": params(D, datatype=edge.VectorStorageDatatype.Turbo16),
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_cannot_hold_refined_vectors_is_refused(folder: Path, why: str) -> None:
    create(folder, UNFIT[why]).close()
    with pytest.raises(UnsupportedIndexError, match=why):
        EdgeStore(folder)
    edge.EdgeShard.load(str(folder)).close()


def test_only_sparse_vectors(folder: Path) -> None:
    create(folder, None, sparse_vectors={"s": edge.EdgeSparseVectorParams()}).close()
    with pytest.raises(ConfigError, match="it has none"):
        EdgeStore(folder)


def test_float32_comes_back_bit_for_bit(folder: Path) -> None:
    odd = np.array([0.0, -0.0, 1e-45, -1e-40, 3.4e38, 1 / 3, -(2**-126), 1.0], np.float32)
    make(folder, range(2), np.ones((2, D), np.float32), Metric.EUCLID)
    with EdgeStore(folder) as store:
        assert store.info().exact
        store.update(batch([0], odd[None]), any_row)
        store.settle(silent)
    with EdgeStore(folder) as store:
        assert store.fetch(row_ids([0])).tobytes() == odd.tobytes()


@pytest.mark.parametrize("metric", DISTANCES)
def test_float16_comes_back_within_its_rounding(
    folder: Path, vectors: Vectors, metric: Metric
) -> None:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    make(folder, range(N), -vectors, metric, datatype=edge.VectorStorageDatatype.Float16)
    with EdgeStore(folder) as store:
        info = store.info()
        store.update(batch(range(N), vectors), any_row)
        read = store.fetch(row_ids(range(N)))
    assert not info.exact
    assert 0 < np.linalg.norm(read - vectors, axis=1).max() < info.rounding


QUANTISED = {
    "scalar": edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8),
    "product": edge.ProductQuantizationConfig(edge.CompressionRatio.X8),
    "binary": edge.BinaryQuantizationConfig(),
    "turbo": edge.TurboQuantQuantizationConfig(),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_vectors_are_read_from_the_originals(folder: Path, kind: str) -> None:
    vectors = np.random.default_rng(1).standard_normal((400, 32)).astype(np.float32)
    shard = create(
        folder,
        params(32, Metric.DOT, quantization_config=QUANTISED[kind], on_disk=True,
               hnsw_config=edge.HnswIndexConfig(m=8, ef_construct=40, full_scan_threshold=1)),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
    )  # fmt: skip
    fill(shard, range(400), vectors)
    shard.close()
    query = vectors[:1]
    with EdgeStore(folder) as store:
        store.settle(silent)
        info = store.info()
        assert info.kind == f"Qdrant Edge, HNSW, {kind} quantisation"
        assert info.details["indexed_vectors"] == 400
        assert (info.details["m"], info.details["ef_construct"]) == (8, 40)
        assert list(folder.glob("segments/*/vector_index/../**/quantized*"))
        coarse = store.search(query, 400, {"rescore": 0})
        assert not np.allclose(coarse.scores, np.sort(vectors @ query[0])[::-1], atol=1e-4)
        (rows,) = store.scan(1000)
        np.testing.assert_array_equal(rows.vectors, vectors)
        store.update(batch(range(400), -vectors), any_row)
        store.settle(silent)
        assert store.info() == info
        np.testing.assert_array_equal(store.fetch(row_ids(range(400))), -vectors)
        exact = store.search(query, 400, {"exact": True, "ignore": 1})
        np.testing.assert_allclose(exact.scores[0], np.sort(-vectors @ query[0])[::-1], rtol=1e-4)


def test_search_parameters(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    with EdgeStore(folder) as store:
        known = {"hnsw_ef": 32, "exact": 0, "indexed_only": 0, "ignore": 0, "rescore": 1}
        found = store.search(vectors[:3], 5, {**known, "oversampling": 2.0})
        best = np.argsort(-(vectors[:3] @ vectors.T), axis=1)[:, :5]
        np.testing.assert_array_equal(found.ids, best.astype("S36"))
        with pytest.raises(ConfigError, match="hnsw_ef"):
            store.search(vectors[:1], 5, {"hnsw_ef": -1})
