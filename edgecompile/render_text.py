"""The report in words: how numbers are written, how foreign text is made harmless, Markdown and the terminal table.

Names in a report come from a model that somebody else may have made. On a terminal they could hold escape sequences,
in Markdown links, mentions or table bars, anywhere characters that reverse the direction of writing.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2

from edgecompile.graph import Provenance
from edgecompile.measure import P99_SAMPLES, Ratio
from edgecompile.pruning import Pruning
from edgecompile.report import CONFIDENCE, Latency, Report, SensitiveLayer, Sensitivity, error_added, status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from edgecompile.pipeline import Step
    from edgecompile.stats import Stats
    from edgecompile.target import LayerTime

ROWS = 10  # slowest layers
MOST = 50  # notes of one pass
_MINUS = "\N{MINUS SIGN}"

# -- numbers ---------------------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.{max(0, places)}f}"


def _scaled(value: float, units: Sequence[str], step: float, gap: str = " ") -> str:
    for unit in units[:-1]:
        if abs(value) < 0.9995 * step:  # else it would be written as a whole one of the next unit
            return f"{_digits(value)}{gap}{unit}".rstrip()
        value /= step
    return f"{_digits(value)}{gap}{units[-1]}"


def seconds(value: float) -> str:
    """A time with a fitting unit: ``312 µs``, ``8.12 ms``, ``1.24 s``, ``3.5 min``."""
    if value >= 100:
        return f"{value / 60:.1f} min"
    if value >= 1:
        return f"{_digits(value)} s"
    return _scaled(value * 1e9, ("ns", "µs", "ms", "s"), 1000)


def count(value: float | None) -> str:
    """A number of things: in full below 100 000, else ``6.33 M``; ``?`` if unknown."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if abs(value) < 1e5 else _scaled(value / 1e3, ("k", "M", "G", "T"), 1000)


def size(value: float) -> str:
    """Bytes with a binary unit: ``24.2 MiB``."""
    return f"{value:.0f} B" if value < 1024 else _scaled(value / 1024, ("KiB", "MiB", "GiB", "TiB"), 1024)


def error(value: float | None) -> str:
    """A relative or absolute error: ``3.1e-6``, ``0``; a dash if it was not measured."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value == 0 or 1e-3 <= value < 1e3:
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def score(value: float) -> str:
    """What ``evaluate(run)`` returned: six significant digits, no zeros at the end."""
    return f"{_MINUS if value < 0 else ''}{abs(value):.6g}"


def decibels(value: float) -> str:
    """A signal-to-noise ratio."""
    return f"{value:.0f} dB".replace("-", _MINUS) if math.isfinite(value) else "∞ dB" if value > 0 else f"{_MINUS}∞ dB"


def level(value: float | None) -> str:
    """A signal-to-noise ratio to a tenth of a decibel; a dash if it was not measured."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else decibels(value)
    return f"{value:.1f} dB".replace("-", _MINUS)


def cosine(value: float) -> str:
    """A cosine, written as its distance from 1 where it is close to it."""
    return f"{value:.4f}" if value < 0.999 else "1" if value >= 1 else f"1 {_MINUS} {error(1 - value)}"


def change(before: float | None, after: float | None) -> str:
    """The relative change in percent: ``−38.8 %``; empty if unknown."""
    if not before or after is None:
        return ""
    percent = 100 * (after / before - 1)
    text = f"{percent:+.0f}" if abs(percent) >= 100 else f"{percent:+.1f}"
    if float(text) == 0:
        return "0 %" if after == before else f"{'+' if after > before else _MINUS}<0.1 %"
    return f"{text.replace('-', _MINUS)} %"


