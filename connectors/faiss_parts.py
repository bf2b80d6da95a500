"""A FAISS index that was saved as several files, because `IndexShards` cannot be saved as one."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from simskip_vdb.connectors.faiss_store import FaissStore
from simskip_vdb.connectors.folders import nothing_at
from simskip_vdb.connectors.part_notes import refuse_refined
from simskip_vdb.connectors.parted import Parted, check_alike
from simskip_vdb.connectors.rows import only_vectors
from simskip_vdb.datatypes import StoreInfo
from simskip_vdb.errors import DataError, UnsupportedIndexError

_SCHEME = "faiss:"
_GLOB = re.compile(r"[*?\[\]]")


class FaissParts(Parted):
    """A `Parted` store of FAISS files.

    Ids are those of the parts. Where parts count their rows from 0 each, a row's id is larger by
    the rows of the parts before it, as with ``IndexShards(successive_ids=True)``.
    """

    def __init__(self, pattern: Path | str, *, read_only: bool = False) -> None:
        """Open the files that a pattern names.

        Args:
            pattern: A path whose last part has ``*``, ``?`` or ``[…]``.
            read_only: Refuse every write.

        Raises:
            StoreNotFoundError: There are none.
            UnsupportedIndexError: A part cannot be refined together with others.
            DataError: The parts do not fit together, or an id comes twice.
            ConfigError: A part was refined by itself.
            StoreError: A part is not an index, or damaged.
        """
        given = Path(pattern)
        self._pattern = given.parent.resolve() / given.name
        uri = f"{_SCHEME}{self._pattern}"
        names = glob.glob(f"{glob.escape(str(self._pattern.parent))}/{given.name}")
        paths = [Path(name) for name in sorted(names) if Path(name).is_file()]
        if not paths:
            raise nothing_at(self._pattern, uri)
        stores = [FaissStore(path, read_only=read_only) for path in paths]
        _check(stores, uri)
        starts = [0, *accumulate(len(store.ids) for store in stores)]
        shifted = _collide(stores, uri)
        self._positional = shifted or any(store.info().positional for store in stores)
        shifts = starts[:-1] if shifted else [0] * len(stores)
        super().__init__(uri, self._pattern.parent, stores, shifts, read_only=read_only)

    @classmethod
    def open(cls, uri: str, *, read_only: bool) -> FaissParts:
        """Open ``faiss:FOLDER/PATTERN`` or the plain pattern."""
        return cls(uri.removeprefix(_SCHEME), read_only=read_only)

    def info(self) -> StoreInfo:
        """Describe the parts together; details are those that all have in common."""
        infos = [part.store.info() for part in self._parts]
        kinds = ", ".join(dict.fromkeys(info.kind for info in infos))
        common = {
            name: value
            for name, value in infos[0].details.items()
            if all(info.details.get(name) == value for info in infos)
        }
        folder = f"{_GLOB.sub('_', self._pattern.name)}.simskip"
        return StoreInfo(
            uri=self._uri,
            kind=f"{len(infos)} part{'s' * (len(infos) > 1)} of {kinds}",
            count=len(self._rows),
            dim=infos[0].dim,
            metric=infos[0].metric,
            positional=self._positional,
            state=self._pattern.with_name(folder),
            details=common,
        )

    def _opener(self, path: Path, shift: int) -> Callable[[], FaissParts]:
        return partial(_one, self._pattern, path, shift, self._positional)

    def _check_fields(self, fields: Sequence[str]) -> None:
        only_vectors(self._uri, fields, None)


def _one(pattern: Path, path: Path, shift: int, positional: bool) -> FaissParts:
    """Open one of the files that a pattern names as a store of its rows."""
    store = FaissParts.__new__(FaissParts)
    store._pattern, store._positional = pattern, positional
    Parted.__init__(store, f"{_SCHEME}{path}", path.parent, [FaissStore(path)], [shift])
    return store


def _check(stores: Sequence[FaissStore], uri: str) -> None:
    infos = [store.info() for store in stores]
    check_alike(
        uri, [(s.path, info.dim, info.metric) for s, info in zip(stores, infos, strict=True)]
    )
    for store, info in zip(stores, infos, strict=True):
        if not info.exact:
            raise UnsupportedIndexError(
                f"{info.uri}: {info.kind} does not give its vectors back exactly, so after an "
                "interruption nobody could tell which of several files were written. Refine "
                "each part by itself, with the refiner of the first"
                + (" and its exact vectors (--originals)" if info.lossy else "")
                + f": simskip refine {store.path.name} --refiner DIR --accept-unmeasured"
            )
        refuse_refined(info)


def _collide(stores: Sequence[FaissStore], uri: str) -> bool:
    """Tell whether ids are positions in each part, and so come once in every one.

    Raises:
        DataError: They come twice otherwise.
    """
    ids = np.sort(np.concatenate([store.ids for store in stores]))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if not len(twice):
        return False
    if all(np.array_equal(store.ids, np.arange(len(store.ids))) for store in stores):
        return True
    raise DataError(
        f"{uri}: {len(np.unique(twice)):,} ids (such as {twice[0]}) stand for several rows; over "
        "all parts every row needs an id of its own, or every part counts its rows from 0"
    )
