"""What each ONNX operator ties: one rule per operator, most of them one line of data.

Most operators are described as einsum would: a letter per axis, the terms of the inputs, then that of the output. The
same letter says that the same positions go; a letter that the output lacks is summed over.

==========  ========================================================================================================
``c``       an axis
``(gi)``    an axis that is the product of others, the last one varying fastest
``C``       an axis that stays whole: what the operator computes depends on all of it (a mean, a maximum, a block of
            pixels)
``1``       an axis of extent 1
``*``       any number of axes that stay whole (those a kernel slides over)
``...``     any number of axes, broadcast
==========  ========================================================================================================

A grouped convolution is ``n(gi)*, (go)i*, (go) -> n(go)*``: whole groups may go, or the same channels of each group. A
depthwise one has ``i = o = 1``, an ordinary one ``g = 1``. An axis of extent 1 never goes.

Operators that only move data are functions on the labels, for what they do depends on shapes: Reshape, Concat, Split,
Slice, Gather, Pad, Expand, Tile, Resize. They and the grouped ones also say which integers of the graph count channels
and have to follow a cut (:class:`Integers`, :class:`Indices`). A mean over channels counts zeros, and a maximum sees
them: a :class:`Correction` makes up for those taken out. An operator without a rule keeps all it reads whole.

Source: the ONNX operator specification (https://onnx.ai/onnx/operators/). The formulation of dependencies between the
parameters of a network is after DepGraph (Fang et al., CVPR 2023); there it is pairwise between layers, here it is per
channel.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile.graph import Dim, Graph, where

from .atoms import Atoms, Labels, fixed, product, stacked

Axis: TypeAlias = "Labels | None"
"""Labels of an axis, or None for a dynamic one, of which nothing goes."""
Axes: TypeAlias = "list[Axis]"


class Unproved(Exception):
    """A rule does not hold for a node; the text says why, and everything the node reads stays whole."""


@dataclass
class Integers:
    """Integers of a node that count channels: an attribute (by name) or an input (by index).

    Attributes:
        values: as the graph has them.
        counts: position in ``values`` -> labels of the channels counted there.
    """

    values: np.ndarray
    counts: dict[int, Labels] = field(default_factory=dict)


@dataclass
class Indices:
    """Indices of a Gather along an axis with these labels."""

    values: np.ndarray
    labels: Labels


@dataclass
class Correction:
    """What follows a mean, maximum or minimum over these axes when zeros are taken out of it."""

    axes: list[Labels]


@dataclass(frozen=True)
class Contraction:
    """A sum over an axis of an input of a node, to which what is cut must contribute nothing."""

    node: str
    input: int
    axis: int
    labels: Labels


Edit: TypeAlias = "Integers | Indices | Correction"
Edits: TypeAlias = "dict[tuple[str, str | int], Edit]"


def key(node: gs.Node) -> str:
    """What names a node in this package: its first output."""
    return node.outputs[0].name


@dataclass
class Site:
    """A node under analysis, with the labels of what it reads.

    Attributes:
        inputs: axes of each input; None for a constant, for one that is not given, or whose rank is unknown.
        values: of each input that is a constant.
        constant: makes the axes of a constant input, given the role of each: ``in``, ``out``, ``scale``, or ``""`` of
            one that stays whole.
        edits, contractions: of the whole graph, to which rules add.
        read: inputs whose axes the rule has looked at; what it reads otherwise must not change.
    """

    graph: Graph
    node: gs.Node
    atoms: Atoms
    inputs: list[Axes | None]
    values: list[np.ndarray | None]
    constant: Callable[[int, Sequence[str]], Axes]
    edits: Edits
    contractions: list[Contraction]
    read: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        """How reasons name the node."""
        return where(self.node)

    def given(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def axes(self, index: int) -> Axes:
        """Axes of an input.

        Raises:
            Unproved: its rank is unknown.
        """
        self.read.add(index)
        axes, value = self.inputs[index], self.values[index]
        if axes is None and value is not None:
            axes = self.inputs[index] = self.constant(index, ["scale"] * value.ndim)
        if axes is None:
            raise Unproved(f"the rank of {self.node.inputs[index].name!r} is unknown")
        return axes

    def shape(self, output: int = 0) -> Sequence[Dim]:
        """Recorded shape of an output.

        Raises:
            Unproved: there is none.
        """
        shape = self.node.outputs[output].shape
        if shape is None:
            raise Unproved(f"the rank of {self.node.outputs[output].name!r} is unknown")
        return list(shape)

    def ints(self, index: int, name: str) -> list[int] | None:
        """Integers that are an attribute in one opset and an input in another; None if absent.

        Raises:
            Unproved: they are computed.
        """
        if name in self.node.attrs:
            return np.reshape(self.node.attrs[name], -1).tolist()
        if not self.given(index):
            return None
        if (value := self.values[index]) is None:
            raise Unproved(f"its {name} are computed")
        return value.reshape(-1).tolist()

    def axis(self, default: int | None, rank: int) -> int:
        """The attribute ``axis``, not negative."""
        axis = self.node.attrs.get("axis", default)
        if axis is None:
            raise Unproved("it has no axis")
        return axis + rank if axis < 0 else axis

    def pin(self, axis: Axis, text: str) -> None:
        """Keep an axis whole."""
        if axis is not None and axis.shape[1]:
            self.atoms.pin(axis, text)

    def of(self, index: int, number: int) -> str:
        """How reasons name an axis of an input."""
        tensor = self.node.inputs[index]
        maker = self.graph.producer(tensor)
        if maker is not None and maker.op == "Pad":  # of an axis that is not padded
            tensor = maker.inputs[0]
            maker = self.graph.producer(tensor)
        return f"axis {number} of {tensor.name!r}" + (f", which {where(maker)} computes" if maker else "")

    def tie(self, one: Axis, two: Axis, of_one: str = "an axis", of_two: str = "an axis") -> Axis:
        """The axis that two axes broadcast to; ``of_one`` and ``of_two`` name them."""
        if one is None or two is None:
            for axis in (one, two):
                if axis is not None and len(axis) != 1:
                    self.pin(axis, f"{self.name} ties it to an axis of unknown extent")
            return None
        if len(one) != len(two):
            if 1 not in (len(one), len(two)):
                raise Unproved(f"it combines axes of {len(one)} and {len(two)}")
            return two if len(one) == 1 else one
        reasons = (f"{self.name} ties it to {of}: nothing of it can go" for of in (of_two, of_one))
        self.atoms.unify(one, two, *reasons)
        return one

    def split(self, axis: Axis, sizes: Sequence[int | None]) -> Axes:
        """The factors of an axis."""
        if axis is None:
            return [None] * len(sizes)
        wide = [i for i, n in enumerate(sizes) if n != 1]
        if len(wide) <= 1:
            return [axis if i in wide else fixed(1) for i in range(len(sizes))]
        extents = [int(n or 0) for n in sizes]
        labels = self.atoms.tidy(axis)
        found = [fixed(n) for n in extents]
        for column in labels.T:
            grid = column.reshape(extents)
            varies = [i for i in wide if (grid != np.take(grid, [0], axis=i)).any()]
            if len(varies) <= 1:
                factor = varies[0] if varies else wide[0]
                line = grid[tuple(slice(None) if i == factor else 0 for i in range(len(extents)))]
                found[factor] = np.concatenate([found[factor], line[:, None]], axis=1)
                continue
            fresh = [self.atoms.fresh(n) if i in varies else fixed(n) for i, n in enumerate(extents)]
            self.atoms.unify(column[:, None], product(fresh), f"{self.name} splits it")
            found = [np.concatenate(pair, axis=1) for pair in zip(found, fresh, strict=True)]
        return list(found)

    def merge(self, factors: Axes) -> Axis:
        """The product of axes."""
        if len(factors) == 1:
            return factors[0]
        if any(f is None for f in factors):
            for f in factors:
                self.pin(f, f"{self.name} merges it with an axis of unknown extent")
            return None
        return product([f if len(f) == 1 else self.atoms.tidy(f) for f in factors if f is not None])

    def count(self, place: str | int, values: np.ndarray, position: int, axis: Axis) -> None:
        """Let an integer of the node follow the number of channels that stay."""
        if axis is not None and axis.shape[1]:
            edit = self.edits.setdefault((key(self.node), place), Integers(values))
            assert isinstance(edit, Integers)
            edit.counts[position] = axis

    def count_entry(self, index: int, position: int, axis: Axis) -> None:
        """The same for an entry of a shape, which is a constant, or a Concat of constants and computed sizes.

        A Concat may give the shape of several nodes, and then their axes are tied, whatever they hold.
        """
        tensor, place = self.node.inputs[index], (key(self.node), index)
        if (value := self.values[index]) is not None:
            if value[position] != -1:
                self.count(index, value, position, axis)
            return
        if axis is None:
            return
        maker = self.graph.producer(tensor)
        found = None
        while maker is not None and maker.op == "Concat" and all(_only_shape(r, tensor) for r in tensor.outputs):
            found = _part(self.graph, maker, position)
            if found is None:
                break
            index, position = found
            tensor, place = maker.inputs[index], (key(maker), index)
            maker = self.graph.producer(tensor)
        value = self.graph.constant(tensor) if found else None
        if value is not None and value[position] == -1:
            return
        if value is None or value[position] == 0:
            self.pin(axis, f"the shape that {self.name} gives it is computed")
            return
        edit = self.edits.setdefault(place, Integers(value))
        assert isinstance(edit, Integers)
        tied = self.tie(edit.counts.get(position, axis), axis)
        assert tied is not None
        edit.counts[position] = tied


def _part(graph: Graph, concat: gs.Node, position: int) -> tuple[int, int] | None:
    """Which input of a Concat of lists holds a position, and where; None if that is not known."""
    for index, part in enumerate(concat.inputs):
        value = graph.constant(part)
        length = len(value) if value is not None else (part.shape or [None])[0]
        if not isinstance(length, int):
            return None
        if position < length:
            return index, position
        position -= length
    return None


def _only_shape(reader: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node reads a tensor as a shape, or as a part of one."""
    return reader.op == "Concat" or (reader.op in ("Reshape", "Expand", "Resize") and reader.inputs[0] is not tensor)


