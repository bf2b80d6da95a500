"""Small JSON files that say of an index what it cannot carry itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.durable import disk_errors, has_file, json_of, make_durable, write_durably
from simskip_vdb.errors import StoreError


def read_note(file: Path) -> dict[str, Any] | None:
    """Return what a file says; None where there is none.

    Raises:
        StoreError: It cannot be read.
    """
    if not has_file(file):
        return None
    with disk_errors(file):
        text = file.read_bytes()
    try:
        return dict(json_of(text))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged: {error}; restore it from a backup") from None


def write_note(file: Path, note: Mapping[str, Any] | None) -> None:
    """Let a file say something, durably; None takes it away.

    Raises:
        StoreError: The file cannot be written.
    """
    if note is not None:
        write_durably(file, json.dumps(dict(note)).encode())
    elif file.exists():
        with disk_errors(file):
            file.unlink()
            make_durable(file.parent)
