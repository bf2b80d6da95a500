"""A table in a LanceDB folder: opened, its columns chosen, and its engine's errors made typed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from simskip_vdb.connectors.addresses import metric_of
from simskip_vdb.connectors.folders import nothing_at
from simskip_vdb.connectors.lance_ids import holds_ids
from simskip_vdb.datatypes import Metric
from simskip_vdb.errors import (
    ConfigError,
    SimskipError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    UnsupportedIndexError,
    listed,
)

METRICS = {"cosine": Metric.COSINE, "dot": Metric.DOT, "l2": Metric.EUCLID}
"""By LanceDB's names."""
_OLDEST = (0, 38)  # before, an index was lost when all of its rows were written
_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "halffloat": np.dtype(np.float16),
}
_CONFLICT = re.compile(r"commit conflict|[Cc]oncurrent|Incompatible transaction")
_GONE = re.compile(r"[Nn]ot found")
_SOURCE = re.compile(r", (?:/\S+/)?[\w.-]+/\S+\.rs:\d+(?::\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns that matter.

    Attributes:
        vector: Name of the column of vectors.
        id: Name of the column of ids.
        kind: Arrow type of the vectors, a list of fixed size.
        id_kind: Arrow type of the ids.
        dim: Dimension of a vector.
        dtype: float32 or float16.
        names: All columns.
    """

    vector: str
    id: str
    kind: Any
    id_kind: Any
    dim: int
    dtype: np.dtype[Any]
    names: tuple[str, ...]

    @property
    def texts(self) -> bool:
        """Whether ids are text."""
        return not pa.types.is_integer(self.id_kind)


class Conflict(TransientStoreError):
    """Somebody else wrote meanwhile, and the engine did not; what was read is to be read again."""


@contextmanager
def engine_call(uri: str, doing: str, *, writes: bool = False) -> Iterator[None]:
    """Turn the engine's errors and panics into `StoreError`, and conflicts into `Conflict`.

    Where this `writes`, a conflict is also that somebody removed the files of the version read.
    """
    try:
        yield
    except SimskipError:
        raise
    except BaseException as error:
        # A panic derives from BaseException, and its class has no name that can be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = f"{uri}: {doing}: {_SOURCE.sub('', str(error))}"
        if _CONFLICT.search(told) or (writes and _GONE.search(told)):
            raise Conflict(f"{told}; the same command goes on") from error
        raise StoreError(told) from error


def open_table(path: Path, name: str | None, uri: str) -> tuple[Callable[[], Any], str]:
    """Open a table.

    Args:
        path: The folder that ``lancedb.connect`` takes.
        name: The table's name; None for the only one.
        uri: The store's address for messages.

    Returns:
        What opens the table at its latest version, and its name.

    Raises:
        StoreNotFoundError: There is no such folder or table.
        UnsupportedIndexError: It is a file, or a table that is written through a log.
        ConfigError: There are several tables, or lancedb is too old.
    """
    version = tuple(map(int, re.findall(r"\d+", lancedb.__version__)[:2]))
    if version < _OLDEST:
        raise ConfigError(
            f"{uri}: lancedb {lancedb.__version__} cannot write as safely as this needs; "
            f"pip install 'lancedb>={'.'.join(map(str, _OLDEST))}'"
        )
    if not path.exists():
        raise nothing_at(path, uri)
    if not path.is_dir():
        raise UnsupportedIndexError(f"{uri}: a file, not a folder that lancedb.connect takes")
    if (path / "_versions").is_dir():
        raise ConfigError(
            f"{uri}: the folder of a table, not that of its database; write "
            f"lancedb:{path.parent}?table={path.name.removesuffix('.lance')}"
        )
    with engine_call(uri, "opening"):
        database = lancedb.connect(path)
        names = _tables(database)
    if not names:
        raise StoreNotFoundError(f"{uri}: there is no LanceDB table in this folder")
    if name is None and len(names) > 1:
        raise ConfigError(f"{uri}: name one of its tables with ?table=NAME; it has {listed(names)}")
    chosen = names[0] if name is None else name
    if chosen not in names:
        raise StoreNotFoundError(f"{uri}: there is no table '{chosen}'; it has {listed(names)}")
    with engine_call(uri, f"opening the table '{chosen}'"):
        table = database.open_table(chosen)
        logged = getattr(table, "get_lsm_write_spec", lambda: None)() is not None
    if logged:
        raise UnsupportedIndexError(
            f"{uri}: the table is written through a log (LSM), past which nothing can be compared; "
            "take it off with table.unset_lsm_write_spec()"
        )
    return partial(database.open_table, chosen), chosen


def choose_columns(schema: Any, vector: str | None, ids: str | None, uri: str) -> Columns:  # noqa: ANN401 pyarrow
    """Choose the columns of vectors and of ids: those that were named, or the only ones.

    Raises:
        ConfigError: There is no such column, or there are several and none was named.
        UnsupportedIndexError: It holds something else.
    """
    names = tuple(schema.names)
    chosen = _vector_column(schema, vector, uri)
    kind = schema.field(chosen).type
    _refuse_type(kind, chosen, uri)
    by = _id_column(schema, ids, uri)
    for name in (chosen, by):
        quoted(name, uri)
    return Columns(
        vector=chosen,
        id=by,
        kind=kind,
        id_kind=schema.field(by).type,
        dim=kind.list_size,
        dtype=_DTYPES[str(kind.value_type)],
        names=names,
    )


def find_index(table: Any, column: str) -> tuple[str, Any] | None:  # noqa: ANN401 lancedb
    """Return the type and the statistics of the index over a column of vectors, if there is one."""
    for index in table.list_indices():
        kind = str(index.index_type)
        if column in index.columns and kind.upper().startswith("IVF"):
            return kind, table.index_stats(index.name)
    return None


def choose_metric(distance: str | None, given: str | None, uri: str) -> Metric:
    """Return how vectors are compared: by the index, or else as the address says, or else L2.

    Raises:
        UnsupportedIndexError: The index compares otherwise than vectors of floats are.
        ConfigError: The address says another metric than the index, or none that there is.
    """
    told = None if given is None else metric_of(uri.partition("?")[0], given)
    if distance is None:
        return told or METRICS["l2"]  # as LanceDB does where nobody names one
    found = METRICS.get(distance.lower())
    if found is None:
        raise UnsupportedIndexError(
            f"{uri}: its index compares by {distance}, which exact search and fitting do not go "
            "by; build one with cosine, dot or l2"
        )
    if told not in (None, found):
        raise ConfigError(f"{uri}: its index compares by {found.value}; leave ?metric= out")
    return found


def quoted(name: str, uri: str) -> str:
    """Return a column's name as SQL has it.

    Raises:
        ConfigError: It cannot be written there.
    """
    if "`" in name:
        raise ConfigError(f"{uri}: the column name {name!r} holds a backtick; rename it")
    return f"`{name}`"


def _tables(database: Any) -> list[str]:  # noqa: ANN401 lancedb
    names: list[str] = []
    token = None
    while True:
        page = database.list_tables(page_token=token)
        names += page.tables
        token = page.page_token
        if not token:
            return sorted(names)


def _vector_column(schema: Any, wanted: str | None, uri: str) -> str:  # noqa: ANN401 pyarrow
    fields = (field for field in schema if pa.types.is_fixed_size_list(field.type))
    names = [str(field.name) for field in fields]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is not None and wanted in schema.names:
        return wanted
    if wanted is None and not names:
        raise UnsupportedIndexError(
            f"{uri}: no column holds vectors (lists of a fixed size of float32 or float16); there "
            f"are {_described(schema)}"
        )
    asked = "name one" if wanted is None else f"there is no column '{wanted}'; name one"
    raise ConfigError(f"{uri}: {asked} with ?column=NAME; vectors are in {listed(names)}")


def _refuse_type(kind: Any, name: str, uri: str) -> None:  # noqa: ANN401 pyarrow
    if pa.types.is_fixed_size_list(kind) and str(kind.value_type) in _DTYPES:
        return
    why = "that is no vector of floats"
    if pa.types.is_struct(kind):
        why = "columns in columns are not refined"
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = pa.types.is_fixed_size_list(kind.value_type)
        why = "multivectors are not refined" if inner else "lists have no fixed size"
    elif pa.types.is_fixed_size_list(kind) and str(kind.value_type) == "double":
        why = "originals are kept as float32, so float64 could not be restored exactly"
    raise UnsupportedIndexError(
        f"{uri}: the column '{name}' holds {kind}, and {why}; write vectors as a list of a fixed "
        "size of float32 or float16"
    )


def _id_column(schema: Any, wanted: str | None, uri: str) -> str:  # noqa: ANN401 pyarrow
    names = [str(field.name) for field in schema if holds_ids(field.type)]
    if wanted is None:
        called = [name for name in names if name.lower() == "id"]
        for only in (called, names):
            if len(only) == 1:
                return only[0]
    elif wanted in names:
        return wanted
    elif wanted in schema.names:
        raise UnsupportedIndexError(
            f"{uri}: the column '{wanted}' holds {schema.field(wanted).type}; ids are integers or "
            f"text. Name another column (?id=NAME): {listed(names)}"
        )
    if not names:
        raise UnsupportedIndexError(
            f"{uri}: no column holds integers or text, by which rows could be known; there are "
            f"{_described(schema)}"
        )
    asked = "name the column of ids" if wanted is None else f"there is no column '{wanted}'; name"
    raise ConfigError(f"{uri}: {asked} with ?id=NAME; integers or text are in {listed(names)}")


def _described(schema: Any) -> str:  # noqa: ANN401 pyarrow
    described: Sequence[str] = [f"'{field.name}' ({field.type})" for field in schema]
    return listed(described)


def sync(folder: Path, since: float, uri: str) -> None:
    """Ask the system to write down files that changed since a time, for the engine does not.

    Raises:
        StoreError: It could not.
    """
    with engine_call(uri, "making writes durable"):
        for place, _, names in os.walk(folder):
            changed = [os.path.join(place, name) for name in names]
            changed = [file for file in changed if _changed(file, since)]
            for file in [*changed, *([place] if changed else [])]:
                _write_down(file)


def _changed(file: str, since: float) -> bool:
    try:
        return os.stat(file).st_mtime >= since
    except FileNotFoundError:
        return False


def _write_down(file: str) -> None:
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:  # taken away by somebody's clean-up
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
