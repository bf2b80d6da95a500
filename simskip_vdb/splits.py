"""Share queries out to fit, validation and test, the same way every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, Positions, Split, Vectors, id_names
from simskip_vdb.errors import MissingDependencyError

NEAR_IDENTICAL = 0.001
"""How far below 1 the cosine of queries that count as one may be, in parts of their spread.

That is 1 - ‖mean‖²: encoders that crowd their vectors, so that all cosines are high, have less.
"""
LEAST_SPREAD = 0.01  # where nearly all queries are one
HELD_OUT = 0.2
"""Part of the rows that act as queries for one split where groups have no queries."""
MOST_HELD_OUT = 1000
"""Most rows that act as queries for one split."""
MOST_GROUP_JUDGMENTS = 2_000_000
"""About the most relevant rows that groups may make over all queries of one split."""
_PAIRS = 1 << 24
"""Pairs of queries compared at once."""


def unit_hash(names: Iterable[str], seed: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each name that depends on nothing but name and seed.

    Args:
        names: n names.
        seed: Any integer.

    Returns:
        Shape (n,).
    """
    key = str(seed).encode()
    digests = b"".join(
        hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in names
    )
    # A float64 holds 53 bits; keeping more would round the largest hashes up to 1.
    whole = np.frombuffer(digests, ">u8").astype(np.uint64) >> np.uint64(11)
    fractions: NDArray[np.float64] = whole.astype(np.float64) * 2.0**-53
    return fractions


def near_identical(vectors: Vectors) -> Positions:
    """Number the clusters of queries that are linked as `NEAR_IDENTICAL` says.

    Args:
        vectors: Shape (m, d), finite and not zero.

    Returns:
        Shape (m,); equal numbers are one cluster.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
    except ImportError as error:
        raise MissingDependencyError("scipy", "eval") from error
    count = len(vectors)
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit = unit.astype(np.float32)
    spread = 1 - float((unit.mean(axis=0, dtype=np.float64) ** 2).sum()) if count else 1.0
    linked_above = 1 - NEAR_IDENTICAL * max(spread, LEAST_SPREAD)
    everyone = np.arange(count)
    cluster = everyone
    block = max(1, _PAIRS // max(1, count))
    for start in range(0, count, block):
        linked = unit[start : start + block] @ unit[start:].T > linked_above
        ones, others = np.nonzero(linked)
        ends = np.concatenate([others + start, cluster])
        starts = np.concatenate([ones + start, everyone])
        links = coo_array((np.ones(len(ends), np.bool_), (starts, ends)), shape=(count, count))
        # Clusters are numbered by a member, so that they can be linked on in the next block.
        numbers = connected_components(links, directed=False)[1]
        cluster = np.unique(numbers, return_index=True)[1][numbers]
    return cluster


def assign(
    ids: Sequence[str],
    clusters: Positions,
    shares: Mapping[Split, float],
    seed: int,
    assigned: Mapping[str, Split],
) -> dict[str, Split]:
    """Assign every query to a split.

    A query keeps the split of an earlier run, and its near-identical queries follow it. The rest
    go by the hash of their cluster's first id in alphabetical order.

    Args:
        ids: m query ids.
        clusters: Shape (m,), from `near_identical`.
        shares: What part of the queries each split gets; they add up to 1.
        seed: Seeds the hash.
        assigned: Splits of earlier runs by query id.
    """
    leader = _leaders(ids, clusters)
    followed: dict[int, Split] = {}
    for name, cluster in sorted(zip(ids, clusters.tolist(), strict=True)):
        if name in assigned:
            followed.setdefault(cluster, assigned[name])
    splits = list(shares)
    bounds = np.cumsum([shares[split] for split in splits])[:-1]
    drawn = np.searchsorted(bounds, unit_hash(leader.values(), seed), side="right")
    by_hash = {c: splits[i] for c, i in zip(leader, drawn.tolist(), strict=True)}
    return {
        name: assigned.get(name) or followed.get(cluster) or by_hash[cluster]
        for name, cluster in zip(ids, clusters.tolist(), strict=True)
    }


def deal(ids: Sequence[str], clusters: Positions, folds: int, seed: int) -> Positions:
    """Deal queries out to folds of about equal size; near-identical queries share one.

    Args:
        ids: m query ids.
        clusters: Shape (m,), from `near_identical`.
        folds: How many.
        seed: Seeds the hash of each cluster's first id, by which clusters are dealt in turn.

    Returns:
        Shape (m,), numbers from 0 to `folds` - 1.
    """
    leader = _leaders(ids, clusters)
    order = np.argsort(unit_hash(leader.values(), seed), kind="stable")
    numbers = np.array(list(leader), np.int64)
    fold = np.empty(int(numbers.max(initial=-1)) + 1, np.int64)
    fold[numbers[order]] = np.arange(len(order)) % folds
    return fold[clusters]


def _leaders(ids: Sequence[str], clusters: Positions) -> dict[int, str]:
    """Return each cluster's first id in alphabetical order."""
    leader: dict[int, str] = {}
    for name, cluster in sorted(zip(ids, clusters.tolist(), strict=True)):
        leader.setdefault(cluster, name)
    return leader


def hold_out(
    row_ids: Ids,
    groups: Positions,
    splits: Sequence[Split],
    seed: int,
    assigned: Mapping[str, Split],
) -> dict[Split, Positions]:
    """Choose rows that act as queries: a fifth of all for each split, at most `MOST_HELD_OUT`.

    Huge groups lower that number, so that `MOST_GROUP_JUDGMENTS` is kept. Rows held out in an
    earlier run are held out again. Every group keeps at least one row, so a group of a single row
    is never touched.

    Args:
        row_ids: Shape (n,).
        groups: Shape (n,), group codes; -1 for rows without a group.
        splits: Which splits need rows.
        seed: Seeds the hash.
        assigned: Splits of earlier runs, rows under `row_name`.

    Returns:
        Positions by split, ascending.
    """
    names = [row_name(row_id) for row_id in id_names(row_ids)]
    drawn = unit_hash(names, seed)
    before = {i: assigned[name] for i, name in enumerate(names) if name in assigned}
    fresh = np.ones(len(names), np.bool_)
    fresh[list(before)] = False
    order = np.lexsort((drawn, fresh, groups))
    eligible = groups >= 0
    eligible[order[np.flatnonzero(np.diff(groups[order], append=-2))]] = False
    fresh &= eligible
    held = {}
    for number, split in enumerate((Split.VALIDATION, Split.TEST)):
        if split not in splits:
            continue
        kept = [i for i, earlier in before.items() if earlier is split and eligible[i]]
        fifth = fresh & (drawn >= number * HELD_OUT) & (drawn < (number + 1) * HELD_OUT)
        added = np.flatnonzero(fifth)
        added = added[np.argsort(drawn[added])][: max(0, _most_held_out(groups) - len(kept))]
        held[split] = np.sort(np.concatenate([np.array(kept, np.int64), added]))
    return held


def _most_held_out(groups: Positions) -> int:
    sizes = np.bincount(groups[groups >= 0]).astype(np.float64)
    relevant = (sizes**2).sum() / max(1.0, sizes.sum())
    return min(MOST_HELD_OUT, int(MOST_GROUP_JUDGMENTS / max(1.0, relevant)))


def row_name(row_id: object) -> str:
    """Return the query id of a row that acts as a query."""
    return f"row:{row_id}"
