"""Ranges of activations, for int8: observed in one pass over the data, in memory that its amount does not change.

What is kept of a tensor is its smallest and largest value and a histogram of integer counts over bins whose width is a
power of two and whose edges are multiples of it. A value that lies outside doubles the width, which merges pairs of
bins exactly: the final histogram depends on the values alone, neither on their order nor on batches, and equal data
gives bit-identical ranges.

The graph is cut into segments that are run one after the other for each sample. The tensors asked for leave a segment,
are reduced, and are dropped before the next one runs; a sample is computed once, whatever the memory limit.

Ranges: entropy minimises the Kullback-Leibler divergence between the histogram and its quantised form (Migacz, "8-bit
Inference with TensorRT", GTC 2017), percentile cuts the tails, mse minimises the expected squared error of rounding and
clipping together (Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", ICCV workshops
2019).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import platformdirs

from edgecompile.calibration_data import CalibrationData
from edgecompile.errors import InputError, did_you_mean, missing_extra
from edgecompile.files import cannot_write, write_atomic
from edgecompile.graph import Graph
from edgecompile.oracle import Feeds

METHODS = ("minmax", "percentile", "entropy", "mse")
SCHEMA = "edgecompile.calibration/1"
MEMORY = 512 << 20
PERCENTILE = 99.99

_HALF = 2048  # bins of absolute values
_ZERO = _HALF - 1  # index of the bin of zero
_LOWEST_EXPONENT = -110  # below 2**-110 all is one bin, so that the inverse of a bin's width is a normal float32
_CHUNK = 1 << 15  # values that are counted at a time; the buffers stay in the second-level cache
_INLINE = 1024  # bytes of a weight from which on a session shares it
_SEGMENT = 48 << 20  # bytes of activations; larger segments only cost page faults
_STATE = 16 * (_ZERO + _HALF)  # bytes of the statistics of a tensor, and of a copy of them
_SEGMENT_WEIGHTS = 12 << 20  # while it makes a session, ONNX Runtime holds its weights twice
_SAVE_SECONDS = 60.0
_STEP = 8  # bins between thresholds that are tried for the entropy
_EMPTY = 1e-4  # counts at which an empty level stands where clipped values meet it, or they would weigh infinitely
_THRESHOLDS = 128  # tried for the squared error

# Operators that move or rename values and change none: what they give has the statistics of what they take.
_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

Progress = Callable[[int, "int | None"], None]


# -- what is kept of a tensor ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts over bins of equal width.

    Attributes:
        width: of a bin, a power of two, in the tensor's unit.
        counts: int64 [4095]; bin 2047 + i holds the values whose quotient by the width, cut towards zero, is i. So the
            bin of zero is twice as wide as the others, and the bins of both signs mirror each other.
    """

    width: float
    counts: np.ndarray

    def magnitudes(self) -> np.ndarray:
        """Counts of absolute values, int64 [2048]; bin i begins at ``i * width``."""
        found = self.counts[_ZERO:].copy()
        found[1:] += self.counts[:_ZERO][::-1]
        return found


@dataclass(frozen=True, eq=False)
class Statistics:
    """Everything that is known of a tensor over all samples.

    Attributes:
        low, high: smallest and largest value.
        count: how many values were seen.
        histogram: None where only the extremes were asked for.
        per_channel: (low, high) of each index of the axis asked for, else None.
    """

    low: float
    high: float
    count: int
    histogram: Histogram | None = None
    per_channel: tuple[tuple[float, float], ...] | None = None

    def range(self, method: str, *, symmetric: bool = False, bits: int = 8, percentile: float = PERCENTILE) -> Range:
        """The interval to quantise.

        Args:
            method: one of :data:`METHODS`.
            symmetric: search for one threshold of the absolute value, not for two ends.
            bits: of the integers; it matters for ``"entropy"`` and ``"mse"``.
            percentile: share of the values, in percent, that ``"percentile"`` keeps.

        Raises:
            InputError: the method is unknown, needs a histogram that was not taken, or an option is out of range.
        """
        _check_method(method, bits, percentile)
        low, high = self.low, self.high
        if method != "minmax":
            if self.histogram is None:
                raise InputError(f"{method} needs a histogram", "only extremes were observed")
            solver = {"percentile": _percentile, "entropy": _entropy, "mse": _mse}[method]
            below, above = solver(self.histogram, symmetric, percentile if method == "percentile" else bits)
            low, high = min(max(low, below), high), max(min(high, above), low)
        return Range(low, high, method, self.per_channel)


@dataclass(frozen=True)
class Range:
    """The interval of a tensor's values that its integers are to cover.

    Attributes:
        low, high: ends, in the tensor's unit; zero may lie outside.
        method: how they were chosen, of :data:`METHODS`.
        per_channel: smallest and largest value of each channel where an axis was asked for.
    """

    low: float
    high: float
    method: str
    per_channel: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Ranges(Mapping[str, Range]):
    """Ranges by tensor name.

    Attributes:
        ranges: in the order they were asked for.
        samples: how many samples were seen.
        random: True if they were random numbers.
    """

    ranges: Mapping[str, Range]
    samples: int
    random: bool = False

    def __getitem__(self, name: str) -> Range:
        return self.ranges[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)


