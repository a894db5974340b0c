"""A cut graph computes what the original computes with the cut channels zeroed; what cannot be cut so stays whole."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgecompile import models, oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.models.randomize import randomize
from edgecompile.passes.prune.dependency import Groups, groups
from edgecompile.pipeline import Pipeline

TOLERANCE = 1e-5


# -- helpers -----------------------------------------------------------------------------------------------------------


def build(
    body: str, inputs: str, weights: dict[str, np.ndarray | tuple[int, ...]], outputs: str = "y", opset: int = 20
) -> Graph:
    """A graph from nodes in ONNX text; a weight given by its shape is random, scaled by its fan-in."""
    rng = np.random.default_rng(0)
    proto = parser.parse_graph(f"g ({inputs}) => () {{ {body} }}")
    proto.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split())
    for name, value in weights.items():
        if isinstance(value, tuple):
            value = (rng.standard_normal(value) / np.sqrt(max(1, np.prod(value[1:])))).astype(np.float32)
        proto.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    for node in model.graph.node:
        node.name = node.output[0]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for value in inferred.graph.output:
        if not value.type.tensor_type.HasField("shape"):  # there is no inference for GroupNormalization
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ["rows", "columns"]))
    return Graph.from_proto(inferred)


def floats(graph: Graph) -> int:
    return sum(v.size for v in graph.constants().values() if v.dtype.kind == "f")


def thin(found: Groups, share: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Units to keep, drawn at random, the same share of every group."""
    rng = np.random.default_rng(seed)
    return {g.name: rng.permutation(g.units)[: max(1, round(share * g.units))] for g in found.prunable}


def assert_equal(graph: Graph, found: Groups, keep: dict, feeds: dict | None = None) -> Graph:
    """The cut graph is valid, as small as promised, and computes what the masked original does; returns it."""
    cut, masked = graph.copy(), graph.copy()
    found.cut(cut, keep)
    found.mask(masked, keep)
    signature = graph.signature()
    cut.check(signature)
    masked.check(signature)
    feeds = feeds or oracle.random_feeds(signature.inputs, seed=1, other=3)
    errors = oracle.compare_all(oracle.run(masked, feeds), oracle.run(cut, feeds))
    if max(e.max_rel for e in errors.values()) > TOLERANCE:
        # A norm over values that hardly differ, or a saturated sigmoid, magnifies what float32 rounds, up to a variance
        # below zero; where the two graphs are the same function, they agree in float64 all the same.
        errors = oracle.compare_all(in_double(masked, feeds), in_double(cut, feeds))
        assert max(e.max_rel for e in errors.values()) <= 1e-9, errors
    corrections = sum(n.op in ("Mul", "Max", "Min") for n in cut.nodes) - sum(
        n.op in ("Mul", "Max", "Min") for n in graph.nodes
    )
    assert floats(graph) - floats(cut) == found.parameters_removed(graph, keep) - corrections
    return cut


def in_double(graph: Graph, feeds: dict) -> dict[str, np.ndarray]:
    """What a graph computes when every float is a float64."""
    model = graph.to_proto()
    tensors = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for attribute in (a for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"):
        attribute.i = TensorProto.DOUBLE if attribute.i == TensorProto.FLOAT else attribute.i
    del model.graph.value_info[:]
    names = [t.name for t in graph.outputs]
    given = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in feeds.items()}
    return dict(zip(names, ReferenceEvaluator(model).run(None, given), strict=True))  # type: ignore[arg-type]


def moved(graph: Graph, cut: Graph) -> float:
    """How far the cut moved the outputs: a cut that moves nothing proves nothing."""
    feeds = oracle.random_feeds(graph.signature().inputs, seed=1, other=3)
    return max(e.max_rel for e in oracle.compare_all(oracle.run(graph, feeds), oracle.run(cut, feeds)).values())


def sizes(found: Groups) -> list[int]:
    return sorted(g.units for g in found.prunable)


def reasons(found: Groups) -> str:
    """The groups that stay whole, one per line, each with its reason."""
    return "\n".join(f"{g.name} ({g.units}): {g.reason}" for g in found.whole)


# -- one case per rule -------------------------------------------------------------------------------------------------

X = "float[2, 3, 6, 6] x"
STEM = "a = Conv<pads=[1,1,1,1]>(x, w0, b0)"
HEAD = "mean = GlobalAveragePool(z) flat = Flatten(mean) y = Gemm<transB=1>(flat, w1)"


def image(body: str, out: int, width: int = 8, opset: int = 20, **weights: np.ndarray | tuple[int, ...]) -> Graph:
    """A convolution to ``a``, a body from there to ``z`` with ``out`` channels, and a linear head."""
    ends: dict = {"w0": (width, 3, 3, 3), "b0": (width,), "w1": (5, out)}
    return build(f"{STEM} {body} {HEAD}", X, {**ends, **weights}, opset=opset)


