"""DEA-Net for single-image dehazing, in training form.

Source: Chen, He & Lu, "DEA-Net: Single Image Dehazing Based on Detail-Enhanced Convolution and Content-Guided
Attention", IEEE Transactions on Image Processing, 2024 (arXiv 2301.04805), and the structure of its published weights,
whose state-dict keys, shapes and order these modules have.

A detail-enhanced convolution has five kernels: four encode differences between neighbouring pixels, one is ordinary.
Convolution is linear in its kernel, so the module adds the kernels up and convolves once, also in training. An exported
graph therefore holds that sum as a subgraph of initializers; folding it is left to the compiler.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompile.errors import InputError


class CentralDifference(nn.Module):
    """Difference of each pixel to the centre: the centre of the 3x3 kernel loses the sum of all its taps."""

    centre: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.register_buffer("centre", torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]), persistent=False)

    def kernel(self) -> Tensor:
        """Kernel ``[C, C, 3, 3]`` of the equivalent convolution."""
        weight = self.conv.weight
        return weight - weight.sum((2, 3), keepdim=True) * self.centre


class HorizontalDifference(nn.Module):
    """Left column minus right column (Sobel-like, with learned weights); three weights per pair of channels."""

    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3)
        self.register_buffer("sign", torch.tensor([1.0, 0, -1]), persistent=False)

    def kernel(self) -> Tensor:
        """Kernel ``[C, C, 3, 3]`` of the equivalent convolution."""
        return self.conv.weight.unsqueeze(3) * self.sign


class VerticalDifference(nn.Module):
    """Top row minus bottom row; three weights per pair of channels."""

    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3)
        self.register_buffer("sign", torch.tensor([[1.0], [0], [-1]]), persistent=False)

    def kernel(self) -> Tensor:
        """Kernel ``[C, C, 3, 3]`` of the equivalent convolution."""
        return self.conv.weight.unsqueeze(2) * self.sign


class AngularDifference(nn.Module):
    """Difference of each pixel to its clockwise neighbour around the 3x3 window; the centre cancels."""

    neighbour: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)
        self.register_buffer("neighbour", torch.tensor([3, 0, 1, 6, 4, 2, 7, 8, 5]), persistent=False)

    def kernel(self) -> Tensor:
        """Kernel ``[C, C, 3, 3]`` of the equivalent convolution."""
        weight = self.conv.weight
        return weight - weight.flatten(2).index_select(2, self.neighbour).reshape(weight.shape)


class DEConv(nn.Module):
    """Detail-enhanced convolution: the sum of five parallel 3x3 convolutions, computed as one."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1_1 = CentralDifference(channels)
        self.conv1_2 = HorizontalDifference(channels)
        self.conv1_3 = VerticalDifference(channels)
        self.conv1_4 = AngularDifference(channels)
        self.conv1_5 = nn.Conv2d(channels, channels, 3)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel ``[C, C, 3, 3]`` and bias ``[C]`` of the equivalent convolution."""
        differences = (self.conv1_1, self.conv1_2, self.conv1_3, self.conv1_4)
        kernel = reduce(torch.add, [*(branch.kernel() for branch in differences), self.conv1_5.weight])
        bias = reduce(torch.add, [p for name, p in self.named_parameters() if name.endswith("bias")])
        return kernel, bias

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return F.conv2d(x, *self.merged(), padding=1)


class SpatialAttention(nn.Module):
    """One logit per pixel from the mean and maximum over channels."""

    def __init__(self):
        super().__init__()
        self.sa = nn.Conv2d(2, 1, 7, padding=3, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, 1, H, W]``."""
        return self.sa(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1))


class ChannelAttention(nn.Module):
    """One logit per channel from the mean over pixels, through a bottleneck of ``channels // reduction``."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        hidden = channels // reduction
        self.ca = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, 1, 1]``."""
        return self.ca(x.mean((2, 3), keepdim=True))


