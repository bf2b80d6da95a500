"""Other ways to move vectors, each in a few lines, on the same footing as ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nudge import NUDGEM, NUDGEN, QueriesAnswersDict
from numpy.typing import NDArray
from torch import Tensor, nn

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import JudgedQueries, Metric, Side, Vectors
from simskip_vdb.evaluation import exact_search
from simskip_vdb.training import Plan, Problem, fit_refiner

EPOCHS = 20
PAIRS = 20_000  # of an epoch
BATCH = 256
SCALE = 20.0  # of cosines in sentence-transformers' ranking loss
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
BORNE = 0.8  # of the agreement at power 0
PROBES = 500
NUMBERS_AT_ONCE = 1 << 24
NUMBERS = 1 << 28  # that NUDGE-M compares on validation; large groups would need billions
NOISE = 0.3  # length of a random move


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moved:
    """Rows after a method, shape (n, d), and what it does to queries."""

    rows: Vectors
    queries: Callable[[Vectors], Vectors]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a method may learn from.

    Attributes:
        vectors: Unit rows, shape (n, d).
        usable: Rows whose vectors may be learnt from, shape (n,).
        fit: Judged queries to learn from.
        validation: Judged queries to choose by.
        validate: Mean of the chosen measure on `validation`.
        seed: Of every draw.
    """

    vectors: Vectors
    usable: NDArray[np.bool_]
    fit: JudgedQueries
    validation: JudgedQueries
    validate: Callable[[Moved], float]
    seed: int


def raw(task: Task) -> Moved:
    """Move nothing."""
    return Moved(rows=task.vectors, queries=lambda queries: queries)


def noise(task: Task) -> Moved:
    """Move every row at random: a control that nothing may mistake for a gain."""
    drawn = np.random.default_rng(task.seed).normal(size=task.vectors.shape)
    rows = _unit(task.vectors + NOISE * _unit(drawn))
    return Moved(rows=rows, queries=lambda queries: queries)


def centring(task: Task) -> Moved:
    """Subtract the mean row from rows and queries."""
    mean = task.vectors[task.usable].mean(axis=0)
    return _mapped(task, lambda x: _unit(x - mean))


