"""Moves in closed form, by ridge regression: little data is enough, and nothing can diverge.

A query moves by a linear map of its direction towards the rows that answer it; a row moves by an
offset towards the queries that it answers. The penalty shrinks either towards no move: by how much
of the directions' mean variance, or by how many queries that found nothing.
Source: Hoerl & Kennard, Technometrics 12, 1970.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import Side
from simskip_vdb.model import directions
from simskip_vdb.refiner import Refiner
from simskip_vdb.sampling import Problem, Sampler, Step

PASSES = 4
"""Times that every anchor is met: of many rows, each time with others of its answers."""


def by_ridge(
    problem: Problem, signal: Signal, settings: FitSettings, penalties: tuple[float, ...]
) -> Mapping[float, Refiner]:
    """Fit a refiner for each penalty.

    Args:
        problem: Rows in memory, judgments and groups.
        signal: What to learn from: judged queries, groups or neighbours.
        settings: How to fit; with side QUERIES queries move, else rows.
        penalties: Above 0.

    Raises:
        DataError: The signal has no positives.
    """
    rng = np.random.default_rng(settings.seed)
    sampler = Sampler(problem, signal, settings, rng, settings.device)
    empty = Refiner(
        dim=problem.vectors.shape[1],
        side=settings.side,
        metric=problem.metric,
        alpha=1.0,
        beta=1.0,
        origin=sampler.origin,
    )
    steps = _steps(sampler, settings, rng)
    if settings.side is Side.QUERIES:
        return _maps(empty, steps, penalties)
    return _offsets(empty, steps, problem, sampler, penalties)


def _steps(sampler: Sampler, settings: FitSettings, rng: np.random.Generator) -> Iterator[Step]:
    for _ in range(PASSES):
        order = rng.permutation(sampler.anchors)
        for start in range(0, len(order), settings.batch_size):
            yield sampler.step(np.sort(order[start : start + settings.batch_size]))


def _maps(
    empty: Refiner, steps: Iterator[Step], penalties: tuple[float, ...]
) -> dict[float, Refiner]:
    """Return linear maps c ↦ Wc + b of a query's direction to its move."""
    d = empty.dim
    count, moments, products = 0, np.zeros((d, d)), np.zeros((d, d))
    sum_c, sum_move = np.zeros(d), np.zeros(d)
    for step in steps:
        asked, rows = (directions(x, step.origin)[0] for x in (step.queries, step.raw))
        anchor, column = step.pairs
        answers = torch.zeros_like(asked).index_add(0, anchor, step.weights[:, None] * rows[column])
        c, move = (x.double().cpu().numpy() for x in (asked, F.normalize(answers, dim=1) - asked))
        count += len(c)
        moments += c.T @ c
        products += c.T @ move
        sum_c += c.sum(axis=0)
        sum_move += move.sum(axis=0)
    mean_c, mean_move = sum_c / count, sum_move / count
    covariance = moments / count - np.outer(mean_c, mean_c)
    towards = products / count - np.outer(mean_c, mean_move)
    scale = max(float(np.trace(covariance)) / d, np.finfo(np.float32).eps)
    found = {}
    for penalty in penalties:
        weight = np.linalg.solve(covariance + penalty * scale * np.eye(d), towards).T
        bias = mean_move - weight @ mean_c
        layer = (weight.astype(np.float32), bias.astype(np.float32))
        found[penalty] = replace(empty, layers=(layer,))
    return found


def _offsets(
    empty: Refiner,
    steps: Iterator[Step],
    problem: Problem,
    sampler: Sampler,
    penalties: tuple[float, ...],
) -> dict[float, Refiner]:
    """Return offsets from each row to its queries."""
    m = len(sampler.offset_rows)
    sums, counts = torch.zeros(m + 1, empty.dim), torch.zeros(m + 1)
    for step in steps:
        asked, rows = (directions(x, step.origin)[0] for x in (step.queries, step.raw))
        anchor, column = step.pairs
        slots: Tensor = step.slots[column].cpu()
        sums.index_add_(0, slots, (asked[anchor] - rows[column]).cpu())
        counts.index_add_(0, slots, torch.ones(len(slots)))
    counts = counts / PASSES
    sums = sums / PASSES
    met = np.flatnonzero(counts[:m].numpy() > 0)
    ids = problem.ids[sampler.offset_rows[met]]
    by_id = np.argsort(ids, kind="stable")
    met, ids = met[by_id], ids[by_id]
    return {
        penalty: replace(
            empty,
            offset_ids=ids,
            offsets=(sums[met] / (counts[met, None] + penalty)).numpy(),
        )
        for penalty in penalties
    }
