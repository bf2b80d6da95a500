from __future__ import annotations

from typing import Any

import pytest
from run_records import comparison, gate, record, refit, refused, report, rows, written

from simskip_vdb import telling

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "first": (
        record("refine", "written", report=report()),
        "Search got better: nDCG@10 rose from .3164 to .4121 on 323 held-out queries.",
    ),
    "groups": (
        record("refine", "written", report=report(group_overlap=0.4)),
        "Search got better: same-group nDCG@10 rose from .3164 to .4121 on 323 held-out queries.",
    ),
    "unmeasured": (
        record(
            "refine",
            "written",
            report=report(measures={}, strata={}, gate=gate(look=None, unmeasured=True)),
        ),
        "3,633 rows were refined, without a measured gain.",
    ),
    "refused": (
        record("refine", "refused", report=refused()),
        "Nothing was written: nDCG@10 would go from .3164 to .3189 on 323 held-out queries, "
        "and the gate refused.",
    ),
    "no gain": (
        record("refine", "refused", report=refused(0.3164, split="validation")),
        "Nothing was written: no refiner did better than the vectors as they are, nDCG@10 .3164.",
    ),
    "refused unmeasured": (
        record("refine", "refused", report=refused(measures={})),
        "Nothing was written: nothing proves that search would get better.",
    ),
    "restored by itself": (
        record(
            "refine",
            "refused",
            report=report(
                written=written(mode="restored"), ann_recall={"before": 0.98, "after": 0.91}
            ),
        ),
        "Written and restored: ann_recall@10 fell from .9800 to .9100.",
    ),
    "unchanged": (
        record("refine", "unchanged", report=report(measures={}, written=written(0, "none"))),
        "Nothing to do: all 3,633 rows hold exactly this refinement already.",
    ),
    "quiet": (
        record("night", "quiet", rows=rows(1_000_000)),
        "A quiet night: none of 1,000,000 rows was new or changed.",
    ),
    "incremental": (
        record("night", "written", rows=rows(4000, 12, 12), refit=refit(None)),
        "12 new or changed rows were refined.",
    ),
    "one row": (
        record("night", "written", rows=rows(4000, 1, 1)),
        "1 new or changed row was refined.",
    ),
    "incremental and measured": (
        record("night", "written", rows=rows(4000, 12, 12), report=report(written=None)),
        "12 new or changed rows refined: nDCG@10 rose from .3164 to .4121 on 323 held-out queries.",
    ),
    "champion": (
        record(
            "night", "written", rows=rows(4000), report=report(), refit=refit("champion", "age")
        ),
        "A new refiner took over: nDCG@10 rose from .3164 to .4121 on 323 held-out queries.",
    ),
    "kept": (
        record("night", "kept", rows=rows(4000), report=refused(), refit=refit("kept", "age")),
        "The current refiner stays: a challenger would take nDCG@10 from .3164 to .3189 on 323 "
        "held-out queries, and the gate refused.",
    ),
    "rollback": (
        record("rollback", "restored", rows=rows(4000, 0, 3990)),
        "Rolled back: 3,990 rows have their original vectors again.",
    ),
    "bare rollback": (
        record("rollback", "restored"),
        "Rolled back: the index holds its original vectors again.",
    ),
    "failed": (record("night", "failed"), "The run failed; the same command tries again."),
    "stopped": (
        record("night", "stopped"),
        "The run was stopped part-way; the same command resumes it.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_headline_says_what_happened(name: str) -> None:
    run, sentence = CASES[name]
    assert telling.headline(run) == sentence


def test_one_validation_query_is_called_that() -> None:
    found = report(split="validation", measures={"nDCG@10": comparison(0.1, 0.2, 1)})
    assert telling.queries_phrase(record("refine", "refused", report=found)) == (
        "1 validation query"
    )


@pytest.mark.parametrize(
    ("outcome", "word", "tone"),
    [
        ("written", "written", telling.Tone.GOOD),
        ("refused", "refused", telling.Tone.WARN),
        ("kept", "refiner kept", telling.Tone.CALM),
        ("failed", "failed", telling.Tone.BAD),
    ],
)
def test_the_verdict(outcome: str, word: str, tone: telling.Tone) -> None:
    assert telling.verdict(record("night", outcome)) == telling.Verdict(word=word, tone=tone)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.034, "34 ms"),
        (0.9, "0.9 s"),
        (14.2, "14 s"),
        (184, "3 min"),
        (5990, "1 h 40 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert telling.duration(seconds) == said
