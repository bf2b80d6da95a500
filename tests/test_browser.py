"""Reports as a browser shows them, on a desk and on a phone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_pages import SITUATIONS

from simskip_vdb.pages import render_page

pytest.importorskip("PyQt6.QtWebEngineWidgets", exc_type=ImportError)

LOOKED_AT = ("a first refinement", "refused", "an incremental night", "200 runs and 5,000 queries",
             "hostile names", "bare and failed")  # fmt: skip


@pytest.mark.parametrize("width", [1000, 360])
@pytest.mark.parametrize("situation", LOOKED_AT)
def test_a_browser_shows_all_of_a_report(situation: str, width: int, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render_page(SITUATIONS[situation]), encoding="utf-8")
    script = Path(__file__).with_name("browser.py")
    done = subprocess.run(
        [sys.executable, str(script), str(page), str(picture), str(width), "900"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["asked"], found["said"]) == ([], [])
    assert found["out"] == []
    assert found["nowhere"] == []
    assert (found["flat"], found["small"]) == (0, 0)
    assert (found["pictures"] > 0) is ("bare" not in situation)
    assert "how to undo" in found["text"]
    assert picture.stat().st_size > 10_000
