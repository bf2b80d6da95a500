"""Paired statistics of a measure before and after refining."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.gate import HARM_LEVEL, Comparison, LateRows

Scores = NDArray[np.float64]
Interval = tuple[float, float]

_RESAMPLES = 4_999
"""Fewest resamples of a comparison."""
_MOST_RESAMPLES = 100_000
"""Most of them; smaller p are bounded instead."""
_EXACT = 12
"""Most queries that moved of which all sign flips are gone through."""
_BATCH_NUMBERS = 1 << 21
"""Numbers drawn at once."""
_ROUNDING = 1e-12
"""Differences of one query below this are rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """A query that lost.

    Attributes:
        query: Its id.
        before: The measure before.
        after: The measure after.
        delta: After minus before, below 0.
    """

    query: str
    before: float
    after: float
    delta: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def compare(
    before: Scores,
    after: Scores,
    level: float | None,
    seed: int,
    *,
    assumed_loss: float = 0.0,
    stretch: float = 1.0,
) -> Comparison:
    """Compare one measure before and after on the same queries.

    Intervals are percentile bootstraps of the mean difference (Efron & Tibshirani, 1993, chapter
    13); p is a sign-flip test, exact for a few queries that moved and otherwise by random flips.

    Both err where most queries gain a little and few lose much, as those few may be missing from
    the test queries; the stricter the level, and the fewer they are, the more. So one more query
    may be assumed that loses, and p and `interval` are with it.

    Args:
        before: Shape (m,), at least one query.
        after: Shape (m,).
        level: One-sided level of the look; None describes without testing.
        seed: Draws the resamples.
        assumed_loss: What that query loses, as a share of the largest move (`Look.assumed_loss`).
        stretch: Take differences so many times as far from their mean, where they are correlated.

    Raises:
        ValueError: The shapes differ, or there is no query.
        MissingDependencyError: scipy is not installed.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"cannot pair scores of shapes {before.shape} and {after.shape}")
    deltas = _rounded(after - before)
    mean = float(deltas.mean())
    tested = deltas if stretch == 1 else _rounded(mean + stretch * (deltas - mean))
    p, p_harm, interval = None, None, None
    if level is not None:
        p, p_harm, interval = prove(tested, level, seed, assumed_loss=assumed_loss)
    return Comparison(
        queries=len(deltas),
        before=float(before.mean()),
        after=float(after.mean()),
        delta=mean,
        spread=float(tested.std(ddof=1)) if len(tested) > 1 else None,
        ci95=_bootstrap(tested, 0.025, seed),
        wins=int(np.count_nonzero(deltas > 0)),
        ties=int(np.count_nonzero(deltas == 0)),
        losses=int(np.count_nonzero(deltas < 0)),
        level=level,
        interval=interval,
        p=p,
        p_harm=p_harm,
    )


def prove(
    deltas: Scores, level: float, seed: int, *, assumed_loss: float = 0.0
) -> tuple[float, float, Interval | None]:
    """Return one-sided p of a gain and of a loss, and the interval of the gain where p proves one.

    Args:
        deltas: After minus before, shape (m,), at least one query.
        level: One-sided level.
        seed: Draws the resamples.
        assumed_loss: As in `compare`.
    """
    tested = np.append(deltas, -assumed_loss * np.abs(deltas).max()) if assumed_loss else deltas
    p, p_harm = _sign_flips(tested, level, seed)
    if assumed_loss:  # it speaks against a gain, not for harm
        p_harm = _sign_flips(deltas, level, seed)[1]
    # So strict a level needs many resamples, and matters only where p reaches it.
    return p, p_harm, _bootstrap(tested, level, seed) if p <= level else None


def compare_strata(
    before: Scores, after: Scores, seen: NDArray[np.bool_], seed: int
) -> dict[str, Comparison]:
    """Compare the ``seen`` and the ``unseen`` queries on their own; empty strata are left out.

    Args:
        before: Shape (m,).
        after: Shape (m,).
        seen: Shape (m,); true where a relevant row was judged relevant in the fit split.
        seed: Draws the resamples.
    """
    strata = {"seen": seen, "unseen": ~seen}
    return {
        name: compare(before[mask], after[mask], HARM_LEVEL, seed)
        for name, mask in strata.items()
        if mask.any()
    }


def worst_regressions(
    query_ids: tuple[str, ...], before: Scores, after: Scores, count: int = 10
) -> tuple[Regression, ...]:
    """Return the queries that lost most, worst first."""
    deltas = _rounded(after - before)
    worst = [int(i) for i in np.argsort(deltas, kind="stable")[:count] if deltas[i] < 0]
    return tuple(
        Regression(
            query=query_ids[i],
            before=float(before[i]),
            after=float(after[i]),
            delta=float(deltas[i]),
        )
        for i in worst
    )


def late_row_share(
    before: NDArray[np.int64], after: NDArray[np.int64], late: NDArray[np.bool_]
) -> LateRows:
    """Compare late rows' share of results before and after.

    Args:
        before: Positions found before, shape (m, 10); -1 where there is none.
        after: Positions found after, shape (m, 10).
        late: Shape (n,); rows that the fit treated as late.
    """
    shares = [
        float(late[found[found >= 0]].mean()) if (found >= 0).any() else 0.0
        for found in (before, after)
    ]
    if shares[0] > 0:
        ratio: float | None = shares[1] / shares[0]
    else:
        ratio = 1.0 if shares[1] == 0 else None
    return LateRows(before=shares[0], after=shares[1], ratio=ratio)


def _rounded(deltas: Scores) -> Scores:
    return np.where(np.abs(deltas) < _ROUNDING, 0.0, deltas)


def _bootstrap(deltas: Scores, tail: float, seed: int) -> Interval | None:
    """Return the interval of the mean with `tail` on either side; None for a single query."""
    if len(deltas) < 2:
        return None
    if np.ptp(deltas) == 0:
        return float(deltas[0]), float(deltas[0])
    found = (
        _stats()
        .bootstrap(
            (deltas,),
            np.mean,
            method="percentile",
            confidence_level=1 - 2 * tail,
            n_resamples=_resamples(tail),
            batch=max(1, _BATCH_NUMBERS // len(deltas)),
            random_state=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return float(found.low), float(found.high)


def _resamples(level: float) -> int:
    """Return enough resamples to tell p at `level`: ten beyond it are expected at the border."""
    return min(_MOST_RESAMPLES, max(_RESAMPLES, math.ceil(10 / level)))


def _sign_flips(deltas: Scores, level: float, seed: int) -> tuple[float, float]:
    """Return the one-sided p of a gain and of a loss.

    A p that `_RESAMPLES` flips show to be far above the level is reported from those. Otherwise
    as many are drawn afresh as the level needs, or, of very small ones, a bound tells. The result
    is a p-value all the same: it is at or below any t only if that of the first flips is, or,
    below their bound, that of the second.
    """
    moved = deltas[deltas != 0]
    if len(moved) == 0:
        return 1.0, 1.0
    if len(moved) <= _EXACT:
        return _all_flips(moved)
    rng = np.random.default_rng(seed)
    p, p_harm = _random_flips(moved, _RESAMPLES, rng)
    # Flips that reach the observed sum, of a p at the level, exceed this once in a million.
    reach = _stats().binom.isf(1e-6, _RESAMPLES, level)
    if _resamples(level) == _RESAMPLES or p > (reach + 1) / (_RESAMPLES + 1):
        return p, p_harm
    if 10 / level > _MOST_RESAMPLES:
        return _bound_of_flips(moved), p_harm
    return _random_flips(moved, _resamples(level), rng)


def _all_flips(moved: Scores) -> tuple[float, float]:
    if len(moved) == 1:
        return (0.5, 1.0) if moved[0] > 0 else (1.0, 0.5)
    tested = _stats().permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=np.inf,
    )
    losing = _at_most(tested.null_distribution, moved)
    return float(tested.pvalue), losing / len(tested.null_distribution)


def _random_flips(moved: Scores, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    def total(kept: NDArray[np.int8], axis: int) -> Scores:
        return (2 * kept - 1) @ moved  # (batch,)

    tested = _stats().monte_carlo_test(
        np.ones(len(moved), np.int8),
        lambda size: rng.integers(0, 2, size, np.int8),
        total,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH_NUMBERS // len(moved)),
        alternative="greater",
    )
    # The same flips serve the other side.
    losing = _at_most(tested.null_distribution, moved)
    return float(tested.pvalue), (1 + losing) / (1 + resamples)


def _bound_of_flips(moved: Scores) -> float:
    """Return a bound on the share of all sign flips whose sum reaches that of the differences.

    Chernoff's: the least of E[exp(s S)] exp(-s t) over s, with S the sum of random flips and t the
    sum that was found. It holds with ties, too, where approximations err.
    """
    from scipy.optimize import minimize_scalar

    total, sizes = float(moved.sum()), np.abs(moved)
    if total <= 0:
        return 1.0

    def exponent(slope: float) -> float:
        steps = slope * sizes
        return float((np.logaddexp(steps, -steps) - math.log(2)).sum() - slope * total)

    most = 50.0 / sizes.max()
    found = minimize_scalar(exponent, bounds=(0.0, most), method="bounded")
    return min(1.0, math.exp(min(0.0, float(found.fun))))


def _at_most(null: Scores, moved: Scores) -> int:
    tolerance = 1e-12 * float(np.abs(moved).sum())
    return int(np.count_nonzero(null <= moved.sum() + tolerance))


def _stats() -> ModuleType:
    try:
        return import_module("scipy.stats")
    except ImportError as error:
        raise MissingDependencyError("scipy", "eval") from error
