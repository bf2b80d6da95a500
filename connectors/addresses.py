"""Addresses of stores, ``SCHEME:PLACE?NAME=VALUE&…``: how they are read and written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, quote, unquote

from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import ConfigError


def parse_address(uri: str, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Take an address apart.

    Args:
        uri: The address.
        known: Names that may stand behind the question mark.

    Returns:
        What stands between scheme and question mark, and the options.

    Raises:
        ConfigError: An option is unknown, is no ``NAME=VALUE`` or comes twice.
    """
    place, _, query = uri.partition(":")[2].partition("?")
    shown = uri.partition("?")[0]  # what stands behind may be a secret
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigError(f"{shown}: options after the question mark are NAME=VALUE") from None
    options = dict(pairs)
    unknown = sorted(set(options) - set(known))
    if unknown or len(options) < len(pairs):
        raise ConfigError(
            f"{shown}: {unknown or 'one option twice'} after the question mark; known: "
            f"{', '.join(known)}"
        )
    return unquote(place), options


def metric_of(address: str, name: str) -> Metric:
    """Return the metric that an address names.

    Args:
        address: Without its options, for messages.
        name: As it stands there.

    Raises:
        ConfigError: It is none.
    """
    try:
        return Metric(name)
    except ValueError as error:
        raise ConfigError(
            f"{address}: {error}; after the question mark, metric is cosine, dot or euclid"
        ) from None


def address_of(scheme: str, place: str, options: Mapping[str, str | None]) -> str:
    """Return the address that `parse_address` takes apart again.

    Args:
        scheme: What it begins with.
        place: For people to read, so only what would part the address is encoded.
        options: By name; those without a value are left out.
    """
    shown = re.sub("[%?]", lambda sign: quote(sign[0]), place)
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items() if value)
    return f"{scheme}:{shown}{'?' if query else ''}{query}"
