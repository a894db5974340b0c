"""Affine, translation-equivariant maps between channels-first tensors: one common form for linear layers.

**The form.** From an entry tensor ``x [C_in, *spatial]`` to an exit tensor ``y [C_out, *spatial]``, any number of
spatial axes (0: a matrix on the channels), per axis a stride ``s`` and an up-sampling factor ``u``::

    y[p] = sum_t K[t] x^[s p + o_t] + b,   p = 0 .. ceil((u n + grow) / s) - 1

``o_t`` are integer offsets (taps), ``K[t]`` a ``C_out x C_in`` matrix, ``n`` the extent of the entry, and ``x^`` is
``x`` with ``u - 1`` zeros between its elements and zeros outside: ``x^[u q] = x[q]``. A convolution has taps
``dilation * k - pad`` and ``u = 1``; a transposed one is ``y[u q + o] += K[o] x[q]``, so its taps are negated.
Padding at the front is where the taps start; padding at the end is ``grow``: how many more positions the exit has than
the entry. ``grow`` makes the exit extent a function of the entry's, which is what lets dynamic extents be handled.

**The theorem.** Maps of this form with the same entry, stride and extents are closed under addition (taps that
coincide add), and under composition: taps ``s_in o_out + u_out o_in``, matrices multiply, ``s = s_in s_out``,
``u = u_in u_out``, ``grow = u_out grow_in + s_in grow_out`` (unless the inner map skips where the outer one fills in).
So whatever lies between two points of a graph, if all of it has this form, is one convolution, but for the padding.

**The padding subtlety.** Composition is exact only if the formula of the inner map holds wherever the outer map reads.
Outside the intermediate tensor the outer map reads zero, but the formula gives the inner bias there, and values of the
entry's border if the inner taps reach back inside. So one of these must hold, and :func:`compose` proves it per axis,
tap and channel for the given extents, or for all extents, or refuses:

- the outer map never reads outside the intermediate tensor (no padding, or padding cropped again), or
- what it reads there is zero anyway: the channels read carry no bias, and their taps fall outside the entry.

The proof counts a contribution as an error even if another tap happened to cancel it.
For extents that are not known it suffices to look at ``s_in s_out`` consecutive large ones: once the extent exceeds
the reach of the taps, both borders repeat with that period, and a smaller extent errs only where a larger one does.

**Storage.** Per output channel the list of the input channels it reads, as in a grouped weight ``[C_out, C_in/g, k]``,
but with the channels written out. A depthwise kernel, a selection or a permutation of channels costs one slot per
channel, grouped and dense kernels what ONNX stores, and dilated kernels store no zeros. All arithmetic is float64;
:func:`round_to` rounds once, at the end.

Sources: Ding et al., *RepVGG*, CVPR 2021, section 3 (branches add, the identity is a kernel); Ding et al., *Diverse
Branch Block*, CVPR 2021, section 3 (sequences, average pooling, padding of the intermediate); Ding et al., *ACNet*,
ICCV 2019, section 3 (kernels of different windows add); Chen et al., *DEA-Net*, IEEE TIP 2024 (difference
convolutions); Ding et al., *RepLKNet*, CVPR 2022, section 3 (small kernels into large ones); Vaidyanathan, *Multirate
Systems and Filter Banks*, 1993, chapter 4 (stride and up-sampling through a filter); the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

# Elements of one kernel, 0.5 GiB as float64: a merge beyond it is refused before its memory is taken.
LIMIT = 1 << 26

_Sizes = Sequence[int | None]
_Ints = Sequence[int] | np.ndarray


class Refusal(Exception):
    """A map that does not exist in the form asked for; the text says why, for a note to the user."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``y[p] = sum_t K[t] x^[stride p + taps[t]] + bias`` of the module's theorem.

    Attributes:
        kernel: float64 [taps, C_out, slots]; ``kernel[t, c, j]`` multiplies channel ``inputs[c, j]``.
        inputs: int [C_out, slots], the entry channels each output reads, distinct per row; -1 marks an unused slot,
            whose kernel is zero.
        taps: int [taps, rank], the offsets in the up-sampled entry; distinct.
        bias: float64 [C_out].
        channels: C_in.
        stride, up, grow: one int per spatial axis; an entry of extent n gives ``ceil((up * n + grow) / stride)``.
    """

    kernel: np.ndarray
    inputs: np.ndarray
    taps: np.ndarray
    bias: np.ndarray
    channels: int
    stride: tuple[int, ...]
    up: tuple[int, ...]
    grow: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def outputs(self) -> int:
        """C_out."""
        return len(self.bias)

    def __add__(self, other: Affine) -> Affine:
        return add(self, other)

    def __str__(self) -> str:
        if not self.rank:
            return f"{self.outputs}x{self.channels} matrix"
        kind = "depthwise " if self.groups == self.channels > 1 else ""
        strided = "".join(f"stride-{s} " for s in sorted(set(self.stride)) if s > 1)
        transposed = "transposed " if max(self.up) > 1 else ""
        return f"{kind}{'x'.join(map(str, self._window[1]))} {strided}{transposed}convolution"

    def exit_size(self, entry: _Sizes) -> tuple[int | None, ...]:
        """Spatial extents of the exit; None where that of the entry is None."""
        laws = zip(entry, self.stride, self.up, self.grow, strict=True)
        return tuple(None if n is None else -((u * n + g) // -s) for n, s, u, g in laws)

    @property
    def is_pointwise(self) -> bool:
        """True if it acts on each position alone and keeps the extents: a matrix on the channels."""
        return not (self.taps.any() or any(self.grow)) and {*self.stride, *self.up} <= {1}

    @property
    def is_identity(self) -> bool:
        """True if it changes nothing."""
        if not self.is_pointwise or self.outputs != self.channels or self.bias.any():
            return False
        own = self.inputs == np.arange(self.outputs)[:, None]
        return bool(own.any(1).all() and (self.kernel[0] == own).all())

    @cached_property
    def groups(self) -> int:
        """The most groups a convolution that computes this map can have; ``channels`` if it is depthwise."""
        used = self._used
        low = np.where(used, self.inputs, self.channels).min(1, initial=self.channels)
        high = np.where(used, self.inputs, -1).max(1, initial=-1)
        for groups in _divisors(math.gcd(self.outputs, self.channels)):
            block, own = self.channels // groups, np.arange(self.outputs) // (self.outputs // groups)
            # A row that reads nothing fits any group: low and high are then outside all of them.
            if (((low >= own * block) & (high < (own + 1) * block)) | (high < 0)).all():
                return groups
        raise AssertionError("one group always fits")

    def macs(self, exit_positions: int) -> int:
        """Multiply-accumulates per sample as a Conv or ConvTranspose (rank 0: a dense matrix) at so many positions."""
        slots = self.channels // (self.groups if self.rank else 1)
        return exit_positions * self.outputs * slots * math.prod(self._window[1]) // math.prod(self.up)

    def as_conv(self, dtype: np.dtype | type = np.float64) -> Conv:
        """This map as an ONNX Conv, or ConvTranspose if it up-samples, with the most groups and widest dilation.

        Raises:
            Refusal: it up-samples and has a stride, has no spatial axis, or its values do not fit ``dtype``.
        """
        if not self.rank or (max(self.up) > 1 and max(self.stride) > 1):
            raise Refusal(f"a {self} is no Conv and no ConvTranspose")
        start, window, dilation = self._window
        last = start + (window - 1) * dilation
        attributes = {"kernel_shape": window, "dilations": dilation}
        if max(self.up) == 1:
            op = "Conv"
            attributes |= {"strides": self.stride, "pads": [*-start, *(self.grow + last)]}
        else:
            op = "ConvTranspose"
            crop = 1 - start - self.up - self.grow  # at the end: padding if positive, else output padding
            attributes |= {"strides": self.up, "pads": [*last, *np.maximum(crop, 0)]}
            attributes["output_padding"] = np.maximum(-crop, 0)
        _affordable(math.prod(window), self.outputs, self.channels // self.groups, LIMIT)
        lists = {name: [int(v) for v in values] for name, values in attributes.items()}
        weight, bias = round_to(self.weight(op, window, lists["pads"], dilation, self.groups), self.bias, dtype)
        return Conv(op, weight, bias, {**lists, "group": self.groups})

    def weight(
        self, op: str, window: _Ints, pads: _Ints | None = None, dilations: _Ints | None = None, group: int = 1
    ) -> np.ndarray:
        """The weight, in float64, with which a Conv or ConvTranspose of these attributes computes this map.

        The taps must lie in its window, and its groups must hold what the map reads.
        """
        begin = np.array(pads if pads is not None else [0] * 2 * self.rank, int)[: self.rank]
        cells = self.taps + begin if op == "Conv" else begin - self.taps
        weight = self._grouped(cells // (1 if dilations is None else np.array(dilations, int)), window, group)
        if op == "ConvTranspose":
            weight = weight.reshape(group, -1, *weight.shape[1:]).swapaxes(1, 2)
            weight = weight.reshape(self.channels, -1, *window)
        return weight

    def as_matrix(self, dtype: np.dtype | type = np.float64) -> tuple[np.ndarray, np.ndarray | None]:
        """Weight [C_out, C_in] and bias [C_out] (None if zero) of a pointwise map.

        Raises:
            Refusal: it is not pointwise, or its values do not fit ``dtype``.
        """
        if not self.is_pointwise:
            raise Refusal(f"a {self} is no matrix on the channels")
        return round_to(self._grouped(np.zeros((1, 0), int), (), 1), self.bias, dtype)

    @cached_property
    def _used(self) -> np.ndarray:
        """Bool [C_out, slots]: slots whose kernel is not zero."""
        return np.any(self.kernel, axis=0)

    @cached_property
    def _window(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First tap, extent and dilation per axis of the smallest window that holds all taps and is expressible.

        Pads must not be negative, and output padding must be less than the stride (ONNX Runtime is stricter here than
        the specification): zero taps make the window wide enough.
        """
        first, last = self.taps.min(0), self.taps.max(0)
        dilation = np.maximum(np.gcd.reduce(self.taps - first, axis=0), 1)
        grow, up = np.array(self.grow, int), np.array(self.up, int)
        if self.rank and max(self.up) > 1:
            highest, lowest = -grow, np.zeros_like(up)
        else:
            highest, lowest = np.zeros_like(up), -grow
        first = first + np.maximum(first - highest, 0) // -dilation * dilation
        last = last - np.maximum(lowest - last, 0) // -dilation * dilation
        return first, (last - first) // dilation + 1, dilation

    def _grouped(self, cells: np.ndarray, window: _Ints, groups: int) -> np.ndarray:
        """The weight [C_out, C_in/groups, *window] with tap t in the window's cell ``cells[t]``."""
        slots = self.channels // groups
        places = np.atleast_1d(np.ravel_multi_index(tuple(cells.T), tuple(window)) if len(window) else 0)
        if self.inputs.shape[1] == slots and (self.inputs == _group_inputs(self.outputs, slots, groups)).all():
            weight = np.zeros((self.outputs, slots, math.prod(window)))
            for t, place in enumerate(places):
                weight[..., place] = self.kernel[t]
        else:
            weight = np.zeros((math.prod(window), self.outputs, slots))
            row, slot = np.nonzero(self._used)
            column = self.inputs[row, slot] - row // (self.outputs // groups) * slots
            for t, place in enumerate(places):
                weight[place, row, column] = self.kernel[t, row, slot]
            weight = np.moveaxis(weight, 0, 2)
        return weight.reshape(self.outputs, slots, *window)


