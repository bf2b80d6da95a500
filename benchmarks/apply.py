"""Apply a fitted refiner to a large Flat index: rows a second, and memory beside the index.

    python benchmarks/apply.py [--rows 200000] [--dim 384]

Times are ratios to what the same run measures of the machine: three bare matrix products of the
refiner's shape, and a copy of the file. Memory is the peak above what is resident after imports.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import faiss
import machine
import numpy as np

import simskip_vdb as ss
from simskip_vdb import pipeline
from simskip_vdb.datatypes import Ids, Metric, Side
from simskip_vdb.durable import sha256_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        path = build(work / "flat.faiss", options.rows, options.dim)
        ids = np.arange(0, options.rows, 20)
        refiner(options.dim, ids, Metric.DOT).save(work / "refiner")
        before = sha256_of(path)
        limits = measure_limits(path, work, options.rows, options.dim)
        settings = ss.Settings(refiner=work / "refiner", accept_unmeasured=True)
        store = ss.open_store(str(path))
        reset_peak()
        resident = memory("VmRSS")
        start = time.perf_counter()
        report = pipeline.refine(store, ss.Judgments(), settings)
        seconds = time.perf_counter() - start
        peak = memory("VmHWM") - resident
        ss.rollback(store)
        assert sha256_of(path) == before
        size = path.stat().st_size
    result = {
        "rows": options.rows,
        "dim": options.dim,
        "seconds": report.seconds,
        "end_to_end_seconds": seconds,
        "rows_per_second": options.rows / seconds,
        "limits": limits,
        "end_to_end_over_products": seconds / limits["products_seconds"],
        "end_to_end_over_copy": seconds / limits["copy_seconds"],
        "index_bytes": size,
        "peak_bytes": peak,
        "peak_over_index": peak / size,
    }
    print(f"saved {machine.save('apply', result)}")
    print(f"{options.rows:,} × {options.dim}: {seconds:.1f} s end to end, {report.seconds}")
    print(f"  {result['end_to_end_over_products']:.1f} × the bare matrix products")
    print(f"  {result['end_to_end_over_copy']:.1f} × a copy of the file")
    print(f"  peak memory {result['peak_over_index']:.2f} × the index")


def build(path: Path, rows: int, dim: int) -> Path:
    rng = np.random.default_rng(0)
    index = faiss.IndexFlatIP(dim)
    for start in range(0, rows, 10_000):
        block = rng.normal(size=(min(10_000, rows - start), dim)).astype(np.float32)
        index.add(block / np.linalg.norm(block, axis=1, keepdims=True))
    faiss.write_index(index, str(path))
    return path


def refiner(dim: int, offset_ids: Ids, metric: Metric) -> ss.Refiner:
    rng = np.random.default_rng(1)
    widths = (dim, dim // 2, dim, dim)
    layers = tuple(
        (
            (rng.normal(size=(wide, narrow)) / np.sqrt(narrow)).astype(np.float32),
            np.zeros(wide, np.float32),
        )
        for narrow, wide in pairwise(widths)
    )
    return ss.Refiner(
        dim=dim,
        side=Side.DOCS,
        metric=metric,
        alpha=0.3,
        beta=1.0,
        layers=layers,
        offset_ids=offset_ids,
        offsets=(0.02 * rng.normal(size=(len(offset_ids), dim))).astype(np.float32),
    )


def measure_limits(path: Path, work: Path, rows: int, dim: int) -> dict[str, float]:
    x = np.ones((8192, dim), np.float32)
    a, b, c = (
        np.ones(shape, np.float32) for shape in ((dim, dim // 2), (dim // 2, dim), (dim,) * 2)
    )
    x @ a @ b @ c
    start = time.perf_counter()
    for _ in range(-(-rows // len(x))):
        x @ a @ b @ c
    products = time.perf_counter() - start
    start = time.perf_counter()
    shutil.copyfile(path, work / "copy")
    copy = time.perf_counter() - start
    (work / "copy").unlink()
    return {"products_seconds": products, "copy_seconds": copy}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    main()
