"""Evaluation of one node: every rule against ONNX Runtime in every opset, types and cost ahead of values."""

from __future__ import annotations

import time
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile import evaluate as ev
from edgecompile.evaluate import RULES, UNKNOWN, TensorType, Unfoldable, describe, evaluate, infer, type_of, work_of

F32, I64, F16 = np.float32, np.int64, np.float16
_RNG = np.random.default_rng(0)
X = _RNG.standard_normal((2, 3, 4)).astype(F32)
UNIT = _RNG.uniform(-0.9, 0.9, (2, 3)).astype(F32)
IMAGE = _RNG.standard_normal((1, 4, 4, 6)).astype(F32)
WHOLE = _RNG.integers(-9, 9, (2, 3, 4)).astype(I64)
ODD = np.array([[-7, -1, 3], [5, 8, -6]], I64)
MASK = WHOLE > 0


def ints(*values: int) -> np.ndarray:
    return np.array(values, I64)


def both(*arrays: np.ndarray) -> list[tuple[dict, list]]:
    """The same operands in float32, float16 and int32."""
    return [({}, [a.astype(t) for a in arrays]) for t in (F32, F16, np.int32)]


_FLOAT = [({}, [X]), ({}, [X.astype(F16)]), ({}, [np.array(0.25, F32)]), ({}, [np.zeros((0, 3), F32)])]
_BINARY = [*both(ODD, ints(2, -3, 4)), ({}, [ODD.astype(F32), np.array(-2, F32)])]
_LOGIC = [({}, [MASK, MASK[:, :1]])]
_BITS = [({}, [ODD.astype(np.uint8), ints(3, 5, 1).astype(np.uint8)])]
_REDUCE = [
    ({}, [X]),
    ({"axes": [1], "keepdims": 0}, [np.abs(X) + 1]),
    ({"axes": [0, -1]}, [X]),
]

