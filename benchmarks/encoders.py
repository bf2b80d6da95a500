"""Measure one set as other encoders would crowd, scale or widen it: the gain should stay.

    python benchmarks/encoders.py [--data DIR] [--seeds 0,1,2] [SET]

A common direction is added to all of a set's rows and queries, the powers of its spectrum are
scaled, or it is turned into more dimensions; raw retrieval hardly changes. SET is a folder of DIR,
as for quality.py. Results go to results/encoders.json, and into docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import machine
import numpy as np
import torch
from loading import Dataset, datasets, unit

from simskip_vdb.datatypes import Vectors
from simskip_vdb.judgments import QuerySet

RESULTS = machine.RESULTS / "encoders.json"
HERE = Path(__file__).resolve().parent
Move = Callable[[Vectors], Vectors]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("set", nargs="?", default="nfcorpus")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (dataset,) = datasets(options.data, [options.set])
    seeds = list(map(int, options.seeds.split(",")))
    found = {}
    for name, move in moves(dataset.vectors).items():
        runs = [cells.run(moved(dataset, move), "ours, judged, docs", seed) for seed in seeds]
        found[name] = {
            "measures": [run["measures"][run["measure"]] for run in runs],
            "late": [None if run["late"] is None else run["late"]["ratio"] for run in runs],
        }
        print(name, found[name], flush=True)
    results = {
        "set": f"{dataset.name} ({dataset.encoder})",
        "seeds": seeds,
        "time": time.time(),
        "machine": machine.describe(),
        "found": found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    machine.put(HERE.parent / "docs" / "quality.md", "encoders", table(results))


def moves(rows: Vectors) -> dict[str, Move]:
    """Return what is done to all vectors of a set, by name."""
    rng = np.random.default_rng(0)
    d = rows.shape[1]
    common = unit(rng.normal(size=(1, d)).astype(np.float32))
    values, axes = np.linalg.eigh(np.cov(rows.T).astype(np.float64))
    wide = np.linalg.qr(rng.normal(size=(2 * d, 2 * d)))[0][:d]

    def scaled(power: float) -> Move:
        matrix = (axes * np.maximum(values / values.max(), 1e-6) ** (power / 2)) @ axes.T
        return lambda x: unit(x @ matrix)

    def crowded(size: float) -> Move:
        return lambda x: unit(x + size * common)

    return {
        "as it is": lambda x: x,
        "+ 1 common direction": crowded(1),
        "+ 3 common direction": crowded(3),
        "spectrum to the power 1.3": scaled(0.3),
        f"turned into {2 * d} dimensions": lambda x: unit(x @ wide),
    }


def moved(dataset: Dataset, move: Move) -> Dataset:
    """Return a set with all vectors moved alike."""
    given = dataset.judgments

    def queries(part: QuerySet | None) -> QuerySet | None:
        return None if part is None else replace(part, vectors=move(unit(part.vectors)))

    judgments = replace(
        given, queries=queries(given.queries), dev=queries(given.dev), test=queries(given.test)
    )
    return replace(dataset, vectors=move(dataset.vectors), judgments=judgments)


def table(results: dict[str, Any]) -> str:
    """Return results as a table in Markdown, means over seeds."""
    lines = [
        f"| {results['set']} | raw | ours, judged, docs | gain | late rows |",
        "|---" * 5 + "|",
    ]
    for name, found in results["found"].items():
        before, after = np.mean(found["measures"], axis=0)
        known = [ratio for ratio in found["late"] if ratio is not None]
        late = f"{np.mean(known):.2f} ×" if known else "–"
        lines.append(f"| {name} | {before:.4f} | {after:.4f} | {after - before:+.4f} | {late} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
