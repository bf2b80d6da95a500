"""Several FAISS files as a store: what fits together, how it is named, what is refused."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from builders import flat, ivf
from faiss_files import put_lists_on_disk
from faiss_parts import EDGES, D, Desk, close

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_parts import FaissParts
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import VectorBatch, silent
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    JournalError,
    StoreNotFoundError,
    UnsupportedIndexError,
)


@pytest.fixture(params=["ivf", "flat"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


def test_ids_that_count_each_part_from_zero_go_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "flat")
    store = FaissParts(tmp_path / "part*.faiss")
    assert store.info().positional
    np.testing.assert_array_equal(store.fetch(np.array([60, 3, 20])), desk.vectors[[60, 3, 20]])
    shards = faiss.IndexShards(D, False, True)
    parts = [faiss.read_index(str(path)) for path in desk.paths]
    for part in parts:
        shards.add_shard(part)
    found = store.search(desk.vectors[:30], 7, {})
    scores, ids = shards.search(desk.vectors[:30], 7)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)


def test_lists_in_files_of_their_own(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "ivf")
    for part, path in enumerate(desk.paths[:2]):
        put_lists_on_disk(faiss.read_index(str(path)), path, f"lists{part}")
    lists = [sha256_of(tmp_path / f"lists{part}") for part in range(2)]
    desk.refine()
    assert close(desk.rows(), desk.expected())
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals
    assert [sha256_of(tmp_path / f"lists{part}") for part in range(2)] == lists


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    Desk(tmp_path, "ivf")
    info = open_store(str(tmp_path / "part*.faiss")).info()
    assert info.kind == "3 parts of IVF4 Flat, custom ids"
    assert info.uri == f"faiss:{tmp_path}/part*.faiss"
    assert info.state == tmp_path / "part_.faiss.simskip"
    assert info.details["nlist"] == 4
    flat(tmp_path / "part3.faiss", np.empty((0, D), np.float32))
    info = open_store(str(tmp_path / "part*.faiss")).info()
    assert info.kind == "4 parts of IVF4 Flat, custom ids, Flat"
    assert "nlist" not in info.details
    assert open_store(str(tmp_path / "part[01].faiss")).info().count == EDGES[2]


def test_ids_that_come_twice_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "ivf")
    ivf(tmp_path / "part9.faiss", desk.ids[4:8], desk.vectors[:4], nlist=1)
    with pytest.raises(DataError, match=rf"4 ids \(such as {desk.ids[4]}\)"):
        open_store(desk.uri)


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "flat")
    faiss.write_index(faiss.IndexFlatL2(D), str(tmp_path / "part9.faiss"))
    with pytest.raises(DataError, match=r"part9\.faiss has 8 and euclid"):
        open_store(desk.uri)
    flat(tmp_path / "part9.faiss", np.zeros((1, D + 1), np.float32))
    with pytest.raises(DataError, match=r"part9\.faiss has 9 and dot"):
        open_store(desk.uri)
    (tmp_path / "part9.faiss").unlink()
    (tmp_path / "part9.faiss").symlink_to("part0.faiss")
    with pytest.raises(DataError, match="same file"):
        open_store(desk.uri)


@pytest.mark.parametrize(("factory", "way_out"), [("PQ2x4", "--originals"), ("SQ8", "--refiner")])
def test_rows_that_are_not_read_exactly_are_refused(
    tmp_path: Path, factory: str, way_out: str
) -> None:
    desk = Desk(tmp_path, "flat")
    index = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(np.random.default_rng(0).normal(size=(1000, D)).astype("f4"))
    faiss.write_index(index, str(tmp_path / "part9.faiss"))
    with pytest.raises(UnsupportedIndexError, match=way_out):
        open_store(desk.uri)


def test_names_that_lead_nowhere_and_names_with_brackets(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no such file"):
        open_store(str(tmp_path / "part*.faiss"))
    path = flat(tmp_path / "odd[1].faiss", np.eye(D, dtype="f4"))
    assert isinstance(open_store(str(path)), FaissStore)
    folder = tmp_path / "odd[2]"
    folder.mkdir()
    flat(folder / "part0.faiss", np.eye(D, dtype="f4"))
    assert open_store(f"{folder}/part*.faiss").info().kind == "1 part of Flat"


def test_read_only_refuses_to_write(desk: Desk) -> None:
    store = FaissParts.open(desk.uri, read_only=True)
    batch = VectorBatch(ids=desk.ids[:1], vectors=desk.vectors[:1])
    for write in (
        lambda: store.update(batch, lambda now: np.ones(1, np.bool_)),
        lambda: store.settle(silent),
        lambda: store.mark(None),
    ):
        with pytest.raises(ConfigError, match="reading only"):
            write()


def test_a_part_is_not_refined_twice(desk: Desk) -> None:
    desk.refine()
    with pytest.raises(ConfigError, match=r"as a part of faiss:.*part\*\.faiss"):
        open_store(str(desk.paths[1]))
    settings = ss.Settings(refiner=desk.folder / "refiner1", accept_unmeasured=True)
    with pytest.raises(JournalError, match="marked as refined"):
        ss.refine(open_store(f"{desk.folder}/part?.fai*"), ss.Judgments(), settings)
    desk.rollback()
    assert open_store(str(desk.paths[1])).info().count == EDGES[2] - EDGES[1]
    ss.refine(open_store(str(desk.paths[1])), ss.Judgments(), settings)
    with pytest.raises(ConfigError, match=r"part1\.faiss was refined by itself"):
        open_store(desk.uri)
    ss.rollback(open_store(str(desk.paths[1])))
    assert desk.rows() == desk.originals


def test_a_state_elsewhere_is_that_of_the_parts(desk: Desk, tmp_path: Path) -> None:
    state = tmp_path / "state"
    settings = ss.Settings(refiner=desk.folder / "refiner0", accept_unmeasured=True, state=state)
    ss.refine(open_store(desk.uri), ss.Judgments(), settings)
    other = flat(tmp_path / "other.faiss", desk.vectors)
    with pytest.raises(JournalError, match="is the state of"):
        ss.refine(open_store(str(other)), ss.Judgments(), settings)
    assert desk.rollback()["exact"]
    assert desk.rows() == desk.originals