@dataclass(frozen=True, eq=False)
class Conv:
    """An ONNX Conv or ConvTranspose that computes a map.

    Attributes:
        op: "Conv" or "ConvTranspose".
        weight: [C_out, C_in/group, *kernel_shape]; of a ConvTranspose [C_in, C_out/group, *kernel_shape].
        bias: [C_out], or None if zero.
        attributes: the node's attributes by their ONNX names.
    """

    op: str
    weight: np.ndarray
    bias: np.ndarray | None
    attributes: dict[str, Any]


# -- constructors ----------------------------------------------------------------------------------------------------


def conv(
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
) -> Affine:
    """An ONNX Conv: ``weight`` [C_out, C_in/group, *window], ``pads`` all begins then all ends."""
    weight = np.asarray(weight, np.float64)
    outputs, slots, *window = weight.shape
    stride, begin, end, reach, taps = _geometry(window, strides, pads, dilations)
    kernel = np.moveaxis(weight.reshape(outputs, slots, -1), 2, 0)
    inputs = _group_inputs(outputs, slots, group)
    return _made(kernel, inputs, taps - begin, bias, slots * group, stride, np.ones_like(stride), begin + end - reach)


def conv_transpose(
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
) -> Affine:
    """An ONNX ConvTranspose: ``weight`` [C_in, C_out/group, *window], ``pads`` all begins then all ends."""
    weight = np.asarray(weight, np.float64)
    channels, per_group, *window = weight.shape
    up, begin, end, reach, taps = _geometry(window, strides, pads, dilations)
    grow = reach + 1 - up + (0 if output_padding is None else np.asarray(output_padding)) - begin - end
    slots = channels // group
    kernel = weight.reshape(group, slots, per_group, -1).transpose(3, 0, 2, 1).reshape(-1, group * per_group, slots)
    inputs = _group_inputs(group * per_group, slots, group)
    return _made(kernel, inputs, begin - taps, bias, channels, np.ones_like(up), up, grow)


