"""Who refined which vector of a Qdrant Edge shard: a small file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.durable import disk_errors, make_durable, write_durably
from simskip_vdb.errors import StoreError


def read_note(file: Path, vector: str) -> Mapping[str, Any] | None:
    """Return the note on a vector; None where there is none.

    Raises:
        StoreError: The file cannot be read.
    """
    return _notes(file).get(vector)


def write_note(file: Path, vector: str, note: Mapping[str, Any] | None) -> None:
    """Leave a note on a vector, durably; None takes it away.

    Raises:
        StoreError: The file cannot be read or written.
    """
    notes = {**_notes(file), vector: note}
    kept = {name: dict(each) for name, each in notes.items() if each is not None}
    if kept:
        write_durably(file, json.dumps(kept).encode())
    elif file.exists():
        with disk_errors(file):
            file.unlink()
            make_durable(file.parent)


def _notes(file: Path) -> dict[str, Mapping[str, Any] | None]:
    if not file.exists():
        return {}
    with disk_errors(file):
        text = file.read_bytes()
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged: {error}; restore it from a backup") from None
