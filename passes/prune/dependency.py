"""Which channels of a graph can be cut, which only together, and the cut itself.

**What a cut is.** Some positions of some axes go. A position that goes on an axis of one tensor goes wherever the same
channel is; that is what the rules of :mod:`.rules` say, as equations that :mod:`.atoms` solves. Then, for *every*
tensor of the graph,

    cut tensor = masked tensor, restricted to the positions that stay,                                        (1)

where *masked* is the original graph in which every sum over an axis leaves out what is cut: the columns of a weight
are set to zero, or one factor is multiplied by a mask of 0 and 1 where a sum has no weight (q·k of an attention,
ReduceSum). The proof is by induction over the nodes, and each rule is one case of it. An elementwise operator computes
each position from the same position, so it keeps (1) whatever its function is: nothing asks that f(0) = 0, and a BN
or an activation between a producer and its consumer is no obstacle. An operator that moves data moves labels with it. A
sum over an axis (Conv, Gemm, MatMul, ReduceSum) adds the same terms in the cut graph as in the masked one. Outputs have
no position that goes, so there (1) says that both graphs compute the same.

Masking consumers is what zeroing channels means: a producer's rows and bias may be zeroed or not, nobody reads them.

A mean over channels divides by how many there are, and a maximum or minimum sees the zeros. The cut graph makes up for
that after the operator, with one elementwise node on a tensor that has lost the axis: mean(x) becomes mean(x') * C'/C,
max(x) becomes max(max(x'), 0).

**What stays whole.** A softmax or norm over channels computes another number when channels go: LayerNorm divides by the
number of channels, and by a deviation that the zeros change. No correction of the weights after it undoes that, since
it differs from token to token. So these axes stay whole, and with them what is tied to them, a whole residual stream of
a transformer. Its hidden layers, heads and head dimensions do not: they do not pass through the norm. GroupNorm may
lose whole groups. What reaches an output, is tied to an input, or meets an operator without a rule stays whole, too.
Each such :class:`Group` says which node is the reason.

**Groups.** The channels that go together are a *unit*. Units that occur on the same axes, equally often, are
interchangeable; they make up a :class:`Group`, of which at least one unit always stays, so that no axis becomes empty.
(Where a model picks single positions out of a grid of heads and dimensions, an axis still may: such a cut is refused.)

Source: DepGraph (Fang et al., CVPR 2023) for the question; see :mod:`.rules` for what is different here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance, where

from .atoms import NEVER, Atoms, Labels, fixed
from .rules import RULES, Axes, Contraction, Correction, Edit, Edits, Indices, Integers, Site, Unproved, key

Keep = Mapping[str, Sequence[int] | np.ndarray]
"""Group name -> indices of the units that stay, in any order; a group that is not named stays whole."""


Place = tuple[str, str, int]
"""An axis: a tensor, the first output of the node that reads it (``""`` for what the model computes), a number."""

_Uses = dict[bytes, tuple[list[np.ndarray], list[tuple[gs.Node, int]]]]


@dataclass(frozen=True, eq=False)
class Member:
    """Where a group occurs on a parameter.

    Attributes:
        tensor: name of the initializer (or of the output of a Constant node).
        node: name of the first output of the node that reads it.
        where: the node as a person reads it.
        module: torch module path of the node, ``""`` if unknown.
        input: which input of the node it is.
        axis: axis of the parameter.
        role: ``out``: rows of a weight, which make the channels; ``in``: columns, which read them; ``scale``: a bias, a
            norm's parameter or another constant that is combined with them.
        positions: int64 ``[units, n]``, the positions on the axis that go with each unit.
    """

    tensor: str
    node: str
    where: str
    module: str
    input: int
    axis: int
    role: str
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are interchangeable, each of which can be cut as one.

    Attributes:
        name: unique in the graph: the module path of the first layer that makes the channels, else the node's name.
        units: how many there are.
        members: where they occur on parameters, in the order of the nodes.
        reason: why the group stays whole, ``""`` if it can be cut.
        atoms: what :class:`Groups` calls the units.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    reason: str
    atoms: np.ndarray

    @property
    def prunable(self) -> bool:
        """Whether units can be cut."""
        return not self.reason

    @property
    def producers(self) -> tuple[Member, ...]:
        """The weights whose rows make these channels."""
        return tuple(m for m in self.members if m.role == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The weights whose columns read these channels."""
        return tuple(m for m in self.members if m.role == "in")


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a graph, and how to cut it. Holds names only, so it serves every copy of the graph.

    Attributes:
        groups: in the order of the nodes, those that stay whole included.
    """

    groups: tuple[Group, ...]
    _atoms: int
    _parameters: dict[tuple[str, int], dict[int, Labels]]
    _tensors: dict[str, dict[int, Labels]]
    _edits: Edits
    _contractions: tuple[Contraction, ...]

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {g.name: g for g in self.groups}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that can be cut."""
        return tuple(g for g in self.groups if g.prunable)

    @property
    def whole(self) -> tuple[Group, ...]:
        """The groups that stay whole; each has a reason."""
        return tuple(g for g in self.groups if not g.prunable)

    def cut(self, graph: Graph, keep: Keep) -> None:
        """Cut ``graph``, a copy of the one analysed, in place; shapes of its tensors are updated.

        Raises:
            InputError: ``keep`` names no group, a group that stays whole, no unit or one that is not there; or nothing
                would be left of an axis.
        """
        stays = self._stays(keep)
        for name, axes in self._tensors.items():
            for axis, labels in axes.items():
                if not _every(stays, labels).any():
                    raise InputError(f"nothing of axis {axis} of {name!r} would be left", fix="keep more channels")
        for tensor, uses, shared in self._slices(graph, stays):
            versions = {which: _restricted(graph.constant(tensor), masks) for which, (masks, _) in uses.items()}
            if len(versions) == 1 and not shared and isinstance(tensor, gs.Constant):
                tensor.values = next(iter(versions.values()))
                continue
            for which, (_, places) in uses.items():
                made = graph.new_constant(tensor.name, versions[which])
                for node, index in places:
                    node.inputs[index] = made
        nodes = {key(n): n for n in graph.nodes}
        for (name, place), edit in self._edits.items():
            _edit(graph, nodes[name], place, edit, stays)
        for node in graph.nodes:
            for tensor in node.outputs:
                if tensor.shape is not None and tensor.name in self._tensors and not graph.is_output(tensor):
                    axes = self._tensors[tensor.name]
                    tensor.shape = [
                        int(_every(stays, axes[i]).sum()) if i in axes else n for i, n in enumerate(tensor.shape)
                    ]
        graph.tidy()

    def mask(self, graph: Graph, keep: Keep) -> None:
        """Let every sum of ``graph``, a copy of the one analysed, leave out what :meth:`cut` would cut: the reference.

        Raises:
            InputError: as for :meth:`cut`, but for axes of which nothing is left.
        """
        stays = self._stays(keep)
        nodes = {key(n): n for n in graph.nodes}
        for sum_ in self._contractions:
            mask = _every(stays, sum_.labels)
            if mask.all():
                continue
            node = nodes[sum_.node]
            tensor = node.inputs[sum_.input]
            values = graph.constant(tensor)
            rank = len(tensor.shape) if values is None else values.ndim
            column = mask.reshape([-1 if i == sum_.axis else 1 for i in range(rank)])
            if values is not None:
                node.inputs[sum_.input] = graph.new_constant(tensor.name, values * column.astype(values.dtype))
            else:
                factor = graph.new_constant("mask", column.astype(tensor.dtype))
                made = graph.insert("Mul", [tensor, factor], [graph.new_variable("masked", tensor)], replaces=[node])
                node.inputs[sum_.input] = made.outputs[0]
        graph.tidy()

    def parameters_removed(self, graph: Graph, keep: Keep) -> int:
        """How many elements of floating-point constants :meth:`cut` would remove; ``graph`` is not changed."""
        removed = 0
        for tensor, uses, shared in self._slices(graph, self._stays(keep)):
            values = graph.constant(tensor)
            if values is not None and values.dtype.kind in "fV":
                left = sum(math.prod(int(m.sum()) for m in masks) for masks, _ in uses.values())
                removed += (0 if shared else values.size) - left
        return removed

    def kept(self, graph: Graph, keep: Keep) -> dict[Place, np.ndarray]:
        """What stays of each axis that :meth:`cut` would shorten, bool ``[extent]``; ``graph`` is not changed.

        Parameters come first, in the order of the nodes, then the tensors that the model computes.

        Raises:
            InputError: ``keep`` does not fit the groups.
        """
        stays = self._stays(keep)
        found = {place: _every(stays, labels) for place, labels in self._labels(graph).items()}
        return {place: mask for place, mask in found.items() if not mask.all()}

    def keep(self, graph: Graph, kept: Mapping[Place, np.ndarray]) -> dict[str, np.ndarray]:
        """The units to keep so that these axes keep these positions: what :meth:`kept` gave, or a part of it.

        A place without a node is looked for at every node that reads the tensor. Groups of which nothing goes are left
        out.

        Raises:
            InputError: an axis is not there or has another extent, or no cut of this graph leaves just these positions.
        """
        labels = self._labels(graph)
        by_tensor: dict[tuple[str, int], list[Labels]] = {}
        for (tensor, _, axis), found in labels.items():
            by_tensor.setdefault((tensor, axis), []).append(found)
        stays = np.ones(self._atoms, bool)
        wanted: list[tuple[Place, Labels, np.ndarray]] = []
        for place, mask in kept.items():
            tensor, node, axis = place
            for found in [labels[place]] if place in labels else [] if node else by_tensor.get((tensor, axis), []):
                if len(found) != len(mask):
                    raise InputError(f"axis {axis} of {tensor!r} has {len(found)} positions", f"not {len(mask)}")
                gone = np.ones(self._atoms, bool)
                gone[found[mask]] = False
                stays[np.unique(found)[gone[np.unique(found)]]] = False
                wanted.append((place, found, mask))
            if (not wanted or wanted[-1][0] != place) and not mask.all():
                raise InputError(f"axis {axis} of {tensor!r} cannot be cut", "no group of this graph lies on it")
        stays[NEVER] = True
        for (tensor, _, axis), found, mask in wanted:
            if not np.array_equal(_every(stays, found), mask):
                raise InputError(
                    f"axis {axis} of {tensor!r} cannot keep just these {int(mask.sum())} of {len(mask)} positions",
                    "in this graph other channels are tied to them",
                )
        units = {g.name: np.flatnonzero(stays[g.atoms]) for g in self.groups}
        return {g.name: units[g.name] for g in self.prunable if len(units[g.name]) < g.units}

    def lie(self, graph: Graph) -> dict[Place, tuple[str, ...]]:
        """The groups that lie on each axis of which something may go."""
        owner = np.full(self._atoms, -1)
        for number, group in enumerate(self.groups):
            owner[group.atoms] = number
        return {
            place: tuple(self.groups[i].name for i in np.unique(owner[labels]) if i >= 0)
            for place, labels in self._labels(graph).items()
        }

    def _labels(self, graph: Graph) -> dict[Place, Labels]:
        """Labels of each axis of which something may go."""
        nodes = {key(n): n for n in graph.nodes}
        found = {
            (nodes[node].inputs[index].name, node, axis): labels
            for (node, index), axes in self._parameters.items()
            for axis, labels in axes.items()
        }
        return found | {(n, "", axis): labels for n, axes in self._tensors.items() for axis, labels in axes.items()}

    def _stays(self, keep: Keep) -> np.ndarray:
        """Per atom whether it stays.

        Raises:
            InputError: ``keep`` does not fit the groups.
        """
        stays = np.ones(self._atoms, bool)
        groups = self._by_name
        for name, indices in keep.items():
            group = groups.get(name)
            if group is None:
                raise InputError(f"no group named {name!r}", "the graph is not the one that was analysed")
            kept = np.unique(np.asarray(indices, np.int64))
            if not len(kept) or kept[0] < 0 or kept[-1] >= group.units:
                raise InputError(f"group {name!r} cannot keep {list(indices)[:8]}", f"it has {group.units} units")
            if group.reason and len(kept) < group.units:
                raise InputError(f"group {name!r} cannot be cut", group.reason)
            stays[np.delete(group.atoms, kept)] = False
        stays[NEVER] = True
        return stays

    def _slices(self, graph: Graph, stays: np.ndarray) -> Iterator[tuple[gs.Tensor, _Uses, bool]]:
        """Parameters that a cut touches, by what stays of each axis, and whether something reads them as they are."""
        nodes = {key(n): n for n in graph.nodes}
        found: dict[int, tuple[gs.Tensor, _Uses]] = {}
        for (name, index), axes in self._parameters.items():
            kept = {axis: _every(stays, labels) for axis, labels in axes.items()}
            if all(k.all() for k in kept.values()):
                continue
            tensor = nodes[name].inputs[index]
            values = graph.constant(tensor)
            assert values is not None
            masks = [kept.get(i, np.ones(n, bool)) for i, n in enumerate(values.shape)]
            uses = found.setdefault(id(tensor), (tensor, {}))[1]
            uses.setdefault(b"".join(np.packbits(m).tobytes() for m in masks), (masks, []))[1].append(
                (nodes[name], index)
            )
        for tensor, uses in found.values():
            cut = sum(len(places) for _, places in uses.values())
            yield tensor, uses, len(tensor.outputs) > cut or graph.is_output(tensor)


