"""One index's night: read what changed, refine what is new, fit again when it pays, prove it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from simskip_vdb.attempts import Attempt, judged_digests, judged_ids
from simskip_vdb.crossfit import applies
from simskip_vdb.datatypes import Mask, Progress, Split, silent
from simskip_vdb.drift import Drift, measure_drift, sampled
from simskip_vdb.gate import Decision
from simskip_vdb.harm import HarmWatch
from simskip_vdb.job import Refit
from simskip_vdb.journal import Journal, Write
from simskip_vdb.judgments import Judgments
from simskip_vdb.ledger import Ledger
from simskip_vdb.measuring import known_to, live_gains
from simskip_vdb.pipeline import (
    Settings,
    challenge,
    fitted,
    record_of,
    remember_attempt,
)
from simskip_vdb.refiner import Refiner
from simskip_vdb.report import Report
from simskip_vdb.reporting import build_report, changes
from simskip_vdb.rows import row_digests
from simskip_vdb.runs import Runs, record
from simskip_vdb.state_place import state_folder
from simskip_vdb.store import VectorStore
from simskip_vdb.targets import holds
from simskip_vdb.upkeep import rollback
from simskip_vdb.workspace import Workspace, keep_refiner, open_workspace
from simskip_vdb.writing import finish, interrupted, reindex

log = logging.getLogger(__name__)

DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a night would do, and why.

    Attributes:
        reasons: Why a refiner should be fitted; empty where none should.
        drift: Outcome of the tests by ``rows`` and ``queries``; None where not tested.
    """

    reasons: tuple[str, ...]
    drift: Mapping[str, Drift | None] | None


