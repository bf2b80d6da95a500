from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from simskip_vdb import losses
from simskip_vdb.losses import Similarity, distillation, info_nce, nt_xent


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.as_tensor(rng.normal(size=shape))


def given(scores: Tensor) -> Similarity:
    """Similarity that has these scores."""
    return Similarity(scores, torch.eye(scores.shape[1], dtype=scores.dtype))


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


def slow_info_nce(scores: Tensor, positives: dict[tuple[int, int], float], own: list[int]) -> float:
    """One positive at a time against the anchor's negatives."""
    c = scores.shape[1]
    total = 0.0
    for (i, j), weight in positives.items():
        negatives = sum(
            math.exp(scores[i, k]) for k in range(c) if (i, k) not in positives and k != own[i]
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
    own = [0, 3, -1, 8]
    loss = info_nce(
        given(scores),
        torch.tensor(list(positives)).T,
        torch.tensor(list(positives.values()), dtype=torch.float64),
        torch.tensor(own),
    )
    assert loss.item() == pytest.approx(slow_info_nce(scores, positives, own))


def test_info_nce_with_one_positive_each_is_cross_entropy(rng: np.random.Generator) -> None:
    scores = normal(rng, 6, 6)
    diagonal = torch.arange(6)
    loss = info_nce(
        given(scores), torch.stack([diagonal, diagonal]), torch.ones(6), torch.full((6,), -1)
    )
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, diagonal))


def test_info_nce_pushes_neither_ignored_columns_nor_other_positives(
    rng: np.random.Generator,
) -> None:
    scores = normal(rng, 1, 5).requires_grad_()
    pairs = torch.tensor([[0, 0], [1, 2]])
    info_nce(given(scores), pairs, torch.ones(2), torch.tensor([0])).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    gradient = scores.grad[0]
    assert gradient[0] == 0
    assert (gradient[1:3] < 0).all()
    assert (gradient[3:] > 0).all()


def test_info_nce_without_negatives_is_zero_with_a_finite_gradient() -> None:
    scores = torch.zeros(1, 2, requires_grad=True)
    pairs = torch.tensor([[0, 0], [0, 1]])
    loss = info_nce(given(scores), pairs, torch.ones(2), torch.tensor([-1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_distillation_is_the_divergence_from_the_teacher(rng: np.random.Generator) -> None:
    student, teacher = normal(rng, 3, 4), normal(rng, 3, 4)
    p, q = teacher.exp(), student.exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    expected = sum(float(p[i, j]) * math.log(p[i, j] / q[i, j]) for i in range(3) for j in range(4))
    assert distillation(given(student), given(teacher)).item() == pytest.approx(expected / 3)
    assert distillation(given(teacher + 5), given(teacher)).item() == pytest.approx(0, abs=1e-12)


def test_distillation_sends_no_gradient_to_the_teacher(rng: np.random.Generator) -> None:
    student, teacher = normal(rng, 3, 4).requires_grad_(), normal(rng, 3, 4).requires_grad_()
    distillation(given(student), given(teacher)).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "distillation"])
def test_blocks_have_the_gradient_of_the_whole(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, most: int, loss: str
) -> None:
    one, two = normal(rng, 9, 4).float().requires_grad_(), normal(rng, 9, 4).float()
    two.requires_grad_()
    pairs = torch.tensor([[0, 0, 3, 8, 8], [1, 5, 3, 0, 8]])
    weights, own = torch.rand(5), torch.tensor([0, -1, 2, -1, 4, -1, -1, -1, 5])
    bias, raw = torch.linspace(-1, 1, 9), normal(rng, 9, 4).float()

    def blocked() -> Tensor:
        similarity = Similarity(one, two, bias)
        if loss == "info_nce":
            return info_nce(similarity, pairs, weights, own)
        if loss == "distillation":
            return distillation(similarity, Similarity(one, raw))
        return nt_xent(one, two, 0.2)

    def whole() -> Tensor:
        scores = one @ two.T + bias
        if loss == "info_nce":
            outside = torch.zeros(9, 9, dtype=torch.bool)
            outside[pairs[0], pairs[1]] = True
            outside[own >= 0, own[own >= 0]] = True
            negatives = scores.masked_fill(outside, -torch.inf).logsumexp(1)[pairs[0]]
            apart = torch.nn.functional.softplus(negatives - scores[pairs[0], pairs[1]])
            return (weights * apart).sum() / weights.sum()
        if loss == "distillation":
            target = (one.detach() @ raw.T).softmax(1)
            return (target * (target.log() - scores.log_softmax(1))).sum() / 9
        z = torch.nn.functional.normalize(torch.cat([one, two]), dim=1)
        scores = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
        return torch.nn.functional.cross_entropy(scores, torch.arange(18).roll(9))

    monkeypatch.setitem(losses.BLOCK_SCORES, "cpu", most)
    expected, found = whole(), blocked()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for gradient, by_blocks in zip(
        torch.autograd.grad(3 * expected, [one, two]),
        torch.autograd.grad(3 * found, [one, two]),
        strict=True,
    ):
        torch.testing.assert_close(by_blocks, gradient, rtol=1e-5, atol=1e-6)
