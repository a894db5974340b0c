"""What one node computes from constants: the types of its outputs, what the evaluation costs, and the values.

Types and cost are known before anything is computed, so that a small file cannot ask for a large computation
(``ConstantOfShape`` of 2^40 elements). No runtime is needed: shapes come from ONNX's own inference, values from the
implementations in ``onnx.reference``. These serve the current operator set; :data:`RULES` says from which opset on they
are right for a node, and an operator without a rule is not evaluated. The few that are slow or inexact there are
written here in NumPy (:data:`_OWN`).

What is never evaluated: random operators, control flow, local functions and foreign domains, sequences, strings, and
types narrower than a byte or with 8-bit floats, which say in which precision a network is meant to run, as do
QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ops as reference
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

UNKNOWN = -(1 << 62)
"""Stands for a dimension that is not known in the value of a shape, e.g. ``[UNKNOWN, 3, 224, 224]``."""

LONGEST = 1024
"""Elements of the longest value that may hold :data:`UNKNOWN`."""

_READ = 64  # inputs of up to so many elements are looked at by shape inference
_SANE = 1 << 40  # a larger size, count or repetition is an attack or a mistake, and could overflow an inference rule
_HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_NUMPY = {
    getattr(onnx.TensorProto, name): np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
        "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
        "FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16, "FLOAT": np.float32, "DOUBLE": np.float64,
    }.items()
}  # fmt: skip


class Unfoldable(Exception):
    """Why a node is not evaluated; caught by the pass that asked."""


@dataclass(frozen=True)
class TensorType:
    """Element type (ONNX number, 0 if unknown) and dimensions (None for an unknown rank) of a tensor."""

    dtype: int = 0
    shape: tuple[int | str | None, ...] | None = None

    @property
    def static(self) -> bool:
        """Whether type and every dimension are known, and values of it can be computed here."""
        return self.dtype in _NUMPY and self.shape is not None and all(isinstance(d, int) for d in self.shape)

    @property
    def elements(self) -> int:
        """Number of elements of a static type."""
        return math.prod(self.shape or ())  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of a static type."""
        return self.elements * _NUMPY[self.dtype].itemsize

    def holds(self, value: np.ndarray) -> bool:
        """Whether an array is of this type; unknown dimensions may be any."""
        if value.dtype != _NUMPY.get(self.dtype):
            return False
        if self.shape is None or len(self.shape) != value.ndim:
            return self.shape is None
        return all(d == n for d, n in zip(self.shape, value.shape, strict=True) if isinstance(d, int))


@functools.cache
def _number(dtype: np.dtype) -> int:
    try:
        return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    except (KeyError, ValueError, TypeError):
        return 0


def type_of(array: np.ndarray) -> TensorType:
    """The type of an array."""
    return TensorType(_number(array.dtype), tuple(array.shape))


def describe(node: gs.Node) -> onnx.NodeProto:
    """A node without the names of its tensors: equal nodes have equal descriptions.

    Raises:
        Unfoldable: an attribute cannot be written.
    """
    try:
        attributes = OnnxExporter.export_attributes(dict(sorted(node.attrs.items())))
    except Exception as error:  # graphsurgeon and onnx raise whatever they meet
        raise Unfoldable(f"its attributes cannot be read: {error}") from None
    return onnx.NodeProto(
        op_type=node.op,
        domain="" if node.domain in (None, "ai.onnx") else node.domain,
        input=[f"i{i}" if t.name else "" for i, t in enumerate(node.inputs)],
        output=[f"o{i}" if t.name else "" for i, t in enumerate(node.outputs)],
        attribute=attributes,
    )


# -- types -----------------------------------------------------------------------------------------------------------


