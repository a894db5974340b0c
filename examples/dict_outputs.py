"""A detector that returns nested dicts, as torchvision and mmdetection models do, for batches of 1 to 8 images.

edgecompile build examples/dict_outputs.py --target ort --dynamic images:0=1:2:8
"""

import torch
from torch import nn


def convBnAct(cIn, cOut, stride=1):
    return nn.Sequential(nn.Conv2d(cIn, cOut, 3, stride, 1, bias=False), nn.BatchNorm2d(cOut), nn.SiLU(inplace=True))


class Backbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = convBnAct(3, width, 2)
        self.down1 = convBnAct(width, 2 * width, 2)
        self.down2 = convBnAct(2 * width, 4 * width, 2)

    def forward(self, x):
        c2 = self.down1(self.stem(x))
        return {"p2": c2, "p3": self.down2(c2)}


class Head(nn.Module):
    def __init__(self, channels, numClasses):
        super().__init__()
        self.cls = nn.Conv2d(channels, numClasses, 1)
        self.reg = nn.Conv2d(channels, 4, 1)

    def forward(self, feature):
        b = feature.shape[0]
        scores = self.cls(feature).flatten(2).transpose(1, 2).sigmoid()
        boxes = self.reg(feature).reshape(b, 4, -1).permute(0, 2, 1).exp()
        return scores, boxes


class Detector(nn.Module):
    def __init__(self, width=16, numClasses=5):
        super().__init__()
        self.numClasses = numClasses
        self.backbone = Backbone(width)
        self.heads = nn.ModuleDict({"p2": Head(2 * width, numClasses), "p3": Head(4 * width, numClasses)})

    def forward(self, images):
        features = self.backbone(images)
        levels = {name: self.heads[name](feature) for name, feature in features.items()}
        return {
            "detections": {
                "scores": torch.cat([scores for scores, _ in levels.values()], 1),
                "boxes": torch.cat([boxes for _, boxes in levels.values()], 1),
            },
            "features": list(features.values()),
            "num_classes": self.numClasses,
            "losses": None,
        }


def model():
    torch.manual_seed(7)
    return Detector().train()


def example_inputs():
    return torch.randn(1, 3, 64, 64)
