"""The pass clean: each rule with a twin where it must not fire, bombs, both exporters, the node tests of ONNX."""

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
from edgecompile.graph import Graph, Provenance, provenance
from edgecompile.passes.clean import Clean
from edgecompile.pipeline import Context, PassResult, Pipeline

RANDOM = {"Bernoulli", "RandomUniformLike", "RandomNormalLike", "RandomNormal", "RandomUniform", "Multinomial"}


def graph_of(text: str, opset: int = 17, **weights: np.ndarray) -> Graph:
    """A graph from ONNX's textual syntax, ``(float[4] x) => (float[4] y) { y = Relu (x) }``, and large initializers."""
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
            np.testing.assert_allclose(
                got.astype(wide), want.astype(wide), rtol=tolerance, atol=tolerance, err_msg=name
            )


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


# -- identities -------------------------------------------------------------------------------------------------------

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
    ("z = Reshape (r, same)", 17, True),
    ("z = Reshape (r, rest)", 17, True),  # [-1, 4]
    ("z = Reshape (r, copied)", 17, True),  # [0, 4]
    ("f = Reshape (r, flat)  e = Exp (f)  z = Reshape (e, same)", 17, False),
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
CONSTANTS = """<float zero = {0}, float one = {1}, float half = {0.5}, float[4] zeros = {0,0,0,0},
    float[4] almost = {0,0,0,1}, float[1,1,4] tall = {0,0,0,0}, bool no = {0}, bool[1] yes = {1},
    bool[4] mixed = {1,0,1,1},
    int64[2] same = {3,4}, int64[2] rest = {-1,4}, int64[2] copied = {0,4}, int64[1] flat = {12}, int64[2] ones = {1,1},
    int64[3] taller = {2,1,1}, int64[2] twice = {2,1}, int64[1] start = {0}, int64[1] far = {9223372036854775807},
    int64[1] three = {3}, int64[1] four = {4}, int64[1] axis = {1}, int64[1] rows = {0}, int64[1] step = {1},
    int64[1] last = {-1}, int64[1] before = {-9}, int64[1] back = {-1}, int64[4] nopads = {0,0,0,0},
    int64[4] pads = {0,1,0,2}>"""


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
        ("z = Reshape (r, same)", False),  # says that the batch is 3
        ("z = Expand (r, ones)", True),
        ("z = Expand (r, same)", False),
        ("z = Slice (r, start, far, rows)", True),
        ("z = Slice (r, start, three, rows)", False),  # a larger batch would be cut
        ("c = Concat <axis = 0> (r, r)  z = Slice (c, three, far, rows)", False),
        ("z = Add (r, zeros)", True),
        ("z = Add (r, column)", False),  # [3,1]: a batch of 1 would grow
        ("s = Shape (r)  z = Reshape (r, s)", True),
        ("s = Shape (r)  z = Expand (r, s)", False),  # not proved
    ],
)
def test_identities_with_an_unknown_batch(text, goes):
    constants = CONSTANTS.replace("<", "<float[3,1] column = {0,0,0}, ", 1)
    graph = graph_of(f"(float[N,4] x) => (float[M,4] y) {constants} {{ r = Relu (x) {text} y = Neg (z) }}")
    kept = ops(graph)
    clean(graph, feeds=[{"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}])
    assert ops(graph) == (["Relu", "Neg"] if goes else kept)


def test_dropout_of_old_opsets():
    for is_test, goes in ((1, True), (0, False)):
        graph = graph_of(
            f"(float[3] x) => (float[3] y) {{ r = Relu (x) z = Dropout <is_test = {is_test}> (r) y = Neg (z) }}", 6
        )
        run(graph)
        assert ("Dropout" not in ops(graph)) == goes


def test_dropout_that_trains_or_whose_mask_is_read_stays():
    training = (
        "(float[4] x) => (float[4] y) <float half = {0.5}, bool yes = {1}> { r"
        " = Relu (x) d = Dropout (r, half, yes) y = Neg (d) }"
    )
    graph = graph_of(training)
    run(graph)
    assert "Dropout" in ops(graph)
    graph = graph_of("(float[4] x) => (float[4] y, bool[4] m) { r = Relu (x) d, m = Dropout (r) y = Neg (d) }")
    clean(graph)
    assert "Dropout" in ops(graph)


def test_nan_and_infinity_pass_through_identities():
    graph = graph_of(
        "(float[4] x) => (float[4] y) <float one = {1}, float zero = {0}> {"
        " a = Mul (x, one) b = Sub (a, zero) y = Neg (b) }"
    )
    x = np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32)
    clean(graph, feeds=[{"x": x}])
    assert ops(graph) == ["Neg"]
    assert oracle.run(graph, {"x": x})["y"].tobytes() == (-x).tobytes()


def test_integers_have_the_same_identities():
    graph = graph_of(
        "(int32[4] x) => (int32[4] y) <int32 one = {1}, int32 zero = {0}> {"
        " a = Div (x, one) b = Add (zero, a) y = Abs (b) }"
    )
    clean(graph)
    assert ops(graph) == ["Abs"]


def test_compositions_of_transposes():
    graph = graph_of(
        "(float[2,3,4] x) => (float[4,2,3] y) { a = Transpose <perm = [1,2,0]> (x) b = Transpose <perm = [2,0,1]> (a)"
        " c = Transpose <perm = [2,0,1]> (b) y = Relu (c) }"
    )
    clean(graph)
    assert [(n.op, n.attrs.get("perm")) for n in graph.nodes] == [("Transpose", [2, 0, 1]), ("Relu", None)]


def test_transposes_compose_in_order():
    for p, q in (([1, 0, 2], [0, 2, 1]), ([1, 2, 0], [1, 0, 2])):
        graph = graph_of(
            f"(float[2,3,4] x) => (float[A,B,C] y) {{ a = Transpose <perm = {p}> (x) b = Transpose <perm = {q}> (a)"
            " y = Relu (b) }"
        )
        clean(graph)
        assert ops(graph) == ["Transpose", "Relu"]


def test_a_reshape_of_nothing_may_have_any_batch():
    """0 elements fit [2, 0] and [5, 0]: here the element count proves nothing."""
    graph = graph_of(
        "(float[N,4] x, float[M] z) => (float[M,0] y) <int64[1] zero = {0}, int64[1] one = {1}>"
        " { e = Slice (x, zero, zero, one) m = Shape (z) s = Concat <axis = 0> (m, zero)"
        " r = Reshape (e, s) y = Relu (r) }"
    )
    feeds = {"x": np.zeros((2, 4), np.float32), "z": np.zeros(5, np.float32)}
    clean(graph, feeds=[feeds])
    assert "Reshape" in ops(graph)


def test_transposes_of_unknown_rank_are_left():
    graph = graph_of(
        "(float[2,3] x, int64[K] s) => (float[6] y) <int64[1] m = {-1}> { a = Reshape (x,"
        " s) b = Transpose (a) c = Transpose (b) y = Reshape (c, m) }"
    )
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


# -- what the caller sees ---------------------------------------------------------------------------------------------


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
    graph = graph_of(
        "(float[4] x) => (float[4] a, float[4] b, float[4] c) { a = Relu (x) b = Relu (x) r = Relu (x) c = Neg (r) }"
    )
    clean(graph)
    assert sorted(ops(graph)) == ["Identity", "Neg", "Relu"]


def test_outputs_that_are_inputs_initializers_or_constant_nodes():
    graph = graph_of(
        "(float[1] x) => (float[1] x, float[1] w, float[1] c) <float[1] w ="
        " {1}> { c = Constant <value = float[1] {2}> () }"
    )
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


# -- folding ----------------------------------------------------------------------------------------------------------


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


WEIGHTS = """<float[2,2] m = {1,-2,3,0.5}, float scalar = {2}, float[1,2] line = {5,6}, int64[1,2] where = {1,0},
    int64[2,1] rows = {1,0}, int64[1,1] column = {1}, float[1,1] updates = {7}, float[1] one_update = {9},
    int64[1] axis = {1}, int64[1] flat = {4}, int64[2] shape = {2,2}, int64[2] two = {2,1}, int64 i0 = {0},
    int64 i1 = {1}, int64 i2 = {2}, int64 i4 = {4}, int64[1] v1 = {1}, int64[1] v3 = {3}, int64[4] pads = {0,1,0,1},
    float[2] values = {1,2}>"""


@pytest.mark.parametrize(
    "text",
    [
        "k = Identity (m)",
        "t = Transpose (m) k = Transpose (t)",
        "u = Unsqueeze (m, axis) k = Squeeze (u)",
        "r = Reshape (m, flat) k = Reshape (r, shape)",
        "s = Shape (m) k = Expand (scalar, s)",
        "s = Shape (m) k = ConstantOfShape (s)",
        "b = Greater (m, scalar) k = CastLike (b, scalar)",
        "b = Greater (m, scalar) k = Where (b, m, scalar)",
        "k = ScatterND (m, where, one_update)",
        "k = ScatterElements <axis = 1> (m, column, updates)",
        "g = GatherND (m, rows) k = Add (m, g)",
        "z = NonZero (m) t = Transpose (z) g = GatherND (m, t) r = Reshape (g, shape) k = Exp (r)",
        "a, b = Split <axis = 0> (m) k = Concat <axis = 0> (b, a)",
        "e = EyeLike (m) q = MatMul (m, e) k = Mul (q, scalar)",
        "n = Size (m) f = Cast <to = 1> (n) k = Mul (m, f)",
        "r = Range (i0, i4, i1) f = Cast <to = 1> (r) g = Slice (f, v1, v3) k = Mul (m, g)",
        "p = Pad (m, pads) k = Slice (p, v1, v3, axis)",
        "k = Tile (line, two)",
        "o = OneHot (v1, i2, values) k = Add (m, o)",
    ],
)
def test_weight_subgraphs_fold(text):
    graph = graph_of(f"(float[2,2] x) => (float[2,2] y) {WEIGHTS} {{ {text} y = Mul (x, k) }}")
    clean(graph)
    assert ops(graph) == ["Mul"]


def test_what_must_not_fold():
    graph = graph_of(
        "(float[2] x) => (float[2] y) <float[2] w = {1,2}, float s = {0.1}, int8 z = {0}, int8[2] q = {1,2}>"
        " { a = RandomNormalLike (w) b = QuantizeLinear (w, s, z) c ="
        " DequantizeLinear (b, s, z) d = DequantizeLinear (q, s, z)"
        " e = Bernoulli (s) f = RandomUniform <shape = [2]> () y = Sum (x, a, c, d, e, f) }"
    )
    kept = sorted(ops(graph))
    assert run(graph) == PassResult()  # nor is there a note: that they stay is no surprise
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


def test_local_functions_named_like_an_operator_do_not_fold():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) <float[2] w = {1,2}>'
        " { a = Exp (w) y = Add (x, a) }"
        ' <domain: "", opset_import: ["" : 17]> Exp (p) => (q) { q = Neg (p) }'
    )
    graph = Graph.from_proto(model)
    run(graph)
    assert ops(graph) == ["Exp", "Add"]


