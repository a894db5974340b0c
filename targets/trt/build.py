"""From the graph to a serialised engine: one code path for TensorRT 10.3, 10.16 and 11, always strongly typed.

Where versions differ, an attribute is asked for, never a version number. Precision comes from the graph alone.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError, did_you_mean
from edgecompile.graph import Graph, named, where
from edgecompile.targets.trt import nms, preflight, shift_add
from edgecompile.targets.trt import options as trt_options
from edgecompile.targets.trt.options import Options
from edgecompile.targets.trt.preflight import Problem

Say = Callable[[str], None]
_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|std::bad_alloc", re.IGNORECASE)
_CACHE_MISS = re.compile(r"timing cache.*miss|miss.*timing cache|not found in (the )?timing cache", re.IGNORECASE)


@dataclass(frozen=True)
class Dla:
    """How much of a network a DLA core runs.

    Attributes:
        layers: of the network.
        taken: that the core takes; the others run on the GPU.
        islands: runs of successive layers that it takes. Between two, tensors go to the GPU and back.
    """

    layers: int
    taken: int
    islands: int

    def __str__(self) -> str:
        return f"DLA: {self.taken} of {self.layers} layers, {self.islands} islands"


@dataclass(frozen=True)
class Built:
    """What the builder made.

    Attributes:
        plan: the serialised engine.
        timing_cache: the timing cache after the build.
        dla: what the DLA core runs, None for an engine that is for the GPU.
    """

    plan: Any
    timing_cache: bytes
    dla: Dla | None


def lowered(graph: Graph, chosen: Options) -> Graph:
    """A copy of a graph as TensorRT is given it: nodes with names of their own, what the options add to it, and coded
    layers as plugins or with the weights decoded.

    Raises:
        InputError: boxes are to be suppressed, and the outputs are not those of a detector.
    """
    if chosen.nms:
        graph = nms.append(graph, chosen.nms_score, chosen.nms_iou, chosen.nms_boxes)
    if chosen.shift_add == "plugin":
        graph = shift_add.lower(graph)
    return named(shift_add.decoded(graph))


def build(trt: Any, graph: Graph, chosen: Options, log: Any, say: Say | None = None) -> Built:
    """Build an engine.

    Args:
        trt: the module ``tensorrt``.
        graph: what :func:`lowered` returned.
        chosen: the options; :func:`edgecompile.targets.trt.options.require` has passed them.
        log: what :func:`edgecompile.targets.trt.session.logger` returned.
        say: told what the builder is doing.

    Raises:
        InputError: the parser or the builder refuses the graph (every node named by module path), a dynamic axis has
            no range, or the timing cache does not fit.
        EnvironmentMissing: the device has too little memory, or no such DLA core.
        KeyboardInterrupt: Ctrl-C, once TensorRT has finished the step it was at.
    """
    trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    with tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
        path = Path(scratch) / "model.onnx"
        graph.save(path)
        if not parser.parse_from_file(str(path)):
            raise _refused(trt, graph, parser)
    config = builder.create_builder_config()
    _configure(trt, config, chosen)
    profile = _profile(builder, network, chosen.dynamic)
    if profile is not None:
        config.add_optimization_profile(profile)
    pressed = threading.Event()
    config.progress_monitor = monitor = _monitor(trt, say, pressed)
    cache = _timing_cache(config, chosen)
    dla = _dla(trt, builder, network, config, chosen) if chosen.dla is not None else None
    with _interrupts(pressed):
        plan = builder.build_serialized_network(network, config)
    if pressed.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise _failed(log.messages)
    built = Built(plan, bytes(config.get_timing_cache().serialize()), dla)
    del monitor, cache  # until here: TensorRT keeps no references of its own
    return built


def check_ranges(shapes: Mapping[str, Sequence[Any]], ranges: trt_options.Ranges) -> None:
    """Refuse ranges that are not those of the dynamic axes.

    Args:
        shapes: of the inputs, by name; a dynamic axis is -1, a name or None.
        ranges: see :class:`edgecompile.targets.trt.options.Options`.

    Raises:
        InputError: an input or axis is not there or not dynamic, or a dynamic axis has no range.
    """
    for name, axes in ranges.items():
        if name not in shapes:
            names = ", ".join(map(repr, shapes))
            raise InputError(
                f"the model has no input {name!r}", did_you_mean(name, shapes) or f"its inputs are {names}"
            )
        for axis in axes:
            if axis >= len(shapes[name]) or _fixed(shapes[name][axis]):
                shown = "x".join(map(str, shapes[name]))
                raise InputError(f"axis {axis} of input {name!r} is not dynamic", f"its shape is {shown}")
    for name, shape in shapes.items():
        missing = [i for i, extent in enumerate(shape) if not _fixed(extent) and i not in ranges.get(name, {})]
        if missing:
            raise InputError(
                f"axis {missing[0]} of input {name!r} has no range",
                "TensorRT needs the least, usual and largest extent",
                f"give --dynamic {name}:{missing[0]}=MIN:OPT:MAX",
            )


def _fixed(extent: Any) -> bool:
    return isinstance(extent, int) and extent >= 0


# -- configuration -----------------------------------------------------------------------------------------------------


def _configure(trt: Any, config: Any, chosen: Options) -> None:
    flags = {
        "ERROR_ON_TIMING_CACHE_MISS": chosen.replay,
        "REFIT": chosen.refit,
        "SPARSE_WEIGHTS": chosen.sparsity,
        "VERSION_COMPATIBLE": chosen.version_compatible,
        "WEIGHT_STREAMING": chosen.weight_streaming,
    }
    pools = {
        "WORKSPACE": chosen.workspace,
        "DLA_MANAGED_SRAM": chosen.dla_sram,
        "DLA_LOCAL_DRAM": chosen.dla_local,
        "DLA_GLOBAL_DRAM": chosen.dla_global,
    }
    for name in (n for n, wanted in flags.items() if wanted):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not chosen.tf32:  # on by default, which is not the precision that the graph asks for
        config.clear_flag(trt.BuilderFlag.TF32)
    for name, size in pools.items():
        if size is not None:
            config.set_memory_pool_limit(getattr(trt.MemoryPoolType, name), size)
    config.builder_optimization_level = chosen.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers name their ONNX nodes
    if chosen.hardware != "none":
        levels = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = getattr(levels, chosen.hardware.upper())


def _profile(builder: Any, network: Any, ranges: trt_options.Ranges) -> Any:
    """One optimisation profile over every dynamic input, None if there is none."""
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    shapes = {t.name: tuple(t.shape) for t in inputs}
    check_ranges(shapes, ranges)
    profile = None
    for name, axes in ranges.items():
        profile = builder.create_optimization_profile() if profile is None else profile
        least, usual, most = (
            tuple(axes[i][k] if i in axes else extent for i, extent in enumerate(shapes[name])) for k in range(3)
        )
        profile.set_shape(name, least, usual, most)
    return profile


def _timing_cache(config: Any, chosen: Options) -> Any:
    content = trt_options.read_timing_cache(chosen)
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"the timing cache {chosen.timing_cache} does not fit",
            "it was made by another version of TensorRT or on another GPU",
            "leave timing_cache out, or name a new file",
        )
    return cache


def _dla(trt: Any, builder: Any, network: Any, config: Any, chosen: Options) -> Dla:
    """Put the network on a DLA core and say how much of it the core takes."""
    cores = builder.num_DLA_cores
    if chosen.dla is None or chosen.dla >= cores:
        raise EnvironmentMissing(f"there is no DLA core {chosen.dla}", f"this device has {cores}", "leave dla out")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = chosen.dla
    if chosen.dla_fallback:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    fits = [config.can_run_on_DLA(network.get_layer(i)) for i in range(network.num_layers)]
    return Dla(len(fits), sum(fits), sum(1 for takes, _ in itertools.groupby(fits) if takes))


@contextlib.contextmanager
def _interrupts(pressed: threading.Event) -> Iterator[None]:
    """Set ``pressed`` on Ctrl-C; an exception between two steps would be lost in TensorRT, which calls from C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(trt: Any, say: Say | None, stop: threading.Event) -> Any:
    """Progress of the build, one line per phase and tenth of its steps; ``stop`` ends it after the next step."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.steps[phase_name] = max(num_steps, 1)

        def step_complete(self, phase_name, step):
            tenth = max(self.steps.get(phase_name, 1) // 10, 1)
            if say is not None and step % tenth == 0:
                say(f"{phase_name}: {step}/{self.steps.get(phase_name, 0)}")
            return not stop.is_set()

        def phase_finish(self, phase_name):
            self.steps.pop(phase_name, None)

    return Monitor()


# -- errors ------------------------------------------------------------------------------------------------------------


def _refused(trt: Any, graph: Graph, parser: Any) -> InputError:
    """Every node that the parser refuses, then those that it did not come to and that the preflight knows of."""
    try:
        known = preflight.check(graph, trt.__version__)
    except InputError:  # the graph contradicts itself, which the parser says in its own words
        known = []
    advice: Mapping[str, Problem] = {p.node: p for p in known}
    nodes = {n.name: n for n in graph.walk()}
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name = error.node_name()
        why = " ".join(error.desc().split()) or "no reason given"
        place = where(nodes[name]) if name in nodes else f"{name or 'the model'} ({error.node_operator() or 'ONNX'})"
        problems.append(Problem(place, why, advice[name].fix if name in advice else "", name))
    told = {p.node for p in problems}
    problems += [p for p in known if p.node not in told]
    try:
        preflight.require(problems, trt.__version__, len(nodes))
    except InputError as error:
        return error
    return InputError(f"TensorRT {trt.__version__} cannot take the model", "the parser gives no reason")


def _failed(messages: Sequence[str]) -> EdgecompileError:
    text = "; ".join(messages[-3:])[:600] or "TensorRT gives no reason"
    if any(_MEMORY.search(m) for m in messages):
        return EnvironmentMissing(
            "the GPU has too little memory to build the engine", text, "give workspace=, or close other programs"
        )
    if any(_CACHE_MISS.search(m) for m in messages):
        return InputError(
            "the timing cache does not hold every measurement of this build",
            text,
            "build without replay, then keep the new cache",
        )
    return InputError("TensorRT cannot build the engine", text, "try a lower level, or another precision")
