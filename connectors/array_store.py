"""Vectors in an array: a ``.npy`` file, or one of the arrays of ``.npz`` or ``.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simskip_vdb.connectors.addresses import address_of, metric_of, parse_address
from simskip_vdb.connectors.array_formats import FORMATS, ArrayFormat, read_npy
from simskip_vdb.connectors.array_layout import File
from simskip_vdb.connectors.digits import Digits, as_float32
from simskip_vdb.connectors.row_file import LayOver, RowFile, state_of, state_root
from simskip_vdb.datatypes import Ids, Metric, Positions, StoreInfo, Vectors, id_names, id_text
from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import DataError, StoreError, StoreNotFoundError

_WHOLE = re.compile(rb"-?[1-9][0-9]{0,17}|0")


class ArrayOptions(NamedTuple):
    """What an address says of a file of arrays.

    Attributes:
        key: Name of the array of vectors; None for the only one.
        ids: An array of the same file, or a file beside it, that holds the ids; None for positions.
        metric: How the application compares vectors.
    """

    key: str | None = None
    ids: str | None = None
    metric: Metric = Metric.COSINE


class _Array:
    """An open file, and the array in it that holds vectors; see `Contents`."""

    def __init__(self, path: Path, scheme: str, options: ArrayOptions, uri: str) -> None:
        with disk_errors(path):
            self.format: ArrayFormat = FORMATS[scheme](path, uri)
            self.key, self.layout = self.format.layout(options.key)
        count, self.dim = self.layout.shape
        self._uri = uri
        if options.ids is None:
            self.ids: Ids = np.arange(count)
        else:
            with disk_errors(path):
                self.ids = _read_ids(self.format, path, options.ids, uri)
        if len(self.ids) != count:
            raise DataError(
                f"{uri}: there are {len(self.ids):,} ids ({options.ids}) for {count:,} rows; give "
                "one for each row, in the same order"
            )

    def read(self, start: int, stop: int) -> Vectors:
        """See `Contents.read`."""
        with disk_errors(Path(self._uri)):
            return as_float32(self.layout.read(self.format.file, start, stop))

    def take(self, positions: Positions) -> Vectors:
        """See `Contents.take`."""
        with disk_errors(Path(self._uri)):
            return as_float32(self.layout.take(self.format.file, positions))

    def rewrite(self, target: Path, lay_over: LayOver, digits: Digits) -> None:
        """See `Contents.rewrite`."""

        def overwrite(file: File, offset: int | None) -> None:
            layout = self.layout if offset is None else self.layout._replace(offset=offset)
            layout.overwrite(file, self.ids, lay_over, digits)

        with disk_errors(target):
            self.format.copy(target, overwrite)

    def alike(self, other: _Array) -> bool:
        """See `Contents.alike`."""
        here, there = self.layout._replace(offset=0), other.layout._replace(offset=0)
        return (
            here == there
            and np.array_equal(self.ids, other.ids)
            and self.format.rest() == other.format.rest()
        )


class ArrayFile(RowFile):
    """A `VectorStore` that is one file of arrays, read a block at a time.

    The type of its numbers, their order, the header, and other arrays stay as they are.
    """

    _contents: _Array

    def __init__(
        self,
        path: Path | str,
        scheme: str,
        options: ArrayOptions | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            scheme: ``npy``, ``npz`` or ``safetensors``.
            options: What the address says.
            read_only: Refuse every write.

        Raises:
            StoreNotFoundError: There is no such file.
            ConfigError: There is no such array, or the address does not say which one.
            UnsupportedIndexError: It holds no vectors.
            DataError: There is not one id a row, or an id stands for several rows.
            StoreError: The file is damaged, or of another kind.
        """
        self._scheme, self._options = scheme, options or ArrayOptions()
        super().__init__(path, read_only=read_only)

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> ArrayFile:
        """Open ``npy:FILE``, ``npz:FILE`` or ``safetensors:FILE``.

        Options after a question mark: ``key``, name of the array of vectors where there are
        several; ``ids``, name of an array of the same file, or of a file in its folder (``.npy``,
        or text with one id a line); ``metric``: ``cosine`` (the default), ``dot`` or ``euclid``.
        """
        scheme = uri.partition(":")[0]
        known = [name for name in ArrayOptions._fields if name != "key" or scheme != "npy"]
        place, told = parse_address(uri, known)
        metric = metric_of(f"{scheme}:{place}", told.pop("metric", Metric.COSINE))
        return cls(place, scheme, ArrayOptions(**told, metric=metric), read_only=read_only)

    def info(self) -> StoreInfo:
        """Describe the file as it was opened."""
        layout = self._contents.layout
        details: dict[str, Any] = {"numbers": layout.name}
        if layout.columns:
            details["order"] = "columns"
        if self._options.ids is not None:
            details["ids"] = self._options.ids
        return StoreInfo(
            uri=self._uri,
            kind={"npy": "NumPy array", "npz": "NumPy archive"}.get(self._scheme, "safetensors"),
            count=len(self._rows),
            dim=self._contents.dim,
            metric=self._options.metric,
            positional=self._options.ids is None,
            exact=layout.exact,
            exhaustive=True,
            state=self._state,
            claim=state_root(self._path),
            details=details,
        )

    def reopen(self) -> None:
        """Look at the file anew."""
        super().reopen()
        twice = self._rows.repeated
        if len(twice):
            raise DataError(
                f"{self._uri}: {len(np.unique(twice)):,} ids (such as {id_names(twice[:1])[0]}) of "
                f"{self._options.ids} stand for several rows; every row needs an id of its own. "
                "Leave ids out of the address, and rows are known by their positions"
            )

    def _open(self) -> _Array:
        found = _Array(self._path, self._scheme, self._options, self._uri)
        self._options = self._options._replace(key=found.key)
        return found

    def _other(self, path: Path) -> ArrayFile:
        return ArrayFile(path, self._scheme, self._options, read_only=True)

    def _address(self, path: Path) -> str:
        told = self._options._asdict()
        metric = told.pop("metric")
        told["metric"] = None if metric is Metric.COSINE else metric.value
        return address_of(self._scheme, str(path), told)

    def _state_at(self, path: Path) -> Path:
        own = self._options.key or ""

        def key_in(uri: str) -> str:
            return parse_address(uri, ArrayOptions._fields)[1].get("key", own)

        return state_of(path, own, key_in)

    @property
    def _metric(self) -> Metric:
        return self._options.metric