def run_night(
    store: VectorStore,
    judgments: Judgments,
    settings: Settings,
    refit: Refit,
    *,
    watches: bool = True,
    roll_back_harm: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Look after one index for a night.

    Args:
        store: The index.
        judgments: All that is known now.
        settings: What to do; an index that is looked after grows, so `growing` belongs there.
        refit: When to fit again.
        watches: Let fresh queries watch what is live; not where their judgments depend on what was
            shown, as clicks do: they favour what was live when they were made.
        roll_back_harm: Roll back a refinement that fresh queries prove harmful; else only say so.
        progress: Called with (stage, done, total); what it raises ends the night.

    Returns:
        The night's record (`runs.record`), which is in the state as well; that of the rollback
        where harm was rolled back. Its part ``live`` says what fresh queries found of the
        refinement that was live when the night began; None where there was none.

    Raises:
        StateInUseError: Another run has the index.
        StoppedError: From `progress`; the same command resumes.
        SimskipError: See `errors`; the index is as it was, or the same command resumes.
    """
    quiet = _quiet(store, judgments, settings, refit, watches=watches)
    if quiet is not None:
        return quiet
    with open_workspace(store, judgments, settings, progress) as space:
        pending = interrupted(space)
        live = _watch_live(space, judgments) if watches and pending is None else None
        harmful = live if live is not None and live.harmful and roll_back_harm else None
        if pending is None and harmful is None:
            found = _night(space, judgments, refit, progress)
            found["live"] = None if live is None else live.to_dict()
            Runs(space.journal.folder).add(found)
            return found
        if pending is not None:
            _finish(space, pending, progress)
    if harmful is not None:
        return _roll_back(store, settings, harmful, progress)
    return run_night(
        store,
        judgments,
        settings,
        refit,
        watches=watches,
        roll_back_harm=roll_back_harm,
        progress=progress,
    )


def plan_night(
    store: VectorStore, judgments: Judgments, settings: Settings, refit: Refit
) -> dict[str, Any]:
    """Tell what a night would do; write nothing, fit nothing, read no test query.

    Returns:
        A record whose outcome is ``quiet`` or ``planned``.
    """
    with open_workspace(store, judgments, replace(settings, dry_run=True), silent) as space:
        journal = Journal(state_folder(store, settings.state), store.info())
        plan = _plan(space, journal, judgments, refit)
        counted = changes(space, journal)
        busy = bool(plan.reasons) or (space.current is not None and _moved(counted))
        return record(
            "night",
            "planned" if busy else "quiet",
            space.info.uri,
            rows={**counted, "written": 0},
            refit=_refit_part(plan, None),
            drift=_drift_part(plan),
        )


def _quiet(
    store: VectorStore, judgments: Judgments, settings: Settings, refit: Refit, *, watches: bool
) -> dict[str, Any] | None:
    """Return the record of a night with nothing to do; it reads the index once at most."""
    start = time.perf_counter()
    folder = state_folder(store, settings.state)
    journal = Journal(folder, store.info())
    manifest = journal.manifest
    if manifest.current is None or manifest.pending is not None:
        return None
    attempt, ledger = Attempt.load(folder), Ledger(folder)
    if attempt is None or _by_evidence(attempt, judgments, refit):
        return None
    watch = ledger.watching(manifest.current.refiner) if watches else None
    if watch is not None and watch.harmful:
        return None
    if watches and ledger.unwatched(judged_ids(judgments)):
        return None
    journal.check_marker(store)
    with journal:
        if not holds(store, journal, manifest.current):
            return None
        rows = store.info().count
        found = record(
            "night",
            "quiet",
            store.info().uri,
            rows={"total": rows, "new": 0, "changed": 0, "deleted": 0, "written": 0},
            seconds={"read": time.perf_counter() - start},
        )
        Runs(folder).add(found)
    return found


def _finish(space: Workspace, pending: Write, progress: Progress) -> None:
    counted = changes(space)
    refiner = space.journal.refiner(pending.refiner)
    report = finish(space, refiner, space.journal.refiners / refiner.id, progress)
    if report is not None:
        outcome = "restored" if report.exit_code else "written"
        Runs(space.journal.folder).add(record_of(report, "night", outcome, counted))


def _roll_back(
    store: VectorStore, settings: Settings, harmful: HarmWatch, progress: Progress
) -> dict[str, Any]:
    """Restore the originals, as fresh queries proved that what is live does harm."""
    assert harmful.mean is not None
    why = (
        f"{harmful.queries:,} fresh queries proved that refiner {harmful.refiner} does harm "
        f"({harmful.mean:+.4f} each, p {harmful.p:.2g}), so it was rolled back; it will not be "
        "written again"
    )
    parts = {"live": harmful.to_dict(), "notes": [why]}
    done = rollback(store, state=settings.state, progress=progress, parts=parts)
    counted = {"total": done["restored"] + done["kept"], "new": 0, "changed": 0, "deleted": 0}
    rows = {**counted, "written": done["restored"]}
    return record("rollback", "restored", store.info().uri, rows=rows, **parts)


def _watch_live(space: Workspace, judgments: Judgments) -> HarmWatch | None:
    """Let test queries that nobody looked at yet tell whether what is live does harm.

    Those that its refiner learnt from are left out, and count as looked at. They come in an order
    drawn by their vectors, as files are often sorted by what decides how a query fares.
    """
    current, ledger = _current(space), space.ledger
    if current is None:
        return None
    watch = ledger.watching(current.id) or HarmWatch(refiner=current.id)
    test = space.judged.queries[Split.TEST]
    fresh = test.subset(ledger.fresh(test))
    asked = fresh.subset(~known_to(current, fresh))
    if len(asked) and not space.measure.startswith("Num"):  # counts know no bound
        order = np.argsort(row_digests(asked.vectors), kind="stable")
        watch = watch.seeing(live_gains(space, asked)[order])
    useless = ledger.unwatched(judged_ids(judgments).difference(fresh.ids))
    if len(fresh) or useless:
        ledger.watched(watch, fresh, useless)
    return watch


def _night(
    space: Workspace, judgments: Judgments, refit: Refit, progress: Progress
) -> dict[str, Any]:
    plan = _plan(space, space.journal, judgments, refit)
    counted, current = changes(space), _current(space)
    tried = added = None
    if plan.reasons:
        log.info("%s: fitting again: %s", space.info.uri, "; ".join(plan.reasons))
        refiner, crossed = fitted(space, progress)
        folder = keep_refiner(refiner, space)
        if current is None or refiner.id != current.id:
            tried = challenge(space, refiner, crossed, folder, progress, current)
        remember_attempt(space, judgments, refiner.id)
    passed = tried is not None and tried.exit_code == 0
    if not passed and current is not None and _moved(counted):
        added = _refine_new(space, current, progress)
    if passed or (tried is None and added is not None):
        outcome = "written"
    elif tried is not None:
        outcome = "refused" if current is None else "kept"
    else:
        outcome = "quiet"
    if added is not None and added.exit_code:
        outcome = "restored"
    result = None if not plan.reasons else "champion" if passed else "kept"
    parts = {"refit": _refit_part(plan, result), "drift": _drift_part(plan)}
    report = tried or added
    if report is None:
        rows = {**counted, "written": 0}
        seconds = dict(space.seconds)
        return record("night", outcome, space.info.uri, rows=rows, seconds=seconds, **parts)
    if added is not None:
        report = replace(report, written=added.written)
    return record_of(report, "night", outcome, counted, **parts)


def _refine_new(space: Workspace, current: Refiner, progress: Progress) -> Report:
    """Bring rows that came or changed to what the current refiner makes of them, as late rows.

    It was tested before; this is no look at its test queries.
    """
    assert space.current is not None
    _forget_changed(space, current)
    decision = Decision(passed=True, look=space.current.summary.get("look"))
    folder = space.journal.refiners / current.id
    report = build_report(space, "refine", current, folder, None, decision)
    return reindex(space, current, report, progress, resumed=space.current)


def _forget_changed(space: Workspace, current: Refiner) -> None:
    """Let rows that got another vector count as late where an earlier version kept no sketches."""
    known = space.journal.known(current.id)
    if known is None or known.sketches is not None or space.info.exact:
        return
    kept = ~np.isin(known.ids, space.rows.ids[~space.found.ours])
    if not kept.all():
        space.journal.save_known(current.id, known.ids[kept], known.digests[kept])


def _plan(space: Workspace, journal: Journal, judgments: Judgments, refit: Refit) -> Plan:
    provable = len(space.judged.queries[Split.TEST]) > 0 or applies(space)
    if not provable:
        return Plan(reasons=(), drift=None)
    attempt = Attempt.load(journal.folder)
    if attempt is None:
        return Plan(reasons=("no refiner was fitted yet",), drift=None)
    reasons = _by_evidence(attempt, judgments, refit)
    drift = _drift(space, journal, attempt) if refit.drift else None
    if drift is not None:
        if not space.settings.dry_run:
            replace(attempt, tests=attempt.tests + len(drift)).save(journal.folder)
        reasons += [
            f"{name} have drifted (energy distance {found.statistic:.3f}, p {found.p:.2g})"
            for name, found in drift.items()
            if found is not None and found.alarm
        ]
    return Plan(reasons=tuple(reasons), drift=drift)


def _by_evidence(attempt: Attempt, judgments: Judgments, refit: Refit) -> list[str]:
    """Return why, without a look at the index, a refiner should be fitted again."""
    reasons = []
    new, known = len(attempt.new(judged_digests(judgments))), len(attempt.judged)
    if new and new >= refit.new_judgments * known:
        reasons.append(f"{new:,} queries are new or judged anew, {known:,} were known")
    age = (time.time() - attempt.time) / DAY
    if age > refit.max_age_days:
        reasons.append(f"the last fit is {age:.0f} days old")
    return reasons


def _drift(space: Workspace, journal: Journal, attempt: Attempt) -> dict[str, Drift | None]:
    """Test whether rows and queries that came since the last fit are as those before.

    Test queries are not looked at.
    """
    seed, test = space.settings.fit.seed, attempt.tests + 1
    known = journal.known(attempt.refiner)
    rows = None
    if known is not None:
        seen = np.isin(space.rows.ids, known[0])
        rows = _compare(space, seen & space.usable, ~seen & space.usable, test)
    asked = [space.judged.queries[split] for split in (Split.FIT, Split.VALIDATION)]
    vectors = np.concatenate([queries.vectors for queries in asked])
    names = [name for queries in asked for name in queries.ids]
    old = np.array([name in attempt.judged for name in names], np.bool_)
    queries = measure_drift(vectors[old], vectors[~old], test=test + 1, seed=seed)
    return {"rows": rows, "queries": queries}


def _compare(space: Workspace, seen: Mask, came: Mask, test: int) -> Drift | None:
    rng = np.random.default_rng((space.settings.fit.seed, test))
    before, after = (
        space.rows.take(places[sampled(len(places), rng)])
        for places in map(np.flatnonzero, (seen, came))
    )
    return measure_drift(before, after, test=test, seed=space.settings.fit.seed)


def _current(space: Workspace) -> Refiner | None:
    write = space.current
    return None if write is None else space.journal.refiner(write.refiner)


def _moved(counted: Mapping[str, int]) -> bool:
    return any(counted[name] for name in ("new", "changed", "deleted"))


def _refit_part(plan: Plan, result: str | None) -> dict[str, Any]:
    return {"due": bool(plan.reasons), "reasons": list(plan.reasons), "result": result}


def _drift_part(plan: Plan) -> dict[str, Any] | None:
    if plan.drift is None:
        return None
    return {name: None if found is None else asdict(found) for name, found in plan.drift.items()}
