"""Schedules for the operators that edge vision networks spend their time in, one file per family of operators.

A family gives its operators a form of its own when Relax lowers them, and TVM fuses what follows into it; then the
schedule of that form is applied. What no family takes keeps TVM's own lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgecompile.targets.tvm import options
from edgecompile.targets.tvm.options import Options
from edgecompile.targets.tvm.schedules import activation, conv, dense, tile

_FAMILIES: Mapping[str, Callable[..., Any]] = {
    "relax.matmul": dense.legalize,
    "relax.nn.conv2d": conv.legalize,
    "relax.nn.conv2d_transpose": conv.legalize_transposed,
    **dict.fromkeys(activation.OPERATORS, activation.legalize),
}


def layout() -> list:
    """Passes that give the whole graph the layout that the schedules are made for."""
    from tvm.relax import transform

    return [transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]}), transform.Normalize()]


def legalizations(chosen: Options) -> dict[str, Callable[[Any, Any], Any]]:
    """How Relax is to lower the operators of the families."""
    from tvm.ir import Op

    have = tile.vectors(options.device(chosen))

    def of(name: str, family: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        default = Op.get(name).get_attr("FLegalize")

        def legalize(bb: Any, call: Any) -> Any:
            ours = family(bb, call, have)
            return default(bb, call) if ours is None else ours

        return legalize

    return {name: of(name, family) for name, family in _FAMILIES.items()}


def apply(module: Any, chosen: Options) -> Any:
    """Schedule every kernel that has a form of ours."""
    import tvm

    have = tile.vectors(options.device(chosen))
    for name, function in list(module.functions.items()):
        if _has_tile(function):
            alone = tvm.IRModule({"main": function})
            done = tile.schedule(alone, have, parallel=chosen.threads > 1)["main"]
            module.update_func(name, done.with_attr("tirx.is_scheduled", True))
    return module


def _has_tile(function: Any) -> bool:
    from tvm import tirx

    return isinstance(function, tirx.PrimFunc) and f'sblock("{tile.TILE}")' in str(function)
