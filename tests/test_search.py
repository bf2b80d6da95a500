from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from simskip_vdb import search
from simskip_vdb.datatypes import Metric, Neighbors, Vectors
from simskip_vdb.search import exact_search, pair_scores

METRICS = list(Metric)


def blocks(rows: Vectors, size: int) -> Iterator[tuple[int, Vectors]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def slow_score(query: Vectors, row: Vectors, metric: Metric) -> float:
    q, r = [float(x) for x in query], [float(x) for x in row]
    if metric is Metric.EUCLID:
        return -sum((a - b) ** 2 for a, b in zip(q, r, strict=True))
    dot = sum(a * b for a, b in zip(q, r, strict=True))
    if metric is Metric.DOT:
        return dot
    return dot / math.sqrt(sum(a * a for a in q) * sum(b * b for b in r))


def slow_search(queries: Vectors, rows: Vectors, k: int, metric: Metric) -> Neighbors:
    ids = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for i, query in enumerate(queries):
        found = []
        for j, row in enumerate(rows):
            if not np.isfinite(row).all() or (metric is Metric.COSINE and not row.any()):
                continue
            found.append((-slow_score(query, row, metric), j))
        for rank, (negative, j) in enumerate(sorted(found)[:k]):
            ids[i, rank], scores[i, rank] = j, -negative
    return Neighbors(ids=ids, scores=scores)


def random(seed: int, *shape: int) -> Vectors:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "size"), [(200, 10, 64), (200, 10, 1), (30, 50, 7), (1, 1, 1)])
def test_finds_what_a_loop_finds(metric: Metric, n: int, k: int, size: int) -> None:
    queries, rows = random(0, 5, 12), random(1, n, 12)
    found, expected = (
        exact_search(queries, blocks(rows, size), k, metric),
        slow_search(queries, rows, k, metric),
    )
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    assert found.ids.dtype == np.int64
    assert found.scores.dtype == np.float32


# Small integers make ties, zero rows and duplicates common, and every sum exact.
small = st.integers(-2, 2)


