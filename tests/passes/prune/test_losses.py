"""Losses of single groups: closed forms, and what a group that nobody reads costs."""

from __future__ import annotations

import numpy as np
import pytest
from networks import chain, samples

from edgecompile import qdq, sensitivity
from edgecompile.graph import Graph
from edgecompile.passes.prune import losses, scores, widths
from edgecompile.passes.prune.dependency import groups


def rows(graph: Graph, name: str, feeds) -> np.ndarray:
    """A feature map as rows of channels."""
    x = np.concatenate([one[name] for one in sensitivity.activations(graph, [name], feeds)]).astype(np.float64)
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])


def measured(graph: Graph, feeds, merge: bool):
    found = groups(graph)
    importance = scores.magnitude(graph, found)
    choices = widths.candidates(found, graph, 4)
    return importance, losses.measured(graph, found, importance, choices, feeds, merge=merge)


def test_a_reader_of_a_cut_group_is_the_least_squares_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "_PLACES", 10**6)
    monkeypatch.setattr(losses, "_RIDGE", 1e-12)
    graph, feeds = chain(), samples()
    found, keep = groups(graph), {"b": np.arange(1, 24, 2)}
    cut = graph.copy()
    found.cut(cut, keep)
    plain = rows(cut, "c", feeds)
    losses.merge_into(graph, cut, found, found["b"], keep, scores.observe(graph, found, feeds))
    x, y = rows(cut, "d", feeds), rows(graph, "c", feeds)
    x = np.hstack([x, np.ones((len(x), 1))])
    best = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(rows(cut, "c", feeds), best, atol=1e-4)
    assert ((best - y) ** 2).sum() < 0.5 * ((plain - y) ** 2).sum()


def test_the_loss_is_the_noise_of_the_outputs():
    graph, feeds = chain(), samples(12)
    importance, lost = measured(graph, feeds, merge=False)
    found, judges = groups(graph), feeds[3::4]
    cut = graph.copy()
    found.cut(cut, {"c": np.sort(np.argsort(-importance["c"], kind="stable")[:12])})
    noise = 10 ** (-qdq.snr([qdq.kernels(graph)(f) for f in judges], map(qdq.kernels(cut), judges)) / 10)
    assert lost["c"][12] == pytest.approx(max(noise, lost["c"][13]), rel=1e-6)
    for values in lost.values():
        assert values[-1] == 0 and (np.diff(values) <= 0).all() and values[0] > 1


def test_making_up_for_it_loses_less():
    graph, feeds = chain(), samples(24)
    (_, plain), (_, merged) = (measured(graph, feeds, merge=m) for m in (False, True))
    assert merged["b"][12] < 0.7 * plain["b"][12]


def test_what_nobody_reads_is_no_loss():
    graph, feeds = chain(), samples(8)
    importance, before = measured(graph, feeds, merge=True)
    head = graph.constants()["h.w"].copy()
    head[:, np.argsort(importance["c"])[:4]] = 0
    quiet = graph.copy()
    node = next(n for n in quiet.nodes if n.op == "Gemm")
    node.inputs[1] = quiet.new_constant("h.w", head)
    found = groups(quiet)
    after = losses.measured(quiet, found, importance, widths.candidates(found, quiet, 4), feeds, merge=True)
    assert after["c"][12] < 1e-6 < before["c"][12]


def test_without_data_the_importance_says():
    lost = losses.of_importance({"g": np.array([1.0, 3.0])})["g"]
    np.testing.assert_allclose(lost[1:], [-np.log(0.75), 0.0])
    assert lost[0] > 20
