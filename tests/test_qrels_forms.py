"""Judgments in the forms of tools: JSON, tables, BEIR's folder, MS MARCO, ranx, ir_datasets."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from judged import make_case
from script import simskip

from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.judgments import JudgmentFiles, QuerySet, read_judgments
from simskip_vdb.qrels_forms import read_any_qrels

JUDGED = {"q1": {"d1": 2, "d 2": 1}, "7": {"d1": 0}}
ROWS = [
    {"query-id": query, "corpus-id": doc, "score": grade}
    for query, docs in JUDGED.items()
    for doc, grade in docs.items()
]


def judged(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    qrels = read_any_qrels(path)
    for query, doc, grade in zip(qrels.query_ids, qrels.doc_ids, qrels.grades, strict=True):
        found.setdefault(query, {})[doc] = int(grade)
    return found


def ranx_table() -> pa.Table:
    return pa.table(
        {
            "q_id": ["q1", "q1", "7"],
            "doc_id": ["d1", "d 2", "d1"],
            "score": pa.array([2, 1, 0], pa.int64()),
        }
    )


def test_nested_json_and_tables(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(JUDGED))
    assert judged(path) == JUDGED
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert judged(path) == JUDGED
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "hub.parquet")
    assert judged(tmp_path / "hub.parquet") == JUDGED
    pq.write_table(ranx_table(), tmp_path / "ranx.parquet")
    assert judged(tmp_path / "ranx.parquet") == JUDGED


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"q": {"d": 1.5}}', "1.5"),
        ('{"q": {"d": 2000}}', "2000"),
        ('{"q": {"d": "x"}}', "number"),
        ('{"q": ["d"]}', "document"),
        ("[1]", "query"),
        ("{", "not JSON"),
        ("{}", "no judgments"),
    ],
)
def test_malformed_json_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=rf"q\.json.*{why}"):
        read_any_qrels(tmp_path / "q.json")


def test_malformed_tables_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query-id": ["a"], "score": [1]}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="corpus-id"):
        read_any_qrels(tmp_path / "q.parquet")
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged"):
        read_any_qrels(tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_text('{"query-id": "a", "corpus-id": "b", "score": 1}\n{"a": 2}')
    with pytest.raises(DataError, match="line 2"):
        read_any_qrels(tmp_path / "q.jsonl")
    for name in ("none.json", "none.jsonl", "none.parquet"):
        with pytest.raises(ConfigError, match="no file"):
            read_any_qrels(tmp_path / name)


def test_ir_datasets_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(ConfigError, match="pip install ir_datasets"):
        read_any_qrels(Path("ir_datasets:beir/scifact/test"))


def test_what_ranx_saves(tmp_path: Path) -> None:
    ranx = pytest.importorskip("ranx")
    grades = {query: dict(docs) for query, docs in JUDGED.items()}
    for kind in ("json", "parquet"):
        path = tmp_path / f"q.{kind}"
        ranx.Qrels(grades).save(str(path), kind=kind)
        assert judged(path) == JUDGED


def test_a_data_set_of_ir_datasets(tmp_path: Path) -> None:
    ir_datasets = pytest.importorskip("ir_datasets")
    base, formats = map(import_module, ("ir_datasets.datasets.base", "ir_datasets.formats"))

    class File:
        def stream(self) -> Any:  # noqa: ANN401
            return (tmp_path / "q.trec").open("rb")

    (tmp_path / "q.trec").write_text("q1 0 d1 2\nq2 0 d2 1\n")
    name = "simskip-test"
    if name not in ir_datasets.registry:
        ir_datasets.registry.register(name, base.Dataset(formats.TrecQrels(File(), {})))
    assert judged(Path(f"ir_datasets:{name}")) == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    with pytest.raises(ConfigError, match="knows no data set"):
        read_any_qrels(Path("ir_datasets:no-such-set"))


def test_ms_marco(tmp_path: Path) -> None:
    (tmp_path / "qrels.dev.small.tsv").write_text("300674\t0\t7067032\t1\n125705\t0\t7067056\t1\n")
    (tmp_path / "queries.dev.small.tsv").write_text("300674\thow many years\n125705\twhat is\n")
    np.save(tmp_path / "q.npy", np.eye(2, 4, dtype=np.float32))
    found = read_judgments(
        JudgmentFiles(
            queries=tmp_path / "q.npy",
            query_ids=tmp_path / "queries.dev.small.tsv",
            qrels=tmp_path / "qrels.dev.small.tsv",
        )
    )
    assert found.queries is not None
    assert found.queries.ids == ("300674", "125705")
    assert found.queries.qrels is not None
    assert found.queries.qrels.doc_ids == ["7067032", "7067056"]


def beir(folder: Path, splits: dict[str, list[tuple[str, str]]], vectors: Any, docs: int) -> Path:  # noqa: ANN401
    """Write a folder as BEIR's download has it, with vectors of the queries in it."""
    (folder / "qrels").mkdir(parents=True)
    ids = [f"q{i}" for i in range(len(vectors))]
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": q, "text": "?", "metadata": {}}) + "\n" for q in ids)
    )
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "title": "", "text": "…"}) + "\n" for i in range(docs))
    )
    for name, pairs in splits.items():
        lines = [f"{q}\t{d}\t1\n" for q, d in pairs]
        (folder / "qrels" / f"{name}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(lines)
        )
    np.save(folder / "queries.npy", vectors)
    return folder


