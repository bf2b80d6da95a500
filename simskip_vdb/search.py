"""Exact nearest neighbours by brute force, in bounded memory and with a stable order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Metric, Neighbors, Positions, Vectors

_QUERIES = 256
"""Queries scored at once."""
_ELEMENTS = 1 << 22
"""Numbers held in one piece of a block, whatever the dimension."""

Floats = NDArray[np.floating[Any]]
Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]


def exact_search(
    queries: Vectors,
    blocks: Iterable[tuple[int, Vectors]],
    k: int,
    metric: Metric,
    skip: Mask | None = None,
) -> Neighbors:
    """Find every query's k best rows by comparing it with all of them; see `ExactSearch`.

    Args:
        queries: Shape (q, d), finite; not zero under cosine.
        blocks: What `ExactSearch.add` takes.
        k: Rows wanted for each query, at least 1.
        metric: How queries and rows are compared.
        skip: Shape (n,); rows that are left out of the answer.

    Raises:
        ValueError: `k` is below 1, or blocks are out of order.
    """
    search = ExactSearch(queries, k, metric, skip)
    for start, vectors in blocks:
        search.add(start, vectors)
    return search.found()


class Search(ABC):
    """Finds every query's k best rows among rows that it is fed in order.

    Args:
        k: Rows wanted for each query, at least 1.
        metric: How queries and rows are compared.
        skip: Shape (n,); rows that are left out of the answer.

    Raises:
        ValueError: `k` is below 1.
    """

    def __init__(self, k: int, metric: Metric, skip: Mask | None) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        self._k, self._metric, self._skip = k, metric, skip
        self._expected = 0

    def add(self, start: int, vectors: Vectors) -> None:
        """Compare with the row at position `start` and its successors, shape (b, d).

        Raises:
            ValueError: Positions do not ascend.
        """
        if start < self._expected:
            raise ValueError(f"block at {start} begins before {self._expected}")
        self._expected = start + len(vectors)
        self._compare(start, vectors)

    @abstractmethod
    def _compare(self, start: int, vectors: Vectors) -> None: ...

    @abstractmethod
    def found(self) -> Neighbors:
        """Return positions and scores, each of shape (q, k): -1 and -inf where rows are fewer."""


class ExactSearch(Search):
    """Finds every query's k best rows by comparing it with all of them, block by block.

    Rows with a NaN or an infinite number are never returned, nor are zero rows under cosine. Of
    equal scores the lower position comes first. The answer does not depend on how rows are cut
    into blocks.

    Args:
        queries: Shape (q, d), finite; not zero under cosine.
        k: Rows wanted for each query, at least 1.
        metric: How queries and rows are compared.
        skip: Shape (n,); rows that are left out of the answer.

    Raises:
        ValueError: `k` is below 1.
    """

    def __init__(self, queries: Vectors, k: int, metric: Metric, skip: Mask | None = None) -> None:
        super().__init__(k, metric, skip)
        self._parts = [
            _Best(queries[i : i + _QUERIES], k, metric) for i in range(0, len(queries), _QUERIES)
        ]

    def _compare(self, start: int, vectors: Vectors) -> None:
        size = max(1, _ELEMENTS // max(1, vectors.shape[1]))
        for i in range(0, len(vectors), size):
            rows = _Rows(vectors[i : i + size], start + i, self._metric, self._skip)
            for part in self._parts:
                part.add(rows)

    def found(self) -> Neighbors:
        """Return positions and scores, each of shape (q, k): -1 and -inf where rows are fewer."""
        for part in self._parts:
            part.merge()
        none = np.empty((0, self._k))
        with np.errstate(over="ignore"):  # a score beyond float32 is infinite
            scores = [none.astype(np.float32), *(p.scores.astype(np.float32) for p in self._parts)]
        return Neighbors(
            ids=np.concatenate([none.astype(np.int64), *(p.positions for p in self._parts)]),
            scores=np.concatenate(scores),
        )


def without_own(found: Neighbors, own: Positions, k: int) -> Neighbors:
    """Leave each query's own row out of an answer, and keep the k best of the rest.

    Args:
        found: Positions and scores, each of shape (q, K); with K above k, k others are there.
        own: Position of each query's own row, shape (q,); -1 for none.
        k: Rows wanted for each query.

    Returns:
        Positions and scores, each of shape (q, min(k, K)).
    """
    itself = (found.ids == own[:, None]) & (own >= 0)[:, None]
    order = np.argsort(itself, axis=1, kind="stable")[:, :k]
    ids = np.where(itself, -1, found.ids)
    scores = np.where(itself, -np.inf, found.scores).astype(found.scores.dtype)
    return Neighbors(
        ids=np.take_along_axis(ids, order, axis=1), scores=np.take_along_axis(scores, order, axis=1)
    )


def pair_scores(queries: Floats, rows: Floats, metric: Metric) -> Scores:
    """Score queries against rows pair by pair, in float64; higher is better.

    A pair's score depends on nothing but the pair, unlike a matrix product's, whose rounding
    changes with its shape.

    Args:
        queries: Shape (…, d).
        rows: Shape (…, d), broadcast against `queries`.
        metric: Euclid scores are negated squared distances.

    Returns:
        Shape (…).
    """
    ours: Scores = queries.astype(np.float64)
    theirs: Scores = rows.astype(np.float64)
    if metric is Metric.EUCLID:
        return -_sum((ours - theirs) ** 2)
    scores = _sum(ours * theirs)
    if metric is Metric.COSINE:
        scores /= np.sqrt(_sum(ours**2)) * np.sqrt(_sum(theirs**2))
    return scores


def _sum(products: Scores) -> Scores:
    total: Scores = np.ascontiguousarray(products).sum(axis=-1)
    return total


class _Rows:
    """Usable rows of a piece of a block, made ready for one matrix product."""

    def __init__(self, vectors: Vectors, start: int, metric: Metric, skip: Mask | None) -> None:
        squares = _squared_norms(vectors)
        usable = np.isfinite(squares)
        if metric is Metric.COSINE:
            usable &= squares > 0
        if skip is not None:
            usable &= ~skip[start : start + len(vectors)]
        if not usable.all():
            vectors, squares = vectors[usable], squares[usable]
        self.positions: Positions = start + np.flatnonzero(usable)
        self.vectors = vectors  # (b, d)
        self.fast = _row_factors(vectors, squares, metric)
        largest = float(np.sqrt(squares.max(initial=0)))
        self.norm = 1.0 if metric is Metric.COSINE else largest


class _Best:
    """The k best rows so far of some queries.

    A float32 matrix product proposes rows; those within its rounding error of the k-th best are
    scored again pair by pair, so that neither shapes nor threads decide an order.
    """

    def __init__(self, queries: Vectors, k: int, metric: Metric) -> None:
        count, dim = queries.shape
        squares = _squared_norms(queries)
        self.queries, self.k, self.metric = queries, k, metric
        self.fast = _query_factors(queries, squares, metric)
        self.norms = np.ones(count) if metric is Metric.COSINE else np.sqrt(squares)
        # The product leaves -|q|² out of -|q - x|².
        self.shift = squares if metric is Metric.EUCLID else np.zeros(count)
        # A product of d numbers errs by at most about d·eps/2·|q||x| (Higham, 2002, section 3.1).
        self.error = (dim + 8) * float(np.finfo(np.float32).eps)
        self.positions: Positions = np.full((count, k), -1)
        self.scores = np.full((count, k), -np.inf)
        self.waiting: list[tuple[Positions, Positions, Scores]] = []

    def add(self, rows: _Rows) -> None:
        """Take the rows that may belong to a query's k best."""
        if len(rows.positions) == 0:
            return
        owners, picked = self._propose(rows)
        scores = self._score(owners, rows.vectors, picked)
        better = scores > self.scores[owners, -1]
        self.waiting.append((owners[better], rows.positions[picked[better]], scores[better]))
        if sum(len(w[0]) for w in self.waiting) > self.scores.size // 2:
            self.merge()

    def _propose(self, rows: _Rows) -> tuple[Positions, Positions]:
        with np.errstate(over="ignore", invalid="ignore"):
            return self._proposed(self.fast @ rows.fast.T, rows)  # (q, b)

    def _proposed(self, product: Vectors, rows: _Rows) -> tuple[Positions, Positions]:
        if self.metric is Metric.EUCLID:
            slack = self.error * (self.norms + rows.norm) ** 2
        else:
            slack = self.error * self.norms * rows.norm
        cut = self.scores[:, -1] + self.shift - slack
        # A product that overflowed says nothing, and such a pair is scored.
        proposed: Mask = ~(product < cut[:, None].astype(np.float32))
        surplus = len(rows.positions) - self.k
        if surplus > 0 and np.count_nonzero(proposed) > self.scores.size:
            kth = np.partition(product, surplus, axis=1)[:, surplus]
            cut = np.maximum(cut, kth - 2 * slack)
            proposed = ~(product < cut[:, None].astype(np.float32))
        owners, picked = np.divmod(np.flatnonzero(proposed), product.shape[1])
        return owners, picked

    def _score(self, owners: Positions, vectors: Vectors, picked: Positions) -> Scores:
        scores = np.empty(len(owners))
        size = max(1, _ELEMENTS // 8 // max(1, vectors.shape[1]))
        for i in range(0, len(owners), size):
            part = slice(i, i + size)
            scores[part] = pair_scores(
                self.queries[owners[part]], vectors[picked[part]], self.metric
            )
        return scores

    def merge(self) -> None:
        """Rank what waits together with the best so far."""
        count, k = self.scores.shape
        owners = np.concatenate([np.repeat(np.arange(count), k), *(w[0] for w in self.waiting)])
        positions = np.concatenate([self.positions.ravel(), *(w[1] for w in self.waiting)])
        scores = np.concatenate([self.scores.ravel(), *(w[2] for w in self.waiting)])
        order = np.lexsort((positions, -scores, owners))
        owners = owners[order]
        rank = np.arange(len(owners)) - np.searchsorted(owners, np.arange(count))[owners]
        kept = order[rank < k]
        self.positions = positions[kept].reshape(count, k)
        self.scores = scores[kept].reshape(count, k)
        self.waiting = []


def _squared_norms(vectors: Vectors) -> Scores:
    squares: Scores = np.einsum("ij,ij->i", vectors, vectors).astype(np.float64)
    # float32 squares of extreme numbers overflow or vanish although the numbers are fine.
    extreme = ~((squares > 1e-30) & (squares < 1e30))
    if extreme.any():
        squares[extreme] = _sum(vectors[extreme].astype(np.float64) ** 2)
    return squares


def _query_factors(queries: Vectors, squares: Scores, metric: Metric) -> Vectors:
    if metric is Metric.COSINE:
        return _unit(queries, squares)
    if metric is Metric.EUCLID:
        return np.hstack([2 * queries, np.full((len(queries), 1), -1, np.float32)])
    return queries


def _row_factors(rows: Vectors, squares: Scores, metric: Metric) -> Vectors:
    if metric is Metric.COSINE:
        return _unit(rows, squares)
    if metric is Metric.EUCLID:
        with np.errstate(over="ignore"):
            return np.hstack([rows, squares[:, None].astype(np.float32)])
    return rows


def _unit(vectors: Vectors, squares: Scores) -> Vectors:
    norms: Vectors = np.sqrt(squares)[:, None].astype(np.float32)
    return vectors / norms
