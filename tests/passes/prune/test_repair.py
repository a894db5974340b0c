"""The repair: the closed form, never worse on the data it is solved on, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from networks import chain, samples
from onnx import TensorProto, helper, numpy_helper

from edgecompile import qdq, sensitivity
from edgecompile.graph import Graph
from edgecompile.passes.prune import consumers, repair
from edgecompile.passes.prune.dependency import Groups, groups
from edgecompile.passes.prune.rules import key


def cut_of(graph: Graph, keep: dict[str, np.ndarray]) -> tuple[Groups, Graph]:
    found, cut = groups(graph), graph.copy()
    found.cut(cut, keep)
    return found, cut


def layer(graph: Graph, name: str):
    return next(n for n in graph.nodes if key(n) == name)


def seen(graph: Graph, name: str, feeds) -> np.ndarray:
    return np.concatenate([one[name] for one in sensitivity.activations(graph, [name], feeds)]).astype(np.float64)


def test_it_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repair, "_PLACES", 10**6)
    graph, feeds, keep = chain(), samples(), {"c": np.arange(0, 16, 2)}
    found, cut = cut_of(graph, keep)
    done = repair.repair(graph, cut, found, keep, feeds, dampings=[1e-9])
    assert done.kept and done.after > done.before + 3
    head = layer(cut, "y")
    x, y = seen(cut, "f", feeds), seen(graph, "y", feeds)
    # 12 rows are fewer than two per column: only the bias moves.
    np.testing.assert_array_equal(head.inputs[1].values, graph.constants()["h.w"][:, ::2])
    np.testing.assert_allclose((x @ head.inputs[1].values.T + head.inputs[2].values).mean(0), y.mean(0), atol=1e-5)

    keep = {"b": np.arange(12)}
    found, cut = cut_of(graph, keep)
    assert repair.repair(graph, cut, found, keep, feeds, dampings=[1e-9]).kept
    made = layer(cut, "c")
    x = seen(cut, "d", feeds).transpose(0, 2, 3, 1).reshape(-1, 12)
    y = seen(graph, "c", feeds).transpose(0, 2, 3, 1).reshape(-1, 16)
    best = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)[0].T
    np.testing.assert_allclose(made.inputs[1].values.reshape(16, 12), best[:, :12], atol=2e-4)
    np.testing.assert_allclose(made.inputs[2].values, best[:, 12], atol=2e-4)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_a_layer_answers_no_worse_for_any_damping(damping: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repair, "_PLACES", 10**6)
    graph, feeds, keep = chain(seed=3), samples(6), {"a": np.arange(5), "b": np.arange(7, 20)}
    _, cut = cut_of(graph, keep)
    node = layer(cut, "c")
    gram, cross, rows = repair.sums(graph, cut, node, repair.Aim("c"), None, feeds)
    assert rows == 6 * 144
    weight = consumers.matrix(node, node.inputs[1].values)
    start = np.hstack([weight, node.inputs[2].values[:, None]])
    x = np.hstack([seen(cut, "d", feeds).transpose(0, 2, 3, 1).reshape(-1, 13), np.ones((rows, 1))])
    y = seen(graph, "c", feeds).transpose(0, 2, 3, 1).reshape(-1, 16)

    def error(w: np.ndarray) -> float:
        return float(((x @ w.T - y) ** 2).sum())

    step = repair.step(gram, cross, damping)
    assert error(start + step) < error(start)
    assert error(start - step) > error(start)  # the other way is worse


def test_samples_held_out_choose_the_damping():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3, 30))

    def fold(rows: int, noise: float):
        x = rng.standard_normal((rows, 30))
        y = x @ truth.T + noise * rng.standard_normal((rows, 3))
        return x.T @ x, y.T @ x, rows

    exact = repair.choose([fold(60, 0.0), fold(60, 0.0)], [1e-6, 1.0], False)
    assert exact is not None
    np.testing.assert_allclose(exact, truth, atol=1e-4)
    noisy = [fold(40, 30.0), fold(40, 30.0)]
    chosen = repair.choose(noisy, [1e-6, 10.0], False)
    assert chosen is not None
    np.testing.assert_allclose(chosen, repair.step(noisy[0][0] + noisy[1][0], noisy[0][1] + noisy[1][1], 10.0, False))
    gram, cross, rows = fold(60, 0.0)
    assert repair.choose([(gram, cross, rows), (gram, -cross, rows)], [1e-3, 1e-1], False) is None  # helps nobody else
    assert repair.choose([fold(20, 0.0), fold(20, 0.0)], [1e-6], False) is None  # too few rows


@pytest.mark.parametrize("biased", [True, False])
def test_the_ridge_solution_is_the_closed_form(biased: bool):
    rng = np.random.default_rng(0)
    x, y, start = 2 + rng.standard_normal((50, 6)), rng.standard_normal((50, 4)), rng.standard_normal((4, 6))
    if biased:
        x[:, -1] = 1
    gram, cross = x.T @ x, (y - x @ start.T).T @ x
    ridge = 0.1 * (50 * x.var(0) if biased else (x**2).sum(0))  # the constant is not damped
    stacked = np.vstack([x, np.diag(np.sqrt(ridge))])
    wanted = np.vstack([y, np.sqrt(ridge)[:, None] * start.T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(start + repair.step(gram, cross, 0.1, biased), expected, rtol=1e-6)


def residual() -> Graph:
    """``y = e + d``: a stream ``e`` and a branch that reads it, of two convolutions, ``b`` and ``d``."""
    rng = np.random.default_rng(0)
    shapes = {"b.w": (16, 8, 1, 1), "d.w": (8, 16, 1, 1), "p.w": (24, 3, 1, 1), "e.w": (8, 24, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "p.w"], ["p"]),
        helper.make_node("Relu", ["p"], ["pr"]),
        helper.make_node("Conv", ["pr", "e.w"], ["e"]),
        helper.make_node("Conv", ["e", "b.w"], ["b"]),
        helper.make_node("Relu", ["b"], ["br"]),
        helper.make_node("Conv", ["br", "d.w"], ["d"]),
        helper.make_node("Add", ["e", "d"], ["y"]),
    ]
    for node in nodes:
        node.name = node.output[0]
    made = helper.make_graph(
        nodes, "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 12, 12])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()],
    )  # fmt: skip
    graph = Graph.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    graph.infer_shapes(outputs=True)
    return graph


def test_the_end_of_a_branch_makes_up_for_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(repair, "_PLACES", 10**6)
    graph, feeds, keep = residual(), samples(), {"p": np.arange(20), "b": np.arange(12)}
    found, cut = cut_of(graph, keep)
    assert repair.repair(graph, cut, found, keep, feeds, dampings=[1e-9]).kept
    x = seen(cut, "br", feeds).transpose(0, 2, 3, 1).reshape(-1, 12)
    stream, whole = (seen(g, n, feeds).transpose(0, 2, 3, 1).reshape(-1, 8) for g, n in ((cut, "e"), (graph, "y")))
    best = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), whole - stream, rcond=None)[0].T
    np.testing.assert_allclose(layer(cut, "d").inputs[1].values.reshape(8, 12), best[:, :12], atol=2e-3)

    def aim(name: str, pending: set[str]) -> repair.Aim:
        return repair._aim(graph, cut, layer(cut, name), pending)

    assert aim("d", set()) == repair.Aim("y", "e")
    assert aim("d", {"e"}) == repair.Aim("d")  # the other summand is still to change
    assert aim("e", set()) == repair.Aim("e")  # read by the branch, too


@pytest.mark.parametrize("seed", range(4))
def test_the_outputs_are_never_worse_on_the_data(seed: int):
    graph, feeds = chain(norm=seed % 2 == 1, seed=seed), samples(seed=seed)
    rng = np.random.default_rng(seed)
    found = groups(graph)
    keep = {g.name: np.sort(rng.choice(g.units, g.units // 2, replace=False)) for g in found.prunable}
    found, cut = cut_of(graph, keep)
    reference = list(map(qdq.kernels(graph), feeds))
    before = qdq.snr(reference, map(qdq.kernels(cut), feeds))
    done = repair.repair(graph, cut, found, keep, feeds)
    after = qdq.snr(reference, map(qdq.kernels(cut), feeds))
    assert after >= before
    assert (done.before, done.after if done.kept else done.before) == (pytest.approx(before), pytest.approx(after))


def test_what_is_not_better_is_not_kept():
    graph, feeds = chain(), samples(4)
    weight = graph.constants()["c.w"].copy()
    weight[:, 20:] = 0  # nobody reads these four
    layer(graph, "c").inputs[1] = graph.new_constant("c.w", weight)
    keep = {"b": np.arange(20)}
    found, cut = cut_of(graph, keep)
    digest = cut.digest()
    done = repair.repair(graph, cut, found, keep, feeds)
    assert not done.kept and done.before > 100
    assert cut.digest() == digest


def test_layers_that_read_all_their_channels_are_left_alone():
    graph, feeds, keep = chain(), samples(), {"a": np.arange(12)}
    found, cut = cut_of(graph, keep)
    _, plain = cut_of(graph, keep)
    assert repair.repair(graph, cut, found, keep, feeds).solved == 1
    for name, value in cut.constants().items():
        assert name.startswith("b.") or np.array_equal(value, plain.constants()[name]), name


def test_biases_make_up_for_the_mean_where_nothing_is_solved(monkeypatch: pytest.MonkeyPatch):
    graph, feeds, keep = chain(), samples(1), {"b": np.arange(16)}
    monkeypatch.setattr(repair, "_PLACES", 10)  # fewer than two per column
    found, cut = cut_of(graph, keep)
    assert repair.repair(graph, cut, found, keep, feeds).shifted
    now, then = seen(cut, "c", feeds).mean((0, 2, 3)), seen(graph, "c", feeds).mean((0, 2, 3))
    np.testing.assert_allclose(now, then, atol=1e-5)
    assert np.abs(seen(cut, "c", feeds) - seen(graph, "c", feeds)).max() > 1e-3  # only the mean
    _, plain = cut_of(graph, keep)
    assert np.abs(seen(plain, "c", feeds).mean((0, 2, 3)) - then).max() > 1e-3


def test_norms_give_the_mean_and_variance_that_they_gave():
    graph, feeds, keep = chain(norm=True), samples(), {"b": np.arange(10)}
    found, cut = cut_of(graph, keep)
    done = repair.repair(graph, cut, found, keep, feeds)
    assert done.norms == 1 and done.kept
    now, then = seen(cut, "n", feeds), seen(graph, "n", feeds)
    np.testing.assert_allclose(now.mean((0, 2, 3)), then.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(now.var((0, 2, 3)), then.var((0, 2, 3)), rtol=1e-4)
    _, plain = cut_of(graph, keep)
    assert not np.allclose(seen(plain, "n", feeds).var((0, 2, 3)), then.var((0, 2, 3)), rtol=1e-2)


def test_norms_trained_on_their_data_get_the_statistics_of_their_data():
    graph, feeds, keep = chain(norm=True), samples(), {"b": np.arange(10), "c": np.arange(3, 12)}
    x = seen(graph, "c", feeds)
    norm = layer(graph, "n")
    for slot, values in ((3, x.mean((0, 2, 3))), (4, x.var((0, 2, 3)))):
        norm.inputs[slot] = graph.new_constant(f"stat{slot}", values.astype(np.float32))
    found, cut = cut_of(graph, keep)
    assert repair.repair(graph, cut, found, keep, feeds).kept
    norm, x = layer(cut, "n"), seen(cut, "c", feeds)
    np.testing.assert_allclose(norm.inputs[3].values, x.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(norm.inputs[4].values, x.var((0, 2, 3)), rtol=1e-3)


def test_rows_of_a_convolution_are_what_it_multiplies():
    from onnx import helper

    from edgecompile import oracle

    rng = np.random.default_rng(0)
    attrs = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "kernel_shape": [3, 2]}
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], **attrs)], "g",
            [helper.make_tensor_value_info("x", 1, [2, 3, 7, 8])], [helper.make_tensor_value_info("y", 1, None)],
            [helper.make_tensor("w", 1, [4, 3, 3, 2], rng.standard_normal(72))],
        ), opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [2, 4, 4, 7]))
    graph = Graph.from_proto(proto)
    x = rng.standard_normal((2, 3, 7, 8)).astype(np.float32)
    node = graph.nodes[0]
    y = consumers.outputs(node, oracle.run(graph, {"x": x})["y"])
    places = rng.choice(len(y), 20, replace=False)
    made = consumers.rows(node, x, places) @ consumers.matrix(node, node.inputs[1].values).T
    np.testing.assert_allclose(made, y[places], atol=1e-4)
    assert np.abs(made - y[np.roll(places, 1)]).max() > 0.1
