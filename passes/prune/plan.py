"""What a cut took away, as a file: the positions that stay, by parameter and torch module path.

A plan is JSON, ``edgecompile.prune-plan/1``::

    {"schema": "edgecompile.prune-plan/1",
     "graph": SHA-256 of the graph before the cut,
     "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 3, 32, 32]}, ...],
     "layers": [{"weight": "blocks.0.conv.weight", "module": "blocks.0.conv", "node": "conv2d_1", "axis": 0,
                 "kept": [0, 2, 3, ...], "of": 64}, ...],
     "tensors": [{"names": ["conv2d_1", "relu_1"], "groups": ["blocks.0.conv"], "axis": 1, "kept": [0, 2, 3, ...],
                  "of": 64}, ...],
     "groups": [{"name": "blocks.0.conv", "before": 64, "after": 48}, ...]}

``layers`` names every parameter and axis that lost positions: weights, biases, parameters of norms. A parameter that
several nodes read has an entry for each of them, told apart by ``node``, the node's first output. ``tensors`` does the
same for what the model computes, since exact passes that merge layers make new weights but keep most tensors: by them
the cut is found again in the graph of the torch module, before the merge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile.errors import InputError
from edgecompile.files import write_atomic
from edgecompile.graph import Graph, provenance

from .dependency import Groups, Keep, Place
from .rules import key

SCHEMA = "edgecompile.prune-plan/1"


@dataclass(frozen=True)
class Input:
    """An input of the model; a dynamic dimension is its name, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Layer:
    """What stays of one axis of a parameter.

    Attributes:
        weight: name of the parameter in the graph.
        module: torch module path of the node that reads it, ``""`` if unknown.
        node: first output of that node.
        axis: axis of the parameter.
        kept: positions that stay, ascending.
        of: how many there were.
    """

    weight: str
    module: str
    node: str
    axis: int
    kept: tuple[int, ...]
    of: int


