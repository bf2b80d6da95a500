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

_FEWEST_RESAMPLES = 10_000
_MOST_RESAMPLES = 1_000_000
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


def compare(before: Scores, after: Scores, level: float | None, seed: int) -> Comparison:
    """Compare one measure before and after on the same queries.

    Intervals are percentile bootstraps of the mean difference (Efron & Tibshirani, 1993, chapter
    13); p is a sign-flip permutation test (exact where all flips are fewer than the resamples).

    Args:
        before: Shape (m,), at least one query.
        after: Shape (m,).
        level: One-sided level of the look; None describes without testing.
        seed: Draws the resamples.

    Raises:
        ValueError: The shapes differ, or there is no query.
        MissingDependencyError: scipy is not installed.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"cannot pair scores of shapes {before.shape} and {after.shape}")
    deltas = _rounded(after - before)
    ci95, interval = _intervals(deltas, level, seed)
    p, p_harm = (None, None) if level is None else _sign_flips(deltas, level, seed)
    return Comparison(
        queries=len(deltas),
        before=float(before.mean()),
        after=float(after.mean()),
        delta=float(deltas.mean()),
        ci95=ci95,
        wins=int(np.count_nonzero(deltas > 0)),
        ties=int(np.count_nonzero(deltas == 0)),
        losses=int(np.count_nonzero(deltas < 0)),
        level=level,
        interval=interval,
        p=p,
        p_harm=p_harm,
    )


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


def _resamples(level: float) -> int:
    """Return enough resamples to tell p at `level`: fifty beyond it are expected at the border."""
    wanted = min(math.ceil(50 / level), _MOST_RESAMPLES)
    # (1 + 0) / (1 + resamples) is the least p that can be shown.
    return max(wanted, _FEWEST_RESAMPLES, math.ceil(1 / level))


Interval = tuple[float, float]


def _intervals(
    deltas: Scores, level: float | None, seed: int
) -> tuple[Interval | None, Interval | None]:
    if len(deltas) < 2:
        return None, None
    if np.ptp(deltas) == 0:
        same = (float(deltas[0]), float(deltas[0]))
        return same, None if level is None else same
    drawn = _stats().bootstrap(
        (deltas,),
        np.mean,
        method="percentile",
        n_resamples=_resamples(0.025 if level is None else level),
        batch=max(1, _BATCH_NUMBERS // len(deltas)),
        random_state=np.random.default_rng(seed),
    )
    means = drawn.bootstrap_distribution
    return _percentiles(means, 0.025), None if level is None else _percentiles(means, level)


def _percentiles(resampled: Scores, tail: float) -> Interval:
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _sign_flips(deltas: Scores, level: float, seed: int) -> tuple[float, float]:
    """Return the one-sided p of a gain and of a loss."""
    moved = deltas[deltas != 0]
    if len(moved) == 0:
        return 1.0, 1.0
    if len(moved) == 1:
        return (0.5, 1.0) if moved[0] > 0 else (1.0, 0.5)
    resamples = _resamples(level)
    tested = _stats().permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH_NUMBERS // len(moved)),
        random_state=np.random.default_rng(seed),
    )
    # The same flips serve the other side; an exact test has no observation to add.
    null, added = tested.null_distribution, int(2 ** len(moved) > resamples)
    tolerance = 1e-12 * float(np.abs(moved).sum())
    losing = np.count_nonzero(null <= tested.statistic + tolerance) + added
    return float(tested.pvalue), min(1.0, float(losing / (len(null) + added)))


def _stats() -> ModuleType:
    try:
        return import_module("scipy.stats")
    except ImportError as error:
        raise MissingDependencyError("scipy", "eval") from error
