"""Let nights of worthless refiners, and gains of known size, come to the gate.

    python benchmarks/gate.py [--data DIR] [--table] [--jobs N]

Every look goes through the ledger, the test and the gate that users get (`nights.py`). What is
measured already, by the code as it stands, is not measured again. Writes ``results/gate.json`` and
the tables of ``docs/gate.md``. Refiners that learnt nothing are fitted once and kept, with what
they did to test queries, in ``results/gate_challengers.jsonl``; DIR is needed for new ones only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product, repeat
from pathlib import Path
from typing import Any

import machine
import numpy as np
import procedures
from nights import Series, World, clicked, fixed, fresh, growing, play, tilted
from numpy.typing import NDArray
from scipy import stats

import simskip_vdb
from simskip_vdb.harm import HarmWatch
from simskip_vdb.ledger import FIRST_LEVEL
from simskip_vdb.statistics import prove

Scores = NDArray[np.float64]

HERE = Path(__file__).resolve().parent
RESULTS = machine.RESULTS / "gate.json"
DOCS = HERE.parent / "docs" / "gate.md"
MONTH, YEAR = 30, 365
MANY, SOME = 150, 15
"""Indexes that are looked after for a month, and for a year."""
GAIN, SIZE = 0.02, 300
GAINS, SIZES = (0.01, 0.02, 0.05), (50, 200, 1000)
LIVE = (0.02, 0.0, -0.01, -0.02, -0.05)
LEAST_MOVED = 3
"""Fewest test queries that gained, and that lost, of a set of differences worth resampling."""
FITTED = {"cranfield": MONTH, "cosqa": 8, "nfcorpus/wordllama": 0}
"""Refiners to fit on permuted judgments, by set; thirty of each kind of noise come on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Indexes of which the same is true.

    Attributes:
        truth: What is true of the refiners.
        asked: Which test queries come.
        world: All of it.
        nights: For how long.
        series: How many indexes.
    """

    truth: str
    asked: str
    world: World
    nights: int
    series: int

    @property
    def name(self) -> str:
        """What a person reads."""
        return f"{self.truth} · {self.asked} · {self.nights}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--table", action="store_true", help="only the table of what was measured")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if not options.table:
        store = machine.RESULTS / "gate_challengers.jsonl"
        fit(options.data, store)
        measure(store, options.jobs)
    machine.put(DOCS, "gate", table(json.loads(RESULTS.read_text())))


def fit(data: Path, store: Path) -> None:
    """Fit and measure the refiners that are not in the store yet."""
    import torch
    from loading import datasets
    from nulls import STRENGTHS, challengers

    torch.set_num_threads(1)
    for name, fits in FITTED.items() if data.is_dir() else ():
        (dataset,) = datasets(data, [name])
        wanted = {f"noise {strength:g}": MONTH for strength in STRENGTHS}
        wanted["permuted judgments"] = fits
        for kind, count in wanted.items():
            for line in challengers(dataset, [kind], count, store):
                print(line, flush=True)


def measure(store: Path, jobs: int) -> None:
    """Run all that is not there yet."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found.pop("machine", None)
    if found.get("code") != code(store):
        found = {"code": code(store), "nights": {}, "power": {}, "live": {}, "procedures": {}}
    measured: dict[str, dict[str, Any]] = {part: {} for part in found if part != "code"}
    with ProcessPoolExecutor(jobs, initializer=_use, initargs=(store,)) as pool:
        for part, name, run in _cells(store, pool):
            if name not in found[part]:
                found[part][name] = run()
                print(part, name, found[part][name], flush=True)
                machine.save(RESULTS.stem, found)
            measured[part][name] = found[part][name]
    machine.save(RESULTS.stem, {"code": found["code"], **measured})


