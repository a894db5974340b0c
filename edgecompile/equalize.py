"""Rewrites of a network that change nothing in real arithmetic and much in int8.

- *Scale reparameterization.* A LayerNorm gives each channel a range of its own, an activation has one scale. Dividing
  the result by ``r1`` and moving it by ``r2`` per channel, in gamma and beta, gives all channels one range; the linear
  maps that read it undo both: ``W (r1 * (x' + r2)) = (W r1) x' + (W r1) r2`` (RepQ-ViT, section 3.3).
- *Equalisation.* Between two linear maps with nothing or a positively homogeneous function between them, ``f(a x) =
  a f(x)`` for ``a > 0``, each channel may be divided by a positive number in the first and multiplied in the second.
  The number evens out the ranges on both sides (data-free quantization, section 4.1); with the magnitude of the
  activation instead of that of the first weights it moves difficulty from activations to weights (SmoothQuant, eq. 4).
- *Bias correction.* Rounding the weights moves the mean of each output channel by the mean of ``(W_q - W) x``. A linear
  map of the mean is the mean of the map, so the mean input suffices; the bias takes the difference back (data-free
  quantization, section 4.2).

Sources: Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV
2023; Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; Xiao et al.,
"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import linear, qdq, sensitivity
from edgecompile.affine import Refusal
from edgecompile.calibration import Range
from edgecompile.graph import Graph, Tensor
from edgecompile.linear import Scaling, op
from edgecompile.linear_write import Changes
from edgecompile.oracle import Feeds
from edgecompile.placement import Layer, Placement

_COPY_LIMIT = 64 << 20  # bytes of shared weights that may be copied
_HOMOGENEOUS = ("Relu", "LeakyRelu")
_SWEEPS = 20  # equalisation converges geometrically; more sweeps than this change nothing that 8 bits can see
_SETTLED = 1e-3

Apply = Callable[[str, gs.Node], bool]


@dataclass(frozen=True)
class Skipped:
    """A place that was left alone, and why."""

    node: gs.Node
    why: str


# -- scale reparameterization ------------------------------------------------------------------------------------------


def norms(graph: Graph) -> Iterator[tuple[gs.Node, int]]:
    """LayerNorms that only linear layers read, and the channel axis of their result."""
    for node in graph.nodes:
        if op(node) != "LayerNormalization" or len([t for t in node.outputs if t.name]) != 1:
            continue
        tensor = node.outputs[0]
        readers = list(tensor.outputs)
        if readers and not graph.is_output(tensor) and all(_reads(graph, n, tensor) for n in readers):
            yield node, linear.rank(tensor) - 1


def _reads(graph: Graph, node: gs.Node, tensor: Tensor) -> bool:
    """True if a node is a linear layer that maps a tensor with constant weights."""
    return (
        op(node) in linear.LINEAR
        and node.inputs[0] is tensor
        and sum(t is tensor for t in node.inputs) == 1
        and all(graph.constant(t) is not None for t in node.inputs[1:] if t.name)
    )


def reparameterize_norms(
    graph: Graph, ranges: Mapping[str, Range], *, symmetric: bool = False, apply: Apply | None = None
) -> list[Skipped]:
    """Give all channels of the result of each LayerNorm one range.

    Args:
        graph: the graph; it is changed.
        ranges: with ``per_channel``, of the results of :func:`norms`; others are left alone.
        symmetric: the target's zero point is that of the real zero, so that only scales help.
        apply: asked before each change with its name and node; None for always.

    Returns:
        what was left alone.
    """
    skipped = []
    for node, axis in list(norms(graph)):
        known = ranges.get(node.outputs[0].name)
        if known is None or known.per_channel is None:
            skipped.append(Skipped(node, "its channels were not calibrated"))
            continue
        low, high = np.asarray(known.per_channel, np.float64).T
        scale, shift = _evened(low, high, symmetric)
        forward, back = Scaling.of(axis, 1 / scale, -shift), Scaling.of(axis, scale, shift * scale)
        try:
            _move(graph, node, node.outputs[0], forward, back, "scale reparameterization", apply)
        except Refusal as refusal:
            skipped.append(Skipped(node, str(refusal)))
    return skipped


def _evened(low: np.ndarray, high: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Per channel ``r1`` and ``r2`` with which ``x / r1 - r2`` has one range."""
    width = 2 * np.maximum(np.abs(low), np.abs(high)) if symmetric else high - low
    width = np.maximum(width, 1e-6 * max(float(width.max()), np.finfo(np.float32).tiny))
    scale = width / width.mean()
    shift = np.zeros_like(scale) if symmetric else low / scale - (low / scale).mean()
    return scale, shift


