"""Originals on disk, and digests that tell one row from another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import ID_TEXT, Ids, Mask, Positions, Vectors, id_text
from simskip_vdb.errors import JournalError

Digests = NDArray[np.uint64]

SOUND = (1e-15, 1e15)
"""Norms that float32 can square, add up and divide by; what lies outside is nobody's embedding."""


def usable_vectors(vectors: Vectors) -> Mask:
    """Tell which vectors can be compared: finite, and of a norm within `SOUND`, shape (m,)."""
    # A sum of float32 squares in float64 can neither overflow nor vanish.
    with np.errstate(invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    usable: Mask = (squares >= SOUND[0] ** 2) & (squares <= SOUND[1] ** 2)
    return usable


class Originals(Protocol):
    """Every row as the application wrote it; positions are scan order.

    Attributes:
        ids: Shape (n,), int64 or text.
        dim: Dimension of a vector.
    """

    ids: Ids
    dim: int

    def __len__(self) -> int: ...

    def blocks(self, places: Positions | None = None, /) -> Iterator[tuple[int, Vectors]]:
        """Yield (position of the first row, vectors (b, d)) over all rows.

        With `places`, blocks that hold none of these positions may be left out.
        """
        ...

    def take(self, positions: Positions, /) -> Vectors:
        """Return the rows at these positions, shape (len(positions), d)."""
        ...

    def matrix(self) -> Vectors:
        """Return all rows in memory, shape (n, d)."""
        ...


class Rows:
    """Originals on disk, read a block at a time; positions are scan order.

    Blocks are read, not mapped: pages of a map would stay resident and count as memory.

    Args:
        paths: The file; or those of an index's partitions, of which one at a time is open.

    Attributes:
        path: The first file.
        ids: Shape (n,), int64 or text.
        dim: Dimension of a vector.
    """

    def __init__(self, *paths: Path) -> None:
        self.path, self._paths = paths[0], paths
        self._lock = Lock()  # the reader is not made for several threads
        ids: list[Ids] = []
        self._files: list[int] = []  # of each block, and which block of that file it is
        self._numbers: list[int] = []
        for number in range(len(paths)):
            found = self._read_ids(number)
            ids += found
            self._files += [number] * len(found)
            self._numbers += range(len(found))
        self.dim: int = self._reader.schema.field("vector").type.list_size
        held = [block for block in ids if len(block)]  # a file without rows tells no kind of ids
        self.ids: Ids = np.concatenate(held) if held else np.empty(0, np.int64)
        self._starts = np.cumsum([0, *map(len, ids)])

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, places: Positions | None = None) -> Iterator[tuple[int, Vectors]]:
        """Yield (position of the first row, vectors (b, d)) over all rows.

        With `places`, only blocks that hold one of these positions.
        """
        wanted: Iterable[int] = range(self._blocks)
        if places is not None:
            wanted = np.unique(np.searchsorted(self._starts, places, side="right") - 1).tolist()
        for i in wanted:
            yield int(self._starts[i]), self._block(i)

    def take(self, positions: Positions) -> Vectors:
        """Return the rows at these positions, shape (len(positions), d)."""
        out = np.empty((len(positions), self.dim), np.float32)
        block_of = np.searchsorted(self._starts, positions, side="right") - 1
        for i in np.unique(block_of):
            chosen = np.flatnonzero(block_of == i)
            out[chosen] = self._block(i)[positions[chosen] - self._starts[i]]
        return out

    def matrix(self) -> Vectors:
        """Return all rows in memory, shape (n, d)."""
        out = np.empty((len(self), self.dim), np.float32)
        for start, block in self.blocks():
            out[start : start + len(block)] = block
        return out

    @property
    def _blocks(self) -> int:
        return len(self._files)

    def _block(self, i: int) -> Vectors:
        with self._lock:
            if self._files[i] != self._at:
                self._open(self._files[i])
            batch = self._reader.get_batch(self._numbers[i])
        vectors: Vectors = batch["vector"].flatten().to_numpy()
        return vectors.reshape(-1, self.dim)

    def _read_ids(self, number: int) -> list[Ids]:
        import pyarrow as pa

        self._open(number)
        only_ids = pa.ipc.IpcReadOptions(included_fields=[0])
        # Of a map, only the pages with ids are read.
        with _reading(self._paths[number]), pa.memory_map(str(self._paths[number])) as mapped:
            reader = pa.ipc.open_file(mapped, options=only_ids)
            blocks = range(reader.num_record_batches)
            return [ids_from_arrow(reader.get_batch(i)["id"]).copy() for i in blocks]

    def _open(self, number: int) -> None:
        import pyarrow as pa

        with _reading(self._paths[number]):
            self._reader = pa.ipc.open_file(pa.OSFile(str(self._paths[number])))
        self._at = number


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise JournalError(f"{path} cannot be read: {error}") from error


