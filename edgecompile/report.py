"""What a build did, proved and measured: one document as JSON, terminal table, Markdown and one HTML page.

The JSON form is described by ``schemas/report.schema.json``; numbers that are not finite are written as
:mod:`edgecompile.documents` says. ``verdict`` and the ``status`` of a pass follow from the rest of the
document; they are written for readers and ignored when a report is read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompile import __version__, documents
from edgecompile.bundle import file_digest
from edgecompile.errors import InputError
from edgecompile.files import write_atomic
from edgecompile.frontend import Accuracy, Attempt, Source
from edgecompile.graph import Dim
from edgecompile.measure import Ratio, Samples, ratio
from edgecompile.oracle import OutputError
from edgecompile.pipeline import Step, Trace
from edgecompile.pruning import Pruning
from edgecompile.stats import Stats, type_name
from edgecompile.target import EngineManifest, LayerTime
from edgecompile.tradeoff import Tradeoff

if TYPE_CHECKING:
    from rich.console import Console

    from edgecompile.driver import Options
    from edgecompile.sensitivity import Search

SCHEMA = "edgecompile.report/1"
MOST_SAMPLES = 2000  # per arm in the document; percentiles are taken from all of them
CONFIDENCE = 0.95  # below it an interval supports no verdict
_CLOCKS = {"thread_cpu": "thread CPU time", "wall": "wall-clock time", "cuda_event": "CUDA event time"}


@dataclass(frozen=True)
class Port:
    """An input or output of the model; ``shape`` is None for an unknown rank."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None


@dataclass(frozen=True)
class Model:
    """What was compiled.

    Attributes:
        name: as given to the command.
        kind: ``zoo``, ``python``, ``onnx``, ``pt2``, ``bundle`` or what else opened it.
        inputs, outputs: its signature.
        notes: what the front end has to say about it.
    """

    name: str
    kind: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """How the bundle was made.

    Attributes:
        command: the command line.
        created: UTC time in ISO 8601.
        edgecompile: version.
        precision, passes, seed: as given or defaulted; ``passes`` is the spec of the pipeline.
        versions: of the packages involved.
        machine: what is known about the machine.
        seconds: wall time per phase.
    """

    command: str
    created: str
    edgecompile: str
    precision: str
    passes: str
    seed: int
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Parity:
    """The engine against the model it was made from.

    Attributes:
        reference: what it was compared with, e.g. ``eager torch``.
        tolerance: largest ``max_rel`` allowed.
        outputs: error of each output.
        of_source: whether the reference is the model as given, and not what an approximating pass left of it.
        approximated: the option of the target by which the engine computes another function, ``""`` if none does.
        min_snr: least ``snr_db`` allowed, None without such an option.
    """

    reference: str
    tolerance: float
    outputs: Mapping[str, OutputError]
    of_source: bool = True
    approximated: str = ""
    min_snr: float | None = None

    def allows(self, error: OutputError) -> bool:
        """Whether an output's error is within what is allowed."""
        return error.max_rel <= self.tolerance and (self.min_snr is None or error.snr_db >= self.min_snr)

    @property
    def ok(self) -> bool:
        """Whether every output is within what is allowed."""
        return all(map(self.allows, self.outputs.values()))


@dataclass(frozen=True)
class Arm:
    """Latency of one engine, in seconds per call.

    Attributes:
        label: what was timed.
        calls: how many.
        p50, p90, mean: over all calls.
        p99: None from fewer than 459 calls, which cannot support it.
        samples: at most 2000 calls, evenly spaced in time.
    """

    label: str
    calls: int
    p50: float
    p90: float
    p99: float | None
    mean: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Samples) -> Arm:
        """Summarise the calls of one arm."""
        calls = samples.seconds
        kept = np.unique(np.linspace(0, len(calls) - 1, MOST_SAMPLES).round().astype(int))
        thinned = tuple(round(float(s), 9) for s in calls[kept])
        p50, p90, p99 = samples.p50, samples.p90, samples.p99
        return cls(samples.label, len(calls), p50, p90, p99, float(calls.mean()), thinned)


@dataclass(frozen=True)
class Stage:
    """Latency of the graph that one pass left, measured beside the other two arms; ``p50`` in seconds."""

    after: str
    calls: int
    p50: float
    ratio: Ratio


