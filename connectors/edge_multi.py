"""The points of a Qdrant Edge shard that have several vectors under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simskip_vdb.connectors.edge_records import Records, value_at
from simskip_vdb.connectors.edge_rows import EdgeRows, plain
from simskip_vdb.connectors.edge_shard import engine_call
from simskip_vdb.connectors.multi_rows import Held, Point
from simskip_vdb.datatypes import Mask, Vectors


@dataclass(frozen=True, slots=True)
class EdgePoints:
    """The `Points` of a shard.

    Attributes:
        rows: Reads and writes them.
    """

    rows: EdgeRows

    def scroll(
        self, start: Point | None, limit: int, fields: Sequence[str]
    ) -> tuple[Sequence[Held], Point | None]:
        """Return points from an id on; see `Points.scroll`."""
        with engine_call(self.rows.uri, "reading points"):
            records, after = self.rows.following(start, limit, fields)
            return self._held(records, fields), after

    def read(self, points: Sequence[Point]) -> Sequence[Held]:
        """Return those of these points that are there; see `Points.read`."""
        guards = [self.rows.guard] if self.rows.guard else []
        with engine_call(self.rows.uri, "reading points"):
            return self._held(self.rows.records(points), guards)

    def write(self, before: Sequence[Held], new: Sequence[Vectors]) -> Mask:
        """Replace all vectors of points; see `Points.write`."""
        guard = self.rows.guard
        guards = None if guard is None else [point.fields[guard] for point in before]
        vectors = [each.tolist() for each in new]
        return self.rows.write([point.id for point in before], vectors, guards)

    def _held(self, records: Records, fields: Sequence[str]) -> list[Held]:
        name = self.rows.vector
        return [
            Held(
                plain(record.id),
                np.array(vectors, np.float32),
                {field: value_at(record.payload, field) for field in fields},
            )
            for record in records
            if (vectors := _vectors(record.vector, name))
        ]


def _vectors(found: object, name: str) -> object:
    """Return a point's vectors; None where it has none (the unnamed ones are a list)."""
    return found.get(name) if isinstance(found, dict) else found
