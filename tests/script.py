"""Run the installed command as a person does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SIMSKIP = Path(sys.executable).with_name("simskip")


def simskip(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SIMSKIP), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


def simskip_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = simskip(*arguments, "--json")
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
