"""The blocks of ShiftAddViT: linear layers as shifts and mixtures, attention as additions, and a PVTv2 block of them.

Source: You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer", NeurIPS
2023 (section 4); the shift layer is DeepShift-PS (Elhoushi et al., CVPR Workshops 2021), the attention is the
linear-angular one of Castling-ViT (You et al., CVPR 2023) with binary queries and keys. Parameter names are the
authors'. Made for inference: the roundings of :class:`ShiftLinear` pass no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompile.errors import InputError

_FIXED_STEP = 2.0**-16
_FIXED_RANGE = (-(2.0**15), 2.0**15 - 1)


def _to_fixed(x: Tensor) -> Tensor:
    """Round down to the 16.16 fixed-point grid and clamp to its range."""
    return torch.clamp(torch.floor(x / _FIXED_STEP) * _FIXED_STEP, *_FIXED_RANGE)


class ShiftLinear(nn.Module):
    """Linear layer whose weights are signed powers of two or zero, so that products are shifts.

    The weight is ``2^round(clamp(shift)) * sign(round(sign))``; input and bias are rounded down to multiples of 2^-16.
    Maps ``[..., inputs]`` to ``[..., outputs]``.

    Args:
        inputs: input features.
        outputs: output features.
        bias: whether there is a bias.
        weight_bits: bits of one weight, sign and zero included; shifts go from ``-(2^(weight_bits - 1) - 2)`` to 0.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, weight_bits: int = 5):
        super().__init__()
        self.least_shift = -(2 ** (weight_bits - 1) - 2)
        self.shift = nn.Parameter(torch.empty(outputs, inputs).uniform_(self.least_shift, 0))
        self.sign = nn.Parameter(torch.empty(outputs, inputs).uniform_(-1, 1))
        bound = inputs**-0.5
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight_bits: int = 5) -> ShiftLinear:
        """The layer whose weights are nearest to those of ``linear`` in log2, within the range of the shifts."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, weight_bits=weight_bits)
        with torch.no_grad():
            layer.sign.copy_(linear.weight.sign())
            layer.shift.copy_(linear.weight.abs().log2().round().clamp(layer.least_shift, 0))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight = 2.0 ** self.shift.clamp(self.least_shift, 0).round() * self.sign.round().sign()
        return F.linear(_to_fixed(x), weight, None if self.bias is None else _to_fixed(self.bias))


class MixtureLinear(nn.Module):
    """A multiplying and a shifting linear layer, of which a gate chooses one for each token.

    The choice is hard and its value is 1, as in the authors' code; both experts are computed, and one is kept, so that
    the module exports. Maps ``[..., inputs]`` to ``[..., outputs]``.

    Args:
        inputs: input features.
        outputs: output features.
        bias: whether the experts have a bias.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        super().__init__()
        self.gate = nn.Linear(inputs, 2)
        self.experts = nn.ModuleList([nn.Linear(inputs, outputs, bias=bias), ShiftLinear(inputs, outputs, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        score = self.gate(x)
        multiplies = score[..., :1] >= score[..., 1:]
        return torch.where(multiplies, self.experts[0](x), self.experts[1](x))


def _binarize(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """0 or 1 by comparison with the mean over ``dims``, with the gradient of a clamp to [0, 1]."""
    binary = (x - x.mean(dims, keepdim=True) > 0).float()
    clipped = x.clamp(0, 1)
    return binary.detach() - clipped.detach() + clipped


class LinearAngularAttention(nn.Module):
    """Linear attention with binary queries and keys, on ``[B, N, C]``.

    With q and k normalised over the head's channels and binarized, and ``y = v / 2 + q (k^T v) / pi``, the output is
    the projection of ``y / |y| + dconv(v)``, where dconv mixes nine neighbouring tokens, one kernel a head.

    Args:
        dim: channels C.
        heads: attention heads; divides C.
        per_image: take the mean that binarizes over one image. The authors take it over the whole batch, so that their
            output for an image depends on its companions.
    """

    def __init__(self, dim: int, heads: int, *, per_image: bool = False):
        super().__init__()
        self.heads = heads
        self.mean_dims = (1, 2, 3) if per_image else (0, 1, 2, 3)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dconv = nn.Conv2d(heads, heads, (9, 1), padding=(4, 0), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention."""
        _, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = _binarize(q / q.norm(dim=-1, keepdim=True), self.mean_dims)
        k = _binarize(k / k.norm(dim=-1, keepdim=True), self.mean_dims)
        y = 0.5 * v + 1 / math.pi * (q @ (k.transpose(2, 3) @ v))
        y = y / y.norm(dim=-1, keepdim=True) + self.dconv(v)
        return self.proj(y.transpose(1, 2).reshape(-1, tokens, dim))


class _DepthwiseTokens(nn.Module):
    """3x3 depthwise convolution on tokens ``[B, size^2, C]`` taken as a square image."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.size = size
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).reshape(-1, x.shape[2], self.size, self.size)
        return self.dwconv(image).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, 3x3 depthwise convolution, GELU, linear; on ``[B, size^2, C]``."""

    def __init__(self, dim: int, hidden: int, size: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = _DepthwiseTokens(hidden, size)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


@dataclass(frozen=True)
class Stage:
    """Shapes of one stage of PVTv2-B0 at 224 pixels: channels, heads, width of the MLP, tokens a side."""

    dim: int
    heads: int
    hidden: int
    size: int


# Stage 4 keeps softmax attention in the published models.
STAGES = {1: Stage(32, 1, 256, 56), 2: Stage(64, 2, 512, 28), 3: Stage(160, 5, 640, 14)}


class Block(nn.Module):
    """Linear-angular attention and MLP, each after a LayerNorm and with a shortcut, on ``[B, size^2, C]``."""

    def __init__(self, stage: Stage, *, per_image: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(stage.dim, eps=1e-6)
        self.attn = LinearAngularAttention(stage.dim, stage.heads, per_image=per_image)
        self.norm2 = nn.LayerNorm(stage.dim, eps=1e-6)
        self.mlp = Mlp(stage.dim, stage.hidden, stage.size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def pvtv2_b0_block(stage: int, *, per_image: bool = False) -> Block:
    """A block of ShiftAddViT's PVTv2-B0.

    Args:
        stage: 1, 2 or 3.
        per_image: see :class:`LinearAngularAttention`.

    Raises:
        InputError: there is no such stage.
    """
    if stage not in STAGES:
        raise InputError(f"no linear-attention stage {stage} in PVTv2-B0", "", "give 1, 2 or 3")
    return Block(STAGES[stage], per_image=per_image)