def infer(
    proto: onnx.NodeProto, types: Sequence[TensorType], values: Sequence[np.ndarray | None], opset: int
) -> list[TensorType]:
    """The types of a node's outputs, unknown where they cannot be proved.

    Args:
        proto: a :func:`describe`-d node of the default domain.
        types: of its inputs; an omitted input's is ignored.
        values: of its inputs, where known; shapes may hold :data:`UNKNOWN`.
        opset: of the default domain.
    """
    unknown = [TensorType()] * len(proto.output)
    given = {name: (t, v) for name, t, v in zip(proto.input, types, values, strict=True) if name}
    if any(not t.dtype for t, _ in given.values()):
        return unknown
    small = {n: v for n, (_, v) in given.items() if v is not None and v.size <= _READ and v.dtype.kind in "iuf"}
    if proto.op_type in _PARTIAL and values[-1] is not None and has_unknown(values[-1]):
        return [_PARTIAL[proto.op_type](_attributes(proto), types[0], values[-1].tolist())]
    if proto.op_type in _GROWING and any(not (np.abs(v.astype(float)) < _SANE).all() for v in small.values()):
        return unknown
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(proto.op_type, opset, ""),
            proto,
            {name: _type_proto(t) for name, (t, _) in given.items()},
            {n: onnx.numpy_helper.from_array(v) for n, v in small.items() if not has_unknown(v)},
            opset_imports=[onnx.helper.make_opsetid("", opset)],
        )
    except Exception:  # the inference of a malformed node raises what it likes: nothing is known of its outputs
        return unknown
    found = [_type(inferred[name]) if name in inferred else TensorType() for name in proto.output]
    if proto.op_type == "Range" and len(small) == 3:
        count = _range_length(*(float(v.reshape(-1)[0]) for v in small.values()))
        found = [TensorType(found[0].dtype, None if count is None else (count,))]
    return found


def has_unknown(value: np.ndarray) -> bool:
    """Whether the value of a shape has dimensions that are not known."""
    return value.dtype == np.int64 and value.size <= LONGEST and bool((value == UNKNOWN).any())


def _type_proto(kind: TensorType) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(kind.dtype, kind.shape)


def _type(proto: onnx.TypeProto) -> TensorType:
    if not proto.HasField("tensor_type"):
        return TensorType()
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return TensorType(tensor.elem_type)
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return TensorType(tensor.elem_type, None if any(isinstance(d, int) and d < 0 for d in dims) else dims)


def _range_length(start: float, limit: float, delta: float) -> int | None:
    if not (delta and all(map(math.isfinite, (start, limit, delta)))):
        return None
    count = (limit - start) / delta
    return max(math.ceil(count), 0) if abs(count) < _SANE else None


def _reshaped(attrs: dict[str, Any], data: TensorType, shape: list[int]) -> TensorType:
    source = () if attrs.get("allowzero") else data.shape or ()
    dims = [d if d > 0 else source[i] if d == 0 and i < len(source) else None for i, d in enumerate(shape)]
    return TensorType(data.dtype, tuple(dims))  # -1 is whatever is left


def _expanded(_: dict[str, Any], data: TensorType, shape: list[int]) -> TensorType:
    if data.shape is None:
        return TensorType(data.dtype)
    rank = max(len(data.shape), len(shape))
    pairs = zip((1,) * (rank - len(data.shape)) + data.shape, [1] * (rank - len(shape)) + shape, strict=True)
    dims = [d if s == 1 or (isinstance(d, int) and d > 1) else s if s > 1 else None for d, s in pairs]
    return TensorType(data.dtype, tuple(dims))


def _filled(attrs: dict[str, Any], _: TensorType, shape: list[int]) -> TensorType:
    dtype = _number(attrs["value"].dtype) if "value" in attrs else int(onnx.TensorProto.FLOAT)
    return TensorType(dtype, tuple(None if d == UNKNOWN else d for d in shape))


_PARTIAL = {"Reshape": _reshaped, "Expand": _expanded, "ConstantOfShape": _filled}
_GROWING = {"ConstantOfShape", "Expand", "OneHot", "Pad", "Resize", "Tile", "HannWindow", "HammingWindow",
            "BlackmanWindow"}  # fmt: skip