def test_a_small_part_of_a_large_constant_does_not_keep_it_alive():
    graph = graph_of(
        "(float[2,50000] x) => (float[2,50000] y) <int64[1] zero = {0}, int64[1] two = {2}>"
        " { e = Exp (w) k = Slice (e, zero, two) y = Add (x, k) }",
        w=np.ones((9, 50000), np.float32),
    )
    clean(graph)
    value = graph.constants()["k"]
    assert ops(graph) == ["Add"] and (value if value.base is None else value.base).nbytes == value.nbytes


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
            f"(float[1,2] x) => (float[1,2] y)"
            f" {{ t = Transpose (w) a = Add (t, t) b = Cast <to = {number}> (x)"
            " c = Cast <to = 1> (a) d = Cast <to = 1> (b) y = Mul (d, c) }",
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


# -- shapes -----------------------------------------------------------------------------------------------------------


KNOWN = ("[K]", [])
CASTS = ["Shape", "Cast", "Gather", "Cast"]
SHAPES = """<int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] v2 = {2},
    int64[1] v3 = {3}, int64[1] v4 = {4}, int64[1] v9 = {9}, int64[1] v12 = {12},
    int64[3] keep = {0,12,1}, int64[4] fours = {4,4,4,4}>"""


@pytest.mark.parametrize(
    ("text", "shape", "left"),
    [
        ("s = Shape (x) k = Gather (s, i1)", "", []),
        ("s = Shape (x) k = Gather (s, i0)", "", ["Shape", "Gather"]),
        ("s = Shape (x) k = Slice (s, v1, v3)", "[K]", []),
        ("s = Shape (x) k = Slice (s, v0, v1)", "[K]", ["Shape", "Slice"]),
        ("k = Shape <start = 1> (x)", "[K]", []),
        ("k = Shape <start = -2, end = 3> (x)", "[K]", []),
        ("k = Shape <end = 1> (x)", "[K]", ["Shape"]),
        ("k = Size (x)", "", ["Size"]),
        ("s = Shape (x) a = Gather (s, v1) b = Gather (s, v2) k = Concat <axis = 0> (a, b)", "[K]", []),
        ("s = Shape (x) a, b, c = Split <axis = 0> (s) k = Add (b, c)", "[K]", []),
        ("s = Shape (x) t = Cast <to = 7> (s) u = Unsqueeze (t, v0) k = Gather <axis = 1> (u, i2)", "[K]", []),
        # a type that cannot hold the mark of an unknown dimension
        ("s = Shape (x) f = Cast <to = 6> (s) g = Gather (f, i1) k = Cast <to = 7> (g)", "", CASTS),
        # an unknown dimension as an index, not as data
        ("s = Shape <end = 1> (x) k = Slice (fours, s, v9)", "[K]", ["Shape", "Slice"]),
        ("s = Shape <end = 1> (x) k = Gather (fours, s)", "[K]", ["Shape", "Gather"]),
        # known dimensions of what comes after
        ("t = Transpose <perm = [1,2,0]> (x) s = Shape (t) k = Gather (s, i0)", "", []),
        ("t = Transpose <perm = [1,2,0]> (x) s = Shape (t) k = Gather (s, i2)", "", ["Transpose", "Shape", "Gather"]),
        ("r = Reshape (x, keep) s = Shape (r) k = Gather (s, i1)", "", []),
        ("s = Shape <end = 1> (x) c = Concat <axis = 0> (s, v12) r = Reshape (x, c) k = Shape <start = 1> (r)", *KNOWN),
        ("s = Shape (x) z = ConstantOfShape (s) t = Shape (z) k = Gather (t, i2)", "", []),
        ("s = Shape (x) z = Expand (x, s) t = Shape (z) k = Gather (t, i2)", "", []),
        ("z = NonZero (x) s = Shape (z) k = Gather (s, i0)", "", []),
        ("z = NonZero (x) s = Shape (z) k = Gather (s, i1)", "", ["NonZero", "Shape", "Gather"]),
    ],
)  # fmt: skip
def test_shapes_known_in_part(text, shape, left):
    graph = graph_of(f"(int64[N,3,4] x) => (int64{shape} k) {SHAPES} {{ {text} }}")
    clean(graph, feeds=[{"x": np.arange(n * 12).reshape(n, 3, 4)} for n in (1, 2)])
    assert [op for op in ops(graph) if op != "Identity"] == left


