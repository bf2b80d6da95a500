from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DIM", 16)
    monkeypatch.setattr(gpu, "INDEX_DIM", 16)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, Any]:
    command = ["gpu.py", *arguments, "--device", "cpu", "--part", "0.0001"]
    monkeypatch.setattr(sys, "argv", command)
    try:
        gpu.main()
    finally:
        lines = capsys.readouterr().out.splitlines()
    printed = [line.split(" ", 1) for line in lines if " {" in line]
    return {name: json.loads(rest) for name, rest in printed}


def test_the_gpu_benchmark_runs_on_the_cpu_with_little_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = ["loss", "apply", "mining", "search", "fit"]
    found = run(monkeypatch, capsys, *parts, "--out", str(tmp_path))
    assert list(found) == [*parts, "all"]
    assert all({"found", "wanted", "held"} <= set(found[name]) for name in parts)
    assert all(found[name]["seconds"] > 0 for name in parts)
    assert found["all"]["device"] == "CPU"
    assert set(parts) <= set(json.loads((tmp_path / "gpu.json").read_text()))


def test_a_part_that_fails_loses_only_its_own_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(device: torch.device, size: int) -> dict[str, Any]:
        raise AssertionError("other neighbours")

    monkeypatch.setitem(gpu.PARTS, "apply", (fail, 1, ()))
    monkeypatch.setitem(gpu.PARTS, "nudge", (fail, 1, ("no_such_package",)))
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, capsys, "apply", "nudge", "mining", "--out", str(tmp_path))
    assert error.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "other neighbours" in found["apply"]["failed"]
    assert "no_such_package" in found["nudge"]["skipped"]
    assert found["mining"]["seconds"] > 0
