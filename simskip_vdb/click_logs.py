"""The formats of click logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.click_tables import CSV, UBI, is_ubi
from simskip_vdb.datatypes import Vectors
from simskip_vdb.durable import json_of
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.parsing import (
    HIGHEST_GRADE,
    as_float32,
    lines_of,
    malformed,
    opened_parquet,
)

WITH_VECTORS = (".jsonl", ".jsonl.gz", ".parquet")
"""Endings of logs of queries and clicks."""
JUDGMENTS = (".tsv", ".tsv.gz", ".qrels", ".qrels.gz")
"""Endings of judgments of queries whose vectors are elsewhere."""
UNFINISHED = (".tmp", ".part")
"""Endings of files that are still being written."""
_LINES = 1024
_Record = tuple[str, NDArray[Any], list[str], int]
"""Query, vector, documents, grade."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogBlock:
    """Some lines of a log.

    Attributes:
        ids: Query of each line, length m.
        vectors: Shape (m, d).
        owners: Line of each click, length j.
        docs: Document of each click, length j.
        grades: Shape (j,).
    """

    ids: Sequence[str]
    vectors: Vectors
    owners: Sequence[int]
    docs: list[str]
    grades: NDArray[np.int64]


def list_logs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return click logs and other files that are done, each in the order of names.

    UBI's searches come before everything else, for its events name them.

    Args:
        folder: The folder, or one log.

    Raises:
        ConfigError: There is no such folder.
    """
    try:
        files = [folder] if folder.is_file() else sorted(filter(Path.is_file, folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed: {error.strerror or error}") from None
    done = [p for p in files if not (p.name.startswith(".") or p.name.endswith(UNFINISHED))]
    endings = (*WITH_VECTORS, *JUDGMENTS, *CSV)
    known = [path for path in done if path.name.endswith(endings) or is_ubi(path)]
    known.sort(key=lambda path: not path.name.startswith(UBI[0]))
    return known, [path for path in done if path not in known]


def read_log(path: Path) -> Iterator[LogBlock]:
    """Read a ``.jsonl`` or ``.parquet`` log, some lines at a time.

    Raises:
        ConfigError: There is no such file.
        DataError: It is malformed.
        MissingDependencyError: It is a parquet file and pyarrow is not installed.
    """
    return _parquet(path) if path.suffix == ".parquet" else _jsonl(path)


def _jsonl(path: Path) -> Iterator[LogBlock]:
    dim = 0
    for lines in _lines(path):
        records = []
        for number, line in lines:
            try:
                record = json_of(line)
            except ValueError as error:
                malformed(path, number, f"it is not JSON ({error})")
            try:
                records.append(_record(record))
            except ValueError as error:
                malformed(path, number, str(error))
            length = len(records[-1][1])
            dim = dim or length
            if length != dim:
                malformed(path, number, f"its vector has {length} numbers, not {dim}")
        ids, vectors, docs, grades = zip(*records, strict=True)
        yield _block(ids, as_float32(np.stack(vectors)), list(zip(docs, grades, strict=True)))


def _lines(path: Path) -> Iterator[list[tuple[int, str]]]:
    """Yield lines that are not blank with their index, some at a time."""
    lines = ((number, line) for number, line in enumerate(lines_of(path)) if line.strip())
    while part := list(islice(lines, _LINES)):
        yield part


def _record(record: Any) -> _Record:  # noqa: ANN401 any JSON
    if not isinstance(record, dict):
        raise ValueError('it is not {"id": …, "vector": [numbers], "doc": …}')
    docs, grade = _clicked(*(record.get(name) for name in ("doc", "docs", "grade")))
    return _name(record.get("id"), "id"), _vector(record.get("vector")), docs, grade


def _clicked(doc: object, docs: object, grade: object) -> tuple[list[str], int]:
    if not isinstance(docs, list | None):
        raise ValueError(f"its docs are {docs!r}, not a list")
    names = [*(docs or ()), *(() if doc is None else (doc,))]
    return [_name(name, "doc") for name in names], _grade(grade)


def _grade(value: object) -> int:
    if value is None:
        return 1
    # A column of integers with gaps comes as floats from many tools.
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise ValueError(f"its grade is {value!r}, not an integer")
    if value > HIGHEST_GRADE:
        raise ValueError(f"its grade is above {HIGHEST_GRADE}")
    return max(int(value), 0)


def _name(value: object, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"its {what} is {value!r}, not text or an integer")
    return str(value)


def _vector(value: object) -> NDArray[Any]:
    try:
        vector = np.array(value)
    except ValueError:
        vector = np.empty(0)
    if vector.ndim != 1 or not len(vector) or vector.dtype.kind not in "iuf":
        raise ValueError("its vector is not a list of numbers")
    return vector


def _block(
    ids: Sequence[str], vectors: Vectors, clicked: Sequence[tuple[list[str], int]]
) -> LogBlock:
    clicks = [(i, doc, grade) for i, (docs, grade) in enumerate(clicked) for doc in docs]
    return LogBlock(
        ids=ids,
        vectors=vectors,
        owners=[click[0] for click in clicks],
        docs=[click[1] for click in clicks],
        grades=np.array([click[2] for click in clicks], np.int64),
    )


def _parquet(path: Path) -> Iterator[LogBlock]:
    start = 0
    with opened_parquet(path, "click log") as file:
        import pyarrow as pa

        there = set(file.schema_arrow.names)
        if not {"id", "vector"} <= there:
            raise DataError(f"{path} needs the columns id and vector (lists of numbers)")
        columns = sorted(there & {"id", "vector", "doc", "docs", "grade"})
        for batch in file.iter_batches(_LINES, columns=columns):
            table = dict(zip(columns, map(batch.column, columns), strict=True))
            vectors = table.pop("vector").cast(pa.list_(pa.float64()))
            rows = {name: column.to_pylist() for name, column in table.items()}
            yield _rows(path, start, rows, vectors)
            start += batch.num_rows


def _rows(path: Path, start: int, rows: Mapping[str, list[Any]], vectors: Any) -> LogBlock:  # noqa: ANN401 an arrow array
    lengths = np.array(vectors.value_lengths().fill_null(0))
    ids, clicked = [], []
    given = (rows.get(name, repeat(None)) for name in ("doc", "docs", "grade"))
    for i, (name, *click) in enumerate(zip(rows["id"], *given)):  # noqa: B905 some never end
        try:
            ids.append(_name(name, "id"))
            clicked.append(_clicked(*click))
            if not lengths[i] or lengths[i] != lengths[0]:
                raise ValueError(f"its vector has {lengths[i]} numbers, not {lengths[0] or 'some'}")
        except ValueError as error:
            raise DataError(f"{path}, row {start + i + 1}: {error}; correct or remove it") from None
    numbers = vectors.flatten()
    if numbers.null_count:
        row = int(np.flatnonzero(np.array(numbers.is_null()))[0]) // int(lengths[0])
        raise DataError(f"{path}, row {start + row + 1}: a number of its vector is null")
    return _block(ids, as_float32(numbers.to_numpy().reshape(len(ids), -1)), clicked)
