"""Activations without calls: exp, sigmoid, SiLU and GELU as polynomials, which vectorise where calls of libm do not.

exp: range reduction by ln 2 and the minimax polynomial of degree 6 of the Cephes library (Moshier, Methods and Programs
for Mathematical Functions, 1989), relative error below 2e-7. erf: Abramowitz and Stegun, Handbook of Mathematical
Functions, 7.1.26, absolute error below 5e-7 in float32. Arguments of exp beyond float32's range saturate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgecompile.targets.tvm.schedules.tile import Vectors

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_P = 0.3275911
_LARGEST, _SMALLEST = 88.0, -87.0


def _number(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    value = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _number(coefficient)
    return value


def exp(x: Any) -> Any:
    """``e ** x``; no value has a name of its own, since a kernel that inlines this twice may not define one twice."""
    from tvm import tirx

    x = tirx.max(tirx.min(x, _number(_LARGEST)), _number(_SMALLEST))
    n = tirx.floor(x * _number(_LOG2_E) + _number(0.5))
    r = x - n * _number(_LN2_HIGH) - n * _number(_LN2_LOW)
    exponent: Any = tirx.Cast("int32", n) + 127
    power = tirx.reinterpret("float32", exponent << 23)
    return (_polynomial(_EXP, r) * r * r + r + _number(1.0)) * power


def sigmoid(x: Any) -> Any:
    """``1 / (1 + e ** -x)``."""
    return _number(1.0) / (_number(1.0) + exp(_number(0.0) - x))


def silu(x: Any) -> Any:
    """``x sigmoid(x)``."""
    return x * sigmoid(x)


def erf(x: Any) -> Any:
    """The error function."""
    from tvm import tirx

    size = tirx.abs(x)
    t = _number(1.0) / (_number(1.0) + _number(_ERF_P) * size)
    positive = _number(1.0) - _polynomial(_ERF, t) * t * exp(_number(0.0) - size * size)
    return tirx.Select(x < _number(0.0), _number(0.0) - positive, positive)


def gelu(x: Any) -> Any:
    """``x (1 + erf(x / sqrt 2)) / 2``."""
    return x * _number(0.5) * (_number(1.0) + erf(x * _number(0.5**0.5)))


_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "relax.exp": exp,
    "relax.sigmoid": sigmoid,
    "relax.erf": erf,
    "relax.nn.silu": silu,
    "relax.nn.gelu": gelu,
}
OPERATORS = tuple(_FUNCTIONS)


def legalize(bb: Any, call: Any, have: Vectors) -> Any:
    """An activation of float32 as a function above, or None where it has another type."""
    from tvm import te

    function = _FUNCTIONS[call.op.name]
    if call.args[0].ty.dtype != "float32":
        return None
    name = call.op.name.rpartition(".")[2]
    return bb.call_te(
        lambda x: te.compute(x.shape, lambda *i: function(x(*i)), name=name), call.args[0], primfunc_name_hint=name
    )
