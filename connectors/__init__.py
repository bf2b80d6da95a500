"""Connectors: one module for each kind of store, loaded only when asked for."""

from __future__ import annotations

import os
import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from typing import NamedTuple, Protocol, cast
from urllib.parse import unquote

from simskip_vdb.connectors.addresses import address_of
from simskip_vdb.connectors.folders import is_simple_store
from simskip_vdb.connectors.originals import ArrayRows, read_ids, read_vectors
from simskip_vdb.connectors.rows import RowOrder
from simskip_vdb.durable import LONGEST_NAME
from simskip_vdb.errors import ConfigError, MissingDependencyError, StoreNotFoundError
from simskip_vdb.store import VectorStore, abilities

ENTRY_POINT_GROUP = "simskip_vdb.connectors"
"""Name = scheme; value = a class with ``open(uri, *, read_only)``, and where rows have payload
``filter`` and ``guard_field``."""


class _Connector(Protocol):
    def open(self, uri: str, *, read_only: bool, **payload: str) -> VectorStore: ...


class _BuiltIn(NamedTuple):
    module: str
    attribute: str
    extra: str


_BUILT_IN = {
    "faiss": _BuiltIn("simskip_vdb.connectors.faiss_store", "FaissStore", "faiss"),
    "parquet": _BuiltIn("simskip_vdb.connectors.parquet_store", "ParquetStore", "eval"),
    **dict.fromkeys(
        ("npy", "npz", "safetensors"),
        _BuiltIn("simskip_vdb.connectors.array_store", "ArrayFile", "eval"),
    ),
    "llama-index": _BuiltIn("simskip_vdb.connectors.json_store", "SimpleStoreFile", "eval"),
    **dict.fromkeys(
        ("postgresql", "postgres"),
        _BuiltIn("simskip_vdb.connectors.postgres_store", "PostgresStore", "postgres"),
    ),
    **dict.fromkeys(
        ("chroma", "chroma+http"),
        _BuiltIn("simskip_vdb.connectors.chroma_store", "ChromaStore", "chroma"),
    ),
    "sqlite-vec": _BuiltIn("simskip_vdb.connectors.sqlite_store", "SqliteStore", "sqlite-vec"),
    "lancedb": _BuiltIn("simskip_vdb.connectors.lance_store", "LanceStore", "lancedb"),
    "qdrant-edge": _BuiltIn("simskip_vdb.connectors.edge_store", "EdgeStore", "edge"),
    **dict.fromkeys(
        ("qdrant", "qdrant+https", "qdrant-local"),
        _BuiltIn("simskip_vdb.connectors.qdrant_store", "QdrantStore", "qdrant"),
    ),
}

_BY_SUFFIX = {
    ".parquet": "parquet",
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
}
"""Schemes of plain paths that end so; any other is FAISS's, but for LlamaIndex's own store."""

_FAISS_PARTS = _BuiltIn("simskip_vdb.connectors.faiss_parts", "FaissParts", "faiss")


def open_store(
    uri: str,
    *,
    read_only: bool = False,
    originals: str | Path | None = None,
    originals_ids: Path | None = None,
    filter: str | None = None,  # noqa: A002 Qdrant's name for it
    guard_field: str | None = None,
) -> VectorStore:
    """Open the store at an address.

    Args:
        uri: ``SCHEME:REST``; a plain path means ``faiss:PATH``, but where it ends in ``.parquet``,
            ``.npy``, ``.npz`` or ``.safetensors`` or is a store of LlamaIndex's own, and one with
            ``*``, ``?`` or ``[…]`` several FAISS files that are one index.
        read_only: Refuse every write through this handle.
        originals: Where a store holds lossy codes, the exact vectors behind them: a ``.npy`` file
            in the order of its rows, or another store that has the same ids.
        originals_ids: A file with the id of each vector in the ``.npy`` file, one a line.
        filter: Which rows of a collection are meant: ``FIELD=VALUE``, or Qdrant's filter as JSON;
            of a LanceDB table, SQL.
        guard_field: Payload field that the application changes on each of its writes.

    Raises:
        ConfigError: No connector serves the scheme, or the store takes no originals.
        MissingDependencyError: The connector's package is not installed.
        StoreError: The store could not be opened.
    """
    scheme, uri = scheme_of(uri), full_address(uri)
    _check_place(uri, scheme)
    if scheme == "faiss" and _names_parts(uri):
        connector = _built_in(_FAISS_PARTS)
    else:
        connector = _built_in(_BUILT_IN[scheme]) if scheme in _BUILT_IN else _third_party(scheme)
    given = {"filter": filter, "guard_field": guard_field}
    payload = {name: value for name, value in given.items() if value is not None}
    unknown = set(payload) - set(signature(connector.open).parameters)
    if unknown:
        option = "--" + sorted(unknown)[0].replace("_", "-")
        raise ConfigError(f"{uri}: rows have no payload; leave {option} out")
    store = connector.open(uri, read_only=read_only, **payload)
    if originals is not None:
        _give_originals(store, str(originals), originals_ids)
    elif originals_ids is not None:
        raise ConfigError("--originals-ids belongs to --originals FILE.npy")
    return store


