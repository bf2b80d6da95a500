"""Reading the points of a collection as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qdrant_client import models

from simskip_vdb.connectors.qdrant_calls import Calls
from simskip_vdb.connectors.qdrant_layout import Layout
from simskip_vdb.connectors.qdrant_points import to_points
from simskip_vdb.connectors.qdrant_records import find_ids, json_path, take_rows, to_batch
from simskip_vdb.connectors.qdrant_scan import (
    END,
    Page,
    Point,
    read_pages,
    read_slices,
    start_of,
)
from simskip_vdb.datatypes import Cursor, Ids, VectorBatch
from simskip_vdb.errors import ConfigError

_POINTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads one vector of the points that pass a filter.

    Attributes:
        calls: The client.
        layout: The vector.
        collection: The collection, no alias.
        shard_key: The shard key that requests carry, if any.
        chosen: The filter, if any.
        streams: Threads that read; 1 reads on the caller's own.
        slices: Parts that are read side by side.
        fill: Read points without the vector, too, with NaN in its place.
    """

    calls: Calls
    layout: Layout
    collection: str
    shard_key: str | int | None
    chosen: models.Filter | None
    streams: int
    slices: int
    fill: bool

    @property
    def request(self) -> dict[str, Any]:
        """What every request carries."""
        request: dict[str, Any] = {"collection_name": self.collection}
        if self.shard_key is not None:
            request["shard_key_selector"] = self.shard_key
        return request

    def count(self) -> int:
        """Count the points that have the vector and pass the filter."""
        has_vector = models.HasVectorCondition(has_vector=self.layout.name)
        wanted = all_of(has_vector, self.chosen)
        return int(self.calls("count", count_filter=wanted, **self.request).count)

    def check_fields(self, fields: Sequence[str], indexed: frozenset[str]) -> None:
        """Refuse payload fields that no point has.

        Where strict mode refuses to filter by a field without an index, such a field may lack.

        Raises:
            ConfigError: No point has one of them.
        """
        strict = self.layout.strict.get("unindexed_filtering_retrieve") is False
        for field in fields:
            if strict and field not in indexed:
                continue
            empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=json_path(field)))
            page = self.page(1, models.Filter(must_not=[empty]), vectors=False)
            if not page.records and self.count():
                raise ConfigError(f"{self.calls.uri}: no row has the payload field '{field}'")

    def scan(
        self, size: int, fields: Sequence[str], cursor: Cursor | None
    ) -> Iterator[VectorBatch]:
        """Yield rows in the order of ids; a cursor is the id of the next point."""
        if cursor == END:
            return

        def scroll(start: Point | None, part: models.SliceCondition | None) -> Page:
            return self.page(size, all_of(self.chosen, part), start=start, fields=fields)

        if self.streams == 1:
            pages = read_pages(scroll, start_of(cursor))
        else:
            pages = read_slices(scroll, start_of(cursor), self.slices, size)
        layout = self.layout
        for records, after in pages:
            end = END if after is None else str(after)
            batch = to_batch(records, layout, fields, cursor=end)
            if len(batch):
                yield batch

    def rows(self, ids: Ids, fields: Sequence[str] = ()) -> VectorBatch:
        """Return those of these rows that are there, in the order asked."""
        layout = self.layout
        records = self.records(to_points(ids), fields)
        found = to_batch(records, layout, fields, fill=self.fill)
        place = find_ids(found.ids, ids)
        return take_rows(found, place[place >= 0])

    def records(self, points: Sequence[Point], fields: Sequence[str]) -> list[models.Record]:
        """Return those of these points that are there, in whatever order."""
        records: list[models.Record] = []
        size = self.layout.limit("max_query_limit", _POINTS)
        for start in range(0, len(points), size):
            some = points[start : start + size]
            if self.chosen is None:
                records += self.calls(
                    "retrieve",
                    ids=some,
                    with_payload=[json_path(field) for field in fields] or False,
                    with_vectors=[self.layout.name],
                    **self.request,
                )
            else:
                wanted = all_of(models.HasIdCondition(has_id=[*some]), self.chosen)
                records += self.page(len(some), wanted, fields=fields).records
        return records

    def page(
        self,
        size: int,
        chosen: models.Filter | None,
        *,
        start: Point | None = None,
        fields: Sequence[str] = (),
        vectors: bool = True,
    ) -> Page:
        """Return points that pass a filter, from an id on."""
        return Page(
            *self.calls(
                "scroll",
                scroll_filter=chosen,
                limit=size,
                offset=start,
                with_payload=[json_path(field) for field in fields] or False,
                with_vectors=[self.layout.name] if vectors else False,
                **self.request,
            )
        )


def all_of(*conditions: models.Condition | None) -> models.Filter | None:
    """Return a filter that is met where all of these are; None where there is none of them."""
    given = [condition for condition in conditions if condition is not None]
    return models.Filter(must=given) if given else None
