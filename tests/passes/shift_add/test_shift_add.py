"""The pass shift_add: what it rewrites and what not, that it computes what the codes say, budgets, provenance."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from edgecompile import oracle
from edgecompile.calibration_data import open_data
from edgecompile.graph import Graph, provenance
from edgecompile.passes.shift_add import ShiftAdd, codes, layers, ops
from edgecompile.pipeline import Context, PassResult, Pipeline

pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
NET = """(float[2,16,5,5] x) => (float[2,3] y) {
    a = Conv (x, w, b)  r = Relu (a)  c = Conv <strides=[2,2]> (r, v)  d = Conv <pads=[1,1,1,1]> (c, k)
    t = Transpose <perm=[0,2,3,1]> (d)  m = MatMul (t, u)  n = Add (m, o)  z = ReduceMean <keepdims=0, axes=[1,2]> (n)
    y = Gemm <transB=1, alpha=0.5, beta=2.0> (z, g, h)
}"""


def graph_of(text: str, opset: int = 17, **weights: np.ndarray) -> Graph:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items())
    for node in model.graph.node:
        node.name = node.output[0]
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'net.{node.output[0]}', '']")
    return Graph.from_proto(model)


def net(opset: int = 17) -> Graph:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))

    return graph_of(
        NET, opset, w=normal(24, 16, 1, 1), b=normal(24, 1)[:, 0], v=normal(20, 24, 1, 1), k=normal(20, 20, 3, 3),
        u=normal(20, 12), o=normal(12, 1)[:, 0], g=normal(3, 12), h=normal(3, 1)[:, 0],
    )  # fmt: skip


def run(graph: Graph, *, calibrated: bool = False, limit: int | None = None, **options) -> PassResult:
    ports = graph.signature().inputs
    data = open_data([oracle.random_feeds(ports, seed) for seed in range(8)], ports) if calibrated else None
    context = Context(limit=limit, calibration=data)
    context.begin("shift_add")
    return ShiftAdd(**options).run(graph, context)


def outputs(graph: Graph, seed: int = 9) -> np.ndarray:
    return oracle.run(graph, oracle.random_feeds(graph.signature().inputs, seed))["y"]


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(("code", "bits"), [("pot", 4), ("sp2", 8), ("binary", 3)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_graph_computes_with_the_coded_weights(opset, code, bits, calibrated):
    graph = net(opset)
    reference = graph.copy()
    result = run(graph, code=code, bits=bits, group=8, calibrated=calibrated)
    assert len(result.rewrites) == 4
    graph.check(reference.signature())
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    # The same network with the decoded weights put where the float ones were.
    reference.infer_shapes()
    found = {layer.node.name: layer for layer in layers.find(reference)}
    grams = {}
    if calibrated:
        ports = reference.signature().inputs
        feeds = list(open_data([oracle.random_feeds(ports, s) for s in range(8)], ports).feeds())
        grams = layers.grams(reference, list(found.values()), feeds)
    for layer in found.values():
        gram = grams.get(layer.source.name)
        decoded = codes.encode(layer.weight, code, bits, group=8, gram=gram).decode()
        old = reference.constant(layer.node.inputs[1])
        assert old is not None
        if layer.node.op == "Gemm":
            decoded = decoded / 0.5
        new = decoded.T if layer.node.op == "MatMul" else decoded
        layer.node.inputs[1] = reference.new_constant("w", new.reshape(old.shape).astype(np.float32))
    np.testing.assert_allclose(outputs(graph), outputs(reference), rtol=1e-4, atol=1e-5)


def test_the_operators_stand_where_the_layers_were():
    graph = net()
    run(graph, code="pot")
    assert [n.op for n in graph.nodes if n.domain == ops.DOMAIN] == [
        "ShiftConv",
        "ShiftConv",
        "ShiftLinear",
        "ShiftLinear",
    ]
    assert sum(n.op == "Conv" for n in graph.nodes) == 1, "the 3x3 convolution stays"
    assert {f.name for f in graph.function_protos} == {"ShiftConv", "ShiftLinear"}
    first = next(n for n in graph.nodes if n.op == "ShiftConv")
    assert provenance(first).module == "net.a"


BAD = {
    "a kernel of 3x3": ("(float[1,4,6,6] x) => (float[1,4,4,4] y) { y = Conv (x, w) }", (4, 4, 3, 3)),
    "groups": ("(float[1,4,6,6] x) => (float[1,4,6,6] y) { y = Conv <group=2> (x, w) }", (4, 2, 1, 1)),
    "padding": ("(float[1,4,6,6] x) => (float[1,4,8,8] y) { y = Conv <pads=[1,1,1,1]> (x, w) }", (4, 4, 1, 1)),
    "a weight on the left": ("(float[4,6] x) => (float[4,6] y) { y = MatMul (w, x) }", (4, 4)),
    "a stack of matrices": ("(float[2,4,6] x) => (float[2,4,5] y) { y = MatMul (x, w) }", (2, 6, 5)),
    "a transposed input": ("(float[6,4] x) => (float[4,5] y) { y = Gemm <transA=1> (x, w) }", (6, 5)),
    "no constant": ("(float[4,6] x, float[6,5] v) => (float[4,5] y) { y = MatMul (x, v) }", (1,)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_linear_layer_is_left_alone(name):
    text, shape = BAD[name]
    graph = graph_of(text, w=RNG.standard_normal(shape))
    before = outputs(graph)
    assert not run(graph).rewrites
    assert np.array_equal(outputs(graph), before)


def test_old_opsets_are_left_alone():
    graph = graph_of("(float[4,6] x) => (float[4,5] y) { y = MatMul (x, w) }", opset=12, w=RNG.standard_normal((6, 5)))
    result = run(graph)
    assert not result.rewrites
    assert "opset 12" in str(result.notes[0])


def test_more_bits_leave_less_error_and_calibration_less_still():
    reference = outputs(net_ := net())

    def noise(**options):
        graph = net_.copy()
        run(graph, **options)
        return float(np.square(outputs(graph) - reference).sum())

    assert noise(bits=4) < noise(bits=3) < noise(bits=2)
    assert noise(code="sp2", bits=8) < noise(code="sp2", bits=4)


def test_a_budget_of_bytes_is_kept_and_spent_where_it_helps():
    graph = net()
    result = run(graph, code="pot", bits=0, size=0.12, group=0, calibrated=True)
    stored = [n.inputs[1].values.nbytes for n in graph.nodes if n.domain == ops.DOMAIN]
    floats = 4 * (24 * 16 + 20 * 24 + 20 * 12 + 3 * 12)
    assert sum(stored) <= 0.12 * floats
    assert len({n.inputs[1].values.shape[0] for n in graph.nodes if n.domain == ops.DOMAIN}) > 1, str(result.rewrites)
    assert "cannot be kept" in " ".join(map(str, run(net(), code="pot", bits=0, size=0.01).notes))


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_bits_go_where_the_outputs_need_them(scale):
    """Two layers of equal error in themselves, one of which hardly reaches the output: only running tells which."""
    weight = np.random.default_rng(5).standard_normal((16, 16))
    text = "(float[8,16] x) => (float[8,16] y) { b = MatMul (x, v)  c = Mul (b, s)  a = MatMul (x, w)  y = Add (a, c) }"
    graph = graph_of(text, w=weight, v=np.roll(weight, 1, 0), s=scale)
    run(graph, bits=0, size=0.16, group=0, calibrated=True)
    wide = {n.outputs[0].name: n.inputs[1].values.shape[0] for n in graph.nodes if n.domain == ops.DOMAIN}
    assert (wide["a"] > wide["b"]) == (scale < 1) and wide["a"] != wide["b"], wide


def test_skip_and_limit():
    assert len(run(net(), skip="net.a,Gemm").rewrites) == 2
    graph = net()
    assert len(run(graph, limit=1).rewrites) == 1
    assert sum(n.domain == ops.DOMAIN for n in graph.nodes) == 1


def test_without_calibration_data_the_budget_is_judged_on_the_inputs_of_the_pipeline():
    graph = net()
    before = outputs(graph)
    trace = Pipeline.parse("shift_add{code=pot,bits=2,min_snr=100}").run(graph)
    assert not trace.failures and not trace.rewrites
    assert "inputs that verify" in " ".join(map(str, trace.steps[0].notes))
    assert np.array_equal(outputs(graph), before)
    assert len(Pipeline.parse("shift_add{code=sp2,bits=8,min_snr=15}").run(net()).rewrites) == 4


@pytest.mark.parametrize(
    "options",
    [{"code": "shift"}, {"bits": 5}, {"code": "binary", "bits": 8}, {"size": 0.0}, {"group": -1}, {"window": 4}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError):
        ShiftAdd(**options)


def test_strides_are_heeded_in_the_statistics():
    graph = net()
    graph.infer_shapes()
    found = list(layers.find(graph))
    ports = graph.signature().inputs
    feeds = [oracle.random_feeds(ports, s) for s in range(2)]
    gram = layers.grams(graph, found, feeds)[found[1].source.name]
    seen = np.concatenate([oracle.run(_probe(graph, found[1].source.name), f)["probe"] for f in feeds])
    flat = np.moveaxis(seen[:, :, ::2, ::2], 1, -1).reshape(-1, 24).astype(np.float64)
    np.testing.assert_allclose(gram, flat.T @ flat, rtol=1e-4, atol=1e-5)


def _probe(graph: Graph, name: str) -> Graph:
    """The graph with one inner tensor as its only output."""
    part = graph.copy()
    tensor = part.tensors()[name]
    tensor.name = "probe"
    part.outputs = [tensor]
    part.tidy()
    return part
