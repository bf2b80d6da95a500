from __future__ import annotations

import math

import numpy as np
import pytest

from simskip_vdb.harm import FALSE_ALARM, HarmWatch


def by_hand(gains: list[float]) -> tuple[float, bool]:
    """The wealth of aGRAPA bets on losses, one query at a time."""
    wealth, harmful, total, squares = 1.0, False, 0.0, 0.04
    for count, gain in enumerate(gains):
        mean, second = -total / (count + 1), squares / (count + 1)
        wealth *= 1 + min(max(mean / second, 0.0), 0.75) * -gain
        total, squares = total + gain, squares + gain**2
        harmful |= wealth >= 1 / FALSE_ALARM
    return wealth, harmful


@pytest.mark.parametrize("size", [1, 7, 100])
def test_wealth_is_the_same_in_any_batches(size: int) -> None:
    gains = np.random.default_rng(2).normal(-0.05, 0.2, 300).clip(-1, 1)
    watch = HarmWatch(refiner="r")
    for start in range(0, len(gains), size):
        watch = watch.seeing(gains[start : start + size])
    wealth, harmful = by_hand(gains.tolist())
    assert watch.log_wealth == pytest.approx(math.log(wealth))
    assert watch.harmful is harmful
    assert watch.queries == 300
    assert watch.mean == pytest.approx(gains.mean())
    assert watch.p == pytest.approx(min(1, 1 / wealth))


def test_harm_is_found_and_its_absence_seldom_called_so() -> None:
    rng = np.random.default_rng(0)

    def alarms(mean: float, series: int = 400) -> int:
        # Most queries gain a little and few lose much, as is hardest.
        loss = rng.random((series, 600)) < 0.05
        gains = np.where(loss, -0.6, 0.6 * 0.05 / 0.95) + mean
        return sum(HarmWatch(refiner="r").seeing(one).harmful for one in gains)

    assert alarms(0.0) <= 0.05 * 400 + 9
    assert alarms(0.01) <= 4
    assert alarms(-0.05) >= 390


def test_harm_once_proven_stays_proven() -> None:
    watch = HarmWatch(refiner="r").seeing(np.full(60, -0.5))
    assert watch.harmful
    assert watch.seeing(np.full(200, 0.5)).harmful


def test_nothing_seen_says_nothing() -> None:
    watch = HarmWatch(refiner="r").seeing(np.empty(0))
    assert watch.to_dict() == {
        "refiner": "r",
        "queries": 0,
        "gain": None,
        "p": 1.0,
        "harmful": False,
    }


def test_gains_beyond_one_are_an_error() -> None:
    with pytest.raises(ValueError, match="between -1 and 1"):
        HarmWatch(refiner="r").seeing(np.array([0.1, 1.5]))
    with pytest.raises(ValueError, match="between -1 and 1"):
        HarmWatch(refiner="r").seeing(np.array([np.nan]))
