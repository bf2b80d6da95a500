from __future__ import annotations

import subprocess
import sys
from math import log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import corpus, folder, judged_files

from simskip_vdb.datatypes import JudgedQueries, Metric, Neighbors, Split
from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.evaluation import (
    DEFAULT_MEASURES,
    GROUP_MEASURES,
    ann_recall,
    depth,
    exact_search,
    group_overlap,
    parse_measures,
    relevant_rows,
    score,
    seen_queries,
)
from simskip_vdb.judgments import JudgmentFiles, read_judgments
from simskip_vdb.resolution import resolve


def judged(*queries: dict[int, int]) -> JudgedQueries:
    """Build queries from their grades by position."""
    return JudgedQueries(
        ids=tuple(f"q{i}" for i in range(len(queries))),
        vectors=np.zeros((len(queries), 2), np.float32),
        indptr=np.cumsum([0, *map(len, queries)]),
        rows=np.array([row for q in queries for row in q], np.int64),
        grades=np.array([grade for q in queries for grade in q.values()], np.int32),
    )


def one(measure: str, grades: dict[int, int], ranked: list[int]) -> float:
    return float(score(judged(grades), np.array([ranked]), [measure])[measure][0])


def test_ndcg_has_linear_gains_and_log2_discounts() -> None:
    # Järvelin & Kekäläinen, 2002, as trec_eval's ndcg_cut computes it.
    gained = 3 / log2(2) + 0 + 2 / log2(4) + 1 / log2(5)
    ideal = 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    grades = {7: 3, 8: 2, 9: 1, 5: 0}
    assert one("nDCG@10", grades, [7, 5, 8, 9]) == pytest.approx(gained / ideal, abs=1e-12)


@pytest.mark.parametrize(("measure", "expected"), [
    ("P@2", 0.5),
    ("P@10", 0.2),
    ("R@2", 1 / 3),
    ("R@10", 2 / 3),
    ("RR@10", 0.5),
    ("Success@1", 0.0),
    ("Success@2", 1.0),
    ("Rprec", 1 / 3),
    ("AP@10", (1 / 2 + 2 / 4) / 3),
    ("nDCG@1", 0.0),
])  # fmt: skip
def test_measures_by_hand(measure: str, expected: float) -> None:
    # Rows 1, 2 and 3 are relevant; row 3 is not found; row 9 was judged not relevant.
    value = one(measure, {1: 1, 2: 1, 3: 1, 9: 0}, [9, 1, 7, 2, -1])
    assert value == pytest.approx(expected, abs=1e-12)


def slow_ndcg(grades: dict[int, int], ranked: list[int], k: int) -> float:
    gains = [grades.get(row, 0) for row in ranked[:k] if row >= 0]
    ideal = sorted(grades.values(), reverse=True)[:k]
    best = sum(gain / log2(i + 2) for i, gain in enumerate(ideal))
    return sum(gain / log2(i + 2) for i, gain in enumerate(gains)) / best if best else 0.0


grades = st.dictionaries(st.integers(0, 30), st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(grades, st.permutations(range(31))), min_size=1, max_size=4))
def test_ndcg_equals_a_loop(queries: list[tuple[dict[int, int], list[int]]]) -> None:
    ranked = np.array([order for _, order in queries])
    values = score(judged(*(g for g, _ in queries)), ranked, ["nDCG@10"])["nDCG@10"]
    expected = [slow_ndcg(g, order, 10) for g, order in queries]
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_every_query_is_scored_and_one_without_results_scores_nothing() -> None:
    queries = judged({1: 1}, {2: 1}, {3: 1})
    values = score(queries, np.array([[1, 0], [-1, -1], [0, 3]]), ["nDCG@10", "RR@10", "Rprec"])
    np.testing.assert_allclose(values["RR@10"], [1, 0, 0.5])
    np.testing.assert_allclose(values["Rprec"], [1, 0, 0])
    assert all(v.dtype == np.float64 and len(v) == 3 for v in values.values())


