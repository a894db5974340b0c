from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_parity import assert_exports
from torch import Tensor

from edgecompile import models
from edgecompile.errors import InputError
from edgecompile.models import litepose
from edgecompile.models.litepose import assign, create, decode
from edgecompile.models.randomize import randomize

STATE_DICTS = Path(__file__).parent / "state_dicts"

# name, arch, joints, resolution, parameters, true MACs in G
PUBLISHED = [
    ("litepose_xs", None, 14, 256, 1_675_552, 0.8829),
    ("litepose_s", None, 14, 448, 2_731_240, 3.6141),
    ("litepose_m", None, 14, 448, 3_533_808, 5.2637),
    ("litepose_l", None, 14, 512, 5_738_120, 9.9620),
    ("litepose_xs", None, 17, 256, 1_675_912, 0.8858),
    ("litepose_s", None, 17, 448, 2_731_624, 3.6244),
    ("litepose_m", None, 17, 448, 3_534_336, 5.2757),
    ("litepose_l", None, 17, 512, 5_738_672, 9.9793),
    ("litepose_s", "prune-S", 14, 512, 1_709_032, 3.4860),
    ("litepose_m", "prune-M", 14, 512, 3_472_064, 6.8485),
    ("litepose_l", "prune-L", 14, 512, 5_812_744, 10.8954),
]


