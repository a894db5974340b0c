"""SHViT's and EfficientViT's common parts recomputed from a state dict, with none of the code under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
EPSILON = 1e-5


def at(weights: Weights, prefix: str) -> Weights:
    """The weights under a prefix, without it."""
    return {k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")}


def batch_norm(w: Weights, x: Tensor) -> Tensor:
    """gamma (x - mu) / sqrt(var + eps) + beta over axis 1."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, gamma, beta = (w[k].view(shape) for k in ("running_mean", "running_var", "weight", "bias"))
    return gamma * (x - mean) / (var + EPSILON).sqrt() + beta


def conv_bn(w: Weights, x: Tensor, stride: int = 1) -> Tensor:
    """Convolution then BatchNorm, or the folded convolution with its bias."""
    kernel = w["c.weight"]
    groups = x.shape[1] // kernel.shape[1]
    y = F.conv2d(x, kernel, w.get("c.bias"), stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
    return batch_norm(at(w, "bn"), y) if "bn.weight" in w else y


def ffn(w: Weights, x: Tensor) -> Tensor:
    return conv_bn(at(w, "pw2"), conv_bn(at(w, "pw1"), x).clamp(min=0))


def squeeze_excite(w: Weights, x: Tensor) -> Tensor:
    pooled = x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
    hidden = (pooled @ w["fc1.weight"][:, :, 0, 0].T + w["fc1.bias"]).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ w["fc2.weight"][:, :, 0, 0].T + w["fc2.bias"])))
    return torch.einsum("nchw,nc->nchw", x, gate)


def patch_merging(w: Weights, x: Tensor) -> Tensor:
    x = conv_bn(at(w, "conv1"), x).clamp(min=0)
    x = conv_bn(at(w, "conv2"), x, stride=2).clamp(min=0)
    return conv_bn(at(w, "conv3"), squeeze_excite(at(w, "se"), x))


def sandwich(w: Weights, x: Tensor) -> Tensor:
    x = x + conv_bn(at(w, "0.m"), x)
    return x + ffn(at(w, "1.m"), x)


def network(w: Weights, x: Tensor, block: Callable[[Weights, Tensor], Tensor]) -> Tensor:
    """The whole classifier with stride 16 stem; ``block`` computes one block of a stage."""
    for i in (0, 2, 4, 6):
        x = conv_bn(at(w, f"patch_embed.{i}"), x, stride=2)
        x = x.clamp(min=0) if i < 6 else x
    for stage in (1, 2, 3):
        stage_weights = at(w, f"blocks{stage}")
        for i in sorted({int(k.split(".")[0]) for k in stage_weights}):
            block_weights = at(stage_weights, str(i))
            if stage > 1 and i in (0, 2):
                x = sandwich(block_weights, x)
            elif stage > 1 and i == 1:
                x = patch_merging(block_weights, x)
            else:
                x = block(block_weights, x)
    pooled = x.mean(dim=(2, 3))
    if "head.bn.weight" in w:
        pooled = batch_norm(at(w, "head.bn"), pooled)
    return pooled @ w["head.l.weight"].T + w["head.l.bias"]


def fold(w: Weights) -> dict[str, Tensor]:
    """The same network with W' = W g / sqrt(v + eps), b' = beta - mu g / sqrt(v + eps), as a state dict.

    A folded convolution has ``c.weight`` and ``c.bias``; the head, where the norm comes first, has W' = W diag(s) and
    b' = b + W (beta - mu s).
    """
    out = {k: v for k, v in w.items() if ".bn." not in k}
    for norm in [k.removesuffix(".weight") for k in w if k.endswith(".bn.weight")]:
        bn = at(w, norm)
        scale = bn["weight"] / (bn["running_var"] + EPSILON).sqrt()
        shift = bn["bias"] - bn["running_mean"] * scale
        if norm == "head.bn":
            out["head.l.weight"] = w["head.l.weight"] * scale
            out["head.l.bias"] = w["head.l.bias"] + w["head.l.weight"] @ shift
        else:
            conv = norm.removesuffix(".bn")
            out[f"{conv}.c.weight"] = w[f"{conv}.c.weight"] * scale[:, None, None, None]
            out[f"{conv}.c.bias"] = shift
    return out