def share(part: float, whole: float) -> str:
    """A part in percent of the whole."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def ratio(value: Ratio) -> str:
    """Time over time with its interval if it has one: ``0.704 (0.690–0.721)``."""
    interval = f" ({value.low:.3f}–{value.high:.3f})" if value.confidence >= CONFIDENCE else ""
    return f"{value.value:.3f}{interval}"


def speedup(value: Ratio) -> tuple[str, str]:
    """Speed over speed, the reciprocal of a ratio of times, and what is known of it: ``95 % interval 1.39–1.45×``."""
    speed = f"{1 / value.value:.2f}×"
    if value.confidence < CONFIDENCE:
        return speed, "too few pairs for an interval"
    return speed, f"95 % interval {1 / value.high:.2f}–{1 / value.low:.2f}×"


def shape(dims: Sequence[Any] | None) -> str:
    """A shape: ``1×3×224×224``."""
    return "any rank" if dims is None else "×".join("?" if d is None else str(d) for d in dims) or "scalar"


def facts(values: Mapping[str, Any]) -> str:
    """A mapping on one line, without what is unknown or absent."""
    return ", ".join(_fact(key, value) for key, value in values.items() if value not in ("", None, False, [], ()))


def _fact(key: str, value: Any) -> str:
    if value is True:
        return key
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{key.removesuffix('_bytes')} {size(value)}"
    return f"{key} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def plural(number: int, word: str) -> str:
    """``1 note``, ``2,345 notes``."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def summary(step: Step) -> str:
    """The rewrites of a pass, counted by kind: what follows the first comma is a figure of one of them."""
    kinds = Counter(r.what.partition(", ")[0] for r in step.rewrites)
    return ", ".join(f"{what} ({n}×)" if n > 1 else what for what, n in kinds.items())


# -- foreign text ----------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """``text`` on one line, with control, format and unassigned characters written as escapes."""
    return "".join(
        c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode()
        for c in re.sub(r"[ \t\r\n\f\v\x85\u2028\u2029]+", " ", text)
    )


def code(text: str) -> str:
    """``text`` as a Markdown code span, in which nothing is a link, a mention or markup."""
    text = clean(str(text))
    if not text:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def cell(text: str) -> str:
    """:func:`code` for a cell of a Markdown table.

    A bar is escaped; backslashes right before it are dropped, since Markdown dialects disagree about them.
    """
    return re.sub(r"\\*\|", r"\\|", code(text))


def words(text: str) -> str:
    """Our own words in Markdown, with everything escaped that could be markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", clean(text))


def shorten(text: str, width: int) -> str:
    """``text`` cut in the middle to ``width`` characters, for places that cannot wrap."""
    return text if len(text) <= width else f"{text[: (width - 1) // 2]}…{text[len(text) - width // 2 :]}"


# -- Markdown --------------------------------------------------------------------------------------------------------

_MARKS = {"good": "✅", "bad": "❌", "warn": "⚠️", "info": "ℹ️"}


def markdown(report: Report) -> str:
    """The report for a job summary or a pull request (GitHub-flavoured Markdown)."""
    return _environment().get_template("report.md.j2").render(report=report, most=MOST, **helpers())


def helpers() -> dict[str, Any]:
    """What both templates may call."""
    return {
        "added": error_added, "change": change, "chosen": chosen, "clean": clean, "cosine": cosine, "count": count,
        "db": decibels, "error": error, "facts": facts, "how": how, "label": label, "marks": _MARKS,
        "plural": plural, "ratio": ratio, "seconds": seconds, "sensitive_columns": sensitive_columns,
        "sensitive_row": sensitive_row, "shape": shape, "share": share, "size": size,
        "slowest": slowest, "status": status, "summary": summary, "timed_after": timed_after, "total": total,
        "pruned": pruned, "pruned_columns": PRUNED, "pruned_rows": pruned_rows,
        "pruned_curve_columns": PRUNED_CURVE, "pruned_curve": pruned_curve,
        "tradeoff_columns": TRADEOFF, "tradeoff_rows": tradeoff_rows,
    }  # fmt: skip


def how(latency: Latency) -> str:
    """How the latency was measured, in one sentence."""
    threads = f", {plural(latency.threads, 'thread')}" if latency.threads else ""
    calls = f"{plural(latency.engine.calls, 'call')} of the engine and {latency.plain.calls:,} of the plain export"
    pairs = f"{plural(latency.ratio.rounds, 'pair')} of fresh sessions"
    return f"Measured interleaved in one run, {pairs}: {latency.clock_name} per call{threads}, {calls}."


def timed_after(report: Report) -> list[tuple[float, Ratio] | None]:
    """After each pass: median latency in seconds, and its ratio to the plain export.

    None where the pass left the graph alone or it was not measured.
    """
    if report.latency is None:
        return [None] * len(report.passes)
    stages = list(report.latency.stages)
    last = max((i for i, s in enumerate(report.passes) if s.rewrites), default=-1)
    found: list[tuple[float, Ratio] | None] = []
    for number, step in enumerate(report.passes):
        if number == last:
            found.append((report.latency.engine.p50, report.latency.ratio))
        elif stages and step.rewrites and stages[0].after == step.spec:
            stage = stages.pop(0)
            found.append((stage.p50, stage.ratio))
        else:
            found.append(None)
    return found


def label(layer: LayerTime) -> str:
    """How to name a layer to a person: by its modules, else by the engine's own name for it."""
    return Provenance(layer.modules).module or layer.name


