"""A disk that is full, fails once, or may not be written, at every operation of a run on it.

Whichever operation fails, the error is one of ours, the index opens and holds old or new rows, and
with room again the same command ends as a run that never failed, and `rollback` restores.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from killing import Edge, Faiss, Kind, Local, moving

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.errors import ConfigError, SimskipError
from simskip_vdb.judgments import Judgments

OPERATIONS = ("replace", "link", "fsync", "unlink", "mkdir", "chmod", "open", "rmdir")


class Index:
    """A small index of a kind, with a refiner, and what it holds before and after."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self._first, self.now = kind, folder / "first", folder / "now"
        self._refiner = folder / "refiner"
        self._first.mkdir()
        kind.build(self._first)
        moving(kind).save(self._refiner)
        self.renew()
        self.old = self.rows()
        self.refine()
        self.new = self.rows()
        assert not self.is_old().any()

    def renew(self) -> None:
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self._first, self.now)

    def refine(self) -> None:
        settings = Settings(refiner=self._refiner, accept_unmeasured=True)
        self._open(lambda store: ss.refine(store, Judgments(), settings))

    def rollback(self) -> None:
        self._open(ss.rollback)

    def _open(self, command: Callable[[Any], object]) -> None:
        store = ss.open_store(self.kind.uri(self.now))
        try:
            command(store)
        finally:
            if hasattr(store, "close"):
                store.close()

    def rows(self) -> Any:  # noqa: ANN401 float32, shape (n, d)
        found = self.kind.read(self.now)
        np.testing.assert_array_equal(found.ids, self.kind.ids)
        return found.vectors

    def is_old(self) -> Any:  # noqa: ANN401 bool, shape (n,)
        return self._near(self.old)

    def is_new(self) -> Any:  # noqa: ANN401 bool, shape (n,)
        return self._near(self.new)

    def _near(self, rows: Any) -> Any:  # noqa: ANN401
        return np.abs(self.rows() - rows).max(axis=1) <= self.kind.tolerance


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


KINDS = {"faiss": (Faiss(), 700), "edge": (Edge(), 60), "local": (Local(), 20)}
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
    store, rows = KINDS[kind]
    store.rows, store.dim = rows, 8
    index = Index(store, tmp_path)
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
