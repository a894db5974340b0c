"""Each pattern folds, in graphs of both exporters; each condition that forbids it leaves the graph as it was."""

from __future__ import annotations

import io
import itertools
import logging
import math
import time
import warnings
from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, parser
from torch import nn

from edgecompile import models, oracle
from edgecompile.graph import Graph, provenance
from edgecompile.models.randomize import randomize
from edgecompile.passes.clean import Clean
from edgecompile.passes.fold_norm import FoldNorm
from edgecompile.pipeline import Context, PassResult, Pipeline, bisect

TOLERANCE = 1e-5
EXPORTERS = ("torchscript", "dynamo")


# -- helpers -----------------------------------------------------------------------------------------------------------


def export(module: nn.Module, inputs: tuple[torch.Tensor, ...], exporter: str, unfused: bool = False) -> Graph:
    """Export in eval mode; BatchNormalization is left in the graph by TorchScript, and by dynamo if ``unfused``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        if exporter == "dynamo":
            program = torch.onnx.export(module.eval(), inputs, dynamo=True, optimize=not unfused, verbose=False)
            assert program is not None
            return Graph.from_proto(program.model_proto)
        buffer = io.BytesIO()
        preserve = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(module.eval(), inputs, buffer, dynamo=False, training=preserve, opset_version=17)  # type: ignore[arg-type]
    return Graph.from_proto(onnx.load_from_string(buffer.getvalue()))


def build(
    body: str,
    outputs: str,
    weights: dict[str, np.ndarray],
    inputs: str = "float[2,4,6,6] x",
    opset: int = 20,
    kind: int = TensorProto.FLOAT,
) -> Graph:
    """A graph from nodes in ONNX text; outputs given by name have their shapes inferred."""
    typed = outputs if "[" in outputs else ""
    proto = parser.parse_graph(f"g ({inputs}) => ({typed}) {{ {body} }}")
    if not typed:
        proto.output.extend(helper.make_tensor_value_info(name, kind, None) for name in outputs.split())
    proto.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10)
    for node in model.graph.node:
        node.name = node.output[0]
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def fold(graph: Graph, limit: int | None = None) -> PassResult:
    """Run the pass as the pipeline does: the result is valid, computes the same, and a second run finds nothing."""
    feeds = oracle.random_feeds(graph.signature().inputs, seed=1)
    signature, before = graph.signature(), oracle.run(graph, feeds)
    context = Context(limit=limit)
    context.begin("fold_norm")
    result = FoldNorm().run(graph, context)
    graph.tidy()
    graph.check(signature)
    for name, error in oracle.compare_all(before, oracle.run(graph, feeds)).items():
        assert error.max_rel <= TOLERANCE, f"{name}: {error}"
    if limit is None:
        again = Context()
        again.begin("fold_norm")
        assert FoldNorm().run(graph, again).rewrites == ()
        graph.tidy()
    return result


def ops(graph: Graph) -> Counter[str]:
    return Counter(n.op for n in graph.nodes if n.op != "Constant")


RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bn_weights(channels: int, name: str = "") -> dict[str, np.ndarray]:
    """Random parameters of a BatchNormalization, for the text ``{BN}``."""
    values = {"gamma": normal(channels), "beta": normal(channels), "mean": normal(channels)}
    values["var"] = RNG.uniform(0.5, 2, channels).astype(np.float32)
    return {name + k: v for k, v in values.items()}


BN = "gamma, beta, mean, var"


# -- patterns, exported from torch -------------------------------------------------------------------------------------


class ConvSum(nn.Module):
    """BN over the sum (or difference) of two convolutions, transposed or not."""

    def __init__(self, transposed: bool, groups: int = 1, minus: bool = False):
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.a = kind(4, 6, 4, 2, 1, groups=groups)
        self.b = kind(4, 6, 4, 2, 1, groups=groups)
        self.norm, self.minus = nn.BatchNorm2d(6), minus

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x.flip(1))
        return self.norm(a - b if self.minus else a + b).relu()


class TokenFFN(nn.Module):
    """BatchNorm1d over tokens between Transposes, before and after the activation (RePaViT)."""

    def __init__(self, activation: bool):
        super().__init__()
        self.norm1, self.fc1 = nn.BatchNorm1d(6), nn.Linear(6, 8)
        self.norm2, self.fc2 = nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc1(self.norm1(x.transpose(1, 2)).transpose(1, 2))
        if self.activation:
            y = y.sigmoid()
        return self.fc2(self.norm2(y.transpose(1, 2)).transpose(1, 2)) + x


class Attention(nn.Module):
    """Single-input attention; ``form`` says where the scale is and how q, k and v are cut from one projection."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.qkv, self.proj = form, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x)
        if "chunk" in self.form:
            q, k, v = (t.reshape(b, n, 2, 4).transpose(1, 2) for t in qkv.chunk(3, -1))
        elif "slice" in self.form:
            q, k, v = (qkv[..., i : i + 8].reshape(b, n, 2, 4).transpose(1, 2) for i in (0, 8, 16))
        else:
            q, k, v = qkv.reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if "early" in self.form:
            attention = (q * 0.3) @ k.transpose(-2, -1)
        elif "divided" in self.form:
            attention = q @ k.transpose(-2, -1) / math.sqrt(5)
        else:
            attention = (q @ k.transpose(-2, -1)) * 0.3
        return self.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class ConvAttention(nn.Module):
    """GroupNorm, 1x1 projection with BN, and Split into unequal parts (SHViT)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 6)
        self.qkv, self.bn = nn.Conv2d(6, 4 + 4 + 6, 1), nn.BatchNorm2d(14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.flatten(2) for t in self.bn(self.qkv(self.norm(x))).split([4, 4, 6], dim=1))
        attention = ((q.transpose(1, 2) @ k) * 0.25).softmax(-1)
        return (v @ attention.transpose(1, 2)).reshape(x.shape)


class NormThenLinear(nn.Module):
    """A norm that stays, before several linear maps."""

    def __init__(self, norm: nn.Module, *linear: nn.Module):
        super().__init__()
        self.norm, self.linear = norm, nn.ModuleList(linear)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.norm(x)
        return [f(y) for f in self.linear]


class Parts(nn.Module):
    """BN over a concatenation of convolutions and transposed tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.cat([self.a(x), self.b(x)], 1)).sigmoid()


