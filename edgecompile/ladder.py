"""Export a torch module to ONNX: the exporter that keeps most first, each proved against eager torch before it is used.

The rungs are ``torch.onnx.export(dynamo=True)``, which traces with torch.export, and ``dynamo=False``, which records
one TorchScript trace. Both are given the same function of a flat list of tensors, so that keyword inputs, nested
inputs, and outputs in dicts, dataclasses or nested tuples mean the same to either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import logging
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgecompile import oracle
from edgecompile.blame import User, innermost_self, one_line, root_cause
from edgecompile.errors import InputError
from edgecompile.frontend import DTYPES, Attempt, InputSpec, Range
from edgecompile.graph import Graph
from edgecompile.oracle import OutputError, Outputs

# Largest difference of an exported graph from eager torch, relative to the largest value of the output, by the coarsest
# floating-point type of the module: the two sum in different orders, and a half has 11 bits.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}
_EXTERNAL = 1 << 30  # weights above 1 GiB go to external data, which is memory-mapped instead of read
_SCALARS = (bool, int, float, complex, str)
_TENSOR = object()
_INPUT_TYPES = {getattr(torch, name) for name in DTYPES}

Names = tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """What :func:`export` made; the fields mean what those of :class:`edgecompile.frontend.Source` do."""

    graph: Graph
    feeds: tuple[Outputs, ...]
    reference: tuple[Outputs, ...]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: the name of its dimension, shared by axes that always have the same extent, and its range."""

    dim: str
    range: Range


Axes = Mapping[str, Mapping[int, Axis]]


