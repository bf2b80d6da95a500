"""The columns of a Parquet file: read by row, and written anew with other vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simskip_vdb.datatypes import ID_TEXT, Ids, Positions, Vectors
from simskip_vdb.errors import ConfigError, DataError, StoreError, UnsupportedIndexError

LayOver = Callable[[int, Vectors], None]
"""Changes vectors in place: (position of the first row, vectors (b, d))."""


class Columns:
    """Ids, vectors and payload of an open file; the last row group that was read is held.

    Attributes:
        ids: Shape (n,).
        dim: Dimension of a vector.
        payload: Names of the columns beside ids and vectors.
    """

    def __init__(self, file: Any, uri: str, key: str, vector: str) -> None:  # noqa: ANN401 pyarrow
        self.file, self._uri, self.key, self.vector = file, uri, key, vector
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self._held: tuple[int, Vectors] = (-1, np.empty((0, 0), np.float32))
        self.payload = tuple(n for n in file.schema_arrow.names if n not in (key, vector))
        self.ids = self._read_ids()
        self.dim = self._find_dim()
        if not self.dim:
            raise DataError(
                f"{uri}: the first row has no number in the column '{vector}'; fill or remove it"
            )

    @property
    def details(self) -> Mapping[str, Any]:
        """What is worth showing of the file."""
        groups = self.file.num_row_groups
        codec = self.file.metadata.row_group(0).column(0).compression if groups else "none"
        return {"vector": self.vector, "codec": codec}

    def read(self, start: int, stop: int) -> Vectors:
        """Return the vectors of some successive rows, shape (stop - start, d)."""
        out = np.empty((stop - start, self.dim), np.float32)
        for group in self._groups(start, stop):
            first = int(self._starts[group])
            here = slice(max(start, first), min(stop, int(self._starts[group + 1])))
            out[here.start - start : here.stop - start] = self.group(group)[
                here.start - first : here.stop - first
            ]
        return out

    def take(self, positions: Positions) -> Vectors:
        """Return the vectors at some positions, shape (len(positions), d)."""
        out = np.empty((len(positions), self.dim), np.float32)
        groups = np.searchsorted(self._starts, positions, side="right") - 1
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            out[chosen] = self.group(int(group))[positions[chosen] - self._starts[group]]
        return out

    def values(self, start: int, stop: int, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return what some successive rows hold in payload columns."""
        found: dict[str, list[Any]] = {name: [] for name in names}
        if not names:
            return found
        with reading(self._uri):
            for group in self._groups(start, stop):
                first = int(self._starts[group])
                table = self.file.read_row_group(group, columns=list(names))
                part = table.slice(max(0, start - first), stop - max(start, first))
                for name, column in found.items():
                    column.extend(part[name].to_pylist())
        return found

    def group(self, number: int) -> Vectors:
        """Return the vectors of a row group, shape (rows, d); not to be written to.

        Raises:
            DataError: A row has none, or one of another length.
        """
        if self._held[0] != number:
            with reading(self._uri):
                table = self.file.read_row_group(number, columns=[self.vector])
            self._held = (number, self.matrix(table[self.vector]))
        return self._held[1]

    def matrix(self, column: Any) -> Vectors:  # noqa: ANN401 pyarrow
        """Return a column of vectors as an array, shape (rows, d)."""
        lists = column.combine_chunks()
        if isinstance(lists, pa.ChunkedArray):  # older versions of pyarrow
            lists = pa.concat_arrays(lists.chunks)
        flat = lists.flatten()
        sizes = None if pa.types.is_fixed_size_list(lists.type) else pc.list_value_length(lists)
        uneven = sizes is not None and not pc.all(pc.equal(sizes, self.dim)).as_py()
        if lists.null_count or flat.null_count or uneven:
            raise DataError(
                f"{self._uri}: the column '{self.vector}' has rows without a vector of {self.dim} "
                "numbers; fill or remove them"
            )
        vectors: Vectors = flat.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        return vectors

    def alike(self, other: Columns) -> bool:
        """Tell whether another file has the same columns, row groups, metadata and ids."""
        mine, theirs = self.file, other.file
        return bool(
            mine.schema.equals(theirs.schema)
            and mine.schema_arrow.equals(theirs.schema_arrow, check_metadata=True)
            and np.array_equal(self._starts, other._starts)
            and np.array_equal(self.ids, other.ids)
        )

    def _groups(self, start: int, stop: int) -> range:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        return range(first, int(np.searchsorted(self._starts, stop, side="left")))

    def _read_ids(self) -> Ids:
        kind = self.file.schema_arrow.field(self.key).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(plain) or _is_text(plain)):
            raise UnsupportedIndexError(
                f"{self._uri}: the column '{self.key}' holds {kind}; ids are integers or text"
            )
        with reading(self._uri):
            column = self.file.read(columns=[self.key])[self.key]
        if column.null_count:
            raise DataError(f"{self._uri}: {column.null_count:,} rows have no '{self.key}'")
        if pa.types.is_integer(plain):
            try:
                return np.asarray(column.cast(plain).cast(pa.int64()).to_numpy())
            except pa.ArrowInvalid:
                raise UnsupportedIndexError(
                    f"{self._uri}: '{self.key}' holds integers of 2⁶³ or more; write them as text"
                ) from None
        return self._texts(column.cast(plain).cast(pa.large_binary()))

    def _texts(self, column: Any) -> Ids:  # noqa: ANN401 pyarrow
        """Return ids that are text, given as bytes."""
        if not len(column):
            return np.empty(0, ID_TEXT)
        lengths = pc.binary_length(column)
        if pc.max(lengths).as_py() > ID_TEXT.itemsize:
            raise UnsupportedIndexError(
                f"{self._uri}: '{self.key}' holds texts of over {ID_TEXT.itemsize} bytes; ids are "
                "no longer than that"
            )
        if not pc.min(lengths).as_py():
            raise DataError(f"{self._uri}: a row's '{self.key}' is an empty text; give it an id")
        texts = column.to_pylist()
        for text in texts:
            if b"\0" in text or not _is_utf8(text):
                raise UnsupportedIndexError(
                    f"{self._uri}: the '{self.key}' {text!r} is not text in UTF-8 without zero "
                    "bytes; ids are integers or text"
                )
        return np.array(texts, ID_TEXT)

    def _find_dim(self) -> int:
        kind = self.file.schema_arrow.field(self.vector).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (lists or pa.types.is_fixed_size_list(kind)) or kind.value_type != pa.float32():
            raise UnsupportedIndexError(
                f"{self._uri}: the column '{self.vector}' holds {kind}; write it as lists of "
                "float32, since other numbers could not be restored bit for bit"
            )
        if not lists:
            return int(kind.list_size)
        if not len(self.ids):
            raise DataError(f"{self._uri}: without a row nobody knows the dimension")
        with reading(self._uri):
            batch = next(self.file.iter_batches(1, columns=[self.vector]))
        return len(batch.column(0)[0].as_py() or [])


