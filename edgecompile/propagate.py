"""Constant and shape propagation: what is known of every tensor before the model has run.

A pass shows the nodes of a graph, in topological order, to :meth:`Propagation.visit`, which records for each tensor its
type and, where the node reads only constants, its value or how to compute it. Small values (64 KiB) are computed at
once, since shapes depend on them; large ones when asked for. ``Shape`` and ``Size`` are constants wherever the
dimensions are; the value of a shape may be known in part (``[UNKNOWN, 3, 224, 224]``), and picking the known part of it
(Gather, Slice, ...) is a constant again.

Everything is budgeted before it is done: bytes of a tensor, of all tensors alive in one computation, and work.

Only what ONNX guarantees is believed: the declared types of the model's inputs, and what inference proves from them.
Recorded shapes of intermediate tensors are believed only of operators outside the standard, which have no inference;
they go stale where a model's batch size is edited by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompile.evaluate import (
    DATA_DEPENDENT,
    UNKNOWN,
    VIEWS,
    TensorType,
    Unfoldable,
    describe,
    evaluate,
    has_unknown,
    infer,
    rule_for,
    type_of,
    work_of,
)
from edgecompile.graph import Graph, Tensor

SMALL = 64 << 10
"""Bytes up to which a value is computed as soon as it can be."""

_PEAK = 4  # times the limit of one tensor: what all tensors alive in one computation may take
_STEP = 1000  # scalar operations that dealing with one node costs
_MOVES_SHAPES = {"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"}

PRECISION = {"QuantizeLinear", "DequantizeLinear"}
"""Operators that say in which precision a network runs; they stay where they are."""

RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
"""Operators that are, or may be, random."""


@dataclass(frozen=True)
class Fold:
    """A node that reads only constants, and what computing it gives and costs."""

    node: gs.Node
    proto: onnx.NodeProto
    outputs: list[TensorType]
    nbytes: int
    cost: int


@dataclass
class Known:
    """What is known of a tensor: its type; a value, of a shape perhaps only in part; or how to compute one."""

    tensor: Tensor  # held so that its id stays its own
    type: TensorType
    value: np.ndarray | None = None
    fold: Fold | None = None

    @property
    def constant(self) -> bool:
        """Whether the whole value is known or can be computed."""
        return self.fold is not None if self.value is None else not has_unknown(self.value)


@dataclass
class View:
    """A node with what is known of its inputs and outputs.

    Attributes:
        proto: the description of a node of the standard domain without subgraphs, else None.
        types, values: of the inputs.
        outputs: types of the outputs.
        constant: whether all outputs are constants.
    """

    node: gs.Node
    opset: int
    proto: onnx.NodeProto | None
    types: list[TensorType]
    values: list[np.ndarray | None]
    outputs: list[TensorType]
    constant: bool = False

    def value(self, index: int) -> np.ndarray | None:
        """The value of an input if it is wholly known."""
        value = self.values[index] if index < len(self.values) else None
        return None if value is None or has_unknown(value) else value

    def ints(self, index: int, *names: str) -> list[int] | None:
        """Integers that are an attribute in one opset and an input in another; None if absent or unknown."""
        found = next((self.node.attrs[n] for n in names if n in self.node.attrs), None)
        value = self.value(index)
        return list(found) if found is not None else None if value is None else value.reshape(-1).tolist()

    def given(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)


def standard(node: gs.Node) -> bool:
    """Whether an operator is of ONNX's default domain."""
    return node.domain in (None, "", "ai.onnx")


