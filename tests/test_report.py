"""The report: the document and its schema, what a reader is told first, and the three renderings."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import html
import io
import json
import math
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import numpy as np
import onnx
import pytest
from markdown_it import MarkdownIt
from onnx import TensorProto, helper
from rich.console import Console

from edgecompile import measure, render_html, render_text, report, stats
from edgecompile.driver import Options
from edgecompile.errors import InputError
from edgecompile.frontend import Accuracy, Attempt, Source
from edgecompile.graph import Graph
from edgecompile.measure import Ratio, Samples
from edgecompile.oracle import OutputError, compare_all, probe_feeds, run
from edgecompile.pipeline import Note, Pass, Pipeline, Rewrite, Step
from edgecompile.report import (
    Arm,
    File,
    Latency,
    Model,
    Parity,
    Port,
    Provenance,
    Report,
    SensitiveLayer,
    Sensitivity,
)
from edgecompile.stats import Stats
from edgecompile.target import EngineManifest, LayerTime
from edgecompile.tradeoff import Point, Tradeoff

# -- reports to render -----------------------------------------------------------------------------------------------


def _errors(max_rel: float) -> dict[str, OutputError]:
    return {
        "logits": OutputError(max_rel * 11.3, max_rel, 1 - max_rel**2, -20 * math.log10(max_rel / 3)),
        "features_of_the_last_stage": OutputError(0.0, 0.0, 1.0, math.inf),
    }


def _step(spec: str, before: Stats, after: Stats, rewrites: int, max_rel: float | None, **kw) -> Step:
    name = spec.partition("{")[0]
    kinds = {"clean": ("fold a constant", "drop an Identity"), "fold_norm": ("fold BatchNormalization into Conv",)}
    whats = kinds.get(name, ("merge parallel branches",))
    done = tuple(
        Rewrite(i + 1, name, whats[i % len(whats)], f"blocks{1 + i % 3}.{i // 3}.mixer.conv (Conv)")
        for i in range(rewrites)
    )
    errors = None if max_rel is None else _errors(max_rel)
    return Step(**{"spec": spec, "exact": True, "rewrites": done, "notes": (), "before": before, "after": after,
                   "errors": errors, "seconds": 0.4321, **kw})  # fmt: skip


def _samples(label: str, median: float, seed: int, calls: int = 1300) -> Samples:
    """Times as a real machine gives them: a narrow peak, a shoulder, a long tail, a slow drift."""
    rng = np.random.default_rng(seed)
    seconds = median * (1 + 0.012 * rng.standard_normal(calls) + 0.01 * np.sin(np.arange(calls) / 200))
    seconds += (rng.random(calls) < 0.12) * median * 0.06 + (rng.random(calls) < 0.02) * median * rng.exponential(
        0.4, calls
    )
    return Samples(label, "thread_cpu", seconds, 1, np.arange(calls) // 13, 41e-9, (0.31, 0.84))


def _layers() -> tuple[LayerTime, ...]:
    """About 200 layers of a four-stage network, some fused from several modules, some without a module."""
    rng = np.random.default_rng(5)
    layers = [
        LayerTime(f"patch_embed_conv_{i}", "Conv", 180.0 / (i + 1), (f"n{i}",), (f"patch_embed.{i}.c",))
        for i in range(4)
    ]
    for stage, blocks in ((1, 12), (2, 18), (3, 15)):
        for block in range(blocks):
            base = f"blocks{stage}.{block}"
            ffn = (f"{base}.ffn.pw1.c", f"{base}.ffn.pw2.c")
            scale = float(rng.uniform(5, 40)) * (1.4 if stage == 2 else 1.0)
            layers += [
                LayerTime(f"{base}/conv", "Conv", scale, (f"{base}.0",), (f"{base}.conv.m.c", f"{base}.conv.m.bn")),
                LayerTime(f"{base}/qk", "MatMul", scale * 0.7, (f"{base}.1",), (f"{base}.mixer.m",)),
                LayerTime(f"{base}/softmax", "Softmax", scale * 0.2, (f"{base}.2",), (f"{base}.mixer.m",)),
                LayerTime(f"{base}/ffn", "FusedConv", scale * 1.3, (f"{base}.3",), ffn),
            ]  # fmt: skip
    layers += [
        LayerTime("head", "Gemm", 41.0, ("n99",), ("head.l",)),
        LayerTime("pool", "GlobalAveragePool", 6.0, ("n98",), ("head.pool",)),
    ]
    layers += [LayerTime(f"ReorderOutput_token_{i}", "ReorderOutput", 3.0 + i) for i in range(9)]
    return (*layers, LayerTime("across", "Concat", 2.0, (), ("blocks1.0", "blocks2.0")))


def full(**changes) -> Report:
    """A build with everything in it: five passes, one rolled back, one with nothing to do, two outputs, long names."""
    exported = Stats(642, 6_341_228, 241_310_592, 25_411_004)
    cleaned = Stats(571, 6_341_228, 241_310_592, 25_390_120)
    folded = Stats(402, 6_320_140, 240_110_080, 25_301_888)
    merged = Stats(343, 6_298_004, 236_004_352, 25_211_392)
    notes = (
        Note("blocks3.14.ffn.pw1 (Conv)", "left alone: its output is also read by blocks3.14.mixer.m (MatMul)"),
        Note("", "4 nodes have no module path"),
    )
    plain, engine = _samples("plain export", 4.31e-3, 1), _samples("engine", 3.02e-3, 4)
    stages = (_samples("clean", 4.22e-3, 2), _samples("fold_norm{eps_limit=1e-5}", 3.31e-3, 3))
    arms = [(s.label, s) for s in (plain, *stages, engine)]
    base = Report(
        model=Model(
            "shvit_s1", "zoo",
            (Port("pixel_values", "float32", ("batch", 3, 224, 224)),),
            (Port("logits", "float32", ("batch", 1000)), Port("features_of_the_last_stage", "float32", None)),
            ("the weights are random (seed 0): no checkpoint was given",),
        ),
        provenance=Provenance(
            "edgecompile build shvit_s1 --target ort -o build/shvit_s1", "2025-03-14T09:26:53+00:00", "0.1.0", "fp32",
            "clean,fold_norm{eps_limit=1e-5},reparam,legalize,prune{ratio=0.3,align=8}", 0,
            {"torch": "2.13.0", "onnx": "1.23.0"},
            {"arch": "x86_64", "cpu": "AMD EPYC 7B13", "features": ["avx2", "fma"], "cores": 2, "hypervisor": True,
             "memory_bytes": 8_335_163_392, "governor": ""},
            {"export": 14.2, "passes": 9.81, "build": 0.634, "parity": 0.211, "measure": 21.7},
        ),
        engine=EngineManifest(
            "ort", ("engine.onnx",), {"onnxruntime": "1.31.0"}, "cpu: AMD EPYC 7B13", {"threads": 1, "level": "all"}
        ),
        export=(
            Attempt("torch.export", False, "Could not guard on the expression Eq(u0, 1)", "model.py:42", {}, 3.9),
            Attempt("torchscript", True, "", "", _errors(2.1e-7), 2.2),
        ),
        before=exported,
        after=merged,
        passes=(
            _step("clean", exported, cleaned, 71, 1.1e-9, notes=notes[1:]),
            _step("fold_norm{eps_limit=1e-5}", cleaned, folded, 169, 4.2e-7, notes=notes),
            _step("reparam", folded, merged, 59, 9.3e-7),
            _step("legalize", merged, merged, 0, 1e-9),
            _step("prune{ratio=0.3,align=8}", merged, merged, 0, 0.21, exact=False, notes=notes[:1],
                  failure="output 'logits' moved by 2.1e-01, the budget is 5.0e-02"),
        ),
        parity=Parity("eager torch", 1e-4, _errors(3.1e-6)),
        latency=Latency.of(arms),
        accuracy=Accuracy(0.7134, None, "model.py:61: RuntimeError: boom; evaluate() was called with eager torch"),
        layers=_layers(),
        files=(
            File("model.onnx", 25_411_221, hashlib.sha256(b"model").hexdigest()),
            File("engine.onnx", 25_233_018, hashlib.sha256(b"engine").hexdigest()),
        ),
        sensitivity=Sensitivity(
            18.25, 31.5, 0.7101, 0.7134, True, False,
            (
                SensitiveLayer("blocks3.14.ffn.pw1 (Conv)", 8, 19.75, 27.125, 0.7098, None, True),
                SensitiveLayer("patch_embed.0.c (Conv)", 7, 42.0, 18.5, None, 12.5, False),
                SensitiveLayer("head.l (Gemm)", 8, math.inf, None, None, -0.75, False),
            ),
        ),
        tradeoff=Tradeoff(
            (
                Point("float32", 5_242_880, math.inf, 1.1e9),
                Point("binary, 2 bits", 376_832, 8.25, 5.1e7),
                Point("binary, 3 bits", 557_056, 13.5, 7.7e7),
                Point("binary, 4 bits", 737_280, 19.125, 1.02e8, True),
            )
        ),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def empty() -> Report:
    """What ``build --no-bench --passes ''`` of a small graph leaves."""
    same = Stats(3, 0, None, 0)
    return full(
        model=Model("net.onnx", "onnx", (), (Port("y", "float32", ()),)),
        export=(), before=same, after=same, passes=(), latency=None, accuracy=None, layers=(),
        files=(), parity=Parity("the graph as given", 1e-4, {"y": OutputError(0.0, 0.0, 1.0, math.inf)}),
        sensitivity=None, tradeoff=None,
    )  # fmt: skip


def _latency(plain: float, engine: float, calls: int = 1300) -> Latency:
    arms = (_samples("plain export", plain, 1, calls), _samples("engine", engine, 4, calls))
    return Latency.of([(s.label, s) for s in arms])


VARIANTS: dict[str, Callable[[], Report]] = {
    "full": full,
    "empty": empty,
    "much faster": lambda: full(latency=_latency(9e-3, 0.7e-3)),
    "slower": lambda: full(latency=_latency(1e-3, 1.1e-3)),
    "few calls": lambda: full(latency=_latency(0.1, 0.09, 30)),
    "one call": lambda: full(latency=_latency(0.1, 0.09, 1)),
    "wrong": lambda: full(parity=Parity("eager torch", 1e-4, {"y": OutputError(math.inf, math.inf, 0.0, -math.inf)})),
    "not a number": lambda: full(
        parity=Parity("eager torch", 1e-4, {"y": OutputError(math.nan, math.nan, 0.0, math.nan)})
    ),
    "no outputs": lambda: full(parity=Parity("eager torch", 1e-4, {})),
    "less accurate": lambda: full(accuracy=Accuracy(0.71, 0.7134)),
    "no time": lambda: full(layers=tuple(dataclasses.replace(x, microseconds=0.0) for x in _layers())),
    "unknown work": lambda: full(before=Stats(642, 6_341_228, None, 25_411_004)),
}
every_variant = pytest.mark.parametrize("made", [pytest.param(v(), id=k) for k, v in VARIANTS.items()])


# -- the document ----------------------------------------------------------------------------------------------------


def _valid(document: object) -> None:
    jsonschema.Draft202012Validator(report.schema()).validate(document)


@every_variant
def test_the_document_is_strict_json_and_follows_the_schema(made: Report):
    text = json.dumps(made.to_json(), allow_nan=False)
    _valid(json.loads(text))


def test_the_schema_is_sound_and_closed_everywhere():
    schema = report.schema()
    jsonschema.Draft202012Validator.check_schema(schema)

    def objects(node: object) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for child in node.values():
                yield from objects(child)
        elif isinstance(node, list):
            for child in node:
                yield from objects(child)

    found = list(objects(schema))
    assert len(found) > 20
    for node in found:
        if "properties" in node:
            assert node["additionalProperties"] is False
            assert set(node["required"]) == set(node["properties"])
        else:
            assert isinstance(node["additionalProperties"], dict)  # a map: what it holds has a type


def _break(document: dict[str, Any], how: str) -> None:
    match how:
        case "unknown key":
            document["extra"] = 1
        case "unknown key deep inside":
            document["passes"][0]["rewrites"][0]["extra"] = 1
        case "missing key":
            del document["latency"]["plain"]["p99"]
        case "wrong type":
            document["before"]["nodes"] = "642"
        case "wrong word":
            document["parity"]["outputs"]["logits"]["snr_db"] = "infinite"
        case "made before there was accuracy":
            del document["accuracy"]
        case "accuracy is no number":
            document["accuracy"]["engine"] = "71 %"
        case "list for a map":
            document["parity"]["outputs"] = []
        case "other schema":
            document["schema"] = "edgecompile.report/2"


BREAKS = [
    "unknown key",
    "unknown key deep inside",
    "missing key",
    "wrong type",
    "wrong word",
    "made before there was accuracy",
    "accuracy is no number",
    "list for a map",
    "other schema",
]


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_document_is_refused_by_schema_and_reader(how: str):
    document = full().to_json()
    _valid(document)
    Report.from_json(document)
    _break(document, how)
    with pytest.raises(jsonschema.ValidationError):
        _valid(document)
    with pytest.raises(InputError) as caught:
        Report.from_json(document)
    assert caught.value.fix == "build the bundle again"


@pytest.mark.parametrize("document", [None, [], {}, "edgecompile.report/1", {"schema": "edgecompile.report/1"}])
def test_what_is_no_report_is_refused(document: Any):
    with pytest.raises(InputError):
        Report.from_json(document)


def test_a_document_from_before_there_was_accuracy_is_told_what_it_lacks():
    document = full().to_json()
    del document["accuracy"]
    with pytest.raises(InputError, match="report lacks or should not have accuracy"):
        Report.from_json(document)


def test_the_reader_names_the_place():
    document = full().to_json()
    document["passes"][1]["before"]["nodes"] = None
    with pytest.raises(InputError, match=r"passes\[1\]\.before\.nodes should be int"):
        Report.from_json(document)


@every_variant
def test_the_document_comes_back(made: Report):
    document = json.loads(json.dumps(made.to_json()))
    back = Report.from_json(document)
    assert back.to_json() == made.to_json()
    assert (back.passes, back.latency, back.layers, back.model) == (made.passes, made.latency, made.layers, made.model)
    assert render_html.page(back) == render_html.page(made)


def test_infinities_are_strings_and_come_back():
    made = full(parity=Parity("eager torch", 1e-4, {"a": OutputError(math.inf, math.inf, 0.0, -math.inf)}))
    written = made.to_json()["parity"]["outputs"]["a"]
    assert written == {"max_abs": "inf", "max_rel": "inf", "cosine": 0.0, "snr_db": "-inf"}
    assert Report.from_json(made.to_json()).parity == made.parity


def test_what_follows_from_the_rest_is_written_but_not_believed():
    document = full().to_json()
    assert [p["status"] for p in document["passes"]] == ["kept", "kept", "kept", "nothing to do", "rolled back"]
    assert document["parity"]["ok"] is True
    lying = copy.deepcopy(document)
    lying["parity"]["ok"] = False
    lying["verdict"] = [{"level": "bad", "text": "all is lost", "detail": ""}]
    lying["passes"][4]["status"] = "kept"
    assert Report.from_json(lying).to_json() == document


def test_numpy_values_and_foreign_objects_become_plain_json():
    made = full()
    machine = {"load": [np.float32(0.5), np.float64("inf")], "path": Path("/x"), "n": np.int64(3)}
    odd = dataclasses.replace(made, provenance=dataclasses.replace(made.provenance, machine=machine))
    assert odd.to_json()["provenance"]["machine"] == {"load": [0.5, "inf"], "path": "/x", "n": 3}
    _valid(odd.to_json())


# -- from a build ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _DropIdentity(Pass):
    """Removes Identity nodes between other nodes."""

    name: ClassVar[str] = "drop_identity"

    def run(self, graph, context):
        for node in [n for n in graph.nodes if n.op == "Identity"]:
            if context.rewrite("drop an Identity", node):
                for consumer in list(node.outputs[0].outputs):
                    consumer.inputs = [node.inputs[0] if t is node.outputs[0] else t for t in consumer.inputs]
                node.outputs.clear()
        return context.result()


def test_a_report_is_made_from_what_a_build_knows(tmp_path: Path):
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["x"], ["i"]), helper.make_node("MatMul", ["i", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
            [onnx.numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )  # fmt: skip
    given = Graph.from_proto(model)
    graph, feeds = given.copy(), probe_feeds(given)
    trace = Pipeline((_DropIdentity(),)).run(graph, feeds)
    (file := tmp_path / "model.onnx").write_bytes(b"engine")
    arms = measure.interleave(
        {"plain export": lambda: sum(range(9000)), "engine": lambda: sum(range(3000))}, "thread_cpu", seconds=0.1
    )
    reference = run(given, feeds[0])

    def made(kind: str, reference: tuple[dict[str, np.ndarray], ...]) -> Report:
        source = Source("net.onnx", kind, given, tuple(feeds), reference, (), {"onnx": onnx.__version__}, ("a note",))
        return Report.from_build(
            source=source, options=Options(seed=7), spec="drop_identity", command="edgecompile build net.onnx",
            created="2025-03-14T09:26:53+00:00", trace=trace, before=stats.count(given, feeds[0]),
            after=stats.count(graph, feeds[0]), parity=compare_all(run(given, feeds[0]), run(graph, feeds[0])),
            tolerance=1e-4, latency=list(arms.items()),
            accuracy=Accuracy(0.5, 0.5), layers=[LayerTime("MatMul", "MatMul", 1.5, ("n",), ("fc",))],
            engine=EngineManifest("ort", ("model.onnx",), {}, "cpu", {}), machine=measure.machine(),
            seconds={"passes": 0.1}, files=[file],
        )  # fmt: skip

    found = made("onnx", ())
    _valid(found.to_json())
    assert found.model.inputs == (Port("x", "float32", ("n", 4)),)
    assert (found.before.nodes, found.after.nodes, len(found.passes[0].rewrites)) == (2, 1, 1)
    assert found.files == (File("model.onnx", 6, hashlib.sha256(b"engine").hexdigest()),)
    assert found.parity.ok
    assert found.latency is not None
    assert 0.2 < found.latency.ratio.value < 0.6
    assert found.provenance.seed == 7
    assert found.accuracy == Accuracy(0.5, 0.5)
    assert found.parity.reference == "the graph as given"
    assert made("python", (reference,)).parity.reference == "eager torch"
    assert made("bundle", (reference,)).parity.reference == "the stored reference"
    found.write(tmp_path)
    assert Report.from_json(json.loads((tmp_path / "report.json").read_text())).to_json() == found.to_json()


# -- what a person reads first ---------------------------------------------------------------------------------------


def _said(made: Report) -> list[tuple[str, str]]:
    return [(line.level, f"{line.text} {line.detail}".strip()) for line in made.verdict]


def test_the_verdict_of_a_good_build():
    (parity, latency, accuracy, rolled_back, export) = _said(full())
    assert parity == (
        "good",
        "The same model: no output is off by more than 3.1e-6 of its largest value, against eager torch "
        "(1e-4 is allowed).",
    )
    assert latency[0] == "good"
    assert re.fullmatch(
        r"1\.4\d× as fast as the plain export "
        r"\(p50 3\.0\d ms against 4\.3\d ms, 95 % interval 1\.4\d–1\.4\d×, thread CPU time\)\.",
        latency[1],
    )
    assert accuracy == (
        "info",
        "Accuracy 0.7134; there is none of eager torch: model.py:61: RuntimeError: boom; evaluate() was called with "
        "eager torch",
    )
    assert rolled_back == (
        "warn",
        "A pass was rolled back; the engine is built without it: "
        "prune{ratio=0.3,align=8}: output 'logits' moved by 2.1e-01, the budget is 5.0e-02",
    )
    assert export[0] == "info"
    assert "model.py:42" in export[1]


def test_what_the_engine_says_of_itself_comes_last():
    made = full()
    assert not any("The engine:" in text for _, text in _said(made))
    options = {**made.engine.options, "_notes": ["DLA: 71 of 83 layers, 4 islands"]}
    noted = dataclasses.replace(made, engine=dataclasses.replace(made.engine, options=options))
    assert _said(noted) == [*_said(made), ("info", "The engine: DLA: 71 of 83 layers, 4 islands")]


@pytest.mark.parametrize("wrong", [2e-4, math.inf, math.nan])
def test_the_verdict_names_the_wrong_output(wrong: float):
    outputs = {"fine": OutputError(0.0, 0.0, 1.0, math.inf), "wrong": OutputError(wrong, wrong, 0.0, 0.0)}
    made = full(parity=Parity("eager torch", 1e-4, outputs))
    level, text = _said(made)[0]
    assert level == "bad"
    assert text.startswith("Not the same model")
    assert text.endswith("wrong")
    assert made.to_json()["parity"]["ok"] is False


def _ratio(low: float, high: float, confidence: float = 0.96) -> Report:
    made = full()
    assert made.latency is not None
    return full(
        latency=dataclasses.replace(made.latency, ratio=Ratio(math.sqrt(low * high), low, high, confidence, 40))
    )


@pytest.mark.parametrize(
    ("made", "level", "words"),
    [
        (_ratio(0.60, 0.80), "good", "1.44× as fast"),
        (_ratio(0.98, 1.03), "info", "as far as this run can tell"),
        (_ratio(1.10, 1.21), "warn", "Slower than the plain export: 0.87× its speed"),
        (_ratio(0.60, 0.80, 0.90), "info", "too few pairs for an interval"),
        (full(latency=None), "info", "Latency was not measured."),
    ],
)
def test_the_verdict_on_latency_follows_the_interval(made: Report, level: str, words: str):
    said = _said(made)[1]
    assert said[0] == level
    assert words in said[1]


@pytest.mark.parametrize(
    ("engine", "reference", "level", "words"),
    [
        (0.713, 0.712, "good", "Accuracy 0.713, eager 0.712."),
        (0.712, 0.712, "good", "Accuracy 0.712, eager 0.712."),
        (0.712, 0.713, "warn", "Less accurate than eager torch: accuracy 0.712, eager 0.713."),
        (-2.0, -1.0, "warn", "Less accurate than eager torch: accuracy −2, eager −1."),
        (-1.0, -2.0, "good", "Accuracy −1, eager −2."),
        (1 / 3, 1 / 3 + 1e-9, "good", "Accuracy 0.333333, eager 0.333333."),
        (0.0, 1e-5, "warn", "Less accurate than eager torch: accuracy 0, eager 1e-05."),
    ],
)
def test_accuracy_is_said_once_in_every_rendering(engine: float, reference: float, level: str, words: str):
    made = full(accuracy=Accuracy(engine, reference))
    assert _said(made)[2] == (level, words)
    assert words in render_text.markdown(made)
    assert words in " ".join(_printed(made, width=200).split())
    assert words in (page := render_html.page(made))
    tile = f'<dt>Accuracy</dt><dd class="big {level}">{render_text.score(engine)}</dd>'
    assert page.count(tile) == 1 and f"· eager {render_text.score(reference)}<" in page


def test_without_evaluate_nothing_is_said_of_accuracy():
    made = full(accuracy=None)
    shown = (render_text.markdown(made), _printed(made), render_html.page(made))
    assert not [text for text in shown if "ccura" in text]
    assert made.to_json()["accuracy"] is None


def test_the_verdict_tells_what_was_not_compared_and_what_the_build_warns_of():
    step = dataclasses.replace(full().passes[0], errors=None, unverified="no size tried is accepted")
    lines = _said(full(passes=(step,), warnings=("the machine is throttled",)))
    assert ("warn", "The numbers after a pass were not compared: clean: no size tried is accepted") in lines
    assert ("warn", "The build says: the machine is throttled") in lines
    assert not [line for line in _said(full()) if "not compared" in line[1] or "The build says" in line[1]]


def _texts(made: Report) -> dict[str, str]:
    page = html.unescape(re.sub("<[^>]*>", " ", render_html.page(made)))
    return {"terminal": _printed(made, width=160), "markdown": render_text.markdown(made), "page": page}


def test_every_rendering_has_the_table_of_sensitive_layers():
    for form, text in _texts(full()).items():
        assert "2 of 3 layers are int8: 31.5 dB on calibration data, 18.2 dB with all of them" in text.replace(
            "\n", " "
        ), form
        row = next(line for line in re.split("\n", text) if "blocks3.14.ffn.pw1 (Conv)" in line and "19.8 dB" in line)
        assert "27.1 dB" in row and "0.7098" in row and "reverted" in row, form
        assert "12.5 µs" in text and "−750 ns" in text and "time ran out" in text.replace("\n", " "), form


def test_columns_and_tables_without_figures_are_left_out():
    made = full()
    assert made.sensitivity is not None
    rows = tuple(dataclasses.replace(r, score=None, saved=None) for r in made.sensitivity.layers)
    bare = dataclasses.replace(made.sensitivity, layers=rows, score=None, base=None, finished=True)
    for form, text in _texts(full(sensitivity=bare)).items():
        assert "most sensitive to int8" in text and not re.search("score, if|time saved", text, re.IGNORECASE), form
    unmeasured = tuple(dataclasses.replace(r, only_int8=None, only_float=None) for r in rows)
    for left in (dataclasses.replace(bare, layers=unmeasured), None):
        assert all("most sensitive" not in text for text in _texts(full(sensitivity=left)).values())


def test_the_form_of_the_layers_is_named():
    made = full()
    assert made.sensitivity is not None
    for form, text in _texts(full(sensitivity=dataclasses.replace(made.sensitivity, form="shift-add"))).items():
        assert "most sensitive to shift-add" in text and "2 of 3 layers are shift-add" in text.replace("\n", " "), form
        assert "only it int8" not in text, form


def test_every_rendering_has_the_trade_off():
    made = full()
    assert made.tradeoff is not None
    step = dataclasses.replace(made.passes[2], spec="shift_add{bits=4}", exact=False)
    shifted = full(passes=(*made.passes[:2], step, *made.passes[3:]))
    for form, text in _texts(shifted).items():
        row = next(line for line in text.split("\n") if "binary, 4 bits (built)" in line)
        assert "0.141" in row and "19.1 dB" in row and "102 µJ" in row and "not measured" not in row, form
        narrow = next(line for line in text.split("\n") if "binary, 2 bits" in line and "51 µJ" in line)
        assert "0.072" in narrow and "not measured" in narrow, form
        assert "ISSCC 2014" in text.replace("\n", " "), form
    page = render_html.page(shifted)
    assert page.count("<circle") == render_html.page(full(tradeoff=None)).count("<circle") + 6
    unknown = dataclasses.replace(
        made.tradeoff, points=tuple(dataclasses.replace(p, picojoules=None) for p in made.tradeoff.points)
    )
    page = render_html.page(full(tradeoff=unknown))
    assert 'id="tradeoff-bytes-title"' in page and 'id="tradeoff-energy-title"' not in page
    assert all("Error against bytes" not in text for text in _texts(full(tradeoff=None)).values())
    # No pass of this build coded a layer: nothing says how long one took.
    assert "102 µJ" in render_text.markdown(full()) and render_text.markdown(full()).count("not measured") == 4


def test_a_budget_that_does_not_hold_is_among_the_first_things_said():
    made = full()
    assert made.sensitivity is not None
    missed = full(sensitivity=dataclasses.replace(made.sensitivity, holds=False))
    assert ("warn", "The budget of int8 does not hold: the time for reverting layers ran out.") in _said(missed)
    assert not any("budget of int8" in said for _, said in _said(made))


def test_no_percentile_without_the_calls_for_it():
    assert Arm.of(_samples("a", 1e-3, 1, 458)).p99 is None
    assert Arm.of(_samples("a", 1e-3, 1, 459)).p99 is not None


def test_percentiles_come_from_all_calls_and_samples_are_thinned_evenly():
    seconds = np.arange(1, 10_001) * 1e-6
    arm = Arm.of(Samples("a", "wall", seconds, 1, np.zeros(10_000, int)))
    assert (arm.calls, len(arm.samples)) == (10_000, 2000)
    assert (arm.p50, arm.p90, arm.p99) == pytest.approx(tuple(np.percentile(seconds, [50, 90, 99])))
    assert (arm.samples[0], arm.samples[-1]) == (1e-6, 1e-2)
    assert set(np.diff(arm.samples).round(9)) <= {5e-6, 6e-6}
    assert Arm.of(Samples("a", "wall", seconds[:1999], 1, np.zeros(1999, int))).samples == tuple(
        seconds[:1999].round(9)
    )


def test_the_latency_after_a_pass_is_that_of_its_graph():
    made = full()
    assert made.latency is not None
    clean, fold = ((s.p50, s.ratio) for s in made.latency.stages)
    engine = (made.latency.engine.p50, made.latency.ratio)
    assert render_text.timed_after(made) == [clean, fold, engine, None, None]
    unmeasured = dataclasses.replace(made.latency, stages=made.latency.stages[1:])
    assert render_text.timed_after(full(latency=unmeasured)) == [None, fold, engine, None, None]
    assert "measured with the next" in render_html.page(full(latency=unmeasured))
    assert "measured with the next" not in render_html.page(made)
    assert render_text.timed_after(full(latency=None)) == [None] * 5


# -- layers by module ------------------------------------------------------------------------------------------------


def _layer(*modules: str, op: str = "Conv", us: float = 1.0) -> LayerTime:
    return LayerTime("layer", op, us, (), modules)


@pytest.mark.parametrize(
    ("modules", "home"),
    [((), ""), (("",), ""), (("a.b.c",), "a.b.c"), (("a.b.c", "a.b.d"), "a.b"), (("a.bc", "a.bd"), "a"),
     (("a", "b"), "a"), (("a.b", "a.b.c"), "a.b")],
)  # fmt: skip
def test_a_fused_layer_lives_in_the_module_that_holds_all_of_it(modules: tuple[str, ...], home: str):
    assert report.home(_layer(*modules)) == home


def test_modules_are_cut_where_the_parts_of_the_model_part():
    flat = [_layer(f"stage{i}.block.{j}") for i in range(4) for j in range(3)]
    assert [m.path for m in report.by_module(flat)] == ["stage0", "stage1", "stage2", "stage3"]
    wrapped = [_layer("model", f"model.{m}") for m in ("a", "b")] + [
        _layer(f"model.{part}.{i}") for part in ("backbone", "head") for i in range(3)
    ]
    paths = [m.path for m in report.by_module(wrapped)]
    assert paths == ["model", *(f"model.{part}.{i}" for part in ("backbone", "head") for i in range(3))]
    many = [_layer(f"{part}.{i}") for part in ("backbone", "neck") for i in range(40)]
    assert [m.path for m in report.by_module(many)] == ["backbone", "neck"]
    only = [_layer(f"layers.{i}") for i in range(40)]
    assert len(report.by_module(only)) == 40  # one group would say nothing
    assert report.by_module([]) == []


def test_modules_share_all_the_time():
    modules = full().modules
    assert [m.path for m in modules] == ["patch_embed", "blocks1", "blocks2", "blocks3", "head", "(no module)"]
    assert sum(m.microseconds for m in modules) == pytest.approx(sum(x.microseconds for x in _layers()))
    assert sum(len(m.layers) for m in modules) == len(_layers())
    head = modules[4]
    assert head.by_op == {"Gemm": 41.0, "GlobalAveragePool": 6.0}


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (render_text.seconds, 0.0, "0 ns"),
        (render_text.seconds, 41e-9, "41.0 ns"),
        (render_text.seconds, 3.12e-4, "312 µs"),
        (render_text.seconds, 8.123e-3, "8.12 ms"),
        (render_text.seconds, 0.9996, "1.00 s"),
        (render_text.seconds, 1.238, "1.24 s"),
        (render_text.seconds, 210.0, "3.5 min"),
        (render_text.count, None, "?"),
        (render_text.count, 0, "0"),
        (render_text.count, 1_234, "1,234"),
        (render_text.count, 6_331_228, "6.33 M"),
        (render_text.count, 241_310_592, "241 M"),
        (render_text.count, 999_999_999, "1.00 G"),
        (render_text.size, 1023, "1023 B"),
        (render_text.size, 25_411_004, "24.2 MiB"),
        (render_text.size, 3 << 30, "3.00 GiB"),
        (render_text.error, 3.14e-6, "3.1e-6"),
        (render_text.error, 1e-4, "1e-4"),
        (render_text.error, 0.21, "0.21"),
        (render_text.error, 41.7, "42"),
        (render_text.error, 0.0, "0"),
        (render_text.error, None, "–"),
        (render_text.error, math.inf, "∞"),
        (render_text.error, math.nan, "not a number"),
        (render_text.decibels, 119.7, "120 dB"),
        (render_text.decibels, -3.2, "−3 dB"),
        (render_text.decibels, math.inf, "∞ dB"),
        (render_text.decibels, -math.inf, "−∞ dB"),
        (render_text.cosine, 1.0, "1"),
        (render_text.cosine, 1 - 1e-9, "1 − 1e-9"),
        (render_text.cosine, 0.9561, "0.9561"),
        (render_text.shape, ("n", 3, None), "n×3×?"),
        (render_text.shape, (), "scalar"),
        (render_text.shape, None, "any rank"),
        (render_text.facts, {"cpu": "x", "governor": "", "hypervisor": True, "off": False, "memory_bytes": 1 << 30,
                             "features": ["avx", "fma"]}, "cpu x, hypervisor, memory 1.00 GiB, features avx fma"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(write: Callable[[Any], str], value: Any, text: str):
    assert write(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(642, 393, "−38.8 %"), (100, 100, "0 %"), (10**6, 10**6 - 1, "−<0.1 %"), (10**6, 10**6 + 1, "+<0.1 %"),
     (10, 35, "+250 %"), (0, 3, ""), (3, None, ""), (None, 3, "")],
)  # fmt: skip
def test_changes_are_written_for_people(before: float | None, after: float | None, text: str):
    assert render_text.change(before, after) == text


# -- foreign text ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    "a|b`c``d\\|e\\\\|",
    "line one\nline two\r\n| x |",
    "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "user\u202egnp.exe\u2066\u200b",
    "[click](http://example.com) @team #1 ![x](http://example.com/x.png)",
    "`` ` ``",
    "{{ 7*7 }} {% raw %}",
    '" onmouseover="x',
    "& &lt; &#60;",
    "\ud800",
    "[bold red]markup[/] [/nothing]",
    "*_~emphasis~_* <!-- -->",
    "x" * 400,
]


def _named(name: str) -> Report:
    """The full report with ``name`` in every place that foreign text can reach."""

    def rename(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: rename(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, dict):
            return {f"{k}{name}": rename(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(rename(v) for v in value)
        return f"{value}{name}" if isinstance(value, str) and value else value

    made = full()
    renamed = rename(made)
    keep = dataclasses.replace(renamed.provenance, created=made.provenance.created)
    assert made.latency is not None
    stages = tuple(dataclasses.replace(s, after=f"{s.after}{name}") for s in made.latency.stages)
    return dataclasses.replace(
        renamed, provenance=keep, files=made.files,
        latency=dataclasses.replace(renamed.latency, clock="thread_cpu", stages=stages),
    )  # fmt: skip


class _Structure(HTMLParser):
    """Tags with the names of their attributes, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *sorted(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text.append(data)


def _harmless(text: str, allowed: str = "\n") -> bool:
    return all(c in allowed or unicodedata.category(c)[0] != "C" for c in text)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_changes_nothing_but_text_in_the_page(name: str):
    calm, page = _Structure(render_html.page(_named("Z"))), _Structure(hostile := render_html.page(_named(name)))
    assert page.tags == calm.tags
    assert "script" not in {tag for tag, *_ in page.tags}
    assert _harmless(hostile)
    assert any(render_text.clean(name).strip() in " ".join(t.split()) for t in page.text)


def test_the_page_check_sees_markup():
    calm = _Structure(render_html.page(_named("Z")))
    broken = render_html.page(_named("Z")).replace("shvit_s1Z", "<b>x</b>", 1)
    assert _Structure(broken).tags != calm.tags


def _tokens(text: str) -> tuple[list[str], list[str]]:
    """Kinds of all Markdown tokens, and the contents of the code spans."""
    kinds, spans = [], []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        kinds.append(token.type)
        for child in token.children or ():
            kinds.append(child.type)
            if child.type == "code_inline":
                spans.append(child.content)
    return kinds, spans


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_changes_nothing_but_code_spans_in_markdown(name: str):
    calm, _ = _tokens(render_text.markdown(_named("Z")))
    text = render_text.markdown(_named(name))
    kinds, spans = _tokens(text)
    assert kinds == calm
    assert not {"link_open", "image", "html_inline"} & set(kinds)
    assert _harmless(text)
    assert any(span.strip() == f"shvit_s1{render_text.clean(name)}".strip() for span in spans)


def test_the_markdown_check_sees_markup():
    calm, _ = _tokens(render_text.markdown(_named("Z")))
    assert _tokens(render_text.markdown(_named("Z")).replace("`shvit_s1Z`", "[x](y)"))[0] != calm


@pytest.mark.parametrize("bars", ["|", "a\\|b", "||", "\\\\|\\|", "|`|`|"])
def test_a_bar_in_a_table_cell_does_not_end_it(bars: str):
    kinds, _ = _tokens(f"| a | b |\n|--|--|\n| {render_text.cell(bars)} | 1 |\n")
    assert kinds.count("td_open") == 2
    assert _tokens(f"| a | b |\n|--|--|\n| {bars} | 1 |\n")[1] != [bars]


def test_why_nothing_was_compared():
    """An engine for another machine has outputs that nobody saw; a model without any is another matter."""
    none = Parity("eager torch", 1e-4, {})
    (line,) = [x.text for x in full(parity=none).verdict if "compared" in x.text]
    assert line == "Nothing was compared: the engine does not run here."
    made = full(parity=none)
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, outputs=()))
    assert "Nothing was compared: the model has no outputs." in [x.text for x in made.verdict]
    assert not [x for x in full().verdict if "Nothing was compared" in x.text]


