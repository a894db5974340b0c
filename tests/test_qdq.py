"""The algebra of Q/DQ by enumeration, and placements checked against their rules on fixed and random graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from edgecompile import calibration, oracle, placement, qdq
from edgecompile.calibration import Range
from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance
from edgecompile.linear import op
from edgecompile.placement import ORT_CPU, TABLES, TENSORRT, Rules, place

ORT_INTEGER_OPS = {"QLinearConv", "QLinearAdd", "QLinearConcat", "QGemm", "QLinearGlobalAveragePool"}


def graph_of(text: str, opset: int = 17, **weights: np.ndarray) -> Graph:
    """A graph from ONNX's textual syntax; ``weights`` are initializers, stored as float32."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items())
    graph = Graph.from_proto(model)
    graph.tidy()
    graph.infer_shapes()
    return graph


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def samples(graph: Graph, count: int = 4) -> list[oracle.Outputs]:
    return [oracle.random_feeds(graph.signature().inputs, seed) for seed in range(count)]


def ranges_of(graph: Graph, rules: Rules, **options) -> calibration.Ranges:
    points = list(place(graph, rules, **options).points)
    return calibration.collect(graph, samples(graph), points, "minmax", symmetric=rules.symmetric)


def optimised_ops(graph: Graph, tmp_path) -> list[str]:
    """The operators of what ONNX Runtime runs."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(graph.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]


def ort_run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, optimised: bool) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


# -- algebra, over all integers ----------------------------------------------------------------------------------------

INTERVALS = [(0.0, 6.0), (-1.0, 1.0), (-0.3, 7.7), (1.0, 2.0), (-3.0, -1.0), (0.0, 1e-30), (-1e30, 1e30), (0.0, 0.0)]


@pytest.mark.parametrize("rules", [ORT_CPU, TENSORRT], ids=lambda r: r.name)
@pytest.mark.parametrize("interval", INTERVALS)
def test_all_256_integers_survive_dequantise_and_quantise(rules, interval):
    quantizer = qdq.activation(Range(*interval, "minmax"), rules)
    info = np.iinfo(quantizer.zero.dtype)
    integers = np.arange(info.min, info.max + 1).astype(quantizer.zero.dtype)
    assert len(integers) == 256
    np.testing.assert_array_equal(quantizer.quantize(quantizer.dequantize(integers)), integers)
    assert quantizer.dequantize(quantizer.zero[None])[0] == 0.0


def test_integers_do_not_survive_a_pair_of_another_scale():
    one = qdq.activation(Range(0.0, 6.0, "minmax"), ORT_CPU)
    two = qdq.activation(Range(0.0, 5.0, "minmax"), ORT_CPU)
    integers = np.arange(256).astype(np.uint8)
    assert (two.quantize(one.dequantize(integers)) != integers).any()


@pytest.mark.parametrize("rules", [ORT_CPU, TENSORRT], ids=lambda r: r.name)
def test_quantizer_equals_the_runtime_bit_for_bit(rules):
    quantizer = qdq.activation(Range(-0.37, 5.1, "minmax"), rules)
    info = np.iinfo(quantizer.zero.dtype)
    integers = np.arange(info.min, info.max + 1).astype(quantizer.zero.dtype)
    halves = (np.arange(-1000, 1000).astype(np.float32) + np.float32(0.5)) * quantizer.scale
    x = np.concatenate([halves, normal(2000) * 3, np.float32([1e30, -1e30, 0, -0.0])])
    kind = helper.np_dtype_to_tensor_dtype(quantizer.zero.dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["d"]),
    ]
    ports = [helper.make_tensor_value_info(n, t, ["n" + n]) for n, t in (("x", 1), ("i", kind), ("q", kind), ("d", 1))]
    stored = [numpy_helper.from_array(quantizer.scale, "s"), numpy_helper.from_array(quantizer.zero, "z")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:2], ports[2:], stored),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    q, d = ort_run(model, {"x": x, "i": integers}, optimised=False)
    np.testing.assert_array_equal(q, quantizer.quantize(x))
    np.testing.assert_array_equal(d, quantizer.dequantize(integers))


def pair_sums(limit: int) -> np.ndarray:
    """Extremes of ``a * v + b * w``, uint8 a and b, weights v and w up to a limit: sums of those of a product."""
    products = np.arange(256)[:, None] * np.arange(-limit, limit + 1)[None, :]
    extremes = np.array([products.min(), products.max()])
    return extremes[:, None] + extremes[None, :]


def test_no_pair_of_products_with_7_bit_weights_saturates_16_bits():
    sums = pair_sums(qdq.WEIGHT_LIMIT[7])
    assert np.iinfo(np.int16).min <= sums.min() and sums.max() <= np.iinfo(np.int16).max


@pytest.mark.parametrize("limit", [65, qdq.WEIGHT_LIMIT[8]])
def test_larger_weights_do_saturate(limit):
    assert pair_sums(limit).max() > np.iinfo(np.int16).max


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_weights_fill_their_width_channel_by_channel(bits, axis):
    values = normal(5, 4, 3, 6) * np.logspace(-6, 3, 6, dtype=np.float32)
    quantizer = qdq.weights(values, axis, bits)
    integers = quantizer.quantize(values)
    others = tuple(i for i in range(4) if i != axis)
    np.testing.assert_array_equal(np.abs(integers.astype(int)).max(others), qdq.WEIGHT_LIMIT[bits])
    half = quantizer.scale.reshape([-1 if i == axis else 1 for i in range(4)]) / 2
    assert (np.abs(quantizer.dequantize(integers) - values) <= half * (1 + 1e-5)).all()
    assert not quantizer.zero.any() and quantizer.zero.dtype == np.int8


def test_a_dead_channel_has_a_scale_and_keeps_its_bias():
    values = normal(3, 2, 1, 1)
    values[1] = 0
    source = qdq.activation(Range(0, 1.0, "minmax"), ORT_CPU)
    made = placement.Layer(gs.Node("Conv"), values, 0, np.float32([0.5, 1e4, -0.5]))
    quantizer = qdq.layer_weights(made, source, 8, True)
    integers, scale = qdq.bias(made.bias, source, quantizer)
    assert (quantizer.scale > 0).all() and not quantizer.quantize(values)[1].any()
    np.testing.assert_allclose(integers * scale.astype(np.float64), made.bias, rtol=1e-3)
    bare = qdq.weights(values, 0, 8)
    lost, step = qdq.bias(np.float32([0.5, 1e-3, -0.5]), source, bare)
    assert lost[1] == 0 and step[1] > 1e-3  # what the floor is for


def test_a_bias_never_overflows_the_accumulator():
    values = np.full((1, 1, 1, 1), 1e-9, np.float32)
    source = qdq.activation(Range(0, 1.0, "minmax"), ORT_CPU)
    made = placement.Layer(gs.Node("Conv"), values, 0, np.float32([100.0]))
    integers, scale = qdq.bias(made.bias, source, qdq.layer_weights(made, source, 8, True))
    np.testing.assert_allclose(integers * scale.astype(np.float64), made.bias, rtol=1e-6)
    clipped, step = qdq.bias(made.bias, source, qdq.weights(values, 0))
    assert abs(float(clipped[0]) * float(step[0]) - 100) > 50


def test_every_product_of_activation_and_weight_in_the_real_kernel():
    """A 1x1 Conv of all 256 activations with all 255 weights equals the integer formula, bit for bit."""
    weight = np.arange(-127, 128, dtype=np.int8).reshape(255, 1, 1, 1)
    scale = {"sx": 0.02, "sw": 0.01, "sy": 0.03}
    zero = {"zx": np.uint8(113), "zw": np.int8(0), "zy": np.uint8(131)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"]),
        helper.make_node("Conv", ["xf", "wf"], ["yf"]),
        helper.make_node("QuantizeLinear", ["yf", "sy", "zy"], ["y"]),
    ]
    stored = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in scale.items()]
    stored += [numpy_helper.from_array(np.asarray(v), n) for n, v in zero.items()]
    stored.append(numpy_helper.from_array(weight, "w"))
    ports = [
        helper.make_tensor_value_info("x", 2, [1, 1, 1, 256]),
        helper.make_tensor_value_info("y", 2, [1, 255, 1, 256]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:1], ports[1:], stored),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 256)
    (y,) = ort_run(model, {"x": x}, optimised=True)
    products = weight.reshape(255, 1).astype(np.int32) * (x.reshape(1, 256).astype(np.int32) - 113)
    factor = np.float32(np.float32(scale["sx"]) * np.float32(scale["sw"])) / np.float32(scale["sy"])
    wanted = np.clip(np.rint(products.astype(np.float32) * factor) + 131, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(y.reshape(255, 256), wanted)
    assert len(np.unique(wanted)) > 200


MOVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "MaxPool <kernel_shape=[1,2], strides=[1,2]>": lambda v: v.reshape(1, 1, 16, 8, 2).max(-1),
    "Transpose <perm=[0,1,3,2]>": lambda v: v.transpose(0, 1, 3, 2),
    "Flatten": lambda v: v.reshape(1, 256),
}


@pytest.mark.parametrize("text", MOVES)
def test_all_256_integers_pass_what_moves_values(text):
    """``Q, DQ, op, Q, DQ`` of one scale is ``op`` on the integers."""
    graph = graph_of(f"(float[1,1,16,16] x) => (float[] y) {{ y = {text} (x) }}".replace("float[] y", "float y"))
    quantizer = qdq.activation(Range(-1.3, 4.0, "minmax"), ORT_CPU)
    integers = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(1, 1, 16, 16)
    y = oracle.run(graph, {"x": quantizer.dequantize(integers)})["y"]
    np.testing.assert_array_equal(quantizer.quantize(y), MOVES[text](integers))


@pytest.mark.parametrize("high", [6.0, 5.999999, 1.0, 0.1, 2.3])
def test_integers_never_exceed_what_the_activation_lets_through(high):
    quantizer = qdq.activation(Range(0.0, high, "minmax"), ORT_CPU, [(0.0, high)])
    assert quantizer.scale * np.float32(255) <= np.float32(high)
    assert quantizer.scale * np.float32(255) > np.float32(high) * np.float32(1 - 1e-5)


def test_without_the_bound_some_scale_exceeds_it():
    highs = np.linspace(0.1, 8, 500, dtype=np.float32)
    free = [qdq.activation(Range(0.0, float(h), "minmax"), ORT_CPU).scale * np.float32(255) > h for h in highs]
    assert any(free)


# -- placement on graphs whose answer is known -------------------------------------------------------------------------

CHAIN = "(float[1,4,8,8] x) => (float[1,5] y) { a = Conv <pads=[1,1,1,1]> (x, w, b) r = Clip (a, lo, hi) c = Conv (r, v) p = GlobalAveragePool (c) f = Flatten (p) y = Gemm <transB=1> (f, u, t) }"  # noqa: E501


def chain() -> Graph:
    return graph_of(
        CHAIN, w=normal(6, 4, 3, 3), b=normal(6), lo=np.float32(0), hi=np.float32(6), v=normal(4, 6, 1, 1, seed=1),
        u=normal(5, 4, seed=2), t=normal(5, seed=3),
    )  # fmt: skip


def pairs(graph: Graph) -> set[str]:
    """Names of the tensors that QuantizeLinear reads, as the graph before had them."""
    return {re.sub("(_float|_1)$", "", n.inputs[0].name) for n in graph.nodes if n.op == "QuantizeLinear"}


def test_ort_places_around_kernels_and_leaves_the_last_result_in_float():
    graph = chain()
    made = qdq.quantized(graph, ORT_CPU, ranges_of(graph, ORT_CPU))
    assert pairs(made) == {"x", "r", "c", "p", "f"}
    assert [n.op for n in made.nodes if n.op in ("Conv", "Gemm", "Clip")] == ["Conv", "Clip", "Conv", "Gemm"]
    scales = {n.inputs[0].name.removesuffix("_float"): n.inputs[1] for n in made.nodes if n.op == "QuantizeLinear"}
    assert scales["p"] is scales["f"]  # Flatten moves values
    assert scales["c"] is not scales["p"]  # an average has its own range
    gemm = next(n for n in made.nodes if n.op == "Gemm")
    assert [t.inputs[0].op for t in gemm.inputs] == ["DequantizeLinear"] * 3
    assert gemm.inputs[2].inputs[0].inputs[0].values.dtype == np.int32
    assert made.is_output(gemm.outputs[0])


def test_ort_runs_the_chain_in_integers(tmp_path):
    graph = chain()
    made = qdq.quantized(graph, ORT_CPU, ranges_of(graph, ORT_CPU))
    ops = optimised_ops(made, tmp_path)
    assert ops.count("QLinearConv") == 2 and "QGemm" in ops and "QLinearGlobalAveragePool" in ops
    assert "Clip" not in ops and ops.count("QuantizeLinear") == 1
    assert not ORT_INTEGER_OPS & set(optimised_ops(graph, tmp_path))


def test_quantised_chain_keeps_provenance_and_signature():
    graph = chain()
    for number, node in enumerate(graph.nodes):
        node.provenance = type(provenance(node))((f"m{number}",), (f"n{number}",))  # type: ignore[attr-defined]
    made = qdq.quantized(graph, ORT_CPU, ranges_of(graph, ORT_CPU))
    made.check(graph.signature())
    assert all(provenance(n).modules for n in made.nodes)
    assert {m for n in made.nodes for m in provenance(n).modules} == {f"m{i}" for i in range(len(graph.nodes))}


def test_a_symmetric_table_places_at_inputs_only():
    graph = chain()
    made = qdq.quantized(graph, TENSORRT, ranges_of(graph, TENSORRT))
    assert pairs(made) == {"x", "r", "f", "w", "v", "u"}
    for node in made.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2]
            assert isinstance(zero, gs.Constant) and zero.values.dtype == np.int8 and not zero.values.any()
    gemm = next(n for n in made.nodes if n.op == "Gemm")
    assert isinstance(gemm.inputs[2], gs.Constant) and gemm.inputs[2].values.dtype == np.float32


RESIDUAL = "(float[1,4,8,8] x) => (float[1,4,8,8] y) { s = Conv (x, w) a = Conv (s, v) r = Relu (a) c = Conv (r, u) d = Add (c, s) e = Relu (d) y = Conv (e, t) }"  # noqa: E501


def residual() -> Graph:
    return graph_of(RESIDUAL, **{n: normal(4, 4, 1, 1, seed=i) for i, n in enumerate("wvut")})


def test_tensorrt_quantises_the_other_input_of_a_residual_add():
    graph = residual()
    made = qdq.quantized(graph, TENSORRT, ranges_of(graph, TENSORRT))
    add = next(n for n in made.nodes if n.op == "Add")
    assert [t.inputs[0].op for t in add.inputs] == ["Conv", "DequantizeLinear"]
    rules = replace(TENSORRT, residual=False, through=False)
    unruly = qdq.quantized(graph, rules, ranges_of(graph, rules))
    assert [t.inputs[0].op for t in next(n for n in unruly.nodes if n.op == "Add").inputs] == ["Conv", "Conv"]


SPLIT = "(float[1,4,8,8] x) => (float[1,2,8,8] y) { s = Conv (x, w) q, k = Split <axis=1> (s) z = Sigmoid (q) m = Mul (z, k) a = Conv (s, v) h = Softmax <axis=1> (a) j, l = Split <axis=1> (h) y = Add (m, j) }"  # noqa: E501


def split() -> Graph:
    return graph_of(SPLIT, w=normal(4, 4, 1, 1), v=normal(4, 4, 1, 1, seed=1))


def float_islands(graph: Graph) -> list[str]:
    """What TensorRT would quantise with a kernel of its own."""
    from edgecompile.targets.trt import strong_typing

    return [p.why for p in strong_typing.check(graph, "10.3") if "floating point" in p.why]


@pytest.mark.parametrize("make", [residual, split])
def test_tensorrt_writes_integers_alone_where_a_float_operator_reads_them_too(make):
    graph = make()
    made = qdq.quantized(graph, TENSORRT, ranges_of(graph, TENSORRT))
    conv = next(n for n in made.nodes if n.op == "Conv")
    assert [n.op for n in conv.outputs[0].outputs] == ["QuantizeLinear"] and not float_islands(made)
    rules = replace(TENSORRT, through=False, residual=False)
    unruly = qdq.quantized(graph, rules, ranges_of(graph, rules))
    assert float_islands(unruly)


def test_tensorrt_does_not_round_what_the_caller_reads():
    text = "(float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] s) { s = Conv (x, w) y = Conv (s, v) }"
    graph = graph_of(text, w=normal(4, 4, 1, 1), v=normal(4, 4, 1, 1, seed=1))
    made = qdq.quantized(graph, TENSORRT, ranges_of(graph, TENSORRT))
    assert {n.inputs[0].name for n in made.nodes if n.op == "QuantizeLinear"} >= {"x", "s"}
    assert [made.producer(t).op for t in made.outputs] == ["Conv", "Conv"]


def test_of_two_convolutions_the_add_fuses_with_the_later():
    text = "(float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv (x, w) b = Conv (x, v) d = Add (b, a) e = Relu (d) y = Conv (e, u) }"  # noqa: E501
    graph = graph_of(text, **{n: normal(4, 4, 1, 1, seed=i) for i, n in enumerate("wvu")})
    made = qdq.quantized(graph, TENSORRT, ranges_of(graph, TENSORRT))
    add = next(n for n in made.nodes if n.op == "Add")
    assert [t.inputs[0].op for t in add.inputs] == ["Conv", "DequantizeLinear"]


def test_ort_adds_integers_between_layers_and_floats_elsewhere(tmp_path):
    graph = residual()
    made = qdq.quantized(graph, ORT_CPU, ranges_of(graph, ORT_CPU, ends=True), ends=True)
    assert "QLinearAdd" in optimised_ops(made, tmp_path)
    text = "(float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv (x, w) b = Conv (a, v) y = Add (b, x) }"
    last = graph_of(text, w=normal(4, 4, 1, 1), v=normal(4, 4, 1, 1, seed=1))
    assert "d" not in pairs(qdq.quantized(last, ORT_CPU, ranges_of(last, ORT_CPU)))
    assert "Add" in optimised_ops(qdq.quantized(last, ORT_CPU, ranges_of(last, ORT_CPU)), tmp_path)


CONCAT = "(float[1,4,8,8] x) => (float[1,2,8,8] y) { a = Conv (x, w) b = Conv (x, v) r = Relu (b) c = Concat <axis=1> (a, r) d = Conv (c, u) e = Relu (d) y = Conv (e, t) }"  # noqa: E501


@pytest.mark.parametrize("rules", [ORT_CPU, TENSORRT], ids=lambda r: r.name)
def test_concat_has_one_scale_on_all_sides(rules):
    graph = graph_of(
        CONCAT, w=normal(3, 4, 1, 1), v=9 * normal(5, 4, 1, 1, seed=1), u=normal(4, 8, 1, 1), t=normal(2, 4, 1, 1)
    )
    made = qdq.quantized(graph, rules, ranges_of(graph, rules))
    concat = next(n for n in made.nodes if n.op == "Concat")
    scales = {id(t.inputs[0].inputs[1]) for t in concat.inputs} | {id(n.inputs[1]) for n in concat.outputs[0].outputs}
    assert all(t.inputs[0].op == "DequantizeLinear" for t in concat.inputs)
    assert [n.op for n in concat.outputs[0].outputs] == ["QuantizeLinear"]
    assert len(scales) == 1
    others = {id(n.inputs[1]) for n in made.nodes if n.op == "QuantizeLinear" and n.inputs[0].name.startswith("x")}
    assert not others & scales


def test_a_concat_that_no_layer_reads_stays_in_float():
    text = "(float[1,4,8,8] x) => (float[1,8,8,8] y) { a = Conv (x, w) b = Conv (x, v) c = Concat <axis=1> (a, b) y = Softmax (c) }"  # noqa: E501
    graph = graph_of(text, w=normal(3, 4, 1, 1), v=normal(5, 4, 1, 1))
    for rules in (ORT_CPU, TENSORRT):
        assert "c" not in place(graph, rules).points


ATTENTION = "(float[2,8] x) => (float[2,6] y) { a = MatMul (x, w) q = MatMul (a, v) k = Transpose (q) s = MatMul (q, k) p = Softmax (s) o = MatMul (p, q) n = MatMul (o, u) y = MatMul (n, t) }"  # noqa: E501


def attention() -> Graph:
    return graph_of(ATTENTION, w=normal(8, 8), v=normal(8, 8, seed=1), u=normal(8, 8, seed=2), t=normal(8, 6, seed=3))


def test_attention_keeps_its_ends_softmax_and_products_of_activations_in_float():
    graph = attention()
    assert placement.is_attention(graph) and not placement.is_attention(chain())
    made = place(graph, ORT_CPU)
    assert [c.node.inputs[1].name for c in made.layers] == ["v", "u"]
    reasons = {n.outputs[0].name: why for n, why in made.floats}
    assert reasons["a"] == "it is the first layer" and reasons["y"] == "it is the last layer"
    assert reasons["s"] == "it multiplies two activations" == reasons["o"] and "scale" in reasons["p"]
    assert [c.node.inputs[1].name for c in place(graph, ORT_CPU, ends=True).layers] == ["w", "v", "u", "t"]


@pytest.mark.parametrize(
    ("text", "weights", "why"),
    [
        ("y = Conv (x, x)", {}, "two activations"),
        ("y = Gemm <alpha=2.0> (f, w)", {"w": (256, 3)}, "scales"),
        ("t = Transpose (f) y = MatMul (w, t)", {"w": (3, 256)}, "come first"),
        ("y = ConvTranspose (x, w)", {"w": (4, 3, 2, 2)}, "no int8 kernel"),
        ("y = HardSwish (x)", {}, "no int8 form"),
    ],
)
def test_what_is_left_in_float_has_a_reason(text, weights, why):
    flat = "f = Flatten (x)" if "f" in text.split("(")[1] or "(f" in text else ""
    graph = graph_of(
        f"(float[1,4,8,8] x) => (float y) {{ {flat} {text} }}", **{n: normal(*s) for n, s in weights.items()}
    )
    made = place(graph, ORT_CPU)
    assert not made.layers and why in "; ".join(reason for _, reason in made.floats)


@pytest.mark.parametrize(("groups", "stays"), [(1, False), (2, True), (4, False)])
def test_tensorrt_keeps_grouped_but_not_depthwise_convolutions_in_float(groups, stays):
    graph = graph_of(
        f"(float[1,4,8,8] x) => (float[1,4,8,8] y) {{ y = Conv <group={groups}> (x, w) }}",
        w=normal(4, 4 // groups, 1, 1),
    )
    assert (not place(graph, TENSORRT).layers) == stays
    assert len(place(graph, ORT_CPU, ends=True).layers) == 1


def test_all_parts_of_a_split_share_the_scale_of_the_whole(tmp_path):
    text = "(float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv (x, w) p, q = Split <axis=1> (a, n) c = Conv (p, v) d = Conv (q, u) y = Add (c, d) }"  # noqa: E501
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    stored = {"w": normal(8, 4, 1, 1), "v": normal(4, 4, 1, 1), "u": normal(4, 4, 1, 1), "n": np.int64([4, 4])}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in stored.items())
    graph = Graph.from_proto(model)
    graph.infer_shapes()
    made = qdq.quantized(graph, ORT_CPU, ranges_of(graph, ORT_CPU, ends=True), ends=True)
    split = next(n for n in made.nodes if n.op == "Split")
    after = [t.outputs[0] for t in split.outputs]
    assert is_pair(split.inputs[0]) and [n.op for n in after] == ["QuantizeLinear"] * 2
    assert len({id(n.inputs[1]) for n in [split.inputs[0].inputs[0], *after]}) == 1
    made.check(graph.signature())
    assert optimised_ops(made, tmp_path).count("QLinearConv") == 3


@pytest.mark.parametrize("wide", [True, False])
def test_a_wide_constant_keeps_the_runtime_from_making_a_float_gemm(wide, tmp_path):
    text = "(float[2,9,16] x) => (float[2,9,6] y) { a = MatMul (x, w) b = Add (a, s) c = MatMul (b, v) y = Add (t, c) }"
    weights = {"w": normal(16, 16), "s": normal(16), "v": normal(16, 6), "t": normal(6)}
    graph = graph_of(text, **weights)
    rules = replace(ORT_CPU, wide_add=wide)
    made = qdq.quantized(graph, rules, ranges_of(graph, rules, ends=True), ends=True)
    made.check(graph.signature())
    ops = optimised_ops(made, tmp_path)
    assert ("Gemm" in ops) != wide and (ops.count("MatMulIntegerToFloat") == 2) == wide
    assert qdq.snr([oracle.run(graph, f) for f in samples(graph)], map(qdq.kernels(made), samples(graph))) > 30


def test_globs_keep_layers_in_float():
    graph = chain()
    for node in graph.nodes:
        node.provenance = type(provenance(node))((f"net.{node.outputs[0].name}.inner",))  # type: ignore[attr-defined]
    assert len(place(graph, ORT_CPU).layers) == 3
    assert len(place(graph, ORT_CPU, skip=["net.a"]).layers) == 2
    assert len(place(graph, ORT_CPU, skip=["Conv"]).layers) == 1
    assert len(place(graph, ORT_CPU, skip=["net.b*"]).layers) == 3


def test_an_old_opset_and_a_missing_range_are_errors():
    graph = graph_of(
        "(float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv (x, w) y = Conv (a, w) }", 11, w=normal(4, 4, 1, 1)
    )
    with pytest.raises(InputError, match="opset 13"):
        qdq.quantized(graph, ORT_CPU, ranges_of(graph, ORT_CPU))
    with pytest.raises(InputError, match="no range"):
        qdq.quantized(chain(), ORT_CPU, {})


def test_every_rule_gives_its_reason():
    for rules in TABLES.values():
        assert all(rule.reason for rule in rules.ops) and all(why for _, why in rules.floats)
        assert len(rules.by_op) == len(rules.ops) and not rules.by_op.keys() & {o for o, _ in rules.floats}


def test_a_fragment_computes_what_the_whole_does():
    graph = residual()
    (feeds,) = samples(graph, 1)
    full = qdq.fragment(graph, ["x"], ["r", "d"])
    values = oracle.run(full, feeds)
    part = qdq.fragment(graph, ["r", "s"], ["d"])
    assert [n.op for n in part.nodes] == ["Conv", "Add"]
    s = oracle.run(qdq.fragment(graph, ["x"], ["s"]), feeds)["s"]
    np.testing.assert_array_equal(oracle.run(part, {"r": values["r"], "s": s})["d"], values["d"])


# -- random graphs -----------------------------------------------------------------------------------------------------


@st.composite
def networks(draw) -> Graph:
    """A random network of convolutions, elementwise operators, pools and concatenations, that ends in a Gemm."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lines, stored = [], {"lo": np.float32(0), "hi": np.float32(rng.uniform(1, 6))}
    open_tensors = [("x", 4)]

    def new(text: str, channels: int) -> None:
        name = f"t{len(lines)}"
        lines.append(f"{name} = {text}")
        open_tensors.append((name, channels))

    for _ in range(draw(st.integers(1, 9))):
        name, channels = draw(st.sampled_from(open_tensors[-3:]))
        kind = draw(
            st.sampled_from(
                ["conv", "depthwise", "relu", "clip", "add", "mul", "concat", "max", "avg", "sigmoid", "hard"]
            )
        )
        weight = f"w{len(lines)}"
        same = [n for n, c in open_tensors if c == channels]
        if kind == "conv":
            out = draw(st.sampled_from([3, 4, 8]))
            stored[weight] = rng.standard_normal((out, channels, 1, 1)) * rng.uniform(0.1, 2)
            stored[weight + "b"] = rng.standard_normal(out)
            new(f"Conv ({name}, {weight}{draw(st.sampled_from(['', f', {weight}b']))})", out)
        elif kind == "depthwise":
            stored[weight] = rng.standard_normal((channels, 1, 3, 3))
            new(f"Conv <group={channels}, pads=[1,1,1,1]> ({name}, {weight})", channels)
        elif kind in ("add", "mul"):
            new(f"{kind.capitalize()} ({name}, {draw(st.sampled_from(same))})", channels)
        elif kind == "concat":
            other, more = draw(st.sampled_from(open_tensors))
            new(f"Concat <axis=1> ({name}, {other})", channels + more)
        else:
            text = {
                "relu": f"Relu ({name})",
                "clip": f"Clip ({name}, lo, hi)",
                "max": f"MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> ({name})",
                "avg": f"AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> ({name})",
                "sigmoid": f"Sigmoid ({name})",
                "hard": f"HardSigmoid ({name})",
            }[kind]
            new(text, channels)
    name, channels = open_tensors[-1]
    stored["head"], stored["tail"] = (
        rng.standard_normal((channels, 8, 1, 1)).transpose(1, 0, 2, 3),
        rng.standard_normal((8, 5)),
    )
    lines += [f"h = Conv ({name}, head)", "g = GlobalAveragePool (h)", "f = Flatten (g)", "y = Gemm (f, tail)"]
    return graph_of(f"(float[1,4,6,6] x) => (float[1,5] y) {{ {' '.join(lines)} }}", **stored)


