"""Each rule makes legal what it is for, changes nothing but rounding, and leaves alone what needs nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import oracle
from edgecompile.graph import Graph, provenance
from edgecompile.passes.legalize import RULES, Legalize
from edgecompile.pipeline import Context, PassResult

RNG = np.random.default_rng(0)
CONTRIB = "com.microsoft"


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def make(op, shapes, weights=(), opset=20, domain="", outputs=1, **attrs) -> Graph:
    """A graph of one node that reads inputs, then initializers; an initializer that is None is left out."""
    names = [f"x{i}" for i in range(len(shapes))] + ["" if w is None else f"c{i}" for i, w in enumerate(weights)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name="net.block.op", domain=domain, **attrs)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, s) for i, s in enumerate(shapes)],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [onnx.numpy_helper.from_array(w, f"c{i}") for i, w in enumerate(weights) if w is not None],
    )
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    rng = np.random.default_rng(1)
    feeds = {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    ort = pytest.importorskip("onnxruntime")
    for output, value in zip(
        graph.output, ort.InferenceSession(model.SerializeToString()).run(None, feeds), strict=True
    ):
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, value.shape))
    del model.graph.output[:]
    model.graph.output.extend(graph.output)
    return Graph.from_proto(model)


def legalized(graph: Graph, limit: int | None = None) -> PassResult:
    """Run the pass; what the graph computes stays the same."""
    feeds = oracle.random_feeds(graph.signature().inputs)
    before, signature = oracle.run(graph, feeds), graph.signature()
    context = Context(limit=limit)
    context.begin("legalize")
    result = Legalize(target="tvm").run(graph, context)
    graph.tidy()
    graph.check(signature)
    assert oracle.worst([oracle.compare_all(before, oracle.run(graph, feeds))]).popitem()[1].max_rel < 1e-5
    return result


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


W = random(4, 3, 3, 3)
T = random(3, 4, 3, 3)
NEEDED = {
    "reshape": (("Reshape", [(2, 3, 4)], [ints(0, -1)]), {}),
    "squeeze": (("Squeeze", [(2, 3, 1)], [ints(-1)]), {}),
    "unsqueeze": (("Unsqueeze", [(2, 3)], [ints(-1, 0)]), {}),
    "flatten": (("Flatten", [(2, 3, 4)]), {"axis": 2}),
    "split": (("Split", [(2, 7)]), {"opset": 18, "outputs": 3, "axis": 1, "num_outputs": 3}),
    "split of opset 13": (("Split", [(2, 6)]), {"opset": 13, "outputs": 3, "axis": -1}),
    "split of opset 11": (("Split", [(2, 6)]), {"opset": 11, "outputs": 3, "axis": -1}),
    "conv": (("Conv", [(1, 3, 7, 8)], [W]), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid conv": (("Conv", [(1, 3, 7, 8)], [W]), {"auto_pad": "VALID"}),
    "max pool": (
        ("MaxPool", [(1, 3, 7, 8)]),
        {"auto_pad": "SAME_LOWER", "kernel_shape": [3, 3], "strides": [2, 2]},
    ),
    "average pool": (("AveragePool", [(1, 3, 7, 8)]), {"auto_pad": "SAME_UPPER", "kernel_shape": [2, 2]}),
    "transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [2, 2], "output_shape": [10, 12]}),
    "odd transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [1, 1], "output_shape": [6, 7]}),
    "same transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "attention": (("Attention", [(1, 2, 4, 8)] * 3), {"opset": 23, "scale": 0.3}),
    "attention of three axes": (("Attention", [(1, 4, 16)] * 3), {"opset": 23, "q_num_heads": 2, "kv_num_heads": 2}),
    "celu": (("Celu", [(2, 4)]), {"alpha": 2.0}),
    "celu by default": (("Celu", [(2, 4)]), {}),
    "gelu": (("Gelu", [(2, 4)]), {"domain": CONTRIB}),
    "bias gelu": (("BiasGelu", [(2, 4)], [random(4)]), {"domain": CONTRIB}),
    "fast gelu": (("FastGelu", [(2, 4)], [random(4)]), {"domain": CONTRIB}),
    "quick gelu": (("QuickGelu", [(2, 4)]), {"domain": CONTRIB}),
    "fused matmul": (
        ("FusedMatMul", [(2, 4, 3), (2, 5, 4)]),
        {"domain": CONTRIB, "transA": 1, "transB": 1, "alpha": 0.5},
    ),
    "fused conv": (
        ("FusedConv", [(1, 3, 5, 5)], [W, random(4)]),
        {"domain": CONTRIB, "activation": "LeakyRelu", "activation_params": [0.3]},
    ),
    "fused conv with a sum": (
        ("FusedConv", [(1, 3, 5, 5)], [W, random(4), random(1, 4, 3, 3)]),
        {"domain": CONTRIB, "activation": "Relu"},
    ),
    "skip layer norm": (("SkipLayerNormalization", [(1, 3, 8)] * 2, [random(8)]), {"domain": CONTRIB}),
    "skip layer norm with all": (
        ("SkipLayerNormalization", [(1, 3, 8)] * 2, [random(8), random(8), random(8)]),
        {"domain": CONTRIB},
    ),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_rule_applies_once_and_for_all(name):
    arguments, options = NEEDED[name]
    graph = make(*arguments, **options)
    original = provenance(graph.nodes[0])
    result = legalized(graph)
    assert result.rewrites
    assert not {"auto_pad", "output_shape", "num_outputs"} & {k for n in graph.nodes for k in n.attrs}
    assert not {"Attention", "Celu"} & set(ops(graph))
    assert all(node.domain in (None, "") for node in graph.nodes)
    assert all(provenance(node).sources == original.sources for node in graph.nodes)
    assert not legalized(graph).rewrites


@pytest.mark.parametrize("name", NEEDED)
def test_a_rule_that_may_not_apply_changes_nothing(name):
    arguments, options = NEEDED[name]
    graph = make(*arguments, **options)
    before = ops(graph), [dict(n.attrs) for n in graph.nodes], [len(n.inputs) for n in graph.nodes]
    assert not legalized(graph, limit=0).rewrites
    assert (ops(graph), [dict(n.attrs) for n in graph.nodes], [len(n.inputs) for n in graph.nodes]) == before


LEGAL = {
    "reshape": (("Reshape", [(2, 3, 4)], [ints(2, 12)]), {}),
    "split": (("Split", [(2, 7)], [ints(3, 4)]), {"opset": 18, "outputs": 2, "axis": 1}),
    "conv": (("Conv", [(1, 3, 7, 8)], [W]), {"pads": [1, 1, 1, 1]}),
    "transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [2, 2], "output_padding": [1, 1]}),
    "gelu": (("Gelu", [(2, 4)]), {}),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_is_left_alone(name):
    arguments, options = LEGAL[name]
    result = legalized(make(*arguments, **options))
    assert not result.rewrites
    assert not result.notes


def test_a_reshape_whose_extent_is_unknown_is_left_alone():
    graph = make("Reshape", [(2, 3, 4)], [ints(0, -1)])
    graph.inputs[0].shape = ["batch", 3, 4]
    graph.outputs[0].shape = ["batch", 12]
    context = Context()
    context.begin("legalize")
    assert not Legalize().run(graph, context).rewrites


def test_what_no_rule_makes_legal_is_named():
    graph = make("FusedConv", [(1, 3, 5, 5)], [W], domain=CONTRIB, activation="Relu")
    graph.nodes[0].attrs["activation"] = "Unheard"
    context = Context()
    context.begin("legalize")
    result = Legalize().run(graph, context)
    assert not result.rewrites
    (note,) = result.notes
    assert "FusedConv" in note.where
    assert "com.microsoft::FusedConv" in note.text


def test_a_target_without_rules_is_refused():
    with pytest.raises(ValueError, match="tvm"):
        Legalize(target="tv")


def test_every_rule_says_why():
    for rules in RULES.values():
        assert all(rule.what and rule.why and rule.ops for rule in rules)
