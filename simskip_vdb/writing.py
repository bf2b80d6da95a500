"""Write what the gate let through, measure it through the index, finish what was interrupted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from simskip_vdb.datatypes import Progress, Split, Vectors
from simskip_vdb.errors import JournalError
from simskip_vdb.gate import Decision
from simskip_vdb.journal import Journal, Write
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import Written, abandon, write, write_copy
from simskip_vdb.report import Report
from simskip_vdb.reporting import build_report, summarise, written_part
from simskip_vdb.row_by_row import settled
from simskip_vdb.state_place import point_elsewhere
from simskip_vdb.store import VectorStore, abilities
from simskip_vdb.targets import holds
from simskip_vdb.through_index import RefusedError, ThroughIndex
from simskip_vdb.workspace import Workspace


def interrupted(space: Workspace) -> Write | None:
    """Return a refinement that was announced and not finished."""
    return space.journal.manifest.pending


def finish(space: Workspace, refiner: Refiner, folder: Path, progress: Progress) -> Report | None:
    """Finish an interrupted write; undo it, and return None, where it would now be another one."""
    pending = interrupted(space)
    assert pending is not None
    if pending.refiner != refiner.id:
        space.found = abandon(space.store, space.found, space.journal, progress)
        return None
    decision = Decision(passed=True, look=pending.summary.get("look"))
    report = build_report(space, "refine", refiner, folder, None, decision)
    report = reindex(space, refiner, report, progress, resumed=pending)
    note = "this finished a write that was interrupted; its evidence was taken before it began"
    return replace(report, notes=(*report.notes, note))


def unchanged(space: Workspace) -> bool:
    """Tell whether every row still is as the last write left it."""
    current, found = space.current, space.found
    if current is None:
        return False
    if abilities(space.store).file is not None or current.beside:
        return holds(space.store, space.journal, current)
    written, exact = current.written, space.info.exact
    if written is None or len(found.rows) != written.rows or not found.ours.all():
        return False
    if settled(space.journal, found, current.refiner, exact=exact).all():
        return True
    # The same vector may be read back with other last digits.
    return not exact and holds(space.store, space.journal, current)


def reindex(
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

    late, placed = space.late(refiner), space.placed(refiner)

    def refined(start: int, block: Vectors) -> Vectors:
        return space.refined(placed, start, block, late)

    def accept(candidate: VectorStore) -> None:
        through.accept(candidate)
        point_elsewhere(space.store, space.journal.folder)

    def accept_copy(candidate: VectorStore) -> None:
        through.accept(candidate)
        assert output is not None
        _mark_copy(output, candidate, space, refiner, summary)

    send = None if space.crew is None else partial(space.crew.write, late)
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
                    send=send,
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
            if abilities(space.store).file is None:
                written = replace(written, mode="restored")
    return replace(
        report,
        gate=gate,
        through_index=through.measures,
        ann_recall=through.ann,
        written=written_part(written, output),
        seconds=dict(space.seconds),
    )


def search_refined(space: Workspace, refiner: Refiner, report: Report) -> Report:
    """Search the index, which stays as it is, by refined queries, and let ann_recall decide."""
    assert report.gate is not None
    through, gate = ThroughIndex(space, refiner, Split.TEST), report.gate
    with space.timed("evaluate"):
        through.look("before", space.held_by, None)
        try:
            through.accept(space.held_by)
        except RefusedError as refused:
            gate = replace(gate, passed=False, reasons=(*gate.reasons, *refused.decision.reasons))
    return replace(
        report,
        gate=gate,
        through_index=through.measures,
        ann_recall=through.ann,
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
    file, copy = abilities(space.store).file, abilities(candidate).file
    assert file is not None
    assert copy is not None
    info = file.info_at(output)
    assert info.state is not None
    with Journal(info.state, info) as journal:
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
                fingerprint=copy.sha256(),
                originals=None,
                written=None,
                kept=None,
                time=time.time(),
                summary=summary,
            ),
        )
