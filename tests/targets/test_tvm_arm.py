"""Code for ARM boards, run under emulation: what each schedule computes with NEON, with and without dot products.

Timings there mean nothing, and none is taken.
"""

from __future__ import annotations

import math
import platform
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from arm_board import COMPILER, EXAMPLE, QEMU, SYSROOT, Board, board, built, errors, together
from onnx import TensorProto, helper, numpy_helper

from edgecompile import oracle, qdq
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops
from edgecompile.targets.tvm import ENGINE, schedules
from edgecompile.targets.tvm.schedules import depthwise, rows, transposed

pytest.importorskip("tvm")
from test_tvm import FAMILIES, exported
from test_tvm_int8 import LAYERS, Drawing, convolved, quantised, random, requantised
from test_tvm_shift_add import built as operators
from test_tvm_shift_add import hamming, model

pytestmark = pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs such code without emulation")
RNG = np.random.default_rng(0)
SLOW = pytest.mark.slow
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return board(tmp_path_factory.mktemp("board"))


# -- schedules ---------------------------------------------------------------------------------------------------------

Node = tuple[str, str, str, dict[str, Any]]


def graph_of(x: Sequence[int], *nodes: Node, **weights: Sequence[int] | np.ndarray) -> Graph:
    """A graph of one input ``x``, whose last node computes ``y``; weights whose shape is given are random."""
    held = {
        name: value if isinstance(value, np.ndarray) else RNG.standard_normal(value).astype(np.float32) / 4
        for name, value in weights.items()
    }
    made = [helper.make_node(op, i.split(" "), o.split(), name=o.split()[0], **attrs) for op, i, o, attrs in nodes]
    proto = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def conv(x: Sequence[int], w: Sequence[int], **attrs: Any) -> Graph:
    """A convolution with a bias, what is left of a residual, and an activation behind it."""
    nodes = [("Conv", "x w b", "c", attrs), ("Mul", "c half", "h", {}), ("Add", "h c", "a", {}), ("Relu", "a", "y", {})]
    return graph_of(x, *nodes, w=w, b=w[:1], half=np.full(1, 0.5, np.float32))


def upwards(x: Sequence[int], w: Sequence[int], **attrs: Any) -> Graph:
    return graph_of(x, ("ConvTranspose", "x w", "y", attrs), w=w)


def activated(*nodes: Node) -> Graph:
    return graph_of([5, 23], ("MatMul", "x w", "m", {}), *nodes, w=[23, 38])


def attention(tokens: int, heads: int, width: int) -> Graph:
    """Heads that are views of a projection, a softmax of scores, and their product."""
    make = np.array
    return graph_of(
        [2, tokens, 24],
        ("MatMul", "x w", "p", {}),
        ("Reshape", "p parts", "r", {}),
        ("Transpose", "r", "t", {"perm": [2, 0, 3, 1, 4]}),
        ("Split", "t ones", "q0 k0 v0", {"axis": 0}),
        *(("Squeeze", f"{n}0 first", n, {}) for n in "qkv"),
        ("Transpose", "k", "turned", {"perm": [0, 1, 3, 2]}),
        ("MatMul", "q turned", "s", {}),
        ("Softmax", "s", "a", {"axis": -1}),
        ("MatMul", "a v", "o", {}),
        ("Transpose", "o", "b", {"perm": [0, 2, 1, 3]}),
        ("Reshape", "b whole", "y", {}),
        w=[24, 3 * heads * width],
        parts=make([2, tokens, 3, heads, width]),
        ones=make([1, 1, 1]),
        first=make([0]),
        whole=make([2, tokens, heads * width]),
    )


