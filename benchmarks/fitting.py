"""Fit on many rows and move them all, beside NUDGE-N: time, memory, and what became of retrieval.

    python benchmarks/fitting.py [--rows 200000 --rows 2000000] [--queries 2000] [--dim 384]

Rows are made: clusters, and queries that stand off their relevant rows by a common shift and by
chance. Every method runs in a process of its own, on the same rows, judged queries and validation
queries, from the moment the rows are at hand (in memory for NUDGE, in the state for ours) until
all rows are moved (in memory for NUDGE, on disk for ours). Memory is the peak above what is
resident after imports, the rows included; a method may take `--memory` GiB. *refine* is the whole
of `simskip refine` on a FAISS file: read, fit, probe of late rows, proof on test queries, write and
verify. Sizes that are not asked for stay in the table as they were measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray

CLUSTER = 100  # rows of a cluster, about
RELEVANT = 3
SHIFT, CHANCE = 1.5, 2.0  # lengths, beside relevant rows' mean of length 1
NAMES = {
    "NUDGE-N": "NUDGE-N, in memory",
    "ours": "ours: fit, choose, move",
    "refine": "`simskip refine`, all of it",
}
DOCS = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
BLOCK = 8192
Floats = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=1, help="of a fit, the median counts")
    parser.add_argument("--memory", type=float, default=20.0)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        method, folder = options.run
        resource.setrlimit(resource.RLIMIT_AS, (int(options.memory * 2**30),) * 2)
        print(json.dumps(run(method, Path(folder))))
        return
    settings = {"queries": options.queries, "dim": options.dim, "memory_gib": options.memory}
    sizes = options.rows or [200_000, 2_000_000]
    results = [found for found in measured(settings) if found["rows"] not in sizes]
    for rows in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            make(Path(temporary), rows, options.queries, options.dim)
            for method in NAMES:
                rounds = 1 if method == "refine" else options.rounds
                runs = [measure(method, Path(temporary), options.memory) for _ in range(rounds)]
                runs.sort(key=lambda run: run.get("seconds", 0))
                times = [run["seconds"] for run in runs if "seconds" in run]
                found = {**runs[len(runs) // 2], "all_seconds": times}
                results.append({"method": method, "rows": rows, **found})
                print(json.dumps(results[-1]), flush=True)
                machine.save("fitting", {**settings, "runs": results})
                machine.put(DOCS, "fitting", table(results, options.dim, options.memory))


def measured(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was measured before, with the same settings."""
    path = machine.RESULTS / "fitting.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    runs: list[dict[str, Any]] = found.get("runs", [])
    return runs if settings.items() <= found.items() else []


def table(results: list[dict[str, Any]], dim: int, memory: float) -> str:
    """Lay results out as a table in Markdown."""
    lines = [
        "| rows | | seconds | memory, × the rows' bytes | nDCG@10 |",
        "|---|---|---|---|---|",
    ]
    for found in sorted(results, key=lambda found: found["rows"]):
        data = found["rows"] * dim * 4
        if "out_of_memory" in found:
            cells = ["–", f"more than {memory * 2**30 / data:.1f}", "–"]
        else:
            before, after = found["ndcg"]
            cells = [
                f"{found['seconds']:.0f}",
                f"{found['peak_bytes'] / data:.1f}",
                f"{before:.3f} → {after:.3f}",
            ]
        lines.append(f"| {found['rows']:,} | {NAMES[found['method']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(method: str, folder: Path, memory: float) -> dict[str, Any]:
    """Run a method in a process of its own."""
    command = [sys.executable, __file__, "--run", method, str(folder), "--memory", str(memory)]
    # OpenMP's threads wait as the command line lets them; the peer runs as its package leaves it.
    policy = {} if method == "NUDGE-N" else {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **policy}
    )
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode < 0 or "memory" in last.lower() or "alloc" in last.lower():
        return {"out_of_memory": last}
    raise RuntimeError(f"{method}: {done.stderr}")


def make(folder: Path, rows: int, queries: int, dim: int) -> None:
    """Write rows as a FAISS file and as an array, and queries with judgments."""
    import faiss

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, rows // CLUSTER), dim)).astype(np.float32)
    index = faiss.IndexFlatIP(dim)
    vectors = np.lib.format.open_memmap(
        folder / "rows.npy", mode="w+", dtype=np.float32, shape=(rows, dim)
    )
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        noise = rng.standard_normal((size, dim), dtype=np.float32)
        vectors[start : start + size] = unit(centres[rng.integers(len(centres), size=size)] + noise)
        index.add(vectors[start : start + size])
    faiss.write_index(index, str(folder / "index.faiss"))
    popular = rng.choice(rows, queries, replace=False)  # a row is relevant to a few queries
    relevant = popular[
        rng.permuted(np.tile(np.arange(queries), (queries, 1)), axis=1)[:, :RELEVANT]
    ]
    shift = SHIFT * unit(rng.normal(size=(1, dim)))
    chance = CHANCE * unit(rng.normal(size=(queries, dim)))
    made = unit(unit(np.sum(vectors[relevant], axis=1)) + shift + chance)
    np.save(folder / "queries.npy", made)
    names = [f"q{i}" for i in range(queries)]
    (folder / "queries.txt").write_text("\n".join(names) + "\n")
    lines = [f"{q}\t{row}\t1" for q, listed in zip(names, relevant, strict=True) for row in listed]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")


