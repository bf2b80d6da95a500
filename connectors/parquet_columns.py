"""The columns of a Parquet file: read by row, and written anew with other vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simskip_vdb.connectors.digits import Digits, as_float32
from simskip_vdb.connectors.parquet_ids import POSITIONS, check_ids, is_number, read_ids
from simskip_vdb.connectors.parquet_manner import refuse_unwritable, same_columns, writer_like
from simskip_vdb.connectors.parquet_vectors import Matrix, VectorColumns, find_vectors
from simskip_vdb.connectors.row_file import LayOver
from simskip_vdb.datatypes import Ids, Positions, Vectors
from simskip_vdb.errors import ConfigError, DataError, StoreError, UnsupportedIndexError, listed


class Named(NamedTuple):
    """Columns as an address names them.

    Attributes:
        id: Of ids; None for ``id`` where there is such a column, else positions.
        vector: Of vectors.
        texts: Numbers in the column of ids are taken as text.
    """

    id: str | None
    vector: str
    texts: bool = False


class Columns:
    """Ids, vectors and payload of an open file; the last row group that was read is held.

    Rows without a vector are no rows here; they stay in the file as they are.

    Attributes:
        ids: Shape (n,).
        key: Name of the column of ids; None where ids are positions.
        dim: Dimension of a vector.
        payload: Names of the columns beside ids and vectors.
    """

    def __init__(self, file: Any, uri: str, named: Named) -> None:  # noqa: ANN401 pyarrow
        self.file, self._uri = file, uri
        names = file.schema_arrow.names
        self.key = _find_key(names, named.id, uri)
        self.vectors: VectorColumns = find_vectors(file.schema_arrow, named.vector, uri)
        self._name = named.vector
        if self.key is not None:
            check_ids(file.schema_arrow.field(self.key).type, self.key, uri)
        used = {self.key, *self.vectors.names}
        self.payload = tuple(name for name in names if name not in used)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._firsts = np.cumsum([0, *groups])
        self._held: tuple[int, Matrix] = (-1, Matrix(np.empty((0, 0)), np.zeros(0, np.bool_)))
        self.dim = self._find_dim()
        self._there = {
            number: there
            for number in range(len(groups))
            if not self._dense(number) and not (there := self._matrix(number).there).all()
        }
        counts = [
            int(self._there[i].sum()) if i in self._there else n for i, n in enumerate(groups)
        ]
        self._starts = np.cumsum([0, *counts])
        self.ids = self._read_ids(texts=named.texts)

    @property
    def names(self) -> Sequence[str]:
        """Names of all columns."""
        names: Sequence[str] = self.file.schema_arrow.names
        return names

    @property
    def positional(self) -> bool:
        """Whether ids are positions."""
        return self.key is None

    @property
    def numbers(self) -> bool:
        """Whether the column of ids holds numbers, even where they are taken as text."""
        return self.key is not None and is_number(self.file.schema_arrow.field(self.key).type)

    @property
    def exact(self) -> bool:
        """Whether the file holds every float32."""
        return self.vectors.dtype != np.float16

    @property
    def details(self) -> Mapping[str, Any]:
        """What is worth showing of the file."""
        groups = self.file.num_row_groups
        codec = self.file.metadata.row_group(0).column(0).compression if groups else "none"
        told: dict[str, Any] = {"vector": self._name, "codec": codec}
        if self.vectors.dtype != np.float32:
            told["numbers"] = str(self.vectors.dtype)
        without = int(self._firsts[-1] - self._starts[-1])
        return {**told, "rows without a vector": without} if without else told

    def read(self, start: int, stop: int) -> Vectors:
        """Return the vectors of some successive rows, shape (stop - start, d)."""
        out = np.empty((stop - start, self.dim), np.float32)
        for group, here in self._groups(start, stop):
            first = int(self._starts[group])
            at = slice(
                max(start, first) - start, max(start, first) - start + here.stop - here.start
            )
            out[at] = as_float32(self._matrix(group).numbers[here])
        return out

    def take(self, positions: Positions) -> Vectors:
        """Return the vectors at some positions, shape (len(positions), d)."""
        out = np.empty((len(positions), self.dim), np.float32)
        groups = np.searchsorted(self._starts, positions, side="right") - 1
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            held = self._matrix(int(group)).numbers
            out[chosen] = as_float32(held[positions[chosen] - self._starts[group]])
        return out

    def values(self, start: int, stop: int, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return what some successive rows hold in payload columns."""
        found: dict[str, list[Any]] = {name: [] for name in names}
        if not names:
            return found
        with reading(self._uri):
            for group, here in self._groups(start, stop):
                table = self.file.read_row_group(group, columns=list(names))
                if group in self._there:
                    rows = np.flatnonzero(self._there[group])[here]
                    part = table.take(pa.array(rows))
                else:
                    part = table.slice(here.start, here.stop - here.start)
                for name, column in found.items():
                    column.extend(part[name].to_pylist())
        return found

    def alike(self, other: Columns) -> bool:
        """Tell whether another file has the same columns, row groups, metadata and ids."""
        mine, theirs = self.file, other.file
        return bool(
            same_columns(mine.schema, theirs.schema)
            and mine.schema_arrow.equals(theirs.schema_arrow, check_metadata=True)
            and np.array_equal(self._firsts, other._firsts)
            and np.array_equal(self.ids, other.ids)
        )

    def rewrite(self, target: Path, lay_over: LayOver, digits: Digits) -> None:
        """Write the file anew, a row group at a time; see `Contents.rewrite`."""
        file, start = self.file, 0
        with reading(str(target)), writer_like(file, target, self.vectors.names) as writer:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                found = self.vectors.matrix(table, self.dim, int(self._firsts[number]))
                before = as_float32(found.numbers)
                vectors = before.copy()
                lay_over(start, vectors)
                changed = np.flatnonzero(
                    (vectors.view(np.uint32) != before.view(np.uint32)).any(axis=1)
                )
                ids = self.ids[start : start + len(vectors)]
                start += len(vectors)
                numbers = digits.written(ids, found.numbers, vectors, changed)
                table = self.vectors.put(table, found._replace(numbers=numbers))
                writer.write_table(table, row_group_size=max(1, table.num_rows))

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Yield row groups, and which of their rows with a vector are among these rows."""
        group = max(int(np.searchsorted(self._starts, start, side="right")) - 1, 0)
        while start < stop:
            first, last = int(self._starts[group]), int(self._starts[group + 1])
            if start < last:
                yield group, slice(start - first, min(stop, last) - first)
                start = min(stop, last)
            group += 1

    def _matrix(self, number: int) -> Matrix:
        """Return the vectors of a row group; not to be written to.

        Raises:
            DataError: A row has a vector of another length, or one with a gap.
        """
        if self._held[0] != number:
            with reading(self._uri):
                table = self.file.read_row_group(number, columns=list(self.vectors.names))
            found = self.vectors.matrix(table, self.dim, int(self._firsts[number]))
            self._held = (number, found)
        return self._held[1]

    def _dense(self, number: int) -> bool:
        """Tell whether the file itself says that every row of a group has a vector."""
        group = self.file.metadata.row_group(number)
        wanted, seen = {*self.vectors.names}, 0
        for place in range(group.num_columns):
            column = group.column(place)
            path = column.path_in_schema
            if not any(path == name or path.startswith(f"{name}.") for name in wanted):
                continue
            told = column.statistics
            if told is None or not told.has_null_count or told.null_count:
                return False
            seen += column.num_values
        return bool(seen == group.num_rows * self.dim)

    def _read_ids(self, *, texts: bool) -> Ids:
        if self.key is None:
            return np.arange(int(self._starts[-1]))
        with reading(self._uri):
            column = self.file.read(columns=[self.key])[self.key]
            if self._there:
                masks = [
                    self._there.get(i, np.ones(n, np.bool_))
                    for i, n in enumerate(np.diff(self._firsts).tolist())
                ]
                column = column.filter(pa.array(np.concatenate(masks)))
        return read_ids(column, self.key, self._uri, texts=texts, uuids=self._says_uuid())

    def _says_uuid(self) -> bool:
        schema = self.file.schema
        found = (schema.column(i) for i in range(len(schema)))
        return any(c.path == self.key and str(c.logical_type) == "UUID" for c in found)

    def _find_dim(self) -> int:
        fixed = self.vectors.fixed
        dim = self._first_length() if fixed is None else fixed
        if not int(self._firsts[-1]):
            raise DataError(f"{self._uri}: there is no row, so there is nothing to refine")
        if not dim:
            raise DataError(
                f"{self._uri}: no row has a number in the column '{self._name}'; fill it, or name "
                "another (?vector=NAME)"
            )
        return dim

    def _first_length(self) -> int:
        """Return the length of the first list that has any number; 0 where there is none."""
        name = self.vectors.names[0]
        with reading(self._uri):
            for batch in self.file.iter_batches(256, columns=[name]):
                found = next((len(row) for row in batch.column(0).to_pylist() if row), 0)
                if found:
                    return found
        return 0


def read_columns(path: Path, uri: str, named: Named) -> Columns:
    """Open a file and read its ids.

    Raises:
        ConfigError: It has no such columns.
        UnsupportedIndexError: They are of another kind, or other columns could not be written back.
        DataError: A row has no id, or none a vector.
        StoreError: It is no Parquet file, or damaged.
    """
    with reading(uri):
        file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    columns = Columns(file, uri, named)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedIndexError(
            f"{uri}: several columns are called '{twice[0]}'; give each a name of its own"
        )
    refuse_unwritable(path, file, uri, columns.vectors.names)
    return columns


def _find_key(names: Sequence[str], asked: str | None, uri: str) -> str | None:
    if asked == POSITIONS and POSITIONS not in names:
        return None
    if asked is None and "id" not in names:
        return None
    key = asked or "id"
    if names.count(key) != 1:
        raise ConfigError(
            f"{uri}: there is no one column '{key}'; there are: {listed(names)}. Name it in the "
            f"address: ?id=NAME, or ?id={POSITIONS} where rows are known by their positions"
        )
    return key


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn errors of pyarrow and the system into `StoreError`."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{name}: {error}") from error
