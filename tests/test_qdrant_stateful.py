"""Random runs and random writes of an application, over every engine that runs here."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import random_refiner
from engines import DIM, OTHER, VECTOR, Client, Edge, Engine, Rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import simskip_vdb as ss
from simskip_vdb.datatypes import Metric, Vectors
from simskip_vdb.errors import ConfigError
from simskip_vdb.judgments import Judgments

COUNT = 12
seeds = st.integers(0, 2**16)


class Collection(RuleBasedStateMachine):
    """A collection that is refined, rolled back and written to, and what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.engine = self.make(Path(self.folder.name))
        self.held = self.engine.rows()
        self.originals: Rows = {}
        self.known: dict[int, Rows] = {}
        ids = np.array(sorted(self.held), "S36")
        self.refiners = [Path(self.folder.name) / f"refiner{i}" for i in range(2)]
        for seed, path in enumerate(self.refiners):
            refiner = random_refiner(DIM, ids, seed, metric=Metric.COSINE)
            refiner.save(path)
        self.inserted = 10**7

    def make(self, folder: Path) -> Engine:
        raise NotImplementedError

    def teardown(self) -> None:
        self.engine.close()
        self.folder.cleanup()

    @rule(which=st.integers(0, 1))
    def refine(self, which: int) -> None:
        run = ss.Settings(
            refiner=self.refiners[which], state=self.engine.state, accept_unmeasured=True
        )
        with self.engine.open() as store:
            ss.refine(store, Judgments(), run)
            again = ss.refine(store, Judgments(), replace(run))
        assert again.written is not None
        assert again.written["mode"] == "none"
        originals = {**self.held, **self.originals}
        names = np.array(list(self.held), "S36")
        stacked = np.stack([originals[name] for name in self.held])
        # Rows that came, or got another vector, after a refiner's first use are late, which these
        # refiners leave raw.
        known = self.known.setdefault(which, {name: originals[name] for name in self.held})
        late = np.array(
            [
                name not in known or not np.allclose(originals[name], known[name], atol=2e-5)
                for name in self.held
            ]
        )
        refined = ss.Refiner.load(self.refiners[which]).refine_rows(stacked, names, late)
        self.held = dict(zip(self.held, refined, strict=True))
        self.originals = {
            name: originals[name]
            for name, left in zip(self.held, late.tolist(), strict=True)
            if not left
        }

    @rule()
    def rollback(self) -> None:
        with self.engine.open() as store:
            if not self.originals:
                with pytest.raises(ConfigError, match=r"nothing to roll back|never refined"):
                    ss.rollback(store, state=self.engine.state)
                return
            done = ss.rollback(store, state=self.engine.state)
        assert (done["restored"], done["restored"] + done["kept"]) == (
            len(self.originals),
            len(self.held),
        )
        self.held |= self.originals
        self.originals = {}

    @rule(seed=seeds)
    def application_moves_a_row(self, seed: int) -> None:
        name = self.draw(seed)
        self.held[name] = self.vector(seed)
        self.originals.pop(name, None)
        self.engine.move(self.point(name), self.held[name])

    @rule(seed=seeds)
    def application_adds_a_row(self, seed: int) -> None:
        self.inserted += 1
        row = self.vector(seed)
        vectors = {VECTOR: row.tolist(), OTHER: [1.0, 2.0, 3.0]}
        self.engine.put([(self.inserted, vectors, {"sku": f"new-{self.inserted}"})])
        self.held[str(self.inserted)] = row

    @precondition(lambda self: len(self.held) > 4)
    @rule(seed=seeds)
    def application_removes_a_row(self, seed: int) -> None:
        name = self.draw(seed)
        self.engine.remove([self.point(name)])
        self.held.pop(name)
        self.originals.pop(name, None)

    @invariant()
    def holds_what_it_must(self) -> None:
        rows = self.engine.rows()
        assert set(rows) == set(self.held)
        for name, row in self.held.items():
            np.testing.assert_allclose(rows[name], row, atol=2e-5, err_msg=name)

    def draw(self, seed: int) -> str:
        return sorted(self.held)[seed % len(self.held)]

    def vector(self, seed: int) -> Vectors:
        row = np.random.default_rng([seed, len(self.held)]).standard_normal(DIM)
        return np.asarray(row / np.linalg.norm(row), np.float32)

    @staticmethod
    def point(name: str) -> Any:  # noqa: ANN401 a number or a UUID
        return int(name) if name.isdigit() else name


class OnEdge(Collection):
    def make(self, folder: Path) -> Engine:
        return Edge(folder, rows=COUNT)


class InMemory(Collection):
    def make(self, folder: Path) -> Engine:
        return Client(folder, rows=COUNT)


class InAFolder(Collection):
    def make(self, folder: Path) -> Engine:
        return Client(folder, path=True, rows=COUNT)


def runs(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


TestOnEdge = OnEdge.TestCase
TestOnEdge.settings = runs(5)
TestInMemory = InMemory.TestCase
TestInMemory.settings = runs(5)
TestInAFolder = InAFolder.TestCase
TestInAFolder.settings = runs(2)
