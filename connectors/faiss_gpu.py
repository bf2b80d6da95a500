"""Let FAISS train, assign rows to lists and search exactly on a GPU, where it has one.

With `faiss-cpu`, or without a device, every function here gives back what it was given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import faiss

from simskip_vdb.connectors.faiss_tree import FLAT, IVF, PRODUCT, Index

log = logging.getLogger(__name__)

MOST_NEIGHBOURS = 2048
"""More than this a GPU does not find at once."""


def on_gpu(index: Index) -> Index:
    """Return a copy of a Flat index on the first GPU.

    Any other index is returned itself, as is one for which there is no GPU or no room on it: graphs
    do not run there, and lists and codes could answer otherwise than they do in the application.
    """
    if type(index) not in FLAT or not faiss.get_num_gpus():
        return index
    try:
        return faiss.index_cpu_to_gpu(_resources(), 0, index)
    except (RuntimeError, MemoryError) as error:
        log.warning("FAISS uses the CPU, since its GPU refused: %s", error)
        return index


@contextmanager
def training_on_gpu(index: Index) -> Iterator[None]:
    """Assign rows to centroids and codes on a GPU inside the block."""
    hooks = []
    if faiss.get_num_gpus() and type(index) in IVF:
        hooks.append((index, "clustering_index", faiss.IndexFlat(index.d, index.metric_type)))
    if faiss.get_num_gpus() and type(index) in PRODUCT:
        hooks.append((index.pq, "assign_index", faiss.IndexFlatL2(index.pq.dsub)))
    # FAISS gets bare pointers, so what they point to must live as long.
    alive = [(owner, name, on_gpu(flat)) for owner, name, flat in hooks]
    try:
        for owner, name, flat in alive:
            setattr(owner, name, flat)
        yield
    finally:
        for owner, name, _ in alive:
            setattr(owner, name, None)


@cache
def _resources() -> Any:  # noqa: ANN401 FAISS's resources have no types
    return faiss.StandardGpuResources()
