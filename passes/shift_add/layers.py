"""Linear layers and 1x1 convolutions of a graph: found, and written as operators whose weights are sums of shifts.

``y = x W^T + b`` becomes ``Add(ShiftLinear(x, codes), b)``; the bias stays as it is, being added and not multiplied. A
1x1 convolution is the same map at every pixel. Preconditions are proved on types, shapes and constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import sensitivity
from edgecompile.graph import Graph, Tensor
from edgecompile.oracle import Feeds
from edgecompile.passes.shift_add import codes, ops


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or 1x1 convolution with constant weights.

    Attributes:
        node: the node.
        weight: float32 ``[rows, columns]``: outputs by inputs.
        bias: float32 ``[rows]`` or a scalar, or None.
        strides: of a convolution; None for a layer on the last axis.
    """

    node: gs.Node
    weight: np.ndarray
    bias: np.ndarray | None
    strides: tuple[int, ...] | None

    @property
    def source(self) -> Tensor:
        """What it reads: ``[..., columns]``, or ``[N, columns, H, W]`` of a convolution."""
        return self.node.inputs[0]


def find(graph: Graph) -> Iterator[Layer]:
    """The layers of a graph with inferred shapes, in its order."""
    for node in graph.nodes:
        if not node.domain and (reader := _READERS.get(node.op)) and (found := reader(graph, node)):
            yield found


def _weight(graph: Graph, node: gs.Node, rank: int) -> np.ndarray | None:
    """Second input, if it is a float32 constant of this rank and the first is not constant."""
    if len(node.inputs) < 2 or graph.constant(node.inputs[0]) is not None:
        return None
    values = graph.constant(node.inputs[1])
    return values if values is not None and values.dtype == np.float32 and values.ndim == rank else None


def _bias(graph: Graph, node: gs.Node) -> tuple[bool, np.ndarray | None]:
    """Whether the third input can be added per output, and its values."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True, None
    values = graph.constant(node.inputs[2])
    return values is not None and (values.size == 1 or values.size == values.shape[-1]), values


def _matmul(graph: Graph, node: gs.Node) -> Layer | None:
    weight = _weight(graph, node, 2)
    return None if weight is None else Layer(node, weight.T, None, None)


def _gemm(graph: Graph, node: gs.Node) -> Layer | None:
    weight = _weight(graph, node, 2)
    fits, bias = _bias(graph, node)
    if weight is None or not fits or node.attrs.get("transA", 0):
        return None
    weight = weight if node.attrs.get("transB", 0) else weight.T
    bias = None if bias is None else (bias.reshape(-1) * np.float32(node.attrs.get("beta", 1.0))).astype(np.float32)
    return Layer(node, weight * np.float32(node.attrs.get("alpha", 1.0)), bias, None)


def _conv(graph: Graph, node: gs.Node) -> Layer | None:
    weight = _weight(graph, node, 4)
    fits, bias = _bias(graph, node)
    if weight is None or not fits or weight.shape[2:] != (1, 1) or node.attrs.get("group", 1) != 1:
        return None
    # With a kernel of one pixel, automatic padding is none unless the stride leaves a border over.
    if any(node.attrs.get("pads") or ()) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    strides = tuple(int(s) for s in node.attrs.get("strides") or (1, 1))
    return Layer(node, weight[:, :, 0, 0], bias, strides)


_READERS = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv}


def grams(graph: Graph, layers: Sequence[Layer], feeds: Sequence[Feeds]) -> dict[str, np.ndarray]:
    """``X^T X`` of what each layer reads, summed over all feeds, by tensor: float64 ``[columns, columns]``.

    A stride of a convolution is heeded: pixels that it skips do not count. Layers of one tensor share a matrix, unless
    one skips pixels that another does not; then all count.
    """
    strides: dict[str, tuple[int, ...] | None] = {}
    for layer in layers:
        name, own = layer.source.name, layer.strides
        strides[name] = own if strides.get(name, own) == own else (None if own is None else (1, 1))
    total: dict[str, np.ndarray] = {}
    for seen in sensitivity.activations(graph, list(strides), feeds):
        for name, step in strides.items():
            x = seen[name]
            if step is not None:
                x = np.moveaxis(x[:, :, :: step[0], :: step[1]], 1, -1)
            flat = x.reshape(-1, x.shape[-1])
            # The sum of one batch in float32, the sum of batches in float64.
            part = (flat.T @ flat).astype(np.float64)
            total[name] = total[name] + part if name in total else part
    return total


def output_error(weight: np.ndarray, coded: np.ndarray, gram: np.ndarray) -> tuple[float, float]:
    """Energy of the error of a layer's outputs, and of the outputs: ``|X (W - Q)^T|^2`` and ``|X W^T|^2``."""
    difference = weight.astype(np.float64) - coded
    return float(((difference @ gram) * difference).sum()), float(((weight @ gram) * weight).sum())


def coded_constants(graph: Graph, coded: codes.Coded, hint: str) -> list[Tensor]:
    """The constants of an operator with these codes: planes, exponents and, of a book, levels."""
    values = {"planes": codes.pack(coded.codes, coded.bits), "exponents": coded.exponents}
    if coded.kind != "binary":
        values["levels"] = codes.book(coded.kind, coded.bits)
    return [graph.new_constant(f"{hint}_{name}", value) for name, value in values.items()]


def write(graph: Graph, layer: Layer, coded: codes.Coded, constants: Sequence[Tensor] = ()) -> None:
    """Replace a layer by the operator of its codes. The caller tidies the graph.

    Args:
        graph: of the layer.
        layer: the layer.
        coded: its codes.
        constants: what :func:`coded_constants` gave for another layer of the same codes, to store them once.
    """
    node, binary = layer.node, coded.kind == "binary"
    kind = ("BinaryCoded" if binary else "Shift") + ("Linear" if layer.strides is None else "Conv")
    hint = node.inputs[1].name
    inputs = [layer.source, *(constants or coded_constants(graph, coded, hint))]
    attributes: dict[str, object] = {"columns": layer.weight.shape[1], "group": coded.group}
    if layer.strides is not None:
        attributes["strides"] = list(layer.strides)
    end, old = node.outputs[0], [node]
    result = end if layer.bias is None else graph.new_variable(f"{end.name}_product", end)
    node.outputs = []
    graph.insert(kind, inputs, [result], attributes, replaces=old, domain=ops.DOMAIN)
    if layer.bias is not None:
        shape = layer.bias.shape if layer.strides is None else (*layer.bias.shape, 1, 1)
        bias = graph.new_constant(f"{hint}_bias", layer.bias.reshape(shape))
        graph.insert("Add", [result, bias], [end], replaces=old)
    node.inputs = []
    ops.declare(graph, kind)
