"""Run one method on one set with one seed, on test queries that it never saw."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from loading import PROTOCOL, Dataset
from numpy.typing import NDArray
from peers import PEERS, Moved, Task

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import JudgedQueries, Metric, Positions, Side, Split, silent
from simskip_vdb.errors import DataError
from simskip_vdb.evaluation import (
    compare,
    compare_strata,
    depth,
    group_overlap,
    late_row_share,
    relevant_rows,
    score,
    seen_queries,
)
from simskip_vdb.fitting import fit_or_recall
from simskip_vdb.gate import Evidence, LateRows, decide
from simskip_vdb.measuring import described
from simskip_vdb.placing import offsets
from simskip_vdb.rows import hash_ids
from simskip_vdb.splits import unit_hash
from simskip_vdb.workspace import Settings, Workspace, open_workspace

OURS = {
    "ours, judged, docs": (Signal.JUDGED, Side.DOCS),
    "ours, judged, docs, growing": (Signal.JUDGED, Side.DOCS),
    "ours, judged, queries": (Signal.JUDGED, Side.QUERIES),
    "ours, judged, both": (Signal.JUDGED, Side.BOTH),
    "ours, groups, docs": (Signal.GROUPS, Side.DOCS),
    "ours, groups, queries": (Signal.GROUPS, Side.QUERIES),
    "ours, groups, both": (Signal.GROUPS, Side.BOTH),
    "ours, neighbours, docs": (Signal.NEIGHBOURS, Side.DOCS),
}
BY_PROTOCOL = (
    "raw",
    "linear query adapter",
    "two-layer query adapter",
    "NUDGE-M",
    "NUDGE-N",
    "ours, judged, docs",
    "ours, judged, queries",
    "ours, judged, both",
)
UNSEEN = " · every query unseen"
"""Ends the names of cells whose queries' relevant rows are hidden from the fit."""
FOLDS = 5
CLASSIFIED = ("raw", "SimSkip as published", "ours, groups, docs", "ours, groups, both")
MOVES_OF_ROWS = ("NUDGE-M", "NUDGE-N")
"""Peers whose moves belong to rows; the others are maps that late rows pass through as well."""
LATE_ROWS = 0.1

Mask = NDArray[np.bool_]


def methods(dataset: Dataset, *, unseen: bool) -> list[str]:
    """Name the methods that apply to a set."""
    if dataset.name.endswith(PROTOCOL):
        return list(BY_PROTOCOL)
    labelled = dataset.judgments.labels is not None
    absent = "judged" if labelled else "groups"
    names = [*PEERS, *(name for name in OURS if absent not in name)]
    if unseen and not labelled:
        names += [name + UNSEEN for name in ("NUDGE-N", "ours, judged, docs")]
    return names


def run(dataset: Dataset, method: str, seed: int) -> dict[str, Any]:
    """Run a cell and return it as plain JSON values."""
    name = method.removesuffix(UNSEEN)
    with _opened(dataset, name, seed) as space:
        moved, seconds, late = _fit(space, name)
        judged = space.judged.queries[Split.TEST]
        k = max(depth(space.measures, judged), 10)
        before = _search(space, Moved(rows=dataset.vectors, queries=lambda q: q), judged, k)
        after = _search(space, moved, judged, k)
        seen = _seen(space, name)
        if method != name:
            after, seen = _all_unseen(space, name, k), np.zeros(len(judged), np.bool_)
            late = None
        was, now = (score(judged, found, space.measures) for found in (before, after))
        result = {
            "set": dataset.name,
            "encoder": dataset.encoder,
            "method": method,
            "seed": seed,
            "measure": space.measure,
            "measures": {
                name: [round(float(scores[name].mean()), 5) for scores in (was, now)]
                for name in space.measures
            },
            "before": was[space.measure].round(4).tolist(),
            "after": now[space.measure].round(4).tolist(),
            "seen": "".join("01"[known] for known in seen.tolist()),
            "late": None if late is None else late.to_dict(),
            "gate": _gate(space, was, now, seen, late),
            "fit_seconds": round(seconds, 1),
        }
        if space.judged.groups is not None:
            result["overlap"] = round(group_overlap(judged, before, after), 4)
            result["accuracy"] = _accuracies(dataset, moved) if name in CLASSIFIED else None
    return result


