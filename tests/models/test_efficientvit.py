from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from export_parity import assert_exports
from three_stage import at, conv_bn, ffn, fold, network
from torch import Tensor, nn

from edgecompile import models
from edgecompile.errors import InputError
from edgecompile.models.efficientvit import CascadedGroupAttention, WindowAttention, create
from edgecompile.models.randomize import randomize

SMALL = {
    "embed_dim": (16, 24, 48),
    "depth": (1, 2, 1),
    "num_heads": (2, 3, 4),
    "kernels": (5, 3, 3, 1),
    "key_dim": 4,
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
}
FUSED = {
    "efficientvit_m0": 2_334_916,
    "efficientvit_m1": 2_964_256,
    "efficientvit_m2": 4_168_338,
    "efficientvit_m3": 6_875_890,
    "efficientvit_m4": 8_776_340,
    "efficientvit_m5": 12_436_260,
}
VARIANTS = ["efficientvit_m0", *(pytest.param(f"efficientvit_m{i}", marks=pytest.mark.slow) for i in range(1, 6))]


def cascaded_attention(w, x: Tensor, cascade: bool = True, bias: bool = True) -> Tensor:
    """Section 3.2, head by head, with the bias of every pair of positions looked up by its offset."""
    heads, offsets = w["attention_biases"].shape
    size = round(offsets**0.5)
    group = x.shape[1] // heads
    key = (w["qkvs.0.c.weight"].shape[0] - group) // 2
    outputs: list[Tensor] = []
    for h in range(heads):
        feat = x[:, h * group : (h + 1) * group]
        if h and cascade:
            feat = feat + outputs[-1]
        qkv = conv_bn(at(w, f"qkvs.{h}"), feat)
        q = conv_bn(at(w, f"dws.{h}"), qkv[:, :key]).flatten(2)
        k, v = qkv[:, key : 2 * key].flatten(2), qkv[:, 2 * key :].flatten(2)
        scores = torch.einsum("nci,ncj->nij", q, k) / key**0.5
        if bias:
            for i in range(size * size):
                for j in range(size * size):
                    dy, dx = abs(i // size - j // size), abs(i % size - j % size)
                    scores[:, i, j] += w["attention_biases"][h, size * dy + dx]
        attention = scores.exp() / scores.exp().sum(dim=2, keepdim=True)
        outputs.append(torch.einsum("nij,ncj->nci", attention, v).reshape(-1, group, size, size))
    return conv_bn(at(w, "proj.1"), torch.cat(outputs, dim=1).clamp(min=0))


def windowed(attend, x: Tensor, window: int) -> Tensor:
    """Cut out one window after the other, padded with zeros beyond the edge; put what it gives back in place."""
    side = x.shape[2]
    out = torch.empty_like(x)
    for top in range(0, side, window):
        for left in range(0, side, window):
            tile = x[:, :, top : top + window, left : left + window]
            height, width = tile.shape[2:]
            full = torch.zeros(*x.shape[:2], window, window, dtype=x.dtype)
            full[:, :, :height, :width] = tile
            out[:, :, top : top + height, left : left + width] = attend(full)[:, :, :height, :width]
    return out


def block(w, x: Tensor) -> Tensor:
    """The sandwich layout; the window follows from the biases."""
    x = x + conv_bn(at(w, "dw0.m"), x)
    x = x + ffn(at(w, "ffn0.m"), x)
    attention = at(w, "mixer.m.attn")
    window = round(attention["attention_biases"].shape[1] ** 0.5)
    x = x + windowed(lambda tile: cascaded_attention(attention, tile), x, window)
    x = x + conv_bn(at(w, "dw1.m"), x)
    return x + ffn(at(w, "ffn1.m"), x)


def test_attention_is_the_papers_equation():
    module = randomize(CascadedGroupAttention(24, 4, 3, 5, (5, 3, 1)), 1).double().eval()
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    w = module.state_dict()
    with torch.no_grad():
        got = module(x)
    torch.testing.assert_close(got, cascaded_attention(w, x))
    assert not torch.allclose(got, cascaded_attention(w, x, cascade=False), rtol=1e-3)
    assert not torch.allclose(got, cascaded_attention(w, x, bias=False), rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_offsets_are_numbered_in_order_of_appearance(size):
    points = [(y, x) for y in range(size) for x in range(size)]
    seen: dict[tuple[int, int], int] = {}
    wanted = [[seen.setdefault((abs(a - c), abs(b - d)), len(seen)) for c, d in points] for a, b in points]
    module = CascadedGroupAttention(8, 4, 1, size, (3,))
    assert module.attention_bias_idxs.tolist() == wanted
    assert module.attention_bias_idxs.dtype == torch.int64


@pytest.mark.parametrize(("resolution", "window"), [(14, 7), (8, 7), (5, 2), (4, 7), (7, 7)])
def test_windows_attend_by_themselves(resolution, window):
    module = randomize(WindowAttention(12, 4, 2, resolution, window, (3, 3)), 2).double().eval()
    x = torch.randn(3, 12, resolution, resolution, dtype=torch.float64)
    with torch.no_grad():
        got = module(x)
        torch.testing.assert_close(got, windowed(module.attn, x, min(window, resolution)))
        x[:, :, -1, -1] += 1  # is seen in its own window only
        changed = (module(x) - got).abs().amax((0, 1)) > 0
    start = (resolution - 1) // window * window
    inside = torch.zeros(resolution, resolution, dtype=torch.bool)
    inside[start:, start:] = True
    assert torch.equal(changed, inside)


def test_network_is_the_paper_wired_independently():
    options = {**SMALL, "img_size": 160, "patch_size": 16}
    x = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    model = randomize(create("efficientvit_m0", 7, **options), 3, x.float()).double().eval()
    attending = [m for m in model.modules() if isinstance(m, WindowAttention)]
    assert [(m.resolution, m.window) for m in attending] == [(10, 4), (5, 4), (5, 4), (3, 3)]
    with torch.no_grad():
        torch.testing.assert_close(model(x), network(model.state_dict(), x, block))


def test_changed_biases_take_effect_in_eval_mode():
    x = torch.randn(2, 3, 32, 32)
    model = randomize(create("efficientvit_m0", 10, **SMALL), 4, x).eval()
    fresh = create("efficientvit_m0", 10, **SMALL).eval()
    with torch.no_grad():
        before = model(x)
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.copy_(torch.randn_like(parameter))
        after = model(x)
        fresh.load_state_dict(model.state_dict())
        assert not torch.allclose(before, after, rtol=1e-3)
        assert torch.equal(after, fresh(x))
        assert torch.equal(after, model.train().eval()(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_folded_form(name):
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    model = randomize(models.create(name), 5, x.float()).double()
    folded = fold(model.state_dict())
    assert sum(v.numel() for k, v in folded.items() if not k.endswith("idxs")) == FUSED[name]
    with torch.no_grad():
        torch.testing.assert_close(network(folded, x, block), model(x))


def test_other_sizes_are_refused():
    model = create("efficientvit_m0", 10, **SMALL).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    for shape in ((64, 64), (32, 64), (16, 16)):
        with pytest.raises(InputError, match=f"{shape[0]}x{shape[1]}"):
            model(torch.zeros(1, 3, *shape))


def test_small_instance_trains():
    torch.manual_seed(0)
    model = create("efficientvit_m0", 10, **SMALL).train()
    x, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_classes": -1}, "num_classes"),
        ({"embed_dim": (16, 24)}, "embed_dim"),
        ({"depth": "121"}, "depth"),
        ({"num_heads": (2, 5, 4)}, "num_heads"),
        ({"num_heads": (2, 0, 4)}, "num_heads"),
        ({"kernels": (5, 3, 3)}, "kernels"),
        ({"kernels": (5, 3, 3, 2)}, "kernels"),
        ({"key_dim": 0}, "key_dim"),
        ({"window_size": 0}, "window_size"),
        ({"img_size": 8}, "img_size"),
        ({"patch_size": 32}, "patch_size"),
    ],
)
def test_impossible_options(options, names):
    create("efficientvit_m0", **SMALL)
    with pytest.raises(InputError, match=names):
        create("efficientvit_m0", **{**SMALL, **options})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_exports_at_native_resolution(name, dynamo, dynamic, tmp_path):
    x = torch.randn(2 if dynamic else 1, 3, 224, 224)
    model = randomize(models.create(name), 6, x)
    assert_exports(model, x, tmp_path / "model.onnx", dynamo=dynamo, dynamic=dynamic)


def test_exported_windows_pad_and_keep_images_apart(tmp_path):
    options = {**SMALL, "window_size": 3}
    x = torch.randn(2, 3, 32, 32)
    model = randomize(create("efficientvit_m0", 10, **options), 7, x)
    assert any(isinstance(m, WindowAttention) and m.resolution % m.window for m in model.modules())
    assert_exports(model, x, tmp_path / "model.onnx", dynamo=False, dynamic=True)


def test_modules_are_plain():
    """No hidden state beside parameters and the index buffer, so that a state dict is the whole model."""
    model = create("efficientvit_m0", 10, **SMALL)
    model(torch.zeros(2, 3, 32, 32))
    model.eval()(torch.zeros(2, 3, 32, 32))
    stray = [k for m in model.modules() for k, v in vars(m).items() if isinstance(v, Tensor | nn.Parameter)]
    assert stray == []
