"""The ONNX Runtime target: what it computes, what it writes, and which nodes its layers stand for."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from edgecompile import measure, oracle
from edgecompile.calibration_data import open_data
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph, Provenance, provenance
from edgecompile.target import EngineManifest, LayerTime
from edgecompile.targets import ort as target_module
from edgecompile.targets import ort_session
from edgecompile.targets.ort import ENGINE, ORT_FORMAT, OrtTarget

ort = pytest.importorskip("onnxruntime")
ONE = {"threads": "1"}
BLOCKED = "com.microsoft.nchwc"
HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm")
HEAVY_KERNELS = (*HEAVY, "FusedConv", "FusedMatMul", "FusedGemm")


def build(graph: Graph, folder: Path, **options):
    return OrtTarget().build(graph, folder, {**ONE, **options})


def feeds_of(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    return oracle.random_feeds(graph.signature().inputs, seed)


def load_again(engine, folder: Path, graph: Graph, **changes):
    return OrtTarget().load(folder, dataclasses.replace(engine.manifest, **changes), graph)


def make(nodes, inputs, outputs, weights=(), functions=(), opset=17) -> Graph:
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(v, n) for n, v in weights])
    domains = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    domains += [helper.make_opsetid(d, 1) for d in {n.domain for n in nodes} - {o.domain for o in domains}]
    return Graph.from_proto(helper.make_model(graph, opset_imports=domains, ir_version=10, functions=list(functions)))


def value(name: str, *shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 8


# -- a network from torch ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch = pytest.importorskip("torch")
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

        def forward(self, x):
            return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))

    class Attention(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
            return x + self.out((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v)

    class Head(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean(1))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.Hardswish())
            self.stages = nn.Sequential(Residual(32), nn.MaxPool2d(2), Residual(32))
            self.odd = nn.Sequential(nn.Conv2d(32, 30, 1), nn.ReLU6(), nn.ConvTranspose2d(30, 30, 2, 2), nn.SiLU())
            self.attention = Attention(30)
            self.head = Head(30, 10)

        def forward(self, x):
            return self.head(self.attention(self.odd(self.stages(self.stem(x)))))

    torch.manual_seed(0)
    module = Network()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return module.eval()


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def exported(request, network, tmp_path_factory):
    """A graph as each exporter writes it, an input, and what eager torch computes for it."""
    import torch

    example = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export(network, example, path, dynamo=request.param == "dynamo")
    graph = Graph.load(path)
    with torch.no_grad():
        reference = network(example).numpy()
    return graph, {graph.inputs[0].name: example.numpy()}, {graph.outputs[0].name: reference}


def export(module, example, path: Path, *, dynamo: bool) -> None:
    import torch

    with contextlib.redirect_stdout(io.StringIO()):
        if dynamo:
            torch.onnx.export(module, (example,), str(path), dynamo=True, external_data=False, verbose=False)
        else:
            torch.onnx.export(module, (example,), str(path), dynamo=False)


@pytest.mark.parametrize("level", ["basic", "extended", "layout", "all"])
def test_agrees_with_eager_torch(exported, tmp_path, level):
    graph, feeds, reference = exported
    engine = build(graph, tmp_path, level=level)
    assert oracle.worst([oracle.compare_all(reference, engine.run(feeds))]).popitem()[1].max_rel < 1e-5
    again = load_again(engine, tmp_path, graph)
    np.testing.assert_array_equal(*(next(iter(e.run(feeds).values())) for e in (engine, again)))


def test_build_leaves_the_graph_alone(exported, tmp_path):
    graph, _, _ = exported
    before = graph.digest()
    build(graph, tmp_path)
    assert graph.digest() == before


def mapped(layers: list[LayerTime]) -> float:
    """Share of the time in layers that name a torch module."""
    return sum(t.microseconds for t in layers if t.modules) / sum(t.microseconds for t in layers)


def check_layers(graph: Graph, layers: list[LayerTime]) -> None:
    """Every convolution and matrix product of the graph is executed by exactly one kernel that can do it."""
    known = {node.name: provenance(node).modules for node in graph.nodes}
    constant = {id(n) for n in graph.nodes} - target_module._varying(graph)
    heavy = {n.name for n in graph.nodes if n.op in HEAVY and id(n) not in constant}
    done = collections.Counter(n for t in layers if t.op in HEAVY_KERNELS for n in t.nodes if n in heavy)
    assert done == collections.Counter(heavy)
    for layer in layers:
        assert layer.nodes, f"{layer.name} stands for nothing"
        assert set(layer.modules) == {m for n in layer.nodes for m in known[n]}
    covered = {n for t in layers for n in t.nodes}
    assert covered == {n.name for n in graph.nodes if id(n) not in constant}


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_layers_name_nodes_and_modules(exported, tmp_path, level):
    graph, feeds, _ = exported
    layers = build(graph, tmp_path, level=level).layers(feeds)
    check_layers(graph, layers)
    assert mapped(layers) >= 0.95


def test_layers_without_provenance_name_no_module(exported, tmp_path):
    graph, feeds, _ = exported
    bare = graph.copy()
    for number, node in enumerate(bare.walk()):
        node.name, node.provenance = f"n{number}", Provenance()
    layers = build(bare, tmp_path).layers(feeds)
    assert mapped(layers) == 0
    assert all(layer.nodes for layer in layers)


def test_a_fused_residual_belongs_to_the_convolution_that_adds_it(exported, tmp_path):
    graph, _, _ = exported
    build(graph, tmp_path)
    ops = {node.name: node.op for node in graph.nodes}
    fused = [n for n in Graph.load(tmp_path / ENGINE).nodes if n.domain == BLOCKED and len(n.inputs) > 3]
    if not fused:
        pytest.skip("this CPU has no blocked layout")
    sums = [tuple(ops[s] for s in provenance(n).sources) for n in fused]
    assert sums == [("Conv", "Add", "Relu")] * 2
    for node, stage in zip(fused, ("stages.0", "stages.2"), strict=True):
        first, *rest = provenance(node).modules  # the dynamo exporter folds the norm and keeps its name only
        assert first in (f"{stage}.conv2", f"{stage}.norm2")
        assert stage in rest


def test_the_heaviest_module_is_the_heaviest_layer(tmp_path):
    torch = pytest.importorskip("torch")
    from torch import nn

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.light, self.heavy, self.last = (
                nn.Conv2d(3, 64, 1),
                nn.Conv2d(64, 64, 7, padding=3),
                nn.Conv2d(64, 3, 1),
            )

        def forward(self, x):
            return self.last(torch.relu(self.heavy(torch.relu(self.light(x)))))

    export(Uneven().eval(), torch.randn(1, 3, 32, 32), tmp_path / "m.onnx", dynamo=False)
    graph = Graph.load(tmp_path / "m.onnx")
    layers = build(graph, tmp_path).layers(feeds_of(graph), repeats=5)
    slowest = max(layers, key=lambda t: t.microseconds)
    assert "heavy" in slowest.modules
    assert slowest.microseconds > 0.7 * sum(t.microseconds for t in layers)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["shvit_s1", "efficientvit_m0", "litepose_xs", "damoyolo_t", "repavit_tiny"])
def test_layers_of_the_zoo(name, dynamo, tmp_path):
    torch = pytest.importorskip("torch")
    from edgecompile import models

    example = torch.randn(models.ZOO[name].input_shape)
    export(models.create(name).eval(), example, tmp_path / "m.onnx", dynamo=dynamo)
    graph = Graph.load(tmp_path / "m.onnx")
    feeds = {graph.inputs[0].name: example.numpy()}
    layers = build(graph, tmp_path).layers(feeds, repeats=5)
    check_layers(graph, layers)
    assert mapped(layers) >= 0.95


# -- layers on integers ------------------------------------------------------------------------------------------------

INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def quantized(graph: Graph) -> Graph:
    from edgecompile.passes.quantize import Quantize
    from edgecompile.pipeline import Context

    context, made = Context(), graph.copy()
    context.calibration = open_data([feeds_of(graph, seed) for seed in range(3)], graph.signature().inputs)
    context.begin("quantize")
    Quantize(ends="int8").run(made, context)
    return made


def check_integer_layers(graph: Graph, folder: Path) -> list[LayerTime]:
    """Every layer of an int8 graph is executed by one kernel, which stands for it and what is fused with it alone."""
    layers = build(graph, folder).layers(feeds_of(graph))
    ops = {node.name: node.op for node in graph.nodes}
    modules = {node.name: provenance(node).modules for node in graph.nodes}
    reads = {n.name: [t.inputs[0].op for t in n.inputs[:2] if t.inputs] for n in graph.nodes if n.op in HEAVY}
    wanted = {name for name, before in reads.items() if before == ["DequantizeLinear"] * 2}
    kernels = [t for t in layers if t.op in INTEGER_KERNELS]
    assert collections.Counter(n for t in kernels for n in t.nodes if n in wanted) == collections.Counter(wanted)
    for layer in kernels:
        own = [op for op in (ops[n] for n in layer.nodes) if op != "DequantizeLinear"]
        after = own[1:-1] if own[-1] == "QuantizeLinear" else own[1:]
        assert own[0] in HEAVY and after in ([], ["Relu"], ["Clip"], ["Add"]), own
        computes = [n for n in layer.nodes if ops[n] not in ("QuantizeLinear", "DequantizeLinear")]
        assert set(layer.modules) == {m for n in computes for m in modules[n]}, "modules of its neighbours"
    for layer in layers:
        assert sum(n in wanted for n in layer.nodes) <= 1, "work of several layers for one kernel"
    return kernels


def test_kernels_on_integers_name_the_nodes_they_replaced(exported, tmp_path):
    graph = quantized(exported[0])
    assert len(check_integer_layers(graph, tmp_path)) > 3


@pytest.mark.parametrize("name", ["Transpose", "conv_token_3"])
def test_names_that_look_like_those_of_the_runtime_mislead_nobody(exported, tmp_path, name):
    graph = quantized(exported[0])
    conv = next(n for n in graph.nodes if n.op == "Conv")
    conv.name = name
    found = check_integer_layers(graph, tmp_path)
    assert [t.op for t in found if name in t.nodes] == ["QLinearConv"]


def test_a_kernel_is_not_given_what_another_still_computes(exported):
    source = quantized(exported[0])
    conv = next(n for n in source.nodes if n.op == "Conv" and n.outputs[0].outputs[0].op == "Relu")
    after, last = conv.outputs[0].outputs[0], conv.outputs[0].outputs[0].outputs[0].outputs[0]
    assert last.op == "QuantizeLinear"
    gone = target_module._quantized_after(conv, frozenset())
    assert gone == [after.outputs[0].name, last.outputs[0].name]
    for left in (after.name, last.name, last.outputs[0].name):
        assert not target_module._quantized_after(conv, frozenset([left]))


def test_profiler_overhead_is_taken_off():
    layers = [LayerTime(name, "Conv", time) for name, time in (("a", 6.0), ("b", 4.0), ("c", 14.0))]
    times = [t.microseconds for t in target_module._without_profiler(layers, plain=15.0)]
    assert times == [3.0, 1.0, 11.0]
    assert [t.microseconds for t in target_module._without_profiler(layers, plain=6.0)] == [2.0, 0.0, 10.0]
    assert target_module._without_profiler(layers, plain=30.0) == layers


# -- the files ---------------------------------------------------------------------------------------------------------


def chain(width: int = 32) -> Graph:
    """Conv, Relu, Conv, Add: enough for fusions and a blocked layout."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], "act"),
        helper.make_node("Conv", ["r", "w2"], ["c"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "r"], ["y"], "sum"),
    ]
    weights = [("w1", weight(width, 3, 3, 3)), ("b", weight(width)), ("w2", weight(width, width, 3, 3, seed=1))]
    return make(nodes, [value("x", "n", 3, 16, 16)], [value("y", "n", width, 16, 16)], weights)


