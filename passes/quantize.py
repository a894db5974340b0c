"""Quantize: int8 as QuantizeLinear and DequantizeLinear, where the target gains from it and the model survives it.

In order:

1. *Survival.* Rewrites that are exact in real arithmetic: the result of each LayerNorm gets one range for all channels,
   and, where asked for, pairs of layers are equalised (:mod:`edgecompile.equalize`).
2. *Placement.* The target's table picks layers, what follows them, and the tensors between
   (:mod:`edgecompile.placement`).
3. *Ranges.* The calibration data is streamed through the graph once (:mod:`edgecompile.calibration`).
4. *Width.* Where the CPU at hand adds pairs of 8-bit products in 16 bits, each layer is run by itself with weights of
   8 and of 7 bits, with the real kernels, and gets what answers better (:mod:`edgecompile.sensitivity`).
5. *Bias correction.* The mean that rounding the weights adds to each output channel is taken from the bias.
6. *Budget.* The whole graph is run with the real kernels; while it misses ``min_snr``, or loses more than ``max_drop``
   of the score of ``evaluate``, the layers that cost most go back to floating point.

What follows a Softmax stays in floating point. Its values lie between 0 and 1, most of them close to 0, and would want
levels at powers of two (RepQ-ViT's log-sqrt2 quantiser), which QuantizeLinear does not have: its scale is uniform, and
the targets have no kernel that multiplies by shifts. Written with Log, Round and Exp around the product, such a
quantiser costs more than the float product it replaces, which has a few per cent of the work of these networks. So the
tables name the reason, and only the layers before and after are int8.

A graph that holds QuantizeLinear or DequantizeLinear already made its own choices and is left as it is.

Sources: as named in these modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgecompile import calibration, equalize, linear, measure, qdq, sensitivity
from edgecompile.errors import InputError
from edgecompile.graph import Graph, globs
from edgecompile.oracle import Feeds, OutputError
from edgecompile.pipeline import ANY_DROP, Context, Drop, Pass, PassResult
from edgecompile.placement import TABLES, Placement, Rules, place

if TYPE_CHECKING:
    from edgecompile.calibration_data import CalibrationData

_JUDGED = 8  # samples that the budget is judged on
_EVIDENCE = 2  # samples that single layers are run on
_MEANS = 32  # samples at most whose mean corrects the biases
_ENDS = {"auto": None, "int8": True, "float": False}
_GAP = 1.0  # dB between kernels and simulation beyond which the user is told


@dataclass(frozen=True)
class Quantize(Pass):
    """Int8 with explicit QuantizeLinear and DequantizeLinear, calibrated on data.

    Attributes:
        method: how a range is chosen: ``mse``, ``entropy``, ``percentile`` or ``minmax``.
        rules: the target's table: ``ort_cpu``, ``tensorrt`` or ``tvm``.
        bits: width of the weights, 7 or 8; 0 to choose it per layer by running the kernels.
        skip: globs of node names, operators or module paths that stay in floating point, separated by commas.
        ends: first and last layers: ``auto`` keeps them in floating point in networks with attention, and a last layer
            whose kernel would round an output of the model; ``int8`` and ``float`` decide for all networks.
        norms: even out the channels of the results of LayerNorms.
        equalize: even out the channels between pairs of layers.
        bias_correction: take the mean error of rounded weights from the biases.
        min_snr: least signal-to-noise ratio of each output in dB, on calibration data; layers are reverted to keep it.
        max_drop: most that the score of ``evaluate`` may fall: ``0.5%`` of it, or ``0.005`` in its unit.
        seconds: time for measuring single layers, and again for reverting them.
        memory: bytes that calibration may take for activations.
    """

    name: ClassVar[str] = "quantize"
    exact: ClassVar[bool] = False
    method: str = "mse"
    rules: str = "ort_cpu"
    bits: int = 0
    skip: str = ""
    ends: str = "auto"
    norms: bool = True
    equalize: bool = False
    bias_correction: bool = True
    min_snr: float = 0.0
    max_drop: Drop = ANY_DROP
    seconds: float = 120.0
    memory: int = calibration.MEMORY

    def __post_init__(self) -> None:
        choices = {"method": calibration.METHODS, "rules": TABLES, "ends": _ENDS, "bits": (0, *qdq.WEIGHT_LIMIT)}
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option} is {getattr(self, option)!r}; it may be {', '.join(map(str, allowed))}")
        if math.isnan(self.min_snr):
            raise ValueError("min_snr is not a number")
        if self.seconds < 0 or self.memory <= 0:
            raise ValueError("seconds must not be negative, and memory must be positive")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place.

        Raises:
            InputError: there is no calibration data, the opset is older than 13, the graph does not run on the data, or
                there is no score to keep.
        """
        if qdq.is_quantized(graph):
            context.note("the graph is quantised already: left as it is")
            return context.result()
        data = context.calibration
        if data is None:
            raise InputError(
                "int8 needs calibration data", "none was given", "give images or arrays with --calib, or define "
                "calibration_data() in model.py",
            )  # fmt: skip
        if self.max_drop.limited and context.evaluate is None:
            raise InputError(
                "max_drop needs a score", "there is none", "define evaluate(run) in model.py, or give min_snr alone"
            )
        if data.random:
            context.note("calibrated on random numbers, which say nothing about real activations")
        graph.tidy()
        graph.infer_shapes()
        feeds = _thinned(data.feeds())
        self._survive(graph, context, data)
        rules = TABLES[self.rules]
        if rules.note:
            context.note(rules.note)
        placement = place(graph, rules, **self._options)
        for node, why in placement.floats:
            context.note(f"left in floating point: {why}", node)
        if not placement.layers:
            context.note("no layer can be int8")
            return context.result()
        ranges = self._collect(graph, context, data, list(placement.points), self.method)
        bits, biases = self._widths(graph, placement, ranges, feeds, context), {}
        if self.bias_correction:
            position = {id(n): i for i, n in enumerate(graph.nodes)}
            widths = {id(graph.nodes[i]): b for i, b in bits.items()}
            found = equalize.corrected_biases(graph, placement, ranges, widths, feeds)
            biases = {position[key]: values for key, values in found.items()}
        search = self._budget(graph, rules, ranges, bits, biases, _spread(feeds), context)
        bits = search.bits
        chosen = {i: b for i, b in bits.items() if context.rewrite(f"int8, weights of {b} bits", graph.nodes[i])}
        if chosen:
            nodes = list(graph.nodes)
            widths = {id(nodes[i]): b for i, b in chosen.items()}
            final = place(graph, rules, only=widths.keys(), **self._options)
            qdq.insert(graph, final, ranges, widths, {id(nodes[i]): b for i, b in biases.items()})
            graph.tidy()
        return context.result(search)

    def reject(self, errors: Mapping[str, OutputError], rounding: Mapping[str, float]) -> str:
        """Why the outputs are not acceptable: not finite. The budget was judged on calibration data."""
        lost = [name for name, error in errors.items() if error.snr_db == -math.inf and error.max_abs == math.inf]
        return f"output {lost[0]!r} is not finite where it was" if lost else ""

    @property
    def _options(self) -> dict[str, Any]:
        """The options of :func:`~edgecompile.placement.place`."""
        return {"skip": globs(self.skip), "ends": _ENDS[self.ends]}

    def _collect(
        self,
        graph: Graph,
        context: Context,
        data: CalibrationData,
        tensors: Sequence[str],
        method: str,
        axes: Mapping[str, int] | None = None,
    ) -> calibration.Ranges:
        def progress(done: int, total: int | None) -> None:
            context.progress(f"calibrating, {done / total:.0%}" if total else f"calibrating, sample {done}")

        return calibration.collect(
            graph, data, tensors, method, symmetric=TABLES[self.rules].symmetric, axes=axes, memory=self.memory,
            progress=progress, cache=context.cache,
        )  # fmt: skip

    def _survive(self, graph: Graph, context: Context, data: CalibrationData) -> None:
        skipped = []
        if self.norms and (found := list(equalize.norms(graph))):
            axes = {node.outputs[0].name: axis for node, axis in found}
            ranges = self._collect(graph, context, data, list(axes), "minmax", axes)
            symmetric = TABLES[self.rules].symmetric
            skipped += equalize.reparameterize_norms(graph, ranges, symmetric=symmetric, apply=context.rewrite)
        if self.equalize:
            pairs = [p for p in equalize.links(graph) if isinstance(p, equalize.Link)]
            axes = {p.entry.name: 1 if p.second.op == "Conv" else linear.rank(p.entry) - 1 for p in pairs}
            known: Mapping[str, calibration.Range] = {}
            if axes:
                known = self._collect(graph, context, data, list(axes), "minmax", axes)
            largest = {n: np.abs(np.asarray(r.per_channel)).max(1) for n, r in known.items() if r.per_channel}
            skipped += equalize.equalize(graph, largest, apply=context.rewrite)
        for one in skipped:
            context.note(f"not equalised: {one.why}", one.node)
        graph.tidy()

    def _widths(
        self, graph: Graph, placement: Placement, ranges: calibration.Ranges, feeds: Sequence[Feeds], context: Context
    ) -> dict[int, int]:
        position = {id(n): i for i, n in enumerate(graph.nodes)}
        layers = [position[id(made.node)] for made in placement.layers]
        features = measure.cpu_features()
        if self.bits or placement.rules.simulated or not sensitivity.saturates(features):
            return dict.fromkeys(layers, self.bits or 8)
        found = sensitivity.evidence(
            graph, placement.rules, ranges, placement, feeds[:_EVIDENCE], cache=context.cache,
            progress=lambda done: context.progress(f"choosing widths, {done:.0%}"),
        )  # fmt: skip
        bits = {i: sensitivity.choose_bits(e) for i, e in found.items()}
        for i in layers:
            if found[i].deviates:
                real, plain = found[i].real, found[i].simulated
                context.note(
                    f"{bits[i]}-bit weights: the 8-bit kernel gives {real[8]:.1f} dB where {plain[8]:.1f} dB were "
                    f"simulated, the 7-bit kernel {real[7]:.1f} dB",
                    graph.nodes[i],
                )
        return bits

    def _budget(
        self,
        graph: Graph,
        rules: Rules,
        ranges: calibration.Ranges,
        bits: Mapping[int, int],
        biases: Mapping[int, np.ndarray],
        feeds: Sequence[Feeds],
        context: Context,
    ) -> sensitivity.Search:
        """What was measured of the layers, and which may stay int8; it becomes notes, too."""
        context.progress("judging int8")
        scored = self.max_drop.limited
        found = sensitivity.search(
            graph, rules, ranges, bits, feeds,
            biases=biases, simulate=rules.simulated, min_snr=self.min_snr, max_drop=self.max_drop,
            evaluate=context.evaluate if scored else None,
            base=context.base(graph, rules.simulated) if scored else None,
            seconds=self.seconds, thorough=self.min_snr > 0 or scored, cache=context.cache,
            progress=lambda done: context.progress(f"measuring what each layer costs, {done:.0%}"),
            **self._options,
        )  # fmt: skip
        kept = f"{len(found.bits)} of {len(bits)} layers are int8"
        sensitivity.tell(found, graph, context, f"{kept}: {found.snr:.1f} dB on calibration data", self.seconds)
        if not rules.simulated:
            trial = qdq.quantized(graph, rules, ranges, found.bits, biases, **self._options)
            reference = list(map(qdq.kernels(graph), feeds))
            simulated = qdq.snr(reference, map(qdq.simulation(trial), feeds))
            if simulated - found.snr > _GAP:
                context.note(f"the real kernels lose {simulated - found.snr:.1f} dB against their simulation")
        return found


def _thinned(feeds: Iterable[Feeds]) -> list[Feeds]:
    """At most :data:`_MEANS` of the feeds, evenly spread from the first on: a folder of images is sorted by class."""
    kept: list[Feeds] = []
    step = 1
    for number, one in enumerate(feeds):
        if number % step == 0:
            kept.append(one)
        if len(kept) > _MEANS:
            kept, step = kept[::2], 2 * step
    return kept


def _spread(feeds: Sequence[Feeds]) -> list[Feeds]:
    """A few of the feeds, evenly spread."""
    chosen = np.linspace(0, len(feeds) - 1, min(_JUDGED, len(feeds)))
    return [feeds[int(i)] for i in chosen]
