"""How wide each group becomes: the most importance at a latency or a number of parameters.

**Table.** The time of each layer is measured on the target at hand, alone, at its full width and with one of the groups
that it reads or makes cut to some widths; widths between are interpolated. The arms of a layer are timed interleaved,
and kept by content: equal layers are measured once, ever. A layer of several groups is taken as

    time(w1, w2, ..) = time(full) * share(w1) * share(w2) * ..,

which is exact for the multiply-accumulates of a dense layer.

**Widths.** A target runs multiples of some number of channels well (vectors, blocked layouts, tensor cores). With
``align=0`` the table says which: of 8, 16 and 32 the finest whose odd multiples cost, per channel, at most 5 % more
than the best.

**Choice.** What a width costs is what the outputs lose by it (:mod:`.losses`), or, without data, -log s where the share
s of a group's importance stays. Among the narrower widths of all groups the one that saves most per cost is taken,
again and again: the greedy solution of the knapsack, and its path is the Pareto front that the report shows. What saves
no time by the table is not taken.

**Correction.** The table knows single layers; a runtime fuses them, and moves data between. So the cut graph is
measured against the original, interleaved, and the goal by the table is moved (regula falsi) until the measured ratio
is the one asked for.

Sources: NetAdapt (Yang et al., ECCV 2018) for tables of measured latency; HALP (Shen et al., NeurIPS 2022) for
importance per latency as a knapsack. The multiplicative form and the correction are our own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import measure
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.pipeline import Measure
from edgecompile.sensitivity import Memo

from .dependency import Group, Groups
from .losses import Losses, of_importance
from .rules import key
from .scores import Scores

ALIGNMENTS = (8, 16, 32)
TOLERANCE = 0.05  # of the latency promised
_MEASURED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SHARES = (0.875, 0.75, 0.5, 0.25)  # of a group's units at which layers are timed
_CLOSE = 0.025  # how far below the target a ratio is near enough
_LAYER_SECONDS = 0.05  # per arm
_WASTE = 1.05  # how much more per channel a finer width may cost
_NEAR = (0.8, 0.4)  # shares of the best step's saving per loss that a smaller step must have; the latter
_STEP = 0.05  # where a step saves more than this share of the whole
_ROUNDS = 8  # of corrections
_PAYS = 0.99  # share of a time above which nothing is saved that a measurement could tell

Widths = dict[str, int]
"""Group name -> units that stay."""


# -- widths to choose from ---------------------------------------------------------------------------------------------


def candidates(found: Groups, graph: Graph, align: int) -> dict[str, list[int]]:
    """For each group the numbers of units that may stay, widest first, the full one included.

    On the weight that makes a group's channels, a multiple of ``align`` channels stays in all, or, where the axis
    belongs to several groups, a multiple of it goes. Where an axis is narrow, half of ``align`` serves, down to 1.
    """
    sizes = _axes(found, graph)
    makers: dict[tuple[str, int, int], int] = {}
    for group in found.prunable:
        for m in group.producers or group.members[:1]:
            makers[m.node, m.input, m.axis] = makers.get((m.node, m.input, m.axis), 0) + 1
    result: dict[str, list[int]] = {}
    for group in found.prunable:
        first = (group.producers or group.members)[0]
        place = first.node, first.input, first.axis
        total, each = sizes[place], first.positions.shape[1]
        step = align
        while step > 1 and group.units * each < 2 * step:
            step //= 2
        offset = total if makers[place] == 1 and group.units * each == total else group.units * each
        gone = [n for n in range(group.units) if n == 0 or (offset - n * each) % step == 0]
        result[group.name] = [group.units - n for n in gone]
    return result


def _axes(found: Groups, graph: Graph) -> dict[tuple[str, int, int], int]:
    nodes = {key(n): n for n in graph.nodes}
    sizes = {}
    for group in found.prunable:
        for m in group.members:
            values = graph.constant(nodes[m.node].inputs[m.input])
            assert values is not None
            sizes[m.node, m.input, m.axis] = values.shape[m.axis]
    return sizes


def keep(scores: Scores, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The most important units of each group, in their order, for groups that lose some."""
    chosen = {name: np.sort(np.argsort(-scores[name], kind="stable")[:width]) for name, width in widths.items()}
    return {name: units for name, units in chosen.items() if len(units) < len(scores[name])}


