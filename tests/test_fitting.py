from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judged import QUERIES, Case, make_case

import simskip_vdb as ss
from simskip_vdb import checkpoint, crossfit, fitting, gate, pipeline
from simskip_vdb.config import Signal
from simskip_vdb.datatypes import Split, silent
from simskip_vdb.fitting import _folds, _ranked, fit_or_recall
from simskip_vdb.judgments import JudgmentFiles
from simskip_vdb.measuring import learnt_from, measure
from simskip_vdb.plans import Fitted, Plan, Trial
from simskip_vdb.refiner import Refiner
from simskip_vdb.workspace import Workspace, open_workspace


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("fitting"))


def with_dev(case: Case, folder: Path) -> JudgmentFiles:
    """Name the last third of the queries as validation."""
    ids = [f"q{i}" for i in range(QUERIES)]
    vectors = np.load(case.folder / "q.npy")
    first = 2 * QUERIES // 3
    for name, part in (("fit", slice(first)), ("dev", slice(first, None))):
        np.save(folder / f"{name}.npy", vectors[part])
        (folder / f"{name}.txt").write_text("".join(f"{query}\n" for query in ids[part]))
    return replace(
        case.files,
        queries=folder / "fit.npy",
        query_ids=folder / "fit.txt",
        dev_queries=folder / "dev.npy",
        dev_query_ids=folder / "dev.txt",
        dev_qrels=case.files.qrels,
    )


def fitted(
    files: JudgmentFiles, case: Case, state: Path, *, growing: bool = False
) -> tuple[Workspace, Refiner]:
    store, judgments = ss.open_store(str(case.index)), ss.read_judgments(files)
    settings = ss.Settings(state=state, growing=growing)
    with open_workspace(store, judgments, settings, silent) as space:
        return space, fit_or_recall(space, silent)


class Killed(Exception):
    """Stands for a process that ends in the middle of a fit."""


