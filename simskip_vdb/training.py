"""Fits a refiner: one training loop, then how far it moves is chosen on validation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import Side
from simskip_vdb.errors import ConfigError, DataError, FitError, MissingDependencyError
from simskip_vdb.refiner import Refiner
from simskip_vdb.threads import asleep, wait_asleep

try:
    wait_asleep()
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise MissingDependencyError("torch", "fit") from error

from simskip_vdb.checkpoint import Checkpoint
from simskip_vdb.losses import distillation, info_nce, nt_xent
from simskip_vdb.model import Residual, moved, projector
from simskip_vdb.plans import IDENTITY, PENALTIES, Fitted, Validate, candidates
from simskip_vdb.plans import Plan as Plan
from simskip_vdb.ridge import by_ridge
from simskip_vdb.sampling import Problem as Problem
from simskip_vdb.sampling import Sampler, Step
from simskip_vdb.working_set import working_set

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and the stage's name."""

# Dimension for which learning rates are given. Adam moves every number as fast, so an offset of d
# numbers grows √d times as fast, and what comes of d inputs d times as fast again (Yang et al.,
# arXiv:2203.03466), while rows keep the length 1.
WIDTH = 384
FASTEST = 6.0  # times the rate that is given, however few dimensions there are
MIN_STEPS = 48
REFRESHED = 4  # times that hard negatives are chosen again
QUERY_STEPS = 3  # times as many where queries alone move, which cost a fifth of a step each
LOOK = 16  # steps on a GPU between two looks at the loss; what is not finite stays so
EPOCHS = 40  # few anchors would be learnt by heart in more

# Weight of distillation where no row is judged; it falls with the share of rows that are.
DISTILLATION = 10.0

# Settings of the label-free views; the paper's are unknown.
MASK_RATE = 0.1
NOISE = 0.02
VIEW_TEMPERATURE = 0.1


def fit_refiner(
    problem: Problem,
    settings: FitSettings,
    validate: Validate,
    *,
    progress: Progress = lambda done, total, stage: None,
    plan: Plan | None = None,
    checkpoint: Path | None = None,
) -> Fitted:
    """Fit a refiner and choose how far it moves.

    Args:
        problem: Rows, judgments and groups.
        settings: How to fit.
        validate: Scores refiners.
        progress: Called after every step.
        plan: Choices of an earlier fit; `validate` is then not called.
        checkpoint: File of this fit alone, by which it goes on after an interruption.

    Raises:
        DataError: The signal has no positives, or there are fewer than two usable rows.
        FitError: The loss is not finite.
    """
    signal = _signal(problem, settings)
    count = np.count_nonzero(problem.usable)
    if count < 2:
        raise DataError(f"{count} rows can be used; a fit needs at least 2")
    settings = replace(settings, device=device_of(settings.device))

    @cache
    def ridge() -> Mapping[float, Refiner]:
        with _at_full_speed():
            return by_ridge(working_set(problem, signal, settings), signal, settings, PENALTIES)

    if plan is None or plan.penalty is None:
        with _at_full_speed():
            chosen_from = working_set(problem, signal, settings)
            whole = _train(chosen_from, settings, signal, progress, checkpoint)
    else:
        whole = ridge()[plan.penalty]
    fitted = Fitted(
        whole=whole,
        ridge=ridge if _has_ridge(signal, settings.side) else None,
        plan=plan or IDENTITY,
        signal=signal,
    )
    return fitted.tried(candidates(signal, settings.side), validate) if plan is None else fitted