@dataclass(frozen=True)
class Latency:
    """Everything timed in one run.

    Attributes:
        clock: ``thread_cpu``, ``wall`` or ``cuda_event``.
        threads: CPU threads of an arm, 0 if it does not run on the CPU.
        plain: the model as exported, lowered by the same target.
        engine: the engine of the bundle.
        ratio: time of the engine over time of the plain export, round by round.
        overhead: what an empty call costs on this clock, in seconds; it is contained in every figure.
        load: one-minute load average of the machine before and after.
        stages: after each pass that changed the graph but the last, whose graph the engine is made of.
    """

    clock: str
    threads: int
    plain: Arm
    engine: Arm
    ratio: Ratio
    overhead: float
    load: tuple[float, ...]
    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, arms: Sequence[tuple[str, Samples]]) -> Latency:
        """Summarise one interleaved run.

        Args:
            arms: label and samples, in the order plain export, after each pass, engine.
        """
        plain, engine = arms[0][1], arms[-1][1]
        return cls(
            clock=engine.clock,
            threads=engine.threads,
            plain=Arm.of(plain),
            engine=Arm.of(engine),
            ratio=ratio(engine, plain),
            overhead=engine.overhead,
            load=engine.load,
            stages=tuple(Stage(label, len(s.seconds), s.p50, ratio(s, plain)) for label, s in arms[1:-1]),
        )

    @property
    def clock_name(self) -> str:
        """The clock in words."""
        return _CLOCKS.get(self.clock, self.clock)

    @property
    def difference(self) -> int:
        """1 if the engine is slower than the plain export, -1 if it is faster, 0 if the run cannot tell."""
        return (self.ratio.low > 1) - (self.ratio.high < 1) if self.ratio.confidence >= CONFIDENCE else 0


@dataclass(frozen=True)
class SensitiveLayer:
    """What one layer costs in int8; None: not measured.

    Attributes:
        layer: module path and operator.
        bits: width of its weights.
        only_int8: signal-to-noise ratio of the outputs in dB when nothing else is int8.
        only_float: the same when everything else is int8, as if it were reverted.
        score: of ``evaluate(run)`` when everything else is int8.
        saved: microseconds that int8 saves in the kernels that hold the layer, without the conversions around it.
        reverted: it stays in floating point.
    """

    layer: str
    bits: int
    only_int8: float | None
    only_float: float | None
    score: float | None
    saved: float | None
    reverted: bool


@dataclass(frozen=True)
class Sensitivity:
    """The choice of layers for int8 or another form, on calibration data.

    Attributes:
        whole: signal-to-noise ratio of the outputs in dB with all layers in int8.
        snr: the same with those that were not reverted.
        score, base: of ``evaluate(run)``, with those and in floating point; None if no score was to be kept.
        holds: the budget was kept.
        finished: False if the time ran out before all layers were measured.
        layers: the most sensitive first.
        form: what the layers become; where int8 is said, it is meant.
    """

    whole: float
    snr: float
    score: float | None
    base: float | None
    holds: bool
    finished: bool
    layers: tuple[SensitiveLayer, ...]
    form: str = "int8"

    @property
    def measured(self) -> bool:
        """Whether any layer was measured by itself."""
        return any(row.only_float is not None for row in self.layers)

    @classmethod
    def of(cls, found: Search, saved: Mapping[int, float]) -> Sensitivity:
        """What a search found, with the microseconds saved by position of the layer."""
        rows = tuple(
            SensitiveLayer(
                r.layer, r.bits, r.only_int8, r.only_float, r.score, saved.get(r.position), r.reverted
            )
            for r in found.table
        )  # fmt: skip
        return cls(found.whole, found.snr, found.score, found.base, found.holds, found.finished, rows, found.form)


