from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_points import Locked, as_client, digest, make_collection, points_of, raw_rows, texts

from simskip_vdb.connectors.qdrant_calls import Retries
from simskip_vdb.connectors.qdrant_layout import layout_of
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Ids, Mask, VectorBatch, Vectors, silent
from simskip_vdb.errors import StoreError, StoreNotFoundError, TransientStoreError

COUNT, DIM = 300, 8  # three requests of 128 points


class Rpc(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "made up"


def status(code: int, **headers: str) -> UnexpectedResponse:
    return UnexpectedResponse(
        code, "made up", b'{"status": {"error": "why"}}', httpx.Headers(headers)
    )


def lost(kind: type[httpx.TransportError]) -> ResponseHandlingException:
    return ResponseHandlingException(kind("made up"))


TRANSIENT: dict[str, Callable[[], Exception]] = {
    "429": lambda: status(429),
    "429 later": lambda: status(429, **{"retry-after": "7"}),
    "exhausted": lambda: ResourceExhaustedResponse("slow down", 7),
    "500": lambda: status(500),
    "503": lambda: status(503),
    "408": lambda: status(408),
    "connect": lambda: lost(httpx.ConnectError),
    "reset": lambda: lost(httpx.ReadError),
    "timeout": lambda: lost(httpx.ReadTimeout),
    "grpc unavailable": lambda: Rpc(grpc.StatusCode.UNAVAILABLE),
    "grpc deadline": lambda: Rpc(grpc.StatusCode.DEADLINE_EXCEEDED),
    "grpc exhausted": lambda: Rpc(grpc.StatusCode.RESOURCE_EXHAUSTED),
}
FINAL: dict[str, Callable[[], Exception]] = {
    "400": lambda: status(400),
    "401": lambda: status(401),
    "403": lambda: status(403),
    "422": lambda: status(422),
    "grpc invalid": lambda: Rpc(grpc.StatusCode.INVALID_ARGUMENT),
    "grpc denied": lambda: Rpc(grpc.StatusCode.PERMISSION_DENIED),
    "runtime": lambda: RuntimeError("closed"),
}


@dataclass
class Faulty:
    """A client in which calls of one method fail, before or after they took effect.

    Attributes:
        client: The client behind it.
        method: The method that fails.
        error: Makes the exception.
        times: Calls of it that fail.
        first: Calls of it that succeed before.
        share: Share of a request's points that are written before it fails.
        before: Called before each call of the method.
    """

    client: QdrantClient
    method: str = ""
    error: Callable[[], Exception] = TRANSIENT["500"]
    times: int = 0
    first: int = 0
    share: float = 0.0
    before: Callable[[], None] = lambda: None
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self.client, name)
        if not callable(found):
            return found

        def call(**arguments: Any) -> Any:  # noqa: ANN401
            self.calls.append(name)
            if name != self.method:
                return found(**arguments)
            self.before()
            number = self.calls.count(name)
            if not self.first < number <= self.first + self.times:
                return found(**arguments)
            points = arguments.get("points", [])
            written = points[: round(len(points) * self.share)]
            if written:
                found(**{**arguments, "points": written})
            raise self.error()

        return call


@pytest.fixture
def ids() -> Ids:
    return texts(list(range(0, 3 * COUNT, 3)))


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def client(ids: Ids, vectors: Vectors) -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    make_collection(client, ids, vectors, vector="text")
    yield client
    client.close()


def store_of(faulty: object, attempts: int = 5, **options: Any) -> QdrantStore:  # noqa: ANN401
    sleep = options.pop("sleep", lambda seconds: None)
    retries = Retries(attempts=attempts, sleep=sleep)
    return QdrantStore(as_client(faulty), "docs", "text", retries=retries, **options)


