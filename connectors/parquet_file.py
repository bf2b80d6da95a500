"""Vectors in one Parquet file: lists, or one column a dimension, with ids or positions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.checksums import checksum_follows, heal_checksum
from simskip_vdb.connectors.digits import Digits
from simskip_vdb.connectors.parquet_columns import Columns, Named, read_columns
from simskip_vdb.connectors.parquet_ids import refuse_repeated
from simskip_vdb.connectors.rows import Change, RowOrder, checked_queries
from simskip_vdb.connectors.swap import (
    Identity,
    appear,
    check_free,
    confirm,
    copy_durably,
    keep_as,
    staged,
    swap_in,
    sweep,
    take_mode_and_owner,
    unchanged,
)
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Metric,
    Neighbors,
    Positions,
    StoreInfo,
    VectorBatch,
    Vectors,
)
from simskip_vdb.durable import beside, json_of, make_durable, sha256_of
from simskip_vdb.errors import ConfigError, StoreNotFoundError, VerificationError
from simskip_vdb.search import exact_search
from simskip_vdb.store import Candidate

SCHEME = "parquet"
_ROWS = 8192
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


def state_root(path: Path) -> Path:
    """Return where the states of a file's or a folder's columns are."""
    return beside(path, ".simskip")


def state_of(path: Path, column: str) -> Path:
    """Return where the state of a column of vectors is; every column has one of its own.

    It is the root for the usual column, and for the one whose state is there already.
    """
    root = state_root(path)
    try:
        index = json_of((root / "manifest.json").read_bytes())["index"]
        owner = parse_address(index, Options._fields)[1].get("vector", Options().vector)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        owner = Options().vector
    return root if column == owner else root / "columns" / quote(column, safe="")


class ParquetFile:
    """A `VectorStore` that is one Parquet file.

    Row groups, codecs, metadata and other columns stay as they are. There is no index in such a
    file, so a search compares all rows. Memory holds the ids and the vectors of one row group;
    while it is written anew, one row group of all columns.
    """

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
        self._path, self._options = Path(path).resolve(), options or Options()
        self._read_only, self._folder = read_only, folder
        self._named = Named(self._options.id, self._options.vector, texts)
        self._partition = {} if folder is None else _partition(self._path, folder)
        self.reopen()

    @property
    def path(self) -> Path:
        """The file, links resolved."""
        return self._path

    @property
    def ids(self) -> Ids:
        """Row ids in scan order, shape (n,)."""
        return self._rows.ids

    @property
    def payload(self) -> tuple[str, ...]:
        """Names of the other columns, and of parts of the path such as ``lang=de``."""
        own = self._columns.payload
        return (*own, *(name for name in self._partition if name not in self._columns.names))

    @property
    def key(self) -> str | None:
        """Name of the column of ids; None where ids are positions."""
        return self._columns.key

    @property
    def numbers(self) -> bool:
        """Whether ids are numbers in the file, even where they are taken as text."""
        return self._columns.numbers

    def reopen(self) -> None:
        """Look at the file anew."""
        if not self._path.is_file():
            raise StoreNotFoundError(f"{self._uri}: there is no such file")
        self._identity = Identity.of(self._path)
        self._columns: Columns = read_columns(self._path, self._uri, self._named)
        self._rows = RowOrder(self._columns.ids, self._uri)
        refuse_repeated(self._rows.repeated, self._columns.key, self._uri)

    @cached_property
    def _state(self) -> Path:
        return state_of(self._path, self._options.vector)

    def sha256(self) -> str:
        """Hash the file's bytes, 64 hex digits."""
        return sha256_of(self._path)

    def info(self) -> StoreInfo:
        """Describe the file as it was opened."""
        return StoreInfo(
            uri=self._uri,
            kind="Parquet",
            count=len(self._rows),
            dim=self._columns.dim,
            metric=self._options.metric,
            positional=self._columns.positional,
            exact=self._columns.exact,
            exhaustive=True,
            payload=True,
            state=self._state,
            claim=state_root(self._path),
            details=self._columns.details,
        )

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in the order of the file; see `VectorStore.scan`."""
        if partition is not None:
            raise ConfigError(f"{self._uri}: one file has no partitions")
        check_fields(fields, self.payload, self._uri)
        windows = self._rows.windows(batch_size, cursor)
        return (self._batch(start, stop, fields) for start, stop in windows)

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        positions = self._rows.positions(ids)
        unchanged(self._path, self._identity)
        return self._columns.take(positions)

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Compare all rows; see `VectorStore.search`. There are no parameters."""
        if params:
            raise ConfigError(f"{self._uri}: exact search has no parameters, not {sorted(params)}")
        array = checked_queries(self._uri, queries, self._columns.dim, k)
        found = exact_search(array, self._blocks(), k, self._options.metric)
        nothing = np.array([b"" if self.ids.dtype.kind == "S" else -1], self.ids.dtype)
        ids = np.append(self.ids, nothing)[found.ids]  # -1 is the last
        return Neighbors(ids=ids, scores=found.scores)

    @contextmanager
    def prepared(
        self, batches: Iterable[VectorBatch], *, keep: Path | None, expected: str
    ) -> Iterator[Candidate]:
        """Write the file anew beside itself; see `FileBacked.prepared`."""
        self._writable()
        with staged(self._path) as temporary:
            take_mode_and_owner(temporary, self._path)
            candidate = self._written(batches, temporary)
            yield Candidate(candidate, partial(self._swap_in, temporary, keep, expected))

    def _swap_in(self, temporary: Path, keep: Path | None, expected: str) -> None:
        unchanged(self._path, self._identity, expected)
        take_mode_and_owner(temporary, self._path)
        keep_as(self._path, keep, expected)
        unchanged(self._path, self._identity)
        with checksum_follows(self._path, temporary):
            swap_in(temporary, self._path)
        self.reopen()
        confirm(self._path)

    @contextmanager
    def prepared_copy(self, batches: Iterable[VectorBatch], output: Path) -> Iterator[Candidate]:
        """Write the rewritten file to a new one; see `FileBacked.prepared_copy`."""
        check_free(output)
        with staged(output) as temporary:
            candidate = self._written(batches, temporary)
            yield Candidate(candidate, partial(appear, temporary, output, self._path))

    def info_at(self, path: Path) -> StoreInfo:
        """Describe a copy at another path; see `FileBacked.info_at`."""
        path = path.resolve()
        return replace(
            self.info(),
            uri=self._options.address(path),
            state=state_of(path, self._options.vector),
            claim=state_root(path),
        )

    def put_back(self, kept: Path, *, expected: str) -> None:
        """Swap a kept file back; see `FileBacked.put_back`."""
        self._writable()
        if not kept.is_file():
            raise StoreNotFoundError(f"{kept}: the kept file is gone; {self._path} is unchanged")
        with staged(self._path) as temporary:
            copy_durably(kept, temporary)
            take_mode_and_owner(temporary, self._path)
            unchanged(self._path, self._identity, expected)
            with checksum_follows(self._path, temporary):
                swap_in(temporary, self._path)
            self.reopen()
            confirm(self._path)

    def sweep(self) -> None:
        """Remove what a killed write left behind; see `LeavesFiles.sweep`."""
        if not self._read_only:
            sweep(self._path)
            heal_checksum(self._path)

    @property
    def _uri(self) -> str:
        return self._options.address(self._path)

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")

    def _batch(self, start: int, stop: int, fields: Sequence[str]) -> VectorBatch:
        unchanged(self._path, self._identity)
        return VectorBatch(
            ids=self.ids[start:stop],
            vectors=self._columns.read(start, stop),
            fields=self._fields(start, stop, fields),
            cursor=stop,
        )

    def _fields(self, start: int, stop: int, names: Sequence[str]) -> dict[str, list[Any]]:
        own = [name for name in names if name in self._columns.payload]
        found = self._columns.values(start, stop, own)
        told = {name: self._partition[name] for name in names if name not in own}
        return {**found, **{name: [value] * (stop - start) for name, value in told.items()}}

    @property
    def _digits(self) -> Path:
        if self._folder is None:
            return self._state / "digits" / "rows"
        inside = os.path.relpath(self._path, self._folder)
        return (
            state_of(self._folder, self._options.vector)
            / "digits"
            / hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
        )

    def _blocks(self) -> Iterator[tuple[int, Vectors]]:
        for batch in self.scan(_ROWS):
            yield int(batch.cursor or 0) - len(batch), batch.vectors

    def _written(self, batches: Iterable[VectorBatch], target: Path) -> ParquetFile:
        """Write the file with new vectors to `target`, and open it."""
        unchanged(self._path, self._identity)
        changes = _Changes(self._rows.changes(batches, self._columns.dim))
        digits = Digits(self._digits, self._columns.dim)
        self._columns.rewrite(target, changes.lay_over, digits)
        changes.finish()
        make_durable(target)
        candidate = ParquetFile(target, self._options, read_only=True, texts=self._named.texts)
        if not self._columns.alike(candidate._columns):
            raise VerificationError(
                f"{self._uri}: written anew, its columns or ids would differ; nothing was changed"
            )
        return candidate


