"""Products and convolutions of 8-bit integers in 32-bit accumulators, without saturation on the way.

A *dot instruction* adds, in each 32-bit lane, a few products of neighbouring activations and weights. Weights are
packed for it as ``[..., depth / group, columns, group]``: one vector of weights meets ``group`` activations that are
broadcast to all lanes. Each instruction of the table is exact: VPDPBUSD multiplies uint8 by int8 and adds four products
in 32 bits; VPMADDWD does so with two products of 16 bits, which cannot overflow, for activations and weights that are
widened first; SDOT is VPDPBUSD for int8 by int8. (VPMADDUBSW, which adds two products of uint8 and int8 in 16 bits,
saturates and is not used.) An instruction that wants activations of the other signedness gets them shifted by 128, and
the zero point with them.

Activations are stored with their zero point; a sum over ``x - zero`` is the sum over ``x`` less ``zero`` times the sum
of the weights, which is a constant per output channel. What lies outside the picture is the zero point.

A depthwise convolution has nothing to add up within a lane. Its products are integers below 2^15, and a sum of them
below 2^24 is exact in float32, whatever the order: it is the convolution of :mod:`.conv` on widened operands.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD and VPMADDWD; Arm Architecture Reference
Manual, SDOT (vector); Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 2.3; for the tiles see :mod:`.tile`.
"""

# TVMScript spells the shapes of buffers as calls in annotations.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile.targets.tvm.schedules import dense, tile
from edgecompile.targets.tvm.schedules.tile import PREPARE, Vectors, attributes, choose, padded

TILE = "integer_tile"
EXACT_IN_FLOAT = 1 << 24  # every integer of at most this magnitude is a float32
_STEPS = 4  # of the reduction in one iteration of its innermost loop
_COPIED = 64  # bytes that one step of a copy moves
_INFORMATION = {name: np.iinfo(name) for name in ("int8", "uint8")}


@dataclass(frozen=True)
class Dot:
    """A dot instruction, or in its absence a multiplication of 16-bit integers that the compiler vectorises.

    Attributes:
        name: of the CPU feature, as Linux names it; ``""`` for no instruction.
        intrinsic: LLVM's name of the instruction.
        lanes: 32-bit results in one vector.
        group: products that it adds in one lane.
        activations, weights: types of the operands.
    """

    name: str
    intrinsic: str
    lanes: int
    group: int
    activations: str
    weights: str

    @property
    def accumulates(self) -> bool:
        """Whether the accumulator is an operand of the instruction, rather than added to its result."""
        return self.group == 4


# The first whose feature the device has.
DOTS = (
    Dot("avx512_vnni", "llvm.x86.avx512.vpdpbusd.512", 16, 4, "uint8", "int8"),
    Dot("avx_vnni", "llvm.x86.avx512.vpdpbusd.256", 8, 4, "uint8", "int8"),
    Dot("avx512bw", "llvm.x86.avx512.pmaddw.d.512", 16, 2, "int16", "int16"),
    Dot("avx2", "llvm.x86.avx2.pmadd.wd", 8, 2, "int16", "int16"),
    Dot("asimddp", "llvm.aarch64.neon.sdot.v4i32.v16i8", 4, 4, "int8", "int8"),
)
_PLAIN = Dot("", "", 4, 1, "int16", "int16")


def dot(device: str) -> Dot:
    """The instruction for a device as :func:`edgecompile.targets.tvm.options.device` describes it."""
    features = device.split()
    return next((d for d in DOTS if d.name in features), _PLAIN)


