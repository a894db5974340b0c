"""A module that passes for ``tensorrt``, behind which ONNX Runtime computes the answers.

Its classes take the names, arguments, types and enumeration members that the signatures of one version of the bindings
give, and no others: a call that the bindings would refuse fails here. The device is host memory with a queue, so work
that is enqueued happens only when the stream is waited for, work that is captured only when the graph is replayed, and
memory that is freed too early is noticed.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import json
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import signatures
import tensorrt_plugin

from edgecompile.device import Buffer, Device, out_of_memory

_TYPES = {
    "tensor(float)": ("FLOAT", "float32"),
    "tensor(float16)": ("HALF", "float16"),
    "tensor(int32)": ("INT32", "int32"),
    "tensor(int64)": ("INT64", "int64"),
    "tensor(bool)": ("BOOL", "bool"),
}
MAGIC = b"double of a serialised engine\n"


@dataclass
class Knobs:
    """How the double behaves, and what happened to it."""

    refuse: dict[str, str] = field(default_factory=dict)  # operator -> why the parser refuses it
    build_error: str = ""
    reject_cache: bool = False
    context_error: bool = False
    run_error: bool = False
    capture_error: bool = False
    host: tuple[str, ...] = ()  # shape inputs, which TensorRT reads on the host
    dla_cores: int = 0
    dla_ops: tuple[str, ...] = ("Conv", "Relu")
    memory: int = 1 << 40
    deserialised: int = 0
    config: Any = None
    network_flags: int = 0
    plugins: bool = False
    log: list[str] = field(default_factory=list)


# -- the device --------------------------------------------------------------------------------------------------------

STREAMS: dict[int, HostDevice] = {}
_HANDLES = itertools.count(1000)


class HostDevice(Device):
    def __init__(self, knobs: Knobs, compute_capability: str = "8.7"):
        self.compute_capability, self.stream = compute_capability, next(_HANDLES)
        self._knobs, self._queue, self._captured = knobs, [], None
        self._alive: dict[int, weakref.ref] = {}
        STREAMS[self.stream] = self

    def enqueue(self, work: Callable[[], object]) -> None:
        (self._queue if self._captured is None else self._captured).append(work)

    @property
    def capturing(self) -> bool:
        return self._captured is not None

    def memory(self, address: int, size: int) -> np.ndarray:
        held = self._alive.get(address)
        array = held() if held is not None else None
        assert array is not None, "memory that was freed, or never allocated, is used"
        assert size <= array.nbytes, f"{size} bytes are used where {array.nbytes} were allocated"
        return array[:size]

    def allocate(self, size: int) -> Buffer:
        if size > self._knobs.memory:
            raise out_of_memory(size)
        held = np.full(max(size, 1), 0xAB, np.uint8)
        self._alive[held.ctypes.data] = weakref.ref(held)
        return Buffer(held.ctypes.data, held)

    def upload(self, buffer: Buffer, array: np.ndarray) -> None:
        content = array.tobytes()
        self.enqueue(lambda: buffer.held.__setitem__(slice(len(content)), np.frombuffer(content, np.uint8)))

    def download(self, array: np.ndarray, buffer: Buffer) -> None:
        assert not self.capturing
        target = array.reshape(-1).view(np.uint8)
        self.enqueue(lambda: target.__setitem__(slice(None), buffer.held[: array.nbytes]))

    def synchronize(self) -> None:
        assert not self.capturing, "the stream is waited for while it is captured"
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def event(self) -> list[float]:
        return []

    def record(self, event: list[float]) -> None:
        self.enqueue(lambda: event.__setitem__(slice(None), [time.perf_counter()]))

    def seconds(self, start: list[float], stop: list[float]) -> float:
        return stop[0] - start[0]

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        self.synchronize()
        self._captured = []
        try:
            if self._knobs.capture_error:
                raise RuntimeError("operation not permitted when stream is capturing")
            work()
        finally:
            captured, self._captured = self._captured, None
        return lambda: [self.enqueue(one) for one in captured]


# -- classes as the signatures have them -------------------------------------------------------------------------------

_WHOLE = ("int", "typing.SupportsInt")
_NUMBER = ("float", "typing.SupportsFloat")


def _fits(value: object, kind: str, module: types.ModuleType) -> bool:
    if kind in _WHOLE:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in _NUMBER:
        return isinstance(value, int | float)
    if kind == "Dims":
        return isinstance(value, tuple | list) and all(type(v) is int for v in value)
    simple = {"str": str, "bool": bool, "tuple": tuple, "list": list, "typing_extensions.Buffer": (bytes, bytearray)}
    if kind in simple:
        return isinstance(value, simple[kind])
    wanted = getattr(module, kind.rpartition(".")[2], None)
    return isinstance(value, wanted) if isinstance(wanted, type) else kind in ("", "...", "typing.Any")


def _accepts(overloads: list, arguments: tuple, named: dict, module: types.ModuleType) -> bool:
    for parameters in overloads:
        names = [name for name, _, _ in parameters]
        if len(arguments) > len(names) or not named.keys() <= set(names[len(arguments) :]):
            continue
        given = dict(zip(names, arguments, strict=False)) | named
        if all(name in given or not required for name, _, required in parameters) and all(
            _fits(given[name], kind, module) for name, kind, _ in parameters if name in given
        ):
            return True
    return False


def _enumeration(name: str, members: list[str]) -> type:
    def new(value: int, label: str) -> Any:
        made = object.__new__(kind)
        made.value, made.name = value, label
        return made

    kind = type(name, (), {"__int__": lambda self: self.value, "__index__": lambda self: self.value})
    kind.__members__ = {label: new(value, label) for value, label in enumerate(members)}  # type: ignore[attr-defined]
    for label, member in kind.__members__.items():  # type: ignore[attr-defined]
        setattr(kind, label, member)
    return kind


def _guarded(behaviour: type, spec: dict, module: types.ModuleType) -> type:
    """``behaviour`` behind the signatures of one class; names that start with ``_`` are the double's own."""
    methods, attributes = spec.get("methods", {}), spec.get("attributes", {})
    implemented = {n for n in vars(behaviour) if not n.startswith("_")}
    missing = implemented - methods.keys() - attributes.keys()
    name = behaviour.__name__.lstrip("_")

    class Guarded(behaviour):
        def __init__(self, *arguments, **named):
            internal = bool(arguments) and arguments[0] is _INSIDE
            if not internal and not _accepts(spec.get("init", []), arguments, named, module):
                raise TypeError(f"{name}{arguments}: incompatible constructor arguments")
            self.__dict__["_set"] = {}
            super().__init__(*arguments[internal:], **named)

        def __getattribute__(self, key):
            if key.startswith("_"):
                return object.__getattribute__(self, key)
            if key in methods and key not in missing:
                function = object.__getattribute__(self, key)

                def checked(*arguments, **named):
                    if not _accepts(methods[key], arguments, named, module):
                        raise TypeError(f"{name}.{key}{arguments}{named}: incompatible function arguments")
                    return function(*arguments, **named)

                return checked
            if key not in attributes:
                raise AttributeError(f"{name!r} object has no attribute {key!r}")
            given = object.__getattribute__(self, "_set")
            return given[key] if key in given else object.__getattribute__(self, key)

        def __setattr__(self, key, value):
            if key.startswith("_"):
                object.__setattr__(self, key, value)
            elif attributes.get(key) != "rw":
                raise AttributeError(f"{name!r}.{key} cannot be set")
            else:
                self._set[key] = value

    Guarded.__name__ = Guarded.__qualname__ = name
    return Guarded


