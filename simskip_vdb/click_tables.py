"""Logs of what was shown and clicked: CSV tables, and OpenSearch's User Behavior Insights."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.click_models import SATISFIED, Clicks
from simskip_vdb.datatypes import Vectors
from simskip_vdb.durable import json_of
from simskip_vdb.parsing import as_float32, json_record, lines_of, malformed, opened_parquet

CSV = (".csv", ".csv.gz")
"""Endings of tables."""
UBI = ("ubi_queries", "ubi_events")
"""What the names of UBI's two indexes begin with."""
_BLOCK = 1024
_COLUMNS = {
    "query": ("query", "query_id", "query-id", "qid", "id"),
    "vector": ("vector", "embedding"),
    "doc": ("doc", "doc_id", "doc-id", "document", "corpus-id", "object_id"),
    "position": ("position", "rank", "ordinal"),
    "click": ("click", "clicked", "clicks"),
    "shown": ("shown", "impressions", "views"),
    "dwell": ("dwell", "dwell_time", "dwell_seconds"),
}
_YES, _NO = ("1", "true", "yes"), ("", "0", "false", "no")
_CLICKS = ("click", "add_to_cart", "purchase", "conversion", "watch", "download")
_SHOWN = ("impression",)
AddQueries = Callable[[str, list[str], Vectors], None]
"""Takes a source, ids and vectors of queries."""


def is_ubi(path: Path) -> bool:
    """Tell whether a file is a dump of one of UBI's indexes."""
    return path.name.startswith(UBI)


class Tables:
    """Reads tables and UBI's dumps, and makes judgments of them.

    Args:
        known: Ids of queries whose vectors are given elsewhere.
        add_queries: Takes queries whose vectors are in the logs.
    """

    def __init__(self, known: frozenset[str], add_queries: AddQueries) -> None:
        self._known, self._add_queries = known, add_queries
        self._shown, self._clicked = Clicks(), Clicks()  # CSV with what was not clicked, without
        self._hits = Clicks()  # UBI's results; its events are counted beside them
        self._events = Clicks(beside=self._hits)
        self._searches = _Searches()

    def counted(self) -> Iterator[Clicks]:
        """Yield what was counted, by what it can be compared with."""
        self._hits.join(self._events)
        for clicks in (self._shown, self._clicked, self._hits):
            if clicks:
                yield clicks

    def read_csv(self, path: Path) -> None:
        """Read a CSV with a header: query or vector, doc, and position, click, shown, dwell.

        Raises:
            DataError: A column is missing, or a value is malformed.
        """
        lines = lines_of(path)
        head = next(lines, None)
        if head is None:
            return
        delimiter = max(",;\t", key=head.count)
        names = [name.strip().strip('"').lower() for name in head.split(delimiter)]
        at = {
            what: next((names.index(name) for name in spelt if name in names), None)
            for what, spelt in _COLUMNS.items()
        }
        if at["doc"] is None or (at["query"] is None and at["vector"] is None):
            malformed(path, 0, "a header must name the columns doc, and query or vector")
        into = self._clicked if at["click"] is None and at["shown"] is None else self._shown
        table = csv.reader(lines, delimiter=delimiter)
        number = 1
        while rows := list(islice(table, _BLOCK)):
            self._add_rows(path, number, rows, at, into)
            number += len(rows)

    def _add_rows(
        self, path: Path, number: int, rows: list[list[str]], at: Mapping[str, Any], into: Clicks
    ) -> None:
        seen, ids, vectors = [], [], []
        for line, row in enumerate(rows, number):
            if not row:
                continue
            try:
                cells = {what: row[i].strip() for what, i in at.items() if i is not None}
                vector = _numbers(cells["vector"]) if cells.get("vector") else None
                query = cells.get("query") or _name_of(vector)
                if vector is not None:
                    ids.append(query)
                    vectors.append(vector)
                if cells["doc"]:
                    seen.append((query, cells["doc"], *_counted(cells)))
            except (ValueError, IndexError) as error:
                malformed(path, line, str(error) if str(error) else "it has too few columns")
        if vectors:
            if len({len(vector) for vector in vectors}) > 1:
                malformed(path, number, "vectors of this line and others differ in length")
            self._add_queries(str(path), ids, as_float32(np.stack(vectors)))
        if seen:
            into.add(*map(list, zip(*seen, strict=True)))

    def read_ubi(self, path: Path) -> None:
        """Read a dump of ``ubi_queries`` or ``ubi_events``: JSON lines or Parquet.

        Queries are to be read first. What people typed, ``user_query``, is the query, unless its
        ``query_id`` is among the ids that are known.

        Raises:
            DataError: The file is malformed.
            MissingDependencyError: It is a Parquet file and pyarrow is not installed.
        """
        take = self._add_searches if path.name.startswith(UBI[0]) else self._add_events
        records = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
        while block := list(islice(records, _BLOCK)):
            take(path, block)

    def _add_searches(self, path: Path, records: list[Mapping[str, Any]]) -> None:
        ids, keys, vectors, named, shown = [], [], [], [], []
        for record in records:
            search = _text(record, "query_id")
            key = self._key(search, _text(record, "user_query"))
            if not key:
                continue
            vector = _at(record, "query_attributes.vector")
            if vector is not None:
                named.append(key)
                vectors.append(np.asarray(vector, np.float64))
            hits = _at(record, "query_response_hit_ids")
            hits = [] if hits is None else list(hits)
            ids.append(search)
            keys.append((key, bool(hits)))
            shown += [(key, str(hit), place, 1, 0) for place, hit in enumerate(hits, 1)]
        self._searches.add(ids, keys)
        if vectors:
            self._add_queries(str(path), named, as_float32(np.stack(vectors)))
        if shown:
            self._hits.add(*map(list, zip(*shown, strict=True)))

    def _add_events(self, _: Path, records: list[Mapping[str, Any]]) -> None:
        searches = [_text(record, "query_id") for record in records]
        found = self._searches.find(searches)
        seen = []
        for record, search, (key, listed) in zip(records, searches, found, strict=True):
            action = _text(record, "action_name").lower()
            doc = _text(record, "event_attributes.object.object_id")
            query = key or self._key(search, _text(record, "user_query"))
            clicked = any(word in action for word in _CLICKS)
            is_shown = not listed and any(word in action for word in _SHOWN)
            if not (doc and query and (clicked or is_shown)):
                continue
            dwell = _at(record, "event_attributes.dwell_time")
            satisfied = clicked and (dwell is None or float(dwell) >= SATISFIED)
            place = _at(record, "event_attributes.position.ordinal")
            place = -1 if place is None else int(place)
            seen.append((query, doc, place, int(is_shown), int(satisfied)))
        if seen:
            self._events.add(*map(list, zip(*seen, strict=True)))

    def _key(self, search: str, typed: str) -> str:
        return search if search in self._known or not typed else typed


