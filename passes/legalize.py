"""Legalize: say in operators and attributes that one target takes what the graph says in others.

The rules are a table per target, each with the reason it is there. Every rule is an identity of the ONNX specification:

- *Explicit values.* A Reshape, Split, padding or output extent that a runtime would work out from the input is written
  out, where shape inference proves it. ``auto_pad``: ONNX operators Conv, MaxPool and ConvTranspose, attribute
  ``auto_pad``; ``output_shape``: ONNX operator ConvTranspose.
- *Definitions.* An operator that ONNX defines by a function of other operators becomes that function (ONNX IR
  specification, section "Functions"; the bodies come from the installed onnx package). The shape arithmetic that such a
  body brings along is left to the pass ``clean``, which should run next.
- *Runtime operators.* The fused operators of ``com.microsoft`` (ONNX Runtime, docs/ContribOperators.md) become what
  they were fused from.

A node that no rule makes legal is noted with its module path; the target's build refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompile.graph import Graph, Tensor, disconnect
from edgecompile.pipeline import Context, Pass, PassResult

_CONTRIB = "com.microsoft"
_ONNX = ("", "ai.onnx", None)


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        ops: operator types it looks at.
        domain: their domain.
        what: what it does, for the report.
        why: what the target gets wrong or lacks without it.
        apply: rewrites a node, ``None`` where there is nothing to do; returned is what does it when called.
    """

    ops: tuple[str, ...]
    domain: str
    what: str
    why: str
    apply: Callable[[Graph, gs.Node], Callable[[], object] | None]


@dataclass(frozen=True)
class Legalize(Pass):
    """What one target needs: explicit shapes, sizes and paddings, and operators it has.

    Attributes:
        target: name of the target.
    """

    name: ClassVar[str] = "legalize"
    exact: ClassVar[bool] = True
    target: str = "tvm"

    def __post_init__(self) -> None:
        if self.target not in RULES:
            raise ValueError(f"there are no rules for the target {self.target!r}; there are for {', '.join(RULES)}")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Legalize ``graph`` in place."""
        graph.infer_shapes()
        table: dict[tuple[str, str], list[Rule]] = {}
        for rule in RULES[self.target]:
            for op in rule.ops:
                table.setdefault((rule.domain, op), []).append(rule)
        queue = list(graph.nodes)
        while queue:
            node, known = queue.pop(0), {id(n) for n in graph.nodes}
            for rule in table.get((_domain(node), node.op), ()):
                change = rule.apply(graph, node)
                if change is not None and context.rewrite(rule.what, node):
                    change()
            fresh = [n for n in graph.nodes if id(n) not in known]
            if fresh:
                graph.tidy()
                graph.infer_shapes()
                queue += fresh
        for node in graph.walk():
            if _domain(node):
                context.note(f"{self.target} has no operator {_domain(node)}::{node.op}", node)
        return context.result()


def _domain(node: gs.Node) -> str:
    return "" if node.domain in _ONNX else str(node.domain)


# -- shapes ------------------------------------------------------------------------------------------------------------


def _static(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of a tensor if every extent is known."""
    shape = tensor.shape
    return tuple(shape) if shape is not None and all(isinstance(d, int) and d >= 0 for d in shape) else None


