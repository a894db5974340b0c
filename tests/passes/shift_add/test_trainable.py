"""Coded layers as torch modules: the same function, gradients that reach the weights, and back without a loss."""

from __future__ import annotations

import numpy as np
import pytest
from test_shift_add import net, outputs, run

from edgecompile import oracle
from edgecompile.passes.shift_add import ops, to_torch

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("code", "bits"), [("pot", 4), ("sp2", 8), ("binary", 3)])
def test_the_module_computes_what_the_graph_computes(code, bits):
    graph = net()
    run(graph, code=code, bits=bits, group=7)
    feeds = oracle.random_feeds(graph.signature().inputs, 9)
    module = to_torch(graph)
    with torch.no_grad():
        found = module(torch.from_numpy(feeds["x"])).numpy()
    np.testing.assert_allclose(found, outputs(graph), rtol=1e-4, atol=1e-5)
    # Nothing trained: the very same graph.
    assert np.array_equal(outputs(module.to_graph()), outputs(graph))


def test_training_moves_codes_and_what_was_trained_goes_back_into_the_graph():
    graph = net()
    teacher = outputs(graph)
    run(graph, code="pot", bits=4)
    module = to_torch(graph)
    x = torch.from_numpy(oracle.random_feeds(graph.signature().inputs, 9)["x"])
    target = torch.from_numpy(teacher)
    optimizer = torch.optim.Adam(module.parameters(), 0.003)
    losses = []
    for _ in range(80):
        loss = torch.nn.functional.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.3 * losses[0]
    trained = module.to_graph()
    before = {n.name: n.inputs[1].values for n in graph.nodes if n.domain == ops.DOMAIN}
    after = {n.name: n.inputs[1].values for n in trained.nodes if n.domain == ops.DOMAIN}
    assert any(not np.array_equal(before[k], after[k]) for k in before), "no code moved"
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), outputs(trained), rtol=1e-4, atol=1e-5)
    trained.check(graph.signature())
    assert np.array_equal(outputs(to_torch(trained).to_graph()), outputs(trained))
