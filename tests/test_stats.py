"""Counting: closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import stats
from edgecompile.graph import Graph, Provenance


def graph_of(text: str) -> Graph:
    return Graph.from_proto(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}'))


@pytest.mark.parametrize(
    "text, macs",
    [
        # out 8x4x4 positions, 6/2 input channels per group, 3x3 taps
        ("g (float[1,6,8,8] x, float[8,3,3,3] w) => (float[1,8,4,4] y)"
         " { y = Conv<group=2,strides=[2,2],pads=[1,1,1,1]>(x, w) }",
         8 * 4 * 4 * 3 * 9),
        # each of the 6x5x5 input values meets 4 output channels and 2x2 taps: not the output positions
        ("g (float[1,6,5,5] x, float[6,4,2,2] w) => (float[1,4,10,10] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
         6 * 25 * 4 * 4),
        ("g (float[3,5] a, float[7,5] b) => (float[3,7] y) { y = Gemm<transB=1>(a, b) }", 3 * 7 * 5),
        ("g (float[5,3] a, float[5,7] b) => (float[3,7] y) { y = Gemm<transA=1>(a, b) }", 3 * 7 * 5),
        ("g (float[2,4,3,5] a, float[2,4,5,7] b) => (float[2,4,3,7] y) { y = MatMul(a, b) }", 8 * 3 * 7 * 5),
        ("g (float[100] a, float[100] b) => (float[100] y) { y = Add(a, b) }", 0),
    ],
)  # fmt: skip
def test_macs(text, macs):
    assert stats.count(graph_of(text)).macs == macs


def test_symbolic_batch_counts_as_one_and_feeds_override_it():
    graph = graph_of("g (float[N,5] a, float[5,7] b) => (float[N,7] y) { y = MatMul(a, b) }")
    assert stats.count(graph).macs == 35
    feeds = {"a": np.zeros((4, 5), np.float32), "b": np.zeros((5, 7), np.float32)}
    assert stats.count(graph, feeds).macs == 140


def test_unknown_shapes_are_not_guessed():
    graph = graph_of("g (float[N,M] a, float[M,K] b) => (float[N,K] y) { y = MatMul(a, b) }")
    assert stats.count(graph).macs is None


def test_parameters_are_floating_point_constants_counted_once():
    text = """g (float[1,4] x) => (float[1,4] y)
        <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float one = {1}, int64[2] shape = {1, 4}>
        { a = MatMul(x, w) b = MatMul(a, w) c = Mul(b, one) y = Reshape(c, shape) }"""
    counted = stats.count(graph_of(text))
    assert counted.parameters == 16 and counted.bytes == 16 * 4 + 4 + 16 and counted.nodes == 4


def test_by_module_adds_up_to_the_whole():
    text = """g (float[2,4] x) => (float[2,4] y)
        <float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>
        { a = MatMul(x, w) b = MatMul(a, w) c = Relu(b) y = MatMul(c, w) }"""
    graph = graph_of(text)
    for node, path in zip(graph.nodes, ("net.0.a", "net.0.b", "net.1", ""), strict=True):
        node.provenance = Provenance((path,) if path else ())
    rows = stats.by_module(graph, 2)
    assert [(r.module, r.nodes, r.parameters, r.macs) for r in rows] == [
        ("net.0", 2, 16, 64),  # the shared weight counts where it is first read
        ("net.1", 1, 0, 0),
        ("", 1, 0, 32),
    ]
    total = stats.count(graph)
    assert sum(r.parameters for r in rows) == total.parameters and sum(r.macs or 0 for r in rows) == total.macs


def test_shaped_drops_what_is_stale_and_keeps_what_inference_cannot_find():
    graph = graph_of(
        "g (float[2,5] a, float[5,7] b) => (float[2,7] y)"
        " { s = MatMul(a, b) k = Relu(s) t = foreign.Own(k) y = Relu(t) }"
    )
    tensors = graph.tensors()
    tensors["s"].shape, tensors["t"].shape = ["rows", 7], [2, 7]
    found = stats.shaped(graph).tensors()
    assert [found[n].shape for n in "skty"] == [[2, 7], [2, 7], [2, 7], [2, 7]]
    graph.inputs[0].shape = ["N", 5]
    found = stats.shaped(graph, {"a": np.zeros((4, 5), np.float32)}).tensors()
    assert [found[n].shape for n in "skt"] == [[4, 7], [4, 7], None], "the shape of t was for another batch"


@pytest.mark.parametrize("form", ["ort_cpu", "tensorrt"])
def test_a_quantised_graph_has_as_many_parameters_as_before(form):
    from edgecompile import qdq
    from edgecompile.calibration import Range
    from edgecompile.placement import TABLES, place

    text = "(float[1,4,8,8] x) => (float[1,6,8,8] y) { a = Conv (x, w, b) r = Relu (a) y = Conv (r, v) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    rng = np.random.default_rng(0)
    for name, shape in (("w", (5, 4, 1, 1)), ("b", (5,)), ("v", (6, 5, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    graph = Graph.from_proto(model)
    graph.infer_shapes()
    rules = TABLES[form]
    made = qdq.quantized(
        graph, rules, {n: Range(-1, 1, "minmax") for n in place(graph, rules, ends=True).points}, ends=True
    )
    assert any(n.op == "DequantizeLinear" for n in made.nodes)
    assert stats.count(made).parameters == stats.count(graph).parameters == 20 + 5 + 30
    rows = stats.by_module(made, 1)
    assert sum(r.parameters for r in rows) == 55
