"""Few judged queries: every one is scored by a refiner that never saw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import judged
import numpy as np
import pytest
from judged import Case, make_case

import simskip_vdb as ss
from simskip_vdb import crossfit, training
from simskip_vdb.crossfit import BELOW, FOLDS, SPREAD
from simskip_vdb.durable import sha256_of
from simskip_vdb.ledger import FIRST_LEVEL, Ledger
from simskip_vdb.report import Report, render
from simskip_vdb.rows import row_digests
from simskip_vdb.splits import deal, near_identical
from simskip_vdb.statistics import compare

FEW = 140


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Case]:
    """Make a case with too few queries to be split."""
    monkeypatch.setattr(judged, "QUERIES", FEW)
    return make_case


def refine(case: Case, files: ss.JudgmentFiles | None = None, **settings: Any) -> Report:  # noqa: ANN401
    judgments = ss.read_judgments(files or case.files)
    return ss.refine(ss.open_store(str(case.index)), judgments, ss.Settings(**settings))


def test_few_queries_prove_a_gain_and_the_refiner_of_all_is_written(
    few: Callable[..., Case], tmp_path: Path
) -> None:
    case = few(tmp_path)
    before = sha256_of(case.index)
    report = refine(case)
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons
    assert report.split == "cross-fitted"
    assert report.measures["nDCG@10"]["queries"] == FEW
    assert report.queries == {"fit": FEW, "validation": 0, "test": 0}
    assert any("cross-fitted" in note for note in report.notes)
    assert "cross-fitted queries, look 1" in render(report.to_dict())
    assert report.late_rows is not None
    assert report.refiner is not None
    written = ss.Refiner.load(report.refiner["path"])
    queries = np.load(tmp_path / "q.npy").astype(np.float32)
    assert np.isin(row_digests(queries), written.fitted_on).all()
    again = refine(case).written
    assert again is not None
    assert (again["rows"], again["mode"]) == (0, "none")
    ss.rollback(ss.open_store(str(case.index)))
    assert sha256_of(case.index) == before


def test_no_query_is_scored_by_a_refiner_that_saw_it(
    few: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[set[str]] = []
    fit = training.fit_refiner

    def spy(problem: Any, *rest: Any, **more: Any) -> Any:  # noqa: ANN401
        learnt.append(set(problem.queries.ids))
        return fit(problem, *rest, **more)

    found: list[crossfit.CrossFit] = []
    measure = crossfit.measure_cross_fit

    def keep(space: Any, crossed: crossfit.CrossFit) -> Any:  # noqa: ANN401
        found.append(crossed)
        return measure(space, crossed)

    monkeypatch.setattr(training, "fit_refiner", spy)
    monkeypatch.setattr("simskip_vdb.pipeline.measure_cross_fit", keep)
    refine(few(tmp_path))
    (crossed,) = found
    names = np.array(crossed.queries.ids)
    assert sorted(names) == sorted(f"q{i}" for i in range(FEW))
    assert len(crossed.refiners) == FOLDS
    for number in range(FOLDS):
        own = set(names[crossed.fold == number])
        chosen, fitted = learnt[2 * number : 2 * number + 2]
        assert own
        assert not own & (chosen | fitted)
        assert chosen < fitted == set(names) - own
    assert learnt[-1] == set(names)


def test_judgments_drawn_by_lot_are_refused(few: Callable[..., Case], tmp_path: Path) -> None:
    case = few(tmp_path, gain=False)
    before = sha256_of(case.index)
    report = refine(case)
    assert report.gate is not None
    assert not report.gate.passed
    assert sha256_of(case.index) == before


def test_the_same_queries_with_another_seed_are_another_look(
    few: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossfit, "SPREAD", 50.0)  # nothing passes
    case = few(tmp_path)
    looks = []
    for seed in (0, 0, 1):
        report = refine(case, fit=ss.FitSettings(seed=seed, steps=10))
        assert report.gate is not None
        assert not report.gate.passed
        looks.append(report.gate.look)
    assert looks == [1, 1, 2]
    ledger = Ledger(case.index.with_name("index.faiss.simskip"))
    assert ledger.looks == 2


def test_sets_that_were_given_are_never_cross_fitted(
    few: Callable[..., Case], tmp_path: Path
) -> None:
    case, other = few(tmp_path / "case"), few(tmp_path / "other", seed=1)
    for name in ("q.txt", "qrels.tsv"):
        text = (other.folder / name).read_text()
        (other.folder / name).write_text(text.replace("q", "t").replace("tuery", "query"))
    test = other.files
    files = replace(
        case.files,
        test_queries=test.queries,
        test_query_ids=test.query_ids,
        test_qrels=test.qrels,
    )
    report = refine(case, files)
    assert report.split == "test"
    assert report.measures["nDCG@10"]["queries"] == FEW


def test_enough_queries_are_split(tmp_path: Path) -> None:
    assert judged.QUERIES >= BELOW
    assert refine(make_case(tmp_path)).split == "test"


def test_a_dry_run_reads_no_test_query(few: Callable[..., Case], tmp_path: Path) -> None:
    case = few(tmp_path)
    assert refine(case, dry_run=True).split == "validation"
    assert ss.status(ss.open_store(str(case.index)))["looks"] == 0


def test_folds_are_even_and_keep_near_identical_queries_together() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    vectors = np.concatenate([vectors, vectors[:10] * 2])
    ids = [f"q{i}" for i in range(50)]
    fold = deal(ids, near_identical(vectors), FOLDS, 3)
    assert (fold[:10] == fold[40:]).all()
    assert np.bincount(fold[:40]).tolist() == [8] * FOLDS
    shuffled = rng.permutation(50)
    again = deal([ids[i] for i in shuffled], near_identical(vectors[shuffled]), FOLDS, 3)
    assert (again == fold[shuffled]).all()
    assert (deal(ids, near_identical(vectors), FOLDS, 4) != fold).any()


def test_spread_intervals_are_half_as_wide_again() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random(120), rng.random(120) + 0.2
    plain, spread = (compare(before, after, FIRST_LEVEL, 0, stretch=s) for s in (1, SPREAD))
    for name in ("queries", "wins", "ties", "losses"):
        assert getattr(spread, name) == getattr(plain, name)
    assert (spread.before, spread.after) == pytest.approx((plain.before, plain.after))
    assert spread.delta == pytest.approx(plain.delta)
    for one, other in ((plain.ci95, spread.ci95), (plain.interval, spread.interval)):
        assert one is not None
        assert other is not None
        assert other[1] - other[0] == pytest.approx(1.5 * (one[1] - one[0]), rel=0.02)
    assert plain.p is not None
    assert spread.p is not None
    assert spread.p > plain.p
