"""States that earlier versions left still open, go on, and undo."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.job import Refit
from simskip_vdb.judgments import Judgments
from simskip_vdb.night import run_night

GOLDEN = sorted(Path(__file__).with_name("golden").glob("state-*"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(request.param, folder)
    return folder / "index.faiss"


def test_there_is_a_state_of_every_schema() -> None:
    assert [path.name for path in GOLDEN] == ["state-1"]


def test_it_opens_and_says_what_it_is(index: Path) -> None:
    status = ss.status(ss.open_store(str(index)))
    assert status["refined"]["evidence"] == "unmeasured"
    assert not status["changed_since"]
    assert not status["interrupted"]


def test_it_undoes_to_the_very_originals(index: Path) -> None:
    done = ss.rollback(ss.open_store(str(index)))
    assert done["exact"]
    ids = np.load(index.with_name("ids.npy"))
    found = ss.open_store(str(index)).fetch(ids)
    assert np.array_equal(found, np.load(index.with_name("originals.npy")))


def test_the_same_refiner_has_nothing_to_do_and_a_night_goes_on(index: Path) -> None:
    store = ss.open_store(str(index))
    refiner = next(index.with_name("index.faiss.simskip").glob("refiners/*"))
    before = index.read_bytes()
    report = ss.refine(store, Judgments(), Settings(refiner=refiner, accept_unmeasured=True))
    assert report.gate is None
    found = run_night(ss.open_store(str(index)), Judgments(), Settings(growing=True), Refit())
    assert found["outcome"] == "quiet"
    assert index.read_bytes() == before
