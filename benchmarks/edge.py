"""Read and write a Qdrant Edge shard through the connector, against the bare engine.

    python benchmarks/edge.py [--rows 100000] [--dim 384]

Each rate is the best of three, engine and connector in turns. The bare engine reads into Python's
lists and writes from them, in pages of the same size, which is all that its interface allows; its
answers without reading their vectors are `engine_answers_only`. `update` reads each page again
before it writes it, so it is set against the engine doing both, and only writing.
Memory is the peak above what is resident after imports and opening.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import machine
import numpy as np
import qdrant_edge as edge
from apply import memory, reset_peak

from simskip_vdb.connectors.edge_rows import PAGE
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import Ids, VectorBatch, Vectors

ROUNDS = 3
BATCH = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()
    rows, dim = options.rows, options.dim
    with tempfile.TemporaryDirectory() as folder:
        shard = build(Path(folder), rows, dim)
        shard.close()
        with EdgeStore(Path(folder)) as store:
            shard = store._shard
            ids = np.array([str(i) for i in range(rows)], "S36")
            new = [block(start, rows, dim) for start in range(0, rows, BATCH)]
            tasks: dict[str, Callable[[], None]] = {
                "engine_answers_only": lambda: scroll(shard, read=False),
                "engine_scroll": lambda: scroll(shard, read=True),
                "scan": lambda: drain(store),
                "engine_update": lambda: update(shard, new, again=False),
                "engine_read_and_update": lambda: update(shard, new, again=True),
                "update": lambda: refine(store, ids, new),
            }
            best: dict[str, float] = {}
            peaks: dict[str, int] = {}
            for _ in range(ROUNDS):
                for name, task in tasks.items():
                    reset_peak()
                    resident = memory("VmRSS")
                    start = time.perf_counter()
                    task()
                    seconds = time.perf_counter() - start
                    peaks[name] = max(peaks.get(name, 0), memory("VmHWM") - resident)
                    best[name] = min(best.get(name, seconds), seconds)
    rates = {name: rows / seconds for name, seconds in best.items()}
    result = {
        "rows": rows,
        "dim": dim,
        "page": PAGE,
        "qdrant_edge_py": version("qdrant-edge-py"),
        "rows_per_second": rates,
        "scan_over_engine_scroll": rates["scan"] / rates["engine_scroll"],
        "scan_over_engine_answers_only": rates["scan"] / rates["engine_answers_only"],
        "update_over_engine_read_and_update": rates["update"] / rates["engine_read_and_update"],
        "update_over_engine_update": rates["update"] / rates["engine_update"],
        "peak_bytes": peaks,
    }
    print(f"saved {machine.save('edge', result)}")
    for name, value in result.items():
        print(f"  {name}: {value}")


def build(folder: Path, rows: int, dim: int) -> edge.EdgeShard:
    settings = edge.EdgeVectorParams(size=dim, distance=edge.Distance.Dot)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=settings))
    for start in range(0, rows, PAGE):
        stop = min(start + PAGE, rows)
        vectors = np.random.default_rng(start).standard_normal((stop - start, dim)).tolist()
        points = [edge.Point(start + at, row) for at, row in enumerate(vectors)]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.flush()
    return shard


def block(start: int, rows: int, dim: int) -> Vectors:
    shape = (min(BATCH, rows - start), dim)
    return np.random.default_rng(start).standard_normal(shape).astype(np.float32)


def scroll(shard: edge.EdgeShard, *, read: bool) -> None:
    start = None
    while True:
        request = edge.ScrollRequest(offset=start, limit=PAGE, with_payload=False, with_vector=[""])
        records, start = shard.scroll(request)
        if read:
            for record in records:
                _ = record.vector
        if start is None:
            return


def update(shard: edge.EdgeShard, new: list[Vectors], *, again: bool) -> None:
    done = 0
    for vectors in new:
        for at in range(0, len(vectors), PAGE):
            page = vectors[at : at + PAGE].tolist()
            points: list[int | str] = list(range(done, done + len(page)))
            if again:
                for record in shard.retrieve(points, False, [""]):  # type: ignore[arg-type]
                    _ = record.vector
            changes = [edge.PointVectors(i, row) for i, row in zip(points, page, strict=True)]
            shard.update(edge.UpdateOperation.update_vectors(changes))
            done += len(page)


def drain(store: EdgeStore) -> None:
    for _ in store.scan(BATCH):
        pass


def refine(store: EdgeStore, ids: Ids, new: list[Vectors]) -> None:
    done = 0
    for vectors in new:
        batch = VectorBatch(ids=ids[done : done + len(vectors)], vectors=vectors)
        assert store.update(batch, lambda now: np.ones(len(now), np.bool_)).all()
        done += len(vectors)


if __name__ == "__main__":
    main()
