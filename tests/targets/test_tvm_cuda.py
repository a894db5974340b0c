"""Engines of the target tvm on a GPU: coded weights and binary attention, and what runs where.

Few tests need a GPU: TVM's host code and CUDA runtime run as they are, and the CUDA C that TVM generates is compiled
for this CPU (``cuda_on_host``). What a GPU adds, its instructions and its time, is left to those marked ``gpu``; where
nvcc is, it compiles the kernels.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_on_host import Device, compiled, used
from cuda_on_host import built as built_there
from onnx import helper, numpy_helper
from test_tvm import exported
from test_tvm_shift_add import at_thresholds, built, hamming, model, weights_of

from edgecompile import oracle
from edgecompile.calibration_data import open_data
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops
from edgecompile.pipeline import Pipeline
from edgecompile.targets.tvm import ENGINE, KERNELS, TvmTarget, cuda, options, shift_add
from edgecompile.targets.tvm.schedules import shift_add_cuda as gpu
from edgecompile.targets.tvm.schedules.shift_add import Rows

tvm = pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)
GPU = {"arch": "sm_87", "threads": 1}
Case = tuple[str, int, int, list[int]]  # kind and bits of codes, their group, shape of the activations


@pytest.fixture(scope="module")
def _device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    if not list(Path(tvm.__file__).parent.glob("lib/libtvm_runtime_cuda.so")):
        pytest.skip("this TVM has no CUDA runtime")
    with Device(tmp_path_factory.mktemp("device")) as made:
        yield made


@pytest.fixture
def device(_device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device; its compiler is on the path."""
    monkeypatch.setenv("PATH", _device.variables["PATH"])
    return _device


def errors(graph: Graph, folder: Path, device: Device, **given: Any) -> tuple[dict[str, float], list[str]]:
    """Of the engine's outputs to the bodies, over the largest value of each; and what was said."""
    said: list[str] = []
    feeds = oracle.random_feeds(graph.signature().inputs)
    TvmTarget().build(graph, folder, {**GPU, **given}, said.append)
    found, expected = device.run(folder / ENGINE, list(feeds.values())), oracle.run(graph, feeds)
    pairs = zip(graph.outputs, found, strict=True)
    return {t.name: float(np.abs(f - (e := expected[t.name])).max() / np.abs(e).max()) for t, f in pairs}, said


def together(graphs: Sequence[Graph]) -> Graph:
    """Graphs side by side in one."""
    protos = [onnx.compose.add_prefix(g.to_proto(), f"n{i}_", rename_functions=False) for i, g in enumerate(graphs)]
    first = protos[0]
    for other in protos[1:]:
        for part in ("node", "input", "output", "initializer"):
            getattr(first.graph, part).extend(getattr(other.graph, part))
        known = {f.name for f in first.functions}
        first.functions.extend(f for f in other.functions if f.name not in known)
    return Graph.from_proto(first)


def layers(cases: Sequence[Case], rows: int, columns: int) -> Graph:
    made = []
    for kind, bits, group, shape in cases:
        weight = RNG.standard_normal((rows, columns)).astype(np.float32)
        made.append(model(codes.encode(weight, kind, bits, group=group), [*shape, columns]))
    return together(made)


# -- products ----------------------------------------------------------------------------------------------------------

FEW: list[Case] = [
    ("pot", 4, 24, [1]), ("pot", 3, 64, [1, 2]), ("pot", 2, 7, [8]), ("sp2", 8, 50, [5]), ("binary", 4, 32, [2]),
]  # fmt: skip
MORE: list[Case] = [("pot", 4, 32, [9]), ("pot", 3, 50, [2, 14]), ("binary", 2, 7, [13])]


