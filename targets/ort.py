"""ONNX Runtime: the CPU provider, and CUDA, TensorRT and OpenVINO where the installed package has them.

On the CPU the graph is optimised once, at build time, and saved: ``model.ort.onnx`` is what ONNX Runtime runs, with
every node attributed to the nodes and torch modules it stands for. Loading it runs no optimisation again. A layout
optimisation rewrites convolutions to a blocked layout whose block size is that of the CPU's vectors, so such a file
gives wrong results on a CPU with another block size; the manifest records the CPU and :meth:`OrtTarget.load` refuses.
The other providers optimise (and compile) when a session is made, from the bundle's ``model.onnx``.

References: ONNX Runtime documentation, "Graph Optimizations in ONNX Runtime", section "Online/Offline Mode", and
"Execution Providers"; blocked layout: onnxruntime/core/optimizer/nchwc_transformer.cc.
"""

from __future__ import annotations

import difflib
import functools
import heapq
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import measure, oracle
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError, missing_extra
from edgecompile.graph import Graph, Provenance, provenance, where
from edgecompile.target import Capability, Engine, EngineManifest, LayerTime, Target

ENGINE, ORT_FORMAT = "model.ort.onnx", "model.ort"

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
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
_NCHWC = "com.microsoft.nchwc"
_WARM_RUNS = 2
_REBUILD = "build it again on this machine: edgecompile build model.onnx --target ort"


@dataclass(frozen=True)
class _Options:
    """The options, parsed; see :attr:`OrtTarget.options`."""

    providers: tuple[str, ...]
    threads: int
    level: str
    ort_format: bool
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def cpu_only(self) -> bool:
        return self.providers == ("cpu",)

    @property
    def on_gpu(self) -> bool:
        return self.providers[0] in ("cuda", "tensorrt")


class OrtTarget(Target):
    """Lower a graph to an ONNX Runtime session."""

    name: ClassVar[str] = "ort"
    options: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "providers": ("cpu", "execution providers, first choice first: cpu, cuda, tensorrt, openvino, or auto"),
        "threads": ("auto", "threads of one operator; auto: every physical core this process may use. 1 is timed best"),
        "level": ("all", "graph optimisations: basic, extended, layout, all"),
        "ort_format": (False, f"also write {ORT_FORMAT}, the format of ONNX Runtime's minimal builds"),
        "PROVIDER.KEY": ("", "an option of a provider, e.g. cuda.device_id=1"),
    }

    def probe(self) -> Sequence[Capability]:
        """ONNX Runtime and each provider: compiled in or not, usable or not."""
        return list(_probe())

    def build(self, graph: Graph, folder: Path, options: Mapping[str, Any]) -> Engine:
        """See :meth:`edgecompile.target.Target.build`; on the CPU, writes :data:`ENGINE` and on request the ORT format.

        Equal graphs give equal files on the same machine, but for the ORT format, whose tables ONNX Runtime orders by
        memory address.
        """
        ort = _import()
        chosen = _parse(ort, options)
        named = _named(graph)
        files: list[str] = []
        device = chosen.providers[0]
        if chosen.cpu_only:
            files = _optimise(ort, named, folder, chosen)
            device = _cpu()
            if chosen.ort_format:
                _write_ort_format(ort, folder, chosen)
                files.append(ORT_FORMAT)
        elif chosen.ort_format:
            raise InputError("ort_format needs providers=cpu", "the other providers' optimised models cannot be stored")
        recorded = {name: options.get(name, default) for name, (default, _) in self.options.items() if "." not in name}
        recorded |= {name: value for name, value in options.items() if "." in name}
        recorded |= {"providers": ",".join(chosen.providers), "ort_format": chosen.ort_format}
        manifest = EngineManifest(self.name, tuple(files), {"onnxruntime": ort.__version__}, device, recorded)
        return OrtEngine(ort, manifest, chosen, folder, named)

    def load(self, folder: Path, manifest: EngineManifest, graph: Graph) -> Engine:
        """See :meth:`edgecompile.target.Target.load`."""
        ort = _import()
        chosen = _parse(ort, manifest.options)
        if manifest.files:
            built = manifest.versions.get("onnxruntime", "")
            if built.split(".")[:2] != ort.__version__.split(".")[:2]:
                raise EnvironmentMissing(
                    f"{folder / ENGINE} was built with ONNX Runtime {built}",
                    f"this is {ort.__version__}, and an optimised model runs on the version that made it",
                    f"pip install 'onnxruntime=={built}', or {_REBUILD}",
                )
            _check_cpu(folder, manifest)
        return OrtEngine(ort, manifest, chosen, folder, _named(graph))


