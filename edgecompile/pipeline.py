"""Passes in order, each verified: structure, then numbers; a pass that breaks the graph is rolled back.

A spec string names the passes and their options, ``clean{fold_limit=67108864},fold_norm``; it round-trips through
:meth:`Pipeline.parse` and ``str``. Every application of a rewrite has a number, so that a run can stop after the first
N (as LLVM's ``-opt-bisect-limit`` does) and :func:`bisect` can find the one at fault.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from edgecompile import oracle, registry, stats
from edgecompile.errors import EdgecompileError, InputError, PassError, did_you_mean
from edgecompile.graph import Graph, Signature, where
from edgecompile.oracle import OutputError
from edgecompile.stats import Stats

if TYPE_CHECKING:
    from edgecompile.calibration_data import CalibrationData
    from edgecompile.measure import Samples
    from edgecompile.pruning import Pruning
    from edgecompile.sensitivity import Search
    from edgecompile.tradeoff import Tradeoff


@dataclass(frozen=True)
class Note:
    """What a pass has to say about one place: above all, why it did not rewrite it."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


@dataclass(frozen=True)
class Rewrite:
    """One numbered application of a rewrite."""

    number: int
    pass_name: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"#{self.number} {self.pass_name}: {self.what} at {self.where}"


@dataclass(frozen=True)
class PassResult:
    """What a pass did, what it measured of single layers, if it chose among them, what other forms would cost, and what
    channels it cut."""

    rewrites: tuple[Rewrite, ...] = ()
    notes: tuple[Note, ...] = ()
    sensitivity: Search | None = None
    tradeoff: Tradeoff | None = None
    pruning: Pruning | None = None


