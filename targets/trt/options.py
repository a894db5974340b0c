"""The options of the target: their defaults, how text becomes values, and which of them TensorRT lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgecompile.errors import EnvironmentMissing, InputError, did_you_mean
from edgecompile.target import read_flag, read_size
from edgecompile.targets.trt.plan import HARDWARE_LEVELS
from edgecompile.targets.trt.probe import Facts, no_plugins

SHIFT_ADD = ("inline", "plugin")
MOST_BOXES = 3839  # that a suppression may keep: TensorRT's TopK, which stands for it, keeps fewer than 3840

Ranges = Mapping[str, Mapping[int, tuple[int, int, int]]]


@dataclass(frozen=True)
class Options:
    """The options, parsed; see :data:`HELP`. Sizes are in bytes, None where TensorRT's default is left."""

    workspace: int | None = None
    level: int = 3
    timing_cache: str = ""
    replay: bool = False
    dynamic: Ranges = field(default_factory=dict)
    version_compatible: bool = False
    hardware: str = "none"
    dla: int | None = None
    dla_fallback: bool = True
    dla_sram: int | None = None
    dla_local: int | None = None
    dla_global: int | None = None
    refit: bool = False
    weight_streaming: bool = False
    weight_budget: int | None = None
    sparsity: bool = False
    tf32: bool = False
    cuda_graph: bool = True
    transfers: bool = False
    nms: bool = False
    nms_score: float = 0.05
    nms_iou: float = 0.7
    nms_boxes: int = 100
    shift_add: str = "inline"

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest, in a form that :func:`parse` reads again."""
        values = asdict(self)
        values["dynamic"] = _spelled(self.dynamic)
        sizes = {name: "" if values[name] is None else str(values[name]) for name in _SIZES}
        return values | sizes | {"dla": "" if self.dla is None else self.dla}


HELP: Mapping[str, str] = {
    "workspace": "most memory for scratch space, e.g. 2GiB; default: all of the device's",
    "level": "builder optimisation level, 0 to 5; higher builds longer",
    "timing_cache": "a timing cache to start from, and to update unless replay=true",
    "replay": "fail where the timing cache lacks a measurement, so that the same tactics are chosen again",
    "dynamic": "ranges of dynamic axes, NAME:AXIS=MIN:OPT:MAX, several separated by commas",
    "version_compatible": "let later versions of TensorRT load the engine; slower, larger",
    "hardware": f"which GPUs may load the engine: {', '.join(HARDWARE_LEVELS)}",
    "dla": "number of the DLA core to run on; default: the GPU",
    "dla_fallback": "run on the GPU what the DLA cannot",
    "dla_sram": "software-managed SRAM per DLA core, e.g. 1MiB",
    "dla_local": "DRAM shared by the operations of a DLA network",
    "dla_global": "DRAM for weights and metadata of a DLA network",
    "refit": "let the weights be replaced later",
    "weight_streaming": "keep weights in host memory and stream them",
    "weight_budget": "device memory for weights with weight_streaming; default: TensorRT's choice",
    "sparsity": "use weights that are zero in a 2:4 pattern",
    "tf32": "let float32 be rounded to TF32 inside convolutions and matrix products: faster, errors near 1e-3",
    "cuda_graph": "replay one CUDA graph per call instead of launching kernel by kernel",
    "transfers": "include the copies of inputs and outputs in what is timed",
    "nms": "let a detector's engine also suppress boxes (plugin EfficientNMS_TRT); four outputs follow the model's own",
    "nms_score": "with nms, drop boxes of at most this score, from 0 to 1",
    "nms_iou": "with nms, drop the lesser of two boxes of a class that overlap by more than this share of their union",
    "nms_boxes": "with nms, boxes kept per image over all classes",
    "shift_add": "coded weights: inline decodes them before the engine is built, plugin keeps them packed in it "
    "(TensorRT 10.9, NVRTC, and legalize{target=trt,keep=true} among the passes)",
}


def parse(given: Mapping[str, Any]) -> Options:
    """Options as given on the command line or recorded in a manifest; those that start with ``_`` are remarks.

    Raises:
        InputError: an option is unknown, or has no such value.
    """
    values = {}
    for name, value in given.items():
        if name.startswith("_"):
            continue
        if name not in HELP:
            raise InputError(
                f"target trt has no option {name!r}", did_you_mean(name, HELP) or f"it has {', '.join(HELP)}"
            )
        values[name] = _PARSERS[name](name, value)
    chosen = Options(**values)
    if chosen.replay and not chosen.timing_cache:
        raise InputError("replay needs a timing cache", "there is nothing to replay", "give timing_cache=FILE")
    if chosen.dla is None and any((chosen.dla_sram, chosen.dla_local, chosen.dla_global)):
        raise InputError("a DLA memory pool has no effect", "the engine is for the GPU", "give dla=0")
    if chosen.weight_budget is not None and not chosen.weight_streaming:
        raise InputError("weight_budget has no effect", "weights are not streamed", "give weight_streaming=true")
    for name in ("nms_score", "nms_iou", "nms_boxes"):
        if not chosen.nms and getattr(chosen, name) != getattr(Options, name):
            raise InputError(f"{name} has no effect", "no boxes are suppressed", "give nms=true")
    return chosen


def require(chosen: Options, known: Facts) -> None:
    """Refuse what this version of TensorRT does not have.

    Raises:
        EnvironmentMissing: it lacks something.
    """
    wanted = {
        "ERROR_ON_TIMING_CACHE_MISS": chosen.replay,
        "REFIT": chosen.refit,
        "SPARSE_WEIGHTS": chosen.sparsity,
        "VERSION_COMPATIBLE": chosen.version_compatible,
        "WEIGHT_STREAMING": chosen.weight_streaming,
        "GPU_FALLBACK": chosen.dla is not None and chosen.dla_fallback,
    }
    if chosen.shift_add == "plugin" and not known.compiled_plugins:
        raise no_plugins(known.version)
    lacking = [name for name in known.unused_flags if wanted[name]]
    if lacking:
        raise EnvironmentMissing(f"TensorRT {known.version} has no {lacking[0]}", "", "leave the option out")
    if chosen.hardware not in known.hardware_levels:
        raise EnvironmentMissing(
            f"TensorRT {known.version} has no hardware={chosen.hardware}",
            f"it has {', '.join(known.hardware_levels)}",
            "use a later TensorRT",
        )


def read_timing_cache(chosen: Options) -> bytes:
    """The timing cache to start from; empty if there is none yet.

    Raises:
        InputError: it must be there and is not, or cannot be read.
    """
    if not chosen.timing_cache:
        return b""
    path = Path(chosen.timing_cache)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if chosen.replay:
            raise InputError(
                f"there is no timing cache {path}", "replay=true needs one", "build once without"
            ) from None
        return b""
    except OSError as error:
        raise InputError(f"cannot read {path}", error.strerror or str(error)) from None


def digest(cache: bytes) -> str:
    """SHA-256 of a timing cache, as the manifest records it."""
    return hashlib.sha256(cache).hexdigest()


# -- text to values ----------------------------------------------------------------------------------------------------

_Reader = Callable[[str, Any], Any]


def _text(name: str, value: Any) -> str:
    return str(value)


def _size(name: str, value: Any) -> int | None:
    return None if value is None or str(value) == "" else read_size(name, value)


def _whole(least: int, most: int) -> _Reader:
    def read(name: str, value: Any) -> int:
        if not str(value).isdecimal() or not least <= int(value) <= most:
            raise InputError(f"{name}={value} is not a whole number from {least} to {most}", HELP[name])
        return int(value)

    return read


def _share(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise InputError(f"{name}={value} is not a number from 0 to 1", HELP[name])
    return number


def _core(name: str, value: Any) -> int | None:
    return None if value is None or str(value) == "" else _whole(0, 15)(name, value)


def _one_of(choices: Sequence[str]) -> _Reader:
    def read(name: str, value: Any) -> str:
        if str(value) not in choices:
            why = did_you_mean(str(value), choices) or f"there are {', '.join(choices)}"
            raise InputError(f"{name}={value} is not known", why)
        return str(value)

    return read


def _spelled(ranges: Ranges) -> str:
    return ",".join(
        f"{name}:{axis}={least}:{usual}:{most}"
        for name, axes in ranges.items()
        for axis, (least, usual, most) in axes.items()
    )


def _ranges(name: str, value: Any) -> Ranges:
    from edgecompile.frontend import parse_dynamics

    try:
        text = _spelled(value) if isinstance(value, Mapping) else str(value)
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{name}={value} cannot be read", HELP[name]) from None
    found = parse_dynamics(filter(None, text.split(",")))
    return {name: {axis: tuple(extent) for axis, extent in axes.items()} for name, axes in found.items()}  # type: ignore[misc]


_SIZES = ("workspace", "dla_sram", "dla_local", "dla_global", "weight_budget")
_FLAGS = (
    *("replay", "version_compatible", "dla_fallback", "refit", "weight_streaming", "sparsity", "tf32", "cuda_graph"),
    *("transfers", "nms"),
)
_PARSERS: Mapping[str, _Reader] = {
    "level": _whole(0, 5),
    "timing_cache": _text,
    "dynamic": _ranges,
    "hardware": _one_of(HARDWARE_LEVELS),
    "shift_add": _one_of(SHIFT_ADD),
    "dla": _core,
    "nms_score": _share,
    "nms_iou": _share,
    "nms_boxes": _whole(1, MOST_BOXES),
    **dict.fromkeys(_SIZES, _size),
    **dict.fromkeys(_FLAGS, read_flag),
}
OPTIONS: Mapping[str, tuple[Any, str]] = {name: (Options().recorded()[name], text) for name, text in HELP.items()}