# -- Markdown --------------------------------------------------------------------------------------------------------


@every_variant
def test_markdown_has_whole_tables(made: Report):
    text = render_text.markdown(made)
    kinds, _ = _tokens(text)
    parts = (made.parity.outputs, made.latency, made.sensitivity, made.tradeoff, made.layers, made.layers)
    tables = 1 + sum(map(bool, parts))
    assert kinds.count("table_open") == tables
    rows = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert rows
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_markdown_tells_the_facts():
    text = render_text.markdown(full())
    for fact in ("| `clean` | kept, 71 rewrites | 571 |", "−46.6 %", "rolled back", "| `logits` | 3.5e-5 | 3.1e-6 |",
                 "100 pairs of fresh sessions: thread CPU time per call, 1 thread, 1,300 calls",
                 "`model.py:42 Could not guard", "left alone: its output is also read by", "onnx 1.23.0"):  # fmt: skip
        assert fact in text
    assert "Not measured." in render_text.markdown(empty())
    assert "Not measured." not in text


def test_markdown_bounds_the_notes():
    notes = tuple(Note(f"layer{i}", "left alone") for i in range(render_text.MOST + 7))
    text = render_text.markdown(full(passes=(dataclasses.replace(full().passes[0], notes=notes),)))
    assert text.count("left alone") == render_text.MOST
    assert "and 7 more in `report.json`" in text


