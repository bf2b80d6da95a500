"""Vectors in Parquet files, one or a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simskip_vdb.connectors.addresses import metric_of, parse_address
from simskip_vdb.connectors.parquet_file import (
    SCHEME,
    Options,
    ParquetFile,
    state_of_column,
)
from simskip_vdb.connectors.parquet_ids import refuse_repeated
from simskip_vdb.connectors.parquet_notes import leave_note, part_note, refuse_part, remove_note
from simskip_vdb.connectors.part_notes import refuse_refined
from simskip_vdb.connectors.parted import Parted, PartFile, check_alike
from simskip_vdb.connectors.row_file import check_fields, state_root
from simskip_vdb.datatypes import Metric, StoreInfo
from simskip_vdb.durable import disk_errors, has_file
from simskip_vdb.errors import DataError, StoreNotFoundError, UnsupportedIndexError

_SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
_MANAGED = ("_delta_log", "_metadata", ".hoodie", "metadata/*.metadata.json")


class ParquetFolder(Parted):
    """A `Parted` store of the Parquet files in a folder and its subfolders.

    They are known by their names, or by how they begin, as Hive's have no suffix. Names that begin
    with a dot or an underscore are nobody's rows, as for other readers, but for partitions such as
    ``_day=1``. Without a column of ids, rows are counted through all files in the order of their
    names.
    """

    def __init__(
        self, folder: Path | str, options: Options | None = None, *, read_only: bool = False
    ) -> None:
        """Open the files of a folder.

        Raises:
            StoreNotFoundError: There are none.
            UnsupportedIndexError: Something else keeps account of the files, or their columns
                cannot be refined.
            DataError: The files do not fit together, or an id comes twice.
            ConfigError: A file lacks a column, or was refined by itself.
            StoreError: A file is damaged.
        """
        self._folder, self._options = Path(folder).resolve(), options or Options()
        uri = self._options.address(self._folder)
        _refuse_managed(self._folder, uri)
        with disk_errors(self._folder):
            paths = sorted(path for path in self._folder.rglob("*") if self._meant(path))
        if not paths:
            raise StoreNotFoundError(f"{uri}: there is no Parquet file in this folder")
        self._texts = False
        stores = self._files(paths, read_only=read_only)
        if len({store.ids.dtype.kind for store in stores}) > 1 and all(s.numbers for s in stores):
            self._texts = True  # some are too large for int64
            stores = self._files(paths, read_only=read_only)
        self._payload = _check(stores, uri)
        self._positional = stores[0].info().positional
        starts = accumulate((len(store.ids) for store in stores[:-1]), initial=0)
        shifts = list(starts) if self._positional else [0] * len(stores)
        super().__init__(uri, self._folder, stores, shifts, read_only=read_only)

    @cached_property
    def _state(self) -> Path:
        return state_of_column(self._folder, self._options.vector)

    def info(self) -> StoreInfo:
        """Describe the files together."""
        first = self._parts[0].store.info()
        many = len(self._parts) > 1
        return StoreInfo(
            uri=self._uri,
            kind=f"{len(self._parts)} Parquet file{'s' * many}",
            count=len(self._rows),
            dim=first.dim,
            metric=first.metric,
            positional=self._positional,
            exact=first.exact,
            exhaustive=True,
            payload=True,
            state=self._state,
            claim=state_root(self._folder),
            details=first.details,
        )

    def _opener(self, path: Path, shift: int) -> Callable[[], ParquetFolder]:
        shared = _Shared(self._folder, self._options, self._payload, self._positional, self._texts)
        return partial(_one, shared, path, shift)

    def _files(self, paths: Sequence[Path], *, read_only: bool) -> list[ParquetFile]:
        return [
            ParquetFile(
                path, self._options, read_only=read_only, folder=self._folder, texts=self._texts
            )
            for path in paths
        ]

    def _note(self, part: PartFile) -> Mapping[str, Any] | None:
        return part_note(part.path)

    def _leave_note(self, part: PartFile, note: Mapping[str, Any] | None) -> None:
        assert isinstance(part, ParquetFile)
        if note is None:
            remove_note(part.path)
        else:
            leave_note(part.path, part.opened, part.vectors, note)

    def _check_fields(self, fields: Sequence[str]) -> None:
        check_fields(fields, self._payload, self._uri)

    def _meant(self, path: Path) -> bool:
        names = path.relative_to(self._folder).parts
        if any(name[0] == "." or (name[0] == "_" and "=" not in name) for name in names):
            return False
        if path.is_dir():
            return False
        return path.name.lower().endswith(_SUFFIXES) or _begins_as_parquet(path)


class ParquetStore:
    """What an address that begins with ``parquet:`` leads to."""

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> ParquetFile | ParquetFolder:
        """Open ``parquet:PATH``, a file or a folder.

        Options after a question mark: ``id`` and ``vector``, names of columns (``id=-`` for
        positions, ``vector=emb_*`` for one column a dimension); ``metric``: ``cosine`` (the
        default), ``dot`` or ``euclid``, as the application compares vectors.
        """
        path, options = _parse(uri)
        if path.is_dir():
            return ParquetFolder(path, options, read_only=read_only)
        store = ParquetFile(path, options, read_only=read_only)
        refuse_part(store.path)
        return store


class _Shared(NamedTuple):
    folder: Path
    options: Options
    payload: tuple[str, ...]
    positional: bool
    texts: bool


def _one(shared: _Shared, path: Path, shift: int) -> ParquetFolder:
    """Open one of the files of a folder as a store of its rows."""
    store = ParquetFolder.__new__(ParquetFolder)
    store._folder, store._options, store._payload, store._positional, store._texts = shared
    files = store._files([path], read_only=False)
    Parted.__init__(store, shared.options.address(path), shared.folder, files, [shift])
    return store


def _begins_as_parquet(path: Path) -> bool:
    if not has_file(path):
        return False
    with disk_errors(path), open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _parse(uri: str) -> tuple[Path, Options]:
    place, options = parse_address(uri, Options._fields)
    metric = metric_of(f"{SCHEME}:{place}", options.pop("metric", Metric.COSINE))
    return Path(place), Options(**options, metric=metric)


def _refuse_managed(folder: Path, uri: str) -> None:
    for name in _MANAGED:
        if any(folder.glob(name)):
            raise UnsupportedIndexError(
                f"{uri}: {name} keeps account of these files, and would not know that they were "
                "written anew; refine a copy without it, or let that system write the result"
            )


def _check(stores: Sequence[ParquetFile], uri: str) -> tuple[str, ...]:
    """Make sure that files fit together; return the payload columns that all of them have."""
    infos = [store.info() for store in stores]
    check_alike(
        uri, [(s.path, info.dim, info.metric) for s, info in zip(stores, infos, strict=True)]
    )
    for info in infos:
        refuse_refined(info)
    if len({store.ids.dtype.kind for store in stores}) > 1:
        raise DataError(f"{uri}: ids are text in some files, and numbers in others")
    kinds = {(info.positional, info.exact) for info in infos}
    if len(kinds) > 1:
        what = "a column of ids" if len({info.positional for info in infos}) > 1 else "float16"
        raise DataError(f"{uri}: some files have {what}, and others have not; write all alike")
    if not infos[0].positional:
        ids = np.sort(np.concatenate([store.ids for store in stores]))
        refuse_repeated(ids[1:][ids[1:] == ids[:-1]], stores[0].key, uri)
    shared = set.intersection(*(set(store.payload) for store in stores))
    return tuple(name for name in stores[0].payload if name in shared)
