"""The result of ``edgecompile bench`` for people: terminal table, Markdown, and one self-contained HTML page.

All three are made of the same tables of text. Names of modules and layers come from a model that somebody else may have
made; they are made harmless as :mod:`edgecompile.render_text` and :mod:`edgecompile.render_html` say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from edgecompile import render_html as html
from edgecompile import render_text as text
from edgecompile.bench import BenchResult, Percentile, Timing
from edgecompile.errors import InputError
from edgecompile.files import write_atomic
from edgecompile.graph import Provenance
from edgecompile.measure import P99_SAMPLES
from edgecompile.report import _CLOCKS as CLOCKS
from edgecompile.report import Arm
from edgecompile.roofline import LayerCost, LayerTable, ModuleCost, Roofline

if TYPE_CHECKING:
    from rich.console import Console

MOST_LAYERS = 20  # rows of the table; all of them are in the JSON document
MOST_MODULES = 24
_NOT_SHOWN = "too few calls"


@dataclass(frozen=True)
class Table:
    """A table of text: ``left`` columns of words, then numbers; ``hint`` is a sentence about it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    hint: str = ""


def print_table(result: BenchResult, console: Console) -> None:
    """Print the result for a person at a terminal."""
    screen = text.Screen(console)
    screen.say((_title(result), "bold"))
    for table in _tables(result):
        screen.table(table.title, table.columns, table.rows, table.left)
        if table.hint:
            screen.say((table.hint, "dim"))
    for note in result.notes:
        screen.say(("note:", "yellow"), (f" {note}", ""))


def markdown(result: BenchResult) -> str:
    """The result for a job summary or a pull request (GitHub-flavoured Markdown)."""
    lines = [f"## {text.code(_title(result))}", ""]
    for table in _tables(result):
        marks = [":--" if n < table.left else "--:" for n in range(len(table.columns))]
        lines += [f"### {text.words(table.title)}", "", *([text.words(table.hint), ""] if table.hint else [])]
        lines += [_line(map(text.words, table.columns)), _line(marks)]
        lines += [_line(text.cell(c) if n < table.left else text.words(c) for n, c in enumerate(r)) for r in table.rows]
        lines.append("")
    lines += [f"- {text.code(note)}" for note in result.notes]
    return "\n".join(lines).rstrip() + "\n"


def page(result: BenchResult) -> str:
    """One HTML page that loads nothing and needs no script."""
    table = result.layers
    return html._environment().get_template("bench.html.j2").render(
        result=result, title=_title(result), style=_style(), tiles=_tiles(result), tables=list(_tables(result)),
        distribution=_distribution(result), sessions=_sessions(result.timing),
        gaps=_gaps(table) if table and table.roofline and table.modules else None,
        roofline=_scatter(table) if table else None,
        **text.helpers(),
    )  # fmt: skip


