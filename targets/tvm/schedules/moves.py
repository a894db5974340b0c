"""What computes each element by itself: copies, activations, changes of type, concatenations.

For every element of a concatenation, TVM's own lowering asks which part it belongs to. Here the loops are cut where
the parts meet, and within each of them nothing is left to ask. Where element i of the result is computed from element
i of each operand, there is one loop over all elements, whose vectors no short last axis breaks.
"""

from __future__ import annotations

import math
from typing import Any

from edgecompile.targets.tvm.schedules.tile import APART, Vectors

CONCATENATION = "T_concat"
_REDUCTION = 2  # of tvm::tirx::IterVarType
_SHARED = 1 << 14  # elements that are worth waking a thread for


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that has a block :data:`CONCATENATION`; as it is where it has more than copies and activations.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    plan, last = _inlined(module)
    if plan is None:
        return module
    loops = plan.get_loops(last)
    if parallel:  # what is shared among threads cannot be cut
        shared = next((loop for loop in loops[:-1] if int(plan.get(loop).extent) > 1), None)
        if shared is not None:
            loops = loops[loops.index(shared) + 1 :]
            plan.parallel(shared)
    for loop in loops:
        plan.annotate(loop, APART, True)
    return plan.mod


def elements(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that has no form of its own; as it is where it has more than copies and activations.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    plan, last = _inlined(module)
    if plan is None or len(plan.get(last).writes) != 1 or not plan.get_loops(last):  # what is no operation on tensors
        return module
    *outer, inner = plan.get_loops(last)
    extents = [int(plan.get(loop).extent) for loop in (*outer, inner)]
    size = math.prod(extents)
    if _same_index(plan.get(last)) and size >= have.lanes:
        loop = plan.fuse(*outer, inner)
        if rest := size % have.lanes:
            loop, tail = plan.loop_partition(loop, [size - rest, None])
            plan.vectorize(tail)
        loop, lane = plan.split(loop, [None, have.lanes])
        plan.vectorize(lane)
        outer = [loop]
    if parallel and outer and size >= _SHARED:
        plan.parallel(plan.fuse(*outer))
    return plan.mod


def _inlined(module: Any) -> tuple[Any, Any]:
    """The schedule of a kernel that is one block, and the block; None where it cannot be."""
    from tvm.s_tir import Schedule, ScheduleError

    plan: Any = Schedule(module)
    *others, last = plan.get_child_blocks(plan.get_sblock("root"))
    if any(int(v.iter_type) == _REDUCTION for block in (*others, last) for v in plan.get(block).iter_vars):
        return None, None
    try:
        for block in others:
            plan.compute_inline(block)
    except ScheduleError:  # a block has several results, or is one
        return None, None
    return plan, last


def _same_index(block: Any) -> bool:
    """Whether a block reads each operand of more than one element at the index that it writes."""
    (written,) = block.writes
    shape, index = ([str(v) for v in values] for values in (written.source.shape, (r.min for r in written.region)))
    return all(
        math.prod(int(d) for d in read.source.shape) == 1
        or ([str(d) for d in read.source.shape], [str(r.min) for r in read.region]) == (shape, index)
        for read in block.reads
    )
