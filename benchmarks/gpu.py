"""Measure the GPU's work beside its limits, part by part, and whole fits.

    python benchmarks/gpu.py [PART ...] [--device cuda] [--part 1.0] [--out FOLDER]

Needs torch, numpy and this repository, and takes less than four minutes on an H100; `refine` needs
ir-measures too, `nudge` nudge-ft, and both are left out, visibly, where those are missing. Limits
are measured in the same process: products of matrices of the same shapes, and copies to the GPU
and back. Results are checked against the CPU's float32 first; nothing is measured where they
differ. A part that fails or takes too long loses only its own numbers, and the exit status is 1.
`--device cpu --part 0.01` runs all of it on a hundredth of the work, to try the script.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simskip_vdb.config import FitSettings
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import JudgedQueries, Metric, Neighbors, Vectors
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.losses import Similarity, distillation, info_nce, nt_xent
from simskip_vdb.moving import Formula
from simskip_vdb.moving_on_device import OnDevice
from simskip_vdb.pairs import nearest
from simskip_vdb.parsing import Qrels
from simskip_vdb.refiner import Refiner
from simskip_vdb.search import exact_search
from simskip_vdb.search_on_device import SearchOnDevice

BATCH, ROWS, DIM = 32_768, 1_000_000, 768
INDEX_DIM, JUDGED = 384, 20_000
"""Of a whole refinement."""
SHIFT, CHANCE = 1.0, 1.0
SMALL_ROWS, SMALL_JUDGED = 3_600, 2_600
"""Of a small fit, as nfcorpus is."""
CLUSTER, RELEVANT, K = 100, 3, 10
REPEATS = 3
TEMPERATURE = 0.05
LONGEST = 90
"""Seconds that a part may take."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=float, default=1.0, help="part of the work, in (0, 1]")
    parser.add_argument("--out", type=Path, help="folder that receives a copy of the numbers")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(
            f"there is no part {', '.join(sorted(unknown))}; name any of {', '.join(PARTS)}"
        )
    device = torch.device(options.device)
    found: dict[str, Any] = {"device": name_of(device), "part": options.part, "dim": DIM}
    failed = False
    for name in options.parts or PARTS:
        measure, size, needed = PARTS[name]
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            found[name] = {"skipped": f"{', '.join(missing)} is not installed"}
        else:
            torch.manual_seed(0)
            start = time.perf_counter()
            try:
                with no_longer_than(LONGEST):
                    found[name] = judged(measure(device, max(512, int(size * options.part))))
            except Exception as error:  # the other parts' numbers are wanted all the same
                traceback.print_exc()
                found[name], failed = {"failed": f"{type(error).__name__}: {error}"}, True
            found[name]["wall_seconds"] = time.perf_counter() - start
        print(name, json.dumps(found[name]), flush=True)
        keep(found, device, options.out)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("all", json.dumps({"machine": machine.describe(), **found}))
    if failed:
        raise SystemExit(1)


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """Say what was found, what was wanted, and whether it held."""
    measure, least = result["measure"], result.get("at_least", True)
    value, wanted = result[measure], result["wanted"]
    held = None if wanted is None else bool(value >= wanted if least else value <= wanted)
    return {**result, "found": value, "held": held}


def keep(found: Mapping[str, Any], device: torch.device, out: Path | None) -> None:
    """Save the numbers so far: a later part may end the process."""
    if device.type == "cuda":
        saved = machine.save("gpu", dict(found))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(saved, out)
    elif out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(found, indent=1))


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure_loss(device: torch.device, batch: int) -> dict[str, Any]:
    """InfoNCE, forward and backward, against the bf16 products that it cannot do without."""
    check_losses(device)
    queries, keys = unit(batch, device), unit(batch, device)
    pairs = torch.arange(batch, device=device).repeat(2, 1)
    weights = torch.ones(batch, device=device)
    own = torch.full((batch,), -1, device=device)

    def loss() -> None:
        columns = keys.detach().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            similarity = Similarity(queries / TEMPERATURE, columns)
            info_nce(similarity, pairs, weights, own).backward()  # type: ignore[no-untyped-call]

    step = 2**28 // batch
    q, k = queries.bfloat16(), keys.bfloat16()

    def products() -> None:  # scores, and the gradient of the columns
        for start in range(0, batch, step):
            scores = q[start : start + step] @ k.T
            scores.T @ q[start : start + step]

    reset_peak(device)
    seconds, bare = timed(loss, device), timed(products, device)
    return {
        "batch": batch,
        "seconds": seconds,
        "products_seconds": bare,
        "of_products_rate": bare / seconds,
        "tflops": 4 * batch**2 * DIM / seconds / 1e12,
        "peak_bytes": peak(device),
        "measure": "of_products_rate",
        "wanted": 0.5,
    }


