from __future__ import annotations

import pytest
import torch
from export_parity import assert_exports
from three_stage import at, batch_norm, conv_bn, ffn, fold, network, patch_merging, squeeze_excite
from torch import Tensor, nn

from edgecompile import models
from edgecompile.errors import InputError
from edgecompile.models.layers import PatchMerging, Residual, SqueezeExcite, make_divisible
from edgecompile.models.randomize import randomize
from edgecompile.models.shvit import SHSA, create

SMALL = {"embed_dim": (16, 24, 40), "depth": (1, 2, 1), "partial_dim": (5, 7, 12), "qk_dim": 4}
FUSED = {"shvit_s1": 6_308_660, "shvit_s2": 11_453_508, "shvit_s3": 14_210_010, "shvit_s4": 16_546_248}
VARIANTS = ["shvit_s1", *(pytest.param(f"shvit_s{i}", marks=pytest.mark.slow) for i in (2, 3, 4))]


def shsa(w, x: Tensor, partial: int, qk: int, scale: float) -> Tensor:
    """Section 3.2, one query position at a time."""
    active = x[:, :partial]
    flat = active.flatten(1)
    mean, var = flat.mean(1).view(-1, 1, 1, 1), flat.var(1, correction=0).view(-1, 1, 1, 1)
    gamma, beta = (w[f"pre_norm.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
    normed = gamma * (active - mean) / (var + 1e-5).sqrt() + beta
    qkv = batch_norm(at(w, "qkv.bn"), torch.einsum("oi,nihw->nohw", w["qkv.c.weight"][:, :, 0, 0], normed)).flatten(2)
    q, k, v = qkv[:, :qk], qkv[:, qk : 2 * qk], qkv[:, 2 * qk :]
    out = torch.empty_like(v)
    for n in range(x.shape[0]):
        for i in range(q.shape[2]):
            scores = torch.stack([scale * torch.dot(q[n, :, i], k[n, :, j]) for j in range(k.shape[2])])
            weights = scores.exp() / scores.exp().sum()
            out[n, :, i] = sum(weights[j] * v[n, :, j] for j in range(v.shape[2]))
    joined = torch.cat((out.view_as(active), x[:, partial:]), dim=1).clamp(min=0)
    return conv_bn(at(w, "proj.1"), joined)


def block(w, x: Tensor) -> Tensor:
    """Section 3.3; the sizes follow from the weights."""
    x = x + conv_bn(at(w, "conv.m"), x)
    mixer = at(w, "mixer.m")
    if mixer:
        out, partial = mixer["qkv.c.weight"].shape[:2]
        qk = (out - partial) // 2
        x = x + shsa(mixer, x, partial, qk, qk**-0.5)
    return x + ffn(at(w, "ffn.m"), x)


def test_attention_is_the_papers_equation():
    module = randomize(SHSA(20, 6, 4), 1).double().eval()
    x = torch.randn(2, 20, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        got = module(x)
    torch.testing.assert_close(got, shsa(module.state_dict(), x, 6, 4, scale=0.5))
    unscaled = shsa(module.state_dict(), x, 6, 4, scale=1.0)
    assert not torch.allclose(got, unscaled, rtol=1e-3)


def test_the_channels_that_do_not_attend_pass_by():
    module = randomize(SHSA(20, 6, 4), 1).eval()
    module.proj = nn.Sequential(nn.Identity())
    x = torch.randn(2, 20, 3, 4)
    with torch.no_grad():
        y = module(x)
    assert torch.equal(y[:, 6:], x[:, 6:])
    assert not torch.allclose(y[:, :6], x[:, :6], atol=1e-2)


def test_squeeze_excite_gates_channels():
    module = randomize(SqueezeExcite(48), 2).double()
    x = torch.randn(2, 48, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), squeeze_excite(module.state_dict(), x))
        assert not torch.allclose(module(x), x, rtol=1e-2)
    assert module.state_dict()["fc1.weight"].shape == (16, 48, 1, 1)  # a quarter is 12, the middle of 8 and 16


@pytest.mark.parametrize(("value", "expected"), [(1, 8), (11, 8), (12, 16), (77, 80), (308, 312), (128, 128)])
def test_make_divisible(value, expected):
    assert make_divisible(value) == expected


@pytest.mark.parametrize("size", [6, 7])
def test_patch_merging_halves_and_mixes(size):
    module = randomize(PatchMerging(8, 20), 3).double().eval()
    x = torch.randn(2, 8, size, size, dtype=torch.float64)
    with torch.no_grad():
        got = module(x)
    assert got.shape == (2, 20, (size + 1) // 2, (size + 1) // 2)
    torch.testing.assert_close(got, patch_merging(module.state_dict(), x))


def test_residual_adds_its_input():
    inner = nn.Linear(3, 3)
    x = torch.randn(4, 3)
    assert torch.equal(Residual(inner)(x), x + inner(x))


def test_network_is_the_paper_wired_independently():
    x = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    model = randomize(create("shvit_s1", 7, **SMALL), 4, x.float()).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), network(model.state_dict(), x, block))


@pytest.mark.parametrize("name", VARIANTS)
def test_folded_form(name):
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    model = randomize(models.create(name), 5, x.float()).double()
    folded = fold(model.state_dict())
    assert sum(v.numel() for v in folded.values()) == FUSED[name]
    with torch.no_grad():
        wanted = model(x)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and module.running_mean is not None:
                module.running_mean.zero_()
        forgets_means = model(x)
    fast = torch_network(folded, x)
    torch.testing.assert_close(fast, wanted)
    assert not torch.allclose(forgets_means, wanted, rtol=1e-2)


def torch_network(w, x: Tensor) -> Tensor:
    """The folded network, with attention as matrix products (:func:`shsa` is a loop over positions)."""

    def attend(w, x: Tensor) -> Tensor:
        partial = w["qkv.c.weight"].shape[1]
        qk = (w["qkv.c.weight"].shape[0] - partial) // 2
        normed = nn.functional.group_norm(x[:, :partial], 1, w["pre_norm.weight"], w["pre_norm.bias"])
        q, k, v = (t.flatten(2).mT for t in conv_bn(at(w, "qkv"), normed).split((qk, qk, partial), dim=1))
        out = nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(x[:, :partial].shape)
        return conv_bn(at(w, "proj.1"), torch.cat((out, x[:, partial:]), dim=1).clamp(min=0))

    def one(w, x: Tensor) -> Tensor:
        x = x + conv_bn(at(w, "conv.m"), x)
        mixer = at(w, "mixer.m")
        x = x + attend(mixer, x) if mixer else x
        return x + ffn(at(w, "ffn.m"), x)

    return network(w, x, one)


@pytest.mark.parametrize(("patch_size", "side"), [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_patch_size_is_the_stride_of_the_stem(patch_size, side):
    model = create("shvit_s2", 10, patch_size=patch_size, **SMALL).eval()
    assert model.patch_embed(torch.zeros(1, 3, 16, 16)).shape == (1, 16, side, side)


def test_small_instance_trains():
    torch.manual_seed(0)
    model = create("shvit_s1", 10, patch_size=4, **SMALL).train()
    x, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_blocks_without_attention():
    model = create("shvit_s1", **{**SMALL, "types": "iis"})
    has = [any(isinstance(m, SHSA) for m in stage.modules()) for stage in (model.blocks1, model.blocks2, model.blocks3)]
    assert has == [False, False, True]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"embed_dim": (16, 24)}, "embed_dim"),
        ({"embed_dim": 16}, "embed_dim"),
        ({"embed_dim": (4, 24, 40)}, "embed_dim"),
        ({"depth": (1, -1, 1)}, "depth"),
        ({"depth": (1, 1.5, 1)}, "depth"),
        ({"partial_dim": (5, 24, 12)}, "partial_dim"),
        ({"partial_dim": (5, 0, 12)}, "partial_dim"),
        ({"qk_dim": 0}, "qk_dim"),
        ({"types": "isx"}, "types"),
        ({"types": "is"}, "types"),
        ({"patch_size": 3}, "patch_size"),
    ],
)
def test_impossible_options(options, names):
    create("shvit_s1", **SMALL)
    with pytest.raises(InputError, match=names):
        create("shvit_s1", **{**SMALL, **options})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_exports_at_native_resolution(name, dynamo, dynamic, tmp_path):
    x = torch.randn(2 if dynamic else 1, *models.ZOO[name].input_shape[1:])
    model = randomize(models.create(name), 6, x)
    assert_exports(model, x, tmp_path / "model.onnx", dynamo=dynamo, dynamic=dynamic)
