"""EfficientViT image classifiers (cascaded group attention, Microsoft Cream) in training form.

Source: Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", CVPR 2023,
section 3 and table 1. State-dict keys, shapes and order are those of the authors' implementation, so that their
checkpoints load. Unlike theirs, the attention biases are gathered in every forward call and never cached, so that
changing them in eval mode takes effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgecompile.errors import InputError

from .layers import FFN, ConvBN, Residual, ThreeStageViT, check_int, check_per_stage, depthwise


@dataclass(frozen=True)
class _Config:
    embed_dim: Sequence[int]
    depth: Sequence[int]
    num_heads: Sequence[int]
    kernels: Sequence[int]
    key_dim: int = 16
    window_size: int = 7
    img_size: int = 224
    patch_size: int = 16


_VARIANTS = {
    "efficientvit_m0": _Config((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "efficientvit_m1": _Config((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "efficientvit_m2": _Config((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "efficientvit_m3": _Config((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "efficientvit_m4": _Config((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "efficientvit_m5": _Config((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}


def _offset_index(size: int) -> Tensor:
    """Index of the offset ``(|dy|, |dx|)`` between any two positions of a window: int64 ``[size^2, size^2]``.

    Seen from position (0, 0) in row-major order the offset to (y, x) is (y, x) itself, so offsets are numbered
    ``size * |dy| + |dx|``.
    """
    y, x = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
    return size * (y[:, None] - y).abs() + (x[:, None] - x).abs()


class CascadedGroupAttention(nn.Module):
    """One attention head per channel group; each head adds the previous head's output to its input (section 3.2).

    With ``x_i`` the i-th of ``heads`` groups of channels, ``y_0 = 0``, and the ``size^2`` positions as tokens::

        q_i, k_i, v_i = conv(x_i + y_(i-1))
        y_i = v_i softmax(dw(q_i)^T k_i / sqrt(key_dim) + bias_i)^T
        y   = proj(relu(concat(y_1 ... y_heads)))

    Args:
        dim: channels in and out, a multiple of ``heads``.
        key_dim: size of a query and a key; a value has ``dim / heads`` channels.
        heads: number of heads.
        size: side of the square window that attends.
        kernels: kernel size of the depthwise convolution on the query, per head.
    """

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, key_dim: int, heads: int, size: int, kernels: Sequence[int]):
        super().__init__()
        group = dim // heads
        self.scale = key_dim**-0.5
        self.size = size
        self.group = group
        self.qkv_parts = (key_dim, key_dim, group)
        self.attention_biases = nn.Parameter(torch.zeros(heads, size * size))
        self.register_buffer("attention_bias_idxs", _offset_index(size))
        self.qkvs = nn.ModuleList(ConvBN(group, sum(self.qkv_parts)) for _ in range(heads))
        self.dws = nn.ModuleList(ConvBN(key_dim, key_dim, k, groups=key_dim) for k in kernels[:heads])
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, gamma=0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, size, size]`` in and out."""
        biases = self.attention_biases[:, self.attention_bias_idxs]
        out: list[Tensor] = []
        for i, (part, qkv, dw) in enumerate(zip(x.split(self.group, dim=1), self.qkvs, self.dws, strict=True)):
            q, k, v = qkv(part + out[-1] if out else part).split(self.qkv_parts, dim=1)
            scores = dw(q).flatten(2).transpose(1, 2) @ k.flatten(2) * self.scale
            attention = (scores + biases[i]).softmax(dim=-1)
            y = v.flatten(2) @ attention.transpose(1, 2)
            out.append(y.reshape(-1, self.group, self.size, self.size))
        return self.proj(torch.cat(out, dim=1))


