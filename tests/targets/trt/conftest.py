"""A double of a version of TensorRT in place of the real one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from edgecompile import device as cuda
from edgecompile.targets.trt import probe as trt_probe

if TYPE_CHECKING:
    from tensorrt_double import Knobs


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Knobs]:
    """Put a double in place: of this version, on a device of this compute capability, behaving as the knobs say."""

    def put(version: str = "10.3.0", compute_capability: str = "8.7", **knobs: Any) -> Knobs:
        from tensorrt_double import HostDevice, Knobs, make

        chosen = Knobs(**knobs)
        trt = make(version, chosen)
        monkeypatch.setattr(trt_probe, "runtime", lambda: trt)
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", trt._plugin)  # None where a version has no such module
        monkeypatch.setattr(cuda, "open_device", lambda: HostDevice(chosen, compute_capability))
        return chosen

    return put
