from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from judged import QUERIES, Case, make_case
from script import simskip

import simskip_vdb as ss
from simskip_vdb.crossfit import SPREAD
from simskip_vdb.ledger import FIRST_LEVEL, Ledger
from simskip_vdb.provable import render_power
from simskip_vdb.sample_size import TYPICAL_SPREAD


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("power"))


def power(case: Case) -> dict[str, object]:
    return ss.power(ss.open_store(str(case.index)), ss.read_judgments(case.files))


def test_before_any_look_a_typical_spread_is_taken(case: Case) -> None:
    before = case.index.read_bytes()
    found = power(case)
    assert found["look"] == 1
    assert found["level"] == FIRST_LEVEL
    assert found["spread"] == TYPICAL_SPREAD
    assert found["split"] == "test"
    assert 30 < found["judged"] == found["queries"] < QUERIES  # type: ignore[operator]
    gains = [item["gain"] for item in found["gains"]]  # type: ignore[attr-defined]
    assert gains == sorted(gains)
    needed = [item["queries"] for item in found["needed"]]  # type: ignore[attr-defined]
    assert needed == sorted(needed, reverse=True)
    assert case.index.read_bytes() == before
    assert not case.index.with_name("index.faiss.simskip").exists()
    text = render_power(found)
    assert "more than now" in text
    assert "a typical one" in text


def test_after_a_look_its_spread_counts_and_the_level_falls(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    ss.refine(ss.open_store(str(case.index)), ss.read_judgments(case.files))
    found = power(case)
    ledger = Ledger(case.index.with_name("index.faiss.simskip"))
    assert found["look"] == 2
    assert found["spread"] == ledger.spread != TYPICAL_SPREAD
    assert found["level"] < FIRST_LEVEL  # type: ignore[operator]
    assert "the last look saw" in render_power(found)


def test_the_command(case: Case) -> None:
    files = [f"--{name}" for name in ("queries", "query-ids", "qrels", "doc-ids")]
    given = [
        str(part)
        for name, option in zip(("queries", "query_ids", "qrels", "doc_ids"), files, strict=True)
        for part in (option, getattr(case.files, name))
    ]
    done = simskip("power", str(case.index), *given)
    assert done.returncode == 0, done.stderr
    assert "look 1 of this index" in done.stdout
    done = simskip("power", str(case.index), *given, "--json")
    assert json.loads(done.stdout) == power(case)


def test_few_queries_are_reckoned_as_they_would_be_cross_fitted(case: Case, tmp_path: Path) -> None:
    qrels = tmp_path / "qrels.tsv"
    lines = case.files.qrels.read_text().splitlines()  # type: ignore[union-attr]
    kept = [line for line in lines[1:] if int(line.split("\t")[0][1:]) < 60]
    qrels.write_text("\n".join([lines[0], *kept]) + "\n")
    files = replace(case.files, qrels=qrels)
    found = ss.power(ss.open_store(str(case.index)), ss.read_judgments(files))
    assert found["split"] == "cross-fitted"
    assert found["judged"] == 60
    assert found["spread"] == pytest.approx(TYPICAL_SPREAD * SPREAD)
