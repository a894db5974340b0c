"""Weights as sums of powers of two: how a matrix becomes a few bits a weight, and comes back.

A row of weights is cut into groups of columns. Each group of a row has ``2^b`` levels, and each weight is the number of
one of them, its code. Two kinds of levels, both free of multiplications:

- *A fixed book times a power of two.* Book ``pot`` is ``0`` and ``±2^-i``; book ``sp2`` is ``±(2^-i + 2^-j)`` with
  either term possibly 0. A group's scale ``2^e`` is that which leaves the least error.
- *Binary coding.* ``w ≈ a_1 s_1 + ... + a_b s_b`` with ``s_i`` in ``{-1, +1}``. Greedy start: ``s_i`` the sign of what
  is left, ``a_i`` its mean magnitude. Then in turn: with the signs held, the scales solve ``(S^T D S) a = S^T D w``;
  each scale is replaced by ``2^e ± 2^f``, the power of two nearest to it and that nearest to what is left; with the
  scales held, each weight takes the nearest of the ``2^b`` sums.

``D`` weighs the columns: 1 asks for the least error of the weights, the mean square of the layer's input for the least
error of its outputs if inputs were uncorrelated; a blend serves both.

*Error-aware columns.* With ``H = X^T X`` over calibration inputs X and ``U`` the upper Cholesky factor of ``H^-1``,
the columns are coded one after the other, and what coding column j did to the outputs is undone by the columns to come:
``W[:, k] -= (W[:, j] - Q[:, j]) U[j, k] / U[j, j]`` for k > j.

Sources: pot: Elhoushi et al., DeepShift, CVPR Workshops 2021. sp2: Chang et al., Mix and Match, HPCA 2021, section 3;
Li et al., Additive Powers-of-Two Quantization, ICLR 2020. Binary coding with shifted scales: You et al., ShiftAddLLM,
NeurIPS 2024, section 4; Xu et al., Alternating Multi-bit Quantization, ICLR 2018. Error-aware columns: Frantar et al.,
GPTQ, ICLR 2023.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

# Bits of one code, by kind. Two terms need 3 bits of magnitude to be more than one term; 8 bits of signs are no saving.
WIDTHS = {"pot": (2, 3, 4, 8), "sp2": (4, 8), "binary": (2, 3, 4)}
TERMS = 2  # powers of two in the scale of a binary code
_ROUNDS = 8  # of the alternating optimisation; it settles within these
_DAMPING = 0.01  # of the mean diagonal of H, added to its diagonal: inputs of few samples leave H singular
_EXPONENTS = range(-3, 2)  # scales tried about the one at which the largest weight meets the largest level
_LEAST, _MOST = -64, 63  # exponents of a term of a scale: seven bits of a byte, the eighth being the sign
Key = TypeVar("Key")


def book(kind: str, bits: int) -> np.ndarray:
    """The levels of a fixed book, float32 ``[2^bits]``, by code: the first half not negative, the second its negative.

    Raises:
        ValueError: there is no such book.
    """
    if kind == "binary" or bits not in WIDTHS.get(kind, ()):
        raise ValueError(f"no book {kind!r} of {bits} bits")
    half = 2 ** (bits - 1)
    if kind == "pot":
        magnitudes = [0.0, *(2.0**-i for i in range(half - 1))]
    else:
        # One term with the odd bit more than the other, as in the paper.
        long, short = 2 ** (bits // 2), 2 ** ((bits - 1) // 2)
        first = [0.0, *(2.0**-i for i in range(1, long))]
        second = [0.0, *(2.0**-i for i in range(1, short))]
        magnitudes = sorted(a + b for a in first for b in second)
    positive = np.sort(np.asarray(magnitudes, np.float32))
    return np.concatenate([positive, -positive])


@dataclass(frozen=True)
class Coded:
    """A matrix of coded weights.

    Attributes:
        kind: ``pot``, ``sp2`` or ``binary``.
        bits: of one code.
        codes: uint8 ``[rows, columns]``, each below ``2^bits``.
        exponents: int8. For a book ``[rows, groups]``, the scale being ``2^e``; for binary codes
            ``[bits, rows, groups, terms]``, each ``2 e``, plus 1 for a term that is subtracted, the scale being the sum
            of ``±2^e`` over the terms.
        group: columns of one group; the last group may be shorter.
    """

    kind: str
    bits: int
    codes: np.ndarray
    exponents: np.ndarray
    group: int

    @property
    def levels(self) -> np.ndarray:
        """What each code stands for, float32 ``[rows, groups, 2^bits]``."""
        if self.kind == "binary":
            return _sums(_scales(self.exponents))
        return np.ldexp(book(self.kind, self.bits), self.exponents[:, :, None].astype(np.int32))

    @property
    def bytes(self) -> int:
        """Size of what is stored: packed codes and scales."""
        rows, columns = self.codes.shape
        return self.bits * rows * -(-columns // 8) + self.exponents.nbytes

    def decode(self) -> np.ndarray:
        """The weights, float32 ``[rows, columns]``; exact, as every weight is a sum of a few powers of two."""
        group = np.arange(self.codes.shape[1]) // self.group
        return self.levels[np.arange(len(self.codes))[:, None], group[None, :], self.codes]


def encode(
    weight: np.ndarray,
    kind: str,
    bits: int,
    *,
    group: int = 0,
    gram: np.ndarray | None = None,
    output_share: float = 0.5,
) -> Coded:
    """Code a matrix.

    Args:
        weight: float ``[rows, columns]``: outputs by inputs.
        kind, bits: as ``WIDTHS`` pairs them.
        group: columns that share a scale within a row; 0 for all.
        gram: ``X^T X`` of the layer's inputs, ``[columns, columns]``; without it the error of the weights alone counts,
            and no column makes up for another.
        output_share: from 0 to 1, how much the error of the outputs counts in the choice of the scales.

    Raises:
        ValueError: an argument is out of range, or a weight is not finite.
    """
    if bits not in WIDTHS.get(kind, ()):
        raise ValueError(f"no {kind!r} code of {bits} bits")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a matrix is needed, not shape {list(weight.shape)}")
    if not np.isfinite(weight).all():
        raise ValueError("a weight is not finite")
    rows, columns = weight.shape
    group = min(group, columns) if group > 0 else columns
    rest = weight.astype(np.float64)
    importance, factor = np.ones(columns), None
    if gram is not None:
        if gram.shape != (columns, columns):
            raise ValueError(f"the Gram matrix is {list(gram.shape)} for {columns} columns")
        diagonal = np.diag(gram).astype(np.float64)
        mean = diagonal.mean()
        if mean > 0:
            importance = (1 - output_share) + output_share * diagonal / mean
            damped = gram.astype(np.float64) + _DAMPING * mean * np.eye(columns)
            factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    codes = np.empty((rows, columns), np.uint8)
    exponents = []
    for start in range(0, columns, group):
        part = slice(start, min(start + group, columns))
        if kind == "binary":
            powers = _binary_scales(rest[:, part], bits, importance[part])
            levels = _sums(_scales(powers[:, :, None]))[:, 0].astype(np.float64)
        else:
            powers = _book_scales(rest[:, part], book(kind, bits), importance[part])
            levels = np.ldexp(book(kind, bits).astype(np.float64), powers[:, None].astype(np.int32))
        exponents.append(powers)
        if factor is None:
            codes[:, part] = _nearest(rest[:, part], levels)
            continue
        for j in range(part.start, part.stop):
            codes[:, j] = _nearest(rest[:, j : j + 1], levels)[:, 0]
            error = rest[:, j] - levels[np.arange(rows), codes[:, j]]
            rest[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :] / factor[j, j])
    return Coded(kind, bits, codes, np.stack(exponents, 2 if kind == "binary" else 1), group)


def exact(weight: np.ndarray) -> Coded | None:
    """The codes of a matrix whose weights are powers of two or zero already, in the fewest bits; None for any other.

    This is what a layer trained with shifts has. The weights come back bit for bit.
    """
    fraction, exponent = np.frexp(np.abs(weight[weight != 0]))
    if not exponent.size or (fraction != 0.5).any():
        return None
    # The largest level of the book is 1.
    largest = np.where((weight != 0).any(1), np.frexp(np.abs(weight).max(1))[1] - 1, 0)
    for bits in WIDTHS["pot"]:
        levels = np.ldexp(book("pot", bits).astype(np.float64), largest[:, None])
        codes = _nearest(weight.astype(np.float64), levels)
        coded = Coded("pot", bits, codes, largest[:, None].astype(np.int8), weight.shape[1])
        if np.array_equal(coded.decode(), weight):
            return coded
    return None


def allocate(choices: Sequence[Mapping[Key, tuple[float, float]]], budget: float) -> list[Key]:
    """One choice for each layer, so that the costs sum to at most ``budget`` and the errors to about the least.

    Every layer starts at its cheapest choice; then the step that takes away most error for its cost is made, again and
    again, along the lower convex hull of each layer: the optimum for every budget that a sequence of such steps meets.

    Args:
        choices: for each layer, (cost, error) of each choice.
        budget: on the sum of the costs. If even the cheapest choices exceed it, they are what is returned.
    """
    hulls = [_hull(layer) for layer in choices]
    at = [0] * len(hulls)
    spent = sum(hull[0][1] for hull in hulls)

    def step(i: int) -> tuple[float, int] | None:
        if at[i] + 1 == len(hulls[i]):
            return None
        (_, cost, error), (_, more, less) = hulls[i][at[i]], hulls[i][at[i] + 1]
        return -(error - less) / (more - cost), i

    queue = [s for i in range(len(hulls)) if (s := step(i))]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        extra = hulls[i][at[i] + 1][1] - hulls[i][at[i]][1]
        if spent + extra > budget:
            continue
        spent += extra
        at[i] += 1
        if s := step(i):
            heapq.heappush(queue, s)
    return [hull[k][0] for hull, k in zip(hulls, at, strict=True)]


def _hull(layer: Mapping[Key, tuple[float, float]]) -> list[tuple[Key, float, float]]:
    """The choices on the lower convex hull, cheapest first."""
    hull: list[tuple[Key, float, float]] = []
    for key, (cost, error) in sorted(layer.items(), key=lambda item: item[1]):
        if hull and error >= hull[-1][2]:
            continue
        while len(hull) > 1:
            (_, c0, e0), (_, c1, e1) = hull[-2:]
            if (e0 - e1) * (cost - c1) > (e1 - error) * (c1 - c0):
                break
            hull.pop()
        hull.append((key, cost, error))
    return hull


# -- scales ------------------------------------------------------------------------------------------------------------


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Number of the level nearest to each value: values ``[rows, n]``, levels ``[rows, L]``."""
    order = np.argsort(levels, 1, kind="stable")
    ordered = np.take_along_axis(levels, order, 1)
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    place = np.zeros(values.shape, np.int64)
    for k in range(middles.shape[1]):
        place += values > middles[:, k : k + 1]
    return np.take_along_axis(order, place, 1).astype(np.uint8)


