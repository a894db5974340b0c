"""A graph as a torch module with trainable weights: fine-tune what the passes made, and write the weights back.

Every operator below is a line of torch; what gradients flow through is what the graph computes, after every rewrite, so
that a fine-tuned network needs no second export and no second run of the passes. Operators of other domains come from
the pass that makes them, as modules that read a node and write it back.

A graph of batch 1 takes any batch: it is mapped over the samples (``torch.vmap``), which is what a fixed ``Reshape`` to
batch 1 means for each of them.

Source: the ONNX operator specification (https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from edgecompile.errors import InputError
from edgecompile.graph import Graph, where


class Layer(Protocol):
    """An operator of another domain, an ``nn.Module``; it has read the node's constant inputs when it is called."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The node's output, given its inputs that are not constant."""
        ...

    def store(self, graph: Graph, node: gs.Node) -> None:
        """Write what was trained into the node's constants."""
        ...


Reader = Callable[[Graph, gs.Node], Layer]


class TorchGraph(nn.Module):
    """A graph, computed by torch.

    ``forward`` takes the model's inputs in their order and returns its output, or a tuple of them. Floating-point
    initializers of more than one element are parameters, named as in the graph with dots replaced; other constants are
    buffers or plain numbers.

    Args:
        graph: the graph; :meth:`to_graph` writes into a copy of it.
        layers: readers of operators by (domain, operator type).

    Raises:
        InputError: an operator is not among those that torch computes here; all of them are named.
    """

    def __init__(self, graph: Graph, layers: Mapping[tuple[str, str], Reader] | None = None):
        super().__init__()
        self._graph = graph.copy()
        self._graph.tidy()
        layers = layers or {}
        unknown = [
            n for n in self._graph.nodes if (n.domain or "", n.op) not in layers and (n.domain or n.op not in OPS)
        ]
        if unknown:
            listed = ", ".join(sorted({f"{n.op} at {where(n)}" for n in unknown}))
            raise InputError("the graph cannot be trained", f"torch does not compute here: {listed}")
        self._keys: dict[int, str] = {}
        self._values: dict[int, Any] = {}
        self._variable: dict[str, list[Any]] = {}
        self.layers = nn.ModuleDict()
        for node in self._graph.nodes:
            if reader := layers.get((node.domain or "", node.op)):
                self.layers[_key(node.name)] = reader(self._graph, node)  # type: ignore[assignment]
                self._variable[_key(node.name)] = [t for t in node.inputs if self._graph.constant(t) is None]
                continue
            for position, tensor in enumerate(node.inputs):
                if (values := self._graph.constant(tensor)) is not None and id(tensor) not in self._keys:
                    self._adopt(node, position, tensor, values)

    def _adopt(self, node: gs.Node, position: int, tensor: Any, values: np.ndarray) -> None:
        if position in _STATIC.get(node.op, ()) or (values.dtype.kind in "iub" and node.op not in _TENSORS):
            self._values[id(tensor)] = values.tolist()
            return
        key = _key(tensor.name)
        data = torch.from_numpy(np.array(values))
        if values.dtype == np.float32 and values.size > 1:
            self.register_parameter(key, nn.Parameter(data))
        else:
            self.register_buffer(key, data)
        self._keys[id(tensor)] = key

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the outputs.

        Raises:
            InputError: the number of inputs is wrong.
        """
        ports = self._graph.inputs
        if len(inputs) != len(ports):
            raise InputError(f"{len(inputs)} inputs were given", f"the model has {len(ports)}")
        fixed = all(t.shape and t.shape[0] == 1 for t in ports)
        if fixed and inputs[0].shape[0] != 1:
            found = torch.vmap(self._alone)(*inputs)
            found = tuple(y.squeeze(1) for y in found)
        else:
            found = self._run(inputs)
        return found[0] if len(found) == 1 else tuple(found)

    def _alone(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for one sample, given without its batch axis."""
        return self._run([x.unsqueeze(0) for x in inputs])

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values: dict[int, Any] = dict(zip(map(id, self._graph.inputs), inputs, strict=True))

        def value(tensor: Any) -> Any:
            key = id(tensor)
            if key in values:
                return values[key]
            if key in self._keys:
                return getattr(self, self._keys[key])
            return self._values.get(key)

        for node in self._graph.nodes:
            if _key(node.name) in self.layers:
                found = self.layers[_key(node.name)](*map(value, self._variable[_key(node.name)]))
            else:
                found = OPS[node.op](node, *map(value, node.inputs))
            if len(node.outputs) == 1 and not isinstance(found, (list, tuple)):
                values[id(node.outputs[0])] = found
            else:
                values.update(zip(map(id, node.outputs), found, strict=False))
        return tuple(map(value, self._graph.outputs))

    def to_graph(self) -> Graph:
        """The graph with the weights as they are now."""
        graph = self._graph.copy()
        for old, new in zip(self._graph.nodes, graph.nodes, strict=True):
            if _key(old.name) in self.layers:
                self.layers[_key(old.name)].store(graph, new)  # type: ignore[operator]
                continue
            for position, tensor in enumerate(old.inputs):
                key = self._keys.get(id(tensor))
                if key is not None and isinstance(parameter := getattr(self, key), nn.Parameter):
                    trained = gs.Constant(tensor.name, parameter.detach().cpu().numpy().copy())
                    new.inputs[position] = trained
        return graph