@dataclass(frozen=True)
class Call:
    """One way to call a module, as a function of the tensors among its arguments.

    Attributes:
        module: what is called.
        names: ONNX name of each tensor argument.
        tensors: example values.
        leaves: all arguments, flattened; a placeholder where a tensor goes.
        spec: their tree.
    """

    module: nn.Module
    names: Names
    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def bind(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], user: User) -> Call:
        """Match arguments with the parameters of ``forward`` and name the tensors among them.

        Raises:
            InputError: they do not fit ``forward``, or an argument is neither a tensor nor a plain constant.
        """
        parameters = _parameters(module)
        if parameters is not None:
            try:
                inspect.Signature(parameters).bind(*args, **kwargs)
            except TypeError as error:
                raise InputError(
                    f"{_prefix(module, user)}example inputs do not fit {type(module).__name__}.forward",
                    f"{error}; its parameters are {', '.join(p.name for p in parameters) or 'none'}",
                    "a tuple is passed by position and a dict by parameter name; wrap a dict that is itself one "
                    "argument in a tuple",
                ) from None
        paths, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        positions = _positions(parameters, len(args))
        names, tensors, leaves = [], [], []
        for path, leaf in paths:
            keys = [str(getattr(k, "idx", getattr(k, "key", getattr(k, "name", "")))) for k in path]
            name = ".".join([positions[int(keys[1])] if keys[0] == "0" else keys[1], *keys[2:]])
            if isinstance(leaf, Tensor):
                if leaf.dtype not in _INPUT_TYPES or leaf.layout != torch.strided:
                    raise _no_such_type(f"input {name!r}", leaf)
                names.append(name)
                tensors.append(leaf.detach())
                leaves.append(_TENSOR)
            elif leaf is None or isinstance(leaf, (*_SCALARS, torch.dtype, torch.device)):
                leaves.append(leaf)
            else:
                raise InputError(
                    f"example input {name!r} is a {_type(leaf)}", "", "give a torch.Tensor, or a constant that stays"
                )
        if not tensors:
            raise InputError("the example inputs hold no tensor", "an ONNX graph needs an input")
        return Call(module, unique(names), tuple(tensors), tuple(leaves), spec)

    def __call__(self, *tensors: Tensor) -> Any:
        """What the module returns for these tensors in place of the examples."""
        return self._with(self.module, tensors)

    def _with(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return function(*args, **kwargs)

    @contextlib.contextmanager
    def flat(self) -> Iterator[nn.Module]:
        """A module from the flat tensors to the tuple of output tensors, while the block runs.

        It is the module itself with another ``forward``, so that the exporters see its own module paths. Hooks on the
        module would see the flat tensors, so a module that has any gets a wrapper. A scripted module takes neither.
        """
        module = self.module
        if isinstance(module, torch.jit.ScriptModule):
            yield module
            return
        if module._forward_hooks or module._forward_pre_hooks:
            yield _Wrapper(self)
            return
        forward, own = module.forward, "forward" in module.__dict__
        module.forward = lambda *tensors: _tensors(self._with(forward, tensors))
        try:
            yield module
        finally:
            if own:
                module.forward = forward
            else:
                del module.forward


class _Wrapper(nn.Module):
    def __init__(self, call: Call):
        super().__init__()
        self.module = call.module
        self.training = False
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _tensors(self._call._with(self.module, tensors))


def export(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    folder: Path,
    user: User,
    inputs: Mapping[str, InputSpec],
    dynamic: Mapping[str, Mapping[int, Range]],
    seed: int = 0,
    program: torch.export.ExportedProgram | None = None,
    say: Callable[[str], None] = lambda _: None,
    own_process: bool = False,
) -> Exported:
    """Export a module in eval mode by the first rung whose graph computes what the module does.

    Args:
        module: the module; it is unchanged afterwards.
        args: example arguments by position.
        kwargs: example arguments by name.
        folder: where the ONNX file is written.
        user: how errors tell the user's lines from a library's.
        inputs: shapes and types that replace those of example tensors, by ONNX input name; the values are random.
        dynamic: ranges of dynamic axes, by ONNX input name and axis. The first feeds have the usual extent.
        seed: of random inputs.
        program: the exported program that ``module`` was made from, for the rung that can use it as it is. Its dynamic
            axes are those of the export; ``dynamic`` may only narrow them.
        say: told what is being done.
        own_process: nothing else in this process writes to stdout or stderr, so what exporters print from C++ can be
            held back too.

    Raises:
        InputError: the module does not run on the inputs, or no rung exports it faithfully.
    """
    compiled = getattr(module, "_orig_mod", None)  # of torch.compile, whose kernels no exporter reads
    module = compiled if isinstance(compiled, nn.Module) else module
    rng = torch.Generator().manual_seed(seed)
    call = _respecified(Call.bind(module, args, kwargs, user), inputs, rng)
    axes = _axes_of(program, call, dynamic) if program else _axes(call, dynamic)
    usual = _at(call, axes, lambda r: r.opt)
    probes = [usual, [_varied(t, rng) for t in usual]]
    if axes:
        other = _at(call, axes, _other)
        probes.append([_varied(t, rng) for t in other])
    training = [(m, m.training) for m in module.modules()]
    try:
        say("running the module")
        with user_code(user, "eval() was called"):
            _eval(module)
        feeds, reference, notes = _eager(call, probes, user)
        job = _Job(
            call,
            tuple(_at(call, axes, _traced)),
            axes,
            tuple(reference[0]),
            feeds,
            reference,
            user,
            program,
            own_process,
        )
        attempts: list[Attempt] = []
        for rung in RUNGS:
            say(f"exporting with {RUNG_TITLES[rung]}")
            attempt, graph = _climb(rung, job, folder / rung)
            attempts.append(attempt)
            if graph is not None:
                known = {t.name for t in graph.inputs}
                notes += [f"input {n!r} is not used and not part of the graph" for n in call.names if n not in known]
                feeds = [{n: x for n, x in feed.items() if n in known} for feed in feeds]
                if inputs:
                    notes.append(f"random values of the shapes given for {', '.join(inputs)} (seed {seed})")
                return Exported(graph, tuple(feeds), tuple(reference), tuple(attempts), tuple(notes))
        raise _no_rung(attempts, job)
    finally:
        for part, flag in training:
            part.training = flag


def versions() -> dict[str, str]:
    """What an export depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("onnx", "onnxscript"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _eval(module: nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # torch.export's modules have no modes
        for part in module.modules():
            part.training = False


# -- arguments ---------------------------------------------------------------------------------------------------------


def arguments(example: Any, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from example inputs: a tensor, a tuple or list, or a dict.

    Args:
        example: the example inputs.
        what: how an error names them.

    Raises:
        InputError: they are something else.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping) and all(isinstance(k, str) for k in example):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise InputError(
        f"{what} returned a {_type(example)}" if what.endswith(")") else f"{what} are a {_type(example)}",
        "they must be a torch.Tensor, a tuple of arguments, or a dict of arguments by name",
    )


def required_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of ``forward`` that have no default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in _parameters(module) or () if p.default is p.empty and p.kind not in kinds]


def _parameters(module: nn.Module) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # a compiled forward may have none
        return None


def _positions(parameters: Sequence[inspect.Parameter] | None, count: int) -> list[str]:
    """Names of the arguments given by position."""
    names: list[str] = []
    for p in parameters or ():
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
        elif p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}_{i}" for i in range(count - len(names))]
    return names + [f"input_{i}" for i in range(len(names), count)]


def random_tensor(spec: InputSpec, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal floats, zeros and ones for integers and booleans; ``dtype`` where the spec has none."""
    dtype = getattr(torch, spec.dtype) if spec.dtype else dtype
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=rng).to(dtype)
    return torch.randint(0, 2, spec.shape, generator=rng).to(dtype)


