"""Random runs, restores, copies and old applications: every row is undone to its very original."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from own_index import D, Index

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.errors import ConfigError, JournalError, SimskipError, StateInUseError
from simskip_vdb.journal import Journal

COUNT = 24
seeds = st.integers(0, 2**16)


class Row(NamedTuple):
    """A vector in the index, and the application's own that is behind it."""

    value: Any
    origin: Any


class Ownership(RuleBasedStateMachine):
    """An index, whose vector is in each row, and every moment that somebody may bring back."""

    @initialize(kind=st.sampled_from(["flat", "ivf", "parquet", "double", "npy", "array", "edge"]))
    def make(self, kind: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.index = Index(Path(self.folder.name), kind, COUNT)
        self.rows = {i: Row(row, row) for i, row in self.index.rows().items()}
        self.moments = [dict(self.rows)]
        self.known: dict[str, dict[int, Any]] = {}
        self.held: dict[int, Any] = {}
        self.refined = False

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def lost(self) -> list[int]:
        """Return rows of ours whose original no state holds any more."""
        return [i for i, row in self.rows.items() if ours(row) and not self.has_original(i)]

    def has_original(self, i: int) -> bool:
        return i in self.held and np.array_equal(self.held[i], self.rows[i].origin)

    @rule(name=st.sampled_from("XY"))
    def refine(self, name: str) -> None:
        if self.lost():
            with pytest.raises(JournalError, match="does not hold their originals"):
                self.index.refine(name)
            return
        self.index.refine(name)
        origins = {i: row.origin for i, row in self.rows.items()}
        known = self.known.setdefault(name, origins)
        points = self.index.points
        late = np.array([not np.array_equal(origins[i], known[i]) for i in points])
        refiner = ss.Refiner.load(self.index.folder / name)
        made = refiner.refine_rows(np.stack([origins[i] for i in points]), self.index.ids, late)
        now = self.index.rows()
        for i, row in zip(points, made, strict=True):
            np.testing.assert_allclose(now[i], row, atol=1e-6)
            self.rows[i] = Row(now[i], origins[i])
        self.held, self.refined = origins, True
        self.moments.append(dict(self.rows))

    @rule()
    def rollback(self) -> None:
        self.undo(self.index)
        self.rows = self.undone()

    def undone(self) -> dict[int, Row]:
        return {
            i: Row(row.origin, row.origin) if self.has_original(i) else row
            for i, row in self.rows.items()
        }

    def undo(self, index: Index) -> None:
        due = [i for i, row in self.rows.items() if ours(row) and self.has_original(i)]
        if due:
            assert index.rollback()["restored"] >= len(due)
            return
        with suppress(ConfigError):  # there is nothing to roll back, or rows that were left raw
            index.rollback()

    @precondition(lambda self: self.index.kind != "edge")
    @rule()
    def a_copy_is_undone_elsewhere(self) -> None:
        """Copy the file and its state to another place, and roll back there."""
        with tempfile.TemporaryDirectory() as other:
            copy = Index.__new__(Index)
            copy.__dict__.update(self.index.__dict__, path=Path(other) / "elsewhere")
            shutil.copyfile(self.index.path, copy.path)
            state = self.index.path.with_name("index.simskip")
            if state.is_dir():
                shutil.copytree(state, copy.path.with_name("elsewhere.simskip"))
            self.undo(copy)
            expect(copy, self.undone())

    @rule(at=seeds)
    def a_backup_is_restored(self, at: int) -> None:
        self.rows = dict(self.moments[at % len(self.moments)])
        self.save()

    @rule(at=seeds, which=seeds)
    def an_old_application_saves_a_row(self, at: int, which: int) -> None:
        i = self.index.points[which % COUNT]
        self.rows[i] = self.moments[at % len(self.moments)][i]
        self.save()

    @rule(which=seeds, seed=seeds)
    def the_application_writes_a_row(self, which: int, seed: int) -> None:
        row = np.random.default_rng([which, seed]).normal(size=D).astype(np.float32)
        self.rows[self.index.points[which % COUNT]] = Row(row, row)
        self.save()
        self.moments.append(dict(self.rows))

    def save(self) -> None:
        self.index.save({i: row.value for i, row in self.rows.items()})

    @rule()
    def another_operator_steps_aside(self) -> None:
        """Refine with a state of one's own while another run has the index, or after one had."""
        asked = ss.Settings(
            refiner=self.index.folder / "X",
            accept_unmeasured=True,
            state=self.index.folder / "other",
        )
        store = open_store(self.index.uri)
        expected: type[SimskipError] = ConfigError if self.refined else StateInUseError
        try:
            with Journal(self.index.folder / "third", store.info()), pytest.raises(expected):
                ss.refine(store, ss.Judgments(), asked)
        finally:
            getattr(store, "close", lambda: None)()

    @precondition(lambda self: hasattr(self, "rows"))
    @invariant()
    def every_row_is_whose_it_is(self) -> None:
        expect(self.index, self.rows)


def ours(row: Row) -> bool:
    return not np.array_equal(row.value, row.origin)


def expect(index: Index, rows: dict[int, Row]) -> None:
    now = index.rows()
    assert sorted(now) == sorted(rows)
    for i, row in rows.items():
        assert np.array_equal(now[i], row.value), i


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(
    max_examples=30,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
