"""An index of any kind, two refiners for it, and what an application does to its rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge
from builders import flat, ivf, random_refiner
from edge_shards import fill, make, row_ids
from parquet_files import write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.store import VectorStore

N, D = 300, 12
LISTS = {"parquet": "fixed", "double": "double"}


class Opened:
    """An index that is opened by its address for each thing that is done, and closed after it.

    Attributes:
        uri: Its address.
        points: The ids of its rows, as numbers.
    """

    uri: str
    points: list[int]

    @contextmanager
    def store(self) -> Iterator[VectorStore]:
        store = open_store(self.uri)
        try:
            yield store
        finally:
            getattr(store, "close", lambda: None)()

    def refine_by(self, refiner: Path) -> ss.Report:
        settings = ss.Settings(refiner=refiner, accept_unmeasured=True)
        with self.store() as store:
            return ss.refine(store, ss.Judgments(), settings)

    def rollback(self) -> dict[str, Any]:
        with self.store() as store:
            return ss.rollback(store)

    def rows(self) -> dict[int, Any]:
        with self.store() as store:
            batches = list(store.scan(100))
        return {int(i): v for b in batches for i, v in zip(b.ids, b.vectors, strict=True)}

    def array(self) -> np.ndarray:
        """Return the rows in the order of `points`."""
        rows = self.rows()
        return np.stack([rows[i] for i in self.points])


class Index(Opened):
    """An index of some kind, its original rows, and two refiners."""

    def __init__(self, folder: Path, kind: str, n: int = N) -> None:
        rng = np.random.default_rng(3)
        self.kind, self.folder = kind, folder
        self.vectors = rng.normal(size=(n, D)).astype(np.float32)
        self.ids = np.arange(n) if kind in ("flat", "array") else np.arange(n) * 7 + 3
        self.points = self.ids.tolist()
        self.path = folder / "index"
        if kind == "flat":
            flat(self.path, self.vectors)
        elif kind == "ivf":
            ivf(self.path, self.ids, self.vectors)
        elif kind in ("parquet", "double"):
            write_rows(self.path, self.ids, self.vectors, lists=LISTS[kind])
        elif kind in ("array", "npy"):
            put_array(self.path, self.vectors)
            np.save(folder / "ids.npy", self.ids)
        else:
            make(self.path, self.points, self.vectors)
            self.ids = row_ids(self.points)
        for name, seed in (("X", 1), ("Y", 2)):
            random_refiner(D, self.ids, seed).save(folder / name)

    @property
    def uri(self) -> str:  # type: ignore[override] # it follows the path
        schemes = {"edge": "qdrant-edge", "double": "parquet", "array": "npy"}
        scheme = schemes.get(self.kind, self.kind if self.kind in ("parquet", "npy") else "faiss")
        told = "?metric=dot" if scheme in ("parquet", "npy") else ""
        return f"{scheme}:{self.path}{told}" + ("&ids=ids.npy" if self.kind == "npy" else "")

    def refine(self, name: str) -> ss.Report:
        return self.refine_by(self.folder / name)

    def keep(self) -> Callable[[], None]:
        """Return what brings the index back as it is now, as an application or a backup would."""
        if self.kind == "edge":
            held = self.rows()
            return partial(put, self.path, held)
        copy = self.folder / "copy"
        shutil.copyfile(self.path, copy)
        return partial(put_file, copy, self.path)

    def save(self, rows: Mapping[int, Any]) -> None:
        """Write all rows as an application does that builds its index anew."""
        vectors = np.stack([rows[i] for i in self.points])
        if self.kind == "flat":
            flat(self.path, vectors)
        elif self.kind == "ivf":
            ivf(self.path, np.array(self.points), vectors)
        elif self.kind in ("parquet", "double"):
            write_rows(self.path, np.array(self.points), vectors, lists=LISTS[self.kind])
        elif self.kind in ("array", "npy"):
            put_array(self.path, vectors)
        else:
            put(self.path, dict(rows))

    def holds(self, name: str | None) -> bool:
        wanted = self.vectors
        if name is not None:
            wanted = ss.Refiner.load(self.folder / name).refine_rows(self.vectors, self.ids)
        same = np.allclose(self.array(), wanted, atol=1e-6 if name else 0)
        return len(self.rows()) == len(self.points) and bool(same)


def put_array(path: Path, vectors: Any) -> None:  # noqa: ANN401 rows of a file
    with open(path, "wb") as file:
        np.save(file, vectors)


def put_file(copy: Path, path: Path) -> None:
    shutil.copyfile(copy, path)


def put(folder: Path, rows: dict[int, Any]) -> None:
    shard = edge.EdgeShard.load(str(folder))
    fill(shard, [*rows], np.stack([*rows.values()]))
    shard.flush()
    shard.close()
