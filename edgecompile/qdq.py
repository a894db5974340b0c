"""The algebra of QuantizeLinear and DequantizeLinear, and a placement written into a graph.

An integer q stands for the real ``(q - zero) * scale``. Activations have one scale; weights are symmetric and have one
scale per output channel; a bias is an int32 whose scale is that of the accumulator, ``scale_x * scale_w``, so that the
kernel adds it without another rounding. A chain ``Q, DQ, op, Q, DQ`` whose op only selects among values is exact where
both pairs share a scale, because ``Q(DQ(q)) = q`` for each of the 256 integers.

On x86 without VNNI, the runtime multiplies pairs of uint8 by int8 and adds each two products in 16 bits, which
saturates beyond 32767. Weights of at most 64 cannot get there: ``2 * 255 * 64 = 32640``. Hence two widths of weights.

References: ONNX operators QuantizeLinear-13 and DequantizeLinear-13; Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 2; Intel 64 and IA-32 Architectures
Software Developer's Manual, VPMADDUBSW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import oracle
from edgecompile.calibration import Range, scale_zero_point
from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph, Tensor, redirect
from edgecompile.placement import Layer, Placement, Point, Rules, place

# The largest integer of a weight, by width in bits.
WEIGHT_LIMIT = {8: 127, 7: 64}
OPSET = 13  # the first with a scale per channel
_BIAS_LIMIT = float(1 << 30)  # half of int32, so that the products fit beside it


@dataclass(frozen=True, eq=False)
class Quantizer:
    """The map between reals and integers of one tensor.

    Attributes:
        scale: real per step, float32 [] or [channels].
        zero: the integer of the real zero, of the integer type, in the shape of ``scale``.
        axis: axis of the channels; None for one scale.
        limit: magnitude that integers do not exceed; None for the whole type.
    """

    scale: np.ndarray
    zero: np.ndarray
    axis: int | None = None
    limit: int | None = None

    def _along(self, values: np.ndarray, array: np.ndarray) -> np.ndarray:
        if self.axis is None:
            return array
        shape = [1] * values.ndim
        shape[self.axis] = -1
        return array.reshape(shape)

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """Integers of float32 values: divided in float32, rounded half to even, saturated."""
        info = np.iinfo(self.zero.dtype)
        low, high = (info.min, info.max) if self.limit is None else (-self.limit, self.limit)
        steps = np.rint(values.astype(np.float32) / self._along(values, self.scale)).astype(np.float64)
        return np.clip(steps + self._along(values, self.zero), low, high).astype(self.zero.dtype)

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        """Reals of integers, float32."""
        steps = integers.astype(np.int64) - self._along(integers, self.zero)
        return steps.astype(np.float32) * self._along(integers, self.scale)


def activation(interval: Range, rules: Rules, bounds: Iterable[tuple[float, float]] = ()) -> Quantizer:
    """The quantizer of an activation.

    Args:
        interval: its range; widened to hold zero.
        rules: the target, which decides type and symmetry.
        bounds: lowest and highest values that activation functions let through. No integer stands for a real beyond
            them, so that the saturation of the integers does the work of the function.
    """
    dtype = np.int8 if rules.signed else np.uint8
    scale, zero = scale_zero_point(interval, dtype, rules.symmetric)
    top = np.float32(np.iinfo(dtype).max - int(zero))
    for _, high in bounds:
        if top > 0 and interval.high <= high < np.inf:
            while scale * top > np.float32(high):
                scale = np.nextafter(scale, np.float32(0))
    return Quantizer(np.asarray(scale, np.float32), np.asarray(zero, dtype))


def weights(values: np.ndarray, axis: int, bits: int = 8, floor: np.ndarray | float = 0.0) -> Quantizer:
    """The symmetric quantizer of weights, one scale per index of ``axis``.

    Args:
        values: the weights, float32.
        axis: of the output channels.
        bits: 8 or 7, see :data:`WEIGHT_LIMIT`.
        floor: smallest scale of each channel.
    """
    limit = WEIGHT_LIMIT[bits]
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(others, initial=0.0).astype(np.float64)
    scale = np.maximum(largest / limit, floor)
    scale = np.where(scale > np.finfo(np.float32).tiny, scale, 1.0).astype(np.float32)
    return Quantizer(scale, np.zeros(scale.shape, np.int8), axis, limit)


def layer_weights(made: Layer, source: Quantizer, bits: int, int32_bias: bool) -> Quantizer:
    """The quantizer of a layer's weights, whose scales are large enough for the bias to fit the accumulator."""
    floor: np.ndarray | float = 0.0
    if int32_bias and made.bias is not None:
        floor = np.abs(made.bias.astype(np.float64)) / (float(source.scale) * _BIAS_LIMIT)
    return weights(made.weight, made.axis, bits, floor)