# -- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How an operator may be evaluated.

    Attributes:
        since: the first opset for which the implementation is right.
        weight: scalar operations per element of inputs and outputs.
        moves: elements are only moved, or converted one by one; otherwise half precision is computed in float32.
    """

    since: int
    weight: int
    moves: bool


_TABLE: tuple[tuple[int, int, bool, str], ...] = (
    (1, 1, True, "Compress DepthToSpace Flatten Gather GatherND Identity ReverseSequence ScatterND Slice SpaceToDepth "
                 "Squeeze Transpose Trilu Unsqueeze ConstantOfShape EyeLike NonZero Where Not"),
    (2, 1, True, "Pad Split"),
    (4, 1, True, "Concat"),
    (5, 1, True, "Reshape"),
    (6, 1, True, "Cast Tile"),
    (8, 1, True, "Expand"),
    (11, 4, True, "GatherElements OneHot ScatterElements"),
    (6, 4, False, "Abs Ceil Clip Elu Exp Floor HardSigmoid LeakyRelu Log Neg Reciprocal Relu Selu Sigmoid Sqrt Tanh"),
    (7, 8, False, "Acos Acosh Asin Asinh Atan Atanh Celu Cos Cosh Round Shrink Sign Sin Sinh Softplus Softsign Tan "
                  "ThresholdedRelu IsInf IsNaN BitwiseNot"),
    (9, 100, False, "Erf"),
    (7, 1, False, "Add And Div Equal Greater Less Mul Or Pow Sub Xor"),
    (8, 2, False, "Max Mean Min Sum BitwiseAnd BitwiseOr BitwiseXor BitShift GreaterOrEqual LessOrEqual Mod"),
    (1, 4, False, "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
                  "ReduceSumSquare GlobalAveragePool GlobalMaxPool"),
    (11, 8, False, "CumSum Range ArgMax ArgMin"),
    (13, 16, False, "Softmax LogSoftmax Hardmax LayerNormalization RMSNormalization"),
    (10, 100, False, "TopK"),
    (7, 1, False, "Gemm MatMul"),
    (13, 2000, False, "Resize"),
    (17, 16, False, "BlackmanWindow HammingWindow HannWindow"),
)  # fmt: skip

RULES = {op: Rule(since, weight, moves) for since, weight, moves, names in _TABLE for op in names.split()}
"""Operators that can be evaluated. Before opset 7 arithmetic broadcast by attribute, before 13 Softmax was 2-D, etc."""

DATA_DEPENDENT = {"Compress", "NonZero"}
"""Operators whose output shape depends on values; at most 8 bytes times rank for each element of the first input."""

VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators whose output shares the memory of their input."""


def rule_for(proto: onnx.NodeProto, opset: int) -> Rule:
    """The rule for a node.

    Raises:
        Unfoldable: there is none.
    """
    rule = None if proto.domain else RULES.get(proto.op_type)
    if rule is None:
        raise Unfoldable("there is no rule to evaluate it")
    if opset < rule.since:
        raise Unfoldable(f"opset {opset} defines it differently from opset {rule.since}")
    return rule


def work_of(proto: onnx.NodeProto, inputs: Sequence[TensorType], outputs: Sequence[TensorType], opset: int) -> int:
    """Estimated scalar operations (about a nanosecond each) of an evaluation, from static types.

    Raises:
        Unfoldable: there is no rule for the operator.
    """
    weight = rule_for(proto, opset).weight
    if proto.op_type == "MatMul":
        return outputs[0].elements * (inputs[0].shape or (1,))[-1]  # type: ignore[return-value]
    if proto.op_type == "Gemm":
        return inputs[0].elements * (outputs[0].shape or (1,))[-1]  # type: ignore[return-value]
    return weight * sum(t.elements for t in (*inputs, *outputs))


# -- values ----------------------------------------------------------------------------------------------------------


def evaluate(
    proto: onnx.NodeProto, values: Sequence[np.ndarray | None], outputs: Sequence[TensorType], opset: int
) -> list[np.ndarray]:
    """Compute a node.

    Args:
        proto: a :func:`describe`-d node.
        values: of its inputs, None for an omitted one; never changed, but a result may be a view of one.
        outputs: the types that :func:`infer` found; a result of another type is refused.
        opset: of the default domain.

    Raises:
        Unfoldable: there is no rule, the evaluation fails, or it meets a value for which runtimes disagree or that is
            not finite by accident: overflow, division by zero, a conversion out of range.
    """
    rule = rule_for(proto, opset)
    wide = [None if v is None else _frozen(v) for v in values]
    if not rule.moves:  # runtimes accumulate half precision in float32; for a single operation it makes no difference
        wide = [v.astype(np.float32) if v is not None and type_of(v).dtype in _HALF else v for v in wide]
    _refuse_undefined(proto, values, outputs)
    try:
        with np.errstate(all="raise", under="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error")
            if proto.op_type in _OWN:
                results: Any = _OWN[proto.op_type](_attributes(proto), *wide)
            else:
                implementation = reference.load_op("", proto.op_type, opset)
                results = implementation(proto, _RUN).run(*wide)
            results = [np.asarray(r) for r in (results if isinstance(results, tuple) else (results,))]
            if not rule.moves:
                results = [
                    r.astype(_NUMPY[t.dtype]) if t.dtype in _HALF else r for r, t in zip(results, outputs, strict=False)
                ]
    except Exception as error:  # NumPy and onnx.reference raise whatever they meet
        raise Unfoldable(f"evaluating it fails: {' '.join(str(error).split())[:200]}") from None
    results = results[: len(outputs)]
    if len(results) < len(outputs) or not all(
        t.holds(r) for r, t, name in zip(results, outputs, proto.output, strict=True) if name
    ):
        raise Unfoldable("its value is not of the type that ONNX infers")
    return results