def _explicit_reshape(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    shape = _static(node.outputs[0])
    if shape is None or 0 in shape or len(node.inputs) < 2:
        return None
    value = graph.constant(node.inputs[1])
    if value is not None and value.tolist() == list(shape):
        return None

    def change() -> None:
        node.inputs[1] = graph.new_constant(f"{node.name}_shape", np.array(shape, np.int64))
        node.attrs.pop("allowzero", None)

    return change


def _as_reshape(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """The shape of what Flatten, Squeeze and Unsqueeze write says all that they do."""
    shape = _static(node.outputs[0])
    if shape is None or 0 in shape or graph.opsets[""] < 5:
        return None

    def change() -> None:
        node.inputs = [node.inputs[0], graph.new_constant(f"{node.name}_shape", np.array(shape, np.int64))]
        node.op, node.attrs = "Reshape", {}

    return change


def _explicit_split(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    shapes = [_static(t) for t in node.outputs]
    modern = graph.opsets[""] >= 13
    given = len(node.inputs) > 1 and node.inputs[1].name if modern else "split" in node.attrs
    if given or any(s is None for s in shapes):
        return None
    sizes = [s[node.attrs.get("axis", 0)] for s in shapes if s is not None]

    def change() -> None:
        node.attrs.pop("num_outputs", None)
        if modern:
            node.inputs = [node.inputs[0], graph.new_constant(f"{node.name}_sizes", np.array(sizes, np.int64))]
        else:
            node.attrs["split"] = sizes

    return change


# -- padding -----------------------------------------------------------------------------------------------------------


def _window(graph: Graph, node: gs.Node, rank: int) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel extents as dilated, strides, and output padding."""
    kernel = node.attrs.get("kernel_shape")
    if kernel is None:
        weight = _static(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None:
            return None
        kernel = weight[2:]
    dilations = node.attrs.get("dilations", [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return reach, list(node.attrs.get("strides", [1] * rank)), list(node.attrs.get("output_padding", [0] * rank))


def _set_pads(node: gs.Node, totals: list[int], *, more_at_end: bool) -> None:
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    node.attrs["pads"] = [*small, *large] if more_at_end else [*large, *small]
    node.attrs.pop("auto_pad", None)
    node.attrs.pop("output_shape", None)


def _explicit_padding(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    mode, shape = node.attrs.get("auto_pad", "NOTSET"), _static(node.inputs[0])
    window = _window(graph, node, len(shape) - 2) if shape else None
    if mode == "NOTSET" or shape is None or window is None:
        return None
    reach, strides, _ = window
    totals = [0] * len(reach)
    if mode != "VALID":
        sizes = zip(shape[2:], reach, strides, strict=True)
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes]
    return lambda: _set_pads(node, totals, more_at_end=mode != "SAME_LOWER")


def _explicit_transposed_padding(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    mode, shape = node.attrs.get("auto_pad", "NOTSET"), _static(node.inputs[0])
    wanted = node.attrs.get("output_shape")
    window = _window(graph, node, len(shape) - 2) if shape else None
    if shape is None or window is None or (mode == "NOTSET" and wanted is None):
        return None
    reach, strides, extra = window
    if wanted is None and mode != "VALID":
        wanted = [n * s for n, s in zip(shape[2:], strides, strict=True)]
    totals = [0] * len(reach)
    if wanted is not None:
        wanted = list(wanted)[-len(reach) :]
        sizes = zip(shape[2:], strides, extra, reach, wanted, strict=True)
        totals = [s * (n - 1) + e + k - w for n, s, e, k, w in sizes]
    if min(totals) < 0:
        extra = [e + max(0, -t) for e, t in zip(extra, totals, strict=True)]
        if any(e >= s for e, s in zip(extra, strides, strict=True)):
            return None

    def change() -> None:
        _set_pads(node, [max(t, 0) for t in totals], more_at_end=mode == "SAME_UPPER")
        if any(extra):
            node.attrs["output_padding"] = extra

    return change


# -- definitions -------------------------------------------------------------------------------------------------------


def _definition(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    body = _function(graph, node)
    return None if body is None else lambda: _inline(graph, node, body)


def _function(graph: Graph, node: gs.Node) -> onnx.FunctionProto | None:
    """ONNX's definition of a node for the types of its inputs, in operators of the model's opset."""
    opset = graph.opsets[""]
    try:
        schema: Any = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return None
    names = [t.name for t in node.inputs]
    proto = onnx.helper.make_node(node.op, names, [t.name for t in node.outputs], **_plain(node.attrs))
    body = onnx.FunctionProto()
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    if versions:
        types = [_type(t).SerializeToString() for t in node.inputs]
        definition = schema.get_context_dependent_function_with_opset_version(
            max(versions), proto.SerializeToString(), types
        )
        body.ParseFromString(definition)
    elif versions := [v for v in schema.function_opset_versions if v <= opset]:
        body.ParseFromString(schema.get_function_with_opset_version(max(versions)))
    else:
        return None
    defaults = {n: a.default_value for n, a in schema.attributes.items() if a.default_value.type}
    given = {a.name: a for a in proto.attribute}
    for inner in body.node:
        _bind(inner, {**defaults, **given})
    return body


def _plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: onnx.numpy_helper.from_array(v.values) if isinstance(v, gs.Constant) else v for k, v in attrs.items()}


def _type(tensor: Tensor) -> onnx.TypeProto:
    if tensor.dtype is None or not tensor.name:
        return onnx.TypeProto()
    kind = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return onnx.helper.make_tensor_type_proto(kind, tensor.shape)


def _bind(inner: onnx.NodeProto, values: Mapping[str, onnx.AttributeProto]) -> None:
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


def _inline(graph: Graph, node: gs.Node, body: onnx.FunctionProto) -> None:
    """Put the nodes of ``body`` in the place of ``node``."""
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
    for inner in parsed.nodes:
        for tensor in inner.outputs:
            if tensor.name and tensor.name not in known:
                known[tensor.name] = graph.new_variable(f"{node.name}_{tensor.name}")
        inputs = [known[t.name] if t.name else empty for t in inner.inputs]
        made = [known[t.name] if t.name else gs.Variable.empty() for t in inner.outputs]
        graph.insert(inner.op, inputs, made, inner.attrs, replaces=[node])


# -- fused operators of ONNX Runtime -----------------------------------------------------------------------------------


def _chain(graph: Graph, node: gs.Node) -> Callable[..., Tensor]:
    """A function that appends a node standing for ``node`` and returns its output, ``last`` being that of ``node``."""

    def add(op: str, *inputs: Tensor, last: Tensor | None = None, **attrs: Any) -> Tensor:
        outputs = [graph.new_variable(f"{node.name}_{op}") if last is None else last]
        return graph.insert(op, inputs, outputs, attrs, replaces=[node]).outputs[0]

    return add


def _quick_gelu(graph: Graph, node: gs.Node) -> Callable[[], object]:
    """``x sigmoid(alpha x)``."""

    def change() -> None:
        (x,), (y,), add = list(node.inputs), list(node.outputs), _chain(graph, node)
        alpha = graph.new_constant(f"{node.name}_alpha", np.array(node.attrs.get("alpha", 1.702), x.dtype))
        disconnect([node])
        add("Mul", x, add("Sigmoid", add("Mul", x, alpha)), last=y)

    return change


def _fused_matmul(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """``alpha A B``, of matrices that may be given transposed."""
    ranks = [len(t.shape) if t.shape is not None else 0 for t in node.inputs]
    if min(ranks) < 2 or node.attrs.get("transBatchA") or node.attrs.get("transBatchB"):
        return None

    def change() -> None:
        operands, (y,), add = list(node.inputs), list(node.outputs), _chain(graph, node)
        alpha = graph.new_constant(f"{node.name}_alpha", np.array(node.attrs.get("alpha", 1.0), operands[0].dtype))
        disconnect([node])
        for index, flag in enumerate(("transA", "transB")):
            if node.attrs.get(flag):
                axes = list(range(ranks[index]))
                operands[index] = add("Transpose", operands[index], perm=[*axes[:-2], axes[-1], axes[-2]])
        add("Mul", add("MatMul", *operands), alpha, last=y)

    return change


def _gelu(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """``x (1 + erf(x / sqrt 2)) / 2``, with the tanh that FastGelu has for erf; BiasGelu adds a vector first."""
    given = [t for t in node.inputs if t.name]

    def change() -> None:
        (y,), add = list(node.outputs), _chain(graph, node)
        op, kind = node.op, given[0].dtype

        def number(value: float) -> Tensor:
            return graph.new_constant(f"{node.name}_number", np.array(value, kind))

        disconnect([node])
        x = add("Add", *given) if len(given) > 1 else given[0]
        if op == "FastGelu":
            cube = add("Mul", add("Mul", add("Mul", x, x), x), number(0.044715))
            gate = add("Tanh", add("Mul", add("Add", x, cube), number(math.sqrt(2 / math.pi))))
        else:
            gate = add("Erf", add("Mul", x, number(math.sqrt(0.5))))
        add("Mul", add("Mul", x, add("Add", gate, number(1.0))), number(0.5), last=y)

    return change


_ACTIVATIONS = {"Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid", "Clip"}
_PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}


def _fused_conv(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """A convolution, then the sum with a fourth input, then an activation."""
    kind = node.attrs.get("activation")
    if kind is not None and kind not in _ACTIVATIONS:
        return None

    def change() -> None:
        inputs, (y,), add = list(node.inputs), list(node.outputs), _chain(graph, node)
        attrs = dict(node.attrs)
        kind, numbers = attrs.pop("activation", None), list(attrs.pop("activation_params", ()))
        disconnect([node])
        residual = inputs[3] if len(inputs) > 3 else None
        value = add("Conv", *inputs[:3], last=None if residual or kind else y, **attrs)
        if residual is not None:
            value = add("Add", value, residual, last=None if kind else y)
        if kind == "Clip":
            bounds = [graph.new_constant(f"{node.name}_bound", np.array(n, inputs[0].dtype)) for n in numbers]
            add("Clip", value, *bounds, last=y)
        elif kind is not None:
            add(kind, value, last=y, **dict(zip(_PARAMETERS.get(kind, ()), numbers, strict=False)))

    return change


def _skip_layer_norm(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """LayerNormalization of ``x + skip + bias``; only its first and its last output may be read."""
    if any(t.outputs or graph.is_output(t) for t in node.outputs[1:3]) or graph.opsets[""] < 17:
        return None

    def change() -> None:
        inputs, outputs, add = list(node.inputs), list(node.outputs), _chain(graph, node)
        epsilon = node.attrs.get("epsilon", 1e-12)
        disconnect([node])
        total = outputs[3] if len(outputs) > 3 and outputs[3].name else None
        bias = inputs[4] if len(inputs) > 4 and inputs[4].name else None
        value = add("Add", inputs[0], inputs[1], last=None if bias is not None else total)
        if bias is not None:
            value = add("Add", value, bias, last=total)
        given = [t for t in inputs[2:4] if t.name]
        add("LayerNormalization", value, *given, last=outputs[0], axis=-1, epsilon=epsilon)

    return change


# -- the tables --------------------------------------------------------------------------------------------------------

RULES: Mapping[str, tuple[Rule, ...]] = {
    "tvm": (
        Rule(
            ("Reshape",), "", "write out the shape of Reshape",
            "Relax needs a constant shape to give what follows a static one",
            _explicit_reshape,
        ),
        Rule(
            ("Flatten", "Squeeze", "Unsqueeze"), "", "replace it by a Reshape",
            "Relax's change of layout fails on a Squeeze with a negative axis",
            _as_reshape,
        ),
        Rule(("Split",), "", "write out the sizes of Split", "Relax divides evenly or not at all", _explicit_split),
        Rule(
            ("AveragePool", "Conv", "LpPool", "MaxPool"), "", "write out the padding",
            "Relax pads MaxPool with auto_pad=SAME_LOWER to another extent",
            _explicit_padding,
        ),
        Rule(
            ("ConvTranspose",), "", "write out the padding", "Relax ignores output_shape", _explicit_transposed_padding
        ),
        Rule(
            ("Attention", "CenterCropPad", "Celu", "RotaryEmbedding", "SwiGLU", "Swish"), "",
            "replace an operator by its definition",
            "Relax lacks it, and takes Attention for the operator of the same name of com.microsoft",
            _definition,
        ),
        Rule(("BiasGelu", "FastGelu", "Gelu"), _CONTRIB, "decompose Gelu", "no operator of com.microsoft stays", _gelu),
        Rule(("QuickGelu",), _CONTRIB, "decompose QuickGelu", "Relax lacks it", _quick_gelu),
        Rule(("FusedMatMul",), _CONTRIB, "decompose FusedMatMul", "Relax lacks it", _fused_matmul),
        Rule(("FusedConv",), _CONTRIB, "decompose FusedConv", "Relax lacks it", _fused_conv),
        Rule(
            ("SkipLayerNormalization",), _CONTRIB, "decompose SkipLayerNormalization",
            "Relax takes it only with both beta and bias",
            _skip_layer_norm,
        ),
    ),
}  # fmt: skip
