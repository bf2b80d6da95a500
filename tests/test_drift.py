"""Drift: alarms rarely where nothing drifts, and surely where much does."""

from __future__ import annotations

import numpy as np
import pytest

from simskip_vdb.datatypes import Vectors
from simskip_vdb.drift import FALSE_ALARMS, FEWEST, SAMPLE, drift_level, measure_drift


def unit(rng: np.random.Generator, n: int, shift: float = 0.0, dim: int = 24) -> Vectors:
    x = rng.normal(size=(n, dim))
    x[:, 0] += shift
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def test_the_levels_of_all_tests_together_are_the_false_alarm_rate() -> None:
    assert sum(drift_level(k) for k in range(1, 100_000)) == pytest.approx(FALSE_ALARMS, rel=1e-4)


def test_the_statistic_is_the_energy_distance_of_directions() -> None:
    rng = np.random.default_rng(0)
    x, y = unit(rng, 30) * 3.0, unit(rng, 25, 1.0)
    found = measure_drift(np.asarray(x, np.float32), y, test=1, seed=0)
    assert found is not None
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.linalg.norm(p - q) for q in b] for p in a]))

    assert found.statistic == pytest.approx(2 * mean(u, v) - mean(u, u) - mean(v, v), rel=1e-4)
    assert (found.reference, found.recent) == (30, 25)


@pytest.mark.parametrize("test", [1, 2])
def test_false_alarms_are_as_rare_as_the_level_says(test: int) -> None:
    alarms, series = 0, 400
    for seed in range(series):
        rng = np.random.default_rng(seed)
        found = measure_drift(unit(rng, 40), unit(rng, 25), test=test, seed=seed)
        assert found is not None
        alarms += found.alarm
    # Of so many tests at this level, more happen less than once in ten thousand times.
    expected = drift_level(test) * series
    assert alarms <= expected + 4 * expected**0.5 + 2


def test_a_shift_that_matters_is_found_on_the_thirtieth_night_too() -> None:
    rng = np.random.default_rng(3)
    found = measure_drift(unit(rng, 500), unit(rng, 300, 1.5), test=30, seed=3)
    assert found is not None
    assert found.alarm
    assert found.p <= found.level == drift_level(30)
    assert (found.reference, found.recent) == (SAMPLE, SAMPLE)


def test_too_few_vectors_are_not_tested() -> None:
    rng = np.random.default_rng(4)
    assert measure_drift(unit(rng, 500), unit(rng, FEWEST - 1), test=1, seed=0) is None


def test_norms_do_not_count_as_drift() -> None:
    rng = np.random.default_rng(5)
    x = unit(rng, 100)
    found = measure_drift(x[:50], x[50:] * 40, test=1, seed=0)
    same = measure_drift(x[:50], x[50:], test=1, seed=0)
    assert found is not None
    assert same is not None
    assert found.p == same.p
