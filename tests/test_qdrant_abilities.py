from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_points import (
    OTHER,
    SPARSE,
    any_row,
    digest,
    lead,
    make_collection,
    payload_of,
    raw_rows,
    store_of,
    texts,
)
from qdrant_server import Server

from simskip_vdb.connectors.qdrant_points import choose_vector
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Ids, Mask, VectorBatch, Vectors, silent
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
    VerificationError,
)
from simskip_vdb.store import AddsVectors, Copied, Marked, RowWritable

COUNT, DIM = 60, 8


@pytest.fixture
def ids() -> Ids:
    return texts(list(range(COUNT)))


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def client(ids: Ids, vectors: Vectors) -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    make_collection(client, ids, vectors, vector="text")
    yield client
    client.close()


@pytest.fixture
def server(ids: Ids, vectors: Vectors) -> Iterator[Server]:
    server = Server()
    make_collection(server.local, ids, vectors, vector="text")
    yield server
    server.close()


def test_it_has_every_ability(client: QdrantClient) -> None:
    store = store_of(client)
    for ability in (RowWritable, Marked, AddsVectors, Copied):
        assert isinstance(store, ability)


def test_nothing_but_the_vector_changes(client: QdrantClient, ids: Ids, vectors: Vectors) -> None:
    before = digest(client, "docs", "text")
    assert store_of(client).update(VectorBatch(ids=ids, vectors=-vectors), any_row).all()
    np.testing.assert_array_equal(raw_rows(client, "docs", "text")[1], -vectors)
    assert digest(client, "docs", "text") == before
    client.set_payload("docs", {"v": 1}, [3])
    assert digest(client, "docs", "text") != before


def test_one_of_several_vectors_is_named(client: QdrantClient) -> None:
    with pytest.raises(ConfigError, match="image, text"):
        store_of(client, vector=None)
    with pytest.raises(ConfigError, match="no vector 'audio'"):
        store_of(client, vector="audio")
    assert store_of(client, vector=OTHER).info().dim == 3


def test_points_without_the_vector_are_no_rows(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    client.delete_vectors("docs", ["text"], [0, 7, 59])
    store = store_of(client)
    assert store.info().count == COUNT - 3
    left = np.delete(ids, [0, 7, 59])
    np.testing.assert_array_equal(np.concatenate([b.ids for b in store.scan(5)]), left)
    with pytest.raises(DataError, match="id 7 "):
        store.fetch(ids[6:8])
    written = store.update(VectorBatch(ids=ids, vectors=-vectors), any_row)
    np.testing.assert_array_equal(ids[written], left)
    np.testing.assert_array_equal(raw_rows(client, "docs", "text")[0], left)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"distance": "Manhattan"}, "Manhattan"),
        ({"datatype": "uint8"}, "uint8"),
        ({"datatype": "turbo4"}, "turbo4"),
    ],
)
def test_what_cannot_hold_refined_vectors_is_refused(params: dict[str, Any], why: str) -> None:
    client = QdrantClient(":memory:")
    config = models.VectorParams(**{"size": 4, "distance": "Dot", **params})
    client.create_collection("docs", config)
    with pytest.raises(UnsupportedIndexError, match=rf"memory:/docs.*{why}"):
        QdrantStore(client, "docs")
    client.close()


def test_float16_is_read_back_with_rounding() -> None:
    client = QdrantClient(":memory:")
    config = models.VectorParams(
        size=4, distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16
    )
    client.create_collection("docs", config)
    info = QdrantStore(client, "docs").info()
    assert (info.exact, info.lossy, info.rounding) == (False, False, 2e-3)
    client.close()


def test_fields_are_payload_paths(client: QdrantClient, ids: Ids) -> None:
    client.set_payload("docs", {"two words": 5}, [1])
    client.delete_payload("docs", ["sku"], [2])
    fields = ["sku", "nested.lang", "two words"]
    (batch,) = store_of(client).scan(COUNT, fields=fields)
    assert batch.fields["sku"] == [None if i == 2 else f"s{i}" for i in range(COUNT)]
    assert batch.fields["nested.lang"] == [payload_of(i)["nested"]["lang"] for i in range(COUNT)]
    assert batch.fields["two words"] == [5 if i == 1 else None for i in range(COUNT)]