class Lambda(nn.Module):
    """A function around named modules."""

    def __init__(self, function, **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
        self.gamma, self.beta = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.zeros(6, 1, 1))
        self.tokens = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def sequence(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


IMAGE, TOKENS = (2, 4, 6, 6), (2, 5, 6)

# name: module, input shape, ops that must be gone, what rewrites are called
PATTERNS = {
    "conv": (
        lambda: sequence(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into Conv"},
    ),
    "grouped strided dilated conv": (
        lambda: sequence(nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2), nn.BatchNorm2d(6), nn.Sigmoid()),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into Conv"},
    ),
    "depthwise conv1d": (
        lambda: sequence(nn.Conv1d(6, 6, 3, groups=6), nn.BatchNorm1d(6), nn.ReLU()),
        (2, 6, 9), {"BatchNormalization"}, {"BatchNormalization into Conv"},
    ),
    "grouped transposed conv": (
        lambda: sequence(nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into ConvTranspose"},
    ),
    "sum of convs": (
        lambda: ConvSum(False), IMAGE, {"BatchNormalization"}, {"BatchNormalization into Conv"},
    ),
    "difference of convs": (
        lambda: ConvSum(False, minus=True), IMAGE, {"BatchNormalization"}, {"BatchNormalization into Conv"},
    ),
    "sum of transposed convs": (
        lambda: ConvSum(True, 2), IMAGE, {"BatchNormalization"}, {"BatchNormalization into ConvTranspose"},
    ),
    "concatenated convs": (
        Parts, IMAGE, {"BatchNormalization"}, {"BatchNormalization into Conv"},
    ),
    "linear": (
        lambda: sequence(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()),
        (3, 6), {"BatchNormalization"}, {"BatchNormalization into Gemm"},
    ),
    "head": (
        lambda: sequence(nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 8)),
        (3, 6), {"BatchNormalization"}, {"BatchNormalization into the next Gemm"},
    ),
    "pooled head": (
        lambda: sequence(nn.ReLU(), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into the next Gemm"},
    ),
    "flattened head": (
        lambda: sequence(nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into the next Gemm"},
    ),
    "BN before an unpadded grouped conv": (
        lambda: sequence(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False)),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into the next Conv"},
    ),
    "BN before a 1x1 transposed conv": (
        lambda: sequence(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)),
        IMAGE, {"BatchNormalization"}, {"BatchNormalization into the next ConvTranspose"},
    ),
    "tokens": (
        lambda: TokenFFN(True), TOKENS, {"BatchNormalization"}, {"BatchNormalization into the next MatMul and Add"},
    ),
    "tokens without activation": (
        lambda: TokenFFN(False), TOKENS, {"BatchNormalization"},
        {"BatchNormalization into the next MatMul and Add", "BatchNormalization into Add and MatMul",
         "Add into the next Add"},
    ),
    "group norm, projection and scale": (
        ConvAttention, (2, 6, 3, 3), {"BatchNormalization", "Mul", "Add"},
        {"Mul and Add into the next Conv", "BatchNormalization into Conv", "Mul into Conv"},
    ),
    "layer norm before one linear": (
        lambda: NormThenLinear(nn.LayerNorm(6), nn.Linear(6, 9)), TOKENS, set(),
        {"gamma and beta into the next MatMul and Add"},
    ),
    "layer norm before three linear": (
        lambda: NormThenLinear(nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(6, 2), nn.Linear(6, 3)), TOKENS, set(),
        {"gamma and beta into the next MatMul and Add"},
    ),
    "instance norm before conv": (
        lambda: NormThenLinear(nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 6, 3)), IMAGE, set(),
        {"gamma and beta into the next Conv"},
    ),
    **{
        f"attention, {form}": (
            lambda form=form: Attention(form), (2, 5, 8), {"Mul", "Div"},
            {f"{'Div' if 'divided' in form else 'Mul'} into Add and MatMul"},
        )
        for form in ("unbind late", "unbind early", "chunk late", "chunk early", "slice early", "slice divided")
    },
    "layer scale": (
        lambda: Lambda(lambda m, x: m.conv(x) * m.gamma + x, conv=nn.Conv2d(6, 6, 3, padding=1)),
        (2, 6, 4, 4), {"Mul"}, {"Mul into Conv"},
    ),
    "layer scale on tokens": (
        lambda: Lambda(lambda m, x: m.fc(x) * m.tokens + x, fc=nn.Linear(6, 6)), TOKENS, {"Mul"},
        {"Add and Mul into MatMul"},
    ),
    "normalised image, unpadded": (
        lambda: Lambda(lambda m, x: m.conv((x.sigmoid() - m.gamma) / (m.beta + 2)), conv=nn.Conv2d(6, 3, 3)),
        (2, 6, 5, 5), {"Sub", "Div"}, {"Sub and Div into the next Conv"},
    ),
    "normalised image, padded": (
        lambda: Lambda(lambda m, x: m.conv((x.sigmoid() - m.gamma) / (m.beta + 2)), conv=nn.Conv2d(6, 3, 3, padding=1)),
        (2, 6, 5, 5), {"Div"}, {"Div into the next Conv"},
    ),
    "chain that stays": (
        lambda: Lambda(lambda m, x: (((x.sigmoid() + m.gamma) * m.beta - 2) * 3 + m.beta).sigmoid()),
        (2, 6, 5, 5), set(), {"chain of 5 into Mul and Add"},
    ),
}  # fmt: skip

# Where dynamo's own optimiser would fold the BatchNormalization before we see it.
UNFUSED = {
    "conv", "grouped strided dilated conv", "depthwise conv1d", "grouped transposed conv", "concatenated convs",
    "linear",
}  # fmt: skip

PREFUSED = "group norm, projection and scale"  # the form without its own folding has SplitToSequence


