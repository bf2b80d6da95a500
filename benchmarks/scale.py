"""Measure what `--executor ray` costs a row, and plan from that what 10⁹ rows take.

    python benchmarks/scale.py [--rows 100000]

One worker on one core refines a folder of FAISS Flat files and one of Parquet files, here on this
machine. Measured are the seconds of a core (which do not grow when others use the machine) that it
takes to read and to write, the driver's own and its memory, by the difference between two numbers
of rows, and the state's bytes. `results/scale.json` holds
these constants; the plan's other assumptions stand below, and in the page that shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import machine
import numpy as np
from speed_cells import refiner

import simskip_vdb as ss
from simskip_vdb import crew, pipeline
from simskip_vdb.crew import ReadDone, ReadJob, Worker, WriteJob
from simskip_vdb.datatypes import Metric
from simskip_vdb.sending import Sent

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
DIMS, KINDS, PARTS = (384, 768), ("FAISS Flat", "Parquet"), 8
TIMES = "SIMSKIP_TIMES"


class Cluster(NamedTuple):
    """What is assumed, not measured.

    Attributes:
        rows: Of the index.
        partitions: Files that it is in.
        workers: Machines that work.
        cores: Of each.
        bandwidth: Bytes a second between a machine and the shared storage.
        price: Dollars for an hour of such a machine.
        driver_cores: Of the driver's; a search keeps half of them busy.
        driver_price: Dollars for an hour of the driver's, which has more memory.
    """

    rows: int = 10**9
    partitions: int = 1000
    workers: int = 16
    cores: int = 16
    bandwidth: float = 1e9
    price: float = 0.80
    driver_cores: int = 16
    driver_price: float = 2.00


PASSES = {"read": 3, "write": 15}
"""How often a worker reads or writes a row's vector (see the page)."""
DRIVER_PASSES = dict(zip(KINDS, (5, 0), strict=True))
"""How often the driver does."""


class TimedWorker(Worker):
    """Notes how long it takes."""

    def read(self, job: ReadJob) -> ReadDone:
        with noted("read"):
            return super().read(job)

    def write(self, job: WriteJob) -> Sent:
        with noted("write"):
            return super().write(job)


@contextmanager
def noted(what: str) -> Iterator[None]:
    start = time.process_time()
    yield
    with open(os.environ[TIMES], "a") as file:
        file.write(f"{what} {time.process_time() - start}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--plan", action="store_true", help="only plan, from what was measured")
    options = parser.parse_args()
    if not options.plan:
        print(f"saved {machine.save('scale', measure(options.rows))}")
    result = results()
    text = PAGE.read_text()
    for name, lines in tables(result).items():
        start, end = marks(name)
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{lines}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


