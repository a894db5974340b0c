"""Blocks that SHViT and EfficientViT have in common, with the attribute names of the authors' checkpoints.

Sources: Liu et al., "EfficientViT", CVPR 2023 (section 3) and Yun & Ro, "SHViT", CVPR 2024 (section 3.3), which keeps
EfficientViT's stem, downsampling and head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from edgecompile.errors import InputError


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``value`` (halves round up), at least one ``divisor``."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


class ConvBN(nn.Sequential):
    """Convolution without bias, padded to keep the size at stride 1, then BatchNorm2d.

    Args:
        gamma: initial BatchNorm weight; 0 makes a residual branch start as zero (Goyal et al., 2017, section 5.1).
    """

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, gamma: float = 1.0):
        super().__init__()
        self.c = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        nn.init.constant_(self.bn.weight, gamma)


class BNLinear(nn.Sequential):
    """BatchNorm1d, then a linear layer: ``[N, cin]`` to ``[N, cout]``."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(cin)
        self.l = nn.Linear(cin, cout)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)


class Residual(nn.Module):
    """``x + m(x)``."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that ``m`` keeps."""
        return x + self.m(x)


class FFN(nn.Module):
    """Pointwise expansion by two, ReLU, pointwise projection: ``[N, dim, H, W]`` to the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.pw1 = ConvBN(dim, 2 * dim)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(2 * dim, dim, gamma=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, H, W]`` in and out."""
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    """Channel gate ``x * sigmoid(fc2(relu(fc1(mean_HW(x)))))`` (Hu et al., "SENet", CVPR 2018, section 3).

    The bottleneck has a quarter of the channels, rounded to a multiple of 8.
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = make_divisible(dim / 4)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, H, W]`` in and out."""
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class PatchMerging(nn.Module):
    """Inverted-residual downsampling with squeeze-excite: ``[N, dim, H, W]`` to ``[N, out, H/2, W/2]`` (rounded up)."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvBN(dim, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvBN(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, dim, H, W]`` to ``[N, out, ceil(H/2), ceil(W/2)]``."""
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


def depthwise(dim: int, gamma: float = 1.0) -> Residual:
    """Residual 3x3 depthwise convolution."""
    return Residual(ConvBN(dim, dim, 3, groups=dim, gamma=gamma))


def _transition(dim: int, out: int) -> list[nn.Module]:
    def sandwich(d: int) -> nn.Sequential:
        return nn.Sequential(depthwise(d), Residual(FFN(d)))

    return [sandwich(dim), PatchMerging(dim, out), sandwich(out)]


def stem(dim: int, patch_size: int) -> nn.Sequential:
    """Four 3x3 convolutions, ReLU between them: ``[N, 3, H, W]`` to ``[N, dim, H / patch_size, W / patch_size]``.

    Raises:
        InputError: the patch size is not 1, 2, 4, 8 or 16.
    """
    if patch_size not in (1, 2, 4, 8, 16):
        raise InputError(f"patch_size is {patch_size!r}", "four convolutions of stride 1 or 2 give 1, 2, 4, 8 or 16")
    widths = (3, dim // 8, dim // 4, dim // 2, dim)
    halvings = int(math.log2(patch_size))
    layers: list[nn.Module] = []
    for i, (cin, cout) in enumerate(pairwise(widths)):
        # The last ones halve: a small patch keeps the early, narrow convolutions at full resolution.
        layers += [ConvBN(cin, cout, 3, stride=2 if i >= 4 - halvings else 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ThreeStageViT(nn.Module):
    """Convolutional stem, three stages of blocks with downsampling between them, average pool, linear head.

    Args:
        embed_dim: channels of the three stages.
        stages: the blocks of the three stages.
        patch_size: stride of the stem, a power of two up to 16.
        num_classes: classes of the head.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self, embed_dim: Sequence[int], stages: Sequence[Iterable[nn.Module]], patch_size: int, num_classes: int
    ):
        super().__init__()
        check_int("num_classes", num_classes)
        self.patch_embed = stem(embed_dim[0], patch_size)
        self.blocks1 = nn.Sequential(*stages[0])
        self.blocks2 = nn.Sequential(*_transition(embed_dim[0], embed_dim[1]), *stages[1])
        self.blocks3 = nn.Sequential(*_transition(embed_dim[1], embed_dim[2]), *stages[2])
        self.head = BNLinear(embed_dim[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 ``[N, 3, H, W]`` to logits ``[N, num_classes]``."""
        x = self.blocks3(self.blocks2(self.blocks1(self.patch_embed(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def check_int(option: str, value: object, low: int = 1) -> None:
    """Raise InputError, naming the option, unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or value < low:
        raise InputError(f"{option} holds {value!r}", f"it takes integers of at least {low}")


def check_per_stage(option: str, values: object, low: int = 1) -> None:
    """Raise InputError, naming the option, unless ``values`` are three integers of at least ``low``."""
    if not isinstance(values, Sequence) or len(values) != 3:
        raise InputError(f"{option} is {values!r}", "there are three stages", f"give three values of {option}")
    for value in values:
        check_int(option, value, low)