def same(graph: Graph, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        wanted = module(*inputs)
    wanted = wanted if isinstance(wanted, list | tuple) else [wanted]
    names = [t.name for t in graph.inputs]
    found = oracle.run(graph, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
    for reference, value in zip(wanted, found.values(), strict=True):
        assert oracle.compare(reference.numpy(), value).max_rel <= TOLERANCE


def case(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The module of a pattern with random weights and statistics, and an input."""
    create, shape, *_ = PATTERNS[name]
    return randomize(create()).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Together(nn.Module):
    """Many patterns side by side: one run of the slow exporter."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor | list[torch.Tensor]]:
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


@pytest.fixture(scope="module")
def dynamo_graphs() -> dict[str, Graph]:
    """The graph of each pattern, cut out of one export with and one without dynamo's own folding."""
    graphs = {}
    for unfused in (False, True):
        names = [n for n in PATTERNS if (n in UNFUSED) == unfused]
        parts, inputs = zip(*map(case, names), strict=True)
        whole = export(Together(list(parts)), inputs, "dynamo", unfused)
        outputs = iter(range(len(whole.outputs)))
        for i, (name, part, x) in enumerate(zip(names, parts, inputs, strict=True)):
            found = part(x)
            count = len(found) if isinstance(found, list) else 1
            graph = whole.copy()
            graph.inputs = [graph.inputs[i]]
            graph.outputs = [graph.outputs[o] for o in itertools.islice(outputs, count)]
            graph.tidy()
            graphs[name] = graph
    return graphs


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name: str, exporter: str, dynamo_graphs: dict[str, Graph]) -> None:
    _, _, gone, whats = PATTERNS[name]
    module, x = case(name)
    whats = whats - {"BatchNormalization into Conv"} if (name, exporter) == (PREFUSED, "dynamo") else whats
    graph = dynamo_graphs[name].copy() if exporter == "dynamo" else export(module, (x,), exporter)
    context = Context()
    context.begin("clean")
    Clean().run(graph, context)
    graph.tidy()
    nodes = len(graph.nodes)
    assert gone & set(ops(graph)) or not gone, "the exporter has folded it already: the test proves nothing"
    result = fold(graph)
    assert {r.what for r in result.rewrites} == whats
    assert not gone & set(ops(graph))
    assert len(graph.nodes) < nodes or not gone
    same(graph, module, (x,))


@pytest.mark.parametrize("norm", ["LayerNormalization", "InstanceNormalization"])
def test_norm_keeps_ones_and_zeros(norm: str) -> None:
    create, shape, *_ = PATTERNS["layer norm before three linear" if norm[0] == "L" else "instance norm before conv"]
    graph = export(randomize(create()), (torch.randn(shape),), "torchscript")
    fold(graph)
    (node,) = (n for n in graph.nodes if n.op == norm)
    assert (graph.constant(node.inputs[1]) == 1).all()
    assert (graph.constant(node.inputs[2]) == 0).all()


def test_bias_goes_to_one_term_of_a_sum() -> None:
    module = randomize(ConvSum(True))
    graph = export(module, (torch.randn(IMAGE),), "torchscript")
    before = [graph.constant(n.inputs[2]) for n in graph.nodes if n.op == "ConvTranspose"]
    norm = module.norm
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    shift = norm.bias.detach().numpy() - norm.running_mean.numpy() * scale
    fold(graph)
    after = [graph.constant(n.inputs[2]) for n in graph.nodes if n.op == "ConvTranspose"]
    shifted = [np.abs(b - a * scale).max() > 1e-3 for a, b in zip(before, after, strict=True)]
    assert sorted(shifted) == [False, True]
    np.testing.assert_allclose(sum(after), sum(before) * scale + shift, rtol=1e-5, atol=1e-6)


def test_power_of_two_scale_is_exact() -> None:
    """0.25 only moves exponents, so the q rows are exactly a quarter and all others untouched."""
    module = randomize(ConvAttention())
    graph = export(module, (torch.randn(2, 6, 3, 3),), "dynamo")
    (conv,) = (n for n in graph.nodes if n.op == "Conv")
    plain, whole = graph.copy(), graph
    for node in plain.nodes:
        if node.op == "Mul" and any(np.size(c := plain.constant(t)) == 1 and c is not None for t in node.inputs):
            node.outputs[0].outputs[0].inputs[0] = node.inputs[0]
    plain.tidy()
    fold(plain)
    fold(whole)
    (a,), (b,) = ([g.constant(n.inputs[1]) for n in g.nodes if n.op == "Conv"] for g in (plain, whole))
    assert a is not None and b is not None and conv.op == "Conv"
    np.testing.assert_array_equal(b[:4], a[:4] * np.float32(0.25))
    np.testing.assert_array_equal(b[4:], a[4:])


# -- the same in text: corners that torch does not export --------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "weight", "bias"),
    [
        ("", (6, 5), (5,)),
        ("<transB=1>", (5, 6), (5,)),
        ("<transA=1>", (3, 5), (6, 5)),
        ("<alpha=0.5, beta=2.0>", (6, 5), (1, 5)),
        ("<transB=1, alpha=3.0, beta=0.25>", (5, 6), (3, 1)),
        ("<transB=1, beta=0.25>", (5, 6), ()),
        ("<alpha=0.5>", (6, 5), None),
    ],
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_gemm_forms(attributes: str, weight: tuple[int, ...], bias: tuple[int, ...] | None, side: str) -> None:
    weights = {"w": normal(*weight)} | ({} if bias is None else {"b": normal(*bias)})
    gemm = f"Gemm{attributes}({{}}, w{'' if bias is None else ', b'})"
    if side == "after":
        body = f"a = {gemm.format('x')} n = BatchNormalization(a, {BN}) y = Relu(n)"
        channels = 5
    elif "transA" in attributes:
        body, channels = f"r = Relu(x) n = Mul(r, gamma) y = {gemm.format('n')}", 3
        weights["gamma"] = normal(3, 1)
    else:
        body, channels = f"r = Relu(x) n = BatchNormalization(r, {BN}) y = {gemm.format('n')}", 6
    graph = build(body, "y", bn_weights(channels) | weights, "float[3,6] x")
    assert len(fold(graph).rewrites) == 1
    assert set(ops(graph)) == {"Gemm", "Relu"}


@pytest.mark.parametrize(
    ("body", "weights", "left"),
    {
        "matrix on the left": (
            "r = Relu(x) m = Mul(r, s) y = MatMul(w, m)", {"s": normal(6, 1), "w": normal(3, 6)}, {"Relu", "MatMul"},
        ),
        "matrix on the left, after": (
            "m = MatMul(w, x) t = Mul(m, s) y = Relu(t)", {"s": normal(3, 1), "w": normal(3, 6)}, {"Relu", "MatMul"},
        ),
        "MatMul without bias keeps one Add": (
            "m = MatMul(x, w) t = Mul(m, s) u = Add(t, c) y = Relu(u)",
            {"w": normal(6, 3), "s": normal(3), "c": normal(3)}, {"Relu", "MatMul", "Add"},
        ),
        "BN before MatMul without bias becomes an Add": (
            "r = Relu(x) t = Transpose<perm=[0,2,3,1]>(r) u = Transpose<perm=[0,3,1,2]>(t) "
            f"n = BatchNormalization(u, {BN}) v = Transpose<perm=[0,2,3,1]>(n) y = MatMul(v, w)",
            {"w": normal(4, 3), **bn_weights(4)}, {"Relu", "Transpose", "MatMul", "Add"},
        ),
        "constant minus and divided": (
            "c = Conv(x, w) s = Sub(k, c) d = Div(s, k) y = Relu(d)",
            {"w": normal(3, 4, 1, 1), "k": normal(3, 1, 1)}, {"Conv", "Relu"},
        ),
        "negated sum": (
            "c = Conv(x, w) d = Conv(x, v) e = Sub(c, d) s = Sub(k, e) y = Relu(s)",
            {"w": normal(3, 4, 1, 1), "v": normal(3, 4, 1, 1), "k": normal(3, 1, 1)}, {"Conv", "Sub", "Relu"},
        ),
        "sum with a constant image": (
            f"c = Conv(x, w) d = Add(c, k) n = BatchNormalization(d, {BN}) y = Relu(n)",
            {"w": normal(3, 4, 1, 1), "k": normal(1, 3, 6, 6), **bn_weights(3)}, {"Conv", "Add", "Relu"},
        ),
        "shift in the second term": (
            "c = MatMul(x, w) d = Conv(x, v) e = Add(c, d) m = Mul(e, s) a = Add(m, s) y = Relu(a)",
            {"w": normal(6, 6), "v": normal(4, 4, 1, 1), "s": normal(1)}, {"Conv", "MatMul", "Add", "Relu"},
        ),
        "reshape that groups channels": (
            "c = Conv(x, w) r = Reshape(c, shape) m = Mul(r, s) y = Relu(m)",
            {"w": normal(8, 4, 1, 1), "s": normal(2, 1, 1), "shape": np.array([2, 2, 4, 36])},
            {"Conv", "Reshape", "Relu"},
        ),
        "through squeeze and gather": (
            "c = Conv(x, w) g = Gather<axis=2>(c, i) s = Unsqueeze(g, j) t = Squeeze(s, j) m = Mul(t, k) y = Relu(m)",
            {"w": normal(3, 4, 1, 1), "k": normal(3, 1), "i": np.array(1), "j": np.array([0])},
            {"Conv", "Gather", "Unsqueeze", "Squeeze", "Relu"},
        ),
        "gate": (
            "c = Conv(x, w) g = Sigmoid(x) m = Mul(g, c) k = Mul(m, s) y = Relu(k)",
            {"w": normal(4, 4, 1, 1), "s": normal(4, 1, 1)}, {"Conv", "Sigmoid", "Mul", "Relu"},
        ),
        "gate, one side only partly linear": (
            "c = Conv(x, w) r = Relu(x) k = Concat<axis=1>(c, r) d = Conv(x, v) m = Mul(k, d) t = Mul(m, s) "
            "y = Relu(t)",
            {"w": normal(3, 4, 1, 1), "v": normal(7, 4, 1, 1), "s": normal(1)},
            {"Conv", "Relu", "Concat", "Mul"},
        ),
        "into a norm": (
            "n = LayerNormalization<axis=-1>(x, g) m = Mul(n, s) a = Add(m, t) y = Relu(a)",
            {"g": normal(6), "s": normal(6), "t": normal(6)}, {"LayerNormalization", "Relu"},
        ),
        "into a norm before a linear map": (
            "n = LayerNormalization<axis=-1>(x, g) m = Mul(n, s) k = MatMul(m, w) y = Relu(k)",
            {"g": normal(6), "s": normal(6), "w": normal(6, 3)}, {"LayerNormalization", "MatMul", "Relu"},
        ),
        "native group norm": (
            "n = GroupNormalization<num_groups=2>(x, g, b) y = Conv(n, w)",
            {"g": normal(4), "b": normal(4), "w": normal(3, 4, 3, 3)}, {"GroupNormalization", "Conv"},
        ),
        "slices of one projection": (
            "c = Conv(x, w) p = Slice(c, zero, two, one) q = Slice(c, two, six, one) m = Mul(p, s) "
            "y = Concat<axis=1>(q, m)",
            {"w": normal(6, 4, 1, 1), "s": normal(1), "zero": np.array([0]), "two": np.array([2]),
             "six": np.array([2**40]), "one": np.array([1])},
            {"Conv", "Slice", "Concat"},
        ),
        "forward through split, slice and concat": (
            f"r = Relu(x) n = BatchNormalization(r, {BN}) p, q = Split<axis=1, num_outputs=2>(n) "
            "c = Concat<axis=1>(q, r, p) z = Conv(c, w) y = Relu(z)",
            {"w": normal(3, 8, 1, 1), **bn_weights(4)}, {"Relu", "Split", "Concat", "Conv"},
        ),
        "the shape is read too": (
            f"c = Conv(x, w) s = Shape(c) n = BatchNormalization(c, {BN}) y = Reshape(n, s)",
            {"w": normal(3, 4, 1, 1), **bn_weights(3)}, {"Conv", "Shape", "Reshape"},
        ),
    }.values(),
    ids=lambda v: "",
)  # fmt: skip
def test_text_pattern(body: str, weights: dict[str, np.ndarray], left: set[str]) -> None:
    outputs = "float[2,3,4,4] y" if "Group" in body else "y"  # ONNX does not infer the shape of GroupNormalization
    graph = build(body, outputs, weights, opset=21)
    assert fold(graph).rewrites
    assert set(ops(graph)) == left


# -- what must stay ----------------------------------------------------------------------------------------------------

CONV = {"w": normal(3, 4, 1, 1)}
PADDED = {"w": normal(3, 4, 3, 3), "s": normal(4, 1, 1)}
HALF = np.float16
BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)

# name: nodes, outputs, weights, what the note says ("" if nothing is worth saying), further arguments of build
REFUSED: dict[str, tuple[str, str, dict[str, np.ndarray], str, dict]] = {
    "second consumer": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Add(n, c)", "y", CONV | bn_weights(3),
        "c (Conv) has a second consumer", {},
    ),
    "read twice": (
        f"c = Conv(x, w) a = Add(c, c) n = BatchNormalization(a, {BN}) y = Relu(n)", "y", CONV | bn_weights(3),
        "c (Conv) has a second consumer", {},
    ),
    "seen by the caller": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n)", "y c", CONV | bn_weights(3),
        "c (Conv) is an output of the model", {},
    ),
    "one term of a sum is not linear": (
        f"c = Conv(x, w) r = Relu(x) a = Add(c, r) n = BatchNormalization(a, {BN}) y = Relu(n)", "y",
        {"w": normal(4, 4, 1, 1)} | bn_weights(4), "r (Relu) is not linear", {},
    ),
    "statistics are inputs": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n)", "y",
        CONV | {k: v for k, v in bn_weights(3).items() if k != "mean"}, "its parameters are not constants",
        {"inputs": "float[2,4,6,6] x, float[3] mean"},
    ),
    "factor is an input": (
        "c = Conv(x, w) m = Mul(c, s) y = Relu(m)", "y", CONV, "", {"inputs": "float[2,4,6,6] x, float[3,1,1] s"},
    ),
    "weight is an input": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n)", "y", bn_weights(3),
        "'w' of c (Conv) is not a constant of floats", {"inputs": "float[2,4,6,6] x, float[3,4,1,1] w"},
    ),
    "bias is an input": (
        f"c = Conv(x, w, b) n = BatchNormalization(c, {BN}) y = Relu(n)", "y", CONV | bn_weights(3),
        "'b' of c (Conv) is not a constant of floats", {"inputs": "float[2,4,6,6] x, float[3] b"},
    ),
    "quantised weight": (
        f"d = DequantizeLinear(w, s) c = Conv(x, d) n = BatchNormalization(c, {BN}) y = Relu(n)", "y",
        {"w": RNG.integers(-9, 9, (3, 4, 1, 1)).astype(np.int8), "s": np.array(0.1, np.float32)} | bn_weights(3),
        "'d' of c (Conv) is not a constant of floats", {},
    ),
    "quantised data": (
        "c = Conv(x, w) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) "
        f"n = BatchNormalization(d, {BN}) y = Relu(n)",
        "y", {"s": np.array(0.1, np.float32), "z": np.zeros((), np.int8)} | CONV | bn_weights(3),
        "d (DequantizeLinear) is not linear", {},
    ),
    "shift before zero padding": (
        f"r = Relu(x) n = BatchNormalization(r, {BN}) y = Conv<pads=[1,1,1,1]>(n, w)", "y", PADDED | bn_weights(4),
        "y (Conv): bias cannot pass the zero padding of a 3x3 convolution", {},
    ),
    "shift before automatic padding": (
        'r = Relu(x) n = Add(r, s) y = Conv<auto_pad="SAME_UPPER">(n, w)', "y", PADDED,
        "y (Conv): bias cannot pass the zero padding of a 3x3 convolution", {},
    ),
    "shift before a transposed conv": (
        "r = Relu(x) n = Add(r, s) y = ConvTranspose<strides=[2,2]>(n, w)", "y",
        {"w": normal(4, 3, 3, 3), "s": normal(4, 1, 1)},
        "y (ConvTranspose): bias cannot pass the zero padding of a 3x3 transposed convolution", {},
    ),
    "one of two consumers is padded": (
        f"r = Relu(x) n = BatchNormalization(r, {BN}) y = Conv(n, w) z = Conv<pads=[1,1,1,1]>(n, w)", "y z",
        PADDED | bn_weights(4), "z (Conv): bias cannot pass the zero padding of a 3x3 convolution", {},
    ),
    "one of two consumers is not linear": (
        f"r = Relu(x) n = BatchNormalization(r, {BN}) y = Conv(n, w) z = Relu(n)", "y z",
        PADDED | bn_weights(4), "z (Relu) is not linear", {},
    ),
    "an output before a linear map": (
        f"r = Relu(x) n = BatchNormalization(r, {BN}) y = Conv(n, w)", "y n", PADDED | bn_weights(4),
        "'n' is an output of the model", {},
    ),
    "it is the weight of the next map": (
        "r = Relu(k) n = Mul(r, s) y = Conv(x, n)", "y", {"s": normal(3, 1, 1, 1)},
        "it is a weight or bias of y (Conv)", {"inputs": "float[2,4,6,6] x, float[3,4,1,1] k"},
    ),
    "training mode": (
        f"c = Conv(x, w) n, m, v = BatchNormalization<training_mode=1>(c, {BN}) y = Relu(n)", "y", CONV | bn_weights(3),
        "training_mode is 1", {},
    ),
    "training mode before opset 14": (
        f"c = Conv(x, w) n, m, v, a, b = BatchNormalization(c, {BN}) y = Relu(n)", "y", CONV | bn_weights(3),
        "it normalises by the statistics of the batch", {"opset": 13},
    ),
    "another axis of a convolution": (
        f"c = Conv(x, w) t = Transpose<perm=[0,2,1,3]>(c) n = BatchNormalization(t, {BN}) y = Relu(n)", "y",
        CONV | bn_weights(6), "it acts on axis 2, the channels are on axis 1", {},
    ),
    "another axis of a matrix product": (
        "m = MatMul(x, w) t = Mul(m, s) y = Relu(t)", "y", {"w": normal(6, 3), "s": normal(6, 1)},
        "it acts on axis 2, the channels are on axis 3", {},
    ),
    "rows of the next matrix product": (
        "r = Relu(x) t = Mul(r, s) y = MatMul(t, w)", "y", {"w": normal(6, 3), "s": normal(6, 1)},
        "it acts on axis 2, the channels are on axis 3", {},
    ),
    "reshape that splits the channels": (
        "c = Conv(x, w) r = Reshape(c, shape) m = Mul(r, s) y = Relu(m)", "y",
        CONV | {"s": normal(54), "shape": np.array([2, 2, 54])}, "r (Reshape) splits or mixes the channels", {},
    ),
    "reshape of unknown extent": (
        f"r = Relu(x) n = BatchNormalization(r, {BN}) f = Flatten(n) y = Gemm(f, w)", "y",
        {"w": normal(144, 3)} | bn_weights(4), "f (Flatten) splits or mixes the channels",
        {"inputs": "float[N,4,H,W] x"},
    ),
    "mean over the channels": (
        "r = Relu(x) n = Mul(r, s) m = ReduceMean<keepdims=0>(n, axes) y = Gemm(m, w)", "y",
        {"w": normal(6, 3), "s": normal(4, 1, 1), "axes": np.array([1, 3])}, "averages over the channels", {},
    ),
    "channels are broadcast": (
        "c = Conv(x, w) d = Conv(x, v) a = Add(c, d) m = Mul(a, s) y = Relu(m)", "y",
        {"w": normal(3, 4, 1, 1), "v": normal(1, 4, 1, 1), "s": normal(3, 1, 1)}, "is broadcast along the channels", {},
    ),
    "factor that broadcasts its input": (
        "c = Conv(x, w) m = Mul(c, s) y = Relu(m)", "y", {"w": normal(1, 4, 1, 1), "s": normal(3, 1, 1)}, "", {},
    ),
    "factor per channel and row": (
        "c = Conv(x, w) m = Mul(c, s) y = Relu(m)", "y", CONV | {"s": normal(3, 6, 1)}, "", {},
    ),
    "integers": ("a = Add(k, i) y = Mul(a, i)", "y", {"i": np.array([3])}, "", {"inputs": "int64[4] k", "kind": 7}),
    "the other part is scaled too": (
        "c = Conv(x, w) p, q = Split<axis=2, num_outputs=2>(c) m = Mul(p, s) y = Add(m, q)", "y",
        CONV | {"s": normal(3, 1, 1)}, "leaves other parts of its input to a second consumer", {},
    ),
    "the whole is read too": (
        "c = Conv(x, w) p = Slice(c, zero, two, one) m = Mul(p, s) r = Relu(c) y = Concat<axis=1>(m, r)", "y",
        CONV | {"s": normal(1), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2])},
        "has a second consumer", {},
    ),
    "slice of two axes": (
        "c = Conv(x, w) p = Slice(c, zero, two, axes) q = Slice(c, two, four, axes) m = Mul(p, s) y = Add(m, q)", "y",
        {"w": normal(4, 4, 1, 1), "s": normal(1), "zero": np.array([0, 0]), "axes": np.array([1, 2]),
         "two": np.array([2, 2]), "four": np.array([4, 4])},
        "slices several axes", {},
    ),
    "channels gathered twice": (
        "c = Conv(x, w) g = Gather<axis=1>(c, i) m = Mul(g, s) y = Relu(m)", "y",
        CONV | {"s": normal(3, 1, 1), "i": np.array([1, 1, 0])}, "not a constant list without repetition", {},
    ),
    "the whole is an output": (
        "c = Conv(x, w) p, q, r = Split<axis=1, num_outputs=3>(c) m = Mul(p, s) y = Concat<axis=1>(m, q, r)", "y c",
        CONV | {"s": normal(1)}, "'c' is an output of the model", {},
    ),
    "parameters of another type": (
        f"r = Relu(x) n = BatchNormalization(r, {BN}) t = Transpose<perm=[0,1,3,2]>(n) m = Mul(t, s) y = Relu(m)", "y",
        {k: v.astype(BFLOAT16) if k in ("gamma", "beta") else v for k, v in bn_weights(4).items()}
        | {"s": normal(4, 1, 1)}, "'gamma' of n (BatchNormalization) is not a constant of floats", {},
    ),
    "slices overlap": (
        "c = Conv(x, w) p = Slice(c, zero, two, one) q = Slice(c, one, three, one) m = Mul(p, s) y = Add(m, q)", "y",
        CONV | {"s": normal(1), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]),
                "three": np.array([3])},
        "has a second consumer", {},
    ),
    "scale of a product per matrix": (
        "a = MatMul(x, w) b = MatMul(x, w) m = MatMul(a, b) t = Mul(m, s) y = Relu(t)", "y",
        {"w": normal(6, 6), "s": normal(4, 1, 1)}, "multiplies a matrix per channel", {},
    ),
    "shift on a product": (
        "a = MatMul(x, w) b = MatMul(x, w) m = MatMul(a, b) t = Add(m, s) y = Relu(t)", "y",
        {"w": normal(6, 6), "s": normal(1)}, "", {},
    ),
    "concatenated with what is not scaled": (
        "r = Relu(x) m = Mul(r, s) c = Concat<axis=2>(m, x) y = Conv(c, w)", "y", CONV | {"s": normal(4, 1, 1)},
        "joins it with what is not scaled", {},
    ),
    "norm without a bias after it": (
        "n = LayerNormalization<axis=-1>(x, g, b) y = MatMul(n, w)", "y",
        {"g": normal(6), "b": normal(6), "w": normal(6, 3)}, "has no bias to take the shift", {},
    ),
    "norm with a residual": (
        "n = LayerNormalization<axis=-1>(x, g, b) m = MatMul(n, w) y = Add(m, n)", "y",
        {"g": normal(6), "b": normal(6), "w": normal(6, 6)}, "y (Add) adds two computed tensors", {},
    ),
    "norm over several axes": (
        "n = LayerNormalization<axis=-2>(x, g) m = Mul(n, s) y = MatMul(m, w)", "y",
        {"g": normal(6, 6), "s": normal(6, 1), "w": normal(6, 6)}, "normalises more than one axis", {},
    ),
    "GELU in parts": (
        "d = Div(x, two) e = Erf(d) a = Add(e, one) m = Mul(x, a) h = Mul(m, half) y = MatMul(h, w)", "y",
        {"two": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5), "w": normal(6, 6)},
        "it is part of a GELU, which runtimes fuse as a whole", {},
    ),
    "layer norm in parts": (
        "m = ReduceMean(x, axes) c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, axes) e = Add(v, eps) r = Sqrt(e) "
        "d = Div(c, r) g = Mul(d, s) h = Add(g, s) k = MatMul(h, w) y = Add(k, b)", "y",
        {"axes": np.array([-1]), "eps": np.float32(1e-5), "s": normal(6), "w": normal(6, 6), "b": normal(6)},
        "it is part of a normalisation, which runtimes fuse as a whole", {},
    ),
    "nothing gained": (
        "r = Relu(x) a = Add(r, s) y = MatMul(a, w)", "y", {"s": normal(6), "w": normal(6, 3)},
        "has no bias to take the shift", {},
    ),
    "norm before a shared weight": (
        "n = LayerNormalization<axis=-1>(x, g) y = MatMul(n, w) r = Relu(x) z = MatMul(r, w)", "y z",
        {"g": normal(6), "w": normal(6, 3)}, "the weight of y (MatMul) is shared and would have to be copied", {},
    ),
    "large shared weight": (
        "m = MatMul(x, w) t = Mul(m, s) y = Relu(t) r = Relu(x) z = MatMul(r, w)", "y z",
        {"s": normal(1), "w": np.ones((6, 700_000), np.float32)},
        "the weight of m (MatMul) is shared and would have to be copied", {"inputs": "float[1,6] x"},
    ),
    "vector times matrix": (
        "r = Relu(x) t = Add(r, s) y = MatMul(w, t)", "y", {"s": normal(1), "w": normal(3, 6)},
        "multiplies a vector", {"inputs": "float[6] x"},
    ),
    "read in a branch": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) k = ReduceMax<keepdims=0>(n) p = Cast<to=9>(k) "
        "y = If(p) <then_branch = a () => (float[2,3,6,6] t) { t = Relu(c) }, "
        "else_branch = b () => (float[2,3,6,6] e) { e = Relu(n) }>", "y", CONV | bn_weights(3),
        "c (Conv) is an output of the model", {},
    ),
    "float16 overflows": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n)", "y",
        {"w": np.full((3, 4, 1, 1), 9, HALF), "gamma": np.full(3, 9e3, HALF), "beta": np.zeros(3, HALF),
         "mean": np.zeros(3, HALF), "var": np.ones(3, HALF)},
        "a constant of c (Conv) would overflow float16", {"inputs": "float16[2,4,6,6] x", "kind": TensorProto.FLOAT16},
    ),
    "float16 vanishes": (
        "c = Conv(x, w) n = Mul(c, s) y = Relu(n)", "y",
        {"w": np.full((3, 4, 1, 1), 1e-3, HALF), "s": np.array([1, 2e-3, 1], HALF).reshape(3, 1, 1)},
        "a constant of c (Conv) would vanish in float16", {"inputs": "float16[2,4,6,6] x", "kind": TensorProto.FLOAT16},
    ),
    "infinite scale": (
        f"c = Conv(x, w) n = BatchNormalization<epsilon=0.0>(c, {BN}) y = Relu(n)", "y",
        CONV | bn_weights(3) | {"var": np.array([1, 0, 1], np.float32)}, "its constants are not finite", {},
    ),
    "custom operator": (
        f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n)", "y", CONV | bn_weights(3), "is not linear", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, outputs, weights, why, options = REFUSED[name]
    graph = build(body, outputs, weights, **options)
    if name == "custom operator":
        next(n for n in graph.nodes if n.op == "Conv").domain = "acme"
    graph.infer_shapes()
    before = graph.digest()
    context = Context()
    context.begin("fold_norm")
    result = FoldNorm().run(graph, context)
    graph.tidy()
    assert result.rewrites == ()
    assert graph.digest() == before
    texts = [n.text for n in result.notes]
    assert any(why in t for t in texts) if why else not texts


