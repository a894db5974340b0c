"""What runs an ONNX Runtime engine, with numpy and ONNX Runtime alone: options, checks, sessions, calls.

A board needs no more than this to measure a bundle; :mod:`edgecompile.targets.ort` adds what takes the graph: building,
checked inputs, errors that name the torch module, and layer times.

On a GPU, ONNX Runtime computes on a stream that belongs to the engine, so that CUDA events can be recorded around an
execution, and every set of inputs that is called often is a CUDA graph of its own where the provider can capture one.

References: ONNX Runtime documentation, "CUDA Execution Provider" and "TensorRT Execution Provider", their options and
"Using CUDA Graphs"; onnxruntime_run_options_config_keys.h.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import mmap
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import device as cuda
from edgecompile import measure
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError, did_you_mean, missing_extra
from edgecompile.target import Capability, EngineManifest, read_flag, read_size, read_threads

ENGINE, ORT_FORMAT, OPS = "model.ort.onnx", "model.ort", "ops.so"
OPTIONS: Mapping[str, tuple[Any, str]] = {
    "providers": ("cpu", "execution providers, first choice first: cpu, cuda, tensorrt, openvino, or auto"),
    "threads": ("auto", "threads of one operator; auto: every physical core this process may use. 1 is timed best"),
    "level": ("all", "graph optimisations: basic, extended, layout, all"),
    "ort_format": (False, f"also write {ORT_FORMAT}, the format of ONNX Runtime's minimal builds"),
    "transfers": (False, "on a GPU, include the copies of inputs and outputs in what is timed"),
    "custom_ops": (
        "auto",
        "kernels of our own for coded weights and angular attention (pass shift_add), compiled here and kept in "
        f"{OPS}: auto where they are measured to be faster, yes, no",
    ),
    "activations": ("float32", "what meets coded weights: float32; int8 rounds each token to 8 bits where that pays"),
    "PROVIDER.KEY": ("", "an option of a provider, e.g. cuda.device_id=1; a wrong name lists those that there are"),
}
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
NCHWC = "com.microsoft.nchwc"  # the domain of operators in the blocked layout

_WARM_RUNS = 2
# What `auto` tries, best first. TensorRT is left out: it compiles for minutes, and edgecompile drives it natively.
_AUTO = ("cuda", "openvino", "cpu")
_GPU = ("cuda", "tensorrt")
_PACKAGES = {
    "cpu": ("onnxruntime", "pip install 'edgecompile[cpu]'"),
    "cuda": ("onnxruntime-gpu", "pip install 'edgecompile[gpu]'"),
    "tensorrt": ("onnxruntime-gpu", "pip install 'edgecompile[gpu]'"),
    "openvino": ("onnxruntime-openvino", "pip install onnxruntime-openvino"),
}
_REPAIRS = {
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]', and check `nvidia-smi`",
    "tensorrt": "install TensorRT 10 beside what providers=cuda needs, or use --target trt, which takes 10.3 to 11",
}
_TENSORRT_10 = "onnxruntime-gpu links libnvinfer.so.10: this provider needs TensorRT 10 and cannot use 11"
_LEVELS = {
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
_REBUILD = "build it again on this machine: edgecompile build model.onnx --target ort"

Blame = Callable[[str], str]
"""From what ONNX Runtime complained about to how errors name the node at fault, ``""`` where that is not known."""


@dataclass(frozen=True)
class Options:
    """The options, parsed; see :data:`OPTIONS`."""

    providers: tuple[str, ...]
    threads: int
    level: str
    ort_format: bool
    transfers: bool = False
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    custom_ops: str = "no"
    integers: bool = False

    @property
    def cpu_only(self) -> bool:
        """True if nothing but the CPU provider is used."""
        return self.providers == ("cpu",)

    @property
    def on_gpu(self) -> bool:
        """True if the first choice is a GPU."""
        return self.providers[0] in _GPU

    @property
    def device_id(self) -> int:
        """Number of the GPU."""
        return int(self.provider_options.get(self.providers[0], {}).get("device_id", 0))

    @property
    def capture(self) -> bool | None:
        """Whether to capture CUDA graphs; None: where it is possible."""
        given = self.provider_options.get(self.providers[0], {}).get(_CAPTURE.get(self.providers[0], ""))
        if given is not None:
            return given == "1"
        # A second attempt without costs the TensorRT provider minutes.
        return None if self.providers[0] == "cuda" and not self.transfers else False


class OrtSession:
    """A session on an engine's files; one call uses the calling thread and ``threads - 1`` others, which sleep between
    calls.

    Attributes:
        manifest, clock, threads: as of :class:`edgecompile.target.Engine`. A GPU without torch or cuda-python to record
            events with is timed on the wall clock, until ONNX Runtime has waited for it.
    """

    manifest: EngineManifest
    clock: str
    threads: int

    def __init__(self, ort, manifest: EngineManifest, chosen: Options, folder: Path):
        self.manifest = manifest
        self.threads = 0 if chosen.on_gpu else chosen.threads
        self._ort, self._chosen, self._folder = ort, chosen, folder
        self._device = _device(chosen)
        self.clock = "thread_cpu" if chosen.cpu_only and chosen.threads == 1 else "wall"
        if self._device is not None:
            self.clock = "cuda_event"
        self._graphs = itertools.count(1)
        self._captures = chosen.capture is not False and chosen.on_gpu
        try:
            self._session = self._open(capture=self._captures)
        except InputError:
            if chosen.capture is not None:
                raise
            self._captures = False  # a CUDA graph cannot hold what runs on the CPU
            self._session = self._open()
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _open(self, **how: Any):
        """A new session on the engine's file, or on the model where the provider cannot store what it compiled.

        Args:
            how: ``profile``, ``capture`` of :func:`session`.
        """
        stored = bool(self.manifest.files)
        path = self._folder / (ENGINE if stored else "model.onnx")
        how |= {"library": self._library, "stream": self._stream}
        return session(self._ort, path, self._chosen, self._blame, optimise=not stored, **how)

    @property
    def _library(self) -> Path | None:
        """The custom operators of the engine."""
        return self._folder / OPS if OPS in self.manifest.files else None

    @property
    def _stream(self) -> int:
        return self._device.stream if self._device else 0

    def _blame(self, text: str) -> str:
        """See :data:`Blame`."""
        return ""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`edgecompile.target.Engine.run`.

        Raises:
            InputError: ONNX Runtime does not take these inputs, or an operator fails on them.
        """
        try:
            values = self._session.run(self._outputs, dict(feeds), self._run_options())
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise rejected(error, self._blame) from None
        return dict(zip(self._outputs, values, strict=True))

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """See :meth:`edgecompile.target.Engine.call`; inputs and outputs are bound once, no call copies them.

        On a GPU a call returns when the GPU is done; with the option ``transfers`` it copies inputs there and outputs
        back.

        Raises:
            InputError: as :meth:`run`.
        """
        execute, device = self._prepared(feeds), self._device
        if device is None:
            return execute

        def once() -> None:
            execute()
            device.synchronize()

        return once

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that executes the engine once on ``feeds`` and returns the seconds between two CUDA events.

        Raises:
            InputError: as :meth:`run`.
            EnvironmentMissing: there is nothing to record events with.
        """
        execute, device = self._prepared(feeds), self._device
        if device is None:
            raise EnvironmentMissing(
                "there is no CUDA event to time with", f"the clock is {self.clock}", "install torch with CUDA"
            )
        start, stop = device.event(), device.event()

        def once() -> float:
            device.record(start)
            execute()
            device.record(stop)
            device.synchronize()
            return device.seconds(start, stop)

        return once

    def _prepared(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """What executes the engine on ``feeds``; with a device of ours, without waiting for it."""
        there = self._chosen.on_gpu and not self._chosen.transfers
        place = ("cuda", self._chosen.device_id) if there else ("cpu", 0)
        binding = self._session.io_binding()
        try:
            for name, value in feeds.items():  # on the CPU the array is read in place
                value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *place)
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, *place)
            self._session.run_with_iobinding(binding, self._run_options())
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise rejected(error, self._blame) from None
        outputs = binding.get_outputs()
        fixed = all(value.is_tensor() for value in outputs)
        if fixed:  # equal inputs give equal shapes: write into the same buffers
            binding.clear_binding_outputs()
            for name, value in zip(self._outputs, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
        execute = functools.partial(self._session.run_with_iobinding, binding)
        if not self._chosen.on_gpu:
            return execute
        wait = self._device is None or self._chosen.transfers
        if not (self._captures and fixed):
            return functools.partial(execute, self._run_options(wait=wait))
        execute = functools.partial(execute, self._run_options(next(self._graphs), wait=wait))
        try:
            execute()
            if self._device is not None:
                self._device.synchronize()
        except Exception as error:  # as above
            if self._chosen.capture:
                raise rejected(error, self._blame) from None
            # A stream that was left in capture is of no more use.
            self._captures, self._device = False, _device(self._chosen)
            self._session = self._open()
            return self._prepared(feeds)
        return execute

    def _run_options(self, graph: int = -1, *, wait: bool = True) -> Any:
        """How to run on a GPU: as CUDA graph number ``graph``, if not -1; None on another device."""
        if not self._chosen.on_gpu:
            return None
        options = self._ort.RunOptions()
        if self._captures:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        if not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def on_cpu(self) -> list[tuple[str, str]] | None:
        """Nodes that a session for a GPU runs on the CPU, by name and operator; None where that is not known.

        ONNX Runtime assigns nodes after its basic optimisations, so a node may be one that these have made.
        """
        tell = getattr(self._session, "get_provider_graph_assignment_info", None)
        if tell is None or not self._chosen.on_gpu:
            return None
        ours = (part for part in tell() if part.ep_name == PROVIDERS["cpu"])
        return [(node.name, node.op_type) for part in ours for node in part.get_nodes()]

    def profile(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> dict[str, Any]:
        """What ONNX Runtime's profiler tells of its kernels, ready for JSON.

        Returns:
            ``events``: of the profiler, those of kernels; ``repeats``: runs at the end to count; ``plain``: median
            time of a run without profiler, in microseconds.

        Raises:
            InputError: as :meth:`run`.
        """
        feeds, plain = dict(feeds), []
        with tempfile.TemporaryDirectory(prefix="edgecompile.") as scratch:
            profiled = self._open(profile=str(Path(scratch) / "profile"))
            try:
                for _ in range(_WARM_RUNS + repeats):
                    profiled.run(self._outputs, feeds)
                for _ in range(_WARM_RUNS + repeats):
                    start = time.perf_counter()
                    self._session.run(self._outputs, feeds, self._run_options())
                    plain.append((time.perf_counter() - start) * 1e6)
            except Exception as error:  # ONNX Runtime raises a dozen types of its own
                raise rejected(error, self._blame) from None
            finally:
                events = json.loads(Path(profiled.end_profiling()).read_text())
        kernels = [e for e in events if e.get("cat") == "Node"]
        return {"events": kernels, "repeats": repeats, "plain": float(np.median(plain[-repeats:]))}

    def close(self) -> None:
        """Free the session."""
        del self._session


def load(folder: Path, manifest: EngineManifest) -> OrtSession:
    """Open an engine without its graph.

    Raises:
        EnvironmentMissing: as :meth:`edgecompile.target.Target.load`.
    """
    ort = runtime()
    chosen = parse(ort, manifest.options)
    check(ort, folder, manifest)
    return OrtSession(ort, manifest, chosen, folder)


def check(ort, folder: Path, manifest: EngineManifest) -> None:
    """Refuse an optimised model that another version of ONNX Runtime made, or that fits another CPU.

    Custom operators are compiled code: every instruction set that they were compiled for must be here.

    Raises:
        EnvironmentMissing: it is one.
    """
    if not manifest.files:
        return
    built = manifest.versions.get("onnxruntime", "")
    if built.split(".")[:2] != ort.__version__.split(".")[:2]:
        raise EnvironmentMissing(
            f"{folder / ENGINE} was built with ONNX Runtime {built}",
            f"this is {ort.__version__}, and an optimised model runs on the version that made it",
            f"pip install 'onnxruntime=={built}', or {_REBUILD}",
        )
    if OPS in manifest.files and (missing := measure.lacking(manifest.device)):
        raise EnvironmentMissing(
            f"{folder / OPS} was built for another CPU",
            f"it needs {', '.join(missing)}, which this machine lacks",
            f"{_REBUILD}, or build with custom_ops=no",
        )
    if _vectors(manifest.device) != _vectors(measure.cpu()) and blocked(folder / ENGINE):
        raise EnvironmentMissing(
            f"{folder / ENGINE} was built for another CPU",
            f"its blocked layout fits {manifest.device!r}, this is {measure.cpu()!r}",
            f"{_REBUILD}, or build with level=extended, which runs on every CPU",
        )


def _vectors(device: str) -> tuple[str, bool]:
    """What decides the block size of the blocked layout."""
    arch, *features = device.split()
    return arch, "avx512f" in features


def blocked(model: Path) -> bool:
    """True if a node of an ONNX file, at any depth, is in the blocked layout.

    The domain of a node is field 7 of NodeProto, which makes its bytes differ from those of the list of domains that
    the file imports, used or not.
    """
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(bytes([7 << 3 | 2, len(NCHWC)]) + NCHWC.encode()) >= 0


# -- options -----------------------------------------------------------------------------------------------------------


def parse(ort, given: Mapping[str, Any]) -> Options:
    """Options as given on the command line or recorded in a manifest.

    Raises:
        InputError: an option is unknown or has no such value.
        EnvironmentMissing: a provider is not in the installed package.
    """
    given = {name: value for name, value in given.items() if not name.startswith("_")}  # those are remarks
    known = [name for name in OPTIONS if "." not in name]
    for name in given:
        prefix, dot, _ = name.partition(".")
        if name not in known and not (dot and prefix in PROVIDERS):
            raise InputError(
                f"target ort has no option {name!r}", did_you_mean(name, known) or f"it has {', '.join(OPTIONS)}"
            )
    value = {name: given.get(name, OPTIONS[name][0]) for name in known}
    level = str(value["level"])
    if level not in _LEVELS:
        raise InputError(f"level={level} is not an optimisation level", f"there are {', '.join(_LEVELS)}")
    providers = _providers(ort, value["providers"])
    provider_options: dict[str, dict[str, str]] = {}
    for name, text in given.items():
        provider, dot, key = name.partition(".")
        if dot and provider not in providers:
            raise InputError(
                f"{name} has no effect", f"the provider {provider} is not used", f"add providers={provider}"
            )
        if dot:
            provider_options.setdefault(provider, {})[key] = _provider_option(provider, key, text)
    chosen = Options(
        providers,
        read_threads(value["threads"]),
        level,
        read_flag("ort_format", value["ort_format"]),
        read_flag("transfers", value["transfers"]),
        provider_options,
        _one_of("auto", "yes", "no")("custom_ops", value["custom_ops"]),
        _one_of("float32", "int8")("activations", value["activations"]) == "int8",
    )
    able = chosen.cpu_only and not chosen.ort_format
    if chosen.custom_ops == "yes" and not able:
        raise InputError("custom_ops=yes cannot be had", "the kernels are for providers=cpu, without ort_format")
    if chosen.integers and (chosen.custom_ops == "no" or not able):
        raise InputError(
            "activations=int8 has no effect", "only kernels of our own round", "add custom_ops=auto and providers=cpu"
        )
    if chosen.transfers and chosen.capture:
        raise InputError(
            "transfers cannot be part of a CUDA graph",
            "it reads and writes memory of the GPU",
            f"leave out transfers or {_CAPTURE[providers[0]]}",
        )
    return chosen


def _providers(ort, value: Any) -> tuple[str, ...]:
    asked = [p.strip().lower() for p in (value.split(",") if isinstance(value, str) else value)]
    present = set(ort.get_available_providers())
    if asked == ["auto"]:
        first = next(p for p in _AUTO if p == "cpu" or (PROVIDERS[p] in present and not _defect(ort, p)))
        asked = [first]
    for name in asked:
        if name not in PROVIDERS:
            raise InputError(f"{name!r} is not a provider", f"there are {', '.join(PROVIDERS)} and auto")
        if PROVIDERS[name] not in present:
            why, fix = _absent(name)
            raise EnvironmentMissing(f"ONNX Runtime here has no {name} provider", why, fix)
    if "tensorrt" in asked:  # CUDA takes what TensorRT cannot run, the CPU what CUDA cannot
        asked.append("cuda")
    return tuple(dict.fromkeys([*asked, "cpu"]))


def _absent(provider: str) -> tuple[str, str]:
    """Why a provider is not in the installed package, and what gets it."""
    (package, fix), installed = _PACKAGES[provider], _installed()
    if not installed:
        return f"it comes with the package {package}", fix
    remove = f"pip uninstall -y {' '.join(installed)}, then {fix}"
    if package in installed:
        others = " and ".join(p for p in installed if p != package)
        return f"{others or 'another package'} has overwritten files of {package}", remove
    return f"it comes with the package {package}, whose files and those of {installed[0]} overwrite each other", remove


def _installed() -> list[str]:
    return [p for p in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino") if _version(p)]


# -- options of the providers ------------------------------------------------------------------------------------------

_Reader = Callable[[str, Any], str]


def _flag(name: str, value: Any) -> str:
    return "1" if read_flag(name, value) else "0"


def _size(name: str, value: Any) -> str:
    return str(read_size(name, value))


def _path(name: str, value: Any) -> str:
    return str(value)


def _whole(least: int, most: int) -> _Reader:
    def read(name: str, value: Any) -> str:
        if not str(value).isdigit() or not least <= int(value) <= most:
            raise InputError(f"{name}={value} is not a whole number from {least} to {most}")
        return str(int(value))

    return read


def _one_of(*values: str) -> _Reader:
    def read(name: str, value: Any) -> str:
        found = next((v for v in values if v.lower() == str(value).lower()), None)
        if found is None:
            raise InputError(f"{name}={value} is not known", f"there are {', '.join(values)}")
        return found

    return read


PROVIDER_OPTIONS: Mapping[str, Mapping[str, tuple[_Reader, str]]] = {
    "cpu": {},
    "cuda": {
        "device_id": (_whole(0, 63), "number of the GPU"),
        "gpu_mem_limit": (_size, "most memory of the arena, e.g. 2GiB; weights and scratch space of cuDNN come on top"),
        "arena_extend_strategy": (_one_of("kNextPowerOfTwo", "kSameAsRequested"), "how the arena grows"),
        "cudnn_conv_algo_search": (_one_of("EXHAUSTIVE", "HEURISTIC", "DEFAULT"), "how convolutions are chosen"),
        "cudnn_conv_use_max_workspace": (_flag, "let convolutions use as much scratch space as helps"),
        "use_tf32": (_flag, "let float32 be rounded to TF32: faster, errors near 1e-3; false unless given"),
        "prefer_nhwc": (_flag, "convolve channels last"),
        "enable_cuda_graph": (_flag, "capture CUDA graphs; without it, where it is possible"),
    },
    "tensorrt": {
        "device_id": (_whole(0, 63), "number of the GPU"),
        "trt_max_workspace_size": (_size, "most memory for scratch space, e.g. 2GiB"),
        "trt_builder_optimization_level": (_whole(0, 5), "higher builds longer"),
        "trt_min_subgraph_size": (_whole(1, 1_000_000), "least nodes worth an engine"),
        "trt_max_partition_iterations": (_whole(1, 1_000_000), "attempts to divide the graph"),
        "trt_engine_cache_enable": (_flag, "keep engines; what is in the folder is run unchecked"),
        "trt_engine_cache_path": (_path, "folder of kept engines"),
        "trt_timing_cache_enable": (_flag, "keep the times of tactics"),
        "trt_timing_cache_path": (_path, "folder of the timing cache"),
        "trt_force_timing_cache": (_flag, "also use one of another GPU of the same architecture"),
        "trt_cuda_graph_enable": (_flag, "capture CUDA graphs; false unless given"),
        "trt_sparsity_enable": (_flag, "use weights that are zero in a 2:4 pattern"),
        "trt_auxiliary_streams": (_whole(0, 16), "streams beside the main one"),
        "trt_context_memory_sharing_enable": (_flag, "let the engines of a session share scratch space"),
    },
}
_CAPTURE = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}
# The TensorRT provider makes a strongly typed network, in which Casts and Q/DQ say all, exactly if no flag asks for a
# precision; and it takes a DLA core only if one does (`network_flags` and `dla_enable_` in ONNX Runtime's
# tensorrt_execution_provider.cc; pull request 18707). Option -> why it is not passed on, and what to do instead.
_REFUSED = {
    **dict.fromkeys(
        ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_layer_norm_fp32_fallback"),
        (
            "precision belongs to the graph, and the flag would let TensorRT round what the graph keeps in float32",
            "give --precision; --target trt builds strongly typed engines",
        ),
    ),
    **dict.fromkeys(
        ("trt_dla_enable", "trt_dla_core"),
        (
            "this provider takes a DLA core only with a flag that lets TensorRT choose the precision",
            "use --target trt --option dla=0",
        ),
    ),
    **dict.fromkeys(
        ("user_compute_stream", "has_user_compute_stream"),
        ("edgecompile computes on a stream of its own", "leave it out"),
    ),
}


def _provider_option(provider: str, key: str, value: Any) -> str:
    """The value of an option as ONNX Runtime takes it; OpenVINO's are its own to check.

    Raises:
        InputError: the provider has no such option or value, or edgecompile sets it itself.
    """
    name = f"{provider}.{key}"
    if key in _REFUSED:
        raise InputError(f"{name} is not set", *_REFUSED[key])
    if provider not in PROVIDER_OPTIONS:
        return str(value)
    known = PROVIDER_OPTIONS[provider]
    if key not in known:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"the provider {provider} has no option {key!r}", did_you_mean(key, known) or there)
    return known[key][0](name, value)


def _arguments(chosen: Options, stream: int, capture: bool) -> list[tuple[str, dict[str, str]]]:
    """The providers and all of their options, as ``InferenceSession`` takes them."""
    found = []
    for name in chosen.providers:
        options = dict(chosen.provider_options.get(name, {}))
        if name in _GPU:
            options = {"device_id": str(chosen.device_id), **options}
            options |= {"user_compute_stream": str(stream)} if stream else {}
            options[_CAPTURE[name]] = str(int(capture and name == chosen.providers[0]))
        if name == "cuda":
            options = {"use_tf32": "0", **options}
        found.append((PROVIDERS[name], options))
    return found


# -- GPUs --------------------------------------------------------------------------------------------------------------


def _device(chosen: Options) -> Any:
    """What owns a stream and records events on it; None where nothing can, or the engine is not on the first GPU."""
    if not chosen.on_gpu or chosen.device_id:
        return None
    with contextlib.suppress(EdgecompileError):
        return cuda.open_device()
    return None


def _load_libraries(ort, providers: Collection[str]) -> None:
    """Load the libraries of CUDA, cuDNN and TensorRT that came as Python packages, where the loader does not look."""
    if "tensorrt" in providers:
        with contextlib.suppress(Exception):  # whatever is wrong with it, the session will say
            import tensorrt  # type: ignore[import-not-found]  # noqa: F401
    if any(p in _GPU for p in providers):
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


_LOAD = """
import ctypes, sys
for name in sys.argv[3:]:
    try:
        module = __import__(name)
        getattr(module, "preload_dlls", lambda: None)()
    except Exception:
        pass
