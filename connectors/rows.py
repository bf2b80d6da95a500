"""From ids to positions: what every store with rows in a fixed order needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simskip_vdb.datatypes import Cursor, Ids, Mask, Positions, VectorBatch, Vectors, id_names
from simskip_vdb.durable import sha256_of
from simskip_vdb.errors import ConfigError, DataError


class Change(NamedTuple):
    """New vectors for some rows.

    Attributes:
        positions: Strictly ascending, shape (b,).
        vectors: Shape (b, d), float32.
    """

    positions: Positions
    vectors: Vectors


class RowOrder:
    """The ids of a store's rows in scan order, and the way back from an id to its position."""

    def __init__(self, ids: Ids, store: str) -> None:
        """Take the ids, shape (n,), and the store's address for messages."""
        self.ids = ids
        self._store = store
        self._by_id: Positions = np.argsort(ids, kind="stable")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def repeated(self) -> Ids:
        """Ids that stand for several rows, each at least once, shape (m,)."""
        ordered = self.ids[self._by_id]
        return np.asarray(ordered[1:][ordered[1:] == ordered[:-1]])

    def positions(self, ids: Ids) -> Positions:
        """Find the rows of these ids, shape (len(ids),).

        Raises:
            DataError: An id is not in the store, or occurs more than once.
        """
        wanted = np.asarray(ids)
        if len(wanted) == 0:
            return np.empty(0, np.int64)
        text = self.ids.dtype.kind == "S"
        if wanted.dtype.kind not in ("S" if text else "iu"):
            kind = "text" if text else "integers"
            raise DataError(f"{self._store}: ids are {kind}, not {wanted.dtype}")
        first = np.searchsorted(self.ids, wanted, side="left", sorter=self._by_id)
        last = np.searchsorted(self.ids, wanted, side="right", sorter=self._by_id)
        self._refuse(wanted[last == first], "is not in the store")
        self._refuse(wanted[last - first > 1], "occurs more than once")
        return self._by_id[first]

    def known(self, ids: Ids) -> Mask:
        """Tell which of these ids are in the store, shape (len(ids),)."""
        wanted = np.asarray(ids)
        text = self.ids.dtype.kind == "S"
        if not len(self.ids) or text != (wanted.dtype.kind == "S"):
            return np.zeros(len(wanted), np.bool_)
        places = np.searchsorted(self.ids, wanted, sorter=self._by_id)
        places = self._by_id[np.minimum(places, len(self.ids) - 1)]
        return np.asarray(self.ids[places] == wanted)

    def changes(self, batches: Iterable[VectorBatch], dim: int) -> Iterator[Change]:
        """Check batches against the order of a scan and turn ids into positions.

        Raises:
            DataError: A batch names an unknown id, is out of order, or has a wrong dimension.
        """
        done = 0
        for batch in batches:
            vectors = np.ascontiguousarray(batch.vectors, np.float32)  # (b, d)
            if vectors.shape != (len(batch), dim):
                raise DataError(
                    f"{self._store}: {len(batch)} ids came with vectors of shape "
                    f"{vectors.shape}; the store holds vectors of dimension {dim}"
                )
            positions = self.positions(batch.ids)
            if len(positions) == 0:
                continue
            if positions[0] < done or np.any(np.diff(positions) <= 0):
                raise DataError(f"{self._store}: rows come out of the order of a scan, or twice")
            done = int(positions[-1]) + 1
            yield Change(positions, vectors)

    def windows(self, batch_size: int, cursor: Cursor | None) -> Iterator[tuple[int, int]]:
        """Cut the rows from ``cursor`` on into (start, stop).

        Raises:
            ConfigError: The batch size is below 1 or the cursor points outside.
        """
        check_batch_size(self._store, batch_size)
        first = 0 if cursor is None else int(cursor)
        if not 0 <= first <= len(self):
            raise ConfigError(f"{self._store}: cursor {first} is outside 0..{len(self)}")
        starts = range(first, len(self), batch_size)
        return ((start, min(start + batch_size, len(self))) for start in starts)

    def _refuse(self, ids: Ids, why: str) -> None:
        if len(ids):
            raise DataError(f"{self._store}: id {id_names(ids)[0]} {why}")


class OneFile:
    """What stores that are one file have in common."""

    _path: Path
    _read_only: bool
    _rows: RowOrder

    @property
    def path(self) -> Path:
        """The file, links resolved."""
        return self._path

    @property
    def ids(self) -> Ids:
        """Row ids in scan order, shape (n,)."""
        return self._rows.ids

    def sha256(self) -> str:
        """Hash the file's bytes, 64 hex digits."""
        return sha256_of(self._path)

    @property
    def _uri(self) -> str:
        raise NotImplementedError

    def _writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._uri} was opened for reading only")


def only_vectors(store: str, fields: Sequence[str], partition: object) -> None:
    """Refuse payload columns and partitions for a store that has neither.

    Raises:
        ConfigError: One of them was asked for.
    """
    if fields:
        raise ConfigError(
            f"{store}: rows have no payload, so there is no field '{fields[0]}'; "
            "give files in its place: --doc-ids FILE, --labels FILE"
        )
    no_partitions(store, partition)


def check_batch_size(store: str, batch_size: int) -> None:
    """Refuse a batch without rows.

    Raises:
        ConfigError: It has none.
    """
    if batch_size < 1:
        raise ConfigError(f"{store}: a batch holds at least one row, not {batch_size}")


def no_partitions(store: str, partition: object) -> None:
    """Refuse partitions for a store that has none.

    Raises:
        ConfigError: One was asked for.
    """
    if partition is not None:
        raise ConfigError(f"{store}: the store has no partitions")


def fetched(store: str, peek: Callable[[Ids], VectorBatch], ids: Ids) -> Vectors:
    """Return the vectors of these ids, shape (len(ids), d), from what `peek` finds.

    Raises:
        DataError: An id is not in the store.
    """
    unique, back = np.unique(np.asarray(ids), return_inverse=True)
    found = peek(unique)
    if len(found) < len(unique):
        missing = unique[~np.isin(unique, found.ids)]
        raise DataError(
            f"{store}: no row with id {id_names(missing)[0]} has this vector; "
            f"{len(missing)} of {len(unique)} ids are missing"
        )
    vectors: Vectors = found.vectors[back]
    return vectors


def checked_rows(store: str, batch: VectorBatch, dim: int) -> Vectors:
    """Return a batch's vectors as contiguous float32, shape (b, d), fit to be written.

    Raises:
        DataError: An id comes twice, or the vectors have another shape or are not finite.
    """
    vectors = np.ascontiguousarray(batch.vectors, np.float32)
    if vectors.shape != (len(batch), dim):
        raise DataError(
            f"{store}: {len(batch)} ids came with vectors of shape {vectors.shape}; the store "
            f"holds vectors of dimension {dim}"
        )
    if len(np.unique(batch.ids)) < len(batch):
        raise DataError(f"{store}: a batch names a row twice")
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise DataError(f"{store}: the vector for id {id_names(batch.ids[bad])[0]} is not finite")
    return vectors


def checked_queries(store: str, queries: Vectors, dim: int, k: int) -> Vectors:
    """Return queries as contiguous float32, shape (q, d).

    Raises:
        DataError: The dimension is not the store's.
        ConfigError: `k` is below 1.
    """
    array = np.ascontiguousarray(queries, np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise DataError(f"{store}: queries have shape {array.shape}, expected (q, {dim})")
    if k < 1:
        raise ConfigError(f"{store}: k is at least 1, not {k}")
    return array
