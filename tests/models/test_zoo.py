"""Every model of the zoo against figures computed from the authors' implementations, the small ones against ours."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgecompile import models
from edgecompile.errors import InputError

STATE_DICTS = Path(__file__).parent / "state_dicts"


@dataclass(frozen=True)
class Row:
    """A model as its authors build it.

    ``macs`` are millions of multiply-accumulates at ``resolution`` (of convolutions and matrix products, transposed
    convolutions counted once per product); ``keys`` names the file with its state-dict keys and shapes.
    """

    name: str
    parameters: int
    macs: float | None
    keys: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    default: bool = False


ROWS = [
    Row("shvit_s1", 6_330_808, 241.321, "shvit_s1", default=True),
    Row("shvit_s2", 11_483_072, 365.395),
    Row("shvit_s3", 14_245_273, 600.570),
    Row("shvit_s4", 16_588_484, 986.217, "shvit_s4"),
    Row("efficientvit_m0", 2_349_436, 79.194, "efficientvit_m0", default=True),
    Row("efficientvit_m1", 2_980_560, 167.052),
    Row("efficientvit_m2", 4_187_554, 201.036),
    Row("efficientvit_m3", 6_900_722, 262.662),
    Row("efficientvit_m4", 8_804_228, 299.309),
    Row("efficientvit_m5", 12_473_772, 521.583, "efficientvit_m5"),
    Row("litepose_xs", 1_675_552, 882.9, "litepose_xs_crowdpose", {"joints": 14}, default=True),
    Row("litepose_s", 2_731_240, 3_614.1, None, {"joints": 14}),
    Row("litepose_m", 3_533_808, 5_263.7, None, {"joints": 14}),
    Row("litepose_l", 5_738_120, 9_962.0, None, {"joints": 14}),
    Row("litepose_xs", 1_675_912, 885.8, None, {"joints": 17}, default=True),
    Row("litepose_s", 2_731_624, 3_624.4, "litepose_s_coco", {"joints": 17}),
    Row("litepose_m", 3_534_336, 5_275.7, None, {"joints": 17}),
    Row("litepose_l", 5_738_672, 9_979.3, None, {"joints": 17}),
    Row("litepose_s", 1_709_032, 3_486.0, None, {"joints": 14, "arch": "prune-S"}, 512),
    Row("litepose_m", 3_472_064, 6_848.5, None, {"joints": 14, "arch": "prune-M"}, 512),
    Row("litepose_l", 5_812_744, 10_895.4, None, {"joints": 14, "arch": "prune-L"}, 512),
    Row("damoyolo_t", 8_875_727, 9_491.4, "damoyolo_tinynasL20_T"),
    Row("damoyolo_s", 16_935_647, 19_827.7, "damoyolo_tinynasL25_S"),
    Row("damoyolo_m", 29_241_727, 31_938.7, "damoyolo_tinynasL35_M"),
    Row("damoyolo_l", 43_861_759, None),
    Row("damoyolo_ns", 1_405_691, 748.9, "damoyolo_tinynasL18_Ns", default=True),
    Row("damoyolo_nm", 2_707_219, 1_791.0),
    Row("damoyolo_nl", 5_688_579, 2_954.5),
    Row("deanet", 7_789_313, 32_224.9, "deanet_train", default=True),
    Row("repavit_tiny", 5_736_040, 1_253.7, "repavit_tiny", {"idle_ratio": 0.75}, default=True),
    Row("repavit_small", 22_087_912, 4_598.9, None, {"idle_ratio": 0.75}),
    Row("repavit_base", 86_642_152, 17_563.8, None, {"idle_ratio": 0.75}),
    Row("repavit_tiny", 5_736_040, 1_253.7, "repavit_tiny", {"idle_ratio": 0.5}),
    Row("repavit_tiny", 5_736_040, 1_253.7, "repavit_tiny", {"idle_ratio": 1.0}),
    Row("repaswin_tiny", 28_323_682, 4_490.6, None, {"idle_ratio": 0.75}),
    Row("repvgg_a0", 9_108_968, 1_512.6, "repvgg_a0", default=True),
    Row("shvit_cifar", 583_064, 8.905, default=True),
    Row("efficientvit_cifar", 383_876, 7.473, default=True),
    Row("repavit_cifar", 228_690, 4.597, default=True),
    Row("repvgg_cifar", 367_978, 14.911, default=True),
]


def label(row: Row) -> str:
    return "-".join((row.name, *(str(v) for v in row.options.values())))


def layout(model: nn.Module) -> list[tuple[str, list[int]]]:
    """State-dict keys and shapes in order."""
    return [(k, list(v.shape)) for k, v in model.state_dict().items()]


def published_layout(keys: str) -> list[tuple[str, list[int]]]:
    return list(json.loads((STATE_DICTS / f"{keys}.json").read_text()).items())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=label(r), marks=() if r.default else pytest.mark.slow) for r in ROWS]
)
def test_published_figures(row, macs):
    model = models.create(row.name, **row.options)
    assert not any(m.training for m in model.modules())
    assert parameters(model) == row.parameters
    if row.keys:
        assert layout(model) == published_layout(row.keys)
    if row.macs:
        side = row.resolution or models.ZOO[row.name].resolution
        counted = macs(model.to("meta"), torch.empty(1, 3, side, side, device="meta")) / 1e6
        assert counted == pytest.approx(row.macs, rel=1e-4)


def test_figures_tell_neighbours_apart(macs):
    """The checks above see a changed head, a changed width and a changed kernel."""
    row = ROWS[0]
    model = models.create(row.name, num_classes=999)
    assert parameters(model) != row.parameters
    assert layout(model) != published_layout("shvit_s1")
    model = models.create(row.name, partial_dim=(32, 48, 80)).to("meta")
    assert macs(model, torch.empty(1, 3, 224, 224, device="meta")) / 1e6 != pytest.approx(row.macs, rel=1e-4)
    assert layout(models.create("shvit_s4")) != published_layout("shvit_s1")


def test_the_table_is_complete():
    assert {row.name for row in ROWS} == set(models.names())
    assert {row.name for row in ROWS if row.default} >= {"shvit_s1", "efficientvit_m0", "litepose_xs", "damoyolo_ns"}
    used = {row.keys for row in ROWS if row.keys}
    assert used | {"deanet_deploy"} == {p.stem for p in STATE_DICTS.glob("*.json")}


class Products(nn.Module):
    """Matrix products in every spelling."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [2, 3, 6, 8]
        y = self.linear(x)  # 2*3*6 * 8*5
        y = y @ x.new_ones(5)  # 2*3*6 * 5
        z = torch.einsum("abij,abkj->abik", x, x)  # 2*3 * 6*6*8
        z = F.scaled_dot_product_attention(x, x, x)  # 2*3 * 2*6*6*8
        return y.sum() + z.sum()


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7), 2 * 5 * 7 * 8 * 6 * 9),
        (nn.Conv2d(6, 8, (1, 3), stride=2, groups=2), (1, 6, 9, 9), 5 * 4 * 8 * 3 * 3),
        (nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1), (1, 6, 5, 7), 5 * 7 * 6 * 8 * 16),
        (nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)), (1, 6, 8, 8), 0),
        (Products(), (2, 3, 6, 8), 36 * 40 + 36 * 5 + 6 * 288 + 6 * 576),
    ],
    ids=["conv", "grouped", "transposed", "none", "products"],
)
def test_multiply_accumulates(module, shape, expected, macs):
    module.eval()
    assert macs(module, torch.ones(shape)) == expected
    assert macs(module.to("meta"), torch.ones(shape, device="meta")) == expected


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean 'shvit_s1'"):
        models.create("shvit_s11")
    with pytest.raises(InputError, match="no model named 'resnet'"):
        models.options("resnet")


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.default])
def test_unknown_options(name):
    with pytest.raises(InputError) as caught:
        models.create(name, flavour=3)
    assert caught.value.what == f"{name} has no option 'flavour'"
    for option in models.options(name):
        assert option in caught.value.fix
    assert "name" not in models.options(name)


def test_options_have_defaults():
    assert models.options("litepose_xs")["joints"] == 14
    assert models.options("repavit_tiny")["idle_ratio"] == 0.75
    assert models.options("shvit_s1")["num_classes"] == 1000
    with pytest.raises(InputError, match="did you mean 'num_classes'"):
        models.create("efficientvit_m0", num_class=10)
