"""Gains that do not depend on how an encoder crowds its vectors, on norms or on dimension."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import peers
import pytest
from made import Made, make, measure, unit
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings
from simskip_vdb.datatypes import JudgedQueries, Metric, Side, Vectors
from simskip_vdb.splits import near_identical

SEEDS = (0, 1, 2)
NOISE = 0.06
"""Within which means of three seeds' gains count as the same."""

Move = Callable[[NDArray[np.floating]], NDArray[np.floating]]


def gain(
    move: Callable[[Made], Made], folder: Path, side: Side = Side.DOCS, metric: Metric = Metric.DOT
) -> float:
    """Return the mean gain over seeds on spread sets that were moved."""
    found = []
    for seed in SEEDS:
        fit = FitSettings(seed=seed, side=side)
        made = move(make("spread", 64, seed))
        found.append(measure(made, folder / str(seed), fit=fit, metric=metric).gain)
    return float(np.mean(found))


def as_it_is(made: Made) -> Made:
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> float:
    found = gain(as_it_is, tmp_path_factory.mktemp("plain"))
    assert found > 0.1
    return found


@pytest.mark.parametrize("size", [1.0, 2.0, 3.0])
def test_a_common_direction_takes_no_gain(size: float, plain: float, tmp_path: Path) -> None:
    common = unit(np.random.default_rng(9).normal(size=(1, 64)))
    moved = gain(lambda made: made.mapped(lambda x: unit(x + size * common)), tmp_path)
    # What all queries share also lets a row be found more often by all of them, as judgments teach.
    assert plain - NOISE / 2 < moved < plain + 2 * NOISE


@pytest.mark.parametrize("power", [-0.3, 0.5])
def test_a_scaled_spectrum_changes_no_gain(power: float, plain: float, tmp_path: Path) -> None:
    def scaled(made: Made) -> Made:
        values, axes = np.linalg.eigh(np.cov(made.rows.T))
        share = np.maximum(values / values.max(), 1e-6)
        return made.mapped(lambda x: unit(x @ (axes * share ** (power / 2)) @ axes.T))

    assert abs(gain(scaled, tmp_path) - plain) < NOISE


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.EUCLID])
@pytest.mark.parametrize("size", [0.0, 2.0])
def test_norms_change_no_gain(size: float, metric: Metric, plain: float, tmp_path: Path) -> None:
    norms = np.random.default_rng(3).uniform(2, 2.5, (240, 1)).astype(np.float32)
    common = unit(np.random.default_rng(9).normal(size=(1, 64)))

    def longer(made: Made) -> Made:
        crowded = made.mapped(lambda x: unit(x + size * common))
        queries = {name: 2 * part for name, part in crowded.queries.items()}
        return Made(rows=crowded.rows * norms, queries=queries, relevant=made.relevant)

    assert gain(longer, tmp_path, metric=metric) > plain - NOISE


@pytest.mark.parametrize("dim", [128, 768])
def test_more_dimensions_change_no_gain(dim: int, plain: float, tmp_path: Path) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0][:64]
    assert abs(gain(lambda made: made.mapped(lambda x: x @ turn), tmp_path) - plain) < NOISE


@pytest.mark.parametrize("side", [Side.QUERIES, Side.BOTH])
def test_a_common_direction_changes_no_gain_of_queries(side: Side, tmp_path: Path) -> None:
    common = unit(np.random.default_rng(9).normal(size=(1, 64)))
    plain = gain(as_it_is, tmp_path / "plain", side)
    moved = gain(lambda made: made.mapped(lambda x: unit(x + 3 * common)), tmp_path / "m", side)
    assert abs(moved - plain) < NOISE


def nudged(made: Made, fit: JudgedQueries, validation: JudgedQueries) -> Vectors:
    task = peers.Task(
        vectors=made.rows,
        usable=np.ones(len(made.rows), np.bool_),
        fit=fit,
        validation=validation,
        validate=lambda moved: 0.0,
        seed=0,
    )
    return peers.nudge_n(task).rows


@pytest.mark.parametrize(
    ("kind", "dim"),
    [*product(("spread", "crowded", "skewed", "hubs"), (64, 384)), ("crowded", 1536)],
)
def test_the_default_gains_where_others_do(kind: str, dim: int, tmp_path: Path) -> None:
    found = measure(make(kind, dim), tmp_path, other=nudged)
    assert found.other > found.before + 0.05
    assert not found.refiner.is_identity
    assert found.gain > 0.5 * (found.other - found.before)


def test_growing_costs_at_most_a_fifth_where_cosines_are_crowded(tmp_path: Path) -> None:
    made = make("crowded", 64)
    fast, fair = (measure(made, tmp_path / str(flag), growing=flag) for flag in (False, True))
    assert fair.refiner.info["late_rows"]["fair"]
    assert fair.gain >= 0.8 * fast.gain


@pytest.mark.parametrize("size", [0.0, 3.0])
def test_queries_count_as_one_by_their_spread(size: float) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(60, 32))
    queries[1] = queries[0] + 0.02 * rng.normal(size=32)
    queries[3] = queries[2] + 0.2 * rng.normal(size=32)
    moved = unit(unit(queries) + size * unit(rng.normal(size=(1, 32))))
    clusters = near_identical(moved.astype(np.float32))
    assert clusters[0] == clusters[1]
    assert len(np.unique(clusters)) == len(queries) - 1
