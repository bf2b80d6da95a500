"""Measure a refiner on one split by exact search, and take a look at test queries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import (
    Ids,
    JudgedQueries,
    Mask,
    Positions,
    Split,
    id_names,
)
from simskip_vdb.errors import DataError
from simskip_vdb.evaluation import (
    compare,
    compare_strata,
    depth,
    group_overlap,
    relevant_rows,
    score,
    seen_queries,
    worst_regressions,
)
from simskip_vdb.gate import (
    MIN_QUERIES,
    Evidence,
    LateRows,
    Look,
)
from simskip_vdb.ledger import FIRST_LEVEL, Ledger
from simskip_vdb.refiner import Refiner
from simskip_vdb.rows import row_digests
from simskip_vdb.sample_size import TYPICAL_SPREAD, smallest_gain
from simskip_vdb.workspace import Workspace

CROSS_FITTED = "cross-fitted"
"""Stands for a split where every query was scored by a refiner that never saw it."""
MOST_MOVED = 5
SHOWN = 5  # rows of a query that moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one split says of a refiner, as plain JSON values.

    Attributes:
        split: Which queries, or `CROSS_FITTED`.
        measures: Comparison of each measure, the chosen one first.
        strata: The chosen measure over ``seen`` and ``unseen`` queries; None where there are none.
        regressions: The queries that lost most.
        group_overlap: Top-10 overlap inside groups; None without groups.
        left_out: Queries left out because the refiner learnt from them.
        detail: Each query's change, and what moved most: `detail`; None where nobody needs it.
    """

    split: str
    measures: Mapping[str, Any]
    strata: Mapping[str, Any]
    regressions: Sequence[Mapping[str, Any]]
    group_overlap: float | None
    left_out: int
    detail: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """Scores of queries before and after.

    Attributes:
        judged: m queries.
        seen: Shape (m,); true where the fit knew a relevant row as relevant.
        before: By measure, shape (m,).
        after: By measure, shape (m,).
    """

    judged: JudgedQueries
    seen: NDArray[np.bool_]
    before: Mapping[str, NDArray[np.float64]]
    after: Mapping[str, NDArray[np.float64]]


def measure(
    space: Workspace,
    refiner: Refiner,
    split: Split,
    *,
    as_is: bool = False,
    current: Refiner | None = None,
    freshest: bool = False,
) -> tuple[Measured, Evidence] | None:
    """Compare what the index holds with what a refiner makes of it, by exact search.

    Reading the test queries is counted as a look before it happens.

    Args:
        space: The index and its judgments.
        refiner: What to measure.
        split: Which queries to measure on.
        as_is: The refiner wrote the index: measure the rows that it holds.
        current: Compare with what this refiner makes of all rows instead, those that came since
            it wrote the index included.
        freshest: Leave out queries that were looked at before, where the others can prove more.

    Returns:
        None where the split has no queries.

    Raises:
        DataError: The refiner learnt from all of these queries.
    """
    judged = space.judged.queries[split]
    if not len(judged):
        return None
    given = len(judged)
    judged = _unseen(refiner, judged, split)
    if current is not None:
        judged = _not_learnt(current, judged)
    if freshest:
        judged = freshest_part(space.ledger, judged)
    look = described(space)
    counts = split is Split.TEST and not refiner.is_identity  # else there is nothing to prove
    if counts:
        look = take_look(space, refiner, judged, current)
    k = max(depth(space.measures, judged), 10)
    skip, late = space.skipped(split), space.late(refiner)
    with space.timed("evaluate"):
        before = _found_now(space, judged, current, k, skip)
        rows = space.blocks_of(space.held_by) if as_is else space.refined_blocks(refiner, late)
        after = space.search(refiner(judged.vectors), rows, k, skip, judged.own).ids
        was, now = (score(judged, found, space.measures) for found in (before, after))
        overlap = None
        if space.judged.groups is not None:
            overlap = group_overlap(judged, before, after)
        scored = Scored(judged=judged, seen=_seen(space, refiner, judged), before=was, after=now)
        measured, evidence = weigh(space, refiner, scored, look)
    if counts:
        evidence = replace(evidence, chosen=space.ledger.saw(look, evidence.chosen))
    measured = replace(
        measured,
        split=split.value,
        group_overlap=overlap,
        left_out=given - len(judged),
        detail=detail(space, scored, before, after) if split is Split.TEST else None,
    )
    return measured, replace(evidence, group_overlap=overlap)


