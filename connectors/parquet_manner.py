"""How a Parquet file was written, as far as it tells, and whether it can be written so again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simskip_vdb.errors import StoreError, UnsupportedIndexError

_KNOWN = frozenset(signature(pq.ParquetWriter.__init__).parameters)
_WHOLE = ("INT32", "INT64")
_UNSURE = ("is_", "force_")  # how pyarrow came to know a type of times
_PLAIN = {("INT32", 32), ("INT64", 64)}


def manner(file: Any, vectors: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401 pyarrow
    """Return the settings by which a file was written; of vectors, no dictionary.

    Args:
        file: The open file.
        vectors: Names of the columns that hold vectors.
    """
    told = file.metadata.metadata or {}
    settings: dict[str, Any] = {
        "version": file.metadata.format_version,
        "store_schema": b"ARROW:schema" in told,
    }
    if not file.num_row_groups:
        return _known(settings)
    group = file.metadata.row_group(0)
    found = [group.column(i) for i in range(group.num_columns)]
    codecs = {column.path_in_schema: column.compression for column in found}
    split = [c.path_in_schema for c in found if "BYTE_STREAM_SPLIT" in c.encodings]
    decimals = [c for i, c in enumerate(found) if _is_decimal(file.schema.column(i))]
    return _known(
        {
            **settings,
            "compression": {n: "NONE" if c == "UNCOMPRESSED" else c for n, c in codecs.items()},
            "use_dictionary": [
                c.path_in_schema
                for c in found
                if c.has_dictionary_page and not is_of(c.path_in_schema, vectors)
            ],
            "use_byte_stream_split": split or False,
            "use_compliant_nested_type": not any(n.endswith(".list.item") for n in codecs),
            "use_deprecated_int96_timestamps": any(c.physical_type == "INT96" for c in found),
            "write_statistics": [c.path_in_schema for c in found if c.is_stats_set],
            "write_page_index": any(c.has_offset_index for c in found),
            "sorting_columns": group.sorting_columns or None,
            "store_decimal_as_integer": any(c.physical_type in _WHOLE for c in decimals),
        }
    )


@contextmanager
def writer_like(file: Any, target: Path | BytesIO, vectors: Sequence[str]) -> Iterator[Any]:  # noqa: ANN401 pyarrow
    """Write to `target` as a file was written, with the same schema and metadata.

    Args:
        file: The open file.
        target: Where to.
        vectors: Names of the columns that hold vectors.
    """
    settings = manner(file, vectors)
    with pq.ParquetWriter(target, file.schema_arrow, **settings) as writer:
        yield writer
        told = file.schema_arrow.metadata
        if told and not settings["store_schema"]:  # then pyarrow leaves it out
            writer.add_key_value_metadata(told)


def same_columns(one: Any, other: Any) -> bool:  # noqa: ANN401 pyarrow
    """Tell whether two files' schemas hold the same columns, however they say it."""
    return len(one) == len(other) and _first_difference(one, other) is None


def is_of(path: str, names: Sequence[str]) -> bool:
    """Tell whether a leaf's path is that of one of these columns."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def refuse_unwritable(path: Path, file: Any, uri: str, vectors: Sequence[str]) -> None:  # noqa: ANN401 pyarrow
    """Refuse a file whose other columns pyarrow would write back as others.

    Raises:
        UnsupportedIndexError: It would.
        StoreError: The file is damaged.
    """
    _refuse_far_times(path, file, uri)
    sink = BytesIO()
    try:
        with writer_like(file, sink, vectors) as writer:
            writer.write_table(file.schema_arrow.empty_table())
        again = pq.ParquetFile(BytesIO(sink.getvalue()))
    except (OSError, pa.ArrowException, NotImplementedError) as error:
        raise UnsupportedIndexError(
            f"{uri}: its columns could not be written back ({error}); write them as other types"
        ) from error
    if not same_columns(file.schema, again.schema):
        first = _first_difference(file.schema, again.schema)
        what = "they" if first is None else f"'{first.path}' ({_shown(first)})"
        raise UnsupportedIndexError(
            f"{uri}: of its columns, {what} would be written back as another type; write it as "
            "another type, or leave it out"
        )


def _refuse_far_times(path: Path, file: Any, uri: str) -> None:  # noqa: ANN401 pyarrow
    """Refuse times that pyarrow would write back as others.

    It reads those of 96 bits, as Spark writes them, as nanoseconds, and wraps them around silently
    outside 1677…2262.
    """
    schema, leaves = file.schema, range(len(file.schema))
    old = [schema.column(i).path for i in leaves if schema.column(i).physical_type == "INT96"]
    names = sorted({leaf.partition(".")[0] for leaf in old} & {*file.schema_arrow.names})
    for name in names:
        for group in range(file.num_row_groups):
            try:
                micros = pq.ParquetFile(path, coerce_int96_timestamp_unit="us")
                column = micros.read_row_group(group, columns=[name])[name]
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"{uri}: {error}") from error
            try:
                column.cast(file.schema_arrow.field(name).type)
            except pa.ArrowException as error:
                raise UnsupportedIndexError(
                    f"{uri}: the column '{name}' holds times of 96 bits that nanoseconds do not "
                    "reach, so they could not be written back; write it as TIMESTAMP_MICROS"
                ) from error


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what an older version of pyarrow does not know."""
    return {name: value for name, value in settings.items() if name in _KNOWN}


def _is_decimal(column: Any) -> bool:  # noqa: ANN401 pyarrow
    return str(column.logical_type).startswith("Decimal")


def _first_difference(one: Any, other: Any) -> Any:  # noqa: ANN401 pyarrow
    """Return the first leaf that another schema has otherwise; None where there is none."""
    for place in range(min(len(one), len(other))):
        if _told(one.column(place)) != _told(other.column(place)):
            return one.column(place)
    return None


def _told(column: Any) -> tuple[Any, ...]:  # noqa: ANN401 pyarrow
    """Return what a schema says of a leaf; whole numbers of the usual width need not be said."""
    logical = json.loads(column.logical_type.to_json())
    if (column.physical_type, logical.get("bitWidth")) in _PLAIN and logical.get("isSigned"):
        logical = {"Type": "None"}
    sure = {name: value for name, value in logical.items() if not name.startswith(_UNSURE)}
    return (
        column.path,
        column.max_definition_level,
        column.max_repetition_level,
        column.physical_type,
        column.length,
        sure,
    )


def _shown(column: Any) -> str:  # noqa: ANN401 pyarrow
    logical = str(column.logical_type)
    return logical if logical != "None" else str(column.physical_type)