def test_shared_weight_gets_its_own_copy() -> None:
    body = f"c = Conv(x, w) d = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n) z = Relu(d)"
    graph = build(body, "y z", CONV | bn_weights(3))
    weight = graph.constants()["w"]
    before = weight.copy()
    assert len(fold(graph).rewrites) == 1
    assert graph.constants()["w"] is weight
    np.testing.assert_array_equal(weight, before)
    assert len({n.inputs[1].name for n in graph.nodes if n.op == "Conv"}) == 2


def test_float16_is_rounded_once() -> None:
    """Scale, shift and product are computed in float64; a channel that is zero is not one that vanishes."""
    parameters = {k: v.astype(HALF) for k, v in bn_weights(3).items()}
    parameters["gamma"][1] = 0
    weights = {"w": normal(3, 4, 1, 1).astype(HALF), "b": normal(3).astype(HALF)} | parameters
    half = TensorProto.FLOAT16
    graph = build(
        f"c = Conv(x, w, b) n = BatchNormalization(c, {BN}) y = Relu(n)", "y", weights, "float16[2,4,6,6] x", kind=half
    )
    context = Context()
    context.begin("fold_norm")
    assert len(FoldNorm().run(graph, context).rewrites) == 1
    graph.tidy()
    graph.check()
    w, b, gamma, beta, mean, var = (weights[k].astype(np.float64) for k in ("w", "b", "gamma", "beta", "mean", "var"))
    scale = gamma / np.sqrt(var + np.float32(1e-5))
    conv = next(n for n in graph.nodes if n.op == "Conv")
    np.testing.assert_array_equal(graph.constant(conv.inputs[1]), (w * scale.reshape(3, 1, 1, 1)).astype(HALF))
    np.testing.assert_array_equal(graph.constant(conv.inputs[2]), (b * scale + beta - scale * mean).astype(HALF))


