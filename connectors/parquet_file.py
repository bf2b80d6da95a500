"""Vectors in one Parquet file: a column of ids and a column of lists of float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from simskip_vdb.connectors.addresses import address_of, parse_address
from simskip_vdb.connectors.checksums import checksum_follows, heal_checksum
from simskip_vdb.connectors.parquet_columns import Columns, read_columns, rewrite
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


class Options(NamedTuple):
    """What an address says of Parquet files, which say nothing of it themselves."""

    id: str = "id"
    vector: str = "vector"
    metric: Metric = Metric.COSINE

    def address(self, path: Path) -> str:
        """Return the address of a file or folder; what is as usual is left out."""
        told = {
            name: getattr(value, "value", value)
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
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
        self, path: Path | str, options: Options | None = None, *, read_only: bool = False
    ) -> None:
        """Open a file.

        Raises:
            StoreNotFoundError: There is no such file.
            ConfigError: It has no such columns.
            UnsupportedIndexError: Its columns cannot be refined.
            DataError: A row has no id, or no vector.
            StoreError: It is no Parquet file, or damaged.
        """
        self._path, self._options = Path(path).resolve(), options or Options()
        self._read_only = read_only
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
        """Names of the other columns."""
        return self._columns.payload

    def reopen(self) -> None:
        """Look at the file anew."""
        if not self._path.is_file():
            raise StoreNotFoundError(f"{self._uri}: there is no such file")
        self._identity = Identity.of(self._path)
        self._columns: Columns = read_columns(
            self._path, self._uri, self._options.id, self._options.vector
        )
        self._rows = RowOrder(self._columns.ids, self._uri)

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
            fields=self._columns.values(start, stop, fields),
            cursor=stop,
        )

    def _blocks(self) -> Iterator[tuple[int, Vectors]]:
        for batch in self.scan(_ROWS):
            yield int(batch.cursor or 0) - len(batch), batch.vectors

    def _written(self, batches: Iterable[VectorBatch], target: Path) -> ParquetFile:
        """Write the file with new vectors to `target`, and open it."""
        unchanged(self._path, self._identity)
        changes = _Changes(self._rows.changes(batches, self._columns.dim))
        rewrite(self._columns, target, changes.lay_over)
        changes.finish()
        make_durable(target)
        candidate = ParquetFile(target, self._options, read_only=True)
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
