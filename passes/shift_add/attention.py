"""Attention found in a graph, and its binary forms.

``Y = softmax(s Q K^T + B) V`` is found from its Softmax: back through factors that are one number and added biases to
the product of queries and keys, forward to the product with the values. Both orders are read, ``P V`` of tokens
``[..., N, d]`` and ``V P^T`` of ``[..., d, N]``; so are masks of windows, which are added while the scores of one
image's windows have an axis of their own. Attention in one operator is unfolded first
(:mod:`~edgecompile.passes.shift_add.fused`).

Two forms replace it. With ``b(x)`` in {0, 1}, 1 where ``x / |x|`` exceeds a threshold:

- *angular*: ``R = V / 2 + b(Q) (b(K)^T V) / pi``, ``Y = c R / |R|``: linear in the tokens, and additions only. A factor
  c for each head, the root mean square length of what the softmax gave on calibration data, keeps the scale. There is
  no place for a bias or mask of pairs of tokens. With a window, a convolution of V along the tokens, one kernel for
  each head, is added as in the authors' block; c and the kernels are those that leave the least squared error.
- *hamming*: ``Y = softmax(s' b(Q) b(K)^T + B) V``, where s' gives the scores the spread they had.

*Thresholds.* The authors compare with the mean of the normalised tensor over the whole batch, so that an image's result
depends on its companions. Here it is ``fixed`` (the mean over calibration data, a constant) or ``image`` (the mean over
the image at hand); both leave a batch independent. ``batch`` is the authors'.

Neither form computes what the softmax computed. They are for networks trained with them, or fine-tuned afterwards.

Sources: You et al., ShiftAddViT, NeurIPS 2023, section 4.1; You et al., Castling-ViT, CVPR 2023, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import sensitivity
from edgecompile.graph import Graph, Tensor
from edgecompile.oracle import Feeds
from edgecompile.passes.shift_add import ops

FORMS = ("angular", "hamming")
THRESHOLDS = ("fixed", "image", "batch")


@dataclass(frozen=True, eq=False)
class Bias:
    """What is added to the scores.

    Attributes:
        tensor: it broadcasts against the scores, or against ``windows``.
        windows: the scores as ``[images, windows, heads, N, N]``, if it is added to them in that shape.
    """

    tensor: Tensor
    windows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """One softmax attention.

    Attributes:
        nodes: the nodes that compute it, the first being the product of queries and keys.
        q, k, v: ``[..., N, d]``, or with the last two axes exchanged where ``turned`` says so.
        turned: for q, k and v, whether the last two axes are exchanged.
        scale: factor of the scores.
        biases: what is added to the scores.
        scores: the scores, ``[..., N, N]``, as the Softmax reads them.
        result: what it computes.
        result_turned: whether that is ``[..., d, N]``.
    """

    nodes: tuple[gs.Node, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    turned: tuple[bool, bool, bool]
    scale: float
    biases: tuple[Bias, ...]
    scores: Tensor
    result: Tensor
    result_turned: bool


@dataclass(frozen=True)
class Skipped:
    """An attention that is left alone."""

    node: gs.Node
    why: str


def find(graph: Graph) -> Iterator[Attention | Skipped]:
    """The attentions of a graph with inferred shapes."""
    for node in graph.nodes:
        if node.op == "Softmax" and not node.domain:
            found = _from_softmax(graph, node)
            if found is not None:
                yield found


def _from_softmax(graph: Graph, softmax: gs.Node) -> Attention | Skipped | None:
    """The attention around a Softmax; None if it normalises something else than products of two activations."""
    scores, nodes = softmax.inputs[0], [softmax]
    rank = len(scores.shape or ())
    biases, scale, tensor = [], 1.0, scores
    while (before := graph.producer(tensor)) is not None and before.op in ("Add", "Mul", "Div", "Reshape"):
        if before.op == "Reshape":
            windows = _windowed(graph, before)
            if windows is None:
                break
            if scale != 1.0:
                return Skipped(softmax, "its biases are scaled after they are added")
            add, inner = windows
            mask = add.inputs[1] if add.inputs[0] is inner.outputs[0] else add.inputs[0]
            biases.append(Bias(mask, inner.outputs[0]))
            nodes += [before, add, inner]
            tensor = inner.inputs[0]
            continue
        # Of two operands, the scores are those that lead to a product.
        a, b = before.inputs
        if before.op == "Add":
            inner, other = (a, b) if _leads_to_product(graph, a) else (b, a)
            if not _leads_to_product(graph, inner):
                return None
            if scale != 1.0:
                return Skipped(softmax, "its biases are scaled after they are added")
            biases.append(Bias(other))
        else:
            inner, other = (a, b) if graph.constant(b) is not None else (b, a)
            factor = graph.constant(other)
            if factor is None or factor.size != 1 or (before.op == "Div" and other is a):
                return None
            scale *= float(factor) if before.op == "Mul" else 1 / float(factor)
        nodes.append(before)
        tensor = inner
    product = graph.producer(tensor)
    if product is not None and product.op == "Reshape" and _leads_to_product(graph, product.inputs[0]):
        return Skipped(softmax, "its mask is added in another shape than that of the scores")
    if product is None or not _is_product(graph, product):
        return None
    nodes.append(product)
    if rank not in (3, 4):
        return Skipped(softmax, f"its scores have {rank} axes")
    if softmax.attrs.get("axis", -1) not in (-1, rank - 1):
        return Skipped(softmax, "it normalises over the queries")
    q, q_turned = _unturned(graph, product.inputs[0], False)
    k, k_turned = _unturned(graph, product.inputs[1], True)
    end = graph.sole_consumer(softmax.outputs[0])
    exchanged = False
    if end is not None and end.op == "Transpose" and _exchanges(end):
        nodes.append(end)
        exchanged, end = True, graph.sole_consumer(end.outputs[0])
    if end is None or end.op != "MatMul":
        return Skipped(softmax, "its result is not multiplied by values alone")
    nodes.append(end)
    place = 0 if any(t is end.inputs[0] for n in nodes[:-1] for t in n.outputs) else 1
    if (place == 0) == exchanged:
        return Skipped(softmax, "the values are multiplied along the queries")
    for inner in nodes[1:]:
        if inner is not end and (graph.is_output(inner.outputs[0]) or len(inner.outputs[0].outputs) != 1):
            return Skipped(softmax, "its scores are used elsewhere too")
    turned = (q_turned, k_turned, exchanged)
    v = end.inputs[1 - place]
    shapes = [_tokens_first(t, flag) for t, flag in zip((q, k, v), turned, strict=True)]
    if not _fit(shapes):
        return Skipped(softmax, "queries, keys and values differ in their batch or heads")
    return Attention(
        tuple(reversed(nodes)), q, k, v, turned, scale, tuple(biases), scores, end.outputs[0], exchanged
    )  # fmt: skip


def _windowed(graph: Graph, last: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """The Add and the first Reshape of ``[B W, h, N, N] -> [B, W, h, N, N] -> Add -> [B W, h, N, N]``."""
    add = graph.producer(last.inputs[0])
    if add is None or add.op != "Add":
        return None
    after = list(last.outputs[0].shape or ())
    for side, other in _both_orders(add):
        first = graph.producer(side)
        if first is None or first.op != "Reshape":
            continue
        whole, before = list(side.shape or ()), list(first.inputs[0].shape or ())
        ranks = (len(whole), len(before), len(after), len(add.outputs[0].shape or ()))
        if ranks != (5, 4, 4, 5) or not isinstance(whole[1], int) or len(other.shape or ()) > 5:
            continue
        if whole[2:] == before[1:] == after[1:] and all(isinstance(n, int) for n in whole[2:]):
            return add, first
    return None


def _fit(shapes: Sequence[list | None]) -> bool:
    """Whether queries, keys and values agree in all but their last two axes, as far as the lengths are known."""
    outer = [s[:-2] for s in shapes if s is not None]
    if len(outer) != 3 or len({len(s) for s in outer}) != 1:
        return False
    # Two names of lengths may mean the same; a number and a name may not.
    return all(len(set(axis)) == 1 or not any(isinstance(n, int) for n in axis) for axis in zip(*outer, strict=True))


def _leads_to_product(graph: Graph, tensor: Tensor) -> bool:
    node = graph.producer(tensor)
    while node is not None and node.op in ("Add", "Mul", "Div"):
        inner = next((t for t in node.inputs if graph.constant(t) is None), None)
        node = None if inner is None else graph.producer(inner)
    return _is_product(graph, node) or (node is not None and node.op == "Reshape")


def _is_product(graph: Graph, node: gs.Node | None) -> bool:
    """True for a product of two activations."""
    return node is not None and node.op == "MatMul" and all(graph.constant(t) is None for t in node.inputs)


def _exchanges(node: gs.Node) -> bool:
    perm = node.attrs.get("perm")
    return perm is not None and list(perm) == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]


def _unturned(graph: Graph, tensor: Tensor, wanted: bool) -> tuple[Tensor, bool]:
    """What a product reads, before a Transpose of its last two axes, and whether its axes are exchanged there."""
    node = graph.producer(tensor)
    if node is not None and node.op == "Transpose" and _exchanges(node):
        return node.inputs[0], not wanted
    return tensor, wanted


def _tokens_first(tensor: Tensor, turned: bool) -> list | None:
    shape = list(tensor.shape or ())
    if len(shape) not in (3, 4):
        return None
    return [*shape[:-2], shape[-1], shape[-2]] if turned else shape


@dataclass(frozen=True)
class Statistics:
    """What calibration data says of an attention.

    Attributes:
        thresholds: mean of the normalised queries and keys.
        length: factor of the angular form, float32 ``[heads, 1, 1]`` or ``[1, 1, 1]``.
        taps: kernels of the convolution of the values, float32 ``[heads, window]``.
        spread: standard deviation of the scores over the keys.
        binary_spread: the same of the counts ``b(Q) b(K)^T``.
    """

    thresholds: tuple[float, float]
    length: np.ndarray
    taps: np.ndarray
    spread: float
    binary_spread: float


def statistics(graph: Graph, found: Sequence[Attention], feeds: Sequence[Feeds], window: int = 0) -> list[Statistics]:
    """Statistics of each attention over all feeds; ``window`` is the odd number of tokens of the convolution, or 0."""
    totals: list[dict[str, list]] = [{"q": [], "k": [], "length": [], "spread": [], "binary": []} for _ in found]
    names = [t.name for one in found for t in (one.q, one.k, one.v, one.result, one.scores)]
    fits: list[list[np.ndarray]] = [[] for _ in found]
    for seen in sensitivity.activations(graph, names, feeds):
        for one, total, fit in zip(found, totals, fits, strict=True):
            q, k = (_unit(seen[t.name], flag) for t, flag in zip((one.q, one.k), one.turned, strict=False))
            y = seen[one.result.name]
            y = y.swapaxes(-1, -2) if one.result_turned else y
            squares = np.square(y).sum(-1, keepdims=True).mean(-2, keepdims=True)
            total["length"].append(squares.mean(0, keepdims=y.ndim == 3))
            total["q"].append(float(q.mean()))
            total["k"].append(float(k.mean()))
            total["spread"].append(float(seen[one.scores.name].var(-1).mean()))
            q, k = (q > q.mean()).astype(np.float32), (k > k.mean()).astype(np.float32)
            total["binary"].append(float((q @ k.swapaxes(-1, -2)).var(-1).mean()))
            if window:
                v = seen[one.v.name]
                v = v.swapaxes(-1, -2) if one.turned[2] else v
                angular = _unit(v / 2 + q @ (k.swapaxes(-1, -2) @ v) / np.pi, False)
                fit.append(_products(np.stack([angular, *_windows(v, window)], -1), y))
    known = []
    for t, fit in zip(totals, fits, strict=True):
        length, taps = np.sqrt(np.mean(t["length"], 0)), np.zeros((len(t["length"][0]), 0))
        if window:
            both = np.sum(fit, 0)
            # Least squares by the pseudo-inverse: values of equal tokens leave it without a single solution.
            best = np.stack([np.linalg.pinv(one[:-1, :-1], rcond=1e-8) @ one[:-1, -1] for one in both])
            length, taps = best[:, :1, None], best[:, 1:]
        thresholds = float(np.mean(t["q"])), float(np.mean(t["k"]))
        spreads = math.sqrt(np.mean(t["spread"])), math.sqrt(np.mean(t["binary"]))
        known.append(Statistics(thresholds, length.astype(np.float32), taps.astype(np.float32), *spreads))
    return known


def _windows(v: np.ndarray, window: int) -> Iterator[np.ndarray]:
    """``v[..., i + t, :]`` for each place t of a window about token i, with zeros beyond the ends."""
    half = window // 2
    padded = np.pad(v, [(0, 0)] * (v.ndim - 2) + [(half, half), (0, 0)])
    for t in range(window):
        yield padded[..., t : t + v.shape[-2], :]


def _products(features: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Products of features ``[batch, (heads,) N, e, n]`` and y with each other, summed: ``[heads, n + 1, n + 1]``."""
    whole = np.concatenate([features, y[..., None]], -1)
    whole = whole if whole.ndim == 5 else whole[:, None]
    flat = np.moveaxis(whole, 1, 0).reshape(whole.shape[1], -1, whole.shape[-1]).astype(np.float64)
    return flat.swapaxes(1, 2) @ flat


