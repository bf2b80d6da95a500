"""A small version of `benchmarks/gate.py`: looks at refiners that are worth nothing."""

from __future__ import annotations

import json
from pathlib import Path

import gate
import machine
import nulls
import numpy as np
import pytest
from gate import NIGHTS, fresh_queries, play, recentred, same_queries, tilted

from simskip_vdb.datatypes import JudgedQueries

HERE = Path(gate.__file__).parent


def ever_passed(draw: gate.Draw, series: int) -> int:
    return sum(play(draw, [3, number]) for number in range(series))


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], gate.Scores]:
    return nulls.read(HERE / "results" / "gate_challengers.jsonl")


def test_nightly_looks_at_the_same_queries(known: dict[tuple[str, str], gate.Scores]) -> None:
    pools = [recentred(deltas) for deltas in known.values() if len(deltas) >= NIGHTS]
    # Looks at p <= .05 without spending would pass more than a third of these.
    assert ever_passed(same_queries(pools, 12, 50), 60) <= 3


def test_few_that_lose_much_and_are_seldom_among_the_test_queries() -> None:
    skewed = gate.most_left_skewed(gate.real_differences())
    assert ever_passed(fresh_queries(skewed, 12, 40), 100) <= 5


def test_tiny_sets() -> None:
    assert ever_passed(fresh_queries(gate.real_differences(), 4, 30), 200) <= 10


def test_tilting_gives_the_mean_and_keeps_the_support() -> None:
    deltas = np.array([-0.5, 0.0, 0.0, 0.1, 0.2, 0.9])
    for mean in (0.0, 0.05, -0.1):
        weights = tilted(deltas, mean)
        assert weights.sum() == pytest.approx(1)
        assert weights @ deltas == pytest.approx(mean, abs=1e-9)
        assert (weights > 0).all()


def test_recentring_keeps_ties() -> None:
    moved = recentred(np.array([[0.0, 0.3, 0.1, 0.0], [0.2, 0.0, -0.4, 0.2]]))
    assert moved == pytest.approx(np.array([[0, 0.1, -0.1, 0], [0.2, 0, -0.4, 0.2]]))


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
    assert all(one["rate"] <= 0.05 for one in found["null"].values())
