"""What each step of a fit compares: anchors with columns, some of them raw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simskip_vdb.config import FitSettings, Signal
from simskip_vdb.datatypes import Ids, JudgedQueries, Metric, Positions, Side, Vectors
from simskip_vdb.errors import DataError
from simskip_vdb.losses import Similarity
from simskip_vdb.model import moved
from simskip_vdb.pairs import (
    OnDisk,
    Pairs,
    Targets,
    group_pairs,
    judged_pairs,
    nearest,
    neighbour_pairs,
)
from simskip_vdb.residence import Resident

# In standard deviations of an anchor's similarity to the rows that compete for it, so that encoders
# whose cosines are crowded learn as those whose cosines are not; rows lie closer to their own than
# queries to their answers.
QUERY_TEMPERATURE = 1.5
ROW_TEMPERATURE = 0.5

COLUMNS_OF_ANCHOR = 8  # fewer queries than rows need no more of these in a step
FEWEST_COLUMNS = 1024
HARD_NEGATIVES = 16  # mined for each query; a step takes HARD_PER_STEP of them
MINED = 64  # of which they are chosen again as rows move, where chance draws a row seldom
SELDOM = 0.25  # part of the rows that are columns of a step
HARD_PER_STEP = 4
NEGATIVES_KEEP = 0.5  # of their offsets: wrong for a few queries, rows may be right for others
RANKED = 64  # queries whose mined rows are ranked at once
NEIGHBOURS = 5  # positives of a row where nothing else is known
NEIGHBOUR_ANCHORS = 16384  # bounds the search for neighbours in a large index
MAX_OFFSETS = 250_000  # of more, each would be drawn too seldom to be learnt
SAMPLE = 4096  # rows that tell norms and spread
SAMPLED_ANCHORS = 256  # that tell spread
LEAST_SPREAD = 1e-6  # where all rows are one

# Weight given to positives by nearness to the anchor, the rest evenly, so that a group tightens
# without losing its inner order.
NEAR_SHARE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What to fit on; positions are row numbers in scan order.

    Attributes:
        vectors: Rows, shape (n, d), float32; (0, d) where they are on disk.
        ids: Row ids, shape (n,).
        metric: How the index compares.
        queries: Judged queries of the fit split.
        groups: Group of each row, shape (n,); -1 for none.
        usable: Rows that may take part, shape (n,): finite, not zero, not held out.
        late: Rows treated as late, shape (n,): raw competitors that never move.
        offsets: Whether rows may have offsets of their own.
        on_disk: Rows that are not in memory.
    """

    vectors: Vectors
    ids: Ids
    metric: Metric
    queries: JudgedQueries | None = None
    groups: NDArray[np.int64] | None = None
    usable: NDArray[np.bool_]
    late: NDArray[np.bool_] | None = None
    offsets: bool = True
    on_disk: OnDisk | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What one step compares.

    Attributes:
        queries: Unit anchors, shape (b, d).
        raw: Unit columns, shape (c, d).
        slots: Place of each column's offset, shape (c,).
        left_raw: Columns that compete raw, shape (c,).
        pairs: Anchor and column of each positive, shape (2, p).
        weights: Weight of each positive, shape (p,).
        own: Column that is the anchor itself, shape (b,); -1 where there is none.
        pseudo: Unit pseudo-queries near rows that no judgment points to, shape (b, d) or (0, d).
        unjudged_share: Part of all rows that no judgment points to.
        metric: How the index compares.
        origin: Mean direction of all rows, shape (d,).
        temperature: τ.
        query_norms: Norms of the anchors in units of a typical row's, shape (b,).
        row_norms: Norms of the columns in the same units, shape (c,).
    """

    queries: Tensor
    raw: Tensor
    slots: Tensor
    left_raw: Tensor
    pairs: Tensor
    weights: Tensor
    own: Tensor
    pseudo: Tensor
    unjudged_share: float
    metric: Metric
    origin: Tensor
    temperature: float
    query_norms: Tensor
    row_norms: Tensor

    def columns(self, keys: Tensor) -> Tensor:
        """Return what anchors are compared with, shape (c, d).

        Without the origin, which is most of a crowded encoder's vectors, bfloat16 keeps the digits
        that tell columns apart; a query's similarity to it is the same for all columns.

        Args:
            keys: Unit directions of the columns, shape (c, d).
        """
        if self.metric is not Metric.COSINE:
            keys = keys * self.row_norms[:, None]
        return keys - self.origin

    def compare(self, queries: Tensor, columns: Tensor) -> Similarity:
        """Return the index's own similarity over temperature, up to what all columns share.

        Args:
            queries: Unit directions of the anchors, or of pseudo-queries, shape (b, d).
            columns: As `columns` returns them, shape (c, d).
        """
        if self.metric is Metric.COSINE:
            return Similarity(queries / self.temperature, columns)
        if self.metric is Metric.EUCLID:
            # -‖q - x‖² / 2 without ‖q‖², which all columns share.
            queries = queries * self.query_norms[: len(queries), None]
            bias = -(self.row_norms**2) / 2 / self.temperature
        else:
            bias = torch.zeros_like(self.row_norms)
        return Similarity(queries / self.temperature, columns, bias)


class Sampler:
    """Draws steps from a problem.

    Args:
        problem: Rows in memory, judgments and groups.
        signal: What to learn from: judged queries, groups or neighbours.
        settings: How to fit.
        rng: Source of every draw.
        device: Where the tensors go.

    Raises:
        DataError: The signal has no positives.
    """

    def __init__(
        self,
        problem: Problem,
        signal: Signal,
        settings: FitSettings,
        rng: np.random.Generator,
        device: str,
    ) -> None:
        n = len(problem.vectors)
        self._problem = problem
        self._settings = settings
        self._rng = rng
        self._device = device
        self._rows = np.flatnonzero(problem.usable)
        self._column_of = np.full(n, -1, dtype=np.int64)
        self._late = np.zeros(n, dtype=np.bool_) if problem.late is None else problem.late
        self._pairs = _pairs(problem, signal, self._rows, rng, device)
        self._vectors = Resident(problem.vectors, device)
        of_rows = self._pairs.vectors is problem.vectors
        self._anchor_vectors = self._vectors if of_rows else Resident(self._pairs.vectors, device)
        self.anchors = self._pairs.anchors
        self._size = min(
            settings.columns, max(FEWEST_COLUMNS, COLUMNS_OF_ANCHOR * len(self.anchors))
        )
        self._drawn_seldom = self._size < SELDOM * len(self._rows)
        most = settings.steps * settings.batch_size
        if len(self.anchors) > most:
            self.anchors = np.sort(rng.choice(self.anchors, most, replace=False))
        self._by_queries = signal is Signal.JUDGED
        self._hard = np.empty((len(self._pairs.vectors), 0), dtype=np.int64)
        self._unjudged = np.zeros(n, dtype=np.bool_)
        self.offset_rows = np.empty(0, dtype=np.int64)
        if self._by_queries:
            asked = self._pairs.vectors[self.anchors]
            k = MINED if self._drawn_seldom else HARD_NEGATIVES
            self._mined = nearest(asked, problem.vectors, self._rows, k=k, device=device)
            hard = self._mined[:, :HARD_NEGATIVES]
            self._hard = np.full((len(self._pairs.vectors), hard.shape[1]), -1)
            self._hard[self.anchors] = hard
            judged = self._pairs.rows_with_anchors()
            self._unjudged[self._rows] = True
            self._unjudged[judged] = False
            self.offset_rows = np.union1d(judged, hard)
        elif signal is Signal.GROUPS:
            self.offset_rows = self._pairs.rows_with_anchors()
        self.offset_rows = self.offset_rows[~self._late[self.offset_rows]]
        still = settings.side is Side.QUERIES or not problem.offsets
        if len(self.offset_rows) > MAX_OFFSETS or still:
            self.offset_rows = self.offset_rows[:0]
        # Part of its offset that a row keeps once it is learnt, shape (m,).
        self.keep = np.where(
            self._unjudged[self.offset_rows], np.float32(NEGATIVES_KEEP), np.float32(1)
        )
        self._slot_of = np.full(n, len(self.offset_rows))
        self._slot_of[self.offset_rows] = np.arange(len(self.offset_rows))
        self._unjudged_share = float(self._unjudged.sum() / len(self._rows))
        self.origin = mean_direction(problem.vectors, self._rows)
        self._origin = self._tensor(self.origin)
        sample = rng.choice(self._rows, min(SAMPLE, len(self._rows)), replace=False)
        self._typical_norm = float(np.median(np.linalg.norm(problem.vectors[sample], axis=1)))
        factor = QUERY_TEMPERATURE if self._by_queries else ROW_TEMPERATURE
        self._temperature = factor * self._spread(sample)

    def step(self, batch: Positions) -> Step:
        """Draw the columns of a step.

        Args:
            batch: Anchors, shape (b,).
        """
        columns = self._columns(batch)
        self._column_of[columns] = np.arange(len(columns))
        targets = self._pairs.targets(batch, columns, self._column_of)
        self._column_of[columns] = -1

        left_raw = self._late[columns] | (self._rng.random(len(columns)) < self._settings.raw_share)
        bare = self._bare(batch, columns)
        step = replace(
            bare,
            slots=self._tensor(self._slot_of[columns]),
            left_raw=self._tensor(left_raw),
            pairs=self._tensor(np.stack([targets.anchor, targets.column])),
            weights=self._tensor(targets.weight),
            own=self._tensor(targets.own),
            pseudo=self._pseudo(bare.queries, bare.raw, targets, columns),
            temperature=self._temperature,
        )
        return step if self._by_queries else replace(step, weights=_favour_near(step))

    def _bare(self, batch: Positions, columns: Positions) -> Step:
        """Return a step that compares anchors with columns, and no more."""
        queries, query_norms = _unit(self._anchor_vectors.take(batch))
        raw, row_norms = _unit(self._vectors.take(columns))
        none = torch.empty(0, dtype=torch.int64)
        return Step(
            queries=queries,
            raw=raw,
            slots=none,
            left_raw=none,
            pairs=none,
            weights=none,
            own=none,
            pseudo=none,
            unjudged_share=self._unjudged_share,
            metric=self._problem.metric,
            origin=self._origin,
            temperature=1.0,
            query_norms=query_norms / self._typical_norm,
            row_norms=row_norms / self._typical_norm,
        )

    def _spread(self, rows: Positions) -> float:
        """Return the standard deviation of an anchor's similarity to its nearest rows, their mean.

        The nearest of all is left out: it may be the answer, or the anchor itself.
        """
        some = self.anchors[:: -(-len(self.anchors) // SAMPLED_ANCHORS)]
        step = self._bare(some, rows)
        scores = step.compare(step.queries, step.columns(step.raw)).scores(slice(None))
        if len(rows) > 2:
            scores = scores.topk(min(1 + HARD_NEGATIVES, len(rows)), dim=1).values[:, 1:]
        return max(float(scores.std(dim=1).mean()), LEAST_SPREAD)

    def refresh(self, move: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take as hard negatives the mined rows that are nearest to their query as rows are now.

        Args:
            move: Maps directions from the origin, shape (n, d), and places of rows' offsets, shape
                (n,), to moves of the same shape.
        """
        if not self._by_queries or not self._drawn_seldom:
            return
        side = self._settings.side

        def refine(x: Tensor, slots: NDArray[np.int64]) -> Tensor:
            return moved(x, self._origin, lambda c: move(c, self._tensor(slots)))

        for start in range(0, len(self.anchors), RANKED):
            some = self.anchors[start : start + RANKED]
            mined = self._mined[start : start + RANKED]  # (a, k)
            rows = mined.ravel()
            unit, _ = _unit(self._vectors.take(rows))
            near = unit if side is Side.QUERIES else refine(unit, self._slot_of[rows])
            queries, _ = _unit(self._anchor_vectors.take(some))
            if side is not Side.DOCS:
                queries = refine(queries, np.full(len(queries), len(self.offset_rows)))
            scores = torch.einsum("ad,akd->ak", queries, near.view(*mined.shape, -1))
            best = scores.topk(self._hard.shape[1], dim=1).indices.cpu().numpy()
            self._hard[some] = np.take_along_axis(mined, best, axis=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what steps have changed."""
        return {"hard": torch.from_numpy(self._hard)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` returned."""
        self._hard = state["hard"].numpy()

    def _columns(self, batch: Positions) -> Positions:
        """Return a positive and hard negatives of each anchor, and random rows to fill up."""
        size = self._size
        if len(self._rows) <= size:
            return self._rows
        hard = self._hard[batch]
        hard = hard[:, self._rng.permutation(hard.shape[1])[:HARD_PER_STEP]]
        wanted = np.union1d(self._pairs.draw(batch, self._rng), hard)
        # As many columns in every step: oneDNN compiles a product for each shape, and keeps it.
        free = self._problem.usable.copy()
        free[wanted] = False
        others = np.flatnonzero(free)
        count = max(size - len(wanted), 0)
        drawn = self._rng.choice(len(others), count, replace=False, shuffle=False)
        return np.union1d(wanted, others[drawn])

    def _pseudo(self, queries: Tensor, raw: Tensor, targets: Targets, columns: Positions) -> Tensor:
        """Return rows that no judgment points to, each moved as a query is from its row."""
        bases = np.flatnonzero(self._unjudged[columns])
        if not len(bases):
            return queries[:0]
        base = self._rng.choice(bases, len(queries))
        source = self._rng.integers(0, len(targets.anchor), len(queries))
        residual = queries[targets.anchor[source]] - raw[targets.column[source]]
        return F.normalize(raw[base] + residual, dim=1)  # (b, d)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.as_tensor(array, device=self._device)


def mean_direction(vectors: Vectors, rows: Positions) -> Vectors:
    """Return the mean of rows at unit length, shape (d,)."""
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(rows), SAMPLE):
        block = vectors[rows[start : start + SAMPLE]].astype(np.float64)
        total += (block / np.linalg.norm(block, axis=1, keepdims=True)).sum(axis=0)
    return (total / len(rows)).astype(np.float32)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.norm(dim=1)
    return vectors / norms[:, None], norms