def _key(name: str) -> str:
    return name.replace(".", "_") or "_"


# -- operators ---------------------------------------------------------------------------------------------------------


def _pair(pads: Sequence[int] | None, rank: int) -> tuple[list[int], list[int]]:
    pads = list(pads or [0] * 2 * rank)
    return pads[:rank], pads[rank:]


def _padded(node: gs.Node, x: Tensor, fill: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input with what torch cannot pad by itself, and what is left for it."""
    rank = x.ndim - 2
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise InputError("automatic padding is not computed here", where(node), "run the pass clean first")
    small, large = _pair(node.attrs.get("pads"), rank)
    if small == large:
        return x, small
    both = [n for pair in zip(reversed(small), reversed(large), strict=True) for n in pair]
    return F.pad(x, both, value=fill), [0] * rank


def _window(node: gs.Node, rank: int) -> dict[str, Any]:
    return {
        "stride": list(node.attrs.get("strides") or [1] * rank),
        "dilation": list(node.attrs.get("dilations") or [1] * rank),
    }


def _conv(node: gs.Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x, pads = _padded(node, x)
    call = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return call(x, w, b, padding=pads, groups=node.attrs.get("group", 1), **_window(node, x.ndim - 2))


def _conv_transpose(node: gs.Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    small, large = _pair(node.attrs.get("pads"), rank)
    extra = list(node.attrs.get("output_padding") or [0] * rank)
    if "output_shape" in node.attrs or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        raise InputError("automatic padding is not computed here", where(node), "run the pass clean first")
    extra = [e + s - n for e, s, n in zip(extra, small, large, strict=True)]
    call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    group = node.attrs.get("group", 1)
    return call(x, w, b, padding=small, output_padding=extra, groups=group, **_window(node, rank))


def _max_pool(node: gs.Node, x: Tensor) -> Tensor:
    x, pads = _padded(node, x, -math.inf)
    kernel, ceil = node.attrs["kernel_shape"], bool(node.attrs.get("ceil_mode", 0))
    return F.max_pool2d(x, kernel, padding=pads, ceil_mode=ceil, **_window(node, 2))


def _average_pool(node: gs.Node, x: Tensor) -> Tensor:
    counted = bool(node.attrs.get("count_include_pad", 0))
    small, large = _pair(node.attrs.get("pads"), 2)
    if small != large and not counted:
        raise InputError("an average over uneven padding is not computed here", where(node))
    x, pads = _padded(node, x)
    stride, ceil = list(node.attrs.get("strides") or [1, 1]), bool(node.attrs.get("ceil_mode", 0))
    return F.avg_pool2d(x, node.attrs["kernel_shape"], stride, pads, ceil, counted)


def _gemm(node: gs.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.mT if node.attrs.get("transA", 0) else a
    b = b.mT if node.attrs.get("transB", 0) else b
    y = node.attrs.get("alpha", 1.0) * (a @ b)
    return y if c is None else y + node.attrs.get("beta", 1.0) * c


def _batch_norm(node: gs.Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    factor = scale * torch.rsqrt(var + node.attrs.get("epsilon", 1e-5))
    return x * factor.reshape(shape) + (shift - mean * factor).reshape(shape)


def _layer_norm(node: gs.Node, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    axis = node.attrs.get("axis", -1) % x.ndim
    y = F.layer_norm(x, x.shape[axis:], eps=node.attrs.get("epsilon", 1e-5)) * scale
    return y if shift is None else y + shift


def _group_norm(node: gs.Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    groups = node.attrs["num_groups"]
    # One number per group before opset 21, per channel since.
    factor = x.shape[1] // scale.numel()
    scale, shift = scale.repeat_interleave(factor), shift.repeat_interleave(factor)
    return F.group_norm(x, groups, scale, shift, node.attrs.get("epsilon", 1e-5))


def _instance_norm(node: gs.Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + node.attrs.get("epsilon", 1e-5))
    shape = [1, -1] + [1] * (x.ndim - 2)
    return y * scale.reshape(shape) + shift.reshape(shape)


def _reshape(node: gs.Node, x: Tensor, shape: Any) -> Tensor:
    wanted = _ints(shape)
    if not node.attrs.get("allowzero", 0):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def _ints(values: Any) -> list[int]:
    """A shape or list of axes: constant, or computed by the graph."""
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _axes(node: gs.Node, given: Any, rank: int) -> list[int]:
    axes = node.attrs.get("axes") if given is None else _ints(given)
    return [a % rank for a in (range(rank) if axes is None else axes)]


def _reduce(call: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(node: gs.Node, x: Tensor, axes: Any = None) -> Tensor:
        found = node.attrs.get("axes") if axes is None else _ints(axes)
        if not found and node.attrs.get("noop_with_empty_axes", 0):
            return x
        return call(x, [a % x.ndim for a in found or range(x.ndim)], bool(node.attrs.get("keepdims", 1)))

    return run


def _unsqueeze(node: gs.Node, x: Any, axes: Any = None) -> Tensor:
    x = _tensor(x)
    found = node.attrs.get("axes") if axes is None else _ints(axes)
    rank = x.ndim + len(found)
    for axis in sorted(a % rank for a in found):
        x = x.unsqueeze(axis)
    return x


def _squeeze(node: gs.Node, x: Any, axes: Any = None) -> Tensor:
    x = _tensor(x)
    if axes is None and node.attrs.get("axes") is None:
        return x.squeeze()
    return x.squeeze(tuple(_axes(node, axes, x.ndim)))


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x)


def _split(node: gs.Node, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    axis = node.attrs.get("axis", 0)
    given = node.attrs.get("split") if sizes is None else _ints(sizes)
    if given is None:
        count = node.attrs.get("num_outputs", len(node.outputs))
        return x.split(-(-x.shape[axis] // count), axis)
    return x.split(list(given), axis)


def _slice(node: gs.Node, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    x, first, last = _tensor(x), _ints(starts), _ints(ends)
    along = list(range(len(first))) if axes is None else _ints(axes)
    pace = [1] * len(first) if steps is None else _ints(steps)
    for start, end, axis, step in zip(first, last, along, pace, strict=True):
        if step < 0:
            chosen = range(x.shape[axis])[slice(start, None if end < -x.shape[axis] else end, step)]
            x = x.index_select(axis, torch.tensor(list(chosen), device=x.device))
        else:
            cut = [slice(None)] * x.ndim
            cut[axis] = slice(start, min(end, x.shape[axis]), step)
            x = x[tuple(cut)]
    return x


def _gather(node: gs.Node, x: Any, indices: Any) -> Tensor:
    x, axis = _tensor(x), node.attrs.get("axis", 0)
    index = _tensor(indices).to(x.device)
    found = x.index_select(axis, index.reshape(-1) % x.shape[axis])
    axis %= x.ndim
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _clip(node: gs.Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return x.clamp(node.attrs.get("min") if low is None else low, node.attrs.get("max") if high is None else high)


def _pad(node: gs.Node, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    amounts = list(node.attrs.get("pads") or []) if pads is None else _ints(pads)
    along = list(range(x.ndim)) if axes is None else [a % x.ndim for a in _ints(axes)]
    per_axis = [(0, 0)] * x.ndim
    for i, axis in enumerate(along):
        per_axis[axis] = (amounts[i], amounts[i + len(along)])
    mode = node.attrs.get("mode", "constant")
    fill = node.attrs.get("value", 0.0) if value is None else float(_tensor(value))
    if mode == "constant":
        return F.pad(x, [n for pair in reversed(per_axis) for n in pair], value=fill)
    inner = [n for pair in reversed(per_axis[2:]) for n in pair]
    return F.pad(x, inner, mode={"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


def _resize(node: gs.Node, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    how, place = node.attrs.get("mode", "nearest"), node.attrs.get("coordinate_transformation_mode", "half_pixel")
    spatial = _ints(sizes)[2:] if sizes is not None else None
    factors = None if spatial is not None else [float(s) for s in _tensor(scales).tolist()][2:]
    whole = factors is None or all(f == int(f) for f in factors)
    if how == "nearest" and whole and (place == "asymmetric" or node.attrs.get("nearest_mode") != "ceil"):
        return F.interpolate(x, size=spatial, scale_factor=factors, mode="nearest")
    if how == "linear" and place in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(x, spatial, factors, "bilinear", align_corners=place == "align_corners")
    raise InputError(f"Resize by {how} and {place} is not computed here", where(node))


def _depth_to_space(node: gs.Node, x: Tensor) -> Tensor:
    block = node.attrs["blocksize"]
    if node.attrs.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


def _softmax(node: gs.Node, x: Tensor) -> Tensor:
    return x.softmax(node.attrs.get("axis", -1))


def _flatten(node: gs.Node, x: Tensor) -> Tensor:
    axis = node.attrs.get("axis", 1) % (x.ndim + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _cast(node: gs.Node, x: Any) -> Tensor:
    number = helper.tensor_dtype_to_np_dtype(node.attrs["to"])
    return _tensor(x).to(torch.from_numpy(np.zeros(0, number)).dtype)


def _shape(node: gs.Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape))[node.attrs.get("start", 0) : node.attrs.get("end")]


def _concat(node: gs.Node, *parts: Any) -> Tensor:
    return torch.cat([_tensor(p) for p in parts], node.attrs["axis"])


def _constant_of_shape(node: gs.Node, shape: Any) -> Tensor:
    value = node.attrs.get("value")
    fill = 0.0 if value is None else np.asarray(getattr(value, "values", value)).reshape(-1)[0].item()
    return torch.full(_ints(shape), fill)


def _divide(node: gs.Node, a: Any, b: Any) -> Tensor:
    a, b = _tensor(a), _tensor(b)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _of_two(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, a, b: call(_tensor(a), _tensor(b))


def _of_one(call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: call(_tensor(x))


def _fold(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(node: gs.Node, first: Any, *others: Any) -> Tensor:
        result = _tensor(first)
        for other in others:
            result = call(result, _tensor(other))
        return result

    return run


OPS: dict[str, Callable[..., Any]] = {
    "Abs": _of_one(torch.abs),
    "Add": _of_two(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Equal": _of_two(torch.eq),
    "Erf": _of_one(torch.erf),
    "Exp": _of_one(torch.exp),
    "Expand": lambda node, x, shape: _tensor(x) * torch.ones(_ints(shape), dtype=_tensor(x).dtype),
    "Flatten": _flatten,
    "Floor": _of_one(torch.floor),
    "Gather": _gather,
    "Gelu": lambda node, x: F.gelu(x, approximate=node.attrs.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "Greater": _of_two(torch.gt),
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda node, x: (node.attrs.get("alpha", 0.2) * x + node.attrs.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda node, x: F.hardswish(x),
    "Identity": lambda node, x: x,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, x: F.leaky_relu(x, node.attrs.get("alpha", 0.01)),
    "Less": _of_two(torch.lt),
    "Log": _of_one(torch.log),
    "MatMul": _of_two(torch.matmul),
    "Max": _fold(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _fold(torch.minimum),
    "Mul": _of_two(torch.mul),
    "Neg": _of_one(torch.neg),
    "PRelu": lambda node, x, slope: torch.where(x < 0, x * slope, x),
    "Pad": _pad,
    "Pow": _of_two(torch.pow),
    "Reciprocal": _of_one(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "Relu": _of_one(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _of_one(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _of_one(F.softplus),
    "Split": _split,
    "Sqrt": _of_one(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of_two(torch.sub),
    "Sum": _fold(torch.add),
    "Tanh": _of_one(torch.tanh),
    "Transpose": lambda node, x: x.permute(*(node.attrs.get("perm") or reversed(range(x.ndim)))),
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, c, a, b: torch.where(_tensor(c), _tensor(a), _tensor(b)),
}
# Inputs that are shapes, axes or bounds, by operator: never trained, whatever their type.
_STATIC = {
    "Clip": (1, 2),
    "Pad": (1, 2, 3),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Reshape": (1,),
    "Expand": (1,),
}
# Operators of which integer constants are data.
_TENSORS = ("Gather", "Where", "Equal", "Greater", "Less", "Add", "Sub", "Mul", "Div", "Concat", "Cast", "Max", "Min")
