from __future__ import annotations

import copy
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from judged import make_case
from run_records import (
    FIRST,
    Page,
    comparison,
    detail,
    found_drift,
    gate,
    nights,
    record,
    refit,
    refused,
    report,
    rows,
    written,
)

import simskip_vdb as ss
from simskip_vdb import report as shown
from simskip_vdb.errors import ConfigError
from simskip_vdb.pages import render_markdown, render_page
from simskip_vdb.timeline import holds_refined, undo

MOST_BYTES = 400_000
HOSTILE = "\"><script>alert('x')</script>&amp; ünïcode 索引 كيف"


def hostile() -> list[dict[str, Any]]:
    """Return a run whose every name tries to be markup."""
    found = report(index=HOSTILE, kind=HOSTILE, notes=[HOSTILE], gate=gate(warnings=[HOSTILE]))
    found["refiner"]["path"] = HOSTILE
    part = detail(30)
    for item in part["moved"]:
        item["query"] = HOSTILE
        item["rows_before"][0]["row"] = HOSTILE
    run = record("refine", "written", report=found, detail=part, machine=HOSTILE)
    return [{**run, "index": HOSTILE, "command": HOSTILE}]


def bare(outcome: str) -> dict[str, Any]:
    """Return a record without anything that may be missing."""
    names = ("schema", "time", "action", "outcome", "index")
    return {name: record("night", outcome)[name] for name in names}


SITUATIONS: dict[str, list[dict[str, Any]]] = {
    "a first refinement": [record("refine", "written", report=report(), detail=detail())],
    "few queries": [record("refine", "written", report=report(), detail=detail(30))],
    "refused": [record("refine", "refused", report=refused(), detail=detail())],
    "nothing measured": [
        record("refine", "refused", report=refused(measures={}, strata={}, regressions=[]))
    ],
    "no gain": [record("refine", "refused", report=refused(0.3164, ann_recall=None))],
    "no interval": [
        record(
            "refine",
            "refused",
            report=refused(measures={"nDCG@10": comparison(0.1, 0.2, 1, ci95=None)}),
        )
    ],
    "a quiet night": [*nights(4), record("night", "quiet", 9, rows=rows(3783))],
    "an incremental night": [*nights(4), record("night", "written", 9, rows=rows(3790, 7, 7))],
    "a challenger that lost": [
        *nights(4),
        record("night", "kept", 9, report=refused(), refit=refit("kept", "age")),
    ],
    "a rollback": [*nights(4), record("rollback", "restored", 9, rows=rows(3783, 0, 3783))],
    "a failure": [*nights(4), record("night", "failed", 9, notes=["the disk is full"])],
    "groups": [record("refine", "written", report=report(group_overlap=0.41))],
    "a copy": [record("refine", "written", report=report(written=written(mode="copy", path="b")))],
    "200 runs and 5,000 queries": [
        *nights(200),
        record("night", "written", 200, report=report(), detail=detail(5000)),
    ],
    "hostile names": hostile(),
    "bare and failed": [bare("failed")],
    "bare and quiet": [bare("quiet"), bare("quiet")],
}


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[str, Page]]:
    """Each situation's page, as text and taken apart."""
    texts = {name: render_page(runs) for name, runs in SITUATIONS.items()}
    return {name: (text, Page(text)) for name, text in texts.items()}


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_page_is_one_sound_file_that_loads_nothing(
    name: str, pages: dict[str, tuple[str, Page]]
) -> None:
    text, page = pages[name]
    names = [tag for tag, _ in page.tags]
    assert not {"script", "img", "iframe", "object", "embed", "base"} & set(names)
    assert len(text.encode()) < MOST_BYTES
    assert all(link.startswith(("#", "data:,")) for link in page.attributes("href"))
    assert not list(page.attributes("src"))
    assert not [attr for _, attrs in page.tags for attr in attrs if attr.startswith("on")]
    assert re.search(r"url\((?!#)|@import|https?:", text) is None
    ids = [attrs["id"] for tag, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r"(?:href=\"#|url\(#)([\w-]+)", text)
    assert set(used) <= set(ids)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_page_can_be_read_by_all(name: str, pages: dict[str, tuple[str, Page]]) -> None:
    _, page = pages[name]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attrs["aria-label"] for _, attrs in page.tags if "role" in attrs)
    assert next(attrs["lang"] for tag, attrs in page.tags if tag == "html") == "en"
    assert page.inside("title")


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_same_runs_give_the_same_page(name: str, pages: dict[str, tuple[str, Page]]) -> None:
    runs = copy.deepcopy(SITUATIONS[name])
    assert render_page(runs) == pages[name][0]
    assert runs == SITUATIONS[name]


