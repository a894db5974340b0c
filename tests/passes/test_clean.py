"""The pass clean: every rule with a twin where it must not fire, bombs, both exporters, the corpus of onnx.backend.test."""

from __future__ import annotations

import io
import time
import tracemalloc
import warnings
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance
from edgecompile.passes.clean import Clean
from edgecompile.pipeline import Context, PassResult, Pipeline

RANDOM = {"Bernoulli", "RandomUniformLike", "RandomNormalLike", "RandomNormal", "RandomUniform", "Multinomial"}


def graph_of(text: str, opset: int = 17, **weights: np.ndarray) -> Graph:
    """A graph in ONNX's textual syntax, ``(float[N,4] x) => (float[N,4] y) { y = Relu(x) }``, and large initializers."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return Graph.from_proto(model)


def run(graph: Graph, limit: int | None = None, **options) -> PassResult:
    context = Context(limit=limit)
    context.begin("clean")
    return Clean(**options).run(graph, context)


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def whats(result: PassResult) -> list[str]:
    return [r.what for r in result.rewrites]


def assert_same(before: dict[str, np.ndarray], after: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert list(before) == list(after)
    for name, want in before.items():
        got = after[name]
        assert got.dtype == want.dtype and got.shape == want.shape, name
        if want.dtype.kind in "OUS":
            assert (got == want).all(), name
        else:
            wide = np.float64 if want.dtype.kind in "fV" else want.dtype
            np.testing.assert_allclose(got.astype(wide), want.astype(wide), rtol=tolerance, atol=tolerance, err_msg=name)


def clean(graph: Graph, feeds: list | None = None, tolerance: float = 1e-6, **options) -> PassResult:
    """Clean in place and check all that must hold whatever the graph: signature, validity, numbers, fixed point."""
    before, signature = graph.copy(), graph.signature()
    result = run(graph, **options)
    graph.check(signature)
    for feed in feeds or oracle.probe_feeds(before):
        assert_same(oracle.run(before, feed), oracle.run(graph, feed), tolerance)
    again = graph.copy()
    assert whats(run(again, **options)) == []
    assert again.digest() == graph.digest()
    return result


def constant_output(graph: Graph, name: str) -> np.ndarray:
    """The value of an output that has become constant."""
    (tensor,) = [t for t in graph.outputs if t.name == name]
    value = graph.constant(tensor)
    assert value is not None
    return value


# -- identities ---------------------------------------------------------------------------------------------------------

# What is between Relu and Neg, the opset, and whether it goes.
IDENTITIES = [
    ("z = Identity (r)", 17, True),
    ("z = Add (r, zero)", 17, True),
    ("z = Add (zero, r)", 17, True),
    ("z = Add (r, zeros)", 17, True),
    ("z = Add (r, one)", 17, False),
    ("z = Add (r, almost)", 17, False),  # 0, 0, 0, 1
    ("z = Add (r, tall)", 17, False),  # [1,1,4]: the rank grows
    ("z = Sub (r, zero)", 17, True),
    ("z = Sub (zero, r)", 17, False),
    ("z = Mul (r, one)", 17, True),
    ("z = Mul (one, r)", 17, True),
    ("z = Mul (r, zero)", 17, False),
    ("z = Div (r, one)", 17, True),
    ("z = Div (one, r)", 17, False),
    ("z = Pow (r, one)", 17, True),
    ("z = Pow (one, r)", 17, False),
    ("z = Pow (r, zero)", 17, False),
    ("z = Cast <to = 1> (r)", 17, True),
    ("c = Cast <to = 11> (r)  z = Cast <to = 1> (c)", 17, False),
    ("z = CastLike (r, one)", 17, True),
    ("z = Dropout (r)", 17, True),
    ("z, mask = Dropout <ratio = 0.9> (r)", 10, True),
    ("z = Dropout (r, half, no)", 17, True),
    ("z = Dropout <is_test = 1> (r)", 6, True),
    ("z = Reshape (r, same)", 17, True),
    ("z = Reshape (r, rest)", 17, True),  # [-1, 4]
    ("z = Reshape (r, copied)", 17, True),  # [0, 4]
    ("f = Reshape (r, flat)  z = Relu (f)", 17, False),
    ("z = Flatten <axis = 1> (r)", 17, True),
    ("z = Squeeze (r)", 17, True),
    ("z = Expand (r, ones)", 17, True),
    ("z = Expand (r, same)", 17, True),
    ("e = Expand (r, taller)  z = ReduceMax <keepdims = 0, axes = [0]> (e)", 17, False),
    ("z = Tile (r, ones)", 17, True),
    ("t = Tile (r, twice)  z = Slice <starts = [0], ends = [3], axes = [0]> (t)", 9, False),
    ("z = Slice (r, start, far, axis)", 17, True),
    ("z = Slice (r, start, four, axis)", 17, True),
    ("z = Slice (r, start, far, axis, step)", 17, True),
    ("z = Slice <starts = [0], ends = [99], axes = [1]> (r)", 9, True),
    ("z = Slice (r, last, before, axis, back)", 17, False),  # the same shape, reversed
    ("z = Pad (r, nopads)", 17, True),
    ("z = Pad <pads = [0,0,0,0]> (r)", 9, True),
    ("p = Pad (r, pads)  z = Slice (p, start, four, axis)", 17, False),
    ("z = Transpose <perm = [0, 1]> (r)", 17, True),
    ("t = Transpose (r)  u = Exp (t)  z = Transpose (u)", 17, False),
    ("z = Concat <axis = 0> (r)", 17, True),
    ("c = Concat <axis = 0> (r, r)  z = Slice (c, start, three, rows)", 17, False),
    ("z = Split <axis = 1> (r)", 17, True),
    ("z = Sum (r)", 17, True),
    ("z = Sum (r, r)", 17, False),
    ("z = Max (r)", 17, True),
    ("z = Mean (r)", 17, True),
    ("z = Where (yes, r, one)", 17, True),
    ("z = Where (no, one, r)", 17, True),
    ("z = Where (mixed, r, one)", 17, False),
    ("z = Clip (r)", 17, False),  # not a rule
    ("z = Relu (r)", 17, False),
    ("t = Transpose (r)  z = Transpose (t)", 17, True),
    ("t = Transpose <perm = [1, 0]> (r)  z = Transpose <perm = [1, 0]> (t)", 17, True),
    ("u = Reshape (r, flat)  z = Reshape (u, same)", 17, True),
    ("u = Unsqueeze (r, axis)  z = Reshape (u, same)", 17, True),
    ("u = Unsqueeze <axes = [0]> (r)  z = Reshape (u, same)", 11, True),
]
CONSTANTS = """<float zero = {0}, float one = {1}, float half = {0.5}, float[4] zeros = {0,0,0,0}, float[4] almost = {0,0,0,1},
    float[1,1,4] tall = {0,0,0,0}, bool no = {0}, bool[1] yes = {1}, bool[4] mixed = {1,0,1,1},
    int64[2] same = {3,4}, int64[2] rest = {-1,4}, int64[2] copied = {0,4}, int64[1] flat = {12}, int64[2] ones = {1,1},
    int64[3] taller = {2,1,1}, int64[2] twice = {2,1}, int64[1] start = {0}, int64[1] far = {9223372036854775807},
    int64[1] three = {3}, int64[1] four = {4}, int64[1] axis = {1}, int64[1] rows = {0}, int64[1] step = {1},
    int64[1] last = {-1}, int64[1] before = {-9}, int64[1] back = {-1}, int64[4] nopads = {0,0,0,0}, int64[4] pads = {0,1,0,2}>"""


@pytest.mark.parametrize(("text", "opset", "goes"), IDENTITIES, ids=[t for t, _, _ in IDENTITIES])
def test_identities(text, opset, goes):
    rank = "float[1,3,4]" if "tall)" in text else "float[3,4]"
    graph = graph_of(f"(float[3,4] x) => ({rank} y) {CONSTANTS} {{ r = Relu (x) {text} y = Neg (z) }}", opset)
    kept = ops(graph)
    clean(graph)
    if goes:
        assert ops(graph) == ["Relu", "Neg"]
    else:
        assert ops(graph) == kept


@pytest.mark.parametrize(
    ("text", "goes"),
    [
        ("z = Reshape (r, rest)", True),
        ("z = Reshape (r, copied)", True),
        ("z = Reshape (r, same)", False),  # the batch is not known to be 3
        ("z = Expand (r, ones)", True),
        ("z = Expand (r, same)", False),
        ("z = Slice (r, start, far, rows)", True),
        ("z = Slice (r, start, three, rows)", False),  # a larger batch would be cut
        ("z = Add (r, zeros)", True),
        ("z = Add (r, column)", False),  # [3,1]: a batch of 1 would grow
        ("s = Shape (r)  z = Reshape (r, s)", False),
    ],
)
def test_identities_with_an_unknown_batch(text, goes):
    constants = CONSTANTS.replace("<", "<float[3,1] column = {0,0,0}, ", 1)
    graph = graph_of(f"(float[N,4] x) => (float[M,4] y) {constants} {{ r = Relu (x) {text} y = Neg (z) }}")
    kept = ops(graph)
    clean(graph, feeds=[{"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}])
    assert ops(graph) == (["Relu", "Neg"] if goes else kept)


def test_dropout_that_trains_or_whose_mask_is_read_stays():
    training = "(float[4] x) => (float[4] y) <float half = {0.5}, bool yes = {1}> { r = Relu (x) d = Dropout (r, half, yes) y = Neg (d) }"
    graph = graph_of(training)
    run(graph)
    assert "Dropout" in ops(graph)
    graph = graph_of("(float[4] x) => (float[4] y, bool[4] m) { r = Relu (x) d, m = Dropout (r) y = Neg (d) }")
    clean(graph)
    assert "Dropout" in ops(graph)


def test_nan_and_infinity_pass_through_identities():
    graph = graph_of("(float[4] x) => (float[4] y) <float one = {1}, float zero = {0}> { a = Mul (x, one) b = Sub (a, zero) y = Neg (b) }")
    x = np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32)
    clean(graph, feeds=[{"x": x}])
    assert ops(graph) == ["Neg"]
    assert oracle.run(graph, {"x": x})["y"].tobytes() == (-x).tobytes()


def test_integers_have_the_same_identities():
    graph = graph_of("(int32[4] x) => (int32[4] y) <int32 one = {1}, int32 zero = {0}> { a = Div (x, one) b = Add (zero, a) y = Abs (b) }")
    clean(graph)
    assert ops(graph) == ["Abs"]


def test_compositions_of_transposes():
    graph = graph_of(
        "(float[2,3,4] x) => (float[4,2,3] y) { a = Transpose <perm = [1,2,0]> (x) b = Transpose <perm = [2,0,1]> (a)"
        " c = Transpose <perm = [2,0,1]> (b) y = Relu (c) }"
    )
    clean(graph)
    assert [(n.op, n.attrs.get("perm")) for n in graph.nodes] == [("Transpose", [2, 0, 1]), ("Relu", None)]


def test_transposes_of_unknown_rank_are_left():
    graph = graph_of("(float[2,3] x, int64[K] s) => (float[6] y) <int64[1] m = {-1}> { a = Reshape (x, s) b = Transpose (a) c = Transpose (b) y = Reshape (c, m) }")
    clean(graph, feeds=[{"x": np.ones((2, 3), np.float32), "s": np.array([3, 1, 2])}])
    assert ops(graph).count("Transpose") == 2


def test_composed_reshape_keeps_a_shared_inner_one():
    graph = graph_of(
        "(float[2,6] x) => (float[3,4] y, float[12] z) <int64[1] flat = {12}, int64[2] s = {3,4}>"
        " { r = Relu (x) a = Reshape (r, flat) b = Reshape (a, s) y = Exp (b) z = Neg (a) }"
    )
    clean(graph)
    assert [n.inputs[0].name for n in graph.nodes if n.op == "Reshape"] == ["r", "r"]


def test_reshape_that_copies_a_dimension_is_not_composed():
    graph = graph_of(
        "(float[2,6] x) => (float[3,2,2] y) <int64[2] a = {3,4}, int64[3] b = {0,2,2}>"
        " { r = Relu (x) s = Reshape (r, a) t = Reshape (s, b) y = Neg (t) }"
    )
    clean(graph)
    assert ops(graph) == ["Relu", "Reshape", "Reshape", "Neg"]


# -- what the caller sees -------------------------------------------------------------------------------------------------


def test_the_name_of_an_output_moves_to_its_producer():
    graph = graph_of("(float[N,4] x) => (float[N,4] y) { r = Relu (x) y = Identity (r) }")
    clean(graph)
    assert ops(graph) == ["Relu"] and graph.nodes[0].outputs[0].name == "y"


def test_outputs_that_must_stay_identities():
    graph = graph_of(
        "(float[4] x) => (float[4] a, float[4] b, float[4] c, float[4] d)"
        " { a = Identity (x) r = Relu (x) b = Identity (r) c = Identity (b) e = Dropout (x) d = Identity (e) }"
    )
    clean(graph)
    assert sorted(ops(graph)) == ["Identity"] * 3 + ["Relu"]
    assert [graph.producer(t).inputs[0].name for t in graph.outputs if t.name in "ad"] == ["x", "x"]


def test_an_output_that_others_read():
    graph = graph_of("(float[4] x) => (float[4] a, float[4] b) { a = Identity (x) b = Relu (a) }")
    clean(graph)
    assert graph.producer(graph.outputs[1]).inputs[0].name == "x"


def test_constant_outputs():
    graph = graph_of(
        "(float[4] x) => (float[2] a, float[4] b, int64[1] c) <float[2] w = {1, 2}>"
        " { a = Exp (w) e = Exp (w) s = ReduceSum <keepdims = 0> (e) b = Mul (x, s) c = Shape (x) }"
    )
    clean(graph)
    np.testing.assert_allclose(constant_output(graph, "a"), np.exp([1, 2]), rtol=1e-6)
    assert constant_output(graph, "c").tolist() == [4]
    assert sorted(ops(graph)) == ["Identity", "Identity", "Mul"]


def test_a_constant_that_is_output_and_operand():
    graph = graph_of("(float[2] x) => (float[2] a, float[2] y) <float[2] w = {1, 2}> { a = Exp (w) y = Mul (x, a) }")
    clean(graph)
    assert sorted(ops(graph)) == ["Identity", "Mul"]
    assert all(isinstance(n.inputs[-1], gs.Constant) for n in graph.nodes)


def test_equal_outputs_stay_two():
    graph = graph_of("(float[4] x) => (float[4] a, float[4] b, float[4] c) { a = Relu (x) b = Relu (x) r = Relu (x) c = Neg (r) }")
    clean(graph)
    assert sorted(ops(graph)) == ["Identity", "Neg", "Relu"]


def test_outputs_that_are_inputs_initializers_or_constant_nodes():
    graph = graph_of("(float[1] x) => (float[1] x, float[1] w, float[1] c) <float[1] w = {1}> { c = Constant <value = float[1] {2}> () }")
    clean(graph)
    assert ops(graph) == ["Constant"]


def test_dead_nodes_go():
    graph = graph_of("(float[4] x) => (float[4] y) <float[1] w = {1}> { y = Relu (x) d = Exp (x) e = Add (d, w) }")
    assert whats(clean(graph)) == []
    assert ops(graph) == ["Relu"]


def test_an_empty_optional_input_stays_empty():
    graph = graph_of("(float[4] x) => (float[4] y) <float one = {1}> { m = Add (one, one) y = Clip (x, , m) }")
    clean(graph)
    assert [t.name for t in graph.nodes[0].inputs] == ["x", "", "m"]


# -- folding --------------------------------------------------------------------------------------------------------------


def test_a_subgraph_folds_into_one_initializer():
    graph = graph_of(
        "(float[2,3] x) => (float[2,3] y) <float[3] w = {1,2,3}>"
        " { c = Constant <value = float {2}> () a = Mul (w, c) b = Exp (a) k = Add (a, b) y = Mul (x, k) }"
    )
    graph.nodes[-1].name = "product"
    result = clean(graph)
    assert whats(result) == ["turn 1 Constant nodes into initializers", "fold 3 nodes into k"]
    assert ops(graph) == ["Mul"]
    a = np.array([2, 4, 6], np.float32)
    np.testing.assert_allclose(graph.constants()["k"], a + np.exp(a), rtol=1e-6)


def test_the_reader_inherits_the_provenance_of_what_folds():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) <float[2] w = {1,2}>'
        " { a = Exp (w) y = Mul (x, a) }"
    )
    for node, name in zip(model.graph.node, ("/head/scale/Exp", "/head/Mul"), strict=True):
        node.name = name
    graph = Graph.from_proto(model)
    clean(graph)
    assert provenance(graph.nodes[0]).modules == ("head", "head.scale")
    assert provenance(graph.nodes[0]).sources == ("/head/Mul", "/head/scale/Exp")


@pytest.mark.parametrize(
    "text",
    [
        "k = Identity (m)",
        "t = Transpose (m) k = Transpose (t)",
        "u = Unsqueeze (m, axis) k = Squeeze (u)",
        "r = Reshape (m, flat) k = Reshape (r, shape)",
        "s = Shape (m) k = Expand (scalar, s)",
        "s = Shape (m) k = ConstantOfShape (s)",
        "b = Cast <to = 9> (m) k = CastLike (b, scalar)",
        "b = Greater (m, scalar) k = Where (b, m, scalar)",
        "k = ScatterND (m, where, row)",
        "k = ScatterElements <axis = 1> (m, where, updates)",
        "g = GatherND (m, where) r = Reshape (g, shape) k = Add (m, r)",
        "z = NonZero (m) t = Transpose (z) k = ScatterND (m, t, flatvalues)",
        "a, b = Split <axis = 0> (m) k = Concat <axis = 0> (b, a)",
        "e = EyeLike (square) q = MatMul (m, e) k = Mul (q, scalar)",
        "n = Size (m) i = Cast <to = 1> (n) k = Mul (m, i)",
        "r = Range (i0, i4, i1) f = Cast <to = 1> (r) g = Slice (f, one, three) k = Mul (m, g)",
        "p = Pad (m, pads) k = Slice (p, one, three, axis)",
        "k = Tile (line, two)",
        "o = OneHot (one, i2, values) k = Add (m, o)",
    ],
)
def test_weight_subgraphs_fold(text):
    graph = graph_of(
        f"""(float[2,2] x) => (float[2,2] y) <float[2,2] m = {{1,-2,3,0.5}}, float scalar = {{2}}, float[1,2] line = {{5,6}},
        float[2,2] square = {{0,0,0,0}}, int64[1,2] where = {{1,0}}, int64[1] axis = {{1}}, int64[1] flat = {{4}},
        int64[2] shape = {{2,2}}, int64[2] two = {{2,1}}, float[1] row = {{9}}, float[1,2] updates = {{7,8}},
        float[3] flatvalues = {{1,2,3}}, int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}, int64 i4 = {{4}},
        int64[1] one = {{1}}, int64[1] three = {{3}}, int64[4] pads = {{0,1,0,1}}, float[2] values = {{1,2}}>
        {{ {text.replace("NonZero (m)", "NonZero (nz)").replace("GatherND (m, where) r = Reshape (g, shape)", "GatherND (m, where) r = Expand (g, shape)")} y = Mul (x, k) }}""",
        nz=np.array([[1, 0], [2, 3]], np.float32),
    )
    clean(graph)
    assert ops(graph) == ["Mul"]


def test_what_must_not_fold():
    graph = graph_of(
        "(float[2] x) => (float[2] y) <float[2] w = {1,2}, float s = {0.1}, int8 z = {0}, int8[2] q = {1,2}>"
        " { a = RandomNormalLike (w) b = QuantizeLinear (w, s, z) c = DequantizeLinear (b, s, z) d = DequantizeLinear (q, s, z)"
        " e = Bernoulli (s) f = RandomUniform <shape = [2]> () y = Sum (x, a, c, d, e, f) }"
    )
    kept = sorted(ops(graph))
    assert whats(run(graph)) == []
    assert sorted(ops(graph)) == kept


def test_foreign_domains_and_local_functions_do_not_fold():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "other" : 1]> g (float[2] x) => (float[2] y) <float[2] w = {1,2}>'
        " { a = other.twice (w) b = other.twice (w) y = Sum (x, a, b) }"
        ' <domain: "other", opset_import: ["" : 17]> twice (p) => (q) { q = Add (p, p) }'
    )
    graph = Graph.from_proto(model)
    assert whats(clean(graph)) == []
    assert ops(graph) == ["twice", "twice", "Sum"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("k = Div (w, zero)", "divide by zero"),
        ("k = Mod (w, zero)", "divide by zero"),
        ("k = Gather (w, nine)", "out of bounds"),
    ],
)
def test_evaluations_that_fail_are_left_with_a_note(text, why):
    graph = graph_of(
        f"(int64[2] x) => (int64[2] y) <int64[2] w = {{1,2}}, int64[1] zero = {{0}}, int64[2] nine = {{9,9}}>"
        f" {{ {text} y = Add (x, k) }}"
    )
    kept = ops(graph)
    result = run(graph)
    assert ops(graph) == kept and not result.rewrites
    assert len(result.notes) == 1 and why in result.notes[0].text


def test_a_failing_evaluation_stops_only_what_depends_on_it():
    graph = graph_of(
        "(int64[2] x) => (int64[2] y) <int64[2] w = {1,2}, int64[2] zero = {0, 0}>"
        " { a = Add (w, w) b = Div (a, zero) c = Neg (b) d = Neg (w) y = Sum (x, c, d) }",
    )
    result = run(graph)
    assert ops(graph) == ["Div", "Neg", "Sum"]
    assert whats(result) == ["fold 1 node into a", "fold 1 node into d"]


def test_types_numpy_lacks_are_left():
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
        model = parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> g (float[2,1] x) => (float[2,1] y)'
            " { t = Transpose (w) c = Cast <to = 1> (t) y = Mul (x, c) }"
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array([[1, 2]], dtype), "w"))
        graph = Graph.from_proto(model)
        assert whats(clean(graph)) == []
        assert ops(graph) == ["Transpose", "Cast", "Mul"]


def test_bfloat16_and_float16_fold():
    for dtype, number in ((ml_dtypes.bfloat16, TensorProto.BFLOAT16), (np.float16, TensorProto.FLOAT16)):
        graph = graph_of(
            f"(float[1,2] x) => (float[1,2] y) {{ t = Transpose (w) a = Add (t, t) b = Cast <to = {number}> (x) c = Cast <to = 1> (a) d = Cast <to = 1> (b) y = Mul (d, c) }}",
            w=np.array([[1], [2]], dtype),
        )
        clean(graph)
        assert ops(graph) == ["Cast", "Cast", "Mul"]


def test_empty_tensors_fold():
    graph = graph_of(
        "(float[2,3] x) => (float[2,3] y) <int64[1] zero = {0}, int64[1] axis = {1}, int64[2] s = {2,0}>"
        " { e = ConstantOfShape (s) f = Exp (e) y = Concat <axis = 1> (x, f) }",
    )
    clean(graph)
    assert ops(graph) == ["Concat"] and graph.constants()["f"].shape == (2, 0)


# -- shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s = Shape (x) k = Gather (s, i1)", []),
        ("s = Shape (x) k = Gather (s, i0)", ["Shape", "Gather"]),
        ("s = Shape (x) k = Slice (s, v1, v3)", []),
        ("s = Shape (x) k = Slice (s, v0, v1)", ["Shape", "Slice"]),
        ("k = Shape <start = 1> (x)", []),
        ("k = Shape <start = -2, end = 3> (x)", []),
        ("k = Shape <end = 1> (x)", ["Shape"]),
        ("s = Shape (x) a = Gather (s, v1) b = Gather (s, v2) c = Concat <axis = 0> (a, b) k = ReduceProd (c)", []),
        ("s = Shape (x) a, b, c = Split <axis = 0> (s) k = Add (b, c)", []),
        ("s = Shape (x) t = Cast <to = 7> (s) u = Unsqueeze (t, v0) k = Gather <axis = 1> (u, i2)", []),
        ("s = Shape (x) f = Cast <to = 6> (s) g = Gather (f, i1) k = Cast <to = 7> (g)", ["Shape", "Cast", "Gather", "Cast"]),
        ("s = Shape (x) o = Slice (fours, s, v9) k = ReduceSum (o)", ["Shape", "Slice", "ReduceSum"]),
        ("k = Size (x)", ["Size"]),
        ("t = Transpose <perm = [1,2,0]> (x) s = Shape (t) k = Gather (s, i0)", []),
        ("r = Reshape (x, keep) s = Shape (r) k = Gather (s, i1)", []),
        ("s = Shape (x) a = Gather (s, v0) b = Concat <axis = 0> (a, v3, v4) r = Reshape (x, b) t = Shape (r) k = Gather (t, i2)", []),
        ("s = Shape (x) z = ConstantOfShape (s) t = Shape (z) k = Gather (t, i2)", []),
        ("s = Shape (x) z = Expand (x, s) t = Shape (z) k = Gather (t, i2)", []),
        ("z = NonZero (x) s = Shape (z) k = Gather (s, i0)", []),
        ("z = NonZero (x) s = Shape (z) k = Gather (s, i1)", ["NonZero", "Shape", "Gather"]),
    ],
)  # fmt: skip
def test_shapes_known_in_part(text, left):
    graph = graph_of(
        f"""(int64[N,3,4] x) => (int64[A,B,C] y) <int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}, int64[1] v0 = {{0}},
        int64[1] v1 = {{1}}, int64[1] v2 = {{2}}, int64[1] v3 = {{3}}, int64[1] v4 = {{4}}, int64[1] v9 = {{9}},
        int64[3] keep = {{0,12,1}}, int64[4] fours = {{4,4,4,4}}>
        {{ {text} y = Add (x, {"k3" if "v1, v3)" in text or "start = " in text else "k"}) {""} }}""".replace(
            "y = Add (x, k3)", "k3 = ReduceSum <keepdims = 0> (k) y = Add (x, k3)"
        )
        if "fours" not in text
        else f"""(int64[N,3,4] x) => (int64[A,B,C] y) <int64[1] v9 = {{9}}, int64[4] fours = {{4,4,4,4}}>
        {{ q = Shape <end = 1> (x) s0 = Shape (x) {text.replace("s = Shape (x) ", "").replace("(fours, s,", "(fours, q,")} y = Add (x, k) }}"""
    )
    clean(graph, feeds=[{"x": np.arange(24).reshape(2, 3, 4)}, {"x": np.arange(12).reshape(1, 3, 4)}])
    assert [op for op in ops(graph) if op != "Add"][: len(left)] == left
