"""Random weights that make a model worth testing: every block does something, and activations stay in range.

Default initialisation hides defects: BatchNorm statistics are 0 and 1, its bias is 0, and many residual branches start
with a weight of 0, so that a block is the identity and a wrong rewrite of it still gives the right answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Model = TypeVar("Model", bound=nn.Module)

# Weights have the standard deviation gain / sqrt(fan in). A layer that widens or strides mostly stands in a plain chain
# before a ReLU, which needs sqrt(2) to keep the variance (He et al., ICCV 2015, section 2.2). One that keeps or reduces
# the width mostly ends a residual branch, where a gain of 1 would double the variance with every block.
_PLAIN_GAIN = math.sqrt(2.0)
_RESIDUAL_GAIN = 0.5
_SCALE = (0.5, 1.5)
_VARIANCE = (0.5, 2.0)
_MEAN_STD = 0.1
_BIAS_STD = 0.1
_OTHER_STD = 0.5


def randomize(model: Model, seed: int = 0, inputs: Tensor | tuple[Tensor, ...] | None = None) -> Model:
    """Draw every parameter and BatchNorm statistic of a model anew, in place.

    Weights are normal and scaled by their fan-in; norm weights and layer scales are uniform in [0.5, 1.5]; biases are
    normal with standard deviation 0.1; other parameters (tokens, positions, attention biases) with 0.5. Buffers other
    than BatchNorm statistics (indices, constants) stay as they are. The draw depends on the seed and the model's
    structure alone, neither on its weights nor on the global random state, which it leaves untouched.

    Args:
        model: any module; its training flags are kept.
        seed: of the draw.
        inputs: arguments for one forward call. With them, running statistics are those of the activations the inputs
            cause, times a random factor, as in a trained network: no block fades or explodes, however deep the model.
            Without them they are random around 0 and 1.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    def uniform(shape: torch.Size, bounds: tuple[float, float]) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)

    def statistics(norm: nn.Module, mean: float, std: float) -> None:
        if isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
            norm.running_mean.copy_(mean + std * normal(norm.running_mean.shape, _MEAN_STD))
            norm.running_var.copy_(std**2 * uniform(norm.running_var.shape, _VARIANCE))

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    values = normal(parameter.shape, _BIAS_STD)
                elif "scale" in name or "gamma" in name or ("weight" in name and parameter.ndim < 2):
                    values = uniform(parameter.shape, _SCALE)
                elif name == "shift":  # exponents of a weight of powers of two
                    values = math.log2(_weight_std(module, parameter)) + uniform(parameter.shape, (-1.0, 1.0))
                elif "weight" in name:
                    values = normal(parameter.shape, _weight_std(module, parameter))
                else:
                    values = normal(parameter.shape, _OTHER_STD)
                parameter.copy_(values)
            if isinstance(module, _NormBase):
                statistics(module, 0.0, 1.0)
        if inputs is not None:
            _visit_norms(model, inputs, lambda norm, x: statistics(norm, float(x.mean()), float(x.std())))
    return model


def _weight_std(module: nn.Module, weight: Tensor) -> float:
    """Standard deviation for the weight of a convolution, a linear layer or anything laid out ``[out, in, ...]``."""
    if isinstance(module, _ConvNd):
        widens = module.out_channels > module.in_channels or max(module.stride) > 1
        fan_in = module.in_channels / module.groups * math.prod(module.kernel_size)
        if module.transposed:
            fan_in /= math.prod(module.stride)  # of the kernel's taps, each output meets one in stride
    else:
        widens = weight.shape[0] > weight.shape[1]
        fan_in = weight[0].numel()
    return (_PLAIN_GAIN if widens else _RESIDUAL_GAIN) / math.sqrt(fan_in)


def _visit_norms(
    model: nn.Module, inputs: Tensor | tuple[Tensor, ...], visit: Callable[[nn.Module, Tensor], None]
) -> None:
    """Run the model once in eval mode and show each BatchNorm its input before it is used."""

    def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
        visit(norm, args[0])

    training = [(module, module.training) for module in model.modules()]
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, _NormBase)]
    try:
        model.eval()
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
