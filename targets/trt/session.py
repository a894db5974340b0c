"""What runs an engine, with numpy and TensorRT alone: buffers, CUDA graph, times and profile.

A board needs no more than this to measure a bundle; :mod:`edgecompile.targets.trt.engine` adds what takes the graph.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import device as cuda
from edgecompile.device import Buffer, Device
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.target import Capability, EngineManifest
from edgecompile.targets.trt import options as trt_options
from edgecompile.targets.trt import plan
from edgecompile.targets.trt import probe as trt_probe
from edgecompile.targets.trt.options import Options

_WARM_RUNS = 3
_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Times:
    """Times of single calls in seconds, float64 [calls].

    Attributes:
        compute: on the GPU, between two CUDA events around the execution.
        enqueue: of the host, to launch it.
        end_to_end: from the first action of the host until the result is there.
        pinned: what the figures depend on and trtexec has changed between versions: CUDA graph, transfers, how the host
            waits. They are the same for every version of TensorRT here.
    """

    compute: np.ndarray
    enqueue: np.ndarray
    end_to_end: np.ndarray
    pinned: Mapping[str, Any]


class TrtSession:
    """A deserialised engine on one device and stream.

    Attributes:
        manifest, clock, threads: as of :class:`edgecompile.target.Engine`.
    """

    manifest: EngineManifest
    clock: str
    threads: int
    _runtime: Any
    _engine: Any
    _context: Any

    def __init__(
        self,
        trt: Any,
        device: Device,
        manifest: EngineManifest,
        chosen: Options,
        payload: bytes,
        log: Any,
        ports: Sequence[str] = (),
    ):
        self.manifest, self.clock, self.threads = manifest, "cuda_event", 0
        self._trt, self._device, self._chosen, self._log = trt, device, chosen, log
        trt.init_libnvinfer_plugins(log, "")
        self._runtime = trt.Runtime(log)
        if chosen.dla is not None:
            self._runtime.DLA_core = chosen.dla
        if chosen.version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(payload)
        if self._engine is None:
            raise _unusable("TensorRT cannot load the engine", log)
        if chosen.weight_streaming:
            budget = chosen.weight_budget
            self._engine.weight_streaming_budget_v2 = (
                self._engine.get_weight_streaming_automatic_budget() if budget is None else budget
            )
        self._context = self._new_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        # TensorRT may order outputs as it likes; callers who know the model's order see that.
        outputs = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        self._outputs = sorted(outputs, key=lambda n: ports.index(n) if n in ports else len(ports))

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`edgecompile.target.Engine.run`.

        Raises:
            InputError: an input is missing, unknown, of the wrong type or shape, or outside the optimisation profile.
            EnvironmentMissing: the GPU is out of memory.
        """
        bound = self._bind(self._context, feeds)
        self._upload(bound)
        self._enqueue(bound)
        self._download(bound)
        self._device.synchronize()
        return {name: bound.arrays[name] for name in self._outputs}

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """See :meth:`edgecompile.target.Engine.call`; returns when the GPU is done. Inputs are on the device already,
        unless the option ``transfers`` is set.

        Raises:
            InputError: as :meth:`run`.
        """
        bound, execute, _ = self._prepared(feeds)

        def once() -> None:
            self._launch(bound, execute)
            self._device.synchronize()

        return once

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that executes the engine once on ``feeds`` and returns its compute time in seconds.

        Raises:
            InputError: as :meth:`run`.
        """
        bound, execute, _ = self._prepared(feeds)
        events = self._device.event(), self._device.event()
        return lambda: self._timed(bound, execute, *events)[0]

    def times(self, feeds: Mapping[str, np.ndarray], calls: int = 100) -> Times:
        """Compute, enqueue and end-to-end time of single calls, each waited for.

        Raises:
            InputError: as :meth:`run`.
        """
        bound, execute, captured = self._prepared(feeds)
        events = self._device.event(), self._device.event()
        rows = []
        for _ in range(calls):
            begin = time.perf_counter()
            self._launch(bound, execute)
            self._device.synchronize()
            total = time.perf_counter() - begin
            rows.append((*self._timed(bound, execute, *events), total))
        pinned = {
            "cuda_graph": captured,
            "transfers": self._chosen.transfers,
            "in_flight": 1,
            "wait": "stream synchronize",
        }
        return Times(*np.array(rows, np.float64).reshape(-1, 3).T, pinned=pinned)

    def profile(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> dict[str, Any]:
        """What TensorRT tells of its layers, ready for JSON; a profiled engine runs without CUDA graph.

        Returns:
            ``seconds``: median time by layer name; ``information``: what the engine inspector says, JSON as text.

        Raises:
            InputError: as :meth:`run`.
        """
        trt = self._trt

        class Profiler(trt.IProfiler):
            def __init__(self):
                trt.IProfiler.__init__(self)
                self.seconds: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name, ms):
                self.seconds.setdefault(layer_name, []).append(ms / 1e3)

        context = self._new_context()  # a profiler cannot be taken off again
        context.profiler = profiler = Profiler()
        bound = self._bind(context, feeds)
        self._upload(bound)
        for _ in range(_WARM_RUNS + repeats):
            self._enqueue(bound)
            self._device.synchronize()
        medians = {name: float(np.median(spent[-repeats:])) for name, spent in profiler.seconds.items()}
        return {"seconds": medians, "information": self.information()}

    def information(self) -> str:
        """What the engine inspector says of all layers, as JSON."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return text if text.strip() else '{"Layers": []}'  # an engine without a layer gives no text

    def close(self) -> None:
        """Free the engine; contexts go before it, and it before the runtime."""
        self._context = self._engine = self._runtime = None

    # -- buffers -------------------------------------------------------------------------------------------------------

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise _unusable("the GPU has too little memory to run the engine", self._log)
        return context

    def _bind(self, context: Any, feeds: Mapping[str, np.ndarray]) -> _Bound:
        """Set shapes and addresses of all inputs and outputs of a context."""
        self._check(feeds)
        arrays = {n: np.array(feeds[n], order="C") for n in self._inputs}  # copies: the caller's may change
        for name, array in arrays.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                raise InputError(
                    f"input {name!r} of shape {'x'.join(map(str, array.shape))} is outside what was built",
                    "the optimisation profile covers " + self._covered(name),
                    "build again with --dynamic",
                )
        buffers = {name: self._place(context, name, array) for name, array in arrays.items()}
        unset = context.infer_shapes()
        if unset:
            raise InputError(f"the shape of {unset[0]!r} is not known", "TensorRT cannot infer it from the inputs")
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            if any(extent < 0 for extent in shape):
                raise InputError(
                    f"the shape of output {name!r} depends on data",
                    "buffers are allocated before",
                    "pad it in the model",
                )
            arrays[name] = np.empty(shape, self._dtype(name))
            buffers[name] = self._place(context, name, arrays[name])
        return _Bound(context, arrays, buffers)

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        for name in feeds:
            if name not in self._inputs:
                raise InputError(f"the model has no input {name!r}", f"its inputs are {', '.join(self._inputs)}")
        for name in self._inputs:
            if name not in feeds:
                raise InputError(f"input {name!r} is missing")
            if feeds[name].dtype != self._dtype(name):
                raise InputError(f"input {name!r} is {feeds[name].dtype}", f"the engine wants {self._dtype(name)}")

    def _place(self, context: Any, name: str, array: np.ndarray) -> Buffer:
        host = self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        buffer = Buffer(array.ctypes.data, array) if host else self._device.allocate(array.nbytes)
        context.set_tensor_address(name, buffer.address)
        return buffer

    def _covered(self, name: str) -> str:
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        return f"{'x'.join(map(str, tuple(least)))} to {'x'.join(map(str, tuple(most)))}"

    def _dtype(self, name: str) -> np.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind == "BF16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(_TYPES[kind])

    def _upload(self, bound: _Bound) -> None:
        for name in self._inputs:
            if bound.buffers[name].held is not bound.arrays[name]:
                self._device.upload(bound.buffers[name], bound.arrays[name])

    def _download(self, bound: _Bound) -> None:
        for name in self._outputs:
            if bound.buffers[name].held is not bound.arrays[name]:
                self._device.download(bound.arrays[name], bound.buffers[name])

    def _enqueue(self, bound: _Bound) -> None:
        if not bound.context.execute_async_v3(self._device.stream):
            raise _unusable("TensorRT cannot run the engine", self._log)

    def _prepared(self, feeds: Mapping[str, np.ndarray]) -> tuple[_Bound, Callable[[], object], bool]:
        """Buffers and a context of their own, filled and warmed up, what executes the engine on them, and whether that
        is a CUDA graph: some engines cannot be captured.
        """
        bound = self._bind(self._new_context(), feeds)
        self._upload(bound)
        for _ in range(_WARM_RUNS):  # the first run of a shape allocates and may not be captured
            self._enqueue(bound)
        self._device.synchronize()

        def execute() -> None:
            self._enqueue(bound)

        if self._chosen.cuda_graph:
            with contextlib.suppress(EnvironmentMissing, RuntimeError):
                return bound, self._device.capture(execute), True
        return bound, execute, False

    def _launch(self, bound: _Bound, execute: Callable[[], object]) -> None:
        if self._chosen.transfers:
            self._upload(bound)
        execute()
        if self._chosen.transfers:
            self._download(bound)

    def _timed(self, bound: _Bound, execute: Callable[[], object], start: Any, stop: Any) -> tuple[float, float]:
        """Compute and enqueue time of one execution in seconds; ``bound`` keeps its buffers alive."""
        self._device.record(start)
        begin = time.perf_counter()
        execute()
        enqueue = time.perf_counter() - begin
        self._device.record(stop)
        self._device.synchronize()
        return self._device.seconds(start, stop), enqueue


