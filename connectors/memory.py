"""Rows in memory with exact search: the simplest connector, and the oracle for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.connectors.rows import RowOrder, checked_queries, checked_rows, only_vectors
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Mask,
    Metric,
    Neighbors,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
    id_text,
)
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.store import Allowed

_URI = "memory:"
_QUERY_BLOCK = 256


class MemoryStore:
    """A `VectorStore` over two arrays."""

    def __init__(
        self, ids: Ids, vectors: Vectors, metric: Metric, *, positional: bool = False
    ) -> None:
        """Copy the rows.

        Args:
            ids: Shape (n,), integers or text.
            vectors: Shape (n, d).
            metric: How queries and rows are compared.
            positional: Say that ids are positions.

        Raises:
            DataError: The shapes do not match.
        """
        self._vectors = np.array(vectors, np.float32)
        if self._vectors.ndim != 2 or len(self._vectors) != len(ids):
            raise DataError(f"{_URI} {len(ids)} ids for vectors of shape {self._vectors.shape}")
        own = id_text(ids) if ids.dtype.kind == "S" else np.array(ids, np.int64)
        self._rows = RowOrder(own, _URI)
        self._metric = metric
        self._positional = positional

    def info(self) -> StoreInfo:
        """Describe the store as it is now."""
        count, dim = self._vectors.shape
        return StoreInfo(
            uri=_URI,
            kind="exact, in memory",
            count=count,
            dim=dim,
            metric=self._metric,
            positional=self._positional,
        )

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in order; see `VectorStore.scan`."""
        only_vectors(_URI, fields, partition)
        windows = self._rows.windows(batch_size, cursor)
        return (
            VectorBatch(
                ids=self._rows.ids[start:stop],
                vectors=self._vectors[start:stop].copy(),
                cursor=stop,
            )
            for start, stop in windows
        )

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        return self._vectors[self._rows.positions(ids)]

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search exactly; rows that compare as NaN are never found. See `VectorStore.search`."""
        if params:
            raise ConfigError(f"{_URI} exact search has no parameters, not {sorted(params)}")
        array = checked_queries(_URI, queries, self._vectors.shape[1], k)
        nothing = b"" if self._rows.ids.dtype.kind == "S" else -1
        ids = np.full((len(array), k), nothing, self._rows.ids.dtype)
        scores = np.full((len(array), k), -np.inf, np.float32)
        width = min(k, len(self._rows))
        for start in range(0, len(array), _QUERY_BLOCK):
            block = slice(start, start + _QUERY_BLOCK)
            found = self._scores(array[block])  # (q, n)
            best = np.argsort(-found, axis=1, kind="stable")[:, :width]
            score = np.take_along_axis(found, best, axis=1)
            missing = np.isneginf(score)
            ids[block, :width] = np.where(missing, nothing, self._rows.ids[best])
            scores[block, :width] = score
        return Neighbors(ids=ids, scores=scores)

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        there = np.asarray(ids)[np.isin(ids, self._rows.ids)]
        return VectorBatch(ids=there, vectors=self.fetch(there))

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Overwrite the vectors of rows; see `RowWritable.update`."""
        vectors = checked_rows(_URI, batch, self._vectors.shape[1])
        now = self.peek(batch.ids)
        chosen = np.isin(batch.ids, now.ids)
        chosen[chosen] = allowed(now)
        self._vectors[self._rows.positions(batch.ids[chosen])] = vectors[chosen]
        return chosen

    def settle(self, progress: Progress) -> None:
        """Do nothing: memory is as durable as it gets."""

    def _scores(self, queries: Vectors) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            rows = self._vectors.astype(np.float64)
            block = queries.astype(np.float64)
            if self._metric is Metric.COSINE:
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
                block /= np.linalg.norm(block, axis=1, keepdims=True)
            scores: NDArray[np.float64] = block @ rows.T
            if self._metric is Metric.EUCLID:
                scores = 2 * scores - (block**2).sum(1)[:, None] - (rows**2).sum(1)
        scores[np.isnan(scores)] = -np.inf
        return scores
