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

Both sides are compositions in the algebra of :mod:`edgecompile.affine`, which proves the padding;
:mod:`edgecompile.linear` reads the maps, :mod:`edgecompile.linear_write` writes them back. All arithmetic is in float64
and is rounded once, to the type of the weight. A fold is refused where the rounded weights overflow, or where a channel
sinks into the subnormal numbers (both happen in float16).

Sources: Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
CVPR 2018, section 3.2 (batch normalisation folding); Xu et al., *RePaViT*, ICML 2025 (BatchNorm before a linear layer);
Wu & He, *Group Normalization*, ECCV 2018, section 3; Ba et al., *Layer Normalization*, 2016, section 3; Vaswani et al.,
*Attention Is All You Need*, 2017, section 3.2.1 (the scale of ``Q K^T``); the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import affine, linear
from edgecompile.affine import Refusal
from edgecompile.graph import Graph, Tensor, disconnect, where
from edgecompile.linear import Scaling, op, rank
from edgecompile.linear_write import Changes, insert_constant
from edgecompile.pipeline import Context, Pass, PassResult
from edgecompile.sweep import Sweep

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
        return _Folder.repeat(graph, context)


class _Far(Refusal):
    """A refusal where no linear map is near that could have taken the map in."""


# -- chains ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A chain of nodes that is one map from ``source`` to ``target``."""

    nodes: tuple[gs.Node, ...]
    source: Tensor
    map: Scaling

    @property
    def target(self) -> Tensor:
        return self.nodes[-1].outputs[0]

    @property
    def cost(self) -> int:
        """Elementwise operations it stands for."""
        return sum(2 if n.op == "BatchNormalization" else 1 for n in self.nodes)

    @property
    def label(self) -> str:
        return " and ".join(dict.fromkeys(n.op for n in self.nodes))


def _unit(graph: Graph, node: gs.Node) -> _Unit | None:
    """The map that a node is, or None.

    Raises:
        Refusal: it is a BatchNormalization in training, or better left to the runtime.
    """
    found = linear.scaling(graph, node)
    if found is not None and (pattern := _fused_pattern(graph, node, found[0])):
        raise Refusal(f"it is part of a {pattern}, which runtimes fuse as a whole")
    return None if found is None else _Unit((node,), *found)


def _fused_pattern(graph: Graph, last: gs.Node, tensor: Tensor) -> str:
    """The multi-node form of an operation that ``last`` ends, which maps ``tensor``, or ``""``.

    Runtimes know these by their shape; without the last constants they would run them node by node.
    """
    node = graph.producer(tensor)
    if op(last) == "Add" and node is not None and op(node) == "Mul":  # gamma before beta
        node = next((p for p in map(graph.producer, node.inputs) if p is not None and op(p) == "Div"), None)
    if node is None or op(node) not in ("Mul", "Div") or op(last) == "BatchNormalization":
        return ""
    inner = [p for p in map(graph.producer, node.inputs) if p is not None]
    if op(node) == "Div" and inner and op(inner[-1]) == "Sqrt":
        return "normalisation"
    terms = {op(p) for n in inner if op(n) == "Add" for p in map(graph.producer, n.inputs) if p is not None}
    return "GELU" if op(last) == "Mul" and op(node) == "Mul" and terms & {"Erf", "Tanh"} else ""


# -- pushing a map through the graph ---------------------------------------------------------------------------------


class _Push(Changes):
    """One attempt to absorb a map."""

    def __init__(self, folder: _Folder):
        super().__init__(folder.graph)
        self.exposed = folder.exposed
        self.steps = 0

    def backward(self, tensor: Tensor, s: Scaling, owned: bool = False) -> None:
        """Let ``tensor`` become ``s(tensor)`` by changing what produces it.

        Args:
            tensor: the tensor; only one node may read it.
            s: the map to absorb.
            owned: the readers have been looked at.

        Raises:
            Refusal: it cannot be proved that this changes nothing else.
        """
        if not (s.scales or s.shifts):
            return
        self._step()
        node = self.graph.producer(tensor)
        if node is None:
            raise _Far(f"no node computes {tensor.name!r}")
        rule = _BACKWARD.get(op(node))
        if not owned and (self.exposed(tensor) or len(_readers(tensor)) != 1):
            why = "is an output of the model" if self.exposed(tensor) else "has a second consumer"
            raise (_Far if rule is None else Refusal)(f"{where(node)} {why}")
        if rule is None:
            raise _Far(f"{where(node)} is not linear")
        rule(self, node, next(i for i, t in enumerate(node.outputs) if t is tensor), s)

    def forward(self, tensor: Tensor, s: Scaling) -> None:
        """Let every reader of ``tensor`` act as before when ``tensor`` becomes the ``x`` of ``s(x)``.

        Raises:
            Refusal: some reader cannot.
        """
        if not (s.scales or s.shifts):
            return
        edges = [(n, i) for n, i in _edges(tensor) if op(n) not in _SHAPE_ONLY]
        far = Refusal if any(op(n) in linear.LINEAR for n, _ in edges) else _Far
        if self.exposed(tensor):
            raise far(f"{tensor.name!r} is an output of the model")
        for node, index in edges:
            self._step()
            rule = _FORWARD.get(op(node))
            if rule is None:
                raise far(f"{where(node)} is not linear")
            try:
                rule(self, node, index, s)
            except _Far as refusal:
                raise far(*refusal.args) from None

    def _step(self) -> None:
        self.steps += 1
        if self.steps > _REACH:
            raise _Far(f"a linear map is more than {_REACH} nodes away")


