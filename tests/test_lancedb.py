from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from builders import clusters
from click.testing import CliRunner
from lancedb.index import BTree, IvfFlat

from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.connectors.lance_rows import LanceRows
from simskip_vdb.connectors.lance_store import LanceStore
from simskip_vdb.datatypes import ID_TEXT, Ids, Mask, Metric, VectorBatch, Vectors, silent
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    UnsupportedIndexError,
)
from simskip_vdb.job import Job, conflicts, identity
from simskip_vdb.store import Claimable, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract, exact_scores

N, D = 40, 4


def lists(vectors: Any) -> Any:  # noqa: ANN401 numpy to pyarrow
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def make(folder: Path, ids: Any, vectors: Any, name: str = "docs", **more: Any) -> Any:  # noqa: ANN401 lancedb
    rows = {"id": pa.array(ids), "vector": lists(vectors), **more}
    return lancedb.connect(folder).create_table(name, pa.table(rows))


def raw(folder: Path, column: str = "vector") -> tuple[list[Any], Vectors]:
    table = lancedb.connect(folder).open_table("docs").to_arrow().sort_by("id")
    numbers = np.concatenate([part.flatten().to_numpy() for part in table[column].chunks])
    return table["id"].to_pylist(), numbers.reshape(table.num_rows, -1)


class LanceContract(RowContract):
    exact = True

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "db"

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        order = np.random.default_rng(0).permutation(len(ids))
        names = [i.decode() for i in ids.tolist()] if ids.dtype.kind == "S" else ids
        kept = [names[i] for i in order.tolist()]
        make(self.folder, kept, self.stored(vectors[order]), n=pa.array(order))
        return LanceStore(self.folder, metric=metric.value)

    def stored(self, vectors: Vectors) -> Any:  # noqa: ANN401 of whatever type
        return vectors

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        ids, vectors = raw(self.folder)
        texts = isinstance(ids[0], str)
        found = np.array([i.encode() for i in ids], ID_TEXT) if texts else np.array(ids)
        return found, vectors.astype(np.float32)

    def test_abilities(self, store: VectorStore) -> None:
        assert isinstance(store, RowWritable)
        assert isinstance(store, Marked)
        assert isinstance(store, Claimable)


class TestIntegers(LanceContract):
    pass


class TestTexts(LanceContract):
    metrics = (Metric.DOT,)

    @pytest.fixture
    def ids(self) -> Ids:
        return np.array([f"{i:03}'é\"".encode() for i in range(self.count)], ID_TEXT)

    def unknown_id(self, ids: Ids) -> Ids:
        return np.array([b"nobody"], ID_TEXT)


class TestHalf(LanceContract):
    metrics = (Metric.COSINE, Metric.EUCLID)
    exact = False
    tolerance = 1e-3

    def _assert_exact_search(self, store: VectorStore, queries: Vectors, metric: Metric) -> None:
        ids, vectors = self.raw_rows(store)
        scores = exact_scores(queries.astype(np.float16).astype(np.float32), vectors, metric)
        found = store.search(queries, 10, {})
        near = np.take_along_axis(scores, np.searchsorted(ids, found.ids), axis=1)
        np.testing.assert_allclose(found.scores, near, atol=2e-3)
        np.testing.assert_allclose(near, -np.sort(-scores, axis=1)[:, :10], atol=2e-3)

    def stored(self, vectors: Vectors) -> Any:  # noqa: ANN401 float16
        return vectors.astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "db"


@pytest.fixture
def vectors() -> Vectors:
    return np.random.default_rng(5).standard_normal((N, D)).astype(np.float32)


def any_row(now: VectorBatch) -> Mask:
    return np.ones(len(now), np.bool_)


def batch(ids: Sequence[int], vectors: Vectors) -> VectorBatch:
    return VectorBatch(ids=np.array(ids), vectors=vectors.astype(np.float32))


def test_what_is_not_there(folder: Path, vectors: Vectors) -> None:
    with pytest.raises(StoreNotFoundError, match="no such file or folder"):
        open_store(f"lancedb:{folder}")
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(StoreNotFoundError, match="no LanceDB table"):
        open_store(f"lancedb:{folder}")
    make(folder, range(N), vectors)
    with pytest.raises(StoreNotFoundError, match="no table 'dogs'; it has docs"):
        open_store(f"lancedb:{folder}?table=dogs")
    make(folder, range(N), vectors, "more")
    with pytest.raises(ConfigError, match=r"\?table=NAME; it has docs, more"):
        open_store(f"lancedb:{folder}")
    with pytest.raises(ConfigError, match=r"db\?table=docs"):
        open_store(f"lancedb:{folder / 'docs.lance'}")
    (file := folder / "file").write_bytes(b"")
    with pytest.raises(UnsupportedIndexError, match="a file"):
        open_store(f"lancedb:{file}")


