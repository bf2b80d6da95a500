"""Sides: queries refined for an index that nobody writes, and the side that validates best."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import Case, make_case

import simskip_vdb as ss
from simskip_vdb import pipeline
from simskip_vdb.cli import main
from simskip_vdb.errors import ConfigError
from simskip_vdb.jobs import read_jobs
from simskip_vdb.refiner import Refiner
from simskip_vdb.wrappers.onnx import export_onnx


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The command as a person calls it."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Return what it prints."""
        self.monkeypatch.setattr(sys, "argv", ["simskip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        assert ended.value.code == code, err
        return out or err

    def refine(self, case: Case, state: Path, *options: object, code: int = 0) -> dict[str, Any]:
        """Return the report."""
        arguments = ["refine", case.index, *case.options, "--state", state, "--json", *options]
        found: dict[str, Any] = json.loads(self(*arguments, code=code))
        return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch=monkeypatch, capsys=capsys)


def no_fit(*_: object) -> None:
    raise AssertionError("fitted")


def test_queries_alone_gain_and_the_index_stays_as_it_is(
    case: Case, tmp_path: Path, run: Run
) -> None:
    before = case.index.read_bytes()
    case.index.chmod(0o444)
    report = run.refine(case, tmp_path, "--side", "queries", "--out", str(tmp_path / "refiner"))
    assert case.index.read_bytes() == before
    assert report["gate"]["passed"]
    assert report["written"]["rows"] == 0
    assert report["side"] == "queries"
    chosen = report["measures"]["nDCG@10"]
    assert chosen["after"] > chosen["before"] + 0.03
    through = report["through_index"]["nDCG@10"]
    assert through["after"] > through["before"]
    refiner = Refiner.load(tmp_path / "refiner")
    refiner.check(ss.open_store(str(case.index)))
    rows = np.random.default_rng(0).normal(size=(9, refiner.dim)).astype(np.float32)
    assert refiner.refine_rows(rows, np.arange(9)) is rows
    assert (refiner(rows) != rows).any(axis=1).all()
    export_onnx(refiner, tmp_path / "refiner.onnx")  # compares the two


def test_it_is_said_what_to_do_with_queries(case: Case, tmp_path: Path, run: Run) -> None:
    said = run("refine", case.index, *case.options, "--state", tmp_path, "--side", "queries")
    assert "pass queries through the refiner: Refiner.load(" in said
    assert "the index stays as it is" in said
    run("status", case.index, "--state", tmp_path)


def test_nothing_to_learn_leaves_queries_as_they_are(tmp_path: Path, run: Run) -> None:
    made = make_case(tmp_path / "case", gain=False)
    report = run.refine(made, tmp_path / "state", "--side", "queries", code=3)
    assert not report["gate"]["passed"]


def test_auto_takes_the_side_that_validates_best_and_tells_of_all(
    case: Case, tmp_path: Path, run: Run
) -> None:
    report = run.refine(case, tmp_path / "state", "--side", "auto", "--dry-run")
    (note,) = (note for note in report["notes"] if "to choose by" in note)
    for side in ("docs", "queries", "both"):
        assert re.search(rf"{side} [01]\.\d{{4}}", note)
    assert re.search(rf"{report['side']} [01]\.\d{{4}} \(chosen\)", note)
    assert note.count("(chosen)") == 1
    assert report["side"] != "both"  # for which there is no place
    output = tmp_path / "better.faiss"
    with_copy = run.refine(case, tmp_path / "other", "--side", "auto", "--output", str(output))
    assert with_copy["side"] in ("queries", "both")
    assert output.is_file() == (with_copy["side"] == "both")


@pytest.mark.parametrize("option", [("--output", "new.faiss"), ("--mode", "new-vector")])
def test_queries_alone_have_nothing_to_write(
    case: Case, tmp_path: Path, run: Run, option: tuple[str, str]
) -> None:
    found = run.refine(case, tmp_path, "--side", "queries", *option, code=2)
    assert "side queries writes no vectors" in found["error"]["message"]


def test_refined_rows_and_refined_queries_are_not_mixed(tmp_path: Path, run: Run) -> None:
    made = make_case(tmp_path / "case")
    arguments = ["refine", made.index, *made.options]
    run("fit", *arguments[1:], "--side", "queries", "--out", tmp_path / "queries")
    run(*arguments)
    assert "simskip rollback" in run(*arguments, "--side", "queries", code=2)
    assert "simskip rollback" in run(
        *("evaluate", made.index, *made.options, "--refiner", tmp_path / "queries"), code=2
    )
    with pytest.raises(ConfigError, match="as they were"):
        Refiner.load(tmp_path / "queries").check(ss.open_store(str(made.index)))


def test_a_job_has_no_side_that_writes_nothing(case: Case, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "jobs.toml"
    path.write_text(f'[jobs.one]\nindex = "faiss:{case.index}"\nside = "queries"\n')
    with pytest.raises(ConfigError, match="docs"):
        read_jobs(path)


def test_few_test_queries_are_told_before_the_fit(
    case: Case, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, lines = np.load(str(case.files.queries)), Path(str(case.files.qrels)).read_text()
    head, *judged = lines.splitlines()
    for name, part in (("few", range(20)), ("rest", range(20, len(vectors)))):
        np.save(tmp_path / f"{name}.npy", vectors[part])
        (tmp_path / f"{name}.txt").write_text("".join(f"q{i}\n" for i in part))
        own = [line for line in judged if int(line.split("\t")[0][1:]) in part]
        (tmp_path / f"{name}.tsv").write_text("\n".join([head, *own]) + "\n")
    monkeypatch.setattr(pipeline, "fit_or_recall", no_fit)
    monkeypatch.setattr(pipeline, "cross_fit", no_fit)
    arguments = ["refine", case.index, "--doc-ids", case.files.doc_ids, "--state", tmp_path / "s"]
    for prefix, name in (("--", "rest"), ("--test-", "few")):
        for option, ending in (("queries", "npy"), ("query-ids", "txt"), ("qrels", "tsv")):
            arguments += [f"{prefix}{option}", tmp_path / f"{name}.{ending}"]
    assert "only 20 test queries" in run(*arguments, code=3)