_INSIDE = object()


def _inheritable(name: str, spec: dict) -> type:
    """A class that users derive from: what they override must exist, and they must call its ``__init__``."""
    methods = spec["methods"]

    def begin(self) -> None:
        self._ready = True

    def derive(cls) -> None:
        for key, value in vars(cls).items():
            if callable(value) and not key.startswith("_"):
                wanted = [p[0] for p in methods[key][0]]
                assert list(value.__code__.co_varnames[1 : value.__code__.co_argcount]) == wanted, key

    return type(name, (), {"__init__": begin, "__init_subclass__": classmethod(derive), "_ready": False})


def make(version: str, knobs: Knobs) -> Any:
    """The double of one version."""
    spec = signatures.load(version)
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = version
    for name, found in spec.items():
        if "members" in found and name not in ("ILogger", "Logger"):
            setattr(module, name, _enumeration(name, found["members"]))
    for name in ("IProfiler", "IProgressMonitor", "ILogger"):
        setattr(module, name, _inheritable(name, spec[name]))
    module.ILogger.Severity = module.Severity
    for behaviour in (
        *(_Builder, _IBuilderConfig, _INetworkDefinition, _OnnxParser, _ParserError, _ITensor, _ILayer, _Runtime),
        *(_ITimingCache, _IOptimizationProfile, _ICudaEngine, _IExecutionContext, _EngineInspector),
    ):
        name = behaviour.__name__.lstrip("_")
        own = type(name, (behaviour,), {"_trt": module, "_knobs": knobs, **vars(behaviour)})
        setattr(module, name, _guarded(own, spec[name], module))
    module.IHostMemory = type("IHostMemory", (bytes,), {})

    class Logger(module.ILogger):
        def __init__(self, min_severity=None):
            module.ILogger.__init__(self)

        def log(self, severity, msg):
            knobs.log.append(msg)

    def init_libnvinfer_plugins(logger, namespace):
        assert isinstance(logger, module.ILogger) and namespace == ""
        knobs.plugins = True
        return True

    module.Logger, module.init_libnvinfer_plugins = Logger, init_libnvinfer_plugins
    module._plugin = tensorrt_plugin.make(module) if hasattr(module, "QuickPluginCreationRequest") else None
    return module


