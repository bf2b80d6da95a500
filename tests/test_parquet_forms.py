"""Parquet files in the forms that people have: refined where they are, and brought back whole."""

from __future__ import annotations

import shutil
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import random_refiner
from parquet_files import COLUMNS, kinds, write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.parquet_file import ParquetFile
from simskip_vdb.datatypes import Ids, Metric, id_names
from simskip_vdb.errors import ConfigError, DataError, StoreError, UnsupportedIndexError
from simskip_vdb.rows import hash_ids

N, D = 40, 6
UUIDS = [uuid.UUID(int=(i + 1) * 0x1234567890ABCDEF1234567890) for i in range(N)]


@pytest.fixture
def numbers(rng: np.random.Generator) -> Any:  # noqa: ANN401 float64
    """Numbers with more digits than float32 holds."""
    return rng.normal(size=(N, D))


def ids_of(uri: str) -> Ids:
    return np.concatenate([batch.ids for batch in open_store(uri).scan(7)])


def refine(uri: str, place: Path, seed: int = 0) -> ss.Report:
    store = open_store(uri)
    ids = np.sort(ids_of(uri))
    refiner = place / f"refiner-{seed}"
    random_refiner(D, ids, seed, metric=Metric.COSINE).save(refiner)
    settings = ss.Settings(refiner=refiner, accept_unmeasured=True)
    report = ss.refine(store, ss.Judgments(), settings)
    assert report.written is not None
    return report


