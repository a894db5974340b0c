"""Mixtures of experts by token: from computing every expert for every token to computing one.

A mixture is exported densely, ``Y = where(c, A(X), B(X))`` with one choice c for each token, as data-dependent shapes
do not export well. Where A and B act on each token alone, the tokens can be sorted first: with ``i`` the numbers of the
tokens that chose A and ``j`` those of the others,

    Y[i] = A(X[i]),   Y[j] = B(X[j]),

which costs one expert a token in place of two, and gathering. The shapes then depend on the data: a runtime that fixes
shapes beforehand cannot run it.

Source: You et al., ShiftAddViT, NeurIPS 2023, section 4.2 (hard choice between a multiplying and a shifting expert).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Graph, Tensor
from edgecompile.passes.shift_add import ops

# Operators that map each token alone, given constants beside it.
_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Clip", "Floor", "Round", "Relu", "Gelu", "Erf"}
)
_LINEAR = frozenset({"ShiftLinear", "BinaryCodedLinear"})


@dataclass(frozen=True, eq=False)
class Mixture:
    """A choice between two experts.

    Attributes:
        node: the Where.
        source: what both experts read, ``[..., tokens, channels]``.
        choice: bool ``[..., tokens, 1]``: true for the first expert.
        experts: the nodes of each expert, in order.
    """

    node: gs.Node
    source: Tensor
    choice: Tensor
    experts: tuple[tuple[gs.Node, ...], tuple[gs.Node, ...]]


def find(graph: Graph) -> Iterator[Mixture]:
    """The mixtures of a graph with inferred shapes that hold a linear layer in each expert."""
    for node in graph.nodes:
        if node.op != "Where" or node.domain:
            continue
        choice, first, second = node.inputs
        chains = [_chain(graph, t, node) for t in (first, second)]
        entries = [[t for t, _ in chain] for chain in chains]
        source = next((t for t in entries[0] if any(t is u for u in entries[1])), None)
        if source is None or not _per_token(choice, source):
            continue
        experts = []
        for chain in chains:
            depth = next(i for i, (t, _) in enumerate(chain) if t is source)
            experts.append(tuple(n for _, n in reversed(chain[: depth + 1]) if n is not None))
        if all(any(_is_linear(n) for n in nodes) for nodes in experts):
            yield Mixture(node, source, choice, (experts[0], experts[1]))


def _is_linear(node: gs.Node) -> bool:
    return node.op == "MatMul" or (node.domain == ops.DOMAIN and node.op in _LINEAR)


def _chain(graph: Graph, tensor: Tensor, reader: gs.Node) -> list[tuple[Tensor, gs.Node]]:
    """Tensors on the only path to ``tensor`` through maps of single tokens, each with the node that reads it."""
    found = []
    while (node := graph.producer(tensor)) is not None:
        varying = [t for t in node.inputs if t.name and graph.constant(t) is None]
        alone = len(tensor.outputs) == 1 and tensor.outputs[0] is reader and not graph.is_output(tensor)
        known = _is_linear(node) or (node.op in _ELEMENTWISE and not node.domain)
        if not alone or not known or len(varying) != 1 or varying[0] is not node.inputs[_data(graph, node)]:
            break
        if any(
            not _broadcasts(c) for t in node.inputs if (c := graph.constant(t)) is not None and not _is_linear(node)
        ):
            break
        found.append((varying[0], node))
        tensor, reader = varying[0], node
    return found


def _data(graph: Graph, node: gs.Node) -> int:
    """Position of the data: the first input, or of operators that commute the second."""
    return 1 if node.op in ("Add", "Mul", "Min", "Max") and graph.constant(node.inputs[0]) is not None else 0


def _broadcasts(values: np.ndarray) -> bool:
    """True if a constant is the same for all tokens."""
    return all(n == 1 for n in values.shape[:-1])


def _per_token(choice: Tensor, source: Tensor) -> bool:
    a, b = choice.shape, source.shape
    return a is not None and b is not None and len(a) == len(b) >= 2 and a[-1] == 1 and list(a[:-1]) == list(b[:-1])


def write(graph: Graph, one: Mixture) -> None:
    """Sort the tokens by their expert. The caller tidies the graph.

    Args:
        graph: of opset 13 or newer.
        one: the mixture.
    """
    old = [one.node, *one.experts[0], *one.experts[1]]
    rows = next(s for s in [one.node.outputs[0].shape] if s)[-1]

    def ints(*values: int) -> gs.Constant:
        return graph.new_constant("indices", np.asarray(values, np.int64))

    def added(op: str, *inputs: Tensor, **attrs: object) -> Tensor:
        return graph.insert(op, inputs, None, attrs, replaces=old).outputs[0]

    columns = one.source.shape[-1]
    tokens = added("Reshape", one.source, ints(-1, columns))
    choice = added("Reshape", one.choice, ints(-1))
    numbers, results = [], []
    for chosen, nodes in zip((choice, added("Not", choice)), one.experts, strict=True):
        number = added("Reshape", added("NonZero", chosen), ints(-1))
        value = added("Gather", tokens, number, axis=0)
        for node in nodes:
            inputs = list(node.inputs)
            inputs[_data(graph, node)] = value
            made = graph.insert(node.op, inputs, None, dict(node.attrs), replaces=[node, one.node], domain=node.domain)
            value = made.outputs[0]
        numbers.append(number)
        results.append(value)
    order = added("Concat", *numbers, axis=0)
    # The place of token t in what was computed: order^-1.
    count = added("Shape", order)
    scalar = graph.new_constant("zero", np.asarray(0, np.int64))
    unit = graph.new_constant("one", np.asarray(1, np.int64))
    ranks = added("Range", scalar, added("Squeeze", count), unit)
    place = added("ScatterElements", ranks, order, ranks, axis=0)
    merged = added("Gather", added("Concat", *results, axis=0), place, axis=0)
    shape = added("Concat", added("Slice", added("Shape", one.source), ints(0), ints(-1)), ints(rows), axis=0)
    graph.rewire(one.node.outputs[0], added("Reshape", merged, shape))
