"""QuantizeLinear and DequantizeLinear as integer arithmetic: what Relax computes in floats becomes sums of integers.

The importer leaves ``quantize(f(dequantize(q), ...))``, which computes ``f`` in floating point. :func:`integers`
rewrites it by identities of real arithmetic:

- *Layers.* A convolution or product of dequantised activations with dequantised constant weights is
  ``s_x s_w sum (x - z_x) w``: an int32 sum, then one multiplication by a float32 per channel. A bias is a constant of
  the sum: the int32 of the graph, or a float rounded to a step of the sum, which is off by half a step at most.
- *Scale.* Division by the scale of the result moves through whatever is homogeneous (a sum, ReLU, a mean, a copy)
  to the scales of what that reads, so that ``quantize`` is one multiplication, a rounding half to even and two bounds;
  it is what ONNX Runtime's QLinearConv and QLinearAdd compute. Where it cannot move, it stays a division.
- *Moves.* ``quantize(dequantize(q)) = q`` where both have the same parameters; this is checked on all 256 integers, and
  then whatever only selects among values moves the integers themselves.

Layers remain operators of Relax, on ``x - z_x`` as int16, so that the graph's layout can be changed; then
:func:`lowered` takes the bytes themselves, and puts the kernels of :mod:`.schedules.int8` in their place.

Sources: ONNX operators QuantizeLinear and DequantizeLinear; Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 2.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile.targets.tvm import options
from edgecompile.targets.tvm.options import Options
from edgecompile.targets.tvm.schedules import int8, tile

_BYTES = ("int8", "uint8")
_MOVES = ("relax.nn.max_pool2d", "relax.reshape", "relax.permute_dims", "relax.strided_slice")
# Operators of one tensor for which f(a x) = a f(x), a positive.
_HOMOGENEOUS = (
    *_MOVES,
    "relax.nn.relu",
    "relax.image.resize2d",
    "relax.mean",
    "relax.nn.avg_pool2d",
    "relax.nn.adaptive_avg_pool2d",
)
_LARGEST_BIAS = 1 << 30  # half of int32, so that the sum fits beside it


@dataclass(frozen=True, eq=False)
class _Activation:
    """Dequantised integers of one scale: the variable that holds them, their scale and zero point."""

    integers: Any
    scale: np.float32
    zero: int

    @property
    def dtype(self) -> str:
        return str(self.integers.ty.dtype)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A convolution or product of an activation with constant weights, int8 with one scale per output channel or one.

    ``axis`` is the axis of the channels in the result. ``floats``: float32 adds these integers as exactly, and faster,
    because no lane of a vector has several products to add.
    """

    call: Any
    source: _Activation
    weight: np.ndarray
    scale: np.ndarray
    axis: int
    floats: bool

    @property
    def steps(self) -> np.ndarray:
        """The real that one step of each channel's sum stands for, float32."""
        return self.source.scale * self.scale


def returns_itself(scale: np.float32, zero: int, dtype: str) -> bool:
    """Whether quantising what was dequantised with the same parameters gives back each of the 256 integers."""
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1, dtype=np.int64)
    with np.errstate(over="ignore"):
        reals = (every - zero).astype(np.float32) * np.float32(scale)
    again = np.clip(np.rint(reals / np.float32(scale)) + zero, info.min, info.max)
    return bool((again == every).all())


def integers(module: Any) -> Any:
    """A module whose layers between quantize and dequantize add up integers; the same one if it has none."""
    from tvm.relax import analysis
    from tvm.relax.transform import DeadCodeElimination

    main = module["main"]
    names: list[str] = []
    analysis.post_order_visit(main, lambda e: names.append(_operator(e)))
    if not {"relax.quantize", "relax.dequantize"} & set(names):
        return module
    return DeadCodeElimination()(_rewritten(_integer_mutator(), module))


def lowered(module: Any, chosen: Options) -> Any:
    """A module whose integer layers are the kernels of :mod:`.schedules.int8`; run after the layout was changed."""
    from tvm.relax.transform import DeadCodeElimination

    return DeadCodeElimination()(_rewritten(_lowering_mutator(), module, chosen))


