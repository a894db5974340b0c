"""ONNX nodes read as affine maps, affine maps written as ONNX nodes, and what either costs.

:mod:`edgecompile.affine` knows no ONNX; this is the bridge. A :class:`Step` is one node as a map from one tensor to
another, a :class:`Path` a sequence of such. Both say which axis of the tensors holds the channels, so that the same
algebra serves images ``[N, C, H, W]`` and tokens ``[N, L, C]`` or ``[N, C, L]``, and how the axes are permuted on the
way, so that a Transpose costs nothing but its own node.

Preconditions are proved on shapes and constants. A reader returns None for a node that is not affine in one of its
inputs, and raises :class:`~edgecompile.affine.Refusal` for one that is but cannot be expressed; the text says why.

Source: the ONNX operator specification (https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import affine
from edgecompile.affine import Affine, Refusal
from edgecompile.graph import Graph, Tensor

# What a node costs besides its multiply-accumulates, in units of one of them: writing an element, and starting at all.
PER_ELEMENT = 2
PER_NODE = 2000
# Extents that are not known count as this (the batch as 1); cost compares nodes of the same graph only.
_NOMINAL = 32

_FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True, eq=False)
class Step:
    """One node as an affine map.

    Attributes:
        node: the node.
        entry: the tensor that it maps.
        axis: channel axis of ``entry``.
        order: axis ``i`` of the output is axis ``order[i]`` of ``entry``.
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
            Refusal: the channels are not on axis 1, or the axes are permuted on the way.
        """
        if self.map.rank == rank:
            return self
        if self.axis != 1 or self.order != tuple(range(rank + 2)):
            raise Refusal("its channels lie on another axis than those of a convolution")
        ones, zeros = (1,) * rank, (0,) * rank
        taps = np.zeros((len(self.map.taps), rank), int)
        return replace(self, map=replace(self.map, taps=taps, stride=ones, up=ones, grow=zeros))

    def then(self, outer: Path, limit: int = affine.LIMIT) -> Path:
        """This path followed by ``outer``, whose entry is this path's exit.

        Raises:
            Refusal: the composition is no such map, or its kernel would have more than ``limit`` elements.
        """
        rank = max(self.map.rank, outer.map.rank)
        inner, outer = self.lifted(rank), outer.lifted(rank)
        if self.exit_axis != outer.axis:
            raise Refusal("two maps act on different axes")
        order = tuple(inner.order[i] for i in outer.order)
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
    return Path(tensor, axis, _same(tensor), affine.identity(channels(tensor, axis)))


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
    if tensor.dtype is None or isinstance(tensor.dtype, int) or np.dtype(tensor.dtype).type not in _FLOATS:
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
    return op(node) in _READERS


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
        source, constant, _ = _operands(graph, node)
        varied = [i for i, n in enumerate(constant.shape, len(tensor.shape) - constant.ndim) if n != 1]
        return varied[0] if len(varied) == 1 else natural_axis(graph, source, depth - 1)
    before = natural_axis(graph, node.inputs[0], depth - 1)
    return _permutation(node).index(before) if op(node) == "Transpose" and before is not None else before


def _same(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(len(tensor.shape or ())))


def _given(graph: Graph, node: gs.Node, index: int) -> np.ndarray | None:
    """A constant input; None if it is not given."""
    return graph.constant(node.inputs[index]) if len(node.inputs) > index else None


def _weight(graph: Graph, node: gs.Node, index: int) -> np.ndarray | None:
    """A constant input in float64; None if it is not given."""
    value = _given(graph, node, index)
    return None if value is None else value.astype(np.float64)


def _require(graph: Graph, node: gs.Node, indices: Iterable[int]) -> None:
    for i in indices:
        given = len(node.inputs) > i and node.inputs[i].name
        if given and graph.constant(node.inputs[i]) is None:
            raise Refusal(f"its input {node.inputs[i].name!r} is not a constant")


def _first(axis: int) -> None:
    if axis != 1:
        raise Refusal("its channels are on axis 1, those wanted elsewhere")


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


def _conv(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    _require(graph, node, (1, 2))
    pads = _pads(node, graph.constant(node.inputs[1]).shape[2:])  # type: ignore[union-attr]
    strides, dilations, group = (node.attrs.get(k) for k in ("strides", "dilations", "group"))

    def build() -> Affine:
        weight, bias = _weight(graph, node, 1), _weight(graph, node, 2)
        assert weight is not None
        return affine.conv(weight, bias, strides, pads, dilations, group or 1)

    return Step(node, node.inputs[0], 1, _same(output), build)


def _conv_transpose(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    _require(graph, node, (1, 2))
    if "output_shape" in node.attrs or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        raise Refusal("its padding depends on the extents")
    keys = ("strides", "pads", "output_padding", "dilations")

    def build() -> Affine:
        weight, bias = _weight(graph, node, 1), _weight(graph, node, 2)
        assert weight is not None
        geometry = [node.attrs.get(k) for k in keys]
        return affine.conv_transpose(weight, bias, *geometry, group=node.attrs.get("group", 1))

    return Step(node, node.inputs[0], 1, _same(output), build)


def _batch_norm(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    _require(graph, node, (1, 2, 3, 4))
    if node.attrs.get("training_mode", 0) or any(t.outputs for t in node.outputs[1:]):
        raise Refusal("it normalises by the statistics of the batch")

    def build() -> Affine:
        gamma, beta, mean, variance = (np.asarray(_weight(graph, node, i)) for i in (1, 2, 3, 4))
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        return affine.scale(scale, beta - scale * mean)

    return Step(node, node.inputs[0], 1, _same(output), build)


def _average_pool(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    window = node.attrs["kernel_shape"]
    pads = _pads(node, window)
    if node.attrs.get("ceil_mode", 0) or any(d != 1 for d in node.attrs.get("dilations", ())):
        raise Refusal("an average pool with ceil_mode or dilations is not read")
    counted = bool(node.attrs.get("count_include_pad", 0))
    made = affine.average_pool(channels(output, 1), window, node.attrs.get("strides"), pads, counted)
    return Step(node, node.inputs[0], 1, _same(output), lambda: made)


def _pad(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    mode = node.attrs.get("mode", "constant")
    if mode != "constant":
        raise Refusal(f"{mode} padding is not zero padding")
    _require(graph, node, (1, 2, 3))
    value, amounts, axes = (_given(graph, node, i) for i in (2, 1, 3))
    if amounts is None:
        raise Refusal("its amounts are attributes of an old opset")
    if value is not None and value.any():
        raise Refusal("its padding is not zero")
    rank = len(output.shape or ())
    per_axis = np.zeros((2, rank), int)
    per_axis[:, list(range(rank)) if axes is None else axes] = amounts.reshape(2, -1)
    if per_axis[:, :2].any():
        raise Refusal("it pads the channels")
    begin, end = per_axis[:, 2:].tolist()
    return Step(node, node.inputs[0], 1, _same(output), lambda: affine.pad(channels(output, 1), begin, end))


def _identity(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    return Step(node, node.inputs[0], axis, _same(output), lambda: affine.identity(channels(output, axis)))


def _negative(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    return Step(node, node.inputs[0], axis, _same(output), lambda: affine.scale(-np.ones(channels(output, axis))))


# y = f(x, c) as scale and shift, given the constant and whether it is the first operand; None: not affine in x.
_ELEMENTWISE: dict[str, Callable[[np.ndarray, bool], tuple[object, object] | None]] = {
    "Add": lambda c, first: (1.0, c),
    "Sub": lambda c, first: (-1.0, c) if first else (1.0, -c),
    "Mul": lambda c, first: (c, 0.0),
    "Div": lambda c, first: None if first else (1.0 / c, 0.0),
}


def _operands(graph: Graph, node: gs.Node) -> tuple[Tensor, np.ndarray, bool]:
    """The tensor and the constant of an elementwise node, and whether the constant comes first."""
    first = graph.constant(node.inputs[0]) is not None
    constant = graph.constant(node.inputs[int(not first)])
    assert constant is not None
    return node.inputs[int(first)], constant, first


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


def _elementwise(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    source, constant, first = _operands(graph, node)
    if source.shape is None or len(source.shape) != len(output.shape or ()):
        raise Refusal("its constant has more axes than its input")
    values = per_channel(constant, source, axis).astype(np.float64)
    with np.errstate(divide="ignore"):
        pair = _ELEMENTWISE[op(node)](values, first)
    if pair is None:
        raise Refusal("it divides by its input")
    scale, shift = (np.broadcast_to(np.asarray(v, np.float64), values.shape) for v in pair)
    return Step(node, source, axis, _same(output), lambda: affine.scale(scale, shift))


def _matmul(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    data = int(graph.constant(node.inputs[0]) is not None)
    weight = graph.constant(node.inputs[1 - data])
    source, rank = node.inputs[data], len(output.shape or ())
    own = rank - (2 if data else 1)
    if weight is None or weight.ndim != 2 or source.shape is None or len(source.shape) != rank:
        raise Refusal("its weight is not a matrix")
    if axis != own:
        raise Refusal("it acts on another axis than the channels")
    return Step(node, source, own, _same(output), lambda: affine.matrix(weight if data else weight.T))


def _gemm(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _first(axis)
    _require(graph, node, (1, 2))
    if node.attrs.get("transA", 0):
        raise Refusal("it transposes its input")

    def build() -> Affine:
        weight, bias = _weight(graph, node, 1), _weight(graph, node, 2)
        assert weight is not None
        weight = node.attrs.get("alpha", 1.0) * (weight if node.attrs.get("transB", 0) else weight.T)
        if bias is not None:
            bias = node.attrs.get("beta", 1.0) * per_channel(bias, output, 1)
        return affine.matrix(weight, bias)

    return Step(node, node.inputs[0], 1, _same(output), build)


def _permutation(node: gs.Node) -> list[int]:
    return list(node.attrs.get("perm") or reversed(range(len(node.inputs[0].shape or ()))))


def _transpose(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    order = tuple(_permutation(node))
    return Step(node, node.inputs[0], order[axis], order, lambda: affine.identity(channels(output, axis)))


def _selection(node: gs.Node, output: Tensor, axis: int, indices: np.ndarray) -> Step:
    total = channels(node.inputs[0], axis)
    return Step(node, node.inputs[0], axis, _same(output), lambda: affine.select(indices, total))


def _split(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    if node.attrs.get("axis", 0) % len(output.shape or ()) != axis:
        raise Refusal("it splits another axis than the channels")
    start = 0
    for tensor in node.outputs:
        size = channels(tensor, axis)
        if tensor is output:
            break
        start += size
    return _selection(node, output, axis, np.arange(start, start + size))


def _slice(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _require(graph, node, (1, 2, 3, 4))
    starts, ends, axes, steps = (_given(graph, node, i) for i in (1, 2, 3, 4))
    rank = len(output.shape or ())
    if starts is None or ends is None or [a % rank for a in (range(len(starts)) if axes is None else axes)] != [axis]:
        raise Refusal("it cuts another axis than the channels")
    picked = np.arange(channels(node.inputs[0], axis))[starts[0] : ends[0] : 1 if steps is None else steps[0]]
    if len(picked) != channels(output, axis):
        raise Refusal("its bounds are not read")
    return _selection(node, output, axis, picked)


def _gather(graph: Graph, node: gs.Node, output: Tensor, axis: int) -> Step:
    _require(graph, node, (1,))
    indices = graph.constant(node.inputs[1])
    if indices is None or indices.ndim != 1 or node.attrs.get("axis", 0) % len(output.shape or ()) != axis:
        raise Refusal("it gathers along another axis than the channels")
    return _selection(node, output, axis, indices)


_READERS: dict[str, Callable[[Graph, gs.Node, Tensor, int], Step]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "BatchNormalization": _batch_norm,
    "AveragePool": _average_pool,
    "Pad": _pad,
    "Identity": _identity,
    "Neg": _negative,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
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


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _New:
    """A node to be made: its inputs, None for the tensor that it maps, and the shape of its output."""

    op: str
    inputs: tuple[np.ndarray | None, ...]
    attrs: dict[str, object]
    shape: list
    macs: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The nodes that compute a path; none for the identity."""

    entry: Tensor
    nodes: tuple[_New, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the nodes."""
        return sum(n.macs for n in self.nodes)

    @property
    def cost(self) -> int:
        """As :func:`cost`."""
        return sum(n.macs + PER_ELEMENT * size(n.shape) + PER_NODE for n in self.nodes)

    def insert(self, graph: Graph, hint: str, replaces: Sequence[gs.Node]) -> Tensor:
        """Put the nodes into the graph; the tensor they end in."""
        tensor = self.entry
        for new in self.nodes:
            inputs = [tensor if v is None else graph.new_constant(f"{hint}_{'wb'[v.ndim < 2]}", v) for v in new.inputs]
            node = graph.insert(new.op, inputs, attrs=new.attrs, replaces=replaces)
            node.outputs[0].dtype, node.outputs[0].shape = tensor.dtype, list(new.shape)
            tensor = node.outputs[0]
        return tensor


def plan(made: Path) -> Plan:
    """Nodes that compute a path.

    Raises:
        Refusal: its values do not fit the element type of the entry, or no operator expresses it.
    """
    shape = list(made.entry.shape or ())
    rank, axis, dtype = len(shape), made.axis, np.dtype(made.entry.dtype)  # type: ignore[arg-type]
    kind = made.map
    if kind.is_pointwise and _reads_one(kind) is not None:
        nodes = _channelwise(made, shape, dtype)
    elif axis == 1 and rank >= 3:
        nodes = [_convolution(made.lifted(rank - 2), shape, dtype)]
    elif rank == 2 and axis == 1:
        weight, bias = kind.as_matrix(dtype)
        out = [shape[0], kind.outputs]
        inputs = (None, weight) if bias is None else (None, weight, bias)
        nodes = [_New("Gemm", inputs, {"transB": 1}, out, size(out) * kind.channels)]
    elif axis >= rank - 2:
        nodes = _matrix(made, shape, dtype)
    else:
        raise Refusal("no operator maps the channels on this axis")
    if made.order != tuple(range(rank)):
        last = nodes[-1].shape if nodes else shape
        nodes = [*nodes, _New("Transpose", (None,), {"perm": list(made.order)}, [last[i] for i in made.order])]
    return Plan(made.entry, tuple(nodes))


def _reads_one(kind: Affine) -> np.ndarray | None:
    """Per output the only channel read, if each reads its own, or the map only selects; else None."""
    if kind.inputs.shape[1] != 1:
        return None
    read = kind.inputs[:, 0]
    if kind.outputs == kind.channels and ((read == np.arange(kind.outputs)) | (read < 0)).all():
        return np.arange(kind.outputs)
    selects = (read >= 0).all() and (kind.kernel == 1).all() and not kind.bias.any()
    return read if selects else None


def _channelwise(made: Path, shape: list, dtype: np.dtype) -> list[_New]:
    """Gather, or Mul and Add."""
    read = _reads_one(made.map)
    assert read is not None
    out = [made.map.outputs if i == made.axis else n for i, n in enumerate(shape)]
    if made.map.outputs != made.map.channels or (read != np.arange(len(read))).any():
        return [_New("Gather", (None, read.astype(np.int64)), {"axis": made.axis}, out)]
    scale, shift = affine.round_to(made.map.kernel[0], made.map.bias, dtype)
    form = (-1, *(1,) * (len(shape) - 1 - made.axis))
    nodes = [_New("Mul", (None, scale.reshape(form)), {}, out)] if (scale != 1).any() else []
    if shift is not None:
        nodes.append(_New("Add", (None, shift.reshape(form)), {}, out))
    return nodes


def _convolution(made: Path, shape: list, dtype: np.dtype) -> _New:
    conv = made.map.as_conv(dtype)
    spatial = made.map.exit_size(made.extents)
    out = [shape[0], made.map.outputs, *spatial]
    positions = size([shape[0], 1, *(shape[2:] if conv.op == "ConvTranspose" else spatial)])
    filters = made.map.channels if conv.op == "ConvTranspose" else made.map.outputs
    inputs = (None, conv.weight) if conv.bias is None else (None, conv.weight, conv.bias)
    return _New(conv.op, inputs, dict(conv.attributes), out, positions * filters * math.prod(conv.weight.shape[1:]))


def _matrix(made: Path, shape: list, dtype: np.dtype) -> list[_New]:
    """MatMul on the last axis (x W) or the one before it (W x), and the bias."""
    weight, bias = made.map.as_matrix(dtype)
    last = made.axis == len(shape) - 1
    out = [made.map.outputs if i == made.axis else n for i, n in enumerate(shape)]
    inputs = (None, np.ascontiguousarray(weight.T)) if last else (weight, None)
    nodes = [_New("MatMul", inputs, {}, out, size(out) * made.map.channels)]
    if bias is not None:
        nodes.append(_New("Add", (None, bias if last else bias[:, None]), {}, out))
    return nodes
