"""Which layers may be int8 or coded, and how wide their weights may be: decided by running them, not by their names.

Quality is judged on the kernels that will run. A graph with Q and DQ computed in floating point is a simulation: on x86
without VNNI the kernels saturate where the simulation does not, and only running them shows it.

Two figures per layer: the signal-to-noise ratio of the model's outputs when only this layer is int8 (what it costs by
itself), and when only this layer is not (what reverting it would give). Reverting starts with the layer to blame for
most noise, and ends as soon as the budget holds. What becomes of a layer is for :class:`Trials` to say: the same search
serves every pass that can rewrite any subset of the layers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import __version__, calibration, measure, qdq
from edgecompile.calibration import Range
from edgecompile.graph import Graph, where
from edgecompile.oracle import Feeds, Outputs
from edgecompile.pipeline import ANY_DROP, Context, Drop, Evaluate
from edgecompile.placement import Layer, Placement, Rules

# Instruction sets whose dot products accumulate in 32 bits, so that no pair of products saturates.
EXACT_DOT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
# A kernel that answers worse than its simulation by more than this, in dB, does something else than the simulation.
DEVIATION = 0.5
SCHEMA = "edgecompile.sensitivity/1"
_AT_ONCE = 16  # activations held at a time
_CHEAP = 10.0  # seconds that a table may take which no budget needs
_SAVE_SECONDS = 5.0

Run = Callable[[Feeds], Outputs]


# -- what was measured before ------------------------------------------------------------------------------------------


class Memo:
    """Figures by key, kept in a file that is named after what they depend on; damaged files are ignored.

    Args:
        folder: of the file; None keeps nothing.
        facts: what the figures depend on.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, str]):
        self._facts, self._path, self._saved = dict(facts), None, time.monotonic()
        self._figures: dict[str, list[float]] = {}
        if folder is not None:
            self._path = calibration.entry_path(folder, SCHEMA, self._facts)
            self._figures = (calibration.read_entry(self._path, self._facts) or {}).get("figures", {})
        self._written = len(self._figures)

    def __call__(self, key: str, measured: Callable[[], Sequence[float]]) -> list[float]:
        """The figures of a key, measured if they are not known."""
        if key not in self._figures:
            self._figures[key] = [float(x) for x in measured()]
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self.save()
        return self._figures[key]

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()  # also what was measured before an interrupt

    def save(self) -> None:
        """Write what is new."""
        if self._path is not None and len(self._figures) > self._written:
            content = {"schema": SCHEMA, "facts": self._facts, "figures": self._figures}
            calibration.write_entry(self._path, content)
            self._saved, self._written = time.monotonic(), len(self._figures)


def facts(graph: Graph, feeds: Sequence[Feeds], **more: Any) -> dict[str, str]:
    """What figures about a graph depend on."""
    inputs = hashlib.sha256()
    for one in feeds:
        for name, value in one.items():
            inputs.update(f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return {
        "graph": graph.digest(),
        "feeds": inputs.hexdigest(),
        "version": __version__,
        "runtime": importlib.metadata.version("onnxruntime"),
        "cpu": " ".join(sorted(measure.cpu_features())),
        **{name: str(value) for name, value in more.items()},
    }


def _quantisation(rules: Rules, ranges: Mapping[str, Range]) -> dict[str, str]:
    """The facts of how a graph is quantised."""
    return {"rules": repr(rules), "ranges": repr([(name, ranges[name]) for name in sorted(ranges)])}


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
    graph: Graph,
    rules: Rules,
    ranges: Mapping[str, Range],
    placement: Placement,
    feeds: Sequence[Feeds],
    *,
    progress: Callable[[float], object] = lambda done: None,
    cache: Path | None = None,
) -> dict[int, Evidence]:
    """Run each layer of a placement by itself, in 8 and in 7 bits.

    Args:
        graph: the graph in floating point.
        rules, ranges: how it is quantised.
        placement: made from ``graph``.
        feeds: model inputs.
        progress: called with the fraction of the layers that were run.
        cache: folder that keeps what was measured.

    Returns:
        the evidence by position of the layer in ``graph.nodes``.
    """
    position = {id(n): i for i, n in enumerate(graph.nodes)}
    found: dict[int, Evidence] = {}
    layers, widths = list(placement.layers), list(qdq.WEIGHT_LIMIT)
    known = facts(graph, feeds, what="widths", **_quantisation(rules, ranges)) if cache else {}
    memo = Memo(cache, known)
    with memo:
        for start in range(0, len(layers), _AT_ONCE):
            part = layers[start : start + _AT_ONCE]
            seen: list[Outputs] = []
            for number, made in enumerate(part, start + 1):

                def measured(made: Layer = made, part: Sequence[Layer] = part, seen: list[Outputs] = seen):
                    if not seen:
                        seen += activations(graph, [m.source.name for m in part], feeds)
                    return _alone(graph, rules, ranges, placement, made, [one[made.source.name] for one in seen])

                figures = memo(str(position[id(made.node)]), measured)
                real, simulated = figures[: len(widths)], figures[len(widths) :]
                found[position[id(made.node)]] = Evidence(
                    dict(zip(widths, real, strict=True)), dict(zip(widths, simulated, strict=True))
                )
                progress(number / len(layers))
    return found


