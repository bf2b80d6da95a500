"""Notes beside Parquet files that are parts of a refined folder: Parquet files without rows.

Polars takes whatever lies in a folder for one of its files, hidden or not, and refuses a folder
with others in it. To it, a file of the same columns and no rows holds nothing; other readers pass
over hidden files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simskip_vdb.connectors import part_notes
from simskip_vdb.connectors.notes import write_note
from simskip_vdb.connectors.parquet_manner import writer_like
from simskip_vdb.durable import beside, disk_errors, has_file, json_of, make_durable, write_durably
from simskip_vdb.errors import StoreError

_KEY = "simskip"


def note_file(path: Path) -> Path:
    """Return where the note on a part is."""
    return beside(path, ".simskip-part.parquet", hidden=True)


def part_note(path: Path) -> dict[str, Any] | None:
    """Return the note on a part, also as earlier versions left it; None where there is none.

    Raises:
        StoreError: It cannot be read.
    """
    file = note_file(path)
    if not has_file(file):
        return part_notes.part_note(path)
    try:
        note = dict(json_of(pq.read_metadata(file).metadata[_KEY.encode()]))
        if isinstance(note["index"], str):
            return note
        raise TypeError("it names no index")
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged: {error}; restore it from a backup") from None


def refuse_part(path: Path) -> None:
    """Refuse a file that is a part of a folder which was refined as a whole.

    Raises:
        ConfigError: It is.
    """
    part_notes.refuse(path, part_note(path), note_file(path))


def leave_note(path: Path, like: Any, vectors: Sequence[str], note: Mapping[str, Any]) -> None:  # noqa: ANN401 pyarrow
    """Leave a note beside a part, durably.

    Args:
        path: The part.
        like: The same, open.
        vectors: Names of its columns that hold vectors.
        note: Plain JSON values.

    Raises:
        StoreError: It cannot be written.
    """
    sink = BytesIO()
    with writer_like(like, sink, vectors) as writer:
        writer.write_table(like.schema_arrow.empty_table())
        writer.add_key_value_metadata({_KEY: json.dumps(dict(note))})
    write_durably(note_file(path), sink.getvalue())
    write_note(part_notes.note_file(path), None)


def remove_note(path: Path) -> None:
    """Take the note beside a part away, also one that an earlier version left.

    Raises:
        StoreError: It cannot be removed.
    """
    file = note_file(path)
    if has_file(file):
        with disk_errors(file):
            file.unlink()
            make_durable(file.parent)
    write_note(part_notes.note_file(path), None)