def _check_place(uri: str, scheme: str) -> None:
    place = unquote(uri.removeprefix(f"{scheme}:").partition("?")[0])
    if not place.strip():
        raise ConfigError(
            f"the address of the index is empty ({uri!r}); name the index, or . for the one in "
            "this folder"
        )
    if "\0" in place:
        raise ConfigError(f"{place!r} is no address: it holds the byte 0")
    longest = max(place.split("/"), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > LONGEST_NAME:
        raise StoreNotFoundError(f"{longest[:40]}…: no file has a name of so many characters")


def scheme_of(uri: str, base: Path | None = None) -> str:
    """Return the scheme of an address; a plain path, relative to `base`, has one by its suffix."""
    match = re.match(r"([a-z][a-z0-9+.-]*):", uri)
    if match is None or os.path.exists(Path(base or "", uri)):
        path = Path(_plain_path(uri, base))
        if is_simple_store(Path(base or "", path)):
            return "llama-index"
        return _BY_SUFFIX.get(path.suffix.lower(), "faiss")
    return match[1]


def full_address(uri: str, base: Path | None = None) -> str:
    """Return an address with its scheme, where it is a plain path that is not FAISS's."""
    scheme = scheme_of(uri, base)
    plain = not uri.startswith(f"{scheme}:") or os.path.exists(Path(base or "", uri))
    if scheme == "faiss" or not plain:
        return uri
    path = _plain_path(uri, base)
    return address_of(scheme, path, {}) + uri[len(path) :]


def _plain_path(uri: str, base: Path | None) -> str:
    """Return the path in an address without a scheme, which may have options behind it."""
    place, mark, _ = uri.partition("?")
    return place if mark and not os.path.exists(Path(base or "", uri)) else uri


def known_schemes() -> tuple[str, ...]:
    """Return the schemes that a connector serves, in alphabetical order."""
    found = (point.name for point in entry_points(group=ENTRY_POINT_GROUP))
    return tuple(sorted({*_BUILT_IN, *found}))


def _give_originals(store: VectorStore, originals: str, ids: Path | None) -> None:
    uri = store.info().uri
    told = abilities(store).originals
    if told is None:
        raise ConfigError(f"{uri} holds its vectors itself; leave --originals out")
    if not originals.endswith(".npy"):
        if ids is not None:
            raise ConfigError(f"--originals-ids belongs to a .npy file, and {originals} has ids")
        told.take_originals(open_store(originals, read_only=True))
        return
    vectors = read_vectors(Path(originals))
    rows = None if ids is None else RowOrder(read_ids(ids), str(ids))
    told.take_originals(vectors if rows is None else ArrayRows(rows, vectors, originals))


def _names_parts(uri: str) -> bool:
    path = Path(uri.removeprefix("faiss:"))
    return bool(re.search(r"[*?\[]", path.name)) and not path.exists()


def _built_in(connector: _BuiltIn) -> _Connector:
    module, attribute, extra = connector
    try:
        return cast(_Connector, getattr(import_module(module), attribute))
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing == "simskip_vdb":
            raise
        raise MissingDependencyError(missing, extra) from error


def _third_party(scheme: str) -> _Connector:
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if scheme not in found:
        raise ConfigError(
            f"no connector for '{scheme}:'; known: {', '.join(known_schemes())}. "
            f"A path that holds a colon is written with ./ in front"
        )
    return _load(found[scheme])


def _load(point: EntryPoint) -> _Connector:
    try:
        return cast(_Connector, point.load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the connector '{point.name}' ({point.value}): {error}") from error
