from __future__ import annotations

import itertools
import json
import sys
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.gate import Decision, Evidence, Look, decide
from simskip_vdb.ledger import FIRST_LEVEL, PROMISING, WEALTH, share
from simskip_vdb.statistics import (
    _bound_of_flips,
    compare,
    compare_strata,
    late_row_share,
    prove,
    worst_regressions,
)

Scores = NDArray[np.float64]
FIRST = FIRST_LEVEL


def level_of(look: int) -> float:
    return (1 - PROMISING) * WEALTH * share(look)


def exact_p(deltas: list[float]) -> tuple[float, float]:
    """Go through all sign flips in a loop."""
    observed = sum(deltas)
    sums = [
        sum(sign * abs(d) for sign, d in zip(signs, deltas, strict=True))
        for signs in itertools.product((1, -1), repeat=len(deltas))
    ]
    gain = sum(s >= observed - 1e-9 for s in sums) / len(sums)
    harm = sum(s <= observed + 1e-9 for s in sums) / len(sums)
    return gain, harm


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_equals_a_loop_over_all_sign_flips(eighths: list[int]) -> None:
    deltas = np.array(eighths) / 8
    found = compare(np.zeros(len(deltas)), deltas, FIRST, 0)
    assert (found.p, found.p_harm) == pytest.approx(exact_p(deltas.tolist()))


def test_means_and_counts() -> None:
    found = compare(np.array([0.1, 0.5, 0.5, 1.0]), np.array([0.4, 0.5, 0.3, 1.0]), FIRST, 0)
    assert (found.queries, found.wins, found.ties, found.losses) == (4, 1, 2, 1)
    assert found.before == pytest.approx(0.525)
    assert found.after == pytest.approx(0.55)
    assert found.delta == pytest.approx(0.025)


def test_rounding_is_a_tie() -> None:
    found = compare(np.array([0.1 + 0.2, 0.5]), np.array([0.3, 0.5]), FIRST, 0)
    assert (found.wins, found.ties, found.losses, found.delta) == (0, 2, 0, 0.0)


def test_intervals_agree_with_the_normal_approximation() -> None:
    deltas = np.random.default_rng(0).normal(0.05, 0.2, 400)
    found = compare(np.zeros(400), deltas, FIRST, 0)
    error = deltas.std() / np.sqrt(400)
    assert found.ci95 is not None
    assert found.interval is not None
    for (low, high), z in ((found.ci95, 1.95996), (found.interval, 2.24140)):
        assert low == pytest.approx(deltas.mean() - z * error, abs=0.1 * error)
        assert high == pytest.approx(deltas.mean() + z * error, abs=0.1 * error)


def test_described_measures_get_no_p() -> None:
    found = compare(np.zeros(50), np.random.default_rng(0).random(50), None, 0)
    assert (found.level, found.interval, found.p, found.p_harm) == (None, None, None, None)
    assert found.ci95 is not None


def test_same_seed_gives_the_same_and_order_of_queries_hardly_matters() -> None:
    before, after = np.random.default_rng(0).random((2, 60))
    assert compare(before, after, FIRST, 3) == compare(before, after, FIRST, 3)
    assert compare(before, after, FIRST, 3) != compare(before, after, FIRST, 4)


@pytest.mark.parametrize("change", [0.0, 0.25, -0.25])
def test_equal_deltas(change: float) -> None:
    found = compare(np.full(40, 0.5), np.full(40, 0.5) + change, FIRST, 0)
    assert found.ci95 == (change, change)
    assert found.interval == ((change, change) if change > 0 else None)
    assert found.p is not None
    assert found.p_harm is not None
    if change == 0:
        assert (found.p, found.p_harm) == (1, 1)
    else:
        assert min(found.p, found.p_harm) < 1e-3
        assert (found.p < found.p_harm) is (change > 0)


def test_one_query_has_no_interval() -> None:
    found = compare(np.array([0.2]), np.array([0.7]), FIRST, 0)
    assert (found.ci95, found.interval, found.p, found.p_harm) == (None, None, 0.5, 1.0)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("shapes", [(0, 0), (3, 4)])
