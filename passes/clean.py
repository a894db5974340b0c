"""Clean: compute what is constant, drop what does nothing, share what is equal.

Four rewrites, each an equation between ONNX graphs:

- *Folding.* A node that reads only constants is a constant; so is ``Shape`` where the dimensions are, whoever computes
  the tensor. A whole subgraph folds at once, into the one tensor that the rest of the model reads. Size and cost are
  known before anything is computed: a tensor in the subgraph may take ``fold_limit`` bytes, the result ``growth`` times
  the initializers it is computed from (1 MiB is always fine), all results together ``growth`` times the model's
  weights and ``fold_limit`` more, all computations together ``work`` operations. So a file of 1 KiB cannot ask for
  1 GiB. Random operators, control flow, local functions, other domains, strings and types that NumPy lacks are not
  folded, nor are QuantizeLinear and DequantizeLinear, which carry precision.
- *Identities.* ``x + 0 = x - 0 = x * 1 = x / 1 = x ** 1 = x``, a Cast to the same type, Dropout at inference, and a
  Reshape, Expand, Tile, Slice, Pad, Transpose, Concat, Split, Sum, ... that changes nothing, where shapes prove it
  whatever broadcasts. ``T_p(T_q(x)) = T_{q[p]}(x)`` and ``Reshape_s(Reshape_t(x)) = Reshape_s(x)``. They hold bit for
  bit, NaN included, but for one: ``-0.0 + 0.0`` is ``0.0``, and is ``-0.0`` once the Add is dropped.
- *Sharing.* Nodes of one operator with equal attributes and inputs compute the same; so do equal initializers.
- *Dead nodes* go.

Folds agree with a runtime up to rounding. One run reaches the fixed point, unless the budget for all folds together ran
out. If, Loop and Scan bodies are cleaned by the same rules, except that their inputs have no known shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.evaluate import TensorType, Unfoldable, type_of
from edgecompile.graph import Graph, Tensor, disconnect, redirect
from edgecompile.pipeline import Context, Pass, PassResult
from edgecompile.propagate import PRECISION, RANDOM, Propagation, View, mib, standard

_FREE = 1 << 20  # bytes that any fold may produce: a window's relative position bias is many times its table


@dataclass(frozen=True)
class Clean(Pass):
    """Constant folding, identities, common subexpressions, dead nodes.

    Attributes:
        fold_limit: bytes of the largest tensor that folding computes.
        growth: how many times the bytes of the initializers it is computed from a folded tensor may take.
        work: scalar operations, about a nanosecond each, that all folds may take together.
    """

    name: ClassVar[str] = "clean"
    exact: ClassVar[bool] = True
    fold_limit: int = 64 << 20
    growth: int = 4
    work: int = 1 << 33

    def __post_init__(self) -> None:
        if min(self.fold_limit, self.growth, self.work) < 0:
            raise ValueError("fold_limit, growth and work must not be negative")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Clean ``graph`` in place."""
        graph.tidy()
        _Sweep(graph, context, self).scope(graph)
        graph.tidy()
        return context.result()


# -- operators that do nothing: the index of the input that the output equals, or None --------------------------------