def test_shapes_of_what_the_model_computes_fold_through_folded_shapes():
    """A shape that only folding reveals, whose shape is asked again, and so on: one run is enough."""
    step = "s{0} = Shape (x{0}) h{0} = Gather (s{0}, i1) d{0} = Div (h{0}, i2) u{0} = Unsqueeze (d{0}, v0)"
    step += " x{1} = Slice (x{0}, v0, u{0}, v1) "
    body = "".join(step.format(i, i + 1) for i in range(4))
    graph = graph_of(f"(float[N,64] x0) => (float[N,4] y) {SHAPES} {{ {body} y = Relu (x4) }}")
    clean(graph)
    assert ops(graph) == ["Slice"] * 4 + ["Relu"]


def test_recorded_shapes_of_intermediate_tensors_are_not_believed():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (int64[2] y) <float[1,4] r>'
        " { r = Relu (x) y = Shape (r) }"
    )
    assert model.graph.value_info[0].type.tensor_type.shape.dim[0].dim_value == 1  # a stale batch of 1
    graph = Graph.from_proto(model)
    clean(graph, feeds=[{"x": np.zeros((3, 4), np.float32)}])
    assert ops(graph) == ["Relu", "Shape"]


def test_recorded_shapes_of_what_control_flow_returns_are_not_believed():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[N,4] x) => (int64[2] y) <float[1,4] r> {
            r = If (c) < then_branch = a () => (float[A,4] t) { t = Relu (x) },
                         else_branch = b () => (float[B,4] e) { e = Neg (x) } >
            y = Shape (r) }"""
    )
    graph = Graph.from_proto(model)
    run(graph)
    assert ops(graph) == ["If", "Shape"]


def test_only_the_nodes_that_go_are_counted():
    graph = graph_of(
        "(float[2] x) => (float[2] y) <float[2] w = {1,2}> { n = Exp (w) s = Shape (n) k = ConstantOfShape (s)"
        " a = Add (x, k) y = Add (a, n) }"
    )
    result = clean(graph)
    assert sorted(whats(result)) == ["drop Add", "fold 1 node into n"]  # zeros
    graph = graph_of(
        "(float[2] x) => (float[2] y) <float[2] w = {1,2}, float t = {3}> { n = Exp (w) s = Shape (n) k = Expand (t, s)"
        " a = Add (x, k) y = Add (a, n) }"
    )
    assert whats(clean(graph)) == ["fold 2 nodes into k", "fold 1 node into n"]


def test_a_dimension_of_zero_is_not_believed():
    """Some exporters write 0 for an unknown dimension."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[0,4] x) => (int64[2] y) { y = Shape (x) }'
    )
    graph = Graph.from_proto(model)
    run(graph)
    assert ops(graph) == ["Shape"]


# -- equal nodes and constants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "merged"),
    [
        ("Exp (x)", "Exp (x)", True),
        ("Exp (x)", "Exp (w)", False),
        ("Exp (x)", "Log (x)", False),
        ("Sub (x, w)", "Sub (x, w)", True),
        ("Sub (x, w)", "Sub (w, x)", False),
        ("LeakyRelu <alpha = 0.1> (x)", "LeakyRelu <alpha = 0.1> (x)", True),
        ("LeakyRelu <alpha = 0.1> (x)", "LeakyRelu <alpha = 0.2> (x)", False),
        ("LeakyRelu (x)", "LeakyRelu <alpha = 0.2> (x)", False),
        ("Clip (x, c, )", "Clip (x, , c)", False),
        ("Mul (x, c)", "Mul (x, d)", True),  # c and d are equal
        ("Mul (x, c)", "Mul (x, e)", False),  # -0.0 and 0.0 differ
        ("RandomNormalLike (x)", "RandomNormalLike (x)", False),
    ],
)
def test_equal_nodes_merge(a, b, merged):
    graph = graph_of(
        f"(float[2] x, float[2] w) => (float[2] y) <float c = {{-0.0}}, float d = {{-0.0}}, float e = {{0}}>"
        f" {{ a = {a} b = {b} y = Add (a, b) }}"
    )
    (run if "Random" in a else clean)(graph)
    assert len(graph.nodes) == (2 if merged else 3)


