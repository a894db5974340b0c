"""The report as one self-contained HTML page with pictures.

The page asks for nothing outside itself (its content security policy forbids it) and needs no script. Pictures are
inline SVG whose horizontal positions are percentages and whose text keeps its size, so that they fit any width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import jinja2
import numpy as np
from markupsafe import Markup, escape

from edgecompile import render_text as text
from edgecompile.measure import Ratio
from edgecompile.pruning import Pruning
from edgecompile.report import CONFIDENCE, Arm, Latency, Report, accuracy_level, error_added
from edgecompile.target import LayerTime
from edgecompile.tradeoff import Point, Tradeoff

MOST = 500  # rewrites, and notes, of one pass
_OPS = 5  # kinds of operators with a colour of their own
_LABEL = 44  # characters of a row's label that fit on a phone


def page(report: Report) -> str:
    """The whole page."""
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report, most=MOST, tiles=_tiles(report), together=_together, waterfalls=_waterfalls(report),
        distribution=_distribution(report.latency) if report.latency else None, modules=_modules(report),
        tradeoff=_tradeoff(report.tradeoff) if report.tradeoff else [],
        pruning_curve=_pruning(report.pruning) if report.pruning else "",
        **text.helpers(),
    )  # fmt: skip


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(text.template), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_clean,
    )  # fmt: skip
    environment.filters.update(text.helpers())
    return environment


def _clean(value: object) -> object:
    """What every expression of the template goes through before it is escaped."""
    return text.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# -- SVG -------------------------------------------------------------------------------------------------------------


def _tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; strings are cleaned and escaped, a ``_`` in an attribute's name stands for ``-``."""
    written = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(_clean(str(v)))}"' for k, v in attributes.items())
    return Markup(f"<{name}{written}>{''.join(escape(_clean(c)) for c in children)}</{name}>")


def _figure(name: str, title: str, description: str, height: float, *shapes: Markup) -> Markup:
    return _tag(
        "svg", _tag("title", title, id=f"{name}-title"), _tag("desc", description, id=f"{name}-desc"), *shapes,
        width="100%", height=f"{height:g}", role="img", aria_labelledby=f"{name}-title {name}-desc",
    )  # fmt: skip


def _text(value: str, x: float, y: float, class_: str = "", anchor: str = "start") -> Markup:
    return _tag("text", value, x=_percent(x), y=f"{y:g}", class_=class_, text_anchor=anchor)


def _bar(left: float, right: float, y: float, height: float, class_: str, tip: str = "") -> Markup:
    """A rectangle between two positions in percent, at least a hairline wide."""
    left, right = min(left, right), max(left, right)
    return _tag(
        "rect", *([_tag("title", tip)] if tip else []), x=_percent(left), y=f"{y:g}",
        width=_percent(max(right - left, 0.25)), height=f"{height:g}", class_=class_,
    )  # fmt: skip


def _row_text(label: str, said: str, y: float) -> list[Markup]:
    """A label on the left, cut so that it does not run into what is said on the right."""
    label = text.shorten(text.clean(label), _LABEL - len(said))
    return [_text(label, 0, y, "label"), _text(said, 100, y, "value", "end")]


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _tag("line", x1=_percent(x1), y1=f"{y1:g}", x2=_percent(x2), y2=f"{y2:g}", class_=class_)


