from __future__ import annotations

from pathlib import Path

import pytest

from simskip_vdb.errors import JournalError
from simskip_vdb.ledger import Ledger


def test_a_query_never_changes_its_split(tmp_path: Path) -> None:
    Ledger(tmp_path).assign({"a": "fit", "b": "test"})
    Ledger(tmp_path).assign({"a": "test", "c": "validation"})
    assert Ledger(tmp_path).splits == {"a": "fit", "b": "test", "c": "validation"}


def test_looks_are_counted_across_runs(tmp_path: Path) -> None:
    assert Ledger(tmp_path).look("one", "nDCG@10", "ab", ["a", "b"]) == 1
    assert Ledger(tmp_path).look("two", "nDCG@10", "ab", ["b", "a"]) == 2
    assert Ledger(tmp_path).look("three", "nDCG@10", "ab", ["a", "b"]) == 3


def test_the_same_refiner_on_the_same_queries_is_the_same_look(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.look("one", "nDCG@10", "ab", ["a", "b"]) == 1
    assert ledger.look("two", "nDCG@10", "ab", ["a", "b"]) == 2
    assert ledger.look("one", "nDCG@10", "ab", ["b", "a"]) == 1
    assert len(ledger.looks) == 2


def test_another_measure_is_another_look(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.look("one", "nDCG@10", "a", ["a"]) == 1
    assert ledger.look("one", "R@10", "a", ["a"]) == 2


def test_a_grown_test_set_is_not_a_new_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.look("one", "nDCG@10", "ab", ["a", "b"]) == 1
    assert ledger.look("two", "nDCG@10", "bcd", ["b", "c", "d"]) == 2
    assert ledger.look("three", "nDCG@10", "xy", ["x", "y"]) == 1


def test_other_judgments_of_the_same_queries_are_another_look(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.look("one", "nDCG@10", "judged", ["a"]) == 1
    assert ledger.look("one", "nDCG@10", "judged again", ["a"]) == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"splits": [], "looked": {}, "looks": []}',
        '{"splits": {"a": "train"}, "looked": {}, "looks": []}',
    ],
)
def test_a_damaged_ledger_is_refused_not_forgotten(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(JournalError, match="earlier looks"):
        Ledger(tmp_path)
