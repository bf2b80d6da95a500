"""The points of a Qdrant collection as rows that are read, searched and written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError
from qdrant_client import QdrantClient, models

from simskip_vdb.connectors.multi_rows import MOST, MultiRows
from simskip_vdb.connectors.qdrant_calls import Calls, Retries
from simskip_vdb.connectors.qdrant_layout import (
    ANY_VERSION,
    details_of,
    kind_of,
    layout_of,
    need_version,
    parse_version,
)
from simskip_vdb.connectors.qdrant_multi import ClientPoints
from simskip_vdb.connectors.qdrant_open import (
    is_local,
    state_of,
    uri_of,
)
from simskip_vdb.connectors.qdrant_points import filter_text, label_of
from simskip_vdb.connectors.qdrant_read import Reader, all_of
from simskip_vdb.connectors.qdrant_search import parse_params, to_neighbors
from simskip_vdb.connectors.qdrant_update import Writer
from simskip_vdb.connectors.rows import (
    check_batch_size,
    checked_queries,
    checked_rows,
    fetched,
    no_partitions,
)
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Mask,
    Neighbors,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
)
from simskip_vdb.errors import (
    ConfigError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
)
from simskip_vdb.store import Allowed

_QUERIES = 64
_STREAMS = 4
_FIRST_ATTEMPTS = 3
_SETTLE_SECONDS = 12 * 3600
_POLL_SECONDS = 2.0
_GUARD, SLICES = (1, 16), (1, 19)


class QdrantRows:
    """One vector of the points of a Qdrant collection: a `VectorStore` that is `RowWritable`.

    Opened by an alias, it stays with the collection that the alias led to then.
    """

    def __init__(
        self,
        client: QdrantClient,
        collection: str,
        vector: str | None = None,
        *,
        read_only: bool = False,
        filter: Mapping[str, Any] | models.Filter | None = None,  # noqa: A002 Qdrant's own word
        guard_field: str | None = None,
        batch_delay: float = 0.0,
        shard_key: str | int | None = None,
        streams: int | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Look at a collection.

        Args:
            client: Any client; one of local mode must not be used by two threads at a time.
            collection: Its name, or an alias.
            vector: Name of the vector; empty for the unnamed one. May be left out where there is
                only one.
            read_only: Refuse every write through this handle.
            filter: Only points that pass are rows: Qdrant's filter, as its model or as JSON.
            guard_field: Payload field that changes with each write of the application; a row is
                written only while it holds the value that it was read with.
            batch_delay: Seconds to wait after each request that writes.
            shard_key: With custom sharding, the shard key of all rows.
            streams: Requests at a time; 4 for a server, 1 in local mode, unless given.
            retries: How long failing calls are tried again.

        Raises:
            StoreNotFoundError: There is no such collection.
            ConfigError: The vector, the filter or an option makes no sense.
            UnsupportedIndexError: The vector cannot be refined.
            StoreError: The server does not answer, or refuses.
        """
        self._local = is_local(client)
        self._slice: models.SliceCondition | None = None
        self._client = client
        self._read_only, self._guard_field = read_only, guard_field
        self._delay, self._shard_key = batch_delay, shard_key
        self._streams = streams or (1 if self._local else _STREAMS)
        self._retries = retries or Retries()
        self._opened_as = collection
        self._calls = Calls(client, uri_of(client, collection, vector or ""), self._retries)
        self._filter = _parse(filter, self._calls.uri)
        chosen = self._filter
        self._filter_text = filter_text(
            None if chosen is None else chosen.model_dump(mode="json", exclude_none=True)
        )
        version = "" if self._local else self._first_contact()
        self._version_text = version
        self._version = parse_version(version) if version else ANY_VERSION
        self._collection = self._resolve(collection)
        self._layout = layout_of(self._describe(), vector, self._calls.uri)
        self._uri = uri_of(client, collection, self._layout.name, self._filter_text)
        self._calls.uri = self._uri
        self._reader = self._make_reader(fill=False)
        self._before_writing = self._reader
        self._multi = self._make_multi() if self._layout.multi else None
        if guard_field is not None:
            need_version(self._version, _GUARD, "a guard field", self._uri)

    def close(self) -> None:
        """Close the client, and so let go of a local folder."""
        self._client.close()

    def info(self) -> StoreInfo:
        """Describe the vector as it is now; only points that have it count."""
        found, layout = self._describe(), self._layout
        points = self._reader.count()
        state = state_of(self._client, self._opened_as, self._label)
        return StoreInfo(
            uri=self._uri,
            kind=kind_of(layout, found, local=self._local),
            count=self._multi.count(points) if self._multi else points,
            dim=layout.dim,
            metric=layout.metric,
            exact=layout.exact,
            rounding=layout.rounding,
            payload=True,
            partial=self._filter is not None,
            state=state,
            claim=None if state is None else state.parent,
            details=details_of(layout, found, self._version_text),
        )

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in the order of ids, numbers first; see `VectorStore.scan`.

        Fields may be dotted paths into the payload; a row that lacks one has None.
        """
        check_batch_size(self._uri, batch_size)
        no_partitions(self._uri, partition)
        if fields:
            self._reader.check_fields(fields, frozenset(self._describe().payload_schema))
        if self._multi:
            return self._multi.scan(batch_size, fields, cursor)
        return self._reader.scan(batch_size, fields, cursor)

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        return fetched(self._uri, self.peek, ids)

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index; see `VectorStore.search`.

        Args:
            queries: Shape (q, d).
            k: Rows wanted for each query.
            params: ``hnsw_ef``, ``exact``, ``indexed_only``, ``acorn``, ``quantization`` or its
                ``ignore``, ``rescore``, ``oversampling``. Local mode is always exact.
        """
        layout = self._layout
        array = checked_queries(self._uri, queries, layout.dim, k)
        settings = parse_params(params, layout, k, self._uri)
        size = layout.limit("search_max_batchsize", _QUERIES)
        answers: list[models.QueryResponse] = []
        for start in range(0, len(array), size):
            requests = [
                models.QueryRequest(
                    query=[query] if self._multi else query,
                    using=layout.name or None,
                    filter=self._filter,
                    params=None if self._local else settings,
                    limit=k,
                    shard_key=self._shard_key,
                )
                for query in array[start : start + size].tolist()
            ]
            name = self._collection
            answers += self._calls("query_batch_points", collection_name=name, requests=requests)
        found = to_neighbors(answers, k, layout.metric)
        return self._multi.rank(array, found) if self._multi else found

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        if self._multi:
            return self._multi.peek(np.asarray(ids))
        return self._reader.rows(np.asarray(ids))

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Overwrite the vectors of rows; see `RowWritable.update`.

        Without a guard field, what an application writes in the moment between reading a row and
        writing it is overwritten.
        """
        self._writable()
        vectors = checked_rows(self._uri, batch, self._layout.dim)
        if self._multi:
            return self._multi.update(np.asarray(batch.ids), vectors, allowed)
        guard = (self._guard_field,) if self._guard_field else ()
        writer = Writer(
            calls=self._calls,
            layout=self._layout,
            read=lambda ids: self._before_writing.rows(ids, guard),
            request=self._reader.request,
            guard_field=self._guard_field,
            delay=self._delay,
            streams=self._streams,
        )
        return writer.write(np.asarray(batch.ids), vectors, allowed)

    def settle(self, progress: Progress) -> None:
        """Wait until the optimisers are done; see `RowWritable.settle`.

        Raises:
            StoreError: The optimisers failed.
            TransientStoreError: They were not done within 12 hours.
        """
        if self._local:
            return
        end = time.monotonic() + _SETTLE_SECONDS
        quiet = 0
        while quiet < 2:  # a write may be answered a moment before an optimiser takes notice
            found = self._describe()
            if found.status is models.CollectionStatus.RED:
                details = details_of(self._layout, found, self._version_text)
                raise StoreError(f"{self._uri}: optimising failed: {details['optimizer_status']}")
            busy = found.status is models.CollectionStatus.YELLOW
            busy = busy or bool(found.update_queue and found.update_queue.length)
            quiet = 0 if busy else quiet + 1
            progress("index", found.indexed_vectors_count or 0, found.points_count or 0)
            if time.monotonic() > end:
                raise TransientStoreError(
                    f"{self._uri}: still optimising after {_SETTLE_SECONDS // 3600} hours; all "
                    "rows are written; the same command goes on waiting"
                )
            self._retries.sleep(_POLL_SECONDS)

    @property
    def _label(self) -> str:
        return label_of(self._layout.name, self._filter_text)

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")
        if self._layout.sharded and self._shard_key is None:
            raise ConfigError(
                f"{self._uri}: the collection is sharded by keys of its own; name the one whose "
                "rows are meant with shard_key=KEY"
            )

    def _make_reader(self, *, fill: bool) -> Reader:
        return Reader(
            calls=self._calls,
            layout=self._layout,
            collection=self._collection,
            shard_key=self._shard_key,
            chosen=all_of(self._filter, self._slice) if self._slice else self._filter,
            streams=self._streams,
            slices=self._streams if self._version >= SLICES and self._slice is None else 1,
            fill=fill,
        )

    def _make_multi(self, source: ClientPoints | None = None) -> MultiRows:
        """Return the rows of a multivector; `source` is what `vector_beside` stands beside."""
        layout = self._layout
        return MultiRows(
            self._points(),
            uri=self._uri,
            dim=layout.dim,
            metric=layout.metric,
            most=layout.limit("max_query_limit", layout.limit("upsert_max_batchsize", MOST)),
            source=source,
        )

    def _points(self) -> ClientPoints:
        return ClientPoints(reader=self._reader, guard_field=self._guard_field, delay=self._delay)

    def _describe(self) -> models.CollectionInfo:
        found: models.CollectionInfo = self._calls(
            "get_collection", collection_name=self._collection
        )
        return found

    def _first_contact(self) -> str:
        """Return the server's version; a wrong address shows within seconds."""
        attempts = min(_FIRST_ATTEMPTS, self._retries.attempts)
        calls = Calls(self._client, self._calls.uri, replace(self._retries, attempts=attempts))
        return str(calls("info").version)

    def _aliases(self) -> list[models.AliasDescription]:
        try:
            return list(self._calls("get_aliases").aliases)
        except TransientStoreError:
            raise
        except StoreError:  # an API key for one collection may not see them
            return []

    def _resolve(self, name: str) -> str:
        """Return the collection behind a name or an alias."""
        aliases = self._aliases()
        led = {alias.alias_name: alias.collection_name for alias in aliases}
        found: str = led.get(name, name)
        if not self._calls("collection_exists", collection_name=found):
            known = [c.name for c in self._calls("get_collections").collections]
            shown = ", ".join(sorted({*known, *(alias.alias_name for alias in aliases)}))
            raise StoreNotFoundError(
                f"{self._calls.uri}: there is no collection '{name}'; there are: {shown or 'none'}"
            )
        return found


def _parse(given: Mapping[str, Any] | models.Filter | None, uri: str) -> models.Filter | None:
    if given is None or isinstance(given, models.Filter):
        return given
    try:
        return models.Filter.model_validate(given)
    except ValidationError as error:
        shown = json.dumps(given, default=str)
        raise ConfigError(
            f"{uri}: not a Qdrant filter: {error.errors()[0]['msg']}; got {shown}"
        ) from None
