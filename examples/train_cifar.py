"""Train a small network of the zoo on CIFAR-10, and write the checkpoint that create(name, pretrained=True) loads.

python examples/train_cifar.py repvgg_cifar --data FOLDER --out repvgg_cifar.pt

FOLDER (or EDGECOMPILE_DATA) holds cifar10_train.npz and cifar10_test.npz: ``jpeg`` (uint8, the files one after the
other), ``offsets`` (int64, one more than there are images) and ``labels`` (integers, alphabetical classes). JPEG loses
what 32 x 32 pixels can hardly spare, so an accuracy on such images is below one on CIFAR-10 as it was published, and
compares only with accuracies on the same files.

A run that was stopped goes on from its state file. On one machine the same seed and number of threads give the same
weights, whether a run was stopped or not. The checkpoints of the package are what the defaults give.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from edgecompile import models
from edgecompile.files import write_atomic
from edgecompile.models.repavit import ChannelIdleFfn

SMOOTHING = 0.1
CLIP = 1.0
WARM_UP = 0.15  # of all steps
PADDING = 4


@dataclass(frozen=True)
class Recipe:
    """What differs between the networks; bfloat16 is used where it was measured to be faster on a CPU."""

    epochs: int
    rate: float = 3e-3
    decay: float = 0.05
    bfloat16: bool = False


RECIPES = {
    "shvit_cifar": Recipe(10),
    "efficientvit_cifar": Recipe(9),
    "repavit_cifar": Recipe(45, rate=2e-3),
    "repvgg_cifar": Recipe(12, bfloat16=True),
}


def decoded(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N]; decoding is done once and kept in a temporary file."""
    packed = np.load(path)
    labels = torch.from_numpy(packed["labels"].astype(np.int64))
    jpeg, offsets = packed["jpeg"], packed["offsets"]
    cache = Path(tempfile.gettempdir()) / f"cifar-{hashlib.sha256(jpeg).hexdigest()[:16]}.npy"
    if not cache.exists():
        images = [Image.open(io.BytesIO(jpeg[a:b])).convert("RGB") for a, b in itertools.pairwise(offsets)]
        file = io.BytesIO()
        np.save(file, np.stack([np.asarray(i) for i in images]).transpose(0, 3, 1, 2))
        write_atomic(cache, [file.getbuffer()])
    return torch.from_numpy(np.load(cache)), labels


def normalised(name: str, images: Tensor) -> Tensor:
    """Uint8 [N, 3, 32, 32] to what the network expects."""
    entry = models.ZOO[name]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (entry.mean, entry.std))
    x = (images.float() / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels, the border filled with black, and mirrored or not."""
    count, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    dy, dx = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator)
    columns = torch.arange(width).expand(count, width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns) + dx
    rows = torch.arange(height) + dy
    which = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order; a rest that fills no batch is left for another epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    for chosen in order[: len(order) // size * size].split(size):
        yield augmented(images[chosen], generator), labels[chosen]


def rate(progress: float) -> float:
    """Share of the highest learning rate at a share of all steps: linear up, then half a cosine down to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def flat_ffn(layer: ChannelIdleFfn, x: Tensor) -> Tensor:
    """What ChannelIdleFfn computes, in half the time: tokens as rows, and no GELU where nothing reads it."""
    u = layer.fc1(layer.norm1(x.flatten(0, 1)))
    u = torch.cat((F.gelu(u[:, : layer.active]), u[:, layer.active :]), 1)
    return x + layer.fc2(layer.norm2(u)).view_as(x)


def for_training(model: nn.Module) -> nn.Module:
    """The same model, its parameters laid out and its layers computed in the way that is fastest to train."""
    for layer in model.modules():
        if isinstance(layer, ChannelIdleFfn):
            layer.forward = flat_ffn.__get__(layer)
    return model.to(memory_format=torch.channels_last).train()


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels but no vector."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, recipe.rate, betas=(0.9, 0.99))


@torch.no_grad()
def accuracy(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose highest logit is their class."""
    model.eval()
    right = sum(
        int((model(normalised(name, x)).argmax(1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    model.train()
    return right / len(images)


def save(content: dict[str, Any], path: Path) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    write_atomic(path, [file.getbuffer()])


def train(name: str, data: Path, out: Path, state: Path, epochs: int, batch: int, seed: int) -> float:
    """Train, write the checkpoint, and return the accuracy on the test images."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model = for_training(models.create(name))
    optimizer = optimiser(model, recipe)
    images, labels = decoded(data / "cifar10_train.npz")
    test = decoded(data / "cifar10_test.npz")
    steps = len(images) // batch
    run = {"name": name, "epochs": epochs, "batch": batch, "seed": seed}
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{state} belongs to another run: {saved['run']}; remove it to start anew")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
        print(f"{name}: goes on after epoch {first}", flush=True)
    for epoch in range(first, epochs):
        begun, cpu, total = time.monotonic(), time.process_time(), 0.0
        for step, (pixels, wanted) in enumerate(batches(images, labels, batch, seed * 1_000_003 + epoch)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * rate((epoch * steps + step) / (epochs * steps))
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                logits = model(normalised(name, pixels))
            loss = F.cross_entropy(logits.float(), wanted, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += loss.item()
            if step % 100 == 99:
                print(
                    f"{name}: epoch {epoch + 1}/{epochs}, step {step + 1}/{steps}, loss {total / (step + 1):.3f}, "
                    f"{time.monotonic() - begun:.0f} s",
                    flush=True,
                )
        run_on = {"run": run, "epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(run_on, state)
        print(
            f"{name}: epoch {epoch + 1}/{epochs}, loss {total / steps:.3f}, test {accuracy(name, model, *test):.2%}, "
            f"{time.monotonic() - begun:.0f} s wall, {time.process_time() - cpu:.0f} s CPU",
            flush=True,
        )
    save({k: v.contiguous() for k, v in model.state_dict().items()}, out)
    return accuracy(name, model, *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("EDGECOMPILE_DATA"), help="folder of the .npz files"
    )
    parser.add_argument("--out", type=Path, help="the checkpoint; NAME.pt if not given")
    parser.add_argument("--epochs", type=int, help="default: that of the published checkpoint")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data is None:
        parser.error("where are the images? give --data FOLDER or set EDGECOMPILE_DATA")
    torch.set_num_threads(args.threads)
    out = args.out or Path(f"{args.name}.pt")
    state = out.with_suffix(".state")
    epochs = args.epochs or RECIPES[args.name].epochs
    found = train(args.name, args.data, out, state, epochs, args.batch, args.seed)
    print(f"{args.name}: {found:.2%} of the test images, which are lossy JPEG; {out} written")


if __name__ == "__main__":
    main()
