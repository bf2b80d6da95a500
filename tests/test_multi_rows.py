from __future__ import annotations

from uuid import UUID

from multivectors import ClientMultiContract, EdgeMultiContract, Point
from qdrant_points import AT_ONCE
from qdrant_server import Server

from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Ids, Metric, Vectors
from simskip_vdb.store import VectorStore

UUIDS: tuple[Point, ...] = tuple(str(UUID(int=(i + 1) << 70)) for i in range(10))
MIXED: tuple[Point, ...] = (*(2**64 - 10 + i for i in range(10)), *UUIDS)


class TestEdge(EdgeMultiContract):
    pass


class TestEdgeUnnamedAndMixedIds(EdgeMultiContract):
    metrics = (Metric.DOT,)
    name = ""
    points = MIXED


class TestClient(ClientMultiContract):
    pass


class TestClientUnnamedAndMixedIds(ClientMultiContract):
    metrics = (Metric.EUCLID,)
    name = ""
    points = MIXED


class TestRest(ClientMultiContract):
    """Requests go through the client's REST interface."""

    metrics = (Metric.COSINE, Metric.DOT)

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        self.server = Server()
        self.client = self.server.local
        super().make_store(ids, vectors, metric)
        return QdrantStore(self.server.client, "docs", self.name, retries=AT_ONCE)