@dataclass(frozen=True)
class Drop:
    """The most that a score may fall.

    Attributes:
        text: ``0.5%``, a share of the score before; ``0.005``, in the unit of the score; ``inf``, whatever it costs.

    Raises:
        ValueError: it is none of these, or negative.
    """

    text: str = "inf"

    def __post_init__(self) -> None:
        try:
            value = float(self.text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not value >= 0 or (self.text.endswith("%") and not value <= 100):
            raise ValueError(f"{self.text!r} is not a drop of a score like 0.5% or 0.005")

    def __str__(self) -> str:
        return self.text

    @property
    def limited(self) -> bool:
        """False if any score will do."""
        return self.text != "inf"

    def holds(self, score: float, base: float) -> bool:
        """Whether a score is close enough to the one before, or higher."""
        value = float(self.text.removesuffix("%"))
        return score >= base - (abs(base) * value / 100 if self.text.endswith("%") else value)


ANY_DROP = Drop()


# Score of a graph, higher is better, by the user's `evaluate(run)`. The flag: each operator by itself, Q, DQ and Cast
# included, as a simulation of a target that is not here; else with the kernels that the CPU provider fuses.
Evaluate = Callable[[Graph, bool], float]


class Measure(Protocol):
    """Times graphs on the target of the build."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What times depend on: target, options, versions, device."""
        ...

    def __call__(self, graphs: Sequence[Graph], seconds: float, sessions: int) -> Sequence[Samples]:
        """Lower the graphs and time them interleaved, for some wall time per graph, in fresh sessions."""
        ...


@dataclass
class Context:
    """What a running pass may use: inputs to look at, and the ledger of its rewrites.

    Attributes:
        feeds: sets of model inputs on which the passes are verified.
        limit: number of the last rewrite to apply; None for all.
        applied: rewrites applied so far, by all passes of the run.
        calibration: data that statistics are taken from, or None.
        evaluate: score of a graph, higher is better; or None.
        progress: told in a few words what is being done.
        cache: folder of what was found out before, or None.
        measure: times graphs on the target, or None.
    """

    feeds: Sequence[Mapping[str, np.ndarray]] = ()
    limit: int | None = None
    applied: int = 0
    calibration: CalibrationData | None = None
    evaluate: Evaluate | None = None
    progress: Callable[[str], object] = lambda text: None
    cache: Path | None = None
    measure: Measure | None = None
    _scored: Graph | None = None
    _base: dict[bool, float] = field(default_factory=dict)
    _pass: str = ""
    _rewrites: list[Rewrite] = field(default_factory=list)
    _notes: dict[Note, None] = field(default_factory=dict)

    def rewrite(self, what: str, node: gs.Node | str) -> bool:
        """Number a rewrite and ask whether to apply it; a pass calls this right before it changes the graph."""
        if self.limit is not None and self.applied >= self.limit:
            return False
        self.applied += 1
        place = node if isinstance(node, str) else where(node)
        self._rewrites.append(Rewrite(self.applied, self._pass, what, place))
        return True

    def note(self, text: str, node: gs.Node | str = "") -> None:
        """Say something about a place, once."""
        self._notes[Note(node if isinstance(node, str) else where(node), text)] = None

    def base(self, graph: Graph, simulate: bool = False) -> float | None:
        """Score of the model before the first pass that keeps one, which all of them share; None if nothing scores.

        Args:
            graph: the graph as it is before the pass that asks.
            simulate: as ``evaluate`` takes it.
        """
        if self.evaluate is None:
            return None
        first = self._scored = graph.copy() if self._scored is None else self._scored
        if simulate not in self._base:
            self._base[simulate] = self.evaluate(first, simulate)
        return self._base[simulate]

    def result(
        self, sensitivity: Search | None = None, tradeoff: Tradeoff | None = None, pruning: Pruning | None = None
    ) -> PassResult:
        """Everything recorded since the pass began."""
        return PassResult(tuple(self._rewrites), tuple(self._notes), sensitivity, tradeoff, pruning)

    def begin(self, name: str) -> None:
        """Start the ledger of a pass; called by the pipeline."""
        self._pass, self._rewrites, self._notes = name, [], {}


class Pass(ABC):
    """A rewrite of a graph: a frozen dataclass whose fields are its options.

    Attributes:
        name: how spec strings call it.
        exact: the outputs may differ by rounding only.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place; ask :meth:`Context.rewrite` before each change, return :meth:`Context.result`."""

    def reject(self, errors: Mapping[str, OutputError], rounding: Mapping[str, float]) -> str:
        """Why the outputs after this pass are not acceptable, or ``""``.

        Args:
            errors: comparison of each output before and after.
            rounding: for each output, how far rounding alone may move it (relative to its largest value).

        A pass that is not exact overrides this with the budget it was given.
        """
        for name, error in errors.items():
            if not error.max_rel <= rounding[name]:
                return f"output {name!r} moved by {error.max_rel:.1e}, rounding explains {rounding[name]:.1e}"
        return ""

    def __str__(self) -> str:
        options = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value != f.default:
                options.append(f"{f.name}={_format(value)}")
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


def _format(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return json.dumps(text) if isinstance(value, str) and not re.fullmatch(r"[\w.+-]+", text) else text


@dataclass(frozen=True)
class Step:
    """One pass of a run, as the report shows it.

    Attributes:
        spec: the pass with its options.
        exact: whether it promised to change nothing but rounding.
        rewrites, notes: what it did and what it left alone; no rewrites if it was rolled back.
        before, after: size and work of the graph.
        errors: per output, the largest difference between before and after; None if numbers were not compared.
        seconds: time of the pass, without verification.
        failure: why it was rolled back, or ``""``.
        unverified: why numbers were not compared, or ``""``.
    """

    spec: str
    exact: bool
    rewrites: tuple[Rewrite, ...]
    notes: tuple[Note, ...]
    before: Stats
    after: Stats
    errors: Mapping[str, OutputError] | None
    seconds: float
    failure: str = ""
    unverified: str = ""


@dataclass(frozen=True)
class Trace:
    """What a pipeline did to a graph, pass by pass, and what its last pass that chose among layers measured of them."""

    steps: tuple[Step, ...]
    sensitivity: Search | None = None
    tradeoff: Tradeoff | None = None
    pruning: Pruning | None = None

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """All rewrites that were kept."""
        return tuple(r for s in self.steps for r in s.rewrites)

    @property
    def failures(self) -> tuple[Step, ...]:
        """The passes that were rolled back."""
        return tuple(s for s in self.steps if s.failure)


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, spec: str) -> Pipeline:
        """Read a spec string such as ``clean,prune{ratio=0.3,align=8}``.

        Raises:
            InputError: a pass or option is unknown, or a value does not fit its option.
        """
        return cls(tuple(_make(name, options) for name, options in _split(spec)))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(
        self,
        graph: Graph,
        feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
        *,
        strict: bool = False,
        limit: int | None = None,
        verify: bool = True,
        progress: Callable[[str], None] | None = None,
        on_step: Callable[[Step, Graph], None] | None = None,
        calibration: CalibrationData | None = None,
        evaluate: Evaluate | None = None,
        cache: Path | None = None,
        measure: Measure | None = None,
    ) -> Trace:
        """Apply the passes to ``graph`` in place.

        Args:
            graph: the graph; after a failure it is as it was before the pass at fault.
            feeds: inputs to compare numbers on; by default random ones that the graph accepts.
            strict: raise when a pass fails instead of going on without it.
            limit: number of the last rewrite to apply.
            verify: compare numbers after each pass; structure is always checked.
            progress: called with the name of each step as it starts.
            on_step: called with each finished step and the graph it left, which it must not change.
            calibration: data for passes that take statistics.
            evaluate: score for passes that keep one.
            cache: folder where passes keep what takes long to find out.
            measure: times graphs, for passes that choose by time.

        Raises:
            InputError: the graph is invalid, or does not run on the feeds, before any pass has touched it.
            PassError: with ``strict``, a pass failed.
        """
        signature = graph.signature()
        graph.check()
        unverified = "" if verify else "not asked for"
        reference: list[oracle.Outputs] = []
        rounding: dict[str, float] = {}
        if verify:
            say = progress or (lambda _: None)
            say("verifying the input")
            try:
                feeds = list(feeds) if feeds else oracle.probe_feeds(graph)
                reference = [oracle.run(graph, f) for f in feeds]
                rounding = _rounding(graph, feeds, reference)
            except InputError as error:
                if feeds:
                    raise
                unverified = error.why or error.what
        context = Context(
            tuple(feeds or ()), limit, calibration=calibration, evaluate=evaluate, cache=cache,
            measure=measure, progress=progress or (lambda _: None),
        )  # fmt: skip
        steps: list[Step] = []
        sensitivity = tradeoff = pruning = None
        shape_feeds = feeds[0] if feeds else None
        before = stats.count(graph, shape_feeds)
        for number, step_pass in enumerate(self.passes):
            if progress:
                progress(f"pass {step_pass}")
            backup, applied = graph.copy(), context.applied
            context.begin(step_pass.name)
            given = None if unverified else (feeds or ())
            done = _applied(step_pass, graph, context, signature, given, reference, rounding)
            result, failure, outputs = done.result, done.failure, done.outputs
            if failure:
                graph.assign(backup)
                context.applied = applied
                result, outputs = PassResult((), result.notes), reference
                if strict:
                    earlier = ", ".join(p.name for p in self.passes[:number]) or "none"
                    raise PassError(
                        f"pass {step_pass} failed",
                        f"{failure} (passes before it: {earlier})",
                        "leave it out with --passes, or find the rewrite with `edgecompile bisect`",
                    )
            after = stats.count(graph, shape_feeds) if not failure else before
            sensitivity, tradeoff = result.sensitivity or sensitivity, result.tradeoff or tradeoff
            pruning = result.pruning or pruning
            steps.append(
                Step(
                    str(step_pass), step_pass.exact, result.rewrites, result.notes, before, after, done.errors,
                    done.seconds, failure, unverified,
                )
            )  # fmt: skip
            before, reference = after, outputs
            if on_step:
                on_step(steps[-1], graph)
        return Trace(tuple(steps), sensitivity, tradeoff, pruning)


@dataclass(frozen=True)
class _Applied:
    """What a pass made of a graph: outputs after it, if they were compared, and why it is not acceptable, or ``""``."""

    result: PassResult
    errors: Mapping[str, OutputError] | None
    outputs: list[oracle.Outputs]
    seconds: float
    failure: str


def _applied(
    step_pass: Pass,
    graph: Graph,
    context: Context,
    signature: Signature,
    feeds: Sequence[Mapping[str, np.ndarray]] | None,
    reference: list[oracle.Outputs],
    rounding: Mapping[str, float],
) -> _Applied:
    """Run a pass on ``graph`` and judge what it made: structure, then its outputs on ``feeds``, unless there are none.

    Args:
        signature: that the graph must keep.
        feeds: inputs, None: numbers are not compared.
        reference: outputs on them before the pass.
        rounding: as of :meth:`Pass.reject`.
    """
    result, errors, outputs, seconds = PassResult(), None, reference, 0.0
    start = time.perf_counter()
    try:
        result = step_pass.run(graph, context)
        graph.tidy()
        seconds = time.perf_counter() - start
        graph.check(signature)
        if feeds is None:
            return _Applied(result, None, reference, seconds, "")
        outputs = [oracle.run(graph, f) for f in feeds]
        errors = oracle.worst(map(oracle.compare_all, reference, outputs))
        return _Applied(result, errors, outputs, seconds, step_pass.reject(errors, rounding))
    except Exception as error:  # a pass is code of others: whatever it raises, the graph must survive
        return _Applied(result, errors, outputs, seconds, _reason(error))


def _reason(error: Exception) -> str:
    """What went wrong, without the advice that is meant for a user's command."""
    if isinstance(error, EdgecompileError):
        return "; ".join(filter(None, (error.what, error.why)))
    return f"{type(error).__name__}: {error}"


def _rounding(
    graph: Graph, feeds: Sequence[Mapping[str, np.ndarray]], reference: list[oracle.Outputs]
) -> dict[str, float]:
    """How far rounding may move each output: 64 ulps of the coarsest type, and 32 times the response to a few ulps."""
    kinds = {np.dtype(t.dtype) for t in graph._constants()} | {
        v.dtype for f in (*feeds, *reference) for v in f.values()
    }
    floats = [k for k in kinds if k.kind == "f" or k == ml_dtypes.bfloat16]
    ulp = max([float(ml_dtypes.finfo(k).eps) for k in floats], default=float(np.finfo(np.float32).eps))
    response = oracle.rounding(graph, feeds[0], reference[0])
    return {name: 64 * max(ulp, 1.2e-7) + 32 * change for name, change in response.items()}


@dataclass(frozen=True)
class Culprit:
    """What :func:`bisect` found.

    Attributes:
        rewrite: the first rewrite whose application makes the result wrong.
        why: what is wrong.
        total: rewrites of the whole run.
    """

    rewrite: Rewrite
    why: str
    total: int


def bisect(
    graph: Graph,
    pipeline: Pipeline,
    feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Culprit | None:
    """Find the first single rewrite that makes the graph invalid or changes what it computes.

    Args:
        graph: the graph before any pass; it is not changed.
        pipeline: the passes to search; each must be deterministic.
        feeds: inputs to compare on; by default random ones.
        progress: called with a line per attempt.

    Returns:
        the culprit, or None if the whole pipeline is right.
    """
    feeds = list(feeds) if feeds else oracle.probe_feeds(graph)
    reference = [oracle.run(graph, f) for f in feeds]
    rounding = _rounding(graph, feeds, reference)
    signature = graph.signature()

    def attempt(limit: int | None) -> tuple[str, Context]:
        """Run with at most ``limit`` rewrites; what is wrong with the result, and the ledger up to there."""
        trial, context = graph.copy(), Context(tuple(feeds), limit)
        for step_pass in pipeline.passes:
            context.begin(step_pass.name)
            done = _applied(step_pass, trial, context, signature, feeds, reference, rounding)
            if done.failure:
                return done.failure, context
        return "", context

    why, context = attempt(None)
    total = context.applied
    if not why:
        return None
    low, high = -1, total
    while high - low > 1:
        middle = (low + high) // 2
        verdict, ledger = attempt(middle)
        if progress:
            progress(f"first {middle} of {total} rewrites: {'wrong' if verdict else 'right'}")
        if verdict:
            high, why, context = middle, verdict, ledger
        else:
            low = middle
    last = context.result().rewrites
    if high and last:
        return Culprit(last[-1], why, total)
    return Culprit(Rewrite(high, context._pass, "a change that is not a numbered rewrite", "the graph"), why, total)


# -- spec strings ----------------------------------------------------------------------------------------------------

_ITEM = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{((?:\"(?:[^\"\\]|\\.)*\"|[^{}\"])*)\})?\s*(,|$)")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(\"(?:[^\"\\]|\\.)*\"|[^,\"{}]*?)\s*(,|$)")


def _split(spec: str) -> list[tuple[str, dict[str, str]]]:
    items, position = [], 0
    while position < len(spec):
        match = _ITEM.match(spec, position)
        if match is None or match.end() == position:
            raise _malformed(spec, position)
        name, options, comma = match.groups()
        items.append((name, _options(options or "", spec)))
        position = match.end()
        if comma and position == len(spec):
            raise _malformed(spec, position)
    if not items:
        raise _malformed(spec, 0)
    return items


def _options(text: str, spec: str) -> dict[str, str]:
    options: dict[str, str] = {}
    position = 0
    while position < len(text.rstrip()):
        match = _OPTION.match(text, position)
        if match is None:
            raise _malformed(spec, spec.index(text) + position)
        name, value, _ = match.groups()
        if name in options:
            raise InputError(f"the pass spec {spec!r} gives {name!r} twice")
        options[name] = json.loads(value) if value.startswith('"') else value
        position = match.end()
    return options


def _malformed(spec: str, position: int) -> InputError:
    return InputError(
        f"the pass spec {spec!r} cannot be read",
        f"at character {position + 1}",
        "write it like clean,prune{ratio=0.3,align=8}; an empty list is not a pipeline",
    )


def _make(name: str, options: dict[str, str]) -> Pass:
    cls = registry.pass_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in fields:
            raise InputError(
                f"pass {name} has no option {option!r}",
                did_you_mean(option, fields) or f"its options are: {', '.join(fields) or 'none'}",
                "`edgecompile passes` lists them",
            )
        values[option] = _convert(name, option, text, type(fields[option].default))
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(f"pass {name} cannot take these options", str(error)) from None


_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _convert(name: str, option: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return _BOOLS[text.lower()]
        if kind is int and text[-3:] in _UNITS:
            return int(text[:-3]) * _UNITS[text[-3:]]
        return kind(text)
    except (ValueError, KeyError):
        raise InputError(f"pass {name}: {option}={text} is not {_article(kind.__name__)}") from None


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
