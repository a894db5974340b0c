"""Products with coded weights and binary attention on a GPU.

What one instruction of a warp does is counted in slots: a multiprocessor of the architectures 8.6 to 9.0 starts 128
lanes of arithmetic in a cycle, but 32 of loads. Meanwhile memory delivers a byte in no less than seven slots, and a
cache in 2.7. Where few tokens use a float32 weight, it is thus waited for, for 28 slots, and a code of four bits for
3.5. With many tokens arithmetic is what takes long, and decoding adds to it, once for each tile of tokens. So codes are
for few tokens (:func:`cost`, :func:`cost_decoded`). The counts follow published figures; none of these kernels was
timed on hardware.

- :func:`few`: a lane has a row of the weights, so that a warp reads neighbouring words. A code is the number of a level
  in shared memory, where 16 levels lie in 16 banks, or, of binary codes, signs of scales in registers. Every eighth
  word of a row is a warp's, and the eight sums are added in shared memory.
- :func:`tile`: all tokens times 64 rows, 32 columns at a time, whose weights are decoded once into shared memory. A
  thread sums four rows of a quarter of the tokens in registers.
- :func:`binarised`: a warp makes bits of a row of queries or keys, 32 by one vote.
- :func:`counted`: scores count the bits that the words of a query and of a key have in common.
- :func:`gathered` and :func:`angular`: attention that is linear in the tokens. A bit says whether a row is added, and
  all lanes of a warp agree on it.

Sources: NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions" (throughput by architecture), "Shared Memory";
NVIDIA, data sheets of Jetson AGX Orin, Orin NX, Orin Nano and H200, and A100 Tensor Core GPU Architecture (cores,
clocks, bandwidths); NVIDIA, CUDA Math API (``__fdiv_rn``, ``__fsqrt_rn``); Park et al., LUT-GEMM, ICLR 2024; You et
al., ShiftAddViT, NeurIPS 2023, section 4.
"""

# TVMScript spells the shapes of buffers as calls in annotations.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile.targets.tvm.options import WARP
from edgecompile.targets.tvm.schedules.shift_add import BITS, Rows
from edgecompile.targets.tvm.schedules.tile import padded
from edgecompile.targets.tvm.schedules.views import unflatten

_OPAQUE = {"op_pattern": 8}  # of tvm::relax::OpPatternKind: nothing is fused into it
_WARPS = 8  # of a block
_ALL, _STEPS = 0xFFFFFFFF, 5  # lanes of a warp; halvings of it
_FEW, _MANY = _WARPS, 32  # most tokens of the two products; of the first, a warp adds up the parts of each
_STAGED = 16 << 10  # bytes of activations in shared memory
_ROWS, _SPAN, _DOWN, _ACROSS = 64, 32, 4, 16  # of a tile: rows, columns at a time; threads along tokens and rows
_OWN = _ROWS // _ACROSS  # rows of a thread of a tile
_TOKENS = 4  # of a warp of attention
_WIDEST = 8 * WARP  # columns of values that a warp of it holds