@dataclass(frozen=True)
class File:
    """A file of the bundle."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Line:
    """A sentence for a person.

    Attributes:
        level: ``good``, ``bad``, ``warn`` or ``info``.
        text: in the words of this module.
        detail: in the words of the model, a pass or a tool.
    """

    level: str
    text: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """One build, as data.

    Attributes:
        model: what was compiled.
        provenance: how.
        engine: what came out.
        export: attempts to export the model, in order; empty for a model that came as a graph.
        before, after: size and work of the graph as exported and as lowered.
        passes: the steps between.
        parity: the engine against its reference.
        latency: None if it was not measured.
        accuracy: what the user's ``evaluate(run)`` returned; None without it, or if it was not asked.
        layers: time of each layer of the engine, in execution order.
        sensitivity: what each layer costs in int8; None if no layers were chosen for it.
        tradeoff: error against bytes and energy of weights in several widths; None if no pass made them.
        pruning: what channel pruning did; None if it was not run.
        files: of the bundle, as far as they were written when the report was made.
        warnings: what went wrong without stopping the build.
    """

    model: Model
    provenance: Provenance
    engine: EngineManifest
    export: tuple[Attempt, ...]
    before: Stats
    after: Stats
    passes: tuple[Step, ...]
    parity: Parity
    latency: Latency | None
    accuracy: Accuracy | None
    layers: tuple[LayerTime, ...]
    files: tuple[File, ...]
    sensitivity: Sensitivity | None = None
    tradeoff: Tradeoff | None = None
    pruning: Pruning | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_build(
        cls,
        *,
        source: Source,
        options: Options,
        spec: str,
        command: str,
        created: str,
        trace: Trace,
        before: Stats,
        after: Stats,
        parity: Mapping[str, OutputError],
        left_by: str = "",
        tolerance: float,
        approximated: str = "",
        min_snr: float | None = None,
        latency: Sequence[tuple[str, Samples]],
        accuracy: Accuracy | None,
        layers: Iterable[LayerTime],
        saved: Mapping[int, float] = {},
        engine: EngineManifest,
        machine: Mapping[str, Any],
        seconds: Mapping[str, float],
        files: Iterable[Path],
        warnings: Iterable[str] = (),
    ) -> Report:
        """Put together what a build knows.

        Args:
            source: the model as loaded.
            options: of the build.
            spec: the pipeline that ran.
            command: the command line.
            created: UTC time in ISO 8601.
            trace: what the passes did.
            before, after: the graph as exported and as lowered.
            parity: the engine against the reference, per output.
            left_by: the passes whose result is the reference; ``""`` if it is the model as given.
            tolerance: largest ``max_rel`` allowed.
            approximated, min_snr: see :class:`Parity`.
            latency: label and samples of each arm, in the order plain export, after each pass, engine; may be empty.
            accuracy: what the user's ``evaluate(run)`` returned, if it was called.
            layers: of the engine.
            saved: microseconds that int8 saves, by position of the layer in the trace's table.
            engine: its manifest.
            machine: what is known about the machine.
            seconds: wall time per phase.
            files: paths of the bundle's files, which are read for their digests.
            warnings: what went wrong without stopping the build.
        """
        signature = source.graph.signature()
        inputs, outputs = (tuple(_port(p) for p in ports) for ports in (signature.inputs, signature.outputs))
        reference = "the stored reference" if source.kind == "bundle" else "eager torch"
        return cls(
            model=Model(source.name, source.kind, inputs, outputs, tuple(source.notes)),
            provenance=Provenance(
                command, created, __version__, options.precision, spec, options.seed, dict(source.versions),
                dict(machine), dict(seconds),
            ),
            engine=engine,
            export=source.attempts,
            before=before,
            after=after,
            passes=trace.steps,
            parity=Parity(
                f"the graph after {left_by}" if left_by else reference if source.reference else "the graph as given",
                tolerance, dict(parity), not left_by, approximated, min_snr,
            ),
            latency=Latency.of(latency) if latency else None,
            accuracy=accuracy,
            layers=tuple(layers),
            files=tuple(File(p.name, p.stat().st_size, file_digest(p)) for p in files),
            sensitivity=Sensitivity.of(trace.sensitivity, saved) if trace.sensitivity else None,
            tradeoff=trace.tradeoff,
            pruning=trace.pruning,
            warnings=tuple(warnings),
        )  # fmt: skip

    # -- what a person should read first --------------------------------------------------------------------------

    @property
    def verdict(self) -> tuple[Line, ...]:
        """The result in a few sentences, the most important first."""
        from edgecompile import render_text as text

        lines = []
        if self.parity.approximated:
            least = text.decibels(min(e.snr_db for e in self.parity.outputs.values()))
            option = f"the option {self.parity.approximated}"
            lines.append(Line("warn", f"Not the same function: {option} left an output of the engine at {least}."))
        lines += [Line("warn", "The build says:", w) for w in self.warnings]
        if not self.parity.of_source:
            lines += [
                Line("warn", f"Not the same function: {s.spec} left an output at {text.decibels(worst)}.")
                for s in self.passes
                if not s.exact and s.rewrites and (worst := _least_snr(s)) is not None
            ]
        lines += [self._parity_line(text), self._latency_line(text)]
        if self.accuracy is not None:
            lines.append(_accuracy_line(self.accuracy, text))
        if self.sensitivity is not None and not self.sensitivity.holds:
            form = self.sensitivity.form
            lines.append(Line("warn", f"The budget of {form} does not hold: the time for reverting layers ran out."))
        lines += [
            Line("warn", "A pass was rolled back; the engine is built without it:", f"{s.spec}: {s.failure}")
            for s in self.passes
            if s.failure
        ]
        lines += [
            Line("warn", "The numbers after a pass were not compared:", f"{s.spec}: {s.unverified}")
            for s in self.passes
            if s.unverified and s.rewrites
        ]
        lines += [
            Line(
                "info",
                "An exporter failed, the next one was used:",
                ": ".join(filter(None, (a.rung, a.where, a.error))),
            )
            for a in self.export
            if not a.ok
        ]
        lines += [Line("info", "The engine:", str(note)) for note in self.engine.options.get("_notes", ())]
        return tuple(lines)

    def _parity_line(self, text) -> Line:
        if not self.parity.outputs:
            why = "the engine does not run here" if self.model.outputs else "the model has no outputs"
            return Line("warn", f"Nothing was compared: {why}.")
        against = f"against {self.parity.reference} ({text.error(self.parity.tolerance)} is allowed)"
        name, worst = max(self.parity.outputs.items(), key=lambda item: _severity(item[1].max_rel))
        if not self.parity.ok:
            off = f"off by {text.error(worst.max_rel)} of its largest value"
            return Line("bad", f"Not the same model: an output is {off}, {against}:", name)
        if self.parity.min_snr is not None:
            allowed = f"{text.decibels(self.parity.min_snr)} from {self.parity.reference} are allowed"
            return Line("good", f"The engine keeps the budget of {self.parity.approximated}: {allowed}.")
        same = "The same model" if self.parity.of_source else "The engine computes what the passes left"
        if not worst.max_abs:
            return Line("good", f"{same}: no output differs at all, {against}.")
        off = f"off by more than {text.error(worst.max_rel)} of its largest value"
        return Line("good", f"{same}: no output is {off}, {against}.")

    def _latency_line(self, text) -> Line:
        if self.latency is None:
            return Line("info", "Latency was not measured.")
        speed, interval = text.speedup(self.latency.ratio)
        p50 = f"p50 {text.seconds(self.latency.engine.p50)} against {text.seconds(self.latency.plain.p50)}"
        facts = f"{p50}, {interval}, {self.latency.clock_name}"
        if self.latency.ratio.confidence < CONFIDENCE:
            return Line("info", f"{speed} as fast as the plain export, but this is no evidence ({facts}).")
        if self.latency.difference > 0:
            return Line("warn", f"Slower than the plain export: {speed} its speed ({facts}).")
        if self.latency.difference < 0:
            return Line("good", f"{speed} as fast as the plain export ({facts}).")
        return Line("info", f"As fast as the plain export, as far as this run can tell: {speed} ({facts}).")

    @property
    def versions(self) -> dict[str, str]:
        """All versions involved."""
        return {"edgecompile": self.provenance.edgecompile, **self.provenance.versions, **self.engine.versions}

    @property
    def modules(self) -> list[ModuleTime]:
        """Layer times by module, see :func:`by_module`."""
        return by_module(self.layers)

    # -- the document ---------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document."""
        return documents.encode(self, _DERIVED)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """Read a document that :meth:`to_json` wrote.

        Raises:
            InputError: it is not a report, or one of another version.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, Mapping) else None
            raise InputError(
                f"this is not a report of the schema {SCHEMA}", f"its schema is {found!r}", "build the bundle again"
            )
        try:
            return documents.decode(cls, document, "report", _DERIVED)
        except documents.Malformed as error:
            raise InputError("the report cannot be read", str(error), "build the bundle again") from None

    def write(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and ``report.html``.

        Raises:
            InputError: the folder cannot be written.
        """
        from edgecompile import render_html, render_text

        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        write_atomic(folder / "report.json", [text.encode()])
        write_atomic(folder / "report.md", [render_text.markdown(self).encode()])
        write_atomic(folder / "report.html", [render_html.page(self).encode()])

    def print_table(self, console: Console) -> None:
        """Print the report for a person at a terminal."""
        from edgecompile import render_text

        render_text.print_table(self, console)


