"""A refined vector is ours whenever it comes back, and its original comes back with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge
from builders import change, flat, ivf, random_refiner
from edge_shards import fill, make, row_ids
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.errors import ConfigError, DataError, JournalError
from simskip_vdb.journal import Journal, Write
from simskip_vdb.state_place import state_folder

N, D = 300, 12


class Index:
    """An index of some kind, its original rows, and two refiners."""

    def __init__(self, folder: Path, kind: str) -> None:
        rng = np.random.default_rng(3)
        self.kind, self.folder = kind, folder
        self.vectors = rng.normal(size=(N, D)).astype(np.float32)
        self.ids = np.arange(N) if kind == "flat" else np.arange(N) * 7 + 3
        self.points = self.ids.tolist()
        self.path = folder / "index"
        if kind == "flat":
            flat(self.path, self.vectors)
        elif kind == "ivf":
            ivf(self.path, self.ids, self.vectors)
        elif kind == "parquet":
            write_rows(self.path, self.ids, self.vectors)
        else:
            make(self.path, self.points, self.vectors)
            self.ids = row_ids(self.points)
        for name, seed in (("X", 1), ("Y", 2)):
            random_refiner(D, self.ids, seed).save(folder / name)

    @property
    def uri(self) -> str:
        scheme = {"parquet": "parquet", "edge": "qdrant-edge"}.get(self.kind, "faiss")
        return f"{scheme}:{self.path}" + ("?metric=dot" if scheme == "parquet" else "")

    def refine(self, name: str) -> ss.Report:
        settings = ss.Settings(refiner=self.folder / name, accept_unmeasured=True)
        return ss.refine(open_store(self.uri), ss.Judgments(), settings)

    def rollback(self) -> dict[str, Any]:
        return ss.rollback(open_store(self.uri))

    def keep(self) -> Callable[[], None]:
        """Return what brings the index back as it is now, as an application or a backup would."""
        if self.kind == "edge":
            held = self.rows()
            return partial(put, self.path, held)
        copy = self.folder / "copy"
        shutil.copyfile(self.path, copy)
        return partial(put_file, copy, self.path)

    def rows(self) -> dict[int, Any]:
        batches = list(open_store(self.uri).scan(100))
        return {int(i): v for b in batches for i, v in zip(b.ids, b.vectors, strict=True)}

    def holds(self, name: str | None) -> bool:
        wanted = self.vectors
        if name is not None:
            wanted = ss.Refiner.load(self.folder / name).refine_rows(self.vectors, self.ids)
        rows = self.rows()
        found = np.stack([rows[i] for i in self.points])
        return len(rows) == N and bool(np.allclose(found, wanted, atol=1e-6 if name else 0))


def put_file(copy: Path, path: Path) -> None:
    shutil.copyfile(copy, path)


def put(folder: Path, rows: dict[int, Any]) -> None:
    shard = edge.EdgeShard.load(str(folder))
    fill(shard, [*rows], np.stack([*rows.values()]))
    shard.flush()
    shard.close()


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
