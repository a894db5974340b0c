from __future__ import annotations

import math

import pytest
import torch
from export_parity import assert_exports, export
from torch import Tensor, nn

from edgecompile import models, oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.models.randomize import randomize
from edgecompile.models.repvgg import RepVGGBlock, create
from edgecompile.pipeline import Pipeline

SMALL = {"widths": (8, 8, 16), "depths": (1, 2, 2), "strides": (1, 2, 2)}


def merged(state: dict[str, Tensor], prefix: str, x: Tensor, stride: int, *, identity: bool = True) -> Tensor:
    """Figure 4 of the paper: one 3x3 kernel and bias from the branches that the state dict holds, then ReLU."""

    def scale_and_shift(norm: str) -> tuple[Tensor, Tensor]:
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        return scale, state[f"{norm}.bias"] - scale * state[f"{norm}.running_mean"]

    dense, point = (state[f"{prefix}{branch}.conv.weight"] for branch in ("rbr_dense", "rbr_1x1"))
    (s3, b3), (s1, b1) = scale_and_shift(f"{prefix}rbr_dense.bn"), scale_and_shift(f"{prefix}rbr_1x1.bn")
    kernel, bias = dense * s3.view(-1, 1, 1, 1), b3 + b1
    kernel[:, :, 1, 1] += point[:, :, 0, 0] * s1.view(-1, 1)
    if identity and f"{prefix}rbr_identity.weight" in state:
        s0, b0 = scale_and_shift(f"{prefix}rbr_identity")
        kernel[:, :, 1, 1] += torch.diag(s0)
        bias = bias + b0
    return nn.functional.conv2d(x, kernel, bias, stride, 1).clamp(min=0)


@pytest.mark.parametrize(("cin", "cout", "stride", "side"), [(5, 5, 1, 6), (5, 7, 1, 6), (5, 5, 2, 7), (5, 7, 2, 6)])
def test_block_is_one_convolution(cin, cout, stride, side):
    block = randomize(RepVGGBlock(cin, cout, stride), 1).double().eval()
    x = torch.randn(2, cin, side, side, dtype=torch.float64)
    with torch.no_grad():
        got = block(x)
    assert got.shape == (2, cout, math.ceil(side / stride), math.ceil(side / stride))
    torch.testing.assert_close(got, merged(block.state_dict(), "", x, stride))
    has_identity = cin == cout and stride == 1
    assert (block.rbr_identity is not None) == has_identity
    without = merged(block.state_dict(), "", x, stride, identity=False)
    assert torch.allclose(got, without) != has_identity


def test_network_is_a_plain_stack_of_convolutions():
    model = randomize(create("repvgg_a0", 7, **SMALL), 2).double().eval()
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    state = model.state_dict()
    y = merged(state, "stage0.", x, 1)
    for prefix, stride in (("stage1.0.", 2), ("stage1.1.", 1), ("stage2.0.", 2), ("stage2.1.", 1)):
        y = merged(state, prefix, y, stride)
    y = y.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
        assert not torch.allclose(model(x), model(x.flip(1)))


def test_reparameterized_a0_is_the_published_one(tmp_path):
    """Table 2 and 4 of the paper: 8.31 M parameters and 1.4 GMACs deployed, 22 layers of 3x3 convolution."""
    x = torch.randn(1, 3, 224, 224)
    model = randomize(models.create("repvgg_a0"), 3, x)
    export(model, x, tmp_path / "a0.onnx", dynamo=False)
    graph = Graph.load(tmp_path / "a0.onnx")
    feeds = {"x": x.numpy()}
    before = oracle.run(graph, feeds)
    trace = Pipeline.parse("clean,fold_norm,reparam").run(graph, [feeds], strict=True)
    errors = oracle.compare_all(before, oracle.run(graph, feeds))
    assert max(e.max_rel for e in errors.values()) <= 1e-5
    convolutions = [node for node in graph.nodes if node.op == "Conv"]
    assert [tuple(node.inputs[1].shape[2:]) for node in convolutions] == [(3, 3)] * 22
    assert not any(node.op in ("Add", "BatchNormalization") for node in graph.nodes)
    after = trace.steps[-1].after
    assert after.parameters == 8_309_384
    assert after.macs == pytest.approx(1.3624e9, rel=1e-3)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exports(tmp_path, dynamo):
    x = torch.randn(2, 3, 32, 32)
    model = randomize(create("repvgg_a0", 10, **SMALL), 4, x)
    assert_exports(model, x, tmp_path / "x.onnx", dynamo=dynamo, dynamic=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"widths": (8, 8)}, "widths has 2 values"),
        ({"depths": (1, 0, 2)}, "depths"),
        ({"strides": (1, 2, 1.5)}, "strides"),
    ],
)
def test_impossible_options(options, message):
    create("repvgg_a0", **SMALL)
    with pytest.raises(InputError) as caught:
        create("repvgg_a0", **{**SMALL, **options})
    assert message in str(caught.value)
