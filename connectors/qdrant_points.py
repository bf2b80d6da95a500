"""What every Qdrant store shares, whatever engine answers: ids, metrics, addresses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote
from uuid import UUID

import numpy as np

from simskip_vdb.datatypes import ID_TEXT, Ids, Metric
from simskip_vdb.errors import ConfigError, UnsupportedIndexError

BESIDE = "@simskip"
"""How the name of a vector ends that was put beside another."""
F32_ROUNDING, F16_ROUNDING = 1e-5, 2e-3
"""Relative L2 distance within which a vector is read back."""

_METRICS = {"cosine": Metric.COSINE, "dot": Metric.DOT, "euclid": Metric.EUCLID}
_ROUNDINGS = {"float32": F32_ROUNDING, "float16": F16_ROUNDING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A URI taken apart.

    Attributes:
        place: What stands between the scheme and the question mark.
        vector: Name of the vector; empty for the unnamed one, None where none was given.
        options: Everything else after the question mark.
    """

    place: str
    vector: str | None
    options: Mapping[str, str]


def parse_address(uri: str, known: Iterable[str] = ()) -> Address:
    """Take ``SCHEME:PLACE?vector=NAME&…`` apart.

    Args:
        uri: The address.
        known: Options besides ``vector``.

    Raises:
        ConfigError: An option is unknown, has no value or comes twice.
    """
    place, _, query = uri.partition(":")[2].partition("?")
    shown = uri.partition("?")[0]  # what stands behind may be a secret
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigError(f"{shown}: options after the question mark are NAME=VALUE") from None
    options = dict(pairs)
    unknown = set(options) - {"vector", *known}
    if unknown or len(options) < len(pairs):
        wrong = sorted(unknown) or "one option twice"
        raise ConfigError(
            f"{shown}: {wrong} after the question mark; known: {', '.join(('vector', *known))}"
        )
    return Address(place=unquote(place), vector=options.pop("vector", None), options=options)


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
            found: Mapping[str, Any] = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--filter is not JSON: {error}; got {text}") from None
        return found
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ConfigError(f"--filter is a Qdrant filter in JSON, or FIELD=VALUE; got {text}")
    with suppress(ValueError):
        value = json.loads(value)
    return {"must": [{"key": field, "match": {"value": value}}]}
