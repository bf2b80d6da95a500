"""A connector in one file: rows of a NumPy archive, addressed as ``archive:PATH``.

Copy it, and replace what reads and writes the archive by calls of your store. Register the class
in your package, and `simskip` finds it::

    [project.entry-points."simskip_vdb.connectors"]
    archive = "your_package.your_module:NpzStore"
"""

import os
from pathlib import Path

import numpy as np

from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.connectors.rows import RowOrder, checked_queries, checked_rows, only_vectors
from simskip_vdb.datatypes import Metric, StoreInfo, VectorBatch
from simskip_vdb.errors import ConfigError, StoreError, StoreNotFoundError


class NpzStore:
    """Rows in an archive with the arrays ``ids`` (n,), ``vectors`` (n, d) and ``metric``."""

    def __init__(self, path, *, read_only=False):
        self._path, self._read_only = Path(path), read_only
        self._uri = f"archive:{path}"  # without secrets: it is shown and logged
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                self._vectors = archive["vectors"].astype(np.float32)
                self._rows = RowOrder(archive["ids"].astype(np.int64), self._uri)
                self._metric = Metric(str(archive["metric"]))
        except FileNotFoundError as error:
            raise StoreNotFoundError(f"{self._uri}: there is no such file") from error
        except (OSError, ValueError, KeyError) as error:  # only errors of simskip_vdb get out
            raise StoreError(f"{self._uri}: not an archive of rows: {error}") from error

    @classmethod
    def open(cls, uri, *, read_only):
        """Open what the address names; this is what the entry point is asked for."""
        return cls(uri.removeprefix("archive:"), read_only=read_only)

    def info(self):
        count, dim = self._vectors.shape
        return StoreInfo(
            uri=self._uri, kind="archive", count=count, dim=dim, metric=self._metric, exact=True
        )

    def scan(self, batch_size, *, fields=(), cursor=None, partition=None):
        only_vectors(self._uri, fields, partition)  # this store has neither
        return (
            VectorBatch(
                ids=self._rows.ids[start:stop],
                vectors=self._vectors[start:stop].copy(),
                cursor=stop,
            )
            for start, stop in self._rows.windows(batch_size, cursor)
        )

    def fetch(self, ids):
        return self._vectors[self._rows.positions(ids)]

    def search(self, queries, k, params):
        if params:
            raise ConfigError(f"{self._uri}: search has no parameters, not {sorted(params)}")
        queries = checked_queries(self._uri, queries, self._vectors.shape[1], k)
        return MemoryStore(self._rows.ids, self._vectors, self._metric).search(queries, k, {})

    def peek(self, ids):
        there = ids[np.isin(ids, self._rows.ids)]
        return VectorBatch(ids=there, vectors=self.fetch(there))

    def update(self, batch, allowed):
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")
        vectors = checked_rows(self._uri, batch, self._vectors.shape[1])
        now = self.peek(batch.ids)  # read right before writing: the application writes, too
        chosen = np.isin(batch.ids, now.ids)
        chosen[chosen] = allowed(now)
        self._vectors[self._rows.positions(batch.ids[chosen])] = vectors[chosen]
        self._save()
        return chosen

    def settle(self, progress):
        """Nothing is left to do: every batch is on disk, and there is no index to build."""

    def _save(self):
        staged = self._path.with_name(f".{self._path.name}.new.npz")
        np.savez(staged, ids=self._rows.ids, vectors=self._vectors, metric=self._metric.value)
        os.replace(staged, self._path)
