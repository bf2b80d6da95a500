"""Refine a Qdrant Edge shard in place: memory, time by stage, a kill half-way, and a busy writer.

    python benchmarks/edge_refine.py [--rows 100000] [--few 20000] [--dim 384] [--writes 5000]

A refiner that is given, without judgments, goes through the whole pipeline. Each command runs in a
process of its own. Memory is the peak above what is resident after imports, by stage: `private` is
what was allocated, `file` the shard's own files, which the engine maps. `index` is the engine
building its graph. Two sizes tell what grows with rows: ids, digests and their sorted copies.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
import numpy as np
import qdrant_edge as edge
from application import Application, Payload
from speed_cells import refiner

import simskip_vdb as ss
from simskip_vdb.connectors.edge_store import EdgeStore
from simskip_vdb.datatypes import ID_TEXT, Mask, Metric, VectorBatch, Vectors
from simskip_vdb.store import Allowed

PAGE, SAMPLE_SECONDS, SAME = 512, 0.01, 1e-5
INTRINSIC_DIM = 16
OWN = ("read", "search", "write", "verify", "restore", "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--writes", type=int, default=5000)
    parser.add_argument("--command", nargs=2)
    options = parser.parse_args()
    if options.command:
        name, path = options.command
        sys.stdout.write(json.dumps(COMMANDS[name](Path(path), options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        few = Bench(Path(temporary) / "few", options.few, options)
        small = few.call("refine")
        many = Bench(Path(temporary) / "many", options.rows, options)
        result = {
            "rows": options.rows,
            "few": options.few,
            "dim": options.dim,
            "qdrant_edge_py": version("qdrant-edge-py"),
            **many.measure(),
        }
    large = result["refine"]
    own = [max(run["private"].get(stage, 0) for stage in OWN) for run in (small, large)]
    result["refine_few"] = small
    result["own_peak_bytes"] = {"few": own[0], "rows": own[1]}
    result["bytes_a_row"] = (own[1] - own[0]) / (options.rows - options.few)
    result["bytes_a_vector"] = 4 * options.dim
    print(f"saved {machine.save('edge_refine', result)}")
    print(json.dumps(result, indent=1))


class Bench:
    """A shard, and commands over it in processes of their own."""

    def __init__(self, folder: Path, rows: int, options: argparse.Namespace) -> None:
        folder.mkdir()
        self.path = folder / "shard"
        self._arguments = ["--rows", rows, "--dim", options.dim, "--writes", options.writes]
        self.call("build")
        ids = np.sort(np.arange(0, rows, 20).astype(ID_TEXT))
        refiner(options.dim, ids, Metric.COSINE).save(folder / "refiner")

    def measure(self) -> dict[str, Any]:
        """Refine, kill, resume, roll back, and refine once more while an application writes."""
        originals = self._rows()
        refine = self.call("refine")
        refined = self._rows()
        rollback = self.call("rollback")
        assert np.allclose(self._rows(), originals, atol=SAME)
        self.call("kill", dies=True)
        half = (~_same(self._rows(), originals)).mean()
        resume = self.call("refine")
        resumed_equal = np.array_equal(self._rows().view(np.uint32), refined.view(np.uint32))
        rollback_again = self.call("rollback")
        restored = bool(_same(self._rows(), originals).all())
        np.save(self.path.with_name("refined.npy"), refined)
        return {
            "refine": refine,
            "rollback": rollback,
            "kill": {"rows_refined_share": float(half), "resume": resume},
            "resumed_bit_for_bit": resumed_equal,
            "rollback_after_kill": rollback_again,
            "restored": restored,
            "writer": self.call("refine-meanwhile"),
        }

    def call(self, command: str, *, dies: bool = False) -> dict[str, Any]:
        """Run a command; return what it prints."""
        arguments = [*map(str, self._arguments), "--command", command, str(self.path)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=not dies
        )
        assert not dies or done.returncode == -signal.SIGKILL
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return found

    def _rows(self) -> Vectors:
        self.call("save-rows")
        rows: Vectors = np.load(self.path.with_name("rows.npy"))
        return rows


class Watch:
    """Progress, whose times and peaks of memory are kept by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, dict[str, int]] = {"private": {}, "file": {}}
        self._first = _resident()
        self._window = dict.fromkeys(self.peaks, 0)
        self._last = time.perf_counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + now - self._last
        self._last = now
        for kind, peak in self._window.items():
            self.peaks[kind][stage] = max(self.peaks[kind].get(stage, 0), peak)
        self._window = dict.fromkeys(self.peaks, 0)

    def result(self) -> dict[str, Any]:
        self("rest", 0, 0)
        self._end.set()
        self._thread.join()
        return {"seconds": self.seconds, "total": sum(self.seconds.values()), **self.peaks}

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            for kind, size in _resident().items():
                self._window[kind] = max(self._window[kind], size - self._first[kind])


def _resident() -> dict[str, int]:
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found["private" if name == "RssAnon" else "file"] = int(value.split()[0]) * 1024
    return found