def tokens(body: str, out: int, width: int = 8, **weights: np.ndarray | tuple[int, ...]) -> Graph:
    """The same for tokens [2, 7, width]."""
    ends: dict = {"w0": (5, width), "b0": (width,), "w1": (out, 5)}
    return build(f"m = MatMul(x, w0) a = Add(m, b0) {body} y = MatMul(z, w1)", "float[2, 7, 5] x", {**ends, **weights})


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES: dict[str, tuple[Callable[[], Graph], list[int]]] = {
    "conv": (lambda: image("z = Relu(a)", 8), [8]),
    "nonzero at zero": (lambda: image("z = Sigmoid(a)", 8), [8]),
    "batch norm": (lambda: image("z = BatchNormalization(a, s, t, m, v)", 8, s=(8,), t=(8,), m=(8,),
                                 v=np.ones(8, np.float32)), [8]),
    "two convs": (lambda: image("z = Conv(a, w)", 4, w=(4, 8, 1, 1)), [4, 8]),
    "depthwise": (lambda: image("z = Conv<group=8,pads=[1,1,1,1]>(a, w, b)", 8, w=(8, 1, 3, 3), b=(8,)), [8]),
    "depthwise times 2": (lambda: image("z = Conv<group=8>(a, w)", 16, w=(16, 1, 3, 3)), [2, 8]),
    "grouped": (lambda: image("z = Conv<group=2>(a, w, b)", 6, w=(6, 4, 1, 1), b=(6,)), [2, 3, 4]),
    "transposed": (lambda: image("z = ConvTranspose<strides=[2,2]>(a, w, b)", 4, w=(8, 4, 2, 2), b=(4,)), [4, 8]),
    "grouped transposed": (lambda: image("z = ConvTranspose<group=2>(a, w, b)", 6, w=(8, 3, 2, 2), b=(6,)), [2, 3, 4]),
    "residual": (lambda: image("r = Relu(a) c = Conv(r, w) d = Conv(c, v) z = Add(a, d)", 8, w=(6, 8, 1, 1),
                               v=(8, 6, 1, 1)), [6, 8]),
    "concat": (lambda: image("c = Conv(a, w) z = Concat<axis=1>(a, c)", 12, w=(4, 8, 1, 1)), [4, 8]),
    "split": (lambda: image("c, d = Split<axis=1>(a, s) e = Conv(c, w) z = Concat<axis=1>(e, d)", 9, s=ints(3, 5),
                            w=(4, 3, 1, 1)), [3, 4, 5]),
    "equal split": (lambda: image("c, d = Split<axis=1,num_outputs=2>(a) e = Conv(c, w) z = Concat<axis=1>(e, d)", 8,
                                  w=(4, 4, 1, 1)), [4, 4, 4]),
    "tied split": (lambda: image("c, d = Split<axis=1,num_outputs=2>(a) z = Mul(c, d)", 4), [4]),
    "slice": (lambda: image("z = Slice(a, s, e, i)", 4, s=ints(2), e=ints(6), i=ints(1)), [4, 4]),
    "slice from the end": (lambda: image("z = Slice(a, s, e, i)", 4, s=ints(-5), e=ints(-1), i=ints(1)), [4, 4]),
    "gather": (lambda: image("z = Gather<axis=1>(a, i)", 4, i=ints(6, -7, 4, 0)), [4, 4]),
    "embedding": (lambda: build("i = Cast<to=7>(x) a = Gather(t, i) r = Relu(a) y = MatMul(r, w)", "float[2, 7] x",
                                {"t": (9, 8), "w": (8, 5)}), [8]),
    "channel shuffle": (lambda: image("g = Reshape(a, s) t = Transpose<perm=[0,2,1,3,4]>(g) z = Reshape(t, u)", 8,
                                      s=ints(2, 2, 4, 6, 6), u=ints(2, 8, 6, 6)), [2, 4]),
    "pixel shuffle": (lambda: image("z = DepthToSpace<blocksize=2,mode=\"CRD\">(a)", 2), [2]),
    "pixel shuffle, depth first": (lambda: image("z = DepthToSpace<blocksize=2>(a)", 2), [2]),
    "pixel unshuffle": (lambda: image("z = SpaceToDepth<blocksize=2>(a)", 32), [8]),
    "flatten": (lambda: build(f"{STEM} q = Flatten(a) y = Gemm(q, w1)", X,
                              {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (288, 5)}), [8]),
    "squeeze-and-excitation": (lambda: image(
        "s = ReduceMean(a, i) c = Conv(s, w) r = Relu(c) d = Conv(r, v) e = Sigmoid(d) z = Mul(a, e)", 8,
        i=ints(2, 3), w=(4, 8, 1, 1), v=(8, 4, 1, 1)), [4, 8]),
    "mean over channels": (lambda: image("s = ReduceMean(a, i) z = Mul(a, s)", 8, i=ints(1)), [8]),
    "maximum over channels": (lambda: image("n = Neg(a) e = Exp(n) f = Neg(e) s = ReduceMax(f, i) z = Mul(a, s)", 8,
                                            i=ints(1)), [8]),
    "minimum over channels": (lambda: image("e = Exp(a) s = ReduceMin(e, i) z = Mul(a, s)", 8, i=ints(1)), [8]),
    "sum over channels": (lambda: image("e = Exp(a) s = ReduceSum(e, i) z = Mul(a, s)", 8, i=ints(1)), [8]),
    "norm over channels": (lambda: image("e = Exp(a) s = ReduceL2(e, i) z = Div(a, s)", 8, i=ints(1)), [8]),
    "pad": (lambda: image("z = Pad(a, p)", 10, p=ints(0, 0, 1, 1, 0, 2, 0, 0)), [8]),
    "resize to sizes": (lambda: image("z = Resize(a, , , s)", 8, s=ints(2, 8, 12, 12)), [8]),
    "resize by scales": (lambda: image("z = Resize(a, , s)", 8, s=np.array([1, 1, 2, 2], np.float32)), [8]),
    "expand": (lambda: image("s = ReduceMax(a, i) e = Expand(s, t) z = Add(a, e)", 8, i=ints(2, 3),
                             t=ints(2, 8, 6, 6)), [8]),
    "tile": (lambda: image("t = Tile(a, n) z = Relu(t)", 16, n=ints(1, 2, 1, 1)), [8]),
    "group norm": (lambda: image("z = GroupNormalization<num_groups=4>(a, s, t)", 8, opset=21, s=(8,), t=(8,)), [4]),
    "group norm by instance norm": (lambda: image(
        "r = Reshape(a, i) n = InstanceNormalization(r, s, t) z = Reshape(n, u)", 8, i=ints(2, 4, -1),
        u=ints(2, 8, 6, 6), s=(4,), t=(4,)), [4]),
    "instance norm": (lambda: image("z = InstanceNormalization(a, s, t)", 8, s=(8,), t=(8,)), [8]),
    "prelu": (lambda: image("z = PRelu(a, s)", 8, s=(8, 1, 1)), [8]),
    "shared weight": (lambda: image("c = Conv(a, w) d = Relu(c) e = Conv(d, w) z = Add(e, a)", 8, w=(8, 8, 1, 1)), [8]),
    "shared bias": (lambda: image("c = Conv(a, w, b0) z = Conv(c, v)", 4, w=(8, 8, 1, 1), v=(4, 8, 1, 1)), [4, 8, 8]),
    "einsum": (lambda: image("e = Einsum<equation=\"nchw,dc->ndhw\">(a, w) z = Relu(e)", 4, w=(4, 8)), [4, 8]),
    "linear": (lambda: tokens("f = MatMul(a, w) g = Gelu(f) h = MatMul(g, v) z = Add(a, h)", 8, w=(8, 12), v=(12, 8)),
               [8, 12]),
    "feed-forward after a norm": (lambda: tokens(
        "n = LayerNormalization(a, s, t) f = MatMul(n, w) g = Gelu(f) h = MatMul(g, v) z = Add(a, h)", 8, s=(8,),
        t=(8,), w=(8, 12), v=(12, 8)), [12]),
    "attention": (lambda: tokens(ATTENTION, 8, w=(8, 24), b=(24,), s=ints(2, 7, 3, 2, 4), zero=ints(0), one=ints(1),
                                 two=ints(2), u=ints(2, 7, 8), v=(8, 8), k=np.float32(0.5)), [2, 4, 8]),
    "attention in one shape": (lambda: tokens(SEPARATE, 8, w=(8, 6), wk=(8, 6), wv=(8, 10), v=(10, 8)), [6, 8, 10]),
}  # fmt: skip