def _alone(
    graph: Graph,
    rules: Rules,
    ranges: Mapping[str, Range],
    placement: Placement,
    made: Layer,
    values: Sequence[np.ndarray],
) -> list[float]:
    """Signal-to-noise ratios of a layer fed these values: of its kernels by width, then of their simulations."""
    end = next((p.tensor for p in placement.points.values() if _writes(p.tensor, made.node)), None)
    end = made.node.outputs[0] if end is None else end
    alone = qdq.fragment(graph, [made.source.name], [end.name])
    own = [{made.source.name: one} for one in values]
    reference = list(map(qdq.kernels(alone), own))
    number = next(i for i, n in enumerate(alone.nodes) if n.name == made.node.name and n.op == made.node.op)
    real, simulated = [], []
    for bits in qdq.WEIGHT_LIMIT:
        trial = qdq.quantized(alone, rules, ranges, {number: bits}, ends=True)
        real.append(qdq.snr(reference, map(qdq.kernels(trial), own)))
        simulated.append(qdq.snr(reference, map(qdq.simulation(trial), own)))
    return [*real, *simulated]


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
    """What one layer costs; where int8 is said, whatever the trials make of a layer is meant.

    Attributes:
        position: in ``graph.nodes``.
        name: of the node, or of its first output.
        layer: how to name it to a person.
        bits: width of its weights.
        only_int8: signal-to-noise ratio of the model's outputs in dB when nothing else is int8; None: not measured.
        only_float: the same when everything else is int8.
        score: of ``evaluate`` when everything else is int8; None: not measured.
        reverted: it stays in floating point.
    """

    position: int
    name: str
    layer: str
    bits: int
    only_int8: float | None = None
    only_float: float | None = None
    score: float | None = None
    reverted: bool = False


@dataclass(frozen=True)
class Search:
    """What a search found; where int8 is said, whatever the trials make of a layer is meant.

    Attributes:
        bits: width of the weights of the layers that stay int8, by position in ``graph.nodes``.
        table: every layer, the most sensitive first.
        snr: of the outputs, in dB, with what is left in int8.
        whole: the same with all layers in int8.
        score, base: of ``evaluate``, with int8 and in floating point; None without it.
        holds: the budget holds.
        finished: False if the time ran out before all layers were measured.
        form: what the layers become, to a person.
    """

    bits: Mapping[int, int]
    table: tuple[LayerScore, ...]
    snr: float
    whole: float
    score: float | None
    base: float | None
    holds: bool
    finished: bool
    form: str = "int8"

    @property
    def measured(self) -> bool:
        """Whether any layer was measured by itself."""
        return any(row.only_float is not None for row in self.table)


def tell(found: Search, graph: Graph, context: Context, summary: str, seconds: float) -> None:
    """Make notes of what a search found.

    Args:
        found: the result.
        graph: the graph in floating point.
        context: takes the notes.
        summary: what is kept, and how well it answers; the score is added.
        seconds: the time that the search was given.
    """
    score = "" if found.score is None else f", score {found.score:.4g} of {found.base:.4g}"
    context.note(f"{summary}{score}")
    for row in found.table:
        if row.reverted:
            gain = "" if row.only_float is None else f": {row.only_float:.1f} dB without it"
            context.note(f"left in floating point to keep the budget{gain}", graph.nodes[row.position])
    if not found.finished:
        context.note(f"not all layers were measured: {seconds:g} s were too little (option seconds)")
    if not found.holds:
        context.note("the budget does not hold: the time for reverting layers ran out")