def scale(s: np.ndarray, t: np.ndarray | None = None, rank: int = 0) -> Affine:
    """Per channel ``y = s x + t``, both [C]: a BatchNormalization in inference, Mul, Add, or a constant mask."""
    s = np.asarray(s, np.float64)
    inputs = np.where(s != 0, np.arange(len(s)), -1)[:, None]
    return _pointwise(s[:, None], inputs, t, len(s), rank)


def identity(channels: int, rank: int = 0) -> Affine:
    """The map ``y = x``."""
    return scale(np.ones(channels), None, rank)


def matrix(weight: np.ndarray, bias: np.ndarray | None = None, rank: int = 0) -> Affine:
    """The map ``y = weight x + bias`` on the channels, ``weight`` [C_out, C_in]; a 1x1 convolution if ``rank``."""
    outputs, channels = np.shape(weight)
    return _pointwise(np.asarray(weight, np.float64), _group_inputs(outputs, channels, 1), bias, channels, rank)


def select(indices: Sequence[int] | np.ndarray, channels: int, rank: int = 0) -> Affine:
    """The map ``y[i] = x[indices[i]]``: Split, Slice, Gather or permutation of the channels."""
    inputs = np.arange(channels)[np.asarray(indices, int)][:, None]
    return _pointwise(np.ones((len(inputs), 1)), inputs, None, channels, rank)


