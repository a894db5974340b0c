"""The pass cast: each rule with a twin where it must not fire, types proved on random graphs, numbers on the zoo."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from edgecompile import oracle, registry
from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance
from edgecompile.passes.cast import Cast, emulated
from edgecompile.pipeline import Context, Drop, PassResult, Pipeline

HALF, BRAIN = TensorProto.FLOAT16, TensorProto.BFLOAT16
FLOATS = {TensorProto.FLOAT, HALF, BRAIN, TensorProto.DOUBLE}
SAME_TYPE = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "PRelu", "Clip", "MatMul", "Gemm"}
RNG = np.random.default_rng(5)


def graph_of(text: str, opset: int = 20, **weights: np.ndarray) -> Graph:
    """A graph from ONNX's textual syntax and initializers; nodes are named after their first output."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    for node in model.graph.node:
        node.name = node.output[0]
    return Graph.from_proto(model)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def types(graph: Graph) -> dict[str, int]:
    """Element types by tensor name, as inference finds them without what the graph says of its inner tensors."""
    model = graph.to_proto()
    del model.graph.value_info[:]
    graph_proto = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {t.name: t.data_type for t in graph_proto.initializer}
    for info in [*graph_proto.input, *graph_proto.output, *graph_proto.value_info]:
        found[info.name] = info.type.tensor_type.elem_type
    return found


def assert_strictly_typed(graph: Graph) -> None:
    """Every tensor has the type that the graph declares, every node one that its schema allows, no two are mixed."""
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    found = types(graph)
    for tensor in graph.tensors().values():
        if tensor.dtype is not None:
            code = tensor.dtype if isinstance(tensor.dtype, int) else helper.np_dtype_to_tensor_dtype(tensor.dtype)
            assert found.get(tensor.name, code) == code, tensor.name
    for node in graph.nodes:
        if node.domain:
            continue
        schema = onnx.defs.get_schema(node.op, graph.opsets[""], "")
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        bound: dict[str, set[int]] = defaultdict(set)
        for tensors, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
            for index, tensor in enumerate(tensors):
                if not tensor.name or tensor.name not in found:
                    continue
                formal = formals[min(index, len(formals) - 1)]
                name = str(np.dtype(helper.tensor_dtype_to_np_dtype(found[tensor.name])))
                name = {"float32": "float", "float64": "double"}.get(name, name)
                assert f"tensor({name})" in allowed.get(formal.type_str, {formal.type_str}), (node.op, index, name)
                if formal.is_homogeneous:
                    bound[formal.type_str].add(found[tensor.name])
        assert all(len(codes) == 1 for codes in bound.values()), node.op
        if node.op in SAME_TYPE:
            assert len({found[t.name] for t in node.inputs if t.name in found} & FLOATS) <= 1, node.op


def cast(graph: Graph, feeds: list | None = None, budget: bool = True, **options) -> PassResult:
    """Cast in place and check all that must hold whatever the graph."""
    before, signature, settings = graph.copy(), graph.signature(), Cast(**options)
    feeds = feeds or oracle.probe_feeds(graph)
    context = Context(tuple(feeds))
    context.begin("cast")
    result = settings.run(graph, context)
    graph.tidy()
    graph.check(signature)
    assert_strictly_typed(graph)
    if budget:
        for feed in feeds:
            for name, error in oracle.compare_all(oracle.run(before, feed), oracle.run(emulated(graph), feed)).items():
                assert error.snr_db >= settings.min_snr, (name, error)
    again, context = graph.copy(), Context(tuple(feeds))
    context.begin("cast")
    assert settings.run(again, context).rewrites == ()
    again.tidy()
    assert again.digest() == graph.digest()
    return result


def narrow(graph: Graph, code: int = HALF) -> list[str]:
    """Names of the nodes, Casts apart, with a result of this type."""
    found = types(graph)
    return [n.name for n in graph.nodes if n.op != "Cast" and any(found.get(t.name) == code for t in n.outputs)]


def casts(graph: Graph) -> int:
    return sum(n.op == "Cast" for n in graph.nodes)