def _book_scales(values: np.ndarray, levels: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Exponent of the best scale of each row, int8 ``[rows]``."""
    largest = np.abs(values).max(1)
    middle = np.ceil(np.log2(np.where(largest > 0, largest, 1) / levels.max())).astype(np.int32)
    best, chosen = np.full(len(values), np.inf), middle.copy()
    for offset in _EXPONENTS:
        scaled = np.ldexp(levels.astype(np.float64)[None, :], (middle + offset)[:, None])
        found = np.take_along_axis(scaled, _nearest(values, scaled).astype(np.int64), 1)
        error = ((values - found) ** 2 * importance).sum(1)
        better = error < best
        best[better], chosen[better] = error[better], (middle + offset)[better]
    return np.clip(chosen, -127, 127).astype(np.int8)


def _binary_scales(values: np.ndarray, bits: int, importance: np.ndarray) -> np.ndarray:
    """Exponents and signs of the scales of each row, as :class:`Coded` has them: int8 ``[bits, rows, TERMS]``."""
    signs, rest = [], values.copy()
    for _ in range(bits):
        sign = np.where(rest >= 0, 1.0, -1.0)
        mean = (np.abs(rest) * importance).sum(1) / max(importance.sum(), 1e-300)
        signs.append(sign)
        rest -= mean[:, None] * sign
    s = np.stack(signs, 2)
    best, kept = np.full(len(values), np.inf), None
    for _ in range(_ROUNDS):
        weighed = s * importance[None, :, None]
        normal = np.einsum("rki,rkj->rij", weighed, s)
        # Two equal columns of signs make it singular; a small ridge then shares the scale between them.
        normal += 1e-9 * np.maximum(np.trace(normal, axis1=1, axis2=2), 1e-300)[:, None, None] * np.eye(bits)
        scale = np.linalg.solve(normal, np.einsum("rki,rk->ri", weighed, values)[:, :, None])[:, :, 0]
        powers = _powers(-np.sort(-np.abs(scale), 1))
        rounded = _scales(powers)
        levels = _sums(np.moveaxis(rounded, 1, 0)[:, :, None])[:, 0].astype(np.float64)
        code = _nearest(values, levels)
        error = ((values - np.take_along_axis(levels, code.astype(np.int64), 1)) ** 2 * importance).sum(1)
        better = error < best
        kept = powers.copy() if kept is None else kept
        kept[better] = powers[better]
        best = np.minimum(best, error)
        s = np.where((code[:, :, None] >> np.arange(bits)) & 1, 1.0, -1.0)
    assert kept is not None
    return np.moveaxis(kept, 1, 0)


def _powers(values: np.ndarray) -> np.ndarray:
    """``2^e ± 2^f`` nearest to values that are not negative, taken greedily: int8 ``[..., TERMS]``, see :class:`Coded`.

    What is a power of two already, ``2^e``, is ``2^(e + 1) - 2^e``, and 0 is ``2^e - 2^e``: no term is ever absent.
    """
    there = values > 2.0 ** (_LEAST + 1)
    safe = np.where(there, np.minimum(values, 2.0 ** (_MOST - 1)), 1.0)
    first = _nearest_power(safe)
    rest = safe - 2.0**first
    # Below this a term is lost in the float32 sum anyway.
    single = np.abs(rest) <= safe * 2.0**-20
    second = np.where(single, first, np.maximum(_nearest_power(np.where(single, 1.0, np.abs(rest))), _LEAST))
    minus = single | (rest < 0) | ~there
    first = first + single * there
    terms = np.stack([2 * first, 2 * second + minus], -1)
    return np.where(there[..., None], terms, [2 * _LEAST, 2 * _LEAST + 1]).astype(np.int8)


def _nearest_power(values: np.ndarray) -> np.ndarray:
    low = np.floor(np.log2(values))
    return low + (values > 1.5 * 2.0**low)


def _scales(exponents: np.ndarray) -> np.ndarray:
    """The scales of binary codes, float32: the sum of the terms along the last axis."""
    return np.ldexp(np.float32(1) - 2 * (exponents & 1), exponents.astype(np.int32) >> 1).sum(-1, dtype=np.float32)


def _sums(scales: np.ndarray) -> np.ndarray:
    """All sums of signed scales: ``[bits, rows, groups]`` gives ``[rows, groups, 2^bits]``; bit i set is a plus."""
    bits = len(scales)
    sign = np.where(np.arange(2**bits)[:, None] >> np.arange(bits) & 1, 1, -1).astype(np.float32)
    total = np.zeros((*scales.shape[1:], 2**bits), np.float32)
    for i in range(bits):
        total += scales[i][..., None] * sign[:, i]
    return total


# -- storage -----------------------------------------------------------------------------------------------------------


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as bit planes: uint8 ``[rows, columns]`` to uint8 ``[bits, rows, ceil(columns / 8)]``.

    Bit j of byte b of plane i is bit i of the code in column ``8 b + j``; columns beyond the last are 0.
    """
    planes = codes[None] >> np.arange(bits, dtype=np.uint8)[:, None, None] & 1
    return np.packbits(planes, axis=2, bitorder="little")


def unpack(planes: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of :func:`pack`."""
    bits = np.unpackbits(planes, axis=2, count=columns, bitorder="little")
    return (bits << np.arange(len(planes), dtype=np.uint8)[:, None, None]).sum(0, dtype=np.uint8)
