"""Which layers are coded, and in how many bits: what each choice costs in bytes, in error, and in energy.

Layers with equal weights are one subject: coded once, stored once, kept or reverted together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import sensitivity, tradeoff
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, layers
from edgecompile.tradeoff import Point, Tradeoff


@dataclass(eq=False)
class Subject:
    """Layers of equal weights.

    Attributes:
        layers: in the order of the graph.
        positions: of their nodes in ``graph.nodes``; the first names the subject.
        gram: ``X^T X`` of what they read, or None.
        kind, group, output_share: of the codes, as :func:`codes.encode` takes them.
        exact: codes that keep the weights bit for bit, if there are any.
    """

    layers: tuple[layers.Layer, ...]
    positions: tuple[int, ...]
    gram: np.ndarray | None
    kind: str
    group: int
    output_share: float
    exact: codes.Coded | None
    _coded: dict[int, codes.Coded] = field(default_factory=dict)

    @property
    def position(self) -> int:
        """The number that it goes by."""
        return self.positions[0]

    @property
    def weight(self) -> np.ndarray:
        """The weights, float32 ``[rows, columns]``."""
        return self.layers[0].weight

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths to choose among."""
        return (self.exact.bits,) if self.exact else codes.WIDTHS[self.kind]

    def coded(self, bits: int) -> codes.Coded:
        """The codes of a width; those that keep the weights where there are any."""
        if self.exact:
            return self.exact
        if bits not in self._coded:
            self._coded[bits] = codes.encode(
                self.weight, self.kind, bits, group=self.group, gram=self.gram, output_share=self.output_share
            )
        return self._coded[bits]

    def error(self, bits: int) -> float:
        """Energy of the error of the outputs over that of the outputs."""
        gram = np.eye(self.weight.shape[1]) if self.gram is None else self.gram
        error, energy = layers.output_error(self.weight, self.coded(bits).decode(), gram)
        return error / energy if energy else 0.0


def subjects(
    graph: Graph, found: Sequence[layers.Layer], grams: Mapping[str, np.ndarray], kind: str, group: int, share: float
) -> list[Subject]:
    """The layers of a graph, those of equal weights together."""
    position = {id(node): i for i, node in enumerate(graph.nodes)}
    equal: dict[tuple, list[layers.Layer]] = {}
    for layer in found:
        equal.setdefault((layer.weight.shape, layer.weight.tobytes()), []).append(layer)
    made = []
    for several in equal.values():
        seen = [grams[name] for name in dict.fromkeys(one.source.name for one in several) if name in grams]
        gram = np.sum(seen, 0) if seen else None
        places = tuple(position[id(one.node)] for one in several)
        known = codes.exact(several[0].weight)
        made.append(Subject(tuple(several), places, gram, kind, group, share, known))
    return made


def write(graph: Graph, nodes: Sequence[gs.Node], subject: Subject, bits: int) -> None:
    """Code a subject. The caller tidies the graph.

    Args:
        graph: the graph of the subject, or a copy.
        nodes: its nodes as they were numbered.
        subject: what is coded.
        bits: of its codes.
    """
    coded = subject.coded(bits)
    constants = layers.coded_constants(graph, coded, nodes[subject.position].inputs[1].name)
    for layer, place in zip(subject.layers, subject.positions, strict=True):
        layers.write(graph, replace(layer, node=nodes[place]), coded, constants)


def coded_graph(graph: Graph, found: Sequence[Subject], chosen: Mapping[int, int]) -> Graph:
    """A copy of the graph in which subjects are coded: the bits of each by its position."""
    made = graph.copy()
    nodes = list(made.nodes)
    for subject in found:
        if subject.position in chosen:
            write(made, nodes, subject, chosen[subject.position])
    made.tidy()
    return made


