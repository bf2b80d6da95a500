from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import change, flat, ivf, random_refiner
from judged import QUERIES, ROWS, Case, make_case
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb.config import Signal
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.addresses import address_of
from simskip_vdb.datatypes import Metric, Side, Split
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import ConfigError, DataError, JournalError
from simskip_vdb.journal import Journal
from simskip_vdb.ledger import PROMISING, WEALTH, share
from simskip_vdb.report import Report, render
from simskip_vdb.store import VectorStore


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Report, str]:
    """A case that was refined, with its report and the SHA-256 from before."""
    case = make_case(tmp_path_factory.mktemp("refined"))
    before = sha256_of(case.index)
    return case, refine(case), before


@pytest.fixture
def copy(refined: tuple[Case, Report, str], tmp_path: Path) -> tuple[Case, Report, str]:
    """The refined case, to do with as a test likes."""
    case, report, before = refined
    folder = tmp_path / "case"
    shutil.copytree(case.folder, folder)
    return moved(case, folder), report, before


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Report, str]:
    """A case whose judgments are drawn by lot."""
    case = make_case(tmp_path_factory.mktemp("hopeless"), gain=False)
    before = sha256_of(case.index)
    return case, refine(case), before


def moved(case: Case, folder: Path) -> Case:
    names = {name: Path(str(getattr(case.files, name))).name for name in vars_of(case.files)}
    return replace(
        case,
        folder=folder,
        index=folder / case.index.name,
        files=ss.JudgmentFiles(**{name: folder / file for name, file in names.items()}),
        labels=ss.JudgmentFiles(labels=folder / "labels.tsv"),
    )


def vars_of(files: ss.JudgmentFiles) -> Iterator[str]:
    return (name for name in files.__slots__ if getattr(files, name) is not None)


def refine(case: Case, settings: ss.Settings | None = None) -> Report:
    return ss.refine(open_(case), ss.read_judgments(case.files), settings)


def open_(case: Case) -> VectorStore:
    return ss.open_store(str(case.index))


def test_pruning_for_good_leaves_the_rows_way_back(copy: tuple[Case, Report, str]) -> None:
    case, _, _ = copy
    (kept,) = [file for file in Path(f"{case.index}.simskip").glob("kept-*")]
    assert ss.prune(open_(case))["removed"] == []
    done = ss.prune(open_(case), final=True)
    assert done["removed"] == [kept.name]
    assert not kept.exists()
    undone = ss.rollback(open_(case))
    assert (undone["restored"], undone["kept"]) == (ROWS, 0)


def test_a_service_checks_the_refiner_of_a_file(refined: tuple[Case, Report, str]) -> None:
    case, report, _ = refined
    assert report.refiner is not None
    folder = Path(f"{case.index}.simskip") / "refiners" / str(report.refiner["id"])
    ss.Refiner.load(folder).check(open_(case))
    with pytest.raises(ConfigError, match="load the refiner that wrote it"):
        random_refiner(16, np.arange(4)).check(open_(case))


def test_a_gain_is_found_proven_and_written(refined: tuple[Case, Report, str]) -> None:
    case, report, before = refined
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons
    assert report.exit_code == 0
    found = report.measures["nDCG@10"]
    assert found["after"] > found["before"] + 0.01
    assert found["ci95"][0] > 0
    assert found["p"] <= 0.0125
    assert found["wins"] + found["ties"] + found["losses"] == found["queries"]
    assert report.written is not None
    assert (report.written["rows"], report.written["mode"]) == (ROWS, "in-place")
    assert sha256_of(case.index) != before


def test_the_report_has_what_the_command_line_promises(
    refined: tuple[Case, Report, str],
) -> None:
    data = refined[1].to_dict()
    names = "schema index rows dim metric side refiner measures strata late_rows ann_recall gate"
    assert {*names.split(), "written", "seconds"} <= data.keys()
    assert data["schema"] == 1
    assert {"id", "path", "alpha", "beta"} <= data["refiner"].keys()
    names = "before after delta ci95 p wins ties losses"
    assert all({*names.split()} <= found.keys() for found in data["measures"].values())
    assert data["measures"].keys() >= {"nDCG@10", "R@10", "R@100", "RR@10"}
    assert data["strata"].keys() == {"seen", "unseen"}
    assert {"before", "after", "fair", "rule"} <= data["late_rows"].keys()
    assert {"passed", "look", "reasons"} <= data["gate"].keys()
    assert json.loads(json.dumps(data, allow_nan=False)) == json.loads(json.dumps(data))