def _pairs(
    problem: Problem, signal: Signal, rows: Positions, rng: np.random.Generator, device: str
) -> Pairs:
    if signal is Signal.JUDGED:
        if problem.queries is None:
            raise DataError("the signal is judged queries, and there are none")
        return judged_pairs(problem.queries, problem.usable)
    if signal is Signal.GROUPS:
        if problem.groups is None:
            raise DataError("the signal is groups, and there are none")
        return group_pairs(problem.vectors, problem.groups, problem.usable)
    anchors = np.sort(rng.choice(rows, min(NEIGHBOUR_ANCHORS, len(rows)), replace=False))
    return neighbour_pairs(problem.vectors, rows, anchors, k=NEIGHBOURS, device=device)


def _favour_near(step: Step) -> Tensor:
    """Mix even weights of positives with weights that favour the anchor's raw neighbours."""
    anchor = step.pairs[0]
    similar = step.compare(step.queries, step.columns(step.raw)).of_pairs(step.pairs)
    top = torch.full((len(step.queries),), -torch.inf, device=step.raw.device)
    top = top.scatter_reduce(0, anchor, similar, "amax")
    near = (similar - top[anchor]).exp()
    near = near / torch.zeros_like(top).index_add(0, anchor, near)[anchor]
    return NEAR_SHARE * near + (1 - NEAR_SHARE) * step.weights
