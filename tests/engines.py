"""The engines of Qdrant that run in this process, each with a small judged collection."""

# ruff: noqa: ANN401 ids are numbers or UUIDs, and engines take options of their own

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import qdrant_edge as edge
from builders import clusters
from qdrant_client import QdrantClient, models

from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Vectors
from simskip_vdb.judgments import JudgmentFiles

ROWS, QUERIES, DIM = 400, 300, 16
VECTOR, OTHER = "text", "image"
ALIAS, COLLECTION = "live", "docs"
Rows = dict[str, Vectors]


class Engine(ABC):
    """A collection with two vectors and payload a point, used as its application uses it."""

    def __init__(self, folder: Path, *, gain: bool = True, rows: int = ROWS) -> None:
        rng = np.random.default_rng(0)
        self.folder = folder
        docs, queries, group, asked = clusters(rng, rows, QUERIES, DIM)
        numbers = np.sort(rng.choice(10**6, rows, replace=False)).tolist()
        self.points = [
            number if i % 2 else str(UUID(int=number)) for i, number in enumerate(numbers)
        ]
        self.docs = docs
        self.payloads = [
            {"sku": f"doc-{i}", "category": f"c{group[i]}", "version": 1} for i in range(rows)
        ]
        np.save(folder / "q.npy", queries)
        (folder / "q.txt").write_text("".join(f"q{i}\n" for i in range(QUERIES)))
        judged = asked if gain else rng.permutation(asked)
        lines = ["query-id\tcorpus-id\tscore\n"]
        for query, category in enumerate(judged):
            lines += [f"q{query}\tdoc-{row}\t1\n" for row in np.flatnonzero(group == category)]
        (folder / "qrels.tsv").write_text("".join(lines))
        self.files = JudgmentFiles(
            queries=folder / "q.npy", query_ids=folder / "q.txt", qrels=folder / "qrels.tsv"
        )
        others = rng.standard_normal((rows, 3))
        self.put(
            [
                (point, {VECTOR: doc.tolist(), OTHER: other.tolist()}, payload)
                for point, doc, other, payload in zip(
                    self.points, docs, others, self.payloads, strict=True
                )
            ]
        )

    @property
    def state(self) -> Path:
        """A folder for the state; not every engine has a usual one."""
        return self.folder / "state"

    def rows(self, vector: str = VECTOR) -> Rows:
        """Return every vector of that name by id, read without the code under test."""
        return {
            name: np.array(vectors[vector], np.float32)
            for name, vectors, _ in self.everything()
            if vector in vectors
        }

    def digest(self, *leave_out: str) -> str:
        """Hash everything but these vectors."""
        # Local mode normalises what it searches once more, which moves last digits.
        found = sorted(
            (
                name,
                {k: np.round(v, 3).tolist() for k, v in vectors.items() if k not in leave_out},
                payload,
            )
            for name, vectors, payload in self.everything()
        )
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held."""

    @abstractmethod
    def open(self, **options: Any) -> Any:  # a context manager of a store
        """Open the collection as a store, and let go of it afterwards."""

    @abstractmethod
    def put(self, points: list[tuple[Any, Any, Any]]) -> None:
        """Insert or replace points."""

    @abstractmethod
    def move(self, point: Any, row: Vectors) -> None:
        """Give a point another vector."""

    @abstractmethod
    def remove(self, points: list[Any]) -> None:
        """Remove points."""

    @abstractmethod
    def everything(self) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Return (id, vectors by name, payload) of every point."""


class Client(Engine):
    """The Python client's own engine, in memory or in a folder."""

    def __init__(self, folder: Path, *, path: bool = False, **options: Any) -> None:
        self.client = QdrantClient(path=str(folder / "db")) if path else QdrantClient(":memory:")
        self.client.create_collection(
            COLLECTION,
            vectors_config={
                VECTOR: self.space(),
                OTHER: models.VectorParams(size=3, distance=models.Distance.DOT),
            },
        )
        lead = models.CreateAlias(collection_name=COLLECTION, alias_name=ALIAS)
        self.client.update_collection_aliases([models.CreateAliasOperation(create_alias=lead)])
        super().__init__(folder, **options)

    def space(self) -> models.VectorParams:
        """Return the settings of the vector that is refined."""
        return models.VectorParams(size=DIM, distance=models.Distance.COSINE)

    @contextmanager
    def open(self, **options: Any) -> Iterator[QdrantStore]:
        yield QdrantStore(self.client, ALIAS, VECTOR, **options)

    def put(self, points: list[tuple[Any, Any, Any]]) -> None:
        structs = [models.PointStruct(id=i, vector=v, payload=p) for i, v, p in points]
        self.client.upsert(ALIAS, structs)

    def move(self, point: Any, row: Vectors) -> None:
        self.client.update_vectors(
            ALIAS, [models.PointVectors(id=point, vector={VECTOR: row.tolist()})]
        )

    def remove(self, points: list[Any]) -> None:
        self.client.delete(ALIAS, points)

    def everything(self) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        records, _ = self.client.scroll(ALIAS, limit=10**6, with_vectors=True, with_payload=True)
        return [(str(r.id), dict(r.vector or {}), dict(r.payload or {})) for r in records]  # type: ignore[arg-type]

    def close(self) -> None:
        self.client.close()

    def leads_to(self) -> str:
        """Return the collection behind the alias."""
        (alias,) = self.client.get_aliases().aliases
        return alias.collection_name


class Edge(Engine):
    """A Qdrant Edge shard."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path = folder / "shard"
        self.path.mkdir()
        params = {
            VECTOR: self.space(),
            OTHER: edge.EdgeVectorParams(3, edge.Distance.Dot),
        }
        edge.EdgeShard.create(str(self.path), edge.EdgeConfig(vectors=params)).close()
        super().__init__(folder, **options)

    def space(self) -> edge.EdgeVectorParams:
        """Return the settings of the vector that is refined."""
        return edge.EdgeVectorParams(DIM, edge.Distance.Cosine)

    @contextmanager
    def open(self, **options: Any) -> Iterator[EdgeStore]:
        with EdgeStore(self.path, VECTOR, **options) as store:
            yield store

    def close(self) -> None:
        """Nothing is held between two uses."""

    @contextmanager
    def shard(self) -> Iterator[edge.EdgeShard]:
        shard = edge.EdgeShard.load(str(self.path))
        try:
            yield shard
            shard.flush()
        finally:
            shard.close()

    def put(self, points: list[tuple[Any, Any, Any]]) -> None:
        with self.shard() as shard:
            made = [edge.Point(i, v, p) for i, v, p in points]
            shard.update(edge.UpdateOperation.upsert_points(made))

    def move(self, point: Any, row: Vectors) -> None:
        with self.shard() as shard:
            moved = [edge.PointVectors(point, {VECTOR: row.tolist()})]
            shard.update(edge.UpdateOperation.update_vectors(moved))

    def remove(self, points: list[Any]) -> None:
        with self.shard() as shard:
            shard.update(edge.UpdateOperation.delete_points(points))

    def everything(self) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        with self.shard() as shard:
            request = edge.ScrollRequest(limit=10**6, with_payload=True, with_vector=True)
            records = shard.scroll(request)[0]
            return [(str(r.id), dict(r.vector), dict(r.payload)) for r in records]  # type: ignore[arg-type]
