"""A CUDA device that is this CPU: TVM's own host code, virtual machine and CUDA runtime, with kernels compiled by g++.

Run as a program, ``python cuda_on_host.py FOLDER``, it is the process that has such a device: libraries under the
names of CUDA's own, made of ``cuda_driver_on_host.cpp``, are loaded before TVM looks for those. Each line of its input
names a library and files of inputs and outputs; the line that it answers is empty, or says what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
HEADER, DRIVER = HERE / "cuda_on_host.h", HERE / "cuda_driver_on_host.cpp"
RUNTIME, OTHER = "libcudart.so.13", "libcuda.so.1"  # all is in the first, whose symbols have its name as their version
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^;{]*)\) \{$', re.MULTILINE)
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
    """The device, in a process of its own; a context manager."""

    def __init__(self, folder: Path):
        self.folder, symbols = folder, folder / "symbols"
        symbols.write_text(f"{RUNTIME} {{ global: *; }};\n")
        compiled([DRIVER], folder / RUNTIME, f"-Wl,-soname,{RUNTIME}", f"-Wl,--version-script={symbols}", "-ldl")
        compiled([], folder / OTHER, f"-Wl,-soname,{OTHER}")
        command = [sys.executable, __file__, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, library: Path, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the function ``main`` of a library of TVM's virtual machine returns."""
        assert self._process.stdin is not None and self._process.stdout is not None
        given, found = self.folder / "given.npz", self.folder / "found.npz"
        np.savez(given, *feeds)
        print(json.dumps([str(library), str(given), str(found)]), file=self._process.stdin, flush=True)
        assert (said := self._process.stdout.readline()) == "\n", said
        with np.load(found) as values:
            return list(values.values())


def main(folder: Path) -> None:
    for name in (RUNTIME, OTHER):
        ctypes.CDLL(str(folder / name))
    import tvm
    import tvm_ffi
    from tvm import relax

    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile", lambda source: str(module(source, folder)).encode(), override=True
    )
    device: Any = tvm.cuda(0)
    assert device.exist
    for line in sys.stdin:
        library, given, found = json.loads(line)
        try:
            machine = relax.VirtualMachine(tvm.runtime.load_module(library), device)
            with np.load(given) as values:
                result = machine["main"](*(tvm.runtime.tensor(v, device) for v in values.values()))
            np.savez(found, *(v.numpy() for v in ([result] if hasattr(result, "numpy") else result)))
            print(flush=True)
        except Exception as error:  # whatever the runtime raises
            print(" ".join(str(error).split())[-2000:], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
