"""Folders that frameworks save: which index they stand for, and what is known of its rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import clusters
from click.testing import CliRunner

from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import ConfigError, StoreError
from simskip_vdb.inspection import inspect
from simskip_vdb.job import Job, conflicts

N, D = 30, 8


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((N, D)).astype(np.float32)


def index_file(path: Path, vectors: Vectors, ids: Any = None) -> Path:  # noqa: ANN401
    index = faiss.IndexFlatL2(vectors.shape[1])
    if ids is None:
        index.add(vectors)
    else:
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(vectors, np.asarray(ids, np.int64))
    path.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path))
    return path


def llama_index(folder: Path, vectors: Vectors) -> list[int]:
    """What ``FaissVectorStore`` and its docstore persist."""
    index_file(folder / "default__vector_store.json", vectors)
    names = {str(i): f"doc-{i}" for i in range(len(vectors))}
    struct = {"index_id": "x", "summary": None, "nodes_dict": names, "doc_id_dict": {}}
    held = {"x": {"__type__": "vector_store", "__data__": json.dumps(struct)}}
    (folder / "index_store.json").write_text(json.dumps({"index_store/data": held}))
    nodes = {
        name: {
            "__data__": {
                "id_": name,
                "metadata": {"source": f"s{i}"},
                "relationships": {"1": {"node_id": f"file-{i}"}},
                "text": f"text {i}",
            },
            "__type__": "1",
        }
        for i, name in enumerate(names.values())
    }
    (folder / "docstore.json").write_text(json.dumps({"docstore/data": nodes}))
    (folder / "image__vector_store.json").write_text('{"embedding_dict": {}}')
    return list(range(len(vectors)))


def llama_index_map(folder: Path, vectors: Vectors) -> list[int]:
    """What ``FaissMapVectorStore`` persists, after removals."""
    ids = [5 * i for i in range(len(vectors))]
    llama_index(folder, vectors)
    index_file(folder / "default__vector_store.json", vectors, ids)
    names = {str(row): f"doc-{i}" for i, row in enumerate(ids)}
    (folder / "id_map.json").write_text(json.dumps({"faiss_id_to_node_id_map": names}))
    return ids


def langchain_js(folder: Path, vectors: Vectors) -> list[int]:
    index_file(folder / "faiss.index", vectors)
    documents = [
        [f"doc-{i}", {"pageContent": f"text {i}", "metadata": {"source": f"s{i}"}}]
        for i in range(len(vectors))
    ]
    names = {str(i): f"doc-{i}" for i in range(len(vectors))}
    (folder / "docstore.json").write_text(json.dumps([documents, names]))
    return list(range(len(vectors)))


def langchain_js_by_position(folder: Path, vectors: Vectors) -> list[int]:
    """What LangChain.js saved at first: documents by position."""
    ids = langchain_js(folder, vectors)
    documents, _ = json.loads((folder / "docstore.json").read_text())
    told = [[str(i), document] for i, (_, document) in enumerate(documents)]
    (folder / "docstore.json").write_text(json.dumps(told))
    return ids


def txtai(folder: Path, vectors: Vectors) -> list[int]:
    ids = list(range(3, 3 + len(vectors)))
    index_file(folder / "embeddings", vectors, ids)
    (folder / "config").write_text("{}")
    data = sqlite3.connect(folder / "documents")
    with data:
        data.execute(
            "CREATE TABLE sections (indexid INTEGER PRIMARY KEY, id TEXT, text TEXT, tags TEXT, "
            "entry DATETIME)"
        )
        data.execute(
            "CREATE TABLE documents (id TEXT PRIMARY KEY, data JSON, tags TEXT, entry DATETIME)"
        )
        for place, row in enumerate(ids):
            told = (row, f"doc-{place}", f"text {place}", None, None)
            data.execute("INSERT INTO sections VALUES (?, ?, ?, ?, ?)", told)
            more = (f"doc-{place}", json.dumps({"source": f"s{place}"}), None, None)
            data.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", more)
    data.close()
    return ids


SAVED: dict[str, tuple[Callable[[Path, Vectors], list[int]], str]] = {
    "LlamaIndex": (llama_index, "node_id"),
    "LlamaIndex with ids": (llama_index_map, "node_id"),
    "LangChain.js": (langchain_js, "id"),
    "txtai": (txtai, "id"),
}


@pytest.mark.parametrize("framework", SAVED)
def test_rows_are_known_by_what_lies_beside_them(
    tmp_path: Path, vectors: Vectors, framework: str
) -> None:
    save, name = SAVED[framework]
    folder = tmp_path / "saved"
    folder.mkdir()
    ids = save(folder, vectors)
    store = open_store(str(tmp_path))
    info = store.info()
    assert (info.document_ids, info.payload) == (name, True)
    found = list(store.scan(7, fields=[name, "source"]))
    assert [row for batch in found for row in batch.ids.tolist()] == ids
    names = [value for batch in found for value in batch.fields[name]]
    assert names == [f"doc-{i}" for i in range(N)]
    assert [v for batch in found for v in batch.fields["source"]] == [f"s{i}" for i in range(N)]
    with pytest.raises(ConfigError, match=f"no row has a field 'colour'; there are: .*{name}"):
        list(store.scan(7, fields=["colour"]))
    assert not any("--doc-id" in step for step in inspect(store)["next"])


def test_documents_may_be_known_by_position(tmp_path: Path, vectors: Vectors) -> None:
    langchain_js_by_position(tmp_path, vectors)
    (batch,) = open_store(str(tmp_path)).scan(N, fields=["id", "source", "pageContent"])
    assert [*batch.fields["id"]] == [str(i) for i in range(N)]
    assert [*batch.fields["source"]] == [f"s{i}" for i in range(N)]
    assert batch.fields["pageContent"][3] == "text 3"


def test_files_beside_that_are_damaged(tmp_path: Path, vectors: Vectors) -> None:
    llama_index(tmp_path, vectors)
    store = open_store(str(tmp_path))
    (tmp_path / "docstore.json").unlink()
    (batch,) = store.scan(N, fields=["node_id"])
    assert list(batch.fields["node_id"][:2]) == ["doc-0", "doc-1"]
    for text in ("", "{}", "[3]", '{"index_store/data": {"x": {"__type__": "vector_store"}}}'):
        (tmp_path / "index_store.json").write_text(text)
        with pytest.raises(StoreError, match=r"index_store\.json does not tell what the rows"):
            list(store.scan(N, fields=["node_id"]))
        assert next(iter(store.scan(N))).ids.tolist() == list(range(N))
    txtai(tmp_path / "t", vectors)
    (tmp_path / "t" / "documents").write_bytes(b"SQLite format 3\0" + b"x" * 90)
    with pytest.raises(StoreError, match="documents does not tell"):
        list(open_store(str(tmp_path / "t")).scan(N, fields=["id"]))


def test_rows_that_nothing_names_have_no_value(tmp_path: Path, vectors: Vectors) -> None:
    llama_index(tmp_path, vectors)
    more = np.concatenate([vectors, vectors + 1])
    index_file(tmp_path / "default__vector_store.json", more)
    (batch,) = open_store(str(tmp_path)).scan(2 * N, fields=["node_id"])
    assert list(batch.fields["node_id"]) == [f"doc-{i}" for i in range(N)] + [None] * N


@pytest.mark.parametrize("framework", SAVED)
def test_a_gain_is_proven_by_the_frameworks_own_ids(
    tmp_path: Path, rng: np.random.Generator, framework: str
) -> None:
    docs, asked, rows, groups = clusters(rng, 600, 200)
    folder = tmp_path / "saved"
    folder.mkdir()
    SAVED[framework][0](folder, docs)
    np.save(tmp_path / "q.npy", asked)
    (tmp_path / "q.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    pairs = ((i, row) for i, group in enumerate(groups) for row in np.flatnonzero(rows == group))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\tdoc-{j}\t1\n" for i, j in pairs))
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    options = [name if name.startswith("--") else str(tmp_path / name) for name in given]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (index,) = (Path(open_store(str(folder)).info().uri.partition(":")[2]),)
    run = CliRunner().invoke(cli, ["refine", str(folder), *options], standalone_mode=False)
    assert run.exit_code == 0, run.output
    assert "written: 600 rows" in run.output
    assert index.read_bytes() != before[index]
    run = CliRunner().invoke(cli, ["rollback", str(folder)], standalone_mode=False)
    assert run.exit_code == 0
    assert all(path.read_bytes() == data for path, data in before.items())


def test_document_ids_may_name_a_field(tmp_path: Path, vectors: Vectors) -> None:
    index_file(tmp_path / "a.faiss", vectors)
    np.save(tmp_path / "q.npy", vectors)
    (tmp_path / "q.txt").write_text("\n".join(map(str, range(N))))
    (tmp_path / "qrels.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(N)))
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    options = [name if name.startswith("--") else str(tmp_path / name) for name in given]
    wanted = ["refine", str(tmp_path / "a.faiss"), *options, "--doc-ids"]
    with pytest.raises(ConfigError, match="no payload, so there is no field 'sku'"):
        CliRunner().invoke(cli, [*wanted, "sku"], standalone_mode=False, catch_exceptions=False)
    run = CliRunner().invoke(cli, [*wanted, "ids.txt"])
    assert run.exit_code == 2
    assert "'ids.txt' does not exist" in run.output
    told = "--doc-ids and --doc-id-field say the same"
    with pytest.raises(ConfigError, match=told):
        CliRunner().invoke(
            cli, [*wanted, "sku", "--doc-id-field", "sku"], standalone_mode=False,
            catch_exceptions=False,
        )  # fmt: skip


def test_a_job_may_name_fields_of_a_folder(tmp_path: Path) -> None:
    job = Job(name="a", line=1, index=str(tmp_path), group_field="source")
    assert not list(conflicts(job))


def test_which_index_a_folder_stands_for(tmp_path: Path, vectors: Vectors) -> None:
    with pytest.raises(StoreError, match=r"no FAISS index.*or right below it"):
        open_store(str(tmp_path))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    index_file(tmp_path / "deep" / "er" / "a.faiss", vectors)
    with pytest.raises(StoreError, match="no FAISS index"):
        open_store(str(tmp_path))
    below = index_file(tmp_path / "storage" / "my.index", vectors)
    (tmp_path / "storage" / "hnswlib.index").write_bytes(b"\1\0\0\0")
    index_file(tmp_path / ".cache" / "a.faiss", vectors)
    index_file(tmp_path / "a.simskip" / "a.faiss", vectors)
    assert open_store(str(tmp_path)).info().uri == f"faiss:{below}"
    assert open_store(str(tmp_path / "storage")).info().uri == f"faiss:{below}"
    index_file(tmp_path / "other" / "b.faiss", vectors)
    with pytest.raises(ConfigError, match=r"other/b\.faiss, storage/my\.index\); give the file"):
        open_store(str(tmp_path))
    here = index_file(tmp_path / "here.index", vectors)
    assert open_store(str(tmp_path)).info().uri == f"faiss:{here}"
    for i in range(20):
        index_file(tmp_path / f"{i:02}.faiss", vectors[:1])
    with pytest.raises(ConfigError, match=r"11\.faiss, and 9 more\); give the file"):
        open_store(str(tmp_path))
