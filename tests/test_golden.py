"""States that earlier versions left still open, go on, and undo."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import random_refiner
from edge_shards import make, row_ids
from own_index import Opened, put
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.job import Refit
from simskip_vdb.judgments import Judgments
from simskip_vdb.night import run_night

HERE = Path(__file__).with_name("golden")
GOLDEN = [path for path in sorted(HERE.glob("state-*")) if (path / "index.faiss").is_file()]


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


class Refined(Opened):
    """An index that an earlier version refined twice, with what every row held at each time."""

    def __init__(self, kind: str, folder: Path) -> None:
        shutil.copytree(HERE / f"state-1-{kind}", folder)
        self.kind, self.folder = kind, folder
        names = ("ids", "originals", "first", "second")
        self.ids, self.originals, self.first, self.second = (
            np.load(folder / f"{name}.npy") for name in names
        )
        self.points = self.ids.tolist()
        self.uri = f"qdrant-edge:{folder / 'shard'}"
        if kind == "parquet":
            self.uri = f"parquet:{folder / 'index.parquet'}?metric=dot"
        else:  # an engine's files are its own; the rows are what was written
            make(folder / "shard", self.ids.tolist(), self.second)
        row_ids_ = row_ids(self.ids.tolist()) if kind == "edge" else self.ids
        self.third = random_refiner(self.originals.shape[1], row_ids_, 3)
        self.third.save(folder / "third")
        self.made = self.third.refine_rows(self.originals, row_ids_)

    def refine(self) -> None:
        self.refine_by(self.folder / "third")

    def save(self, vectors: np.ndarray) -> None:
        """Write rows as an application does that had read them at some time."""
        if self.kind == "parquet":
            write_rows(self.folder / "index.parquet", self.ids, vectors)
        else:
            put(self.folder / "shard", dict(zip(self.ids.tolist(), vectors, strict=True)))


@pytest.fixture(params=["edge", "parquet"])
def refined(request: pytest.FixtureRequest, tmp_path: Path) -> Refined:
    return Refined(request.param, tmp_path / "copy")


def test_a_second_refinement_is_undone_to_the_very_originals(refined: Refined) -> None:
    with refined.store() as store:
        assert not ss.status(store)["changed_since"]
    refined.rollback()
    assert np.array_equal(refined.array(), refined.originals)


@pytest.mark.parametrize("came_back", ["first", "second"])
def test_rows_of_every_earlier_write_are_known(refined: Refined, came_back: str) -> None:
    refined.refine()
    np.testing.assert_allclose(refined.array(), refined.made, atol=1e-6)
    refined.save(getattr(refined, came_back))
    refined.refine()
    np.testing.assert_allclose(refined.array(), refined.made, atol=1e-6)
    refined.rollback()
    assert np.array_equal(refined.array(), refined.originals)