@pytest.mark.parametrize(("cases", "name"), [(FEW, ""), (MORE, "_tile")], ids=["few", "more"])
def test_layers_of_few_tokens_are_computed_from_their_codes(cases, name, device, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cost_decoded", lambda *_: math.inf)  # which is faster for layers so small
    found, said = errors(layers(cases, 101, 77), tmp_path, device)
    assert len(found) == len(said) == len(cases) and max(found.values()) < 1e-5, found
    for text, (kind, bits, _, shape) in zip(said, cases, strict=True):
        how = ("binary" if kind == "binary" else "book") + name
        assert text.endswith(f": {bits}-bit codes of 101x77, {math.prod(shape)} tokens: {how}")
    symbols = " ".join(kernel["symbol"] for kernel in json.loads((tmp_path / KERNELS).read_text()))
    assert f"book{name}_product" in symbols and "matmul" not in symbols


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), [(kind, bits) for kind, widths in codes.WIDTHS.items() for bits in widths])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 65), (130, 300)])
def test_codes_of_all_sizes_in_groups_of_all_sizes(kind, bits, rows, columns, device, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cost_decoded", lambda *_: math.inf)  # also where that would not pay
    cases: list[Case] = [(kind, bits, group, [m]) for group, m in ((0, 1), (7, 32), (32, 9), (50, 8))]
    found, said = errors(layers(cases, rows, columns), tmp_path, device)
    assert max(found.values()) < 1e-5 and not any("float32" in text for text in said)


@pytest.mark.slow
def test_activations_that_shared_memory_does_not_hold_come_in_parts(device, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cost_decoded", lambda *_: math.inf)
    cases: list[Case] = [("pot", 4, 0, [1]), ("binary", 3, 50, [1]), ("pot", 8, 64, [8]), ("pot", 2, 0, [8])]
    found, _ = errors(layers(cases, 40, 4500), tmp_path, device)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize(("shape", "given"), [([3], {"schedules": "no"}), ([33], {})])
def test_other_layers_are_computed_from_decoded_weights(shape, given, device, tmp_path):
    found, said = errors(layers([("pot", 4, 32, shape)], 65, 77), tmp_path, device, **given)
    assert max(found.values()) < 1e-5 and said[0].endswith("tokens: float32")
    symbols = [kernel["symbol"] for kernel in json.loads((tmp_path / KERNELS).read_text())]
    assert "matmul" in symbols and not any("product" in symbol for symbol in symbols)
    # The cost model's word for it: a block computes 32 tokens, be there three or 33.
    text = device.sources()[-1]
    threads, sums = re.search(r"bounds__\((\d+)\) matmul_kernel", text), re.search(r"pad_local_ptr\[(\d+)\]", text)
    assert threads and sums and int(threads[1]) * int(sums[1]) == gpu._TILE * gpu._ROWS


def test_a_convolution_of_one_pixel_is_a_linear_layer(device, tmp_path):
    one = codes.encode(RNG.standard_normal((70, 40)).astype(np.float32), "pot", 4, group=16)
    found, said = errors(together([model(one, [2, 40, 1, n], conv=True) for n in (1, 3)]), tmp_path, device)
    assert max(found.values()) < 1e-5
    assert [text.rsplit(": ", 1)[1] for text in said] == ["book", "float32"]


@pytest.mark.parametrize(
    ("name", "case"),
    [("words", ("binary", 3, 32, [2])), ("scales", ("pot", 4, 32, [9])), ("levels", ("pot", 4, 32, [2]))],
)
def test_wrong_constants_are_noticed(name, case, device, tmp_path, monkeypatch):
    if name == "levels":
        read = shift_add.read
        monkeypatch.setattr(shift_add, "read", lambda *given: (w := read(*given)) and replace(w, levels=-w.levels))
    else:
        right = getattr(gpu.Codes, name)
        monkeypatch.setattr(gpu.Codes, name, lambda self, given: np.roll(right(self, given), 1, 0).copy())
    found, _ = errors(layers([case], 65, 77), tmp_path, device)
    assert max(found.values()) > 0.01


def test_words_hold_codes_from_the_lowest_bits_and_groups_begin_with_one():
    drawn = RNG.integers(0, 8, (3, 19)).astype(np.uint8)
    layout = gpu.Codes(3, 19, 10, 3, False)  # three bits in four: eight codes of a word, two words of a group
    words = layout.words(drawn)
    assert words.shape == (layout.deep, 64) == (4, 64) and not words[:, 3:].any()
    unpacked = words.T[:3, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    by_group = unpacked.reshape(3, 2, 16)
    assert np.array_equal(by_group[:, 0, :10], drawn[:, :10]) and np.array_equal(by_group[:, 1, :9], drawn[:, 10:])
    assert not by_group[:, 0, 10:].any() and not by_group[:, 1, 9:].any()


@pytest.mark.parametrize(
    ("kind", "bits", "rows", "columns", "tokens", "expected"),
    [
        ("pot", 4, 2048, 2048, 1, "book"),
        ("pot", 8, 2048, 2048, 1, "book"),
        ("binary", 4, 2048, 2048, 1, "binary"),
        ("pot", 4, 384, 384, 1, "float32"),  # a cache gives the floats about as fast as the codes are decoded
        ("pot", 4, 384, 384, 2, "book"),  # which the default schedule computes like 32 tokens
        ("pot", 4, 2048, 2048, 8, "book"),
        ("pot", 4, 2048, 2048, 16, "book_tile"),
        ("binary", 2, 2048, 2048, 13, "binary_tile"),
        ("pot", 4, 2048, 2048, 33, "float32"),
        ("pot", 2, 2048, 2048, 196, "float32"),
        ("binary", 4, 2048, 2048, 24, "float32"),
    ],
)
def test_codes_are_for_few_tokens(kind, bits, rows, columns, tokens, expected):
    assert shift_add.choose(weights_of(kind, rows, columns, bits), tokens, options.parse(GPU)).name == expected
    plain = options.parse({**GPU, "schedules": "no"})
    assert shift_add.choose(weights_of(kind, rows, columns, bits), tokens, plain).name == "float32"


def test_more_tokens_never_make_codes_pay_again():
    for layout in (gpu.Codes(4096, 4096, 128, 4, False), gpu.Codes(384, 384, 7, 2, False)):
        pays = [
            any(k.fits(m, layout) and 1.1 * gpu.cost(k, m, layout) < gpu.cost_decoded(m, layout) for k in gpu.KERNELS)
            for m in range(2, 300)
        ]
        assert pays[0] and pays == sorted(pays, reverse=True)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(shape: list[int], limits: Sequence[int], bias: Sequence[int]) -> Graph:
    held = {f"{n}_threshold": RNG.uniform(-0.1, 0.1, limits).astype(np.float32) for n in "qk"}
    held |= {"scale": np.full(1, 0.3, np.float32), "bias": RNG.standard_normal(bias).astype(np.float32)}
    return hamming(dict.fromkeys("qkv", shape), held)


COUNTED = [
    ([2, 3, 37, 45], (2, 1, 1, 1), (2, 1, 1, 37)),  # a mask of keys
    ([2, 19, 20], (2, 1, 1), (19, 19)),  # of each image, without heads
    ([1, 3, 17, 64], (3, 1, 1), (3, 17, 17)),
    ([2, 3, 9, 16], (), (1,)),
]
MULTIPLIED = [([1, 2, 9, 16], (9, 1), (1,)), ([1, 2, 9, 8], (1,), (1,))]  # a threshold for each token; few columns


@pytest.mark.parametrize(
    ("counted", "multiplied"),
    [(COUNTED[:1], MULTIPLIED[:1]), pytest.param(COUNTED[1:], MULTIPLIED[1:], marks=pytest.mark.slow)],
)
def test_binary_softmax_attention_runs_as_its_body(counted, multiplied, device, tmp_path):
    graph = together([attention(*case) for case in (*counted, *multiplied)])
    found, said = errors(graph, tmp_path, device)
    assert max(found.values()) < 1e-5, found
    assert ["counted" in text for text in said] == [True] * len(counted) + [False] * len(multiplied)
    assert all("products" in text for text in said[len(counted) :])


def linear(shape: list[int], outer: int, limits: np.ndarray) -> Graph:
    turn = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    names = ["q", "k", "v", "limit", "limit"]
    node = helper.make_node("BinaryAngularAttention", names, ["y"], domain=ops.DOMAIN, turn=turn)
    result = [*shape[:-1], outer]
    return built([node], {"q": shape, "k": shape, "v": result}, result, {"limit": limits}, "BinaryAngularAttention")


ONE, EACH = np.full(1, 0.02, np.float32), np.linspace(-0.1, 0.1, 9, dtype=np.float32)
ADDED = [([1, 3, 9, 45], 33, EACH[::4].reshape(3, 1, 1)), ([1, 2, 50, 64], 64, ONE), ([2, 41, 20], 7, ONE)]
NOT_ADDED = [([1, 2, 9, 16], 16, EACH.reshape(9, 1)), ([1, 5, 16], 257, ONE)]  # a threshold for each token; too wide


@pytest.mark.parametrize(
    ("added", "multiplied"),
    [(ADDED[:1], NOT_ADDED[:1]), pytest.param(ADDED[1:], NOT_ADDED[1:], marks=pytest.mark.slow)],
)
def test_angular_attention_adds_rows(added, multiplied, device, tmp_path):
    found, said = errors(together([linear(*case) for case in (*added, *multiplied)]), tmp_path, device)
    assert max(found.values()) < 1e-5, found
    assert ["rows added" in text for text in said] == [True] * len(added) + [False] * len(multiplied)
    assert all(text.endswith("products of matrices") for text in said[len(added) :])


@pytest.mark.slow
def test_without_schedules_attention_is_its_body(device, tmp_path):
    graph = together([linear(*ADDED[0]), attention(*COUNTED[0])])
    found, said = errors(graph, tmp_path, device, schedules="no")
    assert max(found.values()) < 1e-5 and all(text.endswith("products of matrices") for text in said)


def test_attention_reads_heads_where_the_projection_put_them(device, tmp_path):
    tokens, heads, width = 10, 2, 16
    held = {"limit": np.full(1, 0.05, np.float32), "split": np.array([1, 1, 1]), "first": np.array([0])}
    held["parts"] = np.array([1, tokens, 3, heads, width])
    nodes = [
        helper.make_node("Reshape", ["x", "parts"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[2, 0, 3, 1, 4]),
        helper.make_node("Split", ["t", "split"], [f"{n}_whole" for n in "qkv"], axis=0),
        *(helper.make_node("Squeeze", [f"{n}_whole", "first"], [n]) for n in "qkv"),
        helper.make_node(
            "BinaryAngularAttention", [*"qkv", "limit", "limit"], ["y"], domain=ops.DOMAIN, turn=[0, 1, 3, 2]
        ),
    ]
    shapes = {"x": [1, tokens, 3 * heads * width]}
    graph = built(nodes, shapes, [1, heads, tokens, width], held, "BinaryAngularAttention")
    found, said = errors(graph, tmp_path, device)
    assert found["y"] < 1e-5 and "rows added" in said[0]
    symbols = [kernel["symbol"] for kernel in json.loads((tmp_path / KERNELS).read_text())]
    assert not [name for name in symbols if "transpose" in name or "split" in name]


def test_what_equals_its_threshold_is_not_above_it(device, tmp_path):
    graph, cases = at_thresholds()
    said: list[str] = []
    TvmTarget().build(graph, tmp_path, GPU, said.append)
    for feeds, wanted in cases:
        (found,) = device.run(tmp_path / ENGINE, [feeds[str(t.name)] for t in graph.inputs])
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert "counted" in said[0]


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "products", "attention"),
    [
        ("code=pot,group=64", "book_tile", None),
        ("code=binary,bits=3,attention=angular", "binary_tile", "rows added"),
        ("code=sp2,attention=hamming", "book_tile", "bits counted"),
    ],
)
def test_a_network_runs_whole(given, products, attention, device, tmp_path):
    graph = exported("repavit_cifar", 32)
    inputs = graph.signature().inputs
    data = open_data([oracle.random_feeds(inputs, seed) for seed in range(4)], inputs)
    spec = f"shift_add{{{given}}},legalize{{target=tvm}},clean"
    Pipeline.parse(spec).run(graph, verify=False, strict=True, calibration=data)
    found, said = errors(graph, tmp_path, device)
    assert len(found) == 1 and max(found.values()) < 1e-5
    counts = Counter(text.rsplit(": ", 1)[1] for text in said)
    assert counts == {products: 20, "float32": 1, **({attention: 4} if attention else {})}  # the last has one token


# -- engines -----------------------------------------------------------------------------------------------------------


def net() -> Graph:
    """A convolution, a mean and a linear layer, and a second output before them."""

    def held(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)

    def named(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "v", "a"], ["z"], "linear", transB=1),
        helper.make_node("Softmax", ["z"], ["y"], "softmax"),
    ]
    weights = [held("w", 6, 3, 3, 3), held("b", 6), held("v", 5, 6), held("a", 5)]
    graph = helper.make_graph(
        nodes, "net", [named("x", 1, 3, 9, 7)], [named("y", 1, 5), named("r", 1, 6, 9, 7)], weights
    )
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


