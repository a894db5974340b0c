"""A plan applied to the torch module that the graph came from, so that it can be trained further and built again.

The module is exported once more, without the exporter's own rewrites, which gives a graph whose parameters are those of
the module. The plan says what stays of the tensors that the model computes; those of them that the passes before the
cut have left alone are in this graph too, by name, and determine its cut (:meth:`~.dependency.Groups.keep`). So a plan
for merged layers is found again in the branches that they were merged from.

Which elements of a parameter stay is not told from names and axes: every element is given a bit pattern of its own, as
if it were a float, and the patterns left in the cut graph are the elements that stay, however the graph transposes,
reshapes or picks from them on the way.

Two forms of the result:

- *module*: a copy of the module, its parameters and buffers cut and the widths that torch's own layers store
  (:data:`ATTRIBUTES`) corrected. Modules whose ``forward`` writes a width into the code or stores it elsewhere (sizes
  of a split, ``heads``) cannot follow. Whether they do is not guessed: the copy must compute what the cut graph
  computes.
- *graph*: the cut graph as a :class:`edgecompile.torch_graph.TorchGraph`, for every module that can be cut. Its
  parameters are the module's, dots in their names replaced; normalisation uses the running statistics, which are not
  trained.

Neither covers a module whose weights are computed before they are used (a kernel summed from branches in ``forward``):
there, train the cut graph itself as a TorchGraph.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper

from edgecompile import oracle
from edgecompile.blame import innermost_self
from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph
from edgecompile.pipeline import Pipeline

from .dependency import groups
from .plan import Plan
from .rules import key

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMS = ("any", "module", "graph")
TOLERANCE = 1e-4  # relative: the module and the graph sum in different orders
_BEFORE = "cut before merging (clean, then prune), or train the cut graph itself: torch_graph.TorchGraph(graph)"
_FIRST = 0x00800000  # bits of the smallest normal float32: what a model holds as a value lies far above


def apply(module: nn.Module, plan: Plan, inputs: Sequence[torch.Tensor] | None = None, form: str = "any") -> nn.Module:
    """Cut a torch module as ``plan`` cut the graph exported from it.

    Args:
        module: float32, on the CPU; it is not changed. Inputs are positional, in the order of the plan.
        plan: made from a graph that was exported from this module by ``torch.onnx.export(dynamo=True)``.
        inputs: example inputs; random ones of the plan's shapes by default.
        form: ``module``: a copy of the module; ``graph``: a TorchGraph; ``any``: the first where it is proved to be
            right, else the second.

    Returns:
        the cut module, in the mode (training or not) that ``module`` is in.

    Raises:
        InputError: the plan is not of this module, or the module cannot follow in the form asked for; it says why.
        EnvironmentMissing: torch is not installed.
    """
    if form not in FORMS:
        raise InputError(f"a cut module has no form {form!r}", f"it is one of {', '.join(FORMS)}")
    try:
        import torch
    except ImportError:
        raise missing_extra("a torch module cannot be cut", "torch", "torch") from None
    if inputs is None:
        inputs = _examples(plan)
    names = [x.name for x in plan.inputs]
    with _mode(module, False), torch.no_grad():
        own = _Own(module, inputs, names)
    reference, kept = own.cut(plan)
    if form != "graph":
        try:
            made = _cut_module(module, reference, kept)
            with _mode(made, False), torch.no_grad():
                _prove(made, own.restored(reference), inputs, names)
            return made
        except InputError:
            if form == "module":
                raise
    from edgecompile.torch_graph import TorchGraph

    trainable = TorchGraph(own.restored(reference))
    for node in reference.nodes:
        if node.op == "BatchNormalization":
            for statistics in node.inputs[3:5]:
                getattr(trainable, statistics.name.replace(".", "_")).requires_grad_(False)
    return trainable.train(module.training)


class _Own:
    """The graph of a module, in which each element of a parameter is a bit pattern of its own."""

    def __init__(self, module: nn.Module, inputs: Sequence[torch.Tensor], names: Sequence[str]):
        self.graph = _export(module, inputs, names)
        state = {n: t.detach().cpu() for n, t in module.state_dict().items() if str(t.dtype) == "torch.float32"}
        marked: dict[str, tuple[int, tuple[int, ...]]] = {}
        total = 0
        values: list[np.ndarray] = []
        for tensor in self.graph._constants():
            if (found := state.get(tensor.name)) is not None:
                count = found.numel()
                marked[tensor.name] = (total, tuple(found.shape))
                values.append(found.numpy().reshape(-1))
                ids = np.arange(_FIRST + total, _FIRST + total + count, dtype=np.int32)
                tensor.values = ids.view(np.float32).reshape(tuple(found.shape))
                total += count
        self.marked, self.values = marked, np.concatenate([*values, np.zeros(0, np.float32)])
        Pipeline.parse("clean").run(self.graph, verify=False, strict=True)
        self.before = self.seen(self.graph)
        for name, (start, shape) in marked.items():
            if math.prod(shape) and not self.before[start : start + math.prod(shape)].any():
                raise InputError(
                    f"the module cannot be cut: its parameter {name!r} is not used as it is",
                    "its forward computes with it before any input comes in",
                    "train the cut graph itself: torch_graph.TorchGraph(graph)",
                )

    def elements(self, value: np.ndarray | None) -> np.ndarray | None:
        """Which elements of the parameters a constant holds; None if it is none of theirs."""
        if value is None or value.dtype != np.float32 or not value.size:
            return None
        ids = np.ascontiguousarray(value).view(np.int32).astype(np.int64) - _FIRST
        return ids if ids.min() >= 0 and ids.max() < len(self.values) else None

    def seen(self, graph: Graph) -> np.ndarray:
        """Which elements of the parameters are in a graph."""
        found = np.zeros(len(self.values), bool)
        for value in graph.constants().values():
            if (ids := self.elements(value)) is not None:
                found[ids] = True
        return found

    def cut(self, plan: Plan) -> tuple[Graph, dict[str, list[np.ndarray]]]:
        """The cut graph, still of bit patterns, and per parameter the positions that stay on each axis."""
        found = groups(self.graph)
        mine = {t.name for t in self.graph.tensors().values()}
        missing = {g.name for g in plan.groups}
        for entry in plan.tensors:
            if mine & set(entry.names):
                missing -= set(entry.groups)
        if missing:
            raise InputError(
                f"the plan cuts {sorted(missing)[0]!r}, which is not in the module's own graph",
                "the module is another one, or passes before the cut have merged what it lies in",
                _BEFORE,
            )
        places = {p: mask for p, mask in plan.kept().items() if not p[1] and p[0] in mine}
        try:
            keep = found.keep(self.graph, places)
        except InputError as error:
            raise InputError(
                "the module cannot be cut by this plan",
                f"{error.what}; {error.why}: a layer merged before the cut is freer than the branches it came from",
                _BEFORE,
            ) from None
        cut = self.graph.copy()
        found.cut(cut, keep)
        after, kept = self.seen(cut), {}
        for name, (start, shape) in self.marked.items():
            inside = slice(start, start + math.prod(shape))
            was, stays = self.before[inside].reshape(shape), after[inside].reshape(shape)
            axes = [np.flatnonzero(stays.any(axis=tuple(j for j in range(len(shape)) if j != i))
                                   | ~was.any(axis=tuple(j for j in range(len(shape)) if j != i)))
                    for i in range(len(shape))]  # fmt: skip
            if (was & ~stays)[np.ix_(*axes)].any() if shape else False:
                raise InputError(f"what stays of the parameter {name!r} is no block of rows and columns")
            kept[name] = axes
        return cut, kept

    def restored(self, graph: Graph) -> Graph:
        """A copy with the values of the parameters in place of the bit patterns."""
        made = graph.copy()
        for tensor in made._constants():
            if (ids := self.elements(tensor.values)) is not None:
                tensor.values = self.values[ids]
        return made


def _export(module: nn.Module, inputs: Sequence[torch.Tensor], names: Sequence[str]) -> Graph:
    import torch

    if any(t.device.type != "cpu" for t in module.state_dict().values()):
        raise InputError("the module is not on the CPU", fix="module.cpu()")
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, tuple(inputs), dynamo=True, optimize=False, verbose=False,
                                        input_names=list(names))  # fmt: skip
    except Exception as error:  # the exporter lets through whatever the module raises
        raise InputError("the module cannot be exported", str(error).strip().splitlines()[0][:200]) from None
    finally:
        logger.setLevel(level)
    assert program is not None
    graph = Graph.from_proto(program.model_proto)
    _plain(graph)
    return graph


def _plain(graph: Graph) -> None:
    """Use operators that have rules, as the exporter's rewrites would: Cast for CastLike, Split for a sequence."""
    graph.infer_shapes()
    for node in graph.nodes:
        if node.op == "CastLike" and node.inputs[1].dtype is not None:
            node.op = "Cast"
            node.attrs = {"to": helper.np_dtype_to_tensor_dtype(np.dtype(node.inputs[1].dtype))}
            del node.inputs[1]
    for node in [n for n in graph.nodes if n.op == "SplitToSequence" and len(n.inputs) == 2]:
        readers, sizes = list(node.outputs[0].outputs), graph.constant(node.inputs[1])
        at = [graph.constant(r.inputs[1]) if r.op == "SequenceAt" else None for r in readers]
        axis = node.attrs.get("axis", 0)
        extent = node.inputs[0].shape[axis] if node.inputs[0].shape is not None else None
        if sizes is None or not isinstance(extent, int) or any(i is None for i in at):
            continue
        if not sizes.ndim:  # each part of one size, the last one what is left
            sizes = np.array([min(int(sizes), extent - i) for i in range(0, extent, int(sizes))])
        parts: list[Any] = [None] * len(sizes)
        again: list[tuple[Any, Any]] = []
        for reader, index in zip(readers, at, strict=True):
            number, output = int(index) % len(sizes), reader.outputs[0]  # type: ignore[arg-type]
            if parts[number] is None:
                parts[number] = output
            else:
                again.append((output, parts[number]))
            reader.outputs.clear()
        parts = [p or graph.new_variable(f"{node.outputs[0].name}_{i}") for i, p in enumerate(parts)]
        lengths = graph.new_constant(f"{node.outputs[0].name}_sizes", sizes.astype(np.int64))
        graph.insert("Split", [node.inputs[0], lengths], parts, {"axis": axis}, replaces=[node])
        for old, new in again:
            graph.rewire(old, new)
    graph.tidy()
    graph.infer_shapes()


