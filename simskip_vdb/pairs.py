"""Where positives and hard negatives come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from simskip_vdb.datatypes import JudgedQueries, Positions, Vectors
from simskip_vdb.errors import DataError

SEARCH_BLOCK = 16384


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """What a batch of b anchors should find among c columns.

    Attributes:
        anchor: Anchor of each positive, shape (p,), int64.
        column: Column of each positive, shape (p,), int64.
        weight: Weight of each positive, shape (p,), float32; an anchor's weights sum to 1.
        own: Column that holds the anchor itself, shape (b,), int64; -1 where there is none.
    """

    anchor: NDArray[np.int64]
    column: NDArray[np.int64]
    weight: NDArray[np.float32]
    own: NDArray[np.int64]


class Pairs(Protocol):
    """Anchors, and the rows each of them should find."""

    @property
    def anchors(self) -> Vectors:
        """Vectors to take anchors from, shape (m, d)."""
        ...

    @property
    def usable(self) -> Positions:
        """Anchors that have a positive, shape (a,)."""
        ...

    def positives(self, batch: Positions, generator: np.random.Generator) -> Positions:
        """Return rows that a sample of columns must hold for these anchors."""
        ...

    def targets(self, batch: Positions, column_of: NDArray[np.int64]) -> Targets:
        """Return the positives of these anchors among the columns.

        Args:
            batch: Anchors, shape (b,).
            column_of: Column of every row, shape (n,), -1 for rows that are no column.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListedPairs:
    """Positives listed for each anchor, in compressed sparse rows.

    Attributes:
        anchors: Shape (m, d).
        indptr: Shape (m + 1,); anchor i's positives are ``rows[indptr[i]:indptr[i + 1]]``.
        rows: Position of each positive.
        weights: Weight of each positive, above 0.
        own: The anchor's own row, shape (m,); -1 where it is no row.
    """

    anchors: Vectors
    indptr: NDArray[np.int64]
    rows: Positions
    weights: NDArray[np.float32]
    own: NDArray[np.int64]

    @property
    def usable(self) -> Positions:
        """Anchors that have a positive, shape (a,)."""
        return np.flatnonzero(np.diff(self.indptr))

    def positives(self, batch: Positions, generator: np.random.Generator) -> Positions:
        """Return every positive of these anchors."""
        return self.rows[self._entries(batch)]

    def targets(self, batch: Positions, column_of: NDArray[np.int64]) -> Targets:
        """Return the positives of these anchors among the columns."""
        entries = self._entries(batch)
        anchor = np.repeat(np.arange(len(batch)), np.diff(self.indptr)[batch])
        column, weight = column_of[self.rows[entries]], self.weights[entries]
        kept = column >= 0
        own = np.where(self.own[batch] >= 0, column_of[self.own[batch]], -1)
        return Targets(
            anchor=anchor[kept],
            column=column[kept],
            weight=_sum_to_one(anchor[kept], weight[kept]),
            own=own,
        )

    def _entries(self, batch: Positions) -> NDArray[np.int64]:
        sizes = np.diff(self.indptr)[batch]
        before = np.cumsum(sizes) - sizes
        return np.repeat(self.indptr[batch] - before, sizes) + np.arange(sizes.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupPairs:
    """Rows as anchors; the other rows of their group are positives.

    Attributes:
        anchors: All rows, shape (n, d).
        codes: Group of each row, shape (n,); -1 for none.
        members: Positions of grouped rows, by group, shape (g,).
        first: Where each member's group starts in `members`, by position, shape (n,).
        size: Size of each row's group, by position, shape (n,); 0 for none.
    """

    anchors: Vectors
    codes: NDArray[np.int64]
    members: Positions
    first: NDArray[np.int64]
    size: NDArray[np.int64]

    @property
    def usable(self) -> Positions:
        """Rows whose group has another row, shape (a,)."""
        return np.flatnonzero(self.size > 1)

    def positives(self, batch: Positions, generator: np.random.Generator) -> Positions:
        """Return one row of each anchor's group, and never the anchor itself."""
        place = generator.integers(0, self.size[batch] - 1)
        chosen = self.members[self.first[batch] + place]
        last = self.members[self.first[batch] + self.size[batch] - 1]
        return np.where(chosen == batch, last, chosen)

    def targets(self, batch: Positions, column_of: NDArray[np.int64]) -> Targets:
        """Return the rows of the anchors' groups among the columns."""
        rows = np.flatnonzero(column_of >= 0)
        same = self.codes[batch][:, None] == self.codes[rows][None, :]  # (b, c)
        same &= batch[:, None] != rows[None, :]
        anchor, place = np.nonzero(same)
        return Targets(
            anchor=anchor,
            column=column_of[rows[place]],
            weight=_sum_to_one(anchor, np.ones(len(anchor), dtype=np.float32)),
            own=column_of[batch],
        )


def judged_pairs(queries: JudgedQueries, usable: NDArray[np.bool_]) -> ListedPairs:
    """Make queries the anchors and their relevant rows the positives, weighted by grade.

    Args:
        queries: Judged queries of the fit split.
        usable: Rows that may take part, shape (n,).

    Raises:
        DataError: No query has a relevant row that can be used.
    """
    kept = (queries.grades > 0) & usable[queries.rows]
    finite = np.isfinite(queries.vectors).all(axis=1) & queries.vectors.any(axis=1)
    query = queries.query_of_judgment()
    kept &= finite[query]
    if not kept.any():
        raise DataError("no judged query has a relevant row in the index; check ids and grades")
    sizes = np.bincount(query[kept], minlength=len(queries))
    return ListedPairs(
        anchors=queries.vectors,
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        rows=queries.rows[kept],
        weights=queries.grades[kept].astype(np.float32),
        own=np.full(len(queries), -1, dtype=np.int64),
    )


def group_pairs(
    vectors: Vectors, groups: NDArray[np.int64], usable: NDArray[np.bool_]
) -> GroupPairs:
    """Make every grouped row an anchor.

    Args:
        vectors: All rows, shape (n, d).
        groups: Group of each row, shape (n,); -1 for none.
        usable: Rows that may take part, shape (n,).

    Raises:
        DataError: No group has two rows.
    """
    codes = np.where(usable, groups, -1)
    members = np.argsort(codes, kind="stable")
    members = members[codes[members] >= 0]
    _, start, inverse, counts = np.unique(
        codes[members], return_index=True, return_inverse=True, return_counts=True
    )
    if not (counts > 1).any():
        raise DataError("no group has two rows; check the field or the labels")
    first = np.zeros(len(codes), dtype=np.int64)
    size = np.zeros(len(codes), dtype=np.int64)
    first[members] = start[inverse]
    size[members] = counts[inverse]
    return GroupPairs(anchors=vectors, codes=codes, members=members, first=first, size=size)


def neighbour_pairs(
    vectors: Vectors, usable: NDArray[np.bool_], k: int, device: str
) -> ListedPairs:
    """Make every row an anchor and its k nearest other rows its positives.

    Source: Dwibedi et al., arXiv:2104.14548, with the neighbours of the frozen vectors.

    Args:
        vectors: All rows, shape (n, d).
        usable: Rows that may take part, shape (n,).
        k: Neighbours of each row.
        device: Where to search.
    """
    rows = np.flatnonzero(usable)
    found = nearest(vectors[rows], vectors, rows, k + 1, device)
    other = found != rows[:, None]
    other[other.all(axis=1), -1] = False
    n = len(vectors)
    sizes = np.where(usable, found.shape[1] - 1, 0)
    own = np.where(usable, np.arange(n), -1)
    neighbours = found[other]
    return ListedPairs(
        anchors=vectors,
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        rows=neighbours,
        weights=np.ones(len(neighbours), dtype=np.float32),
        own=own,
    )


def nearest(queries: Vectors, vectors: Vectors, rows: Positions, k: int, device: str) -> Positions:
    """Find each query's nearest rows by cosine, exactly, in bounded memory.

    Args:
        queries: Shape (q, d).
        vectors: All rows, shape (n, d); may be a memory map.
        rows: Positions to search among, ascending.
        k: Rows wanted for each query.
        device: Where to search.

    Returns:
        Positions, shape (q, min(k, len(rows))), best first.
    """
    k = min(k, len(rows))
    asked = torch.nn.functional.normalize(torch.as_tensor(queries, device=device), dim=1)
    best = torch.full((len(queries), k), -torch.inf, device=device)
    place = torch.zeros((len(queries), k), dtype=torch.int64, device=device)
    for start in range(0, len(rows), SEARCH_BLOCK):
        block = rows[start : start + SEARCH_BLOCK]
        keys = torch.as_tensor(vectors[block], device=device)
        keys = torch.nn.functional.normalize(keys, dim=1)
        for first in range(0, len(queries), 4096):
            some = slice(first, first + 4096)
            scores = asked[some] @ keys.T  # (q', block)
            score, column = scores.topk(min(k, len(block)), dim=1)
            score = torch.cat([best[some], score], dim=1)
            column = torch.cat([place[some], column + start], dim=1)
            best[some], order = score.topk(k, dim=1)
            place[some] = column.gather(1, order)
    return rows[place.cpu().numpy()]


def _sum_to_one(anchor: NDArray[np.int64], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    if not len(anchor):
        return weight
    return (weight / np.bincount(anchor, weight)[anchor]).astype(np.float32)