def check_losses(device: torch.device) -> None:
    """Compare losses and gradients with the CPU's, in float32."""
    here = torch.device("cpu")
    queries, keys, raw = (unit(1024, here) for _ in range(3))
    pairs, weights = torch.arange(1024).repeat(2, 1), torch.rand(1024)
    own = torch.arange(1024).roll(1)

    def losses(to: torch.device) -> tuple[float, Tensor]:
        columns = keys.to(to).detach().requires_grad_()
        anchors = queries.to(to) / TEMPERATURE
        total = info_nce(Similarity(anchors, columns), pairs.to(to), weights.to(to), own.to(to))
        total = total + distillation(Similarity(anchors, columns), Similarity(anchors, raw.to(to)))
        total = total + nt_xent(columns, raw.to(to), 0.1)
        total.backward()  # type: ignore[no-untyped-call]
        assert columns.grad is not None
        return total.item(), columns.grad.cpu()

    (one, gradient), (other, theirs) = losses(here), losses(device)
    assert abs(one - other) <= 1e-4 * abs(one), (one, other)
    torch.testing.assert_close(theirs, gradient, rtol=1e-3, atol=1e-6)


def measure_apply(device: torch.device, rows: int) -> dict[str, Any]:
    """Moving rows that are in main memory, against the products and against the copies."""
    formula = make_formula()
    x = np.random.default_rng(1).standard_normal((rows, DIM), dtype=np.float32)
    slots = np.where(np.arange(rows) % 20 == 0, np.arange(rows) % 1000, -1)
    move = np.ones(rows, np.bool_)
    there = OnDevice(formula, str(device))
    some = slice(0, 4096)
    found = there.apply(x[some], slots[some], move[some])
    expected = OnDevice(formula, "cpu").apply(x[some], slots[some], move[some])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)

    block = 131_072  # rows that come out of an index at once

    def apply() -> None:
        for start in range(0, rows, block):
            part = slice(start, start + block)
            there.apply(x[part], slots[part], move[part])

    shapes = [weight.shape for weight, _ in formula.layers]
    layers = [torch.randn(shape, device=device).T for shape in shapes]
    piece = torch.randn((min(rows, block), DIM), device=device)

    def products() -> None:
        for _ in range(-(-rows // block)):
            h = piece
            for weight in layers:
                h = h @ weight

    source = torch.from_numpy(x[: min(rows, block)].copy())
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty_like(source, pin_memory=device.type == "cuda")

    def copies() -> None:
        for _ in range(-(-rows // block)):
            target.copy_(source.to(device, non_blocking=True), non_blocking=True)

    seconds = timed(apply, device)
    bare, copied = timed(products, device), timed(copies, device)
    return {
        "rows": rows,
        "seconds": seconds,
        "products_seconds": bare,
        "copies_seconds": copied,
        "of_limit": max(bare, copied) / seconds,
        "rows_per_second": rows / seconds,
        "measure": "of_limit",
        "wanted": 0.7,
    }


def measure_mining(device: torch.device, rows: int) -> dict[str, Any]:
    """Exact nearest rows of as many queries as fit the time, against the product."""
    vectors = np.random.default_rng(2).standard_normal((rows, DIM), dtype=np.float32)
    queries, everyone = vectors[: max(512, rows // 10)], np.arange(rows)
    few = nearest(queries[:64], vectors[:8192], everyone[:8192], k=16, device=str(device))
    same = nearest(queries[:64], vectors[:8192], everyone[:8192], k=16, device="cpu")
    assert (few == same).mean() > 0.99, "the GPU finds other neighbours than the CPU"
    asked = torch.from_numpy(queries).to(device)
    block = 65_536

    def products() -> None:
        keys = torch.from_numpy(vectors[:block]).to(device)
        for _ in range(-(-rows // block)):
            for start in range(0, len(asked), 16_384):
                asked[start : start + 16_384] @ keys.T

    def mine() -> None:
        nearest(queries, vectors, everyone, k=16, device=str(device))

    seconds, bare = timed(mine, device, repeats=1), timed(products, device, repeats=1)
    return {
        "rows": rows,
        "queries": len(queries),
        "seconds": seconds,
        "products_seconds": bare,
        "over_products": seconds / bare,
        "measure": "over_products",
        "wanted": 2.0,
        "at_least": False,
    }


def measure_search(device: torch.device, rows: int) -> dict[str, Any]:
    """Exact search that validates and proves, rows in main memory, against float32 products."""
    x = np.random.default_rng(3).standard_normal((rows, INDEX_DIM), dtype=np.float32)
    queries, blocks = x[: max(64, rows // 250)] + np.float32(0.1), 8192

    def search(asked: Vectors, among: Vectors) -> Neighbors:
        there = SearchOnDevice(asked, K, Metric.COSINE, None, str(device))
        for start in range(0, len(among), blocks):
            there.add(start, among[start : start + blocks])
        return there.found()

    few = exact_search(queries[:64], [(0, x[:20_000])], K, Metric.COSINE)
    np.testing.assert_array_equal(search(queries[:64], x[:20_000]).ids, few.ids)
    asked = torch.from_numpy(queries).to(device)
    block = torch.from_numpy(x[:blocks]).to(device)

    def products() -> None:
        for _ in range(-(-rows // blocks)):
            asked @ block.T

    seconds = timed(lambda: search(queries, x), device, repeats=1)
    bare = timed(products, device, repeats=1)
    return {
        "rows": rows,
        "queries": len(queries),
        "seconds": seconds,
        "products_seconds": bare,
        "measure": "seconds",
        "wanted": 3.0,
        "at_least": False,
    }


def measure_fit(device: torch.device, rows: int) -> dict[str, Any]:
    """A small fit, of which launches of kernels were the most; the second is what counts."""
    from simskip_vdb.training import Problem, fit_refiner

    vectors, queries = made(rows, max(64, rows * SMALL_JUDGED // SMALL_ROWS))
    chosen_by = np.arange(len(queries)) % 5 == 0
    validation = queries.subset(chosen_by)
    problem = Problem(
        vectors=vectors,
        ids=np.arange(rows),
        metric=Metric.COSINE,
        queries=queries.subset(~chosen_by),
        usable=np.ones(rows, np.bool_),
    )

    def validate(refiners: Sequence[Refiner]) -> list[float]:
        return [
            recall(
                validation, one.refine_rows(vectors, problem.ids), one(validation.vectors), device
            )
            for one in refiners
        ]

    settings = FitSettings(device=str(device))
    steps = []

    def fit() -> None:
        fit_refiner(
            problem, settings, validate, progress=lambda done, total, _: steps.append(total)
        )

    seconds = timed(fit, device, repeats=1)
    return {
        "rows": rows,
        "queries": len(queries),
        "steps": steps[-1],
        "seconds": seconds,
        "measure": "seconds",
        "wanted": 5.0,
        "at_least": False,
    }


class Flat(MemoryStore):
    """Rows in memory that are searched on the device, as a fast index would be."""

    device = "cpu"

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        found = SearchOnDevice(queries, k, Metric.COSINE, None, self.device)
        found.add(0, self._vectors)
        return found.found()


def measure_refine(device: torch.device, rows: int) -> dict[str, Any]:
    """A whole refinement of an index in memory, proof and writing included."""
    from simskip_vdb.pipeline import Settings, refine

    vectors, queries = made(rows, max(512, rows * JUDGED // ROWS))
    store = Flat(np.arange(rows), vectors, Metric.COSINE)
    store.device = str(device)
    names = [queries.ids[i] for i in queries.query_of_judgment()]
    qrels = Qrels(
        source="made",
        query_ids=names,
        doc_ids=[str(row) for row in queries.rows],
        grades=queries.grades,
    )
    given = QuerySet(option="--queries", ids=queries.ids, vectors=queries.vectors, qrels=qrels)
    stages: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages[stage] = time.perf_counter() - start
            print(f"refine: {stage} begins after {stages[stage]:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(fit=FitSettings(device=str(device)), state=Path(folder) / "state")
        start = time.perf_counter()
        report = refine(store, Judgments(queries=given), settings, progress=progress)
        seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "queries": len(queries),
        "seconds": seconds,
        "stages": dict(report.seconds),
        "passed": report.gate is not None and report.gate.passed,
        "measure": "seconds",
        "wanted": 30.0,
        "at_least": False,
    }


def measure_nudge(device: torch.device, rows: int) -> dict[str, Any]:
    """NUDGE-N on the same rows, queries and card, to set beside `refine`."""
    from nudge import NUDGEN
    from peers import _nudge_set

    vectors, queries = made(rows, max(512, rows * JUDGED // ROWS))
    chosen_by = np.arange(len(queries)) % 5 == 0
    fit, validation = (_nudge_set(queries.subset(part)) for part in (~chosen_by, chosen_by))
    start = time.perf_counter()
    NUDGEN(device).finetune_embeddings(vectors, fit, validation, val_k=K)
    synchronise(device)
    return {
        "rows": rows,
        "queries": len(queries),
        "seconds": time.perf_counter() - start,
        "measure": "seconds",
        "wanted": None,  # nothing is asked of it
    }


PARTS: dict[str, tuple[Callable[[torch.device, int], dict[str, Any]], int, tuple[str, ...]]] = {
    "loss": (measure_loss, BATCH, ()),
    "apply": (measure_apply, ROWS, ()),
    "mining": (measure_mining, ROWS, ()),
    "search": (measure_search, ROWS, ()),
    "fit": (measure_fit, SMALL_ROWS, ()),
    "refine": (measure_refine, ROWS, ("ir_measures",)),
    "nudge": (measure_nudge, ROWS, ("nudge",)),
}
"""By name: what measures it, its size, and the packages it needs."""


def made(rows: int, queries: int) -> tuple[Vectors, JudgedQueries]:
    """Make clustered rows, and queries that are displaced from the rows relevant to them."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((max(1, rows // CLUSTER), INDEX_DIM), dtype=np.float32)
    x = rng.standard_normal((rows, INDEX_DIM), dtype=np.float32)
    x += centres[rng.integers(len(centres), size=rows)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    popular = rng.choice(rows, min(rows, queries), replace=False)
    relevant = np.sort(popular[rng.integers(len(popular), size=(queries, RELEVANT))], axis=1)
    relevant[:, 1:][relevant[:, 1:] == relevant[:, :-1]] = popular[0]
    listed = [np.unique(some) for some in relevant]
    asked = x[relevant].sum(axis=1)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    shift = rng.standard_normal((1, INDEX_DIM), dtype=np.float32)
    chance = rng.standard_normal((queries, INDEX_DIM), dtype=np.float32)
    asked += (SHIFT * shift + CHANCE * chance) / np.float32(np.sqrt(INDEX_DIM))
    sizes = [len(some) for some in listed]
    return x, JudgedQueries(
        ids=tuple(f"q{i}" for i in range(queries)),
        vectors=np.asarray(asked, np.float32),
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        rows=np.concatenate(listed).astype(np.int64),
        grades=np.ones(sum(sizes), np.int32),
    )


def recall(judged: JudgedQueries, rows: Vectors, queries: Vectors, device: torch.device) -> float:
    """Return the part of the relevant rows that are found among the first ten."""
    search = SearchOnDevice(queries, K, Metric.COSINE, None, str(device))
    search.add(0, rows)
    found = search.found().ids[judged.query_of_judgment()]
    return float((found == judged.rows[:, None]).any(axis=1).mean())


def make_formula() -> Formula:
    rng = np.random.default_rng(0)
    layers = tuple(
        (
            (rng.normal(size=(wide, narrow)) / np.sqrt(narrow)).astype(np.float32),
            np.zeros(wide, np.float32),
        )
        for narrow, wide in pairwise((DIM, DIM // 2, DIM, DIM))
    )
    offsets = (0.02 * rng.normal(size=(1000, DIM))).astype(np.float32)
    origin = np.full(DIM, 0.5 / DIM**0.5, np.float32)
    return Formula.of(origin, layers, 0.5, offsets, 1.0)


def unit(rows: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, device=device), dim=1)


def timed(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the fastest of a few runs after one to warm up, in seconds."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
