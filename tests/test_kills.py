from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import table

CRASHES = Path(__file__).parents[1] / "benchmarks" / "crashes.py"
KILLS = 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("store", ["FAISS IVF", "Qdrant Edge", "Qdrant local", "LanceDB"])
def test_kills_at_random_instants_lose_nothing(store: str, tmp_path: Path) -> None:
    saved = tmp_path / "crashes.json"
    arguments = ["--kills", str(KILLS), "--only", store, "--save", str(saved)]
    done = subprocess.run(
        [sys.executable, str(CRASHES), *arguments], capture_output=True, text=True, check=False
    )
    assert saved.is_file(), done.stderr
    found = json.loads(saved.read_text())["stores"][store]
    assert found["failures"] == []
    assert done.returncode == 0
    assert found["kills"]["refine"] >= KILLS
    assert found["resumed"] > 0
    assert found["rolled_back"] > 0
    assert store in done.stdout


def test_the_table_of_kills_is_what_was_measured() -> None:
    stores = json.loads((CRASHES.parent / "results" / "crashes.json").read_text())["stores"]
    text = (CRASHES.parents[1] / "docs" / "safety.md").read_text()
    assert f"\n{table(stores)}\n" in text
    killed = sum(sum(store["kills"].values()) for store in stores.values())
    assert f"{killed:,} kills" in (CRASHES.parents[1] / "README.md").read_text()
    assert not any(store["failures"] for store in stores.values())
    assert all(store["kills"]["refine"] >= 300 for store in stores.values())
