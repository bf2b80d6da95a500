from __future__ import annotations

import pytest
from run_records import (
    comparison,
    detail,
    found_drift,
    gate,
    record,
    refit,
    refused,
    report,
    rows,
    written,
)

from simskip_vdb import summary


def test_figures_stand_out() -> None:
    shown = summary.figures(record("refine", "written", report=report()))
    assert [(figure.value, figure.label) for figure in shown] == [
        (".3164 → .4121", "nDCG@10 on 323 held-out queries"),
        ("+.0957", "change, 95 % +.0757 to +.1157"),
        ("3,633", "of 3,633 rows written"),
        ("3 min", "from start to end"),
    ]


def test_measures_equal_those_of_the_report() -> None:
    table = summary.measures(record("refine", "written", report=report()))
    assert table is not None
    assert table.rows == [
        ("nDCG@10", ".3164", ".4121", "+.0957", "+.0757 to +.1157", "158", "93", "72"),
        ("R@10", ".1550", ".2058", "+.0508", "+.0308 to +.0708", "158", "93", "72"),
    ]


def test_a_missing_interval_is_a_dash() -> None:
    found = report(measures={"nDCG@10": comparison(0.1, 0.2, 1, ci95=None)})
    table = summary.measures(record("refine", "written", report=found))
    assert table is not None
    assert table.rows[0][4] == "–"


def test_strata_are_shown_where_there_are_two() -> None:
    run = record("refine", "written", report=report())
    table = summary.strata(run)
    assert table is not None
    assert [row[0] for row in table.rows] == ["seen (299)", "unseen (24)"]
    assert summary.too_few(run) == ["unseen: 24 queries, too few to judge"]
    alone = report(strata={"seen": comparison(0.1, 0.2), "unseen": None})
    assert summary.strata(record("refine", "written", report=alone)) is None


def test_what_changed_on_a_night_with_a_refit() -> None:
    run = record(
        "night",
        "written",
        report=report(written=written(3700, theirs=12, gone=1)),
        rows=rows(3701, 64, 3700),
        refit=refit("champion", "queries drifted", "400 new judgments"),
    )
    facts = dict(summary.changes(run))
    assert facts["written"] == "3,700 rows, read back and verified"
    assert facts["where"] == "in place"
    assert facts["left alone"] == "12 rows that the application changed meanwhile"
    assert facts["gone"] == "1 row that the application removed meanwhile"
    assert (facts["new rows"], facts["changed rows"], facts["deleted rows"]) == ("64", "0", "0")
    assert facts["refit"] == "the challenger won and was written"
    assert facts["why a refit"] == "queries drifted; 400 new judgments"
    assert facts["refiner"] == "e8de65322a96 · α 0.75 · β 0.75 · late rows left raw"
    assert facts["index"] == "3,701 rows · IVF32 Flat, custom ids · 384 dimensions · dot"


@pytest.mark.parametrize(
    ("part", "where"),
    [
        (written(mode="copy", path="better.faiss"), "into the copy better.faiss"),
        (written(mode="new-vector", target="text@simskip"), "as the vector text@simskip"),
        (written(mode="new-collection", target="p-2"), "into the new collection p-2"),
    ],
)
def test_where_it_was_written(part: dict[str, object], where: str) -> None:
    facts = dict(summary.changes(record("refine", "written", report=report(written=part))))
    assert facts["where"].startswith(where)


def test_what_changed_where_little_is_known() -> None:
    assert summary.changes(record("refine", "refused", report=refused()))[0] == (
        "written",
        "nothing",
    )
    assert summary.changes(record("night", "failed")) == []
    assert summary.changes(record("rollback", "restored", rows=rows(9, 0, 9)))[0] == (
        "restored",
        "9 rows",
    )


def test_refits_that_brought_nothing() -> None:
    for part, said in (
        (refit("kept", "age"), "the challenger did not pass; the current refiner stays"),
        (refit(None, "age"), "no challenger was measured"),
        (refit(None), "not due"),
    ):
        assert dict(summary.changes(record("night", "kept", refit=part)))["refit"] == said


def test_queries_are_counted_by_how_they_moved() -> None:
    scores = [(0.1, 0.2), (0.5, 0.5), (0.5, 0.5 + 1e-12), (0.5, 0.4), (0.3, 0.9)]
    queries = [{"query": str(i), "before": b, "after": a} for i, (b, a) in enumerate(scores)]
    tally = summary.tally({"queries": queries})
    assert (tally.gained, tally.unchanged, tally.lost) == (2, 2, 1)