@pytest.fixture(scope="module")
def engine(_device: Device, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path, Any]:
    graph, folder = net(), tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", _device.variables["PATH"])
        return graph, folder, TvmTarget().build(graph, folder, GPU).manifest


def close(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_an_engine_runs_where_the_device_is(engine, device):
    graph, folder, manifest = engine
    feeds = oracle.random_feeds(graph.signature().inputs)
    found = device.ask(used, folder, manifest, graph.to_proto().SerializeToString(), feeds)
    for outputs in (found["outputs"], found["again"]):
        close(outputs, oracle.run(graph, feeds))
    assert found["clock"] == "wall" and manifest.device == "cuda sm_87"
    after, bare, again = found["waited"]
    assert after == again == 0 < bare  # a call waits for the device, one of the virtual machine does not
    kernels = json.loads((folder / KERNELS).read_text())
    assert [layer.name for layer in found["layers"]] == [kernel["symbol"] for kernel in kernels]
    assert all(layer.microseconds > 0 for layer in found["layers"])
    assert {n for layer in found["layers"] for n in layer.nodes} >= {"conv", "relu", "mean", "linear", "softmax"}


def test_a_library_holds_what_was_compiled(engine, device):
    _, folder, manifest = engine
    data = (folder / ENGINE).read_bytes()
    assert b"__global__" not in data and str(device.folder).encode() in data
    assert manifest.options["mtriple"] == f"{options.parse({}).machine}-linux-gnu"
    machine, *features = options.host(options.parse(manifest.options)).split()
    assert machine == options.parse({}).machine and set(features) <= {"asimd"}  # any CPU of its kind starts kernels


def test_it_is_compiled_by_nvcc_where_the_device_is_as_well(device, tmp_path):
    graph, before = net(), len(device.sources())
    feeds = oracle.random_feeds(graph.signature().inputs)
    close(device.ask(built_there, tmp_path, graph.to_proto().SerializeToString(), GPU, feeds), oracle.run(graph, feeds))
    assert len(device.sources()) == before + 1 and b"__global__" not in (tmp_path / ENGINE).read_bytes()


@pytest.mark.parametrize(
    ("have", "refused"),
    [
        ("8.7", ""),
        ("8.9", ""),
        ("10.3", ""),
        ("8.6", "8.7, and the GPU here has 8.6"),
        ("7.9", "sm_79"),
        ("", "no CUDA"),
    ],
)
def test_a_device_runs_what_was_compiled_for_older_ones(have, refused, engine, device):
    graph, folder, manifest = engine
    given = folder, manifest, graph.to_proto().SerializeToString(), oracle.random_feeds(graph.signature().inputs)
    if not refused:
        assert device.ask(used, *given, CUDA_ON_HOST=have)["layers"]
        return
    with pytest.raises(EnvironmentMissing, match="sm_87") as caught:
        device.ask(used, *given, CUDA_ON_HOST=have)
    assert refused in str(caught.value) and caught.value.fix


def test_without_a_device_an_engine_is_built_and_refused(engine):
    if tvm.cuda(0).exist:
        pytest.skip("there is a device")
    graph, folder, manifest = engine
    with pytest.raises(EnvironmentMissing, match=r"sm_87, and .*GPU of compute capability 8.7 or above"):
        TvmTarget().load(folder, manifest, graph)


def test_the_cpu_beside_the_device_must_fit(engine, device):
    graph, folder, manifest = engine
    other = "aarch64" if options.parse({}).machine == "x86_64" else "x86_64"
    wrong = replace(manifest, options={**manifest.options, "mtriple": f"{other}-linux-gnu"})
    with pytest.raises(EnvironmentMissing, match=other):
        device.ask(used, folder, wrong, graph.to_proto().SerializeToString(), {})


def test_kernels_that_the_driver_does_not_take(engine, device, tmp_path):
    graph, folder, manifest = engine
    kernels, library = str(device.folder).encode(), (folder / ENGINE).read_bytes()
    assert library.count(kernels) == 1
    (tmp_path / ENGINE).write_bytes(library.replace(kernels, kernels[:-1] + b"?"))
    shutil.copy(folder / KERNELS, tmp_path)
    feeds = oracle.random_feeds(graph.signature().inputs)
    with pytest.raises(EnvironmentMissing, match="driver does not take"):
        device.ask(used, tmp_path, manifest, graph.to_proto().SerializeToString(), feeds)


def test_without_a_compiler_nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "_TOOLKIT", tmp_path)
    (tmp_path / "gcc").symlink_to(str(shutil.which("gcc")))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentMissing, match="nvcc") as caught:
        TvmTarget().build(net(), tmp_path, GPU)
    assert "CUDA toolkit" in caught.value.fix
    (found,) = (c for c in TvmTarget().probe() if c.name == "nvcc for tvm")
    assert not found.available and found.fix
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'nvcc fatal: no sm_999' >&2; echo release 13.0, V13.0.88; exit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    (found,) = (c for c in TvmTarget().probe() if c.name == "nvcc for tvm")
    assert found.available and (found.version, found.detail) == ("13.0", str(tmp_path / "nvcc"))
    with pytest.raises(InputError, match="for sm_999; nvcc fatal: no sm_999"):
        TvmTarget().build(net(), tmp_path, {"arch": "sm_999"})


