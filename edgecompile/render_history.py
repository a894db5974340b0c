"""The history for people: a table with sparklines on a terminal, and one self-contained HTML page.

Names come from files that somebody else may have written; they are made harmless as :mod:`edgecompile.render_text` and
:mod:`edgecompile.render_html` say. A change point is a hint where to look, not a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from edgecompile import history
from edgecompile import render_html as html
from edgecompile import render_text as text
from edgecompile.history import ChangePoint, Entry, Trend

if TYPE_CHECKING:
    from rich.console import Console

MOST_RUNS = 500  # of one trend on the page
LARGEST = 1e30  # what is beyond cannot be drawn to scale, and no measurement is
_SPARKS, _ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.,-~+*#"
_BREAK, _ASCII_BREAK = "│", "|"
_SPARKLINE = 24  # runs
_TOP, _BOTTOM = 26.0, 190.0  # of a picture, in pixels
_SIZES = ("_memory", "_size", "_bytes")
_TIMES = ("latency", "_time", "_seconds")


def written(metric: str, value: float) -> str:
    """A value with the unit that its metric has."""
    if not _known(value):
        return "–"
    if metric.endswith(_SIZES):
        return text.size(value)
    return text.seconds(value) if metric.startswith(_TIMES) or metric.endswith(_TIMES) else f"{value:.4g}"


def _known(value: float) -> bool:
    return abs(value) < LARGEST


def print_table(entries: Sequence[Entry], console: Console, metric: str | None = None) -> None:
    """Print each trend with a sparkline of its last runs, then its change points."""
    screen = text.Screen(console)
    trends = history.trends(entries, metric)
    if not trends:
        screen.say(("Nothing was recorded.", ""))
        return
    unicode = "utf" in console.encoding.lower()
    rows = [
        (
            _name(t), t.metric, _machine(t), sparkline(t, unicode), written(t.metric, t.values[-1]),
            text.change(t.values[0], t.values[-1]), str(len(t.entries)), str(len(t.points) or ""),
        )
        for t in trends
    ]  # fmt: skip
    columns = ("model", "metric", "machine", "last runs", "now", "since first", "runs", "changes")
    screen.table("History", columns, rows, left=4)
    for trend in trends:
        for point in trend.points:
            screen.say(("changed: ", "yellow"), (f"{_name(trend)} {told(trend, point)}", ""))


def sparkline(trend: Trend, unicode: bool = True) -> str:
    """The last runs as bars between their least and largest value, with a line where the level changed."""
    sparks, line = (_SPARKS, _BREAK) if unicode else (_ASCII_SPARKS, _ASCII_BREAK)
    first = max(len(trend.values) - _SPARKLINE, 0)
    shown = trend.values[first:]
    known = [v for v in shown if _known(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    breaks = {p.index for p in trend.points}
    drawn = []
    for index, value in enumerate(shown, first):
        height = (value - low) / (high - low) if high > low else 0.0
        bar = sparks[round(height * (len(sparks) - 1))] if _known(value) else " "
        drawn.append(line + bar if index in breaks and index > first else bar)
    return "".join(drawn)


def told(trend: Trend, point: ChangePoint) -> str:
    """A change point in words: ``latency_p50 4.1 ms → 4.4 ms (+6.8 %) from 2026-11-03, commit 1a2b3c4d``."""
    entry = trend.entries[point.index]
    levels = f"{written(trend.metric, point.before)} → {written(trend.metric, point.after)}"
    said = f"{trend.metric} {levels} ({text.change(point.before, point.after)}) from {entry.when:%Y-%m-%d %H:%M}"
    return f"{said}, commit {entry.commit[:8]}" if entry.commit else said


def _name(trend: Trend) -> str:
    first = trend.entries[0]
    return f"{first.model} {first.target} {first.precision}"


def _machine(trend: Trend) -> str:
    return text.shorten(trend.entries[0].fingerprint, 12) or "unknown"


# -- page --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    """A trend on the page."""

    name: str
    metric: str
    machine: str
    picture: Markup
    points: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page(entries: Sequence[Entry], metric: str | None = None) -> str:
    """The whole page: per trend a picture, its change points and the runs."""
    panels = [_panel(number, trend) for number, trend in enumerate(history.trends(entries, metric))]
    template = html._environment().get_template("history.html.j2")
    return template.render(panels=panels, runs=len(entries), schema=history.SCHEMA, most=MOST_RUNS)


def _panel(number: int, trend: Trend) -> _Panel:
    first = max(len(trend.entries) - MOST_RUNS, 0)
    rows = []
    for entry in reversed(trend.entries[first:]):
        bounds = entry.intervals.get(trend.metric)
        interval = " – ".join(written(trend.metric, b) for b in bounds) if bounds else ""
        value = written(trend.metric, entry.values[trend.metric])
        when = f"{entry.when:%Y-%m-%d %H:%M}"
        rows.append((when, value, interval, entry.kind, entry.verdict, entry.commit[:8], entry.version))
    return _Panel(
        _name(trend), trend.metric, trend.entries[0].fingerprint or "unknown", _picture(number, trend, first),
        tuple(told(trend, point) for point in trend.points), tuple(rows),
    )  # fmt: skip


def _picture(number: int, trend: Trend, first: int) -> Markup:
    """The runs from left to right, each with its interval; levels as lines, change points as dashed ones."""
    metric, values = trend.metric, list(trend.values[first:])
    bounds = [_bounds(entry, metric) for entry in trend.entries[first:]]
    known = [v for v in (*values, *(b for pair in bounds for b in pair)) if _known(v)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def across(index: float) -> float:
        return 12 + 86 * (index / (len(values) - 1) if len(values) > 1 else 0.5)

    def down(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low)

    shapes: list[Markup] = []
    for level in html._ticks(low, high, 4):
        shapes += [html._line(12, down(level), 98, down(level), "grid")]
        shapes += [html._text(written(metric, level), 11, down(level) + 4, "tick", "end")]
    levels = [trend.points[0].before, *(p.after for p in trend.points)] if trend.points else []
    edges = [0, *(p.index - first for p in trend.points), len(values)]
    for level, (start, end) in zip(levels, pairwise(edges), strict=False):
        if end > 0:
            shapes.append(html._line(across(max(start, 0)), down(level), across(end - 1), down(level), "level"))
    for point in trend.points:
        if point.index > first:
            x = across(point.index - first - 0.5)
            kind = "worse" if point.change > 0 else "better"
            shapes.append(html._line(x, _TOP - 8, x, _BOTTOM, f"change {kind}"))
            shapes.append(html._text(text.change(point.before, point.after), x, _TOP - 12, "value", "middle"))
    shown = [(i, value) for i, value in enumerate(values) if _known(value)]
    for (i, value), (j, following) in pairwise(shown):
        shapes.append(html._line(across(i), down(value), across(j), down(following), "trend"))
    for index, value in shown:
        entry = trend.entries[first + index]
        bottom, top = bounds[index]
        if top > bottom and _known(top - bottom):
            shapes.append(html._line(across(index), down(bottom), across(index), down(top), "whisker"))
        tip = f"{entry.when:%Y-%m-%d %H:%M} · {written(metric, value)} · {entry.commit[:8] or entry.version}"
        place = {"cx": html._percent(across(index)), "cy": f"{down(value):g}", "r": "3", "class_": "run"}
        shapes.append(html._tag("circle", html._tag("title", tip), **place))
    days = [f"{entry.when:%Y-%m-%d}" for entry in (trend.entries[first], trend.entries[-1])]
    shapes += [html._line(12, _BOTTOM, 98, _BOTTOM, "axis"), html._text(days[0], 12, _BOTTOM + 16, "tick")]
    if len(values) > 1:
        shapes.append(html._text(days[1], 98, _BOTTOM + 16, "tick", "end"))
    said = [f"{len(values)} runs, last {written(metric, values[-1])}", *(told(trend, p) for p in trend.points)]
    return html._figure(f"trend-{number}", f"{_name(trend)}: {metric}", "; ".join(said), _BOTTOM + 24, *shapes)


def _bounds(entry: Entry, metric: str) -> tuple[float, float]:
    low, high = entry.intervals.get(metric, (entry.values[metric],) * 2)
    return low, high
