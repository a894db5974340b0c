"""Each rewrite computes what the network did, helps int8, and leaves alone what it would change."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import calibration, equalize, oracle, qdq
from edgecompile.equalize import Skipped
from edgecompile.graph import Graph
from edgecompile.placement import ORT_CPU, TENSORRT, place

EXACT = 1e-5


def graph_of(text: str, **weights: np.ndarray) -> Graph:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items())
    graph = Graph.from_proto(model)
    graph.tidy()
    graph.infer_shapes()
    return graph


def feeds_of(graph: Graph, count: int = 8) -> list[oracle.Outputs]:
    return [oracle.random_feeds(graph.signature().inputs, seed) for seed in range(count)]


def difference(one: Graph, two: Graph) -> float:
    errors = [oracle.compare_all(oracle.run(one, f), oracle.run(two, f)) for f in feeds_of(one)]
    return max(e.max_rel for e in oracle.worst(errors).values())


def int8_snr(graph: Graph, reference: Graph | None = None, biases=None, rules=ORT_CPU) -> float:
    """Signal-to-noise ratio of the int8 form of a graph against the floating-point form of another."""
    data = feeds_of(graph)
    placement = place(graph, rules, ends=True)
    ranges = calibration.collect(graph, data, list(placement.points), "minmax", symmetric=rules.symmetric)
    made = qdq.quantized(graph, rules, ranges, None, biases, ends=True)
    return qdq.snr([oracle.run(reference or graph, f) for f in data], (oracle.run(made, f) for f in data))


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


# -- scale reparameterization ------------------------------------------------------------------------------------------

TOKENS = "(float[2,9,16] x) => (float[2,9,6] y, float[2,9,5] z) {{ n = LayerNormalization (x, g, s) {} }}"
READERS = {
    "add": "a = MatMul (n, w) y = Add (a, b) c = MatMul (n, v) z = Add (d, c)",
    "bare": "y = MatMul (n, w) z = MatMul (n, v)",
}


def tokens(readers: str) -> Graph:
    """A LayerNorm whose channels differ by a factor of 1000 and lie far from zero, as after training."""
    rng = np.random.default_rng(0)
    return graph_of(
        TOKENS.format(READERS[readers]), g=np.logspace(-1.5, 1.5, 16), s=rng.uniform(-4, 4, 16),
        w=rng.standard_normal((16, 6)) / np.logspace(-1.5, 1.5, 16)[:, None], b=rng.standard_normal(6),
        v=rng.standard_normal((16, 5)) / np.logspace(-1.5, 1.5, 16)[:, None], d=rng.standard_normal(5),
    )  # fmt: skip


def channel_ranges(graph: Graph) -> calibration.Ranges:
    axes = {node.outputs[0].name: axis for node, axis in equalize.norms(graph)}
    return calibration.collect(graph, feeds_of(graph), list(axes), "minmax", axes=axes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("readers", READERS)
def test_reparameterized_norms_are_exact_and_help(readers, symmetric):
    graph = tokens(readers)
    made = graph.copy()
    assert equalize.reparameterize_norms(made, channel_ranges(made), symmetric=symmetric) == []
    made.tidy()
    made.check(graph.signature())
    assert difference(graph, made) < EXACT
    (known,) = channel_ranges(made).values()
    low, high = np.asarray(known.per_channel).T
    width = 2 * np.maximum(-low, high) if symmetric else high - low
    np.testing.assert_allclose(width, width.mean(), rtol=1e-3)
    if not symmetric:
        np.testing.assert_allclose(low, low.mean(), atol=1e-3 * width.mean())
    rules = TENSORRT if symmetric else ORT_CPU
    assert int8_snr(made, graph, rules=rules) > int8_snr(graph, rules=rules) + 6


def test_the_shift_goes_into_an_add_that_is_there():
    graph = tokens("add")
    equalize.reparameterize_norms(graph, channel_ranges(graph))
    graph.tidy()
    assert ops(graph).count("Add") == 2
    bare = tokens("bare")
    equalize.reparameterize_norms(bare, channel_ranges(bare))
    bare.tidy()
    assert ops(bare).count("Add") == 2  # it had none
    scales_only = tokens("bare")
    equalize.reparameterize_norms(scales_only, channel_ranges(scales_only), symmetric=True)
    assert "Add" not in ops(scales_only)


@pytest.mark.parametrize(
    "text",
    [
        "(float[2,9,16] x) => (float[2,9,6] y, float[2,9,16] n) { n = LayerNormalization (x, g, s) y = MatMul (n, w) }",
        "(float[2,9,16] x) => (float[2,9,6] y) { n = LayerNormalization (x, g, s) r = Relu (n) y = MatMul (r, w) }",
        "(float[2,9,16] x) => (float[2,9,6] y, float[2,9,16] z) { n = LayerNormalization (x, g, s) y = MatMul (n, w) z = Add (x, n) }",  # noqa: E501
    ],
)
def test_a_norm_that_others_read_is_left_alone(text):
    rng = np.random.default_rng(0)
    graph = graph_of(text, g=rng.uniform(1, 2, 16), s=rng.standard_normal(16), w=rng.standard_normal((16, 6)))
    assert not list(equalize.norms(graph))
    before = graph.digest()
    assert equalize.reparameterize_norms(graph, {}) == [] and graph.digest() == before


def test_a_norm_without_channel_ranges_says_so():
    graph = tokens("add")
    before = graph.digest()
    (skipped,) = equalize.reparameterize_norms(graph, {})
    assert skipped.why == "its channels were not calibrated" and graph.digest() == before


def test_a_channel_that_is_always_zero_stays_finite():
    graph = tokens("add")
    for index in (1, 2):
        node = graph.nodes[0]
        values = node.inputs[index].values.copy()
        values[3] = 0
        node.inputs[index] = graph.new_constant("dead", values)
    made = graph.copy()
    equalize.reparameterize_norms(made, channel_ranges(made))
    assert difference(graph, made) < EXACT
    assert all(np.isfinite(v).all() for v in made.constants().values())


# -- equalisation ------------------------------------------------------------------------------------------------------

STACK = "(float[1,6,8,8] x) => (float[1,5,8,8] y) {{ a = Conv (x, w, b) c = {0} (a) d = Conv <group=8, pads=[1,1,1,1]> (c, v, e) f = {0} (d) y = Conv (f, u) }}"  # noqa: E501


def stack(between: str = "Relu") -> Graph:
    """A pointwise, depthwise, pointwise stack whose channels differ by a factor of 100."""
    rng = np.random.default_rng(0)
    spread = np.logspace(-1, 1, 8)
    return graph_of(
        STACK.format(between), w=rng.standard_normal((8, 6, 1, 1)) * spread[:, None, None, None],
        b=rng.standard_normal(8) * spread, v=rng.standard_normal((8, 1, 3, 3)), e=rng.standard_normal(8) * spread,
        u=rng.standard_normal((5, 8, 1, 1)) / spread[:, None, None],
    )  # fmt: skip


@pytest.mark.parametrize("between", ["Relu", "LeakyRelu <alpha=0.1>", "Identity"])
def test_equalised_layers_are_exact(between):
    graph = stack(between)
    if between == "Identity":
        graph = graph_of(
            "(float[1,6,8,8] x) => (float[1,5,8,8] y) { a = Conv (x, w, b) y = Conv (a, u) }",
            **{k: v for k, v in graph.constants().items() if k in "wbu"},
        )
    made = graph.copy()
    assert equalize.equalize(made) == []
    made.check(graph.signature())
    assert difference(graph, made) < EXACT
    assert made.digest() != graph.digest()
    assert int8_snr(made, graph) > int8_snr(graph) + 3


def test_magnitudes_move_the_difficulty_to_the_weights():
    graph = stack()
    data = feeds_of(graph)
    axes = {p.entry.name: 1 for p in equalize.links(graph) if isinstance(p, equalize.Link)}
    assert sorted(axes) == ["c", "f"]
    known = calibration.collect(graph, data, list(axes), "minmax", axes=axes)
    made = graph.copy()
    equalize.equalize(made, {n: np.abs(np.asarray(r.per_channel)).max(1) for n, r in known.items()})
    assert difference(graph, made) < EXACT
    after = calibration.collect(made, data, list(axes), "minmax", axes=axes)

    def unevenness(ranges) -> float:
        return max(float(np.ptp(np.log(np.asarray(r.per_channel)[:, 1]))) for r in ranges.values())

    assert unevenness(after) < unevenness(known) / 1.5
    assert int8_snr(made, graph) > int8_snr(graph) + 3


def test_a_clip_is_not_homogeneous_and_is_left_alone():
    graph = graph_of(
        "(float[1,6,8,8] x) => (float[1,5,8,8] y) { a = Conv (x, w) c = Clip (a, lo, hi) y = Conv (c, u) }",
        w=np.random.default_rng(0).standard_normal((8, 6, 1, 1)), lo=np.float32(0), hi=np.float32(6),
        u=np.random.default_rng(1).standard_normal((5, 8, 1, 1)),
    )  # fmt: skip
    before = graph.digest()
    (skipped,) = equalize.equalize(graph)
    assert "homogeneous" in skipped.why and graph.digest() == before


def test_a_tensor_with_two_readers_is_left_alone():
    rng = np.random.default_rng(0)
    graph = graph_of(
        "(float[1,6,8,8] x) => (float[1,5,8,8] y, float[1,8,8,8] z) { a = Conv (x, w) y = Conv (a, u) z = Exp (a) }",
        w=rng.standard_normal((8, 6, 1, 1)), u=rng.standard_normal((5, 8, 1, 1)),
    )  # fmt: skip
    before = graph.digest()
    assert equalize.equalize(graph) == [] and graph.digest() == before
    assert not [p for p in equalize.links(graph) if not isinstance(p, Skipped)]


def test_apply_may_refuse():
    graph = stack()
    before = graph.digest()
    asked = []
    equalize.equalize(graph, apply=lambda what, node: asked.append((what, node.op)) is not None)
    assert graph.digest() == before and set(asked) == {("cross-layer equalisation", "Conv")}


# -- bias correction ---------------------------------------------------------------------------------------------------


def biased() -> Graph:
    """A depthwise layer of positive inputs, then a Gemm: rounding errors of its weights add up to a mean."""
    rng = np.random.default_rng(5)
    return graph_of(
        "(float[1,8,8,8] x) => (float[1,6] y) { s = Sigmoid (x) d = Conv <group=8, pads=[1,1,1,1]> (s, v) r = Relu (d) p = GlobalAveragePool (r) f = Flatten (p) y = Gemm (f, u, t) }",  # noqa: E501
        v=rng.standard_normal((8, 1, 3, 3)), u=rng.standard_normal((8, 6)), t=rng.standard_normal(6),
    )  # fmt: skip


def corrections(graph: Graph, bits: int = 7):
    data = feeds_of(graph, 16)
    placement = place(graph, ORT_CPU, ends=True)
    ranges = calibration.collect(graph, data, list(placement.points), "minmax")
    widths = {id(m.node): bits for m in placement.layers}
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    found = equalize.corrected_biases(graph, placement, ranges, widths, data)
    return (
        data,
        placement,
        ranges,
        {position[i]: b for i, b in widths.items()},
        {position[i]: b for i, b in found.items()},
    )


def test_corrected_biases_reduce_the_error():
    graph = biased()
    data, _, ranges, bits, biases = corrections(graph)
    reference = [oracle.run(graph, f) for f in data]

    def error(chosen) -> float:
        made = qdq.quantized(graph, ORT_CPU, ranges, bits, chosen, ends=True)
        made.check(graph.signature())
        return float(
            np.abs(np.mean([oracle.run(made, f)["y"] - r["y"] for f, r in zip(data, reference, strict=True)], 0)).mean()
        )

    assert error(biases) < 0.5 * error(None)
    wrong = {
        i: 2 * (graph.nodes[i].inputs[2].values if len(graph.nodes[i].inputs) > 2 else 0) - b for i, b in biases.items()
    }
    assert error(wrong) > error(None)  # the other way makes it worse


def test_the_correction_is_the_mean_of_what_rounding_adds():
    """With the zero padding of the layer: the mean over all positions of the layer's own output, to rounding."""
    graph = biased()
    data, placement, ranges, _, biases = corrections(graph)
    made = next(m for m in placement.layers if m.node.op == "Conv")
    number = next(i for i, n in enumerate(graph.nodes) if n is made.node)
    rounded = graph.copy()
    source = qdq.quantizers(placement, ranges)[placement.points[made.source.name].group]
    quantizer = qdq.layer_weights(made, source, 7, True)
    rounded.nodes[number].inputs[1] = rounded.new_constant(
        "rounded", quantizer.dequantize(quantizer.quantize(made.weight))
    )
    moved = [oracle.run(qdq.fragment(g, ["x"], ["d"]), f)["d"].mean((0, 2, 3)) for g in (rounded, graph) for f in data]
    expected = np.mean(moved[: len(data)], 0) - np.mean(moved[len(data) :], 0)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(-biases[number], expected, atol=2e-6)