# For each operator: attributes and inputs. Where an operator's axes (or the like) moved from an attribute to an input,
# they are given as an attribute and moved by the test.
_CASES: dict[str, list[tuple[dict, list]]] = {
    "Abs Neg Ceil Floor Relu Exp Sigmoid Tanh LeakyRelu Elu Selu HardSigmoid Softplus ThresholdedRelu Celu": _FLOAT,
    "Shrink Round Sign Sin Cos Tan Sinh Cosh Atan Asinh Erf IsNaN Identity": _FLOAT,
    "Asin Acos Atanh": [({}, [UNIT])],
    "Sqrt Log Reciprocal Acosh": [({}, [np.abs(X) + 1]), ({}, [(np.abs(X) + 1).astype(F16)])],
    "Add Sub Mul Div": _BINARY,
    "Equal Greater Less GreaterOrEqual LessOrEqual": _BINARY,
    "Max Min Mean Sum": [({}, [X]), ({}, [X, X[:1] * 2, X[:, :1] * 3])],
    "And Or Xor": _LOGIC,
    "BitwiseAnd BitwiseOr BitwiseXor": _BITS,
    "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum": [
        *_REDUCE,
        ({"keepdims": 0}, [WHOLE.astype(np.int32)]),
    ],
    "ReduceLogSumExp ReduceSumSquare": _REDUCE,
    "Softsign": [({}, [X])],
    "ReduceLogSum": [({"axes": [1]}, [np.abs(X) + 1])],
    "Not": [({}, [MASK])],
    "BitwiseNot": [({}, [ODD.astype(np.uint8)])],
    "BitShift": [
        ({"direction": d}, [np.array([1, 7, 255], np.uint8), np.array([1, 3, 7], np.uint8)]) for d in ("LEFT", "RIGHT")
    ],
    "IsInf": [
        ({}, [np.array([1, np.inf, -np.inf, np.nan], F32)]),
        ({"detect_negative": 0}, [np.array([np.inf, -np.inf], F32)]),
    ],
    "Mod": [({}, [ODD, ints(3, -2, 5)]), ({"fmod": 1}, [X, np.array(0.7, F32)])],
    "Pow": [({}, [np.abs(X) + 1, np.array(1.5, F32)]), ({}, [ODD, ints(2, 3, 0)]), ({}, [ODD, np.array(2, F32)])],
    "Clip": [({}, [X, np.array(-0.5, F32), np.array(0.5, F32)])],
    "Cast": [({"to": t}, [x]) for t in (1, 7, 9, 10, 11, 3) for x in (X, WHOLE, MASK, np.array([2.5, -2.5, 0.1], F32))],
    "Concat": [({"axis": a}, [X, X * 2]) for a in (0, 1, -1)],
    "Compress": [({"axis": 1}, [X, np.array([True, False, True])]), ({}, [X, np.array([True, False, True])])],
    "ConstantOfShape": [
        ({}, [ints(2, 3)]),
        ({"value": np.array([7], I64)}, [ints(2, 0)]),
        ({"value": np.array([True])}, [np.zeros(0, I64)]),
    ],
    "CumSum": [({"exclusive": e, "reverse": r}, [X, np.array(1, I64)]) for e in (0, 1) for r in (0, 1)],
    "DepthToSpace": [({"blocksize": 2}, [IMAGE]), ({"blocksize": 2, "mode": "CRD"}, [IMAGE])],
    "SpaceToDepth": [({"blocksize": 2}, [IMAGE])],
    "Expand": [({}, [X[:, :1], ints(3, 1)]), ({}, [MASK, ints(2, 1, 1, 1)]), ({}, [np.array(3, F32), ints(0, 2)])],
    "EyeLike": [({"k": 1, "dtype": 7}, [UNIT]), ({}, [UNIT])],
    "Flatten": [({}, [X]), ({"axis": 0}, [X]), ({"axis": 2}, [X])],
    "Gather": [
        ({"axis": 1}, [X, np.array([[2, 0], [1, 1]], I64)]),
        ({}, [WHOLE, np.array(1, I64)]),
        ({"axis": 2}, [X, ints(-1)]),
    ],
    "GatherElements": [({"axis": 1}, [ODD, np.array([[2, -1], [0, 1]], I64)]), ({}, [ODD, np.array([[1, 0]], I64)])],
    "GatherND": [({}, [X, np.array([[0, 1], [1, -1]], I64)]), ({"batch_dims": 1}, [X, np.array([[1], [0]], I64)])],
    "Gemm": [
        ({"alpha": 0.5, "transB": 1}, [UNIT, UNIT, np.array([1, 2], F32)]),
        ({"transA": 1, "beta": 2.0}, [UNIT, UNIT, np.array(3, F32)]),
    ],
    "MatMul": [
        ({}, [X, X.swapaxes(1, 2)]),
        ({}, [X.astype(F16), np.ones(4, F16)]),
        ({}, [ODD.astype(np.int32), ODD.T.astype(np.int32)]),
    ],
    "GlobalAveragePool": [({}, [IMAGE])],
    "GlobalMaxPool": [({}, [IMAGE])],
    "HannWindow HammingWindow BlackmanWindow": [({}, [np.array(9, I64)]), ({"periodic": 0}, [np.array(8, I64)])],
    "LayerNormalization": [({"axis": -1}, [X, X[0, 0], X[0, 1]]), ({"axis": 1, "epsilon": 0.1}, [X, X[0]])],
    "RMSNormalization": [({"axis": -1}, [X, X[0, 0]])],
    "NonZero": [({}, [MASK]), ({}, [ODD])],
    "OneHot": [
        ({}, [ODD % 4, np.array(4, I64), np.array([1e8, 1.0], F32)]),
        ({"axis": 1}, [ODD, np.array(9, I64), np.array([5, -3], I64)]),
    ],
    "ArgMax ArgMin": [({"axis": 1}, [X]), ({"axis": 0, "keepdims": 0, "select_last_index": 1}, [np.ones((3, 2), F32)])],
    "Pad": [
        ({"pads": [0, 1, 0, 0, 2, 3], "mode": "constant"}, [X]),
        ({"pads": [0, 0, 1, 0, 0, 2], "mode": "reflect"}, [X]),
        ({"pads": [0, 1, 0, 0, 0, 2], "mode": "edge"}, [X]),
    ],
    "Range": [
        ({}, [np.array(a, t) for a in args])
        for args, t in (((1, 9, 3), I64), ((9, 1, -2), I64), ((0.5, 2.5, 0.5), F32), ((3, 1, 1), I64))
    ],
    "Reshape": [({}, [X, ints(0, -1)]), ({}, [X, ints(4, 3, 2)])],
    "Resize": [
        ({"mode": m, "coordinate_transformation_mode": c}, [IMAGE, None, None, ints(1, 4, 7, 9)])
        for m in ("nearest", "linear", "cubic")
        for c in ("half_pixel", "align_corners", "asymmetric")
    ],
    "ReverseSequence": [({"batch_axis": 0, "time_axis": 1}, [X, ints(2, 3)])],
    "ScatterElements": [({"axis": 1}, [X, np.zeros((2, 1, 2), I64) + 2, X[:, :1, :2] * 9])],
    "ScatterND": [({}, [X, np.array([[0, 1], [1, -1]], I64), X[0, :2]])],
    "Shape": [({}, [X])],
    "Slice": [
        ({"starts": [1, -3], "ends": [2**62, -1], "axes": [1, 2]}, [X]),
        ({"starts": [0], "ends": [1]}, [X]),
    ],
    "Softmax LogSoftmax Hardmax": [({}, [X]), ({"axis": 0}, [X]), ({"axis": 1}, [X])],
    "Split": [({"axis": 2, "split": [1, 3]}, [X]), ({"axis": 2}, [X])],
    "Squeeze": [({"axes": [0, 2]}, [X[:1, :, :1]]), ({}, [X[:1, :, :1]])],
    "Unsqueeze": [({"axes": [0, 3]}, [X])],
    "Tile": [({}, [X, ints(1, 2, 3)])],
    "TopK": [({"axis": 1, "k": 2}, [X]), ({"axis": -1, "k": 3}, [X])],
    "Transpose": [({}, [X]), ({"perm": [1, 0, 2]}, [MASK])],
    "Trilu": [({"upper": 0}, [X, np.array(1, I64)]), ({}, [X])],
    "Where": [({}, [MASK, X, X[:, :1] * 2]), ({}, [MASK[0], WHOLE, np.array(3, I64)])],
}
CASES = {op: cases for ops, cases in _CASES.items() for op in ops.split()}

