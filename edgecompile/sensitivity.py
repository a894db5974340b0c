"""Which layers may be int8, and how wide their weights may be: decided by running them, not by their names.

Quality is judged on the kernels that will run. A graph with Q and DQ computed in floating point is a simulation: on x86
without VNNI the kernels saturate where the simulation does not, and only running them shows it.

Two figures per layer: the signal-to-noise ratio of the model's outputs when only this layer is int8 (what it costs by
itself), and when only this layer is not (what reverting it would give). Reverting starts with the layer to blame for
most noise, and ends as soon as the budget holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile import oracle, qdq
from edgecompile.calibration import Range
from edgecompile.graph import Graph, where
from edgecompile.oracle import Feeds, Outputs
from edgecompile.placement import Placement, Rules

# Instruction sets whose dot products accumulate in 32 bits, so that no pair of products saturates.
EXACT_DOT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
# A kernel that answers worse than its simulation by more than this, in dB, does something else than the simulation.
DEVIATION = 0.5
_AT_ONCE = 16  # activations held at a time

Run = Callable[[Feeds], Outputs]
Evaluate = Callable[[Run], float]


# -- the width of weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """How well one layer answers by itself, on its own inputs.

    Attributes:
        real: signal-to-noise ratio of the real kernel in dB, by width of the weights.
        simulated: the same, of the simulation in floating point.
    """

    real: Mapping[int, float]
    simulated: Mapping[int, float]

    @property
    def deviates(self) -> bool:
        """True if the 8-bit kernel does something else than its simulation."""
        return self.real[8] < self.simulated[8] - DEVIATION


def choose_bits(evidence: Evidence) -> int:
    """8, or 7 where the 8-bit kernel falls behind its simulation and the 7-bit kernel answers better."""
    return 7 if evidence.deviates and evidence.real[7] > evidence.real[8] else 8


def saturates(features: Collection[str]) -> bool:
    """True if a CPU with these instruction sets adds pairs of 8-bit products in 16 bits.

    Args:
        features: as :func:`edgecompile.measure.cpu_features` names them.
    """
    return "avx2" in features and not EXACT_DOT & set(features)


def evidence(
    graph: Graph, rules: Rules, ranges: Mapping[str, Range], placement: Placement, feeds: Sequence[Feeds]
) -> dict[int, Evidence]:
    """Run each layer of a placement by itself, in 8 and in 7 bits.

    Args:
        graph: the graph in floating point.
        rules, ranges: how it is quantised.
        placement: made from ``graph``.
        feeds: model inputs.

    Returns:
        the evidence by position of the layer in ``graph.nodes``.
    """
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    found: dict[int, Evidence] = {}
    layers = list(placement.layers)
    for start in range(0, len(layers), _AT_ONCE):
        part = layers[start : start + _AT_ONCE]
        seen = list(activations(graph, [made.source.name for made in part], feeds))
        for made in part:
            end = next((p.tensor for p in placement.points.values() if _writes(p.tensor, made.node)), None)
            end = made.node.outputs[0] if end is None else end
            alone = qdq.fragment(graph, [made.source.name], [end.name])
            own = [{made.source.name: one[made.source.name]} for one in seen]
            reference = list(map(qdq.kernels(alone), own))
            number = next(i for i, n in enumerate(alone.nodes) if n.name == made.node.name and n.op == made.node.op)
            real, simulated = {}, {}
            for bits in qdq.WEIGHT_LIMIT:
                trial = qdq.quantized(alone, rules, ranges, {number: bits}, ends=True)
                real[bits] = qdq.snr(reference, map(qdq.kernels(trial), own))
                simulated[bits] = qdq.snr(reference, (oracle.run(trial, f) for f in own))
            found[position[id(made.node)]] = Evidence(real, simulated)
    return found


def _writes(tensor, node) -> bool:
    """True if a node, or the activation function that follows it, writes a tensor."""
    before = tensor.inputs[0] if tensor.inputs else None
    return before is not None and (
        before is node or (before.op in ("Relu", "Clip") and any(t is before.inputs[0] for t in node.outputs))
    )


def activations(graph: Graph, names: Sequence[str], feeds: Sequence[Feeds]) -> Iterator[Outputs]:
    """Values of some tensors for each of the feeds; those that are fed are taken from there."""
    fed = {t.name for t in graph.inputs}
    computed = [n for n in dict.fromkeys(names) if n not in fed]
    if not computed:
        yield from ({n: one[n] for n in names} for one in feeds)
        return
    part = qdq.fragment(graph, [t.name for t in graph.inputs], computed)
    run, inputs = qdq.kernels(part), {t.name for t in part.inputs}
    for one in feeds:
        yield {**{n: one[n] for n in names if n in fed}, **run({n: v for n, v in one.items() if n in inputs})}


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerScore:
    """What one layer costs.

    Attributes:
        position: in ``graph.nodes``.
        layer: how to name it to a person.
        bits: width of its weights.
        only_int8: signal-to-noise ratio of the model's outputs in dB when nothing else is int8; None: not measured.
        only_float: the same when everything else is int8.
        reverted: it stays in floating point.
    """

    position: int
    layer: str
    bits: int
    only_int8: float | None = None
    only_float: float | None = None
    reverted: bool = False


@dataclass(frozen=True)
class Search:
    """What :func:`search` found.

    Attributes:
        bits: width of the weights of the layers that stay int8, by position in ``graph.nodes``.
        table: every layer, the most sensitive first.
        snr: of the outputs, in dB, with what is left in int8.
        score, base: of ``evaluate``, with int8 and in floating point; None without it.
        holds: the budget holds.
        finished: all layers were measured before the time ran out.
    """

    bits: Mapping[int, int]
    table: tuple[LayerScore, ...]
    snr: float
    score: float | None
    base: float | None
    holds: bool
    finished: bool


def search(
    graph: Graph,
    rules: Rules,
    ranges: Mapping[str, Range],
    bits: Mapping[int, int],
    feeds: Sequence[Feeds],
    *,
    biases: Mapping[int, np.ndarray] | None = None,
    runner: Callable[[Graph], Run] = qdq.kernels,
    min_snr: float = -math.inf,
    max_drop: float = math.inf,
    evaluate: Evaluate | None = None,
    seconds: float = 120.0,
    progress: Callable[[float], object] | None = None,
    **options: Any,
) -> Search:
    """Measure the layers and revert the worst until the budget holds.

    Args:
        graph: the graph in floating point; it is not changed.
        rules, ranges: how it is quantised.
        bits: width of the weights of each layer, by position in ``graph.nodes``.
        feeds: model inputs to judge on.
        biases: new biases of layers, by position.
        runner: makes a function of a graph: the real kernels, or a simulation where the target's are not here.
        min_snr: of the worst output, in dB.
        max_drop: of the score of ``evaluate``, in its unit.
        evaluate: takes a function from inputs to outputs, returns a score where higher is better.
        seconds: time for measuring layers, and again for reverting them.
        progress: called with the fraction of the layers measured.
        options: of :func:`edgecompile.placement.place`.
    """
    float_run = runner(graph)
    reference = list(map(float_run, feeds))
    base = evaluate(float_run) if evaluate else None

    def attempt(chosen: Mapping[int, int]) -> tuple[float, Run]:
        run = runner(qdq.quantized(graph, rules, ranges, chosen, biases, **options))
        return qdq.snr(reference, map(run, feeds)), run

    def judged(chosen: Mapping[int, int]) -> tuple[float, float | None, bool]:
        level, run = attempt(chosen)
        score = evaluate(run) if evaluate else None
        holds = level >= min_snr and (score is None or base is None or base - score <= max_drop)
        return level, score, holds

    kept = dict(bits)
    level, score, holds = judged(kept)
    rows = {i: LayerScore(i, where(graph.nodes[i]), width) for i, width in bits.items()}
    if holds:
        return Search(kept, tuple(rows.values()), level, score, base, True, True)
    deadline = time.monotonic() + seconds
    for done, (i, row) in enumerate(rows.items(), 1):
        if time.monotonic() > deadline:
            break
        without = {k: v for k, v in kept.items() if k != i}
        rows[i] = LayerScore(i, row.layer, row.bits, attempt({i: row.bits})[0], attempt(without)[0])
        if progress:
            progress(done / len(rows))
    finished = all(r.only_float is not None for r in rows.values())
    order = sorted(rows.values(), key=lambda row: -_noise(row, level))
    deadline = time.monotonic() + seconds
    for row in order:
        if holds or time.monotonic() > deadline:
            break
        del kept[row.position]
        rows[row.position] = LayerScore(row.position, row.layer, row.bits, row.only_int8, row.only_float, True)
        level, score, holds = judged(kept)
    return Search(kept, tuple(rows[r.position] for r in order), level, score, base, holds, finished)


def _noise(row: LayerScore, level: float) -> float:
    """The noise a layer is to blame for, relative to the signal; 0 if it was not measured.

    What it makes by itself, and what goes away without it: of two layers that poison the same tensor, neither helps
    alone, and each shows in the first figure only.
    """
    if row.only_float is None or row.only_int8 is None:
        return 0.0
    whole, alone, without = (10 ** (-x / 10) for x in (level, row.only_int8, row.only_float))
    return alone + max(whole - without, 0.0)