def test_queries_are_split_and_test_is_looked_at_once(refined: tuple[Case, Report, str]) -> None:
    case, report, _ = refined
    assert sum(report.queries.values()) == QUERIES
    assert report.queries["fit"] > report.queries["validation"] > 30
    ledger = json.loads((case.folder / "index.faiss.simskip" / "ledger.json").read_text())
    (look,) = ledger["looks"]
    assert look["queries"] == report.queries["test"]
    assert look["earned"]
    assert len(ledger["first"]) == 2 * report.queries["test"]


def test_the_index_serves_the_refined_vectors(refined: tuple[Case, Report, str]) -> None:
    case, report, _ = refined
    assert report.refiner is not None
    refiner = ss.Refiner.load(report.refiner["path"])
    originals = make_case(case.folder.parent / "again")
    raw = {
        int(i): v
        for batch in open_(originals).scan(50)
        for i, v in zip(batch.ids, batch.vectors, strict=True)
    }
    for batch in open_(case).scan(64):
        expected = refiner.refine_rows(np.stack([raw[int(i)] for i in batch.ids]), batch.ids)
        np.testing.assert_allclose(batch.vectors, expected, atol=1e-6)
    shown = report.through_index["nDCG@10"]
    assert shown["after"] > shown["before"]


def test_the_same_command_again_has_nothing_to_do(copy: tuple[Case, Report, str]) -> None:
    case = copy[0]
    sha = sha256_of(case.index)
    report = refine(case)
    assert report.exit_code == 0
    assert report.written is not None
    assert report.written["mode"] == "none"
    assert "nothing to do" in report.notes[0]
    assert sha256_of(case.index) == sha
    assert ss.status(open_(case))["looks"] == 1


def test_rollback_restores_the_very_file(copy: tuple[Case, Report, str]) -> None:
    case, _, before = copy
    done = ss.rollback(open_(case))
    assert done["exact"]
    assert done["sha256"] == before == sha256_of(case.index)
    assert ss.status(open_(case))["refined"] is None


def test_status_tells_what_was_gained(copy: tuple[Case, Report, str]) -> None:
    case, report, _ = copy
    status = ss.status(open_(case))
    refined = status["refined"]
    assert refined["refiner"] == report.refiner["id"]  # type: ignore[index]
    assert refined["after"] == report.measures["nDCG@10"]["after"]
    assert status["undo"] == f"simskip rollback faiss:{case.index}"
    assert not status["changed_since"]
    change(case.index, lambda index: index.add_with_ids(np.ones((1, 16), "f4"), np.array([10**6])))
    assert ss.status(open_(case))["changed_since"]


def test_a_second_refinement_is_measured_against_the_first(copy: tuple[Case, Report, str]) -> None:
    case, report, before = copy
    again = refine(case, ss.Settings(fit=ss.FitSettings(seed=1)))
    found = again.measures["nDCG@10"]
    assert again.gate is not None
    if again.split == "test":
        assert found["before"] == pytest.approx(report.measures["nDCG@10"]["after"])
        assert again.gate.look == 2
        assert (
            found["level"] == again.gate.level == pytest.approx((1 - PROMISING) * WEALTH * share(2))
        )
    ss.rollback(open_(case))
    assert sha256_of(case.index) == before


def test_chance_is_refused_and_every_byte_stays(hopeless: tuple[Case, Report, str]) -> None:
    case, report, before = hopeless
    assert report.gate is not None
    assert not report.gate.passed
    assert report.gate.reasons
    assert report.exit_code == 3
    assert sha256_of(case.index) == before
    assert report.written is not None
    assert report.written["mode"] == "none"
    state = case.folder / "index.faiss.simskip"
    assert not [*state.glob("originals*"), *state.glob("kept*")]
    assert "refused" in render(report.to_dict())


def test_evaluate_reads_validation_unless_told(copy: tuple[Case, Report, str]) -> None:
    case, report, _ = copy
    ss.rollback(open_(case))
    folder = Path(report.refiner["path"])  # type: ignore[index]
    refiner = case.folder / "index.faiss.simskip" / "refiners" / folder.name
    settings = ss.Settings(refiner=refiner)
    judgments = ss.read_judgments(case.files)
    on_validation = ss.evaluate(open_(case), judgments, settings)
    assert on_validation.split == "validation"
    assert ss.status(open_(case))["looks"] == 1
    on_test = ss.evaluate(open_(case), judgments, settings, on=Split.TEST)
    assert on_test.measures["nDCG@10"]["after"] == pytest.approx(
        report.measures["nDCG@10"]["after"]
    )
    assert ss.status(open_(case))["looks"] == 1  # the same refiner on the same queries
    identity = ss.Refiner.identity(16, metric=Metric.DOT)
    identity.save(case.folder / "identity")
    ss.evaluate(
        open_(case), judgments, ss.Settings(refiner=case.folder / "identity"), on=Split.TEST
    )
    assert ss.status(open_(case))["looks"] == 1  # it has no gain to prove


