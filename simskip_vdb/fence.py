"""Who may work on an index's partitions: workers of the run that holds its state, and no others.

A driver that is killed may leave workers behind that go on for a while, and a worker that counts as
lost may only be out of reach. So each works on a partition under that partition's lock, and only
while the token that it was sent out with is still the one in the state folder. Before a driver
undoes anything, and when the next run begins, another token is written and every lock waited for:
after that no earlier worker writes any more.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simskip_vdb.durable import write_durably
from simskip_vdb.errors import MissingDependencyError, StoppedError, TransientStoreError

CREW = "crew"
_TOKEN = "token"
_PATIENCE = 600.0  # seconds for a partition that is being written to be done


def send_out(folder: Path) -> str:
    """Let workers of this run in; return the token that they show."""
    token = uuid.uuid4().hex
    write_durably(folder / CREW / _TOKEN, token.encode())
    return token


def shut_out(folder: Path, patience: float = _PATIENCE) -> None:
    """Let no worker of any earlier run in, and wait for those that are at work.

    Args:
        folder: The state folder, whose lock is held.
        patience: Seconds to wait for each.

    Raises:
        TransientStoreError: One goes on for too long.
    """
    place = folder / CREW
    if not place.is_dir():
        return
    send_out(folder)
    for file in sorted(place.glob("*.lock")):
        with _lock(file, patience):
            pass
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def at_work(folder: Path, token: str, number: int) -> Iterator[None]:
    """Work on a partition, alone, while this run may.

    Raises:
        StoppedError: Another run has taken over.
        TransientStoreError: Another worker has this partition and does not let go of it.
    """
    place = folder / CREW
    with _lock(place / f"{number}.lock", _PATIENCE):
        try:
            current = (place / _TOKEN).read_text(encoding="utf-8")
        except OSError:
            current = ""
        if current != token:
            raise StoppedError(f"{folder}: another worker or run has taken over; this one stops")
        yield


@contextmanager
def _lock(file: Path, patience: float) -> Iterator[Any]:
    try:
        import filelock
    except ImportError:
        raise MissingDependencyError("filelock", "eval") from None
    try:
        with filelock.FileLock(file, timeout=patience) as held:
            yield held
    except filelock.Timeout:
        raise TransientStoreError(
            f"a worker that was left behind holds {file}, and goes on; stop its Ray job or "
            "cluster, then run the same command"
        ) from None