def schema() -> dict[str, Any]:
    """The JSON Schema of the document (draft 2020-12)."""
    return json.loads(resources.files("edgecompile").joinpath("schemas/report.schema.json").read_text())


def status(step: Step) -> str:
    """What became of a pass: ``rolled back``, ``kept`` or ``nothing to do``."""
    if step.failure:
        return "rolled back"
    return "kept" if step.rewrites else "nothing to do"


def _least_snr(step: Step) -> float | None:
    """Signal-to-noise ratio in dB of the output that a pass changed most; None if it was not compared or not kept."""
    if not step.errors or step.failure:
        return None
    return min(e.snr_db for e in step.errors.values())


def error_added(step: Step) -> float | None:
    """Largest relative difference that a pass made to any output; None if it was not compared or not kept."""
    if step.errors is None or step.failure:
        return None
    return max((e.max_rel for e in step.errors.values()), default=0.0, key=_severity)


def accuracy_level(found: Accuracy) -> str:
    """``warn`` if the engine scores less than eager torch by more than rounding, ``good`` if not, else ``info``."""
    if found.reference is None:
        return "info"
    same = math.isclose(found.engine, found.reference, rel_tol=1e-6)
    return "good" if same or found.engine > found.reference else "warn"


def _accuracy_line(found: Accuracy, text) -> Line:
    if found.reference is None:
        return Line("info", f"Accuracy {text.score(found.engine)}; there is none of eager torch:", found.note)
    both = f"accuracy {text.score(found.engine)}, eager {text.score(found.reference)}"
    level = accuracy_level(found)
    return Line(level, f"Less accurate than eager torch: {both}." if level == "warn" else f"{both.capitalize()}.")


