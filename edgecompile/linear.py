"""ONNX nodes read as affine maps, and what they cost.

:mod:`edgecompile.affine` knows no ONNX; this is the bridge. A :class:`Step` is one node as a map from one tensor to
another, a :class:`Path` a sequence of such. Both say which axis of the tensors holds the channels, so that the same
algebra serves images ``[N, C, H, W]`` and tokens ``[N, L, C]`` or ``[N, C, L]``, and how the axes are permuted on the
way, so that a Transpose, or a Reshape that only adds and drops axes of extent 1, costs nothing but its own node. A
:class:`Scaling` is one pair of scale and shift per index of an axis, a :class:`Layer` a node that stores a map. What is
read here, :mod:`edgecompile.linear_write` writes back.

Preconditions are proved on shapes and constants. A reader returns None for a node that is not affine in one of its
inputs, and raises :class:`~edgecompile.affine.Refusal` for one that is but cannot be expressed; the text says why.

Source: the ONNX operator specification (https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import affine
from edgecompile.affine import Affine, Refusal
from edgecompile.graph import Dim, Graph, Tensor, where

# What a node costs besides its multiply-accumulates, in units of one of them: writing an element, and starting at all.
PER_ELEMENT = 2
PER_NODE = 2000
# Extents that are not known count as this (the batch as 1); cost compares nodes of the same graph only.
_NOMINAL = 32

_FLOATS = (np.float16, np.float32, np.float64)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization")


@dataclass(frozen=True, eq=False)
class Step:
    """One node as an affine map.

    Attributes:
        node: the node.
        entry: the tensor that it maps.
        axis: channel axis of ``entry``.
        order: axis ``i`` of the output is axis ``order[i]`` of ``entry``, or a new one of extent 1 if that is -1; what
            is left out of ``entry`` has extent 1.
        build: makes the map; it has rank 0 if the node acts on the channels alone.
    """

    node: gs.Node
    entry: Tensor
    axis: int
    order: tuple[int, ...]
    build: Callable[[], Affine]


@dataclass(frozen=True, eq=False)
class Path:
    """A map from ``entry`` through nodes; ``axis``, ``order`` and ``map`` as for :class:`Step`."""

    entry: Tensor
    axis: int
    order: tuple[int, ...]
    map: Affine

    @property
    def exit_axis(self) -> int:
        """Channel axis of the exit."""
        return self.order.index(self.axis)

    @property
    def extents(self) -> list[int | None]:
        """Spatial extents of the entry, None where unknown; none for a map of rank 0."""
        return [n if isinstance(n, int) else None for n in (self.entry.shape or ())[2:]] if self.map.rank else []

    def lifted(self, rank: int) -> Path:
        """The same map with ``rank`` spatial axes.

        Raises:
            Refusal: the channels are not on axis 1, the axes are permuted on the way, or (to rank 0) it does not act on
                the channels alone.
        """
        if self.map.rank == rank:
            return self
        if rank and (self.axis != 1 or not self.straight):
            raise Refusal("its channels lie on another axis than those of a convolution")
        if not self.map.is_pointwise:
            raise Refusal(f"the axes are permuted after a {self.map}")
        ones, zeros = (1,) * rank, (0,) * rank
        taps = np.zeros((len(self.map.taps), rank), int)
        return replace(self, map=replace(self.map, taps=taps, stride=ones, up=ones, grow=zeros))

    @property
    def straight(self) -> bool:
        """True if the exit has the axes of the entry, in their order."""
        return self.order == in_order(self.entry)

    def then(self, outer: Path, limit: int = affine.LIMIT) -> Path:
        """This path followed by ``outer``, whose entry is this path's exit.

        Raises:
            Refusal: the composition is no such map, or its kernel would have more than ``limit`` elements.
        """
        rank = max(self.map.rank, outer.map.rank) if self.straight and outer.straight else 0
        inner, outer = self.lifted(rank), outer.lifted(rank)
        if self.exit_axis != outer.axis:
            raise Refusal("two maps act on different axes")
        order = tuple(-1 if i < 0 else inner.order[i] for i in outer.order)
        return Path(inner.entry, inner.axis, order, affine.compose(outer.map, inner.map, inner.extents, limit))

    def plus(self, other: Path) -> Path:
        """The sum of two paths with the same entry and exit.

        Raises:
            Refusal: they differ in stride, extents, channels or order of the axes.
        """
        if (self.axis, self.order) != (other.axis, other.order):
            raise Refusal("two maps in parallel order the axes differently")
        if self.map.outputs != other.map.outputs:
            raise Refusal("two maps in parallel differ in channels")
        rank = max(self.map.rank, other.map.rank)
        one, two = self.lifted(rank), other.lifted(rank)
        return replace(one, map=affine.add(one.map, two.map, one.extents))

    def scaled(self, factor: float) -> Path:
        """This path times a number."""
        return replace(self, map=replace(self.map, kernel=self.map.kernel * factor, bias=self.map.bias * factor))


def identity(tensor: Tensor, axis: int) -> Path:
    """The path of no step.

    Raises:
        Refusal: the number of channels is unknown.
    """
    return Path(tensor, axis, in_order(tensor), affine.identity(channels(tensor, axis)))


def path(steps: Sequence[Step], limit: int = affine.LIMIT) -> Path:
    """Steps from the exit back to the entry, one or more, as one path.

    Raises:
        Refusal: as for :meth:`Path.then`.
    """
    made = None
    for step in steps:
        one = Path(step.entry, step.axis, step.order, step.build())
        made = one if made is None else one.then(made, limit)
    assert made is not None
    return made


def channels(tensor: Tensor, axis: int) -> int:
    """The number of channels of a tensor of floats.

    Raises:
        Refusal: it is unknown, or the tensor holds something else.
    """
    if tensor.shape is None or not -len(tensor.shape) <= axis < len(tensor.shape):
        raise Refusal(f"the shape of {tensor.name!r} is unknown")
    if not isinstance(tensor.shape[axis], int):
        raise Refusal(f"the number of channels of {tensor.name!r} is dynamic")
    if not _floats(tensor):
        raise Refusal(f"{tensor.name!r} does not hold float16, float32 or float64")
    return tensor.shape[axis]


# -- reading ---------------------------------------------------------------------------------------------------------


def op(node: gs.Node) -> str:
    """The op of a node of the default domain, else a name that no table has."""
    return node.op if not node.domain or node.domain == "ai.onnx" else f"{node.domain}.{node.op}"


def read(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step | None:
    """``node`` as an affine map to ``output`` with its channels on ``axis``; None if it is none.

    Raises:
        Refusal: it is one, but not in the form of :class:`~edgecompile.affine.Affine`.
    """
    reader = _READERS.get(op(node))
    if reader is None or not is_affine(graph, node):
        return None
    channels(output, axis)
    step = reader(graph, node, output, axis)
    channels(step.entry, step.axis)
    return step


def is_affine(graph: Graph, node: gs.Node) -> bool:
    """True if the op of a node is affine in its only input that is not a constant."""
    if op(node) in _ELEMENTWISE:
        return sum(graph.constant(t) is None for t in node.inputs) == 1
    if op(node) == "MatMul":
        return any(graph.constant(t) is not None for t in node.inputs)
    return op(node) in _READERS and (op(node) not in MOVES or _moved(node) is not None)


def natural_axis(graph: Graph, tensor: Tensor, depth: int = 8) -> int | None:
    """The axis that the node which computes a tensor, or one shortly before it, takes for the channels."""
    node = graph.producer(tensor)
    if node is None or not depth or tensor.shape is None or not is_affine(graph, node):
        return None
    if op(node) in _CHANNELS_FIRST:
        return 1
    if op(node) == "MatMul":
        return len(tensor.shape) - (1 if graph.constant(node.inputs[0]) is None else 2)
    if op(node) in _ELEMENTWISE:
        source, values, _ = _operands(graph, node)
        varied = [i for i, n in enumerate(values.shape, len(tensor.shape) - values.ndim) if n != 1]
        return varied[0] if len(varied) == 1 else natural_axis(graph, source, depth - 1)
    before = natural_axis(graph, node.inputs[0], depth - 1)
    if op(node) not in MOVES or before is None:
        return before
    order = _moved(node)
    return order.index(before) if order is not None and before in order else None


def in_order(tensor: Tensor) -> tuple[int, ...]:
    """The order of axes, as in :class:`Step`, that leaves a tensor as it is."""
    return tuple(range(len(tensor.shape or ())))


def constant(graph: Graph, node: gs.Node, index: int) -> np.ndarray:
    """A constant input of floats, as it is stored.

    Raises:
        Refusal: it is something else.
    """
    value = graph.constant(node.inputs[index])
    if value is None or value.dtype.kind != "f":
        raise Refusal(f"{node.inputs[index].name!r} of {where(node)} is not a constant of floats")
    return value


def given(node: gs.Node, index: int) -> bool:
    """True if an optional input is given."""
    return index < len(node.inputs) and bool(node.inputs[index].name)


def rank(tensor: Tensor) -> int:
    """The number of axes of a tensor.

    Raises:
        Refusal: it is unknown.
    """
    if tensor.shape is None:
        raise Refusal(f"the rank of {tensor.name!r} is unknown")
    return len(tensor.shape)


def _listed(graph: Graph, node: gs.Node, index: int) -> np.ndarray | None:
    """An input that lists integers; None if it is not given.

    Raises:
        Refusal: it is computed.
    """
    if not given(node, index):
        return None
    if (value := graph.constant(node.inputs[index])) is None:
        raise Refusal(f"{node.inputs[index].name!r} of {where(node)} is not a constant")
    return value


def _first(axis: int) -> None:
    if axis != 1:
        raise Refusal("its channels are on axis 1, those wanted elsewhere")


# -- reading: nodes that store a map ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that keeps a map in constant inputs: a linear layer, or a norm, which ends in a scale and a shift.

    Attributes:
        graph, node: the node and its graph.
        weight, bias: numbers of its inputs; ``bias`` None if the op has none.
        axis, exit_axis: channel axis of what it maps and of its output.
        map: reads the map, without the bias.
        store: the weight, in float64, of a map that differs from :attr:`map` in values only.
        beta: factor of the bias.
        unsure: why ``map`` may be wrong about the border, or ``""``.
    """

    graph: Graph
    node: gs.Node
    weight: int
    bias: int | None
    axis: int
    exit_axis: int
    map: Callable[[], Affine]
    store: Callable[[Affine], np.ndarray]
    beta: float = 1.0
    unsure: str = ""

    def offset(self) -> np.ndarray | None:
        """The bias as it is added, in float64, to broadcast against [..., C_out]; None if there is none.

        Raises:
            Refusal: it is not constant.
        """
        if self.bias is None or not given(self.node, self.bias):
            return None
        return self.beta * constant(self.graph, self.node, self.bias).astype(np.float64)

    def whole(self) -> Affine:
        """The map with its bias.

        Raises:
            Refusal: the bias varies along another axis than the channels.
        """
        made, bias = self.map(), self.offset()
        if bias is None:
            return made
        if bias.size not in (1, (bias.shape or (1,))[-1]):
            raise Refusal("its bias varies along another axis than the channels")
        return replace(made, bias=np.broadcast_to(bias.reshape(-1), (made.outputs,)))