def _move(
    graph: Graph, first: gs.Node, tensor: Tensor, forward: Scaling, back: Scaling, what: str, apply: Apply | None
) -> None:
    """Let ``first`` end in ``forward`` and every reader of ``tensor`` begin with ``back``."""
    changes = Changes(graph)
    changes.hold(changes.held(first).before(forward))
    for reader in {id(n): n for n in tensor.outputs}.values():
        held, rest = changes.held(reader).after(back)
        changes.hold(held)
        if rest is not None:
            _take(graph, changes, reader.outputs[0], rest)
    edits = changes.edits(_COPY_LIMIT)
    if apply is None or apply(what, first):
        changes.commit(edits, [])


def _take(graph: Graph, changes: Changes, tensor: Tensor, rest: Scaling) -> None:
    """Put a shift that a layer without a bias leaves into the Add that follows it, or into a new one."""
    after = graph.sole_consumer(tensor)
    if after is not None and op(after) == "Add" and linear.is_affine(graph, after):
        index = int(after.inputs[0] is tensor)
        if linear.constant(graph, after, index).ndim <= linear.rank(tensor):
            return changes.write(after, index, rest, 1)
    return changes.add(tensor, rest)


# -- equalisation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Link:
    """Two linear layers that share a channel each for each.

    Attributes:
        first, second: the layers.
        tensor: the result of ``first``.
        entry: what ``second`` reads: ``tensor``, or the result of the function between.
    """

    first: gs.Node
    second: gs.Node
    tensor: Tensor
    entry: Tensor


def links(graph: Graph) -> Iterator[Link | Skipped]:
    """Pairs of layers to equalise, and those that the function between them forbids."""
    for node in graph.nodes:
        if op(node) not in linear.LINEAR or graph.constant(node.inputs[1]) is None:
            continue
        tensor = node.outputs[0]
        reader = graph.sole_consumer(tensor)
        entry = tensor
        if reader is not None and (op(reader) in _HOMOGENEOUS or op(reader) == "Clip"):
            entry, after = reader.outputs[0], graph.sole_consumer(reader.outputs[0])
            if after is not None and _reads(graph, after, entry) and op(reader) == "Clip":
                yield Skipped(node, "the Clip after it is not positively homogeneous")
                continue
            reader = after
        if reader is not None and _reads(graph, reader, entry):
            yield Link(node, reader, tensor, entry)


def equalize(
    graph: Graph, magnitudes: Mapping[str, np.ndarray] | None = None, *, apply: Apply | None = None
) -> list[Skipped]:
    """Even out the ranges of the channels between pairs of layers.

    Args:
        graph: the graph; it is changed.
        magnitudes: largest absolute value of each channel of activations, by tensor name, [channels]. Where a tensor
            between two layers has none, the largest weights of the first layer stand in for it, and pairs are repeated
            until they settle.
        apply: asked before each change with its name and node; None for always.

    Returns:
        what was left alone.
    """
    found = list(links(graph))
    skipped = {id(s.node): s for s in found if isinstance(s, Skipped)}
    pairs = [p for p in found if isinstance(p, Link)]
    allowed = [p for p in pairs if apply is None or apply("cross-layer equalisation", p.first)]
    for _ in range(_SWEEPS):
        largest = 0.0
        for pair in allowed:
            try:
                largest = max(largest, _even(graph, pair, (magnitudes or {}).get(pair.entry.name)))
            except Refusal as refusal:
                skipped[id(pair.first)] = Skipped(pair.first, str(refusal))
        if largest < _SETTLED or magnitudes:
            break
    return list(skipped.values())


