"""Products of activations with weights of a few bits that are never written out in full, and binary attention.

Rows of the weights (outputs) lie in the lanes of a vector, so that one word of 32 bits holds eight codes of one row,
and a word is all that is loaded for eight weights of each lane.

- *Book, float activations* (:func:`book`). A register holds the book, and ``level = book[code]`` is one permutation on
  AVX-512; on AVX2, whose permutation has eight places, the highest bit of a code is its sign. The result is that of
  float32 weights, up to the order of the sum.
- *Any code, float activations, NEON* (:func:`tabled`), which permutes bytes, not floats: each byte of a level is looked
  up in a table of its own, for 16 columns of a row at once, and the bytes are interleaved to floats. The tables hold
  the levels of one group of one row times its scale. Of a book those are a few bits times a power of two, whose lower
  two bytes are 0; of binary codes they need all four.
- *Binary codes, float activations* (:func:`binary`). ``sum_k s_k x_k`` over four columns has 16 possible values, which
  are computed once and shared by all rows; four signs of a row are the number of one of them. Nothing is multiplied but
  the sum of a group, by its scale.
- *Book, integer activations* (:func:`book_int8`). Levels are whole numbers up to 64 times a power of two, looked up by
  bytes. Operands of the dot instruction are the activations ``x`` in [-127, 127] and, where it wants them unsigned, the
  levels raised by 64: ``sum w x = sum (w + 64) x - 64 sum x``. VPMADDUBSW adds two products in 16 bits and saturates;
  here ``2 * 128 * 127 = 32512 < 2^15``, so it never does.
- *Angular attention* (:func:`angular`) is linear in the tokens. Of every four rows that may be added, the 16 possible
  sums are formed once and looked up.
- *Binary softmax attention* (:func:`hamming`): its scores count the bits that two words have in common.
- *Narrow weights, integer activations* (:func:`narrow`), where the machine has no instruction that adds four products.
  With ``|w| <= 8`` and ``|x| <= 63``, ``w + 8`` lies in [0, 16], one VPMADDUBSW gives at most ``2 * 16 * 63 = 2016`` in
  magnitude, and 16 of them at most ``32256 < 2^15``: they are added in 16 bits, and widened after every 32 columns.
  NEON has no such kernel: where there is SDOT that is faster, and where there is not, SMLAL adds one product in a lane
  of 16 bits, where VPMADDUBSW adds two: at most twice as many as a float multiply-add in lanes of 32 bits.

Integer activations are those of :func:`quantised`: per token, symmetric, ``s = max|x| / q``, ``round(x / s)``.

Sources: Park et al., LUT-GEMM, ICLR 2024, section 3; You et al., ShiftAddLLM, NeurIPS 2024, section 4; You et al.,
ShiftAddViT, NeurIPS 2023, section 4; Arlazarov et al., "On economical construction of the transitive closure of a
directed graph", Soviet Math. Doklady 1970 (sums of four rows); Intel 64 and IA-32 Architectures Software Developer's
Manual, VPERMPS, PSHUFB, PMADDUBSW, VPDPBUSD; Arm Architecture Reference Manual, TBL and SDOT.
"""

# TVMScript spells the shapes of buffers as calls in annotations.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules.tile import Vectors, padded
from edgecompile.targets.tvm.schedules.views import View, flatten, unflatten

WORD = 8  # codes of a word
QUAD = 4  # signs that choose one of 16 sums
BITS = 32  # of a word of signs
LARGEST = 64  # magnitude of a level as a whole number
NARROW = 8  # magnitude of a narrow weight
FINE, COARSE = 127, 63  # the largest magnitude of an activation, for the two integer kernels
_AHEAD = 32 << 10  # bytes between what is read and what is asked for: one page boundary at least lies between
_STEPS16 = 16  # results of VPMADDUBSW that add in 16 bits
_OPAQUE = {"op_pattern": 8}  # of tvm::relax::OpPatternKind: nothing is fused into it


@dataclass(frozen=True)
class Lookup:
    """A permutation of float32 lanes.

    Attributes:
        feature: of the CPU, as Linux names it.
        intrinsic: LLVM's name: ``(table, number)``, of ``lanes`` each.
        lanes: float32 values of a vector.
        registers: vectors of results at a time.
    """

    feature: str
    intrinsic: str
    lanes: int
    registers: int


LOOKUPS = (
    Lookup("avx512f", "llvm.x86.avx512.permvar.sf.512", 16, 16),
    Lookup("avx2", "llvm.x86.avx2.permps", 8, 8),
)


@dataclass(frozen=True)
class Bytes:
    """A permutation of bytes, and a dot instruction that adds four products of bytes in 32 bits.

    Attributes:
        feature: of the CPU, as Linux names it.
        lanes: 32-bit results of a vector.
        permute: LLVM's name of the permutation, and its operands: ``table`` first or last is the same for all.
        dot: LLVM's name of the instruction.
        offset: what is added to levels to make them unsigned.
    """

    feature: str
    lanes: int
    permute: str
    dot: str
    offset: int


BYTES = (
    Bytes("avx512_vnni", 16, "llvm.x86.avx512.pshuf.b.512", "llvm.x86.avx512.vpdpbusd.512", LARGEST),
    Bytes("avx_vnni", 8, "llvm.x86.avx2.pshuf.b", "llvm.x86.avx512.vpdpbusd.256", LARGEST),
    Bytes("avx2", 8, "llvm.x86.avx2.pshuf.b", "llvm.x86.avx2.pmadd.ub.sw", LARGEST),
    Bytes("asimddp", 4, "llvm.aarch64.neon.tbl1.v16i8", "llvm.aarch64.neon.sdot.v4i32.v16i8", 0),
)


TABLES = "asimd"  # the feature, as Linux names it, of what :func:`tabled` needs
_TABLE_LOOKUP = "llvm.aarch64.neon.tbl1.v16i8"
_BYTES, _BLOCK = 16, 32  # bytes of its operands, and columns whose codes fill one


def lookup(device: str) -> Lookup | None:
    """The permutation of floats that a device has, which :func:`edgecompile.targets.tvm.options.device` describes."""
    features = device.split()
    return next((found for found in LOOKUPS if found.feature in features), None)


def byte_lookup(device: str) -> Bytes | None:
    """The instructions on bytes that a device has."""
    features = device.split()
    return next((found for found in BYTES if found.feature in features), None)


# -- weights as the kernels read them ----------------------------------------------------------------------------------