@pytest.mark.parametrize("few", [False, True])
def test_an_interrupted_run_of_fits_goes_on_where_it_was(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(crossfit, "BELOW", QUERIES + 1 if few else 0)
    monkeypatch.setattr(gate, "MIN_QUERIES", 1)
    judgments = ss.read_judgments(case.files)

    def run(state: str, stop: int | None = None) -> tuple[str, list[tuple[str, int]]]:
        seen: list[tuple[str, int]] = []

        def watch(stage: str, done: int, total: int) -> None:
            if stage not in ("read", "search"):
                seen.append((stage, done))
            if len(seen) == stop:
                raise Killed

        settings = ss.Settings(state=tmp_path / state)
        with open_workspace(ss.open_store(str(case.index)), judgments, settings, watch) as space:
            fits = space.journal.fits
            try:
                refiner, _ = pipeline.fitted(space, watch)
            except Killed:
                assert list(fits.iterdir())
                return "", seen
            assert not fits.exists()
            return refiner.id, seen

    whole, steps = run("whole")
    stop = 2 * len(steps) // 3
    assert run("killed", stop)[1] == steps[:stop]
    resumed, rest = run("killed")
    assert resumed == whole
    assert rest == steps[stop:]  # neither is a step taken again nor left out


def test_drawn_validation_queries_are_learnt_from_once_they_have_chosen(
    case: Case, tmp_path: Path
) -> None:
    space, refiner = fitted(case.files, case, tmp_path / "state")
    queries = space.judged.queries
    assert learnt_from(refiner, queries[Split.FIT]).all()
    assert learnt_from(refiner, queries[Split.VALIDATION]).all()
    assert not learnt_from(refiner, queries[Split.TEST]).any()
    choice = refiner.info["choice"]
    assert choice["queries"] == len(queries[Split.FIT]) + len(queries[Split.VALIDATION])
    assert choice["best"] > choice["identity"]


def test_queries_named_for_validation_are_never_learnt_from(case: Case, tmp_path: Path) -> None:
    space, refiner = fitted(with_dev(case, tmp_path), case, tmp_path / "state")
    named = space.judged.queries[Split.VALIDATION]
    assert len(named) == QUERIES - 2 * QUERIES // 3
    assert not learnt_from(refiner, named).any()
    assert refiner.info["choice"]["queries"] == len(named)


def test_rows_of_learnt_validation_queries_are_seen(case: Case, tmp_path: Path) -> None:
    space, refiner = fitted(case.files, case, tmp_path / "state")
    rows = np.array([0, 1, 2])
    alone = {
        split: replace(
            judged.subset(np.arange(len(judged)) == 0),
            indptr=np.array([0, 1]),
            rows=rows[[place]],
            grades=np.ones(1, np.int32),
        )
        for place, (split, judged) in enumerate(space.judged.queries.items())
    }
    shared = replace(alone[Split.TEST], rows=alone[Split.VALIDATION].rows)
    space.judged = replace(space.judged, queries={**alone, Split.TEST: shared})
    blind = replace(refiner, fitted_on=refiner.fitted_on[:0])
    for other, stratum in ((refiner, "seen"), (blind, "unseen")):
        found = measure(space, other, Split.TEST)
        assert found is not None
        assert [name for name, value in found[0].strata.items() if value] == [stratum]


def test_folds_take_turns_and_leave_near_identical_queries_together(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, judgments = ss.open_store(str(case.index)), ss.read_judgments(case.files)
    with open_workspace(store, judgments, ss.Settings(state=tmp_path), silent) as space:
        fit, validation = (space.judged.queries[s] for s in (Split.FIT, Split.VALIDATION))
        half = len(fit) // 2
        fit.vectors[half : 2 * half] = fit.vectors[:half]
        folds = _folds(space, Signal.JUDGED)
        assert len(folds) == fitting.FOLDS - 1
        held = [name for _, part in folds for name in part.ids]
        assert sorted(held) == sorted(fit.ids)
        for rest, part in folds:
            assert set(rest.ids) == set(fit.ids + validation.ids) - set(part.ids)
            same = (part.vectors[:, None] == rest.vectors[None]).all(axis=2)
            assert not same.any()
        monkeypatch.setattr(fitting, "FEW_QUERIES", len(validation))
        assert _folds(space, Signal.JUDGED) == []


def test_the_choice_weighs_folds_by_their_queries() -> None:
    plans = [Plan(alpha=weight, beta=weight) for weight in (0.0, 0.5, 1.0)]

    def fit(*scores: float) -> Fitted:
        trials = tuple(Trial(plan=p, score=s) for p, s in zip(plans, scores, strict=True))
        return Fitted(
            whole=Refiner.identity(2),
            plan=plans[0],
            trials=trials,
            signal=Signal.JUDGED,
        )

    ranked = _ranked([fit(0.2, 0.6, 0.2), fit(0.2, 0.3, 0.5)], [10, 30])
    assert [trial.plan for trial in ranked] == [plans[2], plans[1], plans[0]]
    assert ranked[0].score == pytest.approx((0.2 * 10 + 0.5 * 30) / 40)
    assert [trial.plan for trial in _ranked([fit(0.3, 0.3, 0.3)], [5])] == plans


def test_a_growing_index_gets_the_best_refiner_that_is_fair_to_late_rows(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "FAIR_LATE_ROWS", (0.8, 1.2))  # the best refiner is outside
    best, fair = (
        fitted(case.files, case, tmp_path, growing=growing)[1].info for growing in (False, True)
    )
    assert not best["late_rows"]["fair"]
    assert fair["late_rows"]["fair"]
    gains = [info["choice"]["best"] - info["choice"]["identity"] for info in (fair, best)]
    assert 0.8 * gains[1] < gains[0] < gains[1]


def test_a_growing_index_without_a_fair_refiner_gets_the_best(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "FAIR_LATE_ROWS", (5.0, 6.0))
    best, unfair = (
        fitted(case.files, case, tmp_path, growing=growing)[1] for growing in (False, True)
    )
    assert unfair.id == best.id
    assert not unfair.info["late_rows"]["fair"]
