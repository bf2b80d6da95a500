"""Exact nearest neighbours as `search` finds them, by torch on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simskip_vdb.datatypes import Mask, Metric, Neighbors, Vectors
from simskip_vdb.search import Search

SCORES = 1 << 26
"""Scores held at once."""
QUERIES = 4096
"""Queries scored at once."""
NUMBERS = 1 << 24
"""Numbers of each side of the pairs that are scored in float64 at once."""
TF32 = 2.0**-10
"""Rounding of one factor where float32 products may be taken from shorter numbers."""


class SearchOnDevice(Search):
    """What `search.ExactSearch` does, on a device: the same rows, but for rounding of float64.

    A float32 product proposes rows; those within its rounding error of the k-th best are scored
    again pair by pair in float64. Of equal scores the lower position comes first.

    Args:
        queries: Shape (q, d), finite; not zero under cosine.
        k: Rows wanted for each query, at least 1.
        metric: How queries and rows are compared.
        skip: Shape (n,); rows that are left out of the answer.
        device: A torch device.

    Raises:
        ValueError: `k` is below 1.
    """

    def __init__(
        self, queries: Vectors, k: int, metric: Metric, skip: Mask | None, device: str
    ) -> None:
        super().__init__(k, metric, skip)
        self._device = torch.device(device)
        sent = torch.tensor(np.asarray(queries), device=self._device)
        self._parts = [
            _Best(sent[i : i + QUERIES], k, metric) for i in range(0, len(sent), QUERIES)
        ]

    @torch.no_grad()
    def _compare(self, start: int, vectors: Vectors) -> None:
        for first in range(0, len(vectors), SCORES // QUERIES):
            part = slice(first, first + SCORES // QUERIES)
            rows = torch.tensor(vectors[part], device=self._device)
            squares = _squares(rows)
            usable = squares.isfinite()
            if self._metric is Metric.COSINE:
                usable &= squares > 0
            if self._skip is not None:
                left = ~self._skip[start + first : start + first + len(rows)]
                usable &= torch.tensor(left, device=self._device)
            kept = usable.nonzero()[:, 0]
            if not len(kept):
                continue
            rows, squares = rows[kept], squares[kept]
            factors = _row_factors(rows, squares, self._metric)
            for best in self._parts:
                best.add(rows, factors, squares, kept + start + first)

    def found(self) -> Neighbors:
        """Return positions and scores, each of shape (q, k): -1 and -inf where rows are fewer."""
        if not self._parts:
            return Neighbors(
                ids=np.empty((0, self._k), np.int64), scores=np.empty((0, self._k), np.float32)
            )
        ids = torch.cat([best.positions for best in self._parts])
        scores = torch.cat([best.scores for best in self._parts])
        return Neighbors(ids=ids.cpu().numpy(), scores=scores.float().cpu().numpy())


class _Best:
    """The k best rows so far of some queries."""

    def __init__(self, queries: Tensor, k: int, metric: Metric) -> None:
        count, dim = queries.shape
        squares = _squares(queries)
        self._queries, self._k, self._metric = queries, k, metric
        self._norms = torch.ones_like(squares) if metric is Metric.COSINE else squares.sqrt()
        self._shift = squares if metric is Metric.EUCLID else torch.zeros_like(squares)
        self._fast = queries
        if metric is Metric.COSINE:
            self._fast = queries / squares.sqrt()[:, None].float()
        elif metric is Metric.EUCLID:
            self._fast = torch.cat([2 * queries, queries.new_full((count, 1), -1)], dim=1)
        exact = torch.get_float32_matmul_precision() == "highest"
        self._error = (dim + 8) * float(torch.finfo(torch.float32).eps) + (0 if exact else 4 * TF32)
        self.positions = torch.full((count, k), -1, dtype=torch.int64, device=queries.device)
        self.scores = torch.full((count, k), -torch.inf, dtype=torch.float64, device=queries.device)

    def add(self, rows: Tensor, factors: Tensor, squares: Tensor, positions: Tensor) -> None:
        """Take the rows that belong to a query's k best.

        Args:
            rows: Shape (b, d).
            factors: Of the product, shape (b, d) or (b, d + 1).
            squares: Squared lengths, shape (b,), float64.
            positions: Ascending, above all before, shape (b,).
        """
        product = self._fast @ factors.T  # (q, b)
        largest = 1.0 if self._metric is Metric.COSINE else squares.max().sqrt()
        slack = self._error * self._norms * largest
        if self._metric is Metric.EUCLID:
            slack = self._error * (self._norms + largest) ** 2
        cut = self.scores[:, -1] + self._shift - slack
        if len(rows) > self._k:
            kth = product.topk(self._k, dim=1, sorted=False).values.amin(dim=1)
            cut = torch.maximum(cut, kth - 2 * slack)
        owners, picked = (product >= cut[:, None].float()).nonzero(as_tuple=True)
        del product
        if not len(owners):
            return
        scores = self._score(owners, rows, picked)
        better = scores > self.scores[owners, -1]
        self._merge(owners[better], positions[picked[better]], scores[better])

    def _score(self, owners: Tensor, rows: Tensor, picked: Tensor) -> Tensor:
        size = max(1, NUMBERS // max(1, rows.shape[1]))
        parts = [torch.empty(0, dtype=torch.float64, device=rows.device)]
        for i in range(0, len(owners), size):
            ours = self._queries[owners[i : i + size]].double()
            theirs = rows[picked[i : i + size]].double()
            if self._metric is Metric.EUCLID:
                parts.append(-((ours - theirs) ** 2).sum(dim=1))
                continue
            scores = (ours * theirs).sum(dim=1)
            if self._metric is Metric.COSINE:
                scores /= (ours**2).sum(dim=1).sqrt() * (theirs**2).sum(dim=1).sqrt()
            parts.append(scores)
        return torch.cat(parts)

    def _merge(self, owners: Tensor, positions: Tensor, scores: Tensor) -> None:
        """Rank new rows together with the best so far, the lower position first of equals."""
        count, k = self.scores.shape
        everyone = torch.arange(count, device=owners.device)
        # The best so far come first, and positions ascend, so stable sorts keep the lower first.
        owner = torch.cat([everyone.repeat_interleave(k), owners])
        position = torch.cat([self.positions.ravel(), positions])
        score = torch.cat([self.scores.ravel(), scores])
        order = score.sort(descending=True, stable=True).indices
        order = order[owner[order].sort(stable=True).indices]
        sizes = torch.bincount(owner, minlength=count)
        first = sizes.cumsum(0) - sizes
        kept = order[first[:, None] + torch.arange(k, device=owners.device)]
        self.positions, self.scores = position[kept], score[kept]


def _squares(vectors: Tensor) -> Tensor:
    """Return squared lengths in float64, where those of extreme float32 numbers are fine."""
    return vectors.double().square().sum(dim=1)


def _row_factors(rows: Tensor, squares: Tensor, metric: Metric) -> Tensor:
    if metric is Metric.COSINE:
        return rows / squares.sqrt()[:, None].float()
    if metric is Metric.EUCLID:
        return torch.cat([rows, squares[:, None].float()], dim=1)
    return rows