def _pads(node: gs.Node, window: Sequence[int]) -> list[int] | None:
    """Explicit pads of a window that slides; None for none."""
    auto = node.attrs.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto == "NOTSET":
        return node.attrs.get("pads")
    if auto == "VALID":
        return None
    strides, dilations = (node.attrs.get(k) or [1] * len(window) for k in ("strides", "dilations"))
    if any(s != 1 for s in strides):
        raise Refusal(f"its padding {auto} depends on the extents")
    total = [(k - 1) * d for k, d in zip(window, dilations, strict=True)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*small, *large] if auto == "SAME_UPPER" else [*large, *small]


def _conv(graph: Graph, node: gs.Node) -> Layer:
    stored = constant(graph, node, 1)
    window, transposed = stored.shape[2:], op(node) == "ConvTranspose"
    pads, unsure = node.attrs.get("pads"), ""
    if not transposed:
        try:
            pads = _pads(node, window)
        except Refusal as refusal:
            unsure = str(refusal)
    elif "output_shape" in node.attrs or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        unsure = "its padding depends on the extents"
    dilations, group = node.attrs.get("dilations"), node.attrs.get("group", 1)
    keys = ("strides", "output_padding") if transposed else ("strides",)
    others = {k: node.attrs.get(k) for k in keys} | {"pads": pads, "dilations": dilations, "group": group}
    make = affine.conv_transpose if transposed else affine.conv

    def store(made: Affine) -> np.ndarray:
        return made.weight(op(node), window, pads, dilations, group)

    return Layer(graph, node, 1, 2, 1, 1, lambda: make(stored, **others), store, unsure=unsure)


