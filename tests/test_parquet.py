"""Parquet files as a store: what stays as it was, what is refused, and the way there and back."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import random_refiner
from faiss_files import replace
from parquet_files import raw_rows, write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.parquet_file import ParquetFile
from simskip_vdb.datatypes import Metric, Vectors
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
)

N, D = 90, 8
IDS = np.arange(N) * 7


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.normal(size=(N, D)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, vectors: Vectors) -> Path:
    """Three files of 30 rows with payload."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for part in range(3):
        rows = slice(30 * part, 30 * part + 30)
        columns = {
            "sku": pa.array([f"sku-{i}" if i % 4 else None for i in IDS[rows]]),
            "at": pa.array([datetime(2024, 1, 1 + part)] * 30),
            "tags": pa.array([{"a": [1.5, None]}, None] * 15),
        }
        write_rows(folder / f"{part}.parquet", IDS[rows], vectors[rows], group=11, columns=columns)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> ss.Settings:
    random_refiner(D, IDS, metric=Metric.COSINE).save(tmp_path / "refiner")
    return ss.Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)


def refine(uri: str, settings: ss.Settings) -> None:
    report = ss.refine(open_store(uri), ss.Judgments(), settings)
    assert report.written is not None
    assert report.written["rows"] == open_store(uri).info().count


def test_a_folder_is_refined_and_restored(
    folder: Path, vectors: Vectors, settings: ss.Settings
) -> None:
    uri = f"parquet:{folder}"
    paths = sorted(folder.glob("*.parquet"))
    before = [pq.ParquetFile(path) for path in paths]
    tables = [file.read() for file in before]
    refine(uri, settings)
    assert ss.status(open_store(uri))["refined"]["refiner"]
    refiner = ss.Refiner.load(settings.refiner or "")
    for part, (path, old, table) in enumerate(zip(paths, before, tables, strict=True)):
        rows = slice(30 * part, 30 * part + 30)
        new = pq.ParquetFile(path)
        wanted = refiner.refine_rows(vectors[rows], IDS[rows])
        np.testing.assert_allclose(raw_rows(path)[1], wanted, atol=1e-6)
        assert new.schema.equals(old.schema)
        assert new.schema_arrow.metadata == old.schema_arrow.metadata == {b"made by": b"a test"}
        assert new.read().drop_columns("vector").equals(table.drop_columns("vector"))
        for number in range(3):
            old_group, new_group = old.metadata.row_group(number), new.metadata.row_group(number)
            assert new_group.num_rows == old_group.num_rows
            assert new_group.column(0).compression == "ZSTD"
    assert ss.rollback(open_store(uri))["exact"]
    assert all(
        pq.ParquetFile(path).read().equals(table) for path, table in zip(paths, tables, strict=True)
    )
    assert not list(folder.glob(".*"))


def test_a_single_file_comes_back_to_the_byte(folder: Path, settings: ss.Settings) -> None:
    path = folder / "1.parquet"
    before = sha256_of(path)
    refine(f"parquet:{path}", settings)
    assert sha256_of(path) != before
    with pytest.raises(ConfigError, match=r"1\.parquet was refined by itself"):
        open_store(f"parquet:{folder}")
    assert ss.rollback(open_store(f"parquet:{path}"))["exact"]
    assert sha256_of(path) == before


def test_a_file_of_a_refined_folder_is_not_refined_again(
    folder: Path, settings: ss.Settings
) -> None:
    refine(f"parquet:{folder}", settings)
    with pytest.raises(ConfigError, match="refined as a part of parquet:"):
        open_store(f"parquet:{folder / '1.parquet'}")
    for note in folder.glob(".*.simskip-part.parquet"):
        assert pq.ParquetFile(note).metadata.num_rows == 0
        told = pq.read_metadata(note).metadata[b"simskip"]
        (folder / note.name.removesuffix(".parquet")).write_bytes(told)  # as it was left before
        note.unlink()
    with pytest.raises(ConfigError, match="refined as a part of parquet:"):
        open_store(f"parquet:{folder / '1.parquet'}")
    assert ss.status(open_store(f"parquet:{folder}"))["refined"]["refiner"]
    assert ss.rollback(open_store(f"parquet:{folder}"))["exact"]
    assert not list(folder.glob(".*"))


