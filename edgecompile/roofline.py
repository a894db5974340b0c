"""How fast this machine could go, measured, and how much of a layer's time that does not explain.

The roofline of Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009): a kernel takes at least as
long as its multiply-accumulates need at the peak rate, and at least as long as its bytes need at the peak bandwidth.

Both peaks are the best of several kernels at several sizes, run here. No kernel reaches what the hardware could do, so
each is a lower bound of the true peak, and a share of the roofline is an upper bound of the share of the true peak; a
layer that uses an instruction which none of these kernels uses can exceed 100 %.

- Multiply-accumulates: matrix products through NumPy's BLAS, and MatMul and Conv through ONNX Runtime where it is
  installed; 8-bit ones through ONNX Runtime alone.
- Bandwidth: the Add kernel of STREAM (McCalpin 1995: two arrays read, one written, the line fetched for the write not
  counted) and a dot product (two arrays read), at sizes that fit each level of cache from the second on, and far beyond
  the last. The first level is left out: there NumPy's own call takes longer than the work.

One thread is timed with its CPU time, which others on the machine do not change; several threads with the wall clock.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import platformdirs
from onnx import TensorProto, helper

from edgecompile import documents, measure, report, stats
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.files import write_atomic
from edgecompile.graph import Graph
from edgecompile.target import LayerTime

SCHEMA = "edgecompile.roofline/1"
_UNSTABLE = ("load", "python", "memory_bytes")  # facts about the machine on which no peak depends
_SECONDS = 0.15  # for each kernel and size
_PRODUCTS = (384, 768, 1536)  # rows, columns and depth of square matrix products
_CONVOLUTIONS = ((128, 56, 3), (256, 28, 3), (512, 28, 1))  # channels in and out, height and width, kernel
_LARGEST = 1 << 29  # bytes of arrays for the bandwidth of memory
_NO_CACHE_KNOWN = 1 << 25


@dataclass(frozen=True)
class Level:
    """A level of memory.

    Attributes:
        name: ``L2``, ``L3`` or ``memory``.
        capacity: bytes that all threads together can keep in it; None for memory.
        bytes_per_s: read and written by all threads together.
    """

    name: str
    capacity: int | None
    bytes_per_s: float


@dataclass(frozen=True)
class Roofline:
    """Peaks of a machine, for a number of threads.

    Attributes:
        threads: how many.
        macs_per_s: multiply-accumulates of 32-bit floats per second.
        macs_from: the kernel that reached it.
        int8_macs_per_s: multiply-accumulates of 8-bit integers; None if no runtime here has them.
        int8_from: the kernel that reached it, or ``""``.
        levels: smallest first; the last is memory.
    """

    threads: int
    macs_per_s: float
    macs_from: str
    int8_macs_per_s: float | None
    int8_from: str
    levels: tuple[Level, ...]

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bandwidth of memory."""
        return self.levels[-1].bytes_per_s

    def level(self, working_set: float | None) -> Level:
        """The smallest level that holds ``working_set`` bytes; memory if that is None."""
        fits = (x for x in self.levels[:-1] if working_set is not None and working_set <= (x.capacity or 0))
        return next(fits, self.levels[-1])

    def compute(self, macs: float, int8: bool = False) -> float:
        """Least time in seconds for so many multiply-accumulates."""
        return macs / ((self.int8_macs_per_s if int8 else None) or self.macs_per_s)

    def transfer(self, size: float, working_set: float | None = None) -> float:
        """Least time in seconds to move ``size`` bytes that lie where ``working_set`` bytes fit."""
        return size / self.level(working_set).bytes_per_s

    def bound(self, macs: float, size: float, *, working_set: float | None = None, int8: bool = False) -> float:
        """Least time in seconds for ``macs`` multiply-accumulates on ``size`` bytes, which overlap.

        Args:
            macs: multiply-accumulates.
            size: bytes read and written.
            working_set: bytes that must stay near for these to be found there; None: they come from memory.
            int8: whether they are multiply-accumulates of 8-bit integers.
        """
        return max(self.compute(macs, int8), self.transfer(size, working_set))


