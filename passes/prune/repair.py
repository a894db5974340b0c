"""Repair without training: the layers that read what was cut make up for it.

In the order of the graph, so that each layer sees what those before it have become:

*Least squares.* A layer y = W x + b of the original reads x' in the cut graph, the channels that stay, computed by
layers that were themselves cut and repaired. Its new weights minimise, over the calibration data,

    sum |W' x' + b' - y|^2 + r sum_j d_j |W'_j - W0_j|^2,                                                      (1)

W0 being the weights as the cut left them and d_j the variance of column j: what went with the channels that are gone is
predicted from those that stayed. With H = sum x'x'^T and C = sum (y - W0 x') x'^T, bias included as a constant 1 that
is not damped, the solution is W' = W0 + C (H + R)^-1. Both sums are streamed, so memory does not grow with the data.
The error at W' is at most that at W0, since W0 attains the value of the error alone in (1). r is, of some values, that
which, solved for on three samples in four, leaves least error on the fourth. Where none leaves less than W0, the layer
counts as one that cannot be solved for.

*Residuals.* Where y is only read by an addition, it is the sum that is to be as it was: the layer also makes up for
what the other summand lost before it, once that is settled (:class:`Aim`).

*Bias.* A layer of another form (grouped, transposed), or one that saw too few rows to be solved for, keeps its weights;
its bias takes the difference of the means.

*BatchNormalization*, where one is still there, gets the statistics with which its result has the mean and variance
that it had: those of what it now reads, where the original's were those of what it read.

Layers that read all their channels are left alone: solving for them, too, follows the calibration data more closely and
other data less. What is repaired is kept if the outputs on the calibration data are closer to the original's for it.

Sources: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, sections 3.1 and 3.3, for
the reconstruction and that of residual branches; Nagel et al., "Data-Free Quantization", ICCV 2019, section 4.2, for
the correction of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import qdq, sensitivity
from edgecompile.graph import Graph
from edgecompile.oracle import Feeds

from . import consumers
from .dependency import Groups, Keep
from .rules import key

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # r in (1)
_HELD_OUT = 4  # every so manieth sample judges r
_PLACES = 64  # positions of one sample
_NORM = "BatchNormalization"
_ENOUGH = 2  # rows per column below which a layer is not solved for


@dataclass(frozen=True)
class Repaired:
    """What was done.

    Attributes:
        solved, shifted, norms: how many layers were solved for, got another bias, or other statistics.
        before, after: signal-to-noise ratio of the outputs in dB on the calibration data, without and with it.
        kept: whether the repair was kept.
    """

    solved: int
    shifted: int
    norms: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether it was kept: the outputs are closer to the original's."""
        return self.after > self.before


def repair(
    original: Graph,
    cut: Graph,
    found: Groups,
    keep: Keep,
    feeds: Sequence[Feeds],
    *,
    dampings: Sequence[float] = DAMPINGS,
    progress: Callable[[str], object] = lambda text: None,
) -> Repaired:
    """Repair a cut graph in place, or leave it as it is if that does not help.

    Args:
        original: the graph before the cut; not changed.
        cut: what :meth:`.Groups.cut` made of a copy of it.
        found: the groups.
        keep: what was cut.
        feeds: calibration data.
        dampings: values of r to choose from.
        progress: told what is being done.
    """
    reference = list(map(qdq.kernels(original), feeds))
    before = qdq.snr(reference, map(qdq.kernels(cut), feeds))
    masks = found.kept(original, keep)
    trial = cut.copy()
    readers = {m.node for name in keep for m in found[name].consumers}
    moved = _downstream(original, {node or tensor for tensor, node, _ in masks})
    work = [n for n in trial.nodes if n.op in _REPAIRED and key(n) in (moved if n.op == _NORM else readers)]
    counts = {"solved": 0, "shifted": 0, "norms": 0}
    for number, node in enumerate(work):
        progress(f"repairing layers, {number / len(work):.0%}")
        rank = len(node.outputs[0].shape or ())
        stays = masks.get((key(node), "", consumers.channels(node) % rank)) if rank else None
        aim = _aim(original, trial, node, {key(n) for n in work[number + 1 :]})
        if done := _REPAIRED[node.op](original, trial, node, aim, stays, feeds, dampings):
            counts[done] += 1
    after = qdq.snr(reference, map(qdq.kernels(trial), feeds))
    result = Repaired(**counts, before=before, after=after)
    if result.kept:
        cut.assign(trial)
    return result


def _downstream(graph: Graph, changed: set[str]) -> set[str]:
    """The nodes whose outputs a cut of some nodes' parameters may move, by name."""
    moved: set[int] = set()
    found = set()
    for node in graph.nodes:
        if key(node) in changed or any(id(t) in moved for t in node.inputs):
            found.add(key(node))
            moved.update(id(t) for t in node.outputs)
    return found