def _even(graph: Graph, pair: Link, magnitude: np.ndarray | None) -> float:
    """Equalise one pair; returns the largest change of a channel, as a logarithm."""
    changes = Changes(graph)
    one, two = changes.held(pair.first), changes.held(pair.second)
    outgoing = np.abs(one.map.kernel).max((0, 2)) if magnitude is None else np.asarray(magnitude, np.float64)
    incoming = np.zeros(two.map.channels)
    used = two.map.inputs >= 0
    np.maximum.at(incoming, two.map.inputs[used], np.abs(two.map.kernel).max(0)[used])
    if outgoing.shape != incoming.shape:
        raise Refusal("the two layers do not agree on the number of channels")
    live = (outgoing > 0) & (incoming > 0)
    factor = np.ones_like(outgoing)
    factor[live] = np.sqrt(outgoing[live] / incoming[live])
    if live.any():
        factor[live] /= np.exp(np.log(factor[live]).mean())
    axis = two.layer.axis
    changes.hold(one.before(Scaling.of(one.layer.exit_axis, 1 / factor)))
    held, _ = two.after(Scaling.of(axis, factor))
    changes.hold(held)
    changes.commit(changes.edits(_COPY_LIMIT), [])
    return float(np.abs(np.log(factor)).max(initial=0.0))


# -- bias correction ---------------------------------------------------------------------------------------------------


def corrected_biases(
    graph: Graph, placement: Placement, ranges: Mapping[str, Range], bits: Mapping[int, int], feeds: Sequence[Feeds]
) -> dict[int, np.ndarray]:
    """Biases that keep the mean of each output channel where rounding the weights moves it.

    Args:
        graph: the graph in floating point.
        placement, ranges: made from ``graph``.
        bits: width of the weights of each layer, by id of its node.
        feeds: model inputs to average over, of equal shapes.

    Returns:
        new biases, float32 [C_out], by id of the node, of Conv and Gemm layers and of each MatMul with an Add.
    """
    maps = qdq.quantizers(placement, ranges)
    found: dict[int, np.ndarray] = {}
    layers = [made for made in placement.layers if made.node.op in ("Conv", "Gemm") or made.add is not None]
    for start in range(0, len(layers), 16):
        part = layers[start : start + 16]
        means: dict[str, Any] = {}
        for number, one in enumerate(sensitivity.activations(graph, [m.source.name for m in part], feeds), 1):
            for name, value in one.items():
                means[name] = means.get(name, 0.0) + (value - means.get(name, 0.0)) / number
        for made in part:
            source = maps[placement.points[made.source.name].group]
            quantizer = qdq.layer_weights(made, source, bits[id(made.node)], placement.rules.int32_bias)
            error = quantizer.dequantize(quantizer.quantize(made.weight)) - made.weight
            moved = _mean_output(graph, made, error, means[made.source.name].astype(np.float32))
            bias = 0.0 if made.bias is None else made.bias
            if made.add is not None:
                bias = linear.constant(graph, made.add, int(made.add.inputs[0] is made.node.outputs[0])).reshape(-1)
            found[id(made.node)] = (bias - moved).astype(np.float32)
    return found


def _mean_output(graph: Graph, made: Layer, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Per output channel the mean of what a layer with these weights, and no bias, makes of ``x``."""
    source, result = made.source.name, made.node.outputs[0].name
    part = qdq.fragment(graph, [source], [result])
    alone = part.nodes[-1]
    alone.inputs = [alone.inputs[0], part.new_constant("weight_error", weight.astype(np.float32))]
    part.tidy()
    y = qdq.kernels(part)({source: x})[result]
    channels = y.ndim - 1 if made.node.op == "MatMul" else 1
    return y.mean(tuple(i for i in range(y.ndim) if i != channels))