def _read_ids(held: ArrayFormat, path: Path, name: str, uri: str) -> Ids:
    """Return the ids of rows, shape (n,): those of an array in the file, or of a file beside it."""
    array = held.array(name)
    if array is None:
        beside = path.parent / name
        if not beside.is_file():
            raise StoreNotFoundError(
                f"{uri}: ids={name} names neither an array of this file nor a file in its folder"
            )
        if beside.suffix != ".npy":
            return _from_lines(beside.read_bytes(), beside)
        array = read_npy(beside, uri)
    return _from_array(array, name, uri)


def _from_lines(text: bytes, path: Path) -> Ids:
    lines = text.removeprefix(b"\xef\xbb\xbf").splitlines()
    bad = next((n for n, line in enumerate(lines) if not line.strip() or b"\0" in line), None)
    if bad is not None:
        raise DataError(f"{path}, line {bad + 1}: it holds no id; give one a line")
    if all(_WHOLE.fullmatch(line) for line in lines):
        return np.array([int(line) for line in lines], np.int64)
    return id_text([line.strip() for line in lines])


def _from_array(array: Any, name: str, uri: str) -> Ids:  # noqa: ANN401 of any type
    shape = array.shape
    if array.ndim == 2 and 1 in shape:
        array = array.reshape(-1)
    if array.ndim == 1 and array.dtype.kind in "iu":
        if array.dtype.kind == "u" and len(array) and array.max() > np.iinfo(np.int64).max:
            return id_text(array.astype(np.str_).astype(np.bytes_))
        return np.asarray(array, np.int64)
    if array.ndim == 1 and array.dtype.kind in "US":
        texts = array if array.dtype.kind == "S" else np.char.encode(array, "utf-8")
        if len(texts) and not np.char.str_len(texts).min():
            raise DataError(f"{uri}: an id of '{name}' is an empty text; give every row an id")
        return id_text(texts)
    raise StoreError(
        f"{uri}: ids={name} is an array of {array.dtype} {shape}; ids are integers or text, one a "
        "row"
    )
