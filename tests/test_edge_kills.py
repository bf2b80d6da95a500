from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("edge_kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills["refine"] >= 3, kills
    assert kills["rollback"] >= 1, kills
