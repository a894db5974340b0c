"""SHViT image classifiers in training form.

Source: Yun & Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024, section 3 and
table 2. State-dict keys, shapes and order are those of the authors' implementation, so that their checkpoints load.
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
    partial_dim: Sequence[int]
    types: Sequence[str] = "iss"
    qk_dim: int = 16
    patch_size: int = 16


_VARIANTS = {
    "shvit_s1": _Config((128, 224, 320), (2, 4, 5), (32, 48, 68)),
    "shvit_s2": _Config((128, 308, 448), (2, 4, 5), (32, 66, 96)),
    "shvit_s3": _Config((192, 352, 448), (3, 5, 5), (48, 75, 96)),
    "shvit_s4": _Config((224, 336, 448), (4, 7, 6), (48, 72, 96)),
}


class SHSA(nn.Module):
    """Single-head self-attention on the first ``partial_dim`` of ``dim`` channels; the others pass by (section 3.2).

    With ``p = GroupNorm(x[:partial_dim])`` and ``q, k, v = conv(p)`` over the ``HW`` positions as tokens::

        y = proj(relu(concat(v softmax(q^T k / sqrt(qk_dim))^T, x[partial_dim:])))

    Args:
        dim: channels in and out.
        partial_dim: channels that attend, also the size of a value.
        qk_dim: size of a query and a key.
    """

    def __init__(self, dim: int, partial_dim: int, qk_dim: int):
        super().__init__()
        self.scale = qk_dim**-0.5
        self.parts = (partial_dim, dim - partial_dim)
        self.qkv_parts = (qk_dim, qk_dim, partial_dim)
        self.pre_norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvBN(partial_dim, sum(self.qkv_parts))
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, gamma=0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, H, W]`` in and out."""
        height, width = x.shape[2:]
        active, passive = x.split(self.parts, dim=1)
        q, k, v = (t.flatten(2) for t in self.qkv(self.pre_norm(active)).split(self.qkv_parts, dim=1))
        attention = (q.transpose(1, 2) @ k * self.scale).softmax(dim=-1)
        active = (v @ attention.transpose(1, 2)).reshape(-1, self.parts[0], height, width)
        return self.proj(torch.cat((active, passive), dim=1))


class Block(nn.Module):
    """Depthwise convolution, attention (type ``s``) or none (type ``i``), FFN; each residual (section 3.3)."""

    def __init__(self, kind: str, dim: int, partial_dim: int, qk_dim: int):
        super().__init__()
        self.conv = depthwise(dim, gamma=0.0)
        self.mixer = Residual(SHSA(dim, partial_dim, qk_dim)) if kind == "s" else nn.Identity()
        self.ffn = Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, H, W]`` in and out."""
        return self.ffn(self.mixer(self.conv(x)))


class SHViT(ThreeStageViT):
    """The classifier: images ``[N, 3, H, W]`` of any size to logits ``[N, num_classes]``."""

    def __init__(self, config: _Config, num_classes: int):
        check_per_stage("embed_dim", config.embed_dim, low=8)
        check_per_stage("depth", config.depth, low=0)
        check_per_stage("partial_dim", config.partial_dim)
        check_int("qk_dim", config.qk_dim)
        if len(config.types) != 3 or not set(config.types) <= {"i", "s"}:
            raise InputError(f"types is {config.types!r}", "each of three stages has attention ('s') or none ('i')")
        for dim, partial in zip(config.embed_dim, config.partial_dim, strict=True):
            if partial >= dim:
                raise InputError(f"partial_dim holds {partial}", f"that is not a part of the {dim} channels")
        stages = [
            [Block(kind, dim, partial, config.qk_dim) for _ in range(depth)]
            for kind, dim, partial, depth in zip(
                config.types, config.embed_dim, config.partial_dim, config.depth, strict=True
            )
        ]
        super().__init__(config.embed_dim, stages, config.patch_size, num_classes)


def create(
    name: str,
    num_classes: int = 1000,
    *,
    embed_dim: Sequence[int] | None = None,
    depth: Sequence[int] | None = None,
    partial_dim: Sequence[int] | None = None,
    types: Sequence[str] | None = None,
    qk_dim: int | None = None,
    patch_size: int | None = None,
) -> SHViT:
    """Build one of ``shvit_s1`` to ``shvit_s4``; an option left out has the published value.

    Args:
        name: the variant.
        num_classes: classes of the head.
        embed_dim: channels of the three stages, at least 8.
        depth: blocks of the three stages.
        partial_dim: channels that attend, per stage.
        types: ``s`` (attention) or ``i`` (none), per stage.
        qk_dim: size of a query and a key.
        patch_size: stride of the stem: 1, 2, 4, 8 or 16. Below 16 the first convolutions of the stem have stride 1.

    Raises:
        InputError: an option is out of range.
    """
    given = {
        "embed_dim": embed_dim,
        "depth": depth,
        "partial_dim": partial_dim,
        "types": types,
        "qk_dim": qk_dim,
        "patch_size": patch_size,
    }
    return SHViT(replace(_VARIANTS[name], **{k: v for k, v in given.items() if v is not None}), num_classes)
