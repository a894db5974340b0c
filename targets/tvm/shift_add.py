"""The operators of domain ``ai.edgecompile`` that hold coded weights, as kernels that read the codes, or decoded.

Which of the two is computed is decided layer by layer by counting what each costs (:func:`choose`): a kernel that reads
four bits wins where weights are what is waited for, that is for few tokens; float weights win for many, unless
activations may be integers. What is decoded runs as any other product.

And binary attention, whose scores are counts of bits where that takes fewer instructions (:func:`counting_pays`).

The bodies of the operators are their specification; :func:`read` is the same in numpy.

Source: Williams et al., "Roofline: An Insightful Visual Performance Model", CACM 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgecompile.functions import CODED
from edgecompile.targets.tvm import options
from edgecompile.targets.tvm.options import Options
from edgecompile.targets.tvm.schedules import int8, tile, views
from edgecompile.targets.tvm.schedules import shift_add as kernels
from edgecompile.targets.tvm.schedules import shift_add_cuda as gpu

ANGULAR, HAMMING = "BinaryAngularAttention", "BinarySoftmaxAttention"
OPERATORS = (*CODED, ANGULAR, HAMMING)
_TOKENS = 4  # most that a kernel for few tokens holds in registers
_GAIN = 1.1  # that a kernel must promise: the costs are rough
# Bytes per cycle of one core by size of what is read again and again, and instructions on vectors that start in one
# cycle. With these the costs are within a factor of two of what was measured on Zen 5, for AVX-512 and for AVX2, and
# no kernel is chosen that lost there. Nothing was measured on ARM: the caches are those of a Cortex-A76 of a Raspberry
# Pi 5, whose memory moves 7 bytes per cycle at most.
_STREAMED = {
    "x86_64": ((1 << 20, 32.0), (16 << 20, 16.0), (1 << 62, 7.0)),
    "aarch64": ((512 << 10, 32.0), (2 << 20, 16.0), (1 << 62, 6.0)),
}
_STARTED = 2


@dataclass(frozen=True, eq=False)
class Weights:
    """Coded weights.

    Attributes:
        codes: uint8 ``[rows, columns]``; bit i of a binary code is the sign of scale i.
        levels: of a book, float32 ``[2^bits]``; None for binary codes.
        scales: float32, of a book ``[rows, groups]``, of binary codes ``[bits, rows, groups]``.
        group: columns that share a scale.
        bits: of a code.
    """

    codes: np.ndarray
    levels: np.ndarray | None
    scales: np.ndarray
    group: int
    bits: int

    def decoded(self) -> np.ndarray:
        """The weights, float32 ``[rows, columns]``."""
        group_of = np.arange(self.codes.shape[1]) // self.group
        if self.levels is not None:
            return self.levels[self.codes] * self.scales[:, group_of]
        signs = (self.codes[None] >> np.arange(self.bits)[:, None, None] & 1) * np.float32(2) - np.float32(1)
        return (signs.astype(np.float32) * self.scales[:, :, group_of]).sum(0, dtype=np.float32)

    def integers(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Whole numbers int8 ``[rows, columns]`` and the step of each row, float32 ``[rows]``, if 8 bits hold them."""
        found = None if self.levels is None else kernels.whole(self.levels)
        if found is None:
            return None
        numbers, exponent = found
        step = self.scales.min(1)
        by_group = np.log2(self.scales / step[:, None])  # whole numbers, as scales are powers of two
        values = numbers[self.codes].astype(np.float64)
        values = values * np.exp2(by_group)[:, np.arange(self.codes.shape[1]) // self.group]
        if np.abs(values).max() > np.iinfo(np.int8).max:
            return None
        return values.astype(np.int8), np.ldexp(step, exponent).astype(np.float32)


def read(op: str, inputs: list[np.ndarray], columns: int, group: int) -> Weights:
    """The weights of an operator, from its constants in the order of its inputs, without the first."""
    planes, exponents, *levels = inputs
    bits = np.unpackbits(planes, axis=2, count=columns, bitorder="little")
    codes = (bits << np.arange(len(planes), dtype=np.uint8)[:, None, None]).sum(0, dtype=np.uint8)
    if op.startswith("Binary"):
        terms = np.exp2((exponents >> 1).astype(np.float32)) * (1 - 2 * (exponents & 1)).astype(np.float32)
        return Weights(codes, None, terms.sum(-1, dtype=np.float32), group, len(planes))
    return Weights(codes, levels[0], np.exp2(exponents.astype(np.float32)), group, len(planes))


# -- which kernel ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A way to compute a layer.

    Attributes:
        name: of it.
        fits: whether it can, for the weights, the tokens, and the device.
        bits: of weights that it reads for each weight; 0 stands for the bits of the code.
        decode, multiply: vector instructions for each vector of weights, once, and once for each token.
        lanes: weights in such a vector, over the float32 values in a vector.
        integer: it takes integer activations.
        table: bytes of each group of each row besides its codes.
    """

    name: str
    fits: Callable[[Weights, int, str], bool]
    bits: int
    decode: float
    multiply: float
    lanes: int = 1
    integer: bool = False
    table: int = 0


def _nibbles(weights: Weights) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes of four bits and their 16 levels: the highest bit of a shorter code becomes that of four."""
    if weights.levels is None or weights.bits > 4:
        return None
    half = 1 << (weights.bits - 1)
    levels = np.zeros((2, 8), np.float32)
    levels[:, :half] = weights.levels.reshape(2, half)
    return weights.codes % half + 8 * (weights.codes // half), levels.reshape(-1)


def _in_groups(weights: Weights, of: int) -> bool:
    return weights.group % of == 0 or weights.group >= weights.codes.shape[1]


def _fits_book(weights: Weights, m: int, device: str) -> bool:
    how, found = kernels.lookup(device), _nibbles(weights)
    if how is None or found is None or m > _TOKENS or not _in_groups(weights, kernels.WORD):
        return False
    return kernels.table(found[1], how) is not None


def _fits_binary(weights: Weights, m: int, device: str) -> bool:
    few = m <= _TOKENS and m * weights.bits <= 4 * _TOKENS
    return weights.levels is None and few and kernels.lookup(device) is not None and _in_groups(weights, 32)


def _fits_bytes(weights: Weights, m: int, device: str) -> bool:
    found = _nibbles(weights)
    if kernels.byte_lookup(device) is None or found is None or m > _TOKENS or kernels.whole(found[1]) is None:
        return False
    return _in_groups(weights, kernels.WORD)


def _fits_dot(weights: Weights, m: int, device: str) -> bool:
    return m > 1 and int8.dot(device).accumulates and weights.integers() is not None


def _fits_narrow(weights: Weights, m: int, device: str) -> bool:
    found = weights.integers()
    return m > 1 and "avx2" in device.split() and found is not None and bool(np.abs(found[0]).max() <= kernels.NARROW)


def _levels(weights: Weights) -> np.ndarray:
    """What the codes of each group of each row stand for, float32 ``[rows, groups, 16]``; beyond the last code 0."""
    codes = np.arange(1 << weights.bits)
    levels = np.zeros((*weights.scales.shape[-2:], 16), np.float32)
    if weights.levels is not None:
        levels[..., : len(codes)] = weights.levels * weights.scales[..., None]
    else:
        signs = (codes >> np.arange(weights.bits)[:, None, None, None] & 1) * np.float32(2) - np.float32(1)
        levels[..., : len(codes)] = (signs * weights.scales[..., None]).sum(0, dtype=np.float32)
    return levels


def _fits_tables(size: int, weights: Weights, m: int, device: str) -> bool:
    if kernels.TABLES not in device.split() or weights.bits > 4 or m > _TOKENS or not _in_groups(weights, 32):
        return False
    return kernels.row_tables(_levels(weights)).shape[2] == size


_FLOAT = Kernel("float32", lambda *_: True, 32, 0, 1)
# AVX2 has no permutation of 16 floats: a sign costs three instructions more. That is counted in :func:`cycles`.
_KERNELS = (
    _FLOAT,
    Kernel("book", _fits_book, 4, 2, 1),
    Kernel("binary", _fits_binary, 0, 0, 3),
    Kernel("tables", partial(_fits_tables, 2), 4, 9 / 4, 1, table=32),
    Kernel("wide_tables", partial(_fits_tables, 4), 4, 13 / 4, 1, table=64),
    Kernel("book_int8", _fits_bytes, 4, 2, 1, 4, integer=True),
    Kernel("dot_int8", _fits_dot, 8, 0, 1, 4, integer=True),
    Kernel("narrow_int8", _fits_narrow, 8, 0, 2, 4, integer=True),
)
_NAMED: Mapping[str, Kernel] = {kernel.name: kernel for kernel in _KERNELS}
_AROUND = 8  # instructions for each vector of activations and of results: to make integers and floats of them
# Instructions that count the bits of a vector of 32-bit words, by the first that a device has: VPOPCNTD, CNT and two
# sums of neighbours, or bytes looked up by halves and added. A GPU counts those of 16 lanes while it multiplies in 128.
_COUNTED = {"avx512_vpopcntdq": 1, "aarch64": 3, "x86_64": 11, "cuda": 8}
_CALLS = 4000  # cycles that the kernels which do so add, however little they do


def cycles(kernel: Kernel, weights: Weights, m: int, device: str) -> float:
    """What a layer of ``m`` tokens costs, roughly: what computes or what is waited for, whichever is more."""
    n, columns = weights.codes.shape
    have = tile.vectors(device)
    size = n * columns * (kernel.bits or weights.bits) / 8 + n * weights.scales.shape[-1] * kernel.table
    streamed = size / next(rate for limit, rate in _STREAMED[device.split()[0]] if size <= limit)
    vectors = n * columns / (have.lanes * kernel.lanes)
    sign = 3 if kernel.name in ("book", "binary") and have.lanes == 8 else 0
    once, each = kernel.decode, kernel.multiply
    if kernel.name == "binary":
        each = (each + sign) * weights.bits / 4
    else:
        once += sign
    computed = vectors * (once + m * each) / _STARTED
    around = _CALLS + m * (n + columns) * _AROUND / (have.lanes * _STARTED) if kernel.integer else 0
    return max(streamed, computed) + around


def choose(weights: Weights, m: int, chosen: Options) -> Kernel | gpu.Kernel:
    """The kernel for a layer: the cheapest, or float weights unless it promises to be a tenth faster."""
    if not chosen.schedules:
        return _FLOAT
    if chosen.cuda:
        codes = _on_gpu(weights)
        quick = min((k for k in gpu.KERNELS if k.fits(m, codes)), key=lambda k: gpu.cost(k, m, codes), default=None)
        return quick if quick and gpu.cost(quick, m, codes) * _GAIN < gpu.cost_decoded(m, codes) else _FLOAT
    device = options.device(chosen)
    able = [k for k in _KERNELS[1:] if (chosen.integers or not k.integer) and k.fits(weights, m, device)]
    best = min(able, key=lambda k: cycles(k, weights, m, device), default=_FLOAT)
    return best if cycles(best, weights, m, device) * _GAIN < cycles(_FLOAT, weights, m, device) else _FLOAT


def _on_gpu(weights: Weights) -> gpu.Codes:
    rows, columns = weights.codes.shape
    return gpu.Codes(rows, columns, min(weights.group, columns), weights.bits, weights.levels is None)


def counting_pays(inner: int, device: str) -> bool:
    """Whether scores of ``inner`` binary columns take fewer instructions as counts of bits than as sums of products."""
    counted = next(count for name, count in _COUNTED.items() if name in device.split())
    return -(-inner // kernels.BITS) * (counted + 2) < inner


# -- what is computed --------------------------------------------------------------------------------------------------


def convert(bb: Any, op: str, inputs: list[Any], attrs: Mapping[str, Any], chosen: Options) -> tuple[Any, str]:
    """A node of :data:`OPERATORS` in Relax, and what it is computed by, for the report.

    Args:
        bb: the block builder.
        op: the operator.
        inputs: its inputs; all but the first are constants.
        attrs: its attributes.
        chosen: the options of the target.

    Raises:
        ValueError: the codes are not constant.
    """
    from tvm import relax
    from tvm.ir import GenericConst

    if op == ANGULAR:
        return _angular(bb, inputs, [int(axis) for axis in attrs["turn"]], chosen)
    if op == HAMMING:
        return _hamming(bb, inputs, [int(axis) for axis in attrs["turn"]], chosen)
    x, *constants = inputs
    if not all(isinstance(c, GenericConst) for c in constants):
        raise ValueError("its codes must be constant")
    weights = read(op, [c.value.numpy() for c in constants], int(attrs["columns"]), int(attrs["group"]))
    shape = [int(d) for d in x.ty.shape]
    n, columns = weights.codes.shape
    conv = op.endswith("Conv")
    strides = [int(s) for s in attrs.get("strides", (1, 1))]
    pixel = conv and shape[2:] == [1, 1]
    m = shape[0] if conv else math.prod(shape[:-1])
    kernel = _FLOAT if conv and not pixel else choose(weights, m, chosen)
    said = f"{weights.bits}-bit codes of {n}x{columns}, {m} tokens: {kernel.name}"
    if conv and not pixel:
        filters = relax.const(weights.decoded()[:, :, None, None])
        return relax.op.nn.conv2d(x, filters, strides=strides), f"{weights.bits}-bit convolution: float32"
    if kernel is _FLOAT:
        flat = relax.op.reshape(x, (m, columns)) if conv else x
        y = relax.op.matmul(flat, relax.const(np.ascontiguousarray(weights.decoded().T)))
        return (relax.op.reshape(bb.emit(y), (m, n, 1, 1)) if conv else y), said
    flat = _once(bb, (x, m, columns), lambda: bb.emit(relax.op.reshape(x, (m, columns))))
    if isinstance(kernel, gpu.Kernel):
        result = bb.normalize(_coded_on_gpu(bb, flat, weights, m, kernel))
    else:
        result = bb.normalize(_EMIT[kernel.name](bb, flat, weights, [m] if conv else shape[:-1], chosen))
    wanted = [m, n, 1, 1] if conv else [*shape[:-1], n]
    if [int(d) for d in result.ty.shape] == wanted:
        return result, said
    return relax.op.reshape(bb.emit(result), wanted), said


def _angular(bb: Any, inputs: list[Any], turn: list[int], chosen: Options) -> tuple[Any, str]:
    """Angular attention: kernels of its own, or the operators of its body."""
    from tvm import relax

    op, (q, k, v, *limits) = relax.op, inputs
    shapes = [[int(d) for d in x.ty.shape] for x in (q, k, v)]
    (*lead, tokens, inner), outer = shapes[0], shapes[2][-1]
    alone = all(_single(limit) for limit in limits)
    same = (
        shapes[0] == shapes[1] and shapes[2][:-1] == shapes[0][:-1] and all(x.ty.dtype == "float32" for x in (q, k, v))
    )
    by_head = None not in [_of_heads(limit, len(lead)) for limit in limits]
    if chosen.cuda and chosen.schedules and same and by_head and gpu.angular_fits(outer):
        y = _angular_on_gpu(bb, q, k, v, limits)
        return op.reshape(y, shapes[2]), f"angular attention over {tokens} tokens: rows added"
    own = chosen.schedules and not chosen.cuda and alone and same
    have = tile.vectors(options.device(chosen)) if own else None
    if have and kernels.angular_fits(inner, outer, have):
        flat, rows = map(list, zip(*(_flat(bb, x) for x in (q, k, v)), strict=True))
        function = kernels.angular(lead, tokens, inner, outer, have, parallel=chosen.threads > 1, rows=rows)
        flat += [bb.emit(op.reshape(limit, (1,))) for limit in limits]
        y = _call(bb, function, "angular_attention", flat, ((math.prod(lead), tokens, outer), "float32"))
        return op.reshape(y, shapes[2]), f"angular attention over {tokens} tokens: one kernel"

    signs = [_binarised(bb, x, limit) for x, limit in zip((q, k), limits, strict=True)]
    gathered = bb.emit(op.matmul(bb.emit(op.permute_dims(signs[1], turn)), v))
    near = bb.emit(op.multiply(bb.emit(op.matmul(signs[0], gathered)), relax.const(np.float32(0.31830987))))
    raw = bb.emit(op.add(bb.emit(op.multiply(v, relax.const(np.float32(0.5)))), near))
    return op.divide(raw, _length(bb, raw)), f"angular attention over {tokens} tokens: products of matrices"


def _hamming(bb: Any, inputs: list[Any], turn: list[int], chosen: Options) -> tuple[Any, str]:
    """Softmax attention of binary queries and keys: their product counted bit by bit, or of matrices."""
    from tvm import relax

    op, (q, k, v, *limits, scale, bias) = relax.op, inputs
    (*lead, queries, inner), (*others, keys, _) = ([int(d) for d in x.ty.shape] for x in (q, k))
    shapes = [_of_heads(limit, len(lead)) for limit in limits]
    biases = [int(d) for d in bias.ty.shape]
    fits = lead == others and len(biases) <= len(lead) + 2 and _single(scale) and None not in shapes
    float32 = all(x.ty.dtype == "float32" for x in inputs)
    own, device = chosen.schedules and fits and float32, options.device(chosen)
    if own and (chosen.cuda or kernels.hamming_fits(keys, inner)) and counting_pays(inner, device):
        if chosen.cuda:
            flat = [_bits(bb, x, limit) for x, limit in zip((q, k), limits, strict=True)]
            function = gpu.counted(lead, queries, keys, inner, biases)
        else:
            flat, rows = map(list, zip(*(_flat(bb, x) for x in (q, k)), strict=True))
            flat += [_by_head(bb, limit, lead) for limit in limits]
            have, parallel = tile.vectors(device), chosen.threads > 1
            function = kernels.hamming(lead, queries, keys, inner, have, parallel=parallel, rows=rows, biases=biases)
        flat += [bb.emit(op.reshape(scale, (1,))), bb.emit(op.reshape(bias, (math.prod(biases),)))]
        score = _call(bb, function, "binary_scores", flat, ((math.prod(lead), queries, keys), "float32"))
        score, how = bb.emit(op.reshape(score, (*lead, queries, keys))), "bits counted"
    else:
        signs = [_binarised(bb, x, limit) for x, limit in zip((q, k), limits, strict=True)]
        common, how = bb.emit(op.matmul(signs[0], bb.emit(op.permute_dims(signs[1], turn)))), "products of matrices"
        score = bb.emit(op.add(bb.emit(op.multiply(common, scale)), bias))
    share = bb.emit(op.nn.softmax(score, axis=-1))
    return op.matmul(share, v), f"binary attention over {keys} tokens: {how}"


def _angular_on_gpu(bb: Any, q: Any, k: Any, v: Any, limits: Sequence[Any]) -> Any:
    """Angular attention whose thresholds do not differ within a head, ``[heads, tokens, columns]``."""
    (*lead, tokens, inner), outer = ([int(d) for d in q.ty.shape], int(v.ty.shape[-1]))
    asked, given = (_bits(bb, x, limit) for x, limit in zip((q, k), limits, strict=True))
    flat, rows = _flat(bb, v)
    heads, like = math.prod(lead), (lead, tokens, inner, outer, rows)
    state = ((heads, tile.padded(inner, kernels.BITS), outer), "float32")
    near = _call(bb, gpu.gathered(*like), "values_gathered", [given, flat], state)
    return _call(bb, gpu.angular(*like), "angular_attention", [asked, near, flat], ((heads, tokens, outer), "float32"))


def _bits(bb: Any, x: Any, limit: Any) -> Any:
    """What of the rows of a tensor exceeds its threshold, as bits, uint32 ``[heads, tokens, words]``."""
    *lead, tokens, inner = (int(d) for d in x.ty.shape)
    flat, rows = _flat(bb, x)
    shape = (math.prod(lead), tokens, -(-inner // kernels.BITS))
    function = gpu.binarised(lead, tokens, inner, rows)
    return _call(bb, function, "binarise", [flat, _by_head(bb, limit, lead)], (shape, "uint32"))


def _by_head(bb: Any, limit: Any, lead: Sequence[int]) -> Any:
    """Thresholds of which :func:`_of_heads` knows the shape, one for each head."""
    from tvm.relax import op

    wide = bb.emit(op.broadcast_to(bb.emit(op.reshape(limit, _of_heads(limit, len(lead)))), lead))
    return bb.emit(op.reshape(wide, (math.prod(lead),)))


def _single(x: Any) -> bool:
    return math.prod(int(d) for d in x.ty.shape) == 1


def _of_heads(limit: Any, lead: int) -> list[int] | None:
    """Shape of thresholds that broadcasts against ``lead`` axes before tokens, None where tokens or columns differ."""
    shape = [int(d) for d in limit.ty.shape]
    shape = [1] * (lead + 2 - len(shape)) + shape
    return shape[:-2] if len(shape) == lead + 2 and shape[-2:] == [1, 1] else None


def _length(bb: Any, x: Any) -> Any:
    from tvm.relax import op

    return bb.emit(op.sqrt(bb.emit(op.sum(bb.emit(op.multiply(x, x)), axis=-1, keepdims=True))))


def _binarised(bb: Any, x: Any, limit: Any) -> Any:
    """1 where ``x / |x|`` exceeds its threshold, 0 elsewhere."""
    from tvm.relax import op

    above = bb.emit(op.greater(bb.emit(op.divide(x, _length(bb, x))), limit))
    return bb.emit(op.astype(above, "float32"))


def _flat(bb: Any, x: Any) -> tuple[Any, kernels.Rows]:
    """What holds the rows of a tensor, in one axis, and where: a projection that it is a view of, if that has whole
    rows.
    """
    from tvm.relax import op

    view = views.behind(bb, x)
    rows = kernels.Rows.of(view)
    held, rows = (x, kernels.Rows.dense(view.shape)) if rows is None else (view.source, rows)
    return bb.emit(op.reshape(held, (rows.size,))), rows


def _call(bb: Any, function: Any, name: str, arguments: list[Any], *results: tuple[tuple[int, ...], str]) -> Any:
    """A call of a function that is scheduled already."""
    from tvm import relax

    types = [relax.TensorType(shape, dtype) for shape, dtype in results]
    constants = [relax.const(a) if isinstance(a, np.ndarray) else a for a in arguments]
    return bb.emit(relax.call_tir(bb.add_func(function, name), constants, types if len(types) > 1 else types[0]))


def _once(bb: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """What this block builder was made to emit for a key before: several layers may read one tensor."""
    known = vars(bb).setdefault("_emitted_once", {})
    if key not in known:
        known[key] = make()
    return known[key]


def _quantised(bb: Any, x: Any, m: int, columns: int, group: int, largest: int, chosen: Options) -> list[Any]:
    from tvm import relax

    def make() -> list[Any]:
        function = kernels.quantised(m, columns, group, largest, parallel=chosen.threads > 1)
        wide, groups = tile.padded(columns, 32), -(-columns // group)
        made = _call(bb, function, "quantise", [x], ((m, wide), "int8"), ((m, 1), "float32"), ((m, groups), "int32"))
        return [bb.emit(relax.TupleGetItem(made, i)) for i in range(3)]

    return _once(bb, (x, group, largest), make)


def _coded_on_gpu(bb: Any, x: Any, weights: Weights, m: int, kernel: gpu.Kernel) -> Any:
    codes = _on_gpu(weights)
    levels = np.zeros(1 << codes.bits, np.float32) if weights.levels is None else weights.levels
    constants = [codes.words(weights.codes), codes.scales(weights.scales), levels]
    return _call(bb, kernel.make(m, codes), f"{kernel.name}_product", [x, *constants], ((m, codes.rows), "float32"))


def _book(bb: Any, x: Any, weights: Weights, lead: Sequence[int], chosen: Options) -> Any:
    m, (n, columns) = math.prod(lead), weights.codes.shape
    how, found = kernels.lookup(options.device(chosen)), _nibbles(weights)
    assert how is not None and found is not None
    codes, levels = found
    blocks = kernels.tiles_of(m, how.registers)
    function = kernels.book(m, n, columns, _whole_words(weights, 8), how, parallel=chosen.threads > 1)
    constants = [
        kernels.words(codes, how.lanes, blocks),
        kernels.by_lane(weights.scales, how.lanes, blocks),
        kernels.table(levels, how),
    ]
    return _call(bb, function, "shift_gemv", [x, *constants], ((m, n), "float32"))


def _binary(bb: Any, x: Any, weights: Weights, lead: Sequence[int], chosen: Options) -> Any:
    m, (n, columns) = math.prod(lead), weights.codes.shape
    how = kernels.lookup(options.device(chosen))
    assert how is not None
    blocks = kernels.tiles_of_planes(m, weights.bits, how.registers)
    function = kernels.binary(m, n, columns, _whole_words(weights, 32), weights.bits, how, parallel=chosen.threads > 1)
    planes = [kernels.quads(weights.codes >> i & 1, how) for i in range(weights.bits)]
    constants = [
        np.stack([kernels.words(plane, how.lanes, blocks) for plane in planes], 2),
        np.stack([kernels.by_lane(scale, how.lanes, blocks) for scale in weights.scales], 2),
        kernels.signs(how),
    ]
    return _call(bb, function, "binary_gemv", [x, *constants], ((m, n), "float32"))


def _tables(bb: Any, x: Any, weights: Weights, lead: Sequence[int], chosen: Options) -> Any:
    m, (n, columns) = math.prod(lead), weights.codes.shape
    held = [kernels.nibbles(weights.codes), kernels.row_tables(_levels(weights))]
    more = tile.padded(n, kernels.rows_of(m)) - n
    held = [np.concatenate([part, np.zeros((more, *part.shape[1:]), part.dtype)]) for part in held]
    group, parallel = _whole_words(weights, 32), chosen.threads > 1
    function = kernels.tabled(m, n, columns, group, held[1].shape[2], parallel=parallel)
    return _call(bb, function, "table_gemv", [x, *held], ((m, n), "float32"))


def _book_int8(bb: Any, x: Any, weights: Weights, lead: Sequence[int], chosen: Options) -> Any:
    m, (n, columns) = math.prod(lead), weights.codes.shape
    how, found = kernels.byte_lookup(options.device(chosen)), _nibbles(weights)
    assert how is not None and found is not None
    codes, levels = found
    integers = kernels.whole(levels)
    assert integers is not None
    numbers, exponent = integers
    group, blocks = _whole_words(weights, 8), kernels.tiles_of(m, 16)
    function = kernels.book_int8(m, n, columns, group, how, parallel=chosen.threads > 1)
    constants = [
        kernels.bytes_of(codes, how, blocks),
        kernels.by_lane(np.ldexp(weights.scales, exponent), how.lanes, blocks),
        kernels.byte_table(numbers, how),
    ]
    activations = _quantised(bb, x, m, columns, group, kernels.FINE, chosen)
    return _call(bb, function, "shift_gemv_int8", [*activations, *constants], ((m, n), "float32"))


def _dot_int8(bb: Any, x: Any, weights: Weights, lead: Sequence[int], chosen: Options) -> Any:
    from tvm import relax

    op, device, columns = relax.op, options.device(chosen), weights.codes.shape[1]
    found = weights.integers()
    assert found is not None
    values, step = found
    numbers, steps, _ = _quantised(bb, x, math.prod(lead), columns, columns, kernels.FINE, chosen)
    wide = np.zeros((values.shape[0], tile.padded(columns, 32)), np.int8)
    wide[:, :columns] = values
    # In the shape of the result, so that what follows is fused; the kernel is that of an int8 matrix.
    numbers = bb.emit(op.reshape(numbers, (*lead, wide.shape[1])))
    steps = bb.emit(op.reshape(steps, (*lead, 1)))
    call = op.matmul(numbers, relax.const(np.ascontiguousarray(wide.T)), out_dtype="int32")
    how = int8.dot(device)
    total = int8.kernel(bb, bb.normalize(call), numbers, 0, np.ascontiguousarray(wide.T), how, tile.vectors(device))
    scaled = op.multiply(bb.emit(op.astype(bb.emit(total), "float32")), relax.const(step))
    return op.multiply(bb.emit(scaled), steps)


def _narrow_int8(bb: Any, x: Any, weights: Weights, lead: Sequence[int], chosen: Options) -> Any:
    m, (n, columns) = math.prod(lead), weights.codes.shape
    found = weights.integers()
    assert found is not None
    values, step = found
    activations = _quantised(bb, x, m, columns, columns, kernels.COARSE, chosen)
    scales = np.zeros(tile.padded(n, 32), np.float32)
    scales[:n] = step
    function = kernels.narrow(m, n, columns, parallel=chosen.threads > 1)
    constants = [kernels.narrow_pack(values), scales]
    return _call(bb, function, "shift_gemm_int8", [*activations, *constants], ((m, n), "float32"))


_EMIT = {
    "book": _book,
    "binary": _binary,
    "tables": _tables,
    "wide_tables": _tables,
    "book_int8": _book_int8,
    "dot_int8": _dot_int8,
    "narrow_int8": _narrow_int8,
}


def _whole_words(weights: Weights, of: int) -> int:
    """The group in whole words: one that holds all columns may be longer than they are."""
    return tile.padded(min(weights.group, weights.codes.shape[1]), of)
