"""FAISS files of every kind that can be refined, made and read by FAISS alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
from faiss_cells import move_lists

from simskip_vdb.datatypes import Ids, Metric, VectorBatch, Vectors
from simskip_vdb.store import Check, FileBacked

Index: TypeAlias = Any

# Two OpenMP runtimes on few cores wait for each other.
faiss.omp_set_num_threads(1)

FAISS_METRIC = {Metric.DOT: faiss.METRIC_INNER_PRODUCT, Metric.EUCLID: faiss.METRIC_L2}
EVERY_LIST = {"nprobe": 4}
EVERY_LINK = {"efSearch": 200}
EVERY_CANDIDATE = {"k_factor": 100.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of index: how FAISS makes it, and what is expected of it."""

    factory: str
    positional: bool = True
    tolerance: float = 0.0
    params: Mapping[str, Any] = field(default_factory=dict)
    direct_map: int = faiss.DirectMap.NoMap


KINDS = {
    "flat": Kind(factory="Flat"),
    "hnsw": Kind(factory="HNSW8,Flat", params=EVERY_LINK),
    "sqfp16": Kind(factory="SQfp16", tolerance=1e-3),
    "sqbf16": Kind(factory="SQbf16", tolerance=8e-3),
    "sq8": Kind(factory="SQ8", tolerance=1e-2),
    "ivf": Kind(factory="IVF4,Flat", positional=False, params=EVERY_LIST),
    "ivf-hash": Kind(
        factory="IVF4,Flat",
        positional=False,
        params=EVERY_LIST,
        direct_map=faiss.DirectMap.Hashtable,
    ),
    "ivf-hnsw": Kind(
        factory="IVF4_HNSW4,Flat",
        positional=False,
        params={**EVERY_LIST, "quantizer_efSearch": 16},
    ),
    "idmap-flat": Kind(factory="IDMap,Flat", positional=False),
    "idmap2-flat": Kind(factory="IDMap2,Flat", positional=False),
    "idmap-hnsw": Kind(factory="IDMap,HNSW8,Flat", positional=False, params=EVERY_LINK),
    "idmap-ivf": Kind(factory="IDMap,IVF4,Flat", positional=False, params=EVERY_LIST),
    "idmap2-ivf": Kind(factory="IDMap2,IVF4,Flat", positional=False, params=EVERY_LIST),
    "idmap-sq8": Kind(factory="IDMap,SQ8", positional=False, tolerance=1e-2),
    "refine-flat": Kind(factory="Flat,RFlat", params=EVERY_CANDIDATE),
    "refine-hnsw": Kind(factory="HNSW8,RFlat", params={**EVERY_CANDIDATE, **EVERY_LINK}),
    "refine-sq8": Kind(factory="SQ8,RFlat", params=EVERY_CANDIDATE),
    "refine-pq": Kind(factory="PQ4x4np,RFlat", params=EVERY_CANDIDATE),
    "refine-ivf": Kind(factory="IVF4,Flat,RFlat", params={**EVERY_CANDIDATE, **EVERY_LIST}),
    "refine-ivfpq": Kind(
        factory="IVF4,PQ4x4np,RFlat", params={**EVERY_CANDIDATE, **EVERY_LIST}
    ),
    "refine-ivfsq": Kind(factory="IVF4,SQ8,RFlat", params={**EVERY_CANDIDATE, **EVERY_LIST}),
    "idmap-refine-pq": Kind(
        factory="IDMap,PQ4x4np,RFlat", positional=False, params=EVERY_CANDIDATE
    ),
}  # fmt: skip


def make_index(kind: Kind, ids: Ids, vectors: Vectors, metric: Metric) -> Index:
    """Build an index as an application does."""
    index = faiss.index_factory(vectors.shape[1], kind.factory, FAISS_METRIC[metric])
    _be_quiet(index)
    index.train(vectors)
    if kind.positional:
        index.add(vectors)
    else:
        index.add_with_ids(vectors, ids)
    if kind.direct_map:
        index.set_direct_map_type(kind.direct_map)
    return index


def write(index: Index, path: Path) -> Path:
    faiss.write_index(index, str(path))
    return path


def read(path: Path) -> Index:
    return faiss.read_index(str(path))


def put_lists_on_disk(index: Index, path: Path, name: str) -> Path:
    """Save an index with its lists in a file called `name`, as seen from the index's folder."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        return write(move_lists(index, name), path)
    finally:
        os.chdir(here)


def rows_by_faiss(path: Path) -> tuple[Ids, Vectors]:
    """Read all rows through calls of FAISS that are known to be right for each kind."""
    index = read(path)
    ids = None
    inner = index
    if isinstance(index, faiss.IndexIDMap):
        ids = faiss.vector_to_array(index.id_map)
        inner = faiss.downcast_index(index.index)
    if isinstance(inner, faiss.IndexIVF):
        inner.set_direct_map_type(faiss.DirectMap.Hashtable)
        lists = inner.invlists
        stored = np.sort(
            np.concatenate(
                [
                    faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy()
                    for i in range(inner.nlist)
                    if lists.list_size(i)
                ]
            )
        )
        vectors = np.stack([inner.reconstruct(int(i)) for i in stored])
        return stored if ids is None else ids[stored], vectors
    if isinstance(inner, faiss.IndexRefine):
        storage = faiss.downcast_index(inner.refine_index)
    elif isinstance(inner, faiss.IndexHNSW):
        storage = faiss.downcast_index(inner.storage)
    else:
        storage = inner
    vectors = storage.reconstruct_n(0, storage.ntotal)
    return np.arange(len(vectors)) if ids is None else ids, vectors


def _be_quiet(index: Index) -> None:
    """Keep FAISS from warning about few rows, which it prints past Python."""
    inner = index
    while inner is not None:
        for name in ("cp", "pq"):
            part = getattr(inner, name, None)
            if part is not None:
                getattr(part, "cp", part).min_points_per_centroid = 1
        nested = getattr(inner, "index", None) or getattr(inner, "base_index", None)
        inner = faiss.downcast_index(nested) if nested is not None else None


def replace(
    store: FileBacked,
    batches: Iterable[VectorBatch],
    check: Check,
    *,
    keep: Path | None = None,
    expected: str | None = None,
) -> None:
    """Write new vectors as a run does that only looks at what it wrote."""
    expected = store.sha256() if expected is None else expected
    with store.prepared(batches, keep=keep, expected=expected) as candidate:
        check(candidate.store)
        candidate.commit()


def write_copy(
    store: FileBacked, batches: Iterable[VectorBatch], check: Check, *, output: Path
) -> None:
    """Write new vectors to another file."""
    with store.prepared_copy(batches, output) as candidate:
        check(candidate.store)
        candidate.commit()
