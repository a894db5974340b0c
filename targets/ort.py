"""ONNX Runtime: the CPU provider, and CUDA, TensorRT and OpenVINO where the installed package has them.

On the CPU the graph is optimised once, at build time, and saved: ``model.ort.onnx`` is what ONNX Runtime runs, with
every node attributed to the nodes and torch modules it stands for. Loading it runs no optimisation again. A layout
optimisation rewrites convolutions to a blocked layout whose block size is that of the CPU's vectors, so such a file
gives wrong results on a CPU with another block size; the manifest records the CPU and :meth:`OrtTarget.load` refuses.
The other providers optimise (and compile) when a session is made, from the bundle's ``model.onnx``. The manifest's
remarks then say which nodes a GPU leaves to the CPU, whether a CUDA graph replays the model, and what it is timed with.
Precision is that of the graph: no provider's flag for it is set.

References: ONNX Runtime documentation, "Graph Optimizations in ONNX Runtime", section "Online/Offline Mode", and
"Execution Providers"; blocked layout: onnxruntime/core/optimizer/nchwc_transformer.cc.
"""

from __future__ import annotations

import functools
import heapq
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import functions, measure, oracle
from edgecompile.errors import InputError
from edgecompile.files import write_atomic
from edgecompile.graph import Graph, Provenance, named, provenance, where
from edgecompile.target import Capability, Engine, EngineManifest, LayerTime, Target
from edgecompile.targets import ort_session
from edgecompile.targets.ort_session import ENGINE, NCHWC, OPS, OPTIONS, ORT_FORMAT, Options, OrtSession


