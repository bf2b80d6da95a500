"""A connector of somebody else: installed, found by its entry point, kept to the contract."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from simskip_vdb.datatypes import Ids, Metric, Vectors
from simskip_vdb.errors import StoreError, StoreNotFoundError
from simskip_vdb.store import VectorStore
from simskip_vdb.testing import RowContract

SKELETON = Path(__file__).resolve().parents[1] / "docs" / "connector_skeleton.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("connector_skeleton", SKELETON)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestSkeleton(RowContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "rows.npz"

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        np.savez(self.path, ids=ids, vectors=vectors, metric=metric.value)
        store: VectorStore = load().NpzStore.open(f"archive:{self.path}", read_only=False)
        return store

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        with np.load(self.path) as archive:
            return archive["ids"], archive["vectors"]


def test_the_skeleton_is_short_and_lets_no_other_error_out(tmp_path: Path) -> None:
    assert len(SKELETON.read_text().splitlines()) < 100
    store = load().NpzStore
    with pytest.raises(StoreNotFoundError):
        store(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(StoreError):
        store(tmp_path / "text.npz")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Lay a package out as pip does."""
    site = tmp_path / "site"
    info = site / "simskip_npz-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "simskip_npz.py").write_text(SKELETON.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: simskip-npz\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[simskip_vdb.connectors]\narchive = simskip_npz:NpzStore\n"
    )
    return site


def test_an_installed_connector_is_found_by_its_entry_point(site: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", ids=np.arange(20) * 3, vectors=rows, metric="cosine")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    state = ["--state", str(tmp_path / "state"), "--json"]
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from simskip_vdb.cli import main; main()"),
            *("inspect", f"archive:{tmp_path / 'rows.npz'}", *state),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["dim"], found["metric"]) == (20, 4, "cosine")
    assert (found["kind"], found["readable"]) == ("archive", "exactly")
