"""LlamaIndex's own store: refined in its JSON, brought back to the byte, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import clusters, random_refiner
from click.testing import CliRunner

import simskip_vdb as ss
from simskip_vdb.cli import cli
from simskip_vdb.connectors import full_address, json_layout, open_store
from simskip_vdb.connectors.json_store import SimpleStoreFile
from simskip_vdb.datatypes import Ids, Metric, Vectors, id_names, id_text
from simskip_vdb.errors import ConfigError, DataError, SimskipError, StoreError
from simskip_vdb.store import VectorStore
from simskip_vdb.testing import FileContract

N, D = 40, 6
STYLES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "indented": {"indent": 4},
    "packed": {"separators": (",", ":")},
}
NAME = "default__vector_store.json"


def write_store(path: Path, vectors: Any, ids: Any = None, **style: Any) -> Path:  # noqa: ANN401
    """Write what ``SimpleVectorStore.persist`` does."""
    names = [f"node-{i}" for i in range(len(vectors))] if ids is None else ids
    told = {
        "embedding_dict": dict(zip(names, vectors.tolist(), strict=True)),
        "text_id_to_ref_doc_id": {name: f"doc-{name}" for name in names},
        "metadata_dict": {name: {"source": f"[{name}] {{"} for name in names},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, **style), encoding="utf-8")
    return path


def rows_of(path: Path) -> tuple[list[str], Any]:
    found = json.loads(path.read_text("utf-8"))["embedding_dict"]
    return list(found), np.array(list(found.values()))


class TestSimpleStoreFile(FileContract):
    text = True

    @pytest.fixture(autouse=True, params=STYLES)
    def _style(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.style, self.path = STYLES[request.param], tmp_path / NAME

    @pytest.fixture
    def ids(self) -> Ids:
        return id_text([f'straße "{i}"'.encode() for i in range(self.count)])

    def unknown_id(self, ids: Ids) -> Ids:
        return id_text([b"node-x"])

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        write_store(self.path, vectors, id_names(ids), **self.style)
        return open_store(f"{self.path}?metric={metric.value}")

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        names, vectors = rows_of(self.path)
        return id_text([name.encode() for name in names]), vectors.astype(np.float32)


@pytest.fixture
def numbers(rng: np.random.Generator) -> Any:  # noqa: ANN401 float64
    return rng.normal(size=(N, D))


def refine(path: Path, seed: int = 0) -> ss.Refiner:
    store = open_store(str(path))
    ids = np.concatenate([batch.ids for batch in store.scan(7)])
    refiner = random_refiner(store.info().dim, np.sort(ids), seed, metric=Metric.COSINE)
    refiner.save(path.parent / f"refiner-{seed}")
    settings = ss.Settings(refiner=path.parent / f"refiner-{seed}", accept_unmeasured=True)
    assert ss.refine(store, ss.Judgments(), settings).written is not None
    return refiner


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_there_and_back_to_the_byte(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    style: str,
    wide: bool,
) -> None:
    given = numbers if wide else numbers.astype(np.float32)
    path = write_store(tmp_path / NAME, given, **STYLES[style])
    before, told = path.read_bytes(), json.loads(path.read_text())
    info = open_store(str(tmp_path)).info()
    assert info.uri == f"llama-index:{path}" == full_address(info.uri)
    assert (info.count, info.dim, info.metric, info.exact) == (N, D, Metric.COSINE, True)
    refiner = refine(path)
    names, vectors = rows_of(path)
    wanted = refiner.refine_rows(given.astype(np.float32), id_text([n.encode() for n in names]))
    np.testing.assert_array_equal(vectors.astype(np.float32), wanted)
    now = json.loads(path.read_text())
    assert {**now, "embedding_dict": 0} == {**told, "embedding_dict": 0}
    assert json.dumps(now, **STYLES[style]) == path.read_text()
    assert ss.rollback(open_store(str(tmp_path)))["exact"]
    assert path.read_bytes() == before


def test_rows_come_back_with_all_their_digits(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    """An application that changes a row keeps the file of before from being put back."""
    path = write_store(tmp_path / NAME, numbers)
    refine(path)
    refine(path, 1)
    names, held = rows_of(path)
    held[7] = 3
    write_store(tmp_path / "new", held, names)
    path.write_bytes((tmp_path / "new").read_bytes())
    ss.rollback(open_store(str(path)))
    _, after = rows_of(path)
    np.testing.assert_array_equal(np.delete(after, 7, 0), np.delete(numbers, 7, 0))
    np.testing.assert_array_equal(after[7], held[7])


def test_llama_index_reads_what_was_written(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    simple = pytest.importorskip("llama_index.core.vector_stores.simple")
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [
        schema.TextNode(id_=f"n{i}", text=str(i), metadata={"source": f"s{i}"}, embedding=row)
        for i, row in enumerate(numbers.tolist())
    ]
    store = simple.SimpleVectorStore()
    store.add(nodes)
    path = tmp_path / "storage" / NAME
    store.persist(str(path))
    before = path.read_bytes()
    fields = next(iter(open_store(str(path.parent)).scan(N, fields=["source"]))).fields
    assert fields["source"] == [f"s{i}" for i in range(N)]
    refiner = refine(path)
    wanted = refiner.refine_rows(
        numbers.astype(np.float32), id_text([f"n{i}".encode() for i in range(N)])
    )
    loaded = simple.SimpleVectorStore.from_persist_path(str(path))
    for i in range(N):
        np.testing.assert_array_equal(np.float32(loaded.get(f"n{i}")), wanted[i])
    assert loaded.data.metadata_dict["n3"]["source"] == "s3"
    ss.rollback(open_store(str(path)))
    assert path.read_bytes() == before


def test_a_gain_is_proven_and_written(tmp_path: Path, rng: np.random.Generator) -> None:
    docs, asked, rows, groups = clusters(rng, 600, 200)
    path = write_store(tmp_path / "storage" / NAME, docs)
    np.save(tmp_path / "q.npy", asked)
    (tmp_path / "q.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    pairs = ((i, row) for i, group in enumerate(groups) for row in np.flatnonzero(rows == group))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\tdoc-node-{j}\t1\n" for i, j in pairs))
    before = path.read_bytes()
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    options = [name if name.startswith("--") else str(tmp_path / name) for name in given]
    wanted = ["refine", str(path.parent), *options, "--doc-ids", "ref_doc_id"]
    run = CliRunner().invoke(cli, wanted, standalone_mode=False)
    assert run.exit_code == 0, run.output
    assert "written: 600 rows" in run.output
    assert path.read_bytes() != before
    assert CliRunner().invoke(cli, ["rollback", str(path)], standalone_mode=False).exit_code == 0
    assert path.read_bytes() == before


def test_a_reader_takes_as_much_as_it_needs(
    tmp_path: Path,
    numbers: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_layout, "_AT_ONCE", 7)
    names = [f'a "{{[\\ß{i}' for i in range(N)]
    path = write_store(tmp_path / NAME, numbers, names)
    text = json.dumps({"first": {"a": [1, {"b": "}]"}], "c": None}, "n": -1.5e3, "s": "x\\"})
    path.write_text(text[:-1] + ", " + path.read_text()[1:])
    store = open_store(str(path))
    found = list(store.scan(9, fields=["ref_doc_id"]))
    assert id_names(np.concatenate([batch.ids for batch in found])) == names
    vectors = np.concatenate([batch.vectors for batch in found])
    np.testing.assert_array_equal(vectors, numbers.astype(np.float32))
    assert [name for batch in found for name in batch.fields["ref_doc_id"]] == [
        f"doc-{name}" for name in names
    ]


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ('{"embedding_dict": {"a": [1, 2], "b": [1, 2, 3]}}', DataError, "'b' has 3 numbers"),
        ('{"embedding_dict": {"a": [1, 2], "b": [1, null]}}', DataError, "'b' is no list of numb"),
        ('{"embedding_dict": {"a": [1, 2], "a": [1, 3]}}', DataError, "a stands in it twice"),
        ('{"embedding_dict": {"a": [1, 2], "b": [1, 2', DataError, "'b' is no list of numb"),
        ('{"embedding_dict": {"a": [1, 2]', DataError, "is cut off"),
        ('{"embedding_dict": {"a": [1, 2-3]}}', StoreError, "no number"),
        ('{"embedding_dict": [[1, 2]]}', StoreError, "damaged"),
        ('{"other": {"a": [1, 2]}}', StoreError, "no 'embedding_dict'"),
        ("[]", StoreError, "a JSON file"),
        ("", StoreError, "is empty"),
    ],
)
def test_what_is_no_store_is_told(
    tmp_path: Path, text: str, kind: type[SimskipError], match: str
) -> None:
    path = tmp_path / NAME
    path.write_text(text)
    with pytest.raises(kind, match=match):
        list(SimpleStoreFile(path).scan(10))


def test_fields_that_are_not_there(tmp_path: Path, numbers: Any) -> None:  # noqa: ANN401
    path = write_store(tmp_path / NAME, numbers)
    with pytest.raises(ConfigError, match=r"no column 'colour'.*ref_doc_id, source"):
        list(open_store(str(path)).scan(10, fields=["colour"]))
    whole = path.read_text()
    path.write_text(whole[: whole.index('"metadata_dict"')] + '"metadata_dict": 3}')
    with pytest.raises(StoreError, match="another form"):
        list(open_store(str(path)).scan(10, fields=["source"]))
    path.write_text(whole[:-9])
    with pytest.raises(StoreError, match="damaged"):
        list(open_store(str(path)).scan(10, fields=["source"]))