@dataclass(frozen=True)
class Aim:
    """What a layer's output, plus another tensor of the cut graph, is to be: a tensor of the original.

    Attributes:
        whole: the tensor of the original.
        beside: the other tensor, ``""`` for none.
    """

    whole: str
    beside: str = ""


def _aim(original: Graph, cut: Graph, node: gs.Node, pending: set[str]) -> Aim:
    """A layer that ends a residual branch makes up for what the stream lost before it, unless that is still to change.

    Args:
        original, cut: the graphs.
        node: the layer in the cut graph.
        pending: the layers that are repaired after it, by name.
    """
    output, sizes = node.outputs[0], original.tensors()
    users = [] if any(t is output for t in cut.outputs) else output.outputs
    others = [t for t in users[0].inputs if t is not output] if len(users) == 1 and users[0].op == "Add" else []
    if len(others) != 1 or not others[0].inputs or key(others[0].inputs[0]) in _downstream(cut, pending):
        return Aim(key(node))
    end, beside = key(users[0]), others[0].name
    shapes = [sizes[name].shape if name in sizes else None for name in (key(node), beside, end)]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes):
        return Aim(key(node))
    return Aim(end, beside)


def _places(count: int, number: int) -> np.ndarray:
    """Positions of the sample of some number, drawn anew for each."""
    if count <= _PLACES:
        return np.arange(count)
    return np.sort(np.random.default_rng(number).choice(count, _PLACES, replace=False))


def sums(
    original: Graph, cut: Graph, node: gs.Node, aim: Aim, stays: np.ndarray | None, feeds: Sequence[Feeds]
) -> tuple[np.ndarray, np.ndarray, int]:
    """H and C of (1) with the constant 1 last among the columns, and how many rows they are sums over.

    Returns:
        float64 ``[columns, columns]``, float64 ``[outputs, columns]``, rows.
    """
    weight = cut.constant(node.inputs[1])
    assert weight is not None
    matrix = consumers.matrix(node, weight)
    bias = _bias(cut, node)
    start = np.hstack([matrix, (np.zeros(len(matrix)) if bias is None else bias)[:, None]])
    gram, cross, rows = np.zeros((start.shape[1],) * 2), np.zeros_like(start), 0
    source = node.inputs[0].name
    now = sensitivity.activations(cut, [source, *filter(None, [aim.beside])], feeds)
    then = sensitivity.activations(original, [aim.whole], feeds)
    for number, (a, b) in enumerate(zip(now, then, strict=True)):
        y = consumers.outputs(node, b[aim.whole])
        chosen = _places(len(y), number)
        x = consumers.rows(node, a[source], chosen)
        x = np.hstack([x, np.ones((len(x), 1))])
        wanted = y[chosen].astype(np.float64)
        wanted = wanted if stays is None else wanted[:, stays]
        if aim.beside:
            wanted = wanted - consumers.outputs(node, a[aim.beside])[chosen]
        gram += x.T @ x
        cross += (wanted - x @ start.T).T @ x
        rows += len(x)
    return gram, cross, rows


def _solve(
    original: Graph,
    cut: Graph,
    node: gs.Node,
    aim: Aim,
    stays: np.ndarray | None,
    feeds: Sequence[Feeds],
    dampings: Sequence[float],
) -> str:
    layer = consumers.linear(cut, node)
    biased = node.op != "MatMul"
    if layer is None or (biased and len(node.inputs) > 2 and _bias(cut, node) is None):
        return _shift(original, cut, node, aim, stays, feeds, dampings) if biased else ""
    judged = feeds[_HELD_OUT - 1 :: _HELD_OUT]
    fitted = [one for i, one in enumerate(feeds) if i % _HELD_OUT != _HELD_OUT - 1]
    size = -1 if not biased else None
    folds = []
    for part in (fitted, judged) if judged else (fitted,):
        gram, cross, rows = sums(original, cut, node, aim, stays, part)
        folds.append((gram[:size, :size], cross[:, :size], rows))
    change = choose(folds, dampings, biased)
    if change is None:
        return _shift(original, cut, node, aim, stays, feeds, dampings) if biased else ""
    weight = cut.constant(node.inputs[1])
    assert weight is not None
    columns = weight.size // len(change)
    values = consumers.unmatrix(node, consumers.matrix(node, weight) + change[:, :columns], weight)
    node.inputs[1] = cut.new_constant(node.inputs[1].name, values)
    if biased:
        consumers.add_bias(cut, node, change[:, -1])
    return "solved"


