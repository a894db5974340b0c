"""The reference that passes are checked against."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from onnx import parser

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph


def graph_of(text: str) -> Graph:
    return Graph.from_proto(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}'))


def test_compare_is_the_textbook():
    reference, noisy = np.array([3.0, -4.0]), np.array([3.0, -4.04])
    error = oracle.compare(reference, noisy)
    assert error.max_abs == pytest.approx(0.04)
    assert error.max_rel == pytest.approx(0.01)
    assert error.snr_db == pytest.approx(10 * math.log10(25 / 0.04**2))
    assert error.cosine == pytest.approx((9 + 4 * 4.04) / (5 * math.hypot(3, 4.04)))
    assert oracle.compare(reference, reference).snr_db == math.inf


@pytest.mark.parametrize("bad", [[1.0, np.nan], [1.0, np.inf], [1.0, -np.inf]])
def test_non_finite_values_must_stand_in_the_same_places(bad):
    assert oracle.compare(np.array([1.0, 2.0]), np.array(bad)).max_rel == math.inf
    assert oracle.compare(np.array(bad), np.array(bad)).max_rel == 0


def test_shapes_must_agree():
    with pytest.raises(InputError, match="cannot be compared"):
        oracle.compare(np.zeros((1, 2)), np.zeros((2, 1)))


def test_run_agrees_with_numpy_and_with_the_reference_evaluator(monkeypatch):
    graph = graph_of("g (float[N,3] x) => (float[N,3] y) { t = Exp(x) y = Mul(t, x) }")
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
    expected = np.exp(feeds["x"]) * feeds["x"]
    np.testing.assert_allclose(oracle.run(graph, feeds)["y"], expected, rtol=1e-6)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # import onnxruntime now raises ImportError
    np.testing.assert_allclose(oracle.run(graph, feeds)["y"], expected, rtol=1e-6)


def test_large_weights_are_fed_not_copied():
    weight = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    graph = graph_of("g (float[1,600] x) => (float[1,600] y) { y = MatMul(x, x) }")
    graph.nodes[0].inputs[1] = graph.new_constant("w", weight)
    model, fed = graph.to_probe()
    assert list(fed) == ["w"] and len(model.SerializeToString()) < 1000
    feeds = {"x": np.ones((1, 600), np.float32)}
    np.testing.assert_allclose(oracle.run(graph, feeds)["y"], feeds["x"] @ weight, atol=1e-4)


def test_probe_feeds_find_a_size_that_runs():
    # a 20x20 window needs an image of at least that size: 64 is accepted, 1 would not be
    text = "g (float[N,1,H,W] x) => (float[N,1,P,Q] y) { y = MaxPool <kernel_shape=[20,20]> (x) }"
    feeds = oracle.probe_feeds(graph_of(text))
    assert [f["x"].shape for f in feeds] == [(1, 1, 64, 64), (2, 1, 64, 64)]


def test_probe_feeds_say_what_to_do_when_nothing_runs():
    text = """g (float[N,M] x, float[K,L] z) => (float[A,B] y) <float[3,3] w = {1,0,0,0,1,0,0,0,1}>
        { t = MatMul(x, w) y = MatMul(t, z) }"""
    with pytest.raises(InputError, match="--input"):
        oracle.probe_feeds(graph_of(text))


@pytest.mark.parametrize(
    "feeds, complaint",
    [
        ({}, "missing"),
        ({"x": np.zeros((1, 4), np.float32)}, "wants Nx3"),
        ({"x": np.zeros(3, np.float32)}, "wants Nx3"),
        ({"x": np.zeros((1, 3), np.float64)}, "float32"),
        ({"x": np.zeros((1, 3), np.float32), "q": np.zeros(1)}, "no input 'q'"),
    ],
)
def test_wrong_feeds_are_named(feeds, complaint):
    graph = graph_of("g (float[N,3] x) => (float[N,3] y) { y = Exp(x) }")
    oracle.check_feeds(graph, {"x": np.zeros((5, 3), np.float32)})
    with pytest.raises(InputError) as caught:
        oracle.check_feeds(graph, feeds)
    assert complaint in str(caught.value)


def test_rounding_tells_a_tame_function_from_a_wild_one():
    tame = graph_of("g (float[8] x) => (float[8] y) { y = Mul(x, x) }")
    wild = graph_of("g (float[8] x) => (float[8] y) <float c = {30000}> { t = Mul(x, c) y = Sin(t) }")
    feeds = {"x": np.random.default_rng(0).uniform(1, 2, 8).astype(np.float32)}
    measured = [oracle.rounding(g, feeds, oracle.run(g, feeds))["y"] for g in (tame, wild)]
    assert measured[0] < 5e-6 < 1e-3 < measured[1]
