"""The rules of a strongly typed TensorRT network, checked on the graph.

Nothing is cast on the quiet: the operands of an operator have one floating-point type, and a quantized tensor exists
only between a QuantizeLinear and a DequantizeLinear. Whether a convolution runs on int8 is decided by where these
stand, so a missing one does not fail the build: it makes a slower engine. Such findings are not fatal.

Source: TensorRT documentation, "Strong Typing vs Weak Typing", and "Working with Quantized Types", sections "Explicit
Quantization" and "Q/DQ Layer-Placement Recommendations".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Graph, Tensor, where
from edgecompile.targets.trt.preflight import Problem, View, given, type_name

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
_MIXED = ("Resize", "Upsample", "If", "Loop", "Scan")  # scales are always FLOAT, and bodies checked by themselves
_MIXED_NORM = (10, 7)
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu")


class Reason(NamedTuple):
    """Why, what would help, and whether TensorRT refuses it: see :class:`Problem`."""

    why: str
    fix: str
    fatal: bool = True


def check(graph: Graph | View, version: str) -> list[Problem]:
    """Every place where a graph breaks the rules, or keeps TensorRT from fusing what is quantized.

    Args:
        graph: the graph, which is not changed; a view of it saves inferring its shapes again.
        version: of TensorRT.

    Raises:
        InputError: types or shapes of the graph contradict one another.
    """
    view = View.of(graph, version)
    found: list[Problem] = []
    for node in view.graph.walk():
        rules = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}.get(node.op, _operator)
        name = node.name or node.outputs[0].name
        reasons = [*_operands(view, node), *rules(view, node)]
        found += [Problem(where(node), r.why, r.fix, name, r.fatal) for r in reasons]
    return found


def _operands(view: View, node: gs.Node) -> Iterator[Reason]:
    if node.op in _MIXED or (node.op == "BatchNormalization" and view.version >= _MIXED_NORM):
        return
    types = list(dict.fromkeys(t for t in map(type_name, node.inputs) if t in _FLOATS))
    if len(types) > 1:
        yield Reason(f"its inputs are {' and '.join(types)}", f"cast them to {types[0]} before it")


# -- quantized tensors -------------------------------------------------------------------------------------------------


def _scale(view: View, node: gs.Node) -> Iterator[Reason]:
    scale = view.constant(node, 1)
    if scale is None:
        yield Reason("its scale must be a constant", "calibrate statically")
        return
    values = scale.astype(np.float32)
    if not (np.all(np.isfinite(values)) and np.all(values > 0)):
        yield Reason("its scale must be positive and finite", "calibrate again, on data that reaches this tensor")


def _quantize(view: View, node: gs.Node) -> Iterator[Reason]:
    yield from _scale(view, node)
    if _per_axis(view, node) and view.constant(node, 0) is None:
        yield Reason("an activation has one scale for the whole tensor", "calibrate per tensor")
    readers = [r for r in node.outputs[0].outputs if r.op != "DequantizeLinear"]
    if readers or view.graph.is_output(node.outputs[0]):
        what = where(readers[0]) if readers else "an output of the model"
        yield Reason(f"{what} reads quantized values", "put a DequantizeLinear between")


def _dequantize(view: View, node: gs.Node) -> Iterator[Reason]:
    yield from _scale(view, node)
    before = view.graph.producer(node.inputs[0])
    if view.graph.constant(node.inputs[0]) is None and (before is None or before.op != "QuantizeLinear"):
        what = where(before) if before is not None else "an input of the model"
        yield Reason(f"it reads {what}, which is not quantized by a QuantizeLinear", "put a QuantizeLinear before it")
        return
    if not _per_axis(view, node):
        return
    for reader in node.outputs[0].outputs:
        axis = _channel_axis(reader, node.outputs[0])
        given_axis = node.attrs.get("axis", 1) % max(len(node.inputs[0].shape or (0,)), 1)
        if axis is not None and axis != given_axis:
            yield Reason(
                f"{where(reader)} needs weights with one scale per index of axis {axis}, not {given_axis}",
                "quantize the weights per output channel",
            )


def _per_axis(view: View, node: gs.Node) -> bool:
    scale = view.constant(node, 1)
    return scale is not None and scale.size > 1


def _channel_axis(reader: gs.Node, weights: Tensor) -> int | None:
    """The axis of the weights that counts output channels."""
    if reader.op not in _WEIGHTED or len(reader.inputs) < 2 or reader.inputs[1] is not weights:
        return None
    count = len(weights.shape) if weights.shape is not None else 2
    return {
        "Conv": 0,
        "ConvTranspose": 1,
        "Gemm": 0 if reader.attrs.get("transB", 0) else 1,
        "MatMul": count - 1,
    }[reader.op]


# -- islands of floating point -----------------------------------------------------------------------------------------


def _operator(view: View, node: gs.Node) -> Iterator[Reason]:
    if node.op in _WEIGHTED:
        quantized = [_dequantized(t) for t in node.inputs[:2]]
        if quantized == [True, False]:
            yield Reason(
                "its input is quantized, its weights are not: it runs in floating point",
                "quantize its weights too, or leave out the pair before it",
                False,
            )
        elif quantized == [False, True]:
            yield Reason(
                "its weights are quantized, its input is not: it runs in floating point",
                "quantize its input too, or leave its weights",
                False,
            )
    elif node.op == "Add" and _requantized(view, node.outputs[0]) and given(node, 1):
        fusible = any(_quantized_product(view, t) for t in node.inputs[:2])
        bias = any(view.constant(node, i) is not None for i in (0, 1))
        if fusible and not bias and not any(map(_dequantized, node.inputs[:2])):
            yield Reason(
                "the sum cannot join the convolution before it: its other input is not quantized",
                "put a QuantizeLinear and a DequantizeLinear on the shortcut",
                False,
            )
    elif node.op == "Concat":
        yield from _joined(view, node)
    if node.op in _WEIGHTED and all(_dequantized(t) for t in node.inputs[:2]):
        yield from _left_in_float(view, node)


def _joined(view: View, node: gs.Node) -> Iterator[Reason]:
    """A Concat between Q/DQ pairs copies integers if all of them have one scale."""
    after = view.graph.sole_consumer(node.outputs[0])
    pairs = [t.inputs[0] for t in node.inputs if _dequantized(t)]
    if after is None or after.op != "QuantizeLinear" or not pairs:
        return
    if len(pairs) < len(node.inputs):
        yield Reason(
            f"{len(node.inputs) - len(pairs)} of its {len(node.inputs)} inputs are not quantized: it runs in "
            "floating point between quantized tensors",
            "put a QuantizeLinear and a DequantizeLinear on each",
            False,
        )
    elif len({_scale_of(view, n) for n in [*pairs, after]}) > 1:
        yield Reason(
            "its inputs and its result have several scales: each is rescaled on the way",
            "give them one scale",
            False,
        )


def _left_in_float(view: View, node: gs.Node) -> Iterator[Reason]:
    """An int8 convolution quantizes its own result only where all that read it read one quantized tensor."""
    tensor = node.outputs[0]
    while (reader := view.graph.sole_consumer(tensor)) is not None and reader.op in _ACTIVATIONS:
        tensor = reader.outputs[0]
    pairs = [r for r in tensor.outputs if r.op == "QuantizeLinear"]
    others = [r for r in tensor.outputs if r.op != "QuantizeLinear"]
    if pairs and (others or view.graph.is_output(tensor)):
        what = where(others[0]) if others else "an output of the model"
        yield Reason(
            f"its result is quantized for one reader, and {what} reads it in floating point: a kernel of its own "
            "quantizes it",
            "let all that read it read the dequantized tensor",
            False,
        )
    elif len({_scale_of(view, n) for n in pairs}) > 1:
        yield Reason(
            "its result is quantized with several scales: a kernel of its own quantizes each",
            "quantize it once",
            False,
        )


def _scale_of(view: View, node: gs.Node) -> bytes | int:
    """What tells one scale from another."""
    scale = view.constant(node, 1)
    return id(node.inputs[1]) if scale is None else scale.astype(np.float32).tobytes()


def _dequantized(tensor: Tensor) -> bool:
    return len(tensor.inputs) == 1 and tensor.inputs[0].op == "DequantizeLinear"


def _quantized_product(view: View, tensor: Tensor) -> bool:
    """True for the result of an int8 convolution that nothing else reads."""
    before = view.graph.producer(tensor)
    if before is None or before.op not in _WEIGHTED or view.graph.sole_consumer(tensor) is None:
        return False
    return all(_dequantized(t) for t in before.inputs[:2])


def _requantized(view: View, tensor: Tensor) -> bool:
    """True if a tensor is quantized again, at once or after an activation."""
    reader = view.graph.sole_consumer(tensor)
    while reader is not None and reader.op in _ACTIVATIONS:
        tensor = reader.outputs[0]
        reader = view.graph.sole_consumer(tensor)
    return bool(tensor.outputs) and all(r.op == "QuantizeLinear" for r in tensor.outputs)
