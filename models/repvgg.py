"""RepVGG image classifiers in training form: three parallel branches that are one 3x3 convolution once trained.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3 and table 2. State-dict keys,
shapes and order are those of the authors' implementation, so that their checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from edgecompile.errors import InputError

from .layers import check_int


@dataclass(frozen=True)
class _Config:
    """Channels, blocks and stride of each stage; the first stage is the stem. Only a stage's first block strides."""

    widths: Sequence[int]
    depths: Sequence[int]
    strides: Sequence[int]


_VARIANTS = {
    "repvgg_a0": _Config((48, 48, 96, 192, 1280), (1, 2, 4, 14, 1), (2, 2, 2, 2, 2)),
}


class RepVGGBlock(nn.Module):
    """``relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x))``, the last where input and output have one shape (figure 2)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(cin) if cin == cout and stride == 1 else None
        self.rbr_dense = _conv_bn(cin, cout, 3, stride)
        self.rbr_1x1 = _conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[N, cin, H, W]`` to ``[N, cout, ceil(H / stride), ceil(W / stride)]``."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        return nn.functional.relu(y)


def _conv_bn(cin: int, cout: int, kernel: int, stride: int) -> nn.Sequential:
    branch = nn.Sequential()
    branch.add_module("conv", nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(cout))
    return branch


class RepVGG(nn.Module):
    """The classifier: images ``[N, 3, H, W]`` of any size to logits ``[N, num_classes]``."""

    def __init__(self, config: _Config, num_classes: int):
        super().__init__()
        check_int("num_classes", num_classes)
        counts = {name: len(values) for name, values in vars(config).items()}
        if len(set(counts.values())) != 1:
            raise InputError(
                "the stages differ", ", ".join(f"{k} has {v} values" for k, v in counts.items()), "give as many of each"
            )
        for name, values in vars(config).items():
            for value in values:
                check_int(name, value)
        cin = 3
        self.stages: list[str] = []
        for i, (width, depth, stride) in enumerate(zip(config.widths, config.depths, config.strides, strict=True)):
            blocks = [RepVGGBlock(cin if j == 0 else width, width, stride if j == 0 else 1) for j in range(depth)]
            # The stem's one block has no index in the authors' keys.
            self.add_module(f"stage{i}", blocks[0] if i == 0 and depth == 1 else nn.Sequential(*blocks))
            self.stages.append(f"stage{i}")
            cin = width
        self.linear = nn.Linear(cin, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 ``[N, 3, H, W]`` to logits ``[N, num_classes]``."""
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def create(
    name: str,
    num_classes: int = 1000,
    *,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> RepVGG:
    """Build ``repvgg_a0``; an option left out has the published value.

    Args:
        name: the variant.
        num_classes: classes of the head.
        widths: channels of the stages, of which the first is the stem.
        depths: blocks of the stages.
        strides: strides of the stages.

    Raises:
        InputError: an option is out of range.
    """
    given = {"widths": widths, "depths": depths, "strides": strides}
    return RepVGG(replace(_VARIANTS[name], **{k: v for k, v in given.items() if v is not None}), num_classes)