@pytest.mark.slow
def test_a_build_where_the_device_is_compares_and_measures(device, tmp_path):
    onnx.save(net().to_proto(), tmp_path / "net.onnx")
    how = ["--target", "tvm", "--option", "arch=sm_87", "--output", str(tmp_path / "bundle")]
    command = [sys.executable, "-m", "edgecompile", "build", str(tmp_path / "net.onnx"), *how]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **device.variables})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert found["parity"]["ok"] and found["parity"]["outputs"].keys() == {"y", "r"}
    assert (found["latency"]["clock"], found["latency"]["threads"]) == ("wall", 0)
    assert found["latency"]["engine"]["calls"] > 0 and len(found["layers"]) == 4 and not found["warnings"]


def test_nvcc_makes_code_of_the_architecture_and_ptx_for_newer_ones():
    if cuda.compiler() is None:
        pytest.skip("no CUDA compiler")
    made = cuda.binary('extern "C" __global__ void kernel(float *x) { x[threadIdx.x] = 1; }', "sm_87")
    magic, _, at, size = struct.unpack_from("<IHHQ", made)
    assert magic == 0xBA55ED50 and at + size == len(made)
    kinds = set()
    while at < len(made):
        kind, _, header, size = struct.unpack_from("<HHIQ", made, at)
        kinds.add((kind, *struct.unpack_from("<I", made, at + 28)))
        at += header + size
    assert kinds == {(1, 87), (2, 87)}  # PTX, machine code
    with pytest.raises(InputError, match="sm_87"):
        cuda.binary("wrong", "sm_87")


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(tmp_path):
    if not tvm.cuda(0).exist:
        pytest.skip("TVM finds no GPU")
    if cuda.compiler() is None:
        pytest.skip("no CUDA compiler")
    arch = f"sm_{tvm.cuda(0).compute_version.replace('.', '')}"
    codes_too = together([net(), layers([("pot", 4, 32, [2]), ("binary", 3, 32, [9])], 101, 77)])
    for number, graph in enumerate((net(), codes_too)):
        (folder := tmp_path / str(number)).mkdir()
        made = TvmTarget().build(graph, folder, {"arch": arch})
        feeds = oracle.random_feeds(graph.signature().inputs)
        expected = oracle.run(graph, feeds)
        made.call(feeds)()
        found = made.run(feeds)
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() < 1e-3 * np.abs(value).max(), name
        assert all(layer.microseconds > 0 for layer in made.layers(feeds))