class WindowAttention(nn.Module):
    """Cascaded group attention inside non-overlapping windows.

    A feature map that fits one window attends as a whole. Otherwise it is zero-padded at the bottom and right to
    whole windows, each of which attends by itself.

    Args:
        resolution: side of the square feature map.
        window: side of a window; the other arguments are those of :class:`CascadedGroupAttention`.
    """

    def __init__(self, dim: int, key_dim: int, heads: int, resolution: int, window: int, kernels: Sequence[int]):
        super().__init__()
        self.resolution = resolution
        self.window = min(window, resolution)
        self.attn = CascadedGroupAttention(dim, key_dim, heads, self.window, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, resolution, resolution]`` in and out."""
        if self.resolution == self.window:
            return self.attn(x)
        channels, w = x.shape[1], self.window
        side = -(-self.resolution // w)
        pad = side * w - self.resolution
        if pad:
            x = nn.functional.pad(x, (0, pad, 0, pad))
        x = x.permute(0, 2, 3, 1).reshape(-1, side, w, side, w, channels)
        x = x.transpose(2, 3).reshape(-1, w, w, channels).permute(0, 3, 1, 2)
        x = self.attn(x)
        x = x.permute(0, 2, 3, 1).reshape(-1, side, side, w, w, channels)
        x = x.transpose(2, 3).reshape(-1, side * w, side * w, channels).permute(0, 3, 1, 2)
        return x[:, :, : self.resolution, : self.resolution] if pad else x


class Block(nn.Module):
    """The sandwich layout: depthwise convolution and FFN, attention, depthwise convolution and FFN; each residual."""

    def __init__(self, dim: int, key_dim: int, heads: int, resolution: int, window: int, kernels: Sequence[int]):
        super().__init__()
        self.dw0 = depthwise(dim, gamma=0.0)
        self.ffn0 = Residual(FFN(dim))
        self.mixer = Residual(WindowAttention(dim, key_dim, heads, resolution, window, kernels))
        self.dw1 = depthwise(dim, gamma=0.0)
        self.ffn1 = Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, resolution, resolution]`` in and out."""
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class EfficientViT(ThreeStageViT):
    """The classifier: images ``[N, 3, img_size, img_size]`` to logits ``[N, num_classes]``."""

    def __init__(self, config: _Config, num_classes: int):
        check_per_stage("embed_dim", config.embed_dim, low=8)
        check_per_stage("depth", config.depth, low=0)
        check_per_stage("num_heads", config.num_heads)
        check_int("key_dim", config.key_dim)
        check_int("window_size", config.window_size)
        check_int("img_size", config.img_size, low=16)
        for dim, heads in zip(config.embed_dim, config.num_heads, strict=True):
            if dim % heads:
                raise InputError(f"num_heads holds {heads}", f"that does not divide the {dim} channels of its stage")
        if len(config.kernels) < max(config.num_heads) or any(k < 1 or k % 2 == 0 for k in config.kernels):
            raise InputError(f"kernels is {config.kernels!r}", "it takes one odd kernel size for each head")
        resolution = -(-config.img_size // config.patch_size)
        stages = []
        for dim, depth, heads in zip(config.embed_dim, config.depth, config.num_heads, strict=True):
            shape = (dim, config.key_dim, heads, resolution, config.window_size, config.kernels)
            stages.append([Block(*shape) for _ in range(depth)])
            resolution = -(-resolution // 2)
        super().__init__(config.embed_dim, stages, config.patch_size, num_classes)
        self.img_size = config.img_size

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 ``[N, 3, img_size, img_size]`` to logits ``[N, num_classes]``.

        Raises:
            InputError: the images have another size; windows would silently mix images.
        """
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if not tracing and (x.shape[2] != self.img_size or x.shape[3] != self.img_size):
            raise InputError(
                f"the images are {x.shape[2]}x{x.shape[3]}",
                f"this EfficientViT was built for {self.img_size}x{self.img_size}",
                "build it with img_size=",
            )
        return super().forward(x)


def create(
    name: str,
    num_classes: int = 1000,
    *,
    embed_dim: Sequence[int] | None = None,
    depth: Sequence[int] | None = None,
    num_heads: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
    key_dim: int | None = None,
    window_size: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
) -> EfficientViT:
    """Build one of ``efficientvit_m0`` to ``efficientvit_m5``; an option left out has the published value.

    Args:
        name: the variant.
        num_classes: classes of the head.
        embed_dim: channels of the three stages, at least 8 and multiples of their ``num_heads``.
        depth: blocks of the three stages.
        num_heads: attention heads of the three stages.
        kernels: odd kernel size of the depthwise convolution on the query of each head.
        key_dim: size of a query and a key.
        window_size: side of an attention window.
        img_size: side of the square images, at least 16.
        patch_size: stride of the stem: 1, 2, 4, 8 or 16. Below 16 the first convolutions of the stem have stride 1.

    Raises:
        InputError: an option is out of range.
    """
    given = {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "kernels": kernels,
        "key_dim": key_dim,
        "window_size": window_size,
        "img_size": img_size,
        "patch_size": patch_size,
    }
    return EfficientViT(replace(_VARIANTS[name], **{k: v for k, v in given.items() if v is not None}), num_classes)
