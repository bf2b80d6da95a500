"""Refine a real set in Qdrant's engines that run here, in every mode, and go back.

    python benchmarks/qdrant.py [--data DIR] [--set nfcorpus] [--refiner DIR]

A Qdrant Edge shard and a collection in the Python client's memory hold the same rows, with external
ids in a payload field and another vector beside. The refiner is fitted once, on the shard, unless
one is given. Payloads and other vectors must have the same digest after each write, and rows must
be what they were after each rollback: bit for bit in Edge, within 1e-5 in local mode, which
normalises again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import qdrant_edge as edge
from loading import judgment_files, unit
from qdrant_client import QdrantClient, models

import simskip_vdb as ss
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Vectors

HERE = Path(__file__).resolve().parent
TEXT, OTHER, ALIAS = "text", "other", "live"
Point = tuple[str, dict[str, Any], dict[str, Any]]


class Engine(ABC):
    """An engine that holds the set."""

    name: str
    modes: tuple[str, ...]
    tolerance: float

    @abstractmethod
    def open(self) -> Any:  # noqa: ANN401 a context manager of a store
        """Open the store."""

    @abstractmethod
    def points(self) -> list[Point]:
        """Read every point without the connector."""

    def rows(self) -> Vectors:
        """Return the vectors in the order of ids, shape (n, d)."""
        return np.array([vectors[TEXT] for _, vectors, _ in sorted(self.points())], np.float32)

    def rest(self) -> str:
        """Hash payloads and the other vector."""
        found = [(name, vectors[OTHER], load) for name, vectors, load in sorted(self.points())]
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


class Shard(Engine):
    name, modes, tolerance = "Qdrant Edge", ("in-place", "new-vector"), 0.0

    def __init__(self, folder: Path, points: list[Point], dim: int) -> None:
        self.path = folder / "shard"
        self.path.mkdir()
        params = {
            TEXT: edge.EdgeVectorParams(dim, edge.Distance.Cosine),
            OTHER: edge.EdgeVectorParams(4, edge.Distance.Dot),
        }
        shard = edge.EdgeShard.create(str(self.path), edge.EdgeConfig(vectors=params))
        for start in range(0, len(points), 1000):
            made = [edge.Point(int(i), v, p) for i, v, p in points[start : start + 1000]]
            shard.update(edge.UpdateOperation.upsert_points(made))
        shard.optimize()
        shard.close()

    @contextmanager
    def open(self) -> Iterator[EdgeStore]:
        with EdgeStore(self.path, TEXT) as store:
            yield store

    def points(self) -> list[Point]:
        with closing(edge.EdgeShard.load(str(self.path))) as shard:
            request = edge.ScrollRequest(limit=10**7, with_payload=True, with_vector=True)
            return [(str(r.id), r.vector, r.payload) for r in shard.scroll(request)[0]]  # type: ignore[misc]


class Memory(Engine):
    name, tolerance = "local mode, in memory", 1e-5
    modes = ("in-place", "new-vector", "new-collection")

    def __init__(self, points: list[Point], dim: int) -> None:
        self.client = QdrantClient(":memory:")
        params = {
            TEXT: models.VectorParams(size=dim, distance=models.Distance.COSINE),
            OTHER: models.VectorParams(size=4, distance=models.Distance.DOT),
        }
        self.client.create_collection("docs", vectors_config=params)
        lead = models.CreateAlias(collection_name="docs", alias_name=ALIAS)
        self.client.update_collection_aliases([models.CreateAliasOperation(create_alias=lead)])
        for start in range(0, len(points), 1000):
            part = points[start : start + 1000]
            structs = [models.PointStruct(id=int(i), vector=v, payload=p) for i, v, p in part]
            self.client.upsert(ALIAS, structs)

    @contextmanager
    def open(self) -> Iterator[QdrantStore]:
        yield QdrantStore(self.client, ALIAS, TEXT)

    def points(self) -> list[Point]:
        records, _ = self.client.scroll(ALIAS, limit=10**7, with_vectors=True, with_payload=True)
        return [(str(r.id), r.vector, r.payload) for r in records]  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--set", default="nfcorpus")
    parser.add_argument("--refiner", type=Path)
    options = parser.parse_args()
    folder = options.data / options.set
    if not folder.is_dir():
        sys.exit(f"no set at {folder}; name its folder with --data DIR")
    vectors = unit(np.load(folder / "corpus.npy").astype(np.float32))
    ids = (folder / "doc_ids.txt").read_text().split()
    other = np.random.default_rng(0).standard_normal((len(ids), 4))
    points: list[Point] = [
        (str(7 * i + 3), {TEXT: row, OTHER: beside}, {"sku": name})
        for i, (row, beside, name) in enumerate(
            zip(vectors.tolist(), other.tolist(), ids, strict=True)
        )
    ]
    files = replace(judgment_files(folder), doc_ids=None)
    judgments = ss.read_judgments(files, doc_id_field="sku")
    runs = []
    with tempfile.TemporaryDirectory() as work:
        refiner = options.refiner
        dim = vectors.shape[1]
        for engine in (Shard(Path(work), points, dim), Memory(points, dim)):
            for mode in engine.modes:
                run, refiner = measure(engine, judgments, mode, Path(work), refiner)
                runs.append(run)
                print(json.dumps(run["summary"]), flush=True)
    print(f"saved {machine.save('qdrant', {'set': options.set, 'runs': runs})}")


def measure(
    engine: Engine, judgments: ss.Judgments, mode: str, work: Path, refiner: Path | None
) -> tuple[dict[str, Any], Path]:
    """Refine in one mode, check what must stay, and go back."""
    state = work / f"{engine.name} {mode}"
    before, rest = engine.rows(), engine.rest()
    settings = ss.Settings(state=state, refiner=refiner, mode=mode, out=None)
    with engine.open() as store:
        report = ss.refine(store, judgments, settings)
        assert report.gate is not None
        assert report.gate.passed, report.gate.reasons
        assert report.refiner is not None
    fitted = Path(str(report.refiner["path"]))
    moved = engine.rows()
    assert engine.rest() == rest, "payloads or other vectors changed"
    assert (mode == "new-vector") == bool(np.abs(moved - before).max() <= engine.tolerance)
    with engine.open() as store:
        done = ss.rollback(store, state=state)
    assert done["exact"], done
    assert engine.rest() == rest, "payloads or other vectors changed"
    assert np.abs(engine.rows() - before).max() <= engine.tolerance
    found = report.measures[report.measure or ""]
    summary = {
        "engine": engine.name,
        "mode": mode,
        "measure": report.measure,
        "before": found["before"],
        "after": found["after"],
        "rest_unchanged": True,
        "restored": done["restored"],
    }
    run = {
        "summary": summary,
        "refiner": report.refiner["id"],
        "measures": dict(report.measures),
        "through_index": report.through_index,
        "ann_recall": report.ann_recall,
        "written": report.written,
        "seconds": report.seconds,
    }
    return run, fitted if refiner is None else refiner


if __name__ == "__main__":
    main()
