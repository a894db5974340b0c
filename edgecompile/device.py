"""Memory, a stream, events and graphs of the CUDA device: through torch where it has CUDA, else through cuda-python.

Runtimes take addresses and a stream handle and do none of this themselves. A board often has TensorRT and no torch.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompile.errors import EnvironmentMissing

_FIX = "install torch with CUDA, or pip install cuda-python; `edgecompile doctor` says what is here"


@dataclass(frozen=True)
class Buffer:
    """Device memory: its address, and what keeps it allocated."""

    address: int
    held: Any


class Device(ABC):
    """One CUDA device and one stream on it, on which everything happens in order.

    Attributes:
        compute_capability: e.g. ``8.7``.
        stream: the stream as ``cudaStream_t``.
    """

    compute_capability: str
    stream: int

    @abstractmethod
    def allocate(self, size: int) -> Buffer:
        """Device memory of ``size`` bytes."""

    @abstractmethod
    def upload(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a writable C-contiguous array to the device; it must stay unchanged until :meth:`synchronize`."""

    @abstractmethod
    def download(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy device memory into a C-contiguous array, complete after :meth:`synchronize`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the stream is idle."""

    @abstractmethod
    def event(self) -> Any:
        """A new event that can be timed."""

    @abstractmethod
    def record(self, event: Any) -> None:
        """Record an event at this point of the stream."""

    @abstractmethod
    def seconds(self, start: Any, stop: Any) -> float:
        """Time between two events that have happened."""

    @abstractmethod
    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Capture what ``work`` enqueues into a CUDA graph; the result enqueues the graph.

        Raises:
            EnvironmentMissing, RuntimeError: it cannot be captured.
        """


def open_device() -> Device:
    """The current CUDA device.

    Raises:
        EnvironmentMissing: there is none, or neither torch with CUDA nor cuda-python is installed.
    """
    try:
        import torch

        if torch.cuda.is_available():
            return TorchDevice(torch)
    except ImportError:
        pass
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found]
    except ImportError:
        try:
            from cuda import cudart as runtime  # type: ignore[import-not-found,no-redef,attr-defined]
        except ImportError:
            raise EnvironmentMissing(
                "the GPU's memory and clock cannot be used", "no torch with CUDA, no cuda-python", _FIX
            ) from None
    return CudaDevice(runtime)


class TorchDevice(Device):
    """The device through torch."""

    def __init__(self, torch):
        self._torch = torch
        self._stream = torch.cuda.Stream()
        self.stream = self._stream.cuda_stream
        self.compute_capability = "{}.{}".format(*torch.cuda.get_device_capability())

    def allocate(self, size: int) -> Buffer:
        """See :meth:`Device.allocate`."""
        try:
            held = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda")
        except self._torch.OutOfMemoryError:
            raise out_of_memory(size) from None
        return Buffer(held.data_ptr(), held)

    def upload(self, buffer: Buffer, array: np.ndarray) -> None:
        """See :meth:`Device.upload`."""
        with self._torch.cuda.stream(self._stream):
            buffer.held[: array.nbytes].copy_(self._bytes(array), non_blocking=True)

    def download(self, array: np.ndarray, buffer: Buffer) -> None:
        """See :meth:`Device.download`."""
        with self._torch.cuda.stream(self._stream):
            self._bytes(array).copy_(buffer.held[: array.nbytes], non_blocking=True)

    def _bytes(self, array: np.ndarray):
        return self._torch.from_numpy(array.reshape(-1).view(np.uint8))

    def synchronize(self) -> None:
        """See :meth:`Device.synchronize`."""
        self._stream.synchronize()

    def event(self) -> Any:
        """See :meth:`Device.event`."""
        return self._torch.cuda.Event(enable_timing=True)

    def record(self, event: Any) -> None:
        """See :meth:`Device.record`."""
        event.record(self._stream)

    def seconds(self, start: Any, stop: Any) -> float:
        """See :meth:`Device.seconds`."""
        return start.elapsed_time(stop) / 1e3

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """See :meth:`Device.capture`."""
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay


class CudaDevice(Device):
    """The device through cuda-python's runtime API."""

    def __init__(self, cudart):
        self._cuda = cudart
        number = self._call("cudaGetDevice")
        attributes = cudart.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", attribute, number)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.compute_capability = f"{major}.{minor}"
        self._stream = self._call("cudaStreamCreate")
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a function of the runtime returns beside its error code."""
        error, *result = getattr(self._cuda, name)(*arguments)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise out_of_memory(arguments[0])
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise EnvironmentMissing("the CUDA device does not work", f"{name}: {error!r}", _FIX)
        return result[0] if result else None

    def allocate(self, size: int) -> Buffer:
        """See :meth:`Device.allocate`."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        buffer = Buffer(address, _Owner())
        weakref.finalize(buffer.held, self._cuda.cudaFree, address)
        return buffer

    def upload(self, buffer: Buffer, array: np.ndarray) -> None:
        """See :meth:`Device.upload`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", buffer.address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: np.ndarray, buffer: Buffer) -> None:
        """See :meth:`Device.download`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, buffer.address, array.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """See :meth:`Device.synchronize`."""
        self._call("cudaStreamSynchronize", self._stream)

    def event(self) -> Any:
        """See :meth:`Device.event`."""
        return self._call("cudaEventCreate")

    def record(self, event: Any) -> None:
        """See :meth:`Device.record`."""
        self._call("cudaEventRecord", event, self._stream)

    def seconds(self, start: Any, stop: Any) -> float:
        """See :meth:`Device.seconds`."""
        return self._call("cudaEventElapsedTime", start, stop) / 1e3

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """See :meth:`Device.capture`."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        finally:  # a stream that stays in capture is of no more use
            graph = self._call("cudaStreamEndCapture", self._stream)
        ready = self._call("cudaGraphInstantiate", graph, 0)
        return lambda: self._call("cudaGraphLaunch", ready, self._stream)


class _Owner:
    """What a buffer's memory is tied to."""


def out_of_memory(size: int) -> EnvironmentMissing:
    """The error for an allocation of ``size`` bytes that failed."""
    return EnvironmentMissing(
        "the GPU is out of memory", f"{size} bytes are needed", "close other programs, or use a smaller batch"
    )