@dataclass(frozen=True)
class _Bound:
    """An execution context with its host arrays and device buffers by tensor name."""

    context: Any
    arrays: Mapping[str, np.ndarray]
    buffers: Mapping[str, Buffer]


def _unusable(what: str, log: Any) -> EnvironmentMissing:
    why = "; ".join(log.messages[-2:])[:400] or "TensorRT gives no reason"
    return EnvironmentMissing(what, why, "build the bundle again, or close other programs that use the GPU")


# -- opening -----------------------------------------------------------------------------------------------------------


def load(folder: Path, manifest: EngineManifest) -> TrtSession:
    """Open an engine without its graph.

    Raises:
        InputError, EnvironmentMissing: as :func:`verified`.
    """
    return TrtSession(*verified(folder, manifest))


def verified(folder: Path, manifest: EngineManifest) -> tuple[Any, Device, EngineManifest, Options, bytes, Any]:
    """What :class:`TrtSession` takes, once the header of the engine file is proved; TensorRT has not seen it then.

    Raises:
        InputError: the file is damaged, or is not an engine of ours.
        EnvironmentMissing: there is no engine yet, no TensorRT or no device, or it was built for another one.
    """
    chosen = options(manifest)
    if not manifest.files:
        raise EnvironmentMissing(
            f"{folder} holds no engine yet", "it was prepared without TensorRT", f"run edgecompile build {folder}"
        )
    trt = trt_probe.runtime()
    device, log = cuda.open_device(), logger(trt)
    _, payload = plan.read(folder / manifest.files[0], trt_probe.machine(trt, device, log))
    return trt, device, manifest, chosen, payload, log


def options(manifest: EngineManifest) -> Options:
    """The options of an engine, but for the ranges of its dynamic axes: it holds them, and reading them takes more than
    a board has.

    Raises:
        InputError: one cannot be used.
    """
    return trt_options.parse({name: value for name, value in manifest.options.items() if name != "dynamic"})


def probe() -> Iterable[Capability]:
    """See :func:`edgecompile.targets.trt.probe.capabilities`."""
    return trt_probe.capabilities()


def logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors in ``messages`` instead of printing them."""

    class Collected(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity, msg):
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.messages.append(" ".join(str(msg).split()))

    return Collected()
