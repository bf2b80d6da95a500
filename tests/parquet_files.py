"""Parquet files written and read by pyarrow alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simskip_vdb.datatypes import ID_TEXT, Ids, Vectors
from simskip_vdb.rows import ids_to_arrow


def write_rows(
    path: Path,
    ids: Ids,
    vectors: Vectors,
    *,
    lists: str = "fixed",
    group: int = 1000,
    columns: Mapping[str, Any] | None = None,
) -> Path:
    """Write ids and vectors, as one of three kinds of list, and other columns."""
    dim = vectors.shape[1]
    kinds = {
        "fixed": pa.list_(pa.float32(), dim),
        "list": pa.list_(pa.float32()),
        "large_list": pa.large_list(pa.float32()),
    }
    data = {"id": ids_to_arrow(ids), "vector": pa.array(list(vectors), kinds[lists])}
    table = pa.table({**data, **(columns or {})}).replace_schema_metadata({"made by": "a test"})
    pq.write_table(table, path, row_group_size=group, compression="zstd")
    return path


def raw_rows(path: Path) -> tuple[Ids, Vectors]:
    """Read ids and vectors of a file."""
    table = pq.ParquetFile(path).read()
    ids = np.array(table["id"].to_pylist())
    if ids.dtype.kind == "U":
        ids = ids.astype(ID_TEXT)
    return ids, np.array(table["vector"].to_pylist(), np.float32)