def _examples(plan: Plan) -> list[torch.Tensor]:
    """Random inputs of the plan's shapes; a dynamic dimension is 1 if it is the first."""
    import torch

    made = []
    rng = np.random.default_rng(0)
    for port in plan.inputs:
        shape = [n if isinstance(n, int) else int(i == 0) for i, n in enumerate(port.shape)]
        if 0 in shape or not np.issubdtype(np.dtype(port.dtype), np.floating):
            raise InputError(
                f"there is no example of the input {port.name!r}", "it is of dynamic size or no float", "give inputs="
            )
        made.append(torch.from_numpy(rng.standard_normal(shape).astype(port.dtype)))
    return made


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool):
    """Set the mode of a module for a while, and give each part its own back."""
    before = {m: m.training for m in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode


# -- the copy of the module --------------------------------------------------------------------------------------------


def _conv(layer: Any, groups: int) -> dict[str, int]:
    first, second = layer.weight.shape[:2]
    both = (first, second * groups)
    return dict(zip(("in_channels", "out_channels") if layer.transposed else ("out_channels", "in_channels"), both,
                    strict=True)) | {"groups": groups}  # fmt: skip


ATTRIBUTES: Mapping[str, Callable[[Any, int], dict[str, int]]] = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _conv),
    "Linear": lambda m, _: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]},
    **dict.fromkeys(
        ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        lambda m, _: {"num_features": len(m.weight if m.weight is not None else m.running_mean)},
    ),
    # Only whole groups can go, so that each has as many channels as before.
    "GroupNorm": lambda m, _: {"num_groups": len(m.weight) * m.num_groups // m.num_channels,
                               "num_channels": len(m.weight)},
    "Embedding": lambda m, _: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]},
    "PReLU": lambda m, _: {"num_parameters": len(m.weight)},
}  # fmt: skip
"""What torch's layers store of their sizes: by class, from the cut layer and the groups of its node."""