Rule: TypeAlias = "Callable[[Site], list[Axes]]"


# -- operators described by their axes ---------------------------------------------------------------------------------

_TOKEN = re.compile(r"\([A-Za-z]+\)|\.\.\.|[A-Za-z*1]")


def apply(site: Site, spec: str, sizes: Mapping[str, int]) -> list[Axes]:
    """Axes of the first output of a node that a spec describes."""
    left, right = spec.replace(" ", "").split("->")
    output = _TOKEN.findall(right)
    summed = set(re.sub(r"[^A-Za-z]", "", left)) - set(re.sub(r"[^A-Za-z]", "", right))
    env: dict[str, Axis] = {}
    slid = 0
    reading: dict[str, list[tuple[int, int, str]]] = {}
    for index, term in enumerate(left.split(",")):
        if not site.given(index):
            continue
        value = site.values[index]
        term = _spread(_TOKEN.findall(term), len(site.axes(index)) if value is None else value.ndim)
        slid = max(slid, term.count("*"))
        roles = ["in" if summed & set(t) else "" if t in ("*", "1") else "out" for t in term]
        if value is not None and "in" in roles:
            site.inputs[index] = site.constant(index, roles)
        for number, (axis, token) in enumerate(zip(site.axes(index), term, strict=True)):
            if token in ("*", "1"):
                site.pin(axis, f"{site.name} works along it")
                continue
            letters = [token] if token[0] == "." else list(token.strip("()"))
            parts = site.split(axis, _factors(axis, letters, sizes)) if len(letters) > 1 else [axis]
            for letter, part in zip(letters, parts, strict=True):
                if letter in env:
                    first = reading[letter][0]
                    env[letter] = site.tie(env[letter], part, site.of(*first[:2]), site.of(index, number))
                else:
                    env[letter] = part
                if letter.isupper():
                    site.pin(part, f"{site.name} computes on all of it together")
                reading.setdefault(letter, []).append((index, number, token))
    for letter in sorted(summed):
        _contract(site, reading.get(letter, []), env)
    batch = sum(name[0] == "." for name in env)
    shape = site.node.outputs[0].shape
    result: Axes = []
    for token in _spread(output, sum({"*": slid, "...": batch}.get(t, 1) for t in output)):
        if token in ("*", "1"):
            extent = 1 if token == "1" else shape[len(result)] if shape is not None else None
            result.append(fixed(extent) if isinstance(extent, int) else None)
        elif token[0] == ".":
            result.append(env[token])
        else:
            letters = token.strip("()")
            result.append(site.merge([env[x] if x in env else fixed(sizes[x]) for x in letters]))
    return [result]


