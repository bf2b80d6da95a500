"""What the record of a run says: its sections, as facts and tables for whatever shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simskip_vdb.gate import FAIR_LATE_ROWS, MIN_QUERIES, TOLERANCE
from simskip_vdb.report import (
    LATE_RULES,
    change,
    compared,
    interval,
    number,
    signed,
    watch_line,
)
from simskip_vdb.telling import (
    RESTORED,
    ROLLBACK,
    UNFINISHED,
    WRITTEN,
    Run,
    chosen,
    counted,
    duration,
    measure_name,
    queries_phrase,
    report_of,
    rows_total,
    rows_written,
    seconds_of,
    written_of,
)

Facts = list[tuple[str, str]]
"""Terms with what is to be said of each."""
SHOWN_ROWS = 10
"""Most neighbours shown of a query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number that stands out, and what it is."""

    value: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells below a header; the first column names, the others are numbers."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbor:
    """A row that a query found.

    Attributes:
        row: Its id.
        grade: Judged relevance; 0 where it is not relevant or was not judged.
        note: Where it stood on the other side, if elsewhere.
    """

    row: str
    grade: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A query that gained or lost, with its neighbours on both sides."""

    query: str
    before: str
    after: str
    delta: float
    rows_before: list[Neighbor]
    rows_after: list[Neighbor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many queries gained, stayed and lost."""

    gained: int
    unchanged: int
    lost: int


def figures(run: Run) -> list[Figure]:
    """Return the few numbers that stand out."""
    shown = []
    found, total, seconds = chosen(run), rows_total(run), sum(seconds_of(run).values())
    if found is not None:
        what = f"{measure_name(run)} on {queries_phrase(run)}"
        shown.append(Figure(value=change(found), label=what))
        bounds = interval(found["ci95"])
        label = f"change, 95 % {bounds}" if bounds else "change"
        shown.append(Figure(value=signed(found["delta"]), label=label))
    if total is not None:
        done = RESTORED if run["action"] == ROLLBACK else WRITTEN
        shown.append(Figure(value=f"{rows_written(run):,}", label=f"of {total:,} rows {done}"))
    if seconds:
        shown.append(Figure(value=duration(seconds), label="from start to end"))
    return shown


def changes(run: Run) -> Facts:
    """Say what became of the index and of its rows."""
    report, rows = report_of(run), run.get("rows") or {}
    refiner, total = report.get("refiner"), rows_total(run)
    facts = [*_writing(run)]
    facts += [
        (term, f"{rows[name]:,}")
        for term, name in (
            ("new rows", "new"),
            ("changed rows", "changed"),
            ("deleted rows", "deleted"),
        )
        if rows.get(name) is not None
    ]
    facts += _refit(run.get("refit"))
    if refiner is not None:
        parts = f"{refiner['id']} · α {refiner['alpha']:g} · β {refiner['beta']:g}"
        facts.append(("refiner", f"{parts} · late rows {LATE_RULES[refiner['late']]}"))
        facts.append(("side", _SIDES[report["side"]]))
    if report.get("queries"):
        counts = (f"{count:,} {split}" for split, count in report["queries"].items())
        facts.append(("queries", ", ".join(counts)))
    if total is not None:
        kind = " · {kind} · {dim} dimensions · {metric}".format(**report) if report else ""
        facts.append(("index", f"{total:,} rows{kind}"))
    return facts


_SIDES = {
    "docs": "rows only; queries are used as they are",
    "queries": "queries only: pass them through the refiner; rows stay as they are",
    "both": "rows and queries: pass queries through the refiner too",
}


def _writing(run: Run) -> Iterator[tuple[str, str]]:
    written = written_of(run)
    count, mode = rows_written(run), written.get("mode")
    if run["outcome"] in UNFINISHED and not count:
        return
    if mode == RESTORED:
        yield ("written", "all of them, and restored: the index is as it was")
        return
    if run["action"] == ROLLBACK:
        if count:
            yield ("restored", f"{count:,} rows")
        return
    yield ("written", f"{counted(count, 'row')}, read back and verified" if count else "nothing")
    if not count:
        return
    target = written.get("target")
    places = {
        "in-place": "in place",
        "new-vector": f"as the vector {target}; the others are as they were",
        "new-collection": f"into the new collection {target}, which the alias leads to",
        "copy": f"into the copy {written.get('path')}; the index is as it was",
    }
    if mode in places:
        yield ("where", places[mode])
    for name, term in (("theirs", "left alone"), ("gone", "gone")):
        if written.get(name):
            why = "changed" if name == "theirs" else "removed"
            yield (term, f"{counted(written[name], 'row')} that the application {why} meanwhile")


def _refit(refit: Mapping[str, Any] | None) -> Facts:
    if refit is None:
        return []
    results = {
        "champion": "the challenger won and was written",
        "kept": "the challenger did not pass; the current refiner stays",
        None: "no challenger was measured" if refit["due"] else "not due",
    }
    facts = [("refit", results[refit.get("result")])]
    if refit["reasons"]:
        facts.append(("why a refit", "; ".join(refit["reasons"])))
    return facts


def measures(run: Run) -> Table | None:
    """Return before and after by measure, the chosen one first."""
    found = report_of(run).get("measures")
    if not found:
        return None
    return _comparisons("measure", found)


def strata(run: Run) -> Table | None:
    """Return the chosen measure over seen and unseen queries; None where there is only one kind."""
    found = {name: it for name, it in (report_of(run).get("strata") or {}).items() if it}
    if len(found) < 2:
        return None
    return _comparisons(
        measure_name(run), {f"{name} ({it['queries']:,})": it for name, it in found.items()}
    )


def too_few(run: Run) -> list[str]:
    """Say which strata have too few queries to be judged by their mean."""
    return [
        f"{name}: {found['queries']} queries, too few to judge"
        for name, found in (report_of(run).get("strata") or {}).items()
        if found and found["queries"] < MIN_QUERIES
    ]


def _comparisons(first: str, found: Mapping[str, Any]) -> Table:
    return Table(
        header=(first, "before", "after", "change", "95 % interval", "wins", "ties", "losses"),
        rows=[tuple(cell or "–" for cell in compared(name, it)) for name, it in found.items()],
    )


def tally(detail: Mapping[str, Any]) -> Tally:
    """Count the queries that gained and lost."""
    deltas = [item["after"] - item["before"] for item in detail["queries"]]
    gained = sum(delta > TOLERANCE for delta in deltas)
    lost = sum(delta < -TOLERANCE for delta in deltas)
    return Tally(gained=gained, unchanged=len(deltas) - gained - lost, lost=lost)


def moved(run: Run) -> tuple[list[Moved], list[Moved]]:
    """Return the queries that gained most and lost most, each the furthest first."""
    detail = run.get("detail")
    items = report_of(run).get("regressions") or () if detail is None else detail["moved"]
    found = sorted((_moved(item) for item in items), key=lambda item: -abs(item.delta))
    return [it for it in found if it.delta > 0], [it for it in found if it.delta < 0]


def _moved(item: Mapping[str, Any]) -> Moved:
    before, after = ((item.get(f"rows_{when}") or ())[:SHOWN_ROWS] for when in ("before", "after"))
    return Moved(
        query=str(item["query"]),
        before=number(item["before"]),
        after=number(item["after"]),
        delta=item["after"] - item["before"],
        rows_before=_neighbors(before, after, "gone"),
        rows_after=_neighbors(after, before, "new"),
    )


def _neighbors(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], absent: str
) -> list[Neighbor]:
    """Describe rows, each with its rank on the other side where that differs."""
    ranks = {item["row"]: rank for rank, item in enumerate(others, 1)}
    shown = []
    for rank, item in enumerate(rows, 1):
        other = ranks.get(item["row"])
        word = "was" if absent == "new" else "now"
        note = absent if other is None else "" if other == rank else f"{word} {other}"
        shown.append(Neighbor(row=str(item["row"]), grade=int(item["grade"]), note=note))
    return shown


def gate_lines(run: Run) -> list[str]:
    """Say what the gate looked at; its reasons and warnings come apart."""
    gate, found = report_of(run).get("gate"), chosen(run)
    if gate is None:
        return []
    if gate["unmeasured"]:
        on_request = ": it was written on request" if gate["passed"] else ""
        return [f"Nothing was measured{on_request}."]
    lines = [f"The gate {'passed' if gate['passed'] else 'refused'}."]
    if gate["look"] is not None and found is not None and found.get("p") is not None:
        lines.append(
            f"Look {gate['look']}: the gain has p = {found['p']:.3g}, "
            f"and {found['level']:.3g} or less is needed."
        )
    if gate.get("next_level") is not None:
        lines.append(f"Another look at these queries would need {gate['next_level']:.3g} or less.")
    if gate.get("next_step"):
        lines.append(f"{gate['proof'].capitalize()}: {gate['next_step']}.")
    return lines


def late_rows(run: Run) -> Facts:
    """Say how rows that arrive after a fit fare; empty where it was not measured."""
    late = report_of(run).get("late_rows")
    if late is None:
        return []
    low, high = FAIR_LATE_ROWS
    times = "more than any" if late["ratio"] is None else f"{late['ratio']:.2f} times"
    return [
        ("they are", LATE_RULES[late["rule"]]),
        ("share of the top 10", f"{late['before']:.1%} → {late['after']:.1%}"),
        (
            "after over before",
            f"{times}, {'fair' if late['fair'] else 'not fair'} ({low:g} to {high:g} is fair)",
        ),
    ]


def drift(run: Run) -> Table | None:
    """Return what was found of drift in rows and in queries; None where nobody looked."""
    found = run.get("drift") or {}
    rows = [
        (
            name,
            "drifted" if item["alarm"] else "steady",
            f"{item['statistic']:.3g}",
            f"{item['p']:.3g}",
            f"{item['level']:.3g}",
            f"{item['reference']:,}",
            f"{item['recent']:,}",
        )
        for name, item in found.items()
        if item is not None
    ]
    header = ("of", "verdict", "statistic", "p", "alarm below", "reference", "recent")
    return Table(header=header, rows=rows) if rows else None


def through_index(run: Run) -> Table | None:
    """Return what the application's own index finds; None where it was not searched."""
    report = report_of(run)
    found = dict(report.get("through_index") or {})
    if report.get("ann_recall"):
        found["ann_recall@10"] = report["ann_recall"]
    rows = []
    for name, it in found.items():
        before, after = (number(it[when]) if when in it else "–" for when in ("before", "after"))
        both = "before" in it and "after" in it
        rows.append((name, before, after, signed(it["after"] - it["before"]) if both else "–"))
    return Table(header=("measure", "before", "after", "change"), rows=rows) if rows else None


def stages(run: Run) -> list[tuple[str, str, float]]:
    """Return each stage with its time and its share of all, 0 to 1."""
    seconds = seconds_of(run)
    total = sum(seconds.values()) or 1
    return [(stage, duration(took), took / total) for stage, took in seconds.items()]


def trouble(run: Run) -> list[str]:
    """Say why a run did not get to its end; empty where it did."""
    return list(run.get("notes") or ()) if run["outcome"] in UNFINISHED else []


def notes(run: Run) -> list[str]:
    """Return what else a person should know of a run that got to its end."""
    own = () if run["outcome"] in UNFINISHED else run.get("notes") or ()
    watched = [] if run.get("live") is None else [watch_line(run["live"])]
    return [*own, *watched, *(report_of(run).get("notes") or ())]


def foot(run: Run) -> Facts:
    """Say where it ran, by what, and how to repeat it."""
    facts: Facts = []
    if run.get("machine"):
        facts.append(("machine", run["machine"]))
    if run.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {v}" for name, v in run["versions"].items())))
    if run.get("seed") is not None:
        facts.append(("seed", str(run["seed"])))
    path = (report_of(run).get("refiner") or {}).get("path")
    if path:
        facts.append(("refiner", path))
    return facts
