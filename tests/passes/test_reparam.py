"""Every block merges, as exported by both exporters; what forbids a merge leaves the graph as it was, and is named."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from torch import nn
from torch.nn import functional as F

from edgecompile import models, oracle, stats
from edgecompile.graph import Graph, Provenance, provenance
from edgecompile.models.randomize import randomize
from edgecompile.passes.reparam import Reparam
from edgecompile.pipeline import Context, PassResult, Pipeline

TOLERANCE = 1e-5
EXPORTERS = ("torchscript", "dynamo")


# -- helpers -----------------------------------------------------------------------------------------------------------


def export(module: nn.Module, inputs: tuple[torch.Tensor, ...], exporter: str, dynamic: tuple[int, ...] = ()) -> Graph:
    """Export in eval mode; the TorchScript exporter leaves BatchNormalization in the graph."""
    names = [f"x{i}" for i in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if exporter == "dynamo":
            shapes = tuple(dict.fromkeys(dynamic, torch.export.Dim.AUTO) for _ in inputs) if dynamic else None
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=names
            )
            assert program is not None
            return Graph.from_proto(program.model_proto)
        buffer = io.BytesIO()
        axes = {n: {a: f"{n}_{a}" for a in dynamic} for n in names} if dynamic else None
        torch.onnx.export(
            module.eval(), inputs, buffer, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, opset_version=17,  # type: ignore[arg-type]
            dynamic_axes=axes, input_names=names,
        )  # fmt: skip
    return Graph.from_proto(onnx.load_from_string(buffer.getvalue()))


def build(body: str, outputs: str, weights: dict[str, np.ndarray], inputs: str, kind: int = TensorProto.FLOAT) -> Graph:
    """A graph from nodes in ONNX text, with the outputs named."""
    proto = parser.parse_graph(f"g ({inputs}) => () {{ {body} }}")
    proto.output.extend(helper.make_tensor_value_info(name, kind, None) for name in outputs.split())
    proto.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    for node in model.graph.node:
        node.name = node.output[0]
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def merge(graph: Graph, limit: int | None = None) -> PassResult:
    """Run the pass alone: the result is valid, computes the same, and a second run finds nothing."""
    feeds = oracle.random_feeds(graph.signature().inputs, seed=1, other=8)
    signature, before = graph.signature(), oracle.run(graph, feeds)
    context = Context(limit=limit)
    context.begin("reparam")
    result = Reparam().run(graph, context)
    graph.tidy()
    graph.check(signature)
    for name, error in oracle.compare_all(before, oracle.run(graph, feeds)).items():
        assert error.max_rel <= (TOLERANCE if before[name].dtype == np.float32 else 5e-3), f"{name}: {error}"
    if limit is None:
        again = Context()
        again.begin("reparam")
        assert Reparam().run(graph, again).rewrites == ()
        graph.tidy()
    return result


def optimise(graph: Graph) -> PassResult:
    """Run the passes before this one, then this one."""
    Pipeline.parse("clean,fold_norm").run(graph, strict=True)
    return merge(graph)


def ops(graph: Graph) -> Counter[str]:
    return Counter(n.op for n in graph.nodes if n.op != "Constant")


def notes(result: PassResult) -> str:
    return "\n".join(map(str, result.notes))


def shake(module: nn.Module) -> nn.Module:
    """Random statistics and affine parameters in every norm: with the initial ones several blocks are the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_(generator=generator)
                m.running_var.uniform_(0.5, 2, generator=generator)
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.normal_(generator=generator)
    return module.eval()


# -- blocks ------------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """The sum of branches of one input, then an activation."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None):
        super().__init__()
        self.branches, self.act = nn.ModuleList(branches), act or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.act(total)


