from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from simskip_vdb.gate import (
    Comparison,
    Decision,
    Evidence,
    LateRows,
    Look,
    Proof,
    decide,
    decide_ann,
)

FIRST = 0.0125


def a_look(number: int, level: float) -> Look:
    return Look(number=number, level=level, next_level=level / 4, proven=0, seed=0)


def comparison(**changes: Any) -> Comparison:  # noqa: ANN401 - any field
    good = Comparison(
        queries=100,
        before=0.30,
        after=0.35,
        delta=0.05,
        ci95=(0.02, 0.08),
        wins=60,
        ties=20,
        losses=20,
        level=FIRST,
        interval=(0.01, 0.09),
        p=0.001,
        p_harm=0.999,
    )
    return replace(good, **changes)


def evidence(**changes: Any) -> Evidence:  # noqa: ANN401 - any field
    good = Evidence(
        measure="nDCG@10",
        look=a_look(1, FIRST),
        chosen=comparison(),
        strata={"seen": comparison(queries=60)},
    )
    return replace(good, **changes)


def refused_for(decision: Decision, *words: str) -> None:
    assert not decision.passed
    assert len(decision.reasons) == 1, decision.reasons
    for word in words:
        assert word in decision.reasons[0]


def test_good_evidence_passes_without_reasons() -> None:
    assert decide(evidence()) == Decision(
        passed=True, look=1, proof=Proof.PROVEN, level=FIRST, next_level=FIRST / 4, proven_before=0
    )


@pytest.mark.parametrize(("changes", "proof", "next_step"), [
    ({"queries": 20, "p": 0.5}, Proof.TOO_FEW, "at least 10 more test queries; simskip power"),
    ({"p": 0.3, "delta": 0.01, "spread": 0.2}, Proof.UNPROVEN, "next level, 0.00313: judge 5,214"),
    ({"p": 0.02, "delta": 0.09, "spread": 0.2}, Proof.UNPROVEN, "another look"),
    ({"p": 0.7, "delta": -0.01, "spread": 0.2}, Proof.UNPROVEN, "no gain was seen"),
    ({"p": 1.0, "p_harm": 0.001, "delta": -0.1}, Proof.HARMFUL, "do not write it"),
])  # fmt: skip
def test_what_is_not_proven_is_told_apart_with_its_next_step(
    changes: dict[str, Any], proof: Proof, next_step: str
) -> None:
    decision = decide(evidence(chosen=comparison(**changes)))
    assert not decision.passed
    assert decision.proof is proof
    assert decision.next_step is not None
    assert next_step in decision.next_step
    assert decision.to_dict()["proof"] == proof.value


def test_fewer_than_thirty_queries_prove_nothing() -> None:
    refused_for(decide(evidence(chosen=comparison(queries=29))), "29 test queries", "30")
    assert decide(evidence(chosen=comparison(queries=30))).passed


@pytest.mark.parametrize("interval", [(0.0, 0.09), (-0.01, 0.09), None, (float("nan"), 0.09)])
def test_interval_must_lie_above_zero(interval: tuple[float, float] | None) -> None:
    refused_for(decide(evidence(chosen=comparison(interval=interval))), "nDCG@10", "not above 0")


def test_wide_interval_of_95_percent_is_not_what_counts() -> None:
    assert decide(evidence(chosen=comparison(ci95=(-0.5, 0.5)))).passed


@pytest.mark.parametrize("p", [FIRST + 1e-6, 0.02, 1.0, None, float("nan")])
def test_p_must_reach_the_level_of_the_look(p: float | None) -> None:
    refused_for(decide(evidence(chosen=comparison(p=p))), "could be chance", "0.0125")
    assert decide(evidence(chosen=comparison(p=FIRST))).passed


def test_later_looks_need_more() -> None:
    second = a_look(2, FIRST / 3)
    for p, passes in ((0.005, False), (0.004, True)):
        chosen = comparison(level=second.level, p=p)
        assert decide(evidence(look=second, chosen=chosen)).passed is passes


@pytest.mark.parametrize("level", [0.05, None])
def test_comparison_at_another_level_is_an_error(level: float | None) -> None:
    with pytest.raises(ValueError, match="look 1 needs"):
        decide(evidence(chosen=comparison(level=level)))


