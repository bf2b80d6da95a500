"""A small index of any kind with a refiner, and what it holds before and after."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from killing import Edge, Faiss, FaissFlat, Kind, Local, moving

import simskip_vdb as ss
from simskip_vdb import Settings
from simskip_vdb.datatypes import Progress, silent
from simskip_vdb.judgments import Judgments

KINDS = {
    "faiss flat": (FaissFlat, 700),
    "faiss": (Faiss, 700),
    "edge": (Edge, 60),
    "local": (Local, 20),
}


class Index:
    """A small index that is refined, undone, and looked at by the bare engine.

    Attributes:
        kind: The kind of store.
        now: The folder that holds the index, and its state.
        refiner: The folder of its refiner.
        old: Its vectors at first, shape (n, d).
        new: Its vectors when refined, shape (n, d).
    """

    def __init__(self, kind: str, folder: Path, rows: int | None = None) -> None:
        store, usual = KINDS[kind]
        self.kind: Kind = store()
        self.kind.rows, self.kind.dim = rows or usual, 8
        self._first, self.now, self.refiner = (folder / n for n in ("first", "now", "refiner"))
        self._first.mkdir()
        self.kind.build(self._first)
        moving(self.kind).save(self.refiner)
        self.renew()
        self.old = self.rows()
        self.refine()
        self.new = self.rows()
        assert not self.is_old().any()
        self.renew()

    def renew(self) -> None:
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self._first, self.now)

    def refine(self, progress: Progress = silent) -> None:
        settings = Settings(refiner=self.refiner, accept_unmeasured=True)
        self._open(lambda store: ss.refine(store, Judgments(), settings, progress=progress))

    def rollback(self) -> None:
        self._open(ss.rollback)

    def _open(self, command: Callable[[Any], object]) -> None:
        store = ss.open_store(self.kind.uri(self.now))
        try:
            command(store)
        finally:
            if hasattr(store, "close"):
                store.close()

    def rows(self) -> Any:  # noqa: ANN401 float32, shape (n, d)
        found = self.kind.read(self.now)
        np.testing.assert_array_equal(found.ids, self.kind.ids)
        return found.vectors

    def is_old(self) -> Any:  # noqa: ANN401 bool, shape (n,)
        return self._near(self.old)

    def is_new(self) -> Any:  # noqa: ANN401 bool, shape (n,)
        return self._near(self.new)

    def _near(self, rows: Any) -> Any:  # noqa: ANN401
        return np.abs(self.rows() - rows).max(axis=1) <= self.kind.tolerance
