"""What runs an ONNX Runtime engine, with numpy and ONNX Runtime alone: options, checks, sessions, calls.

A board needs no more than this to measure a bundle; :mod:`edgecompile.targets.ort` adds what takes the graph: building,
checked inputs, errors that name the torch module, and layer times.
"""

from __future__ import annotations

import difflib
import functools
import mmap
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import measure
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError, missing_extra
from edgecompile.target import Capability, EngineManifest, read_flag, read_threads

ENGINE, ORT_FORMAT = "model.ort.onnx", "model.ort"
OPTIONS: Mapping[str, tuple[Any, str]] = {
    "providers": ("cpu", "execution providers, first choice first: cpu, cuda, tensorrt, openvino, or auto"),
    "threads": ("auto", "threads of one operator; auto: every physical core this process may use. 1 is timed best"),
    "level": ("all", "graph optimisations: basic, extended, layout, all"),
    "ort_format": (False, f"also write {ORT_FORMAT}, the format of ONNX Runtime's minimal builds"),
    "PROVIDER.KEY": ("", "an option of a provider, e.g. cuda.device_id=1"),
}
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
NCHWC = "com.microsoft.nchwc"  # the domain of operators in the blocked layout

# What `auto` tries, best first. TensorRT is left out: it compiles for minutes, and edgecompile drives it natively.
_AUTO = ("cuda", "openvino", "cpu")
_PACKAGES = {
    "cpu": ("onnxruntime", "pip install 'edgecompile[cpu]'"),
    "cuda": ("onnxruntime-gpu", "pip install 'edgecompile[gpu]'"),
    "tensorrt": ("onnxruntime-gpu", "pip install 'edgecompile[gpu]'"),
    "openvino": ("onnxruntime-openvino", "pip install onnxruntime-openvino"),
}
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
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def cpu_only(self) -> bool:
        """True if nothing but the CPU provider is used."""
        return self.providers == ("cpu",)

    @property
    def on_gpu(self) -> bool:
        """True if the first choice is a GPU."""
        return self.providers[0] in ("cuda", "tensorrt")


