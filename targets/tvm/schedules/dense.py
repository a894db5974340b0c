"""Products of matrices: with a constant, packed at compile time, and of two activations, packed at run time.

The second operand is stored as ``[columns / tile, depth, tile]``, so that each step of the reduction reads one
contiguous line of the tile's columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules import views
from edgecompile.targets.tvm.schedules.tile import COLUMNS, TILE, TURNED, Vectors, attributes, choose, padded
from edgecompile.targets.tvm.schedules.views import View, flatten, unflatten


def pack(matrix: np.ndarray, columns: int) -> np.ndarray:
    """``[depth, n]`` to ``[n / columns, depth, columns]``, filled with zeros."""
    depth, n = matrix.shape
    wide = np.zeros((depth, padded(n, columns)), matrix.dtype)
    wide[:, :n] = matrix
    return np.ascontiguousarray(wide.reshape(depth, -1, columns).transpose(1, 0, 2))


def product(a: Any, packed: Any, n: int, rows: int) -> Any:
    """``a [..., depth]`` times a matrix of ``n`` columns as :func:`pack` stores it, by tiles of ``rows`` rows."""
    from tvm import te, tirx

    *lead, depth = (int(d) for d in a.shape)
    m, columns = math.prod(lead), int(packed.shape[2])
    k = te.reduce_axis((0, depth), "k")

    def row(tile: Any, inner: Any) -> list[Any]:
        index = tile * rows + inner
        return unflatten(index if m % rows == 0 else tirx.min(index, m - 1), lead)

    tiles: Any = te.compute(
        (int(packed.shape[0]), padded(m, rows) // rows, rows, columns),
        lambda jo, io, ii, ji: te.sum(a(*row(io, ii), k) * packed[jo, k, ji], axis=k),
        name=TILE,
    )

    def place(*index: Any) -> Any:
        i, j = flatten(index[:-1], lead), index[-1]
        return tiles[j // columns, i // rows, i % rows, j % columns]

    return te.compute((*lead, n), place, name="product")


def batched(a: Any, b: Any, rows: int, columns: int, turned: bool = False) -> Any:
    """``a [..., m, depth]`` times ``b [..., depth, n]``, of equal or broadcast leading axes, by tiles.

    Args:
        a, b: the operands.
        rows, columns: of a tile.
        turned: neighbours in memory are those along the depth of ``b``, rather than its columns.
    """
    from tvm import te, tirx

    *lead_a, m, depth = (int(d) for d in a.shape)
    *lead_b, _, n = (int(d) for d in b.shape)
    lead = list(np.broadcast_shapes(tuple(lead_a), tuple(lead_b)))
    wide = padded(n, columns) // columns

    def pack_at(*index: Any) -> Any:
        *batch, jo, kk, ji = index
        j = jo * columns + ji
        value = b(*batch, kk, j)
        return tirx.if_then_else(j < n, value, tirx.const(0, b.dtype)) if n % columns else value

    packed: Any = te.compute((*lead_b, wide, depth, columns), pack_at, name=TURNED if turned else COLUMNS)
    k = te.reduce_axis((0, depth), "k")

    def value(batch: Any, jo: Any, io: Any, ii: Any, ji: Any) -> Any:
        index = unflatten(batch, lead)
        i = io * rows + ii
        left = broadcast(index, lead_a)
        return te.sum(
            a(*left, tirx.min(i, m - 1) if m % rows else i, k) * packed(*broadcast(index, lead_b), jo, k, ji), axis=k
        )

    tiles: Any = te.compute((math.prod(lead), wide, padded(m, rows) // rows, rows, columns), value, name=TILE)

    def place(*index: Any) -> Any:
        *batch, i, j = index
        return tiles[flatten(batch, lead), j // columns, i // rows, i % rows, j % columns]

    return te.compute((*lead, m, n), place, name="product")


def broadcast(index: Sequence[Any], extents: Sequence[int]) -> list[Any]:
    """The index into an operand whose leading axes may be fewer, or 1."""
    return [0 if e == 1 else i for i, e in zip(list(index)[len(index) - len(extents) :], extents, strict=True)]


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.matmul`` of float32 as one of the products above, or None where it has another form."""
    from tvm import relax
    from tvm.ir import GenericConst

    a, b = call.args
    shapes = [[int(d) for d in x.ty.shape] for x in (a, b)]
    if any(x.ty.dtype != "float32" for x in (a, b)) or min(map(len, shapes)) < 2:
        return None
    (*lead, m, depth), n = shapes[0], shapes[1][-1]
    if isinstance(b, GenericConst) and math.prod(shapes[1][:-2]) == 1 and len(shapes[1]) <= len(shapes[0]):
        rows = math.prod(lead) * m
        constant: Any = b
        shape = choose(rows, n, depth, have)
        packed = relax.const(pack(constant.value.numpy().reshape(depth, n), shape.columns))
        how = {"primfunc_name_hint": "matmul", "primfunc_attrs": attributes(rows, n)}
        return bb.call_te(product, a, packed, n, shape.rows, **how)
    left, right = views.behind(bb, a), views.behind(bb, b)
    axes = len(shapes[0])
    if left.step(-2) == right.step(-2) == 1 and len(shapes[1]) == axes:
        # what is in memory is the transpose of both, and so of the product
        turned = _of_views(bb, right.turned(), left.turned(), have)
        return relax.op.permute_dims(turned, [*range(axes - 2), axes - 1, axes - 2])
    return _of_views(bb, left, right, have)


def _of_views(bb: Any, left: View, right: View, have: Vectors) -> Any:
    """The product of two views."""
    m, depth, n = *left.shape[-2:], right.shape[-1]
    shape, turned = choose(m, n, depth, have), right.step(-2) == 1 and n > 1
    how = {"primfunc_name_hint": "batch_matmul", "primfunc_attrs": attributes(m, n)}
    return bb.call_te(
        lambda x, y: batched(left.of(x), right.of(y), shape.rows, shape.columns, turned),
        left.source,
        right.source,
        **how,
    )
