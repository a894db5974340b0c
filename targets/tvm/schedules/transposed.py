"""Transposed convolutions in channels-last order, phase by phase.

With stride ``s`` the result at ``s a + b`` takes only the taps ``r`` with ``r = b + padding (mod s)``, from the pixels
``a + (b + padding) // s - t`` where ``r = (b + padding) mod s + s t``: each of the ``s`` phases ``b`` is a convolution
of stride 1 with every ``s``-th tap (Dumoulin and Visin, A guide to convolution arithmetic for deep learning, 2016,
section 4; Shi et al., Is the deconvolution layer the same as a convolutional layer?, 2016). No zero that lies between
pixels is ever multiplied; where the stride does not divide the kernel, phases with fewer taps have some of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules import conv, tile
from edgecompile.targets.tvm.schedules.tile import PREPARE, TILE, Shape, Vectors, padded

PLACE = "transposed_convolution"


def pack(weight: np.ndarray, strides: Sequence[int], padding: Sequence[int], columns: int) -> np.ndarray:
    """``[out, height, width, in]`` to ``[phase, phase, out / columns, taps, taps, in, columns]``.

    Args:
        weight: the weights.
        strides: of the transposed convolution.
        padding: top and left.
        columns: of a tile.
    """
    taps = [-(-k // s) for k, s in zip(weight.shape[1:3], strides, strict=True)]
    wide = np.zeros((weight.shape[0], taps[0] * strides[0], taps[1] * strides[1], weight.shape[3]), weight.dtype)
    wide[:, : weight.shape[1], : weight.shape[2]] = weight
    first = [[(b + p) % s for b in range(s)] for s, p in zip(strides, padding, strict=True)]
    return np.stack(
        [np.stack([conv.pack(wide[:, i :: strides[0], j :: strides[1]], columns) for j in first[1]]) for i in first[0]]
    )


def convolution(
    x: Any,
    packed: Any,
    channels: int,
    rows: int,
    padding: Sequence[int],
    size: Sequence[int],
    depthwise: bool,
) -> Any:
    """A transposed convolution of ``x [batch, height, width, in]`` with weights as :func:`pack` stores them.

    Args:
        x: the input.
        packed: the weights; of a depthwise convolution the ``in`` axis has extent 1.
        channels: of the output.
        rows: of a tile, a multiple of the horizontal stride: a tile has all phases of a line.
        padding: top and left.
        size: height and width of the result.
        depthwise: each output channel is that of one input channel.
    """
    from tvm import te, tirx

    batch, *pixels, inner = (int(d) for d in x.shape)
    *strides, wide, taps_h, taps_w, depth, columns = (int(d) for d in packed.shape)
    taps = (taps_h, taps_w)
    wide_w = padded(size[1], rows)
    lines = [-(-extent // s) for extent, s in zip((size[0], wide_w), strides, strict=True)]
    before = [t - 1 - p // s for t, p, s in zip(taps, padding, strides, strict=True)]
    need = [b + n + (s - 1 + p) // s for b, n, s, p in zip(before, lines, strides, padding, strict=True)]
    need_c = wide * columns if depthwise else inner

    def pad(n: Any, h: Any, w: Any, c: Any) -> Any:
        y, z = h - before[0], w - before[1]
        inside = [y >= 0, y < pixels[0], z >= 0, z < pixels[1], *([c < inner] if need_c > inner else [])]
        return tirx.if_then_else(tirx.all(*inside), x[n, y, z, c], tirx.const(0, x.dtype))

    copy: Any = te.compute((batch, *need, need_c), pad, name=f"{PREPARE}_x")
    th: Any = te.reduce_axis((0, taps[0]), "th")
    tw: Any = te.reduce_axis((0, taps[1]), "tw")
    c: Any = te.reduce_axis((0, depth), "c")

    def value(n: Any, bh: Any, jo: Any, h: Any, wo: Any, wi: Any, ji: Any) -> Any:
        bw = tirx.floormod(wi, strides[1])
        y = h + tirx.floordiv(bh + padding[0], strides[0]) + before[0] - th
        z = wo * (rows // strides[1]) + tirx.floordiv(wi + padding[1], strides[1]) + before[1] - tw
        if depthwise:
            return te.sum(copy[n, y, z, jo * columns + ji] * packed[bh, bw, jo, th, tw, 0, ji], axis=[th, tw])
        return te.sum(copy[n, y, z, c] * packed[bh, bw, jo, th, tw, c, ji], axis=[th, tw, c])

    tiles: Any = te.compute((batch, strides[0], wide, lines[0], wide_w // rows, rows, columns), value, name=TILE)

    def place(n: Any, h: Any, w: Any, j: Any) -> Any:
        return tiles[n, h % strides[0], j // columns, h // strides[0], w // rows, w % rows, j % columns]

    return te.compute((batch, *size, channels), place, name=PLACE)


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that :func:`convolution` made and TVM appended blocks to.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    position = names.index(TILE)
    tile.prepare(plan, names[:position], have, parallel=parallel)
    for name in names[position + 1 : -1]:
        plan.compute_inline(plan.get_sblock(name))
    block = plan.get_sblock(TILE)
    extents = [int(extent) for extent in plan.get(block).writes[0].source.shape]
    batch, h, w, column = plan.get_loops(plan.get_sblock(names[-1]))
    h, phase_h = plan.split(h, [None, extents[1]])
    row_tile, row = plan.split(w, [None, extents[-2]])
    column_tile, column = plan.split(column, [None, extents[-1]])
    outer = (batch, column_tile, phase_h, h, row_tile)
    plan.reorder(*outer, row, column)
    plan.compute_at(block, row_tile, preserve_unit_loops=True)
    plan.set_scope(block, 0, "local")
    if parallel:
        plan.parallel(plan.fuse(*outer))
    first = tile.in_registers(plan, block, len(extents), have)
    wide, lane = plan.split(column, [None, have.lanes])
    plan.vectorize(lane)
    plan.unroll(wide)
    plan.unroll(row)
    plan.decompose_reduction(block, first)
    return plan.mod


def choose(width: int, out: int, depth: int, stride: int, have: Vectors) -> Shape:
    """The tile for ``width`` results of ``out`` channels in a line, its rows a multiple of the stride."""
    fitting = [
        shape
        for shape in tile.shapes(have)
        if shape.rows % stride == 0 and (shape.rows + stride) * shape.columns // have.lanes < have.count
    ]
    return tile.ranked(fitting, lambda shape: tile.steps(shape, width, out, depth, have), have)


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.conv2d_transpose`` of float32 over NHWC and IOHW as :func:`convolution`, else by way of NCHW."""
    from tvm import relax
    from tvm.ir import GenericConst

    x, weight = call.args
    attrs = call.attrs
    if (attrs.data_layout, attrs.kernel_layout, attrs.out_layout) != ("NHWC", "IOHW", "NHWC"):
        return None
    groups, inner = int(attrs.groups), int(x.ty.shape[3])
    strides, padding, extra, dilation = (
        tuple(int(v) for v in p) for p in (attrs.strides, attrs.padding, attrs.output_padding, attrs.dilation)
    )
    _, out_h, out_w, out = (int(d) for d in call.ty.shape)
    constant = isinstance(weight, GenericConst) and x.ty.dtype == "float32"
    depthwise = constant and groups == inner == out and groups > 1
    if not constant or (groups > 1 and not depthwise):
        operator: Any = relax.op.nn.conv2d_transpose
        planar = operator(relax.op.permute_dims(x, [0, 3, 1, 2]), weight, strides, padding, extra, dilation, groups)
        return relax.op.permute_dims(planar, [0, 2, 3, 1])
    values = weight.value.numpy().transpose((0, 2, 3, 1) if depthwise else (1, 2, 3, 0))
    values = dilated(values, dilation)
    shape = choose(out_w, out, -(-values[0].size // (strides[0] * strides[1])), strides[1], have)
    packed = relax.const(pack(values, strides, padding[:2], shape.columns))
    how = {"primfunc_name_hint": "conv2d_transpose", "primfunc_attrs": tile.attributes(out_h * out_w, out)}
    return bb.call_te(convolution, x, packed, out, shape.rows, padding[:2], (out_h, out_w), depthwise, **how)


def dilated(weight: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    """``[out, height, width, in]`` with zeros between the taps."""
    out, height, width, inner = weight.shape
    wide = np.zeros((out, (height - 1) * dilation[0] + 1, (width - 1) * dilation[1] + 1, inner), weight.dtype)
    wide[:, :: dilation[0], :: dilation[1]] = weight
    return wide
