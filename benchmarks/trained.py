"""Networks that were really trained, and the images they are judged on.

The folder EDGECOMPILE_DATA holds archives of JPEG files (``jpeg``, ``offsets``, ``labels``) and the state dicts of
CIFAR-10 ResNets (akamaster/pytorch_resnet_cifar10). The archives may be sorted by class: a sample is spread evenly.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(os.environ.get("EDGECOMPILE_DATA", "../shared/data"))
# What those ResNets subtract from RGB in [0, 1], and divide by.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def images(name: str, count: int | None = None, part: float = 0.0) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Pictures of an archive, uint8 [H, W, 3], and their labels, int64.

    Args:
        name: of the archive.
        count: how many, evenly spread; None for all.
        part: where in each of `count` stretches the picture is taken, from 0 to below 1.
    """
    from PIL import Image

    with np.load(DATA / name) as stored:
        jpeg, ends, labels = stored["jpeg"], stored["offsets"], stored["labels"]
    number = min(count or len(labels), len(labels))
    chosen = ((np.arange(number) + part) * len(labels) / number).astype(int)
    opened = (Image.open(io.BytesIO(jpeg[ends[i] : ends[i + 1]].tobytes())) for i in chosen)
    return (np.asarray(p.convert("RGB")) for p in opened), labels[chosen].astype(np.int64)


def resnet(name: str) -> Any:
    """He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with shortcuts of option A.

    Args:
        name: ``resnet20`` or ``resnet32``.

    Returns:
        the module, in eval mode: ``[N, 3, 32, 32]`` to ``[N, 10]``.
    """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, entry: int, width: int):
            super().__init__()
            self.stride, self.more = width // entry, (width - entry) // 2
            self.conv1 = nn.Conv2d(entry, width, 3, self.stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.more:
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
            return torch.relu(x + y)

    class ResNet(nn.Module):
        def __init__(self, blocks: int):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            self.layer1, self.layer2, self.layer3 = (
                nn.Sequential(*(Block(width if i else entry, width) for i in range(blocks)))
                for entry, width in ((16, 16), (16, 32), (32, 64))
            )
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
            return self.linear(x.mean((2, 3)))

    (file,) = DATA.glob(f"{name}-*.th")
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = ResNet((int(name.removeprefix("resnet")) - 2) // 6)
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()})
    return model.eval()
