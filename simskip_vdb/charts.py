"""Charts of a page, drawn by matplotlib as SVG that takes its colours and font from there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from simskip_vdb.errors import MissingDependencyError
from simskip_vdb.report import number, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 680, 340
"""Widths in pixels: every chart is drawn for a desk and for a phone."""
MOST_STEPS = 400
"""Most steps of a curve: more would not be seen."""

# Each stands for a CSS variable of the page, which knows light from dark.
_INK, _MUTED, _LINE, _ACCENT, _GOOD, _BAD, _WARN = (f"#0a0b0{digit}" for digit in range(7))
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _LINE: "line",
    _ACCENT: "accent",
    _GOOD: "good",
    _BAD: "bad",
    _WARN: "warn",
}
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that places are the same everywhere
    "font.size": 12,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart as inline SVG.

    Attributes:
        label: What it shows, for those who do not see it.
        wide: Drawn for `WIDE` pixels.
        narrow: Drawn for `NARROW` pixels.
    """

    label: str
    wide: str
    narrow: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A change with its interval.

    Attributes:
        name: Of a measure or stratum.
        delta: After minus before.
        interval: 95 % interval of `delta`; None where there is none.
        chosen: Whether the gate judges it.
    """

    name: str
    delta: float
    interval: tuple[float, float] | None
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One run in the history of an index.

    Attributes:
        time: Seconds since the epoch.
        value: The measure of what the index holds after it; None where it is not known.
        measured: Whether this run measured it; otherwise it is carried on.
        champion: Whether a new refiner was written.
        tried: What a candidate reached that was not written; None without one.
        restored: Whether the originals were restored.
        rows: Rows in the index; None where they were not counted.
    """

    time: float
    value: float | None
    measured: bool = False
    champion: bool = False
    tried: float | None = None
    restored: bool = False
    rows: int | None = None


def draw_gains(gains: Sequence[Gain]) -> Chart:
    """Draw changes as dots on their intervals, the first on top."""

    def paint(figure: Figure, wide: bool) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=_MUTED, linewidth=1)
        for place, gain in enumerate(gains):
            color = _ACCENT if gain.chosen else _INK
            if gain.interval is not None:
                axes.plot(gain.interval, (place, place), color=color, linewidth=2.5, alpha=0.45)
            axes.plot(gain.delta, place, "o", color=color, markersize=7, markeredgewidth=0)
        axes.set_yticks(range(len(gains)), [gain.name for gain in gains])
        for text, gain in zip(axes.get_yticklabels(), gains, strict=True):
            text.set_color(_ACCENT if gain.chosen else _INK)
        axes.set_ylim(len(gains) - 0.5, -0.5)
        axes.set_xlabel("change, with its 95 % interval")
        axes.xaxis.set_major_locator(_ticks(6 if wide else 4))
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.grid(axis="x")
        axes.spines.left.set_visible(False)

    told = "; ".join(f"{gain.name} {signed(gain.delta)}" for gain in gains)
    return _chart("gains", f"Change by measure: {told}", paint, 52 + 28 * len(gains))