def test_ranks_decide_although_trec_eval_breaks_ties_by_id() -> None:
    for first, second in ((1, 2), (2, 1), (10, 9), (9, 10)):
        assert one("RR@10", {first: 1}, [first, second]) == 1.0
        assert one("nDCG@10", {first: 1}, [first, second]) == 1.0


def test_gains_of_one_measure_do_not_reach_another() -> None:
    names = parse_measures(["nDCG(gains={1:0,2:5})@10", "nDCG@10"])
    queries = judged({1: 1, 2: 2})
    values = score(queries, np.array([[1, 2]]), names)
    assert values["nDCG@10"][0] == pytest.approx(slow_ndcg({1: 1, 2: 2}, [1, 2], 10))
    assert values[names[0]][0] == pytest.approx((5 / log2(3)) / 5)


def test_measures_get_canonical_names_once() -> None:
    assert parse_measures(["NDCG@10", "nDCG@10", "MRR@10", "Recall@5"]) == (
        "nDCG@10",
        "RR@10",
        "R@5",
    )
    assert parse_measures(DEFAULT_MEASURES) == DEFAULT_MEASURES
    assert parse_measures(GROUP_MEASURES) == GROUP_MEASURES


@pytest.mark.parametrize(
    "name",
    [
        "",
        "bogus",
        "nDCG@",
        "nDCG@-1",
        "nDCG@0",
        "R@10001",
        "alpha_nDCG@10",
        "nDCG@10 R@5",
        "P",
        "__import__('os')",
    ],
)
def test_other_names_are_refused_with_examples(name: str) -> None:
    with pytest.raises(ConfigError, match=r"nDCG@10, R@100"):
        parse_measures([name])


def test_depth_is_the_deepest_measure_asks_for() -> None:
    queries = judged({i: 1 for i in range(37)}, {1: 0, 2: 1})
    assert depth(["nDCG@10", "R@100"], queries) == 100
    assert depth(["P@10", "Rprec"], queries) == 37
    assert depth(["RR"], queries) == 1000
    assert depth([], queries) == 0
    huge = judged(dict.fromkeys(range(10_001), 1))
    assert depth(["P@10"], huge) == 10
    with pytest.raises(ConfigError, match="here 10001"):
        depth(["P@10", "Rprec"], huge)


def test_ir_measures_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[eval\]"):
        parse_measures(["nDCG@10"])


