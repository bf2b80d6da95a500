"""Measure the GPU's work beside its limits: the loss, moving rows, and mining hard negatives.

    python benchmarks/gpu.py [--device cuda] [--part 1.0]

Needs torch, numpy and this repository, and takes less than eight minutes on an H100. Limits are
measured in the same process: products of matrices of the same shapes, and copies to the GPU and
back. Results are checked against the CPU's float32 first; nothing is measured where they differ.
`--device cpu --part 0.01` runs all of it on a hundredth of the work, to try the script.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simskip_vdb.losses import Similarity, distillation, info_nce, nt_xent
from simskip_vdb.moving import Formula
from simskip_vdb.moving_on_device import OnDevice
from simskip_vdb.pairs import nearest

BATCH, ROWS, DIM = 65_536, 1_000_000, 768
REPEATS = 3
TEMPERATURE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=float, default=1.0, help="part of the work, in (0, 1]")
    options = parser.parse_args()
    device = torch.device(options.device)
    batch, rows = (max(512, int(size * options.part)) for size in (BATCH, ROWS))
    torch.manual_seed(0)
    found: dict[str, Any] = {"device": name_of(device), "part": options.part, "dim": DIM}
    for name, measure, size in (
        ("loss", measure_loss, batch),
        ("apply", measure_apply, rows),
        ("mining", measure_mining, rows),
    ):
        start = time.perf_counter()
        found[name] = measure(device, size)
        found[name]["wall_seconds"] = time.perf_counter() - start
        print(name, json.dumps(found[name]), flush=True)
    if device.type == "cuda":
        print(f"saved {machine.save('gpu', found)}")


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
        "target": 0.5,
    }


def check_losses(device: torch.device) -> None:
    """Compare losses and gradients with the CPU's, in float32."""
    here = torch.device("cpu")
    queries, keys, raw = (unit(1024, here) for _ in range(3))
    pairs, weights = torch.arange(1024).repeat(2, 1), torch.rand(1024)
    own = torch.arange(1024).roll(1)

    def losses(to: torch.device) -> tuple[float, Tensor]:
        columns = keys.to(to).requires_grad_()
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
        "target": 0.7,
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
        "target": 2.0,
    }


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


def timed(work: Callable[[], None], device: torch.device, repeats: int = REPEATS) -> float:
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
