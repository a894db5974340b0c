"""Convolutions over pixels in channels-last order: dense, pointwise and depthwise.

With channels innermost, the columns of a tile are output channels, which the weights are packed for, and its rows are
neighbouring pixels, whatever the stride: every operand is a contiguous vector or one number. A pointwise convolution
is a product of matrices whose rows are all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules import dense
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
    depthwise: bool,
) -> Any:
    """A convolution of ``x [batch, height, width, in]`` with weights as :func:`pack` stores them.

    Args:
        x: the input.
        packed: the weights; of a depthwise convolution the ``in`` axis has extent 1.
        channels: of the output.
        rows: of a tile.
        strides, padding, dilation: as of ``relax.op.nn.conv2d``; padding is top, left, bottom, right.
        depthwise: each output channel is that of one input channel.
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
    need_c = wide * columns if depthwise else inner
    if any(padding) or need_w > width or need_c > inner:
        source = x

        def pad(n: Any, h: Any, w: Any, c: Any) -> Any:
            inside = [h >= top, h < top + height, w >= left, w < left + width]
            inside += [c < inner] if need_c > inner else []
            return tirx.if_then_else(tirx.all(*inside), source[n, h - top, w - left, c], tirx.const(0, source.dtype))

        x = te.compute((batch, need_h, need_w, need_c), pad, name=f"{PREPARE}_x")
    kh: Any = te.reduce_axis((0, kernel_h), "kh")
    kw: Any = te.reduce_axis((0, kernel_w), "kw")
    c = te.reduce_axis((0, depth), "c")

    def value(n: Any, jo: Any, h: Any, wo: Any, wi: Any, ji: Any) -> Any:
        y, z = h * strides[0] + kh * dilation[0], (wo * rows + wi) * strides[1] + kw * dilation[1]
        if depthwise:
            return te.sum(x[n, y, z, jo * columns + ji] * packed[jo, kh, kw, 0, ji], axis=[kh, kw])
        return te.sum(x[n, y, z, c] * packed[jo, kh, kw, c, ji], axis=[kh, kw, c])

    tiles: Any = te.compute((batch, wide, out_h, lines // rows, rows, columns), value, name=TILE)
    return te.compute(
        (batch, out_h, out_w, channels),
        lambda n, h, w, j: tiles[n, j // columns, h, w // rows, w % rows, j % columns],
        name="convolution",
    )


def _values(constant: Any) -> np.ndarray:
    return constant.value.numpy()


def spread(x: Any, strides: Sequence[int], before: Sequence[int], size: Sequence[int]) -> Any:
    """``x [batch, height, width, channels]`` with zeros between its pixels and around them.

    Args:
        x: the input.
        strides: distance of neighbouring pixels in the result.
        before: zeros above and left; negative where lines and columns are cut off.
        size: height and width of the result.
    """
    from tvm import te, tirx

    batch, height, width, channels = (int(d) for d in x.shape)

    def at(n: Any, h: Any, w: Any, c: Any) -> Any:
        inside, index = [], []
        for position, stride, offset, extent in zip((h, w), strides, before, (height, width), strict=True):
            shifted = position - offset
            inside += [shifted >= 0, shifted < extent * stride, tirx.floormod(shifted, stride) == 0]
            index.append(tirx.max(tirx.min(tirx.floordiv(shifted, stride), extent - 1), 0))
        return tirx.if_then_else(tirx.all(*inside), x[n, index[0], index[1], c], tirx.const(0, x.dtype))

    return te.compute((batch, *size, channels), at, name=f"{PREPARE}_spread")


def transposed(
    x: Any,
    packed: Any,
    channels: int,
    rows: int,
    strides: Sequence[int],
    before: Sequence[int],
    size: Sequence[int],
    dilation: Sequence[int],
    depthwise: bool,
) -> Any:
    """A transposed convolution: a convolution with turned weights of the input with zeros between its pixels.

    Args:
        x: the input.
        packed: the weights, turned by 180 degrees, as :func:`pack` stores them.
        channels, rows, dilation, depthwise: as of :func:`convolution`.
        strides, before, size: as of :func:`spread`.
    """
    wide = spread(x, strides, before, size)
    return convolution(wide, packed, channels, rows, (1, 1), (0, 0, 0, 0), dilation, depthwise)


def legalize_transposed(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.conv2d_transpose`` of float32 over NHWC and IOHW as :func:`transposed`, else by way of NCHW."""
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
    values = _values(weight)[:, :, ::-1, ::-1]
    values = values.transpose(0, 2, 3, 1) if depthwise else values.transpose(1, 2, 3, 0)
    reach = [(k - 1) * d for k, d in zip(values.shape[1:3], dilation, strict=True)]
    before = [r - p for r, p in zip(reach, padding[:2], strict=True)]
    size = [out_h + reach[0], out_w + reach[1]]
    shape = choose(out_w, out, values[0].size, have)
    packed = relax.const(pack(values, shape.columns))
    how = {"primfunc_name_hint": "conv2d_transpose", "primfunc_attrs": attributes(out_h * out_w, out)}
    return bb.call_te(transposed, x, packed, out, shape.rows, strides, before, size, dilation, depthwise, **how)


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.conv2d`` of float32 over NHWC and OHWI as a convolution above, or None where it has another form."""
    from tvm import relax
    from tvm.ir import GenericConst

    x, weight = call.args
    attrs = call.attrs
    if x.ty.dtype != "float32" or not isinstance(weight, GenericConst):
        return None
    if (attrs.data_layout, attrs.kernel_layout, attrs.out_layout) != ("NHWC", "OHWI", "NHWC"):
        return None
    values = _values(weight)
    (out, kernel_h, kernel_w, depth), inner = values.shape, int(x.ty.shape[3])
    groups = int(attrs.groups)
    depthwise = groups == inner == out and depth == 1 and groups > 1
    if groups > 1 and not depthwise:
        return None
    strides, padding, dilation = ([int(v) for v in p] for p in (attrs.strides, attrs.padding, attrs.dilation))
    batch, out_h, out_w, _ = (int(d) for d in call.ty.shape)
    if kernel_h == kernel_w == 1 and strides == [1, 1] and not any(padding) and not depthwise:
        rows = batch * out_h * out_w
        shape = choose(rows, out, depth, have)
        packed = relax.const(dense.pack(values.reshape(out, depth).T, shape.columns))
        how = {"primfunc_name_hint": "conv2d_1x1", "primfunc_attrs": attributes(rows, out)}
        return bb.call_te(dense.product, x, packed, out, shape.rows, **how)
    shape = choose(out_w, out, kernel_h * kernel_w * depth, have)
    packed = relax.const(pack(values, shape.columns))
    how = {
        "primfunc_name_hint": "depthwise_conv2d" if depthwise else "conv2d",
        "primfunc_attrs": attributes(out_h * out_w, out),
    }
    return bb.call_te(convolution, x, packed, out, shape.rows, strides, padding, dilation, depthwise, **how)
