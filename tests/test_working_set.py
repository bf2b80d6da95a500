from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from simskip_vdb import sampling, working_set
from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Metric, Positions, Vectors
from simskip_vdb.pairs import judged_pairs, nearest
from simskip_vdb.refiner import Refiner
from simskip_vdb.sampling import Problem
from simskip_vdb.training import Plan, fit_refiner

ROWS, QUERIES, DIM = 1500, 20, 12
QUICK = FitSettings(steps=20, batch_size=32)
LONGER = FitSettings(steps=60, batch_size=32)


class Stored:
    """Rows that tell in which order they were read."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.read: list[Positions] = []

    def take(self, positions: Positions) -> Vectors:
        self.read.append(positions)
        return self.vectors[positions]


@pytest.fixture
def stored() -> Stored:
    return Stored(np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32))


@pytest.fixture
def problem(stored: Stored) -> Problem:
    """Queries near a row each, judged of two rows that may be used and one that may not."""
    rng = np.random.default_rng(2)
    usable = rng.random(ROWS) < 0.9
    good, bad = np.flatnonzero(usable), np.flatnonzero(~usable)
    rows = np.stack(
        [rng.choice(good, QUERIES), rng.choice(good, QUERIES), rng.choice(bad, QUERIES)], axis=1
    )
    near = stored.vectors[rows[:, 0]] + rng.normal(size=(QUERIES, DIM))
    return Problem(
        vectors=np.empty((0, DIM), np.float32),
        on_disk=stored,
        ids=rng.permutation(10 * ROWS)[:ROWS],
        metric=Metric.COSINE,
        queries=JudgedQueries(
            ids=tuple(f"q{i}" for i in range(QUERIES)),
            vectors=near.astype(np.float32),
            indptr=np.arange(0, 3 * QUERIES + 1, 3),
            rows=rows.reshape(-1),
            grades=np.tile(np.array([2, 1, 1], np.int32), QUERIES),
        ),
        groups=rng.integers(-1, 30, ROWS),
        late=rng.random(ROWS) < 0.1,
        usable=usable,
    )


def never(refiners: Sequence[Refiner]) -> list[float]:
    raise AssertionError("a plan leaves nothing to choose")


def ids_of(problem: Problem, judged: JudgedQueries) -> list[list[tuple[int, int]]]:
    """Every query's judgments as (row's id, grade) of rows that may be used."""
    kept = problem.usable[judged.rows]
    listed: list[list[tuple[int, int]]] = [[] for _ in judged.ids]
    query = judged.query_of_judgment()
    for q, row, grade in zip(query[kept], judged.rows[kept], judged.grades[kept], strict=True):
        listed[q].append((int(problem.ids[row]), int(grade)))
    return listed


@pytest.mark.parametrize("signal", list(Signal))
def test_rows_on_disk_that_fit_are_the_same_as_rows_in_memory(
    problem: Problem, stored: Stored, signal: Signal
) -> None:
    settings, plan = replace(QUICK, signal=signal), Plan(alpha=1.0, beta=1.0)
    in_memory = replace(problem, vectors=stored.vectors, on_disk=None)
    one, two = (
        fit_refiner(each, settings, never, plan=plan).refiner for each in (problem, in_memory)
    )
    assert one.id == two.id


def test_all_that_judgments_point_to_is_taken(
    problem: Problem, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_set, "MINED", 16)
    monkeypatch.setattr(working_set, "WORKING_SET", 60)
    small = working_set.working_set(problem, Signal.JUDGED, QUICK)
    assert problem.queries is not None
    assert small.queries is not None
    assert len(small.ids) < ROWS
    assert small.usable.all()
    assert ids_of(small, small.queries) == ids_of(problem, problem.queries)
    at = {int(each): place for place, each in enumerate(problem.ids)}
    places = np.array([at[int(each)] for each in small.ids])
    assert np.array_equal(small.vectors, stored.vectors[places])
    assert small.late is not None
    assert problem.late is not None
    assert np.array_equal(small.late, problem.late[places])
    pairs = judged_pairs(problem.queries, problem.usable)
    rows = np.flatnonzero(problem.usable)
    hard = nearest(pairs.vectors, stored.vectors, rows, k=16, device="cpu")
    assert np.isin(hard, places).all()
    pointed_to = np.union1d(hard, pairs.rows_with_anchors())
    assert 30 < np.setdiff1d(places, pointed_to).size <= 60
    assert all((np.diff(read) > 0).all() for read in stored.read)  # in order, each row once


def test_the_sample_depends_on_the_seed_alone(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_set, "WORKING_SET", 60)
    one, two, other = (
        working_set.working_set(problem, Signal.NEIGHBOURS, replace(QUICK, seed=seed)).ids
        for seed in (1, 1, 2)
    )
    assert len(one) == 60
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("most", "offsets"), [(ROWS, True), (100, False)])
def test_groups_are_whole_unless_they_are_too_many_for_offsets(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, most: int, offsets: bool
) -> None:
    monkeypatch.setattr(working_set, "WORKING_SET", 60)
    for module in (sampling, working_set):
        monkeypatch.setattr(module, "MAX_OFFSETS", most)
    small = working_set.working_set(problem, Signal.GROUPS, QUICK)
    assert small.groups is not None
    assert problem.groups is not None
    grouped = np.count_nonzero((problem.groups >= 0) & problem.usable)
    assert bool(np.count_nonzero(small.groups >= 0) == grouped) is offsets
    settings = replace(QUICK, signal=Signal.GROUPS)
    refiner = fit_refiner(problem, settings, never, plan=Plan(alpha=1.0, beta=1.0)).refiner
    assert bool(len(refiner.offset_ids)) is offsets


def test_a_fit_on_a_part_serves_the_whole(
    problem: Problem, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_set, "WORKING_SET", 60)
    refiner = fit_refiner(problem, LONGER, never, plan=Plan(alpha=1.0, beta=1.0)).refiner
    moved = refiner.refine_rows(stored.vectors, problem.ids)
    assert (moved != stored.vectors).any(axis=1).all()
    assert problem.queries is not None
    pairs = judged_pairs(problem.queries, problem.usable)
    first = pairs.rows[pairs.indptr[:-1]]

    def margin(rows: Vectors) -> float:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        asked = pairs.vectors / np.linalg.norm(pairs.vectors, axis=1, keepdims=True)
        scores = asked @ unit.T
        return float((scores[np.arange(QUERIES), first] - scores.mean(axis=1)).mean())

    assert margin(moved) > margin(stored.vectors) + 0.02
