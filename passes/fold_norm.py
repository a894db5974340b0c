"""Fold normalisation and constant scales and shifts into the linear maps around them.

A **per-channel affine map** ``y = s * x + t`` has one pair ``(s, t)`` per index of one axis of ``x``. Such maps are:

- ``BatchNormalization`` in inference: ``s = gamma / sqrt(var + eps)``, ``t = beta - s * mean``;
- ``Mul``, ``Div``, ``Add``, ``Sub`` with a constant that varies along at most one axis;
- a chain of them: ``(s, t)`` then ``(s', t')`` is ``(s' * s, s' * t + t')``;
- the last step of Layer-, Instance- and GroupNormalization: ``s = gamma``, ``t = beta``.

A **linear map** with weight ``W[g, o, i, k]`` (group, output and input channel of the group, kernel tap) and bias ``b``
takes an affine map in, on either side:

- *backward*, the map follows it: ``s * (W x + b) + t = (s W) x + (s b + t)``, the scale over ``o``. Always exact.
- *forward*, the map precedes it: ``W (s x + t) + b = (W s) x + (b + W t)``, the scale over ``i``, and ``W t`` summed
  over the taps. Zero padding pads ``s x + t`` with 0, not with ``t``: a shift passes an unpadded convolution only, and
  a transposed convolution, whose outputs see differing numbers of taps, only if its kernel is 1x1.

On the way to a linear map, the affine map passes what only moves or selects elements (Transpose, Reshape that keeps the
channels apart, Split, Slice, Gather, Concat), averages, sums (the scale to every term, the shift to one) and, backward
and without a shift, products: a scalar on ``Q K^T`` reaches the rows of ``W_q`` through MatMul, Transpose, Reshape and
Split, whose other parts get ``s = 1``. Each step is proved on shapes and constants; what cannot be proved stays, with a
note.

All arithmetic is in float64 and is rounded once, to the type of the weight. A fold is refused where the rounded weights
overflow, or where a channel sinks into the subnormal numbers (both happen in float16).

Sources: Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
CVPR 2018, section 3.2 (batch normalisation folding); Xu et al., *RePaViT*, ICML 2025 (BatchNorm before a linear layer);
Wu & He, *Group Normalization*, ECCV 2018, section 3; Ba et al., *Layer Normalization*, 2016, section 3; Vaswani et al.,
*Attention Is All You Need*, 2017, section 3.2.1 (the scale of ``Q K^T``); the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Dim, Graph, Tensor, disconnect, where
from edgecompile.pipeline import Context, Pass, PassResult

# Nodes visited to absorb one map; keeps the pass linear in the size of the graph.
_REACH = 128

# Bytes of a shared weight that may be copied so that one of its users can take a map in.
_COPY_LIMIT = 16 << 20


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold BatchNormalization, norm gamma/beta, attention scales and Mul/Add chains into linear maps."""

    name: ClassVar[str] = "fold_norm"
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place until nothing more can be folded."""
        graph.tidy()
        graph.infer_shapes()
        try:
            while (sweep := _Sweep(graph, context)).run():
                graph.tidy()
        except _LimitReached:
            return context.result()
        for node, text in sweep.notes:
            context.note(text, node)
        return context.result()


class _LimitReached(Exception):
    """The context allows no further rewrite."""


class _Refused(Exception):
    """Why an affine map cannot be absorbed; ``near`` if a linear map was found but could not take it."""

    def __init__(self, why: str, near: bool = True):
        super().__init__(why)
        self.near = near


# -- affine maps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``y = scale * x + shift`` with one pair per index of an axis, in float64.

    Attributes:
        axis: the axis of ``x``; None if all pairs are equal.
        scale, shift: arrays [size of the axis], or 0-d if ``axis`` is None.
    """

    axis: int | None
    scale: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, axis: int | None, scale: object, shift: object = 0.0) -> Affine:
        """The map with these pairs; equal pairs are recognised."""
        scale, shift = np.broadcast_arrays(np.asarray(scale, np.float64), np.asarray(shift, np.float64))
        if scale.size and (scale == scale.flat[0]).all() and (shift == shift.flat[0]).all():
            return cls(None, scale.reshape(-1)[0], shift.reshape(-1)[0])
        return cls(axis, scale, shift)

    @property
    def scales(self) -> bool:
        """True if some scale is not 1."""
        return bool(np.any(self.scale != 1))

    @property
    def shifts(self) -> bool:
        """True if some shift is not 0."""
        return bool(np.any(self.shift != 0))

    def then(self, after: Affine) -> Affine | None:
        """This map followed by ``after``; None if that varies along two axes."""
        if None not in (self.axis, after.axis) and self.axis != after.axis:
            return None
        axis = after.axis if self.axis is None else self.axis
        return Affine.of(axis, after.scale * self.scale, after.scale * self.shift + after.shift)

    def at(self, axis: int | None) -> Affine:
        """The same pairs along another axis."""
        return self if self.axis is None else Affine(axis, self.scale, self.shift)

    def take(self, indices: np.ndarray) -> Affine:
        """The map of some indices of the axis."""
        return self if self.axis is None else Affine.of(self.axis, self.scale[indices], self.shift[indices])

    def on(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift as arrays [size] along ``axis``.

        Raises:
            _Refused: the map varies along another axis.
        """
        if self.axis is None:
            return np.full(size, self.scale), np.full(size, self.shift)
        if self.axis != axis or self.scale.size != size:
            raise _Refused(f"it acts on axis {self.axis}, the channels are on axis {axis}")
        return self.scale, self.shift

    def broadcast(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift in a form that broadcasts against a tensor of this rank."""
        if self.axis is None:
            return self.scale, self.shift
        form = (-1, *(1,) * (rank - 1 - self.axis))
        return self.scale.reshape(form), self.shift.reshape(form)

    @property
    def scale_only(self) -> Affine:
        """The map without its shift."""
        return Affine.of(self.axis, self.scale)

    @property
    def shift_only(self) -> Affine:
        """The map without its scale."""
        return Affine.of(self.axis, np.ones_like(self.scale), self.shift)


# How y = f(x, c) reads as scale and shift, given the constant and whether it is the first operand.
_ELEMENTWISE: dict[str, Callable[[np.ndarray, bool], tuple[object, object] | None]] = {
    "Add": lambda c, first: (1.0, c),
    "Sub": lambda c, first: (-1.0, c) if first else (1.0, -c),
    "Mul": lambda c, first: (c, 0.0),
    "Div": lambda c, first: None if first else (1.0 / c, 0.0),
}


@dataclass(frozen=True)
class _Unit:
    """A chain of nodes that is one affine map from ``source`` to ``target``."""

    nodes: tuple[gs.Node, ...]
    source: Tensor
    affine: Affine

    @property
    def target(self) -> Tensor:
        return self.nodes[-1].outputs[0]

    @property
    def cost(self) -> int:
        """Elementwise operations it stands for."""
        return sum(2 if n.op == "BatchNormalization" else 1 for n in self.nodes)

    @property
    def label(self) -> str:
        kinds = list(dict.fromkeys(n.op for n in self.nodes))
        return " and ".join(kinds)


def _op(node: gs.Node) -> str:
    """The op of a node of the default domain, else a name that no table has."""
    return node.op if not node.domain or node.domain == "ai.onnx" else f"{node.domain}.{node.op}"


def _affine_node(graph: Graph, node: gs.Node) -> _Unit | None:
    """The affine map that a node is, or None.

    Raises:
        _Refused: it is a BatchNormalization in training, or better left to the runtime.
    """
    op = _op(node)
    if op == "BatchNormalization":
        source, parts = node.inputs[0], _batch_norm(graph, node)
    elif op in _ELEMENTWISE and len(node.inputs) == 2:
        constants = [graph.constant(t) for t in node.inputs]
        if (constants[0] is None) == (constants[1] is None):
            return None
        first = constants[0] is not None
        source, constant = node.inputs[int(first)], constants[int(not first)]
        parts = _per_axis(op, constant, first, source.shape)
        if parts is not None and (pattern := _fused_pattern(graph, op, source)):
            raise _Refused(f"it is part of a {pattern}, which runtimes fuse as a whole")
    else:
        return None
    if parts is None or source.dtype is None or isinstance(source.dtype, int) or np.dtype(source.dtype).kind != "f":
        return None
    affine = Affine.of(*parts)
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        raise _Refused("its constants are not finite")
    return _Unit((node,), source, affine)


def _per_axis(op: str, constant: np.ndarray | None, first: bool, shape: Sequence[Dim] | None):
    """Axis, scale and shift of an elementwise node, or None if it varies along two axes or broadcasts its input."""
    if constant is None or (shape is None and constant.ndim):
        return None
    rank = len(shape or ())
    varied = [i - constant.ndim + rank for i, n in enumerate(constant.shape) if n != 1]
    if constant.ndim > rank or len(varied) > 1 or any((shape or ())[a] != constant.size for a in varied):
        return None
    with np.errstate(divide="ignore"):
        pair = _ELEMENTWISE[op](constant.astype(np.float64).reshape(-1), first)
    return None if pair is None else (varied[0] if varied else None, *pair)


def _fused_pattern(graph: Graph, op: str, tensor: Tensor) -> str:
    """The multi-node form of an operation that an ``op`` of ``tensor`` with a constant ends, or ``""``.

    Runtimes know these by their shape; without the last constants they would run them node by node.
    """
    node = graph.producer(tensor)
    if op == "Add" and node is not None and _op(node) == "Mul":  # gamma before beta
        node = next((p for p in map(graph.producer, node.inputs) if p is not None and _op(p) == "Div"), None)
    if node is None or _op(node) not in ("Mul", "Div"):
        return ""
    inner = [p for p in map(graph.producer, node.inputs) if p is not None]
    if _op(node) == "Div" and inner and _op(inner[-1]) == "Sqrt":
        return "normalisation"
    terms = {_op(p) for n in inner if _op(n) == "Add" for p in map(graph.producer, n.inputs) if p is not None}
    return "GELU" if op == "Mul" and _op(node) == "Mul" and terms & {"Erf", "Tanh"} else ""


def _batch_norm(graph: Graph, node: gs.Node):
    """Axis, scale and shift of a BatchNormalization."""
    if node.attrs.get("training_mode", 0):
        raise _Refused("training_mode is 1: it normalises by the statistics of the batch")
    if graph.opset < 9 or any(t.name for t in node.outputs[1:]):  # what said so before there was training_mode
        raise _Refused("it normalises by the statistics of the batch")
    parameters = [graph.constant(t) for t in node.inputs[1:5]]
    if any(p is None for p in parameters):
        raise _Refused("its parameters are not constants")
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return 1, scale, beta - scale * mean


# -- linear maps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """Where a node keeps the parts of its linear map.

    Attributes:
        data, weight, bias: numbers of its inputs; ``bias`` None if the op has none.
        in_axis, out_axis: the channel axis of the data and of the output.
        input_first: the weight is stored [groups * in, out, taps...], not [groups * out, in, taps...].
        groups: number of groups.
        alpha, beta: factors of the product and of the bias (Gemm).
        uneven: why a constant added to the data does not add a constant to the output, or ``""``.
    """

    data: int
    weight: int
    bias: int | None
    in_axis: int
    out_axis: int
    input_first: bool
    groups: int = 1
    alpha: float = 1.0
    beta: float = 1.0
    uneven: str = ""

    def taps(self, weight: np.ndarray) -> np.ndarray:
        """The weight as [groups, out, in, taps]."""
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return split.swapaxes(1, 2) if self.input_first else split

    def stored(self, taps: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of :meth:`taps`."""
        return (taps.swapaxes(1, 2) if self.input_first else taps).reshape(shape)


def _rank(tensor: Tensor) -> int:
    if tensor.shape is None:
        raise _Refused(f"the rank of {tensor.name!r} is unknown")
    return len(tensor.shape)


def _conv(graph: Graph, node: gs.Node) -> _Linear:
    padded = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    uneven = "a shift cannot pass its zero padding" if padded else ""
    return _Linear(0, 1, 2, 1, 1, False, node.attrs.get("group", 1), uneven=uneven)


def _conv_transpose(graph: Graph, node: gs.Node) -> _Linear:
    spread = node.inputs[1].shape is None or any(n != 1 for n in node.inputs[1].shape[2:])
    spread |= any(n != 1 for n in node.attrs.get("strides", ())) or any(node.attrs.get("pads", ()))
    spread |= any(node.attrs.get("output_padding", ())) or "output_shape" in node.attrs
    uneven = "a transposed convolution does not spread a shift evenly" if spread else ""
    return _Linear(0, 1, 2, 1, 1, True, node.attrs.get("group", 1), uneven=uneven)


def _gemm(graph: Graph, node: gs.Node) -> _Linear:
    in_axis, input_first = int(not node.attrs.get("transA", 0)), not node.attrs.get("transB", 0)
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    return _Linear(0, 1, 2, in_axis, 1, input_first, alpha=alpha, beta=beta)


def _matmul(graph: Graph, node: gs.Node) -> _Linear:
    weight = int(graph.constant(node.inputs[0]) is None)
    if _rank(node.inputs[weight]) != 2:
        raise _Refused(f"the weight of {where(node)} is not a matrix")
    axis = _rank(node.inputs[1 - weight]) - (1 if weight else 2)  # x W acts on the last axis, W x on the one before
    if axis < 0:
        raise _Refused(f"{where(node)} multiplies a vector")
    return _Linear(1 - weight, weight, None, axis, axis, bool(weight))


_LINEAR: dict[str, Callable[[Graph, gs.Node], _Linear]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}

# Inputs that hold gamma and beta, and the channel axis of the output.
_NORMS: dict[str, tuple[int, int, int]] = {
    "LayerNormalization": (1, 2, -1),
    "InstanceNormalization": (1, 2, 1),
    "GroupNormalization": (1, 2, 1),
    "BatchNormalization": (1, 2, 1),
}


# -- pushing a map through the graph ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edit:
    """A new value for a constant input of a node; ``old`` is None for a new input, ``scaled`` if it is a factor."""

    node: gs.Node
    index: int
    value: np.ndarray
    old: np.ndarray | None
    dtype: np.dtype
    scaled: bool


class _Push:
    """One attempt to absorb an affine map.

    The edits are collected and made by :meth:`commit`, so that an attempt that is refused leaves the graph alone.
    Later edits of a node see the earlier ones.
    """

    def __init__(self, graph: Graph, pinned: set[int]):
        self.graph = graph
        self.pinned = pinned
        self.edits: dict[tuple[int, int], _Edit] = {}
        self.adds: dict[int, tuple[Tensor, Affine]] = {}
        self.steps = 0

    def backward(self, tensor: Tensor, affine: Affine, owned: bool = False) -> None:
        """Let ``tensor`` become ``affine(tensor)`` by changing what produces it.

        Args:
            tensor: the tensor; only one node may read it.
            affine: the map to absorb.
            owned: the readers have been looked at.

        Raises:
            _Refused: it cannot be proved that this changes nothing else.
        """
        if not (affine.scales or affine.shifts):
            return
        self._step()
        node = self.graph.producer(tensor)
        if node is None:
            raise _Refused(f"no node computes {tensor.name!r}", near=False)
        rule = _BACKWARD.get(_op(node))
        if not owned and (self.exposed(tensor) or len(_readers(tensor)) != 1):
            why = "is an output of the model" if self.exposed(tensor) else "has a second consumer"
            raise _Refused(f"{where(node)} {why}", near=rule is not None)
        if rule is None:
            raise _Refused(f"{where(node)} is not linear", near=False)
        rule(self, node, next(i for i, t in enumerate(node.outputs) if t is tensor), affine)

    def forward(self, tensor: Tensor, affine: Affine) -> None:
        """Let every reader of ``tensor`` act as before when ``tensor`` becomes the ``x`` of ``affine(x)``.

        Raises:
            _Refused: some reader cannot.
        """
        if not (affine.scales or affine.shifts):
            return
        edges = [(n, i) for n, i in _edges(tensor) if _op(n) not in _SHAPE_ONLY]
        near = any(_op(n) in _LINEAR for n, _ in edges)
        if self.exposed(tensor):
            raise _Refused(f"{tensor.name!r} is an output of the model", near=near)
        for node, index in edges:
            self._step()
            rule = _FORWARD.get(_op(node))
            if rule is None:
                raise _Refused(f"{where(node)} is not linear", near=near)
            try:
                rule(self, node, index, affine)
            except _Refused as refused:
                refused.near |= near
                raise

    def _step(self) -> None:
        self.steps += 1
        if self.steps > _REACH:
            raise _Refused(f"a linear map is more than {_REACH} nodes away", near=False)

    def exposed(self, tensor: Tensor) -> bool:
        """True if the tensor is seen outside the nodes that read it."""
        return id(tensor) in self.pinned

    def attempt(self, *choices: Callable[[], None]) -> None:
        """Take the first choice that is not refused; the edits of the others are undone."""
        for last, choice in enumerate(choices, 1 - len(choices)):
            edits, adds = dict(self.edits), dict(self.adds)
            try:
                return choice()
            except _Refused:
                self.edits, self.adds = edits, adds
                if not last:
                    raise
        return None

    def read(self, node: gs.Node, index: int) -> np.ndarray:
        """The value of a constant input in float64, with the edits made so far."""
        if (edit := self.edits.get((id(node), index))) is not None:
            return edit.value
        value = self.graph.constant(node.inputs[index])
        if value is None or value.dtype.kind != "f":
            raise _Refused(f"{node.inputs[index].name!r} of {where(node)} is not a constant of floats")
        return value.astype(np.float64)

    def has(self, node: gs.Node, index: int) -> bool:
        """True if an optional input is given."""
        given = index < len(node.inputs) and bool(node.inputs[index].name)
        return given or (id(node), index) in self.edits

    def write(self, node: gs.Node, index: int, value: np.ndarray, like: int, scaled: bool = False) -> None:
        """Set a constant input of a node; its type is that of the constant input ``like``."""
        model = self.graph.constant(node.inputs[like])
        assert model is not None
        old = self.graph.constant(node.inputs[index]) if index < len(node.inputs) else None
        self.edits[id(node), index] = _Edit(node, index, value, old, model.dtype, scaled)

    def check(self, copy_limit: int = _COPY_LIMIT) -> None:
        """Refuse values that their type cannot hold, and copies of shared weights of more than ``copy_limit`` bytes."""
        for edit in self.edits.values():
            shared = edit.old is not None and len(edit.node.inputs[edit.index].outputs) > 1
            if shared and edit.scaled and edit.value.size * edit.dtype.itemsize > copy_limit:
                raise _Refused(f"the weight of {where(edit.node)} is shared and would have to be copied")
            with np.errstate(over="ignore"):
                rounded = edit.value.astype(edit.dtype)
            if not np.isfinite(rounded).all():
                raise _Refused(f"a constant of {where(edit.node)} would overflow {edit.dtype}")
            if edit.scaled and edit.old is not None and _sinks(edit.old, edit.value, edit.dtype):
                raise _Refused(f"a constant of {where(edit.node)} would vanish in {edit.dtype}")

    def commit(self, replaced: Sequence[gs.Node]) -> None:
        """Make the edits; the nodes changed inherit the provenance of ``replaced``."""
        for edit in self.edits.values():
            node, index = edit.node, edit.index
            given = index < len(node.inputs) and bool(node.inputs[index].name)
            constant = self.graph.new_constant(
                node.inputs[index].name if given else f"{node.name}_bias", edit.value.astype(edit.dtype)
            )
            if index < len(node.inputs):
                node.inputs[index] = constant
            else:
                node.inputs.append(constant)
            if _op(node) == "Gemm" and index == 2:
                node.attrs.pop("beta", None)
        for node in {id(e.node): e.node for e in self.edits.values()}.values():
            self.graph.absorb(node, replaced)
        for tensor, affine in self.adds.values():
            node = tensor.inputs[0]
            inner = self.graph.new_variable(tensor.name, tensor)
            node.outputs[0] = inner
            _insert(self.graph, "Add", inner, affine.broadcast(_rank(tensor))[1], tensor, [node, *replaced])

    @property
    def absorbers(self) -> str:
        """The ops that took the map in, for people."""
        return " and ".join(dict.fromkeys(e.node.op for e in self.edits.values()))


def _insert(
    graph: Graph, op: str, source: Tensor, value: np.ndarray, target: Tensor, replaces: Sequence[gs.Node]
) -> None:
    constant = graph.new_constant(f"{target.name}_{op.lower()}", value.astype(target.dtype))
    graph.insert(op, [source, constant], [target], replaces=replaces)


def _sinks(old: np.ndarray, new: np.ndarray, dtype: np.dtype) -> bool:
    """True if some channel (index of the first two axes; of a vector, element) becomes subnormal that was not."""
    tiny = float(np.finfo(dtype).tiny)

    def peak(values: np.ndarray, axis: int) -> np.ndarray:
        if values.ndim < 2:
            return np.abs(values)
        others = tuple(a for a in range(values.ndim) if a != axis)
        return np.maximum(values.max(others), -values.min(others))

    old = np.broadcast_to(old, new.shape)
    return any(((peak(new, a) < tiny) & (peak(new, a) > 0) & (peak(old, a) >= tiny)).any() for a in range(2))


_SHAPE_ONLY = ("Shape", "Size")


def _edges(tensor: Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Each reading of a tensor: node and number of its input."""
    for node in {id(n): n for n in tensor.outputs}.values():
        yield from ((node, i) for i, t in enumerate(node.inputs) if t is tensor)


def _readers(tensor: Tensor) -> list[gs.Node]:
    """The nodes that read the values of a tensor, not just its shape; twice if they read it twice."""
    return [n for n in tensor.outputs if _op(n) not in _SHAPE_ONLY]


# -- rules: linear maps and norms ------------------------------------------------------------------------------------


def _linear_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    if _op(node) == "MatMul" and all(push.graph.constant(t) is None for t in node.inputs):
        return _product_backward(push, node, output, affine)
    view = _LINEAR[_op(node)](push.graph, node)
    weight = push.read(node, view.weight)
    taps = view.taps(weight)
    scale, shift = affine.on(view.out_axis, taps.shape[0] * taps.shape[1])
    if affine.scales:
        scaled = taps * scale.reshape(taps.shape[0], -1, 1, 1)
        push.write(node, view.weight, view.stored(scaled, weight.shape), view.weight, scaled=True)
    if view.bias is not None and push.has(node, view.bias):
        push.write(node, view.bias, _bias(push, node, view) * scale + shift, view.weight)
    elif affine.shifts:
        if view.bias is None:
            raise _Refused(f"{where(node)} has no bias to take the shift")
        push.write(node, view.bias, shift, view.weight)
    return None


def _linear_forward(push: _Push, node: gs.Node, index: int, affine: Affine) -> None:
    if _op(node) == "MatMul" and all(push.graph.constant(t) is None for t in node.inputs):
        raise _Refused(f"{where(node)} multiplies two computed tensors")
    view = _LINEAR[_op(node)](push.graph, node)
    if index != view.data:
        raise _Refused(f"it is a weight or bias of {where(node)}")
    weight = push.read(node, view.weight)
    taps = view.taps(weight)
    scale, shift = affine.on(view.in_axis, taps.shape[0] * taps.shape[2])
    if affine.shifts:
        if view.uneven:
            raise _Refused(f"{where(node)}: {view.uneven}")
        added = view.alpha * np.einsum("goik,gi->go", taps, shift.reshape(taps.shape[0], -1)).reshape(-1)
    if affine.scales:
        scaled = taps * scale.reshape(taps.shape[0], 1, -1, 1)
        push.write(node, view.weight, view.stored(scaled, weight.shape), view.weight, scaled=True)
    if not affine.shifts:
        return
    if view.bias is not None and push.has(node, view.bias):
        push.write(node, view.bias, _bias(push, node, view) + added, view.weight)
    elif view.bias is not None:
        push.write(node, view.bias, added, view.weight)
    else:
        rest = Affine.of(view.out_axis, np.ones_like(added), added)
        push.attempt(lambda: push.forward(node.outputs[0], rest), lambda: _plan_add(push, node.outputs[0], rest))


def _bias(push: _Push, node: gs.Node, view: _Linear) -> np.ndarray:
    """The bias as it is added to the output; an edited one has taken Gemm's ``beta`` in."""
    assert view.bias is not None
    edited = (id(node), view.bias) in push.edits
    return push.read(node, view.bias) * (1.0 if edited else view.beta)


def _plan_add(push: _Push, tensor: Tensor, affine: Affine) -> None:
    """Let an Add be inserted after the node that produces ``tensor``."""
    _, before = push.adds.get(id(tensor), (tensor, Affine.of(None, 1.0)))
    both = before.then(affine)
    assert both is not None
    push.adds[id(tensor)] = tensor, both


def _norm_parts(graph: Graph, node: gs.Node) -> tuple[int, int, int]:
    """Inputs that hold gamma and beta, and the axis they act on."""
    gamma, beta, axis = _NORMS[_op(node)]
    rank = _rank(node.inputs[0])
    if _op(node) == "LayerNormalization" and node.attrs.get("axis", -1) not in (-1, rank - 1):
        raise _Refused(f"{where(node)} normalises more than one axis")
    return gamma, beta, axis % rank


def _norm_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    gamma, beta, axis = _norm_parts(push.graph, node)
    if output or node.attrs.get("training_mode", 0):
        raise _Refused(f"{where(node)} is in training mode")
    values = push.read(node, gamma)
    scale, shift = affine.on(axis, values.size)
    push.write(node, gamma, values * scale, gamma, scaled=True)
    if push.has(node, beta):
        push.write(node, beta, push.read(node, beta) * scale + shift, gamma)
    elif affine.shifts:
        push.write(node, beta, shift, gamma)


def _norm_affine(graph: Graph, node: gs.Node) -> Affine | None:
    """The affine map that ends a norm, or None if it is the identity or not constant."""
    if node.op == "BatchNormalization":
        return None
    gamma, beta, axis = _norm_parts(graph, node)
    parameters = [graph.constant(t) for t in node.inputs[gamma : beta + 1] if t.name]
    if not parameters or any(p is None or p.dtype.kind != "f" for p in parameters):
        return None
    affine = Affine.of(axis, *(np.asarray(p, np.float64) for p in parameters))
    return affine if affine.scales or affine.shifts else None


# -- rules: sums, products and constants -----------------------------------------------------------------------------


def _aligned(affine: Affine, tensor: Tensor, result: Tensor) -> Affine:
    """The map on an operand that broadcasts to ``result``."""
    if affine.axis is None:
        return affine
    axis = affine.axis - _rank(result) + _rank(tensor)
    if axis < 0 or (tensor.shape or ())[axis] != affine.scale.size:
        raise _Refused(f"{tensor.name!r} is broadcast along the channels")
    return affine.at(axis)


def _sum_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    """Scale every term; give the shift to a constant, else to the first term that can take it."""
    result = node.outputs[0]
    rank = 0 if affine.axis is None else _rank(result)
    constant = [push.graph.constant(t) is not None for t in node.inputs]
    signs = [-1.0 if _op(node) == "Sub" and i else 1.0 for i in range(len(constant))]
    order = sorted(range(len(constant)), key=lambda i: not constant[i])
    scale, shift = affine.broadcast(rank)
    if affine.scales:
        for i in order:
            if constant[i]:
                push.write(node, i, push.read(node, i) * scale, i)
            else:
                push.backward(node.inputs[i], _aligned(affine.scale_only, node.inputs[i], result))

    def give(i: int) -> None:
        if constant[i]:
            push.write(node, i, push.read(node, i) + signs[i] * shift, i)
        else:
            signed = Affine.of(affine.axis, np.ones_like(affine.scale), signs[i] * affine.shift)
            push.backward(node.inputs[i], _aligned(signed, node.inputs[i], result))

    if affine.shifts:
        push.attempt(*[lambda i=i: give(i) for i in order])


def _product_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    """Scale one operand of a product (the numerator of a quotient)."""
    if affine.shifts:
        raise _Refused(f"a shift cannot pass {where(node)}")
    result, operands = node.outputs[0], node.inputs[:1] if _op(node) == "Div" else node.inputs[:2]
    constants = [i for i, t in enumerate(operands) if push.graph.constant(t) is not None]
    if _op(node) != "MatMul":
        if constants:
            i = constants[0]
            scale, _ = affine.broadcast(0 if affine.axis is None else _rank(result))
            return push.write(node, i, push.read(node, i) * scale, i, scaled=True)
        return push.attempt(*[lambda t=t: push.backward(t, _aligned(affine, t, result)) for t in operands])
    if affine.axis is None:
        return push.attempt(*[lambda t=t: push.backward(t, affine) for t in operands])
    side = affine.axis - _rank(result) + 2  # 0: rows of the first, 1: columns of the second
    if side not in (0, 1) or min(map(_rank, operands)) < 2:
        raise _Refused(f"{where(node)} multiplies a matrix per channel")
    return push.backward(operands[side], affine.at(_rank(operands[side]) - 2 + side))


def _sum_forward(push: _Push, node: gs.Node, index: int, affine: Affine) -> None:
    """A constant term takes a shift."""
    other = 1 - index
    if push.graph.constant(node.inputs[other]) is None:
        raise _Refused(f"{where(node)} adds two computed tensors", near=False)
    if affine.scales:
        raise _Refused(f"a scale cannot pass {where(node)}")
    sign = -1.0 if _op(node) == "Sub" else 1.0  # x - c and c - x alike: (x + t) - c = x - (c - t)
    _, shift = affine.broadcast(_rank(node.inputs[index]))
    push.write(node, other, push.read(node, other) + sign * shift, other)


# -- rules: what moves, selects or averages elements -----------------------------------------------------------------


def _transpose(node: gs.Node, affine: Affine, back: bool) -> Affine:
    rank = _rank(node.inputs[0])
    order = list(node.attrs.get("perm", range(rank)[::-1]))
    if affine.axis is None:
        return affine
    return affine.at(order[affine.axis] if back else order.index(affine.axis))


def _reshape(node: gs.Node, affine: Affine, back: bool) -> Affine:
    shapes = node.inputs[0].shape, node.outputs[0].shape
    if affine.axis is None:
        return affine
    if shapes[0] is None or shapes[1] is None:
        raise _Refused(f"a shape of {where(node)} is unknown")
    moved = _regroup(affine, *(shapes[::-1] if back else shapes))
    if moved is None:
        raise _Refused(f"{where(node)} splits or mixes the channels")
    return moved


def _regroup(affine: Affine, source: Sequence[Dim], target: Sequence[Dim]) -> Affine | None:
    """The map after a reshape from ``source`` to ``target``, or None if it then varies along several axes.

    A reshape keeps the row-major order, so that dimensions fall into groups of equal size on both sides. A dimension
    that is not known can only stand alone.
    """
    axis = affine.axis
    assert axis is not None
    for left in (True, False):
        a, b = (list(source), list(target)) if left else (list(source)[::-1], list(target)[::-1])
        at = axis if left else len(a) - 1 - axis
        for members, others in _groups(a, b):
            if at not in members:
                continue
            if not left:
                members, others = [len(a) - 1 - i for i in members][::-1], [len(b) - 1 - i for i in others][::-1]
            if len(members) == len(others) == 1:
                return affine.at(others[0])
            sizes = [int(source[i] or 0) for i in members]
            form = [2, *(n if i == axis else 1 for i, n in zip(members, sizes, strict=True))]
            pairs = np.broadcast_to(np.stack([affine.scale, affine.shift]).reshape(form), [2, *sizes])
            pairs = pairs.reshape(2, *(int(target[j] or 0) for j in others))
            varied = [k for k in range(1, pairs.ndim) if (pairs != pairs.take([0], k)).any()]
            if len(varied) > 1:
                return None
            scale, shift = pairs[(slice(None), *(slice(None) if k in varied else 0 for k in range(1, pairs.ndim)))]
            return Affine.of(others[varied[0] - 1] if varied else None, scale, shift)
    return None


def _groups(a: list[Dim], b: list[Dim]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dimensions of equal product, from the first dimension on, as far as that is known."""
    i = j = 0
    while i < len(a) and j < len(b):
        start = i, j
        p, q = a[i], b[j]
        i, j = i + 1, j + 1
        while p != q or p is None:
            grow_a = isinstance(p, int) and isinstance(q, int) and p < q
            dims, k = (a, i) if grow_a else (b, j)
            if not (isinstance(p, int) and isinstance(q, int) and k < len(dims) and isinstance(dims[k], int)):
                return
            factor = int(dims[k] or 0)
            p, q, i, j = (p * factor, q, i + 1, j) if grow_a else (p, q * factor, i, j + 1)
        yield list(range(start[0], i)), list(range(start[1], j))


def _average(node: gs.Node, affine: Affine, back: bool) -> Affine:
    """A mean over other axes keeps scale and shift."""
    if affine.axis is None:
        return affine
    rank = _rank(node.inputs[0])
    axes = _axes(node)
    if axes is None:
        raise _Refused(f"the axes of {where(node)} are not known")
    reduced = {a % rank for a in axes} or set(range(rank))
    kept = [a for a in range(rank) if a not in reduced]
    places = list(range(rank)) if node.attrs.get("keepdims", 1) else kept
    axis = places[affine.axis] if back else affine.axis
    if axis not in kept:
        raise _Refused(f"{where(node)} averages over the channels")
    return affine.at(axis if back else places.index(axis))


def _axes(node: gs.Node) -> list[int] | None:
    """The axes a reduction names; empty if it names none."""
    if _op(node) == "GlobalAveragePool":
        return list(range(2, _rank(node.inputs[0])))
    if len(node.inputs) > 1 and node.inputs[1].name:
        tensor = node.inputs[1]
        return [int(a) for a in tensor.values] if isinstance(tensor, gs.Constant) else None
    if node.attrs.get("noop_with_empty_axes", 0) and not node.attrs.get("axes"):
        return None
    return list(node.attrs.get("axes", ()))


# What moves or averages elements: the map on the other side of it.
_MOVES: dict[str, Callable[[gs.Node, Affine, bool], Affine]] = {
    "Identity": lambda node, affine, back: affine,
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("ReduceMean", "GlobalAveragePool"), _average),
}


def _move_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    push.backward(node.inputs[0], _MOVES[_op(node)](node, affine, True))


def _move_forward(push: _Push, node: gs.Node, index: int, affine: Affine) -> None:
    if index:
        raise _Refused(f"{where(node)} reads it as a shape")
    push.forward(node.outputs[0], _MOVES[_op(node)](node, affine, False))


@dataclass(frozen=True)
class _Selection:
    """Which elements along an axis the outputs of a Split, Slice or Gather hold.

    Attributes:
        axis: the axis of the input.
        parts: the indices for each output; None if the extent of the axis is not known.
        drops: the axis is gone from the output (Gather of one index).
    """

    axis: int
    parts: list[np.ndarray] | None
    drops: bool = False


def _split(graph: Graph, node: gs.Node) -> _Selection:
    axis = node.attrs.get("axis", 0) % _rank(node.inputs[0])
    return _Selection(axis, _runs(node.outputs, axis))


def _runs(tensors: Sequence[Tensor], axis: int) -> list[np.ndarray] | None:
    """The indices that each tensor has in their concatenation along an axis; None if an extent is not known."""
    parts, start = [], 0
    for tensor in tensors:
        size = None if tensor.shape is None else tensor.shape[axis]
        if not isinstance(size, int):
            return None
        parts.append(np.arange(start, start + size))
        start += size
    return parts


def _slice(graph: Graph, node: gs.Node) -> _Selection:
    values = [graph.constant(t) if t.name else None for t in node.inputs[1:]]
    if len(values) < 3 or any(v is None for v in values[:3]):
        raise _Refused(f"the bounds of {where(node)} are not constants")
    starts, ends, axes = values[0], values[1], values[2]
    step = values[3] if len(values) > 3 else np.ones(1, np.int64)
    assert starts is not None and ends is not None and axes is not None
    if step is None or len(axes) != 1:
        raise _Refused(f"{where(node)} slices several axes")
    axis = int(axes[0]) % _rank(node.inputs[0])
    size = (node.inputs[0].shape or ())[axis]
    if not isinstance(size, int):
        return _Selection(axis, None)
    return _Selection(axis, [np.arange(size)[slice(int(starts[0]), int(ends[0]), int(step[0]))]])


def _gather(graph: Graph, node: gs.Node) -> _Selection:
    axis = node.attrs.get("axis", 0) % _rank(node.inputs[0])
    indices = graph.constant(node.inputs[1])
    size = (node.inputs[0].shape or ())[axis]
    if indices is None or indices.ndim > 1 or len(set(indices.reshape(-1).tolist())) != indices.size:
        raise _Refused(f"the indices of {where(node)} are not a constant list without repetition")
    parts = [indices.reshape(-1) % size] if isinstance(size, int) else None
    return _Selection(axis, parts, drops=indices.ndim == 0)


_SELECTS: dict[str, Callable[[Graph, gs.Node], _Selection]] = {"Split": _split, "Slice": _slice, "Gather": _gather}


def _select_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    """The map goes to the selected elements of the input; all others must be free to stay."""
    source, chosen = node.inputs[0], _SELECTS[_op(node)](push.graph, node)
    if chosen.drops and affine.axis is not None:
        affine = affine.at(affine.axis + (affine.axis >= chosen.axis))
    others = [t for i, t in enumerate(node.outputs) if i != output]
    alone = len(_readers(source)) == 1 and not any(push.exposed(t) or _readers(t) for t in others)
    if alone and affine.axis != chosen.axis:
        return push.backward(source, affine)
    if affine.axis not in (None, chosen.axis):
        raise _Refused(f"{where(node)} leaves other parts of its input to a second consumer")
    if chosen.parts is None:
        raise _Refused(f"the extent that {where(node)} selects from is not known")
    mine, size = chosen.parts[output], (source.shape or ())[chosen.axis]
    for reader in _readers(source):
        if reader is node:
            continue
        other = _SELECTS[_op(reader)](push.graph, reader) if _op(reader) in _SELECTS else None
        apart = other is not None and other.axis == chosen.axis and other.parts is not None
        if not apart or any(np.intersect1d(mine, part).size for part in other.parts):  # type: ignore[union-attr]
            raise _Refused(f"the input of {where(node)} has a second consumer")
    if push.exposed(source):
        raise _Refused(f"{source.name!r} is an output of the model")
    scale, shift = np.ones(int(size or 0)), np.zeros(int(size or 0))
    scale[mine], shift[mine] = affine.scale, affine.shift
    return push.backward(source, Affine.of(chosen.axis, scale, shift), owned=True)


def _select_forward(push: _Push, node: gs.Node, index: int, affine: Affine) -> None:
    chosen = _SELECTS[_op(node)](push.graph, node)
    if index:
        raise _Refused(f"{where(node)} reads it as indices")
    for output, tensor in enumerate(node.outputs):
        part = affine
        if affine.axis == chosen.axis:
            if chosen.parts is None:
                raise _Refused(f"the extent that {where(node)} selects from is not known")
            part = affine.take(chosen.parts[output])
        if chosen.drops and part.axis is not None:
            part = part.at(part.axis - (part.axis > chosen.axis))
        push.forward(tensor, part)


def _concat_backward(push: _Push, node: gs.Node, output: int, affine: Affine) -> None:
    axis = node.attrs["axis"] % _rank(node.outputs[0])
    ranges = _runs(node.inputs, axis)
    for i, tensor in enumerate(node.inputs):
        part = affine
        if affine.axis == axis:
            if ranges is None:
                raise _Refused(f"the extents that {where(node)} joins are not known")
            part = affine.take(ranges[i])
        if push.graph.constant(tensor) is None:
            push.backward(tensor, part)
        else:
            scale, shift = part.broadcast(_rank(tensor))
            push.write(node, i, push.read(node, i) * scale + shift, i)


def _concat_forward(push: _Push, node: gs.Node, index: int, affine: Affine) -> None:
    axis = node.attrs["axis"] % _rank(node.outputs[0])
    ranges = _runs(node.inputs, axis)
    if ranges is None or affine.axis not in (None, axis):
        raise _Refused(f"{where(node)} joins it with what is not scaled")
    total = sum(r.size for r in ranges)
    scale, shift = np.ones(total), np.zeros(total)
    scale[ranges[index]], shift[ranges[index]] = affine.scale, affine.shift
    push.forward(node.outputs[0], Affine.of(axis, scale, shift))


_Rule = Callable[[_Push, gs.Node, int, Affine], None]

# How a node absorbs or hands on a map on its output ...
_BACKWARD: dict[str, _Rule] = {
    **dict.fromkeys(_LINEAR, _linear_backward),
    **dict.fromkeys(_NORMS, _norm_backward),
    **dict.fromkeys(("Add", "Sub", "Sum"), _sum_backward),
    **dict.fromkeys(("Mul", "Div"), _product_backward),
    **dict.fromkeys(_MOVES, _move_backward),
    **dict.fromkeys(_SELECTS, _select_backward),
    "Concat": _concat_backward,
}

# ... and on its input.
_FORWARD: dict[str, _Rule] = {
    **dict.fromkeys(_LINEAR, _linear_forward),
    **dict.fromkeys(("Add", "Sub"), _sum_forward),
    **dict.fromkeys(_MOVES, _move_forward),
    **dict.fromkeys(_SELECTS, _select_forward),
    "Concat": _concat_forward,
}


# -- the sweep -------------------------------------------------------------------------------------------------------


class _Sweep:
    """One walk over the graph in each direction; afterwards ``notes`` says what was left alone, and why."""

    def __init__(self, graph: Graph, context: Context):
        self.graph = graph
        self.context = context
        self.pinned = {id(t) for t in graph.outputs} | {id(t) for n in graph.nodes for t in _subgraph_reads(n)}
        self.refusals: dict[int, tuple[gs.Node, list[_Refused]]] = {}
        self.changed = False

    def run(self) -> bool:
        """True if something was folded."""
        for node in self._starts():
            self._try(self._fold_backward, node)
        self.graph.tidy()
        for node in reversed(self._starts()):
            self._try(self._fold_forward, node)
        for node in reversed(self.graph.nodes):
            if _op(node) in _NORMS:
                self._try(self._fold_norm, node)
        self.graph.tidy()
        for node in self._starts():
            self._try(self._merge, node)
        return self.changed

    @property
    def notes(self) -> Iterator[tuple[gs.Node, str]]:
        """A node and why it was not folded, where that says something: it is a norm, or a linear map is near."""
        for node, refusals in self.refusals.values():
            if node.op == "BatchNormalization" or (any(r.near for r in refusals) and not _is_bias(self.graph, node)):
                yield node, "skipped: " + "; ".join(dict.fromkeys(map(str, refusals)))

    def _try(self, fold: Callable[[gs.Node], None], node: gs.Node) -> None:
        if node.outputs:  # else an earlier fold has removed it
            try:
                fold(node)
            except _Refused as refused:
                self.refusals.setdefault(id(node), (node, []))[1].append(refused)

    def _rewrite(self, what: str, node: gs.Node) -> None:
        if not self.context.rewrite(what, node):
            raise _LimitReached
        self.changed = True
        self.refusals.pop(id(node), None)

    def _starts(self) -> list[gs.Node]:
        """The first node of each chain, in graph order."""
        starts, inside = [], set()
        for node in self.graph.nodes:
            if id(node) in inside:
                continue
            try:
                unit = self._unit(node)
            except _Refused as refused:
                self.refusals[id(node)] = node, [refused]
                continue
            if unit is not None:
                starts.append(node)
                inside.update(map(id, unit.nodes))
        return starts

    def _unit(self, node: gs.Node) -> _Unit | None:
        """The longest chain that begins at a node, or None if the node is no affine map."""
        unit = _affine_node(self.graph, node)
        if unit is None:
            return None
        nodes, affine = [node], unit.affine
        while len(readers := nodes[-1].outputs[0].outputs) == 1 and id(nodes[-1].outputs[0]) not in self.pinned:
            try:
                following = _affine_node(self.graph, readers[0])
            except _Refused:
                break
            if following is None or following.source is not nodes[-1].outputs[0]:
                break
            both = affine.then(following.affine)
            if both is None:
                break
            nodes.append(readers[0])
            affine = both
        return _Unit(tuple(nodes), unit.source, affine)

    def _chain(self, node: gs.Node) -> _Unit:
        unit = self._unit(node)
        if unit is None:
            raise _Refused("its operand is not a constant", near=False)
        return unit

    def _fold_backward(self, node: gs.Node) -> None:
        unit, rest = self._chain(node), None
        if not (unit.affine.scales or unit.affine.shifts):
            raise _Refused("it is the identity", near=False)
        push = _Push(self.graph, self.pinned)
        try:
            push.backward(unit.source, unit.affine)
        except _Refused:
            if not (unit.affine.scales and unit.affine.shifts and unit.cost > 1):
                raise
            # A linear map without a bias takes the scale; the shift stays behind as one Add.
            push, rest = _Push(self.graph, self.pinned), unit.affine.shift_only
            push.backward(unit.source, unit.affine.scale_only)
        push.check()
        self._rewrite(f"{unit.label} into {push.absorbers}", node)
        push.commit(unit.nodes)
        source, target = unit.source, unit.target
        if rest is not None:
            _insert(self.graph, "Add", source, rest.broadcast(_rank(source))[1], target, unit.nodes)
        disconnect(unit.nodes)
        if rest is not None:
            return
        for reader, index in list(_edges(source)):
            reader.inputs[index] = target
        producer = source.inputs[0]
        producer.outputs[next(i for i, t in enumerate(producer.outputs) if t is source)] = target

    def _fold_forward(self, node: gs.Node) -> None:
        unit = self._chain(node)
        push = _Push(self.graph, self.pinned)
        try:
            push.forward(unit.target, unit.affine)
        except _Refused:
            # The scales that end a chain may pass where its shift cannot.
            unit = self._trailing_scales(unit)
            if unit is None:
                raise
            push = _Push(self.graph, self.pinned)
            push.forward(unit.target, unit.affine)
        if len(push.adds) >= unit.cost:
            raise _Refused("the linear map after it has no bias to take the shift")
        push.check()
        self._rewrite(f"{unit.label} into the next {push.absorbers}", node)
        push.commit(unit.nodes)
        for reader, index in list(_edges(unit.target)):
            reader.inputs[index] = unit.source
        disconnect(unit.nodes)

    def _trailing_scales(self, unit: _Unit) -> _Unit | None:
        """The end of a chain that has no shift; None if that is all of it or nothing."""
        start = len(unit.nodes)
        while start and (last := _affine_node(self.graph, unit.nodes[start - 1])) and not last.affine.shifts:
            start -= 1
        return self._unit(unit.nodes[start]) if 0 < start < len(unit.nodes) else None

    def _fold_norm(self, node: gs.Node) -> None:
        """Gamma and beta of a norm that must stay go into what follows it; 1 and 0 stay behind."""
        affine = _norm_affine(self.graph, node)
        if affine is None:
            return
        push = _Push(self.graph, self.pinned)
        push.forward(node.outputs[0], affine)
        if push.adds:
            raise _Refused("the linear map after it has no bias to take the shift")
        absorbers = push.absorbers
        gamma, beta, _ = _NORMS[_op(node)]
        push.write(node, gamma, np.ones_like(push.read(node, gamma)), gamma)
        if push.has(node, beta):
            push.write(node, beta, np.zeros_like(push.read(node, beta)), beta)
        push.check(copy_limit=0)  # no node goes, so that a copy would only cost
        self._rewrite(f"gamma and beta into the next {absorbers}", node)
        push.commit(())

    def _merge(self, node: gs.Node) -> None:
        """Shorten a chain that must stay to one Mul and one Add."""
        unit = self._chain(node)
        scale, shift = unit.affine.broadcast(_rank(unit.source))
        parts = [("Mul", scale, unit.affine.scales), ("Add", shift, unit.affine.shifts)]
        needed = [(op, value) for op, value, need in parts if need]
        if not 0 < len(needed) < len(unit.nodes):
            return
        with np.errstate(over="ignore"):
            if not all(np.isfinite(value.astype(unit.target.dtype)).all() for _, value in needed):
                raise _Refused(f"the constants of the chain would overflow {unit.target.dtype}")
        self._rewrite(f"chain of {len(unit.nodes)} into {' and '.join(op for op, _ in needed)}", node)
        source, target = unit.source, unit.target
        for op, value in needed:
            result = target if op == needed[-1][0] else self.graph.new_variable(target.name, target)
            _insert(self.graph, op, source, value, result, unit.nodes)
            source = result
        disconnect(unit.nodes)


def _subgraph_reads(node: gs.Node) -> Iterator[Tensor]:
    """Tensors that the subgraphs of a node read or return."""
    for subgraph in (v for v in node.attrs.values() if isinstance(v, gs.Graph)):
        yield from subgraph.outputs
        for inner in subgraph.nodes:
            yield from inner.inputs
            yield from _subgraph_reads(inner)


def _is_bias(graph: Graph, node: gs.Node) -> bool:
    """True if a node is the bias of a MatMul: there is no better place for it."""
    before = [p for p in map(graph.producer, node.inputs) if p is not None]
    return node.op == "Add" and any(_op(p) == "MatMul" for p in before)
