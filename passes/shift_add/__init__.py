"""Shift-add: products become shifts and additions, in linear layers and, where asked for, in attention.

1. *Attention that was trained with binary queries and keys* is recognised and computes what it did.
   *Other attention*, with ``attention=angular`` or ``hamming``: queries and keys become binary
   (:mod:`~edgecompile.passes.shift_add.attention`). That is another function; it needs training.
2. *Layers.* Linear layers and 1x1 convolutions with constant weights (:mod:`~edgecompile.passes.shift_add.layers`).
3. *Codes.* Each weight becomes 2 to 8 bits (:mod:`~edgecompile.passes.shift_add.codes`). Weights that were trained as
   powers of two keep their values. With calibration data, the
   error of the outputs guides the codes: ``|X W^T - X Q^T|^2``, which needs ``X^T X`` only.
4. *Bits.* One width for all layers, or, under a budget of bytes, the widths that leave the least sum of the layers'
   relative output errors (:func:`~edgecompile.passes.shift_add.codes.allocate`).
5. *Mixtures*, with ``dispatch=true``: one expert for each token (:mod:`~edgecompile.passes.shift_add.mixture`).
6. *Operators.* Each becomes an operator of domain ``ai.edgecompile`` with a body of standard operators
   (:mod:`~edgecompile.passes.shift_add.ops`), so that every runtime runs the graph.

What it gains is storage: an eighth of float32 at 4 bits. A runtime without a kernel for the operators decodes the
weights when it loads them and computes as before.

Sources: You et al., ShiftAddViT, NeurIPS 2023; You et al., ShiftAddLLM, NeurIPS 2024; and as named in these modules.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph, provenance
from edgecompile.oracle import Feeds, OutputError
from edgecompile.passes.shift_add import attention, codes, layers, mixture, ops
from edgecompile.pipeline import Context, Pass, PassResult

if TYPE_CHECKING:
    from edgecompile.torch_graph import TorchGraph

_SAMPLES = 64  # of the calibration data that X^T X is summed over


@dataclass(frozen=True)
class ShiftAdd(Pass):
    """Linear layers and 1x1 convolutions with weights of a few bits that are sums of powers of two.

    Attributes:
        attention: form that softmax attention takes: ``angular`` (linear in the tokens), ``hamming`` or empty: none.
        threshold: what queries and keys are compared with to become binary: ``fixed``, ``image`` or ``batch``.
        linear: code linear layers and 1x1 convolutions.
        dispatch: compute one expert of a mixture for each token; the runtime must take shapes that depend on data.
        code: ``pot`` (one power of two), ``sp2`` (two of them) or ``binary`` (signs times shifted scales).
        bits: of one weight; 0 to choose them per layer under ``size``.
        size: bytes of the coded weights, over their bytes in floating point; with ``bits=0``.
        group: inputs that share a scale within one output; 0 for all of them.
        skip: globs of node names, operators or module paths that stay as they are, separated by commas.
        output_share: from 0 to 1, how much the error of a layer's outputs counts in the choice of its scales, against
            that of its weights.
        min_snr: least signal-to-noise ratio of each output in dB; a result below it is rejected.
    """

    name: ClassVar[str] = "shift_add"
    exact: ClassVar[bool] = False
    attention: str = ""
    threshold: str = "fixed"
    linear: bool = True
    dispatch: bool = False
    code: str = "binary"
    bits: int = 4
    size: float = 0.125
    group: int = 256
    skip: str = ""
    output_share: float = 0.5
    min_snr: float = 0.0

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
        if self.group < 0 or math.isnan(self.min_snr):
            raise ValueError("group must not be negative, and min_snr must be a number")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place.

        Raises:
            InputError: the graph does not run on the calibration data, or there is none and attention is to change.
        """
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
        if self.attention:
            self._rewrite_attention(graph, feeds, context)
        if self.linear:
            self._code_layers(graph, feeds, context)
        if self.dispatch:
            graph.infer_shapes()
            for one in list(mixture.find(graph)):
                if not self._skipped(one.node) and context.rewrite("one expert for each token", one.node):
                    mixture.write(graph, one)
            graph.tidy()
        return context.result()

    def _rewrite_attention(self, graph: Graph, feeds: Sequence[Feeds], context: Context) -> None:
        if not feeds:
            raise InputError(
                "binary attention needs calibration data", "its thresholds and scales are means over it",
                "give images or arrays with --calib",
            )  # fmt: skip
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
            return
        if self.threshold == "batch":
            context.note("threshold=batch: what is computed for an image depends on its companions in the batch")
        for one, known in zip(found, attention.statistics(graph, found, feeds), strict=True):
            if context.rewrite(f"softmax attention -> {self.attention}, binary queries and keys", one.nodes[0]):
                attention.write(graph, one, self.attention, self.threshold, known)
        graph.tidy()
        graph.infer_shapes()

    def _code_layers(self, graph: Graph, feeds: Sequence[Feeds], context: Context) -> None:
        found = [layer for layer in layers.find(graph) if not self._skipped(layer.node)]
        if not found:
            context.note("no linear layer or 1x1 convolution with constant weights")
            return
        if not feeds:
            context.note("without calibration data the error of the weights is all that guides their codes")
        grams = layers.grams(graph, found, feeds) if feeds else {}
        before, after = 0, 0
        for layer, one in zip(found, self._coded(found, grams, context), strict=True):
            error, energy = layers.output_error(layer.weight, one.decode(), self._gram(layer, grams))
            snr = 10 * math.log10(energy / error) if energy and error else math.inf
            text = f"{layer.node.op} -> {one.kind} codes of {one.bits} bits, {snr:.1f} dB"
            if context.rewrite(text, layer.node):
                before, after = before + layer.weight.nbytes, after + one.bytes
                layers.write(graph, layer, one)
        graph.tidy()
        if before:
            context.note(f"{before:,} bytes of weights became {after:,} ({after / before:.3f})")

    def reject(self, errors: Mapping[str, OutputError], rounding: Mapping[str, float]) -> str:
        """Why the outputs are not acceptable: not finite, or below ``min_snr``."""
        for name, error in errors.items():
            if error.snr_db == -math.inf and error.max_abs == math.inf:
                return f"output {name!r} is not finite where it was"
            if error.snr_db < self.min_snr:
                return f"output {name!r} has {error.snr_db:.1f} dB, {self.min_snr:g} are asked for"
        return ""

    def _skipped(self, node: gs.Node) -> bool:
        globs = [s.strip() for s in self.skip.split(",") if s.strip()]
        names = [node.name, node.op, *provenance(node).modules]
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)

    def _gram(self, layer: layers.Layer, grams: Mapping[str, np.ndarray]) -> np.ndarray:
        found = grams.get(layer.source.name)
        return np.eye(layer.weight.shape[1]) if found is None else found

    def _coded(self, found: list[layers.Layer], grams: Mapping[str, np.ndarray], context: Context) -> list[codes.Coded]:
        """The codes of each layer."""

        def encode(layer: layers.Layer, bits: int) -> codes.Coded:
            gram = grams.get(layer.source.name)
            share = self.output_share
            return codes.encode(layer.weight, self.code, bits, group=self.group, gram=gram, output_share=share)

        known = [codes.exact(layer.weight) for layer in found]
        if self.bits:
            return [one or encode(layer, self.bits) for layer, one in zip(found, known, strict=True)]
        tried = [
            {one.bits: one} if one else {bits: encode(layer, bits) for bits in codes.WIDTHS[self.code]}
            for layer, one in zip(found, known, strict=True)
        ]
        choices = []
        for layer, widths in zip(found, tried, strict=True):
            row = {}
            for bits, one in widths.items():
                error, energy = layers.output_error(layer.weight, one.decode(), self._gram(layer, grams))
                row[bits] = (one.bytes, error / energy if energy else 0.0)
            choices.append(row)
        budget = self.size * sum(layer.weight.nbytes for layer in found)
        chosen = codes.allocate(choices, budget)
        used = sum(row[bits][0] for row, bits in zip(choices, chosen, strict=True))
        if used > budget:
            context.note(f"size={self.size:g} cannot be kept: the fewest bits take {used / budget * self.size:.3f}")
        return [widths[bits] for widths, bits in zip(tried, chosen, strict=True)]


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
