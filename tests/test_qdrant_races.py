"""Copies and new vectors in Qdrant: kills between steps, aliases that move, newer writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import ALIAS, COLLECTION, DIM, OTHER, VECTOR, Client, Rows
from live import Killed
from test_qdrant_pipeline import BESIDE, assert_same, refined, rollback, status
from test_qdrant_pipeline import refiner as refiner

import simskip_vdb as ss
from simskip_vdb import Refiner, Settings, sending
from simskip_vdb.connectors.qdrant_store import QdrantStore
from simskip_vdb.datatypes import Progress
from simskip_vdb.errors import ConfigError, StoreError
from simskip_vdb.journal import Journal
from simskip_vdb.judgments import Judgments
from simskip_vdb.provenance import AsRead
from simskip_vdb.report import Report
from simskip_vdb.targets import NewCollection, Refined

NEW = "new-collection"
NEWER = np.eye(DIM, dtype=np.float32)[2]


@pytest.fixture
def engine(tmp_path: Path) -> Client:
    return Client(tmp_path)


@pytest.fixture(scope="module")
def other(refiner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another refiner that passes the gate."""
    folder = tmp_path_factory.mktemp("other") / "refiner"
    loaded = Refiner.load(refiner)
    replace(loaded, alpha=loaded.alpha * 0.9, beta=loaded.beta * 0.9).save(folder)
    return folder


def settings(refiner: Path, mode: str = NEW) -> Settings:
    return Settings(refiner=refiner, mode=mode, accept_unmeasured=True)


def refine(engine: Client, chosen: Settings) -> Report:
    with engine.open() as store:
        return ss.refine(store, Judgments(), replace(chosen, state=engine.state))


def lead(engine: Client, name: str) -> None:
    QdrantStore(engine.client, ALIAS, VECTOR).switch(name)


def names(engine: Client) -> set[str]:
    return {c.name for c in engine.client.get_collections().collections}


def passed(report: Report) -> None:
    assert report.gate is not None
    assert report.gate.passed, report.gate.reasons