def notes(result: PassResult) -> str:
    return "\n".join(map(str, result.notes))


# A product so that what is around it is worth casting: W is [64, 64].
W = normal(64, 64) / 8


# -- the emulation -----------------------------------------------------------------------------------------------------


def test_the_emulation_rounds_between_nodes_where_the_runtime_does_not():
    graph = graph_of(
        "(float[1] x) => (float[1] y) { h = Cast <to = 10> (x) a = Add (h, one) b = Sub (a, h) y = Cast <to = 1> (b) }",
        one=np.ones(1, np.float16),
    )
    feed = {"x": np.array([2048], np.float32)}
    assert oracle.run(emulated(graph), feed)["y"] == 0  # 2049 is no float16
    assert oracle.run(graph, feed)["y"] == 1  # kernels are float32, and the Casts between them are elided


def test_the_emulation_agrees_with_the_reference_evaluator():
    """onnx.reference computes in float16 itself; single operations that are correctly rounded agree bit for bit."""
    graph = graph_of(
        "(float16[3,8] x) => (float16[3,8] y, float16[8,3] z) { a = Add (x, w) b = Mul (a, a) c = Relu (b)"
        " d = Sub (c, x) e = Div (d, w) y = Sqrt (b) z = Transpose <perm = [1, 0]> (e) }",
        w=normal(3, 8).astype(np.float16),
    )
    x = normal(3, 8).astype(np.float16)
    expected = ReferenceEvaluator(graph.to_proto()).run(None, {"x": x})
    got = oracle.run(emulated(graph), {"x": x.astype(np.float32)})
    for want, name in zip(expected, "yz", strict=True):
        np.testing.assert_array_equal(got[name], np.asarray(want).astype(np.float32))


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_a_small_network_by_hand(kind, dtype):
    weight, bias = normal(8, 5), normal(5)
    graph = graph_of("(float[3,8] x) => (float[3,5] y) { p = MatMul (x, w) a = Add (p, b) y = Sigmoid (a) }", 22)
    graph = graph_of(
        "(float[3,8] x) => (float[3,5] y) { p = MatMul (x, w) a = Add (p, b) y = Sigmoid (a) }", 22, w=weight, b=bias
    )
    cast(graph, dtype=kind, min_snr=25.0)

    def r(v: np.ndarray) -> np.ndarray:
        return v.astype(dtype).astype(np.float32)

    x = normal(3, 8)
    want = r(1 / (1 + np.exp(-r(r(r(x) @ r(weight)) + r(bias)))))
    # One rounding may fall the other way where float32 sums in another order.
    np.testing.assert_allclose(
        oracle.run(emulated(graph), {"x": x})["y"], want, rtol=2 ** (-9 if kind == "float16" else -6)
    )
    assert narrow(graph, HALF if kind == "float16" else BRAIN) == ["p", "a", "y"]


# -- what is cast, and what the caller sees ----------------------------------------------------------------------------


def test_weights_halve_and_one_cast_stands_at_each_end():
    graph = graph_of("(float[N,64] x) => (float[N,64] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, w) }", w=W)
    result = cast(graph)
    assert narrow(graph) == ["a", "b", "y"] and casts(graph) == 2
    assert graph.weight_bytes() == W.nbytes // 2  # the shared weight is converted once
    assert [r.what for r in result.rewrites] == ["MatMul to float16", "Relu to float16", "MatMul to float16"]
    assert all(provenance(n).sources for n in graph.nodes)


def test_a_weight_that_both_types_read_is_there_twice():
    graph = graph_of("(float[4,64] x) => (float[4,64] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, w) }", w=W)
    cast(graph, keep="y")
    assert narrow(graph) == ["a", "b"] and graph.weight_bytes() == W.nbytes * 3 // 2


def test_what_the_model_takes_and_returns_stays_float32():
    graph = graph_of("(float[4,64] x) => (float[4,64] y, float[4,64] z) { y = MatMul (x, w) z = Tanh (y) }", w=W)
    before = graph.signature()
    cast(graph, budget=False)
    assert graph.signature() == before and narrow(graph) == ["y"] and casts(graph) == 2
    with pytest.raises(InputError, match="pass cast has no option 'io'"):
        Pipeline.parse("cast{io=float16}")


