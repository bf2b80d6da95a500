"""A note of who refined which vector, in a collection's own metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simskip_vdb.connectors.qdrant_calls import Calls

_KEY, CLAIM = "simskip", "simskip-claim"


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


def write_claim(calls: Calls, collection: str, note: Mapping[str, Any] | None) -> None:
    """Say in the collection's metadata who writes it; None that nobody does."""
    metadata = {CLAIM: None if note is None else dict(note)}
    calls("update_collection", collection_name=collection, metadata=metadata)


def read_claim(calls: Calls, collection: str) -> Mapping[str, Any] | None:
    """Return what `write_claim` left."""
    config = calls("get_collection", collection_name=collection).config
    claim = (config.metadata or {}).get(CLAIM)
    return dict(claim) if claim else None


def read_metadata(calls: Calls, collection: str) -> Mapping[str, Mapping[str, Any]]:
    """Return all notes in the collection's metadata, by label."""
    config = calls("get_collection", collection_name=collection).config
    return dict((config.metadata or {}).get(_KEY) or {})
