"""The contract between the stages and whatever holds the vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from simskip_vdb.datatypes import Ids, Neighbors, StoreInfo, VectorBatch, Vectors

Check = Callable[["VectorStore"], None]
"""Looks at the rewritten store and raises to refuse it."""


class VectorStore(Protocol):
    """Rows with vectors that can be read, searched and have their vectors replaced.

    A connector raises only errors of `simskip_vdb.errors`, whose messages name the store.
    """

    def info(self) -> StoreInfo:
        """Describe the store as it is now."""
        ...

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: int | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in a stable order, in bounded memory.

        Args:
            batch_size: Most rows in a batch.
            fields: Payload columns to bring along; ConfigError where the store has none.
            cursor: A batch's cursor, to go on after that batch.
            partition: One of the store's partitions; None for all.

        Raises:
            ConfigError: `fields` or `partition` ask for what the store does not have.
            StoreError: Reading failed.
        """
        ...

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids, shape (len(ids), d), in the order asked.

        Raises:
            DataError: An id is not in the store, or is not unique.
        """
        ...

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Search through the index as the user's application does.

        Args:
            queries: Shape (q, d).
            k: Rows wanted for each query.
            params: Search-time settings by the engine's own names, such as ``nprobe``.

        Raises:
            ConfigError: The index does not know a parameter.
        """
        ...

    def replace(self, batches: Iterable[VectorBatch], check: Check) -> None:
        """Write new vectors to existing rows; nothing else changes.

        Batches follow the order of `scan`; rows left out keep their vectors. `check` sees the
        rewritten store, before it takes effect where the store can stage, and refuses it by
        raising; the error passes through and the store is as it was.

        Raises:
            DataError: A batch names an unknown id, is out of order, or has a wrong dimension.
            StoreChangedError: Somebody else wrote meanwhile; nothing was overwritten.
        """
        ...


class ExactVectors(Protocol):
    """The vectors behind lossy codes: an array on disk, or any `VectorStore`."""

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids, shape (len(ids), d), in the order asked.

        Raises:
            DataError: An id has no vector, or several.
        """
        ...


@runtime_checkable
class TakesOriginals(Protocol):
    """Ability: may hold lossy codes, and is told the exact vectors behind them.

    `VectorStore.scan` goes on yielding what is read back from the codes.
    """

    def take_originals(self, source: ExactVectors | Vectors) -> None:
        """Remember where the exact vectors are.

        Args:
            source: Finds them by id; or an array of them in the order of `VectorStore.scan`.

        Raises:
            ConfigError: The store's own vectors are good enough, or its order is not that in
                which its rows were added.
            DataError: The array has not one vector a row.
        """
        ...

    def originals(self, ids: Ids) -> Vectors:
        """Return the exact vectors of these ids, shape (len(ids), d).

        Raises:
            UnsupportedIndexError: Nobody said where they are.
            DataError: An id has none.
        """
        ...


@runtime_checkable
class FileBacked(Protocol):
    """Ability: the whole index is one file, swapped atomically."""

    @property
    def path(self) -> Path:
        """The index file, links resolved."""
        ...

    def sha256(self) -> str:
        """Hash the file's bytes, 64 hex digits."""
        ...

    def replace_keeping(
        self, batches: Iterable[VectorBatch], check: Check, *, keep: Path | None, expected: str
    ) -> None:
        """Replace as `VectorStore.replace` does, and keep the old file as `keep` if given.

        The swap happens only while the file's hash is `expected`.
        """
        ...

    def write_copy(self, batches: Iterable[VectorBatch], check: Check, *, output: Path) -> None:
        """Write the rewritten index to a new file, `output`, and leave this one alone."""
        ...

    def put_back(self, kept: Path, *, expected: str) -> None:
        """Swap a file kept by `replace_keeping` back, while the file's hash is `expected`."""
        ...
