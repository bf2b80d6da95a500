"""What people read: the result of a run, as a table or as JSON."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from simskip_vdb.gate import MIN_QUERIES, Decision, Proof

REFUSED = 3
LATE_RULES = {"raw": "left raw", "f": "refined by f"}
"""What becomes of rows that arrive after a fit, in words."""
IN_THE_INDEX = ("in-place", "new-vector", "new-collection")
"""Modes of a write that `rollback` undoes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of fit, evaluate or refine.

    Attributes:
        action: ``fit``, ``evaluate`` or ``refine``.
        index: The index's URI.
        kind: What it is, in words.
        rows: Rows in the index.
        dim: Dimension.
        metric: ``cosine``, ``dot`` or ``euclid``.
        side: ``docs``, ``queries`` or ``both``.
        refiner: id, path, alpha, beta, late rule; None where there is none.
        split: Which queries `measures` and `strata` are on: ``test``, ``validation`` or
            ``cross-fitted``, which is all of them.
        queries: Number of queries of each split.
        measure: The chosen measure, which alone the gate judges.
        measures: Comparison of each measure by exact search, before and after.
        strata: The chosen measure over seen and unseen queries.
        regressions: The queries that lost most.
        through_index: Each measure through the user's index, before and after.
        ann_recall: ann_recall@10 before and after.
        late_rows: Rows that arrive later: rule, share of the top 10 before and after.
        group_overlap: Top-10 overlap inside groups, before against after.
        gate: The decision; None where nothing was to be decided.
        written: rows, skipped, mode; None where nothing was to be written.
        forecast: What `--dry-run` found.
        notes: What else a person should know.
        seconds: Time by stage.
        detail: Each test query's change, and the rows of those that moved most; not in `to_dict`.
    """

    action: str
    index: str
    kind: str
    rows: int
    dim: int
    metric: str
    side: str
    refiner: Mapping[str, Any] | None = None
    split: str | None = None
    queries: Mapping[str, int] = field(default_factory=dict)
    measure: str | None = None
    measures: Mapping[str, Any] = field(default_factory=dict)
    strata: Mapping[str, Any] = field(default_factory=dict)
    regressions: Sequence[Mapping[str, Any]] = ()
    through_index: Mapping[str, Any] = field(default_factory=dict)
    ann_recall: Mapping[str, float] | None = None
    late_rows: Mapping[str, Any] | None = None
    group_overlap: float | None = None
    gate: Decision | None = None
    written: Mapping[str, Any] | None = None
    forecast: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    detail: Mapping[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """3 where the gate refused, else 0."""
        return REFUSED if self.gate is not None and not self.gate.passed else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with its schema number."""
        data = asdict(self)
        del data["detail"]
        data["gate"] = None if self.gate is None else self.gate.to_dict()
        return {"schema": 1, **data}


def render(report: Mapping[str, Any]) -> str:
    """Lay a report out as a table for people.

    Args:
        report: As `Report.to_dict` returns it.
    """
    blocks = [
        _heading(report),
        _measures(report),
        _regressions(report),
        _findings(report),
        _forecast(report),
        _outcome(report),
    ]
    return "\n\n".join(block for block in blocks if block)


def render_rollback(result: Mapping[str, Any]) -> str:
    """Say what a rollback did."""
    lines = [f"{result['index']}: restored, {result['restored']:,} rows"]
    if not result["exact"]:
        lines[0] += f"; {result['kept']:,} rows that were added or changed since stay as they are"
    if "sha256" not in result:
        if result["exact"]:
            lines.append("every row has its original vector, and there are no other rows")
        return "\n".join(lines)
    lines.append(
        "the very same file:"
        if result["exact"]
        else "the file changed since it was refined, so it was rebuilt around its rows:"
    )
    lines.append(f"  SHA-256 {result['sha256']}")
    lines.append("Reload your application: one that runs still holds the refined index.")
    return "\n".join(lines)


def render_status(status: Mapping[str, Any]) -> str:
    """Say whether an index is refined, by what, and how to undo it."""
    lines = [f"{status['index']} · {status['kind']} · {status['rows']:,} rows × {status['dim']}"]
    if status["state_of_another"]:
        lines.append(status["state_of_another"])
    if status["copy_of"]:
        lines.append(f"a refined copy of {status['copy_of']}, which is as it was")
    if status["interrupted"]:
        lines.append("a run was interrupted while writing; run the same command again to finish")
        if status["partitions_written"]:
            lines.append(f"{status['partitions_written']} partitions are written and verified")
    current = status["refined"]
    if current is None:
        lines.append("holds originals" + ("" if status["state"] else "; never refined"))
    else:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(current["time"]))
        lines.append(f"refined by {current['refiner']} on {when}, side {current['side']}")
        lines.append(f"  {_gain(current)}")
        if status["live"]:
            lines.append(f"  {watch_line(status['live'])}")
        if status["changed_since"]:
            lines.append("  it was changed since; changed and added rows are not ours")
        if not status["copy_of"]:
            lines.append(f"undo: {undo_command(status['index'])}")
    if status["state"]:
        lines.append(f"state: {status['state']} ({_bytes(status['state_bytes'])})")
        lines.append(f"looks at test queries so far: {status['looks']}")
    return "\n".join(lines)


