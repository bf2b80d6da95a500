"""Read query vectors, ids, judgments and labels from files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Ids, Vectors, id_names
from simskip_vdb.durable import json_of
from simskip_vdb.errors import ConfigError, DataError, MissingDependencyError

HIGHEST_GRADE = 1000
"""trec_eval allocates a counter for every grade up to the highest."""
LONGEST_LINE = 1 << 24
"""Characters: a long vector fits, and not the gigabyte of one sign that a small gzip can hold."""
_BLOCK, _PENDING = 1 << 14, 1 << 20
"""Lines that are read at a time, and judgments gathered before repeated ones are merged."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Qrels:
    """Judgments as they stand in a file.

    Attributes:
        source: The file, for messages.
        query_ids: Query of each judgment, length j.
        doc_ids: External document id of each judgment, length j.
        grades: Shape (j,), int32, 0 to `HIGHEST_GRADE`; negative grades have become 0.
        repeated: How many more lines there were, each equal to one of these.
    """

    source: str
    query_ids: list[str]
    doc_ids: list[str]
    grades: NDArray[np.int32]
    repeated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowColumn:
    """One value for each row of the index: its document id or its label.

    Attributes:
        source: Where the values came from, for messages.
        values: Length r.
        row_ids: Index ids that the values belong to, shape (r,); None where value i belongs to
            index id i.
    """

    source: str
    values: list[str]
    row_ids: Ids | None = None


def read_vectors(path: Path) -> Vectors:
    """Read a ``.npy`` file of float16, float32 or float64, shape (m, d).

    Raises:
        ConfigError: There is no such file.
        DataError: The file holds anything else.
    """
    with _opened(path):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # it claims what it holds
        except (ValueError, EOFError) as error:
            raise DataError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{getattr(array, 'dtype', type(array))} of shape {getattr(array, 'shape', '?')}"
        raise DataError(f"{path} holds {found}; query vectors are floats of shape (m, d)")
    return as_float32(np.array(array))


def read_query_table(path: Path) -> tuple[list[str], Vectors]:
    """Read ids and vectors from ``.parquet`` or ``.jsonl`` with columns ``id`` and ``vector``.

    Raises:
        ConfigError: There is no such file.
        DataError: A column is missing, or vectors are not numbers of one length.
        MissingDependencyError: pyarrow is not installed (parquet only).
    """
    with _opened(path):
        return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def read_lines(path: Path) -> list[str]:
    """Read a text file of one value a line; blank lines are allowed at the end only.

    Raises:
        ConfigError: There is no such file.
        DataError: It is not UTF-8, or a line before the last value is blank.
    """
    known: dict[str, str] = {}
    values = [known.setdefault(line, line) for line in map(str.strip, _trimmed_lines(path))]
    if "" in values:
        malformed(path, values.index(""), "it is blank")
    return values


def read_row_column(path: Path) -> RowColumn:
    """Read one value a line for index ids 0…n-1, or lines ``index_id<TAB>value``.

    Raises:
        ConfigError: There is no such file.
        DataError: A line is malformed, or an index id occurs twice.
    """
    values = read_lines(path)
    if not values or "\t" not in values[0]:
        return RowColumn(source=str(path), values=values)
    pairs = [line.split("\t") for line in values]
    _check_widths(path, pairs, 0, 2, "index_id<TAB>value")
    ids = _index_ids([pair[0].strip() for pair in pairs])
    unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if len(unique) < len(ids):
        twice = int(np.flatnonzero(counts > 1)[0])
        again = id_names(unique[twice : twice + 1])[0]
        malformed(path, int(first[twice]), f"index id {again} occurs more than once")
    return RowColumn(source=str(path), values=[pair[1].strip() for pair in pairs], row_ids=ids)


def read_qrels(path: Path) -> Qrels:
    """Read judgments, plain or gzipped.

    TREC form has four columns between white space (query, iteration, document, grade), BEIR form
    three between tabs (query, document, grade). A first line whose grade is no number is a header;
    lines before it that begin with ``#`` are comments.

    Raises:
        ConfigError: There is no such file.
        DataError: A line is malformed, or a grade is not an integer up to `HIGHEST_GRADE`.
    """
    lines = _trimmed_lines(path)
    told = ((n, line) for n, line in enumerate(lines) if not line.startswith("#"))
    number, head = next(told, (0, None))
    if head == "":
        malformed(path, number, "it is blank")
    if head is None:
        raise DataError(f"{path} is empty; judgments are TREC (4 columns) or BEIR TSV (3 columns)")
    columns = head.split("\t")
    beir = len(columns) == 3
    judged = Judged()
    if _is_header(columns if beir else head.split()):
        number += 1
    else:
        lines = chain([head], lines)
    while block := list(islice(lines, _BLOCK)):
        judged.add(*_columns(path, block, number, beir=beir))
        number += len(block)
    return judged.qrels(str(path))