def conv_bn(cin: int, cout: int, k: int | tuple[int, int], stride: int = 1, groups: int = 1) -> nn.Sequential:
    pad = (k // 2, k // 2) if isinstance(k, int) else (k[0] // 2, k[1] // 2)
    return nn.Sequential(nn.Conv2d(cin, cout, k, stride, pad, groups=groups, bias=False), nn.BatchNorm2d(cout))


class RepResidual(nn.Module):
    """TinyNAS: a RepConv without activation, the shortcut, then the activation."""

    def __init__(self, c: int):
        super().__init__()
        self.first = nn.Sequential(conv_bn(c, c, 1), nn.ReLU())
        self.rep = Sum(conv_bn(c, c, 3), conv_bn(c, c, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.rep(self.first(x)) + x).relu()


class DiverseBranch(nn.Module):
    """DBB on an input that is padded first: k x k, 1x1 - k x k, 1x1 - average pool, 1x1."""

    def __init__(self, c: int):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(c, c, 3), nn.BatchNorm2d(c))
        self.sequence = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 3), nn.BatchNorm2d(c))
        self.pool = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.AvgPool2d(3, 1), nn.BatchNorm2d(c))
        self.point = conv_bn(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        return (self.main(padded) + self.sequence(padded) + self.pool(padded) + self.point(x)).relu()


class RepMixer(nn.Module):
    """FastViT: x + gamma * (mixer(x) - norm(x)), mixer and norm over-parameterised."""

    def __init__(self, c: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(c, 1, 1))
        self.norm = nn.BatchNorm2d(c)
        self.mixer = Sum(conv_bn(c, c, 3, groups=c), conv_bn(c, c, 1, groups=c), nn.BatchNorm2d(c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.gamma * (self.mixer(x) - self.norm(x))).relu()


class TwoScales(nn.Module):
    """LitePose: BatchNorm over transposed convolutions of two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x) + self.b(x.relu())).relu()


class Parts(nn.Module):
    """A concatenation of maps of one input, and of a tensor put together as it was."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat((self.a(x), self.b(x)), 1).relu()
        return torch.cat(torch.split(y, [2, 6], 1), 1).sigmoid()


def relu_sum(*branches: nn.Module) -> Sum:
    return Sum(*branches, act=nn.ReLU())


def depthwise(c: int) -> nn.Sequential:
    return conv_bn(c, c, 3, groups=c)


ONE = {"Conv": 1, "Relu": 1}
BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "conv_bn": (lambda: conv_bn(8, 6, 3), {"Conv": 1}),
    "bn_conv": (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)), {"Conv": 1}),
    "repvgg": (lambda: relu_sum(conv_bn(8, 8, 3), conv_bn(8, 8, 1), nn.BatchNorm2d(8)), ONE),
    "repvgg_groups": (lambda: relu_sum(conv_bn(8, 8, 3, 1, 2), conv_bn(8, 8, 1, 1, 2), nn.BatchNorm2d(8)), ONE),
    "repconv_stride_2": (lambda: relu_sum(conv_bn(8, 12, 3, 2), conv_bn(8, 12, 1, 2)), ONE),
    "repconv_residual": (lambda: RepResidual(8), {"Conv": 2, "Relu": 2, "Add": 1}),
    "deconv": (lambda: relu_sum(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))), ONE),
    "mobileone": (
        lambda: relu_sum(*(depthwise(8) for _ in range(4)), conv_bn(8, 8, 1, groups=8), nn.BatchNorm2d(8)),
        ONE,
    ),
    "mobileone_point": (lambda: relu_sum(*(conv_bn(8, 8, 1) for _ in range(4)), nn.BatchNorm2d(8)), ONE),
    "acnet": (lambda: relu_sum(conv_bn(8, 8, 3), conv_bn(8, 8, (1, 3)), conv_bn(8, 8, (3, 1))), ONE),
    "dbb": (lambda: DiverseBranch(8), ONE),
    "repmixer": (lambda: RepMixer(8), ONE),
    "replknet": (lambda: relu_sum(conv_bn(8, 8, 13, groups=8), conv_bn(8, 8, 5, groups=8)), ONE),
    "depthwise_residual": (lambda: relu_sum(nn.Identity(), depthwise(8)), ONE),
    "expand_project": (lambda: nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1), nn.ReLU()), ONE),
}


