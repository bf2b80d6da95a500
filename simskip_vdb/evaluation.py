"""Measure retrieval by judgments: before and after, over all queries and over strata."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import JudgedQueries, Neighbors, Positions
from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.search import exact_search, pair_scores
from simskip_vdb.statistics import (
    Regression,
    compare,
    compare_strata,
    late_row_share,
    worst_regressions,
)

__all__ = [
    "DEFAULT_MEASURES",
    "GROUP_MEASURES",
    "Regression",
    "ann_recall",
    "compare",
    "compare_strata",
    "depth",
    "exact_search",
    "group_overlap",
    "late_row_share",
    "pair_scores",
    "parse_measures",
    "relevant_rows",
    "score",
    "seen_queries",
    "worst_regressions",
]

DEFAULT_MEASURES = ("nDCG@10", "R@10", "R@100", "RR@10")
"""Measures of judged queries; the first is the chosen one."""
GROUP_MEASURES = ("Rprec", "P@10", "nDCG@10")
"""Measures of groups; the first is the chosen one."""
UNCUT_DEPTH = 1000
"""Rows retrieved for a measure that names no cutoff."""
DEEPEST = 10_000
"""Most rows retrieved for one query."""

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]
Measure = Any
"""A measure of ir_measures, which has no types."""


def parse_measures(names: Sequence[str]) -> tuple[str, ...]:
    """Return measures by their canonical ir-measures names, without repetition.

    Args:
        names: Such as ``nDCG@10``, ``R@100``, ``RR@10``, ``Success@5``, ``P@10``, ``Rprec``.

    Raises:
        ConfigError: A name is no measure, its cutoff is not 1 to `DEEPEST`, or nothing installed
            computes it.
        MissingDependencyError: ir_measures is not installed.
    """
    return tuple(dict.fromkeys(str(_checked(name)) for name in names))


def depth(measures: Sequence[str], judged: JudgedQueries) -> int:
    """Return how many rows must be retrieved for each query to compute these measures.

    Args:
        measures: Names as `parse_measures` returns them.
        judged: The queries; Rprec looks as deep as their largest number of relevant rows.

    Raises:
        ConfigError: Rprec would look deeper than `DEEPEST`.
    """
    wanted = max((_depth(_parse(name), judged) for name in measures), default=0)
    if wanted > DEEPEST:
        raise ConfigError(
            f"Rprec needs as many rows as a query has relevant ones, here {wanted}, and at most "
            f"{DEEPEST} are searched; choose a measure with a cutoff, such as P@10"
        )
    return wanted


def score(judged: JudgedQueries, ranked: Positions, measures: Sequence[str]) -> dict[str, Scores]:
    """Score ranked rows against judgments, one value for every query and measure.

    A query without results scores the measure's default (0).

    Args:
        judged: m queries.
        ranked: Positions, best first, shape (m, k); -1 where there is none.
        measures: Names as `parse_measures` returns them.

    Returns:
        By measure, shape (m,).

    Raises:
        MissingDependencyError: ir_measures is not installed.
    """
    package = _ir_measures()
    if len(ranked) != len(judged):
        raise ValueError(f"{len(ranked)} rankings for {len(judged)} queries")
    qrels = _qrels(judged)
    # trec_eval breaks ties by document id, so scores come from our own ranks.
    run = {
        str(i): {str(row): -rank for rank, row in enumerate(rows) if row >= 0}
        for i, rows in enumerate(ranked.tolist())
    }
    values = {}
    # One measure at a time: measures with gains would share them with others in one call.
    for name in measures:
        column = np.zeros(len(judged))
        for result in package.iter_calc([_parse(name)], qrels, run):
            column[int(result.query_id)] = result.value
        values[name] = column
    return values


def relevant_rows(judged: JudgedQueries) -> Positions:
    """Return the positions judged relevant for any query, ascending."""
    return np.unique(judged.rows[judged.grades > 0])


def seen_queries(judged: JudgedQueries, fitted: Positions) -> Mask:
    """Tell which queries have a relevant row that the fit knew as relevant.

    Args:
        judged: m queries.
        fitted: Positions judged relevant in the fit split.

    Returns:
        Shape (m,).
    """
    known = (judged.grades > 0) & np.isin(judged.rows, fitted)
    return np.bincount(judged.query_of_judgment()[known], minlength=len(judged)) > 0


def ann_recall(
    exact: Neighbors, found: Positions, found_scores: NDArray[np.floating[Any]]
) -> float:
    """Return the share of exact neighbours that an index found, 0 to 1.

    A row that ties with the last exact neighbour counts as found, whichever of them was returned.

    Args:
        exact: Exact neighbours, shape (m, k).
        found: Positions that the index returned, shape (m, k); -1 where there is none.
        found_scores: Their exact scores (`pair_scores`), shape (m, k).
    """
    there = exact.ids >= 0
    if not there.any():
        return 1.0
    last = np.where(there, exact.scores, np.inf).min(axis=1, keepdims=True)  # (m, 1)
    tolerance = 1e-6 * np.maximum(1e-30, np.abs(np.where(np.isfinite(last), last, 0)))
    right = (found >= 0) & (found_scores >= last - tolerance)
    hits = np.minimum(right.sum(axis=1), there.sum(axis=1))
    return float(hits.sum() / there.sum())


def group_overlap(judged: JudgedQueries, before: Positions, after: Positions) -> float:
    """Return how much of the top 10 of a query's own group stayed, averaged over queries, 0 to 1.

    Args:
        judged: m queries whose relevant rows are their group.
        before: Positions found before, shape (m, k); -1 where there is none.
        after: Positions found after, shape (m, k).
    """
    tops = [_top_relevant(judged, ranked) for ranked in (before, after)]
    count = len(judged)
    sizes = [np.bincount(owners, minlength=count) for owners, _ in tops]
    keys = [_keys(owners, rows) for owners, rows in tops]
    common = np.bincount(tops[0][0][np.isin(keys[0], keys[1])], minlength=count)
    largest = np.maximum(*sizes)
    measured = largest > 0
    if not measured.any():
        return 1.0
    return float((common[measured] / largest[measured]).mean())


def _top_relevant(
    judged: JudgedQueries, ranked: Positions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return queries and positions of each query's first ten relevant rows."""
    owners = np.broadcast_to(np.arange(len(judged))[:, None], ranked.shape)
    relevant = judged.grades > 0
    own = _keys(judged.query_of_judgment()[relevant], judged.rows[relevant])
    mask = (ranked >= 0) & np.isin(_keys(owners, ranked), own)
    mask &= np.cumsum(mask, axis=1) <= 10
    return owners[mask], ranked[mask]


