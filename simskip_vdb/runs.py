"""What each run found and did, kept in the state: for reports, forecasts, and people."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from simskip_vdb.durable import json_of, write_durably
from simskip_vdb.errors import JournalError

SCHEMA = 1
FOLDER = "runs"
LAST = 5  # runs that a forecast goes by
VERSIONS = ("simskip-vdb", "numpy", "torch", "faiss-cpu", "qdrant-client", "qdrant-edge-py")


def record(action: str, outcome: str, index: str, **parts: Any) -> dict[str, Any]:  # noqa: ANN401
    """Describe a run as plain JSON values.

    Args:
        action: ``refine``, ``night`` or ``rollback``.
        outcome: ``written``, ``refused``, ``unchanged``, ``quiet``, ``kept`` (a challenger was
            refused, the current refiner stays), ``restored``, ``failed`` or ``stopped``.
        index: The index's URI.
        parts: report, detail, rows, drift, refit, live, seconds, command, notes.
    """
    return {
        "schema": SCHEMA,
        "time": time.time(),
        "action": action,
        "outcome": outcome,
        "index": index,
        "report": None,
        "detail": None,
        "rows": None,
        "drift": None,
        "refit": None,
        "live": None,
        "seconds": {},
        **parts,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": _versions(),
    }


class Runs:
    """The records in a state folder, numbered from 1: clocks may jump, numbers do not."""

    def __init__(self, state: Path) -> None:
        self._folder = state / FOLDER

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep a record."""
        numbers = [int(path.stem) for path in self._paths()]
        name = f"{max(numbers, default=0) + 1:06d}.json"
        write_durably(self._folder / name, json.dumps(found, ensure_ascii=False).encode())

    def read(self) -> list[dict[str, Any]]:
        """Return all records, oldest first.

        Raises:
            JournalError: A record is damaged, or a newer version wrote it.
        """
        return [_read(path) for path in self._paths()]

    def prune(self, keep: int) -> list[str]:
        """Remove all but the last `keep` records; return the names of those removed."""
        paths = self._paths()
        old = paths[: max(0, len(paths) - keep)]
        for path in old:
            path.unlink()
        return [f"{FOLDER}/{path.name}" for path in old]

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*.json") if path.stem.isdigit())


def forecast(
    runs: Sequence[Mapping[str, Any]], rows: int, stages: Sequence[str]
) -> dict[str, float] | None:
    """Tell how long stages will take, from the last runs that had them; None where none had.

    Reading and writing grow with the rows; a fit is taken to cost what it did.

    Args:
        runs: Records, oldest first.
        rows: Rows in the index now.
        stages: ``read``, ``fit``, ``evaluate``, ``write``.

    Returns:
        Seconds by stage.
    """
    found = {}
    for stage in stages:
        known = [
            run["seconds"][stage] * (1 if stage == "fit" else rows / run["rows"]["total"])
            for run in runs
            if stage in run["seconds"] and run["rows"] and run["rows"]["total"]
        ][-LAST:]
        if known:
            found[stage] = median(known)
    return found or None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json_of(path.read_bytes())
        if found["schema"] != SCHEMA:
            raise ValueError("a newer version wrote it; upgrade simskip-vdb")
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(
            f"{path} cannot be read ({error}); remove it: only the report's history lacks it then"
        ) from error
    return dict(found)


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return found
