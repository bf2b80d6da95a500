from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simskip_vdb.errors import ConfigError, DataError, MissingDependencyError
from simskip_vdb.judgments import RULES, JudgmentFiles, Judgments, QuerySet, read_judgments
from simskip_vdb.parsing import LONGEST_LINE

VECTORS = np.arange(6, dtype=np.float64).reshape(3, 2)
BEIR = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\nq2\td 2\t0\n"
TREC = "q0 0 d0 1\nq1\t0\td1  2\nq2 0 d2 0\n"


class Folder:
    """Writes the files of a test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self, name: str, text: str) -> Path:
        (self.path / name).write_text(text, encoding="utf-8")
        return self.path / name

    def npy(self, name: str, array: Any) -> Path:  # noqa: ANN401
        np.save(self.path / name, array)
        return self.path / name

    def read(self, **changes: Path | None) -> Judgments:
        """Read good files, some of them changed or, if None, left out."""
        files: dict[str, Path | None] = {
            "queries": self.npy("good.npy", VECTORS),
            "query_ids": self.text("good.txt", "q0\nq1\nq2\n"),
            "qrels": self.text("good.tsv", BEIR),
        }
        return read_judgments(JudgmentFiles(**{**files, **changes}))


@pytest.fixture
def at(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def queries(judgments: Judgments) -> QuerySet:
    assert judgments.queries is not None
    return judgments.queries


def test_nothing_given_is_nothing_read() -> None:
    found = read_judgments(JudgmentFiles())
    given = (found.queries, found.dev, found.test, found.doc_ids, found.labels)
    assert given == (None, None, None, None, None)


def test_paths_may_be_text(at: Folder) -> None:
    at.read()
    files = JudgmentFiles(
        queries=str(at.path / "good.npy"),
        query_ids=str(at.path / "good.txt"),
        qrels=str(at.path / "good.tsv"),
    )
    assert queries(read_judgments(files)).ids == ("q0", "q1", "q2")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_of_any_float_becomes_float32(at: Folder, dtype: type[np.floating[Any]]) -> None:
    found = queries(at.read(queries=at.npy("q.npy", VECTORS.astype(dtype))))
    assert found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, VECTORS)
    assert found.ids == ("q0", "q1", "q2")
    assert found.option == "--queries"


def test_float64_beyond_float32_becomes_infinite_without_noise(at: Folder) -> None:
    found = queries(at.read(queries=at.npy("q.npy", np.full((3, 2), 1e300))))
    assert np.isinf(found.vectors).all()


def test_parquet_and_jsonl_hold_their_ids(at: Folder) -> None:
    parquet, jsonl = at.path / "q.parquet", at.path / "q.jsonl"
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.large_list(pa.float64())):
        table = pa.table({"id": [7, 8, 9], "vector": pa.array(VECTORS.tolist(), kind)})
        pq.write_table(table, parquet)
        found = queries(at.read(queries=parquet, query_ids=None))
        assert found.ids == ("7", "8", "9")
        np.testing.assert_array_equal(found.vectors, VECTORS)
    lines = [json.dumps({"id": f"q{i}", "vector": v}) for i, v in enumerate(VECTORS.tolist())]
    jsonl.write_text("\n".join(lines) + "\n\n")
    found = queries(at.read(queries=jsonl, query_ids=None))
    assert found.ids == ("q0", "q1", "q2")
    np.testing.assert_array_equal(found.vectors, VECTORS)


@pytest.mark.parametrize(
    "text", [BEIR, BEIR.replace("\n", "\r\n"), "\ufeff" + TREC, TREC, TREC + "\n\n"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_qrels_of_both_forms_plain_and_zipped(at: Folder, text: str, zipped: bool) -> None:
    path = at.path / "any.name"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    qrels = queries(at.read(qrels=path)).qrels
    assert qrels is not None
    assert qrels.query_ids == ["q0", "q1", "q2"]
    assert qrels.doc_ids == ["d0", "d1", "d2" if TREC in text else "d 2"]
    assert qrels.grades.tolist() == [1, 2, 0]
    assert qrels.grades.dtype == np.int32


def test_tsv_without_its_header_is_read_whole(at: Folder) -> None:
    qrels = queries(at.read(qrels=at.text("qrels.tsv", "q0\td0\t1\nq1\td1\t2\n"))).qrels
    assert qrels is not None
    assert qrels.query_ids == ["q0", "q1"]


def test_negative_grades_count_as_0(at: Folder) -> None:
    qrels = queries(at.read(qrels=at.text("qrels.tsv", "q0 0 d0 -2\nq1 0 d1 3\n"))).qrels
    assert qrels is not None
    assert qrels.grades.tolist() == [0, 3]


def test_row_columns_in_order_or_by_index_id(at: Folder) -> None:
    found = at.read(
        doc_ids=at.text("d.txt", "a\nb\nc\n"), labels=at.text("l.tsv", "30\tred\n-1\tblue green\n")
    )
    assert found.doc_ids is not None
    assert found.labels is not None
    assert (found.doc_ids.values, found.doc_ids.row_ids) == (["a", "b", "c"], None)
    assert found.labels.values == ["red", "blue green"]
    assert found.labels.row_ids is not None
    assert found.labels.row_ids.tolist() == [30, -1]


def test_labelled_queries_without_ids_get_different_ones(at: Folder) -> None:
    labels = at.text("ql.txt", "x\ny\nx\n")
    found = read_judgments(
        JudgmentFiles(
            labels=at.text("l.txt", "x\ny\n"),
            dev_queries=at.npy("d.npy", VECTORS),
            dev_labels=labels,
            test_queries=at.npy("t.npy", VECTORS),
            test_labels=labels,
        )
    )
    assert found.dev is not None
    assert found.test is not None
    assert found.test.labels == ("x", "y", "x")
    assert len({*found.dev.ids, *found.test.ids}) == 6


@pytest.mark.parametrize(("name", "text", "words"), [
    ("qrels", "q0 0 d0 1\nq1 0 d1\n", "line 2: 3 columns"),
    ("qrels", "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1 d1 1\n", "line 3: 1 columns"),
    ("qrels", "query-id\tcorpus-id\tscore\n\nq1\td1\t1\n", "line 2"),
    ("qrels", "q0 0 d0 1\nq1 0 d1 1.5\n", "line 2: grade '1.5' is not an integer"),
    ("qrels", "query-id\tcorpus-id\tscore\nq0\td0\tx\n", "line 2: grade 'x'"),
    ("qrels", "q0 0 d0 99999999999\n", "line 1: grade '99999999999'"),
    ("qrels", "q0 0 d0 1\nq0 0 d1 1001\n", "line 2: a grade is above 1000"),
    ("qrels", "", "empty"),
    ("query_ids", "q0\nq1\nq1\n", "'q1' occurs more than once"),
    ("query_ids", "q0\n\nq2\n", "line 2: it is blank"),
    ("query_ids", "q0\nq1\n", "2 ids for 3 vectors"),
    ("doc_ids", "1\ta\n2\n", "line 2: 1 columns"),
    ("doc_ids", "1\ta\n1\tb\n", "index id 1 occurs more than once"),
    ("labels", "1\ta\n\tb\n", "line 2: 1 columns"),
])  # fmt: skip
def test_malformed_files_name_file_and_line(at: Folder, name: str, text: str, words: str) -> None:
    path = at.text(f"bad-{name}", text)
    with pytest.raises(DataError) as caught:
        at.read(**{name: path})
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("array", [
    np.zeros(3), np.zeros((3, 2, 1)), np.zeros((3, 2), np.int64), np.array([["a"]]), np.float32(1),
])  # fmt: skip
def test_other_arrays_are_refused(at: Folder, array: Any) -> None:  # noqa: ANN401
    with pytest.raises(DataError, match=r"floats of shape \(m, d\)"):
        at.read(queries=at.npy("bad.npy", array))


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_npy_are_refused(at: Folder, content: bytes) -> None:
    path = at.path / "bad.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npy is not a \.npy file"):
        at.read(queries=path)


def test_pickles_are_never_opened(at: Folder) -> None:
    path = at.path / "bad.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a \.npy file of numbers"):
        at.read(queries=path)


@pytest.mark.parametrize(("columns", "words"), [
    ({"id": ["a"]}, "needs the columns id and vector"),
    ({"id": ["a"], "vector": ["x"]}, "needs the columns id and vector"),
    ({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, "from 1 to 2 numbers"),
    ({"id": ["a", None], "vector": [[1.0], [1.0]]}, "is null"),
    ({"id": ["a", "b"], "vector": [[1.0], None]}, "is null"),
    ({"id": ["a", "b"], "vector": [[1.0], [None]]}, "is null"),
    ({"id": ["a", "a"], "vector": [[1.0], [1.0]]}, "'a' occurs more than once"),
])  # fmt: skip
def test_bad_parquet_is_refused(at: Folder, columns: dict[str, Any], words: str) -> None:
    path = at.path / "bad.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=words):
        at.read(queries=path, query_ids=None)


def test_parquet_without_rows_or_of_another_format_is_refused(at: Folder) -> None:
    path = at.path / "bad.parquet"
    schema = pa.schema({"id": pa.string(), "vector": pa.list_(pa.float32())})
    pq.write_table(schema.empty_table(), path)
    with pytest.raises(DataError, match="no rows"):
        at.read(queries=path, query_ids=None)
    path.write_text("text")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        at.read(queries=path, query_ids=None)


@pytest.mark.parametrize("line", [
    '{"id": "b"}',
    "{",
    "[]",
    '{"id": "b", "vector": [1]}',
    '{"id": "b", "vector": 3}',
    '{"id": "b", "vector": ["x", 1]}',
])  # fmt: skip
def test_bad_jsonl_names_the_line(at: Folder, line: str) -> None:
    path = at.text("bad.jsonl", '{"id": "a", "vector": [1, 2]}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        at.read(queries=path, query_ids=None)


def test_text_that_is_not_utf8_and_damaged_gzip_are_refused(at: Folder) -> None:
    path = at.path / "bad.txt"
    path.write_bytes(b"\xff\xfe\x00q")
    with pytest.raises(DataError, match="not UTF-8"):
        at.read(query_ids=path)
    for damaged in (gzip.compress(BEIR.encode())[:-9], b"\x1f\x8bjunk"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"bad\.txt"):
            at.read(qrels=path)


@pytest.mark.parametrize("name", ["queries", "query_ids", "qrels", "doc_ids", "labels"])
def test_missing_files_are_a_matter_of_options(at: Folder, name: str) -> None:
    suffix = ".npy" if name == "queries" else ".txt"
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere"):
        at.read(**{name: at.path / f"nowhere{suffix}"})


@pytest.mark.parametrize(("given", "words"), [
    ({"queries": None, "query_ids": None}, "--qrels needs --queries"),
    ({"queries": None, "qrels": None}, "--query-ids needs --queries"),
    ({"qrels": None}, "--queries needs --qrels"),
    ({"query_ids": None}, "give --query-ids"),
    ({"queries": "q.parquet"}, "leave --query-ids out"),
    ({"queries": "q.csv"}, ".npy, .parquet or .jsonl"),
    ({"dev_qrels": "x.tsv"}, "--dev-qrels needs --dev-queries"),
    ({"test_labels": "x.txt"}, "--test-labels needs --test-queries"),
    ({"test_queries": "t.npy"}, "either --test-qrels or --test-labels"),
    ({"test_queries": "t.npy", "test_query_ids": "t.txt", "test_qrels": "x", "test_labels": "x"},
     "either --test-qrels or --test-labels"),
    ({"test_queries": "t.npy", "test_labels": "x.txt"}, "--test-labels needs --labels"),
    ({"queries": None, "query_ids": None, "qrels": None, "doc_ids": "d.txt"}, "--doc-ids has no"),
])  # fmt: skip
def test_options_that_do_not_belong_together(
    at: Folder, given: dict[str, str | None], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        at.read(**{k: None if v is None else at.path / v for k, v in given.items()})


def test_judgments_may_come_from_elsewhere(at: Folder) -> None:
    files = JudgmentFiles(
        queries=at.npy("q.npy", VECTORS),
        query_ids=at.text("q.txt", "q0\nq1\nq2\n"),
        doc_ids=at.text("d.txt", "a\nb\n"),
    )
    found = read_judgments(files, more=True)
    assert queries(found).qrels is None
    assert found.doc_ids is not None
    with pytest.raises(ConfigError, match="--queries needs --qrels"):
        read_judgments(files)
    nameless = JudgmentFiles(queries=at.path / "q.npy")
    with pytest.raises(ConfigError, match="give --query-ids, one id a line"):
        read_judgments(nameless, more=True)


def test_label_counts_must_fit(at: Folder) -> None:
    with pytest.raises(DataError, match="2 labels for 3 queries"):
        read_judgments(
            JudgmentFiles(
                labels=at.text("l.txt", "x\ny\n"),
                test_queries=at.npy("t.npy", VECTORS),
                test_labels=at.text("ql.txt", "x\ny\n"),
            )
        )


def test_pyarrow_missing_names_the_extra(at: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[eval\]"):
        at.read(queries=at.text("q.parquet", ""), query_ids=None)


def test_a_million_judgments_are_read(at: Folder) -> None:
    lines = [f"q{i // 100}\tdoc-{i % 9973}\t{i % 3}\n" for i in range(1_000_000)]
    path = at.text("qrels.tsv", "query-id\tcorpus-id\tscore\n" + "".join(lines))
    qrels = queries(at.read(qrels=path)).qrels
    assert qrels is not None
    assert len(qrels.grades) == 1_000_000


def test_rules_can_be_shown_in_help() -> None:
    assert all(len(line) <= 100 for line in RULES.splitlines())
    assert "Refused" in RULES
    assert "Skipped" in RULES


def test_equal_lines_take_no_room_and_a_line_without_end_is_told(at: Folder) -> None:
    many = at.path / "many.tsv.gz"
    with gzip.open(many, "wt", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for _ in range(30):
            file.write("q0\td0\t1\n" * 50_000 + "q1\td1\t2\n")
    qrels = queries(at.read(qrels=many)).qrels
    assert qrels is not None
    assert (qrels.query_ids, qrels.doc_ids, qrels.grades.tolist()) == (
        ["q0", "q1"],
        ["d0", "d1"],
        [1, 2],
    )
    assert qrels.repeated == 30 * 50_001 - 2
    endless = at.path / "endless.gz"
    with gzip.open(endless, "wb") as raw:
        raw.write(b"q0 0 d0 1\n" + bytes(LONGEST_LINE + 2))
    with pytest.raises(DataError, match="line 2: it has more than 16,777,216 characters"):
        at.read(qrels=endless)


def test_a_header_that_claims_more_than_the_file_holds(at: Folder) -> None:
    path = at.npy("claims.npy", VECTORS)
    path.write_bytes(path.read_bytes().replace(b"(3, 2), }         ", b"(9999999999, 2), }"))
    with pytest.raises(DataError, match=r"not a \.npy file"):
        at.read(queries=path)


def test_json_that_is_nested_without_end(at: Folder) -> None:
    deep = at.text("deep.jsonl", '{"id":"a","vector":' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"line 1: .*nested too deep"):
        at.read(queries=deep, query_ids=None)


@pytest.mark.parametrize(
    ("text", "grades"),
    [
        ("query-id\tcorpus-id\tscore\nq0\td0\t1.0\nq1\td1\t0.0\n", [1, 0]),
        ("query_id\tdoc_id\trelevance\nq0\td0\t3\n", [3]),
        ("# exported by us\n# twice\nquery-id\tcorpus-id\tscore\nq0\td0\t1\n", [1]),
        ("topic iteration document judgment\nq0 0 d0 2.0\n", [2]),
    ],
)
def test_judgments_as_people_export_them(at: Folder, text: str, grades: list[int]) -> None:
    qrels = queries(at.read(qrels=at.text("as.tsv", text))).qrels
    assert qrels is not None
    assert qrels.grades.tolist() == grades


def test_the_line_that_is_named_counts_comments_and_headers(at: Folder) -> None:
    text = "# exported by us\nquery_id\tdoc_id\trelevance\nq0\td0\t1\nq0\td1\t.5\n"
    with pytest.raises(DataError, match=r"line 4: grade '\.5' is not an integer"):
        at.read(qrels=at.text("as.tsv", text))


def test_a_first_line_that_is_blank_is_named(at: Folder) -> None:
    with pytest.raises(DataError, match="line 1: it is blank"):
        at.read(qrels=at.text("blank.tsv", "\nq0\td0\t1\n"))