def groups(graph: Graph) -> Groups:
    """Analyse a graph, whose shapes are inferred first; otherwise it is not changed.

    Raises:
        InputError: types or shapes contradict one another.
    """
    graph.infer_shapes()
    return _Analysis(graph).result()


def _every(stays: np.ndarray, labels: Labels) -> np.ndarray:
    """Which positions of an axis stay, bool ``[extent]``: those of which all atoms do."""
    return np.asarray(stays[labels].all(axis=1))


def _restricted(values: np.ndarray | None, masks: Sequence[np.ndarray]) -> np.ndarray:
    """The positions of an array that stay, by axis."""
    assert values is not None
    for axis, mask in enumerate(masks):
        if not mask.all():
            values = np.compress(mask, values, axis=axis)
    return values


def _correct(graph: Graph, node: gs.Node, edit: Correction, stays: np.ndarray) -> None:
    """Let a mean divide by as many as before the cut, and a maximum or minimum see the zeros."""
    share = math.prod(float(_every(stays, labels).mean()) for labels in edit.axes)
    if share == 1:
        return
    output = node.outputs[0]
    op, value = {"ReduceMean": ("Mul", share), "ReduceMax": ("Max", 0.0), "ReduceMin": ("Min", 0.0)}[node.op]
    node.outputs = [graph.new_variable(output.name, output)]
    constant = graph.new_constant(f"{output.name}_{op}", np.array(value, output.dtype))
    graph.insert(op, [node.outputs[0], constant], [output], replaces=[node])


