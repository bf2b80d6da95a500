"""Share judged queries out to fit, validation and test, on the rows of an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import JudgedQueries, Positions, Split, id_names
from simskip_vdb.errors import DataError
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.own_rows import RowSource
from simskip_vdb.placing import (
    Note,
    Notes,
    Places,
    find_places,
    group_queries,
    judge,
    offsets,
)
from simskip_vdb.rows import usable_vectors
from simskip_vdb.splits import assign, hold_out, near_identical, row_name

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resolved:
    """Judgments tied to the rows of an index and shared out to splits.

    Attributes:
        queries: The queries of every split; all three are there, possibly empty.
        groups: Shape (n,), int64 group codes, -1 for rows without a label; None without groups.
        held: Rows that act as queries of a split, positions; only where groups have no queries.
            They are no results of that split's queries, and test's are none of validation's.
        held_out: Shape (n,); the rows of `held`.
        validation_drawn: Whether validation queries were drawn from those that are shared out, so
            that they may be learnt from once the choice is made.
        assigned: The split of every query, with those of earlier runs; to be kept for later runs.
        shared: Whether all queries came as one set, shared out by hash.
        notes: What was skipped.
    """

    queries: Mapping[Split, JudgedQueries]
    groups: Positions | None
    held: Mapping[Split, Positions]
    held_out: Mask
    validation_drawn: bool
    assigned: Mapping[str, Split]
    shared: bool = False
    notes: tuple[Note, ...] = ()


def resolve(
    judgments: Judgments, rows: RowSource, *, seed: int, assigned: Mapping[str, Split]
) -> Resolved:
    """Tie judgments to the rows of an index and share queries out to fit, validation and test.

    Sets given explicitly are one split each. The rest is split by a seeded hash of the query id,
    about 60/20/20, or 75/25 over the two splits that are left, or all to fit; near-identical
    queries stay together. With labels and without queries for a split, held-out rows act as its
    queries.

    Args:
        judgments: What people gave; empty judgments resolve to empty splits.
        rows: The rows of the index in scan order.
        seed: Seeds the hash.
        assigned: Splits of earlier runs by query id; they are kept.

    Raises:
        DataError: The judgments break one of `simskip_vdb.judgments.RULES`.
        MissingDependencyError: scipy is not installed.
    """
    if len(rows.ids) < 2:
        raise DataError(f"the index has {len(rows.ids)} rows; at least 2 are needed to compare")
    notes = Notes()
    draw = _Draw(seed, assigned)
    places = find_places(judgments, rows, notes)
    held = _hold_out(judgments, rows, places, draw)
    explicit = {
        split: judge(given, places.without(_no_results(held, split)), rows, notes)
        for split, given in _explicit_sets(judgments).items()
    }
    _check_explicit(explicit, assigned)
    parts = {split: [judged] for split, judged in explicit.items()}
    for split, positions in held.items():
        left = places.without(_no_results(held, split))
        parts[split] = [_rows_as_queries(positions, rows, places, left)]
    if judgments.queries is not None:
        shared = judge(judgments.queries, places, rows, notes)
        for split, judged in _share_out(shared, explicit, draw, notes).items():
            parts.setdefault(split, []).append(judged)
    queries = {split: concatenate(parts.get(split, []), rows.dim) for split in Split}
    now = {name: split for split, judged in queries.items() for name in judged.ids}
    return Resolved(
        queries=queries,
        groups=places.groups,
        held=held,
        held_out=np.isin(np.arange(len(rows.ids)), _together(held.values())),
        validation_drawn=judgments.queries is not None and judgments.dev is None,
        assigned={**assigned, **now},
        shared=judgments.queries is not None and not explicit,
        notes=tuple(notes.all),
    )


class _Draw(NamedTuple):
    seed: int
    assigned: Mapping[str, Split]


def _no_results(held: Mapping[Split, Positions], split: Split) -> Positions:
    """Return rows that cannot be results of a split's queries."""
    # A refiner is chosen without the test rows, and tested when validation rows are fitted too.
    return _together(held[other] for other in held if other in (Split.TEST, split))


