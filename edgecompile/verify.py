"""Are two models the same function? Per-output errors, and the layers where they part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance
from edgecompile.oracle import OutputError, Outputs


@dataclass(frozen=True)
class LayerError:
    """Difference of one intermediate tensor that both models compute under the same name."""

    tensor: str
    op: str
    module: str
    error: OutputError


@dataclass(frozen=True)
class Verdict:
    """Result of :func:`verify`.

    Attributes:
        outputs: error of each output, by the name it has in the first model.
        layers: shared intermediate tensors, largest relative error first.
        tolerance: largest ``max_rel`` allowed.
    """

    outputs: Mapping[str, OutputError]
    layers: tuple[LayerError, ...]
    tolerance: float

    @property
    def same(self) -> bool:
        """True if every output is within the tolerance."""
        return all(e.max_rel <= self.tolerance for e in self.outputs.values())


def verify(first: Graph, second: Graph, feeds: list[Outputs] | None = None, tolerance: float = 1e-4) -> Verdict:
    """Run both models on the same inputs and compare.

    Inputs and outputs are matched by name where the names agree, else by position.

    Args:
        first: the reference.
        second: the candidate.
        feeds: inputs by the first model's names; random ones by default.
        tolerance: largest difference allowed, relative to the largest value of the reference output.

    Raises:
        InputError: the models have different numbers of inputs or outputs, or do not run on the inputs.
    """
    rename = _match("inputs", [t.name for t in first.inputs], [t.name for t in second.inputs])
    outputs = _match("outputs", [t.name for t in first.outputs], [t.name for t in second.outputs])
    feeds = feeds or oracle.probe_feeds(first)
    shared = _shared_tensors(first, second)
    errors, layers = [], []
    for feed in feeds:
        a = _run(first, feed, shared)
        b = _run(second, {rename[k]: v for k, v in feed.items()}, shared)
        errors.append(oracle.compare_all({n: a[n] for n in outputs}, {n: b[m] for n, m in outputs.items()}))
        lost = {n: np.full_like(a[n], np.nan) for n in shared if a[n].shape != b[n].shape}
        layers.append(oracle.compare_all({n: a[n] for n in shared}, {n: lost.get(n, b[n]) for n in shared}))
    found = []
    for name, error in oracle.worst(layers).items():
        node = shared[name]
        found.append(LayerError(name, node.op, provenance(node).module, error))
    found.sort(key=lambda layer: -layer.error.max_rel)
    return Verdict(oracle.worst(errors), tuple(found), tolerance)


def _match(kind: str, first: list[str], second: list[str]) -> dict[str, str]:
    if len(first) != len(second):
        raise InputError(
            "the models cannot be compared",
            f"one has {len(first)} {kind} ({', '.join(first)}), the other {len(second)}",
        )
    return dict(zip(first, first if set(first) == set(second) else second, strict=True))


def _shared_tensors(first: Graph, second: Graph) -> dict[str, gs.Node]:
    """Floating-point tensors that a node of the main graph computes in both models, by name."""
    names = {t.name for node in second.nodes for t in node.outputs if _is_float(t)} - {t.name for t in first.outputs}
    return {t.name: node for node in first.nodes for t in node.outputs if t.name in names and _is_float(t)}


def _is_float(tensor) -> bool:
    return bool(tensor.name) and (tensor.dtype is None or np.dtype(tensor.dtype).kind == "f")


def _run(graph: Graph, feeds: Mapping[str, np.ndarray], extra: Mapping[str, gs.Node]) -> Outputs:
    wide = graph.copy()
    have = {t.name for t in wide.outputs}
    tensors = {t.name: t for node in wide.nodes for t in node.outputs}
    wide.outputs = [*wide.outputs, *(tensors[n] for n in extra if n not in have)]
    if any(t.dtype is None for t in wide.outputs):
        wide.infer_shapes()
    return oracle.run(wide, feeds)
