"""What the outputs lose when one group keeps only some of its units, told by running the graph.

A loss is the noise of the outputs over their signal. With ``merge``, the layers that read the group first make up for
what went: of a channel x_g that is cut they read its linear regression A x + b on those that stay,

    W' = W + W_g A,    b' = b + W_g b,    A = C_gk (C_kk + R)^-1,                                             (1)

C being the covariance of what the layer reads, and R a small share of its diagonal. That is the least-squares repair of
one layer alone, for any width from one pass over the data, since the inputs of that layer are the original's. Three
samples in four give C; the fourth judges, for the layers of few positions and many channels fit what they have seen.

Losses of several groups are taken to add up, as noises of small size do.

Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, for the reconstruction;
measuring each group alone at several widths and searching a table of the results is after Frantar and Alistarh, SPDY,
ICML 2022.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgecompile import qdq
from edgecompile.graph import Graph
from edgecompile.oracle import Feeds

from . import consumers
from .dependency import Group, Groups, Keep
from .rules import key
from .scores import Observed, Scores, observe

SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)  # of a group's units at which losses are measured
HELD_OUT = 4  # every so manieth sample judges
_HOPELESS = 0.5  # a loss from which narrower widths are not measured
_RIDGE = 1e-4  # R in (1), over the mean variance
_LEAST = 16  # samples that judge, however slow the graph is

Losses = Mapping[str, np.ndarray]
"""Group name -> what the outputs lose when so many units stay, float64 ``[units + 1]``, 0 for all of them."""


def of_importance(scores: Scores) -> Losses:
    """Losses where there is no data to run: -log of the share of the importance that stays."""
    result = {}
    for name, values in scores.items():
        left = np.cumsum([0.0, *np.sort(values)[::-1]]) / values.sum()
        result[name] = -np.log(np.clip(left, 1e-12, 1.0))
        result[name][-1] = 0.0
    return result


def measured(
    graph: Graph,
    found: Groups,
    scores: Scores,
    choices: Mapping[str, Sequence[int]],
    feeds: Sequence[Feeds],
    *,
    merge: bool,
    seconds: float = 120.0,
    progress: Callable[[str], object] = lambda text: None,
) -> Losses:
    """Losses on data, each group alone; widths between those measured are interpolated.

    Args:
        graph: the graph that was analysed.
        found, scores: its groups and their scores; the units of least score go.
        choices: widths that each group may have.
        feeds: data to run.
        merge: the readers of a group make up for what went, as the repair will have them do.
        seconds: of CPU that measuring may take, roughly; the samples that judge are as many as fit.
        progress: told what is being done.

    Raises:
        InputError: the graph does not run on the data.
    """
    judges = feeds[HELD_OUT - 1 :: HELD_OUT] or feeds
    seen = None
    if merge:
        fitted = [one for i, one in enumerate(feeds) if i % HELD_OUT != HELD_OUT - 1]
        seen = observe(graph, found, fitted)
    run = qdq.kernels(graph)
    start = time.thread_time()
    reference = [run(one) for one in judges[:_LEAST]]
    each = (time.thread_time() - start) / len(reference)
    fit = seconds / max(each * len(found.prunable) * len(SHARES), 1e-9)
    judges = judges[: max(_LEAST, int(fit))]
    reference += [run(one) for one in judges[len(reference) :]]
    result = {}
    for number, group in enumerate(found.prunable):
        progress(f"measuring losses, {number / len(found.prunable):.0%}")
        points, most = {group.units: 0.0}, 0.0
        for share in SHARES:
            width = min(choices[group.name], key=lambda n: abs(n - share * group.units))
            if width in points or most >= _HOPELESS:
                continue
            keep = {group.name: np.sort(np.argsort(-scores[group.name], kind="stable")[:width])}
            cut = graph.copy()
            found.cut(cut, keep)
            if seen is not None:
                merge_into(graph, cut, found, group, keep, seen)
            most = max(most, 10 ** (-qdq.snr(reference, map(qdq.kernels(cut), judges)) / 10))
            points[width] = most
        # Nothing is known of what is narrower still: that much more is lost, evenly.
        widths = np.array([0, *sorted(points)])
        values = np.array([most + 1.0, *(points[w] for w in sorted(points))])
        result[group.name] = np.interp(np.arange(group.units + 1), widths, values)
    return result


def merge_into(original: Graph, cut: Graph, found: Groups, group: Group, keep: Keep, seen: Observed) -> None:
    """Give the readers of a cut group the weights of (1), in place.

    Args:
        original: the graph before the cut; not changed.
        cut: the graph after it.
        found: the groups.
        group: the one of them that was cut.
        keep: what stays of it.
        seen: what its readers read in the original.
    """
    masks = found.kept(original, keep)
    nodes, made = {key(n): n for n in original.nodes}, {key(n): n for n in cut.nodes}
    for member, layer in seen.readers[group.name]:
        node, narrow = nodes[member.node], made[member.node]
        values, old = original.constant(node.inputs[1]), cut.constant(narrow.inputs[1])
        mean, covariance = seen.means[layer.source], seen.covariances[layer.source]
        assert values is not None and old is not None
        axis = consumers.channels(node) % len(node.outputs[0].shape or (0,))
        weight = consumers.matrix(node, values).reshape(-1, len(mean), layer.taps)
        rows = masks.get((member.node, "", axis))
        weight = weight if rows is None else weight[rows]
        gone = np.setdiff1d(np.arange(group.units), keep[group.name])
        cut_out = np.unique(member.positions[gone])
        stays = np.setdiff1d(np.arange(len(mean)), cut_out)
        inner = covariance[np.ix_(stays, stays)]
        inner = inner + max(_RIDGE * np.trace(inner) / len(inner), 1e-12) * np.eye(len(inner))
        regression = np.linalg.solve(inner, covariance[np.ix_(stays, cut_out)]).T
        added = np.einsum("ogt,gk->okt", weight[:, cut_out], regression, optimize=True)
        matrix = (weight[:, stays] + added).reshape(len(weight), -1)
        if matrix.size != old.size:
            continue  # another axis of the weight went with it
        narrow.inputs[1] = cut.new_constant(narrow.inputs[1].name, consumers.unmatrix(narrow, matrix, old))
        if node.op != "MatMul":
            constant = mean[cut_out] - regression @ mean[stays]
            consumers.add_bias(cut, narrow, np.einsum("ogt,g->o", weight[:, cut_out], constant))
