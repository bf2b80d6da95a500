from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from faiss_files import KINDS, make_index, write

import simskip_vdb.connectors as connectors
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.connectors.rows import RowOrder
from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import ConfigError, DataError, MissingDependencyError, StoreNotFoundError


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    vectors = rng.standard_normal((5, 3)).astype(np.float32)
    return write(make_index(KINDS["flat"], np.arange(5), vectors, Metric.DOT), tmp_path / "a:b")


def test_a_path_and_a_uri_open_the_same_file(path: Path) -> None:
    for uri in (str(path), f"faiss:{path}"):
        store = open_store(uri)
        assert isinstance(store, FaissStore)
        assert store.info().uri == f"faiss:{path}"


def test_a_path_with_a_colon_is_a_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert open_store("a:b").info().count == 5


def test_read_only_reaches_the_store(path: Path) -> None:
    with pytest.raises(ConfigError, match="reading only"):
        FaissStore.open(str(path), read_only=True).replace([], lambda store: None)


def test_unknown_schemes_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'milvus:'.*faiss"):
        open_store("milvus:somewhere")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"nothing\.faiss"):
        open_store(str(tmp_path / "nothing.faiss"))


def test_a_missing_package_names_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "simskip_vdb.connectors.faiss_store")
    monkeypatch.delitem(sys.modules, "simskip_vdb.connectors.faiss_layout")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[faiss\]"):
        open_store(str(path))


class ThirdParty:
    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> MemoryStore:
        assert (uri, read_only) == ("mine:here", True)
        return MemoryStore(np.arange(2), np.eye(2, dtype=np.float32), Metric.COSINE)


def test_third_party_connectors_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = EntryPoint("mine", f"{__name__}:ThirdParty", connectors.ENTRY_POINT_GROUP)
    broken = EntryPoint("broken", f"{__name__}:Nothing", connectors.ENTRY_POINT_GROUP)
    monkeypatch.setattr(connectors, "entry_points", lambda group: [mine, broken])
    assert open_store("mine:here", read_only=True).info().count == 2
    with pytest.raises(ConfigError, match=r"'broken' .*Nothing"):
        open_store("broken:here")
    with pytest.raises(ConfigError, match="broken, faiss, mine"):
        open_store("other:here")


def test_importing_connectors_imports_no_engine() -> None:
    code = "import sys, simskip_vdb.connectors; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_repeated_ids_are_scanned_but_not_looked_up() -> None:
    rows = RowOrder(np.array([4, 2, 4]), "here")
    assert rows.positions(np.array([2])).tolist() == [1]
    with pytest.raises(DataError, match="here: id 4 occurs more than once"):
        rows.positions(np.array([2, 4]))
    with pytest.raises(DataError, match="integers"):
        rows.positions(np.array(["2"]))


def test_memory_search_leaves_out_rows_that_do_not_compare() -> None:
    vectors = np.array([[1, 0], [0, 0], [np.nan, 0], [3, 3]], np.float32)
    store = MemoryStore(np.array([10, 11, 12, 13]), vectors, Metric.COSINE)
    found = store.search(np.array([[2, 0]], np.float32), 4, {})
    assert found.ids.tolist() == [[10, 13, -1, -1]]
    np.testing.assert_allclose(found.scores[0, :2], [1, 0.5**0.5], rtol=1e-6)