@pytest.mark.parametrize("order", ["m, t", "t, m"])
def test_the_bias_of_a_matmul_is_in_the_add_after_it(order):
    rng = np.random.default_rng(1)
    graph = graph_of(
        f"(float[2,9,16] x) => (float[2,9,6] y) {{ s = Sigmoid (x) m = MatMul (s, w) y = Add ({order}) }}",
        w=rng.standard_normal((16, 6)), t=rng.standard_normal((1, 1, 6)),
    )  # fmt: skip
    data, _, ranges, bits, biases = corrections(graph)
    reference = [oracle.run(graph, f) for f in data]
    plain, corrected = (qdq.quantized(graph, ORT_CPU, ranges, bits, b, ends=True) for b in (None, biases))
    corrected.check(graph.signature())
    errors = [
        np.abs(
            np.mean([oracle.run(g, f)["y"] - r["y"] for f, r in zip(data, reference, strict=True)], (0, 1, 2))
        ).mean()
        for g in (plain, corrected)
    ]
    assert errors[1] < 0.5 * errors[0]
    rest = qdq.quantized(graph, ORT_CPU, ranges, {}, biases)
    assert difference(graph, rest) == 0  # a layer that stays in floating point keeps its bias


def test_exact_weights_need_no_correction():
    graph = biased()
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm"):
            node.inputs[1] = graph.new_constant("whole", np.sign(node.inputs[1].values))
    *_, biases = corrections(graph)
    for number, bias in biases.items():
        node = graph.nodes[number]
        before = node.inputs[2].values if len(node.inputs) > 2 else np.zeros_like(bias)
        np.testing.assert_allclose(bias, before, atol=1e-6)
