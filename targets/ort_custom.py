"""Coded weights and angular attention in ONNX Runtime by kernels of our own, as custom operators.

The bundle's ``model.onnx`` keeps the operators of domain ``ai.edgecompile`` and their function bodies. In the model
that the engine runs, a node whose kernel is used becomes one of domain ``ai.edgecompile.ort``, with constants packed
for the kernel. Under its own name ONNX Runtime would find the kernel too, as it inlines a function only where there is
none; but then codes would be packed anew by every session, and held twice.

The kernels (``ort_ops/shift_add.cpp``) are compiled when the engine is built, with the compiler of this machine and for
the instruction sets that the manifest names; :func:`edgecompile.targets.ort_session.check` compares these with the CPU
before the library is loaded. Of the two ways to add an operator that install from packages, a library that is compiled
costs a call 0.2 us over ONNX Runtime's own operators; onnxruntime-extensions has no compiled operators but its own, and
those written in Python cost an interpreter's call and its lock. No package holds ONNX Runtime's headers, hence
``ort_ops/ort_api.h``.

A kernel replaces the function body only where it was measured to be faster, layer by layer and then in the whole model.

- *Float activations*: codes are looked up in a register and multiplied in float32, which is the body's result up to the
  order of the sum. A book of up to 16 levels is one table for all rows, which lie in the lanes of a vector, and the sum
  of a group meets its scale at the end. Binary codes have a table for each row and group, so columns lie in the lanes.
  Codes of eight bits are a power of two, whose exponent is written into a float32, or the sum of two.
- *Integer activations* (``activations=int8``), of such a book: each token ``x`` becomes ``round(x / s)`` with
  ``s = max|x| / 127``, and levels that are whole numbers times a power of two are looked up by bytes and multiplied as
  such. The sum of a group is exact; what is rounded is ``x``.
- *Angular attention*: of every four rows that may be added, the 16 possible sums are formed once and looked up.

Sources: ONNX Runtime documentation, "Custom operators"; onnxruntime_c_api.h; Arlazarov et al., "On economical
construction of the transitive closure of a directed graph", Soviet Math. Doklady 1970 (sums of four rows).
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from edgecompile import measure, oracle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.functions import CODED, drop_uncalled
from edgecompile.functions import DOMAIN as SOURCE
from edgecompile.graph import Graph, where
from edgecompile.targets import ort_session
from edgecompile.targets.ort_session import OPS, Options
from edgecompile.targets.tvm.schedules import shift_add as layouts
from edgecompile.targets.tvm.shift_add import ANGULAR, Weights, read

DOMAIN = "ai.edgecompile.ort"
_SOURCE = Path(__file__).parent / "ort_ops" / "shift_add.cpp"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi", "-s")
# Features of the CPU, as Linux names them -> flags. Those that are not here are not used.
_FEATURES = {
    **{f: f"-m{f}" for f in ("avx", "avx2", "fma", "avx512f", "avx512bw")},
    "avx512_vnni": "-mavx512vnni",
    "avx_vnni": "-mavxvnni",
}
# As kVectors, Integers::kRaised and kRows of the kernels.
_VECTORS, _RAISED, _TILE = 4, 64, 4
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which of eight columns each four bits of a word hold: low halves of its bytes first
_MOST_SIGNS = 4  # scales of a group of binary codes; shorter codes have scales of 0
_BINARY, _POWER, _TWO_POWERS, _LIST = range(4)  # as Kind of the kernels
_GAIN = 1.05  # that a kernel must show, at the least favourable end of the interval
_SECONDS = 0.3  # of measuring each arm


class Unfit(Exception):
    """No kernel computes this node; the text says why."""


@dataclass(frozen=True, eq=False)
class Lowered:
    """A node as a kernel computes it.

    Attributes:
        op: the operator of :data:`DOMAIN`.
        constants: its inputs after those that are kept, by name.
        attributes: its attributes.
        said: what it is computed by, for people.
        kept: how many inputs of the node stay as they are.
    """

    op: str
    constants: Mapping[str, np.ndarray]
    attributes: Mapping[str, int]
    said: str
    kept: int = 1


# -- the compiler ------------------------------------------------------------------------------------------------------


def compiler() -> str | None:
    """The C++ compiler of this machine, None if there is none."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def lanes(device: str) -> int:
    """Float32 values in a vector of the kernels for a CPU, which :func:`edgecompile.targets.ort_session.cpu` names."""
    return 16 if "avx512f" in device.split() else 8