@st.composite
def cases(draw: Any) -> tuple[Vectors, Vectors, int, int, Metric]:  # noqa: ANN401
    dim = draw(st.integers(1, 4))
    row = st.lists(small, min_size=dim, max_size=dim)
    rows = np.array(draw(st.lists(row, min_size=1, max_size=40)), np.float32)
    query = row.filter(any)
    queries = np.array(draw(st.lists(query, min_size=1, max_size=4)), np.float32)
    return (
        queries,
        rows,
        draw(st.integers(1, 45)),
        draw(st.integers(1, 41)),
        draw(st.sampled_from(METRICS)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_blocks_of_any_size_give_the_same_with_ties_by_position(
    case: tuple[Vectors, Vectors, int, int, Metric],
) -> None:
    queries, rows, k, size, metric = case
    whole = exact_search(queries, [(0, rows)], k, metric)
    parts = exact_search(queries, blocks(rows, size), k, metric)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.scores, parts.scores)
    if metric is not Metric.COSINE:
        np.testing.assert_array_equal(whole.ids, slow_search(queries, rows, k, metric).ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [3, 31, 384])
def test_duplicates_stay_in_order_whatever_the_blocks(metric: Metric, dim: int) -> None:
    # Matrix products of different shapes round the same row differently.
    rows = np.tile(random(2, 40, dim), (60, 1))
    queries = random(3, 30, dim)
    expected = exact_search(queries, [(0, rows)], 130, metric)
    pattern = expected.ids[:, :60]
    assert (np.diff(pattern, axis=1) == 40).all()
    for size in (1 if dim == 3 else 13, 97, 1000):
        found = exact_search(queries, blocks(rows, size), 130, metric)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("metric", METRICS)
def test_float32_scores_near_a_tie_are_ordered_by_float64(metric: Metric) -> None:
    # The second row is better by less than the rounding of a float32 product.
    rows = np.repeat(random(4, 1, 256), 64, axis=0)
    query = rows[:1].copy()
    rows[:, 0] += np.linspace(1e-6, 0, 64, dtype=np.float32) * np.sign(query[0, 0])
    found = exact_search(query, blocks(rows, 5), 64, metric)
    exact = pair_scores(query, rows, metric)
    np.testing.assert_array_equal(found.ids[0], np.lexsort((np.arange(64), -exact)))


@pytest.mark.parametrize("metric", METRICS)
def test_broken_rows_are_never_returned(metric: Metric) -> None:
    rows = random(5, 6, 4)
    rows[0, 1], rows[2, 0], rows[3, 2], rows[4] = np.nan, np.inf, -np.inf, 0
    found = exact_search(random(6, 3, 4), [(0, rows)], 6, metric)
    returned = {1, 5} if metric is Metric.COSINE else {1, 4, 5}
    for ids, scores in zip(found.ids, found.scores, strict=True):
        assert set(ids.tolist()) == returned | {-1}
        assert (np.isneginf(scores) == (ids == -1)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_skipped_rows_are_left_out(metric: Metric) -> None:
    rows, queries = random(7, 50, 8), random(8, 4, 8)
    skip = np.random.default_rng(9).random(50) < 0.4
    found = exact_search(queries, blocks(rows, 9), 20, metric, skip)
    kept = np.flatnonzero(~skip)
    expected = exact_search(queries, [(0, rows[kept])], 20, metric)
    np.testing.assert_array_equal(found.ids, kept[expected.ids])


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_extreme_norms_are_fine_under_cosine(scale: float) -> None:
    rows, queries = random(10, 30, 8), random(11, 3, 8)
    found = exact_search(
        queries * np.float32(scale), [(0, rows * np.float32(scale))], 5, Metric.COSINE
    )
    expected = slow_search(queries, rows, 5, Metric.COSINE)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_euclid_far_from_the_origin_is_exact() -> None:
    rows, queries = random(12, 400, 8) + 1000, random(13, 3, 8) + 1000
    found = exact_search(queries, blocks(rows, 50), 5, Metric.EUCLID)
    np.testing.assert_array_equal(found.ids, slow_search(queries, rows, 5, Metric.EUCLID).ids)


@pytest.mark.parametrize("ascending", [True, False])
def test_sorted_rows_and_many_queries(ascending: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_QUERIES", 16)
    monkeypatch.setattr(search, "_ELEMENTS", 64)
    rows = np.sort(random(14, 500, 1), axis=0)[:: 1 if ascending else -1]
    queries = np.abs(random(15, 70, 1))
    found = exact_search(queries, blocks(np.ascontiguousarray(rows), 100), 10, Metric.DOT)
    best: NDArray[np.int64] = np.arange(499, 489, -1) if ascending else np.arange(10)
    np.testing.assert_array_equal(found.ids, np.tile(best, (70, 1)))


def test_empty_inputs_have_the_right_shapes() -> None:
    nothing = exact_search(np.empty((0, 4), np.float32), [(0, random(0, 5, 4))], 3, Metric.DOT)
    assert nothing.ids.shape == nothing.scores.shape == (0, 3)
    no_rows = exact_search(random(0, 2, 4), [], 3, Metric.DOT)
    assert (no_rows.ids == -1).all()
    assert np.isneginf(no_rows.scores).all()


def test_misuse_is_an_error() -> None:
    rows = random(0, 4, 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        exact_search(rows, [(0, rows)], 0, Metric.DOT)
    with pytest.raises(ValueError, match="block at 2 begins before 4"):
        exact_search(rows, [(0, rows), (2, rows)], 1, Metric.DOT)


@pytest.mark.parametrize("metric", METRICS)
def test_pair_scores_are_those_of_a_loop(metric: Metric) -> None:
    queries, rows = random(16, 3, 1, 7), random(17, 3, 5, 7)
    scores = pair_scores(queries, rows, metric)
    assert scores.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = slow_score(queries[i, 0], rows[i, j], metric)
            assert scores[i, j] == pytest.approx(expected)
            assert scores[i, j] == pair_scores(queries[i, 0], rows[i, j], metric)