def _together(parts: Iterable[Positions]) -> Positions:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _explicit_sets(judgments: Judgments) -> dict[Split, QuerySet]:
    sets = {Split.VALIDATION: judgments.dev, Split.TEST: judgments.test}
    return {split: given for split, given in sets.items() if given is not None}


def _hold_out(
    judgments: Judgments, rows: RowSource, places: Places, draw: _Draw
) -> dict[Split, Positions]:
    if places.groups is None or judgments.queries is not None:
        return {}
    given = _explicit_sets(judgments)
    missing = [split for split in (Split.VALIDATION, Split.TEST) if split not in given]
    held = hold_out(rows.ids, places.groups, missing, *draw)
    return {split: chosen[usable_vectors(rows.take(chosen))] for split, chosen in held.items()}


def _rows_as_queries(
    positions: Positions, rows: RowSource, places: Places, left: Places
) -> JudgedQueries:
    ids = tuple(row_name(row_id) for row_id in id_names(rows.ids[positions]))
    codes = np.empty(0, np.int64) if places.groups is None else places.groups[positions]
    return replace(group_queries(ids, rows.take(positions), codes, left), own=positions)


def _check_explicit(explicit: Mapping[Split, JudgedQueries], assigned: Mapping[str, Split]) -> None:
    for split, judged in explicit.items():
        moved = [name for name in judged.ids if assigned.get(name, split) is not split]
        if moved:
            raise DataError(
                f"{len(moved)} queries given for {split.value} belonged to another split in an "
                f"earlier run, such as {moved[0]!r}; give other queries, or another --state"
            )
    _check_disjoint(explicit.get(Split.VALIDATION), explicit.get(Split.TEST))


def _check_disjoint(one: JudgedQueries | None, other: JudgedQueries | None) -> None:
    both = sorted(set(one.ids) & set(other.ids)) if one and other else []
    if both:
        raise DataError(
            f"{len(both)} queries are in two sets, such as {both[0]!r}; a query can serve one "
            "split only"
        )


def _share_out(
    shared: JudgedQueries,
    explicit: Mapping[Split, JudgedQueries],
    draw: _Draw,
    notes: Notes,
) -> dict[Split, JudgedQueries]:
    for judged in explicit.values():
        _check_disjoint(shared, judged)
    vectors = np.concatenate([shared.vectors, *(judged.vectors for judged in explicit.values())])
    clusters = near_identical(vectors)
    copies = np.isin(clusters[: len(shared)], clusters[len(shared) :])
    what = "queries near-identical to one given for validation or test"
    notes.add("--queries", what, shared.ids, copies)
    left, clusters = shared.subset(~copies), clusters[: len(shared)][~copies]
    splits = assign(left.ids, clusters, _shares(explicit), draw.seed, draw.assigned)
    return {
        split: left.subset(np.array([splits[name] is split for name in left.ids], np.bool_))
        for split in Split
    }


def _shares(explicit: Mapping[Split, JudgedQueries]) -> dict[Split, float]:
    """Return the split ratio of the queries that are not given for one split."""
    if not explicit:
        return {Split.FIT: 0.6, Split.VALIDATION: 0.2, Split.TEST: 0.2}
    left = [split for split in (Split.VALIDATION, Split.TEST) if split not in explicit]
    return {Split.FIT: 0.75, left[0]: 0.25} if left else {Split.FIT: 1.0}


def concatenate(parts: Sequence[JudgedQueries], dim: int) -> JudgedQueries:
    """Join queries and their judgments; `dim` is the vectors', for no parts at all."""
    counts = [np.diff(part.indptr) for part in parts]
    return JudgedQueries(
        ids=tuple(name for part in parts for name in part.ids),
        vectors=np.concatenate([np.empty((0, dim), np.float32), *(p.vectors for p in parts)]),
        indptr=offsets(np.concatenate([np.empty(0, np.int64), *counts])),
        rows=np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)]),
        grades=np.concatenate([np.empty(0, np.int32), *(part.grades for part in parts)]),
        own=_own(parts),
    )


def _own(parts: Sequence[JudgedQueries]) -> Positions | None:
    if all(part.own is None for part in parts):
        return None
    return np.concatenate([np.full(len(p), -1) if p.own is None else p.own for p in parts])
