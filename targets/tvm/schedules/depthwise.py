"""Depthwise convolutions in channels-last order, and grouped ones with one output channel in each group.

Columns of a tile are groups. There is no product of matrices: each operand is used for as many results as the kernel
has taps, so what counts is where it is read from. A band of lines is copied, padded, for one vector of channels, and
stays in the nearest cache while its results are computed; a tile is one vector wide and few pixels long, since the
pixels under the taps of a line take registers as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecompile.targets.tvm.schedules import tile
from edgecompile.targets.tvm.schedules.tile import PREPARE, TILE, Shape, Vectors, padded

PLACE = "depthwise_convolution"
_BAND = 16  # lines of results that one copy serves


def choose(width: int, have: Vectors) -> Shape:
    """The tile for lines of ``width`` results: a quarter of the registers at most, and the fewest beyond the edge."""
    most = have.count // 4
    rows = tile.ranked(range(1, most + 1), lambda rows: (padded(width, rows) * (1 + 1 / rows), -rows), have)
    return Shape(rows, have.lanes)


def convolution(
    x: Any,
    packed: Any,
    channels: int,
    rows: int,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """A convolution of ``x [batch, height, width, in]`` with as many groups as output channels.

    Args:
        x: the input.
        packed: the weights as :func:`edgecompile.targets.tvm.schedules.conv.pack` stores them.
        channels: of the output; the input has this times the ``in`` axis of the weights.
        rows: of a tile.
        strides, padding, dilation: as of ``relax.op.nn.conv2d``; padding is top, left, bottom, right.
    """
    from tvm import te, tirx

    batch, height, width, _ = (int(d) for d in x.shape)
    wide, kernel_h, kernel_w, depth, columns = (int(d) for d in packed.shape)
    top, left, bottom, right = padding
    reach_h, reach_w = (kernel_h - 1) * dilation[0] + 1, (kernel_w - 1) * dilation[1] + 1
    out_h = (height + top + bottom - reach_h) // strides[0] + 1
    out_w = (width + left + right - reach_w) // strides[1] + 1
    lines = padded(out_w, rows)
    need = (padded(out_h, _BAND) - 1) * strides[0] + reach_h, (lines - 1) * strides[1] + reach_w

    def pad(n: Any, h: Any, w: Any, t: Any, c: Any) -> Any:
        inside = [h >= top, h < top + height, w >= left, w < left + width]
        inside += [c < channels] if channels % columns else []
        return tirx.if_then_else(tirx.all(*inside), x[n, h - top, w - left, c * depth + t], tirx.const(0, x.dtype))

    copy: Any = te.compute((batch, *need, depth, wide * columns), pad, name=f"{PREPARE}_x")
    kh: Any = te.reduce_axis((0, kernel_h), "kh")
    kw: Any = te.reduce_axis((0, kernel_w), "kw")
    t: Any = te.reduce_axis((0, depth), "t")

    def value(n: Any, jo: Any, h: Any, wo: Any, wi: Any, ji: Any) -> Any:
        y, z = h * strides[0] + kh * dilation[0], (wo * rows + wi) * strides[1] + kw * dilation[1]
        return te.sum(copy[n, y, z, t, jo * columns + ji] * packed[jo, kh, kw, t, ji], axis=[kh, t, kw])

    tiles: Any = te.compute((batch, wide, padded(out_h, _BAND), lines // rows, rows, columns), value, name=TILE)
    return te.compute(
        (batch, out_h, out_w, channels),
        lambda n, h, w, j: tiles[n, j // columns, h, w // rows, w % rows, j % columns],
        name=PLACE,
    )


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that :func:`convolution` made and TVM appended blocks to.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    position = names.index(TILE)
    for name in [*names[: position - 1], *names[position + 1 : -1]]:
        plan.compute_inline(plan.get_sblock(name))
    copy, block, last = (plan.get_sblock(names[i]) for i in (position - 1, position, -1))
    extents = [int(extent) for extent in plan.get(block).writes[0].source.shape]
    batch, h, w, column = plan.get_loops(last)
    band, h = plan.split(h, [None, _BAND])
    row_tile, row = plan.split(w, [None, extents[-2]])
    column_tile, column = plan.split(column, [None, extents[-1]])
    plan.reorder(batch, column_tile, band, h, row_tile, row, column)
    plan.compute_at(block, row_tile, preserve_unit_loops=True)
    plan.set_scope(block, 0, "local")
    plan.compute_at(copy, band, preserve_unit_loops=True)
    plan.vectorize(plan.get_loops(copy)[-1])
    if parallel:
        plan.parallel(plan.fuse(batch, column_tile, band))
    first = tile.in_registers(plan, block, len(extents), have)
    plan.vectorize(column)
    plan.unroll(row)
    plan.decompose_reduction(block, first)
    return plan.mod
