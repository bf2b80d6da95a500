"""Contrastive losses over similarities that are never held whole.

Every loss here is a sum over anchors, so scores are made, used and dropped a block of anchors at a
time, with the gradient taken on the way: memory grows with anchors + columns, not with their
product, and each product of the two is made three times, as it would be for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = {"cpu": 2**20, "cuda": 2**28}
"""Scores held at once, by device, if an anchor has not more columns than that."""

BlockLoss = Callable[[Tensor, slice], Tensor]
"""(scores of some anchors with all columns, which anchors) → their part of the loss."""


class Similarity(NamedTuple):
    """Similarity over temperature of anchors and columns, factored: anchors · columns + bias.

    Attributes:
        anchors: Shape (b, d).
        columns: Shape (c, d).
        bias: Of each column, shape (c,); no gradient flows to it.
    """

    anchors: Tensor
    columns: Tensor
    bias: Tensor | float = 0.0

    def blocks(self) -> Iterator[slice]:
        """Yield anchors whose scores may be held at once."""
        b = len(self.anchors)
        most = BLOCK_SCORES.get(self.anchors.device.type, BLOCK_SCORES["cpu"])
        step = max(1, most // max(1, len(self.columns)))
        for start in range(0, b, step):
            yield slice(start, min(start + step, b))

    def of_pairs(self, pairs: Tensor) -> Tensor:
        """Return the scores of pairs of anchor and column, shape (p,).

        Args:
            pairs: Shape (2, p), ordered by anchor.
        """
        firsts = pairs[0].contiguous()
        parts = [
            self.scores(rows)[pairs[0, here] - rows.start, pairs[1, here]]
            for rows in self.blocks()
            for here in [_within(firsts, rows)]
        ]
        return torch.cat(parts)

    def scores(self, rows: slice) -> Tensor:
        """Return the scores of some anchors with all columns, float32 at least."""
        product = self.anchors[rows] @ self.columns.T
        if product.dtype in (torch.bfloat16, torch.float16):
            product = product.float()
        return product + self.bias


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Compute SimCLR's NT-Xent over the 2n views of a batch.

    Every view is an anchor: the other view of its row is the positive, and the 2n - 2 views of
    other rows are the negatives. This is not InfoNCE, where queries meet documents only.
    Source: Chen et al., arXiv:2002.05709, equation 1.

    Args:
        z1: First views, shape (n, d), any length.
        z2: Second views of the same rows, shape (n, d).
        temperature: Positive.

    Returns:
        Mean over the 2n anchors, a scalar.
    """
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2n, d)
    other_view = torch.arange(2 * n, device=z.device).roll(n)

    def loss(scores: Tensor, rows: slice) -> Tensor:
        itself = torch.full((len(scores),), -torch.inf, dtype=scores.dtype, device=scores.device)
        others = scores.diagonal_scatter(itself, offset=rows.start)
        return F.cross_entropy(others, other_view[rows], reduction="sum") / (2 * n)

    return _in_blocks(loss, Similarity(z / temperature, z))


def info_nce(similarity: Similarity, pairs: Tensor, weights: Tensor, own: Tensor) -> Tensor:
    """Compute InfoNCE with any number of weighted positives for each anchor.

    Each positive stands alone against the anchor's negatives: the anchor's other positives and the
    column that is the anchor itself are left out of its denominator, so that they are not pushed
    away.
    Source: van den Oord et al., arXiv:1807.03748, equation 4; several positives as in
    Khosla et al., arXiv:2004.11362, equation 2, but with the other positives masked.

    Args:
        similarity: Of b anchors and c columns.
        pairs: Anchor and column of each positive, shape (2, p), int64, ordered by anchor.
        weights: Weight of each positive, shape (p,).
        own: Column that is the anchor itself, shape (b,), int64; -1 where there is none.

    Returns:
        Mean over the weights, a scalar.
    """
    share = weights / weights.sum()
    firsts = pairs[0].contiguous()

    def loss(scores: Tensor, rows: slice) -> Tensor:
        here = _within(firsts, rows)
        anchor, column = pairs[0, here] - rows.start, pairs[1, here]
        outside = torch.zeros_like(scores, dtype=torch.bool)
        outside[anchor, column] = True
        itself = torch.nonzero(own[rows] >= 0)[:, 0]
        outside[itself, own[rows][itself]] = True
        negatives = scores.masked_fill(outside, -torch.inf).logsumexp(dim=1)  # (rows,)
        # -log(e^s / (e^s + Σ e^negative)) = softplus(log Σ e^negative - s)
        return (share[here] * F.softplus(negatives[anchor] - scores[anchor, column])).sum()

    return _in_blocks(loss, similarity)


def distillation(student: Similarity, teacher: Similarity) -> Tensor:
    """Compute how far the student's distribution over columns is from the teacher's.

    Source: Hinton et al., arXiv:1503.02531, section 2, as a Kullback-Leibler divergence.

    Args:
        student: Of b anchors and c columns.
        teacher: The same for the teacher; no gradient flows to it.

    Returns:
        Mean over the b anchors, a scalar.
    """

    def loss(scores: Tensor, rows: slice) -> Tensor:
        target = teacher.scores(rows).detach().log_softmax(dim=1)
        apart = F.kl_div(scores.log_softmax(dim=1), target, log_target=True, reduction="sum")
        return apart / len(student.anchors)

    return _in_blocks(loss, student)


def _within(firsts: Tensor, rows: slice) -> slice:
    """Return where ascending anchors lie within a block of anchors."""
    ends = torch.tensor([rows.start, rows.stop], device=firsts.device)
    return slice(*torch.searchsorted(firsts, ends).tolist())


def _in_blocks(loss: BlockLoss, similarity: Similarity) -> Tensor:
    total: Tensor = _InBlocks.apply(loss, *similarity)  # type: ignore[no-untyped-call]
    return total


class _InBlocks(torch.autograd.Function):
    """Sums a loss over blocks of anchors, and takes its gradient on the way."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 torch's context
        loss: BlockLoss,
        anchors: Tensor,
        columns: Tensor,
        bias: Tensor | float,
    ) -> Tensor:
        similarity = Similarity(anchors, columns, bias)
        to_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[1] else None
        to_columns = torch.zeros_like(columns) if ctx.needs_input_grad[2] else None
        total = torch.zeros((), device=anchors.device)
        for rows in similarity.blocks():
            scores = similarity.scores(rows).requires_grad_()
            with torch.enable_grad():
                part = loss(scores, rows)
            (to_scores,) = torch.autograd.grad(part, scores)
            total = total + part.detach()
            if to_anchors is not None:
                to_anchors[rows] = to_scores @ columns
            if to_columns is not None:
                to_columns += to_scores.T @ anchors[rows]
        ctx.save_for_backward(to_anchors, to_columns)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = gradients
        to_anchors, to_columns = (
            None if one is None else gradient * one for one in ctx.saved_tensors
        )
        return None, to_anchors, to_columns, None
