"""LlamaIndex's ``SimpleVectorStore``: vectors in a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from simskip_vdb.connectors.addresses import address_of, metric_of, parse_address
from simskip_vdb.connectors.digits import Digits, as_float32
from simskip_vdb.connectors.folders import locate
from simskip_vdb.connectors.json_layout import JsonLayout
from simskip_vdb.connectors.row_file import LayOver, RowFile, state_root
from simskip_vdb.datatypes import Metric, Positions, StoreInfo, Vectors, id_names
from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import DataError, StoreError

SCHEME = "llama-index"
_KEY = "embedding_dict"


class _Vectors:
    """The rows of an open file; see `Contents`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self.layout = JsonLayout(path, _KEY)
        self.ids, self.dim = self.layout.ids, self.layout.dim

    def read(self, start: int, stop: int) -> Vectors:
        """See `Contents.read`."""
        with disk_errors(self.path):
            return as_float32(self.layout.read(start, stop))

    def take(self, positions: Positions) -> Vectors:
        """See `Contents.take`."""
        with disk_errors(self.path):
            return as_float32(self.layout.take(positions))

    def rewrite(self, target: Path, lay_over: LayOver, digits: Digits) -> None:
        """See `Contents.rewrite`."""
        with disk_errors(target):
            self.layout.rewrite(target, lay_over, digits)

    def alike(self, other: _Vectors) -> bool:
        """See `Contents.alike`."""
        with disk_errors(self.path):
            return self.layout.around() == other.layout.around()


class SimpleStoreFile(RowFile):
    """A `VectorStore` that is one file of a ``SimpleVectorStore``; ids are those of nodes.

    Everything but the numbers of vectors stays as it is. What the store knows of a node, its
    metadata and ``ref_doc_id``, is payload.
    """

    _contents: _Vectors

    def __init__(
        self, path: Path | str, metric: Metric = Metric.COSINE, *, read_only: bool = False
    ) -> None:
        """Open a file, or the folder in which ``StorageContext.persist`` saved it.

        Args:
            path: The file or the folder.
            metric: How the application compares vectors.
            read_only: Refuse every write.

        Raises:
            StoreNotFoundError: There is no such file.
            DataError: A vector has no, or other numbers than the first.
            StoreError: The file is damaged, or of another kind.
        """
        self._told = metric
        super().__init__(locate(Path(path)), read_only=read_only)

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> SimpleStoreFile:
        """Open ``llama-index:PATH``, the file or its folder.

        An option after a question mark: ``metric``: ``cosine`` (the default), ``dot``, ``euclid``.
        """
        place, told = parse_address(uri, ["metric"])
        metric = metric_of(f"{SCHEME}:{place}", told.get("metric", Metric.COSINE))
        return cls(place, metric, read_only=read_only)

    def info(self) -> StoreInfo:
        """Describe the file as it was opened."""
        return StoreInfo(
            uri=self._uri,
            kind="LlamaIndex SimpleVectorStore",
            count=len(self._rows),
            dim=self._contents.dim,
            metric=self._told,
            exhaustive=True,
            payload=True,
            state=self._state,
            claim=state_root(self._path),
        )

    def reopen(self) -> None:
        """Look at the file anew."""
        super().reopen()
        self.__dict__.pop("_columns", None)
        self.__dict__.pop("payload", None)
        twice = self._rows.repeated
        if len(twice):
            raise DataError(
                f"{self._uri}: {id_names(twice[:1])[0]} stands in it twice; let LlamaIndex load "
                "and persist it again, which keeps the last of them"
            )

    @cached_property
    def payload(self) -> tuple[str, ...]:  # type: ignore[override] # known when it is asked for
        """What is known of a node."""
        return tuple(dict.fromkeys(name for row in self._columns.values() for name in row))

    @cached_property
    def _columns(self) -> dict[str, dict[str, Any]]:
        with disk_errors(self._path):
            told = self._contents.layout.rest()
        try:
            sources = told.get("text_id_to_ref_doc_id", {})
            known = told.get("metadata_dict", {})
            return {
                name: {"ref_doc_id": sources.get(name), **known.get(name, {})}
                for name in {**sources, **known}
            }
        except (AttributeError, TypeError):
            raise StoreError(
                f"{self._uri} is damaged: what it tells of nodes has another form; restore it"
            ) from None

    def _fields(self, start: int, stop: int, names: Sequence[str]) -> dict[str, list[Any]]:
        if not names:
            return {}
        rows = [self._columns.get(row, {}) for row in id_names(self.ids[start:stop])]
        return {name: [row.get(name) for row in rows] for name in names}

    def _open(self) -> _Vectors:
        return _Vectors(self._path)

    def _other(self, path: Path) -> SimpleStoreFile:
        return SimpleStoreFile(path, self._told, read_only=True)

    def _address(self, path: Path) -> str:
        told = None if self._told is Metric.COSINE else self._told.value
        return address_of(SCHEME, str(path), {"metric": told})

    def _state_at(self, path: Path) -> Path:
        return state_root(path)

    @property
    def _metric(self) -> Metric:
        return self._told
