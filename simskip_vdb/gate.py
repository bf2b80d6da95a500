"""Decide from measured evidence whether refined vectors may be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from simskip_vdb.sample_size import POWER, queries_needed

SMALL = 100
"""Fewest test queries of a first look that is taken at its word."""
MIN_QUERIES = 30
"""Fewest test queries that can prove a gain, and fewest of a stratum whose mean is judged."""
STRATUM_FALL = 0.01
"""Most that a stratum of `MIN_QUERIES` or more may fall."""
HARM_LEVEL = 0.05
"""One-sided p below which a stratum of any size counts as harmed."""
FAIR_LATE_ROWS = (0.75, 1.33)
"""Share of late rows in the top 10, after over before, that is fair."""
ANN_FALL = 0.01
"""Most that ann_recall@10 may fall."""
MIN_OVERLAP = 0.6
"""Top-10 overlap inside groups below which the order was reshuffled."""
TOLERANCE = 1e-9
"""Differences of means below this are rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at test queries.

    Attributes:
        number: Which look of this index it is, from 1.
        level: One-sided level at which it may prove a gain.
        next_level: Level of one more look at the same queries.
        proven: Gains whose wealth it spends from: those proven before any of its queries was
            first looked at.
        seed: Seed of its statistics; the same look has the same.
    """

    number: int
    level: float
    next_level: float
    proven: int
    seed: int

    def assumed_loss(self, queries: int) -> float:
        """Return what a look at so many queries assumes that one more loses (`prove`)."""
        if self.number > 1:
            return 1.0
        return 0.25 if queries < SMALL else 0.0


class Proof(str, Enum):
    """What test queries say of a gain."""

    PROVEN = "proven"
    UNPROVEN = "not proven"
    HARMFUL = "proven harmful"
    TOO_FEW = "too few queries"
    UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One measure before and after refining, on the same queries.

    Attributes:
        queries: How many queries were compared.
        before: Mean before.
        after: Mean after.
        delta: Mean of the paired differences, after minus before.
        spread: Their standard deviation; None with fewer than two queries.
        ci95: Paired bootstrap 95 % interval of `delta`; None with fewer than two queries.
        wins: Queries that gained.
        ties: Queries that stayed equal.
        losses: Queries that lost.
        level: One-sided level of the look; None where the measure is only described.
        interval: Interval of `delta` with `level` in each tail; only where `p` reaches `level`.
        p: One-sided p of a gain, by sign flips; None where `level` is.
        p_harm: One-sided p of a loss; None where `level` is.
    """

    queries: int
    before: float
    after: float
    delta: float
    ci95: tuple[float, float] | None
    wins: int
    ties: int
    losses: int
    spread: float | None = None
    level: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_harm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LateRows:
    """Late rows' share of the queries' top 10.

    Attributes:
        before: Share before refining, 0 to 1.
        after: Share after refining, 0 to 1.
        ratio: `after` over `before`; 1 where both are 0, None where only `before` is.
    """

    before: float
    after: float
    ratio: float | None

    @property
    def fair(self) -> bool:
        """Whether late rows are found about as often as before."""
        low, high = FAIR_LATE_ROWS
        return self.ratio is not None and low <= self.ratio <= high

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict as plain JSON values."""
        return {**asdict(self), "fair": self.fair}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured on the test split.

    Attributes:
        measure: Name of the chosen measure, such as ``nDCG@10``.
        look: The look that it took.
        chosen: The chosen measure over all test queries, compared at the look's level.
        strata: The chosen measure over ``seen`` and ``unseen`` queries.
        growing: Whether rows will be added between runs.
        late_rows: Shares of late rows; None where they were not measured.
        group_overlap: Mean top-10 overlap inside groups, 0 to 1; None without groups.
    """

    measure: str
    look: Look
    chosen: Comparison
    strata: Mapping[str, Comparison] = field(default_factory=dict)
    growing: bool = False
    late_rows: LateRows | None = None
    group_overlap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to write, and why not.

    Attributes:
        passed: Whether refined vectors may be written.
        look: Which look of this index it was, from 1; None where none was taken.
        reasons: Every failed condition, in words.
        warnings: What a person should know although it forbids nothing.
        unmeasured: True where writing was allowed without evidence, on request.
        proof: What test queries say of the gain; None where they were not asked.
        level: One-sided level of the look; None where none was taken.
        next_level: Level of one more look at the same queries; None where none was taken.
        proven_before: Proven gains that the level was earned by; None where no look was taken.
        next_step: What to do where the gain is not proven; None where it is.
    """

    passed: bool
    look: int | None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unmeasured: bool = False
    proof: Proof | None = None
    level: float | None = None
    next_level: float | None = None
    proven_before: int | None = None
    next_step: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            **asdict(self),
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "proof": None if self.proof is None else self.proof.value,
        }


def decide(evidence: Evidence | None, *, accept_unmeasured: bool = False) -> Decision:
    """Decide whether refined vectors may be written.

    Args:
        evidence: What was measured; None where nothing was.
        accept_unmeasured: Allow writing where nothing was measured. What was measured and refused
            stays refused.

    Raises:
        ValueError: The chosen measure was not compared at the level of this look.
    """
    if evidence is None:
        return _without_evidence(accept_unmeasured)
    reasons = [
        *_gain_reasons(evidence),
        *(
            reason
            for name, stratum in evidence.strata.items()
            for reason in _stratum_reasons(evidence.measure, name, stratum)
        ),
    ]
    warnings = _overlap_warnings(evidence)
    late = _late_row_findings(evidence)
    (reasons if evidence.growing else warnings).extend(late)
    proof = _proof(evidence)
    return Decision(
        passed=not reasons,
        look=evidence.look.number,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
        proof=proof,
        level=evidence.look.level,
        next_level=evidence.look.next_level,
        proven_before=evidence.look.proven,
        next_step=_next_step(evidence, proof),
    )


def decide_ann(before: float, after: float) -> Decision:
    """Decide whether the user's own index still finds what exact search finds.

    Args:
        before: ann_recall@10 of the index as it was, 0 to 1.
        after: ann_recall@10 of the candidate, 0 to 1.
    """
    if before - after <= ANN_FALL + TOLERANCE:
        return Decision(passed=True, look=None)
    reason = (
        f"ann_recall@10 falls from {before:.3f} to {after:.3f}, by more than {ANN_FALL:g}: the "
        "index finds fewer of the exact neighbours; search more of it (a larger nprobe or ef, "
        "given as --search-params) or rebuild it with finer parameters"
    )
    return Decision(passed=False, look=None, reasons=(reason,))


def _without_evidence(accept_unmeasured: bool) -> Decision:
    if accept_unmeasured:
        warning = "nothing was measured: this is written on request, without proof of a gain"
        return Decision(
            passed=True, look=None, warnings=(warning,), unmeasured=True, proof=Proof.UNMEASURED
        )
    reason = (
        "nothing was measured: give judged queries (--queries with --qrels) or groups (--labels), "
        "or write without proof by --accept-unmeasured"
    )
    return Decision(
        passed=False, look=None, reasons=(reason,), unmeasured=True, proof=Proof.UNMEASURED
    )


def _proof(evidence: Evidence) -> Proof:
    chosen, level = evidence.chosen, evidence.look.level
    if chosen.queries < MIN_QUERIES:
        return Proof.TOO_FEW
    if chosen.p is not None and chosen.p <= level and _above_zero(chosen):
        return Proof.PROVEN
    if chosen.p_harm is not None and chosen.p_harm <= level:
        return Proof.HARMFUL
    return Proof.UNPROVEN


def _next_step(evidence: Evidence, proof: Proof) -> str | None:
    """Say what to do about a gain that is not proven."""
    if proof is Proof.PROVEN:
        return None
    chosen, look = evidence.chosen, evidence.look
    if proof is Proof.TOO_FEW:
        return (
            f"judge at least {MIN_QUERIES - chosen.queries} more test queries; simskip power says "
            "what gain they could prove"
        )
    if proof is Proof.HARMFUL:
        return "do not write it; fit with more judged queries, or by --side queries"
    if chosen.delta <= 0 or not chosen.spread:
        return "no gain was seen, and more test queries will not make one; give more to fit on"
    needed = queries_needed(chosen.delta, look.next_level, chosen.spread, assumed_loss=1.0)
    if needed <= chosen.queries:
        return (
            "another look at these queries may prove it; queries that nobody looked at yet would "
            "prove it sooner"
        )
    return (
        f"a gain of this size is found {POWER:.0%} of the time by about {needed:,} test queries at "
        f"the next level, {look.next_level:.3g}: judge {needed - chosen.queries:,} more"
    )


def _gain_reasons(evidence: Evidence) -> list[str]:
    chosen, number, level = evidence.chosen, evidence.look.number, evidence.look.level
    if chosen.level != level:
        raise ValueError(f"look {number} needs a comparison at {level}, not {chosen.level}")
    name = evidence.measure
    reasons = []
    if chosen.queries < MIN_QUERIES:
        reasons.append(
            f"only {chosen.queries} test queries: at least {MIN_QUERIES} are needed to prove a "
            "gain; add judged queries"
        )
    change = f"{name} goes from {chosen.before:.4f} to {chosen.after:.4f} ({chosen.delta:+.4f})"
    if chosen.p is None or not chosen.p <= level:
        p = "unknown" if chosen.p is None else f"{chosen.p:.3g}"
        reasons.append(
            f"{change}, which could be chance: p is {p}, and look {number} of this index, with "
            f"{evidence.look.proven} proven gains to draw on, needs {level:.3g} or less"
        )
    elif not _above_zero(chosen):
        interval = "unknown" if chosen.interval is None else _range(chosen.interval)
        reasons.append(
            f"{change}, but the interval of the gain at look {number} is {interval}, which "
            "is not above 0; more judged queries would narrow it"
        )
    return reasons


def _stratum_reasons(measure: str, name: str, stratum: Comparison) -> list[str]:
    reasons = []
    fall = -stratum.delta
    if stratum.queries >= MIN_QUERIES and fall > STRATUM_FALL + TOLERANCE:
        reasons.append(
            f"{measure} of {name} queries falls by {fall:.4f} over {stratum.queries} queries, "
            f"more than {STRATUM_FALL:g}; {_STRATUM_HELP}"
        )
    if stratum.p_harm is not None and stratum.p_harm < HARM_LEVEL:
        reasons.append(
            f"{measure} of {name} queries is harmed: {stratum.delta:+.4f} over {stratum.queries} "
            f"queries, one-sided p {stratum.p_harm:.3g} is below {HARM_LEVEL:g}; {_STRATUM_HELP}"
        )
    return reasons


_STRATUM_HELP = "judge more queries of that kind, so that fitting and validation see them"


def _late_row_findings(evidence: Evidence) -> list[str]:
    late = evidence.late_rows
    if late is None:
        if not evidence.growing:
            return []
        return ["the index grows, but late rows were not measured; measure them before writing"]
    if late.fair:
        return []
    ratio = "more than any" if late.ratio is None else f"{late.ratio:.2f} times"
    low, high = FAIR_LATE_ROWS
    return [
        f"rows that arrive later take {late.after:.1%} of the top 10 instead of {late.before:.1%}, "
        f"{ratio} their share before ({low:g} to {high:g} is fair); refine again soon after adding "
        "rows, or fit with more queries"
    ]


def _overlap_warnings(evidence: Evidence) -> list[str]:
    overlap = evidence.group_overlap
    if overlap is None or overlap >= MIN_OVERLAP:
        return []
    return [
        f"the order inside groups was reshuffled: the top 10 of a query's own group overlap by "
        f"{overlap:.2f} with those before, below {MIN_OVERLAP:g}; same-group precision cannot tell "
        "whether that order got better"
    ]


def _above_zero(chosen: Comparison) -> bool:
    return chosen.interval is not None and chosen.interval[0] > 0


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}"
