"""A compiled library in TVM's virtual machine: run, bind, time kernel by kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import measure, oracle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.target import Engine, EngineManifest, LayerTime
from edgecompile.targets.tvm import cuda, lower
from edgecompile.targets.tvm.lower import TIMED, Compiled
from edgecompile.targets.tvm.options import Options

_WARM_RUNS = 2
_ONE_CPU_PER_THREAD = -2  # a mode of the runtime's thread pool


class _Pool(threading.local):
    """The runtime has one pool per thread that calls it."""

    threads = 0  # that it is set to; 0 if nobody has set it


_pool = _Pool()


class TvmEngine(Engine):
    """The virtual machine on a library; the library is loaded, and its code run, when it is first used.

    Args:
        manifest: of the engine.
        chosen: the options it was built with.
        library: its file, or what was compiled in this process.
        graph: its source.
        kernels: as :func:`edgecompile.targets.tvm.lower.build` returns them.
    """

    def __init__(
        self,
        manifest: EngineManifest,
        chosen: Options,
        library: Path | Compiled,
        graph: Graph,
        kernels: Sequence[Mapping],
    ):
        self.manifest = manifest
        self.threads = 0 if chosen.cuda else chosen.threads
        self.clock = "thread_cpu" if self.threads == 1 else "wall"
        self._chosen, self._library, self._graph, self._kernels = chosen, library, graph, kernels
        self._machine: Any = None
        self._bound = 0

    def _open(self):
        """The virtual machine, with the thread pool as this engine wants it."""
        import tvm

        if not self._chosen.runs_here:
            raise EnvironmentMissing(
                "the engine does not run here",
                f"it was compiled for {self.manifest.device}",
                "run it on such a device",
            )
        if self._machine is None:
            if self._chosen.cuda:
                cuda.require_device(self._chosen.cuda)
            self._machine = self._loaded()
        if self.threads > 1 and _pool.threads != self.threads:
            set_pool(tvm.get_global_func, self.threads, measure.for_threads(measure.affinity()))
            _pool.threads = self.threads
        return self._machine

    def _loaded(self):
        import tvm
        from tvm import relax

        given = self._library
        library: Any = given.linked if isinstance(given, Compiled) else tvm.runtime.load_module(str(given))
        return relax.VirtualMachine(library, self._device())

    def _device(self) -> Any:
        import tvm

        return cuda.device() if self._chosen.cuda else tvm.cpu()

    def _arguments(self, feeds: Mapping[str, np.ndarray]) -> list:
        import tvm

        oracle.check_feeds(self._graph, feeds)
        device = self._device()
        return [tvm.runtime.tensor(np.ascontiguousarray(feeds[t.name]), device) for t in self._graph.inputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`edgecompile.target.Engine.run`.

        Raises:
            InputError: an input is missing, unknown or of the wrong type or shape, or a kernel fails on it.
            EnvironmentMissing: the library was compiled for another kind of device.
        """
        machine, arguments = self._open(), self._arguments(feeds)
        try:
            result = machine["main"](*arguments)
        except Exception as error:  # TVM raises types of many kinds
            if self._chosen.cuda:
                cuda.require_loaded(error)
            raise InputError("TVM cannot run the model on these inputs", " ".join(str(error).split())[:300]) from None
        values = list(result) if len(self._graph.outputs) > 1 else [result]
        return {t.name: v.numpy() for t, v in zip(self._graph.outputs, values, strict=True)}

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """See :meth:`edgecompile.target.Engine.call`; the inputs are copied to the device once.

        A call returns when the device is done; the outputs stay there.

        Raises:
            InputError, EnvironmentMissing: as :meth:`run`.
        """
        self.run(feeds)
        machine = self._open()
        self._bound += 1
        name = f"bound_{self._bound}"
        machine.save_function("main", name, *self._arguments(feeds))
        return cuda.until_done(machine[name]) if self._chosen.cuda else machine[name]

    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Engine.layers`.

        The library reads the clock before and after each kernel, which takes less than half a microsecond; what lies
        between kernels (memory, views) is in none of them. On a GPU each kernel is waited for, so that what a launch
        takes is part of its time.

        Raises:
            InputError: as :meth:`run`; or the library was built before it could.
            EnvironmentMissing: as :meth:`run`.
        """
        return layers(self._kernels, self.profile(feeds, repeats), self._graph)

    def profile(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> dict[str, Any]:
        """What :func:`layers` takes; see :meth:`layers`."""
        import tvm

        machine, arguments = self._open(), self._arguments(feeds)
        if self._chosen.cuda:
            machine = self._loaded()  # one that is watched is slower
            machine.save_function("main", "bound", *arguments)
            runs = cuda.kernel_times(machine, "bound", self._kernels, _WARM_RUNS + repeats)
        else:
            arguments.append(tvm.runtime.tensor(stamps(len(self._kernels))))
            runs = kernel_times(machine, arguments, machine.invoke_stateful, _WARM_RUNS + repeats)
        return {"microseconds": np.median(runs[_WARM_RUNS:], axis=0).tolist()}

    def close(self) -> None:
        """Free the virtual machine and the library."""
        self._machine = None


def set_pool(function: Callable[[str], Any], threads: int, cpus: Sequence[int]) -> None:
    """Set the runtime's thread pool; it counts the calling thread, which stays free to run on all of the CPUs.

    Where it is not told the CPUs, the pool has half of those of an x86 machine, which it takes for hyper-threads, or
    what OMP_NUM_THREADS says, and the calling thread, with all that it starts later, is left with one. The first time
    decides how large the pool can be, so that it is told all CPUs, whatever the number of threads.

    Args:
        function: gives the runtime's functions by name.
        threads: that run an operator.
        cpus: :func:`edgecompile.measure.for_threads`; each thread of the pool but the calling one is bound to one.
    """
    function("runtime.config_threadpool")(_ONE_CPU_PER_THREAD, threads, function("ffi.Array")(*map(str, cpus)))


# -- times of kernels --------------------------------------------------------------------------------------------------


def stamps(kernels: int) -> np.ndarray:
    """What :data:`edgecompile.targets.tvm.lower.TIMED` writes into."""
    return np.zeros((2 * kernels, 2), np.int64)


def kernel_times(machine: Any, arguments: Sequence[Any], once: Callable[[str], object], runs: int) -> np.ndarray:
    """Microseconds of each kernel, ``[runs, kernels]``.

    Args:
        machine: the virtual machine, in this process or on a board.
        arguments: of :data:`edgecompile.targets.tvm.lower.TIMED`, where the machine is.
        once: runs the function of that name; if it does so twice, what counts is the second time.
        runs: how often.

    Raises:
        InputError: the library has no such function.
    """
    try:
        machine.set_input(TIMED, *arguments)
    except Exception as error:
        if f"Unknown function: {TIMED}" not in str(error):
            raise
        raise InputError(
            "the library does not tell the times of its kernels", "an earlier edgecompile built it", "build it again"
        ) from None
    read, found = machine.module["get_output"], []
    for _ in range(runs):
        once(TIMED)
        times = read(TIMED, 0).numpy() @ np.array([10**9, 1])
        found.append((times[1::2] - times[::2]) / 1e3)
    return np.array(found)


def layers(kernels: Sequence[Mapping[str, Any]], profile: Mapping[str, Any], graph: Graph) -> list[LayerTime]:
    """The layers of an engine.

    Args:
        kernels: as :func:`edgecompile.targets.tvm.lower.build` returns them.
        profile: ``{"microseconds": of each kernel}``.
        graph: that the engine was built from.

    Raises:
        ValueError: that is not the profile of these kernels.
    """
    paths, found = lower.modules(graph), []
    for kernel, microseconds in zip(kernels, profile["microseconds"], strict=True):
        symbol, of = kernel["symbol"], tuple(kernel["nodes"])
        modules = tuple(dict.fromkeys(m for n in of for m in paths.get(n, ())))
        found.append(LayerTime(symbol, symbol.rstrip("0123456789"), float(microseconds), of, modules))
    return found
