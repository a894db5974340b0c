"""The target ``tvm``: a shared library of compiled kernels, for this CPU, for ARM boards, and for CUDA.

Apache TVM imports the graph into Relax; :mod:`edgecompile.targets.tvm.schedules` says how the kernels that matter are
computed, and LLVM compiles them. ``model.so`` holds code, weights and the plan of execution; ``kernels.json`` says
which nodes of ``model.onnx`` each kernel stands for. Loading a library executes code, so :meth:`TvmTarget.load`
compares the manifest with this machine first.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from edgecompile import functions, measure
from edgecompile.errors import EnvironmentMissing, InputError, missing_extra
from edgecompile.files import write_atomic
from edgecompile.graph import Graph, named
from edgecompile.target import Capability, Engine, EngineManifest, LayerTime, Target
from edgecompile.targets.tvm import cuda, lower, tune
from edgecompile.targets.tvm import options as tvm_options
from edgecompile.targets.tvm.engine import TvmEngine, layers
from edgecompile.targets.tvm.lower import Compiled
from edgecompile.targets.tvm.options import Options

ENGINE, KERNELS = "model.so", "kernels.json"
_REBUILD = "build it again on this machine: edgecompile build model.onnx --target tvm"
_LINKERS = {"x86_64": "gcc", "aarch64": "aarch64-linux-gnu-gcc"}


class TvmTarget(Target):
    """Compile a graph with Apache TVM."""

    name: ClassVar[str] = "tvm"
    options: ClassVar[Mapping[str, tuple[Any, str]]] = tvm_options.OPTIONS
    pipelines: ClassVar[Mapping[str, str]] = {
        "fp32": "clean,fold_norm,reparam,legalize{target=tvm},clean",
        "int8": "clean,fold_norm,reparam,legalize{target=tvm},clean,quantize{rules=tvm}",
    }

    static: ClassVar[bool] = True

    def probe(self) -> Sequence[Capability]:
        """TVM, the CPU it compiles for by default, the linkers, and the compiler for CUDA."""
        return list(_capabilities())

    def check(self, options: Mapping[str, Any]) -> None:
        """See :meth:`edgecompile.target.Target.check`."""
        runtime()
        tvm_options.require_linker(tvm_options.parse(options))

    def build(
        self, graph: Graph, folder: Path, options: Mapping[str, Any], say: Callable[[str], None] | None = None
    ) -> Engine:
        """See :meth:`edgecompile.target.Target.build`; writes :data:`ENGINE` and :data:`KERNELS`.

        An engine for another kind of device is built and linked; only running it raises EnvironmentMissing.
        """
        runtime()
        chosen = tvm_options.parse(options)
        tvm_options.require_linker(chosen)
        if chosen.cuda:
            cuda.require_compiler(chosen.cuda)
        source = named(graph)
        recorded = {name: options.get(name, default) for name, (default, _) in self.options.items()}
        if chosen.cuda:  # the CPU's kind, which the device does not tell
            recorded["mtriple"] = recorded["mtriple"] or f"{chosen.machine}-linux-gnu"
        versions = {package: version(package) for package in ("apache-tvm", "apache-tvm-ffi")}
        manifest = EngineManifest(self.name, (ENGINE, KERNELS), versions, tvm_options.device(chosen), recorded)

        def opened(library: Path | Compiled, kernels: Sequence[Mapping]) -> TvmEngine:
            return TvmEngine(manifest, chosen, library, source, kernels)

        if chosen.tune is None and not chosen.tuning:
            kernels = lower.build(source, chosen, folder / ENGINE, say)
        else:
            tuned = tune.build(source, chosen, folder / ENGINE, lambda: self._runner(source, chosen, opened, say), say)
            kernels, recorded = tuned.kernels, {**recorded, "_notes": [tuned.note]}
            manifest = replace(manifest, files=(*manifest.files, *tuned.files), options=recorded)
        write_atomic(folder / KERNELS, [json.dumps(kernels, indent=0).encode()])
        return opened(folder / ENGINE, kernels)

    def _runner(
        self, graph: Graph, chosen: Options, opened: tune.Opened, say: Callable[[str], None] | None
    ) -> tune.Runner:
        """Times kernels for a search."""
        return tune.Here(graph, chosen, opened)

    def approximates(self, graph: Graph, options: Mapping[str, Any]) -> str:
        """See :meth:`edgecompile.target.Target.approximates`."""
        return functions.rounded(graph, options)

    def load(self, folder: Path, manifest: EngineManifest, graph: Graph) -> Engine:
        """See :meth:`edgecompile.target.Target.load`; the library is not touched before it is known to fit."""
        runtime()
        chosen = tvm_options.parse(manifest.options)
        _require_fit(folder / ENGINE, manifest, chosen)
        return TvmEngine(manifest, chosen, folder / ENGINE, named(graph), kernels_of(folder))

    def layers(
        self, folder: Path, manifest: EngineManifest, graph: Graph, profile: Mapping[str, Any]
    ) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Target.layers`."""
        return layers(kernels_of(folder), profile, named(graph))