class OrtSession:
    """A session on an engine's files; one call uses the calling thread and ``threads - 1`` others, which sleep between
    calls.

    Attributes:
        manifest, clock, threads: as of :class:`edgecompile.target.Engine`.
    """

    manifest: EngineManifest
    clock: str
    threads: int

    def __init__(self, ort, manifest: EngineManifest, chosen: Options, folder: Path):
        self.manifest = manifest
        self.threads = 0 if chosen.on_gpu else chosen.threads
        self.clock = "thread_cpu" if chosen.cpu_only and chosen.threads == 1 else "wall"
        self._ort, self._chosen, self._folder = ort, chosen, folder
        self._session = self._open()
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _open(self, profile: str = ""):
        """A new session on the engine's file, or on the model where the provider cannot store what it compiled."""
        stored = bool(self.manifest.files)
        path = self._folder / (ENGINE if stored else "model.onnx")
        return session(self._ort, path, self._chosen, self._blame, optimise=not stored, profile=profile)

    def _blame(self, text: str) -> str:
        """See :data:`Blame`."""
        return ""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`edgecompile.target.Engine.run`.

        Raises:
            InputError: ONNX Runtime does not take these inputs, or an operator fails on them.
        """
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise rejected(error, self._blame) from None
        return dict(zip(self._outputs, values, strict=True))

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """See :meth:`edgecompile.target.Engine.call`; inputs and outputs are bound once, no call copies them.

        Raises:
            InputError: as :meth:`run`.
        """
        device = "cuda" if self._chosen.on_gpu else "cpu"
        number = int(self._chosen.provider_options.get(self._chosen.providers[0], {}).get("device_id", 0))
        binding = self._session.io_binding()
        try:
            for name, value in feeds.items():  # on the CPU the array is read in place
                value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), device, number)
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, device, number)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise rejected(error, self._blame) from None
        outputs = binding.get_outputs()
        if all(value.is_tensor() for value in outputs):  # equal inputs give equal shapes: write into the same buffers
            binding.clear_binding_outputs()
            for name, value in zip(self._outputs, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
        return functools.partial(self._session.run_with_iobinding, binding)

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
    if _vectors(manifest.device) != _vectors(cpu()) and blocked(folder / ENGINE):
        raise EnvironmentMissing(
            f"{folder / ENGINE} was built for another CPU",
            f"its blocked layout fits {manifest.device!r}, this is {cpu()!r}",
            f"{_REBUILD}, or build with level=extended, which runs on every CPU",
        )


def cpu() -> str:
    """This CPU, as far as an optimised model depends on it."""
    return " ".join([platform.machine(), *measure.cpu_features()])


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
    known = [name for name in OPTIONS if "." not in name]
    for name in given:
        prefix, dot, _ = name.partition(".")
        if name not in known and not (dot and prefix in PROVIDERS):
            close = difflib.get_close_matches(name, known, 1)
            raise InputError(
                f"target ort has no option {name!r}",
                f"did you mean {close[0]!r}?" if close else f"it has {', '.join(OPTIONS)}",
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
            provider_options.setdefault(provider, {})[key] = str(text)
    ort_format = read_flag("ort_format", value["ort_format"])
    return Options(providers, read_threads(value["threads"]), level, ort_format, provider_options)


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
            package, fix = _PACKAGES[name]
            raise EnvironmentMissing(
                f"ONNX Runtime here has no {name} provider", f"it comes with the package {package}", fix
            )
    return tuple(dict.fromkeys([*asked, "cpu"]))  # the CPU takes what the others cannot run


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
    providers = [(PROVIDERS[p], dict(chosen.provider_options.get(p, {}))) for p in chosen.providers]
    try:
        made = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        raise rejected(error, blame) from None
    wanted = PROVIDERS[chosen.providers[0]]
    if made.get_providers()[0] != wanted:  # it only warns and goes on with the CPU
        raise EnvironmentMissing(
            f"ONNX Runtime cannot use its {chosen.providers[0]} provider here",
            "its libraries or its device are missing",
            "`edgecompile doctor` says what is missing",
        )
    return made


def rejected(error: BaseException, blame: Blame) -> EdgecompileError:
    """The user's view of an exception of ONNX Runtime: what it complains about, and where that is."""
    if isinstance(error, EdgecompileError):
        return error
    text = " ".join(str(error).split())
    culprit = blame(text) or "the model or its inputs"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = text if len(text) <= 300 else text[:297] + "..."
    return InputError(f"ONNX Runtime rejects {culprit}", text)


# -- doctor ------------------------------------------------------------------------------------------------------------

_TENSORRT = {"tensorrt": "; onnxruntime-gpu links libnvinfer.so.10: this provider needs TensorRT 10 and cannot use 11"}
# An ONNX model, serialised: y = Relu(x), both float32 [1], opset 17. A board has no onnx package to write one with.
_RELU = bytes.fromhex(
    "08083a330a0c0a0178120179220452656c751201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a0208014204"
    "0a001011"
)


def probe() -> Iterator[Capability]:
    """ONNX Runtime and each provider: compiled in or not, usable or not."""
    installed = {p: v for p in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino") if (v := _version(p))}
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
        package, fix = _PACKAGES[name]
        label = f"onnxruntime {name} provider"
        if full not in present:
            detail = f"not in this package; {package} has it" + _TENSORRT.get(name, "")
            yield Capability(label, False, detail=detail, fix=fix)
            continue
        defect = _defect(ort, name)
        does = f"{measure.available_cores()} cores, {cpu()}" if name == "cpu" else "runs a model here"
        yield Capability(label, not defect, ort.__version__, (defect or does) + _TENSORRT.get(name, ""))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _defect(ort, provider: str) -> str:
    """Why a provider that was compiled in cannot run a model here, or ``""``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        providers = list(dict.fromkeys((PROVIDERS[provider], PROVIDERS["cpu"])))
        made = ort.InferenceSession(_RELU, options, providers=providers)
        made.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        return " ".join(str(error).split())[:200]
    return "" if made.get_providers()[0] == PROVIDERS[provider] else "its libraries or its device are missing"
