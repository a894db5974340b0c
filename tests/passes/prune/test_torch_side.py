"""The cut torch module computes what the cut graph computes, can be trained, and is refused where it cannot follow."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from edgecompile import models, oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.models.randomize import randomize
from edgecompile.passes import prune
from edgecompile.passes.prune.dependency import groups
from edgecompile.passes.prune.plan import Plan
from edgecompile.passes.prune.torch_side import apply
from edgecompile.pipeline import Pipeline
from edgecompile.torch_graph import TorchGraph


class Residual(nn.Module):
    """A small ResNet: strided blocks with projections, depthwise and grouped convolutions, GroupNorm, tied weights."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.bn1 = nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24)
        self.two = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.short = nn.Conv2d(16, 24, 1, 2)
        self.grouped, self.norm = nn.Conv2d(24, 32, 3, padding=1, groups=4), nn.GroupNorm(4, 32)
        self.act = nn.PReLU(32)
        self.up = nn.ConvTranspose2d(32, 12, 2, 2)
        self.again = nn.Conv2d(12, 12, 1, bias=False)
        self.twice = nn.Conv2d(12, 12, 1, bias=False)
        self.twice.weight = self.again.weight
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.two(self.bn1(self.one(x))) + self.short(x))
        x = self.act(self.norm(self.grouped(x)))
        x = self.up(x)
        x = x + self.twice(torch.sigmoid(self.again(x)))
        return self.head(self.drop(x.mean((2, 3))))


def export(module: nn.Module, x: torch.Tensor) -> Graph:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False, input_names=["x"])
    assert program is not None
    return Graph.from_proto(program.model_proto)


def planned(module: nn.Module, x: torch.Tensor, passes: str = "clean", share: float = 0.6) -> tuple[Graph, Plan]:
    """The graph of a module, cut, and the plan of the cut."""
    graph = export(module, x)
    Pipeline.parse(passes).run(graph, strict=True, verify=False)
    found, rng = groups(graph), np.random.default_rng(0)
    keep = {g.name: np.sort(rng.permutation(g.units)[: max(1, round(share * g.units))]) for g in found.prunable}
    plan = Plan.of(graph, found, keep)
    found.cut(graph, keep)
    return graph, plan


def error(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    (a,), (b,) = (list(oracle.run(g, {"x": x.numpy()}).values()) for g in (graph, other))
    return oracle.compare(a, b).max_rel


def trains(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a few steps bring the loss down, and the outputs stay finite."""
    module.train()
    target = torch.arange(len(x)) % 5
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return bool(np.isfinite(losses).all()) and losses[-1] < losses[0]


def test_a_convolutional_module_is_cut_as_its_graph():
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    module = randomize(Residual(), 0, x)
    with torch.no_grad():
        before = module.eval()(x)
    cut, plan = planned(module, x)
    made = prune.apply(module.train(), plan, [x], form="module")
    assert isinstance(made, Residual) and made.training and module.training
    assert error(cut, export(made, x), x) <= 1e-5
    with torch.no_grad():
        assert torch.equal(before, module.eval()(x)), "the module itself is not changed"
        assert oracle.compare(before.numpy(), made.eval()(x).numpy()).max_rel > 1e-2
    assert made.stem.out_channels == made.bn.num_features == made.one.in_channels == 10  # 0.6 of 16
    assert made.two.groups == made.two.in_channels == made.one.out_channels == made.short.out_channels
    assert made.grouped.groups == made.norm.num_groups
    assert made.grouped.out_channels == made.norm.num_channels == made.act.num_parameters == made.up.in_channels
    assert made.up.out_channels == made.head.in_features and made.twice.weight is made.again.weight
    assert trains(made, torch.randn(4, 3, 16, 16))
    assert error(cut, export(made, x), x) > 1e-4, "training has moved it"


MODULES = {"repvgg_cifar": True, "shvit_cifar": False, "repavit_cifar": False, "efficientvit_cifar": False}


@pytest.mark.parametrize(
    "name", [n if n == "repvgg_cifar" else pytest.param(n, marks=pytest.mark.slow) for n in MODULES]
)
def test_the_cifar_networks_are_cut_as_their_graphs(name: str):
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = name in models.pretrained_names()
    module = models.create(name, pretrained=True) if trained else randomize(models.create(name), 0, x)
    cut, plan = planned(module, x)
    made = apply(module, plan)
    assert isinstance(made, TorchGraph) != MODULES[name]
    again = made.to_graph() if isinstance(made, TorchGraph) else export(made, x)
    (port,) = again.inputs
    port.name = "x"
    assert error(cut, again, x) <= 1e-5
    statistics = {n for n, p in made.named_parameters() if not p.requires_grad}
    assert all("running" in n for n in statistics) and bool(statistics) == (name not in ("repvgg_cifar",))
    assert trains(made, torch.randn(4, 3, 32, 32))
    if not MODULES[name]:
        with pytest.raises(InputError, match="has a width in its code or in an attribute of its own"):
            apply(module, plan, form="module")


class Merged(nn.Module):
    """A block of branches with an identity, which a merge makes one convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.three, self.one = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.three(x) + self.one(x) + self.norm(x))
        return self.head(x.mean((2, 3)))


class Computed(nn.Module):
    """Weights that are computed before they are used."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8, 3, 3, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(nn.functional.conv2d(x, self.a + self.b)).mean((2, 3)))


def test_a_plan_for_merged_layers_is_refused_where_the_branches_cannot_follow():
    x = torch.randn(1, 3, 8, 8)
    module = randomize(Merged(), 0, x)
    _, plan = planned(module, x, "clean,fold_norm,reparam", 0.5)
    with pytest.raises(InputError, match="cut before merging"):
        apply(module, plan)
    cut, plan = planned(module, x, "clean", 0.5)
    assert error(cut, export(apply(module, plan, form="module"), x), x) <= 1e-5


def test_a_plan_for_folded_norms_fits_the_module():
    x = torch.randn(1, 3, 16, 16)
    module = randomize(Residual(), 0, x)
    cut, plan = planned(module, x, "clean,fold_norm")
    assert error(cut, export(apply(module, plan, form="module"), x), x) <= 1e-5


def test_what_does_not_fit_is_refused():
    x = torch.randn(1, 3, 8, 8)
    module = Computed()
    _, plan = planned(module, x)
    with pytest.raises(InputError, match="is not used as it is"):
        apply(module, plan)
    with pytest.raises(InputError, match=r"no form 'onnx'"):
        apply(module, plan, form="onnx")
    _, plan = planned(Merged(), x)
    with pytest.raises(InputError, match=r"cannot be cut|which is not in the module's own graph"):
        apply(Residual(), plan)