def test_only_what_is_asked_for_is_sent(server: Server) -> None:
    list(store_of(server.client).scan(50, fields=["nested.lang"]))
    (*_, body) = server.bodies("POST /collections/docs/points/scroll")
    assert body["with_vector"] == ["text"]
    assert body["with_payload"] == ["nested.lang"]
    list(store_of(server.client).scan(50))
    (*_, body) = server.bodies("POST /collections/docs/points/scroll")
    assert body["with_payload"] is False


@pytest.mark.parametrize("slices", [1, 3])
def test_a_filter_chooses_rows(
    client: QdrantClient, ids: Ids, vectors: Vectors, slices: int
) -> None:
    chosen = {"must": [{"key": "group", "match": {"value": 1}}]}
    store = store_of(client, filter=chosen, streams=slices)
    rows = np.arange(COUNT) % 3 == 1
    assert store.info().count == rows.sum()
    np.testing.assert_array_equal(np.concatenate([b.ids for b in store.scan(7)]), ids[rows])
    np.testing.assert_array_equal(store.peek(ids).ids, ids[rows])
    found = store.search(vectors[:4], 50, {}).ids
    assert set(found.ravel().tolist()) - {b""} == set(ids[rows].tolist())
    written = store.update(VectorBatch(ids=ids, vectors=-vectors), any_row)
    np.testing.assert_array_equal(written, rows)
    with pytest.raises(ConfigError, match="not a Qdrant filter"):
        store_of(client, filter={"must": [{"kee": "group"}]})


def test_numbers_reach_search_as_settings(server: Server, vectors: Vectors) -> None:
    store = store_of(server.client)
    params = {"hnsw_ef": 64.0, "exact": 0.0, "rescore": 1.0, "oversampling": 2.0}
    store.search(vectors[:1], 3, params)
    ((body,)) = server.bodies("POST /collections/docs/points/query/batch")
    sent = body["searches"][0]["params"]
    assert (sent["hnsw_ef"], sent["exact"]) == (64, False)
    assert (sent["quantization"]["rescore"], sent["quantization"]["oversampling"]) == (True, 2.0)
    with pytest.raises(ConfigError, match="hnsw_ef"):
        store.search(vectors[:1], 3, {"hnsw_ef": 0.5})


def test_strict_mode_is_kept_to(server: Server, ids: Ids, vectors: Vectors) -> None:
    server.config = {
        "strict_mode_config": {
            "enabled": True,
            "search_allow_exact": False,
            "search_max_batchsize": 4,
            "upsert_max_batchsize": 7,
            "max_query_limit": 20,
            "search_max_hnsw_ef": 100,
        }
    }
    store = store_of(server.client)
    assert store.update(VectorBatch(ids=ids, vectors=-vectors), any_row).all()
    sizes = [len(b["points"]) for b in server.bodies("PUT /collections/docs/points/vectors")]
    assert max(sizes) == 7
    store.search(vectors[:9], 3, {})
    sizes = [len(b["searches"]) for b in server.bodies(".*/query/batch")]
    assert sizes == [4, 4, 1]
    for params, k in (({"exact": 1}, 3), ({"hnsw_ef": 101}, 3), ({}, 21)):
        with pytest.raises(ConfigError, match="strict mode"):
            store.search(vectors[:1], k, params)


def test_settle_waits_for_the_optimisers(server: Server) -> None:
    store = store_of(server.client)
    server.status = ["yellow", "green", "yellow", "green", "green"]
    heard: list[str] = []
    store.settle(lambda stage, done, total: heard.append(stage))
    assert (heard, server.status) == (["index"] * 5, [])
    server.status = ["red"]
    with pytest.raises(StoreError, match="optimising failed"):
        store.settle(silent)


def test_writes_wait_unless_that_would_stall(server: Server, ids: Ids, vectors: Vectors) -> None:
    asked: list[str] = []
    server.watch = lambda request: asked.append(str(request.url.params.get("wait")))
    for prevent in (False, True):
        server.config = {"optimizer_config": {"prevent_unoptimized": prevent}}
        store_of(server.client).update(VectorBatch(ids=ids[:1], vectors=vectors[:1]), any_row)
    assert [w for w in asked if w != "None"] == ["true", "false"]


