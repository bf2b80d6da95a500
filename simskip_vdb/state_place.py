"""Where the state of an index is, and who refined it: in the usual place, or where word points."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from simskip_vdb.durable import disk_errors, has_file, json_of, write_durably
from simskip_vdb.errors import ConfigError, JournalError
from simskip_vdb.store import VectorStore, abilities

POINTER = "state-is-elsewhere"
DIGITS = "digits"
"""Folder in the usual place where stores keep what float32 does not hold of originals."""


def state_folder(store: VectorStore, override: Path | None) -> Path:
    """Return where an index's state lives: in its usual place, unless told otherwise.

    A state that was put elsewhere is found again by the pointer that `point_elsewhere` left.

    Raises:
        ConfigError: The index has no usual place and no folder was given, or its state is already
            in another folder.
        JournalError: The state was put elsewhere, and is gone from there.
    """
    usual = store.info().state
    if usual is None:
        if override is None:
            raise ConfigError(
                f"{store.info().uri} has no usual place for its state; name a folder by --state"
            )
        return override.resolve()
    pointer = usual / POINTER
    moved = override is not None and has_file(override / "manifest.json")
    known = _pointed(pointer) if has_file(pointer) else usual
    if has_file(pointer) and not has_file(known / "manifest.json") and not moved:
        raise JournalError(
            f"the state of {store.info().uri} was put in {known}, and is gone from there; bring it "
            f"back, mount its disk, or name the folder where it is now by --state. Only "
            f"if that index was replaced by another one, remove {pointer}"
        )
    if override is None:
        return known
    if has_file(known / "manifest.json") and override.resolve() != known.resolve():
        raise ConfigError(
            f"{store.info().uri} has its state in {known}, with its originals and the looks at its "
            "test queries; leave --state out, or move that folder"
        )
    return override.resolve()


def _pointed(pointer: Path) -> Path:
    with disk_errors(pointer):
        name = pointer.read_bytes()
    if not name or b"\0" in name:
        raise JournalError(
            f"{pointer} is damaged; write the folder of the state into it, or restore it from a "
            "backup"
        )
    return Path(os.fsdecode(name))


def point_elsewhere(store: VectorStore, folder: Path) -> None:
    """Leave word beside an index that its state is in another folder."""
    usual = store.info().state
    if usual is not None and folder != usual:
        write_durably(usual / POINTER, os.fsencode(folder))


def forget_elsewhere(usual: Path | None) -> None:
    """Take back what `point_elsewhere` left in the usual place of a state."""
    if usual is None:
        return
    pointer = usual / POINTER
    if has_file(pointer):
        with disk_errors(pointer):
            pointer.unlink()
    with suppress(OSError):  # not there, or not empty
        pointer.parent.rmdir()


def marker_of(store: VectorStore) -> Mapping[str, Any] | None:
    """Return the note of who refined a store; None where it holds originals.

    It has at least the id of the refiner, under ``refiner``.

    Raises:
        StoreError: This user may not look.
        JournalError: The state is damaged, or gone from where it was put.
    """
    marked = abilities(store).marker
    if marked is not None:
        return marked.marker()
    if store.info().state is None:
        return None
    manifest = state_folder(store, None) / "manifest.json"
    if not has_file(manifest):
        return None
    try:
        with disk_errors(manifest):
            current: Mapping[str, Any] | None = json_of(manifest.read_bytes())["current"]
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"{manifest} cannot be read ({error}); restore the state folder from a backup"
        ) from error
    return current
