"""Made encoders: judged sets whose cosines are spread, crowded, skewed, or led by hubs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import simskip_vdb as ss
from simskip_vdb.connectors.memory import MemoryStore
from simskip_vdb.datatypes import JudgedQueries, Metric, Split, Vectors, silent
from simskip_vdb.evaluation import score
from simskip_vdb.fitting import fit_or_recall
from simskip_vdb.judgments import Judgments, QuerySet
from simskip_vdb.parsing import Qrels, RowColumn
from simskip_vdb.refiner import Refiner
from simskip_vdb.workspace import Workspace, open_workspace

ROWS, TOPICS, RELEVANT = 240, 24, 4
SIZES = {"--queries": 160, "--dev-queries": 60, "--test-queries": 60}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A made set: unit rows, shape (n, d), and judged queries by option."""

    rows: Vectors
    queries: dict[str, Vectors]
    relevant: dict[str, NDArray[np.int64]]

    def mapped(self, move: object) -> Made:
        """Return the set with all vectors moved alike."""
        assert callable(move)
        return Made(
            rows=move(self.rows),
            queries={name: move(part) for name, part in self.queries.items()},
            relevant=self.relevant,
        )


def make(kind: str, dim: int, seed: int = 0) -> Made:
    """Make a set of one kind: ``spread``, ``crowded``, ``skewed`` or ``hubs``.

    A topic holds rows; a query is asked about a few of them, which only its judgments tell from
    the topic's others.
    """
    rng = np.random.default_rng(seed)
    inner = 48
    topic = rng.normal(size=(TOPICS, inner))
    of_row = np.arange(ROWS) % TOPICS
    rows = topic[of_row] + 1.2 * rng.normal(size=(ROWS, inner))
    need = rows + 1.5 * rng.normal(size=(ROWS, inner))  # what a row is asked for
    queries, relevant = {}, {}
    for name, count in SIZES.items():
        about = rng.integers(0, ROWS, count)
        asked = need[about] + 1.2 * rng.normal(size=(count, inner))
        distances = ((need[about][:, None] - need[None]) ** 2).sum(axis=2)
        relevant[name] = np.argsort(distances, axis=1)[:, :RELEVANT]
        queries[name] = asked + 0.7 * rng.normal(size=inner)[None] * 0
    scale = 1 / np.sqrt(1 + np.arange(inner)) if kind == "skewed" else np.ones(inner)
    turn = np.linalg.qr(rng.normal(size=(max(dim, inner), max(dim, inner))))[0][:inner, :dim]
    common = rng.normal(size=dim)
    common /= np.linalg.norm(common)
    size = {"crowded": 2.5, "hubs": 0.5}.get(kind, 0.0)
    hub = np.where(rng.random(ROWS) < 0.05, 1.5, 0.0)[:, None] if kind == "hubs" else 0.0

    def encoded(x: NDArray[np.float64], extra: object = 0.0) -> Vectors:
        y = unit((x * scale) @ turn) + (size + extra) * common  # type: ignore[operator]
        return unit(y).astype(np.float32)

    return Made(
        rows=encoded(rows, hub),
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
class Gain:
    """What a refiner does to nDCG@10 on test queries."""

    refiner: Refiner
    before: float
    after: float

    @property
    def delta(self) -> float:
        return self.after - self.before


def gain(made: Made, state: Path, *, metric: Metric = Metric.COSINE, **fit: object) -> Gain:
    """Fit as `simskip fit` does, and measure on test queries."""
    store = MemoryStore(np.arange(len(made.rows)), made.rows, metric)
    settings = ss.Settings(fit=ss.FitSettings(**fit), state=state)  # type: ignore[arg-type]
    with open_workspace(store, judgments(made), settings, silent) as space:
        refiner = fit_or_recall(space, silent)
        test = space.judged.queries[Split.TEST]
        rows = refiner.refine_rows(space.rows.matrix(), space.rows.ids)
        return Gain(
            refiner=refiner,
            before=ndcg(space, test, test.vectors, space.rows.matrix()),
            after=ndcg(space, test, refiner(test.vectors), rows),
        )


def ndcg(space: Workspace, judged: JudgedQueries, queries: Vectors, rows: Vectors) -> float:
    found = space.search(queries, [(0, rows)], 10).ids
    return float(score(judged, found, ("nDCG@10",))["nDCG@10"].mean())
