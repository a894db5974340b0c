"""How much each unit of a group matters, by three measures; the least important go first.

Every score is an energy: it adds up over the members of a group, and over the units that go. Within a group the scores
have mean 1, so that what a group loses is a share of what it had. How much a share of one group matters against that of
another is asked of the outputs, where there is data to run (:mod:`.losses`).

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
from dataclasses import dataclass

import numpy as np

from edgecompile import sensitivity
from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph
from edgecompile.oracle import Feeds

from . import consumers
from .dependency import Group, Groups, Member
from .rules import key

SCORES = ("magnitude", "activation", "reconstruction", "taylor")
_PLACES = 256  # positions of one sample that a covariance is taken over
_RIDGE = 1e-3  # added to a covariance, over the mean of its diagonal
_PACK = 0.25  # units eliminated, over those left, at which their rows and columns are dropped

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
    seen = observe(graph, found, feeds)
    result = {}
    for group in found.prunable:
        total = np.zeros(group.units)
        for member, layer in seen.readers[group.name]:
            variance = np.diagonal(seen.covariances[layer.source])
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
    seen = observe(graph, found, feeds)
    result = {}
    for group in found.prunable:
        states: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for member, layer in seen.readers[group.name]:
            node = values.nodes[member.node]
            covariance = seen.covariances[layer.source]
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
    left, gone, scores, most = list(range(units)), [], np.zeros(units), 0.0
    while left:
        added = np.zeros(len(left))
        for inverse, gram, positions in states:
            for column in positions[left].T:
                added += np.maximum(gram[column, column], 0) / np.maximum(inverse[column, column], 1e-30)
        unit = left.pop(int(added.argmin()))
        gone.append(unit)
        most = max(most, float(added.min()))
        scores[unit] = most
        for inverse, gram, positions in states:
            for u in positions[unit]:
                row = inverse[u] / inverse[u, u]
                half = gram[:, u] - gram[u, u] / 2 * row
                gram -= np.stack([half, row], 1) @ np.stack([row, half])
                inverse -= np.outer(inverse[:, u], row)
        if len(gone) > _PACK * len(left):
            gone, states = [], [_packed(*state, gone) for state in states]
    return _normal(scores)


def _packed(
    inverse: np.ndarray, gram: np.ndarray, positions: np.ndarray, gone: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A state of the elimination without the rows and columns of units that are gone."""
    stays = np.ones(len(gram), bool)
    stays[positions[gone]] = False
    return inverse[np.ix_(stays, stays)], gram[np.ix_(stays, stays)], np.cumsum(stays)[positions] - 1


@dataclass(frozen=True)
class Observed:
    """What the plain layers that read groups read, on data.

    Attributes:
        readers: by group, its members that are columns of such layers.
        means: by tensor that a layer reads, float64 ``[channels]``.
        covariances: the same, float64 ``[channels, channels]``.
    """

    readers: Mapping[str, Sequence[tuple[Member, consumers.Linear]]]
    means: Mapping[str, np.ndarray]
    covariances: Mapping[str, np.ndarray]


def observe(graph: Graph, found: Groups, feeds: Iterable[Feeds]) -> Observed:
    """Mean and covariance of what plain layers read, over some positions of each sample.

    Args:
        graph: the graph that was analysed.
        found: its groups.
        feeds: data to run.

    Raises:
        InputError: the graph does not run on the data.
    """
    nodes = {key(n): n for n in graph.nodes}
    readers: dict[str, list[tuple[Member, consumers.Linear]]] = {}
    for group in found.prunable:
        layers = ((m, consumers.linear(graph, nodes[m.node])) for m in group.consumers)
        readers[group.name] = [(m, layer) for m, layer in layers if layer is not None and layer.slot == m.input]
    axes = {x.source: 1 if nodes[m.node].op == "Conv" else -1 for one in readers.values() for m, x in one}
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
    spread = {n: second / count - np.outer(means[n], means[n]) for n, (count, _, second) in sums.items()}
    return Observed(readers, means, spread)


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
