"""Look after many indexes in one go, as a job file describes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from threading import Event
from typing import Any

from simskip_vdb import logs
from simskip_vdb.clicks import gather
from simskip_vdb.config import FitSettings
from simskip_vdb.connectors import open_store
from simskip_vdb.datatypes import Progress, silent
from simskip_vdb.errors import SimskipError, StateInUseError, StoppedError, StoreError
from simskip_vdb.job import ROLL_BACK, Job
from simskip_vdb.jobs import Jobs
from simskip_vdb.journal import Journal
from simskip_vdb.metrics import write_metrics
from simskip_vdb.night import plan_night, run_night
from simskip_vdb.pace import Pace
from simskip_vdb.pipeline import Settings
from simskip_vdb.report import table, undo_command
from simskip_vdb.runs import Runs, forecast, record
from simskip_vdb.state_place import state_folder
from simskip_vdb.store import VectorStore
from simskip_vdb.telling import ROLLBACK
from simskip_vdb.upkeep import leave_page, prune

log = logging.getLogger(__name__)

HARMFUL = 6
"""Exit code where fresh queries proved that a live refinement does harm."""
SEVERITY = (0, 3, 4, 2, 5, HARMFUL, 1)
"""Exit codes of jobs, the mildest first; a night ends with the worst."""
REFUSED = ("refused", "kept", "restored")
CLOSED, STEPPED_ASIDE = "outside its window", "stepped aside"
HOUR = 3600.0


def run_nightly(
    jobs: Jobs,
    *,
    dry_run: bool = False,
    stop: Event | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run every job, one after the other; one that fails does not stop the others.

    Args:
        jobs: What the job file says.
        dry_run: Only tell what a night would do, how long it would take, and what it would cost.
        stop: Ends the night between two batches when set.
        progress: Called with (stage, done, total).

    Returns:
        schema, jobs (one object each), exit_code (the worst).
    """
    stop = stop or Event()
    done = []
    for job in jobs.jobs:
        with logs.about(job=job.name):
            done.append(_run(job, jobs, dry_run, stop, progress))
    if jobs.metrics is not None and not dry_run:
        ran = [found for found in done if found["outcome"] not in (CLOSED, STEPPED_ASIDE)]
        idle = {*jobs.left_out, *(job.name for job in jobs.jobs)} - {run["job"] for run in ran}
        try:
            write_metrics(jobs.metrics, ran, idle=idle)
        except StoreError as error:
            log.error("metrics were not written: %s", error)
    worst = max((found["exit_code"] for found in done), key=SEVERITY.index, default=0)
    return {"schema": 1, "dry_run": dry_run, "jobs": done, "exit_code": worst}


def render_nightly(result: Mapping[str, Any]) -> str:
    """Lay a night out as a table for people, with what needs one of them below."""
    rows = [
        (
            found["job"],
            found["outcome"],
            *(_count(found["rows"], name) for name in ("total", "new", "changed", "written")),
            _measure(found["measure"]),
            f"{sum(found['seconds'].values()):.1f}" if found["seconds"] else "–",
            str(found["exit_code"]),
        )
        for found in result["jobs"]
    ]
    header = ("job", "outcome", "rows", "new", "changed", "written", "measure", "seconds", "exit")
    lines = [table(header, rows)]
    for found in result["jobs"]:
        lines += [f"{found['job']}: {message}" for message in found["messages"]]
    return "\n".join(lines)


def _run(job: Job, jobs: Jobs, dry_run: bool, stop: Event, progress: Progress) -> dict[str, Any]:
    now = datetime.now()
    left = None if job.window is None else job.window.seconds_left(now)
    if stop.is_set():
        return _result(job, "stopped", 4, messages=["not begun: asked to stop before"])
    if not dry_run and job.window is not None and not job.window.holds(now):
        return _result(job, CLOSED, 0)
    log.info("%s", job.index)
    pace = Pace(progress, rows_per_second=job.rows_per_second, seconds=left, stop=stop)
    store: VectorStore | None = None
    held = ExitStack()
    try:
        judgments = gather(
            job.files, job.clicks, doc_id_field=job.doc_id_field, group_field=job.group_field
        )
        store, settings = _open(job, read_only=dry_run), _settings(job)
        held.callback(getattr(store, "close", lambda: None))
        if dry_run:
            found = plan_night(store, judgments, settings, job.refit)
            return _planned(job, jobs, store, found)
        found = run_night(
            store,
            judgments,
            settings,
            job.refit,
            watches=job.clicks is None,
            roll_back_harm=job.on_harm == ROLL_BACK,
            progress=pace,
        )
        keep = job.retention
        prune(store, state=job.state, runs=keep.runs, refiners=keep.refiners)
        leave_page(store, job.state)
        return _finished(job, store, found)
    except StateInUseError as error:
        return _result(job, STEPPED_ASIDE, 0, messages=[str(error)])
    except StoppedError as error:
        log.warning("%s", error)
        return _failed(job, store, "stopped", error.exit_code, str(error))
    except SimskipError as error:
        log.error("%s", error)
        return _failed(job, store, "failed", error.exit_code, str(error))
    except Exception as error:  # a defect must not stop the other jobs
        log.exception("a defect")
        return _failed(job, store, "failed", 1, f"{type(error).__name__}: {error}")
    finally:
        held.close()