class _Searches:
    """Which query each search was, by a hash of its id: 12 bytes a search."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, bool], int] = {}
        self._parts: list[tuple[NDArray[np.uint64], NDArray[np.int32]]] = []
        self._names: list[tuple[str, bool]] = []
        self._new = False

    def add(self, ids: list[str], keys: list[tuple[str, bool]]) -> None:
        codes = [self._codes.setdefault(key, len(self._codes)) for key in keys]
        self._parts.append((_hashes(ids), np.array(codes, np.int32)))
        self._new = True

    def find(self, ids: list[str]) -> list[tuple[str, bool]]:
        """Return query and whether its results are known, by search; empty where there is none."""
        if not self._parts:
            return [("", False)] * len(ids)
        if self._new:
            hashes, codes = (np.concatenate(part) for part in zip(*self._parts, strict=True))
            order = np.argsort(hashes, kind="stable")
            self._parts, self._new = [(hashes[order], codes[order])], False
            self._names = list(self._codes)
        hashes, codes = self._parts[0]
        wanted = _hashes(ids)
        places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        there = (hashes[places] == wanted).tolist()
        names = self._names
        return [
            names[code] if known else ("", False)
            for code, known in zip(codes[places].tolist(), there, strict=True)
        ]


def _hashes(ids: Iterable[str]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.uint64)


def _counted(cells: Mapping[str, str]) -> tuple[int, int, int]:
    """Return place, how often shown, and how often clicked to somebody's satisfaction."""
    place = _whole(cells["position"], "position") if cells.get("position") else -1
    given = cells.get("click")
    if given is None:
        clicks = 1
    else:
        low = given.lower()
        clicks = 1 if low in _YES else 0 if low in _NO else _whole(given, "click")
    shown = _whole(cells["shown"], "shown") if cells.get("shown") else max(1, clicks)
    dwell = float(cells["dwell"]) if cells.get("dwell") else SATISFIED
    return place, shown, clicks if dwell >= SATISFIED else 0


def _whole(text: str, what: str) -> int:
    number = float(text)
    if number < 0 or number % 1:
        raise ValueError(f"its {what} is {text!r}, not a whole number")
    return int(number)


def _numbers(text: str) -> NDArray[np.float64]:
    numbers = np.array(text.strip("[]() ").replace(",", " ").split(), np.float64)
    if not len(numbers):
        raise ValueError("its vector is not a list of numbers")
    return numbers


def _name_of(vector: NDArray[np.float64] | None) -> str:
    """Return an id for a query that has only a vector."""
    if vector is None:
        raise ValueError("it has neither query nor vector")
    return "vector-" + hashlib.sha256(as_float32(vector).tobytes()).hexdigest()[:16]


def _at(record: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 any JSON
    """Return what stands at a dotted path, nested, as JSON text, or flattened; None for nothing."""
    if path in record:
        return record[path]
    first, _, rest = path.partition(".")
    inner = record.get(first)
    if isinstance(inner, str) and rest:
        with suppress(ValueError):
            inner = json_of(inner)
    if not rest:
        return inner
    return _at(inner, rest) if isinstance(inner, Mapping) else None


def _text(record: Mapping[str, Any], path: str) -> str:
    value = _at(record, path)
    return "" if value is None else str(value).strip()


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines_of(path)):
        if line.strip():
            record = json_record(path, number, line)
            # Dumps of an index carry each document in an envelope.
            yield record["_source"] if isinstance(record.get("_source"), dict) else record


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    with opened_parquet(path, "dump of UBI's") as file:
        for batch in file.iter_batches(_BLOCK):
            yield from batch.to_pylist()
