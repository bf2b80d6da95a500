from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import qdrant_edge as edge
from edge_shards import (
    DISTANCES,
    U,
    create,
    everything,
    fill,
    make,
    params,
    rows_by_edge,
    shard_of,
)

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.edge_filters import to_filter
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_points import to_points
from simskip_vdb.datatypes import Ids, Mask, Metric, VectorBatch, Vectors, silent
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
)
from simskip_vdb.store import AddsVectors, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract

N, D = 40, 8


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shard"


@pytest.fixture
def vectors() -> Vectors:
    return np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)


def any_row(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def row_ids(points: Iterable[int | str]) -> Ids:
    return np.array([str(point) for point in points], "S36")


def batch(points: Sequence[int | str], vectors: Vectors) -> VectorBatch:
    return VectorBatch(ids=row_ids(points), vectors=vectors)


def test_a_missing_folder(folder: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no such folder"):
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
    "several vectors": params(
        D, multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
    ),
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


@pytest.mark.parametrize(
    "given", ['{"must": [{"key": "even", "match": {"value": true}}]}', "even=true"]
)
def test_a_filter_chooses_rows(folder: Path, vectors: Vectors, given: str) -> None:
    make(folder, range(N), vectors, payloads=[{"even": at % 2 == 0} for at in range(N)])
    even = list(range(0, N, 2))
    with EdgeStore.open(f"qdrant-edge:{folder}", read_only=False, filter=given) as store:
        assert store.info().count == len(even)
        rows = list(store.scan(7))
        assert np.concatenate([each.ids for each in rows]).tolist() == row_ids(even).tolist()
        assert store.peek(row_ids([1, 2])).ids.tolist() == [b"2"]
        with pytest.raises(DataError, match="no row with id 1"):
            store.fetch(row_ids([1, 2]))
        assert set(store.search(vectors[:1], N, {}).ids[0].tolist()) == {
            *row_ids(even).tolist(),
            b"",
        }
        written = store.update(batch(range(N), -vectors), any_row)
        assert written.tolist() == [at % 2 == 0 for at in range(N)]
        _, now = rows_by_edge(shard_of(store), "")
    np.testing.assert_array_equal(now, np.where(written[:, None], -vectors, vectors))


PAYLOAD = {
    "n": 3, "x": 0.5, "s": "red fox", "t": True, "l": [1, 2], "o": {"in": 7}, "z": None,
    "when": "2026-02-03T00:00:00Z", "at": {"lon": 5.0, "lat": 50.0}, "oo": [{"a": 1, "b": 2}],
}  # fmt: skip
BOX = {"exterior": {"points": [{"lon": x, "lat": y} for x, y in
       ((4, 49), (4, 51), (6, 51), (6, 49), (4, 49))]}}  # fmt: skip
FILTERS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"must": {"key": "n", "match": {"value": 3}}}, True),
    ({"must": [{"key": "n", "match": {"value": 4}}]}, False),
    ({"must_not": [{"key": "s", "match": {"value": "red fox"}}]}, False),
    ({"should": [{"key": "n", "match": {"any": [1, 3]}}]}, True),
    ({"must": [{"key": "n", "match": {"except": [3]}}]}, False),
    ({"must": [{"key": "t", "match": {"value": True}}]}, True),
    ({"must": [{"key": "t", "match": {"value": False}}]}, False),
    ({"must": [{"key": "s", "match": {"text": "fox"}}]}, True),
    ({"must": [{"key": "s", "match": {"text_any": "fox cat"}}]}, True),
    ({"must": [{"key": "s", "match": {"phrase": "fox red"}}]}, False),
    ({"must": [{"key": "x", "range": {"gt": 0.4, "lte": 0.5}}]}, True),
    ({"must": [{"key": "when", "range": {"gte": "2026-03-01T00:00:00Z"}}]}, False),
    ({"must": [{"key": "when", "range": {"lt": "2026-03-01T00:00:00Z"}}]}, True),
    ({"must": [{"key": "l", "values_count": {"gte": 2}}]}, True),
    ({"must": [{"key": "o.in", "match": {"value": 7}}]}, True),
    ({"must": [{"is_empty": {"key": "nope"}}]}, True),
    ({"must": [{"key": "nope", "is_empty": True}]}, True),
    ({"must": [{"is_null": {"key": "z"}}]}, True),
    ({"must": [{"has_id": [1, 2]}]}, False),
    ({"must": [{"has_vector": ""}]}, True),
    ({"must": [{"nested": {"key": "oo", "filter": {"must": [
        {"key": "a", "match": {"value": 1}}, {"key": "b", "match": {"value": 3}}]}}}]}, False),
    ({"must": [{"should": [{"key": "n", "match": {"value": 3}}]}]}, True),
    ({"min_should": {"conditions": [{"has_id": [0]}, {"has_id": [1]}], "min_count": 2}}, False),
    ({"must": [{"key": "at", "geo_radius": {"center": {"lon": 5, "lat": 50}, "radius": 9}}]}, True),
    ({"must": [{"key": "at", "geo_bounding_box": {
        "top_left": {"lon": 6, "lat": 51}, "bottom_right": {"lon": 7, "lat": 49}}}]}, False),
    ({"must": [{"key": "at", "geo_polygon": BOX}]}, True),
]  # fmt: skip