class Propagation:
    """What is known of the tensors of one graph.

    Args:
        graph: the graph; it is not changed.
        limit: bytes of the largest tensor to compute.
        work: scalar operations, about a nanosecond each, that all computations may take together.
        note: told why a node of constants is not computed.
    """

    def __init__(self, graph: Graph, limit: int, work: int, note: Callable[[str, gs.Node], None]):
        self.graph, self.limit, self.work, self.note = graph, limit, work, note
        self.opset = graph.opsets.get("", 0)
        self.functions = {f.name for f in graph.function_protos if f.domain in ("", "ai.onnx")}
        self.known: dict[int, Known] = {}

    def learn(
        self, tensor: Tensor, kind: TensorType, value: np.ndarray | None = None, fold: Fold | None = None
    ) -> Known:
        """Record what is known of a tensor."""
        self.known[id(tensor)] = known = Known(tensor, kind, value, fold)
        return known

    def declared(self, tensor: Tensor, *, shape: bool) -> None:
        """Believe the recorded element type of a tensor, and its recorded shape if ``shape``."""
        self.learn(tensor, TensorType(_dtype(tensor), _dims(tensor) if shape else None))

    def look(self, tensor: Tensor) -> Known:
        """What is known of a tensor."""
        known = self.known.get(id(tensor))
        if known is not None:
            return known
        array = tensor._values if isinstance(tensor, gs.Constant) else None
        if not isinstance(array, np.ndarray):
            return self.learn(tensor, TensorType())
        kind = type_of(array)
        return self.learn(tensor, kind, array if kind.static else None)

    def view(self, node: gs.Node) -> View:
        """A node with what is known of its inputs."""
        found = [self.look(t) for t in node.inputs]
        plain = standard(node) and node.op not in self.functions and not list(node.subgraphs())
        try:
            proto = describe(node) if plain and node.op != "Constant" else None
        except Unfoldable:
            proto = None
        return View(node, self.opset, proto, [k.type for k in found], [k.value for k in found], [])

    def visit(self, node: gs.Node) -> View:
        """Record what a node computes, given what is known of its inputs."""
        view = self.view(node)
        if view.proto is not None:
            for tensor, kind in zip(node.outputs, infer(view.proto, view.types, view.values, self.opset), strict=True):
                self.learn(tensor, kind)
            shape = node.op in ("Shape", "Size")
            view.constant = self._shape(view) if shape else self._constant(view)
        elif standard(node) and node.op == "Constant":
            value = self.graph.constant(node.outputs[0])
            view.constant = value is not None and type_of(value).static
            self.learn(
                node.outputs[0], TensorType() if value is None else type_of(value), value if view.constant else None
            )
        else:
            for tensor in node.outputs:
                self.declared(tensor, shape=not standard(node))
        view.outputs = [self.known[id(t)].type for t in node.outputs]
        return view

    def _shape(self, view: View) -> bool:
        """Record the value of a Shape or Size as far as it is known."""
        node, shape = view.node, view.types[0].shape
        if shape is None or (node.op == "Size" and not all(isinstance(d, int) for d in shape)):
            return False
        value = np.array([d if isinstance(d, int) else UNKNOWN for d in shape], np.int64)
        if node.op == "Size":
            value = np.array(view.types[0].elements, np.int64)
        else:
            value = value[node.attrs.get("start") : node.attrs.get("end")]
        return self.learn(node.outputs[0], type_of(value), value).constant

    def _constant(self, view: View) -> bool:
        """Whether a node computes constants; if so, they or the way to them are recorded."""
        node, proto = view.node, view.proto
        given = [self.look(t) for t in node.inputs if t.name]
        if not given or node.op in RANDOM | PRECISION or any(k.value is None and not k.fold for k in given):
            return False
        partly = [i for i, v in enumerate(view.values) if v is not None and has_unknown(v)]
        outputs = [self.known[id(t)].type for t in node.outputs]
        if partly and not (
            node.op in _MOVES_SHAPES
            and (partly == [0] or node.op == "Concat")
            and outputs[0].dtype == onnx.TensorProto.INT64
        ):
            return False
        try:
            assert proto is not None
            fold = self._plan(view, proto, outputs)
            now = bool(partly) or fold.nbytes <= SMALL
            values = self.compute(fold) if now else [None] * len(node.outputs)
        except Unfoldable as error:
            if not partly:
                self.note(f"{node.op} not folded: {error}", node)
            return False
        found = zip(node.outputs, fold.outputs, values, strict=True)
        known = [self.learn(t, kind, value, fold) for t, kind, value in found if t.name]
        return all(k.constant for k in known)

    def _plan(self, view: View, proto: onnx.NodeProto, outputs: list[TensorType]) -> Fold:
        """What computing a node of constants will give and cost; raises Unfoldable where that is too much."""
        rule_for(proto, self.opset)
        if proto.op_type in DATA_DEPENDENT and all(v is not None for v in view.values):
            self.spend(_STEP + work_of(proto, view.types, [], self.opset))
            outputs = [type_of(v) for v in evaluate(proto, view.values, outputs, self.opset)]
        inputs = [kind for kind, name in zip(view.types, proto.input, strict=True) if name]
        named = [kind for kind, name in zip(outputs, proto.output, strict=True) if name]
        if not all(kind.static for kind in [*inputs, *named]):
            raise Unfoldable("a type it reads or writes is unknown, or cannot be computed with")
        nbytes = sum(kind.nbytes for kind in named)
        if proto.op_type in VIEWS:
            return Fold(view.node, proto, outputs, 0, _STEP)
        if nbytes > self.limit:
            raise Unfoldable(f"{mib(nbytes)} output exceeds fold_limit")
        return Fold(view.node, proto, outputs, nbytes, _STEP + work_of(proto, inputs, named, self.opset))

    def spend(self, cost: int) -> None:
        """Take scalar operations from what is left of ``work``.

        Raises:
            Unfoldable: there are not so many left.
        """
        if cost > self.work:
            raise Unfoldable(f"it takes {cost:.1e} operations, and {self.work:.1e} of work are left")
        self.work -= cost

    def value(self, tensor: Tensor) -> np.ndarray:
        """The value of a constant.

        Raises:
            Unfoldable: it is not constant, too dear, or cannot be computed.
        """
        known = self.look(tensor)
        if known.value is None and known.fold is not None:
            outputs = known.fold.node.outputs
            return self.compute(known.fold)[next(i for i, t in enumerate(outputs) if t is tensor)]
        if known.value is None or not known.constant:
            raise Unfoldable("its value is not known")
        return known.value

    def compute(self, fold: Fold) -> list[np.ndarray]:
        """Compute a node and what it depends on; each value is let go of after its last use.

        Raises:
            Unfoldable: it takes too much memory or work, or an evaluation fails.
        """
        order: list[Fold] = []
        seen, stack = set(), [(fold, False)]
        while stack:
            step, expanded = stack.pop()
            if expanded:
                order.append(step)
            elif id(step) not in seen:
                seen.add(id(step))
                needed = [self.known[id(t)] for t in step.node.inputs if t.name]
                stack += [(step, True), *((k.fold, False) for k in needed if k.value is None and k.fold)]
        last = {id(t): i for i, step in enumerate(order) for t in step.node.inputs}
        held = {id(t): kind.nbytes for s in order for t, kind in zip(s.node.outputs, s.outputs, strict=True) if t.name}
        peak = live = 0
        for index, step in enumerate(order):
            peak = max(peak, live := live + step.nbytes)
            read = {id(t) for t in step.node.inputs if t.name and self.known[id(t)].fold}
            live -= sum(held.get(i, 0) for i in read if last[i] == index)
        if peak > _PEAK * self.limit:
            raise Unfoldable(f"computing it takes {mib(peak)} of memory, more than {_PEAK} times fold_limit")
        self.spend(sum(step.cost for step in order))
        made: dict[int, np.ndarray] = {}
        values: list[np.ndarray] = []
        for index, step in enumerate(order):
            inputs = [made.get(id(t), self.known[id(t)].value) if t.name else None for t in step.node.inputs]
            values = evaluate(step.proto, inputs, step.outputs, self.opset)
            made |= {id(t): v for t, v in zip(step.node.outputs, values, strict=True)}
            for tensor in step.node.inputs:
                if last[id(tensor)] == index:
                    made.pop(id(tensor), None)
        return values

    def subtree(self, node: gs.Node) -> tuple[list[gs.Node], int]:
        """The nodes that compute a constant, the last one first, and the bytes of the initializers they start from.

        Raises:
            Unfoldable: they are too many to look at.
        """
        nodes, leaves, stack = {id(node): node}, {}, [node]
        while stack:
            current = stack.pop()
            for tensor in () if current.op in ("Shape", "Size") else current.inputs:
                known = self.known.get(id(tensor))
                if isinstance(tensor, gs.Constant):
                    leaves[id(tensor)] = tensor._values.nbytes
                elif known and (known.fold or known.value is not None) and id(tensor.inputs[0]) not in nodes:
                    nodes[id(tensor.inputs[0])] = tensor.inputs[0]
                    stack.append(tensor.inputs[0])
        self.spend(_STEP * len(nodes))
        return list(nodes.values()), sum(leaves.values())


def _dtype(tensor: Tensor) -> int:
    if tensor.dtype is None or getattr(tensor, "type", "tensor_type") != "tensor_type":
        return 0
    if isinstance(tensor.dtype, int):
        return tensor.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def _dims(tensor: Tensor) -> tuple[int | str | None, ...] | None:
    """Declared dimensions; 0 and -1 are how some exporters write an unknown one."""
    if tensor.shape is None:
        return None
    return tuple(d if isinstance(d, str) or (d or 0) > 0 else None for d in tensor.shape)


def mib(nbytes: int) -> str:
    """A number of bytes as a person reads it."""
    return f"{nbytes / (1 << 20):.4g} MiB"
