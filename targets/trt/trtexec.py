"""Runs that were made elsewhere: what ``trtexec`` wrote with --exportTimes, --exportProfile and --exportLayerInfo.

trtexec 11 changed defaults (CUDA graph and spinning on, transfers off), so its figures compare with those of trtexec 10
only where both were pinned. Of these the files tell the transfers alone; the rest is recorded as unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.target import LayerTime
from edgecompile.targets.trt import layers as trt_layers
from edgecompile.targets.trt.session import Times


@dataclass(frozen=True)
class Imported:
    """A run of trtexec.

    Attributes:
        times: of single calls, None without --exportTimes. End-to-end is trtexec's latency: input transfer, compute,
            output transfer.
        layers: times of layers, empty without --exportProfile.
    """

    times: Times | None
    layers: tuple[LayerTime, ...]


TIMES, PROFILE, LAYER_INFO = "times.json", "profile.json", "layers.json"


def load_folder(graph: Graph, folder: Path) -> Imported:
    """:func:`load` what lies in a folder as :data:`TIMES`, :data:`PROFILE` and :data:`LAYER_INFO`; the first must.

    Raises:
        InputError: as :func:`load`.
    """
    profile, layer_info = (folder / name for name in (PROFILE, LAYER_INFO))
    return load(
        graph,
        folder / TIMES,
        profile if profile.exists() else None,
        layer_info if layer_info.exists() else None,
    )


def load(
    graph: Graph, times: Path | None = None, profile: Path | None = None, layer_info: Path | None = None
) -> Imported:
    """Read what trtexec exported.

    Args:
        graph: the graph that was built, to which layers are attributed.
        times: from --exportTimes.
        profile: from --exportProfile.
        layer_info: from --exportLayerInfo; without it, layers are attributed by their names.

    Raises:
        InputError: a file cannot be read or is not what it should be.
    """
    measured = None if times is None else _times(times)
    if profile is None:
        return Imported(measured, ())
    seconds = _profile(profile)
    layers = trt_layers.inspect(_text(layer_info)).layers if layer_info is not None else ()
    return Imported(measured, tuple(trt_layers.timed(layers, seconds, graph)))


def _times(path: Path) -> Times:
    try:
        entries = _json(path)
        calls = [
            (float(c["computeMs"]), float(c["endEnqMs"]) - float(c["startEnqMs"]), float(c["latencyMs"]))
            for c in entries
        ]
        copied = any(float(c.get("h2dMs", 0)) + float(c.get("d2hMs", 0)) > 0 for c in entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, "--exportTimes", error) from None
    if not calls:
        raise InputError(f"{path} holds no calls", "trtexec measured nothing")
    compute, enqueue, total = np.array(calls, np.float64).T / 1e3
    if not (np.isfinite(compute).all() and np.isfinite(total).all() and (compute >= 0).all() and (total >= 0).all()):
        raise _unreadable(path, "--exportTimes", ValueError("a time is negative or not finite"))
    pinned = {"source": "trtexec", "cuda_graph": "unknown", "transfers": copied, "wait": "unknown"}
    return Times(compute, enqueue, total, pinned)


def _profile(path: Path) -> dict[str, float]:
    """Median seconds per layer; older versions give the average only."""
    try:
        entries = [e for e in _json(path) if "name" in e]
        return {str(e["name"]): float(e.get("medianMs", e["averageMs"])) / 1e3 for e in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, "--exportProfile", error) from None


def _json(path: Path) -> Any:
    return json.loads(_text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", str(error)) from None


def _unreadable(path: Path, flag: str, error: Exception) -> InputError:
    return InputError(f"{path} is not what trtexec writes with {flag}", f"{type(error).__name__}: {error}")
