"""Let cross-fitting as a whole come to the gate where there is nothing to be found.

    python benchmarks/crossfit.py [--runs 60] [--table]

Every run draws 200 rows and 40, 80 or 140 queries, fits in five folds, and asks the gate, through
the code that users get. Runs are kept in ``results/crossfit.json``; only missing ones are made.
The section of ``docs/quality.md`` is written from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
from gate import DOCS, rate
from loading import unit
from numpy.typing import NDArray
from scipy import special

from simskip_vdb.config import FitSettings
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.crossfit import SPREAD, applies, cross_fit, measure_cross_fit
from simskip_vdb.datatypes import Metric, Vectors, silent
from simskip_vdb.gate import decide
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.parsing import Qrels
from simskip_vdb.workspace import Settings, Workspace, open_workspace

RESULTS = machine.RESULTS / "crossfit.json"
ROWS, DIM = 200, 16
QUERIES = (40, 80, 140)

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """Rows, queries, and which rows are relevant, shape (queries, rows)."""

    rows: Vectors
    queries: Vectors
    relevant: Mask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=60, help="of each kind")
    parser.add_argument("--table", action="store_true", help="only the table of what was measured")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else {}
    for number in range(0 if options.table else options.runs):
        for kind, draw in KINDS.items():
            name = f"{kind} · {number}"
            if name not in found:
                found[name] = run(draw, number)
                print(name, found[name], flush=True)
                machine.save(RESULTS.stem, {"rows": ROWS, "dim": DIM, "runs": found})
    machine.put(DOCS, "crossfit", table(found))


def by_lot(rng: np.random.Generator, queries: int) -> Drawn:
    """Draw relevant rows by lot: every ranking is as good as any other, in expectation."""
    rows, asked = _vectors(rng, ROWS), _vectors(rng, queries)
    return _drawn(rng, rows, asked, np.full((queries, ROWS), 0.05))


def by_similarity(rng: np.random.Generator, queries: int) -> Drawn:
    """Draw relevance by similarity alone: no ranking is better than that of the rows as they are.

    A query without a relevant row gets one by lot.
    """
    rows, asked = _vectors(rng, ROWS), _vectors(rng, queries)
    return _drawn(rng, rows, asked, special.expit(12 * (asked @ rows.T - 0.55)))


KINDS: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "relevant rows drawn by lot": by_lot,
    "relevance drawn by similarity": by_similarity,
}


def run(draw: Callable[[np.random.Generator, int], Drawn], number: int) -> dict[str, Any]:
    """Cross-fit once; tell what the gate said, and the gain in standard errors without spread."""
    queries = QUERIES[number % len(QUERIES)]
    rng = np.random.default_rng([number, len(draw.__name__)])
    with opened(draw(rng, queries), number) as space:
        assert applies(space)
        crossed = cross_fit(space, silent)
        chosen = (evidence := measure_cross_fit(space, crossed)[1]).chosen
    assert chosen.ci95 is not None
    error = (chosen.ci95[1] - chosen.ci95[0]) / (2 * 1.96 * SPREAD)
    return {
        "queries": queries,
        "written": not crossed.refiner.is_identity,
        "delta": round(chosen.delta, 5),
        "errors": round(chosen.delta / error, 3) if error else 0.0,
        "p": chosen.p,
        "passed": decide(evidence).passed and not crossed.refiner.is_identity,
    }


@contextmanager
def opened(drawn: Drawn, seed: int) -> Iterator[Workspace]:
    """Open an index of what was drawn."""
    ids = tuple(f"q{i}" for i in range(len(drawn.queries)))
    asked, rows = np.nonzero(drawn.relevant)
    qrels = Qrels(
        source="drawn",
        query_ids=[ids[i] for i in asked],
        doc_ids=[str(row) for row in rows],
        grades=np.ones(len(rows), np.int32),
    )
    given = QuerySet(option="--queries", ids=ids, vectors=drawn.queries, qrels=qrels)
    store = MemoryStore(np.arange(len(drawn.rows)), drawn.rows, Metric.DOT)
    with tempfile.TemporaryDirectory() as state:
        settings = Settings(fit=FitSettings(seed=seed), state=Path(state))
        with open_workspace(store, Judgments(queries=given), settings, silent) as space:
            yield space


def table(found: dict[str, Any]) -> str:
    """Lay out how often cross-fitting passes where it should not."""
    head = ["nothing to be found", "runs", "not the identity", "passed", "95 % interval"]
    head.append("spread of the gain in plain standard errors")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in (*KINDS, "both"):
        own = [one for name, one in found.items() if name.startswith(kind) or kind == "both"]
        passed = rate(sum(one["passed"] for one in own), len(own))
        low, high = passed["ci95"]
        spread = float(np.std([one["errors"] for one in own]))
        lines.append(
            f"| {kind} | {len(own)} | {sum(one['written'] for one in own)} | {passed['rate']:.1%} "
            f"| {low:.1%} to {high:.1%} | {spread:.2f} |"
        )
    return "\n".join(lines)


def _vectors(rng: np.random.Generator, count: int) -> Vectors:
    return unit(rng.normal(size=(count, DIM)).astype(np.float32))


def _drawn(
    rng: np.random.Generator, rows: Vectors, queries: Vectors, chance: NDArray[np.float64]
) -> Drawn:
    relevant = rng.random(chance.shape) < chance
    lost = np.flatnonzero(~relevant.any(axis=1))
    relevant[lost, rng.integers(0, len(rows), len(lost))] = True
    return Drawn(rows=rows, queries=queries, relevant=relevant)


if __name__ == "__main__":
    main()