def test_the_address_that_it_says_opens_it(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    uri = open_store(f"lancedb:{folder}?metric=dot", filter="id > 3").info().uri
    assert uri == f"lancedb:{folder}?table=docs&column=vector&id=id&metric=dot&filter=id%20%3E%203"
    assert open_store(uri).info().uri == uri


def test_one_of_several_columns_is_named(folder: Path, vectors: Vectors) -> None:
    more = {"other": lists(vectors[:, :2]), "key": pa.array([f"k{i}" for i in range(N)])}
    make(folder, range(N), vectors, **more)
    with pytest.raises(ConfigError, match=r"\?column=NAME; vectors are in vector, other"):
        LanceStore(folder)
    with pytest.raises(ConfigError, match="no column 'x'"):
        LanceStore(folder, column="x")
    with pytest.raises(ConfigError, match=r"no column 'x'; name.*id, key"):
        LanceStore(folder, column="other", id="x")
    store = LanceStore(folder, column="other", id="key")
    assert store.info().dim == 2
    np.testing.assert_array_equal(store.fetch(np.array([b"k3"])), vectors[3:4, :2])
    with pytest.raises(DataError, match="ids are text, not int64"):
        store.fetch(np.array([3]))
    with pytest.raises(UnsupportedIndexError, match=r"'vector' holds fixed_size.*ids are integers"):
        LanceStore(folder, column="other", id="vector")


def test_which_column_of_ids_is_meant(folder: Path, vectors: Vectors) -> None:
    rows = {"v": lists(vectors), "b": pa.array(range(N)), "a": pa.array(["x"] * N)}
    lancedb.connect(folder).create_table("docs", pa.table(rows))
    with pytest.raises(ConfigError, match=r"\?id=NAME; integers or text are in b, a"):
        LanceStore(folder)
    with pytest.raises(DataError, match=r"\(such as x\) in the column 'a' stand for several rows"):
        LanceStore(folder, id="a")
    assert LanceStore(folder, id="b").info().count == N


ODD: dict[str, tuple[Any, str]] = {
    "float64": (pa.list_(pa.float64(), 2), "float64 could not be restored"),
    "bytes": (pa.list_(pa.uint8(), 2), "no vector of floats"),
    "lists": (pa.list_(pa.float32()), "lists have no fixed size"),
    "multivectors": (pa.list_(pa.list_(pa.float32(), 2)), "multivectors are not refined"),
    "struct": (pa.struct({"v": pa.list_(pa.float32(), 2)}), "columns in columns"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_refined_is_refused(folder: Path, kind: str) -> None:
    schema = pa.schema({"id": pa.int64(), "v": ODD[kind][0]})
    lancedb.connect(folder).create_table("docs", schema=schema)
    with pytest.raises(UnsupportedIndexError, match=ODD[kind][1]):
        LanceStore(folder, column="v")


def test_a_table_without_vectors(folder: Path) -> None:
    lancedb.connect(folder).create_table("docs", pa.table({"id": [1], "text": ["a"]}))
    with pytest.raises(UnsupportedIndexError, match=r"no column holds vectors.*'text' \(string\)"):
        LanceStore(folder)


def test_a_row_without_an_id(folder: Path, vectors: Vectors) -> None:
    make(folder, [None, *range(1, N)], vectors)
    with pytest.raises(DataError, match="1 rows have no 'id'"):
        LanceStore(folder)


def test_rows_without_a_vector_stay_and_do_not_count(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    table.add([{"id": 100, "vector": None}, {"id": 101, "vector": None}])
    store = LanceStore(folder)
    assert store.info().count == N
    assert sum(len(part) for part in store.scan(7)) == N
    assert len(store.peek(np.array([100, 3]))) == 1
    written = store.update(batch([100, 3], vectors[:2]), any_row)
    assert written.tolist() == [False, True]
    store.settle(silent)
    assert (store.search(vectors, N + 2, {}).ids[:, N:] == -1).all()
    table.checkout_latest()
    assert table.count_rows("vector IS NULL") == 2


def test_a_number_missing_in_a_vector(folder: Path, vectors: Vectors) -> None:
    gap = pa.array([[1.0, None], [1.0, 2.0]], pa.list_(pa.float32(), 2))
    table = pa.table({"id": [1, 2], "vector": gap})
    lancedb.connect(folder).create_table("docs", table)
    with pytest.raises(DataError, match="1 numbers missing"):
        list(LanceStore(folder).scan(7))


def test_unsigned_ids_beyond_int64(folder: Path, vectors: Vectors) -> None:
    make(folder, np.arange(2**64 - N, 2**64 - 1, dtype=np.uint64), vectors[1:])
    with pytest.raises(UnsupportedIndexError, match="int64 cannot hold"):
        LanceStore(folder)


def test_columns_come_along(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors, **{"my Text": pa.array([f"t{i}" for i in range(N)])})
    store = LanceStore(folder)
    parts = list(store.scan(7, fields=["my Text", "id"]))
    texts = [text for part in parts for text in part.fields["my Text"]]
    assert texts == [f"t{i}" for i in range(N)]
    with pytest.raises(ConfigError, match="no column 'x'; there are id, vector, my Text"):
        store.scan(7, fields=["x"])
    with pytest.raises(ConfigError, match="no row id"):
        list(store.scan(7, cursor="x"))


def test_a_scan_stays_at_the_version_where_it_began(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    scan = LanceStore(folder).scan(7)
    parts = [next(scan)]
    table.update(values={"vector": [0.0] * D})
    table.delete("id > 20")
    read = np.concatenate([part.vectors for part in [*parts, *scan]])
    np.testing.assert_array_equal(read, vectors)


def test_a_filter_narrows_everything(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors, lang=pa.array(["en", "d'e"] * (N // 2)))
    store = open_store(f"lancedb:{folder}", filter="lang = 'd''e'")
    assert isinstance(store, LanceStore)
    info = store.info()
    assert (info.count, info.partial) == (N // 2, True)
    odd = np.arange(1, N, 2)
    np.testing.assert_array_equal(next(store.scan(N)).ids, odd)
    assert np.isin(store.search(vectors, 5, {}).ids, odd).all()
    written = store.update(batch([1, 2], vectors[:2] + 1), any_row)
    assert written.tolist() == [True, False]
    assert open_store(f"lancedb:{folder}").info().state != info.state
    with pytest.raises(ConfigError, match=r"No field named nosuch.*--filter is SQL"):
        open_store(f"lancedb:{folder}", filter="nosuch = 3")


def test_the_index_says_how_vectors_are_compared(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    plain = LanceStore(folder).info()
    assert (plain.metric, plain.exhaustive, plain.kind) == (
        Metric.EUCLID,
        True,
        "LanceDB, no index",
    )
    table.create_index("vector", config=IvfFlat(distance_type="cosine", num_partitions=4))
    store = LanceStore(folder)
    info = store.info()
    assert (info.metric, info.exhaustive) == (Metric.COSINE, False)
    assert "flat" in info.kind.lower()
    with pytest.raises(ConfigError, match="compares by cosine; leave"):
        LanceStore(folder, metric="dot")
    with pytest.raises(ConfigError, match="metric is cosine, dot or euclid"):
        LanceStore(folder, metric="manhattan")
    few = store.search(vectors, N, {"nprobes": 1})
    assert (few.ids < 0).any()
    for params in ({"nprobes": 4.0, "refine_factor": 2}, {"exact": 1}, {"minimum_nprobes": 4}):
        assert (store.search(vectors, N, params).ids >= 0).all()
    assert (store.search(vectors, N, {"bypass_vector_index": 0, "nprobes": 1}).ids < 0).any()
    for bad in ({"nprobes": 0}, {"ef": 1.5}):
        with pytest.raises(ConfigError, match="whole number"):
            store.search(vectors, 3, bad)
    assert store.update(batch(range(N), vectors[::-1]), any_row).all()
    assert store.info().details["unindexed_rows"] == N
    store.settle(silent)
    assert store.info().details["unindexed_rows"] == 0
    np.testing.assert_array_equal(
        store.search(vectors, 1, {"nprobes": 4}).ids[:, 0], np.arange(N)[::-1]
    )


def test_older_versions_stay(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    store = LanceStore(folder)
    store.update(batch(range(N), vectors + 1), any_row)
    store.settle(silent)
    table.checkout(1)
    numbers = [row["vector"] for row in table.search().limit(N).to_list()]
    np.testing.assert_array_equal(np.array(numbers, np.float32), vectors)


def test_float16_has_a_largest_number(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors.astype(np.float16))
    store = LanceStore(folder)
    with pytest.raises(DataError, match="70000, which float16 cannot hold"):
        store.update(batch([1], vectors[:1] * 0 + 70_000), any_row)


def test_notes_survive_and_keep_what_is_there(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    table.update_field_metadata({"path": "vector", "metadata": {"mine": "yes"}})
    store = LanceStore(folder)
    assert (store.marker(), store.claimed()) == (None, None)
    store.mark({"refiner": "é", "n": 1})
    store.claim({"host": "h"})
    store.update(batch(range(N), vectors + 1), any_row)
    table.checkout_latest()
    table.add([{"id": 100, "vector": [1.0] * D}])
    store.settle(silent)
    again = LanceStore(folder)
    assert again.marker() == {"refiner": "é", "n": 1}
    assert again.claimed() == {"host": "h"}
    with pytest.raises(ConfigError, match=r"refined under no filter.*never refined twice"):
        open_store(f"lancedb:{folder}", filter="id > 3").marker()  # type: ignore[attr-defined]
    found = table.search([1.0] * D).limit(1).to_list()
    assert set(found[0]) == {"id", "vector", "_distance"}
    again.mark(None)
    again.claim(None)
    again.claim(None)
    assert (store.marker(), store.claimed()) == (None, None)
    table.checkout_latest()
    assert table.schema.field("vector").metadata == {b"mine": b"yes"}


def test_notes_that_are_damaged(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    table.update_field_metadata({"path": "vector", "metadata": {"simskip": "{"}})
    with pytest.raises(StoreError, match="'simskip' in the metadata of the column 'vector' is da"):
        LanceStore(folder).marker()


def test_a_store_for_reading_refuses_to_write(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    writes: tuple[Callable[[LanceStore], object], ...] = (
        lambda store: store.update(batch([1], vectors[:1]), any_row),
        lambda store: store.settle(silent),
        lambda store: store.mark(None),
        lambda store: store.claim(None),
    )
    with LanceStore(folder, read_only=True) as store:
        for write in writes:
            with pytest.raises(ConfigError, match="opened for reading only"):
                write(store)
    assert lancedb.connect(folder).open_table("docs").version == 1


def test_guards(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors, g=pa.array([None, *range(1, N)]))
    for bad in ("vector", "id", "x"):
        with pytest.raises(ConfigError, match=bad):
            LanceStore(folder, guard_field=bad)
    store = LanceStore(folder, guard_field="g")
    seen: list[Any] = []

    def allowed(now: VectorBatch) -> Mask:
        seen.extend(now.fields["g"])
        return any_row(now)

    assert store.update(batch([1, 0], vectors[:2] * 2), allowed).all()
    assert seen == [1, None]
    table.checkout_latest()
    guards = table.to_arrow().sort_by("id")["g"].to_pylist()
    assert guards == [None, *range(1, N)]


def in_place(table: Any) -> None:  # noqa: ANN401 lancedb
    rows = pa.table({"id": [1], "vector": lists(np.full((1, D), 9, np.float32))})
    table.merge_insert("id").when_matched_update_all().execute(rows)


OTHERS: dict[str, Callable[[Any], object]] = {
    "update": lambda table: table.update(where="id = 1", values={"vector": [9.0] * D}),
    "merge": in_place,
    "merge by an index": in_place,
    "delete": lambda table: table.delete("id = 1"),
    "null": lambda table: table.update(where="id = 1", values={"vector": None}),
}


@pytest.mark.parametrize("guard", [None, "g"])
@pytest.mark.parametrize("how", OTHERS)
def test_the_newer_write_wins(folder: Path, vectors: Vectors, how: str, guard: str | None) -> None:
    table = make(folder, range(N), vectors, g=pa.array(range(N)))
    if how == "merge by an index":
        table.create_index("id", config=BTree())
    store = LanceStore(folder, guard_field=guard)
    calls: list[list[int]] = []

    def allowed(now: VectorBatch) -> Mask:
        calls.append(now.ids.tolist())
        if len(calls) == 1:
            OTHERS[how](table)
        before = vectors[now.ids]
        return np.asarray((now.vectors == before).all(axis=1))

    written = store.update(batch([0, 1, 2], vectors[:3] + 5), allowed)
    assert written.tolist() == [True, False, True]
    store.settle(silent)
    table.checkout_latest()
    rows = {row["id"]: row["vector"] for row in table.search().limit(N).to_list()}
    assert rows.get(1) == {"delete": None, "null": None}.get(how, [9.0] * D)
    for row in (0, 2):
        np.testing.assert_array_equal(np.array(rows[row], np.float32), vectors[row] + 5)
    assert len(rows) == N - (how == "delete")
    assert calls[0] == [0, 1, 2]


def test_a_guard_is_compared_by_the_engine(
    folder: Path, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make(folder, range(N), vectors, g=pa.array(range(N)))
    table.create_index("id", config=BTree())
    monkeypatch.setattr(LanceRows, "_give_back", lambda *arguments: None)
    theirs = pa.table({"id": [1], "vector": lists(vectors[:1] * 0 + 9), "g": [1000]})

    def allowed(now: VectorBatch) -> Mask:
        if now.fields["g"][-1] == 2 and 1 in now.fields["g"]:
            table.merge_insert("id").when_matched_update_all().execute(theirs)
        return np.array([guard < 1000 for guard in now.fields["g"]])

    store = LanceStore(folder, guard_field="g")
    written = store.update(batch([0, 1, 2], vectors[:3] + 5), allowed)
    assert written.tolist() == [True, False, True]
    np.testing.assert_array_equal(raw(folder)[1][1], [9] * D)


def test_a_table_that_is_made_anew_meanwhile(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    store = LanceStore(folder)
    new = pa.table({"id": range(N), "vector": lists(vectors - 7)})

    def allowed(now: VectorBatch) -> Mask:
        if (now.vectors == vectors[now.ids]).all():
            lancedb.connect(folder).create_table("docs", new, mode="overwrite")
            return any_row(now)
        return np.zeros(len(now), np.bool_)

    assert not store.update(batch([0, 1], vectors[:2] + 5), allowed).any()
    np.testing.assert_array_equal(raw(folder)[1], vectors - 7)


def test_an_optimised_table_is_read_again(folder: Path, vectors: Vectors) -> None:
    table = make(folder, range(N), vectors)
    table.add([{"id": N, "vector": [1.0] * D}])
    store = LanceStore(folder)
    done: list[int] = []

    def allowed(now: VectorBatch) -> Mask:
        if not done:
            table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
        done.append(len(now))
        return any_row(now)

    assert store.update(batch([0, 1], vectors[:2] + 5), allowed).all()
    np.testing.assert_array_equal(raw(folder)[1][:2], vectors[:2] + 5)


def test_errors_of_the_engine_are_typed(folder: Path, vectors: Vectors) -> None:
    make(folder, range(N), vectors)
    store = LanceStore(folder)
    for file in folder.glob("docs.lance/data/*"):
        file.unlink()
    with pytest.raises(StoreError, match=f"lancedb:{folder}.*reading rows") as error:
        store.fetch(np.array([1]))
    assert ".rs:" not in str(error.value)


def test_the_package_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if "connectors.lance" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[lancedb\]"):
        open_store(f"lancedb:{folder}")


def test_an_older_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lancedb, "__version__", "0.37.1")
    with pytest.raises(ConfigError, match=r"lancedb 0\.37\.1.*'lancedb>=0\.38'"):
        open_store(f"lancedb:{folder}")


def test_jobs(folder: Path) -> None:
    job = Job(name="a", line=1, index=f"lancedb:{folder}?table=a", group_field="g")
    assert not list(conflicts(job))
    other = Job(name="b", line=2, index=f"lancedb:{folder}?table=b", group_field="g")
    assert identity(job) != identity(other)
    wrong = Job(name="a", line=1, index=f"lancedb:{folder}", group_field="g", mode="new-vector")
    assert any("mode new-vector is not for" in told for told in conflicts(wrong))
    told = Job(name="a", line=1, index=f"lancedb:{folder}", group_field="g", originals="o.npy")
    assert any("holds its vectors itself" in each for each in conflicts(told))


def judged(folder: Path, rng: np.random.Generator, rows: int = 600) -> list[str]:
    """Make a table that can be refined; return the options that prove it."""
    docs, asked, row_group, groups = clusters(rng, rows, 200)
    names = [f"doc-{i}" for i in range(rows)]
    texts = {"body": pa.array([f"text {i}" for i in range(rows)]), "n": pa.array(range(rows))}
    make(folder, names, docs, other=lists(docs[:, :4]), **texts)
    place = folder.parent
    np.save(place / "q.npy", asked)
    (place / "q.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    pairs = (
        (i, row) for i, group in enumerate(groups) for row in np.flatnonzero(row_group == group)
    )
    (place / "qrels.tsv").write_text("".join(f"q{i}\tdoc-{j}\t1\n" for i, j in pairs))
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    return [name if name.startswith("--") else str(place / name) for name in given]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert done.exit_code == 0, done.output
    return done.output


def contents(folder: Path) -> Any:  # noqa: ANN401 pyarrow
    return lancedb.connect(folder).open_table("docs").to_arrow().sort_by("id").combine_chunks()


def test_a_gain_is_proven_and_undone(folder: Path, rng: np.random.Generator) -> None:
    options = judged(folder, rng)
    before = contents(folder)
    address = f"lancedb:{folder}?column=vector&metric=cosine"
    assert "written: 600 rows" in run("refine", address, *options)
    after = contents(folder)
    assert after.drop_columns("vector").equals(before.drop_columns("vector"))
    old, new = (raw_vectors(table) for table in (before, after))
    assert (old != new).any(axis=1).all()
    run("rollback", address)
    assert contents(folder).equals(before)
    assert contents(folder).schema.equals(before.schema, check_metadata=True)


def raw_vectors(table: Any) -> Any:  # noqa: ANN401 numpy
    return np.array(table["vector"].to_pylist(), np.float32)


def test_a_writer_beside_it_keeps_its_rows(folder: Path, rng: np.random.Generator) -> None:
    options = judged(folder, rng)
    before = contents(folder)
    address = f"lancedb:{folder}?column=vector&metric=cosine"
    names, original = before["id"].to_pylist(), raw_vectors(before)
    chosen = rng.choice(600, 40, replace=False).tolist()
    newer = original + np.float32(0.01)
    stop = threading.Event()
    kept: list[int] = []

    def write() -> None:
        table = lancedb.connect(folder).open_table("docs")
        for at in chosen:
            if stop.wait(0.03):
                return
            table.update(where=f"id = '{names[at]}'", values={"vector": newer[at].tolist()})
            kept.append(at)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert "written: " in run("refine", address, *options)
    finally:
        stop.set()
        writer.join()
    assert kept
    run("rollback", address)
    after = contents(folder)
    expected = original.copy()
    expected[kept] = newer[kept]
    np.testing.assert_array_equal(raw_vectors(after), expected)
    assert after.drop_columns("vector").equals(before.drop_columns("vector"))


WRITER = """
import json, sys, time
from pathlib import Path
import lancedb, numpy as np
table = lancedb.connect(sys.argv[1]).open_table("docs")
rng, last, number = np.random.default_rng(3), {}, 0
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    row, number = int(rng.integers(2000)), number + 1
    table.update(where=f"id = {row}", values={"vector": [100.0 + number] * 4})
    last[row] = 100.0 + number
    time.sleep(0.03)
print(json.dumps(last))
"""


def test_a_process_that_writes_all_the_time(folder: Path, tmp_path: Path) -> None:
    vectors = np.random.default_rng(5).standard_normal((2000, D)).astype(np.float32)
    make(folder, range(2000), vectors)
    store, stop, rounds = LanceStore(folder), tmp_path / "stop", 3
    command = [sys.executable, "-c", WRITER, str(folder), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        try:
            for number in range(rounds):
                store.update(
                    batch(range(2000), np.full((2000, D), -1.0 - number)),
                    lambda now: np.asarray((now.vectors < 50).all(axis=1)),
                )
        finally:
            stop.touch()
        last = json.loads(writer.stdout.read())
    found = raw(folder)[1][:, 0]
    theirs = np.array([int(row) for row in last])
    np.testing.assert_array_equal(found[theirs], list(last.values()))
    assert (np.delete(found, theirs) == -rounds).all()


def test_a_guard_that_is_not_there_is_an_error_before_anything(
    folder: Path, vectors: Vectors
) -> None:
    make(folder, range(N), vectors)
    with pytest.raises(SimskipError, match="no column 'version'"):
        open_store(f"lancedb:{folder}?column=vector", guard_field="version")