def test_equal_nodes_with_several_outputs():
    text = (
        "(float[4] x) => (float[2] y) { a, b = Split <axis = 0> (x) c, d = Split <axis = 0> (x) y = Sum (a, b, c, d) }"
    )
    graph = graph_of(text)
    clean(graph)
    assert ops(graph) == ["Split", "Sum"]


def test_quantization_nodes_stay_apart():
    graph = graph_of(
        "(float[2] x) => (float[2] y) <float s = {0.5}, int8 z = {0}>"
        " { a = QuantizeLinear (x, s, z) b = QuantizeLinear (x, s, z)"
        " c = DequantizeLinear (a, s, z) d = DequantizeLinear (b, s, z) y = Add (c, d) }"
    )
    clean(graph)
    assert len(graph.nodes) == 5


def test_equal_initializers_are_shared():
    rng = np.random.default_rng(0)
    big = rng.standard_normal((40, 40)).astype(np.float32)
    other = big.copy()
    other[3, 7] += 1  # where the sample does not look
    graph = graph_of(
        "(float[40,40] x) => (float[40,40] y) { a = MatMul (x, p) b = MatMul (a, q) c = MatMul (b, o) y = Relu (c) }",
        p=big, q=big.copy(), o=other,
    )  # fmt: skip
    result = clean(graph, tolerance=1e-4)
    assert whats(result) == ["read p for the equal q"]
    assert set(graph.constants()) == {"p", "o"}


def test_initializers_of_other_types_or_shapes_are_not_equal():
    graph = graph_of(
        "(float[2] x) => (float[2] y) <float[1] a = {0}, float b = {0}, int32[1] c = {0}>"
        " { d = Clip (x, b) e = Cast <to = 1> (c2) f = Concat <axis = 0> (a, e) g = Max (d, f) y = Relu (g) }",
        c2=np.zeros(1, np.float64),
    )
    clean(graph)
    assert len(graph.constants()) == 2


# -- budgets ----------------------------------------------------------------------------------------------------------


def doubling(times: int) -> str:
    return " ".join(
        f"c{i + 1} = Concat <axis = 0> ({f'c{i}' if i else 'one'}, {f'c{i}' if i else 'one'})" for i in range(times)
    )


BOMBS = [  # the operator that stays, and what computes k
    ("ConstantOfShape", "k = ConstantOfShape (huge)"),
    ("ConstantOfShape", "h = ConstantOfShape (huge) k = ReduceSum (h)"),
    ("Expand", "k = Expand (one, huge)"),
    ("Tile", "k = Tile (one, huge)"),
    ("Tile", "r = Concat <axis = 0> (huge, huge) t = Expand (one, row) k = Tile (t, r)"),  # 2^80 elements
    ("Range", "k = Range (zero, limit, step)"),
    ("Range", "k = Range (fzero, fone, tiny)"),
    ("Pad", "k = Pad (one, pads)"),
    ("OneHot", "k = OneHot (index, depth, values)"),
    ("Resize", "k = Resize (line, , scales)"),
    ("HannWindow", "k = HannWindow (limit)"),
    ("EyeLike", "e = Expand (one, square) k = EyeLike (e)"),
    ("Concat", doubling(24) + " v = Abs (x) k = Add (c24, v)"),
    ("Concat", doubling(40) + " k = ReduceSum (c40)"),
    ("MatMul", "k = MatMul (column, row12000)"),
]


@pytest.mark.parametrize(("op", "text"), BOMBS)
def test_bombs_are_refused_fast_and_in_little_memory(op, text):
    graph = graph_of(
        f"""(float[1] x) => (float y) <int64[1] huge = {{1099511627776}}, int64 limit = {{1099511627776}},
        int64 zero = {{0}}, int64 step = {{1}}, float fzero = {{0}}, float fone = {{1}}, float tiny = {{1e-12}},
        float[1] one = {{1}}, int64[2] pads = {{0,1099511627776}},
        int64[1] index = {{0}}, int64 depth = {{1099511627776}},
        float[2] values = {{0,1}}, float[1,1,1] line = {{1}}, float[3] scales = {{1,1,1e12}}, int64[2] row = {{1,1}},
        int64[2] square = {{1000000,10000}}>
        {{ {text} y = ReduceSum <keepdims = 0> (k) }}""",
        column=np.ones((12000, 1), np.float32),
        row12000=np.ones((1, 12000), np.float32),
    )
    before = Counter(ops(graph))
    tracemalloc.start()
    start = time.perf_counter()
    result = run(graph)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 2 << 20
    assert result.notes and graph.weight_bytes() < 1 << 18
    assert Counter(ops(graph))[op] == before[op]


def test_products_are_refused_by_their_work():
    square = np.eye(900, dtype=np.float32)
    text = "(float[900,900] x) => (float[900,900] y) { a = MatMul (p, q) y = Add (x, a) }"
    graph = graph_of(text, p=square, q=square + 1)
    assert "operations" in str(run(graph, work=10**8).notes[0])
    assert ops(graph) == ["MatMul", "Add"]
    clean(graph)
    assert ops(graph) == ["Add"]


def test_work_is_counted_over_all_folds():
    graph = graph_of(
        "(float[300,300] x) => (float[300,300] y) { n = Neg (p) a = MatMul"
        " (p, p) b = MatMul (p, n) y = Sum (x, a, b) }",
        p=np.zeros((300, 300), np.float32),
    )
    run(graph, work=4 * 10**7)  # one product takes 2.7e7
    assert ops(graph).count("MatMul") == 1


def test_fold_limit():
    weight = np.ones((1000, 100), np.float32)  # 0.38 MiB
    text = "(float[100,1000] x) => (float[100,1000] y) { t = Transpose (w) y = Add (x, t) }"
    graph = graph_of(text, w=weight)
    (note,) = run(graph, fold_limit=100_000).notes
    assert "Transpose not folded: 0.3815 MiB output exceeds fold_limit" in str(note)
    assert ops(graph) == ["Transpose", "Add"]
    clean(graph, fold_limit=400_000)
    assert ops(graph) == ["Add"]


@pytest.mark.parametrize(("growth", "folds"), [(3, False), (4, True)])
def test_growth(growth, folds):
    graph = graph_of(
        "(float[4,100000] x) => (float[4,100000] y) <int64[2] s = {4,100000}> { e = Expand (w, s) y = Add (x, e) }",
        w=np.ones((1, 100000), np.float32),
    )
    result = clean(graph, growth=growth)
    assert ops(graph) == (["Add"] if folds else ["Expand", "Add"])
    assert folds or "1.526 MiB output exceeds 3 times its initializers" in str(result.notes[0])


