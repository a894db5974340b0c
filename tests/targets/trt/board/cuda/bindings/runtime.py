"""``cuda.bindings.runtime`` as a board has it: the device of the double, with the functions that edgecompile calls."""

import ctypes
import enum

import numpy as np
from tensorrt_double import HostDevice, Knobs

DEVICE = HostDevice(Knobs(), "8.7")
BUFFERS = {}

cudaError_t = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})
cudaDeviceAttr = enum.IntEnum(
    "cudaDeviceAttr", {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
)
cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
OK = cudaError_t.cudaSuccess


def cudaGetDevice():
    return OK, 0


def cudaDeviceGetAttribute(attribute, device):
    major, minor = map(int, DEVICE.compute_capability.split("."))
    return OK, {75: major, 76: minor}[attribute]


def cudaStreamCreate():
    return OK, DEVICE.stream


def cudaStreamSynchronize(stream):
    DEVICE.synchronize()
    return (OK,)


def cudaMalloc(size):
    buffer = DEVICE.allocate(size)
    BUFFERS[buffer.address] = buffer
    return OK, buffer.address


def cudaFree(address):
    BUFFERS.pop(address, None)
    return (OK,)


def cudaMemcpyAsync(to, source, size, kind, stream):
    if kind == cudaMemcpyKind.cudaMemcpyHostToDevice:
        DEVICE.upload(BUFFERS[to], np.frombuffer(ctypes.string_at(source, size), np.uint8))
    else:
        DEVICE.enqueue(lambda: ctypes.memmove(to, DEVICE.memory(source, size).ctypes.data, size))
    return (OK,)


def cudaEventCreate():
    return OK, DEVICE.event()


def cudaEventRecord(event, stream):
    DEVICE.record(event)
    return (OK,)


def cudaEventElapsedTime(start, stop):
    return OK, DEVICE.seconds(start, stop) * 1e3


def cudaStreamBeginCapture(stream, mode):
    DEVICE.synchronize()
    DEVICE._captured = []
    return (OK,)


def cudaStreamEndCapture(stream):
    captured, DEVICE._captured = DEVICE._captured, None
    return OK, captured


def cudaGraphInstantiate(graph, flags):
    return OK, graph


def cudaGraphLaunch(graph, stream):
    for work in graph:
        DEVICE.enqueue(work)
    return (OK,)
