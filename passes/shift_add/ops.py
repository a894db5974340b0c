"""The operators of domain ``ai.edgecompile``, each with a body of standard operators: any ONNX runtime executes them.

A runtime that knows an operator runs its own kernel. One that does not inlines the function body; ONNX Runtime then
folds the decoding of the weights, which depends on constants only, and is left with one MatMul or Conv.

The bodies below are the specification, in the textual form of ONNX. Shapes and packing:

- ``planes``: uint8 ``[bits, rows, ceil(columns / 8)]``; bit j of byte b of plane i is bit i of the code in column
  ``8 b + j``. Rows are outputs, columns inputs.
- ``levels``: float32 ``[2^bits]``, the value of each code before scaling, each a sum of at most two powers of two.
- ``exponents`` of a book: int8 ``[rows, groups]``; a weight is ``levels[code] * 2^exponent``.
- ``exponents`` of a binary code: int8 ``[bits, rows, groups, 2]``, each twice the exponent e (from -64 to 63), plus 1
  where the term is subtracted; scale i of a group is the sum of its two terms ``±2^e``, and a weight the sum of its
  scales, scale i with a plus where bit i is set and a minus elsewhere.
- ``columns`` (attribute): inputs; ``group`` (attribute): columns that share a scale.

Source: ONNX IR specification, "Functions". The standard operators are used as they are since opset 13.
"""

from __future__ import annotations

import re
from functools import cache

import onnx
from onnx import helper, parser

from edgecompile.functions import DOMAIN
from edgecompile.graph import Graph

VERSION = 1
_FUNCTIONS_SINCE = 8  # the IR version of ONNX 1.10
OPSET = 13  # the oldest of the standard domain that the bodies are valid in

_UNPACK = """
   eight = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
   last = Constant <value_ints = [-1]> ()
   nothing = Constant <value_ints = [0]> ()
   binary = Constant <value = uint8[1] {2}> ()
   wide = Unsqueeze (planes, last)
   moved = BitShift <direction = "RIGHT"> (wide, eight)
   single = Mod (moved, binary)
   row = Constant <value_ints = [0, 0, -1]> ()
   flat = Reshape (single, row)
   column_count = Constant <value_int: int = @columns> ()
   end = Unsqueeze (column_count, nothing)
   two_axis = Constant <value_ints = [2]> ()
   bit = Slice (flat, nothing, end, two_axis)
   zero_scalar = Constant <value_int = 0> ()
   one_scalar = Constant <value_int = 1> ()
   column = Range (zero_scalar, column_count, one_scalar)
   group_size = Constant <value_int: int = @group> ()
   group_of = Div (column, group_size)
   two = Constant <value_float = 2.0> ()
"""

_BOOK = (
    _UNPACK
    + """
   shape = Shape (planes)
   bits = Gather (shape, zero_scalar)
   number = Range (zero_scalar, bits, one_scalar)
   number_float = Cast <to = 1> (number)
   place = Pow (two, number_float)
   plane_axes = Constant <value_ints = [1, 2]> ()
   place_wide = Unsqueeze (place, plane_axes)
   bit_float = Cast <to = 1> (bit)
   parts = Mul (bit_float, place_wide)
   code_float = ReduceSum <keepdims = 0> (parts, nothing)
   code = Cast <to = 7> (code_float)
   level = Gather <axis = 0> (levels, code)
   exponent = Gather <axis = 1> (exponents, group_of)
   exponent_float = Cast <to = 1> (exponent)
   scale = Pow (two, exponent_float)
   weight = Mul (level, scale)
"""
)

_BINARY = (
    _UNPACK
    + """
   coded_float = Cast <to = 1> (exponents)
   halved = Div (coded_float, two)
   exponent_float = Floor (halved)
   power = Pow (two, exponent_float)
   own = Sub (halved, exponent_float)
   four = Constant <value_float = 4.0> ()
   four_or_none = Mul (own, four)
   unity = Constant <value_float = 1.0> ()
   sign_float = Sub (unity, four_or_none)
   term = Mul (power, sign_float)
   scale = ReduceSum <keepdims = 0> (term, last)
   scale_wide = Gather <axis = 2> (scale, group_of)
   bit_float = Cast <to = 1> (bit)
   twice = Mul (bit_float, two)
   plus_minus = Sub (twice, unity)
   parts = Mul (plus_minus, scale_wide)
   weight = ReduceSum <keepdims = 0> (parts, nothing)
"""
)

_LINEAR = """
   turned = Transpose <perm = [1, 0]> (weight)
   y = MatMul (x, turned)
"""