def watch_line(live: Mapping[str, Any]) -> str:
    """Say what fresh queries found of what is live, from `HarmWatch.to_dict`."""
    if not live["queries"]:
        return "no fresh query was seen since"
    verdict = "proven harmful" if live["harmful"] else "no harm is proven"
    return (
        f"since then {live['queries']:,} fresh queries gained {live['gain']:+.4f} each over the "
        f"originals: {verdict} (p {live['p']:.2g})"
    )


def render_prune(result: Mapping[str, Any]) -> str:
    """Say what a prune removed."""
    lines = [
        f"{result['index']}: {_bytes(result['bytes'])} freed, {_bytes(result['left'])} stay",
        *(f"  removed {name}" for name in result["removed"]),
        *(f"note: {note}" for note in result["notes"]),
    ]
    return "\n".join(lines)


def undo_command(uri: str) -> str:
    """Return the command that restores an index, ready for a shell."""
    return f"simskip rollback {shlex.quote(uri)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((first, *rest)).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Write a measure with four decimals and no leading zero."""
    return f"{value:.4f}".replace("0.", ".", 1) if 0 <= value < 1 else f"{value:.4f}"


def signed(value: float) -> str:
    """Write a difference with its sign, four decimals and no leading zero."""
    return f"{value:+.4f}".replace("+0.", "+.").replace("-0.", "-.")


def interval(bounds: Sequence[float] | None) -> str:
    """Write an interval of differences; empty where there is none."""
    return "" if bounds is None else f"{signed(bounds[0])} to {signed(bounds[1])}"


