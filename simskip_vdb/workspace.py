"""One run's view of an index: its originals, its judgments, and how a refiner scores on them."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from simskip_vdb.by_vector import near_sketch, sketch
from simskip_vdb.config import FitSettings
from simskip_vdb.crew import LOCAL, RAY, Crew, check_executor, ray_crew
from simskip_vdb.datatypes import (
    Ids,
    Mask,
    Neighbors,
    Positions,
    Progress,
    Side,
    Split,
    Vectors,
)
from simskip_vdb.durable import has_file
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.evaluation import (
    DEFAULT_MEASURES,
    GROUP_MEASURES,
    ann_recall,
    depth,
    pair_scores,
    parse_measures,
    score,
)
from simskip_vdb.journal import IN_PLACE, KNOWN, Journal, Known, Write
from simskip_vdb.judgments import Judgments
from simskip_vdb.ledger import Ledger
from simskip_vdb.overlap import cores
from simskip_vdb.provenance import Lookup
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import Snapshot, recover, snapshot
from simskip_vdb.resolution import Resolved, resolve
from simskip_vdb.rows import Digests, row_digests
from simskip_vdb.search import ExactSearch, Search, without_own
from simskip_vdb.state_place import state_folder
from simskip_vdb.store import RowWritable, VectorStore, abilities
from simskip_vdb.targets import holding
from simskip_vdb.threads import blas_on_one_thread

Blocks = Iterable[tuple[int, Vectors]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run is asked to do.

    Attributes:
        fit: How to fit.
        measure: The measure that the gate judges; None for nDCG@10, or Rprec with groups.
        growing: Whether rows keep arriving, so that the fit prefers what is fair to late rows, and
            unfairness to them refuses.
        executor: ``local``, or ``ray``: who reads and writes the rows.
        mode: Where rows of a collection are written: ``in-place``, ``new-vector`` or
            ``new-collection``.
        refiner: Folder of a fitted refiner to use instead of fitting one.
        out: Folder that receives a copy of the fitted refiner.
        output: With side both, the new index file.
        state: The state folder, if not the one beside the index.
        search_params: Search settings as the application sets them.
        accept_unmeasured: Write where nothing can be measured.
        dry_run: Write nothing and read no test query.
    """

    fit: FitSettings = field(default_factory=FitSettings)
    measure: str | None = None
    growing: bool = False
    executor: str = LOCAL
    mode: str = IN_PLACE
    refiner: Path | None = None
    out: Path | None = None
    output: Path | None = None
    state: Path | None = None
    search_params: Mapping[str, Any] = field(default_factory=dict)
    accept_unmeasured: bool = False
    dry_run: bool = False

    @property
    def sides(self) -> list[FitSettings]:
        """How to fit each side that competes, docs first."""
        if self.fit.side is not Side.AUTO:
            return [self.fit]
        return [replace(self.fit, side=side) for side in Side if side is not Side.AUTO]


