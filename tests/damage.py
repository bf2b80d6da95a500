"""Damage FAISS files, and open them in a process that they may end."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

MOST_BYTES = 300 << 20
MOST_SECONDS = 20
NUMBERS = [0, 1, 2**16, 2**24, 10**8, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
HARMLESS = (
    "opened",
    "StoreError",
    "StoreNotFoundError",
    "UnsupportedIndexError",
    "DataError",
    "ConfigError",
)


class Driver:
    """A process that opens files, started again when one of them ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self, path: Path) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("open_driver.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], MOST_SECONDS)
        if not ready:
            self.close()
            return {"outcome": f"no answer within {MOST_SECONDS} s", "grown": 0}
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self.close()
            return {"outcome": f"the process ended with {code}", "grown": 0}
        result: dict[str, Any] = json.loads(answer)
        if result["grown"] >= MOST_BYTES:
            self.close()  # its peak would hide the next one
        return result

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def put(data: bytes, at: int, number: int, width: int) -> bytes:
    part = (number % (1 << 8 * width)).to_bytes(width, "little")
    return data[:at] + part + data[at + width :]
