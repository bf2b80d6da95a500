"""Chroma: embeddings are refined; documents, metadata and settings stay."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import clusters, random_refiner
from click.testing import CliRunner

import simskip_vdb as ss
from simskip_vdb.cli import cli
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Ids, Metric, Vectors, id_names, id_text
from simskip_vdb.errors import (
    ConfigError,
    SimskipError,
    StoreNotFoundError,
    TransientStoreError,
    UnsupportedIndexError,
)
from simskip_vdb.store import Claimable, Marked, RowWritable, VectorStore
from simskip_vdb.testing import RowContract

chromadb: Any = pytest.importorskip("chromadb")

D = 8
SPACES = {Metric.COSINE: "cosine", Metric.EUCLID: "l2", Metric.DOT: "ip"}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    gc.collect()
    chromadb.api.client.SharedSystemClient.clear_system_cache()


def client_of(folder: Path) -> Any:  # noqa: ANN401 chromadb's
    return chromadb.PersistentClient(str(folder))


def make_collection(
    folder: Path,
    ids: Ids,
    vectors: Vectors,
    metric: Metric = Metric.EUCLID,
    *,
    name: str = "docs",
    legacy: bool = False,
) -> str:
    """Make a collection, and another one beside it; return its address."""
    client = client_of(folder)
    space = SPACES[metric]
    given: Any = (
        {"metadata": {"hnsw:space": space, "owner": "us"}}
        if legacy
        else {"metadata": {"owner": "us"}, "configuration": {"hnsw": {"space": space}}}
    )
    made = client.create_collection(name, embedding_function=None, **given)
    names = id_names(ids)
    for start in range(0, len(names), 2000):
        part = slice(start, start + 2000)
        made.add(
            ids=names[part],
            embeddings=vectors[part],
            documents=[f"body {name}" for name in names[part]],
            metadatas=[
                {"lang": "de" if at % 2 else "en", "n": at} for at in range(len(names))[part]
            ],
        )
    client.get_or_create_collection("another", embedding_function=None).add(
        ids=["x"], embeddings=[[1.0, 2.0]], documents=["y"]
    )
    return f"chroma:{folder}?collection={name}"


def rows_of(folder: Path, name: str = "docs") -> tuple[list[str], Vectors]:
    found = (
        client_of(folder).get_collection(name, embedding_function=None).get(include=["embeddings"])
    )
    order = np.argsort([each.encode() for each in found["ids"]])
    return [found["ids"][at] for at in order], np.asarray(found["embeddings"], np.float32)[order]


def others_of(folder: Path) -> Any:  # noqa: ANN401 whatever it holds
    client = client_of(folder)
    docs = client.get_collection("docs", embedding_function=None)
    metadata = {key: value for key, value in docs.metadata.items() if key != "simskip"}
    found = docs.get(include=["documents", "metadatas"])
    parts = (found["ids"], found["documents"], found["metadatas"])
    rows = sorted(
        (name, text, sorted(told.items())) for name, text, told in zip(*parts, strict=True)
    )
    return rows, metadata, docs.configuration_json["hnsw"], client.get_collection("another").count()


class TestChroma(RowContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, metric: Metric) -> None:
        self.folder = tmp_path / "chroma"
        self.exact = metric is not Metric.COSINE
        self.tolerance = 0.0 if self.exact else 1e-6

    @pytest.fixture
    def ids(self) -> Ids:
        return id_text([f"straße-{i:03}".encode() for i in range(self.count)])

    def unknown_id(self, ids: Ids) -> Ids:
        return id_text([b"zzz"])

    def make_store(self, ids: Ids, vectors: Vectors, metric: Metric) -> VectorStore:
        return open_store(make_collection(self.folder, ids, vectors, metric))

    def raw_rows(self, store: VectorStore) -> tuple[Ids, Vectors]:
        names, vectors = rows_of(self.folder)
        return id_text([name.encode() for name in names]), vectors

    def test_abilities(self, store: VectorStore) -> None:
        assert isinstance(store, RowWritable)
        assert isinstance(store, Marked)
        assert isinstance(store, Claimable)


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((50, D)).astype(np.float32)


def ids_for(count: int) -> Ids:
    return id_text([f"doc-{i:05}".encode() for i in range(count)])


def refine(uri: str, folder: Path, seed: int = 0) -> ss.Refiner:
    store = open_store(uri)
    ids = np.concatenate([batch.ids for batch in store.scan(1000)])
    refiner = random_refiner(D, ids, seed, metric=store.info().metric)
    refiner.save(folder / f"refiner-{seed}")
    settings = ss.Settings(refiner=folder / f"refiner-{seed}", accept_unmeasured=True)
    assert ss.refine(store, ss.Judgments(), settings).written is not None
    return refiner


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLID])
@pytest.mark.parametrize("legacy", [False, True])
def test_only_embeddings_change_and_come_back(
    tmp_path: Path, vectors: Vectors, legacy: bool, metric: Metric
) -> None:
    folder = tmp_path / "chroma"
    uri = make_collection(folder, ids_for(50), vectors, metric, legacy=legacy)
    near = 1e-6 if metric is Metric.COSINE else 0
    others = others_of(folder)
    refiner = refine(uri, tmp_path)
    wanted = refiner.refine_rows(vectors, ids_for(50))
    np.testing.assert_allclose(rows_of(folder)[1], wanted, atol=near, rtol=near)
    now = others_of(folder)
    assert now[0] == others[0]
    assert now[1:] == others[1:]
    refine(uri, tmp_path, 1)
    assert ss.status(open_store(uri))["refined"]["refiner"]
    assert ss.rollback(open_store(uri))["restored"] == 50
    np.testing.assert_allclose(rows_of(folder)[1], vectors, atol=near, rtol=near)
    assert others_of(folder)[0] == others[0]


def test_a_gain_is_proven_by_the_command_line(tmp_path: Path, rng: np.random.Generator) -> None:
    docs, asked, rows, groups = clusters(rng, 600, 200)
    folder = tmp_path / "chroma"
    uri = make_collection(folder, ids_for(600), docs)
    np.save(tmp_path / "q.npy", asked)
    (tmp_path / "q.txt").write_text("\n".join(f"q{i}" for i in range(len(asked))))
    pairs = ((i, row) for i, group in enumerate(groups) for row in np.flatnonzero(rows == group))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\tdoc-{j:05}\t1\n" for i, j in pairs))
    given = ("--queries", "q.npy", "--query-ids", "q.txt", "--qrels", "qrels.tsv")
    options = [word if word.startswith("--") else str(tmp_path / word) for word in given]
    run = CliRunner().invoke(cli, ["refine", uri, *options], standalone_mode=False)
    assert run.exit_code == 0, run.output
    assert "written: 600 rows" in run.output
    assert CliRunner().invoke(cli, ["rollback", uri], standalone_mode=False).exit_code == 0
    np.testing.assert_array_equal(rows_of(folder)[1], docs)


def test_fields_and_filters(tmp_path: Path, vectors: Vectors) -> None:
    folder = tmp_path / "chroma"
    uri = make_collection(folder, ids_for(50), vectors)
    (batch,) = open_store(uri).scan(100, fields=["lang", "document", "n"])
    assert [*batch.fields["n"]] == list(range(50))
    assert batch.fields["document"][3] == "body doc-00003"
    for text in ("lang=en", '{"lang": "en"}', '{"$and": [{"lang": "en"}, {"n": {"$gte": 0}}]}'):
        assert open_store(uri, filter=text).info().count == 25
    refine(f"{uri}&filter=lang%3Den", tmp_path)
    moved = (rows_of(folder)[1] != vectors).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(0, 50, 2))
    with pytest.raises(ConfigError, match="refined under the filter 'lang=en'"):
        refine(uri, tmp_path, 1)
    assert ss.rollback(open_store(f"{uri}&filter=lang%3Den"))["exact"]
    np.testing.assert_array_equal(rows_of(folder)[1], vectors)


def test_rows_that_an_application_wrote_since_stay(tmp_path: Path, vectors: Vectors) -> None:
    folder = tmp_path / "chroma"
    uri = make_collection(folder, ids_for(50), vectors)
    refine(uri, tmp_path)
    theirs = np.full((1, D), 3, np.float32)
    docs = client_of(folder).get_collection("docs", embedding_function=None)
    docs.update(ids=["doc-00007"], embeddings=theirs)
    docs.delete(ids=["doc-00009"])
    ss.rollback(open_store(uri))
    names, now = rows_of(folder)
    assert "doc-00009" not in names
    kept = {name: row for name, row in zip(names, now, strict=True)}
    np.testing.assert_array_equal(kept["doc-00007"], theirs[0])
    for at in range(50):
        if at not in (7, 9):
            np.testing.assert_array_equal(kept[f"doc-{at:05}"], vectors[at])


KILLED = """
import sys, warnings
warnings.simplefilter("ignore")
import simskip_vdb as ss
from simskip_vdb.connectors import open_store
store = open_store(sys.argv[2])
if sys.argv[1] == "refine":
    ss.refine(store, ss.Judgments(), ss.Settings(refiner=sys.argv[3], accept_unmeasured=True))
