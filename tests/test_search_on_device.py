from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simskip_vdb import search_on_device
from simskip_vdb.datatypes import Metric, Neighbors, Vectors
from simskip_vdb.search import Mask, exact_search
from simskip_vdb.search_on_device import SearchOnDevice

METRICS = list(Metric)


def found(
    queries: Vectors, rows: Vectors, k: int, metric: Metric, skip: Mask | None, block: int
) -> Neighbors:
    search = SearchOnDevice(queries, k, metric, skip, "cpu")
    for start in range(0, len(rows), block):
        search.add(start, rows[start : start + block])
    return search.found()


def random(seed: int, *shape: int) -> Vectors:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "block"), [(900, 10, 64), (900, 1, 900), (30, 50, 7)])
def test_finds_what_numpy_finds(
    metric: Metric, n: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_on_device, "QUERIES", 4)
    monkeypatch.setattr(search_on_device, "SCORES", 4 * 100)
    monkeypatch.setattr(search_on_device, "NUMBERS", 1000)
    queries, rows = random(0, 11, 24), random(1, n, 24)
    rows[3], rows[5, 0], rows[7, 1] = 0, np.nan, np.inf
    rows[n // 2 :] = rows[: n - n // 2]  # every row twice
    skip = np.arange(n) % 9 == 2
    for mask in (None, skip):
        ours = found(queries, rows, k, metric, mask, block)
        theirs = exact_search(queries, [(0, rows)], k, metric, mask)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        assert ours.ids.dtype == np.int64
        assert ours.scores.dtype == np.float32


small = st.integers(-2, 2)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(small, small), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([Metric.DOT, Metric.EUCLID]),
)
def test_ranks_ties_by_position(
    points: list[tuple[int, int]], k: int, block: int, metric: Metric
) -> None:
    rows = np.array(points, np.float32)
    queries = np.array([[1, 2], [-1, 1], [2, 0]], np.float32)
    ours = found(queries, rows, k, metric, None, block)
    np.testing.assert_array_equal(ours.ids, exact_search(queries, [(0, rows)], k, metric).ids)


def test_searches_without_queries_or_rows() -> None:
    assert found(random(0, 0, 4), random(1, 5, 4), 3, Metric.DOT, None, 2).ids.shape == (0, 3)
    nothing = found(random(0, 2, 4), random(1, 0, 4), 3, Metric.DOT, None, 2)
    assert (nothing.ids == -1).all()
    assert np.isneginf(nothing.scores).all()


def test_refuses_what_numpy_refuses() -> None:
    rows = random(0, 4, 2)
    with pytest.raises(ValueError, match="at least 1"):
        SearchOnDevice(rows, 0, Metric.DOT, None, "cpu")
    search = SearchOnDevice(rows, 1, Metric.DOT, None, "cpu")
    search.add(0, rows)
    with pytest.raises(ValueError, match="begins before"):
        search.add(2, rows)