def _unit(x: np.ndarray, turned: bool) -> np.ndarray:
    x = x.swapaxes(-1, -2) if turned else x
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def write(graph: Graph, one: Attention, form: str, threshold: str, known: Statistics) -> None:
    """Replace an attention by a binary form. The caller tidies the graph.

    Args:
        graph: of the attention.
        one: the attention; without biases for the form ``angular``.
        form: one of ``FORMS``.
        threshold: one of ``THRESHOLDS``.
        known: its statistics.
    """
    rank, hint = len(one.q.shape), one.result.name

    def added(op: str, inputs: list[Tensor], domain: str | None = None, **attrs: object) -> Tensor:
        return graph.insert(op, inputs, None, attrs, replaces=one.nodes, domain=domain).outputs[0]

    turn = [*range(rank - 2), rank - 1, rank - 2]
    operands = [
        added("Transpose", [t], perm=turn) if flag else t
        for t, flag in zip((one.q, one.k, one.v), one.turned, strict=True)
    ]
    thresholds = [
        graph.new_constant(f"{hint}_threshold", np.asarray(value, np.float32)) if threshold == "fixed"
        else _mean(graph, added, x, rank, threshold) for x, value in zip(operands, known.thresholds, strict=False)
    ]  # fmt: skip
    if form == "angular":
        name, extra = "BinaryAngularAttention", []
    else:
        name = "BinarySoftmaxAttention"
        scale = known.spread / known.binary_spread if known.binary_spread else 0.0
        bias: Tensor = graph.new_constant(f"{hint}_bias", np.zeros(1, np.float32))
        for other in one.biases:
            bias = added("Add", [bias, _unwindowed(graph, added, other, operands[0])])
        extra = [graph.new_constant(f"{hint}_scale", np.asarray([scale], np.float32)), bias]
    result = added(name, [*operands, *thresholds, *extra], ops.DOMAIN, turn=turn)
    if form == "angular":
        result = added("Mul", [result, graph.new_constant(f"{hint}_length", known.length)])
        if known.taps.size:
            result = added("Add", [result, _convolved(graph, added, operands[2], rank, known.taps, hint)])
    if one.result_turned:
        result = added("Transpose", [result], perm=turn)
    ops.declare(graph, name)
    graph.rewire(one.result, result)


