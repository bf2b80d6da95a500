"""Moves in closed form, and what is around f: against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import unit

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Metric, Side
from simskip_vdb.model import Dropout, Residual, moved
from simskip_vdb.plans import BEYOND, IDENTITY, PENALTIES, Fitted, Plan
from simskip_vdb.refiner import Refiner
from simskip_vdb.ridge import by_ridge
from simskip_vdb.sampling import Problem, mean_direction

ROWS, QUERIES, DIM = 120, 80, 8


@pytest.fixture
def problem() -> Problem:
    """Queries are their row, turned and displaced."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, DIM)) + 1.5
    turn = np.linalg.qr(np.eye(DIM) + 0.2 * rng.normal(size=(DIM, DIM)))[0]
    asked = rng.integers(0, ROWS // 2, QUERIES)  # no query asks for the others
    return Problem(
        vectors=rows.astype(np.float32),
        ids=np.arange(ROWS) * 3,
        metric=Metric.COSINE,
        queries=JudgedQueries(
            ids=tuple(f"q{i}" for i in range(QUERIES)),
            vectors=(rows[asked] @ turn + 0.5).astype(np.float32),
            indptr=np.arange(QUERIES + 1),
            rows=asked,
            grades=np.ones(QUERIES, np.int32),
        ),
        usable=np.ones(ROWS, np.bool_),
    )


def test_a_linear_map_brings_queries_to_their_answers(problem: Problem) -> None:
    settings = FitSettings(side=Side.QUERIES)
    found = by_ridge(problem, Signal.JUDGED, settings, (100.0, 1.0, 0.01))
    queries = problem.queries
    assert queries is not None
    answers = unit(problem.vectors[queries.rows])
    near = [
        float((unit(refiner(queries.vectors)) * answers).sum(axis=1).mean())
        for refiner in (Refiner.identity(DIM), *found.values())
    ]
    assert near == sorted(near)  # the less penalty, the nearer
    assert near[-1] > near[0] + 0.05
    for refiner in found.values():
        assert refiner.side is Side.QUERIES
        assert not refiner.moves_rows


def test_the_map_is_the_one_of_ridge_regression(problem: Problem) -> None:
    penalty = 0.5
    found = by_ridge(problem, Signal.JUDGED, FitSettings(side=Side.QUERIES), (penalty,))
    queries = problem.queries
    assert queries is not None
    origin = mean_direction(problem.vectors, np.arange(ROWS))
    asked = unit(unit(queries.vectors) - origin)
    answers = unit(unit(problem.vectors[queries.rows]) - origin)
    centred = asked - asked.mean(axis=0)
    move = answers - asked
    gram = centred.T @ centred / QUERIES
    scale = np.trace(gram) / DIM
    expected = np.linalg.solve(
        gram + penalty * scale * np.eye(DIM), centred.T @ (move - move.mean(axis=0)) / QUERIES
    ).T
    ((weight, bias),) = found[penalty].layers
    np.testing.assert_allclose(weight, expected, atol=1e-4)
    np.testing.assert_allclose(bias, move.mean(axis=0) - expected @ asked.mean(axis=0), atol=1e-4)


def test_offsets_go_from_rows_to_their_queries(problem: Problem) -> None:
    late = np.zeros(ROWS, np.bool_)
    late[:10] = True
    hidden = Problem(
        vectors=problem.vectors,
        ids=problem.ids,
        metric=problem.metric,
        queries=problem.queries,
        usable=problem.usable,
        late=late,
    )
    found = by_ridge(hidden, Signal.JUDGED, FitSettings(), (10.0, 1.0))
    queries = problem.queries
    assert queries is not None
    judged = np.unique(queries.rows)
    assert found[1.0].offset_ids.tolist() == problem.ids[judged[judged >= 10]].tolist()
    far, near = (np.linalg.norm(found[penalty].offsets, axis=1) for penalty in (1.0, 10.0))
    assert (near < far).all()
    row = int(judged[-1])
    origin = mean_direction(problem.vectors, np.arange(ROWS))
    own = queries.vectors[queries.rows == row]
    moves = unit(unit(own) - origin) - unit(unit(problem.vectors[[row]]) - origin)
    np.testing.assert_allclose(
        found[1.0].offsets[-1], moves.sum(axis=0) / (len(own) + 1), atol=1e-5
    )


@pytest.mark.parametrize("away", [0.0, 0.8])
def test_what_is_learnt_is_what_is_applied(away: float) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    f = Residual(DIM, 0.3)
    torch.nn.init.normal_(f.last.weight)
    f.eval()
    rows = unit(rng.normal(size=(40, DIM)) + 1).astype(np.float32)
    origin = (away * rows.mean(axis=0)).astype(np.float32)
    refiner = Refiner(
        dim=DIM,
        side=Side.DOCS,
        metric=Metric.COSINE,
        alpha=1.0,
        layers=f.folded(),
        origin=origin,
    )
    with torch.no_grad():
        expected = moved(torch.as_tensor(rows), torch.as_tensor(origin), f).numpy()
    np.testing.assert_allclose(refiner.refine_rows(rows, np.arange(40)), expected, atol=1e-5)


def test_a_row_at_the_origin_stays() -> None:
    origin = np.full(4, 0.5, np.float32)
    layer = (np.zeros((4, 4), np.float32), np.ones(4, np.float32))
    refiner = Refiner(
        dim=4, side=Side.DOCS, metric=Metric.DOT, alpha=1.0, layers=(layer,), origin=origin
    )
    rows = np.stack([3 * origin, np.array([1, 0, 0, 0], np.float32)])
    found = refiner.refine_rows(rows, np.arange(2))
    assert (found[0] == rows[0]).all()
    assert np.linalg.norm(found[1]) == pytest.approx(1)
    assert (found[1] != rows[1]).any()


def test_dropout_drops_its_part_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout, x = Dropout(0.3), torch.ones(300, 401, requires_grad=True)
    dropped = dropout(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped.detach())
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_more_is_tried_where_the_best_is_an_end() -> None:
    whole = Refiner.identity(DIM)
    ridge = lambda: {penalty: whole for penalty in PENALTIES}  # noqa: E731

    def fitted(signal: Signal) -> Fitted:
        return Fitted(whole=whole, ridge=ridge, plan=IDENTITY, signal=signal)

    more = fitted(Signal.JUDGED).wider(IDENTITY)
    assert len(set(more)) == len(more)
    assert {plan.penalty for plan in more} == {None, *PENALTIES}
    assert IDENTITY not in more
    inside, end = Plan(alpha=0.75, beta=0.75), Plan(alpha=1.0, beta=1.0)
    assert fitted(Signal.JUDGED).wider(end) == []
    assert fitted(Signal.GROUPS).wider(inside) == []
    assert [plan.alpha for plan in fitted(Signal.GROUPS).wider(end)] == list(BEYOND)
