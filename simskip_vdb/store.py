"""The contract between the stages and whatever holds the vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Mask,
    Neighbors,
    Progress,
    StoreInfo,
    VectorBatch,
    Vectors,
)

BESIDE = "@simskip"
"""How the names end of vectors and collections that hold refined copies."""


Check = Callable[["VectorStore"], None]
"""Looks at the rewritten store and raises to refuse it."""


class VectorStore(Protocol):
    """Rows with vectors that can be read and searched.

    What else it can do, it declares by being more of the protocols here; `abilities` tells.

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
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in a stable order, in bounded memory.

        A vector has the length that the engine gives it: where that normalises, a vector that was
        given with another length is read as it is compared.

        Rows that are added or removed while a scan goes on may be missing or not; no other is.

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


Allowed = Callable[[VectorBatch], Mask]
"""Given rows as they are now, tells which may be overwritten, shape (b,)."""


@runtime_checkable
class RowWritable(Protocol):
    """Ability: rows are written where they are, while an application may write them, too."""

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there, in the order asked; each id at most once."""
        ...

    def update(self, batch: VectorBatch, allowed: Allowed) -> Mask:
        """Overwrite the vectors of rows that are there and that `allowed` lets go.

        Rows are read again and handed to `allowed` right before they are written, a request at a
        time; `allowed` may be called from several threads. Nothing but this vector changes, and a
        row that was removed meanwhile is not added again. Writing the same batch twice does no
        more than writing it once. `peek` shows what was written at once; a search, or another
        reader, may see it only after `settle`.

        Args:
            batch: Row ids, each at most once, and their new vectors.
            allowed: Spares rows that somebody else changed.

        Returns:
            Which rows were written, shape (b,); where the store makes a write depend on a
            condition, which were sent.

        Raises:
            DataError: A vector has the wrong dimension or is not finite, or an id comes twice;
                nothing was written.
            TransientStoreError: The store kept failing; some rows may be written, some not.
        """
        ...

    def settle(self, progress: Progress) -> None:
        """Make every write durable, and wait until the index over the vectors is built again.

        Raises:
            StoreChangedError: Somebody else changed what was to be written; that was left as it
                is, and some rows may be written.
        """
        ...


class RowStore(VectorStore, RowWritable, Protocol):
    """A store whose rows are written one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A part of a store's rows, which a process of its own may read and write.

    Attributes:
        name: Such as a file's name; the same rows have it in every run.
        open: Opens it, and nothing else, in whatever process; its rows have the ids that they have
            in the store, in the order of `VectorStore.scan`. It can be pickled.
    """

    name: str
    open: Callable[[], RowStore]


@runtime_checkable
class Partitioned(Protocol):
    """Ability: the rows are in partitions, and processes may each write one at a time."""

    def partitions(self) -> Sequence[Partition]:
        """Return the partitions; every row is in one of them."""
        ...

    def reopen(self) -> None:
        """See what other processes of ours have written to partitions."""
        ...


@runtime_checkable
class Marked(Protocol):
    """Ability: the store itself carries a note of who refined it."""

    def marker(self) -> Mapping[str, Any] | None:
        """Return the note; None where there is none."""
        ...

    def mark(self, note: Mapping[str, Any] | None) -> None:
        """Leave a note (plain JSON values), durably; None takes it away."""
        ...


@runtime_checkable
class Claimable(Protocol):
    """Ability: the store itself says who is writing it, for runs on whatever machine."""

    def claimed(self) -> Mapping[str, Any] | None:
        """Return what the run that writes said of itself; None where none does."""
        ...

    def claim(self, note: Mapping[str, Any] | None) -> None:
        """Say who writes (plain JSON values); None that nobody does.

        Raises:
            StoreError: This user may not write it.
        """
        ...


@runtime_checkable
class AddsVectors(Protocol):
    """Ability: a row can hold another vector under a name of its own."""

    @property
    def vector_name(self) -> str:
        """Name of the vector that this store is about; empty for the unnamed one."""
        ...

    def vector_beside(self, name: str, *, create: bool) -> RowStore:
        """Return the same rows with the vectors of that name.

        Its scan yields the rows that have such a vector; its `update` gives one to rows that have
        none (then `allowed` sees NaN in its place).

        Args:
            name: Such as ``text@simskip``.
            create: Make room for it, with this vector's settings, where there is none.

        Raises:
            ConfigError: There is none and `create` is false, or the engine is too old for it.
        """
        ...

    def drop_vector_beside(self, name: str) -> None:
        """Remove the vectors of that name; nothing happens where there are none."""
        ...


@runtime_checkable
class Copied(Protocol):
    """Ability: the whole collection can be copied beside itself, and an alias switched to it."""

    @property
    def collection(self) -> str:
        """Name of the collection, whatever alias it was opened by."""
        ...

    def check_alias(self) -> None:
        """Make sure that there is an alias to switch.

        Raises:
            ConfigError: This store was not opened by an alias.
        """
        ...

    def copy(self, name: str, progress: Progress) -> RowStore:
        """Copy settings, payload indexes and every row to a collection; return it.

        Where it exists already, it is brought up to date: rows that it lacks
        are copied, rows whose payload or other vectors differ are copied again, rows that are gone
        are removed; the other rows are left.

        Raises:
            VerificationError: It does not become the same, because it is written to all the time.
        """
        ...

    def compare(self, name: str, progress: Progress) -> None:
        """Make sure that a copy holds every row as it is here, but for this vector, and no other.

        Raises:
            VerificationError: It does not.
        """
        ...

    def other(self, name: str) -> CopiedStore:
        """Return the same vector of another collection, opened the same way."""
        ...

    def switch(self, name: str) -> None:
        """Let the alias by which this store was opened lead to a collection, atomically.

        Raises:
            ConfigError: This store was not opened by an alias.
        """
        ...

    def drop_copy(self, name: str) -> None:
        """Remove a collection that `copy` made; nothing happens where there is none."""
        ...


@runtime_checkable
class LeavesFiles(Protocol):
    """Ability: writes files beside the store, which a killed run may leave behind."""

    def sweep(self) -> None:
        """Remove files of our own that the store does not use; nobody else may be writing.

        A store that was opened for reading only leaves them.
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

    def prepared(
        self, batches: Iterable[VectorBatch], *, keep: Path | None, expected: str
    ) -> AbstractContextManager[Candidate]:
        """Write the index anew beside itself, with new vectors in existing rows.

        Batches follow the order of `scan`; rows left out keep their vectors, and nothing else
        changes. The candidate takes the index's place when it is committed; without that, all is
        as it was when the block ends.

        Args:
            batches: New vectors.
            keep: Where the old file is kept, if anywhere.
            expected: It is committed only while the file's hash is this.

        Raises:
            DataError: A batch names an unknown id, is out of order, or has a wrong dimension.
            StoreChangedError: Somebody else wrote meanwhile; nothing was overwritten.
        """
        ...

    def prepared_copy(
        self, batches: Iterable[VectorBatch], output: Path
    ) -> AbstractContextManager[Candidate]:
        """Prepare as `prepared` does what becomes a new file, and leave this one alone."""
        ...

    def info_at(self, path: Path) -> StoreInfo:
        """Return what `info` says of a copy of the index at another path."""
        ...

    def put_back(self, kept: Path, *, expected: str) -> None:
        """Swap a file kept by `prepared` back, while the file's hash is `expected`."""
        ...