def _unwindowed(graph: Graph, added, bias: Bias, q: Tensor) -> Tensor:
    """A bias as it broadcasts against scores ``[images windows, heads, N, N]``."""
    if bias.windows is None:
        return bias.tensor
    images, windows, _, *pair = bias.windows.shape
    heads = bias.tensor.shape[-3] if len(bias.tensor.shape) > 2 else 1
    known = graph.constant(bias.tensor)
    if known is not None and isinstance(images, int):
        whole = np.broadcast_to(known, (images, windows, heads, *pair)).reshape(-1, heads, *pair)
        return graph.new_constant("mask", np.ascontiguousarray(whole))

    def ints(*values: int) -> Tensor:
        return graph.new_constant("sizes", np.asarray(values, np.int64))

    first = added("Slice", [added("Shape", [q]), ints(0), ints(1)])
    count = added("Div", [first, ints(windows)])
    whole = added("Expand", [bias.tensor, added("Concat", [count, ints(windows, heads, *pair)], axis=0)])
    return added("Reshape", [whole, ints(-1, heads, *pair)])


def _convolved(graph: Graph, added, v: Tensor, rank: int, taps: np.ndarray, hint: str) -> Tensor:
    """Values convolved along the tokens, one kernel for each head; without heads, all of them are one."""
    heads, window = taps.shape
    kernel = graph.new_constant(f"{hint}_taps", taps.reshape(heads, 1, window, 1))
    place = {"group": heads, "kernel_shape": [window, 1], "pads": [window // 2, 0, window // 2, 0]}
    if rank == 4:
        return added("Conv", [v, kernel], **place)
    axis = graph.new_constant("axis", np.asarray([1], np.int64))
    return added("Squeeze", [added("Conv", [added("Unsqueeze", [v, axis]), kernel], **place), axis])


def _mean(graph: Graph, added, x: Tensor, rank: int, threshold: str) -> Tensor:
    """Mean of the normalised tensor: over everything, or over all axes but the first."""

    def reduced(op: str, tensor: Tensor, axes: list[int]) -> Tensor:
        if graph.opsets[""] < 18:
            return added(op, [tensor], axes=axes)
        return added(op, [tensor, graph.new_constant("axes", np.asarray(axes, np.int64))])

    unit = added("Div", [x, reduced("ReduceL2", x, [-1])])
    return reduced("ReduceMean", unit, list(range(0 if threshold == "batch" else 1, rank)))


# -- networks that were trained so -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """Angular attention as a network computes it that was trained with it; attributes as the operator's inputs.

    Attributes:
        nodes: those that the operator stands for.
        inputs: q, k, v and the thresholds of q and k.
        result: what it computes.
    """

    nodes: tuple[gs.Node, ...]
    inputs: tuple[Tensor, ...]
    result: Tensor


def find_trained(graph: Graph) -> Iterator[Trained]:
    """Each ``R / |R|`` with ``R = V / 2 + b(Q) (b(K)^T V) / pi`` of a graph, however the sums are ordered."""
    for node in graph.nodes:
        nodes: list[gs.Node] = []
        if (raw := _normalised(graph, node, nodes)) is None:
            continue
        total = _made_by(graph, raw, "Add", nodes)
        for own, near in _both_orders(total):
            value = _scaled(graph, own, 0.5, nodes)
            product = _made_by(graph, _scaled(graph, near, 1 / math.pi, nodes), "MatMul", nodes)
            if value is None or product is None:
                continue
            gathered = _made_by(graph, product.inputs[1], "MatMul", nodes)
            turned = None if gathered is None else _made_by(graph, gathered.inputs[0], "Transpose", nodes)
            if gathered is None or turned is None or not _exchanges(turned) or gathered.inputs[1] is not value:
                continue
            q, k = _binary(graph, product.inputs[0], nodes), _binary(graph, turned.inputs[0], nodes)
            if q and k:
                yield Trained(tuple(nodes), (q[0], k[0], value, q[1], k[1]), node.outputs[0])


def write_trained(graph: Graph, one: Trained) -> None:
    """Replace it by the operator: the same function. The caller tidies the graph."""
    name, rank = "BinaryAngularAttention", len(one.inputs[0].shape)
    turn = [*range(rank - 2), rank - 1, rank - 2]
    made = graph.insert(name, one.inputs, None, {"turn": turn}, replaces=one.nodes, domain=ops.DOMAIN)
    ops.declare(graph, name)
    graph.rewire(one.result, made.outputs[0])


def _made_by(graph: Graph, tensor: Tensor | None, op: str, nodes: list[gs.Node]) -> gs.Node | None:
    """The node of this operator that writes a tensor; it joins ``nodes``."""
    node = None if tensor is None else graph.producer(tensor)
    if node is None or node.op != op or node.domain:
        return None
    nodes.append(node)
    return node


def _both_orders(node: gs.Node | None) -> list[tuple[Tensor, Tensor]]:
    return [] if node is None else [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]


def _is(graph: Graph, tensor: Tensor, value: float) -> bool:
    found = graph.constant(tensor)
    return found is not None and found.size == 1 and math.isclose(float(found.reshape(-1)[0]), value, rel_tol=1e-6)


def _scaled(graph: Graph, tensor: Tensor, factor: float, nodes: list[gs.Node]) -> Tensor | None:
    node = _made_by(graph, tensor, "Mul", nodes)
    return next((x for x, other in _both_orders(node) if _is(graph, other, factor)), None)


def _normalised(graph: Graph, node: gs.Node | None, nodes: list[gs.Node]) -> Tensor | None:
    """x, if a node computes ``x / |x|`` along the last axis."""
    if node is None or node.op != "Div":
        return None
    length = _made_by(graph, node.inputs[1], "ReduceL2", nodes)
    if length is None or length.inputs[0] is not node.inputs[0] or not length.attrs.get("keepdims", 1):
        return None
    axes = graph.constant(length.inputs[1]) if len(length.inputs) > 1 else length.attrs.get("axes")
    rank = len(node.inputs[0].shape or ())
    if axes is None or [int(a) % rank for a in np.asarray(axes).reshape(-1)] != [rank - 1]:
        return None
    nodes.append(node)
    return node.inputs[0]


def _binary(graph: Graph, tensor: Tensor, nodes: list[gs.Node]) -> tuple[Tensor, Tensor] | None:
    """x and the threshold of ``b(x)``, through the residue that carries its gradient in training, if it is there."""
    for difference, clipped in _both_orders(_made_by(graph, tensor, "Add", nodes)):
        # b - c + c is b, c being the same number.
        minus = _made_by(graph, difference, "Sub", nodes)
        if minus is not None and minus.inputs[1] is clipped and _made_by(graph, clipped, "Clip", nodes):
            tensor = minus.inputs[0]
    cast = _made_by(graph, tensor, "Cast", nodes)
    above = None if cast is None else _made_by(graph, cast.inputs[0], "Greater", nodes)
    if above is None:
        return None
    unit, least = above.inputs
    if _is(graph, least, 0.0):
        minus = _made_by(graph, unit, "Sub", nodes)
        if minus is None:
            return None
        unit, least = minus.inputs
    x = _normalised(graph, graph.producer(unit), nodes)
    return None if x is None else (x, least)