# -- terminal --------------------------------------------------------------------------------------------------------


def _printed(made: Report, **options: Any) -> str:
    console = Console(file=io.StringIO(), **{"width": 80, **options})
    made.print_table(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@every_variant
def test_the_terminal_table_fits_and_has_no_escapes(made: Report, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = _printed(made)
    assert max(map(len, text.splitlines())) <= 80
    assert _harmless(text)
    assert "…" not in text  # nothing is cut off


def test_no_color_is_obeyed_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;32m" in _printed(full(), force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", _printed(full(), force_terminal=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_cannot_reach_the_terminal(name: str):
    assert _harmless(_printed(_named(name)))
    coloured = _printed(_named(name), force_terminal=True, color_system="truecolor")
    assert _harmless(re.sub(r"\x1b\[[0-9;]*m", "", coloured))


def test_the_terminal_says_the_verdict_first():
    lines = _printed(full(), width=200).splitlines()
    assert lines[0] == "shvit_s1 → ort fp32"
    assert lines[1].startswith("ok: The same model")
    assert lines[3].startswith("note: Accuracy 0.7134")
    assert lines[4].startswith("warning: A pass was rolled back")
    assert lines[4].endswith("the budget is 5.0e-02")
    wrong = _printed(full(parity=Parity("eager torch", 1e-7, full().parity.outputs)))
    assert "\nFAILED: Not the same model" in wrong
    assert "FAILED\n" in wrong.partition("Parity")[2]


def test_the_terminal_tells_the_facts():
    text = _printed(full(), width=120)
    assert re.search(r"fold_norm\{eps_limit=1e-5\} +169 +402 +6\.32 M +240 M +24\.1 MiB +4\.2e-7 +0\.7\d\d\n", text)
    assert re.search(r"change +−46\.6 % +−0\.7 % +−2\.2 % +−0\.8 % +−\d+\.\d %", text)
    assert re.search(r"engine +1,300 .* 0\.70\d \(0\.\d{3}–0\.\d{3}\)", text)
    assert "n < 459" in _printed(full(latency=_latency(0.1, 0.09, 30)))


def test_a_terminal_without_unicode_gets_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    full(model=dataclasses.replace(full().model, name="naïve→model")).print_table(Console(file=stream, width=80))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert text.startswith("na\\xefve->model -> ort fp32")
    assert "-46.6 %" in text


# -- the page --------------------------------------------------------------------------------------------------------


@every_variant
def test_the_page_is_self_contained_and_accessible(made: Report):
    page = render_html.page(made)
    assert not re.findall(r"(?:src|href|srcset|action|data|poster)\s*=|url\(|@import|https?:", page)
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    parsed = _Structure(page)
    pictures = re.findall(r"<svg[^>]*>(.*?)</svg>", page, re.S)
    for picture in pictures:
        title, description = re.match(
            r"<title id=\"([\w-]+)\">.+?</title><desc id=\"([\w-]+)\">.*?</desc>", picture
        ).groups()  # type: ignore[union-attr]
        assert f'aria-labelledby="{title} {description}"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert len(pictures) == len([t for t in parsed.tags if t[0] == "svg"])
    assert not re.search(r'="(nan|inf|-inf|nan%|inf%|-[\d.]+%)"', page)


def test_the_page_has_all_pictures():
    titles = re.findall(r"<figcaption>([^<]+)", render_html.page(full()))
    assert [t.strip() for t in titles] == [
        "Distribution of latency", "Latency", "Nodes", "Parameters", "Multiply-accumulates", "Weights",
        "Error added", "Error against bytes (large: what was built)", "Error against energy (large: what was built)",
        "Time per module, by kind of operator",
    ]  # fmt: skip
    assert "<svg" not in render_html.page(empty())


def test_the_waterfall_is_to_scale():
    page = render_html.page(full())
    picture = re.search(r'<svg[^>]*aria-labelledby="waterfall-nodes-title.*?</svg>', page, re.S)
    assert picture is not None
    bars = re.findall(r'<rect x="([\d.]+)%" y="([\d.]+)" width="([\d.]+)%" height="10" class="(\w+)"', picture[0])
    top = 642 * 1.02
    total, *steps = [(float(x), float(w), kind) for x, _, w, kind in bars]
    assert total == (0, pytest.approx(100 * 642 / top, abs=0.01), "total")
    assert steps[0] == (0, pytest.approx(100 * 571 / top, abs=0.01), "rest")
    assert steps[1] == (pytest.approx(100 * 571 / top, abs=0.01), pytest.approx(100 * 71 / top, abs=0.01), "gain")
    assert [kind for *_, kind in steps] == ["rest", "gain"] * 3 + ["rest"] * 2
    assert 'class="loss"' not in picture[0]
    grown = dataclasses.replace(full().passes[0], after=Stats(700, 1, 1, 1))
    assert 'class="loss"' in render_html.page(full(passes=(grown,), parity=empty().parity))
    assert "plain export: 642; clean: 571 · −11.1 %;" in html.unescape(picture[0])


@pytest.mark.parametrize(
    ("low", "high", "confidence", "kind"),
    [(0.7, 0.8, 0.96, "gain"), (1.1, 1.2, 0.96, "loss"), (0.9, 1.1, 0.96, "even"), (0.7, 0.8, 0.9, "even")],
)
def test_the_waterfall_claims_no_more_than_the_interval(low: float, high: float, confidence: float, kind: str):
    made = _ratio(low, high, confidence)
    assert made.latency is not None
    made = dataclasses.replace(made, passes=made.passes[:1], latency=dataclasses.replace(made.latency, stages=()))
    picture = re.search(r'<svg[^>]*aria-labelledby="waterfall-latency-title.*?</svg>', render_html.page(made), re.S)
    assert picture is not None
    assert re.findall(r'class="(gain|loss|even)"', picture[0]) == [kind]
    assert ("whisker" in picture[0]) == (confidence >= 0.95)


@pytest.mark.parametrize(
    ("number", "text"),
    [("1.000", "1"), ("0.500", "0.5"), ("2.50 M", "2.5 M"), ("10.0 MiB", "10 MiB"), ("200", "200"), ("1,000", "1,000"),
     ("1.05", "1.05"), ("100 µs", "100 µs"), ("1.010 s", "1.01 s")],
)  # fmt: skip
def test_ticks_are_written_short(number: str, text: str):
    assert render_html._round(number) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1.02, [0, 0.5, 1]), (2.8, 5.2, [3, 3.5, 4, 4.5, 5]), (0, 655, [0, 200, 400, 600]),
     (93, 187, [100, 120, 140, 160, 180])],
)  # fmt: skip
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]):
    assert render_html._ticks(low, high, 4 if not low else 6) == pytest.approx(ticks)