try:
    ctypes.CDLL(sys.argv[1] + "/libonnxruntime_providers_shared.so", ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1] + "/libonnxruntime_providers_" + sys.argv[2] + ".so")
except OSError as error:
    print("missing:", error)
"""


def unloadable(folder: Path, provider: str) -> str:
    """Which library a provider lacks, in the words of the loader; ``""`` if none. ONNX Runtime only logs it.

    Args:
        folder: where the libraries of the provider are.
        provider: ``cuda`` or ``tensorrt``.
    """
    modules = ("tensorrt", "onnxruntime") if provider == "tensorrt" else ("onnxruntime",)
    command = [sys.executable, "-c", _LOAD, str(folder), provider, *modules]  # a process that may crash
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    found = re.search(r"^missing: (.*)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


# -- sessions ----------------------------------------------------------------------------------------------------------


def runtime():
    """The module ``onnxruntime``.

    Raises:
        EnvironmentMissing: it is not installed, or broken.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise missing_extra("the target ort cannot be used", "onnxruntime", "cpu") from None
    except ImportError as error:
        raise EnvironmentMissing(
            "ONNX Runtime cannot be loaded", str(error), "pip install --force-reinstall onnxruntime"
        ) from None
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def session(
    ort,
    path: Path,
    chosen: Options,
    blame: Blame,
    *,
    optimise: bool = True,
    save: Path | None = None,
    config: Mapping[str, str] | None = None,
    profile: str = "",
    library: Path | None = None,
    stream: int = 0,
    capture: bool = False,
):
    """An ``InferenceSession`` on a file.

    Args:
        ort: the module ``onnxruntime``.
        path: the model.
        chosen: providers, threads and level.
        blame: names the node at fault in errors.
        optimise: let ONNX Runtime optimise the graph.
        save: where to write the optimised graph.
        config: session configuration entries.
        profile: prefix of the profile's file, ``""`` for none.
        library: custom operators that the model needs.
        stream: the CUDA stream to compute on, 0 for one of ONNX Runtime's own.
        capture: let the provider of first choice capture CUDA graphs.

    Raises:
        InputError: ONNX Runtime rejects the model.
        EnvironmentMissing: the provider of first choice does not work here.
    """
    options = ort.SessionOptions()
    level = _LEVELS[chosen.level] if optimise else "ORT_DISABLE_ALL"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = chosen.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Threads that spin between calls slow down every other session of the process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if save is not None:
        options.optimized_model_filepath = str(save)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if chosen.on_gpu:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        _load_libraries(ort, chosen.providers)
    first = chosen.providers[0]
    try:  # without its own fallback, which prints and goes on with the CPU
        if library is not None:
            options.register_custom_ops_library(str(library))
        made = ort.InferenceSession(
            str(path), options, providers=_arguments(chosen, stream, capture), enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        if first in _GPU and (why := _defect(ort, first, chosen)):
            raise _unusable(first, why) from None
        raise rejected(error, blame) from None
    if made.get_providers()[0] != PROVIDERS[first]:  # a library that does not load is only logged
        raise _unusable(first, _defect(ort, first, chosen))
    return made


def _unusable(provider: str, why: str) -> EnvironmentMissing:
    why = why or "its libraries or its device are missing"
    return EnvironmentMissing(
        f"ONNX Runtime cannot use its {provider} provider here",
        f"{why}; {_TENSORRT_10}" if provider == "tensorrt" else why,
        _REPAIRS.get(provider, "`edgecompile doctor` says what is missing"),
    )


_BROKEN = re.compile(r"\bCU(?:DA|DNN|BLAS) failure|\bCU(?:DA|DNN|BLAS)_STATUS_|cudaError")


def rejected(error: BaseException, blame: Blame) -> EdgecompileError:
    """The user's view of an exception of ONNX Runtime: what it complains about, and where that is."""
    if isinstance(error, EdgecompileError):
        return error
    text = " ".join(str(error).split())
    culprit = blame(text) or "the model or its inputs"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = text if len(text) <= 300 else text[:297] + "..."
    if _BROKEN.search(text):
        fix = "close other programs that use the GPU, or use a smaller batch" if "memory" in text else "see nvidia-smi"
        return EnvironmentMissing("the GPU cannot run the engine", text, fix)
    return InputError(f"ONNX Runtime rejects {culprit}", text)


# -- doctor ------------------------------------------------------------------------------------------------------------

# An ONNX model, serialised: y = Relu(x), both float32 [1], opset 17. A board has no onnx package to write one with.
_RELU = bytes.fromhex(
    "08083a330a0c0a0178120179220452656c751201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a0208014204"
    "0a001011"
)


def probe() -> Iterator[Capability]:
    """ONNX Runtime and each provider: compiled in or not, usable or not."""
    installed = _installed()
    try:
        ort = runtime()
        present = set(ort.get_available_providers())
    except EdgecompileError as error:
        yield Capability("onnxruntime", False, detail=error.why, fix=error.fix)
        return
    except Exception as error:  # a broken binary package may raise anything
        yield Capability("onnxruntime", False, detail=str(error), fix="pip install --force-reinstall onnxruntime")
        return
    clash = len(installed) > 1
    yield Capability(
        "onnxruntime",
        True,
        ort.__version__,
        f"{' and '.join(installed)} overwrite each other's files" if clash else ", ".join(installed),
        f"pip uninstall {' '.join(installed)}, then install one of them" if clash else "",
    )
    for name, full in PROVIDERS.items():
        label, told = f"onnxruntime {name} provider", [_TENSORRT_10] if name == "tensorrt" else []
        if full not in present:
            why, fix = _absent(name)
            yield Capability(label, False, detail="; ".join([f"not in this package; {why}", *told]), fix=fix)
            continue
        defect = _defect(ort, name)
        does = f"{measure.available_cores()} cores, {measure.cpu()}" if name == "cpu" else "runs a model here"
        fix = _REPAIRS.get(name, "") if defect else ""
        yield Capability(label, not defect, ort.__version__, "; ".join([defect or does, *told]), fix)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _defect(ort, provider: str, chosen: Options | None = None) -> str:
    """Why a provider that was compiled in cannot run a model here, or ``""``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    alone = Options(tuple(dict.fromkeys((provider, "cpu"))), 1, "all", False)
    alone = replace(alone, provider_options=chosen.provider_options if chosen else {})
    _load_libraries(ort, alone.providers)
    try:
        made = ort.InferenceSession(_RELU, options, providers=_arguments(alone, 0, False), enable_fallback=0)
        if made.get_providers()[0] == PROVIDERS[provider]:
            made.run(None, {"x": np.zeros(1, np.float32)})
            return ""
        why = ""
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        why = " ".join(str(error).split())[:200]
    lacking = unloadable(Path(ort.__file__).parent / "capi", provider) if provider in _GPU else ""
    return lacking or why or "its libraries or its device are missing"
