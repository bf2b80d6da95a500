"""Let series of worthless refiners, and gains of known size, come to the gate.

    python benchmarks/gate.py [--data DIR] [--table]

Every look goes through the `compare` and `decide` that users get; strata and late rows, which can
only refuse more, are left out. What is measured already, by the code as it stands, is not measured
again. Writes ``results/gate.json`` and the section of ``docs/quality.md``. Refiners that learnt
nothing are fitted once and kept, with what they did to test queries, in
``results/gate_challengers.jsonl``; DIR is needed for new ones only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

import simskip_vdb
from simskip_vdb.gate import Evidence, decide, look_level
from simskip_vdb.statistics import compare

Scores = NDArray[np.float64]
Draw = Callable[[np.random.Generator], Iterable[Scores]]

HERE = Path(__file__).resolve().parent
RESULTS = machine.RESULTS / "gate.json"
DOCS = HERE.parent / "docs" / "quality.md"
NIGHTS = 30
MANY, SOME = 1000, 200
"""Series of one look, and of many looks."""
GAINS, SIZES = (0.01, 0.02, 0.05), (50, 200, 1000)
LEAST_MOVED = 3
"""Fewest test queries that gained, and that lost, of a set of differences worth resampling."""
FITTED = {"cranfield": NIGHTS, "cosqa": 8, "nfcorpus/wordllama": 0}
"""Refiners to fit on permuted judgments, by set; thirty of each kind of noise come on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Series of looks whose true effect is zero or negative.

    Attributes:
        name: What a person reads.
        draws: For each series, what yields the test queries' differences, look by look.
    """

    name: str
    draws: Sequence[Draw]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--table", action="store_true", help="only the table of what was measured")
    options = parser.parse_args()
    if not options.table:
        store = machine.RESULTS / "gate_challengers.jsonl"
        fit(options.data, store)
        measure(store)
    machine.put(DOCS, "gate", table(json.loads(RESULTS.read_text())))


def fit(data: Path, store: Path) -> None:
    """Fit and measure the refiners that are not in the store yet."""
    import torch
    from loading import datasets
    from nulls import STRENGTHS, challengers

    torch.set_num_threads(1)
    for name, fits in FITTED.items() if data.is_dir() else ():
        (dataset,) = datasets(data, [name])
        wanted = {f"noise {strength:g}": NIGHTS for strength in STRENGTHS}
        wanted["permuted judgments"] = fits
        for kind, count in wanted.items():
            for line in challengers(dataset, [kind], count, store):
                print(line, flush=True)


def measure(store: Path) -> None:
    """Run every scenario and every power cell that is not there yet."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found.pop("machine", None)
    if found.get("code") != code(store):
        found = {"code": code(store), "null": {}, "power": {}}
    null, power = found["null"], found["power"]
    for scenario in scenarios(store):
        if null.get(scenario.name, {}).get("series") != len(scenario.draws):
            seed = zlib.crc32(scenario.name.encode())
            passed = sum(play(draw, [seed, i]) for i, draw in enumerate(scenario.draws))
            null[scenario.name] = rate(passed, len(scenario.draws))
            print(scenario.name, null[scenario.name], flush=True)
            machine.save(RESULTS.stem, found)
    for name, deltas in gains().items():
        for gain, size in product(GAINS, SIZES):
            cell = f"{name} · {gain} · {size}"
            if cell not in power:
                power[cell] = rate(*found_gains(deltas, gain, size))
                print(cell, power[cell], flush=True)
                machine.save(RESULTS.stem, found)


def code(store: Path) -> str:
    """Hash what the results depend on."""
    ours = Path(simskip_vdb.__file__).parent
    sources = (ours / "gate.py", ours / "statistics.py", store)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def play(draw: Draw, seed: list[int]) -> bool:
    """Tell whether a series ever passes."""
    looks = enumerate(draw(np.random.default_rng(seed)), 1)
    return any(passes(deltas, look, seed[-1]) for look, deltas in looks)


def passes(deltas: Scores, look: int, seed: int) -> bool:
    """Tell what the gate says of differences at a look."""
    chosen = compare(np.zeros(len(deltas)), deltas, look_level(look), seed)
    return decide(Evidence(measure="nDCG@10", look=look, chosen=chosen)).passed


def found_gains(deltas: Scores, gain: float, size: int) -> tuple[int, int]:
    """Count how often a true gain passes at a first look, and out of how many."""
    series, weights = 150, tilted(deltas, gain)
    rng = np.random.default_rng([size, 1])
    draws = rng.choice(deltas, (series, size), p=weights)
    return sum(passes(drawn, 1, seed) for seed, drawn in enumerate(draws)), series


def rate(passed: int, series: int) -> dict[str, Any]:
    """Return a share with its Clopper-Pearson 95 % interval."""
    interval = stats.binomtest(passed, series).proportion_ci(0.95, method="exact")
    return {
        "series": series,
        "passed": passed,
        "rate": round(passed / series, 4),
        "ci95": [round(float(end), 4) for end in interval],
    }


def tilted(deltas: Scores, mean: float) -> Scores:
    """Return weights under which differences have a mean, by exponential tilting (Efron, 1981).

    Ties stay ties, and no query gains or loses what none did.
    """

    def weights(slope: float) -> Scores:
        found: Scores = special.softmax(slope * deltas)
        return found

    slope = optimize.brentq(lambda slope: weights(slope) @ deltas - mean, -500, 500)
    return weights(slope)