_RUN: dict[str, Any] = {"log": lambda *_: None, "opsets": {"": 1}, "verbose": 0, "new_ops": None}


def _frozen(value: np.ndarray) -> np.ndarray:
    view = value.view()
    view.flags.writeable = False
    return view


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    found = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
    return {k: onnx.numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for k, v in found.items()}


def _refuse_undefined(
    proto: onnx.NodeProto, values: Sequence[np.ndarray | None], outputs: Sequence[TensorType]
) -> None:
    """Refuse what C++ leaves undefined and NumPy computes silently."""
    first = values[0] if values else None
    if any(a.name == "broadcast" for a in proto.attribute):
        raise Unfoldable("it broadcasts by attribute")
    target = _NUMPY.get(outputs[0].dtype)
    if first is None or target is None or target.kind not in "iu" or not first.size:
        return
    limits = np.iinfo(target)
    if proto.op_type == "Cast" and first.dtype.kind not in "biu":
        low, high = float(first.min()), float(first.max())
        if not (limits.min <= low and high < float(limits.max) + 1):  # also so for NaN
            raise Unfoldable("it converts a number to an integer type that cannot hold it")
    if proto.op_type == "Pow" and values[1] is not None:
        with np.errstate(all="ignore"):
            size = np.abs(np.power(first.astype(float), values[1].astype(float)))
        if not ((values[1] >= 0).all() and (size <= min(limits.max, 1 << 53)).all()):
            raise Unfoldable("it raises an integer to a power that its type cannot hold")


def _scatter(data: np.ndarray, where: Any, updates: np.ndarray, reduction: bytes) -> np.ndarray:
    result = data.copy()
    if reduction == b"none":
        result[where] = updates
    else:
        {b"add": np.add, b"mul": np.multiply, b"max": np.maximum, b"min": np.minimum}[reduction].at(
            result, where, updates
        )
    return result


def _tuples(indices: np.ndarray) -> tuple:
    if not indices.shape[-1]:
        raise ValueError("empty index tuples")
    return tuple(np.moveaxis(indices, -1, 0))


def _along(indices: np.ndarray, axis: int) -> tuple:
    grid: list[Any] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = indices
    return tuple(grid)


def _gather_nd(attrs: dict[str, Any], data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    batch = np.indices(indices.shape[:-1], sparse=True)[: attrs.get("batch_dims", 0)]
    return data[(*batch, *_tuples(indices))]


def _expand(_: dict[str, Any], data: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(map(int, shape)))).copy()


def _one_hot(attrs: dict[str, Any], indices: np.ndarray, depth: np.ndarray, values: np.ndarray) -> np.ndarray:
    size, axis = int(depth.reshape(-1)[0]), attrs.get("axis", -1)
    indices = np.expand_dims(np.where(indices < 0, indices + size, indices), axis)
    counts = np.arange(size).reshape([-1 if i == axis % indices.ndim else 1 for i in range(indices.ndim)])
    return np.where(indices == counts, values[1], values[0])


_OWN: dict[str, Callable[..., np.ndarray]] = {
    "Expand": _expand,
    "GatherElements": lambda attrs, data, indices: data[_along(indices, attrs.get("axis", 0))],
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "ScatterElements": lambda attrs, data, indices, updates: _scatter(
        data, _along(indices, attrs.get("axis", 0)), updates, attrs.get("reduction", b"none")
    ),
    "ScatterND": lambda attrs, data, indices, updates: _scatter(
        data, _tuples(indices), updates, attrs.get("reduction", b"none")
    ),
}
