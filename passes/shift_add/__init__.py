"""Shift-add: products become shifts and additions, in linear layers and, where asked for, in attention.

1. *Attention that was trained with binary queries and keys* is recognised and computes what it did.
   *Other attention*, with ``attention=angular`` or ``hamming``: queries and keys become binary
   (:mod:`~edgecompile.passes.shift_add.attention`). That is another function; it needs training.
2. *Layers.* Linear layers and 1x1 convolutions with constant weights (:mod:`~edgecompile.passes.shift_add.layers`).
3. *Codes.* Each weight becomes 2 to 8 bits (:mod:`~edgecompile.passes.shift_add.codes`). Weights that were trained as
   powers of two keep their values. With calibration data, the
   error of the outputs guides the codes: ``|X W^T - X Q^T|^2``, which needs ``X^T X`` only.
4. *Bits.* One width for all layers, or, under a budget of bytes, the widths that leave the least sum of the layers'
   relative output errors (:func:`~edgecompile.passes.shift_add.codes.allocate`); under a budget of quality, the fewest
   bytes of such widths that hold it.
5. *Budget.* The whole graph is run; while it misses ``min_snr``, or loses more than ``max_drop`` of the score, the
   attentions, then the layers, that make most noise go back (:mod:`edgecompile.sensitivity`). What was measured is
   cached: an interrupted search goes on where it was.
6. *Mixtures*, with ``dispatch=true``: one expert for each token (:mod:`~edgecompile.passes.shift_add.mixture`).
7. *Operators.* Each becomes an operator of domain ``ai.edgecompile`` with a body of standard operators
   (:mod:`~edgecompile.passes.shift_add.ops`), so that every runtime runs the graph.

What it gains is storage: an eighth of float32 at 4 bits. A runtime without a kernel for the operators decodes the
weights when it loads them and computes as before.

Sources: You et al., ShiftAddViT, NeurIPS 2023; You et al., ShiftAddLLM, NeurIPS 2024; and as named in these modules.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import sensitivity
from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph, globs, matches
from edgecompile.oracle import Feeds, OutputError
from edgecompile.passes.shift_add import attention, choices, codes, fused, layers, mixture, ops
from edgecompile.pipeline import ANY_DROP, Context, Drop, Pass, PassResult
from edgecompile.sensitivity import Memo, Search, Trials
from edgecompile.tradeoff import Tradeoff

if TYPE_CHECKING:
    from edgecompile.torch_graph import TorchGraph

_SAMPLES = 64  # of the calibration data that X^T X is summed over
_JUDGED = 16  # of them that the budget is judged on
_HALVINGS = 8  # of the interval of bytes in which the fewest are sought
_CURVE = 15.0  # seconds for codes that only the trade-off curve asks for


@dataclass(frozen=True)
class ShiftAdd(Pass):
    """Linear layers and 1x1 convolutions with weights of a few bits that are sums of powers of two.

    Attributes:
        attention: form that softmax attention takes: ``angular`` (linear in the tokens), ``hamming`` or empty: none.
        threshold: what queries and keys are compared with to become binary: ``fixed``, ``image`` or ``batch``.
        window: tokens that a convolution of the values spans which is added to the angular form, odd; 0 for none.
        linear: code linear layers and 1x1 convolutions.
        dispatch: compute one expert of a mixture for each token; the runtime must take shapes that depend on data.
        code: ``pot`` (one power of two), ``sp2`` (two of them) or ``binary`` (signs times shifted scales).
        bits: of one weight; 0 to choose them per layer: the fewest that keep ``min_snr`` and ``max_drop``, or, without
            these, the best under ``size``.
        size: bytes of the coded weights, over their bytes in floating point; with ``bits=0``.
        group: inputs that share a scale within one output; 0 for all of them.
        skip: globs of node names, operators or module paths that stay as they are, separated by commas.
        output_share: from 0 to 1, how much the error of a layer's outputs counts in the choice of its scales, against
            that of its weights.
        min_snr: least signal-to-noise ratio of each output in dB, on calibration data; what costs most is reverted.
        max_drop: most that the score of ``evaluate`` may fall: ``0.5%`` of it, or ``0.005`` in its unit.
        seconds: time for measuring single layers, and again for reverting them.
    """

    name: ClassVar[str] = "shift_add"
    exact: ClassVar[bool] = False
    attention: str = ""
    threshold: str = "fixed"
    window: int = 0
    linear: bool = True
    dispatch: bool = False
    code: str = "binary"
    bits: int = 4
    size: float = 0.125
    group: int = 256
    skip: str = ""
    output_share: float = 0.5
    min_snr: float = 0.0
    max_drop: Drop = ANY_DROP
    seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.code not in codes.WIDTHS:
            raise ValueError(f"code is {self.code!r}; it may be {', '.join(codes.WIDTHS)}")
        if self.attention not in ("", *attention.FORMS):
            raise ValueError(f"attention is {self.attention!r}; it may be {' or '.join(attention.FORMS)}")
        if self.threshold not in attention.THRESHOLDS:
            raise ValueError(f"threshold is {self.threshold!r}; it may be {', '.join(attention.THRESHOLDS)}")
        if self.bits not in (0, *codes.WIDTHS[self.code]):
            widths = ", ".join(map(str, codes.WIDTHS[self.code]))
            raise ValueError(f"bits is {self.bits}; {self.code} has {widths}, or 0 to choose per layer")
        if not 0 <= self.output_share <= 1 or not 0 < self.size <= 1:
            raise ValueError("output_share lies between 0 and 1, size above 0 and at most 1")
        if self.window and (self.window < 0 or self.window % 2 == 0):
            raise ValueError("window must be odd, or 0")
        if self.group < 0 or math.isnan(self.min_snr) or self.seconds < 0:
            raise ValueError("group and seconds must not be negative, and min_snr must be a number")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place.

        Raises:
            InputError: the graph does not run on the calibration data, there is none and attention is to change, or
                there is no score to keep.
        """
        if self.max_drop.limited and context.evaluate is None:
            raise InputError(
                "max_drop needs a score", "there is none", "define evaluate(run) in model.py, or give min_snr alone"
            )
        if graph.opsets[""] < ops.OPSET:
            context.note(f"opset {graph.opsets['']} is older than {ops.OPSET}: left as it is")
            return context.result()
        graph.tidy()
        graph.infer_shapes()
        feeds = []
        if context.calibration is not None:
            feeds = list(itertools.islice(context.calibration.feeds(), _SAMPLES))
        for one in list(attention.find_trained(graph)):
            if not self._skipped(one.nodes[-1]) and context.rewrite(
                "angular attention, as it was trained", one.nodes[0]
            ):
                attention.write_trained(graph, one)
        graph.tidy()
        graph.infer_shapes()
        budget = _Budget(self, graph.copy(), feeds, context)
        search, tradeoff = None, None
        if self.attention:
            search = self._rewrite_attention(graph, feeds, budget, context)
        if self.linear:
            search, tradeoff = self._code_layers(graph, feeds, budget, search, context)
        if self.dispatch:
            graph.infer_shapes()
            for one in list(mixture.find(graph)):
                if not self._skipped(one.node) and context.rewrite("one expert for each token", one.node):
                    mixture.write(graph, one)
            graph.tidy()
        return context.result(search, tradeoff)

    def _rewrite_attention(
        self, graph: Graph, feeds: Sequence[Feeds], budget: _Budget, context: Context
    ) -> Search | None:
        if not feeds:
            raise InputError(
                "binary attention needs calibration data", "its thresholds and scales are means over it",
                "give images or arrays with --calib",
            )  # fmt: skip
        for one in list(fused.find(graph)):
            if one.why:
                context.note(f"attention left alone: {one.why}", one.node)
            elif not self._skipped(one.node) and context.rewrite("attention as products and a Softmax", one.node):
                fused.write(graph, one.node)
        graph.tidy()
        graph.infer_shapes()
        found = []
        for one in attention.find(graph):
            if isinstance(one, attention.Skipped):
                context.note(f"attention left alone: {one.why}", one.node)
            elif self.attention == "angular" and one.biases:
                context.note("attention left alone: the angular form has no place for its bias or mask", one.nodes[0])
            elif not self._skipped(one.nodes[0]):
                found.append(one)
        if not found:
            context.note("no attention to rewrite")
            return None
        window = self.window if self.attention == "angular" else 0
        if self.threshold == "batch":
            context.note("threshold=batch: what is computed for an image depends on its companions in the batch")
        known = attention.statistics(graph, found, feeds, window)
        position = {id(node): i for i, node in enumerate(graph.nodes)}
        places = [position[id(one.nodes[0])] for one in found]

        def made(chosen: Mapping[int, int]) -> Graph:
            trial = graph.copy()
            trial.infer_shapes()
            numbers = {id(node): i for i, node in enumerate(trial.nodes)}
            for one in list(attention.find(trial)):
                if isinstance(one, attention.Attention) and (place := numbers[id(one.nodes[0])]) in chosen:
                    attention.write(trial, one, self.attention, self.threshold, known[places.index(place)])
            trial.tidy()
            return trial

        search = None
        if budget.limited:
            every = dict.fromkeys(places, 1)
            search = budget.searched(graph, made, every, f"attention={self.attention}", f"{self.attention} attention")
        for one, place, facts in zip(found, places, known, strict=True):
            if search is not None and place not in search.bits:
                continue
            if context.rewrite(f"softmax attention -> {self.attention}, binary queries and keys", one.nodes[0]):
                attention.write(graph, one, self.attention, self.threshold, facts)
        graph.tidy()
        graph.infer_shapes()
        return search

    def _code_layers(
        self, graph: Graph, feeds: Sequence[Feeds], budget: _Budget, before: Search | None, context: Context
    ) -> tuple[Search | None, Tradeoff | None]:
        found = [layer for layer in layers.find(graph) if not self._skipped(layer.node)]
        if not found:
            context.note("no linear layer or 1x1 convolution with constant weights")
            return before, None
        if not feeds:
            context.note("without calibration data the error of the weights is all that guides their codes")
        grams = layers.grams(graph, found, feeds) if feeds else {}
        subjects = choices.subjects(graph, found, grams, self.code, self.group, self.output_share)
        nodes = list(graph.nodes)

        def made(chosen: Mapping[int, int]) -> Graph:
            return choices.coded_graph(graph, subjects, chosen)

        facts = f"{self} without budget" if before is None else f"{self} {sorted(before.bits)}"
        bits, search = self._bits(graph, subjects, made, facts, budget, context), before
        if budget.feeds:
            search = budget.searched(graph, made, bits, facts, "shift-add")
            bits = dict(search.bits)
            if before is not None:
                rows = tuple(replace(row, position=-1 - row.position) for row in before.table)
                search = replace(search, table=(*search.table, *rows), whole=min(search.whole, before.whole))
        kept = {}
        for one in subjects:
            if one.position not in bits:
                continue
            coded, error = one.coded(bits[one.position]), one.error(bits[one.position])
            text = f"{nodes[one.position].op} -> {coded.kind} codes of {coded.bits} bits"
            text += f", {-10 * math.log10(error):.1f} dB" if error else ", exact"
            text += f", shared by {len(one.layers)} layers" if len(one.layers) > 1 else ""
            if context.rewrite(text, nodes[one.position]):
                kept[one.position] = bits[one.position]
        tradeoff = choices.curve(subjects, kept, _CURVE) if kept else None
        plain = sum(one.weight.nbytes for one in subjects)
        for one in subjects:
            if one.position in kept:
                choices.write(graph, nodes, one, kept[one.position])
        graph.tidy()
        if kept:
            after = choices.stored(subjects, kept)
            context.note(f"{plain:,} bytes of weights became {after:,} ({after / plain:.3f})")
        return search, tradeoff

    def _bits(
        self,
        graph: Graph,
        subjects: Sequence[choices.Subject],
        made: Callable[[Mapping[int, int]], Graph],
        facts: str,
        budget: _Budget,
        context: Context,
    ) -> dict[int, int]:
        """The bits of each subject by its position."""
        if self.bits:
            return {one.position: one.exact.bits if one.exact else self.bits for one in subjects}
        plain = sum(one.weight.nbytes for one in subjects)
        trials = budget.trials(graph, made, facts)
        with trials.memo:
            shares = dict.fromkeys((one.position for one in subjects), 1.0)
            if budget.feeds:
                shares = choices.shares(
                    subjects, trials, self.seconds,
                    lambda done: context.progress(f"measuring what each layer costs, {done:.0%}"),
                )  # fmt: skip
            if not budget.limited:
                chosen = choices.allocated(subjects, self.size * plain, shares)
                if (used := choices.stored(subjects, chosen)) > self.size * plain:
                    context.note(f"size={self.size:g} cannot be kept: the fewest bits take {used / plain:.3f}")
                return chosen
            # The fewest bytes that hold the budget: more bytes leave less error, so halve the interval.
            best = choices.allocated(subjects, float(plain), shares)
            low = float(choices.stored(subjects, choices.allocated(subjects, 0.0, shares)))
            high = choices.stored(subjects, best)
            for number in range(_HALVINGS):
                middle = low if not number else (low + high) / 2
                chosen = choices.allocated(subjects, middle, shares)
                context.progress(f"choosing bits, {middle / plain:.3f} of the bytes")
                if trials.judged(chosen)[2]:
                    best, high = chosen, choices.stored(subjects, chosen)
                else:
                    low = middle
                if high <= low:
                    break
        return best

    def reject(self, errors: Mapping[str, OutputError], rounding: Mapping[str, float]) -> str:
        """Why the outputs are not acceptable: not finite. The budget was judged on calibration data."""
        lost = [name for name, error in errors.items() if error.snr_db == -math.inf and error.max_abs == math.inf]
        return f"output {lost[0]!r} is not finite where it was" if lost else ""

    def _skipped(self, node: gs.Node) -> bool:
        return matches(node, globs(self.skip))