# Attributes that are inputs from some opset on.
_MOVED = {
    "Squeeze": {"axes": 13},
    "Unsqueeze": {"axes": 13},
    "Split": {"split": 13},
    "Slice": {"starts": 10, "ends": 10, "axes": 10},
    "Pad": {"pads": 11},
    "TopK": {"k": 10},
    **{op: {"axes": 18} for op in RULES if op.startswith("Reduce")},
    "ReduceSum": {"axes": 13},
}


def build(op: str, opset: int, attrs: dict, inputs: list) -> tuple[onnx.NodeProto, list]:
    """A described node for an opset, and its inputs."""
    attrs, inputs = dict(attrs), list(inputs)
    for name, since in _MOVED.get(op, {}).items():
        if name in attrs and opset >= since:
            inputs.append(np.array(attrs.pop(name), I64).reshape(-1))
    if op == "Clip" and opset < 11:
        attrs, inputs = {"min": float(inputs[1]), "max": float(inputs[2])}, inputs[:1]
    if op == "Split" and opset >= 18 and len(inputs) == 1:
        attrs["num_outputs"] = 2
    known = onnx.defs.get_schema(op, opset, "").attributes
    attrs = {k: v for k, v in attrs.items() if k in known}
    attrs = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attrs.items()}
    names = ["" if v is None else f"i{i}" for i, v in enumerate(inputs)]
    outputs = {"Split": 2, "TopK": 2}.get(op, 1)
    return helper.make_node(op, names, [f"o{i}" for i in range(outputs)], **attrs), inputs


