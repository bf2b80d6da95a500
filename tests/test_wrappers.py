"""Refiners in services: what is loaded, and LangChain and LlamaIndex around known vectors."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from builders import change, flat, random_refiner
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import TextNode
from numpy.typing import NDArray
from test_refiner import slow_refined

from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Metric, Side, Vectors
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.judgments import Judgments
from simskip_vdb.pipeline import Settings, refine
from simskip_vdb.refiner import LateRule, Refiner
from simskip_vdb.wrappers import Expected
from simskip_vdb.wrappers.langchain import RefinedEmbeddings
from simskip_vdb.wrappers.llama_index import RefinedEmbedding
from simskip_vdb.wrappers.onnx import export_onnx
from simskip_vdb.wrappers.sentence_transformers import RefinerModule

COUNT, DIM = 40, 12
THEIRS = ("torch", "onnx", "onnxruntime", "sentence_transformers", "langchain_core", "llama_index")


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return (rng.normal(size=(COUNT, DIM)) * rng.uniform(0.1, 9, (COUNT, 1))).astype(np.float32)


@pytest.fixture
def refiner() -> Refiner:
    return random_refiner(DIM, np.arange(COUNT), side=Side.BOTH)


class Known(Embeddings):
    """Embeds a number as the row of that number."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        self.vectors = vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = self.vectors[int(text)].tolist()
        return vector


