"""Measure what the user's own index finds, before and after, and refuse what finds less."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Neighbors, Positions, Split, Vectors
from simskip_vdb.evaluation import depth, score
from simskip_vdb.gate import Decision, decide_ann
from simskip_vdb.measuring import learnt_from
from simskip_vdb.provenance import Lookup
from simskip_vdb.refiner import Refiner
from simskip_vdb.search import without_own
from simskip_vdb.store import VectorStore, abilities
from simskip_vdb.workspace import Blocks, Workspace

ANN_PROBES = 200
"""Rows that stand in for queries where none were given."""


class RefusedError(Exception):
    """The candidate index failed; carries the decision out of the write."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision


class ThroughIndex:
    """Measures through the user's index, as the application searches it."""

    def __init__(self, space: Workspace, refiner: Refiner, split: Split) -> None:
        self._space, self._refiner = space, refiner
        self._judged = space.judged.queries[split]
        self._lookup = Lookup(space.rows.ids)
        # Rows that act as queries would find themselves: only the index itself is measured then.
        learnt = learnt_from(refiner, self._judged)
        self._scored = not learnt.all() and space.skipped(split) is None
        self._queries, self._own = self._judged.vectors, self._judged.own
        if not len(self._judged):
            self._own = _some_rows(space)
            self._queries = space.rows.take(self._own)
        self.measures: dict[str, dict[str, float]] = {}
        self.ann: dict[str, float] = {}

    def look(
        self, when: str, store: VectorStore, refiner: Refiner | None, *, as_is: bool = False
    ) -> None:
        """Search a store whose rows went through `refiner`; None for the index as it is.

        With `as_is`, the rows that the store holds are compared, whoever wrote them.
        """
        space = self._space
        if space.info.exhaustive and not self._scored:
            self.ann[when] = 1.0
            return
        queries = (space.as_searched if refiner is None else refiner)(self._queries)
        blocks, take = self._rows(store, refiner, as_is)
        exact = space.search(queries, blocks, 10, own=self._own)
        names = space.measures if self._scored else ()
        k = max(10, depth(names, self._judged) if names else 0)
        found, new = self._search(store, queries, k)
        comparable = _leave_room(exact, new[:, :10])
        self.ann[when] = space.ann_recall(queries, comparable, found[:, :10], take)
        if names:
            for name, values in score(self._judged, found, names).items():
                self.measures.setdefault(name, {})[when] = float(values.mean())

    def _search(
        self, store: VectorStore, queries: Vectors, k: int
    ) -> tuple[Positions, NDArray[np.bool_]]:
        """Return positions, shape (q, k), -1 for none; and where there is a row that came since."""
        own = self._own
        found = store.search(queries, k + (own is not None), self._space.settings.search_params)
        positions = self._lookup.find(found.ids.ravel()).reshape(found.ids.shape)
        if own is not None:
            others = without_own(Neighbors(ids=positions, scores=found.scores), own, k)
            positions, found = others.ids, others
        there = ~np.isneginf(found.scores)
        return np.where(there, positions, -1), there & (positions < 0)

    def _rows(
        self, store: VectorStore, refiner: Refiner | None, as_is: bool
    ) -> tuple[Blocks, Callable[[Positions], Vectors]]:
        """Return the rows that exact search goes through, all and by position."""
        space, ids = self._space, self._space.rows.ids
        if refiner is None:
            return space.current_blocks(), space.current_rows
        late = space.late(refiner)
        live = abilities(store).rows is not None
        if as_is or live or not (space.info.exact or space.info.lossy):
            # Originals were read from codes, so codes are what is compared before and after; and
            # of a live store's rows, the application may have written some meanwhile.
            return space.blocks_of(store), lambda places: space.rows_of(store, places)
        return (
            space.refined_blocks(refiner, late),
            lambda at: refiner.refine_rows(space.rows.take(at), ids[at], late[at]),
        )

    def accept(self, candidate: VectorStore) -> None:
        """Measure the candidate and refuse it where its ann_recall fell too far."""
        self.look("after", candidate, self._refiner)
        decision = decide_ann(self.ann["before"], self.ann["after"])
        if not decision.passed:
            raise RefusedError(decision)


def _leave_room(exact: Neighbors, new: NDArray[np.bool_]) -> Neighbors:
    """Shorten each answer by the places that rows which came since hold in the index's own."""
    kept = np.arange(new.shape[1]) < new.shape[1] - new.sum(axis=1, keepdims=True)
    return Neighbors(
        ids=np.where(kept, exact.ids, -1), scores=np.where(kept, exact.scores, -np.inf)
    )


def _some_rows(space: Workspace) -> Positions:
    places = np.flatnonzero(space.usable)
    step = max(1, len(places) // ANN_PROBES)
    return places[::step][:ANN_PROBES]
