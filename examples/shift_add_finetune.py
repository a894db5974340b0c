"""Weights of two bits and attention without multiplications, and the accuracy won back by a short fine-tune.

python examples/shift_add_finetune.py out/

The recipe for any network: export it, run the pass `shift_add` on the graph, train the torch module of the *rewritten*
graph (`to_torch`: weights go to the nearest code forward, gradients pass straight through), and write the trained codes
back (`to_graph`). The target of the fine-tune is what the float network answers, beside the labels. Here the network is
a small transformer that tells stripes, columns, a checkerboard and plain noise apart.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

from edgecompile import frontend
from edgecompile.calibration_data import open_data
from edgecompile.passes.shift_add import to_torch
from edgecompile.pipeline import Pipeline
from edgecompile.torch_graph import TorchGraph

CLASSES, SIZE, PATCH, DIM, HEADS, NOISE = 4, 16, 4, 32, 2, 5.0
SPEC = "clean,fold_norm,shift_add{attention=angular,threshold=image,window=3,code=pot,bits=2}"


def images(count, seed):
    """Labelled images, the same ones each time: [count, 1, 16, 16] and [count]."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    row = torch.arange(SIZE)[:, None] % 2 * 2.0 - 1
    patterns = torch.stack([row.expand(SIZE, SIZE), row.t().expand(SIZE, SIZE), row * row.t(), torch.zeros(SIZE, SIZE)])
    return patterns[labels][:, None] + NOISE * torch.randn(count, 1, SIZE, SIZE, generator=rng), labels


class Network(nn.Module):
    """Patches, one block of attention and FFN, and a classifier."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, PATCH, PATCH)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.ffn = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM))
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        n = x.shape[1]
        q, k, v = self.qkv(self.norm1(x)).reshape(-1, n, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        share = (q @ k.transpose(-2, -1) * (DIM // HEADS) ** -0.5).softmax(-1)
        x = x + self.proj((share @ v).transpose(1, 2).reshape(-1, n, DIM))
        return self.head((x + self.ffn(self.norm2(x))).mean(1))


def train(module, steps, rate, teacher=None):
    """Fit the labels, and what the teacher answers."""
    optimizer = torch.optim.AdamW(module.parameters(), rate)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        x, labels = images(64, seed=1000 + step)
        answer = module(x)
        loss = F.cross_entropy(answer, labels)
        if teacher is not None:
            with torch.no_grad():
                target = teacher(x).softmax(1)
            loss = F.cross_entropy(answer, target) + 0.5 * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()


def accuracy(graph):
    """The share of 512 images never seen before that ONNX Runtime tells right on a graph."""
    x, labels = images(512, seed=3)
    (name,) = [t.name for t in graph.inputs]
    session = onnxruntime.InferenceSession(graph.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
    answers = [session.run(None, {name: one[None]})[0] for one in x.numpy()]
    return float((np.concatenate(answers).argmax(1) == labels.numpy()).mean())


def main(out):
    """Train, rewrite, fine-tune, save; returns the accuracies."""
    torch.manual_seed(0)
    network = Network()
    train(network, steps=150, rate=3e-3)
    with tempfile.TemporaryDirectory() as folder:
        graph = frontend.from_module(network.eval(), images(1, seed=2)[0], folder=Path(folder)).graph

    rewritten = graph.copy()
    feeds = [{graph.inputs[0].name: one[None]} for one in images(32, seed=4)[0].numpy()]
    calibration = open_data(feeds, graph.signature().inputs)
    Pipeline.parse(SPEC).run(rewritten, feeds[:2], strict=True, calibration=calibration)

    student = to_torch(rewritten)
    train(student, steps=80, rate=2e-3, teacher=TorchGraph(graph).requires_grad_(False))
    tuned = student.to_graph()
    tuned.save(Path(out) / "tuned.onnx")
    found = {name: accuracy(one) for name, one in (("float", graph), ("rewritten", rewritten), ("tuned", tuned))}
    for name, share in found.items():
        print(f"{name:10} {share:.1%}")
    return found


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