else:
    ss.rollback(store)
"""
LOOK = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from collections.abc import Iterator
from pathlib import Path
from test_chroma import rows_of
np.save(sys.argv[3], rows_of(Path(sys.argv[1]))[1])
"""


@pytest.mark.parametrize("command", ["refine", "rollback"])
def test_kills_lose_nothing(tmp_path: Path, rng: np.random.Generator, command: str) -> None:
    vectors = rng.standard_normal((1500, D)).astype(np.float32)
    folder = tmp_path / "chroma"
    uri = make_collection(folder, ids_for(1500), vectors)
    refiner = random_refiner(D, ids_for(1500), metric=Metric.EUCLID)
    refiner.save(tmp_path / "refiner")
    new = refiner.refine_rows(vectors, ids_for(1500))

    def run(what: str) -> list[str]:
        return [sys.executable, "-c", KILLED, what, uri, str(tmp_path / "refiner")]

    def rows() -> Vectors:  # another process, as a client keeps what it has read
        out = tmp_path / "rows.npy"
        words = [sys.executable, "-c", LOOK, str(folder), str(Path(__file__).parent), str(out)]
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
        found: Vectors = np.load(out)
        return found

    if command == "rollback":
        subprocess.run(run("refine"), check=True)
    started = time.monotonic()
    subprocess.run(run(command), check=True)
    whole = time.monotonic() - started
    killed = 0
    for at in range(2):
        subprocess.run(run("rollback" if command == "refine" else "refine"), check=True)
        child = subprocess.Popen(run(command))
        time.sleep(whole * (0.6 + 0.2 * at))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait()
        now = rows()
        assert ((now == vectors).all(axis=1) | (now == new).all(axis=1)).all()
        subprocess.run(run(command), check=False, stderr=subprocess.DEVNULL)
        np.testing.assert_array_equal(rows(), new if command == "refine" else vectors)
    assert killed > 0


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ("", ConfigError, "which collection is meant: another, docs"),
        ("?collection=gone", StoreNotFoundError, "no collection 'gone'; there are: another, docs"),
        ("?collection=docs&filter=%5B1%5D", ConfigError, "no object"),
        ("?collection=docs&filter=a%20b", ConfigError, "neither FIELD=VALUE nor JSON"),
        ("?collection=docs&filter=%7B%22a%22%3A1%2C%22b%22%3A2%7D", ConfigError, "operator"),
        ("?kollection=docs", ConfigError, "known: collection, filter"),
    ],
)
def test_addresses_that_fit_nothing(
    tmp_path: Path, vectors: Vectors, options: str, kind: type[SimskipError], match: str
) -> None:
    make_collection(tmp_path / "chroma", ids_for(50), vectors)
    with pytest.raises(kind, match=match):
        open_store(f"chroma:{tmp_path}/chroma{options}")