# -- behaviour ---------------------------------------------------------------------------------------------------------


class _Builder:
    _trt: Any
    _knobs: Knobs

    def __init__(self, logger):
        assert logger._ready, "the logger's __init__ was not called"
        self._logger = logger

    @property
    def num_DLA_cores(self):
        return self._knobs.dla_cores

    def create_network(self, flags=0):
        self._knobs.network_flags = flags
        return self._trt.INetworkDefinition(_INSIDE)

    def create_builder_config(self):
        self._knobs.config = self._trt.IBuilderConfig(_INSIDE)
        return self._knobs.config

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile(_INSIDE)

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        assert monitor._ready
        monitor.phase_start("Building engine", None, 20)
        for step in range(20):
            if monitor.step_complete("Building engine", step) is not True:
                return None
        monitor.phase_finish("Building engine")
        dynamic = any(-1 in t._shape for t in network._inputs)
        assert dynamic == bool(config._profiles), "a dynamic input needs a profile"
        if self._knobs.build_error:
            self._logger.log(self._trt.Severity.ERROR, self._knobs.build_error)
            return None
        config._cache._content += b"measured;"
        built = [tensorrt_plugin.compiled(*one, network._model) for one in network._plugins]
        strong = 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        facts = {
            "version": self._trt.__version__,
            "profile": config._profiles[0]._shapes if config._profiles else {},
            "flags": sorted(config._flags),
            "strong": bool(self._knobs.network_flags & strong),
            "detailed": config.profiling_verbosity is self._trt.ProfilingVerbosity.DETAILED,
            "plugins": built,
        }
        text = json.dumps(facts).encode()
        return self._trt.IHostMemory(MAGIC + text + b"\n" + network._model.SerializeToString())


