"""Lay measured cells out as tables, and put them into the documents between their marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import BY_PROTOCOL
from loading import PROTOCOL
from numpy.typing import NDArray

from simskip_vdb.gate import Comparison
from simskip_vdb.statistics import compare

Cell = dict[str, Any]
KEY = ("set", "encoder", "method", "seed")


def read(path: Path, code: Callable[[str], str]) -> list[Cell]:
    """Return the latest version of every cell, and whether its method's code still is `current`.

    Cells of earlier code are left out where a method has others on that set.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    latest = {tuple(cell[name] for name in KEY): cell for cell in map(json.loads, lines)}
    cells = [{**cell, "current": cell["code"] == code(cell["method"])} for cell in latest.values()]
    renewed = {_without_seed(cell) for cell in cells if cell["current"]}
    return [cell for cell in cells if cell["current"] or _without_seed(cell) not in renewed]


def _without_seed(cell: Cell) -> tuple[str, ...]:
    return tuple(cell[name] for name in KEY[:-1])


def table(cells: Sequence[Cell]) -> str:
    """Return one markdown table a set and encoder; numbers are means over seeds.

    A dagger marks methods that were measured by other code than today's. Intervals are paired 95 %
    intervals of the gain over the vectors as they are, over queries whose gain is averaged over
    seeds.
    """
    own = [cell for cell in cells if not cell["set"].endswith(PROTOCOL)]
    return "\n\n".join(_one_set(*key, own) for key, own in sorted(_by_set(own).items()))