def test_output_keeps_its_name() -> None:
    graph = build(f"c = Conv(x, w) y = BatchNormalization(c, {BN})", "y", CONV | bn_weights(3))
    fold(graph)
    assert [n.op for n in graph.nodes] == ["Conv"]
    assert [t.name for t in graph.nodes[0].outputs] == ["y"]


@pytest.mark.parametrize("batch", [1, 3])
def test_dynamic_dimensions(batch: int) -> None:
    """Unknown batch and image size do not matter where the channels stay apart."""
    body = (
        f"c = Conv(x, w) r = Reshape(c, shape) t = Transpose<perm=[0,2,1]>(r) u = MatMul(t, v) s = Mul(u, k) "
        f"q = Transpose<perm=[0,2,1]>(s) n = BatchNormalization(q, {BN}) y = Relu(n)"
    )
    weights = {"w": normal(5, 4, 1, 1), "v": normal(5, 3), "k": normal(3), "shape": np.array([0, 5, -1])}
    graph = build(body, "y", weights | bn_weights(3), "float[N,4,H,W] x")
    feeds = {"x": normal(batch, 4, 5, 7)}
    before = oracle.run(graph, feeds)
    fold(graph)
    assert ops(graph) == Counter({"Transpose": 2, "Conv": 1, "Reshape": 1, "MatMul": 1, "Add": 1, "Relu": 1})
    assert oracle.compare_all(before, oracle.run(graph, feeds))["y"].max_rel <= TOLERANCE