def detail(space: Workspace, scored: Scored, before: Positions, after: Positions) -> dict[str, Any]:
    """Return each query's score before and after, and the rows of those that moved most.

    Args:
        space: The index and its judgments.
        scored: The scores.
        before: Positions found before, shape (m, k); -1 where there is none.
        after: Positions found after, shape (m, k).

    Returns:
        measure; queries: query, before, after; moved: the same of the `MOST_MOVED` that gained
        most and as many that lost most, with rows_before and rows_after: row, grade.
    """
    judged, measure = scored.judged, space.measure
    was, now = scored.before[measure], scored.after[measure]
    order = np.argsort(was - now, kind="stable")
    ends = np.unique(np.concatenate([order[:MOST_MOVED], order[-MOST_MOVED:]]))
    queries = [
        {"query": name, "before": round(x, 4), "after": round(y, 4)}
        for name, x, y in zip(judged.ids, was.tolist(), now.tolist(), strict=True)
    ]

    def rows(query: int, found: Positions) -> list[dict[str, Any]]:
        part = slice(judged.indptr[query], judged.indptr[query + 1])
        grades = dict(zip(judged.rows[part].tolist(), judged.grades[part].tolist(), strict=True))
        top = found[query, :SHOWN]
        top = top[top >= 0]
        names = id_names(space.rows.ids[top])
        return [
            {"row": name, "grade": max(0, grades.get(row, 0))}
            for name, row in zip(names, top.tolist(), strict=True)
        ]

    moved = [
        {**queries[i], "rows_before": rows(i, before), "rows_after": rows(i, after)}
        for i in sorted(ends.tolist(), key=lambda i: was[i] - now[i])
        if was[i] != now[i]
    ]
    return {"measure": measure, "queries": queries, "moved": moved}


def _found_now(
    space: Workspace, judged: JudgedQueries, current: Refiner | None, k: int, skip: Mask | None
) -> Positions:
    """Search what the index holds, or what the current refiner makes of all rows and queries."""
    if current is not None:
        blocks = space.refined_blocks(current, space.late(current))
        return space.search(current(judged.vectors), blocks, k, skip, judged.own).ids
    queries = space.as_searched(judged.vectors)
    return space.search(queries, space.current_blocks(), k, skip, judged.own).ids


def _not_learnt(current: Refiner, judged: JudgedQueries) -> JudgedQueries:
    """Leave out what the current refiner learnt from, which speaks for it; unless that is all."""
    fresh = ~learnt_from(current, judged)
    return judged.subset(fresh) if fresh.any() else judged


def take_look(
    space: Workspace, refiner: Refiner, judged: JudgedQueries, current: Refiner | None = None
) -> Look:
    """Count a look at test queries before it happens.

    Args:
        space: The index and its judgments.
        refiner: What is looked at.
        judged: The queries.
        current: What it is compared with, if not with what the index holds.
    """
    held = "" if space.as_given else "mixed" if space.current is None else space.current.refiner
    rows = hashlib.sha256(np.ascontiguousarray(space.rows.ids).data)
    rows.update(space.digests.data)
    key = {
        "refiner": refiner.id,
        "against": held if current is None else current.id,
        "measure": space.measure,
        "test": judgments_digest(judged, space.rows.ids),
        "rows": rows.hexdigest()[:16],
    }
    return space.ledger.look(key, judged)


def described(space: Workspace) -> Look:
    """Return the level at which queries that prove nothing are described, a first look's."""
    seed = space.settings.fit.seed
    return Look(number=1, level=FIRST_LEVEL, next_level=FIRST_LEVEL, proven=0, seed=seed)


def freshest_part(ledger: Ledger, judged: JudgedQueries) -> JudgedQueries:
    """Return the queries that were first looked at late enough to prove the smallest gain.

    The later, the more of the wealth that proven gains earned may be spent on them, and the fewer
    they are.
    """
    first = ledger.first_looks(judged)
    spread = ledger.spread or TYPICAL_SPREAD

    def provable(since: int) -> float:
        look, queries = ledger.next_look(since), int((first >= since).sum())
        loss = look.assumed_loss(queries)
        return smallest_gain(queries, look.level, spread, assumed_loss=loss)

    whole = int(first.min(initial=ledger.looks + 1))
    ends = [int(n) for n in np.unique(first) if (first >= n).sum() >= MIN_QUERIES]
    best = min([whole, *ends], key=provable) if len(judged) else whole
    return judged.subset(first >= best)


