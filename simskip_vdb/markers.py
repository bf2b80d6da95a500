"""Who refined a store: what it says itself, or what the state in its usual place says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simskip_vdb.store import Marked, VectorStore


def marker_of(store: VectorStore) -> Mapping[str, Any] | None:
    """Return the note of who refined a store; None where it holds originals.

    It has at least the id of the refiner, under ``refiner``.
    """
    if isinstance(store, Marked):
        return store.marker()
    folder = store.info().state
    manifest = None if folder is None else folder / "manifest.json"
    if manifest is None or not manifest.is_file():
        return None
    current: Mapping[str, Any] | None = json.loads(manifest.read_bytes()).get("current")
    return current
