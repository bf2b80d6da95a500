"""Writing row by row: nothing is lost, whoever dies and whoever else writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import random_refiner
from live import Killed, LiveStore

from simskip_vdb.datatypes import ID_TEXT, Ids, Vectors
from simskip_vdb.errors import JournalError, TransientStoreError, VerificationError
from simskip_vdb.journal import Journal
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import (
    RolledBack,
    Written,
    abandon,
    recover,
    rollback,
    snapshot,
    write,
)
from simskip_vdb.rows import fingerprint_of, row_digests
from simskip_vdb.store import VectorStore

N, D = 40, 8


class Desk:
    """A live index with its state, worked on by hand."""

    def __init__(self, folder: Path, *, text: bool, half: bool) -> None:
        rng = np.random.default_rng(1)
        numbers = np.sort(rng.choice(10_000, N, replace=False))
        self.ids: Ids = numbers.astype(ID_TEXT) if text else numbers
        self.ids = np.sort(self.ids)
        self.vectors = rng.normal(size=(N, D)).astype(np.float32)
        self.store = LiveStore(self.ids, self.vectors, half=half)
        self.state = folder / "state"
        self.refiners = [random_refiner(D, self.ids, seed) for seed in range(2)]
        self.originals = self.store.content()

    def refine(self, which: int = 0, accept: object = None) -> Written:
        refiner = self.refiners[which]
        with Journal(self.state, self.store.info()) as journal:
            recover(self.store, journal)
            refiner.save(journal.refiners / refiner.id)
            found = snapshot(self.store, journal)
            pending = journal.manifest.pending
            if pending is not None and pending.refiner != refiner.id:
                found = abandon(self.store, found, journal)
            return write(
                self.store,
                found,
                lambda start, x: refiner.refine_rows(x, found.rows.ids[start : start + len(x)]),
                journal=journal,
                refiner=refiner,
                accept=accept or (lambda store: None),  # type: ignore[arg-type]
                summary={"side": "docs"},
            )

    def rollback(self) -> RolledBack:
        with Journal(self.state, self.store.info()) as journal:
            recover(self.store, journal)
            return rollback(self.store, journal)

    def expected(self, which: int, originals: dict[Any, Vectors]) -> dict[Any, Vectors]:
        ids = np.array(list(originals), self.ids.dtype)
        refined = self.refiners[which].refine_rows(np.stack(list(originals.values())), ids)
        return dict(zip(originals, refined, strict=True))

    def assert_holds(self, rows: dict[Any, Vectors], tolerance: float = 0) -> None:
        content = self.store.content()
        assert list(content) == sorted(rows)
        for name, row in content.items():
            np.testing.assert_allclose(row, rows[name], atol=tolerance + 1e-6, err_msg=str(name))


@pytest.fixture(params=["numbers", "text", "half precision"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, text=request.param == "text", half=request.param == "half precision")


def tolerance(desk: Desk) -> float:
    return 5e-3 if desk.store.half else 0


def fingerprint(store: LiveStore) -> str:
    (batch,) = store.scan(N)
    return fingerprint_of(batch.ids, row_digests(batch.vectors))


def kill(store: LiveStore) -> None:
    raise Killed


def test_refine_then_rollback(desk: Desk) -> None:
    before = fingerprint(desk.store)
    written = desk.refine()
    assert (written.rows, written.skipped, written.theirs, written.gone) == (N, 0, 0, 0)
    desk.assert_holds(desk.expected(0, desk.originals), tolerance(desk))
    assert desk.store.note is not None
    done = desk.rollback()
    assert (done.exact, done.restored, done.kept) == (True, N, 0)
    assert fingerprint(desk.store) == before
    assert desk.store.note is None


def test_a_second_refinement_starts_from_originals(desk: Desk) -> None:
    desk.refine(0)
    desk.refine(1)
    desk.assert_holds(desk.expected(1, desk.originals), tolerance(desk))
    requests = desk.store.requests
    desk.refine(1)
    desk.assert_holds(desk.expected(1, desk.originals), tolerance(desk))
    if not desk.store.half:
        assert desk.store.requests == requests
    assert desk.rollback().exact
    desk.assert_holds(desk.originals)


@pytest.mark.parametrize("at", range(1, N // 2 + 1))
def test_a_kill_at_any_request_is_resumed(desk: Desk, at: int) -> None:
    desk.store.events[at] = kill
    with pytest.raises(Killed):
        desk.refine()
    assert len(desk.store.content()) == N
    desk.refine()
    desk.assert_holds(desk.expected(0, desk.originals), tolerance(desk))
    assert desk.rollback().exact


@pytest.mark.parametrize("at", range(1, N // 2 + 1, 3))
def test_a_kill_at_any_request_is_rolled_back(desk: Desk, at: int) -> None:
    desk.refine(0)
    desk.store.events[desk.store.requests + at] = kill
    with pytest.raises(Killed):
        desk.refine(1)
    desk.store.events[desk.store.requests + at] = kill
    with pytest.raises(Killed):  # the rollback dies, too
        desk.rollback()
    assert desk.rollback().exact
    desk.assert_holds(desk.originals)


@pytest.mark.parametrize("at", range(1, N // 2 + 1, 3))
def test_an_interrupted_write_gives_way_to_another(desk: Desk, at: int) -> None:
    desk.store.events[at] = kill
    with pytest.raises(Killed):
        desk.refine(0)
    desk.refine(1)
    desk.assert_holds(desk.expected(1, desk.originals), tolerance(desk))
    assert desk.rollback().exact


def test_a_refused_write_is_restored(desk: Desk) -> None:
    def refuse(store: VectorStore) -> None:
        raise LookupError("refused")

    with pytest.raises(LookupError):
        desk.refine(0, refuse)
    desk.assert_holds(desk.originals)
    desk.refine(0)
    held = desk.store.content()
    with pytest.raises(LookupError):
        desk.refine(1, refuse)
    desk.assert_holds(held)
    assert desk.rollback().exact


def test_newer_writes_of_the_application_win(desk: Desk) -> None:
    rng = np.random.default_rng(5)
    newer = rng.normal(size=(3, D)).astype(np.float32)
    new_id = np.array([20_000]).astype(desk.ids.dtype)

    def application(store: LiveStore) -> None:
        store.put(desk.ids[[1, 20, 39]], newer)  # written already, and not yet
        store.remove(desk.ids[[2, 30]])
        store.put(new_id, newer[:1])

    desk.store.events[8] = application
    written = desk.refine()
    assert (written.theirs, written.gone) == (3, 2)
    assert written.rows == N - 5
    held = desk.store.content()
    theirs = {int_or_text: held[int_or_text] for int_or_text in desk.ids[[1, 20, 39]].tolist()}
    for row, vector in zip(theirs.values(), newer, strict=True):
        np.testing.assert_allclose(row, vector, atol=1e-6 + tolerance(desk))
    done = desk.rollback()
    assert (done.restored, done.kept) == (N - 5, 4)
    originals = {name: row for name, row in desk.originals.items() if name in held}
    desk.assert_holds({**originals, **theirs, new_id.tolist()[0]: held[new_id.tolist()[0]]})


def test_a_vector_that_is_written_once_more_is_refined_once_more(desk: Desk) -> None:
    def application(store: LiveStore) -> None:
        rows = desk.ids[[0, 5, 30]]
        store.put(rows, np.stack([desk.originals[name] for name in rows.tolist()]))

    desk.store.events[12] = application
    written = desk.refine()
    assert (written.rows, written.theirs, written.gone) == (N, 0, 0)
    desk.assert_holds(desk.expected(0, desk.originals), tolerance(desk))
    assert desk.rollback().exact


def test_a_row_changed_after_a_kill_is_the_applications(desk: Desk) -> None:
    desk.store.events[10] = kill
    with pytest.raises(Killed):
        desk.refine()
    newer = np.full((2, D), 0.25, np.float32)
    desk.store.put(desk.ids[[0, 35]], newer)  # one was refined, one not yet
    desk.refine()
    originals = dict(desk.originals)
    for name, row in zip(desk.ids[[0, 35]].tolist(), newer, strict=True):
        originals[name] = row
    desk.assert_holds(desk.expected(0, originals), tolerance(desk))
    desk.rollback()
    desk.assert_holds(originals)


def test_a_store_that_loses_writes_is_noticed_and_restored(desk: Desk) -> None:
    class Forgetful(LiveStore):
        def update(self, batch, allowed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            self.requests += 1
            return np.ones(len(batch), np.bool_) & allowed(self.peek(batch.ids))

    desk.store.__class__ = Forgetful
    with pytest.raises(VerificationError, match="40 read back as they were before"):
        desk.refine()
    desk.assert_holds(desk.originals)


def test_transient_errors_leave_a_write_to_be_resumed(desk: Desk) -> None:
    def fail(store: LiveStore) -> None:
        raise TransientStoreError("429")

    desk.store.events[7] = fail
    with pytest.raises(TransientStoreError):
        desk.refine()
    with Journal(desk.state, desk.store.info()) as journal:
        assert journal.manifest.pending is not None
    desk.refine()
    desk.assert_holds(desk.expected(0, desk.originals), tolerance(desk))


def test_a_row_that_comes_back_from_an_earlier_refinement_is_ours(desk: Desk) -> None:
    desk.refine(0)
    stale = desk.store.content()[desk.ids.tolist()[5]]
    desk.refine(1)
    desk.store.put(desk.ids[[5]], stale[None])  # read before, written after
    desk.refine(1)
    desk.assert_holds(desk.expected(1, desk.originals), tolerance(desk))
    desk.store.put(desk.ids[[5]], stale[None])
    assert desk.rollback().exact
    desk.assert_holds(desk.originals)


def test_rows_that_are_not_finite_stay(tmp_path: Path) -> None:
    desk = Desk(tmp_path, text=False, half=False)
    bad = np.full((1, D), np.nan, np.float32)
    desk.store.put(desk.ids[:1], bad)
    written = desk.refine()
    assert (written.rows, written.skipped, written.theirs) == (N - 1, 1, 0)
    assert np.isnan(desk.store.content()[desk.ids.tolist()[0]]).all()
    assert desk.rollback().exact


def test_missing_originals_refuse_to_roll_back(desk: Desk) -> None:
    desk.refine()
    for file in desk.state.glob("originals-*"):
        file.unlink()
    held = desk.store.content()
    with pytest.raises(JournalError, match="missing"):
        desk.rollback()
    desk.assert_holds(held)


def test_refiners_are_kept_for_telling_rows_apart(desk: Desk) -> None:
    desk.refine()
    loaded = Refiner.load(desk.state / "refiners" / desk.refiners[0].id)
    assert loaded.id == desk.refiners[0].id


@pytest.mark.parametrize("positional", [False, True])
def test_a_last_write_that_left_no_row_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positional: bool
) -> None:
    """An earlier version recorded a write in which the application had every row."""
    desk = Desk(tmp_path, text=False, half=False)
    desk.store.exact = True
    desk.store.positional = positional
    desk.refine(0)
    with Journal(desk.state, desk.store.info()) as journal:
        current = journal.manifest.current
        assert current is not None
        nothing = journal.save_written(desk.ids[:0], *[np.empty(0, np.uint64)] * 2)
        journal.settle(happened=True, done=replace(current, written=nothing))
    desk.store.put(desk.ids, -desk.vectors)
    theirs = desk.store.content()
    desk.refine(0)
    desk.assert_holds(desk.expected(0, theirs))
    desk.rollback()
    desk.assert_holds(theirs)
