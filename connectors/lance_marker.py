"""Notes of who refined and who writes a Lance table, in the metadata of its column of vectors."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from simskip_vdb.connectors.lance_table import Conflict, engine_call
from simskip_vdb.durable import json_of
from simskip_vdb.errors import ConfigError, StoreError

MARKER, CLAIM = "simskip", "simskip-claim"
_TRIES, _WAIT = 10, 0.05


def read_metadata(table: Any, column: str, key: str, uri: str) -> dict[str, Any] | None:  # noqa: ANN401 lancedb
    """Return what a column's metadata say under a key; None where they say nothing.

    Raises:
        StoreError: It is no JSON.
    """
    with engine_call(uri, "reading the table's metadata"):
        table.checkout_latest()
        text = (table.schema.field(column).metadata or {}).get(key.encode())
    if not text:
        return None
    try:
        return dict(json_of(text))
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{uri}: '{key}' in the metadata of the column '{column}' is damaged: {error}; take it "
            f"away with table.update_field_metadata({{'path': '{column}', 'metadata': "
            f"{{'{key}': None}}}})"
        ) from None


def write_metadata(
    table: Any,  # noqa: ANN401 lancedb
    column: str,
    key: str,
    note: Mapping[str, Any] | None,
    uri: str,
) -> None:
    """Let a column's metadata say something under a key; None takes it away. Other keys stay.

    Raises:
        TransientStoreError: Others wrote each time.
    """
    text = None if note is None else json.dumps(dict(note))
    for tries in range(_TRIES):
        try:
            with engine_call(uri, "writing the table's metadata"):
                table.checkout_latest()
                if text is None and key.encode() not in (table.schema.field(column).metadata or {}):
                    return
                table.update_field_metadata({"path": column, "metadata": {key: text}})
        except Conflict:
            if tries == _TRIES - 1:
                raise
            time.sleep(_WAIT * tries)
        else:
            return


def own_note(notes: Mapping[str, Any], text: str | None, uri: str) -> Mapping[str, Any] | None:
    """Return the note about rows that pass a filter, and see that no row has two.

    Args:
        notes: All notes by their filters, empty for none.
        text: The filter.
        uri: The store's address.

    Raises:
        ConfigError: Rows that pass may have been refined under another filter already.
    """
    others = sorted(notes.keys() - {text or ""})
    if others:
        shown = [f"the filter {each}" if each else "no filter" for each in (others[0], text)]
        raise ConfigError(
            f"{uri}: rows of this column were refined under {shown[0]}, and may pass {shown[1]}, "
            "too; a row is never refined twice. Use that filter, or roll that refinement back first"
        )
    own = notes.get(text or "")
    return None if own is None else dict(own)
