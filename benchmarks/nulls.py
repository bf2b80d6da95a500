"""Refiners that learnt nothing, and how real test queries fare with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from loading import Dataset, unit
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import JudgedQueries, Metric, Split, Vectors, silent
from simskip_vdb.evaluation import score
from simskip_vdb.placing import offsets
from simskip_vdb.training import Plan, Problem, fit_refiner
from simskip_vdb.workspace import Settings, Workspace, open_workspace

Scores = NDArray[np.float64]

STRENGTHS = (0.1, 0.3, 1.0)
"""Lengths of random moves of unit rows."""
MOVES = Plan(alpha=0.5, beta=0.5)
"""Validation would choose to move nothing, and nothing would come to the gate."""


def challengers(dataset: Dataset, kinds: list[str], count: int, store: Path) -> Iterator[str]:
    """Measure refiners of some kinds on a set's test queries, and write each down when it is there.

    Yields:
        What was measured.
    """
    known = read(store)
    name = f"{dataset.name}/{dataset.encoder}"
    with tempfile.TemporaryDirectory() as state:
        ids = np.arange(len(dataset.vectors))
        rows = MemoryStore(ids, dataset.vectors, Metric.DOT)
        settings = Settings(state=Path(state))
        with open_workspace(rows, dataset.judgments, settings, silent) as space:
            before = _score(space, dataset.vectors)
            for kind in kinds:
                there = len(known.get((name, kind), ()))
                for seed in range(there, count):
                    deltas = (_score(space, _moved(space, kind, seed)) - before).round(4)
                    line = {"set": name, "kind": kind, "seed": seed, "deltas": deltas.tolist()}
                    with store.open("a") as file:
                        file.write(json.dumps(line, separators=(",", ":")) + "\n")
                    yield f"{name} {kind} {seed}: {deltas.mean():+.4f}"


def read(store: Path) -> dict[tuple[str, str], Scores]:
    """Return differences by set and kind of refiner, shape (refiners, test queries)."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for line in store.read_text().splitlines() if store.is_file() else ():
        one = json.loads(line)
        found.setdefault((one["set"], one["kind"]), []).append(one["deltas"])
    return {key: np.array(deltas) for key, deltas in found.items()}


def permuted(judged: JudgedQueries, rng: np.random.Generator) -> JudgedQueries:
    """Give every query the judgments of another one, drawn by lot."""
    order = rng.permutation(len(judged))
    sizes = np.diff(judged.indptr)[order]
    starts = np.repeat(judged.indptr[:-1][order] - offsets(sizes)[:-1], sizes)
    taken = starts + np.arange(len(judged.rows))
    return replace(
        judged, indptr=offsets(sizes), rows=judged.rows[taken], grades=judged.grades[taken]
    )


def _moved(space: Workspace, kind: str, seed: int) -> Vectors:
    rows, rng = space.rows.matrix(), np.random.default_rng(seed)
    if kind != "permuted judgments":
        strength = float(kind.removeprefix("noise "))
        return unit(rows + strength * unit(rng.normal(size=rows.shape).astype(np.float32)))
    problem = Problem(
        vectors=rows,
        ids=space.rows.ids,
        metric=space.info.metric,
        queries=permuted(space.judged.queries[Split.FIT], rng),
        usable=space.usable,
    )
    fitted = fit_refiner(problem, FitSettings(seed=seed), lambda _: [], plan=MOVES)
    return fitted.refiner.refine_rows(rows, space.rows.ids)


def _score(space: Workspace, rows: Vectors) -> Scores:
    judged = space.judged.queries[Split.TEST]
    found = space.search(judged.vectors, [(0, rows)], 10).ids
    return score(judged, found, space.measures[:1])[space.measure]
