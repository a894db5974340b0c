"""Structural reparameterization: replace regions of affine maps by one.

**One theorem.** What lies between two points of a graph, if all of it is affine and translation-equivariant, is one
convolution, or one matrix on the channels (:mod:`edgecompile.affine` proves it and computes it, padding included). So
no block is known here by name; three shapes of region are looked for, at each node in topological order, until none of
them gains anything:

- *sequences* ``g(f(x)) = (g f)(x)``: convolutions, normalisation, constant scales and shifts, pooling, zero padding,
  choices of channels, transposed token layouts, and reshapes that add or drop axes of extent 1, in a row;
- *sums* ``f_1(x) + ... + f_n(x) + y = (f_1 + ... + f_n)(x) + y``, where the identity is one of the maps: the terms of a
  maximal tree of additions that start at the same tensor become one term. A concatenation on the channels is the sum of
  its parts, each embedded;
- *partly affine layers* ``y = L(h)``, ``h = P f(u) + Q u``, ``u = M(x)``, ``f`` elementwise and ``P``, ``Q`` maps on
  the channels: a constant mask (Where or Mul), or Split and Concat. If ``L P`` reads the channels ``A`` only::

      y = (L P)_A f(M_A x) + (L Q M) x

  and the second term, being affine in ``x``, joins the shortcut. The idle channels of the layer disappear.

The text of a rewrite names the kinds of nodes merged and made, the change in multiply-accumulates of the region that it
replaces, and the error: by how much the coefficients of the merged map were moved by rounding to the type of the
weights, over the largest of them. Its place is the innermost torch module that holds the region.

**Cost decides.** A region is replaced if the nodes that go cost more than those that come: multiply-accumulates, plus a
little for each element written and each node (:mod:`edgecompile.linear`). A 1x1 bottleneck before a 3x3 convolution
stays. A tensor that something else reads is never computed twice. The time is linear in the nodes and in the terms of a
sum, but quadratic in the parts of a concatenation that start at one tensor. What is not merged is said in a note, with
the reason, where a merge was in reach.

Weights are computed in float64 and rounded once. A weight that other nodes share is left to them.

Sources: Ding et al., *RepVGG*, CVPR 2021, section 3; Ding et al., *Diverse Branch Block*, CVPR 2021, section 3; Ding et
al., *ACNet*, ICCV 2019, section 3; Vasu et al., *MobileOne*, CVPR 2023, section 3, and *FastViT*, ICCV 2023, section 3
(RepMixer); Ding et al., *RepLKNet*, CVPR 2022, section 3; Jiang et al., *GiraffeDet*, ICLR 2022, and Xu et al.,
*DAMO-YOLO*, 2022 (RepConv in RepGFPN); Chen et al., *DEA-Net*, IEEE TIP 2024, section 3 (DEConv); Xu et al.,
*RePaViT*, ICML 2025, section 3 (idle channels).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import affine, linear, linear_write
from edgecompile.affine import LIMIT, Affine, Refusal
from edgecompile.graph import Graph, Tensor, disconnect, provenance, redirect, where
from edgecompile.linear import Path, Step
from edgecompile.linear_write import Plan
from edgecompile.pipeline import Context, Pass, PassResult
from edgecompile.sweep import LimitReached, Sweep

# Steps that one sequence may have: with it the pass is linear in the size of the graph.
_DEPTH = 12
# Terms of one sum that are tried against one another.
_TERMS = 64


@dataclass(frozen=True)
class Reparam(Pass):
    """Merge parallel and sequential convolutions and linear layers, shortcuts and idle channels included."""

    name: ClassVar[str] = "reparam"
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place until no region gains anything."""
        return _Rewriter.repeat(graph, context)


@dataclass(frozen=True, eq=False)
class _Term:
    """A term of a sum.

    Attributes:
        tensor: the term.
        sign: 1 or -1.
        steps: how it is computed, from the term back to ``entry``; none for a tensor that stands for itself.
    """

    tensor: Tensor
    sign: int
    steps: tuple[Step, ...] = ()

    @property
    def entry(self) -> Tensor:
        return self.steps[-1].entry if self.steps else self.tensor

    def path(self, axis: int, limit: int) -> Path:
        """The term as a path, sign included."""
        made = linear.path(self.steps, limit) if self.steps else linear.identity(self.tensor, axis)
        return made if self.sign > 0 else made.scaled(-1)


@dataclass(frozen=True, eq=False)
class _Fused:
    """Terms of a sum with the same entry, and what replaces them."""

    terms: tuple[_Term, ...]
    plan: Plan


