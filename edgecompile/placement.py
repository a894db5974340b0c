"""Where a target wants QuantizeLinear and DequantizeLinear: rules as data, and the places of a graph that they pick.

A *layer* multiplies an activation by constant weights; layers are why a graph is quantised at all. A *follower* works
on integers between layers, and does so only if every tensor it reads is quantised anyway and something that works on
integers reads its result: it pulls no tensor into int8 that no layer needs there, unless its rule says so. Everything
else computes in floating point. A *point* is a tensor that gets one pair of QuantizeLinear and DequantizeLinear; points
of one *group* share one scale and zero point, so that moving values between them is exact.

Sources: ONNX Runtime's QDQ node selectors and the kernels behind them (onnxruntime/core/optimizer/qdq_transformer);
NVIDIA TensorRT Developer Guide, "Explicit Quantization" and "Q/DQ Layer-Placement Recommendations", and issue 4529 of
NVIDIA/TensorRT (grouped convolutions); Li et al.,
"RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV 2023, section 3, and
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Graph, Tensor, matches
from edgecompile.linear import op as op_of

Role = Literal["layer", "follow", "move"]


@dataclass(frozen=True)
class OpRule:
    """What a target does with one operator.

    Attributes:
        op: operator type of the default domain.
        role: ``"layer"`` multiplies by constant weights; ``"follow"`` computes on integers, each tensor with its own
            scale; ``"move"`` only selects among values, so that its inputs and outputs share one scale.
        reason: why, for people.
        output: a layer has an int8 kernel only if its result is quantised too.
        pulls: a follower whose inputs are quantised because its result is.
    """

    op: str
    role: Role
    reason: str
    output: bool = False
    pulls: bool = False


@dataclass(frozen=True)
class Rules:
    """How one target wants int8.

    Attributes:
        name: of the table.
        signed: activations are int8, else uint8.
        symmetric: the zero point of activations is that of the real zero: 0, or 128 for unsigned ones.
        int32_bias: biases become int32 with the scale of the accumulator.
        stored: weights are stored as integers; else as floats followed by a QuantizeLinear.
        through: the readers of a layer's quantised result all read the dequantised one, also those in floating point,
            so that its kernel writes integers alone; the model's caller does only where the kernel writes nothing else.
        residual: the other input of an Add that adds to the result of a layer is quantised.
        folded: activation functions that the kernel of the node before them computes.
        ops: the rules by operator.
        floats: operators left in floating point, with the reason.
        wide_add: what an Add adds to a MatMul gets as many axes as the result. ONNX Runtime else makes a floating-point
            Gemm of the two, and of the Reshapes it needs, before it looks for integers.
        grouped: convolutions of several groups, other than depthwise ones, gain from int8.
        note: what the user of this table should know, or ``""``.
        simulated: the kernels add up integers exactly, as a simulation in floats does; else they are run to be judged.
    """

    name: str
    signed: bool
    symmetric: bool
    int32_bias: bool
    stored: bool
    through: bool
    residual: bool
    folded: tuple[str, ...]
    ops: tuple[OpRule, ...]
    floats: tuple[tuple[str, str], ...]
    wide_add: bool = False
    grouped: bool = True
    note: str = ""
    simulated: bool = False

    @property
    def by_op(self) -> dict[str, OpRule]:
        """The rules by operator type."""
        return {rule.op: rule for rule in self.ops}


_SENSITIVE = (
    ("Softmax", "its few large probabilities and many small ones do not fit one uniform scale"),
    ("LayerNormalization", "its statistics need more than 8 bits"),
    ("InstanceNormalization", "its statistics need more than 8 bits"),
    ("GroupNormalization", "its statistics need more than 8 bits"),
    ("Gelu", "its negative lobe is a few steps wide in int8"),
    ("Erf", "it is part of a GELU, whose negative lobe is a few steps wide in int8"),
)

ORT_CPU = Rules(
    name="ort_cpu",
    signed=False,
    symmetric=False,
    int32_bias=True,
    stored=True,
    through=True,
    residual=False,
    folded=("Relu", "Clip"),
    ops=(
        OpRule("Conv", "layer", "QLinearConv takes uint8 and int8 and writes uint8 only", output=True),
        OpRule("Gemm", "layer", "QGemm writes floats where nothing asks for integers"),
        OpRule("MatMul", "layer", "MatMulIntegerToFloat writes floats where nothing asks for integers"),
        OpRule("Add", "follow", "QLinearAdd rescales its inputs itself"),
        OpRule("Mul", "follow", "QLinearMul rescales its inputs itself"),
        OpRule("Sigmoid", "follow", "a table of 256 values replaces the exponential"),
        OpRule("LeakyRelu", "follow", "a table of 256 values"),
        OpRule("GlobalAveragePool", "follow", "an average has a narrower range than what it averages"),
        OpRule("AveragePool", "follow", "an average has a narrower range than what it averages"),
        OpRule("MaxPool", "move", "the maximum of integers of one scale is exact"),
        OpRule("Concat", "move", "integers of one scale are copied, not rescaled"),
        OpRule("Reshape", "move", "values do not change"),
        OpRule("Flatten", "move", "values do not change"),
        OpRule("Squeeze", "move", "values do not change"),
        OpRule("Unsqueeze", "move", "values do not change"),
        OpRule("Transpose", "move", "values do not change"),
        OpRule("Slice", "move", "values do not change"),
        OpRule("Split", "move", "values do not change"),
    ),
    floats=(*_SENSITIVE, ("ConvTranspose", "the CPU provider has no int8 kernel")),
    wide_add=True,
)

TENSORRT = Rules(
    name="tensorrt",
    signed=True,
    symmetric=True,
    int32_bias=False,
    stored=False,
    through=True,
    residual=True,
    folded=("Relu", "Clip"),
    ops=(
        OpRule("Conv", "layer", "its inputs decide its precision; what follows it decides that of its result"),
        OpRule("ConvTranspose", "layer", "its inputs decide its precision"),
        OpRule("Gemm", "layer", "its inputs decide its precision"),
        OpRule("MatMul", "layer", "its inputs decide its precision"),
        OpRule("Concat", "move", "with one scale on all inputs it is a copy without a reformat", pulls=True),
    ),
    floats=(
        *_SENSITIVE,
        ("MaxPool", "the builder moves Q/DQ across it by itself"),
        ("AveragePool", "it runs as fast in fp16, fused with what is around it"),
        ("GlobalAveragePool", "it runs as fast in fp16, fused with what is around it"),
        ("Resize", "it runs as fast in fp16, fused with what is around it"),
    ),
    grouped=False,
    simulated=True,
)

TVM = Rules(
    name="tvm",
    signed=False,
    symmetric=False,
    int32_bias=True,
    stored=True,
    through=False,
    residual=True,
    folded=("Relu", "Clip"),
    ops=(
        OpRule("Conv", "layer", "sums of integers; what follows is computed from them before they leave the registers"),
        OpRule("Gemm", "layer", "sums of integers, with floats or integers as a result"),
        OpRule("MatMul", "layer", "sums of integers, with floats or integers as a result"),
        OpRule("MaxPool", "move", "the maximum of integers of one scale is exact"),
        OpRule("Concat", "move", "integers of one scale are copied, a quarter of the bytes", pulls=True),
        OpRule("Reshape", "move", "values do not change"),
        OpRule("Transpose", "move", "values do not change"),
        OpRule("Slice", "move", "values do not change"),
        OpRule("Split", "move", "values do not change"),
    ),
    floats=(*_SENSITIVE, ("ConvTranspose", "there is no int8 kernel")),
    simulated=True,
)

TABLES: Mapping[str, Rules] = {r.name: r for r in (ORT_CPU, TENSORRT, TVM)}


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with constant weights.

    Attributes:
        node: the node.
        weight: the weights, float32.
        axis: the axis of ``weight`` that numbers the output channels, each of which has its own scale.
        bias: the bias, float32 [C_out], or None.
        add: the Add that follows a MatMul with a constant per channel, which a MatMul has for a bias; or None.
    """

    node: gs.Node
    weight: np.ndarray
    axis: int
    bias: np.ndarray | None
    add: gs.Node | None = None

    @property
    def source(self) -> Tensor:
        """The activation it reads."""
        return self.node.inputs[0]

    @property
    def is_grouped(self) -> bool:
        """True for a convolution of several groups that is not depthwise."""
        return int(self.node.attrs.get("group", 1)) > 1 and self.weight.shape[1] > 1


