"""Small indexes and refiners for tests of everything above the connectors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from simskip_vdb.datatypes import Ids, Metric, Side, Vectors
from simskip_vdb.journal import Journal
from simskip_vdb.outgoing import Written
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import snapshot, write
from simskip_vdb.store import Check, VectorStore

faiss.omp_set_num_threads(1)


def random_refiner(
    dim: int, ids: Ids, seed: int = 0, *, side: Side = Side.DOCS, metric: Metric = Metric.DOT
) -> Refiner:
    """Return a refiner that moves every row, and half of the rows by an offset too."""
    rng = np.random.default_rng(seed)
    widths = (dim, max(1, dim // 2), dim, dim)
    layers = tuple(
        (
            rng.normal(0, 0.5, (wide, narrow)).astype(np.float32),
            rng.normal(0, 0.1, wide).astype(np.float32),
        )
        for narrow, wide in pairwise(widths)
    )
    chosen = np.sort(ids[::2])
    return Refiner(
        dim=dim,
        side=side,
        metric=metric,
        alpha=0.5,
        beta=1.0,
        layers=layers,
        offset_ids=chosen,
        offsets=rng.normal(0, 0.1, (len(chosen), dim)).astype(np.float32),
        origin=rng.normal(0, 0.5 / dim**0.5, dim).astype(np.float32),
    )


def ivf(path: Path, ids: Ids, vectors: Vectors, nlist: int = 4) -> Path:
    """Write an IVF Flat with custom ids and inner product."""
    dim = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.nprobe = nlist
    index.train(vectors)
    index.add_with_ids(vectors, ids)
    faiss.write_index(index, str(path))
    return path


def flat(path: Path, vectors: Vectors) -> Path:
    """Write a Flat with inner product, whose ids are positions."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


def change(path: Path, edit: Any) -> None:  # noqa: ANN401 a callback on a FAISS index
    """Load, edit and save an index as an application does."""
    index = faiss.read_index(str(path))
    edit(index)
    faiss.write_index(index, str(path))


def clusters(
    rng: np.random.Generator, rows: int, queries: int, dim: int = 16, groups: int = 20
) -> tuple[Vectors, Vectors, Any, Any]:
    """Return rows and queries of hidden groups, whose queries are all displaced the same way.

    A refiner can learn the displacement, so there is a gain to be had.
    """
    centres = rng.normal(size=(groups, dim))
    shift = rng.normal(size=dim) * 1.2
    row_group, query_group = rng.integers(0, groups, rows), rng.integers(0, groups, queries)
    docs = centres[row_group] + 0.4 * rng.normal(size=(rows, dim))
    asked = centres[query_group] + shift + 0.4 * rng.normal(size=(queries, dim))
    return _unit(docs), _unit(asked), row_group, query_group


def _unit(x: Any) -> Vectors:  # noqa: ANN401
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def refine_by_hand(
    store: VectorStore, journal: Journal, refiner: Refiner, accept: Check = lambda candidate: None
) -> Written:
    """Write what a refiner makes of every row; the state is held."""
    refiner.save(journal.refiners / refiner.id)
    found = snapshot(store, journal)
    return write(
        store,
        found,
        lambda start, x: refiner.refine_rows(x, found.rows.ids[start : start + len(x)]),
        journal=journal,
        refiner=refiner,
        accept=accept,
        summary={"side": "docs"},
    )
