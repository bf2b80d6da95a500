"""Writing row by row: what an application writes between two steps of ours is never lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from live import Killed, LiveStore
from test_row_by_row import D, Desk, kill, tolerance

from simskip_vdb import reindex, row_by_row
from simskip_vdb.datatypes import Ids, Mask, Progress, VectorBatch, Vectors
from simskip_vdb.journal import Journal
from simskip_vdb.sending import Snapshot
from simskip_vdb.store import Allowed, VectorStore


@pytest.fixture(params=["numbers", "half precision"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, text=False, half=request.param == "half precision")


def newer(rows: int = 1) -> Vectors:
    return np.random.default_rng(9).normal(size=(rows, D)).astype(np.float32)


def refuse(store: VectorStore) -> None:
    raise LookupError("refused")


def after_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let the application act once the rows were read, as it may while a refiner is fitted."""

    def snapshot(store: VectorStore, journal: Journal) -> Snapshot:
        found = reindex.snapshot(store, journal)
        act()
        return found

    monkeypatch.setattr("test_row_by_row.snapshot", snapshot)


def assert_row(desk: Desk, place: int, row: Vectors) -> None:
    held = desk.store.content()[desk.ids.tolist()[place]]
    np.testing.assert_allclose(held, row, atol=1e-6 + tolerance(desk))


def test_a_second_refinement_spares_what_changed_since_it_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.refine(0)
    after_reading(monkeypatch, lambda: desk.store.put(desk.ids[:1], newer()))
    desk.refine(1)
    assert_row(desk, 0, newer()[0])
    desk.rollback()
    assert_row(desk, 0, newer()[0])


def test_an_abandoned_write_spares_what_changed_since_it_was_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.store.events[10] = kill
    with pytest.raises(Killed):
        desk.refine(0)
    after_reading(monkeypatch, lambda: desk.store.put(desk.ids[[0, 35]], newer(2)))
    desk.refine(1)
    assert_row(desk, 0, newer(2)[0])
    assert_row(desk, 35, newer(2)[1])
    desk.rollback()
    assert_row(desk, 35, newer(2)[1])


@pytest.mark.parametrize("end", ["refused", "given up"])
def test_a_resumed_second_refinement_is_undone_to_what_was_there(desk: Desk, end: str) -> None:
    desk.refine(0)
    desk.store.events[desk.store.requests + 5] = kill
    with pytest.raises(Killed):
        desk.refine(1)
    desk.store.put(desk.ids[[1, 30]], newer(2))
    desk.store.put(np.array([20_000]), newer())
    if end == "refused":
        with pytest.raises(LookupError):
            desk.refine(1, refuse)
    else:
        desk.store.events[desk.store.requests + 22] = kill
        with pytest.raises(Killed):
            desk.refine(1, refuse)
        desk.refine(0)
    desk.rollback()
    assert_row(desk, 1, newer(2)[0])
    assert_row(desk, 30, newer(2)[1])
    np.testing.assert_allclose(
        desk.store.content()[20_000], newer()[0], atol=1e-6 + tolerance(desk)
    )


def test_a_row_that_is_written_again_as_it_was_is_refined(desk: Desk) -> None:
    def application(store: LiveStore) -> None:
        store.put(desk.ids[:1], desk.vectors[:1])  # as for a change of its payload

    desk.store.events[8] = application
    written = desk.refine()
    assert written.rows == len(desk.ids)
    assert desk.rollback().exact


def test_the_marker_goes_even_where_a_rollback_died_before_taking_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.refine()

    def die(store: VectorStore, note: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(row_by_row, "mark", die)
        with pytest.raises(Killed):
            desk.rollback()
    assert desk.rollback().exact
    assert desk.store.note is None


def test_a_store_that_shows_writes_late_is_refined(tmp_path: Path) -> None:
    ids = np.arange(300)
    vectors = np.random.default_rng(0).normal(size=(len(ids), D)).astype(np.float32)

    class Late(LiveStore):
        """Shows what it was written only once it is settled."""

        shown: dict[int, Vectors] | None = None

        def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
            shown, self.shown = self.shown or self.content(), None
            written = super().update(batch, allowed)
            self.shown = shown
            return written

        def peek(self, ids: Ids) -> VectorBatch:
            if self.shown is None:
                return super().peek(ids)
            return VectorBatch(ids=ids, vectors=np.stack([self.shown[i] for i in ids.tolist()]))

        def settle(self, progress: Progress) -> None:
            self.shown = None

    desk = Desk(tmp_path, text=False, half=False)
    desk.ids, desk.vectors, desk.store = ids, vectors, Late(ids, vectors)
    assert desk.refine().rows == len(ids)
    assert desk.rollback().restored == len(ids)