def _is_text(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    view = pa.types.is_string_view(kind) if hasattr(pa.types, "is_string_view") else False
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or view)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_columns(path: Path, uri: str, key: str, vector: str) -> Columns:
    """Open a file and read its ids.

    Raises:
        ConfigError: It has no such columns.
        UnsupportedIndexError: They are of another kind, or other columns could not be written back.
        DataError: A row has no id, or the first no vector.
        StoreError: It is no Parquet file, or damaged.
    """
    with reading(uri):
        file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    for option, name in (("id", key), ("vector", vector)):
        if names.count(name) != 1:
            raise ConfigError(
                f"{uri}: there is no one column '{name}'; there are: {', '.join(names)}. Name it "
                f"in the address: ?{option}=NAME"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedIndexError(
            f"{uri}: several columns are called '{twice[0]}'; give each a name of its own"
        )
    _refuse_far_times(path, file, uri)
    return Columns(file, uri, key, vector)


def _refuse_far_times(path: Path, file: Any, uri: str) -> None:  # noqa: ANN401 pyarrow
    """Refuse times that pyarrow would write back as others.

    It reads those of 96 bits, as Spark writes them, as nanoseconds, and wraps them around silently
    outside 1677…2262.
    """
    schema, leaves = file.schema, range(len(file.schema))
    old = [schema.column(i).path for i in leaves if schema.column(i).physical_type == "INT96"]
    names = sorted({leaf.partition(".")[0] for leaf in old} & {*file.schema_arrow.names})
    with reading(uri):
        micros = pq.ParquetFile(path, coerce_int96_timestamp_unit="us") if names else file
    for name in names:
        for group in range(file.num_row_groups):
            with reading(uri):
                column = micros.read_row_group(group, columns=[name])[name]
            try:
                column.cast(file.schema_arrow.field(name).type)
            except pa.ArrowException as error:
                raise UnsupportedIndexError(
                    f"{uri}: the column '{name}' holds times of 96 bits that nanoseconds do not "
                    "reach, so they could not be written back; write it as TIMESTAMP_MICROS"
                ) from error


def rewrite(columns: Columns, target: Path, lay_over: LayOver) -> None:
    """Write a file anew, a row group at a time, as it was but for its vectors.

    Args:
        columns: The file.
        target: Where to.
        lay_over: Puts new vectors in the place of old ones.

    Raises:
        StoreError: Reading or writing failed.
    """
    file, at = columns.file, columns.file.schema_arrow.get_field_index(columns.vector)
    field = file.schema_arrow.field(at)
    start = 0
    with reading(str(target)):
        writer = pq.ParquetWriter(target, file.schema_arrow, **_manner(file, columns.vector))
    try:
        for number in range(file.num_row_groups):
            with reading(str(target)):
                table = file.read_row_group(number)
            vectors = columns.matrix(table[columns.vector]).copy()
            lay_over(start, vectors)
            start += len(vectors)
            with reading(str(target)):
                table = table.set_column(at, field, _lists(vectors, field.type))
                writer.write_table(table, row_group_size=max(1, len(vectors)))
    finally:
        with reading(str(target)):
            writer.close()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn errors of pyarrow and the system into `StoreError`."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{name}: {error}") from error


