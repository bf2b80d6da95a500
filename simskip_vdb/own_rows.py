"""Queries that are rows of the index themselves, such as those of BEIR's ArguAna and Quora."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.by_vector import near
from simskip_vdb.datatypes import Ids, JudgedQueries, Mask, Positions, Vectors, find_ids

SAME = 1e-3
"""Relative L2 distance within which a query has the vector of a row."""
_FEWEST = 20
"""Queries named as rows are, below which nearness says little about whether they are those rows."""
_NEARER = 0.9
"""Share of them that must be nearer to the row of their name than to another query's."""


class RowSource(Protocol):
    """The rows of an index in scan order.

    Attributes:
        ids: Index ids, shape (n,).
        dim: Dimension of a vector.
    """

    ids: Ids
    dim: int

    def take(self, positions: Positions, /) -> Vectors:
        """Return the vectors at these positions, shape (len(positions), d)."""
        ...


def apart_from_own(
    judged: JudgedQueries, documents: Mapping[str, int], rows: RowSource
) -> tuple[JudgedQueries, Mask, Mask]:
    """Find the queries that are rows, and take away judgments of a row for itself.

    BEIR leaves out of a query's results the document that has its id, for a text finds itself
    wherever it is searched. Where ids of queries and rows are counted from 0 alike, an equal id
    says nothing, so more is asked: the row has the query's vector. An encoder may embed a text as
    a query and as a document differently, and then it is asked of all queries that are named like
    rows and not judged relevant to them: `_NEARER` of at least `_FEWEST` are nearer to the row of
    their name than to that of the next query.

    Args:
        judged: m queries.
        documents: Position by document id, -1 for documents without a row.
        rows: The rows of the index.

    Returns:
        The queries with their own rows; which of them are rows, shape (m,); and which were judged
        for themselves, shape (m,).
    """
    named = find_ids(documents, judged.ids)
    there = np.flatnonzero(named >= 0)
    if not len(there):
        none = np.zeros(len(judged), np.bool_)
        return judged, none, none
    vectors = rows.take(named[there])
    is_row = np.zeros(len(judged), np.bool_)
    is_row[there] = near(vectors, judged.vectors[there], SAME, directions=True)
    owners = judged.query_of_judgment()
    itself = judged.rows == named[owners]
    answers = np.bincount(owners[itself & (judged.grades > 0)], minlength=len(judged)) > 0
    open_ones = ~(is_row | answers)[there]
    if _are_nearer(judged.vectors[there[open_ones]], vectors[open_ones]):
        is_row[there[open_ones]] = True
    if not is_row.any():
        return judged, is_row, is_row
    own = np.where(is_row, named, -1)
    dropped = itself & is_row[owners]
    sizes = np.bincount(owners[~dropped], minlength=len(judged))
    apart = replace(
        judged,
        own=own,
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        rows=judged.rows[~dropped],
        grades=judged.grades[~dropped],
    )
    return apart, is_row, np.bincount(owners[dropped], minlength=len(judged)) > 0


def _are_nearer(queries: Vectors, named: Vectors) -> bool:
    """Tell whether queries resemble the rows of their names, each of shape (m, d)."""
    if len(queries) < _FEWEST:
        return False
    own, other = _cosines(queries, named), _cosines(queries, np.roll(named, 1, axis=0))
    return bool((own > other).mean() >= _NEARER)


def _cosines(ones: Vectors, others: Vectors) -> NDArray[np.float64]:
    wide, wider = ones.astype(np.float64), others.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        products = np.einsum("ij,ij->i", wide, wider)
        cosines: NDArray[np.float64] = products / (
            np.linalg.norm(wide, axis=1) * np.linalg.norm(wider, axis=1)
        )
    return cosines
