"""A collection of Chroma."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import chromadb
import numpy as np
import platformdirs
from chromadb.errors import ChromaError, NotFoundError

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.folders import nothing_at
from simskip_vdb.connectors.live_rows import LiveRows, places, plain_filter
from simskip_vdb.connectors.notes import read_note, write_note
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Metric,
    Neighbors,
    StoreInfo,
    VectorBatch,
    Vectors,
    id_names,
    id_text,
)
from simskip_vdb.durable import beside, json_of
from simskip_vdb.errors import (
    ConfigError,
    DataError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    UnsupportedIndexError,
    listed,
)
from simskip_vdb.store import Allowed

_SCHEME, _HTTP = "chroma", "chroma+http"
_METRICS = {"l2": Metric.EUCLID, "cosine": Metric.COSINE, "ip": Metric.DOT}
_FILE = "chroma.sqlite3"
_NOTES = "simskip"
_DOCUMENT = "document"
_SAMPLED = 1000
_ROUNDING = 1e-5
_SPACE = "hnsw:space"


class ChromaStore(LiveRows):
    """A `RowStore` of one collection.

    Chroma has no transactions: rows are read again right before a page of them is written, and
    what an application writes in between is overwritten.
    """

    def __init__(
        self,
        client: Any,  # noqa: ANN401 a client of chromadb
        collection: str | None,
        *,
        uri: str,
        state: Path,
        read_only: bool = False,
        filter: str | None = None,  # noqa: A002 Chroma's word is where
        guard_field: str | None = None,
    ) -> None:
        """Open a collection.

        Args:
            client: Of chromadb.
            collection: Its name; None for the only one.
            uri: Address of the client, for messages.
            state: Folder of the states of its collections.
            read_only: Refuse every write.
            filter: ``FIELD=VALUE``, or Chroma's ``where`` as JSON; None for all rows.
            guard_field: A metadata field that the application changes on each of its writes.

        Raises:
            StoreNotFoundError: There is no such collection.
            ConfigError: There are several, or the filter is wrong.
            UnsupportedIndexError: It cannot be refined.
        """
        self._uri, self._read_only, self._guard = uri, read_only, guard_field
        self._close = weakref.finalize(self, client.close)
        self._filter, self._vector = filter, ""
        self._where = _where(filter, uri)
        with self._errors("looking for the collection"):
            names = sorted(each.name for each in client.list_collections())
            if collection is None and len(names) > 1:
                raise ConfigError(
                    f"{uri}: say in the address which collection is meant: {listed(names)}"
                )
            if not names or collection not in (None, *names):
                raise StoreNotFoundError(
                    f"{uri}: there is no collection '{collection or ''}'; there are: "
                    f"{listed(names)}"
                )
            self._name = collection or names[0]
            self._collection = client.get_collection(self._name, embedding_function=None)
            config = self._collection.configuration_json
            first = self._collection.get(limit=1, include=["embeddings"])["embeddings"]
        if first is None or not len(first):
            raise UnsupportedIndexError(f"{uri}: the collection '{self._name}' holds no embeddings")
        self._dim = len(first[0])
        space = ((config.get("hnsw") or config.get("spann") or {}).get("space")) or "l2"
        self._metric = _METRICS[space]
        self._place = state / quote(self._name, safe="")
        self._uri = self._address(uri)
        with self._errors("trying the filter"):
            self._collection.get(limit=1, where=self._where, include=[])

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        read_only: bool,
        filter: str | None = None,  # noqa: A002 Chroma's word is where
        guard_field: str | None = None,
    ) -> ChromaStore:
        """Open ``chroma:FOLDER?collection=NAME`` or ``chroma+http://HOST:PORT/NAME``."""
        place, told = parse_address(uri, ("collection", "filter"))
        name, condition = told.get("collection"), filter or told.get("filter")
        if uri.startswith(f"{_HTTP}:"):
            parts = urlsplit(place)
            name = unquote(parts.path.strip("/")) or name
            host = f"{parts.hostname or 'localhost'}:{parts.port or 8000}"
            where, client = f"{_HTTP}://{host}", _connected(host)
            state = platformdirs.user_state_path("simskip-vdb") / _SCHEME / quote(host, "")
        else:
            folder = Path(place).resolve()
            where = address_of(_SCHEME, str(folder), {})
            client, state = _opened(folder, where), beside(folder, ".simskip")
        return cls(
            client,
            name,
            uri=where,
            state=state,
            read_only=read_only,
            filter=condition,
            guard_field=guard_field,
        )

    def __enter__(self) -> ChromaStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the client; clients of the same folder that others have stay open."""
        self._close()

    def info(self) -> StoreInfo:
        """Describe the collection."""
        with self._errors("counting rows"):
            count = self._collection.count() if self._where is None else len(self._all_ids())
        return StoreInfo(
            uri=self._uri,
            kind="Chroma, HNSW",
            count=count,
            dim=self._dim,
            metric=self._metric,
            exact=self._metric is not Metric.COSINE,  # whose lengths Chroma takes off and puts on
            rounding=_ROUNDING,
            payload=True,
            partial=self._where is not None,
            state=self._place / self._label,
            claim=self._place,
            details={"collection": self._name},
        )

    @cached_property
    def names(self) -> Sequence[str]:  # type: ignore[override] # looked at when it is asked for
        """Fields of the first rows, and the document."""
        with self._errors("looking at metadata"):
            found = self._collection.get(limit=_SAMPLED, include=["metadatas"])["metadatas"] or []
        return [*dict.fromkeys(name for row in found for name in row or {}), _DOCUMENT]

    def _all_ids(self) -> Ids:
        with self._errors("reading ids"):
            names = self._collection.get(where=self._where, include=[])["ids"]
        return np.sort(id_text([name.encode() for name in names]))

    def _pages(
        self, batch_size: int, fields: Sequence[str], cursor: Cursor | None
    ) -> Iterator[VectorBatch]:
        """Yield rows by ascending id: all ids first, since Chroma's own order is not stable."""
        ids = self._all_ids()
        if cursor is not None:
            ids = ids[np.searchsorted(ids, str(cursor).encode(), side="right") :]
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            batch = replace(self._rows_of(some, fields), cursor=some[-1].decode())
            if len(batch):
                yield batch

    def _read(self, ids: Ids) -> VectorBatch:
        return self._rows_of(ids, [] if self._guard is None else [self._guard])

    def _rows_of(self, ids: Ids, fields: Sequence[str]) -> VectorBatch:
        include = ["embeddings", *(["documents"] if _DOCUMENT in fields else [])]
        include += ["metadatas"] if set(fields) - {_DOCUMENT} else []
        with self._errors("reading rows"):
            found = self._collection.get(ids=id_names(ids), where=self._where, include=include)
        names = id_text([name.encode() for name in found["ids"]])
        order = np.argsort(places(names, ids), kind="stable")
        vectors = np.asarray(found["embeddings"], np.float32).reshape(len(names), -1)
        if len(names) and vectors.shape[1] != self._dim:
            raise DataError(f"{self._uri}: rows have {vectors.shape[1]} numbers, not {self._dim}")
        return VectorBatch(
            ids=names[order],
            vectors=vectors.reshape(len(names), self._dim)[order],
            fields={name: [_field(found, row, name) for row in order.tolist()] for name in fields},
        )

    def _write(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Ids:
        now = self._read(ids)
        chosen = now.ids[allowed(now)] if len(now) else now.ids
        if len(chosen):
            new = vectors[places(chosen, ids)]
            with self._errors("writing rows"):
                self._collection.update(ids=id_names(chosen), embeddings=new)
        return chosen

    def _nearest(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        if params:
            raise ConfigError(
                f"{self._uri}: Chroma takes no search parameters with a query, not {sorted(params)}"
            )
        ids = np.full((len(queries), k), b"", object)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        with self._errors("searching"):
            found = self._collection.query(
                query_embeddings=queries, n_results=k, where=self._where, include=["distances"]
            )
        for at, (names, distances) in enumerate(zip(found["ids"], found["distances"], strict=True)):
            ids[at, : len(names)] = [name.encode() for name in names]
            near = np.asarray(distances, np.float32)
            scores[at, : len(names)] = -near if self._metric is Metric.EUCLID else 1 - near
        return Neighbors(ids=id_text(ids.ravel().tolist()).reshape(ids.shape), scores=scores)

    def _notes(self) -> dict[str, dict[str, Any]]:
        with self._errors("reading who wrote"):
            metadata = self._refreshed().metadata or {}
        if _SPACE in metadata:
            return read_note(self._note_file) or {}
        return dict(json_of(metadata.get(_NOTES, "{}")))

    def _keep_note(self, key: str, note: Mapping[str, Any] | None) -> None:
        notes = {name: kept for name, kept in self._notes().items() if name != key}
        if note is not None:
            notes[key] = dict(note)
        metadata = dict(self._collection.metadata or {})
        if _SPACE in metadata:  # all metadata is written anew, and this key may not be
            write_note(self._note_file, notes or None)
            return
        with self._errors("noting who writes"):
            self._collection.modify(metadata={**metadata, _NOTES: json.dumps(notes)})

    @property
    def _note_file(self) -> Path:
        return self._place / "notes.json"

    def _refreshed(self) -> Any:  # noqa: ANN401 a collection of chromadb
        client = self._collection._client
        fresh = client.get_collection(name=self._name)
        self._collection._model = getattr(fresh, "_model", fresh)
        return self._collection

    def _address(self, uri: str) -> str:
        if uri.startswith(f"{_HTTP}:"):
            own = f"{uri}/{quote(self._name, safe='')}"
            return own if self._filter is None else f"{own}?filter={quote(self._filter)}"
        place = parse_address(uri, ())[0]
        return address_of(_SCHEME, place, {"collection": self._name, "filter": self._filter})

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn Chroma's errors into ours."""
        try:
            yield
        except SimskipError:
            raise
        except NotFoundError as error:
            raise StoreNotFoundError(f"{self._uri}: {doing}: {_first_line(error)}") from error
        except ValueError as error:  # what it does not understand
            raise ConfigError(f"{self._uri}: {doing}: {_first_line(error)}") from error
        except ChromaError as error:
            raise StoreError(f"{self._uri}: {doing}: {_first_line(error)}") from error
        except OSError as error:
            raise TransientStoreError(f"{self._uri}: {doing}: {_first_line(error)}") from error


def _connected(host: str) -> Any:  # noqa: ANN401 a client of chromadb
    name, _, port = host.rpartition(":")
    try:
        return chromadb.HttpClient(host=name, port=int(port))
    except (ValueError, OSError, ChromaError) as error:
        raise TransientStoreError(
            f"{_HTTP}://{host}: no answer ({_first_line(error)}); does the server run, and "
            "are host and port right?"
        ) from error


def _opened(folder: Path, where: str) -> Any:  # noqa: ANN401 a client of chromadb
    if not folder.exists():
        raise nothing_at(folder, where)
    if not (folder / _FILE).is_file():
        raise StoreNotFoundError(
            f"{where}: this is no folder of Chroma's; there is no {_FILE} in it"
        )
    try:
        # Of one folder, a process has clients of the same settings only: these are what most have.
        return chromadb.PersistentClient(str(folder))
    except Exception as error:  # chromadb raises what its layers do
        raise StoreError(
            f"{where}: it cannot be opened ({_first_line(error)}); a folder of an older Chroma is "
            "brought up to date with: chroma-migrate"
        ) from error


def _where(text: str | None, uri: str) -> dict[str, Any] | None:
    """Return a filter as Chroma takes it."""
    if text is None:
        return None
    plain = plain_filter(text)
    if plain is not None:
        field, value = plain
        try:
            return {field: json_of(value)}
        except ValueError:
            return {field: value}
    try:
        found = json_of(text)
    except ValueError as error:
        raise ConfigError(
            f"{uri}: the filter {text!r} is neither FIELD=VALUE nor JSON ({error})"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{uri}: the filter {text!r} is no object of Chroma's where")
    return found


def _field(found: Mapping[str, Any], row: int, name: str) -> Any:  # noqa: ANN401 any plain value
    if name == _DOCUMENT:
        return found["documents"][row]
    return (found["metadatas"][row] or {}).get(name)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().partition("\n")[0]
