from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_points import AT_ONCE, make_collection, raw_rows, texts
from qdrant_server import Server

from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Ids, Metric, Vectors
from simskip_vdb.store import VectorStore
from simskip_vdb.testing import RowContract


class QdrantContract(RowContract):
    exact = False
    tolerance = 1e-6
    vector = ""
    streams: int | None = None

    @pytest.fixture
    def ids(self) -> Ids:
        return texts([3 * i for i in range(self.count)])

    def unknown_id(self, ids: Ids) -> Ids:
        return texts([1])

    @pytest.fixture(autouse=True)
    def _client(self, metric: Metric, tmp_path: Path) -> Iterator[None]:
        self.exact = metric is not Metric.COSINE
        self.client = self.make_client(tmp_path)
        yield
        self.client.close()

    def make_client(self, folder: Path) -> QdrantClient:
        return QdrantClient(":memory:")

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        make_collection(self.client, ids, vectors, metric, vector=self.vector)
        return QdrantStore(self.client, "docs", self.vector, streams=self.streams)

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        return raw_rows(self.client, "docs", self.vector)


class TestInMemory(QdrantContract):
    pass


class TestNamed(QdrantContract):
    vector = "text"


class TestSlices(QdrantContract):
    """Slices are read side by side, and merged."""

    metrics = (Metric.DOT,)
    vector = "text"
    streams = 3


class TestManyKindsOfIds(QdrantContract):
    """Numbers beyond 2⁶³ and UUIDs."""

    metrics = (Metric.DOT,)

    @pytest.fixture
    def ids(self) -> Ids:
        numbers = [5, 40, 2**63 - 1, 2**63, 2**64 - 1]
        rng = np.random.default_rng(3)
        uuids = sorted(
            f"{a[:8]}-{a[8:12]}-{a[12:16]}-{a[16:20]}-{a[20:]}"
            for a in (rng.bytes(16).hex() for _ in range(self.count - len(numbers)))
        )
        return texts(numbers + uuids)

    def unknown_id(self, ids: Ids) -> Ids:
        return texts(["00000000-0000-0000-0000-000000000007"])


class TestManyKindsOfIdsInSlices(TestManyKindsOfIds):
    streams = 4


class TestPath(QdrantContract):
    """A folder, which takes about 100 points a second."""

    vector = "text"
    count = 33

    def make_client(self, folder: Path) -> QdrantClient:
        return QdrantClient(path=str(folder / "qdrant"))


class TestRest(QdrantContract):
    """Requests go through the client's REST interface, several at a time."""

    metrics = (Metric.COSINE, Metric.EUCLID)
    vector = "text"

    def make_client(self, folder: Path) -> QdrantClient:
        self.server = Server()
        return self.server.local

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        make_collection(self.client, ids, vectors, metric, vector=self.vector)
        return QdrantStore(self.server.client, "docs", self.vector, retries=AT_ONCE)


# test_qdrant_open.py has a test on a server that is skipped visibly.
if "SIMSKIP_QDRANT_URL" in os.environ:

    class TestServer(QdrantContract):
        """A server, which is written to and read from by several threads."""

        vector = "text"
        search_params: Mapping[str, Any] = MappingProxyType({"exact": 1})

        def make_client(self, folder: Path) -> QdrantClient:
            client = QdrantClient(url=os.environ["SIMSKIP_QDRANT_URL"])
            client.delete_collection("docs")
            return client