def permute(order: Sequence[int] | np.ndarray, rank: int = 0) -> Affine:
    """The map ``y[i] = x[order[i]]`` with each channel once: a channel shuffle."""
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"not a permutation: {list(order)}")
    return select(order, len(order), rank)


def embed(indices: Sequence[int] | np.ndarray, channels: int, rank: int = 0) -> Affine:
    """The map ``y[indices[i]] = x[i]`` into ``channels``, zero elsewhere: a Concat is a sum of such."""
    inputs = np.full((channels, 1), -1)
    inputs[np.asarray(indices, int), 0] = np.arange(len(indices))
    return _pointwise((inputs >= 0).astype(np.float64), inputs, None, len(indices), rank)


def pad(channels: int, begin: Sequence[int], end: Sequence[int]) -> Affine:
    """Zeros added at both ends of each spatial axis; negative: elements cropped."""
    ones = np.ones((channels, 1, *(1 for _ in begin)))
    return conv(ones, pads=[*begin, *end], group=channels)


def average_pool(
    channels: int,
    kernel: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    count_include_pad: bool = False,
) -> Affine:
    """An ONNX AveragePool with ``ceil_mode=0``; ``pads`` all begins then all ends.

    Raises:
        Refusal: the mean at the border counts fewer elements, so the map is not translation-equivariant.
    """
    if any(pads or ()) and not count_include_pad:
        raise Refusal("an average pool that leaves its padding out of the mean weighs the border differently")
    return conv(np.full((channels, 1, *kernel), 1 / math.prod(kernel)), None, strides, pads, None, channels)


# -- operations ------------------------------------------------------------------------------------------------------