def _is_header(columns: Sequence[str]) -> bool:
    """Tell whether a first line, of as many columns as judgments have, names them."""
    try:
        float(columns[-1])
    except ValueError:
        return len(columns) in (3, 4)
    return False


def _columns(
    path: Path, lines: Sequence[str], before: int, *, beir: bool
) -> tuple[list[str], list[str], NDArray[np.int32]]:
    """Return queries, documents and grades of lines that `before` others precede."""
    if beir:
        rows = [line.split("\t") for line in lines]
        _check_widths(path, rows, before, 3, "query-id<TAB>corpus-id<TAB>score (BEIR)")
    else:
        rows = [line.split() for line in lines]
        _check_widths(path, rows, before, 4, "query iteration document grade (TREC)")
    grades = _integers(path, [row[-1] for row in rows], before, "grade", np.int32)
    too_high = np.flatnonzero(grades > HIGHEST_GRADE)
    if len(too_high):
        malformed(path, int(too_high[0]) + before, f"a grade is above {HIGHEST_GRADE}")
    return (
        [row[0].strip() for row in rows],
        [row[-2].strip() for row in rows],
        np.maximum(grades, 0),
    )


class Judged:
    """Judgments as they come: a name is held once, and what says the same is merged."""

    def __init__(self) -> None:
        self._queries: dict[str, int] = {}
        self._docs: dict[str, int] = {}
        self._parts: list[NDArray[np.int64]] = []
        self._lines = 0

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(
        self, queries: Iterable[str], docs: Sequence[str], grades: NDArray[np.integer[Any]]
    ) -> None:
        """Add judgments, some of which may be there."""
        if not docs:
            return
        owners = [self._queries.setdefault(name, len(self._queries)) for name in queries]
        places = [self._docs.setdefault(name, len(self._docs)) for name in docs]
        self._parts.append(np.array([owners, places, grades], np.int64))
        self._lines += len(docs)
        if sum(part.shape[1] for part in self._parts[1:]) > _PENDING:
            self._merge()

    def qrels(self, source: str) -> Qrels:
        """Return them as `merged` leaves them."""
        self._merge()
        queries, docs = list(self._queries), list(self._docs)
        owners, places, grades = self._parts[0]
        return Qrels(
            source=source,
            query_ids=[queries[i] for i in owners.tolist()],
            doc_ids=[docs[i] for i in places.tolist()],
            grades=grades.astype(np.int32),
            repeated=self._lines - len(grades),
        )

    @staticmethod
    def merged(together: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave out what equals an earlier one, of queries, documents and grades, shape (3, n)."""
        order = np.lexsort(together)
        again = (np.diff(together[:, order]) == 0).all(axis=0)
        first = order[np.concatenate([[True], ~again])[: len(order)]]
        return together[:, np.sort(first)]

    def _merge(self) -> None:
        together = np.concatenate([np.empty((3, 0), np.int64), *self._parts], axis=1)
        self._parts = [self.merged(together)]


@contextmanager
def _opened(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open text, plain or gzipped, and turn what goes wrong while reading it into our errors."""
    with _opened(path):
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        opener: Any = gzip.open if zipped else open
        try:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                yield file
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}") from error
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file: {error}") from error


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text, plain or gzipped, none of them longer than `LONGEST_LINE`."""
    with open_text(path) as file:
        for number in count():
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                malformed(path, number, f"it has more than {LONGEST_LINE:,} characters")
            yield line


def _trimmed_lines(path: Path) -> Iterator[str]:
    """Yield lines without white space behind them, and without blank lines behind the last."""
    blank = 0
    for line in map(str.rstrip, lines_of(path)):
        if line:
            yield from repeat("", blank)
            yield line
        blank = 0 if line else blank + 1


def malformed(path: Path, index: int, why: str) -> NoReturn:
    """Raise `DataError` about the line with this index, counted from 0."""
    raise DataError(f"{path}, line {index + 1}: {why}; correct or remove the line")


def _check_widths(
    path: Path, rows: Sequence[Sequence[str]], skipped: int, width: int, form: str
) -> None:
    if any(len(row) != width for row in rows):
        bad = next(i for i, row in enumerate(rows) if len(row) != width)
        malformed(path, bad + skipped, f"{len(rows[bad])} columns instead of {form}")


def _integers(
    path: Path, texts: Sequence[str], skipped: int, what: str, dtype: type[np.signedinteger[Any]]
) -> NDArray[Any]:
    limits = np.iinfo(dtype)
    with suppress(ValueError, OverflowError):
        numbers = [_whole(text) for text in texts]
        if limits.min <= min(numbers, default=0) and max(numbers, default=0) <= limits.max:
            return np.array(numbers, dtype)
    bad = next(i for i, text in enumerate(texts) if not _fits(text, limits))
    malformed(path, bad + skipped, f"{what} {texts[bad]!r} is not an integer in range")


def _index_ids(texts: Sequence[str]) -> Ids:
    """Return index ids as integers; as text where one is no integer as an index writes it."""
    limits = np.iinfo(np.int64)
    if all(_fits(text, limits) and str(_whole(text)) == text for text in texts):
        return np.array([int(text) for text in texts], np.int64)
    return np.array([text.encode() for text in texts])


def _whole(text: str) -> int:
    """Return a whole number, which may be written as 1.0."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number != number // 1:
            raise
        return int(number)


