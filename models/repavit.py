"""RePaViT: vision transformers whose feed-forward layers leave a share of their channels without activation.

Source: Xu et al., "RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward
Network Layers", ICML 2025 (section 3), on DeiT (Touvron et al., ICML 2021) and Swin (Liu et al., ICCV 2021). The models
here are in training form, with their authors' state-dict keys, shapes and order. Dropout and stochastic depth, which do
nothing in eval mode, are left out.

A feed-forward layer has hidden width 4C, of which the first A channels pass a GELU and the rest stay linear. After
training the linear ones, both BatchNorms and the shortcut are one C x C matrix, so that with A = C the parameters of
the layer go from 8 C^2 to 3 C^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompile.errors import InputError

from .layers import check_int, stem

_IMAGE = 224
_WINDOW = 7


@dataclass(frozen=True)
class _Deit:
    """A DeiT: width, heads, number of blocks, side of an image and of a patch, and what embeds the patches."""

    dim: int
    heads: int
    depth: int = 12
    img_size: int = _IMAGE
    patch_size: int = 16
    conv_stem: bool = False


_DEITS = {
    "repavit_tiny": _Deit(192, 3),
    "repavit_small": _Deit(384, 6),
    "repavit_base": _Deit(768, 12),
}
_SWIN_DEPTHS = {"repaswin_tiny": (2, 2, 6, 2)}


def active_channels(hidden: int, idle_ratio: float) -> int:
    """How many of ``hidden`` feed-forward channels, counted from the first, keep their activation."""
    return math.ceil(hidden * (1 - idle_ratio))


class ChannelIdleFfn(nn.Module):
    """Feed-forward layer with idle channels, BatchNorm before each linear map and its own shortcut.

    ``x + fc2(norm2(where(active, gelu(u), u)))`` with ``u = fc1(norm1(x))``, on ``[B, N, C]``. BatchNorm works on
    channels and so sees ``[B, C, N]``.
    """

    def __init__(self, dim: int, idle_ratio: float):
        super().__init__()
        hidden = 4 * dim
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm1 = nn.BatchNorm1d(dim)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.active = active_channels(hidden, idle_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its shortcut."""
        u = self.fc1(self.norm1(x.transpose(1, 2)).transpose(1, 2))
        if self.active:
            # Made here from sizes that no input changes: exporters then see a mask that depends on constants only.
            mask = torch.zeros(1, 1, self.fc1.out_features, dtype=torch.bool, device=x.device)
            mask[:, :, : self.active] = True
            u = torch.where(mask, F.gelu(u), u)
        return x + self.fc2(self.norm2(u.transpose(1, 2)).transpose(1, 2))


class Attention(nn.Module):
    """Multi-head self-attention with a LayerNorm before it and its own shortcut, on ``[B, N, C]``."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention and its shortcut."""
        _, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(-1, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(-1, tokens, dim))