def blocked(folder: Path) -> bool:
    return any(n.domain == BLOCKED for n in Graph.load(folder / ENGINE).nodes)


def test_writes_its_files_and_nothing_else(tmp_path, monkeypatch):
    scratch, folder = tmp_path / "tmp", tmp_path / "bundle"
    scratch.mkdir(), folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    graph = chain()
    engine = build(graph, folder)
    engine.layers(feeds_of(graph), repeats=2)
    assert {f.name for f in folder.iterdir()} == set(engine.manifest.files) == {ENGINE}
    assert not list(scratch.iterdir())


def test_saved_model_is_optimised_and_stays_as_it_is(tmp_path):
    graph = chain()
    engine = build(graph, tmp_path)
    assert any(n.domain for n in Graph.load(tmp_path / ENGINE).nodes), "nothing was fused"
    engine = build(graph, tmp_path, level="basic")
    again = load_again(engine, tmp_path, graph, options={**engine.manifest.options, "level": "all"})
    executed = {t.name: t.op for t in again.layers(feeds_of(graph), repeats=1)}
    assert executed == {"first": "Conv", "act": "Relu", "second": "Conv", "sum": "Add"}


_BUILD = """
import sys
from pathlib import Path
from edgecompile.graph import Graph
from edgecompile.targets.ort import OrtTarget
OrtTarget().build(Graph.load(sys.argv[1]), Path(sys.argv[2]), {"threads": 1})
"""


