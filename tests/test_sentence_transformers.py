"""A refiner as the last module of a SentenceTransformer that counts words."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import random_refiner
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW
from test_refiner import slow_refined

from simskip_vdb.datatypes import Side, Vectors
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.refiner import Refiner
from simskip_vdb.wrappers import sentence_transformers as wrapper
from simskip_vdb.wrappers.sentence_transformers import RefinerModule

DIM = 12
WORDS = [f"word{i}" for i in range(DIM)]
TEXTS = ["word1 word2 word2", "word3", "word4 word5 word0 word7", "unknown"]


@pytest.fixture
def refiner() -> Refiner:
    return random_refiner(DIM, np.arange(20), side=Side.BOTH)


def encoder(*more: torch.nn.Module) -> SentenceTransformer:
    return SentenceTransformer(modules=[BoW(WORDS), *more], device="cpu")


def counts(texts: list[str]) -> Vectors:
    return np.array([[text.split().count(word) for word in WORDS] for text in texts], np.float32)


def test_queries_follow_the_formula_and_documents_stay_raw(refiner: Refiner) -> None:
    model = encoder(RefinerModule(refiner))
    found = model.encode_query(TEXTS)
    raw = counts(TEXTS)
    expected = [slow_refined(refiner, x, None) for x in raw[:3]]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, refiner(raw))
    np.testing.assert_array_equal(found[3], np.zeros(DIM))
    np.testing.assert_array_equal(model.encode_document(TEXTS), raw)


def test_an_encoder_that_has_a_refiner_appended(refiner: Refiner) -> None:
    model = encoder()
    model.append(RefinerModule(refiner))
    np.testing.assert_array_equal(model.encode_query(TEXTS), refiner(counts(TEXTS)))
    assert model.get_embedding_dimension() == DIM


@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_number_of_queries(refiner: Refiner, count: int) -> None:
    texts = [f"word{i % DIM} word{i // DIM}" for i in range(count)]
    found = encoder(RefinerModule(refiner)).encode_query(texts, batch_size=7)
    assert len(found) == count
    if count:
        np.testing.assert_allclose(found, refiner(counts(texts)), rtol=1e-5, atol=1e-6)


def test_side_docs_returns_everything_as_it_is(refiner: Refiner) -> None:
    model = encoder(RefinerModule(replace(refiner, side=Side.DOCS)))
    for encode in (model.encode, model.encode_query, model.encode_document):
        np.testing.assert_array_equal(encode(TEXTS), counts(TEXTS))


def test_what_is_neither_query_nor_document_is_refused(refiner: Refiner) -> None:
    model = encoder(RefinerModule(refiner))
    with pytest.raises(ConfigError, match="task is None; call encode_query or encode_document"):
        model.encode(TEXTS)
    with pytest.raises(ConfigError, match="task is 'clustering'"):
        model.encode(TEXTS, task="clustering")
    np.testing.assert_array_equal(model.encode(TEXTS, task="query"), model.encode_query(TEXTS))


@pytest.mark.parametrize("side", [Side.DOCS, Side.QUERIES, Side.BOTH])
@pytest.mark.parametrize("task", ["query", "document"])
def test_another_dimension_is_refused_at_the_first_batch(
    refiner: Refiner, side: Side, task: str
) -> None:
    model = SentenceTransformer(
        modules=[BoW(WORDS[:5]), RefinerModule(replace(refiner, side=side))], device="cpu"
    )
    with pytest.raises(DataError, match=r"gives 5 dimensions, refiner .* takes 12"):
        model.encode(["word1"], task=task)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_other_features_stay(
    refiner: Refiner, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    vectors = torch.tensor(rng.normal(size=(6, DIM)), dtype=dtype, requires_grad=True)
    vectors.data[0, 3] = np.nan
    features: dict[str, Any] = {"sentence_embedding": vectors, "input_ids": object()}
    found = RefinerModule(refiner)(features, task="query")
    assert found["input_ids"] is features["input_ids"]
    assert found["sentence_embedding"].dtype == dtype
    expected = torch.from_numpy(refiner(vectors.detach().float().numpy())).to(dtype)
    torch.testing.assert_close(found["sentence_embedding"], expected, equal_nan=True)
    assert features["sentence_embedding"] is vectors


def test_save_and_load_by_dotted_path(refiner: Refiner, tmp_path: Path) -> None:
    model = encoder(RefinerModule(refiner))
    model.save(str(tmp_path), create_model_card=False)
    assert sorted(path.name for path in (tmp_path / "1_RefinerModule").iterdir()) == [
        "refiner.json",
        "refiner.safetensors",
    ]
    again = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    module = again[1]
    assert isinstance(module, RefinerModule)
    assert module.refiner.id == refiner.id
    np.testing.assert_array_equal(again.encode_query(TEXTS), model.encode_query(TEXTS))
    np.testing.assert_array_equal(again.encode_document(TEXTS), model.encode_document(TEXTS))

    np.save(tmp_path / "expected.npy", model.encode_query(TEXTS))
    code = f"""
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path)!r}, device="cpu", trust_remote_code=True)
found = model.encode_query({TEXTS!r})
np.testing.assert_array_equal(found, np.load({str(tmp_path / "expected.npy")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_damaged_model_is_refused(refiner: Refiner, tmp_path: Path) -> None:
    encoder(RefinerModule(refiner)).save(str(tmp_path), create_model_card=False)
    folder = tmp_path / "1_RefinerModule"

    def load() -> SentenceTransformer:
        return SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)

    random_refiner(DIM, np.arange(20), seed=1).save(tmp_path / "other")
    (tmp_path / "other" / "refiner.safetensors").replace(folder / "refiner.safetensors")
    with pytest.raises(DataError, match=r"is damaged: .*make .*, not"):
        load()
    (folder / "refiner.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="is damaged"):
        load()
    (folder / "refiner.json").unlink()
    with pytest.raises(ConfigError, match=r"no refiner in .*1_RefinerModule"):
        load()
    (folder / "refiner.safetensors").unlink()
    folder.rmdir()
    with pytest.raises(ConfigError, match=r"no refiner in .*1_RefinerModule"):
        load()


def test_a_model_of_the_hub_is_fetched_as_it_was_asked_for(
    refiner: Refiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def fetch(name: str, subfolder: str, **options: object) -> str | None:
        asked.append({"name": name, "subfolder": subfolder, **options})
        return str(tmp_path) if name == "owner/model" else None

    monkeypatch.setattr(wrapper, "load_dir_path", fetch)
    refiner.save(tmp_path)
    options: dict[str, Any] = {
        "token": "t",
        "cache_folder": "c",
        "revision": "r",
        "local_files_only": True,
    }
    module = RefinerModule.load("owner/model", "1_RefinerModule", **options, backend="torch")
    assert module.refiner.id == refiner.id
    assert asked == [{"name": "owner/model", "subfolder": "1_RefinerModule", **options}]
    with pytest.raises(ConfigError, match=r"no refiner in .*nothing"):
        RefinerModule.load("owner/nothing")
