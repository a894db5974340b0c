"""DAMO-YOLO against the published counts, key lists and formulas."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgecompile import models
from edgecompile.errors import InputError
from edgecompile.models import damoyolo
from edgecompile.models.randomize import randomize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@dataclass(frozen=True)
class Published:
    """Counts of the authors' implementation; GMACs at native resolution, as trained and with every RepConv merged."""

    params: int
    deploy_params: int
    rep_convs: int
    gmacs: float | None
    deploy_gmacs: float
    keys: str | None = None


PUBLISHED = {
    "damoyolo_t": Published(8_875_727, 8_479_631, 24, 9.4914, 9.0048, "damoyolo_tinynasL20_T"),
    "damoyolo_s": Published(16_935_647, 16_251_631, 27, 19.8277, 18.8086, "damoyolo_tinynasL25_S"),
    "damoyolo_m": Published(29_241_727, 28_178_175, 33, 31.9387, 30.8115, "damoyolo_tinynasL35_M"),
    "damoyolo_l": Published(43_861_759, 42_058_111, 48, None, 97.3 / 2),
    "damoyolo_ns": Published(1_405_691, 1_405_691, 0, 0.7489, 0.7489, "damoyolo_tinynasL18_Ns"),
    "damoyolo_nm": Published(2_707_219, 2_707_219, 0, 1.7910, 1.7910),
    "damoyolo_nl": Published(5_688_579, 5_688_579, 0, 2.9545, 2.9545),
}
ALL = list(PUBLISHED)
REPRESENTATIVES = ["damoyolo_t", "damoyolo_ns"]


