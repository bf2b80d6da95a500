"""Many nights of one index, with the ledger, the comparison and the gate that users get.

Only the measuring is made up: each night's differences between a candidate and what is live are
drawn from those that were measured on real sets, weighted so that their mean is the true gain
(exponential tilting). Strata and late rows, which can only refuse more, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from simskip_vdb.datatypes import JudgedQueries
from simskip_vdb.gate import Comparison, Evidence, decide
from simskip_vdb.harm import HarmWatch
from simskip_vdb.ledger import Ledger
from simskip_vdb.measuring import freshest_part
from simskip_vdb.sample_size import smallest_gain
from simskip_vdb.statistics import prove

Scores = NDArray[np.float64]
Gain = Callable[[int], float]
"""True gain over the originals, by night."""
ROOM = 0.5
"""Share of a difference's variance that is the query's own, the same every night."""
STARVED = 0.1
"""An index is starved of level when its test queries could find no smaller gain than this."""


class InMemory(Ledger):
    """A ledger that is written nowhere."""

    def __init__(self) -> None:
        super().__init__(Path(gettempdir()) / "there is no such folder")

    def _save(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is true of an index, and how its test queries come.

    Attributes:
        pool: Differences of refiners on real sets, each of shape (queries,).
        queries: Numbers of a night's test queries, from the night.
        candidate: True gain of the refiner that is fitted in a night.
        ageing: What each night takes from the gain of a refiner that is live.
        watched: Whether harm that fresh queries prove is rolled back.
        biased: Whether what is measured errs by the mean of the pool's differences.
    """

    pool: tuple[Scores, ...]
    queries: Callable[[int], NDArray[np.int64]]
    candidate: Gain
    ageing: float = 0.0
    watched: bool = False
    biased: bool = False


@dataclass(slots=True, kw_only=True)
class Series:
    """What happened to one index.

    Attributes:
        useful: Nights in which a better refiner was written.
        worthless: Nights in which one was written that was no better than what was live.
        rolled_back: Nights in which harm was proven.
        turned_harmful: First night in which what was live was worse than the originals.
        starved: First night whose queries could prove no gain below `STARVED`.
    """

    useful: list[int] = field(default_factory=list)
    worthless: list[int] = field(default_factory=list)
    rolled_back: list[int] = field(default_factory=list)
    turned_harmful: int | None = None
    starved: int | None = None


def play(world: World, nights: int, seed: list[int]) -> Series:
    """Let the nights of one index pass."""
    rng = np.random.default_rng(seed)
    deltas = world.pool[rng.integers(len(world.pool))]
    own = rng.normal(size=1 + max(int(world.queries(night).max()) for night in range(nights)))
    error = float(deltas.mean()) if world.biased else 0.0
    ledger, series, live, watch = InMemory(), Series(), 0.0, None
    for night in range(nights):
        asked = judged(world.queries(night))
        live -= world.ageing if watch is not None else 0.0
        if live < 0 and series.turned_harmful is None:
            series.turned_harmful = night
        if watch is not None and world.watched:
            new = asked.subset(ledger.fresh(asked))
            if len(new):
                watch = watch.seeing(drawn(deltas, live, own, new, rng))
                ledger.watched(watch, new)
            if watch.harmful:
                series.rolled_back.append(night)
                live, watch = 0.0, None
                continue
        gain = world.candidate(night)
        part = freshest_part(ledger, asked)
        look = ledger.look({"refiner": str(night), "against": str(series.useful)}, part)
        found = drawn(deltas, gain - live + error, own, part, rng)
        loss = look.assumed_loss(len(part))
        p, p_harm, interval = prove(found, look.level, look.seed, assumed_loss=loss)
        mean, spread = float(found.mean()), float(found.std(ddof=1))
        chosen = Comparison(
            queries=len(found),
            before=0.0,
            after=mean,
            delta=mean,
            spread=spread,
            ci95=None,
            wins=0,
            ties=0,
            losses=0,
            level=look.level,
            interval=interval,
            p=p,
            p_harm=p_harm,
        )
        ledger.saw(look, chosen)
        least = smallest_gain(len(part), look.level, spread, assumed_loss=loss)
        if series.starved is None and least > STARVED:
            series.starved = night
        if decide(Evidence(measure="nDCG@10", look=look, chosen=chosen)).passed:
            ledger.earn(look)
            (series.useful if gain > live + 1e-9 else series.worthless).append(night)
            live, watch = gain, HarmWatch(refiner=str(night))
    return series