def all_but_the_top(task: Task) -> Moved:
    """Subtract the mean and the d / 100 strongest directions (Mu & Viswanath, arXiv:1702.01417)."""
    rows = task.vectors[task.usable]
    mean = rows.mean(axis=0)
    top = np.linalg.svd(rows - mean, full_matrices=False)[2][: max(1, rows.shape[1] // 100)]
    return _mapped(task, lambda x: _unit(x - mean - (x - mean) @ top.T @ top))


def whitening(task: Task) -> Moved:
    """Whiten (Su et al., arXiv:2103.15316) by the largest power that halves of the data bear.

    Two random halves of the dimensions should agree on a row's neighbours; full powers of the
    spectrum amplify noise until they do not. This needs no labels.
    """
    rows = task.vectors[task.usable]
    mean = rows.mean(axis=0)
    values, axes = np.linalg.eigh(np.cov((rows - mean).T).astype(np.float64))
    halves = np.array_split(np.random.default_rng(task.seed).permutation(rows.shape[1]), 2)

    def power(exponent: float) -> Callable[[Vectors], Vectors]:
        scale = np.maximum(values, 1e-9) ** (-exponent / 2)
        matrix = ((axes * scale) @ axes.T).astype(np.float32)
        return lambda x: _unit((x - mean) @ matrix)

    agreed = [_agreement(power(exponent)(rows), halves) for exponent in POWERS]
    borne = [x for x, found in zip(POWERS, agreed, strict=True) if found >= BORNE * agreed[0]]
    return _mapped(task, power(max(borne)))


def simskip(task: Task) -> Moved:
    """Fit SimSkip (arXiv:2404.08701): NT-Xent over masked and noisy views, all of f, both sides."""
    settings = FitSettings(seed=task.seed, signal=Signal.AUGMENT, side=Side.BOTH)
    ids = np.arange(len(task.vectors))
    problem = Problem(vectors=task.vectors, ids=ids, metric=Metric.DOT, usable=task.usable)
    plan = Plan(alpha=1.0, beta=0.0)
    refiner = fit_refiner(problem, settings, lambda _: [], plan=plan).refiner
    return Moved(rows=refiner.refine_rows(task.vectors, ids), queries=refiner)


def linear_adapter(task: Task) -> Moved:
    """Learn a matrix for queries, rows stay (LlamaIndex's EmbeddingAdapterFinetuneEngine)."""
    module = nn.Linear(task.vectors.shape[1], task.vectors.shape[1])
    nn.init.eye_(module.weight)
    nn.init.zeros_(module.bias)
    return _adapted(task, module)


class TwoLayers(nn.Module):
    """x + W₂ ReLU(W₁ x), with W₂ zero at the start (LlamaIndex's TwoLayerNN)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = x + self.last(F.relu(self.first(x)))
        return moved


def two_layer_adapter(task: Task) -> Moved:
    """Learn a residual network for queries, rows stay (LlamaIndex's TwoLayerNN)."""
    torch.manual_seed(task.seed)
    return _adapted(task, TwoLayers(task.vectors.shape[1]))


def nudge_m(task: Task) -> Moved:
    """Run NUDGE-M of the package nudge-ft (Zeighami et al., arXiv:2409.02343)."""
    numbers = max(1, task.validation.rows.size * len(task.vectors) // len(task.validation))
    chosen = np.arange(len(task.validation)) < NUMBERS // numbers
    val = _nudge_set(task.validation.subset(chosen))
    batch = max(1, NUMBERS_AT_ONCE // numbers)
    with contextlib.redirect_stdout(io.StringIO()):
        rows = NUDGEM(torch.device("cpu")).finetune_embeddings(
            task.vectors, _nudge_set(task.fit), val, val_batch_size=batch
        )
    return Moved(rows=rows, queries=lambda queries: queries)


def nudge_n(task: Task) -> Moved:
    """Run NUDGE-N of the package nudge-ft, which keeps rows at unit length."""
    with contextlib.redirect_stdout(io.StringIO()):
        rows = NUDGEN(torch.device("cpu")).finetune_embeddings(
            task.vectors, _nudge_set(task.fit), _nudge_set(task.validation), val_k=10
        )
    return Moved(rows=rows, queries=lambda queries: queries)


PEERS: dict[str, Callable[[Task], Moved]] = {
    "raw": raw,
    "random moves": noise,
    "centring": centring,
    "all-but-the-top": all_but_the_top,
    "whitening": whitening,
    "SimSkip as published": simskip,
    "linear query adapter": linear_adapter,
    "two-layer query adapter": two_layer_adapter,
    "NUDGE-M": nudge_m,
    "NUDGE-N": nudge_n,
}


def _mapped(task: Task, move: Callable[[Vectors], Vectors]) -> Moved:
    return Moved(rows=move(task.vectors), queries=move)


def _adapted(task: Task, module: nn.Module) -> Moved:
    """Train on query and relevant row, in-batch negatives; keep the epoch best on validation."""
    relevant = np.flatnonzero(task.fit.grades > 0)
    queries = torch.from_numpy(task.fit.vectors[task.fit.query_of_judgment()[relevant]])
    rows = torch.from_numpy(task.vectors[task.fit.rows[relevant]])
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(task.seed)
    best, kept = task.validate(raw(task)), raw(task)
    for _ in range(EPOCHS):
        shuffled = torch.randperm(len(relevant), generator=order)[:PAIRS]
        for start in range(0, len(shuffled), BATCH):
            batch = shuffled[start : start + BATCH]
            scores = SCALE * F.normalize(module(queries[batch]), dim=1) @ rows[batch].T
            optimiser.zero_grad()
            F.cross_entropy(scores, torch.arange(len(batch))).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        matrices = {name: value.detach().clone() for name, value in module.state_dict().items()}
        moved = Moved(rows=task.vectors, queries=_apply(module, matrices))
        if (found := task.validate(moved)) > best:
            best, kept = found, moved
    return kept


def _apply(module: nn.Module, weights: dict[str, Tensor]) -> Callable[[Vectors], Vectors]:
    def move(queries: Vectors) -> Vectors:
        with torch.no_grad():
            out: Any = torch.func.functional_call(module, weights, torch.from_numpy(queries))
        return _unit(out.numpy())

    return move


def _nudge_set(judged: JudgedQueries) -> QueriesAnswersDict:
    answers = [
        judged.rows[start:end][judged.grades[start:end] > 0].tolist()
        for start, end in zip(judged.indptr[:-1], judged.indptr[1:], strict=True)
    ]
    return {"q_embs": judged.vectors, "q_ans_indx": answers}


def _agreement(rows: Vectors, halves: list[NDArray[np.int64]]) -> float:
    """Return the part of ten neighbours that both halves of the dimensions find, 0 to 1."""
    found = []
    for half in halves:
        part = _unit(rows[:, half] + 1e-12)  # a row may be zero in one half
        probes = part[:: max(1, len(part) // PROBES)]
        found.append(exact_search(probes, [(0, part)], 11, Metric.DOT).ids[:, 1:])
    return float((found[0][:, :, None] == found[1][:, None, :]).any(axis=2).mean())


def _unit(x: NDArray[Any]) -> Vectors:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)
