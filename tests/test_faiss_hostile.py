"""Damaged files: a typed error in bounded memory, or an index; never a crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from damage import MOST_BYTES, NUMBERS, Driver, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.errors import ConfigError, StoreError

pytest.importorskip("resource", reason="memory is measured as POSIX does")

COUNT, DIM = 300, 8
KINDS = [
    "Flat",
    "SQ8",
    "HNSW8,Flat",
    "NSG8,Flat",
    "IVF4,Flat",
    "IVF4_HNSW4,Flat",
    "IVF4,SQ8",
    "IDMap,Flat",
    "PQ4x4np,RFlat",
    "PQ4x4",
    "PQ4x4fs",
    "IVF4,PQ4x4",
    "IVF4,PQ4x4fs",
    "HNSW8,PQ4x4",
    "RaBitQ",
    "RaBitQfs",
    "IVF4,RaBitQ",
    "RQ2x4",
    "LSH",
    "PCA4,Flat",
    "OPQ4,PQ4x4",
    "L2norm,Flat",
    "RR,IDMap,Flat",
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


def content(factory: str, count: int = COUNT, dim: int = DIM) -> bytes:
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    index = faiss.index_factory(dim, factory)
    index.train(rows)
    if "IDMap" in factory:
        index.add_with_ids(rows, np.arange(count))
    else:
        index.add(rows)
    data: bytes = faiss.serialize_index(index).tobytes()
    return data


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    return {factory: content(factory) for factory in KINDS}


@given(data=st.data())
@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_bytes_that_were_changed(
    driver: Driver,
    whole: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    changed = whole[data.draw(st.sampled_from(KINDS))]
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.sampled_from([1, 4, 8]))
        # Headers come first, and are where a byte does most.
        last = data.draw(st.sampled_from([100, 300, len(changed)])) - width
        at = data.draw(st.integers(0, min(last, len(changed) - width)))
        changed = put(changed, at, data.draw(st.sampled_from(NUMBERS)), width)
    path = tmp_path_factory.getbasetemp() / "changed.faiss"
    path.write_bytes(changed[: data.draw(st.one_of(st.none(), st.integers(0, len(changed))))])
    result = driver.open(path)
    assert result["outcome"] in ("opened", "StoreError", "UnsupportedIndexError", "DataError")
    assert result["grown"] < MOST_BYTES


# What was found, each by itself.


@pytest.mark.parametrize(
    ("factory", "code", "offset"),
    [
        ("NSG8,Flat", b"INSf", 58),
        ("IVF4,Flat", b"ilar", 4),
        ("IVF4,PQ4x4fs", b"ilbl", 4),
        ("OPQ4_8,IVF4,PQ4x4fs,RFlat", b"ilbl", 4),
    ],
)
def test_counts_for_which_memory_is_taken_before_they_are_checked(
    driver: Driver,
    whole: dict[str, bytes],
    tmp_path: Path,
    factory: str,
    code: bytes,
    offset: int,
) -> None:
    data = whole.get(factory) or content(factory)
    at = data.index(code) + offset
    path = tmp_path / "huge.faiss"
    path.write_bytes(put(data, at, 10**8, 4))
    result = driver.open(path)
    assert result["outcome"] == "StoreError"
    assert result["grown"] < MOST_BYTES
    with pytest.raises(StoreError, match=r"huge\.faiss: a header counts 100,000,000"):
        FaissStore(path)


def test_a_huge_count_beside_an_unknown_code(
    driver: Driver, whole: dict[str, bytes], tmp_path: Path
) -> None:
    data = whole["IVF4,Flat"]
    at = data.index(b"ilar")
    path = tmp_path / "huge.faiss"
    path.write_bytes(put(put(data, at + 4, 10**8, 4), at + 20, 0, 4))
    result = driver.open(path)
    assert result["outcome"] == "StoreError"
    assert result["grown"] < MOST_BYTES


@pytest.mark.parametrize("where", ["ilar", "ilbl"])
def test_rows_in_which_a_code_occurs_by_chance(tmp_path: Path, where: str) -> None:
    rows = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
    rows[7, 3] = np.frombuffer(where.encode(), np.float32)[0]
    index = faiss.IndexFlatL2(DIM)
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "rows.faiss"))
    assert FaissStore(tmp_path / "rows.faiss").info().count == COUNT


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF4,Flat", "PQ4x4np,RFlat", "RaBitQ"])
def test_large_files_that_are_cut(driver: Driver, tmp_path: Path, factory: str) -> None:
    # FAISS's mapped reader takes the last number for whole, or reads beyond the map.
    data = content(factory, 120_000 if factory == "RaBitQ" else 45_000, 24)
    assert len(data) > 1 << 20
    path = tmp_path / "cut.faiss"
    page = len(data) // 4096 * 4096
    for length in [len(data) - 7, len(data) - 1, page, 1 << 20, (1 << 20) + 2]:
        path.write_bytes(data[:length])
        assert driver.open(path)["outcome"] == "StoreError"
        with pytest.raises(StoreError, match=r"cut\.faiss"):
            FaissStore(path)


@pytest.mark.parametrize(
    ("factory", "name", "value"),
    [
        ("RaBitQ", "qb", 200),
        ("RaBitQ", "code_size", 2**23),
        ("RaBitQfs", "ntotal2", 2**40),
        ("RaBitQfs", "code_size", 10**8),
        ("RaBitQfs", "code_size", 2**32 + 9),
    ],
)
def test_headers_that_do_not_fit_the_codes(
    tmp_path: Path, whole: dict[str, bytes], factory: str, name: str, value: int
) -> None:
    index = faiss.deserialize_index(np.frombuffer(whole[factory], np.uint8))
    setattr(index, name, value)
    if (factory, name) == ("RaBitQ", "code_size"):
        index.rabitq.code_size = value
    path = tmp_path / "codes.faiss"
    faiss.write_index(index, str(path))
    with pytest.raises(StoreError, match=r"codes\.faiss"):
        open_store(str(path))


@pytest.mark.parametrize(
    ("factory", "part", "name"),
    [
        ("IVF4,Flat", "", "nprobe"),
        ("IVF4,PQ4x4np,RFlat", "base_index", "nprobe"),
        ("HNSW8,Flat", "hnsw", "efSearch"),
        ("HNSW8,Flat", "hnsw", "efConstruction"),
        ("HNSW8,Flat,RFlat", "base_index.hnsw", "efSearch"),
        ("IVF4_HNSW4,Flat", "quantizer.hnsw", "efSearch"),
    ],
)
def test_more_candidates_than_memory(tmp_path: Path, factory: str, part: str, name: str) -> None:
    index = faiss.deserialize_index(np.frombuffer(content(factory), np.uint8))
    owner = index
    for step in part.split(".") if part else []:
        owner = getattr(owner, step)
        owner = faiss.downcast_index(owner) if isinstance(owner, faiss.Index) else owner
    setattr(owner, name, 10**9)
    path = tmp_path / "candidates.faiss"
    faiss.write_index(index, str(path))
    with pytest.raises(StoreError, match=rf"candidates\.faiss: .* its {name}"):
        open_store(str(path))


def test_a_graph_that_would_be_searched_for_ever(tmp_path: Path, whole: dict[str, bytes]) -> None:
    index = faiss.deserialize_index(np.frombuffer(whole["NSG8,Flat"], np.uint8))
    path = tmp_path / "graph.faiss"
    faiss.write_index(index, str(path))
    with pytest.raises(ConfigError, match="at most the number of rows"):
        open_store(str(path)).search(np.ones((1, DIM), np.float32), 3, {"search_L": COUNT + 1})
    index.nsg.search_L = COUNT + 1
    faiss.write_index(index, str(path))
    with pytest.raises(StoreError, match=r"graph\.faiss.* for ever"):
        open_store(str(path))


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.faiss"
    path.touch()
    with pytest.raises(StoreError, match=r"empty\.faiss: the file is empty"):
        FaissStore(path)


def test_every_kind_opens_when_whole(
    driver: Driver, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "whole.faiss"
    for factory in KINDS:
        path.write_bytes(whole[factory])
        assert driver.open(path)["outcome"] == "opened", factory
