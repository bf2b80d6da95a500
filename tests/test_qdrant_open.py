from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_points import (
    any_row,
    digest,
    lead,
    make_collection,
    store_of,
    texts,
)
from qdrant_server import Server

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.connectors.qdrant_update import guard_filter
from simskip_vdb.datatypes import Ids, Metric, VectorBatch, Vectors, silent
from simskip_vdb.errors import (
    ConfigError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
)

COUNT, DIM = 60, 8


@pytest.fixture
def ids() -> Ids:
    return texts(list(range(COUNT)))


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def server(ids: Ids, vectors: Vectors) -> Iterator[Server]:
    server = Server()
    make_collection(server.local, ids, vectors, vector="text")
    yield server
    server.close()


def test_the_state_of_a_server_has_a_readable_place(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    info = store_of(server.client).info()
    assert info.uri == "qdrant://qdrant.test:6333/docs?vector=text"
    assert info.state == tmp_path / "simskip-vdb" / "qdrant.test%3A6333" / "docs" / "text"
    part = store_of(server.client, filter={"must": [{"key": "v", "match": {"value": 1}}]})
    assert str(part.info().state).startswith(f"{info.state}-")
    assert info.kind == "HNSW"
    assert info.details["version"] == "1.20.1"


def test_an_old_server_names_what_it_lacks(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    server.version = "1.15.4"
    store = store_of(server.client)
    too_new: list[tuple[Callable[[], object], str]] = [
        (lambda: store_of(server.client, guard_field="v"), "1.16"),
        (lambda: store.vector_beside("new", create=True), "1.18"),
        (lambda: store.copy("docs-2", silent), "1.16"),
    ]
    for action, version in too_new:
        with pytest.raises(ConfigError, match=rf"needs Qdrant {version}.*is 1\.15"):
            action()
    store.mark({"by": "me"})
    assert store.marker() == {"by": "me"}
    assert not server.bodies("PATCH .*")
    store.mark(None)
    assert store.marker() is None


# The client itself leaves the lock file open where somebody else holds the lock.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_folder_is_opened_by_its_address(
    tmp_path: Path, ids: Ids, vectors: Vectors
) -> None:
    folder = tmp_path / "rows"
    with pytest.raises(StoreNotFoundError, match=r"rows: there is no folder"):
        open_store(f"qdrant-local:{folder}?collection=docs")
    assert not folder.exists()
    client = QdrantClient(path=str(folder))
    make_collection(client, ids[:5], vectors[:5], Metric.EUCLID)
    with pytest.raises(StoreError, match="has this folder open"):
        open_store(f"qdrant-local:{folder}?collection=docs")
    client.close()
    with pytest.raises(StoreNotFoundError, match="no collection 'other'; there are: docs"):
        open_store(f"qdrant-local:{folder}?collection=other")
    store = open_store(f"qdrant-local:{folder}?collection=docs", read_only=True)
    assert isinstance(store, QdrantStore)
    info = store.info()
    assert info.uri == f"qdrant-local:{folder}?collection=docs"
    assert info.state == Path(f"{folder}.simskip") / "docs" / "unnamed"
    assert (info.count, info.metric) == (5, Metric.EUCLID)
    store.close()


@pytest.mark.parametrize(
    "uri",
    [
        "qdrant://me:hunter2@host:6333/docs",
        "qdrant://host:6333/docs?api_key=hunter2",
        "qdrant://host:6333/docs?hunter2",
        "qdrant://host:6333",
        "qdrant://host:port/docs",
        "qdrant://host/docs?grpc=maybe",
        "qdrant://host/docs?batch_delay=-1",
        "qdrant-local:folder",
        "qdrant-local:?collection=docs",
    ],
)
def test_addresses_that_make_no_sense_show_no_secret(uri: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_store(uri)
    assert "hunter2" not in str(raised.value)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", "hunter2")
    with (
        pytest.warns(UserWarning, match="insecure"),
        pytest.raises(TransientStoreError, match=r"qdrant://localhost:9/docs") as raised,
    ):
        open_store("qdrant://localhost:9/docs")
    assert "does the server run" in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_importing_connectors_does_not_import_the_client() -> None:
    code = "import sys, simskip_vdb.connectors; sys.exit('qdrant_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif("SIMSKIP_QDRANT_URL" not in os.environ, reason="SIMSKIP_QDRANT_URL is not set")
@pytest.mark.parametrize("grpc", ["false", "true"])
@pytest.mark.parametrize("metric", list(Metric))
def test_on_a_server(ids: Ids, vectors: Vectors, grpc: str, metric: Metric) -> None:
    url = os.environ["SIMSKIP_QDRANT_URL"]
    client = QdrantClient(url=url)
    name, live = f"simskip-{uuid4().hex}", f"live-{uuid4().hex}"
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    try:
        make_collection(client, ids, unit, metric, name=name, vector="text")
        lead(client, live, name)
        host = url.partition("://")[2].rstrip("/")
        store = open_store(f"qdrant://{host}/{live}?vector=text&grpc={grpc}")
        assert isinstance(store, QdrantStore)
        before = digest(client, name, "text")
        assert store.info().count == COUNT
        np.testing.assert_array_equal(np.concatenate([b.ids for b in store.scan(7)]), ids)
        batch = VectorBatch(ids=np.append(ids, texts([999])), vectors=-np.vstack([unit, unit[:1]]))
        assert store.update(batch, any_row).tolist() == [True] * COUNT + [False]
        store.settle(silent)
        np.testing.assert_allclose(store.fetch(ids), -unit, rtol=0, atol=1e-6)
        assert digest(client, name, "text") == before
        assert (store.search(-unit, 1, {}).ids[:, 0] == ids).all()
        store.mark({"run": 1})
        assert store.marker() == {"run": 1}
        beside = store.vector_beside("text@simskip", create=True)
        assert beside.update(batch, any_row).sum() == COUNT
        store.drop_vector_beside("text@simskip")
        store.copy(f"{name}-2", silent)
        store.switch(f"{name}-2")
        store.switch(name)
        store.drop_copy(f"{name}-2")
        store.close()
    finally:
        client.delete_collection(name)
        client.delete_collection(f"{name}-2")
        client.close()


def test_filters_go_over_grpc() -> None:
    rows = VectorBatch(
        ids=texts([1, 2**64 - 1, str(uuid4())]),
        vectors=np.zeros((3, 1), np.float32),
        fields={"v": [1, "x", None]},
    )
    part = models.SliceCondition(slice=models.Slice(total=4, index=3))
    has_vector = models.HasVectorCondition(has_vector="text")
    for condition in (guard_filter(rows, "v", "here"), part, has_vector):
        asked = models.Filter(must=[condition])
        heard = GrpcToRest.convert_filter(RestToGrpc.convert_filter(asked))
        assert _without_gaps(heard.model_dump()) == _without_gaps(asked.model_dump())


def _without_gaps(value: Any) -> Any:  # noqa: ANN401
    """Leave out what is not set, which gRPC cannot tell from an empty list."""
    if isinstance(value, list):
        return [_without_gaps(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_gaps(v) for k, v in value.items() if v not in (None, [])}
    return value
