"""Files that other people's programs really wrote: refined in place, read by their own, undone."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import random_refiner

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Metric, id_names

N, D = 60, 6
NAMES = [f"straße-{i}" for i in range(N)]
LANGS = ["de", "fr", None]

Given = tuple[Path, Any]
"""Where to write, and numbers, shape (N, D), float64."""
Wrote = tuple[str, list[str], Callable[[], Any]]
"""The address, the names of the ids in order, and what reads the vectors back by the writer."""


@pytest.fixture
def given(tmp_path: Path, rng: np.random.Generator) -> Given:
    return tmp_path, rng.normal(size=(N, D))


def pandas_lists(given: Given) -> Wrote:
    pandas = pytest.importorskip("pandas")
    place, numbers = given
    frame = pandas.DataFrame({"id": NAMES, "vector": list(numbers), "lang": LANGS * (N // 3)})
    frame.to_parquet(place / "rows.parquet")
    read = lambda: np.stack(pandas.read_parquet(place / "rows.parquet")["vector"])  # noqa: E731
    return f"parquet:{place}/rows.parquet", NAMES, read


def pandas_category_and_index(given: Given) -> Wrote:
    pandas = pytest.importorskip("pandas")
    place, numbers = given
    frame = pandas.DataFrame({
        "id": pandas.Categorical(NAMES), "vector": list(numbers.astype(np.float32)),
        "at": pandas.date_range("2024", periods=N, tz="Europe/Berlin"),
    })  # fmt: skip
    frame.set_index("at").to_parquet(place / "rows.parquet", compression="gzip")
    read = lambda: np.stack(pandas.read_parquet(place / "rows.parquet")["vector"])  # noqa: E731
    return f"parquet:{place}/rows.parquet", NAMES, read


def pandas_columns(given: Given) -> Wrote:
    pandas = pytest.importorskip("pandas")
    place, numbers = given
    frame = pandas.DataFrame(numbers, columns=[str(i) for i in range(D)])
    frame.to_parquet(place / "rows.parquet")
    read = lambda: pandas.read_parquet(place / "rows.parquet").to_numpy()  # noqa: E731
    return f"parquet:{place}/rows.parquet?vector=*", [str(i) for i in range(N)], read


def pandas_partitions(given: Given) -> Wrote:
    pandas = pytest.importorskip("pandas")
    place, numbers = given
    frame = pandas.DataFrame({"id": NAMES, "vector": list(numbers), "lang": ["a", "b/c"] * 30})
    frame.to_parquet(place / "rows", partition_cols=["lang"])
    read = lambda: np.stack(pandas.read_parquet(place / "rows")["vector"])  # noqa: E731
    return f"parquet:{place}/rows", [*NAMES[::2], *NAMES[1::2]], read


def polars_lists(given: Given) -> Wrote:
    polars = pytest.importorskip("polars")
    place, numbers = given
    frame = polars.DataFrame({"id": NAMES, "vector": numbers.tolist(), "lang": LANGS * (N // 3)})
    frame.with_columns(polars.col("lang").cast(polars.Categorical)).write_parquet(
        place / "rows.parquet", row_group_size=17
    )
    read = lambda: polars.read_parquet(place / "rows.parquet")["vector"].to_list()  # noqa: E731
    return f"parquet:{place}/rows.parquet", NAMES, read


def polars_array(given: Given) -> Wrote:
    polars = pytest.importorskip("polars")
    place, numbers = given
    array = polars.Series(
        "vector", numbers.astype(np.float32), dtype=polars.Array(polars.Float32, D)
    )
    frame = polars.DataFrame({"id": polars.Series(range(N), dtype=polars.UInt64)})
    frame = frame.with_columns(array, struct=polars.struct("id"))
    frame.write_parquet(place / "rows.parquet", compression="lz4", statistics=False)
    read = lambda: polars.read_parquet(place / "rows.parquet")["vector"].to_list()  # noqa: E731
    return f"parquet:{place}/rows.parquet", [str(i) for i in range(N)], read


def polars_partitions(given: Given) -> Wrote:
    polars = pytest.importorskip("polars")
    place, numbers = given
    frame = polars.DataFrame({"id": NAMES, "vector": numbers.tolist(), "lang": ["a", "b"] * 30})
    frame.write_parquet(place / "rows", partition_by="lang")
    read = lambda: polars.read_parquet(place / "rows")["vector"].to_list()  # noqa: E731
    return f"parquet:{place}/rows", [*NAMES[::2], *NAMES[1::2]], read


def _duckdb(given: Given, vector: str, key: str, names: list[str], options: str = "") -> Wrote:
    duckdb = pytest.importorskip("duckdb")
    place, numbers = given
    plain = place / "given.csv"
    rows = zip(names, numbers.tolist(), strict=True)
    plain.write_text("\n".join(f'"{name}";"{row}"' for name, row in rows))
    db = duckdb.connect()
    select = (
        f"SELECT column0::{key} AS id, column1::{vector} AS vector, "
        "'x' AS lang, now() AS at, 5::HUGEINT AS large "
        f"FROM read_csv('{plain}', delim=';', header=false, all_varchar=true)"
    )
    partition = "PARTITION_BY" in options
    target = place / ("rows" if partition else "rows.parquet")
    db.execute(f"COPY ({select}) TO '{target}' (FORMAT parquet{options})")
    files = f"{target}/*/*.parquet" if partition else str(target)
    query = f"SELECT vector FROM read_parquet('{files}')"
    return (
        f"parquet:{target}", names,
        lambda: [row[0] for row in duckdb.connect().execute(query).fetchall()],
    )  # fmt: skip


def duckdb_doubles(given: Given) -> Wrote:
    return _duckdb(given, "DOUBLE[]", "VARCHAR", NAMES)


def duckdb_array(given: Given) -> Wrote:
    return _duckdb(given, f"FLOAT[{D}]", "BIGINT", [str(i - 9) for i in range(N)],
                   ", COMPRESSION zstd, PARQUET_VERSION v2")  # fmt: skip


def duckdb_uuid(given: Given) -> Wrote:
    names = [str(uuid.UUID(int=(i + 1) << 90)) for i in range(N)]
    return _duckdb(given, "FLOAT[]", "UUID", names)


def duckdb_blob(given: Given) -> Wrote:
    return _duckdb(given, "FLOAT[]", "BLOB", [f"b-{i}" for i in range(N)])


def duckdb_decimal(given: Given) -> Wrote:
    return _duckdb(given, "FLOAT[]", "DECIMAL(38,0)", [str(10**30 + i) for i in range(N)])


def duckdb_partitions(given: Given) -> Wrote:
    return _duckdb(given, "DOUBLE[]", "VARCHAR", NAMES, ", PARTITION_BY (lang)")


def datasets_floats(given: Given) -> Wrote:
    datasets = pytest.importorskip("datasets")
    place, numbers = given
    rows = {"id": NAMES, "vector": numbers.tolist(), "text": [f"text {i}" for i in range(N)]}
    datasets.Dataset.from_dict(rows).to_parquet(str(place / "train-00000-of-00001.parquet"))
    read = lambda: datasets.Dataset.from_parquet(  # noqa: E731
        str(place / "train-00000-of-00001.parquet"), cache_dir=str(place / uuid.uuid4().hex)
    )["vector"][:]
    return f"parquet:{place}/train-00000-of-00001.parquet", NAMES, read


def datasets_features(given: Given) -> Wrote:
    datasets = pytest.importorskip("datasets")
    place, numbers = given
    features = datasets.Features({
        "embedding": datasets.Sequence(datasets.Value("float32"), length=D),
        "label": datasets.ClassLabel(names=["a", "b"]),
    })  # fmt: skip
    rows = {"embedding": numbers.tolist(), "label": [0, 1] * (N // 2)}
    path = place / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    read = lambda: datasets.Dataset.from_parquet(  # noqa: E731
        str(path), cache_dir=str(place / uuid.uuid4().hex)
    )["embedding"][:]
    return f"parquet:{path}?vector=embedding", [str(i) for i in range(N)], read


def lancedb_table(given: Given) -> Wrote:
    lancedb = pytest.importorskip("lancedb")
    place, numbers = given
    rows = [{"id": n, "vector": v} for n, v in zip(NAMES, numbers.tolist(), strict=True)]
    table = lancedb.connect(str(place / "db")).create_table("rows", rows)
    pq.write_table(table.to_arrow(), place / "rows.parquet")

    def read() -> Any:  # noqa: ANN401
        again = lancedb.connect(str(place / uuid.uuid4().hex))
        new = again.create_table("rows", pq.ParquetFile(place / "rows.parquet").read())
        return new.to_arrow()["vector"].to_pylist()

    return f"parquet:{place}/rows.parquet", NAMES, read


def spark_folder(given: Given) -> Wrote:
    session = _spark()
    place, numbers = given
    rows = list(zip(NAMES, numbers.tolist(), [b"x"] * N, strict=True))
    frame = session.createDataFrame(rows, "id string, vector array<double>, raw binary")
    frame.coalesce(2).write.parquet(str(place / "rows"))
    read = lambda: [r["vector"] for r in session.read.parquet(str(place / "rows")).collect()]  # noqa: E731
    return f"parquet:{place}/rows", NAMES, read


def spark_partitions(given: Given) -> Wrote:
    session = _spark()
    place, numbers = given
    rows = [(i, v, i % 2) for i, v in enumerate(numbers.astype(np.float32).tolist())]
    frame = session.createDataFrame(rows, "id long, vector array<float>, lang int")
    frame.coalesce(1).write.option("compression", "gzip").partitionBy("lang").parquet(
        str(place / "rows")
    )
    read = lambda: [r["vector"] for r in session.read.parquet(str(place / "rows")).collect()]  # noqa: E731
    return f"parquet:{place}/rows", [str(i) for i in [*range(0, N, 2), *range(1, N, 2)]], read


def _spark() -> Any:  # noqa: ANN401
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    build = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    return build.config("spark.sql.shuffle.partitions", "1").getOrCreate()


WRITERS = [
    pandas_lists, pandas_category_and_index, pandas_columns, pandas_partitions,
    polars_lists, polars_array, polars_partitions,
    duckdb_doubles, duckdb_array, duckdb_uuid, duckdb_blob, duckdb_decimal, duckdb_partitions,
    datasets_floats, datasets_features, lancedb_table, spark_folder, spark_partitions,
]  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_a_writer_wrote_goes_there_and_back(
    write: Callable[[Given], Wrote], given: Given
) -> None:
    uri, names, read = write(given)
    place = given[0]
    store = open_store(uri)
    ids = np.concatenate([batch.ids for batch in store.scan(13)])
    assert sorted(id_names(ids)) == sorted(names)
    info, before = store.info(), [np.array(row) for row in read()]
    paths = _files(uri)
    tables = [pq.ParquetFile(path).read() for path in paths]
    random_refiner(D, np.sort(ids), metric=Metric.COSINE).save(place / "refiner")
    settings = ss.Settings(refiner=place / "refiner", accept_unmeasured=True)
    assert ss.refine(store, ss.Judgments(), settings).written is not None
    originals = np.stack(before).astype(np.float32)
    after = np.stack([np.array(row) for row in read()])
    assert after.shape == (info.count, D)
    unmoved = (after == originals).all(axis=1)
    assert not unmoved.any()
    np.testing.assert_allclose(
        np.linalg.norm(after, axis=1), np.linalg.norm(originals, axis=1), rtol=1e-5
    )
    ss.rollback(open_store(uri))
    back = [np.array(row) for row in read()]
    assert all(np.array_equal(one, other) for one, other in zip(back, before, strict=True))
    for path, table in zip(paths, tables, strict=True):
        assert pq.ParquetFile(path).read().equals(table)


def _files(uri: str) -> list[Path]:
    path = Path(uri.removeprefix("parquet:").partition("?")[0])
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
