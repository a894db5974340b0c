"""DEA-Net against the published counts, key lists and formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgecompile import models
from edgecompile.errors import InputError
from edgecompile.models import deanet
from edgecompile.models.randomize import randomize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

STATE_DICTS = Path(__file__).parent / "state_dicts"
# Flat positions around the rim of a 3x3 window, clockwise from the top left.
CLOCKWISE = (0, 1, 2, 5, 8, 7, 6, 3)


def on_meta(**options) -> nn.Module:
    """The model without storage: counts and shapes in no time."""
    with torch.device("meta"):
        return models.create("deanet", **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(state: dict[str, Tensor]) -> list[tuple[str, list[int]]]:
    return [(key, list(value.shape)) for key, value in state.items()]


def published(name: str) -> list[tuple[str, list[int]]]:
    return list(json.loads((STATE_DICTS / f"{name}.json").read_text()).items())


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    actual, expected = (np.asarray(torch.as_tensor(x).detach(), np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# --- the published counts -------------------------------------------------------------------------------------------


def test_parameters_are_exactly_those_published():
    assert parameters(on_meta()) == 7_789_313
    assert parameters(on_meta(base_channels=16)) != 7_789_313


def test_state_dict_is_the_published_one_in_names_order_and_shapes():
    assert shapes(on_meta().state_dict()) == published("deanet_train")
    assert shapes(on_meta(base_channels=16).state_dict()) != published("deanet_train")


def test_multiply_accumulates_at_256():
    model = on_meta()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 256, 256, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(32.2249, rel=1e-4)
    # Five convolutions in place of each merged one, the published count of the form with branches.
    extra = sum(4 * 9 * c * c * (256 * 32 // c) ** 2 for c, n in ((32, 8), (64, 8), (128, 8)) for _ in range(n)) / 1e9
    assert counter.get_total_flops() / 2e9 + extra == pytest.approx(90.207, rel=1e-4)


@pytest.mark.parametrize(("name", "width"), [("dea", 32), ("deanet", 1), ("deanet", 0)])
def test_impossible_models_are_refused(name, width):
    with pytest.raises(InputError):
        deanet.create(name, base_channels=width)


def merge_by_hand(model: nn.Module) -> nn.Module:
    """Replace each detail-enhanced convolution by one plain convolution, with kernels worked out here."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, deanet.DEConv):
                state = child.state_dict()
                kernel = torch.zeros_like(state["conv1_5.weight"])
                for i in range(3):
                    for j in range(3):
                        flat = 3 * i + j
                        central, angular = (state[f"conv1_{b}.conv.weight"].flatten(2) for b in (1, 4))
                        tap = state["conv1_5.weight"][:, :, i, j].clone()
                        tap += central[:, :, flat] - (central.sum(2) if flat == 4 else 0)
                        tap += state["conv1_2.conv.weight"][:, :, i] * (1, 0, -1)[j]
                        tap += state["conv1_3.conv.weight"][:, :, j] * (1, 0, -1)[i]
                        tap += angular[:, :, flat] - angular[:, :, (3, 0, 1, 6, 4, 2, 7, 8, 5)[flat]]
                        kernel[:, :, i, j] = tap
                plain = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
                plain.weight.data = kernel
                plain.bias = nn.Parameter(
                    sum((state[key] for key in state if key.endswith("bias")), torch.zeros(kernel.shape[0]))
                )
                parent.add_module(name, plain)
    return model


def test_merging_by_hand_gives_the_published_deployed_model():
    model = models.create("deanet")
    randomize(model, 1)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(image)
        deployed = merge_by_hand(model)
        assert relative_error(deployed(image), expected) < 1e-5
    assert parameters(deployed) == 3_653_377
    assert shapes(deployed.state_dict()) == published("deanet_deploy")
    with torch.no_grad():
        deployed.get_parameter("level3_block8.conv1.bias")[0] += 0.1
        assert relative_error(deployed(image), expected) > 1e-5


# --- the mathematics ------------------------------------------------------------------------------------------------


