"""Inverted lists in a file of their own: refined lists go to a new one, and the index decides."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import random_refiner
from faiss_files import put_lists_on_disk, read, replace

from simskip_vdb.connectors.faiss_lists import ivf_of, switching
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import Metric, Side, VectorBatch, Vectors
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import StoreChangedError, StoreError
from simskip_vdb.judgments import Judgments
from simskip_vdb.pipeline import Settings, refine
from simskip_vdb.refiner import Refiner
from simskip_vdb.store import VectorStore
from simskip_vdb.upkeep import rollback

COUNT, DIM = 300, 12
HALF = np.float32(0.5)


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


def save(path: Path, vectors: Vectors, name: str = "lists") -> Path:
    """Save an index whose rows have ids of their own and whose lists are in another file."""
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, "IVF4,Flat")
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(COUNT) * 3)
    path.parent.mkdir(exist_ok=True)
    return put_lists_on_disk(index, path, name)


def halve(store: VectorStore) -> list[VectorBatch]:
    return [VectorBatch(ids=b.ids, vectors=b.vectors * HALF) for b in store.scan(70)]


def accept(candidate: VectorStore) -> None:
    pass


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def named_in(path: Path) -> str:
    """Return what an index calls its list file."""
    index = read(path)
    name: str = faiss.downcast_InvertedLists(index.invlists).filename
    return name


def rows_by_faiss(path: Path) -> Vectors:
    """Read an IVF Flat's rows in the order of their ids, from the folder of its lists."""
    os.chdir(path.parent)
    index = read(path)
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    rows: Vectors = np.stack([index.reconstruct(int(i) * 3) for i in range(index.ntotal)])
    return rows


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds no lists."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_refined_and_restored(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    before = {name: sha256_of(path.with_name(name)) for name in names_in(path.parent)}
    store = FaissStore(path)
    assert store.info().kind == "IVF4 Flat on disk, custom ids"
    ids = np.arange(COUNT) * 3
    refiner = random_refiner(DIM, ids, metric=Metric.EUCLID)
    for number in range(2):  # the second from the originals
        report = refine(store, Judgments(), settings_for(refiner, tmp_path / f"refiner{number}"))
        assert report.written is not None
        assert report.written["rows"] == COUNT
        np.testing.assert_array_equal(store.fetch(ids), refiner.refine_rows(vectors, ids))
        (new,) = set(names_in(path.parent)) - before.keys() - {"x.faiss.simskip"}
        assert new.startswith("lists.simskip-")
        refiner = random_refiner(DIM, ids, 1, metric=Metric.EUCLID)
    assert sha256_of(path.with_name("lists")) == before["lists"]
    assert rollback(FaissStore(path))["exact"]
    assert names_in(path.parent) == [*sorted(before), "x.faiss.simskip"]
    assert {name: sha256_of(path.with_name(name)) for name in before} == before


def settings_for(refiner: Refiner, folder: Path, **more: Any) -> Settings:  # noqa: ANN401
    """Write what a refiner says, through an index that looks everywhere."""
    refiner.save(folder)
    return Settings(refiner=folder, accept_unmeasured=True, search_params={"nprobe": 4}, **more)


@pytest.mark.parametrize("name", ["lists", "./lists", "absolute"])
def test_an_application_finds_the_new_lists_where_it_found_the_old(
    tmp_path: Path, vectors: Vectors, name: str
) -> None:
    folder = tmp_path / "saved"
    name = str(folder / "lists") if name == "absolute" else name
    path = save(folder / "x.faiss", vectors, name)
    store = FaissStore(path)
    replace(store, halve(store), accept)
    os.chdir(folder if not name.startswith("/") else "/")
    assert named_in(path).rpartition("/")[0] == name.rpartition("/")[0]
    np.testing.assert_array_equal(rows_by_faiss(path), vectors * HALF)
    # It goes on adding rows.
    index = read(path)
    index.add_with_ids(vectors, np.arange(COUNT, 2 * COUNT) * 3)
    faiss.write_index(index, str(path))
    del index
    grown = FaissStore(path)
    assert grown.info().count == 2 * COUNT
    replace(grown, halve(grown), accept)
    both = np.concatenate([vectors * HALF, vectors]) * HALF
    np.testing.assert_array_equal(rows_by_faiss(path), both)
    assert len(names_in(folder)) == 3


