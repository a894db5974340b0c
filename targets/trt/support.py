"""What TensorRT's ONNX parser takes, per version: operators, element types and opsets. Data only.

Sources: docs/operators.md and docs/Changelog.md of github.com/onnx/onnx-tensorrt. The table is that of 10.15, taken for
10.16 too, of which none was to be had; for 10.3 what the change log adds since is taken off. The operators that 11 adds
are those of the release notes of 11.0 (Swish) and 11.2 (DFT, GridSample of volumes); those of 11.3 and 11.4 name none.
The opsets are those of the tables of 10.0, 10.15 and 11.2 and of the release notes of 11.5.

Restrictions that depend on a node's attributes and shapes are in :mod:`edgecompile.targets.trt.preflight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

VERSIONS = ("10.3", "10.16", "11.4")
"""The versions that edgecompile is checked against."""

OPSETS: Mapping[str, tuple[int, int]] = {"10.3": (9, 20), "10.15": (9, 24), "11.5": (9, 25)}
"""Least and largest opset since a version."""

MAX_RANK = 8  # Dims::MAX_DIMS

_FLOAT = "FLOAT FLOAT16 BFLOAT16"
_NUMBER = f"{_FLOAT} INT32 INT64"
_ANY = f"{_NUMBER} BOOL"
_QUANTIZED = "FLOAT8E4M3FN FLOAT4E2M1 INT4"

_TABLE = {
    _FLOAT: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
        CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization GRU
        HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log
        LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu
        QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization
        RNN RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh
        ThresholdedRelu Upsample DFT""",
    _NUMBER: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg
        Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    _ANY: """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence
        Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    "FLOAT FLOAT16": """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign""",
    f"{_ANY} {_QUANTIZED}": "Constant ConstantOfShape",
    f"{_ANY} UINT8": "Cast CastLike",
    f"{_NUMBER} INT8": "Gelu",
    f"{_NUMBER} FLOAT8E4M3FN": "Mean",
    f"{_FLOAT} INT8 FLOAT8E4M3FN": "Attention",
    f"{_FLOAT} INT32": "TensorScatter",
    f"INT8 {_QUANTIZED}": "DequantizeLinear",
    "FLOAT": "STFT",
    "BOOL": "And Not Or Xor",
}
OPERATORS: Mapping[str, frozenset[str]] = {
    op: frozenset(types.split()) for types, ops in _TABLE.items() for op in ops.split()
}
"""Operator -> names of ``onnx.TensorProto.DataType`` that its data may have; the others are not supported."""

SINCE: Mapping[str, tuple[int, int]] = {
    "BlackmanWindow": (10, 4),
    "HammingWindow": (10, 4),
    "HannWindow": (10, 4),
    "STFT": (10, 5),
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
    "DFT": (11, 2),
}
"""The version that added an operator, where that is after 10.3."""

TYPES_SINCE: Mapping[str, tuple[int, int]] = {"FLOAT4E2M1": (10, 8)}

PLUGINS = frozenset(
    {"EfficientNMS_TRT", "EfficientNMS_Explicit_TF_TRT", "EfficientNMS_Implicit_TF_TRT", "EfficientNMS_ONNX_TRT"}
    | {"ROIAlign_TRT", "ModulatedDeformConv2d", "InstanceNormalization_TRT"}
)
"""Plugins in libnvinfer_plugin that a node may name directly."""

ADVICE: Mapping[str, str] = {
    "DynamicQuantizeLinear": "quantize statically: calibrate the model and place QuantizeLinear and DequantizeLinear",
    "ConvInteger": "express it as DequantizeLinear, Conv and QuantizeLinear",
    "MatMulInteger": "express it as DequantizeLinear, MatMul and QuantizeLinear",
    "QLinearConv": "express it as DequantizeLinear, Conv and QuantizeLinear",
    "QLinearMatMul": "express it as DequantizeLinear, MatMul and QuantizeLinear",
    "Swish": "write x * sigmoid(x), or export with an opset below 24",
    "Attention": "export with an opset below 23, which writes MatMul and Softmax",
    "RMSNormalization": "export with an opset below 23, which writes it out",
    "RotaryEmbedding": "export with an opset below 23, which writes it out",
    "Unique": "move it out of the model, its output has no static bound",
    "Compress": "use Gather with indices that are known, or Where",
    "MaxUnpool": "use Resize or ConvTranspose",
    "AffineGrid": "compute the grid outside the model, or write it as MatMul",
    "Col2Im": "use ConvTranspose with a constant identity kernel",
    "CenterCropPad": "use Slice and Pad",
    "BitShift": "use Mul or Div by powers of two",
}
"""What helps where an operator is not supported."""


def version_numbers(version: str) -> tuple[int, int]:
    """Major and minor number of a version, e.g. ``(10, 3)`` for ``10.3.0``."""
    major, minor = (*re.findall(r"\d+", version), "0")[:2]
    return int(major), int(minor)


def opset_range(version: str) -> tuple[int, int]:
    """The opsets that the parser of a version takes: the entry of :data:`OPSETS` at or before it, else the first."""
    wanted = version_numbers(version)
    older = [opsets for since, opsets in OPSETS.items() if version_numbers(since) <= wanted]
    return older[-1] if older else next(iter(OPSETS.values()))
