"""Put what a run found into a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from simskip_vdb.datatypes import Side, id_names
from simskip_vdb.durable import free_bytes
from simskip_vdb.gate import Decision
from simskip_vdb.journal import Journal
from simskip_vdb.measuring import CROSS_FITTED, Measured
from simskip_vdb.provenance import Lookup, near
from simskip_vdb.refiner import Refiner
from simskip_vdb.reindex import Written
from simskip_vdb.report import Report
from simskip_vdb.state_place import state_folder
from simskip_vdb.store import abilities
from simskip_vdb.workspace import Workspace

SAMPLED = 512  # rows that a forecast tries


def build_report(
    space: Workspace,
    action: str,
    refiner: Refiner,
    folder: Path | None,
    measured: Measured | None,
    decision: Decision | None = None,
) -> Report:
    """Describe a run.

    Args:
        space: The index and its judgments.
        action: ``fit``, ``evaluate`` or ``refine``.
        refiner: What was fitted or measured.
        folder: Where it is saved.
        measured: What queries say of it.
        decision: The gate's.
    """
    late = refiner.info.get("late_rows")
    bad = int((~space.usable).sum())
    notes = [
        f"{note.count:,} {note.what} ({note.source}){note.such}" for note in space.judged.notes
    ]
    if measured is not None and measured.left_out:
        notes.append(
            f"{measured.left_out:,} of the {measured.split} queries left out: the refiner was "
            "fitted on, or chosen by, the very same vectors, so they prove nothing about it"
        )
    if measured is not None and measured.split == CROSS_FITTED:
        notes.append(
            "too few judged queries to be split, so the evidence is cross-fitted: each query was "
            "scored by a refiner that never saw it; the refiner above learnt from all of them"
        )
    if bad:
        notes.append(
            f"{bad:,} rows are NaN, infinite, zero, or absurdly long or short; nothing is learnt "
            "from them, and what is NaN, infinite or zero stays as it is"
        )
    notes += _sides(space, refiner)
    return Report(
        action=action,
        index=space.info.uri,
        kind=space.info.kind,
        rows=space.info.count,
        dim=space.info.dim,
        metric=space.info.metric.value,
        side=refiner.side.value,
        refiner={
            "id": refiner.id,
            "path": None if folder is None else str(folder),
            "alpha": refiner.alpha,
            "beta": refiner.beta,
            "late": refiner.late.value,
        },
        split=None if measured is None else measured.split,
        queries={split.value: len(judged) for split, judged in space.judged.queries.items()},
        measure=space.measure,
        measures={} if measured is None else measured.measures,
        strata={} if measured is None else measured.strata,
        regressions=() if measured is None else measured.regressions,
        late_rows=late,
        group_overlap=None if measured is None else measured.group_overlap,
        gate=decision,
        written=written_part(Written.none(), None) if action == "refine" else None,
        notes=tuple(notes),
        seconds=dict(space.seconds),
        detail=None if measured is None else measured.detail,
    )


def _sides(space: Workspace, refiner: Refiner) -> list[str]:
    """Say what validation found of each side, where it chose among them."""
    found = refiner.info.get("sides")
    if found is None:
        return []
    first = next(iter(found.values()))
    parts = [f"as it is {first['identity']:.4f}"]
    for side, choice in found.items():
        chosen = " (chosen)" if side == refiner.side.value else ""
        parts.append(f"{side} {choice['best']:.4f}{chosen}")
    said = f"{space.measure} on {first['queries']} queries to choose by: {', '.join(parts)}"
    best = max(found, key=lambda side: float(found[side]["best"]))
    if best == Side.BOTH.value and refiner.side is not Side.BOTH:
        said += "; both need --output FILE, or another --mode in Qdrant"
    return [said]


def summarise(space: Workspace, refiner: Refiner, report: Report) -> dict[str, Any]:
    """Return what `status` will show of this write."""
    assert report.gate is not None
    summary: dict[str, Any] = {"side": refiner.side.value, "rows": len(space.rows)}
    if report.gate.unmeasured:
        return {**summary, "evidence": "unmeasured"}
    found = report.measures[space.measure]
    return {
        **summary,
        "evidence": "measured",
        "measure": space.measure,
        **{name: found[name] for name in ("before", "after", "delta", "ci95", "p", "queries")},
        "look": report.gate.look,
    }


def forecast(space: Workspace, refiner: Refiner) -> dict[str, Any]:
    """Tell what a write would take, with five rows before and after.

    A file is written once and read back once more. Where rows are written one by one, each is read
    again before, which is tried on some; writing one is taken to cost twice as much. The engine
    writes every vector anew and drops the old one only when it optimises.
    """
    start = time.perf_counter()
    for first, block in space.rows.blocks():
        space.refined(refiner, first, block)
        break
    blocks = -(-len(space.rows) // 8192)
    apply = (time.perf_counter() - start) * blocks
    places = np.flatnonzero(space.usable)[:: max(1, len(space.rows) // 5)][:5]
    before = space.rows.take(places)
    after = refiner.refine_rows(before, space.rows.ids[places])
    seconds, engine = apply + 3 * space.seconds["read"], 0
    live = abilities(space.store).rows
    if live is not None:
        some = space.rows.ids[:SAMPLED]
        start = time.perf_counter()
        live.peek(some)
        each = (time.perf_counter() - start) / max(1, len(some))
        seconds = apply + space.seconds["read"] + 3 * each * len(space.rows)
        engine = len(space.rows) * space.info.dim * 4
    return {
        "rows": len(space.rows),
        "seconds": seconds,
        "engine_bytes": engine,
        "originals_bytes": len(space.rows) * space.info.dim * 4 + space.rows.ids.nbytes,
        "free_bytes": free_bytes(state_folder(space.store, space.settings.state)),
        "samples": [
            {"id": row, "before": was[:4].tolist(), "after": now[:4].tolist()}
            for row, was, now in zip(id_names(space.rows.ids[places]), before, after, strict=True)
        ],
    }


def changes(space: Workspace, journal: Journal | None = None) -> dict[str, int]:
    """Count the rows, and those that came, changed and went since the index was written.

    Args:
        space: The index.
        journal: Its state, where the run has another one.
    """
    total = len(space.rows)
    current = space.current
    if current is None or current.originals is None:
        return {"total": total, "new": total, "changed": 0, "deleted": 0}
    journal = journal or space.journal
    then = journal.open_originals(current)
    places = Lookup(then.ids).find(space.rows.ids)
    known, same = places >= 0, space.found.ours
    if current.beside:  # the rows' own vectors are never ours
        same = known.copy()
        for start, block in space.rows.blocks():
            part = np.flatnonzero(known[start : start + len(block)])
            was = then.take(places[start + part])
            same[start + part] = near(block[part], was, space.info.tolerance)
    new = int((~known).sum())
    changed = int((known & ~same).sum())
    deleted = current.originals.rows - (total - new)
    return {"total": total, "new": new, "changed": changed, "deleted": deleted}


def written_part(written: Written, output: Path | None) -> dict[str, Any]:
    """Return what was written, and where to, as the report shows it."""
    path = None if output is None else str(output)
    return {**asdict(written), "path": path}
