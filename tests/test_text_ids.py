"""Row ids of every kind that a format has: text of every type and language, and signed numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import random_refiner

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.datatypes import id_names
from simskip_vdb.errors import DataError, SimskipError, StoreError, UnsupportedIndexError
from simskip_vdb.judgments import Judgments
from simskip_vdb.parsing import read_row_column

N, D = 20, 6
NAMES = [f"straße-{i}" for i in range(N)]


def write(path: Path, column: Any, rows: Any) -> str:  # noqa: ANN401
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
    pq.write_table(pa.table({"id": column, "vector": lists}), path)
    return f"parquet:{path}?metric=dot"


@pytest.fixture
def rows(rng: np.random.Generator) -> Any:  # noqa: ANN401
    return rng.normal(size=(N, D)).astype(np.float32)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_text_of_every_type_and_language(tmp_path: Path, rows: Any, kind: str) -> None:  # noqa: ANN401
    column = pa.array(NAMES)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "string":
        column = column.cast(getattr(pa, kind)())
    path = tmp_path / "rows.parquet"
    uri = write(path, column, rows)
    before, schema = path.read_bytes(), pq.ParquetFile(path).schema_arrow
    store = open_store(uri)
    ids = np.concatenate([batch.ids for batch in store.scan(7)])
    assert id_names(ids) == NAMES
    random_refiner(D, np.sort(ids)).save(tmp_path / "refiner")
    asked = Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)
    ss.refine(store, Judgments(), asked)
    assert pq.ParquetFile(path).schema_arrow.equals(schema, check_metadata=True)
    assert pq.read_table(path)["id"].to_pylist() == NAMES
    assert ss.rollback(open_store(uri))["exact"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("column", "error"),
    [
        (pa.array([i + 0.5 for i in range(N)]), "holds double"),
        (pa.array(["a\0b"] + [f"x{i}" for i in range(N - 1)]), "zero bytes"),
        (pa.array([""] + [f"x{i}" for i in range(N - 1)]), "empty text"),
    ],
)
def test_ids_that_cannot_be_held_are_refused(
    tmp_path: Path,
    rows: Any,  # noqa: ANN401
    column: Any,  # noqa: ANN401
    error: str,
) -> None:
    uri = write(tmp_path / "rows.parquet", column, rows)
    with pytest.raises(SimskipError, match=error) as caught:
        open_store(uri)
    assert isinstance(caught.value, UnsupportedIndexError | DataError)


def test_lines_name_text_ids(tmp_path: Path) -> None:
    file = tmp_path / "labels.tsv"
    file.write_text("straße-1\tred\n007\tblue\n12\tred\n", encoding="utf-8")
    found = read_row_column(file)
    assert found.row_ids is not None
    assert id_names(found.row_ids) == ["straße-1", "007", "12"]


def test_negative_ids_are_found(tmp_path: Path, rows: Any) -> None:  # noqa: ANN401
    ids = -5 - np.arange(N)
    index = faiss.index_factory(D, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(rows, ids)
    faiss.write_index(index, str(tmp_path / "rows.faiss"))
    found = FaissStore(tmp_path / "rows.faiss").search(rows, N + 2, {})
    assert np.array_equal(np.sort(found.ids[0, :N]), np.sort(ids))
    assert np.isfinite(found.scores[:, :N]).all()
    assert (found.ids[:, N:] == -1).all()
    assert np.isneginf(found.scores[:, N:]).all()


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("ivf", "not trained"),
        ("pca", "not trained"),
        ("binary", "binary index"),
        ("lfs", "git lfs pull"),
    ],
)
def test_whole_files_that_are_no_use_are_named(tmp_path: Path, what: str, word: str) -> None:
    path = tmp_path / "rows.faiss"
    if what == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif what == "binary":
        bits = faiss.IndexBinaryFlat(64)
        bits.add(np.zeros((9, 8), np.uint8))
        faiss.write_index_binary(bits, str(path))
    else:
        index = faiss.index_factory(16, "IVF8,Flat" if what == "ivf" else "PCA8,Flat")
        faiss.write_index(index, str(path))
    with pytest.raises(StoreError, match=word):
        FaissStore(path)


@pytest.mark.parametrize(
    ("name", "other"), [("faiss.index", "docstore.json"), ("embeddings", "config")]
)
def test_folders_of_other_frameworks_open(
    tmp_path: Path,
    rows: Any,  # noqa: ANN401
    name: str,
    other: str,
) -> None:
    index = faiss.index_factory(D, "Flat")
    index.add(rows)
    faiss.write_index(index, str(tmp_path / name))
    (tmp_path / other).write_text("[]")
    assert FaissStore(tmp_path).path.name == name