def test_importing_is_light() -> None:
    code = (
        "import sys, simskip_vdb.evaluation, simskip_vdb.resolution;"
        "print([m for m in ('ir_measures', 'scipy', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_seen_means_that_a_relevant_row_was_relevant_in_the_fit() -> None:
    fitted = relevant_rows(judged({1: 1, 2: 0}, {3: 2, 1: 1}))
    assert fitted.tolist() == [1, 3]
    queries = judged({1: 1}, {2: 1}, {1: 0, 5: 1}, {9: 1, 3: 1})
    assert seen_queries(queries, fitted).tolist() == [True, False, False, True]
    assert seen_queries(queries, np.empty(0, np.int64)).tolist() == [False] * 4


def test_ann_recall_counts_rows_and_takes_ties_as_found() -> None:
    exact = Neighbors(
        ids=np.array([[4, 5, 6], [7, 8, -1]]),
        scores=np.array([[0.9, 0.8, 0.7], [0.5, 0.4, -np.inf]], np.float32),
    )
    same = ann_recall(exact, exact.ids, exact.scores)
    assert same == 1.0
    found = np.array([[4, 9, 1], [7, -1, -1]])
    scores = np.array([[0.9, 0.7, 0.6], [0.5, 0.0, 0.0]])
    # Row 9 ties with row 6, row 1 is worse, row 8 is missing: 2 + 1 of 5.
    assert ann_recall(exact, found, scores) == pytest.approx(3 / 5)
    # A row that exact search was told to skip is no extra hit.
    more = np.array([[4, 5, 6], [7, 8, 2]])
    assert ann_recall(exact, more, np.full((2, 3), 1.0)) == 1.0
    nothing = Neighbors(ids=np.full((2, 3), -1), scores=np.full((2, 3), -np.inf, np.float32))
    assert ann_recall(nothing, found, scores) == 1.0


def test_a_negative_score_of_a_tie_counts_too() -> None:
    exact = Neighbors(ids=np.array([[1]]), scores=np.array([[-100.0]], np.float32))
    assert ann_recall(exact, np.array([[2]]), np.array([[-100.00001]])) == 1.0
    assert ann_recall(exact, np.array([[2]]), np.array([[-100.1]])) == 0.0


def test_overlap_looks_at_the_first_ten_of_the_own_group() -> None:
    group = {i: 1 for i in range(12)}
    queries = judged(group, {20: 1, 21: 1}, {30: 1})
    before = np.full((3, 14), -1)
    before[0] = [50, 0, 1, 2, 3, 4, 51, 5, 6, 7, 8, 9, 10, 11]
    before[1, :2] = [20, 21]
    after = np.full((3, 14), -1)
    after[0] = [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 50, 51]
    after[1, :3] = [21, 50, 51]
    # 8 of 10; one of two; the third query found nothing of its group and is left out.
    assert group_overlap(queries, before, after) == pytest.approx((0.8 + 0.5) / 2)
    assert group_overlap(queries, before, before) == 1.0


def search_and_score(name: str, queries: JudgedQueries, measures: tuple[str, ...]) -> Any:  # noqa: ANN401
    rows = corpus(name)
    found = exact_search(
        queries.vectors, [(0, rows.vectors)], depth(measures, queries), Metric.COSINE
    )
    return {m: v.mean() for m, v in score(queries, found.ids, measures).items()}


def test_nfcorpus_scores_as_published() -> None:
    resolved = resolve(
        read_judgments(judged_files("nfcorpus", "test")), corpus("nfcorpus"), seed=0, assigned={}
    )
    queries = resolved.queries[Split.TEST]
    assert len(queries) == 323
    means = search_and_score("nfcorpus", queries, DEFAULT_MEASURES)
    # 40 rows are duplicates, so nDCG@10 is .3159 to .3167 by the order of ties alone.
    assert means["nDCG@10"] == pytest.approx(0.3162, abs=0.0006)
    assert means["R@100"] == pytest.approx(0.3115, abs=0.00005)


def test_cranfield_scores_as_published() -> None:
    resolved = resolve(
        read_judgments(judged_files("cranfield", "train", "test")),
        corpus("cranfield"),
        seed=0,
        assigned={},
    )
    queries = resolved.queries[Split.TEST]
    assert len(queries) == 112
    means = search_and_score("cranfield", queries, DEFAULT_MEASURES)
    assert means["nDCG@10"] == pytest.approx(0.3860, abs=0.00005)


def test_banking77_scores_as_published() -> None:
    at = folder("banking77")
    files = JudgmentFiles(
        labels=at / "labels.txt",
        test_queries=at / "queries.test.npy",
        test_labels=at / "query_labels.test.txt",
    )
    resolved = resolve(read_judgments(files), corpus("banking77"), seed=0, assigned={})
    held = resolved.held[Split.VALIDATION]
    assert len(held) == 1000
    assert resolved.held_out[held].all()
    queries = resolved.queries[Split.TEST]
    # Rows that act as validation queries are rows like others once they are tested on.
    assert np.isin(held, queries.rows).any()
    means = search_and_score("banking77", queries, GROUP_MEASURES)
    assert means["Rprec"] == pytest.approx(0.4949, abs=0.00005)
    assert means["P@10"] == pytest.approx(0.8572, abs=0.00005)
