"""LitePose: bottom-up multi-person pose estimation, in the training form, and the decoding of its maps into people.

Source: Wang et al., "Lite Pose: Efficient Architecture Design for 2D Human Pose Estimation", CVPR 2022 (sections 4 and
5), with the searched and the pruned architectures its authors published. State-dict keys, shapes and order are theirs,
so their checkpoints load unchanged. The decoding is associative embedding, from Newell et al., NeurIPS 2017, in the
form of HigherHRNet (Cheng et al., CVPR 2020).

The published MACs count a ConvTranspose on its output positions, four times what it multiplies; true figures are lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompile.errors import InputError

_BLOCKS = (6, 8, 10, 10)
_STRIDES = (2, 2, 2, 1)
_KERNEL = 7
_EXPANSION = 6


@dataclass(frozen=True)
class Arch:
    """The channels of one published architecture; block counts, strides, kernel and expansion are the same in all.

    Attributes:
        stem: channels of the stem, at half the input resolution.
        stages: channels of the four backbone stages, at 1/4, 1/8, 1/16 and 1/16 of the input resolution.
        deconv: channels of the three deconvolution levels, at 1/8, 1/4 and 1/2 of the input resolution.
    """

    stem: int
    stages: tuple[int, int, int, int]
    deconv: tuple[int, int, int]


ARCHS = {
    "search-XS": Arch(16, (16, 32, 48, 80), (16, 24, 24)),
    "search-S": Arch(16, (16, 32, 48, 120), (32, 24, 32)),
    "search-M": Arch(16, (24, 48, 72, 120), (64, 40, 32)),
    "search-L": Arch(24, (24, 64, 96, 160), (64, 40, 32)),
    "prune-S": Arch(16, (16, 32, 48, 80), (32, 24, 16)),
    "prune-M": Arch(24, (24, 48, 72, 120), (48, 40, 24)),
    "prune-L": Arch(24, (32, 64, 96, 160), (64, 48, 32)),
}


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; a shortcut where the shape stays.

    Maps ``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        hidden = _EXPANSION * inputs
        self.inv = nn.Sequential(*_conv_bn(inputs, hidden, 1), nn.ReLU6())
        self.depth_conv = nn.Sequential(*_conv_bn(hidden, hidden, _KERNEL, stride, groups=hidden), nn.ReLU6())
        self.point_conv = nn.Sequential(*_conv_bn(hidden, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.point_conv(self.depth_conv(self.inv(x)))
        return y + x if self.shortcut else y


class SeparableHead(nn.Module):
    """5x5 depthwise convolution, BN, ReLU and 1x1 convolution, without biases; keeps the resolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Sequential(
            *_conv_bn(inputs, inputs, 5, groups=inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the head."""
        return self.conv(x)


class LitePose(nn.Module):
    """Backbone, three fusion deconvolutions and a head at each of the two finest levels.

    Each deconvolution level takes the refined features of the level before and the raw features of the backbone stage
    of the same resolution: ``relu(bn(deconv(refined) + deconv(raw)))``. Each head output is a sum over both kinds too.

    Args:
        arch: the channels.
        joints: number of joints J.
    """

    def __init__(self, arch: Arch, joints: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.Sequential(*_conv_bn(3, 32, 3, stride=2), nn.ReLU6()),
            nn.Sequential(*_conv_bn(32, 32, 3, groups=32), nn.ReLU6()),
            *_conv_bn(32, arch.stem, 1),
        )
        widths = (arch.stem, *arch.stages)
        self.stage = nn.ModuleList(
            nn.Sequential(
                InvertedBottleneck(before, after, stride),
                *(InvertedBottleneck(after, after, 1) for _ in range(blocks - 1)),
            )
            for before, after, blocks, stride in zip(widths, arch.stages, _BLOCKS, _STRIDES, strict=False)
        )
        refined = (arch.stages[3], *arch.deconv[:2])
        raw = (arch.stages[2], arch.stages[1], arch.stages[0])
        outputs = (2 * joints, joints)

        def deconvs(inputs: Sequence[int]) -> nn.ModuleList:
            pairs = zip(inputs, arch.deconv, strict=True)
            return nn.ModuleList(nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=False) for i, o in pairs)

        def heads(inputs: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(SeparableHead(i, o) for i, o in zip(inputs, outputs, strict=True))

        self.deconv_refined = deconvs(refined)
        self.deconv_raw = deconvs(raw)
        self.deconv_bnrelu = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()) for c in arch.deconv)
        self.final_refined = heads(arch.deconv[1:])
        self.final_raw = heads((arch.stages[0], arch.stem))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the raw maps of a batch of images.

        Args:
            x: float images ``[N, 3, H, W]``, normalised with the ImageNet mean and deviation; H and W multiples of 16.

        Returns:
            ``[N, 2J, H/4, W/4]``, J heatmaps followed by J tag maps, and ``[N, J, H/2, W/2]``, heatmaps only.
        """
        features = [self.first(x)]
        for stage in self.stage:
            features.append(stage(features[-1]))
        half, quarter, eighth, sixteenth, refined = features
        levels = []
        for i, raw in enumerate((sixteenth, eighth, quarter)):
            refined = self.deconv_bnrelu[i](self.deconv_refined[i](refined) + self.deconv_raw[i](raw))
            levels.append(refined)
        coarse = self.final_refined[0](levels[1]) + self.final_raw[0](quarter)
        fine = self.final_refined[1](levels[2]) + self.final_raw[1](half)
        return coarse, fine


def create(name: str, joints: int = 14, arch: str | None = None) -> LitePose:
    """Build a LitePose in its training form.

    Args:
        name: ``litepose_xs``, ``litepose_s``, ``litepose_m`` or ``litepose_l``.
        joints: 14 for CrowdPose, 17 for COCO, or any other positive number.
        arch: one of :data:`ARCHS`, instead of the searched architecture of ``name``. The ``prune-*`` ones are published
            for 512 pixels.

    Raises:
        InputError: the name or the architecture is unknown, or there is no joint.
    """
    key = arch or f"search-{name.removeprefix('litepose_').upper()}"
    if key not in ARCHS:
        raise InputError(f"{name}: no architecture {key!r}", "", f"choose one of {', '.join(ARCHS)}")
    if joints < 1:
        raise InputError(f"{name}: joints={joints}", "a pose has joints", "give 14 (CrowdPose) or 17 (COCO)")
    return LitePose(ARCHS[key], joints)


def decode(
    outputs: Sequence[Any],
    *,
    max_people: int = 30,
    threshold: float = 0.1,
    tag_threshold: float = 1.0,
    refine: bool = True,
) -> list[np.ndarray]:
    """Group the maps of :class:`LitePose` into people, as its published evaluation does, without the flip test.

    Heatmaps of both levels are averaged and everything is resized to the input resolution. A joint candidate is a
    maximum of its 5x5 neighbourhood (the first in raster order among equals). Joint by joint, from the head down, the
    candidates are assigned to the people found so far at the least total of ``100 * round(|tag difference|) - score``;
    a candidate without a person of a close tag starts a new one. A position moves by a quarter pixel towards its higher
    neighbour.

    Args:
        outputs: the two maps of the model, as tensors or arrays.
        max_people: how many people an image may hold, and candidates a joint.
        threshold: the least heatmap value of a candidate.
        tag_threshold: the tag difference at which a candidate no longer belongs to a person.
        refine: fill each person's missing joints with the place of the highest ``heatmap - round(|tag difference|)``.

    Returns:
        For each image float32 ``[people, J, 3]`` of x, y and score, the best mean score first. Positions are in pixels
        of the network's input, pixel i covering the interval from i to i + 1; a joint that was not found is all zero.

    Raises:
        InputError: the maps are not those of a LitePose, or hold NaN or infinity.
    """
    if len(outputs) != 2:
        raise InputError(f"{len(outputs)} output maps", "LitePose has two", "pass both outputs of the model")
    coarse, fine = (torch.as_tensor(output).detach().float().cpu() for output in outputs)
    joints, size = fine.shape[1], fine.shape[-2:]
    if coarse.shape != (len(fine), 2 * joints, size[0] // 2, size[1] // 2):
        raise InputError(
            f"output maps of shape {tuple(coarse.shape)} and {tuple(fine.shape)}",
            "LitePose has [N, 2J, H/4, W/4] and [N, J, H/2, W/2]",
            "pass the outputs in the order of the model",
        )
    if not (coarse.isfinite().all() and fine.isfinite().all()):
        raise InputError("output maps with NaN or infinity", "the model overflowed", "run it in a wider precision")

    coarse = _double(coarse)
    heatmaps = _double((coarse[:, :joints] + fine) / 2)
    tags = _double(coarse[:, joints:])
    best, where = F.max_pool2d(heatmaps, 5, stride=1, padding=2, return_indices=True)
    width, pixels = heatmaps.shape[-1], heatmaps[0, 0].numel()
    is_peak = where.flatten(2) == torch.arange(pixels)
    scores, places = torch.where(is_peak, best.flatten(2), -torch.inf).topk(min(max_people, pixels), dim=2)
    candidate_tags = tags.flatten(2).gather(2, places)

    images = []
    for image in range(len(fine)):
        heat, tag = heatmaps[image].numpy(), tags[image].numpy()
        candidates = (scores[image].numpy(), places[image].numpy(), candidate_tags[image].numpy())
        people = _group(*candidates, max_people=max_people, threshold=threshold, tag_threshold=tag_threshold)
        poses = np.zeros((len(people), joints, 3), np.float32)
        for pose, person in zip(poses, people, strict=True):
            if refine:
                person = _fill(person, heat, tag)
            for joint, place in person.items():
                y, x = divmod(place, width)
                pose[joint] = *_subpixel(heat[joint], y, x), heat[joint, y, x]
        images.append(poses[np.argsort(-poses[..., 2].mean(1), kind="stable")])
    return images


def _double(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


def _joint_order(joints: int) -> list[int]:
    """The order of grouping: from the head over the trunk to the limbs in the COCO numbering, for any J."""
    order = [0, 1, 2, 3, 4, 5, 6, 11, 12, 7, 8, 9, 10, *range(13, joints)]
    return [joint for joint in order if joint < joints]


def _group(
    scores: np.ndarray,
    places: np.ndarray,
    tags: np.ndarray,
    *,
    max_people: int,
    threshold: float,
    tag_threshold: float,
) -> list[dict[int, int]]:
    """Assign the candidates of one image, each array ``[J, K]``, to people: joint -> place as a flat pixel index."""
    people: list[dict[int, int]] = []
    tags_of: list[list[float]] = []
    for joint in _joint_order(len(scores)):
        found = scores[joint] > threshold
        place, tag = places[joint][found], tags[joint][found]
        distance = np.abs(tag[:, None] - np.array([np.mean(t) for t in tags_of]))
        # The distance itself only decides between people that round to the same cost.
        cost = 100 * np.round(distance) - scores[joint][found][:, None] + 1e-3 * distance
        owners = assign(cost)
        for candidate, owner in enumerate(owners):
            if owner < 0 or distance[candidate, owner] >= tag_threshold:
                if len(people) == max_people:
                    continue
                owner = len(people)
                people.append({})
                tags_of.append([])
            people[owner][joint] = int(place[candidate])
            tags_of[owner].append(float(tag[candidate]))
    return people


def _fill(person: dict[int, int], heat: np.ndarray, tags: np.ndarray) -> dict[int, int]:
    """Add the joints a person lacks where the heatmap minus the rounded tag difference is highest."""
    mean = np.mean([tags[joint].flat[place] for joint, place in person.items()])
    best = (heat - np.round(np.abs(tags - mean))).reshape(len(heat), -1).argmax(1)
    added = {joint: int(place) for joint, place in enumerate(best) if heat[joint].flat[place] > 0}
    return added | person


def _subpixel(heat: np.ndarray, y: int, x: int) -> tuple[float, float]:
    """The centre of a pixel moved a quarter towards the higher neighbour, as (x, y)."""
    right, left = heat[y, min(x + 1, heat.shape[1] - 1)], heat[y, max(x - 1, 0)]
    below, above = heat[min(y + 1, heat.shape[0] - 1), x], heat[max(y - 1, 0), x]
    return x + 0.5 + (0.25 if right > left else -0.25), y + 0.5 + (0.25 if below > above else -0.25)


def assign(cost: np.ndarray) -> np.ndarray:
    """Match rows to columns one to one at the least total cost (the Hungarian method by shortest augmenting paths).

    Args:
        cost: finite ``[rows, columns]``.

    Returns:
        Integer ``[rows]``: the column of each row, or -1 for the rows left over where there are fewer columns.
    """
    rows, columns = cost.shape
    if rows > columns:
        owner = np.full(rows, -1)
        owner[assign(cost.T)] = np.arange(columns)
        return owner
    # Column 0 and row 0 are sentinels; row_of[column] is the row matched to it.
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.zeros(columns + 1, int)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        slack = np.full(columns + 1, np.inf)
        previous = np.zeros(columns + 1, int)
        seen = np.zeros(columns + 1, bool)
        while row_of[column]:
            seen[column] = True
            reduced = np.append(np.inf, cost[row_of[column] - 1] - row_price[row_of[column]] - column_price[1:])
            closer = ~seen & (reduced < slack)
            slack[closer], previous[closer] = reduced[closer], column
            following = int(np.where(seen, np.inf, slack).argmin())
            step = slack[following]
            row_price[row_of[seen]] += step
            column_price[seen] -= step
            slack[~seen] -= step
            column = following
        while column:
            row_of[column], column = row_of[previous[column]], previous[column]
    owner = np.empty(rows, int)
    owner[row_of[1:][row_of[1:] > 0] - 1] = np.flatnonzero(row_of[1:])
    return owner