def test_casts_that_undo_each_other_go():
    graph = graph_of(
        "(float16[4,64] x) => (float16[4,64] y) { f = Cast <to = 1> (x) a = MatMul (f, w) y = Cast <to = 10> (a) }", w=W
    )
    cast(graph)
    assert narrow(graph) == ["a"] and casts(graph) == 0


def test_a_cast_that_rounds_stays():
    graph = graph_of(
        "(float[4] x) => (float[4] y) { e = Exp (x) h = Cast <to = 10> (e) f = Cast <to = 1> (h) y = Neg (f) }"
    )
    cast(graph, keep="Exp,Neg,Cast")
    assert casts(graph) == 2


# -- range -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "kept"), [(1e5, True), (1e2, False)])
def test_a_node_whose_activation_overflows(gain, kept):
    """x W is about 1; after the gain it reaches 1e5, and comes back to about 1."""
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y) { a = MatMul (x, w) b = Mul (a, up) c = Relu (b) d = Mul (c, down)"
        " y = MatMul (d, w) }",
        w=W, up=np.float32(gain), down=np.float32(1 / gain),
    )  # fmt: skip
    result = cast(graph)
    assert {"b", "c", "d"}.isdisjoint(narrow(graph)) == kept and {"a", "y"} <= set(narrow(graph))
    assert ("a tensor reaches" in notes(result)) == kept


@pytest.mark.parametrize(("peak", "kept"), [(5e3, True), (2e3, False)])
def test_ten_times_the_inputs_must_fit_too(peak, kept):
    graph = graph_of("(float[1,64] x) => (float[1,64] y) { a = MatMul (x, w) y = Relu (a) }", w=np.eye(64, dtype="f4"))
    x = np.linspace(0, peak, 64, dtype=np.float32)[None]
    cast(graph, feeds=[{"x": x}])
    assert (narrow(graph) == []) == kept
    assert np.isfinite(oracle.run(emulated(graph), {"x": 10 * x})["y"]).all()


@pytest.mark.parametrize(("value", "kept"), [(1e5, True), (1e4, False)])
def test_a_weight_above_the_largest_number(value, kept):
    weight = W.copy()
    weight[0, 0] = value
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y) { s = Mul (x, tiny) p = MatMul (s, w) y = Relu (p) }",
        w=weight, tiny=np.full(64, 1e-3, np.float32),
    )  # fmt: skip
    assert ("w reaches 1.0e+05" in notes(cast(graph, keep="s"))) == kept
    assert ("p" not in narrow(graph)) == kept


@pytest.mark.parametrize(("value", "vanishes"), [(1e-8, True), (1e-3, False)])
def test_a_weight_that_vanishes_is_noted(value, vanishes):
    scale = np.ones(64, np.float32)
    scale[3] = value
    graph = graph_of("(float[4,64] x) => (float[4,64] y) { a = MatMul (x, w) y = Mul (a, s) }", w=W, s=scale)
    assert ("1 of 64 slices of s vanish in float16" in notes(cast(graph))) == vanishes


@pytest.mark.parametrize(("epsilon", "kept"), [(1e-8, True), (1e-2, False)])
def test_a_constant_that_is_lost_altogether(epsilon, kept):
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y) { a = MatMul (x, w) s = Mul (a, a) e = Add (s, eps) y = Sqrt (e) }",
        w=W, eps=np.float32(epsilon),
    )  # fmt: skip
    result = cast(graph)
    assert ("e" not in narrow(graph)) == kept and ("vanish" in notes(result)) == kept