def search(
    graph: Graph,
    rules: Rules,
    ranges: Mapping[str, Range],
    bits: Mapping[int, int],
    feeds: Sequence[Feeds],
    *,
    biases: Mapping[int, np.ndarray] | None = None,
    simulate: bool = False,
    min_snr: float = -math.inf,
    max_drop: Drop = ANY_DROP,
    evaluate: Evaluate | None = None,
    base: float | None = None,
    seconds: float = 120.0,
    thorough: bool = False,
    progress: Callable[[float], object] = lambda done: None,
    cache: Path | None = None,
    **options: Any,
) -> Search:
    """:func:`revert` for layers that become int8.

    Args:
        graph: the graph in floating point; it is not changed.
        rules, ranges: how it is quantised.
        bits: width of the weights of each layer, by position in ``graph.nodes``.
        feeds: model inputs to judge on.
        biases: new biases of layers, by position.
        simulate: run a simulation, since the target's kernels are not here.
        min_snr, max_drop, evaluate, base: the budget, see :class:`Trials`.
        seconds, thorough, progress: see :func:`revert`.
        cache: folder that keeps what was measured.
        options: of :func:`edgecompile.placement.place`.
    """
    known: dict[str, str] = {}
    if cache is not None:
        corrected = hashlib.sha256()
        for position, values in sorted((biases or {}).items()):
            corrected.update(f"{position} ".encode() + np.ascontiguousarray(values).tobytes())
        more = {"biases": corrected.hexdigest(), "simulate": simulate, "options": sorted(options.items())}
        known = facts(graph, feeds, what="layers", **_quantisation(rules, ranges), **more)
    trials = Trials(
        graph, lambda chosen: qdq.quantized(graph, rules, ranges, chosen, biases, **options), feeds, Memo(cache, known),
        simulate=simulate, min_snr=min_snr, max_drop=max_drop, evaluate=evaluate, base=base,
    )  # fmt: skip
    return revert(trials, bits, seconds=seconds, thorough=thorough, progress=progress)


def revert(
    trials: Trials,
    bits: Mapping[int, int],
    *,
    seconds: float = 120.0,
    thorough: bool = False,
    progress: Callable[[float], object] = lambda done: None,
    form: str = "int8",
) -> Search:
    """Measure the layers and revert the worst until the budget holds.

    Args:
        trials: what is judged.
        bits: width of the weights of each layer, by position in ``graph.nodes``.
        seconds: time for measuring layers, and again for reverting them.
        thorough: measure the layers even if the budget holds; else they are only where that takes a few seconds.
        progress: called with the fraction of the layers measured.
        form: what the layers become, to a person.
    """
    with trials.memo:
        base = trials.base
        whole, each = trials.figures(bits)
        level, score, holds = trials.judged(bits)
        nodes = list(trials.graph.nodes)
        rows = [LayerScore(i, nodes[i].name or nodes[i].outputs[0].name, where(nodes[i]), b) for i, b in bits.items()]
        if holds and not thorough and 2 * each * len(rows) > _CHEAP:
            return Search(dict(bits), tuple(rows), level, whole, score, base, True, True, form)
        rows, finished = _measured(trials, bits, rows, whole, seconds, progress)
        kept, deadline = dict(bits), time.monotonic() + seconds
        # Reverting the first `low` is not enough, the first `high` may be.
        low, high, step = 0, 0 if holds else len(rows), 1
        while not holds and low < high and time.monotonic() <= deadline:
            tried = min(low + step, high)
            kept = {i: b for i, b in bits.items() if i not in {row.position for row in rows[:tried]}}
            level, score, holds = trials.judged(kept)
            low, high, step = (low, tried, step) if holds else (tried, high, 2 * step)
        while holds and high - low > 1 and time.monotonic() <= deadline:
            tried = (low + high) // 2
            fewer = {i: b for i, b in bits.items() if i not in {row.position for row in rows[:tried]}}
            found = trials.judged(fewer)
            if found[2]:
                high, kept, (level, score, _) = tried, fewer, found
            else:
                low = tried
    table = tuple(replace(row, reverted=row.position not in kept) for row in rows)
    return Search(kept, table, level, whole, score, base, holds, finished, form)