@dataclass(frozen=True)
class Computed:
    """The same for tensors that the model computes, all those with the same positions on the same axis.

    Attributes:
        names: of the tensors.
        groups: the groups whose cut this is.
        axis, kept, of: as of a :class:`Layer`.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    axis: int
    kept: tuple[int, ...]
    of: int


@dataclass(frozen=True)
class Width:
    """Units of a group before and after the cut."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """One cut of one graph.

    Attributes:
        graph: digest of the graph before the cut.
        inputs: of the model.
        layers: parameters that lost positions, in the order of the nodes that read them.
        tensors: what the model computes.
        groups: the groups that lost units.
    """

    graph: str
    inputs: tuple[Input, ...]
    layers: tuple[Layer, ...]
    tensors: tuple[Computed, ...]
    groups: tuple[Width, ...]

    @classmethod
    def of(cls, graph: Graph, found: Groups, keep: Keep) -> Plan:
        """The plan of ``found.cut(graph, keep)``, made before it; ``graph`` is not changed.

        Raises:
            InputError: ``keep`` does not fit the groups.
        """
        modules = {key(n): provenance(n).module for n in graph.nodes}
        layers: list[Layer] = []
        tensors: dict[tuple[tuple[str, ...], int, tuple[int, ...], int], list[str]] = {}
        on = found.lie(graph)
        for place, mask in found.kept(graph, keep).items():
            name, node, axis = place
            positions = tuple(np.flatnonzero(mask).tolist())
            if node:
                layers.append(Layer(name, modules[node], node, axis, positions, len(mask)))
            else:
                cut = tuple(g for g in on[place] if len(np.unique(keep.get(g, range(found[g].units)))) < found[g].units)
                tensors.setdefault((cut, axis, positions, len(mask)), []).append(name)
        widths = [Width(g.name, g.units, len(np.unique(keep[g.name]))) for g in found.groups if g.name in keep]
        inputs = [Input(t.name, str(np.dtype(t.dtype)), tuple(t.shape or ())) for t in graph.inputs]
        return cls(
            graph.digest(),
            tuple(inputs),
            tuple(layers),
            tuple(Computed(tuple(names), *where) for where, names in tensors.items()),
            tuple(w for w in widths if w.after < w.before),
        )

    def kept(self) -> dict[Place, np.ndarray]:
        """Per axis the positions that stay, bool ``[of]``, as :meth:`Groups.keep` takes them."""
        found = {(x.weight, x.node, x.axis): _mask(x) for x in self.layers}
        return found | {(name, "", x.axis): _mask(x) for x in self.tensors for name in x.names}

    def keep(self, graph: Graph, found: Groups) -> dict[str, np.ndarray]:
        """The units to keep in the graph that the plan was made for, or in an equal one.

        Raises:
            InputError: it is another graph.
        """
        return found.keep(graph, self.kept())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON would have it."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        write_atomic(Path(path), [(json.dumps(self.as_dict()) + "\n").encode()])

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            InputError: the file is missing or is no plan.
        """
        try:
            document = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"cannot read the plan {path}", error.strerror or str(error), "check the path") from None
        except ValueError as error:
            raise InputError(f"{path} is no plan of a cut", str(error)) from None
        return cls.from_dict(document, str(path))

    @classmethod
    def from_dict(cls, document: Any, what: str = "the plan") -> Plan:
        """Check what :meth:`as_dict` gave.

        Args:
            document: parsed JSON.
            what: how errors name it.

        Raises:
            InputError: an entry is missing, unknown, of another type, or contradicts another.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            raise InputError(f"{what} is no plan of a cut", f"its schema is not {SCHEMA}", "write it with Plan.save")
        try:
            fields = _fields(document, {"schema": str, "graph": str, **dict.fromkeys(_ENTRIES, list)}, "it", {})
            made = {
                name: tuple(
                    kind(**_fields(entry, types, f"entry {i} of {name}")) for i, entry in enumerate(fields[name])
                )
                for name, (kind, types) in _ENTRIES.items()
            }
            plan = cls(fields["graph"], **made)
            _check(plan)
        except ValueError as error:
            raise InputError(f"{what} is no plan of a cut", str(error)) from None
        return plan


_AXIS = {"axis": int, "kept": list, "of": int}
_ENTRIES: dict[str, tuple[type, dict[str, type]]] = {
    "inputs": (Input, {"name": str, "dtype": str, "shape": list}),
    "layers": (Layer, {"weight": str, "module": str, "node": str, **_AXIS}),
    "tensors": (Computed, {"names": list, "groups": list, **_AXIS}),
    "groups": (Width, {"name": str, "before": int, "after": int}),
}
_Items = Mapping[str, tuple[type, ...]]
_ITEMS: _Items = {
    "kept": (int,),
    "names": (str,),
    "groups": (str,),
    "shape": (int, str, type(None)),
}


def _fields(entry: Any, types: Mapping[str, type], what: str, items: _Items = _ITEMS) -> dict[str, Any]:
    """The fields of an object, lists as tuples of what ``items`` says."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{what} is no object")
    if entry.keys() != types.keys():
        odd = sorted(entry.keys() ^ types.keys())
        raise ValueError(f"{what} {'lacks' if odd[0] in types else 'has an unknown field'} {odd[0]!r}")
    for name, kind in types.items():
        value = entry[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name!r} of {what} is {value!r:.40}, not {kind.__name__}")
        for item in value if name in items else ():
            if not isinstance(item, items[name]) or isinstance(item, bool):
                raise ValueError(f"{name!r} of {what} holds {item!r:.40}")
    return {n: tuple(v) if isinstance(v, list) else v for n, v in entry.items()}


def _check(plan: Plan) -> None:
    """Raise ValueError where entries cannot be."""
    seen: set[Place] = set()
    for entry in (*plan.layers, *plan.tensors):
        places = (
            [(entry.weight, entry.node, entry.axis)]
            if isinstance(entry, Layer)
            else [(name, "", entry.axis) for name in entry.names]
        )
        what = f"axis {entry.axis} of {places[0][0]!r}" if places else "an entry of tensors"
        if entry.axis < 0:
            raise ValueError(f"{what} counts from the end")
        if not entry.kept or list(entry.kept) != sorted(set(entry.kept)):
            raise ValueError(f"{what} keeps nothing, or not in ascending order")
        if entry.kept[0] < 0 or entry.kept[-1] >= entry.of:
            raise ValueError(f"{what} keeps position {entry.kept[-1]} of {entry.of}")
        for place in places:
            if place in seen:
                raise ValueError(f"{what} is listed twice")
            seen.add(place)
    for width in plan.groups:
        if not 1 <= width.after <= width.before:
            raise ValueError(f"group {width.name!r} goes from {width.before} to {width.after} units")


def _mask(entry: Layer | Computed) -> np.ndarray:
    mask = np.zeros(entry.of, bool)
    mask[list(entry.kept)] = True
    return mask