@pytest.mark.parametrize(("scale", "kept"), [(1e-7, True), (1e-2, False)])
def test_activations_that_are_subnormal(scale, kept):
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y) { a = MatMul (x, w) b = Mul (a, down) c = Relu (b) d = Mul (c, up)"
        " y = MatMul (d, w) }",
        w=W, up=np.float32(1e-3 / scale), down=np.float32(scale),
    )  # fmt: skip
    cast(graph)
    assert ({"b", "c"}.isdisjoint(narrow(graph))) == kept


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "kept"),
    [
        ("r = ReduceMean <keepdims = 1> (a, last)", True),
        ("r = ReduceMean <keepdims = 1> (a, first)", False),
        ("r = ReduceSum <keepdims = 1> (a, last)", True),
        ("r = Softmax <axis = -1> (a)", True),
        ("r = Softmax <axis = 0> (a)", False),
        ("r = LayerNormalization <axis = -1> (a, one)", False),  # the specification takes its sums in float32
        ("r = ReduceMax <keepdims = 1> (a, last)", False),  # no sum
    ],
)
def test_long_sums(node, kept):
    graph = graph_of(
        f"(float[4,64] x) => (float[4,4096] y) {{ a = MatMul (x, w) {node} y = Mul (a, r) }}",
        w=normal(64, 4096) / 8, one=np.ones(4096, np.float32), last=np.array([1]), first=np.array([0]),
    )  # fmt: skip
    result = cast(graph, min_snr=45.0)
    assert ("r" not in narrow(graph)) == kept and ("a sum of 4096 terms" in notes(result)) == kept
    assert "a" in narrow(graph)


def test_sums_of_squares_that_overflow():
    for size, kept in ((1.0, False), (100.0, True)):
        graph = graph_of(
            "(float[1,4,4,4] x) => (float[1,4,4,4] y) { c = Conv (x, k) n = InstanceNormalization (c, one, zero)"
            " y = Conv (n, k) }",
            k=normal(4, 4, 1, 1) * 0.3, one=np.ones(4, np.float32), zero=np.zeros(4, np.float32),
        )  # fmt: skip
        result = cast(graph, feeds=[{"x": np.clip(normal(1, 4, 4, 4), -1, 1) * size}], min_snr=40.0)
        assert ("its sum of 16 terms may reach" in notes(result)) == kept


# -- error -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "reverted"), [(500.0, True), (0.25, False)])
def test_nodes_that_lose_the_budget_go_back(offset, reverted):
    """(a + c) - c keeps few bits of a where c is large; no operator's name tells."""
    graph = graph_of(
        "(float[64,64] x) => (float[64,64] y) { p = MatMul (x, w) a = Add (p, c) b = Sub (a, c) y = MatMul (b, w) }",
        w=W, c=np.full(64, offset, np.float32),
    )  # fmt: skip
    result = cast(graph)
    assert ("a" not in narrow(graph)) == reverted and "y" in narrow(graph)
    assert ("alone in float16 it leaves" in notes(result)) == reverted


def test_a_budget_that_nothing_holds_leaves_the_graph_alone():
    graph = graph_of("(float[64,64] x) => (float[64,64] y) { y = MatMul (x, w) }", w=W)
    before = graph.digest()
    assert cast(graph, min_snr=120.0).rewrites == () and graph.digest() == before


def test_the_user_keeps_nodes():
    text = "(float[64,64] x) => (float[64,64] y) { a = MatMul (x, w) b = Tanh (a) y = MatMul (b, w) }"
    graph = graph_of(text, w=W)
    result = cast(graph, keep="Tanh,nothing", min_snr=30.0)
    assert narrow(graph) == ["a", "y"] and "keep=nothing: no operator, node or module" in notes(result)
    graph = graph_of(text, w=W)
    cast(graph, keep="a", min_snr=30.0)
    assert narrow(graph) == ["b", "y"]


# -- islands -----------------------------------------------------------------------------------------------------------


def test_an_island_without_a_product_is_not_worth_its_casts():
    graph = graph_of("(float[64,64] x) => (float[64,64] y) { a = Relu (x) y = Neg (a) }")
    result = cast(graph)
    assert narrow(graph) == [] and casts(graph) == 0 and "Casts would cost more" in notes(result)


