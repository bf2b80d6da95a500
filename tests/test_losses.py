from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from simskip_vdb.losses import distillation, info_nce, nt_xent


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.as_tensor(rng.normal(size=shape))


def slow_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """SimCLR, algorithm 1, view by view."""
    n = len(z1)
    views = [z for pair in zip(z1.tolist(), z2.tolist(), strict=True) for z in pair]

    def s(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(views[i], views[j], strict=True))
        return float(dot) / math.hypot(*views[i]) / math.hypot(*views[j])

    def loss(i: int, j: int) -> float:
        others = sum(math.exp(s(i, k) / temperature) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s(i, j) / temperature) / others)

    return sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


def slow_info_nce(
    scores: Tensor, positives: dict[tuple[int, int], float], ignored: set[tuple[int, int]]
) -> float:
    """One positive at a time against the anchor's negatives."""
    c = scores.shape[1]
    total = 0.0
    for (i, j), weight in positives.items():
        negatives = sum(
            math.exp(scores[i, k])
            for k in range(c)
            if (i, k) not in positives and (i, k) not in ignored
        )
        positive = math.exp(scores[i, j])
        total -= weight * math.log(positive / (positive + negatives))
    return total / sum(positives.values())


@pytest.mark.parametrize(("n", "temperature"), [(1, 1.0), (2, 0.5), (7, 0.1)])
def test_nt_xent_equals_the_loop(rng: np.random.Generator, n: int, temperature: float) -> None:
    z1, z2 = normal(rng, n, 5), normal(rng, n, 5)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(slow_nt_xent(z1, z2, temperature))


def test_nt_xent_of_equal_views_counts_the_other_views() -> None:
    n = 6
    same = torch.ones(n, 3, dtype=torch.float64)
    # Every one of the 2n - 1 other views is as close as the positive.
    assert nt_xent(same, same, 0.1).item() == pytest.approx(math.log(2 * n - 1))


def test_nt_xent_is_symmetric_and_ignores_length(rng: np.random.Generator) -> None:
    z1, z2 = normal(rng, 5, 4), normal(rng, 5, 4)
    loss = nt_xent(z1, z2, 0.2)
    torch.testing.assert_close(nt_xent(z2, z1, 0.2), loss)
    torch.testing.assert_close(nt_xent(3 * z1, 0.1 * z2, 0.2), loss)


def test_info_nce_equals_the_loop(rng: np.random.Generator) -> None:
    scores = normal(rng, 4, 9)
    positives = {(0, 1): 0.5, (0, 2): 0.5, (1, 8): 1.0, (3, 0): 2.0, (3, 5): 0.25}
    ignored = {(0, 0), (1, 3), (1, 4)}
    ignore = torch.zeros(4, 9, dtype=torch.bool)
    for place in ignored:
        ignore[place] = True
    loss = info_nce(
        scores,
        torch.tensor(list(positives)).T,
        torch.tensor(list(positives.values()), dtype=torch.float64),
        ignore,
    )
    assert loss.item() == pytest.approx(slow_info_nce(scores, positives, ignored))


def test_info_nce_with_one_positive_each_is_cross_entropy(rng: np.random.Generator) -> None:
    scores = normal(rng, 6, 6)
    diagonal = torch.arange(6)
    loss = info_nce(
        scores,
        torch.stack([diagonal, diagonal]),
        torch.ones(6),
        torch.zeros(6, 6, dtype=torch.bool),
    )
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, diagonal))


def test_info_nce_pushes_neither_ignored_columns_nor_other_positives(
    rng: np.random.Generator,
) -> None:
    scores = normal(rng, 1, 5).requires_grad_()
    ignore = torch.tensor([[True, False, False, False, False]])
    pairs = torch.tensor([[0, 0], [1, 2]])
    info_nce(scores, pairs, torch.tensor([1.0, 1.0]), ignore).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    gradient = scores.grad[0]
    assert gradient[0] == 0
    assert (gradient[1:3] < 0).all()
    assert (gradient[3:] > 0).all()


def test_info_nce_without_negatives_is_zero_with_a_finite_gradient() -> None:
    scores = torch.zeros(1, 2, requires_grad=True)
    pairs = torch.tensor([[0, 0], [0, 1]])
    loss = info_nce(scores, pairs, torch.ones(2), torch.zeros(1, 2, dtype=torch.bool))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_distillation_is_the_divergence_from_the_teacher(rng: np.random.Generator) -> None:
    student, teacher = normal(rng, 3, 4), normal(rng, 3, 4)
    p, q = teacher.exp(), student.exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    expected = sum(float(p[i, j]) * math.log(p[i, j] / q[i, j]) for i in range(3) for j in range(4))
    assert distillation(student, teacher).item() == pytest.approx(expected / 3)
    assert distillation(teacher + 5, teacher).item() == pytest.approx(0, abs=1e-12)


def test_distillation_sends_no_gradient_to_the_teacher(rng: np.random.Generator) -> None:
    student, teacher = normal(rng, 3, 4).requires_grad_(), normal(rng, 3, 4).requires_grad_()
    distillation(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
