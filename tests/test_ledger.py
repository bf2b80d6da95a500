from __future__ import annotations

import json
import random
from collections.abc import Collection
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scipy.special import zeta

from simskip_vdb.datatypes import JudgedQueries
from simskip_vdb.errors import JournalError
from simskip_vdb.gate import Comparison, Look
from simskip_vdb.harm import HarmWatch
from simskip_vdb.ledger import ALPHA, FIRST_LEVEL, WEALTH, Ledger, share


def queries(*names: str, vectors: str | None = None) -> JudgedQueries:
    """Queries by name, with a vector of their own, or those of other names."""
    of = vectors.split() if vectors else names
    rows = np.array([np.random.default_rng([*name.encode()]).normal(size=4) for name in of])
    return JudgedQueries(
        ids=names,
        vectors=rows.astype(np.float32),
        indptr=np.zeros(len(names) + 1, np.int64),
        rows=np.empty(0, np.int64),
        grades=np.empty(0, np.int32),
    )


def found(p: float) -> Comparison:
    return Comparison(
        queries=50, before=0.3, after=0.4, delta=0.1, spread=0.2, ci95=None, wins=1, ties=0,
        losses=0, p=p,
    )  # fmt: skip


def look_at(ledger: Ledger, refiner: str, *names: str, test: str = "") -> Look:
    key = {"refiner": refiner, "against": "", "measure": "nDCG@10", "test": test, "rows": ""}
    return ledger.look(key, queries(*names))


def saffron(number: int, proven: list[int], candidates: Collection[int] = ()) -> float:
    """The level of a test by algorithm 1 of Ramdas et al. (2018), with our wealth and shares."""
    lam = 0.5
    rejected = [0, *proven]

    def gamma(k: int) -> float:
        return float(k**-2.2 / zeta(2.2))

    def since(j: int) -> int:  # C_j+ of the paper
        return sum(1 for i in range(rejected[j] + 1, number) if i in candidates)

    level = WEALTH * gamma(number - since(0))
    if proven:
        level += (ALPHA - WEALTH) * gamma(number - rejected[1] - since(1))
    for j in range(2, len(rejected)):
        level += ALPHA * gamma(number - rejected[j] - since(j))
    return (1 - lam) * level


def test_shares_sum_to_one() -> None:
    parts = [share(k) for k in range(1, 2000)]
    tail = 1999.5**-1.2 / 1.2 / zeta(2.2)
    assert sum(parts) + tail == pytest.approx(1, abs=1e-6)
    assert pytest.approx(0.01174, abs=1e-5) == FIRST_LEVEL
    with pytest.raises(ValueError, match="counted from 1"):
        share(0)


def test_levels_of_fresh_queries_are_those_of_the_paper(tmp_path: Path) -> None:
    ledger, rng = Ledger(tmp_path), np.random.default_rng(4)
    proven: list[int] = []
    candidates: set[int] = set()
    for number in range(1, 40):
        taken = look_at(ledger, f"r{number}", f"q{number}")
        assert taken.number == number
        assert taken.level == pytest.approx(saffron(number, proven, candidates), rel=1e-12)
        assert taken.proven == len(proven)
        p = 0.001 if number in (3, 4, 11, 25) else float(rng.random())
        ledger.saw(taken, found(p))
        candidates |= {number} if p <= 0.5 else set()
        if p == 0.001:
            ledger.earn(taken)
            proven.append(number)


def test_promising_looks_at_the_same_queries_cost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(1, 6):
        taken = look_at(ledger, f"r{number}", "a")
        ledger.saw(taken, found(0.1))
        assert taken.level == pytest.approx(saffron(number, []))
    assert look_at(ledger, "r6", "b").level == pytest.approx(saffron(6, [], {1, 2, 3, 4, 5}))


