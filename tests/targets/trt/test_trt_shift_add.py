"""Coded weights as TensorRT plugins: the graph that the parser gets, the kernel, and the engine through the double.

The kernel is CUDA C that a C++ compiler takes too, with the header ``cuda_on_host.h``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import signatures
import tensorrt_plugin
from onnx import TensorProto, helper, numpy_helper
from tensorrt_double import Knobs, make
from test_trt_bindings import PACKAGES, unpacked

import edgecompile
from edgecompile import functions, oracle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops
from edgecompile.targets.trt import TrtTarget, preflight, probe, session, shift_add, strong_typing
from edgecompile.targets.trt import build as trt_build
from edgecompile.targets.trt.options import parse

pytest.importorskip("onnxruntime")

ROWS, COLUMNS = 37, 77
WIDTHS = [(kind, bits) for kind, widths in codes.WIDTHS.items() for bits in widths]
GROUPS = (0, 7, 32, 50)
PLUGIN = {"shift_add": "plugin"}
ABLE = [v for v in signatures.VERSIONS if v != "10.3.0"]


def coded(kind: str, bits: int, group: int, rows: int = ROWS, columns: int = COLUMNS) -> codes.Coded:
    rng = np.random.default_rng([bits, group, rows])
    return codes.encode(rng.standard_normal((rows, columns)).astype(np.float32), kind, bits, group=group)


def model(
    one: codes.Coded, shape: Sequence[int | str], strides: tuple[int, int] | None = None, computed: bool = False
) -> Graph:
    """One layer on an input of this shape, of rank 4 and with strides for a convolution."""
    name = ("BinaryCoded" if one.kind == "binary" else "Shift") + ("Conv" if strides else "Linear")
    held = {"planes": codes.pack(one.codes, one.bits), "exponents": one.exponents}
    held |= {} if one.kind == "binary" else {"levels": codes.book(one.kind, one.bits)}
    attributes: dict[str, Any] = {"columns": one.codes.shape[1], "group": one.group}
    attributes |= {"strides": list(strides)} if strides else {}
    node = helper.make_node(name, ["x", *held], ["y"], "net.fc", domain=ops.DOMAIN, **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if computed:
        inputs.append(helper.make_tensor_value_info("exponents", TensorProto.INT8, held.pop("exponents").shape))
    weights = [numpy_helper.from_array(v, n) for n, v in held.items()]
    rank = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))
    graph = helper.make_graph([node], "g", inputs, [rank], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    made = helper.make_model(graph, opset_imports=opsets, functions=[ops.function(name, 18)], ir_version=9)
    loaded = Graph.from_proto(made)
    loaded.infer_shapes(outputs=True)
    return loaded


def lowered(graph: Graph) -> Graph:
    return trt_build.lowered(graph, parse(PLUGIN))


def constants_of(kernel: shift_add.Kernel) -> np.ndarray:
    return np.array(list(vars(kernel).values()), np.int32)


# -- the graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), WIDTHS)
def test_the_function_of_a_plugin_computes_what_the_operator_does(kind: str, bits: int):
    rng = np.random.default_rng(0)
    for group, strides in ((GROUPS[bits % 4], None), (7, (2, 1))):
        shape = (2, COLUMNS, 6, 5) if strides else (2, 3, COLUMNS)
        graph = model(coded(kind, bits, group), shape, strides)
        plugin = lowered(graph)
        plugin.check()
        (node,) = plugin.nodes
        assert node.domain == shift_add.NAMESPACE == node.attrs["plugin_namespace"] and node.attrs["aot"] == 1
        assert {t.values.dtype.name for t in node.inputs[1:3]} == {"int32"} and not {
            f.domain for f in plugin.function_protos
        } - {shift_add.NAMESPACE}
        feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
        wanted = oracle.run(graph, feeds)["y"]
        assert np.array_equal(oracle.run(plugin, feeds)["y"], wanted)
        for index in (1, 2):  # and it does depend on every constant
            broken = plugin.copy()
            constant = next(n for n in broken.nodes).inputs[index]
            constant.values = constant.values ^ 0x01010101
            assert not np.array_equal(oracle.run(broken, feeds)["y"], wanted)


def test_by_default_the_weights_are_decoded():
    graph = model(coded("pot", 4, 32), (2, COLUMNS))
    before = graph.digest()
    plain = trt_build.lowered(graph, parse({}))
    assert [n.op for n in plain.nodes] == ["MatMul"] and not plain.function_protos and graph.digest() == before
    assert [n.domain for n in lowered(graph).nodes] == [shift_add.NAMESPACE] and graph.digest() == before
    feeds = oracle.random_feeds(graph.signature().inputs)
    assert np.array_equal(oracle.run(plain, feeds)["y"], oracle.run(graph, feeds)["y"])


def test_codes_that_are_computed_stay_no_plugin():
    assert shift_add.NAMESPACE not in {
        n.domain for n in lowered(model(coded("pot", 4, 7), (2, COLUMNS), None, True)).nodes
    }


def test_equal_codes_are_stored_once():
    graph = model(coded("pot", 4, 32), (2, COLUMNS))
    node = graph.nodes[0]
    again = graph.insert(node.op, node.inputs, None, node.attrs, replaces=[node], domain=node.domain)
    again.outputs[0].dtype, again.outputs[0].shape = np.dtype(np.float32), [2, ROWS]
    graph.outputs = [*graph.outputs, again.outputs[0]]
    plugin = lowered(graph)
    assert len(plugin.nodes) == 2 and len(plugin.constants()) == 3
    assert plugin.weight_bytes() < 0.2 * ROWS * COLUMNS * 4


def test_the_preflight_knows_which_versions_have_plugins():
    plugin = lowered(model(coded("binary", 3, 7), (2, COLUMNS)))
    for version in ("10.16", "11.4"):
        assert preflight.check(plugin, version) == [] == strong_typing.check(plugin, version)
    (problem,) = preflight.check(plugin, "10.3")
    assert problem.fatal and "10.9" in problem.why and "inline" in problem.fix and "net.fc" in problem.place
    plugin.nodes[0].op = "Another"
    assert preflight.check(plugin, "10.16") != []


@pytest.mark.parametrize(("shape", "name", "tile"), [
    ([1, 5], "ShiftLinear", 1), ([2, 3, 5], "ShiftLinear", 6), ([50, 5], "ShiftLinear", 8),
    (["n", 5], "ShiftLinear", 8), ([1, 5, 2, 2], "ShiftConv", 4), ([2, 5, 7, 7], "ShiftConv", 8),
])  # fmt: skip
def test_tokens_of_a_thread(shape: list[Any], name: str, tile: int):
    assert shift_add._tile(name, shape) == tile


# -- the kernel --------------------------------------------------------------------------------------------------------

HEADER = Path(__file__).parents[1] / "cuda_on_host.h"
LAUNCH = """
extern "C" int launch_%d(const unsigned *grid, const unsigned *block, const float *x, const unsigned int *words,
                         const signed char *exponents, const float *levels, const int *scalars, float *y) {
    return run(grid, block, true, [=] {
        kernel_%d(x, words, exponents, %s scalars[0], scalars[1], scalars[2], y);
    });
}
"""


def joined(kernels: Sequence[tuple[str, shift_add.Kernel]]) -> Iterator[str]:
    """Kernels one after the other, each with its number in its name."""
    for index, (name, kernel) in enumerate(kernels):
        source = kernel.source(name)
        yield f"#define shift_add kernel_{index}"
        yield source
        yield from (f"#undef {label}" for label in ("shift_add", *re.findall(r"^#define (\w+)", source, re.MULTILINE)))


def host(kernels: Sequence[tuple[str, shift_add.Kernel]], folder: Path) -> ctypes.CDLL:
    """A library that runs the kernels on this machine, thread by thread."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    launches = [LAUNCH % (i, i, "" if n.startswith("Binary") else "levels,") for i, (n, _) in enumerate(kernels)]
    (folder / "kernels.cpp").write_text("\n".join([f'#include "{HEADER.name}"', *joined(kernels), *launches]))
    command = [
        compiler,
        "-std=c++17",
        "-O0",
        "-ffp-contract=off",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-shared",
    ]
    command += ["-fPIC", f"-I{HEADER.parent}", "-o", str(folder / "kernels.so"), str(folder / "kernels.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def launched(library: ctypes.CDLL, index: int, plugin: Graph, x: np.ndarray, rows: int = ROWS) -> np.ndarray:
    """What the kernel of a graph's only node makes of an input, launched as the plugin says."""
    node = plugin.nodes[0]
    kernel = dict(shift_add.kernels(plugin))[node.op]
    trt = make(ABLE[0], Knobs())
    held = [np.ascontiguousarray(t.values) for t in node.inputs[1:]]
    tensors = [tensorrt_plugin.TensorDesc(a.shape, a.dtype) for a in (x, *held)]
    output = shift_add._description(trt._plugin, node.op)(*tensors, constants=constants_of(kernel))
    implemented = shift_add._implementation(trt._plugin, node.op, {(node.op, kernel): b""})
    _, _, launch, scalars = implemented(*tensors, constants_of(kernel), (output,), 0)
    assert launch.block_x * launch.block_y * launch.block_z <= 1024
    y = np.full(output.shape_expr, np.nan, np.float32)
    grid, block = ([getattr(launch, f"{of}_{axis}") for axis in "xyz"] for of in ("grid", "block"))
    whole = [np.asarray(v, np.int32) for v in (grid, block, scalars)]
    held += [held[0]] * (3 - len(held))
    arguments = (*whole[:2], np.ascontiguousarray(x), *held, whole[2], y)
    assert getattr(library, f"launch_{index}")(*(ctypes.c_void_p(a.ctypes.data) for a in arguments))
    return y


def sum_bound(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Largest error of a float32 sum of products in any order: each of n roundings is at most 2^-24 of what it adds."""
    return (weight.shape[1] + 2) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64))


LINEAR, SINGLE, CONV = ((COLUMNS, COLUMNS), None), ((1, COLUMNS), None), ((1, COLUMNS, 5, 4), (2, 3))


def agrees(cases: Sequence[tuple[tuple[str, int, int], Any]], folder: Path) -> None:
    """The kernels decode bit for bit, and sum to within the rounding of float32, on linear layers and convolutions."""
    graphs = [(coded(*case), model(coded(*case), *shape)) for case, shape in cases]
    plugins = [lowered(graph) for _, graph in graphs]
    library = host([shift_add.kernels(plugin)[0] for plugin in plugins], folder)
    rng = np.random.default_rng(0)
    for index, ((one, graph), plugin) in enumerate(zip(graphs, plugins, strict=True)):
        shape, weight = tuple(graph.inputs[0].shape), one.decode()
        if shape == (COLUMNS, COLUMNS):
            eye = np.eye(COLUMNS, dtype=np.float32)
            assert np.array_equal(launched(library, index, plugin, eye).T, weight)
            shape = (3, 7, COLUMNS)  # the same kernel, other tokens
        x = rng.standard_normal(shape).astype(np.float32)
        y = launched(library, index, plugin, x)
        rows, found, own = x, y, y
        if shape == (3, 7, COLUMNS):
            own = oracle.run(model(one, shape), {"x": x})["y"]
        else:
            own = oracle.run(graph, {"x": x})["y"]
        if len(shape) == 4:
            rows, found, own = (np.moveaxis(a, 1, -1) for a in (x[:, :, ::2, ::3], y, own))
        bound = sum_bound(weight, rows)
        assert (np.abs(found - rows.astype(np.float64) @ weight.T.astype(np.float64)) <= bound).all()
        assert (np.abs(found - own) <= 2 * bound).all() and np.abs(own).max() > 1


def test_the_kernel_computes_what_the_function_does(tmp_path: Path):
    drawn = [(kind, bits, GROUPS[i % len(GROUPS)]) for i, (kind, bits) in enumerate(WIDTHS)]
    agrees([(c, s) for i, c in enumerate(drawn) for s in (LINEAR, (SINGLE, CONV)[i % 2])], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", [*GROUPS, 1, 33, 64])
def test_the_kernel_computes_what_the_function_does_in_groups_of_any_size(group: int, tmp_path: Path):
    agrees([((*width, group), shape) for width in WIDTHS for shape in (LINEAR, SINGLE, CONV)], tmp_path)


@pytest.mark.parametrize(("right", "wrong"), [
    ("column % GROUP == 0", "column % GROUP == 1"), ("int s = 1", "int s = 2"), ("bits[b] >> j", "bits[b] >> (31 - j)"),
])  # fmt: skip
def test_a_wrong_kernel_is_noticed(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert right in shift_add.SOURCE
    monkeypatch.setattr(shift_add, "SOURCE", shift_add.SOURCE.replace(right, wrong))
    with pytest.raises(AssertionError, match="array_equal"):
        agrees([(("pot", 4, 7), LINEAR)], tmp_path)


def test_the_cuda_compiler_takes_the_kernels(tmp_path: Path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no CUDA compiler")
    drawn = {"ShiftLinear": 1, "BinaryCodedConv": 2}
    kernels = [(name, shift_add.Kernel(COLUMNS, 7, ROWS, 4, 2, 1, tile)) for name, tile in drawn.items()]
    (tmp_path / "kernels.cu").write_text("\n".join(joined(kernels)))
    command = [compiler, "--ptx", "-arch=compute_87", "-Werror", "all-warnings", "-o", str(tmp_path / "kernels.ptx")]
    done = subprocess.run([*command, str(tmp_path / "kernels.cu")], capture_output=True, text=True)
    if "nsupported" in done.stderr and "arch" in done.stderr:
        pytest.skip(done.stderr.strip()[-200:])
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "kernels.ptx").read_text()
    assert all(f".entry kernel_{i}(" in ptx for i in range(2)) and ".local" not in ptx  # all is in registers


# -- the compiler ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A double of NVRTC as cuda-python binds it: the source is its own PTX, and ``#error`` does not compile."""
    ok, failed = "NVRTC_SUCCESS", "NVRTC_ERROR_COMPILATION"
    double: Any = types.ModuleType("cuda.bindings.nvrtc")
    double.nvrtcResult = types.SimpleNamespace(NVRTC_SUCCESS=ok)
    double.options, double.destroyed, programs = [], 0, []

    def create(source, name, count, headers, names):
        assert isinstance(source, bytes) and isinstance(name, bytes) and count == len(headers) == len(names)
        programs.append(source.decode())
        return ok, len(programs) - 1

    def compile_(program, count, options):
        assert count == len(options) and all(isinstance(o, bytes) for o in options)
        double.options += options
        return (failed if "#error" in programs[program] else ok,)

    def text(program):
        entry = re.search(r"__global__ void (\w+)\(", programs[program])
        assert entry is not None
        return f".visible .entry {entry[1]}(\n{programs[program]}\0".encode()

    def fill(program, buffer):
        content = text(program)
        ctypes.memmove(ctypes.c_char_p(buffer), content, len(content))
        return (ok,)

    def destroy(program):
        double.destroyed += 1
        return (ok,)

    double.nvrtcCreateProgram, double.nvrtcCompileProgram, double.nvrtcDestroyProgram = create, compile_, destroy
    double.nvrtcGetPTXSize, double.nvrtcGetPTX = lambda program: (ok, len(text(program))), fill
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    bindings.nvrtc = double  # type: ignore[attr-defined]
    for module in (package, bindings, double):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return double


def without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_compiler_is_asked_for_the_device(nvrtc: Any, monkeypatch: pytest.MonkeyPatch):
    source = shift_add.Kernel(COLUMNS, 7, ROWS, 4, 1, 1, 8).source("ShiftLinear")
    found = shift_add.compile_ptx(source, "8.7")
    assert b".entry shift_add(" in found and not found.endswith(b"\0") and nvrtc.destroyed == 1
    assert nvrtc.options == [b"--gpu-architecture=compute_87"]
    with pytest.raises(EnvironmentMissing, match="NVRTC_ERROR_COMPILATION"):
        shift_add.compile_ptx(source + "#error", "8.7")
    without_nvrtc(monkeypatch)
    with pytest.raises(EnvironmentMissing, match="cuda-python"):
        shift_add.compile_ptx(source, "8.7")


# -- the engine --------------------------------------------------------------------------------------------------------

Install = Callable[..., Any]


def network() -> Graph:
    """A coded convolution and a coded linear layer, with other operators around them."""
    first = model(coded("binary", 3, 7, 16, 8), (2, 8, 6, 5), (2, 1)).to_proto()
    second = model(coded("pot", 4, 5, 10, 16), (2, 16)).to_proto()
    graphs = [onnx.compose.add_prefix_graph(m.graph, f"{name}_") for name, m in (("a", first), ("b", second))]
    nodes = [
        *graphs[0].node,
        helper.make_node("Relu", ["a_y"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["b_x"], "flat"),
        *graphs[1].node,
    ]
    weights = [*graphs[0].initializer, *graphs[1].initializer]
    joined = helper.make_graph(nodes, "g", graphs[0].input, graphs[1].output, weights)
    functions = [*first.functions, *second.functions]
    made = helper.make_model(joined, opset_imports=first.opset_import, functions=functions, ir_version=9)
    graph = Graph.from_proto(made)
    graph.infer_shapes(outputs=True)
    return graph


@pytest.mark.parametrize("version", ABLE)
def test_an_engine_with_plugins(version: str, install: Install, nvrtc: Any, tmp_path: Path):
    install(version)
    graph = network()
    feeds = oracle.random_feeds(graph.signature().inputs)
    made = TrtTarget().build(graph, tmp_path, PLUGIN)
    recorded = made.manifest.options
    assert recorded["shift_add"] == "plugin"
    assert recorded["_plugins"] == {"edgecompile::BinaryCodedConv": 1, "edgecompile::ShiftLinear": 1}
    facts = json.loads((tmp_path / "engine.plan").read_bytes().split(b"\n{", 1)[1].split(b"\n", 1)[0].join([b"{", b""]))
    conv, linear = facts["plugins"]
    assert conv["arguments"] == [2 * 3 * 5, 6, 5] and linear["arguments"] == [2, 1, 1]
    assert conv["launch"]["grid_x"] == 4 and linear["launch"]["grid_x"] == 1
    install(version)  # another process, in which nobody has registered a plugin
    wanted = oracle.run(graph, feeds)
    for engine in (TrtTarget().load(tmp_path, made.manifest, graph), session.load(tmp_path, made.manifest)):
        for name, value in wanted.items():
            np.testing.assert_allclose(engine.run(feeds)[name], value, atol=1e-5)
    layers = made.layers(feeds, repeats=1)
    assert {"BinaryCodedConv", "ShiftLinear"} <= {layer.op for layer in layers}
    assert nvrtc.options == [b"--gpu-architecture=compute_87"] * 2


def test_two_builds_in_one_process(install: Install, nvrtc: Any, tmp_path: Path):
    """A plugin is described to TensorRT once, and its kernels follow the device that is asked for."""
    install(ABLE[0], "8.9")
    for folder, hardware in (("a", "none"), ("b", "ampere_plus")):
        (tmp_path / folder).mkdir()
        TrtTarget().build(network(), tmp_path / folder, {**PLUGIN, "hardware": hardware})
    assert set(nvrtc.options) == {b"--gpu-architecture=compute_89", b"--gpu-architecture=compute_80"}


def test_a_version_without_plugins(install: Install, nvrtc: Any, tmp_path: Path):
    install("10.3.0")
    with pytest.raises(EnvironmentMissing, match=r"TensorRT 10\.3\.0 has no plugins in Python") as caught:
        TrtTarget().build(network(), tmp_path, PLUGIN)
    assert caught.value.exit_code == 4 and "10.9" in str(caught.value) and "shift_add=inline" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EnvironmentMissing, match=r"10\.3\.0"):
        shift_add.register(probe.runtime(), [], "8.7")
    engine = TrtTarget().build(network(), tmp_path, {})
    assert "_plugins" not in engine.manifest.options and {"MatMul"} <= {
        layer.op for layer in engine.layers(oracle.random_feeds(network().signature().inputs), repeats=1)
    }


def test_a_machine_without_nvrtc(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    install(ABLE[0])
    without_nvrtc(monkeypatch)
    with pytest.raises(EnvironmentMissing, match="cuda-python"):
        TrtTarget().build(network(), tmp_path, PLUGIN)
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_that_was_not_registered_is_refused(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    install(ABLE[0])
    monkeypatch.setattr(shift_add, "register", lambda *_: None)
    with pytest.raises(InputError, match="2 of 5 nodes"):
        TrtTarget().build(network(), tmp_path, PLUGIN)


def test_a_model_without_coded_weights(install: Install, tmp_path: Path):
    install(ABLE[0])
    plain = trt_build.lowered(network(), parse({}))
    notes = TrtTarget().build(plain, tmp_path, PLUGIN).manifest.options["_notes"]
    assert shift_add.NOTHING in notes
    assert shift_add.NOTHING not in TrtTarget().build(plain, tmp_path, {}).manifest.options["_notes"]


@pytest.mark.parametrize("version", signatures.VERSIONS)
def test_the_probe_says_whether_there_are_plugins(version: str, install: Install, nvrtc: Any, monkeypatch: Any):
    install(version)
    able = version in ABLE
    assert probe.facts(probe.runtime()).compiled_plugins == able
    assert ("no plugins" not in TrtTarget().probe()[0].detail) == able
    without_nvrtc(monkeypatch)
    assert "no plugins" in TrtTarget().probe()[0].detail


def test_the_option_is_checked():
    with pytest.raises(InputError, match="plugin"):
        parse({"shift_add": "plugins"})
    assert parse({}).shift_add == "inline" and parse(parse(PLUGIN).recorded()).shift_add == "plugin"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT would build the engine")
def test_a_bundle_is_prepared_with_packed_weights(tmp_path: Path):
    """The pass keeps the codes, so that the board decides; what it holds is small."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((96, 64)).astype(np.float32), "w")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4, 96]), ("y", [4, 64]))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], "g", ports[:1], ports[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, tmp_path / "m.onnx")
    passes = "clean,shift_add,legalize{target=trt,keep=%s},clean"
    for keep, versions in (("true", ["10.16", "11.4"]), ("false", ["10.3", "10.16", "11.4"])):
        edgecompile.build(
            str(tmp_path / "m.onnx"), target="trt", passes=passes % keep, output=tmp_path / keep, bench=False,
            options=PLUGIN,
        )  # fmt: skip
        manifest = json.loads((tmp_path / keep / "manifest.json").read_text())
        assert [v for v, found in manifest["problems"].items() if not any("10.9" in str(p) for p in found)] == versions
    sizes = [(tmp_path / keep / "model.onnx").stat().st_size for keep in ("true", "false")]
    assert sizes[0] < 0.5 * sizes[1]


# -- what tensorrt.plugin demands --------------------------------------------------------------------------------------


def declared(module: Any, name: str) -> tuple[Any, Any]:
    return shift_add._description(module, name), shift_add._implementation(module, name, {})


@pytest.mark.parametrize("name", functions.CODED)
def test_wrong_declarations_are_refused(name: str):
    module = make(ABLE[-1], Knobs())._plugin
    with pytest.raises(ValueError, match="not registered"):
        module.aot_impl(f"edgecompile::{name}")(declared(module, name)[1])
    with pytest.raises(ValueError, match="not allowed"):
        module.register(f"trt::{name}")(declared(module, name)[0])
    for change in (lambda p: p.replace(annotation=p.empty), lambda p: p.replace(annotation=list)):
        described = declared(module, name)[0]
        wrong = described.__signature__
        parameters = list(wrong.parameters.values())
        described.__signature__ = wrong.replace(parameters=[*parameters[:-1], change(parameters[-1])])
        with pytest.raises(ValueError, match="constants"):
            module.register(f"edgecompile::{name}")(described)
    module.register(f"edgecompile::{name}")(declared(module, name)[0])
    with pytest.raises(ValueError, match="already"):
        module.register(f"edgecompile::{name}")(declared(module, name)[0])
    implemented = declared(module, name)[1]
    right = implemented.__signature__
    for wrong in (
        right.replace(parameters=list(right.parameters.values())[:-1]),
        right.replace(return_annotation=tuple[str, bytes, int, int]),
        right.replace(return_annotation=str),
    ):
        implemented.__signature__ = wrong
        with pytest.raises(ValueError):
            module.aot_impl(f"edgecompile::{name}")(implemented)
    module.aot_impl(f"edgecompile::{name}")(declared(module, name)[1])


REAL = """
import json, sys
import numpy as np
import tensorrt_bindings as trt

class Registry:  # the stub libraries have none
    def register_creator(self, creator, namespace=""):
        creators[creator.name] = creator
        created[creator.plugin_namespace + "::" + creator.name] = [f.name for f in creator.field_names]
    def get_creator(self, name, version, namespace=""):
        return creators[name]

class Extent:
    def __init__(self, value):
        self.value = value
    def is_constant(self):
        return True
    def get_constant_value(self):
        return self.value

class Builder:
    def constant(self, value):
        return Extent(value)
    def operation(self, op, a, b):
        a, b = a.value, b.value
        return Extent({"SUM": a + b, "SUB": a - b, "PROD": a * b, "FLOOR_DIV": a // b, "CEIL_DIV": -(-a // b)}[op.name])

created, creators, registry = {}, {}, Registry()
trt.get_plugin_registry = lambda: registry
trt.IDimensionExpr = Extent
sys.modules["tensorrt"] = trt
import importlib
trtp = importlib.import_module("tensorrt_bindings.plugin")
sys.modules["tensorrt.plugin"] = trtp
from edgecompile.errors import EnvironmentMissing
from edgecompile.targets.trt import shift_add

def constants_of(kernel):
    return np.array(list(vars(kernel).values()), np.int32)

given = json.loads(sys.stdin.read())
used = [(name, shift_add.Kernel(**kernel)) for name, kernel, _ in given]
for _ in range(2):  # again, as a second build in one process does
    shift_add.register(trt, used, "8.7", lambda source, architecture: source.encode())
tensor_module = importlib.import_module("tensorrt_bindings.plugin._tensor")
tensor_module.SymIntExpr._exprBuilder = Builder()
found = []
for (name, kernel), (_, _, shapes) in zip(used, given):
    definition = getattr(trtp.op.edgecompile, name)
    types = [trt.DataType.FLOAT, trt.DataType.INT32, trt.DataType.INT32, trt.DataType.FLOAT]
    tensors = []
    for shape, kind in zip(shapes, types):
        tensors.append(trtp.from_shape_expr(tuple(shape), kind))
    output = definition.register_func(*tensors, constants=constants_of(kernel))
    dummies = [trtp.TensorDesc(trtp.ShapeExprs(len(s), _is_dummy=True), k) for s, k in zip(shapes, types)]
    tensor_module.SymIntExpr._exprBuilder = None
    # Types are asked for before extents are known.
    early = definition.register_func(*dummies, constants=constants_of(kernel))
    tensor_module.SymIntExpr._exprBuilder = Builder()
    assert early.dtype == trt.DataType.FLOAT and len(early.shape_expr) == len(output.shape_expr)
    entry, ptx, launch, arguments = definition.aot_impl_func(*tensors, constants_of(kernel), (output,), 0)
    assert isinstance(launch, trtp.KernelLaunchParams) and isinstance(arguments, trtp.SymExprs)
    assert all(isinstance(a, trtp.SymInt32) for a in arguments)
    names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    field = trt.PluginField("constants", constants_of(kernel), trt.PluginFieldType.INT32)
    plugin = creators[name].create_plugin(
        name, "edgecompile", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    assert shift_add.Kernel.of(plugin.attrs["constants"]) == kernel
    assert plugin.get_output_data_types(types[: len(shapes)], [len(s) for s in shapes]) == [trt.DataType.FLOAT]
    found.append([
        entry, ptx.decode() == kernel.source(name), [e.constant_value() for e in output.shape_expr],
        {n: getattr(launch, n)._expr.value for n in names}, [a._expr.value for a in arguments],
        [definition.input_tensor_names, list(definition.input_attrs), definition.aot_impl_attr_names],
        definition.num_outputs,
    ])
print(json.dumps([created, found]))
"""


@pytest.mark.parametrize("version", ABLE)
def test_the_real_module_takes_the_plugins(
    version: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
):
    place = unpacked(version, request, tmp_path_factory)
    cases = [(("pot", 4, 7), (2, 5, COLUMNS), None), (("binary", 3, 7), (1, COLUMNS), None)]
    cases += [(("sp2", 8, 0), (2, COLUMNS, 7, 6), (2, 1)), (("binary", 2, 32), (1, COLUMNS, 5, 5), (1, 3))]
    given, wanted = [], []
    double = make(version, Knobs())._plugin
    for case, shape, strides in cases:
        plugin = lowered(model(coded(*case), shape, strides))
        node, ((name, kernel),) = plugin.nodes[0], shift_add.kernels(plugin)
        shapes = [list(shape), *(list(t.values.shape) for t in node.inputs[1:])]
        given.append([name, vars(kernel), shapes])
        tensors = [double.TensorDesc(s, "FLOAT") for s in shapes]
        output = shift_add._description(double, name)(*tensors, constants=constants_of(kernel))
        implemented = shift_add._implementation(double, name, {(name, kernel): b""})
        _, _, launch, arguments = implemented(*tensors, constants_of(kernel), (output,), 0)
        wanted.append([list(output.shape_expr), vars(launch), list(arguments)])
    environment = os.environ | {"LD_LIBRARY_PATH": str(place), "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", REAL],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    created, found = json.loads(done.stdout.splitlines()[-1])  # the module warns before
    attributes = ["constants"]
    assert created == {f"edgecompile::{name}": attributes for name in functions.CODED}
    for one, (shape, launch, arguments), (name, _, shapes) in zip(found, wanted, given, strict=True):
        tensors = ["x", "words", "exponents", "levels"][: len(shapes)]
        assert one == [shift_add.ENTRY, True, shape, launch, arguments, [tensors, attributes, attributes], 1], name
    assert set(PACKAGES) == set(signatures.VERSIONS)


def test_kernels_differ_where_their_constants_do():
    kernel = shift_add.Kernel(COLUMNS, 7, ROWS, 4, 1, 1, 8)
    texts = {kernel.source(name) for name in ("ShiftLinear", "BinaryCodedLinear")}
    for field in fields(kernel):
        texts.add(replace(kernel, **{field.name: getattr(kernel, field.name) + 1}).source("ShiftLinear"))
    assert len(texts) == 2 + len(fields(kernel))
