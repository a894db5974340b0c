"""The process in which a user's file runs: ``python -m edgecompile.export_child request.json``.

It reads a request that :mod:`edgecompile.frontend` wrote, and leaves ``result.json``, the ONNX file and ``probes.npz``
in the request's folder. Whatever goes wrong in the user's code ends up in the result as one error.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # `-m` puts the working directory first on the path, where an `onnx` folder would hide the package. It goes last,
    # once the user's own folder is first.
    _CWD = sys.path.pop(0)

import faulthandler
import io
import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgecompile.blame import User
from edgecompile.errors import EdgecompileError, InputError

Say = Callable[[str], None]


def serve(request_file: str, answer_of: Callable[[Mapping[str, Any], Path, Say], dict[str, Any]]) -> None:
    """Answer one request and end the process.

    Args:
        request_file: what :func:`edgecompile.frontend.run_child` wrote.
        answer_of: request, its folder, and how to tell what is being done -> the result.
    """
    request = json.loads(Path(request_file).read_text())
    folder = Path(request["folder"])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what the user's code prints is passed on as it comes

    def say(text: str) -> None:
        try:
            os.write(request["progress"], f"{text}\n".encode())
        except BrokenPipeError:  # nobody waits for the result any more
            os._exit(1)

    with open(folder / "crash.txt", "w") as crash:
        faulthandler.enable(crash)
        try:
            answer = answer_of(request, folder, say)
        except EdgecompileError as error:
            kind = type(error).__name__
            answer = {"error": {"type": kind, "what": error.what, "why": error.why, "fix": error.fix}}
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        temporary = folder / "result.json.tmp"
        temporary.write_text(json.dumps(answer))
        temporary.rename(folder / "result.json")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads and exit handlers of the user's code have no say any more


def _export(request: Mapping[str, Any], folder: Path, say: Say) -> dict[str, Any]:
    path = Path(request["path"])
    if request["kind"] == "python":
        _check_syntax(path)
    say("importing torch")
    import numpy as np
    import torch

    from edgecompile import ladder
    from edgecompile.frontend import InputSpec, Range

    torch.manual_seed(request["seed"])
    specs = {n: InputSpec(tuple(shape), dtype) for n, (shape, dtype) in request["inputs"].items()}
    say(f"loading {path.name}")
    module, args, kwargs, defines, notes, user, program = _LOADERS[request["kind"]](request, specs)
    made = ladder.export(
        module,
        args,
        kwargs,
        folder=folder,
        user=user,
        inputs=specs,
        dynamic={n: {int(a): Range(*r) for a, r in axes.items()} for n, axes in request["dynamic"].items()},
        seed=request["seed"],
        program=program,
        say=say,
        own_process=True,
    )
    arrays = {
        f"{what}.{probe}.{i}": x
        for what, probes in (("inputs", made.feeds), ("outputs", made.reference))
        for probe, values in enumerate(probes)
        for i, x in enumerate(values.values())
    }
    np.savez(folder / "probes.npz", **arrays)  # pyright: ignore[reportArgumentType]
    assert made.graph.path is not None
    return {
        "onnx": str(made.graph.path.relative_to(folder)),
        "probes": len(made.feeds),
        "inputs": list(made.feeds[0]),
        "outputs": list(made.reference[0]),
        "attempts": [{**vars(a), "errors": {n: e.as_dict() for n, e in a.errors.items()}} for a in made.attempts],
        "versions": ladder.versions(),
        "defines": defines,
        "notes": [*notes, *made.notes],
    }


def _zoo(request: Mapping[str, Any], specs: Mapping[str, Any]) -> tuple[Any, ...]:
    import torch

    from edgecompile import models
    from edgecompile.models.randomize import randomize

    name, seed, notes = request["path"], request["seed"], []
    example = torch.randn(models.ZOO[name].input_shape, generator=torch.Generator().manual_seed(seed))
    own = request["checkpoint"] is None and models.ZOO[name].checkpoint is not None
    module = models.create(name, checkpoint=request["checkpoint"], pretrained=own)
    if own:
        notes.append("the weights that come with edgecompile")
    elif request["checkpoint"] is None:
        with torch.no_grad():
            randomize(module, seed, example)
        notes.append(f"random weights (seed {seed})")
    return module, (example,), {}, [], notes, User(Path(models.__file__).parent), None


def _python(request: Mapping[str, Any], specs: Mapping[str, Any]) -> tuple[Any, ...]:
    file, user = open_file(Path(request["path"]))
    module, args, kwargs = from_file(file, user, request, specs)
    defines = [n for n in ("calibration_data", "evaluate") if callable(vars(file).get(n))]
    notes = [f"{user.file} defines {n}()" for n in defines]
    return module, args, kwargs, defines, notes, user, None


def open_file(path: Path) -> tuple[ModuleType, User]:
    """Import a user's file.

    Raises:
        InputError: it cannot be imported.
    """
    from edgecompile import ladder

    user = User(path.parent, path.name)
    with ladder.user_code(user, f"{path.name} was imported"):
        return _import(path), user


def from_file(
    file: ModuleType, user: User, request: Mapping[str, Any], specs: Mapping[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The module that a user's file makes, with example arguments by position and by name.

    Raises:
        InputError: it makes none, or there are no example inputs.
    """
    import torch
    from torch import nn

    from edgecompile import ladder

    path, factory = Path(request["path"]), request["factory"]
    make = getattr(file, factory, None)
    if isinstance(make, nn.Module):
        module, line = make, ""
    else:
        if not callable(make):
            raise InputError(
                f"{path.name} has no function {factory}()", _has(file), f"define it, or name another: {path}:FACTORY"
            )
        with ladder.user_code(user, f"{factory}() was called"):
            module = make()
        line = user.defined(make)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{line or path.name}: {factory}() returned a {type(module).__name__}", "it must return a torch.nn.Module"
        )
    example = getattr(file, "example_inputs", None)
    if callable(example):
        with ladder.user_code(user, "example_inputs() was called"):
            values = example()
        args, kwargs = ladder.arguments(values, f"{user.defined(example) or path.name}: example_inputs()")
        return module, args, kwargs
    missing = [n for n in ladder.required_parameters(module) if n not in specs]
    if missing or not specs:
        wanted = " ".join(f"--input {n}:1x3x224x224" for n in missing or ["NAME"])
        raise InputError(
            f"{path.name} has no function example_inputs()",
            f"the shape of {', '.join(map(repr, missing)) or 'the input'} is unknown",
            f"define it, or give shapes: {wanted}",
        )
    rng = torch.Generator().manual_seed(request["seed"])
    return module, (), {n: ladder.random_tensor(s, rng) for n, s in specs.items()}