def test_filters_mean_what_they_mean_to_qdrant(folder: Path, vectors: Vectors) -> None:
    make(folder, [0], vectors[:1], payloads=[PAYLOAD])
    shard = edge.EdgeShard.load(str(folder))
    for given, matches in FILTERS:
        request = edge.CountRequest(filter=to_filter(given, "uri"), exact=True)
        assert (shard.count(request) == 1) == matches, given


@pytest.mark.parametrize(
    "wrong",
    [
        {"musst": []},
        {"must": [{"key": "a", "matches": 3}]},
        {"must": [{"key": "a", "match": {"value": 1.5}}]},
        {"must": [{"key": "a", "match": {"like": "b"}}]},
        {"must": [{"key": "a", "range": {"above": 1}}]},
        {"must": ["a"]},
        {"must": [{"has_id": ["no id"]}]},
    ],
)
def test_a_filter_that_cannot_be_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        to_filter(wrong, "uri")


def test_payload_fields(folder: Path, vectors: Vectors) -> None:
    payloads: list[dict[str, Any]] = [{} for _ in range(N)]
    payloads[1] = {"kind": "a", "in": {"deep er": [1, 2]}, "un related": "x"}
    payloads[2] = {"kind": None, "in": 3}
    make(folder, range(N), vectors, payloads=payloads)
    with EdgeStore(folder) as store:
        (rows,) = store.scan(N, fields=["kind", "in.deep er", "un related"])
        assert rows.fields["kind"] == [None, "a", *[None] * (N - 2)]
        assert rows.fields["in.deep er"] == [None, [1, 2], *[None] * (N - 2)]
        assert rows.fields["un related"][1] == "x"
        for field in ("nope", "in.nope", "kind.nope"):
            with pytest.raises(ConfigError, match=f"no row has a value in .*'{field}'"):
                store.scan(N, fields=[field])
        for field in ("", "a..b", 'a"b'):
            with pytest.raises(ConfigError, match="no payload field"):
                store.scan(N, fields=[field])


