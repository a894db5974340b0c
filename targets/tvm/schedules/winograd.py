"""Winograd's minimal filtering F(m x m, 3 x 3) for dense 3 x 3 convolutions of stride 1, in channels-last order.

A tile of ``m x m`` results needs ``(m + 2) ** 2`` multiplications per pair of channels in place of ``9 m ** 2``:
``Y = A' [(G g G') * (B' d B)] A`` (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016,
section 4.1). The matrices are those of Cook and Toom's interpolation at ``m + 1`` points and infinity. Weights are
transformed at compile time, in float64. For each block of tiles the input is transformed, ``(m + 2) ** 2`` products
of matrices run over its channels, and their results are transformed back, before the next block: what one step writes
the next one still finds in the cache.

The points decide the error (Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution for
Deep Neural Networks, ACM TOMS 2020): with the usual 0, 1, -1, 2, -2 F(4 x 4) is off by ten times what a direct
convolution is, with the points below by five times.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules import conv, dense, tile
from edgecompile.targets.tvm.schedules.tile import TILE, Shape, Vectors, padded

_TAPS = 3
_BUDGET = 1e-5  # largest error of one result, as a part of the largest result; a direct convolution has 5e-7
_GAIN = 0.85  # least that is worth the memory of transformed weights, as a part of the direct convolution's cost
_FORTH = {2: 80, 4: 240}  # steps that transforming one tile of one vector of channels costs, and transforming it back
_BACK = {2: 60, 4: 200}
_CACHE = 1 << 19  # bytes of a core's own cache that a block may take
_BYTES_PER_STEP = 4  # from beyond that cache
_MOST_TILES = 64  # of a block
_SAMPLES = 16  # tiles and channels that the error is measured on
_POINTS: Mapping[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}
WINDOW, HALF, INPUT, PLACE, BACK, OUTPUT = (
    f"winograd_{step}" for step in ("window", "half", "input", "product", "back", "output")
)


def matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``A' [m, m + 2]``, ``G [m + 2, 3]`` and ``B' [m + 2, m + 2]`` of F(m, 3), float64."""
    points = np.array(_POINTS[m])
    n = m + _TAPS - 1
    back, weights, forth = np.zeros((m, n)), np.zeros((n, _TAPS)), np.zeros((n, n))
    for j, point in enumerate(points):
        others = np.delete(points, j)
        back[:, j] = point ** np.arange(m)
        weights[j] = point ** np.arange(_TAPS) / np.prod(point - others)
        forth[j, :-1] = np.poly(others)[::-1]
    back[-1, -1] = weights[-1, -1] = 1
    forth[-1] = np.poly(points)[::-1]
    for matrix in (back, weights, forth):
        matrix[np.abs(matrix) < 1e-12] = 0
    return back, weights, forth


def pack(weight: np.ndarray, m: int, columns: int) -> np.ndarray:
    """``[out, 3, 3, in]`` to ``[(m + 2) ** 2, out / columns, in, columns]``, transformed."""
    _, g, _ = matrices(m)
    turned = np.einsum("ai,oijc,bj->abco", g, weight.astype(np.float64), g)
    return np.stack([dense.pack(u.astype(weight.dtype), columns) for u in turned.reshape(-1, *turned.shape[2:])])


def _odd_even(matrix: np.ndarray, at: int, terms: Sequence[Any]) -> Any:
    """Row ``at`` of ``matrix`` times ``terms``, as the sum of its even and its odd terms.

    The rows of opposite points differ by the sign of one of the two, so that a compiler finds what they share.
    """
    factors, parts = [], []
    for parity in (0, 1):
        row = matrix[at, parity::2]
        if row.any():
            factors.append(row[np.flatnonzero(row)[-1]])
            parts.append(_sum(row / factors[-1], terms[parity::2]))
    return _sum(factors, parts)