def test_detail_enhanced_convolution_is_five_difference_convolutions():
    deconv = deanet.DEConv(6).eval()
    randomize(deconv, 1)
    x = randn(2, 6, 7, 9)
    # Pixels under the window, [N, C, 9, H*W], zero outside the image.
    pixels = F.unfold(x, 3, padding=1).unflatten(1, (6, 9))
    centre, grid = pixels[:, :, 4:5], pixels.unflatten(2, (3, 3))

    def apply(weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("oit,nitp->nop", weight.flatten(2), values.flatten(2, -2)) + bias[:, None]

    def five(turn: int) -> Tensor:
        neighbour = list(range(9))
        for position, flat in enumerate(CLOCKWISE):
            neighbour[flat] = CLOCKWISE[(position + turn) % 8]
        inputs = {
            "conv1_1.conv": pixels - centre,
            "conv1_2.conv": grid[:, :, :, 0] - grid[:, :, :, 2],
            "conv1_3.conv": grid[:, :, 0] - grid[:, :, 2],
            "conv1_4.conv": pixels - pixels[:, :, neighbour],
            "conv1_5": pixels,
        }
        state = deconv.state_dict()
        return sum(
            (apply(state[f"{key}.weight"], state[f"{key}.bias"], values) for key, values in inputs.items()),
            torch.zeros(()),
        ).unflatten(2, (7, 9))

    with torch.no_grad():
        assert relative_error(deconv(x), five(turn=1)) < 1e-6
        assert relative_error(deconv(x), five(turn=-1)) > 1e-2


@pytest.mark.parametrize("branch", ["conv1_1", "conv1_2", "conv1_3", "conv1_4", "conv1_5"])
def test_only_the_plain_branch_sees_a_constant_image(branch):
    deconv = deanet.DEConv(4).eval()
    randomize(deconv, 1)
    with torch.no_grad():
        for name, parameter in deconv.named_parameters():
            if not name.startswith(branch):
                parameter.zero_()
        bias = next(p for name, p in deconv.named_parameters() if name.startswith(branch) and name.endswith("bias"))
        inside = deconv(torch.full((1, 4, 5, 5), 3.0))[..., 1:-1, 1:-1] - bias[:, None, None]
    assert (inside.abs().max() > 1e-2) == (branch == "conv1_5")
    assert (inside.abs().max() < 1e-5) == (branch != "conv1_5")


def reflected(index: int, size: int) -> int:
    """Index mirrored at the border without repeating it."""
    return size - 1 - abs(size - 1 - abs(index))


def test_channel_attention_by_explicit_loops():
    attention = deanet.ChannelAttention(8, 4).eval()
    randomize(attention, 1)
    x = randn(2, 8, 5, 6)
    state = {key: value.double().numpy() for key, value in attention.state_dict().items()}
    expected = np.zeros((2, 8, 1, 1))
    for n in range(2):
        mean = [float(x[n, c].double().mean()) for c in range(8)]
        hidden = [
            max(0.0, sum(state["ca.0.weight"][h, c, 0, 0] * mean[c] for c in range(8)) + state["ca.0.bias"][h])
            for h in range(2)
        ]
        for c in range(8):
            expected[n, c] = sum(state["ca.2.weight"][c, h, 0, 0] * hidden[h] for h in range(2)) + state["ca.2.bias"][c]
    assert relative_error(attention(x), expected) < 1e-5
    assert relative_error(attention(x), 1 / (1 + np.exp(-expected))) > 1e-2


def test_spatial_attention_by_explicit_loops():
    attention = deanet.SpatialAttention().eval()
    randomize(attention, 1)
    height, width = 5, 6
    x = randn(1, 3, height, width)
    state = {key: value.double().numpy() for key, value in attention.state_dict().items()}
    image = x[0].double().numpy()
    maps = [image.mean(0), image.max(0)]
    expected, padded_with_zeros = np.zeros((2, 1, 1, height, width))
    for i in range(height):
        for j in range(width):
            for channel in range(2):
                for di in range(-3, 4):
                    for dj in range(-3, 4):
                        weight = state["sa.weight"][0, channel, di + 3, dj + 3]
                        value = maps[channel][reflected(i + di, height), reflected(j + dj, width)]
                        expected[0, 0, i, j] += weight * value
                        if 0 <= i + di < height and 0 <= j + dj < width:
                            padded_with_zeros[0, 0, i, j] += weight * value
    assert relative_error(attention(x), expected + state["sa.bias"]) < 1e-5
    assert relative_error(attention(x), padded_with_zeros + state["sa.bias"]) > 1e-2


def test_pixel_attention_by_explicit_loops():
    attention = deanet.PixelAttention(3).eval()
    randomize(attention, 1)
    height, width = 5, 4
    x, coarse = randn(1, 3, height, width), randn(1, 3, height, width, seed=5)
    state = {key: value.double().numpy() for key, value in attention.state_dict().items()}

    def loops(first: Tensor, second: Tensor) -> np.ndarray:
        logits = np.zeros((1, 3, height, width))
        for c in range(3):
            for i in range(height):
                for j in range(width):
                    total = state["pa2.bias"][c]
                    for channel, source in enumerate((first, second)):
                        for di in range(-3, 4):
                            for dj in range(-3, 4):
                                value = float(source[0, c, reflected(i + di, height), reflected(j + dj, width)])
                                total += state["pa2.weight"][c, channel, di + 3, dj + 3] * value
                    logits[0, c, i, j] = total
        return 1 / (1 + np.exp(-logits))

    assert relative_error(attention(x, coarse), loops(x, coarse)) < 1e-5
    assert relative_error(attention(x, coarse), loops(coarse, x)) > 1e-2


def test_attention_block_written_out():
    block = deanet.DEABlock(8).eval()
    randomize(block, 1)
    x = randn(2, 8, 8, 8)
    with torch.no_grad():
        y = block.conv2(torch.relu(block.conv1(x)) + x)
        coarse = block.ca(y) + block.sa(y)
        assert relative_error(block(x), y * block.pa(y, coarse) + x) < 1e-6
        assert relative_error(block(x), y * block.pa(y, torch.sigmoid(coarse)) + x) > 1e-4


def test_plain_block_written_out():
    block = deanet.DEBlock(8).eval()
    randomize(block, 1)
    x = randn(2, 8, 8, 8)
    with torch.no_grad():
        assert relative_error(block(x), block.conv2(torch.relu(block.conv1(x)) + x) + x) < 1e-6
        assert relative_error(block(x), block.conv2(torch.relu(block.conv1(x) + x)) + x) > 1e-3


def test_fusion_applies_the_sigmoid_twice():
    fusion = deanet.CGAFusion(8, 4).eval()
    randomize(fusion, 1)
    encoder, decoder = randn(2, 8, 8, 8), randn(2, 8, 8, 8, seed=5)
    with torch.no_grad():
        total = encoder + decoder
        once = fusion.pa(total, fusion.ca(total) + fusion.sa(total))
        twice = 1 / (1 + torch.exp(-once))
        actual = fusion(encoder, decoder)
        assert relative_error(actual, fusion.conv(total + twice * encoder + (1 - twice) * decoder)) < 1e-6
        assert relative_error(actual, fusion.conv(total + once * encoder + (1 - once) * decoder)) > 1e-3


def test_network_wiring():
    model = models.create("deanet", base_channels=4)
    randomize(model, 1)
    assert isinstance(model, deanet.DEANet)
    image = randn(1, 3, 32, 32)

    def run(x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = model.get_submodule(name)(x)
        return x

    def blocks(stage: str, count: int) -> list[str]:
        return [f"{stage}_block{i}" for i in range(1, count + 1)]

    def forward(swap: bool) -> Tensor:
        level2 = run(image, "down1", *blocks("down_level1", 4), "down2")
        level3 = run(level2, "fe_level_2", *blocks("down_level2", 4), "down3")
        deep = run(level3, "fe_level_3", *blocks("level3", 8))
        up = run(model.mix1(deep, level3) if swap else model.mix1(level3, deep), "up1", *blocks("up_level2", 4))
        return run(model.mix2(level2, up), "up2", *blocks("up_level1", 4), "up3")

    with torch.no_grad():
        assert relative_error(model(image), forward(swap=False)) < 1e-6
        assert relative_error(model(image), forward(swap=True)) > 1e-4


def test_any_multiple_of_4_keeps_its_size():
    model = on_meta()
    assert model(torch.empty(2, 3, 36, 52, device="meta")).shape == (2, 3, 36, 52)
    with pytest.raises(RuntimeError):
        model(torch.empty(2, 3, 38, 52, device="meta"))


# --- export ---------------------------------------------------------------------------------------------------------


def export(model: nn.Module, example: Tensor, path: Path, dynamo: bool) -> None:
    """Export with a free batch size."""
    if dynamo:
        free = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=free, external_data=False, verbose=False)
    else:
        axes = {"image": {0: "batch"}, "clear": {0: "batch"}}
        torch.onnx.export(
            model, (example,), path, dynamo=False, input_names=["image"], output_names=["clear"], dynamic_axes=axes
        )


def computed_weights(path: Path) -> list[tuple[int, set[str]]]:
    """For each Conv whose kernel is computed in the graph: the nodes that compute it, and the graph inputs they use."""
    graph = onnx.load(path).graph
    producers = {output: node for node in graph.node for output in node.output}
    inputs = {value.name for value in graph.input} - {value.name for value in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in producers:
            names, used, sources = [node.input[1]], set(), set()
            while names:
                name = names.pop()
                if name in producers and name not in used:
                    names += producers[name].input
                    used.add(name)
                elif name in inputs:
                    sources.add(name)
            found.append((len(used), sources))
    return found


def check_export(side: int, path: Path, dynamo: bool, batches: tuple[int, ...]) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = models.create("deanet")
    randomize(model, 3)
    generator = torch.Generator().manual_seed(4)
    export(model, torch.rand(2, 3, side, side, generator=generator), path, dynamo)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in batches:
        image = torch.rand(batch, 3, side, side, generator=generator)
        with torch.no_grad():
            expected = model(image)
        actual = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
        assert expected.std() > 1e-3, "an image of one colour proves nothing"
        assert relative_error(actual, expected) <= 1e-5
    with torch.no_grad():
        model.get_parameter("up_level1_block4.conv1.conv1_3.conv.weight")[0, 0] += 1
        assert relative_error(actual, model(image)) > 1e-5


@pytest.mark.parametrize(
    "dynamo", [pytest.param(False, id="legacy"), pytest.param(True, id="dynamo", marks=pytest.mark.slow)]
)
def test_exported_model_computes_the_same_for_any_batch(dynamo, tmp_path):
    path = tmp_path / "model.onnx"
    check_export(32, path, dynamo, (1, 3))
    weights = computed_weights(path)
    assert len(weights) == 24, "merging is left to the compiler"
    assert all(not sources for _, sources in weights), "no kernel depends on the image"
    assert all(nodes <= 20 for nodes, _ in weights)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
def test_exported_model_computes_the_same_at_native_resolution(dynamo, tmp_path):
    check_export(models.ZOO["deanet"].resolution, tmp_path / "model.onnx", dynamo, (1,))
