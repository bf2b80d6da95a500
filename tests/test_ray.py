"""Partitions refined by processes of their own: the same bits, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from builders import flat, ivf, random_refiner
from parquet_files import raw_rows, write_rows

import simskip_vdb as ss
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Metric
from simskip_vdb.report import Report

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

N, D, PARTS = 2400, 24, 6
EDGES = np.linspace(0, N, PARTS + 1).astype(int)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """Three workers on this machine, found as any cluster is."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class Desk:
    """An index of six files, and the same once more for the local executor."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        rng = np.random.default_rng(5)
        self.vectors = rng.normal(size=(N, D)).astype(np.float32)
        self.ids = np.arange(N) if kind == "flat" else np.sort(rng.choice(10**6, N, replace=False))
        metric = Metric.COSINE if kind == "parquet" else Metric.DOT
        self.refiner = folder / "refiner"
        random_refiner(D, self.ids, metric=metric).save(self.refiner)
        self.places = {"here": folder / "here", "there": folder / "there"}
        for place in self.places.values():
            place.mkdir()
            for part, (start, stop) in enumerate(pairwise(EDGES)):
                rows, ids = self.vectors[start:stop], self.ids[start:stop]
                if kind == "parquet":
                    write_rows(place / f"{part}.parquet", ids, rows, group=150)
                elif kind == "ivf":
                    ivf(place / f"part{part}.faiss", ids, rows)
                else:
                    flat(place / f"part{part}.faiss", rows)

    def uri(self, place: str) -> str:
        folder = self.places[place]
        return f"parquet:{folder}" if self.kind == "parquet" else f"faiss:{folder}/part*.faiss"

    def refine(self, place: str, executor: str) -> Report:
        settings = ss.Settings(refiner=self.refiner, accept_unmeasured=True, executor=executor)
        return ss.refine(open_store(self.uri(place)), ss.Judgments(), settings)

    def rows(self, place: str) -> bytes:
        if self.kind == "parquet":
            files = sorted(self.places[place].glob("*.parquet"))
            return b"".join(raw_rows(path)[1].tobytes() for path in files)
        return b"".join(b.vectors.tobytes() for b in open_store(self.uri(place)).scan(500))


@pytest.fixture(params=["flat", "ivf", "parquet"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


def test_both_executors_write_the_same_bits(desk: Desk) -> None:
    local, shared = desk.refine("here", "local"), desk.refine("there", "ray")
    assert desk.rows("there") == desk.rows("here") != desk.vectors.tobytes()
    assert shared.written == local.written
    here, there = (ss.status(open_store(desk.uri(place))) for place in ("here", "there"))
    assert not there["changed_since"]
    assert not there["interrupted"]
    assert here["refined"]["refiner"] == there["refined"]["refiner"]
    again = desk.refine("there", "ray")
    assert again.notes == ("the index holds exactly this refinement already; nothing to do",)
    assert ss.rollback(open_store(desk.uri("there")))["exact"]
    assert desk.rows("there") == desk.vectors.tobytes()
    state = desk.places["there"].parent / "there.simskip"
    assert not list(state.glob("**/crew"))
