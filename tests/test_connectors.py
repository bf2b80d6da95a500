from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import closing
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import flat, ivf, random_refiner
from edge_shards import make, row_ids
from faiss_files import KINDS, make_index, replace, write
from hypothesis import given
from hypothesis import strategies as st
from parquet_files import write_rows
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

import simskip_vdb as ss
import simskip_vdb.connectors as connectors
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.connectors.qdrant_open import open_address
from simskip_vdb.connectors.rows import RowOrder
from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    StoreError,
    StoreNotFoundError,
)
from simskip_vdb.inspection import inspect


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
        replace(FaissStore.open(str(path), read_only=True), [], lambda store: None)


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
    with pytest.raises(ConfigError, match=r"broken, .*faiss, .*mine"):
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


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.dictionaries(st.sampled_from(["vector", "id"]), st.text(st.characters(codec="utf-8"))),
)
def test_an_address_leads_where_it_was_taken(place: str, options: dict[str, str]) -> None:
    given = {name: value for name, value in options.items() if value}
    uri = address_of("parquet", place, options)
    assert parse_address(uri, ("vector", "id")) == (place, given)


@pytest.mark.parametrize("name", ["a%20b", "50%25", "a?b", "a&b=c", "a#b", "a+b", "ä b", "x" * 245])
@pytest.mark.parametrize("kind", ["faiss", "parquet", "npy", "npz", "edge", "local"])
def test_the_address_that_is_shown_opens_the_index(tmp_path: Path, kind: str, name: str) -> None:
    path, rows = tmp_path / name, np.eye(4, dtype=np.float32)
    if kind == "faiss":
        flat(path, rows)
        uri = str(path)
    elif kind == "parquet":
        write_rows(path, np.arange(4), rows)
        uri = address_of("parquet", str(path), {})
    elif kind in ("npy", "npz"):
        with open(path, "wb") as file:
            held: Any = {"a&b": rows, "c": rows}
            np.save(file, rows) if kind == "npy" else np.savez(file, **held)
        uri = address_of(kind, str(path), {"key": "a&b"} if kind == "npz" else {})
    elif kind == "edge":
        make(path, list(range(4)), rows)
        uri = address_of("qdrant-edge", str(path), {})
    else:
        with closing(QdrantClient(path=str(path))) as client:
            dot = VectorParams(size=4, distance=Distance.DOT)
            client.create_collection("c%d", vectors_config={"a vector": dot, "other": dot})
        uri = address_of("qdrant-local", str(path), {"collection": "c%d", "vector": "a vector"})
    shown = ""
    for address in (uri, None):
        store = open_store(address or shown, read_only=True)
        shown = store.info().uri
        assert store.info().dim == 4
        getattr(store, "close", lambda: None)()


@pytest.mark.parametrize("length", [200, 235, 243, 255])
@pytest.mark.parametrize("kind", ["flat", "lists", "parquet", "npy", "edge"])
def test_a_name_however_long_is_refined_and_restored(
    tmp_path: Path, kind: str, length: int
) -> None:
    path, ids = tmp_path / ("x" * length), np.arange(200)
    rows = np.random.default_rng(1).normal(size=(200, 4)).astype(np.float32)
    scheme = {"parquet": "parquet", "npy": "npy", "edge": "qdrant-edge"}.get(kind, "faiss")
    options = {"metric": "dot"} if kind in ("parquet", "npy") else {}
    if kind == "flat":
        flat(path, rows)
    elif kind == "lists":
        ivf(path, ids, rows)
    elif kind == "parquet":
        write_rows(path, ids, rows)
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, rows.astype(np.float64))
    else:
        make(path, ids.tolist(), rows)
        ids = row_ids(ids.tolist())
    random_refiner(4, ids, 1).save(tmp_path / "X")
    settings = ss.Settings(refiner=tmp_path / "X", accept_unmeasured=True)
    for command in (lambda s: ss.refine(s, ss.Judgments(), settings), ss.rollback):
        store = open_store(address_of(scheme, str(path), options))
        command(store)
        (batch,) = store.scan(1000)
        assert np.array_equal(batch.vectors, rows) == (command is ss.rollback)
        getattr(store, "close", lambda: None)()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_reader_who_may_not_see_the_state_still_inspects(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(file: Any, **named: Any) -> os.stat_result:  # noqa: ANN401 as os.stat
        if not isinstance(file, int) and Path(os.fsdecode(file)).parent.suffix == ".simskip":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return look(file, **named)

    look = os.stat
    monkeypatch.setattr(os, "stat", forbidden)
    store = open_store(str(path), read_only=True)
    assert "run as the user who may read it" in inspect(store)["state_problem"]
    refiner = random_refiner(store.info().dim, np.arange(4), 1)
    for command in (ss.status, refiner.check):
        with pytest.raises(StoreError, match="Permission denied; run as the user"):
            command(store)


@pytest.mark.parametrize("scheme", ["qdrant", "qdrant+https"])
def test_the_address_of_a_server_may_name_a_vector(scheme: str) -> None:
    uri = f"{scheme}://127.0.0.1:1/docs?vector=text&batch_delay=0&filter=a%3Db"
    target = open_address(uri)
    assert (target.collection, target.vector, target.filter) == ("docs", "text", "a=b")


@pytest.mark.parametrize("uri", ["parquet:/x%00", "npz:/x%00", "qdrant-edge:/x%00", "faiss:/x\0y"])
def test_an_address_with_a_zero_byte_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="byte 0"):
        open_store(uri)


@pytest.mark.parametrize("scheme", ["faiss", "parquet", "npy", "qdrant-edge", "qdrant-local"])
def test_a_name_that_no_file_can_have_is_not_found(scheme: str) -> None:
    with pytest.raises(StoreNotFoundError, match="so many characters"):
        open_store(f"{scheme}:/{'x' * 5000}")
