"""Every kind of FAISS index that is told of in docs/faiss.md: refined and restored, or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import machine
import numpy as np
import pytest
from builders import random_refiner
from faiss_cells import CELLS, FULL, IP, SMALL, Cell, Expect, ids_of
from faiss_files import replace
from faiss_types import DOCS, make_refiner, make_rows, table
from faiss_walk import id_order, learned, parameters, walk
from machine import RESULTS

from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import Metric, VectorBatch, Vectors
from simskip_vdb.errors import DataError, SimskipError, UnsupportedIndexError
from simskip_vdb.journal import Journal
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import rollback, snapshot, write
from simskip_vdb.store import VectorStore

BY_NAME = {cell.name: cell for cell in CELLS}
GOOD = [cell.name for cell in CELLS if cell.expect is not Expect.REFUSES]
LOSSY = [cell.name for cell in CELLS if cell.expect is Expect.NEEDS_ORIGINALS]
REFUSED = [cell.name for cell in CELLS if cell.expect is Expect.REFUSES]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def rows() -> Vectors:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((20, SMALL.dim)) * 2
    noise = rng.standard_normal((SMALL.rows, SMALL.dim))
    return (centres[rng.integers(0, 20, SMALL.rows)] + noise).astype(np.float32)


@pytest.fixture(scope="module")
def files(rows: Vectors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build each kind once."""
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[str, Path] = {}
    for number, cell in enumerate(CELLS):
        index = cell.build(SMALL, rows)
        tune(index, cell)
        made[cell.name] = folder / f"{number}.faiss"
        faiss.write_index(index, str(made[cell.name]))
    return made


def tune(index: Any, cell: Cell) -> None:  # noqa: ANN401
    """Set search parameters to what no constructor sets."""
    for _, part in walk(index):
        for name, value in cell.params.items():
            if hasattr(part, name):
                setattr(part, name, value - 1)


class Case:
    """A kind's file, copied, with all that is needed to refine it."""

    def __init__(self, cell: Cell, file: Path, rows: Vectors, folder: Path) -> None:
        self.cell = cell
        self.path = Path(shutil.copy(file, folder / "rows.faiss"))
        self.originals = folder / "originals.npy"
        self.folder = folder
        self.rows = rows
        np.save(self.originals, rows[np.isin(ids_of(cell, len(rows)), self.ids())])

    def ids(self) -> Any:  # noqa: ANN401
        index = faiss.read_index(str(self.path))
        kept = id_order(index)
        ids = [kept[path] for path in sorted(kept, key=len)]
        return ids[0] if ids and self.cell.custom else np.arange(len(self.rows))

    def open(self) -> VectorStore:
        given = self.originals if self.cell.expect is Expect.NEEDS_ORIGINALS else None
        return open_store(str(self.path), originals=given)

    def refine(self, store: VectorStore, refiner: Refiner | None = None) -> Refiner:
        with Journal(self.folder / "state", store.info()) as journal:
            found = snapshot(store, journal)
            refiner = refiner or random_refiner(
                found.rows.dim, found.rows.ids, metric=Metric(store.info().metric)
            )
            refiner.save(journal.refiners / refiner.id)
            write(
                store,
                found,
                lambda start, block: refiner.refine_rows(
                    block, found.rows.ids[start : start + len(block)]
                ),
                journal=journal,
                refiner=refiner,
                accept=lambda candidate: None,
                summary={},
            )
        return refiner


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def case(
    request: pytest.FixtureRequest, files: dict[str, Path], rows: Vectors, tmp_path: Path
) -> Case:
    cell = BY_NAME[request.param]
    return Case(cell, files[cell.name], rows, tmp_path)


