"""The TVM target: what it computes, what it writes and refuses, and which nodes its kernels stand for."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import driver, frontend, measure, models, oracle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph, provenance
from edgecompile.passes.clean import Clean
from edgecompile.passes.fold_norm import FoldNorm
from edgecompile.passes.legalize import Legalize
from edgecompile.passes.reparam import Reparam
from edgecompile.pipeline import Pipeline
from edgecompile.targets.ort import OrtTarget
from edgecompile.targets.tvm import ENGINE, KERNELS, TvmTarget, cuda, lower, options
from edgecompile.targets.tvm.engine import stamps

tvm = pytest.importorskip("tvm")
ONE = {"threads": 1}
TOLERANCE = 1e-4
RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32) / 4


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def network() -> Graph:
    """One of everything that the schedules know, and what stands between them in a vision network."""
    weights = {
        "stem": weight(20, 3, 3, 3),
        "bias": weight(20),
        "depth": weight(20, 1, 5, 5),
        "point": weight(40, 20, 1, 1),
        "back": weight(20, 40, 1, 1),
        "grouped": weight(20, 10, 3, 3),
        "tokens": ints(1, 20, 64),
        "qkv": weight(20, 30),
        "sizes": ints(10, 10, 10),
        "out": weight(10, 20),
        "square": ints(1, 20, 8, 8),
        "up": weight(20, 6, 4, 4),
        "axes": ints(2, 3),
        "head": weight(5, 6),
    }
    nodes = [
        ("Conv", "x stem bias", "a0", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Relu", "a0", "a1", {}),
        ("Conv", "a1 depth", "a2", {"pads": [2, 2, 2, 2], "group": 20}),
        ("Conv", "a2 point", "a3", {}),
        ("Relu", "a3", "a4", {}),
        ("Conv", "a4 back", "a5", {}),
        ("Add", "a5 a1", "a6", {}),
        ("Conv", "a6 grouped", "a7", {"pads": [1, 1, 1, 1], "group": 2}),
        ("Reshape", "a7 tokens", "b0", {}),
        ("Transpose", "b0", "b1", {"perm": [0, 2, 1]}),
        ("MatMul", "b1 qkv", "b2", {}),
        ("Split", "b2 sizes", "q k v", {"axis": 2}),
        ("Transpose", "k", "kt", {"perm": [0, 2, 1]}),
        ("MatMul", "q kt", "b3", {}),
        ("Softmax", "b3", "b4", {"axis": -1}),
        ("MatMul", "b4 v", "b5", {}),
        ("MatMul", "b5 out", "b6", {}),
        ("Transpose", "b6", "b7", {"perm": [0, 2, 1]}),
        ("Reshape", "b7 square", "b8", {}),
        ("ConvTranspose", "b8 up", "c0", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("ReduceMean", "c0 axes", "c1", {"keepdims": 0}),
        ("Gemm", "c1 head", "c2", {"transB": 1}),
    ]
    made = [
        helper.make_node(op, inputs.split(), outputs.split(), name=f"/net/layer{n}/{op}", **attrs)
        for n, (op, inputs, outputs, attrs) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [
            helper.make_tensor_value_info("c2", TensorProto.FLOAT, [1, 5]),
            helper.make_tensor_value_info("c0", TensorProto.FLOAT, [1, 6, 16, 16]),
        ],
        [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def one_node(op: str, *shape: int | str, opset: int = 18, domain: str = "", **attrs) -> Graph:
    node = helper.make_node(op, ["x"], ["y"], name="/net/block/op", domain=domain, **attrs)
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return Graph.from_proto(helper.make_model(graph, opset_imports=domains, ir_version=10))


def error(reference, outputs) -> float:
    return max(e.max_rel for e in oracle.compare_all(reference, outputs).values())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A graph, its folder, its engine, and inputs."""
    graph, folder = network(), tmp_path_factory.mktemp("tvm")
    return graph, folder, TvmTarget().build(graph, folder, ONE), oracle.random_feeds(graph.signature().inputs)


