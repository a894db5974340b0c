"""PAGCP: how far each group can be cut, told by the user's own losses, one group after the other.

With L groups, a first rate r and a total T, the threshold of the i-th group is r l^i, with l from

    prod_{i < L} (1 + r l^i) = T,                                                                             (1)

so that losses that grow at each step by as much as it allows end at T times the original's. Groups come in the order of
the operations saved by cutting 30 % of each: the largest first if l <= 1, when thresholds shrink, else last. Each
is cut by rising ratios until a task's loss exceeds its base by more than the threshold; the ratio before that stays in
the running model, and each base becomes the largest loss so far. In the end the groups are ranked by loss increase per
operation saved, and the best share of them is cut in the *original* graph by the ratios found; the others stay
whole.

A unit's importance is the sum over the weights that make it of the mean of its absolute values, which treats filters
coupled by residuals together.

Source: Ye et al., "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs" (PAGCP), IEEE TPAMI
2023, section 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.stats import node_macs

from .dependency import Group, Groups, Keep
from .rules import key

RATIOS = tuple(np.linspace(0.05, 0.95, 19).tolist())
PROBE = 0.3  # the ratio at which groups are ordered

Losses = Mapping[str, float]
"""Task -> its loss, above 0, lower is better."""


@dataclass(frozen=True)
class Step:
    """What the walk found for one group.

    Attributes:
        group: its name.
        threshold: relative increase of the loss that was allowed.
        ratio: share of the units that may go, 0 if none may.
        increase: relative increase of the worst task at that ratio.
        saved: multiply-accumulates that it saves in the running model.
        chosen: whether the group is among the best and is cut.
    """

    group: str
    threshold: float
    ratio: float
    increase: float
    saved: int
    chosen: bool


@dataclass(frozen=True)
class Result:
    """What to keep, and why.

    Attributes:
        keep: group name -> units that stay, for the groups that are cut.
        steps: in the order of the walk.
        factor: l of equation (1).
        unvisited: groups that time did not suffice for; they stay whole.
    """

    keep: dict[str, np.ndarray]
    steps: tuple[Step, ...]
    factor: float
    unvisited: tuple[str, ...]


def search(
    graph: Graph,
    found: Groups,
    evaluate: Callable[[Graph], Losses],
    *,
    rate: float = 0.06,
    total: float = 6.0,
    best: float = 0.8,
    seconds: float = math.inf,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Choose what to cut by the losses it costs.

    Args:
        graph: the graph that was analysed; it is not changed.
        found: its groups.
        evaluate: the losses of a graph, by task; it is called once for the original and once per ratio tried.
        rate: r of equation (1), the relative increase allowed to the first group.
        total: T of equation (1).
        best: share of the groups that is cut in the end.
        seconds: no evaluation starts later than this; groups not reached stay whole.
        progress: called before each evaluation with the groups done, their number, and what is tried.

    Raises:
        InputError: an option is out of range, equation (1) has no solution, or a loss is not a positive number.
    """
    if not (rate > 0 and 0 < best <= 1):
        raise InputError("rate must be above 0, best above 0 and at most 1", f"they are {rate} and {best}")
    end = time.monotonic() + seconds
    pending = found.prunable
    l_factor = factor(len(pending), rate, total)
    whole = _macs(graph)
    gain = {g.name: whole - _macs(_cut(graph, found, {g.name: _kept(graph, found, g, {}, PROBE)})) for g in pending}
    order = sorted(pending, key=lambda g: gain[g.name], reverse=l_factor <= 1)
    base = _losses(evaluate(graph), ())
    tasks = tuple(base)
    running: dict[str, np.ndarray] = {}
    steps: list[Step] = []
    threshold, before = rate, whole
    for number, group in enumerate(order):
        if time.monotonic() > end:
            break
        ratio, increase, units, losses = 0.0, 0.0, None, base
        tried = group.units
        for candidate in RATIOS:
            kept = _kept(graph, found, group, running, candidate)
            if len(kept) == tried:
                if units is not None:
                    ratio = candidate
                continue
            if time.monotonic() > end:
                break
            tried = len(kept)
            if progress is not None:
                progress(number, len(order), f"{group.name}: {tried} of {group.units}")
            try:
                cut = _cut(graph, found, {**running, group.name: kept})
            except InputError:  # nothing would be left of an axis
                break
            now = _losses(evaluate(cut), tasks)
            worst = max(now[t] / base[t] for t in tasks) - 1
            if worst > threshold:
                break
            ratio, increase, units, losses = candidate, worst, kept, now
        saved = 0
        if units is not None:
            running[group.name] = units
            after = _macs(_cut(graph, found, running))
            saved, before = before - after, after
        steps.append(Step(group.name, threshold, ratio, increase, saved, False))
        threshold *= l_factor
        base = {t: max(base[t], losses[t]) for t in tasks}
    useful = sorted((s for s in steps if s.saved > 0), key=lambda s: s.increase / s.saved)
    chosen = {s.group for s in useful[: max(1, int(best * len(steps)))]}
    keep = {s.group: _kept(graph, found, found[s.group], {}, s.ratio) for s in steps if s.group in chosen}
    made = tuple(Step(s.group, s.threshold, s.ratio, s.increase, s.saved, s.group in chosen) for s in steps)
    return Result(keep, made, l_factor, tuple(g.name for g in order[len(steps) :]))