def _gemm(graph: Graph, node: gs.Node) -> Layer:
    stored, flipped = constant(graph, node, 1), not node.attrs.get("transB", 0)
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)

    def build() -> Affine:
        return affine.matrix(alpha * (stored.T if flipped else stored).astype(np.float64))

    def store(made: Affine) -> np.ndarray:
        dense = made.as_matrix()[0] / alpha
        return dense.T if flipped else dense

    return Layer(graph, node, 1, 2, int(not node.attrs.get("transA", 0)), 1, build, store, beta)


def _matmul(graph: Graph, node: gs.Node) -> Layer:
    weight = int(graph.constant(node.inputs[0]) is None)
    if rank(node.inputs[weight]) != 2:
        raise Refusal(f"the weight of {where(node)} is not a matrix")
    axis = rank(node.inputs[1 - weight]) - (1 if weight else 2)  # x W acts on the last axis, W x on the one before
    if axis < 0:
        raise Refusal(f"{where(node)} multiplies a vector")
    stored = constant(graph, node, weight)

    def store(made: Affine) -> np.ndarray:
        dense = made.as_matrix()[0]
        return dense.T if weight else dense

    return Layer(graph, node, weight, None, axis, axis, lambda: affine.matrix(stored.T if weight else stored), store)


def _norm(graph: Graph, node: gs.Node) -> Layer:
    size = rank(node.inputs[0])
    axis = size - 1 if op(node) == "LayerNormalization" else 1
    if op(node) == "LayerNormalization" and node.attrs.get("axis", -1) % size != axis:
        raise Refusal(f"{where(node)} normalises more than one axis")
    gamma = constant(graph, node, 1)
    return Layer(graph, node, 1, 2, axis, axis, lambda: affine.scale(gamma), lambda made: made.kernel[0, :, 0])