def _train(
    problem: Problem,
    settings: FitSettings,
    signal: Signal,
    progress: Progress,
    checkpoint: Path | None,
) -> Refiner:
    device = settings.device
    kind = torch.device(device).type
    usable, dim = np.flatnonzero(problem.usable), problem.vectors.shape[1]
    rng = np.random.default_rng(settings.seed)
    sampler = None
    anchors, offset_rows, keep = usable, usable[:0], np.empty(0, np.float32)
    origin = np.empty(0, np.float32)  # views are compared as published
    if signal is not Signal.AUGMENT:
        sampler = Sampler(problem, signal, settings, rng, device)
        anchors, offset_rows, keep = sampler.anchors, sampler.offset_rows, sampler.keep
        origin = sampler.origin
    epoch = math.ceil(len(anchors) / settings.batch_size)
    total = min(settings.steps, max(MIN_STEPS, EPOCHS * epoch))
    if settings.side is Side.QUERIES:
        total *= QUERY_STEPS
    order = rng.permutation(anchors)

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        f = Residual(dim, settings.dropout).to(device)
        project = projector(dim).to(device)
        m = len(offset_rows)
        # Entry m stays zero, for rows that have no offset.
        offsets = nn.Embedding(m + 1, dim, padding_idx=m, sparse=True).to(device)
        nn.init.zeros_(offsets.weight)
        dense = torch.optim.AdamW(
            [*f.parameters(), *project.parameters()],
            weight_decay=1e-4,
            fused=kind == "cuda" or None,
        )
        sparse = torch.optim.SparseAdam(offsets.parameters())
        parts = {"f": f, "project": project, "offsets": offsets, "dense": dense, "sparse": sparse}
        if sampler is not None:
            parts["sampler"] = sampler
        kept = Checkpoint(checkpoint, _told_apart_by(problem), parts, rng)
        done, order = kept.restore(order)
        for step in range(done + 1, total + 1):
            if sampler is not None and step % max(1, total // REFRESHED) == 0:
                with _as_applied(f):
                    sampler.refresh(lambda c, slots: f(c) + offsets(slots))
            rate = settings.learning_rate * (1 + math.cos(math.pi * (step - 1) / total)) / 2
            wide = dim / WIDTH
            for optimiser, falls in ((dense, wide**1.5), (sparse, wide**0.5)):
                optimiser.param_groups[0]["lr"] = rate * min(1 / falls, FASTEST)
            if len(order) < min(settings.batch_size, len(anchors)):
                order = rng.permutation(anchors)
            batch, order = order[: settings.batch_size], order[settings.batch_size :]

            if sampler is None:
                x = F.normalize(torch.as_tensor(problem.vectors[batch], device=device), dim=1)
                one, two = _view(x), _view(x)  # (b, d)
                loss = nt_xent(project(one + f(one)), project(two + f(two)), VIEW_TEMPERATURE)
            else:
                drawn = sampler.step(batch)
                with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                    loss = _contrast(drawn, f, offsets, settings.side)
            # On a GPU a look at the loss waits for everything that was sent there.
            look = kind != "cuda" or step % LOOK == 0 or step == total
            if look and not torch.isfinite(loss):
                raise FitError(
                    f"the loss is {loss.item()} at step {step} of {total}; lower the learning "
                    f"rate ({settings.learning_rate}) or look for extreme vectors"
                )
            dense.zero_grad()
            sparse.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            dense.step()
            sparse.step()  # type: ignore[no-untyped-call]
            kept.save(step, order, last=step == total)
            progress(step, total, "fit")

    ids = problem.ids[offset_rows]
    by_id = np.argsort(ids, kind="stable")
    return Refiner(
        dim=dim,
        side=settings.side,
        metric=problem.metric,
        alpha=1.0,
        beta=1.0,
        origin=origin,
        layers=f.folded(),
        offset_ids=ids[by_id],
        offsets=(offsets.weight.detach().cpu().numpy()[:m] * keep[:, None])[by_id],
    )


def _has_ridge(signal: Signal, side: Side) -> bool:
    """Tell whether it is known where a query or a row should go."""
    return signal in (Signal.JUDGED, Signal.GROUPS) and side is not Side.BOTH


def _told_apart_by(problem: Problem) -> list[NDArray[Any] | None]:
    """Return what fits of the same rows, in whatever order they are read, differ by."""
    told: list[NDArray[Any] | None] = [problem.ids, problem.usable, problem.groups, problem.late]
    if problem.queries is not None:
        judged = problem.queries
        told += [judged.vectors, judged.indptr, judged.rows, judged.grades, judged.own]
    return told


def _contrast(step: Step, f: Residual, offsets: nn.Embedding, side: Side) -> Tensor:
    """Compare anchors, raw or refined by `side`, with refined rows and raw competitors."""
    queries, pseudo, keys = step.queries, step.pseudo, step.raw  # (b, d), (b or 0, d), (c, d)
    none = torch.full_like(step.own, offsets.num_embeddings - 1)
    if side is Side.QUERIES:
        refined = moved(torch.cat([queries, pseudo]), step.origin, f)
        queries, pseudo = refined[: len(queries)], refined[len(queries) :]
    else:
        slots, x = step.slots, keys
        if side is Side.BOTH:
            slots, x = torch.cat([none, slots]), torch.cat([queries, x])
        refined = moved(x, step.origin, lambda c: f(c) + offsets(slots))
        if side is Side.BOTH:
            queries, refined = refined[: len(queries)], refined[len(queries) :]
        keys = torch.where(step.left_raw[:, None], keys, refined)
    columns = step.columns(keys)
    loss = info_nce(step.compare(queries, columns), step.pairs, step.weights, step.own)
    if len(pseudo):
        # Queries near rows without judgments must go on finding what they found.
        student = step.compare(pseudo, columns)
        teacher = step.compare(step.pseudo, step.columns(step.raw))
        loss = loss + DISTILLATION * step.unjudged_share * distillation(student, teacher)
    return loss


@contextmanager
def _at_full_speed() -> Iterator[None]:
    """Use all threads of torch if they wait asleep, else half of the cores; and oneDNN's products.

    Those are more than twice as fast as MKL's where the processor is not Intel's. They are taken
    where bfloat16 is allowed, and are float32 but on processors with tiles of bfloat16 (AMX).
    """
    threads, products = torch.get_num_threads(), getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(products, "fp32_precision", None)
    if not asleep():
        torch.set_num_threads(min(threads, max(1, (os.cpu_count() or 1) // 2)))
    if products is not None:  # torch 2.9 and newer
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if products is not None:
            products.fp32_precision = precision


@contextmanager
def _as_applied(f: Residual) -> Iterator[None]:
    """Let f compute as it will once it is fitted: without dropout, and without gradients."""
    f.eval()
    with torch.no_grad():
        yield
    f.train()


def _view(x: Tensor) -> Tensor:
    """Return a random view of unit rows: some elements zeroed, and noise.

    Source: SimSkip, arXiv:2404.08701: random masking and Gaussian noise.
    """
    mask = torch.rand_like(x) >= MASK_RATE
    return x * mask + NOISE * torch.randn_like(x)


def _signal(problem: Problem, settings: FitSettings) -> Signal:
    if settings.signal is not Signal.AUTO:
        return settings.signal
    if problem.queries is not None and len(problem.queries):
        return Signal.JUDGED
    return Signal.NEIGHBOURS if problem.groups is None else Signal.GROUPS


def device_of(name: str) -> str:
    """Return the device that a setting stands for.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch finds no such device here; use cpu or auto")
    return name
