"""What the installed TensorRT is and can do: facts read off its attributes, never off its version string."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgecompile import device as cuda
from edgecompile.device import Device
from edgecompile.errors import EdgecompileError, EnvironmentMissing
from edgecompile.target import Capability
from edgecompile.targets.trt.plan import Machine

FIX = "pip install 'edgecompile[trt]' (on a Jetson: sudo apt-get install python3-libnvinfer)"

NVRTC_FIX = "pip install 'cuda-python[all]', or use shift_add=inline"
PLUGINS_SINCE = (10, 9)  # whose parser takes plugins in Python that are compiled ahead of time


@dataclass(frozen=True)
class Facts:
    """What a version of TensorRT has.

    Attributes:
        version: for people and for the engine's header only.
        precision_flags: builder flags such as FP16 exist; networks may be weakly typed.
        typed_by_default: every network is strongly typed.
        dla: the interface knows DLA cores.
        hardware_levels: members of ``HardwareCompatibilityLevel``, in lower case.
        editable_timing_cache: single entries of a timing cache can be read and changed.
        compiled_plugins: plugins in Python can be compiled ahead of time, into the engine.
        unused_flags: members of ``BuilderFlag`` that this code would use and that are not there.
    """

    version: str
    precision_flags: bool
    typed_by_default: bool
    dla: bool
    hardware_levels: tuple[str, ...]
    editable_timing_cache: bool
    compiled_plugins: bool
    unused_flags: tuple[str, ...]


FLAGS = (
    "ERROR_ON_TIMING_CACHE_MISS",
    "GPU_FALLBACK",
    "REFIT",
    "SPARSE_WEIGHTS",
    "VERSION_COMPATIBLE",
    "WEIGHT_STREAMING",
)


def facts(trt: Any) -> Facts:
    """Read the facts off the module ``tensorrt``."""
    flags, creation = trt.BuilderFlag, trt.NetworkDefinitionCreationFlag
    precision = hasattr(flags, "FP16")
    return Facts(
        version=trt.__version__,
        precision_flags=precision,
        typed_by_default=not precision and not hasattr(creation, "EXPLICIT_BATCH"),
        dla=hasattr(trt.DeviceType, "DLA"),
        hardware_levels=tuple(name.lower() for name in trt.HardwareCompatibilityLevel.__members__),
        editable_timing_cache=hasattr(trt.ITimingCache, "update"),
        compiled_plugins=hasattr(trt, "QuickPluginCreationRequest"),
        unused_flags=tuple(name for name in FLAGS if not hasattr(flags, name)),
    )


def runtime() -> Any:
    """The module ``tensorrt``.

    Raises:
        EnvironmentMissing: it is not installed, or its libraries are missing.
    """
    try:
        import tensorrt  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise EnvironmentMissing("TensorRT cannot be loaded", str(error), f"install {error.name}") from None
        raise EnvironmentMissing("TensorRT is not installed", "there is no Python module tensorrt", FIX) from None
    except (ImportError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise EnvironmentMissing("TensorRT cannot be loaded", why, "install TensorRT's libraries") from None
    return tensorrt


def system() -> str:
    """Operating system and architecture as the engine's header names them, e.g. ``linux-aarch64``."""
    return f"{sys.platform}-{platform.machine()}".lower()


def no_plugins(version: str) -> EnvironmentMissing:
    """The error of a TensorRT that cannot put plugins in Python into an engine."""
    least = ".".join(map(str, PLUGINS_SINCE))
    return EnvironmentMissing(
        f"TensorRT {version} has no plugins in Python that are compiled ahead of time",
        f"shift_add=plugin needs those of TensorRT {least}",
        f"use TensorRT {least} or later, or shift_add=inline",
    )


def nvrtc() -> Any:
    """NVRTC as cuda-python binds it.

    Raises:
        EnvironmentMissing: there is none.
    """
    try:
        from cuda.bindings import nvrtc as found  # type: ignore[import-not-found]
    except ImportError:
        try:
            from cuda import nvrtc as found  # type: ignore[import-not-found,no-redef,attr-defined]
        except ImportError:
            raise EnvironmentMissing(
                "the shift-add plugins cannot be compiled", "there is no cuda-python with NVRTC", NVRTC_FIX
            ) from None
    return found


def machine(trt: Any, device: Device, logger: Any) -> Machine:
    """What this machine can load."""
    cores = int(trt.Runtime(logger).num_DLA_cores)
    return Machine(trt.__version__, device.compute_capability, system(), cores)


def _plugins(known: Facts) -> str:
    try:
        if not known.compiled_plugins:
            raise no_plugins(known.version)
        nvrtc()
    except EnvironmentMissing as error:
        return f"no plugins for coded weights ({error.why})"
    return "plugins for coded weights"


def capabilities() -> Iterator[Capability]:
    """What ``edgecompile doctor`` prints about this target; never raises."""
    try:
        trt = runtime()
    except EdgecompileError as error:
        yield Capability("TensorRT", False, detail=error.why or error.what, fix=error.fix)
        return
    known = facts(trt)
    typing = "strongly typed only" if known.typed_by_default else "strongly typed on request"
    detail = f"{typing}; hardware levels: {', '.join(known.hardware_levels)}"
    if known.unused_flags:
        detail += f"; without {', '.join(known.unused_flags)}"
    yield Capability("TensorRT", True, known.version, f"{detail}; {_plugins(known)}")
    try:
        device = cuda.open_device()
        cores = int(trt.Runtime(trt.Logger(trt.ILogger.Severity.ERROR)).num_DLA_cores)
    except EdgecompileError as error:
        yield Capability("TensorRT device", False, detail=error.why or error.what, fix=error.fix)
    except Exception as error:  # the runtime raises what it likes without a driver
        yield Capability("TensorRT device", False, detail=str(error)[:200], fix="check the NVIDIA driver")
    else:
        detail = f"compute capability {device.compute_capability}, {cores} DLA cores"
        yield Capability("TensorRT device", True, detail=detail)
