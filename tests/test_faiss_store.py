from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from faiss_files import (
    FAISS_METRIC,
    KINDS,
    Index,
    Kind,
    make_index,
    read,
    replace,
    rows_by_faiss,
    write,
    write_copy,
)

from simskip_vdb.connectors.faiss_flat import FlatFile
from simskip_vdb.connectors.faiss_open import faiss_call
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import Ids, Metric, VectorBatch, Vectors
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    StoreChangedError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
    VerificationError,
)
from simskip_vdb.store import FileBacked, VectorStore

COUNT, DIM = 60, 8
Make = Callable[..., Path]


def accept(candidate: VectorStore) -> None:
    pass


def never(candidate: VectorStore) -> None:
    raise AssertionError("the check was reached")


def batches(store: VectorStore, change: Callable[[Vectors], Vectors]) -> Iterator[VectorBatch]:
    for batch in store.scan(7):
        yield VectorBatch(ids=batch.ids, vectors=change(batch.vectors))


def shift(vectors: Vectors) -> Vectors:
    shifted: Vectors = vectors + np.float32(5)
    return shifted


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture
def make(tmp_path: Path, vectors: Vectors) -> Make:
    def make(kind: str = "flat", ids: Ids | None = None, rows: Vectors = vectors) -> Path:
        ids = np.arange(len(rows)) if ids is None else ids
        return write(make_index(KINDS[kind], ids, rows, Metric.EUCLID), tmp_path / "rows.faiss")

    return make


