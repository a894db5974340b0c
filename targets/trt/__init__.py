"""The target ``trt``: TensorRT 10.3, 10.16 and 11 from one code path, on desktop GPUs and Jetsons.

Native ``tensorrt``, always strongly typed: precision is in the graph. Without TensorRT, :meth:`TrtTarget.prepare` does
everything that needs none, and the board finishes the build.

What runs an engine (:mod:`edgecompile.targets.trt.session` and what it imports, this file included) needs numpy and
TensorRT only: it travels to boards. What takes the graph is imported where it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgecompile import device as cuda
from edgecompile.errors import EnvironmentMissing
from edgecompile.files import write_atomic
from edgecompile.target import Capability, Engine, EngineManifest, LayerTime, Target
from edgecompile.targets.trt import options as trt_options
from edgecompile.targets.trt import plan, probe, session

if TYPE_CHECKING:
    from edgecompile.graph import Graph
    from edgecompile.targets.trt.preflight import Problem, View

ENGINE, TIMING_CACHE = "engine.plan", "timing.cache"


@dataclass(frozen=True)
class Prepared:
    """What can be said of an engine that is yet to be built.

    Attributes:
        manifest: as of the engine, without files, versions and device.
        versions: of TensorRT that can build it, of those in :data:`edgecompile.targets.trt.support.VERSIONS`.
        problems: by version of TensorRT, what it refuses and what will be slow.
        missing: what this machine lacks to build it, None if nothing.
    """

    manifest: EngineManifest
    versions: tuple[str, ...]
    problems: Mapping[str, tuple[Problem, ...]]
    missing: EnvironmentMissing | None

    def line(self, bundle: Path) -> str:
        """What is missing and how to go on, in one line."""
        lacking = f"{self.missing.what}: " if self.missing else ""
        return (
            f"{lacking}{bundle} is prepared for TensorRT {', '.join(self.versions)}; "
            f"on the board, run edgecompile build {bundle}"
        )


class TrtTarget(Target):
    """Lower a graph to a TensorRT engine."""

    name: ClassVar[str] = "trt"
    options: ClassVar[Mapping[str, tuple[Any, str]]] = trt_options.OPTIONS
    pipelines: ClassVar[Mapping[str, str]] = {
        "fp32": "clean,fold_norm,reparam,legalize{target=trt}",
        "fp16": "clean,fold_norm,reparam,cast,legalize{target=trt}",
        "int8": "clean,fold_norm,reparam,quantize{rules=tensorrt},legalize{target=trt}",
    }

    def probe(self) -> Sequence[Capability]:
        """TensorRT and the device, or what is missing."""
        return list(probe.capabilities())

    def check(self, options: Mapping[str, Any]) -> None:
        """See :meth:`edgecompile.target.Target.check`."""
        trt_options.parse(options)

    def missing(self) -> EnvironmentMissing | None:
        """What keeps this machine from building an engine; None if nothing does."""
        try:
            probe.runtime()
            cuda.open_device()
        except EnvironmentMissing as error:
            return error
        return None

    def prepare(self, graph: Graph, options: Mapping[str, Any]) -> Prepared:
        """Check everything that needs no TensorRT; the graph and the options are what the board will build from.

        Args:
            graph: the rewritten graph.
            options: as for :meth:`build`.

        Raises:
            InputError: an option cannot be used, or no version of TensorRT takes the graph.
        """
        from edgecompile.targets.trt import build as trt_build
        from edgecompile.targets.trt import preflight, support
        from edgecompile.targets.trt.preflight import View

        chosen = trt_options.parse(options)
        trt_build.check_ranges({t.name: tuple(t.shape or ()) for t in graph.inputs}, chosen.dynamic)
        view = View.of(trt_build.lowered(graph, chosen), support.VERSIONS[0])
        problems = {version: tuple(_problems(view, version)) for version in support.VERSIONS}
        fine = tuple(v for v, found in problems.items() if not any(p.fatal for p in found))
        if not fine:
            newest = support.VERSIONS[-1]
            preflight.require(problems[newest], newest, len(list(graph.walk())))
        manifest = EngineManifest(self.name, (), {}, "", chosen.recorded())
        return Prepared(manifest, fine, problems, self.missing())

    def build(
        self, graph: Graph, folder: Path, options: Mapping[str, Any], say: Callable[[str], None] | None = None
    ) -> Engine:
        """See :meth:`edgecompile.target.Target.build`; writes :data:`ENGINE` and :data:`TIMING_CACHE`.

        Args:
            graph: the rewritten graph.
            folder: where the files go.
            options: see :data:`edgecompile.targets.trt.options.HELP`.
            say: told how far the builder is.

        Raises:
            InputError: an option cannot be used, or TensorRT refuses the graph (all nodes, by module path).
            EnvironmentMissing: TensorRT or a device is missing, or the device has too little memory.
        """
        from edgecompile.targets.trt import build as trt_build
        from edgecompile.targets.trt import preflight, shift_add, strong_typing
        from edgecompile.targets.trt.engine import TrtEngine

        chosen = trt_options.parse(options)
        trt = probe.runtime()
        trt_options.require(chosen, probe.facts(trt))
        device, log = cuda.open_device(), session.logger(trt)
        machine = probe.machine(trt, device, log)
        lowered = trt_build.lowered(graph, chosen)
        typed = strong_typing.check(lowered, trt.__version__)
        preflight.require(typed, trt.__version__, len(lowered.nodes))
        plugins = shift_add.kernels(lowered)
        if plugins:
            oldest = "8.0" if chosen.hardware == "ampere_plus" else machine.compute_capability
            shift_add.register(trt, plugins, oldest)
        built = trt_build.build(trt, lowered, chosen, log, say)
        if say is not None and built.dla is not None:
            say(str(built.dla))
        plan.write(
            folder / ENGINE,
            bytes(built.plan),
            machine,
            dla_core=chosen.dla,
            version_compatible=chosen.version_compatible,
            hardware=chosen.hardware,
        )
        write_atomic(folder / TIMING_CACHE, [built.timing_cache])
        if chosen.timing_cache and not chosen.replay:
            write_atomic(Path(chosen.timing_cache), [built.timing_cache])
        dla = {"_dla": asdict(built.dla)} if built.dla else {}
        packed = {"_plugins": dict(Counter(f"{shift_add.NAMESPACE}::{name}" for name, _ in plugins))} if plugins else {}
        recorded = (
            chosen.recorded()
            | dla
            | packed
            | {
                "_timing_cache_sha256": trt_options.digest(built.timing_cache),
                "_notes": [
                    *([str(built.dla)] if built.dla else []),
                    *([shift_add.NOTHING] if chosen.shift_add == "plugin" and not plugins else []),
                    *(str(p) for p in typed),
                ],
            }
        )
        files = (ENGINE, TIMING_CACHE)
        where = f"sm_{machine.compute_capability.replace('.', '')} {machine.os}"
        manifest = EngineManifest(self.name, files, {"tensorrt": trt.__version__}, where, recorded)
        return TrtEngine(trt, device, manifest, chosen, plan.read(folder / ENGINE, machine)[1], log, lowered)

    def load(self, folder: Path, manifest: EngineManifest, graph: Graph) -> Engine:
        """See :meth:`edgecompile.target.Target.load`; TensorRT sees the engine only after its header was verified."""
        from edgecompile.targets.trt.build import lowered
        from edgecompile.targets.trt.engine import TrtEngine

        opened = session.verified(folder, manifest)
        return TrtEngine(*opened, lowered(graph, opened[3]))

    def layers(
        self, folder: Path, manifest: EngineManifest, graph: Graph, profile: Mapping[str, Any]
    ) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Target.layers`."""
        from edgecompile.targets.trt.build import lowered
        from edgecompile.targets.trt.layers import of_profile

        return of_profile(profile, lowered(graph, session.options(manifest)))


def _problems(view: View, version: str) -> list[Problem]:
    from edgecompile.targets.trt import preflight, strong_typing

    return [*preflight.check(view, version), *strong_typing.check(view, version)]
