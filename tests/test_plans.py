from __future__ import annotations

import numpy as np
import pytest

from simskip_vdb.config import Signal
from simskip_vdb.datatypes import Metric, Side
from simskip_vdb.plans import IDENTITY, Fitted, Plan, candidates
from simskip_vdb.refiner import Refiner

DIM, ROWS = 12, 6


def test_moved_weighs_both_parts() -> None:
    rng = np.random.default_rng(1)
    layers = tuple(
        (rng.normal(size=(DIM, DIM)).astype(np.float32), np.zeros(DIM, np.float32))
        for _ in range(3)
    )
    whole = Refiner(
        dim=DIM,
        side=Side.DOCS,
        metric=Metric.COSINE,
        alpha=1.0,
        beta=1.0,
        layers=layers,
        offset_ids=np.arange(ROWS),
        offsets=rng.normal(size=(ROWS, DIM)).astype(np.float32),
    )
    fit = Fitted(whole=whole, plan=IDENTITY, trials=(), signal=Signal.JUDGED)
    moved = fit.moved(Plan(alpha=0.5, beta=0.75))
    assert (moved.alpha, moved.beta) == (0.5, 0.75)
    assert np.array_equal(moved.offsets, whole.offsets)
    assert fit.refiner.is_identity


@pytest.mark.parametrize("signal", list(Signal))
def test_candidates_start_from_the_identity_and_differ(signal: Signal) -> None:
    plans = candidates(signal, Side.DOCS)
    assert plans[0] == IDENTITY
    assert len(set(plans)) == len(plans)
    assert any(plan.beta < plan.alpha for plan in plans) == (signal is Signal.JUDGED)
