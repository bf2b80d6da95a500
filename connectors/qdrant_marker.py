"""A note of who refined which vector, in a collection's own metadata or in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from qdrant_client import QdrantClient, models

from simskip_vdb.connectors.notes import read_note, write_note
from simskip_vdb.connectors.qdrant_calls import Calls
from simskip_vdb.durable import json_of
from simskip_vdb.errors import ConfigError

_KEY, CLAIM = "simskip", "simskip-claim"
_FILE, _META = "simskip.json", "meta.json"


def write_metadata(
    calls: Calls, collection: str, label: str, note: Mapping[str, Any] | None
) -> None:
    """Leave a note for one vector in the collection's metadata; everything else in it stays.

    Of a folder of local mode, it is a file beside the points: the client writes all metadata anew
    in its own version's terms, and an older one could not read them any more.
    """
    file = _note_file(calls.client, collection)
    if file is not None:
        held = {name: kept for name, kept in (read_note(file) or {}).items() if name != label}
        write_note(file, (held if note is None else {**held, label: dict(note)}) or None)
        if label not in _in_metadata(calls, collection):  # as earlier versions left it
            return
        note = None
    there = _in_metadata(calls, collection)
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
    """Return all notes about the collection, by label."""
    file = _note_file(calls.client, collection)
    beside = {} if file is None else read_note(file) or {}
    return {**_in_metadata(calls, collection), **beside}


def refuse_older(calls: Calls) -> None:
    """Refuse to have a client write down a folder's collections where an older one wrote them.

    Raises:
        ConfigError: That one could not read the folder any more.
    """
    path = calls.client.init_options["path"]
    if path is None:
        return
    written = json_of((Path(path) / _META).read_text(encoding="utf-8"))["collections"]
    for name, config in written.items():
        try:
            known = models.CreateCollection(**config).model_dump(mode="json")
        except ValidationError:
            continue
        if known.keys() - config.keys():
            raise ConfigError(
                f"{calls.uri}: the folder's collection '{name}' was written by an older "
                f"qdrant-client than the one here, {version('qdrant-client')}, and could not be "
                "read by that one any more; write in place, or first upgrade the application's "
                "qdrant-client and let it write the folder's collections (update_collection)"
            )


def _note_file(client: QdrantClient, collection: str) -> Path | None:
    path = client.init_options["path"]
    return None if path is None else Path(path) / "collection" / collection / _FILE


def _in_metadata(calls: Calls, collection: str) -> Mapping[str, Mapping[str, Any]]:
    config = calls("get_collection", collection_name=collection).config
    return dict((config.metadata or {}).get(_KEY) or {})
