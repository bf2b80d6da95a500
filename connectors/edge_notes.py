"""Who refined which vector of a Qdrant Edge shard: a small file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.durable import disk_errors, make_durable, write_durably
from simskip_vdb.errors import StoreError


def write_note(file: Path, label: str, note: Mapping[str, Any] | None) -> None:
    """Leave a note under a label, durably; None takes it away.

    Raises:
        StoreError: The file cannot be read or written.
    """
    notes = {**read_notes(file), label: note}
    kept = {name: dict(each) for name, each in notes.items() if each is not None}
    if kept:
        write_durably(file, json.dumps(kept).encode())
    elif file.exists():
        with disk_errors(file):
            file.unlink()
            make_durable(file.parent)


def read_notes(file: Path) -> dict[str, Mapping[str, Any]]:
    """Return all notes, by label.

    Raises:
        StoreError: The file cannot be read.
    """
    if not file.exists():
        return {}
    with disk_errors(file):
        text = file.read_bytes()
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged: {error}; restore it from a backup") from None
