"""Size and work of a graph: nodes, parameters, multiply-accumulates and bytes.

One multiply-accumulate (MAC) is counted per weight and output position of Conv, Gemm and MatMul, and per weight and
input position of ConvTranspose, which is the work it does. Elementwise operators count nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.errors import InputError
from edgecompile.graph import Graph


@dataclass(frozen=True)
class Stats:
    """Totals over a graph.

    Attributes:
        nodes: nodes of the main graph.
        parameters: elements of floating-point constants with more than one element.
        macs: multiply-accumulates for one run, or None if some shape is unknown.
        bytes: size of all constants.
    """

    nodes: int
    parameters: int
    macs: int | None
    bytes: int

    def as_dict(self) -> dict[str, int | None]:
        """The figures by name."""
        return asdict(self)


def count(graph: Graph, feeds: Mapping[str, np.ndarray] | None = None) -> Stats:
    """Totals of a graph; MACs at the shapes of ``feeds`` if given."""
    constants = list(graph._constants())
    floats = (t for t in constants if np.dtype(t.dtype).kind in "fV" and math.prod(t.shape) > 1)
    per_node = node_macs(graph, feeds)
    macs = None if any(m is None for m in per_node) else sum(m for m in per_node if m)
    return Stats(
        len(graph.nodes),
        sum(math.prod(t.shape) for t in floats),
        macs,
        sum(t._values.nbytes for t in constants),
    )


def node_macs(graph: Graph, feeds: Mapping[str, np.ndarray] | None = None) -> list[int | None]:
    """MACs of each node of the main graph, in order; None where a shape that is needed is unknown."""
    shaped = graph.copy()
    for tensor in shaped.inputs:
        if feeds and tensor.name in feeds:
            tensor.shape = list(feeds[tensor.name].shape)
    if feeds:  # stale symbolic shapes would win over what inference finds
        inputs = {id(t) for t in shaped.inputs}
        for tensor in shaped.tensors().values():
            if isinstance(tensor, gs.Variable) and id(tensor) not in inputs:
                tensor.shape = None
    with contextlib.suppress(InputError):
        shaped.infer_shapes()
    return [_macs(node) for node in shaped.nodes]


def ops(graph: Graph) -> dict[str, int]:
    """Number of nodes by operator type, most frequent first; foreign domains are spelled out."""
    counted = Counter(f"{n.domain}::{n.op}" if n.domain else n.op for n in graph.walk())
    return dict(counted.most_common())


def _known(shape) -> bool:
    return shape is not None and all(isinstance(d, int) for d in shape)


def _macs(node: gs.Node) -> int | None:
    rule = _RULES.get(node.op) if not node.domain else None
    if rule is None:
        return 0
    if not all(_known(t.shape) for t in [*node.inputs[:2], node.outputs[0]]):
        return None
    return rule(node, node.inputs[0].shape, node.inputs[1].shape, node.outputs[0].shape)


def _gemm(node: gs.Node, a, b, y) -> int:
    return math.prod(y) * (a[0] if node.attrs.get("transA") else a[1])


_RULES = {
    "Conv": lambda node, x, w, y: math.prod(y) * math.prod(w[1:]),
    "ConvTranspose": lambda node, x, w, y: math.prod(x) * math.prod(w[1:]),
    "Gemm": _gemm,
    "MatMul": lambda node, a, b, y: math.prod(y) * a[-1],
}
