"""Scores against closed forms: what a unit's weights weigh, what it adds to the next layer, what the outputs lose."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from networks import chain, samples

from edgecompile import sensitivity
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.passes.prune import scores
from edgecompile.passes.prune.dependency import groups


def normal(values: np.ndarray) -> np.ndarray:
    return values / values.mean()


def change(graph: Graph, **arrays: np.ndarray) -> Graph:
    for node in graph.nodes:
        for slot, tensor in enumerate(node.inputs):
            if tensor.name in arrays:
                node.inputs[slot] = graph.new_constant(tensor.name, arrays[tensor.name].astype(np.float32))
    return graph


def test_magnitude_is_the_normalised_energy_of_every_layer_of_the_group():
    graph = chain()
    w = graph.constants()
    found = scores.magnitude(graph, groups(graph))
    made = normal((w["b.w"] ** 2).sum((1, 2, 3))), normal((w["d.w"] ** 2).sum((1, 2, 3)))
    read = normal((w["c.w"] ** 2).sum((0, 2, 3)))
    np.testing.assert_allclose(found["b"], normal(made[0] + made[1] + read), rtol=1e-6)
    first = scores.magnitude(graph, groups(graph), order=1)
    parts = [normal(np.abs(w["c.w"]).sum((1, 2, 3))), normal(np.abs(w["h.w"]).sum(0))]
    np.testing.assert_allclose(first["c"], normal(sum(parts)), rtol=1e-6)


def test_magnitude_forgets_the_scale_of_a_layer_but_not_of_a_unit():
    graph = chain()
    before = scores.magnitude(graph, groups(graph))["c"]
    weight = graph.constants()["c.w"]
    whole = change(chain(), **{"c.w": 10 * weight})
    np.testing.assert_allclose(scores.magnitude(whole, groups(whole))["c"], before, rtol=1e-6)
    one = weight.copy()
    one[3] *= 10
    louder = change(chain(), **{"c.w": one})
    assert scores.magnitude(louder, groups(louder))["c"].argmax() == 3 != before.argmax()


def test_activation_is_the_variance_times_the_weights_that_read_it():
    graph, feeds = chain(), samples(4)
    found = scores.activation(graph, groups(graph), feeds)
    seen = np.concatenate([one["d"] for one in sensitivity.activations(graph, ["d"], feeds)])
    energy = seen.astype(np.float64).var((0, 2, 3)) * (graph.constants()["c.w"] ** 2).sum((0, 2, 3))
    np.testing.assert_allclose(found["b"], normal(energy), rtol=1e-4)


def test_a_channel_that_is_constant_counts_nothing_for_activation_but_has_a_magnitude():
    weight, bias = chain().constants()["b.w"].copy(), chain().constants()["b.b"].copy()
    weight[5], bias[5] = 0, 3
    depthwise = chain().constants()["d.w"].copy()
    depthwise[5] = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])  # padding would add an edge
    graph = change(chain(), **{"b.w": weight, "b.b": bias, "d.w": depthwise})
    found = groups(graph)
    assert scores.activation(graph, found, samples(4))["b"][5] < 1e-9
    assert scores.magnitude(graph, found)["b"][5] > 0.1


def test_reconstruction_spares_one_of_two_that_say_the_same():
    w = chain().constants()
    weight, bias, depthwise = w["b.w"].copy(), w["b.b"].copy(), w["d.w"].copy()
    weight[7], bias[7], depthwise[7] = weight[3], bias[3], depthwise[3]
    shift = w["d.b"].copy()
    shift[7] = shift[3]
    graph = change(chain(), **{"b.w": weight, "b.b": bias, "d.w": depthwise, "d.b": shift})
    found, feeds = groups(graph), samples(8)
    by_error = scores.reconstruction(graph, found, feeds)["b"]
    low, high = sorted(by_error[[3, 7]])
    assert low < 0.02 * np.median(by_error) and high > 0.1 * np.median(by_error)
    by_energy = scores.activation(graph, found, feeds)["b"]
    assert min(by_energy[[3, 7]]) > 0.02 * np.median(by_energy)


def test_reconstruction_is_the_error_of_least_squares(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "_PLACES", 10**6)
    monkeypatch.setattr(scores, "_RIDGE", 1e-12)
    graph, feeds = chain(), samples(8)
    found = scores.reconstruction(graph, groups(graph), feeds)["b"]
    x = np.concatenate([one["d"] for one in sensitivity.activations(graph, ["d"], feeds)]).astype(np.float64)
    x = x.transpose(0, 2, 3, 1).reshape(-1, 24)
    x -= x.mean(0)
    y = x @ graph.constants()["c.w"].reshape(16, 24).T.astype(np.float64)

    def error(without: list[int]) -> float:
        rest = np.delete(x, without, axis=1)
        return float(((rest @ np.linalg.lstsq(rest, y, rcond=None)[0] - y) ** 2).sum() / (y**2).sum())

    first = int(found.argmin())
    assert first == int(np.argmin([error([u]) for u in range(24)]))
    assert error([first]) == pytest.approx(found[first] / found.sum() * _total(found, error, first), rel=1e-3)


def _total(found: np.ndarray, error, first: int) -> float:
    """What the scores were normalised by, from the first two that went."""
    second = int(np.argsort(found)[1])
    return error([first, second]) / ((found[first] + found[second]) / found.sum())


def test_dropping_what_is_eliminated_changes_no_score(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((90, 40)), rng.standard_normal((8, 40))
    units = rng.permutation(40)[:36].reshape(18, 2)  # two positions each, four of another group

    def found() -> np.ndarray:
        return scores._eliminated([(np.linalg.inv(x.T @ x), weight.T @ weight, units)], 18)

    packed = found()
    monkeypatch.setattr(scores, "_PACK", 1e9)
    np.testing.assert_allclose(packed, found(), rtol=1e-9)
    assert len(set(packed)) > 9


def test_taylor_is_the_change_of_the_output_where_that_is_linear():
    pytest.importorskip("torch")
    head = chain().constants()["h.w"].copy()
    head[1:] = 0  # one output depends on the channels: the random sign does not matter
    graph, feeds = change(chain(), **{"h.w": head}), samples(6)
    found = scores.taylor(graph, groups(graph), feeds)
    seen = list(sensitivity.activations(graph, ["f", "y"], feeds))
    lost = sum((head[0] * one["f"][0]).astype(np.float64) ** 2 / (one["y"] ** 2).sum() for one in seen)
    np.testing.assert_allclose(found["c"], normal(lost), rtol=1e-4)


def test_taylor_sees_what_magnitude_cannot():
    pytest.importorskip("torch")
    bias, weight = chain().constants()["c.b"].copy(), chain().constants()["c.w"].copy()
    bias[2], weight[2] = -100, 5  # heavy, and behind a Relu that never opens
    graph = change(chain(), **{"c.b": bias, "c.w": weight})
    found = groups(graph)
    assert scores.taylor(graph, found, samples(3))["c"][2] == 0
    assert scores.magnitude(graph, found)["c"].argmax() == 2


def test_scores_that_need_data_say_so():
    graph = chain()
    found = groups(graph)
    assert scores.compute("magnitude", graph, found, ()).keys() == {"a", "b", "c"}
    for kind in ("activation", "reconstruction", "taylor"):
        with pytest.raises(InputError, match="needs calibration data"):
            scores.compute(kind, graph, found, ())


def test_taylor_without_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "edgecompile.torch_graph", None)
    graph = chain()
    with pytest.raises(EnvironmentMissing, match="taylor") as caught:
        scores.taylor(graph, groups(graph), samples(1))
    assert "torch" in f"{caught.value.why} {caught.value.fix}"


def test_the_share_kept_multiplies_over_the_groups():
    given = {"a": np.array([3.0, 1.0]), "b": np.array([1.0, 1.0, 2.0])}
    assert scores.share_kept(given, {"a": [0], "b": [0, 2]}) == pytest.approx(0.75 * 0.75)
    assert scores.share_kept(given, {}) == 1.0
