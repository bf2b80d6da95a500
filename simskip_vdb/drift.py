"""Tell whether vectors that came since a fit are distributed as those it saw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Positions, Vectors

FALSE_ALARMS = 0.05
"""Chance that all tests since a fit together ever alarm where nothing drifts."""
SAMPLE = 200
"""Most vectors of each side; their distances are what a test costs."""
FEWEST = 20
"""Fewest vectors of a side that are tested."""
_BLOCK = 4096  # permutations at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Outcome of one test.

    Attributes:
        statistic: Energy distance of the two samples' directions, at least 0.
        p: Share of permutations with at least that distance.
        level: Alarm at or below it.
        alarm: Whether they differ.
        reference: Vectors of the earlier sample.
        recent: Vectors of the later one.
    """

    statistic: float
    p: float
    level: float
    alarm: bool
    reference: int
    recent: int


def drift_level(test: int) -> float:
    """Return the level of the k-th test since a fit: .05/(k(k+1)), which sum to .05 over all k."""
    return FALSE_ALARMS / (test * (test + 1))


def measure_drift(reference: Vectors, recent: Vectors, *, test: int, seed: int) -> Drift | None:
    """Compare two samples by a permutation test of the energy distance between directions.

    Source: Székely & Rizzo, Energy statistics, Journal of Statistical Planning and Inference 143
    (2013), equation 6.1. Under the hypothesis that both come from one distribution all ways to
    share the vectors out are equally likely, so the test holds its level in any dimension.

    Args:
        reference: Shape (n, d), no zero vectors.
        recent: Shape (m, d).
        test: Which test since the fit it is, from 1.
        seed: Of the samples and permutations.

    Returns:
        None where one side has fewer than `FEWEST` vectors.
    """
    rng = np.random.default_rng((seed, test))
    x, y = _sample(reference, rng), _sample(recent, rng)
    if min(len(x), len(y)) < FEWEST:
        return None
    distances = _distances(np.concatenate([x, y]))
    # zᵀDz with z = 1/n on one side and -1/m on the other is minus the energy distance.
    signs = np.concatenate([np.full(len(x), 1 / len(x)), np.full(len(y), -1 / len(y))])
    statistic = float(-(signs @ distances @ signs))
    level = drift_level(test)
    permutations = max(999, math.ceil(2 / level))
    as_far, tolerance = 0, 1e-12 * max(1.0, abs(statistic))
    for start in range(0, permutations, _BLOCK):
        drawn = np.tile(signs, (min(_BLOCK, permutations - start), 1))
        drawn = rng.permuted(drawn, axis=1)  # (b, n + m)
        found = -np.einsum("bi,bi->b", drawn @ distances, drawn)
        as_far += int((found >= statistic - tolerance).sum())
    p = (1 + as_far) / (1 + permutations)
    return Drift(
        statistic=max(0.0, statistic),
        p=p,
        level=level,
        alarm=p <= level,
        reference=len(x),
        recent=len(y),
    )


def sampled(count: int, rng: np.random.Generator) -> Positions:
    """Return positions of at most `SAMPLE` of this many vectors, ascending."""
    if count <= SAMPLE:
        return np.arange(count)
    return np.sort(rng.choice(count, SAMPLE, replace=False))


def _sample(vectors: Vectors, rng: np.random.Generator) -> NDArray[np.float64]:
    chosen = vectors[sampled(len(vectors), rng)].astype(np.float64)
    return np.asarray(chosen / np.linalg.norm(chosen, axis=1, keepdims=True))


def _distances(x: NDArray[np.float64]) -> NDArray[np.float64]:
    squared = np.maximum(0, 2 - 2 * (x @ x.T))
    np.fill_diagonal(squared, 0)
    return np.asarray(np.sqrt(squared))