class _Changes:
    """New vectors in the order of rows, laid over the old ones a block at a time."""

    def __init__(self, changes: Iterator[Change]) -> None:
        self._changes, self._held = changes, next(changes, None)

    def lay_over(self, start: int, vectors: Vectors) -> None:
        """Put new vectors in the place of old ones, whose first row is at position `start`."""
        stop = start + len(vectors)
        while self._held is not None and self._held.positions[0] < stop:
            positions, new = self._held
            here = int(np.searchsorted(positions, stop))
            vectors[positions[:here] - start] = new[:here]
            rest: tuple[Positions, Vectors] = (positions[here:], new[here:])
            self._held = Change(*rest) if len(rest[0]) else next(self._changes, None)

    def finish(self) -> None:
        """Look at what comes after the last row, so that a wrong batch is noticed."""
        for _ in self._changes:
            pass


def _partition(path: Path, folder: Path) -> dict[str, str | None]:
    """Return what the names of subfolders say of a file's rows, such as ``lang=de``."""
    told = (part.partition("=") for part in path.relative_to(folder).parts[:-1])
    named = {unquote(name): unquote(value) for name, mark, value in told if mark and name}
    return {name: None if value == _NO_VALUE else value for name, value in named.items()}


def check_fields(fields: Sequence[str], known: Sequence[str], uri: str) -> None:
    """Refuse columns that there are not.

    Raises:
        ConfigError: One of them was asked for.
    """
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"{uri}: there is no column '{name}' beside ids and vectors; there are: "
                f"{', '.join(known) or 'none'}"
            )