def test_the_shore_of_an_island_is_where_the_tensor_is_small():
    """Tile makes the tensor 64 times as large: the Cast stands before it, whatever type could follow."""
    graph = graph_of(
        "(float[1,64] x) => (float[64,64] y) { a = MatMul (x, w) t = Tile (a, n) y = Exp (t) }",
        w=W, n=np.array([64, 1]),
    )  # fmt: skip
    cast(graph, keep="y")
    assert narrow(graph) == ["a"]
    graph = graph_of(
        "(float[1,64] x) => (float[64,64] y) { a = MatMul (x, w) t = Tile (a, n) y = MatMul (t, w) }",
        w=W, n=np.array([64, 1]),
    )  # fmt: skip
    cast(graph)
    assert narrow(graph) == ["a", "t", "y"]


# -- what the specification fixes --------------------------------------------------------------------------------------


def test_control_inputs_keep_their_types():
    graph = graph_of(
        "(float[1,4,8,8] x) => (float[1,4,16,16] y, int64[3] i) { c = Conv (x, k)"
        " r = Resize <mode = \"linear\"> (c, , scales) p = Pow (r, two) q = Clip (p, low, high) y = Conv (q, k)"
        " f = Reshape (q, flat) v, i = TopK (f, three) }",
        k=normal(4, 4, 1, 1), scales=np.array([1, 1, 2, 2], np.float32), two=np.array(2, np.float32),
        low=np.array(0, np.float32), high=np.array(9, np.float32), flat=np.array([-1]), three=np.array([3]),
    )  # fmt: skip
    feeds = [{"x": np.linspace(0.1, 3, 256, dtype=np.float32).reshape(1, 4, 8, 8)}]
    cast(graph, feeds=feeds, budget=False, min_snr=-500.0)
    assert {"c", "r", "p", "q", "y"} <= set(narrow(graph))
    found = types(graph)
    resize, power, clip = (next(n for n in graph.nodes if n.op == op) for op in ("Resize", "Pow", "Clip"))
    assert found[resize.inputs[2].name] == TensorProto.FLOAT
    assert {found[t.name] for t in (*power.inputs, *clip.inputs)} == {HALF}


@pytest.mark.parametrize(("opset", "cast_too"), [(20, False), (22, True)])
def test_the_opset_says_which_operators_take_bfloat16(opset, cast_too):
    graph = graph_of("(float[1,4,8,8] x) => (float[1,4,8,8] y) { y = Conv (x, k) }", opset, k=normal(4, 4, 3, 3) / 6)
    graph.nodes[0].attrs["pads"] = [1, 1, 1, 1]
    result = cast(graph, dtype="bfloat16", min_snr=30.0)
    assert (narrow(graph, BRAIN) == ["y"]) == cast_too
    assert ("Conv takes bfloat16 from opset 22 on" in notes(result)) != cast_too


def test_range_has_no_float16_and_other_domains_are_not_known():
    graph = graph_of(
        "(float[4,64] x, float n) => (float[4,64] y, float[K] s) { y = MatMul (x, w) s = Range (zero, n, one) }",
        w=W, zero=np.float32(0), one=np.float32(1),
    )  # fmt: skip
    cast(graph, feeds=[{"x": normal(4, 64), "n": np.float32(3)}])
    assert narrow(graph) == ["y"]


def test_quantized_nodes_are_left():
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y) { q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)"
        " y = MatMul (d, w) }",
        w=W, s=np.float32(0.02), z=np.int8(0),
    )  # fmt: skip
    cast(graph)
    assert narrow(graph) == ["y"]


@pytest.mark.parametrize("branch", [True, False])
def test_what_a_subgraph_reads_from_outside_stays_float32(branch):
    graph = graph_of(
        "(float[4,64] x, bool c) => (float[4,64] y) { a = MatMul (x, w) i = If (c) <then_branch ="
        " t () => (float[4,64] u) { e = Tanh (a) u = Neg (e) }, else_branch = f () => (float[4,64] v) { v = Relu (a) }>"
        " y = MatMul (i, w) }",
        w=W,
    )
    result = cast(graph, feeds=[{"x": normal(4, 64), "c": np.array(branch)}], min_snr=30.0)
    assert narrow(graph) == ["a", "y"]
    assert "its subgraphs stay in float32" in notes(result)