def test_growth_is_counted_from_the_initializers_not_from_step_to_step():
    chain = "e = Expand (w, s) f = Concat <axis = 0> (e, e) g = Concat <axis = 0> (f, f)"  # 3 x 2 x 2
    ports = "(float[{0},30000] x) => (float[{0},30000] y) <int64[2] s = {{3,30000}}, int64[1] a = {{0}}>"
    graph = graph_of(f"{ports.format(12)} {{ {chain} y = Add (x, g) }}", w=np.ones((1, 30000), np.float32))
    clean(graph)
    assert len(graph.nodes) == 4
    # what grows on the way and is small again at the end folds
    body = f"{{ {chain} h = ReduceSum (g, a) y = Add (x, h) }}"
    graph = graph_of(f"{ports.format(1)} {body}", w=np.ones((1, 30000), np.float32))
    clean(graph)
    assert ops(graph) == ["Add"]


def test_small_results_may_grow():
    graph = graph_of(
        "(float[500,500] x) => (float[500,500] y) <float w = {2}, int64[2] s = {500,500}>"
        " { e = Expand (w, s) y = Mul (x, e) }"
    )
    clean(graph)
    assert ops(graph) == ["Mul"]


def test_all_folds_together_may_not_outgrow_the_model():
    """A hundred results, each within its own bounds, of one small initializer."""
    weight = np.ones((1, 20000), np.float32)
    body = "".join(
        f" c{i} = Add (w, v{i}) e{i} = Concat <axis = 0> (c{i}, c{i}, c{i}) a{i + 1} = Add (a{i}, e{i})"
        for i in range(40)
    )
    values = {f"v{i}": np.full(1, i, np.float32) for i in range(40)}
    graph = graph_of(f"(float[3,20000] a0) => (float[3,20000] y) {{ {body} y = Relu (a40) }}", w=weight, **values)
    result = run(graph, fold_limit=1 << 20)
    assert graph.weight_bytes() < (1 << 20) + 5 * weight.nbytes
    assert any("outgrows the model" in str(n) for n in result.notes)


def test_intermediate_tensors_together_are_bounded():
    names = [f"e{i}" for i in range(8)]
    body = " ".join(f"{n} = Expand (v{n}, s)" for n in names)
    graph = graph_of(
        f"(float[1] x) => (float[1] y) <int64[1] s = {{20000}}>"
        f" {{ {body} t = Sum ({', '.join(names)}) r = ReduceSum (t) y = Add (x, r) }}",
        **{f"v{n}": np.full(1, i, np.float32) for i, n in enumerate(names)},
    )
    notes = map(str, run(graph.copy(), fold_limit=100_000).notes)
    assert any("0.6866 MiB of memory" in n for n in notes)
    clean(graph, fold_limit=200_000)
    assert ops(graph) == ["Add"]


def test_large_initializers_are_neither_copied_nor_hashed(tmp_path):
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((512, 1024)).astype(np.float32) for i in range(8)}
    body = "".join(
        f" u{i} = Unsqueeze (w{i}, zero) s{i} = Squeeze (u{i}, zero) z{i} = Add (s{i}, nil) a{i + 1} = Add (a{i}, w{i})"
        for i in range(8)
    )
    graph = graph_of(
        f"(float[512,1024] a0) => (float[512,1024] y) <int64[1] zero ="
        f" {{0}}, float nil = {{0}}> {{ {body} y = Relu (a8) }}",
        **weights,
    )
    graph.save(tmp_path / "m.onnx", external=True)
    graph = Graph.load(tmp_path / "m.onnx")
    tracemalloc.start()
    run(graph)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and graph.weight_bytes() >= 16 << 20
    assert all(
        isinstance(v.base, np.memmap) or isinstance(v, np.memmap)
        for v in graph.constants().values()
        if v.nbytes > 1 << 20
    )


def test_a_large_constant_that_turns_out_neutral():
    """What is too large to compute on suspicion is looked at once it is folded."""
    graph = graph_of(
        "(float[200,200] x) => (float[200,200] y) { n = Sub (w, w) a = Add (x, n) y = Relu (a) }",
        w=np.ones((200, 200), np.float32),
    )
    assert whats(clean(graph)) == ["fold 1 node into n", "drop Add"]


# -- bodies of If, Loop and Scan --------------------------------------------------------------------------------------


def test_bodies_are_cleaned():
    graph = graph_of(
        """(bool c, float[2] x) => (float[2] y) <float[2] w = {1,2}, float one = {1}> {
            k = Exp (w)
            r = Relu (x)
            y = If (c) <
                then_branch = a () => (float[2] t) {
                    m = Mul (w, k) p = Identity (r) q = Mul (p, m) d = Exp (q) u = Mul (q, one) t = Identity (u) },
                else_branch = b () => (float[2] e) { e = Exp (w) }
            >
        }"""
    )
    feeds = [{"c": np.array(v), "x": np.array([0.5, -1], np.float32)} for v in (True, False)]
    clean(graph, feeds=feeds)
    assert ops(graph) == ["Relu", "If"]
    branch = graph.nodes[1].attrs
    assert [n.op for n in branch["then_branch"].nodes] == ["Mul"]
    assert [n.op for n in branch["else_branch"].nodes] == ["Identity"]  # a body must not return an initializer


def test_loop_bodies_do_not_know_their_shapes():
    graph = graph_of(
        """(float[1] x) => (float[N] y) <int64 n = {3}, bool yes = {1}, int64[1] axis = {0}> {
            y = Loop (n, yes, x) <
                body = b (int64 i, bool c, float[1] v) => (bool d, float[M] w) {
                    d = Identity (c) s = Shape (v) f = Cast <to = 1> (s) g = Add (v, f)
                    h = Identity (v) w = Concat <axis = 0> (g, h) }
            >
        }"""
    )
    clean(graph, feeds=[{"x": np.ones(1, np.float32)}])
    body = graph.nodes[0].attrs["body"]
    assert [n.op for n in body.nodes] == ["Identity", "Shape", "Cast", "Add", "Concat"]


def test_equal_nodes_in_two_branches_stay():
    graph = graph_of(
        """(bool c, float[2] x) => (float[2] y) { y = If (c) <
            then_branch = a () => (float[2] t) { u = Exp (x) v = Exp (x) t = Add (u, v) },
            else_branch = b () => (float[2] e) { w = Exp (x) e = Neg (w) } > }"""
    )
    clean(graph, feeds=[{"c": np.array(v), "x": np.ones(2, np.float32)} for v in (True, False)])
    branch = graph.nodes[0].attrs
    assert [n.op for n in branch["then_branch"].nodes] == ["Exp", "Add"]
    assert [n.op for n in branch["else_branch"].nodes] == ["Exp", "Neg"]