def run(method: str, folder: Path) -> dict[str, Any]:
    """Run a method here, and measure what became of retrieval on its test queries."""
    # Optimisers load torch._dynamo at their first step.
    modules = ("faiss", "ir_measures", "nudge", "pyarrow.ipc", "scipy.stats", "torch._dynamo")
    for module in modules:
        importlib.import_module(module)
    import simskip_vdb as ss
    from simskip_vdb import pipeline, training  # noqa: F401
    from simskip_vdb.datatypes import Split
    from simskip_vdb.workspace import open_workspace

    resident = machine.memory("VmRSS")
    store = ss.open_store(str(folder / "index.faiss"))
    files = ss.JudgmentFiles(
        queries=str(folder / "queries.npy"),
        query_ids=str(folder / "queries.txt"),
        qrels=str(folder / "qrels.tsv"),
    )
    judgments = ss.read_judgments(files)
    shutil.rmtree(folder / method, ignore_errors=True)  # an earlier round's, with its fit
    settings = ss.Settings(state=folder / method)
    if method == "refine":
        machine.reset_peak()
        start = time.perf_counter()
        report = ss.refine(store, judgments, settings)
        seconds = time.perf_counter() - start
        peak = machine.memory("VmHWM") - resident
        assert report.gate is not None
        if report.gate.passed:
            ss.rollback(store, state=settings.state)
        gain = report.measures["nDCG@10"]
        return {
            "seconds": seconds,
            "stages": dict(report.seconds),
            "peak_bytes": peak,
            "passed": report.gate.passed,
            "ndcg": [gain["before"], gain["after"]],
        }
    with open_workspace(store, judgments, settings, lambda *_: None) as space:
        before = ndcg(space, space.rows.blocks(), Split.TEST)
        machine.reset_peak()
        start = time.perf_counter()
        if method == "NUDGE-N":
            blocks = nudge(space, np.load(folder / "rows.npy"))
        else:
            blocks = ours(space, folder)
        seconds = time.perf_counter() - start
        peak = machine.memory("VmHWM") - resident
        after = ndcg(space, blocks, Split.TEST)
        data = len(space.rows) * space.info.dim * 4
    return {"seconds": seconds, "peak_bytes": peak, "data_bytes": data, "ndcg": [before, after]}


def nudge(space: Any, rows: Floats) -> Any:  # noqa: ANN401
    """Move rows by NUDGE-N, all in memory."""
    import torch
    from nudge import NUDGEN
    from peers import _nudge_set

    from simskip_vdb.datatypes import Split

    fit, validation = (
        _nudge_set(space.judged.queries[split]) for split in (Split.FIT, Split.VALIDATION)
    )
    moved = NUDGEN(torch.device("cpu")).finetune_embeddings(rows, fit, validation, val_k=10)
    return [(start, moved[start : start + BLOCK]) for start in range(0, len(moved), BLOCK)]


def ours(space: Any, folder: Path) -> Any:  # noqa: ANN401
    """Fit, choose on validation, and move rows from the state to a file."""
    from simskip_vdb.datatypes import Split
    from simskip_vdb.fitting import problem_of
    from simskip_vdb.training import fit_refiner

    problem = problem_of(space, space.judged.queries[Split.FIT])
    refiner = fit_refiner(problem, space.settings.fit, space.validate).refiner
    with (folder / "moved.f32").open("wb") as file:
        for _, block in space.refined_blocks(refiner):
            file.write(block.data)
    moved = np.memmap(
        folder / "moved.f32", np.float32, "r", shape=(len(space.rows), space.info.dim)
    )
    return [(start, moved[start : start + BLOCK]) for start in range(0, len(moved), BLOCK)]


def ndcg(space: Any, blocks: Any, split: Any) -> float:  # noqa: ANN401
    """Return the mean nDCG@10 of a split's queries by exact search."""
    from simskip_vdb.evaluation import score

    judged = space.judged.queries[split]
    found = space.search(judged.vectors, blocks, 10)
    return float(score(judged, found.ids, ("nDCG@10",))["nDCG@10"].mean())


def unit(x: NDArray[Any]) -> Floats:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)


if __name__ == "__main__":
    main()
