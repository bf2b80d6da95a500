"""What a file carries beside bytes, mode and owner: extended attributes, ACLs among them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import StoreError

_OF_THE_CONTENT = ("security.ima", "security.evm")
"""Signatures of the bytes in a file, which other bytes do not have."""
_NONE_HERE = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def take_attributes(temporary: Path, target: Path) -> None:
    """Give a staged file the extended attributes of the file that it will replace, and no others.

    ACLs and security labels are extended attributes on Linux. A staged file may have got others
    from its folder. Elsewhere, and where a file system has none, nothing happens.

    Raises:
        StoreError: This user may not set one of them.
    """
    if not hasattr(os, "listxattr"):
        return
    with disk_errors(target):
        wanted, found = _read(target), _read(temporary)
    for name in sorted(found.keys() - wanted.keys()):
        _change(target, name, os.removexattr, temporary, name)
    for name, value in sorted(wanted.items()):
        if found.get(name) != value:
            _change(target, name, os.setxattr, temporary, name, value)


def _read(path: Path) -> dict[str, bytes]:
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno in _NONE_HERE:
            return {}
        raise
    found = {}
    for name in names:
        if name not in _OF_THE_CONTENT:
            try:
                found[name] = os.getxattr(path, name)
            except OSError as error:
                if error.errno != errno.ENODATA:  # taken away meanwhile
                    raise
    return found


def _change(target: Path, name: str, call: Callable[..., None], *arguments: object) -> None:
    try:
        call(*arguments)
    except OSError as error:
        raise StoreError(
            f"{target}: the extended attribute '{name}' of a file written now cannot be made what "
            f"it is there ({error.strerror}); nothing was changed. Run as its owner, or remove it"
        ) from error