class _Rewriter(Sweep):
    """One walk over the graph."""

    def __init__(self, graph: Graph, context: Context):
        super().__init__(graph, context)
        self.dead: set[int] = set()
        self.skipped: list[tuple[str, str]] = []

    def walk(self) -> None:
        for node in list(self.graph.nodes):
            self.visit(node)

    def notes(self) -> Iterator[tuple[str, str]]:
        yield from self.skipped

    def visit(self, node: gs.Node) -> None:
        """Apply the rules to a node, then to what stands in its place, until none applies."""
        pending = [node]
        while pending:
            node, known = pending.pop(), len(self.graph.nodes)
            if id(node) in self.dead or not node.outputs:
                continue
            for rule in _RULES.get(linear.op(node), ()):
                try:
                    made = rule(self, node)
                except Refusal as refusal:
                    self.skip(str(refusal), node)
                    continue
                if made is not None:
                    # What is new comes in topological order, at the end; if nothing is, an old tensor took the place.
                    pending += self.graph.nodes[known:][::-1] or made.inputs[:1]
                    break

    def skip(self, why: str, node: gs.Node) -> None:
        """Note why a region was left as it is."""
        self.skipped.append((f"skipped: {why}", where(node)))

    # -- looking at the graph ----------------------------------------------------------------------------------------

    def private(self, tensor: Tensor) -> bool:
        """True if one node reads a tensor, once, and nothing else sees it."""
        return len(tensor.outputs) == 1 and not self.exposed(tensor)

    def read(self, node: gs.Node) -> int:
        """How many outputs of a node are read by something."""
        return sum(bool(t.outputs) or self.exposed(t) for t in node.outputs)

    def live(self, node: gs.Node) -> bool:
        """True if more than one output of a node is read."""
        return self.read(node) > 1

    def steps(self, tensor: Tensor, axis: int, shared: bool = False) -> tuple[Step, ...]:
        """The affine steps that lead to a tensor, its own first; unless ``shared``, only one node reads the others."""
        found: list[Step] = []
        while len(found) < _DEPTH:
            node = self.graph.producer(tensor)
            if node is None or (found and not shared and not self.private(tensor)):
                break
            try:
                step = linear.read(self.graph, node, tensor, axis)
            except Refusal as refusal:
                if linear.op(node) in _STRUCTURAL:
                    self.skip(str(refusal), node)
                break
            if step is None:
                break
            found.append(step)
            tensor, axis = step.entry, step.axis
            if self.live(node) and not shared:
                break
        return tuple(found)

    def removed(self, steps: Sequence[Step]) -> list[gs.Node]:
        """The nodes of these steps that nothing else needs."""
        return [s.node for s in steps if not self.live(s.node)]

    def axis(self, tensors: Sequence[Tensor]) -> int:
        """The channel axis of tensors of one shape: that of the first whose producer tells, else the usual one."""
        for tensor in tensors:
            if (axis := linear.natural_axis(self.graph, tensor)) is not None:
                return axis
        rank = len(tensors[0].shape or ())
        return 1 if rank in (2, 4, 5) else rank - 1

    # -- changing it -------------------------------------------------------------------------------------------------

    def announce(self, what: str, node: gs.Node, region: Sequence[gs.Node], plans: Sequence[Plan] = ()) -> None:
        """Number a rewrite, and say what it does to the multiply-accumulates of the region and to its coefficients."""
        before, after = sum(map(linear.macs, region)), sum(p.macs for p in plans)
        change = f"{100 * (after - before) / before:+.1f} %" if before else f"{after:+,}"
        error = f"{max([p.error for p in plans], default=0.0):.0e}".replace("e-0", "e-").replace("0e+00", "0")
        self.begin(f"{what}, {change} MACs, error {error}", _module(region) or node)

    def replace(self, old: Tensor, new: Tensor, removed: Sequence[gs.Node]) -> Tensor:
        """Let ``new`` stand for ``old`` and drop the nodes that computed it."""
        if self.exposed(old):
            self.graph.rewire(old, new)
            self.outputs = {id(t) for t in self.graph.outputs}
        else:
            redirect(old, new)
        unread: list[gs.Node] = list(removed)
        while unread:  # what only served the nodes removed must not count as a consumer
            self.dead.update(map(id, unread))
            before = [p for n in unread for t in n.inputs for p in t.inputs]
            disconnect(unread)
            unread = [n for n in {id(n): n for n in before}.values() if id(n) not in self.dead and not self.read(n)]
        return new

    def add(self, a: Tensor, b: Tensor, like: Tensor, replaces: Sequence[gs.Node], op: str = "Add") -> Tensor:
        """The result of a new ``op`` of two tensors, of the type and shape of ``like``."""
        node = self.graph.insert(op, [a, b], replaces=replaces)
        node.outputs[0].dtype, node.outputs[0].shape = like.dtype, like.shape
        return node.outputs[0]

    # -- sequences ---------------------------------------------------------------------------------------------------

    def sequence(self, node: gs.Node) -> Tensor | None:
        """Merge a node with those before it."""
        exit = node.outputs[0]
        if len(node.outputs) > 1 or not linear.is_affine(self.graph, node):
            return None
        source = next((t for t in node.inputs if t.inputs and self.graph.constant(t) is None), None)
        before = None if source is None else self.graph.producer(source)
        if before is None or not linear.is_affine(self.graph, before):
            return None
        if source is not None and not self.private(source):
            if _heavy(node) and _heavy(before):
                self.skip(f"{where(before)} has a second consumer", node)
            return None
        axis = self.axis([exit])
        steps = self.steps(exit, axis)
        if len(steps) < 2:
            return None
        best: tuple[int, Plan, Sequence[Step]] | None = None
        made: Path | None = None
        old, why = 0, ""
        limit = self.limit(sum(linear.cost(s.node) for s in steps), exit, axis)
        for count, step in enumerate(steps, 1):
            one = Path(step.entry, step.axis, step.order, step.build())
            try:
                made = one if made is None else one.then(made, limit)
                old += 0 if self.live(step.node) else linear.cost(step.node)
                if count < 2:
                    continue
                plan = linear_write.plan(made)
            except Refusal as refusal:
                why = f"{_chain(steps[:count])}: {refusal}"
                break
            if old - plan.cost > (best[0] if best else 0):
                best = old - plan.cost, plan, steps[:count]
            elif sum(s.node.op in _STRUCTURAL for s in steps[:count]) > 1:
                why = f"{_chain(steps[:count])}: {_dearer(plan.cost, old)}"
        if best is None:
            if why:
                self.skip(why, node)
            return None
        _, plan, steps = best
        gone = self.removed(steps)
        self.announce(f"{_chain(steps)} -> {_product(plan)}", node, gone, [plan])
        return self.replace(exit, plan.insert(self.graph, exit.name, gone), gone)

    def limit(self, budget: int, exit: Tensor, axis: int) -> int:
        """Elements of a kernel that would cost twice the budget, in multiply-accumulates, to apply."""
        positions = max(1, linear.size(exit.shape) // max(1, linear.channels(exit, axis)))
        return min(LIMIT, max(1 << 14, 2 * budget // positions))

    # -- sums --------------------------------------------------------------------------------------------------------

    def is_sum(self, node: gs.Node | None) -> bool:
        """True for an addition or subtraction of floats."""
        if node is None or not node.outputs or linear.op(node) not in _SUMS:
            return False
        kind = node.outputs[0].dtype
        return kind is not None and not isinstance(kind, int) and np.dtype(kind).kind == "f"

    def flatten(self, root: gs.Node) -> tuple[list[_Term], list[tuple[Tensor, int]], list[gs.Node]]:
        """The terms of a tree of additions, its constants with their signs, and its nodes."""
        terms: list[_Term] = []
        constants: list[tuple[Tensor, int]] = []
        nodes = [root]
        stack = _signed(root)
        while stack:
            tensor, sign = stack.pop()
            node = self.graph.producer(tensor)
            if self.graph.constant(tensor) is not None:
                constants.append((tensor, sign))
            elif node is not None and self.private(tensor) and self.is_sum(node):
                nodes.append(node)
                stack += [(t, sign * s) for t, s in _signed(node)]
            else:
                terms.append(_Term(tensor, sign))
        return terms, constants, nodes

    def sum(self, root: gs.Node) -> Tensor | None:
        """Merge the terms of a sum that start at the same tensor."""
        exit = root.outputs[0]
        if not self.is_sum(root) or (self.private(exit) and self.is_sum(exit.outputs[0])):
            return None
        terms, constants, adds = self.flatten(root)
        if len(terms) < 2:
            return None
        axis = self.axis([t.tensor for t in terms])
        terms = [replace(t, steps=self.steps(t.tensor, axis) if self.private(t.tensor) else ()) for t in terms]
        groups: dict[int, list[_Term]] = {}
        for term in terms:
            groups.setdefault(id(term.entry), []).append(term)
        biases, others = self.biases(constants, terms, exit, axis)
        found: list[_Fused] = []
        for group in groups.values():
            for chunk in (group[i : i + _TERMS] for i in range(0, len(group), _TERMS)):
                unused = [] if found else biases  # the first takes them in
                if (len(chunk) > 1 or (unused and chunk[0].steps)) and (fused := self.fuse(chunk, unused, axis, root)):
                    found.append(fused)
        if not found:
            if len(groups) > 1:
                self.explain(root, terms)
            return None
        # All at once: to look at a wide sum again after each would take time quadratic in its terms.
        return self.replace(exit, *self.fused(root, found, terms, others, adds))

    def fused(
        self,
        root: gs.Node,
        found: Sequence[_Fused],
        terms: Sequence[_Term],
        constants: Sequence[tuple[Tensor, int]],
        adds: Sequence[gs.Node],
    ) -> tuple[Tensor, list[gs.Node]]:
        """The sum with some of its terms merged, as a new tensor, and the nodes that it replaces."""
        exit, parts, removed = root.outputs[0], [], list(adds)
        left = {id(t): t for t in terms}
        for fused in found:
            gone = [n for t in fused.terms for n in self.removed(t.steps)]
            what = " + ".join(_chain(t.steps) for t in fused.terms)
            region = gone if sum(bool(t.steps) for t in fused.terms) > 1 else [*gone, *adds]
            try:
                self.announce(f"{what} -> {_product(fused.plan)}", root, region, [fused.plan])
            except LimitReached:
                if not parts:
                    raise
                break
            origins = gone if parts else [*gone, *adds]
            parts.append((fused.plan.insert(self.graph, exit.name, origins), 1))
            removed += gone
            for term in fused.terms:
                del left[id(term)]
        (total, _), *parts = [*parts, *constants, *((t.tensor, t.sign) for t in left.values())]
        for tensor, sign in parts:
            total = self.add(total, tensor, exit, adds, "Add" if sign > 0 else "Sub")
            adds = total.inputs  # the node just made has the provenance of all
        return total, removed

    def biases(
        self, constants: list[tuple[Tensor, int]], terms: Sequence[_Term], exit: Tensor, axis: int
    ) -> tuple[list[np.ndarray], list[tuple[Tensor, int]]]:
        """The constants of a sum that are a bias on its channels, as such; and the others."""
        full = all(t.tensor.shape is not None and t.tensor.shape == exit.shape for t in terms)
        found, others = [], []
        for tensor, sign in constants:
            value = self.graph.constant(tensor)
            try:
                if value is None or not full:
                    raise Refusal("a constant that stretches a term is no bias")
                found.append(sign * linear.per_channel(value, exit, axis).astype(np.float64))
            except Refusal:
                others.append((tensor, sign))
        return found, others

    def fuse(self, group: list[_Term], biases: list[np.ndarray], axis: int, root: gs.Node) -> _Fused | None:
        """The cheapest way found to merge terms of one entry; None if none gains."""
        exit = root.outputs[0]
        addition = linear.PER_ELEMENT * linear.size(exit.shape) + linear.PER_NODE
        old = {id(t): sum(map(linear.cost, self.removed(t.steps))) for t in group}
        limit = self.limit(sum(old.values()) + addition, exit, axis)
        paths: list[tuple[_Term, Path]] = []
        for term in group:
            try:
                paths.append((term, term.path(axis, limit)))
            except Refusal as refusal:
                self.skip(f"{_chain(term.steps)}: {refusal}", root)
        paths.sort(key=lambda p: -p[1].map.kernel.size)
        while paths:
            (first, made), *rest = paths
            taken, cost, paths = [first], old[id(first)], []
            if biases:
                made = replace(made, map=replace(made.map, bias=made.map.bias + sum(biases)))
                cost += addition * len(biases)
            for term, path in rest:
                try:
                    trial = made.plus(path)
                    new, both = linear_write.plan(trial).cost, cost + old[id(term)] + addition
                    if new >= both:
                        raise Refusal(_dearer(new, both))
                except Refusal as refusal:
                    self.skip(f"{_chain(taken[0].steps)} + {_chain(term.steps)}: {refusal}", root)
                    paths.append((term, path))
                    continue
                taken.append(term)
                made, cost = trial, new
            try:
                plan = linear_write.plan(made)
            except Refusal as refusal:
                self.skip(str(refusal), root)
                continue
            before = sum(old[id(t)] for t in taken) + addition * (len(taken) - 1 + len(biases))
            if before > plan.cost:
                return _Fused(tuple(taken), plan)
        return None

    def explain(self, root: gs.Node, terms: Sequence[_Term]) -> None:
        """Note what stands between two terms and a common entry, if something affine leads there."""
        entries = {id(t.entry) for t in terms}
        for term in terms:
            tensor, obstacle = term.entry, ""
            for _ in range(_DEPTH):
                node = self.graph.producer(tensor)
                source = next((t for t in (node.inputs if node else ()) if self.graph.constant(t) is None), None)
                if node is None or source is None:
                    break
                if not obstacle and not linear.is_affine(self.graph, node):
                    obstacle = f"{where(node)} is not affine"
                elif not obstacle and not self.private(tensor):
                    obstacle = f"{where(node)} has a second consumer"
                tensor = source
                if id(tensor) in entries and tensor is not term.entry:
                    if obstacle:  # else reading the map was refused, and noted
                        self.skip(obstacle, root)
                    return
        if sum(any(_heavy(s.node) for s in t.steps) for t in terms) > 1:
            self.skip("its terms are maps of different tensors", root)

    # -- concatenations ----------------------------------------------------------------------------------------------

    def concat(self, node: gs.Node) -> Tensor | None:
        """Merge neighbouring parts of a concatenation on the channels that start at the same tensor."""
        exit = node.outputs[0]
        parts = list(node.inputs)
        if exit.shape is None or len(parts) < 2 or any(self.graph.constant(t) is not None for t in parts):
            return None
        axis = node.attrs["axis"] % len(exit.shape)
        kept = [t for t in parts if t.shape is None or t.shape[axis] != 0]
        if 0 < len(kept) < len(parts):
            return self.without_empty(node, kept)
        if next((a for t in parts if (a := linear.natural_axis(self.graph, t)) is not None), axis) != axis:
            return None
        terms = [_Term(t, 1, self.steps(t, axis) if self.private(t) else ()) for t in parts]
        for start in range(len(terms)):
            stop = start + 1
            while stop < len(terms) and terms[stop].entry is terms[start].entry:
                stop += 1
            if stop - start < 2 or not any(t.steps for t in terms[start:stop]):
                continue
            run = terms[start:stop]
            sizes = [linear.channels(t.tensor, axis) for t in run]
            # A Split whose outputs all end here goes with the Concat, though each of its parts alone would leave it.
            ends = {id(t.tensor) for t in run}
            nodes = {id(s.node): s.node for t in run for s in t.steps}
            gone = [n for n in nodes.values() if not self.live(n) or all(id(t) in ends for t in n.outputs)]
            old = sum(map(linear.cost, gone)) + (linear.cost(node) if len(run) == len(terms) else 0)
            made: Path | None = None
            first = 0
            try:
                for term, size in zip(run, sizes, strict=True):
                    path = term.path(axis, self.limit(old, exit, axis))
                    part = affine.embed(range(first, first + size), sum(sizes))
                    one = path.then(Path(term.tensor, axis, tuple(range(len(exit.shape))), part))
                    made, first = one if made is None else made.plus(one), first + size
                assert made is not None
                plan = linear_write.plan(made)
            except Refusal as refusal:
                self.skip(str(refusal), node)
                continue
            heavy = any(_heavy(n) for n in gone)
            if plan.cost >= old or (plan.nodes and not heavy):  # a Gather is no better than Slices and a Concat
                if heavy:
                    self.skip(_dearer(plan.cost, old), node)
                continue
            what = " | ".join(_chain(t.steps) for t in run)
            self.announce(f"{what} -> {_product(plan)}", node, [*gone, node], [plan])
            merged = plan.insert(self.graph, exit.name, [*gone, node])
            if len(run) < len(terms):
                kept = [t.tensor for t in terms]
                inputs = [*kept[:start], merged, *kept[stop:]]
                merged = self.graph.insert("Concat", inputs, attrs=dict(node.attrs), replaces=[node]).outputs[0]
                merged.dtype, merged.shape = exit.dtype, exit.shape
            return self.replace(exit, merged, [*gone, node])
        return None

    def without_empty(self, node: gs.Node, kept: Sequence[Tensor]) -> Tensor:
        """Drop the parts of a concatenation that have no channels."""
        made = f"Concat of {len(kept)}" if kept[1:] else "identity"
        self.announce(f"Concat of {len(node.inputs)} -> {made}", node, [node])
        exit, result = node.outputs[0], kept[0]
        if len(kept) > 1:
            result = self.graph.insert("Concat", kept, attrs=dict(node.attrs), replaces=[node]).outputs[0]
            result.dtype, result.shape = exit.dtype, exit.shape
        return self.replace(exit, result, [node])

    # -- choices -----------------------------------------------------------------------------------------------------

    def where(self, node: gs.Node) -> Tensor | None:
        """Drop a Where whose mask always chooses the same operand."""
        mask, exit = self.graph.constant(node.inputs[0]), node.outputs[0]
        if mask is None or not mask.size or (mask != mask.flat[0]).any():
            return None
        chosen = node.inputs[1 if mask.flat[0] else 2]
        known = exit.shape is not None and all(isinstance(n, int) or i == 0 for i, n in enumerate(exit.shape))
        if not known or list(chosen.shape or ()) != list(exit.shape or ()):
            return None
        self.announce("Where -> identity", node, [node])
        return self.replace(exit, chosen, [node])

    # -- partly affine layers ----------------------------------------------------------------------------------------

    def partly(self, node: gs.Node) -> Tensor | None:
        """Split a linear layer whose input is partly affine, so that the affine part can merge."""
        exit = node.outputs[0]
        if not linear.is_affine(self.graph, node) or exit.shape is None:
            return None
        layer = self.steps(exit, self.axis([exit]))
        if not layer or not self.private(layer[-1].entry):
            return None
        parts = max(self.split(layer), key=lambda p: p.gain, default=None)
        if parts is None:
            return None
        if parts.gain <= 0:
            self.skip("its idle channels stay: without them it would not cost less", node)
            return None
        gone = parts.gone
        plans = [plan for plan in (parts.into, parts.out, parts.idle) if plan is not None]
        what = f"{parts.active} of {parts.active + parts.still} channels active -> {_product(parts.idle)}"
        self.announce(f"{what} + layer of {parts.active}", node, gone, plans)
        linear_nodes = [n for n in gone if not any(n is f for f in parts.function)]
        total = parts.idle.insert(self.graph, exit.name, linear_nodes)
        if parts.into is not None and parts.out is not None:
            tensor = parts.into.insert(self.graph, exit.name, linear_nodes)
            tensor = self.narrowed(parts, tensor)
            # The plan was made for a tensor that did not exist yet.
            active = replace(parts.out, entry=tensor).insert(self.graph, exit.name, linear_nodes)
            total = self.add(active, total, exit, linear_nodes)
        return self.replace(exit, total, gone)

    def narrowed(self, parts: _Parts, tensor: Tensor) -> Tensor:
        """The elementwise function again, on the active channels only."""
        made = {id(parts.root): tensor}
        for old in parts.function:
            inputs = [made.get(id(t), t) for t in old.inputs]
            new = self.graph.insert(old.op, inputs, attrs=dict(old.attrs), replaces=[old], domain=old.domain)
            result = old.outputs[0]
            shape = [parts.active if i == parts.axis else n for i, n in enumerate(result.shape or ())]
            new.outputs[0].dtype, new.outputs[0].shape = result.dtype, shape
            made[id(result)] = new.outputs[0]
        return made[id(parts.function[-1].outputs[0])]

    def pieces(self, h: Tensor, axis: int) -> list[tuple[Tensor, Affine]]:
        """A tensor as a sum of maps of others."""
        node = self.graph.producer(h)
        if node is None:
            return []
        size = linear.channels(h, axis)
        if linear.op(node) == "Where" and (mask := self.graph.constant(node.inputs[0])) is not None:
            chosen = linear.per_channel(mask, h, axis).astype(bool)
            if any(self.graph.constant(t) is not None for t in node.inputs[1:]):
                return []
            return [(t, affine.scale(m)) for t, m in zip(node.inputs[1:], (chosen, ~chosen), strict=True)]
        if linear.op(node) == "Concat" and node.attrs["axis"] % len(h.shape or ()) == axis:
            sizes = np.cumsum([0, *(linear.channels(t, axis) for t in node.inputs)])
            bounds = zip(node.inputs, sizes, sizes[1:], strict=False)
            return [(t, affine.embed(range(a, b), size)) for t, a, b in bounds]
        if self.is_sum(node):
            terms, constants, _ = self.flatten(node)
            return [] if constants else [(t.tensor, affine.scale(np.full(size, t.sign))) for t in terms]
        return []

    def split(self, layer: Sequence[Step]) -> Iterator[_Parts]:
        """Ways to split a layer; one per tensor from which its affine part may start."""
        h, axis = layer[-1].entry, layer[-1].axis
        pieces = self.pieces(h, axis)
        if len(pieces) != 2 or not all(m.kernel.any() for _, m in pieces):
            return
        joint = self.flatten(self.graph.producer(h))[2] if self.is_sum(self.graph.producer(h)) else [h.inputs[0]]  # type: ignore[arg-type]
        order = tuple(range(len(h.shape or ())))
        found = []
        for tensor, embedding in pieces:
            after = self.steps(tensor, axis) if self.private(tensor) else ()
            function, root = self.function(after[-1].entry if after else tensor)
            found.append((tensor, embedding, after, function, root))
        found.sort(key=lambda f: not f[3])
        (p, embed_p, after, function, root), (q, embed_q, _, no_function, _) = found
        if not function or no_function or root is None or any(s.order != order for s in after):
            return
        if any(n.outputs[0].shape != root.shape for n in function):  # a broadcast would mix channels
            return
        # Where the affine ways back from the function's input and from the idle piece meet.
        before = self.steps(root, axis, shared=True)
        idle = self.steps(q, axis, shared=True)
        starts = {id(t): i for i, t in enumerate([root, *(s.entry for s in before)])}
        meets = ((i, starts[id(t)]) for i, t in enumerate([q, *(s.entry for s in idle)]) if id(t) in starts)
        meet = next(meets, None)
        if meet is None:
            return
        idle, before, beyond = idle[: meet[0]], before[: meet[1]], before[meet[1] :]
        members = [s.node for s in (*layer, *after, *idle, *before)] + joint + list(function)
        region = {id(n): n for n in members}
        u = before[-1].entry if before else root
        if not self.closed(region, u, layer[0].node):
            self.skip("the input of its activation has another consumer", layer[0].node)
            return
        outer = linear.path(layer)
        into = Path(p, axis, order, embed_p)
        if after:
            into = linear.path(after).then(into)
        active = into.then(outer)
        columns = np.unique(active.map.inputs[active.map.kernel.any(0)])
        columns = columns[columns >= 0]
        size = linear.channels(root, axis)
        out = None
        if len(columns):
            narrow = Path(active.entry, axis, order, affine.embed(columns, active.map.channels)).then(active)
            narrow = replace(narrow, map=replace(narrow.map, bias=np.zeros(narrow.map.outputs)))
            shape = [len(columns) if i == axis else n for i, n in enumerate(active.entry.shape or ())]
            narrow = replace(narrow, entry=gs.Variable("narrow", active.entry.dtype, shape))
            out = linear_write.plan(narrow)
        still = Path(q, axis, order, embed_q).then(outer)
        # A constant that the active part adds is carried by the idle one.
        extra = active.map.bias - outer.map.bias
        still = replace(still, map=replace(still.map, bias=still.map.bias + extra))
        head = linear.path(before) if before else linear.identity(root, axis)
        chosen = head.then(Path(root, axis, order, affine.select(columns, size))) if len(columns) else None
        still = linear.path(idle).then(still) if idle else still
        for count in range(len(beyond) + 1):
            if count:
                step = beyond[count - 1]
                if count > 1 and not self.private(beyond[count - 2].entry):
                    return
                one = Path(step.entry, step.axis, step.order, step.build())
                try:
                    still = one.then(still)
                    chosen = None if chosen is None else one.then(chosen)
                except Refusal as refusal:
                    self.skip(str(refusal), layer[0].node)
                    return
                if self.live(step.node):
                    return
                region[id(step.node)] = step.node
            planned = None if chosen is None else linear_write.plan(chosen)
            yield _Parts(
                tuple(region.values()), function if len(columns) else (), root, axis, len(columns),
                int(embed_q.kernel.any((0, 2)).sum()), size, planned, out, linear_write.plan(still),
                linear.size(layer[0].node.outputs[0].shape),
            )  # fmt: skip

    def closed(self, region: dict[int, gs.Node], u: Tensor, last: gs.Node) -> bool:
        """True if what the region computes, and ``u``, is read inside it only, but for the result of ``last``."""
        inner = [t for n in region.values() if n is not last for t in n.outputs] + [u]
        seen = self.outputs | self.pinned
        return all(id(t) not in seen and all(id(n) in region for n in t.outputs) for t in inner)

    def function(self, tensor: Tensor) -> tuple[tuple[gs.Node, ...], Tensor | None]:
        """Elementwise nodes that compute a tensor from one other, in order; and that other one."""
        nodes: dict[int, gs.Node] = {}
        roots: dict[int, Tensor] = {}
        queue = [tensor]
        while queue and len(nodes) <= _DEPTH:
            current = queue.pop()
            node = self.graph.producer(current)
            if id(current) in roots or (node is not None and id(node) in nodes):
                continue
            if node is None or linear.op(node) not in _POINTWISE or not self.scalars(node):
                roots[id(current)] = current
                continue
            nodes[id(node)] = node
            queue += [t for t in node.inputs if self.graph.constant(t) is None]
        if queue or len(roots) != 1:
            return (), None
        ordered: list[gs.Node] = []
        pending = list(nodes.values())
        ready = set(roots)
        while pending:
            node = next(
                n for n in pending if all(id(t) in ready or self.graph.constant(t) is not None for t in n.inputs)
            )
            pending.remove(node)
            ordered.append(node)
            ready.add(id(node.outputs[0]))
        return tuple(ordered), next(iter(roots.values()))

    def scalars(self, node: gs.Node) -> bool:
        """True if the constants of an elementwise node are scalars."""
        constants = (self.graph.constant(t) for t in node.inputs)
        return all(c is None or c.size == 1 for c in constants) and len(node.outputs) == 1


@dataclass(frozen=True, eq=False)
class _Parts:
    """A partly affine layer, taken apart.

    Attributes:
        gone: the nodes that it is made of.
        function: the elementwise nodes among them, from ``root`` on.
        root, axis: the input of the function and its channel axis.
        active, still: number of channels that pass the function, and of the others.
        width: channels of ``root``.
        into, out: plans of the maps before and after the function; None if no channel passes it.
        idle: plan of the affine part.
        elements: of the result.
    """

    gone: tuple[gs.Node, ...]
    function: tuple[gs.Node, ...]
    root: Tensor
    axis: int
    active: int
    still: int
    width: int
    into: Plan | None
    out: Plan | None
    idle: Plan
    elements: int

    @property
    def gain(self) -> int:
        """By how much the nodes that go cost more than those that come."""
        new = self.idle.cost
        if self.into is not None and self.out is not None:
            share = self.active / self.width
            new += self.into.cost + self.out.cost + linear.PER_ELEMENT * self.elements + linear.PER_NODE
            new += round(sum((linear.cost(n) - linear.PER_NODE) * share + linear.PER_NODE for n in self.function))
        return sum(map(linear.cost, self.gone)) - new


# -- tables ----------------------------------------------------------------------------------------------------------

_SUMS = ("Add", "Sub", "Sum")
# A refusal to read these is worth a note; that an elementwise node acts on no channel axis is not.
_STRUCTURAL = {*linear.LINEAR, "AveragePool", "BatchNormalization", "Pad"}
_POINTWISE = {
    *("Abs", "Add", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"),
    *("Mish", "Mul", "Pow", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh"),
    "ThresholdedRelu",
}
_Rule = Callable[[_Rewriter, gs.Node], Tensor | None]
_RULES: dict[str, tuple[_Rule, ...]] = {
    **dict.fromkeys(linear.LINEAR, (_Rewriter.sequence, _Rewriter.partly)),
    **dict.fromkeys(_SUMS, (_Rewriter.sum, _Rewriter.sequence)),
    **dict.fromkeys(
        ("AveragePool", "BatchNormalization", "Div", "Gather", "Identity", "Mul", "Neg", "Pad", "Slice", *linear.MOVES),
        (_Rewriter.sequence,),
    ),
    "Concat": (_Rewriter.concat,),
    "Where": (_Rewriter.where,),
}


def _signed(node: gs.Node) -> list[tuple[Tensor, int]]:
    """What a node adds, each with its sign, the last first."""
    sign = -1 if node.op == "Sub" else 1
    return [(t, sign) for t in node.inputs[:0:-1]] + [(node.inputs[0], 1)]


def _heavy(node: gs.Node) -> bool:
    """True for the nodes in which a network spends its time."""
    return linear.op(node) in linear.LINEAR


# -- words -----------------------------------------------------------------------------------------------------------


def _name(op: str, weight: Sequence[int] | None, group: int) -> str:
    """``Conv3x3``, ``Conv3x3/32`` with 32 groups, or the op."""
    if op not in ("Conv", "ConvTranspose") or weight is None:
        return op
    return f"{op}{'x'.join(map(str, weight[2:]))}" + (f"/{group}" if group > 1 else "")


def _chain(steps: Sequence[Step]) -> str:
    """Steps in the order in which they run."""
    names = [
        _name(s.node.op, s.node.inputs[1].shape if len(s.node.inputs) > 1 else None, s.node.attrs.get("group", 1))
        for s in steps
    ]
    return "-".join(reversed(names)) or "identity"


def _product(plan: Plan) -> str:
    names = []
    for new in plan.nodes:
        weight = next((v.shape for v in new.inputs if v is not None), None)
        names.append(_name(new.op, weight, int(str(new.attrs.get("group", 1)))))
    return "-".join(names) or "identity"


def _module(region: Sequence[gs.Node]) -> str:
    """The innermost torch module that holds a region, or ``""``."""
    levels = zip(*(m.split(".") for node in region for m in provenance(node).modules), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))


def _dearer(new: int, old: int) -> str:
    return f"merged it would cost {100 * (new - old) / max(old, 1):.1f} % more"