@pytest.fixture(scope="module")
def net() -> litepose.LitePose:
    model = create("litepose_xs").eval()
    randomize(model, 0)
    return model.double()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arch", "joints", "size", "parameters", "gmacs"), PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(macs, name, arch, joints, size, parameters, gmacs):
    with torch.device("meta"):
        model = create(name, joints, arch).eval()
        x = torch.empty(1, 3, size, size)
    coarse, fine = model(x)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs(model, x) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert coarse.shape == (1, 2 * joints, size // 4, size // 4)
    assert fine.shape == (1, joints, size // 2, size // 2)


@pytest.mark.parametrize(
    ("file", "name", "joints"), [("litepose_xs_crowdpose", "litepose_xs", 14), ("litepose_s_coco", "litepose_s", 17)]
)
def test_state_dict_is_the_published_one(file, name, joints):
    published = json.loads((STATE_DICTS / f"{file}.json").read_text())
    ours = models.create(name, joints=joints).state_dict()
    assert [(key, list(value.shape)) for key, value in ours.items()] == list(published.items())


@pytest.mark.parametrize("options", [{"arch": "prune-XL"}, {"joints": 0}])
def test_bad_options_are_input_errors(options):
    with pytest.raises(InputError):
        create("litepose_s", **options)


def test_unknown_name_is_an_input_error():
    with pytest.raises(InputError, match="search-XXL"):
        create("litepose_xxl")


# --- numerics ----------------------------------------------------------------------------------------------------


def scale_and_shift(state: dict[str, Tensor], bn: str) -> tuple[Tensor, Tensor]:
    scale = state[f"{bn}.weight"] / torch.sqrt(state[f"{bn}.running_var"] + 1e-5)
    return scale, state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Depthwise convolution as a sum over taps, padded to keep the resolution at stride 1."""
    k = weight.shape[-1]
    padded = F.pad(x, [k // 2] * 4)
    rows, columns = x.shape[2], x.shape[3]
    taps = itertools.product(range(k), range(k))
    products = [
        padded[:, :, i : i + rows : stride, j : j + columns : stride] * weight[:, 0, i, j][:, None, None]
        for i, j in taps
    ]
    return torch.stack(products).sum(0)


def folded_bottleneck(state: dict[str, Tensor], prefix: str, x: Tensor, stride: int, *, shortcut: bool) -> Tensor:
    y = x
    for part in ("inv", "depth_conv", "point_conv"):
        weight = state[f"{prefix}.{part}.0.weight"]
        scale, shift = scale_and_shift(state, f"{prefix}.{part}.1")
        weight = weight * scale[:, None, None, None]
        if part == "depth_conv":
            y = depthwise(y, weight, stride)
        else:
            y = torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], y)
        y = y + shift[:, None, None]
        if part != "point_conv":
            y = y.clamp(0, 6)
    return x + y if shortcut else y


@pytest.mark.parametrize(("stage", "block", "stride"), [(0, 0, 2), (0, 1, 1), (3, 0, 1), (3, 1, 1)])
def test_inverted_bottleneck_is_its_folded_form(net, stage, block, stride):
    module = net.stage[stage][block]
    state = module.state_dict(prefix="b.")
    inputs, outputs = module.inv[0].in_channels, module.point_conv[0].out_channels
    x = torch.randn(2, inputs, 10, 14, dtype=torch.float64)
    shortcut = block > 0
    wanted = module(x)
    torch.testing.assert_close(folded_bottleneck(state, "b", x, stride, shortcut=shortcut), wanted)
    if stride == 1 and inputs == outputs:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(folded_bottleneck(state, "b", x, stride, shortcut=not shortcut), wanted)
    state["b.depth_conv.1.running_mean"] = state["b.depth_conv.1.running_mean"] + 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(folded_bottleneck(state, "b", x, stride, shortcut=shortcut), wanted)


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """ConvTranspose of kernel 4, stride 2, padding 1: every input pixel adds its kernel to the output."""
    n, _, rows, columns = x.shape
    full = torch.zeros(n, weight.shape[1], 2 * rows + 2, 2 * columns + 2, dtype=x.dtype)
    for i, j in itertools.product(range(4), range(4)):
        contribution = torch.einsum("nihw,io->nohw", x, weight[:, :, i, j])
        full[:, :, i : i + 2 * rows : 2, j : j + 2 * columns : 2] += contribution
    return full[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_deconvolution_level_folds_into_two_weights_and_one_bias(net, level):
    refined_weight, raw_weight = net.deconv_refined[level].weight, net.deconv_raw[level].weight
    refined = torch.randn(2, refined_weight.shape[0], 5, 7, dtype=torch.float64)
    raw = torch.randn(2, raw_weight.shape[0], 5, 7, dtype=torch.float64)
    wanted = net.deconv_bnrelu[level](net.deconv_refined[level](refined) + net.deconv_raw[level](raw))
    scale, shift = scale_and_shift(net.deconv_bnrelu[level].state_dict(prefix="bn."), "bn.0")

    def folded(scaled_refined: Tensor, biases: int) -> Tensor:
        y = transposed(refined, scaled_refined) + transposed(raw, raw_weight * scale[:, None, None])
        return (y + biases * shift[:, None, None]).clamp(min=0)

    over_outputs = refined_weight * scale[:, None, None]
    torch.testing.assert_close(folded(over_outputs, 1), wanted)
    wrong = [(over_outputs, 2), (refined_weight, 1)]
    if refined_weight.shape[0] == refined_weight.shape[1]:
        wrong.append((refined_weight * scale[:, None, None, None], 1))
    for weight, biases in wrong:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(folded(weight, biases), wanted)


def folded_conv(state: dict[str, Tensor], conv: str, bn: str, x: Tensor, stride: int = 1) -> Tensor:
    scale, shift = scale_and_shift(state, bn)
    weight = state[f"{conv}.weight"] * scale[:, None, None, None]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, shift, stride, weight.shape[-1] // 2, groups=groups)


def head(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    y = folded_conv(state, f"{prefix}.conv.0", f"{prefix}.conv.1", x).clamp(min=0)
    return torch.einsum("oi,nihw->nohw", state[f"{prefix}.conv.3.weight"][:, :, 0, 0], y)


def reference(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole network from a state dict, every BatchNorm folded: sections 4 and 5 of the paper."""
    x = folded_conv(state, "first.0.0", "first.0.1", x, 2).clamp(0, 6)
    x = folded_conv(state, "first.1.0", "first.1.1", x).clamp(0, 6)
    features = [folded_conv(state, "first.2", "first.3", x)]
    for stage, (blocks, stride) in enumerate(((6, 2), (8, 2), (10, 2), (10, 1))):
        y = features[-1]
        for block in range(blocks):
            prefix = f"stage.{stage}.{block}"
            y = folded_bottleneck(state, prefix, y, stride if block == 0 else 1, shortcut=block > 0)
        features.append(y)
    refined = features[4]
    outputs = []
    for level in range(3):
        y = transposed(refined, state[f"deconv_refined.{level}.weight"])
        y = y + transposed(features[3 - level], state[f"deconv_raw.{level}.weight"])
        scale, shift = scale_and_shift(state, f"deconv_bnrelu.{level}.0")
        refined = (y * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
        if level > 0:
            raw = features[2 - level]
            outputs.append(head(state, f"final_refined.{level - 1}", refined))
            outputs[-1] = outputs[-1] + head(state, f"final_raw.{level - 1}", raw)
    return outputs[0], outputs[1]


def test_network_is_its_folded_form(net, images):
    wanted = net(images)
    assert all(w.std() > 1e-3 for w in wanted)
    torch.testing.assert_close(reference(net.state_dict(), images), wanted, rtol=1e-6, atol=1e-9)


def test_folded_form_tells_a_changed_weight(net, images):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state["final_raw.1.conv.1.bias"] += 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(reference(state, images), net(images), rtol=1e-6, atol=1e-9)


# --- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dynamo", "dynamic"),
    [
        pytest.param(False, False, id="legacy-static"),
        pytest.param(False, True, id="legacy-dynamic"),
        pytest.param(True, False, id="dynamo-static", marks=pytest.mark.slow),
        pytest.param(True, True, id="dynamo-dynamic", marks=pytest.mark.slow),
    ],
)
def test_exports(tmp_path, dynamo, dynamic):
    model = create("litepose_xs")
    randomize(model, 2)
    proto = assert_exports(model, torch.randn(2, 3, 256, 256), tmp_path / "x.onnx", dynamo=dynamo, dynamic=dynamic)
    kinds = [node.op_type for node in proto.graph.node]
    # The sum of two ConvTranspose before each BatchNormalization is what no exporter folds.
    assert kinds.count("ConvTranspose") == 6
    assert kinds.count("BatchNormalization") == 3


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize(("name", "arch", "joints", "size"), [p[:4] for p in PUBLISHED[1:]])
def test_every_variant_exports(tmp_path, name, arch, joints, size, dynamo):
    model = create(name, joints, arch)
    randomize(model, 3)
    assert_exports(model, torch.randn(1, 3, size, size), tmp_path / "x.onnx", dynamo=dynamo, dynamic=True)


# --- decoding ----------------------------------------------------------------------------------------------------

SIZE = 256


def draw(people: list[dict[int, tuple[float, float, float]]], tags: list[float], joints: int = 14):
    """The maps a perfect LitePose would give for 256 pixels: a Gaussian and a patch of the person's tag at each joint.

    Args:
        people: for each person, joint -> x, y in input pixels and the height of the peak.
        tags: the tag of each person.
        joints: J.
    """
    coarse = np.zeros((1, 2 * joints, SIZE // 4, SIZE // 4), np.float32)
    fine = np.zeros((1, joints, SIZE // 2, SIZE // 2), np.float32)
    for person, tag in zip(people, tags, strict=True):
        for joint, (x, y, score) in person.items():
            for maps, cell in ((coarse, 4), (fine, 2)):
                rows, columns = np.ogrid[: maps.shape[2], : maps.shape[3]]
                distance = ((columns + 0.5) * cell - x) ** 2 + ((rows + 0.5) * cell - y) ** 2
                bump = score * np.exp(-distance / (2 * (2 * cell) ** 2))
                maps[0, joint] = np.maximum(maps[0, joint], bump)
            row, column = int(y / 4), int(x / 4)
            patch = slice(max(row - 3, 0), row + 4), slice(max(column - 3, 0), column + 4)
            coarse[(0, joints + joint, *patch)] = tag
    return coarse, fine


def crowd(count: int, joints: int = 14, seed: int = 0) -> list[dict[int, tuple[float, float, float]]]:
    """People side by side whose joints lie anywhere in their own column, with falling scores."""
    rng = np.random.default_rng(seed)
    lane = SIZE / count
    return [
        {
            joint: (lane * i + rng.uniform(20, lane - 20), rng.uniform(20, SIZE - 20), 0.95 - 0.1 * i)
            for joint in range(joints)
        }
        for i in range(count)
    ]


def truth(people: list[dict[int, tuple[float, float, float]]], joints: int = 14) -> np.ndarray:
    return np.array([[person.get(joint, (0, 0, 0)) for joint in range(joints)] for person in people])


@pytest.mark.parametrize("joints", [14, 17])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_decode_finds_the_people_drawn(count, joints):
    people = crowd(count, joints)
    (poses,) = decode(draw(people, [-4.0, 0.5, 6.0][:count], joints))
    assert poses.shape == (count, joints, 3)
    assert poses.dtype == np.float32
    wanted = truth(people, joints)
    assert np.abs(poses[..., :2] - wanted[..., :2]).max() < 1.0
    assert np.abs(poses[..., 2] - wanted[..., 2]).max() < 0.1


def test_decode_follows_the_tags():
    people = crowd(2)
    coarse, fine = draw(people, [-3.0, 3.0])
    coarse[:, 14 + 9] *= -1  # joint 9 of each person now carries the other's tag
    (poses,) = decode((coarse, fine))
    wanted = truth(people)
    wanted[:, 9] = wanted[::-1, 9]
    assert np.abs(poses[..., :2] - wanted[..., :2]).max() < 1.0


def test_decode_cannot_tell_people_of_one_tag_apart():
    people = crowd(2, seed=5)
    (poses,) = decode(draw(people, [1.0, 1.0]), refine=False)
    found = {tuple(np.round(place)) for place in poses.reshape(-1, 3)[:, :2] if place.any()}
    assert len(found) == 28, "every joint is still found, in some person"
    # Tags that round to the same difference are enough: the nearer one decides between equals, whatever the scores.
    x, y, _ = people[1][9]
    people[1][9] = (x, y, 0.98)
    (separate,) = decode(draw(people, [-0.2, 0.2]), refine=False)
    assert np.abs(separate[..., :2] - truth(people)[..., :2]).max() < 1.0


def test_decode_prefers_the_tag_to_the_score():
    person = {joint: (60.0, 20.0 + 15 * joint, 0.5) for joint in range(14)}
    stranger = {9: (200.0, 128.0, 0.9)}
    (poses,) = decode(draw([person, stranger], [0.0, 1.4]), refine=False)
    wanted = truth([person, stranger])
    assert np.abs(poses[..., :2] - wanted[..., :2]).max() < 1.0
    # Tags that round alike can be the person's: the better score is, and the other candidate starts a new person.
    (poses,) = decode(draw([person, stranger], [0.0, 0.4]), refine=False)
    assert np.abs(poses[0, 9, :2] - wanted[1, 9, :2]).max() < 1.0
    assert np.abs(poses[1, 9, :2] - wanted[0, 9, :2]).max() < 1.0


def test_equal_neighbours_are_one_candidate():
    # Between four pixels of each map: after resizing, four pixels share the maximum.
    people = [{0: (64.0, 128.0, 0.9)}, {0: (192.0, 128.0, 0.8)}]
    (poses,) = decode(draw(people, [0.0, 5.0]))
    assert len(poses) == 2
    assert np.abs(poses[:, 0, :2] - truth(people)[:, 0, :2]).max() < 1.0


def test_decode_of_empty_maps_finds_nobody():
    empty = np.zeros((1, 28, 64, 64), np.float32), np.zeros((1, 14, 128, 128), np.float32)
    assert [poses.shape for poses in decode(empty)] == [(0, 14, 3)]
    assert [poses.shape for poses in decode(draw(crowd(2), [0.0, 3.0]), threshold=1.0)] == [(0, 14, 3)]


def test_decode_takes_tensors_and_images_of_different_crowds():
    images = [draw(crowd(count), [0.0, 4.0, 8.0][:count]) for count in (3, 1)]
    batch = tuple(torch.from_numpy(np.concatenate(maps)) for maps in zip(*images, strict=True))
    together = decode(batch)
    assert [len(poses) for poses in together] == [3, 1]
    for poses, image in zip(together, images, strict=True):
        np.testing.assert_array_equal(poses, decode(image)[0])


def test_refining_fills_a_weak_joint_from_its_tag():
    people = crowd(2)
    x, y, _ = people[1][6]
    people[1][6] = (x, y, 0.08)  # below the threshold of 0.1
    maps = draw(people, [-4.0, 4.0])
    wanted = truth(people)
    (refined,) = decode(maps)
    assert np.abs(refined[..., :2] - wanted[..., :2]).max() < 1.0
    assert 0 < refined[1, 6, 2] < 0.1
    (plain,) = decode(maps, refine=False)
    np.testing.assert_array_equal(plain[1, 6], 0)
    np.testing.assert_array_equal(np.delete(plain[1], 6, 0), np.delete(refined[1], 6, 0))


def test_decode_keeps_the_number_of_people_asked_for():
    maps = draw(crowd(3), [-4.0, 0.5, 6.0])
    (poses,) = decode(maps, max_people=2)
    assert len(poses) == 2
    assert len(decode(maps, max_people=3)[0]) == 3


def test_decode_of_a_joint_in_each_corner():
    corners = [(2.0, 2.0), (254.0, 2.0), (2.0, 254.0), (254.0, 254.0)]
    person = {joint: (*place, 0.9) for joint, place in enumerate(corners)}
    (poses,) = decode(draw([person], [2.0], 4))
    assert np.abs(poses[0, :, :2] - corners).max() < 2.5


def test_decode_refuses_the_maps_of_another_model():
    coarse, fine = draw(crowd(1), [0.0])
    for wrong in ((fine, coarse), (coarse,), (coarse[:, :14], fine), (coarse, fine[:, :, :64, :64])):
        with pytest.raises(InputError):
            decode(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_decode_refuses_maps_that_overflowed(value):
    for index in (0, 1):
        maps = draw(crowd(2), [0.0, 3.0])
        maps[index][0, -1, 5, 5] = value
        with pytest.raises(InputError, match="NaN"):
            decode(maps)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (3, 3), (5, 5), (2, 5), (5, 2), (4, 3), (3, 0), (0, 3)])
def test_assignment_is_the_cheapest_of_all(rows, columns):
    rng = np.random.default_rng(rows * 10 + columns)
    for _ in range(50):
        cost = np.round(rng.normal(size=(rows, columns)) * 3) * 100 + rng.choice([0, 1], (rows, columns))
        owner = assign(cost)
        taken = owner[owner >= 0]
        assert len(taken) == len(set(taken)) == min(rows, columns)
        total = sum(cost[row, column] for row, column in enumerate(owner) if column >= 0)
        if rows <= columns:
            every = (sum(cost[r, c] for r, c in enumerate(p)) for p in itertools.permutations(range(columns), rows))
        else:
            every = (sum(cost[r, c] for c, r in enumerate(p)) for p in itertools.permutations(range(rows), columns))
        assert total == pytest.approx(min(every))


def test_assignment_beats_taking_the_cheapest_pair_first():
    cost = np.array([[0.0, 1.0], [2.0, 100.0]])
    np.testing.assert_array_equal(assign(cost), [1, 0])