# -- latency -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Time of the layers, as measured one by one.

    Attributes:
        seconds: by layer, at full width.
        shares: layer -> group -> pairs (units that stay, time over that at full width), fewest first.
        estimated: layers whose time was not measured but taken from their multiply-accumulates.
    """

    seconds: Mapping[str, float]
    shares: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    estimated: frozenset[str] = frozenset()
    _of: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for layer, groups in self.shares.items():
            for name in groups:
                self._of.setdefault(name, []).append(layer)

    def share(self, layer: str, group: str, units: int) -> float:
        """Time of a layer when a group keeps some units, over its full time."""
        points = self.shares[layer][group]
        return float(np.interp(units, [w for w, _ in points], [s for _, s in points]))

    def layer(self, layer: str, widths: Mapping[str, int]) -> float:
        """Seconds of a layer at some widths."""
        factors = (self.share(layer, g, widths[g]) for g in self.shares.get(layer, {}) if g in widths)
        return self.seconds[layer] * math.prod(factors)

    def total(self, widths: Mapping[str, int]) -> float:
        """Seconds of all layers."""
        return sum(self.layer(name, widths) for name in self.seconds)

    def beside(self, group: str) -> set[str]:
        """The groups of the layers of one group, itself included."""
        return {group, *itertools.chain.from_iterable(self.shares[layer] for layer in self._of.get(group, ()))}

    def around(self, group: str, widths: Mapping[str, int]) -> float:
        """Seconds of the layers of one group."""
        return sum(self.layer(name, widths) for name in self._of.get(group, ()))


def table(
    graph: Graph,
    found: Groups,
    timer: Measure,
    memo: Memo,
    *,
    choices: Mapping[str, Sequence[int]],
    seconds: float = math.inf,
    progress: Callable[[str], object] = lambda text: None,
) -> Table:
    """Measure every layer at full width and at some widths of its groups.

    Args:
        graph: the graph that was analysed, with static shapes.
        found: its groups.
        timer: times graphs on the target.
        memo: keeps what was measured.
        choices: widths that each group may have.
        seconds: time to spend; layers of most multiply-accumulates come first, what is left is estimated from them.
        progress: told what is being done.

    Raises:
        InputError: a shape is not known.
    """
    deadline = time.monotonic() + seconds
    layers = {key(n): n for n in graph.nodes if n.op in _MEASURED and _shaped(n)}
    arms: dict[str, dict[tuple[str, int], tuple[str, Graph]]] = {name: {} for name in layers}
    full = {name: _alone(graph, node) for name, node in layers.items()}
    for group in found.prunable:
        for width in dict.fromkeys(_nearest(choices[group.name], s * group.units) for s in _SHARES):
            if width == group.units:
                continue
            cut = graph.copy()
            found.cut(cut, {group.name: range(width)})
            for node in cut.nodes:
                name = key(node)
                if name in layers and _shaped(node):
                    alone = _alone(cut, node)
                    if alone[0] != full[name][0]:
                        arms[name][group.name, width] = alone
    work = {name: _work(node) for name, node in layers.items()}
    times: dict[str, float] = {}
    shares: dict[str, dict[str, list[tuple[int, float]]]] = {}
    estimated = set()
    for number, name in enumerate(sorted(layers, key=lambda n: -work[n])):
        family = {full[name][0]: full[name][1], **dict(arms[name].values())}
        progress(f"timing layers, {number / len(layers):.0%}")
        known = _timed(family, timer, memo) if time.monotonic() < deadline or not times else None
        if known is None:
            estimated.add(name)
            continue
        times[name] = known[full[name][0]]
        for (group, width), (content, _) in arms[name].items():
            share = known[content] / times[name]
            shares.setdefault(name, {}).setdefault(group, []).append((width, share if share < _PAYS else 1.0))
    rate = sum(times.values()) / max(1, sum(work[n] for n in times))
    for name in estimated:
        times[name] = rate * work[name]
        for group, width in arms[name]:
            shares.setdefault(name, {}).setdefault(group, []).append((width, width / found[group].units))
    for groups in shares.values():
        for group, points in groups.items():
            points.append((found[group].units, 1.0))
            points.sort()
    return Table(times, shares, frozenset(estimated))


def _nearest(choices: Sequence[int], wanted: float) -> int:
    return min(choices, key=lambda n: abs(n - wanted))


def _shaped(node: gs.Node) -> bool:
    tensors = [t for t in node.inputs if t.name and isinstance(t, gs.Variable) and not _constant(t)]
    return bool(tensors) and all(t.shape is not None and all(isinstance(d, int) for d in t.shape) for t in tensors)


def _constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or (
        len(tensor.inputs) == 1 and tensor.inputs[0].op in ("Constant", "Identity") and not tensor.inputs[0].domain
    )


def _alone(graph: Graph, node: gs.Node) -> tuple[str, Graph]:
    """One layer as a graph of its own, and what tells it from layers that take another time."""
    inputs: list[gs.Tensor] = []
    facts: list[object] = [node.op, sorted((k, repr(v)) for k, v in node.attrs.items())]
    for number, tensor in enumerate(node.inputs):
        values = graph.constant(tensor) if tensor.name else None
        if values is not None:
            inputs.append(gs.Constant(f"w{number}", values))
            facts.append(("w", values.dtype.str, values.shape))
        elif tensor.name:
            inputs.append(gs.Variable(f"x{number}", tensor.dtype, list(tensor.shape or ())))
            facts.append(("x", str(np.dtype(tensor.dtype)), tuple(tensor.shape or ())))
        else:
            inputs.append(gs.Variable.empty())
    output = gs.Variable("y", node.outputs[0].dtype)
    copy = gs.Node(node.op, "layer", dict(node.attrs), inputs, [output], domain=node.domain)
    made = Graph._adopt(
        gs.Graph([copy], [t for t in inputs if isinstance(t, gs.Variable) and t.name], [output], opset=graph.opset,
                 import_domains=graph.import_domains, ir_version=graph.ir_version)
    )  # fmt: skip
    made.infer_shapes(outputs=True)
    return hashlib.sha256(repr(facts).encode()).hexdigest(), made


def _work(node: gs.Node) -> int:
    """Multiply-accumulates, up to a factor that layers share."""
    weight = next((t for t in node.inputs[1:2] if t.shape), None)
    output = node.outputs[0]
    if weight is None or output.shape is None or not all(isinstance(d, int) for d in (*weight.shape, *output.shape)):
        return 1
    per = math.prod(weight.shape[1:]) if node.op == "Conv" else weight.shape[0]
    return math.prod(output.shape) * per


def _timed(family: Mapping[str, Graph], timer: Measure, memo: Memo) -> dict[str, float]:
    """Seconds of the arms of one layer, by content: the median of the blocks' lower quartiles."""
    names = list(family)

    def measured() -> list[float]:
        samples = timer([family[n] for n in names], _LAYER_SECONDS, 1)
        return [float(np.percentile(s.seconds, 25)) for s in samples]

    return dict(zip(names, memo(hashlib.sha256("".join(names).encode()).hexdigest(), measured), strict=True))


