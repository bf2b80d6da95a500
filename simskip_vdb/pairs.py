"""Where positives and hard negatives come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from simskip_vdb.datatypes import JudgedQueries, Positions, Vectors
from simskip_vdb.errors import DataError

SEARCHED = {"cpu": (1024, 4096), "cuda": (16384, 65536)}
"""Queries and rows compared at once, by device."""
BLOCK_CELLS = 2**24


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


class OnDisk(Protocol):
    """Rows that are read when they are wanted."""

    def take(self, positions: Positions) -> Vectors:
        """Return the rows at these positions, shape (len(positions), d)."""
        ...


class Pairs(Protocol):
    """Anchors, and the rows that each of them should find."""

    @property
    def vectors(self) -> Vectors:
        """Vectors of the anchors, shape (m, d)."""
        ...

    @property
    def anchors(self) -> Positions:
        """Those of the m that have a positive, shape (a,)."""
        ...

    def rows_with_anchors(self) -> Positions:
        """Return the rows that are a positive of some anchor, ascending."""
        ...

    def draw(self, batch: Positions, rng: np.random.Generator) -> Positions:
        """Return one positive row for each anchor of a batch, shape (b,)."""
        ...

    def targets(self, batch: Positions, columns: Positions, column_of: Positions) -> Targets:
        """Return the positives of a batch among the columns.

        Args:
            batch: Anchors, shape (b,).
            columns: Rows that are columns, shape (c,).
            column_of: Column of every row, shape (n,); -1 for rows that are none.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ListedPairs:
    """Positives listed for each anchor, in compressed sparse rows.

    Attributes:
        vectors: Vectors of the anchors, shape (m, d).
        indptr: Shape (m + 1,); anchor i's positives are ``rows[indptr[i]:indptr[i + 1]]``.
        rows: Row of each positive.
        grades: Weight of each positive, above 0, float32.
        own: Row that an anchor is itself and must not find, shape (m,); -1 for none.
    """

    vectors: Vectors
    indptr: NDArray[np.int64]
    rows: Positions
    grades: NDArray[np.float32]
    own: Positions

    @property
    def anchors(self) -> Positions:
        """Anchors that have a positive, shape (a,)."""
        return np.flatnonzero(np.diff(self.indptr))

    def rows_with_anchors(self) -> Positions:
        """Return the rows that are a positive of some anchor, ascending."""
        return np.unique(self.rows)

    def draw(self, batch: Positions, rng: np.random.Generator) -> Positions:
        """Return one positive row for each anchor of a batch, shape (b,)."""
        first = self.indptr[batch]
        drawn: Positions = self.rows[rng.integers(first, self.indptr[batch + 1])]
        return drawn

    def targets(self, batch: Positions, columns: Positions, column_of: Positions) -> Targets:
        """Return the positives of a batch among the columns."""
        sizes = np.diff(self.indptr)[batch]
        before = np.cumsum(sizes) - sizes
        listed = np.repeat(self.indptr[batch] - before, sizes) + np.arange(sizes.sum())
        anchor = np.repeat(np.arange(len(batch)), sizes)
        column = column_of[self.rows[listed]]
        kept = column >= 0
        return Targets(
            anchor=anchor[kept],
            column=column[kept],
            weight=_sum_to_one(anchor[kept], self.grades[listed][kept]),
            own=np.where(self.own[batch] >= 0, column_of[self.own[batch]], -1),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupPairs:
    """Rows as anchors; the other rows of their group are positives.

    Attributes:
        vectors: All rows, shape (n, d).
        codes: Group of each row, shape (n,); -1 for none.
        members: Grouped rows, group after group, shape (g,).
        first: Where each row's group starts in `members`, shape (n,).
        size: Size of each row's group, shape (n,); 0 for none.
    """

    vectors: Vectors
    codes: NDArray[np.int64]
    members: Positions
    first: NDArray[np.int64]
    size: NDArray[np.int64]

    @property
    def anchors(self) -> Positions:
        """Rows whose group has another row, shape (a,)."""
        return np.flatnonzero(self.size > 1)

    def rows_with_anchors(self) -> Positions:
        """Return the rows that are a positive of some anchor, ascending."""
        return self.anchors

    def draw(self, batch: Positions, rng: np.random.Generator) -> Positions:
        """Return another row of each anchor's group, shape (b,)."""
        first, others = self.first[batch], self.size[batch] - 1
        drawn: Positions = self.members[first + rng.integers(0, others)]
        drawn = np.where(drawn == batch, self.members[first + others], drawn)
        return drawn

    def targets(self, batch: Positions, columns: Positions, column_of: Positions) -> Targets:
        """Return the positives of a batch among the columns."""
        found = []
        step = max(1, BLOCK_CELLS // max(1, len(columns)))
        for start in range(0, len(batch), step):
            some = batch[start : start + step]
            same = self.codes[some][:, None] == self.codes[columns][None, :]  # (step, c)
            same &= some[:, None] != columns[None, :]
            anchor, column = np.nonzero(same)
            found.append((anchor + start, column))
        anchor, column = (np.concatenate(part) for part in zip(*found, strict=True))
        weight = _sum_to_one(anchor, np.ones(len(anchor), dtype=np.float32))
        return Targets(anchor=anchor, column=column, weight=weight, own=column_of[batch])


def judged_pairs(queries: JudgedQueries, usable: NDArray[np.bool_]) -> ListedPairs:
    """Make queries the anchors and their relevant rows the positives, weighted by grade.

    Args:
        queries: Judged queries of the fit split.
        usable: Rows that may take part, shape (n,).

    Raises:
        DataError: No query has a relevant row that can be used.
    """
    query = queries.query_of_judgment()
    norms = np.linalg.norm(queries.vectors, axis=1)
    sound = np.isfinite(norms) & (norms > 0)
    kept = (queries.grades > 0) & usable[queries.rows] & sound[query]
    if not kept.any():
        raise DataError("no judged query has a relevant row in the index; check ids and grades")
    return ListedPairs(
        vectors=queries.vectors,
        indptr=_indptr(np.bincount(query[kept], minlength=len(queries))),
        rows=queries.rows[kept],
        grades=queries.grades[kept].astype(np.float32),
        own=np.full(len(queries), -1) if queries.own is None else queries.own,
    )


def grouped_rows(groups: NDArray[np.int64], usable: NDArray[np.bool_]) -> Positions:
    """Return the rows whose group has another row, ascending.

    Args:
        groups: Group of each row, shape (n,); -1 for none.
        usable: Rows that may take part, shape (n,).
    """
    codes = np.where(usable, groups, -1)
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    return np.flatnonzero((codes >= 0) & (counts[inverse] > 1))


def group_pairs(
    vectors: Vectors, groups: NDArray[np.int64], usable: NDArray[np.bool_]
) -> GroupPairs:
    """Make every grouped row an anchor and the rest of its group its positives.

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
    return GroupPairs(vectors=vectors, codes=codes, members=members, first=first, size=size)


def neighbour_pairs(
    vectors: Vectors, rows: Positions, anchors: Positions, *, k: int, device: str
) -> ListedPairs:
    """Make rows the anchors and their k nearest other rows the positives.

    Source: Dwibedi et al., arXiv:2104.14548, with the neighbours of the frozen vectors.

    Args:
        vectors: All rows, shape (n, d).
        rows: Rows that may take part, ascending.
        anchors: Those of them that are anchors, ascending.
        k: Neighbours of each anchor.
        device: Where to search.

    Raises:
        DataError: There is only one row.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} rows can be used; neighbours need at least 2")
    found = nearest(vectors[anchors], vectors, rows, k=k + 1, device=device)  # (a, k + 1)
    other = found != anchors[:, None]  # (a, k + 1)
    # Among many equal vectors an anchor may be missing from its own neighbours.
    other[other.all(axis=1), -1] = False
    sizes = np.zeros(len(vectors), dtype=np.int64)
    sizes[anchors] = other.sum(axis=1)
    return ListedPairs(
        vectors=vectors,
        indptr=_indptr(sizes),
        rows=found[other],
        grades=np.ones(other.sum(), dtype=np.float32),
        own=np.arange(len(vectors)),
    )


def nearest(
    queries: Vectors, vectors: Vectors | OnDisk, rows: Positions, *, k: int, device: str
) -> Positions:
    """Find each query's nearest rows by cosine, exactly, in bounded memory.

    Args:
        queries: Shape (q, d).
        vectors: All rows, shape (n, d).
        rows: Rows to search among, ascending.
        k: Rows wanted for each query.
        device: Where to search.

    Returns:
        Rows, shape (q, min(k, len(rows))), best first.
    """
    k = min(k, len(rows))
    asked = F.normalize(torch.as_tensor(queries, device=device), dim=1)
    best = torch.full((len(queries), k), -torch.inf, device=device)
    place = torch.zeros((len(queries), k), dtype=torch.int64, device=device)
    query_block, row_block = SEARCHED.get(asked.device.type, SEARCHED["cpu"])
    for start in range(0, len(rows), row_block):
        block = take(vectors, rows[start : start + row_block])
        keys = F.normalize(torch.as_tensor(block, device=device), dim=1)
        for first in range(0, len(queries), query_block):
            some = slice(first, first + query_block)
            score, column = (asked[some] @ keys.T).topk(min(k, len(keys)), dim=1)
            score = torch.cat([best[some], score], dim=1)
            column = torch.cat([place[some], column + start], dim=1)
            best[some], order = score.topk(k, dim=1)
            place[some] = column.gather(1, order)
    found: Positions = rows[place.cpu().numpy()]
    return found


def take(vectors: Vectors | OnDisk, rows: Positions) -> Vectors:
    """Return rows, shape (len(rows), d), float32."""
    if isinstance(vectors, np.ndarray):
        return np.ascontiguousarray(vectors[rows], dtype=np.float32)
    return vectors.take(rows)


def _indptr(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _sum_to_one(anchor: NDArray[np.int64], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    totals = np.bincount(anchor, weight)
    return (weight / totals[anchor]).astype(np.float32)