def test_a_body_that_returns_an_outer_tensor():
    graph = graph_of(
        "(float[4,64] x, bool c) => (float[4,64] y) { a = MatMul (x, w) i = If (c) <then_branch ="
        " t () => (float[4,64] a2) { a2 = Identity (a) }, else_branch = f () => (float[4,64] v) { v = Relu (x) }>"
        " y = MatMul (i, w) }",
        w=W,
    )
    cast(graph, feeds=[{"x": normal(4, 64), "c": np.array(True)}])
    assert narrow(graph) == ["a", "y"]


def test_what_reads_either_type_needs_no_cast():
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y, int64[4,1] i, int64[2] s) { y = MatMul (x, w) i = ArgMax <axis = 1> (y)"
        " s = Shape (y) }",
        w=W,
    )  # fmt: skip
    cast(graph, budget=False)
    assert narrow(graph) == ["y"] and casts(graph) == 2


def test_an_empty_tensor_does_no_harm():
    graph = graph_of(
        "(float[4,64] x) => (float[4,64] y, float[0,64] z) { y = MatMul (x, w) z = Slice (y, zero, zero) }",
        w=W, zero=np.array([0]),
    )  # fmt: skip
    cast(graph)
    assert "y" in narrow(graph)


# -- in the pipeline ---------------------------------------------------------------------------------------------------


def test_the_pipeline_takes_it_and_rejects_what_misses_the_budget():
    text = "(float[N,64] x) => (float[N,64] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, w) }"
    graph = graph_of(text, w=W)
    trace = Pipeline((Cast(),)).run(graph)
    assert not trace.failures and len(trace.rewrites) == 3
    assert trace.steps[0].after.bytes * 2 == trace.steps[0].before.bytes
    errors = {"y": oracle.OutputError(1e-2, 1e-2, 1.0, 45.0)}
    assert "45.0 dB, not 50 dB" in Cast().reject(errors, {}) and Cast(min_snr=40.0).reject(errors, {}) == ""
    assert Cast().reject({"y": oracle.OutputError(np.inf, np.inf, 0.0, -np.inf)}, {})


def test_the_inputs_of_the_calibration_data_count():
    class Calibration:
        def feeds(self):
            yield {"x": np.full((1, 64), 9e3, np.float32)}

    graph = graph_of("(float[1,64] x) => (float[1,64] y) { y = MatMul (x, w) }", w=np.eye(64, dtype=np.float32))
    context = Context(({"x": normal(1, 64)},))
    context.calibration = Calibration()  # type: ignore[attr-defined]
    context.begin("cast")
    assert Cast().run(graph, context).rewrites == ()


def test_every_prefix_of_the_rewrites_is_valid():
    graph = random_graph(3)
    feeds = [{"x": normal(2, 6, 8)}]
    total = len(cast(graph.copy(), feeds, budget=False, min_snr=-500.0).rewrites)
    assert total > 5
    for limit in range(total):
        partial, context = graph.copy(), Context(tuple(feeds), limit)
        context.begin("cast")
        Cast(min_snr=-500.0).run(partial, context)
        partial.tidy()
        partial.check(graph.signature())
        assert_strictly_typed(partial)
        oracle.run(partial, feeds[0])


