"""Runs of an index as a page that explains itself, and as a few lines for a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from simskip_vdb import charts, summary, telling, timeline
from simskip_vdb.errors import ConfigError, MissingDependencyError
from simskip_vdb.report import signed
from simskip_vdb.telling import Run

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "report.html.jinja"


def render_page(runs: Sequence[Run], *, title: str | None = None) -> str:
    """Return a page about the latest run, with the history of all.

    It is one file that loads nothing: styles and charts are part of it, and there is no script.
    The same runs give the same page.

    Args:
        runs: Records of an index's runs, the oldest first.
        title: Of the page; the index and the headline if not given.

    Raises:
        ConfigError: There are no runs.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    if not runs:
        raise ConfigError("there are no runs to report")
    template = _environment().get_template(TEMPLATE)
    run = runs[-1]
    return (
        template.render(
            title=title or _title(run),
            run={"index": run["index"], "command": run.get("command")},
            **_sections(runs),
        )
        + "\n"
    )


def render_markdown(run: Run) -> str:
    """Return a short summary of a run for a chat or a pull request.

    Args:
        run: The record of a run.
    """
    report = telling.report_of(run)
    gate = report.get("gate") or {}
    findings = [*gate.get("reasons", ()), *(f"warning: {it}" for it in gate.get("warnings", ()))]
    table, undo = summary.measures(run), timeline.undo([run])
    blocks = [
        f"**{_plain(telling.headline(run))}**",
        f"{_code(run['index'])} · {telling.moment_of(run['time'])} UTC · "
        f"{telling.verdict(run).word}",
        _markdown_table(table) if table else "",
        _plain(" ".join(summary.gate_lines(run))),
        "\n".join(f"- {_plain(found)}" for found in (*summary.trouble(run), *findings)),
        _plain(undo[0]) if undo[1] is None else f"{undo[0]}\n\n{_fenced(undo[1])}",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _sections(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the template lays out."""
    run = runs[-1]
    report, detail = telling.report_of(run), run.get("detail")
    gained, lost = summary.moved(run)
    measure, moments = timeline.follow(runs)
    gains = _gains(run)
    return {
        "when": telling.moment_of(run["time"]),
        "verdict": telling.verdict(run),
        "headline": telling.headline(run),
        "figures": summary.figures(run),
        "gate": report.get("gate"),
        "gate_lines": summary.gate_lines(run),
        "changes": summary.changes(run),
        "measures": summary.measures(run),
        "strata": summary.strata(run),
        "too_few": summary.too_few(run),
        "gains": charts.draw_gains(gains) if any(gain.delta for gain in gains) else None,
        "on": telling.queries_phrase(run) if telling.chosen(run) else None,
        "overlap": report.get("group_overlap"),
        "curve": _curve(detail),
        "tally": summary.tally(detail) if detail else None,
        "moved": {"gained": gained, "lost": lost},
        "history_chart": charts.draw_history(moments, measure),
        "history": timeline.history(runs),
        "drift": summary.drift(run),
        "late_rows": summary.late_rows(run),
        "through": summary.through_index(run),
        "stages": summary.stages(run),
        "undo": timeline.undo(runs),
        "repeat": "Run it again:" if run["action"] != "rollback" else "This is what was run:",
        "trouble": summary.trouble(run),
        "notes": summary.notes(run),
        "foot": summary.foot(run),
        "signed": signed,
    }


def _gains(run: Run) -> list[charts.Gain]:
    """Return the changes by measure, then by stratum of the gate's."""
    report = telling.report_of(run)
    strata = report.get("strata") if summary.strata(run) else {}
    found = [*(report.get("measures") or {}).items()]
    found += [(name, item) for name, item in (strata or {}).items()]
    return [
        charts.Gain(
            name=name,
            delta=item["delta"],
            interval=None if item["ci95"] is None else (item["ci95"][0], item["ci95"][1]),
            chosen=name == report["measure"],
        )
        for name, item in found
    ]


def _curve(detail: Any) -> charts.Chart | None:  # noqa: ANN401 JSON
    if not detail or not detail["queries"]:
        return None
    deltas = [item["after"] - item["before"] for item in detail["queries"]]
    return charts.draw_queries(deltas, detail["measure"])


def _title(run: Run) -> str:
    return f"{run['index']}: {telling.verdict(run).word}"


def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2", "report") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader("simskip_vdb"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _markdown_table(table: summary.Table) -> str:
    lines = [table.header[:5], ("---", *["---:"] * 4), *(row[:5] for row in table.rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text if set(text) <= set("-:") else _plain(text)


def _plain(text: str) -> str:
    """Escape what Markdown or HTML would take for more than text."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Quote as code, with more backticks than there are inside."""
    text = " ".join(text.split())
    ticks = "`" * (1 + _longest(text))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + _longest(text))
    return f"{fence}console\n{text}\n{fence}"


def _longest(text: str) -> int:
    """Return the length of the longest row of backticks."""
    return max((len(list(run)) for tick, run in groupby(text) if tick == "`"), default=0)
