"""An ARM board that is emulated: the C++ program of examples/tvm_cpp under qemu, and graphs to run there.

The libraries come from the board's wheels, which pip downloads once into the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import platformdirs
import pytest
from filelock import FileLock
from onnx import compose

from edgecompile import oracle
from edgecompile.graph import Graph
from edgecompile.targets.tvm import ENGINE, TvmTarget

EXAMPLE = Path(__file__).parents[2] / "examples" / "tvm_cpp"
COMPILER, SYSROOT = "aarch64-linux-gnu-g++", Path("/usr/aarch64-linux-gnu")
# What qemu calls a CPU that has the instructions of one that LLVM knows, and not those that tell it from the next.
QEMU = {"cortex-a72": "cortex-a72", "cortex-a78": "cortex-a76", "neoverse-v1": "max", "neoverse-v2": "max"}
_KEPT = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so", "tvm_ffi/include/")


class Board:
    """The program, which runs engines of one CPU after another."""

    def __init__(self, program: Path, emulator: str):
        self._program, self._emulator = program, emulator

    def start(self, cpu: str, *arguments: str | Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
        """Run the program on a CPU as qemu calls it."""
        command = [self._emulator, "-L", SYSROOT, "-cpu", cpu, self._program, *arguments]
        environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
        return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)

    def run(self, graph: Graph, folder: Path, feeds: Mapping[str, np.ndarray], cpu: str, threads: int = 1) -> dict:
        """Outputs of the engine that was built in a folder."""
        for number, tensor in enumerate(graph.inputs):
            np.save(folder / f"in{number}.npy", feeds[tensor.name])
        given = [folder / f"in{number}.npy" for number in range(len(graph.inputs))]
        done = self.start(cpu, "-n", "0", folder / ENGINE, folder / "out", *given, threads=threads)
        assert done.returncode == 0, (done.returncode, done.stderr)
        return {tensor.name: np.load(folder / f"out{number}.npy") for number, tensor in enumerate(graph.outputs)}


def board(folder: Path) -> Board:
    """The board, its program built in a folder as the example's README says; skips where something is missing."""
    emulators = [name for name in ("qemu-aarch64", "qemu-aarch64-static") if shutil.which(name)]
    if not emulators or not shutil.which(COMPILER) or not shutil.which("make"):
        pytest.skip("no emulated ARM board: sudo apt-get install qemu-user g++-aarch64-linux-gnu make")
    for name in ("run.cpp", "Makefile"):
        shutil.copy(EXAMPLE / name, folder)
    wheels = _wheels()
    given = [f"CXX={COMPILER}", f"FFI={wheels / 'tvm_ffi'}", f"TVM={wheels / 'tvm'}", "CXXFLAGS=-O1 -Wall -Wextra"]
    done = subprocess.run(["make", "-C", str(folder), *given], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return Board(folder / "run", emulators[0])


def _wheels() -> Path:
    """The board's headers and libraries, from the wheels of the versions that are installed here."""
    wanted = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    place = Path(platformdirs.user_cache_dir("edgecompile-tests")) / "-".join(["aarch64", *wanted])
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"), tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        if not place.exists():
            tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 24, 27, 28)]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *tags]
            try:
                done = subprocess.run([*command, "-d", scratch, *wanted], capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                pytest.skip("pip download of the board's wheels took too long")
            if done.returncode:
                pytest.skip(f"pip cannot download {' '.join(wanted)} for aarch64: {done.stderr.strip()[-200:]}")
            for wheel in Path(scratch).glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(
                        f"{scratch}/kept", [name for name in archive.namelist() if name.startswith(_KEPT)]
                    )
            os.replace(f"{scratch}/kept", place)
    return place


def together(graphs: Mapping[str, Graph]) -> Graph:
    """One graph of several that have nothing in common; names of tensors begin with that of their graph."""
    protos = [
        compose.add_prefix(graph.to_proto(), f"{name}/", rename_functions=False) for name, graph in graphs.items()
    ]
    whole, functions = onnx.GraphProto(name="together"), {}
    for proto in protos:
        whole.MergeFrom(proto.graph)
        functions |= {f.name: f for f in proto.functions}
    whole.name = "together"
    opsets = {o.domain: o.version for proto in protos for o in proto.opset_import}
    assert len({o.version for proto in protos for o in proto.opset_import if not o.domain}) == 1
    imports = [onnx.helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    return Graph.from_proto(
        onnx.helper.make_model(whole, opset_imports=imports, functions=list(functions.values()), ir_version=9)
    )


def built(graph: Graph, folder: Path, mcpu: str, **given: object) -> list[str]:
    """Build an engine for a CPU as LLVM calls it; returns what was said of coded weights."""
    said: list[str] = []
    options = {"threads": 1, "mtriple": "aarch64-linux-gnu", "mcpu": mcpu, **given}
    TvmTarget().build(graph, folder, options, said.append)
    return said


def errors(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest errors of the outputs, as parts of their largest values."""
    return {name: error.max_rel for name, error in oracle.compare_all(reference, found).items()}
