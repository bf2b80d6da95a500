"""Nothing passes the gate on what a refiner learnt from, and nothing is looked at for free."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import change, ivf, random_refiner
from judged import QUERIES, make_case
from script import simskip, simskip_json

import simskip_vdb as ss
from simskip_vdb.datatypes import Side, Split
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import ConfigError, DataError, JournalError
from simskip_vdb.ledger import Ledger
from simskip_vdb.rows import row_digests


def test_a_refiner_proves_nothing_on_queries_that_it_learnt_from(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", gain=False)
    elsewhere = tmp_path / "copy.faiss"
    shutil.copy(case.index, elsewhere)
    other = make_case(tmp_path / "other", seed=1, gain=False)
    for name in ("q.txt", "qrels.tsv"):
        file = other.folder / name
        file.write_text("".join(f"dev-{line}\n" for line in file.read_text().splitlines()))
    text = (other.folder / "qrels.tsv").read_text().removeprefix("dev-")
    (other.folder / "qrels.tsv").write_text(text)
    # Fitted elsewhere on all queries, a fifth of which this index would test by.
    files = replace(
        case.files,
        dev_queries=other.folder / "q.npy",
        dev_query_ids=other.folder / "q.txt",
        dev_qrels=other.folder / "qrels.tsv",
        test_queries=other.folder / "q.npy",
        test_query_ids=tmp_path / "t.txt",
        test_qrels=tmp_path / "t.tsv",
    )
    for name, target in (("q.txt", "t.txt"), ("qrels.tsv", "t.tsv")):
        text = (other.folder / name).read_text().replace("dev-", "test-")
        (tmp_path / target).write_text(text)
    out = tmp_path / "refiner"
    ss.fit(ss.open_store(str(elsewhere)), ss.read_judgments(files), ss.Settings(out=out))
    learnt = ss.Refiner.load(out)
    assert len(learnt.fitted_on) > QUERIES / 2
    alpha = replace(learnt, alpha=1.0, beta=1.0) if learnt.layers else learnt
    alpha.save(tmp_path / "strong")
    before = sha256_of(case.index)
    judgments = ss.read_judgments(case.files)
    store, settings = ss.open_store(str(case.index)), ss.Settings(refiner=tmp_path / "strong")
    with pytest.raises(DataError, match="learnt from all"):
        ss.refine(store, judgments, settings)
    assert sha256_of(case.index) == before
    assert ss.status(store)["looks"] == 0


def test_held_out_rows_were_not_learnt_from(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    judgments = ss.read_judgments(case.labels)
    report = ss.fit(ss.open_store(str(case.index)), judgments)
    assert report.refiner is not None
    refiner = ss.Refiner.load(report.refiner["path"])
    settings = ss.Settings(refiner=Path(report.refiner["path"]))
    tested = ss.evaluate(ss.open_store(str(case.index)), judgments, settings, on=Split.TEST)
    assert tested.measures["Rprec"]["queries"] == tested.queries["test"]
    assert not tested.notes
    # A refiner that learnt from every row has nothing left to be tested on.
    rows = np.concatenate([b.vectors for b in ss.open_store(str(case.index)).scan(100)])
    replace(refiner, fitted_on=np.unique(row_digests(rows))).save(tmp_path / "all")
    with pytest.raises(DataError, match="learnt from all"):
        ss.evaluate(
            ss.open_store(str(case.index)),
            judgments,
            ss.Settings(refiner=tmp_path / "all"),
            on=Split.TEST,
        )


def test_equal_rows_do_not_straddle_fit_and_test(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=(100, 8)).astype(np.float32)
    vectors = np.repeat(base, 3, axis=0)
    index = ivf(tmp_path / "x.faiss", np.arange(300), vectors)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{i % 100 // 10}\n" for i in range(300)))
    judgments = ss.read_judgments(ss.JudgmentFiles(labels=labels))
    report = ss.fit(ss.open_store(str(index)), judgments)
    assert report.refiner is not None
    refiner = ss.Refiner.load(report.refiner["path"])
    splits = Ledger(index.with_name("x.faiss.simskip")).splits
    held = [int(name.removeprefix("row:")) for name, split in splits.items() if split == "test"]
    assert len(held) > 30
    assert not np.isin(row_digests(vectors[held]), refiner.fitted_on).any()


def test_evaluate_measures_what_the_index_holds(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    ids = np.concatenate([b.ids for b in ss.open_store(str(case.index)).scan(100)])
    random_refiner(16, ids).save(tmp_path / "refiner")
    ss.refine(
        ss.open_store(str(case.index)),
        ss.Judgments(),
        ss.Settings(refiner=tmp_path / "refiner", accept_unmeasured=True),
    )
    raw = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32)
    change(case.index, lambda index: index.add_with_ids(raw, np.arange(20_000, 20_200)))
    report = ss.evaluate(ss.open_store(str(case.index)), ss.read_judgments(case.files))
    # Every list is probed, so the index finds what exact search finds.
    assert report.ann_recall is not None
    assert report.ann_recall["after"] == 1
    exact = report.measures["nDCG@10"]["after"]
    assert report.through_index["nDCG@10"]["after"] == pytest.approx(exact)


def test_a_typo_in_search_params_costs_no_look(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    random_refiner(16, np.arange(10_000)).save(tmp_path / "refiner")
    command = ("refine", case.index, *case.options, "--refiner", tmp_path / "refiner")
    done = simskip(*command, "--search-params", "nprob=4")
    assert done.returncode == 2
    assert simskip_json("status", case.index)["looks"] == 0


def test_outputs_are_checked_before_the_fit(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    store, judgments = ss.open_store(str(case.index)), ss.read_judgments(case.files)
    both = ss.FitSettings(side=Side.BOTH)
    with pytest.raises(ConfigError, match="no folder"):
        ss.refine(store, judgments, ss.Settings(fit=both, output=tmp_path / "no" / "o.faiss"))
    with pytest.raises(ConfigError, match="is a file"):
        ss.fit(store, judgments, ss.Settings(out=case.index))
    assert not (case.folder / "index.faiss.simskip").exists()


def test_a_state_elsewhere_is_found_again(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    random_refiner(16, np.arange(10_000)).save(tmp_path / "refiner")
    before = sha256_of(case.index)
    command = ("refine", case.index, "--refiner", tmp_path / "refiner", "--accept-unmeasured")
    simskip_json(*command, "--state", tmp_path / "state")
    refined = sha256_of(case.index)
    again = simskip_json(*command)
    assert again["written"]["mode"] == "none"
    assert sha256_of(case.index) == refined
    done = simskip(*command, "--state", tmp_path / "third")
    assert done.returncode == 2
    assert str(tmp_path / "state") in done.stderr
    assert simskip_json("rollback", case.index)["sha256"] == before
    assert not (case.folder / "index.faiss.simskip").exists()


def test_a_state_that_is_gone_is_missed(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    random_refiner(16, np.arange(10_000)).save(tmp_path / "refiner")
    settings = ss.Settings(
        refiner=tmp_path / "refiner", accept_unmeasured=True, state=tmp_path / "state"
    )
    ss.refine(ss.open_store(str(case.index)), ss.Judgments(), settings)
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(JournalError, match="is gone"):
        ss.refine(ss.open_store(str(case.index)), ss.Judgments(), replace(settings, state=None))


def test_a_copy_does_not_overwrite_the_state_of_a_refined_index(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    random_refiner(16, np.arange(10_000)).save(tmp_path / "docs")
    other = make_case(tmp_path / "other")
    settings = ss.Settings(refiner=tmp_path / "docs", accept_unmeasured=True)
    ss.refine(ss.open_store(str(other.index)), ss.Judgments(), settings)
    other.index.rename(tmp_path / "moved.faiss")
    both = Side.BOTH
    random_refiner(16, np.arange(10_000), side=both).save(tmp_path / "both")
    settings = replace(settings, refiner=tmp_path / "both", output=other.index)
    kept = sorted(path.name for path in (tmp_path / "other" / "index.faiss.simskip").iterdir())
    with pytest.raises(JournalError, match="moved away"):
        ss.refine(ss.open_store(str(case.index)), ss.Judgments(), settings)
    assert not other.index.exists()
    assert kept == sorted(p.name for p in (tmp_path / "other" / "index.faiss.simskip").iterdir())


@pytest.mark.parametrize("arguments", [["refine"], ["refine", "x", "--bogus"], ["nonsense"]])
def test_usage_errors_are_json_too(arguments: list[str]) -> None:
    found = simskip_json(*arguments, code=2)
    assert found["error"]["type"] == "UsageError"