def words(codes: np.ndarray, lanes: int, blocks: int, order: tuple[int, ...] = tuple(range(WORD))) -> np.ndarray:
    """Codes of four bits, ``[rows, columns]``, as int32 ``[rows / (blocks lanes), columns / 8, blocks, lanes]``.

    Args:
        codes: uint8, below 16; missing rows and columns become code 0.
        lanes, blocks: of a vector, and vectors side by side.
        order: which of eight columns each nibble of a word holds, from the lowest.
    """
    rows, columns = codes.shape
    wide = np.zeros((padded(rows, lanes * blocks), padded(columns, WORD)), np.uint32)
    wide[:rows, :columns] = codes
    packed = np.zeros((wide.shape[0], wide.shape[1] // WORD), np.uint32)
    for nibble, column in enumerate(order):
        packed |= wide[:, column::WORD] << np.uint32(4 * nibble)
    return by_lane(packed.view(np.int32), lanes, blocks)


def by_lane(values: np.ndarray, lanes: int, blocks: int) -> np.ndarray:
    """``[rows, n]`` as ``[rows / (blocks lanes), n, blocks, lanes]``, filled with zeros."""
    rows, n = values.shape
    wide = np.zeros((padded(rows, lanes * blocks), n), values.dtype)
    wide[:rows] = values
    return np.ascontiguousarray(wide.reshape(-1, blocks, lanes, n).transpose(0, 3, 1, 2))


def quads(plane: np.ndarray, how: Lookup) -> np.ndarray:
    """Signs of a plane, 0 or 1 ``[rows, columns]``, as numbers of sums, uint8 ``[rows, columns / 4]``.

    With eight places a number is that of a sum whose fourth sign is a plus, and the highest bit negates it.
    """
    rows, columns = plane.shape
    wide = np.zeros((rows, padded(columns, QUAD)), np.uint8)
    wide[:, :columns] = plane
    number = sum(wide[:, i::QUAD] << i for i in range(QUAD))
    if how.lanes == 16:
        return np.asarray(number, np.uint8)
    return np.where(number & 8, number & 7, ~number & 7 | 8).astype(np.uint8)


def signs(how: Lookup) -> np.ndarray:
    """The sign of each of four activations in each entry of the table of sums, float32 ``[4, lanes]``."""
    number = np.arange(16)[-how.lanes :]
    return np.where(number[None] >> np.arange(QUAD)[:, None] & 1, 1, -1).astype(np.float32)


def table(levels: np.ndarray, how: Lookup) -> np.ndarray | None:
    """A book as a register holds it, float32 ``[lanes]``, or None where it does not fit: ``levels`` has 16 entries."""
    if how.lanes == 16:
        return levels
    return levels[:8] if np.array_equal(levels[8:], -levels[:8]) else None


def whole(levels: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Levels as whole numbers times ``2^exponent``: int8 and the exponent, or None if one exceeds :data:`LARGEST`."""
    mantissa, exponent = np.frexp(levels[levels != 0].astype(np.float64))
    if not mantissa.size:
        return levels.astype(np.int8), 0
    # The last bit of each level: a mantissa of 24 bits, less the zeros at its end.
    bits = np.abs(mantissa * 2**24).astype(np.int64)
    last = int(np.min(exponent - 24 + np.log2(bits & -bits).astype(np.int64)))
    numbers = np.ldexp(levels.astype(np.float64), -last)
    return (numbers.astype(np.int8), last) if np.abs(numbers).max() <= LARGEST else None


def row_tables(levels: np.ndarray) -> np.ndarray:
    """Bytes of the levels of each group of each row, as :func:`tabled` looks them up.

    Args:
        levels: float32 ``[rows, groups, 16]``, times their scales.

    Returns:
        int8 ``[rows, groups, bytes, 16]``, from the lowest byte; only the upper two where the others are 0 in all.
    """
    parts = np.ascontiguousarray(levels, "<f4").view(np.int8).reshape(*levels.shape, 4)
    kept = parts[..., 0 if parts[..., :2].any() else 2 :]
    return np.ascontiguousarray(kept.swapaxes(-1, -2))


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes below 16, ``[rows, columns]``, as uint8 ``[rows, columns / 32, 16]``; lower halves are columns 0 to 15."""
    rows, columns = codes.shape
    wide = np.zeros((rows, padded(columns, _BLOCK)), np.uint8)
    wide[:, :columns] = codes
    wide = wide.reshape(rows, -1, 2, _BYTES)
    return wide[:, :, 0] | wide[:, :, 1] << 4


# -- kernels -----------------------------------------------------------------------------------------------------------


def _loop(parallel: bool) -> Any:
    from tvm.script import tirx as T

    return T.parallel if parallel else T.serial


def _whole(values: Any, kind: str, lanes: int, combine: Callable[[Any, Any], Any] = operator.add) -> Any:
    """All lanes of a vector, the lower half with the higher, and so on."""
    from tvm.script import tirx as T

    n = lanes // 2
    while n > 1:
        half = f"{kind}x{n}"
        values, n = combine(T.vectorlow(half, values), T.vectorhigh(half, values)), n // 2
    return combine(T.Shuffle([values], [0]), T.Shuffle([values], [1]))


def _looked_up(how: Lookup) -> Any:
    """Function from a register's table, a vector of words and a nibble to the values it numbers."""
    from tvm.script import tirx as T

    floats, integers, lanes = f"float32x{how.lanes}", f"int32x{how.lanes}", how.lanes

    def get(held: Any, word: Any, nibble: Any) -> Any:
        number = T.shift_right(word, T.broadcast(4 * nibble, lanes))
        found = T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(how.intrinsic), held, number, dtype=floats)
        if lanes == 16:
            return found
        high = T.shift_left(word, T.broadcast(28 - 4 * nibble, lanes))
        sign = T.bitwise_and(high, T.broadcast(T.int32(-(2**31)), lanes))
        return T.reinterpret(T.bitwise_xor(T.reinterpret(found, dtype=integers), sign), dtype=floats)

    return get


def _fetch() -> Any:
    """Function that asks for what will be read soon; an address where nothing is does no harm."""
    from tvm.script import tirx as T

    def ask(address: Any) -> Any:
        prefetch = T.llvm_lookup_intrinsic_id("llvm.prefetch.p0")
        return T.call_llvm_intrin(prefetch, address, T.int32(0), T.int32(3), T.int32(1), dtype="void")

    return ask


def book(m: int, n: int, columns: int, group: int, how: Lookup, *, parallel: bool) -> Any:
    """``x [m, columns]`` times the weights of a book, ``[m, n]``, with float activations.

    Args:
        m, n, columns: tokens, outputs and inputs; a tile holds all tokens, so m is a few.
        group: inputs that share a scale, a multiple of 8.
        how: the permutation.
        parallel: share the outputs among threads.

    Returns:
        a function of x, :func:`words`, scales float32 ``[tiles, groups, blocks, lanes]``, :func:`table`, and the
        result.
    """
    from tvm.script import tirx as T

    lanes, blocks = how.lanes, tiles_of(m, how.registers)
    tiles, deep = padded(n, lanes * blocks) // (lanes * blocks), padded(columns, WORD) // WORD
    groups, per = -(-columns // group), group // WORD
    ahead, loop, get, ask = _AHEAD // (blocks * lanes * 4), _loop(parallel), _looked_up(how), _fetch()
    every, zero = T.ramp(0, 1, lanes), T.broadcast(T.float32(0), lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, columns), "float32"),
        weights: T.Buffer((tiles, deep, blocks, lanes), "int32"),
        scales: T.Buffer((tiles, groups, blocks, lanes), "float32"),
        levels: T.Buffer((lanes,), "float32"),
        y: T.Buffer((m, n), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        total = T.sblock_alloc_buffer((m, blocks, lanes), "float32", scope="local")
        part = T.sblock_alloc_buffer((m, blocks, 2, lanes), "float32", scope="local")
        given = T.sblock_alloc_buffer((m, deep * WORD), "float32")
        for i in T.serial(m):
            for k in T.serial(deep * WORD):
                given[i, k] = T.if_then_else(k < columns, x[i, T.min(k, columns - 1)], T.float32(0))
        for o in loop(tiles):
            for i in T.unroll(m):
                for b in T.unroll(blocks):
                    total[i, b, every] = zero
            for g in T.serial(groups):
                for i in T.unroll(m):
                    for b in T.unroll(blocks):
                        for h in T.unroll(2):
                            part[i, b, h, every] = zero
                for k in T.serial(T.min(per, deep - g * per)):
                    for b in T.unroll(blocks):
                        T.evaluate(ask(T.address_of(weights[o, g * per + k + ahead, b, 0])))
                        for j in T.unroll(WORD):
                            for i in T.unroll(m):
                                part[i, b, j % 2, every] += get(
                                    levels[every], weights[o, g * per + k, b, every], j
                                ) * T.broadcast(given[i, (g * per + k) * WORD + j], lanes)
                for i in T.unroll(m):
                    for b in T.unroll(blocks):
                        total[i, b, every] += (part[i, b, 0, every] + part[i, b, 1, every]) * scales[o, g, b, every]
            for i in T.serial(m):
                for b in T.serial(blocks):
                    for lane in T.serial(lanes):
                        if (o * blocks + b) * lanes + lane < n:
                            y[i, (o * blocks + b) * lanes + lane] = total[i, b, lane]

    return kernel.with_attr(_OPAQUE)


def tiles_of(m: int, registers: int) -> int:
    """Vectors side by side in a tile: two sums each, for each token."""
    return max(1, registers // (4 * m))


def binary(m: int, n: int, columns: int, group: int, bits: int, how: Lookup, *, parallel: bool) -> Any:
    """``x [m, columns]`` times binary codes, ``[m, n]``, by sums of four activations.

    Args:
        m, n, columns, parallel: as of :func:`book`.
        group: inputs that share the scales, a multiple of 32.
        bits: planes of signs.
        how: the permutation.

    Returns:
        a function of x, the words of the :func:`quads` of each plane ``[tiles, columns / 32, bits, blocks, lanes]``,
        scales float32 ``[tiles, groups, bits, blocks, lanes]``, :func:`signs`, and the result.
    """
    from tvm.script import tirx as T

    lanes, blocks = how.lanes, tiles_of_planes(m, bits, how.registers)
    span = WORD * QUAD
    tiles, deep = padded(n, lanes * blocks) // (lanes * blocks), padded(columns, span) // span
    groups, per = -(-columns // group), group // span
    ahead, loop, get, ask = _AHEAD // (bits * blocks * lanes * 4), _loop(parallel), _looked_up(how), _fetch()
    every, zero = T.ramp(0, 1, lanes), T.broadcast(T.float32(0), lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, columns), "float32"),
        weights: T.Buffer((tiles, deep, bits, blocks, lanes), "int32"),
        scales: T.Buffer((tiles, groups, bits, blocks, lanes), "float32"),
        sign: T.Buffer((QUAD, lanes), "float32"),
        y: T.Buffer((m, n), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        total = T.sblock_alloc_buffer((m, blocks, lanes), "float32", scope="local")
        part = T.sblock_alloc_buffer((m, bits, blocks, lanes), "float32", scope="local")
        four = T.sblock_alloc_buffer((QUAD,), "float32", scope="local")
        sums = T.sblock_alloc_buffer((m, deep * WORD, lanes), "float32")
        for i in T.serial(m):
            for q in T.serial(deep * WORD):
                for k in T.unroll(QUAD):
                    four[k] = T.if_then_else(
                        q * QUAD + k < columns, x[i, T.min(q * QUAD + k, columns - 1)], T.float32(0)
                    )
                sums[i, q, every] = (
                    T.broadcast(four[0], lanes) * sign[0, every]
                    + T.broadcast(four[1], lanes) * sign[1, every]
                    + T.broadcast(four[2], lanes) * sign[2, every]
                    + T.broadcast(four[3], lanes) * sign[3, every]
                )
        for o in loop(tiles):
            for i in T.unroll(m):
                for b in T.unroll(blocks):
                    total[i, b, every] = zero
            for g in T.serial(groups):
                for i in T.unroll(m):
                    for p in T.unroll(bits):
                        for b in T.unroll(blocks):
                            part[i, p, b, every] = zero
                for k in T.serial(T.min(per, deep - g * per)):
                    for p in T.unroll(bits):
                        for b in T.unroll(blocks):
                            T.evaluate(ask(T.address_of(weights[o, g * per + k + ahead, p, b, 0])))
                    for j in T.unroll(WORD):
                        for p in T.unroll(bits):
                            for b in T.unroll(blocks):
                                for i in T.unroll(m):
                                    part[i, p, b, every] += get(
                                        sums[i, (g * per + k) * WORD + j, every],
                                        weights[o, g * per + k, p, b, every],
                                        j,
                                    )
                for i in T.unroll(m):
                    for p in T.unroll(bits):
                        for b in T.unroll(blocks):
                            total[i, b, every] += part[i, p, b, every] * scales[o, g, p, b, every]
            for i in T.serial(m):
                for b in T.serial(blocks):
                    for lane in T.serial(lanes):
                        if (o * blocks + b) * lanes + lane < n:
                            y[i, (o * blocks + b) * lanes + lane] = total[i, b, lane]

    return kernel.with_attr(_OPAQUE)


def tiles_of_planes(m: int, bits: int, registers: int) -> int:
    """Vectors side by side in a tile: one sum for each plane and token."""
    return max(1, registers // (bits * m))


def tabled(m: int, n: int, columns: int, group: int, size: int, *, parallel: bool) -> Any:
    """``x [m, columns]`` times weights of four bits, ``[m, n]``, whose levels are looked up byte by byte, by NEON.

    Args:
        m, n, columns, parallel: as of :func:`book`.
        group: inputs that share a table, a multiple of 32.
        size: bytes of a level that are looked up, 2 or 4.

    Returns:
        a function of x, :func:`nibbles`, :func:`row_tables`, and the result; rows are filled to a multiple of
        :func:`rows_of`.
    """
    from tvm.script import tirx as T

    side, across = rows_of(m), _BYTES // 4
    tiles, deep = padded(n, side) // side, padded(columns, _BLOCK) // _BLOCK
    groups, per = -(-columns // group), group // _BLOCK
    ahead, loop, ask = _AHEAD // _BYTES, _loop(parallel), _fetch()
    byte, every, zero = T.ramp(0, 1, _BYTES), T.ramp(0, 1, 4), T.broadcast(T.float32(0), 4)
    permute, lower = T.llvm_lookup_intrinsic_id(_TABLE_LOOKUP), T.broadcast(T.int8(0), _BYTES)

    def number(word: Any, half: Any) -> Any:
        low = T.bitwise_and(word, T.broadcast(T.uint8(15), _BYTES))
        high = T.shift_right(word, T.broadcast(T.uint8(4), _BYTES))
        return T.reinterpret(T.Select(half == 0, low, high), dtype=f"int8x{_BYTES}")

    def interleaved(pair: Sequence[Any], upper: bool, lanes: int) -> Any:
        """The lower or the upper halves of two vectors, lane by lane."""
        first = lanes // 2 if upper else 0
        return T.Shuffle(pair, [first + i // 2 + lanes * (i % 2) for i in range(lanes)])

    def level(part: Any, v: int) -> Any:
        """Four of 16 floats by their bytes."""
        parts = [part[p, byte] for p in range(size)]
        high = interleaved(parts[-2:], v > 1, _BYTES)
        low = interleaved(parts[:2], v > 1, _BYTES) if size == 4 else lower
        pair = [T.reinterpret(half, dtype=f"int16x{_BYTES // 2}") for half in (low, high)]
        return T.reinterpret(interleaved(pair, v % 2 == 1, _BYTES // 2), dtype="float32x4")

    def four(given: Any, i: Any, block: Any, half: Any, v: int) -> Any:
        return given[i, T.ramp(block * _BLOCK + half * _BYTES + v * 4, 1, 4)]

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, columns), "float32"),
        weights: T.Buffer((tiles * side, deep, _BYTES), "uint8"),
        tables: T.Buffer((tiles * side, groups, size, _BYTES), "int8"),
        y: T.Buffer((m, n), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        total = T.sblock_alloc_buffer((m, side, across, 4), "float32", scope="local")
        held = T.sblock_alloc_buffer((side, size, _BYTES), "int8", scope="local")
        part = T.sblock_alloc_buffer((size, _BYTES), "int8", scope="local")
        given = T.sblock_alloc_buffer((m, deep * _BLOCK), "float32")
        for i in T.serial(m):
            for k in T.serial(deep * _BLOCK):
                given[i, k] = T.if_then_else(k < columns, x[i, T.min(k, columns - 1)], T.float32(0))
        for o in loop(tiles):
            for i in T.unroll(m):
                for r in T.unroll(side):
                    for v in T.unroll(across):
                        total[i, r, v, every] = zero
            for g in T.serial(groups):
                for r in T.unroll(side):
                    for p in T.unroll(size):
                        held[r, p, byte] = tables[o * side + r, g, p, byte]
                for k in T.serial(T.min(per, deep - g * per)):
                    for r in T.unroll(side):
                        T.evaluate(ask(T.address_of(weights[o * side + r, g * per + k + ahead, 0])))
                        for h in T.unroll(2):
                            for p in T.unroll(size):
                                part[p, byte] = T.call_llvm_pure_intrin(
                                    permute,
                                    held[r, p, byte],
                                    number(weights[o * side + r, g * per + k, byte], h),
                                    dtype=f"int8x{_BYTES}",
                                )
                            for i in T.unroll(m):
                                total[i, r, 0, every] += level(part, 0) * four(given, i, g * per + k, h, 0)
                                total[i, r, 1, every] += level(part, 1) * four(given, i, g * per + k, h, 1)
                                total[i, r, 2, every] += level(part, 2) * four(given, i, g * per + k, h, 2)
                                total[i, r, 3, every] += level(part, 3) * four(given, i, g * per + k, h, 3)
            for i in T.serial(m):
                for r in T.unroll(side):
                    if o * side + r < n:
                        y[i, o * side + r] = _whole(
                            (total[i, r, 0, every] + total[i, r, 1, every])
                            + (total[i, r, 2, every] + total[i, r, 3, every]),
                            "float32",
                            4,
                        )

    return kernel.with_attr(_OPAQUE)


def rows_of(m: int) -> int:
    """Rows of weights that :func:`tabled` goes through side by side."""
    return 2 if m == 1 else 1


def quantised(m: int, columns: int, group: int, largest: int, *, parallel: bool) -> Any:
    """Each row of ``x [m, columns]`` as whole numbers up to ``largest`` in magnitude.

    ``top = max|x|``; the numbers are ``round(x * (largest / top))``, half to even, and 0 where top is 0.

    Args:
        m, columns, parallel: as of :func:`book`.
        group: columns of a partial sum.
        largest: magnitude of the largest.

    Returns:
        a function of x, int8 ``[m, columns]`` filled to a multiple of 32, the steps ``top / largest`` float32
        ``[m, 1]``, and the sums of the numbers of each group, int32 ``[m, groups]``.
    """
    from tvm.script import tirx as T

    wide, groups, lanes = padded(columns, 2 * _STEPS16), -(-columns // group), 16
    whole_lanes, loop = columns // lanes, _loop(parallel)
    every = T.ramp(0, 1, lanes)

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, columns), "float32"),
        numbers: T.Buffer((m, wide), "int8"),
        steps: T.Buffer((m, 1), "float32"),
        sums: T.Buffer((m, groups), "int32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        most = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        top = T.sblock_alloc_buffer((1,), "float32", scope="local")
        factor = T.sblock_alloc_buffer((1,), "float32", scope="local")
        total = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
        for i in loop(m):
            most[every] = T.broadcast(T.float32(0), lanes)
            for k in T.serial(whole_lanes):
                most[every] = T.max(most[every], T.fabs(x[i, T.ramp(k * lanes, 1, lanes)]))
            top[0] = _whole(most[every], "float32", lanes, T.max)
            for k in T.serial(columns - whole_lanes * lanes):
                top[0] = T.max(top[0], T.fabs(x[i, whole_lanes * lanes + k]))
            steps[i, 0] = top[0] / T.float32(largest)
            factor[0] = T.if_then_else(top[0] > T.float32(0), T.float32(largest) / top[0], T.float32(0))
            for k in T.serial(whole_lanes):
                numbers[i, T.ramp(k * lanes, 1, lanes)] = T.Cast(
                    f"int8x{lanes}", T.nearbyint(x[i, T.ramp(k * lanes, 1, lanes)] * T.broadcast(factor[0], lanes))
                )
            for k in T.serial(columns - whole_lanes * lanes):
                numbers[i, whole_lanes * lanes + k] = T.Cast(
                    "int8", T.nearbyint(x[i, whole_lanes * lanes + k] * factor[0])
                )
            for k in T.serial(wide - columns):
                numbers[i, columns + k] = T.int8(0)
            for g in T.serial(groups):
                total[every] = T.broadcast(T.int32(0), lanes)
                for k in T.serial(T.min(group, columns - g * group) // lanes):
                    total[every] += T.Cast(f"int32x{lanes}", numbers[i, T.ramp(g * group + k * lanes, 1, lanes)])
                for k in T.serial(T.min(group, columns - g * group) % lanes):
                    total[0] += T.Cast(
                        "int32", numbers[i, g * group + T.min(group, columns - g * group) // lanes * lanes + k]
                    )
                sums[i, g] = _whole(total[every], "int32", lanes)

    return kernel.with_attr(_OPAQUE)


_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # low halves of four bytes, then their high halves


def bytes_of(codes: np.ndarray, how: Bytes, blocks: int) -> np.ndarray:
    """Codes of four bits as :func:`book_int8` reads them."""
    return words(codes, how.lanes, blocks, _ORDER)


def byte_table(numbers: np.ndarray, how: Bytes) -> np.ndarray:
    """16 levels as whole numbers, int8, once for each 128 bits of a register."""
    return np.tile((numbers.astype(np.int16) + how.offset).astype(np.uint8).view(np.int8), how.lanes // 4)


def _dot(how: Bytes) -> Any:
    """Function that adds to 32-bit lanes four products each of levels and of activations."""
    from tvm.script import tirx as T

    lanes = how.lanes
    name, total = T.llvm_lookup_intrinsic_id(how.dot), f"int32x{lanes}"
    if how.feature != "avx2":
        return lambda c, w, x: T.call_llvm_pure_intrin(name, c, w, x, dtype=total)
    widen, ones = T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pmadd.wd"), T.broadcast(T.int16(1), 2 * lanes)

    def add(c: Any, w: Any, x: Any) -> Any:
        pairs = T.call_llvm_pure_intrin(name, w, x, dtype=f"int16x{2 * lanes}")
        return c + T.call_llvm_pure_intrin(widen, pairs, ones, dtype=total)

    return add


def book_int8(m: int, n: int, columns: int, group: int, how: Bytes, *, parallel: bool) -> Any:
    """Integer activations ``x [m, columns]`` times the weights of a book, ``[m, n]``.

    Args:
        m, n, columns, group, parallel: as of :func:`book`.
        how: the instructions.

    Returns:
        a function of the results of :func:`quantised`, :func:`bytes_of`, scales float32
        ``[tiles, groups, blocks, lanes]``, :func:`byte_table`, and the result.
    """
    from tvm.script import tirx as T

    assert 2 * (LARGEST + how.offset) * FINE < 1 << 15, "VPMADDUBSW would saturate"
    lanes, blocks = how.lanes, tiles_of(m, 16)
    size = 4 * lanes
    tiles, deep = padded(n, lanes * blocks) // (lanes * blocks), padded(columns, WORD) // WORD
    groups, per, wide = -(-columns // group), group // WORD, padded(columns, 2 * _STEPS16)
    ahead, loop, dot, ask = _AHEAD // (blocks * size), _loop(parallel), _dot(how), _fetch()
    every, nibble = T.ramp(0, 1, lanes), T.broadcast(T.int32(0x0F0F0F0F), lanes)
    permute, raised = T.llvm_lookup_intrinsic_id(how.permute), how.offset

    def level(held: Any, word: Any, half: Any) -> Any:
        number = T.bitwise_and(T.shift_right(word, T.broadcast(4 * half, lanes)), nibble)
        number = T.reinterpret(number, dtype=f"int8x{size}")
        return T.call_llvm_pure_intrin(permute, held, number, dtype=f"int8x{size}")

    def four(values: Any) -> Any:
        return T.reinterpret(T.broadcast(T.reinterpret(values, dtype="int32"), lanes), dtype=f"int8x{size}")

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, wide), "int8"),
        steps: T.Buffer((m, 1), "float32"),
        sums: T.Buffer((m, groups), "int32"),
        weights: T.Buffer((tiles, deep, blocks, lanes), "int32"),
        scales: T.Buffer((tiles, groups, blocks, lanes), "float32"),
        levels: T.Buffer((size,), "int8"),
        y: T.Buffer((m, n), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        total = T.sblock_alloc_buffer((m, blocks, lanes), "float32", scope="local")
        part = T.sblock_alloc_buffer((m, blocks, 2, lanes), "int32", scope="local")
        for o in loop(tiles):
            for i in T.unroll(m):
                for b in T.unroll(blocks):
                    total[i, b, every] = T.broadcast(T.float32(0), lanes)
            for g in T.serial(groups):
                for i in T.unroll(m):
                    for b in T.unroll(blocks):
                        part[i, b, 0, every] = T.broadcast(sums[i, g] * T.int32(-raised), lanes)
                        part[i, b, 1, every] = T.broadcast(T.int32(0), lanes)
                for k in T.serial(T.min(per, deep - g * per)):
                    for b in T.unroll(blocks):
                        T.evaluate(ask(T.address_of(weights[o, g * per + k + ahead, b, 0])))
                        for h in T.unroll(2):
                            for i in T.unroll(m):
                                part[i, b, h, every] = dot(
                                    part[i, b, h, every],
                                    level(levels[T.ramp(0, 1, size)], weights[o, g * per + k, b, every], h),
                                    four(x[i, T.ramp((g * per + k) * WORD + 4 * h, 1, 4)]),
                                )
                for i in T.unroll(m):
                    for b in T.unroll(blocks):
                        total[i, b, every] += (
                            T.Cast(f"float32x{lanes}", part[i, b, 0, every] + part[i, b, 1, every])
                            * scales[o, g, b, every]
                        )
            for i in T.serial(m):
                for b in T.serial(blocks):
                    for lane in T.serial(lanes):
                        if (o * blocks + b) * lanes + lane < n:
                            y[i, (o * blocks + b) * lanes + lane] = total[i, b, lane] * steps[i, 0]

    return kernel.with_attr(_OPAQUE)


_ROWS, _COLUMNS = 4, 32  # of a tile of narrow weights: eight vectors of 16 sums of 16 bits


def narrow_pack(weight: np.ndarray) -> np.ndarray:
    """Whole numbers up to 8 in magnitude, int8 ``[n, columns]``, as uint8 ``[n / 32, columns / 2, 64]``, raised by 8.

    Raises:
        ValueError: a number is larger, so that sums of 16 bits could overflow.
    """
    if np.abs(weight.astype(np.int16)).max() > NARROW:
        raise ValueError(f"a weight exceeds {NARROW} in magnitude")
    n, columns = weight.shape
    wide = np.zeros((padded(n, _COLUMNS), padded(columns, 2 * _STEPS16)), np.uint8)
    wide[:n, :columns] = weight
    wide = (wide + NARROW).astype(np.uint8)
    wide = wide.reshape(-1, _COLUMNS, wide.shape[1] // 2, 2)
    return np.ascontiguousarray(wide.transpose(0, 2, 1, 3).reshape(wide.shape[0], wide.shape[2], 2 * _COLUMNS))


def narrow(m: int, n: int, columns: int, *, parallel: bool) -> Any:
    """Integer activations up to 63 times narrow weights, ``[m, n]``, by AVX2.

    Args:
        m, n, columns, parallel: as of :func:`book`.

    Returns:
        a function of the results of :func:`quantised`, :func:`narrow_pack`, scales float32 ``[n]``, and the result.
    """
    from tvm.script import tirx as T

    assert _STEPS16 * 2 * (2 * NARROW) * COARSE < 1 << 15, "16 results of VPMADDUBSW would overflow"
    wide, loop = padded(columns, 2 * _STEPS16), _loop(parallel)
    across, down, spans = padded(n, _COLUMNS) // _COLUMNS, padded(m, _ROWS) // _ROWS, wide // (2 * _STEPS16)
    name, short, half = T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pmadd.ub.sw"), T.ramp(0, 1, 16), 16

    def pair(values: Any) -> Any:
        return T.reinterpret(T.broadcast(T.reinterpret(values, dtype="int16"), half), dtype="int8x32")

    @T.prim_func(s_tir=True)
    def kernel(
        x: T.Buffer((m, wide), "int8"),
        steps: T.Buffer((m, 1), "float32"),
        sums: T.Buffer((m, 1), "int32"),
        weights: T.Buffer((across, wide // 2, 2 * _COLUMNS), "uint8"),
        scales: T.Buffer((across * _COLUMNS,), "float32"),
        y: T.Buffer((m, n), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        total = T.sblock_alloc_buffer((_ROWS, 2, half), "int32", scope="local")
        part = T.sblock_alloc_buffer((_ROWS, 2, half), "int16", scope="local")
        for jo in loop(across):
            for io in T.serial(down):
                for i in T.unroll(_ROWS):
                    for v in T.unroll(2):
                        total[i, v, short] = T.broadcast(sums[T.min(io * _ROWS + i, m - 1), 0] * T.int32(-NARROW), half)
                for s in T.serial(spans):
                    for i in T.unroll(_ROWS):
                        for v in T.unroll(2):
                            part[i, v, short] = T.broadcast(T.int16(0), half)
                    for k in T.unroll(_STEPS16):
                        for i in T.unroll(_ROWS):
                            for v in T.unroll(2):
                                part[i, v, short] += T.call_llvm_pure_intrin(
                                    name,
                                    T.reinterpret(
                                        weights[jo, s * _STEPS16 + k, T.ramp(v * 32, 1, 32)], dtype="int8x32"
                                    ),
                                    pair(x[T.min(io * _ROWS + i, m - 1), T.ramp((s * _STEPS16 + k) * 2, 1, 2)]),
                                    dtype="int16x16",
                                )
                    for i in T.unroll(_ROWS):
                        for v in T.unroll(2):
                            total[i, v, short] += T.Cast("int32x16", part[i, v, short])
                for i in T.serial(_ROWS):
                    for v in T.serial(2):
                        for lane in T.vectorized(half):
                            if T.And(io * _ROWS + i < m, (jo * 2 + v) * half + lane < n):
                                y[io * _ROWS + i, (jo * 2 + v) * half + lane] = (
                                    T.Cast("float32", total[i, v, lane]) * scales[(jo * 2 + v) * half + lane]
                                ) * steps[io * _ROWS + i, 0]

    return kernel.with_attr(_OPAQUE)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor ``[..., tokens, columns]`` lie in memory; each is contiguous.

    Attributes:
        size: elements of the memory.
        first: element that the first row begins with.
        steps: elements between neighbours along each axis but the last.
    """

    size: int
    first: int
    steps: tuple[int, ...]

    @classmethod
    def dense(cls, shape: Sequence[int]) -> Rows:
        """Those of a tensor that has the memory for itself."""
        steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape) - 1))
        return cls(math.prod(shape), 0, steps)

    @classmethod
    def broadcast(cls, shape: Sequence[int]) -> Rows:
        """Those of a tensor that has the memory for itself, where an axis of extent 1 may have any index."""
        dense = cls.dense(shape)
        return cls(dense.size, 0, tuple(s if n > 1 else 0 for s, n in zip(dense.steps, shape[:-1], strict=True)))

    @classmethod
    def of(cls, view: View) -> Rows | None:
        """Those of a view, None where its rows are not contiguous or not evenly spaced."""
        shape, extents = view.shape, [int(d) for d in view.source.ty.shape]
        position = np.broadcast_to(flatten(view.at(np.indices(shape, sparse=True)), extents), shape)
        first, axes = int(position[(0,) * len(shape)]), len(shape)
        steps = tuple(
            int(position[(0,) * axis + (1,) + (0,) * (axes - axis - 1)]) - first if shape[axis] > 1 else 0
            for axis in range(axes)
        )
        even = first + sum(step * i for step, i in zip(steps, np.indices(shape, sparse=True), strict=True))
        if (shape[-1] > 1 and steps[-1] != 1) or not np.array_equal(position, np.broadcast_to(even, shape)):
            return None
        return cls(math.prod(extents), first, steps[:-1])

    def start(self, index: Sequence[Any]) -> Any:
        """Where the row of an index begins."""
        return sum((i * step for i, step in zip(index, self.steps, strict=True)), start=self.first)


_QUAD_SUMS = 1 << QUAD  # sums of some of four rows
_TABLE = 32 << 10  # bytes of such sums that are held at a time: the first cache of most CPUs


def angular_fits(inner: int, outer: int, have: Vectors) -> bool:
    """Whether :func:`angular` can compute extents: a row of sums takes half of the registers at most."""
    return inner % have.lanes == outer % have.lanes == 0 and outer // have.lanes <= have.count // 2


def angular(
    lead: Sequence[int],
    tokens: int,
    inner: int,
    outer: int,
    have: Vectors,
    *,
    parallel: bool,
    rows: Sequence[Rows] | None = None,
) -> Any:
    """Angular attention with binary queries and keys, head by head.

    ``g = b(k)^T v``; then each token's result is ``v / 2 + (b(q) g) / pi`` over its length. Both products add some of
    four rows at a time: the 16 possible sums are formed once, and four bits are the number of one of them, so that 64
    multiply-adds become 16 additions. ``x / |x| > t`` is computed as ``x > t |x|``, so that a value within a rounding
    of its threshold may fall on the other side of it.

    Args:
        lead: axes before the tokens, e.g. images and heads.
        tokens, inner, outer: extents of q and k ``[*lead, tokens, inner]`` and of v ``[*lead, tokens, outer]``, for
            which :func:`angular_fits` holds.
        have: the vector registers.
        parallel: share the heads among threads.
        rows: of q, k and v in memory, which may be the same; by default each is dense.

    Returns:
        a function of the memory of q, k and v, each float32 in one axis, the two thresholds float32 ``[1]``, and the
        result float32 ``[heads, tokens, outer]``.
    """
    from tvm.script import tirx as T

    q_rows, k_rows, v_rows = rows or [Rows.dense((*lead, tokens, extent)) for extent in (inner, inner, outer)]
    heads, lanes, loop = math.prod(lead), have.lanes, _loop(parallel)
    own = heads if parallel else 1  # scratch memory
    deep, wide, quads = inner // lanes, outer // lanes, padded(tokens, QUAD) // QUAD
    held = max(1, min(quads, _TABLE // (4 * _QUAD_SUMS * outer)))  # quads of rows of v whose sums are held
    rounds = -(-quads // held)
    chunk = max(c for c in range(1, wide + 1) if wide % c == 0 and (c == 1 or _table(inner, c * lanes) <= _TABLE))
    # Both divide the rows that they share.
    down, across = (
        next((n for n in sizes if n * of <= have.count // 2), 1) for sizes, of in (((2,), wide), ((QUAD, 2), chunk))
    )
    table = max(held * _QUAD_SUMS * outer, _table(inner, chunk * lanes) // 4)
    every, zero = T.ramp(0, 1, lanes), T.broadcast(T.float32(0), lanes)
    # In each group of four lanes the bits 1, 2, 4, 8.
    bit = T.shift_left(T.broadcast(T.int32(1), lanes), T.bitwise_and(every, T.broadcast(T.int32(3), lanes)))

    def here(of: Rows, h: Any, t: Any, c: Any) -> Any:
        """Where a vector lies; a token beyond the last is the last."""
        start = of.start([*unflatten(h, lead), T.min(t, tokens - 1) if tokens % QUAD else t])
        return T.ramp(start + c * lanes, 1, lanes)

    def marked(values: Any, limit: Any, mark: Any) -> Any:
        """``mark`` in the lanes that exceed a limit."""
        return T.Select(values > T.broadcast(limit, lanes), mark, T.broadcast(T.int32(0), lanes))

    def quads_of(c: Any) -> Any:
        """Where the numbers of a vector of columns lie."""
        return T.ramp(c * (lanes // QUAD), 1, lanes // QUAD) if lanes > QUAD else c

    def numbers(marks: Any) -> Any:
        """The sum of the marks of each four lanes."""
        n = lanes // QUAD
        if n == 1:
            return T.Cast("uint8", _whole(marks, "int32", lanes))
        four = T.reinterpret(T.Cast(f"int8x{lanes}", marks), dtype=f"int32x{n}")
        top = T.shift_right(four * T.broadcast(T.int32(0x01010101), n), T.broadcast(T.int32(24), n))
        return T.Cast(f"uint8x{n}", top)

    @T.prim_func(s_tir=True)
    def kernel(
        q: T.Buffer((q_rows.size,), "float32"),
        k: T.Buffer((k_rows.size,), "float32"),
        v: T.Buffer((v_rows.size,), "float32"),
        q_threshold: T.Buffer((1,), "float32"),
        k_threshold: T.Buffer((1,), "float32"),
        y: T.Buffer((heads, tokens, outer), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        state = T.sblock_alloc_buffer((own, inner, outer), "float32")
        sums = T.sblock_alloc_buffer((own, table), "float32")
        given = T.sblock_alloc_buffer((own, held, inner), "uint8")
        asked = T.sblock_alloc_buffer((own, quads * QUAD, inner // QUAD), "uint8")
        squares = T.sblock_alloc_buffer((own, quads * QUAD, lanes), "float32")
        square = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        limit = T.sblock_alloc_buffer((QUAD,), "float32", scope="local")
        marks = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
        low = T.sblock_alloc_buffer((4, lanes), "float32", scope="local")
        high = T.sblock_alloc_buffer((4, lanes), "float32", scope="local")
        part = T.sblock_alloc_buffer((down, wide, lanes), "float32", scope="local")
        near = T.sblock_alloc_buffer((across, chunk, lanes), "float32", scope="local")
        length = T.sblock_alloc_buffer((1,), "float32", scope="local")
        for h in loop(heads):
            for d in T.serial(inner):
                for c in T.unroll(wide):
                    state[h % own, d, T.ramp(c * lanes, 1, lanes)] = zero
            for r in T.serial(rounds):
                for p in T.serial(T.min(held, quads - r * held)):
                    for i in T.unroll(QUAD):
                        square[every] = zero
                        for c in T.unroll(deep):
                            square[every] += (
                                k[here(k_rows, h, (r * held + p) * QUAD + i, c)]
                                * k[here(k_rows, h, (r * held + p) * QUAD + i, c)]
                            )
                        limit[i] = T.if_then_else(
                            (r * held + p) * QUAD + i < tokens,
                            T.sqrt(_whole(square[every], "float32", lanes)) * k_threshold[0],
                            T.max_value("float32"),
                        )
                    for c in T.unroll(deep):
                        marks[every] = T.broadcast(T.int32(0), lanes)
                        for i in T.unroll(QUAD):
                            marks[every] += marked(
                                k[here(k_rows, h, (r * held + p) * QUAD + i, c)],
                                limit[i],
                                T.broadcast(T.shift_left(T.int32(1), i), lanes),
                            )
                        given[h % own, p, T.ramp(c * lanes, 1, lanes)] = T.Cast(f"uint8x{lanes}", marks[every])
                    for c in T.unroll(wide):
                        for i in T.unroll(2):
                            low[1 + i, every] = v[here(v_rows, h, (r * held + p) * QUAD + i, c)]
                            high[1 + i, every] = v[here(v_rows, h, (r * held + p) * QUAD + 2 + i, c)]
                        low[0, every] = zero
                        high[0, every] = zero
                        low[3, every] = low[1, every] + low[2, every]
                        high[3, every] = high[1, every] + high[2, every]
                        for i in T.unroll(4):
                            for j in T.unroll(4):
                                sums[h % own, T.ramp((p * _QUAD_SUMS + i * 4 + j) * outer + c * lanes, 1, lanes)] = (
                                    low[j, every] + high[i, every]
                                )
                for d in T.serial(inner // down):
                    for i in T.unroll(down):
                        for c in T.unroll(wide):
                            part[i, c, every] = state[h % own, d * down + i, T.ramp(c * lanes, 1, lanes)]
                    for p in T.serial(T.min(held, quads - r * held)):
                        for i in T.unroll(down):
                            for c in T.unroll(wide):
                                part[i, c, every] += sums[
                                    h % own,
                                    T.ramp(
                                        (p * _QUAD_SUMS + T.Cast("int32", given[h % own, p, d * down + i])) * outer
                                        + c * lanes,
                                        1,
                                        lanes,
                                    ),
                                ]
                    for i in T.unroll(down):
                        for c in T.unroll(wide):
                            state[h % own, d * down + i, T.ramp(c * lanes, 1, lanes)] = part[i, c, every]
            for o in T.serial(quads):
                for i in T.unroll(QUAD):
                    square[every] = zero
                    for c in T.unroll(deep):
                        square[every] += q[here(q_rows, h, o * QUAD + i, c)] * q[here(q_rows, h, o * QUAD + i, c)]
                    limit[i] = T.sqrt(_whole(square[every], "float32", lanes)) * q_threshold[0]
                for i in T.unroll(QUAD):
                    for c in T.unroll(deep):
                        asked[h % own, o * QUAD + i, quads_of(c)] = numbers(
                            marked(q[here(q_rows, h, o * QUAD + i, c)], limit[i], bit)
                        )
                    squares[h % own, o * QUAD + i, every] = zero
            for s in T.serial(wide // chunk):
                for p in T.serial(inner // QUAD):
                    for c in T.unroll(chunk):
                        for i in T.unroll(2):
                            low[1 + i, every] = state[h % own, p * QUAD + i, T.ramp((s * chunk + c) * lanes, 1, lanes)]
                            high[1 + i, every] = state[
                                h % own, p * QUAD + 2 + i, T.ramp((s * chunk + c) * lanes, 1, lanes)
                            ]
                        low[0, every] = zero
                        high[0, every] = zero
                        low[3, every] = low[1, every] + low[2, every]
                        high[3, every] = high[1, every] + high[2, every]
                        for i in T.unroll(4):
                            for j in T.unroll(4):
                                sums[h % own, T.ramp(((p * _QUAD_SUMS + i * 4 + j) * chunk + c) * lanes, 1, lanes)] = (
                                    low[j, every] + high[i, every]
                                )
                for o in T.serial(quads * QUAD // across):
                    for i in T.unroll(across):
                        for c in T.unroll(chunk):
                            near[i, c, every] = zero
                    for p in T.serial(inner // QUAD):
                        for i in T.unroll(across):
                            for c in T.unroll(chunk):
                                near[i, c, every] += sums[
                                    h % own,
                                    T.ramp(
                                        (
                                            (p * _QUAD_SUMS + T.Cast("int32", asked[h % own, o * across + i, p]))
                                            * chunk
                                            + c
                                        )
                                        * lanes,
                                        1,
                                        lanes,
                                    ),
                                ]
                    for i in T.unroll(across):
                        if o * across + i < tokens:
                            for c in T.unroll(chunk):
                                near[i, c, every] = v[here(v_rows, h, o * across + i, s * chunk + c)] * T.broadcast(
                                    T.float32(0.5), lanes
                                ) + near[i, c, every] * T.broadcast(T.float32(0.31830987), lanes)
                                squares[h % own, o * across + i, every] += near[i, c, every] * near[i, c, every]
                                y[h, o * across + i, T.ramp((s * chunk + c) * lanes, 1, lanes)] = near[i, c, every]
            for t in T.serial(tokens):
                length[0] = T.float32(1) / T.sqrt(_whole(squares[h % own, t, every], "float32", lanes))
                for c in T.unroll(wide):
                    y[h, t, T.ramp(c * lanes, 1, lanes)] *= T.broadcast(length[0], lanes)

    return kernel.with_attr(_OPAQUE)


def _table(inner: int, columns: int) -> int:
    """Bytes of the sums of all quads of ``inner`` rows."""
    return 4 * inner // QUAD * _QUAD_SUMS * columns


def hamming_fits(keys: int, inner: int) -> bool:
    """Whether :func:`hamming` can compute extents: they fill a vector of four."""
    return min(keys, inner) >= 4


def hamming(
    lead: Sequence[int],
    queries: int,
    keys: int,
    inner: int,
    have: Vectors,
    *,
    parallel: bool,
    rows: Sequence[Rows] | None = None,
    biases: Sequence[int] = (1,),
) -> Any:
    """Scores of binary queries and keys, ``scale b(q) b(k)^T + bias``, head by head: their common ones are counted.

    Of ``b(x)``, 1 where ``x / |x|`` exceeds a threshold, 32 columns are a word. A count is the sum over the words of
    the bits set in both; keys lie in the lanes. Where vectors do not divide the keys, the last one ends with them. The
    bias is added here, for a softmax that reads its scores ready is the faster one.

    Args:
        lead: axes before the tokens, e.g. images and heads.
        queries, keys, inner: extents of q ``[*lead, queries, inner]`` and of k ``[*lead, keys, inner]``, for which
            :func:`hamming_fits` holds.
        have: the vector registers.
        parallel: share the heads among threads.
        rows: of q and k in memory, which may be the same; by default each is dense.
        biases: shape of the bias, which broadcasts against ``[*lead, queries, keys]``.

    Returns:
        a function of the memory of q and k in one axis, the thresholds of q and of k ``[heads]``, the scale ``[1]``,
        the memory of the bias, and the result ``[heads, queries, keys]``; all are float32.
    """
    from tvm.script import tirx as T

    q_rows, k_rows = rows or [Rows.dense((*lead, tokens, inner)) for tokens in (queries, keys)]
    heads, loop = math.prod(lead), _loop(parallel)
    own = heads if parallel else 1  # scratch memory
    deep, wide = (min(have.lanes, 1 << (extent.bit_length() - 1)) for extent in (inner, keys))
    words, of_word, down = -(-inner // BITS), BITS // deep, min(queries, 4)
    biases = [1] * (len(lead) + 2 - len(biases)) + list(biases)
    bias_rows = Rows.broadcast(biases)
    lane, none = T.ramp(0, 1, deep), T.broadcast(T.uint32(0), deep)

    def start(of: Rows, h: Any, t: Any) -> Any:
        return of.start([*unflatten(h, lead), t])

    def added(bias: Any, h: Any, t: Any, first: Any) -> Any:
        row = start(bias_rows, h, t)
        return bias[T.ramp(row + first, 1, wide)] if biases[-1] == keys else T.broadcast(bias[row], wide)

    def place(chunk: Any) -> tuple[Any, Any]:
        """Columns of a vector, the last of which ends with the row, and which of them none before it holds."""
        first = T.min(chunk * deep, inner - deep)
        return T.ramp(first, 1, deep), lane >= T.broadcast(chunk * deep - first, deep)

    def length(x: Any, row: Any) -> Any:
        total = T.broadcast(T.float32(0), deep)
        for chunk in range(-(-inner // deep)):
            columns, new = place(chunk)
            value = x[columns + T.broadcast(row, deep)]
            total += T.Select(new, value * value, T.broadcast(T.float32(0), deep))
        return T.sqrt(_whole(total, "float32", deep))

    def word(x: Any, row: Any, w: Any, over: Any, limit: Any) -> Any:
        """Columns ``32 w`` to ``32 w + 31`` as bits; those beyond the last are 0."""
        marks = none
        for chunk in range(of_word):
            columns, new = place(w * of_word + chunk)
            bit = T.Cast(f"uint32x{deep}", T.bitwise_and(columns, T.broadcast(BITS - 1, deep)))
            above = x[columns + T.broadcast(row, deep)] / T.broadcast(over, deep) > T.broadcast(limit, deep)
            marks += T.Select(T.And(above, new), T.shift_left(T.broadcast(T.uint32(1), deep), bit), none)
        return _whole(marks, "uint32", deep)

    @T.prim_func(s_tir=True)
    def kernel(
        q: T.Buffer((q_rows.size,), "float32"),
        k: T.Buffer((k_rows.size,), "float32"),
        q_threshold: T.Buffer((heads,), "float32"),
        k_threshold: T.Buffer((heads,), "float32"),
        scale: T.Buffer((1,), "float32"),
        bias: T.Buffer((bias_rows.size,), "float32"),
        y: T.Buffer((heads, queries, keys), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        asked = T.sblock_alloc_buffer((own, queries, words), "uint32")
        given = T.sblock_alloc_buffer((own, words, keys), "uint32")
        over = T.sblock_alloc_buffer((1,), "float32", scope="local")
        total = T.sblock_alloc_buffer((down, wide), "uint32", scope="local")
        for h in loop(heads):
            for t in T.serial(queries):
                over[0] = length(q, start(q_rows, h, t))
                for w in T.unroll(words):
                    asked[h % own, t, w] = word(q, start(q_rows, h, t), w, over[0], q_threshold[h])
            for t in T.serial(keys):
                over[0] = length(k, start(k_rows, h, t))
                for w in T.unroll(words):
                    given[h % own, w, t] = word(k, start(k_rows, h, t), w, over[0], k_threshold[h])
            for o in T.serial(-(-queries // down)):
                for j in T.serial(-(-keys // wide)):
                    for i in T.unroll(down):
                        total[i, T.ramp(0, 1, wide)] = T.broadcast(T.uint32(0), wide)
                    for w in T.unroll(words):
                        for i in T.unroll(down):
                            total[i, T.ramp(0, 1, wide)] += T.popcount(
                                T.bitwise_and(
                                    given[h % own, w, T.ramp(T.min(j * wide, keys - wide), 1, wide)],
                                    T.broadcast(asked[h % own, T.min(o * down, queries - down) + i, w], wide),
                                )
                            )
                    for i in T.unroll(down):
                        y[h, T.min(o * down, queries - down) + i, T.ramp(T.min(j * wide, keys - wide), 1, wide)] = (
                            T.Cast(f"float32x{wide}", total[i, T.ramp(0, 1, wide)]) * T.broadcast(scale[0], wide)
                            + added(bias, h, T.min(o * down, queries - down) + i, T.min(j * wide, keys - wide))
                        )

    return kernel.with_attr(_OPAQUE)
