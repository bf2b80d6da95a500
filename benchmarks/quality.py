"""Measure every method on every set, cell by cell, and print the tables.

    python benchmarks/quality.py [--data DIR] [--seeds 0,1,2] [--crossfit-rows] [SET…]
    python benchmarks/quality.py --table --docs

A cell is set × encoder × method × seed. Cells are kept in results/quality.jsonl; one is measured
again only if the code that makes it has changed. DIR holds one folder a set, with corpus.npy,
doc_ids.txt, queries, qrels or labels; scikit-learn's digits come on top. With seed 0, judged sets
are measured by NUDGE's protocol as well: all of their queries, shared out anew. --crossfit-rows
adds cells in which every test query is scored unseen: by fits that knew no query sharing its rows.
The second form measures nothing, and puts the tables into README.md and docs/quality.md.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
from pathlib import Path
from typing import Any

import cells
import machine
import peers
import torch
from loading import datasets, pooled
from table import KEY, protocol, read, summary, table

import simskip_vdb
from simskip_vdb.errors import DataError

RESULTS = machine.RESULTS / "quality.jsonl"
HERE = Path(__file__).resolve().parent
FIT = (
    *("config", "losses", "model", "moving", "pairs"),
    *("plans", "ridge", "sampling", "training", "working_set"),
)
PUBLISHED = "SimSkip as published"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--crossfit-rows", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    parser.add_argument("--docs", action="store_true", help="put the tables into the documents")
    parser.add_argument("--methods", default="", help="part of the methods' names, such as NUDGE")
    parser.add_argument("sets", nargs="*")
    options = parser.parse_args()
    if not options.table:
        measure(options)
    found = read(options.results, code)
    print(table(found))
    if options.docs:
        machine.put(HERE.parent / "README.md", "quality", summary(found))
        machine.put(HERE.parent / "docs" / "quality.md", "quality", table(found))
        machine.put(HERE.parent / "docs" / "quality.md", "protocol", protocol(found))


def measure(options: argparse.Namespace) -> None:
    """Measure the cells that are missing, and write each down as soon as it is there."""
    torch.set_num_threads(1)
    known = {
        tuple(cell[name] for name in KEY): cell["code"] for cell in read(options.results, code)
    }
    for seed in map(int, options.seeds.split(",")):
        found = datasets(options.data, options.sets)
        if seed == 0:
            found += filter(None, [pooled(dataset, seed) for dataset in found])
        for dataset in found:
            for method in cells.methods(dataset, unseen=options.crossfit_rows):
                key = (dataset.name, dataset.encoder, method, seed)
                if options.methods not in method or known.get(key) == code(method):
                    continue
                try:
                    cell = cells.run(dataset, method, seed)
                except DataError as error:
                    print(*key, "cannot be measured:", error, flush=True)
                    continue
                stamp = {"code": code(method), "time": time.time(), "machine": machine.describe()}
                append(options.results, {**cell, **stamp})
                print(*key, cell["measures"][cell["measure"]], cell["gate"]["passed"], flush=True)


def code(method: str) -> str:
    """Hash the sources that make a method's cells what they are."""
    name = method.removesuffix(cells.UNSEEN)
    ours = Path(simskip_vdb.__file__).parent
    published = inspect.getsource(peers.simskip)
    sources = [(HERE / "peers.py").read_text().replace(published, "")]
    if name in cells.OURS or name == PUBLISHED:
        wanted = [*FIT, "fitting"] if name in cells.OURS else FIT
        sources = [(ours / f"{module}.py").read_text() for module in wanted]
        sources += [published] if name == PUBLISHED else []
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:12]


def append(path: Path, cell: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(cell, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
