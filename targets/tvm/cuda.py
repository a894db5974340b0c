"""What compiles the kernels of a library for CUDA, which devices run it, and what its kernels take there.

TVM generates CUDA C and, where it finds no device, keeps that in the library, to be compiled by whoever loads it. Here
nvcc compiles it when the library is built: machine code of the architecture that was asked for, and PTX, from which the
driver of any newer device makes its own. So a library needs no compiler where it runs, and no Python.

Sources: NVIDIA, CUDA Compiler Driver NVCC, "GPU Compilation" (machine code of one architecture beside PTX in a fat
binary); NVIDIA, CUDA Driver API, ``cuModuleLoadData`` (takes a fat binary).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile.errors import EnvironmentMissing, InputError

_TOOLKIT = Path("/usr/local/cuda/bin")  # where NVIDIA's packages put it, which is often not on the path
FIX = "install the CUDA toolkit, e.g. sudo apt-get install nvidia-cuda-toolkit, or put its bin on the PATH"
_RUNTIME = "libtvm_runtime_cuda.so"
_KIND = b"cuda"  # of a module, and what CUDA C is called in it
_BINARY = b"cubin"  # what goes to the driver as it is
_LENGTH = struct.Struct("<Q")


# -- compiling ---------------------------------------------------------------------------------------------------------


def compiler() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(_TOOLKIT))


def compiler_version() -> str:
    """Release of nvcc, e.g. ``13.0``; ``""`` if it does not say."""
    said = subprocess.run([compiler() or "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else ""


def require_compiler(arch: str) -> None:
    """Refuse before anything is lowered what nothing could compile.

    Raises:
        EnvironmentMissing: there is no nvcc.
    """
    if compiler() is None:
        raise EnvironmentMissing(f"nothing compiles kernels for {arch}", "nvcc is not on the path", FIX)


def binary(source: str, arch: str) -> bytes:
    """CUDA C as a fat binary for an architecture and all that are newer.

    Raises:
        EnvironmentMissing: there is no nvcc.
        InputError: it fails.
    """
    require_compiler(arch)
    number, nvcc = arch.removeprefix("sm_"), str(compiler())
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        given.write_text(source)
        both = f"arch=compute_{number},code=[sm_{number},compute_{number}]"
        # Not --use_fast_math, as TVM: a hyperbolic tangent would be off by 5e-4.
        command = [nvcc, "-fatbin", "-gencode", both, "-o", str(made), str(given)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["it failed"]
            why = next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
            raise InputError(
                f"nvcc cannot compile the kernels for {arch}", why.strip()[:300], f"{nvcc} --list-gpu-code"
            )
        return made.read_bytes()


@contextlib.contextmanager
def source_kept() -> Iterator[None]:
    """TVM keeps CUDA C as it is, also where it would compile it for the device that it finds."""
    name = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def packer(arch: str) -> Callable[[Any, bool, str, str], str]:
    """The argument ``fpack_imports`` of TVM's ``export_library``, which compiles the CUDA C of what is exported.

    Raises:
        EnvironmentMissing, InputError: that function, as :func:`binary`.
    """

    def pack(module: Any, is_system_library: bool, prefix: str, folder: str) -> str:
        import tvm

        packed = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        parts = list(_modules(module))
        for part in parts:
            if part.kind == _KIND.decode():
                source = part.inspect_source()
                packed = _replaced(packed, source.encode(), binary(source, arch))
        target = next(part for part in parts if part.kind == "llvm").get_function("_get_target_string")()
        made = tvm.get_global_func("codegen.codegen_blob")(packed, is_system_library, target, prefix)
        path = str(Path(folder) / f"{prefix}imports.o")
        made.write_to_file(path)
        return path

    return pack


def _modules(module: Any) -> Iterator[Any]:
    for part in module.imports:
        yield part
        yield from _modules(part)


def _replaced(packed: bytes, source: bytes, code: bytes) -> bytes:
    """What a library imports, with CUDA C replaced by what it was compiled to.

    It begins with its length. The module is its kind and then, with its length, its content: the format of the code,
    what its kernels are called and take, and the code, which all begin with their lengths as well.
    """
    end = packed.index(_sized(source)) + len(_sized(source))
    content = packed.rindex(_sized(_KIND), 0, end - len(source))
    start = content - _LENGTH.size
    if _LENGTH.unpack_from(packed, start)[0] != end - content:
        raise RuntimeError("TVM packs modules for CUDA in another way than this version of edgecompile knows")
    kernels = packed[content + len(_sized(_KIND)) : end - len(_sized(source))]
    changed = _sized(_sized(_BINARY) + kernels + _sized(code))
    return _sized(packed[_LENGTH.size : start] + changed + packed[end:])


def _sized(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


# -- the device --------------------------------------------------------------------------------------------------------


def capability(arch: str) -> tuple[int, int]:
    """Compute capability of an architecture: ``sm_87`` is 8.7."""
    return divmod(int(arch.removeprefix("sm_")), 10)


def device() -> Any:
    """The device that engines run on, as TVM calls it."""
    import tvm

    return tvm.cuda(0)


def require_device(arch: str) -> None:
    """Refuse what was compiled for ``arch`` where nothing runs it.

    Raises:
        EnvironmentMissing: there is no CUDA device, or an older one.
    """
    found, needed = device(), ".".join(map(str, capability(arch)))
    if not found.exist:
        raise EnvironmentMissing(
            "the engine does not run here",
            f"it was compiled for {arch}, and {_no_device()}",
            f"run it where there is a GPU of compute capability {needed} or above",
        )
    have = str(found.compute_version)
    if tuple(map(int, have.split("."))) < capability(arch):
        raise EnvironmentMissing(
            "the engine does not run on this GPU",
            f"it was compiled for {arch}, which is compute capability {needed}, and the GPU here has {have}",
            f"build it for this one, with --option arch=sm_{have.replace('.', '')}",
        )


def _no_device() -> str:
    """Why TVM has none."""
    import tvm

    library = Path(tvm.__path__[0]) / "lib" / _RUNTIME
    try:
        ctypes.CDLL(str(library))
    except OSError as error:  # libraries of CUDA that this one needs
        return f"TVM cannot load its CUDA runtime: {error}"
    return "there is no CUDA device"


def require_loaded(error: Exception) -> None:
    """Tell a model that cannot run from kernels that the driver does not take, which it says when the first is called.

    Raises:
        EnvironmentMissing: that is what TVM's error says.
    """
    if "cuModuleLoadData" in str(error):
        raise EnvironmentMissing(
            "the GPU's driver does not take the engine's kernels",
            " ".join(str(error).split())[-300:],
            "install a driver that is as new as the nvcc of the build, or build it with an older nvcc",
        ) from None


def until_done(call: Callable[[], object]) -> Callable[[], object]:
    """A function that calls another and returns when the device is done."""
    wait = device().sync

    def done() -> None:
        call()
        wait()

    return done


def kernel_times(machine: Any, name: str, kernels: Sequence[Mapping[str, Any]], runs: int) -> np.ndarray:
    """Microseconds of each kernel, ``[runs, kernels]``, each of which runs alone.

    Args:
        machine: a virtual machine, which is of no other use afterwards.
        name: its function that runs the model without arguments.
        kernels: as :func:`edgecompile.targets.tvm.lower.build` returns them.
        runs: how often.
    """
    symbols = [kernel["symbol"] for kernel in kernels]
    known, wait, now = set(symbols), device().sync, time.perf_counter_ns
    seen: list[tuple[str, int]] = []

    def watch(_: Any, symbol: str, *__: Any) -> int:
        if symbol in known:
            wait()
            seen.append((symbol, now()))
        return 0  # go on

    machine.set_instrument(watch)
    call, found = machine[name], []
    for _ in range(runs):
        seen.clear()
        call()
        if [symbol for symbol, _ in seen[::2]] != symbols:
            raise RuntimeError("the library calls other kernels than its list names")
        times = np.array([at for _, at in seen])
        found.append((times[1::2] - times[::2]) / 1e3)
    return np.array(found)