def test_unpaired_scores_are_an_error(shapes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot pair"):
        compare(np.zeros(shapes[0]), np.zeros(shapes[1]), FIRST, 0)


def test_resamples_grow_with_the_look() -> None:
    deltas = np.full(60, 0.1) + np.random.default_rng(0).normal(0, 0.01, 60)
    for look in (1, 5, 12):
        found = compare(np.zeros(60), deltas, level_of(look), 0)
        assert found.p is not None
        assert found.p <= level_of(look) / 10


def test_later_looks_assume_a_loss_that_the_test_queries_miss() -> None:
    # Thirty queries gain a little. One loss of the same size leaves p at 2^-30 of a few flips,
    # so that only the interval and p of what was assumed tell the looks apart.
    deltas = np.array([0.02] * 15 + [0.04] * 14 + [0.4])
    first, later = (
        compare(np.zeros(30), deltas, level_of(look), 0, assumed_loss=float(look > 1))
        for look in (1, 2)
    )
    assumed = compare(np.zeros(31), np.append(deltas, -0.4), level_of(1), 0)
    assert (first.queries, later.queries, first.delta) == (30, 30, later.delta)
    assert first.p is not None
    assert first.p <= level_of(2)
    assert later.p == assumed.p
    assert later.p is not None
    assert later.p > level_of(2)


def test_p_that_is_far_from_the_level_is_that_of_the_first_flips() -> None:
    deltas = np.random.default_rng(4).normal(0.01, 0.2, 60)
    far = [compare(np.zeros(60), deltas, level_of(look), 0) for look in (2, 30)]
    assert far[0].p == far[1].p
    assert far[1].interval is None


def test_p_of_random_flips_agrees_with_all_flips() -> None:
    eighths = [3, 2, 2, 1, 1, 1, 4, -1, -2, 3, 1, 2, -1, 2]
    found = compare(np.zeros(14), np.array(eighths) / 8, FIRST, 0)
    assert (found.p, found.p_harm) == pytest.approx(exact_p([e / 8 for e in eighths]), abs=0.01)


def test_scipy_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[eval\]"):
        compare(np.zeros(3), np.arange(3.0), FIRST, 0)


def test_strata_hold_their_own_queries_and_empty_ones_are_left_out() -> None:
    before, after = np.zeros(4), np.array([1.0, 1.0, 1.0, -1.0])
    strata = compare_strata(before, after, np.array([True, True, True, False]), 0)
    assert {name: (c.queries, c.delta) for name, c in strata.items()} == {
        "seen": (3, 1.0),
        "unseen": (1, -1.0),
    }
    assert set(compare_strata(before, after, np.ones(4, np.bool_), 0)) == {"seen"}


def test_worst_regressions_come_worst_first_and_gains_never() -> None:
    ids = tuple(f"q{i}" for i in range(20))
    after = np.linspace(-0.9, 1.0, 20)
    worst = worst_regressions(ids, np.zeros(20), after)
    assert [r.query for r in worst] == [f"q{i}" for i in range(9)]
    assert worst[0].to_dict() == {
        "query": "q0",
        "before": 0.0,
        "after": -0.9,
        "delta": -0.9,
    }
    assert len(worst_regressions(ids, np.ones(20), after)) == 10


@pytest.mark.parametrize(("before", "after", "expected"), [
    ([[0, 1], [2, 3]], [[0, 1], [0, 3]], (0.25, 0.5, 2.0)),
    ([[0, 1], [2, -1]], [[1, 2], [3, -1]], (1 / 3, 0.0, 0.0)),
    ([[1, 3]], [[3, 1]], (0.0, 0.0, 1.0)),
    ([[1, 3]], [[0, 1]], (0.0, 0.5, None)),
    ([[-1, -1]], [[-1, -1]], (0.0, 0.0, 1.0)),
])  # fmt: skip
def test_share_of_late_rows(
    before: list[list[int]], after: list[list[int]], expected: tuple[float, float, float | None]
) -> None:
    late = np.array([True, False, False, False])
    found = late_row_share(np.array(before), np.array(after), late)
    assert (found.before, found.after, found.ratio) == expected


def decide_at(look: int, before: Scores, after: Scores) -> Decision:
    level = level_of(look)
    chosen = compare(before, after, level, look, assumed_loss=float(look > 1))
    taken = Look(number=look, level=level, next_level=level_of(look + 1), proven=0, seed=look)
    return decide(Evidence(measure="nDCG@10", look=taken, chosen=chosen))


def test_series_of_looks_rarely_pass_without_an_effect() -> None:
    # Scores are skewed and tied as nDCG@10 is; before and after are exchangeable.
    rng = np.random.default_rng(7)
    series, looks, passed = 200, 3, 0
    for _ in range(series):
        level = rng.random(50) ** 2
        for look in range(1, looks + 1):
            pair = np.clip(level + rng.normal(0, 0.15, (2, 50)), 0, 1)
            # No gate passes a loss; leaving losses out halves the time.
            if pair[1].mean() > pair[0].mean() and decide_at(look, pair[0], pair[1]).passed:
                passed += 1
                break
    # A gate that let p <= .05 through at every look would pass about one series in eight.
    assert passed <= 0.05 * series


def test_a_gain_of_three_points_over_200_queries_is_mostly_found() -> None:
    rng = np.random.default_rng(11)
    passed = 0
    for _ in range(40):
        before = rng.random(200) ** 2
        gain = np.where(rng.random(200) < 0.5, rng.normal(0.06, 0.15, 200), 0.0)
        passed += decide_at(1, before, np.clip(before + gain, -1, 2)).passed
    assert passed >= 36


def test_the_bound_of_small_p_holds_with_ties_and_is_near() -> None:
    for positive in range(11, 17):
        moved = np.array([0.5] * positive + [-0.5] * (16 - positive))
        exact = sum(comb(16, k) for k in range(positive, 17)) / 2**16
        assert exact * (1 - 1e-9) <= _bound_of_flips(moved) <= 4 * exact
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = rng.normal(0.3, 0.4, 14)
        signs = np.array(list(itertools.product((-1, 1), repeat=14)))
        exact = float(np.mean(signs @ np.abs(moved) >= moved.sum() - 1e-12))
        assert exact * (1 - 1e-9) <= _bound_of_flips(moved)
    assert _bound_of_flips(np.array([-1.0, 0.5])) == 1.0
    assert 0 < _bound_of_flips(np.full(40, 0.1)) <= 1e-11


def test_an_assumed_loss_is_no_evidence_of_harm() -> None:
    moved = np.array([-0.2] * 6 + [0.0] * 60)
    plain, assumed = (prove(moved, 0.0117, 0, assumed_loss=loss) for loss in (0.0, 1.0))
    assert assumed[1] == plain[1]
    assert assumed[0] >= plain[0]
