"""A graph as a torch module: each operator against ONNX Runtime, whole networks, batches, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgecompile.torch_graph import OPS, TorchGraph  # noqa: E402

RNG = np.random.default_rng(0)


def graph_of(text: str, opset: int = 20, **weights: np.ndarray) -> Graph:
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    return Graph.from_proto(model)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


IMAGE = "(float[2,4,6,7] x) => (float[N,A,B,C] y) "
TOKENS = "(float[2,5,8] x) => (float[A,B,C] y) "
FLAT = "(float[2,5,8] x) => (float[A,B] y) "
ONE = ("Abs", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Neg", "Reciprocal")
ONE += ("Relu", "Sigmoid", "Softplus", "Tanh", "Softmax")
CASES = {
    **{op: (TOKENS + f"{{ y = {op} (x) }}", {}) for op in ONE},
    **{op: (TOKENS + f"{{ y = {op} (x, w) }}", {"w": normal(8)}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")},
    "Log, Sqrt": (TOKENS + "{ a = Abs (x) b = Sqrt (a) c = Add (b, w) y = Log (c) }", {"w": np.float32([0.1])}),
    "Pow": (TOKENS + "{ y = Pow (x, w) }", {"w": np.float32([2])}),
    "Sum": (TOKENS + "{ y = Sum (x, w, x) }", {"w": normal(5, 8)}),
    "PRelu": (TOKENS + "{ y = PRelu (x, w) }", {"w": normal(8)}),
    "Gelu tanh": (TOKENS + '{ y = Gelu <approximate="tanh"> (x) }', {}),
    "Softmax axis": (TOKENS + "{ y = Softmax <axis=1> (x) }", {}),
    "Where, Greater": (TOKENS + "{ c = Greater (x, z) y = Where (c, x, w) }", {"z": np.float32([0]), "w": normal(8)}),
    "Where, Less": (TOKENS + "{ c = Less (x, z) y = Where (c, x, w) }", {"z": np.float32([0]), "w": normal(8)}),
    "Conv": (
        IMAGE + "{ y = Conv <pads=[1,0,1,2], strides=[2,1]> (x, w, b) }", {"w": normal(6, 4, 3, 3), "b": normal(6)},
    ),
    "Conv grouped": (IMAGE + "{ y = Conv <group=2, dilations=[2,1]> (x, w) }", {"w": normal(6, 2, 2, 3)}),
    "ConvTranspose": (
        IMAGE + "{ y = ConvTranspose <strides=[2,2], pads=[1,1,1,1]> (x, w, b) }",
        {"w": normal(4, 3, 4, 4), "b": normal(3)},
    ),
    "ConvTranspose uneven": (
        IMAGE + "{ y = ConvTranspose <strides=[2,2], pads=[1,1,0,0], group=2> (x, w) }",
        {"w": normal(4, 3, 3, 3)},
    ),
    "MaxPool": (IMAGE + "{ y = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]> (x) }", {}),
    "MaxPool uneven": (IMAGE + "{ y = MaxPool <kernel_shape=[2,2], pads=[0,0,1,1], strides=[2,2]> (x) }", {}),
    "AveragePool": (IMAGE + "{ y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (x) }", {}),
    "AveragePool counted": (
        IMAGE + "{ y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (x) }",
        {},
    ),
    "GlobalAveragePool": (IMAGE + "{ y = GlobalAveragePool (x) }", {}),
    "BatchNormalization": (
        IMAGE + "{ y = BatchNormalization <epsilon=0.01> (x, s, b, m, v) }",
        {"s": normal(4), "b": normal(4), "m": normal(4), "v": np.abs(normal(4))},
    ),
    "InstanceNormalization": (IMAGE + "{ y = InstanceNormalization (x, s, b) }", {"s": normal(4), "b": normal(4)}),
    "LayerNormalization": (TOKENS + "{ y = LayerNormalization (x, s, b) }", {"s": normal(8), "b": normal(8)}),
    "LayerNormalization axis": (TOKENS + "{ y = LayerNormalization <axis=1> (x, s) }", {"s": normal(5, 8)}),
    "Gemm": (
        "(float[5,4] x) => (float[4,3] y) { y = Gemm <transA=1, transB=1, alpha=0.5, beta=2.0> (x, w, b) }",
        {"w": normal(3, 5), "b": normal(3)},
    ),
    "MatMul": (TOKENS + "{ y = MatMul (x, w) }", {"w": normal(8, 3)}),
    "Transpose": (TOKENS + "{ y = Transpose <perm=[2,0,1]> (x) }", {}),
    "Transpose reversed": (TOKENS + "{ y = Transpose (x) }", {}),
    "Reshape": (TOKENS + "{ y = Reshape (x, s) }", {"s": ints(0, 4, -1)}),
    "Flatten": (FLAT + "{ y = Flatten <axis=2> (x) }", {}),
    "Concat": (TOKENS + "{ y = Concat <axis=1> (x, x) }", {}),
    "Split sizes": (TOKENS + "{ a, b = Split <axis=2> (x, s) y = Mul (b, t) }", {"s": ints(3, 5), "t": normal(5)}),
    "Split even": (TOKENS + "{ a, b = Split <axis=2, num_outputs=2> (x) y = Sub (a, b) }", {}),
    "Slice": (
        TOKENS + "{ y = Slice (x, s, e, a, t) }",
        {"s": ints(1, -7), "e": ints(4, 99), "a": ints(1, 2), "t": ints(1, 2)},
    ),
    "Slice backwards": (
        TOKENS + "{ y = Slice (x, s, e, a, t) }",
        {"s": ints(-1), "e": ints(-99), "a": ints(2), "t": ints(-2)},
    ),
    "Gather": (TOKENS + "{ y = Gather <axis=2> (x, i) }", {"i": ints(3, -1, 0)}),
    "Unsqueeze, Squeeze": (TOKENS + "{ a = Unsqueeze (x, i) b = Relu (a) y = Squeeze (b, i) }", {"i": ints(-2)}),
    "Expand": (TOKENS + "{ a = ReduceMean (x, i) y = Expand (a, s) }", {"i": ints(1), "s": ints(2, 5, 8)}),
    "ReduceMean": (TOKENS + "{ y = ReduceMean (x, i) }", {"i": ints(-1)}),
    "ReduceSum": (FLAT + "{ y = ReduceSum <keepdims=0> (x, i) }", {"i": ints(1)}),
    "ReduceMax": (TOKENS + "{ y = ReduceMax (x, i) }", {"i": ints(1, 2)}),
    "ReduceL2": (TOKENS + "{ y = ReduceL2 (x, i) }", {"i": ints(2)}),
    "Clip": (TOKENS + "{ y = Clip (x, a, b) }", {"a": np.float32(-0.5), "b": np.float32(0.7)}),
    "Pad": (IMAGE + "{ y = Pad (x, p, v) }", {"p": ints(0, 0, 1, 2, 0, 1, 0, 3), "v": np.float32(1.5)}),
    "Pad reflect": (IMAGE + '{ y = Pad <mode="reflect"> (x, p) }', {"p": ints(0, 0, 2, 1, 0, 0, 2, 1)}),
    "Resize nearest": (
        IMAGE
        + '{ y = Resize <coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (x, r, s) }',
        {"r": np.float32([]), "s": np.float32([1, 1, 2, 2])},
    ),
    "Resize linear": (
        IMAGE + '{ y = Resize <mode="linear", coordinate_transformation_mode="align_corners"> (x, r, t, s) }',
        {"r": np.float32([]), "t": np.float32([]), "s": ints(2, 4, 9, 5)},
    ),
    "DepthToSpace": (IMAGE + "{ y = DepthToSpace <blocksize=2> (x) }", {}),
    "DepthToSpace CRD": (IMAGE + '{ y = DepthToSpace <blocksize=2, mode="CRD"> (x) }', {}),
    "Shape arithmetic": (
        TOKENS + "{ s = Shape (x) a = Gather (s, i) b = Mul (a, j) c = Concat <axis=0> (b, k) y = Reshape (x, c) }",
        {"i": ints(0), "j": ints(2), "k": ints(-1, 4)},
    ),
    "Cast, Equal": (
        TOKENS + "{ c = Cast <to=6> (x) e = Equal (c, z) y = Cast <to=1> (e) }",
        {"z": np.int32([0])},
    ),
    "ConstantOfShape": (TOKENS + "{ s = Shape (x) z = ConstantOfShape (s) y = Add (x, z) }", {}),
    "GroupNormalization": (
        IMAGE + "{ y = GroupNormalization <num_groups=2> (x, s, b) }", {"s": normal(2), "b": normal(2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_computed_as_onnx_defines_it(name):
    text, weights = CASES[name]
    graph = graph_of(text, **weights)
    feeds = oracle.random_feeds(graph.signature().inputs, 3)
    expected = oracle.run(graph, feeds)["y"]
    with torch.no_grad():
        found = TorchGraph(graph)(torch.from_numpy(feeds["x"])).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_case():
    used = {node.op for text, weights in CASES.values() for node in graph_of(text, **weights).nodes}
    assert not set(OPS) - used


def test_an_unknown_operator_is_named():
    graph = graph_of(TOKENS + "{ y = Mish (x) }")
    with pytest.raises(InputError, match="cannot be trained") as caught:
        TorchGraph(graph)
    assert "Mish" in caught.value.why


def net() -> Graph:
    text = """(float[1,3,8,8] x) => (float[1,5] y) {
        a = Conv <pads=[1,1,1,1]> (x, w, b)  r = Relu (a)  s = Reshape (r, shape)  t = Transpose <perm=[0,2,1]> (s)
        m = ReduceMean <keepdims=0> (t, axes)  y = Gemm <transB=1> (m, u, v)
    }"""
    return graph_of(
        text, w=normal(6, 3, 3, 3), b=normal(6), shape=ints(1, 6, 64), axes=ints(1), u=normal(5, 6), v=normal(5)
    )


def test_a_graph_of_batch_1_takes_any_batch():
    graph = net()
    images = normal(4, 3, 8, 8)
    with torch.no_grad():
        found = TorchGraph(graph)(torch.from_numpy(images)).numpy()
    expected = np.concatenate([oracle.run(graph, {"x": one[None]})["y"] for one in images])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_training_reaches_every_weight_and_the_graph_gets_them():
    graph = net()
    module = TorchGraph(graph)
    assert {n for n, _ in module.named_parameters()} == {"w", "b", "u", "v"}
    x, before = torch.from_numpy(normal(4, 3, 8, 8)), graph.digest()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    optimizer.step()
    trained = module.to_graph()
    assert graph.digest() == before, "the graph given is not touched"
    assert trained.digest() != before
    with torch.no_grad():
        expected = module(x).numpy()
    found = np.concatenate([oracle.run(trained, {"x": one[None].numpy()})["y"] for one in x])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_inputs_is_checked():
    with pytest.raises(InputError, match="2 inputs were given"):
        TorchGraph(net())(torch.zeros(1, 3, 8, 8), torch.zeros(1))