@contextmanager
def _opened(dataset: Dataset, name: str, seed: int) -> Iterator[Workspace]:
    signal, side = OURS.get(name, (Signal.AUTO, Side.DOCS))
    ids = np.arange(len(dataset.vectors))
    store = MemoryStore(ids, dataset.vectors, Metric.DOT)
    with tempfile.TemporaryDirectory() as state:
        settings = Settings(
            fit=FitSettings(seed=seed, signal=signal, side=side),
            growing="growing" in name,
            state=Path(state),
        )
        with open_workspace(store, dataset.judgments, settings, silent) as space:
            yield space


def _fit(space: Workspace, name: str) -> tuple[Moved, float, LateRows | None]:
    """Fit a method; its time is without the probe that measures late rows, which ours includes."""
    start = time.perf_counter()
    if name in OURS:
        refiner = fit_or_recall(space, silent)
        seconds = time.perf_counter() - start
        rows = refiner.refine_rows(space.rows.matrix(), space.rows.ids)
        found = refiner.info.get("late_rows")
        late = found and LateRows(**{key: found[key] for key in ("before", "after", "ratio")})
        return Moved(rows=rows, queries=refiner), seconds, late
    task = _task(space)
    moved = PEERS[name](task)
    seconds = time.perf_counter() - start
    fit = PEERS[name] if name in MOVES_OF_ROWS else lambda _: moved
    return moved, seconds, _late(space, fit, task)


def _task(space: Workspace) -> Task:
    fit, validation = (space.judged.queries[split] for split in (Split.FIT, Split.VALIDATION))
    usable = space.usable & ~space.judged.held_out
    if space.judged.groups is not None:
        fit = _rows_as_queries(space, np.flatnonzero(usable))

    def validate(moved: Moved) -> float:
        k = depth(space.measures[:1], validation)
        found = _search(space, moved, validation, k, space.skipped(Split.VALIDATION))
        return float(score(validation, found, space.measures[:1])[space.measure].mean())

    return Task(
        vectors=space.rows.matrix(),
        usable=usable,
        fit=fit,
        validation=validation,
        validate=validate,
        seed=space.settings.fit.seed,
    )


def _rows_as_queries(space: Workspace, rows: Positions) -> JudgedQueries:
    """Make rows the queries of their own group's other rows."""
    groups = space.judged.groups
    assert groups is not None
    answers = [np.setdiff1d(np.flatnonzero(groups == groups[row]), [row]) for row in rows]
    found = np.concatenate(answers)
    return JudgedQueries(
        ids=tuple(f"row:{row}" for row in rows),
        vectors=space.rows.take(rows),
        indptr=offsets(np.array([len(answer) for answer in answers])),
        rows=found,
        grades=np.ones(len(found), np.int32),
    )


def _late(space: Workspace, method: Callable[[Task], Moved], task: Task) -> LateRows:
    """Compare late rows' share of validation queries' top 10, by a fit without them."""
    late = hash_ids(space.rows.ids, task.seed) < np.uint64(LATE_ROWS * 2**64)
    late &= task.usable
    blind = replace(task, usable=task.usable & ~late, fit=_without(task.fit, late))
    moved, judged = method(blind), task.validation
    skip = space.skipped(Split.VALIDATION)
    still = Moved(rows=task.vectors, queries=lambda queries: queries)
    before, after = (_search(space, state, judged, 10, skip) for state in (still, moved))
    return late_row_share(before, after, late)