def _opposites(matrix: np.ndarray, at: int, terms: Sequence[Any]) -> Any:
    """Row ``at`` of ``matrix`` times ``terms``; terms of opposite points are first added or subtracted."""
    row, left = matrix[at], list(range(matrix.shape[1]))
    factors, parts = [], []
    while left:
        j = left.pop(0)
        twin = next((k for k in left if np.allclose(np.abs(matrix[:, k]), np.abs(matrix[:, j])) and row[k]), None)
        if not row[j]:
            continue
        part = terms[j]
        if twin is not None:
            left.remove(twin)
            part = part + terms[twin] if row[twin] * row[j] > 0 else part - terms[twin]
        factors.append(row[j])
        parts.append(part)
    return _sum(factors, parts)


def _sum(factors: Sequence[float], parts: Sequence[Any]) -> Any:
    """Sum of products with constants; those that are 0, 1 or -1 cost no multiplication."""
    from tvm import tirx

    total: Any = None
    for factor, part in sorted(zip(factors, parts, strict=True), key=lambda p: abs(abs(p[0]) - 1) > 1e-9):
        if not factor:
            continue
        unit = abs(abs(factor) - 1) < 1e-9
        product = part if unit else part * tirx.const(abs(float(factor)), "float32")
        if total is None:
            total = product if factor > 0 else tirx.const(0, "float32") - product
        else:
            total = total + product if factor > 0 else total - product
    return total


def _row(index: Any, rows: Sequence[Any]) -> Any:
    """The one of ``rows`` that an index, a number once its loop is unrolled, selects."""
    from tvm import tirx

    value = rows[-1]
    for i in reversed(range(len(rows) - 1)):
        value = tirx.Select(index == i, rows[i], value)
    return value


@dataclass(frozen=True)
class Plan:
    """How to compute a convolution.

    Attributes:
        m: height and width of a tile of results.
        block: tiles of a block, vertically and horizontally.
        shape: of a register tile; its rows are tiles of results and divide those of a block.
    """

    m: int
    block: tuple[int, int]
    shape: Shape