def test_a_page_shows_the_numbers_of_its_record(pages: dict[str, tuple[str, Page]]) -> None:
    _, page = pages["a first refinement"]
    assert page.inside("h1") == [
        "Search got better: nDCG@10 rose from .3164 to .4121 on 323 held-out queries."
    ]
    cells = page.inside("td")
    for found in report()["measures"].values():
        for cell in shown.compared("", found)[1:]:
            assert cell in cells
    assert "2025-11-25 00:00 UTC" in page.text
    for said in ("3,633 rows, read back and verified", "e8de65322a96", "9.8% → 10.1%", ".9508"):
        assert said in page.text
    for said in ("near-identical", "Linux x86_64, 2 cores", "numpy 2.3.1"):
        assert said in page.text
    assert "simskip rollback faiss:products.faiss" in page.inside("pre")
    labels = list(page.attributes("aria-label"))
    assert "Change by measure: nDCG@10 +.0957; R@10 +.0508; seen +.1100; unseen -.0100" in labels


def test_moved_queries_show_their_neighbours(pages: dict[str, tuple[str, Page]]) -> None:
    _, page = pages["a first refinement"]
    listed = page.inside("li")
    for item in SITUATIONS["a first refinement"][0]["detail"]["moved"]:
        assert item["query"] in page.inside("summary")
        assert shown.signed(item["after"] - item["before"]) in page.inside("summary")
    assert listed.count("relevant") == 10 * (4 + 3)
    assert listed.count("d13") == 10


def test_every_reason_is_listed(pages: dict[str, tuple[str, Page]]) -> None:
    _, page = pages["refused"]
    assert set(refused()["gate"]["reasons"]) <= set(page.inside("li"))
    assert "The gate refused." in page.text
    assert "nothing to undo" in page.text


def test_a_write_that_was_undone_by_itself_leaves_the_earlier_refinement() -> None:
    runs = [record("refine", "written", 0, report=report()), record("night", "restored", 1)]
    assert holds_refined(runs)
    assert "The index holds an earlier refinement" in undo(runs)[0]
    assert not holds_refined([*runs, record("rollback", "restored", 2)])


def test_what_was_not_found_is_not_mentioned(pages: dict[str, tuple[str, Page]]) -> None:
    for name in ("a quiet night", "an incremental night", "bare and failed"):
        headings = set(pages[name][1].inside("h2"))
        assert not headings & {"Before and after", "The gate", "Query by query", "Drift", "Notes"}
    assert "Drift" in Page(render_page([record("night", "quiet", drift=found_drift())])).inside(
        "h2"
    )


def test_a_failure_says_why(pages: dict[str, tuple[str, Page]]) -> None:
    _, page = pages["a failure"]
    assert "What went wrong" in page.inside("h2")
    assert "Notes" not in page.inside("h2")
    assert page.inside("li") == ["the disk is full"]
    assert "\n- the disk is full\n" in render_markdown(SITUATIONS["a failure"][-1])


def test_hostile_names_stay_text(pages: dict[str, tuple[str, Page]]) -> None:
    text, page = pages["hostile names"]
    assert "<script" not in text
    assert HOSTILE in page.inside("li")
    assert HOSTILE in page.inside("summary")
    assert HOSTILE in page.inside("dd")