def there_and_back(uri: str, path: Path, place: Path) -> None:
    """Refine a file and undo it; nothing but vectors changes, and then nothing at all."""
    before, table = path.read_bytes(), pq.ParquetFile(path).read()
    old = pq.ParquetFile(path)
    report = refine(uri, place)
    assert report.written is not None
    assert report.written["rows"] == open_store(uri).info().count
    new = pq.ParquetFile(path)
    assert path.read_bytes() != before
    assert new.schema.equals(old.schema)
    assert new.schema_arrow.equals(old.schema_arrow, check_metadata=True)
    assert new.metadata.num_row_groups == old.metadata.num_row_groups
    after = new.read()
    vectors = {"vector", "embedding"} | {f"dim_{i}" for i in range(D)}
    others = [name for name in table.column_names if name not in vectors]
    assert after.select(others).equals(table.select(others))
    assert ss.rollback(open_store(uri))["exact"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("lists", [*kinds(D), *COLUMNS])
def test_vectors_of_every_kind(tmp_path: Path, numbers: Any, lists: str) -> None:  # noqa: ANN401
    path = tmp_path / "rows.parquet"
    write_rows(path, np.arange(N) * 3 - 30, numbers, lists=lists, group=17)
    there_and_back(f"parquet:{path}?vector=dim_*" if lists in COLUMNS else f"parquet:{path}",
                   path, tmp_path)  # fmt: skip


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("lists", ["double", "fixed double", "double columns", "half"])
@pytest.mark.parametrize("key", ["ids", "positions"])
def test_digits_come_back_row_by_row(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    lists: str,
    folder: bool,
    key: str,
) -> None:
    """An application that adds a row keeps the file of before from being put back."""
    place = tmp_path / "rows"
    place.mkdir()
    paths = [place / "a.parquet", place / "b.parquet"]
    if not folder:
        paths = paths[:1]
    given = numbers.astype(np.float16).astype(np.float64) if lists == "half" else numbers
    for part, path in enumerate(paths):
        ids = None if key == "positions" else np.arange(N) + 100 * part
        write_rows(path, ids, given * (1 + part), lists=lists, group=17)
    before = [pq.ParquetFile(path).read() for path in paths]
    uri = f"parquet:{place if folder else paths[0]}"
    uri += "?vector=dim_*" if lists in COLUMNS else ""
    refine(uri, tmp_path)
    refine(uri, tmp_path, 1)
    table = pq.ParquetFile(paths[0]).read()
    assert not table.equals(before[0])
    names = [name for name in table.column_names if name != "id"]
    late = before[0].slice(0, 1)
    for name in names:  # a row that is nobody's yet
        at = late.schema.get_field_index(name)
        late = late.set_column(
            at, late.schema.field(at), pa.array([_other(late[name])], late.schema.field(at).type)
        )
    if key == "ids":
        late = late.set_column(0, late.schema.field(0), pa.array([9999], pa.int64()))
    pq.write_table(pa.concat_tables([table, late.cast(table.schema)]), paths[0], row_group_size=17)
    ss.rollback(open_store(uri))
    for path, old in zip(paths, before, strict=True):
        assert pq.ParquetFile(path).read().slice(0, N).equals(old)
    assert pq.ParquetFile(paths[0]).read().slice(N).equals(late.cast(table.schema))


def _other(column: Any) -> Any:  # noqa: ANN401
    value = column[0].as_py()
    return [number + 1 for number in value] if isinstance(value, list) else value + 1


def test_digits_of_a_killed_run_do_no_harm(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    folder = tmp_path / "rows"
    folder.mkdir()
    path = write_rows(folder / "rows.parquet", np.arange(N), numbers, lists="double")
    before = pq.ParquetFile(path).read()
    refine(f"parquet:{folder}", tmp_path)
    (kept,) = (tmp_path / "rows.simskip" / "digits").iterdir()
    assert kept.stat().st_mode & 0o77 == 0
    with open(kept, "ab") as file:
        file.write(b"half a record")
    ss.rollback(open_store(f"parquet:{folder}"))
    assert pq.ParquetFile(path).read().equals(before)
    refine(f"parquet:{folder}", tmp_path, 1)
    assert kept.stat().st_size // (24 + 8 * D) == N
    ss.prune(open_store(f"parquet:{folder}"), final=True)
    assert kept.exists()
    ss.rollback(open_store(f"parquet:{folder}"))
    assert pq.ParquetFile(path).read().equals(before)
    assert "digits" in ss.prune(open_store(f"parquet:{folder}"), final=True)["removed"]
    assert not kept.parent.exists()


def test_doubles_that_are_floats_keep_no_digits(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rows.parquet"
    write_rows(path, np.arange(N), numbers.astype(np.float32), lists="double")
    there_and_back(f"parquet:{path}", path, tmp_path)
    assert not (tmp_path / "rows.parquet.simskip" / "digits").exists()


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pa.array([f"https://example.org/{'long/' * 60}{i}" for i in range(N)]), None),
        (pa.array([f"b{i}".encode() for i in range(N)]), None),
        (pa.array([f"b{i}".encode() for i in range(N)], pa.large_binary()), None),
        (pa.array([f"b{i}".encode() for i in range(N)], pa.binary_view()), None),
        (
            pa.array([bytes([0, 255, i]) for i in range(N)]),
            [f"0x00ff{i:02x}" for i in range(N)],
        ),
        (pa.array([bytes([0, 255, i]) for i in range(N)], pa.binary(3)),
         [f"0x00ff{i:02x}" for i in range(N)]),
        (pa.array([u.bytes for u in UUIDS], pa.uuid()), [str(u) for u in UUIDS]),
        (pa.array([Decimal(i - 5) for i in range(N)], pa.decimal128(38, 0)), None),
        (pa.array([Decimal(10**30 + i) for i in range(N)], pa.decimal128(38, 0)), None),
        (pa.array([Decimal(i) / 100 for i in range(N)], pa.decimal128(10, 2)),
         [f"{i / 100:.2f}" for i in range(N)]),
        (pa.array([2**63 + i for i in range(N)], pa.uint64()), None),
        (pa.array([-(2**63) + i for i in range(N)], pa.int64()), None),
        *[
            (pa.array(range(low, low + N), getattr(pa, kind)()), None)
            for kind, low in [("int8", -20), ("int16", -20), ("int32", -20),
                              ("uint8", 200), ("uint16", 9), ("uint32", 2**32 - N), ("uint64", 5)]
        ],
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)  # fmt: skip
def test_ids_of_every_type(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    column: Any,  # noqa: ANN401
    names: list[str] | None,
) -> None:
    path = tmp_path / "rows.parquet"
    vectors = pa.array(list(numbers.astype(np.float32)), pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": column, "vector": vectors}), path)
    found = id_names(ids_of(f"parquet:{path}"))
    held = [v.decode() if isinstance(v, bytes) else str(v) for v in column.to_pylist()] \
        if names is None else names  # fmt: skip
    assert found == held
    there_and_back(f"parquet:{path}", path, tmp_path)


def test_files_with_large_and_small_numbers_are_one_folder(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    vectors = pa.array(list(numbers.astype(np.float32)), pa.list_(pa.float32()))
    for part, first in enumerate((0, 2**63)):
        ids = pa.array(range(first, first + N), pa.uint64())
        pq.write_table(pa.table({"id": ids, "vector": vectors}), folder / f"{part}.parquet")
    uri = f"parquet:{folder}"
    assert id_names(ids_of(uri)) == [str(i) for i in (*range(N), *range(2**63, 2**63 + N))]
    tables = [pq.ParquetFile(path).read() for path in sorted(folder.iterdir())]
    refine(uri, tmp_path)
    ss.rollback(open_store(uri))
    assert [pq.ParquetFile(path).read() for path in sorted(folder.iterdir())] == tables


def test_ids_hash_the_same_whatever_the_width_of_their_type() -> None:
    short = np.array([b"a", "straße".encode()], "S44")
    assert np.array_equal(hash_ids(short, 1), hash_ids(short.astype("S400"), 1))
    long = np.array([b"a" * 60, b"a" * 61])
    assert len(np.unique(hash_ids(long, 1))) == 2


def test_without_a_column_of_ids_rows_are_positions(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rows.parquet"
    write_rows(
        path, None, numbers, group=17, columns={"sku": pa.array([f"s{i}" for i in range(N)])}
    )
    info = open_store(f"parquet:{path}").info()
    assert info.positional
    assert ids_of(f"parquet:{path}").tolist() == list(range(N))
    there_and_back(f"parquet:{path}", path, tmp_path)


def test_ids_that_come_twice_are_refused_by_name(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rows.parquet"
    write_rows(path, np.arange(N) // 2, numbers)
    with pytest.raises(DataError, match=r"20 ids \(such as 0\).*\?id=NAME.*\?id=-"):
        open_store(f"parquet:{path}")
    there_and_back(f"parquet:{path}?id=-", path, tmp_path)
    assert open_store(f"parquet:{path}?id=-").info().uri == f"parquet:{path}?id=-"


@pytest.mark.parametrize("lists", [*kinds(D), *COLUMNS])
@pytest.mark.parametrize("empty", ["null", "no number"])
def test_rows_without_a_vector_stay_as_they_are(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    lists: str,
    empty: str,
) -> None:
    path, gone = tmp_path / "rows.parquet", [0, 3, 16, 17, N - 1]
    write_rows(path, np.arange(N), numbers, lists=lists, columns={"sku": pa.array(range(N))})
    table = pq.ParquetFile(path).read()
    for name in [name for name in table.column_names if name not in ("id", "sku")]:
        values = table[name].to_pylist()
        field = table.schema.field(name)
        fixed = pa.types.is_fixed_size_list(field.type)
        nothing = None if empty == "null" or lists in COLUMNS else [None] * D if fixed else []
        kept = [nothing if i in gone else value for i, value in enumerate(values)]
        at = table.schema.get_field_index(name)
        table = table.set_column(at, field, pa.array(kept, field.type))
    pq.write_table(table, path, row_group_size=17)
    table = pq.ParquetFile(path).read()
    uri = f"parquet:{path}" + ("?vector=dim_*" if lists in COLUMNS else "")
    left = [i for i in range(N) if i not in gone]
    assert ids_of(uri).tolist() == left
    batches = list(open_store(uri).scan(7, fields=["sku"]))
    assert [sku for batch in batches for sku in batch.fields["sku"]] == left
    refine(uri, tmp_path)
    after = pq.ParquetFile(path).read()
    assert after.take(gone).equals(table.take(gone))
    assert not after.take(left).equals(table.take(left))
    assert ss.rollback(open_store(uri))["exact"]


def test_a_first_row_group_without_vectors(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rows.parquet"
    rows = [None] * 5 + list(numbers.astype(np.float32))
    vectors = pa.array(rows, pa.list_(pa.float32()))
    ids = pa.array([None] * 5 + list(range(N)), pa.int64())
    pq.write_table(pa.table({"id": ids, "vector": vectors}), path, row_group_size=5)
    assert ids_of(f"parquet:{path}").tolist() == list(range(N))
    there_and_back(f"parquet:{path}", path, tmp_path)


def test_columns_of_a_dimension_each_are_named_where_they_do_not_fit(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, None, numbers, lists="columns")
    table = pq.ParquetFile(path).read()
    with pytest.raises(ConfigError, match=r"no one column 'vector'.*\?vector=dim_\*"):
        open_store(f"parquet:{path}")
    pq.write_table(table.drop_columns("dim_3"), path)
    with pytest.raises(ConfigError, match=r"'dim_3' is missing"):
        open_store(f"parquet:{path}?vector=dim_*")
    wrong = table.set_column(2, "dim_2", pa.array(["x"] * N))
    pq.write_table(wrong, path)
    with pytest.raises(UnsupportedIndexError, match="'dim_2' holds string"):
        open_store(f"parquet:{path}?vector=dim_*")
    gap = table.set_column(2, "dim_2", pa.array([None, *range(1, N)], pa.float32()))
    pq.write_table(gap, path)
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\) has no number.*'dim_2'"):
        open_store(f"parquet:{path}?vector=dim_*")
    many = pa.table({f"c{i}": pa.array([1]) for i in range(388)})
    pq.write_table(many, path)
    with pytest.raises(ConfigError, match="no vectors are here") as caught:
        open_store(f"parquet:{path}")
    assert len(str(caught.value)) < 400 + len(str(path))


def test_numbers_beyond_float16_are_refused_before_anything_is_written(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
) -> None:
    path = tmp_path / "rows.parquet"
    write_rows(path, np.arange(N), np.full((N, D), 60000.0) * np.sign(numbers), lists="half")
    before = path.read_bytes()
    with pytest.raises(DataError, match="float16 does not hold"):
        refine(f"parquet:{path}", tmp_path)
    assert path.read_bytes() == before


def test_folders_as_every_writer_names_them(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    folder = tmp_path / "rows"
    names = [
        "lang=de/part-00000-c000.snappy.parquet", "lang=__HIVE_DEFAULT_PARTITION__/000000_0",
        "lang=a%2Fb/_day=1/data_0.PARQUET", "lang=fr/part.0.parq", "train-00000-of-00001.pq",
        "x.parquet.gzip",
    ]  # fmt: skip
    for part, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, np.arange(N) + part * N, numbers)
    (folder / "_SUCCESS").touch()
    (folder / "README.md").write_text("no rows")
    (folder / "_temporary").mkdir()
    shutil.copy(folder / names[0], folder / "_temporary" / "x.parquet")
    store = open_store(f"parquet:{folder}")
    assert store.info().count == N * len(names)
    refine(f"parquet:{folder}", tmp_path)
    ss.rollback(open_store(f"parquet:{folder}"))
    for name in names[:3]:
        (folder / name).rename(folder / f"{name}.away")
    shutil.rmtree(folder / "lang=fr")
    (folder / names[4]).unlink()
    (folder / names[5]).unlink()
    (folder / f"{names[0]}.away").rename(folder / names[0])
    (folder / f"{names[2]}.away").rename(folder / names[2])
    (folder / f"{names[1]}.away").rename(folder / names[1])
    batches = list(open_store(f"parquet:{folder}").scan(1000, fields=["lang"]))
    told = {str(batch.fields["lang"][0]) for batch in batches}
    assert told == {"de", "None", "a/b"}


def test_how_a_file_was_written_stays(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rows.parquet"
    vectors = pa.array(list(numbers.astype(np.float32)), pa.list_(pa.float32()))
    table = pa.table({
        "id": pa.array(range(N)), "vector": vectors, "name": pa.array(["x", "y"] * (N // 2)),
        "price": pa.array([Decimal(i) for i in range(N)], pa.decimal128(9, 2)),
    })  # fmt: skip
    pq.write_table(
        table, path, store_schema=False, write_statistics=["id"], write_page_index=True,
        sorting_columns=[pq.SortingColumn(0)], store_decimal_as_integer=True,
        use_dictionary=["name"], compression={"id": "gzip", "vector.list.element": "zstd"},
    )  # fmt: skip
    old = pq.ParquetFile(path).metadata
    refine(f"parquet:{path}", tmp_path)
    new = pq.ParquetFile(path).metadata
    assert new.metadata == old.metadata
    mine, theirs = new.row_group(0), old.row_group(0)
    assert mine.sorting_columns == theirs.sorting_columns
    for place in range(mine.num_columns):
        one, other = mine.column(place), theirs.column(place)
        assert (one.compression, one.physical_type, one.is_stats_set, one.has_offset_index) == (
            other.compression, other.physical_type, other.is_stats_set, other.has_offset_index
        )  # fmt: skip
        assert one.has_dictionary_page == other.has_dictionary_page


def test_types_that_could_not_be_written_back_are_refused_at_once(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "rows.parquet"
    select = "SELECT 1 AS id, [1.5::FLOAT, 2] AS vector, INTERVAL 3 DAY AS span"
    duckdb.connect().execute(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    with pytest.raises(UnsupportedIndexError, match=r"'span' .*written back as another type"):
        open_store(f"parquet:{path}")


@pytest.mark.parametrize("key", ["ids", "positions"])
@pytest.mark.parametrize("lists", ["fixed", "double", "half"])
def test_a_folder_that_was_written_in_part_is_finished_or_undone(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    lists: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = []
    for part in range(3):
        path = tmp_path / "rows" / f"{part}.parquet"
        path.parent.mkdir(exist_ok=True)
        ids = None if key == "positions" else np.arange(N) + N * part
        write_rows(path, ids, numbers + part, lists=lists)
        tables.append(pq.ParquetFile(path).read())
    uri = f"parquet:{tmp_path / 'rows'}"
    read = ParquetFile.prepared

    def interrupted(store: ParquetFile, *given: Any, **named: Any) -> Any:  # noqa: ANN401
        if store.path.name == "1.parquet":
            raise KeyboardInterrupt
        return read(store, *given, **named)

    held = np.concatenate([batch.vectors for batch in open_store(uri).scan(7)])
    for again in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(ParquetFile, "prepared", interrupted)
            with pytest.raises(KeyboardInterrupt):
                refine(uri, tmp_path)
        changed = np.concatenate([batch.vectors for batch in open_store(uri).scan(7)]) != held
        assert changed[:N].any(axis=1).all()
        assert not changed[N:].any()
        if again:
            refine(uri, tmp_path)
            refiner = ss.Refiner.load(tmp_path / "refiner-0")
            wanted = refiner.refine_rows(held, ids_of(uri))
            now = np.concatenate([batch.vectors for batch in open_store(uri).scan(7)])
            np.testing.assert_allclose(now, wanted, atol=1e-2 if lists == "half" else 1e-6)
        ss.rollback(open_store(uri))
        for path, table in zip(sorted((tmp_path / "rows").glob("*.parquet")), tables, strict=True):
            assert pq.ParquetFile(path).read().equals(table)


def test_digits_that_are_damaged_are_not_brought_back(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    folder = tmp_path / "rows"
    folder.mkdir()
    path = write_rows(folder / "rows.parquet", np.arange(N), numbers, lists="double")
    refine(f"parquet:{folder}", tmp_path)
    refined = pq.ParquetFile(path).read()
    (kept,) = (tmp_path / "rows.simskip" / "digits").iterdir()
    data = bytearray(kept.read_bytes())
    data[24] ^= 1  # the last digit of the first number
    kept.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged; restore it from a backup"):
        ss.rollback(open_store(f"parquet:{folder}"))
    assert pq.ParquetFile(path).read().equals(refined)
    data[24] ^= 1
    kept.write_bytes(data)
    ss.rollback(open_store(f"parquet:{folder}"))
    assert pq.ParquetFile(path).read()["vector"].to_pylist() == numbers.tolist()
