"""Schedules for the operators that edge vision networks spend their time in, one file per family of operators.

A family gives its operators a form of its own when Relax lowers them, and TVM fuses what follows into it; then the
schedule of that form is applied. What no family takes keeps TVM's own lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
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
from edgecompile.targets.tvm.schedules.tile import Choice, Vectors

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
        have: the vector registers.
    """

    call: Any
    function: Any
    chosen: Options
    have: Vectors

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


@dataclass(frozen=True)
class Form:
    """What became of an operator with constant weights that no choice was made for.

    Attributes:
        function: the kernel, not scheduled yet, without marks.
        marked: the same with the marks of :func:`_chosen`.
        made: the call of that, whose operands are the operator's first and constants.
    """

    function: Any
    marked: Any
    made: Any


Forms = dict[Hashable, Form]
"""By operator: with these, a model is lowered again in a fraction of the time, and its weights are not packed again."""


def layout() -> list:
    """Passes that give the whole graph the layout that the schedules are made for."""
    from tvm import transform as passes
    from tvm.relax import transform

    return [
        transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"], "relax.nn.conv2d_transpose": ["NHWC", "IOHW"]}),
        transform.Normalize(),
        passes.module_pass(lambda module, _: constants.permuted(module), opt_level=0),
    ]


def legalizations(
    chosen: Options, pick: Pick | None = None, forms: Forms | None = None
) -> dict[str, Callable[[Any, Any], Any]]:
    """How Relax is to lower the operators of the families.

    Args:
        chosen: the options.
        pick: chooses for each kernel that leaves a choice.
        forms: those known from lowering the same model before, which grow.
    """
    from tvm.ir import Op

    have = tile.vectors(options.device(chosen))

    def of(default: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def legalize(bb: Any, call: Any) -> Any:
            key = None if forms is None else _key(call)
            if forms is not None and (form := forms.get(key)) is not None and pick is not None:
                kernel = Kernel(call, form.function, chosen, have)
                choice = pick(kernel)
                return _again(bb, form, call) if choice == Choice() else _chosen(bb, kernel, choice)
            ours = _legalized(bb, call, chosen, have)
            if ours is None:
                return default(bb, call)
            if pick is None or not _has(function := _of(bb, ours), tile.TILE):
                return ours
            kernel = Kernel(call, function, chosen, have)
            choice = pick(kernel)
            made = _chosen(bb, kernel, choice)
            if forms is not None and key is not None and choice == Choice() and _depends_on(made, call.args[0]):
                forms[key] = Form(function, _of(bb, made), made)
            return made

        return legalize

    return {name: of(Op.get(name).get_attr("FLegalize")) for name in _FAMILIES}


def _key(call: Any) -> Hashable:
    """What makes an operator with constant weights another one, None without such."""
    from tvm.ir import GenericConst

    if len(call.args) != 2 or not isinstance(call.args[1], GenericConst):
        return None
    return call.op.name, call.args[1], str(call.args[0].ty), str(call.attrs)  # constants are equal if they are the same


def _depends_on(made: Any, x: Any) -> bool:
    """Whether a kernel's operands are ``x`` and constants."""
    from tvm.ir import GenericConst

    return all(isinstance(operand, GenericConst) or operand.same_as(x) for operand in made.args[1].fields)


def _again(bb: Any, form: Form, call: Any) -> Any:
    """An operator in a known form."""
    from tvm import relax
    from tvm.ir import GenericConst

    made = form.made
    operands = [o if isinstance(o, GenericConst) else call.args[0] for o in made.args[1].fields]
    callee = bb.add_func(form.marked, made.args[0].name_hint)
    return relax.Call(made.op, [callee, relax.Tuple(operands), *made.args[2:]], made.attrs, made.ty_args)


def _legalized(bb: Any, call: Any, chosen: Options, have: Vectors) -> Any:
    """An operator in the form that its family gives it, None if it has none."""
    name = call.op.name
    families = [*([winograd.legalize] if chosen.winograd and name == "relax.nn.conv2d" else []), _FAMILIES[name]]
    return next((made for family in families if (made := family(bb, call, have)) is not None), None)


def _chosen(bb: Any, kernel: Kernel, choice: Choice) -> Any:
    """The operator of a kernel in the form that a choice gives it, with marks for its schedule."""
    import tvm
    from tvm import relax
    from tvm.s_tir import Schedule

    made = _legalized(bb, kernel.call, kernel.chosen, replace(kernel.have, choice=choice))
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
    """Schedule every kernel that has a form of ours, or none but computes each element by itself."""
    import tvm

    device = options.device(chosen)
    have, how, parallel = tile.vectors(device), int8.dot(device), chosen.threads > 1
    for name, function in list(module.functions.items()):
        if function.attrs is not None and "tirx.is_scheduled" in function.attrs:
            continue
        alone = tvm.IRModule({"main": function})
        own = next((f for f, block in _SCHEDULES if _has(function, block)), None)
        if own is not None:
            alone, choice = _unmarked(_narrowed(alone))
            done = own(alone, replace(have, choice=choice), parallel=parallel)
        elif _has(function, int8.TILE):
            done = int8.schedule(alone, how, parallel=parallel)
        elif _has(function, "root"):
            alone = _narrowed(alone)
            done = moves.elements(alone, have, parallel=parallel)
            if done is alone:
                continue
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
