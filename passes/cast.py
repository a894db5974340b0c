"""Cast: float16 or bfloat16 written into the graph, and float32 where the numbers need it.

A node is *narrow* when its floating-point operands and results have the narrow type; initializers are converted, and
Casts stand where narrow and float32 nodes meet. Every tensor has one explicit type and no operator is given two, so a
strongly typed runtime builds the graph as it is written. Which operands may be narrow is read from the type constraints
of the operator's schema at the model's opset; what the specification fixes (scales of Resize, shapes, indices) stays.
Control flow, other domains, local functions, QuantizeLinear and DequantizeLinear stay in float32.

What else stays in float32 is decided by evidence, on the inputs the pass is given:

1. *Range.* Each tensor is measured in float32, on the inputs and on ten times the inputs. What then comes within a
   factor of 2 of the largest narrow number is not stored narrow, nor are weights above it.
2. *Storage.* Rounding a tensor to p bits leaves a signal-to-noise ratio of about ``20 log10(sqrt(3) 2**p)`` dB,
   whatever its scale: 71 for float16, 53 for bfloat16. A tensor that loses 12 dB more has sunk into the subnormal
   numbers.
3. *Sums.* A sum of n terms in an accumulator of p bits loses another ``10 log10(n / 3)`` dB: the error of partial sum k
   is independent and in proportion to k. It stays in float32 where that is below ``min_snr`` or where it may overflow,
   the squares that a normalisation sums included, unless the operator itself demands float32 (``stash_type``). Matrix
   products and convolutions are taken to accumulate in float32, as tensor cores and ONNX Runtime do.
4. *Islands.* A Cast reads and writes a tensor. Narrow nodes that save less memory traffic than their Casts cost, and
   hold no matrix product, stay in float32.
5. *Error.* The rewritten graph is evaluated and compared with the original. While an output misses ``min_snr``, or is
   not finite on ten times the inputs, the nodes that are worst when they alone are narrow go back, found by bisection.
6. *Score.* While the score of ``evaluate`` falls by more than ``max_drop``, the error allowed is made 6 dB smaller.

The evaluation (:func:`emulated`) computes each node in float32 and rounds each narrow tensor when it is stored. Running
the narrow graph on ONNX Runtime's CPU provider would flatter it: most kernels there are float32, and the Casts between
neighbours, which alone would round, are elided.

Sources: IEEE 754-2019, section 3.6 (formats); Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd edition,
sections 2.8 and 4.2 (statistical rounding error, sums); Micikevicius et al., *Mixed Precision Training*, ICLR 2018,
section 3.3 (reductions and products accumulated in float32); the ONNX operator specification.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph, Tensor, globs, matches, redirect
from edgecompile.pipeline import ANY_DROP, Context, Drop, Evaluate, Pass, PassResult
from edgecompile.propagate import PRECISION, standard

_SCALE = 10.0  # inputs this many times larger must not overflow
_HEADROOM = 2.0
_SUBNORMAL_LOSS = 12.0  # dB below the ratio of normal numbers
_CALIBRATION_FEEDS = 8
_CAST_BYTES = 1 << 14  # what launching a Cast costs beside its memory traffic
_NO_ERROR = 1e-30  # noise over signal; float32 itself has more
_EVALUATIONS = 64  # runs of the model that the search may take before it reverts whole segments


@dataclass(frozen=True)
class _Kind:
    """A narrow type: its number in ONNX, its NumPy type, the bits of its significand and its largest number."""

    name: str
    code: int
    numpy: np.dtype
    bits: int
    largest: float

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB of normal numbers rounded to this type, at the least favourable significands."""
        return 20 * math.log10(math.sqrt(3) * 2**self.bits)

    def round(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return values.astype(self.numpy)


_KINDS = {
    "float16": _Kind("float16", TensorProto.FLOAT16, np.dtype(np.float16), 11, 65504.0),
    "bfloat16": _Kind("bfloat16", TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 8, 3.3895313892515355e38),
}


@dataclass(frozen=True)
class Cast(Pass):
    """Store and compute in float16 or bfloat16 what stays within an error budget; the rest stays in float32.

    Attributes:
        dtype: ``float16`` or ``bfloat16``.
        min_snr: least signal-to-noise ratio of each output in dB, against the graph before the pass.
        keep: globs of node names, operators or module paths that stay in float32, separated by commas.
        max_drop: most that the score of ``evaluate`` may fall: ``0.5%`` of it, or ``0.005`` in its unit.
    """

    name: ClassVar[str] = "cast"
    exact: ClassVar[bool] = False
    dtype: str = "float16"
    min_snr: float = 50.0
    keep: str = ""
    max_drop: Drop = ANY_DROP

    def __post_init__(self) -> None:
        if self.dtype not in _KINDS:
            raise ValueError(f"dtype is {self.dtype!r}; it may be {' or '.join(_KINDS)}")
        if math.isnan(self.min_snr):
            raise ValueError("min_snr is not a number")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place.

        Raises:
            InputError: the graph does not run on the inputs at hand, so that nothing can be measured, or there is no
                score to keep.
        """
        if self.max_drop.limited and context.evaluate is None:
            raise InputError(
                "max_drop needs a score", "there is none", "define evaluate(run) in model.py, or give min_snr alone"
            )
        kind = _KINDS[self.dtype]
        graph.tidy()
        typed = graph.copy()
        typed.infer_shapes()
        if any(n.op != "Cast" and any(_code(t) == kind.code for t in n.outputs) for n in typed.nodes):
            context.note(f"the graph already computes in {kind.name}: left as it is")
            return context.result()
        model = _Model(typed, kind)
        feeds = _feeds(graph, context)
        _limits(model, context)
        facts = _measure(model, feeds)
        reasons = _keep(model, self, context) | _evidence(model, facts, self.min_snr, context)
        narrow = model.candidates - reasons.keys()
        alone = _islands(model, facts, narrow)
        search = _Search(model, facts, feeds, self.min_snr)
        chosen, reverted = search.run(narrow - alone)
        reasons |= dict.fromkeys(alone, "its Casts would cost more than it saves")
        reasons |= reverted
        if self.max_drop.limited and context.evaluate is not None and (base := context.base(graph, True)) is not None:
            context.progress(f"judging {kind.name}")
            chosen, lossy = _keep_score(search, chosen, self.max_drop, context.evaluate, base)
            reasons |= lossy
        for index in sorted(reasons.keys() & model.candidates):
            context.note(f"kept in float32: {reasons[index]}", graph.nodes[index])
        chosen = {i for i in sorted(chosen) if context.rewrite(f"{graph.nodes[i].op} to {kind.name}", graph.nodes[i])}
        if chosen:
            graph.infer_shapes()
            model.apply(graph, chosen)
        return context.result()

    def reject(self, errors: Mapping[str, oracle.OutputError], rounding: Mapping[str, float]) -> str:
        """Why the outputs miss the budget, or ``""``."""
        for name, error in errors.items():
            if not error.snr_db >= self.min_snr:
                return f"output {name!r} has a signal-to-noise ratio of {error.snr_db:.1f} dB, not {self.min_snr:g} dB"
        return ""


def _keep_score(
    search: _Search, narrow: set[int], max_drop: Drop, evaluate: Evaluate, base: float
) -> tuple[set[int], dict[int, str]]:
    """The nodes that may stay narrow by the score, and why the others may not."""
    model, reasons = search.model, dict[int, str]()
    while narrow and not max_drop.holds(evaluate(emulated(model.narrowed(narrow)), True), base):
        left, found = narrow, dict[int, str]()
        while left == narrow:  # until the error allowed is less than there is
            search.budget /= 4
            left, found = search.run(narrow)
            if search.budget < _NO_ERROR:
                left, found = set(), dict.fromkeys(narrow, "no error can be seen")
        reasons |= {i: f"the score fell too much; {found[i]}" for i in narrow - left}
        narrow = left
    return narrow, reasons


def _feeds(graph: Graph, context: Context) -> list[Mapping[str, np.ndarray]]:
    """The inputs to measure on: those of the run, the first of the calibration data, or else random ones."""
    calibration = context.calibration
    data = itertools.islice(calibration.feeds(), _CALIBRATION_FEEDS) if calibration else ()
    return [*context.feeds, *data] or list(oracle.probe_feeds(graph))


def _scaled(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs whose floating-point values are ten times as large."""
    return {n: v * v.dtype.type(_SCALE) if v.dtype.kind == "f" else v for n, v in feeds.items()}


def _code(tensor: Tensor) -> int:
    """The ONNX element type of a tensor, 0 if unknown."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype or 0
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


# -- what the specification allows -------------------------------------------------------------------------------------

# Attributes that name the type of a result by themselves; Cast's ``to`` is rewritten, operators with others stay.
_TYPE_ATTRIBUTES = {"dtype", "output_dtype", "output_datatype"}


@dataclass(frozen=True)
class _Slots:
    """Which inputs and outputs of a node become narrow with it."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def _slots(node: gs.Node, opset: int, kind: _Kind) -> _Slots:
    """The float32 operands and results for which the schema allows the narrow type."""
    if not standard(node) or node.op in PRECISION or node.op == "Constant" or any(node.subgraphs()):
        return _Slots()
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return _Slots()
    if schema.attributes.keys() & _TYPE_ATTRIBUTES or not all(t.name == "" or _code(t) for t in node.inputs):
        return _Slots()
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    bound: dict[str, list[tuple[bool, int, int]]] = defaultdict(list)
    for is_output, tensors, formals in ((False, node.inputs, schema.inputs), (True, node.outputs, schema.outputs)):
        for index, tensor in enumerate(tensors):
            formal = formals[min(index, len(formals) - 1)]
            if tensor.name and formal.is_homogeneous:
                bound[formal.type_str].append((is_output, index, _code(tensor)))
    narrow = [
        places
        for variable, places in bound.items()
        if f"tensor({kind.name})" in allowed.get(variable, ()) and all(c == TensorProto.FLOAT for *_, c in places)
    ]
    ends = [(is_output, index) for places in narrow for is_output, index, _ in places]
    return _Slots(tuple(i for o, i in ends if not o), tuple(i for o, i in ends if o))


def _limits(model: _Model, context: Context) -> None:
    """Say what cannot be narrow because of what it is, where a person could change that."""
    opset, kind = model.graph.opsets.get("", 1), model.kind
    for index, node in enumerate(model.graph.nodes):
        if index in model.candidates or not any(_code(t) == TensorProto.FLOAT for t in node.outputs):
            continue
        if any(node.subgraphs()):
            context.note("kept in float32: its subgraphs stay in float32", node)
        elif standard(node) and (latest := _slots(node, onnx.defs.onnx_opset_version(), kind)).outputs:
            since = next(
                v for v in range(opset + 1, onnx.defs.onnx_opset_version() + 1) if _slots(node, v, kind) == latest
            )
            context.note(f"{node.op} takes {kind.name} from opset {since} on; the model has opset {opset}")


class _Model:
    """A typed graph, what of it may be narrow, and how that is written into it.

    Attributes:
        candidates: numbers of the nodes that may be narrow, in ``graph.nodes``.
        indifferent: numbers of the nodes that read a tensor of either type with the same result (Shape, ArgMax, ...).
    """

    def __init__(self, graph: Graph, kind: _Kind):
        self.graph, self.kind = graph, kind
        opset = graph.opsets.get("", 1)
        self.slots = [_slots(node, opset, kind) for node in graph.nodes]
        self.candidates = {i for i, s in enumerate(self.slots) if s.outputs}
        self.indifferent = {
            i
            for i, (s, n) in enumerate(zip(self.slots, graph.nodes, strict=True))
            if not s.outputs and len(s.inputs) == 1 and sum(_code(t) == TensorProto.FLOAT for t in n.inputs) == 1
        }

    def narrowed(self, narrow: Iterable[int]) -> Graph:
        """A copy of the graph in which these nodes are narrow."""
        graph = self.graph.copy()
        self.apply(graph, narrow)
        graph.tidy()
        return graph

    def apply(self, graph: Graph, narrow: Iterable[int]) -> None:
        """Make nodes narrow in a graph whose nodes are those of the model, in place."""
        _Writer(graph, self, set(narrow)).write()


class _Writer:
    """Converts constants and puts Casts where types meet, each once."""

    def __init__(self, graph: Graph, model: _Model, narrow: set[int]):
        self.graph, self.model, self.kind = graph, model, model.kind
        self.nodes, self.narrow = list(graph.nodes), narrow
        self.at_home: set[int] = set()  # tensors whose one producer makes them narrow
        self.twins: dict[tuple[int, bool], Tensor] = {}
        self.kept: list[Tensor] = []  # so that no id is used twice

    def write(self) -> None:
        for index in sorted(self.narrow):
            node = self.nodes[index]
            self._retype_attributes(node)
            for output in self.model.slots[index].outputs:
                self._become_narrow(node.outputs[output])
        self._outputs()
        for index, node in enumerate(self.nodes):
            if index in self.model.indifferent:
                continue
            wanted = self.model.slots[index].inputs if index in self.narrow else ()
            for place, tensor in enumerate(list(node.inputs)):
                node.inputs[place] = self._as(tensor, place in wanted, node)
            for body in node.subgraphs():
                self._body(body, node)
        self._cancel()

    def _become_narrow(self, tensor: Tensor) -> None:
        tensor.dtype = self.kind.numpy
        self.at_home.add(id(tensor))

    def _retype_attributes(self, node: gs.Node) -> None:
        if node.op == "Cast":
            node.attrs["to"] = self.kind.code
        elif node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            filled = np.zeros(1, np.float32) if value is None else value.values
            node.attrs["value"] = gs.Constant(self.graph.fresh_name("value"), self.kind.round(filled))

    def _outputs(self) -> None:
        """Let the caller see float32: what a model takes and returns stays as it was."""
        for tensor in self.graph.outputs:
            if not tensor.inputs or id(tensor) not in self.at_home:
                continue
            node = tensor.inputs[0]
            inner = self.graph.new_variable(f"{tensor.name}_{self.kind.name}", tensor)
            redirect(tensor, inner)
            self._return_instead(tensor, inner)
            node.outputs[next(i for i, t in enumerate(node.outputs) if t is tensor)] = inner
            self.at_home.discard(id(tensor))
            self.at_home.add(id(inner))
            tensor.dtype = np.dtype(np.float32)
            self.graph.insert("Cast", [inner], [tensor], {"to": TensorProto.FLOAT}, replaces=[node])
            self.twins[id(inner), False] = tensor

    def _return_instead(self, old: Tensor, new: Tensor) -> None:
        """Let subgraphs that return an outer tensor return another."""
        for body in (b for n in self.nodes for b in n.subgraphs()):
            body.outputs = [new if t is old else t for t in body.outputs]

    def _body(self, body: gs.Graph, holder: gs.Node) -> None:
        """What the body of an If, Loop or Scan reads from outside is float32, as it was."""
        for node in body.nodes:
            for place, tensor in enumerate(list(node.inputs)):
                node.inputs[place] = self._as(tensor, False, holder)
            for inner in node.subgraphs():
                self._body(inner, holder)
        body.outputs = [self._as(t, False, holder) for t in body.outputs]

    def _as(self, tensor: Tensor, narrow: bool, reader: gs.Node) -> Tensor:
        """The tensor as a reader wants it."""
        if (id(tensor) in self.at_home) == narrow or (narrow and _code(tensor) != TensorProto.FLOAT):
            return tensor
        twin = self.twins.get((id(tensor), narrow))
        if twin is not None:
            return twin
        self.kept.append(tensor)
        name = self.kind.name if narrow else "float32"
        value = self.graph.constant(tensor) if narrow else None
        if value is not None:
            twin = self.graph.new_constant(f"{tensor.name}_{name}", self.kind.round(value))
        else:
            twin = self.graph.new_variable(f"{tensor.name}_{name}", tensor)
            twin.dtype = self.kind.numpy if narrow else np.dtype(np.float32)
            code = self.kind.code if narrow else TensorProto.FLOAT
            self.graph.insert("Cast", [tensor], [twin], {"to": code}, replaces=tensor.inputs[:1] or [reader])
        self.twins[id(tensor), narrow] = twin
        return twin

    def _cancel(self) -> None:
        """Drop Casts to the type that is already there, and to float32 and back, which changes nothing."""
        for node in list(self.graph.nodes):
            if node.op != "Cast" or not standard(node) or not node.outputs:
                continue
            source, target = node.inputs[0], node.attrs["to"]
            before = self.graph.producer(source)
            if before is not None and before.op == "Cast" and standard(before) and _code(source) == TensorProto.FLOAT:
                origin = before.inputs[0]
                if target == self.kind.code == _code(origin):
                    source = origin
            result = node.outputs[0]
            named = self.graph.is_output(result) and (not source.inputs or self.graph.is_output(source))
            if _code(source) == target and not named:
                self.graph.rewire(result, source)


# -- evaluating --------------------------------------------------------------------------------------------------------

# Operators whose narrow results are among their narrow operands: storing them rounds nothing.
_MOVES = {
    *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max"),
    *("MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape", "Slice", "SpaceToDepth", "Split"),
    *("Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
}


def emulated(graph: Graph) -> Graph:
    """The graph with each node computed in float32 and each narrow tensor rounded when it is stored.

    Inputs and outputs of the result are float32 where they were narrow. Works for float16 and bfloat16, whatever the
    runtime has kernels for.

    Args:
        graph: the graph; it is not changed.
    """
    plain = graph.copy()
    plain.infer_shapes()
    codes = {kind.code for kind in _KINDS.values()}
    wide = np.dtype(np.float32)
    narrow = {id(t): _code(t) for t in plain.tensors().values() if _code(t) in codes}

    def stored(tensor: Tensor, node: gs.Node | None) -> None:
        """Round what is computed before anything reads it."""
        code = narrow[id(tensor)]
        half = plain.new_variable(f"{tensor.name}_stored", tensor)
        half.dtype = onnx.helper.tensor_dtype_to_np_dtype(code)
        if node is None:
            rounded = plain.new_variable(f"{tensor.name}_rounded", tensor)
            redirect(tensor, rounded)
            source = tensor
        else:
            source, rounded = plain.new_variable(f"{tensor.name}_raw", tensor), tensor
            node.outputs[next(i for i, t in enumerate(node.outputs) if t is tensor)] = source
        source.dtype = rounded.dtype = wide
        plain.insert("Cast", [source], [half], {"to": code}, replaces=[])
        plain.insert("Cast", [half], [rounded], {"to": TensorProto.FLOAT}, replaces=[])

    for tensor in plain._constants():
        if _code(tensor) in codes:
            tensor.values, tensor._export_dtype = np.asarray(tensor.values).astype(wide), None
    for node in list(plain.nodes):
        for key in ("to", *_TYPE_ATTRIBUTES):
            if node.attrs.get(key) in codes and not isinstance(node.attrs[key], bool):
                node.attrs[key] = TensorProto.FLOAT
        for tensor in list(node.outputs):
            if id(tensor) in narrow and not (node.op in _MOVES and standard(node)):
                stored(tensor, node)
    for tensor in plain.inputs:
        if id(tensor) in narrow:
            stored(tensor, None)
    for tensor in plain.tensors().values():
        if id(tensor) in narrow and isinstance(tensor, gs.Variable):
            tensor.dtype = wide
    plain.tidy()
    return plain


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class _Fact:
    """What was seen of a float32 tensor.

    Attributes:
        peak: largest magnitude, on the inputs and on ten times the inputs.
        signal, noise: sums of squares of the tensor and of what storing it narrow changes, on the inputs.
        shape: at the first inputs.
    """

    peak: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    shape: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def snr(self) -> float:
        return _decibel(self.signal, self.noise)


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf and noise < math.inf else -math.inf


def _measure(model: _Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, _Fact]:
    """Facts of every float32 tensor that nodes compute or the caller gives, by name.

    The statistics are part of the graph that is run, so that no tensor outlives its use.
    """
    probe, kind = model.graph.copy(), model.kind
    wide = np.dtype(np.float32)
    seen: dict[str, tuple[str, str]] = {}
    tensors = [*probe.inputs, *(t for n in probe.nodes for t in n.outputs if n.op != "Constant")]
    probe.outputs = []

    def compute(op: str, *inputs: Tensor, dtype: np.dtype = wide, **attrs: int) -> Tensor:
        node = probe.insert(op, inputs, None, attrs, replaces=[])
        node.outputs[0].dtype = dtype
        return node.outputs[0]

    for tensor in tensors:
        if not tensor.name or _code(tensor) != TensorProto.FLOAT:
            continue
        flat, zero = probe.new_constant("flat", np.array([-1])), probe.new_constant("zero", np.zeros(1, np.float32))
        values = compute("Concat", compute("Reshape", tensor, flat), zero, axis=0)  # some tensors are empty
        stored = compute("Cast", compute("Cast", values, dtype=kind.numpy, to=kind.code), to=TensorProto.FLOAT)
        figures = [
            compute("ReduceMax", compute("Abs", values), keepdims=1),
            compute("ReduceSumSquare", values, keepdims=1),
            compute("ReduceSumSquare", compute("Sub", values, stored), keepdims=1),
        ]
        shape = compute("Shape", tensor, dtype=np.dtype(np.int64))
        both = compute("Concat", *figures, axis=0)
        probe.outputs += [both, shape]
        seen[tensor.name] = both.name, shape.name
    probe.tidy()
    facts = {name: _Fact() for name in seen}
    for number, feed in enumerate(feeds):
        values, large = oracle.run(probe, feed), oracle.run(probe, _scaled(feed))
        for name, (figures, shape) in seen.items():
            peak, signal, noise = map(float, values[figures])
            fact = facts[name]
            peaks = [fact.peak, peak, float(large[figures][0])]
            fact.peak = math.inf if any(map(math.isnan, peaks)) else max(peaks)
            fact.signal, fact.noise = fact.signal + signal, fact.noise + noise
            if not number:
                fact.shape = tuple(map(int, values[shape]))
    return facts


# -- what the numbers demand -------------------------------------------------------------------------------------------


def _keep(model: _Model, options: Cast, context: Context) -> dict[int, str]:
    """The nodes that the user keeps."""
    found = set()
    for pattern in globs(options.keep):
        named = {i for i, node in enumerate(model.graph.nodes) if matches(node, (pattern,))}
        if not named:
            context.note(f"keep={pattern}: no operator, node or module of the graph is called so")
        found |= named
    return dict.fromkeys(sorted(found), "asked for")


def _evidence(model: _Model, facts: Mapping[str, _Fact], min_snr: float, context: Context) -> dict[int, str]:
    """The nodes that range, storage or sums keep in float32, and why."""
    reasons: dict[int, str] = {}
    verdicts: dict[int, str] = {}

    def verdict(tensor: Tensor, node: gs.Node) -> str:
        if id(tensor) not in verdicts:
            value = model.graph.constant(tensor)
            if value is None:
                verdicts[id(tensor)] = _misfit(facts.get(tensor.name), model.kind)
            else:
                verdicts[id(tensor)] = _weight_misfit(tensor.name, value, model.kind)
                if lost := _vanishing(value, model.kind):
                    context.note(f"{lost} of {tensor.name} vanish in {model.kind.name}", node)
        return verdicts[id(tensor)]

    for index in sorted(model.candidates):
        node, slots = model.graph.nodes[index], model.slots[index]
        ends = [*(node.inputs[i] for i in slots.inputs), *(node.outputs[i] for i in slots.outputs)]
        found = [v for t in ends if (v := verdict(t, node))]
        if not found and (why := _long_sum(node, facts, model.kind, min_snr)):
            found = [why]
        if found:
            reasons[index] = found[0]
    return reasons


def _misfit(fact: _Fact | None, kind: _Kind) -> str:
    if fact is None:
        return "nothing was measured"
    if not fact.peak * _HEADROOM <= kind.largest:
        return f"a tensor reaches {fact.peak:.1e} on inputs {_SCALE:g} times as large"
    if fact.snr < kind.snr - _SUBNORMAL_LOSS:
        return f"a tensor stored in {kind.name} has a signal-to-noise ratio of {fact.snr:.0f} dB"
    return ""


def _weight_misfit(name: str, value: np.ndarray, kind: _Kind) -> str:
    if not value.size or not np.isfinite(value).all():
        return ""  # an infinite bound or mask is as infinite in any type
    peak = float(np.abs(value).max())
    if peak > kind.largest:
        return f"{name} reaches {peak:.1e}"
    snr = _decibel(_energy(value), _energy(value - kind.round(value).astype(value.dtype)))
    if snr < kind.snr - _SUBNORMAL_LOSS:
        return f"{name} has a signal-to-noise ratio of {snr:.0f} dB in {kind.name}"
    return ""


def _energy(values: np.ndarray) -> float:
    """Sum of squares."""
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _vanishing(value: np.ndarray, kind: _Kind) -> str:
    """Which parts of a weight become zero as a whole: elements of a vector, slices of what has more axes, or ``""``."""
    here, left = value != 0, kind.round(value) != 0
    for axis in range(value.ndim) or (0,):
        others = tuple(a for a in range(value.ndim) if a != axis)
        lost = np.count_nonzero(here.any(others) & ~left.any(others)) if value.ndim else int(here > left)
        if lost:
            return f"{lost} of {value.shape[axis] if value.ndim else 1} slices"
    return ""


def _reduced(node: gs.Node, x: _Fact, y: _Fact) -> int:
    return x.size // max(y.size, 1)


def _from_axis(node: gs.Node, x: _Fact, y: _Fact) -> int:
    return math.prod(x.shape[node.attrs.get("axis", -1) :])


def _along_axis(node: gs.Node, x: _Fact, y: _Fact) -> int:
    return x.shape[node.attrs.get("axis", -1)] if x.shape else 1


def _spatial(node: gs.Node, x: _Fact, y: _Fact) -> int:
    return math.prod(x.shape[2:])


# How many terms a node sums for one result, and whether it sums their squares.
_SUMS = {
    **dict.fromkeys(("GlobalAveragePool", "ReduceL1", "ReduceLogSum", "ReduceMean", "ReduceSum"), (_reduced, False)),
    **dict.fromkeys(("GlobalLpPool", "ReduceL2", "ReduceSumSquare"), (_reduced, True)),
    "AveragePool": (lambda node, x, y: math.prod(node.attrs["kernel_shape"]), False),
    "CumSum": (lambda node, x, y: max(x.shape, default=1), False),
    "GroupNormalization": (lambda node, x, y: math.prod(x.shape[1:]) // node.attrs["num_groups"], True),
    "InstanceNormalization": (_spatial, True),
    "LayerNormalization": (_from_axis, True),
    "LpNormalization": (_along_axis, True),
    "MeanVarianceNormalization": (lambda node, x, y: x.size // max(x.shape[1], 1), True),
    "RMSNormalization": (_from_axis, True),
}
_EXPONENTIAL = {"LogSoftmax": _along_axis, "ReduceLogSumExp": _reduced, "Softmax": _along_axis}  # terms of at most 1
_STASHES = {"GroupNormalization", "LayerNormalization", "RMSNormalization"}


def _long_sum(node: gs.Node, facts: Mapping[str, _Fact], kind: _Kind, min_snr: float) -> str:
    """Why the sum inside a node needs float32, or ``""``."""
    x, y = facts.get(node.inputs[0].name), facts.get(node.outputs[0].name)
    if x is None or y is None or node.op not in _SUMS.keys() | _EXPONENTIAL.keys():
        return ""
    if node.op in _STASHES and node.attrs.get("stash_type", 1) == TensorProto.FLOAT:
        return ""
    count, square = _SUMS.get(node.op) or (_EXPONENTIAL[node.op], False)
    terms = count(node, x, y)
    snr = kind.snr - 10 * math.log10(max(terms / 3, 1))
    if snr < min_snr:
        return f"a sum of {terms} terms in {kind.name} has a signal-to-noise ratio of {snr:.0f} dB"
    largest = 1.0 if node.op in _EXPONENTIAL else x.peak**2 if square else x.peak
    if not terms * largest * _HEADROOM <= kind.largest:
        return f"its sum of {terms} terms may reach {terms * largest:.1e} on inputs {_SCALE:g} times as large"
    return ""


# -- islands -----------------------------------------------------------------------------------------------------------

_PRODUCTS = {"Attention", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}


def _islands(model: _Model, facts: Mapping[str, _Fact], narrow: set[int]) -> set[int]:
    """Nodes that are cheaper in float32: whole islands of narrow nodes, and single ones at their shores."""
    graph, left = model.graph, set(narrow)
    number = {id(n): i for i, n in enumerate(graph.nodes)}
    size = {name: fact.size for name, fact in facts.items()}
    outputs = {id(t) for t in graph.outputs}
    bodies = {id(t) for n in graph.walk() for b in n.subgraphs() for t in b.outputs}

    def cast_cost(tensor: Tensor, without: set[int]) -> int:
        """Bytes of the Cast that a tensor needs when these nodes are float32."""
        if tensor.name not in size:
            return 0
        producer = graph.producer(tensor)
        if producer is None:
            home = False
        else:
            index = number.get(id(producer), -1)
            made = any(producer.outputs[o] is tensor for o in model.slots[index].outputs)
            home = index in left and index not in without and made
        other = (id(tensor) in outputs and home) or (home and id(tensor) in bodies)
        for reader in tensor.outputs:
            index = number.get(id(reader), -1)
            if index in model.indifferent:
                continue
            wants = any(reader.inputs[i] is tensor for i in model.slots[index].inputs)
            other |= (index in left and index not in without and wants) != home
        return (6 * size[tensor.name] + _CAST_BYTES) if other else 0

    def ends(index: int) -> list[Tensor]:
        node, slots = graph.nodes[index], model.slots[index]
        return [*(node.inputs[i] for i in slots.inputs), *(node.outputs[i] for i in slots.outputs)]

    def gain(group: set[int]) -> int:
        """Bytes saved by taking a group of narrow nodes back to float32."""
        touched = {id(t): t for i in group for t in ends(i)}.values()
        casts = sum(cast_cost(t, set()) - cast_cost(t, group) for t in touched)
        return casts - sum(2 * size.get(t.name, 0) for i in group for t in ends(i))

    changed = True
    while changed:
        groups = [g for g in _components(model, left, number) if not any(graph.nodes[i].op in _PRODUCTS for i in g)]
        groups += [{i} for i in sorted(left) if graph.nodes[i].op not in _PRODUCTS]
        changed = False
        for group in groups:
            if group <= left and gain(group) > 0:
                left -= group
                changed = True
    return narrow - left


def _components(model: _Model, narrow: set[int], number: Mapping[int, int]) -> Iterator[set[int]]:
    """Narrow nodes that hand each other narrow tensors."""
    rest = set(narrow)
    for start in sorted(narrow):
        if start not in rest:
            continue
        rest.discard(start)
        found, queue = {start}, [start]
        while queue:
            node = model.graph.nodes[queue.pop()]
            near = [p for t in node.inputs for p in t.inputs[:1]] + [r for t in node.outputs for r in t.outputs]
            for index in (number.get(id(n), -1) for n in near):
                if index in rest:
                    rest.discard(index)
                    found.add(index)
                    queue.append(index)
        yield found


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass
class _Search:
    """Takes nodes back to float32 until the outputs hold the budget.

    The noise of parts of a network adds up nearly, since rounding errors of different tensors are independent. So the
    part that is noisiest when it alone is narrow is split until it is a single node, which is taken back.
    """

    model: _Model
    facts: Mapping[str, _Fact]
    feeds: Sequence[Mapping[str, np.ndarray]]
    min_snr: float
    runs: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.large = [_scaled(f) for f in self.feeds]
        self.everything = [*self.feeds, *self.large]
        self.references = {id(f): oracle.run(self.model.graph, f) for f in self.everything}
        self.budget = 10 ** (-self.min_snr / 10)

    def noise(self, narrow: Iterable[int], feeds: Sequence[Mapping[str, np.ndarray]]) -> float:
        """Noise over signal of the worst output; infinite if one overflows."""
        graph = emulated(self.model.narrowed(narrow))
        worst = 0.0
        for feed in feeds:
            self.runs += 1
            reference = self.references[id(feed)]
            try:
                outputs = oracle.run(graph, feed)
                errors = oracle.compare_all(reference, outputs)
            except InputError:  # rounding made an index or an extent impossible, or another one
                return math.inf
            if any(feed is f for f in self.large):
                sound = all(
                    np.isfinite(outputs[n][np.isfinite(v)]).all() for n, v in reference.items() if v.dtype.kind == "f"
                )
                worst = max(worst, 0.0 if sound else math.inf)
            else:
                worst = max([worst, *(10 ** (-e.snr_db / 10) for e in errors.values())])
        return worst

    def run(self, narrow: set[int]) -> tuple[set[int], dict[int, str]]:
        """The nodes that may stay narrow, and why the others may not."""
        narrow, reasons = set(narrow), dict[int, str]()
        total = self.noise(narrow, self.everything) if narrow else 0.0
        if total <= self.budget:
            return narrow, reasons
        probes = [self.feeds[0], *([self.large[0]] if math.isinf(total) else [])]
        self.runs = 0
        parts = [(total, sorted(narrow))]
        while parts and narrow:
            searching = self.runs < _EVALUATIONS
            noise, nodes = worst = max(parts, key=lambda p: (p[0] / (1 if searching else len(p[1])), p[1]))
            parts.remove(worst)
            if len(nodes) > 1 and searching:
                middle = len(nodes) // 2
                parts += [(self.noise(half, probes), half) for half in (nodes[:middle], nodes[middle:])]
                continue
            narrow -= set(nodes)
            what = "alone" if len(nodes) == 1 else f"with {len(nodes) - 1} neighbours alone"
            fate = "overflows" if math.isinf(noise) else f"leaves {_decibel(1.0, noise):.1f} dB"
            reasons |= dict.fromkeys(nodes, f"{what} in {self.model.kind.name} it {fate}")
            for index in _islands(self.model, self.facts, narrow):
                narrow.discard(index)
                reasons[index] = "its Casts would cost more than it saves"
            rest = sum(n for n, p in parts if narrow.intersection(p))
            if rest <= 2 * self.budget and self.noise(narrow, self.everything) <= self.budget:
                break
        return narrow, reasons