class Workspace:
    """An index, locked, with its originals on disk and its judgments by position.

    Attributes:
        store: The index.
        journal: Its state.
        ledger: Splits and looks.
        found: What was read of the index.
        rows: The originals, in scan order.
        usable: Rows that are finite and not zero, shape (n,).
        judged: Judgments by position.
        current: What was written to the index last; None where it holds originals.
        as_given: Whether the originals are what a gain is measured from: no row of ours is there.
        held_by: The store whose rows are what the application finds now.
        measures: Measures to report, the chosen one first.
        seconds: Time by stage.
        checkpoint: Returns the file by which the next fit goes on after an interruption.
        progress: Called with (stage, done, total).
        crew: Who reads and writes the partitions; None where all is done here.
    """

    def __init__(
        self,
        store: VectorStore,
        journal: Journal,
        ledger: Ledger,
        found: Snapshot,
        judged: Resolved,
        settings: Settings,
        progress: Progress,
        crew: Crew | None = None,
    ) -> None:
        self.store = store
        self.progress, self.crew = progress, crew
        self.info = store.info()
        self.journal = journal
        self.ledger = ledger
        self.found = found
        self.rows = found.rows
        self.judged = judged
        self.settings = settings
        self.current: Write | None = journal.manifest.current
        self.held_by = holding(store, self.current)
        self.as_given = self.current is None
        self.usable = found.usable
        defaults = DEFAULT_MEASURES if judged.groups is None else GROUP_MEASURES
        chosen = (settings.measure,) if settings.measure else ()
        self.measures = parse_measures((*chosen, *defaults))
        self.seconds: dict[str, float] = {}
        self.checkpoint: Callable[[], Path | None] = lambda: None

    @property
    def measure(self) -> str:
        """The measure that the gate judges."""
        return self.measures[0]

    def may_choose(self, side: Side) -> bool:
        """Tell whether validation may choose a side: there is a place for what it would write."""
        asked = self.settings
        if asked.fit.side is not Side.AUTO:
            return True
        if side is Side.QUERIES:
            return self.current is None and self.journal.manifest.pending is None
        elsewhere = asked.output is not None or asked.mode != IN_PLACE
        return elsewhere if side is Side.BOTH else asked.output is None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start

    def refined(
        self,
        refiner: Refiner,
        start: int,
        block: Vectors,
        late: Mask | None = None,
        f: Vectors | None = None,
    ) -> Vectors:
        """Refine a block of originals whose first row is at position `start`."""
        part = slice(start, start + len(block))
        late = None if late is None else late[part]
        return refiner.refine_rows(block, self.rows.ids[part], late, f)

    def placed(self, refiner: Refiner) -> Refiner:
        """Return a refiner where the run computes; torch is not loaded only to look for a GPU."""
        device = self._device()
        return refiner if device == "cpu" else refiner.on(device)

    def _device(self) -> str:
        name = self.settings.fit.device
        if name == "cpu" or (name == "auto" and "torch" not in sys.modules):
            return "cpu"
        from simskip_vdb.training import device_of

        return device_of(name)

    def _searching(self, queries: Vectors, k: int, skip: Mask | None) -> Search:
        """Return an exact search where the run computes."""
        device = self._device()
        if device == "cpu":
            return ExactSearch(queries, k, self.info.metric, skip)
        from simskip_vdb.search_on_device import SearchOnDevice

        return SearchOnDevice(queries, k, self.info.metric, skip, device)

    def refined_blocks(self, refiner: Refiner, late: Mask | None = None) -> Blocks:
        """Yield all rows refined."""
        placed = self.placed(refiner)
        for start, block in self.rows.blocks():
            yield start, self.refined(placed, start, block, late)

    def current_blocks(self) -> Blocks:
        """Yield all rows as the index holds them now."""
        if self.as_given:
            yield from self.rows.blocks()
        else:
            yield from self.blocks_of(self.held_by)

    def as_searched(self, queries: Vectors) -> Vectors:
        """Return queries, shape (q, d), as the application passes them to the index now."""
        current = self.current
        if current is None or current.summary.get("side") != Side.BOTH.value:
            return queries
        return self.journal.refiner(current.refiner)(queries)

    def blocks_of(self, store: VectorStore) -> Blocks:
        """Yield all rows as a store holds them; NaN for rows that were removed since."""
        start = 0
        live = abilities(store).rows
        if live is not None:  # it may have other rows by now
            for start, block in self.rows.blocks():
                ids = self.rows.ids[start : start + len(block)]
                yield start, self._rows_now(live, ids)
            return
        for batch in store.scan(8192):
            yield start, batch.vectors
            start += len(batch)

    def _rows_now(self, store: RowWritable, ids: Ids) -> Vectors:
        now = store.peek(ids)
        vectors = np.full((len(ids), self.info.dim), np.nan, np.float32)
        vectors[Lookup(ids).find(now.ids)] = now.vectors
        return vectors

    def search(
        self,
        queries: Vectors,
        blocks: Blocks,
        k: int,
        skip: Mask | None = None,
        own: Positions | None = None,
    ) -> Neighbors:
        """Search exactly by the index's own metric; `own` rows are no results of their queries."""
        search = self._searching(queries, k + (own is not None), skip)
        for start, block in self._watched(blocks):
            search.add(start, block)
        return search.found() if own is None else without_own(search.found(), own, k)

    def _watched(self, blocks: Blocks) -> Blocks:
        for start, block in blocks:
            yield start, block
            self.progress("search", start + len(block), len(self.rows))

    def held(self, split: Split) -> Mask:
        """Return the rows that act as queries of a split, shape (n,)."""
        held = np.zeros(len(self.rows), np.bool_)
        held[self.judged.held.get(split, [])] = True
        return held

    @cached_property
    def digests(self) -> Digests:
        """Digests of all originals, shape (n,)."""
        if not self.found.ours.any() and not self.info.lossy:  # they are what was read
            return self.found.digests
        return np.concatenate([row_digests(block) for _, block in self.rows.blocks()])

    def twins(self, rows: Mask) -> Mask:
        """Return these rows and all that equal one of them, shape (n,)."""
        return np.isin(self.digests, self.digests[rows])

    def skipped(self, split: Split) -> Mask | None:
        """Return the rows that act as queries and so are no results; None where there are none."""
        held = self.held(split)
        if split is Split.VALIDATION:
            held |= self.held(Split.TEST)
        return held if held.any() else None

    def validate(self, refiners: Sequence[Refiner], late: Mask | None = None) -> list[float]:
        """Score refiners on the validation queries by the chosen measure, higher is better.

        Those that move rows by an f have the same one. Rows are read once, and go through f once.
        """
        judged = self.judged.queries[Split.VALIDATION]
        k, skip = depth(self.measures[:1], judged), self.skipped(Split.VALIDATION)
        own = judged.own
        wanted = k + (own is not None)
        searches = [self._searching(refiner(judged.vectors), wanted, skip) for refiner in refiners]
        placed = [self.placed(refiner) for refiner in refiners]
        using_f = next((refiner for refiner in placed if refiner.layers), placed[0])
        with ThreadPoolExecutor(cores()) as pool, blas_on_one_thread():
            for start, block in self._watched(self.rows.blocks()):
                add = partial(
                    self._add_refined, start=start, block=block, late=late, f=using_f.f(block)
                )
                list(pool.map(add, searches, placed))
        answers = [search.found() for search in searches]
        if own is not None:
            answers = [without_own(answer, own, k) for answer in answers]
        return [
            float(score(judged, answer.ids, self.measures[:1])[self.measure].mean())
            for answer in answers
        ]

    def _add_refined(
        self,
        search: Search,
        refiner: Refiner,
        *,
        start: int,
        block: Vectors,
        late: Mask | None,
        f: Vectors | None,
    ) -> None:
        search.add(start, self.refined(refiner, start, block, late, f))

    def current_rows(self, positions: Positions) -> Vectors:
        """Return rows as the index holds them now, shape (len(positions), d)."""
        if self.as_given:
            return self.rows.take(positions)
        return self.rows_of(self.held_by, positions)

    def rows_of(self, store: VectorStore, positions: Positions) -> Vectors:
        """Return rows as a store holds them; NaN for rows that were removed since."""
        ids = self.rows.ids[positions]
        live = abilities(store).rows
        return store.fetch(ids) if live is None else self._rows_now(live, ids)

    def ann_recall(
        self,
        queries: Vectors,
        exact: Neighbors,
        found: Positions,
        take: Callable[[Positions], Vectors],
    ) -> float:
        """Return ann_recall@10 of what an index found, against exact neighbours.

        Args:
            queries: As they were searched, shape (q, d).
            exact: Exact neighbours, shape (q, 10).
            found: Positions that the index returned, shape (q, 10).
            take: Returns the rows that the exact neighbours were found among, by position.
        """
        places = np.unique(found[found >= 0])
        vectors = take(places)
        at = np.searchsorted(places, np.maximum(found, places[0] if len(places) else 0))
        scores = pair_scores(queries[:, None], vectors[at], self.info.metric)
        return ann_recall(exact, found, scores)

    def late(self, refiner: Refiner) -> Mask:
        """Return the rows that a refiner treats as late, shape (n,).

        They arrived, or got another vector, after its fit; or no fit saw them because they are
        test queries.
        """
        late = self.held(Split.TEST)
        known = self.journal.known(refiner.id)
        if known is not None:
            places = Lookup(known.ids).find(self.rows.ids)
            late |= places < 0
            late |= self._changed(known, places)
        return late

    def _changed(self, known: Known, places: Positions) -> Mask:
        """Tell which rows, at these places among those known, have another original now, (n,)."""
        if not len(known.ids):
            return np.ones(len(places), np.bool_)
        changed: Mask = known.digests[places] != self.digests
        if self.info.exact or not changed.any():
            return changed
        if known.sketches is None:  # of a fit by an earlier version: digits of one vector may vary
            return np.zeros(len(changed), np.bool_)
        for start, block in self.rows.blocks(np.flatnonzero(changed)):
            part = slice(start, start + len(block))
            then = known.sketches[places[part]]
            changed[part] &= ~near_sketch(block, then, self.info.rounding)
        return changed

    @cached_property
    def sketches(self) -> Vectors | None:
        """What all originals are known again by; None where their digests tell."""
        if self.info.exact:
            return None
        return np.concatenate([sketch(block) for _, block in self.rows.blocks()])


