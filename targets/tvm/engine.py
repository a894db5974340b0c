"""A compiled library in TVM's virtual machine: run, bind, time kernel by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import oracle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.target import Engine, EngineManifest, LayerTime
from edgecompile.targets.tvm import lower
from edgecompile.targets.tvm.options import Options

_WARM_RUNS = 2
_ALL_BIG_CORES = 1  # what the runtime's thread pool calls its usual mode
_pool = [0]  # threads that the process's pool is set to; 0 if nobody has set it


class TvmEngine(Engine):
    """The virtual machine on a library; the library is loaded, and its code run, when it is first used.

    Args:
        manifest: of the engine.
        chosen: the options it was built with.
        library: its file, or the executable of TVM where it was compiled in this process.
        graph: its source.
        kernels: as :func:`edgecompile.targets.tvm.lower.build` returns them.
    """

    def __init__(
        self,
        manifest: EngineManifest,
        chosen: Options,
        library: Any,
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
            self._machine = self._loaded()
        if self.threads > 1 and _pool[0] != self.threads:
            tvm.get_global_func("runtime.config_threadpool")(_ALL_BIG_CORES, self.threads)
            _pool[0] = self.threads
        return self._machine

    def _loaded(self):
        import tvm
        from tvm import relax

        given = self._library
        library: Any = tvm.runtime.load_module(str(given)) if isinstance(given, Path) else given
        device: Any = tvm.cpu()
        return relax.VirtualMachine(library, device)

    def _arguments(self, feeds: Mapping[str, np.ndarray]) -> list:
        import tvm

        oracle.check_feeds(self._graph, feeds)
        return [tvm.runtime.tensor(np.ascontiguousarray(feeds[t.name])) for t in self._graph.inputs]

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
            raise InputError("TVM cannot run the model on these inputs", " ".join(str(error).split())[:300]) from None
        values = list(result) if len(self._graph.outputs) > 1 else [result]
        return {t.name: v.numpy() for t, v in zip(self._graph.outputs, values, strict=True)}

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """See :meth:`edgecompile.target.Engine.call`; the inputs are copied to the device once.

        Raises:
            InputError, EnvironmentMissing: as :meth:`run`.
        """
        self.run(feeds)
        return self._bind(self._open(), feeds)

    def _bind(self, machine: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        self._bound += 1
        name = f"bound_{self._bound}"
        machine.save_function("main", name, *self._arguments(feeds))
        return machine[name]

    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Engine.layers`.

        The virtual machine reports the begin and the end of each kernel to a function, which costs it about a
        microsecond; what lies between kernels (memory, views) is in none of them.
        """
        self.run(feeds)
        machine = self._loaded()  # one of its own: what watches a machine slows it for good
        call = self._bind(machine, feeds)
        known = {kernel["symbol"] for kernel in self._kernels}
        spent: list[list[tuple[str, int]]] = []
        begun = 0

        def watch(_function, symbol: str, before: bool, *_: Any) -> int:
            nonlocal begun
            if before:
                begun = time.perf_counter_ns()
            elif symbol in known:
                spent[-1].append((symbol, time.perf_counter_ns() - begun))
            return 0

        machine.set_instrument(watch)
        for _ in range(_WARM_RUNS + repeats):
            spent.append([])
            call()
        times = np.array([[ns for _, ns in run] for run in spent[_WARM_RUNS:]]) / 1e3
        symbols = [symbol for symbol, _ in spent[-1]]
        paths = lower.modules(self._graph)
        nodes: dict[str, list[Sequence[str]]] = {}
        for kernel in self._kernels:
            nodes.setdefault(kernel["symbol"], []).append(kernel["nodes"])
        layers = []
        for symbol, microseconds in zip(symbols, np.median(times, axis=0), strict=True):
            of = tuple(nodes[symbol].pop(0)) if nodes[symbol] else ()
            found = tuple(dict.fromkeys(m for n in of for m in paths.get(n, ())))
            layers.append(LayerTime(symbol, symbol.rstrip("0123456789"), float(microseconds), of, found))
        return layers

    def close(self) -> None:
        """Free the virtual machine and the library."""
        self._machine = None
