from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from export_parity import assert_exports, export
from torch import Tensor

from edgecompile import models
from edgecompile.errors import InputError
from edgecompile.models import repavit
from edgecompile.models.randomize import randomize
from edgecompile.models.repavit import ChannelIdleFfn, create

STATE_DICTS = Path(__file__).parent / "state_dicts"

# name, idle ratio, parameters and GMACs in training form, parameters and GMACs after reparameterization
PUBLISHED = [
    ("repavit_tiny", 0.75, 5_736_040, 1.2537, 3_494_248, 0.8180),
    ("repavit_tiny", 0.5, 5_736_040, 1.2537, 4_381_288, 0.9922),
    ("repavit_tiny", 1.0, 5_736_040, 1.2537, 2_607_208, 0.6437),
    ("repavit_small", 0.75, 22_087_912, 4.5989, 13_180_648, 2.8560),
    ("repavit_base", 0.75, 86_642_152, 17.5638, 51_132_904, 10.5921),
    ("repaswin_tiny", 0.75, 28_323_682, 4.4906, 17_483_554, 2.7565),
]


def ffns(model: torch.nn.Module) -> list[ChannelIdleFfn]:
    return [module for module in model.modules() if isinstance(module, ChannelIdleFfn)]


def deploy_weights(ffn: ChannelIdleFfn) -> int:
    """Multiplications of one token in the reparameterized layer: C x C, C x A and A x C."""
    dim = ffn.fc1.in_features
    return dim * dim + 2 * dim * ffn.active


def deploy_parameters(ffn: ChannelIdleFfn) -> int:
    """The weights, the bias of the linear path and that before the activation."""
    return deploy_weights(ffn) + ffn.fc1.in_features + ffn.active


def randomized(name: str, seed: int, **options) -> torch.nn.Module:
    model = create(name, **options).eval()
    randomize(model, seed)
    return model


# --- structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ratio", "parameters", "gmacs", "deploy", "deploy_gmacs"), PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(macs, name, ratio, parameters, gmacs, deploy, deploy_gmacs):
    with torch.device("meta"):
        model = create(name, ratio).eval()
        x = torch.empty(1, 3, 224, 224)
    tokens = {}
    for ffn in ffns(model):
        ffn.register_forward_hook(lambda module, args, _: tokens.update({module: args[0].shape[1]}))
    total = macs(model, x)
    assert model(x).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert total / 1e9 == pytest.approx(gmacs, rel=1e-3)

    replaced = sum(p.numel() for ffn in ffns(model) for p in ffn.parameters())
    assert parameters - replaced + sum(map(deploy_parameters, ffns(model))) == deploy
    saved = sum(count * (8 * ffn.fc1.in_features**2 - deploy_weights(ffn)) for ffn, count in tokens.items())
    assert (total - saved) / 1e9 == pytest.approx(deploy_gmacs, rel=1e-3)


def test_state_dict_is_the_published_one():
    published = json.loads((STATE_DICTS / "repavit_tiny.json").read_text())
    ours = models.create("repavit_tiny").state_dict()
    assert [(key, list(value.shape)) for key, value in ours.items()] == list(published.items())


