"""Click logs: a folder where files land, and what they say about queries and documents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.click_logs import WITH_VECTORS, list_logs, read_log
from simskip_vdb.click_tables import CSV, Tables, is_ubi
from simskip_vdb.datatypes import Vectors
from simskip_vdb.errors import DataError
from simskip_vdb.judgments import JudgmentFiles, Judgments, QuerySet, read_judgments
from simskip_vdb.parsing import Judged, Qrels, read_qrels

log = logging.getLogger(__name__)

SAME = 1e-3
"""Relative L2 distance within which two vectors are one: float16, other hardware, other batches."""
_BLOCK = 1024


def gather(
    files: JudgmentFiles,
    clicks: Path | None,
    *,
    doc_id_field: str | None = None,
    group_field: str | None = None,
) -> Judgments:
    """Read judgments from files and from a folder of click logs, as one.

    Args:
        files: The files; queries among them may have all their judgments in the folder.
        clicks: The folder; None for none.
        doc_id_field: Payload field that holds each row's document id.
        group_field: Payload field that holds each row's group.

    Raises:
        ConfigError: A file or the folder is missing, or options do not belong together.
        DataError: A file is malformed, or one query id has several vectors.
        MissingDependencyError: A parquet file was given and pyarrow is not installed.
    """
    given = read_judgments(
        files, doc_id_field=doc_id_field, group_field=group_field, more=clicks is not None
    )
    if clicks is None:
        return given
    known = frozenset() if given.queries is None else frozenset(given.queries.ids)
    return combine(given, read_clicks(clicks, known))


def read_clicks(folder: Path, known: frozenset[str] = frozenset()) -> QuerySet | None:
    """Read every click log in a folder, in the order of names; None where there is none.

    ``.jsonl`` (also ``.gz``) and ``.parquet`` have columns ``id`` and ``vector``, and for what was
    clicked ``doc`` or a list ``docs``, with a ``grade`` (1 where it is left out): one line a click,
    so that an id comes often. ``.tsv`` and ``.qrels`` (also ``.gz``) are judgments of queries
    whose vectors are in other files. Hidden files, folders, ``.tmp`` and ``.part`` are passed over,
    so that a log can be written under such a name and then be moved into place; empty logs are no
    clicks.

    ``.csv`` (also ``.gz``) are tables with a header, ``ubi_queries*`` and ``ubi_events*`` (JSON
    lines or ``.parquet``) are dumps of OpenSearch's User Behavior Insights: see `click_tables` for
    what they hold, and `click_models` for how places and stays are allowed for.

    One id is one query: its vector may differ from file to file by rounding only. Of repeated
    clicks the highest grade counts, once. Clicks are evidence, not votes: a document that stood
    first is clicked more often for having stood there, and a query that many people ask should
    weigh in fitting and testing as it does in judgments, as one query.

    The memory that is needed grows with different queries and pairs, not with clicks.

    Args:
        folder: The folder, or one log.
        known: Ids of queries whose vectors are given elsewhere.

    Raises:
        ConfigError: There is no such folder.
        DataError: A file is malformed, which it names with the line, or an id has two vectors.
        MissingDependencyError: A parquet file was given and pyarrow is not installed.
    """
    queries, pairs = _Queries(), _Pairs()
    tables = Tables(known, queries.add)
    logs, unknown = list_logs(folder)
    if unknown:
        log.warning(
            "%s: %d files are no click logs and are not read, such as %s; remove them, or name "
            "them .jsonl, .parquet, .csv, .tsv or .qrels",
            folder,
            len(unknown),
            unknown[0].name,
        )
    for path in logs:
        if is_ubi(path):
            tables.read_ubi(path)
        elif path.name.endswith(CSV):
            tables.read_csv(path)
        elif path.name.endswith(WITH_VECTORS):
            for block in read_log(path):
                queries.add(str(path), block.ids, block.vectors)
                pairs.add([block.ids[i] for i in block.owners], block.docs, block.grades)
        elif path.stat().st_size:
            qrels = read_qrels(path)
            pairs.add(qrels.query_ids, qrels.doc_ids, qrels.grades)
    for clicks in tables.counted():
        found = clicks.qrels(str(folder))
        pairs.add(found.query_ids, found.doc_ids, found.grades)
    if not queries.ids and not pairs:
        return None
    return QuerySet(
        option=f"judgments {folder}",
        ids=tuple(queries.ids),
        vectors=queries.vectors,
        qrels=replace(pairs.qrels(str(folder)), repeated=0),  # clicks are meant to repeat
    )


def combine(given: Judgments, clicks: QuerySet | None) -> Judgments:
    """Return judgments in which queries from files and from clicks are one set to be shared out.

    An id that both have is one query, with the vector of the file, and must have the same vector
    in both. Of a pair that both judge the higher grade counts. Clicks of queries that were given
    for validation or test are left out: those serve that split alone.

    Args:
        given: From files; its queries to be shared out have judgments, or none yet.
        clicks: From `read_clicks`.

    Raises:
        DataError: An id has two vectors, vectors have several dimensions, or all that clicks
            judge are queries without a vector.
    """
    ours = given.queries
    if clicks is None:
        waiting = ours is not None and ours.qrels is None and ours.labels is None
        return replace(given, queries=None) if waiting else given
    if ours is None and not clicks.ids:
        raise DataError(
            f"{clicks.option}: there are judgments and no vectors of queries; add a .jsonl or "
            ".parquet file with columns id and vector, or give queries"
        )
    explicit = {name for part in (given.dev, given.test) if part is not None for name in part.ids}
    clicks = _without(clicks, explicit)
    queries = _Queries()
    for part in (ours, clicks):
        if part is not None and part.ids:
            queries.add(part.option, part.ids, part.vectors)
    if not queries.ids:
        return replace(given, queries=None)
    joined = QuerySet(
        option=clicks.option if ours is None else f"{ours.option} and {clicks.option}",
        ids=tuple(queries.ids),
        vectors=queries.vectors,
        qrels=_joined(None if ours is None else ours.qrels, clicks.qrels),
    )
    return replace(given, queries=joined)


def _without(clicks: QuerySet, explicit: set[str]) -> QuerySet:
    """Leave queries out that are given for one split."""
    kept = [i for i, name in enumerate(clicks.ids) if name not in explicit]
    qrels = clicks.qrels
    if qrels is not None:
        left = [i for i, name in enumerate(qrels.query_ids) if name not in explicit]
        qrels = replace(
            qrels,
            query_ids=[qrels.query_ids[i] for i in left],
            doc_ids=[qrels.doc_ids[i] for i in left],
            grades=qrels.grades[left],
        )
    if len(kept) < len(clicks.ids):
        log.info("%s: %d queries have a split", clicks.option, len(clicks.ids) - len(kept))
    ids = tuple(clicks.ids[i] for i in kept)
    return replace(clicks, ids=ids, vectors=clicks.vectors[kept], qrels=qrels)


def _joined(ours: Qrels | None, clicked: Qrels | None) -> Qrels | None:
    if ours is None or clicked is None:
        return ours or clicked
    grade_of = dict(
        zip(zip(clicked.query_ids, clicked.doc_ids, strict=True), clicked.grades, strict=True)
    )
    # Two grades that the file itself gives a pair stay two, and are refused as ever.
    pairs = list(zip(ours.query_ids, ours.doc_ids, strict=True))
    higher = [
        max(own, grade_of.get(pair, own)) for pair, own in zip(pairs, ours.grades, strict=True)
    ]
    for pair in pairs:
        grade_of.pop(pair, None)
    return Qrels(
        source=f"{ours.source} and {clicked.source}",
        query_ids=ours.query_ids + [query for query, _ in grade_of],
        doc_ids=ours.doc_ids + [doc for _, doc in grade_of],
        grades=np.array([*higher, *grade_of.values()], np.int32),
    )


class _Queries:
    """Different queries by id, each with the vector that came first."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._codes: dict[str, int] = {}
        self._sources: list[str] = []
        self._vectors: Vectors = np.empty((0, 0), np.float32)

    @property
    def vectors(self) -> Vectors:
        """Shape (m, d)."""
        return self._vectors[: len(self.ids)]

    def add(self, source: str, ids: Sequence[str], vectors: Vectors) -> None:
        """Add queries, shape (m, d), some of which may be there."""
        known = len(self.ids)
        if known and vectors.shape[1] != self._vectors.shape[1]:
            raise DataError(
                f"{source}: vectors have {vectors.shape[1]} dimensions, and those in "
                f"{self._sources[0]} have {self._vectors.shape[1]}; embed all queries with the "
                "model that embedded the rows"
            )
        codes = np.array([self._codes.setdefault(i, len(self._codes)) for i in ids], np.int64)
        new, first = np.unique(codes, return_index=True)
        new, first = new[new >= known], first[new >= known]
        self.ids += [ids[i] for i in first]
        self._sources += [source] * len(new)
        self._make_room(len(self.ids), vectors.shape[1])
        self._vectors[new] = vectors[first]
        for start in range(0, len(ids), _BLOCK):
            part = slice(start, start + _BLOCK)
            other = np.flatnonzero(~_same(self._vectors[codes[part]], vectors[part]))
            if len(other):
                i = start + int(other[0])
                raise DataError(
                    f"query {ids[i]!r} has one vector in {self._sources[codes[i]]} and another in "
                    f"{source}; give every query an id of its own, and where the model changed, "
                    "take the old logs away"
                )

    def _make_room(self, count: int, dim: int) -> None:
        if count > len(self._vectors):
            room = np.empty((max(count, 2 * len(self._vectors)), dim), np.float32)
            room[: len(self._vectors)] = self._vectors.reshape(-1, dim)
            self._vectors = room


def _same(ones: Vectors, others: Vectors) -> NDArray[np.bool_]:
    """Tell which vectors are the same but for rounding, shape (m,)."""
    same: NDArray[np.bool_] = ((ones == others) | (np.isnan(ones) & np.isnan(others))).all(axis=1)
    rest = np.flatnonzero(~same)
    wide = ones[rest].astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart, norms = np.linalg.norm(wide - others[rest], axis=1), np.linalg.norm(wide, axis=1)
    same[rest] = np.isfinite(norms) & (apart <= SAME * norms)
    return same


class _Pairs(Judged):
    """Judged pairs, each with its highest grade, queries and then documents as they came first."""

    @staticmethod
    def merged(together: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keep the highest grade of each pair; see `Judged.merged`."""
        owners, places, grades = together
        together = together[:, np.lexsort((-grades, places, owners))]
        again = (np.diff(together[0]) == 0) & (np.diff(together[1]) == 0)
        return together[:, np.concatenate([[True], ~again])[: together.shape[1]]]
