"""Read TOML, and tell on which line each of its keys stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simskip_vdb.errors import ConfigError, MissingDependencyError

Keys = tuple[str, ...]
"""The way to a table or a value, such as ``("jobs", "products", "refit")``."""
Lines = Mapping[Keys, int]
"""Line of each table and value, counted from 1."""


def read_toml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Read a file, and find the line on which each of its keys is first mentioned.

    Inside an array there are no keys; what a multi-line value holds has the line it begins on.

    Raises:
        ConfigError: There is no such file, or it is not TOML; the message begins with
            ``PATH:LINE:``.
        MissingDependencyError: Python is older than 3.11 and tomli is not installed.
    """
    text = _text(path)
    try:
        return _loads(text), dict(_lines(text))
    except ValueError as error:
        raise ConfigError(_located(path, text, error)) from None


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _lines(text: str) -> Iterator[tuple[Keys, int]]:
    """Yield each key with its line, last mention first, so that a dict keeps the first."""
    found: list[tuple[Keys, int]] = []
    lines = text.split("\n")
    table: Keys = ()
    start = 0
    while start < len(lines):
        statement, stop = _statement(lines, start)
        ways = list(_ways(statement))
        if lines[start].lstrip().startswith("["):
            table = ways[-1]
            found += ((way, start + 1) for way in ways)
        else:
            found += ((table + way, start + 1) for way in ways)
        start = stop
    return reversed(found)


def _statement(lines: list[str], start: int) -> tuple[dict[str, Any], int]:
    """Return the statement that begins on a line, and the line after it.

    A newline within one stands inside brackets or quotes that are still open, so the shortest run
    of lines that is TOML by itself is the statement.
    """
    for stop in range(start + 1, len(lines)):
        try:
            return _loads("\n".join(lines[start:stop]) + "\n"), stop
        except ValueError:
            continue
    return _loads("\n".join(lines[start:])), len(lines)


def _ways(tree: Mapping[str, Any]) -> Iterator[Keys]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *way) for way in _ways(value))


def _loads(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        try:
            import tomli as toml
        except ImportError as error:
            raise MissingDependencyError("tomli", "nightly") from error
    return toml.loads(text)


def _located(path: Path, text: str, error: ValueError) -> str:
    message = str(error)
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if place is None:
        return f"{path}: this is not TOML: {message}"
    line = place[1] or text.rstrip().count("\n") + 1
    return f"{path}:{line}: this is not TOML: {message[: place.start()]}"