def alignment(graph: Graph, found: Groups, timer: Measure, memo: Memo, layers: int = 3) -> int:
    """What widths the target runs well: of :data:`ALIGNMENTS` the finest that wastes nothing.

    The layers of most work are timed at widths of the channels they make, in steps of 8 between half and all.
    """
    nodes = {key(n): n for n in graph.nodes if n.op in _MEASURED and _shaped(n)}
    made = [
        (_work(nodes[m.node]), m, g)
        for g in found.prunable for m in g.producers
        if m.node in nodes and nodes[m.node].attrs.get("group", 1) == 1 and m.positions.shape[1] == 1 and g.units >= 64
    ]  # fmt: skip
    costs: dict[int, list[float]] = {a: [] for a in ALIGNMENTS}
    for _, member, group in sorted(made, key=lambda one: -one[0])[:layers]:
        top = group.units - group.units % 32
        widths = list(range(max(32, top - 64), top + 1, 8))
        family: dict[str, Graph] = {}
        content: dict[int, str] = {}
        for width in widths:
            cut = graph.copy()
            found.cut(cut, {group.name: range(width)})
            one = _alone(cut, next(n for n in cut.nodes if key(n) == member.node))
            content[width], family[one[0]] = one[0], one[1]
        known = _timed(family, timer, memo)
        per = {w: known[content[w]] / w for w in widths}
        for a in ALIGNMENTS:
            own = [p for w, p in per.items() if w % a == 0 and (w % (2 * a) or a == ALIGNMENTS[-1])]
            costs[a].append(float(np.mean(own)) / min(per.values()))
    if not made:
        return ALIGNMENTS[0]
    mean = {a: float(np.mean(c)) for a, c in costs.items()}
    return next(a for a in ALIGNMENTS if mean[a] <= _WASTE * min(mean.values()))