def bias(values: np.ndarray, source: Quantizer, weight: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """A bias as int32 [channels], and its scale, float32 [channels]: the scale of the accumulator."""
    scale = (source.scale * weight.scale).astype(np.float32)
    integers = np.rint(values.astype(np.float64) / scale)
    info = np.iinfo(np.int32)
    return np.clip(integers, info.min, info.max).astype(np.int32), scale


def union(ranges: Iterable[Range]) -> Range:
    """The smallest range that holds all."""
    found = list(ranges)
    return Range(min(r.low for r in found), max(r.high for r in found), found[0].method)


def quantizers(placement: Placement, ranges: Mapping[str, Range]) -> dict[int, Quantizer]:
    """The quantizer of each group of points.

    Raises:
        InputError: a point has no range.
    """
    made = {}
    for number, points in placement.groups.items():
        missing = [p.tensor.name for p in points if p.tensor.name not in ranges]
        if missing:
            raise InputError(f"the tensor {missing[0]!r} has no range", "it was not calibrated")
        interval = union(_bounded(ranges[p.tensor.name], p) for p in points)
        made[number] = activation(interval, placement.rules, [p.bounds for p in points])
    return made


def _bounded(interval: Range, point: Point) -> Range:
    low, high = point.bounds
    return Range(max(interval.low, low), min(interval.high, high), interval.method)


# -- writing -----------------------------------------------------------------------------------------------------------


def insert(
    graph: Graph,
    placement: Placement,
    ranges: Mapping[str, Range],
    bits: Mapping[int, int] | None = None,
    biases: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Write a placement into its graph.

    Args:
        graph: the graph, of opset 13 or later.
        placement: made from this graph.
        ranges: of every point.
        bits: width of the weights by id of the layer's node; 8 where it says nothing.
        biases: new biases of layers, float32 [C_out], by id of the node; a MatMul needs an Add for it.

    Raises:
        InputError: the opset is too old, or a point has no range.
    """
    if graph.opset < OPSET:
        raise InputError(
            f"int8 needs ONNX opset {OPSET}",
            f"the model has {graph.opset}, where a scale cannot vary by channel",
            f"export the model with opset_version={OPSET} or later",
        )
    maps = quantizers(placement, ranges)
    constants = {
        number: (
            graph.new_constant(f"{points[0].tensor.name}_scale", maps[number].scale),
            graph.new_constant(f"{points[0].tensor.name}_zero", maps[number].zero),
        )
        for number, points in placement.groups.items()
    }
    for point in placement.points.values():
        _pair(graph, point, constants[point.group])
    for made in placement.layers:
        if id(made.node) in (biases or {}):
            made = _with_bias(graph, made, (biases or {})[id(made.node)])
        source = maps[placement.points[_source(placement, made)].group]
        _weights(graph, placement.rules, made, source, (bits or {}).get(id(made.node), 8))
        if placement.rules.wide_add and made.add is not None:
            _widen(graph, made, made.add)


def _with_bias(graph: Graph, made: Layer, values: np.ndarray) -> Layer:
    """A layer with another bias; that of a MatMul is in the Add after it."""
    if made.add is not None:
        index, old = _added(graph, made, made.add)
        made.add.inputs[index] = graph.new_constant(f"{made.add.name}_bias", values.reshape(old.shape))
        return made
    new = graph.new_constant(f"{made.node.name}_bias", values)
    if len(made.node.inputs) > 2:
        made.node.inputs[2] = new
    else:
        made.node.inputs.append(new)
    return replace(made, bias=values)


def _widen(graph: Graph, made: Layer, add: gs.Node) -> None:
    """Give what an Add adds as many axes as its result has."""
    index, values = _added(graph, made, add)
    rank = len(add.outputs[0].shape or ())
    if rank > values.ndim:
        wide = values.reshape((1,) * (rank - 1) + (-1,))
        add.inputs[index] = graph.new_constant(f"{add.inputs[index].name}_wide", wide)


def _added(graph: Graph, made: Layer, add: gs.Node) -> tuple[int, np.ndarray]:
    """What an Add adds to a layer: the number of the input, and its value."""
    index = int(add.inputs[0] is made.node.outputs[0])
    values = graph.constant(add.inputs[index])
    assert values is not None
    return index, values


def _source(placement: Placement, made: Layer) -> str:
    """The name of the point that a layer reads, before and after its pair was written."""
    tensor = made.source
    while tensor.name not in placement.points:
        tensor = tensor.inputs[0].inputs[0]
    return tensor.name


def _pair(graph: Graph, point: Point, constants: tuple[gs.Constant, gs.Constant]) -> None:
    tensor, (scale, zero) = point.tensor, constants
    before = graph.producer(tensor)
    replaces = [before] if before is not None else [n for n, _ in point.slots or ()][:1]
    integers = graph.new_variable(f"{tensor.name}_quantized", tensor)
    integers.dtype = zero.dtype
    if point.slots is None and before is not None:
        # The dequantised tensor takes the name, so that every reader and the model's caller get it.
        inner = graph.new_variable(f"{tensor.name}_float", tensor)
        before.outputs[[t is tensor for t in before.outputs].index(True)] = inner
        graph.insert("QuantizeLinear", [inner, scale, zero], [integers], replaces=replaces)
        graph.insert("DequantizeLinear", [integers, scale, zero], [tensor], replaces=replaces)
        return
    outer = graph.new_variable(f"{tensor.name}_dequantized", tensor)
    for node, index in point.slots or ():
        node.inputs[index] = outer
    graph.insert("QuantizeLinear", [tensor, scale, zero], [integers], replaces=replaces)
    graph.insert("DequantizeLinear", [integers, scale, zero], [outer], replaces=replaces)


def _weights(graph: Graph, rules: Rules, made: Layer, source: Quantizer, bits: int) -> None:
    node, name = made.node, made.node.inputs[1].name
    quantizer = layer_weights(made, source, bits, rules.int32_bias)
    scale = graph.new_constant(f"{name}_scale", quantizer.scale)
    zero = graph.new_constant(f"{name}_zero", quantizer.zero)
    if rules.stored:
        stored: Tensor = graph.new_constant(f"{name}_quantized", quantizer.quantize(made.weight))
    else:
        stored = graph.new_variable(f"{name}_quantized")
        stored.dtype, stored.shape = np.dtype(np.int8), list(made.weight.shape)
        whole = graph.new_constant(name, made.weight)
        graph.insert("QuantizeLinear", [whole, scale, zero], [stored], {"axis": made.axis}, replaces=[node])
    node.inputs[1] = _dequantized(graph, node, name, [stored, scale, zero], made.axis, made.weight.shape)
    if made.bias is not None and rules.int32_bias:
        name = node.inputs[2].name
        integers, step = bias(made.bias, source, quantizer)
        inputs = [graph.new_constant(f"{name}_quantized", integers), graph.new_constant(f"{name}_scale", step)]
        node.inputs[2] = _dequantized(graph, node, name, inputs, 0, made.bias.shape)


def _dequantized(graph: Graph, node: gs.Node, name: str, inputs: list, axis: int, shape: tuple[int, ...]) -> Tensor:
    result = graph.new_variable(f"{name}_dequantized")
    result.dtype, result.shape = np.dtype(np.float32), list(shape)
    graph.insert("DequantizeLinear", inputs, [result], {"axis": axis}, replaces=[node])
    return result


def quantized(
    graph: Graph,
    rules: Rules,
    ranges: Mapping[str, Range],
    bits: Mapping[int, int] | None = None,
    biases: Mapping[int, np.ndarray] | None = None,
    **options,
) -> Graph:
    """A quantised copy of a graph.

    Args:
        graph: the graph; it is not changed.
        rules: the target's table.
        ranges: of the tensors that :func:`~edgecompile.placement.place` picks.
        bits: width of the weights of each layer to quantise, by its position in ``graph.nodes``; None for all layers
            in 8 bits.
        biases: new biases of layers, by position.
        options: of :func:`~edgecompile.placement.place`.
    """
    copy = graph.copy()
    nodes = list(copy.nodes)
    widths = {id(nodes[i]): width for i, width in (bits or {}).items()}
    if bits is not None and not bits:
        return copy
    placement = place(copy, rules, only=widths.keys(), **options)
    insert(copy, placement, ranges, widths, {id(nodes[i]): b for i, b in (biases or {}).items()})
    copy.tidy()
    return copy


def is_quantized(graph: Graph) -> bool:
    """True if some node of the graph quantises or dequantises."""
    return any(n.op in ("QuantizeLinear", "DequantizeLinear") for n in graph.walk())


def fragment(graph: Graph, inputs: Iterable[str], outputs: Iterable[str]) -> Graph:
    """The part of a graph between some tensors, as a graph of its own.

    Args:
        graph: the graph; it is not changed.
        inputs: names of the tensors that the part is fed.
        outputs: names of the tensors that it computes.
    """
    part = graph.copy()
    tensors = part.tensors()
    fed = []
    for name in inputs:
        old = tensors[name]
        if not any(old is t for t in part.inputs):
            new = gs.Variable(name, old.dtype, old.shape)
            redirect(old, new)
            old.name = part.fresh_name(f"{name}_cut")
            tensors[name] = new
        fed.append(tensors[name])
    part.outputs = [tensors[name] for name in outputs]
    part.tidy()
    read = {id(t) for n in part.nodes for t in n.inputs}
    part.inputs = [t for t in fed if id(t) in read]
    return part


# -- running the real kernels ------------------------------------------------------------------------------------------


def kernels(graph: Graph) -> Callable[[oracle.Feeds], oracle.Outputs]:
    """A function that runs a graph with the CPU provider's own kernels: all optimisations on, one thread.

    :func:`simulation` computes the same graph in floating point, each Q and DQ for itself; the two differ where an
    integer kernel saturates.

    Raises:
        InputError: the runtime does not take the graph.
        EnvironmentMissing: ONNX Runtime is not installed.
    """
    return _session(graph, fused=True)


def simulation(graph: Graph) -> Callable[[oracle.Feeds], oracle.Outputs]:
    """A function that computes a graph in floating point, each operator, Q, DQ and Cast for itself; one thread.

    Raises:
        InputError: the runtime does not take the graph.
        EnvironmentMissing: ONNX Runtime is not installed.
    """
    return _session(graph, fused=False)


def _session(graph: Graph, fused: bool) -> Callable[[oracle.Feeds], oracle.Outputs]:
    try:
        import onnxruntime as ort
    except ImportError:
        raise missing_extra("int8 kernels cannot be run", "onnxruntime", "cpu") from None
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            graph.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        raise InputError("ONNX Runtime does not take the graph", " ".join(str(error).split())[:300]) from None
    names = [t.name for t in graph.outputs]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def snr(reference: Iterable[oracle.Outputs], outputs: Iterable[oracle.Outputs]) -> float:
    """Signal-to-noise ratio over all samples in dB, of the worst output; ``inf`` where all are equal."""
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for one, other in zip(reference, outputs, strict=True):
        for name, value in one.items():
            if value.dtype.kind != "f":
                continue
            a, b = value.astype(np.float64), other[name].astype(np.float64)
            signal[name] = signal.get(name, 0.0) + float((a**2).sum())
            noise[name] = noise.get(name, 0.0) + float(((a - b) ** 2).sum())
    levels = [decibel(signal[n], noise[n]) for n in signal]
    return min(levels, default=np.inf)


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; ``inf`` without noise, ``-inf`` where either is not finite or the signal is 0."""
    if not np.isfinite(signal) or not np.isfinite(noise):
        return -np.inf
    if not noise:
        return np.inf
    return float(10 * np.log10(signal / noise)) if signal else -np.inf
