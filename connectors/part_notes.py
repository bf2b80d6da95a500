"""Notes beside a file: that it is a part of an index which was refined as a whole.

Opened by itself after that, it would be taken for raw and refined twice; and so would a part that
was refined by itself before the others were.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.connectors.notes import read_note
from simskip_vdb.datatypes import StoreInfo
from simskip_vdb.durable import beside, disk_errors, has_file, json_of
from simskip_vdb.errors import ConfigError, StoreError
from simskip_vdb.state_place import POINTER


def part_note(path: Path) -> dict[str, Any] | None:
    """Return the note on a part; None where there is none.

    Raises:
        StoreError: It cannot be read.
    """
    note = read_note(note_file(path))
    if note is not None and not isinstance(note.get("index"), str):
        raise StoreError(f"{note_file(path)} names no index; restore it from a backup")
    return note


def refuse_part(path: Path) -> None:
    """Refuse a file that is a part of an index which was refined as a whole.

    Raises:
        ConfigError: It is.
    """
    refuse(path, part_note(path), note_file(path))


def refuse(path: Path, note: Mapping[str, Any] | None, file: Path) -> None:
    """Refuse a file on which there is a note, in another file.

    Raises:
        ConfigError: There is one.
    """
    if note is not None:
        index = note["index"]
        raise ConfigError(
            f"{path} was refined as a part of {index}; give that instead, or undo it first: "
            f"simskip rollback {shlex.quote(index)}. Only if another file took its place, remove "
            f"{file}"
        )


def refuse_refined(part: StoreInfo) -> None:
    """Refuse a part that was refined by itself.

    Raises:
        ConfigError: It was.
        StoreError: Its state cannot be read.
    """
    assert part.state is not None
    manifest = part.state / "manifest.json"
    refined = has_file(part.state / POINTER)
    if has_file(manifest):
        try:
            with disk_errors(manifest):
                held = json_of(manifest.read_bytes())
            refined |= any(held[name] is not None for name in ("current", "pending"))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{manifest} cannot be read ({error})") from error
    if refined:
        raise ConfigError(
            f"{part.uri} was refined by itself, so it is no raw part of another index; undo that "
            f"first: simskip rollback {shlex.quote(part.uri)}"
        )


def note_file(path: Path) -> Path:
    """Return where the note on a part is."""
    return beside(path, ".simskip-part", hidden=True)