def _keys(owners: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return (owners << 40) + rows


def _qrels(judged: JudgedQueries) -> dict[str, dict[str, int]]:
    rows, grades = judged.rows.astype(str).tolist(), judged.grades.tolist()
    ends = judged.indptr.tolist()
    return {
        str(i): dict(zip(rows[start:end], grades[start:end], strict=True))
        for i, (start, end) in enumerate(pairwise(ends))
    }


def _depth(measure: Measure, judged: JudgedQueries) -> int:
    cutoff = measure.params.get("cutoff")
    if cutoff is not None:
        return int(cutoff)
    if measure.NAME == "Rprec":
        relevant = judged.query_of_judgment()[judged.grades > 0]
        return int(np.bincount(relevant, minlength=1).max())
    return UNCUT_DEPTH


def _checked(name: str) -> Measure:
    package = _ir_measures()
    try:
        measure = _parse(name)
        # trec_eval crashes the process on a cutoff of 0.
        if not 1 <= measure.params.get("cutoff", 1) <= DEEPEST:
            raise ValueError(measure.params)
        list(package.iter_calc([measure], {"q": {"a": 1, "b": 0}}, {"q": {"b": 2, "a": 1}}))
    except Exception as error:
        # ir_measures raises NameError, SyntaxError, AssertionError and more for bad names.
        raise ConfigError(
            f"measure {name!r} cannot be computed; name one such as nDCG@10, R@100, RR@10, "
            f"Success@5, P@10 or Rprec, with a cutoff from 1 to {DEEPEST}"
        ) from error
    return measure


def _parse(name: str) -> Measure:
    return _ir_measures().parse_measure(name)


def _ir_measures() -> ModuleType:
    try:
        return import_module("ir_measures")
    except ImportError as error:
        raise MissingDependencyError("ir_measures", "eval") from error
