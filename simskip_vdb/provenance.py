"""What is in a store's rows: the originals behind them, and whether anybody changed them since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from simskip_vdb.by_vector import Lookup as Lookup
from simskip_vdb.by_vector import near as near
from simskip_vdb.datatypes import Ids, Mask, Positions, VectorBatch, Vectors
from simskip_vdb.errors import DataError, StoreChangedError, UnsupportedIndexError
from simskip_vdb.journal import Journal
from simskip_vdb.register import SCAN_ROWS as SCAN_ROWS
from simskip_vdb.register import Ours, Register
from simskip_vdb.rows import Digests, Originals, row_digests
from simskip_vdb.store import VectorStore, abilities


class Resemblance:
    """Tells whether coarse codes stand for the rows that they should stand for.

    A row that was decoded is nearer, by cosine, to its own vector than to another row's: nearly
    always where each code is in its place, half of the time where they are shuffled.
    """

    _FEWEST = 100  # rows, below which a share says little
    _SHARE = 0.75

    def __init__(self) -> None:
        self._rows = self._own = 0

    def add(self, read: Vectors, exact: Vectors) -> None:
        """Compare rows as read back, shape (b, d), with the exact ones."""
        # Neighbours in scan order may be alike, so another row is taken from half a batch away.
        other = np.roll(exact, len(exact) // 2, axis=0)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            own, foreign = (
                (read * rows).sum(axis=1) / np.linalg.norm(rows, axis=1) for rows in (exact, other)
            )
        comparable = np.isfinite(own) & np.isfinite(foreign)
        self._rows += int(comparable.sum())
        self._own += int((own >= foreign)[comparable].sum())

    @property
    def plausible(self) -> bool:
        """Whether enough of the rows resemble their own vector."""
        return self._rows < self._FEWEST or self._own >= self._SHARE * self._rows


class TrueRows:
    """A store's rows as the application gave them: ours undone, and codes not taken for vectors."""

    def __init__(self, store: VectorStore, ours: Ours | None) -> None:
        self._store = store
        self._ours = ours
        self._lossy = store.info().lossy
        self._told = abilities(store).originals
        self._resemblance = Resemblance()

    def of(self, batch: VectorBatch) -> tuple[Vectors, Mask]:
        """Return each row's original, shape (b, d), and whether we wrote the row, shape (b,).

        Raises:
            UnsupportedIndexError: The store holds lossy codes, and nobody gave the exact vectors.
        """
        if self._ours is None:
            vectors, ours = batch.vectors, np.zeros(len(batch), np.bool_)
        else:
            vectors, ours = self._ours.originals(batch)
        if self._lossy and not ours.all():
            vectors = vectors.copy()
            vectors[~ours] = self._exact(batch.ids[~ours], batch.vectors[~ours])
        return vectors, ours

    def check(self) -> None:
        """Make sure that the exact vectors are those behind the codes.

        Raises:
            DataError: They belong to other rows.
        """
        if not self._resemblance.plausible:
            raise DataError(
                f"{self._store.info().uri}: the originals do not resemble what the index holds; "
                "give them in the order of the index's rows, or with their ids (--originals-ids)"
            )

    def _exact(self, ids: Ids, read: Vectors) -> Vectors:
        if self._told is None:
            raise UnsupportedIndexError(
                f"{self._store.info().uri} holds lossy codes, and takes no originals"
            )
        exact = self._told.originals(ids)
        self._resemblance.add(read, exact)
        return exact


class RowsInPlace:
    """Originals that are kept nowhere: they are read out of the index each time."""

    def __init__(self, store: VectorStore, true: TrueRows, read: Iterable[VectorBatch]) -> None:
        """Take an index, what tells its originals, and all of these once."""
        self._store, self._true = store, true
        ids = [batch.ids for batch in read]
        self.ids: Ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
        self.dim = store.info().dim

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, places: Positions | None = None) -> Iterator[tuple[int, Vectors]]:
        """Yield all rows; see `Originals.blocks`.

        Raises:
            StoreChangedError: Rows came or went.
        """
        start = 0
        for batch in self._store.scan(SCAN_ROWS):
            if not np.array_equal(batch.ids, self.ids[start : start + len(batch)]):
                break
            yield start, self._true.of(batch)[0]
            start += len(batch)
        if start < len(self):
            raise StoreChangedError(
                f"{self._store.info().uri}: rows came or went while it was read; nothing was "
                "written. Run the command again"
            )

    def take(self, positions: Positions) -> Vectors:
        """Return some rows; see `Originals.take`."""
        places, back = np.unique(positions, return_inverse=True)
        ids = self.ids[places]
        found = VectorBatch(ids=ids, vectors=self._store.fetch(ids))
        return self._true.of(found)[0][back]

    def matrix(self) -> Vectors:
        """Return all rows in memory; see `Originals.matrix`."""
        return np.concatenate([np.empty((0, self.dim), np.float32), *(b for _, b in self.blocks())])


class AsRead:
    """The rows as they were read, to tell later whether somebody changed them.

    A store may give back a vector with other last digits from one moment to the next (the client's
    local mode normalises what it searches). So where it is not exact, a row is the same while its
    original is: while it holds that, or what a write of ours made of that.
    """

    def __init__(
        self, rows: Originals, digests: Digests, journal: Journal, store: VectorStore
    ) -> None:
        """Take the originals, digests of the rows as they were read, and who wrote them."""
        info = store.info()
        self._digests, self._rows = digests, rows
        self.lookup, self._tolerance = Lookup(rows.ids), info.tolerance
        self._ours = Register(journal, store) if self._tolerance else None

    def same(self, now: VectorBatch) -> Mask:
        """Tell which of these rows are as they were read; rows that were not there are not."""
        places = self.lookup.find(now.ids)
        same = np.zeros(len(now), np.bool_)
        known = np.flatnonzero(places >= 0)
        same[known] = row_digests(now.vectors[known]) == self._digests[places[known]]
        doubtful = known[~same[known]]
        if self._ours is not None and len(doubtful):
            rows = VectorBatch(ids=now.ids[doubtful], vectors=now.vectors[doubtful])
            originals, _ = self._ours.originals(rows)
            then = self._rows.take(places[doubtful])
            same[doubtful] = near(originals, then, self._tolerance)
        return same
