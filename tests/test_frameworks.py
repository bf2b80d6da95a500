"""Folders that LangChain, LlamaIndex and Haystack save: refined, and opened again by themselves.

These packages come with the extra `frameworks`; nothing here needs a network.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import random_refiner

from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import ConfigError, StoreError
from simskip_vdb.judgments import Judgments
from simskip_vdb.pipeline import Settings, refine
from simskip_vdb.upkeep import rollback

COUNT, DIM = 60, 8


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture(autouse=True)
def _their_warnings(recwarn: pytest.WarningsRecorder) -> None:
    """Leave warnings of other packages to them."""


def refined(folder: Path, vectors: Vectors, ids: Any = None, work: Path | None = None) -> Vectors:  # noqa: ANN401
    """Refine what a folder holds, and return what its rows should be now."""
    ids = np.arange(len(vectors)) if ids is None else ids
    refiner = random_refiner(DIM, ids, metric=open_store(str(folder)).info().metric)
    work = work or folder.parent
    refiner.save(work / "refiner")
    settings = Settings(refiner=work / "refiner", accept_unmeasured=True)
    report = refine(open_store(str(folder)), Judgments(), settings)
    assert report.written is not None
    assert report.written["rows"] == len(vectors)
    return refiner.refine_rows(vectors, ids)


@pytest.mark.filterwarnings("default")
def test_langchain(tmp_path: Path, vectors: Vectors) -> None:
    community = pytest.importorskip("langchain_community.vectorstores.faiss")
    base: Any = pytest.importorskip("langchain_core.embeddings").Embeddings

    class Known(base):  # type: ignore[misc]
        """Embeds a number as the row of that number."""

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [vectors[int(text)].tolist() for text in texts]

        def embed_query(self, text: str) -> list[float]:
            vector: list[float] = vectors[int(text)].tolist()
            return vector

    folder = tmp_path / "langchain"
    community.FAISS.from_texts([str(i) for i in range(COUNT)], Known()).save_local(str(folder))
    pickled = (folder / "index.pkl").read_bytes()
    new = refined(folder, vectors)
    again = community.FAISS.load_local(str(folder), Known(), allow_dangerous_deserialization=True)
    for row in range(0, COUNT, 7):
        (found,) = again.similarity_search_by_vector(new[row].tolist(), k=1)
        assert found.page_content == str(row)
    assert (folder / "index.pkl").read_bytes() == pickled
    assert rollback(open_store(str(folder)))["exact"]


@pytest.mark.filterwarnings("default")
def test_llama_index(tmp_path: Path, vectors: Vectors) -> None:
    core = pytest.importorskip("llama_index.core")
    stores = pytest.importorskip("llama_index.vector_stores.faiss")
    schema = pytest.importorskip("llama_index.core.schema")
    query = pytest.importorskip("llama_index.core.vector_stores")
    embedding = pytest.importorskip("llama_index.core.embeddings").MockEmbedding(embed_dim=DIM)
    folder = tmp_path / "llama"
    nodes = [
        schema.TextNode(text=f"text {i}", id_=f"node-{i}", embedding=vectors[i].tolist())
        for i in range(COUNT)
    ]
    context = core.StorageContext.from_defaults(
        vector_store=stores.FaissVectorStore(faiss_index=faiss.IndexFlatL2(DIM))
    )
    core.VectorStoreIndex(nodes, storage_context=context, embed_model=embedding)
    context.persist(persist_dir=str(folder))
    new = refined(folder, vectors)
    context = core.StorageContext.from_defaults(
        vector_store=stores.FaissVectorStore.from_persist_dir(str(folder)),
        persist_dir=str(folder),
    )
    again = core.load_index_from_storage(context, embed_model=embedding)
    retriever = again.as_retriever(similarity_top_k=1)
    for row in range(0, COUNT, 7):
        bundle = schema.QueryBundle(query_str="", embedding=new[row].tolist())
        (found,) = retriever.retrieve(bundle)
        assert found.node.get_content() == f"text {row}"
    assert query is not None
    assert rollback(open_store(str(folder)))["exact"]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,Flat"])
@pytest.mark.filterwarnings("default")
def test_haystack(tmp_path: Path, vectors: Vectors, factory: str) -> None:
    stores = pytest.importorskip("haystack_integrations.document_stores.faiss")
    document = pytest.importorskip("haystack").Document
    saved = tmp_path / "haystack" / "documents"
    saved.parent.mkdir()
    store = stores.FAISSDocumentStore(index_string=factory, embedding_dim=DIM)
    store.write_documents(
        [
            document(id=f"doc-{i}", content=str(i), embedding=vectors[i].tolist())
            for i in range(COUNT)
        ]
    )
    left = np.arange(COUNT)
    if factory == "Flat":
        store.delete_documents([f"doc-{i}" for i in range(0, COUNT, 5)])
        left = left[left % 5 > 0]
    store.save(saved)
    new = refined(saved.parent, vectors[left], left, tmp_path)
    again = stores.FAISSDocumentStore(index_path=str(saved), embedding_dim=DIM)
    for place in range(0, len(left), 7):
        (found,) = again.search(new[place].tolist(), top_k=1)
        assert found.id == f"doc-{left[place]}"
    assert rollback(open_store(str(saved)))["exact"]


# What is found in a folder, without the packages.


def index_file(path: Path, vectors: Vectors) -> Path:
    index = faiss.IndexFlatL2(DIM)
    index.add(vectors)
    path.parent.mkdir(exist_ok=True)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize(
    ("name", "other", "given"),
    [
        ("index.faiss", "index.pkl", ""),
        ("default__vector_store.json", "docstore.json", ""),
        ("documents.faiss", "documents.json", ""),
        ("documents.faiss", "documents.json", "documents"),
    ],
)
def test_a_folder_stands_for_its_index(
    tmp_path: Path, vectors: Vectors, name: str, other: str, given: str
) -> None:
    path = index_file(tmp_path / "saved" / name, vectors)
    (path.parent / other).write_bytes(pickle.dumps(Unopened()))
    store = open_store(str(path.parent / given))
    assert store.info().uri == f"faiss:{path}"
    new = refined(path.parent / given, vectors, work=tmp_path)
    np.testing.assert_array_equal(faiss.read_index(str(path)).reconstruct_n(0, COUNT), new)
    assert rollback(open_store(str(path.parent / given)))["exact"]


class Unopened:
    """Fails whoever unpickles it."""

    def __reduce__(self) -> Any:  # noqa: ANN401
        return exec, ("raise AssertionError('a pickle was opened')",)


def test_folders_that_stand_for_none_or_several(tmp_path: Path, vectors: Vectors) -> None:
    with pytest.raises(StoreError, match="no FAISS index"):
        open_store(str(tmp_path))
    (tmp_path / "default__vector_store.json").write_text('{"embedding_dict": {}}')
    with pytest.raises(StoreError, match="no FAISS index"):
        open_store(str(tmp_path))
    index_file(tmp_path / "a.faiss", vectors)
    assert open_store(str(tmp_path)).info().count == COUNT
    index_file(tmp_path / "b.faiss", vectors)
    with pytest.raises(ConfigError, match=r"a\.faiss, b\.faiss"):
        open_store(str(tmp_path))