class DeitBlock(nn.Module):
    """Attention and a feed-forward layer, each with its shortcut, on ``[B, N, C]``."""

    def __init__(self, dim: int, heads: int, idle_ratio: float):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = ChannelIdleFfn(dim, idle_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return self.mlp(self.attn(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens: ``[B, 3, H, W]`` to ``[B, H W / patch^2, dim]``."""

    def __init__(self, dim: int, patch: int, *, bias: bool, norm: bool):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch, bias=bias)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch of images."""
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class ConvEmbed(nn.Module):
    """Overlapping patches as tokens: four 3 x 3 convolutions, ``[B, 3, H, W]`` to ``[B, H W / patch^2, dim]``.

    Small data sets do not teach a transformer what is near what (Xiao et al., "Early Convolutions Help Transformers
    See Better", NeurIPS 2021); these convolutions know it.
    """

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = stem(dim, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch of images."""
        return self.proj(x).flatten(2).transpose(1, 2)


class RepaDeit(nn.Module):
    """DeiT with idle feed-forward channels and a LayerNorm before the blocks; classifies the class token."""

    def __init__(self, config: _Deit, idle_ratio: float, num_classes: int):
        super().__init__()
        for option in ("dim", "heads", "depth", "img_size", "patch_size"):
            check_int(option, getattr(config, option))
        if config.dim % config.heads:
            raise InputError(f"heads is {config.heads}", f"that does not divide the {config.dim} channels")
        if config.img_size % config.patch_size:
            raise InputError(f"patch_size is {config.patch_size}", f"that does not divide {config.img_size} pixels")
        dim, tokens = config.dim, (config.img_size // config.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.patch_embed = (
            ConvEmbed(dim, config.patch_size)
            if config.conv_stem
            else PatchEmbed(dim, config.patch_size, bias=False, norm=False)
        )
        self.norm_pre = nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.Sequential(*(DeitBlock(dim, config.heads, idle_ratio) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images ``[B, 3, img_size, img_size]``, normalised as in training, into logits."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(self.norm_pre(x)))[:, 0])


class WindowAttention(nn.Module):
    """Self-attention within windows of M x M tokens with a learnt bias for each relative position.

    Works on ``[B windows, M^2, C]``; see Swin, section 3.2.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * _WINDOW - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(_WINDOW), torch.arange(_WINDOW))
        offset = place[:, None] - place + _WINDOW - 1
        self.register_buffer("relative_position_index", offset[..., 0] * (2 * _WINDOW - 1) + offset[..., 1])
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within each window.

        Args:
            x: ``[B windows, M^2, C]``, the windows of an image next to each other.
            mask: float ``[windows, M^2, M^2]`` to add to the scores of each image's windows.
        """
        _, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(2, 3)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = scores + bias.reshape(tokens, tokens, self.heads).permute(2, 0, 1)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.reshape(-1, windows, self.heads, tokens, tokens) + mask[:, None]
            scores = scores.reshape(-1, self.heads, tokens, tokens)
        y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(-1, tokens, dim))


def _partition(x: Tensor) -> Tensor:
    """``[B, H, W, C]`` to ``[B windows, M^2, C]``."""
    _, height, width, dim = x.shape
    x = x.reshape(-1, height // _WINDOW, _WINDOW, width // _WINDOW, _WINDOW, dim)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, _WINDOW**2, dim)


def _merge(windows: Tensor, size: int) -> Tensor:
    """The inverse of :func:`_partition` for square feature maps."""
    dim, count = windows.shape[-1], size // _WINDOW
    x = windows.reshape(-1, count, count, _WINDOW, _WINDOW, dim)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size, size, dim)


def _shift_mask(size: int, shift: int) -> Tensor:
    """Scores to add so that a shifted window attends only between tokens that were neighbours before the shift.

    After a cyclic shift the last window of each axis holds two parts of the image that do not touch.

    Returns:
        ``[windows, M^2, M^2]`` of 0 and -100.
    """
    edges = torch.tensor([size - _WINDOW, size - shift])
    part = torch.bucketize(torch.arange(size), edges, right=True)
    part = _partition((3 * part[:, None] + part)[None, :, :, None]).squeeze(-1)
    return torch.where(part[:, None] == part[:, :, None], 0.0, -100.0)


class SwinBlock(nn.Module):
    """Window attention, shifted or not, and a feed-forward layer, each with its shortcut, on ``[B, size^2, C]``."""

    attn_mask: Tensor | None

    def __init__(self, dim: int, size: int, heads: int, shift: int, idle_ratio: float):
        super().__init__()
        self.size, self.shift = size, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads)
        self.mlp = ChannelIdleFfn(dim, idle_ratio)
        self.register_buffer("attn_mask", _shift_mask(size, shift) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        _, tokens, dim = x.shape
        y = self.norm1(x).reshape(-1, self.size, self.size, dim)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = _merge(self.attn(_partition(y), self.attn_mask), self.size)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return self.mlp(x + y.reshape(-1, tokens, dim))


class PatchMerging(nn.Module):
    """Each 2 x 2 tokens become one of twice the width: ``[B, size^2, C]`` to ``[B, size^2 / 4, 2C]``."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.size = size
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge neighbouring tokens."""
        _, tokens, dim = x.shape
        x = x.reshape(-1, self.size, self.size, dim)
        # Column by column: the order of the published weights.
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, -1).reshape(-1, tokens // 4, 4 * dim)))


class SwinStage(nn.Module):
    """Blocks of one resolution, every second one with shifted windows, then the merging before the next stage."""

    def __init__(self, dim: int, size: int, heads: int, depth: int, idle_ratio: float, *, last: bool):
        super().__init__()
        # A feature map of a single window has nothing to shift.
        shift = _WINDOW // 2 if size > _WINDOW else 0
        self.blocks = nn.ModuleList(SwinBlock(dim, size, heads, i % 2 * shift, idle_ratio) for i in range(depth))
        self.downsample = nn.Identity() if last else PatchMerging(dim, size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stage."""
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class RepaSwin(nn.Module):
    """Swin with idle feed-forward channels; classifies the mean token."""

    def __init__(self, depths: tuple[int, ...], idle_ratio: float, num_classes: int):
        super().__init__()
        last = len(depths) - 1
        self.patch_embed = PatchEmbed(96, 4, bias=True, norm=True)
        self.layers = nn.Sequential(
            *(
                SwinStage(96 << i, _IMAGE // 4 >> i, 3 << i, depth, idle_ratio, last=i == last)
                for i, depth in enumerate(depths)
            )
        )
        self.norm = nn.LayerNorm(96 << last)
        self.head = nn.Linear(96 << last, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images ``[B, 3, 224, 224]``, normalised with the ImageNet mean and deviation, into logits."""
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean(1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create(
    name: str,
    idle_ratio: float = 0.75,
    num_classes: int = 1000,
    *,
    dim: int | None = None,
    heads: int | None = None,
    depth: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    conv_stem: bool | None = None,
) -> RepaDeit | RepaSwin:
    """Build a RePaViT in its training form; an option left out has the published value.

    Args:
        name: ``repavit_tiny``, ``repavit_small``, ``repavit_base`` or ``repaswin_tiny``; the last takes the first two
            options only.
        idle_ratio: share of the feed-forward channels without activation, 0 to 1 (theta in the paper).
        num_classes: size of the logits.
        dim: channels, a multiple of ``heads``.
        heads: attention heads.
        depth: blocks.
        img_size: side of the square images, a multiple of ``patch_size``.
        patch_size: side of a patch; with ``conv_stem`` 1, 2, 4, 8 or 16.
        conv_stem: embed with four 3 x 3 convolutions in place of one matrix for each patch.

    Raises:
        InputError: the name is unknown or an option is out of range.
    """
    given = {
        "dim": dim,
        "heads": heads,
        "depth": depth,
        "img_size": img_size,
        "patch_size": patch_size,
        "conv_stem": conv_stem,
    }
    given = {k: v for k, v in given.items() if v is not None}
    if not 0 <= idle_ratio <= 1:
        raise InputError(
            f"{name}: idle_ratio={idle_ratio}", "it is a share of the channels", "give a number from 0 to 1"
        )
    if num_classes < 1:
        raise InputError(f"{name}: num_classes={num_classes}", "a classifier has at least one class")
    if name in _DEITS:
        return RepaDeit(replace(_DEITS[name], **given), idle_ratio, num_classes)
    if name in _SWIN_DEPTHS:
        if given:
            raise InputError(f"{name} has no option {next(iter(given))!r}", "its shape is fixed")
        return RepaSwin(_SWIN_DEPTHS[name], idle_ratio, num_classes)
    raise InputError(f"no RePaViT named {name!r}", "", f"choose one of {', '.join((*_DEITS, *_SWIN_DEPTHS))}")
