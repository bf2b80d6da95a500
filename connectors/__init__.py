"""Connectors: one module for each kind of store, loaded only when asked for."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.store import VectorStore

ENTRY_POINT_GROUP = "simskip_vdb.connectors"
"""Name = scheme; value = a class with ``open(uri, *, read_only)``."""


class _Connector(Protocol):
    def open(self, uri: str, *, read_only: bool) -> VectorStore: ...


class _BuiltIn(NamedTuple):
    module: str
    attribute: str
    extra: str


_BUILT_IN = {
    "faiss": _BuiltIn("simskip_vdb.connectors.faiss_store", "FaissStore", "faiss"),
}


def open_store(uri: str, *, read_only: bool = False) -> VectorStore:
    """Open the store at an address.

    Args:
        uri: ``SCHEME:REST``; a plain path means ``faiss:PATH``.
        read_only: Refuse every write through this handle.

    Raises:
        ConfigError: No connector serves the scheme.
        MissingDependencyError: The connector's package is not installed.
        StoreError: The store could not be opened.
    """
    scheme = _scheme(uri)
    connector = _built_in(scheme) if scheme in _BUILT_IN else _third_party(scheme)
    return connector.open(uri, read_only=read_only)


def _scheme(uri: str) -> str:
    match = re.match(r"([a-z][a-z0-9+.-]*):", uri)
    if match is None or Path(uri).exists():
        return "faiss"
    return match[1]


def _built_in(scheme: str) -> _Connector:
    module, attribute, extra = _BUILT_IN[scheme]
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
        known = ", ".join(sorted({*_BUILT_IN, *found}))
        raise ConfigError(
            f"no connector for '{scheme}:'; known: {known}. "
            f"A path that holds a colon is written with ./ in front"
        )
    return _load(found[scheme])


def _load(point: EntryPoint) -> _Connector:
    try:
        return cast(_Connector, point.load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the connector '{point.name}' ({point.value}): {error}") from error