def recentred(deltas: Scores) -> Scores:
    """Shift what moved so that the mean is zero; deltas have shape (refiners, queries)."""
    moved = deltas != 0
    shift = deltas.sum(axis=1, keepdims=True) / np.maximum(1, moved.sum(axis=1, keepdims=True))
    return np.where(moved, deltas - shift, 0.0)


def real_differences() -> list[Scores]:
    """Return every method's differences on every set and seed, as `quality.py` measured them."""
    lines = (machine.RESULTS / "quality.jsonl").read_text().splitlines()
    cells = map(json.loads, lines)
    found = [np.array(cell["after"]) - np.array(cell["before"]) for cell in cells]
    return [d for d in found if min((d > 0).sum(), (d < 0).sum()) >= LEAST_MOVED]


def most_left_skewed(pool: list[Scores], count: int = 20) -> list[Scores]:
    """Return the differences, mirrored ones too, under which few lose much and most gain little.

    Where few queries move at all, few losses are missed as well, so a third of them must.
    """

    def skew(deltas: Scores) -> float:
        weights = tilted(deltas, 0.0)
        return float(weights @ deltas**3 / (weights @ deltas**2) ** 1.5)

    moving = [deltas for deltas in pool if np.count_nonzero(deltas) >= len(deltas) / 3]
    return sorted([*moving, *(-deltas for deltas in moving)], key=skew)[:count]


def scenarios(store: Path) -> Iterator[Scenario]:
    """Yield all null scenarios."""
    from nulls import read

    known = read(store)
    kinds = sorted({kind for _, kind in known})
    for kind in kinds:
        pool = [deltas for (_, other), deltas in known.items() if other == kind]
        yield Scenario(
            name=f"{kind}, as measured, one look",
            draws=[once(deltas) for refiners in pool for deltas in refiners],
        )
        yield Scenario(
            name=f"{kind}, mean set to zero, one look",
            draws=[same_queries([recentred(d) for d in pool], 1)] * MANY,
        )
        nightly = [recentred(d) for d in pool if len(d) >= NIGHTS]
        yield Scenario(
            name=f"{kind}, mean set to zero, thirty nightly looks",
            draws=[same_queries(nightly, NIGHTS)] * SOME,
        )
    everything = [recentred(d) for d in known.values() if len(d) >= NIGHTS]
    for size in (30, 50):
        yield Scenario(
            name=f"all of these, {size} test queries, thirty nightly looks",
            draws=[same_queries(everything, NIGHTS, size)] * SOME,
        )
    yield Scenario(
        name="all of these, ten more test queries every night",
        draws=[same_queries(everything, NIGHTS, 40, growth=10)] * SOME,
    )
    real = real_differences()
    skewed = most_left_skewed(real)
    for what, pool in (("real differences", real), ("the 20 most left-skewed", skewed)):
        for size in (30, 50, 323):
            yield Scenario(
                name=f"{what}, mean set to zero, {size} test queries, one look",
                draws=[fresh_queries(pool, 1, size)] * MANY,
            )
        yield Scenario(
            name=f"{what}, mean set to zero, 60 fresh test queries every night",
            draws=[fresh_queries(pool, NIGHTS, 60)] * (2 * SOME),
        )


def once(deltas: Scores) -> Draw:
    """Look at differences as they were measured."""
    return lambda rng: [deltas]


def same_queries(
    pools: list[Scores], looks: int, size: int | None = None, *, growth: int = 0
) -> Draw:
    """Draw test queries once, with replacement, and another refiner for each look at them."""

    def draw(rng: np.random.Generator) -> Iterator[Scores]:
        pool = pools[rng.integers(len(pools))]
        count = pool.shape[1] if size is None else size
        queries = rng.integers(0, pool.shape[1], count + growth * looks)
        for night, refiner in enumerate(rng.permutation(len(pool))[:looks]):
            yield pool[refiner, queries[: count + growth * night]]

    return draw


def fresh_queries(pool: list[Scores], looks: int, size: int) -> Draw:
    """Draw differences afresh for each look, from one of the pool under a mean of zero."""
    weighted = [(deltas, tilted(deltas, 0.0)) for deltas in pool]

    def draw(rng: np.random.Generator) -> Iterator[Scores]:
        deltas, weights = weighted[rng.integers(len(weighted))]
        for _ in range(looks):
            yield rng.choice(deltas, size, p=weights)

    return draw


def gains() -> dict[str, Scores]:
    """Return the default method's differences on every judged set, from a seed with a gain."""
    found: dict[str, Scores] = {}
    for cell in map(json.loads, (machine.RESULTS / "quality.jsonl").read_text().splitlines()):
        deltas = np.array(cell["after"]) - np.array(cell["before"])
        if cell["method"] == "ours, judged, docs" and deltas.mean() > min(GAINS) / 2:
            found.setdefault(f"{cell['set']} ({cell['encoder']})", deltas)
    return found


def table(found: dict[str, Any]) -> str:
    """Lay out how often null series pass and how often gains do."""
    lines = [
        "| series without an effect | series | ever passed | 95 % interval |",
        "|---|---|---|---|",
    ]
    for name, one in found["null"].items():
        low, high = one["ci95"]
        lines.append(
            f"| {name} | {one['series']:,} | {one['rate']:.1%} | {low:.1%} to {high:.1%} |"
        )
    head = [f"+{gain:g}, {size:,} queries" for gain, size in product(GAINS, SIZES)]
    lines += ["", "| differences of | " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (len(head) + 1))
    for name in dict.fromkeys(cell.split(" · ")[0] for cell in found["power"]):
        cells = (f"{name} · {gain} · {size}" for gain, size in product(GAINS, SIZES))
        shares = [f"{found['power'][cell]['rate']:.0%}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
