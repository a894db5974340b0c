"""Which nodes of a graph TensorRT's ONNX parser will refuse, and what would help, without TensorRT.

Every problem is found at once and named by torch module path. The rules are the parser's published restrictions, see
:mod:`edgecompile.targets.trt.support`; what they cannot know, such as a kernel that exists for no GPU, the parser and
the builder will say. The rules of strongly typed networks are in :mod:`edgecompile.targets.trt.strong_typing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompile.errors import InputError
from edgecompile.functions import CODED
from edgecompile.graph import Graph, Tensor, where
from edgecompile.targets.trt import shift_add
from edgecompile.targets.trt.probe import PLUGINS_SINCE, no_plugins
from edgecompile.targets.trt.support import (
    ADVICE,
    MAX_RANK,
    OPERATORS,
    PLUGINS,
    SINCE,
    TYPES_SINCE,
    opset_range,
    version_numbers,
)

_DEFAULT = ("", "ai.onnx", None)
_TYPED_BY_OUTPUT = (
    *("Constant", "ConstantOfShape", "EyeLike", "OneHot", "RandomNormal", "RandomUniform"),
    *("BlackmanWindow", "HammingWindow", "HannWindow"),
)
_INTEGERS = ("BOOL", "INT4", "INT8", "INT16", "INT32", "INT64", "UINT4", "UINT8", "UINT16", "UINT32", "UINT64")
_TYPE_ADVICE = {
    ("DequantizeLinear", "INT32"): "keep biases in floating point",
    ("DequantizeLinear", "UINT8"): "quantize to INT8, symmetrically",
}
_UNFOLDED = (
    "DequantizeLinear",
    "QuantizeLinear",
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)
_SHOWN = 12  # in one error message; all are in the list


@dataclass(frozen=True)
class Problem:
    """One reason why TensorRT refuses a graph.

    Attributes:
        place: the node, by torch module path (see :func:`edgecompile.graph.where`), or what is wrong as a whole.
        why: the reason.
        fix: what would help.
        node: name of the ONNX node, ``""`` if the problem is not one node's.
        fatal: False if TensorRT builds an engine all the same, but a slower one.
    """

    place: str
    why: str
    fix: str = ""
    node: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.why}" + (f" ({self.fix})" if self.fix else "")


@dataclass(frozen=True)
class View:
    """A graph as the rules see it: with shapes and types inferred.

    Attributes:
        graph: the graph.
        version: major and minor number of TensorRT.
        opset: of the default domain, 0 if no node is in it.
        fixed: ids of the nodes that depend on no input of the model.
    """

    graph: Graph
    version: tuple[int, int]
    opset: int
    fixed: frozenset[int] = frozenset()

    @classmethod
    def of(cls, graph: Graph | View, version: str) -> View:
        """A view of a copy of ``graph`` with shapes inferred, or the same view for another version."""
        if isinstance(graph, View):
            return replace(graph, version=version_numbers(version))
        inferred = graph.copy()
        inferred.infer_shapes(outputs=True)
        fixed: set[int] = set()
        for node in inferred.nodes:
            parts = [p for t in node.inputs if not isinstance(t, gs.Constant) and t.name for p in t.inputs or [None]]
            if node.op not in _UNFOLDED and all(id(p) in fixed for p in parts):
                fixed.add(id(node))
        return cls(inferred, version_numbers(version), inferred.opsets.get("", 0), frozenset(fixed))

    def constant(self, node: gs.Node, index: int) -> np.ndarray | None:
        """The value of an input, if it is given and constant."""
        return self.graph.constant(node.inputs[index]) if given(node, index) else None

    def varies(self, node: gs.Node, index: int) -> bool:
        """True if an input is given and not constant."""
        return given(node, index) and self.constant(node, index) is None

    def used(self, node: gs.Node, index: int) -> bool:
        """True if something reads an output."""
        tensor = node.outputs[index] if len(node.outputs) > index else None
        return tensor is not None and bool(tensor.name) and (bool(tensor.outputs) or self.graph.is_output(tensor))


def given(node: gs.Node, index: int) -> bool:
    """True if an optional input is there."""
    return len(node.inputs) > index and bool(node.inputs[index].name)


def rank(tensor: Tensor) -> int | None:
    """Number of dimensions, None if unknown."""
    return None if tensor.shape is None else len(tensor.shape)


def type_name(tensor: Tensor) -> str:
    """Name of the element type as in ``onnx.TensorProto.DataType``, ``""`` if unknown."""
    dtype = getattr(tensor, "export_dtype", None) or tensor.dtype
    if dtype is None:
        return ""
    number = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.TensorProto.DataType.Name(number) if number else ""


def check(graph: Graph | View, version: str) -> list[Problem]:
    """Every problem that the parser of a version of TensorRT has with a graph, in the graph's order.

    Args:
        graph: the graph, which is not changed; a view of it saves inferring its shapes again.
        version: of TensorRT, e.g. ``10.3.0``.

    Raises:
        InputError: types or shapes of the graph contradict one another.
    """
    view = View.of(graph, version)
    return [*_whole(view, version), *(p for node in view.graph.walk() for p in _node(view, node))]


def require(problems: Sequence[Problem], version: str, count: int) -> None:
    """Raise one error that lists all fatal problems.

    Args:
        problems: what was found.
        version: of TensorRT.
        count: nodes of the graph.

    Raises:
        InputError: one of the problems is fatal.
    """
    fatal = [p for p in problems if p.fatal]
    if not fatal:
        return
    shown = [str(p) for p in fatal[:_SHOWN]]
    if len(fatal) > _SHOWN:
        shown.append(f"and {len(fatal) - _SHOWN} more")
    nodes = len({p.node for p in fatal if p.node})
    what = f"{nodes} of {count} nodes" if nodes else "the model"
    raise InputError(f"TensorRT {version} cannot take {what}", "; ".join(shown))


# -- the model as a whole ----------------------------------------------------------------------------------------------


def _whole(view: View, version: str) -> Iterator[Problem]:
    least, most = opset_range(version)
    if view.opset and not least <= view.opset <= most:
        fix = f"export with opset {most}" if view.opset > most else f"export again with opset {least} or later"
        yield Problem("the model", f"opset {view.opset}, the parser takes {least} to {most}", fix)
    for tensor in [*view.graph.inputs, *view.graph.outputs]:
        if type_name(tensor) in ("STRING", "COMPLEX64", "COMPLEX128", "UINT16", "UINT32", "UINT64", "INT16"):
            yield Problem(
                f"the tensor {tensor.name!r}", f"TensorRT has no {type_name(tensor)}", "convert it outside the model"
            )
    for function in view.graph.function_protos:
        if function.domain == shift_add.NAMESPACE:  # the parser takes the plugin first
            continue
        for node in function.node:
            reason = _unsupported(view, node.op_type) if node.domain in _DEFAULT else None
            if reason:
                yield Problem(f"the local function {function.name}", *reason)


# -- one node ----------------------------------------------------------------------------------------------------------


def _node(view: View, node: gs.Node) -> Iterator[Problem]:
    for why, fix in _reasons(view, node):
        if id(node) in view.fixed:
            fix = "it depends on constants only, the pass clean folds it"
        yield Problem(where(node), why, fix, node.name or node.outputs[0].name)


def _reasons(view: View, node: gs.Node) -> Iterator[tuple[str, str]]:
    if node.domain == shift_add.NAMESPACE and node.op in CODED:
        if view.version < PLUGINS_SINCE:
            broken = no_plugins(".".join(map(str, view.version)))
            yield broken.why, broken.fix
        return
    if node.domain not in _DEFAULT or node.op in PLUGINS - OPERATORS.keys():
        functions = {(f.domain, f.name) for f in view.graph.function_protos}
        if node.op not in PLUGINS and (node.domain or "", node.op) not in functions:
            yield f"the parser knows no operator {node.op} of the domain {node.domain or 'ai.onnx'}", "write a plugin"
        return
    unsupported = _unsupported(view, node.op)
    if unsupported:
        yield unsupported
        return
    for tensor in [*node.inputs, *node.outputs]:
        if (rank(tensor) or 0) > MAX_RANK:
            yield f"{tensor.name!r} has {rank(tensor)} dimensions, {MAX_RANK} are allowed", "merge dimensions"
    yield from _types(view, node)
    for rule in _RULES.get(node.op, ()):
        broken = rule(view, node)
        if broken:
            yield broken


def _unsupported(view: View, op: str) -> tuple[str, str] | None:
    if op not in OPERATORS:
        return f"the parser does not support {op}", ADVICE.get(op, "replace it, or write a plugin")
    since = SINCE.get(op, (0, 0))
    if view.version < since:
        return f"the parser supports {op} since TensorRT {since[0]}.{since[1]}", ADVICE.get(op, "use a later TensorRT")
    return None


def _types(view: View, node: gs.Node) -> Iterator[tuple[str, str]]:
    """Element types of the data that a node works on; indices, shapes and axes have types of their own."""
    allowed = {t for t in OPERATORS[node.op] if view.version >= TYPES_SINCE.get(t, (0, 0))} | {"DOUBLE"}
    for tensor in _data(view, node):
        name = type_name(tensor)
        if name and name not in allowed:
            fix = next((f"cast to {t} before and back after" for t in ("INT32", "FLOAT") if t in allowed), "")
            if name not in _INTEGERS:
                fix = ""
            fix = _TYPE_ADVICE.get((node.op, name), fix)
            yield f"{node.op} takes no {name}", fix
            return


def _data(view: View, node: gs.Node) -> Iterator[Tensor]:
    if node.op in _TYPED_BY_OUTPUT:
        yield node.outputs[0]
        return
    if node.op in ("Cast", "CastLike"):
        yield from (node.inputs[0], node.outputs[0])
        return
    first = 1 if node.op == "Where" else 0
    try:
        schema = onnx.defs.get_schema(node.op, view.opset)
    except onnx.defs.SchemaError:
        yield from node.inputs[:1]
        return
    formal = schema.inputs
    if not formal or not node.inputs:
        return
    kind = formal[min(first, len(formal) - 1)].type_str
    for index, tensor in enumerate(node.inputs):
        if tensor.name and formal[min(index, len(formal) - 1)].type_str == kind:
            yield tensor


# -- restrictions by operator ------------------------------------------------------------------------------------------

Rule = Callable[[View, gs.Node], "tuple[str, str] | None"]


def _constant(index: int, what: str, fix: str = "make it a constant") -> Rule:
    def rule(view: View, node: gs.Node):
        return (f"{what} must be a constant", fix) if view.varies(node, index) else None

    return rule


def _before(version: tuple[int, int], inner: Rule) -> Rule:
    """A restriction that a later version lifted."""
    return lambda view, node: inner(view, node) if view.version < version else None


def _ranks(least: int, most: int, what: str, fix: str = "") -> Rule:
    def rule(view: View, node: gs.Node):
        found = rank(node.inputs[0])
        return None if found is None or least <= found <= most else (f"{what}, here of rank {found}", fix)

    return rule


def _attribute(name: str, default, allowed: Iterable, fix: str = "") -> Rule:
    allowed = tuple(allowed)

    def rule(view: View, node: gs.Node):
        value = node.attrs.get(name, default)
        return None if value in allowed else (f"{name}={value}, the parser takes {', '.join(map(str, allowed))}", fix)

    return rule


def _no_dilation(view: View, node: gs.Node):
    dilated = any(d != 1 for d in node.attrs.get("dilations") or ())
    return ("dilations must be 1", "use a convolution, or pool on slices") if dilated else None


def _no_output(index: int, what: str) -> Rule:
    return lambda view, node: (
        (f"the output {what} is not supported", "leave it out") if view.used(node, index) else None
    )


def _no_input(index: int, what: str) -> Rule:
    broken = f"the input {what} is not supported", "leave it out"
    return lambda view, node: broken if given(node, index) else None


def _zero_point(view: View, node: gs.Node):
    if not given(node, 2):
        return None
    value = view.constant(node, 2)
    if value is None:
        return "the zero point must be a constant", "calibrate symmetrically"
    return ("the zero point must be 0", "quantize symmetrically") if np.any(value.astype(np.float32)) else None


def _inference_only(view: View, node: gs.Node):
    if not given(node, 2):
        return None
    value = view.constant(node, 2)
    return None if value is not None and not value.any() else ("training_mode must be false", "export in eval mode")


def _top_k(view: View, node: gs.Node):
    k = view.constant(node, 1)
    if k is not None and int(k.reshape(-1)[0]) >= 3840:
        return f"K is {int(k.reshape(-1)[0])}, it must be less than 3840", "keep fewer candidates"
    return None


def _same_activations(view: View, node: gs.Node):
    names = node.attrs.get("activations")
    if node.attrs.get("direction") != "bidirectional" or not names:
        return None
    half = len(names) // 2
    return None if names[:half] == names[half:] else ("both directions need the same activations", "")


def _symmetric_pads(view: View, node: gs.Node):
    pads = list(node.attrs.get("pads") or ())
    half = len(pads) // 2
    return (
        None if pads[:half] == pads[half:] else ("pads must be the same at both ends of an axis", "use Pad before it")
    )


def _iota_axes(view: View, node: gs.Node):
    axes = node.attrs.get("axes")
    count = rank(node.inputs[0])
    if not given(node, 2) or axes is None or count is None or list(axes) == list(range(count)):
        return None
    return "scales must be given for every axis", "drop the attribute axes and write 1 for the others"


def _resize_linear(view: View, node: gs.Node):
    mode = node.attrs.get("mode", "nearest")
    nearest = node.attrs.get("nearest_mode", "round_prefer_floor")
    known = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    return None if mode != "nearest" or nearest in known else (f"nearest_mode={nearest}", f"use {known[0]}")


def _einsum(view: View, node: gs.Node):
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "..." in equation or any(len(set(t)) != len(t) for t in terms):
        return "Einsum with an ellipsis or a diagonal needs TensorRT 10.12", "write it as Transpose and MatMul"
    return None


def _float_power(view: View, node: gs.Node):
    integers = [t for t in map(type_name, node.inputs) if t.startswith("INT")]
    return ("Pow of integers needs TensorRT 10.12", "cast to FLOAT, or multiply") if integers else None


def _opset_below(limit: int, version: str) -> Rule:
    return lambda view, node: (
        (f"{node.op} of opset {limit} needs TensorRT {version}", f"export with an opset below {limit}")
        if view.opset >= limit
        else None
    )


def _one_group(view: View, node: gs.Node):
    """Issue 4756 of NVIDIA/TensorRT: an engine is built, and its numbers are wrong."""
    wrong = "with one group the parser normalises each channel by itself"
    return (wrong, "the pass legalize writes InstanceNormalization") if node.attrs.get("num_groups") == 1 else None


def _static(view: View, node: gs.Node):
    shape = node.inputs[0].shape
    return (
        None
        if shape is None or all(isinstance(d, int) for d in shape)
        else ("its input must have static dimensions", "")
    )


def _attention_ranks(view: View, node: gs.Node):
    odd = [t.name for t in node.inputs[:4] if t.name and rank(t) not in (None, 4)]
    return (f"{odd[0]!r} must have 4 dimensions", "split the heads before it") if odd else None


_NO_STRINGS = [_attribute(name, None, (None,)) for name in ("sparse_value", "value_string", "value_strings")]
_POOL: list[Rule] = [_ranks(4, 5, "only pooling in 2 or 3 dimensions", "add a dimension of size 1"), _no_dilation]
_AXES = [_constant(1, "axes", "fold the shape arithmetic with the pass clean")]
_RNN: list[Rule] = [_same_activations]
_TRANSFORMS = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
_RULES: Mapping[str, Sequence[Rule]] = {
    "Attention": [
        _attention_ranks,
        *(_no_input(i, n) for i, n in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen"))),
        *(_no_output(i, n) for i, n in ((1, "present_key"), (2, "present_value"), (3, "qk_matmul_output"))),
        _attribute("softcap", 0.0, (0.0,)),
        _attribute("qk_matmul_output_mode", 0, (0,)),
    ],
    "AveragePool": _POOL,
    "Constant": _NO_STRINGS,
    "CumSum": [_constant(1, "axis")],
    "DeformConv": [_ranks(3, 4, "only one or two spatial dimensions"), _symmetric_pads],
    "DequantizeLinear": [_zero_point],
    "Dropout": [_inference_only],
    "Einsum": [_before((10, 12), _einsum)],
    "EyeLike": [_static],
    "GRU": _RNN,
    "GridSample": [
        _before((11, 2), _ranks(4, 4, "only GridSample of images")),
        _ranks(4, 5, "only GridSample of images and volumes"),
    ],
    "GroupNormalization": [_before((10, 9), _opset_below(21, "10.9")), _one_group],
    "LSTM": [*_RNN, _attribute("input_forget", 0, (0,)), _attribute("layout", 0, (0,))],
    "LayerNormalization": [_no_output(1, "Mean"), _no_output(2, "InvStdDev")],
    "LpPool": [_no_dilation],
    "MaxPool": [*_POOL, _no_output(1, "Indices")],
    "OneHot": [_constant(1, "depth")],
    "Pad": [_before((10, 4), _constant(3, "axes"))],
    "Pow": [_before((10, 12), _float_power)],
    "QuantizeLinear": [_zero_point],
    "RNN": _RNN,
    "Resize": [
        _attribute("mode", "nearest", ("nearest", "linear"), "use linear"),
        _attribute("coordinate_transformation_mode", "half_pixel", _TRANSFORMS, "use half_pixel"),
        _resize_linear,
        _attribute("keep_aspect_ratio_policy", "stretch", ("stretch",), "give the sizes of both axes"),
        _attribute("antialias", 0, (0,), "set antialias=False"),
        _iota_axes,
    ],
    "STFT": [_constant(1, "frame_step"), _constant(2, "window")],
    "ScatterND": [_attribute("reduction", "none", ("none",), "use ScatterElements, which can reduce")],
    "Squeeze": _AXES,
    "TensorScatter": [_ranks(4, 4, "past_cache must have 4 dimensions"), _attribute("axis", -2, (-2,))],
    "TopK": [_attribute("sorted", 1, (1,)), _top_k],
    "Unsqueeze": _AXES,
} | {
    f"Reduce{kind}": _AXES
    for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
}
