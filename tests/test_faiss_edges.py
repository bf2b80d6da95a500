"""Kinds of FAISS index at their edges: hardly any rows, one dimension, thousands."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from faiss_cells import CELLS, SMALL, Cell, Expect, be_quiet, ids_of
from faiss_files import replace
from faiss_walk import learned, parameters

from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import VectorBatch, Vectors
from simskip_vdb.store import VectorStore

# An NSG cannot be built over fewer than a hundred rows.
PLAIN = {
    cell.name: cell
    for cell in CELLS
    if cell.expect is not Expect.REFUSES and cell.edit is None and "NSG" not in cell.name
}


@pytest.fixture(scope="module")
def rows() -> Vectors:
    return np.random.default_rng(4).standard_normal((SMALL.rows, SMALL.dim)).astype(np.float32)


@pytest.mark.parametrize("name", PLAIN)
def test_with_hardly_any_rows(name: str, rows: Vectors, tmp_path: Path) -> None:
    cell = PLAIN[name]
    path = tmp_path / "rows.faiss"
    faiss.omp_set_num_threads(1)
    built = cell.build(SMALL, rows)
    for count in (0, 1, 2):
        built.reset()
        if count and cell.custom:
            built.add_with_ids(rows[:count], ids_of(cell, count))
        elif count:
            built.add(rows[:count])
        faiss.write_index(built, str(path))
        before = faiss.read_index(str(path))
        store = _replaced(path, cell, rows[:count] * np.float32(0.9))
        assert store.info().count == count
        after = faiss.read_index(str(path))
        assert parameters(after) == parameters(before)
        if count == 0:
            for part, values in learned(before).items():
                np.testing.assert_array_equal(learned(after)[part], values)
        assert store.search(rows[:1], 3, {}).ids.shape == (1, 3)


def _replaced(path: Path, cell: Cell, vectors: Vectors) -> VectorStore:
    store = FaissStore(path)
    (ids, *_) = [batch.ids for batch in store.scan(10)] or [np.empty(0, np.int64)]
    np.testing.assert_array_equal(ids, ids_of(cell, len(vectors)))
    replace(store, [VectorBatch(ids=ids, vectors=vectors)], lambda candidate: None)
    return store


@pytest.mark.parametrize(
    ("factory", "dim"),
    [
        *((factory, 1) for factory in ("Flat", "HNSW8,Flat", "IVF2,Flat", "SQ8", "IVF2,SQ8")),
        *((factory, 1) for factory in ("IDMap2,Flat", "Flat,RFlat", "PQ1x4np,RFlat")),
        *(
            (factory, 4096)
            for factory in ("Flat", "HNSW8,Flat", "IVF2,Flat", "SQfp16", "L2norm,Flat")
        ),
        *((factory, 4096) for factory in ("IVF2,PQ16x4,RFlat", "PQ16x4fs,RFlat")),
    ],
)
def test_one_dimension_and_thousands(factory: str, dim: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((40, dim)).astype(np.float32)
    index = faiss.index_factory(dim, factory)
    be_quiet(index)
    index.train(rows)
    ids = np.arange(40) * 2 if "IDMap" in factory else np.arange(40)
    if "IDMap" in factory:
        index.add_with_ids(rows, ids)
    else:
        index.add(rows)
    path = tmp_path / "rows.faiss"
    faiss.write_index(index, str(path))
    before = parameters(faiss.read_index(str(path)))
    new = rng.standard_normal((40, dim)).astype(np.float32)
    if factory.startswith("L2norm"):
        new /= np.linalg.norm(new, axis=1, keepdims=True)
    store = FaissStore(path)
    replace(store, [VectorBatch(ids=ids, vectors=new)], lambda candidate: None)
    np.testing.assert_allclose(store.fetch(ids), new, atol=0.03)
    assert parameters(faiss.read_index(str(path))) == before
