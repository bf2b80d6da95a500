"""From Qdrant's records to rows: ids, vectors and payload columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client import models

from simskip_vdb.connectors.qdrant_points import to_ids
from simskip_vdb.datatypes import ID_TEXT, Cursor, Ids, Positions, VectorBatch, Vectors

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_batch(
    records: Sequence[models.Record],
    name: str,
    dim: int,
    fields: Sequence[str],
    *,
    fill: bool = False,
    cursor: Cursor | None = None,
) -> VectorBatch:
    """Return the records that have this vector as rows.

    Args:
        records: As the client returns them.
        name: The vector's name; empty for the unnamed one.
        dim: Its dimension.
        fields: Payload columns.
        fill: Keep records that have no such vector, with NaN in its place.
        cursor: The batch's cursor.
    """
    missing = [float("nan")] * dim if fill else None
    vectors = [vector_of(record, name) or missing for record in records]
    kept = [i for i, vector in enumerate(vectors) if vector is not None]
    payloads = [records[i].payload or {} for i in kept] if fields else []
    return VectorBatch(
        ids=to_ids(records[i].id for i in kept),
        vectors=np.array([vectors[i] for i in kept], np.float32).reshape(-1, dim),
        fields={field: [value_at(payload, field) for payload in payloads] for field in fields},
        cursor=cursor,
    )


def value_at(payload: Mapping[str, Any], field: str) -> Any:  # noqa: ANN401 any JSON value
    """Return what a payload holds under a dotted path; None where there is nothing."""
    if field in payload:
        return payload[field]
    found: Any = payload
    for key in field.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def json_path(field: str) -> str:
    """Return a dotted path as Qdrant takes it, with quotes around keys that need them."""
    if '"' in field:
        return field
    keys = field.split(".")
    return ".".join(key if _PLAIN_KEY.fullmatch(key) else f'"{key}"' for key in keys)


def find_ids(ids: Ids, wanted: Ids) -> Positions:
    """Return where each wanted id stands among unique ids, shape (len(wanted),); -1 if nowhere."""
    if not len(ids):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(ids, kind="stable")
    place = np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)
    found: Positions = np.where(ids[order[place]] == wanted, order[place], -1)
    return found


def take_rows(batch: VectorBatch, positions: Positions) -> VectorBatch:
    """Return the rows at these positions, without a cursor."""
    return VectorBatch(
        ids=batch.ids[positions],
        vectors=batch.vectors[positions],
        fields={name: [column[i] for i in positions] for name, column in batch.fields.items()},
    )


def scan_keys(ids: Ids) -> NDArray[Any]:
    """Return keys that sort as Qdrant scrolls: numbers first, then UUIDs; shape (len(ids),)."""
    text = ids.astype(ID_TEXT)
    numbers = np.char.isdigit(text)
    padded = np.char.zfill(text, ID_TEXT.itemsize)
    return np.where(numbers, np.char.add(b"0", padded), np.char.add(b"1", text))


def rows_hold(now: Vectors, wanted: Vectors, rounding: float, *, unit: bool) -> NDArray[np.bool_]:
    """Tell which rows hold the wanted vectors within rounding, shape (n,).

    Args:
        now: What was read, shape (n, d).
        wanted: What was written, shape (n, d).
        rounding: Relative L2 distance that is allowed.
        unit: Compare directions only, as the store normalises.
    """
    left, right = now.astype(np.float64), wanted.astype(np.float64)
    if unit:
        left, right = _unit(left), _unit(right)
    scale = np.linalg.norm(right, axis=1)
    held: NDArray[np.bool_] = np.linalg.norm(left - right, axis=1) <= rounding * scale
    return held


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(norms > 0, norms, 1)
    return unit


def vector_of(record: models.Record, name: str) -> Any:  # noqa: ANN401 the client's unions
    """Return a record's vector, or several, as lists; None where it has none of that name."""
    vector = record.vector
    return vector.get(name) if isinstance(vector, dict) else vector
