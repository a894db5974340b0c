"""The process in which ``evaluate(run)`` of a user's file runs: ``python -m edgecompile.evaluate_child request.json``.

The function is called twice, with nothing changed but what ``run`` computes with: first the engine of a bundle, then
the module itself. The first score is the result; the second is there to compare it with, and is left out with a note
where it cannot be had. The request is that of an export, with the folder of the bundle and what its engine is.

Without a bundle, it scores graphs for passes that keep a score: each line on stdin names one, and a file is written for
each answer, until stdin ends.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    _CWD = sys.path.pop(0)  # as in edgecompile.export_child

import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompile import export_child, oracle, qdq, registry
from edgecompile.blame import User
from edgecompile.bundle import Bundle
from edgecompile.errors import InputError
from edgecompile.files import write_atomic
from edgecompile.graph import Graph, Port
from edgecompile.oracle import Feeds, Outputs

if TYPE_CHECKING:
    from edgecompile.ladder import Call

SLOWER = 10  # times as long as with the engine may evaluate() take with the module
PATIENCE = 10.0  # seconds that it may take in any case
# Largest difference of the module from the one that was exported, relative to an output's largest value: sums may be
# formed in another order from one process to the next, other weights differ by far more.
_SAME_MODULE = 1e-2


class _Late(BaseException):
    """Ends ``evaluate``, which may catch every Exception."""


class Run:
    """The function that ``evaluate`` is given: from inputs to outputs, in kind.

    It takes what ``example_inputs()`` may return, with torch tensors or numpy arrays, and returns the outputs in the
    model's order, alone if there is one, else in a tuple; arrays for arrays, tensors for tensors.

    Args:
        example: the module with its example inputs.
        constants: the arguments among them that are no tensors; they are part of the engine.
        compute: outputs for the tensors of a call.
        until: time of :func:`time.perf_counter` after which calls fail.

    Attributes:
        late: whether a call came too late.
    """

    def __init__(
        self,
        example: Call,
        constants: Sequence[Any],
        compute: Callable[[Call], Sequence[Any]],
        until: float = math.inf,
    ):
        self._example, self._constants, self._compute, self._until = example, constants, compute, until
        self.late = False

    def __call__(self, inputs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: the inputs are not those of the model.
        """
        import torch

        if time.perf_counter() > self._until:
            self.late = True
            raise _Late
        call, given = self._bound(inputs)
        outputs = self._compute(call)
        if any(isinstance(x, torch.Tensor) for x in given):
            device = call.tensors[0].device
            outputs = tuple(torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for x in outputs)
        else:
            outputs = tuple(x if isinstance(x, np.ndarray) else _array(x, "an output") for x in outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _bound(self, inputs: Any) -> tuple[Call, list[Any]]:
        """The call that these inputs mean, and what was given for its arguments."""
        import torch
        from torch.utils import _pytree as pytree

        from edgecompile import ladder

        device = self._example.tensors[0].device

        def tensor(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return torch.from_numpy(np.array(value, order="C")).to(device)
            return value

        arguments = ladder.arguments((inputs,) if isinstance(inputs, np.ndarray) else inputs, "the inputs given to run")
        given = pytree.tree_leaves(arguments)
        args, kwargs = pytree.tree_map(tensor, arguments)
        try:
            call = ladder.Call.bind(self._example.module, args, kwargs, User())
        except InputError as error:
            why = ": ".join(filter(None, (error.what, error.why))).replace("example input", "input")
            raise InputError("run() was given inputs that the model does not take", why, error.fix) from None
        if sorted(call.names) != sorted(self._example.names):
            raise InputError(
                f"run() was given the inputs {', '.join(call.names)}",
                f"the engine is made for {', '.join(self._example.names)}, as example_inputs() has them",
            )
        if sorted(map(repr, constants_of(args, kwargs))) != sorted(map(repr, self._constants)):
            raise InputError(
                "run() was given other constants than the model was built with",
                f"{_listed(constants_of(args, kwargs))}, and example_inputs() has {_listed(self._constants)}",
                "arguments that are no tensors are part of the engine: give the same ones",
            )
        return call, given


def constants_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that are no tensors."""
    import torch
    from torch.utils import _pytree as pytree

    return [x for x in pytree.tree_leaves((args, kwargs)) if not isinstance(x, torch.Tensor)]


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values)) or "none"


# -- what run computes with --------------------------------------------------------------------------------------------


def on_engine(run: Callable[[Feeds], Outputs], ports: Sequence[Port]) -> Callable[[Call], list[np.ndarray]]:
    """Calls of an engine, given its function from feeds to outputs and its inputs."""
    known = {p.name: p for p in ports}

    def compute(call: Call) -> list[np.ndarray]:
        feeds = {n: _array(t, f"input {n!r}") for n, t in zip(call.names, call.tensors, strict=True) if n in known}
        parts, batch = split(feeds, ports)
        return list(join([run(part) for part in parts], batch).values())

    return compute


def on_module(call: Call) -> list[Any]:
    """The tensors that the module itself returns."""
    import torch

    from edgecompile import ladder

    with torch.no_grad():
        leaves = ladder.outputs(call(*[t.clone() for t in call.tensors]))  # cloned: a module may write to its inputs
        return [leaf for _, leaf in leaves if isinstance(leaf, torch.Tensor)]


def split(feeds: Feeds, ports: Sequence[Port]) -> tuple[list[Outputs], int]:
    """Cut a batch into batches of the fixed size that the ports have; inputs that fit already go with each part.

    Returns:
        the parts, and the size of one; 0 where nothing is cut.

    Raises:
        InputError: the batch is not a multiple of that size.
    """
    cut: dict[str, int] = {}
    for port in ports:
        value, size = feeds[port.name], port.shape[0] if port.shape else None
        if not isinstance(size, int) or value.ndim != len(port.shape or ()) or value.shape[0] == size:
            continue
        count, rest = divmod(value.shape[0], size)
        if rest or not count:
            raise InputError(
                f"input {port.name!r} of run() has a batch of {value.shape[0]}",
                f"the engine takes {size} at a time, and {value.shape[0]} is not a multiple of that",
                f"leave out the rest, or build with --dynamic {port.name}:0=1:{size}:{max(size + 1, value.shape[0])}",
            )
        cut[port.name] = count
    if len(set(cut.values())) > 1:
        sizes = ", ".join(f"{n} {feeds[n].shape[0]}" for n in cut)
        raise InputError("the inputs of run() have batches that do not belong together", sizes)
    count = next(iter(cut.values()), 1)
    pieces = {name: np.split(feeds[name], count) for name in cut}
    parts = [{**feeds, **{name: pieces[name][i] for name in cut}} for i in range(count)]
    return parts, next((len(pieces[name][0]) for name in cut), 0)


def join(parts: Sequence[Outputs], batch: int) -> Outputs:
    """The outputs of parts of a batch as those of the whole, along the first axis.

    Raises:
        InputError: an output has no axis of the size of one part.
    """
    if len(parts) == 1:
        return parts[0]
    for name, value in parts[0].items():
        if value.ndim == 0 or value.shape[0] != batch:
            raise InputError(
                f"output {name!r} cannot be joined from parts of a batch",
                f"its shape is {'x'.join(map(str, value.shape)) or 'scalar'} for a batch of {batch}",
                f"give run() a batch of {batch}",
            )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _array(tensor: Any, what: str) -> np.ndarray:
    from edgecompile import ladder

    return ladder.to_numpy(tensor, what)


# -- scores ------------------------------------------------------------------------------------------------------------


def scores(
    evaluate: Callable[[Any], Any],
    user: User,
    engine_run: Run,
    module_run: Callable[[float], Run],
    *,
    seed: int = 0,
    patience: float = PATIENCE,
    say: export_child.Say = lambda _: None,
) -> dict[str, Any]:
    """The fields of :class:`edgecompile.frontend.Accuracy`.

    Args:
        evaluate: the user's function.
        user: whose lines an error names.
        engine_run: computes with the engine.
        module_run: time at which it shall stop -> computes with the module.
        seed: of what ``evaluate`` draws at random, the same both times.
        patience: seconds that the second call may take in any case.
        say: told what is being done.

    Raises:
        InputError: it fails with the engine, or returns no finite number.
    """
    say("evaluating the engine")
    start = time.perf_counter()
    engine = _score(evaluate, engine_run, user, seed, "the engine")
    seconds = time.perf_counter() - start
    limit = max(patience, SLOWER * seconds)
    say("evaluating eager torch")
    run: Run | None = None
    reference, note = None, ""
    try:
        run = module_run(time.perf_counter() + limit)
        reference = _score(evaluate, run, user, seed, "eager torch")
    except InputError as error:
        note = str(error)
    if run is not None and run.late:
        reference, note = None, f"evaluate() was stopped after {limit:.3g} s, the engine took {seconds:.3g} s"
    return {"engine": engine, "reference": reference, "note": note}


def _score(evaluate: Callable[[Any], Any], run: Run, user: User, seed: int, on: str, finite: bool = True) -> float:
    """What ``evaluate`` returns; a number that is not finite is an error, or if it need not be, minus infinity."""
    import torch

    from edgecompile import ladder

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    with ladder.user_code(user, f"evaluate() was called with {on}"):
        found = evaluate(run)
    value = found.item() if getattr(found, "ndim", None) == 0 else found
    if isinstance(value, float) and not math.isfinite(value) and not finite:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        shown = str(value) if isinstance(value, float) else f"a {type(found).__name__}"
        raise InputError(
            f"{user.defined(evaluate) or user.file}: evaluate() returned {shown} with {on}",
            "it must return a finite number, higher is better",
        )
    return float(value)


def _same_module(example: Call, probe: Feeds, wanted: Feeds) -> None:
    """Refuse a module that is not the one that was exported, as when ``model()`` draws weights at random."""
    import torch

    tensors = tuple(
        torch.from_numpy(probe[n]).to(t.device) if n in probe else t
        for n, t in zip(example.names, example.tensors, strict=True)
    )
    found = [_array(x, "an output") for x in on_module(dataclasses.replace(example, tensors=tensors))]
    errors = oracle.compare_all(wanted, dict(zip(wanted, found, strict=True)))
    for name, error in errors.items():
        if not error.max_rel <= _SAME_MODULE:
            raise InputError(
                "model() made another module than the one that was exported",
                f"output {name!r} differs by {error.max_rel:.1e} of its largest value",
                "seed what it draws at random",
            )


@dataclasses.dataclass(frozen=True)
class _Opened:
    """The user's file, its function, whose lines errors name, and the module with its example inputs."""

    evaluate: Callable[[Any], Any]
    user: User
    example: Call
    constants: Sequence[Any]


def _open(request: Mapping[str, Any], say: export_child.Say) -> _Opened:
    say("importing torch")
    import torch

    from edgecompile import ladder
    from edgecompile.frontend import InputSpec

    path = Path(request["path"])
    torch.manual_seed(request["seed"])  # the weights that model() draws are those of the export
    say(f"loading {path.name}")
    file, user = export_child.open_file(path)
    specs = {n: InputSpec(tuple(shape), dtype) for n, (shape, dtype) in request["inputs"].items()}
    module, args, kwargs = export_child.from_file(file, user, request, specs)
    module = getattr(module, "_orig_mod", module)  # of torch.compile; the export is of what it wraps
    example = ladder.Call.bind(module, args, kwargs, user)
    return _Opened(vars(file)["evaluate"], user, example, constants_of(args, kwargs))


def _engine(request: Mapping[str, Any], folder: Path, say: export_child.Say) -> dict[str, Any]:
    """Score the engine of a bundle and the module."""
    opened = _open(request, say)
    made = Bundle(Path(request["bundle"]), {"engine": request["engine"]})
    graph = made.graph()
    engine = registry.target(request["engine"]["target"]).load(made.path, made.engine_manifest, graph)

    def module_run(until: float) -> Run:
        from edgecompile import ladder

        with ladder.user_code(opened.user, "the module was run", opened.example.module):
            opened.example.module.eval()
            _same_module(opened.example, *made.probe())
        return Run(opened.example, opened.constants, on_module, until)

    names = [t.name for t in graph.outputs]

    def outputs(feeds: Feeds) -> Outputs:
        found = engine.run(feeds)
        return {name: found[name] for name in names}  # an engine may have more, such as boxes after suppression

    run = Run(opened.example, opened.constants, on_engine(outputs, graph.signature().inputs))
    return scores(opened.evaluate, opened.user, run, module_run, seed=request["seed"], say=say)


def _graphs(request: Mapping[str, Any], folder: Path, say: export_child.Say) -> dict[str, Any]:
    """Score one graph after the other; the first is the model before, whose score must be finite."""
    asked = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # the user's code may read what it likes there
    opened = _open(request, say)
    for number, line in enumerate(asked):
        name, simulate, answer = json.loads(line)
        graph = Graph.load(folder / name)
        run = (qdq.simulation if simulate else qdq.kernels)(graph)
        engine_run = Run(opened.example, opened.constants, on_engine(run, graph.signature().inputs))
        on = "a graph of lower precision" if number else "the model as a graph"
        found = _score(opened.evaluate, engine_run, opened.user, request["seed"], on, finite=not number)
        write_atomic(folder / answer, [json.dumps(found).encode()])
        say("")  # wakes who waits for the answer
    return {}


def _evaluate(request: Mapping[str, Any], folder: Path, say: export_child.Say) -> dict[str, Any]:
    return (_engine if "bundle" in request else _graphs)(request, folder, say)


if __name__ == "__main__":
    export_child.serve(sys.argv[1], _evaluate)
