"""Widths and layers are chosen by evidence: recorded from kernels that saturate, and measured on those at hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import calibration, measure, oracle, qdq, sensitivity
from edgecompile.graph import Graph
from edgecompile.pipeline import Drop
from edgecompile.placement import ORT_CPU, place
from edgecompile.sensitivity import Evidence, choose_bits, saturates

# Recorded with ONNX Runtime 1.31 on a CPU with AVX2 and without VNNI (QEMU's `max`), dB: 32 channels, 8x8 positions.
# `heavy` has positive weights and activations far from zero, so that most pairs of products saturate.
RECORDED = {
    "pointwise": (Evidence({8: 36.88, 7: 37.53}, {8: 41.68, 7: 37.53}), 7),
    "full": (Evidence({8: 40.14, 7: 36.52}, {8: 40.14, 7: 36.52}), 8),
    "depthwise": (Evidence({8: 42.30, 7: 39.63}, {8: 42.30, 7: 39.63}), 8),
    "heavy": (Evidence({8: 26.77, 7: 53.54}, {8: 56.06, 7: 53.54}), 7),
}


# Layers of MobileNetV2 whose 8-bit kernel deviates there, calibrated on ImageNet photographs: dB of the kernel with
# weights of 8 and 7 bits, and of the simulation. The whole network: 8.8 dB with 8 bits (24.2 simulated), 21.4 with 7
# (21.5), 22.4 with the widths chosen here (22.7). No depthwise layer is among them.
MOBILENET = [
    (18.3, 41.9, 46.7, 7), (18.2, 22.6, 27.6, 7), (33.7, 34.8, 35.3, 7), (32.1, 37.5, 38.5, 7), (31.5, 29.6, 32.1, 8),
    (35.9, 36.1, 37.4, 7), (34.1, 38.9, 39.8, 7), (27.6, 39.2, 40.7, 7), (32.3, 39.0, 40.5, 7),
    (34.4, 38.4, 40.2, 7), (31.3, 37.5, 39.3, 7), (37.2, 38.2, 40.5, 7), (33.5, 30.5, 34.4, 8), (32.7, 37.5, 39.0, 7),
    (32.9, 37.5, 39.2, 7), (31.2, 35.5, 37.6, 7), (36.6, 37.8, 39.6, 7), (34.6, 38.1, 39.9, 7), (37.7, 36.4, 39.1, 8),
]  # fmt: skip


def graph_of(text: str, **weights: np.ndarray) -> Graph:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items())
    graph = Graph.from_proto(model)
    graph.infer_shapes()
    return graph


def network(seed: int = 0) -> Graph:
    """Four layers; the second multiplies one channel by a thousand, which the third hides: poison for one scale."""
    rng = np.random.default_rng(seed)
    text = "(float[1,8,6,6] x) => (float[1,8] y) { a = Conv (x, w) b = Conv (a, v) c = Conv (b, u) p = GlobalAveragePool (c) f = Flatten (p) y = Gemm (f, t) }"  # noqa: E501
    w, v, u = (rng.standard_normal((8, 8, 1, 1)) for _ in range(3))
    v[0] *= 1000
    u[:, 0] /= 1000
    return graph_of(text, w=w, v=v, u=u, t=rng.standard_normal((8, 8)))


def prepared(graph: Graph):
    feeds = [oracle.random_feeds(graph.signature().inputs, seed) for seed in range(4)]
    placement = place(graph, ORT_CPU, ends=True)
    ranges = calibration.collect(graph, feeds, list(placement.points), "minmax")
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    return feeds, placement, ranges, {position[id(m.node)]: 8 for m in placement.layers}


@pytest.mark.parametrize("name", RECORDED)
def test_the_width_follows_recorded_evidence(name):
    found, bits = RECORDED[name]
    assert choose_bits(found) == bits
    assert found.deviates == (bits == 7)


@pytest.mark.parametrize(("eight", "seven", "simulated", "bits"), MOBILENET)
def test_the_width_of_each_layer_of_mobilenet(eight, seven, simulated, bits):
    found = Evidence({8: eight, 7: seven}, {8: simulated, 7: seven})
    assert found.deviates and choose_bits(found) == bits
    assert choose_bits(Evidence({8: simulated, 7: seven}, {8: simulated, 7: seven})) == 8


def test_a_kernel_that_deviates_but_is_better_in_8_bits_keeps_them():
    assert choose_bits(Evidence({8: 20.0, 7: 19.0}, {8: 24.0, 7: 19.0})) == 8
    assert choose_bits(Evidence({8: 18.0, 7: 19.0}, {8: 18.2, 7: 19.0})) == 8  # 7 bits are better by luck only


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (("avx", "avx2", "fma"), True),
        (("avx2", "avx512f", "avx512bw"), True),
        (("avx2", "avx512f", "avx512_vnni"), False),
        (("avx2", "avx_vnni"), False),
        (("asimd", "asimddp"), False),
        ((), False),
    ],
)
def test_which_instruction_sets_saturate(features, expected):
    assert saturates(features) is expected


def test_kernels_here_do_what_their_instruction_set_says():
    """Where products accumulate in 32 bits, all evidence is that of the simulation; elsewhere heavy layers deviate."""
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    graph = graph_of("(float[1,32,8,8] x) => (float[1,32,8,8] y) { a = Conv (x, w) y = Relu (a) }",
                     w=np.abs(rng.standard_normal((32, 32, 1, 1))) + 0.5)  # fmt: skip
    feeds = [{"x": (3 + 0.2 * rng.standard_normal((1, 32, 8, 8))).astype(np.float32)} for _ in range(2)]
    placement = place(graph, ORT_CPU, ends=True)
    ranges = calibration.collect(graph, feeds, list(placement.points), "minmax")
    (found,) = sensitivity.evidence(graph, ORT_CPU, ranges, placement, feeds).values()
    assert found.simulated[8] > found.simulated[7]
    assert found.deviates == saturates(measure.cpu_features())
    assert abs(found.real[7] - found.simulated[7]) < 0.5


def test_activations_are_those_of_the_whole_graph():
    graph = network()
    feeds, *_ = prepared(graph)
    seen = list(sensitivity.activations(graph, ["x", "b", "f"], feeds))
    whole = qdq.fragment(graph, ["x"], ["b", "f"])
    for one, own in zip(seen, feeds, strict=True):
        expected = oracle.run(whole, own)
        assert one["x"] is own["x"]
        for name, value in expected.items():
            np.testing.assert_allclose(one[name], value, atol=1e-6 * np.abs(value).max())


def test_the_worst_layers_are_reverted_until_the_budget_holds():
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    free = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, ends=True)
    assert free.holds and len(free.bits) == 4 and free.snr < 20
    found = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, min_snr=30.0, ends=True)
    assert found.holds and found.snr >= 30 and 0 < len(found.bits) < 4 and found.finished
    reverted = {r.position for r in found.table if r.reverted}
    assert reverted == bits.keys() - found.bits.keys()
    assert {1, 2} <= reverted  # the poisoned pair: neither helps alone
    again = qdq.quantized(graph, ORT_CPU, ranges, found.bits, ends=True)
    reference = list(map(qdq.kernels(graph), feeds))
    assert qdq.snr(reference, map(qdq.kernels(again), feeds)) == pytest.approx(found.snr)


def test_the_table_tells_what_each_layer_costs():
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    found = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, min_snr=200.0, ends=True)
    assert not found.bits and found.holds and found.snr > 100  # nothing is int8 any more
    rows = {r.position: r for r in found.table}
    assert all(r.only_int8 is not None and r.only_float is not None for r in rows.values())
    alone = qdq.quantized(graph, ORT_CPU, ranges, {0: 8}, ends=True)
    reference = list(map(qdq.kernels(graph), feeds))
    assert rows[0].only_int8 == pytest.approx(qdq.snr(reference, map(qdq.kernels(alone), feeds)))


def test_without_time_nothing_is_claimed():
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    found = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, min_snr=30.0, seconds=-1.0, ends=True)
    assert not found.holds and not found.finished and len(found.bits) == 4


def test_a_score_decides_where_one_is_given():
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    reference = list(map(qdq.kernels(graph), feeds))

    def agreement(graph: Graph, simulate: bool) -> float:
        run = qdq.kernels(graph)
        return -float(np.mean([np.abs(run(f)["y"] - r["y"]).mean() for f, r in zip(feeds, reference, strict=True)]))

    free = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, evaluate=agreement, ends=True)
    assert free.base == 0 and free.score is not None and free.score < 0 and len(free.bits) == 4
    tight = sensitivity.search(
        graph, ORT_CPU, ranges, bits, feeds, evaluate=agreement, max_drop=Drop(f"{-free.score / 4}"), ends=True
    )
    assert tight.score is not None and -tight.score <= -free.score / 4 and len(tight.bits) < 4


def test_an_interrupted_search_goes_on_where_it_was(tmp_path, monkeypatch):
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    expected = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, min_snr=30.0, ends=True)
    made, real = [], qdq.quantized

    def interrupted(*arguments, **options):
        made.append(arguments)
        if len(made) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    def search(**changes):
        made.clear()
        settings = {"min_snr": 30.0, "ends": True, "cache": tmp_path} | changes
        return sensitivity.search(graph, ORT_CPU, ranges, bits, settings.pop("feeds", feeds), **settings)

    monkeypatch.setattr(qdq, "quantized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search()
    monkeypatch.setattr(qdq, "quantized", lambda *a, **k: (made.append(a), real(*a, **k))[1])
    assert search() == expected
    assert 0 < len(made) < 9  # nine in all; four were known
    assert search() == expected and not made
    assert not search(min_snr=0.0).table[0].reverted and not made  # another budget, the same evidence
    search(feeds=feeds[1:])
    assert made, "other inputs are other evidence"
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes().replace(b'"figures": {"', b'"figures": {"0', 1))
    assert search() == expected and made, "a damaged file is measured again"


def test_how_many_are_reverted_is_found_in_few_attempts():
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    budgets, scored = [30.0, 45.0, 60.0, 200.0], []

    def counted(trial: Graph, simulate: bool) -> float:
        scored.append(trial)
        return -sum(n.op == "QuantizeLinear" for n in trial.nodes)

    for budget in budgets:
        found = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, min_snr=budget, ends=True)
        assert found.holds and found.snr >= budget
        worst = [r.position for r in found.table if r.reverted]
        assert worst == [r.position for r in found.table[: len(worst)]]
        kept = {i: b for i, b in bits.items() if i not in worst[:-1]}
        trial = qdq.quantized(graph, ORT_CPU, ranges, kept, ends=True)
        reference = list(map(qdq.kernels(graph), feeds))
        assert qdq.snr(reference, map(qdq.kernels(trial), feeds)) < budget, "one fewer would not do"
    found = sensitivity.search(
        graph, ORT_CPU, ranges, bits, feeds, evaluate=counted, max_drop=Drop("0"), seconds=1e3, ends=True
    )
    assert found.holds and not found.bits and found.score == found.base == 0
    assert len(scored) == 2 + 4 + 3  # float and int8, each layer reverted, then one, three and four of them
    assert all(r.score is not None for r in found.table)


def test_the_table_is_made_where_it_is_cheap_or_asked_for(monkeypatch):
    graph = network()
    feeds, _, ranges, bits = prepared(graph)
    assert sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, ends=True).measured
    monkeypatch.setattr(sensitivity, "_CHEAP", -1.0)
    without = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, ends=True)
    assert not without.measured and without.finished and len(without.table) == 4
    assert sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, thorough=True, ends=True).measured
    late = sensitivity.search(graph, ORT_CPU, ranges, bits, feeds, thorough=True, seconds=-1.0, ends=True)
    assert late.holds and not late.finished


def test_signal_to_noise_ratio_of_the_worst_output():
    one = [{"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}]
    two = [{"a": np.ones(4, np.float32), "b": np.full(4, 1.1, np.float32)}]
    assert qdq.snr(one, two) == pytest.approx(20, abs=0.01)
    assert qdq.snr(one, one) == math.inf
    assert qdq.snr(one, [{"a": np.full(4, np.nan, np.float32), "b": two[0]["b"]}]) == -math.inf
