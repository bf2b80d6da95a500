"""How far a fitted refiner may move: the candidates that validation chooses among."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from simskip_vdb.config import Signal
from simskip_vdb.datatypes import Side
from simskip_vdb.refiner import Refiner

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # candidates for alpha = beta, the identity first
LESS_BY_OFFSETS = ((1.0, 0.75), (1.0, 0.5))  # alpha and beta that are fairer to late rows
FURTHER = 1.25  # than was learnt: tightens groups, but costs queries whose rows were never judged
PENALTIES = (10.0, 1.0)  # of ridge regressions
BEYOND = (1.5, 2.0)  # alpha = beta, where groups want all that was learnt
LESS = ((0.1, 0.1), (0.0, 0.25), (0.0, 0.5), (0.0, 1.0), (0.25, 0.0), (0.5, 0.0), (1.0, 0.0))
"""Alpha and beta that are tried where the first candidates found nothing."""

Validate = Callable[[Sequence[Refiner]], Sequence[float]]
"""Scores refiners on validation queries, higher is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How far a refiner moves, chosen before: no look at validation is needed.

    Attributes:
        alpha: Weight of f.
        beta: Weight of the offsets.
        penalty: Of the ridge regression that moves instead of what was learnt; None for that.
    """

    alpha: float
    beta: float
    penalty: float | None = None


IDENTITY = Plan(alpha=0.0, beta=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate and what validation said of it."""

    plan: Plan
    score: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A fitted refiner and how it was chosen.

    Attributes:
        whole: Moves by all of f and the offsets; `moved` makes candidates of it.
        ridge: Makes the same of ridge regressions, by penalty; None where there can be none.
        plan: What was chosen or given; the identity where nothing beat it.
        trials: Candidates in the order in which they were tried; empty where a plan was given.
        signal: What it learnt from.
    """

    whole: Refiner
    ridge: Callable[[], Mapping[float, Refiner]] | None = None
    plan: Plan
    trials: tuple[Trial, ...] = ()
    signal: Signal

    @property
    def refiner(self) -> Refiner:
        """The refiner that moves as planned."""
        return self.moved(self.plan)

    def moved(self, plan: Plan) -> Refiner:
        """Return the refiner that moves as far as planned, without the parts it does not use."""
        used = self.whole
        if plan.penalty is not None:
            assert self.ridge is not None
            used = self.ridge()[plan.penalty]
        alpha = plan.alpha if used.layers else 0.0
        beta = plan.beta if len(used.offset_ids) else 0.0
        return replace(
            used,
            alpha=alpha,
            beta=beta,
            layers=used.layers if alpha else (),
            offset_ids=used.offset_ids if beta else used.offset_ids[:0],
            origin=used.origin if alpha or beta else used.origin[:0],
        )

    def tried(self, plans: Sequence[Plan], validate: Validate) -> Fitted:
        """Let validation score more candidates; of equals the first is chosen."""
        scores = validate([self.moved(plan) for plan in plans])
        more = (Trial(plan=p, score=score) for p, score in zip(plans, scores, strict=True))
        trials = (*self.trials, *more)
        return replace(self, trials=trials, plan=max(trials, key=lambda trial: trial.score).plan)

    def wider(self, best: Plan) -> list[Plan]:
        """Return the plans to try where the best of the first is an end of what they span.

        That is the identity or, for groups, more than all that was learnt: queries whose rows were
        never judged would pay for that.
        """
        if best != IDENTITY:
            if self.signal is not Signal.GROUPS or best.alpha < 1:
                return []
            return [Plan(alpha=far, beta=far, penalty=best.penalty) for far in BEYOND]
        by_ridge = [
            Plan(alpha=weight, beta=weight, penalty=penalty)
            for penalty in (PENALTIES if self.ridge else ())
            for weight in (0.1, *GRID[1:])
        ]
        if self.whole.side is Side.QUERIES:
            return [Plan(alpha=0.1, beta=0.1), *by_ridge[:: len(GRID)]]
        return [*(Plan(alpha=alpha, beta=beta) for alpha, beta in LESS), *by_ridge]


def candidates(signal: Signal, side: Side) -> list[Plan]:
    """Return the plans that compete, the identity first."""
    plans = [Plan(alpha=weight, beta=weight) for weight in GRID]
    if side is Side.QUERIES:
        return plans + [
            Plan(alpha=weight, beta=weight, penalty=penalty)
            for penalty in PENALTIES
            for weight in GRID[1:]
        ]
    more = LESS_BY_OFFSETS if signal is Signal.JUDGED else ((FURTHER, FURTHER),)
    return plans + [Plan(alpha=alpha, beta=beta) for alpha, beta in more]
