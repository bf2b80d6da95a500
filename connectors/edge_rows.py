"""The points of a Qdrant Edge shard that have one vector: paged, read by id, written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
import qdrant_edge as edge

from simskip_vdb.connectors.edge_filters import both, has_value, has_vector, unchanged
from simskip_vdb.connectors.edge_records import Records, fill, json_path, value_at
from simskip_vdb.connectors.edge_shard import engine_call
from simskip_vdb.connectors.qdrant_points import to_ids, to_points
from simskip_vdb.datatypes import Cursor, Ids, Mask, Positions, VectorBatch, Vectors
from simskip_vdb.errors import ConfigError, StoreError

Point = int | str
Given = list[float] | list[list[float]]
"""What a point is given: a vector, or several."""
PAGE = 256
"""Points in a request: larger answers are slower, for each vector is allocated by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRows:
    """Points of a shard with one of its vectors.

    Attributes:
        shard: The engine's handle.
        uri: The store's address for messages.
        vector: Name of the vector; empty for the unnamed one.
        dim: Its dimension.
        filter: Points that count; None for all.
        guard: Payload field on which a write depends; None for none.
        gives: Whether points without this vector are read by id, with NaN, and given one.
    """

    shard: edge.EdgeShard
    uri: str
    vector: str
    dim: int
    filter: edge.Filter | None
    guard: str | None
    gives: bool = False
    _having: edge.Filter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_having", both(has_vector(self.vector), self.filter))

    def count(self) -> int:
        """Count the rows that have this vector."""
        with engine_call(self.uri, "counting"):
            return self.shard.count(edge.CountRequest(filter=self._having, exact=True))

    def refuse_unknown(self, name: str) -> None:
        """Refuse a payload field that no row has and no index is built over.

        Raises:
            ConfigError: It is one, or no field's name.
        """
        path = json_path(name, self.uri)
        with engine_call(self.uri, "reading payloads"):
            if path in self.shard.info().payload_schema or not self._scroll(self._having, 1):
                return
            found = self._scroll(both(self._having, has_value(path)), 1)
        if not found:
            raise ConfigError(f"{self.uri}: no row has a value in the payload field '{name}'")

    def scan(
        self, batch_size: int, fields: Sequence[str], after: Point | None
    ) -> Iterator[VectorBatch]:
        """Yield the rows after an id, ascending; a cursor is the last id of a batch."""
        while True:
            vectors = np.empty((batch_size, self.dim), np.float32)
            ids: list[Ids] = []
            columns: dict[str, list[Any]] = {field: [] for field in fields}
            done, page = 0, True
            while page and done < batch_size:
                found, values = self.page(after, vectors[done:][:PAGE], fields)
                page = len(found) > 0
                if page:
                    ids.append(found)
                    for field in fields:
                        columns[field] += values[field]
                    after = to_points(found[-1:])[0]
                    done += len(found)
            if done:
                yield VectorBatch(
                    ids=np.concatenate(ids),
                    vectors=vectors[:done],
                    fields=columns,
                    cursor=str(after),
                )
            if done < batch_size:
                return

    def page(
        self, after: Point | None, into: Vectors, fields: Sequence[str]
    ) -> tuple[Ids, Mapping[str, list[Any]]]:
        """Read the rows after an id, whether or not there still is a row of that id.

        Args:
            after: The id; None for the first rows.
            into: Takes their vectors; its length is the most rows that are read.
            fields: Payload fields to bring along.

        Returns:
            Their ids, and the payload fields.
        """
        paths = [json_path(name, self.uri) for name in fields]
        limit = len(into)
        with engine_call(self.uri, "reading rows"):
            records = self._scroll(self._having, limit + (after is not None), after, paths)
            points = [record.id for record in records]
            skip = int(bool(points) and plain(points[0]) == after)
            records, points = records[skip : skip + limit], points[skip : skip + limit]
            fill(into, records, self.vector)
            columns = {name: [value_at(r.payload, name) for r in records] for name in fields}
        return to_ids(points), columns

    def read(self, ids: Ids) -> tuple[Positions, VectorBatch]:
        """Read those of at most a page of rows that are there.

        Returns:
            Their positions in `ids`, ascending; the rows, with the guard among their fields.
        """
        points = to_points(ids)
        guards = [self.guard] if self.guard else []
        with engine_call(self.uri, "reading rows"):
            where = {point: at for at, point in enumerate(points)}
            found = {where[plain(record.id)]: record for record in self.records(points)}
            at = sorted(found)
            kept = [found[position] for position in at]
            vectors = np.empty((len(kept), self.dim), np.float32)
            fill(vectors, kept, self.vector)
            fields = {name: [value_at(r.payload, name) for r in kept] for name in guards}
        return np.array(at, np.int64), VectorBatch(ids=ids[at], vectors=vectors, fields=fields)

    def write(
        self, points: Sequence[Point], vectors: Sequence[Given], guards: Sequence[Any] | None
    ) -> Mask:
        """Write at most a page of points.

        Args:
            points: Points that were there a moment ago.
            vectors: What each of them gets.
            guards: Values that the guard field must still have; None to write in any case.

        Returns:
            Which were sent, shape (len(points),): those that are still there.
        """
        sent = np.ones(len(points), np.bool_)
        while sent.any():
            chosen = np.flatnonzero(sent).tolist()
            condition = None
            if guards is not None:
                condition = self._condition({points[at]: guards[at] for at in chosen})
            # The engine takes in a vector by itself twice as fast as one with its name.
            new = [
                edge.PointVectors(
                    points[at], {self.vector: vectors[at]} if self.vector else vectors[at]
                )
                for at in chosen
            ]
            try:
                with engine_call(self.uri, "writing rows; is the disk full?"):
                    self.shard.update(edge.UpdateOperation.update_vectors(new, condition))
            except StoreError:
                # Where a point was removed meanwhile, the engine writes the others and fails.
                with engine_call(self.uri, "reading rows"):
                    present = {plain(record.id) for record in self.records(points)}
                there = sent & np.array([point in present for point in points])
                if (there == sent).all():
                    raise
                sent = there
            else:
                break
        return sent

    def records(self, points: Sequence[Point]) -> Records:
        """Return those of these points that are there, with the guard in their payload."""
        paths = [json_path(self.guard, self.uri)] if self.guard else []
        rows = self.filter if self.gives else self._having
        wanted = both(rows, edge.Filter(must=[edge.HasIdCondition(set(points))]))
        return self._scroll(wanted, len(points), None, paths)

    def following(
        self, start: Point | None, limit: int, fields: Sequence[str]
    ) -> tuple[Records, Point | None]:
        """Return points from an id on, and the id after them if there is any."""
        request = self._request(
            self._having, limit, start, [json_path(name, self.uri) for name in fields]
        )
        records, after = self.shard.scroll(request)
        return records, None if after is None else plain(after)

    def point(self, cursor: Cursor | None) -> Point | None:
        """Return the id that a cursor names.

        Raises:
            ConfigError: It names none.
        """
        if cursor is None:
            return None
        text = str(cursor)
        try:
            return int(text) if text.isdigit() else str(UUID(text))
        except ValueError:
            raise ConfigError(f"{self.uri}: cursor '{text}' is no point id") from None

    def _condition(self, guards: Mapping[Point, Any]) -> edge.Filter:
        for point, value in guards.items():
            if not isinstance(value, int | float | str | None):
                raise ConfigError(
                    f"{self.uri}: the guard field '{self.guard}' of row {point} is {value!r}; "
                    "name a field that holds one number, text or boolean"
                )
        return unchanged(json_path(self.guard or "", self.uri), guards)

    def _scroll(
        self,
        rows: edge.Filter,
        limit: int,
        start: Point | None = None,
        paths: Sequence[str] = (),
    ) -> Records:
        return self.shard.scroll(self._request(rows, limit, start, paths))[0]

    def _request(
        self, rows: edge.Filter, limit: int, start: Point | None, paths: Sequence[str]
    ) -> edge.ScrollRequest:
        return edge.ScrollRequest(
            offset=start,
            limit=limit,
            filter=rows,
            with_payload=list(paths) or False,
            with_vector=[self.vector],
        )


def plain(point: int | str | UUID) -> Point:
    """Return a point's id as it is written here."""
    return point if isinstance(point, int) else str(point)