def row_digests(vectors: Vectors) -> Digests:
    """Hash every row's bits, shape (n,), uint64; equal rows have equal digests.

    Each 32-bit word is mixed with a key of its own, and a row's words are added modulo 2⁶⁴.
    """
    words = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    keys = np.random.default_rng(0x51A5C1B).integers(0, 2**64, words.shape[1], np.uint64)
    out = np.empty(len(words), np.uint64)
    step = max(1, 2**20 // max(1, words.shape[1]))
    for start in range(0, len(words), step):
        mixed = _splitmix(words[start : start + step] + keys)  # (step, d) uint64
        out[start : start + step] = mixed.sum(axis=1, dtype=np.uint64)
    return out


def fingerprint_of(ids: Ids, digests: Digests) -> str:
    """Hash a set of rows, given by ids and digests of their vectors, whatever their order."""
    mixed = _splitmix(hash_ids(ids, 0) ^ digests)
    return f"{len(ids)}-{int(mixed.sum(dtype=np.uint64)):016x}"


def together(fingerprints: Iterable[str]) -> str:
    """Return what `fingerprint_of` says of several sets of rows together."""
    rows = mixed = 0
    for text in fingerprints:
        count, _, digest = text.partition("-")
        rows, mixed = rows + int(count), mixed + int(digest, 16)
    return f"{rows}-{mixed % 2**64:016x}"


def ids_to_arrow(ids: Ids) -> Any:  # noqa: ANN401 pyarrow
    """Return row ids as an Arrow array: int64, or strings where ids are text."""
    import pyarrow as pa

    return pa.array(ids).cast(pa.string()) if ids.dtype.kind == "S" else pa.array(ids, pa.int64())


def ids_from_arrow(column: Any) -> Ids:  # noqa: ANN401 pyarrow
    """Return what `ids_to_arrow` was given."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return id_text(column.cast(pa.binary()).to_numpy(zero_copy_only=False))
    return np.asarray(column.to_numpy())


def hash_ids(ids: Ids, seed: int) -> Digests:
    """Hash row ids to numbers spread evenly over 64 bits, shape (n,), the same in every run."""
    if ids.dtype.kind == "S":
        ids = _text_digests(id_text(ids)).view(np.int64)
    mixed = ids.astype(np.int64).view(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    return _splitmix(mixed)


def _text_digests(ids: Ids) -> Digests:
    """Hash ids that are text, the same whatever the width of their type."""
    width = ids.dtype.itemsize
    digests = row_digests(_words(ids))
    beyond, usual = (row_digests(_words(np.zeros(1, f"S{w}"))) for w in (width, ID_TEXT.itemsize))
    return digests - (beyond - usual)  # what zeros behind the usual width add


def _words(ids: Ids) -> Vectors:
    words = np.ascontiguousarray(ids).view(np.uint32).reshape(len(ids), ids.dtype.itemsize // 4)
    return words.view(np.float32)


def _splitmix(words: Digests) -> Digests:
    """Mix every number in place (the finaliser of SplitMix64, Steele et al. 2014)."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