@pytest.mark.parametrize(("version", "slices"), [("1.18.2", 1), ("1.19.0", 4)])
def test_slices_are_read_where_the_server_has_them(
    server: Server, ids: Ids, version: str, slices: int
) -> None:
    server.version = version
    store = store_of(server.client)
    np.testing.assert_array_equal(np.concatenate([b.ids for b in store.scan(9)]), ids)
    parts = [b.get("filter") for b in server.bodies(".*/points/scroll")]
    seen = {part["must"][0]["slice"]["index"] for part in parts if part}
    assert seen == (set(range(slices)) if slices > 1 else set())


def test_notes_of_two_vectors_and_other_metadata_stay(client: QdrantClient) -> None:
    client.update_collection("docs", metadata={"owner": "search team"})
    text, image = store_of(client), store_of(client, vector=OTHER)
    for number, store in enumerate((text, image)):
        assert store.marker() is None
        store.mark({"run": number})
    text.mark({"run": 7})
    assert [s.marker() for s in (text, image)] == [{"run": 7}, {"run": 1}]
    for store in (text, image):
        store.mark(None)
        assert store.marker() is None
    assert client.get_collection("docs").config.metadata == {"owner": "search team"}


def test_rows_are_refined_under_one_filter_only(client: QdrantClient) -> None:
    def part(group: int) -> QdrantStore:
        return store_of(client, filter={"must": [{"key": "group", "match": {"value": group}}]})

    part(1).mark({"run": 1})
    assert part(1).marker() == {"run": 1}
    assert part(2).marker() is None
    some = {"must": [{"key": "v", "range": {"gte": 1}}]}
    for store in (store_of(client), store_of(client, filter=some)):
        with pytest.raises(ConfigError, match=r"refined under the filter .*\"group\""):
            store.marker()
    part(1).mark(None)
    assert store_of(client).marker() is None


