"""The rows of a Lance table that have a vector: read by id, and written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simskip_vdb.connectors.lance_ids import (
    among,
    between,
    check_kind,
    places_of,
    refuse_repeated,
    to_column,
    to_ids,
)
from simskip_vdb.connectors.lance_scan import LanceScan
from simskip_vdb.connectors.lance_table import Conflict, engine_call
from simskip_vdb.datatypes import Ids, Mask, Positions, VectorBatch, Vectors
from simskip_vdb.store import Allowed

PAGE = 8192
"""Rows in a request: each that writes reads all other columns once, and makes a version."""
_TRIES, _WAIT = 10, 0.05
_ADDRESS = "_rowaddr"
_FRAGMENT = np.uint64(32)  # bits of an address below the number of its fragment


class Held(NamedTuple):
    """Rows as they are at one version.

    Attributes:
        at: Their positions among the ids that were asked for.
        rows: Ids and vectors, with the guard among the fields.
        addresses: Where they lie: one that is written anew lies in a later fragment.
        guards: The guard's values as an Arrow column; None where there is no guard.
    """

    at: Positions
    rows: VectorBatch
    addresses: NDArray[np.uint64]
    guards: Any

    def some(self, chosen: Positions) -> Held:
        """Return some of them; `chosen` is ascending."""
        if len(chosen) == len(self.at):
            return self
        rows = VectorBatch(ids=self.rows.ids[chosen], vectors=self.rows.vectors[chosen])
        guards = None if self.guards is None else self.guards.take(pa.array(chosen))
        return Held(self.at[chosen], rows, self.addresses[chosen], guards)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanceRows(LanceScan):
    """Rows of a table with a vector, which can be written; see `LanceScan`."""

    def peek(self, ids: Ids) -> VectorBatch:
        """Return those of these rows that are there, in the order asked."""
        wanted = check_kind(ids, self.columns.id_kind, self.uri)
        vectors = np.empty((len(wanted), self.columns.dim), np.float32)
        there = np.zeros(len(wanted), np.bool_)
        with engine_call(self.uri, "reading rows"):
            self.table.checkout_latest()
        for start in range(0, len(wanted), PAGE):
            held = self.read(self.table, wanted[start : start + PAGE])
            vectors[start + held.at] = held.rows.vectors
            there[start + held.at] = True
        return VectorBatch(ids=wanted[there], vectors=vectors[there])

    def read(self, table: Any, ids: Ids) -> Held:  # noqa: ANN401 lancedb
        """Read those of at most a page of rows that are there, one at least being asked for.

        Raises:
            DataError: An id stands for several rows.
        """
        names = [self.columns.id, self.columns.vector, *([self.guard] if self.guard else [])]
        with engine_call(self.uri, "reading rows"):
            where = self._choice(table, ids)
            wanted = [*dict.fromkeys(names), _ADDRESS]
            found = table.search().where(where).select(wanted).to_arrow()
        asked = np.isin(to_ids(found[self.columns.id], self.columns.id, self.uri), ids)
        if not asked.all():
            found = found.filter(pa.array(asked))
        found = self.having_vectors(found)
        batch = self.batch(found, [self.guard] if self.guard else [])
        at = places_of(batch.ids, ids)
        order = np.argsort(at, kind="stable")
        refuse_repeated(batch.ids[order], self.columns.id, self.uri)
        guards = found[self.guard].combine_chunks().take(pa.array(order)) if self.guard else None
        rows = VectorBatch(
            ids=batch.ids[order],
            vectors=batch.vectors[order],
            fields={} if guards is None else {self.guard or "": guards.to_pylist()},
        )
        return Held(at[order], rows, found[_ADDRESS].to_numpy()[order], guards)

    def update(self, ids: Ids, vectors: Vectors, allowed: Allowed) -> Mask:
        """Write those of at most a page of rows that are there and that `allowed` lets go.

        Returns:
            Which were written, shape (len(ids),).

        Raises:
            TransientStoreError: Others wrote the same rows over and over.
        """
        written = np.zeros(len(ids), np.bool_)
        left = np.arange(len(ids))
        for tries in range(_TRIES):
            with engine_call(self.uri, "reading rows"):
                self.table.checkout_latest()
            held = self.read(self.table, ids[left])
            if not len(held.rows):
                return written
            chosen = np.flatnonzero(allowed(held.rows))
            if not len(chosen):
                return written
            rows = left[held.at[chosen]]
            try:
                sent = self.write(held.some(chosen), vectors[rows])
            except Conflict:
                if tries == _TRIES - 1:
                    raise
                sent = np.zeros(len(rows), np.bool_)
            written[rows[sent]] = True
            left = rows[~sent]
            if not len(left):
                return written
            time.sleep(_WAIT * tries)
        raise Conflict(
            f"{self.uri}: {len(left):,} rows were written by others each of {_TRIES} times that "
            "they were to be written; the same command goes on"
        )

    def write(self, held: Held, vectors: Vectors) -> Mask:
        """Write rows that are as they were read; return which, shape (len(held.rows),).

        Where somebody else wrote meanwhile, the engine tries again with the rows as they are then.
        A row that is written anew lies in a later fragment, which the condition excludes. Only a
        writer of single columns by an indexed key leaves a row where it was: what was written over
        that is given back.
        """
        kinds = self.columns
        dtype = kinds.dtype
        new = np.ascontiguousarray(vectors, dtype)
        bound = (int(held.addresses.max() >> _FRAGMENT) + 1) << int(_FRAGMENT)
        condition = f"target.{_ADDRESS} < {bound}"
        source = {
            kinds.id: to_column(held.rows.ids, kinds.id_kind),
            kinds.vector: pa.FixedSizeListArray.from_arrays(pa.array(new.ravel()), type=kinds.kind),
        }
        if self.guard is not None and self.guard not in source:
            name = self.sql(self.guard)
            source[self.guard] = held.guards
            condition += (
                f" AND (target.{name} = source.{name} OR "
                f"(target.{name} IS NULL AND source.{name} IS NULL))"
            )
        with engine_call(self.uri, "writing rows; is the disk full?", writes=True):
            merge = self.table.merge_insert(kinds.id).when_matched_update_all(where=condition)
            result = merge.use_index(False).execute(pa.table(source))
        ours = np.ones(len(held.rows), np.bool_)
        if result.num_attempts > 1 or result.num_updated_rows != len(held.rows):
            self._give_back(held, bound, result.version)
            with engine_call(self.uri, "reading rows"):
                table = self.reopen()
            now = self.read(table, held.rows.ids)
            ours[:] = False
            ours[now.at] = _same(now.rows.vectors, new.astype(np.float32)[now.at])
        return ours

    def _give_back(self, held: Held, bound: int, version: int) -> None:
        """Put back vectors that others wrote in place just before our write of a version."""
        before = self._at(version - 1, held.rows.ids)
        changed = ~_same(before.rows.vectors, held.rows.vectors[before.at])
        changed &= before.addresses < bound
        if changed.any():
            theirs = before.some(np.flatnonzero(changed))
            after = self._at(version, theirs.rows.ids)
            if len(after.rows):
                self.write(after, theirs.rows.vectors[after.at])

    def _at(self, version: int, ids: Ids) -> Held:
        with engine_call(self.uri, f"reading version {version}"):
            table = self.reopen()
            table.checkout(version)
        return self.read(table, ids)

    def _choice(self, table: Any, ids: Ids) -> str:  # noqa: ANN401 lancedb
        """Return SQL that lets rows of these ids through, and others if that is faster to find."""
        name = self.sql(self.columns.id)
        where = "" if self.filter is None else f" AND ({self.filter})"
        span = between(ids, name)
        most = 2 * len(ids)
        dense = ids.dtype.kind != "S" and int(ids.max()) - int(ids.min()) < most
        if dense or table.count_rows(span) <= most:
            return span + where
        return among(ids, name) + where


def _same(one: Vectors, other: Vectors) -> Mask:
    """Tell which vectors are the same to the bit, shape (n,)."""
    same: Mask = (one.view(np.uint32) == other.view(np.uint32)).all(axis=1)
    return same
