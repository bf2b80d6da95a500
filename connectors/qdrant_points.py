"""What every Qdrant store shares, whatever engine answers: ids, metrics, addresses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any
from urllib.parse import quote
from uuid import UUID

import numpy as np

from simskip_vdb.datatypes import ID_TEXT, Ids, Metric
from simskip_vdb.durable import json_of
from simskip_vdb.errors import ConfigError, UnsupportedIndexError
from simskip_vdb.store import BESIDE

F32_ROUNDING, F16_ROUNDING = 1e-5, 2e-3
"""Relative L2 distance within which a vector is read back."""

_METRICS = {"cosine": Metric.COSINE, "dot": Metric.DOT, "euclid": Metric.EUCLID}
_ROUNDINGS = {"float32": F32_ROUNDING, "float16": F16_ROUNDING}


def to_ids(points: Iterable[int | str | UUID]) -> Ids:
    """Return point ids as row ids."""
    return np.array([str(point) for point in points], ID_TEXT)


def to_points(ids: Ids) -> list[int | str]:
    """Return row ids as point ids: numbers, or UUIDs as text."""
    return [int(i) if i.isdigit() else i.decode() for i in ids.tolist()]


def metric_of(distance: str, uri: str) -> Metric:
    """Return the metric of a vector's distance, whatever its capitals.

    Raises:
        UnsupportedIndexError: Refined vectors would not fit it.
    """
    found = _METRICS.get(distance.lower())
    if found is None:
        raise UnsupportedIndexError(
            f"{uri}: its distance, {distance}, is none that exact search and fitting go by; "
            "use Cosine, Dot or Euclid"
        )
    return found


def rounding_of(datatype: str | None, uri: str) -> float:
    """Return within what relative distance a vector of this datatype is read back.

    Raises:
        UnsupportedIndexError: The datatype cannot hold a refined vector.
    """
    name = (datatype or "float32").lower()
    if name not in _ROUNDINGS:
        raise UnsupportedIndexError(
            f"{uri}: its datatype, {name}, cannot hold refined vectors, which are fractions; "
            "copy the vectors to a collection with float32 or float16"
        )
    return _ROUNDINGS[name]


def choose_vector(names: Iterable[str], wanted: str | None, uri: str) -> str:
    """Return the vector that is meant: the one asked for, or the only one.

    Vectors that were put beside others here (``…@simskip``) are meant only where they are named.

    Raises:
        ConfigError: There is no such vector, or there are several and none was named.
    """
    known = sorted(names)
    own = [name for name in known if not name.endswith(BESIDE)]
    if wanted is None and len(own) == 1:
        return own[0]
    if wanted is None or wanted not in known:
        shown = ", ".join(name or '"" (unnamed)' for name in known) or "none"
        asked = "name one of its vectors" if wanted is None else f"it has no vector '{wanted}'"
        raise ConfigError(f"{uri}: {asked} with ?vector=NAME; it has {shown}")
    return wanted


def parse_filter(text: str | None) -> Mapping[str, Any] | None:
    """Return a filter: Qdrant's own as JSON, or ``FIELD=VALUE`` as a match on one field.

    Raises:
        ConfigError: It is neither.
    """
    if not text:
        return None
    if text.lstrip().startswith("{"):
        try:
            found: Mapping[str, Any] = json_of(text)
        except ValueError as error:
            raise ConfigError(f"--filter is not JSON: {error}; got {text}") from None
        return found
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ConfigError(f"--filter is a Qdrant filter in JSON, or FIELD=VALUE; got {text}")
    with suppress(ValueError):
        value = json_of(value)
    return {"must": [{"key": field, "match": {"value": value}}]}


def label_of(vector: str, filter_json: str | None) -> str:
    """Return a file name for a vector, and for a filter if there is one."""
    name = quote(vector, safe="")
    # Percent-encoded, a vector that is called like the unnamed one keeps apart from it.
    label = {"": "unnamed", "unnamed": "%75nnamed"}.get(name, name)
    return (
        label if filter_json is None else f"{label}-{sha256(filter_json.encode()).hexdigest()[:8]}"
    )


def filter_text(found: Mapping[str, Any] | None) -> str | None:
    """Return a filter as text that is the same for equal filters; None for None."""
    return None if found is None else json.dumps(found, sort_keys=True, separators=(",", ":"))


def about(note: Mapping[str, Any] | None, vector: str, text: str | None) -> dict[str, Any] | None:
    """Return a note that also says which rows it is about; None for None."""
    return None if note is None else {**note, "vector": vector, "filter": text}


def own_note(
    notes: Mapping[str, Mapping[str, Any]], vector: str, text: str | None, uri: str
) -> Mapping[str, Any] | None:
    """Return the note about these rows, as it was left, and see that no row has two.

    Args:
        notes: All notes by `label_of` their rows, each with what `about` added.
        vector: The vector that is meant.
        text: The filter that is meant, as `filter_text` has it.
        uri: The store's address.

    Raises:
        ConfigError: Rows that pass may have been refined under another filter already.
    """
    for note in notes.values():
        other = note.get("filter")
        if note.get("vector") == vector and other != text and not _disjoint(text, other):
            raise ConfigError(
                f"{uri}: rows of this vector were refined under {_shown(other)}, and may pass "
                f"{_shown(text)}, too; a row is never refined twice. Use that filter, or roll that "
                "refinement back first"
            )
    own = notes.get(label_of(vector, text))
    if own is None:
        return None
    return {name: value for name, value in own.items() if name not in ("vector", "filter")}


def _disjoint(one: str | None, other: str | None) -> bool:
    """Tell filters that surely share no row: matches of one field with different values."""
    keys = [_only_match(text) for text in (one, other)]
    return None not in keys and keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]  # type: ignore[index]


def _only_match(text: str | None) -> tuple[str, object] | None:
    found = {} if text is None else json_of(text)
    must = found.get("must")
    if set(found) != {"must"} or not isinstance(must, list) or len(must) != 1:
        return None
    match = must[0].get("match", {})
    if set(must[0]) != {"key", "match"} or set(match) != {"value"}:
        return None
    return must[0]["key"], match["value"]


def _shown(text: str | None) -> str:
    return "no filter" if text is None else f"the filter {text}"