_CONV = """
   pixel_axes = Constant <value_ints = [2, 3]> ()
   kernel = Unsqueeze (weight, pixel_axes)
   y = Conv <strides: ints = @strides> (x, kernel)
"""

# LENGTH is the Euclidean length along the last axis: ReduceL2, whose axes became an input in opset 18.
_BINARIZE = """
   last = Constant <value_ints = [-1]> ()
   q_length = LENGTH (q)
   k_length = LENGTH (k)
   q_unit = Div (q, q_length)
   k_unit = Div (k, k_length)
   q_above = Greater (q_unit, q_threshold)
   k_above = Greater (k_unit, k_threshold)
   q_binary = Cast <to = 1> (q_above)
   k_binary = Cast <to = 1> (k_above)
   k_turned = Transpose <perm: ints = @turn> (k_binary)
"""

_ANGULAR = """
   gathered = MatMul (k_turned, v)
   near = MatMul (q_binary, gathered)
   inverse_pi = Constant <value_float = 0.31830987> ()
   half = Constant <value_float = 0.5> ()
   near_part = Mul (near, inverse_pi)
   own_part = Mul (v, half)
   raw = Add (own_part, near_part)
   raw_length = LENGTH (raw)
   y = Div (raw, raw_length)
"""

_HAMMING = """
   common = MatMul (q_binary, k_turned)
   scaled = Mul (common, scale)
   score = Add (scaled, bias)
   share = Softmax <axis = -1> (score)
   y = MatMul (share, v)
"""

# name -> (attributes, inputs, body); every function gives y.
_FUNCTIONS = {
    "ShiftLinear": ("columns, group", "x, planes, exponents, levels", _BOOK + _LINEAR),
    "ShiftConv": ("columns, group, strides", "x, planes, exponents, levels", _BOOK + _CONV),
    "BinaryCodedLinear": ("columns, group", "x, planes, exponents", _BINARY + _LINEAR),
    "BinaryCodedConv": ("columns, group, strides", "x, planes, exponents", _BINARY + _CONV),
    "BinaryAngularAttention": ("turn", "q, k, v, q_threshold, k_threshold", _BINARIZE + _ANGULAR),
    "BinarySoftmaxAttention": ("turn", "q, k, v, q_threshold, k_threshold, scale, bias", _BINARIZE + _HAMMING),
}
NAMES = tuple(_FUNCTIONS)


@cache
def function(name: str, opset: int) -> onnx.FunctionProto:
    """The function of an operator, for a model of this opset: ONNX wants the same in both.

    - ``ShiftLinear``: x ``[..., columns]`` to y ``[..., rows]``, weights of a book.
    - ``ShiftConv``: x ``[N, columns, H, W]`` to y ``[N, rows, H', W']`` by a 1x1 kernel; attribute ``strides``.
    - ``BinaryCodedLinear``, ``BinaryCodedConv``: the same with binary codes.
    - ``BinaryAngularAttention``: q, k ``[..., N, d]`` and v ``[..., N, e]`` to y ``[..., N, e]``. With ``b(x)`` 1 where
      ``x / |x|`` along the last axis exceeds the threshold and 0 elsewhere, ``r = v / 2 + b(q) (b(k)^T v) / pi`` and
      ``y = r / |r|``. The products with b are additions. The thresholds broadcast against q and k.
    - ``BinarySoftmaxAttention``: ``y = softmax(scale b(q) b(k)^T + bias) v``; the product of the two is a count of
      common ones.

    The attribute ``turn`` of both exchanges the last two axes: ``[0, 2, 1]`` or ``[0, 1, 3, 2]``.

    Raises:
        KeyError: there is no such operator.
    """
    attributes, inputs, body = _FUNCTIONS[name]
    body = re.sub(r"LENGTH \((\w+)\)", r"ReduceL2 (\1, last)" if opset >= 18 else r"ReduceL2 <axes = [-1]> (\1)", body)
    return parser.parse_function(
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n{name} <{attributes}> ({inputs}) => (y) {{{body}}}'
    )


def declare(graph: Graph, name: str) -> None:
    """Give a graph the function of an operator, once, and what a model with functions must say.

    Args:
        graph: of opset 13 or newer.
        name: one of :data:`NAMES`.
    """
    if DOMAIN not in graph.opsets:
        graph.import_domains = [*graph.import_domains, helper.make_opsetid(DOMAIN, VERSION)]
    if not any(f.domain == DOMAIN and f.name == name for f in graph.function_protos):
        graph.function_protos = [*graph.function_protos, function(name, graph.opsets[""])]
    graph.ir_version = max(graph.ir_version, _FUNCTIONS_SINCE)
