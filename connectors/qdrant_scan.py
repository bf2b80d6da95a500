"""Reading a whole collection: pages one after the other, or slices side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from qdrant_client import models

from simskip_vdb.connectors.qdrant_points import to_ids, to_points
from simskip_vdb.connectors.qdrant_records import scan_keys
from simskip_vdb.datatypes import Cursor

END = ""
"""The cursor behind the last row."""

Point = models.ExtendedPointId
Scroll = Callable[[Point | None, models.SliceCondition | None], "Page"]
"""Reads the page that starts at a point, of all points or of those in a slice."""


class Page(NamedTuple):
    """Some records in the order of their ids, and the id of the next one if there is any."""

    records: Sequence[models.Record]
    after: Point | None


def start_of(cursor: Cursor | None) -> Point | None:
    """Return the point at which a cursor goes on; None for the first one."""
    if cursor is None:
        return None
    return to_points(to_ids([cursor]))[0]


def read_pages(scroll: Scroll, start: Point | None) -> Iterator[Page]:
    """Yield pages one after the other, on this thread."""
    page = scroll(start, None)
    while page.after is not None:
        yield page
        page = scroll(page.after, None)
    yield page


def read_slices(scroll: Scroll, start: Point | None, streams: int, size: int) -> Iterator[Page]:
    """Yield the same pages, read by several threads, each a page ahead.

    Slices are disjoint parts of the ids; here they are merged back into the order of ids, so that
    neither the order nor a cursor depends on how many there are. Memory holds two pages a slice.

    Args:
        scroll: Reads a page.
        start: The first point.
        streams: Slices, and threads.
        size: Records in a page.
    """
    pool = ThreadPoolExecutor(streams, "simskip-scan")
    try:
        yield from _cut(
            _merged([_Stream(pool, scroll, start, i, streams) for i in range(streams)]), size
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Stream:
    """One slice: the records at hand, and the page that is on its way."""

    def __init__(
        self, pool: ThreadPoolExecutor, scroll: Scroll, start: Point | None, index: int, total: int
    ) -> None:
        whole = total == 1
        self._slice = (
            None if whole else models.SliceCondition(slice=models.Slice(total=total, index=index))
        )
        self._pool, self._scroll = pool, scroll
        self.records: list[models.Record] = []
        self._coming: Future[Page] | None = self._ask(start)

    def refill(self) -> None:
        """Take the next page where no record is at hand."""
        while not self.records and self._coming is not None:
            page = self._coming.result()
            self.records = list(page.records)
            self._coming = None if page.after is None else self._ask(page.after)

    @property
    def done(self) -> bool:
        """True where no page is to come."""
        return self._coming is None

    def _ask(self, start: Point | None) -> Future[Page]:
        return self._pool.submit(self._scroll, start, self._slice)


def _merged(streams: Sequence[_Stream]) -> Iterator[list[models.Record]]:
    """Yield records of all streams in the order of ids."""
    while True:
        for stream in streams:
            stream.refill()
        full = [stream for stream in streams if stream.records]
        if not full:
            return
        keys = [scan_keys(to_ids(record.id for record in s.records)) for s in full]
        # Nothing that is still to come sorts before the last record of its own stream.
        coming = [key[-1] for key, stream in zip(keys, full, strict=True) if not stream.done]
        safe = [
            len(key) if not coming else int(np.searchsorted(key, min(coming), side="right"))
            for key in keys
        ]
        ready = [r for s, count in zip(full, safe, strict=True) for r in s.records[:count]]
        order = np.argsort(
            np.concatenate([key[:count] for key, count in zip(keys, safe, strict=True)])
        )
        for stream, count in zip(full, safe, strict=True):
            del stream.records[:count]
        yield [ready[i] for i in order]


def _cut(runs: Iterator[list[models.Record]], size: int) -> Iterator[Page]:
    """Cut records into pages of equal size."""
    held: list[models.Record] = []
    for run in runs:
        held += run
        while len(held) > size:
            yield Page(held[:size], held[size].id)
            held = held[size:]
    yield Page(held, None)