def kernels_of(folder: Path) -> list[Mapping[str, Any]]:
    """The kernels of an engine in a folder, as :func:`edgecompile.targets.tvm.lower.build` returned them.

    Raises:
        InputError: they cannot be read.
    """
    try:
        return json.loads((folder / KERNELS).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / KERNELS} cannot be read", str(error), _REBUILD) from None


def runtime():
    """The module ``tvm``.

    Raises:
        EnvironmentMissing: it is not installed, or broken.
    """
    try:
        import tvm
    except ModuleNotFoundError:
        raise missing_extra("the target tvm cannot be used", "apache-tvm", "tvm") from None
    except Exception as error:  # a wrong version of its ffi package raises whatever it meets first
        raise EnvironmentMissing(
            "TVM cannot be loaded", " ".join(str(error).split())[:300], "pip install 'edgecompile[tvm]'"
        ) from None
    return tvm


def _require_fit(path: Path, manifest: EngineManifest, chosen: Options) -> None:
    """Refuse a library that another version made, or whose code this CPU may not have.

    Raises:
        EnvironmentMissing: it is one.
    """
    if chosen.cuda:
        cuda.require_device(chosen.cuda)
    built, here = manifest.versions.get("apache-tvm", ""), version("apache-tvm")
    if built.split(".")[:2] != here.split(".")[:2]:
        raise EnvironmentMissing(
            f"{path} was built with TVM {built}",
            f"this is {here}, and a library runs on the version that made it",
            f"pip install 'apache-tvm=={built}', or {_REBUILD}",
        )
    if missing := measure.lacking(tvm_options.host(chosen) if chosen.cuda else manifest.device):
        raise EnvironmentMissing(
            f"{path} was built for another CPU", f"it needs {', '.join(missing)}, which this machine lacks", _REBUILD
        )


def _capabilities() -> Iterator[Capability]:
    # By what is installed: importing TVM imports torch, which takes seconds.
    if importlib.util.find_spec("tvm") is None:
        yield Capability("tvm compiler", False, detail="not installed", fix="pip install 'edgecompile[tvm]'")
        return
    yield Capability("tvm compiler", True, version("apache-tvm"), f"compiles for {measure.cpu()}")
    for machine, linker in _LINKERS.items():
        path = shutil.which(linker)
        fix = "" if path else f"sudo apt-get install {'gcc' if linker == 'gcc' else 'gcc-aarch64-linux-gnu'}"
        yield Capability(f"tvm linker for {machine}", path is not None, detail=path or f"no {linker}", fix=fix)
    nvcc = cuda.compiler()
    yield Capability(
        "nvcc for tvm",
        nvcc is not None,
        cuda.compiler_version() if nvcc else "",
        nvcc or "no nvcc",
        "" if nvcc else cuda.FIX,
    )
