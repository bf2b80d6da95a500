from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from simskip_vdb import charts
from simskip_vdb.charts import Chart, Gain, Moment


def parsed(chart: Chart) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in (chart.wide, chart.narrow)]


def texts(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.iter("text")]


def some_charts() -> list[Chart]:
    gains = [
        Gain(name="nDCG@10", delta=0.02, interval=(0.01, 0.03), chosen=True),
        Gain(name="R@10", delta=-0.01, interval=None),
    ]
    moments = [
        Moment(time=86_400.0 * n, value=0.3 + 0.01 * n, measured=True, rows=100 + n)
        for n in range(9)
    ]
    history = charts.draw_history(moments, "nDCG@10")
    assert history is not None
    return [charts.draw_gains(gains), charts.draw_queries([0.5, 0.0, -0.2], "nDCG@10"), history]


def test_charts_take_colours_and_font_from_the_page() -> None:
    for chart in some_charts():
        for svg in (chart.wide, chart.narrow):
            assert "#0a0b0" not in svg
            assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(charts._VARIABLES.values())
            assert re.search(r"(?:fill|stroke): #", svg) is None
            assert "font-family" not in svg
            assert "DejaVu" not in svg
            assert "<style" not in svg
            assert "<metadata" not in svg


def test_charts_fit_a_desk_and_a_phone() -> None:
    for chart in some_charts():
        for svg, width in zip(parsed(chart), (charts.WIDE, charts.NARROW), strict=True):
            assert svg.attrib["viewBox"].split()[2] == str(width)


def test_charts_leave_settings_as_they_were() -> None:
    before = dict(matplotlib.rcParams)
    some_charts()
    assert dict(matplotlib.rcParams) == before


def test_gains_are_named_from_the_top() -> None:
    gains = [Gain(name=name, delta=0.1, interval=(0.0, 0.2)) for name in ("one", "two", "three")]
    (svg, _) = parsed(charts.draw_gains(gains))
    places = {
        element.text: float(element.attrib["y"]) for element in svg.iter("text") if element.text
    }
    assert places["one"] < places["two"] < places["three"]


@pytest.mark.parametrize("count", [1, 30, 5000])
def test_a_curve_of_queries_stays_small(count: int, rng: np.random.Generator) -> None:
    deltas = rng.normal(size=count)
    chart = charts.draw_queries(deltas.tolist(), "nDCG@10")
    assert len(chart.wide) < 40_000
    assert f"each of {count:,} queries" in chart.label
    assert f"from {deltas.max():+.4f}".replace("+0.", "+.").replace("-0.", "-.") in chart.label


@pytest.mark.parametrize("deltas", [[0.0, 0.0], [0.1, 0.2], [-0.1, -0.2]])
def test_a_curve_may_have_one_side(deltas: list[float]) -> None:
    svg = charts.draw_queries(deltas, "nDCG@10").wide
    assert ("var(--good)" in svg) == (max(deltas) > 0)
    assert ("var(--bad)" in svg) == (min(deltas) < 0)


def test_a_history_marks_what_happened() -> None:
    moments = [
        Moment(time=0.0, value=0.4, measured=True, champion=True),
        Moment(time=86_400.0, value=0.4, measured=True, tried=0.41),
        Moment(time=2 * 86_400.0, value=0.3, restored=True),
        Moment(time=3 * 86_400.0, value=0.3, restored=True),
    ]
    chart = charts.draw_history(moments, "nDCG@10")
    assert chart is not None
    assert chart.label == "History of 4 runs: nDCG@10 from .4000 to .3000"
    said = texts(parsed(chart)[0])
    for name in ("measured", "new refiner", "tried, not written", "rolled back", "nDCG@10"):
        assert said.count(name) == 1
    assert "rows" not in said
    assert {"1 Jan", "4 Jan"} <= set(said)


def test_a_history_without_measures_shows_rows() -> None:
    moments = [Moment(time=3600.0 * n, value=None, rows=1_000_000 * (n + 1)) for n in range(3)]
    chart = charts.draw_history(moments, None)
    assert chart is not None
    said = texts(parsed(chart)[0])
    assert "rows" in said
    assert "2M" in said
    assert "01:00" in said


def test_no_history_where_there_is_nothing_to_see() -> None:
    assert charts.draw_history([Moment(time=0.0, value=0.4)], "nDCG@10") is None
    assert charts.draw_history([Moment(time=float(n), value=None) for n in range(5)], None) is None


def test_runs_at_one_moment_have_a_history() -> None:
    moments = [Moment(time=5.0, value=value, measured=True) for value in (0.1, 0.2)]
    assert charts.draw_history(moments, "nDCG@10") is not None
