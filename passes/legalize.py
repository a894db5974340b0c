"""Legalize: say in operators and attributes that one target takes what the graph says in others.

The rules are a table per target, each with the reason it is there. Every rule is an identity of the ONNX specification:

- *Explicit values.* A Reshape, Split, padding or output extent that a runtime would work out from the input is written
  out, where shape inference proves it. ``auto_pad``: ONNX operators Conv, MaxPool and ConvTranspose, attribute
  ``auto_pad``; ``output_shape``: ONNX operator ConvTranspose.
- *Definitions.* An operator that ONNX defines by a function of other operators becomes that function (ONNX IR
  specification, section "Functions"; the bodies come from the installed onnx package). The shape arithmetic that such a
  body brings along is left to the pass ``clean``, which should run next.
- *Local functions.* An operator that the model itself defines, and the target has no kernel for, becomes its body. What
  of it depends on constants only is computed then, where the result is in proportion to what it is computed from: so
  weights that were stored as codes (:mod:`edgecompile.passes.shift_add`) become floats.
- *Runtime operators.* The fused operators of ``com.microsoft`` (ONNX Runtime, docs/ContribOperators.md) become what
  they were fused from.
- *Shuffles.* A chain of Reshape and Transpose sends each element to one place. Factor the extents until every Reshape
  of the chain only groups factors; what is left is one permutation of the factors, and neighbours that stay neighbours
  are one axis. So a chain is at most Reshape, Transpose, Reshape.
- *Group normalisation.* Statistics of a group of channels are those of one channel that holds the group's elements
  (Wu and He, "Group Normalization", ECCV 2018, section 3.1): Reshape, InstanceNormalization, Reshape.
- *Resize.* Modes that differ only for fractional scales, or only where the image shrinks, are the same elsewhere (ONNX
  operator Resize, attributes ``coordinate_transformation_mode`` and ``antialias``).

What TensorRT's parser does is read from github.com/onnx/onnx-tensorrt (onnxOpImporters.cpp, importerUtils.cpp,
docs/operators.md) and from the issues of github.com/NVIDIA/TensorRT that the rules name.

A node that no rule makes legal is noted with its module path; the target's build refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompile.functions import CODED, DOMAIN, bind, domain, inline, inlined, plain
from edgecompile.graph import Graph, Tensor, disconnect
from edgecompile.pipeline import Context, Pass, PassResult

_CONTRIB = "com.microsoft"
# Operators of local functions that a target has kernels for.
_CODED = frozenset((DOMAIN, op) for op in CODED)
_KERNELS: Mapping[str, frozenset[tuple[str, str]]] = {
    "tvm": _CODED | {(DOMAIN, "BinaryAngularAttention"), (DOMAIN, "BinarySoftmaxAttention")},
    "trt": frozenset(),
}
_PLUGINS = {"trt": ("TRT", "trt.plugins")}  # domains whose operators a target looks up by itself


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
        keep: leave coded layers to the target, which decides whether it has a kernel (trt: ``shift_add=plugin``).
    """

    name: ClassVar[str] = "legalize"
    exact: ClassVar[bool] = True
    target: str = "tvm"
    keep: bool = False

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
        kept = _KERNELS[self.target] | (_CODED if self.keep else frozenset())
        for function in graph.function_protos:
            key = (function.domain, function.name)
            if key not in kept and function.domain not in _PLUGINS.get(self.target, ()):
                table.setdefault(key, []).append(_LOCAL)
        changed = True
        while changed:  # a rewrite makes room for others, which see its tensors once shapes are inferred
            changed = False
            for node in list(graph.nodes):
                for rule in table.get((domain(node), node.op), ()):
                    if not node.outputs:  # a rewrite has taken it away
                        break
                    change = rule.apply(graph, node)
                    if change is not None and context.rewrite(rule.what, node):
                        change()
                        changed = True
            if changed:
                graph.tidy()
                graph.infer_shapes()
        if not any((domain(n), n.op) in {(f.domain, f.name) for f in graph.function_protos} for n in graph.walk()):
            graph.function_protos = []
        known = {"", *_PLUGINS.get(self.target, ()), *(f.domain for f in graph.function_protos)}
        for node in graph.walk():
            if domain(node) not in known:
                context.note(f"{self.target} has no operator {domain(node)}::{node.op}", node)
        return context.result()


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


