"""What only tells of a write changes neither the exit code nor what was done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import ivf, random_refiner

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.runs import Runs

N, D = 60, 8


@pytest.fixture
def index(tmp_path: Path, rng: np.random.Generator) -> Path:
    ids = np.arange(N) * 3
    random_refiner(D, ids).save(tmp_path / "refiner")
    return ivf(tmp_path / "index.faiss", ids, rng.normal(size=(N, D)).astype(np.float32))


def command(index: Path, *more: str) -> list[str]:
    code = "from simskip_vdb.cli import main; main()"
    refiner = str(index.with_name("refiner"))
    given = ["refine", str(index), "--refiner", refiner, "--accept-unmeasured", *more]
    return [sys.executable, "-c", code, *given]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_narrow_terminal_shows_what_it_can(index: Path, encoding: str) -> None:
    before = index.read_bytes()
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command(index), capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert index.read_bytes() != before
    assert b"read back and verified" in done.stdout
    assert b"Traceback" not in done.stderr


def test_a_reader_that_is_gone_changes_nothing(index: Path) -> None:
    before = index.read_bytes()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command(index), stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert index.read_bytes() != before
    assert b"BrokenPipe" not in done.stderr


def test_a_record_that_cannot_be_written_is_a_warning(
    index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Runs, record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Runs, "add", full)
    settings = ss.Settings(refiner=index.with_name("refiner"), accept_unmeasured=True)
    assert ss.refine(open_store(str(index)), ss.Judgments(), settings).exit_code == 0
    assert ss.rollback(open_store(str(index)))["exact"]
    assert caplog.text.count("No space left") == 2


def test_a_damaged_record_of_an_old_run_leaves_the_json(index: Path) -> None:
    subprocess.run(command(index), capture_output=True, check=True)
    for record in (index.with_name("index.faiss.simskip") / "runs").iterdir():
        record.write_bytes(b"\xff not json")
    random_refiner(D, np.arange(N) * 3, 1).save(index.with_name("refiner"))
    done = subprocess.run(command(index, "--json"), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"]["rows"] == N


def test_json_is_exact_on_a_narrow_terminal(index: Path) -> None:
    odd = index.rename(index.with_name("α · ×.faiss"))
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(command(odd, "--json"), capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["index"] == f"faiss:{odd}"
