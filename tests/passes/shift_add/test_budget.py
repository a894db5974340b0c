"""Budgets of quality: what is reverted, which bits are chosen, what is remembered, and what is told of the choice."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from test_attention import SPELLINGS
from test_attention import feeds as attention_feeds
from test_attention import graph_of as attention_graph
from test_shift_add import graph_of, net, outputs

from edgecompile import oracle, qdq, tradeoff
from edgecompile.calibration_data import open_data
from edgecompile.errors import InputError
from edgecompile.functions import CODED
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import ShiftAdd, choices, codes
from edgecompile.pipeline import Context, Drop, PassResult

pytest.importorskip("onnxruntime")


def samples(graph: Graph, count: int = 8) -> list[dict[str, np.ndarray]]:
    return [oracle.random_feeds(graph.signature().inputs, seed) for seed in range(count)]


def run(graph: Graph, cache: Path | None = None, evaluate=None, given=None, **options) -> PassResult:
    data = open_data(given or samples(graph), graph.signature().inputs)
    context = Context(calibration=data, cache=cache, evaluate=evaluate)
    context.begin("shift_add")
    return ShiftAdd(**options).run(graph, context)


def level(graph: Graph, reference: Graph) -> float:
    given = samples(reference)
    return qdq.snr([oracle.run(reference, f) for f in given], [oracle.run(graph, f) for f in given])


def coded(graph: Graph) -> int:
    return sum(n.op in CODED for n in graph.nodes)


def test_layers_that_cost_most_go_back_until_the_outputs_are_good_enough():
    free = net()
    run(free, bits=2)
    assert coded(free) == 4
    lowest = level(free, net())
    graph = net()
    result = run(graph, bits=2, min_snr=lowest + 3)
    assert 0 < coded(graph) < 4
    assert level(graph, net()) >= lowest + 3 - 0.01
    found = result.sensitivity
    assert found is not None and found.holds and found.finished and found.form == "shift-add"
    assert found.whole == pytest.approx(lowest, abs=0.01)
    assert sum(row.reverted for row in found.table) == 4 - coded(graph)
    # The first is that whose own noise and whose absence say most.
    noise = [10 ** (-row.only_int8 / 10) + max(0, 10 ** (-found.whole / 10) - 10 ** (-row.only_float / 10))
             for row in found.table if row.only_int8 is not None and row.only_float is not None]  # fmt: skip
    assert len(noise) == 4 and noise == sorted(noise, reverse=True)
    assert "left in floating point to keep the budget" in " ".join(map(str, result.notes))


def test_what_no_layer_can_keep_leaves_the_graph_as_it_was():
    graph = net()
    result = run(graph, bits=2, min_snr=200)
    assert not result.rewrites and coded(graph) == 0
    assert np.array_equal(outputs(graph), outputs(net()))


def test_a_score_is_kept():
    original = net()
    given = samples(original, 24)
    right = np.stack([oracle.run(original, f)["y"] for f in given])

    def closeness(graph: Graph, simulate: bool) -> float:
        found = np.stack([oracle.run(graph, f)["y"] for f in given])
        return 50 - 50 * float(np.linalg.norm(found - right) / np.linalg.norm(right))

    free = net()
    run(free, bits=2)
    drop = (50 - closeness(free, False)) / 2
    for budget in (Drop(f"{drop:.6f}"), Drop(f"{2 * drop:.6f}%")):
        graph = net()
        result = run(graph, bits=2, max_drop=budget, evaluate=closeness)
        assert result.sensitivity is not None and result.sensitivity.base == 50.0
        assert closeness(graph, False) >= 50 - drop - 1e-5 and 0 < coded(graph) < 4
        assert all(row.score is not None for row in result.sensitivity.table)
    with pytest.raises(InputError, match="needs a score"):
        run(net(), bits=2, max_drop=Drop("5%"))


@pytest.mark.parametrize("budget", [8.0, 14.0])
def test_the_fewest_bytes_that_hold_the_budget(budget):
    graph = net()
    result = run(graph, code="pot", bits=0, min_snr=budget)
    assert level(graph, net()) >= budget - 0.01
    assert result.sensitivity is not None and result.sensitivity.holds
    found = {row.position: row.bits for row in result.sensitivity.table}
    # One uniform width that holds the budget takes no fewer bytes.
    for bits in codes.WIDTHS["pot"]:
        other = net()
        run(other, code="pot", bits=bits)
        if level(other, net()) >= budget:
            uniform = sum(n.inputs[1].values.nbytes for n in other.nodes if n.op in CODED)
            assert sum(n.inputs[1].values.nbytes for n in graph.nodes if n.op in CODED) <= uniform
            break
    assert set(found.values()) <= set(codes.WIDTHS["pot"])


def test_a_stricter_budget_takes_more_bytes():
    free, sizes = net(), []
    run(free, bits=2)
    for more in (-1, 5, 9):
        graph = net()
        run(graph, bits=0, min_snr=level(free, net()) + more)
        sizes.append(sum(n.inputs[1].values.nbytes for n in graph.nodes if n.op in CODED))
    assert sizes == sorted(sizes) and len(set(sizes)) > 1


def test_what_was_measured_is_remembered(tmp_path, monkeypatch):
    made = []
    plain = choices.coded_graph
    monkeypatch.setattr(choices, "coded_graph", lambda *given: made.append(given[2]) or plain(*given))
    first, again, other = net(), net(), net()
    run(first, bits=2, min_snr=8, cache=tmp_path)
    count = len(made)
    assert count > 4
    run(again, bits=2, min_snr=8, cache=tmp_path)
    assert len(made) == count, "all of it was known"
    assert np.array_equal(outputs(again), outputs(first))
    run(other, bits=3, min_snr=8, cache=tmp_path)
    assert len(made) > count, "other codes are other figures"


def test_too_little_time_is_told():
    result = run(net(), bits=2, min_snr=8, seconds=0.0)
    assert result.sensitivity is not None and not result.sensitivity.finished
    assert "option seconds" in " ".join(map(str, result.notes))
    assert "option seconds" not in " ".join(map(str, run(net(), bits=2, min_snr=8).notes))


def test_attention_under_a_budget_stays_as_it_is_where_it_costs_too_much():
    given = [attention_feeds(seed) for seed in range(6)]
    text = SPELLINGS["a scale after"]
    for budget, wanted in ((0.1, "BinarySoftmaxAttention"), (60.0, "Softmax")):
        graph = attention_graph(text)
        result = run(graph, given=given, linear=False, attention="hamming", min_snr=budget)
        assert any(n.op == wanted for n in graph.nodes)
        assert result.sensitivity is not None and result.sensitivity.form == "hamming attention"
        assert len(result.rewrites) == (wanted != "Softmax")


TWINS = "(float[4,16] x) => (float[4,16] y) { a = MatMul (x, w) r = Relu (a) b = MatMul (r, v) y = Relu (b) }"


@pytest.mark.parametrize("same", [True, False])
def test_equal_weights_are_coded_and_stored_once(same):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 16))
    graph = graph_of(TWINS, w=w, v=w if same else rng.standard_normal((16, 16)))
    reference = graph.copy()
    result = run(graph, code="sp2", bits=8)
    assert len({id(n.inputs[1]) for n in graph.nodes if n.op in CODED}) == (1 if same else 2)
    assert coded(graph) == 2 and len(result.rewrites) == (1 if same else 2)
    assert len([t for t in graph.to_proto().graph.initializer if "planes" in t.name]) == (1 if same else 2)
    assert level(graph, reference) > 20


def test_the_curve_counts_bytes_and_energy_and_marks_what_was_built():
    rng = np.random.default_rng(0)
    text = "(float[B,3,16] x) => (float[B,3,8] y) { y = MatMul (x, w) }"
    graph = graph_of(text, w=rng.standard_normal((16, 8)))
    result = run(graph, code="pot", bits=4, given=[{"x": rng.standard_normal((1, 3, 16)).astype(np.float32)}] * 3)
    found = result.tradeoff
    assert found is not None
    assert [p.label for p in found.points] == ["float32", *(f"pot, {b} bits" for b in (2, 3, 4, 8))]
    assert [p.label for p in found.points if p.chosen] == ["pot, 4 bits"]
    assert [p.bytes for p in found.points] == [512, *(b * 8 * 2 + 8 for b in (2, 3, 4, 8))]
    plain, *others = (p.picojoules for p in found.points)
    assert plain == pytest.approx(3 * 8 * 16 * (3.7 + 0.9))
    assert others == [pytest.approx(3 * 8 * 16 * (0.13 + 0.1))] * 4
    snr = [p.snr for p in found.points]
    assert snr[0] == math.inf and snr[1:4] == sorted(snr[1:4])
    binary = graph_of(text, w=rng.standard_normal((16, 8)))
    made = run(binary, bits=3).tradeoff
    assert made is not None
    chosen = next(p for p in made.points if p.chosen)
    assert chosen.picojoules == pytest.approx(3 * 8 * 16 * 3 * (0.1 + 2 * (0.13 + 0.1) / 16))


def test_the_curve_shows_a_choice_of_several_widths_and_leaves_out_what_it_cannot_know():
    found = run(net(), code="pot", bits=0, size=0.1, group=0).tradeoff
    assert found is not None and found.points[-1].label == "as chosen" and found.points[-1].chosen
    graph = graph_of("(float[1,S,16] x) => (float[1,S,8] y) { y = MatMul (x, w) }", w=np.ones((16, 8)))
    made = run(graph, given=[{"x": np.ones((1, 3, 16), np.float32)}]).tradeoff
    assert made is not None and all(p.picojoules is None for p in made.points)
    assert "ISSCC 2014" in tradeoff.SOURCE
    assert run(net(), skip="*").tradeoff is None
