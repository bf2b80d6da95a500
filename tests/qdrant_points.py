"""Collections of Qdrant's local mode for tests, and readers that bypass the code under test."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any, cast

import numpy as np
from qdrant_client import QdrantClient, models

from simskip_vdb.connectors.qdrant_calls import Retries
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Ids, Mask, Metric, VectorBatch, Vectors

DISTANCES = {
    Metric.COSINE: models.Distance.COSINE,
    Metric.DOT: models.Distance.DOT,
    Metric.EUCLID: models.Distance.EUCLID,
}
AT_ONCE = Retries(attempts=3, sleep=lambda seconds: None)
OTHER = "image"
SPARSE = "words"


def texts(points: list[Any]) -> Ids:
    return np.array([str(point) for point in points], "S36")


def points_of(ids: Ids) -> list[int | str]:
    return [int(text) if text.isdigit() else text for text in ids.astype("U36").tolist()]


def make_collection(
    client: QdrantClient,
    ids: Ids,
    vectors: Vectors,
    metric: Metric = Metric.DOT,
    *,
    name: str = "docs",
    vector: str = "",
) -> None:
    """Make a collection; a named vector gets another one, a sparse one and payloads beside it."""
    params = models.VectorParams(size=vectors.shape[1], distance=DISTANCES[metric])
    beside = models.VectorParams(size=3, distance=models.Distance.DOT)
    client.create_collection(
        name,
        vectors_config={vector: params, OTHER: beside} if vector else params,
        sparse_vectors_config={SPARSE: models.SparseVectorParams()},
    )
    points = [
        models.PointStruct(id=point, vector=_vectors(i, row, vector), payload=payload_of(i))
        for i, (point, row) in enumerate(zip(points_of(ids), vectors.tolist(), strict=True))
    ]
    if points:
        client.upsert(name, points)


def payload_of(i: int) -> dict[str, Any]:
    return {"sku": f"s{i}", "group": i % 3, "nested": {"lang": "de" if i % 2 else "en"}, "v": 0}


def raw_rows(client: QdrantClient, name: str, vector: str) -> tuple[Ids, Vectors]:
    """Read all rows by one request."""
    records, _ = client.scroll(name, limit=100_000, with_vectors=True)
    held = [(r.id, v) for r in records if (v := _one(r.vector, vector)) is not None]
    return texts([point for point, _ in held]), np.array([v for _, v in held], np.float32)


def digest(client: QdrantClient, name: str, vector: str) -> str:
    """Hash everything in a collection but one vector."""
    records, _ = client.scroll(name, limit=100_000, with_vectors=True)
    rest = []
    for record in records:
        vectors = record.vector if isinstance(record.vector, dict) else {"": record.vector}
        others = {n: _plain(v) for n, v in vectors.items() if n != vector}
        rest.append([record.id, record.payload, others])
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Locked:
    """A client of local mode that several threads may use."""

    def __init__(self, client: QdrantClient) -> None:
        self._client, self._lock = client, threading.RLock()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def call(*args: Any, **arguments: Any) -> Any:  # noqa: ANN401
            with self._lock:
                return found(*args, **arguments)

        return call


def as_client(wrapper: object) -> QdrantClient:
    return cast(QdrantClient, wrapper)


def _vectors(i: int, row: list[float], vector: str) -> Any:  # noqa: ANN401
    sparse = models.SparseVector(indices=[i % 7, 10], values=[1.0, 0.5])
    beside = {OTHER: [float(i), 1.0, -1.0]} if vector else {}
    return {vector: row, SPARSE: sparse, **beside}


def _one(vectors: Any, name: str) -> Any:  # noqa: ANN401
    return vectors.get(name) if isinstance(vectors, dict) else (None if name else vectors)


def _plain(value: Any) -> Any:  # noqa: ANN401
    return value.model_dump() if isinstance(value, models.SparseVector) else value


def store_of(client: QdrantClient, name: str = "docs", **options: Any) -> QdrantStore:  # noqa: ANN401
    return QdrantStore(client, name, options.pop("vector", "text"), retries=AT_ONCE, **options)


def any_row(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def lead(client: QdrantClient, alias: str, name: str) -> None:
    action = models.CreateAlias(collection_name=name, alias_name=alias)
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=action)])
