"""Layers of an engine: what each one executes, in either JSON dialect of the engine inspector.

TensorRT 10 lists ``Bindings`` beside ``Layers``, TensorRT 11 ``I/O Tensors``; with less than detailed verbosity a layer
is only its name. A layer's metadata names the ONNX nodes that it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from edgecompile.errors import InputError
from edgecompile.graph import Graph, Provenance, provenance
from edgecompile.target import LayerTime

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_WRAPPED = re.compile(r"^(?:PWN|Reformatting CopyNode for \w+ Tensor \d+ to)\((.*)\)$")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name for it.
        op: its kind, e.g. ``CaskConvolution``.
        nodes: names of the ONNX nodes that it executes.
    """

    name: str
    op: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What the engine inspector says: the layers in execution order, and the names of inputs and outputs."""

    layers: tuple[Layer, ...]
    tensors: tuple[str, ...]


def inspect(text: str) -> Inspection:
    """Read what the engine inspector or ``trtexec --exportLayerInfo`` wrote.

    Raises:
        InputError: it is neither of the two dialects.
    """
    try:
        found = json.loads(text)
        layers = tuple(_layer(entry) for entry in found["Layers"])
        ends = found.get("I/O Tensors", found.get("Bindings", ()))
        tensors = tuple(str(t["Name"]) if isinstance(t, Mapping) else str(t) for t in ends)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("the layer information cannot be read", f"{type(error).__name__}: {error}") from None
    return Inspection(layers, tensors)


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", _names(entry))
    name = str(entry["Name"])
    nodes = tuple(dict.fromkeys(_ONNX_LAYER.findall(str(entry.get("Metadata", "")))))
    return Layer(name, str(entry.get("LayerType", "")), nodes or _names(name))


def _names(name: str) -> tuple[str, ...]:
    """The nodes in a name that TensorRT composed, e.g. ``conv1 + PWN(relu1)``."""
    parts = (part.strip() for part in name.split(" + "))
    return tuple(_WRAPPED.sub(r"\1", part) for part in parts)


def of_profile(profile: Mapping[str, Any], graph: Graph) -> list[LayerTime]:
    """What :meth:`edgecompile.targets.trt.session.TrtSession.profile` returned, attributed to ``graph``.

    Raises:
        InputError: the inspector's text cannot be read.
    """
    return timed(inspect(profile["information"]).layers, profile["seconds"], graph)


def timed(layers: Iterable[Layer], seconds: Mapping[str, float], graph: Graph) -> list[LayerTime]:
    """Layers with their times, attributed to the nodes and torch modules of ``graph``.

    Args:
        layers: the layers in execution order; one that was not timed is left out.
        seconds: time by layer name; a name that is no layer follows the others.
        graph: the graph that was built.
    """
    nodes = {n.name: n for n in graph.walk()}
    known = {layer.name: layer for layer in layers}
    order = [*(n for n in known if n in seconds), *(n for n in seconds if n not in known)]
    return [_timed(known.get(n) or Layer(n, "", _names(n)), seconds[n], nodes) for n in order]


def _timed(layer: Layer, seconds: float, nodes: Mapping[str, gs.Node]) -> LayerTime:
    executed = [nodes[n] for n in layer.nodes if n in nodes]
    origin = Provenance.union(map(provenance, executed))
    sources = tuple(dict.fromkeys(s for n in executed for s in provenance(n).sources or (n.name,)))
    return LayerTime(layer.name, layer.op, seconds * 1e6, sources, origin.modules)
