"""Maxima over windows of channels-last pictures: those of the lines of a window, then of its columns.

The maximum over a rectangle is the maximum over its lines' maxima, so that ``k + k`` comparisons replace ``k * k``. A
window that hangs over the edge holds the pixel at the edge, which may therefore stand for those beyond it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from edgecompile.targets.tvm.schedules.tile import Vectors

LINES = "line_maxima"
_FUSES_WHAT_FOLLOWS = 4  # of tvm::relax::OpPatternKind
_BYTES = {"float32": 4, "int8": 1, "uint8": 1}
_LONGEST = 32  # comparisons that are written out


def maxima(x: Any, size: Sequence[int], window: Sequence[int], strides: Sequence[int], before: Sequence[int]) -> Any:
    """Maxima of ``x [batch, height, width, channels]``.

    Args:
        x: the input.
        size: height and width of the result.
        window: its height and width.
        strides: of the window.
        before: lines and columns that the first window hangs over the edge.
    """
    from tvm import te, tirx

    batch, height, width, channels = (int(d) for d in x.shape)

    def largest(at: Any, position: Any, axis: int, extent: int) -> Any:
        start = position * strides[axis] - before[axis]
        values = [at(tirx.max(tirx.min(start + k, extent - 1), 0)) for k in range(window[axis])]
        return functools.reduce(tirx.max, values)

    lines: Any = te.compute(
        (batch, height, size[1], channels),
        lambda n, h, w, c: largest(lambda at: x[n, h, at, c], w, 1, width),
        name=LINES,
    )
    return te.compute(
        (batch, *size, channels),
        lambda n, h, w, c: largest(lambda at: lines[n, at, w, c], h, 0, height),
        name="maxima",
    )


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.max_pool2d`` over NHWC as :func:`maxima`, or None where it has another form."""
    attrs = call.attrs
    size, strides, dilation, padding = (
        [int(v) for v in p] for p in (attrs.pool_size, attrs.strides, attrs.dilation, attrs.padding)
    )
    _, *extents, _ = (int(d) for d in call.args[0].ty.shape)
    _, *out, _ = (int(d) for d in call.ty.shape)
    if (attrs.layout, attrs.out_layout) != ("NHWC", "NHWC") or dilation != [1, 1] or max(size) > _LONGEST:
        return None
    last = [(o - 1) * s - p for o, s, p in zip(out, strides, padding[:2], strict=True)]
    if any(p >= k for p, k in zip(padding[:2], size, strict=True)) or any(
        at >= e for at, e in zip(last, extents, strict=True)
    ):
        return None
    return bb.call_te(
        lambda x: maxima(x, out, size, strides, padding[:2]),
        call.args[0],
        primfunc_name_hint="max_pool2d",
        primfunc_attrs={"op_pattern": _FUSES_WHAT_FOLLOWS},
    )


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that has a block :data:`LINES`."""
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    for name in names[:-1]:
        if name != LINES:
            plan.compute_inline(plan.get_sblock(name))
    for name in (LINES, names[-1]):
        block = plan.get_sblock(name)
        kind = str(plan.get(block).writes[0].source.dtype).removeprefix("T.")
        *outer, last = plan.get_loops(block)
        step = math.gcd(int(plan.get(last).extent), 4 * have.lanes // _BYTES.get(kind, 4))
        if step > 1:
            plan.vectorize(plan.split(last, [None, step])[1])
        if parallel and outer:
            plan.parallel(plan.fuse(*outer))
    return plan.mod
