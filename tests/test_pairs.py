from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from simskip_vdb import pairs as pairs_module
from simskip_vdb.datatypes import JudgedQueries, Vectors
from simskip_vdb.errors import DataError
from simskip_vdb.pairs import Targets, group_pairs, judged_pairs, nearest, neighbour_pairs


def vectors_of(rng: np.random.Generator, n: int, dim: int = 6) -> Vectors:
    return rng.normal(size=(n, dim)).astype(np.float32)


def judged(rng: np.random.Generator, judgments: list[list[tuple[int, int]]]) -> JudgedQueries:
    flat = [pair for one in judgments for pair in one]
    return JudgedQueries(
        ids=tuple(f"q{i}" for i in range(len(judgments))),
        vectors=vectors_of(rng, len(judgments)),
        indptr=np.concatenate([[0], np.cumsum([len(one) for one in judgments])]).astype(np.int64),
        rows=np.array([row for row, _ in flat], dtype=np.int64),
        grades=np.array([grade for _, grade in flat], dtype=np.int32),
    )


def places(columns: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    column_of = np.full(n, -1, dtype=np.int64)
    column_of[columns] = np.arange(len(columns))
    return column_of


def as_rows(targets: Targets, columns: NDArray[np.int64]) -> dict[tuple[int, int], float]:
    found = zip(targets.anchor, columns[targets.column], targets.weight, strict=True)
    return {(int(anchor), int(row)): float(weight) for anchor, row, weight in found}


def test_judged_pairs_keep_relevant_usable_rows_weighted_by_grade(
    rng: np.random.Generator,
) -> None:
    queries = judged(rng, [[(3, 2), (5, 0), (7, 1), (8, 1)], [], [(7, 1), (9, 2)], [(1, 0)]])
    usable = np.ones(10, dtype=np.bool_)
    usable[9] = False
    pairs = judged_pairs(queries, usable)
    assert pairs.anchors.tolist() == [0, 2]
    assert pairs.rows_with_anchors().tolist() == [3, 7, 8]

    columns = np.array([2, 3, 7, 8])
    targets = pairs.targets(np.array([2, 0]), columns, places(columns, 10))
    assert as_rows(targets, columns) == {(0, 7): 1.0, (1, 3): 0.5, (1, 7): 0.25, (1, 8): 0.25}
    assert targets.own.tolist() == [-1, -1]


def test_targets_leave_out_rows_that_are_no_column(rng: np.random.Generator) -> None:
    pairs = judged_pairs(judged(rng, [[(3, 2), (7, 1)]]), np.ones(10, dtype=np.bool_))
    columns = np.array([1, 7])
    targets = pairs.targets(np.array([0]), columns, places(columns, 10))
    assert as_rows(targets, columns) == {(0, 7): 1.0}


def test_draw_returns_a_positive_of_each_anchor(rng: np.random.Generator) -> None:
    pairs = judged_pairs(judged(rng, [[(3, 2), (7, 1)], [(4, 1)]]), np.ones(10, dtype=np.bool_))
    drawn = np.array([pairs.draw(np.array([1, 0]), rng) for _ in range(50)])
    assert set(drawn[:, 0]) == {4}
    assert set(drawn[:, 1]) == {3, 7}


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_queries_without_a_direction_are_no_anchors(
    rng: np.random.Generator, broken: float
) -> None:
    queries = judged(rng, [[(3, 1)], [(4, 1)]])
    queries.vectors[0] = broken
    assert judged_pairs(queries, np.ones(5, dtype=np.bool_)).anchors.tolist() == [1]


def test_judgments_without_a_relevant_row_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="check ids and grades"):
        judged_pairs(judged(rng, [[(3, 0)]]), np.ones(5, dtype=np.bool_))


def test_group_pairs_are_the_other_rows_of_the_group(rng: np.random.Generator) -> None:
    groups = np.array([4, 9, 4, -1, 9, 4, 7, 9])
    usable = np.ones(8, dtype=np.bool_)
    usable[7] = False
    pairs = group_pairs(vectors_of(rng, 8), groups, usable)
    assert pairs.anchors.tolist() == [0, 1, 2, 4, 5]

    columns = np.array([0, 1, 2, 3, 5, 6])
    targets = pairs.targets(np.array([2, 4]), columns, places(columns, 8))
    assert as_rows(targets, columns) == {(0, 0): 0.5, (0, 5): 0.5, (1, 1): 1.0}
    assert targets.own.tolist() == [2, -1]

    drawn = np.array([pairs.draw(pairs.anchors, rng) for _ in range(50)])
    assert (drawn != pairs.anchors).all()
    assert (groups[drawn] == groups[pairs.anchors]).all()
    assert set(drawn[:, 0]) == {2, 5}


def test_groups_of_one_row_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="no group has two rows"):
        group_pairs(vectors_of(rng, 3), np.array([0, 1, -1]), np.ones(3, dtype=np.bool_))


def test_neighbours_are_the_nearest_other_rows(rng: np.random.Generator) -> None:
    vectors = vectors_of(rng, 30)
    rows = np.arange(2, 30)
    anchors = np.array([2, 11, 29])
    pairs = neighbour_pairs(vectors, rows, anchors, k=3, device="cpu")
    assert pairs.anchors.tolist() == anchors.tolist()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for anchor in anchors:
        ranked = sorted(set(rows) - {anchor}, key=lambda row: -float(unit[row] @ unit[anchor]))
        listed = pairs.rows[pairs.indptr[anchor] : pairs.indptr[anchor + 1]]
        assert listed.tolist() == ranked[:3]


def test_equal_vectors_still_have_neighbours_other_than_themselves() -> None:
    vectors = np.ones((12, 4), dtype=np.float32)
    pairs = neighbour_pairs(vectors, np.arange(12), np.arange(12), k=2, device="cpu")
    assert (np.diff(pairs.indptr) == 2).all()
    assert (pairs.rows != np.repeat(np.arange(12), 2)).all()


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_nearest_equals_a_full_sort(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setitem(pairs_module.SEARCHED, "cpu", (block, block))
    vectors, queries = 5 * vectors_of(rng, 25), vectors_of(rng, 8)
    rows = np.flatnonzero(rng.random(25) < 0.7)
    unit = vectors[rows] / np.linalg.norm(vectors[rows], axis=1, keepdims=True)
    expected = rows[np.argsort(-(queries @ unit.T), axis=1)[:, :6]]
    assert nearest(queries, vectors, rows, k=6, device="cpu").tolist() == expected.tolist()
    assert nearest(queries, vectors, rows[:4], k=6, device="cpu").shape == (8, 4)