def many_layouts(count: int = 24) -> Graph:
    """Convolutions whose results are read in the blocked and, all by one node, in the plain layout."""
    nodes = [helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], f"conv{i}") for i in range(count)]
    nodes.append(helper.make_node("Max", [f"t{i + 1}" for i in range(count)], ["y"], "max"))
    weights = [(f"w{i}", weight(16, 16, 1, 1, seed=i)) for i in range(count)]
    return make(nodes, [value("t0", 1, 16, 8, 8)], [value("y", 1, 16, 8, 8)], weights)


def test_equal_graphs_give_equal_bytes(tmp_path):
    graph = many_layouts()
    graph.save(tmp_path / "m.onnx")
    digests = set()
    for seed in "12":
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", _BUILD, str(tmp_path / "m.onnx"), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.add(hashlib.sha256((folder / ENGINE).read_bytes()).hexdigest())
    assert len(digests) == 1
    other = tmp_path / "other"
    other.mkdir()
    build(graph, other, level="basic")
    assert hashlib.sha256((other / ENGINE).read_bytes()).hexdigest() not in digests


def test_names_of_the_source_stay(tmp_path):
    graph = chain()
    graph.metadata["author"] = "somebody"
    build(graph, tmp_path)
    saved = Graph.load(tmp_path / ENGINE)
    assert saved.signature() == graph.signature()
    assert saved.metadata == {"author": "somebody"}
    assert not [name for n in saved.nodes for name in (n.name, *(t.name for t in n.inputs)) if "token" in name]
    sources = {s for n in saved.nodes for s in provenance(n).sources}
    assert sources == {"first", "act", "second", "sum"}