def test_moved_queries_come_with_their_neighbours() -> None:
    moved = [
        {
            "query": "lost",
            "before": 0.5,
            "after": 0.2,
            "rows_before": [],
            "rows_after": [],
        },
        {
            "query": "won",
            "before": 0.0,
            "after": 0.9,
            "rows_before": [{"row": "a", "grade": 0}, {"row": "b", "grade": 0}],
            "rows_after": [{"row": "c", "grade": 2}, {"row": "b", "grade": 0}, {"row": "a"}],
        },
    ]
    moved[1]["rows_after"][2]["grade"] = 1  # type: ignore[index]
    gained, lost = summary.moved(
        record("refine", "written", detail={"measure": "P@1", "queries": [], "moved": moved})
    )
    (won,) = gained
    assert (won.query, won.before, won.after) == ("won", ".0000", ".9000")
    assert [(item.row, item.grade, item.note) for item in won.rows_after] == [
        ("c", 2, "new"),
        ("b", 0, ""),
        ("a", 1, "was 1"),
    ]
    assert [item.note for item in won.rows_before] == ["now 3", ""]
    assert [item.query for item in lost] == ["lost"]


def test_the_furthest_moved_come_first() -> None:
    gained, lost = summary.moved(record("refine", "written", detail=detail()))
    for found in (gained, lost):
        sizes = [abs(item.delta) for item in found]
        assert len(sizes) == 5
        assert sizes == sorted(sizes, reverse=True)


def test_without_details_the_reports_regressions_are_shown() -> None:
    gained, lost = summary.moved(record("refine", "written", report=report()))
    assert gained == []
    assert [(item.query, item.after) for item in lost] == [("q9", ".3500")]


def test_the_gate_says_what_it_looked_at() -> None:
    assert summary.gate_lines(record("refine", "written", report=report(gate=gate(look=2)))) == [
        "The gate passed.",
        "Look 2: the gain has p = 0.0001, and 0.0125 or less is needed.",
    ]
    refused = gate(passed=False, proof="not proven", next_level=0.002, next_step="judge 40 more")
    assert summary.gate_lines(record("refine", "refused", report=report(gate=refused)))[2:] == [
        "Another look at these queries would need 0.002 or less.",
        "Not proven: judge 40 more.",
    ]
    assert summary.gate_lines(record("night", "quiet")) == []
    unmeasured = report(gate=gate(unmeasured=True, look=None), measures={})
    assert summary.gate_lines(record("refine", "written", report=unmeasured)) == [
        "Nothing was measured: it was written on request."
    ]


def test_late_rows_and_drift_and_the_index() -> None:
    run = record("night", "written", report=report(), drift=found_drift(alarm=True))
    assert summary.late_rows(run) == [
        ("they are", "left raw"),
        ("share of the top 10", "9.8% → 10.1%"),
        ("after over before", "1.03 times, fair (0.75 to 1.33 is fair)"),
    ]
    drift, through = summary.drift(run), summary.through_index(run)
    assert drift is not None
    assert drift.rows == [("queries", "drifted", "0.19", "0.0004", "0.001", "2,582", "400")]
    assert through is not None
    assert through.rows == [
        ("nDCG@10", ".3066", ".3990", "+.0924"),
        ("ann_recall@10", ".9474", ".9508", "+.0034"),
    ]


def test_half_measured_indexes_have_dashes() -> None:
    found = report(through_index={}, ann_recall={"before": 0.9})
    table = summary.through_index(record("refine", "refused", report=found))
    assert table is not None
    assert table.rows == [("ann_recall@10", ".9000", "–", "–")]


def test_late_rows_that_had_no_share_before() -> None:
    late = {"before": 0.0, "after": 0.1, "ratio": None, "fair": False, "rule": "f"}
    facts = dict(summary.late_rows(record("refine", "written", report=report(late_rows=late))))
    assert facts["after over before"].startswith("more than any, not fair")


def test_notes_of_a_run_and_of_its_report() -> None:
    done = record("night", "written", report=report(notes=["of the report"]), notes=["of the run"])
    assert summary.notes(done) == ["of the run", "of the report"]
    live = {"refiner": "ab", "queries": 120, "gain": -0.04, "p": 0.03, "harmful": True}
    assert summary.notes({**done, "live": live})[1] == (
        "since then 120 fresh queries gained -0.0400 each over the originals: "
        "proven harmful (p 0.03)"
    )
    assert summary.trouble(done) == []
    stopped = record("night", "stopped", notes=["a signal"])
    assert (summary.notes(stopped), summary.trouble(stopped)) == ([], ["a signal"])


def test_stages_share_the_time() -> None:
    run = record("night", "written", seconds={"read": 1.0, "write": 3.0})
    assert summary.stages(run) == [("read", "1.0 s", 0.25), ("write", "3.0 s", 0.75)]
