"""Stopping between batches, windows, and rate limits."""

from __future__ import annotations

import os
import signal
import time
from threading import Event

import pytest

from simskip_vdb.datatypes import silent
from simskip_vdb.errors import StoppedError
from simskip_vdb.pace import Pace, stops_on_sigterm


def test_progress_is_passed_on() -> None:
    heard: list[tuple[str, int, int]] = []
    pace = Pace(lambda *part: heard.append(part))
    pace("read", 3, 9)
    assert heard == [("read", 3, 9)]


def test_a_run_stops_at_the_next_batch_once_asked_to() -> None:
    stop = Event()
    pace = Pace(silent, stop=stop)
    pace("write", 1, 9)
    stop.set()
    with pytest.raises(StoppedError, match="write was at 2 of 9") as caught:
        pace("write", 2, 9)
    assert caught.value.exit_code == 4


def test_a_run_stops_when_its_window_closes() -> None:
    with pytest.raises(StoppedError, match="window closed"):
        Pace(silent, seconds=-1)("fit", 1, 10)


def test_writing_waits_so_that_the_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    pace = Pace(silent, rows_per_second=50)
    pace("read", 1000, 1000)
    for done in (100, 200, 300):
        pace("write", done, 300)
        now[0] += 0.5
    # 100 rows at 50 a second take 2 s, of which .5 were spent elsewhere.
    assert slept == pytest.approx([1.5, 1.5])


def test_sigterm_asks_to_stop_and_a_second_one_is_not_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stops_on_sigterm() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before
