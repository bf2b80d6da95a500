"""Writing vectors of rows that an application may write, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from qdrant_client import models

from simskip_vdb.by_vector import near
from simskip_vdb.connectors.qdrant_calls import Calls
from simskip_vdb.connectors.qdrant_layout import Layout
from simskip_vdb.connectors.qdrant_points import to_points
from simskip_vdb.connectors.qdrant_records import find_ids, json_path, take_rows
from simskip_vdb.datatypes import Ids, Mask, Metric, VectorBatch, Vectors
from simskip_vdb.errors import DataError, StoreNotFoundError
from simskip_vdb.store import Allowed

_POINTS = 128
_CONDITIONS_A_POINT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Overwrites one vector of points.

    Attributes:
        calls: The client.
        layout: The vector.
        read: Returns the rows of these ids as they are now, with the guard's field.
        request: What every request carries: the collection, and the shard key if there is one.
        guard_field: Payload field that changes with each write of the application, if any.
        delay: Seconds to wait after a request.
        streams: Requests that are under way at a time.
    """

    calls: Calls
    layout: Layout
    read: Callable[[Ids], VectorBatch]
    request: Mapping[str, Any]
    guard_field: str | None
    delay: float
    streams: int

    def write(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Mask:
        """Write new vectors, shape (b, d), to rows; return which were, shape (b,)."""
        pieces = list(self._pieces(len(ids)))

        def one(piece: slice) -> Mask:
            return self._write_piece(ids[piece], vectors[piece], allowed)

        if self.streams == 1 or len(pieces) == 1:
            masks = [one(piece) for piece in pieces]
        else:
            pool = ThreadPoolExecutor(self.streams, "simskip-write")
            try:
                masks = list(pool.map(one, pieces))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return np.concatenate([np.empty(0, np.bool_), *masks])

    def _pieces(self, count: int) -> Iterator[slice]:
        size = self.layout.write_size(_POINTS)
        if self.guard_field is not None:
            limit = self.layout.limit("filter_max_conditions", _POINTS * _CONDITIONS_A_POINT)
            size = min(size, max(1, limit // _CONDITIONS_A_POINT))
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _write_piece(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Mask:
        """Read, ask and write one request's rows.

        A request that failed may have been carried out in part. So before it is sent again the rows
        are read again, and only those that are still as they were when `allowed` saw them are sent.
        """
        before = self.read(ids)
        if not len(before):
            return np.zeros(len(ids), np.bool_)
        before = take_rows(before, np.flatnonzero(np.asarray(allowed(before), np.bool_)))
        sent = np.isin(ids, before.ids)
        if not len(before):
            return sent
        tries = 0

        def send() -> None:
            nonlocal tries
            tries += 1
            todo = before if tries == 1 else self._unchanged(before)
            if len(todo):
                self._send(todo, vectors[find_ids(ids, todo.ids)])

        self.calls.retry(send, also=StoreNotFoundError)
        if self.delay:
            time.sleep(self.delay)
        if tries == 1 or not self.layout.wait:  # without waiting, nothing can be seen yet
            return sent
        return sent & self._holding(ids, vectors)

    def _send(self, rows: VectorBatch, vectors: Vectors) -> None:
        name = self.layout.name
        points = [
            models.PointVectors(id=point, vector={name: vector} if name else vector)
            for point, vector in zip(to_points(rows.ids), vectors.tolist(), strict=True)
        ]
        guard = None
        if self.guard_field is not None:
            guard = guard_filter(rows, self.guard_field, self.calls.uri)
        self.calls.once(
            "update_vectors",
            points=points,
            wait=self.layout.wait,
            update_filter=guard,
            **self.request,
        )

    def _unchanged(self, before: VectorBatch) -> VectorBatch:
        """Return the rows that are there and are, bit for bit, as they were."""
        now = self.read(before.ids)
        place = find_ids(before.ids, now.ids)
        then = before.vectors[place]
        same = (now.vectors.view(np.uint32) == then.view(np.uint32)).all(axis=1)
        if self.guard_field is not None:
            guards = before.fields[self.guard_field]
            seen = [guards[i] for i in place]
            same &= [a == b for a, b in zip(now.fields[self.guard_field], seen, strict=True)]
        return take_rows(now, np.flatnonzero(same))

    def _holding(self, ids: Ids, vectors: Vectors) -> Mask:
        """Tell which of these rows hold the vectors that were sent."""
        now = self.read(ids)
        place = find_ids(ids, now.ids)
        layout = self.layout
        held = np.zeros(len(ids), np.bool_)
        cosine = layout.metric is Metric.COSINE
        held[place] = near(now.vectors, vectors[place], layout.rounding, directions=cosine)
        return held


def guard_filter(rows: VectorBatch, field: str, uri: str) -> models.Filter:
    """Return a filter that a row passes while its guard holds the value that it was read with.

    Raises:
        DataError: A guard's value is a list or an object.
    """
    groups: dict[Any, list[int | str]] = {}
    for point, value in zip(to_points(rows.ids), rows.fields[field], strict=True):
        if isinstance(value, (list, dict)):
            raise DataError(
                f"{uri}: the guard field {field!r} of row {point} holds a "
                f"{type(value).__name__}; it takes one number, text or truth value a row"
            )
        groups.setdefault((type(value), value), []).append(point)
    return models.Filter(
        should=[
            models.Filter(
                must=[models.HasIdCondition(has_id=[*points]), _holds(json_path(field), value)]
            )
            for (_, value), points in groups.items()
        ]
    )


def _holds(field: str, value: Any) -> models.Condition:  # noqa: ANN401 any JSON scalar
    if value is None:
        return models.IsEmptyCondition(is_empty=models.PayloadField(key=field))
    if isinstance(value, float):
        return models.FieldCondition(key=field, range=models.Range(gte=value, lte=value))
    return models.FieldCondition(key=field, match=models.MatchValue(value=value))
