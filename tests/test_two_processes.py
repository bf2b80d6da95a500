"""Two runs on one index: one does the work, the other says who has it, and neither does harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_index import Index

import simskip_vdb as ss

PAUSED = """
import os, signal, sys
from pathlib import Path
import simskip_vdb as ss

def pause(stage, done, total):
    if stage == "write":
        print("writing", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

settings = ss.Settings(refiner=Path(sys.argv[2]), accept_unmeasured=True)
ss.refine(ss.open_store(sys.argv[1]), ss.Judgments(), settings, progress=pause)
"""
AGAIN = "import sys; from simskip_vdb.cli import main; sys.argv[0] = 'simskip'; main()"


def start(index: Index, command: str) -> subprocess.Popen[str]:
    arguments = [command, index.kind.uri(index.now)]
    if command == "refine":
        arguments += ["--refiner", str(index.refiner), "--accept-unmeasured"]
    return subprocess.Popen(
        [sys.executable, "-c", AGAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@pytest.mark.parametrize("kind", ["faiss", "edge", "local"])
def test_a_second_run_steps_aside_and_says_for_whom(kind: str, tmp_path: Path) -> None:
    index = Index(kind, tmp_path, 3000 if kind == "faiss" else None)
    uri = index.kind.uri(index.now)
    first = subprocess.Popen(
        [sys.executable, "-c", PAUSED, uri, str(index.refiner)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        for command in ("refine", "rollback"):
            second = start(index, command)
            _, said = second.communicate(timeout=60)
            assert second.returncode == 1
            assert "Traceback" not in said
            # The engines let one handle at a time open a folder, and know only that it is open.
            expected = {
                "faiss": f"another run (process {first.pid} on ",
                "edge": "Another handle holds the shard open",
                "local": "another process",
            }
            assert expected[kind] in said
        os.kill(first.pid, signal.SIGCONT)
        while first.poll() is None:  # it stops at each block that it writes
            os.kill(first.pid, signal.SIGCONT)
            time.sleep(0.01)
        assert first.returncode == 0
    finally:
        first.kill()
        first.communicate()
    assert index.is_new().all()
    index.rollback()
    assert index.is_old().all()


@pytest.mark.parametrize("kind", ["faiss", "edge"])
def test_runs_that_start_together_end_as_one(kind: str, tmp_path: Path) -> None:
    index = Index(kind, tmp_path)
    runs = [start(index, "refine") for _ in range(3)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes, said
    assert set(codes) <= {0, 1}, said
    assert "Traceback" not in "".join(said)
    assert index.is_new().all()
    index.rollback()
    assert index.is_old().all()


def test_a_lock_of_a_run_that_was_killed_is_free(tmp_path: Path) -> None:
    index = Index("faiss", tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", PAUSED, index.kind.uri(index.now), str(index.refiner)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    first.stdout.readline()
    first.kill()
    first.communicate()
    assert ss.open_store(index.kind.uri(index.now)).info().count == len(index.old)
    index.refine()
    assert index.is_new().all()
