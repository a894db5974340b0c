from __future__ import annotations

import itertools
import math

import pytest
import torch
from export_parity import assert_exports
from torch import Tensor, nn

from edgecompile.errors import InputError
from edgecompile.models import shiftaddvit
from edgecompile.models.shiftaddvit import LinearAngularAttention, Mlp, ShiftLinear, pvtv2_b0_block

# --- shift layer -------------------------------------------------------------------------------------------------


def shifted_sums(layer: ShiftLinear, x: Tensor) -> Tensor:
    """The layer in integers: each product a shift of the 16.16 fixed-point input, exact in units of 2^-30."""
    rows = []
    for sample in x.tolist():
        fixed = [math.floor(value * 2**16) for value in sample]
        row = []
        for o in range(layer.shift.shape[0]):
            total = 0
            for i, value in enumerate(fixed):
                power = round(min(max(layer.shift[o, i].item(), -14), 0))
                sign = round(layer.sign[o, i].item())
                total += sign * (value << (14 + power))
            if layer.bias is not None:
                total += math.floor(layer.bias[o].item() * 2**16) << 14
            row.append(total / 2**30)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_shift_layer_is_sums_of_shifts(bias):
    torch.manual_seed(0)
    layer = ShiftLinear(12, 5, bias=bias).double()
    nn.init.uniform_(layer.shift, -17, 3)  # beyond the range on both sides
    nn.init.uniform_(layer.sign, -1.4, 1.4)
    x = 4 * torch.randn(6, 12, dtype=torch.float64)
    signs = layer.sign.round().unique().tolist()
    assert signs == [-1, 0, 1], "all three signs of a weight occur"
    torch.testing.assert_close(layer(x), shifted_sums(layer, x), rtol=0, atol=1e-12)
    assert (layer(x) - layer(x + 2**-16)).abs().max() > 1e-9
    assert (layer(x) - shifted_sums(layer, x + 2**-16)).abs().max() > 1e-9


def test_shift_layer_floors_and_saturates_its_input():
    layer = ShiftLinear(1, 1, bias=False)
    nn.init.zeros_(layer.shift)
    nn.init.ones_(layer.sign)
    x = torch.tensor([[2.0**-17], [-(2.0**-17)], [40000.0], [-40000.0]])
    assert layer(x).flatten().tolist() == [0, -(2.0**-16), 32767, -32768]


def test_shift_layer_keeps_powers_of_two_and_rounds_the_rest():
    torch.manual_seed(1)
    linear = nn.Linear(16, 8)
    x = torch.floor(torch.randn(4, 16) * 2**10) / 2**10
    with torch.no_grad():
        linear.bias.copy_(torch.floor(linear.bias * 2**16) / 2**16)
        rounded = ShiftLinear.from_linear(linear)
        ratio = rounded.shift.exp2() / linear.weight.abs()
        assert ratio.min() >= 2**-0.5 - 1e-6
        assert ratio.max() <= 2**0.5 + 1e-6
        torch.testing.assert_close(rounded.sign, linear.weight.sign())
        with pytest.raises(AssertionError):
            torch.testing.assert_close(rounded(x), linear(x))

        linear.weight.copy_(rounded.shift.exp2() * rounded.sign)
        linear.weight[0, 0] = 0
        linear.weight[0, 1] = 2.0**-20  # below the range
        exact = ShiftLinear.from_linear(linear)
        assert exact.sign[0, 0] == 0
        assert exact.shift[0, 1] == -14
        linear.weight[0, 1] = 2.0**-14
        torch.testing.assert_close(exact(x), linear(x))


# --- attention ---------------------------------------------------------------------------------------------------


