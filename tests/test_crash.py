from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_operation_loses_nothing(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("crash_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(driver.parents[1] / "benchmarks")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert min(kills.values()) >= 15, kills
