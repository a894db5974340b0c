"""Operators that the model defines itself (local functions), and the names of those of edgecompile.

A node that calls one may be replaced by the function's body; what of that depends on constants only is computed.
Source: ONNX IR specification, "Functions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from edgecompile.evaluate import Unfoldable
from edgecompile.graph import Graph, Tensor, disconnect, redirect
from edgecompile.propagate import SMALL, Propagation

DOMAIN = "ai.edgecompile"
CODED = ("ShiftLinear", "ShiftConv", "BinaryCodedLinear", "BinaryCodedConv")  # layers whose weights are packed codes
_ONNX = ("", "ai.onnx", None)
_DECODED = 64  # bytes that computing a constant of a local function may take for each byte it is computed from
_OPERATIONS = 64  # scalar operations for each of those


def rounded(graph: Graph, options: Mapping[str, Any]) -> str:
    """``activations=VALUE`` where that option of a target rounds what meets the coded weights of a graph, else ``""``.

    Args:
        graph: what is built.
        options: of the target, as text or typed.
    """
    given = str(options.get("activations", "float32"))
    coded = any(domain(node) == DOMAIN and node.op in CODED for node in graph.nodes)
    return f"activations={given}" if coded and given != "float32" else ""


def drop_uncalled(graph: Graph) -> None:
    """Drop the functions of a graph that neither a node nor another function calls."""
    called = {(n.domain, n.op) for n in graph.walk()}
    called |= {(n.domain, n.op_type) for f in graph.function_protos for n in f.node}
    graph.function_protos = [f for f in graph.function_protos if (f.domain, f.name) in called]


def domain(node: gs.Node) -> str:
    """The domain of a node's operator, ``""`` for that of ONNX."""
    return "" if node.domain in _ONNX else str(node.domain)


def inlined(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """What puts the body of the operator in the node's place, constants computed; None if the model defines none.

    The caller tidies the graph.
    """
    found = next((f for f in graph.function_protos if (f.domain, f.name) == (domain(node), node.op)), None)
    if found is None or any(graph.opsets.get(o.domain, o.version) != o.version for o in found.opset_import):
        return None
    body = onnx.FunctionProto()
    body.CopyFrom(found)
    given = onnx.helper.make_node(node.op, [], [], **plain(node.attrs)).attribute
    for inner in body.node:
        bind(inner, {a.name: a for a in (*found.attribute_proto, *given)})
    return lambda: _fold(graph, inline(graph, node, body))


def inline(graph: Graph, node: gs.Node, body: onnx.FunctionProto) -> list[gs.Node]:
    """Put the nodes of ``body`` in the place of ``node``; returns them."""
    formal = [onnx.ValueInfoProto(name=n) for n in body.input]
    outputs = [onnx.ValueInfoProto(name=n) for n in body.output]
    proto = onnx.helper.make_graph(list(body.node), node.op, formal, outputs)
    parsed = gs.import_onnx(onnx.helper.make_model(proto, opset_imports=list(body.opset_import)))
    empty = gs.Variable.empty()
    actual = [*node.inputs, *[empty] * (len(formal) - len(node.inputs))]
    known: dict[str, Tensor] = dict(zip((f.name for f in formal), actual, strict=True))
    results = list(node.outputs)
    disconnect([node])
    known |= {name: result for name, result in zip(body.output, results, strict=False) if result.name}
    placed = []
    for inner in parsed.nodes:
        for tensor in inner.outputs:
            if tensor.name and tensor.name not in known:
                known[tensor.name] = graph.new_variable(f"{node.name}_{tensor.name}")
        inputs = [known[t.name] if t.name else empty for t in inner.inputs]
        made = [known[t.name] if t.name else gs.Variable.empty() for t in inner.outputs]
        placed.append(graph.insert(inner.op, inputs, made, inner.attrs, replaces=[node], domain=inner.domain))
    return placed


def bind(inner: onnx.NodeProto, values: Mapping[str, onnx.AttributeProto]) -> None:
    """Replace references to the function's attributes by their values; one without a value is left out."""
    bound = []
    for attribute in inner.attribute:
        if attribute.ref_attr_name in values:
            name, attribute = (
                attribute.name,
                onnx.AttributeProto.FromString(values[attribute.ref_attr_name].SerializeToString()),
            )
            attribute.name = name
        elif attribute.ref_attr_name:
            continue
        bound.append(onnx.AttributeProto.FromString(attribute.SerializeToString()))
    del inner.attribute[:]
    inner.attribute.extend(bound)


def plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as ``onnx.helper.make_node`` takes them."""
    return {k: onnx.numpy_helper.from_array(v.values) if isinstance(v, gs.Constant) else v for k, v in attrs.items()}


def _fold(graph: Graph, nodes: Sequence[gs.Node]) -> None:
    """Compute what of some nodes, in order, depends on constants only."""
    basis = sum(t.values.nbytes for n in nodes for t in n.inputs if isinstance(t, gs.Constant))
    limit = _DECODED * basis + SMALL
    facts = Propagation(graph, limit, _OPERATIONS * limit, lambda *_: None)
    constant = {id(node) for node in nodes if facts.visit(node).constant}
    for node in nodes:
        if id(node) in constant:
            continue
        for tensor in list(node.inputs):
            before = graph.producer(tensor)
            if before is None or id(before) not in constant:
                continue
            try:
                redirect(tensor, graph.new_constant(tensor.name, facts.value(tensor)))
            except Unfoldable:
                continue  # the nodes stay, and so does what they mean