SCHEDULES: Mapping[str, Graph] = {
    "product": activated(("Relu", "m", "y", {})),
    "one_row": graph_of([1, 70], ("Gemm", "x w b", "y", {"transB": 1}), w=[51, 70], b=[51]),
    "sigmoid": activated(("Sigmoid", "m", "g", {}), ("Mul", "m g", "y", {})),
    "erf": activated(("Erf", "m", "y", {})),
    "exp": activated(("Exp", "m", "y", {})),
    "hard_swish": activated(("HardSwish", "m", "y", {})),
    "attention": attention(17, 3, 16),
    "few_tokens": attention(3, 2, 5),
    "softmax": graph_of([3, 5, 35], ("Softmax", "x", "y", {"axis": -1})),
    "layer_norm": graph_of([3, 45], ("LayerNormalization", "x w b", "y", {}), w=[45], b=[45]),
    "pointwise": conv([1, 24, 7, 5], [20, 24, 1, 1]),
    "odd": conv([1, 5, 9, 11], [7, 5, 3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    "dilated": conv([2, 8, 11, 10], [24, 8, 5, 3], pads=[2, 0, 1, 1], dilations=[2, 1]),
    "grouped": conv([1, 32, 6, 6], [32, 16, 3, 3], pads=[1, 1, 1, 1], group=2),
    "merged_groups": conv([1, 12, 6, 6], [12, 2, 3, 3], pads=[1, 1, 1, 1], group=6),
    "winograd": conv([1, 64, 28, 28], [64, 64, 3, 3], pads=[1, 1, 1, 1]),
    "winograd_odd": conv([1, 61, 13, 15], [67, 61, 3, 3], pads=[1, 1, 1, 1]),
    "depthwise3": conv([1, 19, 8, 9], [19, 1, 3, 3], pads=[1, 1, 1, 1], group=19),
    "depthwise5": conv([1, 16, 33, 9], [16, 1, 5, 5], pads=[2, 2, 2, 2], group=16, strides=[2, 2]),
    "depthwise7": conv([2, 6, 9, 9], [6, 1, 7, 7], pads=[3, 3, 3, 3], group=6),
    "transposed": upwards([1, 20, 6, 5], [20, 9, 4, 4], strides=[2, 2], pads=[1, 1, 1, 1]),
    "transposed_odd": upwards([1, 6, 5, 5], [6, 13, 3, 3], strides=[2, 2], output_padding=[1, 1], pads=[1, 1, 1, 1]),
    "transposed_depthwise": upwards([1, 10, 6, 5], [10, 1, 2, 2], strides=[2, 2], group=10),
    "max_pool": graph_of(
        [1, 10, 9, 9],
        ("Conv", "x w", "c", {}),  # which gives it the layout of the schedules
        ("MaxPool", "c", "y", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        w=[13, 10, 1, 1],
    ),
    "moves": graph_of(
        [1, 10, 6, 6],
        ("Conv", "x w", "c", {}),
        ("Resize", "c  sizes", "r", {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}),
        ("Conv", "x v", "d", {}),
        ("Resize", "d  sizes", "e", {"mode": "linear"}),
        ("Concat", "r e", "t", {"axis": 1}),
        ("Slice", "t begin end axes", "s", {}),
        ("Transpose", "s", "y", {"perm": [0, 2, 3, 1]}),
        w=[7, 10, 1, 1],
        v=[8, 10, 1, 1],
        sizes=np.array([1, 1, 2, 2], np.float32),
        begin=np.array([2]),
        end=np.array([13]),
        axes=np.array([1]),
    ),
    "pooled": graph_of([2, 21, 7, 5], ("GlobalAveragePool", "x", "y", {})),
}


@pytest.mark.parametrize(
    ("mcpu", "threads"),
    [
        ("cortex-a78", 1),
        pytest.param("cortex-a72", 2, marks=SLOW),
        pytest.param("neoverse-v1", 2, marks=SLOW),
        pytest.param("neoverse-v2", 1, marks=SLOW),
    ],
)
def test_every_schedule_computes_what_onnx_runtime_does(mcpu, threads, arm, tmp_path, monkeypatch):
    graph, used = together(SCHEDULES), Counter()
    feeds, other = (oracle.random_feeds(graph.signature().inputs, seed) for seed in range(2))

    def counted(block: str, schedule: Any) -> Any:
        def apply(*given: Any, **named: Any) -> Any:
            used[block] += 1
            return schedule(*given, **named)

        return apply

    monkeypatch.setattr(schedules, "_SCHEDULES", [(counted(block, f), block) for f, block in schedules._SCHEDULES])
    built(graph, tmp_path, mcpu, threads=threads)
    assert [block for _, block in schedules._SCHEDULES if not used[block]] == []
    assert (used[transposed.PLACE], used[depthwise.PLACE], used[rows.SCALE]) == (3, 3, 4)
    found = arm.run(graph, tmp_path, feeds, QEMU[mcpu], threads)
    wrong = {name: error for name, error in errors(oracle.run(graph, feeds), found).items() if not error < TOLERANCE}
    assert wrong == {}
    assert min(errors(oracle.run(graph, other), found).values()) > 1e-2


# -- integers ----------------------------------------------------------------------------------------------------------


def layer(case: str, dtype: str, zero: int) -> tuple[Graph, np.ndarray, np.ndarray]:
    """A quantised convolution, its input, and what numpy's integers make of it."""
    inner, height, width, out, kernel, stride, groups = LAYERS[case]
    weight = RNG.integers(-127, 128, (out, inner // groups, kernel, kernel)).astype(np.int8)
    bias, steps = RNG.integers(-9000, 9000, out).astype(np.int32), RNG.uniform(1e-3, 3e-3, out).astype(np.float32)
    scale, result = np.float32(0.021), np.float32(2.5e-3 * math.sqrt(weight[0].size))
    kind, away = np.dtype(dtype).type, zero // 2 + 3
    d = Drawing()
    d.source("x", kind, 1, inner, height, width)
    d.dequantize("x", scale, kind(zero))
    d.real("w", weight, steps)
    d.real("b", bias, scale * steps)
    pads = [kernel // 2] * 4
    d.add("Conv", "x_real w_real b_real", "c", pads=pads, strides=[stride] * 2, group=groups)
    d.quantize("c", "y", result, kind(away))
    x = random(dtype, 1, inner, height, width)
    total = convolved(x.astype(np.int64) - zero, weight, kernel // 2, stride, groups) + bias[:, None, None]
    wanted = requantised(total, (scale * steps / result)[:, None, None], away, dtype)
    return d.graph("y", kind, *wanted.shape), x, wanted


@pytest.mark.parametrize("mcpu", ["cortex-a78", *(pytest.param(n, marks=SLOW) for n in ("cortex-a72", "neoverse-v2"))])
def test_integers_are_numpys_bit_for_bit(mcpu, arm, tmp_path):
    pytest.importorskip("torch")
    zeros = {"uint8": 113, "int8": -9}
    made = {f"{case}_{dtype}": layer(case, dtype, zero) for case in LAYERS for dtype, zero in zeros.items()}
    graph = together({name: drawn for name, (drawn, _, _) in made.items()})
    built(graph, tmp_path, mcpu)
    found = arm.run(graph, tmp_path, {f"{name}/x": x for name, (_, x, _) in made.items()}, QEMU[mcpu])
    assert [n for n, (_, _, wanted) in made.items() if not np.array_equal(found[f"{n}/y"], wanted)] == []
    assert min(len(np.unique(wanted)) for _, _, wanted in made.values()) > 15
    if mcpu != "cortex-a72":  # one without dot products stops at the first of them
        given = [tmp_path / f"in{number}.npy" for number in range(len(graph.inputs))]
        assert arm.start("cortex-a72", tmp_path / ENGINE, tmp_path / "out", *given).returncode == -signal.SIGILL


# -- coded weights and binary attention --------------------------------------------------------------------------------


def coded(kind: str, shape: Sequence[int], group: int = 0, bits: int = 4, rows: int = 70) -> Graph:
    weight = RNG.standard_normal((rows, shape[-1])).astype(np.float32)
    return model(codes.encode(weight, kind, bits, group=group), shape)


def angular(tokens: int, inner: int, outer: int) -> Graph:
    name, lead = "BinaryAngularAttention", [1, 2, tokens]
    shapes = {"q": [*lead, inner], "k": [*lead, inner], "v": [*lead, outer]}
    node = helper.make_node(name, ["q", "k", "v", "limit", "limit"], ["y"], domain=ops.DOMAIN, turn=[0, 1, 3, 2])
    return operators([node], shapes, shapes["v"], {"limit": np.full(1, 0.03, np.float32)}, name)


def counted(shape: Sequence[int]) -> Graph:
    held = {f"{n}_threshold": np.full(1, 0.05, np.float32) for n in "qk"}
    bias = RNG.standard_normal((shape[-2], shape[-2])).astype(np.float32)
    held |= {"scale": np.full(1, 0.3, np.float32), "bias": bias}
    return hamming(dict.fromkeys("qkv", shape), held)


def coded_graphs() -> dict[str, Graph]:
    return {
        "pot": coded("pot", [1, 1001], rows=1031),
        "sp2": coded("sp2", [1, 2, 1001], rows=1031, group=256),
        "binary": coded("binary", [1, 1001], rows=1031, group=512),
        "short": coded("pot", [1, 1001], rows=1031, bits=3),
        "uneven": coded("pot", [1, 1001], rows=1031, group=40),  # groups that do not fill vectors of bytes
        "small": coded("sp2", [1, 90]),
        "few": angular(9, 16, 20),
        "many": angular(50, 64, 64),
        "counted": counted([2, 3, 21, 45]),
    }


SAID = {"few": "one kernel", "many": "one kernel", "counted": "bits counted", "binary": "wide_tables"}
FLOATS = {"pot": "tables", "sp2": "tables", "short": "tables", "uneven": "float32", "small": "float32"}
BYTES = {"pot": "book_int8", "sp2": "dot_int8", "short": "book_int8", "uneven": "book_int8", "small": "float32"}


@pytest.mark.parametrize(
    ("mcpu", "threads", "activations", "expected"),
    [
        pytest.param("cortex-a72", 1, "float32", FLOATS, marks=SLOW),
        ("cortex-a78", 1, "int8", BYTES),
        pytest.param("cortex-a72", 2, "int8", FLOATS, marks=SLOW),
        pytest.param("cortex-a78", 2, "float32", FLOATS, marks=SLOW),
        pytest.param("neoverse-v2", 2, "float32", FLOATS, marks=SLOW),
        pytest.param("neoverse-v2", 2, "int8", BYTES, marks=SLOW),
    ],
)
def test_coded_weights_and_binary_attention_are_their_bodies(mcpu, threads, activations, expected, arm, tmp_path):
    graph, expected = together(coded_graphs()), {**SAID, **expected}
    said = {
        line.partition("/")[0]: line for line in built(graph, tmp_path, mcpu, threads=threads, activations=activations)
    }
    assert [line for name, line in said.items() if not re.search(rf": {expected[name]}$", line)] == []
    feeds, other = (oracle.random_feeds(graph.signature().inputs, seed) for seed in range(2))
    found = arm.run(graph, tmp_path, feeds, QEMU[mcpu], threads)
    for name, error in errors(oracle.run(graph, feeds), found).items():
        integers = expected[name.partition("/")[0]].endswith("int8")
        assert error < (0.02 if integers else TOLERANCE) and (error > 1e-4) == integers, name
    assert min(errors(oracle.run(graph, other), found).values()) > 0.1


# -- the zoo -----------------------------------------------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("name", FAMILIES)
def test_a_zoo_model_is_onnx_runtimes(name, arm, tmp_path):
    graph = exported(name, FAMILIES[name])
    feeds = oracle.random_feeds(graph.signature().inputs, 3)
    built(graph, tmp_path, "cortex-a78")
    assert max(errors(oracle.run(graph, feeds), arm.run(graph, tmp_path, feeds, QEMU["cortex-a78"])).values()) < 1e-4


@SLOW
@pytest.mark.parametrize("mcpu", ["cortex-a72", "cortex-a78"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_zoo_model_is_as_good_as_its_simulation(name, mcpu, arm, tmp_path):
    graph, made = quantised(name, "tvm", FAMILIES[name])
    feeds = oracle.random_feeds(graph.signature().inputs, 5)
    built(made, tmp_path, mcpu)
    reference = qdq.kernels(graph)(feeds)
    found = qdq.snr([reference], [arm.run(made, tmp_path, feeds, QEMU[mcpu])])
    assert found > qdq.snr([reference], [qdq.simulation(made)(feeds)]) - 3
    away = qdq.kernels(graph)(oracle.random_feeds(graph.signature().inputs, 6))
    assert found > qdq.snr([reference], [away]) + 3


def test_the_readme_says_how_the_program_is_made_and_emulated():
    text = (EXAMPLE / "README.md").read_text()
    assert f"make CXX={COMPILER} FFI=board/tvm_ffi TVM=board/tvm" in text
    assert f"qemu-aarch64 -L {SYSROOT} -cpu {QEMU['cortex-a78']} ./run -n 0" in text