def write(result: BenchResult, folder: Path, stem: str = "bench") -> None:
    """Write ``STEM.json``, ``STEM.md`` and ``STEM.html``; the folder is made if it is not there.

    Raises:
        InputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}", error.strerror or str(error), "choose another folder") from None
    document = json.dumps(result.to_json(), indent=1, allow_nan=False)
    for ending, content in (("json", document), ("md", markdown(result)), ("html", page(result))):
        write_atomic(folder / f"{stem}.{ending}", [content.encode()])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(result: BenchResult) -> str:
    return f"{result.name} → {result.target}"


# -- tables ------------------------------------------------------------------------------------------------------------


def _tables(result: BenchResult) -> Iterator[Table]:
    yield _latency(result)
    yield Table("What it costs", ("", "figure", "how it was measured"), tuple(_facts(result)), left=3)
    if result.layers:
        yield _modules(result.layers, text.seconds(result.timing.p50))
        yield _layers(result.layers)


def _latency(result: BenchResult) -> Table:
    columns = ["percentile"]
    for timing in result.timings:
        columns += [CLOCKS.get(timing.clock, timing.clock), "95 % interval"]
    rows = []
    for own in result.timing.percentiles:
        row = [f"p{own.q}"]
        for timing in result.timings:
            found = timing.percentile(own.q)
            row += [_NOT_SHOWN if found.value is None else text.seconds(found.value), _interval(found)]
        rows.append(tuple(row))
    rows.append(("mean", *(x for t in result.timings for x in (text.seconds(t.mean), ""))))
    timing = result.timing
    threads = f", {text.plural(result.threads, 'thread')}" if result.threads else ""
    enough = "" if result.settled else f"; {_percent(result.wanted)} was asked for, the time was up first"
    sessions = text.plural(len(timing.sessions), "session")
    hint = (
        f"{text.plural(timing.calls, 'call')} timed in {sessions}{threads}. "
        f"Median known to ±{_percent(timing.precision)}{enough}. "
        f"Medians of the sessions differ by up to {_percent(timing.spread)}."
    )
    if timing.calls < P99_SAMPLES:
        hint += f" A p99 needs {P99_SAMPLES} calls."
    return Table("Latency of one call", tuple(columns), tuple(rows), hint=hint)


def _interval(found: Percentile) -> str:
    low, high = (text.seconds(x) if math.isfinite(x) else "" for x in (found.low, found.high))
    if low and high:
        return f"{low} – {high}"
    return f"≥ {low}" if low else f"≤ {high}" if high else "unknown"


def _facts(result: BenchResult) -> Iterator[tuple[str, str, str]]:
    yield "throughput", f"{_rate(result.throughput)} calls/s", "one after the other, wall-clock time"
    if result.engine_bytes is not None:
        yield "engine size", text.size(result.engine_bytes), "the engine's files"
    if result.memory:
        over = f"over the {text.size(result.memory.baseline)} before the runtime was imported"
        yield "peak memory", text.size(result.memory.peak), f"resident set in a fresh process, {over}"
    if result.cold_start:
        parts = (("import", "imports"), ("open", "opening"), ("first call", "first_call"))
        said = " + ".join(f"{name} {text.seconds(getattr(result.cold_start, key))}" for name, key in parts)
        yield "cold start", text.seconds(result.cold_start.total), f"{said}; fresh process, files in the page cache"
    if result.phases:
        pinned = ", ".join(f"{key} {_pinned(value)}" for key, value in result.phases.pinned.items())
        for name in ("compute", "enqueue", "end_to_end"):
            how = f"{_PHASES[name]}; median of {text.plural(result.phases.calls, 'call')}, {pinned}"
            yield name.replace("_", " "), text.seconds(getattr(result.phases, name)), how
    load = " → ".join(f"{x:.2f}" for x in result.load)
    yield "load average", load, f"before and after; {result.machine.get('cores', '?')} cores"
    yield "empty call", text.seconds(result.timing.overhead), "on the same clock; contained in its figures"
    yield "measuring", text.seconds(result.seconds), "opening of sessions and warm-up included"


_PHASES = {
    "compute": "on the GPU, between CUDA events",
    "enqueue": "of the host, to launch it",
    "end_to_end": "until the host has waited for it",
}


def _pinned(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


_COST_COLUMNS = ("time", "MACs", "bytes", "MAC/B", "roofline", "share", "gap")
_PLAIN_COLUMNS = 4  # of these, where no roofline is known


def _modules(table: LayerTable, p50: str) -> Table:
    columns = _COST_COLUMNS if table.roofline else _COST_COLUMNS[:_PLAIN_COLUMNS]
    rows = tuple((m.path, str(m.layers), *_cost(m)[: len(columns)]) for m in table.modules[:MOST_MODULES])
    peak = table.roofline
    hint = f"Layer times come from the runtime's profiler; one call without it: p50 {p50}."
    if peak:
        hint = (
            f"{text.seconds(table.gap)} of {text.seconds(table.seconds)} is not explained by the roofline: "
            f"{_rate(peak.macs_per_s)}MAC/s ({peak.macs_from}), {_speed(peak)}. These are lower bounds of the true "
            f"peaks. Layer times come from the runtime's profiler in wall-clock time; one call without it: p50 {p50}."
        )
    if table.unknown:
        hint += f" {text.plural(table.unknown, 'tensor')} of unknown size not counted."
    return Table(f"Modules, {_order(table)} first", ("module", "layers", *columns), rows, hint=hint)


def _layers(table: LayerTable) -> Table:
    columns = _COST_COLUMNS if table.roofline else _COST_COLUMNS[:_PLAIN_COLUMNS]
    bound = ["bound by"] if table.roofline else []
    rows = tuple(
        (_label(c), c.op, *([c.limit] if bound else []), *_cost(c)[: len(columns)]) for c in table.layers[:MOST_LAYERS]
    )
    more = len(table.layers) - len(rows)
    hint = f"{more} more in the JSON document." if more else ""
    return Table(
        f"Layers, {_order(table)} first", ("layer", "op", *bound, *columns), rows, left=2 + len(bound), hint=hint
    )


def _order(table: LayerTable) -> str:
    return "largest gap" if table.roofline else "longest"


def _cost(cost: LayerCost | ModuleCost) -> tuple[str, ...]:
    return (
        text.seconds(cost.seconds), text.count(cost.macs), text.size(cost.bytes), _rate(cost.intensity),
        text.seconds(cost.bound), _percent(cost.efficiency), _signed(cost.gap),
    )  # fmt: skip


def _label(cost: LayerCost) -> str:
    return Provenance(cost.modules).module or cost.name


def _speed(peak: Roofline) -> str:
    return ", ".join(f"{x.name} {_rate(x.bytes_per_s)}B/s" for x in peak.levels)


def _signed(seconds: float) -> str:
    return text.seconds(seconds) if seconds >= 0 else f"{text._MINUS}{text.seconds(-seconds)}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "unknown"


def _rate(value: float) -> str:
    """Three digits with a decimal prefix: ``125 G``, ``0.42``."""
    if value < 1:
        return f"{value:.2g}"
    return text._scaled(value, ("", "k", "M", "G", "T", "P"), 1000)


# -- page --------------------------------------------------------------------------------------------------------------


@cache
def _style() -> Markup:
    """The style sheet of the build report, so that the two pages look alike."""
    found = re.search(r"<style>.*?</style>", text.template("report.html.j2"), re.DOTALL)
    return Markup(found[0] if found else "")


def _tiles(result: BenchResult) -> list[html._Tile]:
    timing = result.timing
    level = "info" if result.settled else "warn"
    p50 = timing.percentile(50)
    tiles = [
        html._Tile(
            "p50", text.seconds(timing.p50), level, f"{_interval(p50)} · {CLOCKS.get(timing.clock, timing.clock)}"
        ),
        html._Tile(
            "Throughput", f"{_rate(result.throughput)} /s", "info", "calls per second of wall time, one after the other"
        ),
    ]
    if result.memory:
        tiles.append(html._Tile("Peak memory", text.size(result.memory.peak), "info", "growth in a fresh process"))
    if result.cold_start:
        tiles.append(
            html._Tile("Cold start", text.seconds(result.cold_start.total), "info", "import, open, first call")
        )
    if result.layers and result.layers.roofline and result.layers.seconds:
        gap, whole = result.layers.gap, result.layers.seconds
        detail = f"{text.seconds(gap)} of {text.seconds(whole)} under the profiler"
        tiles.append(html._Tile("Not explained by physics", text.share(gap, whole), "info", detail))
    return tiles


def _distribution(result: BenchResult) -> Markup:
    """Histograms of the clocks over one axis, one above the other."""
    kinds = ("engine", "plain")
    arms = [
        Arm(
            CLOCKS.get(t.clock, t.clock), t.calls, t.p50, t.percentile(90).value or 0.0, t.percentile(99).value,
            t.mean, t.samples,
        )
        for t in result.timings
    ]  # fmt: skip
    samples = [np.asarray(a.samples) for a in arms]
    low, high = min(float(s.min()) for s in samples), max(map(html._right_edge, samples))
    margin = max(0.04 * (high - low), 0.005 * high)
    low, high = max(0.0, low - margin), high + margin
    shapes: list[Markup] = []
    for number, (arm, values) in enumerate(zip(arms, samples, strict=True)):
        shapes += html._histogram(arm, values, low, high, 130 * number, kinds[number])
    scale, unit = next(((f, u) for f, u in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")) if high * f < 1000), (1.0, "s"))
    ticks = [(100 * (t / scale - low) / (high - low), f"{t:g}") for t in html._ticks(low * scale, high * scale, 6)]
    bottom = 130 * len(arms)
    axis = html._axis(ticks, bottom, f"one call, {unit}", 16)
    beyond = sum(int((s > high).sum()) for s in samples)
    if beyond:
        note = f"{beyond} of {sum(map(len, samples)):,} are beyond the right edge"
        shapes.append(html._text(note, 50, bottom + 46, "tick", "middle"))
    told = "; ".join(f"{a.label}: p50 {text.seconds(a.p50)}, p90 {text.seconds(a.p90)}" for a in arms)
    return html._figure("distribution", "Distribution of latency", told, bottom + 52, axis, *shapes)


def _sessions(timing: Timing) -> Markup:
    """The median of each session, over the interval of the median of them all."""
    medians = [s.p50 for s in timing.sessions]
    p50 = timing.percentile(50)
    ends = [x for x in (p50.low, p50.high) if math.isfinite(x)]
    low, high = min([*medians, *ends]), max([*medians, *ends])
    margin = max(0.08 * (high - low), 0.002 * high)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    bottom = 12 * len(medians) + 8
    shapes = [html._bar(place(ends[0]), place(ends[1]), 0, bottom, "band")] if len(ends) == 2 else []
    shapes.append(html._line(place(timing.p50), 0, place(timing.p50), bottom, "mark"))
    for number, session in enumerate(timing.sessions):
        tip = f"session {number + 1}: {text.seconds(session.p50)}, {text.plural(session.calls, 'call')}"
        x, y = html._percent(place(session.p50)), f"{12 * number + 10:g}"
        shapes.append(html._tag("circle", html._tag("title", tip), cx=x, cy=y, r="4", class_="engine"))
    scale, unit = next(((f, u) for f, u in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")) if high * f < 1000), (1.0, "s"))
    ticks = [(place(t / scale), f"{t:.6g}") for t in html._ticks(low * scale, high * scale, 5)]
    axis = html._axis(ticks, bottom, f"median of a session, {unit}", 0)
    told = f"{len(medians)} sessions, medians from {text.seconds(min(medians))} to {text.seconds(max(medians))}"
    return html._figure("sessions", "Sessions", told, bottom + 36, axis, *shapes)


def _gaps(table: LayerTable) -> Markup:
    """One row per module: what physics needs, then what it does not."""
    rows = table.modules[:MOST_MODULES]
    top = 1.02 * max(m.seconds for m in rows) or 1.0
    shapes: list[Markup] = []
    told = []
    y = 0.0
    for number, module in enumerate(rows):
        y = 34 * number
        split, end = 100 * module.bound / top, 100 * module.seconds / top
        needed, lost = text.seconds(module.bound), text.seconds(module.gap)
        if module.bound > 0:
            shapes.append(html._bar(0, split, y + 20, 11, "need", f"{module.path}: physics needs {needed}"))
        if module.gap > 0:
            shapes.append(html._bar(split, end, y + 20, 11, "loss", f"{module.path}: gap {lost}"))
        said = f"gap {lost} · {_percent(module.efficiency)}"
        shapes += html._row_text(module.path, said, y + 14)
        told.append(f"{module.path}: {text.seconds(module.seconds)}, gap {lost}")
    bottom = y + 40
    scale, unit = next(((f, u) for f, u in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")) if top * f < 1000), (1.0, "s"))
    ticks = [(100 * t / scale / top, f"{t:g}") for t in html._ticks(0, top * scale, 5)]
    axis = html._axis(ticks, bottom, f"time under the profiler, {unit}", 0)
    return html._figure("gaps", "Efficiency gap by module", "; ".join(told), bottom + 36, axis, *shapes)


def _scatter(table: LayerTable) -> Markup | None:
    """Attained rate over arithmetic intensity, both logarithmic, under the measured roofs."""
    points = [c for c in table.layers if c.macs and c.bytes and c.seconds > 0]
    peak = table.roofline
    if not points or peak is None:
        return None
    height = 320
    xs = [c.intensity for c in points]
    bends = [peak.macs_per_s / level.bytes_per_s for level in peak.levels]  # all of them belong in the picture
    left = math.floor(math.log10(min(*xs, 0.5 * min(bends))))
    right = math.ceil(math.log10(max(*xs, 2 * max(bends))))
    tallest = max(peak.macs_per_s, *(c.macs / c.seconds for c in points))
    low = math.floor(math.log10(min(c.macs / c.seconds for c in points)))
    high = math.log10(tallest) + 0.25

    def px(x: float) -> float:
        return 100 * (math.log10(x) - left) / (right - left)

    def py(y: float) -> float:
        return height * (1 - (math.log10(y) - low) / (high - low))

    shapes = [html._line(0, py(10.0**e), 100, py(10.0**e), "grid") for e in range(low, math.floor(high) + 1)]
    shapes += [
        html._text(f"{_rate(10.0**e)}MAC/s", 0, py(10.0**e) - 3, "tick") for e in range(low, math.floor(high) + 1)
    ]
    for level in peak.levels:
        start = max(10.0**left, 10.0**low / level.bytes_per_s)
        bend = peak.macs_per_s / level.bytes_per_s
        if start < bend:  # else its roof is below the picture
            shapes.append(html._line(px(start), py(start * level.bytes_per_s), px(bend), py(peak.macs_per_s), "roof"))
            middle = math.sqrt(start * bend)
            anchor = "end" if px(middle) > 12 else "start"
            shapes.append(html._text(level.name, px(middle), py(middle * level.bytes_per_s) - 6, "tick", anchor))
    first = max(10.0**left, peak.macs_per_s / peak.levels[0].bytes_per_s)
    shapes.append(html._line(px(first), py(peak.macs_per_s), 100, py(peak.macs_per_s), "roof"))
    shapes.append(html._text(f"{_rate(peak.macs_per_s)}MAC/s", 100, py(peak.macs_per_s) - 6, "tick", "end"))
    longest = max(c.seconds for c in points)
    for cost in sorted(points, key=lambda c: -c.seconds):
        tip = (
            f"{_label(cost)}, {cost.op}: {text.seconds(cost.seconds)}, {_rate(cost.intensity)} MAC/B, "
            f"{_percent(cost.efficiency)} of its roofline"
        )
        shapes.append(
            html._tag(
                "circle", html._tag("title", tip), cx=html._percent(px(cost.intensity)),
                cy=f"{py(cost.macs / cost.seconds):.1f}", r=f"{2.5 + 7 * math.sqrt(cost.seconds / longest):.1f}",
                class_="dot",
            )
        )  # fmt: skip
    every = range(left, right + 1)
    ticks = [(px(10.0**e), f"{10.0**e:g}") for e in every]
    axis = html._axis(ticks, height, "arithmetic intensity, MAC per byte", 0)
    told = f"{len(points)} layers under a roof of {_rate(peak.macs_per_s)}MAC/s; {_speed(peak)}"
    return html._figure("roofline", "Roofline", told, height + 36, axis, *shapes)