class OrtEngine(Engine):
    """A session; one call uses the calling thread and ``threads - 1`` others, which sleep between calls."""

    def __init__(self, ort, manifest: EngineManifest, chosen: _Options, folder: Path, graph: Graph):
        self.manifest = manifest
        self.threads = 0 if chosen.on_gpu else chosen.threads
        self.clock = "thread_cpu" if chosen.cpu_only and chosen.threads == 1 else "wall"
        self._ort, self._chosen, self._folder, self._graph = ort, chosen, folder, graph
        self._outputs = [t.name for t in graph.outputs]
        self._session = self._open()

    def _open(self, profile: str = ""):
        """A new session on the engine's file, or on the graph where the provider cannot store what it compiled."""
        if self.manifest.files:
            return _session(
                self._ort, self._folder / ENGINE, self._chosen, self._graph, optimise=False, profile=profile
            )
        with tempfile.TemporaryDirectory(prefix=".ort.") as scratch:
            path = Path(scratch) / "model.onnx"
            self._graph.save(path)
            return _session(self._ort, path, self._chosen, self._graph, profile=profile)

    @functools.cached_property
    def _nodes(self) -> dict[str, gs.Node]:
        """The top-level nodes that the session executes, with their provenance, by name."""
        graph = Graph.load(self._folder / ENGINE) if self.manifest.files else self._graph
        return {node.name: node for node in graph.nodes}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`edgecompile.target.Engine.run`.

        Raises:
            InputError: an input is missing, unknown or of the wrong type or shape, or an operator fails on it.
        """
        oracle.check_feeds(self._graph, feeds)
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise _rejected(error, self._nodes.values()) from None
        return dict(zip(self._outputs, values, strict=True))

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """See :meth:`edgecompile.target.Engine.call`; inputs and outputs are bound once, no call copies them.

        Raises:
            InputError: as :meth:`run`.
        """
        oracle.check_feeds(self._graph, feeds)
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
            raise _rejected(error, self._nodes.values()) from None
        outputs = binding.get_outputs()
        if all(value.is_tensor() for value in outputs):  # equal inputs give equal shapes: write into the same buffers
            binding.clear_binding_outputs()
            for name, value in zip(self._outputs, outputs, strict=True):
                binding.bind_ortvalue_output(name, value)
        return functools.partial(self._session.run_with_iobinding, binding)

    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Engine.layers`.

        ONNX Runtime's profiler adds some 3 us to every kernel and rounds down to whole microseconds. What it adds is
        estimated, as the difference per kernel between a profiled and a plain run, and taken off. What runs inside If
        and Loop counts for the node that holds it. On a GPU these are the times to launch the kernels.
        """
        oracle.check_feeds(self._graph, feeds)
        feeds, plain = dict(feeds), []
        with tempfile.TemporaryDirectory(prefix="edgecompile.") as scratch:
            session = self._open(profile=str(Path(scratch) / "profile"))
            try:
                for _ in range(_WARM_RUNS + repeats):
                    session.run(self._outputs, feeds)
                for _ in range(_WARM_RUNS + repeats):
                    start = time.perf_counter()
                    self._session.run(self._outputs, feeds)
                    plain.append((time.perf_counter() - start) * 1e6)
            except Exception as error:  # ONNX Runtime raises a dozen types of its own
                raise _rejected(error, self._nodes.values()) from None
            finally:
                events = json.loads(Path(session.end_profiling()).read_text())
        layers = _layers(events, self._nodes, repeats, nested=bool(self.manifest.files))
        return _without_profiler(layers, float(np.median(plain[-repeats:])))

    def close(self) -> None:
        """Free the session."""
        del self._session


# -- options -----------------------------------------------------------------------------------------------------------