def choose(
    folds: Sequence[tuple[np.ndarray, np.ndarray, int]], dampings: Sequence[float], biased: bool = True
) -> np.ndarray | None:
    """The change of the weights that solves (1) for the value of r that the last fold finds best.

    Args:
        folds: H, C and rows of the samples to solve for, and of those to judge by; the latter may be missing.
        dampings: values of r to choose from.
        biased: the last column is the constant 1.

    Returns:
        float64 ``[outputs, columns]``; None where no value leaves less error than no change, or the rows are too few.
    """
    gram, cross = sum(f[0] for f in folds), sum(f[1] for f in folds)
    assert isinstance(gram, np.ndarray) and isinstance(cross, np.ndarray)
    if sum(f[2] for f in folds) < _ENOUGH * len(gram):
        return None
    (first, toward, _), (judge, wanted, _) = folds[0], folds[-1]
    added = []
    for damping in dampings:
        change = step(first, toward, damping, biased)
        added.append(float(((change @ judge) * change).sum() - 2 * (change * wanted).sum()))
    return step(gram, cross, dampings[int(np.argmin(added))], biased) if min(added) < 0 else None


def step(gram: np.ndarray, cross: np.ndarray, damping: float, biased: bool = True) -> np.ndarray:
    """``C (H + R)^-1``: the change of the weights that solves (1).

    Args:
        gram, cross: H and C.
        damping: R over the variance of each column.
        biased: the last column is the constant 1, which is not damped; otherwise R is over the columns' squares.
    """
    ridge = np.diagonal(gram).copy()
    if biased:
        ridge -= gram[-1] ** 2 / gram[-1, -1]
    ridge = damping * np.maximum(ridge, 0.0) + 1e-9 * max(float(ridge.mean()), 1e-12)
    ridge[-1] *= not biased
    return np.linalg.solve(gram + np.diag(ridge), cross.T).T


def _bias(graph: Graph, node: gs.Node) -> np.ndarray | None:
    """The bias of a Conv or Gemm as float64 ``[outputs]``; None without one."""
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    values = graph.constant(node.inputs[2])
    weight = graph.constant(node.inputs[1])
    if values is None or weight is None:
        return None
    outputs = weight.shape[0] if node.op == "Conv" or node.attrs.get("transB", 0) else weight.shape[1]
    return np.broadcast_to(values.astype(np.float64).reshape(-1), (outputs,)) if values.ndim <= 1 else None


def _shift(
    original: Graph,
    cut: Graph,
    node: gs.Node,
    aim: Aim,
    stays: np.ndarray | None,
    feeds: Sequence[Feeds],
    dampings: Sequence[float],
) -> str:
    """Correct the bias of a layer by the difference of the means of its outputs."""
    if cut.constant(node.inputs[1]) is None:
        return ""
    if len(node.inputs) > 2 and node.inputs[2].name and cut.constant(node.inputs[2]) is None:
        return ""
    now, then = (_moments(g, aim.whole, consumers.channels(node), feeds)[0] for g in (cut, original))
    then = then if stays is None else then[stays]
    if then.shape != now.shape:
        return ""
    consumers.add_bias(cut, node, then - now)
    return "shifted"


def _moments(graph: Graph, name: str, axis: int, feeds: Sequence[Feeds]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a tensor along one axis over all samples, float64."""
    count, first, second = 0, np.zeros(()), np.zeros(())
    for one in sensitivity.activations(graph, [name], feeds):
        x = np.moveaxis(one[name], axis, -1).reshape(-1, one[name].shape[axis]).astype(np.float64)
        count, first, second = count + len(x), first + x.sum(0), second + (x * x).sum(0)
    mean = first / count
    return mean, np.maximum(second / count - mean**2, 0.0)


def _restate(
    original: Graph,
    cut: Graph,
    node: gs.Node,
    aim: Aim,
    stays: np.ndarray | None,
    feeds: Sequence[Feeds],
    dampings: Sequence[float],
) -> str:
    """Give a BatchNormalization the statistics with which its result has the mean and variance that it had."""
    values = [cut.constant(t) for t in node.inputs[3:5]]
    stored = next(([original.constant(t) for t in n.inputs[3:5]] for n in original.nodes if key(n) == key(node)), [])
    if any(v is None for v in (*values, *stored)):
        return ""
    mean, variance = (np.asarray(v, np.float64) for v in stored)
    was, spread = _moments(original, node.inputs[0].name, 1, feeds)
    if stays is not None:
        mean, variance, was, spread = (v[stays] for v in (mean, variance, was, spread))
    now, width = _moments(cut, node.inputs[0].name, 1, feeds)
    epsilon = node.attrs.get("epsilon", 1e-5)
    ratio = np.where((width > 0) & (spread > 0), width / np.where(spread > 0, spread, 1.0), 1.0)
    made = now - np.sqrt(ratio) * (was - mean), np.maximum(ratio * (variance + epsilon) - epsilon, 0.0)
    for slot, new, old in zip((3, 4), made, values, strict=True):
        assert old is not None
        node.inputs[slot] = cut.new_constant(node.inputs[slot].name, new.astype(old.dtype))
    return "norms"


_REPAIRED = {"Conv": _solve, "ConvTranspose": _shift, "Gemm": _solve, "MatMul": _solve, _NORM: _restate}