def naive_attention(attention: LinearAngularAttention, x: Tensor, means: tuple[int, ...]) -> Tensor:
    """Linear-angular attention by its formula, the quadratic way round: each query looks at each key."""
    batch, tokens, dim = x.shape
    qkv = torch.einsum("bni,oi->bno", x, attention.qkv.weight) + attention.qkv.bias
    q, k, v = qkv.reshape(batch, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
    q, k = ((t > t.mean(means, keepdim=True)).to(x.dtype) for t in (q, k))
    common = torch.einsum("bhqd,bhkd->bhqk", q, k)  # how many bits two tokens share
    y = v / 2 + torch.einsum("bhqk,bhkd->bhqd", common, v) / math.pi
    y = y / y.square().sum(-1, keepdim=True).sqrt()
    mixed = torch.zeros_like(v)
    for token, tap in itertools.product(range(tokens), range(9)):
        source = token + tap - 4
        if 0 <= source < tokens:
            mixed[:, :, token] += attention.dconv.weight[:, 0, tap] * v[:, :, source]
    y = (y + mixed).transpose(1, 2).reshape(batch, tokens, dim)
    return torch.einsum("bni,oi->bno", y, attention.proj.weight) + attention.proj.bias


@pytest.mark.parametrize("per_image", [False, True])
def test_attention_is_its_formula(per_image):
    torch.manual_seed(2)
    attention = LinearAngularAttention(15, 3, per_image=per_image).double()
    x = torch.randn(2, 12, 15, dtype=torch.float64)
    x[1] += 1  # images of different mean
    over_image, over_batch = (1, 2, 3), (0, 1, 2, 3)
    right, wrong = (over_image, over_batch) if per_image else (over_batch, over_image)
    torch.testing.assert_close(attention(x), naive_attention(attention, x, right))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(attention(x), naive_attention(attention, x, wrong))


@pytest.mark.parametrize("per_image", [False, True])
def test_only_the_threshold_of_each_image_is_independent_of_the_batch(per_image):
    torch.manual_seed(3)
    block = pvtv2_b0_block(3, per_image=per_image).eval()
    x = torch.randn(2, 196, 160)
    with torch.no_grad():
        alone, together = block(x[:1]), block(x)[:1]
    assert torch.allclose(alone, together, atol=1e-4) == per_image


def test_binarization_passes_the_gradient_of_a_clamp():
    x = torch.tensor([-0.5, 0.25, 0.75, 1.5], requires_grad=True)
    y = shiftaddvit._binarize(x, (0,))
    assert y.tolist() == pytest.approx([0, 0, 1, 1])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


# --- block -------------------------------------------------------------------------------------------------------


def naive_mlp(mlp: Mlp, x: Tensor, size: int) -> Tensor:
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    weight, bias = mlp.dwconv.dwconv.weight[:, 0], mlp.dwconv.dwconv.bias
    assert bias is not None
    mixed = torch.zeros_like(hidden) + bias
    for row, column, i, j in itertools.product(range(size), range(size), range(3), range(3)):
        r, c = row + i - 1, column + j - 1
        if 0 <= r < size and 0 <= c < size:
            mixed[:, row * size + column] += weight[:, i, j] * hidden[:, r * size + c]
    activated = mixed * (1 + torch.erf(mixed / math.sqrt(2))) / 2
    return activated @ mlp.fc2.weight.T + mlp.fc2.bias


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * norm.weight + norm.bias


def test_block_is_its_formula():
    torch.manual_seed(4)
    block = shiftaddvit.Block(shiftaddvit.Stage(12, 2, 24, 5)).double()
    for norm in (block.norm1, block.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    x = torch.randn(2, 25, 12, dtype=torch.float64)
    middle = x + naive_attention(block.attn, layer_norm(x, block.norm1), (0, 1, 2, 3))
    wanted = middle + naive_mlp(block.mlp, layer_norm(middle, block.norm2), 5)
    torch.testing.assert_close(block(x), wanted)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(block(x), wanted - middle)


@pytest.mark.parametrize(("stage", "dim", "heads", "size", "parameters"), [
    (1, 32, 1, 56, 4 * 32 * 32 + 4 * 32 + 9 + 2 * 8 * 32 * 32 + 10 * 256 + 256 + 32 + 4 * 32),
    (2, 64, 2, 28, 4 * 64 * 64 + 4 * 64 + 18 + 2 * 8 * 64 * 64 + 10 * 512 + 512 + 64 + 4 * 64),
    (3, 160, 5, 14, 4 * 160 * 160 + 4 * 160 + 45 + 2 * 4 * 160 * 160 + 10 * 640 + 640 + 160 + 4 * 160),
])  # fmt: skip
def test_blocks_have_the_shapes_of_pvtv2_b0(stage, dim, heads, size, parameters):
    block = pvtv2_b0_block(stage).eval()
    assert block.attn.heads == heads
    assert sum(p.numel() for p in block.parameters()) == parameters
    with torch.no_grad():
        assert block(torch.randn(1, size * size, dim)).shape == (1, size * size, dim)


def test_stage_four_is_an_input_error():
    with pytest.raises(InputError):
        pvtv2_b0_block(4)


# --- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
def test_block_exports(tmp_path, dynamo, dynamic):
    torch.manual_seed(5)
    block = pvtv2_b0_block(3)
    proto = assert_exports(block, torch.randn(2, 196, 160), tmp_path / "x.onnx", dynamo=dynamo, dynamic=dynamic)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Greater") == 2
    assert kinds.count("Clip") == 2


@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
def test_shift_layer_exports(tmp_path, dynamo):
    torch.manual_seed(6)
    proto = assert_exports(ShiftLinear(64, 48), torch.randn(2, 64), tmp_path / "x.onnx", dynamo=dynamo, dynamic=True)
    kinds = {node.op_type for node in proto.graph.node}
    assert {"Floor", "Gemm"} <= kinds
