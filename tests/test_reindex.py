from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pytest
from builders import change, flat, ivf, random_refiner, refine_by_hand

from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import Ids, Vectors
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import ConfigError, DataError, JournalError, StoreChangedError
from simskip_vdb.inspection import inspect
from simskip_vdb.journal import Journal, Write
from simskip_vdb.ledger import Ledger
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import RolledBack, Written, recover, rollback, snapshot, write
from simskip_vdb.store import Check, VectorStore
from simskip_vdb.upkeep import status

N, D = 600, 12


@dataclass
class Desk:
    """An index with its state, and the vectors that were in it at first."""

    path: Path
    ids: Ids
    vectors: Vectors

    @property
    def state(self) -> Path:
        return self.path.with_name(self.path.name + ".simskip")

    def refine(self, refiner: Refiner, accept: Check = lambda candidate: None) -> Written:
        store = FaissStore(self.path)
        with Journal(self.state, store.info()) as journal:
            recover(store, journal)
            return refine_by_hand(store, journal, refiner, accept)

    def rollback(self) -> RolledBack:
        store = FaissStore(self.path)
        with Journal(self.state, store.info()) as journal:
            recover(store, journal)
            return rollback(store, journal)

    def read(self) -> dict[int, Vectors]:
        store = FaissStore(self.path)
        batches = list(store.scan(100))
        return {int(i): v for b in batches for i, v in zip(b.ids, b.vectors, strict=True)}

    def holds(self, expected: dict[int, Vectors]) -> bool:
        rows = self.read()
        return rows.keys() == expected.keys() and all(
            np.array_equal(rows[i], expected[i]) for i in rows
        )

    def originals(self) -> dict[int, Vectors]:
        return dict(zip(self.ids.tolist(), self.vectors, strict=True))

    def refined(self, refiner: Refiner) -> dict[int, Vectors]:
        moved = refiner.refine_rows(self.vectors, self.ids)
        return dict(zip(self.ids.tolist(), moved, strict=True))


@pytest.fixture(params=["ivf", "flat"])
def desk(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Desk:
    vectors = rng.normal(size=(N, D)).astype(np.float32)
    if request.param == "flat":
        return Desk(flat(tmp_path / "x.faiss", vectors), np.arange(N), vectors)
    ids = np.sort(rng.choice(10**9, N, replace=False))
    return Desk(ivf(tmp_path / "x.faiss", ids, vectors), ids, vectors)


@pytest.fixture
def by_id(tmp_path: Path, rng: np.random.Generator) -> Desk:
    vectors = rng.normal(size=(N, D)).astype(np.float32)
    ids = np.sort(rng.choice(10**9, N, replace=False))
    return Desk(ivf(tmp_path / "x.faiss", ids, vectors), ids, vectors)


@pytest.fixture
def by_position(tmp_path: Path, rng: np.random.Generator) -> Desk:
    vectors = rng.normal(size=(N, D)).astype(np.float32)
    return Desk(flat(tmp_path / "x.faiss", vectors), np.arange(N), vectors)


def near(a: dict[int, Vectors], b: dict[int, Vectors]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[i], b[i], atol=1e-6) for i in a)


def test_rows_are_refined_and_restored_to_the_byte(desk: Desk) -> None:
    before = sha256_of(desk.path)
    refiner = random_refiner(D, desk.ids)
    written = desk.refine(refiner)
    assert written == Written(rows=N, skipped=0, mode="in-place", sent=N)
    assert near(desk.read(), desk.refined(refiner))
    done = desk.rollback()
    assert done.exact
    assert done.fingerprint == before == sha256_of(desk.path)


def test_nothing_is_refined_twice(desk: Desk) -> None:
    refiner = random_refiner(D, desk.ids)
    desk.refine(refiner)
    once = desk.read()
    desk.refine(refiner)
    assert near(desk.read(), once)
    other = random_refiner(D, desk.ids, seed=1)
    before = desk.refined(other)
    desk.refine(other)
    assert near(desk.read(), before)
    assert desk.rollback().exact
    assert desk.holds(desk.originals())


def test_the_original_file_is_kept_over_several_refinements(desk: Desk) -> None:
    before = sha256_of(desk.path)
    for seed in range(3):
        desk.refine(random_refiner(D, desk.ids, seed))
    assert desk.rollback().fingerprint == before


def test_rollback_leaves_no_copy_of_the_file_behind(desk: Desk) -> None:
    desk.refine(random_refiner(D, desk.ids))
    desk.rollback()
    left = {path.name.split("-")[0] for path in desk.state.iterdir()}
    assert left <= {"manifest.json", "lock", "refiners", "originals", "written"}