def test_an_outer_constant_that_only_a_body_reads():
    graph = graph_of(
        """(bool c, float[2] x) => (float[2] y) <float[2] w = {1,2}> { k = Exp (w) i = Identity (w) y = If (c) <
            then_branch = a () => (float[2] t) { t = Mul (x, k) },
            else_branch = b () => (float[2] e) { e = Mul (x, i) } > }"""
    )
    clean(graph, feeds=[{"c": np.array(v), "x": np.ones(2, np.float32)} for v in (True, False)])
    assert ops(graph) == ["If"]


# -- the contract of a pass -------------------------------------------------------------------------------------------


def busy() -> Graph:
    """A graph on which every kind of rewrite happens."""
    graph = graph_of(
        """(float[N,4] x) => (float[N,4] y, float[2] k, float[N,4] i) <float[2,2] w = {1,2,3,4}, float zero = {0},
        int64 i1 = {1}, int64[2] s = {-1,4}, float[4] a = {1,2,3,4}, float[4] b = {1,2,3,4}, float[1] f = {2}> {
            c = Constant <value = float[1] {3}> ()
            two = Constant <value = int64[1] {2}> ()
            t = Transpose (w)  m = MatMul (t, w)  r = ReduceSum <keepdims = 0> (m)
            e2 = Expand (f, two)  k = Exp (e2)
            z = Add (x, zero)  p = Mul (z, a)  q = Mul (z, b)  u = Add (p, q)
            v = Transpose (u)  h = Transpose (v)
            sh = Shape (x)  g = Gather (sh, i1)  gf = CastLike (g, x)  e = Mul (h, gf)
            d = Reshape (e, s)  o = Mul (d, c)  y = Add (o, r)  i = Identity (x)
        }"""
    )
    for number, node in enumerate(graph.nodes):
        node.provenance = Provenance((), (f"n{number}",))  # type: ignore[attr-defined]
    return graph


def test_every_number_of_rewrites_gives_a_right_graph():
    """What `edgecompile bisect` does: the first N rewrites, for every N."""
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
    expected = oracle.run(busy(), feeds)
    graph = busy()
    total = len(run(graph).rewrites)
    assert total > 10 and sorted(ops(graph)) == ["Add", "Add", "Identity", "Identity", "Mul", "Mul", "Mul"]
    for limit in range(total + 1):
        graph, signature = busy(), busy().signature()
        result = run(graph, limit=limit)
        graph.tidy()
        graph.check(signature)
        assert len(result.rewrites) == limit
        assert_same(expected, oracle.run(graph, feeds), 1e-5)


def test_pipeline_and_options():
    graph = busy()
    trace = Pipeline.parse("clean{fold_limit=1MiB,growth=2}").run(graph, strict=True)
    assert str(trace.steps[0].spec) == "clean{fold_limit=1048576,growth=2}"
    assert trace.steps[0].after.nodes < trace.steps[0].before.nodes
    with pytest.raises(InputError, match="must not be negative"):
        Pipeline.parse("clean{growth=-1}")


def test_save_and_load_after_clean(tmp_path):
    graph = busy()
    clean(graph)
    for external in (False, True):
        graph.save(tmp_path / "m.onnx", external=external)
        loaded = Graph.load(tmp_path / "m.onnx")
        assert loaded.digest() == graph.digest()


def test_rewrites_do_not_depend_on_ids():
    assert [str(r) for r in run(busy()).rewrites] == [str(r) for r in run(busy()).rewrites]


STEPS = {
    "identities": "t{1} = Identity (t{0})",
    "shapes": "s{0} = Shape (t{0}) g{0} = Gather (s{0}, one) f{0} = Cast <to = 1> (g{0}) t{1} = Mul (t{0}, f{0})",
    "a chain of constants": "c{1} = Neg (c{0}) t{1} = Add (t{0}, c{1})",
    "one constant with many readers": "e{0} = Mul (c0, c0) t{1} = Add (t{0}, e{0})",
    "equal nodes": "e{0} = Exp (t0) t{1} = Add (t{0}, e{0})",
}


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=name, marks=[] if name in ("identities", "equal nodes") else pytest.mark.slow)
        for name, step in STEPS.items()
    ],
)
def test_time_is_linear(step):
    def seconds(count: int) -> float:
        body = " ".join(step.format(i, i + 1) for i in range(count))
        constants = "<int64 one = {1}, float[4] c0 = {1,2,3,4}>"
        graph = graph_of(f"(float[N,4] t0) => (float[N,4] y) {constants} {{ {body} y = Neg (t{count}) }}")
        start = time.process_time()
        run(graph)
        return time.process_time() - start

    seconds(100)
    small, large = (min(seconds(count) for _ in range(3)) for count in (300, 2400))
    assert large < 24 * small, f"8 times the nodes took {large / small:.0f} times as long"


# -- what the exporters of torch leave behind -------------------------------------------------------------------------


