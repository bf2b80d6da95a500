"""Logs of what was shown and clicked: CSV, UBI, and what positions and stays do to grades."""

from __future__ import annotations

import csv
import gzip
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from judged import make_case
from script import simskip
from test_clicks import pairs_of, vectors_of

from simskip_vdb.click_models import Clicks
from simskip_vdb.clicks import gather, read_clicks
from simskip_vdb.errors import DataError
from simskip_vdb.judgments import JudgmentFiles, QuerySet


def table(path: Path, *rows: dict[str, Any], delimiter: str = ",") -> Path:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(folder: Path, *known: str) -> dict[tuple[str, str], int]:
    return pairs_of(read_clicks(folder, frozenset(known)))


@pytest.mark.parametrize("name", ["c.csv", "c.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_vectors_and_clicks(tmp_path: Path, name: str, delimiter: str) -> None:
    clicks = [
        {"Query_ID": "a", "vector": "[1.0, 2.0]", "doc": "d1", "click": "1"},
        {"Query_ID": "a", "vector": "1 2", "doc": "d2", "click": "0"},
        {"Query_ID": "b", "vector": "[3,4]", "doc": "d,3", "click": "true"},
    ]
    table(tmp_path / name, *clicks, delimiter=delimiter)
    found = read_clicks(tmp_path)
    assert vectors_of(found) == {"a": [1, 2], "b": [3, 4]}
    assert pairs_of(found)["a", "d1"] == pairs_of(found)["b", "d,3"] == 1
    assert pairs_of(found).get(("a", "d2"), 0) == 0


def test_a_query_may_be_only_a_vector(tmp_path: Path) -> None:
    path = table(
        tmp_path / "c.csv",
        {"vector": "[1, 2]", "doc": "d1"},
        {"vector": "[1.0, 2.0]", "doc": "d2"},
        {"vector": "[2, 1]", "doc": "d1"},
    )
    found = read_clicks(path)  # a log by itself
    assert sorted(vectors_of(found).values()) == [[1, 2], [2, 1]]
    assert len(pairs_of(found)) == 3


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"query": "a", "doc": "d", "click": "2.5"}, "click"),
        ({"query": "a", "doc": "d", "position": "-1"}, "position"),
        ({"query": "", "vector": "", "doc": "d"}, "neither"),
        ({"query": "a", "vector": "[x]", "doc": "d"}, "x"),
        ({"query": "a", "clicked": "1"}, "doc"),
    ],
)
def test_malformed_tables_name_the_line(tmp_path: Path, row: dict[str, str], why: str) -> None:
    path = table(tmp_path / "c.csv", row)
    with pytest.raises(DataError, match=rf"{path.name}, line [12]: .*{why}"):
        read_clicks(tmp_path)


def looks(shown: int, clicked: int, **row: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**row, "shown": shown, "click": clicked}


@pytest.mark.parametrize("first", [0, 1])
def test_clicks_are_held_against_what_their_place_gets(tmp_path: Path, first: int) -> None:
    top, deep = first, first + 8
    rows = [looks(500, 200, query=f"q{i}", doc="usual", position=top) for i in range(9)]
    rows += [looks(500, 10, query=f"q{i}", doc="far", position=deep) for i in range(9)]
    # Clicked half as often as the best, and far more often than its place explains.
    rows.append(looks(500, 100, query="a", doc="hidden", position=deep))
    # Often clicked, and seldom for standing there.
    rows.append(looks(500, 60, query="a", doc="crowned", position=top))
    rows.append(looks(500, 190, query="a", doc="fair", position=top))
    rows.append(looks(1, 0, query="a", doc="once", position=top))
    table(tmp_path / "c.csv", *rows)
    found = read(tmp_path)
    assert {doc: found.get(("a", doc)) for doc in ("hidden", "crowned", "fair", "once")} == {
        "hidden": 3,
        "crowned": 0,
        "fair": 1,
        "once": None,
    }


def test_clicks_over_expected_clicks_by_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    seen = [
        (f"q{rng.integers(12)}", f"d{rng.integers(9)}", int(rng.integers(1, 6)), 1,
         int(rng.random() < 0.3))
        for _ in range(4000)
    ]  # fmt: skip
    clicks = Clicks()
    for start in range(0, len(seen), 700):
        clicks.add(*map(list, zip(*seen[start : start + 700], strict=True)))
    qrels = clicks.qrels("log")
    rate = {p: np.mean([c for _, _, q, _, c in seen if q == p]) for p in range(1, 6)}
    expected: dict[tuple[str, str], float] = {}
    counted: dict[tuple[str, str], int] = {}
    for query, doc, place, _, clicked in seen:
        pair = query, doc
        expected[pair] = expected.get(pair, 0) + float(rate[place])
        counted[pair] = counted.get(pair, 0) + clicked
    wanted = {}
    for pair, usual in expected.items():
        ratio = (counted[pair] + 1) / (usual + 1)
        if counted[pair] or ratio < 0.5:
            wanted[pair] = min(3, int(np.floor(ratio + 0.5)))
    pairs = zip(qrels.query_ids, qrels.doc_ids, strict=True)
    assert dict(zip(pairs, qrels.grades.tolist(), strict=True)) == wanted