class Observer:
    """The running statistics of one tensor.

    Args:
        histogram: count values, beyond their extremes.
        axis: also keep the extremes of each index of this axis.
    """

    def __init__(self, histogram: bool = True, axis: int | None = None):
        self.low, self.high, self.count, self.axis = math.inf, -math.inf, 0, axis
        self._counts = np.zeros(_ZERO + _HALF, np.int64) if histogram else None
        self._exponent = _LOWEST_EXPONENT
        self._channels: np.ndarray | None = None  # float64 [2, channels]

    def add(self, values: np.ndarray) -> None:
        """Take in the values of one sample.

        Raises:
            ValueError: a value is not finite; the statistics are worthless then.
        """
        if not values.size:
            return
        values = values.astype(np.float32, copy=False)
        flat = np.ascontiguousarray(values).reshape(-1)
        if self._counts is None:
            self._add_extremes(flat)
        else:
            self._add_counts(flat, self._counts)
        self.count += flat.size
        if self.axis is not None:
            self._add_channels(values, self.axis)

    def _add_extremes(self, values: np.ndarray) -> float:
        """The largest magnitude."""
        # Adding zero keeps one of the two zeros, else the order of values would show.
        low, high = float(np.minimum.reduce(values)) + 0.0, float(np.maximum.reduce(values)) + 0.0
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        return max(-low, high)

    def _add_counts(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Count by bin, a stretch at a time that stays in the cache.

        Scaling by a power of two is exact but for values that vanish beside the width, and these belong to the bin of
        zero.
        """
        size = min(values.size, _CHUNK)
        scaled, steps, index = np.empty(size, np.float32), np.empty(size, np.int32), np.empty(size, np.int64)
        for start in range(0, values.size, _CHUNK):
            chunk = values[start : start + _CHUNK]
            peak = self._add_extremes(chunk)
            if peak and math.frexp(peak)[1] > self._exponent:
                self._widen(counts, math.frexp(peak)[1])
            part, whole, place = scaled[: chunk.size], steps[: chunk.size], index[: chunk.size]
            np.multiply(chunk, np.float32(1 / _width(self._exponent)), out=part)
            np.copyto(whole, part, casting="unsafe")  # towards zero; to 32 bits, for which CPUs have instructions
            whole += _ZERO
            np.copyto(place, whole)
            counts += np.bincount(place, minlength=counts.size)

    def _add_channels(self, values: np.ndarray, axis: int) -> None:
        if not -values.ndim <= axis < values.ndim:
            raise InputError(f"there is no axis {axis}", f"the tensor has {values.ndim} axes")
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        found = np.stack([values.min(others), values.max(others)]).astype(np.float64) + 0.0
        known = found if self._channels is None else self._channels
        if known.shape != found.shape:
            raise InputError(
                f"axis {axis} has {found.shape[1]} channels in one sample and {known.shape[1]} in another",
                "each channel needs statistics of its own", "choose an axis of fixed extent",
            )  # fmt: skip
        self._channels = np.stack([np.minimum(known[0], found[0]), np.maximum(known[1], found[1])])

    def _widen(self, counts: np.ndarray, exponent: int) -> None:
        """Let the bins cover absolute values below ``2**exponent``, which is more than they do."""
        if 2 ** (exponent - self._exponent) >= _HALF:  # beside the new width all that was seen vanishes
            total = counts.sum()
            counts[:] = 0
            counts[_ZERO] = total
        else:
            for _ in range(exponent - self._exponent):
                old = counts.copy()
                counts[:] = 0
                counts[_ZERO] = old[_ZERO - 1 : _ZERO + 2].sum()
                counts[_ZERO + 1 :][: _ZERO // 2] = old[_ZERO + 2 :].reshape(-1, 2).sum(1)
                counts[:_ZERO][::-1][: _ZERO // 2] = old[: _ZERO - 1][::-1].reshape(-1, 2).sum(1)
        self._exponent = exponent

    def statistics(self) -> Statistics:
        """What was seen so far."""
        histogram = None if self._counts is None else Histogram(_width(self._exponent), self._counts.copy())
        channels = self._channels
        per_channel = None if channels is None else tuple((float(a), float(b)) for a, b in channels.T)
        return Statistics(self.low, self.high, self.count, histogram, per_channel)

    @classmethod
    def resumed(cls, known: Statistics, axis: int | None) -> Observer:
        """The observer that had seen what ``known`` tells."""
        observer = cls(known.histogram is not None, axis)
        observer.low, observer.high, observer.count = known.low, known.high, known.count
        if known.histogram is not None:
            observer._counts = known.histogram.counts.copy()
            observer._exponent = math.frexp(known.histogram.width * _HALF)[1] - 1
        if known.per_channel is not None:
            observer._channels = np.array(known.per_channel).T
        return observer


def _width(exponent: int) -> float:
    """Of a bin, where the bins cover absolute values below ``2**exponent``."""
    return math.ldexp(1.0, exponent) / _HALF


# -- range solvers -----------------------------------------------------------------------------------------------------
# Each takes a histogram and gives the two ends; the caller cuts them to the values that occurred.


def _check_method(method: str, bits: int, percentile: float) -> None:
    if method not in METHODS:
        raise InputError(f"there is no calibration method {method!r}", f"there are: {', '.join(METHODS)}")
    if not 2 <= bits <= 8:
        raise InputError(f"{bits} bits cannot be calibrated", "there are 2 to 8")
    if not 50 < percentile <= 100:
        raise InputError(f"percentile = {percentile} is out of range", "it must be above 50 and at most 100")


def _percentile(histogram: Histogram, symmetric: bool, percentile: float) -> tuple[float, float]:
    """Bin edges between which at least that share of the values lies; as much is cut at each end."""

    def kept(counts: np.ndarray, share: float) -> int:
        """The first bin that must be kept if at most ``share`` of the values may be cut before it."""
        cut = share * histogram.counts.sum() * (1 + 1e-9)  # 0.1 % of 1000 values is one value, whatever the rounding
        return int(np.searchsorted(np.cumsum(counts), cut, side="right"))

    cut = (100 - percentile) / 100
    if symmetric:
        bins = _HALF - kept(histogram.magnitudes()[::-1], cut)
        return -bins * histogram.width, bins * histogram.width
    first, last = kept(histogram.counts, cut / 2) - _ZERO, _ZERO - kept(histogram.counts[::-1], cut / 2)
    return (first - (first <= 0)) * histogram.width, (last + (last >= 0)) * histogram.width


def _entropy(histogram: Histogram, symmetric: bool, bits: int) -> tuple[float, float]:
    """Ends of least divergence; two ends are searched together, then each in turn."""
    if symmetric:
        counts = histogram.magnitudes().astype(np.float64)
        # Zero is represented exactly at any scale: the many zeros that ReLU leaves say nothing about the range.
        counts[0] = min(counts[0], counts[1])
        end = _end(counts)
        stops = _steps(2 ** (bits - 1), end)
        best = stops[_first_least(_Divergence(counts)(np.zeros_like(stops), stops, 2 ** (bits - 1)))]
        return -best * histogram.width, best * histogram.width
    counts, levels = histogram.counts.astype(np.float64), 2**bits
    counts[_ZERO] = min(counts[_ZERO], counts[_ZERO - 1] + counts[_ZERO + 1])
    start, stop = _ZERO - _end(counts[:_ZERO][::-1]), _ZERO + max(_end(counts[_ZERO:]), 1)
    divergence = _Divergence(counts)
    for side in ("both", "high", "low") if start < _ZERO and stop > _ZERO + 1 else ("both",):
        # A window holds zero and, where that is possible, a bin per level.
        below, above = _ZERO - start, stop - _ZERO
        least = levels - {"both": 0, "high": below, "low": above}[side]
        reach = _steps(least, {"both": max(below, above), "high": above, "low": below}[side])
        starts = _ZERO - (np.minimum(reach, below) if side != "high" else np.full_like(reach, below))
        stops = _ZERO + (np.minimum(reach, above) if side != "low" else np.full_like(reach, above))
        best = _first_least(divergence(starts, stops, levels))
        start, stop = int(starts[best]), int(stops[best])
    return (start - 1 - _ZERO) * histogram.width, (stop - _ZERO) * histogram.width


def _end(counts: np.ndarray) -> int:
    """One past the last bin that holds something."""
    occupied = np.flatnonzero(counts)
    return int(occupied[-1]) + 1 if occupied.size else 0


def _steps(least: int, most: int) -> np.ndarray:
    """Numbers of bins to try, the largest first; at least one."""
    return np.arange(most, max(min(least, most), 1) - 1, -_STEP) if most else np.ones(1, np.int64)


def _first_least(values: np.ndarray) -> int:
    """The first candidate, which is the widest, wins among equals."""
    return int(np.argmin(values))


class _Divergence:
    """Kullback-Leibler divergence of windows of a histogram from their quantised forms.

    The reference is the window with all that lies outside added to its outermost bins. Its quantised form spreads what
    each level holds of the window alone evenly over the occupied bins of the level. Every sum runs over a stretch of
    bins, so differences of cumulated sums give it without touching the bins of each window.

    Args:
        counts: float64 [bins].
    """

    def __init__(self, counts: np.ndarray):
        self._counts = counts
        self._mass, self._occupied, self._information = (
            np.concatenate([[0.0], np.cumsum(x)]) for x in (counts, counts > 0, _xlogx(counts))
        )

    def __call__(self, starts: np.ndarray, stops: np.ndarray, levels: int) -> np.ndarray:
        """The divergence of windows ``[start, stop)`` of bins that become ``levels``; float64 [windows]."""
        counts, mass, information, total = self._counts, self._mass, self._information, self._mass[-1]
        if not total:
            return np.zeros(len(starts))
        edges = starts[:, None] - (np.multiply.outer(starts - stops, np.arange(levels + 1)) // levels)
        bounds = mass.take(edges)
        inside = bounds[:, 1:] - bounds[:, :-1]
        bounds = self._occupied.take(edges)
        bins = bounds[:, 1:] - bounds[:, :-1]
        left, right = mass[starts], total - mass[stops]
        first, last = counts[starts], counts[stops - 1]
        bins[:, 0] += (left > 0) & (first == 0)
        bins[:, -1] += (right > 0) & (last == 0)
        own = information[stops] - information[starts]
        own += _xlogx(first + left) - _xlogx(first) + _xlogx(last + right) - _xlogx(last)
        kept = inside.sum(1)
        logs = np.maximum(inside, _EMPTY)
        np.maximum(bins, 1.0, out=bins)  # an empty level weighs nothing, unless clipped values meet it
        logs /= bins
        np.log(logs, out=logs)
        inside[:, 0] += left
        inside[:, -1] += right
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (own - np.einsum("ij,ij->i", inside, logs)) / total - math.log(total) + np.log(kept)
        # Where all lies in one level, nothing diverges: a window that clips more than it holds says nothing.
        return np.where(np.isnan(found) | (2 * kept < total), np.inf, found)


def _xlogx(values: np.ndarray) -> np.ndarray:
    return values * np.log(np.maximum(values, 1.0))


def _mse(histogram: Histogram, symmetric: bool, bits: int) -> tuple[float, float]:
    """Ends of least expected squared error, every value standing at the middle of its bin."""
    if symmetric:
        counts = histogram.magnitudes()
        places = np.flatnonzero(counts)
        values, weights = _middles(places) * histogram.width, counts[places]
        top = 2 ** (bits - 1) - 1
        ends = (places[-1] + 1) * histogram.width * np.arange(_THRESHOLDS, 0, -1) / _THRESHOLDS
        scales = (ends / top)[:, None]
        errors = (np.minimum(np.rint(values / scales), top) * scales - values) ** 2 @ weights
        end = float(ends[_first_least(errors)])
        return -end, end
    places = np.flatnonzero(histogram.counts) - _ZERO
    values, weights = _middles(places) * histogram.width, histogram.counts[places + _ZERO]
    low = (int(places[0]) - 1) * histogram.width if places[0] < 0 else 0.0
    high = (int(places[-1]) + 1) * histogram.width if places[-1] > 0 else 0.0
    if low == high:
        return -histogram.width, histogram.width
    shares, levels = np.arange(_THRESHOLDS, 0, -1) / _THRESHOLDS, 2**bits - 1
    for side in ("both", "high", "low") if low < 0 < high else ("both",):
        reach = max(-low, high) * shares
        lows = {"both": np.maximum(low, -reach), "low": low * shares}.get(side, np.full_like(shares, low))
        highs = {"both": np.minimum(high, reach), "high": high * shares}.get(side, np.full_like(shares, high))
        scales = np.maximum(highs - lows, histogram.width)[:, None] / levels
        zeros = np.rint(-lows[:, None] / scales)
        codes = np.clip(np.rint(values / scales) + zeros, 0, levels)
        best = _first_least(((codes - zeros) * scales - values) ** 2 @ weights)
        low, high = float(lows[best]), float(highs[best])
    return low, high


def _middles(places: np.ndarray) -> np.ndarray:
    """Middles of bins, in widths; their numbers count from that of zero."""
    return places + 0.5 * np.sign(places)


def scale_zero_point(
    interval: Range, dtype: Any = np.int8, symmetric: bool = True, *, bits: int | None = None, per_channel: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point with which integers cover a range, extended to hold zero.

    ``real = (integer - zero_point) * scale``, as in ONNX QuantizeLinear and DequantizeLinear.

    Args:
        interval: the range.
        dtype: ``int8``, ``uint8`` or another integer type.
        symmetric: the zero point is the middle of the integers (0, or 128 for uint8), and the largest magnitude is the
            largest integer above it; the lowest integer stays unused.
        bits: of the integers that are used, from the lowest of an unsigned type or around zero of a signed one; None:
            all of the type.
        per_channel: for each channel of ``interval.per_channel``.

    Returns:
        Scale, float32, and zero point, ``dtype``; of shape [] or [channels]. An empty or all-zero range has scale 1.

    Raises:
        InputError: the type is no integer, has fewer bits, or the range has no channels.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "iu":
        raise InputError(f"{dtype} is not an integer type")
    available = 8 * dtype.itemsize
    used = available if bits is None else bits
    if not 2 <= used <= available:
        raise InputError(f"{dtype} has no {bits} bits", f"it has {available}")
    if per_channel:
        if interval.per_channel is None:
            raise InputError("the range has no channels", fix="collect it with an axis")
        ends = np.asarray(interval.per_channel, np.float64).T
    else:
        ends = np.array([interval.low, interval.high], np.float64)
    low, high = np.minimum(ends[0], 0), np.maximum(ends[1], 0)
    lowest, highest = (0, 2**used - 1) if dtype.kind == "u" else (-(2 ** (used - 1)), 2 ** (used - 1) - 1)
    middle = (lowest + highest + 1) // 2
    scale = np.maximum(-low, high) / (highest - middle) if symmetric else (high - low) / (highest - lowest)
    scale = scale.astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    zero = np.full(scale.shape, middle) if symmetric else np.clip(np.rint(lowest - low / scale), lowest, highest)
    return scale, zero.astype(dtype)


# -- running the graph -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segment:
    """A stretch of the graph as a session.

    Attributes:
        session: of ONNX Runtime.
        reads: tensors it is fed.
        gives: tensors that leave it.
        dead: tensors that nobody reads after it.
    """

    session: Any
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    dead: tuple[str, ...]


class _Runner:
    """Compute tensors of a graph for one sample after the other, within a memory limit."""

    def __init__(self, graph: Graph, feeds: Feeds, tensors: Iterable[str], memory: int, threads: int):
        self.wanted = set(tensors)
        model, weights = _light(graph)
        self._weights = weights  # the sessions read them where they are
        nodes = list(model.graph.node)
        repeated = {o: n for n in nodes if n.op_type == "Constant" and not n.domain for o in n.output}
        nodes = _needed([n for n in nodes if not (n.op_type == "Constant" and not n.domain)], self.wanted)
        types = _types(model, feeds)
        known = {*feeds, *(o for n in nodes for o in n.output)}  # what else is read are weights and names in subgraphs
        reads = [tuple(dict.fromkeys(r for r in _reads(n) if r in known)) for n in nodes]
        fixed = 2 * graph.weight_bytes() + len(self.wanted) * _STATE + sum(v.nbytes for v in feeds.values())
        spare = memory - fixed
        self.segments = []
        loads = [sum(weights[r].nbytes for r in set(_reads(n)) if r in weights) for n in nodes]
        for start, stop in _cuts(nodes, reads, _sizes(nodes, types, feeds), types, loads, self.wanted, spare, memory):
            inside, made = nodes[start:stop], {o for n in nodes[start:stop] for o in n.output}
            later = {r for names in reads[stop:] for r in names}
            entering = tuple(dict.fromkeys(r for names in reads[start:stop] for r in names if r not in made))
            gives = tuple(o for n in inside for o in n.output if o and (o in self.wanted or o in later))
            dead = tuple(t for t in (*entering, *gives) if t not in later)
            used = {r for n in inside for r in _reads(n)}
            part = _part(model, inside, [n for o, n in repeated.items() if o in used], entering, gives, types)
            part.graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
            shared = {name: values for name, values in weights.items() if name in used}
            self.segments.append(_Segment(_session(part, shared, threads), entering, gives, dead))

    def run(self, label: str, feeds: Feeds, visit: Callable[[str, np.ndarray], None]) -> None:
        """Call ``visit`` with each tensor wanted, none of which outlives its segment."""
        alive = dict(feeds)
        for name in self.wanted & feeds.keys():
            visit(name, alive[name])
        for segment in self.segments:
            try:
                values = segment.session.run(segment.gives, {name: alive[name] for name in segment.reads})
            except Exception as error:  # ONNX Runtime raises a dozen types of its own
                raise InputError(f"the model does not run on {label}", " ".join(str(error).split())[:300]) from None
            for name, value in zip(segment.gives, values, strict=True):
                if name in self.wanted:
                    visit(name, value)
                alive[name] = value
            del values
            for name in segment.dead:
                del alive[name]


def _light(graph: Graph) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The model with its small initializers alone, the larger ones standing among its inputs, and these by name."""
    model, weights = graph.to_probe()
    arrays = graph.constants()
    for tensor in model.graph.initializer:
        values = arrays.get(tensor.name)
        if values is not None and values.nbytes >= _INLINE and values.dtype.kind in "fiu":
            weights[tensor.name] = values
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.input.append(info)
    small = [t for t in model.graph.initializer if t.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(small)
    light = onnx.ModelProto()
    light.CopyFrom(model)  # a message gives no memory back before all of it goes
    return light, {name: np.ascontiguousarray(values) for name, values in weights.items()}


def _session(model: onnx.ModelProto, weights: Mapping[str, np.ndarray], threads: int) -> Any:
    """A session with all optimisations: what is an output keeps its value whatever they fuse.

    It reads the weights where they are; they must live as long as it does.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise missing_extra("calibration needs ONNX Runtime", "onnxruntime", "cpu") from None
    for name, values in weights.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = model.graph.initializer.add(name=name, data_type=dtype, dims=values.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "memory"), ("offset", "0"), ("length", str(values.nbytes))):
            tensor.external_data.add(key=key, value=value)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # it would hold on to the peak of every segment
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_external_initializers(list(weights), [ort.OrtValue.ortvalue_from_numpy(v) for v in weights.values()])
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError("ONNX Runtime cannot load the model", " ".join(str(error).split())[:300]) from None


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every name a node or a subgraph of it reads."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else [])):
            yield from (o.name for o in graph.output)
            for inner in graph.node:
                yield from _reads(inner)


def _needed(nodes: Sequence[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes without which the tensors cannot be computed, in the same order."""
    names, kept = set(wanted), []
    for node in reversed(nodes):
        if names.intersection(node.output):
            kept.append(node)
            names.update(_reads(node))
    return kept[::-1]


def _types(model: onnx.ModelProto, feeds: Feeds) -> dict[str, onnx.ValueInfoProto]:
    """Element type and shape of what is computed for these feeds, where inference finds them."""
    declared = {v.name: v for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]
    for port in sized.graph.input:
        if port.name in feeds:
            port.CopyFrom(onnx.helper.make_tensor_value_info(
                port.name, port.type.tensor_type.elem_type, feeds[port.name].shape
            ))  # fmt: skip
    for port in sized.graph.output:
        port.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    except Exception:  # an operator of which ONNX knows nothing; then what the file says must do
        return declared
    return declared | {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}


def _sizes(nodes: Iterable[onnx.NodeProto], types: Mapping[str, onnx.ValueInfoProto], feeds: Feeds) -> dict[str, int]:
    """Bytes of each tensor; one of unknown shape counts as much as the largest known."""
    found: dict[str, int | None] = {name: value.nbytes for name, value in feeds.items()}
    for name in (o for n in nodes for o in n.output):
        found[name], info = None, types.get(name)
        if info is not None and info.type.tensor_type.elem_type and info.type.tensor_type.HasField("shape"):
            dims = [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
            if None not in dims and info.type.tensor_type.elem_type != onnx.TensorProto.STRING:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
                found[name] = math.prod(d or 0 for d in dims) * dtype.itemsize
    largest = max((s for s in found.values() if s is not None), default=0)
    return {name: largest if size is None else size for name, size in found.items()}


def _cuts(
    nodes: Sequence[onnx.NodeProto],
    reads: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    types: Mapping[str, onnx.ValueInfoProto],
    loads: Sequence[int],
    wanted: set[str],
    spare: int,
    memory: int,
) -> list[tuple[int, int]]:
    """Stretches of nodes, none of which holds more than ``spare`` bytes of activations at a time.

    Raises:
        InputError: one node alone holds more.
    """
    last = {name: i for i, names in enumerate(reads) for name in names}
    computed = {o for n in nodes for o in n.output}
    alive = {name: sizes[name] for name in last if name not in computed}
    made: set[str] = set()
    cuts, start = [], 0
    for index, node in enumerate(nodes):
        new = {o: sizes[o] for o in node.output if o and (o in last or o in wanted)}
        ours = sum(new.values()) + sum(size for name, size in alive.items() if name in made)
        loaded = sum(loads[start : index + 1])
        held = sum(alive.values()) + sum(new.values())
        if index > start and (ours > _SEGMENT or loaded > _SEGMENT_WEIGHTS or held > spare):
            crossing = [name for name in alive if last.get(name, -1) >= index]
            if all(n in types and types[n].type.tensor_type.elem_type for n in crossing):
                cuts.append((start, index))
                start, made = index, set()
                alive = {name: alive[name] for name in crossing}
        alive |= new
        made |= new.keys()
        held = sum(alive.values())
        if held > spare:
            raise InputError(
                f"{memory >> 20} MiB are too little to calibrate this model",
                f"{node.name or node.op_type} needs {(memory - spare + held + (1 << 20) - 1) >> 20} MiB",
                "give more memory, or smaller inputs",
            )
        for name in reads[index]:
            if last[name] == index and name in made and name not in wanted:
                del alive[name]
    return [*cuts, (start, len(nodes))] if nodes else []


def _part(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    constants: Iterable[onnx.NodeProto],
    reads: Iterable[str],
    gives: Iterable[str],
    types: Mapping[str, onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A model of some nodes, without its weights."""
    part = onnx.ModelProto(ir_version=max(model.ir_version, 4))  # before, initializers had to be inputs
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name or "part"
    part.graph.node.extend([*constants, *nodes])
    for name in reads:
        info = part.graph.input.add(name=name)
        info.type.tensor_type.elem_type = types[name].type.tensor_type.elem_type
    for name in gives:
        info = part.graph.output.add(name=name)
        if name in types and types[name].type.tensor_type.elem_type:
            info.type.tensor_type.elem_type = types[name].type.tensor_type.elem_type
    return part


# -- collecting --------------------------------------------------------------------------------------------------------


def collect(
    graph: Graph,
    data: CalibrationData | Iterable[Feeds],
    tensors: Sequence[str],
    method: str = "entropy",
    *,
    symmetric: bool = False,
    bits: int = 8,
    percentile: float = PERCENTILE,
    axes: Mapping[str, int] | None = None,
    memory: int = MEMORY,
    threads: int = 1,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Ranges:
    """Ranges of activations over calibration data; :func:`observe`, then :meth:`Statistics.range` for each.

    Args:
        graph, data, tensors, axes, memory, threads, progress, cache: see :func:`observe`.
        method, symmetric, bits, percentile: see :meth:`Statistics.range`.

    Raises:
        InputError: as these two.
    """
    _check_method(method, bits, percentile)
    seen = observe(
        graph, data, tensors, histograms=method != "minmax", axes=axes, memory=memory, threads=threads,
        progress=progress, cache=cache,
    )  # fmt: skip
    options: dict[str, Any] = {"symmetric": symmetric, "bits": bits, "percentile": percentile}
    solved = {id(one): one.range(method, **options) for one in {id(s): s for s in seen.statistics.values()}.values()}
    ranges = {name: solved[id(one)] for name, one in seen.statistics.items()}
    return Ranges(ranges, seen.samples, getattr(data, "random", False))


@dataclass(frozen=True, eq=False)
class Observed:
    """Statistics by tensor name.

    Attributes:
        statistics: in the order they were asked for.
        samples: over how many samples.
    """

    statistics: Mapping[str, Statistics]
    samples: int


def observe(
    graph: Graph,
    data: CalibrationData | Iterable[Feeds],
    tensors: Sequence[str],
    *,
    histograms: bool = True,
    axes: Mapping[str, int] | None = None,
    memory: int = MEMORY,
    threads: int = 1,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Observed:
    """Run the graph once over all samples and keep the statistics of some tensors.

    Args:
        graph: the graph; it is not changed.
        data: the samples. Only :class:`CalibrationData` splits batches, names what is wrong, and can be cached.
        tensors: names of floating-point tensors that nodes compute or the model is fed.
        histograms: also count values; every method but ``"minmax"`` needs it.
        axes: axis by tensor, for the extremes of each channel.
        memory: bytes for activations, statistics and two copies of the weights; Python and the libraries, some 100 MB,
            come on top, and so do buffers inside operators.
        threads: of ONNX Runtime.
        progress: called after each sample with the number done and the number in all, None where it is unknown.
        cache: folder that keeps statistics, and unfinished ones every minute; see :func:`cache_folder`.

    Raises:
        InputError: a tensor does not exist or is no floating-point activation, is empty or not finite on a sample; the
            data is unfit or empty; the graph does not run; or the memory does not suffice for one node.
        EnvironmentMissing: ONNX Runtime is not installed.
    """
    wanted = _resolve(graph, tensors, axes or {})
    entry = None
    if cache is not None and isinstance(data, CalibrationData):
        entry = _Entry(cache, graph.digest(), data.digest)
    keys = {(source, axis): _Key(source, axis, histograms) for source, axis in wanted.values()}
    known = entry.find(keys.values()) if entry else {}
    missing = {k: v for k, v in keys.items() if v not in known}
    if missing:
        found, samples = _stream(graph, data, list(missing.values()), memory, threads, progress, entry)
        known |= found
    else:
        assert entry is not None
        samples = entry.samples
    for (source, _), key in keys.items():
        if not known[key].count:
            raise InputError(f"the tensor {source!r} is empty on every sample", "it has no range")
    return Observed({name: known[keys[place]] for name, place in wanted.items()}, samples)


@dataclass(frozen=True)
class _Key:
    """What is observed of a tensor."""

    tensor: str
    axis: int | None
    histogram: bool


def _resolve(graph: Graph, tensors: Sequence[str], axes: Mapping[str, int]) -> dict[str, tuple[str, int | None]]:
    """For each tensor the one that is observed in its place, and the axis."""
    inputs = {t.name for t in graph.inputs}
    producers = {t.name: n for n in graph.nodes for t in n.outputs}
    constants = {n for n, t in graph.tensors().items() if graph.constant(t) is not None}
    found = {}
    for name in dict.fromkeys([*tensors, *axes]):
        if name in constants:
            raise InputError(f"the tensor {name!r} is a weight", "its range is known without calibration")
        if name not in producers and name not in inputs:
            raise InputError(f"the graph has no tensor {name!r}", did_you_mean(name, [*producers, *inputs]))
        source = name
        while name not in axes and source in producers:
            node = producers[source]
            if node.op not in _MOVES or node.domain or node.inputs[0].name in constants:
                break
            source = node.inputs[0].name
        found[name] = (source, axes.get(name))
    return found


def _stream(
    graph: Graph,
    data: CalibrationData | Iterable[Feeds],
    keys: Sequence[_Key],
    memory: int,
    threads: int,
    progress: Progress | None,
    entry: _Entry | None,
) -> tuple[dict[_Key, Statistics], int]:
    """The statistics over all samples, and how many there were."""
    observers = {key: Observer(key.histogram, key.axis) for key in keys}
    done = 0
    if entry:
        done, partial = entry.unfinished(keys)
        observers |= {key: Observer.resumed(known, key.axis) for key, known in partial.items()}
    by_name: dict[str, list[Observer]] = {}
    for key, observer in observers.items():
        by_name.setdefault(key.tensor, []).append(observer)
    if isinstance(data, CalibrationData):
        samples, total = data.samples(), data.count
    else:
        samples, total = ((f"sample {i}", feeds) for i, feeds in enumerate(data)), None
    label = ""

    def visit(name: str, values: np.ndarray) -> None:
        if values.dtype.kind != "f":
            raise InputError(f"the tensor {name!r} is {values.dtype}", "only floating-point tensors have a range")
        try:
            for observer in by_name[name]:
                observer.add(values)
        except ValueError:
            raise InputError(
                f"the tensor {name!r} is not finite on {label}", "a value overflows or is undefined there",
                "leave that sample out, check [preprocess], or keep the tensor in float",
            ) from None  # fmt: skip

    runner, number, saved = None, 0, time.monotonic()

    for number, (label, feeds) in enumerate(samples, 1):
        if number > done:
            if runner is None:
                runner = _Runner(graph, feeds, by_name, memory, threads)
            runner.run(label, feeds, visit)
        if progress:
            progress(number, total)
        if entry and number > done and time.monotonic() - saved > _SAVE_SECONDS:
            entry.save_unfinished(number, {key: o.statistics() for key, o in observers.items()})
            saved = time.monotonic()
    if not number:
        raise InputError("there is no calibration data", fix="give at least one sample")
    found = {key: observer.statistics() for key, observer in observers.items()}
    if entry:
        entry.save(number, found)
    return found, number


# -- cache -------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where statistics are kept unless the caller names a folder."""
    return Path(os.environ.get("EDGECOMPILE_CACHE") or platformdirs.user_cache_dir("edgecompile")) / "calibration"


class _Entry:
    """The file that holds statistics of one graph over one set of data.

    Args:
        folder: made where it does not exist.
        graph, data: their digests.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, graph: str, data: str):
        runtime = importlib.metadata.version("onnxruntime") if importlib.util.find_spec("onnxruntime") else ""
        self._facts = {"graph": graph, "data": data, "onnxruntime": runtime, "numpy": np.__version__}
        self._path = entry_path(folder, SCHEMA, self._facts)
        self._content: dict[str, Any] = read_entry(self._path, self._facts) or {
            "schema": SCHEMA, "facts": self._facts, "samples": 0, "statistics": [], "unfinished": None,
        }  # fmt: skip

    @property
    def samples(self) -> int:
        """Over how many samples the finished statistics are."""
        return self._content["samples"]

    def find(self, keys: Iterable[_Key]) -> dict[_Key, Statistics]:
        """The finished statistics that hold what is asked for."""
        known = {(one["tensor"], one["axis"]): _decode(one) for one in self._content["statistics"]}
        found = {key: known[key.tensor, key.axis] for key in keys if (key.tensor, key.axis) in known}
        return {key: one for key, one in found.items() if one.histogram is not None or not key.histogram}

    def unfinished(self, keys: Sequence[_Key]) -> tuple[int, dict[_Key, Statistics]]:
        """Over how many samples these were observed before it was interrupted, and what was found."""
        kept = self._content["unfinished"]
        if kept is None:
            return 0, {}
        found = {}
        for one in kept["statistics"]:
            statistics = _decode(one)
            found[_Key(one["tensor"], one["axis"], statistics.histogram is not None)] = statistics
        return (kept["samples"], found) if found.keys() == set(keys) else (0, {})

    def save(self, samples: int, found: Mapping[_Key, Statistics]) -> None:
        """Add finished statistics."""
        new = {(key.tensor, key.axis) for key in found}
        kept = [one for one in self._content["statistics"] if (one["tensor"], one["axis"]) not in new]
        kept += [_encode(key, one) for key, one in found.items()]
        self._write(samples=samples, statistics=kept, unfinished=None)

    def save_unfinished(self, samples: int, found: Mapping[_Key, Statistics]) -> None:
        """Keep what was found over the first ``samples`` samples."""
        self._write(unfinished={"samples": samples, "statistics": [_encode(k, one) for k, one in found.items()]})

    def _write(self, **changes: Any) -> None:
        self._content |= changes
        write_entry(self._path, self._content)


def entry_path(folder: Path, schema: str, facts: Mapping[str, str]) -> Path:
    """Where an entry about these facts is kept.

    Raises:
        InputError: the folder does not exist and cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder / f"{_digest([schema, facts])}.json"


def write_entry(path: Path, content: Mapping[str, Any]) -> None:
    """Write an entry with the digest of its content; a full disk is passed over, since it must not cost the result."""
    with contextlib.suppress(InputError):
        write_atomic(path, [json.dumps({**content, "sha256": _digest(content)}).encode()])


def read_entry(path: Path, facts: Mapping[str, str]) -> dict[str, Any] | None:
    """The content of an entry; None if it is missing, damaged, or about something else."""
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256")
        return content if digest == _digest(content) and content["facts"] == facts else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _encode(key: _Key, one: Statistics) -> dict[str, Any]:
    """The JSON form; of a histogram the stretch that holds something."""
    found: dict[str, Any] = {"tensor": key.tensor, "axis": key.axis, "count": one.count, "per_channel": one.per_channel}
    if one.count:
        found |= {"low": one.low, "high": one.high}
    if one.histogram is not None:
        occupied = np.flatnonzero(one.histogram.counts)
        first, last = (int(occupied[0]), int(occupied[-1])) if occupied.size else (0, -1)
        counts = one.histogram.counts[first : last + 1].tolist()
        found["histogram"] = {"width": one.histogram.width, "first": first, "counts": counts}
    return found


def _decode(one: Mapping[str, Any]) -> Statistics:
    histogram, kept = None, one.get("histogram")
    if kept is not None:
        counts = np.zeros(_ZERO + _HALF, np.int64)
        counts[kept["first"] : kept["first"] + len(kept["counts"])] = kept["counts"]
        histogram = Histogram(kept["width"], counts)
    channels = one["per_channel"]
    per_channel = None if channels is None else tuple((low, high) for low, high in channels)
    return Statistics(one.get("low", math.inf), one.get("high", -math.inf), one["count"], histogram, per_channel)