@functools.cache
def choose(
    batch: int, height: int, width: int, inner: int, out: int, have: Vectors, sizes: tuple[int, ...] = tuple(_POINTS)
) -> Plan | None:
    """The cheapest plan for ``height x width`` results of ``out`` channels, or None where none pays.

    Plans have a rank by their block: each block has the register tile that costs it least.

    Args:
        batch, height, width, inner, out: of the result, and channels of the input.
        have: the vector registers; where a size is chosen, a plan of that size is taken whether it pays or not.
        sizes: of tiles that may be taken.
    """
    direct = tile.steps(tile.choose(width, out, 9 * inner, have), width, out, 9 * inner, have) * batch * height
    plans = [
        Plan(m, (high, broad), shape)
        for m in sizes
        for high, broad in itertools.product(_divisions(-(-height // m)), _divisions(-(-width // m)))
        if high * broad <= _MOST_TILES
        for shape in tile.shapes(have)
        if high * broad % shape.rows == 0 and shape.columns < out + have.lanes
    ]
    cost = {plan: _cost(plan, batch, height, width, inner, out, have) for plan in plans}
    cheapest: dict[Any, Plan] = {}
    for plan in sorted(plans, key=cost.__getitem__):
        cheapest.setdefault((plan.m, plan.block), plan)
    if not plans or (have.choice.size is None and min(cost.values()) > _GAIN * direct):
        return None
    return tile.ranked(list(cheapest.values()), cost.__getitem__, have)


def _divisions(extent: int) -> list[int]:
    """Sizes of blocks that cover an extent with the fewest tiles beyond its edge for their number."""
    return sorted({-(-extent // count) for count in range(1, extent + 1)})


def _cost(plan: Plan, batch: int, height: int, width: int, inner: int, out: int, have: Vectors) -> float:
    """Steps that a plan costs."""
    m, tiles, n = plan.m, math.prod(plan.block), plan.m + _TAPS - 1
    blocks = batch * math.prod(-(-e // (m * b)) for e, b in zip((height, width), plan.block, strict=True))
    vectors_in, vectors_out = inner / lanes(inner, have), out / lanes(out, have)
    wide = padded(out, plan.shape.columns)
    product = n * n * tile.steps(plan.shape, tiles, wide, inner, have)
    halo = math.prod(m * b + _TAPS - 1 for b in plan.block) * vectors_in * 2
    transforms = tiles * (vectors_in * _FORTH[m] + vectors_out * _BACK[m]) + halo
    block, weights = 4 * n * n * tiles * (inner + wide), 4 * n * n * inner * wide
    far = max(block - _CACHE, 0) + (weights if block + weights > 2 * _CACHE else 0)
    return blocks * (product + transforms + far / _BYTES_PER_STEP)


def error(weight: np.ndarray, m: int) -> float:
    """Largest error of a result in float32, as a part of the largest result, on random inputs with these weights.

    Args:
        weight: ``[out, 3, 3, in]``.
        m: as of :func:`matrices`.
    """
    back, g, forth = matrices(m)
    n = m + _TAPS - 1
    random = np.random.default_rng(0)
    x = random.standard_normal((_SAMPLES, n, n, weight.shape[3])).astype(np.float32)
    x[1::2] = np.abs(x[1::2])  # what follows a ReLU does not cancel
    weight = weight[:: max(1, len(weight) // _SAMPLES)].astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (_TAPS, _TAPS), axis=(1, 2))
    exact = np.einsum("phwcij,oijc->phwo", windows, weight, optimize=True)
    turned = np.einsum("ai,oijc,bj->oabc", g, weight, g, optimize=True).astype(np.float32)
    single = [matrix.astype(np.float32) for matrix in (forth, back)]
    spread = np.einsum("ei,peic->peic"[:0] + "ai,pijc,ej->paec", single[0], x, single[0], optimize=True)
    product = np.einsum("paec,oaec->paeo", spread, turned, optimize=True)
    found = np.einsum("ia,paeo,je->pijo", single[1], product, single[1], optimize=True)
    return float(np.abs(found - exact).max() / max(np.abs(exact).max(), 1e-30))


def convolution(x: Any, packed: Any, channels: int, rows: int, padding: Sequence[int], block: tuple[int, int]) -> Any:
    """A 3 x 3 convolution of ``x [batch, height, width, in]`` with weights as :func:`pack` stores them.

    Args:
        x: the input.
        packed: the weights.
        channels: of the output.
        rows: tiles of a register tile; divides the tiles of a block.
        padding: top, left, bottom, right.
        block: tiles of a block, vertically and horizontally.
    """
    from tvm import te, tirx

    batch, height, width, inner = (int(d) for d in x.shape)
    points, wide, _, columns = (int(d) for d in packed.shape)
    n = math.isqrt(points)
    m = n - _TAPS + 1
    a_t, _, b_t = matrices(m)
    top, left, bottom, right = padding
    out_h, out_w = height + top + bottom - _TAPS + 1, width + left + right - _TAPS + 1
    high, broad = block
    blocks_h, blocks_w = (-(-o // (m * b)) for o, b in zip((out_h, out_w), block, strict=True))
    tiles = high * broad

    def pixel(b: Any, h: Any, w: Any, c: Any) -> Any:
        y, z = h - top, w - left
        inside = tirx.all(y >= 0, y < height, z >= 0, z < width)
        return tirx.if_then_else(inside, x[b, y, z, c], tirx.const(0, x.dtype))

    reach = (blocks_h * high * m + n - m, blocks_w * broad * m + n - m)
    windows: Any = te.compute((batch, *reach, inner), pixel, name=WINDOW)

    def half(b: Any, hb: Any, wb: Any, p: Any, a: Any, j: Any, c: Any) -> Any:
        h, w = (hb * high + p // broad) * m, (wb * broad + p % broad) * m + j
        terms = [windows[b, h + i, w, c] for i in range(n)]
        return _row(a, [_odd_even(b_t, i, terms) for i in range(n)])

    halves: Any = te.compute((batch, blocks_h, blocks_w, tiles, n, n, inner), half, name=HALF)

    def other(b: Any, hb: Any, wb: Any, a: Any, e: Any, p: Any, c: Any) -> Any:
        terms = [halves[b, hb, wb, p, a, j, c] for j in range(n)]
        return _row(e, [_odd_even(b_t, j, terms) for j in range(n)])

    turned: Any = te.compute((batch, blocks_h, blocks_w, n, n, tiles, inner), other, name=INPUT)
    k = te.reduce_axis((0, inner), "k")

    def value(b: Any, hb: Any, wb: Any, a: Any, e: Any, jo: Any, io: Any, ii: Any, ji: Any) -> Any:
        return te.sum(turned[b, hb, wb, a, e, io * rows + ii, k] * packed[a * n + e, jo, k, ji], axis=k)

    products: Any = te.compute((batch, blocks_h, blocks_w, n, n, wide, tiles // rows, rows, columns), value, name=TILE)
    placed: Any = te.compute(
        (batch, blocks_h, blocks_w, n, n, tiles, wide * columns),
        lambda b, hb, wb, a, e, p, j: products[b, hb, wb, a, e, j // columns, p // rows, p % rows, j % columns],
        name=PLACE,
    )

    def first(b: Any, hb: Any, wb: Any, p: Any, i: Any, e: Any, c: Any) -> Any:
        terms = [placed[b, hb, wb, a, e, p, c] for a in range(n)]
        return _row(i, [_opposites(a_t, r, terms) for r in range(m)])

    back: Any = te.compute((batch, blocks_h, blocks_w, tiles, m, n, wide * columns), first, name=BACK)

    def last(b: Any, hb: Any, wb: Any, h: Any, w: Any, c: Any) -> Any:
        terms = [back[b, hb, wb, h // m * broad + w // m, h % m, e, c] for e in range(n)]
        return _row(w % m, [_opposites(a_t, r, terms) for r in range(m)])

    size = (high * m, broad * m)
    result: Any = te.compute((batch, blocks_h, blocks_w, *size, wide * columns), last, name=OUTPUT)
    return te.compute(
        (batch, out_h, out_w, channels),
        lambda b, h, w, c: result[b, h // size[0], w // size[1], h % size[0], w % size[1], c],
        name="winograd",
    )


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that :func:`convolution` made and TVM appended blocks to.

    Threads share the blocks of tiles, or each step of every block where there are few: a block of a small image is all
    of it, since weights that are read once for many tiles are what makes the algorithm pay.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    for name in names[: names.index(WINDOW)]:
        plan.compute_inline(plan.get_sblock(name))
    for name in names[names.index(OUTPUT) + 1 : -1]:
        plan.compute_inline(plan.get_sblock(name))
    of = {name: plan.get_sblock(name) for name in (WINDOW, HALF, INPUT, TILE, PLACE, BACK, OUTPUT)}
    last = plan.get_sblock(names[-1])
    rows, columns = (int(e) for e in plan.get(of[TILE]).writes[0].source.shape[-2:])
    _, _, _, high, broad, _ = (int(e) for e in plan.get(of[OUTPUT]).writes[0].source.shape)
    m = int(plan.get(of[BACK]).writes[0].source.shape[4])
    shared: list[Sequence[Any]] = []  # loops of the steps of a block
    # the output, block by block
    batch, h, w, channel = plan.get_loops(last)
    hb, h = plan.split(h, [None, high])
    wb, w = plan.split(w, [None, broad])
    co, lane = plan.split(channel, [None, lanes(int(plan.get(channel).extent), have)])
    plan.reorder(batch, hb, wb, h, w, co, lane)
    plan.vectorize(lane)
    shared.append((h, w))
    # transformed back tile by tile
    plan.compute_at(of[OUTPUT], wb, preserve_unit_loops=True)
    h, w, channel = plan.get_loops(of[OUTPUT])[-3:]
    hi, i = plan.split(h, [None, m])
    wi, j = plan.split(w, [None, m])
    co, lane = plan.split(channel, [None, lanes(int(plan.get(channel).extent), have)])
    plan.reorder(hi, wi, co, i, j, lane)
    shared.append((hi, wi))
    for loop in (i, j):
        plan.unroll(loop)
    plan.vectorize(lane)
    _unrolled(plan, of[BACK], co)
    # the products
    plan.compute_at(of[PLACE], wb, preserve_unit_loops=True)
    plan.storage_align(of[PLACE], 0, 4, 1024, 16)
    *_, a, e, p, column = plan.get_loops(of[PLACE])
    po, pi = plan.split(p, [None, rows])
    jo, ji = plan.split(column, [None, columns])
    outer = (po, jo) if have.choice.rows_outside else (jo, po)
    plan.reorder(*outer, pi, ji)
    shared.append((a, e, outer[0]))
    plan.compute_at(of[TILE], outer[-1], preserve_unit_loops=True)
    plan.set_scope(of[TILE], 0, "local")
    first = tile.in_registers(plan, of[TILE], 9, have)
    vector, lane = plan.split(ji, [None, have.lanes])
    plan.vectorize(lane)
    plan.unroll(vector)
    plan.unroll(pi)
    # the input
    plan.compute_at(of[INPUT], wb, preserve_unit_loops=True)
    plan.storage_align(of[INPUT], 0, 4, 1024, 16)
    a, e, p, c = plan.get_loops(of[INPUT])[-4:]
    co, lane = plan.split(c, [None, lanes(int(plan.get(c).extent), have)])
    plan.reorder(p, co, a, e, lane)
    shared.append((p, co))
    plan.vectorize(lane)
    plan.unroll(a)
    plan.unroll(e)
    _unrolled(plan, of[HALF], co)
    plan.compute_at(of[WINDOW], wb, preserve_unit_loops=True)
    *_, h, w, channel = plan.get_loops(of[WINDOW])
    shared.append((h, w))
    plan.vectorize(plan.split(channel, [None, lanes(int(plan.get(channel).extent), have)])[1])
    if parallel and math.prod(int(plan.get(loop).extent) for loop in (batch, hb, wb)) >= tile.SHARES:
        plan.parallel(plan.fuse(batch, hb, wb))
    elif parallel:
        for loops in shared:
            plan.parallel(plan.fuse(*loops))
    plan.decompose_reduction(of[TILE], first)
    return plan.mod


def _unrolled(plan: Any, block: Any, loop: Any) -> None:
    """Compute a transformed tile of one vector of channels in registers, at a loop."""
    plan.compute_at(block, loop, preserve_unit_loops=True)
    plan.set_scope(block, 0, "local")
    *_, last = own = plan.get_loops(block)[-3:]
    for each in own[:-1]:
        plan.unroll(each)
    plan.vectorize(last)


def lanes(extent: int, have: Vectors) -> int:
    """The widest vector that divides an extent."""
    return math.gcd(extent, have.lanes)


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.conv2d`` of float32 over NHWC and OHWI as :func:`convolution`, or None where that does not pay."""
    from tvm import relax

    values, attrs = conv.constant(call), call.attrs
    strides, dilation = ([int(v) for v in p] for p in (attrs.strides, attrs.dilation))
    if values is None or values.shape[1:3] != (_TAPS, _TAPS) or int(attrs.groups) > 1 or {*strides, *dilation} != {1}:
        return None
    x, (batch, out_h, out_w, out) = call.args[0], (int(d) for d in call.ty.shape)
    sizes = tuple(_POINTS) if have.choice.size is None else tuple(m for m in _POINTS if m == have.choice.size)
    while (plan := choose(batch, out_h, out_w, values.shape[3], out, have, sizes)) is not None:
        if error(values, plan.m) <= _BUDGET:
            break
        sizes = tuple(m for m in sizes if m < plan.m)
    if plan is None:
        return None
    packed = relax.const(pack(values, plan.m, plan.shape.columns))
    padding = [int(p) for p in attrs.padding]
    how = {"primfunc_name_hint": f"winograd{plan.m}", "primfunc_attrs": tile.attributes(out_h * out_w, out)}
    return bb.call_te(convolution, x, packed, out, plan.shape.rows, padding, plan.block, **how)