def protocol(cells: Sequence[Cell]) -> str:
    """Return one markdown table of what was measured by NUDGE's protocol."""
    lines = ["| set | measure | " + " | ".join(BY_PROTOCOL) + " |"]
    lines.append("|" + "---|" * (len(BY_PROTOCOL) + 2))
    pooled = [cell for cell in cells if cell["set"].endswith(PROTOCOL)]
    for (name, encoder), own in sorted(_by_set(pooled).items()):
        for measure in ("nDCG@10", "R@10"):
            row = [f"{name.removesuffix(PROTOCOL)} ({encoder})", measure]
            for method in BY_PROTOCOL:
                found = [cell for cell in own if cell["method"] == method]
                level = _mean(cell["measures"][measure][1] for cell in found) if found else None
                row.append("–" if level is None else f"{level:.4f}{_mark(found)}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def summary(cells: Sequence[Cell]) -> str:
    """Return one markdown table with a line a set and encoder; numbers are means over seeds.

    Besides ours it shows NUDGE-N and, of all the other methods, the one with the highest mean on
    test, which ours is held against on purpose.
    """
    head = ["set", "measure", "raw", "NUDGE-N", "best other method", "ours, docs", "gain, 95 %"]
    head += [
        "over NUDGE-N, 95 %",
        "unseen queries",
        "late rows",
        "gate",
        "ours, queries",
        "ours, both",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    own_splits = [cell for cell in cells if not cell["set"].endswith(PROTOCOL)]
    for key, own in sorted(_by_set(own_splits).items()):
        found: dict[str, list[Cell]] = {}
        for cell in own:
            found.setdefault(cell["method"], []).append(cell)
        docs, queries, both = (
            found.get(f"ours, judged, {side}") or found.get(f"ours, groups, {side}")
            for side in ("docs", "queries", "both")
        )
        nudge = found.get("NUDGE-N")
        best = max(filter(_is_other, found), key=lambda name: _level(found[name]), default=None)
        row = [
            f"{key[0]} ({key[1]})",
            own[0]["measure"],
            _shown(found.get("raw")),
            _shown(nudge),
            f"{best} {_shown(found[best])}" if best else "–",
            f"**{_shown(docs)}**",
            _interval(docs),
            _over(docs, nudge),
            _interval(docs, seen=False),
            _late(docs) if docs else "–",
            _gate(docs) if docs else "–",
            _shown(queries),
            _shown(both),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _by_set(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["set"], cell["encoder"]), []).append(cell)
    return found


def _is_other(method: str) -> bool:
    return method not in ("raw", "random moves") and "ours" not in method and " · " not in method


def _level(cells: list[Cell]) -> float:
    return _mean(cell["measures"][cell["measure"]][1] for cell in cells)


def _shown(cells: list[Cell] | None) -> str:
    return f"{_level(cells):.4f}{_mark(cells)}" if cells else "–"


def _mark(cells: list[Cell]) -> str:
    """Mark what was measured by other code than today's."""
    return "" if all(cell["current"] for cell in cells) else " †"


def _over(cells: list[Cell] | None, others: list[Cell] | None) -> str:
    """Show the paired interval of a difference, queries averaged over seeds."""
    if not cells or not others:
        return "–"
    was, now = (_values(some, "after", None).mean(axis=0) for some in (others, cells))
    return _bounds(compare(was, now, None, 0), "{:+.3f} to {:+.3f}") or "0"


def _one_set(name: str, encoder: str, cells: list[Cell]) -> str:
    chosen, *others = cells[0]["measures"]
    grouped = chosen == "Rprec"
    strata = () if grouped else ("seen", "unseen")
    others = [other for other in others if other != "RR@10"]
    accuracies = ("probe", "kNN") if grouped else ()
    overlap = ("overlap",) if grouped else ()
    head = ["method", chosen, *strata, *others, *overlap, *accuracies, "late rows", "fit s", "gate"]
    seeds = len({cell["seed"] for cell in cells})
    lines = [
        f"**{name}** ({encoder}): {len(cells[0]['after'])} test queries, {seeds} seeds",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    methods = dict.fromkeys(cell["method"] for cell in cells)
    for method in sorted(methods, key=lambda name: (" · " in name, "ours" in name, name != "raw")):
        own = [cell for cell in cells if cell["method"] == method]
        row = [
            method + _mark(own),
            _gain(own, None),
            *(_gain(own, stratum == "seen") for stratum in strata),
        ]
        row += [f"{_mean(cell['measures'][other][1] for cell in own):.4f}" for other in others]
        row += [f"{_mean(cell['overlap'] for cell in own):.2f}" for _ in overlap]
        row += [_accuracy(own, kind) for kind in accuracies]
        row += [_late(own), f"{_mean(cell['fit_seconds'] for cell in own):.0f}", _gate(own)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _gain(cells: list[Cell], seen: bool | None) -> str:
    """Show a level and the paired interval of its gain, over all queries or one stratum."""
    found = _compared(cells, seen)
    if found is None:
        return "–"
    return " ".join(filter(None, [f"{found.after:.4f}", _bounds(found, "({:+.3f} to {:+.3f})")]))


def _interval(cells: list[Cell] | None, seen: bool | None = None) -> str:
    found = _compared(cells, seen) if cells else None
    if found is None or found.ci95 is None:
        return "–"
    return _bounds(found, "{:+.3f} to {:+.3f}") or "0"


def _bounds(found: Comparison, form: str) -> str:
    """Show the interval of the gain; nothing where no query changed."""
    moved = found.ci95 is not None and found.wins + found.losses > 0
    return form.format(*found.ci95) if moved and found.ci95 else ""


def _compared(cells: list[Cell], seen: bool | None) -> Comparison | None:
    """Compare queries whose values are averaged over seeds; None where there are none."""
    before, after = (_values(cells, side, seen) for side in ("before", "after"))
    there = ~np.isnan(after).all(axis=0)
    if not there.any():
        return None
    was, now = np.nanmean(before[:, there], axis=0), np.nanmean(after[:, there], axis=0)
    return compare(was, now, None, 0)


def _values(cells: list[Cell], side: str, seen: bool | None) -> NDArray[np.float64]:
    """Return a value for every seed and query, NaN outside the stratum."""
    values = np.array([cell[side] for cell in cells], np.float64)
    if seen is not None:
        flags = np.array([[flag == "1" for flag in cell["seen"]] for cell in cells])
        values[flags != seen] = np.nan
    return values


def _accuracy(cells: list[Cell], kind: str) -> str:
    found = [cell["accuracy"][kind] for cell in cells if cell["accuracy"]]
    return f"{_mean(found):.4f}" if found else "–"


def _late(cells: list[Cell]) -> str:
    ratios = [cell["late"]["ratio"] for cell in cells if cell["late"] is not None]
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{_mean(known):.2f} ×" if known else "–"


def _gate(cells: list[Cell]) -> str:
    passed = sum(cell["gate"]["passed"] for cell in cells)
    return f"{passed} of {len(cells)}"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
