"""Kernels of the target ort for coded weights and angular attention, against the function bodies of the operators."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgecompile
from edgecompile import measure, oracle
from edgecompile.bundle import Bundle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.functions import DOMAIN
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops
from edgecompile.targets import ort_custom, ort_session
from edgecompile.targets.ort import OrtTarget
from edgecompile.targets.tvm.shift_add import read

RNG = np.random.default_rng(0)
YES, INTEGERS = {"custom_ops": "yes"}, {"custom_ops": "yes", "activations": "int8"}
needs_compiler = pytest.mark.skipif(ort_custom.compiler() is None, reason="no C++ compiler is here")
pytest.importorskip("onnxruntime")


def model(node: Any, held: dict[str, np.ndarray], shapes: dict[str, list]) -> Graph:
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    rank = len(next(iter(shapes.values())))
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"d{i}" for i in range(rank)])]
    nodes = node if isinstance(node, list) else [node]
    body = helper.make_graph(nodes, "g", inputs, results, [numpy_helper.from_array(v, n) for n, v in held.items()])
    functions = [ops.function(name, 17) for name in sorted({n.op_type for n in nodes if n.domain == DOMAIN})]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, ops.VERSION)]
    return Graph.from_proto(helper.make_model(body, opset_imports=opsets, functions=functions, ir_version=9))


def layer(
    kind: str, bits: int, shape: list, rows: int, group: int = 0, *, columns: int = 0, strides=None, **extra: Any
) -> Graph:
    """A layer on an input of this shape; ``strides`` makes it a convolution."""
    columns = columns or shape[1 if strides else -1]
    weight = RNG.standard_normal((rows, columns)).astype(np.float32)
    one = codes.encode(weight, kind, bits, group=group)
    held = {"planes": codes.pack(one.codes, bits), "exponents": one.exponents}
    held |= {} if kind == "binary" else {"levels": codes.book(kind, bits)}
    name = ("BinaryCoded" if kind == "binary" else "Shift") + ("Conv" if strides else "Linear")
    extra |= {"strides": list(strides)} if strides else {}
    node = helper.make_node(name, ["x", *held], ["y"], domain=DOMAIN, columns=columns, group=one.group, **extra)
    return model(node, held, {"x": shape})


def attention(tokens: int, inner: int, outer: int, lead: tuple[int, ...] = (1,), threshold: float = 0.0) -> Graph:
    rank = len(lead) + 2
    turn = [*range(rank - 2), rank - 1, rank - 2]
    names = ["q", "k", "v", "t", "t"]
    node = helper.make_node("BinaryAngularAttention", names, ["y"], domain=DOMAIN, turn=turn)
    shapes = {"q": [*lead, tokens, inner], "k": [*lead, tokens, inner], "v": [*lead, tokens, outer]}
    return model(node, {"t": np.full(1, threshold, np.float32)}, shapes)


def built(graph: Graph, folder: Path, options: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    notes: list[str] = []
    folder.mkdir(exist_ok=True)
    return OrtTarget().build(graph, folder, {"threads": 1, **(options or {})}, notes.append), notes


def ops_of(folder: Path) -> set[str]:
    return {node.op for node in Graph.load(folder / ort_session.ENGINE).nodes}


def close(found: np.ndarray, wanted: np.ndarray, error: float = 1e-5) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, atol=error * np.abs(wanted).max(), rtol=0)


# -- float activations -------------------------------------------------------------------------------------------------

# Kind, bits, shape of the input, rows, group: odd ones, batches, groups within a word and over many.
LAYERS = [
    ("pot", 2, [1, 100], 37, 0),
    ("pot", 3, [2, 3, 300], 5, 32),
    ("pot", 4, [300], 64, 128),
    ("sp2", 4, [7, 257], 33, 48),
    ("sp2", 4, [3, 72], 129, 8),
    ("pot", 8, [5, 300], 37, 16),
    ("sp2", 8, [4, 129], 3, 0),
    ("binary", 2, [1, 40], 1, 0),
    ("binary", 3, [9, 300], 18, 256),
    ("binary", 4, [2, 2, 2, 300], 37, 64),
    ("binary", 4, [6, 200], 9, 48),
]


@needs_compiler
@pytest.mark.parametrize("kind, bits, shape, rows, group", LAYERS)
def test_a_layer_is_that_of_its_function_body(kind, bits, shape, rows, group, tmp_path):
    graph = layer(kind, bits, shape, rows, group)
    engine, notes = built(graph, tmp_path, YES)
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    wanted = oracle.run(graph, feeds)["y"]
    close(engine.run(feeds)["y"], wanted)
    assert ops_of(tmp_path) == {"CodedLayer" if bits == 8 or kind == "binary" else "BookLayer"}
    assert "custom operator" in notes[0]
    assert engine.manifest.files == (ort_session.ENGINE, ort_session.OPS)
    other = {"x": feeds["x"] * np.linspace(0, 1, shape[-1], dtype=np.float32)}  # the comparison can tell
    with pytest.raises(AssertionError):
        close(engine.run(other)["y"], wanted)


@needs_compiler
@pytest.mark.parametrize("kind, strides", [("pot", (1, 1)), ("pot", (2, 1)), ("binary", (2, 3))])
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_a_convolution_is_that_of_its_function_body(kind, strides, size, tmp_path):
    graph = layer(kind, 4, [2, 40, *size], 21, strides=strides)
    engine, _ = built(graph, tmp_path, YES)
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    close(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"])


@needs_compiler
def test_a_book_of_any_levels_is_looked_up(tmp_path):
    graph = layer("sp2", 8, [3, 70], 9)
    node = graph.nodes[0]
    levels = RNG.standard_normal(256).astype(np.float32)  # neither powers of two nor sums of two
    node.inputs[3].values = levels
    engine, _ = built(graph, tmp_path, YES)
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    close(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"])


@needs_compiler
def test_a_bias_other_nodes_and_several_layers_stay_as_they_are(tmp_path):
    one, held = layer("pot", 4, [3, 64], 48), {}
    first = {t.name: t.values for t in one.nodes[0].inputs[1:]}
    two = layer("binary", 3, [3, 48], 10)
    second = {f"{t.name}2": t.values for t in two.nodes[0].inputs[1:]}
    held = {**first, **second, "bias": RNG.standard_normal(48).astype(np.float32)}
    nodes = [
        helper.make_node("ShiftLinear", ["x", *first], ["a"], domain=DOMAIN, columns=64, group=64),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("BinaryCodedLinear", ["c", *second], ["y"], domain=DOMAIN, columns=48, group=48),
    ]
    graph = model(nodes, held, {"x": ["batch", 64]})
    engine, notes = built(graph, tmp_path, YES)
    assert len(notes) == 2 and {"BookLayer", "CodedLayer"} <= ops_of(tmp_path)
    for batch in (1, 6):
        feeds = {"x": RNG.standard_normal((batch, 64)).astype(np.float32)}
        close(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"])
    times = engine.layers({"x": np.ones((2, 64), np.float32)})
    assert [(t.op, t.nodes) for t in times if t.op.endswith("Layer")] == [("BookLayer", ("a",)), ("CodedLayer", ("y",))]
    assert [n.op for n in graph.nodes] == [n.op_type for n in nodes], "the graph that was given is as it was"


@needs_compiler
def test_two_threads_compute_what_one_does(tmp_path):
    graph = layer("sp2", 4, [5, 300], 203, 64)
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    one, _ = built(graph, tmp_path / "one", YES)
    two, _ = built(graph, tmp_path / "two", {**YES, "threads": 2})
    np.testing.assert_array_equal(one.run(feeds)["y"], two.run(feeds)["y"])


# -- integer activations -----------------------------------------------------------------------------------------------


def rounded(x: np.ndarray) -> np.ndarray:
    """Each token to the nearest of 255 steps."""
    step = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    return np.rint(x / np.where(step > 0, step, 1)) * step


@needs_compiler
@pytest.mark.parametrize("kind, bits, group", [("pot", 2, 0), ("pot", 3, 24), ("pot", 4, 0), ("sp2", 4, 8)])
@pytest.mark.parametrize("shape, rows", [([2, 96], 64), ([13, 101], 70), ([2, 7, 384], 130)])
def test_integers_round_activations_and_nothing_else(kind, bits, group, shape, rows, tmp_path):
    graph = layer(kind, bits, shape, rows, group)
    engine, _ = built(graph, tmp_path, INTEGERS)
    assert ops_of(tmp_path) == {"IntegerLayer"}
    x = RNG.standard_normal(shape).astype(np.float32)
    x.reshape(-1, shape[-1])[-1] = 0
    x[..., 0] *= 3
    node = graph.nodes[0]
    given = [t.values for t in node.inputs[1:]]
    weight = read(node.op, given, shape[-1], int(node.attrs["group"])).decoded().astype(np.float64)
    found = engine.run({"x": x})["y"]
    close(found, (rounded(x) @ weight.T).astype(np.float32), 2e-6)
    assert np.abs(found - x @ weight.T).max() > 1e-4 * np.abs(found).max(), "activations were rounded"


@needs_compiler
def test_the_largest_integers_do_not_saturate(tmp_path):
    graph = layer("pot", 4, [2, 512], 64)
    node = graph.nodes[0]
    node.inputs[1].values = codes.pack(np.full((64, 512), 7, np.uint8), 4)  # the largest level
    node.inputs[2].values = np.zeros((64, 1), np.int8)
    engine, _ = built(graph, tmp_path, INTEGERS)
    x = np.stack([np.ones(512), -np.ones(512)]).astype(np.float32)
    close(engine.run({"x": x})["y"], np.outer([512, -512], np.ones(64)).astype(np.float32), 1e-6)


@needs_compiler
def test_integers_of_a_convolution_are_those_of_its_pixels(tmp_path):
    graph = layer("pot", 4, [2, 40, 4, 6], 21, strides=(2, 1))
    engine, _ = built(graph, tmp_path, INTEGERS)
    x = RNG.standard_normal((2, 40, 4, 6)).astype(np.float32)
    pixels = np.moveaxis(rounded(np.moveaxis(x, 1, -1)), -1, 1).astype(np.float32)
    close(engine.run({"x": x})["y"], oracle.run(graph, {"x": pixels})["y"], 1e-5)


@needs_compiler
@pytest.mark.parametrize("kind, op", [("binary", "CodedLayer"), ("pot", "BookLayer")])
def test_levels_that_are_no_small_integers_keep_float_activations(kind, op, tmp_path):
    graph = layer(kind, 3, [4, 64], 8)
    if kind == "pot":
        graph.nodes[0].inputs[3].values = RNG.standard_normal(8).astype(np.float32)
    engine, _ = built(graph, tmp_path, INTEGERS)
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    close(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"])
    assert ops_of(tmp_path) == {op}


# -- attention ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    "tokens, inner, outer, lead, threshold",
    [(33, 64, 64, (1,), 0.0), (1, 7, 16, (2, 3), 0.1), (70, 20, 32, (2,), -0.05), (64, 18, 128, (1, 2), 0.0)],
)
def test_angular_attention_is_that_of_its_function_body(tokens, inner, outer, lead, threshold, tmp_path):
    graph = attention(tokens, inner, outer, lead, threshold)
    engine, _ = built(graph, tmp_path, YES)
    assert ops_of(tmp_path) == {"AngularAttention"}
    feeds = oracle.random_feeds(graph.signature().inputs, 2)
    close(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"])


@needs_compiler
def test_attention_that_the_kernel_cannot_do_is_refused_or_left(tmp_path):
    graph = attention(8, 8, 24)
    with pytest.raises(InputError, match="24 wide"):
        built(graph, tmp_path, YES)
    engine, notes = built(graph, tmp_path)
    assert "function body" in notes[0] and engine.manifest.files == (ort_session.ENGINE,)


# -- what is refused, and what is chosen -------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    "graph, why",
    [
        (lambda: layer("pot", 4, [1, 300], 5, 20), "groups of 20 columns"),
        (lambda: layer("pot", 4, [1, 64], 5, speed=3), "attribute speed"),
    ],
    ids=["group", "attribute"],
)
def test_yes_refuses_what_has_no_kernel_and_auto_leaves_it(graph, why, tmp_path):
    with pytest.raises(InputError, match=why) as caught:
        built(graph(), tmp_path, YES)
    assert "y (ShiftLinear)" in caught.value.what
    engine, notes = built(graph(), tmp_path)
    assert engine.manifest.files == (ort_session.ENGINE,) and why in notes[0]


def test_widths_without_a_kernel_are_refused():
    weights = read("BinaryCodedLinear", [np.zeros((5, 4, 2), np.uint8), np.zeros((5, 4, 1, 2), np.int8)], 16, 16)
    with pytest.raises(ort_custom.Unfit, match="5 bits"):
        ort_custom._coded(weights, 16)
    assert ort_custom._coded(replace(weights, scales=weights.scales[:4], bits=4), 16).op == "CodedLayer"


@needs_compiler
def test_auto_takes_a_kernel_where_it_is_faster_alone(tmp_path, monkeypatch):
    graph = layer("sp2", 4, [1, 1024], 512)
    rng = np.random.default_rng(0)
    asked = []

    def timed(fast: bool):
        def arms(ort, graphs, chosen, scratch):
            asked.append(list(graphs))
            base, *others = graphs
            times = {base: 10.0, **dict.fromkeys(others, 1.0 if fast else 20.0)}
            rounds = np.repeat(np.arange(8), 4)
            return {
                name: measure.Samples(name, "thread_cpu", t + rng.random(32) / 100, 1, rounds, 0.0, (0.0, 0.0))
                for name, t in times.items()
            }

        return arms

    for fast in (True, False):
        monkeypatch.setattr(ort_custom, "timed", timed(fast))
        monkeypatch.setattr(ort_custom, "_MEASURED", {})
        engine, notes = built(graph, tmp_path / str(fast))
        assert (ort_session.OPS in engine.manifest.files) == fast
        assert ("custom operator" if fast else "function body") in notes[0]
    assert asked == [["body", "0"], ["bodies", "kernels"], ["body", "0"]], "layer, model; a layer that lost ends it"
    engine, notes = built(graph, tmp_path / "no", {"custom_ops": "no"})
    assert not notes and engine.manifest.files == (ort_session.ENGINE,)


@needs_compiler
def test_auto_measures_and_an_unknown_number_of_tokens_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_custom, "_MEASURED", {})
    monkeypatch.setattr(ort_custom, "_SECONDS", 0.05)
    _, notes = built(layer("sp2", 4, [1, 1024], 1024, 256), tmp_path / "known")
    assert "times as fast as the function body" in notes[0]
    engine, notes = built(layer("sp2", 4, ["tokens", 1024], 64, columns=1024), tmp_path / "unknown")
    assert "not known" in notes[0] and engine.manifest.files == (ort_session.ENGINE,)


def time_to_body(graph: Graph, folder: Path) -> measure.Ratio:
    """Of what `auto` chooses."""
    engines = {how: built(graph, folder / how, {"custom_ops": how})[0] for how in ("auto", "no")}
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    calls = {how: engine.call(feeds) for how, engine in engines.items()}
    taken = measure.interleave(calls, "thread_cpu", seconds=0.5, block_ms=5)
    return measure.ratio(taken["auto"], taken["no"])


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind, bits", [("sp2", 4), ("binary", 4), ("pot", 8)])
@pytest.mark.parametrize("tokens, rows", [(1, 40), (1, 512), (2, 512), (3, 512), (6, 512), (8, 512), (64, 512)])
def test_what_auto_chooses_never_loses_to_the_function_body(kind, bits, tokens, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ort_custom, "_MEASURED", {})
    graph = layer(kind, bits, [tokens, 512], rows)
    assert time_to_body(graph, tmp_path).low < 1.05, "slower, with 95 % confidence"


@pytest.mark.slow
@needs_compiler
def test_a_measurement_that_is_wrong_chooses_what_loses(tmp_path, monkeypatch):
    def flattered(ort, graphs, chosen, scratch):
        taken = right(ort, graphs, chosen, scratch)
        base = next(iter(taken))
        return {k: s if k == base else replace(s, seconds=s.seconds / 10) for k, s in taken.items()}

    right = ort_custom.timed
    monkeypatch.setattr(ort_custom, "_MEASURED", {})
    monkeypatch.setattr(ort_custom, "timed", flattered)
    assert time_to_body(layer("binary", 4, [64, 512], 512), tmp_path).low > 1.05


def test_without_a_compiler_auto_falls_back_and_yes_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    graph = layer("pot", 4, [2, 64], 16)
    engine, notes = built(graph, tmp_path / "auto")
    assert engine.manifest.files == (ort_session.ENGINE,) and "no C++ compiler" in notes[0]
    feeds = oracle.random_feeds(graph.signature().inputs, 1)
    close(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"])
    with pytest.raises(EnvironmentMissing, match=r"C\+\+ compiler") as caught:
        built(graph, tmp_path / "yes", YES)
    assert "g++" in caught.value.fix


def test_a_compiler_that_fails_is_told(tmp_path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    graph = layer("pot", 4, [2, 64], 16)
    with pytest.raises(EnvironmentMissing, match="no such option"):
        built(graph, tmp_path / "yes", YES)
    engine, notes = built(graph, tmp_path / "auto")
    assert engine.manifest.files == (ort_session.ENGINE,) and "no such option" in notes[0]


@pytest.mark.parametrize(
    "options, why",
    [
        ({"custom_ops": "maybe"}, "maybe"),
        ({"custom_ops": "yes", "ort_format": True}, "ort_format"),
        ({"custom_ops": "no", "activations": "int8"}, "no effect"),
        ({"activations": "int4"}, "int4"),
    ],
)
def test_options_that_cannot_be_are_refused(options, why, tmp_path):
    with pytest.raises(InputError, match=why):
        built(layer("pot", 4, [2, 64], 16), tmp_path, options)


# -- files and trust ---------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_bundle_has_its_library_and_a_changed_one_is_refused(tmp_path):
    layer("pot", 4, [2, 64], 16).save(tmp_path / "m.onnx")
    options = {"threads": 1, **YES}
    edgecompile.build(
        str(tmp_path / "m.onnx"), target="ort", passes="clean", output=tmp_path / "b", bench=False, options=options
    )
    bundle = Bundle.open(tmp_path / "b")
    assert ort_session.OPS in bundle.manifest["files"] and ort_session.OPS in bundle.engine_manifest.files
    graph = bundle.graph()
    assert [n.op for n in graph.nodes] == ["ShiftLinear"] and len(graph.function_protos) == 1
    feeds, wanted = bundle.probe()
    close(bundle.engine().run(feeds)["y"], wanted["y"])
    close(ort_session.load(bundle.path, bundle.engine_manifest).run(feeds)["y"], wanted["y"])  # as a board does
    library = tmp_path / "b" / ort_session.OPS
    content = library.read_bytes()
    library.unlink()  # it is mapped
    library.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"damaged.*ops.so|ops.so.*digest"):
        Bundle.open(tmp_path / "b")


@needs_compiler
def test_a_library_for_another_cpu_is_refused_before_it_is_loaded(tmp_path):
    graph = layer("pot", 4, [2, 64], 16)
    engine, _ = built(graph, tmp_path / "here", YES)
    assert engine.manifest.device == measure.cpu()
    shutil.copytree(tmp_path / "here", there := tmp_path / "there")
    (there / ort_session.OPS).write_bytes(b"not a library")
    other = replace(engine.manifest, device=f"{platform.machine()} avx99")
    for load in (lambda m: OrtTarget().load(there, m, graph), lambda m: ort_session.load(there, m)):
        with pytest.raises(EnvironmentMissing, match="avx99") as caught:
            load(other)
        assert "custom_ops=no" in caught.value.fix
        with pytest.raises(InputError, match=ort_session.OPS):  # this one fits, and is loaded
            load(engine.manifest)


def test_the_sources_are_part_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    sources = [f"ort_ops/{file.name}" for file in ort_custom._SOURCE.parent.iterdir()]
    assert {"ort_ops/shift_add.cpp", "ort_ops/ort_api.h"} <= set(sources)
    assert all(any(fnmatch(name, p) for p in patterns["edgecompile.targets"]) for name in sources)


# -- other CPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("features", ["avx avx2 fma avx_vnni", "avx avx2 fma", "avx avx2 fma avx512f avx512bw", ""])
def test_kernels_for_lesser_cpus_compute_the_same(features, tmp_path, monkeypatch):
    if missing := set(features.split()) - set(measure.cpu_features()):
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    monkeypatch.setattr(measure, "cpu", lambda: f"{platform.machine()} {features}".strip())
    graphs = {f"{one[0]}{one[1]} {i}": layer(*one) for i, one in enumerate(LAYERS)}
    graphs |= {"conv": layer("pot", 4, [2, 40, 4, 6], 21, strides=(2, 1)), "attention": attention(33, 20, 32)}
    for name, graph in graphs.items():
        feeds = oracle.random_feeds(graph.signature().inputs, 1)
        wanted = oracle.run(graph, feeds)["y"]
        close(built(graph, tmp_path / name, YES)[0].run(feeds)["y"], wanted)
        if name.startswith("sp24"):
            found = built(graph, tmp_path / f"integers {name}", INTEGERS)[0].run(feeds)["y"]
            close(found, oracle.run(graph, {"x": rounded(feeds["x"]).astype(np.float32)})["y"])


_BOOKS_CPP = r"""
#include "shift_add.cpp"
#include <cstdio>
// Tokens of 40 columns in groups of 16, and one tile of rows: sums one by one, and those of the kernel.
template <typename Kind, int T, bool unpacked = false>
int differ() {
  const Linear layer{kTile, 40, 16};
  const std::int64_t groups = layer.groups();
  std::vector<std::uint32_t> words(kTile * 5);
  std::vector<float> scales(groups * kTile), steps(T), y(T * kTile);
  std::vector<typename Kind::Given> x(T * 40);
  std::vector<std::int32_t> sums(T * groups);
  std::conditional_t<std::is_same_v<Kind, Integers>, std::uint8_t, float> levels[16];
  std::uint32_t random = 1;
  auto draw = [&](int below) { return int((random = random * 1664525u + 1013904223u) >> 8) % below; };
  for (auto& one : words) one = draw(1 << 16) << 16 | draw(1 << 16);
  for (auto& one : scales) one = 1.0f / (1 + draw(8));
  for (auto& one : x) one = draw(255) - 127;
  for (auto& one : levels) one = draw(129);
  for (int t = 0; t < T; ++t) steps[t] = 1 + t;
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < 40; ++c) sums[t * groups + c / 16] += x[t * 40 + c];
  const Given<Kind> given{x.data(), 40, sums.data(), steps.data()};
  std::vector<std::int32_t> held(kTile * 5 * Kind::kSteps);
  const std::int32_t* from = (const std::int32_t*)words.data();
  if (unpacked) unpack<Kind>(from, levels, 40, held.data()), from = held.data();
  outputs<Kind, T, unpacked>(layer, given, 0, from, scales.data(), levels, kTile, y.data());
  int wrong = 0;
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kTile; ++r) {
      double wanted = 0;
      for (int c = 0; c < 40; ++c) {
        const int nibble = c % 4 * 2 + c % 8 / 4;
        const double level = levels[words[c / 8 * kTile + r] >> (4 * nibble) & 15] - (sizeof levels[0] == 1 ? 64.0 : 0);
        wanted += level * x[t * 40 + c] * scales[c / 16 * kTile + r] * steps[t];
      }
      wrong += std::fabs(wanted - y[t * kTile + r]) > 1e-6 * (128.0 * 127 * 40 * steps[t]);
    }
  return wrong;
}
int main() {
  for (int wrong : {differ<Numbers, 1>(), differ<Numbers, 2>(), differ<Numbers, 3, true>(), differ<Integers, 1>(),
                    differ<Integers, 2>(), differ<Integers, 3, true>()})
    std::printf("%d ", wrong);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_kernels_of_books_are_right_on_arm(broken, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    (tmp_path / "main.cpp").write_text(_BOOKS_CPP.replace("& 15]", "& 7]") if broken else _BOOKS_CPP)
    flags = ["-std=c++20", "-O1", "-DLANES=8", f"-I{ort_custom._SOURCE.parent}"]
    subprocess.run([compiler, *flags, "-o", tmp_path / "main", tmp_path / "main.cpp"], check=True)
    done = subprocess.run([emulator, "-L", "/usr/aarch64-linux-gnu", tmp_path / "main"], capture_output=True, text=True)
    assert (done.stdout == "0 0 0 0 0 0 ") is not broken
