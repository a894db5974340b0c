"""The contract between the driver and a backend: probe, build, run, time, explain.

A target lowers what the graph says and nothing else; it lives in ``edgecompile.targets`` and is found by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgecompile import measure
from edgecompile.errors import EnvironmentMissing, InputError

if TYPE_CHECKING:
    from edgecompile.graph import Graph
    from edgecompile.measure import Samples


@dataclass(frozen=True)
class Capability:
    """One line of ``edgecompile doctor``.

    Attributes:
        name: what it is, e.g. ``onnxruntime CPU provider``.
        available: whether it works here.
        version: its version, or ``""``.
        detail: what it can do here, or why it cannot.
        fix: the command that gets it, or ``""``.
    """

    name: str
    available: bool
    version: str = ""
    detail: str = ""
    fix: str = ""


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer of an engine.

    Attributes:
        name: the engine's own name for it.
        op: kind of kernel or operator.
        microseconds: median time of one execution.
        nodes: names of the ONNX nodes (of the graph given to ``build``) that it executes.
        modules: their torch module paths.
    """

    name: str
    op: str
    microseconds: float
    nodes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineManifest:
    """What an engine is and where it runs.

    Attributes:
        target: name of the target.
        files: names of the engine's files, relative to the bundle; the first is the engine.
        versions: runtime versions it was built with.
        device: the device it was built for.
        options: the target options, as given and defaulted.
    """

    target: str
    files: tuple[str, ...]
    versions: Mapping[str, str]
    device: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine(ABC):
    """A compiled model, ready to run.

    Attributes:
        manifest: what it is.
        clock: what :meth:`call` is timed with: ``"thread_cpu"`` (one CPU thread), ``"wall"`` or ``"cuda_event"``.
        threads: CPU threads it uses, 0 if it does not run on the CPU.
    """

    manifest: EngineManifest
    clock: str
    threads: int

    @abstractmethod
    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, in the model's order."""

    @abstractmethod
    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function without arguments that executes the engine once on ``feeds``, with little overhead."""

    @abstractmethod
    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """Per-layer times in execution order, from the runtime's own profiler."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing that needs closing
        """Free what the engine holds."""


class Target(ABC):
    """A backend.

    Attributes:
        name: how the command line calls it.
        options: option name -> (default, help); all values are given as text on the command line.
        pipelines: precision -> pass spec that prepares a graph for this target.
        static: its engines take inputs of one shape only, which is that of the example inputs.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    pipelines: ClassVar[Mapping[str, str]] = {"fp32": "clean,fold_norm,reparam"}
    static: ClassVar[bool] = False

    @abstractmethod
    def probe(self) -> Sequence[Capability]:
        """What is here and what is missing; never raises."""

    @abstractmethod
    def build(
        self, graph: Graph, folder: Path, options: Mapping[str, Any], say: Callable[[str], None] | None = None
    ) -> Engine:
        """Lower ``graph``, write the engine's files into ``folder``, return the engine.

        Args:
            graph: what to lower.
            folder: where the files go.
            options: of the target, as text or typed.
            say: called with what is being done, by a target that can tell.

        Raises:
            EnvironmentMissing: the runtime is not installed or cannot use this machine.
            InputError: an option is unknown, or the runtime rejects the graph (named by module path).
        """

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: B027 - not every target can tell so early
        """Refuse options that no graph could be built with, before any work is done.

        Raises:
            InputError: an option is unknown or cannot be used.
        """

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of figures from this target should know."""
        return ()

    def machine(self) -> dict[str, Any]:
        """What its engines run on, as :func:`edgecompile.measure.machine` tells."""
        return measure.machine()

    def approximates(self, graph: Graph, options: Mapping[str, Any]) -> str:
        """The option, as ``NAME=VALUE``, by which an engine of ``graph`` may compute another function; ``""``: none.

        Such an engine has a budget like that of an approximating pass; all others may differ by rounding alone.

        Args:
            graph: what is built.
            options: of the target, as text or typed.
        """
        return ""

    def missing(self) -> EnvironmentMissing | None:
        """What keeps this machine from building, for a target that can prepare a build; None for the others."""
        return None

    def prepare(self, graph: Graph, options: Mapping[str, Any]) -> Any:
        """Check what needs no runtime.

        Raises:
            InputError: this target builds on the machine that it runs on.
        """
        raise InputError(f"target {self.name} has nothing to prepare", "it builds here", "leave out --prepare")

    @abstractmethod
    def load(self, folder: Path, manifest: EngineManifest, graph: Graph) -> Engine:
        """Open an engine that :meth:`build` wrote; ``graph`` is the bundle's ``model.onnx``.

        Raises:
            EnvironmentMissing: it was built for another device, runtime or version.
        """

    def layers(
        self, folder: Path, manifest: EngineManifest, graph: Graph, profile: Mapping[str, Any]
    ) -> list[LayerTime]:
        """Layers of an engine that was profiled on a board, in execution order.

        Args:
            folder, manifest, graph: as for :meth:`load`; the engine is not opened.
            profile: what the ``profile`` of its session returned there.

        Raises:
            InputError: the target cannot tell.
        """
        raise InputError(f"target {self.name} does not tell the layers of an engine that runs elsewhere")


# -- options as text or typed ------------------------------------------------------------------------------------------


def read_threads(value: Any) -> int:
    """The option ``threads``: ``auto`` (every physical core this process may use) or a whole number from 1.

    Raises:
        InputError: it is something else.
    """
    if str(value) == "auto":
        return measure.available_cores()
    if not str(value).isdigit() or int(value) < 1:
        raise InputError(f"threads={value} is not a number of threads", "give auto or a whole number from 1")
    return int(value)


def read_flag(name: str, value: Any) -> bool:
    """The option ``name``, which is either true or false.

    Raises:
        InputError: it is neither.
    """
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise InputError(f"{name}={value} is neither true nor false")
    return text in ("true", "1", "yes")


_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def read_size(name: str, value: Any) -> int:
    """The option ``name``, which is a size above 0, e.g. ``2GiB``; in bytes.

    Raises:
        InputError: it is something else.
    """
    text = str(value)
    unit = text[-3:] if text[-3:] in _UNITS else ""
    try:
        size = int(float(text.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise InputError(f"{name}={value} is not a size", "give bytes, or a number with KiB, MiB or GiB")
    return size


class BoardTarget(Target):
    """A target whose engines run on a board, which has a clock of its own."""

    @abstractmethod
    def measured(
        self,
        arms: Mapping[str, tuple[Graph, Path, EngineManifest]],
        feeds: Mapping[str, np.ndarray],
        seconds: float,
        seed: int,
        progress: Callable[[float], object],
    ) -> dict[str, Samples]:
        """Engines, by name, timed interleaved on the board in sessions that open them anew.

        Args:
            arms: graph, folder and manifest of each.
            feeds: inputs of all of them.
            seconds: wall time per arm, over all sessions.
            seed: of the order.
            progress: told the share that is done.
        """
