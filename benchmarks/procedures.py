"""Procedures that could share out the gate's level over many looks, compared at an equal guarantee.

All of them bound by .05 either the chance that an index of which all refiners are worthless is ever
written to, or the share of worthless refinements of all. Test queries are fresh every night, so
that each may use what its theorem asks for; `rule` says which of them allow for less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from nights import tilted
from numpy.typing import NDArray
from scipy import special, stats

from simskip_vdb.harm import HarmWatch
from simskip_vdb.ledger import ALPHA, PROMISING, WEALTH, share

Scores = NDArray[np.float64]
Level = Callable[[int, list[int], list[int]], float]
"""Level of the t-th look, from the looks that passed and, for SAFFRON, those with p up to .5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Procedure:
    """A way to set levels.

    Attributes:
        name: What a person reads.
        allows: Which dependence between looks its theorem allows for.
        level: Level of a look.
        betting: Whether looks are e-values, which reject above 1/level, instead of p-values.
    """

    name: str
    allows: str
    level: Level
    betting: bool = False


def _lord(t: int, passed: list[int], _: list[int]) -> float:
    regained = sum(
        (ALPHA - WEALTH if j == 0 else ALPHA) * _slowly(t - tau) for j, tau in enumerate(passed)
    )
    return WEALTH * _slowly(t) + regained


def _slowly(k: int) -> float:
    """Return shares under which a first look of LORD++ has the level that ours has."""
    return float(k**-1.5 / special.zeta(1.5))


def _saffron(t: int, passed: list[int], candidates: list[int]) -> float:
    wealths = [WEALTH, ALPHA - WEALTH, *[ALPHA] * len(passed)]
    return (1 - PROMISING) * sum(
        wealth * share(t - tau - sum(c > tau for c in candidates))
        for wealth, tau in zip(wealths, [0, *passed], strict=False)
    )


def _reshaped(t: int, passed: list[int], _: list[int]) -> float:
    reshaping = sum(j * share(j) for j in range(1, len(passed) + 2))
    return ALPHA * share(t) * reshaping


PROCEDURES = (
    Procedure(
        name="a first look at all fresh queries, .025/(k(k + 1)) at the same",
        allows="no guarantee for an index",
        level=lambda t, passed, _: 0.0125,
    ),
    Procedure(
        name="spending, .05/(t(t + 1))", allows="any", level=lambda t, passed, _: 0.05 / (t * t + t)
    ),
    Procedure(name="LORD++ with conflict sets", allows="looks that share queries", level=_lord),
    Procedure(name="SAFFRON with conflict sets", allows="looks that share queries", level=_saffron),
    Procedure(name="LOND, reshaped", allows="any", level=_reshaped),
    Procedure(
        name="e-LOND on bets",
        allows="any",
        level=lambda t, passed, _: ALPHA * share(t) * (len(passed) + 1),
        betting=True,
    ),
)


def compare_procedures(
    gained: Scores, worthless: Scores, gain: float, size: int, nights: int, series: int
) -> dict[str, dict[str, float]]:
    """Let every procedure meet the same looks.

    Args:
        gained: Differences with a gain, which are weighted to have it.
        worthless: Differences that are weighted to have none.
        gain: What each candidate truly gains over what is live.
        size: Fresh test queries a night.
        nights: How many looks.
        series: How many indexes.

    Returns:
        By procedure: share of indexes whose first gain is found by night 1, 7 and the last; gains
        found in all nights; share of indexes to which something worthless is written.
    """
    good, null = (
        _evidence(deltas, mean, size, nights, series)
        for deltas, mean in ((gained, gain), (worthless, 0.0))
    )
    found: dict[str, dict[str, float]] = {}
    for procedure in PROCEDURES:
        right, wrong = (
            [_passed(procedure, one) for one in kinds[procedure.betting]] for kinds in (good, null)
        )
        found[procedure.name] = {
            **{
                f"night {night}": float(np.mean([bool(n) and n[0] <= night for n in right]))
                for night in (1, 7, nights)
            },
            "gains": float(np.mean([len(n) for n in right])),
            "worthless": float(np.mean([bool(n) for n in wrong])),
        }
    return found


def _evidence(
    deltas: Scores, mean: float, size: int, nights: int, series: int
) -> dict[bool, Scores]:
    """Return p-values (False) and inverse e-values (True), shape (series, nights)."""
    rng, weights = np.random.default_rng(3), tilted(deltas, mean)
    p, e = np.empty((series, nights)), np.empty((series, nights))
    for s in range(series):
        drawn = rng.choice(deltas, (nights, size), p=weights)
        one_more = np.column_stack([drawn, -np.abs(drawn).max(axis=1)])
        p[s] = stats.ttest_1samp(one_more, 0, axis=1, alternative="greater").pvalue
        p[s, 0] = stats.ttest_1samp(drawn[0], 0, alternative="greater").pvalue
        e[s] = [np.exp(-HarmWatch(refiner="").seeing(-night).log_wealth) for night in drawn]
    return {False: np.nan_to_num(p, nan=1.0), True: e}


def _passed(procedure: Procedure, values: Scores) -> list[int]:
    """Return the nights that pass, from 1."""
    passed: list[int] = []
    candidates: list[int] = []
    for night, value in enumerate(values.tolist(), 1):
        if value <= procedure.level(night, passed, candidates):
            passed.append(night)
        if value <= PROMISING:
            candidates.append(night)
    return passed
