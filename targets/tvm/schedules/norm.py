"""Layer normalisation over the last axis: mean, variance about it, then scale and shift, row by row.

The variance is that of the differences from the mean, in a second pass over a row that the nearest cache holds: the
mean of squares less the squared mean would lose what a large mean leaves of float32.
"""

from __future__ import annotations

import operator
from typing import Any

from edgecompile.targets.tvm.schedules import rows
from edgecompile.targets.tvm.schedules.rows import SCALE, STEP
from edgecompile.targets.tvm.schedules.tile import Vectors

_SUMS, _MEAN, _SQUARES = (f"{STEP}{of}" for of in ("sums", "mean", "squares"))
_FUSES_WHAT_FOLLOWS = 4  # of tvm::relax::OpPatternKind


def layer_norm(x: Any, gamma: Any, beta: Any, epsilon: float, lanes: int) -> Any:
    """``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` over the last axis of ``x``.

    Args:
        x: ``[..., n]``.
        gamma, beta: ``[n]``.
        epsilon: added to the variance.
        lanes: of the vectors that a row is taken by.
    """
    from tvm import te, tirx

    *lead, n = (int(d) for d in x.shape)
    wide = rows.vectors(n, lanes)
    v: Any = te.reduce_axis((0, wide), "v")
    w: Any = te.reduce_axis((0, wide), "w")
    part = tirx.const(1 / n, "float32")

    def added(value: Any, axis: Any) -> Any:
        def total(*index: Any) -> Any:
            *row, lane = index
            term = value(row, rows.position(n, lanes, axis, lane))
            return te.sum(rows.once(n, lanes, axis, lane, term), axis=axis)

        return total

    def mean_of(sums: Any, row: Any) -> Any:
        return rows.halved([sums(*row, lane) for lane in range(lanes)], operator.add) * part

    def square(row: Any, at: Any) -> Any:
        difference = x(*row, at) - mean(*row)
        return difference * difference

    sums: Any = te.compute((*lead, lanes), added(lambda row, at: x(*row, at), v), name=_SUMS)
    mean: Any = te.compute(lead, lambda *row: mean_of(sums, row), name=_MEAN)
    squares: Any = te.compute((*lead, lanes), added(square, w), name=_SQUARES)
    scale: Any = te.compute(
        lead,
        lambda *row: tirx.const(1, "float32") / tirx.sqrt(mean_of(squares, row) + tirx.const(epsilon, "float32")),
        name=SCALE,
    )
    return te.compute(
        x.shape,
        lambda *i: (x(*i) - mean(*i[:-1])) * scale(*i[:-1]) * gamma(i[-1]) + beta(i[-1]),
        name="layer_norm",
    )


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.nn.layer_norm`` of float32 over the last axis as above, or None where it has another form."""
    x, gamma, beta = call.args
    n, axes = rows.extent_of(x), [int(axis) % len(x.ty.shape) for axis in call.attrs.axes]
    if n is None or axes != [len(x.ty.shape) - 1]:
        return None
    how = {"primfunc_name_hint": "layer_norm", "primfunc_attrs": {"op_pattern": _FUSES_WHAT_FOLLOWS}}
    return bb.call_te(layer_norm, x, gamma, beta, float(call.attrs.epsilon), rows.lanes(n, have), **how)
