"""Records of runs as they lie in a state, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np

INDEX = "faiss:products.faiss"
NIGHT = 86_400.0
FIRST = 1_764_028_800.0  # 2025-11-25 00:00 UTC


def record(action: str, outcome: str, night: int = 0, **parts: object) -> dict[str, Any]:
    """Return a record whose other parts are empty."""
    return {
        "schema": 1,
        "time": FIRST + NIGHT * night,
        "action": action,
        "outcome": outcome,
        "index": INDEX,
        "command": f"simskip {action} {INDEX}",
        "report": None,
        "detail": None,
        "rows": None,
        "drift": None,
        "refit": None,
        "seconds": {},
        "machine": "Linux x86_64, 2 cores",
        "versions": {"simskip_vdb": "0.1.0", "numpy": "2.3.1"},
        **parts,
    }


def comparison(before: float, after: float, queries: int = 323, **parts: object) -> dict[str, Any]:
    """Return a comparison; its interval is .02 to each side."""
    delta = after - before
    return {
        "queries": queries,
        "before": before,
        "after": after,
        "delta": delta,
        "ci95": [delta - 0.02, delta + 0.02],
        "wins": 158,
        "ties": 93,
        "losses": 72,
        "level": None,
        "interval": None,
        "p": None,
        "p_harm": None,
        **parts,
    }


def report(before: float = 0.3164, after: float = 0.4121, **parts: object) -> dict[str, Any]:
    """Return the report of a refinement that passed and was written in place."""
    return {
        "schema": 1,
        "action": "refine",
        "index": INDEX,
        "kind": "IVF32 Flat, custom ids",
        "rows": 3633,
        "dim": 384,
        "metric": "dot",
        "side": "docs",
        "refiner": {
            "id": "e8de65322a96",
            "path": "products.faiss.simskip/refiners/e8de65322a96",
            "alpha": 0.75,
            "beta": 0.75,
            "late": "raw",
        },
        "split": "test",
        "queries": {"fit": 2582, "validation": 324, "test": 323},
        "measure": "nDCG@10",
        "measures": {
            "nDCG@10": comparison(before, after, level=0.0125, p=0.0001, p_harm=0.99),
            "R@10": comparison(0.155, 0.2058),
        },
        "strata": {
            "seen": comparison(0.33, 0.44, 299),
            "unseen": comparison(0.2, 0.19, 24),
        },
        "regressions": [{"query": "q9", "before": 1.0, "after": 0.35, "delta": -0.65}],
        "through_index": {"nDCG@10": {"before": 0.3066, "after": 0.399}},
        "ann_recall": {"before": 0.9474, "after": 0.9508},
        "late_rows": {
            "before": 0.098,
            "after": 0.101,
            "ratio": 1.0306,
            "fair": True,
            "rule": "raw",
        },
        "group_overlap": None,
        "gate": gate(),
        "written": written(),
        "forecast": None,
        "notes": ["8 queries near-identical to one given for test, such as q3"],
        "seconds": {"read": 0.9, "fit": 180.4, "write": 0.05},
        **parts,
    }


def gate(**parts: object) -> dict[str, Any]:
    return {
        "passed": True,
        "look": 1,
        "reasons": [],
        "warnings": [],
        "unmeasured": False,
        **parts,
    }


def written(rows: int = 3633, mode: str = "in-place", **parts: object) -> dict[str, Any]:
    return {
        "rows": rows,
        "skipped": 0,
        "mode": mode,
        "theirs": 0,
        "gone": 0,
        "target": "",
        "path": None,
        **parts,
    }


def refused(after: float = 0.3189, **parts: Any) -> dict[str, Any]:  # noqa: ANN401 of `report`
    """Return the report of a refinement that the gate refused for two reasons."""
    reasons = ["could be chance: p is 0.21", "nDCG@10 of unseen queries falls by 0.0140"]
    return report(
        after=after,
        gate=gate(passed=False, reasons=reasons),
        written=written(0, "none"),
        **parts,
    )


def detail(count: int = 323, seed: int = 0) -> dict[str, Any]:
    """Return scores of queries, and ten that moved most with their neighbours."""
    rng = np.random.default_rng(seed)
    before = rng.uniform(size=count)
    after = np.clip(before + rng.normal(0.05, 0.2, count) * rng.integers(0, 2, count), 0, 1)
    queries = [
        {"query": f"q{i}", "before": float(was), "after": float(now)}
        for i, (was, now) in enumerate(zip(before, after, strict=True))
    ]
    order = np.argsort(before - after, kind="stable")
    moved = [
        {
            **queries[i],
            "rows_before": [{"row": f"d{j}", "grade": int(j % 3 == 0)} for j in range(10)],
            "rows_after": [{"row": f"d{j}", "grade": int(j % 3 == 0)} for j in range(4, 14)],
        }
        for i in (*order[:5], *order[-5:])
    ]
    return {"measure": "nDCG@10", "queries": queries, "moved": moved}


def rows(total: int, new: int = 0, wrote: int = 0) -> dict[str, int]:
    return {"total": total, "new": new, "changed": 0, "deleted": 0, "written": wrote}


def found_drift(alarm: bool = False) -> dict[str, Any]:
    p = 0.0004 if alarm else 0.31
    queries = {
        "statistic": 0.19,
        "p": p,
        "level": 0.001,
        "alarm": alarm,
        "reference": 2582,
        "recent": 400,
    }
    return {"rows": None, "queries": queries}


def refit(result: str | None, *reasons: str) -> dict[str, Any]:
    return {"due": bool(reasons), "reasons": list(reasons), "result": result}


def nights(count: int) -> list[dict[str, Any]]:
    """Return a first refinement and the nights after it, of every kind, the last a champion."""
    runs = [record("refine", "written", report=report(), detail=detail())]
    total, value = 3633, 0.4121
    for night in range(1, count):
        total += 50
        if night == count - 1 or night % 40 == 20:
            won = report(value, value + 0.01)
            parts = {"report": won, "refit": refit("champion", "queries drifted")}
            runs.append(record("night", "written", night, rows=rows(total, 50, total), **parts))
            value += 0.01
        elif night % 10 == 5:
            lost = refused(value + 0.002)
            lost["measures"]["nDCG@10"]["before"] = value
            parts = {"report": lost, "refit": refit("kept", "age")}
            runs.append(record("night", "kept", night, rows=rows(total, 50, 50), **parts))
        elif night % 10 == 7:
            total -= 50
            runs.append(record("night", "quiet", night, rows=rows(total), drift=found_drift()))
        else:
            runs.append(record("night", "written", night, rows=rows(total, 50, 50)))
    return runs


VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page taken apart; it raises where a tag is not closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((tuple(self._open), " ".join(data.split())))

    def inside(self, tag: str) -> list[str]:
        """Return the texts somewhere inside a tag."""
        return [text for path, text in self.texts if tag in path]

    def attributes(self, name: str) -> Iterator[str]:
        return (attrs[name] for _, attrs in self.tags if name in attrs)

    @property
    def text(self) -> str:
        """All that is read, without styles."""
        return " ".join(text for path, text in self.texts if "style" not in path)
