"""A store in memory that misbehaves as a live one does: it dies, it fails, others write to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import Ids, Mask, Metric, StoreInfo, VectorBatch, Vectors
from simskip_vdb.store import Allowed

Event = Callable[["LiveStore"], None]


class Killed(BaseException):
    """The process dies here."""


class LiveStore(MemoryStore):
    """Writes two rows a request, in each of which anything may happen.

    Attributes:
        requests: Requests so far.
        events: What happens right before the request of that number.
        half: Whether numbers are kept in half precision.
        exact: What it says of that.
        positional: Whether it says that ids are positions.
        note: What `mark` left.
    """

    def __init__(
        self, ids: Ids, vectors: Vectors, metric: Metric = Metric.DOT, *, half: bool = False
    ) -> None:
        super().__init__(ids, vectors, metric)
        self.half, self.exact, self.positional = half, False, False
        self.requests = 0
        self.events: dict[int, Event] = {}
        self.note: Mapping[str, Any] | None = None
        self.put(ids, vectors)

    def info(self) -> StoreInfo:
        rounding = 2e-3 if self.half else 1e-6
        return replace(
            super().info(),
            uri="live:rows",
            exact=self.exact,
            rounding=rounding,
            positional=self.positional,
        )

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        written = np.zeros(len(batch), np.bool_)
        for start in range(0, len(batch), 2):
            self.requests += 1
            event = self.events.pop(self.requests, None)
            if event is not None:
                event(self)
            part = slice(start, start + 2)
            request = VectorBatch(ids=batch.ids[part], vectors=batch.vectors[part])
            written[part] = super().update(request, allowed)
            self.put(self._rows.ids, self._vectors)
        return written

    def marker(self) -> Mapping[str, Any] | None:
        return self.note

    def mark(self, note: Mapping[str, Any] | None) -> None:
        self.note = note

    def put(self, ids: Ids, vectors: Vectors) -> None:
        """Write rows as the application does; unknown ids are added."""
        rows = dict(zip(self._rows.ids.tolist(), self._vectors, strict=True))
        kind = np.float16 if self.half else np.float32
        rows |= dict(zip(ids.tolist(), vectors.astype(kind).astype(np.float32), strict=True))
        self._set(rows)

    def remove(self, ids: Ids) -> None:
        """Remove rows as the application does."""
        rows = dict(zip(self._rows.ids.tolist(), self._vectors, strict=True))
        self._set({i: row for i, row in rows.items() if i not in ids.tolist()})

    def content(self) -> dict[Any, Vectors]:
        """Return every row by id."""
        return dict(zip(self._rows.ids.tolist(), self._vectors.copy(), strict=True))

    def _set(self, rows: dict[Any, Vectors]) -> None:
        ids = np.array(sorted(rows), self._rows.ids.dtype)
        vectors = np.stack([rows[i] for i in ids.tolist()])
        self._rows = type(self._rows)(ids, "live:rows")
        self._vectors = vectors
