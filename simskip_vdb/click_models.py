"""What clicks say of documents, with the places where these stood taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.parsing import Qrels

SATISFIED = 30.0
"""Seconds on a document from which on a click counts: shorter stays are mostly disappointments
(Kim et al., Modeling dwell time to predict click-level satisfaction, WSDM 2014)."""
DEEPEST = 100
"""Places beyond this one count as this one."""
CLIPPED = 10
"""Most that one click counts by inverse propensity (clipping bounds the variance)."""
_HIGHEST = 3
_PENDING = 1 << 20

Counts = NDArray[np.int64]


class Clicks:
    """Counts what was shown and clicked, by query, document and place.

    Grades follow from what a log tells:

    - Of all that was shown, with places: clicks over expected clicks (Zhang & Jones, Comparing
      click logs and editorial labels for training query rewriting, WWW 2007), the measure that
      OpenSearch's Search Relevance Workbench makes judgments by. Expected is how often whatever
      stood in the same places was clicked, over all queries. One click is added to both, which
      pulls pairs that were seldom shown to 1. The grade is the ratio, rounded, at most 3: so 0,
      judged not relevant, is what was clicked less than half as often as its places explain.
    - Of clicks alone, with places: each click counts as much as its place is deep, at most
      `CLIPPED`, which is inverse propensity with propensity 1 / place (Joachims, Swaminathan and
      Schnabel, Unbiased learning-to-rank with biased feedback, WSDM 2017). The grade is the share
      of the query's best document in thirds, 1 to 3.
    - Of clicks without places: 1.

    Where a log counts places from 0, which a 0 among them tells, all count as one more. A click
    whose place is not known counts where its document was shown most.

    The memory needed grows with different triples of query, document and place.

    Args:
        beside: Shares its names of queries and documents, to be joined to it.
    """

    def __init__(self, beside: Clicks | None = None) -> None:
        self._queries: dict[str, int] = {} if beside is None else beside._queries
        self._docs: dict[str, int] = {} if beside is None else beside._docs
        self._parts: list[Counts] = []  # of query, document, place, shown, clicked
        self._settled = False

    def __bool__(self) -> bool:
        return bool(self._parts)

    def join(self, other: Clicks) -> None:
        """Add what another counted that was made beside this one."""
        self._parts = [self._from_1(), other._from_1()]

    def add(
        self,
        queries: Sequence[str],
        docs: Sequence[str],
        places: Sequence[int],
        shown: Sequence[int],
        clicked: Sequence[int],
    ) -> None:
        """Add what was seen of some documents.

        Args:
            queries: Query of each.
            docs: Document of each.
            places: Where each stood, as logged; -1 where that is not known.
            shown: How often each was shown there.
            clicked: How often it was clicked there, to somebody's satisfaction.
        """
        if not docs:
            return
        owners = [self._queries.setdefault(name, len(self._queries)) for name in queries]
        rows = [self._docs.setdefault(name, len(self._docs)) for name in docs]
        at = np.minimum(np.array(places, np.int64), DEEPEST)
        self._parts.append(np.array([owners, rows, at, shown, clicked], np.int64))
        if sum(part.shape[1] for part in self._parts[1:]) > _PENDING:
            self._parts = [self._merged()]

    def qrels(self, source: str) -> Qrels:
        """Return a grade for each pair that was clicked, or shown often enough to say that not."""
        self._parts = [_located(self._from_1())]
        owners, docs, places, shown, clicked = self._merged()
        pair = _runs(owners, docs)
        starts = np.flatnonzero(np.diff(pair, prepend=-1))
        query, clicks = owners[starts], _sums(clicked, pair)
        if (shown > clicked).any() and places.any():
            grades = _over_expected(places, np.maximum(shown, clicked), clicked, pair)
            said = grades >= 0
        else:
            weights = np.clip(np.where(places > 0, places, 1), 1, CLIPPED) * clicked
            grades = np.ones(len(query), np.int64)
            if places.any():
                grades = _thirds(query, _sums(weights, pair))
            said = clicks > 0
        names, documents = list(self._queries), list(self._docs)
        return Qrels(
            source=source,
            query_ids=[names[i] for i in query[said].tolist()],
            doc_ids=[documents[i] for i in docs[starts][said].tolist()],
            grades=grades[said].astype(np.int32),
        )

    def _merged(self) -> Counts:
        together = np.concatenate([np.empty((5, 0), np.int64), *self._parts], axis=1)
        together = together[:, np.lexsort(together[2::-1])]
        if not together.shape[1]:
            return together
        new = (np.diff(together[:3]) != 0).any(axis=0)
        starts = np.flatnonzero(np.concatenate([[True], new]))
        return np.concatenate([together[:3, starts], np.add.reduceat(together[3:], starts, axis=1)])

    def _from_1(self) -> Counts:
        """Return what was counted, by places from 1, and 0 for one that is not known."""
        if self._settled:
            return self._merged()
        counts, self._settled = self._merged(), True
        known = counts[2] >= 0
        first = 1 if (counts[2] == 0).any() else 0
        counts[2] = np.where(known, np.minimum(counts[2] + first, DEEPEST), 0)
        return counts


def _located(counts: Counts) -> Counts:
    """Move clicks of unknown place to where their document was shown most for the query."""
    lost = counts[2] == 0
    if not lost.any() or lost.all():
        return counts
    keys = counts[0] << 32 | counts[1]
    order = np.lexsort((counts[3] + ~lost, keys))
    last = np.flatnonzero(np.diff(keys[order], append=-1))
    best = order[last]
    counts[2, lost] = counts[2, best[np.searchsorted(keys[best], keys[lost])]]
    return counts


def _over_expected(places: Counts, shown: Counts, clicked: Counts, pair: Counts) -> Counts:
    """Return grades by clicks over expected clicks, -1 where nothing is said, by pair."""
    rate = np.bincount(places, clicked) / np.maximum(np.bincount(places, shown), 1)
    expected, clicks = _sums(shown * rate[places], pair), _sums(clicked, pair)
    ratio = (clicks + 1) / (expected + 1)
    grades = np.minimum(np.floor(ratio + 0.5), _HIGHEST).astype(np.int64)
    return np.where((clicks > 0) | (ratio < 0.5), grades, -1)  # else hardly shown, never clicked


def _thirds(query: Counts, weights: NDArray[Any]) -> Counts:
    """Return each pair's share of its query's largest weight, in thirds rounded up."""
    largest = np.zeros(int(query.max(initial=-1)) + 1)
    np.maximum.at(largest, query, weights)
    shares = weights / np.maximum(largest[query], 1)
    return np.ceil(_HIGHEST * shares - 1e-9).astype(np.int64)


def _runs(owners: Counts, docs: Counts) -> Counts:
    """Return the number of each place's pair, ascending."""
    new = (np.diff(owners) != 0) | (np.diff(docs) != 0)
    return np.concatenate([np.zeros(min(1, len(owners)), np.int64), np.cumsum(new)])


def _sums(values: NDArray[Any], pair: Counts) -> NDArray[np.float64]:
    return np.bincount(pair, values).astype(np.float64)
