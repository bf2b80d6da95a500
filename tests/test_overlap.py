from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator

import pytest

from simskip_vdb.overlap import ahead, behind


class Watched:
    """A generator that says how far it was drawn, by which thread, and whether it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.drawn, self.closed, self._count, self._error = 0, False, count, error
        self.threads: set[int] = set()

    def items(self) -> Generator[int]:
        try:
            for number in range(self._count):
                self.drawn = number + 1
                self.threads.add(threading.get_ident())
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def test_items_come_in_order_from_another_thread() -> None:
    watched = Watched(100)
    assert list(ahead(watched.items())) == list(range(100))
    assert watched.closed
    assert threading.get_ident() not in watched.threads


def test_no_more_is_drawn_than_a_little_ahead() -> None:
    watched = Watched(100)
    items = ahead(watched.items())
    for number in range(20):
        assert next(items) == number
        time.sleep(0.005)
        assert watched.drawn <= number + 4
    items.close()
    assert watched.closed
    assert watched.drawn < 30


def test_an_error_surfaces_in_its_place() -> None:
    items = ahead(Watched(5, OSError("disk")).items())
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="disk"):
        next(items)


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    items = ahead(Watched(100).items())
    next(items)
    del items
    behind(lambda item: None, range(10))
    assert threading.active_count() == before


def test_everything_is_done_in_order_behind() -> None:
    done: list[int] = []
    threads = set()

    def do(item: int) -> None:
        threads.add(threading.get_ident())
        done.append(item)

    behind(do, iter(range(100)))
    assert done == list(range(100))
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("fails_at", [0, 5, 99])
def test_what_fails_behind_stops_the_rest(fails_at: int) -> None:
    done: list[int] = []
    watched = Watched(100)

    def do(item: int) -> None:
        if item == fails_at:
            raise OSError("disk")
        done.append(item)

    with pytest.raises(OSError, match="disk"):
        behind(do, watched.items())
    assert done[:fails_at] == list(range(fails_at))
    assert watched.drawn <= fails_at + 4


def test_an_error_of_the_items_surfaces_after_what_was_drawn_is_done() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="bad"):
        behind(done.append, Watched(3, ValueError("bad")).items())
    assert done == sorted(done)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\n"
        "from simskip_vdb.overlap import ahead\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells ignore it behind &
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "def slow():\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"
        "        yield 1\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    for _ in ahead(slow()): pass\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
