"""How far a fitted refiner may move: the candidates that validation chooses among."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simskip_vdb.config import Signal
from simskip_vdb.refiner import Refiner

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # candidates for alpha = beta, the identity first
LESS_BY_OFFSETS = ((1.0, 0.75), (1.0, 0.5))  # alpha and beta that are fairer to late rows
FURTHER = 1.25  # than was learnt: tightens groups, but costs queries whose rows were never judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How far a refiner moves, chosen before: no look at validation is needed.

    Attributes:
        alpha: Weight of f.
        beta: Weight of the offsets.
    """

    alpha: float
    beta: float


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
        plan: What was chosen or given; the identity where nothing beat it.
        trials: Candidates in the order of `candidates`; empty where a plan was given.
        signal: What it learnt from.
    """

    whole: Refiner
    plan: Plan
    trials: tuple[Trial, ...]
    signal: Signal

    @property
    def refiner(self) -> Refiner:
        """The refiner that moves as planned."""
        return self.moved(self.plan)

    def moved(self, plan: Plan) -> Refiner:
        """Return the refiner that moves as far as planned, without the parts it does not use."""
        used, beta = self.whole, plan.beta
        if beta == 0 or not len(used.offset_ids):
            used, beta = replace(used, offset_ids=used.offset_ids[:0]), 0.0
        if not plan.alpha:
            used = replace(used, layers=(), origin=used.origin if beta else used.origin[:0])
        return replace(used, alpha=plan.alpha, beta=beta)


def candidates(signal: Signal) -> list[Plan]:
    """Return the plans that compete, the identity first; of equals the first is chosen."""
    more = LESS_BY_OFFSETS if signal is Signal.JUDGED else ((FURTHER, FURTHER),)
    pairs = (*((weight, weight) for weight in GRID), *more)
    return [Plan(alpha=alpha, beta=beta) for alpha, beta in pairs]
