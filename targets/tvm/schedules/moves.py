"""Concatenations, with the views before them and the activations after: one loop for each part of the result.

TVM's own lowering asks for every element which part it belongs to. Here the loops are cut where the parts meet, and
within each of them nothing is left to ask.
"""

from __future__ import annotations

from typing import Any

from edgecompile.targets.tvm.schedules.tile import APART, Vectors

CONCATENATION = "T_concat"
_REDUCTION = 2  # of tvm::tirx::IterVarType


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that has a block :data:`CONCATENATION`; as it is where it has more than copies and activations.

    Args, Returns: as of :func:`edgecompile.targets.tvm.schedules.tile.schedule`.
    """
    from tvm.s_tir import Schedule, ScheduleError

    plan: Any = Schedule(module)
    *others, last = plan.get_child_blocks(plan.get_sblock("root"))
    if any(int(v.iter_type) == _REDUCTION for block in (*others, last) for v in plan.get(block).iter_vars):
        return module
    try:
        for block in others:
            plan.compute_inline(block)
    except ScheduleError:  # a block has several results, or is one
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