def _placeholder_reshape(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """A shape that is computed becomes a constant: extents known, 0 for one that is kept, -1 for at most one other."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if len(node.inputs) < 2 or graph.constant(node.inputs[1]) is not None or after is None or 0 in after:
        return None
    kept = dict(enumerate(before or ()))
    shape = [d if isinstance(d, int) else 0 if d is not None and kept.get(i) == d else -1 for i, d in enumerate(after)]
    if shape.count(-1) > 1 or (0 in shape and node.attrs.get("allowzero")):
        return None

    def change() -> None:
        node.inputs[1] = graph.new_constant(f"{node.name}_shape", np.array(shape, np.int64))

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
    return None if body is None else lambda: inline(graph, node, body)


def _function(graph: Graph, node: gs.Node) -> onnx.FunctionProto | None:
    """ONNX's definition of a node for the types of its inputs, in operators of the model's opset."""
    opset = graph.opsets[""]
    try:
        schema: Any = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return None
    names = [t.name for t in node.inputs]
    proto = onnx.helper.make_node(node.op, names, [t.name for t in node.outputs], **plain(node.attrs))
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
        bind(inner, {**defaults, **given})
    return body


def _type(tensor: Tensor) -> onnx.TypeProto:
    if tensor.dtype is None or not tensor.name:
        return onnx.TypeProto()
    kind = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return onnx.helper.make_tensor_type_proto(kind, tensor.shape)


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


# -- shuffles ----------------------------------------------------------------------------------------------------------

_SHUFFLES = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_SOME = 1_000_003  # stands for one extent that is not known: a prime, which no other extent is a multiple of


@dataclass(eq=False)
class _Factor:
    """A factor of an extent; once split, its parts stand for it."""

    size: int
    parts: list[_Factor] = field(default_factory=list)

    def leaves(self) -> list[_Factor]:
        return [leaf for part in self.parts for leaf in part.leaves()] or [self]


def _extents(tensor: Tensor, total: int | None = None) -> list[int] | None:
    """The shape of a tensor; an extent that is not known is :data:`_SOME`, or what makes ``total`` elements."""
    shape = list(tensor.shape) if tensor.shape is not None else []
    unknown = [i for i, d in enumerate(shape) if not isinstance(d, int)]
    if tensor.shape is None or len(unknown) > 1 or 0 in shape:
        return None
    known = math.prod(d for d in shape if isinstance(d, int))
    if unknown:
        shape[unknown[0]] = _SOME if total is None else total // known
    return shape if total in (None, math.prod(shape)) else None


def _grouped(factors: list[_Factor], shape: list[int]) -> list[list[_Factor]] | None:
    """The factors of each extent, splitting factors where an extent ends inside one."""
    left, groups = [f for f in factors if f.size != 1], []
    for extent in shape:
        group: list[_Factor] = []
        while extent > 1:
            if not left:
                return None
            factor = left.pop(0)
            if factor.size > extent and factor.size % extent == 0:
                factor.parts = [_Factor(extent), _Factor(factor.size // extent)]
                factor, rest = factor.parts
                left.insert(0, rest)
            if extent % factor.size:
                return None
            group.append(factor)
            extent //= factor.size
        groups.append(group)
    return None if left else groups


def _permutation(chain: list[gs.Node]) -> tuple[list[int], list[int], list[int]] | None:
    """The factors of the extents that a chain permutes, their order after it, and the shape that it leaves."""
    shape = _extents(chain[0].inputs[0])
    if shape is None:
        return None
    total, roots = math.prod(shape), [_Factor(d) for d in shape]
    groups = [[root] for root in roots]
    for node in chain:
        if node.op == "Transpose":
            groups = [groups[i] for i in node.attrs.get("perm", range(len(groups))[::-1])]
            continue
        shape = _extents(node.outputs[0], total)
        made = _grouped([leaf for group in groups for factor in group for leaf in factor.leaves()], shape or [])
        if shape is None or made is None:
            return None
        groups = made
    source = [f for root in roots for f in root.leaves() if f.size != 1]
    place = {id(f): i for i, f in enumerate(source)}
    order = [place[id(f)] for group in groups for factor in group for f in factor.leaves() if f.size != 1]
    left = [math.prod(f.size for factor in group for f in factor.leaves()) for group in groups]
    return [f.size for f in source], order, left


def _shuffle(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """A chain of shuffles that ends at ``node`` as Reshape, Transpose, Reshape, if these are fewer or of fewer axes."""

    def joins(other: gs.Node | None) -> bool:
        return other is not None and other.op in _SHUFFLES and not domain(other) and len(other.outputs) == 1

    after = graph.sole_consumer(node.outputs[0])
    if joins(after) and after is not None and after.inputs[0] is node.outputs[0]:
        return None
    chain = [node]
    while joins(before := graph.producer(chain[0].inputs[0])) and before is not None:
        if graph.sole_consumer(before.outputs[0]) is not chain[0]:
            break
        chain.insert(0, before)
    while len(chain) > 1:
        found = _permutation(chain)
        steps = _steps(_extents(chain[0].inputs[0]) or [], *found) if found else []
        if found and _cost(steps) < _cost([(n.op, n.outputs[0].shape or (), []) for n in chain]):
            return lambda: _replace(graph, chain, steps)
        chain = chain[1:]
    return None


_Step = tuple[str, Sequence[Any], list[int]]  # operator, the shape that it leaves, and a Transpose's permutation


def _steps(shape: list[int], sizes: list[int], order: list[int], left: list[int]) -> list[_Step]:
    """What moves the elements as a chain does."""
    if order == sorted(order):
        return [] if shape == left else [("Reshape", left, [])]
    plain, choices = [i for i, d in enumerate(shape) if d != 1], []
    if [shape[i] for i in plain] == sizes:  # no extent was split: those of 1 go where they are wanted
        ones = iter(i for i, d in enumerate(shape) if d == 1)
        axes = iter(plain[i] for i in order)
        perm = [next(ones if d == 1 else axes, -1) for d in left]
        if sorted(perm) == list(range(len(shape))) and [shape[i] for i in perm] == left:
            choices.append([("Transpose", left, perm)])
    runs: list[list[int]] = []
    for i in order:  # factors that stay neighbours are one axis
        if runs and runs[-1][-1] + 1 == i:
            runs[-1].append(i)
        else:
            runs.append([i])
    axes_before = sorted(runs)
    sizes = [math.prod(sizes[i] for i in run) for run in axes_before]
    order = [axes_before.index(run) for run in runs]
    moved = [sizes[i] for i in order]
    before: list[_Step] = [("Reshape", sizes, [])] if shape != sizes else []
    after: list[_Step] = [("Reshape", left, [])] if moved != left else []
    return min([*choices, [*before, ("Transpose", moved, order), *after]], key=_cost)


def _cost(steps: Sequence[_Step]) -> tuple[int, int, int]:
    """Passes over memory, then axes beyond the four that every kernel takes, then nodes."""
    transposes = sum(op == "Transpose" for op, *_ in steps)
    return transposes, max([len(shape) - 4 for _, shape, _ in steps] + [0]), len(steps)


def _replace(graph: Graph, chain: list[gs.Node], steps: list[_Step]) -> None:
    value, result, last = chain[0].inputs[0], chain[-1].outputs[0], chain[-1]
    if not steps:
        graph.rewire(result, value)
    disconnect(chain)
    for index, (op, shape, perm) in enumerate(steps):
        outputs = [result if index + 1 == len(steps) else graph.new_variable(f"{last.name}_{op}")]
        if op == "Transpose":
            value = graph.insert(op, [value], outputs, {"perm": perm}, replaces=chain).outputs[0]
        else:
            made = np.array([-1 if d % _SOME == 0 else d for d in shape], np.int64)
            target = graph.new_constant(f"{last.name}_shape", made)
            value = graph.insert(op, [value, target], outputs, replaces=chain).outputs[0]


def _split_first(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """A Transpose whose readers take single indices of its first axis: split the tensor, then transpose each part.

    It is how attention takes queries, keys and values from one product, [B, N, 3 H D] as [3, B, H, N, D].
    """
    result, perm = node.outputs[0], list(node.attrs.get("perm", ()))
    before = graph.producer(node.inputs[0])
    shape = _extents(node.inputs[0])
    if before is None or before.op != "Reshape" or domain(before) or shape is None or not perm:
        return None
    source, first = before.inputs[0], perm[0]
    inner = _extents(source, math.prod(shape))
    if inner is None or graph.is_output(result) or graph.sole_consumer(before.outputs[0]) is not node:
        return None
    axis = next((i for i, _ in enumerate(inner) if math.prod(inner[:i]) == math.prod(shape[:first])), None)
    if axis is None or inner[axis] % shape[first] or inner[axis] == _SOME:
        return None
    taken = [_taken(graph, reader, result) for reader in result.outputs]
    if not taken or any(t is None for t in taken):
        return None
    count, kept = shape[first], [-1 if d % _SOME == 0 else d for i, d in enumerate(shape) if i != first]
    order = [i - (i > first) for i in perm[1:]]

    def change() -> None:
        names = [graph.new_variable(f"{node.name}_part") for _ in range(count)]
        sizes = graph.new_constant(f"{node.name}_sizes", np.full(count, inner[axis] // count, np.int64))
        ends = [(nodes, index, nodes[-1].outputs[0]) for found in taken if found for nodes, index in [found]]
        disconnect([before, node, *(n for nodes, *_ in ends for n in nodes)])
        graph.insert("Split", [source, sizes], names, {"axis": axis}, replaces=[before, node])
        for nodes, index, end in ends:
            target, moved = graph.new_constant(f"{node.name}_shape", np.array(kept, np.int64)), [before, node, *nodes]
            part = graph.insert("Reshape", [names[index], target], replaces=moved).outputs[0]
            if nodes[0].op == "Slice" and len(nodes) == 1:
                part = graph.insert("Transpose", [part], attrs={"perm": order}, replaces=moved).outputs[0]
                whole = graph.new_constant(f"{node.name}_shape", np.array([1, *(kept[i] for i in order)], np.int64))
                graph.insert("Reshape", [part, whole], [end], replaces=moved)
            else:
                graph.insert("Transpose", [part], [end], {"perm": order}, replaces=moved)

    return change


def _taken(graph: Graph, node: gs.Node, tensor: Tensor) -> tuple[list[gs.Node], int] | None:
    """The nodes that read one index of the first axis of ``tensor``, dropping that axis or not, and the index."""
    extent, after = (tensor.shape or [None])[0], graph.sole_consumer(node.outputs[0])
    if domain(node) or graph.opsets[""] < 13 or not isinstance(extent, int):
        return None
    values = [graph.constant(t) if t.name else None for t in node.inputs[1:]]
    if node.op == "Gather" and node.attrs.get("axis", 0) == 0:
        return ([node], int(values[0]) % extent) if values[0] is not None and values[0].ndim == 0 else None
    shape = node.outputs[0].shape
    if node.op != "Slice" or shape is None or shape[0] != 1 or len(values) < 2 or values[0] is None:
        return None
    axes = values[2].tolist() if len(values) > 2 and values[2] is not None else list(range(values[0].size))
    if axes != [0] or (len(values) > 2 and values[2] is None):
        return None
    start = int(values[0].reshape(-1)[0])
    index = min(max(start + extent if start < 0 else start, 0), extent - 1)
    dropped = after is not None and after.op == "Squeeze" and list(after.outputs[0].shape or ()) == list(shape[1:])
    return ([node, after] if dropped and after is not None else [node]), index


def _leading_axis(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """``reshape(reshape(x, [1, *S]) + c, S) = x + c``, whatever broadcasts, where ``c`` needs no axis more than S."""
    side = next((i for i in (0, 1) if graph.constant(node.inputs[i]) is not None), None)
    if side is None:
        return None
    value = graph.constant(node.inputs[side])
    before, after = graph.producer(node.inputs[1 - side]), graph.sole_consumer(node.outputs[0])
    ends = [before, after]
    if value is None or any(n is None or n.op not in ("Reshape", "Squeeze", "Unsqueeze") or domain(n) for n in ends):
        return None
    assert before is not None and after is not None
    inner, outer = _static(before.inputs[0]), _static(before.outputs[0])
    fits = inner is not None and outer == (1, *inner) and _static(after.outputs[0]) == inner and 0 not in inner
    if not fits or _static(node.outputs[0]) != outer or graph.sole_consumer(before.outputs[0]) is not node:
        return None
    assert outer is not None
    if value.ndim == len(outer):
        if value.shape[0] != 1:
            return None
        value = value[0]

    def change() -> None:
        operands = list(node.inputs)
        operands[1 - side] = before.inputs[0]
        operands[side] = graph.new_constant(f"{node.name}_operand", value)
        result = after.outputs[0]
        disconnect([before, node, after])
        graph.insert(node.op, operands, [result], node.attrs, replaces=[before, node, after])

    return change


# -- what TensorRT's parser gets wrong or lacks ------------------------------------------------------------------------


def _clip(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """``min(max(x, low), high)``, where a bound is computed or would be lost, or x is an integer."""
    kind = node.inputs[0].dtype
    if graph.opsets[""] < 12 or kind is None:
        return None
    bounds = [t if t.name else None for t in (list(node.inputs) + [gs.Variable.empty()] * 2)[1:3]]
    computed = any(t is not None and graph.constant(t) is None for t in bounds)
    whole = not isinstance(kind, int) and np.issubdtype(np.dtype(kind), np.integer)
    if not any(t is not None for t in bounds) or not (computed or whole or _bound_is_lost(graph, node)):
        return None

    def change() -> None:
        (x, *_), (y,), add = list(node.inputs), list(node.outputs), _chain(graph, node)
        low, high = bounds
        disconnect([node])
        if low is not None:
            x = add("Max", x, low, last=None if high is not None else y)
        if high is not None:
            add("Min", x, high, last=y)

    return change


def _bound_is_lost(graph: Graph, node: gs.Node) -> bool:
    """True for a Clip from 0 to a bound right after a linear layer."""
    low, high = (graph.constant(t) if t.name else None for t in (list(node.inputs) + [gs.Variable.empty()] * 2)[1:3])
    before = graph.producer(node.inputs[0])
    if low is None or high is None or low.reshape(-1)[0] != 0 or before is None:
        return False
    sources = [before] if before.op == "Gemm" else [graph.producer(t) for t in before.inputs if before.op == "Add"]
    return any(n is not None and n.op in ("Gemm", "MatMul") for n in sources)


def _group_normalization(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """Reshape, InstanceNormalization, Reshape, and the affine map of the channels."""
    x, scale, bias = node.inputs
    factors = [graph.constant(t) for t in (scale, bias)]
    shape, groups = x.shape, int(node.attrs["num_groups"])
    if shape is None or len(shape) < 3 or x.dtype is None or any(f is None for f in factors):
        return None
    if any(not isinstance(d, int) or d < 1 for d in shape[1:]):
        return None
    gamma, beta = (np.asarray(f) for f in factors)
    by_group = graph.opsets[""] < 21  # then scale and bias are one per group

    def change() -> None:
        (y,), add = list(node.outputs), _chain(graph, node)
        first = shape[0] if isinstance(shape[0], int) else 0  # a Reshape's 0 keeps the extent

        def constant(what: str, values: Any, dtype: Any) -> Tensor:
            return graph.new_constant(f"{node.name}_{what}", np.asarray(values, dtype))

        disconnect([node])
        ones, zeros = np.ones(groups, x.dtype), np.zeros(groups, x.dtype)
        inner = constant("groups", [first, groups, math.prod(shape[1:]) // groups], np.int64)
        outer = constant("channels", [first, *shape[1:]], np.int64)
        weights = (gamma, beta) if by_group else (ones, zeros)
        value = add(
            "InstanceNormalization", add("Reshape", x, inner),
            *(constant(what, values, x.dtype) for what, values in zip(("scale", "bias"), weights, strict=True)),
            epsilon=node.attrs.get("epsilon", 1e-5),
        )  # fmt: skip
        affine = [] if by_group else [("Mul", gamma, 1.0), ("Add", beta, 0.0)]
        affine = [(op, values) for op, values, neutral in affine if np.any(values != neutral)]
        value = add("Reshape", value, outer, last=None if affine else y)
        for index, (op, values) in enumerate(affine):
            along = constant(op, values.reshape(-1, *[1] * (len(shape) - 2)), x.dtype)
            value = add(op, value, along, last=y if index + 1 == len(affine) else None)

    return change


_FRACTIONAL = "half_pixel_symmetric"  # equals half_pixel unless an extent times its scale is rounded


def _plain_resize(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """The same Resize with constant scales for every axis and without modes that change nothing here."""
    if graph.opsets[""] < 11 or node.inputs[0].shape is None:
        return None
    given = [t if t.name else None for t in (list(node.inputs) + [gs.Variable.empty()] * 3)[:4]]
    scales = _scales(graph, node, given[2])
    if scales is None or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    before, after = node.inputs[0].shape, node.outputs[0].shape or [None] * len(scales)
    whole = all(
        s == 1 or (isinstance(n, int) and isinstance(m, int) and Fraction(float(s)) * n == m)
        for s, n, m in zip(scales, before, after, strict=True)
    )
    changed: dict[str, Any] = {}
    if whole and node.attrs.get("coordinate_transformation_mode") == _FRACTIONAL:
        changed["coordinate_transformation_mode"] = "half_pixel"
    if node.attrs.get("antialias") and min(scales) >= 1:
        changed["antialias"] = 0
    spread = "axes" in node.attrs
    computed = given[3] is not None and graph.constant(given[3]) is None
    if not changed and not spread and not computed:
        return None
    if (spread or computed) and (not whole or (given[1] is not None and spread)):
        return None

    def change() -> None:
        node.attrs.update(changed)
        if spread or computed:
            node.attrs.pop("axes", None)
            values = graph.new_constant(f"{node.name}_scales", np.array(scales, np.float32))
            node.inputs = [node.inputs[0], given[1] or gs.Variable.empty(), values]

    return change


@dataclass(frozen=True)
class _Kept:
    """An extent of a tensor, by axis, as an element of a shape that is computed."""

    axis: int


def _elements(graph: Graph, shape: Tensor, of: Tensor) -> list[int | _Kept] | None:
    """The elements of a shape that is computed from constants and the extents of one tensor."""
    value, node = graph.constant(shape), graph.producer(shape)
    if value is not None:
        return value.tolist() if value.ndim == 1 else None
    if node is None or domain(node):
        return None
    if node.op == "Shape" and node.inputs[0] is of and of.shape is not None:
        axes = range(len(of.shape))
        return [_Kept(i) for i in axes[slice(node.attrs.get("start"), node.attrs.get("end"))]]
    if node.op == "Concat":
        parts = [_elements(graph, t, of) for t in node.inputs]
        return None if any(p is None for p in parts) else [e for p in parts for e in p or ()]
    if node.op in ("Cast", "Identity"):
        return _elements(graph, node.inputs[0], of)
    if node.op == "Slice" and graph.opsets[""] >= 10:
        inner = _elements(graph, node.inputs[0], of)
        starts, ends, *rest = [graph.constant(t) for t in node.inputs[1:]]
        plain = [r is not None and r.tolist() == expected for r, expected in zip(rest, ([0], [1]), strict=False)]
        if inner is None or starts is None or ends is None or not all(plain):
            return None
        return inner[int(starts[0]) : int(ends[0])]
    return None


def _scales(graph: Graph, node: gs.Node, given: Tensor | None) -> list[np.float32] | None:
    """The scale of every axis, from the constant or from the extents before and after."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    rank = len(before)
    if given is not None and (value := graph.constant(given)) is not None and value.size:
        axes = [a % rank for a in node.attrs.get("axes", range(rank))]
        known = dict(zip(axes, value.astype(np.float32), strict=True))
        return [known.get(i, np.float32(1)) for i in range(rank)]
    if after is None or len(after) != rank:
        return None
    sizes = _elements(graph, node.inputs[3], node.inputs[0]) if len(node.inputs) > 3 and rank == len(after) else None
    kept = {i for i, size in enumerate(sizes or ()) if size == _Kept(i)} if "axes" not in node.attrs else set()
    pairs = [(1, 1) if i in kept else pair for i, pair in enumerate(zip(before, after, strict=True))]
    if any(n is None or (n != m and not (isinstance(n, int) and isinstance(m, int) and n > 0)) for n, m in pairs):
        return None
    return [np.float32(1) if n == m else np.float32(m / n) for n, m in pairs]


_INT32 = np.iinfo(np.int32)


def _narrow_indices(graph: Graph, node: gs.Node) -> Callable[[], object] | None:
    """Constant INT64 indices of floating-point data as INT32."""
    value, kind = graph.constant(node.inputs[1]), node.inputs[0].dtype
    if value is None or value.dtype != np.int64 or kind is None or isinstance(kind, int):
        return None
    if np.dtype(kind).kind != "f" or np.any(value < _INT32.min) or np.any(value > _INT32.max):
        return None

    def change() -> None:
        node.inputs[1] = graph.new_constant(f"{node.name}_indices", value.astype(np.int32))

    return change


# -- the tables --------------------------------------------------------------------------------------------------------

_UNFUSED = (
    Rule(("BiasGelu", "FastGelu", "Gelu"), _CONTRIB, "decompose Gelu", "no operator of com.microsoft stays", _gelu),
    Rule(("QuickGelu",), _CONTRIB, "decompose QuickGelu", "no operator of com.microsoft stays", _quick_gelu),
    Rule(("FusedMatMul",), _CONTRIB, "decompose FusedMatMul", "no operator of com.microsoft stays", _fused_matmul),
    Rule(("FusedConv",), _CONTRIB, "decompose FusedConv", "no operator of com.microsoft stays", _fused_conv),
    Rule(
        ("SkipLayerNormalization",), _CONTRIB, "decompose SkipLayerNormalization",
        "no operator of com.microsoft stays; Relax takes this one only with both beta and bias",
        _skip_layer_norm,
    ),
)  # fmt: skip

_LOCAL = Rule(
    (), "", "replace a local function by its body",
    "the target has no kernel for it, and inlines nothing or leaves the decoding of weights to run time",
    inlined,
)  # fmt: skip

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
        *_UNFUSED,
    ),
    "trt": (
        Rule(
            ("Reshape",), "", "write out the shape of Reshape",
            "a shape that is computed at run time keeps the builder from fusing across it",
            _placeholder_reshape,
        ),
        Rule(
            ("Add", "Div", "Mul", "Sub"), "", "drop a leading axis of 1 that holds for one operator only",
            "the two Reshapes keep the operator from being fused with what is around them",
            _leading_axis,
        ),
        Rule(
            ("Transpose",), "", "split before the Transpose that brings an axis to the front",
            "the Transpose has an axis more than the four that every kernel takes",
            _split_first,
        ),
        Rule(
            _SHUFFLES, "", "shuffle at once, over the fewest axes",
            "each Transpose is a pass over memory, and one of more than four axes runs in a generic kernel",
            _shuffle,
        ),
        Rule(
            ("GroupNormalization",), "", "write GroupNormalization as InstanceNormalization",
            "with one group the parser normalises each channel by itself (issue 4756), and before 10.9 it lacks the "
            "operator of opset 21 (issue 4336); InstanceNormalization, which torch exports, is right in every version",
            _group_normalization,
        ),
        Rule(
            ("Clip",), "", "write Clip as Max and Min",
            "a computed bound or an integer is no activation; after a linear layer a Clip from 0 loses its upper "
            "bound (issue 4606, seen in 10.12 and 10.13)",
            _clip,
        ),
        Rule(
            ("Resize",), "", "write out the scales of Resize, drop modes that change nothing",
            "the parser takes scales of all axes only, no antialiasing and no half_pixel_symmetric",
            _plain_resize,
        ),
        Rule(
            ("Gather", "GatherElements", "ScatterElements"), "", "narrow constant indices to INT32",
            "INT64 indices cost twice the memory traffic, and before TensorRT 10 they were clamped with a warning",
            _narrow_indices,
        ),
        Rule(
            ("AffineGrid", "CenterCropPad", "Swish"), "", "replace an operator by its definition",
            "the parser lacks it; Swish before 11.0 only",
            _definition,
        ),
        *_UNFUSED,
    ),
}  # fmt: skip
