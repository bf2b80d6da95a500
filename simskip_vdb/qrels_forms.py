"""Judgments in the forms of tools: JSON as ranx has it, tables as data hubs do, ir_datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.durable import json_of
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.parsing import (
    HIGHEST_GRADE,
    Judged,
    Qrels,
    json_record,
    lines_of,
    malformed,
    opened_parquet,
    read_qrels,
)

IR_DATASETS = "ir_datasets:"
"""Begins the name of a data set of the package ir_datasets, in place of a path."""
_BLOCK = 1 << 14
_COLUMNS = {
    "query": ("query-id", "query_id", "q_id", "qid", "query"),
    "doc": ("corpus-id", "corpus_id", "doc_id", "docid", "doc-id", "doc", "document"),
    "grade": ("score", "grade", "relevance", "rel", "label"),
}
_Row = tuple[str, str, float]


def read_any_qrels(path: Path) -> Qrels:
    """Read judgments in whatever form a path or a name gives them.

    ``.json`` is ``{query: {document: grade}}``, as ranx, pytrec_eval and BEIR's own code have it;
    ``.jsonl`` and ``.parquet`` are tables of query, document and grade, as data hubs and ranx have
    them; ``ir_datasets:NAME`` is a data set of that package; all else is text, see `read_qrels`.

    Raises:
        ConfigError: There is no such file or data set, or ir_datasets is not installed.
        DataError: It is malformed, or a grade is not an integer up to `HIGHEST_GRADE`.
        MissingDependencyError: pyarrow is not installed (``.parquet``).
    """
    name = str(path)
    if name.startswith(IR_DATASETS):
        return _judged(name, _ir_datasets(name.removeprefix(IR_DATASETS)))
    if path.suffix == ".json":
        return _judged(name, _nested(path, _json(path)))
    if path.suffix == ".jsonl":
        return _judged(name, _json_lines(path))
    if path.suffix == ".parquet":
        return _judged(name, _parquet(path))
    return read_qrels(path)


def read_ids(path: Path) -> list[str]:
    """Read ``_id`` or ``id`` of each line of a ``.jsonl``, as BEIR's queries and corpus have it.

    Raises:
        ConfigError: There is no such file.
        DataError: A line has no id.
    """
    ids = []
    for number, line in enumerate(lines_of(path)):
        if line.strip():
            record = json_record(path, number, line)
            found = record.get("_id", record.get("id"))
            if not isinstance(found, str | int) or isinstance(found, bool):
                malformed(path, number, "it has no _id")
            ids.append(str(found))
    return ids


def _judged(source: str, rows: Iterable[_Row]) -> Qrels:
    judged, rows = Judged(), iter(rows)
    while block := list(islice(rows, _BLOCK)):
        queries, docs, grades = zip(*block, strict=True)
        judged.add(queries, docs, _grades(source, grades))
    if not judged:
        raise DataError(f"{source} has no judgments")
    return judged.qrels(source)


def _grades(source: str, given: Iterable[Any]) -> NDArray[np.int32]:
    try:
        grades = np.array(list(given), np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{source}: a grade is no number; correct or remove it") from None
    bad = np.flatnonzero(~((grades % 1 == 0) & (grades <= HIGHEST_GRADE)))
    if len(bad):
        raise DataError(
            f"{source}: grade {grades[bad[0]]:g} is not an integer up to {HIGHEST_GRADE}; correct "
            "or remove it"
        )
    return np.maximum(grades, 0).astype(np.int32)


def _json(path: Path) -> Any:  # noqa: ANN401 any JSON
    try:
        return json_of(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; check the path") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None


def _nested(path: Path, found: Any) -> Iterator[_Row]:  # noqa: ANN401 any JSON
    if not isinstance(found, Mapping):
        raise DataError(f"{path} is not {{query: {{document: grade}}}}; correct it")
    for query, docs in found.items():
        if not isinstance(docs, Mapping):
            raise DataError(f"{path}: query {query!r} has no {{document: grade}}; correct it")
        for doc, grade in docs.items():
            yield str(query), str(doc), grade


def _ir_datasets(name: str) -> Iterator[_Row]:
    package = _package("ir_datasets")
    try:
        found = package.load(name)
    except KeyError:
        raise ConfigError(
            f"ir_datasets knows no data set {name!r}; its names are listed on ir-datasets.com"
        ) from None
    if not found.has_qrels():
        raise ConfigError(f"{name} of ir_datasets has no judgments; name one such as {name}/test")
    for judgment in found.qrels_iter():
        yield judgment.query_id, judgment.doc_id, judgment.relevance


def _package(name: str) -> Any:  # noqa: ANN401 a module without types
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} is not installed, which reads this: pip install {name}"
        ) from error


def _json_lines(path: Path) -> Iterator[_Row]:
    names: dict[str, str] = {}
    for number, line in enumerate(lines_of(path)):
        if line.strip():
            record = json_record(path, number, line)
            names = names or _columns_of(path, list(record))
            values = [record.get(names[what]) for what in _COLUMNS]
            if None in values:
                malformed(path, number, f"it lacks one of {', '.join(names.values())}")
            yield str(values[0]), str(values[1]), values[2]  # type: ignore[misc]


def _parquet(path: Path) -> Iterator[_Row]:
    if not path.exists():
        raise ConfigError(f"there is no file {path}; check the path")
    with opened_parquet(path, "Parquet file") as file:
        names = list(_columns_of(path, file.schema_arrow.names).values())
        for batch in file.iter_batches(_BLOCK, columns=names):
            columns = [batch.column(name).to_pylist() for name in names]
            yield from zip(map(str, columns[0]), map(str, columns[1]), columns[2], strict=True)


def _columns_of(path: Path, names: list[str]) -> dict[str, str]:
    lower = {name.lower(): name for name in reversed(names)}
    found = {}
    for what, spelt in _COLUMNS.items():
        name = next((lower[name] for name in spelt if name in lower), None)
        if name is None:
            raise DataError(
                f"{path} has no column of its {what}; name it one of {', '.join(spelt)}"
            )
        found[what] = name
    return found