def ids_of(found: QuerySet | None) -> tuple[str, ...] | None:
    return None if found is None else found.ids


def test_a_folder_of_beir_by_one_path(tmp_path: Path) -> None:
    splits = {
        "train": [("q0", "d1"), ("q1", "d2")],
        "dev": [("q2", "d0")],
        "test": [("q3", "d1"), ("q3", "d2")],
    }
    vectors = np.eye(5, dtype=np.float32)
    folder = beir(tmp_path / "scifact", splits, vectors, 3)
    found = read_judgments(JudgmentFiles(qrels=folder))
    assert ids_of(found.queries) == ("q0", "q1")
    assert ids_of(found.dev) == ("q2",)
    assert ids_of(found.test) == ("q3",)
    assert found.test is not None
    np.testing.assert_array_equal(found.test.vectors, vectors[3:4])
    assert found.doc_ids is not None
    assert found.doc_ids.values == ["d0", "d1", "d2"]

    (folder / "qrels/train.tsv").unlink()
    found = read_judgments(JudgmentFiles(qrels=folder))
    assert (ids_of(found.queries), ids_of(found.dev)) == (("q2",), None)
    (folder / "qrels/dev.tsv").unlink()
    found = read_judgments(JudgmentFiles(qrels=folder), doc_id_field="sku")
    assert (ids_of(found.queries), ids_of(found.test)) == (("q3",), None)
    assert (found.doc_ids, found.doc_id_field) == (None, "sku")


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no qrels/test\.tsv"):
        read_judgments(JudgmentFiles(qrels=tmp_path))
    folder = beir(tmp_path / "b", {"test": [("q0", "d0")]}, np.eye(2, dtype=np.float32), 2)
    with pytest.raises(ConfigError, match="leave out --labels"):
        read_judgments(JudgmentFiles(qrels=folder, labels=tmp_path / "labels.txt"))
    (folder / "queries.npy").unlink()
    with pytest.raises(ConfigError, match="no vectors"):
        read_judgments(JudgmentFiles(qrels=folder))
    np.save(tmp_path / "q.npy", np.eye(3, dtype=np.float32))
    with pytest.raises(DataError, match="2 ids for 3 vectors"):
        read_judgments(JudgmentFiles(qrels=folder, queries=tmp_path / "q.npy"))


def test_an_index_is_refined_by_a_folder_of_beir(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    assert case.files.qrels is not None
    assert case.files.queries is not None
    assert case.files.query_ids is not None
    names = Path(case.files.query_ids).read_text().split()
    place = {name: f"q{i}" for i, name in enumerate(names)}
    lines = Path(case.files.qrels).read_text().splitlines()[1:]
    pairs = [(place[line.split("\t")[0]], line.split("\t")[1]) for line in lines]
    folder = beir(tmp_path / "beir", {"test": pairs}, np.load(case.files.queries), 1)
    options = ["--qrels", str(folder), "--doc-ids", str(case.files.doc_ids)]
    done = simskip("refine", str(case.index), *options)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "gate: passed" in done.stdout
