"""Prove a gain with few judged queries: each is scored by a refiner that never saw it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Positions, Progress, Split
from simskip_vdb.evaluation import depth, relevant_rows, score, seen_queries
from simskip_vdb.fitting import (
    checkpoints,
    choose_late_rows,
    fit_key,
    problem_of,
    queries_as,
    recorded,
    treat_late_rows,
)
from simskip_vdb.gate import MIN_QUERIES, Evidence
from simskip_vdb.measuring import (
    CROSS_FITTED,
    Measured,
    Scored,
    detail,
    judgments_digest,
    take_look,
    weigh,
)
from simskip_vdb.plans import IDENTITY, Plan
from simskip_vdb.refiner import LateRule, Refiner
from simskip_vdb.resolution import concatenate
from simskip_vdb.splits import deal, near_identical
from simskip_vdb.workspace import Workspace

if TYPE_CHECKING:
    from simskip_vdb.training import Problem

BELOW = 150
"""Judged queries of which a fifth would be too few to test by."""
FOLDS = 5
SPREAD = (1 + FOLDS / (FOLDS - 1)) ** 0.5
"""How much wider intervals are than those of as many independent differences.

Refiners of two folds share most of what they learnt from, so their errors are correlated. The
variance of a mean over folds is then about (1/k + n_test/n_train) of a fold's, not 1/k of it
(Nadeau & Bengio, Machine Learning 52, 2003): 2.25 times as much for five folds.
"""

Scores = NDArray[np.float64]
Choice = tuple[FitSettings, Plan]
"""How to fit, its side among it, and how far to move."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossFit:
    """A refiner fitted on all queries, and those that prove it.

    Attributes:
        refiner: Fitted on all queries, with the weights of the folds' middle choice.
        queries: All judged queries.
        fold: Shape (m,); which of `refiners` scores a query.
        refiners: One a fold, fitted and chosen without its queries.
    """

    refiner: Refiner
    queries: JudgedQueries
    fold: Positions
    refiners: tuple[Refiner, ...]


def applies(space: Workspace) -> bool:
    """Tell whether the judged queries came as one set that is too small to be split."""
    total = sum(map(len, space.judged.queries.values()))
    return (
        space.judged.shared
        and MIN_QUERIES <= total < BELOW
        and space.settings.refiner is None
        and space.settings.fit.signal in (Signal.AUTO, Signal.JUDGED)
    )


def cross_fit(space: Workspace, progress: Progress) -> CrossFit:
    """Fit a refiner for each fold of the queries, and the one to be written on all of them.

    A fold's refiner is chosen inside the other folds: one of them validates alpha and beta of
    a fit on the rest, and what was chosen is fitted again on all of them. The refiner of all
    queries takes the middle one of the folds' choices. From here on, all queries count as fitted
    on.

    Args:
        space: The index and its judgments.
        progress: Called with (stage, done, total).

    Raises:
        FitError: A fit diverged.
        MissingDependencyError: torch is not installed.
    """
    everyone = concatenate(list(space.judged.queries.values()), space.info.dim)
    seed = space.settings.fit.seed
    fold = deal(everyone.ids, near_identical(everyone.vectors), FOLDS, seed)
    parts = [everyone.subset(fold == number) for number in range(FOLDS)]
    problem = problem_of(space, everyone)
    key = judgments_digest(everyone, space.rows.ids) + fit_key(space)
    with space.timed("fit"), checkpoints(space, hashlib.sha256(key.encode()).hexdigest()):
        refiners, choices = [], []
        for number in range(FOLDS):
            refiner, choice = _fit_fold(space, problem, parts, number, progress)
            refiners.append(refiner)
            choices.append(choice)
        choice = _typical(choices)
        info: dict[str, Any] = {"folds": [[plan.alpha, plan.beta] for _, plan in choices]}
        rule = LateRule.RAW
        if choice[1] != IDENTITY:
            rule, info["late_rows"] = _late_rows(space, problem, parts, choice, progress)
        space.judged = replace(space.judged, queries=_roles(space, everyone))
        refiner = _fit(space, problem, choice, progress, "fit on all queries")
        refiner = replace(refiner, late=rule)
        refiner = recorded(refiner, space, problem, info)
    return CrossFit(refiner=refiner, queries=everyone, fold=fold, refiners=tuple(refiners))