def run_here(proto: onnx.NodeProto, inputs: list, opset: int) -> list[np.ndarray]:
    types = [TensorType() if v is None else type_of(v) for v in inputs]
    return evaluate(proto, inputs, infer(proto, types, inputs, opset), opset)


def run_ort(proto: onnx.NodeProto, inputs: list, opset: int) -> list[np.ndarray] | None:
    """The same in ONNX Runtime; None if it has no such kernel, or the opset no such type."""
    ort = pytest.importorskip("onnxruntime")
    feeds = {f"i{i}": v for i, v in enumerate(inputs) if v is not None}
    values = [helper.make_tensor_value_info(n, type_of(v).dtype, v.shape) for n, v in feeds.items()]
    graph = helper.make_graph([proto], "g", values, [helper.make_empty_tensor_value_info(n) for n in proto.output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if any(k in str(error) for k in ("NOT_IMPLEMENTED", "Could not find an implementation", "Type Error")):
            return None
        raise
    return session.run(None, feeds)


def opsets_of(op: str) -> list[int]:
    """Opsets in which an operator was redefined, from the first that its rule covers, up to what ONNX Runtime knows."""
    versions = {s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op and not s.domain}
    return sorted({max(v, RULES[op].since, min(versions), 7) for v in versions if v <= 23})


def test_every_rule_is_tested():
    assert set(RULES) <= set(CASES)


@pytest.mark.parametrize("op", sorted(RULES))
def test_agrees_with_onnxruntime_in_every_opset(op):
    compared = 0
    for opset in opsets_of(op):
        for attrs, inputs in CASES[op]:
            proto, values = build(op, opset, attrs, inputs)
            expected = run_ort(proto, values, opset)
            if expected is None:
                continue
            compared += 1
            for got, want in zip(run_here(proto, values, opset), expected, strict=True):
                assert got.dtype == want.dtype and got.shape == want.shape, (opset, attrs)
                tolerance = 2e-3 if want.dtype == F16 else 2e-6 if op != "Resize" else 1e-5
                np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=f"opset {opset} {attrs}")
    assert compared or op in {"BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "RMSNormalization"}


# -- refusals: where runtimes disagree, C++ leaves the result undefined, or nothing is known --------------------------


def refused(op: str, inputs: list, opset: int = 17, **attrs) -> str:
    proto = helper.make_node(op, [f"i{i}" for i in range(len(inputs))], ["o0"], **attrs)
    types = [type_of(v) for v in inputs]
    with pytest.raises(Unfoldable) as error:
        evaluate(proto, inputs, infer(proto, types, inputs, opset), opset)
    return str(error.value)


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "why"),
    [
        ("Div", [ODD, ints(0)], {}, "divide by zero"),
        ("Mod", [ODD, ints(0)], {}, "divide by zero"),
        ("Div", [X, np.array(0, F32)], {}, "divide by zero"),
        ("Exp", [np.array(1e4, F32)], {}, "overflow"),
        ("Log", [np.array(-1, F32)], {}, "invalid value"),
        ("Cast", [np.array([3e9], F32)], {"to": 6}, "cannot hold"),
        ("Cast", [np.array([2.0**31], F32)], {"to": 6}, "cannot hold"),
        ("Cast", [np.array([np.nan], F32)], {"to": 7}, "cannot hold"),
        ("Cast", [np.array([-1.0], F32)], {"to": 2}, "cannot hold"),
        ("Cast", [np.array([1e30], F32)], {"to": 10}, "overflow"),
        ("Cast", [X], {"to": TensorProto.FLOAT8E4M3FN}, "not of the type"),
        ("Cast", [X], {"to": TensorProto.INT4}, "not of the type"),
        ("Pow", [ints(2), ints(-1)], {}, "cannot hold"),
        ("Pow", [ints(10), ints(18)], {}, "cannot hold"),
        ("Gather", [X, ints(7)], {}, "out of bounds"),
        ("Reshape", [X, ints(5, 5)], {}, "cannot reshape"),
        ("Pad", [X, ints(0, -1, 0, 0, 0, 0)], {}, "negative"),
        ("Softplus", [ODD], {}, "not of the type"),
        ("RandomNormal", [], {"shape": [2]}, "no rule"),
        ("QuantizeLinear", [X, np.array(0.1, F32), np.array(0, np.int8)], {}, "no rule"),
        ("Conv", [IMAGE, np.ones((1, 4, 1, 1), F32)], {}, "no rule"),
    ],
)
def test_refuses_what_is_undefined_or_unknown(op, inputs, attrs, why):
    assert why in refused(op, inputs, **attrs)


