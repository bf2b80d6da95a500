"""What the record of a run says in a sentence, and the numbers that all else starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from simskip_vdb.report import number

Run = Mapping[str, Any]
"""The record of one run, as plain JSON values."""
VALIDATION = "validation"
NIGHT, ROLLBACK = "night", "rollback"
WRITTEN, RESTORED = "written", "restored"
UNFINISHED = ("failed", "stopped")


class Tone(str, Enum):
    """How a verdict is to be taken."""

    GOOD = "good"
    CALM = "calm"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a run in a word or two."""

    word: str
    tone: Tone


_VERDICTS = {
    WRITTEN: Verdict(word="written", tone=Tone.GOOD),
    "refused": Verdict(word="refused", tone=Tone.WARN),
    "unchanged": Verdict(word="unchanged", tone=Tone.CALM),
    "quiet": Verdict(word="quiet", tone=Tone.CALM),
    "kept": Verdict(word="refiner kept", tone=Tone.CALM),
    RESTORED: Verdict(word="rolled back", tone=Tone.CALM),
    "failed": Verdict(word="failed", tone=Tone.BAD),
    "stopped": Verdict(word="stopped", tone=Tone.WARN),
}


def verdict(run: Run) -> Verdict:
    """Return the outcome in a word."""
    return _VERDICTS[run["outcome"]]


def headline(run: Run) -> str:
    """Say in one sentence what happened, with the one number that matters."""
    return _HEADLINES[run["outcome"]](run)


def report_of(run: Run) -> Mapping[str, Any]:
    """Return a run's report; empty where it has none."""
    return run.get("report") or {}


def written_of(run: Run) -> Mapping[str, Any]:
    """Return what a run's report says of the write; empty where it says nothing."""
    return report_of(run).get("written") or {}


def has_new_refiner(run: Run) -> bool:
    """Tell whether a run wrote rows by a refiner that it fitted or was given."""
    fitted = run["action"] == "refine" or (run.get("refit") or {}).get("result") == "champion"
    return run["outcome"] == WRITTEN and fitted


def chosen(run: Run) -> Mapping[str, Any] | None:
    """Return the comparison of the gate's measure; None where nothing was measured."""
    report = report_of(run)
    found: Mapping[str, Any] | None = (report.get("measures") or {}).get(report.get("measure"))
    return found


def measure_name(run: Run) -> str:
    """Name the measure that the gate judges, and say where groups stand for relevance."""
    report = report_of(run)
    same_group = "same-group " if report.get("group_overlap") is not None else ""
    return f"{same_group}{report['measure']}"


def queries_phrase(run: Run) -> str:
    """Say what the measures are on, such as ``323 held-out queries``."""
    found = chosen(run)
    assert found is not None
    kind = "validation" if report_of(run).get("split") == VALIDATION else "held-out"
    return f"{found['queries']:,} {kind} {'query' if found['queries'] == 1 else 'queries'}"


def rows_written(run: Run) -> int:
    """Return how many rows got another vector."""
    counted = run.get("rows") or written_of(run)
    return int(counted.get("written", counted.get("rows", 0)))


def rows_total(run: Run) -> int | None:
    """Return how many rows the index has; None where nobody counted."""
    total = (run.get("rows") or {}).get("total")
    return report_of(run).get("rows") if total is None else int(total)


def seconds_of(run: Run) -> Mapping[str, float]:
    """Return the time by stage."""
    return run.get("seconds") or report_of(run).get("seconds") or {}


def counted(count: int, what: str) -> str:
    """Write a number of things."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def duration(seconds: float) -> str:
    """Write how long something took."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def moment_of(seconds: float) -> str:
    """Write a time for people, in UTC."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M}"


def _written(run: Run) -> str:
    found, count = chosen(run), rows_written(run)
    night = run["action"] == NIGHT
    some = night and bool(run.get("rows")) and not has_new_refiner(run)
    rows = counted(count, "new or changed row" if some else "row")
    if found is None:
        gate = report_of(run).get("gate") or {}
        proof = ", without a measured gain" if gate.get("unmeasured") else ""
        return f"{rows} {'was' if count == 1 else 'were'} refined{proof}."
    if night and has_new_refiner(run):
        what = "A new refiner took over"
    else:
        what = "Search got better" if found["delta"] > 0 and not some else f"{rows} refined"
    return f"{what}: {measure_name(run)} {_moved(found)} on {queries_phrase(run)}."


def _refused(run: Run) -> str:
    found = chosen(run)
    if written_of(run).get("mode") == RESTORED:
        ann = report_of(run).get("ann_recall") or {}
        if "before" in ann and "after" in ann:
            return f"Written and restored: ann_recall@10 fell {_from_to(ann)}."
        return "Written and restored: the index is as it was."
    if found is None:
        return "Nothing was written: nothing proves that search would get better."
    if not found["delta"]:
        return (
            f"Nothing was written: no refiner did better than the vectors as they are, "
            f"{measure_name(run)} {number(found['before'])}."
        )
    return (
        f"Nothing was written: {measure_name(run)} would go {_from_to(found)} on "
        f"{queries_phrase(run)}, and the gate refused."
    )


def _unchanged(run: Run) -> str:
    total = rows_total(run)
    if total is None:
        return "Nothing to do: the index holds exactly this refinement already."
    return f"Nothing to do: all {counted(total, 'row')} hold exactly this refinement already."


def _quiet(run: Run) -> str:
    total = rows_total(run)
    if total is None:
        return "A quiet night: no row was new or changed, and nothing was written."
    return f"A quiet night: none of {counted(total, 'row')} was new or changed."


def _kept(run: Run) -> str:
    found = chosen(run)
    if found is None:
        return "The current refiner stays: the challenger did not pass."
    return (
        f"The current refiner stays: a challenger would take {measure_name(run)} "
        f"{_from_to(found)} on {queries_phrase(run)}, and the gate refused."
    )


def _restored(run: Run) -> str:
    count = rows_written(run)
    if not count:
        return "Rolled back: the index holds its original vectors again."
    have = "has its original vector" if count == 1 else "have their original vectors"
    return f"Rolled back: {counted(count, 'row')} {have} again."


def _moved(found: Mapping[str, Any]) -> str:
    if number(found["before"]) == number(found["after"]):
        return f"stayed at {number(found['after'])}"
    return f"{'rose' if found['delta'] > 0 else 'fell'} {_from_to(found)}"


def _from_to(found: Mapping[str, float]) -> str:
    return f"from {number(found['before'])} to {number(found['after'])}"


def _failed(_: Run) -> str:
    return "The run failed; the same command tries again."


def _stopped(_: Run) -> str:
    return "The run was stopped part-way; the same command resumes it."


_HEADLINES: dict[str, Callable[[Run], str]] = {
    WRITTEN: _written,
    "refused": _refused,
    "unchanged": _unchanged,
    "quiet": _quiet,
    "kept": _kept,
    RESTORED: _restored,
    "failed": _failed,
    "stopped": _stopped,
}
