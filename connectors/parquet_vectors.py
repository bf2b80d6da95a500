"""Vectors in the columns of a Parquet file: a column of lists, or one column a dimension."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simskip_vdb.connectors.digits import Numbers
from simskip_vdb.datatypes import Mask
from simskip_vdb.errors import ConfigError, DataError, UnsupportedIndexError, listed

_DTYPES: dict[str, np.dtype[Any]] = {
    "halffloat": np.dtype(np.float16),
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
}
_FEWEST = 4


class Matrix(NamedTuple):
    """The vectors of a row group.

    Attributes:
        numbers: Those of the rows that have one, shape (m, d), as the file holds them.
        there: Which rows have one, shape (n,).
    """

    numbers: Numbers
    there: Mask


class VectorColumns(Protocol):
    """Where the vectors of a file are.

    Attributes:
        names: Columns that hold them.
        dtype: Their type: float16, 32 or 64.
        fixed: The dimension; None where only the rows tell.
    """

    names: tuple[str, ...]
    dtype: np.dtype[Any]
    fixed: int | None

    def matrix(self, table: Any, dim: int, first: int) -> Matrix:  # noqa: ANN401 pyarrow
        """Return a row group's vectors; `first` is the number of its first row, for messages.

        Raises:
            DataError: A row has a vector of another length, or one with a gap.
        """
        ...

    def put(self, table: Any, matrix: Matrix) -> Any:  # noqa: ANN401 pyarrow
        """Return the table with other vectors; rows that had none stay without."""
        ...


class ListColumn:
    """A column of lists of any kind; see `VectorColumns`."""

    def __init__(self, name: str, kind: Any, uri: str) -> None:  # noqa: ANN401 pyarrow
        self._uri = uri
        self.names: tuple[str, ...] = (name,)
        self.dtype: np.dtype[Any] = _DTYPES[str(kind.value_type)]
        self.fixed: int | None = kind.list_size if pa.types.is_fixed_size_list(kind) else None

    def matrix(self, table: Any, dim: int, first: int) -> Matrix:  # noqa: ANN401 pyarrow
        """See `VectorColumns.matrix`."""
        lists = _one_array(table[self.names[0]])
        if not len(lists):
            return Matrix(np.empty((0, dim), self.dtype), np.zeros(0, np.bool_))
        lists = _from_view(lists)
        sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        uneven = np.flatnonzero((sizes != 0) & (sizes != dim))
        if len(uneven):
            row = int(uneven[0])
            self._refuse(
                first + row, len(uneven), f"a list of {sizes[row]} numbers, and others {dim}"
            )
        there = np.asarray(sizes == dim)
        flat = lists.flatten()
        if flat.null_count:
            gaps = pc.is_null(flat).to_numpy(zero_copy_only=False).reshape(-1, dim)
            rows = np.flatnonzero(there)
            some = gaps.any(axis=1) & ~gaps.all(axis=1)
            if some.any():
                row = int(rows[some][0])
                self._refuse(first + row, int(some.sum()), "a vector with a number missing")
            there[rows[gaps.all(axis=1)]] = False
            flat = flat.drop_null()
        return Matrix(flat.to_numpy(zero_copy_only=False).reshape(-1, dim), there)

    def put(self, table: Any, matrix: Matrix) -> Any:  # noqa: ANN401 pyarrow
        """See `VectorColumns.put`."""
        at = table.schema.get_field_index(self.names[0])
        field = table.schema.field(at)
        new = _lists(matrix.numbers, field.type)
        if not matrix.there.all():
            old = _one_array(table[self.names[0]])
            plain = _without_view(field.type)
            both = pa.concat_arrays([_lists(matrix.numbers, plain), _from_view(old)])
            rank = np.cumsum(matrix.there) - 1
            own = len(matrix.numbers) + np.arange(len(matrix.there))
            new = _to_view(both.take(pa.array(np.where(matrix.there, rank, own))), field.type)
        return table.set_column(at, field, new)

    def _refuse(self, row: int, count: int, what: str) -> None:
        others = f", and so have {count - 1:,} more of its row group" if count > 1 else ""
        raise DataError(
            f"{self._uri}: row {row:,} (counted from 0) has in the column '{self.names[0]}' "
            f"{what}{others}; correct it, empty it, or remove the row"
        )


class NumberColumns:
    """One column a dimension; see `VectorColumns`."""

    def __init__(self, names: Sequence[str], kinds: Sequence[Any], uri: str) -> None:
        self._uri = uri
        self.names: tuple[str, ...] = tuple(names)
        self._dtypes = [_DTYPES[str(kind)] for kind in kinds]
        self.dtype: np.dtype[Any] = np.result_type(*self._dtypes)
        if np.float16 in self._dtypes and self.dtype != np.float16:
            raise UnsupportedIndexError(
                f"{uri}: some columns of the vectors hold float16 and others {self.dtype}; write "
                "all as one type"
            )
        self.fixed: int | None = len(names)

    def matrix(self, table: Any, dim: int, first: int) -> Matrix:  # noqa: ANN401 pyarrow
        """See `VectorColumns.matrix`."""
        gaps = np.zeros(table.num_rows, np.int64)
        for name in self.names:
            if table[name].null_count:
                gaps += pc.is_null(table[name]).to_numpy()
        some = np.flatnonzero((gaps > 0) & (gaps < dim))
        if len(some):
            row = int(some[0])
            nulls = (name for name in self.names if not table[name][row].is_valid)
            raise DataError(
                f"{self._uri}: row {first + row:,} (counted from 0) has no number in the column "
                f"'{next(nulls)}', and has some in others; fill it, empty all, or remove the row"
            )
        there = gaps == 0
        numbers = np.empty((int(there.sum()), dim), self.dtype)
        for place, name in enumerate(self.names):
            column = table[name].drop_null() if table[name].null_count else table[name]
            numbers[:, place] = column.to_numpy()
        return Matrix(numbers, there)

    def put(self, table: Any, matrix: Matrix) -> Any:  # noqa: ANN401 pyarrow
        """See `VectorColumns.put`."""
        whole = np.zeros((len(matrix.there)), self.dtype)
        gone = None if matrix.there.all() else ~matrix.there
        for place, name in enumerate(self.names):
            at = table.schema.get_field_index(name)
            field = table.schema.field(at)
            whole[matrix.there] = matrix.numbers[:, place]
            own = whole.astype(self._dtypes[place])
            table = table.set_column(at, field, pa.array(own, field.type, mask=gone))
        return table


def find_vectors(schema: Any, vector: str, uri: str) -> ListColumn | NumberColumns:  # noqa: ANN401 pyarrow
    """Find the columns that hold vectors.

    Args:
        schema: The file's Arrow schema.
        vector: A column's name; or names of several, which have a number in the place of ``*``.
        uri: The file's address.

    Raises:
        ConfigError: There are no such columns.
        UnsupportedIndexError: They hold something else.
    """
    names = schema.names
    if names.count(vector) == 1:
        kind = schema.field(vector).type
        if not _is_vector(kind):
            raise UnsupportedIndexError(
                f"{uri}: the column '{vector}' holds {kind}; write it as lists of float16, "
                "float32 or float64"
            )
        return ListColumn(vector, kind, uri)
    if vector.count("*") == 1:
        return _numbered(schema, vector, uri)
    raise ConfigError(f"{uri}: there is no one column '{vector}'; {_hint(schema)}")


def _numbered(schema: Any, vector: str, uri: str) -> NumberColumns:  # noqa: ANN401 pyarrow
    numbers = _family(schema.names, vector)
    order = sorted(numbers)
    if len(order) < _FEWEST:
        raise ConfigError(
            f"{uri}: fewer than {_FEWEST} columns are called '{vector}' with a number for *; "
            f"{_hint(schema)}"
        )
    missing = sorted({*range(order[0], order[-1] + 1)} - {*order})
    if missing or order[0] > 1:
        gap = vector.replace("*", str(missing[0] if missing else 0))
        raise ConfigError(
            f"{uri}: of the columns '{vector}', '{gap}' is missing; they are counted from 0 or 1 "
            "without a gap"
        )
    columns = [numbers[number] for number in order]
    kinds = [schema.field(name).type for name in columns]
    for name, kind in zip(columns, kinds, strict=True):
        if str(kind) not in _DTYPES:
            raise UnsupportedIndexError(
                f"{uri}: the column '{name}' holds {kind}; write it as float16, float32 or float64"
            )
    return NumberColumns(columns, kinds, uri)


def _family(names: Sequence[str], pattern: str) -> dict[int, str]:
    before, _, after = pattern.partition("*")
    wanted = re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")
    found = {name: wanted.fullmatch(name) for name in names}
    return {int(match[1]): name for name, match in found.items() if match}


def _hint(schema: Any) -> str:  # noqa: ANN401 pyarrow
    """Tell what the address may be."""
    lists = [field.name for field in schema if _is_vector(field.type)]
    floats = [field.name for field in schema if str(field.type) in _DTYPES]
    patterns = dict.fromkeys(re.sub("[0-9]+", "*", name, count=1) for name in floats)
    families = [name for name in patterns if len(_family(floats, name)) >= _FEWEST]
    there = f"there are: {listed(schema.names)}"
    if not (lists or families):
        return f"{there}. None of them holds lists of floating numbers: no vectors are here"
    told = " or ".join(f"?vector={name}" for name in [*lists, *families][:3])
    return f"{there}. Name it in the address: {told}"


def _is_vector(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    lists = (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or _is_view(kind)
    )
    return bool(lists) and str(kind.value_type) in _DTYPES


def _is_view(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    return "list_view" in str(kind).partition("<")[0]


def _without_view(kind: Any) -> Any:  # noqa: ANN401 pyarrow
    if not _is_view(kind):
        return kind
    large = str(kind).startswith("large")
    return pa.large_list(kind.value_field) if large else pa.list_(kind.value_field)


def _from_view(lists: Any) -> Any:  # noqa: ANN401 pyarrow
    """Return lists that lie one after the other.

    pyarrow's own cast loses numbers behind an empty list.
    """
    if not _is_view(lists.type):
        return lists
    kind, gone = _without_view(lists.type), pc.is_null(lists).to_numpy(zero_copy_only=False)
    sizes = np.where(gone, 0, lists.sizes.to_numpy())
    return _array_of(kind).from_arrays(
        _offsets(sizes, kind), lists.flatten(), type=kind, mask=pa.array(gone)
    )


def _to_view(lists: Any, kind: Any) -> Any:  # noqa: ANN401 pyarrow
    if not _is_view(kind):
        return lists
    sizes = pc.fill_null(pc.list_value_length(lists), 0)
    starts = _offsets(sizes.to_numpy(), lists.type)[:-1]
    large = pa.types.is_large_list(lists.type)
    array = pa.LargeListViewArray if large else pa.ListViewArray
    return array.from_arrays(starts, sizes, lists.flatten(), type=kind, mask=pc.is_null(lists))


def _array_of(kind: Any) -> Any:  # noqa: ANN401 pyarrow
    return pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray


def _offsets(sizes: Any, kind: Any) -> Any:  # noqa: ANN401 pyarrow
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return pa.array(offsets, pa.int64() if pa.types.is_large_list(kind) else pa.int32())


def _one_array(column: Any) -> Any:  # noqa: ANN401 pyarrow
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # older versions of pyarrow
        lists = pa.concat_arrays(lists.chunks)
    return lists


def _lists(numbers: Numbers, kind: Any) -> Any:  # noqa: ANN401 pyarrow
    flat = pa.array(numbers.ravel())
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    plain = _without_view(kind)
    sizes = np.full(len(numbers), numbers.shape[1])
    return _to_view(_array_of(plain).from_arrays(_offsets(sizes, plain), flat, type=plain), kind)