def test_queries_looked_at_before_a_gain_was_proven_do_not_spend_what_it_earned(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    look_at(ledger, "r1", "old")
    ledger.earn(look_at(ledger, "r2", "other"))
    assert look_at(ledger, "r3", "old", "new").level == pytest.approx(saffron(3, []))
    assert look_at(ledger, "r4", "newer").level == pytest.approx(saffron(4, [2]))
    # It was first looked at by the third look, after the gain was proven.
    assert look_at(ledger, "r5", "new").level == pytest.approx(saffron(5, [2]))


def test_the_same_look_keeps_its_number_level_and_seed(tmp_path: Path) -> None:
    first = look_at(Ledger(tmp_path), "one", "a", "b")
    look_at(Ledger(tmp_path), "two", "a", "b")
    again = look_at(Ledger(tmp_path), "one", "a", "b")
    assert (again.number, again.level, again.seed) == (first.number, first.level, first.seed)
    assert Ledger(tmp_path).looks == 2


def test_other_labels_of_the_same_queries_are_another_look_and_not_new_queries(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    ledger.earn(look_at(ledger, "one", "a", test="judged"))
    again = look_at(ledger, "one", "a", test="judged again")
    assert again.number == 2
    assert again.level == pytest.approx(saffron(2, []))


def test_queries_are_known_again_by_their_vectors(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    look_at(ledger, "one", "a", "b")
    renamed = queries("x", "y", vectors="b c")
    assert ledger.first_looks(renamed).tolist() == [1, 2]


def test_a_gain_that_is_proven_again_by_the_same_queries_earns_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(1, 4):  # proven, rolled back, fitted by another seed, proven again
        ledger.earn(look_at(ledger, f"r{number}", "a", f"b{number}"))
    assert look_at(ledger, "r4", "fresh").level == pytest.approx(saffron(4, [1]))


def test_another_encoder_and_then_other_ids_make_no_new_queries(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    key = {"measure": "m"}
    chain = [queries("a", vectors="v"), queries("a", vectors="w"), queries("b", vectors="w")]
    for number, asked in enumerate(chain):
        ledger.earn(ledger.look({**key, "refiner": str(number)}, asked))
    assert ledger.first_looks(queries("b", vectors="x")).tolist() == [1]
    assert look_at(ledger, "r", "fresh").proven == 1


def test_no_level_is_above_what_is_promised(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(12):
        taken = look_at(ledger, f"r{number}", f"q{number}")
        ledger.saw(taken, found(0.0001))
        ledger.earn(taken)
    assert look_at(ledger, "r", "q").level == ALPHA


def test_the_same_look_has_the_largest_p_it_ever_had(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    taken = look_at(ledger, "r", "a")
    assert [ledger.saw(taken, found(p)).p for p in (0.3, 0.9, 0.001)] == [0.3, 0.9, 0.9]


def test_what_a_harmful_refiner_earned_is_taken_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.earn(look_at(ledger, "bad", "a"))
    assert look_at(ledger, "other", "b").proven == 1
    watch = HarmWatch(refiner="bad").seeing(np.full(100, -0.5))
    assert watch.harmful
    ledger.watched(watch, queries("c"))
    assert Ledger(tmp_path).is_harmful("bad")
    assert look_at(Ledger(tmp_path), "third", "d").level == pytest.approx(saffron(3, []))


def test_watched_queries_are_fresh_no_more_but_spend_what_was_earned_before(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    ledger.earn(look_at(ledger, "one", "a"))
    ledger.watched(HarmWatch(refiner="one"), queries("b"))
    assert ledger.first_looks(queries("b", "c")).tolist() == [2, 2]
    assert look_at(ledger, "two", "b").proven == 1
    assert Ledger(tmp_path).first_looks(queries("b", "c")).tolist() == [2, 3]


def test_a_query_never_changes_its_split(tmp_path: Path) -> None:
    Ledger(tmp_path).assign({"a": "fit", "b": "test"})
    Ledger(tmp_path).assign({"a": "test", "c": "validation"})
    assert Ledger(tmp_path).splits == {"a": "fit", "b": "test", "c": "validation"}


def test_looks_of_earlier_versions_are_taken_over(tmp_path: Path) -> None:
    looks = [
        {"refiner": "r", "measure": "m", "test": "t", "look": n, "queries": 2, "time": 1.0}
        for n in (1, 2)
    ]
    data = {"splits": {"a": "test"}, "looked": {"a": 2, "b": 2}, "looks": looks}
    (tmp_path / "ledger.json").write_text(json.dumps(data))
    ledger = Ledger(tmp_path)
    assert ledger.looks == 2
    assert ledger.first_looks(queries("a", "c")).tolist() == [1, 3]
    assert look_at(ledger, "new", "c").level == pytest.approx(saffron(3, []))
    assert Ledger(tmp_path).looks == 3


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"splits": [], "looked": {}, "looks": []}',
        '{"splits": {"a": "train"}, "looked": {}, "looks": []}',
        '{"schema": 3}',
        '{"schema": 2, "splits": {}, "first": {}, "spent": [], "looks": [1], "watch": null,'
        ' "harmful": []}',
        '{"schema": 2, "splits": {}, "first": {"a": "1"}, "spent": [], "looks": [],'
        ' "watch": null, "harmful": []}',
        '{"schema": 2, "splits": {}, "first": {}, "spent": [], "looks": [], "watch": 3,'
        ' "harmful": []}',
        '{"schema": 2, "splits": {}, "first": {}, "spent": [], "looks": []}',
    ],
)
def test_a_damaged_ledger_is_refused_not_forgotten(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(JournalError, match="earlier looks"):
        Ledger(tmp_path)


NAMES = st.lists(st.sampled_from([f"q{n}" for n in range(12)]), min_size=1, max_size=6, unique=True)
CHANCES = st.sampled_from([0.001, 0.3, 0.5, 0.500001, 0.9])


class NothingBuysBackLevel(RuleBasedStateMachine):
    """Runs, rollbacks, moves of the state, other labels and renamed queries in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.place = TemporaryDirectory(prefix="simskip-ledger-")
        self.folder = Path(self.place.name) / "0"
        self.number = count()
        self.levels: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.written = 0

    def _look(self, refiner: str, asked: JudgedQueries, labels: str, p: float) -> None:
        ledger = Ledger(self.folder)
        key = {"refiner": refiner, "test": labels + " ".join(asked.ids)}
        name = json.dumps(key)
        taken = ledger.look(key, asked)
        assert taken.level == self.levels.setdefault(name, taken.level)
        self.largest[name] = max(p, self.largest.get(name, 0.0))
        assert ledger.saw(taken, found(p)).p == self.largest[name]
        if self.largest[name] <= taken.level:
            ledger.earn(taken)
            self.written += 1

    @rule(names=NAMES, labels=st.sampled_from(["", "again "]), p=CHANCES)
    def run(self, names: list[str], labels: str, p: float) -> None:
        self._look(f"r{next(self.number)}", queries(*names), labels, p)

    @rule(names=NAMES, p=CHANCES)
    def run_with_renamed_queries(self, names: list[str], p: float) -> None:
        asked = queries(*(f"renamed {name}" for name in names), vectors=" ".join(names))
        self._look(f"r{next(self.number)}", asked, "", p)

    @rule(names=NAMES, vectors=st.randoms(use_true_random=False), p=CHANCES)
    def run_embedded_anew(self, names: list[str], vectors: random.Random, p: float) -> None:
        of = [f"{name}-of-model-{vectors.randrange(3)}" for name in names]
        self._look(f"r{next(self.number)}", queries(*names, vectors=" ".join(of)), "", p)

    @rule(names=NAMES, refiner=st.integers(0, 3), p=CHANCES)
    def run_the_same_again(self, names: list[str], refiner: int, p: float) -> None:
        self._look(f"r{refiner}", queries(*names), "", p)

    @rule(names=NAMES)
    def roll_back_and_prove_again(self, names: list[str]) -> None:
        for _ in range(3):
            self._look(f"r{next(self.number)}", queries(*names), "", 0.001)

    @rule()
    def move_the_state(self) -> None:
        place = Path(self.place.name) / f"moved {next(self.number)}"
        if self.folder.exists():
            self.folder.rename(place)
        self.folder = place

    def teardown(self) -> None:
        self.place.cleanup()

    @invariant()
    def levels_are_paid_for(self) -> None:
        spent = sum(level for name, level in self.levels.items() if self.largest[name] > 0.5)
        # Twelve queries earn at most twelve times, however often something is written.
        regained = [0.0, ALPHA - WEALTH, *[ALPHA] * 11]
        wealth = WEALTH + sum(regained[: 1 + min(self.written, 12)])
        assert spent / 0.5 <= wealth + 1e-12
        assert all(level <= 0.5 * wealth * share(1) for level in self.levels.values())


TestNothingBuysBackLevel = NothingBuysBackLevel.TestCase