# -- layers by module ------------------------------------------------------------------------------------------------

_UNKNOWN = "(no module)"
_FEWEST, _MOST, _DEEPEST = 4, 24, 4


@dataclass(frozen=True)
class ModuleTime:
    """Time of the layers beneath one torch module.

    Attributes:
        path: the module path, or a name in parentheses for layers without one.
        microseconds: sum over the layers.
        layers: in execution order.
    """

    path: str
    microseconds: float
    layers: tuple[LayerTime, ...]

    @property
    def by_op(self) -> dict[str, float]:
        """Microseconds per kind of operator, longest first."""
        total: dict[str, float] = {}
        for layer in self.layers:
            total[layer.op] = total.get(layer.op, 0.0) + layer.microseconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def home(layer: LayerTime) -> str:
    """The innermost module that holds everything a layer executes, or the first of several; ``""`` if unknown."""
    paths = [m.split(".") for m in layer.modules if m]
    common: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common or (paths[0] if paths else ()))


def by_module(layers: Sequence[LayerTime]) -> list[ModuleTime]:
    """Group layers by module path, in execution order.

    The paths are cut at the depth that tells the parts of the model apart: the first at which there are at least four,
    unless there are then more than 24.
    """
    homes = [home(layer).split(".") for layer in layers]
    if not homes:
        return []
    counts = [len({tuple(h[:depth]) for h in homes if h != [""]}) for depth in range(1, _DEEPEST + 1)]
    depth = next((d for d, n in enumerate(counts, 1) if n >= _FEWEST), counts.index(max(counts)) + 1)
    if counts[depth - 1] > _MOST and depth > 1 and counts[depth - 2] > 1:
        depth -= 1
    groups: dict[str, list[LayerTime]] = {}
    for path, layer in zip(homes, layers, strict=True):
        groups.setdefault(".".join(path[:depth]) or _UNKNOWN, []).append(layer)
    return [ModuleTime(path, math.fsum(x.microseconds for x in found), tuple(found)) for path, found in groups.items()]


# -- JSON ------------------------------------------------------------------------------------------------------------

_DERIVED: documents.Derived = {
    Report: {"schema": lambda _: SCHEMA, "verdict": lambda report: report.verdict},
    Step: {"status": status},
    Parity: {"ok": lambda parity: parity.ok},
}


def _severity(relative: float) -> float:
    return math.inf if math.isnan(relative) else relative


def _port(port: Any) -> Port:
    return Port(port.name, type_name(port.dtype), port.shape)