def test_there_is_nothing_to_roll_back_twice(desk: Desk) -> None:
    desk.refine(random_refiner(D, desk.ids))
    desk.rollback()
    with pytest.raises(ConfigError, match="nothing to roll back"):
        desk.rollback()


def test_a_refused_candidate_changes_nothing(desk: Desk) -> None:
    class Refused(Exception):
        pass

    def refuse(candidate: VectorStore) -> None:
        assert candidate.info().count == N
        raise Refused

    before, names = sha256_of(desk.path), {p.name for p in desk.path.parent.iterdir()}
    with pytest.raises(Refused):
        desk.refine(random_refiner(D, desk.ids), refuse)
    assert sha256_of(desk.path) == before
    assert {p.name for p in desk.path.parent.iterdir()} == names | {desk.state.name}
    assert not list(desk.state.glob("originals*"))
    assert not list(desk.state.glob("kept*"))


def test_rows_added_since_stay_when_rolled_back(desk: Desk) -> None:
    desk.refine(random_refiner(D, desk.ids))
    new = np.random.default_rng(5).normal(size=(3, D)).astype(np.float32)
    new_ids = np.arange(N, N + 3) if desk.ids[0] == 0 else np.array([7, 8, 9])

    def add(index: faiss.Index) -> None:
        index.add(new) if desk.ids[0] == 0 else index.add_with_ids(new, new_ids)

    change(desk.path, add)
    done = desk.rollback()
    assert (done.exact, done.restored, done.kept) == (False, N, 3)
    assert desk.holds(desk.originals() | dict(zip(new_ids.tolist(), new, strict=True)))


def test_a_newer_write_of_the_application_wins(by_id: Desk) -> None:
    by_id.refine(random_refiner(D, by_id.ids))
    mine = np.full((1, D), 0.5, np.float32)

    def overwrite(index: faiss.Index) -> None:
        index.remove_ids(by_id.ids[:2])
        index.add_with_ids(mine, by_id.ids[:1])

    change(by_id.path, overwrite)
    done = by_id.rollback()
    assert (done.exact, done.restored, done.kept) == (False, N - 2, 1)
    expected = by_id.originals()
    del expected[int(by_id.ids[1])]
    expected[int(by_id.ids[0])] = mine[0]
    assert by_id.holds(expected)


def test_a_second_refinement_takes_new_rows_as_originals(by_id: Desk) -> None:
    by_id.refine(random_refiner(D, by_id.ids))
    new = np.random.default_rng(5).normal(size=(4, D)).astype(np.float32)
    change(by_id.path, lambda index: index.add_with_ids(new, np.arange(4)))
    grown = Desk(
        by_id.path, np.concatenate([np.arange(4), by_id.ids]), np.concatenate([new, by_id.vectors])
    )
    refiner = random_refiner(D, grown.ids, seed=2)
    grown.refine(refiner)
    assert near(grown.read(), grown.refined(refiner))
    done = grown.rollback()
    assert (done.exact, done.restored) == (False, N + 4)
    assert grown.holds(grown.originals())


def test_positions_that_shifted_are_matched_by_vector(by_position: Desk) -> None:
    by_position.refine(random_refiner(D, by_position.ids))
    change(by_position.path, lambda index: index.remove_ids(np.array([0, 5, 300])))
    done = by_position.rollback()
    assert (done.exact, done.restored, done.kept) == (False, N - 3, 0)
    left = np.delete(by_position.vectors, [0, 5, 300], axis=0)
    assert by_position.holds(dict(enumerate(left)))


def test_ambiguous_positions_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(50, D)).astype(np.float32)
    desk = Desk(flat(tmp_path / "x.faiss", vectors), np.arange(50), vectors)
    target = np.ones(D, np.float32)
    refiner = random_refiner(D, desk.ids)
    store = FaissStore(desk.path)
    with Journal(desk.state, store.info()) as journal:
        refiner.save(journal.refiners / refiner.id)
        found = snapshot(store, journal)
        write(  # two different originals become one vector
            store,
            found,
            lambda start, x: np.concatenate([np.stack([target, target]), x[2:]]),
            journal=journal,
            refiner=refiner,
            accept=lambda candidate: None,
            summary={},
        )
    change(desk.path, lambda index: index.remove_ids(np.array([0])))
    kept = sha256_of(desk.path)
    with pytest.raises(JournalError, match="which is whose cannot be told"):
        desk.rollback()
    assert sha256_of(desk.path) == kept


