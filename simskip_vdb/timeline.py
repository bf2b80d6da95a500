"""What the records of all runs say of an index: its history, what it holds, how to undo it."""

from __future__ import annotations

from collections.abc import Sequence

from simskip_vdb.charts import Moment
from simskip_vdb.report import IN_THE_INDEX, number, undo_command
from simskip_vdb.summary import Table
from simskip_vdb.telling import (
    RESTORED,
    ROLLBACK,
    UNFINISHED,
    VALIDATION,
    WRITTEN,
    Run,
    chosen,
    has_new_refiner,
    moment_of,
    report_of,
    rows_total,
    rows_written,
    verdict,
    written_of,
)


def follow(runs: Sequence[Run]) -> tuple[str | None, list[Moment]]:
    """Follow an index over its runs: what it held by the latest measure, and how many rows.

    What a run did not measure is carried on from the one before; a rollback goes back to what the
    originals measured.

    Returns:
        The measure, None where no run measured anything; and a moment for each run.
    """
    measured = [run for run in runs if chosen(run) is not None]
    measure = report_of(measured[-1])["measure"] if measured else None
    value: float | None = None
    raw: float | None = None
    rows: int | None = None
    moments = []
    for run in runs:
        report, found = report_of(run), chosen(run)
        if report.get("measure") != measure or report.get("split") == VALIDATION:
            found = None
        total = rows_total(run)
        rows = rows if total is None else total
        wrote, restored = run["outcome"] == WRITTEN, run["outcome"] == RESTORED
        if found is not None:
            raw = found["before"] if raw is None else raw
            value = found["after"] if wrote else found["before"]
        elif restored:
            value = raw
        moments.append(
            Moment(
                time=run["time"],
                value=value,
                measured=found is not None,
                champion=has_new_refiner(run),
                tried=None if wrote or found is None else found["after"],
                restored=restored,
                rows=rows,
            )
        )
    return measure, moments


def history(runs: Sequence[Run]) -> Table:
    """Return all runs, the latest first."""
    measure, moments = follow(runs)
    rows = []
    for run, moment in zip(runs, moments, strict=True):
        refiner = report_of(run).get("refiner") or {}
        found = moment.measured and moment.value is not None
        rows.append(
            (
                moment_of(run["time"]),
                run["action"],
                verdict(run).word + (", new refiner" if moment.champion else ""),
                number(moment.value) if found and moment.value is not None else "–",
                "–" if moment.tried is None else number(moment.tried),
                "–" if moment.rows is None else f"{moment.rows:,}",
                f"{rows_written(run):,}",
                refiner.get("id", "–"),
            )
        )
    header = (
        "when (UTC)", "run", "outcome", measure or "measure", "tried", "rows", "written", "refiner"
    )  # fmt: skip
    return Table(header=header, rows=rows[::-1])


def undo(runs: Sequence[Run]) -> tuple[str, str | None]:
    """Say how to undo the latest run, and return the command if there is one."""
    run = runs[-1]
    written = written_of(run)
    command = undo_command(run["index"])
    outcome = run["outcome"]
    if run["action"] == ROLLBACK and outcome == RESTORED:
        return "This run was the undo: the index holds its original vectors.", None
    if outcome == WRITTEN and written.get("mode") == "copy":
        return f"The index itself was not changed; to undo, delete {written['path']}.", None
    if outcome == WRITTEN or (outcome == "kept" and rows_written(run)):
        return "This command restores the vectors from before:", command
    if outcome in UNFINISHED:
        return (
            "The same command finishes what was begun; this one restores the vectors from before:",
            command,
        )
    if holds_refined(runs):
        return (
            "This run changed nothing. The index holds an earlier refinement; this restores the "
            "original vectors:",
            command,
        )
    return "Nothing was written, so there is nothing to undo.", None


def holds_refined(runs: Sequence[Run]) -> bool:
    """Tell whether an index holds refined vectors after the latest of its runs."""
    refined = False
    for run in runs:
        if run["outcome"] in ("kept", "unchanged"):
            refined = True
        elif run["outcome"] == WRITTEN:
            refined |= written_of(run).get("mode", IN_THE_INDEX[0]) in IN_THE_INDEX
        elif run["action"] == ROLLBACK and run["outcome"] == RESTORED:
            refined = False
    return refined
