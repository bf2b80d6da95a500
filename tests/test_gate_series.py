"""A small version of `benchmarks/gate.py`: nights of refiners that are worth nothing."""

from __future__ import annotations

import json
from pathlib import Path

import gate
import machine
import nights
import nulls
import numpy as np
import pytest
from nights import World, drawn, fixed, fresh, growing, judged, play, tilted

from simskip_vdb.datatypes import JudgedQueries

HERE = Path(gate.__file__).parent
WAYS = {
    "same": fixed(60),
    "growing": growing(40, 2),
    "fresh": fresh(60),
    "half fresh": fresh(60, 0.5),
}


def worthless(night: int) -> float:
    return 0.0


@pytest.mark.parametrize("way", WAYS)
def test_refiners_that_are_worthless_are_seldom_written(way: str) -> None:
    pool = tuple(gate.most_left_skewed(gate.real_differences()))
    world = World(pool=pool, queries=WAYS[way], candidate=worthless)
    series = [play(world, 12, [3, number]) for number in range(60)]
    assert sum(bool(one.worthless) for one in series) <= 7
    assert not any(one.useful for one in series)


def test_gains_are_written_and_earn_level_for_the_next() -> None:
    world = World(
        pool=tuple(gate.gains().values()),
        queries=fresh(200),
        candidate=lambda night: 0.05 * (1 + night // 4),
    )
    series = [play(world, 12, [5, number]) for number in range(8)]
    assert np.mean([len(one.useful) for one in series]) > 2.4


def test_harm_is_rolled_back() -> None:
    world = World(
        pool=tuple(deltas for deltas in gate.gains().values() if gate.tilts(deltas, 0.1)),
        queries=fresh(150),
        candidate=lambda night: 0.08 if night < 3 else 0.0,
        ageing=0.02,
        watched=True,
    )
    series = [play(world, 14, [7, number]) for number in range(6)]
    assert sum(bool(one.rolled_back) for one in series) >= 4
    assert all(
        one.rolled_back[0] > one.turned_harmful
        for one in series
        if one.rolled_back and one.turned_harmful is not None
    )


def test_the_same_queries_differ_alike_from_night_to_night() -> None:
    rng = np.random.default_rng(0)
    deltas, own = rng.normal(0, 0.2, 300), rng.normal(size=4000)
    one, other = (drawn(deltas, 0.02, own, judged(np.arange(4000)), rng) for _ in range(2))
    assert one.mean() == pytest.approx(0.02, abs=0.02)
    assert 0.35 < np.corrcoef(one, other)[0, 1] < 0.6


def test_tilting_gives_the_mean_and_keeps_the_support() -> None:
    deltas = np.array([-0.5, 0.0, 0.0, 0.1, 0.2, 0.9])
    for mean in (0.0, 0.05, -0.1):
        weights = tilted(deltas, mean)
        assert weights.sum() == pytest.approx(1)
        assert weights @ deltas == pytest.approx(mean, abs=1e-9)
        assert (weights > 0).all()


def test_recentring_keeps_ties() -> None:
    moved = gate.recentred(np.array([[0.0, 0.3, 0.1, 0.0], [0.2, 0.0, -0.4, 0.2]]))
    assert moved == pytest.approx(np.array([[0, 0.1, -0.1, 0], [0.2, 0, -0.4, 0.2]]))


def test_clicks_favour_what_is_live() -> None:
    assert all(deltas.mean() < 0 for deltas in nights.clicked(300))


def test_permuted_judgments_are_those_of_another_query() -> None:
    judged = JudgedQueries(
        ids=tuple("abc"),
        vectors=np.eye(3, dtype=np.float32),
        indptr=np.array([0, 1, 1, 4]),
        rows=np.array([7, 4, 5, 6]),
        grades=np.array([1, 2, 0, 1], np.int32),
    )

    def judgments(one: JudgedQueries) -> list[list[tuple[int, int]]]:
        pairs = list(zip(one.rows.tolist(), one.grades.tolist(), strict=True))
        return [pairs[a:b] for a, b in zip(one.indptr[:-1], one.indptr[1:], strict=True)]

    rng = np.random.default_rng(0)
    orders = [judgments(nulls.permuted(judged, rng)) for _ in range(20)]
    assert all(sorted(order) == sorted(judgments(judged)) for order in orders)
    assert len({json.dumps(order) for order in orders}) > 3


def test_the_page_shows_what_was_measured() -> None:
    found = json.loads((HERE / "results" / "gate.json").read_text())
    text = gate.DOCS.read_text()
    assert machine.with_table(text, "gate", gate.table(found)) == text
    null = {name: one for name, one in found["nights"].items() if name.startswith("worthless")}
    assert null
    assert all(one["ci95"][0] <= 0.05 for one in null.values())
