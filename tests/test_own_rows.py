"""Queries that are rows: the row itself is no result, wherever results are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from shared_data import Rows

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.config import FitSettings
from simskip_vdb.datatypes import Split, Vectors
from simskip_vdb.journal import Journal
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.pairs import judged_pairs
from simskip_vdb.parsing import Qrels, RowColumn
from simskip_vdb.resolution import Resolved, resolve
from simskip_vdb.workspace import open_workspace

ROWS, DIM = 900, 16


def rows_of_groups(seed: int = 3) -> tuple[Vectors, Any]:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 150, ROWS)
    x = rng.normal(size=(150, DIM))[groups] * 1.2 + rng.normal(size=(ROWS, DIM))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), groups


def answers(groups: Any, count: int) -> dict[int, int]:  # noqa: ANN401
    """Return another row of the group of each of the first rows that have one."""
    found: dict[int, int] = {}
    for row in range(ROWS):
        others = np.flatnonzero((groups == groups[row]) & (np.arange(ROWS) != row))
        if len(others) and len(found) < count:
            found[row] = int(others[0])
    return found


def judged(vectors: Vectors, pairs: list[tuple[str, str]], ids: list[str]) -> QuerySet:
    qrels = Qrels(
        source="qrels.tsv",
        query_ids=[q for q, _ in pairs],
        doc_ids=[d for _, d in pairs],
        grades=np.ones(len(pairs), np.int32),
    )
    return QuerySet(option="--queries", ids=tuple(ids), vectors=vectors, qrels=qrels)


def given(x: Vectors, of: dict[int, int]) -> Judgments:
    pairs = [(f"a{q}", f"a{d}") for q, d in of.items()]
    return Judgments(
        queries=judged(x[list(of)], pairs, [f"a{q}" for q in of]),
        doc_ids=RowColumn(source="ids.txt", values=[f"a{i}" for i in range(ROWS)]),
    )


def reciprocal_rank(x: Vectors, of: dict[int, int], queries: list[int]) -> float:
    """Score by a plain loop that leaves out the query's own row."""
    found = []
    for query in queries:
        order = [row for row in np.argsort(-(x @ x[query]), kind="stable") if row != query]
        found.append(1 / (1 + order.index(of[query])))
    return float(np.mean(found))


def written(path: Path, x: Vectors, kind: str) -> str:
    index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(x)
    index.add(x)
    faiss.write_index(index, str(path))
    return f"faiss:{path}"


def resolved(judgments: Judgments, x: Vectors) -> Resolved:
    return resolve(judgments, Rows(np.arange(len(x)), x), seed=0, assigned={})


def notes(found: Resolved) -> dict[str, int]:
    return {note.what.split(";")[0]: note.count for note in found.notes}


@pytest.mark.parametrize("kind", ["Flat", "IVF16,Flat", "HNSW16,Flat"])
def test_a_querys_own_row_is_no_result_in_any_search(tmp_path: Path, kind: str) -> None:
    x, groups = rows_of_groups()
    of = answers(groups, 200)
    store = ss.open_store(written(tmp_path / "i.faiss", x, kind))
    settings = Settings(
        measure="RR",
        fit=FitSettings(steps=4),
        search_params={"nprobe": 16} if "IVF" in kind else {},
    )
    before = ss.evaluate(store, given(x, of), settings, on=Split.VALIDATION)
    ledger = Journal(tmp_path / "i.faiss.simskip", store.info()).folder / "ledger.json"
    assert ledger.exists()
    with open_workspace(store, given(x, of), settings, lambda *_: None) as space:
        asked = space.judged.queries[Split.VALIDATION]
        queries = [int(name[1:]) for name in asked.ids]
        assert asked.own is not None
        assert asked.own.tolist() == queries
        assert not (
            space.search(asked.vectors, space.rows.blocks(), 10, own=asked.own).ids
            == asked.own[:, None]
        ).any()
    expected = reciprocal_rank(x, of, queries)
    assert before.measures["RR"]["before"] == pytest.approx(expected, abs=1e-6)
    assert before.ann_recall is not None
    assert before.ann_recall["before"] > (0.999 if kind != "HNSW16,Flat" else 0.9)
    if "HNSW" not in kind:
        assert before.through_index["RR"]["before"] == pytest.approx(expected, abs=1e-6)


