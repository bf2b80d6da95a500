"""The benchmark of speed runs; what it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_some_rows_of_every_index_are_measured_once(tmp_path: Path) -> None:
    page, results = tmp_path / "README.md", tmp_path / "results" / "speed.json"
    page.write_text("a\n<!-- table: benchmarks/speed.py -->\n<!-- end of table: speed -->\nz\n")
    words = ["--rows", "2000", "--dims", "--results", str(results), "--readme", str(page)]
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), *words]
    subprocess.run(command, check=True)
    cells = json.loads(results.read_text())["cells"]
    assert set(cells) == {
        "start",
        "fit",
        *(f"{s} 2000 384" for s in ("flat", "ivf", "hnsw", "edge")),
    }
    for name, cell in cells.items():
        if name not in ("start", "fit"):
            assert min(cell["stages"]["seconds"].values()) > 0
            assert cell["refine"]["peak"] > 0
    text = page.read_text()
    assert text.startswith("a\n")
    assert text.endswith("\nz\n")
    assert text.count("| 2,000 × 384") == 4
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "build" not in again.stderr
    assert page.read_text() == text


@pytest.mark.parametrize("what", ["import simskip_vdb", "main()"])
def test_starting_loads_nothing_that_is_large(what: str) -> None:
    large = {"torch", "faiss", "qdrant_client", "qdrant_edge", "pyarrow", "scipy", "matplotlib"}
    code = (
        "import contextlib, sys\n"
        "sys.argv = ['simskip', '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    {'from simskip_vdb.cli import main; ' if what == 'main()' else ''}{what}\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not large & set(done.stdout.splitlines()[-1].split())
