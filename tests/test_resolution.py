from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from shared_data import Rows, corpus, judged_files

from simskip_vdb.datatypes import JudgedQueries, Split, Vectors
from simskip_vdb.errors import DataError
from simskip_vdb.judgments import Judgments, QuerySet, read_judgments
from simskip_vdb.parsing import Qrels, RowColumn
from simskip_vdb.resolution import Resolved, resolve
from simskip_vdb.splits import row_name

DIM = 8
Judged = tuple[str, str, int]


def vectors(count: int, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)


def index(count: int = 40, ids: Any = None) -> Rows:  # noqa: ANN401
    return Rows(np.arange(count) if ids is None else np.array(ids), vectors(count, 99))


def given(
    ids: list[str], judged: list[Judged], option: str = "--queries", seed: int = 1
) -> QuerySet:
    qrels = Qrels(
        source="qrels.tsv",
        query_ids=[q for q, _, _ in judged],
        doc_ids=[d for _, d, _ in judged],
        grades=np.array([g for _, _, g in judged], np.int32),
    )
    return QuerySet(option=option, ids=tuple(ids), vectors=vectors(len(ids), seed), qrels=qrels)


def many(prefix: str, count: int, seed: int, option: str = "--queries") -> QuerySet:
    """Make queries with one relevant row each."""
    ids = [f"{prefix}{i}" for i in range(count)]
    return given(ids, [(name, str(i % 40), 1) for i, name in enumerate(ids)], option, seed)


def labels(values: list[str], row_ids: Any = None) -> RowColumn:  # noqa: ANN401
    return RowColumn(source="labels.txt", values=values, row_ids=row_ids)


def run(judgments: Judgments, rows: Rows | None = None, **options: Any) -> Resolved:  # noqa: ANN401
    return resolve(judgments, rows or index(), **{"seed": 0, "assigned": {}, **options})


def judged_rows(queries: JudgedQueries) -> dict[str, dict[int, int]]:
    ends = queries.indptr
    return {
        name: dict(
            zip(
                queries.rows[ends[i] : ends[i + 1]].tolist(),
                queries.grades[ends[i] : ends[i + 1]].tolist(),
                strict=True,
            )
        )
        for i, name in enumerate(queries.ids)
    }


def everything(resolved: Resolved) -> dict[str, dict[int, int]]:
    return {k: v for part in resolved.queries.values() for k, v in judged_rows(part).items()}


def notes(resolved: Resolved) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {note.what: (note.count, note.examples) for note in resolved.notes}


def sizes(resolved: Resolved) -> tuple[int, ...]:
    return tuple(len(resolved.queries[split]) for split in Split)


def test_judgments_name_index_ids_where_there_are_no_document_ids() -> None:
    judged = [("a", "30", 2), ("a", "-7", 0), ("b", "30", 1)]
    found = run(Judgments(queries=given(["a", "b"], judged)), index(3, [5, 30, -7]))
    assert everything(found) == {"a": {1: 2, 2: 0}, "b": {1: 1}}
    for part in found.queries.values():
        assert part.indptr.dtype == part.rows.dtype == np.int64
        assert part.grades.dtype == np.int32
        assert part.vectors.dtype == np.float32
        assert part.vectors.shape == (len(part), DIM)


def test_queries_keep_their_own_vectors_and_judgments() -> None:
    queries = many("q", 200, 1)
    found = run(Judgments(queries=queries))
    assert sum(sizes(found)) == 200
    assert all(sizes(found))
    for part in found.queries.values():
        for name, vector in zip(part.ids, part.vectors, strict=True):
            i = int(name[1:])
            np.testing.assert_array_equal(vector, queries.vectors[i])
            assert everything(found)[name] == {i % 40: 1}


def test_document_ids_in_order_follow_index_ids_not_positions() -> None:
    documents = RowColumn(source="ids.txt", values=["x", "y", "z"])
    judgments = Judgments(queries=given(["a"], [("a", "z", 1)]), doc_ids=documents)
    assert everything(run(judgments, index(3, [2, 0, 1]))) == {"a": {0: 1}}


