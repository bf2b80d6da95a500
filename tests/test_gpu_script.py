from __future__ import annotations

import json
import sys

import gpu
import pytest


def test_the_gpu_benchmark_runs_on_the_cpu_with_little_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "DIM", 16)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--part", "0.0001"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    found = {name: json.loads(rest) for name, rest in (line.split(" ", 1) for line in lines)}
    assert set(found) == {"loss", "apply", "mining"}
    assert all(part["seconds"] > 0 and part["products_seconds"] > 0 for part in found.values())