@functools.cache
def library(path: str, device: str) -> bytes:
    """The compiled kernels.

    Args:
        path: of the compiler.
        device: the CPU, as :func:`edgecompile.targets.ort_session.cpu` names it.

    Raises:
        EnvironmentMissing: the compiler fails.
    """
    flags = [_FEATURES[f] for f in device.split() if f in _FEATURES]
    with tempfile.TemporaryDirectory(prefix="edgecompile.") as scratch:
        made = Path(scratch) / OPS
        command = [path, *_FLAGS, *flags, f"-DLANES={lanes(device)}", "-o", str(made), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise EnvironmentMissing(
                f"{path} cannot compile the kernels", why.strip(), "install g++ 11 or newer, or give custom_ops=no"
            )
        return made.read_bytes()


# -- what a kernel reads -----------------------------------------------------------------------------------------------


def _filled(values: np.ndarray, *multiples: int) -> np.ndarray:
    """Zeros after the end of each axis, up to a multiple."""
    return np.pad(values, [(0, -size % of) for size, of in zip(values.shape, multiples, strict=True)])


def words(codes: np.ndarray, count: int, lane_count: int) -> np.ndarray:
    """Codes as the kernels read them, int32 ``[rows / 4, columns / (count lanes), 4, lanes]``.

    Step j of a word of lane i is the code of column ``count lanes b + lanes j + i``, b being the number of the word.

    Args:
        codes: uint8 ``[rows, columns]``.
        count: codes of a word, 8 of four bits or 4 of eight.
        lane_count: lanes of a vector.
    """
    wide = _filled(codes, _TILE, count * lane_count)
    steps = wide.reshape(len(wide) // _TILE, _TILE, -1, count, lane_count)
    packed = np.zeros((*steps.shape[:3], lane_count), np.uint32)
    for j in range(count):
        packed |= steps[:, :, :, j].astype(np.uint32) << np.uint32(32 // count * j)
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).view(np.int32)


def _scales(scales: np.ndarray) -> np.ndarray:
    """``[rows, groups, n]`` as ``[rows / 4, groups, 4, n]``."""
    wide = _filled(scales, _TILE, 1, 1)
    return np.ascontiguousarray(wide.reshape(-1, _TILE, *wide.shape[1:]).transpose(0, 2, 1, 3), np.float32)


def _powers(levels: np.ndarray) -> np.ndarray | None:
    """Bytes of sign and exponent for levels that are 0 or ``±2^e`` with e from -126 to 0; None for any other."""
    bits = levels.view(np.uint32)
    exponent, rest = bits >> 23 & 0xFF, bits & 0x7FFFFF
    if rest.any() or (exponent > 127).any():
        return None
    return (bits >> 24 & 0x80 | exponent).astype(np.uint8)


def _two_powers(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Bytes of sign and two numbers for levels ``±(a + b)``, and the tables of a and b, ``[2, 16]``."""
    first = np.array([0, *(2.0**-i for i in range(1, 16))], np.float32)
    second = np.array([0, *(2.0**-i for i in range(1, 8))], np.float32)
    number = {float(a + b): 16 * j + i for j, b in enumerate(second) for i, a in enumerate(first)}
    if any(float(size) not in number for size in np.abs(levels)):
        return None
    byte = [number[float(abs(level))] | (128 if np.signbit(level) else 0) for level in levels]
    return np.array(byte, np.uint8), np.stack([first, np.tile(second, 2)])


def _check_groups(weights: Weights, of: int) -> None:
    if weights.group < weights.codes.shape[1] and weights.group % of:
        raise Unfit(f"groups of {weights.group} columns are not whole multiples of {of}")


def _book(weights: Weights, lane_count: int, *, integers: bool) -> list[Lowered]:
    """A book of up to 16 levels, with ``integers`` first for activations of 8 bits where its levels allow that."""
    assert weights.levels is not None
    _check_groups(weights, layouts.WORD)
    held = layouts.words(weights.codes, lane_count, _VECTORS, _ORDER)

    def made(op: str, scales: np.ndarray, levels: np.ndarray, said: str) -> Lowered:
        scales = layouts.by_lane(scales.astype(np.float32), lane_count, _VECTORS)
        return Lowered(op, {"words": held, "scales": scales, "levels": levels}, {}, said)

    levels = _filled(weights.levels, 16)
    found = [made("BookLayer", weights.scales, levels, "custom operator")]
    if integers and (whole := layouts.whole(levels)) is not None:
        raised = (whole[0].astype(np.int16) + _RAISED).astype(np.uint8)
        found.insert(0, made("IntegerLayer", np.ldexp(weights.scales, whole[1]), raised, "custom operator, int8"))
    return found


def _coded(weights: Weights, lane_count: int) -> Lowered:
    """Binary codes, or a book of more than 16 levels."""
    if not 1 <= weights.bits <= (8 if weights.levels is not None else _MOST_SIGNS):
        raise Unfit(f"codes of {weights.bits} bits have no kernel")
    _check_groups(weights, lane_count)
    codes, levels, kind = weights.codes, weights.levels, _BINARY
    scales = weights.scales[..., None]
    if levels is None:
        scales = _filled(np.moveaxis(weights.scales, 0, -1), 1, 1, _MOST_SIGNS)
        levels = np.where(np.arange(16)[None] >> np.arange(_MOST_SIGNS)[:, None] & 1, 1, -1)
    elif (found := _powers(levels)) is not None:
        kind, codes, levels = _POWER, found[codes], np.zeros(1)
    elif (sums := _two_powers(levels)) is not None:
        kind, codes, levels = _TWO_POWERS, sums[0][codes], sums[1]
    else:
        kind, levels = _LIST, _filled(levels, 256)
    constants = {
        "words": words(codes, 8 if kind == _BINARY else 4, lane_count),
        "scales": _scales(scales),
        "levels": np.asarray(levels, np.float32),
    }
    return Lowered("CodedLayer", constants, {"kind": kind}, "custom operator")


def _constants(graph: Graph, node: gs.Node) -> list[np.ndarray]:
    found = [graph.constant(t) for t in node.inputs[1:]]
    if any(values is None for values in found):
        raise Unfit("its codes are not constant")
    return [values for values in found if values is not None]


def _expect(node: gs.Node, known: Sequence[str]) -> None:
    if unknown := sorted(set(node.attrs) - set(known)):
        raise Unfit(f"no kernel knows the attribute {', '.join(unknown)}")


def ways(graph: Graph, node: gs.Node, device: str, *, integers: bool) -> list[Lowered]:
    """The kernels that can compute a node of domain ``ai.edgecompile``, that of integers first where it is asked for.

    Args:
        graph: of the node, with shapes.
        node: the node.
        device: the CPU.
        integers: whether activations may be rounded to 8 bits.

    Raises:
        Unfit: there is none.
    """
    if node.op == ANGULAR:
        return [_angular(node, device)]
    if node.op not in CODED:
        raise Unfit("it has no kernel")
    conv = node.op.endswith("Conv")
    _expect(node, ("columns", "group", *(["strides"] if conv else [])))
    weights = read(node.op, _constants(graph, node), int(node.attrs["columns"]), int(node.attrs["group"]))
    rows, columns = weights.codes.shape
    stride = [int(s) for s in node.attrs.get("strides", (1, 1))]
    layer = {"rows": rows, "columns": columns, "group": weights.group, "conv": int(conv)}
    layer |= {"stride_h": stride[0], "stride_w": stride[1]}
    if weights.levels is not None and weights.bits <= 4:
        found = _book(weights, lanes(device), integers=integers)
    else:
        found = [_coded(weights, lanes(device))]
    label = f"{weights.bits}-bit codes of {rows}x{columns}: "
    return [replace(one, attributes={**layer, **one.attributes}, said=label + one.said) for one in found]


def _angular(node: gs.Node, device: str) -> Lowered:
    _expect(node, ("turn",))
    outer = (node.inputs[2].shape or [None])[-1]
    if outer not in [lanes(device) * n for n in (1, 2, 4, 8)]:
        raise Unfit(f"values are {outer} wide, not 1, 2, 4 or 8 vectors of {lanes(device)}")
    shapes: list[list[Any]] = [[None] if t.shape is None else [*t.shape] for t in node.inputs]
    q, k, v, *limits = shapes
    if any(None in limit or math.prod(limit) != 1 for limit in limits):
        raise Unfit("its thresholds are more than one number")
    if q != k or q[:-1] != v[:-1] or len(q) < 2 or None in q:
        raise Unfit("its queries, keys and values are not known to have one shape")
    return Lowered("AngularAttention", {}, {}, "angular attention: custom operator", kept=5)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _write(graph: Graph, node: gs.Node, lowered: Lowered) -> None:
    """Make a node of the graph one of :data:`DOMAIN`."""
    constants = [graph.new_constant(f"{node.name}_{name}", values) for name, values in lowered.constants.items()]
    node.op, node.domain, node.attrs = lowered.op, DOMAIN, dict(lowered.attributes)
    node.inputs = [*list(node.inputs)[: lowered.kept], *constants]


def _declare(graph: Graph) -> None:
    """Say that the graph has nodes of :data:`DOMAIN`, and drop the functions that no node calls any more."""
    graph.import_domains = [*graph.import_domains, helper.make_opsetid(DOMAIN, 1)]
    drop_uncalled(graph)


def _alone(graph: Graph, number: int) -> Graph:
    """The graph of one node."""
    copy = graph.copy()
    node = copy.nodes[number]
    varying = [t for t in node.inputs if copy.constant(t) is None and t.name]
    for tensor in varying:
        tensor.inputs.clear()
    copy.inputs = list({t.name: t for t in varying}.values())
    copy.outputs = list(node.outputs)
    copy.tidy()
    return copy


def lower(
    ort: Any, source: Graph, chosen: Options, scratch: Path, say: Callable[[str], None]
) -> tuple[Graph, bytes] | None:
    """The graph with custom operators, and the library that has their kernels; None where none is used.

    With ``custom_ops=auto`` a layer gets the kernel that was measured to be fastest, if that is not ONNX Runtime's on
    the function body. With ``yes`` every layer gets the first of its kernels.

    Args:
        ort: the module ``onnxruntime``.
        source: every node has a name of its own; it stays as it is.
        chosen: the options.
        scratch: a folder for files of our own.
        say: told what each layer is computed by, and why not by a kernel.

    Raises:
        EnvironmentMissing: ``custom_ops=yes`` and there is no compiler.
        InputError: ``custom_ops=yes`` and a layer has no kernel.
    """
    forced = chosen.custom_ops == "yes"
    numbers = [i for i, n in enumerate(source.nodes) if n.domain == SOURCE and n.op in (*CODED, ANGULAR)]
    if chosen.custom_ops == "no" or not numbers:
        return None
    path, device = compiler(), measure.cpu()
    if path is None:
        if forced:
            raise EnvironmentMissing(
                "custom_ops=yes needs a C++ compiler", f"none of {', '.join(_COMPILERS)} is here", "apt-get install g++"
            )
        say(f"{len(numbers)} layers have no kernel of their own: no C++ compiler is here (apt-get install g++)")
        return None
    try:
        code, used = library(path, device), False
    except EnvironmentMissing as error:
        if forced:
            raise
        say(f"{len(numbers)} layers have no kernel of their own: {error}")
        return None
    graph = source.copy()
    graph.infer_shapes()
    (scratch / OPS).write_bytes(code)
    for number in numbers:
        node = graph.nodes[number]
        label = where(node)
        try:
            able = ways(graph, node, device, integers=chosen.integers)
            if forced:
                best, why = able[0], ""
            else:
                key = _key(node, chosen)
                if key not in _MEASURED:
                    _MEASURED[key] = _fastest(ort, graph, number, able, chosen, scratch)
                place, why = _MEASURED[key]
                best = None if place is None else able[place]
        except Unfit as error:
            if forced:
                raise InputError(
                    f"custom_ops=yes: {label} has no kernel", str(error), "custom_ops=auto leaves it to its body"
                ) from None
            best, why = None, str(error)
        said = "function body" if best is None else best.said
        say(f"{label}: {said}{', ' if why else ''}{why}")
        if best is not None:
            _write(graph, node, best)
            used = True
    if not used:
        return None
    _declare(graph)
    return (graph, code) if forced or _pays(ort, source, graph, chosen, scratch, say) else None


def _pays(ort: Any, source: Graph, graph: Graph, chosen: Options, scratch: Path, say: Callable[[str], None]) -> bool:
    """Whether the whole model is faster too: a kernel may keep its neighbours from a layout that they like."""
    try:
        taken = timed(ort, {"bodies": source, "kernels": graph}, chosen, scratch)
    except InputError as error:
        say(f"function bodies alone: the model cannot be measured on random inputs, {error.why}")
        return False
    ratio = measure.ratio(taken["kernels"], taken["bodies"])
    if ratio.value < 1:
        return True
    say(f"function bodies alone: with kernels of our own the whole model takes {ratio.value:.2f} times as long")
    return False


_MEASURED: dict[tuple, tuple[int | None, str]] = {}  # a model is built more than once where a pass asks for its latency


def _key(node: gs.Node, chosen: Options) -> tuple:
    """What decides how fast a node is, on this machine."""
    shapes = tuple((tuple(t.shape or ()), str(t.dtype)) for t in node.inputs)
    attributes = tuple(sorted((name, repr(value)) for name, value in node.attrs.items()))
    return node.op, shapes, attributes, chosen.threads, chosen.level, chosen.integers


def _fastest(
    ort: Any, graph: Graph, number: int, able: Sequence[Lowered], chosen: Options, scratch: Path
) -> tuple[int | None, str]:
    """Number of the kernel that is faster than the function body, None if none is, and what was measured."""
    body = _alone(graph, number)
    if not all(isinstance(d, int) for t in body.inputs for d in (t.shape or [None])):
        raise Unfit("the number of tokens is not known, so that nothing could be measured")
    arms = {"body": body}
    for i, one in enumerate(able):
        arm = _alone(graph, number)
        _write(arm, arm.nodes[0], one)
        _declare(arm)
        arms[str(i)] = arm
    taken = timed(ort, arms, chosen, scratch)
    ratios = {name: measure.ratio(taken[name], taken["body"]) for name in arms if name != "body"}
    best = min(ratios, key=lambda name: ratios[name].value)
    told = f"{1 / ratios[best].value:.2f} times as fast as the function body"
    return (int(best), told) if ratios[best].high * _GAIN < 1 else (None, f"a kernel was {told}")


def timed(ort: Any, graphs: Mapping[str, Graph], chosen: Options, scratch: Path) -> dict[str, measure.Samples]:
    """Time graphs against each other, on random inputs; ``scratch`` holds the library.

    Raises:
        InputError: ONNX Runtime does not run one on such inputs.
    """
    feeds = oracle.random_feeds(next(iter(graphs.values())).signature().inputs)
    calls = {}
    for name, graph in graphs.items():
        path = scratch / "measured.onnx"
        graph.save(path)
        session = ort_session.session(ort, path, chosen, lambda _: "", library=scratch / OPS)
        binding = session.io_binding()
        for key, value in feeds.items():
            binding.bind_cpu_input(key, value)
        for value in session.get_outputs():
            binding.bind_output(value.name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise ort_session.rejected(error, lambda _: "") from None
        calls[name] = functools.partial(session.run_with_iobinding, binding)
    clock = "thread_cpu" if chosen.threads == 1 else "wall"
    return measure.interleave(calls, clock, seconds=_SECONDS, min_calls=12, block_ms=5, threads=chosen.threads)