def chosen(found: Sensitivity) -> str:
    """The choice of layers for int8 or another form, in a few sentences."""
    kept = sum(not row.reverted for row in found.layers)
    said = f"{kept} of {plural(len(found.layers), 'layer')} are {found.form}: {level(found.snr)} on calibration data"
    if kept < len(found.layers):
        said += f", {level(found.whole)} with all of them"
    if found.score is not None and found.base is not None:
        said += f"; score {score(found.score)} of {score(found.base)}"
    said += "."
    if not found.holds:
        said += " The budget does not hold: the time for reverting layers ran out."
    if not found.finished:
        said += " The time ran out before all layers were measured."
    return said


def sensitive_columns(found: Sensitivity) -> tuple[str, ...]:
    """The columns of the table of sensitive layers after the layer; a score and times only if there are any."""
    score_, saved = _optional(found)
    return (
        "bits", f"SNR, only it {found.form}", "SNR, if reverted", *(["score, if reverted"] if score_ else []),
        *(["time saved"] if saved else []), "result",
    )  # fmt: skip


def sensitive_row(row: SensitiveLayer, found: Sensitivity) -> tuple[str, ...]:
    """The cells of one layer under :func:`sensitive_columns`."""
    score_, saved = _optional(found)
    return (
        str(row.bits), level(row.only_int8), level(row.only_float),
        *(["–" if row.score is None else score(row.score)] if score_ else []),
        *([_saved(row.saved)] if saved else []), "reverted" if row.reverted else found.form,
    )  # fmt: skip


def _optional(found: Sensitivity) -> tuple[bool, bool]:
    return any(r.score is not None for r in found.layers), any(r.saved is not None for r in found.layers)