def draw_queries(deltas: Sequence[float], measure: str) -> Chart:
    """Draw the change of every query, sorted from the largest gain to the largest loss."""
    ordered = np.sort(np.asarray(deltas, dtype=np.float64))[::-1]
    places = np.arange(len(ordered))
    if len(ordered) > MOST_STEPS:
        places = np.linspace(0, len(ordered) - 1, MOST_STEPS).round().astype(np.int64)
    edges = np.append(places, len(ordered))
    steps = ordered[places]

    def paint(figure: Figure, wide: bool) -> None:
        axes = figure.subplots()
        gained, lost = int((steps > 0).sum()), int((steps >= 0).sum())
        for part, color in ((slice(None, gained), _GOOD), (slice(lost, None), _BAD)):
            if len(steps[part]):
                sides = edges[part.start : None if part.stop is None else part.stop + 1]
                axes.stairs(steps[part], sides, fill=True, color=color, alpha=0.75, linewidth=0)
        axes.axhline(0, color=_MUTED, linewidth=1)
        axes.set_xlim(0, len(ordered))
        axes.set_xlabel("queries, from the largest gain to the largest loss")
        axes.set_ylabel(f"change of {measure}")
        axes.xaxis.set_major_locator(_ticks(6 if wide else 4, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_locator(_ticks(5))
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
        axes.grid(axis="y")

    label = (
        f"Change of {measure} for each of {len(ordered):,} queries, "
        f"from {signed(ordered[0])} to {signed(ordered[-1])}"
    )
    return _chart("queries", label, paint, 220)


def draw_history(moments: Sequence[Moment], measure: str | None) -> Chart | None:
    """Draw what an index held over its runs, and how its rows grew; None where nothing is known."""
    valued = any(m.value is not None or m.tried is not None for m in moments)
    counted = len({m.rows for m in moments if m.rows is not None}) > 1
    panels: list[Callable[[Axes, bool], None]] = []
    if valued:
        panels.append(lambda axes, wide: _paint_values(axes, moments, measure or "", wide))
    if counted:
        panels.append(lambda axes, wide: _paint_rows(axes, moments))
    if not panels or len(moments) < 2:
        return None
    ratios = [2.4, 1] if len(panels) == 2 else [1]

    def paint(figure: Figure, wide: bool) -> None:
        grid: Any = figure.subplots(
            len(panels), sharex=True, squeeze=False, height_ratios=ratios if valued else None
        )
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            panel(axes, wide)
        _date_axis(grid[-1, 0], [m.time for m in moments], 6 if wide else 3)

    values = [m.value for m in moments if m.value is not None]
    label = f"History of {len(moments)} runs"
    if values:
        label += f": {measure} from {number(values[0])} to {number(values[-1])}"
    return _chart("history", label, paint, 150 + 100 * len(panels))


def _paint_values(axes: Axes, moments: Sequence[Moment], measure: str, wide: bool) -> None:
    times = np.array([m.time for m in moments])
    values = np.array([np.nan if m.value is None else m.value for m in moments])
    tried = np.array([np.nan if m.tried is None else m.tried for m in moments])
    champion = np.array([m.champion for m in moments])
    measured = np.array([m.measured for m in moments]) & ~champion
    axes.step(times, values, where="post", color=_ACCENT, linewidth=2)
    marks: list[tuple[str, Any, dict[str, Any]]] = [
        ("measured", measured, {"marker": "o", "color": _ACCENT, "markersize": 4}),
        ("new refiner", champion, {"marker": "o", "color": _GOOD, "markersize": 9}),
    ]
    for name, where, look in marks:
        known = where & np.isfinite(values)
        if known.any():
            axes.plot(times[known], values[known], linestyle="", label=name, mew=0, **look)
    if np.isfinite(tried).any():
        axes.plot(times, tried, "x", color=_WARN, markersize=7, mew=2, label="tried, not written")
    for place, moment in enumerate(m for m in moments if m.restored):
        label = "rolled back" if place == 0 else None
        axes.axvline(moment.time, color=_BAD, linewidth=1, dashes=(4, 3), label=label)
    axes.set_ylabel(measure)
    axes.yaxis.set_major_locator(_ticks(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("0.", ".", 1))
    axes.margins(y=0.12)
    axes.grid(axis="y")
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4 if wide else 2,
            borderaxespad=0.2,
            handletextpad=0.4,
            columnspacing=1.4,
            fontsize=12,
            handlelength=1,
        )


def _paint_rows(axes: Axes, moments: Sequence[Moment]) -> None:
    known = [(m.time, m.rows) for m in moments if m.rows is not None]
    times, rows = zip(*known, strict=True)
    axes.fill_between(times, rows, step="post", color=_MUTED, alpha=0.2, linewidth=0)
    axes.step(times, rows, where="post", color=_MUTED, linewidth=1.5)
    axes.set_ylabel("rows")
    axes.set_ylim(0, max(rows) * 1.15)
    axes.yaxis.set_major_locator(_ticks(3, prune="lower"))
    axes.yaxis.set_major_formatter(lambda value, _: _compact(value))
    axes.grid(axis="y")


def _date_axis(axes: Axes, times: Sequence[float], most: int) -> None:
    """Name a few of the days, or hours where all is within two days."""
    first, last = min(times), max(times)
    if last == first:
        last = first + 1
    axes.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
    hours = last - first < 2 * 86_400
    unit = 3600 if hours else 86_400
    step = unit * max(1, int(-(-(last - first) // (unit * most))))
    ticks = np.arange(-(-first // unit) * unit, last + 1, step)
    moments = [datetime.fromtimestamp(tick, timezone.utc) for tick in ticks]
    names = [f"{moment:%H:%M}" if hours else f"{moment.day} {moment:%b}" for moment in moments]
    axes.set_xticks(ticks, names)
    axes.spines.bottom.set_visible(True)


def _ticks(most: int, **how: Any) -> Any:  # noqa: ANN401 a class of an extra
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], **how)


def _short(value: float) -> str:
    """Write a tick: a sign and as many digits as it needs."""
    return "0" if abs(value) < 1e-12 else f"{value:+.3g}".replace("0.", ".", 1)


def _compact(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _chart(name: str, label: str, paint: Callable[[Figure, bool], None], height: float) -> Chart:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report") from error

    def draw(width: int) -> str:
        # Ids are hashed with the salt, so those of two charts on a page differ.
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{name}-{width}"}):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            paint(figure, width == WIDE)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return _inline(file.getvalue())

    return Chart(label=label, wide=draw(WIDE), narrow=draw(NARROW))


def _inline(svg: str) -> str:
    """Make a file of matplotlib's part of a page: no header, no address, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)  # would be the whole page's
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart, and nobody refers to them
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # before matplotlib 3.9
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # hundredths of a pixel
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
