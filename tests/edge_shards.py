"""Qdrant Edge shards for tests, and readers of them that bypass the connector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import qdrant_edge as edge

from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import Ids, Mask, Metric, VectorBatch, Vectors

DISTANCES = {
    Metric.COSINE: edge.Distance.Cosine,
    Metric.DOT: edge.Distance.Dot,
    Metric.EUCLID: edge.Distance.Euclid,
}
U = edge.UpdateOperation
N, D = 40, 8


def params(dim: int, metric: Metric = Metric.DOT, **options: Any) -> edge.EdgeVectorParams:  # noqa: ANN401
    return edge.EdgeVectorParams(**{"size": dim, "distance": DISTANCES[metric], **options})


def create(folder: Path, vectors: Any, **options: Any) -> edge.EdgeShard:  # noqa: ANN401
    folder.mkdir(parents=True, exist_ok=True)
    return edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=vectors, **options))


def fill(
    shard: edge.EdgeShard,
    points: Sequence[int | str],
    vectors: Vectors,
    name: str = "",
    payloads: Sequence[dict[str, Any]] | None = None,
) -> None:
    for start in range(0, len(points), 1000):
        rows = vectors[start : start + 1000].tolist()
        shard.update(
            U.upsert_points(
                [
                    edge.Point(points[at], {name: row}, payloads[at] if payloads else None)
                    for at, row in enumerate(rows, start)
                ]
            )
        )


def make(
    folder: Path,
    points: Sequence[int | str],
    vectors: Vectors,
    metric: Metric = Metric.DOT,
    *,
    payloads: Sequence[dict[str, Any]] | None = None,
    **options: Any,  # noqa: ANN401
) -> Path:
    """Make a shard with one unnamed vector and let go of it."""
    shard = create(folder, params(vectors.shape[1], metric, **options))
    fill(shard, points, vectors, payloads=payloads)
    shard.close()
    return folder


def rows_by_edge(shard: edge.EdgeShard, name: str) -> tuple[Ids, Vectors]:
    """Read every row in the engine's order, in one request."""
    records = shard.scroll(edge.ScrollRequest(limit=10**6, with_payload=False, with_vector=True))[0]
    found = {}
    for record in records:
        vector: Any = record.vector
        if isinstance(vector, list):
            vector = {"": vector}
        if name in vector:
            found[str(record.id).encode()] = vector[name]
    return np.array(list(found), "S36"), np.array(list(found.values()), np.float32)


def everything(shard: edge.EdgeShard) -> dict[str, tuple[Any, Any]]:
    """Return payload and all vectors of each point."""
    request = edge.ScrollRequest(limit=10**6, with_payload=True, with_vector=True)
    found: dict[str, tuple[Any, Any]] = {}
    for record in shard.scroll(request)[0]:
        vectors: Any = record.vector
        if isinstance(vectors, list):
            vectors = {"": vectors}
        sparse = {k: (v.indices, v.values) if hasattr(v, "indices") else v
                  for k, v in vectors.items()}  # fmt: skip
        found[str(record.id)] = (record.payload, sparse)
    return found


def shard_of(store: EdgeStore) -> edge.EdgeShard:
    return store._shard


def uuids(count: int) -> list[int | str]:
    return [str(UUID(int=(i + 1) << 70)) for i in range(count)]


def any_row(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def row_ids(points: Iterable[int | str]) -> Ids:
    return np.array([str(point) for point in points], "S36")


def batch(points: Sequence[int | str], vectors: Vectors) -> VectorBatch:
    return VectorBatch(ids=row_ids(points), vectors=vectors)