def test_the_history_has_every_run(pages: dict[str, tuple[str, Page]]) -> None:
    _, page = pages["200 runs and 5,000 queries"]
    assert "all 201 runs" in page.inside("summary")
    assert any(label.startswith("History of 201 runs: nDCG@10") for label in chart_labels(page))
    assert not any(label.startswith("History of") for label in chart_labels(pages["groups"][1]))


def chart_labels(page: Page) -> list[str]:
    return [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_can_be_told_from_the_paper(theme: int, pages: dict[str, tuple[str, Page]]) -> None:
    """Text has a contrast of 4.5 and more (WCAG 2, 1.4.3), in light and in dark."""
    text, _ = pages["refused"]
    parts = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", parts[theme]))
    for paper in ("paper", "raised"):
        for name in ("ink", "muted", "accent", "good", "bad", "warn"):
            high, low = sorted((luminance(colors[paper]), luminance(colors[name])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, paper)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_title_can_be_given() -> None:
    page = Page(render_page(SITUATIONS["groups"], title="Ours & theirs"))
    assert page.inside("title") == ["Ours & theirs"]


def test_there_must_be_a_run() -> None:
    with pytest.raises(ConfigError, match="no runs"):
        render_page([])


@pytest.mark.parametrize("gain", [True, False])
def test_a_real_run_makes_a_page(gain: bool, tmp_path: Path) -> None:
    case = make_case(tmp_path, gain=gain)
    files = case.labels if gain else case.files
    done = ss.refine(ss.open_store(str(case.index)), ss.read_judgments(files))
    outcome = "written" if done.exit_code == 0 else "refused"
    run = record("refine", outcome, report=done.to_dict())
    page = Page(render_page([run]))
    assert done.measure is not None
    found = done.measures[done.measure]
    assert set(shown.compared("", found)[1:]) - {""} <= set(page.inside("td"))
    assert set(done.gate.reasons if done.gate else ()) <= set(page.inside("li"))
    assert f"| {done.measure} | {shown.number(found['before'])} |" in render_markdown(run)


def test_markdown_of_a_refinement() -> None:
    assert render_markdown(record("refine", "written", report=report())) == (
        """**Search got better: nDCG@10 rose from .3164 to .4121 on 323 held-out queries.**

`faiss:products.faiss` · 2025-11-25 00:00 UTC · written

| measure | before | after | change | 95 % interval |
| --- | ---: | ---: | ---: | ---: |
| nDCG@10 | .3164 | .4121 | +.0957 | +.0757 to +.1157 |
| R@10 | .1550 | .2058 | +.0508 | +.0308 to +.0708 |

The gate passed. Look 1: the gain has p = 0.0001, and 0.0125 or less is needed.

This command restores the vectors from before:

```console
simskip rollback faiss:products.faiss
```
"""
    )


def test_markdown_of_a_refusal() -> None:
    found = refused(measures={})
    found["gate"]["warnings"] = ["order was *reshuffled*"]
    assert render_markdown(record("refine", "refused", report=found)) == (
        """**Nothing was written: nothing proves that search would get better.**

`faiss:products.faiss` · 2025-11-25 00:00 UTC · refused

The gate refused.

- could be chance: p is 0.21
- nDCG@10 of unseen queries falls by 0.0140
- warning: order was \\*reshuffled\\*

Nothing was written, so there is nothing to undo.
"""
    )


def test_markdown_of_names_that_would_be_markup() -> None:
    run = {**bare("stopped"), "index": "faiss:a`b<i>|```c", "time": FIRST}
    text = render_markdown(run)
    assert "```` faiss:a`b<i>|```c ````" in text
    assert "````console\nsimskip rollback 'faiss:a`b<i>|```c'\n````" in text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from simskip_vdb.pages import render_page\n"
        f"runs = {SITUATIONS['groups']!r}\n"
        "render_page(runs)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in done.stderr
    assert "simskip-vdb[report]" in done.stderr