# -- measured once -----------------------------------------------------------------------------------------------------


def measured(threads: int, *, fresh: bool = False) -> Roofline:
    """The roofline of this machine; measured in a child process the first time (some seconds), then kept.

    It is kept in the user's cache folder (or ``EDGECOMPILE_CACHE``) under a digest of what it depends on: CPU,
    features, affinity, governor, versions of the kernels. A file whose digest does not match its content is measured
    again. Measure on a quiet machine: several threads are timed with the wall clock.

    Args:
        threads: CPU threads to use.
        fresh: measure again.

    Raises:
        EnvironmentMissing: ``threads`` is below 1 (the engine does not run on the CPU), or the measurement failed.
    """
    if threads < 1:
        raise EnvironmentMissing(
            "the roofline of this device cannot be measured", "the engine does not run on the CPU", "leave out --layers"
        )
    facts = _facts(threads)
    path = _cache() / f"{_digest(facts)[:32]}.json"
    found = None if fresh else _kept(path, facts)
    if found is None:
        found = decode(json.loads(fresh_process("edgecompile.roofline", str(threads), threads=threads)))
        content = {"schema": SCHEMA, "facts": facts, "roofline": documents.encode(found, {})}
        with suppress(InputError, OSError):  # where nothing can be kept, it is measured every time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, [json.dumps(content | {"sha256": _digest(content)}, indent=1).encode()])
    return found


def decode(document: Mapping[str, Any]) -> Roofline:
    """A roofline from its JSON form.

    Raises:
        documents.Malformed: it is something else.
    """
    return documents.decode(Roofline, document, "roofline", {})


def _kept(path: Path, facts: Mapping[str, Any]) -> Roofline | None:
    try:
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
        whole = content["schema"] == SCHEMA and content["facts"] == facts and digest == _digest(content)
        return decode(content["roofline"]) if whole else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # Malformed is a ValueError
        return None


def _cache() -> Path:
    return Path(os.environ.get("EDGECOMPILE_CACHE") or platformdirs.user_cache_dir("edgecompile")) / "roofline"


