"""What the tests of several families share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-accumulates of one forward call: every convolution (transposed too), linear layer and matrix product.

    Counted on the operators that run, so functional calls and attention are included. A transposed convolution counts
    the products it needs, one per input position and weight; profilers that count per output position say stride^2
    times as many. Bias, normalisation, activation and pooling count nothing.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _matrix_vector_flops})
    # The math backend breaks attention down into matrix products; the fused CPU kernel is unknown to the counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def _matrix_vector_flops(matrix: torch.Size, vector: torch.Size, *_: object, **__: object) -> int:
    return 2 * matrix.numel()


@pytest.fixture
def macs() -> Callable[..., int]:
    return count_macs
