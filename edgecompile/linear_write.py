"""Affine maps written as ONNX nodes: whole paths as new nodes, new values for what nodes store.

A path of :mod:`edgecompile.linear` becomes nodes by :func:`plan`, which knows what they cost before they exist; layers
get new values by :class:`Changes`, all of them or none.

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
from edgecompile.graph import Graph, Tensor, where
from edgecompile.linear import (
    PER_ELEMENT,
    PER_NODE,
    Layer,
    Path,
    Scaling,
    constant,
    given,
    in_order,
    layer,
    rank,
    size,
)


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
    """The nodes that compute a path; none for the identity. ``map`` is what they compute, before rounding."""

    entry: Tensor
    map: Affine
    nodes: tuple[_New, ...]

    @property
    def error(self) -> float:
        """The largest error of a coefficient that rounding makes, over the largest coefficient; of kernel and bias."""
        dtype = np.dtype(self.entry.dtype)  # type: ignore[arg-type]
        parts = [v for v in (self.map.kernel, self.map.bias) if v.any()]
        return max((float(np.abs(v.astype(dtype) - v).max() / np.abs(v).max()) for v in parts), default=0.0)

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
            attrs = new.attrs
            if new.op in ("Squeeze", "Unsqueeze") and graph.opset < 13:  # which made an input of their attribute
                inputs, attrs = inputs[:1], {"axes": new.inputs[1].tolist()}  # type: ignore[union-attr]
            node = graph.insert(new.op, inputs, attrs=attrs, replaces=replaces)
            node.outputs[0].dtype, node.outputs[0].shape = tensor.dtype, list(new.shape)
            tensor = node.outputs[0]
        return tensor


def plan(made: Path) -> Plan:
    """Nodes that compute a path.

    Raises:
        Refusal: its values do not fit the element type of the entry, or no operator expresses it.
    """
    shape = list(made.entry.shape or ())
    axes, axis, dtype = len(shape), made.axis, np.dtype(made.entry.dtype)  # type: ignore[arg-type]
    kind = made.map
    if kind.is_pointwise and _reads_one(kind) is not None:
        nodes = _channelwise(made, shape, dtype)
    elif axis == 1 and axes >= 3:
        nodes = [_convolution(replace(made, order=in_order(made.entry)).lifted(axes - 2), shape, dtype)]
    elif axes == 2 and axis == 1:
        weight, bias = kind.as_matrix(dtype)
        out = [shape[0], kind.outputs]
        inputs = (None, weight) if bias is None else (None, weight, bias)
        nodes = [_New("Gemm", inputs, {"transB": 1}, out, size(out) * kind.channels)]
    elif axis >= axes - 2:
        nodes = _matrix(made, shape, dtype)
    else:
        raise Refusal("no operator maps the channels on this axis")
    return Plan(made.entry, kind, (*nodes, *_reordered(made.order, nodes[-1].shape if nodes else shape)))


def _reordered(order: Sequence[int], shape: list) -> Iterator[_New]:
    """Squeeze, Transpose and Unsqueeze, as far as needed, for an order of axes as in :class:`Step`."""
    gone = [i for i in range(len(shape)) if i not in order]
    kept = [i for i in order if i >= 0]
    added = [i for i, source in enumerate(order) if source < 0]
    if gone:
        yield _New("Squeeze", (None, np.array(gone)), {}, [shape[i] for i in sorted(kept)])
    if kept != sorted(kept):
        perm = [sorted(kept).index(i) for i in kept]
        yield _New("Transpose", (None,), {"perm": perm}, [shape[i] for i in kept])
    if added:
        yield _New("Unsqueeze", (None, np.array(added)), {}, [1 if i < 0 else shape[i] for i in order])


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


# -- changing what nodes store ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A new value for a constant input of a node; ``old`` is None for a new input, ``scaled`` if it is a factor."""

    node: gs.Node
    index: int
    value: np.ndarray
    old: np.ndarray | None
    dtype: np.dtype
    scaled: bool


@dataclass(frozen=True, eq=False)
class Held:
    """What a layer is to become: its map, its bias as it is added, and whether its weight changes."""

    layer: Layer
    map: Affine
    bias: np.ndarray | None
    scaled: bool = False

    @property
    def node(self) -> gs.Node:
        """The node of the layer."""
        return self.layer.node

    @property
    def ending(self) -> Scaling:
        """Scale and shift that end a norm."""
        return Scaling.of(self.layer.exit_axis, self.map.kernel[0, :, 0], 0.0 if self.bias is None else self.bias)

    def before(self, s: Scaling) -> Held:
        """The layer, followed by ``s``.

        Raises:
            Refusal: the map acts on another axis, or has a shift and the layer no bias.
        """
        layer, made = self.layer, self.map
        if s.shifts and layer.bias is None:
            raise Refusal(f"{where(self.node)} has no bias to take the shift")
        factors = s.on(layer.exit_axis, made.outputs, made.rank)
        bias = None if self.bias is None else self.bias * factors.kernel[0, :, 0]
        made = affine.compose(factors, made, limit=made.kernel.size)
        return replace(self, map=made, bias=bias, scaled=self.scaled or s.scales)

    def after(self, s: Scaling) -> tuple[Held, Scaling | None]:
        """The layer, preceded by ``s``; and what has to follow it, if it has no bias to take the shift.

        Raises:
            Refusal: the map acts on another axis, or its shift cannot pass the padding of the layer.
        """
        layer, made = self.layer, self.map
        source = self.node.inputs[1 - layer.weight]
        extents = [n if isinstance(n, int) else None for n in (source.shape or ())[2:]] if made.rank else []
        try:
            if s.shifts and layer.unsure:
                raise Refusal(layer.unsure)
            factors = s.on(layer.axis, made.channels, made.rank)
            made = affine.compose(made, factors, extents or None, made.kernel.size)
        except Refusal as refusal:
            raise Refusal(f"{where(self.node)}: {refusal}") from None
        rest = None
        if layer.bias is None and made.bias.any():
            rest = Scaling.of(layer.exit_axis, 1.0, made.bias)
            made = replace(made, bias=np.zeros(made.outputs))
        return replace(self, map=made, scaled=self.scaled or s.scales), rest

    def edits(self) -> Iterator[Edit]:
        """The constants to write; all have the type of the weight."""
        layer = self.layer
        old = constant(layer.graph, self.node, layer.weight)
        if self.scaled:
            weight = layer.store(self.map).reshape(old.shape)
            yield Edit(self.node, layer.weight, weight, old, old.dtype, True)
        if layer.bias is not None and (self.bias is not None or self.map.bias.any()):
            bias = (self.map.bias if self.bias is None else self.bias + self.map.bias) / layer.beta
            before = None if self.bias is None else constant(layer.graph, self.node, layer.bias)
            if before is None or (bias != before).any():
                yield Edit(self.node, layer.bias, bias, before, old.dtype, False)