@pytest.mark.parametrize(("queries", "delta", "passes"), [
    (30, -0.0101, False),
    (30, -0.01, True),
    (29, -0.2, True),
    (500, -0.02, False),
])  # fmt: skip
def test_large_strata_may_not_fall(queries: int, delta: float, passes: bool) -> None:
    stratum = comparison(queries=queries, delta=delta, p_harm=0.06)
    decision = decide(evidence(strata={"unseen": stratum}))
    assert decision.passed is passes
    if not passes:
        refused_for(decision, "unseen", "falls by", "0.01")


@pytest.mark.parametrize(("queries", "p_harm", "passes"), [
    (5, 0.049, False),
    (5, 0.05, True),
    (300, 0.001, False),
])  # fmt: skip
def test_no_stratum_of_any_size_may_be_harmed(queries: int, p_harm: float, passes: bool) -> None:
    stratum = comparison(queries=queries, delta=-0.005, p_harm=p_harm)
    decision = decide(evidence(strata={"unseen": stratum}))
    assert decision.passed is passes
    if not passes:
        refused_for(decision, "unseen", "harmed", f"{p_harm:.3g}")


@pytest.mark.parametrize(("ratio", "fair"), [
    (0.75, True), (1.33, True), (0.749, False), (1.331, False), (None, False),
])  # fmt: skip
def test_unfair_late_rows_refuse_where_the_index_grows_and_warn_elsewhere(
    ratio: float | None, fair: bool
) -> None:
    late = LateRows(before=0.1, after=0.2, ratio=ratio)
    still, growing = (decide(evidence(late_rows=late, growing=grows)) for grows in (False, True))
    assert still.passed
    assert bool(still.warnings) is not fair
    assert growing.passed is fair
    if not fair:
        refused_for(growing, "20.0%", "10.0%")


def test_growing_index_without_measured_late_rows_is_refused() -> None:
    refused_for(decide(evidence(growing=True)), "late rows were not measured")
    assert decide(evidence(growing=False)).warnings == ()


def test_reshuffled_groups_warn() -> None:
    low = decide(evidence(group_overlap=0.59))
    assert low.passed
    assert "0.59" in low.warnings[0]
    assert decide(evidence(group_overlap=0.6)).warnings == ()


@pytest.mark.parametrize(("after", "passes"), [(0.95, True), (0.94, True), (0.939, False)])
def test_ann_recall_may_fall_by_a_hundredth(after: float, passes: bool) -> None:
    decision = decide_ann(0.95, after)
    assert decision.passed is passes
    if not passes:
        refused_for(decision, "0.950", "0.939", "nprobe")


def test_every_failed_condition_is_listed() -> None:
    worst = comparison(
        queries=10, after=0.2, delta=-0.1, interval=(-0.2, 0.0), p=0.99, p_harm=0.001
    )
    stratum = replace(worst, queries=40)
    late = LateRows(before=0.1, after=0.3, ratio=3.0)
    decision = decide(
        evidence(chosen=worst, strata={"seen": stratum}, late_rows=late, growing=True)
    )
    assert len(decision.reasons) == 5


def test_nothing_measured_is_refused_unless_accepted() -> None:
    refused = decide(None)
    refused_for(refused, "--accept-unmeasured")
    assert refused.unmeasured
    accepted = decide(None, accept_unmeasured=True)
    assert accepted.passed
    assert accepted.unmeasured
    assert "without proof" in accepted.warnings[0]


def test_accepting_unmeasured_never_overrides_a_measured_refusal() -> None:
    bad = evidence(chosen=comparison(p=0.5))
    assert decide(bad, accept_unmeasured=True) == decide(bad)
    assert not decide(bad, accept_unmeasured=True).passed
    assert not decide(evidence(), accept_unmeasured=True).unmeasured


def test_results_are_plain_json() -> None:
    parts = [
        comparison(interval=None, p=None).to_dict(),
        LateRows(before=0.0, after=0.1, ratio=None).to_dict(),
        decide(None).to_dict(),
    ]
    assert json.loads(json.dumps(parts, allow_nan=False))[1]["fair"] is False
    assert decide(evidence()).to_dict() == {
        "passed": True,
        "look": 1,
        "reasons": [],
        "warnings": [],
        "unmeasured": False,
        "proof": "proven",
        "level": FIRST,
        "next_level": FIRST / 4,
        "proven_before": 0,
        "next_step": None,
    }