def measure_cross_fit(space: Workspace, crossed: CrossFit) -> tuple[Measured, Evidence]:
    """Compare what the index holds with what each query's fold refiner makes of it.

    It is counted as a look at all queries before it happens.
    """
    judged, fold = crossed.queries, crossed.fold
    look = take_look(space, crossed.refiner, judged)
    k = max(depth(space.measures, judged), 10)
    with space.timed("evaluate"):
        asked = space.as_searched(judged.vectors)
        before = space.search(asked, space.current_blocks(), k, own=judged.own).ids
        after, seen = np.empty_like(before), np.empty(len(judged), np.bool_)
        for number, refiner in enumerate(crossed.refiners):
            own = fold == number
            part, rest = judged.subset(own), judged.subset(~own)
            rows = space.refined_blocks(refiner)
            found = space.search(refiner(part.vectors), rows, k, own=part.own)
            after[own], seen[own] = found.ids, seen_queries(part, relevant_rows(rest))
        was, now = (score(judged, ranked, space.measures) for ranked in (before, after))
        scored = Scored(judged=judged, seen=seen, before=was, after=now)
        measured, evidence = weigh(space, crossed.refiner, scored, look, stretch=SPREAD)
    evidence = replace(evidence, chosen=space.ledger.saw(look, evidence.chosen))
    shown = detail(space, scored, before, after)
    return replace(measured, split=CROSS_FITTED, detail=shown), evidence


def _fit_fold(
    space: Workspace,
    problem: Problem,
    parts: list[JudgedQueries],
    number: int,
    progress: Progress,
) -> tuple[Refiner, Choice]:
    from simskip_vdb.training import fit_refiner

    inner = (number + 1) % len(parts)
    fit = _without(space, parts, number, inner)
    best: list[tuple[float, Choice]] = []
    with queries_as(space, _roles(space, fit, parts[inner])):
        for settings in space.settings.sides:
            if not space.may_choose(settings.side):
                continue
            fitted = fit_refiner(
                replace(problem, queries=fit),
                settings,
                space.validate,
                progress=lambda done, total, _: progress(f"choose, fold {number + 1}", done, total),
                checkpoint=space.checkpoint(),
            )
            wider = fitted.wider(fitted.plan)
            fitted = fitted.tried(wider, space.validate) if wider else fitted
            score = max(trial.score for trial in fitted.trials)
            best.append((score, (settings, fitted.plan)))
    choice = max(best, key=lambda item: item[0])[1]
    rest_only = replace(problem, queries=_without(space, parts, number))
    return _fit(space, rest_only, choice, progress, f"fit, fold {number + 1}"), choice


def _fit(
    space: Workspace, problem: Problem, choice: Choice, progress: Progress, stage: str
) -> Refiner:
    from simskip_vdb.training import fit_refiner

    settings, plan = choice
    if plan == IDENTITY:
        return Refiner.identity(space.info.dim, side=settings.side, metric=space.info.metric)
    return fit_refiner(
        problem,
        settings,
        space.validate,
        progress=lambda done, total, _: progress(stage, done, total),
        plan=plan,
        checkpoint=space.checkpoint(),
    ).refiner


def _typical(choices: list[Choice]) -> Choice:
    """Return the side that most folds chose, and the middle one of their plans for it."""
    sides = [settings.side for settings, _ in choices]
    most = max(dict.fromkeys(sides), key=sides.count)
    found = [choice for choice in choices if choice[0].side is most]
    found.sort(key=lambda choice: (choice[1].alpha, choice[1].beta, choice[1].penalty or 0.0))
    return found[(len(found) - 1) // 2]


def _late_rows(
    space: Workspace,
    problem: Problem,
    parts: list[JudgedQueries],
    choice: Choice,
    progress: Progress,
) -> tuple[LateRule, dict[str, Any]]:
    """Let the first fold's queries tell how late rows fare with a probe fitted on the others."""
    late, rest = choose_late_rows(space), _without(space, parts, 0)
    blind = replace(problem, queries=rest, late=late)
    probe = _fit(space, blind, choice, progress, "probe")
    with queries_as(space, _roles(space, rest, parts[0])):
        share, rule = treat_late_rows(space, probe, late)
    return rule, {**share.to_dict(), "rule": rule.value}


def _without(space: Workspace, parts: list[JudgedQueries], *left_out: int) -> JudgedQueries:
    kept = [part for number, part in enumerate(parts) if number not in left_out]
    return concatenate(kept, space.info.dim)


def _roles(
    space: Workspace, fit: JudgedQueries, validation: JudgedQueries | None = None
) -> dict[Split, JudgedQueries]:
    none = concatenate([], space.info.dim)
    return {
        Split.FIT: fit,
        Split.VALIDATION: none if validation is None else validation,
        Split.TEST: none,
    }
