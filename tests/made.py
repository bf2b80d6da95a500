"""Made encoders: judged sets whose cosines are spread, crowded, skewed, or led by hubs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import simskip_vdb as ss
from simskip_vdb.config import FitSettings
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import JudgedQueries, Metric, Split, Vectors, silent
from simskip_vdb.evaluation import score
from simskip_vdb.fitting import fit_or_recall
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.parsing import Qrels, RowColumn
from simskip_vdb.refiner import Refiner
from simskip_vdb.workspace import open_workspace

ROWS, TOPICS, RELEVANT = 240, 24, 4
INNER = 48  # dimensions that anything varies in
SIZES = {"--queries": 160, "--dev-queries": 60, "--test-queries": 60}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A made set: unit rows, shape (n, d), and judged queries by option."""

    rows: Vectors
    queries: dict[str, Vectors]
    relevant: dict[str, NDArray[np.int64]]

    def mapped(self, move: Callable[[NDArray[np.floating]], NDArray[np.floating]]) -> Made:
        """Return the set with all vectors moved alike, float32."""

        def moved(x: Vectors) -> Vectors:
            return np.asarray(move(x), np.float32)

        return Made(
            rows=moved(self.rows),
            queries={name: moved(part) for name, part in self.queries.items()},
            relevant=self.relevant,
        )


def make(kind: str, dim: int, seed: int = 0) -> Made:
    """Make a set of one kind: ``spread``, ``crowded``, ``skewed`` or ``hubs``.

    A topic holds rows; a query is asked about a few of them, which only its judgments tell from
    the topic's others.
    """
    rng = np.random.default_rng(seed)
    topic = rng.normal(size=(TOPICS, INNER))
    rows = topic[np.arange(ROWS) % TOPICS] + 1.2 * rng.normal(size=(ROWS, INNER))
    need = rows + 1.5 * rng.normal(size=(ROWS, INNER))  # what a row is asked for
    queries, relevant = {}, {}
    for name, count in SIZES.items():
        about = need[rng.integers(0, ROWS, count)]
        distances = ((about[:, None] - need[None]) ** 2).sum(axis=2)
        relevant[name] = np.argsort(distances, axis=1)[:, :RELEVANT]
        queries[name] = about + 1.2 * rng.normal(size=(count, INNER))
    scale = 1 / np.sqrt(1 + np.arange(INNER)) if kind == "skewed" else np.ones(INNER)
    turn = np.linalg.qr(rng.normal(size=(max(dim, INNER),) * 2))[0][:INNER, :dim]
    common = unit(rng.normal(size=(1, dim)))
    size = {"crowded": 2.5, "hubs": 0.5}.get(kind, 0.0)
    hubs = 1.5 * (rng.random((ROWS, 1)) < 0.05) * (kind == "hubs")

    def encoded(x: NDArray[np.float64], more: NDArray[np.floating] | float = 0.0) -> Vectors:
        return np.asarray(unit(unit((x * scale) @ turn) + (size + more) * common), np.float32)

    return Made(
        rows=encoded(rows, hubs),
        queries={name: encoded(part) for name, part in queries.items()},
        relevant=relevant,
    )


def unit(x: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def judgments(made: Made) -> Judgments:
    """Return the set's judgments as they would be read from files."""
    sets = {}
    for option, vectors in made.queries.items():
        names = [f"{option}:{i}" for i in range(len(vectors))]
        found = made.relevant[option]
        sets[option] = QuerySet(
            option=option,
            ids=tuple(names),
            vectors=vectors,
            qrels=Qrels(
                source="made",
                query_ids=[name for name in names for _ in range(RELEVANT)],
                doc_ids=[str(row) for row in found.ravel()],
                grades=np.ones(found.size, np.int32),
            ),
        )
    return Judgments(
        queries=sets["--queries"],
        dev=sets["--dev-queries"],
        test=sets["--test-queries"],
        doc_ids=RowColumn(source="made", values=[str(i) for i in range(len(made.rows))]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """nDCG@10 of test queries before and after a refiner, and after what another method did."""

    refiner: Refiner
    before: float
    after: float
    other: float

    @property
    def gain(self) -> float:
        return self.after - self.before


Other = Callable[[Made, JudgedQueries, JudgedQueries], Vectors]
"""Moves rows, knowing the fit and the validation queries."""


def measure(
    made: Made,
    state: Path,
    *,
    fit: FitSettings | None = None,
    metric: Metric = Metric.COSINE,
    growing: bool = False,
    other: Other = lambda made, fit, validation: made.rows,
) -> Measured:
    """Fit as `simskip fit` does, and measure on test queries."""
    store = MemoryStore(np.arange(len(made.rows)), made.rows, metric)
    settings = ss.Settings(fit=fit or FitSettings(), state=state, growing=growing)
    with open_workspace(store, judgments(made), settings, silent) as space:
        queries = space.judged.queries
        test = queries[Split.TEST]

        def ndcg(asked: Vectors, rows: Vectors) -> float:
            found = space.search(asked, [(0, rows)], 10).ids
            return float(score(test, found, ("nDCG@10",))["nDCG@10"].mean())

        refiner = fit_or_recall(space, silent)
        rows = space.rows.matrix()
        moved = other(made, queries[Split.FIT], queries[Split.VALIDATION])
        return Measured(
            refiner=refiner,
            before=ndcg(test.vectors, rows),
            after=ndcg(refiner(test.vectors), refiner.refine_rows(rows, space.rows.ids)),
            other=ndcg(test.vectors, moved),
        )