def test_refined_vectors_that_were_rounded_are_not_taken_for_originals(by_id: Desk) -> None:
    refiner = random_refiner(D, by_id.ids)
    by_id.refine(refiner)
    rounded = np.stack([by_id.read()[int(i)] for i in by_id.ids]).astype(np.float16)

    def save_in_half_precision(index: faiss.Index) -> None:
        index.reset()
        index.add_with_ids(rounded.astype(np.float32), by_id.ids)

    change(by_id.path, save_in_half_precision)
    by_id.refine(refiner)
    assert near(by_id.read(), by_id.refined(refiner))


def test_duplicate_ids_are_refused_before_anything_is_written(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    vectors = rng.normal(size=(40, D)).astype(np.float32)
    ids = np.arange(40)
    ids[3] = ids[30]
    desk = Desk(ivf(tmp_path / "x.faiss", ids, vectors), ids, vectors)
    before = sha256_of(desk.path)
    with pytest.raises(DataError, match="such as 30"):
        desk.refine(random_refiner(D, np.unique(ids)))
    assert sha256_of(desk.path) == before


def test_a_file_that_changes_meanwhile_is_not_overwritten(desk: Desk) -> None:
    def meddle(candidate: VectorStore) -> None:
        change(desk.path, lambda index: index.remove_ids(desk.ids[:1]))

    with pytest.raises(StoreChangedError):
        desk.refine(random_refiner(D, desk.ids), meddle)
    assert FaissStore(desk.path).info().count == N - 1
    with Journal(desk.state, FaissStore(desk.path).info()) as journal:
        recover(FaissStore(desk.path), journal)
        assert journal.manifest.current is None


@pytest.mark.parametrize("victim", ["originals-*", "written-*"])
def test_damaged_state_is_named_and_not_used(desk: Desk, victim: str) -> None:
    desk.refine(random_refiner(D, desk.ids))
    (file,) = desk.state.glob(victim)
    change(desk.path, lambda index: index.remove_ids(desk.ids[:1]))  # so rows must be matched
    kept_sha = sha256_of(desk.path)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(JournalError, match=file.name):
        desk.rollback()
    assert sha256_of(desk.path) == kept_sha
    file.unlink()
    with pytest.raises(JournalError, match="is missing"):
        desk.rollback()


def test_state_of_another_index_is_refused(desk: Desk, tmp_path: Path) -> None:
    desk.refine(random_refiner(D, desk.ids))
    other = flat(tmp_path / "other.faiss", np.ones((3, D + 1), np.float32))
    journal = Journal(desk.state, FaissStore(other).info())
    assert "another index" in journal.other
    with pytest.raises(JournalError, match=r"another index .* mv /.*/x\.faiss\.simskip"), journal:
        pass
    assert desk.rollback().exact


def test_a_state_that_undoes_nothing_gives_way_to_an_index_built_anew(
    desk: Desk, tmp_path: Path, rng: np.random.Generator
) -> None:
    desk.refine(random_refiner(D, desk.ids))
    desk.rollback()
    Ledger(desk.state).assign({"q": "test"})
    rows = rng.normal(size=(N, D + 1)).astype(np.float32)
    anew = Desk(flat(desk.path, rows), np.arange(N), rows)
    assert status(FaissStore(desk.path))["refined"] is None
    refiner = random_refiner(D + 1, anew.ids)
    anew.refine(refiner)
    assert near(anew.read(), anew.refined(refiner))
    aside = desk.state.with_name(f"{desk.state.name}.of-another-index-0")
    assert (aside / "manifest.json").is_file()
    assert Ledger(desk.state).splits == {"q": "test"}  # its test queries are no new ones
    assert anew.rollback().exact


def test_an_index_built_anew_is_told_from_the_refined_one(
    desk: Desk, rng: np.random.Generator
) -> None:
    desk.refine(random_refiner(D, desk.ids))
    rows = rng.normal(size=(N, D + 1)).astype(np.float32)
    anew = Desk(flat(desk.path, rows), np.arange(N), rows)
    told = status(FaissStore(desk.path))
    assert told["refined"] is None
    assert "mv " in told["state_of_another"]
    assert inspect(FaissStore(desk.path))["rows"] == N
    with pytest.raises(JournalError, match="mv "):
        anew.refine(random_refiner(D + 1, anew.ids))


def test_a_newer_schema_is_refused(desk: Desk) -> None:
    desk.refine(random_refiner(D, desk.ids))
    manifest = desk.state / "manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(JournalError, match="schema 99"):
        desk.rollback()


def test_two_runs_at_once_step_aside(desk: Desk) -> None:
    info = FaissStore(desk.path).info()
    with (
        Journal(desk.state, info),
        pytest.raises(JournalError, match="another run"),
        Journal(desk.state, info),
    ):
        pass


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"?")])
def test_rows_are_restored_where_the_kept_file_is_lost(
    desk: Desk, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    desk.refine(random_refiner(D, desk.ids))
    (kept,) = desk.state.glob("kept-*")
    damage(kept)
    done = desk.rollback()
    assert (done.restored, done.kept) == (N, 0)
    assert desk.holds(desk.originals())
    assert "row by row" in caplog.text


def look(desk: Desk) -> None:
    """Read the rows as a run that writes nothing does."""
    store = FaissStore(desk.path)
    with Journal(desk.state, store.info()) as journal:
        recover(store, journal)
        snapshot(store, journal)


def test_looking_does_not_touch_what_undoes(desk: Desk) -> None:
    refiner = random_refiner(D, desk.ids)
    desk.refine(refiner)
    gone = desk.ids[[0, 1, 300]]
    new = np.random.default_rng(5).normal(size=(3, D)).astype(np.float32)

    def edit(index: faiss.Index) -> None:
        index.remove_ids(gone)
        index.add(new) if desk.ids[0] == 0 else index.add_with_ids(new, np.arange(3))

    change(desk.path, edit)
    for _ in range(3):
        look(desk)
    done = desk.rollback()
    assert (done.exact, done.restored, done.kept) == (False, N - 3, 3)
    left = np.delete(desk.vectors, [0, 1, 300], axis=0)
    if desk.ids[0] == 0:
        assert desk.holds(dict(enumerate(np.concatenate([left, new]))))
    else:
        kept = np.delete(desk.ids, [0, 1, 300])
        assert desk.holds(dict(zip([0, 1, 2, *kept.tolist()], [*new, *left], strict=True)))


def test_an_older_refined_file_that_comes_back_is_still_known(by_id: Desk) -> None:
    by_id.refine(random_refiner(D, by_id.ids))
    refined = by_id.path.read_bytes()
    change(by_id.path, lambda index: index.remove_ids(by_id.ids[:50]))
    look(by_id)
    by_id.path.write_bytes(refined)
    assert by_id.rollback().exact
    assert by_id.holds(by_id.originals())


def test_only_our_own_files_are_ever_deleted(desk: Desk) -> None:
    desk.state.mkdir()
    mine = ["originals.npy", "kept_photos.txt", "written_notes.md", "originals-2024.arrow"]
    for name in mine:
        (desk.state / name).write_text("mine")
    (desk.state / "kept-aaaaaaaaaaaa.d").mkdir()
    desk.refine(random_refiner(D, desk.ids))
    desk.rollback()
    assert {*mine, "kept-aaaaaaaaaaaa.d"} <= {path.name for path in desk.state.iterdir()}


def test_a_state_without_its_manifest_is_not_swept(desk: Desk) -> None:
    desk.refine(random_refiner(D, desk.ids))
    (desk.state / "manifest.json").unlink()
    before = {path.name for path in desk.state.iterdir()}
    with pytest.raises(JournalError, match=r"manifest\.json is missing"):
        look(desk)
    assert {path.name for path in desk.state.iterdir()} == before


def test_one_state_folder_serves_one_index(desk: Desk, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    other = tmp_path / "other.faiss"
    shutil.copy(desk.path, other)
    refiner = random_refiner(D, desk.ids)
    store = FaissStore(desk.path)
    with Journal(shared, store.info()) as journal:
        refine_by_hand(store, journal, refiner)
    with pytest.raises(JournalError, match=r"is the state of faiss:.*x\.faiss"):
        Journal(shared, FaissStore(other).info())
    with Journal(shared, store.info()) as journal:
        assert rollback(store, journal).exact


def test_an_interrupted_write_is_not_settled_by_another_index(desk: Desk, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    other = tmp_path / "other.faiss"
    shutil.copy(desk.path, other)
    store = FaissStore(desk.path)
    with Journal(shared, store.info()) as journal:
        snapshot(store, journal)
        journal.announce(
            Write(
                refiner="one",
                before=store.sha256(),
                fingerprint="",
                originals=journal.scanned,
                written=None,
                kept=None,
                time=0,
            )
        )
    with pytest.raises(JournalError, match="is the state of"):
        Journal(shared, FaissStore(other).info())
    assert Journal(shared, store.info()).manifest.pending is not None


def test_state_and_index_may_move_together(desk: Desk, tmp_path: Path) -> None:
    desk.refine(random_refiner(D, desk.ids))
    moved = Desk(tmp_path / "elsewhere" / "y.faiss", desk.ids, desk.vectors)
    moved.path.parent.mkdir()
    shutil.copy(desk.path, moved.path)
    shutil.copytree(desk.state, moved.state)
    assert moved.rollback().exact


def test_originals_are_not_for_everybody(desk: Desk) -> None:
    desk.refine(random_refiner(D, desk.ids))
    assert desk.state.stat().st_mode & 0o077 == 0