class OrtTarget(Target):
    """Lower a graph to an ONNX Runtime session."""

    name: ClassVar[str] = "ort"
    pipelines: ClassVar[Mapping[str, str]] = {
        "fp32": "clean,fold_norm,reparam",
        "fp16": "clean,fold_norm,reparam,cast",
        "int8": "clean,fold_norm,reparam,quantize",
    }
    options: ClassVar[Mapping[str, tuple[Any, str]]] = OPTIONS

    def probe(self) -> Sequence[Capability]:
        """ONNX Runtime and each provider: compiled in or not, usable or not."""
        return list(ort_session.probe())

    def check(self, options: Mapping[str, Any]) -> None:
        """See :meth:`edgecompile.target.Target.check`."""
        ort_session.parse(ort_session.runtime(), options)

    def build(
        self, graph: Graph, folder: Path, options: Mapping[str, Any], say: Callable[[str], None] | None = None
    ) -> Engine:
        """See :meth:`edgecompile.target.Target.build`; on the CPU, writes :data:`ENGINE` and on request the ORT format,
        and :data:`OPS` where kernels of our own are used.

        Equal graphs give equal files on the same machine, but for the ORT format, whose tables ONNX Runtime orders by
        memory address, and for layers whose two kernels are about as fast.
        """
        ort = ort_session.runtime()
        chosen = ort_session.parse(ort, options)
        source = named(graph)
        files: list[str] = []
        device = chosen.providers[0]
        if chosen.cpu_only:
            files = _store(ort, source, folder, chosen, say or (lambda _: None))
            device = measure.cpu()
            if chosen.ort_format:
                _write_ort_format(ort, folder, chosen)
                files.append(ORT_FORMAT)
        elif chosen.ort_format:
            raise InputError("ort_format needs providers=cpu", "the other providers' optimised models cannot be stored")
        recorded = {name: options.get(name, default) for name, (default, _) in self.options.items() if "." not in name}
        recorded |= {
            f"{p}.{key}": value for p, given in chosen.provider_options.items() for key, value in given.items()
        }
        recorded |= {
            "providers": ",".join(chosen.providers),
            "ort_format": chosen.ort_format,
            "transfers": chosen.transfers,
        }
        manifest = EngineManifest(self.name, tuple(files), {"onnxruntime": ort.__version__}, device, recorded)
        engine = OrtEngine(ort, manifest, chosen, folder, source)
        if chosen.on_gpu:
            engine.manifest = replace(manifest, options={**manifest.options, **engine.remarks()})
        return engine

    def approximates(self, graph: Graph, options: Mapping[str, Any]) -> str:
        """See :meth:`edgecompile.target.Target.approximates`."""
        return functions.rounded(graph, options)

    def load(self, folder: Path, manifest: EngineManifest, graph: Graph) -> Engine:
        """See :meth:`edgecompile.target.Target.load`."""
        ort = ort_session.runtime()
        chosen = ort_session.parse(ort, manifest.options)
        ort_session.check(ort, folder, manifest)
        return OrtEngine(ort, manifest, chosen, folder, named(graph))

    def layers(
        self, folder: Path, manifest: EngineManifest, graph: Graph, profile: Mapping[str, Any]
    ) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Target.layers`."""
        stored = bool(manifest.files)
        nodes = (Graph.load(folder / ENGINE) if stored else named(graph)).nodes
        return _of_profile(profile, {node.name: node for node in nodes}, nested=stored)


class OrtEngine(OrtSession, Engine):
    """A session that knows the graph it executes."""

    def __init__(self, ort, manifest: EngineManifest, chosen: Options, folder: Path, graph: Graph):
        self._graph = graph
        super().__init__(ort, manifest, chosen, folder)

    def _open(self, **how: Any):
        how |= {"stream": self._stream}
        if self.manifest.files:
            how |= {"library": self._library}
            return _session(self._ort, self._folder / ENGINE, self._chosen, self._graph, optimise=False, **how)
        with tempfile.TemporaryDirectory(prefix=".ort.") as scratch:
            path = Path(scratch) / "model.onnx"
            self._graph.save(path)
            return _session(self._ort, path, self._chosen, self._graph, **how)

    def remarks(self) -> dict[str, Any]:
        """What the manifest says of an engine on a GPU: ``_on_cpu``, nodes that it leaves to the CPU, by module path
        (None where ONNX Runtime does not tell), and ``_notes`` for people.
        """
        graph = "each set of inputs is replayed as a CUDA graph" if self._captures else "without CUDA graph"
        clock = "CUDA events" if self.clock == "cuda_event" else "the wall clock, until ONNX Runtime has waited"
        left, places = self.on_cpu(), None
        notes = [f"{graph}; timed with {clock}"]
        if left is None:
            notes.append("which nodes run on the CPU is not known: this ONNX Runtime does not tell")
        else:
            places = [where(self._nodes[name]) if name in self._nodes else f"{name} ({op})" for name, op in left]
        if places:
            told = ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
            notes.append(f"{len(places)} of {len(self._nodes)} nodes run on the CPU: {told}")
        return {"_on_cpu": places, "_notes": notes}

    def _blame(self, text: str) -> str:
        return _culprit(self._nodes.values(), text)

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
        return super().run(feeds)

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """See :meth:`edgecompile.targets.ort_session.OrtSession.call`.

        Raises:
            InputError: as :meth:`run`.
        """
        oracle.check_feeds(self._graph, feeds)
        return super().call(feeds)

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """See :meth:`edgecompile.targets.ort_session.OrtSession.timer`.

        Raises:
            InputError, EnvironmentMissing: as there.
        """
        oracle.check_feeds(self._graph, feeds)
        return super().timer(feeds)

    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Engine.layers`.

        ONNX Runtime's profiler adds some 3 us to every kernel and rounds down to whole microseconds. What it adds is
        estimated, as the difference per kernel between a profiled and a plain run, and taken off. What runs inside If
        and Loop counts for the node that holds it. On a GPU these are the times to launch the kernels.
        """
        oracle.check_feeds(self._graph, feeds)
        return _of_profile(self.profile(feeds, repeats), self._nodes, nested=bool(self.manifest.files))


# -- sessions ----------------------------------------------------------------------------------------------------------


def _session(ort, path: Path, chosen: Options, graph: Graph, **how: Any):
    """:func:`edgecompile.targets.ort_session.session`; an error names the node of ``graph`` that is at fault."""
    return ort_session.session(ort, path, chosen, lambda text: _culprit(graph.walk(), text), **how)


_OP = re.compile(r"\b(?:[\w.]+:)?(\w+)\(-?\d+\)")
_QUOTED = re.compile(r"""['"(]([^'"()]+)['")]""")


def _culprit(nodes: Iterable[gs.Node], text: str) -> str:
    """Which of the nodes ONNX Runtime complains about, and where it comes from; ``""`` if it names none."""
    nodes = list(nodes)
    quoted, ops = set(_QUOTED.findall(text)), set(_OP.findall(text))
    culprit = next((n for n in nodes if n.name in quoted), None) or next((n for n in nodes if n.op in ops), None)
    if culprit is None:
        return ""
    line = provenance(culprit).source_line
    return f"{where(culprit)} from {line}" if line else where(culprit)


# -- building ----------------------------------------------------------------------------------------------------------


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _store(ort, graph: Graph, folder: Path, chosen: Options, say: Callable[[str], None]) -> list[str]:
    """Write what the engine runs, with kernels of our own where they are wanted; the names of the files."""
    from edgecompile.targets import ort_custom

    with tempfile.TemporaryDirectory(prefix=".ort.", dir=folder) as scratch:
        lowered = None if chosen.ort_format else ort_custom.lower(ort, graph, chosen, Path(scratch), say)
    if lowered is None:
        return _optimise(ort, graph, folder, chosen)
    graph, code = lowered
    write_atomic(folder / OPS, [code])
    return [*_optimise(ort, graph, folder, chosen, folder / OPS), OPS]


def _optimise(ort, graph: Graph, folder: Path, chosen: Options, library: Path | None = None) -> list[str]:
    """Let ONNX Runtime optimise the graph; write what it made of it, attributed and in an order of our own."""
    with tempfile.TemporaryDirectory(prefix=".ort.", dir=folder) as scratch:
        source, result = Path(scratch) / "model.onnx", Path(scratch) / "optimised.onnx"
        config = {}
        if len(graph.save(source)) > 1:
            config = {
                "session.optimized_model_external_initializers_file_name": result.name + ".data",
                "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            }
        _session(ort, source, chosen, graph, save=result, config=config, library=library)
        optimised = Graph.load(result)
        attribute(optimised, graph)
        _canonicalise(optimised, graph)
        optimised.metadata, optimised.name, optimised.doc_string = graph.metadata, graph.name, graph.doc_string
        optimised.producer_name, optimised.producer_version = graph.producer_name, graph.producer_version
        return [file.name for file in reversed(optimised.save(folder / ENGINE))]


def _write_ort_format(ort, folder: Path, chosen: Options) -> None:
    path = folder / ENGINE
    config = {"session.save_model_format": "ORT"}
    _session(ort, path, chosen, Graph.load(path), optimise=False, save=folder / ORT_FORMAT, config=config)


# -- which source nodes an optimised node stands for ------------------------------------------------------------------

_BLOCKED = re.compile(r"(.*)_nchwc(?:_token_\d+)?")
_NUMBERED = re.compile(r"(.*)_token_\d+")
_ADDED = ("Transpose", "QuantizeLinear", "DequantizeLinear")  # operators that ONNX Runtime adds, numbered likewise


def attribute(optimised: Graph, source: Graph) -> None:
    """Give every top-level node of ``optimised`` the provenance of the nodes of ``source`` whose work it does.

    ONNX Runtime fuses, renames and adds nodes without recording from what. A fusion keeps the name of the last tensor
    it computes, a node that moved keeps its own name, a blocked convolution is called ``<tensor>_nchwc``, one on
    integers ``<node>_token_<number>`` where its layout changed, and some fusions ``<node>/<Fusion>``: these name the
    source tensors a node owns. It stands for what lies in ``source`` between them and the tensors that other nodes own;
    one that writes integers also for the activation and the QuantizeLinear after it. A node that owns nothing (a change
    of layout, a cast) serves its neighbour.

    Args:
        optimised: what ONNX Runtime made of ``source``; changed in place, nodes in topological order.
        source: the graph given to ONNX Runtime; every node has a name of its own.
    """
    producers = {t.name: node for node in source.nodes for t in node.outputs if t.name}
    named = {node.name: node for node in source.nodes}
    left = {name for node in optimised.nodes for name in (node.name, *(t.name for t in node.outputs))}
    owner: dict[str, gs.Node] = {}
    follows: dict[int, gs.Node] = {}  # layout change -> the node whose result it passes on
    for node in optimised.nodes:
        tensors = [t.name for t in node.outputs if t.name in producers] or _named_tensors(node, producers, named)
        fresh = [name for name in tensors if name not in owner]
        owner.update(dict.fromkeys(fresh, node))
        if fresh and node.domain == NCHWC:
            owner.update(dict.fromkeys(_fused_after(node, fresh[0], producers, owner), node))
        elif fresh:
            owner.update(dict.fromkeys(_quantized_after(producers[fresh[0]], left), node))
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
        node.provenance = _origin(region)  # type: ignore[attr-defined]
    for node in reversed(optimised.nodes):
        _inherit(node, [follows[id(node)]] if id(node) in follows else [n for t in node.outputs for n in t.outputs])
    for node in optimised.nodes:
        _inherit(node, [n for t in node.inputs for n in t.inputs])


def _origin(region: Sequence[gs.Node]) -> Provenance:
    """What a kernel stands for: all the nodes, and the modules of those that do more than change the type."""
    whole = Provenance.union(map(provenance, region))
    work = [n for n in region if n.op not in ("QuantizeLinear", "DequantizeLinear")]
    return replace(whole, modules=Provenance.union(map(provenance, work)).modules) if work else whole


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
    numbered = _NUMBERED.fullmatch(name)
    if numbered and name not in named and node.op not in _ADDED:
        name = numbered[1]
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


def _quantized_after(node: gs.Node, left: Set[str]) -> list[str]:
    """Tensors between a node and the QuantizeLinear that joined it in one kernel; none if that is still there.

    Args:
        node: of the source.
        left: names of the nodes and tensors that ONNX Runtime left.
    """
    found: list[str] = []
    while len(node.outputs) == 1 and len(readers := node.outputs[0].outputs) == 1:
        node = readers[0]
        if node.op not in ("Relu", "Clip", "QuantizeLinear") or left & {node.name, node.outputs[0].name}:
            break
        found.append(node.outputs[0].name)
        if node.op == "QuantizeLinear":
            return found
    return []


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


def _of_profile(profile: Mapping[str, Any], nodes: Mapping[str, gs.Node], *, nested: bool) -> list[LayerTime]:
    """What :meth:`edgecompile.targets.ort_session.OrtSession.profile` returned, attributed to ``nodes``."""
    return _without_profiler(_layers(profile["events"], nodes, profile["repeats"], nested=nested), profile["plain"])


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
