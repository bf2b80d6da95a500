from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import machine
import numpy as np
import peers
import pytest
import quality
import table
from builders import clusters
from loading import PROTOCOL, datasets, pooled

from simskip_vdb.datatypes import JudgedQueries, Vectors

ROWS, QUERIES = 200, 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one set in the layout of the measured ones: train and test, no dev."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "made-up"
    folder.mkdir()
    rng = np.random.default_rng(0)
    docs, queries, row_group, query_group = clusters(rng, ROWS, QUERIES)
    np.save(folder / "corpus.npy", docs.astype(np.float16))
    (folder / "doc_ids.txt").write_text("".join(f"d{i}\n" for i in range(ROWS)))
    for split, part in (("train", range(80)), ("test", range(80, QUERIES))):
        np.save(folder / f"queries.{split}.npy", queries[part].astype(np.float16))
        (folder / f"query_ids.{split}.txt").write_text("".join(f"q{i}\n" for i in part))
        lines = [
            f"q{i}\td{row}\t1\n"
            for i in part
            for row in np.flatnonzero(row_group == query_group[i])
        ]
        (folder / f"qrels.{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return root


def run(data: Path, results: Path, *options: str) -> list[dict[str, Any]]:
    argv = sys.argv
    sys.argv = ["quality.py", "--data", str(data), "--results", str(results), "--seeds", "0"]
    sys.argv += [*options, "made-up"]
    try:
        quality.main()
    finally:
        sys.argv = argv
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_a_new_set_is_measured_once_and_again_only_when_its_code_changes(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "quality.jsonl"
    first = run(data, results, "--methods", "adapter")
    adapters = ["linear query adapter", "two-layer query adapter"]
    assert [cell["method"] for cell in first] == adapters * 2
    assert [PROTOCOL in cell["set"] for cell in first] == [False, False, True, True]
    assert run(data, results, "--methods", "adapter") == first
    assert "| linear query adapter | " in capsys.readouterr().out
    monkeypatch.setattr(quality, "code", lambda method: "other")
    assert len(run(data, results, "--methods", "linear")) == 6
    kept = table.read(results, lambda method: "other" if method.startswith("linear") else "new")
    assert [cell["current"] for cell in kept] == [True, False] * 2


def test_cells_hold_what_the_measures_say(data: Path) -> None:
    (dataset,) = datasets(data, ["made-up"])
    cell = cells.run(dataset, "ours, judged, docs", 0)
    before, after = cell["measures"]["nDCG@10"]
    assert before == pytest.approx(np.mean(cell["before"]), abs=1e-4)
    assert after == pytest.approx(np.mean(cell["after"]), abs=1e-4)
    assert after > before + 0.03
    assert cell["gate"]["passed"]
    assert len(cell["after"]) == len(cell["seen"]) == QUERIES - 80
    raw, moved_at_random = (cells.run(dataset, name, 0) for name in ("raw", "random moves"))
    assert raw["after"] == raw["before"] == cell["before"]
    assert not moved_at_random["gate"]["passed"]


def test_the_protocol_shares_all_queries_out_anew(data: Path) -> None:
    (dataset,) = datasets(data, ["made-up"])
    shared, other = (pooled(dataset, seed) for seed in (0, 1))
    assert shared is not None
    assert other is not None
    parts = [shared.judgments.queries, shared.judgments.dev, shared.judgments.test]
    sizes = [len(part.ids) for part in parts if part is not None]
    assert sizes == [84, 12, 24]
    names = [name for part in parts if part is not None for name in part.ids]
    assert sorted(names) == sorted(f"q{i}" for i in range(QUERIES))
    for part in parts:
        assert part is not None
        assert part.qrels is not None
        assert set(part.qrels.query_ids) == set(part.ids)
    assert shared.judgments.test is not None
    assert other.judgments.test is not None
    assert shared.judgments.test.ids != other.judgments.test.ids
    cell = cells.run(shared, "raw", 0)
    line = table.protocol([{**cell, "current": True}])
    assert f"| made-up (minilm) | nDCG@10 | {cell['measures']['nDCG@10'][1]:.4f} | – |" in line


def test_hidden_rows_make_every_query_unseen(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset,) = datasets(data, ["made-up"])
    judged: list[JudgedQueries] = []

    def spy(task: peers.Task) -> peers.Moved:
        judged.append(task.fit)
        return peers.raw(task)

    monkeypatch.setitem(peers.PEERS, "raw", spy)
    cell = cells.run(dataset, "raw" + cells.UNSEEN, 0)
    assert set(cell["seen"]) == {"0"}
    folds = judged[1:]
    assert len(folds) == cells.FOLDS
    assert all(len(fold) < len(judged[0]) for fold in folds)
    assert all((fold.grades > 0).any() for fold in folds)


def task(rows: Vectors, judged: JudgedQueries) -> peers.Task:
    return peers.Task(
        vectors=rows,
        usable=np.ones(len(rows), np.bool_),
        fit=judged,
        validation=judged,
        validate=lambda moved: float((moved.queries(judged.vectors) * moved.rows[:8]).sum()),
        seed=0,
    )


@pytest.fixture
def small() -> peers.Task:
    """Fifty rows; eight queries, each near one of the first eight rows, which are relevant."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 12)) + 0.5
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    asked = rows[:8] + 0.2 * rng.normal(size=12)
    asked = (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32)
    judged = JudgedQueries(
        ids=tuple("abcdefgh"),
        vectors=asked,
        indptr=np.arange(9),
        rows=np.arange(8),
        grades=np.ones(8, np.int32),
    )
    return task(rows, judged)


def test_centring_and_all_but_the_top_subtract_what_they_say(small: peers.Task) -> None:
    left = small.vectors - small.vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(left)
    unit = left / np.linalg.norm(left, axis=1, keepdims=True)
    assert peers.centring(small).rows == pytest.approx(unit, abs=1e-5)
    assert peers.all_but_the_top(small).rows @ axes[0] == pytest.approx(np.zeros(50), abs=1e-5)


def test_full_power_whitens(small: peers.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "POWERS", (1.0,))
    left = small.vectors - small.vectors.mean(axis=0)
    precision = np.linalg.inv(np.cov(left.T))
    values, axes = np.linalg.eigh(precision)
    white = left @ (axes * np.sqrt(values)) @ axes.T
    expected = white / np.linalg.norm(white, axis=1, keepdims=True)
    assert peers.whitening(small).rows == pytest.approx(expected, abs=1e-3)


def test_nudge_moves_relevant_rows_only_and_towards_their_queries(small: peers.Task) -> None:
    for method in (peers.nudge_m, peers.nudge_n):
        moved = method(small).rows
        assert moved[8:] == pytest.approx(small.vectors[8:], abs=1e-6)
        gain = ((moved - small.vectors)[:8] * small.fit.vectors).sum(axis=1)
        assert (gain >= -1e-6).all()


@pytest.mark.parametrize("method", [peers.linear_adapter, peers.two_layer_adapter])
def test_adapters_move_queries_only_and_never_choose_what_validates_worse(
    small: peers.Task,
    method: Any,  # noqa: ANN401 a function of a task
) -> None:
    moved = method(small)
    assert moved.rows is small.vectors
    assert small.validate(moved) > small.validate(peers.raw(small))
    worse = replace(small, validate=lambda moved: -float(moved is not None))
    assert method(worse).queries(small.fit.vectors) is small.fit.vectors


def cell(method: str, seed: int, after: list[float], seen: str, **more: Any) -> table.Cell:  # noqa: ANN401
    return {
        "set": "s", "encoder": "e", "method": method, "seed": seed, "measure": "nDCG@10",
        "measures": {"nDCG@10": [0.25, float(np.mean(after))], "R@100": [0.5, 0.5 + seed / 10]},
        "before": [0.0, 0.5, 0.5, 0.0], "after": after, "seen": seen,
        "late": {"before": 0.1, "after": 0.1, "ratio": 1.0 + seed},
        "gate": {"passed": seed == 1}, "fit_seconds": 4.0 * seed, "current": True, **more,
    }  # fmt: skip


def test_the_table_averages_seeds_and_strata() -> None:
    own = [
        cell("ours", 0, [0.4, 0.5, 0.7, 0.0], "1100"),
        cell("ours", 1, [0.2, 0.5, 0.9, 0.4], "1010"),
    ]
    line = next(line for line in table.table(own).splitlines() if line.startswith("| ours"))
    method, every, seen, unseen, deep, late, seconds, gate = line.strip("| ").split(" | ")
    assert method == "ours"
    assert every.startswith("0.4500 (")
    # Query 0 is seen in both seeds, 1 in the first, 2 in the second; 3 never.
    assert seen.startswith(f"{np.mean([0.3, 0.5, 0.9]):.4f}")
    assert unseen.startswith(f"{np.mean([0.5, 0.7, 0.2]):.4f}")
    assert (deep, late, seconds, gate) == ("0.5500", "1.50 ×", "2", "1 of 2")


def test_the_table_has_no_stratum_without_queries() -> None:
    line = table.table([cell("raw", 0, [0.0, 0.5, 0.5, 0.0], "1111")]).splitlines()[-1]
    assert line.split(" | ")[1:4] == ["0.2500", "0.2500", "–"]


def test_the_summary_holds_ours_against_the_others() -> None:
    found = [
        cell("raw", 0, [0.0, 0.5, 0.5, 0.0], "1100"),
        cell("NUDGE-N", 0, [0.1, 0.5, 0.5, 0.1], "1100"),
        cell("centring", 0, [0.3, 0.5, 0.5, 0.1], "1100", current=False),
        cell("ours, judged, docs", 0, [0.4, 0.8, 0.8, 0.4], "1001"),
        cell("ours, judged, docs", 1, [0.6, 1.0, 1.0, 0.6], "1001"),
    ]
    line = table.summary(found).splitlines()[-1].strip("| ").split(" | ")
    assert line[:6] == ["s (e)", "nDCG@10", "0.2500", "0.3000", "centring 0.3500 †", "**0.7000**"]
    # Over seeds the gains are .5, .4, .4 and .5; the differences to NUDGE-N .4, .4, .4 and .4.
    low, high = map(float, line[6].split(" to "))
    assert 0.4 <= low <= 0.45 <= high <= 0.5
    assert line[7:9] == ["+0.400 to +0.400", "+0.400 to +0.400"]
    assert line[9:] == ["1.50 ×", "1 of 2", "–", "–"]


def test_tables_go_between_their_marks_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- table: benchmarks/x.py -->", "<!-- end of table: x -->"
    page.write_text(f"above\n{marks[0]}\nold\n{marks[1]}\nbelow\n")
    for text in ("one", "two"):
        machine.put(page, "x", text)
        assert page.read_text() == f"above\n{marks[0]}\n{text}\n{marks[1]}\nbelow\n"
    with pytest.raises(SystemExit, match="no place for a table"):
        machine.put(page, "y", "one")
    assert "two" in page.read_text()