@functools.cache
def _intrinsic(how: Dot) -> str:
    """Register the instruction with TVM; returns the name it has there."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    lanes, group, activations, weights = how.lanes, how.group, how.activations, how.weights
    name, total, each = how.intrinsic, f"int32x{lanes}", f"{activations}x{group}"
    wide, narrow = f"{activations}x{lanes * group}", f"{weights}x{lanes * group}"

    @T.prim_func(s_tir=True)
    def description(
        a: T.Buffer((group,), activations, offset_factor=1),
        b: T.Buffer((lanes, group), weights, offset_factor=1),
        c: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(c[0:lanes], a[0:group], b[0:lanes, 0:group])
            T.writes(c[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, group):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        c[vi] = c[vi] + T.cast(a[vk], "int32") * T.cast(b[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def accumulating(
        a: T.Buffer((group,), activations, offset_factor=1),
        b: T.Buffer((lanes, group), weights, offset_factor=1),
        c: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(c[0:lanes], a[0:group], b[0:lanes, 0:group])
            T.writes(c[0:lanes])
            c[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(name),
                c.vload([0], dtype=total),
                T.reinterpret(T.broadcast(T.reinterpret(a.vload([0], each), dtype="int32"), lanes), dtype=wide),
                b.vload([0, 0], dtype=narrow),
                dtype=total,
            )

    @T.prim_func(s_tir=True)
    def adding(
        a: T.Buffer((group,), activations, offset_factor=1),
        b: T.Buffer((lanes, group), weights, offset_factor=1),
        c: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(c[0:lanes], a[0:group], b[0:lanes, 0:group])
            T.writes(c[0:lanes])
            c[T.ramp(T.int32(0), 1, lanes)] = c.vload([0], dtype=total) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(name),
                T.reinterpret(T.broadcast(T.reinterpret(a.vload([0], each), dtype="int32"), lanes), dtype=wide),
                b.vload([0, 0], dtype=narrow),
                dtype=total,
            )

    registered = f"edgecompile_dot_{how.name}"
    TensorIntrin.register(registered, description, accumulating if how.accumulates else adding, override=True)
    return registered


# -- computations ------------------------------------------------------------------------------------------------------


def pack(weight: np.ndarray, columns: int, how: Dot) -> np.ndarray:
    """``[out, ..., in]`` to ``[out / columns, ..., in / group, columns, group]``, filled with zeros."""
    out, *middle, inner = weight.shape
    wide = np.zeros((padded(out, columns), *middle, padded(inner, how.group)), how.weights)
    wide[:out, ..., :inner] = weight
    wide = wide.reshape(-1, columns, *middle, wide.shape[-1] // how.group, how.group)
    return np.ascontiguousarray(np.moveaxis(wide, 1, -2))


def shift(how: Dot, dtype: str) -> int:
    """What is added to activations of ``dtype`` so that they have the instruction's type."""
    return 0 if how.activations == "int16" else int(_INFORMATION[how.activations].min) - int(_INFORMATION[dtype].min)


def _converted(value: Any, dtype: str, how: Dot) -> Any:
    """One activation of ``dtype`` as the instruction wants it."""
    from tvm import tirx

    if not shift(how, dtype):
        return value if dtype == how.activations else tirx.Cast(how.activations, value)
    # Bytes that are 128 apart differ in their highest bit.
    return tirx.reinterpret(how.activations, value ^ tirx.const(-128 if dtype == "int8" else 128, dtype))


