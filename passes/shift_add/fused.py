"""Attention as one operator, written as the products and the Softmax that it stands for, so that it is found like any.

Read are ``Attention`` of ONNX (opset 23), and ``Attention`` and ``MultiHeadAttention`` of ``com.microsoft``, where each
query may see every key: with a mask or bias that is added, without a cache, a causal mask or lengths of sequences.

Sources: the ONNX operator specification; ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Graph, Tensor

MICROSOFT = "com.microsoft"


@dataclass(frozen=True, eq=False)
class Fused:
    """One such operator.

    Attributes:
        node: the operator.
        why: why it is left alone, or ``""``.
    """

    node: gs.Node
    why: str


def find(graph: Graph) -> Iterator[Fused]:
    """The fused attentions of a graph with inferred shapes."""
    for node in graph.nodes:
        if (node.domain or "", node.op) in _READERS:
            yield Fused(node, _refused(graph, node))


def write(graph: Graph, node: gs.Node) -> None:
    """Replace one that :func:`find` gave no reason against. The caller tidies the graph."""

    def added(op: str, inputs: list[Tensor], count: int = 1, **attrs: object) -> list[Tensor]:
        outputs = [graph.new_variable(f"{node.outputs[0].name}_{op.lower()}") for _ in range(count)]
        graph.insert(op, inputs, outputs, attrs, replaces=[node])
        return outputs

    result = _READERS[(node.domain or "", node.op)](graph, node, added)
    graph.rewire(node.outputs[0], result)


_Added = Callable[..., list[Tensor]]
# Inputs that may be there, by position; any other input is a cache or a length.
_INPUTS = {
    ("", "Attention"): (0, 1, 2, 3), (MICROSOFT, "Attention"): (0, 1, 2, 5),
    (MICROSOFT, "MultiHeadAttention"): (0, 1, 2, 3, 5),
}  # fmt: skip
_FORBIDDEN = ("is_causal", "unidirectional", "softcap", "do_rotary", "qk_matmul_output_mode")


def _input(node: gs.Node, position: int) -> Tensor | None:
    found = node.inputs[position] if position < len(node.inputs) else None
    return found if found is not None and found.name else None


def _refused(graph: Graph, node: gs.Node) -> str:
    allowed = _INPUTS[(node.domain or "", node.op)]
    if any(_input(node, i) is not None for i in range(len(node.inputs)) if i not in allowed):
        return "it has a cache or lengths of sequences"
    if set_ := [name for name in _FORBIDDEN if node.attrs.get(name)]:
        return f"its attribute {set_[0]} is set"
    if any(t.name and (t.outputs or graph.is_output(t)) for t in node.outputs[1:]):
        return "more than its result is used"
    if any(_input(node, i) is None for i in (0, 1)) or (node.op != "Attention" and _input(node, 2) is None):
        return "its queries, keys and values are packed"
    if not node.domain:
        q, k = node.inputs[0].shape, node.inputs[1].shape
        if q is None or k is None or len(q) not in (3, 4):
            return "the shape of its queries is not known"
        heads = (q[1], k[1]) if len(q) == 4 else (node.attrs.get("q_num_heads"), node.attrs.get("kv_num_heads"))
        if heads[0] != heads[1] or not isinstance(heads[0], int):
            return "several heads of queries share keys"
        mask = _input(node, 3)
        if mask is not None and mask.dtype != np.float32:
            return "its mask is not added"
        if len(q) == 4 and not isinstance(q[3], int):
            return "the size of its heads is not known"
    elif node.op == "MultiHeadAttention" and any(len(node.inputs[i].shape or ()) != 3 for i in range(3)):
        return "its queries, keys and values are packed"
    elif node.op == "Attention" and graph.constant(node.inputs[1]) is None:
        return "its weights are not constant"
    return ""


def _ints(graph: Graph, values: list[int]) -> Tensor:
    return graph.new_constant("sizes", np.asarray(values, np.int64))


def _heads(graph: Graph, added: _Added, x: Tensor, count: int) -> Tensor:
    """``[B, N, heads d]`` to ``[B, heads, N, d]``."""
    (split,) = added("Reshape", [x, _ints(graph, [0, 0, count, -1])])
    return added("Transpose", [split], perm=[0, 2, 1, 3])[0]


def _joined(graph: Graph, added: _Added, x: Tensor) -> Tensor:
    """The inverse of :func:`_heads`."""
    (turned,) = added("Transpose", [x], perm=[0, 2, 1, 3])
    return added("Reshape", [turned, _ints(graph, [0, 0, -1])])[0]


def _attend(graph: Graph, added: _Added, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    (turned,) = added("Transpose", [k], perm=[0, 1, 3, 2])
    (scores,) = added("MatMul", [q, turned])
    (scores,) = added("Mul", [scores, graph.new_constant("scale", np.asarray(scale, np.float32))])
    if bias is not None:
        (scores,) = added("Add", [scores, bias])
    return added("MatMul", [added("Softmax", [scores], axis=-1)[0], v])[0]


def _scale(node: gs.Node, size: int) -> float:
    return float(node.attrs.get("scale") or 1 / math.sqrt(size))


def _standard(graph: Graph, node: gs.Node, added: _Added) -> Tensor:
    operands, flat = list(node.inputs[:3]), len(node.inputs[0].shape) == 3
    size = node.inputs[0].shape[-1]
    if flat:
        heads = int(node.attrs["q_num_heads"])
        size //= heads
        operands = [_heads(graph, added, x, heads) for x in operands]
    q, k, v = operands
    result = _attend(graph, added, q, k, v, _scale(node, size), _input(node, 3))
    return _joined(graph, added, result) if flat else result


def _multi_head(graph: Graph, node: gs.Node, added: _Added) -> Tensor:
    operands, heads = list(node.inputs[:3]), int(node.attrs["num_heads"])
    sizes = [int(x.shape[-1]) for x in operands]
    if (bias := _input(node, 3)) is not None:
        parts = added("Split", [bias, _ints(graph, sizes)], 3, axis=0)
        operands = [added("Add", [x, part])[0] for x, part in zip(operands, parts, strict=True)]
    operands = [_heads(graph, added, x, heads) for x in operands]
    q, k, v = operands
    result = _attend(graph, added, q, k, v, _scale(node, sizes[0] // heads), _input(node, 5))
    return _joined(graph, added, result)


def _microsoft(graph: Graph, node: gs.Node, added: _Added) -> Tensor:
    heads, width = int(node.attrs["num_heads"]), node.inputs[1].shape[-1]
    sizes = [int(n) for n in node.attrs.get("qkv_hidden_sizes") or [width // 3] * 3]
    (joint,) = added("MatMul", [node.inputs[0], node.inputs[1]])
    if (bias := _input(node, 2)) is not None:
        (joint,) = added("Add", [joint, bias])
    parts = added("Split", [joint, _ints(graph, sizes)], 3, axis=-1)
    operands = [_heads(graph, added, x, heads) for x in parts]
    q, k, v = operands
    result = _attend(graph, added, q, k, v, _scale(node, sizes[0] // heads), _input(node, 5))
    return _joined(graph, added, result)


_READERS = {
    ("", "Attention"): _standard,
    (MICROSOFT, "Attention"): _microsoft,
    (MICROSOFT, "MultiHeadAttention"): _multi_head,
}