# -- the code ----------------------------------------------------------------------------------------------------------

LARGE = {
    "few": gpu.few(1, gpu.Codes(4096, 11008, 128, 4, False)),
    "few_bytes": gpu.few(8, gpu.Codes(4096, 4096, 4096, 8, False)),
    "few_binary": gpu.few(8, gpu.Codes(4096, 4096, 32, 4, True)),
    "tile": gpu.tile(32, gpu.Codes(4096, 4096, 128, 8, False)),
    "tile_binary": gpu.tile(32, gpu.Codes(4096, 4096, 128, 3, True)),
    "bits": gpu.binarised((2, 3), 4096, 128, Rows.dense((2, 3, 4096, 128))),
    "counted": gpu.counted((2, 3), 4096, 4096, 128, (3, 4096, 4096)),
    "gathered": gpu.gathered((2, 3), 4096, 128, 256, Rows.dense((2, 3, 4096, 256))),
    "angular": gpu.angular((2, 3), 4096, 128, 256, Rows.dense((2, 3, 4096, 256))),
}


def source(arch: str) -> str:
    """Of the kernels at large extents, in CUDA C."""
    target = tvm.target.Target(dict(options.parse({**GPU, "arch": arch}).target))
    named = {name: function.with_attr("global_symbol", name) for name, function in LARGE.items()}
    library: Any = tvm.compile(tvm.IRModule(named), target=target)
    return library.mod.imports[0].inspect_source()


