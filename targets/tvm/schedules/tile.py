"""The register tile that products and convolutions share: its size, and its schedule.

A tile of ``rows x columns`` results stays in vector registers while the reduction runs over it: each step loads one
vector per ``lanes`` columns and broadcasts one operand per row (Goto and van de Geijn, Anatomy of High-Performance
Matrix Multiplication, ACM TOMS 2008, section 4; for convolutions Georganas et al., Anatomy of High-Performance Deep
Learning Convolutions on SIMD Architectures, SC 2018, section II). Columns are channels of the output, which are
innermost in memory, rows are pixels or tokens.

A kernel is a computation in which a block called :data:`TILE` computes all tiles and a block after it puts them in
place; TVM's fusion appends what follows (bias, residual, activation) as further blocks, and :func:`schedule` makes the
last of them write the output straight from the registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

TILE, PREPARE = "register_tile", "prepare_operand"
COLUMNS, TURNED = f"{PREPARE}_columns", f"{PREPARE}_turned"  # of a matrix [..., column tile, depth, column]
APART = "pragma_loop_partition_hint"  # lets TVM compile iterations at the edge apart from those within
_FUSES_WHAT_FOLLOWS, _OPAQUE = 4, 8  # of tvm::relax::OpPatternKind
_LATENCY = 8  # multiply-adds that must be under way to hide their latency: 4 cycles, two per cycle
_STORE = 4  # steps that writing one vector of results costs
SHARES = 16  # into which rows are divided at least, so that a few threads have about as many each
_T = TypeVar("_T")


@dataclass(frozen=True)
class Choice:
    """What the form of a kernel and its schedule leave open; the defaults are what is taken without measuring.

    Attributes:
        rank: which of the tiles that are possible, in the order of what they cost by :func:`steps`.
        size: results of a Winograd tile in each direction, 0: compute directly, None: by cost.
        steps: of the reduction in one iteration of its innermost loop, about: the number divides the loop.
        rows_outside: go through all columns before the next rows, where the order is free.
    """

    rank: int = 0
    size: int | None = None
    steps: int = 4
    rows_outside: bool = False


@dataclass(frozen=True)
class Vectors:
    """The vector registers of a CPU, and what to do with them.

    Attributes:
        lanes: float32 values in one.
        count: how many there are.
        choice: for the kernel at hand.
    """

    lanes: int
    count: int
    choice: Choice = Choice()


@dataclass(frozen=True)
class Shape:
    """Size of a tile; ``columns`` is a multiple of the lanes of a vector."""

    rows: int
    columns: int


def vectors(device: str) -> Vectors:
    """The registers of a device as :func:`edgecompile.targets.tvm.options.device` describes it."""
    features = device.split()
    if "avx512f" in features:
        return Vectors(16, 32)
    return Vectors(8, 16) if "avx" in features else Vectors(4, 32 if "aarch64" in features else 16)


def shapes(have: Vectors) -> list[Shape]:
    """Every tile whose results, one vector of each column and one broadcast operand fit the registers."""
    return [
        Shape(rows, wide * have.lanes)
        for wide in range(1, 9)
        for rows in range(1, have.count + 1)
        if rows * wide + wide + 1 <= have.count
    ]


def steps(shape: Shape, rows: int, columns: int, depth: int, have: Vectors) -> float:
    """What ``rows x columns`` results, each a sum of ``depth`` products, cost by tiles of a shape.

    A step is what one vector unit does in a cycle: a multiply-add, or a load.
    """
    wide = shape.columns // have.lanes
    tiles = math.ceil(rows / shape.rows) * math.ceil(columns / shape.columns)
    multiply = shape.rows * wide
    step = max(multiply, shape.rows + wide, _LATENCY) + 0.02 * (shape.rows + wide)
    return tiles * (depth * step + _STORE * multiply)


def choose(rows: int, columns: int, depth: int, have: Vectors) -> Shape:
    """The tile that computes ``rows x columns`` results, each a sum of ``depth`` products, in the fewest steps.

    Results beyond the edge are computed too.
    """

    fitting = [shape for shape in shapes(have) if shape.rows <= rows]
    return ranked(fitting, lambda shape: steps(shape, rows, columns, depth, have), have)


def ranked(fitting: Sequence[_T], cost: Callable[[_T], Any], have: Vectors) -> _T:
    """The cheapest, or the one whose rank is chosen; the dearest where there are not so many."""
    return sorted(fitting, key=cost)[min(have.choice.rank, len(fitting) - 1)]


def attributes(rows: int, columns: int) -> dict[str, int]:
    """Attributes of a kernel: TVM fuses what follows into it, but for what spreads one row or column over many."""
    return {"op_pattern": _FUSES_WHAT_FOLLOWS if min(rows, columns) > 1 else _OPAQUE}


def padded(extent: int, step: int) -> int:
    """The smallest multiple of ``step`` that is not below ``extent``."""
    return -(-extent // step) * step


def schedule(module: Any, have: Vectors, *, parallel: bool) -> Any:
    """Schedule a kernel that has a block :data:`TILE`.

    The block's result has the axes ``(column tile, row tile, row, column)`` where a row is one of all pixels,
    ``(batch, column tile, row tile, row, column)`` where it is one of a matrix of a batch, and ``(batch, column tile,
    height, row tile, row, column)`` where it is one of a line of pixels.

    Args:
        module: a ``tvm.IRModule`` with the one function ``main``.
        have: the vector registers.
        parallel: share the tiles among the threads of the pool.

    Returns:
        the scheduled module.
    """
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    prepare(plan, names[: names.index(TILE)], have, parallel=parallel)
    outside = have.choice.rows_outside
    plan, tile, axes, row, column = arrange(plan, names, TILE, parallel=parallel, rows_outside=outside)
    first = in_registers(plan, tile, axes, have)
    wide, lane = plan.split(column, [None, have.lanes])
    plan.vectorize(lane)
    plan.unroll(wide)
    plan.unroll(row)
    plan.decompose_reduction(tile, first)  # last: what has lost its initialisation can no longer be vectorised
    return plan.mod


def arrange(
    plan: Any, names: Sequence[str], made: str, *, parallel: bool, rows_outside: bool = False
) -> tuple[Any, Any, int, Any, Any]:
    """Compute each tile where the last block reads it, and share the tiles among threads.

    Args:
        plan: what precedes the tile is scheduled.
        names: of all blocks, in order.
        made: the one that computes a tile.
        parallel: as for :func:`schedule`.
        rows_outside: as in :class:`Choice`.

    Returns:
        the schedule, the block of the tile, the number of its axes, and the loops over rows and columns in which the
        last block reads a tile.
    """
    from tvm.s_tir import Schedule
    from tvm.tirx.transform import StmtSimplify

    for name in names[names.index(made) + 1 : -1]:
        plan.compute_inline(plan.get_sblock(name))
    tile = plan.get_sblock(made)
    extents = [int(extent) for extent in plan.get(tile).writes[0].source.shape]
    if len(extents) == 4:  # one axis of rows in simplified indices, else what a tile reads is overestimated
        _flatten(plan, plan.get_sblock(names[-1]))
        plan = Schedule(StmtSimplify()(plan.mod))
        tile = plan.get_sblock(made)
    *outer, column = plan.get_loops(plan.get_sblock(names[-1]))
    lines = [outer[-2]] if len(extents) == 6 else []
    head, row = outer[: -1 - len(lines)], outer[-1]
    uneven = int(plan.get(column).extent) % extents[-1]
    row_tile, row = plan.split(row, [None, extents[-2]])
    column_tile, column = plan.split(column, [None, extents[-1]])
    rows_outside = rows_outside or len(extents) == 5
    tiles = [*lines, row_tile, column_tile] if rows_outside else [column_tile, *lines, row_tile]
    uneven = uneven and not (parallel and _extent(plan, [*head, *lines, row_tile]) < SHARES)
    if parallel and uneven:  # what is shared cannot be cut into parts: threads share the rows
        share, *rest = shares(plan, [*head, *lines, row_tile])
        head, tiles = [share], [*rest, column_tile] if rows_outside else [column_tile, *rest]
    plan.reorder(*head, *tiles, row, column)
    plan.compute_at(tile, tiles[-1], preserve_unit_loops=True)
    plan.set_scope(tile, 0, "local")
    if uneven:
        plan.annotate(column_tile, APART, True)
    if parallel:
        plan.parallel(head[0] if uneven else shares(plan, [*head, *tiles])[0])
    return plan, tile, len(extents), row, column


def shares(plan: Any, loops: Sequence[Any], *, uneven: bool = False) -> list[Any]:
    """Loops over shares of what loops go through, for threads, and those within a share.

    A share of one iteration would allocate what the iteration needs each time, where a loop within it does so once.

    Args:
        plan: the schedule.
        loops: one within the other.
        uneven: the last share may be smaller, where blocks can afford to ask; else shares are equal.
    """
    count, outer, rest = 1, [], list(loops)
    while rest and count < SHARES:
        loop = rest.pop(0)
        extent = _extent(plan, [loop])
        part = min(-(-SHARES // count), extent)
        if not uneven:
            part = next(d for d in range(part, extent + 1) if extent % d == 0)
        if part < extent:
            loop, within = plan.split(loop, [part, None])
            rest.insert(0, within)
        outer.append(loop)
        count *= part
    return [plan.fuse(*outer), *rest]


def _extent(plan: Any, loops: Sequence[Any]) -> int:
    return math.prod(int(plan.get(loop).extent) for loop in loops)


def prepare(plan: Any, names: Sequence[str], have: Vectors, *, parallel: bool) -> None:
    """Schedule the blocks before a tile: copies stay copies, everything else goes into what reads it."""
    for name in names:
        if name.startswith(PREPARE):
            _copy(plan, plan.get_sblock(name), have, parallel=parallel)
        else:
            plan.compute_inline(plan.get_sblock(name))


def _flatten(plan: Any, block: Any) -> None:
    """Let a block iterate over all of its axes but the last as one."""
    from tvm.tirx import IndexMap

    extents = [int(plan.get(loop).extent) for loop in plan.get_loops(block)[:-1]]

    def flat(*index: Any) -> list[Any]:
        position: Any = 0
        for i, extent in zip(index[:-1], extents, strict=True):
            position = position * extent + i
        return [position, index[-1]]

    if len(extents) > 1:
        plan.transform_block_layout(block, IndexMap.from_func(flat, ndim=len(extents) + 1))


def in_registers(plan: Any, tile: Any, spatial: int, have: Vectors) -> Any:
    """Order and unroll the loops of a tile; returns the outermost one of its reduction."""
    own = plan.get_loops(tile)
    reductions = sum(int(v.iter_type) == 2 for v in plan.get(tile).iter_vars)
    own = own[len(own) - spatial - reductions :]
    row, column, sums = own[spatial - 2], own[spatial - 1], own[spatial:]
    extent = int(plan.get(sums[-1]).extent)
    step = max(d for d in range(1, 2 * have.choice.steps) if extent % d == 0)
    last, inner = plan.split(sums[-1], [None, step])
    wide, lane = plan.split(column, [None, have.lanes])
    plan.reorder(*sums[:-1], last, inner, row, wide, lane)
    plan.vectorize(lane)
    for loop in (wide, row, inner):
        plan.unroll(loop)
    return sums[0] if len(sums) > 1 else last


def _copy(plan: Any, block: Any, have: Vectors, *, parallel: bool) -> None:
    """Schedule a block that only moves data."""
    *outer, last = plan.get_loops(block)
    name = plan.get(block).name_hint
    if name in (COLUMNS, TURNED) and not parallel:
        plan.annotate(outer[-2], APART, True)
    if name == TURNED:
        plan.reorder(last, outer.pop())
    elif int(plan.get(last).extent) % have.lanes == 0:
        plan.vectorize(plan.split(last, [None, have.lanes])[1])
    if parallel and outer:
        plan.parallel(plan.fuse(*outer))
