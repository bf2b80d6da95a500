"""Fits a refiner: one training loop, then α and β chosen on validation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import Ids, JudgedQueries, Metric, Positions, Side, Vectors
from simskip_vdb.errors import DataError, FitError, MissingDependencyError
from simskip_vdb.refiner import Refiner

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:  # pragma: no cover
    raise MissingDependencyError("torch", "fit") from error

from simskip_vdb.losses import distillation, info_nce
from simskip_vdb.model import Residual
from simskip_vdb.pairs import (
    Pairs,
    group_pairs,
    judged_pairs,
    nearest,
    neighbour_pairs,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a stage's name."""

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What to fit on; positions are row numbers in scan order.

    Attributes:
        vectors: Rows, shape (n, d), float32; may be a memory map.
        ids: Row ids, shape (n,).
        metric: How the index compares.
        queries: Judged queries of the fit split.
        groups: Group of each row, shape (n,); -1 for none.
        usable: Rows that may take part, shape (n,): finite, not zero, not held out.
        late: Rows treated as late, shape (n,): raw competitors that never move.
    """

    vectors: Vectors
    ids: Ids
    metric: Metric
    queries: JudgedQueries | None = None
    groups: NDArray[np.int64] | None = None
    usable: NDArray[np.bool_]
    late: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Choices of an earlier fit, to be used again without a look at validation."""

    steps: int
    alpha: float
    beta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate and what validation said of it."""

    steps: int
    alpha: float
    beta: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A fitted refiner and how it was chosen.

    Attributes:
        refiner: The chosen refiner; the identity where nothing beat it.
        plan: Fits again without choices, such as a probe with some rows late.
        trials: Every candidate in the order tried, the identity first; empty where a plan was given.
        signal: What it learnt from.
    """

    refiner: Refiner
    plan: Plan
    trials: tuple[Trial, ...]
    signal: Signal


def fit_refiner(
    problem: Problem,
    settings: FitSettings,
    validate: Callable[[Refiner], float],
    *,
    progress: Progress = lambda done, total, stage: None,
    plan: Plan | None = None,
) -> Fitted:
    """Fit a refiner and choose how far it moves.

    Args:
        problem: Rows, judgments and groups.
        settings: How to fit.
        validate: Score of a refiner on validation queries, higher is better.
        progress: Called after every step.
        plan: Choices of an earlier fit; `validate` is then not called.

    Raises:
        DataError: The signal has no positives.
        FitError: The loss is not finite.
    """
    signal = _signal(problem, settings)
    snapshots = _train(problem, settings, signal, progress)
    if plan is not None:
        snapshot = next(snapshot for snapshot in snapshots if snapshot.steps == plan.steps)
        refiner = snapshot.refiner(plan.alpha, plan.beta)
        return Fitted(refiner=refiner, plan=plan, trials=(), signal=signal)
    return _choose(snapshots, validate, progress, signal)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Snapshot:
    """The weights after some steps, before α and β are chosen."""

    steps: int
    whole: Refiner

    def refiner(self, alpha: float, beta: float) -> Refiner:
        whole = self.whole
        if alpha == 0:
            whole = replace(whole, layers=())
        if beta == 0:
            whole = replace(whole, offset_ids=whole.offset_ids[:0], offsets=whole.offsets[:0])
        return replace(whole, alpha=alpha, beta=beta)