class _Budget:
    """What the pass is judged by: the graph as it was, and the least that is asked for."""

    def __init__(self, options: ShiftAdd, original: Graph, feeds: Sequence[Feeds], context: Context):
        self._options, self._original, self._context = options, original, context
        limited = options.min_snr > 0 or options.max_drop.limited
        chosen = np.linspace(0, len(feeds) - 1, min(_JUDGED, len(feeds)))
        self.feeds = [feeds[int(i)] for i in chosen]
        if limited and not feeds:
            context.note("without calibration data the budget is judged on the inputs that verify the passes")
            self.feeds = list(context.feeds)
        self.limited = limited and bool(self.feeds)

    def trials(self, graph: Graph, made: Callable[[Mapping[int, int]], Graph], facts: str) -> Trials:
        """Trials against the graph as it was."""
        options, context = self._options, self._context
        memo = Memo(None, {})
        if context.cache is not None:
            samples = hashlib.sha256()
            for one in itertools.islice(context.calibration.feeds() if context.calibration else (), _SAMPLES):
                for name, value in one.items():
                    samples.update(name.encode() + np.ascontiguousarray(value).tobytes())
            known = sensitivity.facts(self._original, self.feeds, what=facts, samples=samples.hexdigest())
            memo = Memo(context.cache, known)
        return Trials(
            graph, made, self.feeds, memo, min_snr=options.min_snr or -math.inf, max_drop=options.max_drop,
            evaluate=context.evaluate if options.max_drop.limited else None,
            base=context.base(self._original) if options.max_drop.limited else None,
            reference=self._original if self.limited else graph,
        )  # fmt: skip

    def searched(
        self, graph: Graph, made: Callable[[Mapping[int, int]], Graph], bits: Mapping[int, int], facts: str, form: str
    ) -> Search:
        """What may be rewritten, and what was measured; it becomes notes, too."""
        context = self._context
        context.progress(f"judging {form}")
        found = sensitivity.revert(
            self.trials(graph, made, facts), bits, seconds=self._options.seconds, thorough=self.limited, form=form,
            progress=lambda done: context.progress(f"measuring what each layer costs, {done:.0%}"),
        )  # fmt: skip
        kept = f"{form} in {len(found.bits)} of {len(bits)} places"
        sensitivity.tell(found, graph, context, f"{kept}: {found.snr:.1f} dB on the samples", self._options.seconds)
        return found


def to_torch(graph: Graph) -> TorchGraph:
    """The torch module of a rewritten graph, for fine-tuning; see :func:`.trainable.to_torch`.

    Raises:
        EnvironmentMissing: torch is not installed.
        InputError: an operator of the graph is none that torch computes here.
    """
    try:
        from edgecompile.passes.shift_add import trainable
    except ImportError:
        raise missing_extra("cannot make a torch module of the graph", "torch", "torch") from None
    return trainable.to_torch(graph)