def _saved(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{_MINUS if value < 0 else ''}{seconds(abs(value) / 1e6)}"


TRADEOFF = ("form of the layers", "weights", "of float32", "SNR of the layers", "energy", "p50")


def tradeoff_rows(report: Report) -> list[tuple[str, ...]]:
    """The cells of the trade-off under :data:`TRADEOFF`; the time only of what was timed: before the pass and after."""
    if report.tradeoff is None:
        return []
    timed = timed_after(report)
    last = max((i for i, s in enumerate(report.passes) if s.rewrites and s.spec.startswith("shift_add")), default=-1)
    after = timed[last] if last >= 0 else None
    before = next((t for t in reversed(timed[: max(last, 0)]) if t), None)
    start = before[0] if before else report.latency.plain.p50 if report.latency else None
    plain = report.tradeoff.points[0]
    rows = []
    for point in report.tradeoff.points:
        time = start if point is plain else after[0] if point.chosen and after else None
        rows.append(
            (
                f"{point.label} (built)" if point.chosen else point.label, size(point.bytes),
                f"{point.bytes / plain.bytes:.3f}", level(point.snr),
                "–" if point.picojoules is None else joules(point.picojoules),
                "not measured" if time is None or after is None else seconds(time),
            )
        )  # fmt: skip
    return rows


def pruned(found: Pruning) -> str:
    """What channel pruning did, in a few sentences."""
    cut = sum(g.after < g.before for g in found.groups)
    whole = sum(bool(g.reason) for g in found.groups)
    said = f"{cut} of {plural(len(found.groups), 'group')} of channels are narrower, {whole} cannot be; "
    said += f"{share(found.parameters, 1)} of the parameters are left"
    if found.latency is not None:
        asked = f", {found.target:g} was asked for" if found.goal == "latency" else ""
        said += f", and {ratio(found.latency)} of the latency before the cut{asked}"
    said += f". Outputs: {level(found.snr)}"
    if found.unrepaired is not None:
        said += f", {level(found.unrepaired)} before the repair"
    return f"{said}. Importance by {found.score}."


PRUNED = ("before", "after", "importance kept", "time saved")


def pruned_rows(found: Pruning) -> list[tuple[str, ...]]:
    """Name and the cells under :data:`PRUNED` of the groups that were cut, those that save most first."""
    cut = sorted((g for g in found.groups if g.after < g.before), key=lambda g: (-(g.saved or 0.0), g.kept))
    return [(g.name, str(g.before), str(g.after), share(g.kept, 1), _saved(g.saved)) for g in cut]


PRUNED_CURVE = ("parameters", "importance kept", "SNR before repair")


def pruned_curve(found: Pruning) -> list[tuple[str, ...]]:
    """The share of the goal and the cells under :data:`PRUNED_CURVE`."""
    return [
        (f"{p.cost:.2f}{' (built)' if p.chosen else ''}", share(p.parameters, 1), share(p.kept, 1), level(p.snr))
        for p in found.curve
    ]


def joules(picojoules: float) -> str:
    """An energy with its unit."""
    value, unit = next(((picojoules / f, u) for f, u in ((1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ")) if picojoules >= f),
                       (picojoules, "pJ"))  # fmt: skip
    return f"{value:.3g} {unit}"


def slowest(report: Report) -> list[Any]:
    """The layers that take longest."""
    return sorted(report.layers, key=lambda layer: -layer.microseconds)[:ROWS]


def total(parts: Iterable[Any]) -> float:
    """Sum of ``microseconds`` of layers or modules."""
    return math.fsum(part.microseconds for part in parts)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template),
        autoescape=False,  # this is not HTML: in the template every foreign string goes through code or cell
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(helpers(), code=code, cell=cell, words=words)
    return environment


def template(name: str) -> str:
    """The text of a template of this package."""
    return resources.files("edgecompile").joinpath(f"templates/{name}").read_text(encoding="utf-8")


# -- terminal --------------------------------------------------------------------------------------------------------

_STYLES = {"good": "bold green", "bad": "bold red", "warn": "yellow", "info": "default"}
_WORDS = {"good": "ok", "bad": "FAILED", "warn": "warning", "info": "note"}
_ASCII = {"×": "x", "µ": "u", "–": "-", _MINUS: "-", "…": "...", "∞": "inf", "→": "->", "≤": "<="}


def print_table(report: Report, console: Console) -> None:
    """Print the verdict, then what each pass did, parity, latency and the slowest layers.

    Without a terminal, or with ``NO_COLOR``, the text says everything that colours say.
    """
    screen = Screen(console)
    screen.say((f"{report.model.name} → {report.engine.target} {report.provenance.precision}", "bold"))
    for line in report.verdict:
        said = f" {line.text} {line.detail}" if line.detail else f" {line.text}"
        screen.say((f"{_WORDS[line.level]}:", _STYLES[line.level]), (said, ""))
    _print_passes(report, screen)
    _print_parity(report, screen)
    if report.latency:
        _print_latency(report.latency, screen)
    if report.sensitivity and report.sensitivity.measured:
        _print_sensitivity(report.sensitivity, screen)
    if report.tradeoff:
        screen.table("Error against bytes and energy of coded layers", TRADEOFF, tradeoff_rows(report))
        screen.say((f"energy: {report.tradeoff.source}", ""))
    if report.pruning:
        _print_pruning(report.pruning, screen)
    if report.layers:
        _print_layers(report, screen)


class Screen:
    """A console that shows foreign text as it is: no markup, no control characters, nothing it cannot encode."""

    def __init__(self, console: Console):
        self.console = console

    def text(self, value: str, style: str = "") -> Text:
        """``value`` made harmless."""
        from rich.text import Text

        value = clean(value)
        if "utf" not in self.console.encoding.lower():
            value = "".join(_ASCII.get(c, c) for c in value).encode("ascii", "backslashreplace").decode()
        return Text(value, style, overflow="fold")

    def say(self, *parts: tuple[str, str]) -> None:
        """Print one line of parts, each with its style."""
        from rich.text import Text

        self.console.print(Text.assemble(*(self.text(*part) for part in parts), overflow="fold"))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
        """Print a table whose first ``left`` columns are text and fold; the others are numbers."""
        from rich import box
        from rich.table import Table

        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for number, name in enumerate(columns):
            word = number < left
            made.add_column(self.text(name), justify="left" if word else "right", overflow="fold", no_wrap=not word)
        for row in rows:
            made.add_row(*map(self.text, row))
        self.console.print()
        self.say((title, "bold"))
        self.console.print(made)


def _print_passes(report: Report, screen: Screen) -> None:
    if not report.passes:
        screen.say(("", ""))
        screen.say(("No pass was run.", ""))
        return
    latency = report.latency

    def row(name: str, did: str, stats: Stats, added: str, time: str) -> tuple[str, ...]:
        sizes = (count(stats.nodes), count(stats.parameters), count(stats.macs), size(stats.bytes))
        return (name, did, *sizes, added, time)

    rows = [row("plain export", "", report.before, "", "1" if latency else "")]
    for step, timed in zip(report.passes, timed_after(report), strict=True):
        did = "rolled back" if step.failure else str(len(step.rewrites) or "none")
        added = error(error_added(step)) if step.rewrites else ""
        rows.append(row(step.spec, did, step.after, added, f"{timed[1].value:.3f}" if timed else ""))
    names = ("nodes", "parameters", "macs", "bytes")
    changes = [change(getattr(report.before, n), getattr(report.after, n)) for n in names]
    rows.append(("change", "", *changes, "", change(1, latency.ratio.value) if latency else ""))
    columns = ("graph after", "rewrites", "nodes", "params", "MACs", "weights", "error", "time")
    title = "Passes (time relative to the plain export)" if latency else "Passes"
    screen.table(title, columns, rows)


def _print_parity(report: Report, screen: Screen) -> None:
    if not report.parity.outputs:
        return
    allowed = report.parity.tolerance
    rows = [
        (
            name, error(e.max_abs), error(e.max_rel), error(max(0.0, 1 - e.cosine)), decibels(e.snr_db),
            "ok" if report.parity.allows(e) else "FAILED",
        )
        for name, e in report.parity.outputs.items()
    ]  # fmt: skip
    least = "" if report.parity.min_snr is None else f" and {decibels(report.parity.min_snr)}"
    title = f"Parity with {report.parity.reference} (max rel {error(allowed)}{least} allowed)"
    screen.table(title, ("output", "max abs", "max rel", "1 − cosine", "SNR", "result"), rows)


def _print_latency(latency: Latency, screen: Screen) -> None:
    threads = f", {plural(latency.threads, 'thread')}" if latency.threads else ""
    rows = [
        (
            arm.label, f"{arm.calls:,}", seconds(arm.p50), seconds(arm.p90),
            f"n < {P99_SAMPLES}" if arm.p99 is None else seconds(arm.p99), seconds(arm.mean), against,
        )
        for arm, against in ((latency.plain, "1"), (latency.engine, ratio(latency.ratio)))
    ]  # fmt: skip
    title = f"Latency: {latency.clock_name}{threads}, arms interleaved in one run"
    screen.table(title, ("", "calls", "p50", "p90", "p99", "mean", "time / plain"), rows)


def _print_sensitivity(found: Sensitivity, screen: Screen) -> None:
    rows = [(row.layer, *sensitive_row(row, found)) for row in found.layers[:ROWS]]
    more = f"; {len(rows)} of {len(found.layers)} rows" if len(rows) < len(found.layers) else ""
    title = f"Layers most sensitive to {found.form} ({chosen(found)}{more})"
    screen.table(title, ("layer", *sensitive_columns(found)), rows)


def _print_pruning(found: Pruning, screen: Screen) -> None:
    rows = pruned_rows(found)
    more = f"; {ROWS} of {len(rows)} rows" if len(rows) > ROWS else ""
    screen.table(f"Channels pruned ({pruned(found)}{more})", ("group", *PRUNED), rows[:ROWS])
    if found.curve:
        screen.table(f"Error against {found.goal}, on the path of the search", (found.goal, *PRUNED_CURVE),
                     pruned_curve(found))  # fmt: skip


def _print_layers(report: Report, screen: Screen) -> None:
    whole = total(report.layers)
    rows = [(label(x), x.op, seconds(x.microseconds / 1e6), share(x.microseconds, whole)) for x in slowest(report)]
    title = f"Slowest of {plural(len(report.layers), 'layer')} ({seconds(whole / 1e6)} in all under the profiler)"
    screen.table(title, ("module", "op", "time", "share"), rows, left=2)
