"""What the numbers were measured with."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PACKAGES = (
    "simskip-vdb",
    "numpy",
    "torch",
    "faiss-cpu",
    "scipy",
    "ir-measures",
    "pyarrow",
    "qdrant-client",
    "qdrant-edge-py",
    "nudge-ft",
)


def describe() -> dict[str, Any]:
    """Return the machine and the versions of what matters."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result with its machine to ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **result}, indent=1) + "\n")
    return path


def reset_peak() -> None:
    """Let the peak of this process's memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Return what the system says of this process's memory, such as ``VmHWM``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def put(document: Path, name: str, table: str) -> None:
    """Put a script's table between its marks in a document."""
    document.write_text(with_table(document.read_text(), name, table))


def with_table(text: str, name: str, table: str) -> str:
    """Return a text with a script's table between its marks."""
    start, end = f"<!-- table: benchmarks/{name}.py -->", f"<!-- end of table: {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"there is no place for a table: {start} … {end}")
    return f"{before}{start}\n{table.strip()}\n{end}{after}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
