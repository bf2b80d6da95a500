"""From an address to a Qdrant client, and from a client to where its state is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import platformdirs
from qdrant_client import QdrantClient

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.qdrant_calls import translated
from simskip_vdb.connectors.qdrant_pickles import refuse_code
from simskip_vdb.errors import ConfigError, StoreError, StoreNotFoundError

LOCAL = "qdrant-local"
_HTTP = {"qdrant": "http", "qdrant+https": "https"}
_PORT, _GRPC_PORT = 6333, 6334
_TIMEOUT = 120
_COMMON = ("vector", "batch_delay", "filter", "shard_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What an address leads to.

    Attributes:
        client: A client of the server or of the local folder.
        collection: Name of a collection, or an alias.
        vector: Name of the vector; None where none was given.
        batch_delay: Seconds to wait after every request that writes.
        shard_key: The shard key that requests carry, if any.
        filter: Which points are rows, as `parse_filter` takes it, if not all are.
    """

    client: QdrantClient
    collection: str
    vector: str | None
    batch_delay: float
    shard_key: str | None
    filter: str | None


def open_address(uri: str) -> Target:
    """Take an address apart and make its client; a server is asked nothing yet.

    Raises:
        ConfigError: The address makes no sense.
        StoreNotFoundError: The local folder does not exist.
        UnsupportedIndexError: Loading the local folder's points would run code.
        StoreError: The local folder cannot be opened, or is in use.
    """
    scheme = uri.partition(":")[0]
    if "@" in uri.partition("?")[0] and scheme != LOCAL:
        raise ConfigError(
            f"{scheme}: an address holds no user and no password; the API key comes from the "
            "environment variable QDRANT_API_KEY"
        )
    if scheme == LOCAL:
        place, options = parse_address(uri, ("collection", *_COMMON))
        collection = options.get("collection", "")
        where = f"{LOCAL}:PATH?collection=NAME"
    else:
        place, options = parse_address(uri, ("grpc", "grpc_port", *_COMMON))
        place, _, collection = place.removeprefix("//").rpartition("/")
        where = f"{scheme}://HOST:PORT/COLLECTION"
    if not place or not collection:
        raise ConfigError(f"{uri.partition('?')[0]}: write the address as {where}")
    return Target(
        client=_local(place) if scheme == LOCAL else _remote(scheme, place, options),
        collection=collection,
        vector=options.get("vector"),
        batch_delay=_number(options, "batch_delay", 0.0),
        shard_key=options.get("shard_key"),
        filter=options.get("filter"),
    )


def is_local(client: QdrantClient) -> bool:
    """Tell whether a client is its own engine, in memory or in a folder."""
    options = client.init_options
    return options["path"] is not None or options["location"] == ":memory:"


def uri_of(
    client: QdrantClient, collection: str, vector: str, filter_json: str | None = None
) -> str:
    """Return the address of a vector, without secrets."""
    options = client.init_options
    local = options["path"] is not None
    shown = {"collection": collection if local else "", "vector": vector, "filter": filter_json}
    if local:
        return address_of(LOCAL, options["path"], shown)
    if options["location"] == ":memory:":
        return address_of("qdrant", f":memory:/{collection}", shown)
    scheme, host = _endpoint(client)
    scheme = "qdrant+https" if scheme == "https" else "qdrant"
    return address_of(scheme, f"//{host}/{collection}", shown)


def state_of(client: QdrantClient, collection: str, label: str) -> Path | None:
    """Return the folder where the state of a vector is kept; None for a client in memory."""
    options = client.init_options
    name = quote(collection, safe="")
    if options["path"] is not None:
        return Path(f"{Path(options['path']).resolve()}.simskip") / name / label
    if options["location"] == ":memory:":
        return None
    _, host = _endpoint(client)
    return platformdirs.user_state_path("simskip-vdb") / quote(host, safe="") / name / label


def _endpoint(client: QdrantClient) -> tuple[str, str]:
    """Return (http or https, host with port and prefix)."""
    options = client.init_options
    given = options["url"] or options["location"] or options["host"] or "localhost"
    parts = urlsplit(given if "//" in given else f"//{given}")
    https = options["https"] or (options["https"] is None and options["api_key"] is not None)
    scheme = parts.scheme or ("https" if https else "http")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    prefix = (options["prefix"] or parts.path).strip("/")
    return scheme, f"{host}:{parts.port or options['port']}" + (f"/{prefix}" if prefix else "")


def _remote(scheme: str, place: str, options: Mapping[str, str]) -> QdrantClient:
    url = f"{_HTTP[scheme]}://{place}"
    try:
        port = urlsplit(url).port
        host = urlsplit(url).hostname
    except ValueError as error:
        raise ConfigError(f"{scheme}://{place}: {error}") from None
    if not host:
        raise ConfigError(f"{scheme}://{place}: the address names no host")
    grpc = options.get("grpc", "false").lower()
    if grpc not in ("true", "false"):
        raise ConfigError(f"{scheme}://{place}: grpc is true or false, not {grpc}")
    key = os.environ.get("QDRANT_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "QDRANT_API_KEY holds a sign that no key can have, such as a line break or an umlaut; "
            "copy the key once more"
        )
    return QdrantClient(
        url=url,
        port=port or _PORT,
        prefer_grpc=grpc == "true",
        grpc_port=int(_number(options, "grpc_port", _GRPC_PORT)),
        api_key=key,
        timeout=_TIMEOUT,
        check_compatibility=False,
    )


def _local(place: str) -> QdrantClient:
    if not (Path(place) / "meta.json").is_file():
        raise StoreNotFoundError(
            f"{LOCAL}:{place}: there is no folder of Qdrant's local mode (it holds a meta.json)"
        )
    refuse_code(Path(place), f"{LOCAL}:{place}")
    try:
        return QdrantClient(path=place)
    except RuntimeError as error:
        raise StoreError(
            f"{LOCAL}:{place}: another process, or another client in this one, has this folder "
            "open; close it there first"
        ) from error
    except Exception as error:
        raise translated(error, f"{LOCAL}:{place}: opening") from error


def _number(options: Mapping[str, str], name: str, default: float) -> float:
    try:
        number = float(options.get(name, default))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{name} is a number from 0 up, not {options[name]}")
    return number