def test_agrees_with_the_oracle_and_after_loading(built):
    graph, folder, engine, feeds = built
    reference = oracle.run(graph, feeds)
    assert list(engine.run(feeds)) == list(reference)
    assert error(reference, engine.run(feeds)) < 1e-5
    again = TvmTarget().load(folder, engine.manifest, graph)
    assert error(engine.run(feeds), again.run(feeds)) == 0
    again.close()
    assert error(reference, engine.run({"x": feeds["x"] + 1})) > 1e-2


def test_default_lowering_computes_the_same(built, tmp_path):
    graph, _, engine, feeds = built
    plain = TvmTarget().build(graph, tmp_path, {**ONE, "schedules": "no"})
    assert error(engine.run(feeds), plain.run(feeds)) < 1e-5


def test_two_threads_compute_the_same(built, tmp_path):
    graph, _, engine, feeds = built
    two = TvmTarget().build(graph, tmp_path, {"threads": 2})
    assert (two.clock, two.threads) == ("wall", 2)
    assert (engine.clock, engine.threads) == ("thread_cpu", 1)
    assert error(engine.run(feeds), two.run(feeds)) < 1e-5


def test_calls_are_bound_to_their_inputs(built):
    _, _, engine, feeds = built
    other = {"x": feeds["x"] + 1}
    first, second = engine.call(feeds), engine.call(other)
    values = first()
    np.testing.assert_array_equal(values[0].numpy(), engine.run(feeds)["c2"])
    np.testing.assert_array_equal(second()[0].numpy(), engine.run(other)["c2"])
    assert not np.array_equal(values[0].numpy(), second()[0].numpy())


def test_the_build_leaves_the_graph_alone_and_writes_what_the_manifest_says(built, tmp_path):
    graph, folder, engine, _ = built
    before = graph.digest()
    TvmTarget().build(graph, tmp_path, ONE)
    assert graph.digest() == before
    assert engine.manifest.files == (ENGINE, KERNELS)
    assert {p.name for p in folder.iterdir()} == {ENGINE, KERNELS}
    assert engine.manifest.device.split()[0] == platform.machine()
    assert set(engine.manifest.device.split()[1:]) <= set(measure.cpu_features())


def test_layers_name_nodes_and_modules(built):
    graph, folder, engine, feeds = built
    layers = engine.layers(feeds, 3)
    known = {node.name: provenance(node).modules for node in graph.nodes}
    heavy = [n.name for n in graph.nodes if n.op in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Softmax")]
    for name in heavy:
        assert sum(name in layer.nodes for layer in layers), name
    for layer in layers:
        assert layer.nodes
        assert layer.microseconds > 0
        assert set(layer.modules) == {m for n in layer.nodes for m in known[n]}
    stem = next(layer for layer in layers if heavy[0] in layer.nodes and "conv2d" in layer.op)
    assert "/net/layer1/Relu" in stem.nodes
    assert heavy[1] not in stem.nodes
    assert "layer1" in " ".join(stem.modules)
    kernels = json.loads((folder / KERNELS).read_text())
    assert [(k["symbol"], tuple(k["nodes"])) for k in kernels] == [(layer.name, layer.nodes) for layer in layers]


def test_the_timed_form_computes_the_same_in_the_same_time(built):
    _, folder, engine, feeds = built
    reference, call = engine.run(feeds), engine.call(feeds)
    machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(folder / ENGINE)), tvm.cpu())
    given = stamps(len(json.loads((folder / KERNELS).read_text())))
    times, outputs = machine[lower.TIMED](*(tvm.runtime.tensor(value) for value in (*feeds.values(), given)))
    for value, expected in zip(outputs, reference.values(), strict=True):
        np.testing.assert_array_equal(value.numpy(), expected)
    assert (np.diff(times.numpy() @ np.array([10**9, 1])) >= 0).all()
    least = {"layers": np.inf, "call": np.inf}  # in turns, since others use the machine too
    for _ in range(20):
        least["layers"] = min(least["layers"], sum(layer.microseconds for layer in engine.layers(feeds, 3)))
        begun = time.perf_counter()
        call()
        least["call"] = min(least["call"], (time.perf_counter() - begun) * 1e6)
    assert 0.5 < least["layers"] / least["call"] < 1.2


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused(built):
    _, _, engine, feeds = built
    for wrong in ({}, {"x": feeds["x"][:, :2]}, {"x": feeds["x"].astype(np.float64)}, {**feeds, "z": feeds["x"]}):
        with pytest.raises(InputError):
            engine.run(wrong)
        with pytest.raises(InputError):
            engine.call(wrong)


