"""Read everything that a FAISS index keeps, at every level, by FAISS's own attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

Index: TypeAlias = Any

PARTS = [
    "index",
    "base_index",
    "refine_index",
    "quantizer",
    "storage",
    "hnsw",
    "nsg",
    "pq",
    "sq",
    "rq",
    "lsq",
    "prq",
    "plsq",
    "rabitq",
    "direct_map",
]
LEARNED = [
    "trained",
    "centroids",
    "codebooks",
    "A",
    "b",
    "PCAMat",
    "mean",
    "eigenvalues",
    "center",
    "thresholds",
]
# Where a graph starts and how norms are cut depends on the vectors; the rest is Python's.
NOT_PARAMETERS = {"max_level", "entry_point", "enterpoint", "norm_min", "norm_max", "thisown"}


def parameters(index: Index) -> dict[str, Any]:
    """Return every number, flag and type, by its path in the tree."""
    found: dict[str, Any] = {}
    for path, part in walk(index):
        found[f"{path}type"] = type(part).__name__
        for name in dir(part):
            if name.startswith("_") or name in NOT_PARAMETERS:
                continue
            value = getattr(part, name, None)
            if isinstance(value, (bool, int, float, str)) and not name.isupper():
                found[f"{path}{name}"] = value
    return found


def learned(index: Index) -> dict[str, NDArray[Any]]:
    """Return everything that was learned from rows, by its path in the tree."""
    found = {}
    for path, part in walk(index):
        for name in LEARNED:
            values = getattr(part, name, None)
            if values is None or isinstance(values, (int, float)):
                continue
            array = faiss.vector_to_array(values)
            if len(array):
                found[f"{path}{name}"] = array
        if path.endswith("quantizer."):
            found[f"{path}rows"] = part.reconstruct_n(0, part.ntotal)
    return found


def id_order(index: Index) -> dict[str, NDArray[np.int64]]:
    """Return id maps, and the ids in all lists in ascending order."""
    found = {}
    for path, part in walk(index):
        if hasattr(part, "id_map"):
            found[f"{path}id_map"] = faiss.vector_to_array(part.id_map)
        if hasattr(part, "invlists"):
            lists = part.invlists
            ids = [
                faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy()
                for i in range(part.nlist)
                if lists.list_size(i)
            ]
            found[f"{path}ids"] = np.sort(np.concatenate(ids))
    return found


def walk(part: Index, path: str = "") -> Iterator[tuple[str, Index]]:
    """Yield every part of an index with its path; the index must live as long."""
    if isinstance(part, faiss.Index):
        part = faiss.downcast_index(part)
    yield path, part
    if hasattr(part, "chain"):
        for i in range(part.chain.size()):
            yield f"{path}chain{i}.", faiss.downcast_VectorTransform(part.chain.at(i))
    for name in PARTS:
        child = getattr(part, name, None)
        if child is not None and not isinstance(child, (int, float)):
            yield from walk(child, f"{path}{name}.")
