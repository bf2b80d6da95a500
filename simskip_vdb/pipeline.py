"""The main job: fit, evaluate, gate, reindex, verify; and its parts on their own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from simskip_vdb.attempts import Attempt, judged_digests
from simskip_vdb.crossfit import CrossFit, applies, cross_fit, measure_cross_fit
from simskip_vdb.datatypes import Progress, Side, Split, silent
from simskip_vdb.errors import ConfigError, DataError
from simskip_vdb.fitting import describe, fit_or_recall, learnt_since, validated
from simskip_vdb.gate import MIN_QUERIES, Decision, Proof, decide
from simskip_vdb.journal import IN_PLACE
from simskip_vdb.judgments import Judgments
from simskip_vdb.logs import only_tells
from simskip_vdb.measuring import Measured, measure
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import (
    Written,
    check_mode,
)
from simskip_vdb.report import Report, undo_command
from simskip_vdb.reporting import build_report, changes, forecast, written_part
from simskip_vdb.runs import Runs, record
from simskip_vdb.store import VectorStore, abilities
from simskip_vdb.targets import check_same_mode
from simskip_vdb.through_index import ThroughIndex
from simskip_vdb.workspace import (
    Settings,
    Workspace,
    keep_refiner,
    open_workspace,
)
from simskip_vdb.writing import finish, interrupted, reindex, search_refined, unchanged

LEARNT_SINCE = (
    "the refiner learnt from the validation queries once they had chosen it; shown is what they "
    "said before (fresh evidence: --on test)"
)

_HARMED = (
    "fresh queries proved that this refiner does harm while it was live; fit another one with more "
    "judged queries"
)

__all__ = ["Settings", "evaluate", "fit", "refine"]


def fit(
    store: VectorStore,
    judgments: Judgments,
    settings: Settings | None = None,
    *,
    progress: Progress = silent,
) -> Report:
    """Fit a refiner and describe it on the validation queries; write nothing to the index.

    Args:
        store: The index.
        judgments: Queries with judgments, groups, or neither.
        settings: What to fit and where it goes.
        progress: Called with (stage, done, total).

    Raises:
        SimskipError: See `errors`; nothing was written.
    """
    settings = settings or Settings()
    _check_output(store, settings, None)
    with open_workspace(store, judgments, settings, progress) as space:
        refiner = fit_or_recall(space, progress)
        folder = _save(refiner, space)
        return build_report(space, "fit", refiner, folder, validated(refiner))


def evaluate(
    store: VectorStore,
    judgments: Judgments,
    settings: Settings | None = None,
    *,
    on: Split = Split.VALIDATION,
    progress: Progress = silent,
) -> Report:
    """Measure retrieval before and after a refiner; write nothing to the index.

    Without a refiner in the settings, originals are compared with what the index holds now.

    Args:
        store: The index.
        judgments: Queries with judgments, or groups.
        settings: The refiner to measure.
        on: Which queries; TEST is recorded as a look.
        progress: Called with (stage, done, total).

    Raises:
        DataError: There are no such queries.
        SimskipError: See `errors`.
    """
    settings = settings or Settings()
    with open_workspace(store, judgments, settings, progress) as space:
        if interrupted(space) is not None:
            raise ConfigError(
                f"{store.info().uri} holds a refinement that was interrupted; finish it by the "
                f"same refine command, or undo it: {undo_command(store.info().uri)}"
            )
        written, folder = space.current, settings.refiner
        if folder is None and written is not None:
            folder = space.journal.refiners / written.refiner
            space.current, space.as_given = None, True  # before: the originals
        refiner = _load(folder, space) if folder else _identity(space)
        _check_originals(space, refiner)
        if not len(space.judged.queries[on]):
            raise DataError(
                f"there are no {on.value} queries; give --queries with --qrels, or --labels"
            )
        as_is = written is not None and settings.refiner is None
        recalled = on is Split.VALIDATION and learnt_since(refiner, space)
        measured = validated(refiner) if recalled else None
        if measured is None:
            found = measure(space, refiner, on, as_is=as_is)
            assert found is not None
            measured = found[0]
        through = ThroughIndex(space, refiner, on)
        if written is not None and written.refiner == refiner.id:
            through.look("after", space.held_by, refiner, as_is=True)
        else:
            through.look("before", store, None)
        report = build_report(space, "evaluate", refiner, folder, measured)
        notes = (*report.notes, LEARNT_SINCE) if recalled else report.notes
        return replace(report, notes=notes, through_index=through.measures, ann_recall=through.ann)


def refine(
    store: VectorStore,
    judgments: Judgments,
    settings: Settings | None = None,
    *,
    progress: Progress = silent,
) -> Report:
    """Refine an index if held-out queries prove that retrieval gets better.

    Args:
        store: The index; written in place with side docs, copied to `settings.output` with both,
            left as it is with queries.
        judgments: Queries with judgments, groups, or neither.
        settings: What to do.
        progress: Called with (stage, done, total).

    Returns:
        The report; its gate says whether anything was written, and if not, why.

    Raises:
        SimskipError: See `errors`; the index is as it was.
    """
    settings = settings or Settings()
    _check_output(store, settings, settings.fit.side if settings.refiner is None else None)
    with open_workspace(store, judgments, settings, progress) as space:
        if abilities(store).file is None:
            check_same_mode(space.journal, settings.mode)
        hopeless = _hopeless(space)
        if hopeless is not None:
            return _refused(space, hopeless)
        if settings.dry_run:
            refiner = _refiner(space, progress)
            _check_output(store, settings, refiner.side)
            measured = _described(space, refiner)
            report = build_report(space, "refine", refiner, settings.refiner, measured)
            return replace(report, forecast=forecast(space, refiner))
        found = changes(space)
        report = _refine(space, progress)
        if settings.refiner is None and report.refiner is not None:
            with only_tells("the note for the next night"):
                remember_attempt(space, judgments, report.refiner["id"])
        outcome = "refused" if report.exit_code else "written"
        if not report.exit_code and (report.gate is None or report.side == Side.QUERIES.value):
            outcome = "unchanged"
        with only_tells("the record of this run"):
            Runs(space.journal.folder).add(record_of(report, "refine", outcome, found))
        return report


def _refine(space: Workspace, progress: Progress) -> Report:
    refiner, crossed = fitted(space, progress)
    _check_output(space.store, space.settings, refiner.side)
    _check_originals(space, refiner)
    folder = _save(refiner, space)
    if interrupted(space) is not None:
        resumed = finish(space, refiner, folder, progress)
        if resumed is not None:
            return resumed
    if space.current is not None and space.current.refiner == refiner.id and unchanged(space):
        report = build_report(space, "refine", refiner, folder, None)
        note = "the index holds exactly this refinement already; nothing to do"
        return replace(report, notes=(note,), written=written_part(Written.none(), None))
    return challenge(space, refiner, crossed, folder, progress)


def fitted(space: Workspace, progress: Progress) -> tuple[Refiner, CrossFit | None]:
    """Fit a refiner, or take the one that was given; cross-fit where few queries are judged."""
    if applies(space):
        crossed = cross_fit(space, progress)
        return crossed.refiner, crossed
    return _refiner(space, progress), None


def challenge(
    space: Workspace,
    refiner: Refiner,
    crossed: CrossFit | None,
    folder: Path,
    progress: Progress,
    current: Refiner | None = None,
) -> Report:
    """Measure a refiner on held-out queries, and write if the gate lets it pass.

    Args:
        space: The index and its judgments.
        refiner: What was fitted.
        crossed: How, where it was cross-fitted.
        folder: Where it is saved.
        progress: Called with (stage, done, total).
        current: The refiner that it must beat; None for the index as it is.
    """
    if refiner.is_identity:
        decision = Decision(passed=False, look=None, reasons=(_no_gain(refiner, space),))
        return build_report(space, "refine", refiner, folder, validated(refiner), decision)
    if space.ledger.is_harmful(refiner.id):
        decision = Decision(passed=False, look=None, reasons=(_HARMED,), proof=Proof.HARMFUL)
        return build_report(space, "refine", refiner, folder, None, decision)
    if crossed is None:
        found = measure(space, refiner, Split.TEST, current=current, freshest=True)
        measured, evidence = found or (None, None)
    else:
        measured, evidence = measure_cross_fit(space, crossed)
    decision = decide(evidence, accept_unmeasured=space.settings.accept_unmeasured)
    report = build_report(space, "refine", refiner, folder, measured, decision)
    if not decision.passed:
        return report
    write = search_refined if refiner.side is Side.QUERIES else partial(reindex, progress=progress)
    report = write(space, refiner, report)
    if evidence is not None and not report.exit_code:
        with only_tells("what this gain earned for later looks"):
            space.ledger.earn(evidence.look)
    return report


def remember_attempt(space: Workspace, judgments: Judgments, refiner: str) -> None:
    """Note what was known when a refiner, named by its id, was fitted."""
    attempt = Attempt(time=time.time(), refiner=refiner, judged=judged_digests(judgments))
    attempt.save(space.journal.folder)


def record_of(
    report: Report,
    action: str,
    outcome: str,
    rows: Mapping[str, int],
    **parts: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Describe a run for the state; `rows` are what `changes` counted before it."""
    written = 0 if report.written is None else report.written["sent"]
    return record(
        action,
        outcome,
        report.index,
        report=report.to_dict(),
        detail=report.detail,
        rows={**rows, "written": written},
        seconds=dict(report.seconds),
        **parts,
    )