def test_external_data(tmp_path):
    graph = chain()
    graph.save(tmp_path / "m.onnx", external=True)
    graph = Graph.load(tmp_path / "m.onnx")
    folder = tmp_path / "bundle"
    folder.mkdir()
    engine = build(graph, folder)
    assert engine.manifest.files == (ENGINE, ENGINE + ".data")
    assert (folder / ENGINE).stat().st_size < 20_000
    feeds = feeds_of(graph)
    moved = folder.rename(tmp_path / "moved")
    again = load_again(engine, moved, graph)
    np.testing.assert_allclose(again.run(feeds)["y"], oracle.run(graph, feeds)["y"], rtol=1e-4, atol=1e-5)
    assert again.layers(feeds, repeats=1)


@pytest.mark.slow
def test_more_than_2_gib(tmp_path):
    size, count = 8192, 9  # 9 x 256 MiB
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], f"layer{i}") for i in range(count)]
    graph = make(nodes, [value("t0", 1, size)], [value(f"t{count}", 1, size)], [("w0", np.zeros(1, np.float32))])
    for node in graph.nodes:
        ones = np.full((size, size), 2.0 / size, np.float32)
        node.inputs[1] = gs.Constant(f"{node.name}.weight", ones)
    assert graph.weight_bytes() > 2 << 30
    engine = build(graph, tmp_path)
    assert set(engine.manifest.files) == {ENGINE, ENGINE + ".data"}
    result = engine.run({"t0": np.ones((1, size), np.float32)})[f"t{count}"]
    np.testing.assert_allclose(result, 2.0**count, rtol=1e-4)