# -- choice ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """Widths from the original to the narrowest, each one step from the one before.

    Attributes:
        steps: group and units that stay, in the order in which they are cut.
        costs: what is left of the cost measure (seconds or parameters) after each step, as a share.
        full: units of each group.
    """

    steps: tuple[tuple[str, int], ...]
    costs: tuple[float, ...]
    full: Mapping[str, int]

    def states(self) -> list[Widths]:
        """The widths of all groups before the first step and after each."""
        found = [dict(self.full)]
        for name, width in self.steps:
            found.append({**found[-1], name: width})
        return found

    def at(self, share: float) -> Widths:
        """The widths at the first point of the path that costs no more than a share; the last if none does."""
        states = self.states()
        return next((w for w, cost in zip(states, (1.0, *self.costs), strict=True) if cost <= share), states[-1])


def path(
    found: Groups,
    scores: Scores,
    choices: Mapping[str, Sequence[int]],
    costs: Table,
    rest: float = 0.0,
    losses: Losses | None = None,
) -> Path:
    """The greedy path: at each step the cut that saves most per importance lost.

    Args:
        found: the groups.
        scores: importance of their units.
        choices: widths that each group may have, widest first.
        costs: of the layers: seconds, or another measure in the same form.
        rest: cost of what no cut changes.
        losses: what the outputs lose by each width; by default what the importance says.
    """
    full = {g.name: g.units for g in found.prunable}
    losses = of_importance(scores) if losses is None else losses
    widths, whole = dict(full), costs.total(full) + rest
    cost, steps, shares = whole, [], []
    best: dict[str, tuple[float, int]] = {}
    stale = set(full)
    while True:
        for name in stale:
            best.pop(name, None)
            now, lost = costs.around(name, widths), losses[name]
            saved = {w: now - costs.around(name, {**widths, name: w}) for w in choices[name] if w < widths[name]}
            rates: dict[int, float] = {}
            for width in saved:
                if saved[width] > 1e-9 * whole:
                    rates[width] = saved[width] / max(float(lost[width] - lost[widths[name]]), 1e-9)
                if width <= widths[name] // 2:
                    break
            if rates:
                # Of steps about as good as the best the smallest, so that the path has no gaps; the rest follows.
                most = max(rates.values())
                near = (next(w for w, r in rates.items() if r >= share * most) for share in _NEAR)
                best[name] = most, min(near, key=lambda w: saved[w] > _STEP * whole)
        if not best:
            return Path(tuple(steps), tuple(shares), full)
        name = max(best, key=lambda n: best[n][0])
        width = best[name][1]
        cost -= costs.around(name, widths) - costs.around(name, {**widths, name: width})
        widths[name] = width
        steps.append((name, width))
        shares.append(cost / whole)
        stale = costs.beside(name)


@dataclass(frozen=True)
class Chosen:
    """Widths that were measured.

    Attributes:
        widths: of all groups.
        predicted: share of the latency by the table.
        ratio: as measured against the original, interleaved.
    """

    widths: Widths
    predicted: float
    ratio: measure.Ratio


def fit(
    graph: Graph,
    found: Groups,
    scores: Scores,
    way: Path,
    target: float,
    timer: Measure,
    *,
    seconds: float = 3.0,
    progress: Callable[[str], object] = lambda text: None,
) -> Chosen:
    """The widths on a path at which the graph takes a share of its time, by measuring it.

    Args:
        graph: the original; it is not changed.
        found, scores, way: its groups, their scores, and the path to choose from.
        target: share of the latency.
        timer: times graphs on the target.
        seconds: of measuring per arm and attempt.
        progress: told what is being done.

    Raises:
        InputError: the whole path is slower than the target, or there is none.
    """
    states, shares = way.states(), [1.0, *way.costs]
    slow, fast = (0, 1.0), (len(states), None)  # position on the path and measured share: too slow, and fast enough
    goal = target
    best: Chosen | None = None
    for attempt in range(_ROUNDS):
        place = next((i for i, share in enumerate(shares) if share <= goal), len(states) - 1)
        place = min(max(place, slow[0] + 1), fast[0] - 1)
        if place <= slow[0]:
            break
        progress(f"measuring the cut graph, attempt {attempt + 1}")
        ratio = against(graph, found, keep(scores, states[place]), timer, seconds)
        if best is None or _miss(ratio.value, target) < _miss(best.ratio.value, target):
            best = Chosen(states[place], shares[place], ratio)
        if target * (1 - _CLOSE) <= ratio.value <= target * 1.01:
            break
        if ratio.value > target:
            slow = place, ratio.value
        else:
            fast = place, ratio.value
        if fast[1] is None:
            goal = shares[place] * min(target / ratio.value, 0.95)
        else:
            part = (slow[1] - target * 0.985) / (slow[1] - fast[1]) if slow[1] > fast[1] else 0.5
            goal = shares[slow[0]] + min(max(part, 0.1), 0.9) * (shares[fast[0]] - shares[slow[0]])
    if best is None:
        raise InputError("no cut saves time", "by the times of the single layers", "ask for fewer parameters instead")
    if best.ratio.value > target * (1 + TOLERANCE):
        raise InputError(
            f"the latency cannot be cut to {target:g} of itself", f"the narrowest widths take {best.ratio.value:.2f}",
            "ask for less, or let more layers be cut (skip, align)",
        )  # fmt: skip
    return best


def against(
    graph: Graph, found: Groups, chosen: Mapping[str, np.ndarray], timer: Measure, seconds: float
) -> measure.Ratio:
    """Latency of a cut graph over that of the original, interleaved, from six pairs of sessions."""
    cut = graph.copy()
    found.cut(cut, chosen)
    samples = timer([graph, cut], seconds, 6)
    return measure.ratio(samples[1], samples[0])


def _miss(value: float, target: float) -> float:
    """How far a ratio is from the target; above counts double."""
    return (value / target - 1) * 2 if value > target else 1 - value / target


def unpaid(
    graph: Graph, found: Groups, scores: Scores, widths: Mapping[str, int], timer: Measure, memo: Memo
) -> list[str]:
    """Groups whose layers are no faster for their cut, among the cuts of all others.

    Args:
        graph: the original.
        found, scores: its groups and their scores.
        widths: of all groups.
        timer, memo: as for :func:`table`.
    """
    lost: list[str] = []
    chosen = keep(scores, widths)
    cut = graph.copy()
    found.cut(cut, chosen)
    narrow = {key(n): _alone(cut, n) for n in cut.nodes if n.op in _MEASURED and _shaped(n)}
    for name in chosen:
        restored = graph.copy()
        found.cut(restored, {n: units for n, units in chosen.items() if n != name})
        wide = {key(n): _alone(restored, n) for n in restored.nodes if n.op in _MEASURED and _shaped(n)}
        pairs = [(one, wide[n]) for n, one in narrow.items() if n in wide and wide[n][0] != one[0]]
        times = [_timed({a[0]: a[1], b[0]: b[1]}, timer, memo) for a, b in pairs]
        now = sum(t[a[0]] for t, (a, _) in zip(times, pairs, strict=True))
        before = sum(t[b[0]] for t, (_, b) in zip(times, pairs, strict=True))
        if pairs and now > _PAYS * before:
            lost.append(name)
    return lost


# -- parameters --------------------------------------------------------------------------------------------------------


def by_parameters(
    graph: Graph,
    found: Groups,
    scores: Scores,
    choices: Mapping[str, Sequence[int]],
    losses: Losses | None = None,
) -> Path:
    """The greedy path where the cost is the number of parameters, by layers as :class:`Table` counts time."""
    nodes = {key(n): n for n in graph.nodes}
    sizes: dict[str, float] = {}
    shares: dict[str, dict[str, list[tuple[int, float]]]] = {}
    seen: set[tuple[str, int, str]] = set()
    for group in found.prunable:
        for m in group.members:
            values = graph.constant(nodes[m.node].inputs[m.input])
            if values is None or values.dtype.kind not in "fV":
                continue
            sizes[m.tensor] = float(values.size)
            if (m.tensor, m.axis, group.name) in seen:
                continue
            seen.add((m.tensor, m.axis, group.name))
            gone = m.positions.size / values.shape[m.axis]
            old = shares.setdefault(m.tensor, {}).get(group.name, [(0, 1.0), (group.units, 1.0)])
            shares[m.tensor][group.name] = [(0, old[0][1] * (1 - gone)), (group.units, 1.0)]
    rest = sum(v.size for v in graph.constants().values() if v.dtype.kind in "fV") - sum(sizes.values())
    return path(found, scores, choices, Table(sizes, shares), rest, losses)


def fit_parameters(graph: Graph, found: Groups, scores: Scores, way: Path, target: float) -> Widths:
    """The widths on a path at which a share of the parameters is left, or a little less.

    Raises:
        InputError: the whole path leaves more.
    """
    whole = sum(v.size for v in graph.constants().values() if v.dtype.kind in "fV")

    def left(widths: Widths) -> float:
        return 1 - found.parameters_removed(graph, keep(scores, widths)) / whole

    states = way.states()
    low, high = 0, len(states) - 1
    if left(states[high]) > target:
        raise InputError(
            f"the parameters cannot be cut to {target:g}", f"the narrowest widths leave {left(states[high]):.2f}",
            "ask for less, or let more layers be cut (skip, align)",
        )  # fmt: skip
    while low < high:
        middle = (low + high) // 2
        if left(states[middle]) <= target:
            high = middle
        else:
            low = middle + 1
    return states[high]


def group_seconds(costs: Table, widths: Mapping[str, int], group: Group) -> float:
    """Seconds that the cut of a group saves in its layers, by the table, among the cuts of the others."""
    return costs.around(group.name, {**widths, group.name: group.units}) - costs.around(group.name, widths)
