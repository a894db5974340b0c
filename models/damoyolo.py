"""DAMO-YOLO detectors in training form: TinyNAS backbone, RepGFPN neck, ZeroHead.

Source: Xu et al., "DAMO-YOLO: A Report on Real-Time Object Detection Design", 2022 (arXiv 2211.15444), and the
widths and depths its authors published. State-dict keys, shapes and order are theirs, so their checkpoints load
unchanged.

Two habits of the published models are easy to miss: the transition convolutions of the CSP backbone (M, L) use ReLU
although its residual blocks use SiLU, and the pyramid pooling of the backbone uses SiLU in every variant.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgecompile.errors import InputError

_BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)
_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "identity": nn.Identity}
_LEVEL_STRIDES = (8, 16, 32)
_POOL_SIZES = (5, 9, 13)


@dataclass(frozen=True)
class _Stage:
    """A run of backbone blocks; only the first block may have a stride.

    Attributes:
        out: channels each block puts out.
        hidden: channels between the convolutions of a block.
        blocks: number of blocks.
        stride: stride of the stage, in pixels of its input.
    """

    out: int
    hidden: int
    blocks: int
    stride: int = 2


@dataclass(frozen=True)
class _Variant:
    """One published model.

    Attributes:
        family: ``res`` (residual), ``csp`` (cross-stage partial) or ``mob`` (inverted residual, depthwise neck).
        stem: channels of the stem.
        stages: backbone stages after the stem. A CSP stage counts the blocks between two downsamplings.
        act: activation of backbone and neck.
        out: channels of the neck at stride 8, 16 and 32.
        merge_blocks: blocks in each merge node of the neck.
        hidden_ratio: width of a RepConv of the neck relative to its block.
        reg_max: last bin of the box-distance distribution, in strides.
        head_kernel: kernel size of the head's convolutions.
    """

    family: str
    stem: int
    stages: tuple[_Stage, ...]
    act: str
    out: tuple[int, int, int]
    merge_blocks: int
    hidden_ratio: float = 1.0
    reg_max: int = 16
    head_kernel: int = 3

    @property
    def taps(self) -> tuple[int, ...]:
        """Indices of the stages that feed the neck: the last one at stride 8, 16 and 32."""
        strides = [stage.stride for stage in self.stages]
        return tuple(i for i in range(len(strides)) if strides[i + 1 : i + 2] != [1])[-3:]


_nano = partial(_Variant, "mob", act="silu", merge_blocks=2, reg_max=7, head_kernel=1)

_VARIANTS = {
    "damoyolo_t": _Variant(
        family="res",
        stem=24,
        stages=(_Stage(64, 24, 2), _Stage(96, 64, 2), _Stage(192, 96, 2), _Stage(192, 152, 2, 1), _Stage(384, 192, 1)),
        act="relu",
        out=(64, 128, 256),
        merge_blocks=3,
    ),
    "damoyolo_s": _Variant(
        family="res",
        stem=32,
        stages=(
            _Stage(128, 24, 1),
            _Stage(128, 88, 5),
            _Stage(256, 128, 3),
            _Stage(256, 120, 2, 1),
            _Stage(512, 144, 1),
        ),
        act="relu",
        out=(128, 256, 512),
        merge_blocks=3,
        hidden_ratio=0.75,
    ),
    "damoyolo_m": _Variant(
        family="csp",
        stem=32,
        stages=(_Stage(128, 64, 1), _Stage(128, 64, 3), _Stage(256, 256, 7), _Stage(512, 256, 2)),
        act="silu",
        out=(128, 256, 512),
        merge_blocks=4,
    ),
    "damoyolo_l": _Variant(
        family="csp",
        stem=32,
        stages=(_Stage(128, 96, 2), _Stage(128, 96, 4), _Stage(256, 384, 9), _Stage(512, 384, 3)),
        act="silu",
        out=(128, 256, 512),
        merge_blocks=6,
    ),
    "damoyolo_ns": _nano(
        stem=16,
        stages=(_Stage(24, 88, 1), _Stage(40, 160, 2), _Stage(64, 288, 2), _Stage(80, 400, 2, 1), _Stage(160, 880, 2)),
        out=(40, 80, 160),
    ),
    "damoyolo_nm": _nano(
        stem=16,
        stages=(
            _Stage(40, 144, 2),
            _Stage(64, 256, 2),
            _Stage(112, 504, 2),
            _Stage(128, 640, 2, 1),
            _Stage(256, 1408, 1),
        ),
        out=(64, 128, 256),
    ),
    "damoyolo_nl": _nano(
        stem=24,
        stages=(
            _Stage(48, 168, 1),
            _Stage(80, 320, 2),
            _Stage(160, 720, 2),
            _Stage(160, 800, 3, 1),
            _Stage(320, 1760, 2),
        ),
        out=(80, 160, 320),
    ),
}


def _conv(inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=bias)


class ConvBNAct(nn.Module):
    """Convolution, BatchNorm, activation; the padding keeps the size at stride 1."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1, act: str = "silu"):
        super().__init__()
        self.conv = _conv(inp, out, kernel, stride)
        self.bn = _BatchNorm(out)
        self.act = _ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        return self.act(self.bn(self.conv(x)))


