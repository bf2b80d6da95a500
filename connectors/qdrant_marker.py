"""A note of who refined which vector, in a collection's own metadata or in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.connectors.qdrant_calls import Calls
from simskip_vdb.durable import disk_errors, make_durable, write_durably
from simskip_vdb.errors import StoreError

_KEY = "simskip"
_FILE = "marker.json"


def write_metadata(
    calls: Calls, collection: str, label: str, note: Mapping[str, Any] | None
) -> None:
    """Leave a note for one vector in the collection's metadata; everything else in it stays."""
    there = read_metadata(calls, collection)
    notes = {name: dict(kept) for name, kept in there.items() if name != label}
    if note is not None:
        notes[label] = dict(note)
    # Keys are merged into what is there, and null takes one away.
    metadata = {_KEY: notes or None}
    calls("update_collection", collection_name=collection, metadata=metadata)


def read_file(folder: Path) -> Mapping[str, Any] | None:
    """Return the note in a folder; None where there is none.

    Raises:
        StoreError: It cannot be read.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        note: Mapping[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: the note cannot be read: {error}") from error
    return note


def write_file(folder: Path, note: Mapping[str, Any] | None) -> None:
    """Leave a note in a folder, durably."""
    path = folder / _FILE
    if note is not None:
        write_durably(path, json.dumps(dict(note)).encode())
    elif path.exists():
        with disk_errors(path):
            path.unlink()
            make_durable(folder)


def read_metadata(calls: Calls, collection: str) -> Mapping[str, Mapping[str, Any]]:
    """Return all notes in the collection's metadata, by label."""
    config = calls("get_collection", collection_name=collection).config
    return dict((config.metadata or {}).get(_KEY) or {})
