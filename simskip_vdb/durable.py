"""Files of ours: names that fit, reads with clear errors, writes that survive a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from simskip_vdb.errors import StoreError

LONGEST_NAME = 255
"""Bytes."""


def sha256_of(path: Path) -> str:
    """Hash a file's bytes, 64 hex digits.

    Raises:
        StoreError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with disk_errors(path), open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Replace a small file so that a kill leaves the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_private(temporary) if private else open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        make_durable(path.parent)


def open_private(path: Path) -> IO[bytes]:
    """Open a new file for what not everybody may read who can enter its folder.

    The group may where the folder is one that it may write: who writes there must read there.
    """
    shared = bool(path.parent.stat().st_mode & stat.S_IWGRP)
    path.unlink(missing_ok=True)  # as it was made, its mode would stay
    file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    if shared:
        path.chmod(0o660)
    return file


def make_durable(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path, ending: str, *, hidden: bool = False) -> Path:
    """Return the path of what is ours beside a file or folder, named after it.

    A name that would be too long for that is shortened; a hidden file's leaves room for ``.tmp``.
    """
    dot, room = ("." if hidden else ""), LONGEST_NAME - (len(".tmp") if hidden else 0)
    name = os.fsencode(path.name)
    over = len(os.fsencode(dot + ending)) + len(name) - room
    if over <= 0:
        return path.with_name(f"{dot}{path.name}{ending}")
    mark = f"…{hashlib.sha256(name).hexdigest()[:12]}"
    start = name[: -over - len(mark.encode())].decode(errors="ignore")
    return path.with_name(f"{dot}{start}{mark}{ending}")


def has_file(path: Path) -> bool:
    """Tell whether a file is there; none is where its name would be too long.

    Raises:
        StoreError: This user may not look there.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # not Path.is_file: it may hide an error
    except OSError as error:
        _check_absent(path, error)
        return False


def names_in(folder: Path) -> list[str]:
    """Return the names of what is in a folder; none where there is no folder.

    Raises:
        StoreError: This user may not look there.
    """
    try:
        return os.listdir(folder)
    except OSError as error:
        _check_absent(folder, error)
        return []


def _check_absent(path: Path, error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        raise StoreError(
            f"{path}: {error.strerror}; run as the user who may read it, such as the one who "
            "refined the index, or have that one allow it"
        ) from None


def json_of(data: bytes | str) -> Any:  # noqa: ANN401 whatever it holds
    """Read JSON.

    Raises:
        ValueError: It is none, or nested without end.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def free_bytes(folder: Path) -> int:
    """Return the free disk space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror or error}; it is as it was. "
            "Free space or allow writing in its folder, then run the same command"
        ) from error


class HashingFile:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:  # noqa: ANN401 any buffer
        """Write and hash."""
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()