def factor(count: int, rate: float, total: float) -> float:
    """The l > 0 of equation (1) for ``count`` groups; 1 where it does not matter.

    Raises:
        InputError: there is none: one group alone already exceeds the total, or no growth reaches it.
    """
    if count < 2:
        return 1.0
    target = math.log(total) if total > 0 else -math.inf
    if target <= math.log1p(rate):
        raise InputError(
            f"a loss cannot grow by a factor of {total} in all and by {rate} for the first group",
            "the first group alone would exceed it",
            "raise total, or lower rate",
        )
    from scipy.optimize import brentq

    def excess(log_factor: float) -> float:
        steps = math.log(rate) + np.arange(count) * log_factor
        return float(np.logaddexp(0.0, steps).sum()) - target

    low, high = -1.0, 1.0
    while excess(low) > 0:
        low *= 2
    while excess(high) < 0:
        high *= 2
    return math.exp(float(brentq(excess, low, high, xtol=1e-13)))  # type: ignore[arg-type]


def _losses(given: Losses, tasks: tuple[str, ...]) -> dict[str, float]:
    losses = {str(t): float(v) for t, v in given.items()}
    if not losses or (tasks and set(losses) != set(tasks)):
        raise InputError(f"evaluate() gave the losses {sorted(losses)}", f"it gave {sorted(tasks)} for the original")
    for task, value in losses.items():
        if math.isnan(value) or value <= 0 or (not tasks and math.isinf(value)):
            raise InputError(
                f"evaluate() gave the loss {task!r} as {value}", "an increase is relative to a loss above 0"
            )
    return losses


def _cut(graph: Graph, found: Groups, keep: Keep) -> Graph:
    made = graph.copy()
    found.cut(made, keep)
    return made


def _macs(graph: Graph) -> int:
    return sum(n or 0 for n in node_macs(graph))


def _kept(graph: Graph, found: Groups, group: Group, running: Keep, ratio: float) -> np.ndarray:
    """The units that stay at a ratio, judged by the weights that are left in the running model."""
    gone = math.floor(ratio * group.units + 1e-9)
    score = _importance(graph, found, group, running)
    return np.sort(np.argsort(-score, kind="stable")[: max(1, group.units - gone)])


def _importance(graph: Graph, found: Groups, group: Group, running: Keep) -> np.ndarray:
    left = found.kept(graph, running)
    nodes = {key(n): n for n in graph.nodes}
    total = np.zeros(group.units)
    for member in group.producers or group.members:
        values = graph.constant(nodes[member.node].inputs[member.input])
        assert values is not None
        values = np.abs(values.astype(np.float64))
        for axis in range(values.ndim):
            mask = left.get((member.tensor, member.node, axis))
            if mask is not None and axis != member.axis:
                values = np.compress(mask, values, axis=axis)
        profile = np.moveaxis(values, member.axis, 0).reshape(values.shape[member.axis], -1).mean(axis=1)
        total += profile[member.positions].mean(axis=1)
    return total
