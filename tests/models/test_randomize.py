from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from edgecompile import models
from edgecompile.models.layers import Residual
from edgecompile.models.randomize import randomize
from edgecompile.models.shiftaddvit import ShiftLinear

SMALL = {"embed_dim": (16, 24, 40), "depth": (1, 1, 1), "partial_dim": (5, 7, 12)}
REPRESENTATIVES = ("shvit_s1", "efficientvit_m0", "litepose_xs", "damoyolo_ns", "deanet", "repavit_tiny")
ZOO = [pytest.param(n, marks=() if n in REPRESENTATIVES else pytest.mark.slow) for n in models.names()]


def small(seed: int, inputs: Tensor | None = None) -> nn.Module:
    return randomize(models.create("shvit_s1", num_classes=10, **SMALL), seed, inputs)


def images(name: str, count: int, seed: int) -> Tensor:
    return torch.randn(count, *models.ZOO[name].input_shape[1:], generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
    return [y] if isinstance(y, Tensor) else list(y)


def norm_spread(model: nn.Module, x: Tensor) -> tuple[list[float], list[Tensor]]:
    """Standard deviation of what each BatchNorm gives, and the model's outputs."""
    spread: list[float] = []
    handles = [
        m.register_forward_hook(lambda _m, _x, y: spread.append(float(y.std())))
        for m in model.modules()
        if isinstance(m, _NormBase)
    ]
    y = outputs(model, x)
    for handle in handles:
        handle.remove()
    return spread, y


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_zoo_models_are_worth_testing(name):
    model = models.create(name)
    assert randomize(model, 1) is model
    x = images(name, 2, seed=3)
    spread, first = norm_spread(model, x)
    assert all(1e-3 < s < 1e3 for s in spread)
    randomize(model, 1, images(name, 1, seed=4))
    spread, calibrated = norm_spread(model, x)
    assert all(0.2 < s < 5 for s in spread)
    for y in (*first, *calibrated):
        assert y.isfinite().all()
        assert y.std() > 1e-3
    for y in first:
        assert not torch.equal(y[0], y[1])
    for y in calibrated:  # two images differ by more than rounding, even in boxes around fixed priors
        assert (y[0] - y[1]).std() > 1e-3 * y.std()
    other = outputs(randomize(model, 2), x)
    again = outputs(randomize(model, 1), x)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def residual_shares(model: nn.Module, x: Tensor) -> list[float]:
    """Size of each residual branch relative to its input."""
    shares: list[float] = []
    for module in model.modules():
        if isinstance(module, Residual):
            module.m.register_forward_hook(lambda _m, args, y: shares.append(float(y.std() / args[0].std())))
    outputs(model, x)
    return shares


def test_no_block_is_the_identity():
    x = torch.randn(2, 3, 64, 64)
    assert min(residual_shares(small(0), x)) > 0.05
    assert min(residual_shares(small(0, x), x)) > 0.05
    untrained = models.create("shvit_s1", num_classes=10, **SMALL)
    assert min(residual_shares(untrained, x)) == 0


def test_the_seed_and_nothing_else_decides():
    trained = small(7)
    fresh = models.create("shvit_s1", num_classes=10, **SMALL)
    assert same(randomize(trained, 3), randomize(fresh, 3))
    assert not same(small(3), small(4))


def test_global_random_state_and_training_flags_are_kept():
    model = models.create("shvit_s1", num_classes=10, **SMALL)
    model.train()
    model.blocks1.eval()
    flags = [m.training for m in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    randomize(model, 1, torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["efficientvit_m0", "damoyolo_ns", "repaswin_tiny"])
def test_constants_stay_and_all_else_changes(name):
    model = models.create(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    randomize(model, 1)
    parameters = {k for k, _ in model.named_parameters()}
    constants = 0
    for key, value in model.state_dict().items():
        learned = key in parameters or key.endswith(("running_mean", "running_var"))
        assert torch.equal(value, before[key]) != learned, key
        constants += not learned and not key.endswith("num_batches_tracked")
        if learned and value.numel() > 1:
            assert value.std() > 0, key
    assert constants > 0 or name == "repaswin_tiny"


def test_frozen_parameters_are_drawn_too():
    frozen = small(1).requires_grad_(False)
    before = [p.clone() for p in frozen.parameters()]
    randomize(frozen, 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layer", "shape", "gain"),
    [
        (nn.Linear(256, 512), (4096, 256), math.sqrt(2)),
        (nn.Linear(512, 512), (4096, 512), 0.5),
        (nn.Conv2d(32, 64, 3), (4, 32, 40, 40), math.sqrt(2)),
        (nn.Conv2d(64, 64, 3, groups=64), (4, 64, 40, 40), 0.5),
        (nn.Conv2d(64, 64, 3, stride=2, groups=32), (4, 64, 80, 80), math.sqrt(2)),
        (nn.Conv1d(64, 32, 5), (64, 64, 100), 0.5),
        (nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), (4, 64, 40, 40), math.sqrt(2)),
        (ShiftLinear(512, 256), (4096, 512), 0.5),
    ],
    ids=lambda v: str(v).split("\n")[0] if isinstance(v, nn.Module) else "",
)
def test_layers_scale_by_their_fan_in(layer, shape, gain):
    """Unit noise comes out with the standard deviation of the gain, whatever the layer's size."""
    randomize(layer, 1)
    assert layer.bias.std() > 0.05
    with torch.no_grad():
        layer.bias.zero_()
        spread = float(layer(torch.randn(shape)).std())
    # A depthwise kernel is 9 draws per channel; a shift layer's weights are powers of two or zero.
    assert spread == pytest.approx(gain, rel=0.5 if isinstance(layer, ShiftLinear) else 0.15)


def test_inputs_set_the_statistics_of_deep_models():
    """Thirty residual blocks multiply the variance by a power of thirty; measured statistics stop that."""
    deep = nn.Sequential(
        *(Residual(nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))) for _ in range(30))
    )
    x = torch.randn(64, 8)
    free, _ = norm_spread(randomize(deep, 1).eval(), x)
    measured, _ = norm_spread(randomize(deep, 1, x).eval(), x)
    assert max(free) > 20
    assert all(0.5 < s < 2 for s in measured)


def test_several_inputs():
    model = nn.Bilinear(4, 4, 8)
    assert randomize(model, 1, (torch.ones(2, 4), torch.ones(2, 4))) is model
    with pytest.raises(TypeError):
        randomize(model, 1, torch.ones(2, 4))


def test_a_failing_forward_leaves_no_hook():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 2)).train()
    with pytest.raises(RuntimeError):
        randomize(model, 1, torch.ones(2, 4))
    assert model.training
    assert not model[0]._forward_pre_hooks