def _percent(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def _axis(ticks: Sequence[tuple[float, str]], y: float, label: str, top: float) -> Markup:
    """Grid lines up to ``top``, tick labels and the axis label; positions in percent."""
    parts: list[Markup] = []
    for x, name in ticks:
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        parts += [_line(x, top, x, y, "grid"), _text(name, x, y + 14, "tick", anchor)]
    return Markup("").join([*parts, _line(0, y, 100, y, "axis"), _text(label, 50, y + 30, "tick", "middle")])


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in an interval, about ``most`` of them."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _round(number: str) -> str:
    """A round number without the zeros after its decimal point."""
    return re.sub(r"\.(\d*[1-9])?0*(?!\d)", lambda m: f".{m[1]}" if m[1] else "", number)


# -- headline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """A headline figure."""

    name: str
    value: str
    level: str
    detail: str


def _tiles(report: Report) -> list[_Tile]:
    tiles = []
    latency = report.latency
    if latency:
        speed, interval = text.speedup(latency.ratio)
        times = f"p50 {text.seconds(latency.plain.p50)} → {text.seconds(latency.engine.p50)}"
        level = ("info", "bad", "good")[latency.difference]
        tiles.append(_Tile("Speed-up over plain export", speed, level, f"{times} · {interval}"))
    else:
        tiles.append(_Tile("Speed-up over plain export", "–", "info", "latency was not measured"))
    errors = [e.max_rel for e in report.parity.outputs.values()]
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e, default=None)
    tiles.append(
        _Tile(
            "Largest error", text.error(worst), "info" if not errors else "good" if report.parity.ok else "bad",
            f"of the output's largest value, against {report.parity.reference} · "
            f"{text.error(report.parity.tolerance)} allowed",
        )
    )  # fmt: skip
    if report.accuracy:
        found = report.accuracy
        against = "of eager torch there is none" if found.reference is None else f"eager {text.score(found.reference)}"
        tiles.append(
            _Tile("Accuracy", text.score(found.engine), accuracy_level(found), f"as evaluate(run) gives it · {against}")
        )
    before, after = report.before, report.after
    tiles.append(
        _Tile(
            "Graph", f"{text.count(after.nodes)} nodes", "info",
            f"{text.count(before.nodes)} as exported · "
            + (f"{text.count(after.macs)} MACs{_in_brackets(text.change(before.macs, after.macs))}"
               if after.macs is not None else "MACs unknown: some shape is not known"),
        )
    )  # fmt: skip
    tiles.append(
        _Tile(
            "Weights", text.size(after.bytes), "info",
            f"{text.size(before.bytes)} as exported{_in_brackets(text.change(before.bytes, after.bytes))} · "
            f"{text.count(after.parameters)} parameters",
        )
    )  # fmt: skip
    return tiles


def _together(words: str) -> str:
    """Keep numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|[nµm]?s|B|[KMGT]iB|[kMGT])(?!\w))", "\N{NO-BREAK SPACE}", words)


def _in_brackets(value: str) -> str:
    return f" ({value})" if value else ""


# -- picture 1: what each pass did -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row of a waterfall: ``value`` is the level after it, None if it has none of its own."""

    label: str
    value: float | None
    said: str = ""
    ratio: Ratio | None = None


def _waterfalls(report: Report) -> list[Markup]:
    if not report.passes:
        return []
    figures = []
    labels = [s.spec for s in report.passes]
    if report.latency:
        rows = [_Row("plain export", 1.0)]
        for step, timed in zip(report.passes, text.timed_after(report), strict=True):
            rows.append(_Row(step.spec, timed and timed[1].value, _silence(step), timed and timed[1]))
        unit = f"{report.latency.clock_name} / that of the plain export"
        figures.append(_waterfall("latency", "Latency", lambda ratio: f"{ratio:.3f}", rows, unit))
    for key, title, write, unit in (
        ("nodes", "Nodes", text.count, "nodes of the graph"),
        ("parameters", "Parameters", text.count, "parameters"),
        ("macs", "Multiply-accumulates", text.count, "MACs for one run"),
        ("bytes", "Weights", text.size, "size of all constants"),
    ):
        levels = [getattr(report.before, key), *(getattr(s.after, key) for s in report.passes)]
        said = ["", *(_silence(s) for s in report.passes)]
        if not all(levels):  # unknown, or nothing there to begin with
            continue
        rows = [_Row(n, v, t) for n, v, t in zip(["plain export", *labels], levels, said, strict=True)]
        figures.append(_waterfall(key, title, write, rows, unit))
    figures.append(_errors(report))
    return figures


def _silence(step) -> str:
    """Why a pass has no bar."""
    return "rolled back" if step.failure else "" if step.rewrites else "nothing to do"


