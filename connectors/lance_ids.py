"""The ids of a Lance table's rows: integers or text, as arrays, Arrow columns and SQL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simskip_vdb.datatypes import Ids, Positions, id_names, id_text
from simskip_vdb.errors import DataError, UnsupportedIndexError


def holds_ids(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    """Tell whether a column's type can hold ids."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    )


def to_ids(column: Any, name: str, uri: str) -> Ids:  # noqa: ANN401 pyarrow
    """Return the ids in a column, shape (n,): int64, or text.

    Raises:
        DataError: A row has no id, or an empty one.
        UnsupportedIndexError: A number is beyond int64, or a text has a zero byte.
    """
    if column.null_count:
        raise DataError(
            f"{uri}: {column.null_count:,} rows have no '{name}'; fill it or remove them, or name "
            "another column (?id=NAME)"
        )
    if pa.types.is_integer(column.type):
        try:
            return np.asarray(column.cast(pa.int64()).to_numpy())
        except pa.ArrowInvalid:
            raise UnsupportedIndexError(
                f"{uri}: the column '{name}' holds a number that int64 cannot hold; name "
                "another column (?id=NAME)"
            ) from None
    if not len(column):
        return id_text([])
    texts = column.cast(pa.large_string())
    if pc.min(pc.binary_length(texts)).as_py() == 0:
        raise DataError(f"{uri}: a row's '{name}' is an empty text; give it an id")
    if pc.any(pc.match_substring(texts, "\0")).as_py():
        raise UnsupportedIndexError(
            f"{uri}: a row's '{name}' holds a zero byte; give it another id"
        )
    return id_text(texts.cast(pa.large_binary()).to_numpy(zero_copy_only=False))


def to_column(ids: Ids, kind: Any) -> Any:  # noqa: ANN401 pyarrow
    """Return ids as an Arrow array of a column's type."""
    if ids.dtype.kind == "S":
        return pa.array(ids.tolist(), pa.binary()).cast(kind)
    return pa.array(ids.astype(np.int64)).cast(kind)


def check_kind(ids: Ids, kind: Any, uri: str) -> Ids:  # noqa: ANN401 pyarrow
    """Return ids to look for, as the table may have them.

    Raises:
        DataError: They are text where the table has integers, or the other way round.
    """
    wanted = np.asarray(ids)
    texts = not pa.types.is_integer(kind)
    if len(wanted) and (wanted.dtype.kind == "S") != texts:
        names = "text" if texts else "integers"
        raise DataError(f"{uri}: ids are {names}, not {wanted.dtype}")
    return wanted


def among(ids: Ids, column: str) -> str:
    """Return SQL that lets rows of these ids through, of which there is one at least.

    Args:
        ids: Shape (n,).
        column: Their column's name in SQL.
    """
    if ids.dtype.kind != "S":
        return f"{column} IN ({','.join(map(str, ids.tolist()))})"
    texts = b"\0".join(ids.tolist()).decode().replace("'", "''").replace("\0", "','")
    return f"{column} IN ('{texts}')"


def between(ids: Ids, column: str) -> str:
    """Return SQL that lets rows through from the least of these ids to the greatest."""
    first, last = (_literal(each) for each in np.sort(ids)[[0, -1]].tolist())
    return f"{column} >= {first} AND {column} <= {last}"


def beyond(cursor: int | str, column: str) -> str:
    """Return SQL that lets rows through whose id is above one."""
    return f"{column} > {_literal(cursor)}"


def _literal(value: Any) -> str:  # noqa: ANN401 a number, or text
    if isinstance(value, bytes):
        value = value.decode()
    return f"""'{value.replace("'", "''")}'""" if isinstance(value, str) else str(int(value))


def ascend(ids: Ids) -> bool:
    """Tell whether each of these ids is above the one before."""
    return bool((ids[1:] > ids[:-1]).all())


def refuse_repeated(ordered: Ids, name: str, uri: str) -> None:
    """Refuse ids that stand for several rows.

    Args:
        ordered: Ids, ascending, shape (n,).
        name: Name of their column.
        uri: The store's address.

    Raises:
        DataError: There are any.
    """
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DataError(
            f"{uri}: {len(np.unique(twice)):,} ids (such as {id_names(twice[:1])[0]}) in the "
            f"column '{name}' stand for several rows; every row needs an id of its own. Name a "
            "column that has one (?id=NAME), or remove copies"
        )


def places_of(ids: Ids, wanted: Ids) -> Positions:
    """Return where each of `ids` stands among `wanted`, shape (len(ids),); all of them do."""
    order = np.argsort(wanted, kind="stable")
    return np.asarray(order[np.searchsorted(wanted, ids, sorter=order)])