def _rewritten(kind: Any, module: Any, *arguments: Any) -> Any:
    mutator = kind(module, *arguments)
    mutator.builder_.update_func(module.get_global_var("main"), mutator.visit_expr(module["main"]))
    return mutator.builder_.get()


def _operator(expr: Any) -> str:
    from tvm.ir import Op
    from tvm.relax import Call

    return expr.op.name if isinstance(expr, Call) and isinstance(expr.op, Op) else ""


def _is_constant(expr: Any) -> bool:
    from tvm.ir import GenericConst

    return isinstance(expr, GenericConst)


def _full(value: float | np.float32, rank: int, dtype: str) -> Any:
    """A constant with as many axes as what it is combined with, which a change of layout can pass."""
    from tvm import relax

    return relax.const(np.full((1,) * rank, value, dtype))


def _spread(extent: int, rank: int, axis: int) -> tuple[int, ...]:
    """A shape that is 1 but for one axis."""
    return tuple(extent if i == axis else 1 for i in range(rank))


def _per_channel(values: np.ndarray, rank: int, axis: int) -> Any:
    from tvm import relax

    return relax.const(np.ascontiguousarray(values.reshape(_spread(values.size, rank, axis))))


@functools.cache
def _base_mutator() -> type:
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator

    class Base(PyExprMutator):
        """Knows what each variable was bound to, and how often it is read."""

        def __init__(self, module: Any):
            super().__init__(module)
            self.bound: dict[Any, Any] = {}
            self.readers: Counter[Any] = Counter()

            def count(expr: Any) -> None:
                if isinstance(expr, relax.Call):
                    fields = list(expr.args)
                elif isinstance(expr, relax.Tuple):
                    fields = list(expr.fields)
                elif isinstance(expr, relax.TupleGetItem):
                    fields = [expr.tuple_value]
                else:
                    fields = [expr.body] if isinstance(expr, relax.SeqExpr) else []
                self.readers.update(f for f in fields if isinstance(f, relax.Var))

            relax.analysis.post_order_visit(module["main"], count)

        def value(self, expr: Any) -> Any:
            """What a variable is bound to, or the expression itself."""
            return self.bound.get(expr, expr) if isinstance(expr, relax.Var) else expr

        def visit_var_binding_(self, binding: Any) -> None:
            self.bound[binding.var] = binding.value
            new = self.replaced(binding)
            if new is None:
                super().visit_var_binding_(binding)
                return
            emit: Any = self.builder_.emit_output if not isinstance(binding.var, relax.DataflowVar) else None
            in_block = self.builder_.current_block_is_dataflow()
            made = (emit if emit and in_block else self.builder_.emit)(new, binding.var.name)
            self.set_var_remap(binding.var, made)

        def replaced(self, binding: Any) -> Any:
            """What to bind instead, or None."""
            raise NotImplementedError

    return Base


