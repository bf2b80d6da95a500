"""Stop between batches when asked to, keep to a window of hours, and write no faster than told."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from simskip_vdb.datatypes import Progress
from simskip_vdb.errors import StoppedError

WRITING = ("write", "restore")


class Pace:
    """Hears of progress, which comes after each batch, and stops or slows the run there.

    Args:
        progress: Told of the progress as well.
        rows_per_second: Most rows written in a second; None for no limit.
        seconds: How long the run may take; None for no limit.
        stop: Set when the run is asked to stop.

    Raises:
        StoppedError: From a call, where the run was asked to stop or its time is up.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        rows_per_second: float | None = None,
        seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._progress, self._rate, self._stop = progress, rows_per_second, stop
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._stage, self._done, self._since = "", 0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Pass progress on; wait where writing was too fast."""
        self._progress(stage, done, total)
        if self._stop is not None and self._stop.is_set():
            raise StoppedError(f"asked to stop while {stage} was at {done:,} of {total:,}")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise StoppedError(f"the window closed while {stage} was at {done:,} of {total:,}")
        if self._rate is not None and stage in WRITING:
            self._wait(stage, done)

    def _wait(self, stage: str, done: int) -> None:
        now = time.monotonic()
        if stage != self._stage or done < self._done:  # a first batch sets the clock
            self._stage, self._done, self._since = stage, done, now
            return
        assert self._rate is not None
        ahead = (done - self._done) / self._rate - (now - self._since)
        if ahead > 0:
            if self._stop is None:
                time.sleep(ahead)
            else:
                self._stop.wait(ahead)


@contextmanager
def stops_on_sigterm() -> Iterator[threading.Event]:
    """Set an event on SIGTERM, instead of dying; a second one kills as usual.

    Outside the main thread, where signals cannot be caught, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGTERM, before)

    before: Callable[[int, FrameType | None], object] | int | None
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
