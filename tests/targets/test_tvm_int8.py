"""Integer kernels of the target tvm: equal to numpy's integers bit for bit, and integers only where that is exact."""

from __future__ import annotations

import itertools
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_tvm import FAMILIES, SDOT, count, instructions

from edgecompile import calibration, measure, models, oracle, qdq
from edgecompile.calibration_data import open_data
from edgecompile.graph import Graph
from edgecompile.placement import TABLES, place
from edgecompile.targets.tvm import TvmTarget, options
from edgecompile.targets.tvm.int8 import returns_itself
from edgecompile.targets.tvm.schedules import int8
from edgecompile.targets.tvm.schedules.int8 import DOTS, Dot, convolution, pack, product
from edgecompile.targets.tvm.schedules.tile import Vectors, choose

tvm = pytest.importorskip("tvm")
RNG = np.random.default_rng(0)
ONE = {"threads": 1}
# CPUs of which each lacks the instruction of the one before it, with the feature that decides.
CPUS = {"avx512_vnni": "", "avx_vnni": "alderlake", "avx512bw": "skylake-avx512", "avx2": "haswell", "": "x86-64"}


# -- kernels -----------------------------------------------------------------------------------------------------------


def target(name: str) -> options.Options:
    """A CPU whose instruction is the one of that name, if this machine can run its code."""
    if measure.machine()["arch"] != "x86_64" or (name and name not in measure.cpu_features()):
        pytest.skip(f"this CPU has no {name or 'SSE'}")
    return options.parse({"threads": 1, "mcpu": CPUS[name]})


def computed(chosen: options.Options, define: Any, arrays: Sequence[np.ndarray], shape, parallel=False) -> np.ndarray:
    from tvm import te

    inputs = [te.placeholder(a.shape, str(a.dtype), name=f"i{n}") for n, a in enumerate(arrays)]
    function = te.create_prim_func([*inputs, define(*inputs)], index_dtype_override="int64")
    module = int8.schedule(tvm.IRModule({"main": function}), int8.dot(options.device(chosen)), parallel=parallel)
    assert ("parallel" in str(module)) == parallel
    library = tvm.compile(module, target=tvm.target.Target(dict(chosen.target)))
    result = tvm.runtime.tensor(np.full(shape, -7, np.int32))
    library["main"](*map(tvm.runtime.tensor, arrays), result)
    return result.numpy()


def random(dtype: str, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, shape).astype(dtype)


def tiles(how: Dot, rows: int, columns: int, steps: int):
    return choose(rows, columns, steps, Vectors(how.lanes, 16))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(
    "name, lead, depth, n, parallel",
    [
        *((name, (2, 5, 7), 13, 40, False) for name in CPUS),
        ("avx512_vnni", (1,), 3, 7, False),
        ("avx512_vnni", (53,), 24, 100, True),
        ("avx2", (1,), 3, 7, False),
        ("avx2", (53,), 24, 100, True),
    ],
)
def test_a_product_is_the_sum_of_integers(name, dtype, lead, depth, n, parallel):
    chosen = target(name)
    how = int8.dot(options.device(chosen))
    assert how.name == name
    x, weight = random(dtype, *lead, depth), random("int8", n, depth)
    size = tiles(how, int(np.prod(lead)), n, depth)
    found = computed(
        chosen,
        lambda a, b: product(a, b, n, size.rows, how),
        [x, pack(weight, size.columns, how)],
        (*lead, n),
        parallel,
    )
    offset = int8.shift(how, dtype)
    np.testing.assert_array_equal(found, (x.astype(np.int32) + offset) @ weight.T.astype(np.int32))


@pytest.mark.parametrize("name", CPUS)
def test_the_largest_products_do_not_saturate(name):
    """255 * 127 twice is beyond int16, where an instruction that adds pairs in 16 bits would stop."""
    chosen = target(name)
    how = int8.dot(options.device(chosen))
    x = np.full((4, 8), 255, np.uint8)
    for value in (127, -128):
        weight = np.full((16, 8), value, np.int8)
        found = computed(chosen, lambda a, b: product(a, b, 16, 4, how), [x, pack(weight, 16, how)], (4, 16))
        total = 8 * value * (255 + int8.shift(how, "uint8"))
        assert abs(2 * 255 * value) > np.iinfo(np.int16).max and (found == total).all()


