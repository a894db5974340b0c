"""Frozen dataclasses as JSON documents and back, strictly: a field too few or too many is an error.

JSON has no infinity: numbers that are not finite are the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

# Class -> names that are written for readers, and how they follow from the rest; they are not read back.
Derived = Mapping[type, Mapping[str, Callable[[Any], Any]]]

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class Malformed(ValueError):
    """A document does not have the form of the dataclass."""


def encode(value: Any, derived: Derived) -> Any:
    """``value`` (dataclasses, mappings, sequences, numpy scalars) as what :mod:`json` can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        extra = {name: follow(value) for name, follow in derived.get(type(value), {}).items()}
        return encode(extra | {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, derived)
    if isinstance(value, Mapping):
        return {str(k): encode(v, derived) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v, derived) for v in value]
    item = getattr(value, "item", None)  # of a numpy scalar; importing numpy would make `--help` slow
    value = item() if callable(item) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def decode(kind: Any, value: Any, place: str, derived: Derived) -> Any:
    """Make ``value`` what the annotation ``kind`` says; ``place`` is how errors name it.

    Raises:
        Malformed: it is something else.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _decode_union(arguments, value, place, derived)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _decode_fields(kind, value, place, derived)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], v, f"{place}[{i}]", derived) for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {k: decode(arguments[1], v, f"{place}.{k}", derived) for k, v in value.items()}
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, int, bool, type(None)) and type(value) is kind:
        return value
    raise Malformed(f"{place} should be {getattr(kind, '__name__', kind)}")


def _decode_fields(kind: Any, value: Mapping[str, Any], place: str, derived: Derived) -> Any:
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    if wrong := (value.keys() - derived.get(kind, {}).keys()) ^ names:
        raise Malformed(f"{place} lacks or should not have {', '.join(sorted(wrong))}")
    return kind(**{name: decode(hints[name], value[name], f"{place}.{name}", derived) for name in names})


def _decode_union(kinds: tuple[Any, ...], value: Any, place: str, derived: Derived) -> Any:
    reasons = []
    for kind in kinds:
        try:
            return decode(kind, value, place, derived)
        except Malformed as error:
            reasons.append(str(error))
    raise Malformed(reasons[0])
