"""Do two things at once: read ahead of what is at work, write behind it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_DEPTH = 2
"""Items that wait: one would do if all took equally long."""


def cores() -> int:
    """Return how many cores this process may use; ``OMP_NUM_THREADS`` bounds them, as elsewhere."""
    able = getattr(os, "sched_getaffinity", None)
    found = len(able(0)) if able else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(found, max(1, int(told))) if told.isdigit() else found


def ahead(items: Generator[T]) -> Generator[T]:
    """Yield what a generator yields, drawn from it in a thread of its own, a little ahead.

    Its errors surface here. It is closed, and the thread ended, when this is.
    """
    end = object()
    waiting: deque[Future[T | object]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for _ in range(_DEPTH):
                waiting.append(pool.submit(next, items, end))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]  # what is not the end is an item
        finally:
            for future in waiting:
                future.cancel()
            pool.submit(items.close).result()


def behind(do: Callable[[T], object], items: Iterable[T]) -> None:
    """Do something with every item, in order, in a thread of its own, while the next are drawn.

    Errors of either surface here; after the first, no more than what waited already is done.
    """
    running: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                if len(running) == _DEPTH:
                    running.popleft().result()
                running.append(pool.submit(do, item))
            while running:
                running.popleft().result()
        finally:
            for future in running:
                future.cancel()
