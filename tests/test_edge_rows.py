from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

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
    fill,
    make,
    params,
    row_ids,
    rows_by_edge,
    shard_of,
    uuids,
)

from simskip_vdb.connectors.edge_filters import to_filter
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_points import to_points
from simskip_vdb.datatypes import Mask, VectorBatch, Vectors
from simskip_vdb.errors import (
    ConfigError,
    DataError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shard"


@pytest.fixture
def vectors() -> Vectors:
    return np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)


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
