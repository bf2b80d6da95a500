"""A store that is one file without an index: read by row, compared whole, and written anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from simskip_vdb.connectors.checksums import checksum_follows, heal_checksum
from simskip_vdb.connectors.digits import Digits
from simskip_vdb.connectors.folders import nothing_at
from simskip_vdb.connectors.kinds import refuse_other_kinds
from simskip_vdb.connectors.rows import (
    Change,
    OneFile,
    RowOrder,
    checked_queries,
    no_partitions,
)
from simskip_vdb.connectors.swap import (
    Identity,
    appear,
    check_free,
    confirm,
    copy_durably,
    keep_as,
    staged,
    swap_in,
    sweep,
    take_mode_and_owner,
    unchanged,
)
from simskip_vdb.datatypes import (
    Cursor,
    Ids,
    Metric,
    Neighbors,
    Positions,
    StoreInfo,
    VectorBatch,
    Vectors,
)
from simskip_vdb.durable import beside, json_of, make_durable
from simskip_vdb.errors import ConfigError, StoreNotFoundError, VerificationError, listed
from simskip_vdb.search import exact_search
from simskip_vdb.state_place import DIGITS
from simskip_vdb.store import Candidate

LayOver = Callable[[int, Vectors], None]
"""Changes vectors in place: (position of the first row, vectors (b, d))."""
_ROWS = 8192


class Contents(Protocol):
    """The rows of an open file.

    Attributes:
        ids: Shape (n,).
        dim: Dimension of a vector.
    """

    ids: Ids
    dim: int

    def read(self, start: int, stop: int) -> Vectors:
        """Return the vectors of some successive rows, shape (stop - start, d)."""
        ...

    def take(self, positions: Positions) -> Vectors:
        """Return the vectors at some positions, shape (len(positions), d)."""
        ...

    def rewrite(self, target: Path, lay_over: LayOver, digits: Digits) -> None:
        """Write the file anew as it was but for its vectors.

        Args:
            target: Where to.
            lay_over: Puts new vectors in the place of old ones.
            digits: Knows those of the originals.

        Raises:
            StoreError: Reading or writing failed.
        """
        ...

    def alike(self, other: Any, /) -> bool:  # noqa: ANN401 of the same class
        """Tell whether another file is the same but for its vectors."""
        ...


def state_root(path: Path) -> Path:
    """Return where the states of what a file or a folder holds are."""
    return beside(path, ".simskip")


def state_of(path: Path, own: str, name_in: Callable[[str], str]) -> Path:
    """Return where the state is of one of the sets of vectors that a file holds.

    Every set has a state of its own. It is the root for the set whose state is there already.

    Args:
        path: The file or folder.
        own: Name of the set.
        name_in: Returns the name of the set that an address is about; of an empty one, that of the
            set whose state is the root where none is there.
    """
    root = state_root(path)
    try:
        owner = name_in(json_of((root / "manifest.json").read_bytes())["index"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        owner = name_in("")
    return root if own == owner else root / "columns" / quote(own, safe="")


class RowFile(OneFile):
    """A `VectorStore` that is one file; what is in it, subclasses tell.

    There is no index in such a file, so a search compares all rows.

    Attributes:
        payload: Names of the columns beside ids and vectors.
    """

    payload: tuple[str, ...] = ()

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        """Open a file."""
        self._path, self._read_only = Path(path).resolve(), read_only
        self.reopen()

    def _open(self) -> Contents:
        """Look at what the file holds now."""
        raise NotImplementedError

    def _other(self, path: Path) -> RowFile:
        """Open a copy of the file for reading only."""
        raise NotImplementedError

    def _address(self, path: Path) -> str:
        """Return the address of a copy of the file."""
        raise NotImplementedError

    def _state_at(self, path: Path) -> Path:
        """Return where the state of a copy of the file is."""
        raise NotImplementedError

    def _fields(self, start: int, stop: int, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return what some successive rows hold in payload columns."""
        return {}

    @property
    def _metric(self) -> Metric:
        raise NotImplementedError

    def info(self) -> StoreInfo:
        """Describe the file as it was opened."""
        raise NotImplementedError

    def reopen(self) -> None:
        """Look at the file anew."""
        if not self._path.is_file():
            raise nothing_at(self._path, self._uri)
        refuse_other_kinds(self._path, self._uri.partition(":")[0], self._uri)
        self._identity = Identity.of(self._path)
        self._contents = self._open()
        self._rows = RowOrder(self._contents.ids, self._uri)

    @cached_property
    def _state(self) -> Path:
        return self._state_at(self._path)

    @property
    def _digits(self) -> Path:
        """Where the digits of originals are kept that float32 does not hold."""
        return self._state / DIGITS / "rows"

    def scan(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] = (),
        cursor: Cursor | None = None,
        partition: int | None = None,
    ) -> Iterator[VectorBatch]:
        """Yield every row once, in the order of the file; see `VectorStore.scan`."""
        no_partitions(self._uri, partition)
        check_fields(fields, self.payload, self._uri)
        windows = self._rows.windows(batch_size, cursor)
        return (self._batch(start, stop, fields) for start, stop in windows)

    def fetch(self, ids: Ids) -> Vectors:
        """Return the vectors of these ids; see `VectorStore.fetch`."""
        positions = self._rows.positions(ids)
        unchanged(self._path, self._identity)
        return self._contents.take(positions)

    def search(self, queries: Vectors, k: int, params: Mapping[str, Any]) -> Neighbors:
        """Compare all rows; see `VectorStore.search`. There are no parameters."""
        if params:
            raise ConfigError(f"{self._uri}: exact search has no parameters, not {sorted(params)}")
        array = checked_queries(self._uri, queries, self._contents.dim, k)
        found = exact_search(array, self._blocks(), k, self._metric)
        nothing = np.array([b"" if self.ids.dtype.kind == "S" else -1], self.ids.dtype)
        ids = np.append(self.ids, nothing)[found.ids]  # -1 is the last
        return Neighbors(ids=ids, scores=found.scores)

    @contextmanager
    def prepared(
        self, batches: Iterable[VectorBatch], *, keep: Path | None, expected: str
    ) -> Iterator[Candidate]:
        """Write the file anew beside itself; see `FileBacked.prepared`."""
        self._writable()
        with staged(self._path) as temporary:
            take_mode_and_owner(temporary, self._path)
            candidate = self._written(batches, temporary, keep=True)
            yield Candidate(candidate, partial(self._swap_in, temporary, keep, expected))

    def _swap_in(self, temporary: Path, keep: Path | None, expected: str) -> None:
        unchanged(self._path, self._identity, expected)
        take_mode_and_owner(temporary, self._path)
        keep_as(self._path, keep, expected)
        unchanged(self._path, self._identity)
        with checksum_follows(self._path, temporary):
            swap_in(temporary, self._path)
        self.reopen()
        confirm(self._path)

    @contextmanager
    def prepared_copy(self, batches: Iterable[VectorBatch], output: Path) -> Iterator[Candidate]:
        """Write the rewritten file to a new one; see `FileBacked.prepared_copy`."""
        check_free(output)
        with staged(output) as temporary:
            candidate = self._written(batches, temporary, keep=False)
            yield Candidate(candidate, partial(appear, temporary, output, self._path))

    def info_at(self, path: Path) -> StoreInfo:
        """Describe a copy at another path; see `FileBacked.info_at`."""
        path = path.resolve()
        return replace(
            self.info(),
            uri=self._address(path),
            state=self._state_at(path),
            claim=state_root(path),
        )

    def put_back(self, kept: Path, *, expected: str) -> None:
        """Swap a kept file back; see `FileBacked.put_back`."""
        self._writable()
        if not kept.is_file():
            raise StoreNotFoundError(f"{kept}: the kept file is gone; {self._path} is unchanged")
        with staged(self._path) as temporary:
            copy_durably(kept, temporary)
            take_mode_and_owner(temporary, self._path)
            unchanged(self._path, self._identity, expected)
            with checksum_follows(self._path, temporary):
                swap_in(temporary, self._path)
            self.reopen()
            confirm(self._path)

    def sweep(self) -> None:
        """Remove what a killed write left behind; see `LeavesFiles.sweep`."""
        if not self._read_only:
            sweep(self._path)
            heal_checksum(self._path)

    @property
    def _uri(self) -> str:
        return self._address(self._path)

    def _batch(self, start: int, stop: int, fields: Sequence[str]) -> VectorBatch:
        unchanged(self._path, self._identity)
        return VectorBatch(
            ids=self.ids[start:stop],
            vectors=self._contents.read(start, stop),
            fields=self._fields(start, stop, fields),
            cursor=stop,
        )

    def _blocks(self) -> Iterator[tuple[int, Vectors]]:
        for batch in self.scan(_ROWS):
            yield int(batch.cursor or 0) - len(batch), batch.vectors

    def _written(self, batches: Iterable[VectorBatch], target: Path, *, keep: bool) -> RowFile:
        """Write the file with new vectors to `target`, and open it.

        With `keep`, the digits of originals are kept, since the file will take this one's place.
        """
        unchanged(self._path, self._identity)
        changes = _Changes(self._rows.changes(batches, self._contents.dim))
        digits = Digits(self._digits, self._contents.dim, self._uri, keep=keep)
        self._contents.rewrite(target, changes.lay_over, digits)
        changes.finish()
        digits.settle()
        make_durable(target)
        candidate = self._other(target)
        if not self._contents.alike(candidate._contents):
            raise VerificationError(
                f"{self._uri}: written anew, what it holds beside vectors would differ; nothing "
                "was changed"
            )
        return candidate


class _Changes:
    """New vectors in the order of rows, laid over the old ones a block at a time."""

    def __init__(self, changes: Iterator[Change]) -> None:
        self._changes, self._held = changes, next(changes, None)

    def lay_over(self, start: int, vectors: Vectors) -> None:
        """Put new vectors in the place of old ones, whose first row is at position `start`."""
        stop = start + len(vectors)
        while self._held is not None and self._held.positions[0] < stop:
            positions, new = self._held
            here = int(np.searchsorted(positions, stop))
            vectors[positions[:here] - start] = new[:here]
            rest: tuple[Positions, Vectors] = (positions[here:], new[here:])
            self._held = Change(*rest) if len(rest[0]) else next(self._changes, None)

    def finish(self) -> None:
        """Look at what comes after the last row, so that a wrong batch is noticed."""
        for _ in self._changes:
            pass


def check_fields(fields: Sequence[str], known: Sequence[str], uri: str) -> None:
    """Refuse columns that there are not.

    Raises:
        ConfigError: One of them was asked for.
    """
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"{uri}: there is no column '{name}' beside ids and vectors; there are: "
                f"{listed(known)}"
            )