def _edit(graph: Graph, node: gs.Node, place: str | int, edit: Edit, stays: np.ndarray) -> None:
    """Let a node follow a cut."""
    if isinstance(edit, Correction):
        _correct(graph, node, edit, stays)
        return
    values = edit.values.copy()
    if isinstance(edit, Indices):
        kept = _every(stays, edit.labels)
        positions = np.where(values < 0, values + len(kept), values)
        values = (np.cumsum(kept) - 1)[positions[kept[positions]] if values.ndim else positions].astype(values.dtype)
    else:
        for position, labels in edit.counts.items():
            values.reshape(-1)[position] = _every(stays, labels).sum()
    if np.array_equal(values, edit.values):
        return
    if isinstance(place, str):
        node.attrs[place] = values.tolist() if isinstance(node.attrs.get(place, []), list) else int(values[0])
        return
    constant = graph.new_constant(f"{key(node)}_{place}", values)
    if place < len(node.inputs):
        node.inputs[place] = constant
    else:  # a Split into equal parts
        node.attrs.pop("num_outputs", None)
        node.inputs.append(constant)


class _Analysis:
    """One walk over the nodes in order, then the groups that its equations leave."""

    def __init__(self, graph: Graph):
        self.graph, self.atoms = graph, Atoms()
        self.tensors: dict[str, Axes | None] = {}
        self.weights: dict[int, tuple[np.ndarray, Axes]] = {}  # by identity: shared weights are one array
        self.parameters: dict[tuple[str, int], Axes] = {}
        self.roles: dict[tuple[str, int], Sequence[str]] = {}
        self.edits: Edits = {}
        self.contractions: list[Contraction] = []
        for tensor in graph.inputs:
            self.tensors[tensor.name] = self.declared(tensor.shape, f"it is axis {{}} of the input {tensor.name!r}")
        for node in graph.nodes:
            if not all(graph.constant(t) is not None for t in node.outputs if t.name):
                self.visit(node)
        for tensor in graph.outputs:
            node = graph.producer(tensor)
            made = f", which {where(node)} computes" if node else ""
            for axis in self.tensors.get(tensor.name) or ():
                if axis is not None:
                    self.atoms.pin(axis, f"it reaches the output {tensor.name!r}{made}")

    def declared(self, shape: Sequence[int | str | None] | None, reason: str) -> Axes | None:
        """Axes of a tensor of which nothing goes; ``reason`` may name the axis, ``{}``."""
        if shape is None:
            return None
        axes: Axes = [self.atoms.fresh(n) if isinstance(n, int) and n > 1 else None for n in shape]
        for number, axis in enumerate(axes):
            if axis is not None:
                self.atoms.pin(axis, reason.format(number))
        return [fixed(n) if a is None and isinstance(n, int) else a for a, n in zip(axes, shape, strict=True)]

    def constant(self, site: Site, index: int, roles: Sequence[str]) -> Axes:
        """Labels of a constant: of a weight the same wherever it is used, else new ones for each use.

        That two layers share a bias says nothing: whoever saved the model may have stored equal constants once.
        """
        value = site.values[index]
        assert value is not None
        place = key(site.node), index
        axes: Axes = [self.atoms.fresh(n) if n > 1 and r else fixed(n) for n, r in zip(value.shape, roles, strict=True)]
        if roles.count("scale") < len(roles):
            axes = self.weights.setdefault(id(value), (value, axes))[1]
        self.roles[place] = roles
        self.parameters[place] = axes
        return axes

    def visit(self, node: gs.Node) -> None:
        """Apply the rule of a node; without one, all that it reads stays whole."""
        values = [self.graph.constant(t) if t.name else None for t in node.inputs]
        inputs = [self.tensors.get(t.name) if v is None else None for t, v in zip(node.inputs, values, strict=True)]
        site = Site(self.graph, node, self.atoms, inputs, values, lambda i, r: self.constant(site, i, r), self.edits,
                    self.contractions)  # fmt: skip
        try:
            rule = RULES.get(node.op) if node.domain in (None, "", "ai.onnx") else None
            if rule is None or any(True for _ in node.subgraphs()):
                raise Unproved("there is no rule for it")
            outputs = rule(site)
            extra = [t.name for t in node.outputs[len(outputs) :] if t.outputs or self.graph.is_output(t)]
            if extra:
                raise Unproved(f"there is no rule for its output {extra[0]!r}")
            for index in {i for i, axes in enumerate(inputs) if axes} - site.read:
                for axis in inputs[index] or ():
                    site.pin(axis, f"{where(node)} reads its value")
            for tensor, axes in zip(node.outputs, outputs, strict=False):
                self.tensors[tensor.name] = self.checked(tensor, axes)
        except Unproved as error:
            reason = f"{where(node)} reads it: {error}"
            for index, axes in enumerate(site.inputs):
                for axis in (site.axes(index) if site.values[index] is not None else axes) or ():
                    site.pin(axis, reason)
            for name in _captured(node):
                for axis in self.tensors.get(name) or ():
                    site.pin(axis, reason)
            for tensor in node.outputs:
                self.tensors[tensor.name] = self.declared(tensor.shape, f"{where(node)} computes it: {error}")

    def checked(self, tensor: gs.Tensor, axes: Axes) -> Axes:
        """Axes as a rule gave them, after comparing them with the recorded shape; one position alone never goes."""
        for number, axis in enumerate(axes):
            if axis is None:
                continue
            recorded = tensor.shape[number] if tensor.shape is not None and number < len(tensor.shape) else None
            if isinstance(recorded, int) and recorded != len(axis):
                raise Unproved(f"axis {number} of {tensor.name!r} has {recorded} positions, its rule gives {len(axis)}")
            if len(axis) == 1 and axis.shape[1]:
                self.atoms.pin(axis, f"{where(tensor.inputs[0])} leaves a single one of them")
        return [a if a is None or len(a) > 1 else fixed(1) for a in axes]

    # -- the result ------------------------------------------------------------------------------------------------

    def result(self) -> Groups:
        """Collect units into groups."""
        atoms, count = self.atoms, self.atoms.count
        rng = np.random.default_rng(0)
        occurs = np.zeros(
            count, np.uint64
        )  # a sum of one random number per axis and occurrence: equal sums, equal axes
        spots: list[tuple[tuple[str, int], int, np.ndarray]] = []
        seen = np.zeros(count, bool)
        for place, axes in self.parameters.items():
            for number, axis in enumerate(axes):
                if axis is not None and axis.shape[1]:
                    role = self.roles[place][number]
                    labels = atoms.expand(axis) if role != "scale" else atoms.open(axis)
                    spots.append((place, number, labels))
                    seen[labels] = True
                    np.add.at(occurs, labels, rng.integers(1, 2**63, dtype=np.uint64))
        for axes in self.tensors.values():
            for axis in axes or ():
                if axis is not None and axis.shape[1]:
                    np.add.at(occurs, atoms.open(axis), rng.integers(1, 2**63, dtype=np.uint64))
        seen[NEVER] = False
        units = np.flatnonzero(seen)
        why = atoms.why(units[:, None])
        _, which = np.unique(np.stack([occurs[units], why.astype(np.uint64)]), axis=1, return_inverse=True)
        which = which.reshape(-1)
        group_of, unit_of = np.full(count, -1), np.zeros(count, np.int64)
        ordered = np.argsort(which, kind="stable")
        starts = np.searchsorted(which[ordered], np.arange(which.max(initial=-1) + 1))
        group_of[units] = which
        unit_of[units[ordered]] = np.arange(len(units)) - starts[which[ordered]]
        sizes = np.bincount(which, minlength=len(starts))
        members: dict[int, list[Member]] = {}
        nodes = {key(n): n for n in self.graph.nodes}
        for place, number, labels in spots:
            for group in np.unique(group_of[labels]):
                if group >= 0:
                    found = self.member(
                        nodes[place[0]], place, number, labels, group_of == group, unit_of, int(sizes[group])
                    )
                    members.setdefault(int(group), []).append(found)
        order = {name: i for i, name in enumerate(nodes)}
        made = [
            Group("", int(sizes[g]), tuple(sorted(m, key=lambda x: order[x.node])), self.reason(g, sizes, which, why),
                  units[which == g])
            for g, m in members.items()
        ]  # fmt: skip
        made.sort(key=lambda g: order[g.members[0].node])
        return Groups(
            tuple(_named(made)),
            count,
            {p: f for p, axes in self.parameters.items() if (f := self.free(axes))},
            {n: f for n, axes in self.tensors.items() if (f := self.free(axes or []))},
            {p: self.final(e) for p, e in self.edits.items()},
            tuple(replace(c, labels=atoms.open(c.labels)) for c in self.contractions),
        )

    def reason(self, group: int, sizes: np.ndarray, which: np.ndarray, why: np.ndarray) -> str:
        """Why a group stays whole."""
        text = self.atoms.reasons[why[which == group][0]]
        return text or ("it has a single unit, and one stays" if sizes[group] == 1 else "")

    def free(self, axes: Axes) -> dict[int, Labels]:
        """The axes of which something may go."""
        found = {i: self.atoms.open(a) for i, a in enumerate(axes) if a is not None and a.shape[1]}
        return {i: labels for i, labels in found.items() if labels.shape[1]}

    def final(self, edit: Edit) -> Edit:
        """An edit in the atoms that are left."""
        if isinstance(edit, Correction):
            return Correction([self.atoms.open(a) for a in edit.axes])
        if isinstance(edit, Indices):
            return Indices(edit.values, self.atoms.open(edit.labels))
        return Integers(edit.values, {i: self.atoms.open(x) for i, x in edit.counts.items()})

    def member(
        self, node: gs.Node, place: tuple[str, int], axis: int, labels: Labels, mine: np.ndarray, unit_of: np.ndarray,
        units: int,
    ) -> Member:  # fmt: skip
        """Where the units of one group lie on an axis of a parameter."""
        rows, columns = np.nonzero(mine[labels])
        unit = unit_of[labels[rows, columns]]
        order = np.argsort(unit, kind="stable")
        positions = rows[order].reshape(units, -1)
        return Member(
            node.inputs[place[1]].name, place[0], where(node), provenance(node).module, place[1], axis,
            self.roles[place][axis], positions,
        )  # fmt: skip


def _named(made: Sequence[Group]) -> Iterator[Group]:
    """Groups with names of their own: of the first layer that makes the channels, else of the first that has them."""
    taken: Counter[str] = Counter()
    for group in made:
        first = (*group.producers, *group.members)[0]
        name = first.module or first.node
        taken[name] += 1
        yield replace(group, name=name if taken[name] == 1 else f"{name}#{taken[name]}")


def _captured(node: gs.Node) -> Iterator[str]:
    """Names that the bodies of a node may read from outside."""
    for body in node.subgraphs():
        for inner in body.nodes:
            yield from (t.name for t in inner.inputs)
            yield from _captured(inner)
        yield from (t.name for t in body.outputs)