def _unit(node: gs.Node) -> bool:
    return all(node.attrs.get(k, d) == d for k, d in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))


def layer(graph: Graph, node: gs.Node) -> Layer | str:
    """A Conv, ConvTranspose, Gemm or MatMul as a layer, or why it is none."""
    if len(node.inputs) < 2 or graph.constant(node.inputs[0]) is not None:
        return "its weights come first" if len(node.inputs) > 1 else "it has no weights"
    weight = graph.constant(node.inputs[1])
    if weight is None:
        return "it multiplies two activations"
    if weight.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    if not np.isfinite(weight).all():
        return "its weights are not finite"
    bias = None
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = graph.constant(node.inputs[2])
        if bias is None:
            return "its bias is not constant"
    if node.op == "MatMul" and weight.ndim != 2:
        return "its weights are not a matrix"
    if node.op == "Gemm" and not _unit(node):
        return "it scales or transposes what it multiplies"
    axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}.get(node.op, 0 if node.attrs.get("transB", 0) else 1)
    if bias is not None:
        groups = int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else 1
        channels = weight.shape[axis] * groups
        if bias.size not in (1, channels) or bias.dtype != np.float32:
            return "its bias is not one number per channel"
        bias = np.broadcast_to(bias.reshape(-1), (channels,)) if bias.size != channels else bias.reshape(-1)
    return Layer(node, weight, axis, bias, _add(graph, node, weight.shape[axis]) if node.op == "MatMul" else None)