class ConvBN(nn.Module):
    """Convolution and BatchNorm under the key names of the TinyNAS backbones."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv1 = _conv(inp, out, kernel, stride)
        self.bn1 = _BatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        return self.bn1(self.conv1(x))


class BackboneConv(nn.Module):
    """A :class:`ConvBN` and an activation: stems without Focus, and the transitions of the CSP backbone."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, act: str):
        super().__init__()
        self.conv = ConvBN(inp, out, kernel, stride)
        self.act = _ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        return self.act(self.conv(x))


class DepthwiseSeparable(nn.Module):
    """Depthwise and pointwise convolution, each with BatchNorm and activation."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, act: str):
        super().__init__()
        self.depthwise = _conv(inp, inp, kernel, stride, groups=inp)
        self.pointwise = _conv(inp, out, 1)
        self.dwnorm = _BatchNorm(inp)
        self.pwnorm = _BatchNorm(out)
        self.act = _ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        x = self.act(self.dwnorm(self.depthwise(x)))
        return self.act(self.pwnorm(self.pointwise(x)))


class RepConv(nn.Module):
    """``act(BN(conv3x3(x)) + BN(conv1x1(x)))``; there is no identity branch.

    Source: Ding et al., "RepVGG", CVPR 2021, without its third branch. With ``t = gamma / sqrt(var + eps)`` of each
    branch it equals one 3x3 convolution whose kernel is ``K3 * t3 + pad1(K1 * t1)``.
    """

    def __init__(self, inp: int, out: int, stride: int = 1, act: str = "relu"):
        super().__init__()
        self.act = _ACTIVATIONS[act]()
        self.rbr_dense = nn.Sequential()
        self.rbr_1x1 = nn.Sequential()
        for branch, kernel in ((self.rbr_dense, 3), (self.rbr_1x1, 1)):
            branch.add_module("conv", _conv(inp, out, kernel, stride))
            branch.add_module("bn", _BatchNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x))


class Focus(nn.Module):
    """Stem: the four pixels of each 2x2 cell become channels (top left, bottom left, top right, bottom right)."""

    def __init__(self, inp: int, out: int, act: str):
        super().__init__()
        self.conv = ConvBNAct(4 * inp, out, 3, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/2, W/2]``."""
        return self.conv(torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1))


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling between two 1x1 convolutions (He et al., SPPnet, 2014; max pools of 5, 9 and 13)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.conv1 = ConvBNAct(channels, hidden, 1)
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in _POOL_SIZES)
        self.conv2 = ConvBNAct(hidden * (1 + len(_POOL_SIZES)), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to the same shape."""
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(pool(x) for pool in self.pools)], 1))


class ResidualBlock(nn.Module):
    """``act(RepConv(act(conv(x))) + x)``; a block of stride 2 has no shortcut."""

    def __init__(self, inp: int, hidden: int, out: int, kernel: int, stride: int, act: str):
        super().__init__()
        self.conv1 = ConvBN(inp, hidden, kernel)
        self.conv2 = RepConv(hidden, out, stride, act="identity")
        self.act = _ACTIVATIONS[act]()
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        y = self.conv2(self.act(self.conv1(x)))
        return self.act(y + x if self.residual else y)


class InvertedResidual(nn.Module):
    """1x1 expansion, 5x5 depthwise, 1x1 projection (Howard et al., MobileNetV3, 2019, without squeeze-excitation).

    Args:
        inp: input channels.
        hidden: expanded channels.
        out: output channels; the input is added where it has as many and ``stride`` is 1.
        stride: of the depthwise convolution.
        act: activation after the first two convolutions.
        gap: leave an identity after the depthwise BatchNorm, which is where the published backbone, but not the neck,
            numbers a module without parameters.
    """

    def __init__(self, inp: int, hidden: int, out: int, stride: int, act: str, gap: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(inp, hidden, 1),
            _BatchNorm(hidden),
            _ACTIVATIONS[act](),
            _conv(hidden, hidden, 5, stride, groups=hidden),
            _BatchNorm(hidden),
            *([nn.Identity()] if gap else []),
            _ACTIVATIONS[act](),
            _conv(hidden, out, 1),
            _BatchNorm(out),
        )
        self.residual = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        return x + self.conv(x) if self.residual else self.conv(x)


class StackStage(nn.Module):
    """A stage of the ``res`` and ``mob`` backbones: blocks in sequence, pyramid pooling after the first of the last."""

    def __init__(self, inp: int, stage: _Stage, family: str, act: str, pooling: bool):
        super().__init__()
        self.block_list = nn.ModuleList()
        for index in range(stage.blocks):
            width, stride = (inp, stage.stride) if index == 0 else (stage.out, 1)
            if family == "res":
                block = ResidualBlock(width, stage.hidden, stage.out, 1, stride, act)
            else:
                block = InvertedResidual(width, stage.hidden, stage.out, stride, act, gap=True)
            self.block_list.append(block)
            if index == 0 and pooling:
                self.block_list.append(PyramidPooling(stage.out))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/stride, W/stride]``."""
        for block in self.block_list:
            x = block(x)
        return x


class CSPStage(nn.Module):
    """A stage of the ``csp`` backbone: downsample, then half the channels through the blocks and half around them.

    Source: Wang et al., "CSPNet", 2020.
    """

    def __init__(self, inp: int, stage: _Stage, act: str, pooling: bool):
        super().__init__()
        half = stage.out // 2
        self.convstem = nn.ModuleList(ResidualBlock(half, stage.hidden, half, 3, 1, act) for _ in range(stage.blocks))
        self.downsampler = BackboneConv(inp, stage.out, 3, 2, "relu")
        self.spp = PyramidPooling(stage.out) if pooling else nn.Identity()
        self.conv_start = BackboneConv(stage.out, half, 1, 1, "relu")
        self.conv_shortcut = BackboneConv(stage.out, half, 1, 1, "relu")
        self.conv_fuse = BackboneConv(stage.out, stage.out, 1, 1, "relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inp, H, W]`` to ``[N, out, H/2, W/2]``."""
        x = self.spp(self.downsampler(x))
        y = self.conv_start(x)
        for block in self.convstem:
            y = block(y)
        return self.conv_fuse(torch.cat((y, self.conv_shortcut(x)), 1))


class Backbone(nn.Module):
    """TinyNAS backbone."""

    def __init__(self, variant: _Variant):
        super().__init__()
        family, act = variant.family, variant.act
        stem = BackboneConv(3, variant.stem, 3, 2, act) if family == "mob" else Focus(3, variant.stem, act)
        blocks = nn.ModuleList([stem])
        inp = variant.stem
        for stage in variant.stages:
            pooling = stage is variant.stages[-1]
            blocks.append(
                CSPStage(inp, stage, act, pooling) if family == "csp" else StackStage(inp, stage, family, act, pooling)
            )
            inp = stage.out
        self.taps = variant.taps
        # Published checkpoints name the list after the family.
        self.list_name = "csp_stage" if family == "csp" else "block_list"
        self.add_module(self.list_name, blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to the maps at stride 8, 16 and 32."""
        maps = []
        for block in self.get_submodule(self.list_name).children():
            x = block(x)
            maps.append(x)
        return [maps[1 + tap] for tap in self.taps]


class RepBlock(nn.Module):
    """``x + conv3x3(RepConv(x))``: the block of RepGFPN's merge nodes."""

    def __init__(self, channels: int, hidden: int, act: str):
        super().__init__()
        self.conv1 = ConvBNAct(hidden, channels, 3, act=act)
        self.conv2 = RepConv(channels, hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to the same shape."""
        return x + self.conv1(self.conv2(x))


class Merge(nn.Module):
    """Merge node of RepGFPN: the outputs of all blocks, and the untouched half, go into the last 1x1 convolution."""

    def __init__(self, inp: int, out: int, variant: _Variant):
        super().__init__()
        act, half = variant.act, out // 2
        self.conv1 = ConvBNAct(inp, half, 1, act=act)
        self.conv2 = ConvBNAct(inp, half, 1, act=act)
        self.convs = nn.ModuleList()
        for _ in range(variant.merge_blocks):
            if variant.family == "mob":
                hidden = math.ceil(3 * half / 8) * 8
                block = nn.Sequential(OrderedDict(conv=InvertedResidual(half, hidden, half, 1, act)))
            else:
                block = RepBlock(half, int(half * variant.hidden_ratio), act)
            self.convs.append(block)
        self.conv3 = ConvBNAct(half * (1 + variant.merge_blocks), out, 1, act=act)

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps ``[N, *, H, W]`` whose channels sum to ``inp``, to ``[N, out, H, W]``."""
        x = torch.cat(maps, 1)
        outputs = [self.conv1(x)]
        x = self.conv2(x)
        for block in self.convs:
            x = block(x)
            outputs.append(x)
        return self.conv3(torch.cat(outputs, 1))


class Neck(nn.Module):
    """RepGFPN, the generalized feature pyramid with queen-fusion; nodes are numbered as in the state dict."""

    def __init__(self, variant: _Variant):
        super().__init__()
        act = variant.act
        (c8, c16, c32), (o8, o16, o32) = (variant.stages[tap].out for tap in variant.taps), variant.out
        down = DepthwiseSeparable if variant.family == "mob" else ConvBNAct
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.bu_conv13 = down(c16, c16, 3, 2, act)
        self.merge_3 = Merge(c32 + c16, c32, variant)
        self.bu_conv24 = down(c8, c8, 3, 2, act)
        self.merge_4 = Merge(c16 + c8 + c32, c16, variant)
        self.merge_5 = Merge(c8 + c16, o8, variant)
        self.bu_conv57 = down(o8, o8, 3, 2, act)
        self.merge_7 = Merge(c16 + o8, o16, variant)
        self.bu_conv46 = down(c16, c16, 3, 2, act)
        self.bu_conv76 = down(o16, o16, 3, 2, act)
        self.merge_6 = Merge(c32 + c16 + o16, o32, variant)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Three maps at stride 8, 16 and 32 to three maps of the same sizes with ``out`` channels."""
        x8, x16, x32 = maps
        x3 = self.merge_3(x32, self.bu_conv13(x16))
        x4 = self.merge_4(x16, self.bu_conv24(x8), self.upsample(x3))
        x5 = self.merge_5(x8, self.upsample(x4))
        x7 = self.merge_7(x4, self.bu_conv57(x5))
        x6 = self.merge_6(x3, self.bu_conv46(x4), self.bu_conv76(x7))
        return [x5, x7, x6]


class Scale(nn.Module):
    """Multiplication by one learned number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return x * self.scale


class Integral(nn.Module):
    """Expected value of a distribution over the bins 0 to ``reg_max`` (Li et al., Generalized Focal Loss, 2020)."""

    project: Tensor

    def __init__(self, reg_max: int):
        super().__init__()
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities ``[..., reg_max + 1]`` to means ``[...]``."""
        return torch.matmul(x, self.project.unsqueeze(1)).squeeze(-1)


class ZeroHead(nn.Module):
    """One convolution per level and branch, and no hidden layer."""

    def __init__(self, channels: tuple[int, int, int], num_classes: int, reg_max: int, kernel: int):
        super().__init__()
        self.bins = reg_max + 1
        self.integral = Integral(reg_max)
        self.gfl_cls = nn.ModuleList(_conv(c, num_classes, kernel, bias=True) for c in channels)
        self.gfl_reg = nn.ModuleList(_conv(c, 4 * self.bins, kernel, bias=True) for c in channels)
        self.scales = nn.ModuleList(Scale() for _ in channels)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps at stride 8, 16 and 32 to scores ``[N, A, classes]`` and boxes ``[N, A, 4]``.

        The ``A`` anchors are the cells of the three maps, row by row. A cell's reference point is its top-left corner.
        """
        scores, logits, cells = [], [], []
        for x, classify, regress, scale, stride in zip(
            maps, self.gfl_cls, self.gfl_reg, self.scales, _LEVEL_STRIDES, strict=True
        ):
            scores.append(classify(x).sigmoid().flatten(2))
            logits.append(scale(regress(x)).flatten(2))
            axes = [torch.arange(size, dtype=x.dtype, device=x.device) for size in x.shape[-2:]]
            row, column = torch.meshgrid(axes, indexing="ij")
            cells.append(torch.stack((column, row, torch.ones_like(row)), -1).flatten(0, 1) * stride)
        cell = torch.cat(cells)
        corner, stride = cell[:, :2], cell[:, 2:]
        # Distances from the corner to the left, top, right and bottom edge, as distributions over bins of one stride.
        distribution = torch.cat(logits, 2).transpose(1, 2)
        distribution = distribution.reshape(distribution.shape[0], -1, 4, self.bins).softmax(3)
        distance = self.integral(distribution) * stride
        boxes = torch.cat((corner - distance[..., :2], corner + distance[..., 2:]), -1)
        return torch.cat(scores, 2).transpose(1, 2), boxes


class DamoYolo(nn.Module):
    """A DAMO-YOLO detector without its losses and without non-maximum suppression."""

    def __init__(self, variant: _Variant, num_classes: int):
        super().__init__()
        self.backbone = Backbone(variant)
        self.neck = Neck(variant)
        self.head = ZeroHead(variant.out, num_classes, variant.reg_max, variant.head_kernel)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Detect objects.

        Args:
            image: ``[N, 3, H, W]`` float, RGB in 0..255 as the published weights expect; H and W multiples of 32.

        Returns:
            scores ``[N, A, classes]`` in 0..1, and boxes ``[N, A, 4]`` as left, top, right, bottom in input pixels, for
            ``A = H*W * (1/8**2 + 1/16**2 + 1/32**2)`` anchors.
        """
        return self.head(self.neck(self.backbone(image)))


def create(name: str, num_classes: int = 80) -> nn.Module:
    """Build a DAMO-YOLO detector in training form, with torch's default initialisation.

    Args:
        name: ``damoyolo_t``, ``_s``, ``_m``, ``_l`` (native input 640x640), ``_ns``, ``_nm`` or ``_nl`` (416x416).
        num_classes: number of object classes; the published weights have COCO's 80.

    Returns:
        A :class:`DamoYolo`: float32 images ``[N, 3, H, W]`` to scores ``[N, A, num_classes]`` and boxes ``[N, A, 4]``.

    Raises:
        InputError: the name is unknown, or there is no class.
    """
    if name not in _VARIANTS:
        raise InputError(f"no DAMO-YOLO model named {name!r}", fix=f"choose one of {', '.join(_VARIANTS)}")
    if num_classes < 1:
        raise InputError(
            f"num_classes is {num_classes}", "a detector needs at least one class", "give a positive number"
        )
    return DamoYolo(_VARIANTS[name], num_classes)


class Detections(NamedTuple):
    """What was found in one image, best first.

    Attributes:
        boxes: float ``[D, 4]``, left, top, right, bottom in input pixels.
        scores: float ``[D]`` in 0..1.
        labels: int64 ``[D]``, class index from 0.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def postprocess(
    scores: np.ndarray,
    boxes: np.ndarray,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.7,
    max_detections: int = 100,
) -> list[Detections]:
    """Turn the model's outputs into detections by greedy non-maximum suppression within each class.

    A box competes once for every class it scores in. Taken in descending order of score, a pair of box and class is
    kept unless a kept box of the same class overlaps it by more than ``iou_threshold``. Equal scores go by anchor, then
    by class.

    Args:
        scores: ``[N, A, classes]``, the model's first output.
        boxes: ``[N, A, 4]``, the model's second output.
        score_threshold: a pair must score above it.
        iou_threshold: intersection over union in 0..1; the published results use 0.7 (0.65 for the nano models).
        max_detections: at most so many detections per image.

    Returns:
        One :class:`Detections` for each of the N images.

    Raises:
        InputError: the two arrays do not belong together.
    """
    scores, boxes = np.asarray(scores), np.asarray(boxes)
    if scores.ndim != 3 or boxes.shape != (*scores.shape[:2], 4):
        raise InputError(
            f"scores of shape {scores.shape} and boxes of shape {boxes.shape} do not belong together",
            "they must be [N, A, classes] and [N, A, 4]",
        )
    return [
        _suppress(*image, score_threshold, iou_threshold, max_detections) for image in zip(scores, boxes, strict=True)
    ]


def _suppress(
    scores: np.ndarray, boxes: np.ndarray, score_threshold: float, iou_threshold: float, max_detections: int
) -> Detections:
    anchors, labels = np.nonzero(scores > score_threshold)
    order = np.argsort(-scores[anchors, labels], kind="stable")
    anchors, labels = anchors[order], labels[order]
    candidates = boxes[anchors]
    area = _area(candidates)
    alive = np.ones(len(anchors), bool)
    kept: list[int] = []
    # Candidates are sorted over all classes, so stopping early loses nothing.
    for best in range(len(anchors)):
        if len(kept) == max_detections:
            break
        if not alive[best]:
            continue
        kept.append(best)
        low = np.maximum(candidates[best, :2], candidates[:, :2])
        high = np.minimum(candidates[best, 2:], candidates[:, 2:])
        overlap = _area(np.concatenate((low, high), 1))
        # As a product, so that two empty boxes do not divide zero by zero.
        alive &= (labels != labels[best]) | (overlap <= iou_threshold * (area[best] + area - overlap))
    return Detections(candidates[kept], scores[anchors[kept], labels[kept]], labels[kept])


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1)