def compared(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a comparison as cells: before, after, delta, interval, wins, ties, losses."""
    return (
        name,
        number(found["before"]),
        number(found["after"]),
        signed(found["delta"]),
        interval(found["ci95"]),
        str(found["wins"]),
        str(found["ties"]),
        str(found["losses"]),
    )


def change(found: Mapping[str, float]) -> str:
    """Write before and after, either of which may not have been measured."""
    before, after = (number(found[when]) if when in found else "–" for when in ("before", "after"))
    return f"{before} → {after}"


def _heading(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['index']} · {report['kind']} · {report['rows']:,} rows × {report['dim']}"
        f" · {report['metric']}"
    ]
    refiner = report["refiner"]
    if refiner is not None:
        lines.append(
            f"refiner {refiner['id']} · side {report['side']} · α {refiner['alpha']:g}"
            f" · β {refiner['beta']:g}" + (f" · {refiner['path']}" if refiner["path"] else "")
        )
    if report["queries"]:
        counts = ", ".join(f"{count:,} {name}" for name, count in report["queries"].items())
        lines.append(f"queries: {counts}")
    return "\n".join(lines)


def _measures(report: Mapping[str, Any]) -> str:
    if not report["measures"]:
        return ""
    rows = [compared(name, found) for name, found in report["measures"].items()]
    strata = {name: found for name, found in report["strata"].items() if found is not None}
    if len(strata) > 1:
        rows += [
            compared(f"  {name} ({found['queries']})", found) for name, found in strata.items()
        ]
    header = ("exact search", "before", "after", "delta", "95 % interval", "wins", "ties", "losses")
    title = f"{report['split']} queries{_look(report['gate'])}; the gate judges {report['measure']}"
    few = [
        f"{name}: {found['queries']} queries, too few to judge"
        for name, found in strata.items()
        if found["queries"] < MIN_QUERIES
    ]
    return "\n".join([title, table(header, rows), *few])


def _look(gate: Mapping[str, Any] | None) -> str:
    """Say which look it was, at which level, and what another would need."""
    if gate is None or gate["look"] is None:
        return ""
    if gate.get("level") is None:
        return f", look {gate['look']}"
    return (
        f", look {gate['look']} at p ≤ {gate['level']:.2g} (another look at them: "
        f"{gate['next_level']:.2g})"
    )


def _regressions(report: Mapping[str, Any]) -> str:
    lost = [
        f"{item['query']} {number(item['before'])} → {number(item['after'])}"
        for item in report["regressions"]
    ]
    return f"lost most: {' · '.join(lost)}" if lost else ""


def _findings(report: Mapping[str, Any]) -> str:
    lines = []
    for name, found in report["through_index"].items():
        lines.append(f"through the index: {name} {change(found)}")
    ann = report["ann_recall"]
    if ann is not None:
        lines.append(f"ann_recall@10: {change(ann)}")
    late = report["late_rows"]
    if late is not None:
        rule = LATE_RULES[late["rule"]]
        verdict = "fair" if late["fair"] else "not fair"
        shares = f"{late['before']:.1%} → {late['after']:.1%}"
        lines.append(f"late rows ({rule}): {shares} of the top 10, {verdict}")
    if report["group_overlap"] is not None:
        lines.append(f"order inside groups: top-10 overlap {report['group_overlap']:.2f}")
    return "\n".join(lines)


def _forecast(report: Mapping[str, Any]) -> str:
    forecast = report["forecast"]
    if forecast is None:
        return ""
    lines = [
        "dry run: nothing was written, no test query was read",
        f"would write {forecast['rows']:,} rows in about {forecast['seconds']:.0f} s; "
        f"originals take {_bytes(forecast['originals_bytes'])}, "
        f"{_bytes(forecast['free_bytes'])} are free",
    ]
    if forecast["engine_bytes"]:
        lines.append(
            f"until it is optimised, the engine needs up to {_bytes(forecast['engine_bytes'])} more"
        )
    for sample in forecast["samples"]:
        before, after = (
            ", ".join(f"{x:+.3f}" for x in sample[name]) for name in ("before", "after")
        )
        lines.append(f"  row {sample['id']}: [{before}, …] → [{after}, …]")
    return "\n".join(lines)


def _outcome(report: Mapping[str, Any]) -> str:
    lines = []
    gate, written = report["gate"], report["written"]
    if gate is not None:
        lines += [f"warning: {warning}" for warning in gate["warnings"]]
        if gate["passed"]:
            lines.append("gate: passed" if not gate["unmeasured"] else "gate: nothing measured")
        else:
            restored = written is not None and written["mode"] == "restored"
            proof = gate.get("proof")
            found = f" ({proof})" if proof not in (None, Proof.PROVEN.value) else ""
            lines.append(
                f"gate: refused{found}, {'written and restored' if restored else 'nothing written'}"
            )
            lines += [f"  - {reason}" for reason in gate["reasons"]]
        if gate.get("next_step"):
            lines.append(f"next: {gate['next_step']}")
    lines += [f"note: {note}" for note in report["notes"]]
    if written is not None and written["mode"] in IN_THE_INDEX:
        lines += _written(report["index"], written)
    if report["side"] == "queries" and gate is not None and gate["passed"]:
        path = report["refiner"]["path"]
        lines.append("the index stays as it is, and raw queries go on as before")
        lines.append(f"pass queries through the refiner: Refiner.load({path!r})(queries)")
    if written is not None and written["mode"] == "copy":
        lines.append(f"written: {written['rows']:,} rows to {written['path']}, verified")
        path = report["refiner"]["path"]
        lines.append(f"pass queries through the refiner: Refiner.load({path!r})(queries)")
    if report["seconds"]:
        parts = (f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items())
        lines.append(f"seconds: {', '.join(parts)}")
    return "\n".join(lines)


def _written(index: str, written: Mapping[str, Any]) -> list[str]:
    lines = [f"written: {written['rows']:,} rows, read back and verified"]
    if written["theirs"]:
        lines.append(f"left alone: {written['theirs']:,} rows that were changed meanwhile")
    if written["gone"]:
        lines.append(f"gone: {written['gone']:,} rows that were removed meanwhile")
    if written["mode"] == "new-vector":
        lines.append(f"query it as the vector {written['target']!r}; the others are as they were")
    if written["mode"] == "new-collection":
        lines.append(f"the alias leads to the new collection {written['target']!r}")
    lines.append(f"undo: {undo_command(index)}")
    if index.startswith("faiss:"):
        lines.append("Reload your application: one that runs still holds the old index.")
    elif index.startswith(("npy:", "npz:", "safetensors:")):
        lines.append("Reload your application: one that runs still holds the old vectors.")
    return lines


def _gain(current: Mapping[str, Any]) -> str:
    if current.get("evidence") != "measured":
        return "not measured: written on request (--accept-unmeasured)"
    return (
        f"{current['measure']} {number(current['before'])} → {number(current['after'])} "
        f"({interval(current['ci95'])}) on {current['queries']} held-out queries"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