def _waterfall(name: str, title: str, write: Callable[[float], str], rows: Sequence[_Row], unit: str) -> Markup:
    """One row per graph: how far each pass moved the level, from the graph as exported to the one that is lowered."""
    top = 1.02 * max(x for r in rows for x in (r.value or 0.0, r.ratio.high if r.ratio else 0.0))
    shapes: list[Markup] = []
    told = []
    level, y = rows[0].value or 0.0, 0.0
    for number, row in enumerate(rows):
        y = 34 * number
        before, level = level, level if row.value is None else row.value
        moved = text.change(before, level) if number else ""
        said = " · ".join(filter(None, (write(level), moved))) if row.value is not None else "measured with the next"
        said = row.said or said
        told.append(f"{row.label}: {said}")
        shapes.append(_bar(0, 100 * min(before, level) / top, y + 20, 10, "rest" if number else "total"))
        if level != before:
            shapes.append(_bar(100 * before / top, 100 * level / top, y + 20, 10, _kind(before, row), moved))
        if row.ratio and row.ratio.confidence >= CONFIDENCE:
            low, high = (100 * x / top for x in (row.ratio.low, row.ratio.high))
            shapes += [_line(low, y + 25, high, y + 25, "whisker")]
            shapes += [_line(x, y + 21, x, y + 29, "whisker") for x in (low, high)]
        shapes += _row_text(row.label, said, y + 14)
    bottom = y + 40
    step = 1024 ** int(math.log(top, 1024)) if write is text.size else 1
    levels = [t * step for t in _ticks(0, top / step, 4)]
    axis = _axis([(100 * t / top, _round(write(t)) if t else "0") for t in levels], bottom, unit, 0)
    return _panel(f"waterfall-{name}", title, "; ".join(told), bottom + 36, [axis, *shapes])


def _kind(before: float, row: _Row) -> str:
    """The colour of a step: saved, added, or too small for what is known of it."""
    if row.ratio and (row.ratio.confidence < CONFIDENCE or row.ratio.low <= before <= row.ratio.high):
        return "even"
    return "gain" if (row.value or 0.0) < before else "loss"


def _errors(report: Report) -> Markup:
    """Error added by each pass, and that of the engine, on a logarithmic axis."""
    rows: list[tuple[str, float | None, str]] = [
        (s.spec, error_added(s) if s.rewrites else None, _silence(s) or (s.unverified and "not compared"))
        for s in report.passes
    ]
    worst = max((e.max_rel for e in report.parity.outputs.values()), default=None)
    rows.append((f"engine against {report.parity.reference}", worst, "not compared" if worst is None else ""))
    allowed = report.parity.tolerance
    finite = [v for _, v, _ in rows if v and math.isfinite(v)] + [allowed]
    low, high = math.floor(math.log10(min(finite)) - 0.5), math.ceil(math.log10(max(finite)) + 0.5)

    def place(value: float) -> float:
        return 100 * min(1.0, max(0.0, (math.log10(value) - low) / (high - low))) if value > 0 else 0.0

    shapes, told = [], []
    y = 0.0
    for number, (label, value, said) in enumerate(rows):
        y = 34 * number
        said = said or text.error(value)
        told.append(f"{label}: {said}")
        if value:
            kind = "loss" if not value <= allowed else "total" if number == len(rows) - 1 else "rest"
            shapes += [_bar(0, place(value), y + 23, 4, kind)]
            shapes += [_tag("circle", cx=_percent(place(value)), cy=f"{y + 25:g}", r="5", class_=kind)]
        shapes += _row_text(label, said, y + 14)
    bottom = y + 40
    step = max(1, math.ceil((high - low) / 5))
    ticks = [(place(10.0**e), f"1e{e}") for e in range(low, high + 1, step)]
    axis = _axis(ticks, bottom, "largest error / largest value (dashed: allowed)", 0)
    limit = _line(place(allowed), 0, place(allowed), bottom, "limit")
    return _panel(
        "waterfall-error", "Error added", "; ".join([*told, f"allowed: {text.error(allowed)}"]), bottom + 36,
        [axis, limit, *shapes],
    )  # fmt: skip


def _panel(name: str, title: str, description: str, height: float, shapes: Iterable[Markup]) -> Markup:
    return _tag("figure", _tag("figcaption", title), _figure(name, title, description, height, *shapes))


