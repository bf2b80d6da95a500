from __future__ import annotations

import pytest
from run_records import INDEX, nights, record, refit, refused, report, rows, written

from simskip_vdb import timeline

UNDO = f"simskip rollback {INDEX}"


def test_the_index_is_followed_over_its_runs() -> None:
    lost = refused(0.43)
    lost["measures"]["nDCG@10"]["before"] = 0.42
    runs = [
        record("refine", "written", 0, report=report(0.3, 0.42)),
        record("night", "written", 1, rows=rows(3700, 67, 67)),
        record("night", "kept", 2, report=lost, refit=refit("kept", "age")),
        record("night", "written", 3, report=report(0.42, 0.45), refit=refit("champion", "age")),
        record("rollback", "restored", 4),
        record("night", "failed", 5),
    ]
    measure, moments = timeline.follow(runs)
    assert measure == "nDCG@10"
    assert [m.value for m in moments] == [0.42, 0.42, 0.42, 0.45, 0.3, 0.3]
    assert [m.measured for m in moments] == [True, False, True, True, False, False]
    assert [m.champion for m in moments] == [True, False, False, True, False, False]
    assert [m.tried for m in moments] == [None, None, 0.43, None, None, None]
    assert [m.rows for m in moments] == [3633, 3700, 3633, 3633, 3633, 3633]
    assert [m.restored for m in moments] == [False] * 4 + [True, False]


def test_other_measures_and_validation_queries_are_no_part_of_the_line() -> None:
    other = report()
    other["measure"], other["measures"] = "RR@10", {"RR@10": other["measures"]["R@10"]}
    runs = [
        record("refine", "written", 0, report=other),
        record("refine", "refused", 1, report=refused(split="validation")),
        record("refine", "written", 2, report=report(0.31, 0.4)),
    ]
    measure, moments = timeline.follow(runs)
    assert measure == "nDCG@10"
    assert [m.value for m in moments] == [None, None, 0.4]


def test_the_history_starts_with_the_latest_run() -> None:
    table = timeline.history(nights(8))
    assert len(table.rows) == 8
    assert table.header[3] == "nDCG@10"
    assert table.rows[0] == (
        "2025-12-02 00:00",
        "night",
        "written, new refiner",
        ".4221",
        "–",
        "3,983",
        "3,983",
        "e8de65322a96",
    )
    assert table.rows[-1][2:4] == ("written, new refiner", ".4121")
    assert table.rows[2][2:5] == ("refiner kept", ".4121", ".4141")


@pytest.mark.parametrize(
    ("runs", "command"),
    [
        ([record("refine", "written", report=report())], UNDO),
        ([record("refine", "refused", report=refused())], None),
        ([*nights(5), record("night", "quiet", 9)], UNDO),
        ([*nights(5), record("night", "kept", 9, rows=rows(9, 1, 1))], UNDO),
        ([*nights(5), record("rollback", "restored", 9)], None),
        ([*nights(5), record("rollback", "restored", 8), record("night", "quiet", 9)], None),
        ([record("night", "stopped")], UNDO),
        ([record("refine", "unchanged")], UNDO),
        (
            [record("refine", "written", report=report(written=written(mode="copy", path="b")))],
            None,
        ),
    ],
)
def test_how_to_undo(runs: list[dict[str, object]], command: str | None) -> None:
    said, found = timeline.undo(runs)
    assert found == command
    assert said.endswith(":") == (command is not None)