def on_meta(name: str, **options) -> nn.Module:
    """The model without storage: counts and shapes in no time."""
    with torch.device("meta"):
        return models.create(name, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def rep_convs(model: nn.Module) -> list[damoyolo.RepConv]:
    return [m for m in model.modules() if isinstance(m, damoyolo.RepConv)]


def gmacs(model: nn.Module, *shape: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return counter.get_total_flops() / 2e9


def merged(rep: damoyolo.RepConv) -> nn.Conv2d:
    """One convolution for the two branches, in the closed form of the RepVGG paper (section 3.3)."""
    kernel, bias = torch.zeros(()), torch.zeros(())
    for branch, pad in ((rep.rbr_dense, 0), (rep.rbr_1x1, 1)):
        conv, bn = branch.get_submodule("conv"), branch.get_submodule("bn")
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None and bn.running_var is not None
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        kernel = kernel + F.pad(conv.weight * scale[:, None, None, None], [pad] * 4)
        bias = bias + bn.bias - bn.running_mean * scale
    out, inp = kernel.shape[:2]
    conv = nn.Conv2d(inp, out, 3, rep.rbr_dense.get_submodule("conv").stride, 1)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(bias)
    return conv


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    actual, expected = (np.asarray(torch.as_tensor(x).detach(), np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# --- the published counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_exactly_those_published(name):
    model = on_meta(name)
    assert parameters(model) == PUBLISHED[name].params
    assert len(rep_convs(model)) == PUBLISHED[name].rep_convs


def test_parameters_follow_the_number_of_classes():
    extra = parameters(on_meta("damoyolo_t", num_classes=83)) - PUBLISHED["damoyolo_t"].params
    assert extra == 3 * sum(9 * channels + 1 for channels in (64, 128, 256))


@pytest.mark.parametrize("name", ALL)
def test_merging_every_rep_conv_gives_the_deployed_parameter_count(name):
    model = on_meta(name)
    count = parameters(model)
    for rep in rep_convs(model):
        out, inp = rep.rbr_dense.get_submodule("conv").weight.shape[:2]
        count += (9 * inp * out + out) - parameters(rep)
    assert count == PUBLISHED[name].deploy_params


@pytest.mark.parametrize("name", [n for n in ALL if PUBLISHED[n].keys])
def test_state_dict_is_the_published_one_in_names_order_and_shapes(name):
    published = json.loads((Path(__file__).parent / "state_dicts" / f"{PUBLISHED[name].keys}.json").read_text())
    state = on_meta(name).state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(published.items())


def test_state_dicts_of_two_sizes_differ():
    small, large = (on_meta(f"damoyolo_{v}").state_dict() for v in ("m", "l"))
    assert list(small) != list(large)
    assert set(small) < set(large)


@pytest.mark.parametrize("name", ALL)
def test_multiply_accumulates(name):
    model, published = on_meta(name), PUBLISHED[name]
    side = models.ZOO[name].resolution
    train = gmacs(model, 1, 3, side, side)
    if published.gmacs is not None:
        assert train == pytest.approx(published.gmacs, rel=1e-4)
    branches = 0.0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal branches
        branches += module.get_parameter("conv.weight").numel() * output.shape[-1] * output.shape[-2] / 1e9

    for rep in rep_convs(model):
        rep.rbr_1x1.register_forward_hook(count)
    model(torch.empty(1, 3, side, side, device="meta"))
    assert bool(branches) == bool(rep_convs(model))
    # Of the largest model only the authors' rounded count is known, which includes pooling and activations.
    assert train - branches == pytest.approx(published.deploy_gmacs, rel=1e-4 if published.gmacs else 3e-3)


@pytest.mark.parametrize("name", ALL)
def test_outputs_cover_every_cell_of_three_levels(name):
    scores, boxes = on_meta(name, num_classes=5)(torch.empty(2, 3, 64, 96, device="meta"))
    anchors = 8 * 12 + 4 * 6 + 2 * 3
    assert scores.shape == (2, anchors, 5)
    assert boxes.shape == (2, anchors, 4)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_batch_norm_constants(name):
    norms = [m for m in models.create(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def test_which_activations_are_silu_and_which_relu():
    def names(variant: str, kind: type[nn.Module]) -> set[str]:
        return {key for key, module in models.create(f"damoyolo_{variant}").named_modules() if isinstance(module, kind)}

    assert names("t", nn.SiLU) == {f"backbone.block_list.5.block_list.1.conv{i}.act" for i in (1, 2)}
    assert names("m", nn.ReLU) == {
        f"backbone.csp_stage.{stage}.{conv}.act"
        for stage in (1, 2, 3, 4)
        for conv in ("downsampler", "conv_start", "conv_shortcut", "conv_fuse")
    }
    assert names("ns", nn.ReLU) == set()


@pytest.mark.parametrize(("name", "channels"), [("damoyolo_t", (96, 192, 384)), ("damoyolo_l", (128, 256, 512))])
def test_backbone_gives_the_last_map_of_each_stride(name, channels):
    backbone = on_meta(name).get_submodule("backbone")
    maps = backbone(torch.empty(1, 3, 64, 64, device="meta"))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 64 // s, 64 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]
    last = []
    *_, list_of_stages = backbone.children()
    for stage in list_of_stages.children():
        stage.register_forward_hook(lambda _, args, output: last.append(output))
    maps = backbone(torch.empty(1, 3, 64, 64, device="meta"))
    assert maps[-1] is last[-1]
    assert maps[-2] is last[-2]


@pytest.mark.parametrize(("name", "classes"), [("damoyolo_x", 80), ("deanet", 80), ("damoyolo_t", 0)])
def test_impossible_models_are_refused(name, classes):
    with pytest.raises(InputError):
        damoyolo.create(name, num_classes=classes)


# --- the mathematics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_rep_conv_is_one_convolution(stride):
    rep = damoyolo.RepConv(6, 10, stride, act="identity").eval()
    randomize(rep, 1)
    x = torch.randn(2, 6, 9, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = rep(x)
        assert relative_error(merged(rep)(x), expected) < 1e-6
        wrong = merged(rep)
        wrong.weight[:, :, 1, 1] -= rep.rbr_1x1.get_parameter("conv.weight")[:, :, 0, 0]
        assert relative_error(wrong(x), expected) > 1e-2


def test_focus_is_a_6x6_convolution_of_stride_2():
    focus = damoyolo.Focus(3, 8, "relu").eval()
    randomize(focus, 1)
    x = torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(2))
    small = focus.conv.conv.weight

    def stem(order: list[tuple[int, int]]) -> Tensor:
        kernel = torch.zeros(8, 3, 6, 6)
        for group, (row, column) in enumerate(order):
            kernel[:, :, row::2, column::2] = small[:, 3 * group : 3 * group + 3]
        return focus.conv.act(focus.conv.bn(F.conv2d(x, kernel, stride=2, padding=2)))

    top_left, bottom_left, top_right, bottom_right = (0, 0), (1, 0), (0, 1), (1, 1)
    with torch.no_grad():
        expected = stem([top_left, bottom_left, top_right, bottom_right])
        assert relative_error(focus(x), expected) < 1e-6
        assert relative_error(focus(x), stem([top_left, top_right, bottom_left, bottom_right])) > 1e-2


def test_pyramid_pooling_takes_maxima_of_5_9_and_13():
    pooling = damoyolo.PyramidPooling(4).eval()
    randomize(pooling, 1)
    x = torch.randn(1, 4, 15, 15, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = pooling.conv1(x)
        maps = [hidden]
        for reach in (2, 4, 6):
            pooled = torch.empty_like(hidden)
            for i in range(15):
                for j in range(15):
                    window = hidden[..., max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
                    pooled[..., i, j] = window.amax((-1, -2))
            maps.append(pooled)
        assert torch.equal(pooling(x), pooling.conv2(torch.cat(maps, 1)))
        assert not torch.equal(pooling(x), pooling.conv2(torch.cat(maps[::-1], 1)))


def conv_bn(state: dict[str, Tensor], conv: str, bn: str, x: Tensor, act=None, stride: int = 1) -> Tensor:
    """Convolution and BatchNorm read off a state dict, written out."""
    weight = state[f"{conv}.weight"]
    groups = x.shape[1] // weight.shape[1]
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    mean, var, gamma, beta = (
        state[f"{bn}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    y = (y - mean) / torch.sqrt(var + 1e-3) * gamma + beta
    return act(y) if act else y


def rep_conv(state: dict[str, Tensor], key: str, x: Tensor, stride: int = 1) -> Tensor:
    three, one = (
        conv_bn(state, f"{key}.{branch}.conv", f"{key}.{branch}.bn", x, stride=stride)
        for branch in ("rbr_dense", "rbr_1x1")
    )
    return three + one


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def test_residual_stage_written_out():
    stage = damoyolo.StackStage(6, damoyolo._Stage(8, 4, 2), "res", "relu", pooling=False).eval()
    randomize(stage, 1)
    x = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(2))
    state = stage.state_dict()
    y = conv_bn(state, "block_list.0.conv1.conv1", "block_list.0.conv1.bn1", x, F.relu)
    first = F.relu(rep_conv(state, "block_list.0.conv2", y, stride=2))
    y = conv_bn(state, "block_list.1.conv1.conv1", "block_list.1.conv1.bn1", first, F.relu)
    branch = rep_conv(state, "block_list.1.conv2", y)
    with torch.no_grad():
        assert relative_error(stage(x), F.relu(branch + first)) < 1e-5
        assert relative_error(stage(x), F.relu(branch) + first) > 1e-2


def test_csp_stage_written_out():
    stage = damoyolo.CSPStage(6, damoyolo._Stage(8, 12, 1), "silu", pooling=False).eval()
    randomize(stage, 1)
    x = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(2))
    state = stage.state_dict()

    def transition(key: str, x: Tensor, act=F.relu, stride: int = 1) -> Tensor:
        return conv_bn(state, f"{key}.conv.conv1", f"{key}.conv.bn1", x, act, stride)

    def forward(act) -> Tensor:
        down = transition("downsampler", x, act, stride=2)
        start = transition("conv_start", down, act)
        y = conv_bn(state, "convstem.0.conv1.conv1", "convstem.0.conv1.bn1", start, silu)
        y = silu(rep_conv(state, "convstem.0.conv2", y) + start)
        return transition("conv_fuse", torch.cat((y, transition("conv_shortcut", down, act)), 1), act)

    with torch.no_grad():
        assert relative_error(stage(x), forward(F.relu)) < 1e-5
        assert relative_error(stage(x), forward(silu)) > 1e-2


def test_merge_node_written_out():
    variant = damoyolo._VARIANTS["damoyolo_s"]
    node = damoyolo.Merge(10, 16, variant).eval()
    randomize(node, 1)
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(2, channels, 8, 8, generator=generator) for channels in (4, 6)]
    state = node.state_dict()
    assert state["convs.0.conv2.rbr_dense.conv.weight"].shape[:2] == (6, 8), "three quarters of half the width"

    def conv(key: str, x: Tensor) -> Tensor:
        return conv_bn(state, f"{key}.conv", f"{key}.bn", x, F.relu)

    x = torch.cat(maps, 1)
    untouched, y = conv("conv1", x), conv("conv2", x)
    start, outputs = y, []
    for i in range(3):
        y = y + conv(f"convs.{i}.conv1", F.relu(rep_conv(state, f"convs.{i}.conv2", y)))
        outputs.append(y)
    with torch.no_grad():
        assert relative_error(node(*maps), conv("conv3", torch.cat([untouched, *outputs], 1))) < 1e-5
        assert relative_error(node(*maps), conv("conv3", torch.cat([start, *outputs], 1))) > 1e-2


def test_depthwise_separable_convolution_written_out():
    layer = damoyolo.DepthwiseSeparable(6, 8, 3, 2, "silu").eval()
    randomize(layer, 1)
    x = torch.randn(2, 6, 10, 10, generator=torch.Generator().manual_seed(2))
    state = layer.state_dict()

    def forward(act) -> Tensor:
        return conv_bn(state, "pointwise", "pwnorm", conv_bn(state, "depthwise", "dwnorm", x, act, 2), silu)

    with torch.no_grad():
        assert relative_error(layer(x), forward(silu)) < 1e-5
        assert relative_error(layer(x), forward(None)) > 1e-2


def test_neck_wiring():
    variant = damoyolo._VARIANTS["damoyolo_ns"]
    neck = damoyolo.Neck(variant).eval()
    randomize(neck, 1)
    generator = torch.Generator().manual_seed(2)
    c2, c1, c0 = (torch.randn(1, c, s, s, generator=generator) for c, s in ((40, 16), (80, 8), (160, 4)))

    def twice(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def forward(skip: bool) -> list[Tensor]:
        x3 = neck.merge_3(torch.cat((c0, neck.bu_conv13(c1)), 1))
        x4 = neck.merge_4(torch.cat((c1, neck.bu_conv24(c2), twice(x3)), 1))
        x5 = neck.merge_5(torch.cat((c2, twice(x4)), 1))
        x7 = neck.merge_7(torch.cat((x4, neck.bu_conv57(x5)), 1))
        x6 = neck.merge_6(torch.cat((x3 if skip else c0, neck.bu_conv46(x4), neck.bu_conv76(x7)), 1))
        return [x5, x7, x6]

    with torch.no_grad():
        actual = neck([c2, c1, c0])
        assert max(map(relative_error, actual, forward(skip=True))) < 1e-6
        assert max(map(relative_error, actual, forward(skip=False))) > 1e-2


@pytest.mark.parametrize(("inp", "stride"), [(8, 1), (6, 1), (8, 2)])
def test_inverted_residual_written_out(inp, stride):
    block = damoyolo.InvertedResidual(inp, 12, 8, stride, "silu").eval()
    randomize(block, 1)
    x = torch.randn(2, inp, 10, 10, generator=torch.Generator().manual_seed(2))
    state = block.state_dict()
    y = conv_bn(state, "conv.0", "conv.1", x, silu)
    y = conv_bn(state, "conv.3", "conv.4", y, silu, stride)
    y = conv_bn(state, "conv.6", "conv.7", y)
    with torch.no_grad():
        assert relative_error(block(x), x + y if y.shape == x.shape else y) < 1e-5
    shifted = damoyolo.InvertedResidual(inp, 12, 8, stride, "silu", gap=True).eval()
    assert not set(state) >= set(shifted.state_dict())
    assert [v.shape for v in state.values()] == [v.shape for v in shifted.state_dict().values()]


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_box_decoding_by_explicit_loops(name):
    variant = damoyolo._VARIANTS[name]
    head = damoyolo.ZeroHead((4, 6, 8), 3, variant.reg_max, variant.head_kernel).eval()
    randomize(head, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for scale, value in zip(head.scales, (0.7, 1.3, 2.1), strict=True):
            scale.scale.fill_(value)
    maps = [torch.randn(2, c, h, w, generator=generator) * 3 for c, h, w in ((4, 8, 12), (6, 4, 6), (8, 2, 3))]
    expected_scores, expected_boxes = [], []
    pad = variant.head_kernel // 2
    for level, x in enumerate(maps):
        stride = (8, 16, 32)[level]
        classify, regress = head.gfl_cls[level], head.gfl_reg[level]
        logits = F.conv2d(x, classify.weight, classify.bias, padding=pad).double().detach().numpy()
        raw = F.conv2d(x, regress.weight, regress.bias, padding=pad).double().detach().numpy()
        raw = raw * float(head.scales[level].scale)
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                expected_scores.append(1 / (1 + np.exp(-logits[:, :, row, column])))
                edges = []
                for image in range(2):
                    sides = []
                    for side in range(4):
                        bins = raw[image, side * (variant.reg_max + 1) :][: variant.reg_max + 1, row, column]
                        weight = [np.exp(b - max(bins)) for b in bins]
                        sides.append(stride * sum(k * w for k, w in enumerate(weight)) / sum(weight))
                    left, top, right, bottom = sides
                    px, py = column * stride, row * stride
                    edges.append([px - left, py - top, px + right, py + bottom])
                expected_boxes.append(edges)
    with torch.no_grad():
        scores, boxes = head(maps)
    assert relative_error(scores, np.stack(expected_scores, 1)) < 1e-5
    expected = np.array(expected_boxes).transpose(1, 0, 2)
    assert relative_error(boxes, expected) < 1e-5
    # The reference point is the corner of a cell; half a cell of the finest level would be 4 pixels.
    assert relative_error(boxes, expected + 4) > 1e-3


# --- export ---------------------------------------------------------------------------------------------------------


def exported(model: nn.Module, example: Tensor, path: Path, dynamo: bool):
    """Export with a free batch size, and open in ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    if dynamo:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        names = ["image", "scores", "boxes"]
        axes = {name: {0: "batch"} for name in names}
        torch.onnx.export(
            model, (example,), path, dynamo=False, input_names=names[:1], output_names=names[1:], dynamic_axes=axes
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check_export(name: str, side: int, path: Path, dynamo: bool, batches: tuple[int, ...]) -> None:
    model = models.create(name)
    generator = torch.Generator().manual_seed(4)
    example = torch.rand(2, 3, side, side, generator=generator) * 255
    randomize(model, 3, inputs=example)
    session = exported(model, example, path, dynamo)
    for batch in batches:
        image = torch.rand(batch, 3, side, side, generator=generator) * 255
        with torch.no_grad():
            expected = model(image)
        actual = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        assert expected[0].std() > 1e-3, "scores that are all alike prove nothing"
        assert max(map(relative_error, actual, expected)) <= 1e-4
    # The bound tells a model from one in which a single norm scales by a little more.
    norm = next(m for m in model.get_submodule("neck").modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight.mul_(1.1)
        assert max(map(relative_error, actual, model(image))) > 1e-4


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        pytest.param("damoyolo_t", False, id="damoyolo_t-legacy"),
        pytest.param("damoyolo_t", True, id="damoyolo_t-dynamo"),
        pytest.param("damoyolo_ns", False, id="damoyolo_ns-legacy"),
        pytest.param("damoyolo_ns", True, id="damoyolo_ns-dynamo", marks=pytest.mark.slow),
    ],
)
def test_exported_model_computes_the_same_for_any_batch(name, dynamo, tmp_path):
    check_export(name, 64, tmp_path / "model.onnx", dynamo, (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("name", ALL)
def test_exported_model_computes_the_same_at_native_resolution(name, dynamo, tmp_path):
    check_export(name, models.ZOO[name].resolution, tmp_path / "model.onnx", dynamo, (1,))


# --- post-processing ------------------------------------------------------------------------------------------------


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def brute_force(scores: np.ndarray, boxes: np.ndarray, threshold: float, iou: float, most: int) -> list:
    """Each class by itself, then the best over all classes."""
    found = []
    for label in range(scores.shape[1]):
        kept: list[int] = []
        for anchor in sorted(range(len(boxes)), key=lambda a: -scores[a, label]):
            if scores[anchor, label] > threshold and all(overlap(boxes[anchor], boxes[k]) <= iou for k in kept):
                kept.append(anchor)
        found += [(scores[anchor, label], label, *boxes[anchor]) for anchor in kept]
    return sorted(found, key=lambda d: -d[0])[:most]


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    corner = rng.uniform(0, 60, (*shape, 2))
    return np.concatenate((corner, corner + rng.uniform(5, 40, (*shape, 2))), -1).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("threshold", "iou", "most"), [(0.05, 0.7, 100), (0.3, 0.45, 1000), (0.5, 0.0, 7)])
def test_suppression_equals_brute_force(seed, threshold, iou, most):
    rng = np.random.default_rng(seed)
    scores, boxes = rng.random((2, 60, 4), dtype=np.float32), random_boxes(rng, 2, 60)
    for image, found in enumerate(damoyolo.postprocess(scores, boxes, threshold, iou, most)):
        expected = brute_force(scores[image], boxes[image], threshold, iou, most)
        assert 0 < len(expected) <= most
        assert len(expected) < np.count_nonzero(scores[image] > threshold), "something must be suppressed"
        actual = [(s, label, *box) for s, label, box in zip(found.scores, found.labels, found.boxes, strict=True)]
        assert actual == expected


def test_suppression_is_per_class():
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 9]]], np.float32)
    apart = np.array([[[0.9, 0.0], [0.0, 0.8]]], np.float32)
    together = np.array([[[0.9, 0.0], [0.8, 0.0]]], np.float32)
    assert damoyolo.postprocess(apart, boxes)[0].labels.tolist() == [0, 1]
    assert damoyolo.postprocess(together, boxes)[0].labels.tolist() == [0]
    assert damoyolo.postprocess(together, boxes, iou_threshold=0.95)[0].labels.tolist() == [0, 0]


def test_nothing_and_empty_boxes():
    scores, boxes = np.full((1, 3, 2), 0.04, np.float32), np.zeros((1, 3, 4), np.float32)
    nothing = damoyolo.postprocess(scores, boxes)[0]
    assert (nothing.boxes.shape, nothing.scores.shape, nothing.labels.shape) == ((0, 4), (0,), (0,))
    # Boxes without area overlap nothing, not even themselves.
    assert len(damoyolo.postprocess(scores, boxes, score_threshold=0.01)[0].scores) == 6


@pytest.mark.parametrize("boxes", [(1, 5, 4), (2, 4, 4), (1, 4, 5), (4, 4)])
def test_outputs_that_do_not_match_are_refused(boxes):
    with pytest.raises(InputError):
        damoyolo.postprocess(np.zeros((1, 4, 2)), np.zeros(boxes))
    damoyolo.postprocess(np.zeros((1, 4, 2)), np.zeros((1, 4, 4)))