def is_pair(tensor: gs.Tensor) -> bool:
    return bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"


@pytest.mark.parametrize("rules", TABLES.values(), ids=TABLES)
@given(graph=networks())
@settings(max_examples=40, deadline=None)
def test_random_networks_obey_the_rules(rules, graph):
    chosen = place(graph, rules)
    names = {id(n): n.outputs[0].name for n in graph.nodes}
    ranges = ranges_of(graph, rules)
    made = qdq.quantized(graph, rules, ranges)
    onnx.checker.check_model(made.to_proto(), full_check=True)
    made.check(graph.signature())
    # Every layer of the placement, and no other, reads dequantised tensors.
    layers = {names[id(c.node)] for c in chosen.layers}
    assert "y" in layers
    renamed = {n.outputs[0].name.removesuffix("_float"): n for n in made.nodes if op(n) in ("Conv", "Gemm")}
    for name, node in renamed.items():
        assert (is_pair(node.inputs[0]) and is_pair(node.inputs[1])) == (name in layers)
        if name in layers and len(node.inputs) > 2:
            assert is_pair(node.inputs[2]) == rules.int32_bias
    # A layer whose kernel writes integers only is followed by Q, at once or after what it folds.
    for made_layer in chosen.layers:
        if rules.by_op[made_layer.node.op].output:
            node = renamed[names[id(made_layer.node)]]
            (reader,) = node.outputs[0].outputs
            reader = reader if reader.op == "QuantizeLinear" else reader.outputs[0].outputs[0]
            assert reader.op == "QuantizeLinear"
    # What moves integers has one scale on all sides; no pair follows a pair of another scale.
    for node in made.nodes:
        rule = rules.by_op.get(node.op)
        if rule is not None and rule.role == "move" and all(map(is_pair, node.inputs[:1])):
            after = [n for n in node.outputs[0].outputs if n.op == "QuantizeLinear"]
            scales = {id(t.inputs[0].inputs[1]) for t in node.inputs if is_pair(t)} | {id(n.inputs[1]) for n in after}
            assert len(scales) == 1 or not after
        if node.op == "QuantizeLinear" and is_pair(node.inputs[0]):
            raise AssertionError("a pair follows a pair")
    # It runs, and the kernels do what the simulation does.
    feeds = samples(graph, 2)
    reference = [oracle.run(graph, f) for f in feeds]
    simulated = [oracle.run(made, f) for f in feeds]
    assert all(np.isfinite(v["y"]).all() for v in simulated)
    real = list(map(qdq.kernels(made), feeds))
    if rules is ORT_CPU and qdq.snr(reference, simulated) > 10:
        assert qdq.snr(simulated, real) > qdq.snr(reference, simulated) - 12
    # Quantising again would find nothing to do.
    assert qdq.is_quantized(made) and not place(made, rules).layers
    assert not qdq.is_quantized(graph)


def test_equal_graphs_and_ranges_give_equal_bytes():
    graph = residual()
    ranges = ranges_of(graph, ORT_CPU)
    assert qdq.quantized(graph, ORT_CPU, ranges).digest() == qdq.quantized(graph.copy(), ORT_CPU, ranges).digest()
    wider = {n: Range(2 * r.low, 2 * r.high, r.method) for n, r in ranges.items()}
    assert qdq.quantized(graph, ORT_CPU, ranges).digest() != qdq.quantized(graph, ORT_CPU, wider).digest()
