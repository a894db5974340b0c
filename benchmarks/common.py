"""What every result says about the machine it was measured on."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from edgecompile import measure

_FACTS = ("arch", "cpu", "features", "hypervisor", "cores", "memory_bytes", "python")
_PACKAGES = ("edgecompile", "onnx", "onnx-graphsurgeon", "onnxruntime", "torch", "numpy")


def machine() -> dict[str, Any]:
    """CPU, memory and package versions."""
    facts = measure.machine()
    return {k: facts[k] for k in _FACTS} | {"versions": {p: importlib.metadata.version(p) for p in _PACKAGES}}
