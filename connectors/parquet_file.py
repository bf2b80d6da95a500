"""Vectors in one Parquet file: lists, or one column a dimension, with ids or positions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.parquet_columns import Columns, Named, read_columns
from simskip_vdb.connectors.parquet_ids import refuse_repeated
from simskip_vdb.connectors.row_file import RowFile, state_of, state_root
from simskip_vdb.datatypes import Metric, StoreInfo
from simskip_vdb.state_place import DIGITS

SCHEME = "parquet"
_ID = "id"
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class Options(NamedTuple):
    """What an address says of Parquet files, which say nothing of it themselves.

    Attributes:
        id: Name of the column of ids; None for ``id``, or positions where there is no such column.
        vector: Name of the column of vectors; or of one column a dimension, with ``*`` for its
            number.
        metric: How the application compares vectors.
    """

    id: str | None = None
    vector: str = "vector"
    metric: Metric = Metric.COSINE

    def address(self, path: Path) -> str:
        """Return the address of a file or folder; what is as usual is left out."""
        told = {
            name: getattr(value, "value", value)
            for name, value in self._asdict().items()
            if value not in (self._field_defaults[name], _ID if name == "id" else None)
        }
        return address_of(SCHEME, str(path), told)


def state_of_column(path: Path, column: str) -> Path:
    """Return where the state of a column of vectors is; every column has one of its own.

    It is the root for the usual column, and for the one whose state is there already.
    """
    return state_of(path, column, _column_in)


def _column_in(uri: str) -> str:
    return parse_address(uri, Options._fields)[1].get("vector", Options().vector)


class ParquetFile(RowFile):
    """A `VectorStore` that is one Parquet file.

    Row groups, codecs, metadata and other columns stay as they are. Memory holds the ids and the
    vectors of one row group; while it is written anew, one row group of all columns.
    """

    _contents: Columns

    def __init__(
        self,
        path: Path | str,
        options: Options | None = None,
        *,
        read_only: bool = False,
        folder: Path | None = None,
        texts: bool = False,
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            options: What the address says.
            read_only: Refuse every write.
            folder: The folder that it is a part of, whose names of subfolders such as
                ``lang=de`` are payload.
            texts: Take ids that are numbers as text, as other files of the folder need it.

        Raises:
            StoreNotFoundError: There is no such file.
            ConfigError: It has no such columns.
            UnsupportedIndexError: Its columns cannot be refined.
            DataError: A row has no id, or the id of another, or a vector that does not fit.
            StoreError: It is no Parquet file, or damaged.
        """
        self._options, self._folder = options or Options(), folder
        self._named = Named(self._options.id, self._options.vector, texts)
        self._partition = {} if folder is None else _partition(Path(path).resolve(), folder)
        super().__init__(path, read_only=read_only)

    @property
    def key(self) -> str | None:
        """Name of the column of ids; None where ids are positions."""
        return self._contents.key

    @property
    def numbers(self) -> bool:
        """Whether ids are numbers in the file, even where they are taken as text."""
        return self._contents.numbers

    @property
    def opened(self) -> Any:  # noqa: ANN401 pyarrow
        """The file as pyarrow has it open."""
        return self._contents.file

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the columns that hold vectors."""
        return self._contents.vectors.names

    def reopen(self) -> None:
        """Look at the file anew."""
        super().reopen()
        refuse_repeated(self._rows.repeated, self.key, self._uri)
        own, all_names = self._contents.payload, self._contents.names
        self.payload = (*own, *(name for name in self._partition if name not in all_names))

    def _open(self) -> Columns:
        return read_columns(self._path, self._uri, self._named)

    def _other(self, path: Path) -> ParquetFile:
        return ParquetFile(path, self._options, read_only=True, texts=self._named.texts)

    def _address(self, path: Path) -> str:
        return self._options.address(path)

    def _state_at(self, path: Path) -> Path:
        return state_of_column(path, self._options.vector)

    @property
    def _metric(self) -> Metric:
        return self._options.metric

    def info(self) -> StoreInfo:
        """Describe the file as it was opened."""
        return StoreInfo(
            uri=self._uri,
            kind="Parquet",
            count=len(self._rows),
            dim=self._contents.dim,
            metric=self._metric,
            positional=self._contents.positional,
            exact=self._contents.exact,
            exhaustive=True,
            payload=True,
            state=self._state,
            claim=state_root(self._path),
            details=self._contents.details,
        )

    def _fields(self, start: int, stop: int, names: Sequence[str]) -> dict[str, list[Any]]:
        own = [name for name in names if name in self._contents.payload]
        found = self._contents.values(start, stop, own)
        told = {name: self._partition[name] for name in names if name not in own}
        return {**found, **{name: [value] * (stop - start) for name, value in told.items()}}

    @property
    def _digits(self) -> Path:
        if self._folder is None:
            return super()._digits
        inside = hashlib.sha256(os.fsencode(os.path.relpath(self._path, self._folder))).hexdigest()
        return state_of_column(self._folder, self._options.vector) / DIGITS / inside[:16]


def _partition(path: Path, folder: Path) -> dict[str, str | None]:
    """Return what the names of subfolders say of a file's rows, such as ``lang=de``."""
    told = (part.partition("=") for part in path.relative_to(folder).parts[:-1])
    named = {unquote(name): unquote(value) for name, mark, value in told if mark and name}
    return {name: None if value == _NO_VALUE else value for name, value in named.items()}
