"""What a fit needs of an index that is larger than memory, streamed out of it in order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Mask, Positions
from simskip_vdb.pairs import OnDisk, grouped_rows, judged_pairs, nearest
from simskip_vdb.sampling import HARD_PER_STEP, MAX_OFFSETS, MINED, Problem

WORKING_SET = 2**16
"""Rows that a fit draws from, beside those that judgments or groups point to."""
MOST_MINED = 2**17
"""Rows mined for all queries together, if that leaves `HARD_PER_STEP` for each."""


def working_set(problem: Problem, signal: Signal, settings: FitSettings) -> Problem:
    """Take into memory the rows that a fit draws from.

    These are rows that judgments point to and their hard negatives, mined among all rows; rows of
    groups, if not too many for offsets; and a seeded sample of `WORKING_SET` rows, which the steps
    then draw in their own order. The index is read in order, once to mine and once to take.
    Neighbours of rows are looked for within the sample.

    Args:
        problem: Its rows may be on disk.
        signal: What the fit learns from.
        settings: How to fit.

    Returns:
        The problem over the rows that were taken, which are all rows where they fit.

    Raises:
        DataError: The signal has no positives.
    """
    if problem.on_disk is None:
        return problem
    n = len(problem.ids)
    if n <= WORKING_SET:
        return replace(problem, vectors=problem.on_disk.take(np.arange(n)), on_disk=None)
    usable = np.flatnonzero(problem.usable)
    rng = np.random.default_rng(settings.seed)
    size = min(WORKING_SET, len(usable))
    wanted = [rng.choice(usable, size, replace=False, shuffle=False)]
    offsets = True
    if signal is Signal.JUDGED and problem.queries is not None:
        wanted += _judged(problem, problem.on_disk, problem.queries, usable, settings.device)
    elif signal is Signal.GROUPS and problem.groups is not None:
        grouped = grouped_rows(problem.groups, problem.usable)
        offsets = len(grouped) <= MAX_OFFSETS
        wanted += [grouped] if offsets else []
    rows = np.unique(np.concatenate(wanted))
    return replace(
        problem,
        vectors=problem.on_disk.take(rows),
        ids=problem.ids[rows],
        queries=None if problem.queries is None else _among(problem.queries, rows),
        groups=None if problem.groups is None else problem.groups[rows],
        usable=problem.usable[rows],
        late=None if problem.late is None else problem.late[rows],
        offsets=offsets,
        on_disk=None,
    )


def _judged(
    problem: Problem, rows: OnDisk, queries: JudgedQueries, usable: Positions, device: str
) -> list[Positions]:
    """Return the rows that queries point to, and those that are mined for them."""
    pairs = judged_pairs(queries, problem.usable)
    asked = pairs.vectors[pairs.anchors]
    k = max(HARD_PER_STEP, min(MINED, MOST_MINED // len(asked)))
    mined = nearest(asked, rows, usable, k=k, device=device)
    return [pairs.rows_with_anchors(), mined.ravel()]


def _among(queries: JudgedQueries, rows: Positions) -> JudgedQueries:
    """Return queries with their judgments of some rows, by place among these."""
    places, kept = _places(queries.rows, rows)
    sizes = np.bincount(queries.query_of_judgment()[kept], minlength=len(queries))
    return replace(
        queries,
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        rows=places[kept],
        grades=queries.grades[kept],
        own=None if queries.own is None else _own_among(queries.own, rows),
    )


def _own_among(own: Positions, rows: Positions) -> Positions:
    places, kept = _places(own, rows)
    return np.where(kept, places, -1)


def _places(wanted: Positions, rows: Positions) -> tuple[Positions, Mask]:
    """Return places among some rows, ascending, and which of those wanted are there."""
    places = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return places, rows[places] == wanted