def _open(job: Job, *, read_only: bool) -> VectorStore:
    return open_store(
        job.index,
        read_only=read_only,
        filter=job.filter,
        guard_field=job.guard_field,
        originals=job.originals,
        originals_ids=job.originals_ids,
    )


def _settings(job: Job) -> Settings:
    return Settings(
        fit=FitSettings(side=job.side, signal=job.signal, seed=job.seed, device=job.device),
        measure=job.measure,
        growing=job.growing,
        mode=job.mode,
        executor=job.executor,
        state=job.state,
        search_params=job.search_params,
    )


def _finished(job: Job, store: VectorStore, found: Mapping[str, Any]) -> dict[str, Any]:
    refused = found["outcome"] in REFUSED
    report = found["report"]
    messages = []
    gate = None if report is None else report["gate"]
    if found["refit"] is not None and found["refit"]["due"]:
        messages += [f"fitted again: {reason}" for reason in found["refit"]["reasons"]]
    if refused and gate is not None:
        kind = "the current refiner stays" if found["outcome"] == "kept" else "refused"
        messages += [f"{kind}: {reason}" for reason in gate["reasons"]]
    harm = _harm(found)
    messages += harm
    return _result(
        job,
        found["outcome"],
        HARMFUL if harm else 3 if refused else 0,
        rows=found["rows"],
        measure=None if report is None else _chosen(report),
        gate_passed=None if gate is None else gate["passed"],
        drift=found["drift"],
        live=found["live"],
        seconds=found["seconds"],
        refiner_age_seconds=_age(job, store),
        messages=messages,
    )


def _harm(found: Mapping[str, Any]) -> list[str]:
    """Say what became of a refinement that fresh queries proved harmful; empty without one."""
    live = found["live"]
    if live is None or not live["harmful"]:
        return []
    if found["action"] == ROLLBACK:
        return list(found["notes"])
    if (found["refit"] or {}).get("result") == "champion":
        return [f"refiner {live['refiner']} did harm, and another one took over"]
    return [
        f"refiner {live['refiner']} does harm: {live['queries']:,} fresh queries lose "
        f"{-live['gain']:.4f} each (p {live['p']:.2g}); undo it: {undo_command(found['index'])}, "
        f'or let nightly do so: on_harm = "{ROLL_BACK}"'
    ]


def _planned(job: Job, jobs: Jobs, store: VectorStore, found: Mapping[str, Any]) -> dict[str, Any]:
    stages = ["read"]
    due = found["refit"]["due"]
    if found["outcome"] != "quiet":
        stages += ["fit", "evaluate", "write"] if due else ["write"]
    runs = Runs(state_folder(store, job.state)).read()
    seconds = forecast(runs, found["rows"]["total"], stages) or {}
    messages = [f"would fit again: {reason}" for reason in found["refit"]["reasons"]]
    if seconds:
        total = sum(seconds.values())
        cost = ""
        if jobs.cost_per_hour is not None:
            cost = f", {total / HOUR * jobs.cost_per_hour:.2f} at {jobs.cost_per_hour:g} an hour"
        messages.append(f"about {total:.0f} s{cost}, going by the last runs")
    return _result(
        job,
        found["outcome"],
        0,
        rows=found["rows"],
        drift=found["drift"],
        seconds=seconds,
        messages=messages,
    )


def _failed(
    job: Job, store: VectorStore | None, outcome: str, code: int, message: str
) -> dict[str, Any]:
    with suppress(SimskipError, OSError):  # what failed may be the state itself
        if store is not None:
            folder = state_folder(store, job.state)
            if folder.is_dir():
                Runs(folder).add(record("night", outcome, store.info().uri, notes=[message]))
    return _result(job, outcome, code, messages=[message])


def _result(job: Job, outcome: str, exit_code: int, **parts: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "job": job.name,
        "index": job.index,
        "outcome": outcome,
        "exit_code": exit_code,
        "time": time.time(),
        "rows": None,
        "measure": None,
        "gate_passed": None,
        "drift": None,
        "live": None,
        "refiner_age_seconds": None,
        "seconds": {},
        "messages": [],
        **parts,
    }


def _chosen(report: Mapping[str, Any]) -> dict[str, Any] | None:
    found = report["measures"].get(report["measure"])
    if found is None:
        return None
    return {"name": report["measure"], "before": found["before"], "after": found["after"]}


def _age(job: Job, store: VectorStore) -> float | None:
    """Return for how long the index has been refined by its current refiner, seconds."""
    manifest = Journal(state_folder(store, job.state), store.info()).manifest
    if manifest.current is None:
        return None
    since = [e["time"] for e in manifest.history if e["refiner"] == manifest.current.refiner]
    return time.time() - min(since, default=manifest.current.time)


def _count(rows: Mapping[str, int] | None, name: str) -> str:
    return "–" if rows is None else f"{rows[name]:,}"


def _measure(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['name']} {found['before']:.4f} → {found['after']:.4f}"