def _spread(term: list[str], rank: int) -> list[str]:
    """The tokens of a term, one per axis; broadcast axes are numbered from the last one, ``.0``."""
    open_ended = next((i for i, t in enumerate(term) if t in ("*", "...")), None)
    if open_ended is None:
        if rank > len(term):
            raise Unproved(f"it has {rank} axes where {len(term)} are meant")
        return term[len(term) - rank :]
    count = rank - len(term) + 1
    if count < 0:
        raise Unproved(f"it has only {rank} axes")
    middle = ["*"] * count if term[open_ended] == "*" else [f".{i}" for i in reversed(range(count))]
    return [*term[:open_ended], *middle, *term[open_ended + 1 :]]


def _factors(axis: Axis, letters: Sequence[str], sizes: Mapping[str, int]) -> list[int | None]:
    """Extents of the factors of an axis, of which one may be left to be computed."""
    if axis is None:
        return [None] * len(letters)
    known = math.prod(sizes.get(x, 1) for x in letters)
    if len(axis) % known:
        raise Unproved(f"{len(axis)} channels do not divide by {known}")
    return [sizes.get(x, len(axis) // known) for x in letters]


def _contract(site: Site, readers: Sequence[tuple[int, int, str]], env: Mapping[str, Axis]) -> None:
    """Record a sum: what it must be masked on is a weight if there is one, else what it is a sum over."""
    if not readers:
        return
    index, axis, token = next((r for r in readers if site.values[r[0]] is not None), readers[0])
    labels = site.merge([env[x] for x in token.strip("()")])
    if labels is not None and labels.shape[1]:
        site.contractions.append(Contraction(key(site.node), index, axis, labels))


def _conv(site: Site) -> list[Axes]:
    spec = {"Conv": "n(gi)*,(go)i*,(go)->n(go)*", "ConvTranspose": "n(gi)*,(gi)o*,(go)->n(go)*"}[site.node.op]
    groups = int(site.node.attrs.get("group", 1))
    outputs = apply(site, spec, {"g": groups})
    if groups > 1:
        weight = site.axes(1)[0]
        site.count("group", np.array([groups]), 0, site.split(weight, _factors(weight, "gx", {"g": groups}))[0])
    return outputs


def _group_norm(site: Site) -> list[Axes]:
    groups = int(site.node.attrs["num_groups"])
    rest = string.ascii_uppercase[: len(site.axes(0)) - 2]
    outputs = apply(site, f"n(gR){rest},(gR),(gR)->n(gR){rest}", {"g": groups})
    source = site.axes(0)[1]
    site.count("num_groups", np.array([groups]), 0, site.split(source, _factors(source, "gx", {"g": groups}))[0])
    return outputs


def _block(spec: str) -> Rule:
    return lambda site: apply(site, spec, {"B": int(site.node.attrs["blocksize"]) ** 2})


def _depth_to_space(site: Site) -> list[Axes]:
    order = site.node.attrs.get("mode", "DCR")
    return _block("n(cB)*->nc*" if order in ("CRD", b"CRD") else "n(Bc)*->nc*")(site)


def _gemm(site: Site) -> list[Axes]:
    a = "km" if site.node.attrs.get("transA", 0) else "mk"
    b = "nk" if site.node.attrs.get("transB", 0) else "kn"
    return apply(site, f"{a},{b},mn->mn", {})


def _matmul(site: Site) -> list[Axes]:
    ranks = [len(site.axes(i)) for i in (0, 1)]
    one, two = ("...mk" if ranks[0] > 1 else "k"), ("...kn" if ranks[1] > 1 else "k")
    batch = "..." if max(ranks) > 2 else ""
    one, two = (t if r > 2 else t.replace("...", "") for t, r in zip((one, two), ranks, strict=True))
    return apply(site, f"{one},{two}->{batch}{'m' * (ranks[0] > 1)}{'n' * (ranks[1] > 1)}", {})


def _einsum(site: Site) -> list[Axes]:
    equation = site.node.attrs["equation"].replace(" ", "")
    if "->" not in equation or equation.lower() != equation:
        raise Unproved("its equation leaves the output implicit, or has capitals")
    return apply(site, equation, {})


def _transpose(site: Site) -> list[Axes]:
    axes = site.axes(0)
    return [[axes[i] for i in site.node.attrs.get("perm", range(len(axes))[::-1])]]


def _along(default: int, *, rest: bool = False, norm: bool = False) -> Rule:
    """Operators that need all of one axis, or of all axes from there on; a norm has weights for these."""

    def rule(site: Site) -> list[Axes]:
        rank = len(site.axes(0))
        axis = site.axis(default, rank)
        letters = "".join(
            x.upper() if i == axis or (rest and i > axis) else x for i, x in enumerate(string.ascii_lowercase[:rank])
        )
        return apply(site, letters + f",{letters[axis:]}" * (2 * norm) + f"->{letters}", {})

    return rule


def _instance_norm(site: Site) -> list[Axes]:
    rest = string.ascii_uppercase[2 : len(site.axes(0))]
    return apply(site, f"ab{rest},b,b->ab{rest}", {})


def _global_pool(site: Site) -> list[Axes]:
    rest = string.ascii_uppercase[2 : len(site.axes(0))]
    return apply(site, f"ab{rest}->ab{'1' * len(rest)}", {})


def _softmax(site: Site) -> list[Axes]:
    flattens = site.graph.opsets.get("", 0) < 13
    return _along(1 if flattens else -1, rest=flattens)(site)


def _reduce(summed: bool, corrected: bool = False) -> Rule:
    """Reductions in which a zero counts for nothing or can be corrected for, and those that need all of an axis."""

    def rule(site: Site) -> list[Axes]:
        rank = len(site.axes(0))
        axes = site.ints(1, "axes")
        if not axes and site.node.attrs.get("noop_with_empty_axes", 0):
            return [site.axes(0)]
        reduced = {a % rank for a in axes} if axes else set(range(rank))
        given = [x if summed or i not in reduced else x.upper() for i, x in enumerate(string.ascii_lowercase[:rank])]
        one = "1" if site.node.attrs.get("keepdims", 1) else ""
        kept = "".join(one if i in reduced else x for i, x in enumerate(given))
        outputs = apply(site, f"{''.join(given)}->{kept}", {})
        if corrected:
            found = [a for i, a in enumerate(site.axes(0)) if i in reduced and a is not None]
            site.edits[key(site.node), ""] = Correction(found)
        return outputs

    return rule


def _flatten(site: Site) -> list[Axes]:
    rank = len(site.axes(0))
    axis = site.axis(1, rank)
    parts = [string.ascii_lowercase[:rank][:axis], string.ascii_lowercase[:rank][axis:]]
    return apply(site, f"{string.ascii_lowercase[:rank]}->" + "".join(f"({p})" if p else "1" for p in parts), {})


def _squeeze(site: Site) -> list[Axes]:
    axes, wanted = site.axes(0), site.ints(1, "axes")
    gone = (
        {a % len(axes) for a in wanted} if wanted else {i for i, a in enumerate(axes) if a is not None and len(a) == 1}
    )
    return [[a for i, a in enumerate(axes) if i not in gone]]


def _unsqueeze(site: Site) -> list[Axes]:
    axes, wanted = iter(site.axes(0)), site.ints(1, "axes") or []
    rank = len(site.axes(0)) + len(wanted)
    new = {a % rank for a in wanted}
    return [[fixed(1) if i in new else next(axes) for i in range(rank)]]


def _elementwise(site: Site) -> list[Axes]:
    """Each element depends on those at the same position, so whatever the function, the same positions go."""
    indices = [i for i in range(len(site.node.inputs)) if site.given(i)]
    rank = max(len(site.axes(i)) for i in indices)
    result: Axes = [fixed(1)] * rank
    names = ["an axis"] * rank
    for index in indices:
        axes = site.axes(index)
        for number, axis in enumerate(axes, rank - len(axes)):
            name = site.of(index, number - rank + len(axes))
            known = result[number]
            result[number] = site.tie(known, axis, names[number], name)
            names[number] = name if known is not None and len(known) == 1 else names[number]
    return [result] * len(site.node.outputs)


# -- operators that move data -----------------------------------------------------------------------------------------


def _reshape(site: Site) -> list[Axes]:
    axes, shape = site.axes(0), site.shape()
    result: Axes = [fixed(n) if isinstance(n, int) else None for n in shape]
    old = [None if a is None else len(a) for a in axes]
    new = [n if isinstance(n, int) else None for n in shape]
    rows, columns = len(old), len(new)
    while (block := _block_before(old[:rows], new[:columns])) is not None:
        i, j = block
        for number, axis in enumerate(_refactor(site, axes[i:rows], new[j:columns]), j):
            result[number] = axis
            site.count_entry(1, number, axis)
        rows, columns = i, j
    for axis in axes[:rows]:
        site.pin(axis, f"{site.name} merges it with an axis of unknown extent")
    for number, axis in enumerate(result[:columns]):
        site.count_entry(1, number, axis)
    return [result]


def _block_before(old: Sequence[int | None], new: Sequence[int | None]) -> tuple[int, int] | None:
    """Where the shortest last parts of two shapes start that have the same product; None if that is not known."""
    i, j, left, right = len(old), len(new), 1, 1
    while left != right or (i, j) == (len(old), len(new)):
        shorter = left <= right
        extent = old[i - 1] if shorter and i else new[j - 1] if not shorter and j else None
        if extent is None:
            return None
        i, j = (i - 1, j) if shorter else (i, j - 1)
        left, right = (left * extent, right) if shorter else (left, right * extent)
    return i, j


def _refactor(site: Site, axes: Axes, shape: Sequence[int | None]) -> Axes:
    """Axes of known extents, split and merged into others of the same product."""
    old, new = ([int(n) for n in s if n is not None] for s in ([None if a is None else len(a) for a in axes], shape))
    steps = sorted({math.prod(s[i:]) for s in (old, new) for i in range(len(s) + 1)})
    if any(b % a for a, b in itertools.pairwise(steps)):
        for axis in axes:
            site.pin(axis, f"{site.name} regroups {old} as {new}")
        return [fixed(n) for n in new]
    factors: Axes = []
    sizes: list[int] = []
    for number, axis in enumerate(axes):
        low, high = math.prod(old[number + 1 :]), math.prod(old[number:])
        inside = [s for s in steps if low <= s <= high][::-1]
        parts = [a // b for a, b in itertools.pairwise(inside)]
        factors += site.split(axis, parts)
        sizes += parts
    result: Axes = []
    used = 0
    for extent in new:
        first = used
        while math.prod(sizes[first:used]) < extent:
            used += 1
        result.append(site.merge(factors[first:used]) if used > first else fixed(1))
    return result


def _concat(site: Site) -> list[Axes]:
    inputs = [site.axes(i) for i in range(len(site.node.inputs))]
    along = site.axis(None, len(inputs[0]))
    result: Axes = []
    for number in range(len(inputs[0])):
        parts = [axes[number] for axes in inputs]
        if number != along:
            joined = parts[0]
            for index, part in enumerate(parts[1:], 1):
                joined = site.tie(joined, part, site.of(0, number), site.of(index, number))
            result.append(joined)
        elif any(p is None for p in parts):
            for part in parts:
                site.pin(part, f"{site.name} joins it to an axis of unknown extent")
            result.append(None)
        else:
            result.append(stacked([p for p in parts if p is not None]))
    return [result]


def _split(site: Site) -> list[Axes]:
    axes = site.axes(0)
    along = site.axis(0, len(axes))
    axis, outputs = axes[along], len(site.node.outputs)
    if axis is None:
        raise Unproved("it splits an axis of unknown extent")
    sizes = site.ints(1, "split")
    if sizes is None:
        size = -(-len(axis) // outputs)
        sizes = [min(size, len(axis) - i * size) for i in range(outputs)]
    ends = np.cumsum(sizes)
    parts = [axis[e - n : e] for n, e in zip(sizes, ends, strict=True)]
    place = "split" if site.graph.opsets.get("", 0) < 13 else 1
    if site.atoms.open(axis).shape[1]:
        for number, part in enumerate(parts):
            site.count(place, np.array(sizes, np.int64), number, part)
    return [[*axes[:along], part, *axes[along + 1 :]] for part in parts]


def _slice(site: Site) -> list[Axes]:
    result = list(site.axes(0))
    starts, ends = site.ints(1, "starts") or [], site.ints(2, "ends") or []
    numbers = site.ints(3, "axes") or list(range(len(starts)))
    steps = site.ints(4, "steps") or [1] * len(starts)
    for position, (start, end, number, step) in enumerate(zip(starts, ends, numbers, steps, strict=True)):
        axis = result[number]
        if axis is None:
            continue
        found = range(len(axis))[start:end:step]
        result[number] = axis[found.start : (found.stop if found.stop >= 0 else None) : step]
        if step != 1:
            site.pin(axis, f"{site.name} takes every {step}th of it")
            continue
        for index, name, bound in ((1, "starts", start), (2, "ends", end)):
            stop = found.start if name == "starts" else found.stop
            if 0 <= bound < len(axis) or bound < 0:
                values = site.node.attrs.get(name) if name in site.node.attrs else site.values[index]
                place = name if name in site.node.attrs else index
                site.count(place, np.array(values), position, axis[:stop])
    return [result]


def _gather(site: Site) -> list[Axes]:
    if (table := site.values[0]) is not None:
        site.inputs[0] = site.constant(0, ["out"] * table.ndim)
    axes, picked = site.axes(0), site.values[1]
    along = site.axis(0, len(axes))
    axis = axes[along]
    if picked is None or axis is None:
        site.pin(axis, f"{site.name} looks it up by what the model computes")
        new: Axes = [fixed(len(a)) if a is not None else None for a in site.axes(1)]
        for a in site.axes(1):
            site.pin(a, f"{site.name} reads indices from it")
    else:
        positions = np.where(picked < 0, picked + len(axis), picked)
        if picked.ndim != 1:
            site.pin(axis[np.unique(positions)], f"{site.name} picks it out")
        new = [axis[positions]] if picked.ndim == 1 else [fixed(n) for n in picked.shape]
        if axis.shape[1]:
            site.edits[key(site.node), 1] = Indices(picked, axis)
    return [[*axes[:along], *new, *axes[along + 1 :]]]


def _pad(site: Site) -> list[Axes]:
    axes, pads = site.axes(0), site.ints(1, "pads") or []
    numbers = site.ints(3, "axes")
    numbers = list(range(len(axes))) if numbers is None else [a % len(axes) for a in numbers]
    result = list(axes)
    for position, number in enumerate(numbers):
        before, after, axis = pads[position], pads[position + len(numbers)], axes[number]
        if not (before or after) or axis is None:
            continue
        if min(before, after) < 0 or site.node.attrs.get("mode", "constant") not in ("constant", b"constant"):
            site.pin(axis, f"{site.name} crops or mirrors it")
            result[number] = fixed(len(axis) + before + after)
        else:
            result[number] = stacked([fixed(before), axis, fixed(after)])
    return [result]


def _expand(site: Site) -> list[Axes]:
    shape, axes = site.shape(), site.axes(0)
    result: Axes = []
    for number, extent in enumerate(shape):
        back = number - len(shape) + len(axes)
        axis = axes[back] if back >= 0 else fixed(1)
        if not isinstance(extent, int) or axis is None:
            site.pin(axis, f"{site.name} ties it to an axis of unknown extent")
            result.append(None)
        else:
            result.append(axis if len(axis) == extent else site.atoms.fresh(extent))
        target = site.values[1]
        offset = number - len(shape) + (len(target) if target is not None else len(shape))
        if offset >= 0 and (target is None or target[offset] != 1):
            site.count_entry(1, offset, result[-1])
    return [result]


def _tile(site: Site) -> list[Axes]:
    return [
        [
            a if n == 1 else None if a is None else np.tile(a, (n, 1))
            for a, n in zip(site.axes(0), site.ints(1, "repeats") or [], strict=True)
        ]
    ]


def _resize(site: Site) -> list[Axes]:
    axes, shape, attrs = site.axes(0), site.shape(), site.node.attrs
    if attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize" or attrs.get(
        "keep_aspect_ratio_policy", "stretch"
    ) not in ("stretch", b"stretch"):
        raise Unproved("it crops, or keeps an aspect ratio")
    scaled = [a % len(axes) for a in attrs.get("axes", range(len(axes)))]
    scales, sizes = site.ints(1 if site.node.op == "Upsample" else 2, "scales"), site.ints(3, "sizes")
    result: Axes = []
    for number, (axis, extent) in enumerate(zip(axes, shape, strict=True)):
        position = scaled.index(number) if number in scaled else None
        same = position is None or (scales[position] == 1 if scales else axis is not None and len(axis) == extent)
        if same:
            result.append(axis)
            if sizes and position is not None:
                site.count_entry(3, position, axis)
        else:
            site.pin(axis, f"{site.name} works along it")
            result.append(fixed(extent) if isinstance(extent, int) else None)
    return [result]


def _shape(site: Site) -> list[Axes]:
    """Sizes that the model computes with must not change; those nobody picks may."""
    axes, (tensor,) = site.axes(0), site.node.outputs
    window = range(len(axes))[site.node.attrs.get("start") : site.node.attrs.get("end")]
    read: set[int] = set(window) if site.graph.is_output(tensor) else set()
    for reader in tensor.outputs:
        picked = site.graph.constant(reader.inputs[1]) if reader.op == "Gather" and len(reader.inputs) > 1 else None
        read |= {window[i] for i in picked.reshape(-1).tolist()} if picked is not None else set(window)
    for number in read:
        site.pin(axes[number], f"{site.name} reads how many there are")
    return [[fixed(len(window))]]


ELEMENTWISE = re.findall(
    r"\w+",
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu Clip
    Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
    LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
    """,
)

SPECS = {
    "BatchNormalization": "nc...,c,c,c,c->nc...",
    "LRN": "nC*->nC*",
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool"), "nc*->nc*"),
}


def _spec(text: str) -> Rule:
    return lambda site: apply(site, text, {})


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **{name: _spec(text) for name, text in SPECS.items()},
    "SpaceToDepth": _block("nc*->n(Bc)*"),
    "DepthToSpace": _depth_to_space,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "GroupNormalization": _group_norm,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _global_pool),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _along(-1, rest=True, norm=True),
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    **dict.fromkeys(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"), _reduce(summed=True)),
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin"), _reduce(summed=True, corrected=True)),
    **dict.fromkeys(("ReduceProd", "ReduceLogSum", "ReduceLogSumExp"), _reduce(summed=False)),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Resize": _resize,
    "Upsample": _resize,
    "Shape": _shape,
}