def test_document_ids_by_index_id() -> None:
    documents = RowColumn(source="ids.tsv", values=["x", "y", "w"], row_ids=np.array([30, 5, 77]))
    judged = [("a", "x", 1), ("a", "w", 1), ("a", "y", 1)]
    found = run(Judgments(queries=given(["a"], judged), doc_ids=documents), index(3, [5, 30, -7]))
    assert everything(found) == {"a": {1: 1, 0: 1}}
    assert notes(found) == {
        "index ids that no row has": (1, ("77",)),
        "judgments of unknown documents": (1, ("w",)),
    }


def test_what_is_skipped_is_counted_with_examples() -> None:
    ids = [f"q{i}" for i in range(8)]
    judged = [
        ("q0", "1", 1), ("q0", "1", 1), ("q0", "no1", 1), ("q0", "no2", 1),
        ("q1", "no1", 1), ("q2", "2", 0), ("q3", "3", 1), ("q4", "3", 1), ("q5", "3", 1),
        *[(f"nobody{i}", "1", 1) for i in range(5)],
    ]  # fmt: skip
    queries = given(ids, judged)
    queries.vectors[3], queries.vectors[4], queries.vectors[5:8:2, 2] = 0, np.inf, np.nan
    found = run(Judgments(queries=queries))
    assert everything(found) == {"q0": {1: 1}}
    assert notes(found) == {
        "judgments of unknown queries": (5, ("nobody0", "nobody1", "nobody2")),
        "judgments of unknown documents": (3, ("no1", "no2")),
        "repeated judgments": (1, ()),
        "queries with NaN, infinite or zero vectors": (4, ("q3", "q4", "q5")),
        "queries without a relevant known document": (3, ("q1", "q2", "q6")),
    }
    assert "5 judgments of unknown queries, such as nobody0" in str(found.notes[0])
    json.dumps([note.to_dict() for note in found.notes], allow_nan=False)