def test_a_library_for_another_cpu_is_refused_before_it_is_touched(built, tmp_path):
    graph, folder, engine, _ = built
    shutil.copy(folder / KERNELS, tmp_path)
    (tmp_path / ENGINE).write_bytes(b"not a library")
    missing = next(f for f in ("amx_int8", "sve2", "amx_bf16") if f not in measure.cpu_features())
    other = dataclasses.replace(engine.manifest, device=f"{engine.manifest.device} {missing}")
    with pytest.raises(EnvironmentMissing, match=missing):
        TvmTarget().load(tmp_path, other, graph)
    with pytest.raises(EnvironmentMissing, match="riscv"):
        TvmTarget().load(tmp_path, dataclasses.replace(engine.manifest, device="riscv"), graph)
    with pytest.raises(EnvironmentMissing, match=r"0\.1"):
        TvmTarget().load(tmp_path, dataclasses.replace(engine.manifest, versions={"apache-tvm": "0.1.0"}), graph)


def test_an_operator_that_relax_lacks_is_named_by_module(tmp_path):
    with pytest.raises(InputError, match=r"block.*Det"):
        TvmTarget().build(one_node("Det", 3, 3), tmp_path, ONE)
    with pytest.raises(InputError, match=r"block.*Relu"):  # Relax would take it for the operator it knows
        TvmTarget().build(one_node("Relu", 3, 3, domain="com.example"), tmp_path, ONE)
    assert not list(tmp_path.iterdir())


def test_what_the_importer_fails_on_is_named_by_module(tmp_path):
    graph = one_node("Relu", 3, 3)
    graph.nodes[0].op, graph.nodes[0].attrs = "LRN", {}
    with pytest.raises(InputError, match=r"block.*LRN"):
        TvmTarget().build(graph, tmp_path, ONE)


def test_graphs_and_options_that_cannot_be_used(tmp_path):
    for graph, words in ((one_node("Relu", "n", 3), "static"), (one_node("Relu", 3, opset=6), "opset 6")):
        with pytest.raises(InputError, match=words):
            TvmTarget().build(graph, tmp_path, ONE)
    for bad in (
        {"thread": 1},
        {"threads": 0},
        {"arch": "87"},
        {"mtriple": "riscv64-linux"},
        {"schedules": "maybe"},
        {"winograd": 2},
    ):
        with pytest.raises(InputError):
            TvmTarget().build(one_node("Relu", 3), tmp_path, bad)


def test_winograd_is_for_those_who_want_it(tmp_path):
    weights = onnx.numpy_helper.from_array(weight(64, 64, 3, 3), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="/net/conv/Conv", pads=[1, 1, 1, 1])
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64, 28, 28]) for n in "xy"]
    proto = helper.make_graph([node], "g", value[:1], value[1:], [weights])
    graph = Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    feeds = oracle.random_feeds(graph.signature().inputs)
    for given, found in (({}, True), ({"winograd": "no"}, False)):
        engine = TvmTarget().build(graph, tmp_path, {**ONE, **given})
        assert ("winograd4" in (tmp_path / KERNELS).read_text()) == found
        assert error(oracle.run(graph, feeds), engine.run(feeds)) < 1e-5


