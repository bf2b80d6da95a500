"""Who refined a store: what it says itself, or what the state in its usual place says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simskip_vdb.durable import disk_errors, has_file, json_of
from simskip_vdb.errors import JournalError
from simskip_vdb.store import Marked, VectorStore


def marker_of(store: VectorStore) -> Mapping[str, Any] | None:
    """Return the note of who refined a store; None where it holds originals.

    It has at least the id of the refiner, under ``refiner``.

    Raises:
        StoreError: This user may not look.
        JournalError: The state is damaged.
    """
    if isinstance(store, Marked):
        return store.marker()
    folder = store.info().state
    manifest = None if folder is None else folder / "manifest.json"
    if manifest is None or not has_file(manifest):
        return None
    try:
        with disk_errors(manifest):
            current: Mapping[str, Any] | None = json_of(manifest.read_bytes())["current"]
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"{manifest} cannot be read ({error}); restore the state folder from a backup"
        ) from error
    return current
