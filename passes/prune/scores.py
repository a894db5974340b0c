"""How much each unit of a group matters, by three measures; the least important go first.

Every score is an energy: it adds up over the members of a group, and over the units that go. Within a group the scores
have mean 1, so that what a group loses is a share of what it had. How much a share of one group matters against that of
another is asked of the outputs, where there is data to run (:func:`weights`).

*magnitude*: the squared norm of the weights of a unit in every layer that makes or reads it, each over the layer's
mean: the group norm of DepGraph (Fang et al., CVPR 2023, section 3.3) with the normalisation that makes layers of
different scale count alike. No data.

*activation*: the energy that a unit adds to the layers that read it, variance of its values times squared norm of
their weights, on calibration data. What is constant counts nothing, since a bias makes up for it. (Luo et al., ThiNet,
ICCV 2017, judge by the next layer's output, too.)

*reconstruction*: the error that remains in the layers that read a unit when those that are left make up for it by least
squares, over the variance of their outputs. Units are eliminated one after the other, each time that which adds least:
with the inverse M of the covariance of what a layer reads, removing u adds |w_u|^2 / M_uu and moves other weights by
-w_u M_u / M_uu (Hassibi and Stork, Optimal Brain Surgeon, NIPS 1992; for structures Kurtic et al., ZipLM, NeurIPS
2023). It is the score that fits the repair. A kernel's positions are taken to have the covariance of their channel.

*taylor*: the change of the outputs, to first order in the weights that read the unit, y(w - w_u) - y(w) = -J w_u, of
mean square E[(r^T J w_u)^2] for random signs r of unit variance, each of which takes one backward pass. The gradient of
the output's own error is no use: it vanishes at the original, and this is its second-order term (Gauss-Newton). With
Molchanov et al. (CVPR 2019) the sum over the weights of a unit is taken before the square.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from edgecompile import qdq, sensitivity
from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph
from edgecompile.oracle import Feeds

from . import consumers
from .dependency import Group, Groups, Member
from .rules import key

SCORES = ("magnitude", "activation", "reconstruction", "taylor")
_PLACES = 256  # positions of one sample that a covariance is taken over
_RIDGE = 1e-3  # added to a covariance, over the mean of its diagonal

Scores = Mapping[str, np.ndarray]
"""Group name -> importance of its units, float64 ``[units]``, mean 1."""


def magnitude(graph: Graph, found: Groups, order: int = 2) -> Scores:
    """Group norm of the weights.

    Args:
        graph: the graph that was analysed.
        found: its groups.
        order: 2 for sums of squares, 1 for sums of absolute values.
    """
    values = _Weights(graph)
    return {group.name: _magnitude(values, group, order) for group in found.prunable}


def _magnitude(values: _Weights, group: Group, order: int = 2) -> np.ndarray:
    total = np.zeros(group.units)
    for member in _distinct(m for m in group.members if m.role in ("in", "out")):
        energy = np.abs(values(member)) ** order
        total += _normal(_per_unit(member, _profile(energy, member.axis)))
    return _normal(total)


def activation(graph: Graph, found: Groups, feeds: Iterable[Feeds]) -> Scores:
    """Energy that each unit adds to the layers that read it; a group that no plain layer reads is scored by magnitude.

    Args:
        graph: the graph that was analysed.
        found: its groups.
        feeds: calibration data; read once.

    Raises:
        InputError: the graph does not run on the data.
    """
    values = _Weights(graph)
    readers, covariances = _observed(graph, found, feeds, values)
    result = {}
    for group in found.prunable:
        total = np.zeros(group.units)
        for member, layer in readers[group.name]:
            variance = np.diagonal(covariances[layer.source])
            energy = _profile(values(member) ** 2, member.axis) * variance
            total += _normal(_per_unit(member, energy))
        result[group.name] = _normal(total) if total.any() else _magnitude(values, group)
    return result


def reconstruction(graph: Graph, found: Groups, feeds: Iterable[Feeds]) -> Scores:
    """Error that is left when other units make up for one; a group that no plain layer reads is scored by magnitude.

    Args:
        graph: the graph that was analysed.
        found: its groups.
        feeds: calibration data; read once.

    Raises:
        InputError: the graph does not run on the data.
    """
    values = _Weights(graph)
    readers, covariances = _observed(graph, found, feeds, values)
    result = {}
    for group in found.prunable:
        states: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for member, layer in readers[group.name]:
            node = values.nodes[member.node]
            covariance = covariances[layer.source]
            matrix = consumers.matrix(node, values(member)).reshape(-1, len(covariance), layer.taps)
            matrix = matrix.transpose(0, 2, 1).reshape(-1, len(covariance))
            energy = float(np.einsum("oi,ij,oj->", matrix, covariance, matrix, optimize=True))
            if energy > 0:
                ridge = _RIDGE * np.trace(covariance) / len(covariance)
                inverse = np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
                # Only W^T W matters of the weights, whose rows may be many.
                states.append((inverse, matrix.T @ matrix / energy, member.positions))
        result[group.name] = _eliminated(states, group.units) if states else _magnitude(values, group)
    return result


def _eliminated(states: list[tuple[np.ndarray, np.ndarray, np.ndarray]], units: int) -> np.ndarray:
    """What each unit adds to the error when it is eliminated, never less than those before it; mean 1.

    Args:
        states: per layer M, the weights' W^T W, and the positions of the units; all are changed.
        units: how many there are.
    """
    left, scores, most = list(range(units)), np.zeros(units), 0.0
    while left:
        added = np.zeros(len(left))
        for inverse, gram, positions in states:
            for column in positions[left].T:
                added += np.maximum(gram[column, column], 0) / np.maximum(inverse[column, column], 1e-30)
        unit = left.pop(int(added.argmin()))
        most = max(most, float(added.min()))
        scores[unit] = most
        for inverse, gram, positions in states:
            for u in positions[unit]:
                row = inverse[u] / inverse[u, u]
                outer = np.outer(gram[:, u], row)
                gram -= outer + outer.T - gram[u, u] * np.outer(row, row)
                inverse -= np.outer(inverse[:, u], row)
    return _normal(scores)


_Readers = dict[str, list[tuple[Member, consumers.Linear]]]


def _observed(
    graph: Graph, found: Groups, feeds: Iterable[Feeds], values: _Weights
) -> tuple[_Readers, dict[str, np.ndarray]]:
    """By group the plain layers that read it, and the covariance of what they read by tensor, over some positions."""
    readers: _Readers = {}
    for group in found.prunable:
        layers = ((m, consumers.linear(graph, values.nodes[m.node])) for m in group.consumers)
        readers[group.name] = [(m, layer) for m, layer in layers if layer is not None and layer.slot == m.input]
    pairs = [pair for one in readers.values() for pair in one]
    axes = {layer.source: 1 if values.nodes[m.node].op == "Conv" else -1 for m, layer in pairs}
    sums: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
    rng = np.random.default_rng(0)
    for seen in sensitivity.activations(graph, list(axes), list(feeds)) if axes else ():
        for name, axis in axes.items():
            x = np.moveaxis(seen[name], axis, -1).reshape(-1, seen[name].shape[axis])
            x = x[rng.choice(len(x), _PLACES, replace=False)] if len(x) > _PLACES else x
            x = x.astype(np.float64)
            count, first, second = sums.get(name, (0, np.zeros(1), np.zeros(1)))
            sums[name] = count + len(x), first + x.sum(0), second + x.T @ x
    means = {name: first / count for name, (count, first, _) in sums.items()}
    return readers, {
        name: second / count - np.outer(means[name], means[name]) for name, (count, _, second) in sums.items()
    }


def taylor(graph: Graph, found: Groups, feeds: Iterable[Feeds], seed: int = 0) -> Scores:
    """Change of the outputs to first order when a unit's readers lose it; without readers, its makers.

    Args:
        graph: the graph that was analysed; torch must be able to compute its operators.
        found: its groups.
        feeds: calibration data; each of them takes one backward pass.
        seed: of the random signs.

    Raises:
        EnvironmentMissing: torch is not installed.
        InputError: torch does not compute an operator of the graph here.
    """
    try:
        import torch

        from edgecompile.torch_graph import TorchGraph
    except ImportError:
        raise missing_extra("score=taylor cannot take gradients", "torch", "torch") from None
    values, module = _Weights(graph), TorchGraph(graph)
    parameters = dict(module.named_parameters())
    total = {group.name: np.zeros(group.units) for group in found.prunable}
    generator = torch.Generator().manual_seed(seed)
    for one in feeds:
        given = [torch.from_numpy(np.ascontiguousarray(one[t.name])) for t in graph.inputs]
        made = module(*given)
        made = [y for y in (made if isinstance(made, tuple) else (made,)) if y.is_floating_point() and y.requires_grad]
        if not made:
            raise InputError("score=taylor finds no output that depends on the weights")
        signs = [torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1.0 for y in made]
        loss = sum((y * r).sum() / y.detach().norm().clamp_min(1e-12) for y, r in zip(made, signs, strict=True))
        module.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        for group in found.prunable:
            change = np.zeros(group.units)
            for member in _distinct(group.consumers or group.producers):
                parameter = parameters.get(member.tensor.replace(".", "_") or "_")
                if parameter is not None and parameter.grad is not None:
                    product = (parameter.grad * parameter.detach()).numpy().astype(np.float64)
                    change += _per_unit(member, _profile(product, member.axis))
            total[group.name] += change**2
    return {
        group.name: _normal(total[group.name]) if total[group.name].any() else _magnitude(values, group)
        for group in found.prunable
    }


def compute(kind: str, graph: Graph, found: Groups, feeds: Sequence[Feeds]) -> Scores:
    """The scores of a kind of :data:`SCORES`.

    Raises:
        InputError: it needs calibration data and there is none, or as the function of that kind.
        EnvironmentMissing: as :func:`taylor`.
    """
    if kind == "magnitude":
        return magnitude(graph, found)
    if not feeds:
        raise InputError(
            f"score={kind} needs calibration data", "it runs the model on it",
            "give images or arrays with --calib, or choose score=magnitude",
        )  # fmt: skip
    kinds = {"activation": activation, "reconstruction": reconstruction, "taylor": taylor}
    return kinds[kind](graph, found, feeds)


def weights(graph: Graph, found: Groups, scores: Scores, feeds: Sequence[Feeds]) -> dict[str, float]:
    """How much a share of a group's importance matters to the outputs, by group; mean 1.

    Each group alone loses the least important quarter of its units; the weight is the noise of the outputs over their
    signal, at most 1, over the share of the importance that went.

    Args:
        graph: the graph that was analysed.
        found, scores: its groups and their scores.
        feeds: data to run.

    Raises:
        InputError: the graph does not run on the data.
    """
    reference = list(map(qdq.kernels(graph), feeds))
    result = {}
    for group in found.prunable:
        gone = max(1, group.units // 4)
        keep = np.sort(np.argsort(scores[group.name], kind="stable")[gone:])
        cut = graph.copy()
        found.cut(cut, {group.name: keep})
        noise = 10 ** (-qdq.snr(reference, map(qdq.kernels(cut), feeds)) / 10)
        share = 1 - scores[group.name][keep].sum() / scores[group.name].sum()
        result[group.name] = min(noise, 1.0) / max(share, 1e-6)
    mean = np.mean(list(result.values()))
    return {name: max(value / mean, 1e-3) if mean > 0 else 1.0 for name, value in result.items()}


def share_kept(scores: Scores, keep: Mapping[str, Sequence[int] | np.ndarray]) -> float:
    """Product over the groups of the share of their importance that stays: 1 for the original."""
    shares = (scores[name][np.asarray(units, np.int64)].sum() / scores[name].sum() for name, units in keep.items())
    return math.prod(map(float, shares))


class _Weights:
    """The parameters of a graph by member, in float64."""

    def __init__(self, graph: Graph):
        self._graph, self.nodes = graph, {key(n): n for n in graph.nodes}

    def __call__(self, member: Member) -> np.ndarray:
        values = self._graph.constant(self.nodes[member.node].inputs[member.input])
        assert values is not None
        return values.astype(np.float64)


def _distinct(members: Iterable[Member]) -> list[Member]:
    """Members without those that say the same of a weight that several nodes share."""
    return list({(m.tensor, m.axis, m.positions.tobytes()): m for m in members}.values())


def _profile(values: np.ndarray, axis: int) -> np.ndarray:
    """Sums over all axes but one."""
    return values.sum(axis=tuple(i for i in range(values.ndim) if i != axis))


def _per_unit(member: Member, profile: np.ndarray) -> np.ndarray:
    return profile[member.positions].sum(axis=1)


def _normal(values: np.ndarray) -> np.ndarray:
    """Values over their mean; ones where all are zero."""
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)
