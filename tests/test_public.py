from __future__ import annotations

import subprocess
import sys

import pytest

import simskip_vdb as ss

HEAVY = (
    "torch",
    "faiss",
    "qdrant_client",
    "qdrant_edge",
    "scipy",
    "pyarrow",
    "ir_measures",
    "sklearn",
    "jinja2",
    "matplotlib",
    "prometheus_client",
    "pythonjsonlogger",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_all_is_the_public_surface() -> None:
    assert set(ss.__all__) == {
        "FitSettings", "JudgmentFiles", "Judgments", "Refiner", "Settings", "__version__",
        "evaluate", "fit", "open_store", "read_judgments", "refine", "prune", "power",
    "rollback", "status",
    }  # fmt: skip
    assert all(getattr(ss, name) is not None for name in ss.__all__)
    with pytest.raises(AttributeError):
        _ = ss.nothing


@pytest.mark.parametrize(
    "module",
    [
        "simskip_vdb",
        "simskip_vdb.cli",
        "simskip_vdb.clicks",
        "simskip_vdb.connectors",
        "simskip_vdb.jobs",
        "simskip_vdb.logs",
        "simskip_vdb.metrics",
        "simskip_vdb.refiner",
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    done = python(f"import sys, {module}; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not loaded & set(HEAVY)


def test_help_runs_on_a_bare_install() -> None:
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in HEAVY)
    code = f"import sys; {hidden}from simskip_vdb.cli import cli; cli(['refine', '--help'])"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "--accept-unmeasured" in done.stdout


@pytest.mark.parametrize(
    ("package", "extra", "does"),
    [
        ("faiss", "faiss", "ss.open_store('x.faiss')"),
        ("torch", "fit", "import simskip_vdb.training"),
        ("ir_measures", "eval", "import simskip_vdb.evaluation as e; e.parse_measures(['P@1'])"),
    ],
)
def test_a_missing_extra_is_named(package: str, extra: str, does: str) -> None:
    done = python(f"import sys; sys.modules[{package!r}] = None\nimport simskip_vdb as ss\n{does}")
    assert "MissingDependencyError" in done.stderr
    assert f"simskip-vdb[{extra}]" in done.stderr
