"""A refiner as an ONNX graph: onnxruntime and the reference evaluator against numpy and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import random_refiner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from test_refiner import slow_refined

from simskip_vdb.datatypes import Metric, Side, Vectors
from simskip_vdb.errors import DataError
from simskip_vdb.refiner import Refiner
from simskip_vdb.wrappers import onnx as wrapper
from simskip_vdb.wrappers.onnx import export_onnx

DIM = 12


@pytest.fixture
def refiner() -> Refiner:
    return random_refiner(DIM, np.arange(20), side=Side.BOTH)


@pytest.fixture
def vectors(rng: np.random.Generator) -> Vectors:
    return (rng.normal(size=(30, DIM)) * rng.uniform(0.1, 9, (30, 1))).astype(np.float32)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, vectors: NDArray[np.generic]) -> Vectors:
    found: Vectors = session(path).run(None, {"vectors": vectors})[0]
    return found


def by_reference(path: Path, vectors: Vectors) -> Vectors:
    with np.errstate(invalid="ignore"):
        (found,) = ReferenceEvaluator(str(path)).run(None, {"vectors": vectors})
    return np.asarray(found)


def test_the_graph_follows_the_formula(refiner: Refiner, vectors: Vectors, tmp_path: Path) -> None:
    export_onnx(refiner, tmp_path / "refiner.onnx")
    expected = [slow_refined(refiner, x, None) for x in vectors]
    for found in (
        run(tmp_path / "refiner.onnx", vectors),
        by_reference(tmp_path / "refiner.onnx", vectors),
        refiner(vectors),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 384])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_any_dimension_and_any_count(
    dim: int, count: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    refiner = random_refiner(dim, np.arange(20), side=Side.BOTH)
    export_onnx(refiner, tmp_path / "refiner.onnx")
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    found = run(tmp_path / "refiner.onnx", vectors)
    assert found.shape == (count, dim)
    off = np.linalg.norm(found - refiner(vectors), axis=1)
    assert (off <= 1e-5 * np.linalg.norm(vectors, axis=1)).all()


@pytest.mark.parametrize(
    "still",
    [
        Refiner.identity(DIM, side=Side.BOTH),
        random_refiner(DIM, np.arange(20), side=Side.DOCS),
        replace(random_refiner(DIM, np.arange(20), side=Side.BOTH), alpha=0.0),
    ],
)
def test_queries_that_do_not_move_keep_every_bit(
    still: Refiner, vectors: Vectors, tmp_path: Path
) -> None:
    vectors[3, 2], vectors[4] = np.nan, 0
    export_onnx(still, tmp_path / "refiner.onnx")
    assert run(tmp_path / "refiner.onnx", vectors).tobytes() == vectors.tobytes()


def test_rows_without_a_direction_keep_every_bit(
    refiner: Refiner, vectors: Vectors, tmp_path: Path
) -> None:
    vectors[0], vectors[1, 2], vectors[2, 3], vectors[3] = 0, np.nan, np.inf, -np.inf
    export_onnx(refiner, tmp_path / "refiner.onnx")
    for found in (
        run(tmp_path / "refiner.onnx", vectors),
        by_reference(tmp_path / "refiner.onnx", vectors),
    ):
        assert found[:4].tobytes() == vectors[:4].tobytes()
        np.testing.assert_allclose(found[4:], refiner(vectors)[4:], rtol=1e-4, atol=1e-5)


def test_a_direction_that_vanishes_stays(tmp_path: Path) -> None:
    """Layers that return -x̂ for the first axis leave nothing of it."""
    first = np.zeros((2, 2), np.float32)
    first[0, 0] = 1
    none = np.zeros(2, np.float32)
    refiner = Refiner(
        dim=2,
        side=Side.BOTH,
        metric=Metric.DOT,
        alpha=1.0,
        layers=((first, none), (first, none), (-first, none)),
    )
    export_onnx(refiner, tmp_path / "refiner.onnx")
    vectors = np.array([[3, 0], [0, 2], [-3, 0]], np.float32)
    assert refiner(vectors).tolist() == vectors.tolist()
    assert run(tmp_path / "refiner.onnx", vectors).tolist() == vectors.tolist()


@given(power=st.integers(-36, 36), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_any_length_moves_like_any_other(
    tmp_path_factory: pytest.TempPathFactory, power: int, seed: int
) -> None:
    refiner = random_refiner(DIM, np.arange(20), side=Side.BOTH)
    path = tmp_path_factory.getbasetemp() / "lengths.onnx"
    if not path.exists():
        export_onnx(refiner, path)
    unit = np.random.default_rng(seed).uniform(-1, 1, (5, DIM))
    vectors = (unit * 10.0**power).astype(np.float32)
    found = run(path, vectors).astype(np.float64) / 10.0**power
    expected = [slow_refined(refiner, x, None) for x in unit]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_graph_tells_its_refiner(refiner: Refiner, tmp_path: Path) -> None:
    export_onnx(refiner, tmp_path / "refiner.onnx")
    facts = {
        "simskip.revision": refiner.id,
        "simskip.dim": "12",
        "simskip.metric": "dot",
        "simskip.side": "both",
    }
    assert session(tmp_path / "refiner.onnx").get_modelmeta().custom_metadata_map == facts
    model = onnx.load(tmp_path / "refiner.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props} == facts
    assert model.producer_name == "simskip-vdb"
    assert {tensor.data_location for tensor in model.graph.initializer} == {0}


@pytest.mark.parametrize(
    "wrong", [np.ones((2, 5), "f4"), np.ones((2, DIM), "f8"), np.ones(DIM, "f4")]
)
def test_the_graph_refuses_what_does_not_fit(
    refiner: Refiner, tmp_path: Path, wrong: NDArray[np.generic]
) -> None:
    for given_refiner in (refiner, replace(refiner, side=Side.DOCS)):
        export_onnx(given_refiner, tmp_path / "refiner.onnx")
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            run(tmp_path / "refiner.onnx", wrong)


@pytest.mark.parametrize("off", [np.nan, 2e-5, 1.0])
def test_a_graph_that_computes_something_else_is_not_written(
    refiner: Refiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    built = wrapper._model
    bias = (refiner.layers[0][1] + off).astype(np.float32)
    (tmp_path / "refiner.onnx").write_bytes(b"the one from before")

    def wrong(given_refiner: Refiner) -> onnx.ModelProto:
        model = built(given_refiner)
        for tensor in model.graph.initializer:
            if tensor.name == "layer0_bias":
                tensor.CopyFrom(onnx.numpy_helper.from_array(bias, tensor.name))
        return model

    monkeypatch.setattr(wrapper, "_model", wrong)
    with pytest.raises(DataError, match=r"differs from numpy by .*nothing was written"):
        export_onnx(refiner, tmp_path / "refiner.onnx")
    assert (tmp_path / "refiner.onnx").read_bytes() == b"the one from before"
