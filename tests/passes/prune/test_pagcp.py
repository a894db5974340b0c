"""PAGCP's walk on examples small enough to be worked by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.passes.prune.dependency import groups
from edgecompile.passes.prune.pagcp import factor, search


def chain(*widths: int) -> Graph:
    """3x3 convolutions of these widths one after the other on [1, 3, 6, 6], and a linear head; unit 0 weighs least."""
    rng = np.random.default_rng(0)
    nodes, weights, x, entry = [], {}, "x", 3
    for i, width in enumerate(widths):
        scale = np.arange(1, width + 1).reshape(-1, 1, 1, 1)
        weights[f"w{i}"] = (scale * rng.choice([-1, 1], (width, entry, 3, 3))).astype(np.float32)
        nodes += [helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], pads=[1] * 4),
                  helper.make_node("Relu", [f"c{i}"], [f"r{i}"])]  # fmt: skip
        x, entry = f"r{i}", width
    weights["head"] = rng.standard_normal((5, entry)).astype(np.float32)
    nodes += [helper.make_node("GlobalAveragePool", [x], ["mean"]), helper.make_node("Flatten", ["mean"], ["flat"]),
              helper.make_node("Gemm", ["flat", "head"], ["y"], transB=1)]  # fmt: skip
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def gone(graph: Graph, widths: tuple[int, ...]) -> list[int]:
    """How many units of each convolution are gone."""
    constants = graph.constants()
    return [n - constants[f"w{i}"].shape[0] for i, n in enumerate(widths)]


def test_the_thresholds_use_up_the_total():
    assert factor(2, 0.06, 1.06 * 1.03) == pytest.approx(0.5)
    assert factor(7, 0.06, 1.06**7) == pytest.approx(1)
    for count, rate, total in ((10, 0.06, 6.0), (60, 0.06, 6.0), (120, 0.01, 1.2), (300, 0.06, 6.0)):
        found = factor(count, rate, total)
        assert math.prod(1 + rate * found**i for i in range(count)) == pytest.approx(total, rel=1e-9)
    assert factor(10, 0.06, 6.0) > 1 > factor(300, 0.06, 6.0)
    assert factor(1, 0.06, 6.0) == 1
    with pytest.raises(InputError, match="first group alone"):
        factor(5, 0.06, 1.05)


def test_two_groups_by_hand():
    widths = (10, 20)
    graph = chain(*widths)
    found = groups(graph)
    calls: list[list[int]] = []

    def evaluate(cut: Graph) -> Mapping[str, float]:
        a, b = gone(cut, widths)
        calls.append([a, b])
        return {"box": 1 + 0.04 * a + 0.02 * b, "obj": 5.0}

    # The factor is 1: each group may cost 6 %. At 30 %, 3 units of c0 read 3 channels each and are read by 20 units; 6
    # of c1 read 10 channels each: c0 saves more and goes first. It may lose one unit, 1.04; two would be 1.08. Then the
    # base is 1.04, and c1 may lose three units: 1.10 / 1.04 = 1.058; with four it is 1.12 / 1.04 = 1.077.
    result = search(graph, found, evaluate, rate=0.06, total=1.06**2 * (1 - 1e-12), best=1)
    assert result.factor == pytest.approx(1)
    assert [s.group for s in result.steps] == ["c0", "c1"]
    assert calls == [[0, 0], [1, 0], [2, 0], [1, 1], [1, 2], [1, 3], [1, 4]]
    assert [s.increase for s in result.steps] == pytest.approx([0.04, 0.06 / 1.04])
    assert {n: k.tolist() for n, k in result.keep.items()} == {"c0": list(range(1, 10)), "c1": list(range(3, 20))}
    # 36 positions, 9 taps: one row of 3 channels and a column of 20; then three rows of 9 and 3 columns of the head.
    assert [s.saved for s in result.steps] == [36 * 9 * (3 + 20), 36 * 9 * 3 * 9 + 5 * 3]


def test_the_worst_task_decides_and_the_best_share_is_cut():
    widths = (10, 20)
    graph = chain(*widths)

    def evaluate(cut: Graph) -> Mapping[str, float]:
        a, b = gone(cut, widths)
        return {"box": 1 + 0.01 * a, "obj": 2 + 0.01 * a + 0.11 * b}

    options = {"rate": 0.06, "total": 1.06**2 * (1 + 1e-12)}
    result = search(graph, groups(graph), evaluate, **options, best=1)
    one, two = result.steps
    assert (one.group, two.group) == ("c1", "c0")
    assert one.increase == pytest.approx(0.055) and one.ratio == pytest.approx(0.05)  # obj: 2.11 / 2
    assert two.increase == pytest.approx(0.06) and two.ratio == pytest.approx(0.65)  # box: 6 of 10 units
    half = search(graph, groups(graph), evaluate, **options, best=0.5)
    cheaper = min(result.steps, key=lambda s: s.increase / s.saved)
    assert list(half.keep) == [cheaper.group] == [s.group for s in half.steps if s.chosen]


def test_growing_thresholds_start_with_the_group_that_saves_least():
    graph = chain(10, 20)
    result = search(graph, groups(graph), lambda cut: {"loss": 1.0}, rate=0.06, total=6.0, best=1)
    assert result.factor > 1 and [s.group for s in result.steps] == ["c1", "c0"]
    assert [len(result.keep[n]) for n in ("c0", "c1")] == [1, 1]  # what costs nothing goes, but for one unit
    assert result.steps[1].threshold == pytest.approx(0.06 * result.factor)


def test_what_costs_too_much_stays_whole():
    graph = chain(10, 20)
    sizes = gone(graph, (10, 20))
    result = search(graph, groups(graph), lambda cut: {"loss": 1.0 if gone(cut, (10, 20)) == sizes else 2.0},
                    total=1.06**2)  # fmt: skip
    assert not result.keep and [s.ratio for s in result.steps] == [0, 0]


def test_time_is_up():
    graph = chain(10, 20)
    told: list[str] = []
    result = search(graph, groups(graph), lambda cut: {"loss": 1.0}, seconds=0,
                    progress=lambda done, of, what: told.append(what))  # fmt: skip
    assert not result.keep and not told and set(result.unvisited) == {"c0", "c1"}
    search(graph, groups(graph), lambda cut: {"loss": 1.0}, progress=lambda done, of, what: told.append(what))
    assert told[0] == "c1: 19 of 20"


@pytest.mark.parametrize("losses", [{}, {"loss": 0.0}, {"loss": math.nan}, {"loss": -1.0}])
def test_losses_that_cannot_be_compared_are_refused(losses: dict[str, float]):
    graph = chain(4)
    with pytest.raises(InputError, match="evaluate"):
        search(graph, groups(graph), lambda cut: losses)