def _refiner(space: Workspace, progress: Progress) -> Refiner:
    folder = space.settings.refiner
    return fit_or_recall(space, progress) if folder is None else _load(folder, space)


def _described(space: Workspace, refiner: Refiner) -> Measured | None:
    """Say what validation queries show of a refiner, without a look at test."""
    if space.settings.refiner is None:
        return validated(refiner)
    measured = measure(space, refiner, Split.VALIDATION)
    return None if measured is None else measured[0]


def _save(refiner: Refiner, space: Workspace) -> Path:
    """Save a refiner in the state, where it tells our rows from others later, and to --out."""
    folder = keep_refiner(refiner, space)
    if space.settings.out is None:
        return folder
    refiner.save(space.settings.out)
    return space.settings.out


def _load(folder: Path, space: Workspace) -> Refiner:
    refiner = Refiner.load(folder)
    refiner.check_ids(space.rows.ids)
    if (refiner.dim, refiner.metric) != (space.info.dim, space.info.metric):
        raise ConfigError(
            f"the refiner in {folder} is for {refiner.dim} dimensions and {refiner.metric.value}, "
            f"{space.info.uri} has {space.info.dim} and {space.info.metric.value}"
        )
    return refiner


def _identity(space: Workspace) -> Refiner:
    return Refiner.identity(space.info.dim, metric=space.info.metric)


