"""Vectors in Parquet files, one or a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from simskip_vdb.connectors.addresses import parse_address
from simskip_vdb.connectors.parquet_file import (
    SCHEME,
    Options,
    ParquetFile,
    check_fields,
    state_of,
    state_root,
)
from simskip_vdb.connectors.part_notes import refuse_part, refuse_refined
from simskip_vdb.connectors.parted import Parted, check_alike
from simskip_vdb.datatypes import Metric, StoreInfo, id_names
from simskip_vdb.durable import disk_errors
from simskip_vdb.errors import ConfigError, DataError, StoreNotFoundError, UnsupportedIndexError

_MANAGED = ("_delta_log", "_metadata", ".hoodie", "metadata/*.metadata.json")


class ParquetFolder(Parted):
    """A `Parted` store of the ``*.parquet`` files in a folder and its subfolders.

    Names that begin with a dot or an underscore are nobody's rows, as for other readers.
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
            paths = sorted(path for path in self._folder.rglob("*.parquet") if self._meant(path))
        if not paths:
            raise StoreNotFoundError(f"{uri}: there is no *.parquet file in this folder")
        stores = [ParquetFile(path, self._options, read_only=read_only) for path in paths]
        self._payload = _check(stores, uri)
        super().__init__(uri, self._folder, stores, [0] * len(stores), read_only=read_only)

    @cached_property
    def _state(self) -> Path:
        return state_of(self._folder, self._options.vector)

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
            exhaustive=True,
            payload=True,
            state=self._state,
            claim=state_root(self._folder),
            details=first.details,
        )

    def _opener(self, path: Path, shift: int) -> Callable[[], ParquetFolder]:
        return partial(_one, self._folder, path, self._options, self._payload)

    def _check_fields(self, fields: Sequence[str]) -> None:
        check_fields(fields, self._payload, self._uri)

    def _meant(self, path: Path) -> bool:
        hidden = any(name[0] in "._" for name in path.relative_to(self._folder).parts)
        return not hidden and not path.is_dir()


class ParquetStore:
    """What an address that begins with ``parquet:`` leads to."""

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> ParquetFile | ParquetFolder:
        """Open ``parquet:PATH``, a file or a folder.

        Options after a question mark: ``id`` and ``vector``, names of columns; ``metric``:
        ``cosine`` (the default), ``dot`` or ``euclid``, as the application compares vectors.
        """
        path, options = _parse(uri)
        if path.is_dir():
            return ParquetFolder(path, options, read_only=read_only)
        store = ParquetFile(path, options, read_only=read_only)
        refuse_part(store.path)
        return store


def _one(folder: Path, path: Path, options: Options, payload: tuple[str, ...]) -> ParquetFolder:
    """Open one of the files of a folder as a store of its rows."""
    store = ParquetFolder.__new__(ParquetFolder)
    store._folder, store._options, store._payload = folder, options, payload
    uri = options.address(path)
    Parted.__init__(store, uri, folder, [ParquetFile(path, options)], [0])
    return store


def _parse(uri: str) -> tuple[Path, Options]:
    place, options = parse_address(uri, Options._fields)
    try:
        metric = Metric(options.pop("metric", "cosine"))
    except ValueError as error:
        raise ConfigError(
            f"{SCHEME}:{place}: {error}; after the question mark, metric is cosine, dot or euclid"
        ) from None
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
    ids = np.sort(np.concatenate([store.ids for store in stores]))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise DataError(
            f"{uri}: {len(np.unique(twice)):,} ids (such as {id_names(twice[:1])[0]}) stand for "
            "several rows; every row needs an id of its own"
        )
    shared = set.intersection(*(set(store.payload) for store in stores))
    return tuple(name for name in stores[0].payload if name in shared)
