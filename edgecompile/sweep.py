"""Walks over a graph that passes repeat until nothing changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from edgecompile.graph import Graph, Tensor
from edgecompile.pipeline import Context, PassResult


class Sweep(ABC):
    """One walk over a graph that replaces maps; a pass repeats it until it changes nothing.

    Attributes:
        graph, context: as the pass was given them.
        outputs, pinned: ids of the model's outputs, and of the tensors that subgraphs read or return.
        changed: something was rewritten.
    """

    def __init__(self, graph: Graph, context: Context):
        self.graph = graph
        self.context = context
        self.outputs = {id(t) for t in graph.outputs}
        self.pinned = {id(t) for n in graph.nodes for t in _subgraph_reads(n)}
        self.changed = False

    @abstractmethod
    def walk(self) -> None:
        """Rewrite what can be."""

    @abstractmethod
    def notes(self) -> Iterator[tuple[str, gs.Node | str]]:
        """What was left alone, and where."""

    def exposed(self, tensor: Tensor) -> bool:
        """True if the tensor is seen outside the nodes that read it."""
        return id(tensor) in self.outputs or id(tensor) in self.pinned

    def begin(self, what: str, place: gs.Node | str) -> None:
        """Number a rewrite, right before it is made."""
        if not self.context.rewrite(what, place):
            raise LimitReached
        self.changed = True

    @classmethod
    def repeat(cls, graph: Graph, context: Context) -> PassResult:
        """Walk until nothing changes; the notes are those of the last walk."""
        graph.tidy()
        graph.infer_shapes()
        try:
            while True:
                sweep = cls(graph, context)
                sweep.walk()
                if not sweep.changed:
                    break
                graph.tidy()
        except LimitReached:
            return context.result()
        for text, place in sweep.notes():
            context.note(text, place)
        return context.result()


class LimitReached(Exception):
    """The context allows no further rewrite."""


def _subgraph_reads(node: gs.Node) -> Iterator[Tensor]:
    """Tensors that the subgraphs of a node read or return."""
    for subgraph in (v for v in node.attrs.values() if isinstance(v, gs.Graph)):
        yield from subgraph.outputs
        for inner in subgraph.nodes:
            yield from inner.inputs
            yield from _subgraph_reads(inner)
