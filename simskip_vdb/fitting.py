"""Fit the refiner that is tested and written, and learn how rows that arrive later fare with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Progress, Side, Split
from simskip_vdb.durable import json_of
from simskip_vdb.evaluation import late_row_share
from simskip_vdb.gate import LateRows
from simskip_vdb.measuring import Measured, judgments_digest, learnt_from, measure
from simskip_vdb.plans import IDENTITY, Fitted, Plan, Trial
from simskip_vdb.refiner import LateRule, Refiner
from simskip_vdb.resolution import concatenate
from simskip_vdb.rows import hash_ids, row_digests
from simskip_vdb.splits import near_identical, unit_hash
from simskip_vdb.workspace import Workspace

if TYPE_CHECKING:
    from simskip_vdb.training import Problem

TOP = 10
LATE_ROWS = 0.1  # part of the rows that the probe treats as late
FEW_QUERIES = 300  # fewer validation queries are too few to choose by on their own
TRIED = "what was learnt at several weights, in parts, and ridge regressions"
FOLDS = 4  # with validation, a quarter of what it was drawn from, as the first

Mask = NDArray[np.bool_]


def fit_or_recall(space: Workspace, progress: Progress) -> Refiner:
    """Return the refiner for these rows, judgments and settings.

    A fit that was done before on the very same input is recalled, not repeated.

    Args:
        space: The index and its judgments.
        progress: Called with (stage, done, total).

    Raises:
        DataError: The signal has no positives.
        FitError: The fit diverged.
        MissingDependencyError: torch is not installed.
    """
    key = fit_key(space)
    refiner = _recall(space.journal.refiners, key)
    if refiner is None:
        with space.timed("fit"), checkpoints(space, key):
            refiner = _fit(space, key, progress)
    return refiner


@contextmanager
def checkpoints(space: Workspace, key: str) -> Iterator[None]:
    """Give every fit of a run a checkpoint, by its number, until the run has fitted them all.

    Args:
        space: The index and its judgments.
        key: Hash of everything that the fits depend on.
    """
    folder = space.journal.fits
    numbers = count()
    space.checkpoint = lambda: folder / f"{key}-{next(numbers)}"
    yield
    space.checkpoint = lambda: None
    shutil.rmtree(folder, ignore_errors=True)


def validated(refiner: Refiner) -> Measured | None:
    """Return what validation said of a refiner when it was chosen; None where nothing was."""
    found = refiner.info.get("validation")
    return None if found is None else Measured(**found)


def learnt_since(refiner: Refiner, space: Workspace) -> bool:
    """Tell whether it learnt from all of this index's validation queries once they had chosen it.

    What `validated` returns is then all that they have to say.
    """
    learnt = learnt_from(refiner, space.judged.queries[Split.VALIDATION])
    return bool(learnt.all()) and refiner.info.get("validated_on") == _validated_on(space)


def _validated_on(space: Workspace) -> str:
    return judgments_digest(space.judged.queries[Split.VALIDATION], space.rows.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Side:
    """What was fitted for one side, and how its candidates rank.

    Attributes:
        settings: How it was fitted, the side among it.
        fits: On the fit queries, and on folds where these are few.
        ranked: Candidates over all queries that chose, best first.
        queries: How many those are.
    """

    settings: FitSettings
    fits: Sequence[Fitted]
    ranked: Sequence[Trial]
    queries: int


def _fit(space: Workspace, key: str, progress: Progress) -> Refiner:
    judged = space.judged
    fit_queries = judged.queries[Split.FIT]
    problem = replace(
        problem_of(space, fit_queries if len(fit_queries) else None),
        usable=space.usable & ~space.twins(judged.held_out),
    )
    fit = partial(_fit_once, space, progress)
    if not len(judged.queries[Split.VALIDATION]):
        # Nothing to choose by: all of f, as published; the gate will find nothing measured.
        plan = Plan(alpha=1.0, beta=1.0)
        fitted = fit("fit", problem, space.settings.sides[0], plan)
        return recorded(fitted.refiner, space, problem, _info(fitted, key))
    sides = [_fit_side(space, problem, settings, fit) for settings in space.settings.sides]
    allowed = [found for found in sides if space.may_choose(found.settings.side)]
    chosen = max(allowed, key=lambda found: found.ranked[0].score)
    first, plan = chosen.fits[0], chosen.ranked[0].plan
    info = _info(first, key)
    rule = LateRule.RAW
    if plan != IDENTITY:
        late = choose_late_rows(space)
        probe = fit("probe", replace(problem, late=late), chosen.settings, plan)
        plan, share, rule = _treated(space, probe, [trial.plan for trial in chosen.ranked], late)
        info["late_rows"] = {**share.to_dict(), "rule": rule.value}
    info["choice"] = _choice(chosen, plan)
    if len(sides) > 1:
        info["sides"] = {
            found.settings.side.value: _choice(found, found.ranked[0].plan) for found in sides
        }
    refiner = first.moved(plan)
    measured = measure(space, refiner, Split.VALIDATION)
    assert measured is not None
    info["validation"] = asdict(measured[0])
    info["validated_on"] = _validated_on(space)
    whole = _whole(space, problem, first.signal)
    if refiner.is_identity:
        return recorded(refiner, space, problem, info)
    if whole is not problem:
        refiner = fit("fit on all", whole, chosen.settings, plan).refiner
    return recorded(replace(refiner, late=rule), space, whole, info)


def _fit_once(
    space: Workspace,
    progress: Progress,
    stage: str,
    problem: Problem,
    settings: FitSettings,
    plan: Plan | None,
) -> Fitted:
    from simskip_vdb.training import fit_refiner

    return fit_refiner(
        problem,
        settings,
        space.validate,
        progress=lambda done, total, _: progress(stage, done, total),
        plan=plan,
        checkpoint=space.checkpoint(),
    )


def _fit_side(
    space: Workspace, problem: Problem, settings: FitSettings, fit: Callable[..., Fitted]
) -> _Side:
    first = fit("fit", problem, settings, None)
    fits, roles = [first], [space.judged.queries]
    for rest, held in _folds(space, first.signal):
        roles.append({**roles[0], Split.VALIDATION: held})
        with queries_as(space, roles[-1]):
            fits.append(fit("fold", replace(problem, queries=rest), settings, None))
    sizes = [len(queries[Split.VALIDATION]) for queries in roles]
    ranked = _ranked(fits, sizes)
    wider = first.wider(ranked[0].plan)
    if wider:
        for number, queries in enumerate(roles):
            with queries_as(space, queries):
                fits[number] = fits[number].tried(wider, space.validate)
        ranked = _ranked(fits, sizes)
    return _Side(settings=settings, fits=fits, ranked=ranked, queries=sum(sizes))


def _whole(space: Workspace, problem: Problem, signal: Signal) -> Problem:
    """Return what may be learnt from once the choice is made: all that was shared out but test."""
    queries = problem.queries
    if space.judged.validation_drawn and signal is Signal.JUDGED:
        queries = concatenate(
            [space.judged.queries[split] for split in (Split.FIT, Split.VALIDATION)], space.info.dim
        )
    usable = problem.usable
    if space.held(Split.VALIDATION).any():
        usable = space.usable & ~space.twins(space.held(Split.TEST))
    if queries is problem.queries and usable is problem.usable:
        return problem
    return replace(problem, queries=queries, usable=usable)


def _folds(space: Workspace, signal: Signal) -> list[tuple[JudgedQueries, JudgedQueries]]:
    """Return queries to learn from and to choose by, beside fit and validation, if these are few.

    Near-identical queries stay together.
    """
    fit, validation = (space.judged.queries[split] for split in (Split.FIT, Split.VALIDATION))
    learnt_in_the_end = space.judged.validation_drawn and signal is Signal.JUDGED
    if not learnt_in_the_end or len(validation) >= FEW_QUERIES:
        return []
    clusters = near_identical(fit.vectors)
    leaders = [fit.ids[i] for i in np.unique(clusters, return_index=True)[1]]
    drawn = unit_hash(leaders, space.settings.fit.seed + 1) * (FOLDS - 1)
    fold = drawn.astype(np.int64)[np.unique(clusters, return_inverse=True)[1]]
    parts = [(fit.subset(fold != i), fit.subset(fold == i)) for i in range(FOLDS - 1)]
    return [
        (concatenate([rest, validation], space.info.dim), held) for rest, held in parts if len(held)
    ]


def problem_of(space: Workspace, queries: JudgedQueries | None) -> Problem:
    """Return what is fitted: all usable rows, on disk, and these queries."""
    from simskip_vdb.training import Problem

    return Problem(
        vectors=np.empty((0, space.info.dim), np.float32),
        on_disk=space.rows,
        ids=space.rows.ids,
        metric=space.info.metric,
        queries=queries,
        groups=space.judged.groups,
        usable=space.usable,
    )


@contextmanager
def queries_as(space: Workspace, queries: Mapping[Split, JudgedQueries]) -> Iterator[None]:
    """Give queries other roles for a while."""
    before = space.judged
    space.judged = replace(before, queries=queries)
    try:
        yield
    finally:
        space.judged = before


def _ranked(fits: Sequence[Fitted], sizes: Sequence[int]) -> list[Trial]:
    """Rank plans by their mean score over the queries that each fit was chosen by, best first.

    Of equals the smaller move comes first.
    """
    scores = np.average([[t.score for t in fit.trials] for fit in fits], axis=0, weights=sizes)
    plans = [trial.plan for trial in fits[0].trials]
    trials = [Trial(plan=p, score=float(s)) for p, s in zip(plans, scores, strict=True)]
    return sorted(trials, key=lambda trial: -trial.score)


def _choice(side: _Side, plan: Plan) -> dict[str, Any]:
    score = {trial.plan: trial.score for trial in side.ranked}
    moving = [trial for trial in side.ranked if trial.plan != IDENTITY]
    return {
        "identity": score[IDENTITY],
        "best": score[plan],
        "best_move": moving[0].score,
        "candidates": len(side.ranked),
        "queries": side.queries,
    }


def _treated(
    space: Workspace, probe: Fitted, plans: Sequence[Plan], late: Mask
) -> tuple[Plan, LateRows, LateRule]:
    """Choose the plan, best first, and how late rows are treated.

    Where rows keep arriving, it is the best of those before the identity that are fair to late
    rows, or simply the best if none is.
    """
    better = plans[: plans.index(IDENTITY)] if space.settings.growing else plans[:1]
    learnt = better[0].penalty is None
    found = []
    for plan in (plan for plan in better if (plan.penalty is None) == learnt):
        share, rule = treat_late_rows(space, probe.moved(plan), late)
        if share.fair:
            return plan, share, rule
        found.append((plan, share, rule))
    return found[0]


def recorded(
    refiner: Refiner, space: Workspace, problem: Problem, info: Mapping[str, Any]
) -> Refiner:
    """Note in a refiner what it learnt from and was chosen by, which proves nothing about it."""
    learnt = [row_digests(space.judged.queries[Split.FIT].vectors)]
    if problem.queries is not None:
        learnt.append(row_digests(problem.queries.vectors))
    if problem.groups is not None:
        learnt.append(space.digests[problem.usable])
    return replace(
        refiner,
        fitted_on=np.unique(np.concatenate(learnt)),
        chosen_on=np.unique(row_digests(space.judged.queries[Split.VALIDATION].vectors)),
        info=info,
    )


def choose_late_rows(space: Workspace) -> Mask:
    """Choose a tenth of the rows by hash, to be treated as if they arrived after the fit.

    Returns:
        Shape (n,).
    """
    drawn = hash_ids(space.rows.ids, space.settings.fit.seed)
    late: Mask = drawn < np.uint64(LATE_ROWS * 2**64)
    return late & space.usable & ~space.judged.held_out


def treat_late_rows(space: Workspace, probe: Refiner, late: Mask) -> tuple[LateRows, LateRule]:
    """Choose how late rows are treated, by a refiner that was fitted without them.

    Of the rules that are fair, the better on validation; if none is fair, the fairer.

    Args:
        space: The index and its judgments.
        probe: The refiner that was fitted without late rows.
        late: Those rows, shape (n,).
    """
    judged = space.judged.queries[Split.VALIDATION]
    skip = space.skipped(Split.VALIDATION)
    raw = space.search(judged.vectors, space.rows.blocks(), TOP, skip, judged.own).ids
    found = []
    for rule in (LateRule.RAW, LateRule.F) if probe.moves_rows and probe.alpha else (LateRule.RAW,):
        refiner = replace(probe, late=rule)
        blocks = space.refined_blocks(refiner, late)
        ranked = space.search(refiner(judged.vectors), blocks, TOP, skip, judged.own).ids
        share = late_row_share(raw, ranked, late)
        value = space.validate([refiner], late)[0] if share.fair else -_unfairness(share)
        found.append((share.fair, value, share, rule))
    _, _, share, rule = max(found, key=lambda item: item[:2])
    return share, rule


def _unfairness(share: LateRows) -> float:
    return abs(float(np.log(share.ratio))) if share.ratio else float("inf")


def _info(fitted: Fitted, key: str) -> dict[str, Any]:
    import torch

    return {
        "fit_key": key,
        "signal": fitted.signal.value,
        "choice": None,
        "simskip_vdb": version("simskip-vdb"),
        "torch": torch.__version__,
    }


def _recall(folder: Path, key: str) -> Refiner | None:
    for settings in sorted(folder.glob("*/refiner.json")):
        try:
            known = json_of(settings.read_bytes())["info"].get("fit_key")
        except (ValueError, KeyError, AttributeError):
            continue
        if known == key:
            return Refiner.load(settings.parent)
    return None


def fit_key(space: Workspace) -> str:
    """Hash everything that a fit depends on: rows, judgments, settings, version."""
    digest = hashlib.sha256(version("simskip-vdb").encode())
    settings = asdict(space.settings.fit) | {"growing": space.settings.growing}
    settings["sides"] = [side for side in Side if space.may_choose(side)]
    digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    digest.update(space.measure.encode())
    order = np.argsort(space.rows.ids, kind="stable")
    _feed(digest, space.rows.ids[order], space.digests[order])
    if space.judged.groups is not None:
        _feed(digest, space.judged.groups[order])
    for split in (Split.FIT, Split.VALIDATION):
        digest.update(judgments_digest(space.judged.queries[split], space.rows.ids).encode())
    return digest.hexdigest()


def _feed(digest: Any, *arrays: NDArray[Any]) -> None:  # noqa: ANN401 hashlib's type is private
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)


def describe(info: Mapping[str, Any]) -> str:
    """Say what validation said of a fit."""
    if "folds" in info:
        still = sum(not (alpha or beta) for alpha, beta in info["folds"])
        return f"in {still} of {len(info['folds'])} folds the vectors as they are validated best"
    found = info.get("choice")
    if found is None:
        return ""
    if found["best"] == found["identity"]:
        return (
            f"the best of {found['candidates'] - 1} moves that were tried ({TRIED}) scored "
            f"{found['best_move']:.4f} on {found['queries']} queries to choose by, the vectors as "
            f"they are {found['identity']:.4f}"
        )
    return (
        f"the one chosen of {found['candidates']} candidates scored {found['best']:.4f} on "
        f"{found['queries']} queries to choose by, the vectors as they are {found['identity']:.4f}"
    )