def _parse(ort, given: Mapping[str, Any]) -> _Options:
    known = [name for name in OrtTarget.options if "." not in name]
    for name in given:
        prefix, dot, _ = name.partition(".")
        if name not in known and not (dot and prefix in _PROVIDERS):
            close = difflib.get_close_matches(name, known, 1)
            raise InputError(
                f"target ort has no option {name!r}",
                f"did you mean {close[0]!r}?" if close else f"it has {', '.join(OrtTarget.options)}",
            )
    value = {name: given.get(name, OrtTarget.options[name][0]) for name in known}
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
    return _Options(providers, _threads(value["threads"]), level, _flag(value["ort_format"]), provider_options)


def _threads(value: Any) -> int:
    if str(value) == "auto":
        return measure.available_cores()
    if not str(value).isdigit() or int(value) < 1:
        raise InputError(f"threads={value} is not a number of threads", "give auto or a whole number from 1")
    return int(value)


def _flag(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise InputError(f"ort_format={value} is neither true nor false")
    return text in ("true", "1", "yes")


def _providers(ort, value: Any) -> tuple[str, ...]:
    asked = [p.strip().lower() for p in (value.split(",") if isinstance(value, str) else value)]
    present = set(ort.get_available_providers())
    if asked == ["auto"]:
        first = next(p for p in _AUTO if p == "cpu" or (_PROVIDERS[p] in present and not _defect(ort, p)))
        asked = [first]
    for name in asked:
        if name not in _PROVIDERS:
            raise InputError(f"{name!r} is not a provider", f"there are {', '.join(_PROVIDERS)} and auto")
        if _PROVIDERS[name] not in present:
            package, fix = _PACKAGES[name]
            raise EnvironmentMissing(
                f"ONNX Runtime here has no {name} provider", f"it comes with the package {package}", fix
            )
    return tuple(dict.fromkeys([*asked, "cpu"]))  # the CPU takes what the others cannot run


# -- sessions ----------------------------------------------------------------------------------------------------------


def _import():
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


def _session(
    ort,
    path: Path,
    chosen: _Options,
    graph: Graph,
    *,
    optimise: bool = True,
    save: Path | None = None,
    config: Mapping[str, str] | None = None,
    profile: str = "",
):
    """A session on a file; an error names the node of ``graph`` that is at fault."""
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
    providers = [(_PROVIDERS[p], dict(chosen.provider_options.get(p, {}))) for p in chosen.providers]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        raise _rejected(error, graph.walk()) from None
    wanted = _PROVIDERS[chosen.providers[0]]
    if session.get_providers()[0] != wanted:  # it only warns and goes on with the CPU
        raise EnvironmentMissing(
            f"ONNX Runtime cannot use its {chosen.providers[0]} provider here",
            "its libraries or its device are missing",
            "`edgecompile doctor` says what is missing",
        )
    return session


_OP = re.compile(r"\b(?:[\w.]+:)?(\w+)\(-?\d+\)")
_QUOTED = re.compile(r"""['"(]([^'"()]+)['")]""")


def _rejected(error: BaseException, nodes: Iterable[gs.Node]) -> EdgecompileError:
    """The user's view of an exception of ONNX Runtime: which of the nodes it complains about, and where that is."""
    if isinstance(error, EdgecompileError):
        return error
    text = " ".join(str(error).split())
    nodes = list(nodes)
    quoted, ops = set(_QUOTED.findall(text)), set(_OP.findall(text))
    culprit = next((n for n in nodes if n.name in quoted), None) or next((n for n in nodes if n.op in ops), None)
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = text if len(text) <= 300 else text[:297] + "..."
    if culprit is None:
        return InputError("ONNX Runtime rejects the model or its inputs", text)
    line = provenance(culprit).source_line
    at = f" from {line}" if line else ""
    return InputError(f"ONNX Runtime rejects {where(culprit)}{at}", text)


# -- building ----------------------------------------------------------------------------------------------------------


def _label(node: gs.Node) -> str:
    """How a node is called in :attr:`LayerTime.nodes`."""
    return node.name or node.outputs[0].name


def _named(graph: Graph) -> Graph:
    """A copy in which every node has a name of its own and remembers in its provenance what it was called."""
    copy = graph.copy()
    taken: set[str] = set()
    for node in copy.walk():
        label = _label(node)
        origin = provenance(node)
        node.provenance = Provenance(origin.modules, (label,), origin.metadata)
        node.name = _unique(label, taken)
    return copy


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _optimise(ort, graph: Graph, folder: Path, chosen: _Options) -> list[str]:
    """Let ONNX Runtime optimise the graph; write what it made of it, attributed and in an order of our own."""
    with tempfile.TemporaryDirectory(prefix=".ort.", dir=folder) as scratch:
        source, result = Path(scratch) / "model.onnx", Path(scratch) / "optimised.onnx"
        config = {}
        if len(graph.save(source)) > 1:
            config = {
                "session.optimized_model_external_initializers_file_name": result.name + ".data",
                "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            }
        _session(ort, source, chosen, graph, save=result, config=config)
        optimised = Graph.load(result)
        attribute(optimised, graph)
        _canonicalise(optimised, graph)
        optimised.metadata, optimised.name, optimised.doc_string = graph.metadata, graph.name, graph.doc_string
        optimised.producer_name, optimised.producer_version = graph.producer_name, graph.producer_version
        return [file.name for file in reversed(optimised.save(folder / ENGINE))]


def _write_ort_format(ort, folder: Path, chosen: _Options) -> None:
    path = folder / ENGINE
    config = {"session.save_model_format": "ORT"}
    _session(ort, path, chosen, Graph.load(path), optimise=False, save=folder / ORT_FORMAT, config=config)


def _cpu() -> str:
    return " ".join([platform.machine(), *measure.cpu_features()])


def _check_cpu(folder: Path, manifest: EngineManifest) -> None:
    """Refuse a model in a blocked layout that was made for another vector width."""

    def block(device: str) -> tuple[str, bool]:
        arch, *features = device.split()
        return arch, "avx512f" in features

    if block(manifest.device) == block(_cpu()):
        return
    if any(node.domain == _NCHWC for node in Graph.load(folder / ENGINE).nodes):
        raise EnvironmentMissing(
            f"{folder / ENGINE} was built for another CPU",
            f"its blocked layout fits {manifest.device!r}, this is {_cpu()!r}",
            f"{_REBUILD}, or build with level=extended, which runs on every CPU",
        )


# -- which source nodes an optimised node stands for ------------------------------------------------------------------

_BLOCKED = re.compile(r"(.*)_nchwc(?:_token_\d+)?")


def attribute(optimised: Graph, source: Graph) -> None:
    """Give every top-level node of ``optimised`` the provenance of the nodes of ``source`` whose work it does.

    ONNX Runtime fuses, renames and adds nodes without recording from what. A fusion keeps the name of the last tensor
    it computes, a node that moved keeps its own name, a blocked convolution is called ``<tensor>_nchwc`` and some
    fusions ``<node>/<Fusion>``: these name the source tensors a node owns. It stands for what lies in ``source``
    between them and the tensors that other nodes own. A node that owns nothing (a change of layout, a cast) serves its
    neighbour.

    Args:
        optimised: what ONNX Runtime made of ``source``; changed in place, nodes in topological order.
        source: the graph given to ONNX Runtime; every node has a name of its own.
    """
    producers = {t.name: node for node in source.nodes for t in node.outputs if t.name}
    named = {node.name: node for node in source.nodes}
    owner: dict[str, gs.Node] = {}
    follows: dict[int, gs.Node] = {}  # layout change -> the node whose result it passes on
    for node in optimised.nodes:
        tensors = [t.name for t in node.outputs if t.name in producers] or _named_tensors(node, producers, named)
        fresh = [name for name in tensors if name not in owner]
        owner.update(dict.fromkeys(fresh, node))
        if fresh and node.domain == _NCHWC:
            owner.update(dict.fromkeys(_fused_after(node, fresh[0], producers, owner), node))
        if tensors and not fresh:
            follows[id(node)] = owner[tensors[0]]
    position = {id(node): i for i, node in enumerate(source.nodes)}
    varying = _varying(source)
    regions: dict[int, list[gs.Node]] = {}
    for name, node in owner.items():
        region = regions.setdefault(id(node), [])
        seen = {id(n) for n in region}
        region += (n for n in _between(producers[name], owner, producers) if id(n) not in seen)
    for node in optimised.nodes:
        region = sorted(regions.get(id(node), ()), key=lambda n: position[id(n)])
        region = [n for n in region if id(n) in varying] or region
        node.provenance = Provenance.union(map(provenance, region))  # type: ignore[attr-defined]
    for node in reversed(optimised.nodes):
        _inherit(node, [follows[id(node)]] if id(node) in follows else [n for t in node.outputs for n in t.outputs])
    for node in optimised.nodes:
        _inherit(node, [n for t in node.inputs for n in t.inputs])


def _inherit(node: gs.Node, neighbours: Iterable[gs.Node]) -> None:
    if not provenance(node).sources:
        known = (provenance(n) for n in neighbours if provenance(n).sources)
        node.provenance = next(known, Provenance())  # type: ignore[attr-defined]


def _named_tensors(node: gs.Node, producers: Mapping[str, gs.Node], named: Mapping[str, gs.Node]) -> list[str]:
    """Source tensors that the name of an optimised node speaks of."""
    blocked = _BLOCKED.fullmatch(node.name)
    if blocked and blocked[1] in producers:
        return [blocked[1]]
    name = node.name
    while name and name not in named:
        name = name.rpartition("/")[0]
    return [t.name for t in named[name].outputs if t.name] if name else []


def _fused_after(
    node: gs.Node, name: str, producers: Mapping[str, gs.Node], owner: Mapping[str, gs.Node]
) -> Iterator[str]:
    """Tensors that a blocked convolution computes beyond the one it is named after: the sum and the activation."""
    tensor = next(t for t in producers[name].outputs if t.name == name)
    activation = node.attrs.get("activation")
    wanted = [op for op, fused in (("Add", len(node.inputs) > 3), (activation, activation)) if fused]
    for op in wanted:
        readers = tensor.outputs
        if len(readers) == 1 and readers[0].op == op and readers[0].outputs[0].name not in owner:
            tensor = readers[0].outputs[0]
            yield tensor.name


def _between(last: gs.Node, owner: Mapping[str, gs.Node], producers: Mapping[str, gs.Node]) -> Iterator[gs.Node]:
    """``last`` and the source nodes before it, up to tensors that an optimised node owns."""
    stack, seen = [last], {id(last)}
    while stack:
        current = stack.pop()
        yield current
        for tensor in _reads(current):
            before = producers.get(tensor.name)
            if before is not None and id(before) not in seen and tensor.name not in owner:
                seen.add(id(before))
                stack.append(before)


def _varying(graph: Graph) -> set[int]:
    """Nodes that depend on an input of the model; the others are folded before the first run."""
    tensors = {id(t) for t in graph.inputs}
    found: set[int] = set()
    for node in graph.nodes:
        if any(id(t) in tensors for t in _reads(node)):
            found.add(id(node))
            tensors.update(map(id, node.outputs))
    return found


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors that a node needs, also through its subgraphs."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from value.outputs
            for inner in value.nodes:
                yield from _reads(inner)


def _canonicalise(optimised: Graph, source: Graph) -> None:
    """Name and order nodes after the source: ONNX Runtime numbers what it adds in the order of memory addresses."""
    position = {label: i for i, node in enumerate(source.nodes) for label in provenance(node).sources}
    kept = {t.name for node in source.walk() for t in [*node.inputs, *node.outputs]} | {t.name for t in source.inputs}

    def key(node: gs.Node) -> tuple:
        sources = provenance(node).sources
        reads = tuple(re.sub(r"_token_\d+", "", t.name) for t in node.inputs)
        return max((position[s] for s in sources), default=-1), node.op, reads

    optimised.nodes = _topological(optimised.nodes, {id(n): key(n) for n in optimised.nodes})
    taken: set[str] = set()
    for node in optimised.nodes:
        sources = provenance(node).sources
        layout = node.op in ("ReorderInput", "ReorderOutput")
        node.name = _unique(":".join([*sources[-1:], *([node.op] if layout or not sources else [])]), taken)
    top = {id(node) for node in optimised.nodes}
    for node in optimised.walk():
        if id(node) not in top:
            node.name = _unique(node.name or node.op, taken)
    used = set(kept)
    for node in optimised.walk():
        for kind, tensors in (("in", node.inputs), ("out", node.outputs)):
            for index, tensor in enumerate(tensors):
                if tensor.name and tensor.name not in used:
                    tensor.name = _unique(f"{node.name}:{kind}{index}", used)


def _topological(nodes: Sequence[gs.Node], keys: Mapping[int, tuple]) -> list[gs.Node]:
    """The nodes in topological order, the least key first among those that are ready."""
    position = {id(n): i for i, n in enumerate(nodes)}
    sources = {
        i: {position[id(p)] for t in _reads(n) for p in t.inputs if id(p) in position} - {i}
        for i, n in enumerate(nodes)
    }
    readers: dict[int, list[int]] = {}
    for index, before in sources.items():
        for other in before:
            readers.setdefault(other, []).append(index)
    ready = [(keys[id(nodes[i])], i) for i, before in sources.items() if not before]
    heapq.heapify(ready)
    order = []
    while ready:
        _, index = heapq.heappop(ready)
        order.append(nodes[index])
        for reader in readers.get(index, ()):
            sources[reader].discard(index)
            if not sources[reader]:
                heapq.heappush(ready, (keys[id(nodes[reader])], reader))
    return order


# -- profiles ----------------------------------------------------------------------------------------------------------


def _layers(events: Iterable[Mapping], nodes: Mapping[str, gs.Node], repeats: int, *, nested: bool) -> list[LayerTime]:
    """Median time of each kernel over the last ``repeats`` runs, in the order in which they were executed.

    Args:
        events: what the profiler wrote.
        nodes: the top-level nodes by name.
        repeats: runs to count.
        nested: True if every kernel that is not in ``nodes`` runs inside one that is.
    """
    durations: dict[str, list[int]] = {}
    ops: dict[str, str] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"] and (name in nodes or not nested):
            durations.setdefault(name, []).append(event["dur"])
            ops[name] = event["args"].get("op_name", "")
    layers = []
    for name, spent in durations.items():
        origin = provenance(nodes[name]) if name in nodes else Provenance()
        layers.append(LayerTime(name, ops[name], float(np.median(spent[-repeats:])), origin.sources, origin.modules))
    return layers


def _without_profiler(layers: list[LayerTime], plain: float) -> list[LayerTime]:
    """Take off what profiling added to each kernel; ``plain`` is the time of a run without it, in microseconds."""
    if not layers:
        return layers
    times = [layer.microseconds for layer in layers]
    added = min(max(0.0, (sum(times) - plain) / len(times)), min(times))
    return [replace(layer, microseconds=layer.microseconds - added) for layer in layers]


# -- doctor ------------------------------------------------------------------------------------------------------------


def _probe() -> Iterator[Capability]:
    installed = {p: v for p in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino") if (v := _version(p))}
    try:
        ort = _import()
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
    for name, full in _PROVIDERS.items():
        package, fix = _PACKAGES[name]
        label = f"onnxruntime {name} provider"
        if full not in present:
            detail = f"not in this package; {package} has it" + _TENSORRT.get(name, "")
            yield Capability(label, False, detail=detail, fix=fix)
            continue
        defect = _defect(ort, name)
        does = f"{measure.available_cores()} cores, {_cpu()}" if name == "cpu" else "runs a model here"
        yield Capability(label, not defect, ort.__version__, (defect or does) + _TENSORRT.get(name, ""))


_TENSORRT = {"tensorrt": "; onnxruntime-gpu links libnvinfer.so.10: this provider needs TensorRT 10 and cannot use 11"}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _defect(ort, provider: str) -> str:
    """Why a provider that was compiled in cannot run a model here, or ``""``."""
    x = gs.Variable("x", np.float32, [1])
    y = gs.Variable("y", np.float32, [1])
    graph = Graph(nodes=[gs.Node("Relu", inputs=[x], outputs=[y])], inputs=[x], outputs=[y], opset=17, ir_version=8)
    model = gs.export_onnx(graph).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        providers = list(dict.fromkeys((_PROVIDERS[provider], _PROVIDERS["cpu"])))
        session = ort.InferenceSession(model, options, providers=providers)
        session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        return " ".join(str(error).split())[:200]
    return "" if session.get_providers()[0] == _PROVIDERS[provider] else "its libraries or its device are missing"