def test_memory_mapped_weights_are_not_touched(tmp_path) -> None:
    weights = {"w": normal(64, 4, 3, 3)} | bn_weights(64)
    graph = build(f"c = Conv(x, w) n = BatchNormalization(c, {BN}) y = Relu(n)", "y", weights)
    files = graph.save(tmp_path / "model.onnx", external=True)
    bytes_before = [f.read_bytes() for f in files]
    loaded = Graph.load(files[-1])
    assert len(fold(loaded).rewrites) == 1
    assert [f.read_bytes() for f in files] == bytes_before


def test_provenance_is_inherited() -> None:
    module = randomize(sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    graph = export(module, (torch.randn(IMAGE),), "torchscript")
    fold(graph)
    conv = next(n for n in graph.nodes if n.op == "Conv")
    assert provenance(conv).modules == ("0", "1")
    assert provenance(conv).sources == ("/0/Conv", "/1/BatchNormalization")


def test_inserted_nodes_inherit_provenance() -> None:
    graph = build("m = MatMul(x, w) t = Mul(m, s) y = Add(t, s)", "y", {"w": normal(6, 3), "s": normal(3)})
    fold(graph)
    (add,) = (n for n in graph.nodes if n.op == "Add")
    assert provenance(add).sources == ("t", "y")


MANY = " ".join(
    f"c{i} = Conv({'x' if not i else f'r{i - 1}'}, w) n{i} = BatchNormalization(c{i}, {BN}) r{i} = Relu(n{i})"
    for i in range(4)
)


@pytest.mark.parametrize("limit", range(5))
def test_limit_stops_between_rewrites(limit: int) -> None:
    graph = build(MANY, "r3", {"w": normal(4, 4, 1, 1)} | bn_weights(4))
    result = fold(graph, limit)
    assert [r.number for r in result.rewrites] == list(range(1, limit + 1))
    assert ops(graph)["BatchNormalization"] == 4 - limit


def test_pipeline_accepts_every_rewrite() -> None:
    graph = build(MANY, "r3", {"w": normal(4, 4, 1, 1)} | bn_weights(4))
    pipeline = Pipeline.parse("fold_norm")
    assert bisect(graph, pipeline) is None
    trace = pipeline.run(graph, strict=True)
    assert len(trace.rewrites) == 4
    assert str(pipeline) == "fold_norm"


# -- random graphs -----------------------------------------------------------------------------------------------------


class Random:
    """A random graph of affine, linear, moving and non-linear nodes over float64 tensors of known shape."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.body: list[str] = []
        self.weights: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"x": (2, 4, 3, 5)}
        for _ in range(int(self.rng.integers(5, 16))):
            often = [self.affine] * 3 + [self.linear] * 4
            step = self.rng.choice([*often, self.norm, self.move, self.move, self.cut, self.add, self.relu])  # type: ignore[arg-type]
            names = list(self.shapes)
            recent = names[-1] if self.rng.random() < 0.95 else str(self.rng.choice(names))
            step(recent)

    def weight(self, *shape: int, positive: bool = False) -> str:
        name = f"w{len(self.weights)}"
        size = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = self.rng.uniform(0.5, 2, shape) if positive else self.rng.standard_normal(shape) / np.sqrt(size)
        self.weights[name] = values
        return name

    def node(self, op: str, inputs: str, shape: tuple[int, ...], attributes: str = "") -> str:
        name = f"t{len(self.body)}"
        self.body.append(f"{name} = {op}{attributes and f'<{attributes}>'}({inputs})")
        self.shapes[name] = shape
        return name

    def affine(self, x: str) -> None:
        shape = self.shapes[x]
        axis = int(self.rng.choice([min(1, len(shape) - 1), len(shape) - 1, self.rng.integers(len(shape))]))
        form = [1] * (len(shape) - axis) if self.rng.random() < 0.2 else [shape[axis], *[1] * (len(shape) - 1 - axis)]
        op = str(self.rng.choice(["Mul", "Add", "Sub", "Div"]))
        c = self.weight(*form, positive=op in ("Div", "Mul"))
        first = op != "Div" and self.rng.random() < 0.3
        self.node(op, f"{c}, {x}" if first else f"{x}, {c}", shape)

    def norm(self, x: str) -> None:
        shape = self.shapes[x]
        if len(shape) > 1:
            parts = ", ".join(self.weight(shape[1], positive=p) for p in (True, False, False, True))
            self.node("BatchNormalization", f"{x}, {parts}", shape)

    def linear(self, x: str) -> None:
        shape, out = self.shapes[x], int(self.rng.choice([2, 4, 6]))
        if len(shape) != 4 or self.rng.random() < 0.4:
            if self.rng.random() < 0.7:
                self.node("MatMul", f"{x}, {self.weight(shape[-1], out)}", (*shape[:-1], out))
            elif len(shape) > 1:
                self.node("MatMul", f"{self.weight(out, shape[-2])}, {x}", (*shape[:-2], out, shape[-1]))
            return
        groups = 2 if shape[1] % 2 == 0 and self.rng.random() < 0.3 else 1
        bias = f", {self.weight(out)}" if self.rng.random() < 0.5 else ""
        k = 3 if min(shape[2:]) >= 3 and self.rng.random() < 0.4 else 1
        pad = k // 2 if self.rng.random() < 0.5 else 0
        spatial = tuple(n + 2 * pad - k + 1 for n in shape[2:])
        if groups == 1 and self.rng.random() < 0.25:  # the reference evaluator has no grouped ConvTranspose
            w = self.weight(shape[1], out // groups, k, k)
            spatial = tuple(n - 2 * pad + k - 1 for n in shape[2:])
            op = "ConvTranspose"
        else:
            w, op = self.weight(out, shape[1] // groups, k, k), "Conv"
        attributes = f"group={groups}, pads=[{pad},{pad},{pad},{pad}]"
        self.node(op, f"{x}, {w}{bias}", (shape[0], out, *spatial), attributes)

    def move(self, x: str) -> None:
        shape = self.shapes[x]
        if self.rng.random() < 0.5:
            perm = [int(i) for i in self.rng.permutation(len(shape))]
            self.node("Transpose", x, tuple(shape[i] for i in perm), f"perm={perm}")
            return
        cut = int(self.rng.integers(len(shape)))
        if len(shape) > 2 and cut + 1 < len(shape) and self.rng.random() < 0.6:
            form = (*shape[:cut], shape[cut] * shape[cut + 1], *shape[cut + 2 :])
        elif shape[cut] % 2 == 0 and len(shape) < 5:
            form = (*shape[:cut], 2, shape[cut] // 2, *shape[cut + 1 :])
        else:
            form = (*shape[:cut], 1, *shape[cut:])
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(form)
        self.node("Reshape", f"{x}, {name}", form)

    def cut(self, x: str) -> None:
        """Cut an axis in two, change one part, and join them again."""
        shape = self.shapes[x]
        axis = int(self.rng.integers(len(shape)))
        if shape[axis] % 2:
            return
        half = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
        a, b = f"t{len(self.body)}a", f"t{len(self.body)}b"
        self.body.append(f"{a}, {b} = Split<axis={axis}, num_outputs=2>({x})")
        self.shapes[a] = self.shapes[b] = half
        self.affine(a)
        self.node("Concat", f"{list(self.shapes)[-1]}, {b}", shape, f"axis={axis}")

    def add(self, x: str) -> None:
        same = [n for n, s in self.shapes.items() if s == self.shapes[x]]
        self.node(str(self.rng.choice(["Add", "Sub"])), f"{x}, {self.rng.choice(same)}", self.shapes[x])

    def relu(self, x: str) -> None:
        if self.rng.random() < 0.5:
            self.node("Relu", x, self.shapes[x])

    def graph(self) -> Graph:
        names = list(self.shapes)
        outputs = dict.fromkeys([names[-1], *(n for n in names[1:] if self.rng.random() < 0.03)])
        return build(" ".join(self.body), " ".join(outputs), self.weights, "double[2,4,3,5] x", kind=TensorProto.DOUBLE)


def check_random(seed: int) -> int:
    """Fold a random graph; in float64 the results agree to 1e-11, which leaves no room for a wrong rule."""
    graph = Random(seed).graph()
    feeds = oracle.random_feeds(graph.signature().inputs, seed)
    before = oracle.run(graph, feeds)
    affine = sum(ops(graph)[op] for op in ("Mul", "Add", "Sub", "Div", "BatchNormalization"))
    context = Context()
    context.begin("fold_norm")
    result = FoldNorm().run(graph, context)
    graph.tidy()
    graph.check()
    for name, error in oracle.compare_all(before, oracle.run(graph, feeds)).items():
        assert error.max_rel <= 1e-11, f"seed {seed}, output {name}: {error}"
    assert sum(ops(graph)[op] for op in ("Mul", "Add", "Sub", "Div", "BatchNormalization")) <= affine
    again = Context()
    again.begin("fold_norm")
    assert FoldNorm().run(graph, again).rewrites == ()
    return len(result.rewrites)


def test_random_graphs() -> None:
    assert sum(map(check_random, range(150))) > 100


@pytest.mark.slow
def test_many_random_graphs() -> None:
    assert sum(map(check_random, range(1000, 4000))) > 2000


# -- size --------------------------------------------------------------------------------------------------------------


def long_chain(kind: str, length: int) -> Graph:
    """A chain of about ``length`` nodes on [1, 2, 3, 3]."""
    rng = np.random.default_rng(0)
    x = current = gs.Variable("x", np.float32, [1, 2, 3, 3])
    nodes: list[gs.Node] = []

    def add(op: str, *shapes: tuple[int, ...], **attributes: object) -> None:
        nonlocal current
        constants = [
            gs.Constant(f"c{len(nodes)}_{i}", rng.uniform(0.9, 1.1, s).astype(np.float32)) for i, s in enumerate(shapes)
        ]
        output = gs.Variable(f"t{len(nodes)}", np.float32, [1, 2, 3, 3])
        nodes.append(gs.Node(op, f"n{len(nodes)}", attributes, [current, *constants], [output]))
        current = output

    steps = {
        "foldable": lambda: (add("Conv", (2, 2, 1, 1)), add("BatchNormalization", *[(2,)] * 4), add("Relu")),
        "one chain": lambda: (add("Mul", (2, 1, 1)), add("Add", (2, 1, 1))),
        "refused": lambda: (add("Relu"), add("BatchNormalization", *[(2,)] * 4)),
        "through transposes": lambda: (add("Mul", (1,)), add("Transpose", perm=[0, 1, 3, 2])),
    }
    while len(nodes) < length:
        steps[kind]()
    return Graph.from_proto(gs.export_onnx(gs.Graph(nodes, [x], [current], opset=20, ir_version=10)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["foldable", "one chain", "refused", "through transposes"])
def test_time_is_linear(kind: str) -> None:
    seconds = []
    for length in (5_000, 20_000):
        graph = long_chain(kind, length)
        context = Context()
        context.begin("fold_norm")
        start = time.process_time()
        FoldNorm().run(graph, context)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 60
    assert seconds[1] < 10 * seconds[0], seconds


# -- the zoo -----------------------------------------------------------------------------------------------------------

SMALLEST = {
    "shvit_s1": 64, "efficientvit_m1": 224, "litepose_xs": 64, "damoyolo_ns": 64, "damoyolo_t": 64, "deanet": 32,
    "repavit_tiny": 224, "repaswin_tiny": 224,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", SMALLEST)
def test_zoo_has_no_batch_norm_left(name: str, exporter: str) -> None:
    size = SMALLEST[name]
    x = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    module = randomize(models.create(name), inputs=x).eval()
    graph = export(module, (x,), exporter)
    before = ops(graph)["BatchNormalization"]
    assert before or exporter == "dynamo" or name == "deanet"  # DEA-Net has none: it is here for the rest of the pass
    trace = Pipeline.parse("clean,fold_norm").run(graph, [{graph.inputs[0].name: x.numpy()}], strict=True)
    assert not trace.failures
    assert ops(graph)["BatchNormalization"] == 0
    same(graph, module, (x,))
