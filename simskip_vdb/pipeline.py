"""The main job: fit, evaluate, gate, reindex, verify; and its parts on their own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simskip_vdb.crossfit import applies, cross_fit, measure_cross_fit
from simskip_vdb.datatypes import Progress, Side, Split, Vectors, silent
from simskip_vdb.errors import ConfigError, DataError, JournalError
from simskip_vdb.fitting import describe, fit_or_recall, validated
from simskip_vdb.gate import Decision, decide
from simskip_vdb.journal import IN_PLACE, NEW_VECTOR, Journal, Write
from simskip_vdb.judgments import Judgments
from simskip_vdb.ledger import Ledger
from simskip_vdb.measuring import Measured, RefusedError, ThroughIndex, measure
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import (
    Written,
    abandon,
    check_mode,
    fingerprint,
    recover,
    write,
    write_copy,
)
from simskip_vdb.reindex import rollback as roll_back
from simskip_vdb.report import Report, undo_command
from simskip_vdb.reporting import build_report, forecast, summarise, written_part
from simskip_vdb.store import FileBacked, VectorStore
from simskip_vdb.targets import check_same_mode, holds
from simskip_vdb.workspace import (
    Settings,
    Workspace,
    check_marker,
    forget_elsewhere,
    open_workspace,
    point_elsewhere,
    state_folder,
)

__all__ = ["Settings", "evaluate", "fit", "refine", "rollback", "status"]


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
        if _interrupted(space) is not None:
            raise ConfigError(
                f"{store.info().uri} holds a refinement that was interrupted; finish it by the "
                f"same refine command, or undo it: {undo_command(store.info().uri)}"
            )
        written, folder = space.current, settings.refiner
        if folder is None and written is not None:
            folder = space.journal.refiners / written.refiner
            space.current = None  # before: the originals
        refiner = _load(folder, space) if folder else _identity(space)
        if not len(space.judged.queries[on]):
            raise DataError(f"there are no {on.value} queries; give queries with qrels, or labels")
        as_is = written is not None and settings.refiner is None
        measured = measure(space, refiner, on, as_is=as_is)
        assert measured is not None
        through = ThroughIndex(space, refiner, on)
        if written is not None and written.refiner == refiner.id:
            through.look("after", space.held_by, refiner, as_is=True)
        else:
            through.look("before", store, None)
        report = build_report(space, "evaluate", refiner, folder, measured[0])
        return replace(report, through_index=through.measures, ann_recall=through.ann)


def refine(
    store: VectorStore,
    judgments: Judgments,
    settings: Settings | None = None,
    *,
    progress: Progress = silent,
) -> Report:
    """Refine an index if held-out queries prove that retrieval gets better.

    Args:
        store: The index; written in place with side docs, copied to `settings.output` with both.
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
        if not isinstance(store, FileBacked):
            check_same_mode(space.journal, settings.mode)
        crossed = None
        if applies(space) and not settings.dry_run:  # it reads every query
            crossed = cross_fit(space, progress)
        refiner = _refiner(space, progress) if crossed is None else crossed.refiner
        _check_output(store, settings, refiner.side)
        if settings.dry_run:
            measured = _described(space, refiner)
            report = build_report(space, "refine", refiner, settings.refiner, measured)
            return replace(report, forecast=forecast(space, refiner))
        folder = _save(refiner, space)
        if _interrupted(space) is not None:
            resumed = _finish(space, refiner, folder, progress)
            if resumed is not None:
                return resumed
        if space.current is not None and space.current.refiner == refiner.id and _unchanged(space):
            report = build_report(space, "refine", refiner, folder, None)
            note = "the index holds exactly this refinement already; nothing to do"
            return replace(report, notes=(note,), written=written_part(Written.none(), None))
        if refiner.is_identity:
            decision = Decision(passed=False, look=None, reasons=(_no_gain(refiner, space),))
            return build_report(space, "refine", refiner, folder, validated(refiner), decision)
        if crossed is None:
            measured, evidence = measure(space, refiner, Split.TEST) or (None, None)
        else:
            measured, evidence = measure_cross_fit(space, crossed)
        decision = decide(evidence, accept_unmeasured=settings.accept_unmeasured)
        report = build_report(space, "refine", refiner, folder, measured, decision)
        return _reindex(space, refiner, report, progress) if decision.passed else report