def test_the_histogram_counts_every_call_but_the_tail():
    values = np.concatenate([np.full(600, 1e-3), np.full(300, 2e-3), np.full(100, 3e-3)])
    arm = Arm("a", 1000, 1e-3, 2e-3, None, 1.5e-3, tuple(values))
    shapes = "".join(render_html._histogram(arm, values, 0.5e-3, 3.5e-3, 0, "engine"))
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="engine"', shapes)]
    assert heights == pytest.approx([84, 42, 14])


def test_a_long_log_is_cut_and_says_so():
    many = tuple(Rewrite(i + 1, "clean", "fold", f"layer{i}") for i in range(render_html.MOST + 3))
    page = render_html.page(full(passes=(dataclasses.replace(full().passes[0], rewrites=many),)))
    assert "and 3 more in report.json" in page
    assert "fold (503×)" in html.unescape(page)


def _colours(page: str) -> tuple[dict[str, str], dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)[:2]
    return tuple(dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in (light, dark))  # type: ignore[return-value]


def _contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_sufficient_in_both_schemes():
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    for colours in _colours(render_html.page(empty())):
        for ground in ("page", "card"):
            for ink in ("ink", "soft", "good", "bad", "warn"):
                assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        assert _contrast(colours["ink"], colours["fill"]) >= 4.5
        for mark in ("bar", "gain", "loss", "plain", "engine", "op0", "op1", "op2", "op3", "op4", "other"):
            assert _contrast(colours[mark], colours["card"]) >= 2.9, mark


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PROBE = """<!doctype html><meta charset="utf-8"><body>{frames}<script>onload = () => {{
  document.title = "found:" + JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, box = e => e.getBoundingClientRect();
    page.querySelectorAll("details").forEach(d => d.open = true);
    const shown = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll *"));
    return {{
      width: page.documentElement.clientWidth,
      scroll: page.documentElement.scrollWidth,
      wide: shown.filter(e => box(e).right > frame.clientWidth + 0.5).slice(0, 5).map(e => e.outerHTML.slice(0, 80)),
      ground: getComputedStyle(page.body).backgroundColor,
      pictures: [...page.querySelectorAll("svg")].filter(s => box(s).width > 20).length,
      loaded: page.defaultView.performance.getEntriesByType("resource").length,
    }};
  }}));
}};</script>"""
_FRAME = '<iframe srcdoc="{page}" style="width:{width}px;height:900px;border:0"></iframe>'
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with")