class Numbers(BaseEmbedding):
    """Embeds a number as the row of that number, and notes the calls."""

    rows: Any
    calls: list[str] = Field(default_factory=list)

    def _get_query_embedding(self, query: str) -> list[float]:
        self.calls.append("query")
        return self._row(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        self.calls.append("async query")
        return self._row(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        self.calls.append("text")
        return self._row(text)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        self.calls.append("async text")
        return self._row(text)

    def _row(self, text: str) -> list[float]:
        row: list[float] = self.rows[int(text)].tolist()
        return row


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


# What every wrapper checks when it loads.


def _into_langchain(refiner: Refiner | Path, expect: Expected, work: Path) -> Refiner:
    return RefinedEmbeddings(Known(np.eye(DIM)), refiner, expect=expect).refiner


def _into_llama_index(refiner: Refiner | Path, expect: Expected, work: Path) -> Refiner:
    return RefinedEmbedding(Numbers(rows=np.eye(DIM)), refiner, expect=expect).refiner


def _into_module(refiner: Refiner | Path, expect: Expected, work: Path) -> Refiner:
    return RefinerModule(refiner, expect=expect).refiner


def _into_graph(refiner: Refiner | Path, expect: Expected, work: Path) -> Refiner:
    export_onnx(refiner, work / "graph.onnx", expect=expect)
    return refiner if isinstance(refiner, Refiner) else Refiner.load(refiner)


Into = Callable[[Refiner | Path, Expected, Path], Refiner]
every_wrapper = pytest.mark.parametrize(
    "into", [_into_langchain, _into_llama_index, _into_module, _into_graph]
)


@every_wrapper
def test_the_expected_refiner_is_taken(into: Into, refiner: Refiner, tmp_path: Path) -> None:
    refiner.save(tmp_path / "refiner")
    for expect in (
        Expected(),
        Expected(dim=DIM),
        Expected(revision=refiner.id, dim=DIM, metric="dot"),
        Expected(metric=Metric.DOT),
    ):
        assert into(refiner, expect, tmp_path) is refiner
        assert into(tmp_path / "refiner", expect, tmp_path).id == refiner.id


@every_wrapper
@pytest.mark.parametrize(
    ("expect", "says"),
    [
        (Expected(revision="0" * 12), "revision [0-9a-f]{12}, not 0{12}; load"),
        (Expected(dim=13), "dimension 12, not 13; load"),
        (Expected(metric="cosine"), "metric dot, not cosine; load"),
        (Expected(metric=Metric.EUCLID, dim=1), "dimension 12, not 1; metric dot, not euclid"),
    ],
)
def test_another_refiner_is_refused(
    into: Into, refiner: Refiner, tmp_path: Path, expect: Expected, says: str
) -> None:
    refiner.save(tmp_path / "refiner")
    for given in (refiner, tmp_path / "refiner"):
        with pytest.raises(ConfigError, match=f"refiner {refiner.id} has .*{says}"):
            into(given, expect, tmp_path)
    assert not (tmp_path / "graph.onnx").exists()


@every_wrapper
def test_a_damaged_or_missing_folder_is_refused(
    into: Into, refiner: Refiner, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no refiner in .*refiner\.json is missing"):
        into(tmp_path / "nowhere", Expected(), tmp_path)
    refiner.save(tmp_path)
    settings = json.loads((tmp_path / "refiner.json").read_text())
    (tmp_path / "refiner.json").write_text(json.dumps({**settings, "alpha": 0.25}))
    with pytest.raises(DataError, match="is damaged"):
        into(tmp_path, Expected(), tmp_path)
    (tmp_path / "refiner.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="is damaged"):
        into(tmp_path, Expected(), tmp_path)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="no metric 'l2'; give one of cosine, dot, euclid"):
        Expected(metric="l2")


# What importing loads.


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_loads_no_framework() -> None:
    done = python("import sys, simskip_vdb, simskip_vdb.wrappers; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert "simskip_vdb.wrappers" in loaded
    assert not loaded & set(THEIRS)


@pytest.mark.parametrize("module", ["onnx", "langchain", "llama_index"])
def test_a_wrapper_loads_its_framework_alone(module: str) -> None:
    done = python(f"import sys, simskip_vdb.wrappers.{module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"torch", "sentence_transformers"}


@pytest.mark.parametrize(
    ("module", "hidden"),
    [
        ("onnx", "onnx"),
        ("onnx", "onnxruntime"),
        ("sentence_transformers", "torch"),
        ("sentence_transformers", "sentence_transformers"),
        ("langchain", "langchain_core"),
        ("llama_index", "llama_index"),
    ],
)
def test_a_missing_package_names_the_extra(module: str, hidden: str) -> None:
    done = python(
        f"import sys; sys.modules[{hidden!r}] = None; import simskip_vdb.wrappers.{module}"
    )
    assert "MissingDependencyError" in done.stderr
    assert "pip install 'simskip-vdb[wrappers]'" in done.stderr


# LangChain.


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_langchain_queries_follow_the_formula(
    refiner: Refiner, vectors: Vectors, dtype: str
) -> None:
    given = vectors.astype(dtype)
    wrapped = RefinedEmbeddings(Known(given), refiner)
    for row in range(COUNT):
        found = wrapped.embed_query(str(row))
        assert all(type(number) is float for number in found)
        expected = slow_refined(refiner, given[row].astype(np.float32), None)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert found == refiner(given[row : row + 1])[0].tolist()
        assert asyncio.run(wrapped.aembed_query(str(row))) == found


@pytest.mark.parametrize("side", [Side.DOCS, Side.QUERIES, Side.BOTH])
@pytest.mark.parametrize("count", [0, 1, COUNT])
def test_langchain_documents_stay_raw(
    refiner: Refiner, vectors: Vectors, side: Side, count: int
) -> None:
    wrapped = RefinedEmbeddings(Known(vectors), replace(refiner, side=side, late=LateRule.F))
    raw = vectors[:count].tolist()
    assert wrapped.embed_documents(names(count)) == raw
    assert asyncio.run(wrapped.aembed_documents(names(count))) == raw
    assert (wrapped.embed_query("0") == vectors[0].tolist()) is (side is Side.DOCS)


def test_langchain_searches_raw_documents_with_refined_queries(
    refiner: Refiner, vectors: Vectors
) -> None:
    store = InMemoryVectorStore(RefinedEmbeddings(Known(vectors), refiner))
    store.add_texts(names(COUNT))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = refiner(vectors)
    assert (np.argmax(unit @ moved.T, axis=0) != np.arange(COUNT)).any()
    for row in range(COUNT):
        (found,) = store.similarity_search(str(row), k=1)
        assert found.page_content == str(np.argmax(unit @ moved[row]))


def test_vectors_without_a_direction_pass(refiner: Refiner, vectors: Vectors) -> None:
    vectors[0], vectors[1, 2], vectors[2, 3] = 0, np.nan, np.inf
    langchain = RefinedEmbeddings(Known(vectors), refiner)
    llama_index = RefinedEmbedding(Numbers(rows=vectors), refiner)
    for row in range(3):
        np.testing.assert_array_equal(langchain.embed_query(str(row)), vectors[row])
        np.testing.assert_array_equal(llama_index.get_query_embedding(str(row)), vectors[row])


@pytest.mark.parametrize("side", [Side.DOCS, Side.QUERIES, Side.BOTH])
@pytest.mark.parametrize("dim", [0, 1, DIM + 1])
def test_another_dimension_is_refused_at_the_first_vector(
    refiner: Refiner, side: Side, dim: int
) -> None:
    refiner = replace(refiner, side=side)
    langchain = RefinedEmbeddings(Known(np.ones((2, dim))), refiner)
    llama_index = RefinedEmbedding(Numbers(rows=np.ones((2, dim))), refiner)
    says = f"gives {dim} dimensions, refiner {refiner.id} takes 12; use the model"
    for call in (
        lambda: langchain.embed_query("0"),
        lambda: langchain.embed_documents(["0", "1"]),
        lambda: asyncio.run(langchain.aembed_query("0")),
        lambda: asyncio.run(langchain.aembed_documents(["0"])),
        lambda: llama_index.get_query_embedding("0"),
        lambda: llama_index.get_text_embedding("0"),
        lambda: llama_index.get_text_embedding_batch(["0", "1"]),
        lambda: asyncio.run(llama_index.aget_query_embedding("0")),
        lambda: asyncio.run(llama_index.aget_text_embedding_batch(["0"])),
    ):
        with pytest.raises(DataError, match=says):
            call()


@pytest.mark.parametrize("rule", list(LateRule))
def test_documents_of_a_wrapper_are_late_rows_of_the_next_run(
    vectors: Vectors, tmp_path: Path, rule: LateRule
) -> None:
    refiner = replace(random_refiner(DIM, np.arange(COUNT - 5)), late=rule)
    refiner.save(tmp_path / "refiner")
    path = flat(tmp_path / "index.faiss", vectors[:-5])
    settings = Settings(refiner=tmp_path / "refiner", accept_unmeasured=True)
    refine(open_store(str(path)), Judgments(), settings)
    refiner.check(open_store(str(path)))
    wrapped = RefinedEmbeddings(Known(vectors), refiner)
    new = np.array(wrapped.embed_documents(names(COUNT)[-5:]), np.float32)
    change(path, lambda index: index.add(new))
    refine(open_store(str(path)), Judgments(), settings)
    rows = faiss.read_index(str(path)).reconstruct_n(0, COUNT)
    for row in range(COUNT):
        raw = row >= COUNT - 5 and rule is LateRule.RAW
        expected = vectors[row] if raw else slow_refined(refiner, vectors[row], row)
        np.testing.assert_allclose(rows[row], expected, rtol=1e-5, atol=1e-5)


# LlamaIndex.


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_llama_index_queries_follow_the_formula(
    refiner: Refiner, vectors: Vectors, dtype: str
) -> None:
    given = vectors.astype(dtype)
    wrapped = RefinedEmbedding(Numbers(rows=given), refiner)
    for row in range(COUNT):
        found = wrapped.get_query_embedding(str(row))
        assert all(type(number) is float for number in found)
        expected = slow_refined(refiner, given[row].astype(np.float32), None)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert asyncio.run(wrapped.aget_query_embedding(str(row))) == found
    mean = wrapped.get_agg_embedding_from_queries(["0", "1"])
    np.testing.assert_allclose(mean, refiner(given[:2]).mean(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [Side.DOCS, Side.QUERIES, Side.BOTH])
@pytest.mark.parametrize("count", [0, 1, COUNT])
def test_llama_index_texts_stay_raw(
    refiner: Refiner, vectors: Vectors, side: Side, count: int
) -> None:
    inner = Numbers(rows=vectors, embed_batch_size=7, model_name="numbers")
    wrapped = RefinedEmbedding(inner, replace(refiner, side=side))
    assert (wrapped.model_name, wrapped.embed_batch_size) == ("numbers", 7)
    raw = vectors[:count].tolist()
    assert wrapped.get_text_embedding_batch(names(count)) == raw
    assert asyncio.run(wrapped.aget_text_embedding_batch(names(count))) == raw
    assert wrapped.get_text_embedding("3") == vectors[3].tolist()
    assert asyncio.run(wrapped.aget_text_embedding("3")) == vectors[3].tolist()
    assert (wrapped.get_query_embedding("0") == vectors[0].tolist()) is (side is Side.DOCS)


def test_llama_index_calls_become_the_same_calls(refiner: Refiner, vectors: Vectors) -> None:
    inner = Numbers(rows=vectors)
    wrapped = RefinedEmbedding(inner, refiner)
    wrapped.get_query_embedding("0")
    wrapped.get_text_embedding_batch(["0", "1"])
    asyncio.run(wrapped.aget_query_embedding("0"))
    asyncio.run(wrapped.aget_text_embedding("0"))
    assert inner.calls == ["query", "text", "text", "async query", "async text"]


def test_llama_index_searches_raw_nodes_with_refined_queries(
    refiner: Refiner, vectors: Vectors
) -> None:
    wrapped = RefinedEmbedding(Numbers(rows=vectors), refiner)
    nodes = [TextNode(text=str(row), id_=str(row)) for row in range(COUNT)]
    retriever = VectorStoreIndex(nodes, embed_model=wrapped).as_retriever(similarity_top_k=1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    moved = refiner(vectors)
    for row in range(COUNT):
        (found,) = retriever.retrieve(str(row))
        assert found.node.node_id == str(np.argmax(unit @ moved[row]))


def test_llama_index_workers_get_the_refiner_too(refiner: Refiner, vectors: Vectors) -> None:
    wrapped = RefinedEmbedding(Numbers(rows=vectors), refiner)
    again = pickle.loads(pickle.dumps(wrapped))
    assert again.refiner.id == refiner.id
    assert again.get_query_embedding("1") == wrapped.get_query_embedding("1")