def test_kernels_need_no_more_than_every_device_has():
    found = re.split(r"__global__ void __launch_bounds__\((\d+)\) (\w+)\([^{;]*\) \{", source("sm_87"))
    launched = {
        name: (int(threads), body) for threads, name, body in zip(*(found[i::3] for i in (1, 2, 3)), strict=True)
    }
    assert set(launched) == {f"{name}_kernel" for name in LARGE}
    for threads, body in launched.values():
        shared = [4 * int(n) for n in re.findall(r"__shared__ alignas\(\d+\) \w+ \w+\[(\d+)\]", body)]
        assert threads <= options.THREADS_PER_BLOCK and sum(shared) <= options.SHARED_BYTES
        assert len(shared) == body.count("__shared__")


@pytest.mark.parametrize("arch", ["sm_87", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_the_cuda_compiler_takes_the_kernels(arch, tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no CUDA compiler")
    (tmp_path / "kernels.cu").write_text(source(arch))
    kinds = {"kernels.ptx": ["-ptx"], "kernels.cubin": ["-cubin", "-Xptxas", "-v"]}
    done = None
    for before, (name, how) in zip(("kernels.cu", "kernels.ptx"), kinds.items(), strict=True):
        command = [compiler, f"-arch={arch}", *how, "-o", str(tmp_path / name), str(tmp_path / before)]
        done = subprocess.run(command, capture_output=True, text=True)
        if "nsupported" in done.stderr and "arch" in done.stderr:
            pytest.skip(done.stderr.strip()[-200:])
        assert done.returncode == 0, done.stderr[-2000:]
    assert done is not None and re.findall(r"(\d+) bytes spill stores", done.stderr) == ["0"] * len(LARGE)
    bits = (tmp_path / "kernels.ptx").read_text().split(".entry bits_kernel", 1)[1].split(".entry", 1)[0]
    assert re.search(r"div\.rn\b", bits) and re.search(r"sqrt\.rn\b", bits) and "approx" not in bits


# -- the device --------------------------------------------------------------------------------------------------------

KERNEL = """
#include "cuda_on_host.h"
__global__ void kernel(int *y) {
    __shared__ int held[64];
    __shared__ float fresh[1];
    const int own = threadIdx.x;
    y[64] += fresh[0] != fresh[0];
    %s
}
extern "C" int launch(int *y) {
    const unsigned grid[] = {2, 1, 1}, block[] = {64, 1, 1};
    return run(grid, block, true, [=] { kernel(y + blockIdx.x * 65); });
}
"""
SUM = "int v = own; for (int m = 16; m; m /= 2) v += __shfl_xor_sync(~0u, v, m, 32); y[own] = v;"


@pytest.mark.parametrize(
    ("body", "ends", "values"),
    [
        ("held[own] = own; __syncthreads(); y[own] = held[63 - own];", True, [[*range(63, -1, -1)]] * 2),
        # Without the barrier half of the threads read what is not there yet: the first half, or the second.
        (
            "held[own] = own; y[own] = held[63 - own];",
            True,
            [[-1] * 32 + [*range(31, -1, -1)], [*range(63, 31, -1)] + [-1] * 32],
        ),
        ("if (own < 40) __syncthreads(); y[own] = 1;", True, [[1] * 64] * 2),  # threads that end do not wait
        ("if (own < 40) __syncthreads(); else __ballot_sync(~0u, 1); y[own] = 1;", False, None),
        (SUM, True, [[496] * 32 + [1520] * 32] * 2),
        ("y[own] = __ballot_sync(~0u, own % 32 == 3);", True, [[8] * 64] * 2),
        ("y[own] = __shfl_down_sync(~0u, own, 1, 16) - own;", True, [([1] * 15 + [0]) * 4] * 2),
    ],
)
def test_threads_wait_as_on_a_gpu(body, ends, values, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "k.cpp").write_text(KERNEL % body)
    library = ctypes.CDLL(str(compiled([tmp_path / "k.cpp"], tmp_path / "k.so")))
    y = np.full((2, 65), 0, np.int32)
    assert bool(library.launch(ctypes.c_void_p(y.ctypes.data))) == ends
    if values is not None:
        assert (y[:, 64] == 64).all()  # shared memory held NaN
        assert y[:, :64].tolist() == values
