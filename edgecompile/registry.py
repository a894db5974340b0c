"""Passes and targets by name: the built-in tables, and what other packages add through entry points.

Nothing is imported before it is asked for. A package adds a pass or a target in its ``pyproject.toml``::

    [project.entry-points."edgecompile.passes"]
    my_pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from edgecompile.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from edgecompile.pipeline import Pass
    from edgecompile.target import Target

PASSES = {
    "clean": "edgecompile.passes.clean:Clean",
    "fold_norm": "edgecompile.passes.fold_norm:FoldNorm",
    "reparam": "edgecompile.passes.reparam:Reparam",
    "prune": "edgecompile.passes.prune:Prune",
    "cast": "edgecompile.passes.cast:Cast",
    "shift_add": "edgecompile.passes.shift_add:ShiftAdd",
    "quantize": "edgecompile.passes.quantize:Quantize",
    "legalize": "edgecompile.passes.legalize:Legalize",
}
TARGETS = {
    "ort": "edgecompile.targets.ort:OrtTarget",
    "trt": "edgecompile.targets.trt:TrtTarget",
    "tvm": "edgecompile.targets.tvm:TvmTarget",
}


def pass_names() -> list[str]:
    """Names of all passes, built-in ones first."""
    return list(_table("passes", PASSES))


def target_names() -> list[str]:
    """Names of all targets, built-in ones first."""
    return list(_table("targets", TARGETS))


def pass_class(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        InputError: no pass has this name, or the package that should provide it cannot be imported.
    """
    return _load("pass", name, _table("passes", PASSES))


def target(name: str) -> Target:
    """A target.

    Raises:
        InputError: as for :func:`pass_class`.
    """
    return _load("target", name, _table("targets", TARGETS))()


def _table(kind: str, builtin: dict[str, str]) -> dict[str, str]:
    table = dict(builtin)
    for entry in sorted(entry_points(group=f"edgecompile.{kind}"), key=lambda e: (e.name, e.value)):
        if table.setdefault(entry.name, entry.value) != entry.value:
            owner = entry.dist.name if entry.dist else entry.value
            raise InputError(f"two {kind} are called {entry.name!r}", f"the second comes from {owner}", "uninstall one")
    return table


def _load(kind: str, name: str, table: dict[str, str]):
    if name not in table:
        raise InputError(
            f"no {kind} is called {name!r}",
            did_you_mean(name, table) or f"there are: {', '.join(table)}",
            f"`edgecompile {'passes' if kind == 'pass' else 'doctor'}` lists them",
        )
    module, _, attribute = table[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the {kind} {name!r} cannot be loaded from {table[name]}", str(error)) from None