def folder_of(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


# Opening


def test_it_is_backed_by_a_file(make: Make) -> None:
    path = make()
    store = FaissStore(path)
    assert isinstance(store, FileBacked)
    assert (store.path, store.sha256()) == (path, sha(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        FaissStore(tmp_path / "none")
    with pytest.raises(StoreError, match="not a file"):
        FaissStore(tmp_path)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "idmap-flat", "sq8", "refine-ivfpq"])
def test_truncated_files_are_refused(make: Make, kind: str, tmp_path: Path) -> None:
    whole = make(kind).read_bytes()
    cut = tmp_path / "cut.faiss"
    for length in [*range(0, 130, 5), 25, 29, *range(130, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"cut\.faiss"):
            FaissStore(cut)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_large_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    rows = np.zeros((4000, 100), np.float32)
    rows[:, 0] = np.arange(4000)
    path = write(make_index(KINDS[kind], np.arange(4000), rows, Metric.EUCLID), tmp_path / "big")
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(StoreError, match="big"):
        FaissStore(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04\x95x", json.dumps({"embedding_dict": {}}).encode(), b"\x93NUMPY" * 40],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.pkl"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"index\.pkl"):
        FaissStore(path)


def test_a_huge_header_allocates_nothing(make: Make) -> None:
    path = make("ivf")
    content = bytearray(path.read_bytes())
    content[8:16] = (10**12).to_bytes(8, "little")
    path.write_bytes(content)
    assert FaissStore(path).info().count == COUNT  # the lists say how many rows there are


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "idmap-flat", "refine-sq8"])
def test_a_large_file_is_mapped(tmp_path: Path, kind: str, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((4000, 100)).astype(np.float32)
    ids = np.arange(4000)
    path = write(make_index(KINDS[kind], ids, rows, Metric.DOT), tmp_path / "big")
    store = FaissStore(path)
    if kind == "flat":
        assert not store._layout.root.codes.is_owned
    replace(store, batches(store, shift), accept)
    np.testing.assert_array_equal(rows_by_faiss(path)[1], shift(rows))
    np.testing.assert_array_equal(store.fetch(ids[::-1]), shift(rows)[::-1])


# Types


def index_of(factory: str, metric: int = faiss.METRIC_L2) -> Index:
    index = faiss.index_factory(DIM, factory, metric)
    rows = np.random.default_rng(0).standard_normal((700, DIM)).astype(np.float32)
    index.train(rows)
    index.add(rows)
    return index


def with_type(kind: type, *args: Any) -> Index:  # noqa: ANN401
    index = kind(DIM, *args)
    rows = np.random.default_rng(0).standard_normal((100, DIM)).astype(np.float32)
    index.train(rows)
    index.add(rows)
    return index


REFUSED: dict[str, tuple[Callable[[], Index], str]] = {
    "metric": (lambda: index_of("Flat", faiss.METRIC_L1), "metric"),
    "panorama": (lambda: with_type(faiss.IndexFlatL2Panorama, 4), "cannot be rebuilt"),
    "hnsw panorama": (lambda: with_type(faiss.IndexHNSWFlatPanorama, 8, 4), "cannot be rebuilt"),
    "spectral hash": (lambda: index_of("IVF2,ITQ,SH"), "cannot be rebuilt"),
    "two levels": (lambda: index_of("Residual2x4,PQ4x4"), "cannot be rebuilt"),
    "refined by an unknown": (lambda: index_of("IVF2,PQ4+4,RFlat"), "cannot be rebuilt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_types_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    build, reason = REFUSED[name]
    path = write(build(), tmp_path / "rows.faiss")
    with pytest.raises(UnsupportedIndexError, match=rf"rows\.faiss: Index\w+ .*({reason})"):
        FaissStore(path)


def test_binary_indexes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.faiss"
    faiss.write_index_binary(faiss.IndexBinaryFlat(64), str(path))
    with pytest.raises(StoreError, match=r"binary\.faiss"):
        FaissStore(path)


def test_idmap_over_ivf_after_remove_is_refused(make: Make, vectors: Vectors) -> None:
    ids = np.arange(COUNT) * 3
    index = read(make("idmap-ivf", ids))
    index.remove_ids(ids[:2])
    faiss.downcast_index(index.index).nprobe = 4
    found = index.search(vectors[10:11], 1)[1][0, 0]
    assert found != ids[10]  # FAISS itself answers wrongly
    path = make()
    write(index, path)
    with pytest.raises(UnsupportedIndexError, match="remove_ids"):
        FaissStore(path)


def test_a_refine_that_lost_rows_of_its_base_is_refused(make: Make, vectors: Vectors) -> None:
    path = make("refine-sq8")
    index = read(path)
    index.base_index.add(vectors[:1])
    write(index, path)
    with pytest.raises(UnsupportedIndexError, match="61 of its 60"):
        FaissStore(path)


# Reading


@pytest.mark.parametrize("kind", ["idmap-flat", "idmap2-flat", "idmap-hnsw", "idmap-ivf"])
def test_an_id_map_keeps_its_order(
    make: Make, kind: str, vectors: Vectors, rng: np.random.Generator
) -> None:
    ids = rng.permutation(COUNT) * 7 + 2**40
    path = make(kind, ids)
    store = FaissStore(path)
    (batch,) = store.scan(1000)
    np.testing.assert_array_equal(batch.ids, ids)
    assert batch.vectors.tobytes() == vectors.tobytes()
    replace(store, batches(store, shift), accept)
    after = read(path)
    np.testing.assert_array_equal(faiss.vector_to_array(after.id_map), ids)
    np.testing.assert_array_equal(store.fetch(ids), shift(vectors))


@pytest.mark.parametrize("kind", ["ivf", "ivf-hash"])
def test_an_ivf_with_holes_goes_by_ascending_id(
    make: Make, kind: str, vectors: Vectors, rng: np.random.Generator
) -> None:
    ids = rng.permutation(COUNT) * 7
    index = read(make(kind, ids))
    index.remove_ids(ids[:5])
    path = make()
    write(index, path)
    store = FaissStore(path)
    left = np.arange(5, COUNT)[np.argsort(ids[5:])]
    for change in (lambda v: v, shift):
        replace(store, batches(store, change), accept)
        (batch,) = store.scan(1000)
        np.testing.assert_array_equal(batch.ids, ids[left])
        np.testing.assert_array_equal(batch.vectors, change(vectors[left]))
    assert store.info().kind == "IVF4 Flat, custom ids"


def test_an_array_direct_map_stays(make: Make, vectors: Vectors) -> None:
    index = read(make("ivf"))
    index.set_direct_map_type(faiss.DirectMap.Array)
    path = make()
    write(index, path)
    store = FaissStore(path)
    assert store.info().details["direct_map"] == "array"
    replace(store, batches(store, shift), accept)
    after = read(path)
    assert after.direct_map.type == faiss.DirectMap.Array
    np.testing.assert_array_equal(after.reconstruct(17), shift(vectors[17]))


def test_repeated_ids_in_an_ivf(make: Make, vectors: Vectors) -> None:
    ids = np.arange(COUNT) // 2
    store = FaissStore(make("ivf", ids))
    assert sum(len(batch) for batch in store.scan(7)) == COUNT
    with pytest.raises(DataError, match="more than once"):
        replace(store, batches(store, shift), never)


STRANGE = {
    kind: KINDS[kind]
    for kind in ("flat", "hnsw", "idmap-flat", "refine-sq8", "refine-ivfpq", "sqfp16")
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_rows_survive_bit_for_bit(make: Make, kind: str, vectors: Vectors) -> None:
    index = read(make(kind, rows=vectors))
    strange = np.zeros((4, DIM), np.float32)
    strange[1] = np.nan
    strange[2, 3] = np.inf
    strange[3, 1] = -0.0
    if kind.startswith("idmap"):
        index.add_with_ids(strange, np.arange(COUNT, COUNT + 4))
    else:
        index.add(strange)
    path = make()
    write(index, path)
    store = FaissStore(path)
    before = rows_by_faiss(path)[1]
    some = np.arange(0, COUNT, 2)
    new = vectors[some] + np.float32(1)
    replace(store, [VectorBatch(ids=some, vectors=new)], accept)
    after = rows_by_faiss(path)[1]
    untouched = np.ones(len(before), np.bool_)
    untouched[some] = False
    assert after[untouched].tobytes() == before[untouched].tobytes()
    assert not np.array_equal(after[some], before[some])


def test_an_ivf_drops_rows_that_are_not_finite_and_numbers_on(make: Make, vectors: Vectors) -> None:
    index = read(make("ivf"))
    index.add(np.full((3, DIM), np.nan, np.float32))
    path = make()
    write(index, path)
    store = FaissStore(path)
    assert store.info().count == COUNT
    replace(store, batches(store, shift), accept)
    assert read(path).ntotal == COUNT + 3
    before = sha(path)
    nan = VectorBatch(ids=np.arange(1), vectors=np.full((1, DIM), np.nan, np.float32))
    with pytest.raises(VerificationError, match="not finite"):
        replace(store, [nan], never)
    assert sha(path) == before


@pytest.mark.parametrize("kind", ["flat", "hnsw", "idmap-flat", "sqfp16"])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("dim", [1, 3])
def test_tiny_indexes(make: Make, kind: str, count: int, dim: int) -> None:
    rows = np.ones((count, dim), np.float32)
    store = FaissStore(make(kind, rows=rows))
    replace(store, batches(store, shift), accept)
    assert store.info().count == count
    assert (store.fetch(np.arange(count)) == 6).all()
    assert store.search(np.ones((1, dim), np.float32), 3, {}).ids.shape == (1, 3)


@pytest.mark.parametrize("kind", ["ivf", "sq8", "refine-pq"])
def test_too_few_rows_keep_what_was_trained(make: Make, kind: str, vectors: Vectors) -> None:
    index = read(make(kind))
    index.reset()
    if kind == "ivf":
        index.add_with_ids(vectors[:2], np.array([5, 9]))
    else:
        index.add(vectors[:2])
    path = make()
    write(index, path)
    store = FaissStore(path)
    replace(store, batches(store, lambda rows: rows * np.float32(0.5)), accept)
    assert store.info().count == 2
    (batch,) = store.scan(10)
    np.testing.assert_allclose(batch.vectors, vectors[:2] / 2, atol=2e-2)


def test_sq8_rows_do_not_drift(make: Make) -> None:
    path = make("sq8")
    store = FaissStore(path)
    before = rows_by_faiss(path)[1]
    for _ in range(3):
        replace(store, [], accept)
    np.testing.assert_allclose(rows_by_faiss(path)[1], before, atol=1e-5)


# Search


def test_parameters_hold_for_one_search_only(make: Make, vectors: Vectors) -> None:
    path = make("ivf")
    store = FaissStore(path)
    narrow = store.search(vectors, 10, {}).ids
    wide = store.search(vectors, 10, {"nprobe": 4}).ids
    assert (narrow != wide).any()
    np.testing.assert_array_equal(store.search(vectors, 10, {}).ids, narrow)
    store.search(vectors, 10, {"nprobe": 4})
    replace(store, [], accept)
    assert (store.info().details["nprobe"], read(path).nprobe) == (1, 1)


def test_parameters_by_other_names(make: Make, vectors: Vectors) -> None:
    store = FaissStore(make("hnsw"))
    low, high = (store.search(vectors, 30, {"hnsw_ef": ef}).ids for ef in (1, 200))
    assert (low != high).any()
    np.testing.assert_array_equal(store.search(vectors, 30, {"efSearch": 200}).ids, high)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"efSearch": 10}, "nprobe"),
        ({"nprobe": 0}, "number from 1"),
        ({"nprobe": 1.5}, "number from 1"),
        ({"nprobe": "4"}, "number from 1"),
        ({"nprobe": True}, "number from 1"),
    ],
)
def test_wrong_parameters_are_refused(
    make: Make, vectors: Vectors, params: dict[str, Any], message: str
) -> None:
    store = FaissStore(make("ivf"))
    with pytest.raises(ConfigError, match=message):
        store.search(vectors, 3, params)
    assert store.info().details["nprobe"] == 1