def test_clicks_alone_count_by_the_depth_of_their_place(tmp_path: Path) -> None:
    table(
        tmp_path / "c.csv",
        *({"query": "a", "doc": "top", "position": 1} for _ in range(3)),
        *({"query": "a", "doc": "deep", "position": 9} for _ in range(1)),
        {"query": "a", "doc": "middle", "position": 4},
        {"query": "b", "doc": "only", "position": 1},
    )
    assert read(tmp_path) == {
        ("a", "top"): 1, ("a", "deep"): 3, ("a", "middle"): 2, ("b", "only"): 3
    }  # fmt: skip


def test_short_stays_are_no_clicks(tmp_path: Path) -> None:
    table(
        tmp_path / "c.csv",
        {"query": "a", "doc": "read", "dwell": 95.5},
        {"query": "a", "doc": "left", "dwell": 3},
        {"query": "a", "doc": "unknown", "dwell": ""},
    )
    assert read(tmp_path) == {("a", "read"): 1, ("a", "unknown"): 1}


def ubi(folder: Path, form: str) -> None:
    """Write a search log as OpenSearch has it: four people search the same, one more else."""
    queries, events = [], []
    for person in range(40):
        search = str(uuid.UUID(int=person))
        hits = ["sku-1", "sku-2", "sku-3", "sku-4"]
        typed = "red shoes" if person % 4 else "blue hat"
        queries.append(
            {
                "application": "shop", "query_id": search, "client_id": f"c{person}",
                "user_query": typed, "query_response_hit_ids": hits,
                "timestamp": "2026-01-01T00:00:00Z", "query_attributes": {"page": 1},
            }
        )  # fmt: skip
        doc, place = ("sku-3", 3) if typed == "red shoes" and person % 2 else ("sku-1", 1)
        for action, target, at in [
            ("impression", doc, place), ("item_click", doc, place), ("login", None, None)
        ]:  # fmt: skip
            events.append(
                {
                    "action_name": action, "query_id": search, "client_id": f"c{person}",
                    "event_attributes": {
                        "object": {"object_id": target, "object_id_field": "sku"},
                        "position": {"ordinal": at},
                    },
                }
            )  # fmt: skip
    for name, records in (("ubi_queries", queries), ("ubi_events", events)):
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(records), folder / f"{name}.parquet")
        elif form == "flat":
            flat = [
                {**{k: v for k, v in r.items() if not isinstance(v, dict)},
                 **{k: json.dumps(v) for k, v in r.items() if isinstance(v, dict)}}
                for r in records
            ]  # fmt: skip
            pq.write_table(pa.Table.from_pylist(flat), folder / f"{name}-0001.parquet")
        else:
            wrapped = (
                [{"_index": name, "_source": r} for r in records] if form == "dump" else records
            )
            text = "".join(json.dumps(record) + "\n" for record in wrapped)
            (folder / f"{name}.{'json' if form == 'dump' else 'jsonl'}").write_text(text)


@pytest.mark.parametrize("form", ["jsonl", "dump", "parquet", "flat"])
def test_user_behavior_insights(tmp_path: Path, form: str) -> None:
    ubi(tmp_path, form)
    found = read(tmp_path)
    # sku-1 gets 20 clicks of 40 in its place, all 10 of them for "blue hat"; sku-3 gets the others.
    assert found["blue hat", "sku-1"] == 2  # (10 + 1) / (5 + 1)
    assert found["red shoes", "sku-1"] == 1
    assert found["red shoes", "sku-3"] == 1  # (20 + 1) / (15 + 1)
    assert found["blue hat", "sku-3"] == 0  # never clicked, and 5 were to be expected
    assert ("red shoes", "sku-2") not in found


def test_ubi_judges_queries_whose_vectors_are_given(tmp_path: Path) -> None:
    ubi(tmp_path, "jsonl")
    np.save(tmp_path / "q.npy", np.ones((2, 4), np.float32))
    (tmp_path / "q.txt").write_text("red shoes\nblue hat\n")
    files = JudgmentFiles(queries=tmp_path / "q.npy", query_ids=tmp_path / "q.txt")
    logs = tmp_path / "logs"
    logs.mkdir()
    for path in tmp_path.glob("ubi_*"):
        path.rename(logs / path.name)
    queries = gather(files, logs).queries
    assert isinstance(queries, QuerySet)
    assert queries.ids == ("red shoes", "blue hat")
    assert pairs_of(queries)["blue hat", "sku-1"] == 2
    searches = tuple(str(uuid.UUID(int=person)) for person in range(2))
    (tmp_path / "q.txt").write_text("\n".join(searches))
    queries = gather(files, logs).queries  # a query may also be one search
    assert isinstance(queries, QuerySet)
    assert (searches[0], "sku-1") in pairs_of(queries)
    assert (searches[1], "sku-3") in pairs_of(queries)


def test_an_index_is_refined_by_a_table_of_clicks(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    assert case.files.qrels is not None
    judged = [line.split("\t") for line in Path(case.files.qrels).read_text().splitlines()[1:]]
    rows = [{"query": q, "doc": d, "position": 1, "click": 1} for q, d, _ in judged]
    table(tmp_path / "clicks.csv", *rows)
    options = list(case.options)
    at = options.index("--qrels")
    del options[at : at + 2]
    done = simskip("refine", str(case.index), *options, "--clicks", str(tmp_path / "clicks.csv"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "gate: passed" in done.stdout