def test_refuses_whatever_numpy_is_told_to_ignore():
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "divide by zero" in refused("Div", [ODD, ints(0)])
        assert "overflow" in refused("Exp", [np.array(1e4, F32)])


@pytest.mark.parametrize(
    ("low", "dtype", "to"), [(-(2.0**31), F32, 6), (2.0**30, F32, 6), (255.0, F16, 2), (-128.0, F32, 3)]
)
def test_casts_at_the_edge_of_an_integer_type(low, dtype, to):
    proto = helper.make_node("Cast", ["i0"], ["o0"], to=to)
    assert float(run_here(proto, [np.array([low], dtype)], 17)[0][0]) == low


def test_older_definitions_are_refused():
    assert "opset 11 defines it differently" in refused("Softmax", [X], 11)
    assert "opset 6 defines it differently" in refused("Add", [X, X], 6)
    assert "broadcasts by attribute" in refused("Add", [X, X[0, 0]], 7, broadcast=1)


def test_half_precision_is_accumulated_in_single():
    ones = np.full((1, 4096), 1.0, F16)
    proto = helper.make_node("MatMul", ["i0", "i1"], ["o0"])
    assert run_here(proto, [ones, ones.T], 17)[0].item() == 4096  # float16 alone stops at 2048
    half = np.array([1.0, 2.0**-8], ml_dtypes.bfloat16)
    total = run_here(helper.make_node("ReduceSum", ["i0"], ["o0"], keepdims=0), [half], 17)[0]
    assert total.dtype == ml_dtypes.bfloat16 and total.item() == np.array(1 + 2.0**-8).astype(ml_dtypes.bfloat16)


def test_inputs_are_never_written_to():
    for op in ("Softsign", "Softmax", "ScatterND", "Expand", "Identity", "Sum"):
        attrs, inputs = CASES[op][0]
        proto, values = build(op, 17, attrs, inputs)
        before = [v.copy() for v in values]
        run_here(proto, values, 17)
        assert all(np.array_equal(v, b) and v.flags.writeable for v, b in zip(values, before, strict=True))


# -- sizes and costs before values ------------------------------------------------------------------------------------


def types_of(op: str, types: list[TensorType], values: list, opset: int = 17, **attrs) -> TensorType:
    proto = helper.make_node(op, [f"i{i}" for i in range(len(types))], ["o0"], **attrs)
    return infer(proto, types, values, opset)[0]


def shape_type(*values: int) -> tuple[TensorType, np.ndarray]:
    return TensorType(TensorProto.INT64, (len(values),)), ints(*values)


