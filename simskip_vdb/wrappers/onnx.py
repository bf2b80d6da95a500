"""A refiner as an ONNX graph, for services without Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import DataError, MissingDependencyError
from simskip_vdb.moving import NEAREST
from simskip_vdb.refiner import Refiner
from simskip_vdb.wrappers.loading import ANYTHING, Expected, load

try:
    import onnxruntime
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper
except ImportError as error:
    raise MissingDependencyError("onnx and onnxruntime", "wrappers") from error

INPUT, OUTPUT = "vectors", "refined"
OPSET, IR_VERSION = 17, 8  # read by onnxruntime from 1.12
TOLERANCE = 1e-5
SAMPLES = 256


def export_onnx(
    refiner: Refiner | Path | str, path: Path | str, *, expect: Expected = ANYTHING
) -> None:
    """Write a graph that does to queries what the refiner does, after comparing the two.

    It takes ``vectors`` and returns ``refined``, both float32 of shape (n, d) for any n. Its
    metadata tells the refiner: ``simskip.revision``, ``simskip.dim``, ``simskip.metric`` and
    ``simskip.side``.

    Args:
        refiner: A refiner, or the folder that holds it.
        path: The file to write.
        expect: What the refiner has to be.

    Raises:
        ConfigError: The refiner is not the expected one, or there is none in the folder.
        DataError: Its files are damaged; or onnxruntime computes something else than numpy, by
            more than 1e-5 of a vector's length, and nothing was written.
    """
    loaded = load(refiner, expect)
    model = _model(loaded)
    checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    off = _difference(content, loaded)
    if not off <= TOLERANCE:
        raise DataError(
            f"the graph of refiner {loaded.id} differs from numpy by {off:.1e} of a vector's "
            f"length, more than {TOLERANCE:.0e}; nothing was written, use the refiner itself"
        )
    Path(path).write_bytes(content)


def _difference(content: bytes, refiner: Refiner) -> float:
    """Return how far onnxruntime is from numpy at most, relative to a vector's length."""
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-3, 3, (SAMPLES, 1))
    vectors = (rng.standard_normal((SAMPLES, refiner.dim)) * sizes).astype(np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run([OUTPUT], {INPUT: vectors})
    off: Vectors = np.linalg.norm(found - refiner(vectors), axis=1)
    return float((off / np.linalg.norm(vectors, axis=1)).max())


def _model(refiner: Refiner) -> ModelProto:
    graph = _skip_connection(refiner) if refiner.moves_queries else _identity(refiner.dim)
    model = helper.make_model(
        graph,
        producer_name="simskip-vdb",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    facts = {
        "simskip.revision": refiner.id,
        "simskip.dim": str(refiner.dim),
        "simskip.metric": refiner.metric.value,
        "simskip.side": refiner.side.value,
    }
    helper.set_model_props(model, facts)
    return model


def _identity(dim: int) -> GraphProto:
    return _graph(dim, [helper.make_node("Identity", [INPUT], [OUTPUT])], {})


def _skip_connection(refiner: Refiner) -> GraphProto:
    """Return the refiner's formula for rows that have such a form, x for others."""
    constants: dict[str, NDArray[np.generic]] = {
        "alpha": np.array(refiner.alpha, np.float32),
        "origin": refiner.origin if len(refiner.origin) else np.zeros(refiner.dim, np.float32),
        "nearest": np.array(NEAREST, np.float32),
    }
    nodes = [
        *_normalise(INPUT, "unit"),
        helper.make_node("Sub", ["unit", "origin"], ["apart"]),
        *_normalise("apart", "start"),
        helper.make_node("Mul", ["start_length", "start_peak"], ["distance"]),
    ]
    hidden = "start"
    for number, (weight, bias) in enumerate(refiner.layers):
        name = f"layer{number}"
        constants[f"{name}_weight"], constants[f"{name}_bias"] = weight, bias
        inputs = [hidden, f"{name}_weight", f"{name}_bias"]
        nodes.append(helper.make_node("Gemm", inputs, [name], transB=1))
        hidden = name
        if number < len(refiner.layers) - 1:
            hidden = f"{name}_relu"
            nodes.append(helper.make_node("Relu", [name], [hidden]))
    nodes += [
        helper.make_node("Mul", [hidden, "alpha"], ["step"]),
        helper.make_node("Add", ["start", "step"], ["moved"]),
        *_normalise("moved", "direction"),
        helper.make_node("Mul", ["direction", "distance"], ["around"]),
        helper.make_node("Add", ["origin", "around"], ["placed"]),
        *_normalise("placed", "ends"),
        helper.make_node("Mul", ["ends", "unit_length"], ["in_proportion"]),
        helper.make_node("Mul", ["in_proportion", "unit_peak"], ["scaled"]),
        # What has no direction or is not finite has become NaN on the way, and stays as it was.
        helper.make_node("IsNaN", ["scaled"], ["is_nan"]),
        helper.make_node("IsInf", ["scaled"], ["is_inf"]),
        helper.make_node("Or", ["is_nan", "is_inf"], ["is_odd"]),
        helper.make_node("Greater", ["distance", "nearest"], ["is_apart"]),
        helper.make_node("Not", ["is_apart"], ["is_near"]),
        helper.make_node("Or", ["is_odd", "is_near"], ["is_broken"]),
        helper.make_node("Cast", ["is_broken"], ["broken_parts"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["broken_parts"], ["broken_row"], axes=[1]),  # (n, 1)
        helper.make_node("Cast", ["broken_row"], ["stays"], to=TensorProto.BOOL),
        helper.make_node("Where", ["stays", INPUT, "scaled"], [OUTPUT]),
    ]
    return _graph(refiner.dim, nodes, constants)


def _normalise(rows: str, name: str) -> list[NodeProto]:
    """Return nodes that give rows the length 1; it was `name`_length times `name`_peak.

    Dividing by the largest number first keeps squares within float32, whatever the length.
    """
    return [
        helper.make_node("Abs", [rows], [f"{name}_sizes"]),
        helper.make_node("ReduceMax", [f"{name}_sizes"], [f"{name}_peak"], axes=[1]),  # (n, 1)
        helper.make_node("Div", [rows, f"{name}_peak"], [f"{name}_even"]),
        helper.make_node("ReduceL2", [f"{name}_even"], [f"{name}_length"], axes=[1]),  # (n, 1)
        helper.make_node("Div", [f"{name}_even", f"{name}_length"], [name]),
    ]


def _graph(
    dim: int, nodes: list[NodeProto], constants: dict[str, NDArray[np.generic]]
) -> GraphProto:
    return helper.make_graph(
        nodes,
        "refiner",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", dim])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", dim])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