def test_without_tvm(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(EnvironmentMissing, match="apache-tvm"):
        TvmTarget().build(one_node("Relu", 3), tmp_path, ONE)
    assert not any(c.available for c in TvmTarget().probe())


# -- other devices -----------------------------------------------------------------------------------------------------


def test_cross_compilation_names_its_linker(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    given = {"mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78"}
    with pytest.raises(EnvironmentMissing, match="aarch64-linux-gnu-gcc"):
        TvmTarget().build(one_node("Relu", 3), tmp_path, given)
    device = options.device(options.parse(given)).split()
    assert device[0] == "aarch64"
    assert {"asimd", "asimddp", "asimdhp"} <= set(device)
    assert "avx" not in device


FAMILIES = {
    "shvit_cifar": 32,
    "efficientvit_cifar": 32,
    "litepose_xs": 64,
    "damoyolo_ns": 64,
    "deanet": 64,
    "repavit_cifar": 32,
    "repvgg_cifar": 32,
}
# instructions of aarch64: mask of the bits that are not registers, and what they are
SDOT, FMLA = (0xFFE0FC00, 0x4E809400), (0xFFC0F400, 0x4F801000)


def instructions(graph: Graph, folder: Path, mcpu: str) -> np.ndarray:
    """Words of the object file that a graph is compiled to for an ARM board; nothing is linked."""
    keep = folder / "keep"
    cases = '-o) shift; made=$1; : > "$made";; *.o) cat "$1" >> "$made";;'
    keep.write_text(f"#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in {cases} esac; shift; done\n")
    keep.chmod(0o755)
    given = {**ONE, "mtriple": "aarch64-linux-gnu", "mcpu": mcpu, "linker": str(keep)}
    engine = TvmTarget().build(graph, folder, given)
    with pytest.raises(EnvironmentMissing, match="aarch64"):
        engine.run(oracle.random_feeds(graph.signature().inputs))
    data = (folder / ENGINE).read_bytes()
    assert data[:4] == b"\x7fELF" and data[18:20] == b"\xb7\0"  # EM_AARCH64
    return np.frombuffer(data[: len(data) // 4 * 4], np.uint32)


def count(words: np.ndarray, instruction: tuple[int, int]) -> int:
    mask, value = instruction
    return int((words & np.uint32(mask) == value).sum())


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() == "aarch64", reason="the code would run here")
@pytest.mark.parametrize("name", FAMILIES)
def test_code_for_an_arm_board_is_compiled_here(name, tmp_path):
    words = instructions(exported(name, FAMILIES[name]), tmp_path, "cortex-a78")
    assert count(words, FMLA) > 500
    assert count(words, SDOT) < 20  # floats that look like one


def test_code_for_a_gpu_is_compiled_here_and_runs_elsewhere(built, tmp_path):
    if cuda.compiler() is None:
        pytest.skip("no CUDA compiler")
    if tvm.cuda(0).exist:
        pytest.skip("it would run here")
    graph, _, _, feeds = built
    engine = TvmTarget().build(graph, tmp_path, {"arch": "sm_87"})
    assert (engine.manifest.device, engine.threads) == ("cuda sm_87", 0)
    assert b"\x50\xed\x55\xba" in (tmp_path / ENGINE).read_bytes()  # a fat binary
    with pytest.raises(EnvironmentMissing, match="sm_87"):
        engine.run(feeds)
    with pytest.raises(EnvironmentMissing, match="sm_87"):
        TvmTarget().load(tmp_path, engine.manifest, graph)


def test_this_machine_is_the_default():
    target = options.parse({}).target
    assert target["kind"] == "llvm"
    for feature in ("avx2", "avx512f") if platform.machine() == "x86_64" else ():
        assert (f"+{feature}" in target["mattr"]) == (feature in measure.cpu_features())


def test_probe_says_what_it_compiles_for():
    found = {c.name: c for c in TvmTarget().probe()}
    assert found["tvm compiler"].available
    assert platform.machine() in found["tvm compiler"].detail
    assert "aarch64-linux-gnu-gcc" in found["tvm linker for aarch64"].detail


# -- the zoo -----------------------------------------------------------------------------------------------------------


def exported(name: str, resolution: int) -> Graph:
    """A zoo model with random weights, exported and taken through the target's own pipeline."""
    torch = pytest.importorskip("torch")
    from edgecompile.models.randomize import randomize

    example = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    module = randomize(models.create(name), 0, example)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (example,), buffer, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    graph = Graph.from_proto(onnx.load_from_string(buffer.getvalue()))
    passes = (Clean(), FoldNorm(), Reparam(), Legalize("tvm"), Clean())
    Pipeline(passes).run(graph, verify=False, strict=True)
    return graph


def smallest(name: str) -> int:
    """A resolution at which a model is quick to run: the native one where its attention knows no other."""
    fixed = models.ZOO[name].module in ("efficientvit", "repavit", "cifar")
    return models.ZOO[name].resolution if fixed else 128


SLOW = pytest.mark.slow
QUICK = ("repavit_cifar", "repvgg_cifar")


@pytest.mark.parametrize(
    "name, resolution",
    [
        *((name, 32) for name in QUICK),
        pytest.param("litepose_xs", 64, marks=SLOW),
        *(pytest.param(name, smallest(name), marks=SLOW) for name in models.names() if name not in QUICK),
    ],
)
def test_zoo_model_agrees_with_onnx_runtime(name, resolution, tmp_path):
    pytest.importorskip("onnxruntime")
    graph = exported(name, resolution)
    feeds = oracle.random_feeds(graph.signature().inputs, 3)
    (tmp_path / "ort").mkdir()
    reference = OrtTarget().build(graph, tmp_path / "ort", ONE).run(feeds)
    assert error(reference, TvmTarget().build(graph, tmp_path, ONE).run(feeds)) <= TOLERANCE


def test_an_engine_runs_on_as_many_threads_as_it_was_built_for_and_leaves_the_process_its_cores(tmp_path, monkeypatch):
    """What is compiled or opened after it would find one core, and the threads of other runtimes would share that."""
    if len(before := os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use one core only")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many tools advise; unset, the runtime takes half of the CPUs
    graph = exported("repvgg_cifar", 32)
    feeds = oracle.random_feeds(graph.signature().inputs)

    def run() -> tuple[int, int]:
        engines = [TvmTarget().build(graph, tmp_path, {"threads": n}) for n in (1, 2)]
        for engine in engines:
            engine.run(feeds)
        return tvm.get_global_func("runtime.NumThreads")(), len(os.sched_getaffinity(0))

    with ThreadPoolExecutor(1) as thread:  # a thread has a pool of its own, and no other test has used this one's
        assert thread.submit(run).result() == (2, len(before))


# -- models that others exported ---------------------------------------------------------------------------------------


def test_an_open_batch_is_fixed_and_what_is_compared_with_is_legalized(tmp_path):
    """The pads are computed, which TVM cannot take before they are folded; ONNX Runtime takes both."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,6,6] x) => (float[N,2,8,8] y) {'
    text += " p = Identity (pads) q = Pad (x, p) y = Conv (q, w) }"
    model = onnx.parser.parse_model(text)
    weights = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "w": np.ones((2, 3, 1, 1), np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in weights.items())
    onnx.save(model, tmp_path / "net.onnx")
    given = {"x": frontend.InputSpec((2, 3, 6, 6))}
    for name, batch in (("tvm", 2), ("ort", "N")):
        source = frontend.load(str(tmp_path / "net.onnx"), inputs=given, folder=tmp_path)
        made = driver.build(source, tmp_path / name, driver.Options(name, seconds=0.3, target_options={"threads": 1}))
        assert made.graph().inputs[0].shape == [batch, 3, 6, 6]
        found = json.loads((made.path / "report.json").read_text())
        noted = "the input 'x' is fixed to 2x3x6x6: the target compiles for one shape" in found["model"]["notes"]
        assert noted == (name == "tvm") and found["latency"]["plain"]["label"] == "plain export"