def live_gains(space: Workspace, judged: JudgedQueries) -> NDArray[np.float64]:
    """Return what the chosen measure gains by what the index holds, over its originals, shape (m,).

    Args:
        space: The index and its judgments.
        judged: m queries, which pass through the refiner where the application's do.
    """
    k, skip = max(depth(space.measures[:1], judged), 1), space.skipped(Split.TEST)
    asked = (
        (judged.vectors, space.rows.blocks()),
        (space.as_searched(judged.vectors), space.current_blocks()),
    )
    with space.timed("evaluate"):
        was, now = (
            score(
                judged,
                space.search(queries, blocks, k, skip, judged.own).ids,
                space.measures[:1],
            )
            for queries, blocks in asked
        )
    return now[space.measure] - was[space.measure]


def weigh(
    space: Workspace,
    refiner: Refiner,
    scored: Scored,
    look: Look,
    *,
    stretch: float = 1.0,
) -> tuple[Measured, Evidence]:
    """Compare scores before and after, the chosen measure at the level of a look.

    Args:
        space: The index and its judgments.
        refiner: What the scores are of.
        scored: The scores.
        look: The look that is taken.
        stretch: As in `compare`.
    """
    was, now = scored.before[space.measure], scored.after[space.measure]
    levels = {name: None for name in space.measures} | {space.measure: look.level}
    compared = {
        name: compare(
            scored.before[name],
            scored.after[name],
            level,
            look.seed,
            assumed_loss=look.assumed_loss(len(was)),
            stretch=stretch,
        )
        for name, level in levels.items()
    }
    strata = compare_strata(was, now, scored.seen, look.seed)
    measured = Measured(
        split=Split.TEST.value,
        measures={name: found.to_dict() for name, found in compared.items()},
        strata={
            name: strata[name].to_dict() if name in strata else None for name in ("seen", "unseen")
        },
        regressions=[item.to_dict() for item in worst_regressions(scored.judged.ids, was, now)],
        group_overlap=None,
        left_out=0,
    )
    evidence = Evidence(
        measure=space.measure,
        look=look,
        chosen=compared[space.measure],
        strata=strata,
        growing=space.settings.growing,
        late_rows=_late_rows(refiner),
    )
    return measured, evidence


def learnt_from(refiner: Refiner, judged: JudgedQueries) -> NDArray[np.bool_]:
    """Tell which queries a refiner learnt from, shape (m,)."""
    return np.isin(row_digests(judged.vectors), refiner.fitted_on)


def known_to(refiner: Refiner, judged: JudgedQueries) -> NDArray[np.bool_]:
    """Tell which queries a refiner learnt from or was chosen by, shape (m,)."""
    known = np.concatenate([refiner.fitted_on, refiner.chosen_on])
    return np.isin(row_digests(judged.vectors), known)


def _unseen(refiner: Refiner, judged: JudgedQueries, split: Split) -> JudgedQueries:
    """Leave out queries that the refiner learnt from or, for test, was chosen by."""
    fresh = ~(known_to if split is Split.TEST else learnt_from)(refiner, judged)
    if not fresh.any():
        raise DataError(
            f"refiner {refiner.id} learnt from all {len(judged)} {split.value} queries, so they "
            "prove nothing about it; give queries that it never saw"
            + (", or measure with --on test" if split is Split.VALIDATION else "")
        )
    return judged.subset(fresh)


def judgments_digest(judged: JudgedQueries, row_ids: Ids) -> str:
    """Hash queries and their judgments, whose rows count by id: 16 hex digits."""
    digest = hashlib.sha256("\n".join(judged.ids).encode())
    for array in (judged.vectors, judged.indptr, row_ids[judged.rows], judged.grades):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _seen(space: Workspace, refiner: Refiner, judged: JudgedQueries) -> NDArray[np.bool_]:
    if space.judged.groups is not None:  # every group was learnt from
        return np.ones(len(judged), np.bool_)
    validation = space.judged.queries[Split.VALIDATION]
    also = validation.subset(learnt_from(refiner, validation))
    known = [relevant_rows(queries) for queries in (space.judged.queries[Split.FIT], also)]
    return seen_queries(judged, np.concatenate(known))


def _late_rows(refiner: Refiner) -> LateRows | None:
    found = refiner.info.get("late_rows")
    if found is None:
        return None
    return LateRows(before=found["before"], after=found["after"], ratio=found["ratio"])