def killed_after_switch(
    engine: Client, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Rows, str]:
    before = engine.rows()

    def die(self: Journal, *, happened: bool, done: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(Journal, "settle", die)
        with pytest.raises(Killed):
            refine(engine, settings(refiner))
    assert engine.leads_to() != COLLECTION
    return before, engine.leads_to()


def test_a_kill_right_after_the_switch_is_resumed(
    engine: Client, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copy = killed_after_switch(engine, refiner, monkeypatch)
    passed(refine(engine, settings(refiner)))
    assert engine.leads_to() == copy
    assert names(engine) == {COLLECTION, copy}
    assert_same(engine.rows(), refined(engine, refiner, before))
    assert rollback(engine)["exact"]
    assert engine.leads_to() == COLLECTION
    assert_same(engine.rows(), before)


def test_a_kill_right_after_the_switch_is_rolled_back(
    engine: Client, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = killed_after_switch(engine, refiner, monkeypatch)
    assert rollback(engine)["exact"]
    assert_same(engine.rows(), before)


def test_a_kill_right_after_the_switch_gives_way_to_another(
    engine: Client, refiner: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = killed_after_switch(engine, refiner, monkeypatch)
    passed(refine(engine, settings(other)))
    assert_same(engine.rows(), refined(engine, other, before))
    assert rollback(engine)["exact"]
    assert_same(engine.rows(), before)


def test_a_second_copy_is_rolled_back(engine: Client, refiner: Path, other: Path) -> None:
    before = engine.rows()
    passed(refine(engine, settings(refiner)))
    passed(refine(engine, settings(other)))
    assert_same(engine.rows(), refined(engine, other, before))
    assert rollback(engine)["exact"]
    assert_same(engine.rows(), before)
    assert status(engine)["refined"] is None


def test_what_changed_between_two_copies_survives_the_way_back(
    engine: Client, refiner: Path, other: Path
) -> None:
    passed(refine(engine, settings(refiner)))
    engine.move(engine.points[3], NEWER)
    passed(refine(engine, settings(other)))
    rollback(engine)
    np.testing.assert_allclose(engine.rows()[str(engine.points[3])], NEWER, atol=1e-5)


def test_the_same_refiner_copies_again_for_new_rows(engine: Client, refiner: Path) -> None:
    passed(refine(engine, settings(refiner)))
    new = {VECTOR: NEWER.tolist(), OTHER: [1.0, 2.0, 3.0]}
    engine.put([(10**7, new, {"sku": "new"})])
    originals = engine.rows()
    passed(refine(engine, settings(refiner)))
    assert len(engine.rows()) == len(originals)
    rollback(engine)
    np.testing.assert_allclose(engine.rows()[str(10**7)], NEWER, atol=1e-5)


def test_a_live_copy_is_not_removed_where_the_alias_was_moved_by_hand(
    engine: Client, refiner: Path
) -> None:
    passed(refine(engine, settings(refiner)))
    copy = engine.leads_to()
    engine.move(engine.points[3], NEWER)
    lead(engine, COLLECTION)
    rollback(engine)
    assert copy in names(engine)


def test_a_payload_that_changes_before_the_switch_leaves_no_row_behind(
    engine: Client, refiner: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.rows()
    passed(refine(engine, settings(refiner)))
    real = NewCollection.finish

    def finish(self: NewCollection, read: AsRead, refined: Refined, progress: Progress) -> None:
        engine.client.set_payload(ALIAS, {"version": 2}, [engine.points[1]])
        real(self, read, refined, progress)

    monkeypatch.setattr(NewCollection, "finish", finish)
    passed(refine(engine, settings(other)))
    assert_same(engine.rows(), refined(engine, other, before))
    rollback(engine)
    assert_same(engine.rows(), before)


def test_what_is_written_while_the_copy_is_indexed_comes_along(
    engine: Client, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def settle(self: QdrantStore, progress: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            engine.move(engine.points[5], NEWER)
            new = {VECTOR: NEWER.tolist(), OTHER: [1.0, 2.0, 3.0]}
            engine.put([(10**7, new, {"sku": "new"})])

    monkeypatch.setattr(QdrantStore, "settle", settle)
    passed(refine(engine, settings(refiner)))
    rows = engine.rows()
    np.testing.assert_allclose(rows[str(engine.points[5])], NEWER, atol=1e-5)
    assert str(10**7) in rows


def test_a_copy_written_to_while_the_alias_goes_back_is_kept(
    engine: Client, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed(refine(engine, settings(refiner)))
    copy = engine.leads_to()
    real = QdrantStore.switch

    def switch(self: QdrantStore, name: str) -> None:
        engine.move(engine.points[5], NEWER)  # after everything was compared
        real(self, name)

    monkeypatch.setattr(QdrantStore, "switch", switch)
    with pytest.raises(StoreError, match="Both are kept"):
        rollback(engine)
    assert copy in names(engine)
    rollback(engine)
    assert status(engine)["refined"] is None
    assert copy in names(engine)


def test_a_second_vector_beside_that_fails_leaves_the_firsts_marker(
    engine: Client, refiner: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed(refine(engine, settings(refiner, "new-vector")))
    held = engine.rows(BESIDE)

    def fail(self: object, *arguments: object) -> None:
        raise StoreError("no")

    with monkeypatch.context() as failing:
        failing.setattr(sending.Sending, "verify", fail)
        with pytest.raises(StoreError, match="no"):
            refine(engine, settings(other, "new-vector"))
    assert_same(engine.rows(BESIDE), held)
    with engine.open() as store:
        Refiner.load(refiner).check(store.vector_beside(BESIDE, create=False))


def test_a_server_without_room_for_a_vector_leaves_nothing_pending(
    engine: Client, refiner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = QdrantStore.vector_beside

    def vector_beside(self: QdrantStore, name: str, *, create: bool) -> QdrantStore:
        if create:
            raise ConfigError("the server is too old")
        return real(self, name, create=create)

    monkeypatch.setattr(QdrantStore, "vector_beside", vector_beside)
    with pytest.raises(ConfigError, match="too old"):
        refine(engine, settings(refiner, "new-vector"))
    assert not status(engine)["interrupted"]
    passed(refine(engine, settings(refiner, "in-place")))