def judged(numbers: NDArray[np.int64]) -> JudgedQueries:
    """Return queries that are only known by their numbers."""
    return JudgedQueries(
        ids=tuple(map(str, numbers.tolist())),
        vectors=numbers.astype(np.float32)[:, None] + 1,
        indptr=np.zeros(len(numbers) + 1, np.int64),
        rows=np.empty(0, np.int64),
        grades=np.empty(0, np.int32),
    )


def drawn(
    deltas: Scores, mean: float, own: Scores, asked: JudgedQueries, rng: np.random.Generator
) -> Scores:
    """Draw the differences of queries, whose own share of them is the same every night."""
    place = own[np.array(asked.ids, np.int64)]
    noise = rng.normal(size=len(place))
    quantile = stats.norm.cdf(ROOM**0.5 * place + (1 - ROOM) ** 0.5 * noise)
    ordered, reached = _distribution(deltas.tobytes(), round(mean, 6))
    found: Scores = ordered[np.minimum(np.searchsorted(reached, quantile), len(ordered) - 1)]
    return found


@lru_cache(4096)
def _distribution(deltas: bytes, mean: float) -> tuple[Scores, Scores]:
    ordered = np.sort(np.frombuffer(deltas))
    return ordered, np.cumsum(tilted(ordered, mean))


def tilted(deltas: Scores, mean: float) -> Scores:
    """Return weights under which differences have a mean, by exponential tilting (Efron, 1981).

    Ties stay ties, and no query gains or loses what none did.
    """

    def weights(slope: float) -> Scores:
        found: Scores = special.softmax(slope * deltas)
        return found

    slope = optimize.brentq(lambda slope: weights(slope) @ deltas - mean, -500, 500)
    return weights(slope)


def fixed(size: int) -> Callable[[int], NDArray[np.int64]]:
    """Return the same queries every night."""
    return lambda night: np.arange(size)


def growing(size: int, more: float) -> Callable[[int], NDArray[np.int64]]:
    """Return more queries every night."""
    return lambda night: np.arange(int(size + more * night))


def fresh(size: int, share: float = 1.0) -> Callable[[int], NDArray[np.int64]]:
    """Return queries of which a share is new every night."""
    step = int(size * share)
    return lambda night: np.arange(night * step, night * step + size)


def clicked(size: int) -> tuple[Scores, ...]:
    """Return what clicks say of refiners that are worth nothing: each with its own differences.

    Each of 20 rows is relevant with probability .2; two rankings are equally good guesses at that.
    Twenty sessions see the live one; a rank is examined with probability 1/rank, a relevant row
    that is examined is clicked nine times in ten, another once in ten. What was clicked counts
    as relevant, so the live ranking is favoured, as it is in real logs.
    """
    rng = np.random.default_rng(5)
    found = []
    for _ in range(20):
        relevant = rng.random((size, 20)) < 0.2
        live, other = (
            np.argsort(-(relevant + rng.normal(0, 1, relevant.shape)), axis=1) for _ in range(2)
        )
        rank = np.argsort(live, axis=1) + 1
        chance = np.where(relevant, 0.9, 0.1) / rank
        clicks = rng.binomial(20, chance) > 0
        found.append(_ndcg(clicks, other) - _ndcg(clicks, live))
    return tuple(found)


def _ndcg(relevant: NDArray[np.bool_], order: NDArray[np.int64]) -> Scores:
    discounts = 1 / np.log2(np.arange(10) + 2)
    found = np.take_along_axis(relevant, order[:, :10], axis=1) @ discounts
    best = np.array([discounts[: min(10, int(count))].sum() for count in relevant.sum(axis=1)])
    ndcg: Scores = np.divide(found, best, out=np.zeros(len(found)), where=best > 0)
    return ndcg
