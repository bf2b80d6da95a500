"""Read, move and write an index, beside what this machine can do at most.

    python benchmarks/speed.py [--only flat,ivf] [--rows 10000 …] [--dims 128 …] [--again]

Every cell is an index (FAISS Flat, IVF Flat, HNSW or a Qdrant Edge shard), a number of rows and a
dimension: a line in rows at d = 384, a line in d at 100,000 rows, and where the disk has room
10,000,000 short rows in a Flat index. A cell runs in processes of its own and is saved as soon as
it is there; cells that are there are not measured again. The table goes into README.md.

Limits are measured in the same run: a copy of the index's bytes, three bare matrix products of the
refiner's shapes over all rows, and for what an engine does, the bare engine: FAISS training and
filling such an index from memory, Edge reading into Python's lists, updating from them, building
its graph. Memory is the peak of the whole command above what is resident after imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from speed_cells import COMMANDS, Cell

HERE = Path(__file__).parent
STORES = {"flat": "Flat", "ivf": "IVF Flat", "hnsw": "HNSW32", "edge": "Edge"}
ROWS, DIM = (10_000, 100_000, 1_000_000), 384
AT, DIMS = 100_000, (128, 384, 768, 1536)
LARGEST = ("flat", 10_000_000, 128)
COPIES = 4  # of an index, while it is refined: itself, its originals, the candidate, and some room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(STORES), help="stores, separated by commas")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS)
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--results", type=Path, default=machine.RESULTS / "speed.json")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        name, cell = options.call
        print(json.dumps(COMMANDS[name](Cell(**json.loads(cell)))))
        return
    found = json.loads(options.results.read_text()) if options.results.is_file() else {}
    shapes = [(rows, DIM) for rows in options.rows]
    shapes += [(AT, dim) for dim in options.dims if (AT, dim) not in shapes]
    wanted = [(store, *shape) for store in options.only.split(",") for shape in shapes]
    if options.rows == ROWS and "flat" in options.only.split(",") and _has_room(*LARGEST):
        wanted.append(LARGEST)
    measures: dict[str, Callable[[], dict[str, Any]]] = {"start": start_up, "fit": fit_step}
    for cell in wanted:
        measures[" ".join(map(str, cell))] = lambda cell=cell: measure(*cell)  # type: ignore[misc]
    failed: list[str] = []
    for number, (name, do) in enumerate(measures.items(), 1):
        if name in found.get("cells", {}) and not options.again:
            continue
        print(f"{number} of {len(measures)}: {name}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            cells = {**found.get("cells", {}), name: do()}
        except subprocess.CalledProcessError:
            failed.append(name)
            continue
        print(f"  {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        found = {"machine": machine.describe(), "cells": cells}
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text(json.dumps(found, indent=1) + "\n")
    machine.put(options.readme, "speed", table(found["cells"]))
    print(f"saved {options.results}")
    if failed:
        raise SystemExit(f"not measured, see above: {', '.join(failed)}")


def measure(store: str, rows: int, dim: int) -> dict[str, Any]:
    """Build an index, refine it whole, and measure each stage alone, each in its own process."""
    with tempfile.TemporaryDirectory() as temporary:
        cell = Cell(store, rows, dim, temporary)
        found: dict[str, Any] = {}
        for name in ("build", "refine", "limits", "stages"):
            print(f"  {name}", file=sys.stderr, flush=True)
            found[name] = call(name, cell)
        if store in ("ivf", "hnsw"):
            found["limits"]["write"] = found["build"]["seconds"]
        if store == "hnsw" and cell.is_large_graph:
            found["stages"]["seconds"]["write"] = found["refine"]["stages"]["write"]
        return {**found, "cores": len(os.sched_getaffinity(0))}


def _has_room(_: str, rows: int, dim: int) -> bool:
    return shutil.disk_usage(tempfile.gettempdir()).free > COPIES * 4 * rows * dim


def call(name: str, cell: Cell) -> dict[str, Any]:
    arguments = [__file__, "--call", name, json.dumps(cell._asdict())]
    # OpenMP's threads wait as the command line lets them.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fit_step() -> dict[str, Any]:
    """Time a step of training beside its bare matrix products."""
    with tempfile.TemporaryDirectory() as temporary:
        cell = Cell("flat", 10_000, DIM, temporary)
        call("build", cell)
        return call("fit", cell)


def start_up() -> dict[str, Any]:
    """Time what a person waits for before anything happens."""
    commands = {
        "simskip --help": [str(Path(sys.executable).with_name("simskip")), "--help"],
        "import simskip_vdb": [sys.executable, "-c", "import simskip_vdb"],
        "python alone": [sys.executable, "-c", ""],
    }
    return {
        name: statistics.median(_seconds(words) for _ in range(9))
        for name, words in commands.items()
    }


def _seconds(words: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def table(cells: dict[str, Any]) -> str:
    """Return a markdown table with a line a cell."""
    head = ["index", "rows × d", "read, keep", "move", "write", "verify", "end to end", "of which"]
    head += ["over the slowest", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for store, title in STORES.items():
        shapes = [name.split()[1:] for name in cells if name.startswith(f"{store} ")]
        for dim, rows in sorted((int(dim), int(rows)) for rows, dim in shapes):
            cell = cells[f"{store} {rows} {dim}"]
            on_one = ", one core" if cell["cores"] == 1 else ""
            columns = [title, f"{rows:,} × {dim}{on_one}", *_columns(cell, rows)]
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, "", *_sentences(cells)])


def _columns(cell: dict[str, Any], rows: int) -> list[str]:
    stages, limits, refine = cell["stages"]["seconds"], cell["limits"], cell["refine"]
    products = cell["stages"]["products"]
    whole = refine["seconds"] - refine["look"]
    size = cell["build"]["bytes"]
    in_engine = refine["index"]
    parts = [f"look {refine['look']:.1f} s"] + ([f"graph {in_engine:.1f} s"] if in_engine else [])
    return [
        f"{_rate(rows / stages['read'])}, {_ratio(limits['read'], stages['read'])}",
        f"{_rate(rows / stages['apply'])}, {_ratio(products, stages['apply'])}",
        f"{_rate(rows / stages['write'])}, {_ratio(limits['write'], stages['write'])}",
        f"{_rate(rows / stages['verify'])}, {_ratio(limits['read'], stages['verify'])}",
        f"{whole:.1f} s, {_rate(rows / whole)}",
        ", ".join(parts),
        f"{whole / max(*stages.values(), in_engine):.2f} ×",
        f"{refine['peak'] / 1e6:,.0f} MB, {refine['peak'] / size:.2f} ×",
    ]


def _rate(rows: float) -> str:
    return f"{rows / 1e6:.1f} M/s" if rows >= 1e6 else f"{rows / 1e3:.0f} k/s"


def _ratio(limit: float, seconds: float) -> str:
    return f"{100 * limit / seconds:.0f} %"


def _sentences(cells: dict[str, Any]) -> list[str]:
    found = []
    if "start" in cells:
        times = ", ".join(f"`{name}` {1000 * s:.0f} ms" for name, s in cells["start"].items())
        found.append(f"Start-up: {times}.")
    if "fit" in cells:
        fit = cells["fit"]
        found.append(
            f"A step of the label-free fit ({fit['batch']} rows, d = {DIM}) takes "
            f"{1000 * fit['step']:.0f} ms; its bare matrix products are "
            f"{_ratio(fit['products'], fit['step'])} of that."
        )
    return found


if __name__ == "__main__":
    main()
