"""Put a new file in the place of another: whole or not at all, whenever the process is killed."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from simskip_vdb.connectors.attributes import take_attributes
from simskip_vdb.durable import beside, disk_errors, make_durable, sha256_of
from simskip_vdb.errors import StoreChangedError, StoreError

NEW = "simskip-new"
"""Ends the names of files that are being written, before what tells them apart."""
_MARK = "00000000"


class Identity(NamedTuple):
    """Tells a file from the one that somebody wrote in its place, or into it."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> Identity:
        """Look at a file; raise OSError where there is none."""
        found = path.stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _staged(target: Path, mark: str) -> Path:
    return beside(target, f".{NEW}-{mark}", hidden=True)


def leftovers(target: Path) -> list[Path]:
    """Return the files that `staged` made beside a file for runs that were killed."""
    name = _staged(target, _MARK).name.removesuffix(f"-{_MARK}")
    return sorted(target.parent.glob(glob.escape(name) + "*"))


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Make a private, empty file beside `target`, of a name of its own, and leave none behind."""
    temporary = _staged(target, uuid.uuid4().hex[: len(_MARK)])
    with disk_errors(target):
        # Readable for nobody else until it has the target's mode.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(target: Path) -> None:
    """Remove what killed runs left beside a file; nobody else may be writing it.

    Raises:
        StoreError: The folder cannot be written.
    """
    with disk_errors(target):
        for leftover in leftovers(target):
            leftover.unlink()


def take_mode_and_owner(temporary: Path, target: Path) -> None:
    """Give the staged file mode, owner and extended attributes of the file that it will replace.

    Raises:
        StoreError: This user may not give files to that owner, or set such an attribute.
    """
    with disk_errors(target):
        wanted, found = target.stat(), temporary.stat()
        owner = (wanted.st_uid, wanted.st_gid)
        if owner != (found.st_uid, found.st_gid):
            try:
                os.chown(temporary, *owner)
            except PermissionError as error:
                raise StoreError(
                    f"{target}: it belongs to user {owner[0]}, group {owner[1]}, which a file "
                    "written now would not; nothing was changed. Run as its owner"
                ) from error
        temporary.chmod(stat.S_IMODE(wanted.st_mode))
    take_attributes(temporary, target)


def unchanged(path: Path, identity: Identity, expected: str | None = None) -> None:
    """Make sure that a file is still the one that was opened.

    Args:
        path: The file.
        identity: What it was when it was opened.
        expected: Its SHA-256.

    Raises:
        StoreChangedError: Somebody wrote to it since.
    """
    try:
        same = Identity.of(path) == identity
    except OSError:
        same = False
    if not same or (expected is not None and sha256_of(path) != expected):
        raise StoreChangedError(
            f"{path}: somebody else wrote to it since it was opened; it was left as it is. "
            "Run the command again"
        )


def keep_as(path: Path, keep: Path | None, expected: str) -> None:
    """Keep a file under a second name.

    A name left by a killed run is taken over if its bytes are the expected ones.

    Raises:
        StoreError: There is another file of that name, or it cannot be made.
    """
    if keep is None:
        return
    if not keep.exists():
        with disk_errors(keep):
            _link_or_copy(path, keep)
    elif sha256_of(keep) != expected:
        raise StoreError(f"{keep}: exists and holds something else; nothing was changed")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        with staged(target) as temporary:
            copy_durably(source, temporary)
            shutil.copystat(source, temporary)
            os.replace(temporary, target)
    make_durable(target.parent)


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and flush them to the disk."""
    shutil.copyfile(source, target)
    make_durable(target)


def swap_in(temporary: Path, path: Path) -> None:
    """Put the staged file in the place of `path`.

    Raises:
        StoreError: The system refused; the old file is still in place.
    """
    with disk_errors(path):
        os.replace(temporary, path)


def check_free(output: Path) -> None:
    """Make sure that nobody has a name.

    Raises:
        StoreError: Somebody has it.
    """
    if os.path.lexists(output):
        raise _taken(output)


def _taken(output: Path) -> StoreError:
    return StoreError(f"{output}: exists already; choose another name")


def appear(temporary: Path, output: Path, like: Path) -> None:
    """Give the staged file a name that nobody has, and the mode of the file that it is like.

    Raises:
        StoreError: Somebody has it.
    """
    with disk_errors(output):
        temporary.chmod(like.stat().st_mode & 0o777)
        try:
            os.link(temporary, output)
        except FileExistsError:
            raise _taken(output) from None
        except OSError:
            os.replace(temporary, output)
    confirm(output)


def confirm(path: Path) -> None:
    """Make a file's new name durable.

    Raises:
        StoreError: The disk failed; the name is there, but may not survive a power cut.
    """
    try:
        make_durable(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path}: the new file is in place, but the disk did not confirm it: "
            f"{error.strerror or error}. Check the disk"
        ) from error