def export(module, inputs: tuple, dynamo: bool, dynamic: bool = False) -> Graph:
    """The graph of a module, from either exporter, without its own folding."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic else None
            program = torch.onnx.export(
                module, inputs, dynamo=True, verbose=False, dynamic_shapes=shapes, optimize=False
            )
            return Graph.from_proto(program.model_proto)
        buffer = io.BytesIO()
        names = [f"x{i}" for i in range(len(inputs))]
        axes = {n: {0: "batch"} for n in names} if dynamic else None
        torch.onnx.export(
            module, inputs, buffer, dynamo=False, do_constant_folding=False, input_names=names, dynamic_axes=axes,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
        return Graph.from_proto(onnx.load_from_string(buffer.getvalue()))


def modules() -> dict:
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional

    class DifferenceConv(nn.Module):
        """Weights built by index assignment, summed, then one convolution: the shape of DEConv."""

        def __init__(self):
            super().__init__()
            self.plain, self.centre = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
            self.row = nn.Conv1d(4, 6, 3)

        def forward(self, x):
            centre = self.centre.weight.reshape(6, 4, 9).clone()
            centre[:, :, 4] = centre[:, :, 4] - centre.sum(2)
            row = torch.zeros(6, 4, 9)
            row[:, :, [0, 3, 6]] = self.row.weight
            row[:, :, [2, 5, 8]] = -self.row.weight
            flipped = self.plain.weight.reshape(6, 4, 9)[:, :, [3, 0, 1, 6, 4, 2, 7, 8, 5]]
            weight = self.plain.weight + (centre + row - flipped).reshape(6, 4, 3, 3)
            return functional.conv2d(x, weight, self.plain.bias + self.centre.bias, padding=1)

    class MaskedFeedForward(nn.Module):
        """A nonlinearity on some channels only, by a mask made of index assignment: the shape of RePaViT."""

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            u = self.up(x)
            mask = torch.zeros(u.shape[1:], dtype=torch.bool)
            mask[:, :12] = True
            return self.down(torch.where(mask, functional.gelu(u), u)) + x

    class Windows(nn.Module):
        """Reshapes whose sizes are computed from the input's, the batch being unknown."""

        def forward(self, x):
            b, c, h, w = x.shape
            y = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c * 4)
            y = y * (c * h) ** -0.5
            return y.view(b, (h // 2) * (w // 2), c * 4).transpose(1, 2).transpose(1, 2)[:, :, : c * 2]

    return {
        "difference": (DifferenceConv(), (torch.randn(2, 4, 7, 7),), {"Conv"}),
        "mask": (MaskedFeedForward(), (torch.randn(2, 5, 8),), {"MatMul", "Add", "Gelu", "Erf", "Mul", "Div", "Where"}),
        "windows": (
            Windows(),
            (torch.randn(2, 3, 4, 6),),
            {"Reshape", "Transpose", "Mul", "Slice", "Shape", "Gather", "Concat", "Squeeze", "Unsqueeze"},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["difference", "mask", "windows"])
def test_exported_modules(name, dynamo):
    module, inputs, expected = modules()[name]
    graph = export(module.eval(), inputs, dynamo, dynamic=name == "windows")
    before = len(graph.nodes)
    feeds = [{t.name: x.numpy() for t, x in zip(graph.inputs, inputs, strict=True)}]
    clean(graph, feeds=feeds, tolerance=1e-5)
    assert set(ops(graph)) <= expected, Counter(ops(graph))
    assert before > 1.5 * len(graph.nodes)
    outputs = oracle.run(graph, feeds[0])
    (result,) = outputs.values()
    np.testing.assert_allclose(result, module(*inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


# -- random graphs ----------------------------------------------------------------------------------------------------


def random_model(seed: int) -> onnx.ModelProto:
    """A model with constant subgraphs, no-ops, duplicates, compositions and shape arithmetic in random order.

    All tensors are float; ``x`` is ``[N, 4, 6]``, N being 3 when run.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}

    def node(op: str, *inputs: str, outputs: int = 1, **attrs) -> str:
        names = [f"t{len(nodes)}" if i == 0 else f"t{len(nodes)}_{i}" for i in range(outputs)]
        nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        return names[0]

    def const(values: np.ndarray | list, as_node: bool | None = None) -> str:
        array = np.asarray(values)
        if as_node if as_node is not None else rng.random() < 0.4:
            return node("Constant", value=numpy_helper.from_array(array))
        weights[f"w{len(weights)}"] = array
        return f"w{len(weights) - 1}"

    def ints(*values: int) -> str:
        return const(np.array(values, np.int64))

    def constant(shape: tuple[int, ...], depth: int) -> str:
        """A constant expression of a shape; a coarse grid of values, so that some are equal or neutral."""
        if depth <= 0 or rng.random() < 0.2:
            return const(
                rng.integers(0, 3, shape).astype(np.float32)
                if rng.random() < 0.7
                else np.full(shape, rng.integers(0, 2), np.float32)
            )
        kind = rng.integers(0, 9)
        if kind == 0:
            return node(
                str(rng.choice(["Add", "Mul", "Sub", "Max"])),
                constant(shape, depth - 1),
                constant(shape[-1:], depth - 2),
            )
        if kind == 1:
            return node("Transpose", constant(shape[::-1], depth - 1))
        if kind == 2:
            return node("Reshape", constant((int(np.prod(shape)),), depth - 1), ints(*shape))
        if kind == 3:
            return node("Expand", constant((1,) * len(shape), depth - 1), ints(*shape))
        if kind == 4:
            return node(
                "ConstantOfShape",
                node("Shape", constant(shape, depth - 1)),
                value=numpy_helper.from_array(np.array([2], np.float32)),
            )
        if kind == 5:
            return node(
                "Where",
                node("Greater", constant(shape, depth - 2), const(np.float32(1))),
                constant(shape, depth - 1),
                const(np.float32(0)),
            )
        if kind == 6:
            index = [[int(rng.integers(0, d)) for d in shape]]
            return node(
                "ScatterND", constant(shape, depth - 1), const(np.array(index, np.int64)), const(np.ones(1, np.float32))
            )
        if kind == 7:
            return (
                node(
                    "Concat",
                    constant((shape[0] - 1, *shape[1:]), depth - 1),
                    constant((1, *shape[1:]), depth - 2),
                    axis=0,
                )
                if shape[0] > 1
                else constant(shape, 0)
            )
        return node("Slice", constant((shape[0] + 1, *shape[1:]), depth - 1), ints(1), ints(99), ints(0))

    live: list[tuple[str, tuple[int, ...]]] = [("x", (4, 6))]  # name, dimensions after the batch
    for _ in range(int(rng.integers(8, 22))):
        name, shape = live[int(rng.integers(0, len(live)))]
        kind = rng.integers(0, 16)
        if kind <= 1:
            name = node(str(rng.choice(["Relu", "Neg", "Sigmoid", "Abs"])), name)
        elif kind <= 3:
            name = node(
                str(rng.choice(["Add", "Mul", "Sub"])), name, constant(shape if rng.random() < 0.5 else shape[-1:], 3)
            )
        elif kind == 4:
            name = node(str(rng.choice(["Add", "Mul"])), constant((1,), 1), name)
        elif kind == 5:
            name = node(str(rng.choice(["Identity", "Dropout", "Sum", "Max"])), name)
        elif kind == 6:
            name = node("Cast", name, to=TensorProto.FLOAT)
        elif kind == 7:
            name, shape = node("Transpose", name, perm=[0, 2, 1]), shape[::-1]
        elif kind == 8:
            batch = node("Gather", node("Shape", name), ints(0))
            flat = node("Reshape", name, node("Concat", batch, ints(shape[0] * shape[1]), axis=0))
            name = node("Reshape", flat, ints(-1, *shape[::-1]))
            shape = shape[::-1]
        elif kind == 9:
            size = node("Gather", node("Shape", name), const(np.array(1, np.int64)))
            name = node("Mul", name, node("Cast", size, to=TensorProto.FLOAT))
        elif kind == 10 and shape[0] < 20:
            name, shape = node("Concat", name, name, axis=1), (2 * shape[0], shape[1])
        elif kind == 11 and shape[0] > 1:
            half = node("Div", node("Gather", node("Shape", name), ints(1)), ints(2))
            name, shape = node("Slice", name, ints(0), half, ints(1)), (shape[0] // 2, shape[1])
        elif kind == 12:
            name = node("MatMul", name, constant((shape[1], 5), 3))
            shape = (shape[0], 5)
        elif kind == 13:
            name = node("Where", node("Greater", constant(shape, 2), const(np.float32(0))), name, constant((1,), 1))
        elif kind == 14:
            name = node("Unsqueeze", name, ints(1))
            name = node("Squeeze", name, ints(1))
        else:
            other = [n for n, s in live if s == shape]
            name = node("Add", name, other[int(rng.integers(0, len(other)))])
        live.append((name, shape))
    picked = {live[-1][0], *(live[int(rng.integers(0, len(live)))][0] for _ in range(2))} - {"x"}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", None, None]) for n in sorted(picked)]
    if rng.random() < 0.5:
        outputs.append(helper.make_tensor_value_info(constant((2, 3), 3), TensorProto.FLOAT, [2, 3]))
    known = {name for n in nodes for name in n.output}
    outputs = [o for o in outputs if o.name in known]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6])], outputs,
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def check_random(seed: int, tmp_path) -> int:
    model = random_model(seed)
    graph = Graph.from_proto(model)
    if not graph.outputs:
        return 0
    feeds = [{"x": np.random.default_rng(seed).standard_normal((3, 4, 6)).astype(np.float32)}]
    result = clean(graph, feeds=feeds, tolerance=1e-4)
    graph.save(tmp_path / "m.onnx")
    loaded = Graph.load(tmp_path / "m.onnx")
    assert_same(oracle.run(graph, feeds[0]), oracle.run(loaded, feeds[0]), 0)
    return len(result.rewrites)


@pytest.mark.parametrize("block", range(4))
def test_random_graphs(block, tmp_path):
    rewrites = [check_random(seed, tmp_path) for seed in range(block * 25, block * 25 + 25)]
    assert sum(map(bool, rewrites)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_random_graphs(block, tmp_path):
    for seed in range(1000 + block * 100, 1100 + block * 100):
        check_random(seed, tmp_path)


# -- the node tests of ONNX -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> list:
    """Cases of onnx.backend.test with tensors only: name, model, inputs, outputs, tolerances."""
    from onnx.backend.test.case.node import collect_testcases

    def arrays(values) -> list[np.ndarray]:
        return [numpy_helper.to_array(v) if isinstance(v, TensorProto) else np.asarray(v) for v in values]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [c for c in collect_testcases(None) if c.model is not None]
    found = []
    for case in sorted(cases, key=lambda c: c.name):
        inputs, outputs = case.data_sets[0]
        if any(isinstance(v, list) or v is None for v in (*inputs, *outputs)):
            continue  # sequences and optionals
        case.model.ir_version = max(case.model.ir_version, 4)
        found.append((case.name, case.model, arrays(inputs), arrays(outputs), case.rtol or 1e-3, case.atol or 1e-7))
    return found


def close(want: np.ndarray, got: np.ndarray, rtol: float, atol: float) -> bool:
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    if want.dtype.kind in "OUSbc":
        return bool(np.array_equal(want, got))
    if want.dtype.itemsize == 2:
        rtol, atol = max(rtol, 1e-2), max(atol, 1e-2)
    return np.allclose(got.astype(np.float64), want.astype(np.float64), rtol, atol, equal_nan=True)


def check_folding(name, model, inputs, outputs, rtol, atol) -> str:
    """Make every input an initializer: the outputs must become what the case expects, or be computed as before."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for port, value in zip(model.graph.input, inputs, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(value, port.name))
    del model.graph.input[:]
    try:
        graph = Graph.from_proto(model)
        graph.check()
    except InputError:
        return "unreadable"
    before, signature = graph.copy(), graph.signature()
    run(graph)
    graph.check(signature)
    again = graph.copy()
    if run(again).rewrites:
        return "wrong: not a fixed point"
    values = [graph.constant(t) for t in graph.outputs]
    if all(v is not None for v in values):
        good = all(close(w, g, rtol, atol) for w, g in zip(outputs, values, strict=True))
        return "folded" if good else "wrong: not the expected values"
    if RANDOM & set(ops(graph)):
        return "left"
    try:
        expected = oracle.run(before, {})
    except InputError:
        return "left"
    got = oracle.run(graph, {})
    return "left" if all(close(v, got[n], rtol, atol) for n, v in expected.items()) else "wrong: another meaning"


def check_meaning(name, model, inputs, outputs, rtol, atol) -> str:
    """Leave the inputs as they are: the outputs must stay what they were."""
    try:
        graph = Graph.from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
        graph.check()
        feeds = dict(zip((t.name for t in graph.inputs), inputs, strict=True))
        expected = oracle.run(graph, feeds)
    except (InputError, ValueError, TypeError):  # optional inputs have no type that a signature can say
        return "unreadable"
    if RANDOM & set(ops(graph)):
        return "random"
    signature = graph.signature()
    result = run(graph)
    graph.check(signature)
    got = oracle.run(graph, feeds)
    if not all(close(v, got[n], rtol, atol) for n, v in expected.items()):
        return "wrong: another meaning"
    return "changed" if result.rewrites else "same"


def survey(cases: list, check) -> tuple[Counter, list[str]]:
    results = {case[0]: check(*case) for case in cases}
    wrong = [f"{name}: {verdict}" for name, verdict in results.items() if verdict.startswith("wrong")]
    return Counter(results.values()), wrong


def test_node_cases_fold_to_what_onnx_expects(corpus):
    counts, wrong = survey(corpus[::6], check_folding)
    assert not wrong
    assert counts["folded"] > 150 and counts["unreadable"] < 15, counts


def test_node_cases_keep_their_meaning(corpus):
    counts, wrong = survey(corpus[3::12], check_meaning)
    assert not wrong
    assert counts["changed"] > 20, counts


@pytest.mark.slow
def test_all_node_cases_fold_to_what_onnx_expects(corpus):
    counts, wrong = survey(corpus, check_folding)
    assert not wrong
    assert counts["folded"] > 950 and counts["unreadable"] < 80, counts


@pytest.mark.slow
def test_all_node_cases_keep_their_meaning(corpus):
    counts, wrong = survey(corpus, check_meaning)
    assert not wrong
    assert counts["changed"] > 300, counts
