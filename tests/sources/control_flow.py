"""Python control flow on tensor values, in the ways that exporters get right, wrong, or not at all."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("enabled", torch.ones(1))


class OnInput(Net):
    def forward(self, x):
        y = self.linear(x)
        if x.sum() > 0:
            return y * 2
        return -y


class OnBuffer(Net):
    def forward(self, x):
        if self.enabled.sum() > 0:
            return self.linear(x)
        return x


class Chosen(Net):
    def forward(self, x):
        y = self.linear(x)
        return torch.where(x.sum() > 0, y * 2, -y)


class Unsupported(Net):
    def forward(self, x):
        y = self.linear(x)
        return torch.linalg.svdvals(y.reshape(-1, 2, 4))


model = OnInput
on_buffer = OnBuffer
chosen = Chosen
unsupported = Unsupported


def example_inputs():
    return torch.randn(4, 8)