def _fits(text: str, limits: np.iinfo[Any]) -> bool:
    try:
        return limits.min <= _whole(text) <= limits.max
    except (ValueError, OverflowError):
        return False


def json_record(path: Path, number: int, line: str) -> Mapping[str, Any]:
    """Return the JSON object that is a line of a file, by its index.

    Raises:
        DataError: It is none.
    """
    try:
        record = json_of(line)
    except ValueError as error:
        malformed(path, number, f"it is not JSON ({error})")
    if not isinstance(record, dict):
        malformed(path, number, "it is no JSON object")
    return record


@contextmanager
def opened_parquet(path: Path, what: str) -> Iterator[Any]:
    """Open a Parquet file, and blame it for what goes wrong while it is read.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        DataError: It is damaged, or of another kind.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "eval") from error
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged, or no {what}: {error}") from error


def _read_parquet(path: Path) -> tuple[list[str], Vectors]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "eval") from error
    try:
        table = pq.read_table(path, columns=["id", "vector"]).combine_chunks()
        ids = table.column("id").to_pylist()
        cells = table.column("vector").cast(pa.list_(pa.float64())).combine_chunks()
    except (pa.ArrowException, KeyError) as error:
        raise DataError(
            f"{path} needs the columns id and vector (lists of numbers): {error}"
        ) from error
    if len(ids) == 0:
        raise DataError(f"{path} has no rows")
    if cells.null_count or cells.flatten().null_count or None in ids:
        raise DataError(f"{path}: an id or a vector is null; give every query both")
    lengths = np.asarray(cells.value_lengths())
    if np.ptp(lengths):
        raise DataError(f"{path}: vectors have from {lengths.min()} to {lengths.max()} numbers")
    numbers = cells.flatten().to_numpy().reshape(len(ids), -1)
    return [str(i) for i in ids], as_float32(numbers)


def _read_jsonl(path: Path) -> tuple[list[str], Vectors]:
    ids: list[str] = []
    vectors: list[NDArray[np.float64]] = []
    for number, line in enumerate(lines_of(path)):
        if not line.strip():
            continue
        try:
            record = json_of(line)
            ids.append(str(record["id"]))
            vectors.append(np.array(record["vector"], dtype=np.float64))
        except (ValueError, TypeError, KeyError) as error:
            malformed(path, number, f'it is not {{"id": …, "vector": [numbers]}} ({error!r})')
        if vectors[-1].shape != vectors[0].shape or vectors[-1].ndim != 1:
            malformed(path, number, f"its vector has shape {vectors[-1].shape}")
    if not vectors:
        raise DataError(f"{path} has no rows")
    return ids, as_float32(np.stack(vectors))


def as_float32(array: NDArray[Any]) -> Vectors:
    """Return numbers as float32, without noise where they are too large for it."""
    # A float64 beyond float32 becomes infinite, and such queries are skipped and counted.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)
