"""Place judgments, documents and labels, all given by external ids, on rows by position."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, JudgedQueries, Mask, Positions, Vectors, find_ids, id_names
from simskip_vdb.errors import DataError
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.own_rows import RowSource, apart_from_own
from simskip_vdb.parsing import Qrels, RowColumn
from simskip_vdb.rows import usable_vectors
from simskip_vdb.splits import MOST_GROUP_JUDGMENTS

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,19}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that was skipped.

    Attributes:
        source: The option or file that it came from.
        what: In a person's words, such as ``judgments of unknown documents``.
        count: How many.
        examples: Up to three of them.
    """

    source: str
    what: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {self.count} {self.what}{self.such}"

    @property
    def such(self) -> str:
        """The examples as they end a sentence; empty where there are none."""
        return f", such as {', '.join(self.examples)}" if self.examples else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**asdict(self), "examples": list(self.examples)}


class Notes:
    """Collects what is skipped."""

    def __init__(self) -> None:
        self.all: list[Note] = []

    def add(self, source: str, what: str, names: Sequence[str] | Ids, skipped: Mask) -> None:
        """Note the names where `skipped` (shape (len(names),)) is true, if there are any."""
        places = np.flatnonzero(skipped).tolist()
        if places:
            chosen = [names[i] for i in places]
            shown = id_names(np.array(chosen)) if isinstance(names, np.ndarray) else chosen
            examples = tuple(dict.fromkeys(shown))[:3]
            self.all.append(Note(source=source, what=what, count=len(places), examples=examples))

    def count(self, source: str, what: str, count: int) -> None:
        """Note how many were skipped, if any."""
        if count:
            self.all.append(Note(source=source, what=what, count=count, examples=()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where the rows stand that judgments and labels name.

    Attributes:
        dim: Dimension of a vector.
        documents: Position by document id, -1 for documents without a row; empty without
            queries.
        codes: Group code by label.
        groups: Shape (n,), group codes, -1 for rows without a label; None without labels.
    """

    dim: int
    documents: Mapping[str, int]
    codes: Mapping[str, int]
    groups: Positions | None

    def without(self, positions: Positions) -> Places:
        """Leave rows out of their groups."""
        if self.groups is None:
            return self
        groups = self.groups.copy()
        groups[positions] = -1
        return replace(self, groups=groups)


def find_places(judgments: Judgments, rows: RowSource, notes: Notes) -> Places:
    """Find the rows that documents and labels belong to.

    Raises:
        DataError: Index ids repeat, values do not fit the rows, or a document has several rows.
    """
    codes: dict[str, int] = {}
    groups = None
    if judgments.labels is not None:
        codes = {label: i for i, label in enumerate(dict.fromkeys(judgments.labels.values))}
        groups = _groups(judgments.labels, codes, rows.ids, notes)
    named = any((judgments.queries, judgments.dev, judgments.test))
    documents = _documents(judgments.doc_ids, rows.ids, notes) if named else {}
    return Places(dim=rows.dim, documents=documents, codes=codes, groups=groups)


def judge(given: QuerySet, places: Places, rows: RowSource, notes: Notes) -> JudgedQueries:
    """Return the queries of a set that can be used, with their judgments.

    Raises:
        DataError: The dimension is not the index's, a pair has two grades, or no query is usable.
    """
    if given.vectors.shape[1] != places.dim:
        raise DataError(
            f"{given.option}: vectors have {given.vectors.shape[1]} dimensions and the index has "
            f"{places.dim}; embed the queries with the model that embedded the rows"
        )
    if given.qrels is not None:
        judged = _judge_by_qrels(given, given.qrels, places, notes)
    else:
        codes = _look_up(places.codes, given.labels or ())
        judged = group_queries(given.ids, given.vectors, codes, places)
    judged, own, itself = apart_from_own(judged, places.documents, rows)
    what = "queries are rows of the index; a query's own row is no result of it"
    notes.add(given.option, what, given.ids, own)
    what = "queries judged for their own row, which says nothing"
    if given.qrels is not None:
        notes.add(given.option, what, given.ids, itself)
    usable = usable_vectors(given.vectors)
    owners = judged.query_of_judgment()[judged.grades > 0]
    relevant = np.bincount(owners, minlength=len(judged)) > 0
    finite = np.isfinite(given.vectors).all(axis=1)
    plain: Mask = np.asarray(finite & given.vectors.any(axis=1))
    notes.add(given.option, "queries with NaN, infinite or zero vectors", given.ids, ~plain)
    absurd = plain & ~usable
    notes.add(given.option, "queries with absurdly long or short vectors", given.ids, absurd)
    lacking = usable & ~relevant
    notes.add(given.option, "queries without a relevant known document", given.ids, lacking)
    if not (usable & relevant).any():
        found = "; ".join(map(str, notes.all)) or "there are none"
        raise DataError(
            f"{given.option}: no query can be used: {found}; check that query ids, document ids "
            "and judgments belong together"
        )
    return judged.subset(usable & relevant)


def group_queries(
    ids: tuple[str, ...], vectors: Vectors, codes: Positions, places: Places
) -> JudgedQueries:
    """Return queries whose relevant rows are those of their group.

    Args:
        ids: m query ids.
        vectors: Shape (m, d).
        codes: Shape (m,), the queries' group codes; -1 has no rows.
        places: Holds the rows' groups.

    Raises:
        DataError: Groups are too large for so many queries.
    """
    groups = np.empty(0, np.int64) if places.groups is None else places.groups
    members = np.argsort(groups, kind="stable")[np.count_nonzero(groups < 0) :]
    sizes = np.bincount(groups[groups >= 0], minlength=len(places.codes) + 1)  # last for code -1
    counts = sizes[codes]
    if counts.sum() > 2 * MOST_GROUP_JUDGMENTS:
        raise DataError(
            f"labels make {counts.sum()} relevant rows over {len(ids)} queries, more than "
            f"{2 * MOST_GROUP_JUDGMENTS}; give fewer queries or finer labels"
        )
    indptr = offsets(counts)
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts)
    rows = members[np.repeat(offsets(sizes)[codes], counts) + within]
    grades = np.ones(len(rows), np.int32)
    return JudgedQueries(ids=ids, vectors=vectors, indptr=indptr, rows=rows, grades=grades)


def offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where parts of these sizes begin, and where the last ends, shape (m + 1,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _judge_by_qrels(given: QuerySet, qrels: Qrels, places: Places, notes: Notes) -> JudgedQueries:
    owners = find_ids({name: i for i, name in enumerate(given.ids)}, qrels.query_ids)
    rows = find_ids(places.documents, qrels.doc_ids)
    notes.add(qrels.source, "judgments of unknown queries", qrels.query_ids, owners < 0)
    unknown = (owners >= 0) & (rows < 0)
    notes.add(qrels.source, "judgments of unknown documents", qrels.doc_ids, unknown)
    known = np.flatnonzero((owners >= 0) & (rows >= 0))
    known = known[np.lexsort((rows[known], owners[known]))]
    owners, rows, grades = owners[known], rows[known], qrels.grades[known]
    again = np.zeros(len(known), np.bool_)
    again[1:] = (np.diff(owners) == 0) & (np.diff(rows) == 0)
    conflicts = np.flatnonzero(again[1:] & (np.diff(grades) != 0))
    if len(conflicts):
        one, other = known[conflicts[0]], known[conflicts[0] + 1]
        raise DataError(
            f"{qrels.source}: query {qrels.query_ids[one]!r} and document {qrels.doc_ids[one]!r} "
            f"are judged {qrels.grades[one]} and {qrels.grades[other]}; keep one grade for a pair"
        )
    notes.count(qrels.source, "repeated judgments", qrels.repeated + int(again.sum()))
    return JudgedQueries(
        ids=given.ids,
        vectors=given.vectors,
        indptr=offsets(np.bincount(owners[~again], minlength=len(given.ids))),
        rows=rows[~again],
        grades=grades[~again],
    )


def _groups(column: RowColumn, codes: Mapping[str, int], ids: Ids, notes: Notes) -> Positions:
    positions = _positions(column, ids, notes)
    groups: Positions = np.full(len(ids), -1)
    groups[positions[positions >= 0]] = _look_up(codes, column.values)[positions >= 0]
    notes.add(column.source, "rows without a label", ids, groups < 0)
    return groups


def _documents(column: RowColumn | None, ids: Ids, notes: Notes) -> dict[str, int]:
    if column is None:
        column = RowColumn(source="the index", values=id_names(ids), row_ids=ids)
    positions = _positions(column, ids, notes)
    documents = dict(zip(column.values, positions.tolist(), strict=True))
    if len(documents) < len(positions):
        raise DataError(
            f"{column.source}: document id {_first_repeated(column.values)!r} stands for more "
            "than one row, and judgments need one row a document. Give groups instead "
            "(--group-field or --labels), or write a refiner that was fitted elsewhere "
            "(--refiner DIR --accept-unmeasured)"
        )
    return documents


def _positions(column: RowColumn, ids: Ids, notes: Notes) -> Positions:
    """Return where each value's row stands, -1 where there is no such row."""
    names = id_names(ids)
    where = dict(zip(names, range(len(names)), strict=True))
    if len(where) < len(names):
        raise DataError(
            f"index id {_first_repeated(names)} belongs to several rows; judgments and labels "
            "need ids that tell rows apart"
        )
    if column.row_ids is not None:
        wanted = id_names(column.row_ids)
        found = find_ids(where, wanted)
        if ids.dtype.kind != "S":
            _check_integers(column.source, wanted, found)
        notes.add(column.source, "index ids that no row has", wanted, found < 0)
        return found
    if len(column.values) != len(ids):
        raise DataError(
            f"{column.source} has {len(column.values)} values for {len(ids)} rows; give one a "
            "row, or lines index_id<TAB>value"
        )
    numbers = _numbers(ids)
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], np.arange(len(ids))):
        raise DataError(
            f"{column.source} gives values in order, but index ids are not exactly 0 to "
            f"{len(ids) - 1}; give lines index_id<TAB>value"
        )
    return order


def _check_integers(source: str, names: Sequence[str], found: Positions) -> None:
    """Refuse what can be no id of an index that has integers, `found` (shape (len(names),)) < 0."""
    for at in np.flatnonzero(found < 0).tolist():
        if not _INTEGER.fullmatch(names[at]) or not -(2**63) <= int(names[at]) < 2**64:
            raise DataError(
                f"{source}, line {at + 1}: index id {names[at]!r} is not an integer in range, and "
                "this index has integers; correct or remove the line"
            )


def _numbers(ids: Ids) -> NDArray[np.float64]:
    """Return ids as numbers, -1 where they are other text."""
    if ids.dtype.kind != "S":
        return ids.astype(np.float64)
    numeric = np.char.isdigit(ids)
    return np.where(numeric, np.where(numeric, ids, b"0").astype(np.float64), -1)


def _first_repeated(values: Iterable[object]) -> object:
    return Counter(values).most_common(1)[0][0]


def _look_up(where: Mapping[str, int], names: Sequence[str]) -> Positions:
    return np.fromiter(map(where.get, names, repeat(-1)), np.int64, len(names))
