"""Points that have several vectors under one name, as rows: each vector of a point is a row.

A row's id is its point's id and the vector's position, such as ``7#0``. Qdrant replaces a point's
vectors all at once, so a point is written as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.qdrant_points import to_ids, to_points
from simskip_vdb.datatypes import (
    ID_TEXT,
    Cursor,
    Ids,
    Mask,
    Metric,
    Neighbors,
    Positions,
    VectorBatch,
    Vectors,
)
from simskip_vdb.errors import ConfigError
from simskip_vdb.store import Allowed

KIND = "multivectors, MaxSim"
MOST = 256
"""Points in a request."""

_MARK = b"#"
_DIGITS = 7  # Qdrant holds at most 2²⁰ numbers under one name
_NUMBERS = 2**20  # of all vectors in a request; a client holds each as an object of its own
_SCORES = 2**22  # pairs of queries and rows at a time
Point = int | str


class Held(NamedTuple):
    """A point: its id, its vectors of shape (m, d), and payload fields."""

    id: Point
    vectors: Vectors
    fields: Mapping[str, Any]


class Points(Protocol):
    """What an engine does with the points that have the vectors, a request at a time."""

    def scroll(
        self, start: Point | None, limit: int, fields: Sequence[str]
    ) -> tuple[Sequence[Held], Point | None]:
        """Return points from an id on, in the order of ids, and the id after them if any."""
        ...

    def read(self, points: Sequence[Point]) -> Sequence[Held]:
        """Return those of these points that are there, with the fields that `write` needs."""
        ...

    def write(self, before: Sequence[Held], new: Sequence[Vectors]) -> Mask:
        """Replace all vectors of points, read a moment ago; return which were sent, shape (n,)."""
        ...


class MultiRows:
    """Scans, reads, ranks and writes points' vectors as rows."""

    def __init__(
        self,
        points: Points,
        *,
        uri: str,
        dim: int,
        metric: Metric,
        most: int = MOST,
        source: Points | None = None,
    ) -> None:
        """Take an engine's points.

        Args:
            points: The points.
            uri: The store's address for messages.
            dim: Dimension of a vector.
            metric: How vectors are compared.
            most: Most points in a request.
            source: The same points with the vectors that these stand beside. Then `update` gives
                vectors to points that have none, or another number of them; `allowed` sees NaN.
        """
        self._points, self._source = points, source
        self._uri, self._dim, self._metric, self._most = uri, dim, metric, most
        self._size = 1  # grows with what requests turn out to hold
        self._counted: tuple[int, int] | None = None

    def count(self, points: int) -> int:
        """Return how many rows so many points have.

        The engine does not know: they are counted by reading all points, when there are more or
        fewer points than before, and anew with each whole scan.
        """
        if self._counted is None or self._counted[0] != points:
            rows = sum(len(point.vectors) for point in self._from(None, ()))
            self._counted = points, rows
        return self._counted[1]

    def scan(
        self, batch_size: int, fields: Sequence[str], cursor: Cursor | None
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in the order of points and positions.

        A batch ends before a point that does not fit any more; only a point with more vectors than
        a batch has rows is split. A cursor is the id of a batch's last row.
        """
        start, done = (None, 0) if cursor is None else self._after(cursor)
        return self._scan(batch_size, fields, start, done)

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        vectors = np.empty((len(ids), self._dim), np.float32)
        there = np.zeros(len(ids), np.bool_)
        points, places = _split(ids)
        for requested in self._requests(points):
            for point in self._read(self._points, list(requested)):
                rows = requested[point.id]
                rows = rows[places[rows] < len(point.vectors)]
                vectors[rows] = point.vectors[places[rows]]
                there[rows] = True
        return VectorBatch(ids=ids[there], vectors=vectors[there])

    def update(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Mask:
        """Overwrite the vectors of rows; see `RowWritable.update`.

        A point is written only where all of its rows that are named are there and allowed; its
        other vectors, and their number, stay.
        """
        written = np.zeros(len(ids), np.bool_)
        points, places = _split(ids)
        for requested in self._requests(points):
            found = [
                (point, requested[point.id])
                for point in self._current(list(requested))
                if places[requested[point.id]].max() < len(point.vectors)
            ]
            if not found:
                continue
            rows = np.concatenate([rows for _, rows in found])
            now = np.concatenate([point.vectors[places[rows]] for point, rows in found])
            fine = np.asarray(allowed(VectorBatch(ids=ids[rows], vectors=now)), np.bool_)
            starts = np.cumsum([0, *(len(rows) for _, rows in found[:-1])])
            before, new, sent = [], [], []
            for (point, rows), ok in zip(found, np.logical_and.reduceat(fine, starts), strict=True):
                whole = point.vectors.copy()
                whole[places[rows]] = vectors[rows]
                if ok and np.isfinite(whole).all():
                    before.append(point)
                    new.append(whole)
                    sent.append(rows)
            if before:
                for rows, ok in zip(sent, self._points.write(before, new), strict=True):
                    written[rows] = ok
        return written

    def rank(self, queries: Vectors, found: Neighbors) -> Neighbors:
        """Return the k best rows among those of the points that a search found for each query.

        Scores are exact. Where the search was exact, so is the answer: the k best rows belong to
        the k points whose best rows are best, and MaxSim ranks points by these for one vector.

        Args:
            queries: Shape (q, d).
            found: Points' ids, shape (q, k).
        """
        ids = np.zeros(found.ids.shape, ID_TEXT)
        scores = np.full(found.scores.shape, -np.inf)
        for requested in self._requests(found.ids.ravel()):
            held = self._read(self._points, list(requested))
            if not held:
                continue
            hit = np.zeros((len(queries), len(held)), np.bool_)
            for at, point in enumerate(held):
                hit[requested[point.id] // found.ids.shape[1], at] = True
            rows = self._batch([(point, 0, len(point.vectors)) for point in held], ())
            sizes = [len(point.vectors) for point in held]
            asked = np.flatnonzero(hit.any(axis=1))
            step = max(1, _SCORES // len(rows))
            for start in range(0, len(asked), step):
                some = asked[start : start + step]
                new = _scores(queries[some], rows.vectors, self._metric)
                new[~np.repeat(hit[some], sizes, axis=1)] = -np.inf
                ids[some], scores[some] = _better(ids[some], scores[some], rows.ids, new)
        return Neighbors(ids=ids, scores=scores.astype(np.float32))

    def _scan(
        self, batch_size: int, fields: Sequence[str], start: Point | None, done: int
    ) -> Iterator[VectorBatch]:
        parts: list[tuple[Held, int, int]] = []
        rows = points = total = 0
        for point in self._from(start, fields):
            begin, end = done if point.id == start else 0, len(point.vectors)
            points, total = points + 1, total + end
            while begin < end:
                if rows and rows + end - begin > batch_size:
                    yield self._batch(parts, fields)
                    parts, rows = [], 0
                stop = min(end, begin + batch_size)
                parts.append((point, begin, stop))
                rows, begin = rows + stop - begin, stop
        if rows:
            yield self._batch(parts, fields)
        if start is None:
            self._counted = points, total

    def _current(self, points: Sequence[Point]) -> Sequence[Held]:
        """Return the points to be written as they are; NaN stands for vectors to be given."""
        held = self._read(self._points, points)
        if self._source is None:
            return held
        given = {point.id: point for point in held}
        filled = []
        for like in self._read(self._source, points):
            own = given.get(like.id)
            if own is None or len(own.vectors) != len(like.vectors):
                own = like._replace(vectors=np.full_like(like.vectors, np.nan))
            filled.append(own)
        return filled

    def _from(self, start: Point | None, fields: Sequence[str]) -> Iterator[Held]:
        """Yield the points from an id on."""
        held, after = self._points.scroll(start, self._size, fields)
        while True:
            self._learn(held)
            yield from held
            if after is None:
                return
            held, after = self._points.scroll(after, self._size, fields)

    def _read(self, where: Points, points: Sequence[Point]) -> Sequence[Held]:
        held = where.read(points)
        self._learn(held)
        return held

    def _learn(self, held: Sequence[Held]) -> None:
        """Set how many points are asked for next: about a million numbers' worth."""
        longest = max((point.vectors.size for point in held), default=self._dim)
        fitting = _NUMBERS // max(longest, 1)
        self._size = max(1, min(2 * self._size, fitting, self._most))

    def _requests(self, points: Ids) -> Iterator[dict[Point, Positions]]:
        """Group places by their point, a request's worth of points at a time."""
        order = np.argsort(points, kind="stable")
        order = order[points[order] != b""]
        new = np.flatnonzero(points[order][1:] != points[order][:-1]) + 1
        groups = np.split(order, new) if len(order) else []
        start = 0
        while start < len(groups):
            chosen = groups[start : start + self._size]
            start += len(chosen)
            named = to_points(points[[group[0] for group in chosen]])
            yield dict(zip(named, chosen, strict=True))

    def _batch(self, parts: Sequence[tuple[Held, int, int]], fields: Sequence[str]) -> VectorBatch:
        names = [_name(point.id, i) for point, begin, end in parts for i in range(begin, end)]
        return VectorBatch(
            ids=to_ids(names),
            vectors=np.concatenate([point.vectors[begin:end] for point, begin, end in parts]),
            fields={
                field: [
                    value
                    for point, begin, end in parts
                    for value in [point.fields[field]] * (end - begin)
                ]
                for field in fields
            },
            cursor=names[-1],
        )

    def _after(self, cursor: Cursor) -> tuple[Point, int]:
        """Return the point at which a cursor goes on, and how many of its vectors are done."""
        points, places = _split(to_ids([cursor]))
        if points[0] == b"":
            raise ConfigError(f"{self._uri}: cursor '{cursor}' is no row id, such as 7#0")
        return to_points(points)[0], int(places[0]) + 1


def _name(point: Point, place: int) -> str:
    return f"{point}{_MARK.decode()}{place}"


def _split(ids: Ids) -> tuple[Ids, Positions]:
    """Return the rows' points and positions; an empty point where it is no row's id."""
    points, places = [], []
    for text in np.asarray(ids).tolist():
        point, _, place = text.rpartition(_MARK)
        known = place.isdigit() and len(place) <= _DIGITS
        points.append(point if known else b"")
        places.append(int(place) if known else 0)
    return np.array(points, ID_TEXT), np.array(places, np.int64)


def _better(
    ids: Ids, scores: NDArray[np.float64], new_ids: Ids, new: NDArray[np.float64]
) -> tuple[Ids, NDArray[np.float64]]:
    """Return the best k of k rows, shape (q, k), and of new ones with scores of shape (q, m)."""
    k = ids.shape[1]
    both = np.concatenate([scores, new], axis=1)  # (q, k + m)
    top = np.argpartition(-both, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(both, top, axis=1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)
    best = np.take_along_axis(both, top, axis=1)
    old = np.take_along_axis(ids, top.clip(max=k - 1), axis=1)
    found = np.where(top < k, old, new_ids[(top - k).clip(min=0)])
    return np.where(np.isneginf(best), b"", found), best


def _scores(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float64]:
    """Score every pair, shape (q, m); higher is better."""
    left, right = queries.astype(np.float64), vectors.astype(np.float64)
    scores: NDArray[np.float64] = left @ right.T
    if metric is Metric.COSINE:
        lengths = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
        scores /= np.where(lengths > 0, lengths, 1)
    if metric is Metric.EUCLID:
        scores = 2 * scores - (left**2).sum(axis=1)[:, None] - (right**2).sum(axis=1)
    return scores