def test_threads_are_restored() -> None:
    faiss.omp_set_num_threads(3)
    try:
        with pytest.raises(StoreError), faiss_call(Path("here"), "trying"):
            raise RuntimeError("Error in f: Error: 'a == b' failed: no")
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(1)


# Rebuilding


def parameters(index: Index) -> dict[str, Any]:
    """Read every parameter that FAISS keeps in a file, at every level."""
    # Under another name: this one may be all that keeps the index alive.
    part = faiss.downcast_index(index)
    kept = {"type": type(part).__name__}
    names = (
        "ntotal d metric_type metric_arg nlist nprobe by_residual k_factor code_size is_trained "
        "polysemous_ht do_polysemous_training"
    )
    for name in names.split():
        if hasattr(part, name):
            kept[name] = getattr(part, name)
    if hasattr(part, "hnsw"):
        kept |= {n: getattr(part.hnsw, n) for n in ("efSearch", "efConstruction")}
        kept["M"] = part.hnsw.nb_neighbors(1)
    if hasattr(part, "direct_map"):
        kept["direct_map"] = part.direct_map.type
    if hasattr(part, "sq"):
        kept |= {n: getattr(part.sq, n) for n in ("qtype", "rangestat", "rangestat_arg")}
    if hasattr(part, "pq"):
        kept |= {n: getattr(part.pq, n) for n in ("M", "nbits")}
    for name in ("index", "quantizer", "storage", "base_index", "refine_index"):
        if isinstance(getattr(part, name, None), faiss.Index):
            kept |= {f"{name}.{k}": v for k, v in parameters(getattr(part, name)).items()}
    return kept