_LAYERS: dict[str, Callable[[Graph, gs.Node], Layer]] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "Gemm": _gemm,
    "MatMul": _matmul,
    **dict.fromkeys(NORMS, _norm),
}


def layer(graph: Graph, node: gs.Node) -> Layer:
    """A node that stores a map: one of :data:`LINEAR` or :data:`NORMS`.

    Raises:
        Refusal: it is one whose map cannot be expressed, or is not constant.
    """
    return _LAYERS[op(node)](graph, node)


def _linear(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    made = layer(graph, node)
    if axis != made.exit_axis:
        raise Refusal("it acts on another axis than the channels")
    if made.unsure:
        raise Refusal(made.unsure)
    if made.bias is not None and given(node, made.bias):
        constant(graph, node, made.bias)
    source = node.inputs[1 - made.weight]
    order = in_order(output) if made.axis == axis else (1, 0)  # Gemm may transpose what it maps
    return Step(node, source, made.axis, order, made.whole)


# -- reading: one pair of scale and shift per channel ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scaling:
    """The map ``y = scale * x + shift`` with one pair per index of one axis of ``x``.

    Attributes:
        axis: the axis; None if all pairs are equal.
        map: the map on the indices of the axis, of rank 0; on a single channel if ``axis`` is None.
    """

    axis: int | None
    map: Affine

    @classmethod
    def of(cls, axis: int | None, scale: object, shift: object = 0.0) -> Scaling:
        """The map with these pairs; equal pairs are recognised.

        Raises:
            Refusal: a constant is not finite.
        """
        arrays = (np.atleast_1d(np.asarray(v, np.float64)) for v in (scale, shift))
        scale, shift = np.broadcast_arrays(*arrays)
        if scale.size and (scale == scale[0]).all() and (shift == shift[0]).all():
            axis, scale, shift = None, scale[:1], shift[:1]
        return cls(axis, affine.scale(scale, shift))

    @property
    def scale(self) -> np.ndarray:
        """[size of the axis], or [1]."""
        return self.map.kernel[0, :, 0]

    @property
    def shift(self) -> np.ndarray:
        """[size of the axis], or [1]."""
        return self.map.bias

    @property
    def scales(self) -> bool:
        """True if some scale is not 1."""
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        """True if some shift is not 0."""
        return bool(self.shift.any())

    @property
    def scale_only(self) -> Scaling:
        """The map without its shift."""
        return Scaling.of(self.axis, self.scale)

    @property
    def shift_only(self) -> Scaling:
        """The map without its scale."""
        return Scaling.of(self.axis, 1.0, self.shift)

    def then(self, after: Scaling) -> Scaling | None:
        """This map followed by ``after``; None if that varies along two axes."""
        if None not in (self.axis, after.axis) and self.axis != after.axis:
            return None
        axis = after.axis if self.axis is None else self.axis
        size = max(self.map.outputs, after.map.outputs)
        both = affine.compose(after.on(axis, size), self.on(axis, size))
        return Scaling.of(axis, both.kernel[0, :, 0], both.bias)

    def at(self, axis: int | None) -> Scaling:
        """The same pairs along another axis."""
        return self if self.axis is None else replace(self, axis=axis)

    def take(self, indices: np.ndarray) -> Scaling:
        """The map of some indices of the axis."""
        return self if self.axis is None else Scaling.of(self.axis, self.scale[indices], self.shift[indices])

    def on(self, axis: int | None, size: int, rank: int = 0) -> Affine:
        """The map of ``size`` channels on ``axis``, with ``rank`` spatial axes.

        Raises:
            Refusal: it varies along another axis.
        """
        if self.axis is not None and (self.axis != axis or self.map.outputs != size):
            raise Refusal(f"it acts on axis {self.axis}, the channels are on axis {axis}")
        if self.map.outputs == size and not rank:
            return self.map
        scale, shift = (np.broadcast_to(v, (size,)) for v in (self.scale, self.shift))
        return affine.scale(scale, shift, rank)

    def broadcast(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift in a form that broadcasts against a tensor of this rank."""
        form = () if self.axis is None else (-1, *(1,) * (rank - 1 - self.axis))
        return self.scale.reshape(form), self.shift.reshape(form)


# y = f(x, c) as scale and shift, given the constant and whether it is the first operand; None: not affine in x.
_ELEMENTWISE: dict[str, Callable[[np.ndarray, bool], tuple[object, object] | None]] = {
    "Add": lambda c, first: (1.0, c),
    "Sub": lambda c, first: (-1.0, c) if first else (1.0, -c),
    "Mul": lambda c, first: (c, 0.0),
    "Div": lambda c, first: None if first else (1.0 / c, 0.0),
}


def scaling(graph: Graph, node: gs.Node) -> tuple[Tensor, Scaling] | None:
    """The tensor that a node maps with one pair per index of one axis, and the map; None for any other node.

    Raises:
        Refusal: its constants are not finite, or it is a BatchNormalization whose statistics are not constant.
    """
    if op(node) == "BatchNormalization":
        source, parts = node.inputs[0], _batch_norm(graph, node)
    elif op(node) in _ELEMENTWISE and is_affine(graph, node):
        source, values, first = _operands(graph, node)
        size = len(source.shape or ())
        varied = [i - values.ndim + size for i, n in enumerate(values.shape) if n != 1]
        if values.ndim > size or len(varied) > 1 or any((source.shape or ())[i] != values.size for i in varied):
            return None
        with np.errstate(divide="ignore"):
            pair = _ELEMENTWISE[op(node)](values.astype(np.float64).reshape(-1), first)
        parts = None if pair is None else (varied[0] if varied else None, *pair)
    else:
        return None
    if parts is None or not _floats(source):
        return None
    return source, Scaling.of(*parts)


def _floats(tensor: Tensor) -> bool:
    return tensor.dtype is not None and not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).type in _FLOATS


def _operands(graph: Graph, node: gs.Node) -> tuple[Tensor, np.ndarray, bool]:
    """The tensor and the constant of an elementwise node, and whether the constant comes first."""
    first = graph.constant(node.inputs[0]) is not None
    values = graph.constant(node.inputs[int(not first)])
    assert values is not None
    return node.inputs[int(first)], values, first


def _batch_norm(graph: Graph, node: gs.Node) -> tuple[int, np.ndarray, np.ndarray]:
    """Axis, scale and shift."""
    if node.attrs.get("training_mode", 0):
        raise Refusal("training_mode is 1: it normalises by the statistics of the batch")
    if graph.opset < 9 or any(t.name for t in node.outputs[1:]):  # what said so before there was training_mode
        raise Refusal("it normalises by the statistics of the batch")
    parameters = [graph.constant(t) for t in node.inputs[1:5]]
    if any(p is None for p in parameters):
        raise Refusal("its parameters are not constants")
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        return 1, scale, beta - scale * mean


def _scaled(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    found = scaling(graph, node)
    if found is None or found[1].axis not in (None, axis):
        raise Refusal("it varies along another axis than the channels")
    source, made = found
    return Step(node, source, axis, in_order(output), lambda: made.on(axis, channels(source, axis)))


def per_channel(constant: np.ndarray, tensor: Tensor, axis: int) -> np.ndarray:
    """A constant that broadcasts against ``tensor`` as one value per channel.

    Raises:
        Refusal: it varies along another axis, or would stretch the tensor.
    """
    rank, size = len(tensor.shape or ()), channels(tensor, axis)
    shape = (1,) * (rank - constant.ndim) + constant.shape
    varied = [i for i, n in enumerate(shape) if n != 1]
    if len(shape) != rank or any(i != axis for i in varied) or (varied and shape[axis] != size):
        raise Refusal("its constant varies along another axis than the channels")
    return np.broadcast_to(constant.reshape(-1), (size,))


# -- reading: what averages, pads, moves or selects ------------------------------------------------------------------


def _average_pool(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    window = node.attrs["kernel_shape"]
    pads = _pads(node, window)
    if node.attrs.get("ceil_mode", 0) or any(d != 1 for d in node.attrs.get("dilations", ())):
        raise Refusal("an average pool with ceil_mode or dilations is not read")
    counted = bool(node.attrs.get("count_include_pad", 0))
    made = affine.average_pool(channels(output, 1), window, node.attrs.get("strides"), pads, counted)
    return Step(node, node.inputs[0], 1, in_order(output), lambda: made)


def _pad(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    mode = node.attrs.get("mode", "constant")
    if mode != "constant":
        raise Refusal(f"{mode} padding is not zero padding")
    value, amounts, axes = (_listed(graph, node, i) for i in (2, 1, 3))
    if amounts is None:
        raise Refusal("its amounts are attributes of an old opset")
    if value is not None and value.any():
        raise Refusal("its padding is not zero")
    per_axis = np.zeros((2, rank(output)), int)
    per_axis[:, slice(None) if axes is None else axes] = amounts.reshape(2, -1)
    if per_axis[:, :2].any():
        raise Refusal("it pads the channels")
    begin, end = per_axis[:, 2:].tolist()
    return Step(node, node.inputs[0], 1, in_order(output), lambda: affine.pad(channels(output, 1), begin, end))


def _identity(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    return Step(node, node.inputs[0], axis, in_order(output), lambda: affine.identity(channels(output, axis)))


def _negative(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    return Step(node, node.inputs[0], axis, in_order(output), lambda: affine.scale(-np.ones(channels(output, axis))))


def permutation(node: gs.Node) -> list[int]:
    """The order of the axes that a Transpose makes."""
    return list(node.attrs.get("perm") or reversed(range(rank(node.inputs[0]))))


def _moved(node: gs.Node) -> tuple[int, ...] | None:
    """For each axis of the output that of the input, -1 for a new one of extent 1; None if elements mix."""
    if op(node) == "Transpose":
        return tuple(permutation(node))
    source, target = node.inputs[0].shape, node.outputs[0].shape
    if source is None or target is None:
        return None
    places = iter([i for i, n in enumerate(source) if n != 1])
    order = tuple(-1 if n == 1 else next(places, -1) for n in target)
    same = all(i < 0 or (n is not None and source[i] == n) for i, n in zip(order, target, strict=True))
    return order if same and order.count(-1) == list(target).count(1) and next(places, None) is None else None


def _move(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    order = _moved(node)
    if order is None or order[axis] < 0:
        raise Refusal("it mixes the channels with another axis")
    return Step(node, node.inputs[0], order[axis], order, lambda: affine.identity(channels(output, axis)))


CARRIERS = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "ReduceMean", "GlobalAveragePool")


def carried(node: gs.Node, s: Scaling, back: bool) -> Scaling:
    """What must map the input of one of the :data:`CARRIERS` so that ``s`` maps its output; or the reverse.

    Args:
        node: it moves or averages elements.
        s: the map of its output if ``back``, else of its input.
        back: from the output to the input.

    Raises:
        Refusal: it would vary along several axes, or that cannot be told.
    """
    if s.axis is None or op(node) == "Identity":
        return s
    if op(node) in ("ReduceMean", "GlobalAveragePool"):
        return _averaged(node, s, back)
    if (order := _moved(node)) is not None:
        return s.at(order[s.axis] if back else order.index(s.axis))
    shapes = node.inputs[0].shape, node.outputs[0].shape
    if shapes[0] is None or shapes[1] is None:
        raise Refusal(f"a shape of {where(node)} is unknown")
    moved = _regrouped(s, *(shapes[::-1] if back else shapes))
    if moved is None:
        raise Refusal(f"{where(node)} splits or mixes the channels")
    return moved


def _regrouped(s: Scaling, source: Sequence[Dim], target: Sequence[Dim]) -> Scaling | None:
    """The map after a reshape from ``source`` to ``target``, or None if it then varies along several axes.

    A reshape keeps the row-major order, so that dimensions fall into groups of equal size on both sides. A dimension
    that is not known can only stand alone.
    """
    axis = s.axis
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
                return s.at(others[0])
            sizes = [int(source[i] or 0) for i in members]
            form = [2, *(n if i == axis else 1 for i, n in zip(members, sizes, strict=True))]
            pairs = np.broadcast_to(np.stack([s.scale, s.shift]).reshape(form), [2, *sizes])
            pairs = pairs.reshape(2, *(int(target[j] or 0) for j in others))
            varied = [k for k in range(1, pairs.ndim) if (pairs != pairs.take([0], k)).any()]
            if len(varied) > 1:
                return None
            scale, shift = pairs[(slice(None), *(slice(None) if k in varied else 0 for k in range(1, pairs.ndim)))]
            return Scaling.of(others[varied[0] - 1] if varied else None, scale, shift)
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


def _averaged(node: gs.Node, s: Scaling, back: bool) -> Scaling:
    """As :func:`carried`, for a mean: over other axes it keeps scale and shift."""
    assert s.axis is not None
    size = rank(node.inputs[0])
    axes = _axes(node)
    if axes is None:
        raise Refusal(f"the axes of {where(node)} are not known")
    reduced = {a % size for a in axes} or set(range(size))
    kept = [a for a in range(size) if a not in reduced]
    places = list(range(size)) if node.attrs.get("keepdims", 1) else kept
    axis = places[s.axis] if back else s.axis
    if axis not in kept:
        raise Refusal(f"{where(node)} averages over the channels")
    return s.at(axis if back else places.index(axis))


def _axes(node: gs.Node) -> list[int] | None:
    """The axes a reduction names; empty if it names none."""
    if op(node) == "GlobalAveragePool":
        return list(range(2, rank(node.inputs[0])))
    if given(node, 1):
        tensor = node.inputs[1]
        return [int(a) for a in tensor.values] if isinstance(tensor, gs.Constant) else None
    if node.attrs.get("noop_with_empty_axes", 0) and not node.attrs.get("axes"):
        return None
    return list(node.attrs.get("axes", ()))


@dataclass(frozen=True)
class Selection:
    """Which elements along an axis the outputs of a Split, Slice or Gather hold.

    Attributes:
        axis: the axis of the input.
        parts: the indices for each output; None if the extent of the axis is not known.
        drops: the axis is gone from the output (Gather of one index).
    """

    axis: int
    parts: list[np.ndarray] | None
    drops: bool = False


def selection(graph: Graph, node: gs.Node) -> Selection | None:
    """What a node selects; None if its op selects nothing.

    Raises:
        Refusal: what it selects is not constant, or not a range of one axis.
    """
    reader = _SELECTS.get(op(node))
    return None if reader is None else reader(graph, node)


def _split(graph: Graph, node: gs.Node) -> Selection:
    axis = node.attrs.get("axis", 0) % rank(node.inputs[0])
    return Selection(axis, runs(node.outputs, axis))


def runs(tensors: Sequence[Tensor], axis: int) -> list[np.ndarray] | None:
    """The indices that each tensor has in their concatenation along an axis; None if an extent is not known."""
    parts, start = [], 0
    for tensor in tensors:
        extent = None if tensor.shape is None else tensor.shape[axis]
        if not isinstance(extent, int):
            return None
        parts.append(np.arange(start, start + extent))
        start += extent
    return parts


def _slice(graph: Graph, node: gs.Node) -> Selection:
    starts, ends, axes, steps = (_listed(graph, node, i) for i in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise Refusal(f"the bounds of {where(node)} are not constants")
    if len(starts) != 1:
        raise Refusal(f"{where(node)} slices several axes")
    axis = 0 if axes is None else int(axes[0]) % rank(node.inputs[0])
    bounds = slice(int(starts[0]), int(ends[0]), 1 if steps is None else int(steps[0]))
    extent = (node.inputs[0].shape or ())[axis]
    return Selection(axis, [np.arange(extent)[bounds]] if isinstance(extent, int) else None)


def _gather(graph: Graph, node: gs.Node) -> Selection:
    axis = node.attrs.get("axis", 0) % rank(node.inputs[0])
    indices, extent = graph.constant(node.inputs[1]), (node.inputs[0].shape or ())[axis]
    if indices is None or indices.ndim > 1:
        raise Refusal(f"the indices of {where(node)} are not a constant list")
    parts = [indices.reshape(-1) % extent] if isinstance(extent, int) else None
    return Selection(axis, parts, drops=indices.ndim == 0)


_SELECTS: dict[str, Callable[[Graph, gs.Node], Selection]] = {"Split": _split, "Slice": _slice, "Gather": _gather}


def _select(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    chosen, source = _SELECTS[op(node)](graph, node), node.inputs[0]
    if chosen.axis != axis or chosen.drops:
        raise Refusal("it cuts another axis than the channels")
    if chosen.parts is None:
        raise Refusal(f"the number of channels of {source.name!r} is dynamic")
    indices = next(p for p, tensor in zip(chosen.parts, node.outputs, strict=True) if tensor is output)
    return Step(node, source, axis, in_order(output), lambda: affine.select(indices, channels(source, axis)))


MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_READERS: dict[str, Callable[[Graph, gs.Node, Tensor, int], Step]] = {
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(("BatchNormalization", *_ELEMENTWISE), _scaled),
    "AveragePool": _average_pool,
    "Pad": _pad,
    "Identity": _identity,
    "Neg": _negative,
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(_SELECTS, _select),
}
_CHANNELS_FIRST = {"Conv", "ConvTranspose", "BatchNormalization", "AveragePool", "Gemm", "Pad"}


# -- cost ------------------------------------------------------------------------------------------------------------


def size(shape: Sequence[object] | None) -> int:
    """Elements of a tensor; an unknown extent counts as a nominal one."""
    return math.prod(n if isinstance(n, int) else 1 if i == 0 else _NOMINAL for i, n in enumerate(shape or ()))


_MACS: dict[str, Callable[[gs.Node], int]] = {
    "Conv": lambda n: size(n.outputs[0].shape) * size(n.inputs[1].shape[1:]),
    "ConvTranspose": lambda n: size(n.inputs[0].shape) * size(n.inputs[1].shape[1:]),
    "MatMul": lambda n: size(n.outputs[0].shape) * int(size(n.inputs[0].shape[-1:])),
    "Gemm": lambda n: size(n.outputs[0].shape) * size(n.inputs[1].shape) // max(1, size(n.outputs[0].shape[-1:])),
    "AveragePool": lambda n: size(n.outputs[0].shape) * math.prod(n.attrs["kernel_shape"]),
}


def macs(node: gs.Node) -> int:
    """Multiply-accumulates of a node; an average pool counts as the depthwise convolution that it is."""
    rule = _MACS.get(op(node))
    known = rule is not None and all(t.shape is not None for t in [*node.inputs[:2], node.outputs[0]])
    return rule(node) if rule is not None and known else 0


def cost(node: gs.Node) -> int:
    """Multiply-accumulates of a node, and what its memory traffic and its launch are worth in them."""
    moved = sum(size(t.shape) for t in node.outputs if t.shape is not None)
    return macs(node) + PER_ELEMENT * moved + PER_NODE