class _IBuilderConfig:
    _trt: Any
    _knobs: Knobs
    progress_monitor = None

    def __init__(self):
        self._flags, self._pools, self._profiles, self._cache = {"TF32"}, {}, [], None

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def clear_flag(self, flag):
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, pool_size):
        self._pools[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return 0

    def create_timing_cache(self, serialized_timing_cache):
        cache = self._trt.ITimingCache(_INSIDE)
        cache._content = serialized_timing_cache
        return cache

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return not self._knobs.reject_cache

    def get_timing_cache(self):
        return self._cache

    def can_run_on_DLA(self, layer):
        return layer._node.op_type in self._knobs.dla_ops


class _ITimingCache:
    _trt: Any
    _content = b""

    def serialize(self):
        return self._trt.IHostMemory(self._content)


class _IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._shapes[input] = [list(min), list(opt), list(max)]


class _ITensor:
    def __init__(self, name, shape):
        self._name, self._shape = name, shape

    @property
    def name(self):
        return self._name

    @property
    def shape(self):
        return self._shape


class _ILayer:
    def __init__(self, node):
        self._node = node


class _INetworkDefinition:
    _trt: Any
    _model: onnx.ModelProto
    _inputs: Any = ()

    def __init__(self):
        self._plugins = []

    def _take(self, model: onnx.ModelProto) -> None:
        self._model = model
        weights = {w.name for w in model.graph.initializer}
        self._inputs = [
            self._trt.ITensor(
                _INSIDE,
                i.name,
                tuple(d.dim_value if d.HasField("dim_value") else -1 for d in i.type.tensor_type.shape.dim),
            )
            for i in model.graph.input
            if i.name not in weights
        ]

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, index):
        return self._inputs[index]

    @property
    def num_layers(self):
        return len(self._model.graph.node)

    def get_layer(self, index):
        return self._trt.ILayer(_INSIDE, self._model.graph.node[index])


class _OnnxParser:
    _trt: Any
    _knobs: Knobs

    def __init__(self, network, logger):
        assert self._knobs.plugins, "some operators are plugins"
        self._network, self._errors = network, []

    def parse_from_file(self, model):
        proto = onnx.load(model)
        names = [n.name for n in proto.graph.node]
        assert all(names) and len(set(names)) == len(names), "TensorRT names layers after nodes"
        self._errors = [
            self._trt.ParserError(_INSIDE, node, why)
            for node in proto.graph.node
            if (why := self._refusal(proto, node))
        ]
        self._network._take(proto)
        return not self._errors

    def _refusal(self, model, node):
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        space = given.get("plugin_namespace", b"").decode()
        if space and self._trt._plugin is not None and given.get("aot") == 1:
            known = self._trt._plugin._registry.get(f"{space}::{node.op_type}")
            if known is not None:  # a plugin goes before a local function
                self._network._plugins.append((known, node, given))
                return ""
        bodies = [n for f in model.functions if (f.domain, f.name) == (node.domain, node.op_type) for n in f.node]
        lacking = [n.op_type for n in bodies if n.op_type in ("BitShift", "Range")]
        return f"no importer registered for op {lacking[0]}" if lacking else self._knobs.refuse.get(node.op_type, "")

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


class _ParserError:
    def __init__(self, node, why):
        self._node, self._why = node, why

    def desc(self):
        return self._why

    def node_name(self):
        return self._node.name

    def node_operator(self):
        return self._node.op_type


class _Runtime:
    _trt: Any
    _knobs: Knobs

    def __init__(self, logger):
        self._logger = logger

    @property
    def num_DLA_cores(self):
        return self._knobs.dla_cores

    def deserialize_cuda_engine(self, serialized_engine):
        assert self._knobs.plugins, "some layers are plugins"
        self._knobs.deserialised += 1
        if not serialized_engine.startswith(MAGIC):
            self._logger.log(self._trt.Severity.ERROR, "magic tag does not match")
            return None
        text, _, model = serialized_engine[len(MAGIC) :].partition(b"\n")
        return self._trt.ICudaEngine(_INSIDE, json.loads(text), onnx.load(io.BytesIO(model)), self._logger)


