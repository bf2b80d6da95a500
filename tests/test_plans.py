from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simskip_vdb.config import Signal
from simskip_vdb.datatypes import Metric, Side, Vectors
from simskip_vdb.plans import IDENTITY, SHARED, Fitted, Plan, candidates, shared_directions
from simskip_vdb.refiner import Refiner

DIM, QUERIES, ROWS = 12, 40, 6


@pytest.fixture
def queries() -> Vectors:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(QUERIES, DIM)) + 3 * rng.normal(size=DIM)).astype(np.float32)


def whole() -> Refiner:
    rng = np.random.default_rng(1)
    layers = tuple(
        (rng.normal(size=(DIM, DIM)).astype(np.float32), np.zeros(DIM, np.float32))
        for _ in range(3)
    )
    offsets = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    return Refiner(
        dim=DIM,
        side=Side.DOCS,
        metric=Metric.COSINE,
        alpha=1.0,
        beta=1.0,
        layers=layers,
        offset_ids=np.arange(ROWS),
        offsets=offsets,
    )


def fitted(queries: Vectors | None) -> Fitted:
    shared = shared_directions(queries, DIM)
    return Fitted(whole=whole(), shared=shared, plan=IDENTITY, trials=(), signal=Signal.JUDGED)


def test_shared_directions_hold_what_queries_have_in_common(queries: Vectors) -> None:
    shared = shared_directions(queries, DIM)
    assert shared.shape == (SHARED, DIM)
    assert shared.dtype == np.float32
    assert shared @ shared.T == pytest.approx(np.eye(SHARED), abs=1e-6)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    assert np.linalg.norm(shared @ mean) > 0.99 * np.linalg.norm(mean)
    kept, largest = np.square(unit @ shared.T).sum(), np.linalg.svd(unit)[1][:SHARED]
    assert kept == pytest.approx(np.square(largest).sum(), rel=1e-5)


def test_broken_queries_share_nothing(queries: Vectors) -> None:
    broken = np.zeros((2, DIM), np.float32)
    broken[1, 0] = np.nan
    expected = shared_directions(queries, DIM)
    found = shared_directions(np.concatenate([broken, queries]), DIM)
    assert found == pytest.approx(expected)
    assert shared_directions(None, DIM).shape == (0, DIM)
    assert shared_directions(queries[:0], DIM).shape == (0, DIM)


def test_own_offsets_leave_shared_directions_alone(queries: Vectors) -> None:
    fit = fitted(queries)
    plan = Plan(alpha=0.5, beta=0.75)
    every, own = fit.moved(plan), fit.moved(replace(plan, own=True))
    assert (own.alpha, own.beta) == (every.alpha, every.beta) == (0.5, 0.75)
    assert np.array_equal(every.offsets, fit.whole.offsets)
    assert own.offsets @ fit.shared.T == pytest.approx(np.zeros((ROWS, SHARED)), abs=1e-5)
    left_out = every.offsets - own.offsets
    assert left_out @ fit.shared.T @ fit.shared == pytest.approx(left_out, abs=1e-5)
    without = fitted(None).moved(replace(plan, own=True))
    assert np.array_equal(without.offsets, fit.whole.offsets)


@pytest.mark.parametrize("signal", list(Signal))
def test_candidates_start_from_the_identity_and_differ(signal: Signal) -> None:
    plans = candidates(signal)
    assert plans[0] == IDENTITY
    assert len(set(plans)) == len(plans)
    assert any(plan.own for plan in plans) == (signal is Signal.JUDGED)
