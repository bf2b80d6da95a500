"""Workers that die, or fail, where a test wants them to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simskip_vdb.crew import ReadDone, ReadJob, Worker, WriteJob
from simskip_vdb.errors import StoreError
from simskip_vdb.sending import Sent

OPERATIONS = ("replace", "link", "fsync", "unlink")
PLAN = "plan"
"""File in the state folder: a way to die or fail, and a list of numbers, by task and partition."""


class Mortal(Worker):
    """Works as told, but for what the plan says: ``kill`` once, ``always`` kill, or ``fail``."""

    def read(self, job: ReadJob) -> ReadDone:
        with_plan(self._folder, "read", job.number)
        return super().read(job)

    def write(self, job: WriteJob) -> Sent:
        with_plan(self._folder, "write", job.number)
        return super().write(job)


def plan(folder: Path, *lines: str) -> None:
    """Say what is to happen: ``METHOD NUMBER WAY OPERATION`` a line."""
    folder.mkdir(exist_ok=True)
    (folder / PLAN).write_text("\n".join(lines))


def with_plan(folder: Path, method: str, number: int) -> None:
    """Let happen to this process what the plan says of a task."""
    revive()
    for line in (folder / PLAN).read_text().splitlines():
        wanted, part, way, operation = line.split()
        if (wanted, int(part)) != (method, number):
            continue
        once = folder / f"{PLAN}-{method}-{number}"
        if way == "fail":
            raise StoreError("partition 3: the disk is on fire")
        if way == "always" or not once.exists():
            once.touch()
            die_at(int(operation))


_real = {name: getattr(os, name) for name in OPERATIONS}


def revive() -> None:
    """Let durable operations be harmless again."""
    for name, operation in _real.items():
        setattr(os, name, operation)


def die_at(number: int) -> None:
    """Kill this process before its next `number`-th durable operation."""
    seen = 0

    def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal seen
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return operation(*args, **kwargs)

        return wrapped

    for name, operation in _real.items():
        setattr(os, name, deadly(operation))
