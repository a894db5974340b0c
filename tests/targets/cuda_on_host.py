"""A CUDA device that is this CPU: TVM's own host code, virtual machine and CUDA runtime, with kernels compiled by g++.

A process has such a device where libraries under the names of CUDA's own, made of ``cuda_driver_on_host.cpp``, lie on
its path of libraries. Run as a program, ``python cuda_on_host.py FOLDER`` is one that answers :class:`Device`, and
``python cuda_on_host.py FOLDER ...`` is nvcc: what it makes of CUDA C is the path of a library.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
HEADER, DRIVER = HERE / "cuda_on_host.h", HERE / "cuda_driver_on_host.cpp"
RUNTIME, OTHER = "libcudart.so.13", "libcuda.so.1"  # all is in the first, whose symbols have its name as their version
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^;{]*)\) \{$', re.MULTILINE)
CAPABILITY = "CUDA_ON_HOST"  # the variable that tells what the device can
_WAITS = re.compile(r"__syncthreads|_sync\(")

# Calls a kernel with what `cuLaunchKernel` gets: addresses of its arguments.
_LAUNCH = """
template <class... A, size_t... I>
static void with(void (*kernel)(A...), void **given, std::index_sequence<I...>) { kernel(*(A *)given[I]...); }
template <class... A> static void with(void (*kernel)(A...), void **given) {
    with(kernel, given, std::index_sequence_for<A...>());
}
"""


def compiled(sources: Sequence[Path], library: Path, *flags: str) -> Path:
    """A library of C++ sources."""
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", "-o", str(library), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


def launches(source: str) -> Iterator[str]:
    """A function ``launch_NAME`` for each kernel of a source that TVM generated."""
    yield _LAUNCH
    found = list(_KERNEL.finditer(source))
    for kernel, end in zip(found, [*(k.start() for k in found[1:]), len(source)], strict=True):
        waits = str(bool(_WAITS.search(source, kernel.end(), end))).lower()
        yield (
            f'extern "C" int launch_{kernel[1]}(const unsigned *grid, const unsigned *block, void **given) '
            f"{{ return run(grid, block, {waits}, [=] {{ with({kernel[1]}, given); }}); }}"
        )


def module(source: str, folder: Path) -> Path:
    """CUDA C of TVM, compiled for the CPU."""
    number = len(list(folder.glob("*.cpp")))
    text = source.replace("#include <cuda.h>", f'#include "{HEADER.name}"')
    (folder / f"{number}.cpp").write_text("\n".join([text, *launches(source)]))
    return compiled([folder / f"{number}.cpp"], folder / f"{number}.so", "-O1")


class Device:
    """The device, in a process of its own, and its compiler, which others find on the path; a context manager."""

    def __init__(self, folder: Path):
        self.folder, symbols, compiler = folder, folder / "symbols", folder / "bin" / "nvcc"
        symbols.write_text(f"{RUNTIME} {{ global: *; }};\n")
        compiled([DRIVER], folder / RUNTIME, f"-Wl,-soname,{RUNTIME}", f"-Wl,--version-script={symbols}", "-ldl")
        compiled([], folder / OTHER, f"-Wl,-soname,{OTHER}")
        compiler.parent.mkdir()
        compiler.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} "$@"\n')
        compiler.chmod(0o755)
        path = f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"
        self.variables = {"PATH": path, "LD_LIBRARY_PATH": str(folder), CAPABILITY: "8.7"}
        command = [sys.executable, __file__, str(folder)]
        environment = {**os.environ, **self.variables}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, function: Callable[..., Any], *given: Any, **variables: str) -> Any:
        """What a function of this module returns there, or what it raises.

        Args:
            function: the function.
            given: its arguments.
            variables: of its environment.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(
            (function.__name__, given, {CAPABILITY: self.variables[CAPABILITY], **variables}), self._process.stdin
        )
        self._process.stdin.flush()
        result, error = pickle.load(self._process.stdout)
        if error is not None:
            raise error
        return result

    def sources(self) -> list[str]:
        """What its compiler was given, in order."""
        return [path.read_text() for path in sorted(self.folder.glob("*.cpp"), key=lambda path: int(path.stem))]

    def run(self, library: Path, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the function ``main`` of a library of TVM's virtual machine returns."""
        return self.ask(machine, library, feeds)


def machine(library: Path, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """See :meth:`Device.run`."""
    import tvm
    from tvm import relax

    device: Any = tvm.cuda(0)
    result = relax.VirtualMachine(tvm.runtime.load_module(str(library)), device)["main"](
        *(tvm.runtime.tensor(v, device) for v in feeds)
    )
    return [v.numpy() for v in ([result] if hasattr(result, "numpy") else result)]


def used(folder: Path, manifest: Any, model: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An engine, loaded and used: its ``outputs``, its ``clock``, the kernels that nobody ``waited`` for after a call
    and after one of the virtual machine's own, ``again`` the outputs after that, and the ``layers``.
    """
    import onnx

    from edgecompile.graph import Graph
    from edgecompile.targets.tvm import TvmTarget

    open_kernels = ctypes.c_int.in_dll(ctypes.CDLL(RUNTIME), "launched_since_waiting")
    engine: Any = TvmTarget().load(folder, manifest, Graph.from_proto(onnx.load_from_string(model)))
    outputs, call, waited = engine.run(feeds), engine.call(feeds), []
    for each in (call, engine._open()["bound_1"], call):
        each()
        waited.append(open_kernels.value)
    found = {"outputs": outputs, "clock": engine.clock, "waited": waited, "again": engine.run(feeds)}
    found["layers"] = engine.layers(feeds, 3)
    engine.close()
    return found


def built(folder: Path, model: bytes, options: Mapping[str, Any], feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The outputs of an engine that is built where the device is."""
    import onnx

    from edgecompile.graph import Graph
    from edgecompile.targets.tvm import TvmTarget

    return TvmTarget().build(Graph.from_proto(onnx.load_from_string(model)), folder, options).run(feeds)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed is no answer
    while True:
        try:
            name, given, variables = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.environ.update(variables)
        try:
            answer = globals()[name](*given), None
        except Exception as error:  # whatever the runtime raises
            known = type(error).__module__.startswith("edgecompile")
            answer = None, error if known else AssertionError(" ".join(str(error).split())[-2000:])
        pickle.dump(answer, answers)
        answers.flush()


def nvcc(folder: Path, arguments: Sequence[str]) -> None:
    """Compile as nvcc does."""
    assert "-fatbin" in arguments and "-gencode" in arguments
    made = module(Path(arguments[-1]).read_text(), folder)
    Path(arguments[arguments.index("-o") + 1]).write_text(str(made))


if __name__ == "__main__":
    nvcc(Path(sys.argv[1]), sys.argv[2:]) if sys.argv[2:] else main()