def _cells(
    store: Path, pool: ProcessPoolExecutor
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield the part and the name of each result, and what measures it."""
    for number, scenario in enumerate(scenarios(store)):
        played = partial(pool.map, _play, repeat(number), range(scenario.series), chunksize=5)
        yield "nights", scenario.name, partial(_summary_of, played)
    for name, deltas in gains().items():
        for gain, size in product(GAINS, SIZES):
            yield "power", f"{name} · {gain} · {size}", partial(found_gains, deltas, gain, size)
    for gain in LIVE:
        yield "live", str(gain), partial(watched, gain)
    skewed = most_left_skewed(real_differences())[0]
    for name in ("nfcorpus (minilm)", "cosqa (minilm)"):
        met = partial(procedures.compare_procedures, gains()[name], skewed)
        yield "procedures", name, partial(met, GAIN, SIZE, MONTH, MANY)


def code(store: Path) -> str:
    """Hash what the results depend on."""
    ours, names = Path(simskip_vdb.__file__).parent, ("gate", "ledger", "statistics", "harm")
    sources = [*(ours / f"{name}.py" for name in names), HERE / "nights.py", HERE / "procedures.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in (*sources, store))).hexdigest()[:12]


_KNOWN: list[Scenario] = []


def _use(store: Path) -> None:
    _KNOWN[:] = scenarios(store)


def _play(scenario: int, seed: int) -> Series:
    one = _KNOWN[scenario]
    return play(one.world, one.nights, [zlib.crc32(one.name.encode()), seed])


def _summary_of(played: Callable[[], Iterator[Series]]) -> dict[str, Any]:
    return summary(list(played()))


def summary(series: Sequence[Series]) -> dict[str, Any]:
    """Say how often what was written, and when."""
    wrong = sum(len(one.worthless) for one in series)
    right = sum(len(one.useful) for one in series)
    first = [min(one.useful, default=None) for one in series]
    starved = [one.starved for one in series if one.starved is not None]
    undone = [
        one.rolled_back[0] - one.turned_harmful
        for one in series
        if one.rolled_back and one.turned_harmful is not None
    ]
    return {
        **rate(sum(bool(one.worthless) for one in series), len(series)),
        "worthless": wrong,
        "written": wrong + right,
        "night 1": sum(night == 0 for night in first) / len(series),
        "night 7": sum(night is not None and night < 7 for night in first) / len(series),
        "useful": right / len(series),
        "starved": None if 2 * len(starved) < len(series) else int(np.median(starved)) + 1,
        "rolled back": sum(bool(one.rolled_back) for one in series) / len(series),
        "nights of harm": float(np.median(undone)) if undone else None,
    }


def found_gains(deltas: Scores, gain: float, size: int) -> dict[str, Any]:
    """Say how often a true gain passes at a first look."""
    rng = np.random.default_rng([size, 1])
    drawn = rng.choice(deltas, (150, size), p=tilted(deltas, gain))
    found = [prove(one, FIRST_LEVEL, seed)[2] for seed, one in enumerate(drawn)]
    return rate(sum(interval is not None and interval[0] > 0 for interval in found), len(found))


def watched(gain: float) -> dict[str, Any]:
    """Say how often harm is proven of a refinement that is live for sixty nights, and when."""
    pool = [deltas for deltas in real_differences() if tilts(deltas, gain)]
    nights_until = []
    for seed in range(MANY):
        rng = np.random.default_rng([seed, 7])
        deltas = pool[rng.integers(len(pool))]
        watch = HarmWatch(refiner="live")
        for night in range(60):
            watch = watch.seeing(rng.choice(deltas, 20, p=tilted(deltas, gain)))
            if watch.harmful:
                nights_until.append(night + 1)
                break
    found = rate(len(nights_until), MANY)
    return {**found, "median": float(np.median(nights_until)) if nights_until else None}


def rate(passed: int, series: int) -> dict[str, Any]:
    """Return a share with its Clopper-Pearson 95 % interval."""
    interval = stats.binomtest(passed, series).proportion_ci(0.95, method="exact")
    return {
        "series": series,
        "passed": passed,
        "rate": round(passed / series, 4),
        "ci95": [round(float(end), 4) for end in interval],
    }


def tilts(deltas: Scores, mean: float) -> bool:
    """Tell whether weights can give differences a mean, well inside their range."""
    return bool(2 * abs(mean) < min(deltas.max(), -deltas.min()))


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
    """Yield all that is played."""
    from nulls import read

    real = tuple(deltas for deltas in real_differences() if tilts(deltas, 0.05))
    skewed = tuple(most_left_skewed(list(real)))
    noise = tuple(one for refiners in read(store).values() for one in recentred(refiners))
    improving = tuple(deltas for deltas in gains().values() if tilts(deltas, 0.1))
    for truth, pool in (("worthless", real), ("worthless, most left-skewed", skewed)):
        yield from _asked(truth, MONTH, 4 * MANY, 60, pool=pool)
        yield from _asked(truth, MONTH, MANY, SIZE, pool=pool)
        yield from _asked(truth, YEAR, MANY, SIZE, pool=pool)
    fitted = "worthless, fitted on permuted judgments or noise"
    yield from _asked(fitted, MONTH, MANY // 2, SIZE, pool=noise)
    by_clicks = "worthless, judged by clicks on what is live"
    yield from _asked(by_clicks, MONTH, MANY // 2, SIZE, pool=clicked(1000), biased=True)
    gaining = f"gaining {GAIN:g}"
    yield from _asked(gaining, MONTH, MANY, SIZE, pool=improving, candidate=lambda night: GAIN)
    yield from _asked(
        f"gaining {GAIN:g} more after every 60 nights of drift",
        YEAR,
        SOME,
        SIZE,
        pool=improving,
        candidate=lambda night: GAIN * (1 + night // 60),
    )
    yield from _asked(
        "gaining .04 in the first week, and .002 less every night",
        2 * MONTH,
        MANY // 4,
        SIZE,
        pool=improving,
        candidate=lambda night: 0.04 if night < 7 else 0.0,
        ageing=0.002,
        watched=True,
    )


def _asked(
    truth: str,
    nights_: int,
    series: int,
    size: int,
    *,
    candidate: Callable[[int], float] = lambda night: 0.0,
    **world: Any,  # noqa: ANN401
) -> Iterator[Scenario]:
    """Yield a scenario for each way in which test queries come."""
    same, new = fixed(size), fresh(size)
    ways = {
        f"the same {size} every night": same,
        f"{size // 3} at first, {size} more by the end": growing(size // 3, size / nights_),
        f"{size} fresh ones every night": new,
        f"{size}, half of them fresh every night": fresh(size, 0.5),
    }
    for asked, queries in ways.items():
        if nights_ == YEAR and queries not in (same, new):
            continue  # they cost as much again, and lie between these
        yield Scenario(
            truth=truth,
            asked=asked,
            world=World(queries=queries, candidate=candidate, **world),
            nights=nights_,
            series=series,
        )


def gains() -> dict[str, Scores]:
    """Return the default method's differences on every judged set, from a seed with a gain."""
    found: dict[str, Scores] = {}
    for cell in map(json.loads, (machine.RESULTS / "quality.jsonl").read_text().splitlines()):
        deltas = np.array(cell["after"]) - np.array(cell["before"])
        if cell["method"] == "ours, judged, docs" and deltas.mean() > min(GAINS) / 2:
            found.setdefault(f"{cell['set']} ({cell['encoder']})", deltas)
    return found


def table(found: dict[str, Any]) -> str:
    """Lay out what nights, first looks, live refinements and other procedures came to."""
    lines = [
        "| refiners are | test queries | nights | indexes | ever written something worthless | "
        "95 % | worthless of all written | first gain by night 1 | by night 7 | useful writes | "
        "starved in night | harm rolled back |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found["nights"].items():
        truth, asked, nights_ = name.split(" · ")
        low, high = one["ci95"]
        share = f"{one['worthless']} of {one['written']}"
        null = truth.startswith("worthless")
        late = one["nights of harm"]
        harm = f"{one['rolled back']:.0%}, {late:.0f} nights after" if late is not None else "–"
        lines.append(
            f"| {truth} | {asked} | {nights_} | {one['series']} | {one['rate']:.1%} | "
            f"{low:.1%} to {high:.1%} | {share} | "
            + (
                "– | – | – | "
                if null
                else f"{one['night 1']:.0%} | {one['night 7']:.0%} | {one['useful']:.1f} | "
            )
            + f"{one['starved'] or 'never'} | {harm} |"
        )
    head = [f"+{gain:g}, {size:,} queries" for gain, size in product(GAINS, SIZES)]
    lines += ["", "| a first look at differences of | " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (len(head) + 1))
    for name in dict.fromkeys(cell.split(" · ")[0] for cell in found["power"]):
        cells = (f"{name} · {gain} · {size}" for gain, size in product(GAINS, SIZES))
        shares = [f"{found['power'][cell]['rate']:.0%}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    lines += ["", "| what is live gains | called harmful in 60 nights | 95 % | median night |"]
    lines.append("|---|---|---|---|")
    for gain, one in found["live"].items():
        low, high = one["ci95"]
        night = "–" if one["median"] is None else f"{one['median']:.0f}"
        lines.append(
            f"| {float(gain):+g} | {one['rate']:.1%} | {low:.1%} to {high:.1%} | {night} |"
        )
    for name, cells in found["procedures"].items():
        columns = list(next(iter(cells.values())))
        lines += [
            "",
            f"| procedure, +{GAIN:g} on {name} | allows for dependence | "
            + " | ".join(columns)
            + " |",
            "|" + "---|" * (len(columns) + 2),
        ]
        allows = {one.name: one.allows for one in procedures.PROCEDURES}
        for procedure, one in cells.items():
            shown = [
                f"{value:.2f}" if column == "gains" else f"{value:.1%}"
                for column, value in one.items()
            ]
            lines.append(f"| {procedure} | {allows[procedure]} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
