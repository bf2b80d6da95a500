"""An application that goes on writing to its points while they are refined."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from simskip_vdb.datatypes import Vectors

Payload = Mapping[str, Any]


class Points(Protocol):
    """How an application writes to one vector of its collection."""

    def put(self, point: int | str, vector: Vectors, payload: Payload) -> None:
        """Insert or replace a point."""
        ...

    def annotate(self, point: int | str, payload: Payload) -> None:
        """Set payload fields and leave the vector."""
        ...

    def remove(self, point: int | str) -> None:
        """Delete a point."""
        ...


class Application:
    """Inserts, replaces, annotates and deletes points at random, on a thread of its own.

    Each of its writes raises the point's `version`, in the same request.

    Attributes:
        payloads: Payload of every point that should be there.
        vectors: The vector of every point that it wrote last.
        done: Writes so far.
    """

    def __init__(
        self,
        points: Points,
        payloads: Mapping[int | str, Payload],
        dim: int,
        writes: int,
        seed: int = 0,
    ) -> None:
        self.payloads = dict(payloads)
        self.vectors: dict[int | str, Vectors] = {}
        self.done = 0
        self._points, self._dim, self._writes = points, dim, writes
        self._names = list(payloads)
        self._rng = np.random.default_rng(seed)
        self._allowed = 0
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self, writes: int, *, wait: bool) -> None:
        """Allow some more writes; `wait` until they are done."""
        with self._change:
            self._allowed = min(self._writes, self._allowed + writes)
            self._change.notify_all()
            if wait:
                self._change.wait_for(lambda: self._error or self.done >= self._allowed)

    def finish(self) -> None:
        """Allow all writes, and return when they are done."""
        self.go_on(self._writes, wait=False)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for done in range(1, self._writes + 1):
                with self._change:
                    self._change.wait_for(lambda at=done: self._allowed >= at)  # type: ignore[misc]
                self._write()
                with self._change:
                    self.done = done
                    self._change.notify_all()
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def _write(self) -> None:
        actions: tuple[Callable[[], None], ...]
        actions = (self._insert, self._replace, self._replace, self._annotate, self._delete)
        actions[int(self._rng.integers(len(actions)))]()

    def _insert(self) -> None:
        point = int(self._rng.integers(10**9, 10**15))
        self._names.append(point)
        self._put(point, {"version": 1})

    def _replace(self) -> None:
        point = self._names[self._any()]
        self._put(point, self._raised(point))

    def _annotate(self) -> None:
        point = self._names[self._any()]
        self.payloads[point] = self._raised(point)
        self._points.annotate(point, self.payloads[point])

    def _delete(self) -> None:
        at = self._any()
        point, self._names[at] = self._names[at], self._names[-1]
        self._names.pop()
        del self.payloads[point]
        self.vectors.pop(point, None)
        self._points.remove(point)

    def _put(self, point: int | str, payload: Payload) -> None:
        vector = self._rng.standard_normal(self._dim).astype(np.float32)
        self.vectors[point] = vector / np.linalg.norm(vector)
        self.payloads[point] = payload
        self._points.put(point, self.vectors[point], payload)

    def _raised(self, point: int | str) -> Payload:
        payload = self.payloads[point]
        return {**payload, "version": payload["version"] + 1}

    def _any(self) -> int:
        return int(self._rng.integers(len(self._names)))