def test_refining_measures_baseline_and_candidate_alike(tmp_path: Path) -> None:
    x, groups = rows_of_groups()
    of = answers(groups, 600)
    store = ss.open_store(written(tmp_path / "i.faiss", x, "Flat"))
    report = ss.refine(store, given(x, of), Settings(measure="RR"))
    splits = ss.ledger.Ledger(tmp_path / "i.faiss.simskip").splits
    queries = [int(name[1:]) for name, split in splits.items() if split == "test"]
    assert report.measures["RR"]["before"] == pytest.approx(
        reciprocal_rank(x, of, queries), abs=1e-6
    )
    assert report.exit_code == 0
    now = faiss.read_index(str(tmp_path / "i.faiss")).reconstruct_n(0, ROWS)
    ranks = []
    for query in queries:
        order = [row for row in np.argsort(-(now @ x[query]), kind="stable") if row != query]
        ranks.append(1 / (1 + order.index(of[query])))
    assert report.measures["RR"]["after"] == pytest.approx(float(np.mean(ranks)), abs=1e-4)


def test_an_equal_id_is_not_enough_where_both_are_counted_from_0() -> None:
    x, _ = rows_of_groups()
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(100, DIM)).astype(np.float32)
    pairs = [(str(i), str((i * 7 + 3) % ROWS)) for i in range(100)]
    found = resolved(Judgments(queries=judged(queries, pairs, [str(i) for i in range(100)])), x)
    assert all(part.own is None for part in found.queries.values())
    assert notes(found) == {}


def test_an_encoder_that_embeds_queries_otherwise_is_seen_through() -> None:
    x, groups = rows_of_groups()
    of = answers(groups, 100)
    rng = np.random.default_rng(2)
    prompted = x + rng.normal(size=DIM).astype(np.float32) * 0.3
    found = resolved(given(prompted, of), x)
    assert notes(found) == {"queries are rows of the index": 100}
    # Where the answer itself has the query's id, it is a result.
    same = Judgments(
        queries=judged(
            prompted[:100], [(str(i), str(i)) for i in range(100)], [str(i) for i in range(100)]
        )
    )
    assert all(part.own is None for part in resolved(same, x).queries.values())


def test_what_is_judged_for_itself_is_dropped_and_counted() -> None:
    x, groups = rows_of_groups()
    of = answers(groups, 50)
    pairs = [(f"a{q}", f"a{d}") for q, d in of.items()] + [(f"a{q}", f"a{q}") for q in of]
    queries = judged(x[list(of)], pairs, [f"a{q}" for q in of])
    documents = RowColumn(source="ids.txt", values=[f"a{i}" for i in range(ROWS)])
    found = resolved(Judgments(queries=queries, doc_ids=documents), x)
    assert notes(found) == {
        "queries are rows of the index": 50,
        "queries judged for their own row, which says nothing": 50,
    }
    for part in found.queries.values():
        assert part.own is not None
        assert not (part.rows == part.own[part.query_of_judgment()]).any()


def test_queries_of_groups_that_are_rows_by_id() -> None:
    x, groups = rows_of_groups()
    labels = RowColumn(source="labels.txt", values=[str(g) for g in groups])
    asked = QuerySet(
        option="--test-queries",
        ids=("0", "1", "2", "other"),
        vectors=x[[0, 1, 2, 3]],
        labels=tuple(str(g) for g in groups[[0, 1, 2, 3]]),
    )
    test = resolved(Judgments(labels=labels, test=asked), x).queries[Split.TEST]
    assert test.own is not None
    named = dict(zip(test.ids, test.own.tolist(), strict=True))
    assert {name: named[name] for name in named if name != "other"} == {
        name: int(name) for name in named if name != "other"
    }
    assert named.get("other", -1) == -1
    assert not (test.rows == test.own[test.query_of_judgment()]).any()


def test_a_query_is_not_pushed_away_from_its_own_row() -> None:
    x, groups = rows_of_groups()
    queries = resolved(given(x, answers(groups, 200)), x).queries[Split.FIT]
    pairs = judged_pairs(queries, np.ones(ROWS, np.bool_))
    batch = pairs.anchors[:8]
    columns = np.arange(0, ROWS)
    targets = pairs.targets(batch, columns, np.arange(ROWS))
    assert queries.own is not None
    assert targets.own.tolist() == queries.own[batch].tolist()
