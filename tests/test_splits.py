from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest

from simskip_vdb import splits
from simskip_vdb.datatypes import Split, Vectors
from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.splits import assign, hold_out, near_identical, row_name, unit_hash

SHARES = {Split.FIT: 0.6, Split.VALIDATION: 0.2, Split.TEST: 0.2}


def clusters_of(found: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(found == c).tolist()) for c in np.unique(found)}


def slow_clusters(vectors: Vectors) -> set[frozenset[int]]:
    """Walk the links one by one."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, found = set(range(len(vectors))), set()
    while left:
        cluster, edge = set(), [left.pop()]
        while edge:
            one = edge.pop()
            cluster.add(one)
            near = [other for other in left if unit[one] @ unit[other] > 0.999]
            left.difference_update(near)
            edge += near
        found.add(frozenset(cluster))
    return found


def test_hash_is_a_fraction_of_blake2b_and_depends_on_the_seed() -> None:
    names = ["a", "zwölf", ""]
    digest = hashlib.blake2b(b"a", digest_size=8, key=b"3").digest()
    expected = (int.from_bytes(digest, "big") >> 11) / 2**53
    assert unit_hash(names, 3)[0] == expected
    many = unit_hash(map(str, range(20_000)), 0)
    assert many.min() >= 0
    assert many.max() < 1
    np.testing.assert_allclose(np.histogram(many, 10, (0, 1))[0], 2000, atol=200)
    assert abs(np.corrcoef(many, unit_hash(map(str, range(20_000)), 1))[0, 1]) < 0.03
    assert unit_hash([], 0).shape == (0,)


@pytest.mark.parametrize("pairs", [1, 350, 1 << 24])
def test_clusters_are_those_of_a_walk(
    pairs: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(splits, "_PAIRS", pairs)
    # Steps of .03 on a circle are near-identical; chains, pairs and loners are mixed.
    angles = np.concatenate([np.arange(8) * 0.03, rng.uniform(1, 6, 40), [3.0, 3.001]])
    rng.shuffle(angles)
    vectors = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    vectors *= rng.uniform(0.1, 9, (len(vectors), 1)).astype(np.float32)
    found = near_identical(vectors)
    assert clusters_of(found) == slow_clusters(vectors)
    assert any(len(cluster) >= 8 for cluster in clusters_of(found))


def test_no_queries_have_no_clusters() -> None:
    assert near_identical(np.empty((0, 4), np.float32)).shape == (0,)


def test_scipy_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(MissingDependencyError, match=r"simskip-vdb\[eval\]"):
        near_identical(np.ones((2, 2), np.float32))


def test_shares_are_about_right_and_do_not_depend_on_who_else_is_there() -> None:
    ids = [f"q{i}" for i in range(5000)]
    found = assign(ids, np.arange(5000), SHARES, 0, {})
    for split, share in SHARES.items():
        assert list(found.values()).count(split) == pytest.approx(5000 * share, rel=0.06)
    some = assign(ids[:40], np.arange(40), SHARES, 0, {})
    assert some == {name: found[name] for name in ids[:40]}
    assert assign(ids, np.arange(5000), SHARES, 1, {}) != found


def test_clusters_stay_together() -> None:
    ids = [f"q{i}" for i in range(300)]
    clusters = np.arange(300) // 3
    found = assign(ids, clusters, SHARES, 0, {})
    for c in range(100):
        assert len({found[f"q{i}"] for i in range(3 * c, 3 * c + 3)}) == 1
    assert assign(ids[::-1], clusters[::-1], SHARES, 0, {}) == found


def test_earlier_splits_win_and_near_identical_queries_follow() -> None:
    ids = ["a", "b", "c", "d"]
    before = {"b": Split.TEST, "d": Split.FIT, "gone": Split.FIT}
    found = assign(ids, np.array([0, 0, 0, 1]), SHARES, 0, before)
    assert found == {"a": Split.TEST, "b": Split.TEST, "c": Split.TEST, "d": Split.FIT}
    apart = {"a": Split.FIT, "b": Split.TEST}
    assert assign(["b", "a"], np.array([0, 0]), SHARES, 0, apart) == apart


BOTH = [Split.VALIDATION, Split.TEST]


def test_a_fifth_of_the_rows_is_held_out_for_each_split() -> None:
    groups = np.arange(2000) % 10
    held = hold_out(np.arange(2000), groups, BOTH, 0, {})
    names = [row_name(i) for i in range(2000)]
    drawn = unit_hash(names, 0)
    assert set(held) == set(BOTH)
    assert not set(held[Split.VALIDATION]) & set(held[Split.TEST])
    assert (drawn[held[Split.VALIDATION]] < 0.2).all()
    assert ((drawn[held[Split.TEST]] >= 0.2) & (drawn[held[Split.TEST]] < 0.4)).all()
    for positions in held.values():
        assert len(positions) == pytest.approx(400, rel=0.15)
        assert (np.diff(positions) > 0).all()
    assert set(hold_out(np.arange(2000), groups, [Split.TEST], 0, {})) == {Split.TEST}


def test_the_choice_goes_by_row_id_not_by_position(rng: np.random.Generator) -> None:
    ids = rng.permutation(5000)[:1000]
    groups = ids % 7
    held = hold_out(ids, groups, BOTH, 0, {})
    order = np.argsort(ids)
    again = hold_out(ids[order], groups[order], BOTH, 0, {})
    for split in BOTH:
        assert set(ids[held[split]]) == set(ids[order][again[split]])


def test_every_group_keeps_a_row_and_rows_without_a_group_are_left(
    rng: np.random.Generator,
) -> None:
    groups = rng.integers(-1, 400, 1000)
    held = hold_out(np.arange(1000), groups, BOTH, 0, {})
    out = np.concatenate([held[split] for split in BOTH])
    assert len(out) > 100
    assert (groups[out] >= 0).all()
    left = np.delete(groups, out)
    assert set(groups[out]) <= set(left)
    alone = hold_out(np.arange(50), np.arange(50), BOTH, 0, {})
    assert all(len(positions) == 0 for positions in alone.values())


def test_at_most_a_thousand_rows_and_fewer_in_huge_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = np.arange(9000) % 90
    held = hold_out(np.arange(9000), groups, BOTH, 0, {})
    assert [len(held[split]) for split in BOTH] == [1000, 1000]
    monkeypatch.setattr(splits, "MOST_GROUP_JUDGMENTS", 5000)
    held = hold_out(np.arange(9000), groups, BOTH, 0, {})
    assert [len(held[split]) for split in BOTH] == [50, 50]


def test_rows_held_out_before_are_held_out_again() -> None:
    groups = np.arange(3000) % 10
    first = hold_out(np.arange(3000), groups, BOTH, 0, {})
    before = {row_name(i): split for split in BOTH for i in first[split].tolist()}
    grown = hold_out(np.arange(9000), np.arange(9000) % 10, BOTH, 5, before)
    for split in BOTH:
        assert set(first[split]) <= set(grown[split])
        assert len(grown[split]) == 1000
    assert not set(grown[Split.VALIDATION]) & set(grown[Split.TEST])