def any_row(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def batch(ids: Ids, vectors: Vectors) -> VectorBatch:
    return VectorBatch(ids=ids, vectors=-vectors)


def write(client: QdrantClient, point: int | str, number: float) -> None:
    """Write a vector as an application does."""
    vector = models.PointVectors(id=point, vector={"text": [number] * DIM})
    client.update_vectors("docs", [vector])
    client.set_payload("docs", {"v": number}, [point])


@pytest.mark.parametrize("error", TRANSIENT)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_writing_outlasts_faults(
    client: QdrantClient, ids: Ids, vectors: Vectors, error: str, share: float
) -> None:
    before = digest(client, "docs", "text")
    faulty = Faulty(client, "update_vectors", TRANSIENT[error], times=3, first=1, share=share)
    written = store_of(faulty).update(batch(ids, vectors), any_row)
    assert written.all()
    read_ids, read = raw_rows(client, "docs", "text")
    np.testing.assert_array_equal(read_ids, ids)
    np.testing.assert_array_equal(read, -vectors)
    assert digest(client, "docs", "text") == before


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_writing_gives_up_and_goes_on(
    client: QdrantClient, ids: Ids, vectors: Vectors, share: float
) -> None:
    before = digest(client, "docs", "text")
    faulty = Faulty(client, "update_vectors", times=10**6, first=1, share=share)
    store = store_of(faulty)
    with pytest.raises(TransientStoreError, match=r"memory.*docs.*500.*why"):
        store.update(batch(ids, vectors), any_row)
    _, read = raw_rows(client, "docs", "text")
    old, new = (read == vectors).all(axis=1), (read == -vectors).all(axis=1)
    assert (old | new).all()
    assert new[:128].all()
    assert old[256:].all()
    assert digest(client, "docs", "text") == before
    faulty.times = 0
    assert store.update(batch(ids, vectors), any_row).all()
    np.testing.assert_array_equal(raw_rows(client, "docs", "text")[1], -vectors)


@pytest.mark.parametrize("error", FINAL)
def test_what_cannot_succeed_is_not_tried_again(
    client: QdrantClient, ids: Ids, vectors: Vectors, error: str
) -> None:
    faulty = Faulty(client, "update_vectors", FINAL[error], times=10**6)
    with pytest.raises(StoreError, match="update_vectors") as raised:
        store_of(faulty).update(batch(ids, vectors), any_row)
    assert not isinstance(raised.value, TransientStoreError)
    assert ("QDRANT_API_KEY" in str(raised.value)) is (error in {"401", "403", "grpc denied"})
    assert faulty.calls.count("update_vectors") == 1


def test_an_outage_is_not_tried_again_and_again(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    faulty = Faulty(client, "update_vectors", times=10**6)
    store = store_of(faulty, attempts=4)
    faulty.before = lambda: setattr(faulty, "method", "retrieve")  # now nothing can be read either
    with pytest.raises(TransientStoreError, match="tried 4 times"):
        store.update(batch(ids, vectors), any_row)
    assert faulty.calls.count("retrieve") <= 6


def test_a_polite_writer_waits_after_each_request(
    client: QdrantClient, ids: Ids, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert store_of(client, batch_delay=0.25).update(batch(ids, vectors), any_row).all()
    assert slept == [0.25] * 3


@pytest.mark.parametrize("dim", [8, 1536, 65536])
def test_a_request_stays_below_the_limit_of_a_server(dim: int) -> None:
    with closing(QdrantClient(":memory:")) as client:
        client.create_collection(
            "docs", models.VectorParams(size=dim, distance=models.Distance.DOT)
        )
        info = client.get_collection("docs")
    size = layout_of(info, None, "here").write_size(128)
    row = models.PointVectors(id=2**64 - 1, vector=[-1.2345678806304932e-38] * dim)
    assert 1 <= size <= 128
    assert size * len(row.model_dump_json()) < 32 * 2**20


@pytest.mark.parametrize("method", ["scroll", "retrieve", "query_batch_points", "count"])
def test_reading_outlasts_faults(
    client: QdrantClient, ids: Ids, vectors: Vectors, method: str
) -> None:
    store = store_of(Faulty(client, method, TRANSIENT["timeout"], times=3))
    assert store.info().count == COUNT
    np.testing.assert_array_equal(np.concatenate([b.ids for b in store.scan(70)]), ids)
    np.testing.assert_array_equal(store.fetch(ids), vectors)
    assert store.search(vectors[:3], 1, {}).ids.shape == (3, 1)


def test_the_server_says_how_long_to_wait(client: QdrantClient, ids: Ids, vectors: Vectors) -> None:
    for error in ("429 later", "exhausted"):
        slept: list[float] = []
        faulty = Faulty(client, "update_vectors", TRANSIENT[error], times=2)
        assert store_of(faulty, sleep=slept.append).update(batch(ids, vectors), any_row).all()
        assert len(slept) == 2
        assert min(slept) >= 7


def test_what_an_application_writes_between_two_attempts_stays(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    faulty = Faulty(client, "update_vectors", times=1, share=0.5)
    late = points_of(ids)[100]  # in the half that was not written

    def sleep(seconds: float) -> None:
        write(client, late, 5.0)

    written = store_of(faulty, sleep=sleep).update(batch(ids, vectors), any_row)
    assert np.flatnonzero(~written).tolist() == [100]
    _, read = raw_rows(client, "docs", "text")
    assert (read[100] == 5).all()
    np.testing.assert_array_equal(read[written], -vectors[written])


def test_a_row_that_goes_before_the_write_is_no_failure(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    gone = [points_of(ids)[i] for i in (0, 50, 200)]

    def application() -> None:
        client.delete("docs", models.PointIdsList(points=[*gone]))

    faulty = Faulty(client, "update_vectors", before=application)
    written = store_of(faulty, attempts=2).update(batch(ids, vectors), any_row)
    assert np.flatnonzero(~written).tolist() == [0, 50, 200]
    read_ids, read = raw_rows(client, "docs", "text")
    np.testing.assert_array_equal(read_ids, ids[written])
    np.testing.assert_array_equal(read, -vectors[written])


def test_a_collection_that_goes_is_not_found(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    store = store_of(client)
    client.delete_collection("docs")
    with pytest.raises(StoreError, match="docs"):
        store.update(batch(ids, vectors), any_row)
    with pytest.raises(StoreNotFoundError, match="there are: none"):
        store_of(client)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_guard_lets_the_newer_write_win(
    client: QdrantClient, ids: Ids, vectors: Vectors, guarded: bool
) -> None:
    newer = points_of(ids)[3]
    faulty = Faulty(client, "update_vectors")
    faulty.before = lambda: None if faulty.calls.count("update_vectors") > 1 else application()

    def application() -> None:
        write(client, newer, 5.0)

    store = store_of(faulty, guard_field="v" if guarded else None)
    store.update(batch(ids, vectors), any_row)
    read = raw_rows(client, "docs", "text")[1]
    expected = -vectors
    if guarded:
        expected[3] = 5
    np.testing.assert_array_equal(read, expected)


def test_an_application_that_goes_on_writing_loses_nothing(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    shared = as_client(Locked(client))
    store = store_of(shared, guard_field="v", streams=3)
    points = points_of(ids)
    inserted, deleted, updated = [], set(points[:40:4]), set(points[1:200:4])
    started = threading.Event()

    def application() -> None:
        started.wait(10)
        for number, point in enumerate(points):
            if point in deleted:
                shared.delete(collection_name="docs", points_selector=[point])
            elif point in updated:
                row = {"text": [7.0] * DIM}
                new = models.PointStruct(id=point, vector={**row}, payload={"v": 1 + number})
                shared.upsert(collection_name="docs", points=[new])
            if number % 3 == 0:
                new = models.PointStruct(id=10**6 + number, vector={"text": [1.0] * DIM})
                shared.upsert(collection_name="docs", points=[new])
                inserted.append(10**6 + number)

    def allowed(now: VectorBatch) -> Mask:
        started.set()
        place = np.searchsorted(ids[order], now.ids)
        same: Mask = (now.vectors == vectors[order][place]).all(axis=1)
        return same

    order = np.argsort(ids)
    thread = threading.Thread(target=application)
    thread.start()
    store.update(batch(ids, vectors), allowed)
    thread.join()
    read_ids, read = raw_rows(client, "docs", "text")
    held = dict(zip(points_of(read_ids), read, strict=True))
    assert set(held) == (set(points) - deleted) | set(inserted)
    for i, point in enumerate(points):
        if point in updated:
            assert (held[point] == 7).all(), point
        elif point not in deleted:
            np.testing.assert_array_equal(held[point], -vectors[i])


@pytest.mark.parametrize("streams", [1, 3])
def test_a_scan_yields_every_row_once_while_others_come_and_go(
    client: QdrantClient, ids: Ids, streams: int
) -> None:
    shared = as_client(Locked(client))
    store = store_of(shared, streams=streams)
    seen: list[bytes] = []
    points = points_of(ids)
    for number, part in enumerate(store.scan(23)):
        seen += part.ids.tolist()
        shared.delete(
            collection_name="docs", points_selector=[points[5 + number], points[-3 - number]]
        )
        new = [
            models.PointStruct(id=n, vector={"text": [1.0] * DIM})
            for n in (1 + 3 * number, 10**6 - number)
        ]
        shared.upsert(collection_name="docs", points=new)
    assert len(seen) == len(set(seen))
    stayed = ids[5 + number + 1 : -3 - number]
    assert set(stayed.tolist()) <= set(seen)


def test_a_copy_that_was_cut_short_is_completed(
    client: QdrantClient, ids: Ids, vectors: Vectors
) -> None:
    faulty = Faulty(client, "upsert", FINAL["400"], times=1, first=2)
    store = store_of(faulty)
    with pytest.raises(StoreError, match="400"):
        store.copy("docs-2", silent)
    assert 0 < client.count("docs-2").count < COUNT
    copy = store.copy("docs-2", silent)
    np.testing.assert_array_equal(copy.fetch(ids), vectors)
    assert digest(client, "docs-2", "") == digest(client, "docs", "")
