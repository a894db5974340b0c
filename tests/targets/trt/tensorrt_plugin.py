"""A module that passes for ``tensorrt.plugin``: what the target uses of it, as strict about what a plugin declares.

Expressions are whole numbers here, since every extent is known. What the real module makes of the same plugins is
tested where its wheel can be had.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from typing import Any

import numpy as np
import onnx


class ShapeExpr(int):
    def __add__(self, other):
        return ShapeExpr(int(self) + other)

    def __sub__(self, other):
        return ShapeExpr(int(self) - other)

    def __mul__(self, other):
        return ShapeExpr(int(self) * other)

    def __floordiv__(self, other):
        return ShapeExpr(int(self) // other)


class ShapeExprs(list):
    def numel(self):
        return ShapeExpr(math.prod(self))


class TensorDesc:
    def __init__(self, shape_expr, dtype):
        self.shape_expr, self.dtype = ShapeExprs(map(ShapeExpr, shape_expr)), dtype

    @property
    def ndim(self):
        return len(self.shape_expr)


class SymInt32(int):
    pass


class SymIntExprs(list):
    def __init__(self, length):
        super().__init__([None] * length)

    def __setitem__(self, index, value):
        assert isinstance(value, SymInt32)
        super().__setitem__(index, value)


class KernelLaunchParams:
    _NAMES = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self):
        self.__dict__.update({name: int(name != "shared_mem") for name in self._NAMES})

    def __setattr__(self, name, value):
        if name not in self._NAMES:
            raise AttributeError(f"KernelLaunchParams object has no attribute {name!r}")
        assert isinstance(value, int)
        self.__dict__[name] = int(value)


def cdiv(first, second):
    assert isinstance(first, ShapeExpr) or isinstance(second, ShapeExpr), "both arguments cannot be plain numbers"
    return ShapeExpr(-(-int(first) // int(second)))


def from_shape_expr(shape_expr, dtype):
    assert isinstance(shape_expr, tuple)
    return TensorDesc(shape_expr, dtype)


class _Definition:
    def __init__(self, described, tensors, attributes):
        self.described, self.tensors, self.attributes, self.implemented = described, tensors, attributes, None


def make(trt: Any) -> Any:
    """The module for one double of ``tensorrt``."""
    module: Any = types.ModuleType("tensorrt.plugin")
    for item in (ShapeExpr, TensorDesc, SymInt32, SymIntExprs, KernelLaunchParams, cdiv, from_shape_expr):
        setattr(module, item.__name__, item)
    module.op, module._registry = types.SimpleNamespace(), {}

    def register(plugin_id, lazy_register=False):
        space, name = plugin_id.split("::")
        if "." in space + name or space in ("", "trt", "tensorrt", "std"):
            raise ValueError(f"the namespace {space} or the name {name} is not allowed")

        def decorate(function):
            if plugin_id in module._registry:
                raise ValueError(f"{plugin_id} already has a definition")
            tensors, attributes = [], {}
            signature = inspect.signature(function)
            for label, parameter in signature.parameters.items():
                kind = parameter.annotation
                if parameter.default is not parameter.empty or kind is parameter.empty:
                    raise ValueError(f"{label} has no type, or a default")
                reserved = label in ("outputs", "stream", "tactic")
                if kind is TensorDesc and not attributes:
                    tensors.append(label)
                elif typing.get_origin(kind) is np.ndarray and tensors and not reserved:
                    attributes[label] = kind
                else:
                    raise ValueError(f"argument {label}: {kind}")
            if signature.return_annotation is not TensorDesc:
                raise ValueError(f"returns {signature.return_annotation}")
            module._registry[plugin_id] = _Definition(function, tensors, attributes)
            spaces = vars(module.op).setdefault(space, types.SimpleNamespace())
            setattr(spaces, name, module._registry[plugin_id])
            return function

        return decorate

    def aot_impl(plugin_id):
        if plugin_id not in module._registry:
            raise ValueError(f"plugin {plugin_id} is not registered")

        def decorate(function):
            definition, signature = module._registry[plugin_id], inspect.signature(function)
            wanted = [*definition.tensors, *definition.attributes, "outputs", "tactic"]
            if list(signature.parameters) != wanted:
                raise ValueError(f"{list(signature.parameters)} is not {wanted}")
            for label, parameter in signature.parameters.items():
                if definition.attributes.get(label, parameter.annotation) != parameter.annotation:
                    raise ValueError(f"{label} has another type than at registration")
            returns = signature.return_annotation
            kinds = typing.get_args(returns)
            if typing.get_origin(returns) is not tuple or kinds[2:] != (KernelLaunchParams, SymIntExprs):
                raise ValueError(f"returns {returns}")
            if any(kind not in (str, bytes) for kind in kinds[:2]):
                raise ValueError(f"returns {returns}")
            definition.implemented = function
            return function

        return decorate

    module.register, module.aot_impl = register, aot_impl
    return module


def compiled(definition: Any, node: onnx.NodeProto, given: dict[str, Any], model: onnx.ModelProto) -> dict[str, Any]:
    """What the builder puts into an engine for a plugin node: kernel, grid and scalar arguments."""
    known = {w.name: (list(w.dims), w.data_type) for w in model.graph.initializer}
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = info.type.tensor_type
        known[info.name] = ([d.dim_value for d in kind.shape.dim], kind.elem_type)
    assert len(node.input) == len(definition.tensors), "a plugin gets the tensors that it declares"
    inputs = [TensorDesc(*known[name]) for name in node.input]
    allowed = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT32)
    assert all(t.dtype in allowed for t in inputs), "constants of other types are widened"
    attributes = {name: np.asarray(given[name], np.int32) for name in definition.attributes}
    output = definition.described(*inputs, **attributes)
    if node.output[0] in known:
        assert (list(output.shape_expr), output.dtype) == known[node.output[0]]
    assert definition.implemented is not None, "there is no AOT implementation"
    entry, ptx, launch, arguments = definition.implemented(*inputs, *attributes.values(), (output,), 0)
    assert isinstance(entry, str) and isinstance(ptx, bytes) and f".entry {entry}(".encode() in ptx
    assert isinstance(launch, KernelLaunchParams) and isinstance(arguments, SymIntExprs)
    return {"node": node.name, "launch": dict(vars(launch)), "arguments": [int(a) for a in arguments]}
