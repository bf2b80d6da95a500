from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from faiss_files import replace

from simskip_vdb.connectors.faiss_flat import FlatFile
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import VectorBatch, Vectors
from simskip_vdb.errors import StoreError

N, D = 300, 8
FLAT = ("Flat", "IDMap,Flat", "IDMap2,Flat")


@pytest.fixture
def rows(rng: np.random.Generator) -> Vectors:
    return rng.normal(size=(N, D)).astype(np.float32)


def saved(path: Path, kind: str, rows: Vectors, metric: int = faiss.METRIC_L2) -> Path:
    index = faiss.index_factory(D, kind, metric)
    index.train(rows)
    if kind.startswith("IDMap"):
        index.add_with_ids(rows, np.arange(len(rows)) * 3 + 1)
    else:
        index.add(rows)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("kind", FLAT)
def test_a_file_is_written_as_faiss_writes_it(
    tmp_path: Path, rows: Vectors, kind: str, metric: int
) -> None:
    flat = FlatFile.find(saved(tmp_path / "old", kind, rows, metric))
    assert flat is not None
    assert flat.read(7, 19).tobytes() == rows[7:19].tobytes()
    new = tmp_path / "new"
    flat.write_like(new, iter(np.array_split(rows * 2, 7)))
    wanted = saved(tmp_path / "wanted", kind, rows * 2, metric)
    assert new.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("kind", ["HNSW8,Flat", "IVF4,Flat", "SQ8", "L2norm,Flat", "PCA4,Flat"])
def test_other_indexes_are_not_taken_for_plain_rows(
    tmp_path: Path, rows: Vectors, kind: str
) -> None:
    assert FlatFile.find(saved(tmp_path / "x", kind, rows)) is None


@pytest.mark.parametrize("kind", FLAT)
def test_a_damaged_file_is_not_taken_for_plain_rows(
    tmp_path: Path, rows: Vectors, kind: str
) -> None:
    path = saved(tmp_path / "x", kind, rows)
    whole = path.read_bytes()
    maps = kind.count("IDMap")
    headers = (maps + 1) * 33 + maps * 4 + 4 + 8
    damaged = [whole[:size] for size in (0, 3, 44, headers, len(whole) - 1, len(whole) - 7)]
    damaged.append(whole + b"\0")
    for at in range(headers):
        if not any(start <= at < start + 17 for start in range(16, headers, 37)):  # says nothing
            damaged.append(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        assert FlatFile.find(path) is None


@pytest.mark.parametrize("count", [N - 1, N + 1])
def test_a_wrong_number_of_rows_is_refused(tmp_path: Path, rows: Vectors, count: int) -> None:
    flat = FlatFile.find(saved(tmp_path / "x", "IDMap,Flat", rows))
    assert flat is not None
    with pytest.raises(StoreError, match="bytes were written"):
        flat.write_like(tmp_path / "new", [np.resize(rows, (count, D))])


@pytest.mark.parametrize("kind", FLAT)
def test_a_store_holds_neither_the_old_nor_the_new_rows_in_memory(
    tmp_path: Path, rows: Vectors, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x", kind, rows)
    ids = FaissStore(path).ids

    def held(*args: object) -> None:
        raise AssertionError("FAISS was asked to hold all rows")

    store = FaissStore(path)
    monkeypatch.setattr(faiss, "write_index", held)
    monkeypatch.setattr("simskip_vdb.connectors.faiss_store.rebuild", held)
    replace(store, [VectorBatch(ids=ids[5:9], vectors=rows[5:9] + 1)], lambda candidate: None)
    expected = rows.copy()
    expected[5:9] += 1
    assert faiss.read_index(str(path)).search(expected[5:9], 1)[1].ravel().tolist() == (
        ids[5:9].tolist()
    )
    assert np.concatenate([b.vectors for b in store.scan(50)]).tobytes() == expected.tobytes()
