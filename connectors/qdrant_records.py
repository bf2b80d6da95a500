"""From Qdrant's records to rows: ids, vectors and payload columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client import models

from simskip_vdb.by_vector import unit
from simskip_vdb.connectors.qdrant_layout import Layout
from simskip_vdb.connectors.qdrant_points import to_ids
from simskip_vdb.datatypes import ID_TEXT, Cursor, Ids, Metric, Positions, VectorBatch, Vectors

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_batch(
    records: Sequence[models.Record],
    layout: Layout,
    fields: Sequence[str],
    *,
    fill: bool = False,
    cursor: Cursor | None = None,
) -> VectorBatch:
    """Return the records that have this vector as rows.

    Args:
        records: As the client returns them.
        layout: The vector.
        fields: Payload columns.
        fill: Keep records that have no such vector, with NaN in its place.
        cursor: The batch's cursor.
    """
    missing = [float("nan")] * layout.dim if fill else None
    vectors = [vector_of(record, layout.name) or missing for record in records]
    kept = [i for i, vector in enumerate(vectors) if vector is not None]
    payloads = [records[i].payload or {} for i in kept] if fields else []
    found = np.array([vectors[i] for i in kept], np.float32).reshape(-1, layout.dim)
    return VectorBatch(
        ids=to_ids(records[i].id for i in kept),
        vectors=as_compared(found, layout),
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


def as_compared(vectors: Vectors, layout: Layout) -> Vectors:
    """Return vectors as the engine compares them, shape (n, d), where it was given others.

    Under cosine it keeps directions only, and any vector that is written comes back with length 1.
    The client's local mode shows one as it was given, of whatever length, until the first search.
    """
    if layout.metric is not Metric.COSINE or not vectors.size:
        return vectors
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
        # A vector that the engine did normalise keeps its last digits.
        other = np.isfinite(lengths) & (np.abs(lengths - 1) > layout.rounding / 4)
    vectors[other] = unit(vectors[other])
    return vectors


def vector_of(record: models.Record, name: str) -> Any:  # noqa: ANN401 the client's unions
    """Return a record's vector, or several, as lists; None where it has none of that name."""
    vector = record.vector
    return vector.get(name) if isinstance(vector, dict) else vector
