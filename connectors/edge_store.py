"""A Qdrant Edge shard in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.edge_filters import to_filter
from simskip_vdb.connectors.edge_multi import EdgePoints
from simskip_vdb.connectors.edge_records import search_params
from simskip_vdb.connectors.edge_rows import PAGE, EdgeRows
from simskip_vdb.connectors.edge_shard import engine_call, load_shard, read_config, settings_of
from simskip_vdb.connectors.multi_rows import KIND, MultiRows
from simskip_vdb.connectors.notes import read_note, write_note
from simskip_vdb.connectors.qdrant_points import (
    about,
    choose_vector,
    filter_text,
    label_of,
    own_note,
    parse_filter,
    to_ids,
    to_points,
)
from simskip_vdb.connectors.rows import (
    check_batch_size,
    checked_queries,
    checked_rows,
    fetched,
    no_partitions,
)
from simskip_vdb.datatypes import (
    ID_TEXT,
    Cursor,
    Ids,
    Mask,
    Metric,
    Neighbors,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
)
from simskip_vdb.durable import beside
from simskip_vdb.errors import ConfigError
from simskip_vdb.store import Allowed

_SCHEME = "qdrant-edge"
_QUERY_BLOCK = 64


class EdgeStore:
    """A `VectorStore` and `RowWritable` that is one vector of a Qdrant Edge shard.

    The engine runs in this process and lets one handle at a time hold a shard: `close` lets go.
    """

    def __init__(
        self,
        path: Path,
        vector: str | None = None,
        *,
        read_only: bool = False,
        filter: Mapping[str, Any] | None = None,  # noqa: A002 Qdrant's name for it
        guard_field: str | None = None,
    ) -> None:
        """Open a shard.

        Args:
            path: The shard's folder.
            vector: Name of the vector; empty for the unnamed one, None for the only one.
            read_only: Refuse every write.
            filter: Rows that count, as a filter of Qdrant's REST interface; None for all.
            guard_field: Payload field that the application changes on each of its writes; rows
                in which it changed while they were refined are left alone.

        Raises:
            StoreNotFoundError: There is no such folder.
            UnsupportedIndexError: It is no shard, or its vector cannot be refined.
            StoreError: The shard is damaged, or held open.
            ConfigError: There is no such vector, or the filter cannot be read.
        """
        self._path = path.resolve()
        self._vector = vector or ""
        self._read_only = read_only
        self._filter_text = filter_text(filter)
        self._filter = to_filter(filter, self._uri)
        self._guard = guard_field
        self._shard = load_shard(self._path, self._uri)
        self._owned = True
        try:
            self._choose(vector)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool,
        filter: str | None = None,  # noqa: A002 Qdrant's name for it
        guard_field: str | None = None,
    ) -> EdgeStore:
        """Open ``qdrant-edge:PATH?vector=NAME``; `filter` is what `parse_filter` takes."""
        place, options = parse_address(uri, ("vector", "filter"))
        return cls(
            Path(place),
            options.get("vector"),
            read_only=read_only,
            filter=parse_filter(filter or options.get("filter")),
            guard_field=guard_field,
        )

    def __enter__(self) -> EdgeStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the shard; after that, this store cannot be used."""
        if self._owned:
            self._owned = False
            with engine_call(self._uri, "closing"):
                self._shard.close()

    def info(self) -> StoreInfo:
        """Describe the vector as it is now; `count` is the rows that have it."""
        settings = self._settings
        with engine_call(self._uri, "describing the shard"):
            shard = self._shard.info()
        codes = f", {settings.quantization} quantisation" if settings.quantization else ""
        points = self._rows.count()
        return StoreInfo(
            uri=self._uri,
            kind=f"Qdrant Edge, {'HNSW' if settings.hnsw['m'] else 'no graph'}{codes}"
            + (f", {KIND}" if self._multi else ""),
            count=self._multi.count(points) if self._multi else points,
            dim=settings.dim,
            metric=settings.metric,
            exact=settings.exact,
            rounding=settings.rounding,
            payload=True,
            partial=self._filter is not None,
            state=self._state,
            claim=self._states,
            details={
                **settings.hnsw,
                **({"points": points} if self._multi else {}),
                "quantization": settings.quantization,
                "segments": shard.segments_count,
                "indexed_vectors": shard.indexed_vectors_count,
            },
        )

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row that has this vector, by ascending id; see `VectorStore.scan`.

        Args:
            batch_size: Most rows in a batch.
            fields: Payload fields, ``a.b`` for a field in a field; None where a row has none.
            cursor: The last id of a batch.
            partition: None.
        """
        check_batch_size(self._uri, batch_size)
        no_partitions(self._uri, partition)
        for field in fields:
            self._rows.refuse_unknown(field)
        if self._multi:
            return self._multi.scan(batch_size, list(fields), cursor)
        return self._rows.scan(batch_size, list(fields), self._rows.point(cursor))

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        return fetched(self._uri, self.peek, ids)

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there; see `RowWritable.peek`."""
        if self._multi:
            return self._multi.peek(ids)
        vectors = np.empty((len(ids), self._settings.dim), np.float32)
        there = np.zeros(len(ids), np.bool_)
        for start in range(0, len(ids), PAGE):
            at, now = self._rows.read(ids[start : start + PAGE])
            vectors[start + at] = now.vectors
            there[start + at] = True
        return VectorBatch(ids=ids[there], vectors=vectors[there])

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index; see `VectorStore.search`.

        Args:
            queries: Shape (q, d).
            k: Rows wanted for each query.
            params: ``hnsw_ef``, ``exact``, ``indexed_only``; and for quantised vectors ``ignore``
                (search without the codes), ``rescore``, ``oversampling``.
        """
        array = checked_queries(self._uri, queries, self._settings.dim, k)
        settings = search_params(params, self._uri)
        ids = np.zeros((len(array), k), ID_TEXT)
        scores = np.full((len(array), k), -np.inf, np.float32)
        for start in range(0, len(array), _QUERY_BLOCK):
            with engine_call(self._uri, "searching"):
                requests = [
                    edge.QueryRequest(
                        limit=k,
                        query=edge.Query.Nearest([query], using=self._vector)
                        if self._multi
                        else edge.Query.Nearest(query, using=self._vector),
                        filter=self._filter,
                        params=settings,
                    )
                    for query in array[start : start + _QUERY_BLOCK].tolist()
                ]
                answers = self._shard.query_batch(edge.QueryBatchRequest(requests))
                for row, hits in enumerate(answers, start):
                    ids[row, : len(hits)] = to_ids(hit.id for hit in hits)
                    scores[row, : len(hits)] = [hit.score for hit in hits]
        if self._settings.metric is Metric.EUCLID:  # the engine's is a distance
            scores = np.where(np.isneginf(scores), scores, -(scores**2))
        found = Neighbors(ids=ids, scores=scores)
        return self._multi.rank(array, found) if self._multi else found

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Overwrite vectors; see `RowWritable.update`."""
        self._writable()
        vectors = checked_rows(self._uri, batch, self._settings.dim)
        if self._multi:
            return self._multi.update(batch.ids, vectors, allowed)
        written = np.zeros(len(batch), np.bool_)
        for start in range(0, len(batch), PAGE):
            at, now = self._rows.read(batch.ids[start : start + PAGE])
            if len(now) == 0:
                continue
            chosen = np.flatnonzero(allowed(now))
            guards = None
            if self._guard is not None:
                guards = [now.fields[self._guard][row] for row in chosen.tolist()]
            rows = start + at[chosen]
            points = to_points(batch.ids[rows])
            written[rows] = self._rows.write(points, vectors[rows].tolist(), guards)
        return written

    def settle(self, progress: Progress) -> None:
        """Flush, build the index again, and flush; see `RowWritable.settle`."""
        self._writable()
        progress("index", 0, 1)
        with engine_call(self._uri, "building the index; is the disk full?"):
            self._shard.flush()
            self._shard.optimize()
            self._shard.flush()
        progress("index", 1, 1)

    def marker(self) -> Mapping[str, Any] | None:
        """Return the note of who refined this vector; see `Marked.marker`."""
        notes = read_note(self._marker) or {}
        return own_note(notes, self._vector, self._filter_text, self._uri)

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note beside the shard, one for each vector; see `Marked.mark`."""
        self._writable()
        whole = about(note, self._vector, self._filter_text)
        notes = {**(read_note(self._marker) or {}), self._label: whole}
        kept = {label: each for label, each in notes.items() if each is not None}
        write_note(self._marker, kept or None)

    def vector_beside(self, name: str, *, create: bool) -> EdgeStore:
        """Return the same rows with the vectors of that name; see `AddsVectors.vector_beside`.

        It uses this store's handle, and ends with it. A vector that is made has this one's
        dimension, distance and datatype, and the shard's own HNSW settings and quantisation.
        """
        if name not in self._vectors():
            if not create:
                raise ConfigError(f"{self._uri}: there is no vector '{name}'")
            self._writable()
            settings = self._settings
            with engine_call(self._uri, f"adding the vector '{name}'"):
                self._shard.update(
                    edge.UpdateOperation.create_dense_vector(
                        name,
                        settings.dim,
                        settings.distance,
                        multivector_config=settings.multi,
                        datatype=settings.datatype,
                    )
                )
                # A kill before this would leave a shard that cannot be loaded.
                self._shard.flush()
        beside = object.__new__(EdgeStore)
        beside.__dict__.update(self.__dict__)
        beside._owned = False
        beside._choose(name, beside=self._rows)
        if (beside._multi is None) != (self._multi is None):
            raise ConfigError(
                f"{self._uri}: of the vectors '{name}' and '{self._vector}', one is a multivector "
                "and the other is not; choose another name"
            )
        return beside

    def drop_vector_beside(self, name: str) -> None:
        """Remove the vectors of that name; see `AddsVectors.drop_vector_beside`."""
        self._writable()
        if name == self._vector:
            raise ConfigError(f"{self._uri}: '{name}' is this vector, not one beside it")
        if name not in self._vectors():
            return
        with engine_call(self._uri, f"removing the vector '{name}'"):
            self._shard.update(edge.UpdateOperation.delete_vector_name(name))
            self._shard.flush()

    @property
    def vector_name(self) -> str:
        """Name of the vector; empty for the unnamed one."""
        return self._vector

    @property
    def _uri(self) -> str:
        options = {"vector": self._vector, "filter": self._filter_text}
        return address_of(_SCHEME, str(self._path), options)

    @property
    def _label(self) -> str:
        return label_of(self._vector, self._filter_text)

    @property
    def _states(self) -> Path:
        return beside(self._path, ".simskip")

    @property
    def _state(self) -> Path:
        return self._states / self._label

    @property
    def _marker(self) -> Path:
        return self._states / "marker.json"

    def _choose(self, vector: str | None, *, beside: EdgeRows | None = None) -> None:
        config = read_config(self._path, self._uri)
        self._vector = choose_vector(config.get("vectors") or (), vector, self._uri)
        self._settings = settings_of(config, self._vector, self._uri)
        self._rows = EdgeRows(
            shard=self._shard,
            uri=self._uri,
            vector=self._vector,
            dim=self._settings.dim,
            filter=self._filter,
            guard=self._guard,
            gives=beside is not None,
        )
        self._multi = None
        if self._settings.multi is not None:
            self._multi = MultiRows(
                EdgePoints(self._rows),
                uri=self._uri,
                dim=self._settings.dim,
                metric=self._settings.metric,
                source=None if beside is None else EdgePoints(beside),
            )

    def _vectors(self) -> Iterable[str]:
        config = read_config(self._path, self._uri)
        return {*(config.get("vectors") or ()), *(config.get("sparse_vectors") or ())}

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")
