"""Lay measured cells out as the README's tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.statistics import compare

Cell = dict[str, Any]
KEY = ("set", "encoder", "method", "seed")


def read(path: Path) -> list[Cell]:
    """Return the latest version of every cell."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = {tuple(cell[name] for name in KEY): cell for cell in map(json.loads, lines)}
    return list(found.values())


def table(cells: Sequence[Cell]) -> str:
    """Return one markdown table a set and encoder; numbers are means over seeds.

    Intervals are paired 95 % intervals of the gain over the vectors as they are, over queries
    whose gain is averaged over seeds.
    """
    parts = []
    for key in dict.fromkeys((cell["set"], cell["encoder"]) for cell in cells):
        own = [cell for cell in cells if (cell["set"], cell["encoder"]) == key]
        parts.append(_one_set(*key, own))
    return "\n\n".join(parts)


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
        row = [method, _gain(own, None), *(_gain(own, stratum == "seen") for stratum in strata)]
        row += [f"{_mean(cell['measures'][other][1] for cell in own):.4f}" for other in others]
        row += [f"{_mean(cell['overlap'] for cell in own):.2f}" for _ in overlap]
        row += [_accuracy(own, kind) for kind in accuracies]
        row += [_late(own), f"{_mean(cell['fit_seconds'] for cell in own):.0f}", _gate(own)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _gain(cells: list[Cell], seen: bool | None) -> str:
    """Show a level and the paired interval of its gain, over all queries or one stratum."""
    before, after = (_values(cells, side, seen) for side in ("before", "after"))
    there = ~np.isnan(after).all(axis=0)
    if not there.any():
        return "–"
    was, now = np.nanmean(before[:, there], axis=0), np.nanmean(after[:, there], axis=0)
    found = compare(was, now, None, 0)
    if found.ci95 is None or found.wins + found.losses == 0:
        return f"{found.after:.4f}"
    return f"{found.after:.4f} ({found.ci95[0]:+.3f} to {found.ci95[1]:+.3f})"


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
