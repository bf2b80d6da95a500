"""Contrastive losses, each a function of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    scores = z @ z.T / temperature  # (2n, 2n)
    scores = scores.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    other_view = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(scores, other_view)


def info_nce(scores: Tensor, pairs: Tensor, weights: Tensor, ignore: Tensor) -> Tensor:
    """Compute InfoNCE with any number of weighted positives for each anchor.

    Each positive stands alone against the anchor's negatives: the anchor's other positives and
    ignored columns are left out of its denominator, so that they are not pushed away.
    Source: van den Oord et al., arXiv:1807.03748, equation 4; several positives as in
    Khosla et al., arXiv:2004.11362, equation 2, but with the other positives masked.

    Args:
        scores: Similarity over temperature, shape (b, c).
        pairs: Anchor and column of each positive, shape (2, p), int64.
        weights: Weight of each positive, shape (p,).
        ignore: Columns that are neither positive nor negative, shape (b, c), bool.

    Returns:
        Mean over the weights, a scalar.
    """
    anchor, column = pairs
    outside = ignore.index_put((anchor, column), torch.tensor(True, device=ignore.device))
    negatives = scores.masked_fill(outside, -torch.inf).logsumexp(dim=1)  # (b,)
    # -log(e^s / (e^s + Σ e^negative)) = softplus(log Σ e^negative - s)
    losses = F.softplus(negatives[anchor] - scores[anchor, column])  # (p,)
    return (weights * losses).sum() / weights.sum()


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute how far the student's distribution over columns is from the teacher's.

    Source: Hinton et al., arXiv:1503.02531, section 2, as a Kullback-Leibler divergence.

    Args:
        student: Similarity over temperature, shape (b, c).
        teacher: The same for the teacher, shape (b, c); no gradient flows to it.

    Returns:
        Mean over the b rows, a scalar.
    """
    target = teacher.detach().log_softmax(dim=1)
    return F.kl_div(student.log_softmax(dim=1), target, log_target=True, reduction="batchmean")
