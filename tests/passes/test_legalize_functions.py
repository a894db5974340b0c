"""Operators that a model defines itself: inlined for a target without a kernel, their constants computed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile import oracle
from edgecompile.graph import Graph, provenance
from edgecompile.passes.legalize import Legalize
from edgecompile.passes.shift_add import codes, ops
from edgecompile.pipeline import Context, PassResult

RNG = np.random.default_rng(0)


def coded(kind: str, rows: int = 30, columns: int = 45, opset: int = 18, constant: bool = True) -> Graph:
    one = codes.encode(RNG.standard_normal((rows, columns)).astype(np.float32), kind, 4, group=16)
    name = "BinaryCodedLinear" if kind == "binary" else "ShiftLinear"
    held = {"planes": codes.pack(one.codes, 4), "exponents": one.exponents}
    held |= {} if kind == "binary" else {"levels": codes.book(kind, 4)}
    node = helper.make_node(name, ["x", *held], ["y"], "net.fc", domain=ops.DOMAIN, columns=columns, group=16)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, columns])]
    if not constant:
        inputs.append(helper.make_tensor_value_info("exponents", TensorProto.INT8, held.pop("exponents").shape))
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, rows])],
        [numpy_helper.from_array(v, n) for n, v in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    return Graph.from_proto(
        helper.make_model(graph, opset_imports=opsets, functions=[ops.function(name, 18)], ir_version=9)
    )


def legalized(graph: Graph, target: str) -> tuple[Graph, PassResult]:
    after = graph.copy()
    result = Legalize(target).run(after, Context())
    after.tidy()
    after.check(graph.signature())
    return after, result


@pytest.mark.parametrize("kind", ["pot", "binary"])
def test_weights_are_decoded_for_a_target_without_a_kernel(kind):
    graph = coded(kind)
    after, result = legalized(graph, "trt")
    assert [n.op for n in after.nodes] == ["MatMul"] and not after.function_protos
    assert provenance(after.nodes[0]).sources == ("net.fc",)
    assert [r.what for r in result.rewrites] == ["replace a local function by its body"]
    feeds = oracle.random_feeds(graph.signature().inputs)
    assert np.array_equal(oracle.run(graph, feeds)["y"], oracle.run(after, feeds)["y"])


@pytest.mark.parametrize("kind", ["pot", "binary"])
def test_a_target_with_a_kernel_gets_the_operator(kind):
    after, result = legalized(coded(kind), "tvm")
    assert [n.domain for n in after.nodes] == [ops.DOMAIN] and after.function_protos and not result.rewrites


def test_what_depends_on_an_input_stays_computed():
    graph = coded("pot", constant=False)
    after, _ = legalized(graph, "trt")
    assert {"Pow", "MatMul"} <= {n.op for n in after.nodes} and "BitShift" not in {n.op for n in after.nodes}
    feeds = oracle.random_feeds(graph.signature().inputs)
    np.testing.assert_allclose(oracle.run(graph, feeds)["y"], oracle.run(after, feeds)["y"], rtol=1e-6)


def test_a_body_of_another_opset_is_left_alone():
    after, result = legalized(coded("pot", opset=17), "trt")
    assert [n.op for n in after.nodes] == ["ShiftLinear"] and after.function_protos and not result.rewrites


def test_what_a_target_looks_up_as_a_plugin_stays():
    body = onnx.parser.parse_function('<opset_import: ["" : 18], domain: "DOMAIN">\nOwn (x) => (y) { y = Relu (x) }')
    left = []
    for domain in ("trt.plugins", "own"):
        body.domain = domain
        ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in "xy"]
        graph = helper.make_graph([helper.make_node("Own", ["x"], ["y"], domain=domain)], "g", ports[:1], ports[1:])
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
        model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9)
        left += [n.op for n in legalized(Graph.from_proto(model), "trt")[0].nodes]
    assert left == ["Own", "Relu"]


def test_a_small_file_cannot_ask_for_much_memory():
    body = onnx.parser.parse_function(
        '<opset_import: ["" : 18], domain: "own">\nBig (x) => (y) {\n'
        "n = Constant <value_ints = [1000000, 1000000]> ()\n z = ConstantOfShape (n)\n y = Add (x, z)\n}"
    )
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in "xy"]
    node = helper.make_node("Big", ["x"], ["y"], domain="own")
    graph = helper.make_graph([node], "g", ports[:1], [onnx.ValueInfoProto(name="y")])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    after = Graph.from_proto(helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9))
    Legalize("trt").run(after, Context())
    assert {n.op for n in after.nodes} == {"ConstantOfShape", "Add"}