ATTENTION = """
    f = MatMul(a, w) fb = Add(f, b) g = Reshape(fb, s) h = Transpose<perm=[2,0,3,1,4]>(g)
    q0 = Gather(h, zero) k0 = Gather(h, one) v0 = Gather(h, two)
    qs = Squeeze(q0, zero) ks = Squeeze(k0, zero) vs = Squeeze(v0, zero)
    kt = Transpose<perm=[0,1,3,2]>(ks) qk = MatMul(qs, kt) sc = Mul(qk, k) at = Softmax(sc) o = MatMul(at, vs)
    ot = Transpose<perm=[0,2,1,3]>(o) oc = Reshape(ot, u) pr = MatMul(oc, v) z = Add(a, pr)
"""
SEPARATE = """
    q = MatMul(a, w) ks = MatMul(a, wk) vs = MatMul(a, wv) qe = Exp(q) kt = Transpose<perm=[0,2,1]>(ks)
    qk = MatMul(qe, kt) at = Softmax(qk) o = MatMul(at, vs) pr = MatMul(o, v) z = Add(a, pr)
"""


@pytest.mark.parametrize("case", CASES)
def test_a_rule_ties_what_must_go_together(case: str):
    make, expected = CASES[case]
    graph = make()
    found = groups(graph)
    assert sizes(found) == expected, reasons(found)
    for group in found.prunable:  # each alone, then all together
        cut = assert_equal(graph, found, {group.name: np.arange(group.units)[: max(1, group.units // 2)]})
        assert floats(cut) < floats(graph)
    assert moved(graph, assert_equal(graph, found, thin(found, 0.5))) > 1e-3
    cut = assert_equal(graph, found, thin(found, 0.0))
    assert sizes(groups(cut)) == [] or case in ("slice", "gather")  # nothing is left to cut


WHOLE: dict[str, tuple[Callable[[], Graph], str]] = {
    "output": (lambda: build(f"{STEM} y = Relu(a)", X, {"w0": (8, 3, 3, 3), "b0": (8,)}), "reaches the output 'y'"),
    "also an output": (lambda: build(f"{STEM} z = Relu(a) {HEAD}", X, {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (5, 8)},
                                     "y z"), "reaches the output 'z', which z (Relu) computes"),
    "input": (lambda: build("a = Conv<group=3>(x, w0) z = Relu(a) " + HEAD, X, {"w0": (3, 1, 3, 3), "w1": (5, 3)}),
              "axis 1 of the input 'x'"),
    "softmax over channels": (lambda: image("z = Softmax<axis=1>(a)", 8), "z (Softmax) computes on all of it"),
    "log of a sum": (lambda: image("s = ReduceLogSumExp(a, i) z = Sub(a, s)", 8, i=ints(1)), "s (ReduceLogSumExp)"),
    "layer norm": (lambda: tokens("z = LayerNormalization(a, s, t)", 8, s=(8,), t=(8,)), "z (LayerNormalization)"),
    "one group norm": (lambda: image("z = GroupNormalization<num_groups=1>(a, s, t)", 8, opset=21, s=(8,), t=(8,)),
                       "z (GroupNormalization)"),
    "no rule": (lambda: image("z = LpNormalization<axis=1>(a)", 8), "z (LpNormalization) reads it: there is no rule"),
    "every second": (lambda: image("z = Slice(a, s, e, i, d)", 4, s=ints(0), e=ints(8), i=ints(1), d=ints(2)),
                     "z (Slice) takes every 2th of it"),
    "regrouping": (lambda: image("r = Reshape(a, s) t = Tanh(r) z = Reshape(t, u)", 12, 12, s=ints(2, 8, 54),
                                 u=ints(2, 12, 6, 6)), "r (Reshape) regroups [12, 6, 6] as [8, 54]"),
    "indices": (lambda: image("i = ArgMax<axis=1>(a) z = GatherElements<axis=1>(a, i)", 1), "(ArgMax) reads it"),
    "mirrored": (lambda: image("z = Pad<mode=\"reflect\">(a, p)", 10, p=ints(0, 1, 0, 0, 0, 1, 0, 0)),
                 "z (Pad) crops or mirrors it"),
    "its size": (lambda: image("s = Shape(a) c = Gather(s, one) f = Cast<to=1>(c) z = Div(a, f)", 8, one=ints(1)),
                 "s (Shape) reads how many there are"),
    "a body": (lambda: image("z = If<then_branch=g1()=>(float[2,8,6,6] t){t=Relu(a)},"
                             "else_branch=g2()=>(float[2,8,6,6] e){e=Neg(a)}>(c)", 8, c=np.array(True)),
               "z (If) reads it: there is no rule"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_proved_stays_whole(case: str):
    make, reason = WHOLE[case]
    graph = make()
    found = groups(graph)
    assert sizes(found) == []
    group = next(g for g in found.whole if reason in g.reason)
    with pytest.raises(InputError, match="cannot be cut"):
        found.cut(graph, {group.name: [0]})
    assert found.parameters_removed(graph, {group.name: np.arange(group.units)}) == 0


def test_a_reason_names_the_axis_that_cannot_go():
    graph = image("m = ReduceMean(a, i) n = ReduceMax(a, i) c = Concat<axis=1>(m, n) d = Conv(c, w) z = Mul(a, d)", 8,
                  i=ints(1), w=(1, 2, 1, 1))  # fmt: skip
    found = groups(graph)
    (pair,) = (g for g in found.whole if g.units == 2)
    assert pair.reason == "d (Conv) ties it to axis 1 of 'c', which c (Concat) computes: nothing of it can go"
    assert sizes(found) == [8]


def test_a_wrong_plan_is_refused():
    graph = image("z = Relu(a)", 8)
    found = groups(graph)
    (group,) = found.prunable
    for keep in ({"nothing": [0]}, {group.name: []}, {group.name: [8]}, {group.name: [-1]}):
        with pytest.raises(InputError):
            found.cut(graph, keep)
    assert floats(graph) == 8 * 27 + 8 + 40


def test_members_say_where_a_group_lies():
    found = groups(image("c = Conv<group=2>(a, w, b) d = Relu(c) z = Conv(d, v)", 4, w=(6, 4, 1, 1), b=(6,),
                         v=(4, 6, 1, 1)))  # fmt: skip
    inner = next(g for g in found.prunable if g.units == 3)
    assert [(m.tensor, m.axis, m.role) for m in inner.members] == [("w", 0, "out"), ("b", 0, "scale"), ("v", 1, "in")]
    assert inner.members[0].positions.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert [m.tensor for m in inner.producers] == ["w"] and [m.tensor for m in inner.consumers] == ["v"]
    halves = next(g for g in found.prunable if g.units == 2)
    where = {(m.tensor, m.axis): m.positions.tolist() for m in halves.members}
    assert where["w0", 0] == [[0, 1, 2, 3], [4, 5, 6, 7]] and where["w", 0] == [[0, 1, 2], [3, 4, 5]]


def test_a_dynamic_batch_is_no_obstacle():
    body = """
        s = Shape<start=0,end=1>(x) t = Concat<axis=0>(s, rest) r = Reshape(a, t) u = Transpose<perm=[0,2,1]>(r)
        f = MatMul(u, w) z = Relu(f) y = MatMul(z, v)
    """
    weights: dict = {"w0": (8, 3, 3, 3), "b0": (8,), "rest": ints(8, 36), "w": (8, 6), "v": (6, 5)}
    graph = build(STEM + body, "float[n, 3, 6, 6] x", weights)
    found = groups(graph)
    assert sizes(found) == [6, 8]
    assert_equal(graph, found, thin(found, 0.5))


def test_a_computed_shape_keeps_the_axis_it_counts_whole():
    body = """
        s = Shape<start=0,end=1>(x) n = Cast<to=7>(c) t = Concat<axis=0>(s, n, rest) r = Reshape(a, t)
        u = Transpose<perm=[0,2,1]>(r) f = MatMul(u, w) z = Relu(f) y = MatMul(z, v)
    """
    weights: dict = {"w0": (8, 3, 3, 3), "b0": (8,), "c": np.array([8.0], np.float32), "rest": ints(36), "w": (8, 6),
                     "v": (6, 5)}  # fmt: skip
    found = groups(build(STEM + body, "float[n, 3, 6, 6] x", weights))
    assert sizes(found) == [6]


def test_nodes_that_share_a_shape_follow_it_together():
    body = """
        s = Shape<start=0,end=1>(x) t = Concat<axis=0>(s, rest) r = Reshape(a, t) c = Conv(x, w) d = Reshape(c, t)
        rd = Concat<axis=1>(r, d) u = ReduceMax(rd, two) f = Flatten(u) y = Gemm(f, v)
    """
    weights: dict = {"w0": (8, 3, 3, 3), "b0": (8,), "rest": ints(8, 36), "two": ints(2), "w": (8, 3, 1, 1),
                     "v": (16, 5)}  # fmt: skip
    graph = build(STEM + body, "float[n, 3, 6, 6] x", weights)
    found = groups(graph)
    (group,) = found.prunable
    assert group.units == 8 and {m.tensor for m in group.members} == {"w0", "b0", "w", "v"}
    assert_equal(graph, found, thin(found, 0.5))


def test_a_plan_that_empties_an_axis_is_refused():
    graph = image("r = Reshape(a, s) t = Tanh(r) f = Reshape(t, u) z = Gather<axis=1>(f, i)", 2, 4,
                  s=ints(2, 2, 2, 6, 6), u=ints(2, 4, 6, 6), i=ints(0, 3))  # fmt: skip
    found = groups(graph)
    rows, columns = (g.name for g in found.prunable)
    assert_equal(graph, found, {rows: [0], columns: [0]})
    with pytest.raises(InputError, match="nothing of axis"):
        found.cut(graph, {rows: [0], columns: [1]})


# -- random graphs -----------------------------------------------------------------------------------------------------


class Random:
    """A random network: blocks on an image [1, c, h, h], each keeping the tensor it works on in ``x``."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.c, self.h, self.x = 3, 8, "x"

    def op(self, op: str, *inputs: str, outputs: int = 1, **attrs) -> str:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attrs))
        return names[0]

    def weight(self, value: np.ndarray | tuple[int, ...]) -> str:
        if isinstance(value, tuple):
            value = (self.rng.standard_normal(value) / np.sqrt(max(1, np.prod(value[1:])))).astype(np.float32)
        self.weights.append(numpy_helper.from_array(value, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def pick(self, *values: int) -> int:
        return int(self.rng.choice(values))

    def conv(self, x: str, cin: int, cout: int, k: int = 1, group: int = 1, **attrs) -> str:
        y = self.op("Conv", x, self.weight((cout, cin // group, k, k)), self.weight((cout,)), group=group,
                    pads=[k // 2] * 4, **attrs)  # fmt: skip
        if self.pick(0, 1):
            stats = [self.weight(self.rng.uniform(0.5, 1.5, cout).astype(np.float32)) for _ in range(4)]
            y = self.op("BatchNormalization", y, *stats)
        return y

    def act(self, x: str) -> str:
        return self.op(str(self.rng.choice(["Relu", "Sigmoid", "HardSwish", "Gelu", "Softplus", "Identity"])), x)

    # Blocks.

    def widen(self):
        cout = self.pick(4, 6, 8, 12)
        self.x, self.c = self.act(self.conv(self.x, self.c, cout, self.pick(1, 3))), cout

    def grouped(self):
        group = self.pick(*(g for g in (1, 2, 4, self.c) if self.c % g == 0))
        cout = group * self.pick(1, 2, 3)
        self.x, self.c = self.act(self.conv(self.x, self.c, cout, 3, group)), cout

    def depthwise(self):
        self.x = self.act(self.conv(self.x, self.c, self.c, 3, self.c))

    def residual(self):
        hidden = self.pick(4, 6, 8)
        y = self.act(self.conv(self.x, self.c, hidden, self.pick(1, 3)))
        self.x = self.op("Add", self.x, self.conv(y, hidden, self.c))

    def shared(self):
        w = self.weight((self.c, self.c, 1, 1))
        self.x = self.op("Add", self.x, self.op("Conv", self.act(self.op("Conv", self.x, w)), w))

    def branches(self):
        one, two = self.pick(2, 4), self.pick(3, 5)
        y = [self.act(self.conv(self.x, self.c, n)) for n in (one, two)]
        self.x, self.c = self.op("Concat", *y, self.x, axis=1), one + two + self.c

    def partial(self):
        if self.c < 4:
            return
        first = self.pick(2, self.c // 2)
        a = self.op("Split", self.x, self.weight(ints(first, self.c - first)), axis=1, outputs=2)
        y = self.op("Add", a, self.act(self.conv(a, first, first, 3, self.pick(1, first))))
        self.x = self.op("Concat", y, a[:-1] + "1", axis=1)

    def excite(self):
        hidden = self.pick(2, 4)
        s = self.op("ReduceMean", self.x, self.weight(ints(2, 3)))
        gate = self.op("Sigmoid", self.conv(self.act(self.conv(s, self.c, hidden)), hidden, self.c))
        self.x = self.op("Mul", self.x, gate)

    def spatial(self):
        over = str(self.rng.choice(["ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin"]))
        self.x = self.op("Add", self.x, self.op("Tanh", self.op(over, self.x, self.weight(ints(1)))))

    def shuffle(self):
        group = next((g for g in (2, 3) if self.c % g == 0), 1)
        y = self.op("Reshape", self.x, self.weight(ints(1, group, self.c // group, self.h, self.h)))
        y = self.op("Transpose", y, perm=[0, 2, 1, 3, 4])
        self.x = self.op("Reshape", y, self.weight(ints(0, self.c, self.h, -1)))

    def pixels(self):
        cout = self.pick(2, 3, 4)
        y = self.op("AveragePool", self.conv(self.x, self.c, 4 * cout), kernel_shape=[2, 2], strides=[2, 2])
        self.x, self.c = self.op("DepthToSpace", y, blocksize=2, mode=str(self.rng.choice(["CRD", "DCR"]))), cout

    def up(self):
        cout = 2 * self.pick(2, 3)
        y = self.x if self.c % 2 == 0 else self.conv(self.x, self.c, 4)
        w = self.weight((self.c if self.c % 2 == 0 else 4, cout // 2, 2, 2))
        y = self.op("ConvTranspose", y, w, self.weight((cout,)), group=2, strides=[2, 2])
        self.x, self.c = self.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), cout

    def permute(self):
        self.x = self.op("Gather", self.x, self.weight(self.rng.permutation(self.c)), axis=1)

    def crop(self):
        if self.c < 4:
            return
        start, end = self.pick(0, 1), self.c - self.pick(0, 1)
        args = [self.weight(ints(n)) for n in (start, end, 1)]
        self.x, self.c = self.op("Slice", self.x, *args), end - start

    def norm(self):
        groups_ = self.pick(*(g for g in (1, 2, 4, self.c) if self.c % g == 0))
        y = self.op("Reshape", self.x, self.weight(ints(1, groups_, -1)))
        y = self.op("InstanceNormalization", y, self.weight((groups_,)), self.weight((groups_,)))
        self.x = self.op("Add", self.op("Reshape", y, self.weight(ints(1, self.c, self.h, self.h))), self.x)

    def attention(self):
        heads, d, e, n = self.pick(1, 2, 3), self.pick(2, 4), self.pick(2, 3), self.h * self.h
        y = self.conv(self.x, self.c, heads * (2 * d + e))
        if self.pick(0, 1):  # heads outside, as in a grid of [head, (q, k, v)]
            y = self.op("Reshape", y, self.weight(ints(1, heads, 2 * d + e, n)))
            q = self.op("Split", y, self.weight(ints(d, d, e)), axis=2, outputs=3)
            k, v = q[:-1] + "1", q[:-1] + "2"
        else:
            q = self.op("Split", y, self.weight(ints(heads * d, heads * d, heads * e)), axis=1, outputs=3)
            q, k, v = (
                self.op("Reshape", q[:-1] + str(i), self.weight(ints(1, heads, m, n))) for i, m in enumerate((d, d, e))
            )
        q = self.op("Transpose", self.act(q), perm=[0, 1, 3, 2])
        a = self.op("Softmax", self.op("MatMul", q, k), axis=-1)
        o = self.op("MatMul", v, self.op("Transpose", a, perm=[0, 1, 3, 2]))
        o = self.op("Reshape", o, self.weight(ints(1, heads * e, self.h, self.h)))
        self.x = self.op("Add", self.x, self.conv(self.act(o), heads * e, self.c))

    def tokens(self):
        hidden = self.pick(4, 6)
        t = self.op("Reshape", self.x, self.weight(ints(1, self.c, -1)))
        t = self.op("Transpose", t, perm=[0, 2, 1])
        y = t
        if self.pick(0, 1):
            y = self.op("LayerNormalization", t, self.weight((self.c,)), self.weight((self.c,)))
        y = self.op(
            "MatMul", self.act(self.op("MatMul", y, self.weight((self.c, hidden)))), self.weight((hidden, self.c))
        )
        y = self.op("Transpose", self.op("Add", y, t), perm=[0, 2, 1])
        self.x = self.op("Reshape", y, self.weight(ints(1, self.c, self.h, self.h)))

    def resize(self):
        if self.pick(0, 1):
            y = self.op("Resize", self.x, "", "", self.weight(ints(1, self.c, 2 * self.h, 2 * self.h)))
        else:
            y = self.op("Resize", self.x, "", self.weight(np.array([1, 1, 2, 2], np.float32)))
        self.x = self.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])

    def finish(self) -> Graph:
        if self.pick(0, 1):
            y, n = self.op("Flatten", self.op("GlobalAveragePool", self.x)), self.c
        else:
            y, n = self.op("Flatten", self.x), self.c * self.h * self.h
        y = self.op("Gemm", y, self.weight((n, 5)))
        graph = helper.make_graph(
            self.nodes, "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 5])], self.weights,
        )  # fmt: skip
        return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


BLOCKS = sorted(n for n, f in vars(Random).items() if callable(f) and n[0] != "_"
                and n not in ("op", "weight", "pick", "conv", "act", "finish"))  # fmt: skip


def check_random(blocks: list[str], seed: int, share: float) -> None:
    made = Random(seed)
    made.widen()
    for block in blocks:
        getattr(made, block)()
    graph = made.finish()
    found = groups(graph)
    assert all(g.reason for g in found.whole)
    try:
        cut = assert_equal(graph, found, thin(found, share, seed))
    except InputError as error:  # heads and dimensions may be kept so that a crop of them holds none
        assume("nothing of axis" not in str(error))
        raise
    again = groups(cut)  # a cut graph can be cut again, in no more groups
    assert len(again.prunable) <= len(found.prunable)
    keep = {g.name: range(g.units) for g in again.prunable}
    keep |= {g.name: [0] for g in again.prunable[:1]}
    assert_equal(cut, again, keep)


RANDOM = given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=7), st.integers(0, 2**31), st.floats(0, 1))
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=40, **COMMON)
@RANDOM
def test_random_graphs(blocks: list[str], seed: int, share: float):
    check_random(blocks, seed, share)


@pytest.mark.slow
@settings(max_examples=500, **COMMON)
@RANDOM
def test_many_random_graphs(blocks: list[str], seed: int, share: float):
    check_random(blocks, seed, share)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_alone_can_be_cut(block: str):
    removed = 0
    for seed in range(4):
        made = Random(seed)
        made.widen()
        getattr(made, block)()
        graph = made.finish()
        found = groups(graph)
        keep = thin(found, 0.5)
        cut = assert_equal(graph, found, keep)
        removed += found.parameters_removed(graph, keep)
        assert moved(graph, cut) > 1e-4 or not found.prunable
    assert removed > 0


# -- torch -------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = (f(x).reshape(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(n, t, c))


class Net(nn.Module):
    """Residuals, depthwise, grouped and transposed convolutions, BatchNorm, squeeze-and-excitation, attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.dw, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.expand, self.reduce = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.attention = Attention(12, 3)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.bn(self.stem(x)))
        x = x + self.bn2(self.dw(x))
        x = x + self.reduce(nn.functional.gelu(self.expand(x)))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.tanh(self.grouped(x))
        n, c, h, w = x.shape
        x = self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


def export(module: nn.Module, x: torch.Tensor, exporter: str) -> Graph:
    """Export in eval mode; the TorchScript exporter leaves BatchNormalization in the graph."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False, input_names=["x"])
            assert program is not None
            return Graph.from_proto(program.model_proto)
        buffer = io.BytesIO()
        torch.onnx.export(module.eval(), (x,), buffer, dynamo=False, opset_version=17, input_names=["x"],
                          training=torch.onnx.TrainingMode.PRESERVE)  # type: ignore[arg-type]  # fmt: skip
    return Graph.from_proto(onnx.load_from_string(buffer.getvalue()))


def zero(module: nn.Module, found: Groups, keep: dict[str, np.ndarray]) -> None:
    """Zero what is cut, in the torch module: columns of what reads it, and the q and k that meet in a product."""
    layers = dict(module.named_modules())
    with torch.no_grad():
        for name, kept in keep.items():
            group = found[name]
            gone = np.delete(np.arange(group.units), kept)
            for member in group.members:
                path = member.tensor.removesuffix(".weight")  # where BatchNorm is folded, the node is that of the norm
                layer: nn.Module = layers.get(path, layers[member.module])
                positions = torch.as_tensor(member.positions[gone].reshape(-1))
                if member.role == "in":
                    columns = layer.weight if isinstance(layer, nn.ConvTranspose2d) else layer.weight.transpose(0, 1)
                    columns[positions] = 0
                elif member.role == "out" and any(n.endswith((".q", ".k")) for n in (path, member.module)):
                    layer.weight[positions] = layer.bias[positions] = 0


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("share", [0.75, 0.3])
def test_zeroing_the_channels_in_torch_is_the_same(exporter: str, share: float):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = randomize(Net(), 0, x)
    graph = export(module, x, exporter)
    Pipeline.parse("clean").run(graph, strict=True, verify=False)
    assert any(n.op == "BatchNormalization" for n in graph.nodes) == (exporter == "torchscript")
    found = groups(graph)
    assert sizes(found) == [2, 3, 4, 4, 4, 6, 6, 8, 24], reasons(found)
    keep = thin(found, share)
    cut = assert_equal(graph, found, keep, {"x": x.numpy()})
    with torch.no_grad():
        before = module(x)
        zero(module, found, keep)
        wanted = module(x)
    (got,) = oracle.run(cut, {"x": x.numpy()}).values()
    assert oracle.compare(wanted.numpy(), got).max_rel <= TOLERANCE
    assert oracle.compare(before.numpy(), got).max_rel > 1e-2


# -- the zoo -----------------------------------------------------------------------------------------------------------

FAMILIES = ("shvit_s1", "efficientvit_m0", "litepose_xs", "damoyolo_t")


def assert_prunes(name: str, passes: str, exporter: str = "torchscript") -> Groups:
    """A zoo model thins evenly to 0.7 of its parameters and computes what the masked original does."""
    shape = models.ZOO[name].input_shape
    if name.startswith(("litepose", "damoyolo", "deanet")):
        shape = (1, 3, 64, 64) if name == "deanet" else (1, 3, 128, 128)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    graph = export(randomize(models.create(name), 0, x), x, exporter)
    Pipeline.parse(passes).run(graph, strict=True, verify=False)
    start = time.perf_counter()
    found = groups(graph)
    seconds = time.perf_counter() - start
    total = sum(v.size for v in graph.constants().values() if v.dtype.kind == "f" and v.size > 1)

    def share(kept: float) -> float:
        return 1 - found.parameters_removed(graph, thin(found, kept)) / total

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < 0.7 else (low, middle)
    print(f"{name}: {len(found.prunable)} groups, at least {share(0):.3f} of {total} parameters stay, {seconds:.1f} s")
    print(reasons(found))
    # Layers of equal width lose a unit all at once: no share need be near 0.7, but one must be below.
    assert share(low) < 0.7 <= share(high)
    assert seconds < 20
    assert all(g.reason for g in found.whole)
    cut = assert_equal(graph, found, thin(found, low), {n.name: x.numpy() for n in graph.inputs})
    assert moved(graph, cut) > 1e-3
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_zoo_prunes(name: str):
    found = assert_prunes(name, "clean,fold_norm,reparam")
    allowed = ("of the input", "reaches the output", "InstanceNormalization", "Softmax", "a single")
    assert all(any(a in g.reason for a in allowed) for g in found.whole), reasons(found)


def test_the_zoo_prunes_with_its_norms():
    assert_prunes("efficientvit_m0", "clean")


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_all_of_the_zoo_prunes(name: str):
    assert_prunes(name, "clean,fold_norm,reparam", "dynamo")


def test_only_what_passes_a_norm_stays_whole_in_a_transformer():
    block = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True, activation="gelu")
    module = randomize(nn.Sequential(nn.Linear(5, 16), block, nn.Linear(16, 5)))
    graph = export(module, torch.randn(2, 7, 5), "dynamo")
    Pipeline.parse("clean").run(graph, strict=True, verify=False)
    found = groups(graph)
    assert sizes(found) == [4, 4, 24]  # heads, their dimensions, hidden channels
    assert {g.units for g in found.whole if "LayerNormalization" in g.reason} == {16}
    assert_equal(graph, found, thin(found, 0.5))