def measure(rows: int) -> dict[str, Any]:
    """Refine two sizes of every kind and dimension with one worker."""
    import ray

    crew.Worker = TimedWorker  # type: ignore[misc]
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ[TIMES] = str(work / "times")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for dim in DIMS:
                run(work, kind, dim, rows // 4)  # imports, and memory that stays
                small, large = run(work, kind, dim, rows // 4), run(work, kind, dim, rows)
                found[kind][str(dim)] = {
                    "read_rows_per_second": rows / large["read"],
                    "write_rows_per_second": rows / large["write"],
                    "state_bytes_per_row": large["state"] / rows,
                    "driver_seconds_per_row": per_row("driver", small, large),
                }
                print(kind, dim, found[kind][str(dim)])
        # Where the driver reads no vector, the dimension is nothing to it.
        small, large = (run(work, KINDS[1], 16, n) for n in (2 * rows, 20 * rows))
        driver = {"bytes_per_row": per_row("peak", small, large)}
        for rates in found[KINDS[1]].values():
            rates["driver_seconds_per_row"] = per_row("driver", small, large)
        print(driver, found[KINDS[1]])
        ray.shutdown()
    return {"rows": rows, "load": os.getloadavg()[1], "found": found, "driver": driver}


def per_row(what: str, small: dict[str, float], large: dict[str, float]) -> float:
    """Return what one row more costs, whatever a run costs without rows."""
    return (large[what] - small[what]) / (large["rows"] - small["rows"])


def run(work: Path, kind: str, dim: int, rows: int) -> dict[str, float]:
    """Refine an index once; return seconds of worker and driver, and bytes."""
    folder = work / "rows"
    folder.mkdir()
    build(folder, kind, dim, rows)
    metric = Metric.DOT if kind == KINDS[0] else Metric.COSINE
    refiner(dim, np.arange(0, rows, 20), metric).save(work / "refiner")
    uri = f"faiss:{folder}/*.faiss" if kind == KINDS[0] else f"parquet:{folder}"
    times = Path(os.environ[TIMES])
    times.write_text("")
    settings = ss.Settings(refiner=work / "refiner", accept_unmeasured=True, executor="ray")
    store = ss.open_store(uri)
    start = time.process_time()
    with most_memory() as peak:
        pipeline.refine(store, ss.Judgments(), settings)
    seconds = time.process_time() - start
    took = [line.split() for line in times.read_text().splitlines()]
    found = {stage: sum(float(t) for name, t in took if name == stage) for stage in PASSES}
    beside = store.info().state
    assert beside is not None
    state = sum(file.stat().st_size for file in beside.rglob("*") if file.is_file())
    beside.rename(work / "rows.simskip")
    for place in work.glob("r*"):  # rows, their state, the refiner
        shutil.rmtree(place)
    return {
        **found,
        "rows": rows,
        "driver": seconds,
        "peak": peak[-1],
        "state": state,
    }


@contextmanager
def most_memory() -> Iterator[list[float]]:
    """Watch this process's own memory, without the pages of files that it maps."""
    before = machine.memory("RssAnon")
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], machine.memory("RssAnon") - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def build(folder: Path, kind: str, dim: int, rows: int) -> None:
    """Write eight files of random rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for part, ids in enumerate(np.array_split(np.arange(rows), PARTS)):
        block = rng.standard_normal((len(ids), dim), np.float32)
        if kind == KINDS[0]:
            index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
            index.add_with_ids(block, ids)
            faiss.write_index(index, str(folder / f"{part}.faiss"))
        else:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim)
            table = pa.table({"id": pa.array(ids), "vector": lists})
            pq.write_table(table, folder / f"{part}.parquet", compression="zstd")


class Plan(NamedTuple):
    """What a refinement takes: bytes, hours of the stages, dollars, and what binds."""

    vectors: float
    state: float
    read: float
    write: float
    driver: float
    memory: float
    cost: float
    binds: str


def plan(result: dict[str, Any], kind: str, dim: int, cluster: Cluster) -> Plan:
    """Plan a first refinement, with a refiner that was fitted and proven on a sample."""
    rates = result["found"][kind][str(dim)]
    cores = cluster.workers * cluster.cores
    hours, limits = {}, {}
    for stage, passes in PASSES.items():
        computing = cluster.rows / rates[f"{stage}_rows_per_second"] / cores
        moving = cluster.rows * passes * 4 * dim / cluster.bandwidth / cluster.workers
        hours[stage] = max(computing, moving) / 3600
        limits[stage] = "cores" if computing > moving else "storage"
    computing = cluster.rows * rates["driver_seconds_per_row"]
    computing /= cluster.driver_cores / 2 if DRIVER_PASSES[kind] else 1
    moving = cluster.rows * DRIVER_PASSES[kind] * 4 * dim / cluster.bandwidth
    driver = max(computing, moving) / 3600
    total = sum(hours.values()) + driver
    limits["driver"] = "one machine's " + ("cores" if computing > moving else "storage")
    longest = max({**hours, "driver": driver}.items(), key=lambda item: item[1])[0]
    return Plan(
        vectors=cluster.rows * 4 * dim,
        state=cluster.rows * rates["state_bytes_per_row"],
        read=hours["read"],
        write=hours["write"],
        driver=driver,
        memory=cluster.rows * result["driver"]["bytes_per_row"],
        cost=total * (cluster.workers * cluster.price + cluster.driver_price),
        binds=limits[longest],
    )


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the page's tables in Markdown, by name."""
    measured = [
        "| rows in | d | read, rows a core-second | write, rows a core-second | state, bytes a row "
        "| driver, core-µs a row |",
        "|---" * 6 + "|",
    ]
    planned = [
        "| rows in | d | vectors | state | read | write | driver | total | driver's memory | cost "
        "| longest, and what binds it |",
        "|---" * 11 + "|",
    ]
    for kind in KINDS:
        for dim in DIMS:
            rates = result["found"][kind][str(dim)]
            measured.append(
                f"| {kind} | {dim} | {rates['read_rows_per_second']:,.0f} | "
                f"{rates['write_rows_per_second']:,.0f} | {rates['state_bytes_per_row']:,.0f} | "
                f"{rates['driver_seconds_per_row'] * 1e6:.1f} |"
            )
            p = plan(result, kind, dim, Cluster())
            stages = {"read": p.read, "write": p.write, "driver": p.driver}
            planned.append(
                f"| {kind} | {dim} | {p.vectors / 1e12:.2f} TB | {p.state / 1e12:.2f} TB | "
                f"{p.read:.2f} h | {p.write:.2f} h | {p.driver:.2f} h | "
                f"{sum(stages.values()):.1f} h | {p.memory / 1e9:.0f} GB | ${p.cost:.0f} | "
                f"{max(stages, key=lambda name: stages[name])}: {p.binds} |"
            )
    return {"constants": "\n".join(measured), "plan": "\n".join(planned)}


def marks(name: str) -> tuple[str, str]:
    """Return what stands before and after a table in the page."""
    return f"<!-- table: benchmarks/scale.py, {name} -->", f"<!-- end of table: {name} -->"


def results() -> dict[str, Any]:
    """Return what was measured last."""
    found: dict[str, Any] = json.loads((machine.RESULTS / "scale.json").read_text())
    return found


if __name__ == "__main__":
    main()