def test_a_vector_beside_is_filled_and_dropped(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    before = digest(client, "docs", "text")
    store = store_of(client)
    with pytest.raises(ConfigError, match="no vector 'text@simskip'"):
        store.vector_beside("text@simskip", create=False)
    beside = store.vector_beside("text@simskip", create=True)
    assert beside.info().count == 0
    assert list(beside.scan(10)) == []
    batch = VectorBatch(ids=np.append(ids[:20], texts([999])), vectors=-vectors[:21])

    def empty(now: VectorBatch) -> Mask:
        return np.asarray(np.isnan(now.vectors).all(axis=1))

    assert beside.update(batch, empty).tolist() == [True] * 20 + [False]
    assert not beside.update(batch, empty).any()
    again = store.vector_beside("text@simskip", create=True)
    np.testing.assert_array_equal(again.fetch(ids[:20]), -vectors[:20])
    assert again.info().count == 20
    np.testing.assert_array_equal(raw_rows(client, "docs", "text")[1], vectors)
    with pytest.raises(ConfigError, match="other dimensions"):
        store.vector_beside(OTHER, create=True)
    with pytest.raises(ConfigError, match="own vector"):
        store.drop_vector_beside("text")
    assert choose_vector(["text", "text@simskip"], None, "here") == "text"
    for _ in range(2):
        store.drop_vector_beside("text@simskip")
    assert digest(client, "docs", "text") == before


def test_a_copy_takes_over_and_goes(client: QdrantClient, ids: Ids, vectors: Vectors) -> None:
    lead(client, "live", "docs")
    client.update_collection("docs", metadata={"owner": "search team"})
    store = store_of(client, "live")
    copy = store.copy("docs-2", silent)
    assert digest(client, "docs-2", "") == digest(client, "docs", "")
    assert copy.update(VectorBatch(ids=ids, vectors=-vectors), any_row).all()
    copy = store.copy("docs-2", silent)  # rows that are there are left
    np.testing.assert_array_equal(copy.fetch(ids), -vectors)
    np.testing.assert_array_equal(store.fetch(ids), vectors)
    store.switch("docs-2")
    np.testing.assert_array_equal(store_of(client, "live").fetch(ids), -vectors)
    with pytest.raises(ConfigError, match="alias 'live' leads to 'docs-2'"):
        store.drop_copy("docs-2")
    store.switch("docs")
    for _ in range(2):
        store.drop_copy("docs-2")
    assert [c.name for c in client.get_collections().collections] == ["docs"]
    assert client.get_collection("docs").config.metadata == {"owner": "search team"}


def test_collections_of_others_are_left_alone(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    make_collection(client, ids, vectors, name="theirs", vector="text")
    store = store_of(client)
    for name in ("theirs", "docs"):
        with pytest.raises(ConfigError, match="not a copy"):
            store.drop_copy(name)
        with pytest.raises(ConfigError, match="not a copy"):
            store.copy(name, silent)
    with pytest.raises(ConfigError, match="collection's own name"):
        store.switch("theirs")
    lead(client, "live", "docs")
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        store_of(client, "live").switch("nowhere")


def test_points_that_are_gone_leave_the_copy(client: QdrantClient) -> None:
    store = store_of(client)
    store.copy("docs-2", silent)
    client.delete("docs", [4])
    with pytest.raises(VerificationError, match="point 4 of the copy 'docs-2'"):
        store.compare("docs-2", silent)
    store.copy("docs-2", silent)
    store.compare("docs-2", silent)
    assert client.count("docs-2").count == client.count("docs").count


@pytest.mark.parametrize("what", ["payload", "other vector", "sparse vector", "missing"])
def test_a_copy_that_differs_is_brought_up_to_date(client: QdrantClient, what: str) -> None:
    store = store_of(client)
    store.copy("docs-2", silent)
    if what == "payload":
        client.set_payload("docs-2", {"v": 1}, [4])
    elif what == "missing":
        client.delete_vectors("docs-2", [OTHER], [4])
    else:
        sparse = models.SparseVector(indices=[4, 10], values=[1.0, 0.25])
        other: Any = {SPARSE: sparse} if what == "sparse vector" else {OTHER: [4.0, 1.0, -0.999]}
        client.update_vectors("docs-2", [models.PointVectors(id=4, vector=other)])
    with pytest.raises(VerificationError, match="point 4 of the copy 'docs-2'"):
        store.compare("docs-2", silent)
    store.copy("docs-2", silent)
    store.compare("docs-2", silent)


def test_every_setting_is_copied(server: Server) -> None:
    server.config = {
        "params": {"shard_number": 3, "replication_factor": 2, "on_disk_payload": True},
        "hnsw_config": {"m": 24, "payload_m": 8},
        "optimizer_config": {"indexing_threshold": 999},
        "wal_config": {"wal_capacity_mb": 64},
        "quantization_config": {"scalar": {"type": "int8", "always_ram": True}},
        "strict_mode_config": {"enabled": True, "max_query_limit": 500},
    }
    store_of(server.client).copy("docs-2", silent)
    (made,) = server.bodies("PUT /collections/docs-2")
    names = {"optimizer_config": "optimizers_config"}
    for section, wanted in server.config.items():
        sent = made if section == "params" else made[names.get(section, section)]
        for name, value in wanted.items():
            if isinstance(value, dict):
                assert sent[name].items() >= value.items()
            else:
                assert sent[name] == value, (section, name)
    assert made["sparse_vectors"].keys() == {"words"}
    assert made["vectors"].keys() == {"text", OTHER}


def test_custom_sharding_needs_a_key(server: Server, ids: Ids, vectors: Vectors) -> None:
    server.config = {"params": {"sharding_method": "custom"}}
    batch = VectorBatch(ids=ids, vectors=-vectors)
    with pytest.raises(ConfigError, match="shard_key=KEY"):
        store_of(server.client).update(batch, any_row)
    store = store_of(server.client, shard_key="de")
    assert store.update(batch, any_row).all()
    for request in (".*/points/vectors", ".*/points"):
        assert {b["shard_key"] for b in server.bodies(request)} == {"de"}
    with pytest.raises(UnsupportedIndexError, match="sharded"):
        store.copy("docs-2", silent)


def test_a_handle_for_reading_writes_nothing(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    store = store_of(client, read_only=True)
    for action in (
        lambda: store.update(VectorBatch(ids=ids, vectors=vectors), any_row),
        lambda: store.mark({}),
        lambda: store.vector_beside("new", create=True),
        lambda: store.drop_vector_beside(OTHER),
        lambda: store.copy("docs-2", silent),
        lambda: store.switch("docs"),
        lambda: store.drop_copy("docs"),
    ):
        with pytest.raises(ConfigError, match="reading only"):
            action()
