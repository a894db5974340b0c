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
import onnx
import onnx_graphsurgeon as gs

from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance


@dataclass(frozen=True)
class Stats:
    """Totals over a graph.

    Attributes:
        nodes: nodes of the main graph.
        parameters: elements of floating-point constants, and of integer ones that are dequantized, with more than one
            element; without scales and zero points. That is an upper bound of what was trained: a graph does not say.
            A learned position embedding and a grid of anchor points are both a constant image that is added, a layer of
            one output and the bins of a distribution are both a column that is multiplied; and a bias table per pair of
            tokens is written out larger than the model stores it.
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
    """Totals of a graph; MACs at the shapes of ``feeds`` if given, else for a batch of one."""
    constants = list(graph._constants())
    floats = (t for t in constants if _is_parameter(t))
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
    return [_macs(node) for node in shaped(graph, feeds).nodes]


def shaped(graph: Graph, feeds: Mapping[str, np.ndarray] | None = None) -> Graph:
    """A copy with the shapes that the tensors have for these feeds, else for a batch of one, as far as inference finds
    them.
    """
    found = graph.copy()
    for tensor in found.inputs:
        if feeds and tensor.name in feeds:
            tensor.shape = list(feeds[tensor.name].shape)
        elif tensor.shape and not isinstance(tensor.shape[0], int):
            tensor.shape = [1, *tensor.shape[1:]]
    inputs, stale = {id(t) for t in found.inputs}, found.signature() != graph.signature()
    for tensor in found.tensors().values():
        # Stale and symbolic shapes would win over what inference finds; others it may not be able to find again.
        if isinstance(tensor, gs.Variable) and id(tensor) not in inputs and (stale or not _known(tensor.shape)):
            tensor.shape = None
    with contextlib.suppress(InputError):
        found.infer_shapes(outputs=True)
    return found


def ops(graph: Graph) -> dict[str, int]:
    """Number of nodes by operator type, most frequent first; foreign domains are spelled out."""
    counted = Counter(f"{n.domain}::{n.op}" if n.domain else n.op for n in graph.walk())
    return dict(counted.most_common())


@dataclass(frozen=True)
class ModuleStats:
    """Totals of the nodes of one torch module, with everything beneath it.

    Attributes:
        module: its path, ``""`` for nodes whose module is unknown.
        nodes, parameters, macs: as in :class:`Stats`; a weight counts where it is first read.
    """

    module: str
    nodes: int
    parameters: int
    macs: int | None


def by_module(graph: Graph, depth: int, feeds: Mapping[str, np.ndarray] | None = None) -> list[ModuleStats]:
    """Totals per torch module, in order of execution; deeper modules are added to their ancestor at ``depth``."""
    rows: dict[str, list[int | None]] = {}
    counted: set[int] = set()
    for node, macs in zip(graph.nodes, node_macs(graph, feeds), strict=True):
        first = next(iter(provenance(node).modules), "")
        row = rows.setdefault(".".join(first.split(".")[:depth]), [0, 0, 0])
        fresh = [t for t in node.inputs if isinstance(t, gs.Constant) and id(t) not in counted and _is_parameter(t)]
        counted.update(map(id, fresh))
        row[0] = (row[0] or 0) + 1
        row[1] = (row[1] or 0) + sum(math.prod(t.shape) for t in fresh)
        row[2] = None if row[2] is None or macs is None else row[2] + macs
    return [ModuleStats(name, n or 0, p or 0, m) for name, (n, p, m) in rows.items()]


def type_name(dtype: int) -> str:
    """The name of an ONNX element type, e.g. ``float32``."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype)).name if dtype else "?"


def _is_parameter(tensor: gs.Constant) -> bool:
    readers = list(tensor.outputs)
    pairs = [n for n in readers if n.op in ("QuantizeLinear", "DequantizeLinear")]
    if pairs and len(pairs) == len(readers) and all(n.inputs[0] is not tensor for n in pairs):
        return False  # a scale or a zero point
    stored = any(n.op == "DequantizeLinear" and n.inputs[0] is tensor for n in pairs)
    return (stored or np.dtype(tensor.dtype).kind in "fV") and math.prod(tensor.shape) > 1


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
