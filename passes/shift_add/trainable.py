"""Fine-tuning: the operators of the pass as torch modules with a straight-through estimator.

A layer keeps a float weight W beside its codes. Forward it computes with the level nearest to each weight, ``Q(W)``;
backward it passes the gradient of ``Q(W)`` to W unchanged. The levels, which are the scales of the codes, stay as they
are, so that what was trained goes back into the graph without another search, bit for bit.

Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013, section 4; used for shifts
by Elhoushi et al., DeepShift, CVPR Workshops 2021, section 4.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompile.functions import CODED
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops
from edgecompile.torch_graph import TorchGraph


class CodedLayer(nn.Module):
    """A linear layer or 1x1 convolution whose weights are coded.

    Args:
        graph: holds the constants of ``node``.
        node: one of the operators of :mod:`~edgecompile.passes.shift_add.ops` with a matrix of weights.
    """

    levels: Tensor
    codes: Tensor
    middles: Tensor

    def __init__(self, graph: Graph, node: gs.Node):
        super().__init__()
        coded = read(graph, node)
        order = np.argsort(coded.levels, 2, kind="stable")
        levels = np.take_along_axis(coded.levels, order, 2)
        self.weight = nn.Parameter(torch.from_numpy(coded.decode()))
        self.register_buffer("levels", torch.from_numpy(levels))
        self.register_buffer("codes", torch.from_numpy(order.astype(np.uint8)))
        self.register_buffer("middles", torch.from_numpy((levels[:, :, 1:] + levels[:, :, :-1]) / 2))
        self.group, self.bits, self.strides = coded.group, coded.bits, node.attrs.get("strides")

    def _nearest(self) -> Tensor:
        """Place of the nearest level among the levels of each weight, in their order: ``[rows, groups, group]``."""
        rows, columns = self.weight.shape
        groups = self.middles.shape[1]
        # The last group may be shorter than the others.
        whole = F.pad(self.weight.detach(), (0, groups * self.group - columns)).reshape(rows, groups, self.group)
        return torch.searchsorted(self.middles, whole.contiguous())

    def _flat(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1)[:, : self.weight.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        coded = self._flat(self.levels.gather(2, self._nearest()))
        weight = self.weight + (coded - self.weight).detach()
        if self.strides is None:
            return F.linear(x, weight)
        return F.conv2d(x, weight[:, :, None, None], stride=list(self.strides))

    def store(self, graph: Graph, node: gs.Node) -> None:
        """Write the codes into the node."""
        found = self._flat(self.codes.gather(2, self._nearest())).cpu().numpy()
        old = node.inputs[1]
        node.inputs[1] = gs.Constant(old.name, codes.pack(found, self.bits))


class BinaryAttention(nn.Module):
    """Attention with binary queries and keys.

    Backward, ``b(x)`` has the gradient of the normalised x clamped to [0, 1], as in the authors' code.

    Args:
        graph: holds the constants of ``node``.
        node: one of the operators of :mod:`~edgecompile.passes.shift_add.ops` for attention.
    """

    def __init__(self, graph: Graph, node: gs.Node):
        super().__init__()
        self.angular, self.known = node.op == "BinaryAngularAttention", set()
        for position, tensor in enumerate(node.inputs):
            if (values := graph.constant(tensor)) is not None:
                self.register_buffer(f"input{position}", torch.from_numpy(np.array(values)))
                self.known.add(position)
        self.count = len(node.inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Apply the attention to the inputs that are not constant."""
        rest = iter(inputs)
        q, k, v, q_least, k_least, *others = [
            getattr(self, f"input{i}") if i in self.known else next(rest) for i in range(self.count)
        ]
        q, k = _binary(q, q_least), _binary(k, k_least)
        if self.angular:
            y = 0.5 * v + (q @ (k.mT @ v)) / math.pi
            return y / y.square().sum(-1, keepdim=True).sqrt()
        scale, bias = others
        return (q @ k.mT * scale + bias).softmax(-1) @ v

    def store(self, graph: Graph, node: gs.Node) -> None:
        """Nothing: it has no weights."""


def _binary(x: Tensor, least: Tensor) -> Tensor:
    unit = x / x.square().sum(-1, keepdim=True).sqrt()
    clipped = unit.clamp(0, 1)
    return (unit > least).to(x.dtype).detach() + clipped - clipped.detach()


def read(graph: Graph, node: gs.Node) -> codes.Coded:
    """The codes of an operator with a matrix of weights."""
    planes, exponents, *levels = (np.asarray(graph.constant(t)) for t in node.inputs[1:])
    columns, group = int(node.attrs["columns"]), int(node.attrs["group"])
    found = codes.unpack(planes, columns)
    if node.op.startswith("BinaryCoded"):
        return codes.Coded("binary", len(planes), found, exponents, group)
    kind = next(k for k in ("pot", "sp2") if len(planes) in codes.WIDTHS[k] and _same(k, levels[0]))
    return codes.Coded(kind, len(planes), found, exponents, group)


def _same(kind: str, levels: np.ndarray) -> bool:
    return np.array_equal(codes.book(kind, int(np.log2(len(levels)))), levels)


def to_torch(graph: Graph) -> TorchGraph:
    """The module of a rewritten graph: coded layers with a straight-through estimator, everything else as it is.

    Train it, and ``to_graph()`` gives the graph with the trained weights and codes.

    Args:
        graph: after the pass ``shift_add``. Its batch may be 1: the module takes any.

    Raises:
        InputError: an operator of the graph is none that torch computes here.
    """
    return TorchGraph(
        graph, {(ops.DOMAIN, name): CodedLayer if name in CODED else BinaryAttention for name in ops.NAMES}
    )
