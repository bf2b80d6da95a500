"""A collection of a Qdrant server, or of the Python client's local mode."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qdrant_client import models

from simskip_vdb.connectors.notes import read_note, write_note
from simskip_vdb.connectors.qdrant_copy import (
    compare,
    copy_collection,
    create_vector,
    drop_copy,
    switch_alias,
)
from simskip_vdb.connectors.qdrant_layout import need_version, vectors_of
from simskip_vdb.connectors.qdrant_marker import (
    read_claim,
    read_metadata,
    refuse_older,
    write_claim,
    write_metadata,
)
from simskip_vdb.connectors.qdrant_open import open_address, state_of
from simskip_vdb.connectors.qdrant_points import about, own_note, parse_filter
from simskip_vdb.connectors.qdrant_rows import SLICES, QdrantRows
from simskip_vdb.datatypes import Progress
from simskip_vdb.errors import ConfigError
from simskip_vdb.store import Partition

_METADATA, _NEW_VECTOR = (1, 16), (1, 18)
_FEWEST_SLICES, _SLICE_ROWS = 4, 1_000_000


class QdrantStore(QdrantRows):
    """A `QdrantRows` that carries a note, takes more vectors a row, and can be copied."""

    _opened: tuple[str, str | Mapping[str, Any] | None, str | None] | None = None
    _claimed = ""

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool,
        filter: str | Mapping[str, Any] | None = None,  # noqa: A002 Qdrant's own word
        guard_field: str | None = None,
    ) -> QdrantStore:
        """Open ``qdrant://HOST:PORT/COLLECTION``, ``qdrant+https://…`` or ``qdrant-local:PATH``.

        Options after a question mark: ``vector``, ``batch_delay``, ``shard_key``; for a server
        ``grpc=true`` and ``grpc_port``; for local mode ``collection``. The API key comes from the
        environment variable ``QDRANT_API_KEY``.
        """
        target = open_address(uri)
        text = filter or target.filter
        try:
            store = cls(
                target.client,
                target.collection,
                target.vector,
                read_only=read_only,
                filter=parse_filter(text) if isinstance(text, str) else text,
                guard_field=guard_field,
                batch_delay=target.batch_delay,
                shard_key=target.shard_key,
            )
            store._opened = None if store._local else (uri, filter, guard_field)
            return store
        except BaseException:
            target.client.close()
            raise

    def partitions(self) -> tuple[Partition, ...]:
        """Return slices of the points by a hash of their ids; see `Partitioned.partitions`.

        Raises:
            ConfigError: It is no server, or one older than 1.19.
        """
        if self._opened is None:
            raise ConfigError(
                f"{self._uri}: only a server that was opened by its address can be shared out"
            )
        need_version(self._version, SLICES, "slices, which workers share out,", self._uri)
        total = _FEWEST_SLICES
        while total * _SLICE_ROWS < self.info().count:
            total *= 2
        return tuple(
            Partition(
                name=f"slice {index} of {total}",
                open=partial(open_slice, *self._opened, index=index, total=total),
            )
            for index in range(total)
        )

    def reopen(self) -> None:
        """Do nothing: a server shows what others wrote; see `Partitioned.reopen`."""

    def marker(self) -> Mapping[str, Any] | None:
        """Return the note of who refined this vector; see `Marked.marker`."""
        if self._version >= _METADATA:
            notes = read_metadata(self._calls, self._collection)
            return own_note(notes, self._layout.name, self._filter_text, self._uri)
        return read_note(self._marker)

    def claimed(self) -> Mapping[str, Any] | None:
        """Return who writes this collection; see `Claimable.claimed`."""
        if not self._keeps_claims:
            return None
        return read_claim(self._calls, self._claimed or self._collection)

    def claim(self, note: Mapping[str, Any] | None) -> None:
        """Say who writes this collection; see `Claimable.claim`. Before 1.16 there is no room."""
        self._writable()
        if self._keeps_claims:
            # The alias may lead elsewhere when the claim is dropped.
            write_claim(self._calls, self._claimed or self._collection, note)
            self._claimed = "" if note is None else self._claimed or self._collection

    @property
    def _keeps_claims(self) -> bool:
        # A folder of local mode is open to one process at a time.
        return self._version >= _METADATA and not self._local

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note; see `Marked.mark`.

        It lives in the collection's metadata, in its folder in local mode, or in the state folder
        where the server is older than 1.16. Two vectors of a collection have a note each.
        """
        self._writable()
        if self._version >= _METADATA:
            whole = about(note, self._layout.name, self._filter_text)
            write_metadata(self._calls, self._collection, self._label, whole)
        else:
            write_note(self._marker, note)

    @property
    def vector_name(self) -> str:
        """Name of the vector; empty for the unnamed one."""
        return self._layout.name

    @property
    def collection(self) -> str:
        """Name of the collection, whatever alias it was opened by."""
        return self._collection

    def vector_beside(self, name: str, *, create: bool) -> QdrantStore:
        """Return the same rows with the vectors of that name; see `AddsVectors.vector_beside`."""
        vectors = vectors_of(self._describe())
        own = self._layout.params
        if name not in vectors:
            if not create:
                raise ConfigError(f"{self._uri}: there is no vector '{name}'")
            self._writable()
            need_version(self._version, _NEW_VECTOR, "adding a vector", self._uri)
            refuse_older(self._calls)
            create_vector(self._calls, self._collection, name, own)
        elif _space(vectors[name]) != _space(own):
            raise ConfigError(
                f"{self._uri}: the vector '{name}' has other dimensions or another distance, or "
                "another number of vectors a point; choose another name"
            )
        beside = self._sibling(self._collection, name, fill=True)
        if self._multi:
            beside._multi = beside._make_multi(source=self._points())
        return beside

    def drop_vector_beside(self, name: str) -> None:
        """Remove the vectors of that name; see `AddsVectors.drop_vector_beside`.

        Raises:
            ConfigError: It is the vector that this store is about.
        """
        self._writable()
        if name == self._layout.name:
            raise ConfigError(f"{self._uri}: '{name}' is this store's own vector; it stays")
        if name in vectors_of(self._describe()):
            need_version(self._version, _NEW_VECTOR, "removing a vector", self._uri)
            name_it = {"collection_name": self._collection, "vector_name": name}
            self._calls("delete_vector_name", **name_it)

    def copy(self, name: str, progress: Progress) -> QdrantStore:
        """Copy the collection; see `Copied.copy`.

        All of it is copied, whatever filter this store has. An application that goes on writing to
        the collection must write to the copy, too.

        Raises:
            ConfigError: The name is taken, or the server is older than 1.16.
            UnsupportedIndexError: The collection is sharded by keys of its own.
            VerificationError: The copy is not what the collection holds.
        """
        self._writable()
        need_version(self._version, _METADATA, "copying a collection", self._uri)
        refuse_older(self._calls)
        copy_collection(self._calls, self._collection, name, self._layout, progress)
        return self._sibling(name, self._layout.name, fill=False)

    def compare(self, name: str, progress: Progress) -> None:
        """Compare a copy with this collection, but for this vector; see `Copied.compare`."""
        compare(self._calls, self._collection, name, self._layout, progress)

    def other(self, name: str) -> QdrantStore:
        """Return the same vector of another collection, opened the same way."""
        return self._sibling(name, self._layout.name, fill=False)

    def switch(self, name: str) -> None:
        """Let the alias lead to a collection; see `Copied.switch`.

        This store stays with the collection that it was opened with.
        """
        self._writable()
        self.check_alias()
        switch_alias(self._calls, self._opened_as, name)

    def check_alias(self) -> None:
        """Make sure that there is an alias to switch; see `Copied.check_alias`."""
        if self._opened_as == self._collection:
            raise ConfigError(
                f"{self._uri}: '{self._collection}' is the collection's own name; open the store "
                "by the alias that your application uses, and that can lead elsewhere"
            )

    def drop_copy(self, name: str) -> None:
        """Remove a collection that `copy` made; see `Copied.drop_copy`.

        Raises:
            ConfigError: `copy` did not make it, or an alias leads to it.
        """
        self._writable()
        drop_copy(self._calls, self._collection, name)

    @property
    def _marker(self) -> Path:
        folder = state_of(self._client, self._opened_as, self._label)
        assert folder is not None  # only servers are too old to hold a note, and those have one
        return folder / "marker.json"

    def _sibling(self, collection: str, vector: str, *, fill: bool) -> QdrantStore:
        """Return a store of another vector or collection, opened the same way."""
        store = QdrantStore(
            self._client,
            collection,
            vector,
            read_only=self._read_only,
            filter=self._filter,
            guard_field=self._guard_field,
            batch_delay=self._delay,
            shard_key=self._shard_key,
            streams=self._streams,
            retries=self._retries,
        )
        store._before_writing = store._make_reader(fill=fill)
        return store


class QdrantSlice(QdrantStore):
    """A slice of a server's points, which a worker reads and writes."""

    def settle(self, progress: Progress) -> None:
        """Do nothing: optimisers are waited for when all slices are written."""

    def _take(self, index: int, total: int) -> QdrantSlice:
        self._slice = models.SliceCondition(slice=models.Slice(total=total, index=index))
        self._reader = self._before_writing = self._make_reader(fill=False)
        self._multi = self._make_multi() if self._layout.multi else None
        return self


def open_slice(
    uri: str,
    filter: str | Mapping[str, Any] | None,  # noqa: A002 Qdrant's own word
    guard_field: str | None,
    *,
    index: int,
    total: int,
) -> QdrantSlice:
    """Open one of `total` slices of what an address leads to."""
    store = QdrantSlice.open(uri, read_only=False, filter=filter, guard_field=guard_field)
    assert isinstance(store, QdrantSlice)
    return store._take(index, total)


def _space(params: models.VectorParams) -> tuple[object, ...]:
    return params.size, params.distance, params.multivector_config
