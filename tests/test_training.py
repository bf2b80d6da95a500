from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from simskip_vdb import checkpoint, residence, sampling, training
from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Metric, Side, Vectors
from simskip_vdb.errors import DataError, FitError
from simskip_vdb.model import Residual
from simskip_vdb.plans import candidates
from simskip_vdb.refiner import Refiner
from simskip_vdb.sampling import Sampler
from simskip_vdb.training import Plan, Problem, fit_refiner

ROWS, QUERIES, DIM, GROUPS = 240, 120, 16, 8
QUICK = FitSettings(steps=30, batch_size=64)


def make_problem(seed: int = 3, noise: float = 0.6) -> Problem:
    """Rows in groups, and queries displaced from their group's rows by one common shift."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(GROUPS, DIM))
    groups = rng.integers(0, GROUPS, ROWS)
    vectors = centres[groups] + noise * rng.normal(size=(ROWS, DIM))
    topics = rng.integers(0, GROUPS, QUERIES)
    queries = centres[topics] + 2.0 * rng.normal(size=DIM) + noise * rng.normal(size=(QUERIES, DIM))
    relevant = [np.flatnonzero(groups == topic) for topic in topics]
    rows = np.concatenate(relevant)
    judged = JudgedQueries(
        ids=tuple(f"q{i}" for i in range(QUERIES)),
        vectors=queries.astype(np.float32),
        indptr=np.concatenate([[0], np.cumsum([len(one) for one in relevant])]).astype(np.int64),
        rows=rows,
        grades=np.ones(len(rows), dtype=np.int32),
    )
    return Problem(
        vectors=(3 * vectors).astype(np.float32),
        ids=rng.permutation(10 * ROWS)[:ROWS],
        metric=Metric.COSINE,
        queries=judged,
        groups=groups,
        usable=np.ones(ROWS, dtype=np.bool_),
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem()


def split(problem: Problem) -> tuple[Problem, JudgedQueries]:
    assert problem.queries is not None
    fit = np.arange(QUERIES) % 2 == 0
    return replace(problem, queries=problem.queries.subset(fit)), problem.queries.subset(~fit)


def precision(problem: Problem, held: JudgedQueries) -> Callable[[Refiner], float]:
    """Precision at 10 of queries the fit did not see, by cosine."""

    def validate(refiner: Refiner) -> float:
        rows = refiner.refine_rows(problem.vectors, problem.ids, problem.late)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        top = np.argsort(-(refiner(held.vectors) @ rows.T), axis=1)[:, :10]
        found = [
            np.isin(top[i], held.rows[held.indptr[i] : held.indptr[i + 1]])
            for i in range(len(held))
        ]
        return float(np.mean(found))

    return validate


def each(validate: Callable[[Refiner], float]) -> Callable[[Sequence[Refiner]], list[float]]:
    return lambda refiners: [validate(refiner) for refiner in refiners]


def nothing(refiners: Sequence[Refiner]) -> list[float]:
    return [0.0] * len(refiners)


def never(refiners: Sequence[Refiner]) -> list[float]:
    raise AssertionError("a plan leaves nothing to choose")


@pytest.mark.parametrize("side", [Side.DOCS, Side.QUERIES, Side.BOTH])
def test_judged_queries_lift_queries_that_were_not_seen(problem: Problem, side: Side) -> None:
    fit, held = split(problem)
    validate = precision(fit, held)
    fitted = fit_refiner(fit, replace(QUICK, side=side, steps=60), each(validate))
    before, after = validate(Refiner.identity(DIM)), validate(fitted.refiner)
    assert fitted.signal is Signal.JUDGED
    assert after > before + 0.1
    assert fitted.trials[0].score == before
    assert max(trial.score for trial in fitted.trials) == after
    assert fitted.refiner.side is side


def test_groups_lift_precision() -> None:
    problem = make_problem(noise=1.2)
    held = np.arange(ROWS) % 5 == 0
    fit = replace(problem, queries=None, usable=~held)
    assert problem.groups is not None
    groups = problem.groups

    def validate(refiner: Refiner) -> float:
        rows = refiner.refine_rows(problem.vectors, problem.ids)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        scores = np.where(held, -np.inf, problem.vectors[held] @ rows.T)
        top = np.argsort(-scores, axis=1)[:, :10]
        return float((groups[top] == groups[held][:, None]).mean())

    fitted = fit_refiner(fit, QUICK, each(validate))
    assert fitted.signal is Signal.GROUPS
    assert validate(fitted.refiner) > validate(Refiner.identity(DIM)) + 0.02
    assert not np.isin(problem.ids[held], fitted.refiner.offset_ids).any()


@pytest.mark.parametrize("signal", [Signal.NEIGHBOURS, Signal.AUGMENT])
def test_label_free_signals_move_rows_by_f_alone(problem: Problem, signal: Signal) -> None:
    alone = replace(problem, queries=None, groups=None)
    plan = Plan(alpha=1.0, beta=1.0)
    fitted = fit_refiner(alone, replace(QUICK, signal=signal), never, plan=plan)
    assert not len(fitted.refiner.offset_ids)
    moved = fitted.refiner.refine_rows(problem.vectors, problem.ids)
    assert not np.allclose(moved, problem.vectors, atol=1e-3)


def test_an_odd_row_at_the_end_of_an_epoch_is_no_batch_of_its_own(problem: Problem) -> None:
    settings = replace(QUICK, steps=3, batch_size=ROWS - 1, signal=Signal.AUGMENT)
    fitted = fit_refiner(problem, settings, nothing)
    assert fitted.refiner.is_identity


def test_auto_without_queries_or_groups_takes_neighbours(problem: Problem) -> None:
    alone = replace(problem, queries=None, groups=None)
    fitted = fit_refiner(alone, replace(QUICK, steps=2), nothing)
    assert fitted.signal is Signal.NEIGHBOURS


def test_identity_wins_where_nothing_helps(problem: Problem) -> None:
    def validate(refiner: Refiner) -> float:
        return 0.5 if refiner.is_identity else 0.5 - refiner.alpha

    fitted = fit_refiner(problem, replace(QUICK, steps=2), each(validate))
    assert fitted.refiner.is_identity
    assert fitted.plan.alpha == fitted.plan.beta == 0
    assert [trial.plan for trial in fitted.trials] == candidates(Signal.JUDGED, Side.DOCS)


def test_f_and_offsets_move_by_the_weight_that_validates_best(problem: Problem) -> None:
    def validate(refiner: Refiner) -> float:
        return -abs(refiner.alpha - 0.75) - abs(refiner.beta - 0.75)

    fitted = fit_refiner(problem, replace(QUICK, steps=2), each(validate))
    assert (fitted.refiner.alpha, fitted.refiner.beta) == (0.75, 0.75)
    assert fitted.refiner.layers
    assert len(fitted.refiner.offset_ids)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.75)])
def test_a_refiner_holds_only_what_moves(problem: Problem, alpha: float, beta: float) -> None:
    plan = Plan(alpha=alpha, beta=beta)
    refiner = fit_refiner(problem, replace(QUICK, steps=2), never, plan=plan).refiner
    assert (refiner.alpha, refiner.beta) == (alpha, beta)
    assert bool(refiner.layers) == (alpha > 0)
    assert bool(len(refiner.offset_ids)) == (beta > 0)


def test_same_seed_same_refiner(problem: Problem) -> None:
    plan = Plan(alpha=1.0, beta=0.5)
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    onednn: Any = torch.backends.mkldnn
    threads, precision = torch.get_num_threads(), onednn.matmul.fp32_precision
    one, two, other = (
        fit_refiner(problem, replace(QUICK, seed=seed), never, plan=plan).refiner
        for seed in (1, 1, 2)
    )
    assert one.id == two.id
    assert one.id != other.id
    assert torch.equal(torch.random.get_rng_state(), state)
    assert str(np.random.get_state(legacy=False)) == str(numpy_state)  # noqa: NPY002
    assert torch.get_num_threads() == threads
    assert onednn.matmul.fp32_precision == precision


def test_plan_repeats_the_choices_of_a_fit(problem: Problem) -> None:
    fit, held = split(problem)
    fitted = fit_refiner(fit, QUICK, each(precision(fit, held)))
    again = fit_refiner(fit, QUICK, never, plan=fitted.plan)
    assert again.refiner.id == fitted.refiner.id
    assert again.trials == ()


def test_late_rows_have_no_offset_and_never_move(problem: Problem) -> None:
    late = np.arange(ROWS) % 10 == 0
    plan = Plan(alpha=1.0, beta=1.0)
    refiner = fit_refiner(replace(problem, late=late), QUICK, never, plan=plan).refiner
    assert not np.isin(problem.ids[late], refiner.offset_ids).any()
    moved = refiner.refine_rows(problem.vectors, problem.ids, late)
    assert np.array_equal(moved[late], problem.vectors[late])
    assert (moved[~late] != problem.vectors[~late]).any(axis=1).all()


def test_rows_that_are_only_negatives_keep_half_of_their_offsets(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem.queries is not None
    fit = replace(problem, queries=problem.queries.subset(np.arange(QUERIES) < GROUPS // 2))
    assert fit.queries is not None
    whole = Plan(alpha=1.0, beta=1.0)
    halved = fit_refiner(fit, QUICK, never, plan=whole).refiner
    monkeypatch.setattr(sampling, "NEGATIVES_KEEP", 1.0)
    learnt = fit_refiner(fit, QUICK, never, plan=whole).refiner
    judged = problem.ids[fit.queries.rows[fit.queries.grades > 0]]
    negative = ~np.isin(learnt.offset_ids, judged)
    assert 0 < negative.sum() < len(negative)
    assert (learnt.offsets != 0).any(axis=1).all()
    np.testing.assert_array_equal(halved.offsets[~negative], learnt.offsets[~negative])
    np.testing.assert_array_equal(halved.offsets[negative], learnt.offsets[negative] / 2)


def test_late_and_raw_competitors_are_left_raw(problem: Problem) -> None:
    late = np.arange(ROWS) % 10 == 0
    for share, least, most in ((0.0, 0.1, 0.1), (0.5, 0.5, 0.6)):
        settings = replace(QUICK, raw_share=share)
        rng = np.random.default_rng(0)
        step = Sampler(replace(problem, late=late), Signal.GROUPS, settings, rng, "cpu").step(
            np.arange(4)
        )
        left = step.left_raw.numpy()  # every row is a column
        assert left[late].all()
        assert least <= left.mean() <= most


def test_both_sides_train_another_f(problem: Problem) -> None:
    plan = Plan(alpha=1.0, beta=0.0)
    docs, both = (
        fit_refiner(problem, replace(QUICK, steps=5, side=side), never, plan=plan).refiner
        for side in (Side.DOCS, Side.BOTH)
    )
    assert not np.allclose(docs.layers[-1][0], both.layers[-1][0])


def test_distillation_keeps_what_pseudo_queries_find(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem.queries is not None
    few = replace(problem, queries=problem.queries.subset(np.arange(QUERIES) < 2))
    moved = []
    for weight in (0.0, 10.0):
        monkeypatch.setattr(training, "DISTILLATION", weight)
        plan = Plan(alpha=1.0, beta=1.0)
        refiner = fit_refiner(few, QUICK, never, plan=plan).refiner
        after = refiner.refine_rows(problem.vectors, problem.ids)
        moved.append(np.linalg.norm(after - problem.vectors))
    assert moved[1] < 0.9 * moved[0]


@pytest.mark.parametrize("metric", list(Metric))
def test_scores_are_the_metric_of_the_index(problem: Problem, metric: Metric) -> None:
    queries = problem.queries
    assert queries is not None
    one = replace(problem, metric=metric)
    rng = np.random.default_rng(0)
    settings = replace(QUICK, raw_share=0.0)
    step = Sampler(one, Signal.JUDGED, settings, rng, "cpu").step(np.arange(20))
    scores = step.compare(step.queries, step.columns(step.raw)).scores(slice(None)).numpy()
    scores = scores * step.temperature
    q, x = queries.vectors[:20], problem.vectors
    norms = np.linalg.norm(x, axis=1)
    size = np.median(norms)
    unit = q / np.linalg.norm(q, axis=1, keepdims=True)
    expected = {
        Metric.COSINE: unit @ (x / norms[:, None]).T,
        Metric.DOT: unit @ x.T / size,
        Metric.EUCLID: -((q[:, None] - x[None]) ** 2).sum(axis=2) / 2 / size**2,
    }[metric]
    # Softmax does not see what all columns of an anchor share.
    differences = scores - scores[:, :1]
    np.testing.assert_allclose(differences, expected - expected[:, :1], atol=1e-4)


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.EUCLID])
def test_other_metrics_fit_too(problem: Problem, metric: Metric) -> None:
    fit, held = split(replace(problem, metric=metric))
    validate = precision(fit, held)
    refiner = fit_refiner(fit, QUICK, each(validate)).refiner
    assert validate(refiner) > validate(Refiner.identity(DIM)) + 0.1


def test_columns_hold_positives_hard_negatives_and_usable_rows(problem: Problem) -> None:
    usable = np.arange(ROWS) % 7 != 0
    settings = replace(QUICK, columns=60, batch_size=4)
    rng = np.random.default_rng(0)
    sampler = Sampler(replace(problem, usable=usable), Signal.JUDGED, settings, rng, "cpu")
    whole = problem.vectors / np.linalg.norm(problem.vectors, axis=1, keepdims=True)
    for _ in range(10):
        step = sampler.step(np.array([3, 8, 50, 7]))
        columns = np.argmax(step.raw.numpy() @ whole.T, axis=1)
        assert len(set(columns.tolist())) == len(columns)
        assert len(columns) == 60  # a product is compiled for every shape
        assert usable[columns].all()
        assert set(step.pairs[0].tolist()) == {0, 1, 2, 3}
        assert step.weights.sum().item() == pytest.approx(4)


def test_anchors_that_are_rows_ignore_themselves(problem: Problem) -> None:
    sampler = Sampler(problem, Signal.GROUPS, QUICK, np.random.default_rng(0), "cpu")
    batch = np.array([5, 9])
    step = sampler.step(batch)
    assert step.own.tolist() == batch.tolist()  # every row is a column
    assert step.weights[step.pairs[0] == 0].sum().item() == pytest.approx(1)


def test_near_positives_weigh_more(problem: Problem) -> None:
    sampler = Sampler(problem, Signal.GROUPS, QUICK, np.random.default_rng(0), "cpu")
    step = sampler.step(np.array([5]))
    cosine = (step.raw @ step.queries[0])[step.pairs[1]]
    order = cosine.argsort()
    assert (step.weights[order].diff() >= 0).all()
    floor = (1 - sampling.NEAR_SHARE) / len(order)
    assert floor <= step.weights.min().item() < 1.5 * floor


def test_pseudo_queries_lie_near_rows_without_judgments(problem: Problem) -> None:
    queries = problem.queries
    assert queries is not None
    few = queries.subset(np.isin(queries.rows[queries.indptr[:-1]], queries.rows[:1]))
    sampler = Sampler(
        replace(problem, queries=few), Signal.JUDGED, QUICK, np.random.default_rng(0), "cpu"
    )
    step = sampler.step(np.arange(len(few)))
    judged = np.isin(np.arange(ROWS), few.rows)
    assert step.unjudged_share == pytest.approx((~judged).mean())
    assert len(step.pseudo) == len(few)
    everything = Sampler(problem, Signal.JUDGED, QUICK, np.random.default_rng(0), "cpu")
    assert everything.step(np.arange(4)).pseudo.shape == (0, DIM)


def test_memory_map_gives_the_same_refiner(problem: Problem, tmp_path: object) -> None:
    path = f"{tmp_path}/rows.npy"
    np.save(path, problem.vectors)
    mapped: Vectors = np.load(path, mmap_mode="r")
    plan = Plan(alpha=1.0, beta=1.0)
    quick = replace(QUICK, steps=5, columns=100)
    one = fit_refiner(problem, quick, never, plan=plan).refiner
    two = fit_refiner(replace(problem, vectors=mapped), quick, never, plan=plan).refiner
    assert one.id == two.id


def test_folded_layers_equal_torch(rng: np.random.Generator) -> None:
    torch.manual_seed(0)
    f = Residual(DIM, 0.3)
    with torch.no_grad():
        f.last.weight.normal_(std=0.3)
        for norm in (f.down_norm, f.up_norm):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    x = torch.as_tensor(rng.normal(size=(200, DIM)), dtype=torch.float32)
    x = torch.nn.functional.normalize(x, dim=1)
    for _ in range(5):
        f(x)
    f.eval()
    refiner = Refiner(dim=DIM, side=Side.DOCS, metric=Metric.COSINE, alpha=0.5, layers=f.folded())
    expected = torch.nn.functional.normalize(x + 0.5 * f(x), dim=1).detach().numpy()
    found = refiner.refine_rows(x.numpy(), np.arange(200))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - x.numpy()).max() > 0.1


def test_f_starts_at_zero() -> None:
    assert not Residual(1, 0.0)(torch.ones(4, 1)).any()
    assert not Residual(DIM, 0.3)(torch.rand(4, DIM)).any()


def test_progress_counts_every_step(problem: Problem) -> None:
    seen: list[tuple[int, int, str]] = []
    plan = Plan(alpha=1.0, beta=1.0)
    fit_refiner(
        problem,
        replace(QUICK, steps=3),
        never,
        progress=lambda *event: seen.append(event),
        plan=plan,
    )
    assert seen == [(1, 3, "fit"), (2, 3, "fit"), (3, 3, "fit")]


def test_a_loss_that_is_not_finite_stops(problem: Problem) -> None:
    vectors: NDArray[np.float32] = problem.vectors.copy()
    vectors[0, 0] = np.nan
    with pytest.raises(FitError, match="the loss is nan at step 1"):
        fit_refiner(replace(problem, vectors=vectors), QUICK, nothing)


@pytest.mark.parametrize("signal", [Signal.JUDGED, Signal.GROUPS])
def test_a_signal_that_is_not_there_is_refused(problem: Problem, signal: Signal) -> None:
    alone = replace(problem, queries=None, groups=None)
    with pytest.raises(DataError, match="there are none"):
        fit_refiner(alone, replace(QUICK, signal=signal), nothing)


def test_one_usable_row_is_refused(problem: Problem) -> None:
    usable = np.arange(ROWS) == 4
    with pytest.raises(DataError, match="1 rows can be used"):
        fit_refiner(replace(problem, usable=usable), QUICK, nothing)


def test_missing_torch_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from simskip_vdb.errors import MissingDependencyError\n"
        "try:\n    import simskip_vdb.training\n"
        "except MissingDependencyError as error:\n    print(error.package, error.extra)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", "fit"]


def test_auto_device_is_one_that_exists() -> None:
    assert training.device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert training.device_of("cpu") == "cpu"


class Killed(Exception):
    """Stands for a process that ends in the middle of a fit."""


@pytest.mark.parametrize("columns", [50, 4096])
@pytest.mark.parametrize("signal", list(Signal))
def test_an_interrupted_fit_goes_on_to_the_same_bits(
    problem: Problem,
    signal: Signal,
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    settings = replace(QUICK, signal=signal, columns=columns)
    plan = Plan(alpha=1.0, beta=1.0)
    steps: list[int] = []

    def kill(done: int, total: int, stage: str) -> None:
        if done == 17:
            raise Killed

    whole = fit_refiner(problem, settings, never, plan=plan).refiner
    with pytest.raises(Killed):
        fit_refiner(problem, settings, never, plan=plan, progress=kill, checkpoint=tmp_path / "fit")
    resumed = fit_refiner(
        problem,
        settings,
        never,
        plan=plan,
        progress=lambda done, total, stage: steps.append(done),
        checkpoint=tmp_path / "fit",
    ).refiner
    assert steps[0] == 18
    assert resumed.id == whole.id


@pytest.mark.parametrize("damage", ["short", "noise", "pickle", "bit", "version"])
def test_a_checkpoint_that_is_of_no_use_is_passed_over(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    plan, file = Plan(alpha=1.0, beta=1.0), tmp_path / "fit"
    settings = replace(QUICK, steps=4)
    whole = fit_refiner(problem, settings, never, plan=plan, checkpoint=file).refiner
    content = file.read_bytes()
    if damage == "version":
        monkeypatch.setattr(torch, "__version__", "0")
    else:
        half = len(content) // 2
        bit = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        damaged = {"short": content[:half], "noise": b"noise" * 99, "pickle": b"\x80\x04."}
        file.write_bytes({**damaged, "bit": bit}[damage])
    again = fit_refiner(problem, settings, never, plan=plan, checkpoint=file).refiner
    assert again.id == whole.id


@pytest.mark.parametrize("other", ["queries", "order", "usable"])
def test_a_checkpoint_of_another_problem_is_passed_over(
    problem: Problem, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    plan, file, settings = Plan(alpha=1.0, beta=1.0), tmp_path / "fit", replace(QUICK, steps=4)
    fit_refiner(problem, settings, never, plan=plan, checkpoint=file)
    judged = problem.queries
    assert judged is not None
    if other == "queries":  # of as many as before
        few = judged.subset(np.arange(QUERIES) % 2 == 0)
        fit_refiner(replace(problem, queries=few), settings, never, plan=plan, checkpoint=file)
        problem = replace(problem, queries=judged.subset(np.arange(QUERIES) % 2 == 1))
    elif other == "order":  # the same rows and judgments, read from the last to the first
        queries = replace(judged, rows=ROWS - 1 - judged.rows)
        problem = replace(
            problem, ids=problem.ids[::-1], vectors=problem.vectors[::-1], queries=queries
        )
    else:
        problem = replace(problem, usable=np.arange(ROWS) != judged.rows[0])
    alone = fit_refiner(problem, settings, never, plan=plan).refiner
    steps: list[int] = []
    found = fit_refiner(
        problem,
        settings,
        never,
        plan=plan,
        progress=lambda done, total, stage: steps.append(done),
        checkpoint=file,
    ).refiner
    assert steps == [1, 2, 3, 4]
    assert found.id == alone.id


def test_vectors_on_the_device_are_those_that_are_sent(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(alpha=1.0, beta=1.0)
    sent = fit_refiner(problem, QUICK, never, plan=plan).refiner
    monkeypatch.setattr(residence, "_free", lambda device: np.inf)
    there = fit_refiner(problem, QUICK, never, plan=plan).refiner
    assert sent.id == there.id


@pytest.mark.parametrize("side", [Side.DOCS, Side.QUERIES, Side.BOTH])
def test_hard_negatives_are_the_mined_rows_nearest_as_rows_are_now(
    problem: Problem, side: Side
) -> None:
    settings = replace(QUICK, columns=50, side=side)
    sampler = Sampler(problem, Signal.JUDGED, settings, np.random.default_rng(0), "cpu")
    unit = problem.vectors / np.linalg.norm(problem.vectors, axis=1, keepdims=True)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0].astype(np.float32)

    def move(direction: Tensor, slots: Tensor) -> Tensor:
        return direction @ torch.as_tensor(turn) - direction

    def turned(x: Vectors) -> Vectors:
        apart = x - sampler.origin
        moved = sampler.origin + apart @ turn
        return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True))

    sampler.refresh(move)
    hard = sampler.state_dict()["hard"].numpy()
    assert problem.queries is not None
    mined = np.argsort(-(problem.queries.vectors @ unit.T), axis=1)[:, : sampling.MINED]
    queries = problem.queries.vectors / np.linalg.norm(problem.queries.vectors, axis=1)[:, None]
    asked = queries if side is Side.DOCS else turned(queries)
    rows = unit if side is Side.QUERIES else turned(unit)
    for query in range(0, QUERIES, 7):
        scores = rows[mined[query]] @ asked[query]
        nearest = mined[query][np.argsort(-scores)[: sampling.HARD_NEGATIVES]]
        assert set(hard[query]) == set(nearest)