class FileStore(VectorStore, FileBacked, Protocol):
    """A store that is one file."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An index that was written anew and has not taken the other's place yet.

    Attributes:
        store: Reads it.
        commit: Lets it take that place, once.
    """

    store: FileStore
    commit: Callable[[], None]


class CopiedStore(VectorStore, Copied, Protocol):
    """A store that can be copied beside itself."""


class Abilities(NamedTuple):
    """What a store can do beside being read: itself, or None where it cannot.

    Attributes:
        file: It is one file, swapped as a whole.
        rows: Its rows are written one by one, while an application may write them, too.
        vectors: Its rows can hold another vector.
        copies: It can be copied beside itself.
        partitions: Processes may each write a part of it.
        originals: It may hold lossy codes, and be told the vectors behind them.
        marker: It carries a note of who refined it.
        claims: It says itself who is writing it.
        leftovers: It may find files that a killed run left.
    """

    file: FileStore | None
    rows: RowStore | None
    vectors: AddsVectors | None
    copies: CopiedStore | None
    partitions: Partitioned | None
    originals: TakesOriginals | None
    marker: Marked | None
    claims: Claimable | None
    leftovers: LeavesFiles | None


_PROTOCOLS: tuple[type, ...] = (
    FileBacked,
    RowWritable,
    AddsVectors,
    Copied,
    Partitioned,
    TakesOriginals,
    Marked,
    Claimable,
    LeavesFiles,
)


def abilities(store: VectorStore) -> Abilities:
    """Return what a store declares that it can do."""
    held: list[Any] = [store if isinstance(store, kind) else None for kind in _PROTOCOLS]
    return Abilities(*held)