def test_what_is_no_chroma(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no such file or folder"):
        open_store(f"chroma:{tmp_path}/gone")
    with pytest.raises(StoreNotFoundError, match=r"no folder of Chroma's"):
        open_store(f"chroma:{tmp_path}")
    assert list(tmp_path.iterdir()) == []
    client_of(tmp_path / "empty").create_collection("docs", embedding_function=None)
    with pytest.raises(UnsupportedIndexError, match="holds no embeddings"):
        open_store(f"chroma:{tmp_path}/empty")
    with pytest.raises(TransientStoreError, match="does the server run"):
        open_store("chroma+http://localhost:1/docs")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """A server of Chroma's own on a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    program = Path(sys.executable).with_name("chroma")
    if not program.is_file():
        pytest.skip("there is no program 'chroma' beside Python")
    words = [str(program), "run", "--path", str(tmp_path / "served"), "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            for _ in range(300):
                with contextlib.suppress(Exception):
                    chromadb.HttpClient(host="localhost", port=port).heartbeat()
                    break
                time.sleep(0.1)
            yield port
        finally:
            running.kill()


def test_a_collection_of_a_server(
    tmp_path: Path, vectors: Vectors, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    client = chromadb.HttpClient(host="localhost", port=server)
    docs = client.create_collection(
        "docs", embedding_function=None, configuration={"hnsw": {"space": "l2"}}
    )
    names = id_names(ids_for(50))
    docs.add(ids=names, embeddings=vectors, documents=[f"body {name}" for name in names])
    uri = f"chroma+http://localhost:{server}/docs"

    def rows() -> Vectors:
        found = docs.get(ids=names, include=["embeddings"])
        order = np.argsort(found["ids"])
        return np.asarray(found["embeddings"], np.float32)[order]

    refiner = refine(uri, tmp_path)
    np.testing.assert_array_equal(rows(), refiner.refine_rows(vectors, ids_for(50)))
    docs.update(ids=["doc-00007"], embeddings=np.full((1, D), 3, np.float32))
    ss.rollback(open_store(uri))
    wanted = vectors.copy()
    wanted[7] = 3
    np.testing.assert_array_equal(rows(), wanted)
    assert docs.get(ids=["doc-00003"])["documents"] == ["body doc-00003"]
    with pytest.raises(StoreNotFoundError, match="no collection 'gone'"):
        open_store(uri.replace("docs", "gone"))


def test_a_folder_of_langchain(tmp_path: Path, vectors: Vectors) -> None:
    package = pytest.importorskip("langchain_chroma")
    base: Any = pytest.importorskip("langchain_core.embeddings").Embeddings

    class Known(base):  # type: ignore[misc]
        """Embeds a number as the row of that number."""

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [vectors[int(text)].tolist() for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    folder = tmp_path / "chroma_db"
    texts = [str(at) for at in range(50)]
    metadatas = [{"source": f"s{at}"} for at in range(50)]
    package.Chroma.from_texts(texts, Known(), metadatas, persist_directory=str(folder))
    store = open_store(f"chroma:{folder}")
    found = list(store.scan(100, fields=["source", "document"]))
    rows = [int(text) for batch in found for text in batch.fields["document"]]
    assert [s for batch in found for s in batch.fields["source"]] == [f"s{row}" for row in rows]
    refiner = refine(f"chroma:{folder}", tmp_path)
    ids = np.concatenate([batch.ids for batch in found])
    wanted = refiner.refine_rows(vectors[rows], ids)
    now = np.concatenate([b.vectors for b in open_store(f"chroma:{folder}").scan(100)])
    np.testing.assert_array_equal(now, wanted)
    loaded = package.Chroma(persist_directory=str(folder), embedding_function=Known())
    assert len(loaded.similarity_search("3", k=5)) == 5
    assert ss.rollback(open_store(f"chroma:{folder}"))["exact"]


def test_a_folder_of_llama_index(tmp_path: Path, vectors: Vectors) -> None:
    package = pytest.importorskip("llama_index.vector_stores.chroma")
    schema = pytest.importorskip("llama_index.core.schema")
    folder = tmp_path / "chroma_db"
    made = client_of(folder).create_collection("quickstart", embedding_function=None)
    nodes = [
        schema.TextNode(id_=f"n{at:02}", text=str(at), metadata={"source": f"s{at}"}, embedding=row)
        for at, row in enumerate(vectors.tolist())
    ]
    package.ChromaVectorStore(chroma_collection=made).add(nodes)
    (batch,) = open_store(f"chroma:{folder}").scan(100, fields=["source"])
    assert [*batch.fields["source"]] == [f"s{at}" for at in range(50)]
    refine(f"chroma:{folder}", tmp_path)
    assert ss.rollback(open_store(f"chroma:{folder}"))["exact"]
    np.testing.assert_array_equal(rows_of(folder, "quickstart")[1], vectors)