# -- picture 2: latency distribution ---------------------------------------------------------------------------------


def _distribution(latency: Latency) -> Markup:
    """Histograms of both arms over one axis, one above the other, with their percentiles."""
    arms = (latency.plain, latency.engine)
    samples = [np.asarray(a.samples) for a in arms]
    low, high = min(float(s.min()) for s in samples), max(map(_right_edge, samples))
    margin = max(0.04 * (high - low), 0.005 * high)
    low, high = max(0.0, low - margin), high + margin
    shapes: list[Markup] = []
    told = []
    for number, (arm, values) in enumerate(zip(arms, samples, strict=True)):
        shapes += _histogram(arm, values, low, high, 130 * number, "plain" if not number else "engine")
        told.append(f"{arm.label}: p50 {text.seconds(arm.p50)}, p90 {text.seconds(arm.p90)} of {arm.calls} calls")
    beyond = sum(int((s > high).sum()) for s in samples)
    scale, unit = next(((f, u) for f, u in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")) if high * f < 1000), (1.0, "s"))
    ticks = [(100 * (t / scale - low) / (high - low), f"{t:g}") for t in _ticks(low * scale, high * scale, 6)]
    if beyond:
        note = f"{beyond} of {sum(map(len, samples)):,} calls are beyond the right edge"
        shapes.append(_text(note, 50, 306, "tick", "middle"))
        told.append(note)
    axis = _axis(ticks, 260, f"{latency.clock_name} of one call, {unit}", 16)
    return _figure("distribution", "Distribution of latency", "; ".join(told), 310, axis, *shapes)


def _right_edge(values: np.ndarray) -> float:
    """Where to cut the tail: at the 99th percentile, sooner if that is an outlier among few calls."""
    p50, p90, p99 = (float(q) for q in np.quantile(values, [0.5, 0.9, 0.99]))
    return min(p99, p90 + 5 * (p90 - p50)) if p90 > p50 else p99


def _histogram(arm: Arm, values: np.ndarray, low: float, high: float, top: float, kind: str) -> list[Markup]:
    quartiles = np.quantile(values, [0.25, 0.75])
    width = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)  # Freedman and Diaconis
    bins = int(min(120, max(30, (high - low) / width))) if width else 120
    counts, edges = np.histogram(values, bins, (low, high))
    base, tallest = top + 130, 84
    shapes = [
        _bar(place_a, place_b, base - tall, tall, kind)
        for c, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
        if (tall := tallest * int(c) / int(counts.max())) > 0
        for place_a, place_b in [(100 * (a - low) / (high - low), 100 * (b - low) / (high - low))]
    ]
    shapes.append(_line(0, base, 100, base, "axis"))
    for quantile, mark in ((arm.p50, "p50"), (arm.p90, "p90")):
        x = 100 * (quantile - low) / (high - low)
        if x <= 100:
            shapes.append(_line(x, base - tallest - 8, x, base, f"mark {mark}"))
    marks = f"p50 {text.seconds(arm.p50)} · p90 {text.seconds(arm.p90)}"
    return [*shapes, *_row_text(arm.label, marks, top + 30)]


# -- picture 3: error against bytes and energy -----------------------------------------------------------------------


def _tradeoff(found: Tradeoff) -> list[Markup]:
    """Signal-to-noise ratio of coded layers against bytes, and against energy, each relative to floating point."""
    plain, *others = found.points
    panels = [("bytes", [p.bytes / plain.bytes for p in others])]
    energies = [p.picojoules for p in others]
    if plain.picojoules and None not in energies:
        panels.append(("energy", [e / plain.picojoules for e in energies if e is not None]))
    return [_curve(name, others, shares) for name, shares in panels]


def _pruning(found: Pruning) -> Markup | str:
    """Signal-to-noise ratio of the outputs against the share of latency or parameters, on the path of the search."""
    points = [Point(f"{p.cost:.2f}", 0, p.snr, None, p.chosen) for p in found.curve if math.isfinite(p.snr)]
    shares = [p.cost for p in found.curve if math.isfinite(p.snr)]
    return _curve(found.goal, points, shares, "the original") if points else ""


def _curve(name: str, points: Sequence[Point], shares: Sequence[float], over: str = "that of float32") -> Markup:
    finite = [p.snr for p in points if math.isfinite(p.snr)] or [0.0]
    low, high = math.floor(min(finite) / 10) * 10, math.ceil((max(finite) + 1) / 10) * 10
    width, bottom = 1.25 * max(shares), 190.0
    placed = [
        (6 + 90 * share / width, bottom - 170 * (min(p.snr, high) - low) / (high - low), p)
        for share, p in sorted(zip(shares, points, strict=True), key=lambda one: (one[0], one[1].snr))
    ]
    shapes: list[Markup] = []
    for tick in range(low, high + 1, 10):
        y = bottom - 170 * (tick - low) / (high - low)
        shapes += [_line(6, y, 100, y, "grid"), _text(f"{tick} dB", 0, y - 3, "tick")]
    shapes += [_line(x1, y1, x2, y2, "axis") for (x1, y1, _), (x2, y2, _) in pairwise(placed)]
    for x, y, point in placed:
        tip = f"{point.label}: {text.level(point.snr)}"
        kind, radius = ("engine", "6") if point.chosen else ("total", "4")
        shapes.append(_tag("circle", _tag("title", tip), cx=_percent(x), cy=f"{y:g}", r=radius, class_=kind))
        label = text.shorten(text.clean(point.label), 20)
        shapes.append(_text(label, x, y - 10, "value", "end" if x > 75 else "start" if x < 20 else "middle"))
    ticks = [(6 + 90 * t / width, f"{t:g}") for t in _ticks(0.0, width)]
    told = "; ".join(f"{p.label}: {text.level(p.snr)} at {s:.3f}" for p, s in zip(points, shares, strict=True))
    axis = _axis(ticks, bottom, f"{name}, over {over}", bottom)
    title = f"Error against {name} (large: what was built)"
    return _panel(f"tradeoff-{name}", title, told, bottom + 36, [axis, *shapes])


# -- picture 4: time per layer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A row of the picture, and the table behind it: layers, each with its modules relative to ``path``."""

    path: str
    microseconds: float
    bar: Markup
    layers: Sequence[tuple[str, LayerTime]]


@dataclass(frozen=True)
class _Modules:
    """The picture: rows, legend (class and operator) and scale."""

    rows: Sequence[_Module]
    legend: Sequence[tuple[str, str]]
    longest: float
    total: float


def _modules(report: Report) -> _Modules | None:
    modules = report.modules
    if not modules:
        return None
    longest, whole = max(m.microseconds for m in modules) or 1.0, text.total(report.layers)
    times: dict[str, float] = {}
    for module in modules:
        for op, spent in module.by_op.items():
            times[op] = times.get(op, 0.0) + spent
    ops = sorted(times, key=lambda op: -times[op])
    colour = {op: f"op{i}" for i, op in enumerate(ops[:_OPS])}
    legend = [(colour[op], op) for op in ops[:_OPS]] + ([("other", "other")] if len(ops) > _OPS else [])
    rows = []
    for number, module in enumerate(modules):
        shapes, x = [], 0.0
        told = [f"{op} {text.seconds(t / 1e6)}" for op, t in module.by_op.items()]
        parts = [(colour[op], op, module.by_op.get(op, 0.0)) for op in ops[:_OPS]]
        parts.append(("other", "other", math.fsum(module.by_op.get(op, 0.0) for op in ops[_OPS:])))
        for kind, op, spent in parts:
            if spent:
                wide = 100 * spent / longest
                shapes.append(_bar(x, x + max(wide - 0.2, 0.1), 0, 14, kind, f"{op}: {text.seconds(spent / 1e6)}"))
                x += wide
        title = f"{module.path}: {text.seconds(module.microseconds / 1e6)}"
        bar = _figure(f"module-{number}", title, ", ".join(told[:8]), 14, *shapes)
        layers = [
            (", ".join(m.removeprefix(f"{module.path}.") for m in layer.modules), layer) for layer in module.layers
        ]
        rows.append(_Module(module.path, module.microseconds, bar, layers))
    return _Modules(rows, legend, longest, whole)
