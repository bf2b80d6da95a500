"""Files of arrays written and read by NumPy and safetensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from simskip_vdb.datatypes import Ids, Vectors, id_text

KINDS = (
    "npy", "npy half", "npy double", "npy columns", "npy big-endian", "npz", "npz packed",
    "npz double columns", "safetensors", "safetensors half", "safetensors double",
    "safetensors brain",
)  # fmt: skip
COARSE = ("half", "brain")


def numbers_of(kind: str, vectors: Any) -> Any:  # noqa: ANN401 of any width
    """Return vectors as a kind of file stores them."""
    types: dict[str, Any] = {
        "half": np.float16, "double": np.float64, "brain": ml_dtypes.bfloat16, "big-endian": ">f4",
    }  # fmt: skip
    named = [types[word] for word in kind.split() if word in types]
    numbers = np.asarray(vectors).astype(named[0] if named else np.float32)
    return np.asfortranarray(numbers) if "columns" in kind else np.ascontiguousarray(numbers)


def write_array(folder: Path, kind: str, ids: Ids | None, vectors: Any) -> str:  # noqa: ANN401
    """Write a file of some kind, with other arrays where there is room; return its address.

    Ids are in the file where there is room, else in one beside it.
    """
    scheme = kind.split()[0]
    path, numbers = folder / f"rows.{scheme}", numbers_of(kind, vectors)
    arrays = {"first": np.arange(5), "emb": numbers, "last": np.eye(3, dtype=np.int8)}
    options = [] if scheme == "npy" else ["key=emb"]
    if ids is not None and scheme == "npy":
        np.save(folder / "ids.npy", ids)
        options.append("ids=ids.npy")
    elif ids is not None:
        arrays["row_ids"] = ids.astype(np.int64)
        options.append("ids=row_ids")
    if scheme == "npy":
        np.save(path, numbers)
    elif scheme == "npz":
        (np.savez_compressed if "packed" in kind else np.savez)(path, **arrays)
    else:
        save_file(arrays, path, metadata={"made by": "a test"})
    return f"{scheme}:{path}" + ("?" + "&".join(options) if options else "")


def arrays_in(path: Path) -> dict[str, Any]:
    """Read all arrays of a file, by name."""
    if path.suffix == ".npy":
        return {"emb": np.load(path)}
    if path.suffix == ".npz":
        with np.load(path) as held:
            return dict(held)
    return dict(load_file(path))


def raw_rows(path: Path) -> tuple[Ids, Vectors]:
    """Read ids, or positions, and vectors of a file."""
    arrays = arrays_in(path)
    vectors = np.ascontiguousarray(arrays["emb"].astype(np.float32))
    beside = path.with_name("ids.npy")
    held = np.load(beside) if beside.exists() else arrays.get("row_ids", np.arange(len(vectors)))
    return (id_text(held) if held.dtype.kind == "S" else held), vectors
