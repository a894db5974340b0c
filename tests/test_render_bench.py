"""The result of ``bench`` for people: what it says, and that names from a model stay text wherever they are shown."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import unicodedata
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from edgecompile import measure, render_bench, render_text
from edgecompile.bench import BenchResult, ColdStart, Memory
from edgecompile.errors import InputError
from edgecompile.measure import Samples
from edgecompile.roofline import LayerCost, LayerTable, Level, ModuleCost, Roofline
from edgecompile.target import EngineManifest

PEAKS = Roofline(
    1, 120e9, "ONNX Runtime MatMul 384", 480e9, "ONNX Runtime QLinearConv",
    (Level("L2", 1 << 20, 200e9), Level("L3", 32 << 20, 120e9), Level("memory", None, 40e9)),
)  # fmt: skip


def samples(clock: str, median: float, calls: int = 100) -> Samples:
    rng = np.random.default_rng(3)
    runs = [
        Samples("net", clock, median * (1 + 0.01 * s + 0.01 * rng.standard_normal(calls)), 1, np.zeros(calls, int),
                5e-7, (0.31, 0.84))
        for s in range(6)
    ]  # fmt: skip
    return measure.joined(runs)


def layers() -> LayerTable:
    costs = [
        LayerCost("conv0", "Conv", ("stem.conv", "stem.act"), 400e-6, 12_000_000, 40_000, 600_000, 100e-6, 5e-6),
        LayerCost("reorder", "ReorderOutput", ("stem.conv",), 80e-6, 0, 0, 0, 0.0, 0.0),
        LayerCost("gemm", "Gemm", ("head.l",), 50e-6, 320_000, 1_284_000, 5_280, 2.7e-6, 32e-6),
        LayerCost("lucky", "Conv", ("body.conv",), 9e-6, 1_200_000, 4_000, 6_000, 10e-6, 1e-6),
        LayerCost("add", "Add", (), 20e-6, 0, 0, 400_000, 0.0, 10e-6),
    ]
    costs.sort(key=lambda c: -c.gap)
    modules = [
        ModuleCost("stem", 2, 480e-6, 12_000_000, 640_000, 100e-6, 380e-6),
        ModuleCost("head", 1, 50e-6, 320_000, 1_289_280, 32e-6, 18e-6),
        ModuleCost("(no module)", 1, 20e-6, 0, 400_000, 10e-6, 10e-6),
        ModuleCost("body", 1, 9e-6, 1_200_000, 10_000, 9e-6, 0.0),
    ]
    return LayerTable(PEAKS, tuple(costs), tuple(modules), 3)


def full(**changes: Any) -> BenchResult:
    made = BenchResult.of(
        "net", EngineManifest("ort", ("model.ort.onnx",), {"onnxruntime": "1.31.1"}, "x86_64 avx2"),
        {"thread_cpu": samples("thread_cpu", 3.6e-3), "wall": samples("wall", 4e-3)},
        seconds=5.1, wanted=0.01, machine={"cpu": "a processor", "cores": 2}, engine_bytes=25_756_671,
        memory=Memory(72_105_984, 75_722_752), cold_start=ColdStart(0.02, 0.04, 0.005), notes=("kept nowhere",),
    )  # fmt: skip
    return dataclasses.replace(made, **{"layers": layers(), "created": "2030-01-01T00:00:00+00:00", **changes})


def printed(result: BenchResult, **options: Any) -> str:
    stream = io.StringIO()
    render_bench.print_table(result, Console(file=stream, **{"width": 200, **options}))
    return stream.getvalue()


def bare() -> BenchResult:
    """From an open engine: one clock, one session, nothing else."""
    one = Samples("engine", "wall", np.array([1e-3, 1.1e-3, 1.2e-3]), 0, np.zeros(3, int))
    return BenchResult.of("engine", EngineManifest("ort", (), {}, "cpu"), {"wall": one}, seconds=0.1, wanted=0.01)


RENDERED = {"terminal": printed, "markdown": render_bench.markdown, "page": render_bench.page}


@pytest.mark.parametrize("form", RENDERED)
def test_every_form_tells_the_figures(form: str):
    text = re.sub(r"<[^>]+>|[`\\]", " ", RENDERED[form](full()))
    text = re.sub(r"\s+", " ", text)
    for fact in (
        "net", "thread CPU time", "wall-clock time", "3.69 ms", "24.6 MiB", "68.8 MiB", "65.0 ms", "0.31 → 0.84",
        "600 calls timed in 6 sessions", "kept nowhere", "120 GMAC/s", "memory 40.0 GB/s",
        "stem", "380 µs", "ReorderOutput", "nothing", "3 tensors of unknown size", "−1.00 µs", "head.l",
    ):  # fmt: skip
        assert fact in text, fact


@pytest.mark.parametrize("form", RENDERED)
def test_what_was_not_measured_is_left_out(form: str):
    text = RENDERED[form](bare())
    assert "too few calls" in text and "A p99 needs 459 calls" in text
    for absent in ("peak memory", "cold start", "engine size", "roofline", "Modules", "thread CPU time"):
        assert absent not in text, absent
    assert "unknown" in text  # three calls give no interval


def test_a_median_that_is_not_as_precise_as_asked_says_so():
    assert "the time was up first" in printed(full(wanted=1e-6))
    assert "the time was up first" not in printed(full(wanted=0.5))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.42, "0.42"), (12.34, "12.3"), (1.25e11, "125 G"), (2e10, "20.0 G")],
)
def test_rates_are_written_with_a_prefix(value: float, text: str):
    assert render_bench._rate(value) == text


def test_the_files_hold_the_three_forms(tmp_path):
    result, folder = full(), tmp_path / "new" / "folder"
    render_bench.write(result, folder, "net")
    assert {f.name for f in folder.iterdir()} == {"net.json", "net.md", "net.html"}
    assert BenchResult.from_json(json.loads((folder / "net.json").read_text())) == result
    assert (folder / "net.html").read_text() == render_bench.page(result)
    with pytest.raises(InputError, match="cannot write"):
        render_bench.write(result, folder / "net.md")


# -- the page ----------------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """Tags with the names of their attributes, whether they are balanced, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *sorted(name for name, _ in attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("result", [full(), full(layers=None), bare()], ids=["full", "no layers", "bare"])
def test_the_page_is_whole_and_loads_nothing(result: BenchResult):
    page = render_bench.page(result)
    found = Structure(page)
    assert not found.open
    assert not {"script", "link", "img", "iframe"} & {tag for tag, *_ in found.tags}
    assert "default-src 'none'" in page and not re.search(r"https?://", page)
    assert "prefers-color-scheme: dark" in page and "--engine" in page
    assert "nan" not in page and "inf%" not in page
    assert page.count("<svg") == (4 if result.layers else 2)


def bars(page: str, kind: str) -> list[tuple[float, float]]:
    """Left edge and width in percent of the bars of a class, in order."""
    svg = page.partition('id="gaps-title"')[2].partition("</svg>")[0]
    found = re.findall(rf'<rect x="([\d.]+)%"[^>]*width="([\d.]+)%"[^>]*class="{kind}"', svg)
    return [(float(x), float(w)) for x, w in found]


def test_a_bar_is_split_where_physics_ends():
    page = render_bench.page(full())
    need, loss = bars(page, "need"), bars(page, "loss")
    assert (len(need), len(loss)) == (4, 3)  # the last module has no gap
    for (left, width), (start, gap), module in zip(need, loss, layers().modules, strict=False):
        assert left == 0 and start == pytest.approx(width, abs=0.01)
        assert gap / width == pytest.approx(module.gap / module.bound, rel=0.01)
    assert sum(loss[0]) == pytest.approx(100 / 1.02, abs=0.01)


def test_a_layer_on_the_roof_is_drawn_on_the_roof():
    at_peak = LayerCost("a", "Conv", (), 1e-3, 120_000_000, 0, 1_200_000, 1e-3, 1e-4)
    at_half = dataclasses.replace(at_peak, name="b", seconds=2e-3)
    table = LayerTable(PEAKS, (at_half, at_peak), (ModuleCost("m", 2, 3e-3, 1, 1, 2e-3, 1e-3),))
    svg = str(render_bench._scatter(table))
    dots = sorted(float(y) for y in re.findall(r'cy="([\d.]+)"[^>]*class="dot"', svg))
    roofs = [(float(a), float(b)) for a, b in re.findall(r'y1="([\d.]+)" x2="100%" y2="([\d.]+)" class="roof"', svg)]
    assert len(roofs) == 1 and roofs[0][0] == roofs[0][1] == pytest.approx(dots[0], abs=0.1)
    assert dots[1] > dots[0] + 5
    assert svg.count('class="roof"') == 1 + len(PEAKS.levels)


def test_layers_without_arithmetic_have_no_roofline_picture():
    only = LayerCost("add", "Add", (), 1e-6, 0, 0, 100, 0.0, 1e-7)
    table = LayerTable(PEAKS, (only,), (ModuleCost("m", 1, 1e-6, 0, 100, 1e-7, 9e-7),))
    assert render_bench._scatter(table) is None
    assert "Efficiency gap" in render_bench.page(full(layers=table))


def test_equal_sessions_and_empty_times_can_be_drawn():
    same = measure.joined([Samples("a", "wall", np.full(5, 1e-3), 1, np.zeros(5, int))] * 6)
    result = dataclasses.replace(
        BenchResult.of("a", EngineManifest("ort", (), {}, "cpu"), {"wall": same}, seconds=1, wanted=0.1),
        layers=LayerTable(
            PEAKS, (LayerCost("a", "X", (), 0.0, 5, 0, 5, 0.1, 0.1),), (ModuleCost("m", 1, 0.0, 5, 5, 0.0, 0.0),)
        ),
    )
    Structure(render_bench.page(result))
    assert math.isfinite(result.timing.precision)


# -- foreign text ------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "</title><img src=x onerror=alert(1)>", "a|b`c``d\\|e\\\\|", "one\ntwo\r\n| x |",
    "\x1b[31mred\x1b]0;title\x07\x9b2J", "user\u202egnp.exe\u2066\u200b", "[click](javascript:x) @team #1 ![x](y)",
    "{{ 7*7 }} {% raw %}", '" onmouseover="x', "& &lt; &#60;", "\ud800", "[bold red]markup[/] [/nothing]", "x" * 400,
]  # fmt: skip