class PixelAttention(nn.Module):
    """A weight per channel and pixel: each channel and its coarse attention map go through a 7x7 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.pa2 = nn.Conv2d(2 * channels, channels, 7, padding=3, padding_mode="reflect", groups=channels)

    def forward(self, x: Tensor, coarse: Tensor) -> Tensor:
        """Two ``[N, C, H, W]`` to weights in 0..1 of the same shape."""
        return self.pa2(torch.stack((x, coarse), 2).flatten(1, 2)).sigmoid()


class DEBlock(nn.Module):
    """``x + conv(x + relu(deconv(x)))``: detail-enhanced block of the two finer levels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = DEConv(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return self.conv2(self.conv1(x).relu() + x) + x


class DEABlock(nn.Module):
    """A :class:`DEBlock` with content-guided attention before its outer shortcut.

    Channel and spatial attention add up to a coarse map, which pixel attention refines.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = DEConv(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.sa = SpatialAttention()
        self.ca = ChannelAttention(channels, 8)
        self.pa = PixelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        y = self.conv2(self.conv1(x).relu() + x)
        return y * self.pa(y, self.sa(y) + self.ca(y)) + x


class CGAFusion(nn.Module):
    """Mix encoder and decoder features by content-guided attention on their sum.

    The weights pass through a sigmoid twice, so they lie in 0.5..0.73: the published weights were trained so.
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.sa = SpatialAttention()
        self.ca = ChannelAttention(channels, reduction)
        self.pa = PixelAttention(channels)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """Two ``[N, C, H, W]`` to one of the same shape."""
        total = encoder + decoder
        weight = self.pa(total, self.sa(total) + self.ca(total)).sigmoid()
        return self.conv(total + weight * encoder + (1 - weight) * decoder)


class DEANet(nn.Module):
    """Encoder and decoder of three levels, with ``base_channels`` at full resolution and twice as many a level down."""

    def __init__(self, base_channels: int):
        super().__init__()
        c1, c2, c3 = base_channels, 2 * base_channels, 4 * base_channels
        self.down1 = nn.Sequential(nn.Conv2d(3, c1, 3, padding=1))
        self.down2 = nn.Sequential(nn.Conv2d(c1, c2, 3, 2, 1), nn.ReLU())
        self.down3 = nn.Sequential(nn.Conv2d(c2, c3, 3, 2, 1), nn.ReLU())
        self._add_blocks("down_level1", DEBlock, c1, 4)
        self._add_blocks("up_level1", DEBlock, c1, 4)
        self.fe_level_2 = nn.Conv2d(c2, c2, 3, padding=1)
        self._add_blocks("down_level2", DEBlock, c2, 4)
        self._add_blocks("up_level2", DEBlock, c2, 4)
        self.fe_level_3 = nn.Conv2d(c3, c3, 3, padding=1)
        self._add_blocks("level3", DEABlock, c3, 8)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(c3, c2, 3, 2, 1, output_padding=1), nn.ReLU())
        self.up2 = nn.Sequential(nn.ConvTranspose2d(c2, c1, 3, 2, 1, output_padding=1), nn.ReLU())
        self.up3 = nn.Sequential(nn.Conv2d(c1, 3, 3, padding=1))
        self.mix1 = CGAFusion(c3, 8)
        self.mix2 = CGAFusion(c2, 4)

    def _add_blocks(self, stage: str, block: type[nn.Module], channels: int, count: int) -> None:
        for index in range(1, count + 1):
            self.add_module(f"{stage}_block{index}", block(channels))

    def _blocks(self, stage: str, x: Tensor) -> Tensor:
        for name, block in self.named_children():
            if name.startswith(f"{stage}_block"):
                x = block(x)
        return x

    def forward(self, image: Tensor) -> Tensor:
        """Remove haze.

        Args:
            image: ``[N, 3, H, W]`` float, RGB in 0..1; H and W multiples of 4 and at least 16.

        Returns:
            The dehazed image ``[N, 3, H, W]``, not clipped to 0..1.
        """
        level1 = self._blocks("down_level1", self.down1(image))
        level2 = self.down2(level1)
        level3 = self.down3(self._blocks("down_level2", self.fe_level_2(level2)))
        x = self.mix1(level3, self._blocks("level3", self.fe_level_3(level3)))
        x = self.mix2(level2, self._blocks("up_level2", self.up1(x)))
        return self.up3(self._blocks("up_level1", self.up2(x)))


def create(name: str = "deanet", base_channels: int = 32) -> nn.Module:
    """Build DEA-Net in training form, with torch's default initialisation.

    Args:
        name: ``deanet``.
        base_channels: channels at full resolution; the published weights have 32.

    Returns:
        A :class:`DEANet`: float32 hazy images ``[N, 3, H, W]`` to dehazed images of the same shape.

    Raises:
        InputError: the name is unknown, or the network has no channels left in its attention bottleneck.
    """
    if name != "deanet":
        raise InputError(f"no DEA-Net model named {name!r}", fix="the only one is deanet")
    if base_channels < 2:
        raise InputError(
            f"base_channels is {base_channels}", "the attention bottleneck would be empty", "use 2 or more"
        )
    return DEANet(base_channels)