def _hopeless(space: Workspace) -> str | None:
    """Tell before a fit why the gate would refuse whatever it found."""
    judged, settings = space.judged, space.settings
    if settings.accept_unmeasured or settings.refiner is not None or interrupted(space) is not None:
        return None
    if applies(space):
        return None
    counts = {split: len(queries) for split, queries in judged.queries.items()}
    if counts[Split.TEST] >= MIN_QUERIES or not sum(counts.values()):
        return None
    what, more = "test queries", "add judged queries"
    if judged.groups is not None:
        what, more = "rows of groups can act as test queries", "label more rows"
    return (
        f"only {counts[Split.TEST]} {what}: at least {MIN_QUERIES} are needed to prove a gain, so "
        f"nothing was fitted; {more}"
    )


def _refused(space: Workspace, reason: str) -> Report:
    """Report that nothing was fitted, and why."""
    decision = Decision(passed=False, look=None, reasons=(reason,))
    report = replace(
        build_report(space, "refine", _identity(space), None, None, decision), refiner=None
    )
    if not space.settings.dry_run:
        found = record_of(report, "refine", "refused", changes(space))
        Runs(space.journal.folder).add(found)
    return report


def _check_originals(space: Workspace, refiner: Refiner) -> None:
    """Make sure that a refiner of queries alone meets the rows that it was fitted on.

    Raises:
        ConfigError: The index holds refined rows, or some of them.
    """
    write = space.current or interrupted(space)
    if refiner.side is Side.QUERIES and write is not None:
        raise ConfigError(
            f"{space.info.uri} holds rows refined by {write.refiner}, and side queries refines "
            f"queries for the rows as they were; undo it first: {undo_command(space.info.uri)}"
        )


def _check_output(store: VectorStore, settings: Settings, side: Side | None) -> None:
    """Make sure that there is a place for what will be written.

    Raises:
        ConfigError: There is none, or it would be in the way.
    """
    in_place = settings.output is None and settings.mode == IN_PLACE
    if side is Side.BOTH and in_place and not settings.dry_run:
        where = (
            "name a new file with --output FILE"
            if abilities(store).file is not None
            else "write a new vector or collection with --mode new-vector or new-collection"
        )
        raise ConfigError(
            "with side both, queries must pass through the refiner too, so the vectors that raw "
            f"queries use are left alone: {where}"
        )
    asked = settings.fit.side if settings.refiner is None else side
    if asked is Side.QUERIES and not in_place:
        raise ConfigError(
            "side queries writes no vectors: leave out --output and --mode; the refiner is saved "
            "beside the index, and where --out says"
        )
    check_mode(store, settings.mode)
    if side is Side.DOCS and settings.output is not None:
        raise ConfigError(
            "side docs is written in place and undone by rollback; --output belongs to --side both"
        )
    if settings.output is not None and abilities(store).file is None:
        raise ConfigError(f"{store.info().uri} is no file; --output belongs to files")
    if settings.output is not None and os.path.lexists(settings.output):
        raise ConfigError(f"{settings.output} exists; name a new file, or remove it first")
    if settings.output is not None and not settings.output.parent.is_dir():
        raise ConfigError(f"there is no folder {settings.output.parent} for --output")
    if settings.out is not None and settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out {settings.out} is a file; name a folder for the refiner")


def _no_gain(refiner: Refiner, space: Workspace) -> str:
    if space.settings.refiner is not None:
        return "this refiner changes nothing"
    return f"no gain: {describe(refiner.info)}"