def add(a: Affine, b: Affine, entry: _Sizes | None = None, limit: int = LIMIT) -> Affine:
    """The sum of two maps of the same entry tensor, of spatial extents ``entry`` (None: unknown).

    Raises:
        Refusal: the two differ in stride, up-sampling or (for extents unknown, possibly) exit extent, or the kernel
            would have more than ``limit`` elements.
        ValueError: channels or ranks differ.
    """
    if (a.channels, a.outputs, a.rank) != (b.channels, b.outputs, b.rank):
        raise ValueError(f"a sum of a {a} ({a.channels} to {a.outputs}) and a {b} ({b.channels} to {b.outputs})")
    if (a.stride, a.up) != (b.stride, b.up):
        raise Refusal(f"a {a} and a {b} in parallel differ in stride")
    entry = entry or [None] * a.rank
    extents = zip(entry, a.exit_size(entry), b.exit_size(entry), a.grow, b.grow, strict=True)
    if any(g != h and (n is None or one != two) for n, one, two, g, h in extents):
        raise Refusal(f"a {a} and a {b} in parallel differ in output size")
    taps, index = _distinct(np.concatenate((a.taps, b.taps)))
    if a.inputs.shape == b.inputs.shape and (a.inputs == b.inputs).all():
        inputs, slots = a.inputs, np.tile(np.arange(a.inputs.shape[1]), 2)[None]
    else:
        inputs, slots = _union(np.concatenate((a.inputs, b.inputs), axis=1))
    _affordable(len(taps), a.outputs, inputs.shape[1], limit)
    kernel = np.zeros((len(taps), len(inputs), inputs.shape[1] + 1))  # the last slot takes what -1 marks
    rows, tap, slot = np.arange(a.outputs)[:, None], index[:, None, None], slots
    split, width = len(a.taps), a.inputs.shape[1]
    kernel[tap[:split], rows, slot[:, :width]] += a.kernel
    kernel[tap[split:], rows, slot[:, width:]] += b.kernel
    return _made(kernel[..., :-1], inputs, taps, a.bias + b.bias, a.channels, a.stride, a.up, a.grow)


def compose(outer: Affine, inner: Affine, entry: _Sizes | None = None, limit: int = LIMIT) -> Affine:
    """The map ``outer(inner(x))`` where ``x`` has the spatial extents ``entry``, each an int or None (unknown).

    An unknown extent is proved for every size; with a known one the result holds for that size.

    Raises:
        Refusal: the padding of ``outer`` is not exact on what ``inner`` would give there, the inner stride meets an
            outer up-sampling, or the kernel would have more than ``limit`` elements.
        ValueError: channels or ranks differ.
    """
    entry = entry or [None] * inner.rank
    if (outer.channels, outer.rank, len(entry)) != (inner.outputs, inner.rank, inner.rank):
        raise ValueError(f"a {outer} of {outer.channels} channels after a {inner} to {inner.outputs}, on {entry}")
    if any(s > 1 and u > 1 for s, u in zip(inner.stride, outer.up, strict=True)):
        raise Refusal(f"a {outer} fills in what a {inner} before it skipped")
    _prove_padding(outer, inner, entry)
    return _product(outer, inner, limit)


def difference(a: Affine, b: Affine) -> float:
    """The largest absolute difference between the coefficients of two maps; inf if their geometry differs."""
    geometries = [(m.channels, m.outputs, m.stride, m.up, m.grow) for m in (a, b)]
    if geometries[0] != geometries[1]:
        return math.inf
    left = add(a, replace(b, kernel=-b.kernel, bias=-b.bias))
    return float(max(np.abs(left.kernel).max(initial=0), np.abs(left.bias).max(initial=0)))