def _add(graph: Graph, node: gs.Node, channels: int) -> gs.Node | None:
    """The Add after a MatMul that adds one number per channel of its last axis."""
    after = graph.sole_consumer(node.outputs[0])
    if after is None or op_of(after) != "Add":
        return None
    value = graph.constant(after.inputs[int(after.inputs[0] is node.outputs[0])])
    fits = value is not None and value.dtype == np.float32 and value.shape[-1:] == (channels,) == (value.size,)
    return after if fits else None


# -- the placement -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Point:
    """A tensor with one Q/DQ pair.

    Attributes:
        tensor: the tensor.
        slots: the inputs, as node and index, that read the dequantised tensor; None for every reader and the caller.
        group: points with equal numbers share one scale and zero point.
        bounds: lowest and highest value that the activation function which ends in this tensor lets through.
    """

    tensor: Tensor
    slots: list[tuple[gs.Node, int]] | None
    group: int
    bounds: tuple[float, float] = (-np.inf, np.inf)


@dataclass(frozen=True, eq=False)
class Placement:
    """What to quantise in a graph.

    Attributes:
        rules: the table that picked the places.
        layers: the layers to quantise, in order of execution.
        points: the tensors that get a Q/DQ pair, by name.
        integers: ids of the nodes that compute on integers.
        floats: what stays in floating point, and why, by node.
    """

    rules: Rules
    layers: tuple[Layer, ...]
    points: Mapping[str, Point]
    integers: frozenset[int]
    floats: Sequence[tuple[gs.Node, str]] = field(default=())

    @property
    def groups(self) -> dict[int, list[Point]]:
        """The points by the number of their group."""
        found: dict[int, list[Point]] = {}
        for point in self.points.values():
            found.setdefault(point.group, []).append(point)
        return found


def is_attention(graph: Graph) -> bool:
    """True if a product of two activations reads, through whatever moves values, what a Softmax wrote."""
    moves = {"Reshape", "Transpose", "Dropout", "Cast", "Identity"}
    for node in graph.nodes:
        if op_of(node) != "MatMul" or any(graph.constant(t) is not None for t in node.inputs):
            continue
        for tensor in node.inputs:
            before = graph.producer(tensor)
            while before is not None and before.op in moves:
                before = graph.producer(before.inputs[0])
            if before is not None and before.op == "Softmax":
                return True
    return False


def place(
    graph: Graph, rules: Rules, *, skip: Collection[str] = (), ends: bool | None = None, only: Collection[int] = ()
) -> Placement:
    """Pick what to quantise.

    Args:
        graph: the graph; it is not changed.
        rules: the target's table.
        skip: globs of node names, ops or module paths that stay in floating point.
        ends: quantise the first and last layers; None for all graphs but those with attention, and but for layers whose
            kernel would round an output of the model to 256 levels.
        only: ids of the only nodes that may become layers; empty for all.
    """
    fold = _Folding(graph, rules)
    chosen, floats = _layers(graph, rules, skip, fold, ends, only)
    by_op = rules.by_op
    integers = {id(made.node): made.node for made in chosen}
    demanded: dict[int, Tensor] = {id(made.source): made.source for made in chosen}
    for made in chosen:
        if by_op[made.node.op].output:
            end = fold.end(made.node)
            demanded[id(end)] = end
    followers = _followers(graph, rules, skip, fold, demanded, integers)
    integers |= {id(n): n for n in followers}
    ids = frozenset(integers)
    points: dict[str, Point] = {}
    group = _Groups()
    residuals = _residuals(graph, ids) if rules.residual else {}
    demanded |= {id(t): t for t in residuals.values()}
    for node in followers:
        demanded |= {id(t): t for t in [*_operands(node), fold.end(node), *node.outputs[1:]]}
        if by_op[node.op].role == "move":
            for tensor in [*_operands(node), *node.outputs]:
                group.join(node.outputs[0], tensor)
    for tensor in demanded.values():
        owner = fold.owner(tensor)
        whole = False
        if rules.through and owner is not None and id(owner) in ids:
            whole = by_op[owner.op].output or not graph.is_output(tensor)
        slots = [(n, i) for n, i in _slots(tensor) if id(n) in ids or (id(n), i) in residuals]
        points[tensor.name] = Point(tensor, None if whole else slots, group.of(tensor), fold.bounds(tensor))
    floats += _others(graph, rules, fold, ids, {id(n) for n, _ in floats})
    return Placement(rules, tuple(chosen), points, ids, tuple(floats))