@functools.cache
def _integer_mutator() -> type:
    from tvm import relax
    from tvm.relax.expr_functor import mutator

    op = relax.op
    base: Any = _base_mutator()

    @mutator
    class Integers(base):
        """The rewrites of :func:`integers`."""

        def replaced(self, binding: Any) -> Any:
            call, var = binding.value, binding.var
            name = _operator(call)
            if name == "relax.quantize":
                return self.quantized(call)
            if name == "relax.dequantize":
                source = self.activation(var)
                return None if source is None else self.real(source, source.scale)
            found = self.sum_of(var)
            return None if found is None else self.scaled_layer(var, *found, np.float32(1))

        # -- recognition --

        def constant(self, expr: Any) -> np.ndarray | None:
            """The value of an expression of constants."""
            value = self.value(expr)
            if _is_constant(value):
                return value.value.numpy()
            name = _operator(value)
            inner = self.constant(value.args[0]) if name in ("relax.reshape", "relax.dequantize") else None
            if inner is None:
                return None
            if name == "relax.reshape":
                return inner.reshape([int(d) for d in value.ty.shape])
            scale, zero = self.constant(value.args[1]), self.constant(value.args[2])
            if scale is None or zero is None:
                return None
            if scale.size > 1:
                shape = _spread(scale.size, inner.ndim, int(value.attrs.axis) % inner.ndim)
                scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
            return (inner.astype(np.int64) - zero).astype(np.float32) * scale

        def activation(self, expr: Any) -> _Activation | None:
            """A dequantised activation of one scale."""
            call = self.value(expr)
            if _operator(call) != "relax.dequantize" or str(call.args[0].ty.dtype) not in _BYTES:
                return None
            if self.constant(call.args[0]) is not None:
                return None
            scale, zero = self.constant(call.args[1]), self.constant(call.args[2])
            if scale is None or zero is None or scale.size != 1 or zero.size != 1 or scale.dtype != np.float32:
                return None
            return _Activation(call.args[0], scale.reshape(-1)[0], int(zero.reshape(-1)[0]))

        def weights(self, expr: Any, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
            """Symmetric int8 weights and their scales, one, or one per index of ``axis``."""
            call = self.value(expr)
            if _operator(call) == "relax.permute_dims":
                rank = len(call.args[0].ty.shape)
                axes = [int(a) for a in call.attrs.axes] if call.attrs.axes is not None else list(range(rank))[::-1]
                found = self.weights(call.args[0], axes[axis])
                return None if found is None else (found[0].transpose(axes), found[1])
            if _operator(call) != "relax.dequantize":
                return None
            values, scale, zero = (self.constant(a) for a in call.args)
            if values is None or scale is None or zero is None or values.dtype != np.int8 or zero.any():
                return None
            along = int(call.attrs.axis) % values.ndim
            if scale.dtype != np.float32 or (scale.size > 1 and along != axis):
                return None
            return values, scale.reshape(-1)

        def layer(self, expr: Any) -> _Layer | None:
            """A convolution or product that integers can compute."""
            call = self.value(expr)
            name = _operator(call)
            if name not in ("relax.nn.conv2d", "relax.matmul") or str(call.ty.dtype) != "float32":
                return None
            source = self.activation(call.args[0])
            rank = len(call.args[1].ty.shape)
            axis = 0 if name == "relax.nn.conv2d" else 1
            found = self.weights(call.args[1], axis) if source and (axis == 0 or rank == 2) else None
            if source is None or found is None or len(call.args[0].ty.shape) < 2:
                return None
            weight, scale = found
            small = math.prod(weight.shape) // weight.shape[axis] * 255 * 128 <= int8.EXACT_IN_FLOAT
            narrow = weight.shape[axis] == 1
            if axis:
                return None if narrow else _Layer(call, source, weight, scale, len(call.ty.shape) - 1, False)
            groups, inner = int(call.attrs.groups), int(call.args[0].ty.shape[1])
            depthwise = groups > 1 and groups == inner == weight.shape[0]
            # A float convolution of one channel may be Winograd's, which does not add integers, unless it is 1x1.
            exact = small and (depthwise or weight.shape[2:] == (1, 1))
            if (groups > 1 and not depthwise) or ((narrow or depthwise) and not exact):
                return None
            return _Layer(call, source, weight, scale, 1, narrow or depthwise)

        def sum_of(self, expr: Any) -> tuple[Any, _Layer, np.ndarray | None] | None:
            """A layer's variable, the layer, and the int32 bias that is added to it, if any."""
            made = self.layer(expr)
            if made is not None:
                return expr, made, None
            call = self.value(expr)
            if _operator(call) != "relax.add":
                return None
            for one, other in (call.args, call.args[::-1]):
                made = self.layer(one) if self.readers[one] == 1 else None
                bias = self.bias(other, made) if made is not None else None
                if made is not None and bias is not None:
                    return one, made, bias
            return None

        def bias(self, expr: Any, made: _Layer) -> np.ndarray | None:
            """A constant per channel in steps of the layer's sum."""
            values, rank = self.constant(expr), len(made.call.ty.shape)
            channels = int(made.call.ty.shape[made.axis])
            if values is None or values.size not in (1, channels) or values.dtype != np.float32:
                return None
            if values.size > 1 and (1,) * (rank - values.ndim) + values.shape != _spread(channels, rank, made.axis):
                return None
            steps = np.rint(values.reshape(-1).astype(np.float64) / made.steps.astype(np.float64))
            return None if np.abs(steps).max() > _LARGEST_BIAS else steps.astype(np.int32)

        # -- what replaces it --

        def quantized(self, call: Any) -> Any:
            scale, zero = self.constant(call.args[1]), self.constant(call.args[2])
            dtype = str(call.ty.dtype)
            if scale is None or zero is None or scale.size != 1 or zero.size != 1 or dtype not in _BYTES:
                return None
            scale, zero = scale.reshape(-1)[0], int(zero.reshape(-1)[0])
            if returns_itself(scale, zero, dtype):
                moved = self.moved(call.args[0], _Activation(call, scale, zero))
                if moved is not None:
                    return moved
            rank, info = len(call.ty.shape), np.iinfo(dtype)
            steps = self.divided(call.args[0], scale)
            bounded = op.maximum(steps, _full(info.min - zero, rank, "float32"))
            bounded = op.round(op.minimum(bounded, _full(info.max - zero, rank, "float32")))
            return op.astype(op.add(bounded, _full(zero, rank, "float32")) if zero else bounded, dtype)

        def moved(self, expr: Any, like: _Activation) -> Any:
            """The integers of an expression that only moves dequantised integers of the same parameters, or None."""
            found = self.activation(expr)
            if found is not None:
                same = (found.scale, found.zero, found.dtype) == (like.scale, like.zero, like.dtype)
                return self.visit_expr(found.integers) if same else None
            call = self.value(expr)
            if isinstance(expr, relax.Var) and self.readers[expr] > 1:
                return None
            if isinstance(call, relax.TupleGetItem) and _operator(self.value(call.tuple_value)) == "relax.split":
                split = self.value(call.tuple_value)
                inner = self.moved(split.args[0], like)
                if inner is None:
                    return None
                return relax.TupleGetItem(self.emit(relax.Call(split.op, [inner], split.attrs), expr), call.index)
            if _operator(call) == "relax.concat":
                parts = self.value(call.args[0])
                if not isinstance(parts, relax.Tuple):
                    return None
                inners = [self.moved(f, like) for f in parts.fields]
                if any(i is None for i in inners):
                    return None
                return relax.Call(call.op, [relax.Tuple([self.emit(i, expr) for i in inners])], call.attrs)
            if _operator(call) not in _MOVES:
                return None
            inner = self.moved(call.args[0], like)
            return None if inner is None else relax.Call(call.op, [self.emit(inner, expr), *call.args[1:]], call.attrs)

        def emit(self, expr: Any, like: Any) -> Any:
            """Bind an expression to a variable that is called like another, which says whose node it belongs to."""
            if isinstance(expr, relax.Var):
                return expr
            return self.builder_.emit(expr, f"{like.name}_part" if isinstance(like, relax.Var) else "")

        def real(self, source: _Activation, scale: np.float32) -> Any:
            """``scale * (integers - zero)``."""
            rank = len(source.integers.ty.shape)
            value = op.astype(self.visit_expr(source.integers), "float32")
            if source.zero:
                value = op.subtract(value, _full(source.zero, rank, "float32"))
            return op.multiply(value, _full(scale, rank, "float32"))

        def divided(self, expr: Any, scale: np.float32) -> Any:
            """``expr / scale``, the division moved to the scales of what it is made of where it can."""
            found = self.pushed(expr, scale)
            if found is not None:
                return found
            return op.divide(self.visit_expr(expr), _full(scale, len(expr.ty.shape), "float32"))

        def pushed(self, expr: Any, scale: np.float32) -> Any:
            """``expr / scale`` without a division, or None."""
            source = self.activation(expr)
            if source is not None:
                return self.real(source, source.scale / scale)
            if not isinstance(expr, relax.Var) or self.readers[expr] > 1:
                return None
            found = self.sum_of(expr)
            if found is not None:
                return self.scaled_layer(expr, *found, scale)
            call = self.value(expr)
            name, rank = _operator(call), len(expr.ty.shape)
            if name in _HOMOGENEOUS:
                inner = self.pushed(call.args[0], scale)
                if inner is None:
                    return None
                return self.emit(relax.Call(call.op, [self.emit(inner, expr), *call.args[1:]], call.attrs), expr)
            if name == "relax.concat" and isinstance(parts := self.value(call.args[0]), relax.Tuple):
                inners = [self.pushed(f, scale) for f in parts.fields]
                if any(i is None for i in inners):
                    return None
                return self.emit(
                    relax.Call(call.op, [relax.Tuple([self.emit(i, expr) for i in inners])], call.attrs), expr
                )
            if name in ("relax.maximum", "relax.minimum", "relax.add"):
                parts = [self.term(a, scale, rank) for a in call.args]
                return None if any(p is None for p in parts) else self.emit(relax.Call(call.op, parts), expr)
            return None

        def term(self, expr: Any, scale: np.float32, rank: int) -> Any:
            value = self.constant(expr)
            if value is None:
                return self.pushed(expr, scale)
            value = (value / scale).astype(np.float32)
            return relax.const(np.ascontiguousarray(value.reshape((1,) * (rank - value.ndim) + value.shape)))

        def scaled_layer(
            self, var: Any, layer_var: Any, made: _Layer, bias: np.ndarray | None, scale: np.float32
        ) -> Any:
            """The real result of a layer and its bias, over ``scale``."""
            call, source, rank = made.call, made.source, len(made.call.ty.shape)
            kind = "float32" if made.floats else "int16"
            entry = op.astype(self.visit_expr(source.integers), kind)
            entry = op.subtract(entry, _full(source.zero, len(source.integers.ty.shape), kind))
            weight = relax.const(np.ascontiguousarray(made.weight.astype("float32" if made.floats else "int8")))
            if _operator(call) == "relax.matmul":
                total = op.matmul(entry, weight, out_dtype="int32")
            else:
                a = call.attrs
                total = op.nn.conv2d(
                    entry, weight, a.strides, a.padding, a.dilation, int(a.groups),
                    out_dtype="float32" if made.floats else "int32",
                )  # fmt: skip
            total = self.emit(total, layer_var)
            total = op.astype(total, "int32") if made.floats else total
            if bias is not None:
                total = self.emit(op.add(total, _per_channel(bias, rank, made.axis)), var)
            factor = _per_channel((made.steps / scale).astype(np.float32), rank, made.axis)
            return self.emit(op.multiply(op.astype(total, "float32"), factor), var)

    return Integers


@functools.cache
def _lowering_mutator() -> type:
    from tvm import relax
    from tvm.relax.expr_functor import mutator

    base: Any = _base_mutator()

    @mutator
    class Lowering(base):
        """The rewrite of :func:`lowered`."""

        def __init__(self, module: Any, chosen: Options):
            super().__init__(module)
            device = options.device(chosen)
            self.how, self.have = int8.dot(device), tile.vectors(device)

        def replaced(self, binding: Any) -> Any:
            call = binding.value
            name = _operator(call)
            if name not in ("relax.nn.conv2d", "relax.matmul") or str(call.ty.dtype) != "int32":
                return None
            weight = call.args[1]
            if not _is_constant(weight) or (source := self.source(call.args[0])) is None:
                return None
            x, zero = source
            return int8.kernel(self.builder_, call, x, zero, weight.value.numpy(), self.how, self.have)

        def source(self, expr: Any) -> tuple[Any, int] | None:
            """The bytes that were widened, and their zero point, which was subtracted."""
            axes, zero, value = [], None, self.value(expr)
            while _operator(value) in ("relax.permute_dims", "relax.subtract"):
                if _operator(value) == "relax.subtract":
                    zero = value.args[1]
                else:
                    axes.append(value.attrs.axes)
                value = self.value(value.args[0])
            if zero is None or not _is_constant(zero) or _operator(value) != "relax.astype":
                return None
            x = self.visit_expr(value.args[0])
            for order in reversed(axes):
                x = self.builder_.emit(relax.op.permute_dims(x, order))
            return x, int(zero.value.numpy().reshape(-1)[0])

    return Lowering
