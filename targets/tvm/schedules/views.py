"""Views: operators that only rename positions. A product reads its operands through them instead of from a copy.

Attention splits one projection into queries, keys and values, reshapes them into heads and transposes them. Each of
these operators says where an element of its result lies in its input; composed, they say where it lies in the
projection, and the kernel that multiplies reads it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Index = Callable[[Sequence[Any]], list[Any]]
_SHAPES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")
OPERATORS = (*_SHAPES, "relax.permute_dims", "relax.strided_slice", "relax.split")


@dataclass(frozen=True)
class View:
    """What an expression is of another one.

    Attributes:
        source: the expression that is in memory.
        shape: of the view.
        at: index of the view -> index of the source; both may be numbers or expressions of TIR.
    """

    source: Any
    shape: tuple[int, ...]
    at: Index

    def of(self, x: Any) -> Any:
        """The view as a tensor of TE, given the source as one."""
        from tvm import te

        return te.compute(self.shape, lambda *i: x(*self.at(i)), name="view")

    def turned(self) -> View:
        """The transpose of the last two axes."""
        *lead, m, n = self.shape
        return View(self.source, (*lead, n, m), lambda index: self.at([*index[:-2], index[-1], index[-2]]))

    def step(self, axis: int) -> int:
        """Elements of the source between neighbours along an axis, at the origin; 0 along an axis of extent 1."""
        if self.shape[axis] == 1:
            return 0
        first = [0] * len(self.shape)
        second = list(first)
        second[axis] = 1
        extents = [int(d) for d in self.source.ty.shape]
        return flatten(self.at(second), extents) - flatten(self.at(first), extents)


def behind(bb: Any, expr: Any) -> View:
    """The view that an expression of static shape is, as far as a block builder knows what its variables hold."""
    from tvm import relax

    shape = tuple(int(d) for d in expr.ty.shape)
    call: Any = bb.lookup_binding(expr) if isinstance(expr, relax.Var) else None
    part = 0
    if isinstance(call, relax.TupleGetItem):
        call, part = bb.lookup_binding(call.tuple_value), int(call.index)
    at = _index(call, part) if isinstance(call, relax.Call) else None
    if at is None:
        return View(expr, shape, list)
    inner = behind(bb, call.args[0])
    return View(inner.source, shape, lambda index: inner.at(at(index)))


def _index(call: Any, part: int) -> Index | None:
    """Where elements of a result of an operator lie in its first argument, or None where they do not."""
    name = getattr(call.op, "name", "")
    if name not in OPERATORS:
        return None
    before = [int(d) for d in call.args[0].ty.shape]
    if name == "relax.split":
        axis = int(call.attrs.axis) % len(before)
        first = sum(int(field.shape[axis]) for field in call.ty.fields[:part])
        return lambda index: [v + first if i == axis else v for i, v in enumerate(index)]
    after = [int(d) for d in call.ty.shape]
    if name in _SHAPES:
        return _reshaped(before, after)
    if name == "relax.permute_dims":
        axes = [int(a) for a in call.attrs.axes] if call.attrs.axes is not None else [*reversed(range(len(before)))]
        return lambda index: [index[axes.index(i)] for i in range(len(axes))]
    axes, begin, *_ = ([int(v) for v in argument] for argument in call.args[1:3])
    strides = [int(v) for v in call.args[4]] if len(call.args) > 4 else [1] * len(axes)
    start = {axis % len(before): (b % before[axis], s) for axis, b, s in zip(axes, begin, strides, strict=True)}
    if any(s < 1 for s in strides):
        return None
    return lambda index: [start[i][0] + v * start[i][1] if i in start else v for i, v in enumerate(index)]


def _reshaped(before: Sequence[int], after: Sequence[int]) -> Index:
    """Between shapes of equal size: axes that are neither split nor merged keep their index."""
    inner, outer = ([axis for axis, d in enumerate(shape) if d != 1] for shape in (before, after))
    groups: list[tuple[list[int], list[int]]] = []
    while inner or outer:
        own, other = inner[:1], outer[:1]
        del inner[:1], outer[:1]
        while (sizes := [math.prod(s[a] for a in of) for s, of in ((before, own), (after, other))])[0] != sizes[1]:
            of, rest = (own, inner) if sizes[0] < sizes[1] else (other, outer)
            of.append(rest.pop(0))
        groups.append((own, other))

    def at(index: Sequence[Any]) -> list[Any]:
        result: list[Any] = [0] * len(before)
        for own, other in groups:
            where = flatten([index[a] for a in other], [after[a] for a in other])
            for axis, value in zip(own, unflatten(where, [before[a] for a in own]), strict=True):
                result[axis] = value
        return result

    return at


def flatten(index: Sequence[Any], extents: Sequence[int]) -> Any:
    """The position of an index in memory."""
    position: Any = 0
    for i, extent in zip(index, extents, strict=True):
        position = position * extent + i
    return position


def unflatten(position: Any, extents: Sequence[int]) -> list[Any]:
    """The index of a position in memory."""
    index: list[Any] = []
    for extent in reversed(extents[1:]):
        index.insert(0, position % extent)
        position = position // extent
    return [position, *index] if extents else []
