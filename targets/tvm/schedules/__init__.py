"""Schedules for the operators that edge vision networks spend their time in, one file per family of operators.

A family gives its operators a form of its own when Relax lowers them, and TVM fuses what follows into it; then the
schedule of that form is applied. What no family takes keeps TVM's own lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgecompile.targets.tvm import constants, options
from edgecompile.targets.tvm.options import Options
from edgecompile.targets.tvm.schedules import (
    activation,
    conv,
    dense,
    depthwise,
    int8,
    moves,
    norm,
    pool,
    rows,
    softmax,
    tile,
    transposed,
    views,
    winograd,
)
from edgecompile.targets.tvm.schedules.tile import Choice

_FAMILIES: Mapping[str, Callable[..., Any]] = {
    "relax.matmul": dense.legalize,
    "relax.nn.conv2d": conv.legalize,
    "relax.nn.max_pool2d": pool.legalize,
    "relax.round": int8.legalize_round,
    "relax.nn.conv2d_transpose": transposed.legalize,
    "relax.nn.softmax": softmax.legalize,
    "relax.nn.layer_norm": norm.legalize,
    **dict.fromkeys(activation.OPERATORS, activation.legalize),
}

LATER = views.OPERATORS  # to be lowered after the families, which look through them

# by the block that tells a form from those after it
_SCHEDULES = (
    (winograd.schedule, winograd.INPUT),
    (transposed.schedule, transposed.PLACE),
    (depthwise.schedule, depthwise.PLACE),
    (pool.schedule, pool.LINES),
    (rows.schedule, rows.SCALE),
    (tile.schedule, tile.TILE),
    (moves.schedule, moves.CONCATENATION),
)

# what the schedule of a kernel must know of a choice, and whose choice it is
_STEPS, _ROWS_OUTSIDE, ORIGIN = (f"edgecompile.{what}" for what in ("steps", "rows_outside", "origin"))


@dataclass(frozen=True)
class Kernel:
    """A kernel whose form a choice can change.

    Attributes:
        call: the operator of Relax that it computes.
        function: the kernel, not scheduled yet, as it is without a choice.
        chosen: the options.
    """

    call: Any
    function: Any
    chosen: Options

    @property
    def origin(self) -> int:
        """A number that kernels of the same function share."""
        import tvm_ffi

        return tvm_ffi.structural_hash(self.function) % 2**62

    def having(self, choice: Choice) -> Any:
        """The kernel, not scheduled yet, as a choice makes it."""
        from tvm import relax

        builder = relax.BlockBuilder()
        return _of(builder, _chosen(builder, self, choice))


Pick = Callable[[Kernel], Choice]


def layout() -> list:
    """Passes that give the whole graph the layout that the schedules are made for."""
    from tvm import transform as passes
    from tvm.relax import transform

    return [
        transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]}),
        transform.Normalize(),
        passes.module_pass(lambda module, _: constants.permuted(module), opt_level=0),
    ]


def legalizations(chosen: Options, pick: Pick | None = None) -> dict[str, Callable[[Any, Any], Any]]:
    """How Relax is to lower the operators of the families; ``pick`` chooses for each kernel that leaves a choice."""
    from tvm.ir import Op

    def of(default: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def legalize(bb: Any, call: Any) -> Any:
            ours = _legalized(bb, call, chosen, Choice())
            if ours is None:
                return default(bb, call)
            if pick is None or not _has(function := _of(bb, ours), tile.TILE):
                return ours
            kernel = Kernel(call, function, chosen)
            choice = pick(kernel)
            return _chosen(bb, kernel, choice)

        return legalize

    return {name: of(Op.get(name).get_attr("FLegalize")) for name in _FAMILIES}


def _legalized(bb: Any, call: Any, chosen: Options, choice: Choice) -> Any:
    """An operator in the form that its family gives it, None if it has none."""
    have = replace(tile.vectors(options.device(chosen)), choice=choice)
    name = call.op.name
    families = [*([winograd.legalize] if chosen.winograd and name == "relax.nn.conv2d" else []), _FAMILIES[name]]
    return next((made for family in families if (made := family(bb, call, have)) is not None), None)


def _chosen(bb: Any, kernel: Kernel, choice: Choice) -> Any:
    """The operator of a kernel in the form that a choice gives it, with marks for its schedule."""
    import tvm
    from tvm import relax
    from tvm.s_tir import Schedule

    made = _legalized(bb, kernel.call, kernel.chosen, choice)
    plan: Any = Schedule(tvm.IRModule({"main": _of(bb, made)}))
    marks = {_STEPS: choice.steps, _ROWS_OUTSIDE: int(choice.rows_outside), ORIGIN: kernel.origin}
    for name, value in marks.items():
        plan.annotate(plan.get_sblock(tile.TILE), name, value)
    callee = bb.add_func(plan.mod["main"], made.args[0].name_hint)  # another function for each form, not for each call
    return relax.Call(made.op, [callee, *made.args[1:]], made.attrs, made.ty_args)


def _of(bb: Any, call: Any) -> Any:
    """The function that a call of a kernel calls, None for another call."""
    from tvm import relax
    from tvm.ir import GlobalVar

    callee = call.args[0] if isinstance(call, relax.Call) and call.args else None
    return bb.get()[callee] if isinstance(callee, GlobalVar) else None


def _unmarked(module: Any) -> tuple[Any, Choice]:
    """A kernel without the marks of :func:`_chosen`, and what they said; whose choice it is becomes an attribute."""
    import tvm
    from tvm.s_tir import Schedule

    if ORIGIN not in str(module):
        return module, Choice()
    plan: Any = Schedule(module)
    block = plan.get_sblock(tile.TILE)
    marks = {name: int(plan.get(block).annotations[name]) for name in (_STEPS, _ROWS_OUTSIDE, ORIGIN)}
    for name in marks:
        plan.unannotate(block, name)
    function = plan.mod["main"].with_attr(ORIGIN, str(marks[ORIGIN]))
    return tvm.IRModule({"main": function}), Choice(steps=marks[_STEPS], rows_outside=bool(marks[_ROWS_OUTSIDE]))


def apply(module: Any, chosen: Options) -> Any:
    """Schedule every kernel that has a form of ours."""
    import tvm

    device = options.device(chosen)
    have, how, parallel = tile.vectors(device), int8.dot(device), chosen.threads > 1
    for name, function in list(module.functions.items()):
        alone = tvm.IRModule({"main": function})
        own = next((f for f, block in _SCHEDULES if _has(function, block)), None)
        if own is not None:
            alone, choice = _unmarked(_narrowed(alone))
            done = own(alone, replace(have, choice=choice), parallel=parallel)
        elif _has(function, int8.TILE):
            done = int8.schedule(alone, how, parallel=parallel)
        else:
            continue
        module.update_func(name, done["main"].with_attr("tirx.is_scheduled", True))
    return module


def _narrowed(module: Any) -> Any:
    """A kernel whose indices are 32 bits wide, as far as it has no data of 64: loops over wider ones are not cut."""
    from tvm.tirx.transform import ForceNarrowIndexToInt32

    return module if '"int64"' in str(module) else ForceNarrowIndexToInt32()(module)


def _has(function: Any, block: str) -> bool:
    from tvm import tirx

    return isinstance(function, tirx.PrimFunc) and f'sblock("{block}")' in str(function)