def tune(index: Index) -> None:
    """Set every parameter to something that no constructor sets."""
    index = faiss.downcast_index(index)
    for name, value in {"nprobe": 3, "k_factor": 2.5}.items():
        if hasattr(index, name):
            setattr(index, name, value)
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch, index.hnsw.efConstruction = 33, 44
    for name in ("index", "quantizer", "base_index"):
        if isinstance(getattr(index, name, None), faiss.Index):
            tune(getattr(index, name))


@pytest.mark.parametrize("metric", FAISS_METRIC)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_survive(
    kind: str, metric: Metric, vectors: Vectors, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index = make_index(KINDS[kind], np.arange(COUNT), vectors, metric)
    tune(index)
    path = write(index, tmp_path / "rows.faiss")
    before = parameters(read(path))
    assert {33, 2.5, 3} & set(before.values()) or KINDS[kind].params == {}
    store = FaissStore(path)
    capfd.readouterr()
    replace(store, batches(store, shift), accept)
    assert parameters(read(path)) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["ivf", "ivf-hnsw", "idmap-ivf", "refine-ivfpq", "refine-ivfsq"])
@pytest.mark.parametrize("metric", FAISS_METRIC)
def test_centroids_follow_the_vectors(
    kind: str, metric: Metric, vectors: Vectors, tmp_path: Path
) -> None:
    path = write(make_index(KINDS[kind], np.arange(COUNT), vectors, metric), tmp_path / "rows")
    store = FaissStore(path)
    clusters = np.eye(DIM, dtype=np.float32)[np.arange(COUNT) % 4] * np.float32(10)
    new = clusters + vectors * np.float32(0.01)
    (batch,) = store.scan(1000)
    replace(store, [VectorBatch(ids=batch.ids, vectors=new)], accept)
    index = read(path)
    inner = faiss.downcast_index(index.index) if hasattr(index, "id_map") else index
    ivf = faiss.downcast_index(inner.base_index) if hasattr(inner, "base_index") else inner
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    largest = np.sort(np.argmax(centroids, axis=1))
    np.testing.assert_array_equal(largest, [0, 1, 2, 3])
    assert [ivf.invlists.list_size(i) for i in range(4)] == [COUNT // 4] * 4


def codebook(path: Path) -> Vectors:
    index = read(path)
    centroids: Vectors = faiss.vector_to_array(faiss.downcast_index(index.base_index).pq.centroids)
    return centroids


def test_codebooks_and_ranges_follow_the_vectors(make: Make) -> None:
    path = make("refine-pq")
    before = codebook(path)
    store = FaissStore(path)
    replace(store, batches(store, shift), accept)
    assert abs(codebook(path).mean() - before.mean() - 5) < 0.2

    store = FaissStore(make("sq8"))
    replace(store, batches(store, shift), accept)
    (batch,) = store.scan(1000)
    assert batch.vectors.max() > 5


# Writing


def test_the_old_file_is_kept_as_the_same_inode(make: Make, tmp_path: Path) -> None:
    path, keep = make(), tmp_path / "kept"
    before, inode = sha(path), path.stat().st_ino
    store = FaissStore(path)
    replace(store, batches(store, shift), accept, keep=keep, expected=before)
    assert (keep.stat().st_ino, sha(keep)) == (inode, before)
    assert sha(path) != before
    assert folder_of(path) == ["kept", "rows.faiss"]

    after = sha(path)
    store.put_back(keep, expected=after)
    assert (sha(path), sha(keep)) == (before, before)
    assert path.stat().st_ino != keep.stat().st_ino
    assert store.sha256() == before
    assert folder_of(path) == ["kept", "rows.faiss"]


def test_the_old_file_is_copied_where_links_fail(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    path, keep = make(), tmp_path / "kept"
    before = sha(path)
    store = FaissStore(path)
    replace(store, batches(store, shift), accept, keep=keep, expected=before)
    assert sha(keep) == before
    write_copy(store, [], accept, output=tmp_path / "copy")
    assert folder_of(path) == ["copy", "kept", "rows.faiss"]


def test_a_name_left_by_a_killed_run_is_taken_over(make: Make, tmp_path: Path) -> None:
    path, keep = make(), tmp_path / "kept"
    (tmp_path / ".rows.faiss.simskip-new-0badcafe").write_bytes(b"half an index")
    os.link(path, keep)
    before = sha(path)
    store = FaissStore(path)
    store.sweep()
    replace(store, batches(store, shift), accept, keep=keep, expected=before)
    assert sha(keep) == before
    assert folder_of(path) == ["kept", "rows.faiss"]


def test_another_file_is_not_overwritten_by_the_old_one(make: Make, tmp_path: Path) -> None:
    path, keep = make(), tmp_path / "kept"
    keep.write_text("something else")
    before = sha(path)
    store = FaissStore(path)
    with pytest.raises(StoreError, match="kept"):
        replace(store, batches(store, shift), accept, keep=keep, expected=before)
    assert (keep.read_text(), sha(path)) == ("something else", before)
    assert folder_of(path) == ["kept", "rows.faiss"]


def test_links_and_modes_stay(make: Make, tmp_path: Path) -> None:
    path = make()
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    modes = []

    def check(candidate: VectorStore) -> None:
        (new,) = tmp_path.glob(".rows.faiss.simskip-new-*")
        modes.append(stat.S_IMODE(new.stat().st_mode))

    store = FaissStore(link)
    replace(store, batches(store, shift), check)
    assert link.is_symlink()
    assert link.resolve() == path
    assert [stat.S_IMODE(path.stat().st_mode), *modes] == [0o640, 0o640]


def test_an_owner_that_cannot_be_kept_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    if os.getuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, 1234, 1234)

    def not_permitted(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", not_permitted)
    store = FaissStore(path)
    with pytest.raises(StoreError, match="1234"):
        replace(store, batches(store, shift), never)
    monkeypatch.undo()
    replace(store, batches(store, shift), accept)
    assert path.stat().st_uid == 1234
    assert folder_of(path) == ["rows.faiss"]


def test_a_newer_file_wins(make: Make, tmp_path: Path, vectors: Vectors) -> None:
    path = make()
    theirs = write(make_index(KINDS["flat"], np.arange(1), vectors[:1], Metric.DOT), tmp_path / "b")

    def meanwhile(candidate: VectorStore) -> None:
        shutil.copy(theirs, tmp_path / "c")
        os.replace(tmp_path / "c", path)

    store = FaissStore(path)
    keep = tmp_path / "kept"
    with pytest.raises(StoreChangedError, match="somebody else"):
        replace(store, batches(store, shift), meanwhile, keep=keep, expected=sha(path))
    assert sha(path) == sha(theirs)
    assert folder_of(path) == ["b", "rows.faiss"]
    with pytest.raises(StoreChangedError):
        store.fetch(np.array([0]))
    with pytest.raises(StoreChangedError):
        next(store.scan(1))


def test_a_change_that_hides_is_found_by_its_hash(make: Make) -> None:
    path = make()
    before = sha(path)
    times = path.stat()

    def meanwhile(candidate: VectorStore) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    store = FaissStore(path)
    with pytest.raises(StoreChangedError):
        replace(store, batches(store, shift), meanwhile, keep=None, expected=before)
    with pytest.raises(StoreChangedError):
        FaissStore(path).put_back(path, expected=before)
    assert folder_of(path) == ["rows.faiss"]


@pytest.mark.parametrize("step", ["replace", "fsync", "write_index", "write_like"])
def test_a_failing_disk_loses_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path, keep = make("hnsw" if step == "write_index" else "flat"), tmp_path / "kept"
    before = sha(path)
    store = FaissStore(path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"write_index": faiss, "write_like": FlatFile}.get(step, os), step, full)
    with pytest.raises(StoreError, match=r"No space left"):
        replace(store, batches(store, shift), accept, keep=keep, expected=before)
    monkeypatch.undo()
    assert sha(path) == before
    assert folder_of(path) in (["rows.faiss"], ["kept", "rows.faiss"])
    replace(store, batches(store, shift), accept, keep=keep, expected=before)


def test_an_interrupt_after_the_swap_leaves_the_old_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, keep = make(), tmp_path / "kept"
    before = sha(path)
    swap = os.replace

    def interrupted(source: Path, target: Path) -> None:
        swap(source, target)
        raise KeyboardInterrupt

    store = FaissStore(path)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(store, batches(store, shift), accept, keep=keep, expected=before)
    assert sha(keep) == before
    assert sha(path) != before


@pytest.mark.parametrize("where", ["link", "replace"])
def test_a_kill_leaves_an_index_and_the_same_call_resumes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path, keep = make(), tmp_path / "kept"
    before = sha(path)
    store = FaissStore(path)

    class Killed(BaseException):
        pass

    def killed(*args: object) -> None:
        raise Killed

    monkeypatch.setattr(os, where, killed)
    # A killed process tidies nothing up.
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    with pytest.raises(Killed):
        replace(store, batches(store, shift), accept, keep=keep, expected=before)
    monkeypatch.undo()
    assert sha(path) == before
    assert [name for name in folder_of(path) if name.startswith(".rows.faiss.simskip-new-")]

    store = FaissStore(path)
    store.sweep()
    replace(store, batches(store, shift), accept, keep=keep, expected=before)
    assert sha(keep) == before
    assert folder_of(path) == ["kept", "rows.faiss"]


def test_read_only_stores_write_nothing_to_their_file(make: Make, tmp_path: Path) -> None:
    path = make()
    before = sha(path)
    store = FaissStore(path, read_only=True)
    with pytest.raises(ConfigError, match="reading only"):
        replace(store, [], never)
    with pytest.raises(ConfigError, match="reading only"):
        replace(store, [], never, keep=None, expected=before)
    with pytest.raises(ConfigError, match="reading only"):
        store.put_back(path, expected=before)
    write_copy(store, batches(store, shift), accept, output=tmp_path / "copy")
    assert sha(path) == before


def test_a_copy_leaves_the_file_alone(make: Make, tmp_path: Path, vectors: Vectors) -> None:
    path, output = make("ivf"), tmp_path / "copy"
    path.chmod(0o604)
    before = sha(path)
    store = FaissStore(path)
    write_copy(store, batches(store, shift), accept, output=output)
    assert sha(path) == before
    assert stat.S_IMODE(output.stat().st_mode) == 0o604
    np.testing.assert_array_equal(FaissStore(output).fetch(np.arange(COUNT)), shift(vectors))
    np.testing.assert_array_equal(store.fetch(np.arange(COUNT)), vectors)
    with pytest.raises(StoreError, match="exists already"):
        write_copy(store, [], never, output=output)


def test_a_copy_does_not_overwrite_a_file_made_meanwhile(make: Make, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    store = FaissStore(make())
    with pytest.raises(StoreError, match="exists already"):
        write_copy(store, [], lambda candidate: output.touch(), output=output)
    assert output.read_bytes() == b""
    assert folder_of(output) == ["copy", "rows.faiss"]


def test_put_back_needs_the_kept_file(make: Make, tmp_path: Path) -> None:
    path = make()
    with pytest.raises(StoreNotFoundError, match="gone"):
        FaissStore(path).put_back(tmp_path / "kept", expected=sha(path))


def test_the_hash_of_a_missing_file_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        sha256_of(tmp_path / "none")


# What is known of FAISS itself; if one of these fails, reading can become simpler.


def test_faiss_ivf_reconstruct_n_does_not_give_rows_with_custom_ids(
    vectors: Vectors, tmp_path: Path
) -> None:
    kind = Kind(factory="IVF4,Flat", positional=False)
    index = make_index(kind, np.arange(COUNT) * 3, vectors, Metric.EUCLID)
    assert not np.array_equal(index.reconstruct_n(0, COUNT), vectors)


def test_faiss_does_not_train_centroids_again(vectors: Vectors) -> None:
    index = make_index(KINDS["ivf"], np.arange(COUNT), vectors, Metric.EUCLID)
    before = index.quantizer.reconstruct_n(0, 4)
    index.reset()
    index.is_trained = False
    index.train(shift(vectors))
    np.testing.assert_array_equal(index.quantizer.reconstruct_n(0, 4), before)