def test_a_damaged_note_is_named(folder: Path, settings: ss.Settings) -> None:
    refine(f"parquet:{folder}", settings)
    (folder / ".1.parquet.simskip-part.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"simskip-part\.parquet is damaged"):
        open_store(f"parquet:{folder / '1.parquet'}")


def test_payload_columns_are_read(folder: Path) -> None:
    for uri in (f"parquet:{folder}", f"parquet:{folder / '0.parquet'}"):
        batches = list(open_store(uri).scan(7, fields=["sku", "tags"]))
        read = [value for batch in batches for value in batch.fields["sku"]]
        assert read[:5] == [None, "sku-7", "sku-14", "sku-21", None]
        with pytest.raises(ConfigError, match=r"no column 'color'.*sku, at, tags"):
            open_store(uri).scan(7, fields=["color"])


def test_the_address_names_columns_and_metric(tmp_path: Path, vectors: Vectors) -> None:
    path = write_rows(tmp_path / "x.parquet", IDS, vectors)
    table = pq.ParquetFile(path).read().rename_columns(["key", "embedding"])
    pq.write_table(table, path)
    uri = f"parquet:{path}?id=key&vector=embedding&metric=dot"
    info = open_store(uri).info()
    assert (info.uri, info.metric, info.count, info.dim) == (uri, Metric.DOT, N, D)
    with pytest.raises(ConfigError, match=r"column 'vector'; there are: key.*\?vector=embedding"):
        open_store(f"parquet:{path}")
    with pytest.raises(ConfigError, match=r"no one column 'sku'; there are: key, embedding.*id=-"):
        open_store(f"parquet:{path}?id=sku&vector=embedding")
    for wrong in ("metric=hamming", "colour=red", "id"):
        with pytest.raises(ConfigError, match="after the question mark"):
            open_store(f"parquet:{path}?{wrong}")


def test_hidden_files_are_nobodys_rows(folder: Path) -> None:
    (folder / "_tmp").mkdir()
    for name in ("_tmp/3.parquet", ".4.parquet", "_5.parquet"):
        (folder / name).write_bytes((folder / "0.parquet").read_bytes())
    assert open_store(f"parquet:{folder}").info().count == N


@pytest.mark.parametrize("account", ["_delta_log", "metadata/7.metadata.json"])
def test_files_that_something_else_keeps_account_of_are_refused(folder: Path, account: str) -> None:
    (folder / account).mkdir(parents=True)
    with pytest.raises(UnsupportedIndexError, match="keeps account"):
        open_store(f"parquet:{folder}")


def test_rows_that_cannot_be_refined_are_refused(tmp_path: Path, vectors: Vectors) -> None:
    def store(name: str, ids: object, rows: object) -> str:
        pq.write_table(pa.table({"id": ids, "vector": rows}), tmp_path / name)
        return f"parquet:{tmp_path / name}"

    lists = pa.list_(pa.float32())
    some, good = pa.array([1, 2]), pa.array([[1.0, 2.0], [3.0, 4.0]], lists)
    with pytest.raises(UnsupportedIndexError, match=r"int64.*lists of float16, float32 or"):
        open_store(store("whole.parquet", some, pa.array([[1], [2]])))
    with pytest.raises(UnsupportedIndexError, match="ids are integers or text"):
        open_store(store("float.parquet", pa.array([1.5, 2.5]), good))
    with pytest.raises(DataError, match="1 rows have no 'id'"):
        open_store(store("null.parquet", pa.array([1, None]), good))
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\).*a list of 2 numbers.*others 1"):
        open_store(store("uneven.parquet", some, pa.array([[1.0], [1.0, 2.0]], lists)))
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\).*a number missing"):
        open_store(store("gap.parquet", some, pa.array([[1.0, 2.0], [1.0, None]], lists)))
    with pytest.raises(DataError, match=r"1 ids \(such as 7\) in the column 'id'.*\?id=-"):
        open_store(store("twice.parquet", pa.array([7, 7]), good))
    assert open_store(store("twice.parquet", pa.array([7, 7]), good) + "?id=-").info().count == 2
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(StoreError, match=r"no\.parquet"):
        open_store(f"parquet:{tmp_path / 'no.parquet'}")
    with pytest.raises(StoreNotFoundError):
        open_store(f"parquet:{tmp_path / 'gone.parquet'}")


def test_columns_that_could_not_be_written_back_are_refused(
    tmp_path: Path, vectors: Vectors
) -> None:
    path, none = tmp_path / "x.parquet", pa.array([[]] * N, pa.list_(pa.float32()))
    table = pq.ParquetFile(write_rows(path, IDS, vectors)).read()
    near, far = datetime(1900, 1, 1), datetime(9999, 12, 31)

    def times(last: datetime) -> pa.Table:
        seconds = pa.array([near] * (N - 1) + [last], pa.timestamp("us"))
        nested = pa.StructArray.from_arrays([seconds], ["at"])
        return table.append_column("when", nested).append_column("at", seconds)

    pq.write_table(times(near), path, use_deprecated_int96_timestamps=True)
    store = open_store(f"parquet:{path}")
    assert isinstance(store, ParquetFile)
    replace(store, store.scan(100), lambda _: None, keep=None, expected=store.sha256())
    assert pq.ParquetFile(path).read()["at"].to_pylist() == [near] * N
    pq.write_table(times(far), path, use_deprecated_int96_timestamps=True, row_group_size=70)
    with pytest.raises(UnsupportedIndexError, match="holds times of 96 bits"):
        open_store(f"parquet:{path}")
    pq.write_table(table.append_column("a", table["id"]).append_column("a", table["id"]), path)
    with pytest.raises(UnsupportedIndexError, match="several columns are called 'a'"):
        open_store(f"parquet:{path}")
    pq.write_table(table.set_column(1, "vector", none), path)
    with pytest.raises(DataError, match="no row has a number"):
        open_store(f"parquet:{path}")


def test_a_folder_may_be_called_as_a_file_is(folder: Path) -> None:
    (folder / "more.parquet").mkdir()
    (folder / "0.parquet").rename(folder / "more.parquet" / "part-0.parquet")
    assert open_store(f"parquet:{folder}").info().count == N


def test_files_that_do_not_fit_together_are_refused(folder: Path, vectors: Vectors) -> None:
    extra = folder / "9.parquet"
    write_rows(extra, IDS[:2], vectors[:2])
    with pytest.raises(DataError, match=r"2 ids \(such as 0\)"):
        open_store(f"parquet:{folder}")
    write_rows(extra, IDS[:2] + 1, vectors[:2, 1:])
    with pytest.raises(DataError, match=r"9\.parquet has 7 and cosine"):
        open_store(f"parquet:{folder}")
    write_rows(extra, np.array([b"a", b"b"], "S44"), vectors[:2])
    with pytest.raises(DataError, match="text in some files"):
        open_store(f"parquet:{folder}")
