"""The points of a Qdrant collection that have several vectors under one name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from qdrant_client import models

from simskip_vdb.by_vector import near
from simskip_vdb.connectors.multi_rows import Held, Point
from simskip_vdb.connectors.qdrant_points import to_ids
from simskip_vdb.connectors.qdrant_read import Reader
from simskip_vdb.connectors.qdrant_records import as_compared, value_at, vector_of
from simskip_vdb.connectors.qdrant_update import guard_filter
from simskip_vdb.datatypes import Mask, Metric, VectorBatch, Vectors
from simskip_vdb.errors import StoreNotFoundError

_REQUEST_NUMBERS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPoints:
    """The `Points` of a collection.

    Attributes:
        reader: Reads them.
        guard_field: Payload field that changes with each write of the application, if any.
        delay: Seconds to wait after a request that writes.
    """

    reader: Reader
    guard_field: str | None
    delay: float

    def scroll(
        self, start: Point | None, limit: int, fields: Sequence[str]
    ) -> tuple[Sequence[Held], Point | None]:
        """Return points from an id on; see `Points.scroll`."""
        page = self.reader.page(limit, self.reader.chosen, start=start, fields=fields)
        after = page.after if page.after is None or isinstance(page.after, int) else str(page.after)
        return self._held(page.records, fields), after

    def read(self, points: Sequence[Point]) -> Sequence[Held]:
        """Return those of these points that are there; see `Points.read`."""
        fields = (self.guard_field,) if self.guard_field else ()
        return self._held(self.reader.records(points, fields), fields)

    def write(self, before: Sequence[Held], new: Sequence[Vectors]) -> Mask:
        """Replace all vectors of points; see `Points.write`.

        A request that failed may have been carried out in part. So before it is sent again the
        points are read again, and only those that are still as they were are sent.
        """
        masks = [self._write(before[piece], new[piece]) for piece in _pieces(new)]
        return np.concatenate([np.empty(0, np.bool_), *masks])

    def _write(self, before: Sequence[Held], new: Sequence[Vectors]) -> Mask:
        tries = 0
        names = [point.id for point in before]

        def send() -> None:
            nonlocal tries
            tries += 1
            now = {} if tries == 1 else {point.id: point for point in self.read(names)}
            todo = [
                at
                for at, point in enumerate(before)
                if tries == 1 or (point.id in now and _same(now[point.id], point))
            ]
            if todo:
                self._send([before[at] for at in todo], [new[at] for at in todo])

        layout, calls = self.reader.layout, self.reader.calls
        calls.retry(send, also=StoreNotFoundError)
        if self.delay:
            time.sleep(self.delay)
        if tries == 1 or not layout.wait:  # without waiting, nothing can be seen yet
            return np.ones(len(before), np.bool_)
        held = {point.id: point.vectors for point in self.read(names)}
        cosine = layout.metric is Metric.COSINE
        return np.array(
            [
                name in held
                and held[name].shape == vectors.shape
                and bool(near(held[name], vectors, layout.rounding, directions=cosine).all())
                for name, vectors in zip(names, new, strict=True)
            ],
            np.bool_,
        )

    def _send(self, points: Sequence[Held], new: Sequence[Vectors]) -> None:
        reader, name, guard = self.reader, self.reader.layout.name, None
        if self.guard_field is not None:
            read = VectorBatch(
                ids=to_ids(point.id for point in points),
                vectors=np.empty((len(points), 0), np.float32),
                fields={self.guard_field: [point.fields[self.guard_field] for point in points]},
            )
            guard = guard_filter(read, self.guard_field, reader.calls.uri)
        reader.calls.once(
            "update_vectors",
            points=[
                models.PointVectors(
                    id=point.id, vector={name: vectors.tolist()} if name else vectors.tolist()
                )
                for point, vectors in zip(points, new, strict=True)
            ],
            wait=reader.layout.wait,
            update_filter=guard,
            **reader.request,
        )

    def _held(self, records: Sequence[models.Record], fields: Sequence[str]) -> list[Held]:
        layout = self.reader.layout
        return [
            Held(
                record.id if isinstance(record.id, int) else str(record.id),
                as_compared(np.array(vectors, np.float32), layout),
                {field: value_at(record.payload or {}, field) for field in fields},
            )
            for record in records
            if (vectors := vector_of(record, layout.name))
        ]


def _pieces(new: Sequence[Vectors]) -> Iterator[slice]:
    """Cut points into requests that a server takes; one by itself always fits."""
    start = numbers = 0
    for at, vectors in enumerate(new):
        if at > start and numbers + vectors.size > _REQUEST_NUMBERS:
            yield slice(start, at)
            start, numbers = at, 0
        numbers += vectors.size
    yield slice(start, len(new))


def _same(now: Held, then: Held) -> bool:
    """Tell whether a point is, bit for bit, as it was."""
    return now.fields == then.fields and now.vectors.tobytes() == then.vectors.tobytes()