@pytest.mark.parametrize(
    ("op", "data", "value", "expected"),
    [
        ("Expand", (3, 1), (2, 1, 5), (2, 3, 5)),
        ("Expand", ("N", 1), (1, 5), ("N", 5)),
        ("Expand", ("N", 1), (UNKNOWN, 5), (None, 5)),
        ("Expand", (3, 1), (UNKNOWN, UNKNOWN), (3, None)),
        ("Reshape", ("N", 6), (UNKNOWN, 2, 3), (None, 2, 3)),
        ("Reshape", ("N", 6), (0, UNKNOWN), ("N", None)),
        ("Reshape", ("N", 6), (0, 2, -1), ("N", 2, 3)),
        ("Reshape", (4, 6), (-1, 8), (3, 8)),
        ("Tile", (2, 3), (2**38, 1), (2**39, 3)),
        ("Tile", (2, 3), (2**60, 2**60), None),  # would overflow
        ("Tile", (2, 3), (2, UNKNOWN), None),
    ],
)
def test_shapes_from_values_known_in_part(op, data, value, expected):
    kind, array = shape_type(*value)
    types, values = [TensorType(1, data), kind], [None, array]
    assert types_of(op, types, values).shape == expected


def test_constant_of_shape_is_sized_not_made():
    kind, value = shape_type(2**20, 2**19)
    assert types_of("ConstantOfShape", [kind], [value]).nbytes == 2**41
    kind, value = shape_type(UNKNOWN, 4)
    filled = numpy_helper.from_array(np.array([1], I64))
    assert types_of("ConstantOfShape", [kind], [value], value=filled) == TensorType(TensorProto.INT64, (None, 4))
    kind, value = shape_type(-2, 4)
    assert not types_of("ConstantOfShape", [kind], [value]).static


@pytest.mark.parametrize(
    ("start", "limit", "delta", "count"),
    [(0, 10, 3, 4), (10, 0, -3, 4), (3, 1, 1, 0), (0, 1, 0, None), (0, 2**62, 1, None), (0.0, 1e30, 1e-30, None)],
)
def test_range_is_counted(start, limit, delta, count):
    values = [np.array(v, F32 if isinstance(start, float) else I64) for v in (start, limit, delta)]
    found = types_of("Range", [type_of(v) for v in values], values)
    assert found.shape == (None if count is None else (count,))


def test_work_counts_products():
    square = TensorType(1, (1000, 1000))
    node = helper.make_node("MatMul", ["i0", "i1"], ["o0"])
    assert work_of(node, [square, square], [square], 17) == 10**9
    node = helper.make_node("Add", ["i0", "i1"], ["o0"])
    assert work_of(node, [square, square], [square], 17) == 3 * 10**6


def test_inference_of_a_malformed_node_knows_nothing():
    assert types_of("Concat", [TensorType(1, (2,))], [None]) == TensorType()  # axis is missing
    assert types_of("NoSuchOperator", [TensorType(1, (2,))], [None]) == TensorType()


def test_description_forgets_names_and_the_order_of_attributes():
    def node(*names: str, **attrs) -> gs.Node:
        tensors = [gs.Variable(n) for n in names]
        return gs.Node("Conv", "n", attrs, tensors[:-1], tensors[-1:])

    one = describe(node("a", "b", "y", group=2, strides=[1, 2]))
    assert describe(node("c", "d", "z", strides=[1, 2], group=2)) == one
    assert describe(node("c", "d", "z", strides=[2, 1], group=2)) != one
    assert describe(node("c", "", "z", strides=[1, 2], group=2)) != one
    assert describe(node("c", "d", "", "z", strides=[1, 2], group=2)) != one
    with pytest.raises(Unfoldable):
        describe(node("a", "b", "y", group=object()))


def test_a_bomb_is_sized_fast_and_in_little_memory():
    tracemalloc.start()
    start = time.perf_counter()
    for op, data, value in (("Expand", (1,), (2**38,)), ("Tile", (8,), (2**39,)), ("Pad", (8,), (0, 2**39))):
        kind, array = shape_type(*value)
        assert types_of(op, [TensorType(1, data), kind], [None, array]).nbytes >= 2**40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - start < 2 and peak < 1 << 20


def test_table_names_real_operators():
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain}
    assert set(RULES) | ev.VIEWS | ev.DATA_DEPENDENT <= known