@pytest.mark.parametrize("case", GOOD, indirect=True)
def test_it_is_refined_and_restored(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    before = sha(case.path)
    old = faiss.read_index(str(case.path))
    store = case.open()
    originals = np.load(case.originals)
    refiner = case.refine(store)
    assert capfd.readouterr() == ("", "")

    new = faiss.read_index(str(case.path))
    assert parameters(new) == parameters(old)
    for path, ids in id_order(old).items():
        np.testing.assert_array_equal(id_order(new)[path], ids)
    _check_learned(learned(old), learned(new), old)
    _check_rows(case, store, refiner, originals)

    case.refine(store, refiner)  # from the originals, so that nothing moves twice
    _check_rows(case, store, refiner, originals)
    with Journal(case.folder / "state", store.info()) as journal:
        assert rollback(open_store(str(case.path)), journal).exact
    assert sha(case.path) == before


def _check_learned(old: dict[str, Any], new: dict[str, Any], index: Any) -> None:  # noqa: ANN401
    parts = list(walk(index))
    rotations = {path for path, part in parts if isinstance(part, faiss.RandomRotationMatrix)}
    reductions = {path for path, part in parts if isinstance(part, faiss.PCAMatrix)}
    assert old.keys() == new.keys()
    for path, was in old.items():
        assert was.shape == new[path].shape
        owner = path.rpartition(".")[0] + "."
        if owner in rotations:
            np.testing.assert_array_equal(new[path], was)
        elif np.any(was) and owner not in reductions:  # which stay where they serve better
            assert not np.array_equal(new[path], was), f"{path} was not learned again"


def _check_rows(case: Case, store: VectorStore, refiner: Refiner, originals: Vectors) -> None:
    """Compare what is read back with what should be there, computed without a store."""
    (batch,) = store.scan(10_000)
    np.testing.assert_array_equal(batch.ids, case.ids())
    originals = _as_read(case.cell, originals)
    expected = refiner.refine_rows(originals, batch.ids)
    info = store.info()
    assert info.lossy == (case.cell.expect is Expect.NEEDS_ORIGINALS)
    error = np.linalg.norm(batch.vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)
    if info.exact:
        assert batch.vectors.tobytes() == expected.tobytes()
    elif not info.lossy:
        assert error.max() < 0.03
    else:
        cosine = (batch.vectors * expected).sum(1) / (
            np.linalg.norm(batch.vectors, axis=1) * np.linalg.norm(expected, axis=1)
        )
        assert np.median(cosine) > 0.4
        stale = (batch.vectors * originals).sum(1) / (
            np.linalg.norm(batch.vectors, axis=1) * np.linalg.norm(originals, axis=1)
        )
        assert cosine.mean() > stale.mean()


@pytest.mark.parametrize("case", GOOD, indirect=True)
def test_it_is_as_good_as_one_that_faiss_builds_from_the_refined_vectors(case: Case) -> None:
    ids = ids_of(case.cell, len(case.rows))
    refiner = random_refiner(SMALL.dim, ids)
    case.refine(case.open(), refiner)
    refined = refiner.refine_rows(_as_read(case.cell, case.rows), ids)
    fresh = case.cell.build(SMALL, refined)
    tune(fresh, case.cell)
    kept = np.isin(ids, case.ids())
    best = _nearest(case.cell, refined[::4], refined[kept], ids[kept])
    ours = _recall(best, faiss.read_index(str(case.path)).search(refined[::4], 10)[1])
    theirs = _recall(best, fresh.search(refined[::4], 10)[1])
    assert ours > theirs - 0.02


def _nearest(cell: Cell, queries: Vectors, rows: Vectors, ids: Any) -> Any:  # noqa: ANN401
    scores = queries.astype(np.float64) @ rows.T
    if cell.metric == faiss.METRIC_L2:
        scores -= (rows.astype(np.float64) ** 2).sum(1) / 2
    return ids[np.argsort(-scores, axis=1)[:, :10]]


def _recall(best: Any, found: Any) -> float:  # noqa: ANN401
    hits = [len(np.intersect1d(a, b)) for a, b in zip(best, found, strict=True)]
    return float(np.mean(hits)) / 10


def _as_read(cell: Cell, rows: Vectors) -> Vectors:
    """Return rows as the index gives them back: one that stores directions has no norms."""
    if not cell.name.startswith("L2norm"):
        return rows
    unit: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@pytest.mark.parametrize("case", LOSSY, indirect=True)
def test_lossy_codes_are_not_refined_without_originals(case: Case) -> None:
    before = sha(case.path)
    store = open_store(str(case.path))
    assert store.info().lossy
    with pytest.raises(UnsupportedIndexError, match=r"rows\.faiss: .* lossy codes.*--originals"):
        case.refine(store)
    some = VectorBatch(ids=case.ids()[:1], vectors=case.rows[:1])
    with pytest.raises(UnsupportedIndexError, match="--originals"):
        replace(FaissStore(case.path), [some], lambda candidate: None)
    assert sha(case.path) == before


@pytest.mark.parametrize("case", REFUSED, indirect=True)
def test_it_is_refused_with_the_reason(case: Case) -> None:
    before = sha(case.path)
    with pytest.raises(SimskipError, match=case.cell.reason) as error:
        case.refine(open_store(str(case.path)))
    assert isinstance(error.value, (UnsupportedIndexError, DataError))
    assert sha(case.path) == before


@pytest.mark.parametrize("factory", ["PCA64,Flat", "PCAR64,Flat", "PCAW16,Flat"])
@pytest.mark.parametrize("away", [False, True])
def test_a_reduction_is_learned_again_only_where_that_finds_more(
    factory: str, away: bool, tmp_path: Path
) -> None:
    rows = make_rows()[:2000]
    ids = np.arange(len(rows))
    new = make_refiner(Metric.DOT).refine_rows(rows, ids)
    if away:  # what was in the first dimensions is in the last
        rows = rows * np.repeat(np.array([1, 0.05], np.float32), FULL.half)
        new = np.ascontiguousarray(rows[:, ::-1])
    index, fresh = (faiss.index_factory(FULL.dim, factory, IP) for _ in range(2))
    index.train(rows)
    index.add(rows)
    path = tmp_path / "rows.faiss"
    faiss.write_index(index, str(path))
    store = open_store(str(path))
    assert isinstance(store, FaissStore)
    store.take_originals(rows)
    replace(store, [VectorBatch(ids=ids, vectors=new)], lambda candidate: None)
    after = faiss.read_index(str(path))
    for name, was in learned(index).items():
        assert np.array_equal(was, learned(after)[name]) is not away
    fresh.train(new)
    fresh.add(new)
    nearest = faiss.knn(new, new, 10, IP)[1]
    ours, theirs = (_recall(nearest, each.search(new, 10)[1]) for each in (after, fresh))
    assert ours >= theirs


@pytest.mark.parametrize("factory", ["IVF4_HNSW4,RaBitQ", "IVF4,RaBitQ"])
def test_centroids_of_a_rabitq(factory: str, rows: Vectors, tmp_path: Path) -> None:
    index = faiss.index_factory(SMALL.dim, factory, IP)
    index.train(rows)
    index.add(rows)
    path = tmp_path / "rows.faiss"
    faiss.write_index(index, str(path))
    store = open_store(str(path))
    assert isinstance(store, FaissStore)
    store.take_originals(rows)
    replace(
        store, [VectorBatch(ids=np.arange(len(rows)), vectors=rows * 2)], lambda candidate: None
    )
    new = faiss.read_index(str(path))
    norms = np.linalg.norm(new.quantizer.reconstruct_n(0, 4), axis=1)
    assert np.allclose(norms, 1) is ("HNSW" in factory)  # over a graph FAISS takes no others


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "L2norm,SQ8", "RR,HNSW16,SQ8"])
def test_ranges_cover_rows_that_were_not_learned_from(
    factory: str, rows: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simskip_vdb.connectors.faiss_training._LEAST_SAMPLE", 50)
    monkeypatch.setattr("simskip_vdb.connectors.faiss_training._POINTS_PER_CENTROID", 2)
    index = faiss.index_factory(SMALL.dim, factory)
    index.train(rows)
    index.add(rows)
    path = tmp_path / "rows.faiss"
    faiss.write_index(index, str(path))
    store = FaissStore(path)
    new = rows[:, ::-1] * np.linspace(1, 9, SMALL.rows, dtype=np.float32)[:, None]
    if factory.startswith("L2norm"):
        new /= np.linalg.norm(new, axis=1, keepdims=True)
    new = np.ascontiguousarray(new)
    replace(store, [VectorBatch(ids=np.arange(SMALL.rows), vectors=new)], lambda candidate: None)
    (batch,) = store.scan(10_000)
    assert np.abs(batch.vectors - new).max() < np.abs(new).max() * 0.02


# The table in the documentation is the one that was measured.


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    cells: dict[str, Any] = json.loads((RESULTS / "faiss_types.json").read_text())["cells"]
    return cells


def test_the_table_is_the_generated_one(measured: dict[str, Any]) -> None:
    text = DOCS.read_text()
    assert machine.with_table(text, "faiss_types", table(measured)) == text


def test_every_kind_was_measured_as_expected(measured: dict[str, Any]) -> None:
    assert list(measured) == [cell.name for cell in CELLS]
    for cell in CELLS:
        found = measured[cell.name]
        assert found["expect"] == cell.expect.value
        if cell.expect is Expect.REFUSES:
            assert cell.reason in found["refusal"]
        elif found["restored"]:
            assert found["moved"] == found["rows"]
            assert found["ann_recall"]["after"] >= found["ann_recall"]["before"] - 0.0101