def _train(
    problem: Problem, settings: FitSettings, signal: Signal, progress: Progress
) -> list[_Snapshot]:
    device = _device(settings.device)
    rng = np.random.default_rng(settings.seed)
    pairs = _pairs(problem, signal, device)
    n, dim = problem.vectors.shape
    rows = np.flatnonzero(problem.usable)
    anchors = pairs.usable
    full = len(rows) <= settings.columns
    hard = nearest(_take(pairs.anchors, anchors), problem.vectors, rows, settings.hard, device)
    hard_of = np.full(len(pairs.anchors), -1)
    hard_of[anchors] = np.arange(len(anchors))
    late = np.zeros(n, dtype=np.bool_) if problem.late is None else problem.late
    offset_rows = np.empty(0, dtype=np.int64)
    if settings.offsets:
        touched = (
            rows if signal is not Signal.JUDGED else np.union1d(pairs.positives(anchors, rng), hard)
        )
        offset_rows = touched[~late[touched]]
    slot_of = np.full(n, len(offset_rows))
    slot_of[offset_rows] = np.arange(len(offset_rows))
    judged = np.unique(pairs.positives(anchors, rng))
    unjudged = np.setdiff1d(rows, judged)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        f = Residual(dim, settings.dropout).to(device)
        # One more row than offsets, always zero, for rows that have none.
        offsets = nn.Parameter(torch.zeros(len(offset_rows) + 1, dim, device=device))
        optimizer = torch.optim.AdamW(
            [
                {"params": list(f.parameters()), "lr": settings.lr, "weight_decay": 1e-4},
                {"params": [offsets], "lr": settings.lr_offsets, "weight_decay": 0.0},
            ]
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * min(step / settings.steps, 1)))
        )
        column_of = np.full(n, -1)
        columns = rows
        if full:
            column_of[columns] = np.arange(len(columns))
        raw_all = (
            F.normalize(torch.as_tensor(_take(problem.vectors, columns), device=device), dim=1)
            if full
            else None
        )
        order = np.empty(0, dtype=np.int64)
        snapshots = []
        for step in range(1, settings.steps + 1):
            if len(order) < min(settings.batch_size, len(anchors)):
                order = np.concatenate([order, rng.permutation(anchors)])
            batch, order = np.sort(order[: settings.batch_size]), order[settings.batch_size :]
            if not full:
                column_of[columns] = -1
                must = np.union1d(pairs.positives(batch, rng), hard[hard_of[batch]])
                more = rng.choice(rows, max(settings.columns - len(must), 0), replace=False)
                columns = np.union1d(must, more)
                column_of[columns] = np.arange(len(columns))
                raw = F.normalize(
                    torch.as_tensor(_take(problem.vectors, columns), device=device), dim=1
                )
            else:
                raw = raw_all
            queries = F.normalize(
                torch.as_tensor(_take(pairs.anchors, batch), device=device), dim=1
            )
            raw_queries = queries
            targets = pairs.targets(batch, column_of)
            f.train()
            if settings.side is Side.BOTH:
                moved = f(torch.cat([queries, raw]))
                queries = F.normalize(queries + moved[: len(queries)], dim=1)
                moved = moved[len(queries) :]
            else:
                moved = f(raw)
            own_offsets = offsets[torch.as_tensor(slot_of[columns], device=device)]
            refined = F.normalize(raw + moved + own_offsets, dim=1)
            left = torch.as_tensor(rng.random(len(columns)) < settings.raw_share, device=device)
            left |= torch.as_tensor(late[columns], device=device)
            keys = torch.where(left[:, None], raw, refined)
            scores = queries @ keys.T / settings.temperature
            ignore = torch.zeros_like(scores, dtype=torch.bool)
            has_own = np.flatnonzero(targets.own >= 0)
            ignore[has_own, targets.own[has_own]] = True
            loss = info_nce(
                scores,
                torch.as_tensor(np.stack([targets.anchor, targets.column]), device=device),
                torch.as_tensor(targets.weight, device=device),
                ignore,
            )
            if settings.focus:
                a, c = torch.as_tensor(targets.anchor), torch.as_tensor(targets.column)
                w = (((raw_queries @ raw.T)[a, c] - 1) / settings.focus).exp()
                w = w / torch.zeros(len(batch)).index_add(0, a, w)[a].clamp_min(1e-20)
                w = (1 - settings.nca) * w + settings.nca * torch.as_tensor(targets.weight)
                loss = info_nce(scores, torch.stack([a, c]), w, ignore)
            if False:
                pm = torch.zeros_like(ignore).index_put(
                    (torch.as_tensor(targets.anchor), torch.as_tensor(targets.column)),
                    torch.tensor(True),
                )
                pos = scores.masked_fill(~pm, -torch.inf).logsumexp(1)
                neg = scores.masked_fill(pm | ignore, -torch.inf).logsumexp(1)
                loss = loss + settings.nca * F.softplus(neg - pos).mean()
            if settings.distil and len(unjudged):
                source = rng.choice(len(targets.anchor), len(batch))
                residual = raw_queries[targets.anchor[source]] - raw[targets.column[source]]
                base = rng.choice(unjudged, len(batch))
                base_rows = (
                    raw[column_of[base]]
                    if full
                    else F.normalize(torch.as_tensor(_take(problem.vectors, base)), dim=1)
                )
                pseudo = F.normalize(base_rows + residual, dim=1)
                loss = loss + settings.distil * len(unjudged) / len(rows) * distillation(
                    pseudo @ keys.T / settings.temperature, pseudo @ raw.T / settings.temperature
                )
            if settings.decay_offsets:
                loss = loss + settings.decay_offsets * own_offsets.square().sum(1).mean()
            if not torch.isfinite(loss):
                raise FitError(f"the loss is {loss.item()} at step {step}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if offsets.grad is not None:
                offsets.grad[-1] = 0
            optimizer.step()
            scheduler.step()
            progress(step, settings.steps, "fit")
            if step % (settings.steps // settings.checkpoints) == 0:
                order_ids = np.argsort(problem.ids[offset_rows], kind="stable")
                snapshots.append(
                    _Snapshot(
                        steps=step,
                        whole=Refiner(
                            dim=dim,
                            side=settings.side,
                            metric=problem.metric,
                            alpha=1.0,
                            beta=1.0,
                            layers=f.folded(),
                            offset_ids=problem.ids[offset_rows][order_ids],
                            offsets=offsets.detach().cpu().numpy()[:-1][order_ids],
                        ),
                    )
                )
    return snapshots


def _choose(
    snapshots: list[_Snapshot],
    validate: Callable[[Refiner], float],
    progress: Progress,
    signal: Signal,
) -> Fitted:
    whole = snapshots[0].whole
    identity = Refiner.identity(whole.dim, side=whole.side, metric=whole.metric)
    best = Trial(steps=0, alpha=0.0, beta=0.0, score=validate(identity))
    trials = [best]

    def attempt(snapshot: _Snapshot, alpha: float, beta: float) -> None:
        nonlocal best
        trial = Trial(
            steps=snapshot.steps,
            alpha=alpha,
            beta=beta,
            score=validate(snapshot.refiner(alpha, beta)),
        )
        trials.append(trial)
        if trial.score > best.score:
            best = trial

    for snapshot in snapshots:
        attempt(snapshot, 1.0, 1.0)
    top = max(trials[1:], key=lambda trial: trial.score)
    snapshot = next(snapshot for snapshot in snapshots if snapshot.steps == top.steps)
    has_offsets = len(whole.offset_ids) > 0
    for alpha in GRID:
        for beta in GRID if has_offsets else (0.0,):
            if (alpha, beta) not in ((0.0, 0.0), (1.0, 1.0)):
                attempt(snapshot, alpha, beta)
    plan = Plan(steps=snapshot.steps, alpha=best.alpha, beta=best.beta)
    refiner = snapshot.refiner(best.alpha, best.beta)
    if best.steps == 0:
        refiner = identity
    elif best.steps != snapshot.steps:
        raise AssertionError
    return Fitted(refiner=refiner, plan=plan, trials=tuple(trials), signal=signal)


def _signal(problem: Problem, settings: FitSettings) -> Signal:
    if settings.signal is not Signal.AUTO:
        return settings.signal
    if problem.queries is not None and len(problem.queries):
        return Signal.JUDGED
    return Signal.NEIGHBOURS if problem.groups is None else Signal.GROUPS


def _pairs(problem: Problem, signal: Signal, device: str) -> Pairs:
    if signal is Signal.JUDGED:
        if problem.queries is None:
            raise DataError("the signal is judged queries and there are none")
        return judged_pairs(problem.queries, problem.usable)
    if signal is Signal.GROUPS:
        if problem.groups is None:
            raise DataError("the signal is groups and there are none")
        return group_pairs(problem.vectors, problem.groups, problem.usable)
    return neighbour_pairs(problem.vectors, problem.usable, 5, device)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _take(vectors: Vectors, rows: Positions) -> Vectors:
    return np.ascontiguousarray(vectors[rows], dtype=np.float32)