def test_options(monkeypatch):
    monkeypatch.setitem(registry.PASSES, "cast", "edgecompile.passes.cast:Cast")
    spec = 'cast{dtype=bfloat16,min_snr=30.0,keep="Exp,Pow"}'
    parsed = Pipeline.parse(spec)
    assert parsed.passes == (Cast("bfloat16", 30.0, "Exp,Pow"),) and str(parsed) == spec
    for wrong in ({"dtype": "int8"}, {"min_snr": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Cast(**wrong)


# -- random graphs -----------------------------------------------------------------------------------------------------


def random_graph(seed: int) -> Graph:
    """A graph on ``x`` of shape [2, 6, 8] with products, sums, control inputs, large and tiny constants."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}

    def node(op: str, *inputs: str, results: int = 1, **attrs) -> str:
        names = [f"t{len(nodes)}" + (f"_{i}" if i else "") for i in range(results)]
        nodes.append(helper.make_node(op, list(inputs), names, f"n{len(nodes)}", **attrs))
        return names[0]

    def const(values: np.ndarray | list | float) -> str:
        array = np.asarray(values, None if isinstance(values, np.ndarray) else np.float32)
        if rng.random() < 0.3:
            return node("Constant", value=numpy_helper.from_array(array))
        weights[f"w{len(weights)}"] = array
        return f"w{len(weights) - 1}"

    def ints(*values: int) -> str:
        return const(np.array(values, np.int64))

    def some(*shape: int) -> str:
        return const((rng.standard_normal(shape) * 10 ** rng.uniform(-1, 1)).astype(np.float32))

    live = ["x"]
    shared = some(8)
    for _ in range(int(rng.integers(8, 20))):
        name, other = str(rng.choice(live[-4:])), str(rng.choice(live))
        kind = rng.integers(0, 20)
        if kind <= 1:
            name = node("MatMul", name, const((rng.standard_normal((8, 8)) / 3).astype(np.float32)))
        elif kind <= 3:
            name = node(str(rng.choice(["Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Erf", "Identity"])), name)
        elif kind <= 5:
            name = node(str(rng.choice(["Add", "Sub", "Mul", "Max"])), name, other)
        elif kind == 6:
            name = node(str(rng.choice(["Add", "Mul"])), name, shared if rng.random() < 0.5 else some(6, 1))
        elif kind == 7:
            name = node("Mul", node("Relu", node("Mul", name, const(10.0 ** rng.integers(3, 7)))), const(1e-5))
        elif kind == 8:
            name = node("LayerNormalization", name, some(8), axis=-1)
        elif kind == 9:
            name = node("Softmax", name, axis=int(rng.integers(1, 3)))
        elif kind == 10:
            name = node("Sub", name, node("ReduceMean", name, ints(2), keepdims=1))
        elif kind == 11:
            name = node("Clip", name, const(-2.0), const(float(rng.integers(1, 9))))
        elif kind == 12:
            name = node("Where", node("Greater", name, const(0.0)), other, const(float(rng.integers(0, 3))))
        elif kind == 13:
            name = node("Pow", node("Abs", name), const(1.5))
        elif kind == 14:
            name = node("Reshape", node("Transpose", name, perm=[0, 2, 1]), node("Shape", other))
        elif kind == 15:
            count = node("Cast", node("Gather", node("Shape", name), ints(1)), to=TensorProto.FLOAT)
            name = node("Div", name, count)
        elif kind == 16:
            name = node(
                "Cast", node("Cast", node("Mul", name, const(16.0)), to=TensorProto.INT32), to=TensorProto.FLOAT
            )
        elif kind == 17:
            left = node("Split", name, results=2, axis=1, num_outputs=2)
            name = node("Concat", f"{left}_1", left, axis=1)
        elif kind == 18:
            name = node(
                "Div", name, node("Sqrt", node("Add", node("Mul", name, name), const(10.0 ** rng.integers(-9, 1))))
            )
        else:
            values = node("TopK", name, ints(8), results=2, axis=2)
            live.append(node("Add", values, node("CumSum", name, const(np.array(1)))))
            continue
        live.append(name)
    outputs = {live[-1], str(rng.choice(live[1:] or live))} - {"x"}
    model = helper.make_model(
        helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 8])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 6, 8]) for n in sorted(outputs)],
            [numpy_helper.from_array(v, n) for n, v in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 22)], ir_version=10,
    )  # fmt: skip
    return Graph.from_proto(model)


def check_random(seed: int) -> int:
    kind = "bfloat16" if seed % 3 == 2 else "float16"
    graph, rng = random_graph(seed), np.random.default_rng(seed)
    feeds = [{"x": rng.standard_normal((2, 6, 8)).astype(np.float32)} for _ in range(2)]
    before = graph.copy()
    result = cast(graph, feeds, dtype=kind, min_snr=50.0 if kind == "float16" else 30.0)
    code = HALF if kind == "float16" else BRAIN
    assert len(narrow(graph, code)) >= len(result.rewrites) - sum(r.what.startswith("Cast ") for r in result.rewrites)
    for feed in feeds:  # nothing overflows that did not before
        feed = {"x": 10 * feed["x"]}
        for name, want in oracle.run(before, feed).items():
            assert np.isfinite(oracle.run(emulated(graph), feed)[name][np.isfinite(want)]).all()
    if kind == "float16":
        oracle.run(graph, feeds[0])
    # With Casts at no cost and no budget nearly every node is narrow that has no reason not to be; types are strict.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgecompile.passes.cast._islands", lambda *_: set())
        kept = notes(cast(before, feeds, budget=False, dtype=kind, min_snr=-500.0)).count("kept in float32")
        assert len(narrow(before, code)) > (len(before.nodes) - kept) / 5
        if kind == "float16":
            oracle.run(before, feeds[0])
    return len(result.rewrites)


@pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_graphs(block):
    rewrites = [check_random(seed) for seed in range(block * 15, block * 15 + 15)]
    assert sum(map(bool, rewrites)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_graphs(block):
    for seed in range(1000 + block * 30, 1030 + block * 30):
        check_random(seed)


# -- the zoo -----------------------------------------------------------------------------------------------------------

DEFAULT = ("shvit_cifar",)
REST = ("shvit_s1", "repavit_tiny", "efficientvit_m0", "litepose_xs", "damoyolo_ns", "deanet", "repaswin_tiny")


@pytest.mark.parametrize("name", [*DEFAULT, *(pytest.param(n, marks=pytest.mark.slow) for n in REST)])
def test_zoo(name: str, tmp_path: Path):
    pytest.importorskip("torch")
    from edgecompile import frontend

    source = frontend.load(name, folder=tmp_path)
    graph = source.graph
    Pipeline.parse("clean,fold_norm,reparam").run(graph, source.feeds, verify=False)
    before, feeds = graph.copy(), list(source.feeds)
    context = Context(tuple(feeds))
    context.begin("cast")
    Cast().run(graph, context)
    graph.tidy()
    graph.check(before.signature())
    assert_strictly_typed(graph)
    assert graph.weight_bytes() < 0.6 * before.weight_bytes()
    for feed in feeds:
        for error in oracle.compare_all(oracle.run(before, feed), oracle.run(emulated(graph), feed)).values():
            assert error.snr_db >= 50
        large = {n: 10 * v for n, v in feed.items()}
        assert all(np.isfinite(v).all() for v in oracle.run(emulated(graph), large).values())


def test_the_score_tightens_the_error_that_is_allowed():
    graph = graph_of(
        "(float[1,64] x) => (float[1,64] y) { a = MatMul (x, W) b = Tanh (a) y = MatMul (b, V) }", W=W, V=normal(64, 64)
    )
    feeds, scored = oracle.probe_feeds(graph), []
    reference = [oracle.run(graph, f)["y"] for f in feeds]

    def score(trial: Graph, simulate: bool) -> float:
        assert simulate, "float16 in the runtime's own kernels would flatter it"
        found = [oracle.run(trial, f)["y"] for f in feeds]
        scored.append(-max(float(np.abs(a - b).max()) for a, b in zip(found, reference, strict=True)))
        return scored[-1]

    def kept(max_drop: str) -> int:
        trial, context = graph.copy(), Context(tuple(feeds), evaluate=score)
        context.begin("cast")
        result = Cast(max_drop=Drop(max_drop)).run(trial, context)
        assert ("the score fell too much" in notes(result)) == (len(result.rewrites) < 3)
        return len(result.rewrites)

    assert kept("inf") == 3 and not scored
    assert kept("1.0") == 3 and scored[0] == 0 > scored[1]
    assert kept(f"{-scored[1] / 2}") < 3
    assert kept("0") == 0
    context = Context(tuple(feeds))
    context.begin("cast")
    with pytest.raises(InputError, match="needs a score"):
        Cast(max_drop=Drop("1%")).run(graph, context)
