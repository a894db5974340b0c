"""The layers that read channels as a linear map: what of their input they read, as rows of a matrix.

A convolution is that map on patches, a Gemm or MatMul on the last axis. Scores ask how much of a layer's output a
channel makes; the repair solves for the weights anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Graph

from .rules import key


@dataclass(frozen=True)
class Linear:
    """A layer whose output is ``x @ weight.T + bias`` for rows ``x`` of what it reads.

    Attributes:
        node: name of its first output.
        source: name of the tensor that it reads.
        slot: which input of the node the weight is.
        taps: columns of the weight per input channel: positions of a kernel, 1 for matrices.
    """

    node: str
    source: str
    slot: int
    taps: int


def linear(graph: Graph, node: gs.Node) -> Linear | None:
    """The layer of a node; None if it is no plain linear map with constant weights.

    Grouped and transposed convolutions, and products that a Gemm scales, are none here.
    """
    if node.domain not in (None, "", "ai.onnx") or node.op not in _CHECKS:
        return None
    weight = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or weight.dtype != np.float32 or not _CHECKS[node.op](graph, node, weight):
        return None
    return Linear(key(node), node.inputs[0].name, 1, math.prod(weight.shape[2:]) if node.op == "Conv" else 1)


def _plain_conv(graph: Graph, node: gs.Node, weight: np.ndarray) -> bool:
    return node.attrs.get("group", 1) == 1 and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _plain_gemm(graph: Graph, node: gs.Node, weight: np.ndarray) -> bool:
    scaled = node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    return not scaled and not node.attrs.get("transA", 0) and bias is not None and bias.ndim <= 1


_CHECKS = {"Conv": _plain_conv, "Gemm": _plain_gemm, "MatMul": lambda graph, node, weight: weight.ndim == 2}


def matrix(node: gs.Node, weight: np.ndarray) -> np.ndarray:
    """The weight as float64 ``[outputs, inputs * taps]``."""
    if node.op == "Conv":
        return weight.reshape(len(weight), -1).astype(np.float64)
    transposed = node.op == "MatMul" or not node.attrs.get("transB", 0)
    return (weight.T if transposed else weight).astype(np.float64)


def unmatrix(node: gs.Node, values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of :func:`matrix`: a weight of the shape and type of ``like``."""
    transposed = node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0))
    return np.ascontiguousarray((values.T if transposed else values).reshape(like.shape), like.dtype)


def rows(node: gs.Node, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What a layer reads at some of its output positions, float64 ``[places, inputs * taps]``.

    Args:
        node: the layer.
        x: its input.
        places: positions, as indices into the flattened batch and space of its output.
    """
    if node.op != "Conv":
        return x.reshape(-1, x.shape[-1])[places].astype(np.float64)
    rank = x.ndim - 2
    kernel = list(node.attrs.get("kernel_shape") or node.inputs[1].shape[2:])
    pads = list(node.attrs.get("pads") or [0] * 2 * rank)
    steps, gaps = (list(node.attrs.get(name) or [1] * rank) for name in ("strides", "dilations"))
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    spans = [g * (k - 1) + 1 for k, g in zip(kernel, gaps, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(2, 2 + rank)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in (*steps, *gaps)))]
    # Axes: sample, channel, output positions, kernel positions.
    shape = (len(x), *windows.shape[2 : 2 + rank])
    sample, *position = np.unravel_index(places, shape)
    chosen = np.moveaxis(windows, 1, 1 + rank)[(sample, *position)]
    return chosen.reshape(len(places), -1).astype(np.float64)


def outputs(node: gs.Node, y: np.ndarray) -> np.ndarray:
    """What a layer computes at all its output positions, ``[positions, outputs]``, in the order of :func:`rows`."""
    axis = channels(node)
    return np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis])


def channels(node: gs.Node) -> int:
    """The axis of what a layer computes that its output channels lie on."""
    return -1 if node.op in ("Gemm", "MatMul") else 1


def add_bias(graph: Graph, node: gs.Node, change: np.ndarray) -> None:
    """Add float64 ``[outputs]`` to the bias of a Conv, ConvTranspose or Gemm, which gets one if it has none."""
    old = graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    weight = graph.constant(node.inputs[1])
    assert weight is not None
    values = (change if old is None else old.astype(np.float64).reshape(-1) + change).astype(weight.dtype)
    made = graph.new_constant(f"{node.inputs[1].name}_bias", values)
    if len(node.inputs) > 2:
        node.inputs[2] = made
    else:
        node.inputs.append(made)