def _browse(page: str, widths: tuple[int, ...], folder: Path, *flags: str) -> list[dict[str, Any]]:
    """What a real browser makes of the page in frames of these widths in pixels, all details open."""
    assert CHROMIUM is not None
    frames = "".join(_FRAME.format(page=html.escape(page), width=width) for width in widths)
    file = folder / "probe.html"
    file.write_text(_PROBE.format(frames=frames), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", *flags,
        "--window-size=1400,1000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>found:(.*?)</title>", done.stdout, re.S)
    assert found is not None, done.stdout[:500]
    return json.loads(html.unescape(found[1]))


@needs_browser
@pytest.mark.parametrize("variant", ["full", "long names", "empty"])
def test_a_browser_shows_the_page_without_scrolling_sideways(variant: str, tmp_path: Path):
    made = {"full": full, "long names": lambda: _named("x" * 400), "empty": empty}[variant]()
    page, widths = render_html.page(made), (360, 390, 768, 1280)
    for width, found in zip(widths, _browse(page, widths, tmp_path), strict=True):
        assert found["width"] == width
        assert found["scroll"] <= width, found["wide"]
        assert found["wide"] == []
        assert found["loaded"] == 0
        assert found["pictures"] == page.count("<svg")


@needs_browser
def test_the_browser_check_sees_a_page_that_is_too_wide(tmp_path: Path):
    page = render_html.page(empty()).replace("<footer>", '<p style="width:500px">wide</p><footer>')
    narrow, broad = _browse(page, (390, 800), tmp_path)
    assert narrow["scroll"] >= 500
    assert narrow["wide"]
    assert not broad["wide"]