def test_swin_state_dict_has_the_buffers_of_its_authors():
    state = models.create("repaswin_tiny").state_dict()
    masks = {key: tuple(value.shape) for key, value in state.items() if key.endswith("attn_mask")}
    shifted = {"layers.0.blocks.1": 64, "layers.1.blocks.1": 16}
    shifted |= {f"layers.2.blocks.{i}": 4 for i in (1, 3, 5)}
    assert masks == {f"{block}.attn_mask": (windows, 49, 49) for block, windows in shifted.items()}
    block = [key.removeprefix("layers.0.blocks.1.") for key in state if key.startswith("layers.0.blocks.1.")]
    assert block[:5] == [
        "attn_mask",
        "norm1.weight",
        "norm1.bias",
        "attn.relative_position_bias_table",
        "attn.relative_position_index",
    ]
    assert list(state)[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("options", [{"idle_ratio": 1.01}, {"idle_ratio": -0.5}, {"num_classes": 0}])
def test_bad_options_are_input_errors(options):
    with pytest.raises(InputError):
        create("repavit_tiny", **options)


def test_unknown_name_is_an_input_error():
    with pytest.raises(InputError, match="repavit_tiny"):
        create("repavit_giant")


# --- the feed-forward layer --------------------------------------------------------------------------------------


def norm_scale_and_shift(bn: torch.nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / torch.sqrt(bn.running_var + 1e-5)
    return scale, bn.bias - bn.running_mean * scale


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def deployed(ffn: ChannelIdleFfn, x: Tensor, active: slice) -> Tensor:
    """Section 3 of the paper: one C x C matrix for the idle channels and the shortcut, one path for the active ones."""
    (s1, t1), (s2, t2) = norm_scale_and_shift(ffn.norm1), norm_scale_and_shift(ffn.norm2)
    w1, b1 = ffn.fc1.weight * s1, ffn.fc1.weight @ t1 + ffn.fc1.bias
    w2, b2 = ffn.fc2.weight * s2, ffn.fc2.weight @ t2 + ffn.fc2.bias
    idle = torch.ones(len(w1), dtype=torch.bool)
    idle[active] = False
    linear = torch.eye(len(w2), dtype=x.dtype) + w2[:, idle] @ w1[idle]
    bias = w2[:, idle] @ b1[idle] + b2
    activated = gelu(torch.einsum("ac,bnc->bna", w1[active], x) + b1[active])
    return torch.einsum("oc,bnc->bno", linear, x) + bias + torch.einsum("oa,bna->bno", w2[:, active], activated)


@pytest.mark.parametrize(("ratio", "active"), [(0.0, 96), (0.5, 48), (0.75, 24), (0.9, 10), (1.0, 0)])
def test_ffn_is_its_deployed_form(ratio, active):
    ffn = ChannelIdleFfn(24, ratio).eval()
    randomize(ffn, 0)
    ffn.double()
    assert ffn.active == active
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    wanted = ffn(x)
    torch.testing.assert_close(deployed(ffn, x, slice(0, active)), wanted)
    # One channel more or less, or the last channels instead of the first, is another function.
    wrong = [slice(0, active + 1 if active < 96 else 95)]
    if 0 < active < 96:
        wrong.append(slice(96 - active, 96))
    for channels in wrong:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(deployed(ffn, x, channels), wanted)


def test_ffn_normalises_by_channel_over_batch_and_tokens():
    ffn = ChannelIdleFfn(4, 0.75).train()
    x = torch.randn(3, 5, 4) * 2 + 1
    ffn(x)
    assert ffn.norm1.running_mean is not None
    torch.testing.assert_close(ffn.norm1.running_mean, 0.1 * x.mean((0, 1)))
    assert (ffn.norm1.running_mean - 0.1 * x.mean()).abs().max() > 1e-3


# --- attention ---------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def deit(state: dict[str, Tensor], x: Tensor, heads: int, active: int, eps: tuple[float, float]) -> Tensor:
    """RePaViT on DeiT from a state dict, without any torch module; eps of the attention's and of the outer norms."""

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def batch_norm(x: Tensor, name: str) -> Tensor:
        scale = state[f"{name}.weight"] / torch.sqrt(state[f"{name}.running_var"] + 1e-5)
        return (x - state[f"{name}.running_mean"]) * scale + state[f"{name}.bias"]

    patches = x.reshape(len(x), 3, 14, 16, 14, 16)
    patches = torch.einsum("bcyixj,ocij->byxo", patches, state["patch_embed.proj.weight"]).flatten(1, 2)
    x = torch.cat((state["cls_token"].expand(len(x), 1, -1), patches), 1) + state["pos_embed"]
    x = norm(x, "norm_pre", eps[1])
    for i in range(12):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.attn.norm", eps[0]), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        x = x + linear(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), f"{block}.attn.proj")
        u = linear(batch_norm(x, f"{block}.mlp.norm1"), f"{block}.mlp.fc1")
        u = torch.cat((gelu(u[..., :active]), u[..., active:]), -1)
        x = x + linear(batch_norm(u, f"{block}.mlp.norm2"), f"{block}.mlp.fc2")
    return linear(norm(x, "norm", eps[1])[:, 0], "head")


@pytest.mark.parametrize("ratio", [0.75, 1.0])
def test_deit_is_the_published_function(ratio):
    model = randomized("repavit_tiny", 1, idle_ratio=ratio, num_classes=10).double()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    active = math.ceil(768 * (1 - ratio))
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(deit(model.state_dict(), x, 3, active, (1e-5, 1e-6)), wanted, rtol=1e-8, atol=1e-10)
        for heads, channels, eps in ((6, active, (1e-5, 1e-6)), (3, 1, (1e-5, 1e-6)), (3, active, (1e-6, 1e-5))):
            with pytest.raises(AssertionError):
                got = deit(model.state_dict(), x, heads, channels, eps)
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def naive_swin_attention(block: repavit.SwinBlock, x: Tensor, *, masked: bool = True) -> Tensor:
    """Attention of one block as sums over pairs of tokens: Swin, section 3.2.

    Two tokens see each other when the cyclically shifted image has them in one window and the shift has moved both or
    neither of them across each border.
    """
    size, shift, heads = block.size, block.shift, block.attn.heads
    y = layer_norm(x, block.norm1.weight, block.norm1.bias, 1e-5)
    q, k, v = (y @ block.attn.qkv.weight.T + block.attn.qkv.bias).unflatten(-1, (3, heads, -1)).unbind(2)
    q = q / math.sqrt(q.shape[-1])
    table = block.attn.relative_position_bias_table
    places = [(((row - shift) % size), ((column - shift) % size)) for row in range(size) for column in range(size)]
    moved = [(row < shift, column < shift) for row in range(size) for column in range(size)]
    out = torch.zeros_like(v)
    for a, (row, column) in enumerate(places):
        seen = [
            b
            for b, (other_row, other_column) in enumerate(places)
            if (other_row // 7, other_column // 7) == (row // 7, column // 7) and (not masked or moved[a] == moved[b])
        ]
        bias = torch.stack([table[(row - places[b][0] + 6) * 13 + column - places[b][1] + 6] for b in seen])
        scores = torch.einsum("bhd,bkhd->bhk", q[:, a], k[:, seen]) + bias.T
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out[:, a] = torch.einsum("bhk,bkhd->bhd", weights, v[:, seen])
    return x + out.flatten(2) @ block.attn.proj.weight.T + block.attn.proj.bias


@pytest.mark.parametrize(("size", "shift"), [(14, 0), (14, 3), (21, 3), (7, 0)])
def test_window_attention_is_the_naive_loop(size, shift):
    block = repavit.SwinBlock(12, size, 3, shift, 0.75).eval()
    randomize(block, 2)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    block.register_module("mlp", torch.nn.Identity())
    block.double()
    x = torch.randn(2, size * size, 12, dtype=torch.float64)
    with torch.no_grad():
        wanted = block(x)
        torch.testing.assert_close(naive_swin_attention(block, x), wanted)
        if shift:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(naive_swin_attention(block, x, masked=False), wanted)
        block.attn.relative_position_bias_table[0] += 1
        with pytest.raises(AssertionError):
            torch.testing.assert_close(naive_swin_attention(block, x), wanted)


def test_swin_shifts_every_second_block_but_not_a_single_window():
    model = create("repaswin_tiny")
    shifts = [
        [block.shift for block in stage.modules() if isinstance(block, repavit.SwinBlock)]
        for stage in model.get_submodule("layers").children()
    ]
    assert shifts == [[0, 3], [0, 3], [0, 3, 0, 3, 0, 3], [0, 0]]


def test_patch_merging_takes_quarters_column_by_column():
    merging = repavit.PatchMerging(4, 6).eval()
    randomize(merging, 3)
    merging.double()
    x = torch.randn(2, 36, 4, dtype=torch.float64)

    def naive(order: list[tuple[int, int]]) -> Tensor:
        image = x.reshape(2, 6, 6, 4)
        tokens = [
            torch.cat([image[:, 2 * row + i, 2 * column + j] for i, j in order], -1)
            for row, column in itertools.product(range(3), range(3))
        ]
        y = layer_norm(torch.stack(tokens, 1), merging.norm.weight, merging.norm.bias, 1e-5)
        return y @ merging.reduction.weight.T

    torch.testing.assert_close(merging(x), naive([(0, 0), (1, 0), (0, 1), (1, 1)]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(merging(x), naive([(0, 0), (0, 1), (1, 0), (1, 1)]))


# --- export ------------------------------------------------------------------------------------------------------


def constants(graph: onnx.GraphProto) -> set[str]:
    """Names of the values that depend on no input."""
    known = {"", *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        if known.issuperset(node.input):
            known.update(node.output)
    return known


def masks(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Where nodes that choose between a GELU and its input."""
    activated = {output for node in proto.graph.node if node.op_type == "Gelu" for output in node.output}
    return [node for node in proto.graph.node if node.op_type == "Where" and activated.intersection(node.input)]


REPRESENTATIVE = [
    pytest.param("repavit_tiny", False, False, id="deit-legacy-static", marks=pytest.mark.slow),
    pytest.param("repavit_tiny", False, True, id="deit-legacy-dynamic"),
    pytest.param("repavit_tiny", True, False, id="deit-dynamo-static", marks=pytest.mark.slow),
    pytest.param("repavit_tiny", True, True, id="deit-dynamo-dynamic"),
    pytest.param("repaswin_tiny", False, False, id="swin-legacy-static"),
    pytest.param("repaswin_tiny", False, True, id="swin-legacy-dynamic", marks=pytest.mark.slow),
    pytest.param("repaswin_tiny", True, False, id="swin-dynamo-static", marks=pytest.mark.slow),
    pytest.param("repaswin_tiny", True, True, id="swin-dynamo-dynamic", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "dynamo", "dynamic"), REPRESENTATIVE)
def test_exports_with_masks_of_constants(tmp_path, name, dynamo, dynamic):
    model = randomized(name, 4, num_classes=10)
    x = torch.randn(2, 3, 224, 224)
    proto = assert_exports(model, x, tmp_path / "x.onnx", dynamo=dynamo, dynamic=dynamic)
    known = constants(proto.graph)
    assert len(masks(proto)) == 12
    assert all(node.input[0] in known for node in masks(proto))
    assert not any(known.intersection(node.input[1:]) for node in masks(proto))
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("BatchNormalization") == 24
    # The legacy exporter leaves the construction of the mask in the graph.
    assert kinds.count("ScatterND") == (0 if dynamo else 12)
    if name == "repavit_tiny":
        eps = [
            round(attribute.f, 8)
            for node in proto.graph.node
            for attribute in node.attribute
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon"
        ]
        assert sorted(eps) == [1e-6] * 2 + [1e-5] * (len(eps) - 2)
        assert kinds.count("LayerNormalization") == 14


def test_without_active_channels_the_ffn_exports_as_a_linear_chain(tmp_path):
    proto = export(
        randomized("repavit_tiny", 5, idle_ratio=1.0), torch.randn(1, 3, 224, 224), tmp_path / "x.onnx", dynamo=False
    )
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"Gelu", "Erf", "ScatterND"}
    assert masks(proto) == []


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("repavit_small", 0.75),
        ("repavit_base", 0.75),
        ("repavit_tiny", 0.0),
        ("repavit_tiny", 0.5),
        ("repavit_tiny", 1.0),
        ("repaswin_tiny", 1.0),
    ],
)
def test_every_variant_exports(tmp_path, name, ratio, dynamo):
    model = randomized(name, 6, idle_ratio=ratio)
    assert_exports(model, torch.randn(1, 3, 224, 224), tmp_path / "x.onnx", dynamo=dynamo, dynamic=True)