CONVOLUTIONS = [  # batch, height, width, in, out, kernel, strides, padding, dilation
    (1, 9, 9, 3, 16, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (2, 8, 7, 13, 21, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (1, 11, 10, 16, 48, (5, 3), (1, 2), (2, 0, 1, 1), (1, 1)),
    (1, 12, 12, 8, 20, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    (1, 6, 6, 5, 9, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
]


@pytest.mark.parametrize(
    "name, case, zero",
    [
        *((name, CONVOLUTIONS[0], 117) for name in CPUS),
        *(
            (name, case, zero)
            for name in ("avx512_vnni", "avx2")
            for case, zero in zip(CONVOLUTIONS[1:], [0, 255, 3, 9], strict=True)
        ),
    ],
)
def test_a_convolution_is_padded_with_its_zero_point(name, case, zero):
    torch = pytest.importorskip("torch")
    chosen = target(name)
    how = int8.dot(options.device(chosen))
    batch, height, width, inner, out, kernel, strides, padding, dilation = case
    x, weight = random("uint8", batch, height, width, inner), random("int8", out, *kernel, inner)
    top, left, bottom, right = padding
    centred = torch.tensor(x.astype(np.float64) - zero).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.conv2d(
        torch.nn.functional.pad(centred, (left, right, top, bottom)),
        torch.tensor(weight.astype(np.float64)).permute(0, 3, 1, 2),
        stride=strides,
        dilation=dilation,
    )
    wanted = wanted.permute(0, 2, 3, 1).numpy().astype(np.int64)
    size = tiles(how, wanted.shape[2], out, kernel[0] * kernel[1] * inner)
    found = computed(
        chosen,
        lambda a, b: convolution(a, b, out, size.rows, strides, padding, dilation, zero, how),
        [x, pack(weight, size.columns, how)],
        wanted.shape,
    )
    shift = (zero + int8.shift(how, "uint8")) * weight.astype(np.int64).reshape(out, -1).sum(1)
    np.testing.assert_array_equal(found - shift, wanted)


@pytest.mark.parametrize(
    "mcpu, has, lacks", [("cortex-a76", r"\bsdot\b", r"\bsmlal"), ("cortex-a72", r"\bsmlal", r"\b[su]dot\b")]
)
def test_arm_boards_get_the_dot_product_where_they_have_one(mcpu, has, lacks):
    from tvm import te

    chosen = options.parse({"threads": 1, "mtriple": "aarch64-linux-gnu", "mcpu": mcpu})
    how = int8.dot(options.device(chosen))
    x = te.placeholder((16, 32), "uint8", name="x")
    w = te.placeholder(pack(random("int8", 16, 32), 16, how).shape, how.weights, name="w")
    module = tvm.IRModule(
        {"main": te.create_prim_func([x, w, product(x, w, 16, 4, how)], index_dtype_override="int64")}
    )
    library: Any = tvm.compile(
        int8.schedule(module, how, parallel=False), target=tvm.target.Target(dict(chosen.target))
    )
    text = library.mod.inspect_source("asm")
    assert re.search(has, text) and not re.search(lacks, text)


def test_the_instruction_follows_the_features():
    assert int8.dot("x86_64 avx avx2 avx512f avx512bw avx512_vnni avx_vnni").name == "avx512_vnni"
    assert int8.dot("x86_64 avx avx2").name == "avx2"
    assert int8.dot("aarch64 asimd asimddp").activations == "int8"
    assert int8.dot("aarch64 asimd").name == "" == int8.dot("x86_64").name
    assert len({d.name for d in DOTS}) == len(DOTS)


# -- the algebra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_what_was_dequantised_quantises_to_itself(dtype):
    scales = np.exp(RNG.uniform(np.log(1e-30), np.log(1e30), 300)).astype(np.float32)
    info = np.iinfo(dtype)
    assert all(returns_itself(s, z, dtype) for s in scales for z in (info.min, 0, 3, info.max))


def test_scales_whose_multiples_overflow_do_not():
    assert not returns_itself(np.float32(3e38), 0, "uint8")


# -- graphs ------------------------------------------------------------------------------------------------------------


class Drawing:
    """An ONNX graph of quantised layers, drawn node by node."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[Any] = []

    def add(self, op: str, inputs: str, output: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs.split(), output.split(), output.split()[0], **attrs))
        return output

    def source(self, name: str, dtype: type, *shape: int) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def real(self, name: str, values: np.ndarray, scale: Any, zero: Any = None, axis: int = 0) -> str:
        """Constants, dequantised."""
        self.constants[name] = values
        return self.dequantize(name, scale, values.dtype.type(0) if zero is None else zero, axis)

    def dequantize(self, name: str, scale: Any, zero: Any, axis: int = 0) -> str:
        return self._pair("DequantizeLinear", name, f"{name}_real", scale, zero, axis)

    def quantize(self, name: str, output: str, scale: Any, zero: Any) -> str:
        return self._pair("QuantizeLinear", name, output, scale, zero, 0)

    def _pair(self, op: str, name: str, output: str, scale: Any, zero: Any, axis: int) -> str:
        scale = np.asarray(scale, np.float32)
        self.constants |= {f"{output}_s": scale, f"{output}_z": np.broadcast_to(zero, scale.shape).copy()}
        return self.add(op, f"{name} {output}_s {output}_z", output, **({"axis": axis} if scale.ndim else {}))

    def graph(self, output: str, dtype: type, *shape: int) -> Graph:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        stored = [numpy_helper.from_array(v, n) for n, v in self.constants.items()]
        outputs = [helper.make_tensor_value_info(output, kind, shape)]
        proto = helper.make_graph(self.nodes, "g", self.inputs, outputs, stored)
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return Graph.from_proto(model)


def build(graph: Graph, feeds: Mapping[str, np.ndarray], folder: Path) -> tuple[np.ndarray, list[str]]:
    """The first result, and the names of the kernels."""
    engine = TvmTarget().build(graph, folder, ONE)
    (result,) = engine.run(feeds).values()
    return result, [layer.name for layer in engine.layers(feeds, 1)]


def convolved(x: np.ndarray, weight: np.ndarray, pad: int, stride: int, groups: int) -> np.ndarray:
    """The convolution of integers, NCHW, as int64."""
    import torch

    wide, narrow = torch.tensor(x.astype(np.float64)), torch.tensor(weight.astype(np.float64))
    return torch.nn.functional.conv2d(wide, narrow, None, stride, pad, 1, groups).numpy().astype(np.int64)


def requantised(total: np.ndarray, factor: np.ndarray, zero: int, dtype: str, low: float = -np.inf) -> np.ndarray:
    """int32 sums times a float32 per channel, at least ``low``, rounded half to even, about ``zero``, saturated."""
    info = np.iinfo(dtype)
    steps = np.maximum(total.astype(np.int32).astype(np.float32) * factor.astype(np.float32), np.float32(low))
    return np.clip(np.rint(steps) + zero, info.min, info.max).astype(dtype)


LAYERS = {  # in, height, width, out, kernel, stride, groups
    "pointwise": (24, 7, 5, 20, 1, 1, 1),
    "odd": (5, 9, 11, 7, 3, 1, 1),
    "strided": (16, 9, 9, 33, 3, 2, 1),
    "depthwise": (19, 8, 8, 19, 5, 1, 19),
    "narrow": (17, 6, 6, 1, 1, 1, 1),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize(
    "per_channel, dtype, zero, relu",
    [(True, "uint8", 113, False), (False, "uint8", 0, True), (True, "int8", 0, True), (False, "int8", -9, False)],
)
def test_a_convolution_is_numpys_bit_for_bit(case, per_channel, dtype, zero, relu, tmp_path):
    pytest.importorskip("torch")
    inner, height, width, out, kernel, stride, groups = LAYERS[case]
    pad = kernel // 2
    weight = RNG.integers(-127, 128, (out, inner // groups, kernel, kernel)).astype(np.int8)
    scale = np.float32(0.021)
    steps = RNG.uniform(1e-3, 3e-3, out if per_channel else ()).astype(np.float32)
    bias = RNG.integers(-9000, 9000, out).astype(np.int32)
    result = np.float32(2.5e-3 * np.sqrt(weight[0].size))
    away = np.dtype(dtype).type(np.iinfo(dtype).min if relu else zero + 3)
    d = Drawing()
    d.source("x", np.dtype(dtype).type, 1, inner, height, width)
    d.dequantize("x", scale, np.dtype(dtype).type(zero))
    d.real("w", weight, steps)
    d.real("b", bias, np.broadcast_to(scale * steps, (out,)).copy())
    last = d.add("Conv", "x_real w_real b_real", "c", pads=[pad] * 4, strides=[stride] * 2, group=groups)
    last = d.add("Relu", last, "r") if relu else last
    d.quantize(last, "y", result, away)
    x = random(dtype, 1, inner, height, width)
    total = convolved(x.astype(np.int64) - zero, weight, pad, stride, groups) + bias[:, None, None]
    factor = np.broadcast_to(scale * steps / result, (out,))[:, None, None]
    wanted = requantised(total, factor, int(away), dtype, 0 if relu else -np.inf)
    graph = d.graph("y", np.dtype(dtype).type, *wanted.shape)
    found, kernels = build(graph, {"x": x}, tmp_path)
    np.testing.assert_array_equal(found, wanted)
    assert out == 1 or len(np.unique(wanted)) > 40
    (layer,) = [k for k in kernels if "conv2d" in k]
    assert ("int8" in layer) == (case not in ("depthwise", "narrow"))
    assert ("round" in layer) == (case != "narrow")


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_product_with_a_float_result(op, tmp_path):
    """Without a QuantizeLinear behind it, the sum is scaled to reals; a float bias is rounded to a step of the sum."""
    weight, bias = RNG.integers(-127, 128, (30, 11)).astype(np.int8), RNG.standard_normal(11).astype(np.float32)
    scale, steps = np.float32(0.02), RNG.uniform(1e-3, 3e-3, 11).astype(np.float32)
    d = Drawing()
    d.source("x", np.uint8, 3, 30)
    d.dequantize("x", scale, np.uint8(77))
    d.constants["b"] = bias
    if op == "Gemm":
        d.real("w", np.ascontiguousarray(weight.T), steps, axis=0)
        d.add("Gemm", "x_real w_real b", "y", transB=1)
    else:
        d.real("w", weight, steps, axis=1)
        d.add("MatMul", "x_real w_real", "m")
        d.add("Add", "m b", "y")
    x = random("uint8", 3, 30)
    found, kernels = build(d.graph("y", np.float32, 3, 11), {"x": x}, tmp_path)
    total = (x.astype(np.int64) - 77) @ weight.astype(np.int64)
    rounded = total + np.rint(bias.astype(np.float64) / (scale * steps)).astype(np.int64)
    np.testing.assert_array_equal(found, rounded.astype(np.float32) * (scale * steps))
    assert np.abs(found - (total * (scale * steps) + bias)).max() <= (scale * steps).max()
    assert any("matmul_int8" in k for k in kernels)


def test_every_pair_of_integers_is_added_as_onnx_says(tmp_path):
    """All 65,536 pairs; where the exact sum is within float32's rounding of a tie, either neighbour is right."""
    one, other, result = np.float32(0.0213), np.float32(0.0158), np.float32(0.0301)
    d = Drawing()
    for name, scale, zero in (("a", one, 12), ("b", other, 130)):
        d.source(name, np.uint8, 256, 256)
        d.dequantize(name, scale, np.uint8(zero))
    d.add("Add", "a_real b_real", "s")
    d.add("Relu", "s", "r")
    d.quantize("r", "y", result, np.uint8(4))
    every = np.arange(256, dtype=np.uint8)
    a, b = (np.ascontiguousarray(m) for m in np.meshgrid(every, every))
    found, kernels = build(d.graph("y", np.uint8, 256, 256), {"a": a, "b": b}, tmp_path)
    exact = np.maximum((a.astype(float) - 12) * float(one) + (b.astype(float) - 130) * float(other), 0) / float(result)
    wanted = np.clip(np.rint(exact) + 4, 0, 255)
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    assert sure.mean() > 0.999 and len(kernels) == 1
    np.testing.assert_array_equal(found[sure], wanted[sure])
    assert np.abs(found - wanted).max() <= 1


def residual(d: Drawing, shared: np.float32) -> Drawing:
    """A pooled, concatenated input that a convolution reads, and its result added to another tensor."""
    d.source("x", np.uint8, 1, 4, 8, 8)
    d.source("z", np.uint8, 1, 4, 8, 8)
    d.dequantize("x", 0.0213, np.uint8(9))
    d.dequantize("z", 0.0213, np.uint8(9))
    d.add("Concat", "x_real z_real", "both", axis=1)
    d.quantize("both", "cat", 0.0213, np.uint8(9))
    d.dequantize("cat", 0.0213, np.uint8(9))
    d.add("MaxPool", "cat_real", "p", kernel_shape=[2, 2], strides=[2, 2])
    d.quantize("p", "pooled", shared, np.uint8(9))
    d.dequantize("pooled", shared, np.uint8(9))
    d.real("w", RNG.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8), np.full(8, 2.07e-3))
    d.add("Conv", "pooled_real w_real", "c", pads=[1] * 4)
    d.quantize("c", "cq", 0.051717, np.uint8(120))
    d.dequantize("cq", 0.051717, np.uint8(120))
    d.add("Add", "cq_real pooled_real", "s")
    d.quantize("s", "y", 0.0613, np.uint8(100))
    return d


@pytest.mark.parametrize("shared", [0.0213, 0.0227])
def test_integers_move_where_scales_agree_and_are_rescaled_where_not(shared, tmp_path):
    graph = residual(Drawing(), np.float32(shared)).graph("y", np.uint8, 1, 8, 4, 4)
    feeds = {"x": random("uint8", 1, 4, 8, 8), "z": random("uint8", 1, 4, 8, 8)}
    found, kernels = build(graph, feeds, tmp_path)
    (wanted,) = oracle.run(graph, feeds).values()
    off = np.abs(found.astype(int) - wanted)
    assert off.max() <= 1 and (off > 0).mean() < 0.02
    pools = [k for k in kernels if "pool" in k]
    assert len(pools) == 1 and ("round" in pools[0]) == (shared != 0.0213)
    assert any("conv2d_int8" in k and k.count("round") == 2 for k in kernels)


@pytest.mark.parametrize("case", ["asymmetric weights", "groups", "floats", "scales by input channel"])
def test_what_integers_cannot_compute_stays_in_floating_point(case, tmp_path):
    d = Drawing()
    d.source("x", np.uint8, 1, 8, 6, 6)
    d.dequantize("x", 0.02, np.uint8(50))
    groups = 2 if case == "groups" else 1
    weight = RNG.integers(-100, 100, (6, 8 // groups, 3, 3)).astype(np.int8)
    if case == "floats":
        d.constants["w_real"] = (weight * 2e-3).astype(np.float32)
    elif case == "scales by input channel":
        d.real("w", weight, RNG.uniform(1e-3, 3e-3, 8), axis=1)
    else:
        d.real("w", weight, 2e-3, np.int8(5 if case == "asymmetric weights" else 0))
    d.add("Conv", "x_real w_real", "c", group=groups)
    d.quantize("c", "y", 0.05, np.uint8(99))
    graph = d.graph("y", np.uint8, 1, 6, 4, 4)
    feeds = {"x": random("uint8", 1, 8, 6, 6)}
    found, kernels = build(graph, feeds, tmp_path)
    (wanted,) = oracle.run(graph, feeds).values()
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert not any("int8" in k for k in kernels)


def test_an_island_of_floats_is_computed_in_floats(tmp_path):
    d = Drawing()
    d.source("x", np.uint8, 1, 5, 16)
    d.dequantize("x", 0.02, np.uint8(128))
    d.add("Softmax", "x_real", "p", axis=-1)
    d.quantize("p", "q", 1 / 255, np.uint8(0))
    d.dequantize("q", 1 / 255, np.uint8(0))
    d.real("w", RNG.integers(-127, 128, (16, 9)).astype(np.int8), 2e-3)
    d.add("MatMul", "q_real w_real", "y")
    graph = d.graph("y", np.float32, 1, 5, 9)
    feeds = {"x": random("uint8", 1, 5, 16)}
    found, kernels = build(graph, feeds, tmp_path)
    (wanted,) = oracle.run(graph, feeds).values()
    np.testing.assert_allclose(found, wanted, atol=1.1 / 255 * 0.254)
    assert any("softmax" in k for k in kernels) and any("matmul_int8" in k for k in kernels)


def test_a_mean_and_a_copy_of_other_scales_need_no_division(tmp_path):
    """A resized tensor joins another of another scale, and the mean of both is quantised."""
    d = Drawing()
    for name, scale, zero, size in (("a", 0.0213, 9, 4), ("b", 0.0371, 77, 8)):
        d.source(name, np.uint8, 1, 6, size, size)
        d.dequantize(name, scale, np.uint8(zero))
    d.constants["factors"] = np.array([1, 1, 2, 2], np.float32)
    how = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    d.nodes.append(helper.make_node("Resize", ["a_real", "", "factors"], ["up"], "up", **how))
    d.add("Concat", "up b_real", "both", axis=1)
    d.quantize("both", "q", 0.0291, np.uint8(40))
    d.dequantize("q", 0.0291, np.uint8(40))
    d.add("GlobalAveragePool", "q_real", "m")
    d.quantize("m", "y", 0.0117, np.uint8(30))
    graph = d.graph("y", np.uint8, 1, 12, 1, 1)
    feeds = {"a": random("uint8", 1, 6, 4, 4), "b": random("uint8", 1, 6, 8, 8)}
    found, kernels = build(graph, feeds, tmp_path)
    (wanted,) = oracle.run(graph, feeds).values()
    assert np.abs(found.astype(int) - wanted).max() <= 1 and len(np.unique(wanted)) > 5
    assert not any("divide" in k for k in kernels)


def test_kernels_name_their_nodes(tmp_path):
    graph = residual(Drawing(), np.float32(0.0213)).graph("y", np.uint8, 1, 8, 4, 4)
    feeds = {"x": random("uint8", 1, 4, 8, 8), "z": random("uint8", 1, 4, 8, 8)}
    engine = TvmTarget().build(graph, tmp_path, ONE)
    (layer,) = [x for x in engine.layers(feeds, 1) if "conv2d_int8" in x.name]
    assert {"c", "cq", "y"} <= set(layer.nodes) and "pooled" not in layer.nodes


# -- the zoo -----------------------------------------------------------------------------------------------------------


def quantised(name: str, rules: str, resolution: int = 0) -> tuple[Graph, Graph]:
    """A zoo model of random weights, as floats and calibrated on random numbers."""
    from test_tvm import exported, smallest

    graph = exported(name, resolution or smallest(name))
    feeds = [dict(oracle.random_feeds(graph.signature().inputs, seed)) for seed in range(2)]
    table = TABLES[rules]
    points = list(place(graph, table).points)
    data = open_data(feeds, graph.signature().inputs)
    ranges = calibration.collect(graph, data, points, "minmax", symmetric=table.symmetric)
    return graph, qdq.quantized(graph, table, ranges)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        pytest.param(name, rules, marks=[] if (name, rules) == ("repvgg_a0", "tvm") else [pytest.mark.slow])
        for name, rules in itertools.product(models.names(), ["ort_cpu", "tvm"])
    ],
)
def test_a_zoo_model_is_as_good_as_its_simulation(name, rules, tmp_path):
    pytest.importorskip("onnxruntime")
    graph, made = quantised(name, rules)
    feeds = oracle.random_feeds(graph.signature().inputs, 5)
    engine = TvmTarget().build(made, tmp_path, ONE)
    reference = qdq.kernels(graph)(feeds)
    found = qdq.snr([reference], [engine.run(feeds)])
    simulated = qdq.snr([reference], [qdq.simulation(made)(feeds)])
    assert found > simulated - 3
    assert any("int8" in layer.name for layer in engine.layers(feeds, 1))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() == "aarch64", reason="the code would run here")
@pytest.mark.parametrize("name", FAMILIES)
def test_code_for_an_arm_board_adds_bytes(name, tmp_path):
    """A Cortex-A76 has the instruction, a Cortex-A72 does without."""
    made = quantised(name, "tvm", FAMILIES[name])[1]
    assert count(instructions(made, tmp_path, "cortex-a76"), SDOT) > 200
    if name == "repvgg_cifar":
        assert count(instructions(made, tmp_path, "cortex-a72"), SDOT) < 20