def test_an_index_over_a_payload_field_makes_it_known(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    with EdgeStore(folder) as store:
        shard_of(store).update(U.create_field_index("lang", edge.PayloadSchemaType.Keyword))
        (rows,) = store.scan(N, fields=["lang"])
        assert rows.fields["lang"] == [None] * N


def test_a_scan_of_an_empty_shard(folder: Path) -> None:
    create(folder, params(D)).close()
    with EdgeStore(folder) as store:
        assert list(store.scan(5, fields=["anything"])) == []
        assert store.info().count == 0
        assert np.isneginf(store.search(np.ones((1, D), np.float32), 3, {}).scores).all()


def test_a_scan_meets_every_row_once_while_others_come_and_go(
    folder: Path, vectors: Vectors
) -> None:
    points: list[int | str] = [*range(10, 10 * (N // 2) + 10, 10), *uuids(N - N // 2)]
    make(folder, points, vectors)
    rng = np.random.default_rng(3)
    with EdgeStore(folder) as store:
        shard, seen, gone, cursor = shard_of(store), [], set(), None
        for step in range(N):
            rows = next(store.scan(3, cursor=cursor), None)  # a new scan for each batch
            if rows is None:
                break
            assert step < N - 1
            seen += rows.ids.tolist()
            cursor = rows.cursor
            # The row that the scan stands on, one ahead, one behind; and new ones around.
            drop = [seen[-1], row_ids([points[int(rng.integers(len(points)))]])[0]]
            gone |= {each for each in drop if each not in seen}
            shard.update(U.delete_points([p for p in to_points(np.array(drop, "S36"))]))
            if step < 10:
                fill(shard, [10 * step + 5, str(UUID(int=(step << 70) + 1))], vectors[:2])
    assert len(seen) == len(set(seen))
    assert set(row_ids(points).tolist()) - gone <= set(seen)


def test_points_without_the_vector_are_no_rows(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    with EdgeStore(folder) as store:
        shard_of(store).update(U.delete_vectors([3, 4], [""]))
        (rows,) = store.scan(N)
        assert rows.ids.tolist() == row_ids(set(range(N)) - {3, 4}).tolist()
        assert store.info().count == N - 2
        assert store.peek(row_ids([3, 5])).ids.tolist() == [b"5"]
        with pytest.raises(DataError, match="id 3"):
            store.fetch(row_ids([5, 3]))
        assert store.update(batch([3, 5], vectors[:2]), any_row).tolist() == [False, True]
        assert store.info().count == N - 2


def test_a_cursor_that_is_no_id(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    with EdgeStore(folder) as store, pytest.raises(ConfigError, match="no point id"):
        store.scan(3, cursor="there")


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), ("a", "b"), (1.5, 1.25), (True, False), (None, 1), (1, None), (0, False)],
)
def test_a_row_whose_guard_changed_is_left_alone(
    folder: Path, vectors: Vectors, before: object, after: object
) -> None:
    def payload(value: object) -> dict[str, Any]:
        return {} if value is None else {"v": {"is": value}}

    make(folder, range(N), vectors, payloads=[payload(before) for _ in range(N)])
    with EdgeStore(folder, guard_field="v.is") as store:
        shard = shard_of(store)

        def application_writes(now: VectorBatch) -> Mask:
            shard.update(U.overwrite_payload([4, 7], payload(after)))
            return any_row(now)

        store.update(batch(range(N), -vectors), application_writes)
        _, read = rows_by_edge(shard, "")
    kept = np.isin(np.arange(N), [4, 7])
    np.testing.assert_array_equal(read, np.where(kept[:, None], vectors, -vectors))


def test_a_guard_takes_single_values(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors, payloads=[{"v": [1, 2]}] * N)
    with (
        EdgeStore(folder, guard_field="v") as store,
        pytest.raises(ConfigError, match="guard field 'v' of row 0"),
    ):
        store.update(batch(range(N), vectors), any_row)


def test_points_that_vanish_right_before_they_are_written(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    with EdgeStore(folder) as store:

        def remove(now: VectorBatch) -> Mask:
            shard_of(store).update(U.delete_points([2, 5]))
            return any_row(now)

        written = store.update(batch(range(N), -vectors), remove)
        left = np.flatnonzero(written)
        assert np.flatnonzero(~written).tolist() == [2, 5]
        ids, read = rows_by_edge(shard_of(store), "")
    assert ids.tolist() == row_ids(left.tolist()).tolist()
    np.testing.assert_array_equal(read, -vectors[left])


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
        assert store.info().state == Path(f"{folder}.simskip")
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
