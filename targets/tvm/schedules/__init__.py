"""Schedules for the operators that edge vision networks spend their time in, one file per family of operators.

A family gives its operators a form of its own when Relax lowers them, and TVM fuses what follows into it; then the
schedule of that form is applied. What no family takes keeps TVM's own lowering.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from edgecompile.targets.tvm import constants, options
from edgecompile.targets.tvm.options import Options
from edgecompile.targets.tvm.schedules import activation, conv, dense, depthwise, int8, pool, tile, transposed, winograd

_FAMILIES: Mapping[str, Callable[..., Any]] = {
    "relax.matmul": dense.legalize,
    "relax.nn.conv2d": conv.legalize,
    "relax.nn.max_pool2d": pool.legalize,
    "relax.round": int8.legalize_round,
    "relax.nn.conv2d_transpose": transposed.legalize,
    **dict.fromkeys(activation.OPERATORS, activation.legalize),
}

# by the block that tells a form from those after it
_SCHEDULES = (
    (winograd.schedule, winograd.INPUT),
    (transposed.schedule, transposed.PLACE),
    (depthwise.schedule, depthwise.PLACE),
    (pool.schedule, pool.LINES),
    (tile.schedule, tile.TILE),
)


def layout() -> list:
    """Passes that give the whole graph the layout that the schedules are made for."""
    from tvm import transform as passes
    from tvm.relax import transform

    return [
        transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]}),
        transform.Normalize(),
        passes.module_pass(lambda module, _: constants.permuted(module), opt_level=0),
    ]


def legalizations(chosen: Options) -> dict[str, Callable[[Any, Any], Any]]:
    """How Relax is to lower the operators of the families."""
    from tvm.ir import Op

    have = tile.vectors(options.device(chosen))

    def of(family: Callable[..., Any], default: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def legalize(bb: Any, call: Any) -> Any:
            ours = family(bb, call, have)
            return default(bb, call) if ours is None else ours

        return legalize

    made = {name: of(family, Op.get(name).get_attr("FLegalize")) for name, family in _FAMILIES.items()}
    if chosen.winograd:
        made["relax.nn.conv2d"] = of(winograd.legalize, made["relax.nn.conv2d"])
    return made


def apply(module: Any, chosen: Options) -> Any:
    """Schedule every kernel that has a form of ours."""
    import tvm

    device = options.device(chosen)
    have, how, parallel = tile.vectors(device), int8.dot(device), chosen.threads > 1
    for name, function in list(module.functions.items()):
        alone = tvm.IRModule({"main": function})
        own = next((f for f, block in _SCHEDULES if _has(function, block)), None)
        if own is not None:
            done = own(alone, have, parallel=parallel)
        elif _has(function, int8.TILE):
            done = int8.schedule(alone, how, parallel=parallel)
        else:
            continue
        module.update_func(name, done["main"].with_attr("tirx.is_scheduled", True))
    return module


def _has(function: Any, block: str) -> bool:
    from tvm import tirx

    return isinstance(function, tirx.PrimFunc) and f'sblock("{block}")' in str(function)
