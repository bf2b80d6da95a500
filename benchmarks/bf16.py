"""Fit with products of bfloat16, as on a GPU, and of float32, and compare what each retrieves.

    python benchmarks/bf16.py [--data DIR] [--seeds 0,1,2] [SET]

A fit on a GPU computes its loss under autocast; here the same fit does so on the CPU, where
products then round to bfloat16 likewise. All else is as in `quality.py`: splits, validation, test
queries, exact search. Saved as ``results/bf16.json``; the table goes into docs/speed.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cells
import machine
import numpy as np
import torch
from loading import datasets

from simskip_vdb.statistics import compare

HERE = Path(__file__).resolve().parent
METHOD = "ours, judged, docs"


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
    runs: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        exact = cells.run(dataset, METHOD, seed)
        with patch.object(torch, "autocast", Autocast):
            rounded = cells.run(dataset, METHOD, seed)
        float32, bf16 = (np.array(cell["after"]) for cell in (exact, rounded))
        apart = compare(float32, bf16, None, seed)
        runs.append(
            {
                "seed": seed,
                "raw": float(np.mean(exact["before"])),
                "float32": apart.before,
                "bf16": apart.after,
                "delta": apart.delta,
                "ci95": apart.ci95,
            }
        )
        print(runs[-1], flush=True)
    machine.save("bf16", {"set": options.set, "measure": exact["measure"], "runs": runs})
    machine.put(HERE.parent / "docs" / "speed.md", "bf16", table(runs, exact["measure"]))


class Autocast(torch.autocast):
    """Is in force on every device, whatever a fit says."""

    def __init__(self, device: str, dtype: torch.dtype, *, enabled: bool) -> None:
        super().__init__(device, dtype, enabled=True)


def table(runs: list[dict[str, Any]], measure: str) -> str:
    """Lay results out as a table in Markdown."""
    lines = [
        f"| seed | {measure}, raw | float32 | bf16 | bf16 less float32, paired 95 % |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        low, high = run["ci95"]
        lines.append(
            f"| {run['seed']} | {run['raw']:.4f} | {run['float32']:.4f} | {run['bf16']:.4f} "
            f"| {run['delta']:+.4f} ({low:+.4f} to {high:+.4f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
