"""Files that survive a kill: written whole, fsynced, renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from simskip_vdb.errors import StoreError


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


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Replace a small file so that a kill leaves the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        make_durable(path.parent)


def make_durable(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