def test_ort_format(tmp_path):
    graph = chain()
    engine = build(graph, tmp_path, ort_format="true")
    assert engine.manifest.files == (ENGINE, ORT_FORMAT)
    session = ort.InferenceSession(str(tmp_path / ORT_FORMAT), providers=["CPUExecutionProvider"])
    feeds = feeds_of(graph)
    np.testing.assert_array_equal(session.run(None, feeds)[0], engine.run(feeds)["y"])


# -- loading -----------------------------------------------------------------------------------------------------------


def test_refuses_another_version(tmp_path):
    graph = chain()
    engine = build(graph, tmp_path)
    load_again(engine, tmp_path, graph)
    with pytest.raises(EnvironmentMissing, match=r"built with ONNX Runtime 1\.9\.0") as caught:
        load_again(engine, tmp_path, graph, versions={"onnxruntime": "1.9.0"})
    assert "onnxruntime==1.9.0" in caught.value.fix


def other_cpu(engine) -> str:
    arch, *features = engine.manifest.device.split()
    return " ".join([arch, *(f for f in features if f != "avx512f"), *(["avx512f"] * ("avx512f" not in features))])


def test_refuses_a_layout_for_another_cpu(tmp_path):
    graph = chain()
    engine = build(graph, tmp_path)
    if not blocked(tmp_path):
        pytest.skip("this CPU has no blocked layout")
    with pytest.raises(EnvironmentMissing, match="built for another CPU") as caught:
        load_again(engine, tmp_path, graph, device=other_cpu(engine))
    assert "level=extended" in caught.value.fix


def test_takes_an_unblocked_model_from_another_cpu(tmp_path):
    graph = chain()
    engine = build(graph, tmp_path, level="extended")
    assert not blocked(tmp_path)
    assert load_again(engine, tmp_path, graph, device=other_cpu(engine)).run(feeds_of(graph))


# -- running -----------------------------------------------------------------------------------------------------------


