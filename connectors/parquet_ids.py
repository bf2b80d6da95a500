"""The ids of a Parquet file's rows: numbers or text, whatever type their column has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from simskip_vdb.datatypes import ID_TEXT, Ids, id_names, id_text
from simskip_vdb.errors import DataError, UnsupportedIndexError

POSITIONS = "-"
"""Stands in an address for the name of a column of ids where rows are known by their positions."""
_MOST_BYTES = 1 << 33
_UUID_BYTES, _UUID_DASHES = 16, (8, 13, 18, 23)


def check_ids(kind: Any, name: str, uri: str) -> None:  # noqa: ANN401 pyarrow
    """Refuse a column that cannot hold ids.

    Raises:
        UnsupportedIndexError: It holds neither whole numbers nor text nor bytes.
    """
    plain = _plain(kind)
    if not (is_number(plain) or _is_text(plain) or _is_binary(plain)):
        raise UnsupportedIndexError(
            f"{uri}: the column '{name}' holds {kind}; ids are integers or text. Name another "
            f"column (?id=NAME), or let rows be known by their positions (?id={POSITIONS})"
        )


def is_number(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    """Tell whether a column's ids are numbers, which text stands for where one is too large."""
    plain = _plain(kind)
    return bool(pa.types.is_integer(plain) or pa.types.is_decimal(plain))


def read_ids(column: Any, name: str, uri: str, *, texts: bool, uuids: bool) -> Ids:  # noqa: ANN401 pyarrow
    """Return the ids in a column, shape (n,): int64, or text of whatever length.

    Numbers that int64 does not hold, and with `texts` all, become text in decimal digits; UUIDs
    become text of 36 characters; other bytes are text where they are UTF-8, else ``0x`` and hex
    digits.

    Args:
        column: A chunked array.
        name: The column's name, for messages.
        uri: The file's address, for messages.
        texts: Take numbers as text, too.
        uuids: Sixteen bytes are a UUID.

    Raises:
        DataError: A row has no id, or an empty one.
        UnsupportedIndexError: A text is no UTF-8 or has a zero byte, or they take too much memory.
    """
    if column.null_count:
        raise DataError(
            f"{uri}: {column.null_count:,} rows have no '{name}'; fill it or remove them, name "
            f"another column (?id=NAME), or let rows be known by their positions (?id={POSITIONS})"
        )
    kind = _plain(column.type)
    if isinstance(column.type, pa.DictionaryType):
        column = column.cast(column.type.value_type)
    if isinstance(column.type, pa.BaseExtensionType):
        uuids |= column.type.extension_name == "arrow.uuid"
        column = pa.chunked_array([c.storage for c in column.chunks], kind)
    if is_number(kind):
        return _numbers(column, texts=texts)
    if uuids and pa.types.is_fixed_size_binary(kind) and kind.byte_width == _UUID_BYTES:
        return _uuids(column)
    found = _bytes(column, kind, name, uri)
    lengths = pc.binary_length(found)
    longest = pc.max(lengths).as_py() if len(found) else 0
    if len(found) * max(longest, ID_TEXT.itemsize) > _MOST_BYTES:
        raise UnsupportedIndexError(
            f"{uri}: '{name}' holds texts of up to {longest:,} bytes, which for {len(found):,} "
            f"rows do not fit into memory; name a column of shorter ones (?id=NAME), or let rows "
            f"be known by their positions (?id={POSITIONS})"
        )
    if len(found) and not pc.min(lengths).as_py():
        raise DataError(f"{uri}: a row's '{name}' is an empty text; give it an id")
    return id_text(found.to_numpy(zero_copy_only=False) if len(found) else [])


def refuse_repeated(twice: Ids, name: str | None, uri: str) -> None:
    """Refuse ids that stand for several rows.

    Args:
        twice: Each of them at least once, shape (m,).
        name: Name of their column.
        uri: The address of what holds them.

    Raises:
        DataError: There are any.
    """
    if len(twice):
        column = "" if name is None else f" in the column '{name}'"
        raise DataError(
            f"{uri}: {len(np.unique(twice)):,} ids (such as {id_names(twice[:1])[0]}){column} "
            "stand for several rows; every row needs an id of its own. Name a column that has one "
            f"(?id=NAME), let rows be known by their positions (?id={POSITIONS}), or remove copies"
        )


def _plain(kind: Any) -> Any:  # noqa: ANN401 pyarrow
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_text(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is(kind, "is_string_view")
    )


def _is_binary(kind: Any) -> bool:  # noqa: ANN401 pyarrow
    fixed = pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or fixed
        or _is(kind, "is_binary_view")
    )


def _is(kind: Any, asked: str) -> bool:  # noqa: ANN401 pyarrow
    """Ask what older versions of pyarrow do not know."""
    return hasattr(pa.types, asked) and bool(getattr(pa.types, asked)(kind))


def _numbers(column: Any, *, texts: bool) -> Ids:  # noqa: ANN401 pyarrow
    if not texts:
        try:
            return np.asarray(column.cast(pa.int64()).to_numpy())
        except pa.ArrowInvalid:  # larger than that, or with a fraction
            pass
    found = column.cast(pa.string()).cast(pa.binary())
    return id_text(found.to_numpy(zero_copy_only=False) if len(found) else [])


def _uuids(column: Any) -> Ids:  # noqa: ANN401 pyarrow
    raw = column.combine_chunks()
    chunks = raw.chunks if isinstance(raw, pa.ChunkedArray) else [raw]
    data = b"".join(
        memoryview(c.buffers()[1])[c.offset * _UUID_BYTES : (c.offset + len(c)) * _UUID_BYTES]
        for c in chunks
        if len(c)
    )
    digits = np.frombuffer(data.hex().encode(), np.uint8).reshape(-1, 2 * _UUID_BYTES)
    text: NDArray[np.uint8] = np.full((len(digits), 36), ord("-"), np.uint8)
    text[:, [i for i in range(36) if i not in _UUID_DASHES]] = digits
    return np.ascontiguousarray(text).view("S36").reshape(-1).astype(ID_TEXT)


def _bytes(column: Any, kind: Any, name: str, uri: str) -> Any:  # noqa: ANN401 pyarrow
    """Return ids as bytes that are UTF-8 without zero bytes."""
    binary = _is_binary(kind)
    found = column.cast(pa.binary()) if binary else column.cast(pa.large_string())
    found = found.cast(pa.large_binary())
    try:
        found.cast(pa.large_string())  # makes sure that it is UTF-8
        zeros = pc.any(pc.match_substring(found, b"\0")).as_py()
    except pa.ArrowInvalid:
        zeros = True
    if not zeros:
        return found
    texts = found.to_pylist()
    sound = [b"\0" not in text and _is_utf8(text) for text in texts]
    if not binary:
        bad = texts[sound.index(False)]
        raise UnsupportedIndexError(
            f"{uri}: the '{name}' {bad!r} is not text in UTF-8 without zero bytes; ids are "
            "integers or text"
        )
    shown = [
        text if plain else b"0x" + text.hex().encode()
        for text, plain in zip(texts, sound, strict=True)
    ]
    return pa.chunked_array([pa.array(shown, pa.large_binary())])


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
