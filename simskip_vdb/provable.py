"""Tell, before anything is fitted, what gain the test queries of an index could prove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simskip_vdb.crossfit import SPREAD, applies
from simskip_vdb.datatypes import Progress, Split, silent
from simskip_vdb.gate import MIN_QUERIES
from simskip_vdb.judgments import Judgments
from simskip_vdb.measuring import CROSS_FITTED, freshest_part
from simskip_vdb.report import signed, table
from simskip_vdb.resolution import concatenate
from simskip_vdb.sample_size import POWER, TYPICAL_SPREAD, queries_needed, smallest_gain
from simskip_vdb.store import VectorStore
from simskip_vdb.workspace import Settings, open_workspace

POWERS = (0.5, POWER, 0.95)
GAINS = (0.005, 0.01, 0.02, 0.05, 0.1)


def power(
    store: VectorStore,
    judgments: Judgments,
    settings: Settings | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Tell what gain these judgments could prove at the next look; fit nothing, write nothing.

    By the normal approximation of the gate's test, with the spread of the queries' differences that
    the last look saw, else a typical one.

    Args:
        store: The index.
        judgments: Queries with judgments, or groups.
        settings: Measure, seed and state as `refine` would get them.
        progress: Called with (stage, done, total).

    Returns:
        schema, index, measure, split (``test`` or ``cross-fitted``), queries of it, judged (those
        that would be looked at), look (its number), level, spread, spread_seen, gains (power and
        gain), needed (gain and queries).

    Raises:
        SimskipError: See `errors`.
    """
    settings = replace(settings or Settings(), dry_run=True)
    with open_workspace(store, judgments, settings, progress) as space:
        crossed, ledger = applies(space), space.ledger
        queries = space.judged.queries[Split.TEST]
        if crossed:
            queries = concatenate(list(space.judged.queries.values()), space.info.dim)
        judged = queries if crossed else freshest_part(ledger, queries)
        spread = ledger.spread or TYPICAL_SPREAD * (SPREAD if crossed else 1)
        look = ledger.next_look(int(ledger.first_looks(judged).min(initial=ledger.looks + 1)))
        loss = look.assumed_loss(len(judged))

        def provable(chance: float) -> float:
            return smallest_gain(len(judged), look.level, spread, assumed_loss=loss, power=chance)

        def needed(gain: float) -> int:
            found = queries_needed(gain, look.level, spread, assumed_loss=loss)
            return max(MIN_QUERIES, found)

        enough = len(judged) >= MIN_QUERIES
        return {
            "schema": 1,
            "index": space.info.uri,
            "measure": space.measure,
            "split": CROSS_FITTED if crossed else Split.TEST.value,
            "queries": len(queries),
            "judged": len(judged),
            "look": look.number,
            "level": look.level,
            "spread": spread,
            "spread_seen": ledger.spread is not None,
            "gains": [{"power": x, "gain": provable(x)} for x in POWERS if enough],
            "needed": [{"gain": gain, "queries": needed(gain)} for gain in GAINS],
        }


def render_power(result: Mapping[str, Any]) -> str:
    """Say what could be proven, and what would be needed, for people."""
    crossed, count = result["split"] == CROSS_FITTED, result["judged"]
    kind = "judged queries, cross-fitted" if crossed else "test queries"
    part = "" if count == result["queries"] else f" of {result['queries']:,}"
    lines = [
        result["index"],
        f"{count:,}{part} {kind}; the next look is look {result['look']} of this index, and proves "
        f"a gain at p ≤ {result['level']:.2g}",
    ]
    if result["gains"]:
        chances = ", ".join(
            f"{signed(item['gain'])} {item['power']:.0%} of the time" for item in result["gains"]
        )
        lines.append(f"they find a gain in {result['measure']} of {chances}")
    else:
        lines.append(f"too few to prove any gain: at least {MIN_QUERIES} are needed")
    rows = [
        (signed(item["gain"]), f"{item['queries']:,}", f"{max(0, item['queries'] - count):,}")
        for item in result["needed"]
    ]
    lines += ["", table((f"gain, found {POWER:.0%} of the time", kind, "more than now"), rows)]
    seen = "as the last look saw" if result["spread_seen"] else "a typical one: none was seen yet"
    lines += ["", f"reckoned with a spread of {result['spread']:.2f} between queries, {seen}"]
    if not crossed:
        lines.append(
            "About one in five judged queries becomes a test query, unless you give --test-queries."
        )
    return "\n".join(lines)