def test_dynamic_batch(tmp_path):
    graph = chain()
    engine = build(graph, tmp_path)
    for batch in (1, 3):
        feeds = oracle.random_feeds(graph.signature().inputs, sizes={"n": batch})
        assert feeds["x"].shape[0] == batch
        np.testing.assert_allclose(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"], rtol=1e-4, atol=1e-5)


def test_clock_follows_the_threads(tmp_path):
    graph = chain()
    for threads, clock in (("1", "thread_cpu"), (2, "wall")):
        engine = build(graph, tmp_path, threads=threads)
        assert (engine.threads, engine.clock) == (int(threads), clock)
    assert build(graph, tmp_path, threads="auto").threads == measure.available_cores()


def test_call_executes_the_model(exported, tmp_path):
    graph, feeds, reference = exported
    engine = build(graph, tmp_path)
    call = engine.call({name: x.copy() for name, x in feeds.items()})
    gc.collect()
    clutter = [np.full_like(x, np.nan) for x in feeds.values() for _ in range(50)]  # would reuse memory set free
    call()
    binding = call.args[0]
    for _ in range(3):
        call()
        result = binding.copy_outputs_to_cpu()[0]
        np.testing.assert_allclose(result, next(iter(reference.values())), rtol=1e-3, atol=1e-5)
    del clutter
    samples = measure.interleave({"call": call, "run": lambda: engine.run(feeds)}, engine.clock, seconds=0.3)
    assert 0.5 < measure.ratio(samples["call"], samples["run"]).value < 1.3


def test_call_costs_a_few_microseconds(tmp_path):
    graph = make([helper.make_node("Relu", ["x"], ["y"], "r")], [value("x", 1)], [value("y", 1)])
    engine = build(graph, tmp_path)
    samples = measure.interleave({"call": engine.call(feeds_of(graph))}, "thread_cpu", seconds=0.2)
    assert samples["call"].p50 < 20e-6


def test_subgraphs_count_for_the_node_that_holds_them(tmp_path):
    def branch(name: str, size: int) -> onnx.GraphProto:
        nodes = [helper.make_node("Conv", ["x", "w"], [f"{name}c"], f"{name}/Conv", pads=[size // 2] * 4)]
        nodes += [helper.make_node("Mul", [f"{name}c", "two"], [f"{name}o"], f"{name}/Mul")]
        return helper.make_graph(nodes, name, [], [value(f"{name}o", 1, 8, 32, 32)])

    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], "mean", keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["g"], "greater"),
        helper.make_node("If", ["g"], ["y"], "choose", then_branch=branch("then", 5), else_branch=branch("else", 5)),
        helper.make_node("Relu", ["y"], ["z"], "last"),
    ]
    weights = [("w", weight(8, 8, 5, 5)), ("two", np.array([2], np.float32)), ("zero", np.array(0, np.float32))]
    graph = make(nodes, [value("x", 1, 8, 32, 32)], [value("z", 1, 8, 32, 32)], weights)
    engine = build(graph, tmp_path)
    for sign in (1, -1):
        feeds = {"x": sign * np.abs(feeds_of(graph)["x"])}
        np.testing.assert_allclose(engine.run(feeds)["z"], oracle.run(graph, feeds)["z"], rtol=1e-4, atol=1e-4)
        layers = {t.name: t for t in engine.layers(feeds, repeats=3)}
        assert set(layers) == {n.name for n in Graph.load(tmp_path / ENGINE).nodes}
        assert max(layers.values(), key=lambda t: t.microseconds).nodes == ("choose",)


def test_local_function_stands_for_its_call(tmp_path):
    body = [helper.make_node("MatMul", ["a", "b"], ["m"], "product"), helper.make_node("Relu", ["m"], ["o"], "relu")]
    function = helper.make_function("own", "Linear", ["a", "b"], ["o"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Linear", ["x", "w"], ["y"], "call", domain="own")]
    graph = make(nodes, [value("x", 4, 8)], [value("y", 4, 8)], [("w", weight(8, 8))], [function])
    engine = build(graph, tmp_path)
    feeds = feeds_of(graph)
    np.testing.assert_allclose(engine.run(feeds)["y"], np.maximum(feeds["x"] @ weight(8, 8), 0), rtol=1e-5, atol=1e-6)
    assert {t.nodes for t in engine.layers(feeds, repeats=1)} == {("call",)}


def test_nodes_without_names_of_their_own(tmp_path):
    nodes = [
        helper.make_node("Exp", ["x"], ["a"], "same"),
        helper.make_node("Tan", ["a"], ["b"], "same"),
        helper.make_node("Atan", ["b"], ["y"], ""),
    ]
    graph = make(nodes, [value("x", 64)], [value("y", 64)])
    layers = build(graph, tmp_path).layers(feeds_of(graph), repeats=2)
    assert [(t.op, t.nodes) for t in layers] == [("Exp", ("same",)), ("Tan", ("same",)), ("Atan", ("y",))]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_unknown_operator_is_named_by_module(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "r"),
        helper.make_node("Mystery", ["a"], ["y"], "m", domain="their"),
    ]
    graph = make(nodes, [value("x", 4)], [value("y", 4)])
    graph.nodes[1].provenance = Provenance(("blocks.3.mystery",), ("m",))
    with pytest.raises(InputError, match=r"rejects blocks\.3\.mystery \(Mystery\)"):
        build(graph, tmp_path)
    assert not list(tmp_path.iterdir())


def test_operator_without_kernel_is_named_by_module(tmp_path):
    shift = helper.make_node("BitShift", ["x", "x"], ["y"], "shift", direction="LEFT")
    graph = make([shift], [value("x", 4, dtype=TensorProto.UINT16)], [value("y", 4, dtype=TensorProto.UINT16)])
    graph.nodes[0].provenance = Provenance(("bits",), ("shift",))
    with pytest.raises(InputError, match=r"rejects bits \(BitShift\); Could not find an implementation"):
        build(graph, tmp_path)


def test_failure_at_run_time_is_named_by_module(tmp_path):
    nodes = [helper.make_node("Exp", ["x"], ["a"], "e"), helper.make_node("Reshape", ["a", "shape"], ["y"], "reshape")]
    shapes = [value("x", 6), value("shape", 2, dtype=TensorProto.INT64)]
    graph = make(nodes, shapes, [value("y", "a", "b")])
    graph.nodes[1].provenance = Provenance(("head.flatten",), ("reshape",))
    engine = build(graph, tmp_path)
    good = {"x": np.zeros(6, np.float32), "shape": np.array([2, 3])}
    assert engine.run(good)["y"].shape == (2, 3)
    for attempt in (engine.run, engine.call, engine.layers):
        with pytest.raises(InputError, match=r"rejects head\.flatten \(Reshape\)"):
            attempt({**good, "shape": np.array([4, 4])})


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "'x' is missing"),
        ({"x": np.zeros((1, 4, 16, 16), np.float32)}, "the model wants [?n]x3x16x16"),
        ({"x": np.zeros((1, 3, 16, 16), np.float64)}, "float64"),
        ({"other": np.zeros((1, 3, 16, 16), np.float32)}, "no input 'other'"),
    ],
)
def test_wrong_inputs(tmp_path, feeds, message):
    engine = build(chain(), tmp_path)
    for attempt in (engine.run, engine.call, engine.layers):
        with pytest.raises(InputError, match=message):
            attempt(feeds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": "1"}, "did you mean 'threads'"),
        ({"level": "highest"}, "level=highest"),
        ({"threads": "0"}, "threads=0"),
        ({"threads": "many"}, "threads=many"),
        ({"ort_format": "maybe"}, "ort_format=maybe"),
        ({"providers": "npu"}, "'npu' is not a provider"),
        ({"cuda.device_id": "1"}, "has no effect"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        OrtTarget().build(chain(), tmp_path, options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "openvino"])
def test_missing_provider(tmp_path, provider):
    if ort_session.PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip(f"the {provider} provider is here")
    with pytest.raises(EnvironmentMissing, match=f"no {provider} provider") as caught:
        OrtTarget().build(chain(), tmp_path, {"providers": provider})
    assert "pip install" in caught.value.fix


def test_options_are_recorded_as_resolved(tmp_path):
    graph = chain()
    manifest = OrtTarget().build(graph, tmp_path, {"providers": "auto"}).manifest
    assert manifest.options["level"] == "all"
    assert manifest.options["threads"] == "auto"  # the board that loads the bundle counts its own cores
    assert "cpu" in manifest.options["providers"].split(",")
    assert "PROVIDER.KEY" not in manifest.options
    assert manifest.versions == {"onnxruntime": ort.__version__}


# -- providers that optimise when a session is made --------------------------------------------------------------------


def test_an_engine_without_files_runs_from_the_graph(tmp_path):
    graph = chain()
    build(graph, tmp_path)
    manifest = EngineManifest("ort", (), {"onnxruntime": "1.9.0"}, "gpu", {"providers": "cpu", "threads": "1"})
    engine = OrtTarget().load(tmp_path, manifest, graph)
    feeds = feeds_of(graph)
    np.testing.assert_allclose(engine.run(feeds)["y"], oracle.run(graph, feeds)["y"], rtol=1e-4, atol=1e-5)
    assert engine.layers(feeds, repeats=1)


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_probe():
    found = {c.name: c for c in OrtTarget().probe()}
    assert found["onnxruntime"].version == ort.__version__
    assert found["onnxruntime cpu provider"].available
    tensorrt = found["onnxruntime tensorrt provider"]
    assert "libnvinfer.so.10" in tensorrt.detail
    for name in ("cuda", "tensorrt", "openvino"):
        entry = found[f"onnxruntime {name} provider"]
        if ort_session.PROVIDERS[name] not in ort.get_available_providers():
            assert not entry.available and "pip install" in entry.fix