def _without(judged: JudgedQueries, hidden: Mask) -> JudgedQueries:
    """Forget judgments of hidden rows, and then queries without a relevant row."""
    kept = ~hidden[judged.rows]
    sizes = np.bincount(judged.query_of_judgment()[kept], minlength=len(judged))
    left = replace(
        judged, indptr=offsets(sizes), rows=judged.rows[kept], grades=judged.grades[kept]
    )
    owners = left.query_of_judgment()[left.grades > 0]
    return left.subset(np.bincount(owners, minlength=len(left)) > 0)


def _unasked(judged: JudgedQueries, hidden: Mask) -> JudgedQueries:
    """Leave out queries that have a hidden row among their relevant ones."""
    sharing = judged.query_of_judgment()[hidden[judged.rows] & (judged.grades > 0)]
    return judged.subset(np.bincount(sharing, minlength=len(judged)) == 0)


def _all_unseen(space: Workspace, name: str, k: int) -> Positions:
    """Fit once for each fold of test queries, without judged queries that share a relevant row.

    Forgetting only the judgments would teach that those rows are wrong answers.
    """
    judged, queries = space.judged, dict(space.judged.queries)
    test = queries[Split.TEST]
    fold = (unit_hash(test.ids, space.settings.fit.seed) * FOLDS).astype(np.int64)
    found = np.empty((len(test), k), np.int64)
    for number in range(FOLDS):
        part = test.subset(fold == number)
        hidden = np.zeros(len(space.rows), np.bool_)
        hidden[relevant_rows(part)] = True
        blind = {s: _unasked(queries[s], hidden) for s in (Split.FIT, Split.VALIDATION)}
        if not all(map(len, blind.values())):
            raise DataError("no judged query is left that shares no relevant row with a fold")
        space.judged = replace(judged, queries={**queries, **blind})
        found[fold == number] = _search(space, _fit(space, name)[0], part, k)
    space.judged = judged
    return found


def _search(
    space: Workspace, moved: Moved, judged: JudgedQueries, k: int, skip: Mask | None = None
) -> Positions:
    return space.search(moved.queries(judged.vectors), [(0, moved.rows)], k, skip).ids


def _seen(space: Workspace, name: str) -> Mask:
    test = space.judged.queries[Split.TEST]
    if space.judged.groups is not None:
        return np.ones(len(test), np.bool_)
    # Ours learns from drawn validation queries as well, once they have made the choice.
    both = "judged" in name and space.judged.validation_drawn
    learnt = (Split.FIT, Split.VALIDATION) if both else (Split.FIT,)
    known = [relevant_rows(space.judged.queries[split]) for split in learnt]
    return seen_queries(test, np.concatenate(known))


def _gate(
    space: Workspace,
    was: dict[str, NDArray[np.float64]],
    now: dict[str, NDArray[np.float64]],
    seen: Mask,
    late: LateRows | None,
) -> dict[str, Any]:
    """Let the gate decide as at a first look."""
    before, after = was[space.measure], now[space.measure]
    look, seed = described(space), space.settings.fit.seed
    evidence = Evidence(
        measure=space.measure,
        look=look,
        chosen=compare(before, after, look.level, seed),
        strata=compare_strata(before, after, seen, seed),
        late_rows=late,
        growing=space.settings.growing,
    )
    return decide(evidence).to_dict()


def _accuracies(dataset: Dataset, moved: Moved) -> dict[str, float]:
    """Classify the test queries by a linear probe and by ten neighbours."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    given, test = dataset.judgments.labels, dataset.judgments.test
    assert given is not None
    assert test is not None
    queries = moved.queries(test.vectors)
    models = {
        "probe": LogisticRegression(C=10, max_iter=200),
        "kNN": KNeighborsClassifier(n_neighbors=10, metric="cosine"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe that stops at its last step is good enough
        return {
            name: round(float(model.fit(moved.rows, given.values).score(queries, test.labels)), 4)
            for name, model in models.items()
        }
