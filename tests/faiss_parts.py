"""An index of three FAISS files, worked on by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from builders import flat, ivf, random_refiner

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Ids, Vectors
from simskip_vdb.report import Report

N, D = 90, 8
EDGES = (0, 20, 55, N)


def rows_of(index: Path | str) -> dict[int, bytes]:
    """Return every row of an index by id, to the bit."""
    return {
        int(i): row.tobytes()
        for batch in open_store(str(index), read_only=True).scan(50)
        for i, row in zip(batch.ids, batch.vectors, strict=True)
    }


def pattern(folder: Path) -> str:
    return f"faiss:{folder}/part*.faiss"


class Desk:
    """Three parts, worked on by hand."""

    def __init__(self, folder: Path, kind: str) -> None:
        rng = np.random.default_rng(3)
        self.folder, self.kind = folder, kind
        self.uri = pattern(folder)
        self.vectors: Vectors = rng.normal(size=(N, D)).astype(np.float32)
        ids = np.sort(rng.choice(10_000, N, replace=False))
        self.ids: Ids = ids if kind == "ivf" else np.arange(N)
        self.paths = [folder / f"part{part}.faiss" for part in range(3)]
        for path, (start, stop) in zip(self.paths, pairwise(EDGES), strict=True):
            if kind == "ivf":
                ivf(path, self.ids[start:stop], self.vectors[start:stop])
            else:
                flat(path, self.vectors[start:stop])
        self.originals = self.rows()
        for seed in range(2):
            random_refiner(D, self.ids, seed).save(folder / f"refiner{seed}")

    def rows(self) -> dict[int, bytes]:
        return rows_of(self.uri)

    def refine(self, which: int = 0) -> Report:
        settings = ss.Settings(refiner=self.folder / f"refiner{which}", accept_unmeasured=True)
        return ss.refine(open_store(self.uri), ss.Judgments(), settings)

    def rollback(self) -> dict[str, Any]:
        return ss.rollback(open_store(self.uri))

    def expected(self, which: int = 0) -> dict[int, bytes]:
        refiner = ss.Refiner.load(self.folder / f"refiner{which}")
        refined = refiner.refine_rows(self.vectors, self.ids)
        return {int(i): row.tobytes() for i, row in zip(self.ids, refined, strict=True)}


def close(rows: dict[int, bytes], expected: dict[int, bytes]) -> bool:
    """Tell whether rows are equal but for what the size of a block does to the last digits."""
    return rows.keys() == expected.keys() and all(
        np.allclose(np.frombuffer(row, "f4"), np.frombuffer(expected[i], "f4"), atol=1e-6)
        for i, row in rows.items()
    )