def test_relative_to_where_the_application_runs(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    os.rename(path.with_name("lists"), tmp_path / "here" / "lists")
    store = FaissStore(path)
    replace(store, halve(store), accept)
    assert store._lists is not None
    assert names_in(path.parent) == ["x.faiss"]
    assert len(names_in(tmp_path / "here")) == 2
    shutil.copy(tmp_path / "here" / "lists", path.with_name(store._lists.name))
    with pytest.raises(StoreError, match=r"may be in .*here.* or in .*saved"):
        FaissStore(path)


def test_lists_that_are_not_there_or_too_short(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    lists = path.with_name("lists")
    whole = lists.read_bytes()
    lists.unlink()
    with pytest.raises(StoreError, match=r"x\.faiss: its inverted lists are in 'lists'"):
        FaissStore(path)
    for content in (b"", whole[:-4096]):
        lists.write_bytes(content)
        with pytest.raises(StoreError, match=r"lists: its [\d,]+ bytes do not fit"):
            FaissStore(path)


def test_lists_that_change_meanwhile(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    store = FaissStore(path)
    new = halve(store)
    os.utime(path.with_name("lists"), (1, 1))
    with pytest.raises(StoreChangedError, match="lists"):
        store.search(vectors[:1], 1, {})
    with pytest.raises(StoreChangedError, match="lists"):
        replace(store, new, accept)


def test_lists_that_several_indexes_share(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    other = Path(shutil.copy(path, path.with_name("y.faiss")))
    for index in (path, other):
        store = FaissStore(index)
        replace(
            store,
            halve(store),
            accept,
            keep=tmp_path / f"kept-{index.name}",
            expected=store.sha256(),
        )
    np.testing.assert_array_equal(rows_by_faiss(path), vectors * HALF)
    store = FaissStore(path)
    store.put_back(tmp_path / "kept-x.faiss", expected=store.sha256())
    np.testing.assert_array_equal(rows_by_faiss(path), vectors)
    np.testing.assert_array_equal(rows_by_faiss(other), vectors * HALF)
    assert len(names_in(path.parent)) == 4


def test_the_original_lists_are_gone(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    refiner = random_refiner(DIM, np.arange(COUNT) * 3, metric=Metric.EUCLID)
    assert refine(
        FaissStore(path), Judgments(), settings_for(refiner, tmp_path / "refiner")
    ).written
    lists = path.with_name("lists")
    lists.unlink()
    with pytest.raises(StoreError, match=r"lists are in 'lists'.* remove .*kept-.* one by one"):
        rollback(FaissStore(path))
    (kept,) = (tmp_path / "saved" / "x.faiss.simskip").glob("kept-*")
    kept.unlink()
    assert not rollback(FaissStore(path))["exact"]
    np.testing.assert_array_equal(rows_by_faiss(path), vectors)


def test_originals_that_changed_but_still_open_are_not_gone_back_to(
    tmp_path: Path, vectors: Vectors
) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    store = FaissStore(path)
    kept = tmp_path / "kept"
    replace(store, halve(store), accept, keep=kept, expected=store.sha256())
    with path.with_name("lists").open("r+b") as file:
        file.write(b"\0" * 8)
    with pytest.raises(StoreChangedError, match=r"lists: somebody else wrote .* Remove .*kept"):
        store.put_back(kept, expected=store.sha256())
    np.testing.assert_array_equal(rows_by_faiss(path), vectors * HALF)
    assert len(names_in(path.parent)) == 3


def test_a_refused_write_leaves_nothing(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    before = names_in(path.parent)

    def refuse(candidate: VectorStore) -> None:
        assert len(names_in(path.parent)) > 3
        raise StoreError("no")

    store = FaissStore(path)
    with pytest.raises(StoreError, match="no"):
        replace(store, halve(store), refuse)
    assert names_in(path.parent) == before


def test_a_copy_has_lists_of_its_own(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    before = {name: sha256_of(path.with_name(name)) for name in names_in(path.parent)}
    refiner = random_refiner(DIM, np.arange(COUNT) * 3, side=Side.BOTH, metric=Metric.EUCLID)
    settings = settings_for(refiner, tmp_path / "refiner", output=Path("copy.faiss"))
    report = refine(FaissStore(path), Judgments(), settings)
    assert report.written is not None
    assert report.written["mode"] == "copy"
    copy, _, lists = names_in(tmp_path / "here")
    assert lists.startswith("copy.faiss.simskip-")
    assert named_in(tmp_path / "here" / copy) == str(tmp_path / "here" / lists)
    assert FaissStore(copy).info().count == COUNT
    assert {name: sha256_of(path.with_name(name)) for name in before} == before


def test_only_files_with_names_of_our_own_are_swept(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    lists = path.with_name("lists")
    (path.parent / ".x.faiss.simskip-lists").write_text(f'["{lists}", "{path}.simskip-none"]')
    FaissStore(path, read_only=True).sweep()
    assert len(names_in(path.parent)) == 3
    FaissStore(path).sweep()
    assert names_in(path.parent) == ["lists", "x.faiss"]


def test_an_interrupt_after_the_switch_keeps_both(tmp_path: Path, vectors: Vectors) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    store = FaissStore(path)
    replace(store, halve(store), accept, keep=tmp_path / "kept", expected=store.sha256())
    old = store._lists
    assert old is not None
    new = old.successor(replaces_ours=True)
    switched = path.read_bytes().replace(old.name.encode(), new.name.encode())
    shutil.copy(old.path, new.path)

    def switch() -> None:
        with switching(path, old=old, new=new):
            path.write_bytes(switched)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        switch()
    assert old.path.exists()  # the switch may be lost with the power
    FaissStore(path).sweep()
    assert (old.path.exists(), new.path.exists()) == (False, True)
    np.testing.assert_array_equal(rows_by_faiss(path), vectors * HALF)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lists: setattr(lists, "totsize", 2**60),
        lambda lists: setattr(lists, "totsize", 0),
        lambda lists: lists.lists.push_back(faiss.OnDiskOneList()),
        lambda lists: _second(lists, offset=2**62),
        lambda lists: _second(lists, size=10**6),
        lambda lists: _second(lists, size=10**6, capacity=10**6),
        lambda lists: _second(lists, capacity=2**63),
    ],
)
def test_numbers_that_do_not_fit_the_list_file(
    tmp_path: Path, vectors: Vectors, damage: Callable[[Any], None]
) -> None:
    path = save(tmp_path / "saved" / "x.faiss", vectors)
    os.chdir(path.parent)
    index = read(path)
    damage(faiss.downcast_InvertedLists(ivf_of(index).invlists))
    faiss.write_index(index, str(path))
    with pytest.raises(StoreError, match=r"(x\.faiss|lists): "):
        FaissStore(path)


def _second(lists: Any, **numbers: int) -> None:  # noqa: ANN401
    entries = [lists.lists.at(i) for i in range(lists.nlist)]
    for name, value in numbers.items():
        setattr(entries[1], name, value)
    changed = faiss.OnDiskOneListVector()
    for entry in entries:
        changed.push_back(entry)
    lists.lists = changed
