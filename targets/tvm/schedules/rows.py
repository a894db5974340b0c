"""What softmax and normalisations share: a row, the last axis in memory, reduced and written vector by vector.

Each lane reduces its own values, then the lanes are reduced by halving. Where vectors do not divide the row, the last
one ends with the row and begins within the one before it; what both hold counts once. All that a row needs between its
input and its output is computed where the output is, and stays in the nearest cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgecompile.targets.tvm.schedules import tile
from edgecompile.targets.tvm.schedules.tile import Vectors

STEP = "row_"  # begins the names of the blocks that compute what a row needs
SCALE = f"{STEP}scale"  # what the row is multiplied by in the end
_REDUCTION = 2  # of tvm::tirx::IterVarType


def extent_of(x: Any) -> int | None:
    """Length of the rows of ``x``, None unless it has several axes of known extents and holds float32."""
    from tvm.tirx import IntImm

    known = x.ty.dtype == "float32" and len(x.ty.shape) > 1 and all(isinstance(d, IntImm) for d in x.ty.shape)
    return int(x.ty.shape[-1]) if known else None


def lanes(extent: int, have: Vectors) -> int:
    """Lanes of the vectors of a row of ``extent`` values."""
    return min(have.lanes, 1 << (extent.bit_length() - 1))


def vectors(extent: int, lanes: int) -> int:
    """How many vectors a row of ``extent >= lanes`` values takes."""
    return -(-extent // lanes)


def position(extent: int, lanes: int, vector: Any, lane: Any) -> Any:
    """Where in the row a lane of a vector is."""
    from tvm import tirx

    first = vector * lanes
    return (tirx.min(first, extent - lanes) if extent % lanes else first) + lane


def once(extent: int, lanes: int, vector: Any, lane: Any, value: Any) -> Any:
    """``value``, or 0 where the vector before has it too."""
    from tvm import tirx

    if extent % lanes == 0:
        return value
    return tirx.Select(position(extent, lanes, vector, lane) >= vector * lanes, value, tirx.const(0, "float32"))


def place(extent: int, lanes: int, at: Any) -> tuple[Any, Any]:
    """The vector and the lane that hold a position in the row."""
    from tvm import tirx

    if extent % lanes == 0:
        return at // lanes, at % lanes
    whole, last = extent // lanes * lanes, vectors(extent, lanes) - 1
    inside = at < whole
    return (
        tirx.if_then_else(inside, at // lanes, last),
        tirx.if_then_else(inside, at % lanes, at - (extent - lanes)),
    )


def halved(values: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """All of a power of two of values, the first half with the second, and so on."""
    while len(values) > 1:
        half = len(values) // 2
        values = [combine(a, b) for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that has a block :data:`SCALE`, and what TVM fused before and after it.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    steps = [name for name in names[:-1] if name.startswith(STEP)]
    for name in names[:-1]:
        if name not in steps:
            plan.compute_inline(plan.get_sblock(name))
    *lead, column = plan.get_loops(plan.get_sblock(names[-1]))
    lead = lead or [plan.add_unit_loop(column)]
    for name in reversed(steps):
        block = plan.get_sblock(name)
        plan.compute_at(block, lead[-1], preserve_unit_loops=True)
        plan.set_scope(block, 0, "local")
        _vectorise(plan, block, len(lead))
    extent = int(plan.get(column).extent)
    step = lanes(extent, have)
    if extent % step:
        column, rest = plan.loop_partition(column, [extent // step * step, None])
        plan.vectorize(rest)
    plan.vectorize(plan.split(column, [None, step])[1])
    if parallel:
        plan.parallel(tile.shares(plan, lead, uneven=True)[0])
    return plan.mod


def _vectorise(plan: Any, block: Any, outer: int) -> None:
    """Vectorise the lanes of a block that is computed within ``outer`` loops; its reduction runs around them."""
    own = plan.get_loops(block)[outer:]
    if len(own) == 2:
        reduction = int(plan.get(block).iter_vars[-1].iter_type) == _REDUCTION
        vector, lane = reversed(own) if reduction else own
        plan.reorder(vector, lane)
        plan.vectorize(lane)
        if reduction:
            plan.decompose_reduction(block, vector)