def build(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    path.mkdir()
    params = edge.EdgeVectorParams(options.dim, edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=params))
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((INTRINSIC_DIM, options.dim))  # a graph finds nothing in pure noise
    for start in range(0, options.rows, PAGE):
        vectors = rng.standard_normal((min(PAGE, options.rows - start), INTRINSIC_DIM)) @ basis
        points = [
            edge.Point(start + at, row, {"version": 1}) for at, row in enumerate(vectors.tolist())
        ]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.flush()
    shard.optimize()
    shard.close()
    return {}


def refine(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    watch = Watch()
    with EdgeStore(path) as store:
        report = ss.refine(store, ss.Judgments(), _settings(path), progress=watch)
    return {**watch.result(), **_written(report)}


def rollback(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    watch = Watch()
    with EdgeStore(path) as store:
        done = ss.rollback(store, progress=watch)
    return {**watch.result(), "exact": done["exact"], "restored": done["restored"]}


def kill(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "write" and done >= total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with EdgeStore(path) as store:
        ss.refine(store, ss.Judgments(), _settings(path), progress=progress)
    return {}


def refine_meanwhile(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Refine while an application writes; count what was lost of its writes."""
    payloads: dict[int | str, Payload] = {point: {"version": 1} for point in range(options.rows)}
    with EdgeStore(path, guard_field="version") as store:
        application = Application(_Points(store._shard), payloads, options.dim, options.writes)
        update, a_request = store.update, -(-options.writes // (options.rows // 256))
        watch = Watch()

        def update_slowly(batch: VectorBatch, allowed: Allowed) -> Mask:
            def asked(now: VectorBatch) -> Mask:
                found = allowed(now)
                application.go_on(a_request, wait=False)
                return found

            return update(batch, asked)

        def progress(stage: str, done: int, total: int) -> None:
            watch(stage, done, total)
            if stage == "verify":
                application.finish()

        store.update = update_slowly  # type: ignore[method-assign]
        report = ss.refine(store, ss.Judgments(), _settings(path), progress=progress)
    names, rows, versions = _scroll(path, options.dim)
    expected = np.load(path.with_name("refined.npy"))
    own = [name in application.vectors for name in names]
    wanted = np.stack(
        [
            application.vectors[i] if mine else expected[i]
            for i, mine in zip(names, own, strict=True)
        ]
    )
    same = _same(rows, wanted)
    kept = [versions[i] == application.payloads.get(i) for i in names]
    missing = set(application.payloads) - set(names)
    return {
        "writes": application.done,
        "rows_written_last_by_the_application": sum(own),
        "lost": int((~same & own).sum() + (~np.array(kept)).sum()) + len(missing),
        "not_refined": int((~same & ~np.array(own)).sum()),
        "total": watch.result()["total"],
        **_written(report),
    }


def save_rows(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    names, rows, _ = _scroll(path, options.dim)
    np.save(path.with_name("rows.npy"), rows[np.argsort(names)])
    return {}


COMMANDS: Mapping[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "build": build,
    "refine": refine,
    "rollback": rollback,
    "kill": kill,
    "refine-meanwhile": refine_meanwhile,
    "save-rows": save_rows,
}


class _Points:
    """Points of a shard whose handle the application shares with the store."""

    def __init__(self, shard: edge.EdgeShard) -> None:
        self._shard = shard

    def put(self, point: int | str, vector: Vectors, payload: Payload) -> None:
        made = edge.Point(point, vector.tolist(), dict(payload))
        self._shard.update(edge.UpdateOperation.upsert_points([made]))

    def annotate(self, point: int | str, payload: Payload) -> None:
        self._shard.update(edge.UpdateOperation.set_payload([point], dict(payload)))

    def remove(self, point: int | str) -> None:
        self._shard.update(edge.UpdateOperation.delete_points([point]))


def _settings(path: Path) -> ss.Settings:
    return ss.Settings(refiner=path.with_name("refiner"), accept_unmeasured=True)


def _written(report: ss.Report) -> dict[str, Any]:
    assert report.written is not None
    assert report.written["mode"] == "in-place", report.gate
    return {
        **{name: report.written[name] for name in ("rows", "theirs", "gone", "mode")},
        "ann_recall": report.ann_recall,
    }


def _scroll(path: Path, dim: int) -> tuple[list[int], Vectors, dict[int, Payload]]:
    """Read all points by the bare engine: ids, vectors, payloads by id."""
    shard = edge.EdgeShard.load(str(path))
    blocks, names, start = [np.empty((0, dim), np.float32)], [], None
    payloads: dict[int, Payload] = {}
    while True:
        request = edge.ScrollRequest(offset=start, limit=PAGE, with_payload=True, with_vector=True)
        records, start = shard.scroll(request)
        points = [int(str(record.id)) for record in records]
        names += points
        blocks.append(np.array([record.vector for record in records], np.float32).reshape(-1, dim))
        payloads.update(zip(points, (dict(r.payload or {}) for r in records), strict=True))
        if start is None:
            break
    shard.close()
    return names, np.concatenate(blocks), payloads


def _same(rows: Vectors, expected: Vectors) -> Mask:
    return np.asarray(np.abs(rows - expected).max(axis=1) <= SAME)


if __name__ == "__main__":
    main()