class Changes:
    """New values for what nodes store: collected, so that an attempt can be given up, then made by :meth:`commit`.

    Later changes of a node see the earlier ones.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.changes: dict[tuple[int, int], Edit | Held] = {}
        self.adds: dict[int, tuple[Tensor, Scaling]] = {}

    def attempt(self, *choices: Callable[[], None]) -> None:
        """Take the first choice that is not refused; the changes of the others are undone."""
        for last, choice in enumerate(choices, 1 - len(choices)):
            changes, adds = dict(self.changes), dict(self.adds)
            try:
                return choice()
            except Refusal:
                self.changes, self.adds = changes, adds
                if not last:
                    raise
        return None

    def held(self, node: gs.Node) -> Held:
        """What a node that stores a map is to become so far."""
        held = self.changes.get((id(node), -1))
        if isinstance(held, Held):
            return held
        made = layer(self.graph, node)
        return Held(made, made.map(), made.offset())

    def hold(self, held: Held) -> None:
        """Change what a node stores."""
        self.changes[id(held.node), -1] = held

    def write(self, node: gs.Node, index: int, s: Scaling, rank: int, scaled: bool = False) -> None:
        """Apply a map to a constant operand of a node whose result has this rank; ``scaled`` if it is a factor."""
        old = constant(self.graph, node, index)
        edit = self.changes.get((id(node), index))
        scale, shift = s.broadcast(rank)
        value = (edit.value if isinstance(edit, Edit) else old.astype(np.float64)) * scale + shift
        self.changes[id(node), index] = Edit(node, index, value, old, old.dtype, scaled)

    def add(self, tensor: Tensor, s: Scaling) -> None:
        """Let an Add of the shift of a map follow the node that computes a tensor."""
        _, before = self.adds.get(id(tensor), (tensor, Scaling.of(None, 1.0)))
        both = before.then(s)
        assert both is not None
        self.adds[id(tensor)] = tensor, both

    def edits(self, copy_limit: int) -> list[Edit]:
        """All new values.

        Raises:
            Refusal: a type cannot hold them, or shared weights of more than ``copy_limit`` bytes had to be copied.
        """
        edits: list[Edit] = []
        for change in self.changes.values():
            edits += change.edits() if isinstance(change, Held) else [change]
        for edit in edits:
            shared = edit.old is not None and len(edit.node.inputs[edit.index].outputs) > 1
            if shared and edit.scaled and edit.value.size * edit.dtype.itemsize > copy_limit:
                raise Refusal(f"the weight of {where(edit.node)} is shared and would have to be copied")
            before = edit.old if edit.scaled else edit.value  # only what is a factor can vanish
            if fate := affine.misfit(edit.value, edit.dtype, before):
                raise Refusal(f"a constant of {where(edit.node)} would {fate} {'in ' * (fate == 'vanish')}{edit.dtype}")
        return edits

    def commit(self, edits: Sequence[Edit], replaced: Sequence[gs.Node]) -> None:
        """Make the edits; the nodes changed inherit the provenance of ``replaced``."""
        for edit in edits:
            node, index = edit.node, edit.index
            hint = node.inputs[index].name if given(node, index) else f"{node.name}_bias"
            value = self.graph.new_constant(hint, edit.value.astype(edit.dtype))
            if index < len(node.inputs):
                node.inputs[index] = value
            else:
                node.inputs.append(value)
        for node in {id(e.node): e.node for e in edits}.values():
            self.graph.absorb(node, replaced)
        for tensor, s in self.adds.values():
            node = tensor.inputs[0]
            inner = node.outputs[0] = self.graph.new_variable(tensor.name, tensor)
            insert_constant(self.graph, "Add", inner, s.broadcast(rank(tensor))[1], tensor, [node, *replaced])

    @property
    def absorbers(self) -> str:
        """The ops that took the map in, for people."""
        return " and ".join(dict.fromkeys(c.node.op for c in self.changes.values()))


def insert_constant(
    graph: Graph, op: str, source: Tensor, value: np.ndarray, target: Tensor, replaces: Sequence[gs.Node]
) -> None:
    """Let ``target`` be ``source`` with a constant applied by ``op``, which stands for ``replaces``."""
    constant = graph.new_constant(f"{target.name}_{op.lower()}", value.astype(target.dtype))
    graph.insert(op, [source, constant], [target], replaces=replaces)
