"""What each query was used for, and the level at which a look at test queries may prove a gain."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import JudgedQueries, Split
from simskip_vdb.durable import has_file, json_of, write_durably
from simskip_vdb.errors import JournalError
from simskip_vdb.gate import Comparison, Look
from simskip_vdb.harm import HarmWatch
from simskip_vdb.rows import row_digests

SCHEMA = 2
ALPHA = 0.05
"""Most that worthless refiners may make up of what is written."""
WEALTH = 0.035
"""Wealth before a gain is proven: most that worthless refiners are ever written to an index of
which all are. It is less than `ALPHA` because a test errs where most queries gain a little and few
lose much."""
PROMISING = 0.5
"""A look with p up to this costs nothing, where it does not share queries with a later one."""
_EXPONENT = 2.2
_ZETA = 1.490543256561017  # sum of k ** -2.2 over k = 1, 2, …


def share(k: int) -> float:
    """Return the share of wealth that is spent by the k-th look that costs; they sum to 1.

    Raises:
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"looks are counted from 1, not {k}")
    return float(k**-_EXPONENT / _ZETA)


FIRST_LEVEL = (1 - PROMISING) * WEALTH * share(1)
"""Level of an index's first look, .0117."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    """A look as it is kept.

    Attributes:
        key: What was looked at; the same again is no other look.
        queries: How many test queries.
        first: When the first of these queries was first looked at; no wealth that was earned
            from then on is spent on them.
        level: At which level.
        time: Seconds since 1970.
        p: One-sided p of a gain; the largest, where it was taken again; None where it never got
            so far.
        earned: Whether its proven gain earned wealth.
        spread: Standard deviation of the queries' differences; None where it never got so far.
    """

    key: Mapping[str, str]
    queries: int
    first: int
    level: float
    time: float
    p: float | None = None
    earned: bool = False
    spread: float | None = None

    @property
    def promising(self) -> bool:
        """Whether it costs nothing."""
        return self.p is not None and self.p <= PROMISING


@dataclass(slots=True, kw_only=True)
class _Contents:
    splits: dict[str, str] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    spent: list[str] = field(default_factory=list)
    looks: list[_Entry] = field(default_factory=list)
    watch: HarmWatch | None = None
    harmful: list[str] = field(default_factory=list)


class Ledger:
    """Which split each query belongs to, and what was spent on looks at test queries.

    A query's split is never changed once recorded.

    Levels are those of SAFFRON (Ramdas, Zrnic, Wainwright & Jordan, ICML 2018) with conflict sets
    (Zrnic, Ramdas & Jordan, Asynchronous online testing of multiple hypotheses, JMLR 2021): the
    t-th look of an index has, with λ = `PROMISING`,

        (1 - λ) (WEALTH share(t - c0) + (ALPHA - WEALTH) share(t - r1 - c1)
                 + ALPHA (share(t - r2 - c2) + …))

    where r1 < r2 < … are the looks whose proven gain was written, and c0, c1, … count the looks
    with p ≤ λ, of all and of those after r1, …: only the others cost. Of either, only looks count
    that came before any query of this look was first looked at, so that its level does not depend
    on what its own queries said before. `docs/gate.md` says what follows, and from what.

    A query is known again by its id or its vector. Only gains that were proven by queries of which
    none earned before earn wealth.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.json"
        self._kept = _Contents()
        self._asked: dict[int, list[str]] = {}
        if has_file(self._path):
            try:
                self._kept = _read(json_of(self._path.read_bytes()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise JournalError(
                    f"{self._path} cannot be read ({error}); restore it from a backup: without it "
                    "earlier looks at the test queries would be forgotten"
                ) from error

    @property
    def splits(self) -> Mapping[str, str]:
        """The split of each query, by id."""
        return self._kept.splits

    @property
    def looks(self) -> int:
        """How many looks there were."""
        return len(self._kept.looks)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the differences that were seen last; None where none were."""
        found = [look.spread for look in self._kept.looks if look.spread is not None]
        return found[-1] if found else None

    def assign(self, splits: Mapping[str, str]) -> None:
        """Record the splits of queries; what is recorded already stays."""
        merged = {**splits, **self._kept.splits}
        if merged != self._kept.splits:
            self._kept.splits = merged
            self._save()

    def first_looks(self, queries: JudgedQueries) -> NDArray[np.int64]:
        """Return the number of the look that each query was first looked at by, shape (m,).

        The next look's number stands for those that nobody looked at yet.
        """
        return np.array(self._first(_names(queries)), np.int64)

    def fresh(self, queries: JudgedQueries) -> NDArray[np.bool_]:
        """Tell which queries nobody looked at or watched by yet, shape (m,)."""
        known = self._kept.first
        return np.array(
            [not any(name in known for name in names) for names in _names(queries)], np.bool_
        )

    def watching(self, refiner: str) -> HarmWatch | None:
        """Return what fresh queries say of a refiner, by its id, that is live; None for nothing."""
        watch = self._kept.watch
        return watch if watch is not None and watch.refiner == refiner else None

    def _level(self, first: int, number: int) -> float:
        """Return the level of a look by its number, and that of the first look at its queries."""
        before = self._kept.looks[: first - 1]
        promising = [i for i, entry in enumerate(before, 1) if entry.promising]
        # The first wealth was earned, so to speak, by a look before all others.
        wealths, earned = [WEALTH, ALPHA - WEALTH], [0, *self._earned(first)]
        wealths += [ALPHA] * (len(earned) - 2)
        level = (1 - PROMISING) * sum(
            wealth * share(number - since - sum(look > since for look in promising))
            for wealth, since in zip(wealths, earned, strict=False)
        )
        return min(ALPHA, level)

    def look(self, key: Mapping[str, str], queries: JudgedQueries) -> Look:
        """Count a look at these test queries before it happens, and return its level.

        Args:
            key: What is looked at; a look with the same key is the same one.
            queries: All test queries.
        """
        looks, names = self._kept.looks, _names(queries)
        number = next((i for i, entry in enumerate(looks, 1) if entry.key == key), None)
        if number is None:
            number = self.looks + 1
            first = min(self._first(names), default=number)
            level = self._level(first, number)
            self._mark(names, number)
            looks.append(
                _Entry(
                    key=dict(key), queries=len(queries), first=first, level=level, time=time.time()
                )
            )
            self._save()
        self._asked[number] = [name for pair in names for name in pair]
        entry = looks[number - 1]
        text = json.dumps(entry.key, sort_keys=True).encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
        return self._as_look(number, entry.level, entry.first, seed)

    def next_look(self, first: int) -> Look:
        """Return the look that would be taken next, without a seed of its own.

        Args:
            first: Number of the look by which the earliest of its queries was first looked at.
        """
        number = self.looks + 1
        return self._as_look(number, self._level(first, number), first, seed=0)

    def saw(self, look: Look, found: Comparison) -> Comparison:
        """Note what a look found, and return it with the largest p that the same look ever had."""
        entry = self._kept.looks[look.number - 1]
        p = 1.0 if found.p is None else found.p
        entry.p = p if entry.p is None else max(p, entry.p)
        entry.spread = found.spread
        self._save()
        return found if found.p is None else replace(found, p=entry.p)

    def earn(self, look: Look) -> None:
        """Note that the gain which a look of this run proved was written: it earns wealth."""
        kept, names = self._kept, self._asked[look.number]
        kept.looks[look.number - 1].earned |= not set(kept.spent).intersection(names)
        kept.spent = sorted({*kept.spent, *names})
        self._save()

    def watched(
        self, watch: HarmWatch, queries: JudgedQueries, useless: Iterable[str] = ()
    ) -> None:
        """Note what fresh queries said of the live refinement; they are fresh no more.

        A refiner that they prove harmful is not written again, and what it earned is taken back.

        Args:
            watch: What is known now.
            queries: The fresh queries.
            useless: Ids of others that nothing could be measured with.
        """
        kept = self._kept
        kept.watch = watch
        self._mark(_names(queries), self.looks + 1)
        for name in useless:
            kept.first.setdefault(f"id:{name}", self.looks + 1)
        if watch.harmful and watch.refiner not in kept.harmful:
            kept.harmful.append(watch.refiner)
            for entry in kept.looks:
                entry.earned &= entry.key.get("refiner") != watch.refiner
        self._save()

    def unwatched(self, query_ids: Iterable[str]) -> list[str]:
        """Return those of these queries that may be test queries which nobody looked at yet."""
        splits, first, test = self._kept.splits, self._kept.first, Split.TEST.value
        return [
            name
            for name in query_ids
            if f"id:{name}" not in first and splits.get(name, test) == test
        ]

    def is_harmful(self, refiner: str) -> bool:
        """Tell whether fresh queries proved that a refiner, named by its id, does harm."""
        return refiner in self._kept.harmful

    def _as_look(self, number: int, level: float, first: int, seed: int) -> Look:
        return Look(
            number=number,
            level=level,
            next_level=self._level(first, max(number, self.looks) + 1),
            proven=len(self._earned(first)),
            seed=seed,
        )

    def _first(self, names: Iterable[_Names]) -> list[int]:
        """Return by which look queries were first looked at, the next for those that were not."""
        following, first = self.looks + 1, self._kept.first
        return [min(first.get(name, following) for name in pair) for pair in names]

    def _earned(self, first: int) -> list[int]:
        """Return the looks before `first` that earned wealth."""
        return [i for i, entry in enumerate(self._kept.looks[: first - 1], 1) if entry.earned]

    def _mark(self, names: Iterable[_Names], number: int) -> None:
        """Note by which look queries were first looked at, under each of their names."""
        first = self._kept.first
        for pair in names:
            earliest = min(first.get(name, number) for name in pair)
            first.update(dict.fromkeys(pair, earliest))

    def _save(self) -> None:
        data = {"schema": SCHEMA, **asdict(self._kept)}
        write_durably(self._path, json.dumps(data).encode())


_Names = tuple[str, str]
"""A query's id, and its vector's digest as a name that no id has."""


def _names(queries: JudgedQueries) -> list[_Names]:
    named = zip(queries.ids, row_digests(queries.vectors).tolist(), strict=True)
    return [(f"id:{name}", f"vector:{digest:016x}") for name, digest in named]


def _read(data: Mapping[str, Any]) -> _Contents:
    found = dict(data)
    schema = found.pop("schema", 1)
    if schema > SCHEMA:
        raise ValueError("a newer version wrote it; upgrade simskip-vdb")
    if schema == 1:
        found = _of_first_schema(found)
    watch = found.pop("watch")
    contents = _Contents(
        **{**found, "looks": [_Entry(**entry) for entry in found["looks"]]},
        watch=None if watch is None else HarmWatch(**watch),
    )
    _check(contents)
    return contents


def _of_first_schema(data: Mapping[str, Any]) -> dict[str, Any]:
    """Take over the looks of earlier versions, which counted them by query: none earned."""
    return {
        "splits": data["splits"],
        "first": {f"id:{name}": 1 for name in dict(data["looked"])},
        "spent": [],
        "looks": [
            {
                "key": {name: look[name] for name in ("refiner", "measure", "test")},
                "queries": look["queries"],
                "first": 1,
                "level": 0.025 / (look["look"] * (look["look"] + 1)),
                "time": look["time"],
            }
            for look in data["looks"]
        ],
        "watch": None,
        "harmful": [],
    }


def _check(contents: _Contents) -> None:
    """Refuse what is of another type than was written."""
    for value, kind in (
        (contents.splits, dict),
        (contents.first, dict),
        (contents.spent, list),
        (contents.harmful, list),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{type(value).__name__} where {kind.__name__} belongs")
    for split in set(contents.splits.values()):
        Split(split)
    numbers: Iterable[Any] = (
        *contents.first.values(),
        *(number for look in contents.looks for number in (look.first, look.level, look.queries)),
        *(look.p for look in contents.looks if look.p is not None),
    )
    for number in numbers:
        if not isinstance(number, (int, float)):
            raise TypeError(f"{type(number).__name__} where a number belongs")