class Trials:
    """Graphs in which some layers are rewritten, and how well they answer.

    Args:
        graph: the graph in floating point; it is not changed.
        make: the graph in which the layers of these positions are rewritten, with weights of these widths.
        feeds: model inputs to judge on.
        memo: of what was measured.
        simulate: run a simulation, since the target's kernels are not here.
        min_snr: of the worst output, in dB.
        max_drop: of the score of ``evaluate``.
        evaluate: score of a graph, higher is better.
        base: score that it falls from; that of ``reference`` by default.
        reference: the graph that is to be kept to; by default ``graph``.
    """

    def __init__(
        self,
        graph: Graph,
        make: Callable[[Mapping[int, int]], Graph],
        feeds: Sequence[Feeds],
        memo: Memo,
        *,
        simulate: bool = False,
        min_snr: float = -math.inf,
        max_drop: Drop = ANY_DROP,
        evaluate: Evaluate | None = None,
        base: float | None = None,
        reference: Graph | None = None,
    ):
        self.graph, self.memo, self._original = graph, memo, reference or graph
        self._make, self._feeds, self._simulate, self._evaluate = make, feeds, simulate, evaluate
        self._min_snr, self._max_drop, self._base = min_snr, max_drop, base
        self._reference: list[Outputs] = []

    @cached_property
    def base(self) -> float | None:
        """Score in floating point, None if nothing scores."""
        if self._base is not None:
            return self._base
        return self._evaluate(self._original, self._simulate) if self._evaluate else None

    def judged(self, chosen: Mapping[int, int]) -> tuple[float, float | None, bool]:
        """Signal-to-noise ratio, score, and whether the budget holds, when these layers are rewritten."""
        level, score = self.level(chosen), self.score(chosen)
        enough = score is None or self.base is None or self._max_drop.holds(score, self.base)
        return level, score, level >= self._min_snr and enough

    def _run(self, graph: Graph) -> Run:
        return (qdq.simulation if self._simulate else qdq.kernels)(graph)

    def figures(self, chosen: Mapping[int, int]) -> tuple[float, float]:
        """Signal-to-noise ratio in dB when these layers are rewritten, and the seconds that it took to find out."""
        key = hashlib.sha256(repr(sorted(chosen.items())).encode()).hexdigest()

        def measured() -> list[float]:
            if not self._reference:
                self._reference = list(map(self._run(self._original), self._feeds))
            start = time.monotonic()
            level = qdq.snr(self._reference, map(self._run(self._make(chosen)), self._feeds))
            return [level, time.monotonic() - start]

        level, seconds = self.memo(key, measured)
        return level, seconds

    def level(self, chosen: Mapping[int, int]) -> float:
        """Signal-to-noise ratio in dB when these layers are rewritten."""
        return self.figures(chosen)[0]

    def score(self, chosen: Mapping[int, int]) -> float | None:
        """Score when these layers are rewritten, None if nothing scores."""
        return self._evaluate(self._make(chosen), self._simulate) if self._evaluate else None


def _measured(
    trials: Trials,
    bits: Mapping[int, int],
    rows: Sequence[LayerScore],
    whole: float,
    seconds: float,
    progress: Callable[[float], object],
) -> tuple[list[LayerScore], bool]:
    """The rows with their figures, the most sensitive first; and whether the time was enough for all."""
    deadline = time.monotonic() + seconds
    left = list(rows)
    done: list[LayerScore] = []
    while left and time.monotonic() <= deadline:
        row = left.pop(0)
        without = trials.level({k: v for k, v in bits.items() if k != row.position})
        done.append(replace(row, only_int8=trials.level({row.position: row.bits}), only_float=without))
        progress(len(done) / len(rows))
    rows = sorted([*done, *left], key=lambda row: -_noise(row, whole))
    scored: list[LayerScore] = []
    while len(scored) < len(rows) and time.monotonic() <= deadline:
        row = rows[len(scored)]
        score = trials.score({k: v for k, v in bits.items() if k != row.position})
        if score is None:
            return rows, not left
        scored.append(replace(row, score=score))
        progress(len(scored) / len(rows))
    return [*scored, *rows[len(scored) :]], not left and len(scored) == len(rows)


def _noise(row: LayerScore, level: float) -> float:
    """The noise a layer is to blame for, relative to the signal; 0 if it was not measured.

    What it makes by itself, and what goes away without it: of two layers that poison the same tensor, neither helps
    alone, and each shows in the first figure only.
    """
    if row.only_float is None or row.only_int8 is None:
        return 0.0
    whole, alone, without = (10 ** (-x / 10) for x in (level, row.only_int8, row.only_float))
    return alone + max(whole - without, 0.0)