def _lists(vectors: Vectors, kind: Any) -> Any:  # noqa: ANN401 pyarrow
    flat = pa.array(vectors.ravel())
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    large = pa.types.is_large_list(kind)
    offsets = np.arange(len(vectors) + 1) * vectors.shape[1]
    array = pa.LargeListArray if large else pa.ListArray
    return array.from_arrays(
        pa.array(offsets, pa.int64() if large else pa.int32()), flat, type=kind
    )


def _manner(file: Any, vector: str) -> dict[str, Any]:  # noqa: ANN401 pyarrow
    """Return the settings by which a file was written, as far as it tells."""
    settings: dict[str, Any] = {"version": file.metadata.format_version}
    if not file.num_row_groups:
        return settings
    group = file.metadata.row_group(0)
    found = [group.column(i) for i in range(group.num_columns)]
    codecs = {column.path_in_schema: column.compression for column in found}
    split = [c.path_in_schema for c in found if "BYTE_STREAM_SPLIT" in c.encodings]
    return {
        **settings,
        "compression": {n: "NONE" if c == "UNCOMPRESSED" else c for n, c in codecs.items()},
        "use_dictionary": [
            c.path_in_schema
            for c in found
            if c.has_dictionary_page and c.path_in_schema.partition(".")[0] != vector
        ],
        "use_byte_stream_split": split or False,
        "use_compliant_nested_type": not any(n.endswith(".list.item") for n in codecs),
        "use_deprecated_int96_timestamps": any(c.physical_type == "INT96" for c in found),
    }
