"""From the engine's records to arrays and columns, and search settings the other way."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import qdrant_edge as edge

from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import ConfigError

Records = Sequence[edge.Record]

_CODES = ("ignore", "rescore", "oversampling")
_SEARCH_PARAMS = ("hnsw_ef", "exact", "indexed_only", *_CODES)


def fill(into: Vectors, records: Records, name: str) -> None:
    """Write the vectors of that name into the first rows of an array; NaN where one has none."""
    if not records:
        return
    dim = into.shape[1]
    row = struct.Struct(f"{dim}f")
    memory = memoryview(into).cast("B")  # type: ignore[arg-type]  # an array is a buffer
    nothing = (np.nan,) * dim
    for at, record in enumerate(records):
        vector: Any = record.vector  # the unnamed one is a list, or an empty mapping
        if isinstance(vector, dict):
            vector = vector.get(name, nothing)
        row.pack_into(memory, at * row.size, *vector)


def json_path(field: str, uri: str) -> str:
    """Return a payload field as the engine takes it: ``a.b`` is the field b inside a.

    Raises:
        ConfigError: It is no field's name.
    """
    names = field.split(".")
    if not all(names) or '"' in field:
        raise ConfigError(
            f"{uri}: '{field}' is no payload field; write its name, or a.b for b inside a"
        )
    return ".".join(
        name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"' for name in names
    )


def value_at(payload: Mapping[str, Any] | None, field: str) -> Any:  # noqa: ANN401 any JSON value
    """Return the value of a payload field, ``a.b`` for b inside a; None where there is none."""
    found: Any = payload
    for name in field.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def search_params(params: Mapping[str, Any], uri: str) -> edge.SearchParams:
    """Return search-time settings as the engine takes them.

    Raises:
        ConfigError: It does not know one, or its value.
    """
    unknown = sorted(set(params) - set(_SEARCH_PARAMS))
    if unknown:
        raise ConfigError(
            f"{uri}: Qdrant Edge has no search parameter '{unknown[0]}'; it has "
            f"{', '.join(_SEARCH_PARAMS)}"
        )
    given = dict(params)
    given.update({name: bool(given[name]) for name in ("exact", "indexed_only") if name in given})
    codes = {name: given.pop(name) for name in _CODES if name in given}
    codes.update({name: bool(codes[name]) for name in ("ignore", "rescore") if name in codes})
    try:
        quantization = edge.QuantizationSearchParams(**codes) if codes else None
        return edge.SearchParams(**given, quantization=quantization)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{uri}: search parameters {dict(params)}: {error}") from None
