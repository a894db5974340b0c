"""A classifier that scores itself: whatever evaluate(run) returns is in the report, and a gate can hold a build to it.

edgecompile build examples/accuracy.py --target ort

The task is to tell stripes, columns, a checkerboard and plain noise apart. The filters are random; the last layer is
the least-squares fit to labelled images, so that there is something to score without hours of training.
"""

import torch
from torch import nn
from torch.nn import functional as F

CLASSES, SIZE, NOISE = 4, 16, 3.0


def images(count, seed):
    """Labelled images, the same ones each time: [count, 1, 16, 16] and [count]."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    row = torch.arange(SIZE)[:, None] % 2 * 2.0 - 1
    patterns = torch.stack([row.expand(SIZE, SIZE), row.t().expand(SIZE, SIZE), row * row.t(), torch.zeros(SIZE, SIZE)])
    noise = NOISE * torch.randn(count, 1, SIZE, SIZE, generator=rng)
    return patterns[labels][:, None] + noise, labels


def model():
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    head = nn.Linear(32, CLASSES)
    with torch.no_grad():
        x, labels = images(512, seed=1)
        features(x)  # in training mode, so that BatchNorm sees what it will meet
        found = features.eval()(x)
        found = torch.cat([found, torch.ones(len(found), 1)], 1)
        fit = torch.linalg.lstsq(found, F.one_hot(labels, CLASSES).float()).solution.t()
        head.weight.copy_(fit[:, :-1])
        head.bias.copy_(fit[:, -1])
    return nn.Sequential(features, head)


def example_inputs():
    return images(8, seed=2)[0]


def evaluate(run):
    """The share of 512 images never seen before that are told right; the engine gets them 8 at a time."""
    x, labels = images(512, seed=3)
    return (run(x).argmax(1) == labels).float().mean()
