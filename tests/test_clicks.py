from __future__ import annotations

import gzip
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simskip_vdb import parsing
from simskip_vdb.clicks import combine, gather, read_clicks
from simskip_vdb.datatypes import Split
from simskip_vdb.errors import ConfigError, DataError, MissingDependencyError
from simskip_vdb.judgments import JudgmentFiles, Judgments, QuerySet
from simskip_vdb.parsing import Qrels
from simskip_vdb.resolution import resolve

VECTORS = {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [-1.0, 0.5]}
Line = dict[str, Any]
Pairs = dict[tuple[str, str], int]


def line(query: str, doc: str | int | None = None, **more: Any) -> Line:  # noqa: ANN401
    found: Line = {"id": query, "vector": VECTORS.get(query, [9.0, 9.0]), **more}
    return found if doc is None else {**found, "doc": doc}


def jsonl(path: Path, *lines: Line) -> Path:
    text = "".join(json.dumps(entry) + "\n" for entry in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def parquet(path: Path, *lines: Line) -> Path:
    names = dict.fromkeys(name for entry in lines for name in entry)
    columns = {name: [entry.get(name) for entry in lines] for name in names}
    pq.write_table(pa.table(columns), path)
    return path


def pairs_of(found: QuerySet | None) -> Pairs:
    assert found is not None
    assert found.qrels is not None
    qrels = found.qrels
    pairs = dict(zip(zip(qrels.query_ids, qrels.doc_ids, strict=True), qrels.grades, strict=True))
    assert len(pairs) == len(qrels.grades) == len(qrels.query_ids) == len(qrels.doc_ids)
    return {pair: int(grade) for pair, grade in pairs.items()}


def vectors_of(found: QuerySet | None) -> dict[str, list[float]]:
    assert found is not None
    return dict(zip(found.ids, found.vectors.tolist(), strict=True))


def test_a_folder_without_logs_is_no_clicks(tmp_path: Path) -> None:
    assert read_clicks(tmp_path) is None
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.tsv").touch()
    parquet(tmp_path / "x.parquet", line("a"))
    pq.write_table(pq.read_table(tmp_path / "x.parquet")[:0], tmp_path / "x.parquet")
    assert read_clicks(tmp_path) is None


def test_a_missing_folder_is_a_matter_of_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere cannot be listed: No such file"):
        read_clicks(tmp_path / "nowhere")


def test_logs_of_every_form_are_one_set(tmp_path: Path) -> None:
    jsonl(tmp_path / "1.jsonl", line("a", "x"), line("a", "y"), line("b", docs=["x", "z"]))
    jsonl(tmp_path / "2.jsonl.gz", line("b", "y", grade=3), line("a", "x", time="12:00"))
    parquet(tmp_path / "3.parquet", line("c", "w", grade=2), line("a", None), line("a", "z"))
    (tmp_path / "4.tsv").write_text("query-id\tcorpus-id\tscore\na\tx\t2\nnobody\tx\t1\n")
    (tmp_path / "5.tsv.gz").write_bytes(gzip.compress(b"b 0 z 0\n"))
    (tmp_path / "6.qrels").write_text("c 0 w -1\nc 0 v 5\n")
    found = read_clicks(tmp_path)
    assert vectors_of(found) == VECTORS
    assert list(vectors_of(found)) == ["a", "b", "c"]
    assert pairs_of(found) == {
        ("a", "x"): 2, ("a", "y"): 1, ("a", "z"): 1, ("b", "x"): 1, ("b", "y"): 3, ("b", "z"): 1,
        ("c", "w"): 2, ("c", "v"): 5, ("nobody", "x"): 1,
    }  # fmt: skip
    assert found is not None
    assert found.vectors.dtype == np.float32
    assert found.qrels is not None
    assert found.qrels.grades.dtype == np.int32
    assert found.option == f"judgments {tmp_path}"


def test_parquet_takes_integers_lists_and_columns_with_gaps(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": [7, 7, 8, 9],
            "vector": pa.array([[1, 2], [1, 2], [3, 4], [5, 6]], pa.list_(pa.float16(), 2)),
            "doc": pa.array([1, None, 3, None], pa.int64()),
            "docs": pa.array([None, [4, 5], [], None], pa.large_list(pa.int32())),
            "grade": pa.array([2.0, None, 1.0, 3.0], pa.float64()),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    found = read_clicks(tmp_path)
    assert vectors_of(found) == {"7": [1, 2], "8": [3, 4], "9": [5, 6]}
    assert pairs_of(found) == {("7", "1"): 2, ("7", "4"): 1, ("7", "5"): 1, ("8", "3"): 1}


def test_unfinished_and_hidden_files_and_folders_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (".x.jsonl", "x.jsonl.tmp", "x.parquet.part", "x.tmp"):
        (tmp_path / name).write_text('{"id": "a", "vec')
    (tmp_path / "older.jsonl").mkdir()
    jsonl(tmp_path / "older.jsonl" / "x.jsonl", line("b", "x"))
    jsonl(tmp_path / "x.jsonl", line("a", "x"))
    with caplog.at_level(logging.WARNING):
        assert list(vectors_of(read_clicks(tmp_path))) == ["a"]
    assert not caplog.messages


def test_files_of_other_kinds_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "clicks.xlsx").write_text("a,x")
    jsonl(tmp_path / "x.jsonl", line("a", "x"))
    read_clicks(tmp_path)
    assert "1 files are no click logs and are not read, such as clicks.xlsx" in caplog.text


def test_rounding_does_not_make_another_vector(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(384)
    for name, vector in (("1", exact), ("2", exact.astype(np.float16)), ("3", exact.round(4))):
        jsonl(tmp_path / f"{name}.jsonl", {"id": "a", "vector": vector.tolist(), "doc": name})
    found = read_clicks(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.vectors, exact.astype(np.float32)[None])
    assert len(pairs_of(found)) == 3


@pytest.mark.parametrize("apart", [1.5, -1.5])
def test_another_vector_for_an_id_names_both_files(tmp_path: Path, apart: float) -> None:
    jsonl(tmp_path / "1.jsonl", line("a", "x"), line("b", "x"))
    other = [3.0, 4.0 + apart * 1e-3 * 5.0]
    jsonl(tmp_path / "2.jsonl", line("a", "x"), {"id": "b", "vector": other})
    with pytest.raises(DataError, match=r"'b' has one vector in .*1\.jsonl and another in .*2\."):
        read_clicks(tmp_path)
    near = [3.0, 4.0 + apart * 1e-3 * 5.0 / 2]
    jsonl(tmp_path / "2.jsonl", line("a", "x"), {"id": "b", "vector": near})
    assert vectors_of(read_clicks(tmp_path))["b"] == [3, 4]


def test_another_vector_in_the_same_file_is_found(tmp_path: Path) -> None:
    jsonl(tmp_path / "1.jsonl", line("a", "x"), {"id": "a", "vector": [1, 3]})
    with pytest.raises(DataError, match="'a' has one vector"):
        read_clicks(tmp_path)


@pytest.mark.parametrize("odd", [[float("nan"), 1], [float("inf"), 1], [0, 0]])
def test_vectors_that_cannot_be_used_are_the_same_as_themselves(
    tmp_path: Path, odd: list[float]
) -> None:
    jsonl(tmp_path / "1.jsonl", {"id": "a", "vector": odd}, {"id": "a", "vector": odd})
    assert len(vectors_of(read_clicks(tmp_path))) == 1
    jsonl(tmp_path / "2.jsonl", line("a"))
    with pytest.raises(DataError, match="'a' has one vector"):
        read_clicks(tmp_path)


def test_other_dimensions_name_both_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "1.jsonl", line("a"))
    jsonl(tmp_path / "2.jsonl", {"id": "z", "vector": [1, 2, 3]})
    with pytest.raises(DataError, match=r"2\.jsonl: vectors have 3 dim.*1\.jsonl have 2"):
        read_clicks(tmp_path)


@pytest.mark.parametrize(("text", "words"), [
    ('{"id": "b", "vector": [1, 2], "do', "line 3: it is not JSON (Unterminated string"),
    ("[]", "line 3: it is not {"),
    ('{"vector": [1, 2]}', "line 3: its id is None"),
    ('{"id": true, "vector": [1, 2]}', "line 3: its id is True"),
    ('{"id": 1.5, "vector": [1, 2]}', "line 3: its id is 1.5"),
    ('{"id": "b"}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": []}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": "12"}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": ["1", "2"]}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": [1, null]}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": [true, false]}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": [[1, 2]]}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": [[1, 2], 3]}', "line 3: its vector is not a list of numbers"),
    ('{"id": "b", "vector": [1, 2, 3]}', "line 3: its vector has 3 numbers, not 2"),
    ('{"id": "b", "vector": [1, 2], "doc": ["x"]}', "line 3: its doc is ['x']"),
    ('{"id": "b", "vector": [1, 2], "docs": "x"}', "line 3: its docs are 'x', not a list"),
    ('{"id": "b", "vector": [1, 2], "docs": [null]}', "line 3: its doc is None"),
    ('{"id": "b", "vector": [1, 2], "grade": "1"}', "line 3: its grade is '1'"),
    ('{"id": "b", "vector": [1, 2], "grade": true}', "line 3: its grade is True"),
    ('{"id": "b", "vector": [1, 2], "grade": 0.5}', "line 3: its grade is 0.5"),
    ('{"id": "b", "vector": [1, 2], "grade": NaN}', "line 3: its grade is nan"),
    ('{"id": "b", "vector": [1, 2], "grade": Infinity}', "line 3: its grade is inf"),
    ('{"id": "b", "vector": [1, 2], "grade": 1001}', "line 3: its grade is above 1000"),
])  # fmt: skip
def test_malformed_lines_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", line("a", "x"))
    before = path.read_text() + "\n" + text
    path.write_text(before)
    with pytest.raises(DataError) as caught:
        read_clicks(tmp_path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert path.read_text() == before


@pytest.mark.parametrize(("columns", "words"), [
    ({"id": ["a"]}, "needs the columns id and vector"),
    ({"id": ["a"], "vector": ["x"]}, "no click log"),
    ({"id": ["a", None], "vector": [[1.0], [1.0]]}, "row 2: its id is None"),
    ({"id": [0.5], "vector": [[1.0]]}, "row 1: its id is 0.5"),
    ({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, "row 2: its vector has 2 numbers, not 1"),
    ({"id": ["a", "b"], "vector": [[1.0], None]}, "row 2: its vector has 0 numbers, not 1"),
    ({"id": ["a"], "vector": [[]]}, "row 1: its vector has 0 numbers"),
    ({"id": ["a", "b"], "vector": [[1.0, 2.0], [1.0, None]]}, "row 2: a number of its vector is"),
    ({"id": ["a"], "vector": [[1.0]], "docs": ["x"]}, "row 1: its docs are 'x'"),
    ({"id": ["a"], "vector": [[1.0]], "grade": [0.5]}, "row 1: its grade is 0.5"),
])  # fmt: skip
def test_malformed_rows_are_named(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        read_clicks(tmp_path)
    assert str(tmp_path / "x.parquet") in str(caught.value)
    assert words in str(caught.value)


def test_rows_are_counted_through_the_whole_file(tmp_path: Path) -> None:
    lines = [line("a", "x") for _ in range(3000)]
    lines[2500]["grade"] = 7000
    parquet(tmp_path / "x.parquet", *lines)
    with pytest.raises(DataError, match="row 2501: its grade is above 1000"):
        read_clicks(tmp_path)
    (tmp_path / "x.parquet").unlink()
    jsonl(tmp_path / "x.jsonl", *lines)
    with pytest.raises(DataError, match="line 2501: its grade is above 1000"):
        read_clicks(tmp_path)


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.jsonl.gz", "x.tsv"])
def test_half_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.tsv":
        path.write_text("a 0 x 1\n" * 9 + "a 0")
    else:
        whole = (parquet if name == "x.parquet" else jsonl)(path, *[line("a", "x")] * 10)
        path.write_bytes(whole.read_bytes()[: -len(whole.read_bytes()) // 3])
    with pytest.raises(DataError, match=rf"{name}"):
        read_clicks(tmp_path)


def test_pyarrow_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "x.parquet", line("a"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[eval\]"):
        read_clicks(tmp_path)


entries = st.tuples(
    st.sampled_from("abc"),
    st.none() | st.sampled_from("xyz"),
    st.none() | st.lists(st.sampled_from("xyz"), max_size=2),
    st.none() | st.integers(-1, 4),
)


@given(data=st.data(), files=st.lists(st.lists(entries, min_size=1, max_size=9), max_size=4))
def test_merging_is_what_a_loop_over_lines_says(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    files: list[list[tuple[str, str | None, list[str] | None, int | None]]],
) -> None:
    folder = tmp_path_factory.mktemp("clicks")
    expected: Pairs = {}
    seen: dict[str, list[float]] = {}
    for i, lines in enumerate(files):
        write = data.draw(st.sampled_from([jsonl, parquet]))
        rows = []
        for query, doc, docs, grade in lines:
            rows.append(line(query, doc=doc, docs=docs, grade=grade))
            seen.setdefault(query, VECTORS[query])
            for name in [*(docs or []), *([doc] if doc else [])]:
                value = 1 if grade is None else max(grade, 0)
                expected[query, name] = max(expected.get((query, name), 0), value)
        write(folder / f"{i}.{write.__name__}", *rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parsing, "_PENDING", data.draw(st.sampled_from([0, 3, 1 << 20])))
        found = read_clicks(folder)
    if not files:
        assert found is None
        return
    assert pairs_of(found) == expected
    assert list(vectors_of(found).items()) == list(seen.items())


def test_many_clicks_take_the_memory_of_their_queries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((500, 16)).astype(np.float32)
    drawn = rng.integers(0, 500, 200_000)
    docs = rng.integers(0, 50, 200_000)
    flat = pa.array(queries[drawn].ravel())
    table = pa.table(
        {
            "id": pa.array(np.char.mod("q%d", drawn)),
            "vector": pa.FixedSizeListArray.from_arrays(flat, 16),
            "doc": pa.array(docs),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    found = read_clicks(tmp_path)
    assert len(pairs_of(found)) == len({*zip(drawn.tolist(), docs.tolist(), strict=True)})
    assert found is not None
    assert found.vectors.base is not None
    assert len(found.vectors.base) <= 1024


def query_set(option: str, ids: str, qrels: Pairs | None) -> QuerySet:
    judged = None
    if qrels is not None:
        judged = Qrels(
            source=option,
            query_ids=[query for query, _ in qrels],
            doc_ids=[doc for _, doc in qrels],
            grades=np.array(list(qrels.values()), np.int32),
        )
    vectors = np.array([VECTORS[i] for i in ids], np.float32).reshape(-1, 2)
    return QuerySet(option=option, ids=tuple(ids), vectors=vectors, qrels=judged)


def test_files_and_clicks_are_one_set() -> None:
    ours = query_set("--queries", "ab", {("a", "x"): 1, ("a", "y"): 0, ("b", "x"): 3})
    theirs = query_set("clicks", "bc", {("b", "x"): 1, ("a", "y"): 1, ("c", "z"): 2})
    found = combine(Judgments(queries=ours, doc_id_field="sku"), theirs)
    assert found.doc_id_field == "sku"
    assert vectors_of(found.queries) == VECTORS
    assert pairs_of(found.queries) == {
        ("a", "x"): 1, ("a", "y"): 1, ("b", "x"): 3, ("c", "z"): 2,
    }  # fmt: skip
    assert found.queries is not None
    assert found.queries.option == "--queries and clicks"


def test_one_of_both_alone_stays_as_it_is() -> None:
    ours = query_set("--queries", "ab", {("a", "x"): 1})
    assert combine(Judgments(queries=ours), None).queries is ours
    found = combine(Judgments(), query_set("clicks", "bc", {("b", "x"): 1}))
    assert vectors_of(found.queries) == {key: VECTORS[key] for key in "bc"}
    assert pairs_of(found.queries) == {("b", "x"): 1}
    assert combine(Judgments(), None).queries is None


def test_queries_may_wait_for_their_judgments() -> None:
    waiting = Judgments(queries=query_set("--queries", "ab", None))
    assert combine(waiting, None).queries is None
    found = combine(waiting, query_set("clicks", "", {("a", "x"): 1}))
    assert vectors_of(found.queries) == {key: VECTORS[key] for key in "ab"}
    assert pairs_of(found.queries) == {("a", "x"): 1}


def test_judgments_of_vectors_that_nobody_gave_are_refused() -> None:
    with pytest.raises(DataError, match="clicks: there are judgments and no vectors"):
        combine(Judgments(), query_set("clicks", "", {("a", "x"): 1}))


def test_another_vector_than_in_the_file_is_refused() -> None:
    ours = query_set("--queries", "ab", {("a", "x"): 1})
    theirs = QuerySet(option="clicks", ids=("a",), vectors=np.array([[2, 1]], np.float32))
    with pytest.raises(DataError, match="'a' has one vector in --queries and another in clicks"):
        combine(Judgments(queries=ours), theirs)


def test_clicks_of_queries_that_were_given_for_a_split_are_left_out() -> None:
    test = query_set("--test-queries", "a", {("a", "x"): 1})
    theirs = query_set("clicks", "abc", {("a", "y"): 1, ("b", "x"): 1, ("c", "x"): 1})
    found = combine(Judgments(test=test), theirs)
    assert found.test is test
    assert list(vectors_of(found.queries)) == ["b", "c"]
    assert pairs_of(found.queries) == {("b", "x"): 1, ("c", "x"): 1}
    assert combine(Judgments(test=test), query_set("clicks", "a", {})).queries is None


def test_two_grades_in_a_file_are_refused_as_ever() -> None:
    qrels = Qrels(
        source="qrels.tsv",
        query_ids=["a", "a"],
        doc_ids=["0", "0"],
        grades=np.array([1, 2], np.int32),
    )
    ours = QuerySet(
        option="--queries", ids=("a",), vectors=np.array([[1, 2]], np.float32), qrels=qrels
    )
    found = combine(Judgments(queries=ours), query_set("clicks", "b", {("b", "1"): 1}))
    with pytest.raises(DataError, match="are judged 1 and 2"):
        resolve(found, Rows(), seed=0, assigned={})


class Rows:
    ids = np.arange(4)
    dim = 2

    def take(self, positions: np.ndarray[Any, Any], /) -> np.ndarray[Any, Any]:
        return np.ones((len(positions), 2), np.float32)


def test_files_and_a_folder_are_read_and_shared_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 2))
    for i in range(60):
        jsonl(tmp_path / f"{i}.jsonl", {"id": f"q{i}", "vector": vectors[i].tolist(), "doc": i % 4})
    files_at = tmp_path / "files"
    files_at.mkdir()
    np.save(files_at / "q.npy", vectors[:30])
    (files_at / "q.txt").write_text("".join(f"q{i}\n" for i in range(30)))
    (files_at / "d.txt").write_text("0\n1\n2\n3\n")
    files = JudgmentFiles(
        queries=files_at / "q.npy", query_ids=files_at / "q.txt", doc_ids=files_at / "d.txt"
    )
    with pytest.raises(ConfigError, match="--queries needs --qrels"):
        gather(files, None)
    resolved = resolve(gather(files, tmp_path), Rows(), seed=0, assigned={})
    assert sorted(name for split in Split for name in resolved.queries[split].ids) == sorted(
        f"q{i}" for i in range(60)
    )