def _respecified(call: Call, inputs: Mapping[str, InputSpec], rng: torch.Generator) -> Call:
    _known(call, inputs)
    tensors = tuple(
        random_tensor(inputs[n], rng, t.dtype).to(t.device) if n in inputs else t
        for n, t in zip(call.names, call.tensors, strict=True)
    )
    return dataclasses.replace(call, tensors=tensors)


def _known(call: Call, given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in call.names:
            raise InputError(f"the model has no input {name!r}", f"its inputs are {', '.join(map(repr, call.names))}")


def _varied(tensor: Tensor, rng: torch.Generator) -> Tensor:
    """Other values from the same range: mirrored in it and shuffled, so that sums and signs change.

    Integers and booleans that are all equal stay, for nothing tells which others are valid.
    """
    values = tensor.detach().cpu().reshape(-1)
    if not values.numel():
        return tensor
    shuffled = values[torch.randperm(values.numel(), generator=rng)]
    if values.dtype == torch.bool:
        return (~shuffled if values.any() != values.all() else values).reshape(tensor.shape).to(tensor.device)
    low, high = values.min(), values.max()
    if low != high:
        symmetric = values.is_floating_point() and low < 0 < high
        shuffled = -shuffled if symmetric else low + (high - shuffled)
    elif values.is_floating_point():
        noise = torch.rand(values.shape, generator=rng) + 0.5 if low != 0 else torch.randn(values.shape, generator=rng)
        shuffled = (noise * low if low != 0 else noise).to(values.dtype)
    return shuffled.reshape(tensor.shape).to(tensor.device)


# -- dynamic axes ------------------------------------------------------------------------------------------------------


def _axes(call: Call, dynamic: Mapping[str, Mapping[int, Range]]) -> Axes:
    """Name the dimensions: the same axis of several inputs with the same range is one dimension."""
    _known(call, dynamic)
    return _named(call, dynamic, lambda _, axis, extent: (axis, extent))


def _axes_of(program: torch.export.ExportedProgram, call: Call, dynamic: Mapping[str, Mapping[int, Range]]) -> Axes:
    """The axes that an exported program leaves open; equal symbols are one dimension."""
    _known(call, dynamic)
    shapes = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder" and _is_tensor(n.meta)}
    names = [n for n in program.graph_signature.user_inputs if n in shapes]
    ranges: dict[str, dict[int, Range]] = {}
    symbols: dict[tuple[str, int], str] = {}
    for name, placeholder, tensor in zip(call.names, names, call.tensors, strict=True):
        wanted = dict(dynamic.get(name, {}))
        for axis, extent in enumerate(shapes[placeholder]):
            if not (isinstance(extent, torch.SymInt) and str(extent).isidentifier()):
                continue  # fixed, or derived from another, such as 2*s0
            symbols[name, axis] = str(extent)
            bound = program.range_constraints.get(extent.node.expr)
            low, high = (_bound(bound.lower, 0), _bound(bound.upper, None)) if bound else (0, None)
            size = tensor.shape[axis]
            limits = Range(max(low or 0, 1), size, high if high is not None else max(2 * size, 2))
            ranges.setdefault(name, {})[axis] = wanted.pop(axis, limits)
        if wanted:
            axis = next(iter(wanted))
            raise InputError(
                f"axis {axis} of {name!r} cannot be dynamic", "the exported program fixes or derives its extent"
            )
    return _named(call, ranges, lambda name, axis, _: symbols[name, axis])


def _is_tensor(meta: Mapping[str, Any]) -> bool:
    return isinstance(meta.get("val"), Tensor)


def _bound(value: Any, otherwise: int | None) -> int | None:
    """A bound of a symbol's range, ``otherwise`` where it is infinite."""
    return int(value) if isinstance(value, int) or getattr(value, "is_Integer", False) else otherwise


def _named(
    call: Call, ranges: Mapping[str, Mapping[int, Range]], group: Callable[[str, int, Range], Any]
) -> dict[str, dict[int, Axis]]:
    dims: dict[Any, str] = {}
    axes: dict[str, dict[int, Axis]] = {}
    for name, tensor in zip(call.names, call.tensors, strict=True):
        for axis, extent in sorted(ranges.get(name, {}).items()):
            if not 0 <= axis < tensor.ndim:
                raise InputError(
                    f"input {name!r} has no axis {axis}", f"its shape is {'x'.join(map(str, tensor.shape)) or 'scalar'}"
                )
            key = group(name, axis, extent)
            if key not in dims:
                usual = {0: "batch"} | ({2: "height", 3: "width"} if tensor.ndim == 4 else {})
                own = re.sub(r"\W", "_", f"{name}_{axis}")
                dims[key] = next(d for d in (usual.get(axis, own), own, f"{own}_") if d not in dims.values())
            axes.setdefault(name, {})[axis] = Axis(dims[key], extent)
    return axes


def _other(extent: Range) -> int:
    """An extent that is not the usual one."""
    return extent.min if extent.min != extent.opt else extent.max


def _traced(extent: Range) -> int:
    """The extent to trace with: an exporter may take 1 for a dimension that broadcasts."""
    return extent.opt if extent.opt > 1 else min(extent.max, 2)


def _at(call: Call, axes: Axes, extent: Callable[[Range], int]) -> list[Tensor]:
    """The example tensors with their dynamic axes cut or repeated to an extent."""
    tensors = []
    for name, tensor in zip(call.names, call.tensors, strict=True):
        for axis, dynamic in axes.get(name, {}).items():
            index = torch.arange(extent(dynamic.range), device=tensor.device) % max(tensor.shape[axis], 1)
            tensor = tensor.index_select(axis, index)
        tensors.append(tensor)
    return tensors


# -- outputs -----------------------------------------------------------------------------------------------------------


def outputs(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested output with their names: ``output``, ``output_1``, ``boxes``, ``head.boxes``, ``head.0``.

    Mappings, dataclasses and named tuples are named by their keys, other sequences by position.
    """
    children = _children(value)
    if children is None:
        yield name or "output", value
        return
    keyed, items = children
    for key, child in items:
        yield from outputs(child, f"{name}.{key}" if name else key if keyed else f"output_{key}")


def _children(value: Any) -> tuple[bool, list[tuple[str, Any]]] | None:
    """Whether the parts of a value have names, and the parts; None for a leaf."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return True, [(str(k), v) for k, v in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return True, [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    fields = getattr(value, "_fields", None)
    if isinstance(value, tuple) and fields:
        return True, list(zip(fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return False, [(str(i), v) for i, v in enumerate(value)]
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return None
    return False, [(str(i), v) for i, v in enumerate(leaves)]


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for _, leaf in outputs(value) if isinstance(leaf, Tensor))


def unique(names: Sequence[str], taken: Sequence[str] = ()) -> Names:
    """The names, each different from the others and from ``taken``: ``x`` may become ``x_out``, ``x_out_2``."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in taken or candidate in found:
            candidate = f"{name}_out" if number == 1 else f"{name}_out_{number}"
            number += 1
        found.append(candidate)
    return tuple(found)


def _eager(
    call: Call, probes: Sequence[Sequence[Tensor]], user: User
) -> tuple[list[Outputs], list[Outputs], list[str]]:
    """Run the module itself on the probes; a mere variation of the example that it rejects is left out."""
    feeds, reference, notes = [], [], []
    names: Names = ()
    for number, tensors in enumerate(probes):
        shapes = ", ".join(f"{n} {_shape(t)}" for n, t in zip(call.names, tensors, strict=True))
        try:
            with user_code(user, f"the module was run on {shapes}", call.module), torch.no_grad():
                leaves = list(outputs(call(*[t.clone() for t in tensors])))
        except InputError as error:
            if number != 1:
                raise
            notes.append(f"checked on the example inputs only: the module rejects random ones ({error.what})")
            continue
        kept = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]
        found = unique([name for name, _ in kept], call.names)
        if not feeds:
            names = found
            _check_leaves(leaves, _prefix(call.module, user))
            dropped = [f"{n} ({_type(v)})" for n, v in leaves if isinstance(v, _SCALARS)]
            if dropped:
                more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
                notes.append(f"outputs that are no tensors are left out: {', '.join(dropped[:3])}{more}")
            notes += [
                f"output {old!r} is named {new!r}: another tensor has its name"
                for (old, _), new in zip(kept, names, strict=True)
                if old != new
            ]
        elif found != names:
            raise InputError(
                "the module returns other outputs for other inputs",
                f"{', '.join(names)} on the example, {', '.join(found)} on {shapes}",
                "return the same outputs always",
            )
        feeds.append({n: to_numpy(t, f"input {n!r}") for n, t in zip(call.names, tensors, strict=True)})
        reference.append({n: to_numpy(t, f"output {n!r}") for n, (_, t) in zip(names, kept, strict=True)})
    notes += [
        f"output {n!r} holds NaN or infinity, in eager torch too"
        for n, x in reference[0].items()
        if x.dtype.kind == "f" and not np.isfinite(x).all()
    ]
    return feeds, reference, notes


def _prefix(module: nn.Module, user: User) -> str:
    """``model.py:12: `` of the module's forward, or ``""``."""
    place = user.defined(getattr(type(module), "forward", None))
    return f"{place}: " if place else ""


def _check_leaves(leaves: Sequence[tuple[str, Any]], prefix: str) -> None:
    for name, leaf in leaves:
        if not (leaf is None or isinstance(leaf, (Tensor, *_SCALARS))):
            raise InputError(
                f"{prefix}output {name!r} is a {_type(leaf)}",
                fix="return tensors, alone or in tuples, lists, dicts or dataclasses",
            )
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        found = ", ".join(f"{n} ({_type(v)})" for n, v in leaves[:3]) or "nothing"
        raise InputError(f"{prefix}forward returns no tensor", f"it returns {found}")


def to_numpy(tensor: Tensor, what: str) -> np.ndarray:
    """A copy as an array.

    Raises:
        InputError: NumPy and ONNX Runtime have no such type.
    """
    tensor = tensor.detach().cpu()
    try:
        return np.array(tensor.resolve_conj().resolve_neg().numpy())
    except (TypeError, RuntimeError):
        raise _no_such_type(what, tensor) from None


def _no_such_type(what: str, tensor: Tensor) -> InputError:
    kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
    return InputError(
        f"{what} is {kind}", "the reference runtime cannot compute it", "export the model in float32 or float16"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _type(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


@contextlib.contextmanager
def user_code(user: User, doing: str, module: nn.Module | None = None) -> Iterator[None]:
    """Turn whatever the user's code raises into one InputError that names its file and line.

    Args:
        user: whose lines to look for.
        doing: what was going on, for the error's ``why``.
        module: the module that runs, to name the part of it that failed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script that parses arguments ends the process when imported
        place = user.place(error) or user.file
        what, why, fix = one_line(error), doing, ""
        if isinstance(error, InputError):
            what, why, fix = error.what, error.why or doing, error.fix
        elif isinstance(error, ImportError) and error.name:
            fix = f"install what provides {error.name} into the environment of edgecompile, or put it beside the file"
        elif isinstance(error, SystemExit):
            fix = 'what ends the process belongs under `if __name__ == "__main__":`'
        elif module is not None:
            part = innermost_self(error, nn.Module)
            name = next((n for n, m in module.named_modules() if m is part), "")
            why += f"; {name} ({type(part).__name__}) failed" if name else ""
        raise InputError(f"{place}: {what}" if place else what, why, fix) from None


# -- rungs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    call: Call
    traced: tuple[Tensor, ...]
    axes: Axes
    outputs: Names
    feeds: Sequence[Outputs]
    reference: Sequence[Outputs]
    user: User
    program: torch.export.ExportedProgram | None
    own_process: bool

    @property
    def tolerance(self) -> float:
        tensors = [*self.call.module.parameters(), *self.call.module.buffers(), *self.call.tensors]
        return max((TOLERANCE.get(t.dtype, 0.0) for t in tensors), default=0.0) or TOLERANCE[torch.float32]


def _dynamo(job: _Job, path: Path) -> None:
    names: dict[str, Any] = {"input_names": list(job.call.names), "output_names": list(job.outputs)}
    if job.program is not None:
        shapes = tuple({a: x.dim for a, x in job.axes.get(n, {}).items()} for n in job.call.names)
        torch.onnx.export(
            job.program, (), path, dynamo=True, dynamic_shapes=shapes if job.axes else None, external_data=_large(job),
            verbose=False, **names,
        )  # fmt: skip
        return
    dims = {
        x.dim: torch.export.Dim(x.dim, min=x.range.min, max=x.range.max)
        for axes in job.axes.values()
        for x in axes.values()
    }
    shapes = tuple({a: dims[x.dim] for a, x in job.axes.get(n, {}).items()} for n in job.call.names)
    with job.call.flat() as module:
        torch.onnx.export(
            module, job.traced, path, dynamo=True, dynamic_shapes=(shapes,) if job.axes else None,
            external_data=_large(job), verbose=False, **names,
        )  # fmt: skip


def _torchscript(job: _Job, path: Path) -> None:
    dynamic = {n: {a: x.dim for a, x in axes.items()} for n, axes in job.axes.items()}
    with job.call.flat() as module, _modes(module):
        torch.onnx.export(
            module, job.traced, str(path), dynamo=False, input_names=list(job.call.names),
            output_names=list(job.outputs), dynamic_axes={**dynamic, **_output_axes(job)}, verbose=False,
        )  # fmt: skip


@contextlib.contextmanager
def _modes(module: nn.Module) -> Iterator[None]:
    """Let the exporter switch the mode of modules that torch.export made, which forbid it, to no effect."""
    parts = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    for part in parts:
        part.train = lambda mode=True, part=part: part
    try:
        yield
    finally:
        for part in parts:
            del part.train


def _output_axes(job: _Job) -> dict[str, dict[int, str]]:
    """The axes of outputs that follow the inputs', found by comparing two runs of different extents."""
    if not job.axes:
        return {}
    moved = {(x.range.opt, _other(x.range)): x.dim for axes in job.axes.values() for x in axes.values()}
    first, last = job.reference[0], job.reference[-1]
    return {
        name: {
            axis: moved.get((a, b), re.sub(r"\W", "_", f"{name}_{axis}"))
            for axis, (a, b) in enumerate(zip(first[name].shape, last[name].shape, strict=False))
            if a != b
        }
        for name in job.outputs
    }


def _large(job: _Job) -> bool:
    module = job.call.module
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()]) > _EXTERNAL


_EXPORTERS: Mapping[str, Callable[[_Job, Path], None]] = {"dynamo": _dynamo, "torchscript": _torchscript}
RUNGS = tuple(_EXPORTERS)
RUNG_TITLES = {"dynamo": "torch.export", "torchscript": "TorchScript"}


def _climb(rung: str, job: _Job, folder: Path) -> tuple[Attempt, Graph | None]:
    """Try one rung: export, load, compare. The graph is returned only if it computes what the module does."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    errors: dict[str, OutputError] = {}
    graph, problem, place = None, "", ""
    with quiet(job.own_process) as caught:
        try:
            _EXPORTERS[rung](job, path)
        except Exception as error:
            problem, place = one_line(root_cause(error)), job.user.place(error)
    if not problem:
        try:
            graph = Graph.load(path)
            errors, problem = _parity(graph, job)
        except InputError as error:
            problem = str(error)
        fixed = [w for w in caught if w.category.__name__ == "TracerWarning" and job.user.owns(w.filename)]
        if problem and fixed:
            place = job.user.name((Path(fixed[0].filename), fixed[0].lineno))
            problem += f"; the trace took a tensor's value at {place} for a constant"
    if problem:
        shutil.rmtree(folder, ignore_errors=True)
    attempt = Attempt(rung, not problem, problem, place, errors, time.perf_counter() - start)
    return attempt, None if problem else graph


def _parity(graph: Graph, job: _Job) -> tuple[dict[str, OutputError], str]:
    """Errors of a graph against eager torch, and what is wrong with it, ``""`` if nothing is."""
    inputs = {t.name: t.shape for t in graph.inputs}
    for name, axes in job.axes.items():
        for axis, dynamic in axes.items():
            extent = inputs[name][axis] if name in inputs else ""
            if isinstance(extent, int):
                return {}, f"axis {axis} of {name!r} ({dynamic.dim}) became fixed at {extent}"
    for tensor in graph.outputs:
        for axis, extent in enumerate(tensor.shape or ()):
            if isinstance(extent, int) and any(r[tensor.name].shape[axis] != extent for r in job.reference):
                return {}, f"axis {axis} of {tensor.name!r} became fixed at {extent}"
    measured = []
    for feed, wanted in zip(job.feeds, job.reference, strict=True):
        found = oracle.run(graph, {n: x for n, x in feed.items() if n in inputs})
        if lost := [n for n in wanted if n not in found]:
            return {}, f"output {lost[0]!r} is not in the exported graph"
        measured.append(oracle.compare_all(wanted, found))
    errors = oracle.worst(measured)
    name, worst = max(errors.items(), key=lambda item: item[1].max_rel)
    if worst.max_rel <= job.tolerance:
        return errors, ""
    probes = [i for i, e in enumerate(measured) if e[name].max_rel > job.tolerance]
    which = "the example inputs" if 0 in probes else "inputs other than the example"
    return errors, (
        f"output {name!r} differs from eager torch by {worst.max_rel:.1e} of its largest value on {which}, "
        f"{job.tolerance:.0e} is allowed"
    )


@contextlib.contextmanager
def quiet(own_process: bool = False) -> Iterator[list[warnings.WarningMessage]]:
    """Keep what exporters print, log and warn off the terminal; the warnings are returned.

    Args:
        own_process: also what C++ code prints, and whatever other threads do.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _descriptors_closed() if own_process else contextlib.nullcontext(),
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _descriptors_closed() -> Iterator[None]:
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)


# What an exporter's complaint means for the author of the model.
_ADVICE = (
    (r"became fixed", "compute shapes from x.shape without int() or constants, or leave the axis static"),
    (
        r"data.dependent|GuardOnDataDependent|took a tensor's value",
        "choose by torch.where or torch.cond instead of Python's if, and avoid .item() and .tolist()",
    ),
    (
        r"No ONNX function|UnsupportedOperator|is not supported",
        "replace the operator by ones that ONNX has, or give an ONNX file",
    ),
)


def _no_rung(attempts: Sequence[Attempt], job: _Job) -> InputError:
    place = next((a.where for a in attempts if a.where), "")
    causes = "; ".join(
        f"{RUNG_TITLES[a.rung]}{f' at {a.where}' if a.where else ''}: {a.error}" for a in attempts
    )  # fmt: skip
    if not _deterministic(job):
        return InputError(
            "the module is not deterministic", f"two calls with the same inputs differ; {causes}",
            "remove what is random in eval mode",
        )  # fmt: skip
    fix = next((advice for pattern, advice in _ADVICE if re.search(pattern, causes)), "")
    what = "the module cannot be exported to ONNX"
    return InputError(f"{place}: {what}" if place else what, causes, fix)


def _deterministic(job: _Job) -> bool:
    """Whether a second eager run on the example gives what the first gave."""
    given = zip(job.feeds[0].values(), job.call.tensors, strict=True)
    with torch.no_grad():
        again = _tensors(job.call(*[torch.from_numpy(x.copy()).to(t.device) for x, t in given]))
    values = {n: to_numpy(t, n) for n, t in zip(job.outputs, again, strict=True)}
    try:
        errors = oracle.compare_all(job.reference[0], values)
    except InputError:  # of another shape
        return False
    return all(e.max_rel <= job.tolerance for e in errors.values())