def _others(
    graph: Graph, rules: Rules, fold: _Folding, integers: Collection[int], said: Collection[int]
) -> Iterator[tuple[gs.Node, str]]:
    """Why the remaining nodes that compute floats stay there."""
    for node in graph.nodes:
        computes = any(t.dtype == np.float32 for t in node.outputs) and node.op not in ("Constant", "Identity")
        owner = fold.owner(node.outputs[0]) if node.outputs else None
        if not computes or id(node) in integers or id(node) in said or id(owner) in integers:
            continue
        if op_of(node) in rules.by_op:
            yield node, "what it reads is not all int8, or nothing that reads its result is"
        else:
            yield node, f"the rules {rules.name} have no int8 form of {node.op}"


def _layers(
    graph: Graph, rules: Rules, skip: Collection[str], fold: _Folding, ends: bool | None, only: Collection[int]
) -> tuple[list[Layer], list[tuple[gs.Node, str]]]:
    by_op, kept = rules.by_op, dict(rules.floats)
    chosen: list[Layer] = []
    floats: list[tuple[gs.Node, str]] = []
    for node in graph.nodes:
        op = op_of(node)
        if op in kept:
            floats.append((node, kept[op]))
        if op not in by_op or by_op[op].role != "layer":
            continue
        made = layer(graph, node)
        if isinstance(made, str):
            floats.append((node, made))
        elif matches(node, skip):
            floats.append((node, "asked for"))
        elif made.is_grouped and not rules.grouped:
            floats.append((node, "its groups would run one by one in int8"))
        else:
            chosen.append(made)
    reasons = {} if ends else _spared(graph, rules, fold, chosen, ends is False or is_attention(graph))
    floats += [(c.node, reasons[id(c.node)]) for c in chosen if id(c.node) in reasons]
    chosen = [c for c in chosen if id(c.node) not in reasons and (not only or id(c.node) in only)]
    return chosen, floats


def _spared(graph: Graph, rules: Rules, fold: _Folding, chosen: Sequence[Layer], both: bool) -> dict[int, str]:
    """Why some of the first and last layers stay in floating point, by node."""
    reasons: dict[int, str] = {}
    if both:
        first, last = _ends(graph, chosen)
        reasons |= dict.fromkeys(last, "it is the last layer") | dict.fromkeys(first, "it is the first layer")
    for made in chosen:
        if rules.by_op[made.node.op].output and _leaves(graph, fold.end(made.node)):
            reasons.setdefault(id(made.node), "its kernel would round an output of the model to 256 levels")
    return reasons


_MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Concat")


def _leaves(graph: Graph, tensor: Tensor) -> bool:
    """True if the model's caller sees a tensor, or what only moves its values."""
    if graph.is_output(tensor):
        return True
    return any(_leaves(graph, t) for n in tensor.outputs if op_of(n) in _MOVES for t in n.outputs)


def _ends(graph: Graph, chosen: Sequence[Layer]) -> tuple[set[int], set[int]]:
    """Layers with no layer before them, and with none after them."""
    layers = {id(c.node) for c in chosen}
    after: dict[int, bool] = {}  # tensor -> a layer lies before it
    first: set[int] = set()
    for node in graph.nodes:
        before = any(after.get(id(t), False) for t in node.inputs)
        if id(node) in layers and not before:
            first.add(id(node))
        for tensor in node.outputs:
            after[id(tensor)] = before or id(node) in layers
    ahead: dict[int, bool] = {}
    last: set[int] = set()
    for node in reversed(graph.nodes):
        behind = any(ahead.get(id(t), False) for t in node.outputs)
        if id(node) in layers and not behind:
            last.add(id(node))
        for tensor in node.inputs:
            ahead[id(tensor)] = ahead.get(id(tensor), False) or behind or id(node) in layers
    return first, last