# Exporting takes most of the time: by default the second exporter shows what its graphs differ in.
BOTH = {"repvgg", "repconv_residual", "dbb"}


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        pytest.param(n, e, marks=[pytest.mark.slow] if e == "dynamo" and n not in BOTH else [])
        for n in BLOCKS
        for e in EXPORTERS
    ],
)
def test_block(name: str, exporter: str):
    torch.manual_seed(0)
    make, expected = BLOCKS[name]
    graph = export(shake(make()), (torch.randn(2, 8, 14, 14),), exporter)
    optimise(graph)
    assert ops(graph) == expected


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_transposed_convolutions_of_two_inputs_stay_two(exporter: str):
    graph = export(shake(TwoScales()), (torch.randn(1, 4, 5, 5),), exporter)
    result = optimise(graph)
    assert ops(graph) == {"ConvTranspose": 2, "Add": 1, "Relu": 2}
    assert "is not affine" in notes(result)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_transposed_convolutions_of_one_input_merge(exporter: str):
    module = relu_sum(nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.ConvTranspose2d(4, 6, 2, 2))
    graph = export(module, (torch.randn(1, 4, 5, 5),), exporter)
    merge(graph)
    assert ops(graph) == {"ConvTranspose": 1, "Relu": 1}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_concatenated_maps_of_one_input_merge(exporter: str):
    graph = export(Parts(), (torch.randn(1, 4, 6, 6),), exporter)
    optimise(graph)
    assert ops(graph) == {"Conv": 1, "Relu": 1, "Sigmoid": 1}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_dynamic_batch_and_extents(dynamic: tuple[int, ...], exporter: str):
    """What is merged for extents that are not known is right at each of them."""
    graph = export(shake(BLOCKS["repvgg"][0]()), (torch.randn(2, 8, 14, 14),), exporter, dynamic)
    before = graph.copy()
    optimise(graph)
    assert ops(graph) == ONE
    for shape in [(1, 8, 14, 14), (3, 8, 14, 14)] + [(2, 8, h, 5) for h in (1, 2, 9)] * (len(dynamic) > 1):
        feeds = {"x0": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        errors = oracle.compare_all(oracle.run(before, feeds), oracle.run(graph, feeds))
        assert max(e.max_rel for e in errors.values()) <= TOLERANCE


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_batch_norm_still_there(exporter: str):
    """Alone, the pass does what folding the norms first would have done."""
    module = shake(BLOCKS["repvgg"][0]())
    graph = export(module, (torch.randn(2, 8, 14, 14),), exporter)
    Pipeline.parse("clean").run(graph, strict=True)
    merge(graph)
    assert ops(graph) == ONE


# -- partly affine layers ----------------------------------------------------------------------------------------------


class FFN(nn.Module):
    """RePaViT: BatchNorm around a feed-forward layer of which only some channels pass the activation."""

    def __init__(self, c: int, ratio: float, form: str, act: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(c), nn.BatchNorm1d(4 * c)
        self.fc1, self.fc2, self.act = nn.Linear(c, 4 * c), nn.Linear(4 * c, c), act
        self.form, self.active = form, math.ceil(4 * c * (1 - ratio))
        mask = torch.zeros(4 * c, dtype=torch.bool)
        order = torch.randperm(4 * c) if form.endswith("permuted") else torch.arange(4 * c)
        mask[order[: self.active]] = True
        self.mask: torch.Tensor
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.fc1(self.norm1(x.transpose(1, 2)).transpose(1, 2))
        if self.form == "split":
            h = torch.cat((self.act(u[..., : self.active]), u[..., self.active :]), -1)
        elif self.form.startswith("product"):
            h = self.act(u) * self.mask.to(u.dtype) + u * (~self.mask).to(u.dtype)
        else:
            h = torch.where(self.mask, self.act(u), u)
        return self.fc2(self.norm2(h.transpose(1, 2)).transpose(1, 2)) + x


FORMS = ("where", "where_permuted", "split", "product_permuted")
IDLE = [
    pytest.param(r, f, e, marks=[pytest.mark.slow] if e == "dynamo" and (r, f) != (0.75, "where") else [])
    for r in (0.0, 0.5, 0.75, 1.0)
    for f in FORMS
    for e in EXPORTERS
]


@pytest.mark.parametrize(("ratio", "form", "exporter"), IDLE)
def test_idle_channels(ratio: float, form: str, exporter: str):
    torch.manual_seed(0)
    c = 12
    block = FFN(c, ratio, form, nn.GELU())
    graph = export(shake(nn.Sequential(block, nn.ReLU())), (torch.randn(2, 9, c),), exporter)
    optimise(graph)
    active = block.active
    # The shortcut is in the affine matrix, which there is unless every channel is active.
    parameters = 2 * 4 * c * c + 5 * c if not ratio else c * c + c + (2 * c + 1) * active
    assert stats.count(graph).parameters == parameters
    assert ops(graph)["MatMul"] == (2 if not ratio else 3 if active else 1)
    assert not ops(graph).keys() & {"Where", "Split", "Slice", "Concat", "Transpose", "BatchNormalization"}


ACTIVATIONS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "tanh_gelu": nn.GELU("tanh"), "relu6": nn.ReLU6()}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_idle_channels_with_other_activations(act: str):
    block = shake(nn.Sequential(FFN(12, 0.75, "where", ACTIVATIONS[act]), nn.ReLU()))
    graph = export(block, (torch.randn(2, 9, 12),), "torchscript")
    optimise(graph)
    assert stats.count(graph).parameters == 12 * 12 + 12 + 25 * 12


def test_idle_channels_before_norms_are_folded():
    graph = export(
        shake(nn.Sequential(FFN(12, 0.75, "where", nn.ReLU()), nn.ReLU())), (torch.randn(2, 9, 12),), "dynamo"
    )
    Pipeline.parse("clean").run(graph, strict=True)
    merge(graph)
    assert stats.count(graph).parameters == 12 * 12 + 12 + 25 * 12


class ConvFFN(nn.Module):
    """The same on images."""

    def __init__(self, seen: bool = False, over_tokens: bool = False):
        super().__init__()
        self.a, self.b, self.seen, self.over_tokens = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1), seen, over_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        u = self.a(x)
        size = (1, 1, 6, 6) if self.over_tokens else (1, 32, 1, 1)
        mask = torch.arange(math.prod(size)).reshape(size) % 4 == 0
        y = (self.b(torch.where(mask, u.tanh(), u)) + x).sigmoid()
        return (y, u) if self.seen else y


def test_idle_channels_of_an_image():
    graph = export(ConvFFN(), (torch.randn(1, 8, 6, 6),), "dynamo")
    optimise(graph)
    assert ops(graph) == {"Conv": 3, "Add": 1, "Tanh": 1, "Sigmoid": 1}


def test_idle_channels_that_are_seen_stay():
    graph = export(ConvFFN(seen=True), (torch.randn(1, 8, 6, 6),), "dynamo")
    result = optimise(graph)
    assert not result.rewrites and "has another consumer" in notes(result)


def test_mask_over_positions_stays():
    graph = export(ConvFFN(over_tokens=True), (torch.randn(1, 8, 6, 6),), "dynamo")
    result = optimise(graph)
    assert not result.rewrites and "another axis than the channels" in notes(result)


# -- what must not merge -----------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)


def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