class _ICudaEngine:
    _trt: Any
    _knobs: Knobs

    def __init__(self, facts, model, logger):
        self._facts, self._model, self._logger = facts, model, logger
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        # TensorRT promises no order of its tensors.
        self._outputs = {o.name: o for o in reversed(self._session.get_outputs())}

    @property
    def num_io_tensors(self):
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index):
        return [*self._outputs, *self._inputs][index]

    def get_tensor_mode(self, name):
        return self._trt.TensorIOMode.INPUT if name in self._inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name):
        return self._trt.TensorLocation.HOST if name in self._knobs.host else self._trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name):
        return getattr(self._trt.DataType, _TYPES[(self._inputs | self._outputs)[name].type][0])

    def get_tensor_profile_shape(self, name, profile_index):
        fixed = self._inputs[name].shape
        return [tuple(s) for s in self._facts["profile"].get(name, [fixed, fixed, fixed])]

    def get_weight_streaming_automatic_budget(self):
        return 12345

    def create_execution_context(self):
        return None if self._knobs.context_error else self._trt.IExecutionContext(_INSIDE, self)

    def create_engine_inspector(self):
        return self._trt.EngineInspector(_INSIDE, self)


class _EngineInspector:
    _trt: Any

    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, format):
        assert format is self._trt.LayerInformationFormat.JSON
        names = [n.name for n in self._engine._model.graph.node]
        if not self._engine._facts["detailed"]:
            return json.dumps({"Layers": names, "Bindings": []})
        layers = [
            {"Name": f"{n.name}_kernel", "LayerType": n.op_type, "Metadata": f"[ONNX Layer: {n.name}]"}
            for n in self._engine._model.graph.node
        ]
        ends = [*self._engine._inputs, *self._engine._outputs]
        if hasattr(self._trt.BuilderFlag, "FP16"):
            return json.dumps({"Layers": layers, "Bindings": ends})
        return json.dumps({"Layers": layers, "I/O Tensors": [{"Name": n, "Format": "Row major"} for n in ends]})


class _IExecutionContext:
    _trt: Any
    _knobs: Knobs
    profiler = None

    def __init__(self, engine):
        self._engine, self._shapes, self._addresses, self._ran = engine, {}, {}, False

    def set_input_shape(self, name, shape):
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self):
        return [n for n in self._engine._inputs if n not in self._shapes]

    def get_tensor_shape(self, name):
        zeros = {n: np.zeros(s, self._dtype(n)) for n, s in self._shapes.items()}
        zeros |= {n: self._host(n) for n in self._knobs.host}
        return self._engine._session.run([name], zeros)[0].shape

    def _host(self, name):
        kind, shape = self._dtype(name), self._shapes[name]
        content = ctypes.string_at(self._addresses[name], int(np.prod(shape)) * kind.itemsize)
        return np.frombuffer(content, kind).reshape(shape)

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return True

    def _dtype(self, name):
        return np.dtype(dict(_TYPES.values())[self._engine.get_tensor_dtype(name).name])

    def execute_async_v3(self, stream_handle):
        device, session = STREAMS[stream_handle], self._engine._session
        if self._knobs.run_error or (device.capturing and (self.profiler is not None or not self._ran)):
            self._engine._logger.log(self._trt.Severity.ERROR, "cannot execute")
            return False
        addresses = dict(self._addresses)
        assert addresses.keys() == {*self._engine._inputs, *self._engine._outputs}

        def work() -> None:
            feeds = {}
            for name, shape in self._shapes.items():
                if name in self._knobs.host:
                    feeds[name] = self._host(name)
                    continue
                kind = self._dtype(name)
                size = int(np.prod(shape)) * kind.itemsize
                feeds[name] = device.memory(addresses[name], size).view(kind).reshape(shape).copy()
            names = list(self._engine._outputs)
            for name, value in zip(names, session.run(names, feeds), strict=True):
                content = np.frombuffer(value.tobytes(), np.uint8)
                ctypes.memmove(addresses[name], content.ctypes.data, content.nbytes)
                device.memory(addresses[name], content.nbytes)
            if self.profiler is not None:
                for index, node in enumerate(self._engine._model.graph.node):
                    self.profiler.report_layer_time(f"{node.name}_kernel", 0.5 + index)

        device.enqueue(work)
        self._ran = True
        return True