def shares(
    found: Sequence[Subject], trials: sensitivity.Trials, seconds: float, progress: Callable[[float], object]
) -> dict[int, float]:
    """What the relative error of each subject adds to the error of the model's outputs, by position.

    Measured with one subject coded at a time, in the middle of its widths; what the time does not suffice for counts
    like the mean of the others.

    Args:
        found: the subjects.
        trials: what runs the graph with some of them coded.
        seconds: time for all of them.
        progress: told the share that is done.
    """
    deadline, known = time.monotonic() + seconds, {}
    for number, one in enumerate(found):
        bits = one.widths[len(one.widths) // 2]
        if (error := one.error(bits)) and time.monotonic() <= deadline:
            known[one.position] = 10 ** (-trials.level({one.position: bits}) / 10) / error
            progress((number + 1) / len(found))
    mean = float(np.mean(list(known.values()))) if known else 1.0
    return {one.position: known.get(one.position, mean) for one in found}


def allocated(found: Sequence[Subject], budget: float, shares: Mapping[int, float]) -> dict[int, int]:
    """Bits by position that leave the least error of the outputs in at most ``budget`` bytes; see :func:`shares`."""
    rows = [
        {bits: (one.coded(bits).bytes, shares[one.position] * one.error(bits)) for bits in one.widths} for one in found
    ]
    chosen = codes.allocate(rows, budget)
    return {one.position: bits for one, bits in zip(found, chosen, strict=True)}


def stored(found: Sequence[Subject], chosen: Mapping[int, int]) -> int:
    """Bytes of the weights when these are coded."""
    return sum(s.coded(chosen[s.position]).bytes if s.position in chosen else s.weight.nbytes for s in found)


# -- error against bytes and energy ------------------------------------------------------------------------------------


def _per_weight(coded: codes.Coded) -> float:
    """Picojoules of one weight and one token: shifts and additions of integers."""
    cost = tradeoff.PICOJOULES
    if coded.kind == "binary":
        # Additions with a sign; then each sum of a group is shifted and added for each term of its scale.
        scale = codes.TERMS * (cost["int32 shift"] + cost["int32 add"])
        return coded.bits * (cost["int32 add"] + scale / coded.group)
    return {"pot": 1, "sp2": 2}[coded.kind] * (cost["int32 shift"] + cost["int32 add"])


def _energy(found: Sequence[Subject], chosen: Mapping[int, int]) -> float | None:
    """Picojoules of one inference."""
    plain = tradeoff.PICOJOULES["float32 multiply"] + tradeoff.PICOJOULES["float32 add"]
    total = 0.0
    for one in found:
        each = _per_weight(one.coded(chosen[one.position])) if one.position in chosen else plain
        for layer in one.layers:
            results = _size(layer.node.outputs[0].shape)
            if results is None:
                return None
            total += results * layer.weight.shape[1] * each
    return total


def _size(shape: Sequence[object] | None) -> int | None:
    """Elements of one sample; None if a length other than that of the batch is not known."""
    if shape is None or not all(isinstance(n, int) for n in shape[1:]):
        return None
    return math.prod(n for n in (shape[0] if isinstance(shape[0], int) else 1, *shape[1:]) if isinstance(n, int))


def curve(found: Sequence[Subject], chosen: Mapping[int, int], seconds: float) -> Tradeoff:
    """Error against bytes and energy: in floating point, in each width that there is time for, and as chosen."""

    def point(label: str, bits: Mapping[int, int], built: bool = False) -> Point:
        errors = [one.error(bits[one.position]) if one.position in bits else 0.0 for one in found]
        mean = sum(errors) / len(errors)
        snr = -10 * math.log10(mean) if mean else math.inf
        return Point(label, stored(found, bits), snr, _energy(found, bits), built)

    points, deadline = [point("float32", {})], time.monotonic() + seconds
    kind, uniform = found[0].kind, {}
    for bits in codes.WIDTHS[kind]:
        every = {one.position: bits for one in found}
        uniform[bits] = every == dict(chosen)
        # What was chosen is coded already; another width waits for the time.
        if uniform[bits] or time.monotonic() <= deadline:
            points.append(point(f"{kind}, {bits} bits", every, uniform[bits]))
    if not any(uniform.values()):
        points.append(point("as chosen", chosen, True))
    return Tradeoff(tuple(points))