def _facts(threads: int) -> dict[str, Any]:
    """What the peaks depend on."""
    facts = {k: v for k, v in measure.machine().items() if k not in _UNSTABLE}
    for package in ("numpy", "onnxruntime"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts | {"threads": threads}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fresh_process(module: str, *arguments: str, threads: int | None = None, timeout: float = 600) -> str:
    """Call ``main(*arguments)`` of a module in a new Python; what it prints.

    Args:
        module: its dotted name.
        arguments: of its ``main``.
        threads: size of the thread pools of BLAS and OpenMP, which read it when they are loaded.
        timeout: in seconds.

    Raises:
        EnvironmentMissing: it fails or takes too long; with the last line that it wrote.
    """
    # The working directory, which comes first, could hide a package by a folder of its name: it goes last.
    code = f"import sys; sys.path.append(sys.path.pop(0)); from {module} import main; main(*sys.argv[1:])"
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    environment = dict(os.environ) | ({name: str(threads) for name in pools} if threads else {})
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentMissing(f"{module} did not finish", f"it took more than {timeout:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EnvironmentMissing("a measurement in a process of its own failed", last)
    return done.stdout


def main(threads: str) -> None:
    """Measure, and print the roofline as JSON."""
    print(json.dumps(documents.encode(_measure(int(threads)), {})))


def _measure(threads: int) -> Roofline:
    best: dict[bool, tuple[float, str]] = {}
    for name, int8, macs, call in _kernels(threads):
        rate = macs / _best(call, threads)
        best[int8] = max(best.get(int8, (0.0, "")), (rate, name))
    int8_rate, int8_name = best.get(True, (None, ""))
    return Roofline(threads, *best[False], int8_rate, int8_name, tuple(_levels(threads)))


def _best(call: Callable[[], object], threads: int) -> float:
    """The shortest duration of a call, in seconds; what is added to it comes from others."""
    now = time.thread_time if threads == 1 else time.perf_counter
    call()
    found, end = math.inf, time.perf_counter() + _SECONDS
    while True:
        start = now()
        call()
        found = min(found, now() - start)
        if time.perf_counter() >= end:
            return max(found, 1e-9)


# -- kernels -----------------------------------------------------------------------------------------------------------


def _kernels(threads: int) -> Iterator[tuple[str, bool, int, Callable[[], object]]]:
    """Kernels that can be run here: name, whether on 8-bit integers, multiply-accumulates of a call, the call."""
    rng = np.random.default_rng(0)
    for n in _PRODUCTS:
        a, b = (rng.standard_normal((n, n), np.float32) for _ in range(2))
        out = np.empty((n, n), np.float32)
        yield f"NumPy matmul {n}", False, n**3, lambda a=a, b=b, out=out: np.matmul(a, b, out=out)
    try:
        import onnxruntime as ort
    except ImportError:
        return
    ort.set_default_logger_severity(4)
    for int8 in (False, True):
        for name, macs, model, feed in _models(int8):
            call = _session(ort, model, feed, threads)
            if call is not None:
                yield f"ONNX Runtime {name}", int8, macs, call


def _models(int8: bool) -> Iterator[tuple[str, int, onnx.ModelProto, np.ndarray]]:
    """Models of one operator with constant weights: name, multiply-accumulates, model, input."""
    for n in _PRODUCTS:
        shape = (n, n)
        if int8:
            nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
        else:
            nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        yield _one_operator("MatMulInteger" if int8 else "MatMul", f"{n}", n**3, nodes, shape, shape, int8)
    for channels, side, kernel in _CONVOLUTIONS:
        pads = [kernel // 2] * 4
        if int8:
            scales = ["x", "one", "zx", "w", "one", "zw", "big", "zx"]
            nodes = [helper.make_node("QLinearConv", scales, ["y"], pads=pads)]
        else:
            nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=pads)]
        macs = (channels * side * kernel) ** 2
        given, weights = (1, channels, side, side), (channels, channels, kernel, kernel)
        size = f"{kernel}x{kernel} on {channels}x{side}x{side}"
        yield _one_operator("QLinearConv" if int8 else "Conv", size, macs, nodes, given, weights, int8)


def _one_operator(
    op: str, size: str, macs: int, nodes: list, given: tuple[int, ...], weights: tuple[int, ...], int8: bool
) -> tuple[str, int, onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(0)
    if int8:
        x, w = rng.integers(0, 255, given).astype(np.uint8), rng.integers(-127, 127, weights).astype(np.int8)
    else:
        x, w = rng.standard_normal(given, np.float32), rng.standard_normal(weights, np.float32)
    constants = {
        "w": w, "one": np.float32(1), "big": np.float32(1e5), "zx": np.uint8(0), "zw": np.int8(0)
    }  # fmt: skip
    used = [onnx.numpy_helper.from_array(np.asarray(constants[n]), n) for n in constants if n in nodes[0].input]
    kinds = {"MatMulInteger": TensorProto.INT32, "QLinearConv": TensorProto.UINT8}
    graph = helper.make_graph(
        nodes, op,
        [helper.make_tensor_value_info("x", TensorProto.UINT8 if int8 else TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", kinds.get(op, TensorProto.FLOAT), None)],
        used,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return f"{op} {size}", macs, model, x


def _session(ort, model: onnx.ModelProto, feed: np.ndarray, threads: int) -> Callable[[], object] | None:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_cpu_input("x", feed)
        binding.bind_output("y", "cpu")
        session.run_with_iobinding(binding)
    except Exception:  # this build has no such kernel
        return None
    return lambda: session.run_with_iobinding(binding)


def _levels(threads: int) -> Iterator[Level]:
    """The levels, each at half its capacity; a nearer level is never slower than a farther one."""
    caches = _caches(threads)
    last = max([size for _, size in caches], default=_NO_CACHE_KNOWN)
    places: list[tuple[str, int | None, int]] = [(name, size, size // 2) for name, size in caches]
    places.append(("memory", None, max(min(8 * last, _LARGEST), 4 * last)))
    rates = [_bandwidth(size, threads) for _, _, size in places]
    for number, (name, capacity, _) in enumerate(places):
        yield Level(name, capacity, max(rates[number:]))


def _caches(threads: int) -> list[tuple[str, int]]:
    """Name of each data cache from the second level on, and the bytes of it that ``threads`` threads have."""
    found: dict[int, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError, ValueError):
            facts = {n: (folder / n).read_text().strip() for n in ("level", "type", "size", "shared_cpu_list")}
            if facts["type"] != "Instruction" and int(facts["level"]) >= 2:
                private = facts["shared_cpu_list"].isdigit()
                found[int(facts["level"])] = int(facts["size"].rstrip("K")) * 1024 * (threads if private else 1)
    return [(f"L{level}", size) for level, size in sorted(found.items())]


def _bandwidth(size: int, threads: int) -> float:
    """Bytes per second that ``threads`` threads move together, in arrays of ``size`` bytes in all."""
    n = max(size // 12, 1024 * threads) // threads * threads
    a, b, c = (np.ones(n, np.float32) for _ in range(3))
    parts = list(zip(*(np.split(x, threads) for x in (a, b, c)), strict=True))
    repeats = max(1, (1 << 20) // (n * 4))  # of a call that is short against starting the threads

    def add(part: Sequence[np.ndarray]) -> None:
        for _ in range(repeats):
            np.add(part[0], part[1], out=part[2])

    def dot() -> None:  # BLAS has threads of its own
        for _ in range(repeats):
            np.dot(a, b)

    with ThreadPoolExecutor(threads) as pool:
        add_all = (lambda: add(parts[0])) if threads == 1 else (lambda: list(pool.map(add, parts)))
        return max(touched * 4 * n * repeats / _best(call, threads) for call, touched in ((add_all, 3), (dot, 2)))


# -- layers ------------------------------------------------------------------------------------------------------------

_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Dropout"}  # move no data
_READ_PART = {"Gather", "GatherElements", "GatherND", "Slice"}  # of their first input


@dataclass(frozen=True)
class LayerCost:
    """What a layer took, and what physics says it had to take. Times in seconds.

    Attributes:
        name: the engine's own name for it.
        op: kind of kernel or operator.
        modules: torch module paths.
        seconds: measured.
        macs: multiply-accumulates.
        weight_bytes: constants read.
        activation_bytes: inputs and outputs of the fused layer; what stays inside it is not counted.
        compute: least time for the multiply-accumulates.
        transfer: least time for the bytes.
    """

    name: str
    op: str
    modules: tuple[str, ...]
    seconds: float
    macs: int
    weight_bytes: int
    activation_bytes: int
    compute: float
    transfer: float

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.weight_bytes + self.activation_bytes

    @property
    def bound(self) -> float:
        """The roofline's time: arithmetic and transfer overlap."""
        return max(self.compute, self.transfer)

    @property
    def gap(self) -> float:
        """What physics does not need; negative if the layer beats the kernels that the roofline was measured with."""
        return self.seconds - self.bound

    @property
    def intensity(self) -> float:
        """Multiply-accumulates per byte."""
        return self.macs / self.bytes if self.bytes else 0.0

    @property
    def efficiency(self) -> float:
        """Share of the roofline."""
        return self.bound / self.seconds if self.seconds > 0 else 0.0

    @property
    def limit(self) -> str:
        """What bounds it: ``compute``, ``memory``, or ``nothing`` if it has no work of its own."""
        if not self.bound:
            return "nothing"
        return "compute" if self.compute >= self.transfer else "memory"


@dataclass(frozen=True)
class ModuleCost:
    """Totals of the layers of one torch module; see :class:`LayerCost`. Times in seconds.

    ``gap`` sums the layers' gaps that are positive, ``bound`` is the rest of ``seconds``.
    """

    path: str
    layers: int
    seconds: float
    macs: int
    bytes: int
    bound: float
    gap: float

    @property
    def intensity(self) -> float:
        """Multiply-accumulates per byte."""
        return self.macs / self.bytes if self.bytes else 0.0

    @property
    def efficiency(self) -> float:
        """Share of the roofline."""
        return self.bound / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class LayerTable:
    """Layers of an engine against the roofline, the largest gap first.

    Attributes:
        roofline: of the machine; None where it is not known: then no bound is, and all of the time is gap.
        layers: by gap.
        modules: by gap.
        unknown: tensors whose size is unknown; without them the bounds are lower than they could be.
    """

    roofline: Roofline | None
    layers: tuple[LayerCost, ...]
    modules: tuple[ModuleCost, ...]
    unknown: int = 0

    @property
    def seconds(self) -> float:
        """Measured, all layers."""
        return math.fsum(x.seconds for x in self.layers)

    @property
    def gap(self) -> float:
        """What physics does not need, over the layers that have a gap."""
        return math.fsum(max(x.gap, 0.0) for x in self.layers)


def layer_table(
    layers: Sequence[LayerTime], graph: Graph, roofline: Roofline | None, feeds: Mapping[str, np.ndarray] | None = None
) -> LayerTable:
    """Set the layers of an engine against the roofline.

    The work of a node counts once: where several layers stand for it (a convolution and the change of layout before
    it), for the one whose operator it is, else the longest. The others then have no work of their own, and all of
    their time is gap. A layer's activations are taken to lie in the smallest cache that holds them; its weights in the
    smallest that holds the weights of the whole model, since all of those pass by between two uses of one.

    Args:
        layers: as :meth:`edgecompile.target.Engine.layers` returns them.
        graph: the graph that was given to ``build``, whose nodes they name.
        roofline: of the machine that they were measured on; None if it is not known.
        feeds: the inputs that they were measured with; without them, a batch of one.
    """
    shaped = stats.shaped(graph, feeds)
    macs = stats.node_macs(shaped, feeds)
    of_name: dict[str, list[int]] = {}
    for number, node in enumerate(shaped.nodes):
        of_name.setdefault(node.name or node.outputs[0].name, []).append(number)
    own = _owned(layers, shaped, of_name)
    weights = sum(t.values.nbytes for t in _constants(shaped.nodes))
    outputs = {id(t) for t in shaped.outputs}
    costs, unknown = [], set()
    for layer, numbers in zip(layers, own, strict=True):
        nodes = [shaped.nodes[i] for i in numbers]
        moved = _moved(nodes, outputs)
        unknown.update(moved.unknown)
        work = sum(macs[i] or 0 for i in numbers)
        compute = transfer = 0.0
        if roofline is not None:
            compute = roofline.compute(work, moved.int8)
            transfer = roofline.transfer(moved.weights, weights)
            transfer += roofline.transfer(moved.activations, moved.activations)
        costs.append(
            LayerCost(
                layer.name, layer.op, layer.modules, layer.microseconds / 1e6, work, moved.weights, moved.activations,
                compute, transfer,
            )
        )  # fmt: skip
    cost_of = {id(layer): cost for layer, cost in zip(layers, costs, strict=True)}
    modules = [_module(m.path, [cost_of[id(x)] for x in m.layers]) for m in report.by_module(layers)]
    return LayerTable(
        roofline,
        tuple(sorted(costs, key=lambda cost: -cost.gap)),
        tuple(sorted(modules, key=lambda module: -module.gap)),
        len(unknown),
    )


def _module(path: str, costs: Sequence[LayerCost]) -> ModuleCost:
    seconds, gap = math.fsum(c.seconds for c in costs), math.fsum(max(c.gap, 0.0) for c in costs)
    return ModuleCost(
        path, len(costs), seconds, sum(c.macs for c in costs), sum(c.bytes for c in costs), seconds - gap, gap
    )


def _owned(layers: Sequence[LayerTime], graph: Graph, of_name: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """The numbers of the nodes whose work each layer does."""
    claims: dict[int, tuple[bool, float, int]] = {}
    for number, layer in enumerate(layers):
        for node in (n for name in layer.nodes for n in of_name.get(name, ())):
            claim = (graph.nodes[node].op in layer.op, layer.microseconds, -number)
            claims[node] = max(claims.get(node, claim), claim)
    own: list[list[int]] = [[] for _ in layers]
    for node in sorted(claims):
        own[-claims[node][2]].append(node)
    return own


@dataclass(frozen=True)
class _Moved:
    """Bytes that pass the border of a fused layer, the tensors whose size is unknown, and the kind of its inputs."""

    weights: int
    activations: int
    unknown: frozenset[str]
    int8: bool


def _moved(nodes: Sequence[gs.Node], outputs: set[int]) -> _Moved:
    working = [n for n in nodes if n.op not in _VIEWS or n.domain]
    members = {id(n) for n in nodes}
    made = {id(t) for n in nodes for t in n.outputs}
    read: dict[int, gs.Variable] = {}
    size: dict[int, int | None] = {}
    for node in working:
        for position, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) or tensor.is_empty() or id(tensor) in made:
                continue
            whole = _size(tensor)
            if position == 0 and node.op in _READ_PART:
                parts = _size(node.outputs[0])
                whole = None if whole is None or parts is None else min(whole, parts)
            read[id(tensor)] = tensor
            size[id(tensor)] = whole
    written = {
        id(t): t
        for n in nodes
        for t in n.outputs
        if working and not t.is_empty() and (id(t) in outputs or any(id(c) not in members for c in t.outputs))
    }
    size |= {key: _size(t) for key, t in written.items()}
    known = {**read, **written}
    return _Moved(
        sum(_constant_part(t, working) for t in _constants(working)),
        sum(s or 0 for s in size.values()),
        frozenset(known[key].name for key, s in size.items() if s is None),
        any(_is_int8(t) for t in read.values()),
    )


def _constants(nodes: Iterable[gs.Node]) -> list[gs.Constant]:
    return list({id(t): t for n in nodes for t in n.inputs if isinstance(t, gs.Constant)}.values())


def _constant_part(tensor: gs.Constant, nodes: Sequence[gs.Node]) -> int:
    """Bytes of a constant that are read: of a table, only the rows that are looked up."""
    readers = [n for n in nodes if any(t is tensor for t in n.inputs)]
    looked_up = [_size(n.outputs[0]) for n in readers if n.op in _READ_PART and n.inputs[0] is tensor]
    nbytes = tensor.values.nbytes
    return min(nbytes, sum(s or 0 for s in looked_up)) if len(looked_up) == len(readers) else nbytes


def _dtype(tensor: gs.Tensor) -> np.dtype | None:
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, int):
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)) if tensor.dtype else None
    return np.dtype(tensor.dtype)


def _size(tensor: gs.Tensor) -> int | None:
    """Bytes of a tensor, None if its type or shape is unknown."""
    dtype, shape = _dtype(tensor), tensor.shape
    if dtype is None or shape is None or not all(isinstance(d, (int, np.integer)) for d in shape):
        return None
    return math.prod(int(d) for d in shape) * dtype.itemsize


def _is_int8(tensor: gs.Tensor) -> bool:
    dtype = _dtype(tensor)
    return dtype is not None and dtype.kind in "iu" and dtype.itemsize == 1