def _equal(a: TensorType, b: TensorType, *, reshaped: bool = False) -> bool:
    """Whether two shapes are proved equal; of a reshaped tensor all but one dimension prove the last."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    differ = [e for d, e in zip(a.shape, b.shape, strict=True) if d is None or d != e]
    return not differ or (reshaped and len(differ) == 1 and not isinstance(differ[0], int) and 0 not in b.shape)


def _neutral(element: float, *sides: int) -> Callable[[View], int | None]:
    def rule(view: View) -> int | None:
        for side in sides:
            value, other = view.value(side), view.types[1 - side].shape
            if value is None or not value.size or value.dtype.kind not in "biufV":
                continue
            aligned = zip(value.shape[::-1], (other or ())[::-1], strict=False)
            fits = value.ndim <= len(other or ()) and all(d in (1, e) for d, e in aligned)
            if fits and value.reshape(-1)[0] == element and (value == element).all():
                return 1 - side
        return None

    return rule


def _if(test: Callable[[View], Any]) -> Callable[[View], int | None]:
    return lambda view: 0 if test(view) else None


def _whole_slice(view: View) -> bool:
    starts, ends, steps = view.ints(1, "starts"), view.ints(2, "ends"), view.ints(4)
    if starts is None or ends is None or (steps is None and view.given(4)) or any(s != 1 for s in steps or ()):
        return False
    return _equal(view.types[0], view.outputs[0]) or (not any(starts) and min(ends, default=0) >= (1 << 31) - 1)


def _dropout(view: View) -> bool:
    training = view.value(2) if view.given(2) else np.False_
    return training is not None and not training.any() and bool(view.opset >= 7 or view.node.attrs.get("is_test"))


def _same_perm(view: View) -> bool:
    perm = view.node.attrs.get("perm")
    return list(perm) == sorted(perm) if perm is not None else len(view.types[0].shape or (0, 0)) < 2


def _where(view: View) -> int | None:
    value = view.value(0)
    if value is None or not value.size or not (value == value.reshape(-1)[0]).all():
        return None
    picked = 1 if value.reshape(-1)[0] else 2
    return picked if _equal(view.types[picked], view.outputs[0]) else None


_alone = _if(lambda v: len(v.node.inputs) == 1)
_keeps_shape = _if(lambda v: _equal(v.types[0], v.outputs[0], reshaped=True))

_NOTHING: dict[str, Callable[[View], int | None]] = {
    "Identity": lambda _: 0,
    "Dropout": _if(_dropout),
    "Add": _neutral(0, 1, 0),
    "Sub": _neutral(0, 1),
    "Mul": _neutral(1, 1, 0),
    "Div": _neutral(1, 1),
    "Pow": _neutral(1, 1),
    "And": _neutral(True, 1, 0),
    "Or": _neutral(False, 1, 0),
    "Cast": _if(lambda v: v.outputs[0].dtype and v.outputs[0].dtype == v.types[0].dtype),
    "Reshape": _keeps_shape,
    "Flatten": _keeps_shape,
    "Squeeze": _keeps_shape,
    "Unsqueeze": _keeps_shape,
    "Expand": _if(lambda v: _equal(v.types[0], v.outputs[0])),
    "Tile": _if(lambda v: (n := v.ints(1)) is not None and all(i == 1 for i in n)),
    "Slice": _if(_whole_slice),
    "Pad": _if(lambda v: (n := v.ints(1, "pads", "paddings")) is not None and not any(n)),
    "Transpose": _if(_same_perm),
    "Where": _where,
    "Split": _if(lambda v: len(v.node.outputs) == 1),
    **dict.fromkeys(("Concat", "Max", "Mean", "Min", "Sum"), _alone),
}


class _Sweep:
    """One walk over the nodes in topological order: each is settled before anything that reads it is looked at."""

    def __init__(self, graph: Graph, context: Context, options: Clean):
        self.graph, self.rewrite, self.note, self.growth = graph, context.rewrite, context.note, options.growth
        self.facts = Propagation(graph, options.fold_limit, options.work, context.note)
        self.room = options.growth * graph.weight_bytes() + options.fold_limit  # bytes that folds may still add
        self.instead: dict[int, Tensor] = {}  # what readers still to come read for a tensor
        self.refused: set[int] = set()
        self.equal: dict[tuple, list[gs.Constant]] = {}
        self.digests: dict[int, bytes] = {}
        bodies = [v for n in graph.walk() for v in n.attrs.values() if isinstance(v, gs.Graph)]
        self.returned: dict[int, gs.Graph] = {id(t): body for body in [graph, *bodies] for t in body.outputs}

    def scope(self, body: gs.Graph) -> None:
        """Clean the model, or the body of an If, Loop or Scan."""
        main = body is self.graph
        produced = {id(t) for node in body.nodes for t in node.outputs}
        twins: dict[tuple, gs.Node] = {}
        for tensor in body.inputs:
            self.facts.declared(tensor, shape=main)
        self.fold_constant_nodes(body)
        for node in list(body.nodes):
            self.visit(node, produced, twins, main)
        for tensor in body.outputs:
            producer = self.graph.producer(tensor)
            if producer and producer.op != "Constant" and not _names_initializer(producer):
                self.settle(tensor)
        if not main:
            _drop_dead(body)

    def visit(self, node: gs.Node, produced: set[int], twins: dict[tuple, gs.Node], main: bool) -> None:
        """Simplify a node unless it is constant; settle what it reads."""
        for index, tensor in enumerate(node.inputs):
            if id(tensor) in self.instead:
                node.inputs[index] = self.instead[id(tensor)]
        for body in node.subgraphs():
            self.scope(body)
        if standard(node) and node.op == "CastLike":
            self.name_type(node)
        view = self.facts.visit(node)
        if view.constant and not _names_initializer(node):
            return
        if view.proto is not None:
            while self.compose(view):
                outputs, view = view.outputs, self.facts.view(node)
                view.outputs = outputs
            if self.drop(view, produced):
                return
        settled = [self.settle(tensor, node) for tensor in node.inputs]
        if any(settled) and view.proto is not None:
            view.values = self.facts.view(node).values  # large ones are known only now
            if self.drop(view, produced):
                return
        for index, tensor in enumerate(node.inputs):
            if main and isinstance(tensor, gs.Constant):
                node.inputs[index] = self.share(tensor, node)
        if view.proto is not None:
            self.merge(view, produced, twins)

    # -- folding

    def fold_constant_nodes(self, body: gs.Graph) -> None:
        """Turn Constant nodes into initializers, but for those that are an output."""
        tensors = [n.outputs[0] for n in body.nodes if standard(n) and n.op == "Constant"]
        values = {id(t): v for t in tensors if (v := self.graph.constant(t)) is not None and type_of(v).static}
        found = [(t, values[id(t)]) for t in tensors if id(t) in values and id(t) not in self.returned]
        if found and self.rewrite(f"turn {len(found)} Constant nodes into initializers", found[0][0].inputs[0]):
            for tensor, value in found:
                self.become_constant(tensor, value)

    def settle(self, tensor: Tensor, reader: gs.Node | None = None) -> bool:
        """Make an initializer of a constant, now that something not constant reads it; True if that was done."""
        known = self.facts.known.get(id(tensor))
        if known is None or not known.constant or isinstance(tensor, gs.Constant) or id(tensor) in self.refused:
            return False
        node, size = tensor.inputs[0], known.type.nbytes
        try:
            nodes, basis = self.facts.subtree(node)
            if size > max(_FREE, self.growth * basis):
                raise Unfoldable(f"{mib(size)} output exceeds {self.growth} times its initializers, {mib(basis)}")
            if size > self.room:
                raise Unfoldable(f"{mib(size)} output, and what is folded already outgrows the model")
            value = self.facts.value(tensor)
        except Unfoldable as error:
            self.refused.add(id(tensor))
            self.note(f"{node.op} not folded: {error}", node)
            return False
        if not self.rewrite(f"fold {len(nodes)} node{'s' * (len(nodes) > 1)} into {tensor.name}", node):
            return False
        self.room -= size
        if id(tensor) in self.returned:
            self.stand_in(self.graph.new_constant(tensor.name, value), tensor, nodes)
        else:
            self.become_constant(tensor, value)
        if reader is not None:
            self.graph.absorb(reader, nodes)
        return True

    def become_constant(self, tensor: Tensor, value: np.ndarray) -> None:
        """Turn a computed tensor into an initializer, in place: everything that reads it goes on reading it."""
        if isinstance(value.base, np.ndarray) and value.base.nbytes > value.nbytes:
            value = value.copy()  # a view would keep alive all that it is a part of
        value = np.ascontiguousarray(value).reshape(value.shape)
        self.detach(tensor)
        tensor.to_constant(value)
        self.facts.learn(tensor, type_of(value), value)

    # -- identities

    def name_type(self, node: gs.Node) -> None:
        """Turn CastLike into a Cast where the type is known: its second operand is then read by nobody."""
        dtype = self.facts.look(node.inputs[1]).type.dtype
        if dtype and self.rewrite("name the type of CastLike", node):
            node.op, node.attrs["to"] = "Cast", dtype
            del node.inputs[1]

    def compose(self, view: View) -> bool:
        """Let a Transpose of a Transpose, or a Reshape of any reshaping, read what the inner one reads."""
        node = view.node
        inner = self.graph.producer(node.inputs[0]) if node.op in ("Transpose", "Reshape") else None
        if inner is None or not standard(inner) or not inner.inputs:
            return False
        attrs: dict[str, Any] = {}
        if node.op == inner.op == "Transpose":
            default = list(range(len(view.types[0].shape or ())))[::-1]
            outer_perm, inner_perm = node.attrs.get("perm", default), inner.attrs.get("perm", default)
            if not outer_perm or len(outer_perm) != len(inner_perm):
                return False
            attrs["perm"] = [inner_perm[axis] for axis in outer_perm]
        elif node.op == "Transpose" or inner.op not in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
            return False
        else:
            shape = view.ints(1, "shape")
            if shape is None or (0 in shape and not node.attrs.get("allowzero")):
                return False  # 0 copies a dimension of what the inner one writes
        if not self.rewrite(f"compose {node.op} with {inner.op}", node):
            return False
        node.attrs.update(attrs)
        node.inputs[0] = inner.inputs[0]
        self.graph.absorb(node, [inner])
        return True

    def drop(self, view: View, produced: set[int]) -> bool:
        """Let the readers of a node that does nothing read its input; True if the node is gone."""
        node, rule = view.node, _NOTHING.get(view.node.op)
        index = rule(view) if rule else None
        if index is None or any(t.name and (t.outputs or id(t) in self.returned) for t in node.outputs[1:]):
            return False
        old, new = node.outputs[0], node.inputs[index]
        stays = node.op == "Identity" and id(old) in self.returned and not self.may_return(new, produced)
        if (stays and not old.outputs) or not self.rewrite(f"drop {node.op}", node):
            return False
        self.instead[id(old)] = new
        if not stays:
            self.replace(old, new, node, produced)
        return not stays

    # -- sharing

    def merge(self, view: View, produced: set[int], twins: dict[tuple, gs.Node]) -> None:
        """Let the readers of a node read an equal one before it."""
        node, proto = view.node, view.proto
        if proto is None or node.op in RANDOM | PRECISION | {"Identity"}:
            return
        key = (proto.SerializeToString(deterministic=True), *(id(t) for t in node.inputs if t.name))
        twin = twins.setdefault(key, node)
        if twin is not node and self.rewrite(f"reuse an equal {node.op}", node):
            for old, new in zip(list(node.outputs), list(twin.outputs), strict=True):
                if old.name:
                    self.replace(old, new, node, produced)
            self.graph.absorb(twin, [node])

    def share(self, tensor: gs.Constant, node: gs.Node) -> gs.Constant:
        """The first of all equal initializers. Large ones are compared by a sample, then by digest."""
        array = self.facts.look(tensor).value
        if array is None:
            return tensor
        flat = array.reshape(-1)
        sample = flat[:: max(1, flat.size // 64)].tobytes()
        alike = self.equal.setdefault((array.dtype, array.shape, sample), [])
        if any(other is tensor for other in alike):
            return tensor
        twin = next((c for c in alike if flat.size <= 64 or self.digest(c) == self.digest(tensor)), None)
        if twin is None:
            alike.append(tensor)
        elif self.rewrite(f"read {twin.name} for the equal {tensor.name}", node):
            self.instead[id(tensor)] = twin
            return twin
        return tensor

    def digest(self, tensor: gs.Constant) -> bytes:
        """A hash of an initializer's bytes."""
        if id(tensor) not in self.digests:
            self.digests[id(tensor)] = hashlib.sha256(tensor.values.reshape(-1).view(np.uint8).data).digest()
        return self.digests[id(tensor)]

    # -- changing the graph

    def may_return(self, tensor: Tensor, produced: set[int]) -> bool:
        """Whether a tensor can take the name of an output of the scope that is being cleaned."""
        return isinstance(tensor, gs.Variable) and id(tensor) in produced and id(tensor) not in self.returned

    def replace(self, old: Tensor, new: Tensor, node: gs.Node, produced: set[int]) -> None:
        """Let everything that reads ``old`` read ``new``; what the caller reads keeps its name and declared type."""
        self.instead[id(old)] = new
        body = self.returned.get(id(old))
        if body is None:
            return
        if not self.may_return(new, produced):
            self.settle(new, node)
            self.stand_in(new, old, [node])
            return
        old.name, new.name = self.graph.fresh_name(old.name), old.name
        new.dtype, new.shape = old.dtype, old.shape
        body.outputs = [new if t is old else t for t in body.outputs]
        self.returned[id(new)] = self.returned.pop(id(old))

    def stand_in(self, new: Tensor, old: Tensor, nodes: list[gs.Node]) -> None:
        """Compute an output of the model or of a body as the Identity of another tensor."""
        body = self.returned[id(old)]
        if body is self.graph and isinstance(new, gs.Constant):
            new = self.share(new, nodes[0])
        redirect(old, new)
        self.detach(old)
        self.graph.insert("Identity", [new], [old], replaces=nodes)
        if body is not self.graph:
            body.nodes.append(self.graph.nodes.pop())

    def detach(self, tensor: Tensor) -> None:
        """Let the producer of a tensor write to nowhere instead."""
        outputs = tensor.inputs[0].outputs
        outputs[next(i for i, t in enumerate(outputs) if t is tensor)] = self.graph.new_variable(tensor.name)


def _names_initializer(node: gs.Node) -> bool:
    """Whether a node is an Identity of an initializer: how an output is made of one."""
    return standard(node) and node.op == "Identity" and isinstance(node.inputs[0], gs.Constant)


def _drop_dead(body: gs.Graph) -> None:
    """Drop the nodes of a body that nothing reads; the order is topological, so their readers are seen first."""
    returned, dead = {id(t) for t in body.outputs}, {}
    for node in reversed(body.nodes):
        if not any(id(t) in returned or any(id(r) not in dead for r in t.outputs) for t in node.outputs):
            dead[id(node)] = node
    disconnect(dead.values())
    body.nodes = [n for n in body.nodes if id(n) not in dead]