_SHAPE_ONLY = ("Shape", "Size")


def _edges(tensor: Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Each reading of a tensor: node and number of its input."""
    for node in {id(n): n for n in tensor.outputs}.values():
        yield from ((node, i) for i, t in enumerate(node.inputs) if t is tensor)


def _readers(tensor: Tensor) -> list[gs.Node]:
    """The nodes that read the values of a tensor, not just its shape; twice if they read it twice."""
    return [n for n in tensor.outputs if op(n) not in _SHAPE_ONLY]


# -- rules: layers ---------------------------------------------------------------------------------------------------


def _computed(push: _Push, node: gs.Node) -> bool:
    """True for a MatMul of two computed tensors."""
    return op(node) == "MatMul" and all(push.graph.constant(t) is None for t in node.inputs)


def _layer_backward(push: _Push, node: gs.Node, output: int, s: Scaling) -> None:
    if _computed(push, node):
        return _product_backward(push, node, output, s)
    if output:
        raise Refusal(f"{where(node)} computes statistics too")
    return push.hold(push.held(node).before(s))


def _layer_forward(push: _Push, node: gs.Node, index: int, s: Scaling) -> None:
    if _computed(push, node):
        raise Refusal(f"{where(node)} multiplies two computed tensors")
    if index and op(node) != "MatMul":
        raise Refusal(f"it is a weight or bias of {where(node)}")
    held, rest = push.held(node).after(s)
    if s.scales or rest is None:
        push.hold(held)
    if rest is not None:
        push.attempt(lambda: push.forward(node.outputs[0], rest), lambda: push.add(node.outputs[0], rest))


# -- rules: sums, products and constants -----------------------------------------------------------------------------


def _aligned(s: Scaling, tensor: Tensor, result: Tensor) -> Scaling:
    """The map on an operand that broadcasts to ``result``."""
    if s.axis is None:
        return s
    axis = s.axis - rank(result) + rank(tensor)
    if axis < 0 or (tensor.shape or ())[axis] != s.map.outputs:
        raise Refusal(f"{tensor.name!r} is broadcast along the channels")
    return s.at(axis)


def _sum_backward(push: _Push, node: gs.Node, output: int, s: Scaling) -> None:
    """Scale every term; give the shift to a constant, else to the first term that can take it."""
    result = node.outputs[0]
    axes = 0 if s.axis is None else rank(result)
    constant = [push.graph.constant(t) is not None for t in node.inputs]
    order = sorted(range(len(constant)), key=lambda i: not constant[i])

    def give(i: int, part: Scaling) -> None:
        if constant[i]:
            push.write(node, i, part, axes)
        else:
            push.backward(node.inputs[i], _aligned(part, node.inputs[i], result))

    if s.scales:
        for i in order:
            give(i, s.scale_only)
    if s.shifts:
        negative = Scaling.of(s.axis, 1.0, -s.shift)
        push.attempt(*[lambda i=i: give(i, negative if op(node) == "Sub" and i else s.shift_only) for i in order])


def _product_backward(push: _Push, node: gs.Node, output: int, s: Scaling) -> None:
    """Scale one operand of a product (the numerator of a quotient)."""
    if s.shifts:
        raise Refusal(f"a shift cannot pass {where(node)}")
    result, operands = node.outputs[0], node.inputs[:1] if op(node) == "Div" else node.inputs[:2]
    constants = [i for i, t in enumerate(operands) if push.graph.constant(t) is not None]
    if op(node) != "MatMul":
        if constants:
            return push.write(node, constants[0], s, 0 if s.axis is None else rank(result), scaled=True)
        return push.attempt(*[lambda t=t: push.backward(t, _aligned(s, t, result)) for t in operands])
    if s.axis is None:
        return push.attempt(*[lambda t=t: push.backward(t, s) for t in operands])
    side = s.axis - rank(result) + 2  # 0: rows of the first, 1: columns of the second
    if side not in (0, 1) or min(map(rank, operands)) < 2:
        raise Refusal(f"{where(node)} multiplies a matrix per channel")
    return push.backward(operands[side], s.at(rank(operands[side]) - 2 + side))


def _sum_forward(push: _Push, node: gs.Node, index: int, s: Scaling) -> None:
    """A constant term takes a shift."""
    other = 1 - index
    if push.graph.constant(node.inputs[other]) is None:
        raise _Far(f"{where(node)} adds two computed tensors")
    if s.scales:
        raise Refusal(f"a scale cannot pass {where(node)}")
    # x - c and c - x alike: (x + t) - c = x - (c - t)
    shift = Scaling.of(s.axis, 1.0, -s.shift if op(node) == "Sub" else s.shift)
    push.write(node, other, shift, rank(node.inputs[index]))


# -- rules: what moves, selects or averages elements -----------------------------------------------------------------


def _move_backward(push: _Push, node: gs.Node, output: int, s: Scaling) -> None:
    push.backward(node.inputs[0], linear.carried(node, s, True))


def _move_forward(push: _Push, node: gs.Node, index: int, s: Scaling) -> None:
    if index:
        raise Refusal(f"{where(node)} reads it as a shape")
    push.forward(node.outputs[0], linear.carried(node, s, False))


def _selection(push: _Push, node: gs.Node) -> linear.Selection:
    chosen = linear.selection(push.graph, node)
    assert chosen is not None
    if any(len(np.unique(part)) != len(part) for part in chosen.parts or ()):
        raise Refusal(f"the indices of {where(node)} are not a constant list without repetition")
    return chosen


def _select_backward(push: _Push, node: gs.Node, output: int, s: Scaling) -> None:
    """The map goes to the selected elements of the input; all others must be free to stay."""
    source, chosen = node.inputs[0], _selection(push, node)
    if chosen.drops and s.axis is not None:
        s = s.at(s.axis + (s.axis >= chosen.axis))
    others = [t for i, t in enumerate(node.outputs) if i != output]
    alone = len(_readers(source)) == 1 and not any(push.exposed(t) or _readers(t) for t in others)
    if alone and s.axis != chosen.axis:
        return push.backward(source, s)
    if s.axis not in (None, chosen.axis):
        raise Refusal(f"{where(node)} leaves other parts of its input to a second consumer")
    if chosen.parts is None:
        raise Refusal(f"the extent that {where(node)} selects from is not known")
    mine, size = chosen.parts[output], (source.shape or ())[chosen.axis]
    for reader in _readers(source):
        if reader is node:
            continue
        other = linear.selection(push.graph, reader)
        apart = other is not None and other.axis == chosen.axis and other.parts is not None
        if not apart or any(np.intersect1d(mine, part).size for part in other.parts):  # type: ignore[union-attr]
            raise Refusal(f"the input of {where(node)} has a second consumer")
    if push.exposed(source):
        raise Refusal(f"{source.name!r} is an output of the model")
    return push.backward(source, _spread(s, chosen.axis, mine, int(size or 0)), owned=True)


def _spread(s: Scaling, axis: int, indices: np.ndarray, size: int) -> Scaling:
    """The map of some indices of an axis of this size, the identity for all others."""
    scale, shift = np.ones(size), np.zeros(size)
    scale[indices], shift[indices] = s.scale, s.shift
    return Scaling.of(axis, scale, shift)


def _select_forward(push: _Push, node: gs.Node, index: int, s: Scaling) -> None:
    chosen = _selection(push, node)
    if index:
        raise Refusal(f"{where(node)} reads it as indices")
    for output, tensor in enumerate(node.outputs):
        part = s
        if s.axis == chosen.axis:
            if chosen.parts is None:
                raise Refusal(f"the extent that {where(node)} selects from is not known")
            part = s.take(chosen.parts[output])
        if chosen.drops and part.axis is not None:
            part = part.at(part.axis - (part.axis > chosen.axis))
        push.forward(tensor, part)


def _concat_backward(push: _Push, node: gs.Node, output: int, s: Scaling) -> None:
    axis = node.attrs["axis"] % rank(node.outputs[0])
    ranges = linear.runs(node.inputs, axis)
    for i, tensor in enumerate(node.inputs):
        part = s
        if s.axis == axis:
            if ranges is None:
                raise Refusal(f"the extents that {where(node)} joins are not known")
            part = s.take(ranges[i])
        if push.graph.constant(tensor) is None:
            push.backward(tensor, part)
        else:
            push.write(node, i, part, rank(tensor))


def _concat_forward(push: _Push, node: gs.Node, index: int, s: Scaling) -> None:
    axis = node.attrs["axis"] % rank(node.outputs[0])
    ranges = linear.runs(node.inputs, axis)
    if ranges is None or s.axis not in (None, axis):
        raise Refusal(f"{where(node)} joins it with what is not scaled")
    push.forward(node.outputs[0], _spread(s, axis, ranges[index], sum(r.size for r in ranges)))


_Rule = Callable[[_Push, gs.Node, int, Scaling], None]
_SELECTS = ("Split", "Slice", "Gather")

# How a node absorbs or hands on a map on its output ...
_BACKWARD: dict[str, _Rule] = {
    **dict.fromkeys((*linear.LINEAR, *linear.NORMS), _layer_backward),
    **dict.fromkeys(("Add", "Sub", "Sum"), _sum_backward),
    **dict.fromkeys(("Mul", "Div"), _product_backward),
    **dict.fromkeys(linear.CARRIERS, _move_backward),
    **dict.fromkeys(_SELECTS, _select_backward),
    "Concat": _concat_backward,
}

# ... and on its input.
_FORWARD: dict[str, _Rule] = {
    **dict.fromkeys(linear.LINEAR, _layer_forward),
    **dict.fromkeys(("Add", "Sub"), _sum_forward),
    **dict.fromkeys(linear.CARRIERS, _move_forward),
    **dict.fromkeys(_SELECTS, _select_forward),
    "Concat": _concat_forward,
}


# -- the walk --------------------------------------------------------------------------------------------------------


class _Folder(Sweep):
    """One walk over the graph in each direction."""

    def __init__(self, graph: Graph, context: Context):
        super().__init__(graph, context)
        self.refusals: dict[int, tuple[gs.Node, list[Refusal]]] = {}

    def walk(self) -> None:
        for node in self._starts():
            self._try(self._fold_backward, node)
        self.graph.tidy()
        for node in reversed(self._starts()):
            self._try(self._fold_forward, node)
        for node in reversed(self.graph.nodes):
            if op(node) in linear.NORMS and op(node) != "BatchNormalization":
                self._try(self._fold_norm, node)
        self.graph.tidy()
        for node in self._starts():
            self._try(self._merge, node)

    def notes(self) -> Iterator[tuple[str, gs.Node]]:
        """A node and why it was not folded, where that says something: it is a norm, or a linear map is near."""
        for node, refusals in self.refusals.values():
            near = not all(isinstance(r, _Far) for r in refusals)
            if node.op == "BatchNormalization" or (near and not _is_bias(self.graph, node)):
                yield "skipped: " + "; ".join(dict.fromkeys(map(str, refusals))), node

    def _try(self, fold: Callable[[gs.Node], None], node: gs.Node) -> None:
        if node.outputs:  # else an earlier fold has removed it
            try:
                fold(node)
            except Refusal as refusal:
                self.refusals.setdefault(id(node), (node, []))[1].append(refusal)

    def _rewrite(self, what: str, node: gs.Node) -> None:
        self.begin(what, node)
        self.refusals.pop(id(node), None)

    def _starts(self) -> list[gs.Node]:
        """The first node of each chain, in graph order."""
        starts, inside = [], set()
        for node in self.graph.nodes:
            if id(node) in inside:
                continue
            try:
                unit = self._unit(node)
            except Refusal as refusal:
                self.refusals[id(node)] = node, [refusal]
                continue
            if unit is not None:
                starts.append(node)
                inside.update(map(id, unit.nodes))
        return starts

    def _unit(self, node: gs.Node) -> _Unit | None:
        """The longest chain that begins at a node, or None if the node is no such map."""
        unit = _unit(self.graph, node)
        if unit is None:
            return None
        nodes, made = [node], unit.map
        while len(readers := nodes[-1].outputs[0].outputs) == 1 and not self.exposed(nodes[-1].outputs[0]):
            try:
                following = _unit(self.graph, readers[0])
            except Refusal:
                break
            if following is None or following.source is not nodes[-1].outputs[0]:
                break
            both = made.then(following.map)
            if both is None:
                break
            nodes.append(readers[0])
            made = both
        return _Unit(tuple(nodes), unit.source, made)

    def _fold_backward(self, node: gs.Node) -> None:
        unit, rest = self._unit(node), None
        if unit is None or not (unit.map.scales or unit.map.shifts):
            raise _Far("it is the identity")
        push = _Push(self)
        try:
            push.backward(unit.source, unit.map)
        except Refusal:
            if not (unit.map.scales and unit.map.shifts and unit.cost > 1):
                raise
            # A linear map without a bias takes the scale; the shift stays behind as one Add.
            push, rest = _Push(self), unit.map.shift_only
            push.backward(unit.source, unit.map.scale_only)
        edits = push.edits(_COPY_LIMIT)
        self._rewrite(f"{unit.label} into {push.absorbers}", node)
        push.commit(edits, unit.nodes)
        source, target = unit.source, unit.target
        if rest is not None:
            insert_constant(self.graph, "Add", source, rest.broadcast(rank(source))[1], target, unit.nodes)
        disconnect(unit.nodes)
        if rest is not None:
            return
        for reader, index in list(_edges(source)):
            reader.inputs[index] = target
        producer = source.inputs[0]
        producer.outputs[next(i for i, t in enumerate(producer.outputs) if t is source)] = target

    def _fold_forward(self, node: gs.Node) -> None:
        if (unit := self._unit(node)) is None:
            return
        push = _Push(self)
        try:
            push.forward(unit.target, unit.map)
        except Refusal:
            # The scales that end a chain may pass where its shift cannot.
            unit = self._trailing_scales(unit)
            if unit is None:
                raise
            push = _Push(self)
            push.forward(unit.target, unit.map)
        if len(push.adds) >= unit.cost:
            raise Refusal("the linear map after it has no bias to take the shift")
        edits = push.edits(_COPY_LIMIT)
        self._rewrite(f"{unit.label} into the next {push.absorbers}", node)
        push.commit(edits, unit.nodes)
        for reader, index in list(_edges(unit.target)):
            reader.inputs[index] = unit.source
        disconnect(unit.nodes)

    def _trailing_scales(self, unit: _Unit) -> _Unit | None:
        """The end of a chain that has no shift; None if that is all of it or nothing."""
        start = len(unit.nodes)
        while start and (last := _unit(self.graph, unit.nodes[start - 1])) and not last.map.shifts:
            start -= 1
        return self._unit(unit.nodes[start]) if 0 < start < len(unit.nodes) else None

    def _fold_norm(self, node: gs.Node) -> None:
        """Gamma and beta of a norm that must stay go into what follows it; 1 and 0 stay behind."""
        if any(t.name and self.graph.constant(t) is None for t in node.inputs[1:3]):
            return
        push = _Push(self)
        held = push.held(node)
        ends = held.ending
        if not (ends.scales or ends.shifts):
            return
        push.forward(node.outputs[0], ends)
        if push.adds:
            raise Refusal("the linear map after it has no bias to take the shift")
        what = f"gamma and beta into the next {push.absorbers}"
        zeros = None if held.bias is None else np.zeros_like(held.bias)
        push.hold(replace(held, map=affine.identity(held.map.outputs), bias=zeros, scaled=True))
        edits = push.edits(copy_limit=0)  # no node goes, so that a copy would only cost
        self._rewrite(what, node)
        push.commit(edits, ())

    def _merge(self, node: gs.Node) -> None:
        """Shorten a chain that must stay to one Mul and one Add."""
        if (unit := self._unit(node)) is None:
            return
        scale, shift = unit.map.broadcast(rank(unit.source))
        parts = [("Mul", scale, unit.map.scales), ("Add", shift, unit.map.shifts)]
        needed = [(kind, value) for kind, value, need in parts if need]
        if not 0 < len(needed) < len(unit.nodes):
            return
        if any(affine.misfit(value, unit.target.dtype, value) for _, value in needed):
            raise Refusal(f"the constants of the chain would overflow {unit.target.dtype}")
        self._rewrite(f"chain of {len(unit.nodes)} into {' and '.join(kind for kind, _ in needed)}", node)
        source, target = unit.source, unit.target
        for kind, value in needed:
            result = target if kind == needed[-1][0] else self.graph.new_variable(target.name, target)
            insert_constant(self.graph, kind, source, value, result, unit.nodes)
            source = result
        disconnect(unit.nodes)


def _is_bias(graph: Graph, node: gs.Node) -> bool:
    """True if a node is the bias of a MatMul: there is no better place for it."""
    before = [p for p in map(graph.producer, node.inputs) if p is not None]
    return node.op == "Add" and any(op(p) == "MatMul" for p in before)