def test_dry_run_touches_nothing(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    random_refiner(16, np.arange(0, 10_000, 2)).save(tmp_path / "refiner")
    names = sorted(p.name for p in case.folder.iterdir())
    before = sha256_of(case.index)
    settings = ss.Settings(refiner=tmp_path / "refiner", dry_run=True)
    report = refine(case, settings)
    assert report.forecast is not None
    assert report.forecast["rows"] == ROWS
    assert report.forecast["originals_bytes"] >= ROWS * 16 * 4
    assert len(report.forecast["samples"]) == 5
    assert report.split == "validation"
    assert sorted(p.name for p in case.folder.iterdir()) == names
    assert sha256_of(case.index) == before


def test_a_dry_run_saves_no_row_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path / "case")
    report = refine(case, ss.Settings(out=tmp_path / "fitted"))
    ss.rollback(open_(case))

    def saved(self: Journal, stem: str, *_: object) -> None:
        raise AssertionError(f"{stem} saved in {self.folder}")

    monkeypatch.setattr(Journal, "_save_rows", saved)
    tried = refine(case, ss.Settings(dry_run=True))
    assert tried.refiner is not None
    assert report.refiner is not None
    assert tried.refiner["id"] == report.refiner["id"]


def test_a_service_finds_the_state_that_was_put_elsewhere(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    refine(case, ss.Settings(out=tmp_path / "fitted", state=tmp_path / "state"))
    ss.Refiner.load(tmp_path / "fitted").check(open_(case))
    (tmp_path / "state").rename(tmp_path / "gone")
    with pytest.raises(JournalError, match="is gone from there"):
        ss.Refiner.load(tmp_path / "fitted").check(open_(case))


@pytest.mark.parametrize("kind", ["faiss", "parquet"])
def test_a_copy_is_known_by_its_own_address(tmp_path: Path, kind: str) -> None:
    path, output = tmp_path / "50%_off", tmp_path / "50%_better"
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    uris = [f"faiss:{path}", f"faiss:{output}"]
    if kind == "faiss":
        ivf(path, np.arange(300), vectors)
    else:
        write_rows(path, np.arange(300), vectors)
        uris = [address_of("parquet", str(place), {"metric": "dot"}) for place in (path, output)]
    refiner = random_refiner(16, np.arange(300), side=Side.BOTH)
    refiner.save(tmp_path / "both")
    settings = ss.Settings(refiner=tmp_path / "both", accept_unmeasured=True, output=output)
    ss.refine(open_store(uris[0]), ss.Judgments(), settings)
    copy = open_store(uris[1])
    told = json.loads((tmp_path / "50%_better.simskip" / "manifest.json").read_bytes())
    assert (told["index"], told["copy_of"]) == (uris[1], uris[0])
    assert ss.status(copy)["copy_of"] == uris[0]
    refiner.check(copy)
    with pytest.raises(ConfigError, match="is a refined copy of"):
        ss.refine(copy, ss.Judgments(), replace(settings, output=tmp_path / "third"))


def test_what_was_not_measured_is_not_written_unless_asked(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    ids = np.concatenate([batch.ids for batch in open_(case).scan(100)])
    random_refiner(16, ids).save(tmp_path / "refiner")
    before = sha256_of(case.index)
    settings = ss.Settings(refiner=tmp_path / "refiner")
    report = ss.refine(open_(case), ss.Judgments(), settings)
    assert report.exit_code == 3
    assert "nothing was measured" in report.gate.reasons[0]  # type: ignore[union-attr]
    assert sha256_of(case.index) == before
    report = ss.refine(open_(case), ss.Judgments(), replace(settings, accept_unmeasured=True))
    assert report.exit_code == 0
    assert report.gate is not None
    assert report.gate.unmeasured
    assert sha256_of(case.index) != before
    assert ss.status(open_(case))["refined"]["evidence"] == "unmeasured"
    ss.rollback(open_(case))
    assert sha256_of(case.index) == before


def test_accept_unmeasured_does_not_override_a_measured_refusal(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    ids = np.concatenate([batch.ids for batch in open_(case).scan(100)])
    random_refiner(16, ids).save(tmp_path / "refiner")
    before = sha256_of(case.index)
    report = refine(case, ss.Settings(refiner=tmp_path / "refiner", accept_unmeasured=True))
    assert report.exit_code == 3
    assert sha256_of(case.index) == before


def test_side_both_writes_a_copy_that_is_never_refined_again(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    before = sha256_of(case.index)
    output = tmp_path / "better.faiss"
    with pytest.raises(ConfigError, match="--output"):
        refine(case, ss.Settings(fit=ss.FitSettings(side=Side.BOTH)))
    report = refine(case, ss.Settings(fit=ss.FitSettings(side=Side.BOTH), output=output))
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons
    assert sha256_of(case.index) == before
    assert report.written is not None
    assert report.written["mode"] == "copy"
    better = ss.open_store(str(output))
    assert report.refiner is not None
    beside = output.with_name("better.faiss.simskip")
    refiner = ss.Refiner.load(beside / "refiners" / report.refiner["id"])
    asked = np.load(case.folder / "q.npy").astype(np.float32)
    assert not np.allclose(refiner(asked), asked, atol=1e-3)
    assert better.info().count == ROWS
    assert ss.status(better)["copy_of"] == f"faiss:{case.index}"
    with pytest.raises(ConfigError, match="never refined again"):
        ss.refine(better, ss.read_judgments(case.files))
    with pytest.raises(ConfigError, match="delete the copy"):
        ss.rollback(better)


def test_groups_that_are_too_few_to_prove_anything_are_not_fitted(tmp_path: Path) -> None:
    flat(tmp_path / "index", np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32))
    (tmp_path / "labels").write_text("a\nb\n" * 6)
    given = ss.read_judgments(ss.JudgmentFiles(labels=tmp_path / "labels"))
    report = ss.refine(open_store(str(tmp_path / "index")), given)
    assert report.refiner is None
    assert report.gate is not None
    assert "label more rows" in report.gate.reasons[0]


def test_groups_need_no_queries(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    report = ss.fit(open_(case), ss.read_judgments(case.labels))
    assert report.measure == "Rprec"
    assert report.queries["fit"] == 0
    assert report.queries["validation"] > 30
    assert report.group_overlap is not None
    assert report.split == "validation"
    assert report.refiner is not None
    settings = ss.Settings(refiner=Path(report.refiner["path"]))
    again = ss.evaluate(open_(case), ss.read_judgments(case.labels), settings)
    assert again.measures["Rprec"]["after"] == report.measures["Rprec"]["after"]
    assert any("learnt from the validation queries" in note for note in again.notes)
    assert not again.through_index


@pytest.mark.parametrize("signal", [Signal.NEIGHBOURS, Signal.AUGMENT])
def test_label_free_fits_are_measured_by_judgments(tmp_path: Path, signal: Signal) -> None:
    case = make_case(tmp_path / "case")
    settings = ss.Settings(fit=ss.FitSettings(signal=signal))
    report = ss.fit(open_(case), ss.read_judgments(case.files), settings)
    assert report.split == "validation"
    assert report.measures["nDCG@10"]["after"] >= report.measures["nDCG@10"]["before"]


def test_without_judgments_a_fit_is_refused_by_the_gate(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    before = sha256_of(case.index)
    report = ss.refine(open_(case), ss.Judgments())
    assert report.exit_code == 3
    assert "nothing was measured" in report.gate.reasons[0]  # type: ignore[union-attr]
    assert sha256_of(case.index) == before


def test_bad_rows_stay_and_are_counted(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    zero = np.zeros((2, 16), np.float32)
    change(case.index, lambda index: index.add_with_ids(zero, np.array([10**6, 10**6 + 1])))
    random_refiner(16, np.arange(10_000)).save(tmp_path / "refiner")
    settings = ss.Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)
    report = ss.refine(open_(case), ss.Judgments(), settings)
    assert report.written is not None
    assert (report.written["rows"], report.written["skipped"]) == (ROWS, 2)
    assert any("2 rows are NaN" in note for note in report.notes)
    assert not open_(case).fetch(np.array([10**6])).any()


def test_a_refiner_for_another_index_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    random_refiner(8, np.arange(10)).save(tmp_path / "refiner")
    with pytest.raises(ConfigError, match="8 dimensions"):
        refine(case, ss.Settings(refiner=tmp_path / "refiner"))


def test_queries_of_another_dimension_are_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    np.save(case.folder / "q.npy", np.ones((QUERIES, 8), np.float32))
    before = sha256_of(case.index)
    with pytest.raises(DataError, match="8"):
        refine(case)
    assert sha256_of(case.index) == before


def test_a_fit_is_reproducible(refined: tuple[Case, Report, str], tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    report = ss.fit(open_(case), ss.read_judgments(case.files))
    assert report.refiner is not None
    assert refined[1].refiner is not None
    assert report.refiner["id"] == refined[1].refiner["id"]


def test_a_foreign_ledger_does_not_go_unnoticed(copy: tuple[Case, Report, str]) -> None:
    case = copy[0]
    (case.folder / "index.faiss.simskip" / "ledger.json").write_text("[]")
    with pytest.raises(JournalError, match=r"ledger\.json"):
        refine(case)
