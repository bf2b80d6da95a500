"""Parquet files written and read by pyarrow alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simskip_vdb.datatypes import Ids, Vectors, id_text
from simskip_vdb.rows import ids_to_arrow


def kinds(dim: int) -> dict[str, Any]:
    """Return the Arrow types that a column of vectors has, by a name; not of one a dimension."""
    single, double, half = pa.float32(), pa.float64(), pa.float16()
    return {
        "fixed": pa.list_(single, dim),
        "list": pa.list_(single),
        "large_list": pa.large_list(single),
        "list_view": pa.list_view(single),
        "large_list_view": pa.large_list_view(single),
        "double": pa.list_(double),
        "fixed double": pa.list_(double, dim),
        "half": pa.list_(half),
        "fixed half": pa.list_(half, dim),
    }


COLUMNS = {"columns": pa.float32(), "double columns": pa.float64(), "half columns": pa.float16()}


def write_rows(
    path: Path,
    ids: Ids | None,
    vectors: Any,  # noqa: ANN401 float16, 32 or 64
    *,
    lists: str = "fixed",
    group: int = 1000,
    columns: Mapping[str, Any] | None = None,
) -> Path:
    """Write vectors, as lists of some kind or one column a dimension, with ids or without.

    The address of the latter has ``vector=dim_*``.
    """
    data: dict[str, Any] = {} if ids is None else {"id": ids_to_arrow(ids)}
    if lists in COLUMNS:
        kind = COLUMNS[lists].to_pandas_dtype()
        data |= {f"dim_{i}": pa.array(vectors[:, i].astype(kind)) for i in range(vectors.shape[1])}
    else:
        kind = kinds(vectors.shape[1])[lists]
        numbers = vectors.astype(kind.value_type.to_pandas_dtype())
        data["vector"] = pa.array(list(numbers), kind)
    table = pa.table({**data, **(columns or {})}).replace_schema_metadata({"made by": "a test"})
    pq.write_table(table, path, row_group_size=group, compression="zstd")
    return path


def raw_rows(path: Path) -> tuple[Ids, Vectors]:
    """Read ids, or positions, and vectors of a file."""
    table = pq.ParquetFile(path).read()
    held = table["id"].to_pylist() if "id" in table.column_names else list(range(len(table)))
    text = [value.encode() for value in held if isinstance(value, str)]
    ids = id_text(text) if text else np.array(held)
    if "vector" in table.column_names:
        return ids, np.array(table["vector"].to_pylist(), np.float32)
    names = [name for name in table.column_names if name.startswith("dim_")]
    return ids, np.stack([np.array(table[name], np.float32) for name in names], axis=1)