def keep_refiner(refiner: Refiner, space: Workspace) -> Path:
    """Save a refiner in the state, and, the first time, which rows are there: it knows those."""
    folder = space.journal.refiners / refiner.id
    refiner.save(folder)
    if not has_file(folder / KNOWN):
        known = (space.rows.ids, space.digests, space.sketches)
        space.journal.save_known(refiner.id, *known)
    return folder


@contextmanager
def open_workspace(
    store: VectorStore, judgments: Judgments, settings: Settings, progress: Progress
) -> Iterator[Workspace]:
    """Lock an index's state, read its originals, and place the judgments on them.

    Args:
        store: The index.
        judgments: As read from files.
        settings: What the run is asked to do.
        progress: Called as rows are read.

    Raises:
        ConfigError: The index is a refined copy of another one.
        DataError: The index has fewer than two usable rows, or the judgments do not fit it.
        JournalError: The state is damaged or in use.
    """
    check_executor(settings.executor, store, settings.mode)
    folder = state_folder(store, settings.state)
    judgments = judgments.naming_rows_by(store.info().document_ids)
    start = time.perf_counter()
    with ExitStack() as stack:
        past = Journal(folder, store.info())
        past.usable()
        if past.manifest.copy_of is not None:
            raise ConfigError(
                f"{store.info().uri} is a refined copy of {past.manifest.copy_of}: a refined "
                f"vector is never refined again. Refine {past.manifest.copy_of} instead; if this "
                f"is another index by the same name, remove {folder} first"
            )
        _check_search(store, settings)
        past.check_marker(store)
        if settings.dry_run:
            if past.manifest.pending is not None:
                raise ConfigError(
                    "a run was interrupted while writing; finish it without --dry-run first"
                )
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="simskip-"))
            nowhere = replace(store.info(), state=None, claim=None)
            journal = stack.enter_context(Journal(Path(temporary), nowhere))
        else:
            journal = stack.enter_context(past)
            recover(store, journal)
        crew = None
        if settings.executor == RAY and not settings.dry_run:
            crew = stack.enter_context(ray_crew(store, journal))
        found = snapshot(
            store,
            journal,
            progress,
            past=past,
            fields=judgments.fields,
            crew=crew,
            keep=not settings.dry_run,
        )
        past.check_marker(store)  # what another run wrote meanwhile was read, and is no original
        ledger = Ledger(folder)
        judged = resolve(
            judgments.with_columns(found.columns, found.rows.ids),
            found.rows,
            seed=settings.fit.seed,
            assigned={name: Split(split) for name, split in ledger.splits.items()},
        )
        space = Workspace(store, journal, ledger, found, judged, settings, progress, crew)
        if np.count_nonzero(space.usable) < 2:
            raise DataError(
                f"{store.info().uri} has {np.count_nonzero(space.usable)} rows that are finite and "
                "not zero; at least 2 are needed"
            )
        if not settings.dry_run:
            ledger.assign({name: split.value for name, split in judged.assigned.items()})
        space.current = past.manifest.current
        space.as_given = space.current is None and not found.ours.any()
        space.seconds["read"] = time.perf_counter() - start
        yield space


def _check_search(store: VectorStore, settings: Settings) -> None:
    """Try the search settings on one query, before anything that takes long or counts."""
    if settings.search_params and store.info().count:
        store.search(np.ones((1, store.info().dim), np.float32), 1, settings.search_params)