def _interrupted(space: Workspace) -> Write | None:
    """Return a refinement that was announced and not finished."""
    return space.journal.manifest.pending


def _finish(space: Workspace, refiner: Refiner, folder: Path, progress: Progress) -> Report | None:
    """Finish an interrupted write; undo it, and return None, where it would now be another one."""
    pending = _interrupted(space)
    assert pending is not None
    if pending.refiner != refiner.id:
        space.found = abandon(space.store, space.found, space.journal, progress)
        return None
    decision = Decision(passed=True, look=pending.summary.get("look"))
    report = build_report(space, "refine", refiner, folder, None, decision)
    report = _reindex(space, refiner, report, progress, resumed=pending)
    note = "this finished a write that was interrupted; its evidence was taken before it began"
    return replace(report, notes=(*report.notes, note))


def rollback(
    store: VectorStore, *, state: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Restore the vectors that an index held before it was refined.

    Args:
        store: The index.
        state: Its state folder, if not the one beside it.
        progress: Called with (stage, done, total).

    Returns:
        index, exact, restored, kept, and the sha256 of a file or the digest of all rows.

    Raises:
        ConfigError: There is nothing to roll back.
        JournalError: The state is damaged, or which original belongs where is ambiguous.
    """
    folder, info = state_folder(store, state), store.info()
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{info.uri} was never refined: there is no {folder}")
    with Journal(folder, info) as journal:
        check_marker(store, journal)
        recover(store, journal)
        done = roll_back(store, journal, progress)
        forget_elsewhere(info.state)
    return {
        "schema": 1,
        "index": info.uri,
        "exact": done.exact,
        "restored": done.restored,
        "kept": done.kept,
        "sha256" if isinstance(store, FileBacked) else "digest": done.fingerprint,
    }


def status(store: VectorStore, *, state: Path | None = None) -> dict[str, Any]:
    """Tell whether an index is refined, by what, since when, with what gain, and how to undo it.

    Args:
        store: The index.
        state: Its state folder, if not the one beside it.
    """
    info = store.info()
    folder = state_folder(store, state)
    known = (folder / "manifest.json").is_file()
    journal = Journal(folder, info)
    current = journal.manifest.current
    refined = None
    if current is not None:
        refined = {"refiner": current.refiner, "time": current.time, **current.summary}
    return {
        "schema": 1,
        "index": info.uri,
        "kind": info.kind,
        "rows": info.count,
        "dim": info.dim,
        "state": str(folder) if known else None,
        "state_bytes": journal.size if known else 0,
        "refined": refined,
        "copy_of": journal.manifest.copy_of,
        "interrupted": journal.manifest.pending is not None,
        "changed_since": current is not None and _changed(store, journal, current),
        "looks": len(Ledger(folder).looks),
        "history": [dict(entry) for entry in journal.manifest.history],
        "undo": undo_command(info.uri) if refined and not journal.manifest.copy_of else None,
    }


def _changed(store: VectorStore, journal: Journal, current: Write) -> bool:
    if isinstance(store, FileBacked):
        return fingerprint(store) != current.fingerprint
    return not holds(store, journal, current)


def _reindex(
    space: Workspace,
    refiner: Refiner,
    report: Report,
    progress: Progress,
    *,
    resumed: Write | None = None,
) -> Report:
    """Write, verify, and let the candidate's ann_recall have the last word."""
    assert report.gate is not None
    output = space.settings.output
    through = ThroughIndex(space, refiner, Split.TEST)
    if resumed is None:
        with space.timed("evaluate"):
            through.look("before", space.held_by, None)
        summary = {**summarise(space, refiner, report), "ann_recall": through.ann["before"]}
    else:
        through.ann["before"] = resumed.summary["ann_recall"]
        summary = dict(resumed.summary)

    def refined(start: int, block: Vectors) -> Vectors:
        return space.refined(refiner, start, block, space.late_when_written)

    def accept(candidate: VectorStore) -> None:
        through.accept(candidate)
        point_elsewhere(space.store, space.journal.folder)

    def accept_copy(candidate: VectorStore) -> None:
        through.accept(candidate)
        assert output is not None
        _mark_copy(output, candidate, space, refiner, summary)

    gate, written = report.gate, Written.none()
    with space.timed("write"):
        try:
            if output is None:
                written = write(
                    space.store,
                    space.found,
                    refined,
                    journal=space.journal,
                    refiner=refiner,
                    accept=accept,
                    summary=summary,
                    mode=space.settings.mode,
                    progress=progress,
                )
            else:
                written = write_copy(
                    space.store,
                    space.found,
                    refined,
                    output=output,
                    accept=accept_copy,
                    progress=progress,
                )
        except RefusedError as refused:
            gate = replace(gate, passed=False, reasons=(*gate.reasons, *refused.decision.reasons))
            if not isinstance(space.store, FileBacked):
                written = replace(written, mode="restored")
    return replace(
        report,
        gate=gate,
        through_index=through.measures,
        ann_recall=through.ann,
        written=written_part(written, output),
        seconds=dict(space.seconds),
    )


def _mark_copy(
    output: Path,
    candidate: VectorStore,
    space: Workspace,
    refiner: Refiner,
    summary: Mapping[str, Any],
) -> None:
    """Record beside the copy what it is, before it appears: it must never be refined again."""
    state = output.with_name(output.name + ".simskip")
    with Journal(state, replace(candidate.info(), uri=f"faiss:{output}", state=state)) as journal:
        if journal.manifest.current is not None and journal.manifest.copy_of is None:
            raise JournalError(
                f"{journal.folder} is the state of a refined index that was moved away; name "
                "another --output, or move that folder to where the index is now"
            )
        refiner.save(journal.refiners / refiner.id)
        journal.mark_copy(
            space.info.uri,
            Write(
                refiner=refiner.id,
                before="",
                fingerprint=fingerprint(candidate),
                originals=None,
                written=None,
                kept=None,
                time=time.time(),
                summary=summary,
            ),
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
    folder = space.journal.refiners / refiner.id
    refiner.save(folder)
    if space.settings.out is None:
        return folder
    refiner.save(space.settings.out)
    return space.settings.out


def _load(folder: Path, space: Workspace) -> Refiner:
    refiner = Refiner.load(folder)
    if (refiner.dim, refiner.metric) != (space.info.dim, space.info.metric):
        raise ConfigError(
            f"the refiner in {folder} is for {refiner.dim} dimensions and {refiner.metric.value}, "
            f"{space.info.uri} has {space.info.dim} and {space.info.metric.value}"
        )
    return refiner


def _identity(space: Workspace) -> Refiner:
    return Refiner.identity(space.info.dim, metric=space.info.metric)


def _check_output(store: VectorStore, settings: Settings, side: Side | None) -> None:
    """Make sure that there is a place for what will be written.

    Raises:
        ConfigError: There is none, or it would be in the way.
    """
    in_place = settings.output is None and settings.mode == IN_PLACE
    if side is Side.BOTH and in_place and not settings.dry_run:
        where = (
            "name a new file with --output FILE"
            if isinstance(store, FileBacked)
            else "write a new vector or collection with --mode new-vector or new-collection"
        )
        raise ConfigError(
            "with side both, queries must pass through the refiner too, so the vectors that raw "
            f"queries use are left alone: {where}"
        )
    check_mode(store, settings.mode)
    if side is Side.DOCS and settings.output is not None:
        raise ConfigError(
            "side docs is written in place and undone by rollback; --output belongs to --side both"
        )
    if settings.output is not None and not isinstance(store, FileBacked):
        raise ConfigError(f"{store.info().uri} is no file; --output belongs to files")
    if settings.output is not None and os.path.lexists(settings.output):
        raise ConfigError(f"{settings.output} exists; name a new file, or remove it first")
    if settings.output is not None and not settings.output.parent.is_dir():
        raise ConfigError(f"there is no folder {settings.output.parent} for --output")
    if settings.out is not None and settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out {settings.out} is a file; name a folder for the refiner")


def _unchanged(space: Workspace) -> bool:
    current, found = space.current, space.found
    if current is None:
        return False
    if isinstance(space.store, FileBacked):
        return fingerprint(space.store) == current.fingerprint
    if current.mode == NEW_VECTOR:
        return holds(space.store, space.journal, current)
    return (
        found.theirs == 0
        and current.written is not None
        and len(found.rows) == (current.written.rows)
    )


def _no_gain(refiner: Refiner, space: Workspace) -> str:
    if space.settings.refiner is not None:
        return "this refiner changes nothing"
    return f"no gain: {describe(refiner.info)}"