def named(name: str) -> BenchResult:
    """The full result with ``name`` in every place that foreign text can reach."""

    def rename(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            kept = {"clock", "created"}
            return dataclasses.replace(value, **{k: v if k in kept else rename(v) for k, v in fields.items()})
        if isinstance(value, dict):
            return {f"{k}{name}": rename(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(rename(v) for v in value)
        return f"{value}{name}" if isinstance(value, str) and value else value

    return rename(full())


def harmless(text: str) -> bool:
    return all(c == "\n" or unicodedata.category(c)[0] != "C" for c in text)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_changes_nothing_but_text_in_the_page(name: str):
    calm, page = Structure(render_bench.page(named("Z"))), Structure(hostile := render_bench.page(named(name)))
    assert page.tags == calm.tags
    assert harmless(hostile)
    assert any(render_text.clean(name).strip() in " ".join(t.split()) for t in page.text)


def kinds(text: str) -> list[str]:
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token.type, *(child.type for child in token.children or ())]
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_changes_nothing_but_text_in_markdown(name: str):
    text = render_bench.markdown(named(name))
    assert harmless(text)
    found = kinds(text)
    assert not {"link_open", "image", "html_inline", "html_block", "strong_open", "em_open"} & set(found)
    assert found.count("tr_open") == kinds(render_bench.markdown(named("Z"))).count("tr_open")
    assert found.count("td_open") == kinds(render_bench.markdown(named("Z"))).count("td_open")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_cannot_reach_the_terminal(name: str):
    assert harmless(printed(named(name)))
    coloured = printed(named(name), force_terminal=True, color_system="truecolor")
    assert harmless(re.sub(r"\x1b\[[0-9;]*m", "", coloured))