def _cut_module(module: nn.Module, graph: Graph, kept: Mapping[str, list[np.ndarray]]) -> nn.Module:
    """A copy of the module with cut parameters and buffers, and the widths that torch's own layers store."""
    import torch
    from torch import nn

    made = copy.deepcopy(module)
    replaced: dict[int, Any] = {}
    layers = dict(made.named_modules(remove_duplicate=False))
    known = {id(getattr(layers[n.rpartition(".")[0]], n.rpartition(".")[2])): axes for n, axes in kept.items()}
    counts = {key(n): int(n.attrs["group"]) for n in graph.nodes if "group" in n.attrs}
    weights = {n.inputs[1].name: counts[key(n)] for n in graph.nodes if key(n) in counts}
    for path, layer in layers.items():
        for store in (layer._parameters, layer._buffers):
            for leaf, old in store.items():
                if old is None or id(old) not in known:
                    continue
                if id(old) not in replaced:
                    axes = [torch.from_numpy(a) for a in known[id(old)]]
                    data = old.detach()
                    for number, positions in enumerate(axes):
                        data = data.index_select(number, positions)
                    new = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
                    replaced[id(old)] = (new, old)  # the old one lives on, so that its id is not used again
                store[leaf] = replaced[id(old)][0]
        kind = next((c.__name__ for c in type(layer).__mro__ if c.__name__ in ATTRIBUTES), None)
        if kind is not None and (getattr(layer, "weight", None) is not None or kind.endswith("Norm2d")):
            name = f"{path}.weight" if path else "weight"
            for attribute, value in ATTRIBUTES[kind](layer, weights.get(name, getattr(layer, "groups", 1))).items():
                setattr(layer, attribute, value)
    return made