def _pt2(request: Mapping[str, Any], specs: Mapping[str, Any]) -> tuple[Any, ...]:
    import torch

    from edgecompile import ladder

    path = Path(request["path"])
    with ladder.quiet(own_process=True):
        try:
            program = torch.export.load(path)
        except Exception as error:  # a damaged archive fails in many ways
            from edgecompile.blame import one_line

            raise InputError(
                f"cannot read {path}", one_line(error), "write it with torch.export.save, in this version of torch"
            ) from None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
    else:
        raise InputError(
            f"{path.name} holds no example inputs", "", "export it with torch.export.export, which records them"
        )
    return program.module(), args, kwargs, [], [], User(path.parent, path.name), program


_LOADERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, ...]]] = {
    "zoo": _zoo,
    "python": _python,
    "pt2": _pt2,
}


def _check_syntax(path: Path) -> None:
    """Fail on a file that is not Python before torch is imported, which takes seconds."""
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise InputError(
            f"{path.name}:{error.lineno or 1}: SyntaxError: {error.msg}", (error.text or "").strip()
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", str(error)) from None


def _import(path: Path) -> ModuleType:
    """Import a file as Python would run it: its folder first on the path, the working directory last."""
    from importlib.util import module_from_spec, spec_from_file_location

    sys.dont_write_bytecode = True  # the user's folder stays as it is
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.resolve().parent))
    sys.path.append(os.getcwd())
    name = path.stem.replace(".", "_")
    if name in sys.modules:
        name = f"_edgecompile_{name}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _has(file: ModuleType) -> str:
    names = [n for n, v in vars(file).items() if callable(v) and getattr(v, "__module__", "") == file.__name__]
    return f"it defines {', '.join(names)}" if names else "it defines no function"


if __name__ == "__main__":
    serve(sys.argv[1], _export)