def round_to(weight: np.ndarray, bias: np.ndarray, dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight and bias in float16, float32 or float64; the bias is None if it is zero.

    Raises:
        Refusal: a value overflows ``dtype``, or a whole channel of the weight sinks below its normal numbers.
    """
    if fate := misfit(weight, dtype) or misfit(bias, dtype, bias):
        raise Refusal(f"the merged weights would {fate} {'in ' * (fate == 'vanish')}{np.dtype(dtype)}")
    return weight.astype(dtype), bias.astype(dtype) if bias.any() else None


def misfit(values: np.ndarray, dtype: np.dtype | type, before: np.ndarray | None = None) -> str:
    """What rounding to a floating-point type does to a constant: ``"overflow"``, ``"vanish"``, or ``""`` if it fits.

    A channel, which is an index of the first two axes (of a vector: an element), vanishes if its largest value becomes
    subnormal, and was not so ``before``.
    """
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore"):
        if not np.isfinite(values.astype(dtype)).all():
            return "overflow"
    tiny = np.finfo(dtype).tiny

    def peak(array: np.ndarray, axis: int) -> np.ndarray:
        others = tuple(a for a in range(array.ndim) if a != axis)
        return np.maximum(array.max(others, initial=0), -array.min(others, initial=0))

    before = None if before is None else np.broadcast_to(before, values.shape)
    for axis in range(min(2, values.ndim)):
        sunk = (peak(values, axis) < tiny) & (peak(values, axis) > 0)
        if (sunk if before is None else sunk & (peak(before, axis) >= tiny)).any():
            return "vanish"
    return ""


# -- the padding proof -----------------------------------------------------------------------------------------------


def _prove_padding(outer: Affine, inner: Affine, entry: _Sizes) -> None:
    """Refuse if what ``outer`` reads outside the intermediate tensor is not zero under the formula of ``inner``."""
    outside = np.zeros(len(outer.taps), bool)
    leaks = np.zeros((len(outer.taps), len(inner.taps)), bool)
    for axis, extent in enumerate(entry):
        offsets, which = np.unique(outer.taps[:, axis], return_inverse=True)
        reaches, whence = np.unique(inner.taps[:, axis], return_inverse=True)
        for n in _extents(outer, inner, axis) if extent is None else [extent]:
            reads, sees = _reads_outside(outer, inner, axis, offsets, reaches, n)
            outside |= reads[which]
            leaks |= sees[which][:, whence]
    if not outside.any():
        return
    # Which channels of the intermediate each tap reads, and which it writes.
    read = np.zeros((len(outer.taps), outer.channels), np.float32)
    for mark, tap in zip(read, outer.kernel, strict=True):
        mark[outer.inputs[tap != 0]] = 1
    written = inner.kernel.any(2).astype(np.float32)
    if read[outside][:, inner.bias != 0].any():
        raise Refusal(f"bias cannot pass the zero padding of a {outer}")
    if (leaks & (read @ written.T > 0)).any():
        raise Refusal(f"border values of a padded {inner} cannot pass the padding of a {outer}")


def _reads_outside(
    outer: Affine, inner: Affine, axis: int, offsets: np.ndarray, reaches: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """On one axis: which outer taps read outside the intermediate [offsets]; which inner taps then see the entry.

    ``offsets`` are those of the outer taps in ascending order, ``reaches`` those of the inner ones; the second result
    is [offsets, reaches].
    """
    one, two = (np.array((m.stride, m.up, m.grow), int)[:, axis] for m in (inner, outer))
    middle = -((one[1] * n + one[2]) // -one[0])
    size = -((two[1] * middle + two[2]) // -two[0])
    if min(middle, size) <= 0:
        raise Refusal(f"a {outer} after a {inner} has an empty output for an input of extent {n}")
    origin = two[0] * np.arange(size)
    border = (origin + offsets[0] < 0) | (origin + offsets[-1] > two[1] * (middle - 1))
    at, phase = np.divmod(origin[border, None] + offsets, two[1])
    out = (phase == 0) & ((at < 0) | (at >= middle))
    seen = one[0] * at[:, :, None] + reaches
    inside = (seen >= 0) & (seen <= one[1] * (n - 1)) & (seen % one[1] == 0)
    return out.any(0), (inside & out[:, :, None]).any(0)


def _extents(outer: Affine, inner: Affine, axis: int) -> range:
    """Entry extents that stand for all: a period, beyond the reach of the taps (see the module's docstring)."""
    far = [int(np.abs(m.taps[:, axis]).max()) + abs(m.grow[axis]) for m in (outer, inner)]
    enough = 1 + inner.stride[axis] * far[0] + far[1]
    return range(enough, enough + inner.stride[axis] * outer.stride[axis])


# -- the product -----------------------------------------------------------------------------------------------------


def _product(outer: Affine, inner: Affine, limit: int = LIMIT) -> Affine:
    """The composition by the formula alone, padding not considered."""
    step, fill = np.array(inner.stride, int), np.array(outer.up, int)
    pairs = step * outer.taps[:, None] + fill * inner.taps
    taps, index = _distinct(pairs.reshape(pairs.shape[0] * pairs.shape[1], inner.rank))
    index = index.reshape(pairs.shape[:2])
    slots = min(outer.inputs.shape[1] * inner.inputs.shape[1], inner.channels)
    _affordable(len(taps), outer.outputs, slots, limit)
    products = (_scaled_product, _diagonal_product, _block_product)
    kernel, inputs = next(filter(None, (product(outer, inner, len(taps), index) for product in products)))
    bias = outer.bias + _bias_product(outer, inner)
    stride, up = step * np.array(outer.stride, int), fill * np.array(inner.up, int)
    grow = fill * np.array(inner.grow, int) + step * np.array(outer.grow, int)
    # Up-sampling by a factor that the stride takes back: only taps on the common lattice ever meet an element.
    common = np.gcd(stride, up)
    kept = (taps % common == 0).all(1)
    taps = taps[kept] // common
    return _made(kernel[kept], inputs, taps, bias, inner.channels, stride // common, up // common, -(grow // -common))


def _scaled_product(outer: Affine, inner: Affine, size: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Kernel and inputs if every outer output reads one channel: its factors times rows of the inner kernel."""
    if outer.inputs.shape[1] != 1:
        return None
    rows = outer.inputs[:, 0]
    factors, inputs = inner.kernel, inner.inputs
    if len(rows) != inner.outputs or (rows != np.arange(len(rows))).any():
        factors, inputs = factors[:, rows], np.where(rows[:, None] < 0, -1, inputs[rows])
    kernel = np.zeros((size, *inputs.shape))
    for matrix, places in zip(outer.kernel, index, strict=True):
        kernel[places] += matrix * factors
    return kernel, inputs


def _diagonal_product(
    outer: Affine, inner: Affine, size: int, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Kernel and inputs if every inner output reads one channel: a depthwise kernel is never made dense for this."""
    if inner.inputs.shape[1] != 1:
        return None
    inputs = np.where(outer.inputs < 0, -1, inner.inputs[outer.inputs, 0])
    ranked = np.sort(inputs, axis=1)
    if ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any():
        return None  # two slots read the same channel and have to be added up
    kernel = np.zeros((size, *inputs.shape))
    factors = inner.kernel[:, outer.inputs, 0]
    for matrix, places in zip(outer.kernel, index, strict=True):
        kernel[places] += matrix * factors
    return kernel, inputs


def _block_product(outer: Affine, inner: Affine, size: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and inputs by one matrix product per tap and block of output channels that read the same channels."""
    changes = np.flatnonzero((outer.inputs[1:] != outer.inputs[:-1]).any(1)) + 1
    height = math.gcd(outer.outputs, *(int(row) for row in changes))
    reads = outer.inputs[::height]  # [blocks, slots]
    blocks, slots = reads.shape
    width = min(slots * inner.inputs.shape[1], inner.channels)
    # A block needs its part of the inner kernel as a dense array; this many blocks at a time bound the memory.
    _affordable(len(inner.taps), slots, width, LIMIT)
    chunk = max(1, (1 << 22) // (len(inner.taps) * slots * width))
    parts = []
    for start in range(0, blocks, chunk):
        part = reads[start : start + chunk]
        sources = np.where(part[..., None] < 0, -1, inner.inputs[part])
        inputs, slot = _union(sources.reshape(len(part), -1))
        dense = np.zeros((len(inner.taps), *part.shape, inputs.shape[1] + 1))  # the last slot takes what -1 marks
        row, column = np.ogrid[: len(part), :slots]
        dense[:, row[..., None], column[..., None], slot.reshape(sources.shape)] = inner.kernel[:, part]
        kernel = np.zeros((size, len(part), height, inputs.shape[1]))
        for matrix, places in zip(outer.kernel.reshape(-1, blocks, height, slots), index, strict=True):
            kernel[places] += matrix[start : start + chunk] @ dense[..., :-1]
        parts.append((kernel.reshape(size, -1, inputs.shape[1]), np.repeat(inputs, height, axis=0)))
    most = max(inputs.shape[1] for _, inputs in parts)
    kernels = [np.pad(k, ((0, 0), (0, 0), (0, most - k.shape[2]))) for k, _ in parts]
    inputs = [np.pad(i, ((0, 0), (0, most - i.shape[1])), constant_values=-1) for _, i in parts]
    return np.concatenate(kernels, axis=1), np.concatenate(inputs)


def _bias_product(outer: Affine, inner: Affine) -> np.ndarray:
    """What the inner bias becomes; a sum per phase of the outer up-sampling, which must all agree."""
    passed = (outer.kernel * inner.bias[outer.inputs]).sum(2)
    phases = [(outer.taps % outer.up == phase).all(1) for phase in np.ndindex(*outer.up)]
    sums = np.stack([passed[phase].sum(0) for phase in phases])
    if (sums != sums[0]).any():
        raise Refusal(f"bias cannot pass a {outer}: its phases would see different sums")
    return sums[0]


# -- shared parts ----------------------------------------------------------------------------------------------------


def _made(
    kernel: np.ndarray,
    inputs: np.ndarray,
    taps: np.ndarray,
    bias: np.ndarray | None,
    channels: int,
    stride: _Ints,
    up: _Ints,
    grow: _Ints,
) -> Affine:
    """The map without its zero taps, its constants checked."""
    bias = np.zeros(kernel.shape[1]) if bias is None else np.asarray(bias, np.float64)
    if bias.shape != (kernel.shape[1],) or inputs.shape != kernel.shape[1:]:
        raise ValueError(f"a bias {bias.shape} and inputs {inputs.shape} for a kernel {kernel.shape}")
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        raise Refusal("its constants are not finite")
    kept = kernel.any((1, 2))
    if not kept.any():
        kernel, taps = np.zeros((1, *inputs.shape)), np.zeros((1, taps.shape[1]), int)
    elif not kept.all():
        kernel, taps = kernel[kept], taps[kept]
    stride, up, grow = (tuple(int(v) for v in values) for values in (stride, up, grow))
    return Affine(kernel, inputs, taps, bias, channels, stride, up, grow)


def _pointwise(weight: np.ndarray, inputs: np.ndarray, bias: np.ndarray | None, channels: int, rank: int) -> Affine:
    ones, zeros = (1,) * rank, (0,) * rank
    return _made(weight[None], inputs, np.zeros((1, rank), int), bias, channels, ones, ones, zeros)


def _geometry(
    window: Sequence[int], strides: Sequence[int] | None, pads: Sequence[int] | None, dilations: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Strides, begin and end pads, reach of the window (its extent - 1), and tap offsets from its start."""
    rank = len(window)
    step, dilation = (np.array(v if v is not None else [1] * rank, int) for v in (strides, dilations))
    begin, end = np.array(pads if pads is not None else [0] * 2 * rank, int).reshape(2, rank)
    cells = np.array(list(np.ndindex(*window)), int).reshape(math.prod(window), rank)
    return step, begin, end, (np.array(window, int) - 1) * dilation, cells * dilation


def _group_inputs(outputs: int, slots: int, group: int) -> np.ndarray:
    """The input channels [outputs, slots] of a grouped convolution; a dense one takes no memory for them."""
    if group == 1:
        return np.broadcast_to(np.arange(slots), (outputs, slots))
    if outputs % group:
        raise ValueError(f"{outputs} output channels in {group} groups")
    return np.arange(slots) + (np.arange(outputs) // (outputs // group) * slots)[:, None]


def _distinct(taps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of ``taps`` [n, rank], and for each row its place among them."""
    if len(taps) == 1:
        return taps, np.zeros(1, int)
    found, index = np.unique(taps, axis=0, return_inverse=True)
    return found, index.reshape(-1)


def _union(channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row of ``channels`` [rows, n] the distinct ones in order [rows, m >= 1], -1 at the end; and their places.

    The place of a -1 is m, one past the end.
    """
    none = np.iinfo(channels.dtype).max
    key = np.where(channels < 0, none, channels)
    if (key == key[:1]).all():  # as in a dense kernel: one row tells all
        key = key[:1]
    order = np.argsort(key, axis=1, kind="stable")
    ranked = np.take_along_axis(key, order, axis=1)
    place = np.cumsum(np.diff(ranked, axis=1, prepend=-1) != 0, axis=1) - 1
    size = int(place.max(where=ranked < none, initial=0)) + 1
    place = np.where(ranked < none, place, size)
    union = np.full((len(key), size + 1), -1)
    np.put_along_axis(union, place, np.where(ranked < none, ranked, -1), axis=1)
    places = np.empty_like(order)
    np.put_along_axis(places, order, place, axis=1)
    rows = len(channels)
    return np.broadcast_to(union[:, :size], (rows, size)), np.broadcast_to(places, (rows, order.shape[1]))


def _affordable(taps: int, outputs: int, slots: int, limit: int) -> None:
    """Refuse a kernel of more than ``limit`` elements."""
    if taps * outputs * slots > limit:
        raise Refusal(f"merging would take a kernel of {taps * outputs * slots:,} elements")


def _divisors(n: int) -> list[int]:
    """The divisors of n, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]