def _prove(made: nn.Module, graph: Graph, inputs: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Compare the cut module with the cut graph.

    Raises:
        InputError: it does not run, or computes something else.
    """
    from torch import nn

    fix = "form='graph' gives the cut graph as a module that can be trained"
    try:
        found = made(*inputs)
    except Exception as error:  # whatever a forward raises that meets other shapes than it was written for
        part = innermost_self(error, nn.Module)
        name = next((n for n, m in made.named_modules() if m is part), "")
        while name and type(made.get_submodule(name)).__module__.startswith("torch."):  # it is who calls torch's layers
            name = name.rpartition(".")[0]
        raise InputError(
            f"the forward of {name or type(made).__name__} does not follow the cut",
            f"{type(made.get_submodule(name)).__name__} has a width in its code or in an attribute of its own: "
            + str(error).strip().splitlines()[0][:160],
            fix,
        ) from None
    outputs = found.values() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else [found]
    wanted = oracle.run(graph, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    for (name, reference), output in zip(wanted.items(), outputs, strict=False):
        got = output.detach().numpy()
        if got.shape != reference.shape or (oracle.compare(reference, got).max_rel > TOLERANCE):
            raise InputError(
                f"the cut module computes another {name!r} than the cut graph",
                "a forward has a width in its code or in an attribute of its own",
                fix,
            )