def product(x: Any, packed: Any, n: int, rows: int, how: Dot) -> Any:
    """``x [..., depth]`` times a matrix of ``n`` columns as :func:`pack` stores it, int32 ``[..., n]``, by tiles."""
    from tvm import te, tirx

    *lead, depth = (int(d) for d in x.shape)
    wide, groups, columns, group = (int(d) for d in packed.shape)
    m = math.prod(lead)
    if depth != groups * group or x.dtype != how.activations:
        given = x

        def at(*index: Any) -> Any:
            k = index[-1]
            short = depth < groups * group
            value = _converted(given(*index[:-1], tirx.min(k, depth - 1) if short else k), str(given.dtype), how)
            return tirx.if_then_else(k < depth, value, tirx.const(0, how.activations)) if short else value

        x = te.compute((*lead, groups * group), at, name=f"{PREPARE}_x")
    k: Any = te.reduce_axis((0, groups), "k")
    part: Any = te.reduce_axis((0, group), "part")

    def row(outer: Any, inner: Any) -> list[Any]:
        index = outer * rows + inner
        return dense.unflatten(index if m % rows == 0 else tirx.min(index, m - 1), lead)

    tiles: Any = te.compute(
        (wide, padded(m, rows) // rows, rows, columns),
        lambda jo, io, ii, ji: te.sum(
            tirx.Cast("int32", x(*row(io, ii), k * group + part)) * tirx.Cast("int32", packed[jo, k, ji, part]),
            axis=[k, part],
        ),
        name=TILE,
    )

    def place(*index: Any) -> Any:
        i, j = dense.flatten(index[:-1], lead), index[-1]
        return tiles[j // columns, i // rows, i % rows, j % columns]

    return te.compute((*lead, n), place, name="product")


def convolution(
    x: Any,
    packed: Any,
    channels: int,
    rows: int,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero: int,
    how: Dot,
) -> Any:
    """A convolution of ``x [batch, height, width, in]`` with weights as :func:`pack` stores them, int32.

    Args:
        x: the input, int8 or uint8.
        packed: the weights.
        channels: of the output.
        rows: of a tile.
        strides, padding, dilation: as of ``relax.op.nn.conv2d``; padding is top, left, bottom, right.
        zero: the zero point of ``x``, which it is padded with.
        how: the instruction.
    """
    from tvm import te, tirx

    batch, height, width, inner = (int(d) for d in x.shape)
    wide, kernel_h, kernel_w, groups, columns, group = (int(d) for d in packed.shape)
    top, left, bottom, right = padding
    reach_h, reach_w = (kernel_h - 1) * dilation[0] + 1, (kernel_w - 1) * dilation[1] + 1
    out_h = (height + top + bottom - reach_h) // strides[0] + 1
    out_w = (width + left + right - reach_w) // strides[1] + 1
    lines = padded(out_w, rows)
    need_h = (out_h - 1) * strides[0] + reach_h
    need_w = (lines - 1) * strides[1] + reach_w
    need_c = groups * group
    if any(padding) or need_w > width or need_c > inner or x.dtype != how.activations:
        source = x

        def pad(n: Any, h: Any, w: Any, c: Any) -> Any:
            inside = [h >= top, h < top + height] if top or need_h > height else []
            inside += [w >= left, w < left + width] if left or need_w > width else []
            inside += [c < inner] if need_c > inner else []
            value = _converted(source[n, h - top, w - left, c], str(source.dtype), how)
            outside = tirx.const(zero + shift(how, str(source.dtype)), how.activations)
            return tirx.if_then_else(tirx.all(*inside), value, outside) if inside else value

        x = te.compute((batch, need_h, need_w, need_c), pad, name=f"{PREPARE}_x")
    kh: Any = te.reduce_axis((0, kernel_h), "kh")
    kw: Any = te.reduce_axis((0, kernel_w), "kw")
    c: Any = te.reduce_axis((0, groups), "c")
    part: Any = te.reduce_axis((0, group), "part")

    def value(n: Any, jo: Any, h: Any, wo: Any, wi: Any, ji: Any) -> Any:
        y, z = h * strides[0] + kh * dilation[0], (wo * rows + wi) * strides[1] + kw * dilation[1]
        left_hand = tirx.Cast("int32", x[n, y, z, c * group + part])
        return te.sum(left_hand * tirx.Cast("int32", packed[jo, kh, kw, c, ji, part]), axis=[kh, kw, c, part])

    tiles: Any = te.compute((batch, wide, out_h, lines // rows, rows, columns), value, name=TILE)
    return te.compute(
        (batch, out_h, out_w, channels),
        lambda n, h, w, j: tiles[n, j // columns, h, w // rows, w % rows, j % columns],
        name="convolution",
    )


# -- the schedule ------------------------------------------------------------------------------------------------------


def schedule(module: Any, how: Dot, *, parallel: bool) -> Any:
    """Schedule a kernel that has a block :data:`TILE`; see :func:`edgecompile.targets.tvm.schedules.tile.schedule`."""
    from tvm.s_tir import Schedule

    plan: Any = Schedule(module)
    names = [plan.get(block).name_hint for block in plan.get_child_blocks(plan.get_sblock("root"))]
    for name in names[: names.index(TILE)]:
        if name.startswith(PREPARE):
            _copy(plan, plan.get_sblock(name), parallel=parallel)
        else:
            plan.compute_inline(plan.get_sblock(name))
    plan, block, axes, row, column = tile.arrange(plan, names, TILE, parallel=parallel)
    wide, lane = plan.split(column, [None, how.lanes])
    plan.vectorize(lane)
    plan.unroll(wide)
    plan.unroll(row)
    _in_registers(plan, block, axes, how)
    return plan.mod


def _in_registers(plan: Any, block: Any, spatial: int, how: Dot) -> None:
    """Order and unroll the loops of a tile, and put the instruction into the innermost ones."""
    own = plan.get_loops(block)
    reductions = sum(int(v.iter_type) == 2 for v in plan.get(block).iter_vars)
    own = own[len(own) - spatial - reductions :]
    row, column, *sums, part = own[spatial - 2 :]
    extent = int(plan.get(sums[-1]).extent)
    step = max(d for d in range(1, 2 * _STEPS) if extent % d == 0)
    last, inner = plan.split(sums[-1], [None, step])
    wide, lane = plan.split(column, [None, how.lanes])
    plan.reorder(*sums[:-1], last, inner, row, wide, lane, part)
    for loop in (wide, row, inner):
        plan.unroll(loop)
    if not how.name:
        plan.vectorize(lane)
        plan.decompose_reduction(block, sums[0] if len(sums) > 1 else last)
        return
    start = plan.decompose_reduction(block, sums[0] if len(sums) > 1 else last)
    plan.vectorize(plan.get_loops(start)[-1])
    plan.tensorize(lane, _intrinsic(how))


def _copy(plan: Any, block: Any, *, parallel: bool) -> None:
    """Schedule a block that only moves data."""
    *outer, last = plan.get_loops(block)
    extent = int(plan.get(last).extent)
    step = math.gcd(extent, _COPIED)
    if step > 1:
        plan.vectorize(plan.split(last, [None, step])[1])
    if parallel and outer:
        plan.parallel(plan.fuse(*outer))


# -- operators of Relax ------------------------------------------------------------------------------------------------


def kernel(bb: Any, call: Any, x: Any, zero: int, weight: np.ndarray, how: Dot, have: Vectors) -> Any:
    """What computes ``relax.matmul``, or ``relax.nn.conv2d`` over NHWC and OHWI, of ``x - zero`` and int8 weights.

    Args:
        bb: the block builder.
        call: the operator, whose result is int32.
        x: the activations, int8 or uint8.
        zero: their zero point.
        weight: the weights.
        how: the instruction.
        have: the vector registers.

    Returns:
        an expression, or None where it has another form.
    """
    from tvm import relax

    shape = [int(d) for d in call.ty.shape]
    registers = Vectors(how.lanes, have.count)
    if call.op.name == "relax.matmul":
        strides, padding, dilation, weight = [1, 1], [0] * 4, [1, 1], weight.T
        pointwise, name = True, "matmul_int8"
    else:
        attrs = call.attrs
        if (attrs.data_layout, attrs.kernel_layout, attrs.out_layout) != ("NHWC", "OHWI", "NHWC"):
            return None
        strides, padding, dilation = ([int(v) for v in p] for p in (attrs.strides, attrs.padding, attrs.dilation))
        pointwise = weight.shape[1:3] == (1, 1) and strides == [1, 1] and not any(padding)
        name = "conv2d_1x1_int8" if pointwise else "conv2d_int8"
    out = weight.shape[0]
    rows = math.prod(shape[:-1])
    steps = math.prod(weight.shape[1:-1]) * -(-weight.shape[-1] // how.group)
    size = choose(rows if pointwise else shape[2], out, steps, registers)
    names = {"primfunc_name_hint": name, "primfunc_attrs": attributes(rows, out)}
    packed = relax.const(pack(weight.reshape(out, -1) if pointwise else weight, size.columns, how))

    def define(data: Any, weights: Any) -> Any:
        if pointwise:
            return product(data, weights, out, size.rows, how)
        return convolution(data, weights, out, size.rows, strides, padding, dilation, zero, how)

    total = bb.call_te(define, x, packed, **names)
    shifted = zero + shift(how, str(x.ty.dtype))
    if not shifted:
        return total
    sums = weight.astype(np.int64).reshape(out, -1).sum(1) * -shifted
    return relax.op.add(bb.emit(total), relax.const(sums.astype(np.int32).reshape([1] * (len(shape) - 1) + [-1])))


def legalize_round(bb: Any, call: Any, have: Vectors) -> Any:
    """``relax.round``, which ONNX defines to round half to even, as one instruction."""
    from tvm import te, tirx

    return bb.call_te(
        lambda x: te.compute(x.shape, lambda *i: tirx.nearbyint(x(*i)), name="round"),
        call.args[0],
        primfunc_name_hint="round",
    )
