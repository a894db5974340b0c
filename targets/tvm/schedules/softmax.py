"""Softmax over the last axis, row by row: largest value, exponentials, their sum, division.

Everything between the input and the output of a row stays in the nearest cache, and the input is read once from beyond
it. The largest value is subtracted first, so that no exponential overflows. Where vectors do not divide the row, the
last one ends with the row and begins within the one before it; what both hold counts once.
"""

from __future__ import annotations

import operator
from typing import Any

from edgecompile.targets.tvm.schedules import activation, rows
from edgecompile.targets.tvm.schedules.rows import SCALE, STEP
from edgecompile.targets.tvm.schedules.tile import Vectors

_LARGEST, _TOP, _POWERS, _SUMS = (f"{STEP}{of}" for of in ("largest", "top", "powers", "sums"))
_COMBINES = 3  # of tvm::relax::OpPatternKind: scale, bias and mask before it are fused into it


def softmax(x: Any, lanes: int) -> Any:
    """Softmax of ``x [..., n]`` over its last axis, by vectors of ``lanes`` of its values."""
    from tvm import te, tirx

    *lead, n = (int(d) for d in x.shape)
    wide = rows.vectors(n, lanes)
    v: Any = te.reduce_axis((0, wide), "v")
    w: Any = te.reduce_axis((0, wide), "w")

    def power(*index: Any) -> Any:
        *row, vector, lane = index
        value = activation.exp(x(*row, rows.position(n, lanes, vector, lane)) - top(*row))
        return rows.once(n, lanes, vector, lane, value)

    def share(*row: Any) -> Any:
        return tirx.const(1, x.dtype) / rows.halved([sums(*row, lane) for lane in range(lanes)], operator.add)

    largest: Any = te.compute(
        (*lead, lanes), lambda *i: te.max(x(*i[:-1], rows.position(n, lanes, v, i[-1])), axis=v), name=_LARGEST
    )
    top: Any = te.compute(
        lead, lambda *row: rows.halved([largest(*row, lane) for lane in range(lanes)], tirx.max), name=_TOP
    )
    powers: Any = te.compute((*lead, wide, lanes), power, name=_POWERS)
    sums: Any = te.compute((*lead, lanes), lambda *i: te.sum(powers(*i[:-1], w, i[-1]), axis=w), name=_SUMS)
    shares: Any = te.compute(lead, share, name=SCALE)
    return te.compute(
        x.shape, lambda *i: powers(*i[:-1], *rows.place(n, lanes, i[-1])) * shares(*i[:-1]), name="softmax"
    )


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.softmax`` of float32 over the last axis as above, or None where it has another form."""
    (x,), n = call.args, rows.extent_of(call.args[0])
    if n is None or int(call.attrs.axis) not in (-1, len(x.ty.shape) - 1):
        return None
    how = {"primfunc_name_hint": "softmax", "primfunc_attrs": {"op_pattern": _COMBINES}}
    return bb.call_te(softmax, x, rows.lanes(n, have), **how)