@pytest.mark.parametrize(("judgments", "rows", "words"), [
    (Judgments(queries=given(["a"], [("a", "1", 1)])), index(1), "1 rows; at least 2"),
    (Judgments(queries=given(["a"], [("a", "1", 1), ("b", "1", 0), ("a", "1", 2)])), index(),
     "query 'a' and document '1' are judged 1 and 2"),
    (Judgments(queries=given(["a"], [("a", "nowhere", 1)])), index(),
     r"no query can be used.*nowhere"),
    (Judgments(queries=given([], [])), index(), "no query can be used"),
    (Judgments(queries=given(["a"], [("a", "1", 1)])), index(3, [1, 1, 2]), "index id 1 belongs"),
    (Judgments(queries=given(["a"], [("a", "x", 1)]), doc_ids=labels(["x", "y"])), index(3),
     "2 values for 3 rows"),
    (Judgments(queries=given(["a"], [("a", "x", 1)]), doc_ids=labels(["x", "y"])),
     index(2, [1, 2]), "not exactly 0 to 1"),
    (Judgments(queries=given(["a"], [("a", "y", 1)]),
               doc_ids=labels(["x", "y"], np.array([b"1", b"x"]))),
     index(2), r"labels\.txt, line 2: index id 'x' is not an integer"),
    (Judgments(queries=given(["a"], [("a", "y", 1)]),
               doc_ids=labels(["x", "y"], np.array([b"1", b"99999999999999999999"]))),
     index(2), r"line 2: index id '9+' is not an integer in range"),
    (Judgments(queries=given(["a"], [("a", "y", 1)]),
               doc_ids=labels(["x", "y"], np.array([b"1", b"01"]))),
     index(2), "line 2: index id '01' is not an integer"),
    (Judgments(queries=given(["a"], [("a", "x", 1)]), doc_ids=labels(["x", "x"])), index(2),
     "'x' stands for more than one row"),
    (Judgments(queries=given(["a"], [("a", "1", 1)]), test=many("q", 3, 2, "--test-queries"),
               dev=many("q", 3, 3, "--dev-queries")), index(),
     "3 queries are in two sets, such as 'q0'"),
    (Judgments(queries=many("q", 3, 2), test=many("q", 5, 3, "--test-queries")), index(),
     "3 queries are in two sets"),
    (Judgments(labels=labels(["x"] * 3)), index(2), "3 values for 2 rows"),
])  # fmt: skip
def test_refused(judgments: Judgments, rows: Rows, words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(judgments, rows)


def test_another_dimension_is_refused() -> None:
    queries = given(["a"], [("a", "1", 1)])
    wide = QuerySet(
        option="--queries", ids=("a",), vectors=np.ones((1, 9), np.float32), qrels=queries.qrels
    )
    with pytest.raises(DataError, match="--queries: vectors have 9 dimensions and the index has 8"):
        run(Judgments(queries=wide))


def test_empty_judgments_resolve_to_empty_splits() -> None:
    found = run(Judgments())
    assert sizes(found) == (0, 0, 0)
    assert found.groups is None
    assert not found.held_out.any()
    assert found.held_out.shape == (40,)


@pytest.mark.parametrize(("explicit", "expected"), [
    ((), (0.6, 0.2, 0.2)),
    (("test",), (0.75, 0.25, None)),
    (("dev",), (0.75, None, 0.25)),
    (("dev", "test"), (1.0, None, None)),
])  # fmt: skip
def test_queries_are_split_over_what_is_not_given(
    explicit: tuple[str, ...], expected: tuple[float | None, ...]
) -> None:
    sets = {name: many(name, 50, 5 + i, f"--{name}-queries") for i, name in enumerate(explicit)}
    queries = many("q", 1000, 1)
    found = run(Judgments(queries=queries, dev=sets.get("dev"), test=sets.get("test")))
    for size, share in zip(sizes(found), expected, strict=True):
        assert size == (50 if share is None else pytest.approx(1000 * share, rel=0.15))
    for name in explicit:
        split = {"dev": Split.VALIDATION, "test": Split.TEST}[name]
        assert set(found.queries[split].ids) == {f"{name}{i}" for i in range(50)}


def test_test_queries_alone_leave_fit_and_validation_empty() -> None:
    assert sizes(run(Judgments(test=many("t", 12, 1, "--test-queries")))) == (0, 0, 12)


def test_assigned_splits_are_kept_and_returned() -> None:
    first = run(Judgments(queries=many("q", 100, 1)))
    grown = run(Judgments(queries=many("q", 300, 1)), seed=1, assigned=first.assigned)
    assert len(grown.assigned) == 300
    assert first.assigned.items() <= grown.assigned.items()
    for split in Split:
        assert set(first.queries[split].ids) <= set(grown.queries[split].ids)
    fewer = run(Judgments(queries=many("q", 30, 1)), assigned=grown.assigned)
    assert fewer.assigned == grown.assigned


def test_queries_given_for_a_split_must_not_have_served_another() -> None:
    tests = Judgments(test=many("t", 5, 1, "--test-queries"))
    assert sizes(run(tests, assigned={"t1": Split.TEST})) == (0, 0, 5)
    with pytest.raises(DataError, match=r"2 queries given for test .* such as 't1'"):
        run(tests, assigned={"t1": Split.FIT, "t3": Split.VALIDATION})


def test_near_identical_queries_stay_together_and_follow_the_past() -> None:
    queries = many("q", 90, 1)
    queries.vectors[1::3] = queries.vectors[::3] * 1.5
    queries.vectors[2::3] = queries.vectors[::3] + 1e-4
    found = run(Judgments(queries=queries)).assigned
    for i in range(0, 90, 3):
        assert found[f"q{i}"] is found[f"q{i + 1}"] is found[f"q{i + 2}"]
    past = run(Judgments(queries=queries), assigned={"q4": Split.TEST, "q10": Split.FIT}).assigned
    assert past["q3"] is past["q5"] is Split.TEST
    assert past["q9"] is past["q11"] is Split.FIT


def test_copies_of_explicit_test_queries_are_not_fitted() -> None:
    queries, tests = many("q", 50, 1), many("t", 50, 2, "--test-queries")
    queries.vectors[:7] = tests.vectors[:7] * 2
    found = run(Judgments(queries=queries, test=tests))
    assert sum(sizes(found)) == 93
    what = "queries near-identical to one given for validation or test"
    assert notes(found)[what] == (7, ("q0", "q1", "q2"))
    assert not {f"q{i}" for i in range(7)} & set(found.assigned)


GROUPS = [f"g{i % 10}" for i in range(400)]


def test_labels_become_codes_with_minus_one_for_rows_without() -> None:
    column = labels(["red", "blue", "red"], np.array([7, 9, 4]))
    found = run(Judgments(labels=column), index(4, [4, 5, 7, 9]))
    assert found.groups is not None
    assert found.groups.dtype == np.int64
    assert found.groups[0] == found.groups[2] >= 0
    assert found.groups[3] not in (found.groups[0], -1)
    assert found.groups[1] == -1
    assert notes(found)["rows without a label"] == (1, ("5",))


def test_held_out_rows_act_as_queries_of_their_group() -> None:
    rows = index(400, np.random.default_rng(3).permutation(1000)[:400])
    column = labels(GROUPS, rows.ids)
    found = run(Judgments(labels=column), rows)
    assert sizes(found)[0] == 0
    hidden = {
        Split.TEST: set(found.held[Split.TEST].tolist()),
        Split.VALIDATION: set(np.flatnonzero(found.held_out).tolist()),
    }
    assert set(found.held) == set(hidden)
    for split, skipped in hidden.items():
        queries, positions = found.queries[split], found.held[split]
        assert len(queries) == len(positions) > 40
        assert queries.ids == tuple(row_name(i) for i in rows.ids[positions].tolist())
        np.testing.assert_array_equal(queries.vectors, rows.vectors[positions])
        for position, relevant in zip(
            positions.tolist(), judged_rows(queries).values(), strict=True
        ):
            group = {i for i in range(400) if GROUPS[i] == GROUPS[position]}
            assert set(relevant) == group - skipped
            assert set(relevant.values()) == {1}
        assert all(found.assigned[name] is split for name in queries.ids)
    assert hidden[Split.TEST] < hidden[Split.VALIDATION]


def test_held_out_rows_stay_held_out_when_the_index_grows() -> None:
    first = run(Judgments(labels=labels(GROUPS)), index(400))
    grown = run(Judgments(labels=labels(GROUPS * 2)), index(800), assigned=first.assigned)
    for split in (Split.VALIDATION, Split.TEST):
        assert set(first.held[split]) <= set(grown.held[split])


def test_broken_rows_are_not_held_out() -> None:
    rows = index(400)
    rows.vectors[::2] = 0
    rows.vectors[1::4, 3] = np.nan
    found = run(Judgments(labels=labels(GROUPS)), rows)
    assert found.held_out.any()
    assert (np.flatnonzero(found.held_out) % 4 == 3).all()


def test_labelled_queries_have_the_rows_of_their_label() -> None:
    tests = QuerySet(
        option="--test-queries",
        ids=("a", "b", "c"),
        vectors=vectors(3, 5),
        labels=("g3", "nothing", "g0"),
    )
    found = run(Judgments(labels=labels(GROUPS), test=tests), index(400))
    assert set(found.held) == {Split.VALIDATION}
    # Validation rows are results of test queries again, as nothing is chosen by them any more.
    assert judged_rows(found.queries[Split.TEST]) == {
        "a": dict.fromkeys(range(3, 400, 10), 1),
        "c": dict.fromkeys(range(0, 400, 10), 1),
    }
    assert notes(found)["queries without a relevant known document"] == (1, ("b",))


def test_labels_beside_judged_queries_are_groups_only() -> None:
    found = run(Judgments(queries=many("q", 100, 1), labels=labels(GROUPS)), index(400))
    assert found.groups is not None
    assert found.held == {}
    assert sum(sizes(found)) == 100


def test_too_many_labelled_queries_for_huge_groups_are_refused() -> None:
    tests = QuerySet(
        option="--test-queries",
        ids=tuple(map(str, range(2100))),
        vectors=vectors(2100),
        labels=("x",) * 2100,
    )
    with pytest.raises(DataError, match="give fewer queries or finer labels"):
        run(Judgments(labels=labels(["x"] * 2000), test=tests), index(2000))


def test_measured_sets_resolve_whole() -> None:
    rows = corpus("cranfield")
    found = run(read_judgments(judged_files("cranfield", "train", "test")), rows)
    assert sum(sizes(found)) == 225
    assert len(found.queries[Split.TEST]) == 112
    assert sum(len(part.rows) for part in found.queries.values()) == 971 + 866
    assert found.notes == ()
