"""Checksums that Hadoop and Spark keep beside a file on a local disk, in ``.NAME.crc``.

They are compared whenever the file is read there, so they follow a file that is replaced. The
format is that of Hadoop's ChecksumFileSystem: ``crc`` and a zero byte, the number of bytes in a
chunk, and the CRC-32 of every chunk, all numbers big-endian and of 32 bits.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simskip_vdb.connectors.swap import leftovers, staged, take_mode_and_owner
from simskip_vdb.durable import disk_errors, has_file, make_durable

_MAGIC = b"crc\0"
_HEAD = struct.Struct(">4si")
_AT_ONCE = 1 << 22


@contextmanager
def checksum_follows(path: Path, temporary: Path) -> Iterator[None]:
    """Let the checksum beside `path`, where there is one, follow what the block puts in its place.

    At no instant does a checksum stand there that does not fit; for a moment there is none, which
    every reader takes. A kill in that moment is made good by `heal_checksum`.

    Args:
        path: The file that the block replaces.
        temporary: What it is replaced by.

    Raises:
        StoreError: The folder cannot be written.
    """
    beside = _beside(path)
    size = _chunk_size(beside)
    if size is None:
        yield
        return
    with staged(beside) as fresh, disk_errors(beside):
        _write(fresh, temporary, size)
        take_mode_and_owner(fresh, beside)
        mode = fresh.stat().st_mode
        beside.unlink()
        make_durable(beside.parent)
        try:
            yield
        except BaseException:
            _write(fresh, path, size)
            fresh.chmod(mode)
            os.replace(fresh, beside)
            raise
        os.replace(fresh, beside)


def heal_checksum(path: Path) -> None:
    """Give a file the checksum that a killed run left away, and remove what it left behind.

    Raises:
        StoreError: The folder cannot be written.
    """
    beside = _beside(path)
    with disk_errors(beside):
        for left in leftovers(beside):
            size = _chunk_size(left)
            if size is not None and not beside.exists():
                _write(left, path, size)
                os.replace(left, beside)
            left.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.crc")


def _chunk_size(file: Path) -> int | None:
    """Return how many bytes each checksum covers; None where this is no such file."""
    if not has_file(file):
        return None
    with disk_errors(file), open(file, "rb") as opened:
        head = opened.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, size = _HEAD.unpack(head)
    return int(size) if magic == _MAGIC and size > 0 else None


def _write(target: Path, source: Path, size: int) -> None:
    step = size * max(1, _AT_ONCE // size)
    with open(source, "rb") as read, open(target, "wb") as written:
        written.write(_HEAD.pack(_MAGIC, size))
        while block := read.read(step):
            view = memoryview(block)
            sums = [zlib.crc32(view[start : start + size]) for start in range(0, len(block), size)]
            written.write(struct.pack(f">{len(sums)}I", *sums))
    make_durable(target)
