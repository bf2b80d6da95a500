"""A refined vector is ours whenever it comes back, and its original comes back with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import change, random_refiner
from own_index import D, Index, N

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.errors import ConfigError, DataError, JournalError
from simskip_vdb.journal import Journal, Write
from simskip_vdb.state_place import state_folder


@pytest.fixture(params=["flat", "ivf", "parquet", "edge"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    return Index(tmp_path, request.param)


@pytest.mark.parametrize("between", ["another", "undone"])
def test_what_an_earlier_refiner_wrote_is_not_refined_again(index: Index, between: str) -> None:
    index.refine("X")
    put_back = index.keep()
    if between == "another":
        index.refine("Y")
    else:
        index.rollback()
    put_back()
    index.refine("Y")
    assert index.holds("Y")
    index.rollback()
    assert index.holds(None)


def test_what_was_rolled_back_and_comes_back_is_rolled_back_again(index: Index) -> None:
    for name in ("X", "Y"):
        index.refine(name)
        put_back = index.keep()
    for _ in range(2):
        index.rollback()
        assert index.holds(None)
        with pytest.raises(ConfigError, match="nothing to roll back"):
            index.rollback()
        put_back()


def test_rows_whose_originals_are_gone_are_not_refined(tmp_path: Path) -> None:
    index = Index(tmp_path, "ivf")
    index.refine("X")
    put_back = index.keep()
    change(index.path, lambda held: held.remove_ids(np.array([3, 10])))
    index.refine("Y")
    put_back()
    before = index.path.read_bytes()
    with pytest.raises(JournalError, match=r"2 rows or more \(such as id (3|10)\)"):
        index.refine("Y")
    assert index.path.read_bytes() == before


def test_prune_lets_go_of_originals_that_were_brought_back(index: Index) -> None:
    index.refine("X")
    put_back = index.keep()
    index.rollback()
    removed = ss.prune(open_store(index.uri), final=True)["removed"]
    assert any(name.startswith("originals") for name in removed)
    put_back()
    with pytest.raises(JournalError, match="does not hold their originals"):
        index.refine("Y")


def test_an_index_that_was_rolled_back_is_refined_like_a_new_one(index: Index) -> None:
    index.refine("X")
    index.refine("Y")
    index.rollback()
    assert index.refine("X").written["rows"] == N
    assert index.holds("X")


def test_a_refiner_for_ids_of_another_kind_leaves_no_trace(index: Index) -> None:
    other = np.arange(N).astype("S44") if index.ids.dtype.kind == "i" else np.arange(N)
    random_refiner(D, other).save(index.folder / "Z")
    with pytest.raises(DataError, match="row ids are"):
        index.refine("Z")
    assert not ss.status(open_store(index.uri))["interrupted"]
    index.refine("X")
    assert index.holds("X")


def test_a_write_that_was_begun_by_a_refiner_that_does_not_fit_gives_way(index: Index) -> None:
    other = np.arange(N).astype("S44") if index.ids.dtype.kind == "i" else np.arange(N)
    refiner = random_refiner(D, other)
    store = open_store(index.uri)
    folder = state_folder(store, None)
    with Journal(folder, store.info()) as journal:
        refiner.save(journal.refiners / refiner.id)
        journal.save_originals(store.scan(100))
        held = Write(
            refiner=refiner.id,
            before="",
            fingerprint="",
            originals=journal.scanned,
            written=None,
            kept=None,
            time=0.0,
        )
        journal.announce(held)
    getattr(store, "close", lambda: None)()
    index.refine("X")
    assert index.holds("X")
    index.rollback()
    assert index.holds(None)