class _Folding:
    """Which activation function the kernel of a node computes, and what it lets through."""

    def __init__(self, graph: Graph, rules: Rules):
        self.graph, self.rules = graph, rules

    def _activation(self, node: gs.Node) -> gs.Node | None:
        reader = self.graph.sole_consumer(node.outputs[0])
        folds = reader is not None and op_of(reader) in self.rules.folded and reader.inputs[0] is node.outputs[0]
        return reader if folds else None

    def end(self, node: gs.Node) -> Tensor:
        """The result of a node, after the activation function it computes."""
        activation = self._activation(node)
        return node.outputs[0] if activation is None else activation.outputs[0]

    def owner(self, tensor: Tensor) -> gs.Node | None:
        """The node whose kernel writes a tensor, where it ends there."""
        node = self.graph.producer(tensor)
        if node is None or op_of(node) not in self.rules.folded:
            return node
        before = self.graph.producer(node.inputs[0])
        return before if before is not None and self._activation(before) is node else node

    def bounds(self, tensor: Tensor) -> tuple[float, float]:
        """What the activation function that writes a tensor lets through."""
        node = self.graph.producer(tensor)
        if node is None or op_of(node) not in ("Relu", "Clip"):
            return -np.inf, np.inf
        if node.op == "Relu":
            return 0.0, np.inf
        limits = [-np.inf, np.inf]
        for side, key in enumerate(("min", "max")):
            if key in node.attrs:
                limits[side] = float(node.attrs[key])
            elif len(node.inputs) > side + 1 and node.inputs[side + 1].name:
                value = self.graph.constant(node.inputs[side + 1])
                limits[side] = limits[side] if value is None else float(value.reshape(-1)[0])
        return limits[0], limits[1]


def _operands(node: gs.Node) -> list[Tensor]:
    """The activations that a follower reads: not the shape of a Reshape or the bounds of a Slice."""
    return list(node.inputs) if node.op in ("Add", "Mul", "Concat") else list(node.inputs[:1])


def _slots(tensor: Tensor) -> list[tuple[gs.Node, int]]:
    readers = {id(n): n for n in tensor.outputs}
    return [(n, i) for n in readers.values() for i, t in enumerate(n.inputs) if t is tensor]


def _followers(
    graph: Graph,
    rules: Rules,
    skip: Collection[str],
    fold: _Folding,
    demanded: Mapping[int, Tensor],
    layers: Mapping[int, gs.Node],
) -> list[gs.Node]:
    """The largest set of followers that read only quantised tensors, each read by another, or by a layer."""
    by_op = rules.by_op
    alive = {
        id(n): n
        for n in graph.nodes
        if op_of(n) in by_op
        and by_op[n.op].role != "layer"
        and not matches(n, skip)
        and all(graph.constant(t) is None and t.dtype == np.float32 for t in _operands(n))
    }
    while True:
        written = {id(fold.end(n)) for n in alive.values()} | {id(t) for n in alive.values() for t in n.outputs[1:]}
        readers = alive.keys() | layers.keys()

        def wanted(node: gs.Node) -> bool:
            ends = [fold.end(node), *node.outputs[1:]]
            return all(any(id(r) in readers for r in t.outputs) for t in ends)  # noqa: B023

        def fed(node: gs.Node) -> bool:
            ready = all(id(t) in demanded or id(t) in written for t in _operands(node))  # noqa: B023
            return ready or by_op[node.op].pulls

        gone = [n for n in alive.values() if not fed(n) or not wanted(n)]
        if not gone:
            return [n for n in graph.nodes if id(n) in alive]
        for node in gone:
            del alive[id(node)]


def _residuals(graph: Graph, layers: Collection[int]) -> dict[tuple[int, int], Tensor]:
    """The inputs, by node and index, that join the result of a layer in an Add; the Add fuses with the later layer."""
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    found: dict[tuple[int, int], Tensor] = {}
    for node in graph.nodes:
        if op_of(node) != "Add" or len(node.inputs) != 2 or any(graph.constant(t) is not None for t in node.inputs):
            continue
        owners = [graph.producer(t) if graph.sole_consumer(t) is node else None for t in node.inputs]
        order = [-1 if o is None or id(o) not in layers else position[id(o)] for o in owners]
        if max(order) >= 0:
            joins = int(order[1] < order[0])
            found[id(node), joins] = node.inputs[joins]
    return found


class _Groups:
    """Sets of tensors that share a scale."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.numbers: dict[int, int] = {}

    def root(self, key: int) -> int:
        while (above := self.parent.setdefault(key, key)) != key:
            key = above
        return key

    def join(self, a: Tensor, b: Tensor) -> None:
        self.parent[self.root(id(a))] = self.root(id(b))

    def of(self, tensor: Tensor) -> int:
        return self.numbers.setdefault(self.root(id(tensor)), len(self.numbers))
