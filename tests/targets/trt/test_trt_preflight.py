"""The preflight: what TensorRT's parser refuses is found without it, all at once, and named by module path."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.targets.trt import preflight, strong_typing, support

VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
F, H, I64, B, U8, I8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.UINT8,
    TensorProto.INT8,
)


def value(name: str, *shape: int | str, dtype: int = F):
    return helper.make_tensor_value_info(name, dtype, shape)


def make(nodes, inputs, outputs, opset: int = 20, **weights: np.ndarray) -> Graph:
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()]
    )
    domains = [helper.make_opsetid(d, opset if not d else 1) for d in {n.domain for n in nodes} | {""}]
    return Graph.from_proto(helper.make_model(graph, opset_imports=domains, ir_version=10))


def one(op: str, *inputs, out=(), dtype: int = F, opset: int = 20, outputs: int = 1, weights=None, **attrs) -> Graph:
    """A graph of one node ``n`` of module ``block.op``; ``weights`` follow the inputs."""
    weights = weights or {}
    names = [i.name for i in inputs] + list(weights)
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], "/block/op/n", **attrs)
    results = [helper.make_tensor_value_info(f"y{i}", dtype, out if out != () else None) for i in range(outputs)]
    return make([node], list(inputs), results, opset, **weights)


def found(graph: Graph, version: str = "10.3.0") -> list[str]:
    return [str(p) for p in preflight.check(graph, version)]


# -- operators, types, ranks, opsets -----------------------------------------------------------------------------------


def test_the_table_names_only_onnx_operators():
    historic = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "Swish"}
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    assert support.OPERATORS.keys() - known <= historic
    assert support.SINCE.keys() <= support.OPERATORS.keys()
    assert support.ADVICE.keys() <= known | historic
    types = {t for allowed in support.OPERATORS.values() for t in allowed}
    assert types <= set(TensorProto.DataType.keys())


def test_an_unsupported_operator_is_named_by_module():
    graph = one("Det", value("x", 2, 3, 3), out=(2,))
    (problem,) = preflight.check(graph, "11.4.0")
    assert problem.place == "block.op (Det)" and problem.node == "/block/op/n"
    assert "does not support Det" in problem.why and problem.fix


def test_all_problems_are_reported_at_once():
    nodes = [
        helper.make_node("Det", ["x"], ["d"], "/head/a/n"),
        helper.make_node("TopK", ["x", "k"], ["v", "i"], "/head/b/n", sorted=0),
        helper.make_node("Relu", ["d"], ["r"], "/head/c/n"),
    ]
    outputs = [value("r", 2), value("v", 2, 3, 1)]
    graph = make(nodes, [value("x", 2, 3, 3)], outputs, k=np.array([1]))
    problems = preflight.check(graph, "10.3.0")
    assert [p.place for p in problems] == ["head.a (Det)", "head.b (TopK)"]
    with pytest.raises(InputError) as caught:
        preflight.require(problems, "10.3.0", 3)
    assert "2 of 3 nodes" in caught.value.what
    assert "head.a (Det)" in caught.value.why and "head.b (TopK)" in caught.value.why
    assert caught.value.exit_code == 2
    preflight.require([], "10.3.0", 3)


def test_many_problems_stay_readable():
    problems = [preflight.Problem(f"m{i}", "why", node=f"n{i}") for i in range(40)]
    with pytest.raises(InputError, match="40 of 99 nodes") as caught:
        preflight.require(problems, "10.3.0", 99)
    assert "and 28 more" in caught.value.why


@pytest.mark.parametrize(
    ("op", "opset", "versions"),
    [("HannWindow", 17, "10.16.1.11 11.4.0"), ("Swish", 24, "11.4.0.106"), ("RMSNormalization", 23, "10.16.1 11.4")],
)  # fmt: skip
def test_operators_that_later_versions_added(op: str, opset: int, versions: str):
    graphs = {
        "HannWindow": lambda: one("HannWindow", weights={"n": np.array(8)}, out=(8,), opset=opset),
        "Swish": lambda: one("Swish", value("x", 1, 4), out=(1, 4), opset=opset),
        "RMSNormalization": lambda: one(
            op, value("x", 1, 4), weights={"s": np.ones(4, np.float32)}, out=(1, 4), opset=opset
        ),
    }
    graph = graphs[op]()
    for version in versions.split():
        assert found(graph, version) == []
    assert any(f"supports {op} since TensorRT" in p for p in found(graph, "10.3.0"))


@pytest.mark.parametrize(("version", "opset", "fine"), [
    ("10.3.0", 8, False), ("10.3.0", 9, True), ("10.3.0", 20, True), ("10.3.0", 21, False), ("10.16.1", 24, True),
    ("10.16.1", 25, False), ("11.4.0", 24, True), ("11.4.0", 25, False), ("11.5.0", 25, True), ("11.5.0", 26, False),
    ("10.13.3", 21, False), ("12.0", 25, True),
    ("8.6.1", 20, True),
])  # fmt: skip
def test_opsets(version: str, opset: int, fine: bool):
    problems = found(one("Relu", value("x", 1, 4), out=(1, 4), opset=opset), version)
    assert ([] if fine else ["the model"]) == [p.partition(":")[0] for p in problems]


def test_element_types():
    assert found(one("Relu", value("x", 4), out=(4,))) == []
    assert found(one("Softmax", value("x", 4, dtype=TensorProto.DOUBLE), out=(4,), dtype=TensorProto.DOUBLE)) == []
    assert found(one("Add", value("a", 4, dtype=I64), value("b", 4, dtype=I64), out=(4,), dtype=I64)) == []
    (told,) = found(one("Add", value("a", 4, dtype=U8), value("b", 4, dtype=U8), out=(4,), dtype=U8))
    assert "takes no UINT8" in told and "cast to INT32" in told
    for kind in (H, TensorProto.BFLOAT16):
        assert (
            found(one("Conv", value("x", 1, 3, 8, 8, dtype=kind), value("w", 3, 3, 1, 1, dtype=kind), dtype=kind)) == []
        )
    (told,) = found(one("Clip", value("x", 4, dtype=I64), out=(4,), dtype=I64))
    assert "takes no INT64" in told and "cast to FLOAT" in told
    graph = one("Where", value("c", 4, dtype=B), value("a", 4), value("b", 4), out=(4,))
    assert found(graph) == []
    assert found(one("Gather", value("x", 4), value("i", 2, dtype=I64), out=(2,), axis=0)) == []
    strings = one("Identity", value("x", 4, dtype=TensorProto.STRING), out=(4,), dtype=TensorProto.STRING)
    assert len(found(strings)) == 3


def test_what_depends_on_constants_only_is_left_to_the_pass_that_folds_it():
    mask = {"m": np.zeros(4, bool), "i": np.array([[1]]), "u": np.array([True])}
    nodes = [
        helper.make_node("ScatterND", ["m", "i", "u"], ["s"], "/mlp/n"),
        helper.make_node("Where", ["s", "x", "x"], ["y"], "w"),
    ]
    (problem,) = preflight.check(make(nodes, [value("x", 4)], [value("y", 4)], **mask), "11.4.0")
    assert "no BOOL" in problem.why and "the pass clean" in problem.fix
    del mask["u"]
    inputs = [value("x", 4), value("u", 1, dtype=B)]
    (problem,) = preflight.check(make(nodes, inputs, [value("y", 4)], **mask), "11.4.0")
    assert "no BOOL" in problem.why and "the pass clean" not in problem.fix


def test_ranks():
    assert found(one("Relu", value("x", *[1] * 8), out=(1,) * 8)) == []
    assert "9 dimensions, 8 are allowed" in found(one("Relu", value("x", *[1] * 9), out=(1,) * 9))[0]


def test_other_domains():
    assert "no operator Gelu of the domain com.microsoft" in found(
        make([helper.make_node("Gelu", ["x"], ["y"], "g", domain="com.microsoft")], [value("x", 4)], [value("y", 4)])
    )[0]  # fmt: skip
    nms = helper.make_node("EfficientNMS_TRT", ["b", "s"], ["y"], "nms", domain="TRT")
    assert found(make([nms], [value("b", 1, 9, 4), value("s", 1, 9, 2)], [value("y", 1, 1, dtype=6)])) == []


def test_subgraphs_are_checked_too():
    def branch(op: str, name: str):
        node = helper.make_node(op, ["x"], [name], f"/cond/{name}/n")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, F, None)])

    node = helper.make_node(
        "If", ["c"], ["y"], "/cond/n", then_branch=branch("Det", "t"), else_branch=branch("Relu", "e")
    )
    graph = make([node], [value("c", dtype=B), value("x", 2, 2)], [helper.make_tensor_value_info("y", F, None)])
    assert [p.place for p in preflight.check(graph, "11.4")] == ["cond.t (Det)"]


IMAGE = value("x", 1, 3, 8, 8)
VECTOR = value("v", 1, dtype=I64)
GROUPS = {"s": np.ones(3, np.float32), "b": np.zeros(3, np.float32)}
ONE_GROUP = {name: values[:1] for name, values in GROUPS.items()}
SCALES = {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
RESTRICTED = {
    "pool 1-D": (one("MaxPool", value("x", 1, 3, 8), out=(1, 3, 7), kernel_shape=[2]), "2 or 3 dimensions"),
    "pool dilated": (one("MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[2, 2]), "dilations"),
    "pool indices": (one("MaxPool", IMAGE, kernel_shape=[2, 2], outputs=2), "Indices"),
    "resize cubic": (one("Resize", IMAGE, weights=SCALES, mode="cubic"), "mode=cubic"),
    "resize crop": (
        one("Resize", IMAGE, weights=SCALES, coordinate_transformation_mode="tf_crop_and_resize"),
        "tf_crop_and_resize",
    ),
    "resize antialias": (one("Resize", IMAGE, weights=SCALES, mode="linear", antialias=1), "antialias=1"),
    "squeeze": (one("Squeeze", IMAGE, VECTOR), "axes must be a constant"),
    "reduce": (one("ReduceMean", IMAGE, VECTOR), "axes must be a constant"),
    "dropout": (one("Dropout", IMAGE, value("r"), value("t", dtype=B)), "eval mode"),
    "grid volume": (one("GridSample", value("x", 1, 1, 4, 4, 4), value("g", 1, 4, 4, 4, 3)), "of images"),
    "scatter": (
        one("ScatterND", IMAGE, value("i", 1, 4, dtype=I64), value("u", 1), reduction="add"),
        "reduction=add",
    ),
    "topk": (one("TopK", value("x", 1, 9000), weights={"k": np.array([4000])}, outputs=2), "less than 3840"),
    "layernorm": (one("LayerNormalization", IMAGE, weights={"s": np.ones(8, np.float32)}, outputs=2), "Mean"),
    "onehot": (
        one("OneHot", value("i", 4, dtype=I64), value("d", dtype=I64), weights={"v": np.array([0, 1], np.float32)}),
        "depth must be",
    ),
    "einsum": (one("Einsum", value("x", 3, 3), equation="ii->i"), "10.12"),
    "pow": (one("Pow", IMAGE, VECTOR), "10.12"),
    "one group": (
        one("GroupNormalization", IMAGE, weights=ONE_GROUP, num_groups=1),
        "normalises each channel by itself",
    ),
    "lstm": (
        one("LSTM", value("x", 1, 1, 2), value("w", 1, 8, 2), value("r", 1, 8, 2), hidden_size=2, layout=1),
        "layout=1",
    ),
    "deform": (
        one("DeformConv", IMAGE, value("w", 3, 3, 2, 2), value("o", 1, 8, 8, 8), pads=[0, 0, 1, 1]),
        "pads must be",
    ),
}
ALLOWED = {
    "pool": one("MaxPool", IMAGE, kernel_shape=[2, 2]),
    "resize": one("Resize", IMAGE, weights=SCALES, mode="linear"),
    "squeeze": one("Squeeze", IMAGE, weights={"a": np.array([0])}),
    "reduce": one("ReduceMean", IMAGE, weights={"a": np.array([2, 3])}),
    "dropout": one("Dropout", IMAGE, weights={"r": np.array(0.5, np.float32), "t": np.array(False)}),
    "grid": one("GridSample", value("x", 1, 1, 4, 4), value("g", 1, 4, 4, 2)),
    "scatter": one("ScatterND", IMAGE, value("i", 1, 4, dtype=I64), value("u", 1)),
    "topk": one("TopK", value("x", 1, 9000), weights={"k": np.array([300])}, outputs=2),
    "layernorm": one("LayerNormalization", IMAGE, weights={"s": np.ones(8, np.float32)}),
    "einsum": one("Einsum", value("x", 3, 4), equation="ij->ji"),
    "groups": one("GroupNormalization", IMAGE, weights=GROUPS, num_groups=3),
    "pow": one("Pow", IMAGE, value("e", 1)),
    "deform": one("DeformConv", IMAGE, value("w", 3, 3, 2, 2), value("o", 1, 8, 8, 8), pads=[1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", RESTRICTED)
def test_restrictions(name: str):
    graph, expected = RESTRICTED[name]
    problems = preflight.check(graph, "10.3.0")
    assert len(problems) == 1 and problems[0].place.startswith("block.op")
    assert expected in str(problems[0])


@pytest.mark.parametrize("name", ALLOWED)
def test_what_the_restrictions_leave(name: str):
    assert found(ALLOWED[name]) == []


@pytest.mark.parametrize(("name", "version"), [("einsum", "10.16.1"), ("pow", "10.16.1"), ("grid volume", "11.4.0")])
def test_restrictions_that_later_versions_lifted(name: str, version: str):
    assert found(RESTRICTED[name][0], version) == []


def test_a_constant_behind_an_identity_is_a_constant():
    nodes = [
        helper.make_node("Identity", ["c"], ["a"], "i"),
        helper.make_node("Squeeze", ["x", "a"], ["y"], "s"),
    ]
    assert found(make(nodes, [IMAGE], [value("y", 3, 8, 8)], c=np.array([0]))) == []


# -- strong typing -----------------------------------------------------------------------------------------------------


def typed(graph: Graph, version: str = "10.3.0") -> list[tuple[str, bool]]:
    return [(p.why, p.fatal) for p in strong_typing.check(graph, version)]


def test_operands_have_one_floating_point_type():
    assert typed(one("Pow", IMAGE, value("e", 1))) == []
    (problem,) = strong_typing.check(one("Pow", IMAGE, value("e", 1, dtype=H)), "10.3.0")
    assert problem.why == "its inputs are FLOAT and FLOAT16" and problem.place == "block.op (Pow)" and problem.fatal


def test_mixed_batch_normalization_since_10_7():
    statistics = [value(n, 3) for n in ("s", "b", "m", "v")]
    graph = one("BatchNormalization", value("x", 1, 3, 4, 4, dtype=H), *statistics, dtype=H)
    assert typed(graph) == [("its inputs are FLOAT16 and FLOAT", True)]
    assert typed(graph, "10.16.1") == []


def quantized(*, weights: bool = True, shortcut: bool = True, axis: int = 0, **changes: object) -> Graph:
    """Conv, residual sum and ReLU between Q/DQ pairs, as TensorRT fuses them."""
    rng = np.random.default_rng(0)
    constants = {
        "s": np.array(changes.get("scale", 0.1), np.float32),
        "z": np.array(changes.get("zero", 0), changes.get("dtype", np.int8)),
        "ws": np.full(4, 0.01, np.float32),
        "wz": np.zeros(4, np.int8),
        "w": rng.integers(-127, 127, (4, 4, 1, 1)).astype(np.int8),
        "wf": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
    }
    pair = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "dqw", axis=axis),
        helper.make_node("Conv", ["xd", "wd" if weights else "wf"], ["c"], "/stage/conv/n"),
        helper.make_node("Add", ["c", "xd" if shortcut else "x"], ["a"], "/stage/add/n"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["yq"], "q2"),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"], "dq2"),
    ]
    return make(pair, [value("x", 1, 4, 2, 2)], [value("y", 1, 4, 2, 2)], **constants)


def test_a_residual_block_that_fuses():
    graph = quantized()
    for version in VERSIONS:
        assert typed(graph, version) == [] and found(graph, version) == []


def test_a_sum_of_two_convolutions_needs_a_pair_on_one_of_them():
    graph = quantized()
    conv, add = graph.nodes[3], graph.nodes[4]
    other = graph.insert("Conv", list(conv.inputs), replaces=[conv])
    other.outputs[0].dtype, other.outputs[0].shape = np.dtype(np.float32), [1, 4, 2, 2]
    add.inputs[1] = other.outputs[0]
    graph.tidy()
    assert [w.partition(":")[0] for w, fatal in typed(graph) if not fatal] == [
        "the sum cannot join the convolution before it"
    ]


def test_a_bias_is_no_shortcut():
    graph = quantized()
    graph.nodes[4].inputs[1] = graph.new_constant("bias", np.ones((4, 1, 1), np.float32))
    graph.tidy()
    assert typed(graph) == []


def test_float_islands_are_told_but_not_fatal():
    (problem,) = strong_typing.check(quantized(shortcut=False), "10.3.0")
    assert "the sum cannot join" in problem.why and problem.place == "stage.add (Add)" and not problem.fatal
    (problem,) = (p for p in strong_typing.check(quantized(weights=False), "10.3.0") if "Conv" in p.place)
    assert "its weights are not" in problem.why and not problem.fatal
    preflight.require([problem], "10.3.0", 8)


def pairs(*points: tuple[str, str, float]) -> tuple[list, dict[str, np.ndarray]]:
    """Q/DQ pairs, each from a tensor to another with a scale."""
    nodes, constants = [], {"z": np.zeros((), np.int8)}
    for source, result, scale in points:
        constants[f"{result}_s"] = np.array(scale, np.float32)
        nodes += [
            helper.make_node("QuantizeLinear", [source, f"{result}_s", "z"], [f"{result}_q"], f"q_{result}"),
            helper.make_node("DequantizeLinear", [f"{result}_q", f"{result}_s", "z"], [result], f"dq_{result}"),
        ]
    return nodes, constants


@pytest.mark.parametrize(
    ("left", "right", "told"),
    [(0.1, 0.1, ""), (0.1, 0.2, "several scales"), (0.1, None, "1 of its 2 inputs are not quantized")],
)
def test_a_concat_between_pairs(left: float, right: float | None, told: str):
    nodes, constants = pairs(("a", "ad", left), ("y", "out", left), *([("b", "bd", right)] if right else []))
    nodes.insert(0, helper.make_node("Concat", ["ad", "bd" if right else "b"], ["y"], "/neck/concat/n", axis=1))
    ports = [value("a", 1, 2, 4, 4), value("b", 1, 2, 4, 4)]
    graph = make(nodes, ports, [value("out", 1, 4, 4, 4)], **constants)
    graph.tidy()
    problems = strong_typing.check(graph, "10.3.0")
    assert [p.place for p in problems] == ["neck.concat (Concat)"] * bool(told)
    assert all(told in p.why and not p.fatal for p in problems)


def test_a_concat_in_floating_point_is_no_island():
    nodes, constants = pairs(("a", "ad", 0.1))
    nodes.append(helper.make_node("Concat", ["ad", "b"], ["y"], "/neck/concat/n", axis=1))
    ports = [value("a", 1, 2, 4, 4), value("b", 1, 2, 4, 4)]
    assert typed(make(nodes, ports, [value("y", 1, 4, 4, 4)], **constants)) == []


def readers(*scales: float, float_reader: bool = False) -> Graph:
    """An int8 convolution and ReLU whose result is quantized for convolutions, and perhaps read as it is."""
    weights = {"w": np.ones((2, 2, 1, 1), np.float32)}
    points = [("x", "xd", 0.1), ("w", "wd", 0.01), *((("r", f"r{i}", s)) for i, s in enumerate(scales))]
    nodes, constants = pairs(*points)
    nodes += [
        helper.make_node("Conv", ["xd", "wd"], ["c"], "/stage/conv/n"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        *(helper.make_node("Conv", [f"r{i}", "wd"], [f"y{i}"], f"next{i}") for i, _ in enumerate(scales)),
    ]
    ends = [f"y{i}" for i, _ in enumerate(scales)]
    if float_reader:
        nodes.append(helper.make_node("Softmax", ["r"], ["f"], "/stage/gate/n"))
        ends.append("f")
    shape = (1, 2, 4, 4)
    graph = make(nodes, [value("x", *shape)], [value(e, *shape) for e in ends], **constants, **weights)
    graph.tidy()
    return graph


def test_a_result_that_is_quantized_and_read_in_floating_point():
    (problem,) = strong_typing.check(readers(0.1, float_reader=True), "10.3.0")
    assert problem.place == "stage.conv (Conv)" and not problem.fatal
    assert "stage.gate (Softmax) reads it in floating point" in problem.why
    assert typed(readers(0.1)) == [] and typed(readers(float_reader=True)) == []


def test_a_result_that_is_quantized_with_several_scales():
    ((why, fatal),) = typed(readers(0.1, 0.2))
    assert "several scales" in why and not fatal
    assert typed(readers(0.1, 0.1)) == []


def test_scales_and_zero_points():
    assert [w for w, _ in typed(quantized(scale=0.0))] == ["its scale must be positive and finite"] * 4
    assert len(found(quantized(zero=1))) == 4
    assert any("takes no UINT8 (quantize to INT8" in p for p in found(quantized(dtype=np.uint8)))
    bias = {"b": np.zeros(4, np.int32), "s": np.array(0.1, np.float32)}
    assert "keep biases in floating point" in found(one("DequantizeLinear", weights=bias, out=(4,)))[0]
    assert [w for w, _ in typed(quantized(axis=1))] == [
        "stage.conv (Conv) needs weights with one scale per index of axis 0, not 1"
    ]


def test_quantized_values_stay_between_their_pair():
    q = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], "q")
    scale = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
    graph = make([q], [IMAGE], [value("y", 1, 3, 8, 8, dtype=I8)], **scale)
    assert typed(graph) == [("an output of the model reads quantized values", True)]
    d = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], "d")
    graph = make([d], [value("x", 1, 3, 8, 8, dtype=I8)], [value("y", 1, 3, 8, 8)], **scale)
    assert "an input of the model" in typed(graph)[0][0]