@needs_browser
@pytest.mark.parametrize(("scheme", "ground"), [(1, "rgb(246, 247, 248)"), (0, "rgb(18, 21, 24)")])
def test_the_browser_shows_the_scheme_it_prefers(scheme: int, ground: str, tmp_path: Path):
    page = render_html.page(empty())
    assert _browse(page, (390,), tmp_path, f"--blink-settings=preferredColorScheme={scheme}")[0]["ground"] == ground


# -- writing ---------------------------------------------------------------------------------------------------------


def test_three_files_are_written_and_agree(tmp_path: Path):
    made = full()
    made.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((tmp_path / "report.json").read_text()) == made.to_json()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html.page(made)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == render_text.markdown(made)
    with pytest.raises(InputError):
        made.write(tmp_path / "missing")


def test_an_approximation_is_not_called_the_same_model():
    made = full()
    step = dataclasses.replace(
        next(s for s in made.passes if s.rewrites), spec="prune{params=0.7}", exact=False,
        errors={"y": OutputError(1.0, 0.5, 0.8, 3.2)}, failure="",
    )  # fmt: skip
    parity = dataclasses.replace(made.parity, reference="the graph after prune{params=0.7}", of_source=False)
    lines = [line.text for line in full(parity=parity, passes=(step,)).verdict]
    assert "Not the same function: prune{params=0.7} left an output at 3 dB." in lines
    assert not any("same model" in line for line in lines)
    assert any(line.startswith("The engine computes what the passes left") for line in lines)
    # Judged against the source, an approximation within its tolerance is what int8 is.
    assert not any("Not the same function" in line.text for line in full(passes=(step,)).verdict)
