"""Convolutions over pixels in channels-last order: dense, pointwise and grouped.

With channels innermost, the columns of a tile are output channels, which the weights are packed for, and its rows are
neighbouring pixels, whatever the stride: every operand is a contiguous vector or one number. A pointwise convolution
is a product of matrices whose rows are all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules import dense, depthwise
from edgecompile.targets.tvm.schedules.tile import PREPARE, TILE, Vectors, attributes, choose, padded


def pack(weight: np.ndarray, columns: int) -> np.ndarray:
    """``[out, height, width, in]`` to ``[out / columns, height, width, in, columns]``, filled with zeros."""
    out = weight.shape[0]
    wide = np.zeros((padded(out, columns), *weight.shape[1:]), weight.dtype)
    wide[:out] = weight
    return np.ascontiguousarray(np.moveaxis(wide.reshape(-1, columns, *weight.shape[1:]), 1, -1))


def convolution(
    x: Any,
    packed: Any,
    channels: int,
    rows: int,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """A convolution of ``x [batch, height, width, in]`` with weights as :func:`pack` stores them.

    Args:
        x: the input.
        packed: the weights, those of one group after the other.
        channels: of the output.
        rows: of a tile.
        strides, padding, dilation: as of ``relax.op.nn.conv2d``; padding is top, left, bottom, right.
        groups: of channels; a tile has those of one group.
    """
    from tvm import te, tirx

    batch, height, width, inner = (int(d) for d in x.shape)
    wide, kernel_h, kernel_w, depth, columns = (int(d) for d in packed.shape)
    top, left, bottom, right = padding
    reach_h, reach_w = (kernel_h - 1) * dilation[0] + 1, (kernel_w - 1) * dilation[1] + 1
    out_h = (height + top + bottom - reach_h) // strides[0] + 1
    out_w = (width + left + right - reach_w) // strides[1] + 1
    lines = padded(out_w, rows)
    need_h = (out_h - 1) * strides[0] + reach_h
    need_w = (lines - 1) * strides[1] + reach_w
    if any(padding) or need_w > width:
        source = x

        def pad(n: Any, h: Any, w: Any, c: Any) -> Any:
            inside = tirx.all(h >= top, h < top + height, w >= left, w < left + width)
            return tirx.if_then_else(inside, source[n, h - top, w - left, c], tirx.const(0, source.dtype))

        x = te.compute((batch, need_h, need_w, inner), pad, name=f"{PREPARE}_x")
    kh: Any = te.reduce_axis((0, kernel_h), "kh")
    kw: Any = te.reduce_axis((0, kernel_w), "kw")
    c: Any = te.reduce_axis((0, depth), "c")
    per_group = wide // groups

    def value(n: Any, jo: Any, h: Any, wo: Any, wi: Any, ji: Any) -> Any:
        y, z = h * strides[0] + kh * dilation[0], (wo * rows + wi) * strides[1] + kw * dilation[1]
        first = jo // per_group * depth if groups > 1 else 0
        return te.sum(x[n, y, z, first + c] * packed[jo, kh, kw, c, ji], axis=[kh, kw, c])

    tiles: Any = te.compute((batch, wide, out_h, lines // rows, rows, columns), value, name=TILE)

    def place(n: Any, h: Any, w: Any, j: Any) -> Any:
        if groups == 1:
            return tiles[n, j // columns, h, w // rows, w % rows, j % columns]
        of = channels // groups
        return tiles[n, j // of * per_group + j % of // columns, h, w // rows, w % rows, j % of % columns]

    return te.compute((batch, out_h, out_w, channels), place, name="convolution")


def merged(weight: np.ndarray, groups: int, least: int) -> tuple[np.ndarray, int]:
    """Weights of a grouped convolution with groups merged until each has ``least`` output channels, or one is left.

    What a merged group's channels have nothing to do with gets zeros.

    Args:
        weight: ``[out, height, width, in]``.
        groups: of channels.
        least: output channels.

    Returns:
        the weights and the number of groups that are left.
    """
    out, height, width, depth = weight.shape
    of = out // groups
    together = next((d for d in range(1, groups) if groups % d == 0 and d * of >= least), groups)
    wide = np.zeros((groups // together, together, of, height, width, together, depth), weight.dtype)
    for g in range(together):
        wide[:, g, ..., g, :] = weight.reshape(-1, together, of, height, width, depth)[:, g]
    return wide.reshape(out, height, width, together * depth), groups // together


def constant(call: Any) -> np.ndarray | None:
    """The weights ``[out, height, width, in]`` of a ``relax.nn.conv2d`` of float32 over NHWC, or None of another."""
    from tvm.ir import GenericConst

    (x, weight), attrs = call.args, call.attrs
    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
    if x.ty.dtype != "float32" or not isinstance(weight, GenericConst) or layouts != ("NHWC", "OHWI", "NHWC"):
        return None
    value: Any = weight
    return value.value.numpy()


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.conv2d`` of float32 over NHWC and OHWI as a convolution above, or None where it has another form."""
    from tvm import relax

    x, attrs, values = call.args[0], call.attrs, constant(call)
    if values is None:
        return None
    groups, out = int(attrs.groups), values.shape[0]
    if 1 < groups < out:
        values, groups = merged(values, groups, have.lanes)
    _, kernel_h, kernel_w, depth = values.shape
    strides, padding, dilation = ([int(v) for v in p] for p in (attrs.strides, attrs.padding, attrs.dilation))
    batch, out_h, out_w, _ = (int(d) for d in call.ty.shape)
    if kernel_h == kernel_w == 1 and strides == [1, 1] and not any(padding) and groups == 1:
        rows = batch * out_h * out_w
        shape = choose(rows, out, depth, have)
        packed = relax.const(dense.pack(values.reshape(out, depth).T, shape.columns))
        how = {"primfunc_name_hint": "conv2d_1x1", "primfunc_attrs": attributes(rows, out)}
        return bb.call_te(dense.product, x, packed, out, shape.rows, **how)
    given = (strides, padding, dilation)
    if 1 < groups == out:
        shape = depthwise.choose(out_w, have)
        packed = relax.const(pack(values, shape.columns))
        how = {"primfunc_name_hint": "depthwise_conv2d", "primfunc_attrs": attributes(out_h * out_w, out)}
        return bb.call_te(depthwise.convolution, x, packed, out, shape.rows, *given, **how)
    of = out // groups
    shape = choose(out_w, of, kernel_h * kernel_w * depth, have)
    packed = np.concatenate([pack(part, shape.columns) for part in values.reshape(-1, of, *values.shape[1:])])
    how = {"primfunc_name_hint": "conv2d", "primfunc_attrs": attributes(out_h * out_w, out)}
    return bb.call_te(convolution, x, relax.const(packed), out, shape.rows, *given, groups, **how)