K3, P1, B4 = normal(4, 4, 3, 3), normal(4, 4, 1, 1), normal(4)
X = "float[1,4,8,8] x"
NEGATIVES: dict[str, tuple[str, str, dict[str, np.ndarray], str, str]] = {
    "nonlinear": (
        "a = Conv<pads=[1,1,1,1]>(x, k) b = Relu(a) c = Conv(b, p) y = Add(c, x)",
        "y", {"k": K3, "p": P1}, X, "is not affine",
    ),
    "different_inputs": (
        "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(z, p) y = Add(a, b)",
        "y", {"k": K3, "p": P1}, f"{X}, float[1,4,8,8] z", "maps of different tensors",
    ),
    "strides": (
        "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, k) b = Conv(x, p) y = Add(a, b)",
        "y", {"k": K3, "p": P1}, "float[1,4,1,1] x", "differ in stride",
    ),
    "second_consumer": (
        "a = Conv(x, p) b = Conv(a, q) y = Relu(b) z = Relu(a)",
        "y z", {"p": P1, "q": normal(4, 4, 1, 1)}, X, "has a second consumer",
    ),
    "seen_outside": (
        "a = Conv(x, p) b = Conv(a, q) y = Relu(b)",
        "y a", {"p": P1, "q": normal(4, 4, 1, 1)}, X, "has a second consumer",
    ),
    "reflect": (
        "a = Pad<mode=\"reflect\">(x, n) y = Conv(a, k)",
        "y", {"k": K3, "n": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, X, "reflect padding is not zero padding",
    ),
    "bias_before_padding": (
        "a = Conv(x, p, b) y = Conv<pads=[1,1,1,1]>(a, k)",
        "y", {"p": P1, "k": K3, "b": B4}, X, "bias cannot pass",
    ),
    "bottleneck": (
        "a = Conv(x, p) y = Conv(a, k)",
        "y", {"p": normal(1, 4, 1, 1), "k": normal(4, 1, 3, 3)}, X, "would cost",
    ),
    "dilated_window": (
        "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv<pads=[4,4,4,4], dilations=[4,4]>(x, k) y = Add(a, b)",
        "y", {"k": K3}, X, "would cost",
    ),
    "average_pool_border": (
        "a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) b = Conv<pads=[1,1,1,1]>(x, k) y = Add(a, b)",
        "y", {"k": K3}, X, "weighs the border differently",
    ),
    "dynamic_channels": (
        "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Add(a, b)",
        "y", {"k": K3, "p": P1}, "float[1,C,8,8] x", "channels of 'x' is dynamic",
    ),
    "one_channel_on_all": (
        "a = Conv(x, p) b = Conv(x, q) y = Add(a, b)",
        "y", {"p": P1, "q": normal(1, 4, 1, 1)}, X, "differ in channels",
    ),
    "weight_not_constant": (
        "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Add(a, b)",
        "y", {"k": K3}, f"{X}, float[4,4,1,1] p", "is not a constant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(name: str):
    body, outputs, weights, inputs, why = NEGATIVES[name]
    graph = build(body, outputs, weights, inputs)
    before = ops(graph)
    feeds = {"C": 4} if "C" in inputs else {}
    context = Context()
    context.begin("reparam")
    values = oracle.random_feeds(graph.signature().inputs, 1, feeds)
    expected = oracle.run(graph, values)
    result = Reparam().run(graph, context)
    graph.tidy()
    assert result.rewrites == () and ops(graph) == before
    assert why in notes(result)
    for key, value in oracle.run(graph, values).items():
        np.testing.assert_array_equal(value, expected[key])


POSITIVES = {  # the positive twins: the same graphs without the obstacle
    "nonlinear": ("a = Conv<pads=[1,1,1,1]>(x, k) c = Conv(a, p) y = Add(c, x)", {"k": K3, "p": P1}),
    "different_inputs": ("a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Add(a, b)", {"k": K3, "p": P1}),
    "second_consumer": ("a = Conv(x, p) y = Conv(a, q)", {"p": P1, "q": normal(4, 4, 1, 1)}),
    "reflect": ("a = Pad(x, n) y = Conv(a, k)", {"k": K3, "n": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "bias_before_padding": ("a = Conv(x, p, b) y = Conv(a, k)", {"p": P1, "k": K3, "b": B4}),
    "bottleneck": ("a = Conv(x, p) y = Conv(a, k)", {"p": normal(8, 4, 1, 1), "k": normal(4, 8, 3, 3)}),
    "average_pool_border": (
        "a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) "
        "b = Conv<pads=[1,1,1,1]>(x, k) y = Add(a, b)", {"k": K3},
    ),
    "bias_of_a_sum": ("a = Conv<pads=[1,1,1,1]>(x, k) s = Add(a, x) y = Add(s, c)", {"k": K3, "c": normal(1, 4, 1, 1)}),
}  # fmt: skip


SUMS = {  # what is added by one node, and the convolutions left
    "three_maps": ("a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Sum(a, b, x)", 1),
    "nested": ("a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) c = Sum(b, x, x) d = Sub(a, c) y = Sum(d)", 1),
    "bias": ("a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Sum(a, bias, b)", 1),
    "one_term_is_not_affine": ("a = Conv<pads=[1,1,1,1]>(x, k) r = Relu(a) b = Conv(x, p) y = Sum(r, b, x)", 2),
    "second_consumer": ("a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) s = Sum(a, b) r = Relu(a) y = Mul(s, r)", 2),
    "stretched": ("a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, q) y = Sum(a, b)", 2),
}


@pytest.mark.parametrize("name", SUMS)
def test_sum_of_any_number(name: str):
    body, convs = SUMS[name]
    weights = {"k": K3, "p": P1, "q": normal(1, 4, 1, 1), "bias": normal(1, 4, 1, 1)}
    graph = build(body, "y", {n: w for n, w in weights.items() if re.search(rf"\b{n}\b", body)}, X)
    merge(graph)
    assert ops(graph)["Conv"] == convs
    if convs == 1:
        assert set(ops(graph)) == {"Conv"}


MOVES = {  # between a convolution and a matrix: nodes, input, and how many layers are left
    "flatten": ("b = Flatten(a) y = Gemm(b, w)", "float[3,4,1,1] x", 1),
    "reshape": ("b = Reshape(a, to) y = Gemm(b, w)", "float[3,4,1,1] x", 1),
    "squeeze": ("b = Squeeze(a, two) y = MatMul(b, w)", "float[3,4,1,1] x", 1),
    "squeeze_one_and_transpose": (
        "b = Squeeze(a, one) c = Transpose<perm=[0,2,1]>(b) y = MatMul(c, w)", "float[3,4,5,1] x", 1,
    ),
    "there_and_back": ("b = Squeeze(a, one) c = Unsqueeze(b, one) y = Conv(c, q)", "float[3,4,5,1] x", 1),
    "moved_by_an_axis": ("b = Unsqueeze(a, first) c = Squeeze(b, last) y = MatMul(c, w)", "float[3,4,5,4] x", 2),
    "mixed_with_positions": ("b = Flatten(a) y = Gemm(b, v)", "float[3,4,2,2] x", 2),
    "regrouped": ("b = Reshape(a, halves) y = MatMul(b, u)", "float[3,4,1,1] x", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_axes_of_extent_one_come_and_go(name: str):
    body, inputs, layers = MOVES[name]
    weights = {
        "p": P1, "w": normal(4, 6), "v": normal(16, 6), "u": normal(2, 6), "q": normal(4, 4, 1, 1),
        "to": np.array([-1, 4]), "halves": np.array([3, 2, 2]), "one": np.array([3]), "two": np.array([2, 3]),
        "first": np.array([0]), "last": np.array([0]),
    }  # fmt: skip
    graph = build(f"a = Conv(x, p) {body}", "y", weights, inputs)
    shape = oracle.run(graph, oracle.random_feeds(graph.signature().inputs, 1))["y"].shape
    merge(graph)
    found = ops(graph)
    assert sum(found[op] for op in ("Conv", "Gemm", "MatMul")) == layers
    assert oracle.run(graph, oracle.random_feeds(graph.signature().inputs, 1))["y"].shape == shape


def test_squeeze_of_an_old_opset_keeps_its_attribute():
    """Up to opset 12 the axes are an attribute of Squeeze, after it an input."""
    nodes = [
        helper.make_node("Conv", ["x", "p"], ["a"]),
        helper.make_node("Squeeze", ["a"], ["b"], axes=[2, 3]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in (("x", [3, 4, 1, 1]), ("y", [3, 6]))]
    weights = [numpy_helper.from_array(v, n) for n, v in (("p", P1), ("w", normal(4, 6)))]
    proto = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    graph = Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 11)], ir_version=7))
    merge(graph)
    assert ops(graph) == {"Conv": 1, "Squeeze": 1}


@pytest.mark.parametrize("name", POSITIVES)
def test_twin_merges(name: str):
    body, weights = POSITIVES[name]
    graph = build(body, "y", weights, X)
    merge(graph)
    assert ops(graph) == {"Conv": 1}


def test_shared_weight_is_left_to_the_others():
    graph = build(
        "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) c = Add(a, b) y = Relu(c) z = Conv<pads=[1,1,1,1]>(y, k)",
        "z", {"k": K3, "p": P1}, X,
    )  # fmt: skip
    merge(graph)
    assert ops(graph) == {"Conv": 2, "Relu": 1}
    np.testing.assert_array_equal(graph.constants()["k"], K3)


@pytest.mark.parametrize(("peak", "merged"), [(1e4, True), (6e4, False)])
def test_overflow_in_half_precision(peak: float, merged: bool):
    weights = {n: np.full((2, 2, 1, 1), peak, np.float16) for n in "kp"}
    graph = build(
        "a = Conv(x, k) b = Conv(x, p) y = Add(a, b)", "y", weights, "float16[1,2,1,1] x", TensorProto.FLOAT16
    )
    context = Context()
    context.begin("reparam")
    result = Reparam().run(graph, context)
    assert bool(result.rewrites) == merged
    assert merged or "overflow float16" in notes(result)


def test_half_precision_merges():
    weights = {"k": normal(4, 4, 3, 3, dtype=np.float16), "p": normal(4, 4, 1, 1, dtype=np.float16)}
    body = "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Add(a, b)"
    graph = build(body, "y", weights, "float16[1,4,8,8] x", TensorProto.FLOAT16)
    merge(graph)
    assert ops(graph) == {"Conv": 1} and all(v.dtype == np.float16 for v in graph.constants().values())


def test_a_constant_that_stretches_a_sum_stays():
    weights = {"p": normal(1, 4, 3, 3), "q": normal(1, 4, 1, 1), "c": normal(1, 4, 1, 1)}
    graph = build("a = Conv<pads=[1,1,1,1]>(x, p) b = Conv(x, q) s = Add(a, b) y = Add(s, c)", "y", weights, X)
    merge(graph)
    assert ops(graph) == {"Conv": 1, "Add": 1}


def test_weights_of_two_terms_of_one_tensor_and_itself():
    graph = build("a = Add(x, x) b = Conv(x, p) y = Add(a, b)", "y", {"p": P1}, X)
    merge(graph)
    assert ops(graph) == {"Conv": 1}


def test_gemm_chain_and_subtraction():
    weights = {"w": normal(16, 6), "v": normal(6, 16), "b": normal(6)}
    graph = build("a = Gemm<transB=1>(x, w) c = Gemm<transB=1>(a, v, b) y = Sub(x, c)", "y", weights, "float[3,6] x")
    merge(graph)
    assert ops(graph) == {"Gemm": 1}


def test_output_names_survive():
    graph = build("a = Conv(x, p) b = Add(x, a) y = Identity(b)", "b y", {"p": P1}, X)
    merge(graph)
    assert [t.name for t in graph.outputs] == ["b", "y"] and ops(graph)["Add"] == 0


def test_limit_stops_before_a_rewrite_and_provenance_is_kept():
    block = nn.Sequential(relu_sum(conv_bn(8, 8, 3), conv_bn(8, 8, 1)), relu_sum(conv_bn(8, 8, 3), conv_bn(8, 8, 1)))
    graph = export(shake(block), (torch.randn(1, 8, 6, 6),), "torchscript")
    Pipeline.parse("clean,fold_norm").run(graph, strict=True)
    assert len(merge(graph.copy(), limit=0).rewrites) == 0
    result = merge(graph, limit=1)
    assert len(result.rewrites) == 1 and ops(graph) == {"Conv": 3, "Relu": 2, "Add": 1}
    assert result.rewrites[0].what == "Conv3x3 + Conv1x1 -> Conv3x3, -10.0 % MACs, error 3e-8"
    assert result.rewrites[0].where == "0.branches"
    merged = next(n for n in graph.nodes if n.op == "Conv")
    assert {"0.branches.0.0", "0.branches.1.0"} <= set(provenance(merged).modules)


def told(weights: dict[str, np.ndarray], modules: dict[str, str], body: str = "", kind: int = TensorProto.FLOAT):
    """The only rewrite of a sum of two convolutions whose nodes are in these modules."""
    inputs = f"float{'16' if kind == TensorProto.FLOAT16 else ''}[1,4,8,8] x"
    body = body or "a = Conv<pads=[1,1,1,1]>(x, k) b = Conv(x, p) y = Add(a, b)"
    graph = build(body, "y", weights, inputs, kind)
    for node in graph.nodes:
        node.provenance = Provenance((modules[node.name],) if node.name in modules else ())  # type: ignore[attr-defined]
    context = Context()
    context.begin("reparam")
    (rewrite,) = Reparam().run(graph, context).rewrites
    conv = next(n for n in graph.nodes if n.op == "Conv")
    return rewrite, graph.constant(conv.inputs[1])


@pytest.mark.parametrize(
    ("modules", "place"),
    [
        ({"a": "neck.rbr.dense.conv", "b": "neck.rbr.point.conv", "y": "neck"}, "neck.rbr"),
        ({"a": "neck.rbr.conv", "b": "neck.rbr.conv"}, "neck.rbr.conv"),
        ({"a": "neck.rbr1.conv", "b": "neck.rbr2.conv"}, "neck"),
        ({"a": "neck.conv", "b": "head.conv"}, "y (Add)"),
        ({}, "y (Add)"),
    ],
)
def test_place_is_the_innermost_common_module(modules: dict[str, str], place: str):
    rewrite, _ = told({"k": K3, "p": P1}, modules)
    assert rewrite.where == place


def test_shortcut_is_placed_with_its_addition():
    body = "a = Conv<pads=[1,1,1,1]>(x, k) y = Add(a, x)"
    rewrite, _ = told({"k": K3}, {"a": "block.mixer.conv", "y": "block"}, body)
    assert rewrite.where == "block" and rewrite.what.startswith("Conv3x3 + identity -> Conv3x3, +0.0 % MACs")


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_error_is_what_rounding_did_to_the_weights(kind: type):
    dense, point = normal(4, 4, 3, 3, dtype=kind), normal(4, 4, 1, 1, dtype=kind)
    onnx_kind = TensorProto.FLOAT if kind is np.float32 else TensorProto.FLOAT16
    rewrite, merged = told({"k": dense, "p": point}, {}, kind=onnx_kind)
    assert merged is not None
    exact = dense.astype(np.float64)
    exact[:, :, 1:2, 1:2] += point
    error = np.abs(merged - exact).max() / np.abs(exact).max()
    assert error > 0 and rewrite.what.endswith(f"error {error:.0e}".replace("e-0", "e-"))


def test_error_of_a_merge_without_rounding_is_zero():
    powers = {"k": np.full((4, 4, 3, 3), 0.5, np.float32), "p": np.full((4, 4, 1, 1), 0.25, np.float32)}
    assert told(powers, {})[0].what == "Conv3x3 + Conv1x1 -> Conv3x3, -10.0 % MACs, error 0"


# -- random graphs -----------------------------------------------------------------------------------------------------


class Random:
    """A seeded network of sums of chains; ``merged`` counts the sums that are one convolution."""

    C = 4

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.merged = self.left = 0

    def node(self, op: str, inputs: list[str], **attrs) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attrs))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = (self.rng.standard_normal(shape) / np.sqrt(max(1, math.prod(shape[1:])))).astype(
            np.float32
        )
        return name

    def conv(self, x: str, k: int, groups: int = 1, bias: bool = True) -> str:
        inputs = [x, self.weight(self.C, self.C // groups, k, k)] + ([self.weight(self.C)] if bias else [])
        return self.node("Conv", inputs, pads=[k // 2] * 4, group=groups)

    def chain(self, x: str, k: int) -> str:
        """An affine chain whose window is at most k."""
        kinds: list[Callable[[], str]] = [
            lambda: self.conv(x, 1),
            lambda: self.conv(x, k),
            lambda: self.conv(x, k, self.C),
            lambda: self.conv(x, k, 2),
            lambda: self.conv(self.conv(x, 1, bias=False), k),
            lambda: self.conv(self.conv(x, k), 1),
            lambda: self.node("Mul", [x, self.weight(1, self.C, 1, 1)]),
            lambda: self.node("Add", [self.conv(x, 3), self.weight(self.C, 1, 1)]),
            lambda: self.node("AveragePool", [x], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
            lambda: self.conv(self.conv(x, k, 2), 1, self.C),
        ]
        return kinds[self.rng.integers(len(kinds))]()

    def stage(self, x: str) -> str:
        k = int(self.rng.choice([3, 5]))
        terms = [self.conv(x, k)] + [self.chain(x, k) for _ in range(self.rng.integers(1, 4))]
        if self.rng.random() < 0.5:
            terms.append(x)
        if self.rng.random() < 0.3:  # an obstacle: the whole sum cannot be one convolution
            inner = self.node(str(self.rng.choice(["Relu", "Tanh"])), [self.conv(x, 1)])
            terms.append(self.conv(inner, 1))
            self.left += 1
        else:
            self.merged += 1
        self.rng.shuffle(terms)
        while len(terms) > 1:  # a random tree of additions
            i = int(self.rng.integers(len(terms) - 1))
            terms[i : i + 2] = [self.node("Sub" if self.rng.random() < 0.2 else "Add", terms[i : i + 2])]
        return self.node("Sigmoid", terms)

    def graph(self) -> Graph:
        x = "x"
        for _ in range(self.rng.integers(1, 4)):
            x = self.stage(x)
        ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, self.C, 9, 7]) for n in ("x", x)]
        constants = [numpy_helper.from_array(v, n) for n, v in self.weights.items()]
        proto = helper.make_graph(self.nodes, "g", ports[:1], ports[1:], constants)
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return Graph.from_proto(model)


def random_networks(seeds: range) -> Iterator[tuple[int, Random, Graph]]:
    for seed in seeds:
        network = Random(seed)
        yield seed, network, network.graph()


def check_random(seeds: range) -> None:
    found = wanted = 0
    for seed, network, graph in random_networks(seeds):
        try:
            merge(graph)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        # One convolution per affine sum; a sum with an obstacle keeps three: two of the obstacle, one of all others.
        left = ops(graph)["Conv"] - 3 * network.left
        wanted += network.merged
        found += max(0, network.merged - max(0, left - network.merged))
        assert left >= network.merged
    print(f"seeds {seeds.start}..{seeds.stop - 1}: {found} of {wanted} affine sums became one convolution")
    assert found >= 0.99 * wanted


def test_random_networks():
    check_random(range(200))


@pytest.mark.slow
def test_many_random_networks():
    check_random(range(200, 2000))


# -- size --------------------------------------------------------------------------------------------------------------


def tower(blocks: int) -> Graph:
    """Five nodes per block: a RepVGG block with its shortcut."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for i in range(blocks):
        for name, k in (("k", 3), ("p", 1)):
            weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (4, 4, k, k)).astype(np.float32), f"{name}{i}"))
        nodes += [
            helper.make_node("Conv", [x, f"k{i}"], [f"a{i}"], pads=[1] * 4),
            helper.make_node("Conv", [x, f"p{i}"], [f"b{i}"]),
            helper.make_node("Add", [f"a{i}", f"b{i}"], [f"s{i}"]),
            helper.make_node("Add", [f"s{i}", x], [f"t{i}"]),
            helper.make_node("Relu", [f"t{i}"], [f"r{i}"]),
        ]
        x = f"r{i}"
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in ("x", x)]
    proto = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    return Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(("nodes", "seconds"), [(2_000, 6.0), pytest.param(20_000, 60.0, marks=pytest.mark.slow)])
def test_time_is_linear(nodes: int, seconds: float):
    graph, context = tower(nodes // 5), Context()
    context.begin("reparam")
    start = time.process_time()
    result = Reparam().run(graph, context)
    graph.tidy()
    assert time.process_time() - start < seconds
    assert len(result.rewrites) == nodes // 5 and len(graph.nodes) == 2 * nodes // 5


def wide(terms: int, inputs: int) -> Graph:
    """A sum of 1x1 convolutions of several tensors, in turn."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Tanh", ["x"], [f"t{i}"]) for i in range(inputs)]
    weights = []
    for i in range(terms):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (4, 4, 1, 1)).astype(np.float32), f"k{i}"))
        nodes.append(helper.make_node("Conv", [f"t{i % inputs}", f"k{i}"], [f"c{i}"]))
    nodes.append(helper.make_node("Sum", [f"c{i}" for i in range(terms)], ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in "xy"]
    proto = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    return Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_time_is_linear_in_the_terms_of_a_sum():
    """Pairs of terms of the same tensor: each pair is a rewrite."""
    seconds = []
    for terms in (125, 1000):
        best = []
        for _ in range(3):
            graph, context = wide(terms, terms // 2), Context()
            context.begin("reparam")
            gc.collect()
            start = time.process_time()
            result = Reparam().run(graph, context)
            best.append(time.process_time() - start)
            assert len(result.rewrites) == terms // 2
        seconds.append(min(best))
    assert seconds[1] < 24 * seconds[0], seconds  # 8 if linear, 64 if quadratic


@pytest.mark.parametrize("limit", [0, 1, 3, 4])
def test_each_group_of_a_sum_is_a_rewrite_of_its_own(limit: int):
    graph = wide(8, 4)
    assert len(merge(graph, limit).rewrites) == limit
    assert ops(graph)["Conv"] == 8 - limit


# -- the zoo -----------------------------------------------------------------------------------------------------------

# Input extent, parameters of the authors' fused form, multiply-accumulates of their deployed form.
ZOO = {
    "shvit_s1": (224, 6_308_660, 241_321_000),
    "shvit_s2": (224, 11_453_508, 365_396_000),
    "shvit_s3": (224, 14_210_010, 600_571_000),
    "shvit_s4": (256, 16_546_248, 986_218_000),
    "efficientvit_m0": (224, 2_334_916, 79_195_000),
    "efficientvit_m1": (224, 2_964_256, 167_053_000),
    "efficientvit_m2": (224, 4_168_338, 201_037_000),
    "efficientvit_m3": (224, 6_875_890, 262_663_000),
    "efficientvit_m4": (224, 8_776_340, 299_310_000),
    "efficientvit_m5": (224, 12_436_260, 521_584_000),
    "litepose_xs": (256, 1_654_944, 882_950_000),
    "litepose_s": (448, 2_705_904, 3_614_150_000),
    "litepose_m": (448, 3_503_040, 5_263_750_000),
    "litepose_l": (512, 5_697_736, 9_962_050_000),
    "damoyolo_t": (640, 8_473_911, 9_004_850_000),
    "damoyolo_s": (640, 16_242_751, 18_808_650_000),
    "damoyolo_m": (640, 28_164_063, 30_811_550_000),
    "damoyolo_l": (640, 42_039_711, 48_660_000_000),
    "damoyolo_ns": (416, 1_392_299, 748_950_000),
    "damoyolo_nm": (416, 2_688_371, 1_791_050_000),
    "damoyolo_nl": (416, 5_659_451, 2_954_550_000),
    "deanet": (256, 3_653_377, 32_224_950_000),
    "repavit_tiny": (224, 3_494_248, 818_050_000),
    "repavit_small": (224, 13_180_648, 2_856_050_000),
    "repavit_base": (224, 51_132_904, 10_592_150_000),
    "repaswin_tiny": (224, 17_483_554, 2_756_550_000),
}
DEFAULT = ("shvit_s1", "repavit_tiny")


LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LayerNormalization", "InstanceNormalization"}


def learned(graph: Graph) -> int:
    """Elements of the constants that are parameters: weights and vectors on the channels.

    Not: tables that a model computes from its parameters (relative position biases per pair of tokens) or from nothing
    (anchor points, bins of a distribution), which an exporter writes out.
    """
    found = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and np.dtype(tensor.dtype).kind == "f":
                vector = sum(d != 1 for d in tensor.shape) == 1 and node.op in ("Add", "Sub", "Mul", "Div")
                column = len(tensor.shape) == 2 and tensor.shape[1] == 1
                if (node.op in LAYERS or vector) and not column:
                    found[id(tensor)] = math.prod(tensor.shape)
    return sum(found.values())


@pytest.mark.parametrize(
    ("name", "exporter"),
    [
        pytest.param(n, e, marks=[] if n in DEFAULT and (e, n) != ("dynamo", "repavit_tiny") else [pytest.mark.slow])
        for n, e in itertools.product(ZOO, EXPORTERS)
    ],
)
def test_zoo(name: str, exporter: str):
    size, parameters, macs = ZOO[name]
    torch.manual_seed(0)
    model = models.create(name, **({"joints": 14} if name.startswith("litepose") else {}))
    x = torch.randn(1, 3, size, size)
    randomize(model, 0, x)
    graph = export(model, (x,), exporter)
    feeds = {graph.inputs[0].name: x.numpy()}
    reference = oracle.run(graph, feeds)
    trace = Pipeline.parse("clean,fold_norm,reparam").run(graph, [feeds], strict=True)
    errors = oracle.compare_all(reference, oracle.run(graph, feeds))
    assert max(e.max_rel for e in errors.values()) <= (1e-4 if name.startswith("damoyolo") else TOLERANCE)
    after = trace.steps[-1].after
    assert learned(graph) <= parameters and after.macs is not None and after.macs <= macs
    assert "BatchNormalization" not in ops(graph)
    if name.startswith("repavit"):
        assert after.parameters == parameters
