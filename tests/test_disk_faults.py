"""A disk that is full, fails once, or may not be written, at every operation of a run on it.

Whichever operation fails, the error is one of ours, the index opens and holds old or new rows, and
with room again the same command ends as a run that never failed, and `rollback` restores.
"""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import faiss
import pytest
from small_index import Index

from simskip_vdb.errors import ConfigError, SimskipError

OPERATIONS = ("replace", "link", "fsync", "unlink", "mkdir", "chmod", "open", "rmdir")


@contextmanager
def failing(  # noqa: C901 one small function for each way to a disk
    folder: Path, at: int, error: int, *, lasting: bool
) -> Iterator[list[str]]:
    """Let the operation of that number on files below a folder fail; yield the names of failures.

    Opening for writing and the first write count as operations; with `lasting`, so does every one
    that follows, except for taking names away, as on a disk that is full.
    """
    seen, failed = 0, []

    def due(name: str, place: object) -> bool:
        nonlocal seen
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        if not os.fspath(place).startswith(str(folder)):  # type: ignore[call-overload]
            return False
        mine, seen = seen, seen + 1
        still = lasting and (error == errno.EROFS or name not in ("unlink", "rmdir"))
        if mine == at or (mine > at and still):
            failed.append(name)
            return True
        return False

    def broken() -> OSError:
        return OSError(error, os.strerror(error))

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(place: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            writes = name != "open" or (args and args[0] & (os.O_WRONLY | os.O_RDWR))
            if writes and due(name, place):
                raise broken()
            return real(place, *args, **kwargs)

        return operation

    def opened(place: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not set(mode) & set("wax+"):
            return real_open(place, mode, *args, **kwargs)
        if due("open", place):
            raise broken()
        file: Any = real_open(place, mode, *args, **kwargs)
        if due("write", place):
            file.close()
            file = Full(broken)
        return file

    def write_index(index: object, place: str) -> None:
        if due("write_index", place):
            raise RuntimeError(f"could not write to {place}: {os.strerror(error)}")
        real_write(index, place)

    real_open, real_write = builtins.open, faiss.write_index
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        patch.setattr(builtins, "open", opened)
        patch.setattr(faiss, "write_index", write_index)
        yield failed


class Full:
    """A file to which nothing can be written."""

    def __init__(self, error: Callable[[], OSError]) -> None:
        self._error = error
        self.closed = False

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def write(self, data: object) -> int:
        raise self._error()

    def fileno(self) -> int:
        raise self._error()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return lambda *args: None


CASES = [
    *(("faiss", error, lasting) for error, lasting in [(errno.ENOSPC, True), (errno.EIO, False)]),
    ("faiss", errno.EROFS, True),
    ("edge", errno.ENOSPC, True),
    ("local", errno.ENOSPC, True),
    ("local", errno.EIO, False),
]


@pytest.mark.parametrize("command", ["refine", "rollback"])
@pytest.mark.parametrize(("kind", "error", "lasting"), CASES)
def test_a_disk_that_fails_at_any_operation(
    kind: str, error: int, lasting: bool, command: str, tmp_path: Path
) -> None:
    index = Index(kind, tmp_path)
    at = 0
    while True:
        index.renew()
        if command == "rollback":
            index.refine()
        with failing(index.now, at, error, lasting=lasting) as failed, suppress(SimskipError):
            getattr(index, command)()
        if not failed:
            break
        assert (index.is_old() | index.is_new()).all(), (at, failed)
        if at % 2:
            index.refine()
            assert index.is_new().all(), (at, failed)
        with suppress(ConfigError):  # nothing to roll back
            index.rollback()
        assert index.is_old().all(), (at, failed)
        at += 1
    assert at > 10