# -- weights as the kernels read them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """What is constant of coded weights.

    Groups of columns begin with a word. A word holds 16, 8 or 4 codes, those of three bits in four.

    Attributes:
        rows, columns: outputs and inputs.
        group: columns that share a scale, at most all.
        bits: of a code.
        binary: bit i of a code is the sign of scale i, instead of the number of a level.
    """

    rows: int
    columns: int
    group: int
    bits: int
    binary: bool

    @property
    def width(self) -> int:
        """Bits that a code takes."""
        return 4 if self.bits == 3 else self.bits

    @property
    def of_word(self) -> int:
        """Codes of a word."""
        return BITS // self.width

    @property
    def groups(self) -> int:
        """Of a row."""
        return -(-self.columns // self.group)

    @property
    def per(self) -> int:
        """Words of a group."""
        return -(-self.group // self.of_word)

    @property
    def deep(self) -> int:
        """Words of a row."""
        return self.groups * self.per

    @property
    def terms(self) -> int:
        """Scales of a group of a row."""
        return self.bits if self.binary else 1

    def words(self, codes: np.ndarray) -> np.ndarray:
        """Codes uint8 ``[rows, columns]`` as words, uint32 ``[deep, rows filled to 64]``; what is missing is code 0."""
        wide = np.zeros((padded(self.rows, _ROWS), self.groups, self.per * self.of_word), np.uint32)
        for g in range(self.groups):
            part = codes[:, g * self.group : (g + 1) * self.group]
            wide[: self.rows, g, : part.shape[1]] = part
        places = np.arange(self.of_word, dtype=np.uint32) * np.uint32(self.width)
        packed = np.bitwise_or.reduce(wide.reshape(len(wide), self.deep, self.of_word) << places, axis=2)
        return np.ascontiguousarray(packed.T)

    def scales(self, scales: np.ndarray) -> np.ndarray:
        """Scales float32 ``[rows, groups]`` or ``[bits, rows, groups]`` as ``[groups, terms, rows filled to 64]``."""
        made = np.zeros((self.groups, self.terms, padded(self.rows, _ROWS)), np.float32)
        made[:, :, : self.rows] = scales.reshape(self.terms, self.rows, self.groups).transpose(2, 0, 1)
        return made


def _place(codes: Codes) -> Callable[[Any, Any, Any], Any]:
    """Function from activations, a token and a column of the words to the activation there, 0 where there is none."""
    from tvm.script import tirx as T

    span = codes.per * codes.of_word

    def at(x: Any, token: Any, c: Any) -> Any:
        column, there = (c // span) * codes.group + c % span, T.And(token < x.shape[0], c < codes.groups * span)
        there = T.And(there, T.And(c % span < codes.group, column < codes.columns))
        value = x[T.min(token, x.shape[0] - 1), T.min(column, codes.columns - 1)]
        return T.if_then_else(there, value, T.float32(0))

    return at


def _decoding(codes: Codes) -> tuple[Callable[[Any, Any, Any, Any], Any], Callable[[Any], Any]]:
    """What decodes: a function from a word, the place of a code, the levels and the scales to a weight, and one from
    the scales to what a sum of such weights is to be multiplied by.
    """
    from tvm.script import tirx as T

    def bits(word: Any, j: Any, first: int, count: int) -> Any:
        place = T.Cast("uint32", j * codes.width + first)
        return T.bitwise_and(T.shift_right(word, place), T.uint32((1 << count) - 1))

    def level(word: Any, j: Any, levels: Any, _: Any) -> Any:
        return levels[T.Cast("int32", bits(word, j, 0, codes.width))]

    def signed(word: Any, j: Any, _: Any, scale: Any) -> Any:
        terms = [T.Select(bits(word, j, b, 1) != T.uint32(0), scale[b], -scale[b]) for b in range(codes.bits)]
        return sum(terms[1:], start=terms[0])

    return (signed, lambda _: T.float32(1)) if codes.binary else (level, lambda scale: scale[0])


# -- products ----------------------------------------------------------------------------------------------------------


def few(m: int, codes: Codes) -> Any:
    """``x [m, columns]`` times coded weights, ``[m, rows]``.

    Args:
        m: tokens, all of which a thread holds.
        codes: the weights.

    Returns:
        a function of x, :meth:`Codes.words`, :meth:`Codes.scales`, the levels of a book float32 ``[2^bits]`` (of binary
        codes anything float32 ``[2^bits]``), and the result.
    """
    from tvm.script import tirx as T

    blocks, threads = -(-codes.rows // WARP), _WARPS * WARP
    wide, of, deep, terms = padded(codes.rows, _ROWS), codes.of_word, codes.deep, codes.terms
    held = min(padded(deep * of, threads), _STAGED // (4 * m) // threads * threads)  # columns at a time
    stage, entries = held // of, 1 << codes.bits
    listed = 0 if codes.binary else entries
    at, (decoded, factor) = _place(codes), _decoding(codes)

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, codes.columns), "float32"),
        weights: T.Buffer((deep, wide), "uint32"),
        scales: T.Buffer((codes.groups, terms, wide), "float32"),
        levels: T.Buffer((entries,), "float32"),
        y: T.Buffer((m, codes.rows), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        book = T.sblock_alloc_buffer((entries,), "float32", scope="shared")
        given = T.sblock_alloc_buffer((m, held), "float32", scope="shared")
        partial = T.sblock_alloc_buffer((_WARPS, m, WARP), "float32", scope="shared")
        total = T.sblock_alloc_buffer((m,), "float32", scope="local")
        part = T.sblock_alloc_buffer((m,), "float32", scope="local")
        scale = T.sblock_alloc_buffer((terms,), "float32", scope="local")
        word = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        weight = T.sblock_alloc_buffer((1,), "float32", scope="local")
        for o in T.thread_binding(blocks, thread="blockIdx.x"):
            for s in T.thread_binding(_WARPS, thread="threadIdx.y"):
                for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                    thread, row = T.meta_var(s * WARP + lane), T.meta_var(o * WARP + lane)
                    if thread < listed:
                        book[thread] = levels[thread]
                    for i in T.unroll(m):
                        total[i] = T.float32(0)
                    for r in T.serial(-(-deep // stage)):
                        for i in T.unroll(m):
                            for e in T.serial(held // threads):
                                given[i, e * threads + thread] = at(x, i, r * held + e * threads + thread)
                        for t in T.serial(stage // _WARPS):
                            own = T.meta_var(t * _WARPS + s)
                            if r * stage + own < deep:
                                word[0] = weights[r * stage + own, row]
                                for b in T.unroll(terms):
                                    scale[b] = scales[(r * stage + own) // codes.per, b, row]
                                for i in T.unroll(m):
                                    part[i] = T.float32(0)
                                for j in T.unroll(of):
                                    weight[0] = decoded(word[0], j, book, scale)
                                    for i in T.unroll(m):
                                        part[i] += weight[0] * given[i, own * of + j]
                                for i in T.unroll(m):
                                    total[i] += part[i] * factor(scale)
                    for i in T.unroll(m):
                        partial[s, i, lane] = total[i]
                    if T.And(s < m, row < codes.rows):
                        total[0] = partial[0, s, lane]
                        for p in T.unroll(_WARPS - 1):
                            total[0] += partial[p + 1, s, lane]
                        y[s, row] = total[0]

    return kernel.with_attr(_OPAQUE)


def tile(m: int, codes: Codes) -> Any:
    """As :func:`few`, for more tokens, all of which a block holds."""
    from tvm.script import tirx as T

    blocks, threads, down = -(-codes.rows // _ROWS), _DOWN * _ACROSS, -(-m // _DOWN)
    wide, of, deep, terms = padded(codes.rows, _ROWS), codes.of_word, codes.deep, codes.terms
    entries, step = 1 << codes.bits, _SPAN // of
    listed = 0 if codes.binary else entries
    at, (decoded, factor) = _place(codes), _decoding(codes)

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, codes.columns), "float32"),
        weights: T.Buffer((deep, wide), "uint32"),
        scales: T.Buffer((codes.groups, terms, wide), "float32"),
        levels: T.Buffer((entries,), "float32"),
        y: T.Buffer((m, codes.rows), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        book = T.sblock_alloc_buffer((entries,), "float32", scope="shared")
        given = T.sblock_alloc_buffer((_DOWN * down, _SPAN), "float32", scope="shared")
        weight = T.sblock_alloc_buffer((_SPAN, _ROWS), "float32", scope="shared")
        total = T.sblock_alloc_buffer((down, _OWN), "float32", scope="local")
        scale = T.sblock_alloc_buffer((terms,), "float32", scope="local")
        word = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        for o in T.thread_binding(blocks, thread="blockIdx.x"):
            for s in T.thread_binding(_DOWN, thread="threadIdx.y"):
                for a in T.thread_binding(_ACROSS, thread="threadIdx.x"):
                    thread = T.meta_var(s * _ACROSS + a)
                    for e in T.serial(-(-listed // threads)):
                        if e * threads + thread < listed:
                            book[e * threads + thread] = levels[e * threads + thread]
                    for i in T.unroll(down):
                        for v in T.unroll(_OWN):
                            total[i, v] = T.float32(0)
                    for r in T.serial(-(-deep // step)):
                        for e in T.serial(_DOWN * down * _SPAN // threads):
                            token, c = T.meta_var((e * threads + thread) // _SPAN), T.meta_var(thread % _SPAN)
                            given[token, c] = at(x, token, r * _SPAN + c)
                        for e in T.unroll(step):
                            if r * step + e < deep:
                                word[0] = weights[r * step + e, o * _ROWS + thread]
                                for b in T.unroll(terms):
                                    scale[b] = scales[(r * step + e) // codes.per, b, o * _ROWS + thread]
                                for j in T.unroll(of):
                                    weight[e * of + j, thread] = decoded(word[0], j, book, scale) * factor(scale)
                            else:
                                for j in T.unroll(of):
                                    weight[e * of + j, thread] = T.float32(0)
                        for c in T.serial(_SPAN // 4):
                            for k in T.unroll(4):
                                for i in T.unroll(down):
                                    for v in T.unroll(_OWN):
                                        total[i, v] += given[s * down + i, c * 4 + k] * weight[c * 4 + k, a * _OWN + v]
                    for i in T.unroll(down):
                        for v in T.unroll(_OWN):
                            token, row = T.meta_var(s * down + i), T.meta_var(o * _ROWS + a * _OWN + v)
                            if T.And(token < m, row < codes.rows):
                                y[token, row] = total[i, v]

    return kernel.with_attr(_OPAQUE)


# -- which kernel ------------------------------------------------------------------------------------------------------

_LOAD = 4  # slots of a load or store of a lane: 32 lanes in a cycle, of 128
# Slots in which a byte arrives, by the size of what is read again and again: an A100's cache gives 5,120 bytes in a
# cycle to 108 multiprocessors; memory gives an H200 4.8 TB/s for 16,896 lanes of 1.98 GHz, the fewest slots (Orin NX:
# 102.4 GB/s for 1,024 lanes of 0.918 GHz, 9.2 slots). The cache of an Orin NX holds 2 MiB.
_STREAMED = ((2 << 20, 2.7), (1 << 62, 7.0))
_TILE = 32  # tokens of a tile of TVM's default schedule for a product, which computes all also where there are fewer


@dataclass(frozen=True)
class Kernel:
    """A product with coded weights.

    Attributes:
        name: of it.
        binary: whether it is for binary codes.
        tokens: most that it takes.
        make: the function, of tokens and codes.
        slots: arithmetic and loads for each weight, of tokens and codes.
    """

    name: str
    binary: bool
    tokens: int
    make: Callable[[int, Codes], Any]
    slots: Callable[[int, Codes], float]

    def fits(self, m: int, codes: Codes) -> bool:
        """Whether it can compute a layer of ``m`` tokens."""
        return m <= self.tokens and codes.binary == self.binary


def _code_slots(codes: Codes) -> float:
    """To decode a weight, with its share of the loads of a word and of scales."""
    once = 4 * codes.bits if codes.binary else 3 + _LOAD
    return once + _LOAD * (1 + codes.terms) / codes.of_word


def _few_slots(m: int, codes: Codes) -> float:
    """Four activations are loaded at once; the sum of a word is set to 0 and scaled."""
    return _code_slots(codes) + m * (1 + _LOAD / 4) + 2 * m / codes.of_word


def _thread_slots(down: int) -> float:
    """For each column of a thread with ``down`` tokens of a tile: four weights, each activation a quarter, sums."""
    return 2 * _LOAD + down * (_LOAD / 4 + _OWN)


def _tile_slots(m: int, codes: Codes) -> float:
    """A decoded weight is scaled and stored."""
    return _code_slots(codes) + 1 + _LOAD + _DOWN * _ACROSS / _ROWS * _thread_slots(-(-m // _DOWN))


KERNELS = (
    Kernel("book", False, _FEW, few, _few_slots),
    Kernel("binary", True, _FEW, few, _few_slots),
    Kernel("book_tile", False, _MANY, tile, _tile_slots),
    Kernel("binary_tile", True, _MANY, tile, _tile_slots),
)


def cost(kernel: Kernel, m: int, codes: Codes) -> float:
    """Slots for each weight of a layer of ``m`` tokens: computed or waited for, whichever is more."""
    words = codes.deep * codes.of_word / codes.columns  # places of a word for each weight
    return max(_waited(codes, words * codes.width / 8), words * kernel.slots(m, codes))


def cost_decoded(m: int, codes: Codes) -> float:
    """The same for float32 weights, by TVM's default schedules: a tile of 32 tokens by 64 rows, or one row alone."""
    tiles = -(-m // _TILE)
    product = tiles * (2 * _LOAD + 2 * _thread_slots(_OWN)) if m > 1 else 1 + _LOAD / 4
    return max(tiles * _waited(codes, 4), product)


def _waited(codes: Codes, size: float) -> float:
    """Slots in which ``size`` bytes for each weight arrive."""
    whole = codes.rows * codes.columns * size
    return size * next(slots for limit, slots in _STREAMED if whole <= limit)


# -- binary attention --------------------------------------------------------------------------------------------------


def binarised(lead: Sequence[int], tokens: int, inner: int, rows: Rows) -> Any:
    """Bits of rows: bit j of word w is 1 where column ``32 w + j`` of ``x / |x|`` exceeds a threshold.

    Args:
        lead: axes before the tokens, e.g. images and heads.
        tokens, inner: extents of x ``[*lead, tokens, inner]``.
        rows: of x in memory.

    Returns:
        a function of the memory of x in one axis, the thresholds ``[heads]``, both float32, and the result, uint32
        ``[heads, tokens, ceil(inner / 32)]``.
    """
    from tvm.script import tirx as T

    heads, words = math.prod(lead), -(-inner // BITS)
    every = heads * tokens

    def start(row: Any) -> Any:
        return rows.start([*unflatten(row // tokens, lead), row % tokens])

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((rows.size,), "float32"),
        threshold: T.Buffer((heads,), "float32"),
        y: T.Buffer((heads, tokens, words), "uint32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        value = T.sblock_alloc_buffer((words,), "float32", scope="local")
        square = T.sblock_alloc_buffer((1,), "float32", scope="local")
        bits = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        for o in T.thread_binding(-(-every // _WARPS), thread="blockIdx.x"):
            for s in T.thread_binding(_WARPS, thread="threadIdx.y"):
                for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                    # The last row again where there is none: all lanes of a warp are to vote.
                    row = T.meta_var(T.min(o * _WARPS + s, every - 1))
                    square[0] = T.float32(0)
                    for w in T.unroll(words):
                        value[w] = T.if_then_else(
                            w * BITS + lane < inner, x[start(row) + T.min(w * BITS + lane, inner - 1)], T.float32(0)
                        )
                        square[0] += value[w] * value[w]
                    for step in T.unroll(_STEPS):
                        square[0] += _from(square[0], step)
                    for w in T.unroll(words):
                        unit = T.meta_var(_exact("__fdiv_rn", value[w], _exact("__fsqrt_rn", square[0])))
                        above = T.meta_var(unit > threshold[row // tokens])
                        bits[0] = T.cuda.ballot_sync(
                            T.uint32(_ALL), T.Cast("int32", T.And(w * BITS + lane < inner, above))
                        )
                        if T.And(lane == 0, o * _WARPS + s < every):
                            y[row // tokens, row % tokens, w] = bits[0]

    return kernel.with_attr(_OPAQUE)


def counted(lead: Sequence[int], queries: int, keys: int, inner: int, biases: Sequence[int]) -> Any:
    """Scores of binary queries and keys, ``scale b(q) b(k)^T + bias``, head by head: their common ones are counted.

    Args:
        lead: axes before the tokens.
        queries, keys, inner: extents of q ``[*lead, queries, inner]`` and of k ``[*lead, keys, inner]``.
        biases: shape of the bias, which broadcasts against ``[*lead, queries, keys]``.

    Returns:
        a function of what :func:`binarised` makes of q and of k, the scale ``[1]``, the memory of the bias in one axis,
        and the result ``[heads, queries, keys]``; the latter three are float32.
    """
    from tvm.script import tirx as T

    heads, words, own = math.prod(lead), -(-inner // BITS), _TOKENS
    added = Rows.broadcast([*[1] * (len(lead) + 2 - len(biases)), *biases, 1])

    @T.prim_func(s_tir=True)
    def kernel(
        asked: T.Buffer((heads, queries, words), "uint32"),
        given: T.Buffer((heads, keys, words), "uint32"),
        scale: T.Buffer((1,), "float32"),
        bias: T.Buffer((added.size,), "float32"),
        y: T.Buffer((heads, queries, keys), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        word = T.sblock_alloc_buffer((words,), "uint32", scope="local")
        total = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        for h in T.thread_binding(heads, thread="blockIdx.x"):
            for o in T.thread_binding(-(-queries // (_WARPS * own)), thread="blockIdx.y"):
                for a in T.thread_binding(-(-keys // WARP), thread="blockIdx.z"):
                    for s in T.thread_binding(_WARPS, thread="threadIdx.y"):
                        for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                            key = T.meta_var(a * WARP + lane)
                            for w in T.unroll(words):
                                word[w] = given[h, T.min(key, keys - 1), w]
                            for i in T.unroll(own):
                                query = T.meta_var((o * _WARPS + s) * own + i)
                                if T.And(query < queries, key < keys):
                                    total[0] = T.uint32(0)
                                    for w in T.unroll(words):
                                        total[0] += T.popcount(T.bitwise_and(word[w], asked[h, query, w]))
                                    y[h, query, key] = (
                                        T.Cast("float32", total[0]) * scale[0]
                                        + bias[added.start([*unflatten(h, lead), query, key])]
                                    )

    return kernel.with_attr(_OPAQUE)


def angular_fits(outer: int) -> bool:
    """Whether :func:`angular` can compute ``outer`` columns."""
    return outer <= _WIDEST


def gathered(lead: Sequence[int], tokens: int, inner: int, outer: int, rows: Rows) -> Any:
    """``b(k)^T v``, head by head: row i is the sum of those rows of v whose key has bit i.

    Args:
        lead: axes before the tokens.
        tokens, inner, outer: extents of k ``[*lead, tokens, inner]`` and of v ``[*lead, tokens, outer]``.
        rows: of v in memory.

    Returns:
        a function of what :func:`binarised` makes of k, the memory of v in one axis, and the result
        ``[heads, 32 ceil(inner / 32), outer]``; the latter two are float32.
    """
    from tvm.script import tirx as T

    heads, words, each = math.prod(lead), -(-inner // BITS), BITS // _WARPS

    @T.prim_func(s_tir=True)
    def kernel(
        given: T.Buffer((heads, tokens, words), "uint32"),
        v: T.Buffer((rows.size,), "float32"),
        y: T.Buffer((heads, words * BITS, outer), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        partial = T.sblock_alloc_buffer((_WARPS, BITS, WARP), "float32", scope="shared")
        total = T.sblock_alloc_buffer((BITS,), "float32", scope="local")
        value = T.sblock_alloc_buffer((1,), "float32", scope="local")
        word = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        for h in T.thread_binding(heads, thread="blockIdx.x"):
            for w in T.thread_binding(words, thread="blockIdx.y"):
                for a in T.thread_binding(-(-outer // WARP), thread="blockIdx.z"):
                    for s in T.thread_binding(_WARPS, thread="threadIdx.y"):
                        for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                            column = T.meta_var(a * WARP + lane)
                            for i in T.unroll(BITS):
                                total[i] = T.float32(0)
                            for t in T.serial(-(-tokens // _WARPS)):
                                token = T.meta_var(t * _WARPS + s)
                                if token < tokens:
                                    word[0] = given[h, token, w]
                                    value[0] = v[rows.start([*unflatten(h, lead), token]) + T.min(column, outer - 1)]
                                    for i in T.unroll(BITS):
                                        if _bit(word[0], i):
                                            total[i] += value[0]
                            for i in T.unroll(BITS):
                                partial[s, i, lane] = total[i]
                            for i in T.unroll(each):
                                value[0] = partial[0, s * each + i, lane]
                                for p in T.unroll(_WARPS - 1):
                                    value[0] += partial[p + 1, s * each + i, lane]
                                if column < outer:
                                    y[h, w * BITS + s * each + i, column] = value[0]

    return kernel.with_attr(_OPAQUE)


def angular(lead: Sequence[int], tokens: int, inner: int, outer: int, rows: Rows) -> Any:
    """``v / 2 + (b(q) g) / pi`` over its length, token by token: a sum of the rows of g that the bits of q name.

    Args:
        lead, tokens, inner, outer, rows: as of :func:`gathered`; :func:`angular_fits` holds.

    Returns:
        a function of what :func:`binarised` makes of q, the result g of :func:`gathered`, the memory of v in one axis,
        and the result float32 ``[heads, tokens, outer]``.
    """
    from tvm.script import tirx as T

    heads, words, wide, own = math.prod(lead), -(-inner // BITS), -(-outer // WARP), _TOKENS

    @T.prim_func(s_tir=True)
    def kernel(
        asked: T.Buffer((heads, tokens, words), "uint32"),
        state: T.Buffer((heads, words * BITS, outer), "float32"),
        v: T.Buffer((rows.size,), "float32"),
        y: T.Buffer((heads, tokens, outer), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        near = T.sblock_alloc_buffer((own, wide), "float32", scope="local")
        value = T.sblock_alloc_buffer((wide,), "float32", scope="local")
        word = T.sblock_alloc_buffer((own,), "uint32", scope="local")
        square = T.sblock_alloc_buffer((1,), "float32", scope="local")
        for h in T.thread_binding(heads, thread="blockIdx.x"):
            for o in T.thread_binding(-(-tokens // (_WARPS * own)), thread="blockIdx.y"):
                for s in T.thread_binding(_WARPS, thread="threadIdx.y"):
                    for lane in T.thread_binding(WARP, thread="threadIdx.x"):
                        first = T.meta_var((o * _WARPS + s) * own)
                        for i in T.unroll(own):
                            for c in T.unroll(wide):
                                near[i, c] = T.float32(0)
                        for w in T.serial(words):
                            for i in T.unroll(own):
                                word[i] = asked[h, T.min(first + i, tokens - 1), w]
                            for k in T.serial(BITS):
                                for c in T.unroll(wide):
                                    value[c] = state[h, w * BITS + k, T.min(c * WARP + lane, outer - 1)]
                                    for i in T.unroll(own):
                                        if _bit(word[i], k):
                                            near[i, c] += value[c]
                        for i in T.unroll(own):
                            row = T.meta_var(rows.start([*unflatten(h, lead), T.min(first + i, tokens - 1)]))
                            square[0] = T.float32(0)
                            for c in T.unroll(wide):
                                near[i, c] = T.float32(0.5) * v[row + T.min(c * WARP + lane, outer - 1)] + near[
                                    i, c
                                ] * T.float32(0.31830987)
                                if c * WARP + lane < outer:
                                    square[0] += near[i, c] * near[i, c]
                            for step in T.unroll(_STEPS):
                                square[0] += _from(square[0], step)
                            for c in T.unroll(wide):
                                if T.And(first + i < tokens, c * WARP + lane < outer):
                                    y[h, first + i, c * WARP + lane] = near[i, c] / T.sqrt(square[0])

    return kernel.with_attr(_OPAQUE)


def _bit(word: Any, i: Any) -> Any:
    """Whether a bit of a word is set."""
    from tvm.script import tirx as T

    return T.bitwise_and(T.shift_right(word, T.Cast("uint32", i)), T.uint32(1)) != T.uint32(0)


def _exact(function: str, *values: Any) -> Any:
    """A function of CUDA that rounds correctly whatever the compiler is told; TVM tells it to compute fast."""
    from tvm.script import tirx as T

    return T.call_pure_extern("float32", function, *values)


def _from(value: Any, step: Any) -> Any:
    """The value of the lane that differs in one bit of its number: five steps add up a warp, in each lane."""
    from tvm.script import tirx as T

    return T.tvm_warp_shuffle_xor(T.uint32(_ALL), value, T.shift_right(WARP // 2, step), WARP, WARP)
