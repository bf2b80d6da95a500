"""A note of who refined which vector, in a collection's own metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simskip_vdb.connectors.qdrant_calls import Calls

_KEY = "simskip"


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


def read_metadata(calls: Calls, collection: str) -> Mapping[str, Mapping[str, Any]]:
    """Return all notes in the collection's metadata, by label."""
    config = calls("get_collection", collection_name=collection).config
    return dict((config.metadata or {}).get(_KEY) or {})
