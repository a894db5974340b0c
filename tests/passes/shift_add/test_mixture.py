"""Mixtures of experts by token: dense and dispatched give the same answer; what acts across tokens stays dense."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import oracle
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import ShiftAdd, ops
from edgecompile.pipeline import Context, PassResult, Pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


def run(graph: Graph, **options) -> PassResult:
    graph.infer_shapes()
    context = Context()
    context.begin("shift_add")
    return ShiftAdd(dispatch=True, **options).run(graph, context)


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def layer(request, tmp_path_factory) -> Graph:
    from edgecompile.models.shiftaddvit import MixtureLinear

    torch.manual_seed(0)
    path, dynamo = tmp_path_factory.mktemp("mixture") / "layer.onnx", request.param == "dynamo"
    module = MixtureLinear(12, 20).eval()
    x = torch.randn(2, 7, 12)
    torch.onnx.export(module, (x,), path, dynamo=dynamo, opset_version=20 if dynamo else 17)
    graph = Graph.load(path)
    Pipeline.parse("clean,fold_norm").run(graph)
    return graph


def outputs(graph: Graph, x: np.ndarray) -> np.ndarray:
    return next(iter(oracle.run(graph, {graph.inputs[0].name: x}).values()))


@pytest.mark.parametrize("linear", [False, True])
def test_one_expert_a_token_gives_what_two_gave(layer, linear):
    graph = layer.copy()
    result = run(graph, linear=linear, code="pot", bits=8)
    assert sum("one expert" in r.what for r in result.rewrites) == 1
    graph.check(layer.signature())
    dense = layer.copy()
    if linear:
        context = Context()
        context.begin("shift_add")
        ShiftAdd(code="pot", bits=8).run(dense, context)
        # The shifting expert was trained as shifts: its codes are exact.
        assert sum(n.op == "ShiftLinear" for n in graph.nodes) == 3
    assert any(n.op == "NonZero" for n in graph.nodes)
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((2, 7, 12)).astype(np.float32)
        np.testing.assert_allclose(outputs(graph, x), outputs(dense, x), rtol=1e-4, atol=1e-5)


def test_all_tokens_may_choose_the_same_expert(layer):
    graph = layer.copy()
    run(graph, linear=False)
    x = np.tile(np.random.default_rng(1).standard_normal((1, 1, 12)).astype(np.float32), (2, 7, 1))
    np.testing.assert_allclose(outputs(graph, x), outputs(layer, x), rtol=1e-4, atol=1e-5)


def test_without_the_option_it_stays_dense(layer):
    graph = layer.copy()
    context = Context()
    context.begin("shift_add")
    assert not ShiftAdd(linear=False).run(graph, context).rewrites
    assert not any(n.op == "NonZero" for n in graph.nodes)


HEAD = "(float[2,4,6] x, bool[2,4,1] c, bool[2,1,6] d) => (float[2,4,6] y) { a = MatMul (x, w) b = MatMul (x, v) "
DENSE = {
    "a choice per channel": HEAD + "y = Where (d, a, b) }",
    "tokens that mix": HEAD + "s = Softmax <axis=1> (b) y = Where (c, a, s) }",
    "a constant per token": HEAD + "s = Add (b, p) y = Where (c, a, s) }",
    "an expert without a layer": HEAD + "s = Relu (x) y = Where (c, a, s) }",
    "an expert used elsewhere": HEAD + "z = Where (c, a, b) y = Add (z, b) }",
}


@pytest.mark.parametrize("name", [*DENSE, "a mixture"])
def test_only_maps_of_single_tokens_are_dispatched(name):
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 6)), "v": rng.standard_normal((6, 6)), "p": rng.standard_normal((4, 6))}
    text = DENSE.get(name, HEAD + "y = Where (c, a, b) }")
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items())
    graph = Graph.from_proto(model)
    result = run(graph, linear=False)
    assert len(result.rewrites) == (name == "a mixture")
    assert not any(n.domain == ops.DOMAIN for n in graph.nodes)
