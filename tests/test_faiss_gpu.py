"""What is asked of a GPU: recorded by a stand-in that computes on the CPU and proves no speed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from faiss_files import replace

from simskip_vdb.connectors import faiss_gpu
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import VectorBatch, Vectors

COUNT, DIM = 400, 8


class Device:
    """Counts what is copied to it and fails when it is full."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int]] = []
        self.full = False

    def copy(self, resources: object, device: int, index: Any) -> Any:  # noqa: ANN401
        if self.full:
            raise RuntimeError("out of memory")
        self.copies.append((index.ntotal, index.d))
        return faiss.clone_index(index)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", device.copy, raising=False)
    faiss_gpu._resources.cache_clear()
    yield device
    faiss_gpu._resources.cache_clear()


def saved(folder: Path, factory: str, vectors: Vectors) -> Path:
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, factory)
    index.train(vectors)
    index.add(vectors)
    folder.mkdir()
    faiss.write_index(index, str(folder / "rows.faiss"))
    return folder / "rows.faiss"


def rewritten(path: Path, vectors: Vectors) -> FaissStore:
    store = FaissStore(path)
    if store.info().lossy:
        store.take_originals(vectors)
    batch = VectorBatch(ids=np.arange(COUNT), vectors=vectors[::-1] * np.float32(0.5))
    replace(store, [batch], lambda candidate: None)
    return store


@pytest.mark.parametrize(
    ("factory", "copies"),
    [
        ("Flat", []),
        ("IVF4,Flat", [(0, DIM), (4, DIM)]),  # to train, and to assign rows
        ("IVF4_HNSW4,Flat", [(0, DIM)]),
        ("IVF4,SQ8", [(0, DIM), (4, DIM)]),
        ("PQ4x4", [(0, 2)]),
        ("IVF4,PQ4x4", [(0, DIM), (0, 2)]),
        ("HNSW8,Flat", []),
    ],
)
def test_training_and_building(
    device: Device, tmp_path: Path, rng: np.random.Generator, factory: str, copies: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    vectors = rng.standard_normal((COUNT, DIM)).astype(np.float32)
    path = saved(tmp_path / "gpu", factory, vectors)
    rewritten(path, vectors)
    assert device.copies == copies
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "get_num_gpus", lambda: 0)
        other = saved(tmp_path / "cpu", factory, vectors)
        rewritten(other, vectors)
    assert device.copies == copies
    assert path.read_bytes() == other.read_bytes()


def test_exact_search(device: Device, tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((COUNT, DIM)).astype(np.float32)
    store = FaissStore(saved(tmp_path / "gpu", "Flat", vectors))
    for _ in range(2):
        found = store.search(vectors, 1, {}).ids
        np.testing.assert_array_equal(found[:, 0], np.arange(COUNT))
    assert device.copies == [(COUNT, DIM)]
    store.search(vectors, faiss_gpu.MOST_NEIGHBOURS + 1, {})
    rewritten(store.path, vectors)
    store = FaissStore(store.path)
    found = store.search(vectors[::-1] * np.float32(0.5), 1, {}).ids
    np.testing.assert_array_equal(found[:, 0], np.arange(COUNT))


def test_a_device_without_room(
    device: Device, tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    device.full = True
    vectors = rng.standard_normal((COUNT, DIM)).astype(np.float32)
    store = rewritten(saved(tmp_path / "gpu", "IVF4,Flat", vectors), vectors)
    assert store.info().count == COUNT
    assert "its GPU refused: out of memory" in caplog.text
